//! Backups from outside: made under load, on a schedule and on a full disk, restored elsewhere, and compared.
//!
//! `QUORATE_BACKUP_ROUNDS` says how many rounds of backup, kill and restore there are (default 3).
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quorate::backup::{self, BackupConfig, Backups, RestoreOptions, Soundness, restore};
use quorate::client::WatchMessage;
use quorate::config::ClusterState;
use quorate::proto::etcdserverpb::cluster_client::ClusterClient;
use quorate::proto::etcdserverpb::{MemberAddRequest, PutRequest, RangeRequest, RangeResponse, WatchCreateRequest};
use quorate::{Client, Config, Error, ErrorKind, Server};

use common::ports::free_port;
use common::{Kind, Process};

mod common;
#[allow(dead_code, reason = "the crash tests use the rest")]
#[path = "crash/disk.rs"]
mod disk;

/// What anything here may take. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the revision is bumped by where it is.
const BUMP: u64 = 1_000_000;

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A member that is alone, in this process and without a socket.
fn alone(dir: &Path) -> Config {
    let mut config = Config::default();
    config.data_dir = Some(dir.to_owned());
    config.listen_client_urls.clear();
    config.listen_peer_urls.clear();
    config
}

fn options(dir: &Path, bump: u64) -> RestoreOptions {
    let mut options = RestoreOptions::new(dir);
    options.bump_revision = bump;
    options.mark_compacted = bump > 0;
    options
}

fn all(revision: i64) -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, ..Default::default() }
}

/// Everything about the keys but who has answered.
fn content(answer: RangeResponse) -> Vec<quorate::proto::KeyValue> {
    answer.kvs.iter().map(|kv| kv.decode().unwrap()).collect()
}

/// Everything below a directory, by name.
fn files(dir: &Path) -> Vec<String> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    files
}

/// Clients that write as fast as they can, until they are stopped or nobody answers any more.
struct Load {
    stop: Arc<AtomicBool>,
    /// The newest revision that was acknowledged, and how many writes were.
    revision: Arc<AtomicI64>,
    writes: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(client: &Client, writers: u64) -> Load {
        let load = Load { stop: Arc::default(), revision: Arc::default(), writes: Arc::default(), tasks: Vec::new() };
        let tasks = (0..writers).map(|writer| {
            let (client, stop, revision, writes) = (client.clone(), load.stop.clone(), load.revision.clone(), load.writes.clone());
            tokio::spawn(async move {
                let lease = client.lease_grant(0, 3600).await.map_or(0, |lease| lease.id);
                for count in writer.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = format!("k/{:03}", count * 7919 % 211);
                    let header = if count % 9 == 8 {
                        let request = quorate::proto::etcdserverpb::DeleteRangeRequest { key: key.into(), ..Default::default() };
                        client.delete_with(request).await.map(|answer| answer.header)
                    } else {
                        let value = vec![b'a' + (count % 26) as u8; 50 + (count as usize * 37) % 3000];
                        let lease = if count % 5 == 0 { lease } else { 0 };
                        client
                            .put_with(PutRequest { key: key.into(), value: value.into(), lease, ..Default::default() })
                            .await
                            .map(|it| it.header)
                    };
                    let Ok(Some(header)) = header else { return };
                    revision.fetch_max(header.revision, Ordering::SeqCst);
                    writes.fetch_add(1, Ordering::SeqCst);
                }
            })
        });
        let tasks = tasks.collect();
        Load { tasks, ..load }
    }

    fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

fn remote(member: &Process) -> Client {
    Client::remote(vec![member.url().parse().unwrap()], Default::default()).unwrap()
}

fn subject() -> Kind {
    Kind::Quorate(env!("CARGO_BIN_EXE_quorate").into())
}

