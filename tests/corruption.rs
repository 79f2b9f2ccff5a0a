//! Members whose data is damaged, or has come to differ: found, told by name, and mended where that can be done.
//!
//! Three members in one process, over loopback. One is stopped, something is done to its files, and it comes back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quorate::config::ClusterState;
use quorate::proto::etcdserverpb::cluster_client::ClusterClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::{
    AlarmMember, AlarmType, MemberAddRequest, MemberRemoveRequest, MoveLeaderRequest, RangeRequest, WatchCreateRequest,
};
use quorate::storage::history::{History, HistoryOptions};
use quorate::storage::sled::Sled;
use quorate::storage::{Backend, Record};
use quorate::{ApplyError, Client, Config, Error, Server};
use tonic::transport::Channel;

use ports::free_port;
use three::{insist, ports, start_all, stop_all, until};

#[path = "common/ports.rs"]
mod ports;
#[path = "common/three.rs"]
mod three;

/// Members that keep next to no log for those who lag, and compare only what the test asks for.
fn config(dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let mut config = three::config(dir, ports, at);
    config.snapshot_catchup_entries = 5;
    config.initial_corrupt_check = false;
    config.compact_hash_check = false;
    config
}

fn member_dir(dir: &Path, at: usize) -> PathBuf {
    dir.join(["a", "b", "c"][at]).join("member")
}

async fn write(client: &Client, prefix: &str, keys: usize) {
    for key in 0..keys {
        insist("a put", || client.put(format!("{prefix}{key:04}"), vec![b'v'; 300])).await;
    }
}

/// The value of a metric.
fn metric(server: &Server, name: &str) -> u64 {
    let text = server.metrics().text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no metric {name}")).parse().unwrap()
}

/// All members have come to one revision, and have the same history up to there.
async fn are_equal(servers: &[&Server]) {
    let clients: Vec<Client> = servers.iter().map(|server| server.client()).collect();
    let revision = insist("a put", || clients[0].put("last", "one")).await.header.unwrap().revision;
    let mut hashes = Vec::new();
    for client in &clients {
        until("a member catches up", || client.revision() >= revision).await;
        let hash = client.hash_kv(revision).await.unwrap();
        hashes.push((hash.hash, hash.compact_revision, hash.hash_revision));
        assert_eq!(own(client, "last").await.as_deref(), Some("one"));
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:x?}");
}

/// What a member itself has.
async fn own(client: &Client, key: &str) -> Option<String> {
    let request = RangeRequest { key: key.to_owned().into(), serializable: true, ..Default::default() };
    let found = client.range(request).await.unwrap();
    found.kvs.first().map(|kv| String::from_utf8(kv.decode().unwrap().value.to_vec()).unwrap())
}

/// The file of a member's log that it writes to.
fn log_file(dir: &Path, at: usize) -> PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(member_dir(dir, at).join("wal")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| std::fs::read(path).unwrap().iter().any(|byte| *byte != 0));
    files.sort();
    files.pop().unwrap()
}

/// Returns when a member's log does not go back to its beginning any more: its first entries are gone with their file, or are marked so.
async fn log_is_cut_off() {
    // The state is synced every few seconds, and with it the log is cut off.
    tokio::time::sleep(Duration::from_secs(12)).await;
}

/// The file that sled keeps a state in.
fn state_file(dir: &Path, at: usize) -> PathBuf {
    let state = member_dir(dir, at).join("state");
    let generation = std::fs::read_dir(state).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir());
    generation.unwrap().join("db")
}

fn flip(path: &Path, places: impl Iterator<Item = usize>) {
    let mut bytes = std::fs::read(path).unwrap();
    let len = bytes.len();
    for at in places.take_while(|at| *at < len) {
        bytes[at] ^= 0x55;
    }
    std::fs::write(path, bytes).unwrap();
}

fn list(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("state")).collect()
}

