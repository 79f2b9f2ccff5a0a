//! The library as a host program uses it: servers in this process, called without a socket and over one.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use quorate::client::{EventKind, WatchMessage};
use quorate::proto::EncodedKv;
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmType, CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp,
    SnapshotRequest, TxnRequest, WatchCreateRequest,
};
use quorate::{ApplyError, Config, Error, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
    let hash = client.hash_kv(0).await.unwrap().hash;
    server.shutdown().await.unwrap();
    assert!(matches!(client.put("a", "3").await, Err(Error::Stopped)), "a client outlives its server, and says so");

    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    let a = client.get("a").await.unwrap().unwrap();
    assert_eq!((&a.value[..], a.version, a.create_revision, a.mod_revision), (&b"2"[..], 2, 2, 3));
    assert_eq!(client.get("b").await.unwrap(), None);
    assert_eq!(client.revision(), 5);
    assert_eq!(client.hash_kv(0).await.unwrap().hash, hash);
    server.shutdown().await.unwrap();
}

/// The smallest executor there is: it polls, and sleeps until it is woken.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn a_client_needs_no_runtime() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let server = Server::start(config(dir.path())).await.unwrap();
        let client = server.client();
        client.put("a", "1").await.unwrap();
        assert_eq!(client.get("a").await.unwrap().unwrap().value, "1");
        let mut watcher = client.watch(WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() }).unwrap();
        assert!(matches!(watcher.next().await, Ok(Some(WatchMessage::Events(events))) if events.len() == 1));
        let lease = client.lease_grant(0, 100).await.unwrap().id;
        assert_eq!(client.lease_keep_alive(lease).await.unwrap(), 100);
        client.lease_revoke(lease).await.unwrap();
        client.put("a", "2").await.unwrap();
        assert!(matches!(watcher.next().await, Ok(Some(WatchMessage::Events(events))) if events[0].kv.value == "2"));
        client.compact_with(CompactionRequest { revision: 3, physical: true }).await.unwrap();
        client.hash_kv(0).await.unwrap();
        client.defragment().await.unwrap();
        // One who is waiting when the server stops is told so.
        let (left, ()) = futures_util::join!(watcher.next(), async { server.shutdown().await.unwrap() });
        assert!(matches!(left, Err(Error::Stopped)));
        assert!(matches!(client.put("a", "3").await, Err(Error::Stopped)));
    });
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

/// What of a server's metrics has changed from one look to the next.
struct Counts<'a> {
    server: &'a Server,
    last: BTreeMap<&'static str, f64>,
}

impl<'a> Counts<'a> {
    const NAMES: [(&'static str, &'static str); 21] = [
        ("puts", "etcd_mvcc_put_total"),
        ("deletes", "etcd_mvcc_delete_total"),
        ("ranges", "etcd_mvcc_range_total"),
        ("txns", "etcd_mvcc_txn_total"),
        ("put bytes", "etcd_debugging_mvcc_total_put_size_in_bytes"),
        ("events", "etcd_debugging_mvcc_events_total"),
        ("granted", "etcd_debugging_lease_granted_total"),
        ("renewed", "etcd_debugging_lease_renewed_total"),
        ("revoked", "etcd_debugging_lease_revoked_total"),
        ("expired", "etcd_debugging_server_lease_expired_total"),
        ("compacted", "etcd_debugging_mvcc_db_compaction_keys_total"),
        ("hashes", "etcd_mvcc_hash_rev_duration_seconds_count"),
        ("defrags", "etcd_disk_backend_defrag_duration_seconds_count"),
        ("failed", "etcd_server_proposals_failed_total"),
        ("slow", "etcd_server_slow_apply_total"),
        ("leaders", "etcd_server_leader_changes_seen_total"),
        ("streams", "etcd_debugging_mvcc_watch_stream_total"),
        ("watchers", "etcd_debugging_mvcc_watcher_total"),
        ("slow watchers", "etcd_debugging_mvcc_slow_watcher_total"),
        ("pending", "etcd_debugging_mvcc_pending_events_total"),
        ("reads", "etcd_mvcc_db_open_read_transactions"),
    ];

