//! The embedded mode, whole: nodes in one process, over loopback, as a host program has them.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use quorate::Error;
use quorate::embed::{Access, EmbedConfig, Node, Role, Token};
use quorate::proto::etcdserverpb::cluster_client::ClusterClient;
use quorate::proto::etcdserverpb::{MemberRemoveRequest, RangeRequest};
use tonic::transport::Channel;

#[path = "common/nodes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod nodes;
#[path = "common/ports.rs"]
mod ports;
use nodes::{PATIENCE, config, join, places, start_all, until_access};
use ports::free_port;

/// The story of the README: five nodes, three servers, one killed, two killed, one back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_have_one_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(5);
    let configs: Vec<_> = (0..5).map(|at| config(dir.path(), at, places[at], join(&places))).collect();
    let mut nodes: Vec<Option<Node>> = start_all(&configs).await.into_iter().map(Some).collect();
    let of = |nodes: &[Option<Node>], role| -> Vec<usize> {
        (0..5).filter(|at| nodes[*at].as_ref().is_some_and(|node| node.role() == role)).collect()
    };
    let (servers, clients) = (of(&nodes, Role::Server), of(&nodes, Role::Client));
    assert_eq!((servers.len(), clients.len()), (3, 2));
    let cluster = nodes[0].as_ref().unwrap().cluster_id();
    for node in nodes.iter().flatten() {
        assert_eq!(node.cluster_id(), cluster);
        assert_eq!(node.endpoints().borrow().len(), 3);
        until_access(node, Access::ReadWrite).await;
    }
    let local = |nodes: &[Option<Node>], at: usize| nodes[at].as_ref().unwrap().local().unwrap().clone();
    assert!(nodes[clients[0]].as_ref().unwrap().local().is_none());
    // The same few lines on every node, whatever is behind them.
    for (at, node) in nodes.iter().enumerate() {
        let client = node.as_ref().unwrap().client();
        let began = Instant::now();
        while let Err(err) = client.put(format!("nodes/{at}"), "here").await {
            assert!(began.elapsed() < PATIENCE, "{err}");
        }
        assert_eq!(client.get(format!("nodes/{at}")).await.unwrap().unwrap().value, "here");
    }
    local(&nodes, servers[0]).put("volumes/a", "3 replicas").await.unwrap();

    // One server stops: everything goes on.
    nodes[servers[2]].take().unwrap().shutdown().await.unwrap();
    for at in [servers[0], clients[0]] {
        until_access(nodes[at].as_ref().unwrap(), Access::ReadWrite).await;
    }
    let began = Instant::now();
    while let Err(err) = local(&nodes, servers[0]).put("volumes/b", "2 replicas").await {
        assert!(began.elapsed() < PATIENCE, "{err}");
    }

    // Two are down: every node says so, and still reads.
    nodes[servers[1]].take().unwrap().shutdown().await.unwrap();
    for node in nodes.iter().flatten() {
        until_access(node, Access::ReadOnly).await;
        let mut availability = node.availability();
        tokio::time::timeout(PATIENCE, availability.wait_for(|now| now.kv && !now.kv_write && !now.reason.is_empty()))
            .await
            .unwrap()
            .unwrap();
    }
    let health = nodes[clients[0]].as_ref().unwrap().health_json();
    let status = |part: &str| health["submodules"][part]["status"].as_str().unwrap().to_owned();
    assert_eq!((status("kv"), status("kv_write")), ("alive".into(), "unavailable".into()), "{health}");
    assert_eq!((health["role"].as_str(), health["cluster"].as_str()), (Some("client"), cluster.as_deref()), "{health}");
    let read = RangeRequest { key: "volumes/b".into(), serializable: true, ..RangeRequest::default() };
    assert_eq!(local(&nodes, servers[0]).range(read).await.unwrap().count, 1);

    // One comes back, with another list and another wish: it is the server it was.
    let mut other = configs[servers[1]].clone();
    other.join = vec![join(&places)[servers[1]].clone()];
    let back = Node::start(other).await.unwrap();
    assert_eq!((back.role(), back.cluster_id()), (Role::Server, cluster.clone()));
    nodes[servers[1]] = Some(back);
    for node in nodes.iter().flatten() {
        until_access(node, Access::ReadWrite).await;
    }

    // One that nobody has listed, and that knows one address, joins; and a client that comes back needs nobody's help to know what it is.
    let late = config(dir.path(), 9, (free_port(), free_port()), vec![join(&places)[servers[0]].clone()]);
    let late = Node::start(late).await.unwrap();
    assert_eq!((late.role(), late.cluster_id()), (Role::Client, cluster.clone()));
    assert_eq!(late.endpoints().borrow().len(), 3);
    until_access(&late, Access::ReadWrite).await;
    late.shutdown().await.unwrap();
    for node in nodes.iter_mut().filter_map(Option::take) {
        node.shutdown().await.unwrap();
    }
    let mut alone = configs[clients[0]].clone();
    alone.start_timeout = Duration::from_secs(1);
    let alone = Node::start(alone).await.unwrap();
    assert_eq!((alone.role(), alone.cluster_id()), (Role::Client, cluster));
    until_access(&alone, Access::ReadOnly).await;
    alone.shutdown().await.unwrap();
}

