//! What a remote client makes of members that fail.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorate::client::{ListUpdate, RemoteOptions, WatchMessage, prefix_end};
use quorate::embed::{EmbedConfig, Node};
use quorate::proto::etcdserverpb::{PutRequest, RangeRequest, WatchCreateRequest};
use quorate::{Client, Error, ErrorKind, Server, Url};
use tempfile::TempDir;

use crate::gate::Gate;
use crate::{remote_client, three};

/// What a cluster may take to come to something.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long writers and a watcher are disturbed: longer than the TTL of the session beside them.
const DISTURBED: Duration = Duration::from_secs(18);
const TTL: i64 = 15;

async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Tries however often it takes, while the cluster is between two leaders or the wire is cut.
async fn insist<T, F: Future<Output = quorate::Result<T>>>(what: &str, attempt: impl Fn() -> F) -> T {
    let began = Instant::now();
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(err) => {
                let passing = err.kind().nothing_was_done() || err.kind() == ErrorKind::OutcomeUnknown;
                assert!(passing && began.elapsed() < PATIENCE, "{what}: {err}");
            }
        }
    }
}

fn watch(prefix: &str, start_revision: i64) -> WatchCreateRequest {
    let range_end = prefix_end(prefix.as_bytes());
    WatchCreateRequest { key: prefix.to_owned().into(), range_end, start_revision, ..Default::default() }
}

async fn gates(servers: &[Server]) -> Vec<Gate> {
    let mut gates = Vec::new();
    for server in servers {
        gates.push(Gate::new(server.client_addrs()[0]).await);
    }
    gates
}

async fn three_members() -> (Vec<Server>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ports = three::ports();
    let servers = three::start_all(|at| three::config(dir.path(), &ports, at)).await;
    let client = servers[0].client();
    insist("the first write", || client.put("ready", "1")).await;
    (servers, dir)
}

async fn one_member() -> (Server, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = quorate::Config::default();
    config.data_dir = Some(dir.path().to_owned());
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![];
    (Server::start(config).await.unwrap(), dir)
}

fn urls(gates: &[Gate]) -> Vec<String> {
    gates.iter().map(Gate::url).collect()
}

/// The gate that the client's connection goes through.
async fn in_use(client: &Client, gates: &[Gate]) -> usize {
    until("there is a connection", async || client.endpoint().is_some()).await;
    // It may be replaced at any moment; then any gate will do.
    let url = client.endpoint().map(|url| url.to_string());
    gates.iter().position(|gate| Some(gate.url()) == url).unwrap_or(0)
}

/// What a writer was told of each of its keys.
#[derive(Default)]
struct Told {
    done: BTreeSet<String>,
    not_done: BTreeSet<String>,
    open: BTreeSet<String>,
}

async fn write(client: Client, writer: usize, stop: Arc<AtomicBool>) -> Told {
    let mut told = Told::default();
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let key = format!("w/{writer}/{number}");
        match client.put(key.clone(), "x").await {
            Ok(_) => told.done.insert(key),
            Err(err) if err.kind().nothing_was_done() => told.not_done.insert(key),
            Err(err) => {
                assert_eq!(err.kind(), ErrorKind::OutcomeUnknown, "{err}");
                told.open.insert(key)
            }
        };
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    told
}

