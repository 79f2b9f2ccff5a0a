//! Looking after nodes of the embedded mode: backups and what becomes of them, health, and stops.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quorate::backup::BUMP_REVISION;
use quorate::embed::{Access, BackupConfig, EmbedConfig, Node, Role, Servers};
use quorate::proto::etcdserverpb::{DeleteRangeRequest, RangeRequest, RequestOp, TxnRequest, request_op};
use quorate::{Error, ErrorKind};

#[path = "common/nodes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod nodes;
#[path = "common/ports.rs"]
mod ports;
use nodes::{PATIENCE, config, get, join, places, put, until, until_access};
use ports::free_port;

/// Starts a node that can.
async fn start(config: &EmbedConfig) -> Node {
    nodes::start(config).await.unwrap()
}

async fn start_all(configs: &[EmbedConfig]) -> Vec<Node> {
    let nodes = nodes::start_all(configs).await;
    for node in &nodes {
        until_access(node, Access::ReadWrite).await;
    }
    nodes
}

/// A node alone in its list.
fn alone(dir: &Path) -> EmbedConfig {
    let place = places(1)[0];
    config(dir, 0, place, join(&[place]))
}

/// Three servers and a client with one store of backups; all is lost; one node is restored, and the others find it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_backed_up_and_one_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(4);
    let store = dir.path().join("backups");
    let configs = (0..4).map(|at| {
        let mut config = config(dir.path(), at, places[at], join(&places));
        config.servers = Servers::Three;
        let mut backup = BackupConfig::new(&store);
        backup.schedule = Some("* * * * * *".into());
        (backup.jitter, backup.keep) = (Duration::ZERO, 3);
        config.backup = Some(backup);
        config
    });
    let configs: Vec<_> = configs.collect();
    let nodes = start_all(&configs).await;
    let client = nodes.iter().find(|node| node.role() == Role::Client).unwrap();
    put(client.client(), "volumes/a", "3 replicas").await;

    // The leader makes them, all see them, and no more are kept than are to be.
    until("scheduled backups", async || client.backups().await.is_ok_and(|status| status.backups.len() >= 2)).await;
    let made = |node: &Node| node.metrics().counters.backups.made.get();
    assert_eq!(made(client), 0);
    until("they are counted", async || nodes.iter().map(made).sum::<u64>() >= 2).await;
    // On demand, on any node: what is there comes with it.
    let mut newest = None;
    until("a backup of a client", async || {
        newest = client.back_up().await.ok();
        newest.is_some()
    })
    .await;
    let newest = newest.unwrap();
    assert!(newest.revision >= 2);
    for node in &nodes {
        until("its health says so", async || node.backups().await.is_ok() && node.health_json()["backups"]["newestAt"].is_u64()).await;
        assert!(node.metrics().text().contains("quorate_backup_newest_age_seconds"));
    }
    let kept = dir.path().join("kept.backup");
    std::fs::copy(&newest.path, &kept).unwrap();
    put(client.client(), "volumes/b", "written later").await;
    let before = nodes[0].cluster_id().unwrap();
    let servers: Vec<usize> = (0..4).filter(|at| nodes[*at].role() == Role::Server).collect();

    // A node that runs is left alone.
    let config = &configs[servers[0]];
    let running = quorate::embed::restore(&kept, config, BUMP_REVISION);
    assert!(matches!(running, Err(Error::Locked { .. })), "{running:?}");
    for node in nodes {
        node.shutdown().await.unwrap();
    }

    // By the binary, with the variables of that node.
    let mut binary = Command::new(env!("CARGO_BIN_EXE_quorate"));
    binary.args(["restore", kept.to_str().unwrap(), "--node"]).env_clear().stdin(Stdio::null());
    binary.env("JOIN", config.join.join(",")).env("ADVERTISE_IP", "127.0.0.1").env("HOSTNAME", &config.hostname);
    binary.env("KV_PEER_PORT", config.peer_port.to_string()).env("KV_CLIENT_PORT", config.client_port.to_string());
    let output = binary.env("KV_DATA_DIR", &config.data_dir).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}{why}");
    let lines = ["has one server", "what was there is kept in", "warning: what cluster"];
    assert!(lines.iter().all(|line| said.contains(line)), "{said}");

    // It serves what was backed up, as a cluster of its own.
    let restored = start(config).await;
    until_access(&restored, Access::ReadWrite).await;
    let after = restored.cluster_id().unwrap();
    assert!(restored.role() == Role::Server && after != before && said.contains(&after), "{said}");
    assert_eq!(get(restored.client(), "volumes/a").await.as_deref(), Some("3 replicas"));
    assert_eq!(get(restored.client(), "volumes/b").await, None);
    assert!(restored.local().unwrap().revision() >= BUMP_REVISION as i64 + newest.revision);

    // Who remembers the old cluster is no part of it, whatever it was, and writes nothing anywhere.
    let old: Vec<usize> = (0..4).filter(|at| *at != servers[0]).collect();
    for at in &old {
        let node = start(&configs[*at]).await;
        assert_eq!(node.cluster_id().as_deref(), Some(before.as_str()));
        // From the start on, and at once when the node has found out.
        let early = node.client().put("volumes/c", "of the old one").await;
        assert!(early.is_err(), "{early:?}");
        until_access(&node, Access::ReadOnly).await;
        let refused = node.client().put("volumes/c", "of the old one").await;
        assert_eq!(refused.as_ref().map_err(Error::kind).err(), Some(ErrorKind::Unavailable), "{refused:?}");
        node.shutdown().await.unwrap();
        std::fs::remove_dir_all(&configs[*at].data_dir).unwrap();
    }
    assert_eq!(get(restored.client(), "volumes/c").await, None);
    // Without that memory they join.
    for at in &old {
        let node = start(&configs[*at]).await;
        assert_eq!((node.role(), node.cluster_id().as_deref()), (Role::Client, Some(after.as_str())));
        until_access(&node, Access::ReadWrite).await;
        assert_eq!(get(node.client(), "volumes/a").await.as_deref(), Some("3 replicas"));
        put(node.client(), &format!("nodes/{at}"), "back").await;
        node.shutdown().await.unwrap();
    }
    // And it comes back as what it is.
    restored.shutdown().await.unwrap();
    let again = start(config).await;
    assert_eq!((again.role(), again.cluster_id().as_deref()), (Role::Server, Some(after.as_str())));
    again.shutdown().await.unwrap();
}

