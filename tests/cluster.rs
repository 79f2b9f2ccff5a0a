//! Three members in one process, over loopback: what of clusters is built.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::RangeRequest;
use quorate::{Client, Config, Error, Server};

const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a cluster may take to come to something. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ports that nobody has now.
fn ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn config(dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let url = |at: usize| format!("http://127.0.0.1:{}", ports[at]);
    let mut config = Config::default();
    config.name = NAMES[at].into();
    config.data_dir = Some(dir.join(NAMES[at]));
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![url(at).parse().unwrap()];
    config.initial_advertise_peer_urls = config.listen_peer_urls.clone();
    config.initial_cluster = (0..3).map(|at| format!("{}={}", NAMES[at], url(at))).collect::<Vec<_>>().join(",");
    config.unfinished_clusters = true;
    config
}

async fn start(dir: &Path, ports: &[u16; 3], at: usize) -> Server {
    Server::start(config(dir, ports, at)).await.unwrap()
}

async fn start_all(dir: &Path, ports: &[u16; 3]) -> Vec<Server> {
    let mut servers = Vec::new();
    for at in 0..3 {
        servers.push(start(dir, ports, at).await);
    }
    servers
}

/// Puts, however often it takes. While there is no leader it may.
async fn put(client: &Client, key: &str, value: &str) {
    let began = Instant::now();
    while let Err(err) = client.put(key.to_owned(), value.to_owned()).await {
        assert!(began.elapsed() < PATIENCE, "putting {key}: {err}");
        assert!(matches!(err, Error::Timeout | Error::Apply(_)), "{err}");
    }
}

async fn get(client: &Client, key: &str) -> Option<String> {
    let began = Instant::now();
    loop {
        match client.get(key.to_owned()).await {
            Ok(kv) => return kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap()),
            Err(err) => assert!(began.elapsed() < PATIENCE, "getting {key}: {err}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_member_takes_every_request() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(dir.path(), &ports).await;
    let clients: Vec<Client> = servers.iter().map(Server::client).collect();
    assert!(servers.iter().all(|server| server.cluster_id() == servers[0].cluster_id()));
    for (at, client) in clients.iter().enumerate() {
        put(client, &format!("from {at}"), "x").await;
        // What one has acknowledged, all others see at once.
        for other in &clients {
            assert_eq!(get(other, &format!("from {at}")).await.as_deref(), Some("x"));
        }
        // And the member that has acknowledged it has it itself.
        let own = RangeRequest { key: format!("from {at}").into(), serializable: true, ..Default::default() };
        assert_eq!(client.range(own).await.unwrap().count, 1);
    }
    let lease = clients[0].lease_grant(0, 100).await.unwrap();
    for client in &clients {
        let left = client.lease_time_to_live(lease.id).await.unwrap().unwrap();
        assert!(left.remaining > 90, "{left:?}");
    }
    let leaders: Vec<u64> = clients.iter().map(|client| client.status().leader).collect();
    assert!(leaders.iter().all(|leader| *leader == leaders[0] && *leader != 0), "{leaders:x?}");
    for server in servers {
        server.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_member_may_be_gone() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers: Vec<Option<Server>> = start_all(dir.path(), &ports).await.into_iter().map(Some).collect();
    put(&servers[0].as_ref().unwrap().client(), "before", "0").await;
    for gone in 0..3 {
        servers[gone].take().unwrap().shutdown().await.unwrap();
        let rest: Vec<Client> = servers.iter().flatten().map(Server::client).collect();
        for (at, client) in rest.iter().enumerate() {
            put(client, &format!("without {gone}, from {at}"), "y").await;
            assert_eq!(get(client, "before").await.as_deref(), Some("0"));
        }
        // It comes back with its own data, and catches up.
        servers[gone] = Some(start(dir.path(), &ports, gone).await);
        let back = servers[gone].as_ref().unwrap().client();
        for at in 0..2 {
            assert_eq!(get(&back, &format!("without {gone}, from {at}")).await.as_deref(), Some("y"));
        }
    }
    // All of them at once, from their data alone.
    for server in servers.iter_mut() {
        server.take().unwrap().shutdown().await.unwrap();
    }
    for (at, server) in servers.iter_mut().enumerate() {
        *server = Some(start(dir.path(), &ports, at).await);
    }
    for server in servers.iter().flatten() {
        assert_eq!(get(&server.client(), "without 2, from 1").await.as_deref(), Some("y"));
    }
}

/// Two of three are gone: nothing is written and nothing is read that might be stale, and what is there can still be read as it is.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_promised() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(dir.path(), &ports).await;
    let client = servers[0].client();
    put(&client, "key", "value").await;
    for server in servers.drain(1..) {
        server.shutdown().await.unwrap();
    }
    let own = RangeRequest { key: "key".into(), serializable: true, ..Default::default() };
    assert_eq!(client.range(own).await.unwrap().count, 1);
    assert!(client.get("key").await.is_err());
    assert!(client.put("key", "other").await.is_err());
}
