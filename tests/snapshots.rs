//! A member that lags past the log: it is sent a snapshot, and is then as good as the others.
//!
//! Three members in one process, over loopback. One is stopped, the others write until the log that it would need is gone, and it comes
//! back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use quorate::client::WatchMessage;
use quorate::proto::etcdserverpb::{AlarmRequest, AlarmType, RangeRequest, WatchCreateRequest};
use quorate::proto::internal::{LogId, Vote};
use quorate::proto::peer::install_snapshot_response::Outcome;
use quorate::proto::peer::peer_client::PeerClient;
use quorate::proto::peer::{InstallSnapshotRequest, PutSnapshotRequest};
use quorate::{Client, Config, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use three::{insist, ports, start_all, stop_all, until};

#[path = "common/ports.rs"]
mod ports;
#[path = "common/three.rs"]
mod three;

/// Puts under way at the same time: enough to fill entries of the log, few enough for more entries than are kept.
const AT_ONCE: usize = 8;

/// A member whose log keeps nothing for those who lag.
fn config(dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let mut config = three::config(dir, ports, at);
    config.snapshot_catchup_entries = 10;
    config
}

/// Puts `keys` times, several at once.
async fn write(client: &Client, prefix: &str, keys: usize) {
    for chunk in (0..keys).collect::<Vec<_>>().chunks(AT_ONCE) {
        let puts = chunk.iter().map(|key| {
            let (key, value) = (format!("{prefix}{key:06}"), vec![b'v'; 500]);
            async move { insist("a put", || client.put(key.clone(), value.clone())).await }
        });
        futures_util::future::join_all(puts).await;
    }
}

/// The value of a metric.
fn metric(server: &Server, name: &str) -> u64 {
    let text = server.metrics().text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no metric {name}")).parse().unwrap()
}

/// Returns when no member's log has what comes right after an entry: all of them have cut it off.
async fn log_is_gone(servers: &[&Server], entries_before: u64) {
    for server in servers {
        let applied = || server.client().last_status().raft_applied_index;
        until("the log goes on", || applied() > entries_before + 50).await;
    }
    // The state is synced every few seconds, and with it the log cut off.
    tokio::time::sleep(Duration::from_secs(12)).await;
}

async fn own(client: &Client, revision: i64) -> Vec<(Vec<u8>, Vec<u8>, i64, i64)> {
    let all = RangeRequest { key: vec![0].into(), range_end: vec![0].into(), serializable: true, revision, ..Default::default() };
    let found = client.range(all).await.unwrap();
    let pairs = found.kvs.iter().map(|kv| kv.decode().unwrap());
    pairs.map(|kv| (kv.key.to_vec(), kv.value.to_vec(), kv.mod_revision, kv.lease)).collect()
}

/// All members have come to one revision, and hold the same there.
async fn are_equal(servers: &[&Server]) -> i64 {
    let clients: Vec<Client> = servers.iter().map(|server| server.client()).collect();
    let revision = insist("a put", || clients[0].put("last", "one")).await.header.unwrap().revision;
    for client in &clients {
        until("a member catches up", || client.revision() >= revision).await;
    }
    let expected = own(&clients[0], revision).await;
    let hash = clients[0].hash_kv(revision).await.unwrap();
    for client in &clients[1..] {
        assert!(own(client, revision).await == expected, "the keys differ");
        let other = client.hash_kv(revision).await.unwrap();
        assert_eq!((other.hash, other.compact_revision), (hash.hash, hash.compact_revision));
    }
    revision
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lags_past_the_log_gets_a_snapshot() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| config(dir.path(), &ports, at)).await;
    let client = servers[0].client();
    write(&client, "early/", 50).await;
    let lost = servers.pop().unwrap();
    until("it has something", || lost.client().revision() > 10).await;
    let before = lost.client().last_status().raft_applied_index;
    lost.shutdown().await.unwrap();

    // What it misses: keys, deletions, leases, an alarm, a compaction.
    write(&client, "late/", 2000).await;
    let lease = insist("a lease", || client.lease_grant(77, 1000)).await.id;
    let put = quorate::proto::etcdserverpb::PutRequest { key: "leased".into(), value: "x".into(), lease, ..Default::default() };
    insist("a put with a lease", || client.put_with(put.clone())).await;
    for key in 0..50 {
        insist("a deletion", || client.delete(format!("early/{key:06}"))).await;
    }
    let compacted = client.revision() - 20;
    insist("a compaction", || client.compact(compacted)).await;
    let member_id = servers[0].member_id();
    let alarm = AlarmRequest { action: 1, member_id, alarm: AlarmType::Nospace as i32 };
    insist("an alarm", || client.alarm(alarm)).await;
    let last = client.revision();
    log_is_gone(&[&servers[0], &servers[1]], before).await;

    let back = Server::start(config(dir.path(), &ports, 2)).await.unwrap();
    let late = back.client();
    // Watches that are there before the snapshot is: from what was compacted meanwhile, and from what will be there.
    let mut old = late
        .watch(WatchCreateRequest { key: "early/".into(), range_end: "early0".into(), start_revision: 3, ..Default::default() })
        .unwrap();
    let mut new = late
        .watch(WatchCreateRequest { key: "early/".into(), range_end: "early0".into(), start_revision: compacted, ..Default::default() })
        .unwrap();
    until("a snapshot is installed", || metric(&back, "quorate_snapshots_received_total") > 0).await;
    until("it has caught up", || late.revision() >= last).await;
    assert_eq!(late.last_alarms().len(), 1);
    insist("no alarm", || late.alarm(AlarmRequest { action: 2, ..alarm })).await;
    servers.push(back);
    let all: Vec<&Server> = servers.iter().collect();
    are_equal(&all).await;
    assert!(all.iter().map(|server| metric(server, "quorate_snapshots_sent_total")).sum::<u64>() > 0);

    // The watch of what is gone gets what there was and is told of the compaction, in this order; the other one gets every deletion.
    loop {
        match old.next().await.unwrap().unwrap() {
            WatchMessage::Events(events) => assert!(events.iter().all(|event| event.kv.mod_revision < compacted)),
            WatchMessage::Compacted { revision } => break assert_eq!(revision, compacted),
            _ => {}
        }
    }
    let mut deleted: Vec<i64> = Vec::new();
    while deleted.len() < 20 {
        match new.next().await.unwrap().unwrap() {
            WatchMessage::Events(events) => deleted.extend(events.iter().map(|event| event.kv.mod_revision)),
            other => panic!("{other:?}"),
        }
    }
    assert!(deleted.is_sorted() && deleted[0] >= compacted, "{deleted:?}");
    assert!(deleted.windows(2).all(|pair| pair[0] != pair[1]), "{deleted:?}");

    // Leases are there, and the member takes part in everything.
    let left = insist("a lease's time", || late.lease_time_to_live(lease)).await.unwrap();
    assert!(left.remaining > 500 && left.keys.len() == 1, "{left:?}");
    insist("a put here", || late.put("here", "too")).await;
    let mut watch = late.watch(WatchCreateRequest { key: "after".into(), ..Default::default() }).unwrap();
    insist("a put there", || client.put("after", "it")).await;
    assert!(matches!(watch.next().await.unwrap().unwrap(), WatchMessage::Events(events) if events.len() == 1));

    // It starts from its data alone, without another snapshot; nothing is left lying about.
    servers.pop().unwrap().shutdown().await.unwrap();
    let again = Server::start(config(dir.path(), &ports, 2)).await.unwrap();
    assert!(again.client().revision() >= last);
    let member = dir.path().join("c/member");
    assert!(std::fs::read_dir(&member).unwrap().all(|entry| !entry.unwrap().file_name().to_string_lossy().starts_with("incoming")));
    assert_eq!(std::fs::read_dir(member.join("state")).unwrap().count(), 2, "CURRENT and one generation");
    servers.push(again);
    are_equal(&servers.iter().collect::<Vec<_>>()).await;
    assert_eq!(metric(&servers[2], "quorate_snapshots_received_total"), 0);
    stop_all(servers).await;
}

