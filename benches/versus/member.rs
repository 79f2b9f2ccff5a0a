//! The two servers that are compared: starting, stopping and weighing them.
//!
//! A [`Cluster`] is one side of the comparison: one or three members of one program, started with etcd's flags on free loopback ports
//! with an empty directory each, or endpoints that somebody else runs. What it costs is read from `/proc`: CPU of all threads,
//! resident memory, bytes handed to the disk.
//!
//! Whatever was started ends with the harness: on drop, and on SIGINT and SIGTERM too (see [`end_with_signals`]).
//!
//! Caveats: what a server has written is what its disk has written, with all that was waiting: a machine that does anything else meanwhile
//! counts too much. (The kernel's count for a process, `write_bytes`, is taken only for servers that the harness has not started: it adds a
//! whole folio of the page cache, up to a megabyte, when one byte of it becomes dirty.) Both times have a grain of 10 ms.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quorate::proto::etcdserverpb::{StatusRequest, StatusResponse};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::machine::device_written;
use crate::requests::{RANGE, STATUS, Stamp};
use crate::wire::{Channel, Result, block_on};

/// Longest wait for a member's first answer; beyond it the start has failed. Restarts replay large data, so it is generous.
const START_LIMIT: Duration = Duration::from_secs(300);
/// Longest wait for a member that was asked to stop; beyond it it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a server that does not answer yet: the grain of the start time.
const POLL: Duration = Duration::from_millis(1);
/// The kernel counts CPU time in hundredths of a second towards programs, on every architecture that matters here.
const TICK_US: f64 = 10_000.0;
/// Space quota of every member. The default of 2 GiB would end the larger rows.
const QUOTA_BYTES: u64 = 16 << 30;
/// Lines of a member's log that are shown when it fails.
const LOG_LINES: usize = 15;

/// What was started and not yet ended, for the signals.
static LIVE: Mutex<(Vec<u32>, Vec<PathBuf>)> = Mutex::new((Vec::new(), Vec::new()));

fn live() -> MutexGuard<'static, (Vec<u32>, Vec<PathBuf>)> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On SIGINT and SIGTERM: kills the members, removes their directories and exits with 130.
pub fn end_with_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _within = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = signals.0.recv() => {}, _ = signals.1.recv() => {} }
        });
        // The lock is kept: nothing is to be started any more.
        let live = live();
        for pid in &live.0 {
            kill(*pid, Signal::KILL);
        }
        for dir in &live.1 {
            let _ = fs::remove_dir_all(dir);
        }
        eprintln!("versus: interrupted");
        std::process::exit(130);
    })?;
    Ok(())
}

fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// A directory that goes away with its owner, or with the harness.
pub struct DataDir(TempDir);

impl DataDir {
    pub fn new(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("versus-").tempdir_in(parent)?;
        live().1.push(dir.path().to_owned());
        Ok(Self(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.path());
        live().1.retain(|path| path != self.0.path());
    }
}

/// What one side has used since it was started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub cpu_us: f64,
    /// Resident memory now, of which some may be pages of mapped files.
    pub rss_bytes: f64,
    pub written_bytes: f64,
}

/// How one side is started.
#[derive(Clone)]
pub struct Program {
    /// What it is called in the report.
    pub name: String,
    pub binary: PathBuf,
    /// Flags besides those that every member gets.
    pub flags: Vec<String>,
    pub members: usize,
}

/// One side of the comparison, up and answering.
pub struct Cluster {
    pub name: String,
    pub endpoints: Vec<String>,
    /// Who is weighed. Empty for endpoints without given process ids: then CPU, memory and bytes are unknown.
    pids: Vec<u32>,
    members: Vec<Member>,
    /// After the members, so that it goes when they are gone.
    dir: Option<DataDir>,
    /// Set when the member runs in this process and is called directly.
    pub direct: Option<quorate::Client>,
}

struct Member {
    binary: PathBuf,
    args: Vec<OsString>,
    log: PathBuf,
    process: Option<Guard>,
}

/// A process that ends with its guard.
pub struct Guard(Child);

impl Guard {
    /// Starts a process. Should a signal have come before, it waits here for its end.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut live = live();
        let child = command.spawn().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        live.0.push(child.id());
        Ok(Self(child))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn output(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        live().0.retain(|pid| *pid != self.0.id());
    }
}