    fn of(server: &'a Server) -> Self {
        let mut counts = Counts { server, last: BTreeMap::new() };
        counts.changes();
        counts
    }

    fn value(&self, name: &str) -> f64 {
        let text = self.server.metrics().text();
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("{name} is not there")).parse().unwrap()
    }

    /// As `puts+1 put bytes+2`, in the order of the names.
    fn changes(&mut self) -> String {
        let mut changes = Vec::new();
        for (short, name) in Self::NAMES {
            let value = self.value(name);
            let before = self.last.insert(short, value).unwrap_or(0.0);
            if value != before {
                changes.push(format!("{short}{:+}", value - before));
            }
        }
        changes.join(" ")
    }
}

fn put_op(key: &'static str, value: &'static str) -> Request {
    Request::RequestPut(PutRequest { key: key.into(), value: value.into(), ..Default::default() })
}

fn get_op(key: &'static str) -> Request {
    Request::RequestRange(RangeRequest { key: key.into(), ..Default::default() })
}

fn delete_op(key: &'static str) -> Request {
    Request::RequestDeleteRange(DeleteRangeRequest { key: key.into(), ..Default::default() })
}

/// Whether `key` was changed after that revision.
fn newer(key: &'static str, than: i64) -> Compare {
    Compare {
        result: CompareResult::Greater as i32,
        target: CompareTarget::Mod as i32,
        key: key.into(),
        target_union: Some(TargetUnion::ModRevision(than)),
        ..Default::default()
    }
}

