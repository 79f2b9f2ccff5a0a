//! Locks and elections in the same queues as etcdctl's, on a quorate and on an etcd.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Store, common};

/// What etcdctl may take to come to something.
const PATIENCE: Duration = Duration::from_secs(60);

/// An etcdctl that runs until it is interrupted.
struct Etcdctl {
    child: Child,
    output: tempfile::NamedTempFile,
}

impl Etcdctl {
    fn start(program: &Path, url: &str, words: &[&str]) -> Etcdctl {
        let output = tempfile::NamedTempFile::new().unwrap();
        let child = Command::new(program)
            .env_clear()
            .arg(format!("--endpoints={url}"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(output.reopen().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Etcdctl { child, output }
    }

    fn printed(&self) -> Vec<String> {
        std::fs::read_to_string(self.output.path()).unwrap().lines().map(str::to_owned).collect()
    }

    async fn prints(&self, lines: usize) -> Vec<String> {
        let began = Instant::now();
        while self.printed().len() < lines {
            assert!(began.elapsed() < PATIENCE, "etcdctl has printed {:?}", self.printed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.printed()
    }

    /// As by Ctrl-C, which is ignored where this runs in the background of a shell: it gives up what it holds.
    fn interrupt(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Etcdctl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn shares_locks(store: &Store) {
    let Some(reference) = common::reference() else { return };
    let (client, url) = (&store.client, store.url());
    let session = client.session(60).await.unwrap();
    let lock = session.lock("l").await.unwrap();
    let other = Etcdctl::start(&reference.etcdctl, &url, &["lock", "l"]);
    while client.list("l/").await.unwrap().kvs.len() < 2 {}
    assert_eq!(other.printed(), [""; 0], "it waits");
    let mine = lock.revision();
    lock.unlock().await.unwrap();
    let key = other.prints(1).await[0].clone();
    assert!(session.try_lock("l").await.unwrap().is_none());
    let theirs = client.list("l/").await.unwrap().kvs;
    assert!(theirs.len() == 1 && theirs[0].key == key && theirs[0].create_revision > mine, "{theirs:?}, {key}");
    let (lock, ()) = futures_util::join!(session.lock("l"), async {
        while client.list("l/").await.unwrap().kvs.len() < 2 {}
        other.interrupt();
    });
    assert!(lock.unwrap().revision() > theirs[0].create_revision);
}

async fn shares_elections(store: &Store) {
    let Some(reference) = common::reference() else { return };
    let (client, url) = (&store.client, store.url());
    let mut observer = client.observe("e");
    let theirs = Etcdctl::start(&reference.etcdctl, &url, &["elect", "e", "etcdctl"]);
    let leader = observer.next().await.unwrap();
    let printed = theirs.prints(2).await;
    assert_eq!((printed[0].as_bytes(), printed[1].as_str(), &leader.value[..]), (&leader.key[..], "etcdctl", &b"etcdctl"[..]));
    let session = client.session(60).await.unwrap();
    let election = session.election("e");
    let (lead, ()) = futures_util::join!(election.campaign("ours"), async {
        while client.list("e/").await.unwrap().kvs.len() < 2 {}
        theirs.interrupt();
    });
    let lead = lead.unwrap();
    assert!(lead.revision() > leader.create_revision);
    assert_eq!(observer.next().await.unwrap().value, "ours");
    let listener = Etcdctl::start(&reference.etcdctl, &url, &["elect", "-l", "e"]);
    let printed = listener.prints(2).await;
    assert_eq!((printed[0].as_bytes(), printed[1].as_str()), (&lead.key()[..], "ours"));
    lead.proclaim("ours, still").await.unwrap();
    assert_eq!(listener.prints(4).await[3], "ours, still");
}

#[tokio::test]
async fn locks_are_shared_on_a_quorate() {
    Store::run(Store::remote().await, shares_locks).await;
}

#[tokio::test]
async fn locks_are_shared_on_an_etcd() {
    Store::run(Store::etcd().await, shares_locks).await;
}

#[tokio::test]
async fn elections_are_shared_on_a_quorate() {
    Store::run(Store::remote().await, shares_elections).await;
}

#[tokio::test]
async fn elections_are_shared_on_an_etcd() {
    Store::run(Store::etcd().await, shares_elections).await;
}