/// Round after round: load, a backup in the middle of it, a kill with another backup under way, a restore elsewhere, everything compared.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_is_what_was_backed_up() {
    let rounds: u64 = std::env::var("QUORATE_BACKUP_ROUNDS").map_or(3, |text| text.parse().unwrap());
    let mut member = Process::start(subject(), &[]).await;
    let home = tempfile::tempdir().unwrap();
    let (mut writes, mut bytes, mut keys, mut cut_off, mut bumped) = (0, 0, 0, 0, 0);
    for round in 0..rounds {
        let client = remote(&member);
        let dir = home.path().join("backups");
        let mut config = BackupConfig::new(&dir);
        config.keep = 2;
        let backups = Arc::new(Backups::of(client.clone(), config).unwrap());
        let load = Load::start(&client, 4);
        until("the load", async || load.writes() >= 100).await;
        let acknowledged = load.revision.load(Ordering::SeqCst);
        let made = backups.back_up().await.unwrap();
        assert!(made.revision >= acknowledged, "round {round}: revision {} of {acknowledged}", made.revision);
        let seen = load.writes();
        until("the load after the backup", async || load.writes() > seen).await;
        // Another one is under way when the member is killed, in two of three rounds.
        let another = if round % 3 != 0 {
            let backups = backups.clone();
            let another = tokio::spawn(async move { backups.back_up().await });
            tokio::time::sleep(Duration::from_millis(round * 7 % 40)).await;
            Some(another)
        } else {
            None
        };
        member.kill();
        writes += load.writes();
        load.end().await;
        if let Some(another) = another {
            match another.await.unwrap() {
                Ok(later) => assert!(later.revision >= made.revision),
                Err(err) => {
                    assert!(matches!(err.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown), "{err}");
                    cut_off += 1;
                }
            }
        }
        Arc::into_inner(backups).unwrap().shutdown().await;
        let listing = backup::list_verified(&dir).unwrap();
        assert!(listing.backups.iter().all(|backup| backup.soundness == Soundness::Verified), "{listing:?}");
        assert!(listing.backups.iter().any(|backup| backup.name == made.name) && listing.backups.len() <= 2);
        assert!(files(&dir).iter().all(|name| name.ends_with(".backup") || name == "LOCK" || name == "last-try"), "{:?}", files(&dir));

        member.restart().await;
        let client = remote(&member);
        let expected = content(client.range(all(made.revision)).await.unwrap());
        let hash = client.hash_kv(made.revision).await.unwrap();
        bytes += made.bytes;
        keys += expected.len();

        // As it was: the same hash, the same revision.
        let at = home.path().join("restored");
        let restored = restore(&made.path, &options(&at, 0)).unwrap();
        assert_eq!((restored.backup_revision, restored.revision, restored.aside.as_deref()), (made.revision, made.revision, None));
        let server = Server::start(alone(&at)).await.unwrap();
        let there = server.client();
        assert_eq!(there.revision(), made.revision);
        let found = there.hash_kv(0).await.unwrap();
        assert_eq!(
            (found.hash, found.hash_revision, found.compact_revision),
            (hash.hash, made.revision, hash.compact_revision),
            "round {round}"
        );
        assert!(content(there.range(all(0)).await.unwrap()) == expected, "round {round}: the contents differ");
        let leases: std::collections::BTreeSet<i64> = expected.iter().map(|kv| kv.lease).filter(|lease| *lease != 0).collect();
        let known = there.leases().await.unwrap();
        assert!(leases.iter().all(|lease| known.contains(lease)), "round {round}: leases are missing");
        assert_eq!(there.put("after", "1").await.unwrap().header.unwrap().revision, made.revision + 1);
        server.shutdown().await.unwrap();

        // And with a higher revision, in the place of what is there.
        if round % 5 == 0 {
            bumped += 1;
            let again = restore(&made.path, &options(&at, BUMP)).unwrap();
            assert_ne!(again.cluster_id, restored.cluster_id);
            let revision = made.revision + BUMP as i64;
            assert_eq!((again.revision, again.aside.is_some()), (revision, true));
            let server = Server::start(alone(&at)).await.unwrap();
            let there = server.client();
            assert_eq!((there.revision(), server.cluster_id()), (revision, again.cluster_id));
            assert!(content(there.range(all(0)).await.unwrap()) == expected, "round {round}: the contents differ");
            let from =
                WatchCreateRequest { key: "k/".into(), range_end: "k0".into(), start_revision: made.revision + 1, ..Default::default() };
            let mut watcher = there.watch(from).unwrap();
            assert_eq!(watcher.next().await.unwrap().unwrap(), WatchMessage::Compacted { revision });
            assert_eq!(there.put("after", "1").await.unwrap().header.unwrap().revision, revision + 1);
            server.shutdown().await.unwrap();
        }
        std::fs::remove_dir_all(&at).unwrap();
        if round % 4 == 3 {
            client.compact(made.revision).await.unwrap();
        }
    }
    member.kill();
    println!(
        "{rounds} rounds: {writes} writes acknowledged, {bytes} bytes of backups, {keys} keys compared, {cut_off} backups cut off by a kill, \
         {bumped} restores with a higher revision: all equal"
    );
}

