//! What etcd's own tests of robustness, and Antithesis, have found in etcd over the years, tried on three members: each test does what made
//! etcd go wrong, and fails if it goes wrong here.
//!
//! | etcd's issue | what went wrong there | test |
//! |---|---|---|
//! | 13766 | a crash under load repeats or skips requests: revisions differ | `faults.rs`, `all_are_killed_under_load` |
//! | 14370 | a single member loses an acknowledged write in a crash | `crash.rs`, `killed_at_random_nothing_is_lost`, `power_lost_at_random_nothing_is_lost` |
//! | 14571 | a member that joins by a snapshot does not know the users | cannot apply: users and roles are not built, requests that are about them are refused |
//! | 14685 | a crash during a defragmentation: revisions differ | `faults.rs`, `killed_while_they_defragment` |
//! | 15220 | progress is notified before the events that it promises | here |
//! | 15271 | a watch goes back in time when its member was cut off and gets a snapshot | `faults.rs`, `cut_off_past_the_log_and_back` |
//! | 17247 | a Txn's event is told twice | here |
//! | 17529 | a watcher that does not keep up loses events | here |
//! | 17780 | a crash during the compaction of a deletion: the revision falls | here, and with a crash `crash.rs`, `killed_at_random_nothing_is_lost` |
//! | 18055 | two snapshots in a short time: panic | here |
//! | 18089 | a watch from a compacted deletion on lacks the deletion | here |
//! | 18667 | a Txn that reads a compacted revision is carried out by some members, and not by others | here |
//! | 19179 | the same as 18089, when the watch is opened while it is compacted | here |
//! | 20221 | a watch of the future is told of the past, after its member has got a snapshot | here |
//! | 20271 | a defragmentation while a snapshot is installed: what comes after is lost | here |
//! | 20418 | a member that was paused answers with what it knew before | `faults.rs`, `a_paused_leader_says_nothing_stale` |
//!
//! The clusters are in this process, over loopback. One test runs at a time: three members are enough for a small machine.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use quorate::client::{EventKind, WatchMessage, Watcher};
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::*;
use quorate::storage::wal;
use quorate::{ApplyError, Client, Config, Error, Server};
use tonic::transport::Channel;

use three::{insist, ports, start_all, stop_all, until};

#[path = "common/ports.rs"]
mod ports;
#[path = "common/three.rs"]
mod three;

static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How long a watcher may take to be told what it must be told.
const PATIENCE: Duration = Duration::from_secs(120);

fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.client_addrs()[0])).unwrap().connect_lazy()
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn put_op(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }))
}

fn delete_op(key: &str) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }))
}

/// Puts, and returns the revision.
async fn put(client: &Client, key: &str, value: &str) -> i64 {
    insist("a put", || client.put(key.to_owned(), value.to_owned())).await.header.unwrap().revision
}

/// Deletes a key that is there, and returns the revision.
async fn delete(client: &Client, key: &str) -> i64 {
    let request = DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() };
    insist("a deletion", || client.delete_with(request.clone())).await.header.unwrap().revision
}

/// Compacts; that it was done by a try whose answer did not come is as good.
async fn compact(client: &Client, revision: i64) {
    let request = CompactionRequest { revision, physical: true };
    loop {
        match client.compact_with(request).await {
            Ok(_) | Err(Error::Apply(ApplyError::Compacted)) => return,
            Err(Error::Timeout | Error::Apply(_)) => {}
            Err(err) => panic!("{err}"),
        }
    }
}

fn watch_all(client: &Client, start_revision: i64) -> Watcher {
    client.watch(WatchCreateRequest { key: vec![0].into(), range_end: vec![0].into(), start_revision, ..Default::default() }).unwrap()
}

/// What a watcher is told up to a revision: for each revision its events, as `key` for a put and `-key` for a deletion.
///
/// # Panics
/// When it is told something twice, out of order, in pieces, or after a bookmark that says that it has it.
async fn told(watcher: &mut Watcher, upto: i64) -> BTreeMap<i64, Vec<String>> {
    let mut told: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    let mut done = 0;
    while done < upto {
        let message = tokio::time::timeout(PATIENCE, watcher.next()).await.expect("it is told in time").unwrap().unwrap();
        match message {
            WatchMessage::Events(events) => {
                let mut message: BTreeMap<i64, Vec<String>> = BTreeMap::new();
                for event in events {
                    let revision = event.kv.mod_revision;
                    assert!(revision > done, "revision {revision} after {done}");
                    let sign = if event.kind == EventKind::Delete { "-" } else { "" };
                    message.entry(revision).or_default().push(format!("{sign}{}", String::from_utf8_lossy(&event.kv.key)));
                }
                done = message.last_key_value().map_or(done, |last| *last.0);
                told.append(&mut message);
            }
            WatchMessage::Progress { revision } => {
                assert!(revision >= done, "progress {revision} after {done}");
                done = revision;
            }
            other => panic!("{other:?}"),
        }
    }
    told
}

