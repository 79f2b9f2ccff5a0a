//! How long a cluster of three is without a leader when the leader is killed: `cargo bench --bench failover -- --etcd PATH`.
//!
//! Quorate and etcd each run three members on loopback, with the same heartbeat interval and election timeout and their data on the
//! same disk. In turn, first the one and then the other, the leader is killed (SIGKILL) at a random moment between heartbeats, and both
//! survivors are sent puts, a new one every [`PUT_INTERVAL`] whether or not the ones before were answered. The time from the kill to the
//! first success is what counts. Then the killed one is started again, and once all three take writes it is the other's turn.
//!
//! ```text
//! cargo bench --bench failover -- --etcd etcd                   50 kills of each
//! cargo bench --bench failover -- --etcd etcd --kills 5         does it work?
//! ```
//!
//! What decides is chance: election timeouts are random, by design between one and two of those that were asked for. Compare medians
//! of many kills, and the worst with what the timeouts allow.
#![forbid(unsafe_code)]

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::{PutRequest, StatusRequest, StatusResponse};
use rand::Rng;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

const USAGE: &str = "\
usage: cargo bench --bench failover -- --etcd PATH [options]

  --etcd PATH       the etcd to compare with
  --quorate PATH    another binary than this package's own
  --kills N         leaders killed on each side [50]
  --heartbeat MS    heartbeat interval of both [100]
  --election MS     election timeout of both [1000]
  --dir DIR         where the members keep their data; not a tmpfs [below target]
";

const MEMBERS: usize = 3;

/// Between two puts sent to one survivor: the grain of the result. A put that a member has sent on to the dead leader may hang for
/// seconds, so that whoever waits for one answer before the next question would measure that instead.
const PUT_INTERVAL: Duration = Duration::from_millis(5);

/// Puts under way to one survivor. Beyond it none are sent until some have ended.
const PUTS_MAX: usize = 4_000;

/// How long anything may take before the run is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// How long one request may take in a wait that tries again.
const TRY: Duration = Duration::from_secs(3);

/// How long a cluster rests after all three members answer, before the next kill: heartbeats have to come to their pace.
const REST: Duration = Duration::from_millis(500);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Args {
    etcd: PathBuf,
    quorate: PathBuf,
    kills: usize,
    heartbeat_ms: u64,
    election_ms: u64,
    dir: PathBuf,
}

impl Args {
    /// None when there is nothing to do: `cargo bench` without arguments runs every bench target, this one too.
    fn parse(args: impl Iterator<Item = String>) -> Result<Option<Args>> {
        let (mut etcd, mut quorate) = (None, option_env!("CARGO_BIN_EXE_quorate").map(PathBuf::from));
        let (mut kills, mut heartbeat_ms, mut election_ms) = (50, 100, 1000);
        let mut dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let mut args = args.filter(|arg| arg != "--bench");
        while let Some(arg) = args.next() {
            let (name, value) = match arg.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if arg == "--help" => return Ok(None),
                None => (arg.clone(), args.next().ok_or_else(|| format!("{arg}: unknown, or its value is missing"))?),
            };
            let number =
                || value.parse::<u64>().ok().filter(|number| *number > 0).ok_or_else(|| format!("{name}: {value} is not a number above 0"));
            match &*name {
                "--etcd" => etcd = Some(PathBuf::from(value)),
                "--quorate" => quorate = Some(PathBuf::from(value)),
                "--kills" => kills = number()? as usize,
                "--heartbeat" => heartbeat_ms = number()?,
                "--election" => election_ms = number()?,
                "--dir" => dir = PathBuf::from(value),
                _ => return Err(format!("{name}: unknown").into()),
            }
        }
        let Some(etcd) = etcd else { return Ok(None) };
        let quorate = quorate.ok_or("--quorate: missing")?;
        Ok(Some(Args { etcd, quorate, kills, heartbeat_ms, election_ms, dir }))
    }
}