#[tokio::test]
async fn a_schedule_makes_backups_and_forgets_them() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(alone(&home.path().join("data"))).await.unwrap();
    server.client().put("a", "1").await.unwrap();
    let dir = home.path().join("backups");
    let mut config = BackupConfig::new(&dir);
    config.schedule = Some("* * * * * *".into());
    config.jitter = Duration::from_millis(200);
    config.keep = 2;
    let backups = Backups::start(&server, config.clone()).unwrap();
    assert!(matches!(Backups::start(&server, config.clone()), Err(Error::Locked { .. })));
    let counters = server.metrics().counters.clone();
    until("four scheduled backups", async || counters.backups.made.get() >= 4).await;
    let status = backups.status().await.unwrap();
    assert!(status.next.is_some() && status.last_try.unwrap().outcome.is_ok());
    // Both wait their turn.
    let (one, two) = tokio::join!(backups.back_up(), backups.back_up());
    assert_ne!(one.unwrap().name, two.unwrap().name);
    backups.shutdown().await;
    let text = server.metrics().text();
    for metric in ["quorate_backups_made_total", "quorate_backups_failed_total 0", "quorate_backup_newest_age_seconds"] {
        assert!(text.contains(metric), "{metric} in {text}");
    }
    assert!(counters.backups.newest() > 0);
    let listing = backup::list_verified(&dir).unwrap();
    assert_eq!(
        listing.backups.iter().map(|backup| (backup.revision, &backup.soundness)).collect::<Vec<_>>(),
        [(2, &Soundness::Verified); 2]
    );
    // Who comes next knows what there is.
    let again = Backups::start(&server, config).unwrap();
    assert_eq!(again.status().await.unwrap().last_try, listing.last_try);
    server.shutdown().await.unwrap();
    assert!(matches!(again.back_up().await, Err(Error::Stopped)));
    again.shutdown().await;
}

/// Takes all space that is left, in a file.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
}

#[tokio::test]
async fn a_full_disk_costs_a_backup_and_no_more() {
    let home = tempfile::tempdir().unwrap();
    let small = match disk::small_disk(&home.path().join("disk"), 8 << 20) {
        Ok(small) => small,
        Err(why) => {
            println!("skipped: {why}");
            return assert!(!common::on_ci(), "with CI=true nothing may be skipped: {why}");
        }
    };
    let server = Server::start(alone(&home.path().join("data"))).await.unwrap();
    let client = server.client();
    for number in 0..3_u8 {
        client.put(format!("large/{number}"), vec![number; 700 << 10]).await.unwrap();
    }
    let dir = small.path.join("backups");
    let mut config = BackupConfig::new(&dir);
    config.keep = 2;
    let backups = Backups::start(&server, config.clone()).unwrap();
    let first = backups.back_up().await.unwrap();

    // On demand: refused by name, and nothing is left of it.
    let ballast = small.path.join("ballast");
    fill(&ballast);
    let err = backups.back_up().await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
    assert!(err.to_string().contains("unfinished"), "{err}");
    let status = backups.status().await.unwrap();
    assert_eq!(status.backups, std::slice::from_ref(&first));
    assert_eq!(status.last_try.unwrap().outcome, Err(err.to_string()));
    assert_eq!(files(&dir), ["LOCK".to_owned(), "last-try".to_owned(), first.name.clone()]);
    // Also on disk, for whoever asks the binary.
    assert_eq!(backup::list(&dir).unwrap().last_try.unwrap().outcome, Err(err.to_string()));
    backups.shutdown().await;

    // On a schedule: tried again and again, until there is space.
    config.schedule = Some("* * * * * *".into());
    config.jitter = Duration::ZERO;
    let backups = Backups::start(&server, config).unwrap();
    let counters = server.metrics().counters.clone();
    until("two scheduled backups have failed", async || counters.backups.failed.get() >= 3).await;
    assert_eq!((counters.backups.made.get(), backups.status().await.unwrap().backups), (1, vec![first.clone()]));
    assert!(client.put("meanwhile", "1").await.is_ok());
    std::fs::remove_file(&ballast).unwrap();
    until("a backup with space again", async || counters.backups.made.get() >= 2).await;
    backups.shutdown().await;
    let listing = backup::list_verified(&dir).unwrap();
    let newest = listing.backups.last().unwrap();
    assert_eq!((&newest.soundness, newest.revision), (&Soundness::Verified, client.revision()));
    server.shutdown().await.unwrap();
}