/// Data that was restored under a node, without what the node remembers, is not served under the old cluster's name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_restore_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = alone(dir.path());
    config.backup = Some(BackupConfig::new(dir.path().join("backups")));
    let node = start(&config).await;
    until_access(&node, Access::ReadWrite).await;
    let made = node.back_up().await.unwrap();
    node.shutdown().await.unwrap();
    quorate::backup::restore(&made.path, &quorate::backup::RestoreOptions::new(config.data_dir.join("server"))).unwrap();
    let refused = Node::start(config).await;
    assert!(matches!(&refused, Err(Error::Format { what, .. }) if what.contains("restore")), "{refused:?}");
}

/// A store that cannot be reached costs backups, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_away_costs_backups_alone() {
    let dir = tempfile::tempdir().unwrap();
    let away = dir.path().join("away");
    std::fs::write(&away, "").unwrap();
    let mut config = alone(dir.path());
    assert!(start(&config).await.backups().await.is_err_and(|err| err.to_string().contains("KV_BACKUP_STORE")));
    let mut backup = BackupConfig::new(away.join("backups"));
    (backup.schedule, backup.jitter) = (Some("* * * * * *".into()), Duration::ZERO);
    config.backup = Some(backup);
    let node = start(&config).await;
    until_access(&node, Access::ReadWrite).await;
    node.back_up().await.unwrap_err();
    until("scheduled ones fail, too", async || node.health_json()["backups"]["failed"].as_u64() >= Some(2)).await;
    node.client().put("volumes/a", "3 replicas").await.unwrap();
    assert_eq!(node.availability().borrow().access, Access::ReadWrite);
    std::fs::remove_file(&away).unwrap();
    until("one with the store back", async || node.health_json()["backups"]["made"].as_u64() >= Some(1)).await;
    node.shutdown().await.unwrap();
}

/// Who leads, as a server sees it, and in which term.
fn leader(node: &Node) -> (u64, u64) {
    let status = node.local().unwrap().last_status();
    (status.leader, status.raft_term)
}

fn member(node: &Node) -> u64 {
    node.local().unwrap().last_status().header.unwrap().member_id
}

