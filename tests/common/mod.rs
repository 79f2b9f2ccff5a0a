//! What every integration test needs: member processes, clients for them, and a printed form of every answer.
//!
//! A test compares two members. One is always real etcd, the *reference*; the other is the *subject*. The reference
//! binaries are no part of this repository: `QUORATE_REFERENCE_DIR` names a directory that holds `etcd`, `etcdctl` and
//! `etcdutl` of release 3.5.30. Without it a test that needs them prints one line and passes, unless `CI` is `true`.
//!
//! ```no_run
//! let Some(reference) = common::reference() else { return };
//! let mut member = Process::start(Kind::Etcd(reference.etcd), &[]).await;
//! member.clients().kv.put(PutRequest { key: "a".into(), ..Default::default() }).await.unwrap();
//! member.kill();
//! member.restart().await; // the same data, the same ports
//! ```
//!
//! Members are killed by process id when they are dropped, and print the end of their log when the test failed.
//! For trying the tests out, `QUORATE_SUBJECT=etcd` makes the subject a second etcd; the two must then agree everywhere.

#![allow(dead_code)]

pub mod build;
pub mod generate;
pub mod pb;
pub mod ports;
pub mod raw;
pub mod render;
pub mod trio;
pub mod watch;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use ports::free_port;

/// How long a member may take until it answers its first call. Generous, because several members may start at once.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How often a start is tried again with other ports when somebody else took one of them.
const START_TRIES: u32 = 8;

/// How long any single call may take before the test gives up. Only a wedged member gets near it.
pub const CALL_LIMIT: Duration = Duration::from_secs(30);

/// The three binaries of the reference release.
#[derive(Clone)]
pub struct Reference {
    pub etcd: PathBuf,
    pub etcdctl: PathBuf,
    pub etcdutl: PathBuf,
}

/// The reference binaries, or `None` (after saying so) where they are not there and need not be.
///
/// # Panics
/// When they are missing and `CI` is `true`, or when the directory is set but does not hold them.
pub fn reference() -> Option<Reference> {
    let Some(dir) = std::env::var_os("QUORATE_REFERENCE_DIR") else {
        assert!(!on_ci(), "QUORATE_REFERENCE_DIR must be set when CI=true");
        println!("skipped: QUORATE_REFERENCE_DIR is not set");
        return None;
    };
    let find = |name: &str| {
        let path = Path::new(&dir).join(name);
        assert!(path.is_file(), "QUORATE_REFERENCE_DIR has no {name}: {}", path.display());
        path
    };
    Some(Reference { etcd: find("etcd"), etcdctl: find("etcdctl"), etcdutl: find("etcdutl") })
}

pub fn on_ci() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}

/// Which program a member runs. The flags that the tests pass are the same for both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Etcd(PathBuf),
    Quorate(PathBuf),
}

impl Kind {
    /// The program under test: the package's own binary, or one named by `QUORATE_BIN`; with `QUORATE_SUBJECT=etcd`, or
    /// where there is no such binary, a second etcd. `None` if there is none of them.
    pub fn subject(reference: Option<&Reference>) -> Option<Kind> {
        let etcd = || reference.map(|r| Kind::Etcd(r.etcd.clone()));
        if std::env::var("QUORATE_SUBJECT").is_ok_and(|v| v == "etcd") {
            return etcd();
        }
        if let Some(path) = std::env::var_os("QUORATE_BIN") {
            return Some(Kind::Quorate(path.into()));
        }
        option_env!("CARGO_BIN_EXE_quorate").map(|path| Kind::Quorate(path.into())).or_else(etcd)
    }

    pub fn is_etcd(&self) -> bool {
        matches!(self, Kind::Etcd(_))
    }

    pub fn program(&self) -> &Path {
        match self {
            Kind::Etcd(path) | Kind::Quorate(path) => path,
        }
    }
}

/// A running (or stopped) member of a cluster of one, with its own directory and ports.
pub struct Process {
    pub kind: Kind,
    /// Unique in the process and on the machine, so that an answer shows who gave it.
    pub name: String,
    pub client_port: u16,
    pub peer_port: u16,
    /// Where it listens in TLS as well, if it does.
    pub tls_port: u16,
    tls_flags: Vec<String>,
    flags: Vec<String>,
    dir: TempDir,
    child: Option<Child>,
}

impl Process {
    /// Starts a member with `flags` added to the usual ones and waits until it answers.
    pub async fn start(kind: Kind, flags: &[&str]) -> Process {
        Process::start_with_tls(kind, flags, None).await
    }