fn quorate(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_quorate")).args(args).env_clear().stdin(Stdio::null()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_binary_saves_lists_and_restores() {
    let mut member = Process::start(subject(), &[]).await;
    remote(&member).put("a", "1").await.unwrap();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("backups");
    let (dir, data) = (dir.to_str().unwrap(), member.data_dir());
    let data = data.to_str().unwrap();

    let (code, made, stderr) = quorate(&["backup", "save", dir, "--endpoints", &member.url()]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let made = PathBuf::from(made.trim_end());
    let (code, table, _) = quorate(&["backup", "list", dir]);
    assert!(code == 0 && table.contains("revision 2") && table.contains("verified\n") && table.contains("last try: "), "{table}");
    let (code, json, _) = quorate(&["backup", "list", "--json", "--no-verify", dir]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["backups"][0]["revision"]), (0, &serde_json::json!(2)));
    let path = made.to_str().unwrap();

    // A member that runs is left alone.
    let name = member.name.clone();
    let urls = format!("http://127.0.0.1:{}", member.peer_port);
    let cluster = format!("{name}={urls}");
    let args =
        ["restore", path, "--data-dir", data, "--name", &name, "--initial-cluster", &cluster, "--initial-advertise-peer-urls", &urls];
    let (code, _, stderr) = quorate(&args);
    assert!(code == 1 && stderr.contains("in use"), "{stderr}");
    remote(&member).put("b", "2").await.unwrap();
    member.kill();
    let (code, stdout, stderr) = quorate(&args);
    assert!(code == 0 && stdout.contains("at revision 1000000002 with 1 keys") && stdout.contains("warning: "), "{stdout}{stderr}");
    let aside = stdout.lines().find_map(|line| line.strip_prefix("what was there is kept in ")).unwrap().to_owned();
    member.restart().await;
    let client = remote(&member);
    assert_eq!((client.get("a").await.unwrap().unwrap().mod_revision, client.get("b").await.unwrap()), (2, None));
    assert_eq!(client.put("c", "3").await.unwrap().header.unwrap().revision, 1_000_000_003);
    member.kill();
    // What was kept aside is a data directory as it was.
    let mut config = alone(Path::new(&aside));
    config.name = name;
    let server = Server::start(config).await.unwrap();
    assert!(server.client().get("b").await.unwrap().is_some());
    server.shutdown().await.unwrap();

    let mut bytes = std::fs::read(&made).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&made, bytes).unwrap();
    let (code, table, _) = quorate(&["backup", "list", dir]);
    assert!(code == 1 && table.contains("DAMAGED"), "{table}");
    let elsewhere = home.path().join("elsewhere");
    let (code, _, stderr) = quorate(&["restore", path, "--data-dir", elsewhere.to_str().unwrap()]);
    assert!(code == 1 && stderr.contains("is damaged") && !elsewhere.exists(), "{stderr}");
}