/// The wire to the member that is talked to is cut, again and again, and in the end that member is stopped. Every acknowledged write is there,
/// none twice, and the watcher is told each once; the session lasts, or says that it does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_watches_and_sessions_go_on_elsewhere() {
    let (mut servers, _dir) = three_members().await;
    let mut gates = gates(&servers).await;
    let client = remote_client(&urls(&gates));
    client.put("begin", "1").await.unwrap();
    let start = client.revision() + 1;
    let session = client.session(TTL).await.unwrap();
    let put = PutRequest { key: "session".into(), lease: session.lease(), ..Default::default() };
    client.put_with(put).await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4).map(|writer| tokio::spawn(write(client.clone(), writer, stop.clone()))).collect();
    let mut watcher = client.watch(WatchCreateRequest { progress_notify: true, ..watch("w/", start) }).unwrap();
    let watching = tokio::spawn(async move {
        let mut seen = Vec::new();
        loop {
            match watcher.next().await.unwrap().expect("it goes on") {
                WatchMessage::Events(events) => seen.extend(events.into_iter().map(|event| (event.kv.mod_revision, event.kv.key))),
                WatchMessage::Progress { .. } => {}
                other => panic!("{other:?}"),
            }
            if seen.last().is_some_and(|(_, key)| *key == "w/end") {
                return seen;
            }
        }
    });

    let began = Instant::now();
    let mut rounds = 0;
    while began.elapsed() < DISTURBED {
        let at = in_use(&client, &gates).await;
        gates[at].cut().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        gates[at].mend().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        rounds += 1;
    }
    // And one for good, leader or not.
    let at = in_use(&client, &gates).await;
    servers.remove(at).shutdown().await.unwrap();
    gates.remove(at).cut().await;
    insist("a write with two of three", || client.put("still", "1")).await;
    stop.store(true, Ordering::SeqCst);
    let mut told = Told::default();
    for writer in writers {
        let one = writer.await.unwrap();
        told.done.extend(one.done);
        told.not_done.extend(one.not_done);
        told.open.extend(one.open);
    }
    insist("the last write", || client.put("w/end", "1")).await;
    let seen = tokio::time::timeout(PATIENCE, watching).await.expect("the watch goes on").unwrap();

    let listing = client.list("w/").await.unwrap();
    assert!(listing.kvs.iter().all(|kv| kv.version == 1 || kv.key == "w/end"), "a write was carried out twice");
    let there: BTreeMap<String, i64> =
        listing.kvs.iter().map(|kv| (String::from_utf8(kv.key.to_vec()).unwrap(), kv.mod_revision)).collect();
    assert!(told.done.iter().all(|key| there.contains_key(key)), "an acknowledged write is lost");
    assert!(told.not_done.iter().all(|key| !there.contains_key(key)), "a write was carried out of which nothing was done");
    assert!(seen.is_sorted_by(|a, b| a.0 < b.0), "told twice, or out of order");
    let keys: BTreeSet<&[u8]> = seen.iter().map(|(_, key)| &key[..]).collect();
    assert!(there.keys().all(|key| keys.contains(key.as_bytes())), "a watcher was not told of a write");
    assert_eq!(keys.len(), there.len());
    assert!(rounds >= 3 && told.done.len() > 50, "{rounds} rounds, {} writes", told.done.len());
    println!("{rounds} rounds: {} writes done, {} not, {} open", told.done.len(), told.not_done.len(), told.open.len());
    // On a machine that stands still for long it may have been lost; but never without a word.
    let is_there = client.get("session").await.unwrap().is_some();
    println!("the session {}", if session.is_lost() { "was lost" } else { "has lasted" });
    assert!(is_there || session.is_lost());
    three::stop_all(servers).await;
}

/// The answer to a write is lost: that is said, and it is not tried again. A read is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_is_not_repeated() {
    let (server, _dir) = one_member().await;
    // Two ways to the same member.
    let mut first = Gate::new(server.client_addrs()[0]).await;
    let second = Gate::new(server.client_addrs()[0]).await;
    let client = remote_client(&[first.url(), second.url()]);
    let direct = server.client();
    client.put("a", "0").await.unwrap();
    assert_eq!(client.endpoint().unwrap().to_string(), first.url());

    first.mute();
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.put("a", "1").await }
    });
    until("it was carried out", async || direct.get("a").await.unwrap().unwrap().value == "1").await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.get("a").await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.cut().await;
    let outcome = write.await.unwrap();
    assert!(matches!(outcome, Err(Error::OutcomeUnknown(_))), "{outcome:?}");
    assert_eq!(read.await.unwrap().unwrap().unwrap().value, "1");
    assert_eq!(client.endpoint().unwrap().to_string(), second.url());
    let a = client.get("a").await.unwrap().unwrap();
    assert_eq!((a.version, &a.value[..]), (2, &b"1"[..]));

    // Where nobody listens, nothing was sent: that is tried elsewhere.
    let third = remote_client(&[first.url(), second.url()]);
    third.put("a", "2").await.unwrap();
    assert_eq!(client.get("a").await.unwrap().unwrap().version, 3);
    let mut options = RemoteOptions::default();
    options.request_timeout = Duration::from_millis(500);
    let nowhere = Client::remote(vec![first.url().parse().unwrap()], options).unwrap();
    let refused = nowhere.put("a", "3").await.unwrap_err();
    assert!(refused.kind() == ErrorKind::Unavailable && refused.to_string().contains(&first.url()), "{refused}");
    server.shutdown().await.unwrap();
}

