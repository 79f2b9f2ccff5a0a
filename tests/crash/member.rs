//! A member as a process of its own: started with real flags, stopped in every way there is.
//!
//! Each member has a loopback address to itself (all of 127.0.0.0/8 is the machine's own), so that no other test can take its
//! ports between two starts, and its client URL stays the same.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::wire::Client;

/// How long a start or a stop may take before it counts as hanging.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long one request may take before its outcome counts as unknown. Above the 7 seconds after which a member gives up itself.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(20);

const CLIENT_PORT: u16 = 12379;
const PEER_PORT: u16 = 12380;

/// A program that can be a member.
#[derive(Clone, Debug)]
pub struct Program {
    pub path: PathBuf,
    pub is_etcd: bool,
}

/// The program under test: the package's own binary, or the one that `QUORATE_BIN` names; with `QUORATE_SUBJECT=etcd` the
/// reference, on which the tests themselves can be tried.
pub fn subject() -> Program {
    if std::env::var("QUORATE_SUBJECT").is_ok_and(|subject| subject == "etcd") {
        return reference().expect("QUORATE_REFERENCE_DIR for QUORATE_SUBJECT=etcd");
    }
    let path = std::env::var_os("QUORATE_BIN").map(PathBuf::from).or_else(|| option_env!("CARGO_BIN_EXE_quorate").map(PathBuf::from));
    Program { path: path.expect("QUORATE_BIN or the package's own binary"), is_etcd: false }
}

/// The reference: etcd 3.5.30 in the directory that `QUORATE_REFERENCE_DIR` names. `None` where it is not set.
pub fn reference() -> Option<Program> {
    let path = PathBuf::from(std::env::var_os("QUORATE_REFERENCE_DIR")?).join("etcd");
    assert!(path.is_file(), "QUORATE_REFERENCE_DIR holds no etcd: {}", path.display());
    Some(Program { path, is_etcd: true })
}

/// A temporary directory; kept when the test fails and `QUORATE_CRASH_KEEP` is set.
pub struct Home(Option<TempDir>);

impl Home {
    pub fn new(name: &str) -> Home {
        let dir = tempfile::Builder::new().prefix(&format!("quorate-crash-{name}-")).tempdir();
        Home(Some(dir.expect("a temporary directory")))
    }

    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("it is taken only on drop").path()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(dir) = self.0.take()
            && std::thread::panicking()
            && std::env::var_os("QUORATE_CRASH_KEEP").is_some()
        {
            eprintln!("kept: {}", dir.keep().display());
        }
    }
}

/// How a start ended that did not end with a member that serves.
#[derive(Debug)]
pub struct Refusal {
    pub status: ExitStatus,
    /// What it printed in this start.
    pub log: String,
}

/// An octet of an address, which no other member of this process has at the same time: some tests make hundreds, one after another.
#[derive(Debug)]
struct Place(u8);

static PLACES: Mutex<BTreeSet<u8>> = Mutex::new(BTreeSet::new());

impl Place {
    fn take() -> Place {
        // Not at once the one that was given back last.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mut taken = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        let next = || 1 + (NEXT.fetch_add(1, Ordering::Relaxed) % 250) as u8;
        let free = (0..250).map(|_| next()).find(|place| !taken.contains(place)).expect("fewer than 250 members at a time");
        taken.insert(free);
        Place(free)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        PLACES.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// A member, running or not. Dropped, its process is killed.
pub struct Member {
    pub program: Program,
    pub data: PathBuf,
    address: Ipv4Addr,
    #[allow(dead_code, reason = "kept for its drop")]
    place: Place,
    flags: Vec<String>,
    /// The log of the newest start, and of all starts before it.
    log: PathBuf,
    earlier: String,
    child: Option<Child>,
}

impl Member {
    /// A stopped member that keeps its data in `data`, and its log in `home`.
    pub fn new(program: &Program, home: &Path, data: &Path, flags: &[&str]) -> Member {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let place = Place::take();
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let flags = flags.iter().map(|flag| flag.to_string()).collect();
        Member {
            program: program.clone(),
            data: data.to_owned(),
            address: Ipv4Addr::new(127, place.0, high, low),
            place,
            flags,
            log: home.join(format!("log-{number}")),
            earlier: String::new(),
            child: None,
        }
    }

    /// Adds a flag for the starts to come; it goes before an earlier one of the same name.
    #[allow(dead_code, reason = "for the fault tests")]
    pub fn add_flag(&mut self, flag: &str) {
        self.flags.push(flag.to_owned());
    }

    pub fn client_url(&self) -> String {
        format!("http://{}:{CLIENT_PORT}", self.address)
    }

    /// Where it listens for its peers.
    pub fn peer_address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, PEER_PORT)
    }