/// All members come to one revision, and have the same there.
async fn are_equal(servers: &[Server]) {
    let revision = put(&servers[0].client(), "last", "one").await;
    let mut hashes = Vec::new();
    for server in servers {
        let client = server.client();
        until("a member catches up", || client.revision() >= revision).await;
        // A compaction may be under way, here earlier than there.
        hashes.push(client.hash_kv(revision).await.unwrap().hash);
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:x?}");
}

async fn restart_all(servers: Vec<Server>, config: impl Fn(usize) -> Config) -> Vec<Server> {
    stop_all(servers).await;
    start_all(config).await
}

// ---- Watches

/// etcd 15220. Progress is asked for without rest, of a watcher that has much to catch up with while more is written.
#[tokio::test(flavor = "multi_thread")]
async fn issue_15220_progress_comes_behind_what_it_promises() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    let client = servers[0].client();
    for number in 0..100 {
        put(&client, &format!("k{}", number % 7), "x").await;
    }
    let writing = tokio::spawn({
        let client = servers[1].client();
        async move {
            let mut last = 0;
            for number in 0..100 {
                last = put(&client, &format!("k{}", number % 7), "y").await;
            }
            last
        }
    });
    let mut watching = Vec::new();
    for server in &servers {
        let client = server.client();
        watching.push(tokio::spawn(async move {
            let mut watcher = watch_all(&client, 2);
            let (mut done, mut bookmarks) = (1, 0);
            let mut revisions = Vec::new();
            while done < 195 {
                watcher.request_progress();
                match tokio::time::timeout(PATIENCE, watcher.next()).await.expect("it is told in time").unwrap().unwrap() {
                    WatchMessage::Events(events) => {
                        // A bookmark at `done` had said that all up to it was told.
                        assert!(events.iter().all(|event| event.kv.mod_revision > done), "{events:?} after {done}");
                        revisions.extend(events.iter().map(|event| event.kv.mod_revision));
                        done = done.max(*revisions.last().unwrap());
                    }
                    WatchMessage::Progress { revision } => {
                        assert!(revision >= done);
                        (done, bookmarks) = (revision, bookmarks + 1);
                        // It is answered at once; the others want to work, too.
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    other => panic!("nothing was compacted: {other:?}"),
                }
            }
            assert!(revisions.windows(2).all(|pair| pair[0] + 1 == pair[1]), "a gap: {revisions:?}");
            assert!(bookmarks > 0, "no bookmark at all");
        }));
    }
    assert!(writing.await.unwrap() > 195);
    for watcher in watching {
        watcher.await.unwrap();
    }
    stop_all(servers).await;
}

/// etcd 17247. Txns that put and delete, next to Txns that only read, told by every member once and whole.
#[tokio::test(flavor = "multi_thread")]
async fn issue_17247_a_txn_is_told_once() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "d", "0").await;
    let mut watchers: Vec<Watcher> = servers.iter().map(|server| watch_all(&server.client(), 2)).collect();
    let mut expected: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for number in 0..60 {
        let client = servers[number % 3].client();
        let read = op(Request::RequestRange(RangeRequest { key: "a".into(), ..Default::default() }));
        let there = number % 2 == 0;
        let last = if there { delete_op("d") } else { put_op("d", "1") };
        let ops = vec![read.clone(), put_op("a", &number.to_string()), put_op("b", "x"), read, last];
        let nested = TxnRequest { success: ops, ..Default::default() };
        let txn = TxnRequest { success: vec![op(Request::RequestTxn(nested))], ..Default::default() };
        let revision = loop {
            match client.txn(txn.clone()).await {
                Ok(answer) => break answer.header.unwrap().revision,
                // Whether it was carried out is seen by what the watchers are told.
                Err(Error::Timeout | Error::Apply(_)) => {}
                Err(err) => panic!("{err}"),
            }
        };
        let last = if there { "-d" } else { "d" };
        expected.insert(revision, ["a", "b", last].map(String::from).to_vec());
    }
    let upto = *expected.last_key_value().unwrap().0;
    for watcher in &mut watchers {
        let told = told(watcher, upto).await;
        for (revision, events) in &expected {
            // A try that was carried out without an answer may have deleted the key before.
            let without: Vec<String> = events[..2].to_vec();
            assert!(told.get(revision).is_some_and(|told| told == events || *told == without), "{revision}: {:?}", told.get(revision));
        }
        assert!(told.values().all(|events| events.len() <= 3), "{told:?}");
    }
    stop_all(servers).await;
}

