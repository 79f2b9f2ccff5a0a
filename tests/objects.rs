//! Backups in an object store: made, listed, forgotten and restored, and what becomes of them when the store does not do as it should.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use quorate::backup::{self, BackupConfig, Backups, RestoreOptions, Soundness, StoreOptions, restore};
use quorate::embed::{Access, EmbedConfig, Node};
use quorate::proto::etcdserverpb::{RangeRequest, RangeResponse};
use quorate::{Config, Error, Server};

#[path = "common/bucket.rs"]
mod bucket;
#[path = "common/ports.rs"]
mod ports;

use bucket::{Fault, SECRET, Store};

/// What anything here may take. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// More than a request is given in these tests; nothing waits for it.
const NEVER: &str = "1h";

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Does what takes hold of a directory that was let go of just now: a process that another test begins has, for a moment, a share in all locks
/// of this one.
async fn unlocked<T>(mut act: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let began = Instant::now();
    loop {
        match act().await {
            Err(Error::Locked { .. }) if began.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(20)).await,
            done => return done.unwrap_or_else(|err| panic!("{err}")),
        }
    }
}

/// A member that is alone, in this process; with more in it than one part of an upload holds, if it `is_large`.
async fn member(dir: &Path, is_large: bool) -> Server {
    let mut config = Config::default();
    config.data_dir = Some(dir.to_owned());
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls.clear();
    let server = Server::start(config).await.unwrap();
    server.client().put("a", "1").await.unwrap();
    for number in 0..if is_large { 20_u8 } else { 0 } {
        server.client().put(format!("large/{number}"), vec![number; 1_000_000]).await.unwrap();
    }
    server
}