fn main() -> ExitCode {
    let run = async || {
        let Some(args) = Args::parse(std::env::args().skip(1))? else {
            print!("{USAGE}");
            return Ok(());
        };
        tokio::select! {
            done = compare(&args) => done,
            // What was started ends with its guards.
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failover: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn compare(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.dir)?;
    let timing = [format!("--heartbeat-interval={}", args.heartbeat_ms), format!("--election-timeout={}", args.election_ms)];
    let mut sides = Vec::new();
    for (name, binary) in [("quorate", &args.quorate), ("etcd", &args.etcd)] {
        let flags = timing.to_vec();
        sides.push((name, Cluster::start(binary, &args.dir, flags).await.map_err(|error| format!("{name}: {error}"))?, Vec::new()));
    }
    for kill in 0..args.kills {
        for (name, cluster, times) in &mut sides {
            let moment = Duration::from_micros(rand::rng().random_range(0..2 * args.heartbeat_ms * 1000));
            let took = cluster.fail_over(moment).await.map_err(|error| format!("{name}, kill {kill}: {error}"))?;
            eprintln!("kill {:>3}  {name:8} {:>6} ms", kill + 1, took.as_millis());
            times.push(took);
        }
    }
    println!(
        "From the leader's SIGKILL to the first write that a survivor acknowledges; three members, heartbeat {} ms, election timeout",
        args.heartbeat_ms
    );
    println!("{} ms, {} kills of each, in turn.\n", args.election_ms, args.kills);
    println!("| | version | median | 90 of 100 | worst | least |");
    println!("|---|---|---:|---:|---:|---:|");
    for (name, cluster, times) in &mut sides {
        times.sort_unstable();
        let of = |part: usize| times[((times.len() - 1) * part).div_ceil(100)].as_millis();
        println!("| {name} | {} | {} ms | {} ms | {} ms | {} ms |", cluster.version().await?, of(50), of(90), of(100), of(0));
    }
    Ok(())
}

struct Cluster {
    members: Vec<Member>,
    /// After the members, so that it goes when they are gone.
    #[allow(dead_code, reason = "kept for its drop")]
    dir: TempDir,
}

struct Member {
    binary: PathBuf,
    args: Vec<String>,
    log: PathBuf,
    url: String,
    process: Option<Guard>,
}

/// A process that ends with its guard.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Cluster {
    async fn start(binary: &Path, parent: &Path, flags: Vec<String>) -> Result<Cluster> {
        let dir = tempfile::Builder::new().prefix("failover-").tempdir_in(parent)?;
        // All listeners are held until every port is known, so that none comes twice.
        let listeners = (0..2 * MEMBERS).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let urls = listeners.iter().map(|listener| Ok(format!("http://{}", listener.local_addr()?))).collect::<Result<Vec<_>>>()?;
        drop(listeners);
        let (clients, peers) = urls.split_at(MEMBERS);
        let all: Vec<String> = peers.iter().enumerate().map(|(at, url)| format!("m{at}={url}")).collect();
        let mut members = Vec::new();
        for (at, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let mut args = vec![
                format!("--name=m{at}"),
                format!("--data-dir={}", dir.path().join(format!("m{at}")).display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster={}", all.join(",")),
                "--log-level=error".to_owned(),
            ];
            args.extend(flags.iter().cloned());
            let log = dir.path().join(format!("m{at}.log"));
            members.push(Member { binary: binary.to_owned(), args, log, url: client.clone(), process: None });
        }
        let mut cluster = Cluster { members, dir };
        for member in &mut cluster.members {
            member.start()?;
        }
        cluster.all_answer().await?;
        Ok(cluster)
    }

    /// Kills the leader after a moment, and says how long it takes until a survivor takes a write. Afterwards all is as it was.
    async fn fail_over(&mut self, moment: Duration) -> Result<Duration> {
        self.all_answer().await?;
        tokio::time::sleep(REST).await;
        let leader = self.leader().await?;
        let mut survivors = Vec::new();
        for (_, member) in self.members.iter().enumerate().filter(|(at, _)| *at != leader) {
            let mut kv = KvClient::new(member.channel()?);
            // The connection is not part of what is measured.
            kv.put(put("before")).await?;
            survivors.push(kv);
        }
        tokio::time::sleep(moment).await;
        let killed = Instant::now();
        self.members[leader].process = None;
        let first = timeout(LIMIT, first_success(survivors)).await.map_err(|_| format!("no write within {LIMIT:?}: {}", self.logs()))?;
        let took = first.duration_since(killed);
        self.members[leader].start()?;
        self.all_answer().await?;
        Ok(took)
    }

    /// Waits until each member takes a write.
    async fn all_answer(&self) -> Result<()> {
        let began = Instant::now();
        for member in &self.members {
            loop {
                let mut kv = KvClient::new(member.channel()?);
                match timeout(TRY, kv.put(put("ready"))).await {
                    Ok(Ok(_)) => break,
                    other if began.elapsed() > LIMIT => {
                        return Err(format!("{} does not answer: {other:?}: {}", member.url, self.logs()).into());
                    }
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        }
        Ok(())
    }

    /// The leader, once all members agree on it.
    async fn leader(&self) -> Result<usize> {
        let began = Instant::now();
        loop {
            let mut told = Vec::new();
            for member in &self.members {
                let status = member.status().await?;
                told.push((status.header.map_or(0, |header| header.member_id), status.leader));
            }
            let (_, leader) = told[0];
            let found = told.iter().position(|(id, _)| *id == leader);
            match found.filter(|_| told.iter().all(|(_, other)| *other == leader)) {
                Some(leader) => return Ok(leader),
                None if began.elapsed() > LIMIT => return Err(format!("no leader: {told:x?}").into()),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn version(&self) -> Result<String> {
        let output = Command::new(&self.members[0].binary).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Quorate says in its second line what it is, and in the first whom it resembles; etcd has one line.
        let line = text.lines().find(|line| line.starts_with("quorate")).or(text.lines().next()).unwrap_or_default();
        Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
    }

    /// The ends of all logs, for an error.
    fn logs(&self) -> String {
        const LINES: usize = 8;
        let mut text = String::new();
        for member in &self.members {
            let log = std::fs::read_to_string(&member.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("\n  {}:\n    {}", member.url, lines[lines.len().saturating_sub(LINES)..].join("\n    "));
        }
        text
    }
}

impl Member {
    fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.binary);
        command.env_clear().args(&self.args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(Guard(command.spawn().map_err(|error| format!("{}: {error}", self.binary.display()))?));
        Ok(())
    }

    fn channel(&self) -> Result<Channel> {
        Ok(Endpoint::from_shared(self.url.clone())?.connect_timeout(TRY).connect_lazy())
    }

    async fn status(&self) -> Result<StatusResponse> {
        Ok(timeout(TRY, MaintenanceClient::new(self.channel()?).status(StatusRequest {})).await??.into_inner())
    }
}

fn put(value: &'static str) -> PutRequest {
    PutRequest { key: "failover".into(), value: value.into(), ..Default::default() }
}

/// Sends puts to all, at a steady pace, until one succeeds; when that was.
async fn first_success(survivors: Vec<KvClient<Channel>>) -> Instant {
    let mut puts: JoinSet<Option<Instant>> = JoinSet::new();
    let mut pace = tokio::time::interval(PUT_INTERVAL);
    loop {
        tokio::select! {
            Some(done) = puts.join_next() => {
                if let Ok(Some(at)) = done {
                    return at;
                }
            }
            _ = pace.tick() => {
                if puts.len() < PUTS_MAX * survivors.len() {
                    for mut kv in survivors.iter().cloned() {
                        puts.spawn(async move { kv.put(put("after")).await.ok().map(|_| Instant::now()) });
                    }
                }
            }
        }
    }
}