/// etcd 17529. Watchers that read nothing while much more is written than is kept for them, and then read all of it.
#[tokio::test(flavor = "multi_thread")]
async fn issue_17529_a_slow_watcher_loses_nothing() {
    use quorate::proto::etcdserverpb::watch_client::WatchClient;
    use quorate::proto::etcdserverpb::watch_request::RequestUnion;
    const WATCHERS: usize = 20;
    const PUTS: usize = 400;
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "big", "first").await;
    let mut streams = Vec::new();
    for server in &servers {
        let mut client = WatchClient::new(channel(server));
        let (requests, receiver) = tokio::sync::mpsc::channel(WATCHERS);
        for _ in 0..WATCHERS {
            let create = WatchCreateRequest { key: "big".into(), ..Default::default() };
            requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
        }
        let mut answers = client.watch(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap().into_inner();
        for _ in 0..WATCHERS {
            assert!(answers.message().await.unwrap().unwrap().created);
        }
        streams.push((answers, requests));
    }
    let (client, value) = (servers[0].client(), "v".repeat(20_000));
    let first = put(&client, "big", &value).await;
    let mut last = first;
    for _ in 1..PUTS {
        last = put(&client, "big", &value).await;
    }
    for (answers, _requests) in &mut streams {
        let mut told: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        while told.len() < WATCHERS || told.values().any(|revisions| *revisions.last().unwrap() < last) {
            let answer = tokio::time::timeout(PATIENCE, answers.message()).await.expect("it is told in time").unwrap().unwrap();
            assert!(!answer.canceled, "{}", answer.cancel_reason);
            for event in &answer.events {
                let revision = event.kv.as_ref().unwrap().decode().unwrap().mod_revision;
                told.entry(answer.watch_id).or_default().push(revision);
            }
        }
        for (watch, mut revisions) in told {
            // A member that lags may tell of the very first put.
            revisions.retain(|revision| *revision >= first);
            assert!(revisions.iter().copied().eq(first..=last), "watcher {watch}: {} of {}", revisions.len(), last - first + 1);
        }
    }
    stop_all(servers).await;
}

// ---- Compactions

/// etcd 17780. The newest revision is a deletion, and is compacted: it is no less after all members have started anew.
#[tokio::test(flavor = "multi_thread")]
async fn issue_17780_no_compaction_makes_the_revision_fall() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    for round in 0..3 {
        let client = servers[round].client();
        put(&client, "a", "1").await;
        let deleted = delete(&client, "a").await;
        compact(&client, deleted).await;
        servers = restart_all(servers, |at| three::config(dir.path(), &ports, at)).await;
        for server in &servers {
            let client = server.client();
            let now = insist("a read", || client.range(RangeRequest { key: "a".into(), ..Default::default() })).await;
            assert!(now.kvs.is_empty() && now.header.as_ref().unwrap().revision >= deleted, "{now:?}");
        }
        let next = put(&servers[round].client(), "b", "1").await;
        assert!(next > deleted, "revision {next} after {deleted}");
    }
    are_equal(&servers).await;
    stop_all(servers).await;
}

/// etcd 18089. A key is written, deleted and written again; the history is compacted at the deletion, from which a watch must still begin.
#[tokio::test(flavor = "multi_thread")]
async fn issue_18089_a_compacted_deletion_is_still_told() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    let client = servers[0].client();
    for value in ["2", "3", "4"] {
        put(&client, "k", value).await;
    }
    let deleted = delete(&client, "k").await;
    let again = put(&client, "k", "6").await;
    compact(&client, deleted).await;
    // Right after it, and from the data on disk.
    for restarted in [false, true] {
        if restarted {
            servers = restart_all(servers, |at| three::config(dir.path(), &ports, at)).await;
        }
        for server in &servers {
            let client = server.client();
            insist("a read", || client.get("k")).await;
            let told = told(&mut watch_all(&client, deleted), again).await;
            assert_eq!(told.get(&deleted).map(Vec::as_slice), Some(&["-k".to_owned()][..]), "restarted: {restarted}, {told:?}");
            assert_eq!(told.get(&again).map(Vec::as_slice), Some(&["k".to_owned()][..]), "restarted: {restarted}, {told:?}");
        }
    }
    stop_all(servers).await;
}