/// A leader that stops has handed over before it is gone. An election would take far longer than the stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_hands_over_the_lead() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let configs = (0..3).map(|at| {
        let mut config = config(dir.path(), at, places[at], join(&places));
        config.server.election_timeout_ms = 10_000;
        config
    });
    let configs: Vec<_> = configs.collect();
    let mut nodes: Vec<Node> = start_all(&configs).await;
    // On a machine that is very busy a hand-over may be given up for once.
    for round in 0.. {
        assert!(round < 5, "no lead was handed over");
        until("all know the leader", async || {
            let seen: Vec<_> = nodes.iter().map(leader).collect();
            seen[0].0 != 0 && seen.iter().all(|one| *one == seen[0])
        })
        .await;
        let (led, term) = leader(&nodes[0]);
        let at = nodes.iter().position(|node| member(node) == led).unwrap();
        let stopped = nodes.remove(at);
        let config = configs.iter().find(|config| is_of(config, &stopped)).unwrap();
        stopped.shutdown().await.unwrap();
        // At once, without waiting for anything: one of the others leads, in the next term.
        let leads = |node: &&Node| leader(node).0 == member(node) && leader(node).1 > term;
        if nodes.iter().filter(leads).count() == 1 {
            break;
        }
        nodes.push(start(config).await);
    }
    for node in &nodes {
        put(node.client(), "volumes/a", "goes on").await;
    }
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// Whether a node has this configuration: by the name of its member.
fn is_of(config: &EmbedConfig, node: &Node) -> bool {
    let own = member(node);
    node.local().unwrap().last_members().iter().any(|member| member.id == own && member.name == config.hostname)
}

/// A stop ends in the time that it was given, says what it has cut off, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_has_a_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let config = alone(dir.path());
    for round in 0..3 {
        let node = start(&config).await;
        until_access(&node, Access::ReadWrite).await;
        assert_eq!(get(node.client(), "volumes/a").await.is_some(), round > 0);
        put(node.client(), "volumes/a", &round.to_string()).await;
        let limit = if round < 2 { Duration::ZERO } else { PATIENCE };
        match node.shutdown_within(limit).await {
            Err(Error::CutOff(what)) if round < 2 => assert!(what.contains("state"), "{what}"),
            Ok(()) if round == 2 => {}
            other => panic!("{other:?}"),
        }
    }
    // What was acknowledged is there all the same, and nothing holds the directory or the ports.
    let node = start(&config).await;
    until_access(&node, Access::ReadWrite).await;
    assert_eq!(get(node.client(), "volumes/a").await.as_deref(), Some("2"));
    node.shutdown().await.unwrap();

    // A leader without the time to hand over says so; the others elect one.
    let places = places(3);
    let configs: Vec<_> = (1..4).map(|at| self::config(dir.path(), at, places[at - 1], join(&places))).collect();
    let mut nodes = start_all(&configs).await;
    let at = nodes.iter().position(|node| leader(node).0 == member(node)).unwrap();
    let why = nodes.remove(at).shutdown_within(Duration::ZERO).await;
    assert!(matches!(&why, Err(Error::CutOff(what)) if what.contains("handing over the lead")), "{why:?}");
    put(nodes[0].client(), "volumes/a", "goes on").await;
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// Without a quorum a write ends within the time of a request, and at once while the node is read-only; reads go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_fail_fast_without_a_quorum() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(4);
    let configs = (0..4).map(|at| {
        let mut config = config(dir.path(), at, places[at], join(&places));
        config.servers = Servers::Three;
        config
    });
    let configs: Vec<_> = configs.collect();
    let mut nodes = start_all(&configs).await;
    put(nodes[0].client(), "volumes/a", "3 replicas").await;
    nodes.sort_by_key(|node| node.role() == Role::Client);
    let client = nodes.pop().unwrap();
    let config = configs.iter().find(|config| is_of(config, &nodes[2])).unwrap();
    for node in nodes.drain(1..) {
        node.shutdown().await.unwrap();
    }
    let survivor = nodes.pop().unwrap();

    // A request is given seven seconds by a server, and ten by a client of others; here both have far more.
    let began = Instant::now();
    for node in [&survivor, &client] {
        let why = node.client().put("volumes/a", "lost").await.unwrap_err();
        assert!(matches!(why.kind(), ErrorKind::OutcomeUnknown | ErrorKind::NoLeader | ErrorKind::Unavailable), "{why}");
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());

    for node in [&survivor, &client] {
        until_access(node, Access::ReadOnly).await;
        // A hundred of them take less than twenty would if each were to wait.
        let began = Instant::now();
        let here = node.client();
        for _ in 0..50 {
            let put = here.put("volumes/a", "lost").await.map(drop);
            let deleted = here.delete_with(DeleteRangeRequest { key: "volumes/a".into(), ..Default::default() }).await.map(drop);
            for outcome in [put, deleted] {
                let why = outcome.unwrap_err();
                assert!(why.kind() == ErrorKind::Unavailable && why.to_string().contains("read-only"), "{why}");
            }
        }
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        let read = RangeRequest { key: "volumes/a".into(), serializable: true, ..RangeRequest::default() };
        until("a read", async || here.range(read.clone()).await.is_ok_and(|answer| answer.count == 1)).await;
        let reads = RequestOp { request: Some(request_op::Request::RequestRange(read)) };
        let reads = TxnRequest { success: vec![reads], ..TxnRequest::default() };
        until("reads together", async || here.txn(reads.clone()).await.is_ok_and(|answer| answer.responses.len() == 1)).await;
    }

    let back = start(config).await;
    for node in [&survivor, &client, &back] {
        put(node.client(), "volumes/a", "2 replicas").await;
        until_access(node, Access::ReadWrite).await;
    }
    for node in [survivor, client, back] {
        node.shutdown().await.unwrap();
    }
}