/// Wherever it was cut off, a restore can be tried again; what fails leaves what was there.
#[tokio::test]
async fn a_restore_changes_nothing_before_its_end() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let server = Server::start(alone(&data)).await.unwrap();
    server.client().put("a", "1").await.unwrap();
    let backups = Backups::start(&server, BackupConfig::new(home.path().join("backups"))).unwrap();
    let made = backups.back_up().await.unwrap();
    assert!(matches!(restore(&made.path, &options(&data, 0)), Err(Error::Locked { .. })));
    server.client().put("b", "1").await.unwrap();
    backups.shutdown().await;
    server.shutdown().await.unwrap();

    assert!(matches!(restore(&made.path, &options(&data, u64::MAX)), Err(Error::Config(_))));
    assert!(matches!(restore(home.path().join("none"), &options(&data, 0)), Err(Error::Io { .. })));
    // One that died left this behind.
    std::fs::create_dir_all(data.join("restoring/member/state")).unwrap();
    std::fs::write(data.join("restoring/member/identity"), "half of it").unwrap();
    assert_eq!(files(&data), ["member", "restoring"]);
    let restored = restore(&made.path, &options(&data, 0)).unwrap();
    let aside = restored.aside.unwrap();
    assert_eq!(files(&data), ["member", aside.file_name().unwrap().to_str().unwrap()]);
    assert_eq!(files(&aside), ["member"]);
    let server = Server::start(alone(&data)).await.unwrap();
    assert_eq!((server.cluster_id(), server.member_id()), (restored.cluster_id, restored.member_id));
    assert!(server.client().get("a").await.unwrap().is_some() && server.client().get("b").await.unwrap().is_none());
    server.shutdown().await.unwrap();
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn of_several(dir: &Path, name: &str, port: u16, cluster: &str) -> Config {
    let mut config = Config::default();
    config.name = name.into();
    config.data_dir = Some(dir.join(name));
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![url(port).parse().unwrap()];
    config.initial_advertise_peer_urls = config.listen_peer_urls.clone();
    config.initial_cluster = cluster.into();
    config
}

/// Three members, each from the same file, are one cluster; and who joins it later has what came from the backup.
#[tokio::test(flavor = "multi_thread")]
async fn three_members_are_restored_and_a_fourth_joins_them() {
    let home = tempfile::tempdir().unwrap();
    let source = Server::start(alone(&home.path().join("source"))).await.unwrap();
    for number in 0..200 {
        source.client().put(format!("k/{number}"), vec![b'v'; 1000]).await.unwrap();
    }
    let backups = Backups::start(&source, BackupConfig::new(home.path().join("backups"))).unwrap();
    let made = backups.back_up().await.unwrap();
    backups.shutdown().await;
    let expected = content(source.client().range(all(0)).await.unwrap());
    let old_cluster = source.cluster_id();
    source.shutdown().await.unwrap();

    let names = ["a", "b", "c", "d"];
    let ports = names.map(|_| free_port());
    let list = |many: usize| (0..many).map(|at| format!("{}={}", names[at], url(ports[at]))).collect::<Vec<_>>().join(",");
    let mut servers = Vec::new();
    let mut clusters = std::collections::BTreeSet::new();
    for at in 0..3 {
        let mut options = options(&home.path().join(names[at]), BUMP);
        options.name = names[at].into();
        options.initial_cluster = list(3);
        options.initial_advertise_peer_urls = vec![url(ports[at]).parse().unwrap()];
        clusters.insert(restore(&made.path, &options).unwrap().cluster_id);
    }
    assert!(clusters.len() == 1 && !clusters.contains(&old_cluster));
    for at in 0..3 {
        servers.push(Server::start(of_several(home.path(), names[at], ports[at], &list(3))).await.unwrap());
    }
    let writer = servers[1].client();
    until("a write", async || writer.put("after", "1").await.is_ok()).await;

    let at = format!("http://{}", servers[0].client_addrs()[0]);
    let mut cluster = ClusterClient::new(tonic::transport::Endpoint::from_shared(at).unwrap().connect().await.unwrap());
    let add = MemberAddRequest { peer_urls: vec![url(ports[3])], is_learner: false };
    until("a fourth is added", async || cluster.member_add(add.clone()).await.is_ok()).await;
    let mut config = of_several(home.path(), "d", ports[3], &list(4));
    config.initial_cluster_state = ClusterState::Existing;
    servers.push(Server::start(config).await.unwrap());
    for server in &servers {
        let client = server.client();
        let here = || RangeRequest { serializable: true, ..all(0) };
        until("everything is there", async || client.range(here()).await.is_ok_and(|answer| answer.kvs.len() == expected.len() + 1)).await;
        let found = content(client.range(here()).await.unwrap());
        assert!(found.iter().filter(|kv| kv.key != "after").eq(&expected), "{}", server.member_id());
        assert!(client.revision() > made.revision + BUMP as i64);
    }
    for server in servers {
        server.shutdown().await.unwrap();
    }
}