    /// Starts the process, without waiting for anything.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = self.log();
        if self.earlier.len() + log.len() > 1 << 20 {
            self.earlier.clear();
        }
        self.earlier += &log;
        let log = File::create(&self.log).expect("a log file");
        let (client, peer) = (self.client_url(), format!("http://{}", self.peer_address()));
        let mut command = Command::new(&self.program.path);
        command.env_clear().stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        command.arg("--data-dir").arg(&self.data);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}")]).args(&self.flags);
        self.child = Some(command.spawn().unwrap_or_else(|err| panic!("{}: {err}", self.program.path.display())));
    }

    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// When it ends instead.
    ///
    /// # Panics
    /// When it does neither.
    pub async fn try_start(&mut self) -> Result<(), Refusal> {
        self.spawn();
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            if self.log().contains("ready to serve client requests") && self.answers().await {
                return Ok(());
            }
            if let Some(status) = self.exited() {
                self.child = None;
                return Err(Refusal { status, log: self.log() });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it neither serves nor ends within {LIMIT:?}:\n{}", tail(&self.log()));
    }

    /// Starts it, waits until it serves, and says how long that took.
    pub async fn start(&mut self) -> Duration {
        let begun = Instant::now();
        while let Err(refusal) = self.try_start().await {
            // Another program may have had the port for a moment, on all addresses.
            let is_taken = refusal.log.to_lowercase().contains("address already in use");
            assert!(is_taken && begun.elapsed() < LIMIT, "it did not start ({}):\n{}", refusal.status, tail(&refusal.log));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        begun.elapsed()
    }

    /// Whether a linearizable read is answered.
    pub async fn answers(&self) -> bool {
        let mut client = self.client();
        matches!(tokio::time::timeout(Duration::from_secs(5), client.read("none", 0)).await, Ok(Ok(_)))
    }

    /// A client with a connection of its own.
    pub fn client(&self) -> Client {
        Client::new(&self.client_url())
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("a running member"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("one may signal one's own child");
    }

    /// The status with which it has ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("one may wait for one's own child")
    }

    /// Kills it at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // An error says that it has ended already.
            let _ = child.kill();
            child.wait().expect("one may wait for one's own child");
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When it does not.
    pub async fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            if let Some(status) = self.exited() {
                self.child = None;
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it does not end within {LIMIT:?}:\n{}", tail(&self.log()));
    }

    /// Asks it to stop (SIGTERM) and waits.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait().await
    }

    /// What it has printed since its newest start.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// # Panics
    /// When it has panicked in its newest start, even if it went on afterwards.
    pub fn assert_calm(&self) {
        let log = self.log();
        assert!(self.program.is_etcd || !log.contains("panicked at"), "it panicked:\n{}", tail(&log));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let state = match self.exited() {
            Some(status) => status.to_string(),
            None if self.child.is_some() => "running".into(),
            None => "stopped".into(),
        };
        self.kill();
        if std::thread::panicking() {
            let path = self.program.path.display();
            eprintln!("---- {path}, {state}; the end of its log:\n{}", tail(&(std::mem::take(&mut self.earlier) + &self.log())));
        }
    }
}

/// The end of a log, short enough to read.
pub fn tail(log: &str) -> String {
    const LINES: usize = 30;
    const WIDTH: usize = 400;
    let lines: Vec<String> = log.lines().map(|line| line.chars().take(WIDTH).collect()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