/// Gives a member, which is not running, another value for a key, as a bug might: everything is whole and sound.
fn tamper(dir: &Path, at: usize, key: &str) {
    let (state, made) = (member_dir(dir, at).join("state"), member_dir(dir, at).join("made"));
    let mut records = Vec::new();
    let old: Arc<dyn Backend> = Arc::new(Sled::open(&state).unwrap());
    let keep = &mut |revision, record: &Record| {
        records.push((revision, record.clone()));
        Ok(())
    };
    let (history, saved) = History::open(old.clone(), HistoryOptions::default(), keep).unwrap();
    old.accept().unwrap();
    drop(history);
    old.close();
    let new: Arc<dyn Backend> = Arc::new(Sled::open(&made).unwrap());
    let (history, _) = History::open(new.clone(), HistoryOptions::default(), &mut |_, _| Ok(())).unwrap();
    let mut changed = 0;
    for (revision, mut record) in records {
        if !record.tombstone && record.bytes.windows(key.len()).any(|bytes| bytes == key.as_bytes()) {
            let mut bytes = record.bytes.to_vec();
            let value = bytes.iter().position(|byte| *byte == b'v').unwrap();
            bytes[value] = b'w';
            (record.bytes, changed) = (bytes.into(), changed + 1);
        }
        history.append(revision, record);
    }
    assert_eq!(changed, 1, "{key}");
    for (name, value) in saved.meta {
        history.put_meta(&name, Some(value));
    }
    history.commit(saved.applied.unwrap());
    history.sync().unwrap();
    drop(history);
    new.close();
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&made, &state).unwrap();
}

fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.client_addrs()[0])).unwrap().connect_lazy()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_state_is_fetched_from_the_others() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let start = |at| Server::start(config(dir.path(), &ports, at));
    let mut servers: Vec<Option<Server>> = start_all(|at| config(dir.path(), &ports, at)).await.into_iter().map(Some).collect();
    let client = servers[0].as_ref().unwrap().client();
    let lease = insist("a lease", || client.lease_grant(0, 1000)).await.id;
    write(&client, "k", 100).await;
    log_is_cut_off().await;
    // Once with bytes changed everywhere, once with the file gone, and once with nothing left at all.
    for round in 0..3 {
        servers[2].take().unwrap().shutdown().await.unwrap();
        match round {
            0 => flip(&state_file(dir.path(), 2), (100..).step_by(1000)),
            1 => std::fs::remove_file(state_file(dir.path(), 2)).unwrap(),
            _ => std::fs::remove_dir_all(member_dir(dir.path(), 2).join("state")).unwrap(),
        }
        write(&client, &format!("without {round} "), 10).await;
        let back = start(2).await.unwrap();
        assert_eq!(metric(&back, "quorate_state_rebuilds_total"), 1);
        are_equal(&[&back, servers[0].as_ref().unwrap(), servers[1].as_ref().unwrap()]).await;
        assert!(back.client().lease_time_to_live(lease).await.unwrap().is_some());
        servers[2] = Some(back);
        log_is_cut_off().await;
    }
    // What was there is kept; where there was nothing, nothing is.
    let mut left = list(&member_dir(dir.path(), 2));
    left.sort();
    assert_eq!(left, ["state", "state.damaged-1", "state.damaged-2"]);
    // With a member down nobody can lead before the state is mended: whoever has one gives it.
    servers[2].take().unwrap().shutdown().await.unwrap();
    servers[1].take().unwrap().shutdown().await.unwrap();
    flip(&state_file(dir.path(), 2), (100..).step_by(1000));
    let back = start(2).await.unwrap();
    assert_eq!(metric(&back, "quorate_state_rebuilds_total"), 1);
    are_equal(&[&back, servers[0].as_ref().unwrap()]).await;
    // And it is as good as any other: with the one that has helped it gone, it has all.
    servers[0].take().unwrap().shutdown().await.unwrap();
    let other = start(1).await.unwrap();
    are_equal(&[&other, &back]).await;
    let client = back.client();
    assert!(insist("a get", || client.get("without 2 0009")).await.is_some());
    stop_all(vec![other, back]).await;
}