/// Passes bytes on between a port and another one, and cuts each connection when it has passed on so many.
async fn cutting_proxy(listener: tokio::net::TcpListener, to: u16, after: usize, cuts: Arc<AtomicUsize>) {
    loop {
        let (mut from, _) = listener.accept().await.unwrap();
        let cuts = cuts.clone();
        tokio::spawn(async move {
            let Ok(mut to) = tokio::net::TcpStream::connect(("127.0.0.1", to)).await else { return };
            let (mut reader, mut writer) = to.split();
            let (mut ours, mut theirs) = from.split();
            let there = async {
                let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
                while let Ok(read @ 1..) = ours.read(&mut buffer).await {
                    passed += read;
                    if passed > after {
                        cuts.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                    if writer.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = there => {}
                _ = tokio::io::copy(&mut reader, &mut theirs) => {}
            }
        });
    }
}

/// Each connection to the member that lags breaks after a piece or two: the snapshot goes on where it was, and is sent once.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_does_not_begin_the_snapshot_anew() {
    const KEYS: usize = 300;
    const VALUE: usize = 12 << 10;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let through = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let advertised = [ports[0], ports[1], through.local_addr().unwrap().port()];
    let cuts = Arc::new(AtomicUsize::new(0));
    let proxy = tokio::spawn(cutting_proxy(through, ports[2], 900 << 10, cuts.clone()));
    let config = |at: usize| {
        let mut config = config(dir.path(), &advertised, at);
        config.listen_peer_urls = vec![format!("http://127.0.0.1:{}", ports[at]).parse().unwrap()];
        config
    };
    let mut servers = start_all(config).await;
    let client = servers[0].client();
    write(&client, "early/", 10).await;
    let lost = servers.pop().unwrap();
    until("it has something", || lost.client().revision() > 1).await;
    let before = lost.client().last_status().raft_applied_index;
    lost.shutdown().await.unwrap();
    for key in 0..KEYS {
        insist("a put", || client.put(format!("{key}"), vec![b'v'; VALUE])).await;
    }
    log_is_gone(&[&servers[0], &servers[1]], before).await;
    let cut_before = cuts.load(Ordering::Relaxed);
    servers.push(Server::start(config(2)).await.unwrap());
    until("a snapshot is installed", || metric(&servers[2], "quorate_snapshots_received_total") > 0).await;
    are_equal(&servers.iter().collect::<Vec<_>>()).await;
    assert!(cuts.load(Ordering::Relaxed) > cut_before + 1, "the connections were to break");
    let sent: u64 = servers.iter().map(|server| metric(server, "quorate_snapshot_sent_bytes_total")).sum();
    let whole = (KEYS * VALUE) as u64;
    assert!((whole / 2..whole + whole / 2).contains(&sent), "{sent} bytes sent of a snapshot of about {whole}");
    stop_all(servers).await;
    proxy.abort();
}

/// What a member answers to pieces that come twice, damaged, out of place, or from a leader of the past; and to nonsense.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_taken_once_and_in_their_place() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut config = config(dir.path(), &ports, 0);
    config.initial_cluster = String::new();
    let server = Server::start(config).await.unwrap();
    server.client().put("key", "value").await.unwrap();
    let (cluster, member) = (server.cluster_id(), server.member_id());
    let connect = || async move {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{}", ports[0])).unwrap();
        PeerClient::new(endpoint.connect().await.unwrap())
    };
    fn to<T>(message: T, cluster: u64, member: u64) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        for (name, id) in [("quorate-cluster", cluster), ("quorate-from", 1), ("quorate-to", member)] {
            request.metadata_mut().insert(name, format!("{id:016x}").parse().unwrap());
        }
        request
    }
    let put = async |id: u64, term: u64, offset: u64, bytes: &'static [u8], crc32c: u32| {
        let request = PutSnapshotRequest { id, term, offset, bytes: bytes.into(), crc32c };
        let answer = connect().await.put_snapshot(to(request, cluster, member)).await.unwrap().into_inner();
        (answer.have, !answer.refused.is_empty())
    };
    let install = async |id: u64, size: u64| {
        loop {
            let vote = Some(Vote { term: 9, node: 1, committed: true });
            let request = InstallSnapshotRequest { id, size, vote, last: Some(LogId { term: 9, index: 1000 }) };
            match connect().await.install_snapshot(to(request, cluster, member)).await.unwrap().into_inner().outcome.unwrap() {
                Outcome::Refused(what) => return what,
                Outcome::Vote(vote) => panic!("{vote:?}"),
                Outcome::Pending(_) => {}
            }
        }
    };
    let sum = |bytes: &[u8]| crc32c::crc32c(bytes);
    assert_eq!(put(5, 9, 3, b"late", sum(b"late")).await, (0, false), "its beginning is not here");
    assert_eq!(put(5, 9, 0, b"one", sum(b"one")).await, (3, false));
    assert_eq!(put(5, 9, 0, b"one", sum(b"one")).await, (3, false), "again");
    assert_eq!(put(5, 9, 3, b"two", sum(b"too")).await, (3, false), "damaged");
    assert_eq!(put(5, 9, 3, b"two", sum(b"two")).await, (6, false));
    assert_eq!(put(5, 9, 0, b"", 0).await, (6, false), "how much is there?");
    assert_eq!(put(6, 8, 0, b"old", sum(b"old")).await, (0, true), "a leader of the past");
    assert!(install(6, 3).await.contains("no such snapshot"));
    assert!(install(5, 7).await.contains("of its 7 bytes 6 are here"));
    let what = install(5, 6).await;
    assert!(what.contains("incoming-0000000000000005"), "{what}");
    assert_eq!(put(7, 9, 0, b"new", sum(b"new")).await, (3, false), "a new attempt");
    assert_eq!(server.client().get("key").await.unwrap().unwrap().value, "value");
    server.shutdown().await.unwrap();
    // What was begun is gone with the next start.
    let incoming = || {
        let names = std::fs::read_dir(dir.path().join("a/member")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("incoming")).count()
    };
    assert_eq!(incoming(), 1);
    let mut config = self::config(dir.path(), &ports, 0);
    config.initial_cluster = String::new();
    let server = Server::start(config).await.unwrap();
    assert_eq!(incoming(), 0);
    server.shutdown().await.unwrap();
}