fn told(store: &Store, more: &[(&'static str, &str)]) -> BackupConfig {
    let mut config = BackupConfig::new(store.url());
    let more = more.iter().map(|(name, value)| (*name, (*value).to_owned()));
    config.store_options = StoreOptions::new(store.options().into_iter().chain(more));
    config
}

fn all() -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

fn content(answer: RangeResponse) -> Vec<quorate::proto::KeyValue> {
    answer.kvs.iter().map(|kv| kv.decode().unwrap()).collect()
}

/// The same in a store and in a directory, by its path and by its URL: saved, listed, kept, forgotten, restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_keeps_backups_as_a_directory_does() {
    let home = tempfile::tempdir().unwrap();
    let (server, store) = (member(&home.path().join("data"), true).await, Store::start());
    let expected = content(server.client().range(all()).await.unwrap());
    // Something else is there, too.
    for other in ["some/prefix/quorate-notes.txt", "some/prefix/deeper/quorate-20261123T044012.345Z-r900.backup", "some/prefixes"] {
        store.put(other, b"something else");
    }
    store.put("some/prefix/quorate-20201123T044012.345Z-r8.backup", b"");
    store.put("some/prefix/quorate-20201123T044012.345Z-r9.backup", b"damaged long ago");
    let directory = home.path().join("directory");
    let configs =
        [told(&store, &[]), BackupConfig::new(&directory), BackupConfig::new(format!("file://{}", home.path().join("url").display()))];
    for mut config in configs {
        let is_store = config.dir == Path::new(&store.url());
        config.keep = 2;
        let backups = Backups::start(&server, config.clone()).unwrap();
        let mut made = Vec::new();
        for _ in 0..3 {
            made.push(backups.back_up().await.unwrap());
        }
        let newest = made[2].clone();
        assert_eq!((newest.revision, newest.cluster_id), (22, Some(server.cluster_id())));
        let mut listed = backups.status().await.unwrap().backups;
        // Who makes none sees the same, by the same options.
        assert_eq!(backup::list_with(&config.dir, &config.store_options).unwrap().backups, listed);
        let read = backup::list_verified_with(&config.dir, &config.store_options).unwrap().backups;
        let sound = read.iter().filter(|backup| backup.soundness == Soundness::Verified).map(|backup| &backup.name);
        assert_eq!(sound.collect::<Vec<_>>(), [&made[1].name, &made[2].name]);
        if is_store {
            for revision in [8, 9] {
                let damaged = listed.remove(0);
                assert_eq!((damaged.cluster_id, damaged.revision), (None, revision), "it is nobody's, and stays");
            }
            assert_eq!(store.uploads(), 0);
            assert_eq!(store.get(&format!("some/prefix/{}", newest.name)).map(|bytes| bytes.len() as u64), Some(newest.bytes));
        }
        assert_eq!(listed, made[1..]);
        assert_eq!(backups.status().await.unwrap().last_try.unwrap().outcome, Ok(newest.name.clone()));
        assert!(server.metrics().counters.backups.newest() > 0);
        backups.shutdown().await;
        // Who comes next knows.
        let again = unlocked(async || Backups::start(&server, config.clone())).await;
        assert_eq!(again.status().await.unwrap().last_try.unwrap().outcome, Ok(newest.name.clone()));
        again.shutdown().await;

        let at = home.path().join("restored");
        let mut options = RestoreOptions::new(&at);
        options.store_options = config.store_options.clone();
        let restored = unlocked(async || restore(&newest.path, &options)).await;
        assert_eq!((restored.from_cluster_id, restored.backup_revision), (server.cluster_id(), 22));
        let there = member_of(&at).await;
        assert!(content(there.client().range(all()).await.unwrap()) == expected);
        there.shutdown().await.unwrap();
        std::fs::remove_dir_all(&at).unwrap();
    }
    assert!(store.get("some/prefixes").is_some() && store.get("some/prefix/quorate-notes.txt").is_some());
    server.shutdown().await.unwrap();
}

async fn member_of(dir: &Path) -> Server {
    let mut config = Config::default();
    config.data_dir = Some(dir.to_owned());
    config.listen_client_urls.clear();
    config.listen_peer_urls.clear();
    unlocked(async || Server::start(config.clone()).await).await
}

/// Whatever the store does, the try fails with a word of it, leaves nothing, hinders nobody, and the next one succeeds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_costs_a_backup_and_no_more() {
    let home = tempfile::tempdir().unwrap();
    let (server, store) = (member(&home.path().join("data"), true).await, Store::start());
    let patient = Backups::start(&server, told(&store, &[])).unwrap();
    // Who is to see that nothing is answered; small requests are answered in that time on the busiest machine, one out of a few.
    let hasty = Backups::start(&server, told(&store, &[("aws_timeout", "1s")])).unwrap();
    let first = patient.back_up().await.unwrap();
    let before = store.objects();
    for (fault, word) in [
        (Fault::Away, "s3://bucket"),
        (Fault::Hang, "no answer within 1s"),
        (Fault::Cut(1000), "s3://bucket"),
        (Fault::Damage, "is damaged"),
        (Fault::Denied, "s3://bucket"),
    ] {
        let backups = if fault == Fault::Hang { &hasty } else { &patient };
        store.set(fault);
        let why = backups.back_up().await.unwrap_err();
        assert!(why.to_string().contains(word) && !why.to_string().contains(SECRET), "{fault:?}: {why}");
        assert_eq!(matches!(why, Error::Corrupt { .. }), fault == Fault::Damage, "{why:?}");
        server.client().put("meanwhile", "1").await.unwrap();
        store.set(Fault::None);
        // Nothing under any name, and no parts without one. What was being answered when it failed may take a moment.
        until("nothing is left", async || store.objects() == before && store.uploads() == 0).await;
        assert_eq!(backups.status().await.unwrap().last_try.unwrap().outcome, Err(why.to_string()));
    }
    assert_eq!((server.metrics().counters.backups.made.get(), server.metrics().counters.backups.failed.get()), (1, 5));
    // A connection that is lost now and then is made up for, on the way there and back.
    store.set(Fault::Cut(2));
    let second = patient.back_up().await.unwrap();
    // Who has not read how it begins does so now.
    store.set(Fault::Cut(1));
    assert_eq!(hasty.status().await.unwrap().backups, [first.clone(), second.clone()]);
    assert_eq!(patient.status().await.unwrap().backups, [first.clone(), second.clone()]);
    // What cannot be read is listed, and of nobody; who is refused altogether says so, and nothing of what was sent.
    store.set(Fault::Denied);
    let late = Backups::start(&server, told(&store, &[])).unwrap();
    let why = late.status().await.unwrap_err().to_string();
    assert!(why.contains("SignatureDoesNotMatch") && !why.contains(SECRET), "{why}");
    store.set(Fault::Frozen);
    let there = late.status().await.unwrap().backups;
    assert_eq!(
        there.iter().map(|backup| (backup.name.as_str(), backup.cluster_id)).collect::<Vec<_>>(),
        [(first.name.as_str(), None), (&second.name, None)]
    );
    store.set(Fault::None);
    assert_eq!(late.status().await.unwrap().backups, [first, second]);
    late.shutdown().await;
    patient.shutdown().await;
    hasty.shutdown().await;
    server.shutdown().await.unwrap();
}