/// The log may go back to the beginning: then it is all that is needed. And the vote in it is not forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_state_is_made_from_the_log_if_that_is_whole() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let keeping = |at| three::config(dir.path(), &ports, at);
    let mut servers = start_all(keeping).await;
    let client = servers[0].client();
    write(&client, "k", 10).await;
    let term = client.last_status().raft_term;
    let gone = servers.pop().unwrap();
    gone.shutdown().await.unwrap();
    flip(&state_file(dir.path(), 2), (100..).step_by(1000));
    let back = Server::start(keeping(2)).await.unwrap();
    assert!(back.client().last_status().raft_term >= term);
    are_equal(&[&back, &servers[0], &servers[1]]).await;
    servers.push(back);
    stop_all(servers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_alone_is_refused_with_a_damaged_state() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.data_dir = Some(dir.path().to_owned());
    config.listen_client_urls.clear();
    config.listen_peer_urls.clear();
    let server = Server::start(config.clone()).await.unwrap();
    server.client().put("a", "1").await.unwrap();
    server.shutdown().await.unwrap();
    let state = std::fs::read_dir(dir.path().join("member/state")).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir());
    std::fs::remove_file(state.unwrap().join("db")).unwrap();
    let refusal = Server::start(config).await.unwrap_err();
    assert!(matches!(refusal, Error::Corrupt { .. }), "{refusal}");
    assert_eq!(list(&dir.path().join("member")), ["state"]);
}

/// It may have acknowledged what is in no other log. The error says what to do, and that works.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_is_refused_and_the_member_added_anew() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| config(dir.path(), &ports, at)).await;
    write(&servers[0].client(), "k", 50).await;
    let gone = servers.pop().unwrap();
    let id = gone.member_id();
    gone.shutdown().await.unwrap();
    let (path, whole) = (log_file(dir.path(), 2), std::fs::read(log_file(dir.path(), 2)).unwrap());
    // In the midst of what is followed by more.
    let middle = whole.iter().rposition(|byte| *byte != 0).unwrap() / 2;
    flip(&path, middle..middle + 8);
    let refusal = Server::start(config(dir.path(), &ports, 2)).await.unwrap_err();
    assert!(matches!(refusal, Error::Corrupt { .. }), "{refusal}");
    assert!(refusal.to_string().contains(&format!("etcdctl member remove {id:x}")), "{refusal}");
    // Nor if the log is gone, or the state with it.
    std::fs::remove_dir_all(member_dir(dir.path(), 2).join("wal")).unwrap();
    let refusal = Server::start(config(dir.path(), &ports, 2)).await.unwrap_err();
    assert!(refusal.to_string().contains(&format!("etcdctl member remove {id:x}")), "{refusal}");
    std::fs::remove_dir_all(member_dir(dir.path(), 2).join("wal")).unwrap();
    std::fs::remove_dir_all(member_dir(dir.path(), 2).join("state")).unwrap();
    let refusal = Server::start(config(dir.path(), &ports, 2)).await.unwrap_err();
    assert!(refusal.to_string().contains(&format!("etcdctl member remove {id:x}")), "{refusal}");
    // The others go on, and do as it says.
    let cluster = ClusterClient::new(channel(&servers[0]));
    until_done("removing it", async || cluster.clone().member_remove(MemberRemoveRequest { id }).await).await;
    std::fs::remove_dir_all(dir.path().join("c")).unwrap();
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let add = MemberAddRequest { peer_urls: vec![url.clone()], is_learner: false };
    until_done("adding it", async || cluster.clone().member_add(add.clone()).await).await;
    let mut again = config(dir.path(), &ports, 2);
    again.listen_peer_urls = vec![url.parse().unwrap()];
    again.initial_advertise_peer_urls = again.listen_peer_urls.clone();
    again.initial_cluster = format!("a=http://127.0.0.1:{},b=http://127.0.0.1:{},c={url}", ports[0], ports[1]);
    again.initial_cluster_state = ClusterState::Existing;
    let back = Server::start(again).await.unwrap();
    assert_ne!(back.member_id(), id);
    are_equal(&[&servers[0], &servers[1], &back]).await;
    servers.push(back);
    stop_all(servers).await;
}

