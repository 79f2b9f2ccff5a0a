//! Three members in one process, over loopback: what of clusters is built.

use bytes::Bytes;
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::response_op::Response;
use quorate::proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};
use quorate::proto::internal::Command;
use quorate::proto::internal::command::Op;
use quorate::proto::peer::ProposeRequest;
use quorate::proto::peer::peer_client::PeerClient;
use quorate::proto::peer::proposed::Outcome;
use quorate::{Client, Server};

use three::{config, insist, ports, start_all, stop_all};

#[path = "common/ports.rs"]
mod ports;
#[allow(dead_code, reason = "shared with the test of snapshots")]
#[path = "common/three.rs"]
mod three;

async fn put(client: &Client, key: &str, value: &str) {
    insist("a put", || client.put(key.to_owned(), value.to_owned())).await;
}

async fn get(client: &Client, key: &str) -> Option<String> {
    let kv = insist("a get", || client.get(key.to_owned())).await;
    kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap())
}

/// Once a command is in the log all members have to carry it out, for ever: so the leader does not rely on who sends it.
#[tokio::test(flavor = "multi_thread")]
async fn commands_of_other_members_are_checked() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let alone = || {
        let mut config = config(dir.path(), &ports, 0);
        config.initial_cluster = String::new();
        config
    };
    let server = Server::start(alone()).await.unwrap();
    put(&server.client(), "key", "value").await;
    let connected = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{}", ports[0])).unwrap().connect().await;
    let mut peer = PeerClient::new(connected.unwrap());
    let ranges = RequestOp { request: Some(Request::RequestRange(RangeRequest { key: "key".into(), ..Default::default() })) };
    let commands = [
        // Of a kind that only a later release knows.
        None,
        Some(Op::Put(PutRequest::default())),
        Some(Op::DeleteRange(DeleteRangeRequest::default())),
        Some(Op::Txn(TxnRequest { success: vec![ranges; 1000], ..Default::default() })),
        Some(Op::Put(PutRequest { key: "other".into(), value: "fine".into(), ..Default::default() })),
    ];
    let commands = commands.map(|op| Command { id: 0, op }).to_vec();
    let mut request = tonic::Request::new(ProposeRequest { commands });
    for (name, id) in [("quorate-cluster", server.cluster_id()), ("quorate-from", 1), ("quorate-to", server.member_id())] {
        request.metadata_mut().insert(name, format!("{id:016x}").parse().unwrap());
    }
    let answer = peer.propose(request).await.unwrap().into_inner();
    let refused = answer.outcomes.iter().map(|outcome| match &outcome.outcome {
        Some(Outcome::Refused(text)) => text.as_str(),
        Some(Outcome::Put(_)) => "put",
        other => panic!("{other:?}"),
    });
    let expected = [
        "etcdserver: not capable",
        "etcdserver: key is not provided",
        "etcdserver: key is not provided",
        "etcdserver: too many operations in txn request",
        "put",
    ];
    assert_eq!(refused.collect::<Vec<_>>(), expected);
    assert_eq!(get(&server.client(), "other").await.as_deref(), Some("fine"));
    server.shutdown().await.unwrap();
    let server = Server::start(alone()).await.unwrap();
    assert_eq!(get(&server.client(), "other").await.as_deref(), Some("fine"));
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn any_member_takes_every_request() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| config(dir.path(), &ports, at)).await;
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
    let lease = insist("a grant", || clients[0].lease_grant(0, 100)).await;
    for client in &clients {
        let left = insist("a look", || client.lease_time_to_live(lease.id)).await.unwrap();
        assert!(left.remaining > 90, "{left:?}");
    }
    // A lease ends whichever member it was granted by, also when the leader had none to look after before.
    insist("a revocation", || clients[0].lease_revoke(lease.id)).await;
    for (at, client) in clients.iter().enumerate() {
        let lease = insist("a grant", || client.lease_grant(0, 2)).await;
        let key = format!("leased {at}");
        let put = PutRequest { key: key.clone().into(), lease: lease.id, ..Default::default() };
        insist("a put", || client.put_with(put.clone())).await;
        let began = std::time::Instant::now();
        while get(client, &key).await.is_some() {
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "the lease granted by member {at} does not end");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
    let leaders: Vec<u64> = clients.iter().map(|client| client.last_status().leader).collect();
    assert!(leaders.iter().all(|leader| *leader == leaders[0] && *leader != 0), "{leaders:x?}");
    stop_all(servers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_member_may_be_gone() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers: Vec<Option<Server>> = start_all(|at| config(dir.path(), &ports, at)).await.into_iter().map(Some).collect();
    put(&servers[0].as_ref().unwrap().client(), "before", "0").await;
    for gone in 0..3 {
        servers[gone].take().unwrap().shutdown().await.unwrap();
        let rest: Vec<Client> = servers.iter().flatten().map(Server::client).collect();
        for (at, client) in rest.iter().enumerate() {
            put(client, &format!("without {gone}, from {at}"), "y").await;
            assert_eq!(get(client, "before").await.as_deref(), Some("0"));
        }
        // It comes back with its own data, and catches up.
        servers[gone] = Some(Server::start(config(dir.path(), &ports, gone)).await.unwrap());
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
        *server = Some(Server::start(config(dir.path(), &ports, at)).await.unwrap());
    }
    for server in servers.iter().flatten() {
        assert_eq!(get(&server.client(), "without 2, from 1").await.as_deref(), Some("y"));
    }
}

/// Many at once at the members that do not lead, who send them on together: each gets its own outcome, refusals too.
#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_gets_its_own_outcome() {
    const MANY: usize = 1500;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| config(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "first", "0").await;
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..MANY {
        let client = servers[number % 3].client();
        asked.spawn(async move {
            let key = Bytes::from(format!("key {}", number % 700));
            let value = Bytes::from(number.to_string());
            match number % 3 {
                0 => {
                    let put = PutRequest { key, value, lease: 4711, ..Default::default() };
                    let refused = client.put_with(put).await.unwrap_err();
                    assert_eq!(refused.to_string(), "etcdserver: requested lease not found");
                }
                1 => {
                    let put = PutRequest { key: key.clone(), value, prev_kv: true, ..Default::default() };
                    let before = client.put_with(put).await.unwrap().prev_kv;
                    assert!(before.is_none_or(|before| before.decode().unwrap().key == key));
                }
                _ => {
                    let put = RequestOp {
                        request: Some(Request::RequestPut(PutRequest { key: key.clone(), value: value.clone(), ..Default::default() })),
                    };
                    let get = RequestOp { request: Some(Request::RequestRange(RangeRequest { key, ..Default::default() })) };
                    let done = client.txn(TxnRequest { compare: vec![], success: vec![put, get], failure: vec![] }).await.unwrap();
                    let Some(Response::ResponseRange(read)) = &done.responses[1].response else { panic!("{done:?}") };
                    assert_eq!(read.kvs[0].decode().unwrap().value, value);
                }
            }
        });
    }
    while let Some(done) = asked.join_next().await {
        done.unwrap();
    }
    // Renewals of leases, too: those that are there, and those that are not.
    let lease = servers[0].client().lease_grant(0, 100).await.unwrap().id;
    for number in 0..MANY {
        let client = servers[number % 3].client();
        asked.spawn(async move {
            let renewed = client.lease_keep_alive(if number % 2 == 0 { lease } else { 4711 }).await;
            match renewed {
                Ok(ttl) => assert_eq!((number % 2, ttl), (0, 100)),
                Err(err) => assert_eq!((number % 2, err.to_string().as_str()), (1, "etcdserver: requested lease not found")),
            }
        });
    }
    while let Some(done) = asked.join_next().await {
        done.unwrap();
    }
    stop_all(servers).await;
}