/// While the watcher is away, what it would need is compacted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_was_away_too_long_is_told() {
    let (server, _dir) = one_member().await;
    let mut gate = Gate::new(server.client_addrs()[0]).await;
    let (client, direct) = (remote_client(&[gate.url()]), server.client());
    direct.put("k/1", "1").await.unwrap();
    let mut watcher = client.watch(watch("k/", 2)).unwrap();
    let mut updates = client.list_then_watch("k/");
    assert!(matches!(watcher.next().await.unwrap(), Some(WatchMessage::Events(events)) if events.len() == 1));
    let Ok(ListUpdate::Snapshot(listing)) = updates.next().await else { panic!("the listing comes first") };
    assert_eq!((listing.revision, listing.kvs.len()), (2, 1));
    direct.put("k/2", "1").await.unwrap();
    assert!(matches!(updates.next().await.unwrap(), ListUpdate::Events(events) if events[0].kv.key == "k/2"));
    assert!(matches!(watcher.next().await.unwrap(), Some(WatchMessage::Events(events)) if events[0].kv.key == "k/2"));

    // A break alone costs nothing: what has happened meanwhile is told.
    gate.cut().await;
    direct.put("k/3", "1").await.unwrap();
    gate.mend().await;
    assert!(matches!(updates.next().await.unwrap(), ListUpdate::Events(events) if events[0].kv.key == "k/3"));
    assert!(matches!(watcher.next().await.unwrap(), Some(WatchMessage::Events(events)) if events[0].kv.key == "k/3"));

    gate.cut().await;
    direct.delete("k/1").await.unwrap();
    direct.put("k/4", "1").await.unwrap();
    direct.compact(6).await.unwrap();
    gate.mend().await;
    assert_eq!(watcher.next().await.unwrap(), Some(WatchMessage::Compacted { revision: 6 }));
    assert_eq!(watcher.next().await.unwrap(), None);
    let Ok(ListUpdate::Snapshot(listing)) = updates.next().await else { panic!("the keys are listed anew") };
    assert_eq!(listing.kvs.iter().map(|kv| &kv.key[..]).collect::<Vec<_>>(), [b"k/2", b"k/3", b"k/4"]);
    direct.put("k/5", "1").await.unwrap();
    assert!(matches!(updates.next().await.unwrap(), ListUpdate::Events(events) if events[0].kv.key == "k/5"));
    server.shutdown().await.unwrap();
}

/// Endpoints come and go, as somebody says or as the members say of each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_are_followed() {
    let (servers, _dir) = three_members().await;
    let mut gates = gates(&servers).await;
    let url = |gate: &Gate| gate.url().parse::<Url>().unwrap();
    let (known, changing) = tokio::sync::watch::channel(vec![url(&gates[0])]);
    let client = Client::remote(changing, RemoteOptions::default()).unwrap();
    insist("a write", || client.put("a", "1")).await;
    assert_eq!(client.endpoint(), Some(url(&gates[0])));
    known.send_replace(vec![url(&gates[1]), url(&gates[2])]);
    insist("a write", || client.put("a", "2")).await;
    assert!(client.endpoint().is_some_and(|now| now != url(&gates[0])));

    for server in &servers {
        let all = async || server.client().last_members().iter().all(|member| !member.client_urls.is_empty());
        until("all are published", all).await;
    }
    let mut options = RemoteOptions::default();
    options.follow_members = true;
    let client = Client::remote(vec![url(&gates[0])], options).unwrap();
    until("the members are known", async || client.last_members().len() == 3).await;
    gates[0].cut().await;
    insist("a write elsewhere", || client.put("a", "3")).await;
    let direct: Vec<String> = servers.iter().map(|server| format!("http://{}", server.client_addrs()[0])).collect();
    assert!(client.endpoint().is_some_and(|now| direct.contains(&now.to_string())));
    three::stop_all(servers).await;
}