/// etcd 19179. The same, with watches that are opened while it is compacted, and with more keys, so that it takes several steps.
#[tokio::test(flavor = "multi_thread")]
async fn issue_19179_a_watch_beside_the_compaction_has_the_deletion() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    for round in 0..5 {
        let client = servers[round % 3].client();
        for key in ["a", "b", "c", "d"] {
            put(&client, key, "1").await;
        }
        let deleted = delete(&client, "a").await;
        let compacting = tokio::spawn({
            let client = client.clone();
            async move { compact(&client, deleted).await }
        });
        let mut tasks = Vec::new();
        for server in &servers {
            let client = server.client();
            tasks.push(tokio::spawn(async move {
                for _ in 0..20 {
                    insist("a read", || client.get("b")).await;
                    let told = told(&mut watch_all(&client, deleted), deleted).await;
                    assert_eq!(told.get(&deleted).map(Vec::as_slice), Some(&["-a".to_owned()][..]), "{told:?}");
                }
            }));
        }
        compacting.await.unwrap();
        for task in tasks {
            task.await.unwrap();
        }
    }
    are_equal(&servers).await;
    stop_all(servers).await;
}

/// etcd 18667. A Txn that puts and reads a compacted revision is refused by all members alike, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn issue_18667_a_txn_that_reads_what_is_compacted_does_nothing() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| three::config(dir.path(), &ports, at)).await;
    let client = servers[0].client();
    for value in ["1", "2", "3"] {
        put(&client, "k", value).await;
    }
    let newest = put(&client, "k", "4").await;
    compact(&client, newest).await;
    let read = |revision| op(Request::RequestRange(RangeRequest { key: "k".into(), revision, ..Default::default() }));
    for server in &servers {
        let client = server.client();
        // Also one whose revision is still to come, when it is decided upon and when it is carried out.
        for (revision, why) in [(newest - 1, ApplyError::Compacted), (newest + 1000, ApplyError::FutureRevision)] {
            let success = vec![put_op("k", "never"), put_op("other", "never"), read(revision)];
            let txn = TxnRequest { success, ..Default::default() };
            loop {
                match client.txn(txn.clone()).await {
                    Err(Error::Apply(err)) if err == why => break,
                    Err(Error::Timeout | Error::Apply(_)) => {}
                    other => panic!("revision {revision}: {other:?}"),
                }
            }
        }
    }
    for restarted in [false, true] {
        if restarted {
            servers = restart_all(servers, |at| three::config(dir.path(), &ports, at)).await;
        }
        for server in &servers {
            let client = server.client();
            let kv = insist("a read", || client.get("k")).await.unwrap();
            assert_eq!((&kv.value[..], kv.mod_revision), (&b"4"[..], newest));
            assert!(insist("a read", || client.get("other")).await.is_none());
        }
        are_equal(&servers).await;
    }
    stop_all(servers).await;
}

// ---- Snapshots

/// A member whose log keeps nothing for those who lag.
fn forgetful(dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let mut config = three::config(dir, ports, at);
    config.snapshot_catchup_entries = 10;
    config
}

/// Stops the third member, and lets the others go on until it needs a snapshot. Returns the newest revision.
async fn leave_behind(dir: &Path, servers: &mut Vec<Server>, round: usize) -> i64 {
    let gone = servers.pop().unwrap();
    let before = gone.client().last_status().raft_applied_index;
    gone.shutdown().await.unwrap();
    let client = servers[0].client();
    let mut last = 0;
    for chunk in 0..100 {
        let puts = (0..8).map(|number| {
            let (client, key) = (client.clone(), format!("late/{round}/{chunk}/{number}"));
            async move { put(&client, &key, &"v".repeat(300)).await }
        });
        last = futures_util::future::join_all(puts).await.into_iter().max().unwrap();
    }
    // The state is synced every few seconds, and with it the log cut off; but not while, and shortly after, somebody is sent a snapshot.
    let first = |name: &str| wal::dump(dir.join(name).join("member/wal")).map_or(0, |(log, _)| log.state.first);
    until("the log is cut off", || first("a") > before + 1 && first("b") > before + 1).await;
    last
}

fn received(server: &Server) -> u64 {
    let text = server.metrics().text();
    let line = text.lines().find_map(|line| line.strip_prefix("quorate_snapshots_received_total "));
    line.expect("the metric is there").parse().unwrap()
}