/// Two of three are gone: nothing is written and nothing is read that might be stale, and what is there can still be read as it is.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_promised() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| config(dir.path(), &ports, at)).await;
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

/// The series of a member's metrics with this name: their labels, and their values.
/// Whichever member a client used up the space quota at, it is all members' space: when there is room again, they go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_at_a_follower_heals() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let small = |at| {
        let mut config = config(dir.path(), &ports, at);
        config.quota_backend_bytes = 4 << 20;
        config
    };
    let servers = start_all(small).await;
    put(&servers[0].client(), "first", "0").await;
    let leader = servers[0].client().last_status().leader;
    let follower = servers.iter().find(|server| server.member_id() != leader).unwrap().client();
    let mut written = 0;
    loop {
        match follower.put(format!("large {written}"), vec![b'x'; 100_000]).await {
            Ok(_) => written += 1,
            Err(quorate::Error::Apply(quorate::ApplyError::NoSpace)) => break,
            // One that was moved to another leader may or may not have been carried out.
            Err(err) => assert!(matches!(err, quorate::Error::Timeout | quorate::Error::Apply(_)), "{err}"),
        }
        assert!(written < 100, "the quota has no effect");
    }
    assert!(!follower.last_alarms().is_empty());
    for key in 0..written {
        insist("a delete", || follower.delete(format!("large {key}"))).await;
    }
    let revision =
        insist("a read", || follower.range(RangeRequest { key: "first".into(), ..Default::default() })).await.header.unwrap().revision;
    insist("a compaction", || follower.compact(revision)).await;
    three::until("the alarm is taken back", || follower.last_alarms().is_empty()).await;
    for server in &servers {
        put(&server.client(), "again", "1").await;
    }
    stop_all(servers).await;
}