/// A store that hangs is not waited for by who stops; what was begun there is given up when it answers again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_wait_for_a_store() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::start();
    let (peer, client) = (ports::free_port(), ports::free_port());
    let mut config = EmbedConfig::default();
    config.advertise_ip = Some([127, 0, 0, 1].into());
    (config.peer_port, config.client_port) = (peer, client);
    config.join = vec![format!("127.0.0.1:{peer}")];
    config.data_dir = home.path().join("node");
    config.backup = Some(told(&store, &[("aws_timeout", NEVER)]));
    store.set(Fault::Hang);
    let node = Node::start(config.clone()).await.unwrap();
    let mut availability = node.availability();
    let ready = tokio::time::timeout(PATIENCE, availability.wait_for(|now| now.access == Access::ReadWrite)).await;
    assert!(ready.is_ok());
    {
        let mut made = std::pin::pin!(node.back_up());
        let hangs = until("the store is asked", async || store.requests().contains(&"HEAD some/prefix/last-try".into()));
        tokio::select! {
            made = &mut made => panic!("{made:?}"),
            () = hangs => {}
        }
    }
    node.client().put("volumes/a", "3 replicas").await.unwrap();
    // In its time, which is far shorter than that of a request, and without having cut off anything.
    node.shutdown_within(PATIENCE).await.unwrap();

    // The same node with the store back; and from there into another cluster.
    store.set(Fault::None);
    let node = unlocked(async || Node::start(config.clone()).await).await;
    let mut made = None;
    until("a backup", async || {
        made = node.back_up().await.ok();
        made.is_some()
    })
    .await;
    let made = made.unwrap();
    assert!(node.backups().await.unwrap().backups.contains(&made) && node.health_json()["backups"]["newestAt"].is_u64());
    let before = node.cluster_id();
    node.shutdown().await.unwrap();
    let restored = unlocked(async || quorate::embed::restore(&made.path, &config, backup::BUMP_REVISION)).await;
    assert_eq!(Some(restored.server.from_cluster_id), made.cluster_id);
    let node = unlocked(async || Node::start(config.clone()).await).await;
    assert_ne!(node.cluster_id(), before);
    until("what was there", async || node.client().get("volumes/a").await.is_ok_and(|found| found.is_some())).await;
    // It sees what the lost one has left, and has none of its own.
    let status = node.backups().await.unwrap();
    assert_eq!(status.backups, [made]);
    assert!(node.health_json()["backups"]["newestAt"].is_null(), "{}", node.health_json());
    let own = node.back_up().await.unwrap();
    assert!(own.cluster_id.is_some() && own.cluster_id != status.backups[0].cluster_id);
    node.shutdown().await.unwrap();
}