/// Without a quorum writes and linearizable reads are refused, certainly not done; serializable reads go on; a session ends in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_only_serializable_reads_are_served() {
    let (mut servers, _dir) = three_members().await;
    let last = servers.pop().unwrap();
    let mut options = RemoteOptions::default();
    options.request_timeout = Duration::from_secs(3);
    let client = Client::remote(vec![format!("http://{}", last.client_addrs()[0]).parse().unwrap()], options).unwrap();
    insist("a write", || client.put("a", "1")).await;
    let session = client.session(10).await.unwrap();
    three::stop_all(servers).await;
    until("it knows that it has no leader", async || matches!(client.put("b", "1").await, Err(err) if err.kind() == ErrorKind::NoLeader))
        .await;
    assert_eq!(client.get("a").await.unwrap_err().kind(), ErrorKind::NoLeader);
    let local = client.range(RangeRequest { key: "a".into(), serializable: true, ..Default::default() }).await.unwrap();
    assert_eq!(local.count, 1);
    tokio::time::timeout(PATIENCE, session.lost()).await.expect("the session is lost");
    assert!(session.is_lost());
    last.shutdown().await.unwrap();
}

/// The answer to the Txn that takes a lock is lost, and then nobody waits for it any more: the place is given up all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_was_given_up_in_the_making_is_free() {
    let (server, _dir) = one_member().await;
    let mut gate = Gate::new(server.client_addrs()[0]).await;
    let (client, direct) = (remote_client(&[gate.url()]), server.client());
    // Longer than the test: it is not the lease that frees it.
    let session = client.session(600).await.unwrap();
    let other = direct.session(600).await.unwrap();
    gate.mute();
    let locking = tokio::spawn({
        let session = session.clone();
        async move { session.lock("l").await.map(drop) }
    });
    until("the key is there", async || direct.list("l/").await.unwrap().kvs.len() == 1).await;
    locking.abort();
    assert!(locking.await.unwrap_err().is_cancelled());
    gate.cut().await;
    gate.mend().await;
    let lock = tokio::time::timeout(PATIENCE, other.lock("l")).await.expect("it is free").unwrap();
    assert!(!session.is_lost() && !other.is_lost());
    // And the session may have it again.
    let (again, ()) = futures_util::join!(session.lock("l"), async { lock.unlock().await.unwrap() });
    again.unwrap().unlock().await.unwrap();
    server.shutdown().await.unwrap();
}

/// A client that a host keeps when its node has stopped: whatever is called, or was under way, ends with a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_outlives_its_node() {
    let (server, _dir) = one_member().await;
    let gate = Gate::new(server.client_addrs()[0]).await;
    let address = gate.url().trim_start_matches("http://").to_owned();
    let vars = [("KV_BACKEND".to_owned(), "etcd".to_owned()), ("KV_ADDR".to_owned(), address)];
    let node = Node::start(EmbedConfig::from_vars(vars).unwrap()).await.unwrap();
    let client = node.client().clone();
    client.put("a", "1").await.unwrap();
    let session = client.session(600).await.unwrap();
    let lock = session.lock("l").await.unwrap();
    let mut watcher = client.watch(watch("a", 1)).unwrap();
    assert!(matches!(watcher.next().await.unwrap(), Some(WatchMessage::Events(_))));
    let mut updates = client.list_then_watch("a");
    assert!(matches!(updates.next().await.unwrap(), ListUpdate::Snapshot(_)));
    // Answers do not come any more; so what is asked now is still under way when the node stops.
    gate.mute();
    let reads: Vec<_> = (0..32)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.get("a").await })
        })
        .collect();
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.put("b", "1").await }
    });
    until("it is under way", async || server.client().get("b").await.unwrap().is_some()).await;
    node.shutdown().await.unwrap();
    for read in reads {
        read.await.expect("no panic").unwrap_err();
    }
    assert_eq!(write.await.expect("no panic").unwrap_err().kind(), ErrorKind::OutcomeUnknown);
    for _ in 0..3 {
        assert!(matches!(client.get("a").await, Err(Error::Stopped)));
        assert!(matches!(client.put("a", "2").await, Err(Error::Stopped)));
        assert!(matches!(client.backup().await, Err(Error::Stopped)));
        assert!(matches!(watcher.next().await, Err(Error::Stopped)));
        assert!(updates.next().await.is_err());
    }
    let mut late = client.watch(watch("a", 1)).unwrap();
    assert!(matches!(late.started().await, Err(Error::Stopped)));
    assert!(matches!(late.next().await, Err(Error::Stopped)));
    session.lost().await;
    assert!(matches!(lock.unlock().await, Err(Error::SessionLost)));
    assert!(matches!(session.lock("l").await, Err(Error::SessionLost)));
    assert!(matches!(session.close().await, Err(Error::Stopped)));
    server.shutdown().await.unwrap();
}