    /// The same, with a second port for clients: that one speaks TLS, with this certificate and key, and asks for certificates from this CA.
    pub async fn start_with_tls(kind: Kind, flags: &[&str], tls: Option<[&Path; 3]>) -> Process {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("m{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let flags = flags.iter().map(|f| f.to_string()).collect();
        let dir = tempfile::Builder::new().prefix("quorate-test-").tempdir().expect("a temporary directory");
        let tls_flags = tls.map(|[cert, key, ca]| {
            let flags = [("--cert-file", cert), ("--key-file", key), ("--trusted-ca-file", ca)];
            let flags = flags.into_iter().flat_map(|(name, path)| [name.to_owned(), path.display().to_string()]);
            flags.chain(["--client-cert-auth".to_owned()]).collect()
        });
        let tls_flags: Vec<String> = tls_flags.unwrap_or_default();
        let mut member = Process { kind, name, client_port: 0, peer_port: 0, tls_port: 0, tls_flags, flags, dir, child: None };
        member.launch(true).await;
        member
    }

    /// Starts a stopped member again, on the same data and the same ports.
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "restart of a member that still runs");
        self.launch(false).await;
    }

    /// Starts a stopped member again, if it can: false if it ends before it answers.
    pub async fn try_restart(&mut self) -> bool {
        self.spawn();
        self.wait_ready().await
    }

    /// Starts the process and waits for it. A port that somebody else got hold of in between is not a failure: the
    /// member is started again, on other ports if it has none of its own yet.
    async fn launch(&mut self, choose_ports: bool) {
        for _ in 0..START_TRIES {
            if choose_ports {
                (self.client_port, self.peer_port, self.tls_port) = (free_port(), free_port(), free_port());
                // A try that failed may have left a half-made directory with the old URLs in it.
                let _ = std::fs::remove_dir_all(self.data_dir());
            }
            let log_start = std::fs::metadata(self.log_path()).map_or(0, |m| m.len() as usize);
            self.spawn();
            if self.wait_ready().await {
                return;
            }
            let log = self.log();
            let this_try = log.get(log_start..).unwrap_or(&log);
            assert!(this_try.to_lowercase().contains("in use"), "{} did not start:\n{}", self.name, tail(this_try));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{}: no free ports after {START_TRIES} tries", self.name);
    }

    fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).expect("the log file opens");
        let (client, peer) = (self.url(), format!("http://127.0.0.1:{}", self.peer_port));
        let listen = if self.tls_flags.is_empty() { client.clone() } else { format!("{client},{}", self.tls_url()) };
        let mut command = Command::new(self.kind.program());
        command
            .env_clear()
            .args(["--name", &self.name, "--data-dir"])
            .arg(self.data_dir())
            .args(["--listen-client-urls", &listen, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("{}={peer}", self.name)])
            .args(&self.tls_flags)
            .args(&self.flags);
        if self.kind.is_etcd() {
            // Only speed: the reference is never the one whose durability is tested here.
            command.arg("--unsafe-no-fsync");
        }
        let err = log.try_clone().expect("a second handle of the log");
        let child = command.stdin(Stdio::null()).stdout(log).stderr(err).spawn();
        self.child = Some(child.unwrap_or_else(|e| panic!("{}: {e}", self.kind.program().display())));
    }

    /// Whether the member answers, by its name, before it exits. A stranger on the port has another name.
    async fn wait_ready(&mut self) -> bool {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            if self.exited().is_some() {
                self.child = None;
                return false;
            }
            if let Ok(channel) = endpoint(&self.url()).connect().await {
                let list = ClusterClient::new(channel.clone()).member_list(pb::MemberListRequest { linearizable: true }).await;
                let range = KvClient::new(channel).range(pb::RangeRequest { key: "a".into(), ..Default::default() }).await;
                if let (Ok(list), Ok(_)) = (list, range) {
                    return list.into_inner().members.iter().any(|m| m.name == self.name);
                }
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        panic!("{} does not answer after {START_LIMIT:?}:\n{}", self.name, tail(&self.log()));
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn tls_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.tls_port)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A directory beside the data for whatever the test writes, gone with the member.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Everything that the member has printed, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running member").id()
    }

    /// The exit status if the process has ended by itself.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("waiting for a child works")
    }

    /// Ends the process at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks the process to stop (SIGTERM) and waits for it.
    pub async fn stop(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("a running member");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalling a child works");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = child.try_wait().expect("waiting for a child works") {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} did not stop within {START_LIMIT:?}:\n{}", self.name, tail(&self.log()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Clients over one new connection.
    pub async fn clients(&self) -> Clients {
        Clients::connect(&self.url()).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let status = self.exited();
        self.kill();
        if std::thread::panicking() {
            let state = status.map_or("still running".to_owned(), |s| format!("{s}"));
            eprintln!("---- {} ({:?}), {state}; the end of its log:\n{}", self.name, self.kind, tail(&self.log()));
        }
    }
}

/// One client of each service, all over the same connection, without limits on the size of an answer.
#[derive(Clone)]
pub struct Clients {
    pub url: String,
    pub channel: Channel,
    pub kv: KvClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
}

impl Clients {
    pub async fn connect(url: &str) -> Clients {
        let channel = endpoint(url).connect().await.unwrap_or_else(|e| panic!("{url}: {e}"));
        Clients {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            cluster: ClusterClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            maintenance: MaintenanceClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            channel,
            url: url.to_owned(),
        }
    }
}

fn endpoint(url: &str) -> Endpoint {
    let endpoint = Endpoint::from_shared(url.to_owned()).expect("a member's URL is valid");
    endpoint.connect_timeout(Duration::from_secs(5)).timeout(CALL_LIMIT)
}

/// The end of a log, short enough to read.
fn tail(log: &str) -> String {
    const LINES: usize = 20;
    const WIDTH: usize = 250;
    let lines: Vec<String> = log.lines().map(|l| l.chars().take(WIDTH).collect()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