/// A member that stands still: what it has put off is done, and paid for, when it is its turn again, and not in the other's.
pub struct Still(u32);

impl Drop for Still {
    fn drop(&mut self) {
        kill(self.0, Signal::CONT);
    }
}

impl Cluster {
    /// Starts fresh members in a new directory below `parent` and waits until they answer.
    pub fn start(program: &Program, parent: &Path) -> Result<Self> {
        let dir = DataDir::new(parent)?;
        // All listeners are held until every port is known, so that none comes twice.
        let listeners = (0..program.members * 2).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let urls = listeners.iter().map(|l| Ok(format!("http://{}", l.local_addr()?))).collect::<Result<Vec<_>>>()?;
        drop(listeners);
        let (clients, peers) = urls.split_at(program.members);
        let everyone: Vec<_> = peers.iter().enumerate().map(|(index, url)| format!("m{index}={url}")).collect();
        let mut members = Vec::new();
        for (index, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let data = dir.path().join(format!("m{index}"));
            let mut args: Vec<OsString> = [
                format!("--name=m{index}"),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster={}", everyone.join(",")),
                "--initial-cluster-state=new".to_string(),
                "--log-level=error".to_string(),
                format!("--quota-backend-bytes={QUOTA_BYTES}"),
            ]
            .map(OsString::from)
            .into();
            args.extend(program.flags.iter().map(OsString::from));
            args.push([OsString::from("--data-dir="), data.into()].into_iter().collect());
            members.push(Member { binary: program.binary.clone(), args, log: dir.path().join(format!("m{index}.log")), process: None });
        }
        let mut cluster =
            Self { name: program.name.clone(), endpoints: clients.to_vec(), pids: Vec::new(), members, dir: Some(dir), direct: None };
        cluster.run()?;
        Ok(cluster)
    }

    /// Takes members that somebody else runs, and the ids of their processes if they are to be weighed.
    pub fn join(name: &str, endpoints: &[String], pids: &[u32]) -> Result<Self> {
        let cluster =
            Self { name: name.into(), endpoints: endpoints.into(), pids: pids.into(), members: Vec::new(), dir: None, direct: None };
        cluster.first_read()?;
        Ok(cluster)
    }

    /// Takes a member that runs in this process.
    pub fn embedded(name: &str, client: quorate::Client) -> Self {
        Self { name: name.into(), endpoints: Vec::new(), pids: Vec::new(), members: Vec::new(), dir: None, direct: Some(client) }
    }

    /// Whether the harness started the members, and so may stop them.
    pub fn is_own(&self) -> bool {
        !self.members.is_empty()
    }