/// Repeats a change while the cluster is not settled.
async fn until_done<T>(what: &str, mut change: impl AsyncFnMut() -> Result<T, tonic::Status>) -> T {
    for _ in 0..1200 {
        match change().await {
            Ok(done) => return done,
            Err(err) => assert_eq!(err.code(), tonic::Code::Unavailable, "{what}: {err}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}: not in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_differs_does_not_start() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let mut servers = start_all(|at| config(dir.path(), &ports, at)).await;
    write(&servers[0].client(), "k", 30).await;
    log_is_cut_off().await;
    servers.pop().unwrap().shutdown().await.unwrap();
    tamper(dir.path(), 2, "k0007");
    let checking = || {
        let mut config = config(dir.path(), &ports, 2);
        config.initial_corrupt_check = true;
        config
    };
    let refusal = Server::start(checking()).await.unwrap_err();
    assert!(matches!(refusal, Error::Corrupt { .. }), "{refusal}");
    assert!(refusal.to_string().contains("found data inconsistency with peers"), "{refusal}");
    // As it says.
    std::fs::rename(member_dir(dir.path(), 2).join("state"), dir.path().join("state of c")).unwrap();
    let back = Server::start(checking()).await.unwrap();
    assert!(metric(&back, "quorate_corruption_compared_total") >= 2);
    assert_eq!(metric(&back, "quorate_corruption_mismatches_total"), 0);
    are_equal(&[&servers[0], &servers[1], &back]).await;
    servers.push(back);
    stop_all(servers).await;
}

/// How a difference is looked for while members run.
#[derive(Clone, Copy, Debug)]
enum Found {
    AtCompaction,
    Periodically,
}

/// What becomes of the member that differs.
#[derive(Clone, Copy, Debug)]
enum Then {
    Mended,
    Removed,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_is_found_at_compactions() {
    a_difference_is_found(Found::AtCompaction, false, Then::Mended).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_is_found_in_a_leader() {
    a_difference_is_found(Found::AtCompaction, true, Then::Mended).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_is_found_periodically() {
    a_difference_is_found(Found::Periodically, false, Then::Mended).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_differs_is_removed() {
    a_difference_is_found(Found::Periodically, false, Then::Removed).await;
}

/// The member that differs is named, and serves no client any more; the others go on.
async fn a_difference_is_found(found: Found, leads: bool, then: Then) {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let comparing = |at| {
        let mut config = config(dir.path(), &ports, at);
        match found {
            Found::AtCompaction => (config.compact_hash_check, config.compact_hash_check_time) = (true, Duration::from_millis(500)),
            Found::Periodically => config.corrupt_check_time = Duration::from_millis(500),
        }
        config
    };
    let mut servers = start_all(comparing).await;
    write(&servers[0].client(), "k", 30).await;
    log_is_cut_off().await;
    servers.pop().unwrap().shutdown().await.unwrap();
    tamper(dir.path(), 2, "k0007");
    let wrong = Server::start(comparing(2)).await.unwrap();
    let (client, id) = (servers[0].client(), wrong.member_id());
    let mut watch = wrong.client().watch(WatchCreateRequest { key: "w".into(), ..Default::default() }).unwrap();
    if leads {
        for _ in 0..600 {
            let leader = servers.iter().chain([&wrong]).find(|server| server.member_id() == server.client().last_status().leader);
            match leader {
                Some(leader) if leader.member_id() == id => break,
                Some(leader) => drop(MaintenanceClient::new(channel(leader)).move_leader(MoveLeaderRequest { target_id: id }).await),
                None => {}
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let revision = insist("a put", || client.put("x", "y")).await.header.unwrap().revision;
    until("it has come to that", || wrong.client().revision() >= revision).await;
    if matches!(found, Found::AtCompaction) {
        insist("compacting", || client.compact(revision)).await;
    }
    let expected = [AlarmMember { member_id: id, alarm: AlarmType::Corrupt as i32 }];
    let clients = BTreeMap::from([("a", servers[0].client()), ("b", servers[1].client()), ("c", wrong.client())]);
    for (name, client) in &clients {
        until(&format!("{name} knows of the alarm"), || client.last_alarms() == expected).await;
    }
    let mismatches: u64 = servers.iter().chain([&wrong]).map(|server| metric(server, "quorate_corruption_mismatches_total")).sum();
    assert!(mismatches >= 1);
    // It serves nobody, in whatever way it is asked.
    let refused = |err: Error| assert!(matches!(err, Error::Apply(ApplyError::Corrupt)), "{err}");
    until_so("it refuses", async || wrong.client().get("x").await.is_err()).await;
    let own = RangeRequest { key: "x".into(), serializable: true, ..Default::default() };
    refused(wrong.client().range(own).await.unwrap_err());
    refused(wrong.client().get("x").await.unwrap_err());
    refused(wrong.client().put("x", "z").await.unwrap_err());
    refused(wrong.client().backup().await.map(drop).unwrap_err());
    // The others go on, led by one of them.
    until("another leads", || client.last_status().leader != id && client.last_status().leader != 0).await;
    // Its watches have ended, too, before there is anything to tell.
    refused(watch.next().await.unwrap_err());
    insist("a put", || client.put("w", "on")).await;
    assert!(insist("a get", || client.get("w")).await.is_some());
    if matches!(then, Then::Removed) {
        // The alarm stays until it is disarmed, and says nothing of those who are left.
        let mut admin = ClusterClient::new(channel(&servers[0]));
        admin.member_remove(MemberRemoveRequest { id }).await.unwrap();
        let _ = wrong.shutdown().await;
        assert_eq!(client.last_alarms(), expected);
        for other in [&clients["a"], &clients["b"]] {
            insist("a put", || other.put("x", "without it")).await;
        }
        assert_eq!(insist("disarming", || client.alarm_disarm(expected[0])).await, expected);
        are_equal(&[&servers[0], &servers[1]]).await;
        return stop_all(servers).await;
    }
    // It is mended as the log says.
    wrong.shutdown().await.unwrap();
    std::fs::rename(member_dir(dir.path(), 2).join("state"), dir.path().join("state of c")).unwrap();
    let back = Server::start(comparing(2)).await.unwrap();
    assert_eq!(metric(&back, "quorate_state_rebuilds_total"), 1);
    assert_eq!(insist("disarming", || client.alarm_disarm(expected[0])).await, expected);
    until_so("it serves", async || back.client().get("w").await.is_ok()).await;
    are_equal(&[&servers[0], &servers[1], &back]).await;
    servers.push(back);
    stop_all(servers).await;
}

async fn until_so(what: &str, is_so: impl AsyncFn() -> bool) {
    for _ in 0..1200 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}: not in time");
}

/// It founds its cluster again while the others are not there to tell it better; when they are, they refuse it.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_without_its_data_is_refused_by_the_others() {
    let (dir, ports) = (tempfile::tempdir().unwrap(), ports());
    let servers = start_all(|at| config(dir.path(), &ports, at)).await;
    write(&servers[0].client(), "k", 10).await;
    let (id, clients) = (servers[2].member_id(), servers.iter().map(Server::client).collect::<Vec<_>>());
    for client in &clients {
        until("all are published", || client.last_members().iter().filter(|member| !member.client_urls.is_empty()).count() == 3).await;
    }
    drop(clients);
    stop_all(servers).await;
    std::fs::remove_dir_all(dir.path().join("c")).unwrap();
    let without = Server::start(config(dir.path(), &ports, 2)).await.unwrap();
    assert_eq!(without.member_id(), id);
    let others = [Server::start(config(dir.path(), &ports, 0)).await.unwrap(), Server::start(config(dir.path(), &ports, 1)).await.unwrap()];
    let failed = without.stopped().await.unwrap_err().to_string();
    assert!(failed.contains("has come back with another data directory"), "{failed}");
    assert!(failed.contains(&format!("etcdctl member remove {id:x}")), "{failed}");
    let _ = without.shutdown().await;
    let client = others[0].client();
    assert!(insist("a get", || client.get("k0009")).await.is_some());
    are_equal(&[&others[0], &others[1]]).await;
    stop_all(others.into()).await;
}