/// Status and body of an answer; none when nobody listens.
fn fetch(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

async fn got(port: u16, path: &'static str) -> (u16, String) {
    tokio::task::spawn_blocking(move || fetch(port, path)).await.unwrap().unwrap_or_default()
}

/// Every node has a port for its health, if it is told to; and it lives whatever becomes of the quorum.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_tells_how_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(2);
    let ports = [free_port(), free_port()];
    let configs = (0..2).map(|at| {
        let mut config = config(dir.path(), at, places[at], join(&places));
        config.health_port = Some(ports[at]);
        config
    });
    let configs: Vec<_> = configs.collect();
    // While it waits for the other it lives, and is not ready.
    let early = tokio::spawn(Node::start(configs[0].clone()));
    until("it lives", async || got(ports[0], "/livez").await == (200, "ok\n".into())).await;
    assert_eq!(got(ports[0], "/readyz").await.0, 503);
    let (code, health) = got(ports[0], "/v1/health").await;
    assert!(code == 200 && health.contains("\"starting\""), "{health}");
    let late = start(&configs[1]).await;
    let early = early.await.unwrap().unwrap();

    for node in [&early, &late] {
        until_access(node, Access::ReadWrite).await;
    }
    let mut nodes = [(early, ports[0]), (late, ports[1])];
    nodes.sort_by_key(|(node, _)| node.role() == Role::Client);
    let [(server, server_port), (client, client_port)] = nodes;
    for (port, node) in [(server_port, &server), (client_port, &client)] {
        for path in ["/livez", "/readyz", "/health", "/version"] {
            until(path, async || got(port, path).await.0 == 200).await;
        }
        assert_eq!(got(port, "/nothing").await.0, 404);
        let health: serde_json::Value = serde_json::from_str(&got(port, "/v1/health").await.1).unwrap();
        assert_eq!((health["role"].as_str(), health["cluster"].as_str()), (Some(&*node.role().to_string()), node.cluster_id().as_deref()));
        let metrics = got(port, "/metrics").await.1;
        assert!(metrics.contains("quorate_node_can_write 1") && metrics.contains("process_open_fds"), "{metrics}");
        assert_eq!(metrics.contains("etcd_server_has_leader 1"), node.role() == Role::Server);
    }
    // The client knows how far away its server is; the server has no other.
    until("the server is measured", async || client.peers().iter().any(|peer| peer.is_alive && peer.latency.is_some())).await;
    assert_eq!((client.peers().len(), server.peers().len()), (1, 0));
    assert_eq!(Some(&client.peers()[0].endpoint), client.endpoints().borrow().first());
    let metrics = got(client_port, "/metrics").await.1;
    assert!(metrics.contains("quorate_endpoint_up{endpoint=") && metrics.contains("quorate_endpoint_latency_seconds{"), "{metrics}");

    // The only server is gone, and its port with it. The client lives.
    server.shutdown().await.unwrap();
    assert_eq!(got(server_port, "/livez").await.0, 0);
    until("it is not ready", async || got(client_port, "/readyz").await.0 == 503).await;
    assert_eq!(got(client_port, "/livez").await, (200, "ok\n".into()));
    until("the server is missed", async || client.health_json()["servers"][0]["status"] == "unavailable").await;
    until("the metrics say so", async || got(client_port, "/metrics").await.1.contains("quorate_node_can_write 0")).await;
    client.shutdown().await.unwrap();
    assert_eq!(got(client_port, "/livez").await.0, 0);
}

/// The log's filter is looked at before anything is touched.
#[test]
fn a_wrong_filter_is_named() {
    for name in ["KV_LOG_FILTER", "LOG_FILTER"] {
        let mut binary = Command::new(env!("CARGO_BIN_EXE_quorate"));
        binary.arg("embed").env_clear().env("JOIN", "127.0.0.1").env(name, "quorate=loud").stdin(Stdio::null());
        let output = binary.output().unwrap();
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && why.contains(name) && why.contains("quorate=loud"), "{why}");
    }
}