/// etcd 18055. A second snapshot comes shortly after the first, and the leader changes while one is on its way.
#[tokio::test(flavor = "multi_thread")]
async fn issue_18055_one_snapshot_after_the_other() {
    const ROUNDS_MAX: usize = 6;
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| forgetful(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "first", "1").await;
    let mut moved_meanwhile = 0;
    for round in 0..ROUNDS_MAX {
        let last = leave_behind(dir.path(), &mut servers, round).await;
        let back = Server::start(forgetful(dir.path(), &ports, 2)).await.unwrap();
        let ids = [servers[0].member_id(), servers[1].member_id()];
        let client = back.client();
        let mut moves = 0;
        while client.revision() < last {
            // Whoever leads hands over to the other of the two that have the log.
            for (server, other) in [(&servers[0], ids[1]), (&servers[1], ids[0])] {
                let mut maintenance = MaintenanceClient::new(channel(server));
                let moved = tokio::time::timeout(PATIENCE, maintenance.move_leader(MoveLeaderRequest { target_id: other })).await;
                moves += usize::from(moved.is_ok_and(|moved| moved.is_ok()));
            }
            // Long enough for a snapshot now and then: each move ends the one that is under way.
            tokio::time::sleep(Duration::from_millis(moves as u64 * 10)).await;
            assert!(moves < 200, "it does not catch up");
        }
        assert!(received(&back) > 0, "no snapshot was needed");
        servers.push(back);
        are_equal(&servers).await;
        moved_meanwhile += usize::from(moves > 0);
        if round > 0 && moved_meanwhile > 0 {
            break;
        }
    }
    assert!(moved_meanwhile > 0, "{ROUNDS_MAX} times it had caught up before anybody else led");
    stop_all(servers).await;
}

/// etcd 20221. Watches of the future, and from now on, that are open while a snapshot takes the state's place.
#[tokio::test(flavor = "multi_thread")]
async fn issue_20221_a_watch_of_the_future_is_told_of_nothing_else() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| forgetful(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "first", "1").await;
    let last = leave_behind(dir.path(), &mut servers, 0).await;
    let back = Server::start(forgetful(dir.path(), &ports, 2)).await.unwrap();
    let late = back.client();
    assert!(late.revision() < last, "it has caught up before the test could look");
    let far = last + 40;
    let mut watchers: Vec<(i64, Watcher)> = [last + 1, far].map(|start| (start, watch_all(&late, start))).into();
    for (_, watcher) in &mut watchers {
        watcher.request_progress();
    }
    until("it has caught up", || late.revision() >= last).await;
    assert!(received(&back) > 0, "no snapshot was needed");
    let client = servers[0].client();
    let mut newest = 0;
    while newest < far + 10 {
        newest = put(&client, "more", "x").await;
    }
    for (start, watcher) in &mut watchers {
        let told = told(watcher, newest).await;
        assert_eq!(told.first_key_value().map(|first| *first.0), Some(*start));
        assert!(told.keys().copied().eq(*start..=newest), "{:?}", told.keys().collect::<Vec<_>>());
    }
    servers.push(back);
    are_equal(&servers).await;
    stop_all(servers).await;
}

/// etcd 20271. A member is defragmented over and over while it gets a snapshot; then more is written, and it starts anew.
#[tokio::test(flavor = "multi_thread")]
async fn issue_20271_what_comes_after_a_snapshot_is_kept() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| forgetful(dir.path(), &ports, at)).await;
    put(&servers[0].client(), "first", "1").await;
    let last = leave_behind(dir.path(), &mut servers, 0).await;
    let back = Server::start(forgetful(dir.path(), &ports, 2)).await.unwrap();
    let late = back.client();
    let mut defragmented = 0;
    while late.revision() < last || defragmented == 0 {
        // Refused or not while the snapshot is made into a state: it must do no harm.
        defragmented += u32::from(late.defragment().await.is_ok());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(received(&back) > 0, "no snapshot was needed");
    let client = servers[0].client();
    let mut newest = 0;
    for number in 0..20 {
        newest = put(&client, &format!("after/{number}"), "x").await;
    }
    until("it has all of it", || late.revision() >= newest).await;
    back.shutdown().await.unwrap();
    servers.push(Server::start(forgetful(dir.path(), &ports, 2)).await.unwrap());
    let again = servers[2].client();
    for number in 0..20 {
        let key = format!("after/{number}");
        assert!(insist("a read", || again.get(key.clone())).await.is_some(), "{key} is lost");
    }
    are_equal(&servers).await;
    stop_all(servers).await;
}
