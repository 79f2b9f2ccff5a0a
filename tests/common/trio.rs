//! Three members as processes that know each other, of quorate or of etcd, with the same flags.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Clients, Kind, endpoint, pb, ports::free_port, tail};

pub const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a cluster may take to come to something. A test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Three members, running or not. Dropped, they are killed, and say how they ended if the test has failed.
pub struct Trio {
    pub kind: Kind,
    pub client_ports: [u16; 3],
    pub peer_ports: [u16; 3],
    dir: tempfile::TempDir,
    children: Vec<(String, Child)>,
}

impl Trio {
    /// Starts three fresh members, and waits until each of them answers.
    pub async fn start(kind: Kind) -> Trio {
        let ports = || [(); 3].map(|()| free_port());
        let dir = tempfile::Builder::new().prefix("quorate-trio-").tempdir().expect("a temporary directory");
        let mut trio = Trio { kind, client_ports: ports(), peer_ports: ports(), dir, children: Vec::new() };
        (0..3).for_each(|at| trio.spawn(at, &[]));
        for at in 0..3 {
            trio.until("an answer", async |trio| trio.answers(at).await).await;
        }
        trio
    }

    /// Starts one of the three, with flags that go before the usual ones of the same name.
    pub fn spawn(&mut self, at: usize, flags: &[&str]) {
        let (client, peer) = (self.client_ports[at], self.peer_ports[at]);
        self.spawn_other(NAMES[at], client, peer, flags);
    }

    /// Starts a member at these ports.
    pub fn spawn_other(&mut self, name: &str, client: u16, peer: u16, flags: &[&str]) {
        let log = File::options().create(true).append(true).open(self.log_path(name)).expect("the log file opens");
        let all: Vec<String> = (0..3).map(|at| format!("{}={}", NAMES[at], url(self.peer_ports[at]))).collect();
        let mut command = Command::new(self.kind.program());
        command
            .env_clear()
            .args(["--name", name, "--data-dir"])
            .arg(self.data_dir(name))
            .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &all.join(",")])
            .args(flags);
        let err = log.try_clone().expect("a second handle of the log");
        let child = command.stdin(Stdio::null()).stdout(log).stderr(err).spawn();
        let child = child.unwrap_or_else(|e| panic!("{}: {e}", self.kind.program().display()));
        self.children.push((name.to_owned(), child));
    }

    pub fn kill(&mut self, name: &str) {
        let at = self.children.iter().position(|(other, _)| other == name).expect("it runs");
        let (_, mut child) = self.children.remove(at);
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Whether a member has ended by itself.
    pub fn has_ended(&mut self, name: &str) -> bool {
        let (_, child) = self.children.iter_mut().find(|(other, _)| other == name).expect("it was started");
        child.try_wait().expect("waiting for a child works").is_some()
    }

    pub fn data_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    /// Everything that a member has printed.
    pub fn log(&self, name: &str) -> String {
        read(&self.log_path(name))
    }

    pub fn url(&self, at: usize) -> String {
        url(self.client_ports[at])
    }

    pub async fn clients(&self, at: usize) -> Clients {
        Clients::connect(&self.url(at)).await
    }

    /// Whether a member answers a linearizable read.
    pub async fn answers(&self, at: usize) -> bool {
        let Ok(channel) = endpoint(&self.url(at)).connect().await else { return false };
        let range = pb::RangeRequest { key: "a".into(), ..Default::default() };
        pb::kv_client::KvClient::new(channel).range(range).await.is_ok()
    }

    /// The id of a member, and of whom it holds for the leader; 0: nobody.
    pub async fn leader(&self, at: usize) -> (u64, u64) {
        let status = self.clients(at).await.maintenance.status(pb::StatusRequest {}).await.expect("a status").into_inner();
        (status.header.expect("a header").member_id, status.leader)
    }

    /// Waits for something.
    pub async fn until(&mut self, what: &str, mut is_so: impl AsyncFnMut(&mut Trio) -> bool) {
        let began = Instant::now();
        while !is_so(self).await {
            assert!(began.elapsed() < PATIENCE, "in vain: {what}");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

impl Drop for Trio {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for name in NAMES {
                eprintln!("---- {name} ({:?}); the end of its log:\n{}", self.kind, tail(&self.log(name)));
            }
        }
    }
}

pub fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