    /// Starts the members on what their directories hold; the time from there to the first linearizable read of every member.
    pub fn run(&mut self) -> Result<Duration> {
        let began = Instant::now();
        for member in &mut self.members {
            let log = File::options().create(true).append(true).open(&member.log)?;
            let mut command = Command::new(&member.binary);
            command.args(&member.args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            member.process = Some(Guard::start(&mut command)?);
        }
        self.pids = self.members.iter().flat_map(|member| &member.process).map(Guard::pid).collect();
        self.first_read()?;
        Ok(began.elapsed())
    }

    /// Has a single member stand still, if the harness has started it, until what this returns is dropped. Several would elect a leader
    /// when they go on, so they are left alone.
    pub fn still(&self) -> Option<Still> {
        let [member] = self.members.as_slice() else { return None };
        let pid = member.process.as_ref()?.pid();
        kill(pid, Signal::STOP);
        Some(Still(pid))
    }

    /// Asks the members to stop, or kills them, and waits until they are gone.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        for process in self.members.iter().flat_map(|member| &member.process) {
            kill(process.pid(), signal);
        }
        let asked = Instant::now();
        for member in &mut self.members {
            let Some(mut process) = member.process.take() else { continue };
            while process.0.try_wait()?.is_none() && asked.elapsed() < STOP_LIMIT {
                sleep(POLL);
            }
        }
        self.pids.clear();
        Ok(())
    }

    /// What the members have used, all together; `None` when their processes are not known.
    pub fn usage(&self) -> Option<Usage> {
        let mut sum = Usage::default();
        for pid in &self.pids {
            let usage = usage_of(&pid.to_string())?;
            sum.cpu_us += usage.cpu_us;
            sum.rss_bytes += usage.rss_bytes;
            sum.written_bytes += usage.written_bytes;
        }
        if let Some(written) = self.dir.as_ref().and_then(|dir| device_written(dir.path())) {
            sum.written_bytes = written;
        }
        (!self.pids.is_empty()).then_some(sum)
    }

    /// What the members' data directories take on disk; `None` when somebody else runs them.
    pub fn disk_bytes(&self) -> Option<f64> {
        fn below(dir: &Path) -> f64 {
            // What goes away meanwhile takes nothing any more.
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let sizes = entries.filter_map(|entry| {
                let meta = entry.metadata().ok()?;
                Some(if meta.is_dir() { below(&entry.path()) } else { meta.blocks() as f64 * 512.0 })
            });
            sizes.sum()
        }
        Some(below(self.dir.as_ref()?.path()))
    }

    /// The release that the first member reports.
    pub fn version(&self) -> Result<String> {
        block_on(async {
            let endpoint = self.endpoints.first().ok_or("no endpoints")?;
            let status: StatusResponse = Channel::connect(endpoint).await?.call(STATUS, &StatusRequest {}).await?;
            Ok(status.version)
        })
    }

    fn first_read(&self) -> Result<()> {
        let began = Instant::now();
        for endpoint in &self.endpoints {
            let mut last = None;
            while let Err(error) = block_on(tokio_limit(read_once(endpoint))) {
                if let Some(member) = self.members.iter().find(|member| member.has_ended()) {
                    return Err(format!("{} ended early: {}", self.name, member.log_tail()).into());
                }
                if began.elapsed() > START_LIMIT {
                    return Err(format!("{} at {endpoint} does not answer: {}", self.name, last.unwrap_or(error)).into());
                }
                last = Some(error);
                sleep(POLL);
            }
        }
        Ok(())
    }
}

/// A server may take a request before it has a leader and never answer it.
async fn tokio_limit(read: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::time::timeout(Duration::from_secs(10), read).await?
}

async fn read_once(endpoint: &str) -> Result<()> {
    let mut channel = Channel::connect(endpoint).await?;
    let method = channel.method(RANGE);
    channel.unary(&method, Stamp::get(false).fill(&mut BytesMut::new(), 0, 0, 0)).await.map(drop)
}

impl Member {
    fn has_ended(&self) -> bool {
        // A zombie still has its directory in /proc; its state tells.
        let stat = self.process.as_ref().and_then(|process| fs::read_to_string(format!("/proc/{}/stat", process.pid())).ok());
        stat.is_none_or(|stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(LOG_LINES)).fold(String::new(), |text, line| text + "\n    " + line)
    }
}

/// What one process has used: `pid` is a number or `self`.
pub fn usage_of(pid: &str) -> Option<Usage> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    // The name, in brackets, may hold anything; behind it the fields are numbers. User and system time are the 14th and 15th of all.
    let stat = read("stat")?;
    let mut times = stat.rsplit_once(") ")?.1.split(' ').skip(11).map(str::parse::<f64>);
    let ticks = times.next()?.ok()? + times.next()?.ok()?;
    let number = |text: &str, name: &str| -> Option<f64> {
        text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    Some(Usage {
        cpu_us: ticks * TICK_US,
        rss_bytes: number(&read("status")?, "VmRSS:")? * 1024.0,
        written_bytes: number(&read("io")?, "write_bytes:")?,
    })
}

/// CPU time that this machine has spent on anything at all, idling and waiting left out.
pub fn machine_cpu_us() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; what follows is contained in user and nice.
    let [user, nice, system, _, _, irq, softirq, steal, ..] = ticks[..] else { return None };
    Some((user + nice + system + irq + softirq + steal) * TICK_US)
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    #[test]
    fn a_process_weighs_itself() {
        let usage = usage_of("self").unwrap();
        assert!(usage.rss_bytes > 1e5 && usage.cpu_us >= 0.0, "{usage:?}");
        assert!(usage_of("0").is_none());
        assert!(machine_cpu_us().unwrap() >= usage.cpu_us);
    }
}
