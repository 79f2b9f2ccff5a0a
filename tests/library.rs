//! The library as a host program uses it: servers in this process, called without a socket and over one.

use std::path::Path;
use std::time::Duration;

use quorate::client::{EventKind, WatchMessage};
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::{Compare, PutRequest, RequestOp, TxnRequest, WatchCreateRequest};
use quorate::{ApplyError, Config, Error, Server};

/// A configuration with a client port that the system picks, and no peer port.
fn config(dir: &Path) -> Config {
    let mut config = Config::default();
    config.data_dir = Some(dir.to_owned());
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![];
    config
}

#[tokio::test]
async fn keys_are_written_read_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    assert_eq!(client.put("a", "1").await.unwrap().header.unwrap().revision, 2);
    client.put("a", "2").await.unwrap();
    client.put("b", "3").await.unwrap();
    assert!(client.delete("b").await.unwrap());
    assert!(!client.delete("b").await.unwrap());
    let hash = client.hash_kv(0).await.unwrap();
    server.shutdown().await.unwrap();
    assert!(matches!(client.put("a", "3").await, Err(Error::Stopped)), "a client outlives its server, and says so");

    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    let a = client.get("a").await.unwrap().unwrap();
    assert_eq!((&a.value[..], a.version, a.create_revision, a.mod_revision), (&b"2"[..], 2, 2, 3));
    assert_eq!(client.get("b").await.unwrap(), None);
    assert_eq!(client.revision(), 5);
    assert_eq!(client.hash_kv(0).await.unwrap(), hash);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_txn_happens_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    let put = |key: &'static str, value: &'static str| RequestOp {
        request: Some(Request::RequestPut(PutRequest { key: key.into(), value: value.into(), ..Default::default() })),
    };
    let absent = Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Version as i32,
        key: "a".into(),
        target_union: Some(TargetUnion::Version(0)),
        ..Default::default()
    };
    let txn = TxnRequest { compare: vec![absent], success: vec![put("a", "1"), put("b", "1")], failure: vec![] };
    assert!(client.txn(txn.clone()).await.unwrap().succeeded);
    assert!(!client.txn(txn).await.unwrap().succeeded);
    let twice = TxnRequest { success: vec![put("c", "1"), put("c", "2")], ..Default::default() };
    assert!(matches!(client.txn(twice).await, Err(Error::Apply(ApplyError::DuplicateKey))));
    assert_eq!(client.revision(), 2);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_watch_sees_the_past_and_the_present_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    client.put("k/1", "a").await.unwrap();
    client.put("k/1", "b").await.unwrap();
    let request = WatchCreateRequest { key: "k/".into(), range_end: "k0".into(), start_revision: 2, prev_kv: true, ..Default::default() };
    let mut watcher = client.watch(request).unwrap();
    client.put("other", "x").await.unwrap();
    client.delete("k/1").await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        match watcher.next().await.unwrap().unwrap() {
            WatchMessage::Events(events) => seen.extend(events),
            other => panic!("{other:?}"),
        }
    }
    let brief: Vec<_> =
        seen.iter().map(|event| (event.kind, event.kv.mod_revision, event.prev_kv.as_ref().map(|kv| kv.mod_revision))).collect();
    assert_eq!(brief, [(EventKind::Put, 2, None), (EventKind::Put, 3, Some(2)), (EventKind::Delete, 5, Some(3))]);
    watcher.request_progress();
    assert_eq!(watcher.next().await.unwrap().unwrap(), WatchMessage::Progress { revision: 5 });

    client.compact(5).await.unwrap();
    let mut late = client.watch(WatchCreateRequest { key: "k/".into(), start_revision: 2, ..Default::default() }).unwrap();
    assert_eq!(late.next().await.unwrap().unwrap(), WatchMessage::Compacted { revision: 5 });
    assert_eq!(late.next().await.unwrap(), None);
    server.shutdown().await.unwrap();
    assert!(matches!(watcher.next().await, Err(Error::Stopped)));
}

#[tokio::test]
async fn a_lease_takes_its_keys_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    let lease = client.lease_grant(0, 2).await.unwrap().id;
    client.put_with(PutRequest { key: "mine".into(), lease, ..Default::default() }).await.unwrap();
    assert_eq!(client.lease_time_to_live(lease).await.unwrap().unwrap().keys, ["mine"]);
    assert_eq!(client.lease_keep_alive(lease).await.unwrap(), 2);
    let mut watcher = client.watch(WatchCreateRequest { key: "mine".into(), ..Default::default() }).unwrap();
    let message = tokio::time::timeout(Duration::from_secs(30), watcher.next()).await.expect("the lease expires").unwrap().unwrap();
    assert!(matches!(message, WatchMessage::Events(events) if events[0].kind == EventKind::Delete));
    assert_eq!(client.lease_time_to_live(lease).await.unwrap(), None);
    assert!(matches!(client.lease_keep_alive(lease).await, Err(Error::Apply(ApplyError::LeaseNotFound))));
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn servers_live_side_by_side_and_let_go_of_everything() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut servers = Vec::new();
    for dir in &dirs {
        servers.push(Server::start(config(dir.path())).await.unwrap());
    }
    for (number, server) in servers.iter().enumerate() {
        server.client().put("number", number.to_string()).await.unwrap();
    }
    for (number, server) in servers.iter().enumerate() {
        assert_eq!(server.client().get("number").await.unwrap().unwrap().value, number.to_string());
    }
    assert!(matches!(Server::start(config(dirs[0].path())).await, Err(Error::Locked { .. })));
    let addrs: Vec<_> = servers.iter().flat_map(|server| server.client_addrs().to_vec()).collect();
    for server in servers {
        server.shutdown().await.unwrap();
    }
    for (dir, addr) in dirs.iter().zip(addrs) {
        std::net::TcpListener::bind(addr).expect("the port is free again");
        Server::start(config(dir.path())).await.expect("the directory is free again").shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn a_start_that_fails_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config(dir.path());
    config.listen_client_urls = vec![format!("http://{}", taken.local_addr().unwrap()).parse().unwrap()];
    let err = Server::start(config.clone()).await.unwrap_err();
    assert!(err.to_string().contains(&taken.local_addr().unwrap().to_string()), "{err}");
    drop(taken);
    Server::start(config).await.unwrap().shutdown().await.unwrap();
}