/// The changes are those that etcd 3.5.30 shows after the same requests.
#[tokio::test]
async fn operations_are_counted_as_etcd_counts_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.listen_client_urls.clear();
    let server = Server::start(config).await.unwrap();
    let client = server.client();
    let mut counts = Counts::of(&server);
    assert_eq!(counts.value("etcd_server_leader_changes_seen_total"), 1.0);

    let put = |key: &'static str, value: &'static str| PutRequest { key: key.into(), value: value.into(), ..Default::default() };
    client.put_with(put("a", "1")).await.unwrap();
    assert_eq!(counts.changes(), "puts+1 put bytes+2");
    client.put_with(PutRequest { prev_kv: true, ..put("a", "123") }).await.unwrap();
    assert_eq!(counts.changes(), "puts+1 ranges+1 txns+1 put bytes+4");
    client.put_with(PutRequest { ignore_value: true, ..put("a", "") }).await.unwrap();
    assert_eq!(counts.changes(), "puts+1 ranges+1 txns+1 put bytes+4");
    client.put_with(PutRequest { ignore_value: true, ..put("zz", "") }).await.unwrap_err();
    assert_eq!(counts.changes(), "ranges+1");
    client.put_with(PutRequest { lease: 77, ..put("a", "1") }).await.unwrap_err();
    client.put_with(put("", "1")).await.unwrap_err();
    assert_eq!(counts.changes(), "");
    client.get("a").await.unwrap();
    client.range(RangeRequest { key: "a".into(), range_end: "z".into(), serializable: true, ..Default::default() }).await.unwrap();
    assert_eq!(counts.changes(), "ranges+2");
    client.put_with(put("b", "1")).await.unwrap();
    counts.changes();
    client.delete_with(DeleteRangeRequest { key: "a".into(), range_end: "z".into(), ..Default::default() }).await.unwrap();
    client.delete("nothing").await.unwrap();
    assert_eq!(counts.changes(), "deletes+2");

    client.put_with(put("a", "1")).await.unwrap();
    counts.changes();
    let (yes, no) = (|| newer("a", 0), || newer("a", 1000));
    let txns: [(Vec<Compare>, Vec<Request>, Vec<Request>, &str); 13] = [
        (vec![], vec![put_op("a", "1")], vec![], "puts+1 put bytes+2"),
        (vec![], vec![put_op("a", "1"), put_op("b", "1")], vec![], "puts+2 txns+1 put bytes+4"),
        (vec![], vec![put_op("a", "1"), get_op("a"), delete_op("b")], vec![], "puts+1 deletes+1 ranges+1 txns+1 put bytes+2"),
        (vec![], vec![put_op("a", "1"), delete_op("none")], vec![], "puts+1 deletes+1 txns+1 put bytes+2"),
        (vec![], vec![delete_op("none")], vec![], "deletes+1"),
        (vec![], vec![get_op("a")], vec![], "ranges+1"),
        (vec![], vec![get_op("a"), get_op("b")], vec![], "ranges+2 txns+1"),
        (vec![], vec![], vec![], ""),
        (vec![yes()], vec![put_op("a", "1")], vec![], "puts+1 ranges+1 put bytes+2"),
        (vec![yes()], vec![get_op("a")], vec![], "ranges+2 txns+1"),
        (vec![no()], vec![put_op("a", "1")], vec![get_op("a")], "ranges+2"),
        (vec![yes(), yes()], vec![put_op("a", "1")], vec![], "puts+1 ranges+2 txns+1 put bytes+2"),
        (vec![no(), yes()], vec![put_op("a", "1")], vec![], "ranges+1"),
    ];
    for (compare, success, failure, expected) in txns {
        let ops = |requests: Vec<Request>| requests.into_iter().map(|request| RequestOp { request: Some(request) }).collect();
        let txn = TxnRequest { compare, success: ops(success), failure: ops(failure) };
        client.txn(txn.clone()).await.unwrap();
        assert_eq!(counts.changes(), expected, "{txn:?}");
    }

    client.lease_grant(5, 100).await.unwrap();
    client.lease_grant(5, 100).await.unwrap_err();
    assert_eq!(counts.changes(), "granted+1");
    for key in ["l1", "l2"] {
        client.put_with(PutRequest { lease: 5, ..put(key, "1") }).await.unwrap();
    }
    client.lease_keep_alive(5).await.unwrap();
    assert_eq!(counts.changes(), "puts+2 put bytes+6 renewed+1");
    client.lease_revoke(5).await.unwrap();
    client.lease_revoke(5).await.unwrap_err();
    assert_eq!(counts.changes(), "deletes+2 txns+1 revoked+1");
    client.lease_grant(6, 2).await.unwrap();
    while counts.value("etcd_debugging_server_lease_expired_total") < 1.0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(counts.changes(), "granted+1 revoked+1 expired+1");

    let mut watchers = Vec::new();
    for (key, range_end) in [("a", ""), ("a", "z")] {
        watchers.push(client.watch(WatchCreateRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }).unwrap());
    }
    assert_eq!(counts.changes(), "streams+2 watchers+2");
    client.put_with(put("a", "1")).await.unwrap();
    assert_eq!(counts.changes(), "puts+1 put bytes+2 pending+2");
    for watcher in &mut watchers {
        watcher.next().await.unwrap();
    }
    assert_eq!(counts.changes(), "events+2 pending-2");
    let past = client.watch(WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() }).unwrap();
    assert_eq!(counts.changes(), "streams+1 watchers+1 slow watchers+1");
    drop((watchers, past));
    assert_eq!(counts.changes(), "streams-3 watchers-3 slow watchers-1");

    client.hash_kv(0).await.unwrap();
    client.defragment().await.unwrap();
    assert_eq!(counts.changes(), "hashes+1 defrags+1");
    for _ in 0..10 {
        client.put_with(put("c", "1")).await.unwrap();
    }
    client.compact(client.revision()).await.unwrap();
    while counts.value("etcd_debugging_mvcc_db_compaction_last") == 0.0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Of `c` all puts but the last, and what there was of the others.
    assert!(counts.value("etcd_debugging_mvcc_db_compaction_keys_total") >= 9.0);
    assert!(counts.value("etcd_disk_backend_commit_duration_seconds_count") > 0.0);
    assert_eq!(counts.value("etcd_disk_defrag_inflight"), 0.0);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_member_is_looked_after() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    for value in ["1", "2", "3"] {
        client.put("a", value).await.unwrap();
    }
    let before = client.hash_kv(3).await.unwrap();
    assert_eq!((before.header.unwrap().revision, before.compact_revision, before.hash_revision), (4, -1, 3));
    client.compact_with(CompactionRequest { revision: 3, physical: true }).await.unwrap();
    let after = client.hash_kv(0).await.unwrap();
    assert_eq!((after.compact_revision, after.hash_revision), (3, 4));
    assert!(matches!(client.hash_kv(2).await, Err(Error::Apply(ApplyError::Compacted))));
    assert!(matches!(client.hash_kv(5).await, Err(Error::Apply(ApplyError::FutureRevision))));
    assert!(matches!(client.compact(3).await, Err(Error::Apply(ApplyError::Compacted))));

    let status = client.last_status();
    assert_eq!((status.leader, status.header.unwrap().revision), (server.member_id(), 4));
    assert!(status.raft_applied_index > 0 && status.raft_applied_index <= status.raft_index && status.errors.is_empty());
    let members = client.last_members();
    assert_eq!((members.len(), members[0].id, members[0].client_urls.len()), (1, server.member_id(), 1));

    let member_id = server.member_id();
    let raise = |alarm| AlarmRequest { action: 1, member_id, alarm: alarm as i32 };
    for alarm in [AlarmType::Nospace, AlarmType::Corrupt] {
        client.alarm(raise(alarm)).await.unwrap();
    }
    assert_eq!((client.last_alarms().len(), client.last_status().errors.len()), (2, 2));
    assert!(matches!(client.put("a", "4").await, Err(Error::Apply(ApplyError::Corrupt))));
    let corrupt = AlarmMember { member_id, alarm: AlarmType::Corrupt as i32 };
    assert_eq!(client.alarm_disarm(corrupt).await.unwrap(), [corrupt]);
    assert_eq!(client.alarm_disarm(AlarmMember::default()).await.unwrap().len(), 1);
    assert_eq!(client.alarm_disarm(AlarmMember::default()).await.unwrap(), []);
    client.put("a", "4").await.unwrap();
    server.shutdown().await.unwrap();
    assert!(matches!(client.backup().await.map(|_| ()), Err(Error::Stopped)));
}