/// Whoever stops in the midst of an upload, or drops all that has to do with it, leaves no parts at a store that answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_the_midst_of_an_upload_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (server, store) = (member(&home.path().join("data"), true).await, Store::start());
    store.set(Fault::HangParts);
    for is_dropped in [false, true] {
        let backups = Backups::start(&server, told(&store, &[("aws_timeout", NEVER)])).unwrap();
        {
            let mut made = std::pin::pin!(backups.back_up());
            tokio::select! {
                made = &mut made => panic!("{made:?}"),
                () = until("a part is sent", async || store.uploads() == 1 && store.hanging() > 0) => {}
            }
        }
        if is_dropped {
            drop(backups);
            until("it is given up", async || store.uploads() == 0).await;
        } else {
            backups.shutdown().await;
            assert_eq!(store.uploads(), 0);
        }
        store.set(Fault::HangParts);
        assert!(!store.objects().iter().any(|name| name.ends_with(".backup")));
    }
    server.shutdown().await.unwrap();
}

fn quorate(store: &Store, args: &[&str]) -> (i32, String, String) {
    let mut binary = Command::new(env!("CARGO_BIN_EXE_quorate"));
    binary.args(args).env_clear().stdin(Stdio::null());
    for (name, value) in store.options() {
        binary.env(name.to_ascii_uppercase(), value);
    }
    let Output { status, stdout, stderr } = binary.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// From a shell, with the store's own variables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_saves_lists_and_restores_at_a_store() {
    let home = tempfile::tempdir().unwrap();
    let (server, store) = (member(&home.path().join("data"), false).await, Store::start());
    let (at, url) = (format!("http://{}", server.client_addrs()[0]), store.url());
    let mut paths = Vec::new();
    for _ in 0..2 {
        let (code, made, why) = quorate(&store, &["backup", "save", &url, "--endpoints", &at]);
        assert_eq!((code, why.as_str()), (0, ""));
        paths.push(made.trim_end().to_owned());
    }
    assert!(paths[0].starts_with(&url) && paths[0] != paths[1]);
    let cluster = format!("{:x}", server.cluster_id());
    let (code, table, why) = quorate(&store, &["backup", "list", &url]);
    let line = |table: &str| {
        table.lines().filter(|line| line.contains(&format!("cluster {cluster}  revision 2")) && line.ends_with("verified")).count()
    };
    assert_eq!((code, line(&table), why.as_str()), (0, 2, ""), "{table}");
    let (_, json, _) = quorate(&store, &["backup", "list", &url, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["backups"][1]["cluster"], &json["backups"][1]["path"]), (&cluster.clone().into(), &paths[1].clone().into()));
    let elsewhere = home.path().join("elsewhere");
    let (code, said, why) = quorate(&store, &["restore", &paths[1], "--data-dir", elsewhere.to_str().unwrap()]);
    assert!(code == 0 && said.contains("at revision 1000000002 with 1 keys"), "{said}{why}");

    // Damaged later.
    let name = paths[0].strip_prefix("s3://bucket/").unwrap();
    let mut bytes = store.get(name).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    store.put(name, &bytes);
    let (code, table, _) = quorate(&store, &["backup", "list", &url]);
    assert!(code == 1 && table.contains("DAMAGED") && line(&table) == 1, "{table}");
    let another = home.path().join("another");
    let (code, _, why) = quorate(&store, &["restore", &paths[0], "--data-dir", another.to_str().unwrap()]);
    assert!(code == 1 && why.contains("is damaged") && !another.exists(), "{why}");
    let listing = {
        let (code, _, why) = quorate(&store, &["backup", "list", "s3://key:hunter2@bucket"]);
        (code, why)
    };
    let (code, _, why) = quorate(&store, &["restore", "s3://bucket", "--data-dir", another.to_str().unwrap()]);
    assert!(code == 1 && why.contains("s3://bucket is where backups may be, and none of them"), "{why}");
    assert!(listing.0 == 1 && listing.1.contains("without a user") && !listing.1.contains("hunter2"), "{listing:?}");
    store.set(Fault::Away);
    let (code, _, why) = quorate(&store, &["backup", "save", &url, "--endpoints", &at]);
    assert!(code == 1 && why.contains(&url) && !why.contains(SECRET), "{why}");
    assert!(matches!(backup::list(home.path().join("none")), Err(Error::Io { .. })));
    assert_eq!(backup::list_verified(home.path()).unwrap().backups.iter().filter(|one| one.soundness != Soundness::Verified).count(), 0);
    server.shutdown().await.unwrap();
}