fn series(server: &Server, name: &str) -> Vec<(String, f64)> {
    let text = server.metrics().text();
    let lines = text.lines().filter_map(|line| line.strip_prefix(name));
    let split = lines.filter(|rest| rest.starts_with(['{', ' '])).map(|rest| rest.rsplit_once(' ').unwrap());
    split.map(|(labels, value)| (labels.to_owned(), value.parse().unwrap())).collect()
}

/// What members count of each other, under the names and with the labels that three real etcd members have.
#[tokio::test(flavor = "multi_thread")]
async fn members_count_each_other() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| config(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "key", &"x".repeat(1000)).await;
    let sum = |server: &Server, name: &str| series(server, name).iter().map(|(_, value)| value).sum::<f64>();
    // Each has heard of each other one, in its turn.
    for server in &servers {
        three::until("the others are there", || sum(server, "etcd_network_active_peers") == 2.0).await;
        assert!(sum(server, "etcd_network_peer_round_trip_time_seconds_count") >= 2.0);
        assert_eq!(sum(server, "etcd_server_has_leader"), 1.0);
        assert!(sum(server, "etcd_server_leader_changes_seen_total") >= 1.0);
        assert_eq!(sum(server, "etcd_network_disconnected_peers_total"), 0.0);
    }
    three::until("all have applied as much", || {
        let applied = |server| sum(server, "etcd_server_proposals_applied_total");
        servers.iter().all(|server| applied(server) >= 1.0 && applied(server) == sum(server, "etcd_server_proposals_committed_total"))
            && servers.iter().all(|server| applied(server) == applied(&servers[0]))
    })
    .await;
    assert_eq!(servers.iter().map(|server| sum(server, "etcd_server_is_leader")).sum::<f64>(), 1.0);
    let labels = |key: &str, of: &[&Server]| {
        let mut labels: Vec<String> = of.iter().map(|server| format!("{{{key}=\"{:x}\"}}", server.member_id())).collect();
        labels.sort();
        labels
    };
    let leads = servers.iter().position(|server| sum(server, "etcd_server_is_leader") == 1.0).unwrap();
    let leader = servers.swap_remove(leads);
    let others: Vec<&Server> = servers.iter().collect();
    for (name, key) in [
        ("etcd_network_peer_sent_bytes_total", "To"),
        ("etcd_network_peer_received_bytes_total", "From"),
        ("etcd_network_peer_sent_failures_total", "To"),
        ("etcd_network_snapshot_send_success", "To"),
        ("etcd_network_snapshot_receive_failures", "From"),
    ] {
        let mut found: Vec<String> = series(&leader, name).into_iter().map(|(labels, _)| labels).collect();
        found.sort();
        assert_eq!(found, labels(key, &others), "{name}");
    }
    // The value went to both, and more than a heartbeat has come back.
    assert!(series(&leader, "etcd_network_peer_sent_bytes_total").iter().all(|(_, bytes)| *bytes > 1000.0));
    assert!(series(&leader, "etcd_network_peer_received_bytes_total").iter().all(|(_, bytes)| *bytes > 10.0));
    let from = format!("{{From=\"{:x}\"}}", leader.member_id());
    for other in &servers {
        let received = series(other, "etcd_network_peer_received_bytes_total");
        assert!(received.iter().any(|(labels, bytes)| *labels == from && *bytes > 1000.0), "{received:?}");
    }
    // One goes: the others notice, and lose what they send it.
    let gone = servers.pop().unwrap();
    let id = gone.member_id();
    gone.shutdown().await.unwrap();
    let remote = format!("{{Local=\"{:x}\",Remote=\"{id:x}\"}}", leader.member_id());
    let of = |name: &str, labels: &str| series(&leader, name).into_iter().find(|(found, _)| found == labels).unwrap().1;
    three::until("it is missed", || of("etcd_network_active_peers", &remote) == 0.0).await;
    assert!(of("etcd_network_disconnected_peers_total", &remote) >= 1.0);
    three::until("sending fails", || of("etcd_network_peer_sent_failures_total", &format!("{{To=\"{id:x}\"}}")) >= 1.0).await;
    stop_all(servers).await;
    leader.shutdown().await.unwrap();
}