#[tokio::test]
async fn a_backup_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    for number in 0..5 {
        client.put(format!("large/{number}"), vec![number; 700 << 10]).await.unwrap();
    }
    futures_util::future::try_join_all((0..500).map(|number| client.put("small", number.to_string()))).await.unwrap();
    let mut backup = client.backup().await.unwrap();
    // It shows the moment at which it began.
    client.put("after", "1").await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = backup.next().await.unwrap() {
        assert!(!chunk.is_empty() && chunk.len() <= 64 << 10);
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(backup.next().await.unwrap(), None);
    let mut decoder = quorate::snapshot::Decoder::new(&bytes[..], Path::new("backup")).unwrap();
    let mut records = 0;
    while let Some(item) = decoder.next_item().unwrap() {
        records += usize::from(matches!(item, quorate::snapshot::Item::Record { .. }));
    }
    assert_eq!(records, 505);

    let path = dir.path().join("backup");
    let written = client.backup_to(&mut std::fs::File::create(&path).unwrap()).await.unwrap();
    assert_eq!(written, std::fs::metadata(&path).unwrap().len());
    assert_eq!(quorate::snapshot::verify(&path).unwrap().records, 506);
    let err = client.backup_to(&mut &mut [0; 1000][..]).await.unwrap_err();
    assert!(matches!(err, Error::Io { .. }), "{err}");
    server.shutdown().await.unwrap();
}