/// Tries to start until what it is refused with says all this.
async fn refused_until(config: &EmbedConfig, wanted: &[&str]) {
    let began = Instant::now();
    loop {
        let why = Node::start(config.clone()).await.unwrap_err();
        let text = why.to_string();
        assert!(matches!(why, Error::Founding(_)), "{text}");
        if wanted.iter().all(|part| text.contains(part)) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{text}, wanted {wanted:?}");
    }
}

/// A start that comes to nothing says who is missing, leaves nothing behind, and can be tried again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let mut first = config(dir.path(), 0, places[0], join(&places));
    first.start_timeout = Duration::from_secs(2);
    let missing: Vec<String> = join(&places)[1..].iter().map(|entry| format!("{entry} is missing")).collect();
    let mut wanted: Vec<&str> = missing.iter().map(String::as_str).collect();
    wanted.push("1 of 3");
    // Twice: the directory and the ports are free again.
    for _ in 0..2 {
        refused_until(&first, &wanted).await;
    }
    // Who has another token is nobody; who has another list takes no part.
    let mut others: Vec<_> = (1..3).map(|at| config(dir.path(), at, places[at], join(&places))).collect();
    others[0].token = Token::new("another");
    others[1].join.push("127.0.0.1:1".into());
    let try_others = futures_util::future::join_all(others.into_iter().map(Node::start));
    tokio::select! {
        started = try_others => panic!("{started:?}"),
        () = refused_until(&first, &["another shared token", "JoinSetMismatch"]) => {}
    }
    // With the right ones all is well.
    let configs: Vec<_> = (0..3).map(|at| config(dir.path(), at, places[at], join(&places))).collect();
    let nodes = start_all(&configs).await;
    for node in nodes {
        assert_eq!(node.role(), Role::Server);
        until_access(&node, Access::ReadWrite).await;
        node.shutdown().await.unwrap();
    }
}

/// A process that does not outlive a test that fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn remove(cluster: &mut ClusterClient<Channel>, id: u64) {
    // While there is no leader it may be refused, or come to an end that is not known.
    let began = Instant::now();
    while let Err(status) = cluster.member_remove(MemberRemoveRequest { id }).await {
        if status.code() == tonic::Code::NotFound {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A server that has lost its state waits for the others', but no longer than it was told; and then it has let go of everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_does_not_wait_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let configs = (0..3).map(|at| {
        let mut config = config(dir.path(), at, places[at], join(&places));
        config.server.snapshot_catchup_entries = 5;
        config
    });
    let configs: Vec<_> = configs.collect();
    let state = dir.path().join("node-0/server/member/state");
    let mut alone = configs[0].clone();
    alone.start_timeout = Duration::from_secs(2);
    let began = Instant::now();
    loop {
        let nodes = start_all(&configs).await;
        for node in &nodes {
            until_access(node, Access::ReadWrite).await;
        }
        for key in 0..100 {
            while let Err(err) = nodes[0].client().put(format!("key {key}"), vec![b'v'; 300]).await {
                assert!(began.elapsed() < PATIENCE, "{err}");
            }
            // In all longer than it takes until the state is synced: only then is the log cut off.
            tokio::time::sleep(Duration::from_millis(70)).await;
        }
        for node in nodes {
            node.shutdown().await.unwrap();
        }
        std::fs::remove_dir_all(&state).unwrap();
        match Node::start(alone.clone()).await {
            Err(Error::Unavailable(_)) => break,
            // Its log was not cut off yet, and is enough.
            Ok(node) => node.shutdown().await.unwrap(),
            Err(err) => panic!("{err}"),
        }
        assert!(began.elapsed() < PATIENCE, "the log is never cut off");
    }
    // At once, and as often as one likes: nothing holds the directory or the ports.
    for _ in 0..2 {
        let why = Node::start(alone.clone()).await;
        assert!(matches!(why, Err(Error::Unavailable(_))), "{why:?}");
    }
    for node in start_all(&configs).await {
        until_access(&node, Access::ReadWrite).await;
        node.shutdown().await.unwrap();
    }
}