/// Clients that ask for everything and read nothing: others read on, and compaction goes on once they have left.
#[tokio::test]
async fn stalled_snapshots_stand_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    for number in 0..8 {
        client.put(format!("large/{number}"), vec![b'v'; 512 << 10]).await.unwrap();
    }
    futures_util::future::try_join_all((0..2000).map(|number| client.put(format!("small/{number}"), "v"))).await.unwrap();
    let channel = async || {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.client_addrs()[0])).unwrap();
        MaintenanceClient::new(endpoint.connect().await.unwrap())
    };
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut maintenance = channel().await;
        let mut parts = maintenance.snapshot(SnapshotRequest {}).await.unwrap().into_inner();
        parts.message().await.unwrap().unwrap();
        stalled.push((maintenance, parts));
    }
    let refused = channel().await.snapshot(SnapshotRequest {}).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (tonic::Code::Unknown, "etcdserver: too many requests"));

    let soon = |what: &'static str| async move {
        tokio::time::sleep(Duration::from_secs(20)).await;
        panic!("{what} waits for clients that do not read");
    };
    let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    tokio::select! { found = client.range(all) => assert_eq!(found.unwrap().kvs.len(), 2008), () = soon("a long Range") => {} }
    tokio::select! { hash = client.hash_kv(0) => assert!(hash.is_ok()), () = soon("HashKV") => {} }

    drop(stalled);
    let mut parts = loop {
        match channel().await.snapshot(SnapshotRequest {}).await {
            Ok(parts) => break parts.into_inner(),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let mut bytes = 0;
    while let Some(part) = parts.message().await.unwrap() {
        bytes += part.blob.len();
    }
    assert!(bytes > 4 << 20);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_serves_grpc_and_http() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let mut config = config(&dir.path().join("data"));
    config.listen_client_urls = vec![format!("unix://{}", path.display()).parse().unwrap()];
    let server = Server::start(config).await.unwrap();
    assert_eq!(server.client_addrs(), []);
    let channel = tonic::transport::Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect().await.unwrap();
    let put = PutRequest { key: "a".into(), value: "1".into(), ..Default::default() };
    assert_eq!(KvClient::new(channel).put(put).await.unwrap().into_inner().header.unwrap().revision, 2);
    assert_eq!(server.client().get("a").await.unwrap().unwrap().value, "1");
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with(r#"{"health":"true","reason":""}"#), "{answer}");
    server.shutdown().await.unwrap();
    assert!(!path.exists(), "the socket is taken away");
}

/// What a power cut would do to it cannot be seen from here; that it outlives the process's stop can.
#[tokio::test]
async fn without_fsync_a_member_still_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.unsafe_no_fsync = true;
    for round in 0..2 {
        let server = Server::start(config.clone()).await.unwrap();
        assert_eq!(server.client().revision(), 1 + 100 * round);
        for number in 0..100 {
            server.client().put(format!("{number}"), "1").await.unwrap();
        }
        server.shutdown().await.unwrap();
    }
    config.unsafe_no_fsync = false;
    let server = Server::start(config).await.unwrap();
    assert_eq!(server.client().revision(), 201);
    server.shutdown().await.unwrap();
}

/// Larger than what is held of an answer in memory, and in more chunks than a number of 64 bits can be doubled.
#[tokio::test]
async fn a_large_range_comes_whole_in_chunks_and_in_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(config(dir.path())).await.unwrap();
    let client = server.client();
    for key in 0..70 {
        client.put(format!("large/{key:02}"), vec![key; 1 << 20]).await.unwrap();
    }
    let all = RangeRequest { key: "large/".into(), range_end: "large0".into(), ..Default::default() };
    let is_whole = |kvs: &[EncodedKv]| {
        assert_eq!(kvs.len(), 70);
        for (at, kv) in kvs.iter().enumerate() {
            let kv = kv.decode().unwrap();
            assert!(kv.key == format!("large/{at:02}") && kv.value.len() == 1 << 20);
            assert!(kv.value.iter().all(|byte| usize::from(*byte) == at));
        }
    };
    let whole = client.range(all.clone()).await.unwrap();
    is_whole(&whole.kvs);
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.client_addrs()[0])).unwrap();
    let mut remote = KvClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(usize::MAX);
    is_whole(&remote.range(all.clone()).await.unwrap().into_inner().kvs);
    let mut chunks = remote.range_stream(all).await.unwrap().into_inner();
    let (mut kvs, mut last) = (Vec::new(), None);
    while let Some(chunk) = chunks.message().await.unwrap() {
        let chunk = chunk.range_response.unwrap();
        assert!(!chunk.kvs.is_empty() && last.is_none());
        kvs.extend(chunk.kvs);
        last = chunk.header.map(|header| (header.revision, chunk.count, chunk.more));
    }
    is_whole(&kvs);
    assert_eq!(last, Some((whole.header.unwrap().revision, 70, false)));
    server.shutdown().await.unwrap();
}