/// A server that is removed says so, keeps its host running, and never founds or joins anything again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_server_leaves_a_tombstone() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let configs: Vec<_> = (0..3).map(|at| config(dir.path(), at, places[at], join(&places))).collect();
    let mut nodes = start_all(&configs).await;
    for node in &nodes {
        until_access(node, Access::ReadWrite).await;
    }
    let members = nodes[0].local().unwrap().last_members();
    let gone = members.iter().find(|member| member.name == "node-2").unwrap();
    let client_url = format!("http://127.0.0.1:{}", places[0].1);
    let mut cluster = ClusterClient::new(tonic::transport::Endpoint::from_shared(client_url).unwrap().connect().await.unwrap());
    remove(&mut cluster, gone.id).await;
    let removed = nodes.pop().unwrap();
    let mut availability = removed.availability();
    let told = availability.wait_for(|now| now.access == Access::ReadOnly && now.reason.contains("removed"));
    tokio::time::timeout(PATIENCE, told).await.unwrap().unwrap();
    let why = tokio::time::timeout(PATIENCE, removed.stopped()).await.unwrap();
    assert!(matches!(why, Err(Error::Removed)), "{why:?}");
    let _ = removed.shutdown().await;
    let again = Node::start(configs[2].clone()).await;
    assert!(matches!(again, Err(Error::Removed)), "{again:?}");
    // A node that is a process of its own does not stay as if nothing had happened: it says why, and ends with 1.
    let mut binary = std::process::Command::new(env!("CARGO_BIN_EXE_quorate"));
    binary.arg("embed").env_clear().env("JOIN", join(&places).join(",")).env("ADVERTISE_IP", "127.0.0.1");
    binary.env("KV_PEER_PORT", places[1].0.to_string()).env("KV_CLIENT_PORT", places[1].1.to_string()).env("KV_TOKEN", "a secret");
    binary.env("KV_DATA_DIR", dir.path().join("node-1")).env("HOSTNAME", "node-1");
    nodes.pop().unwrap().shutdown().await.unwrap();
    let mut child = Process(binary.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    until_access(&nodes[0], Access::ReadWrite).await;
    let members = nodes[0].local().unwrap().last_members();
    let gone = members.iter().find(|member| member.name == "node-1").unwrap().id;
    remove(&mut cluster, gone).await;
    let began = Instant::now();
    let ended = loop {
        if let Some(ended) = child.0.try_wait().unwrap() {
            break ended;
        }
        assert!(began.elapsed() < PATIENCE, "the process stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(ended.code(), Some(1));
    // Who is left has heard that there is one server now.
    for node in &nodes {
        let mut endpoints = node.endpoints();
        tokio::time::timeout(PATIENCE, endpoints.wait_for(|now| now.len() == 1)).await.unwrap().unwrap();
    }
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// The table of requirements names tests: each is there.
#[test]
fn the_requirements_name_tests_that_there_are() {
    fn sources(dir: &Path, text: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                sources(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                *text += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for dir in ["src", "tests"] {
        sources(&root.join(dir), &mut code);
    }
    let table = std::fs::read_to_string(root.join("tests/embed/REQUIREMENTS.md")).unwrap();
    let shown = table.lines().filter(|line| line.starts_with("| ")).filter_map(|line| line.rsplit('|').nth(1));
    let is_name = |text: &&str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let named: Vec<&str> = shown.flat_map(|cell| cell.split('`').skip(1).step_by(2)).filter(is_name).collect();
    assert!(named.len() > 40, "{named:?}");
    let missing: Vec<_> = named.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}
