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

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::kv_client::KvClient;
use rand::Rng;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Channel;

use three::{Cluster, LIMIT, Result, put};

#[path = "three/mod.rs"]
mod three;

const USAGE: &str = "\
usage: cargo bench --bench failover -- --etcd PATH [options]

  --etcd PATH       the etcd to compare with
  --quorate PATH    another binary than this package's own
  --kills N         leaders killed on each side [50]
  --heartbeat MS    heartbeat interval of both [100]
  --election MS     election timeout of both [1000]
  --dir DIR         where the members keep their data; not a tmpfs [below target]
";

/// Between two puts sent to one survivor: the grain of the result. A put that a member has sent on to the dead leader may hang for
/// seconds, so that whoever waits for one answer before the next question would measure that instead.
const PUT_INTERVAL: Duration = Duration::from_millis(5);

/// Puts under way to one survivor. Beyond it none are sent until some have ended.
const PUTS_MAX: usize = 4_000;

/// How long a cluster rests after all three members answer, before the next kill: heartbeats have to come to their pace.
const REST: Duration = Duration::from_millis(500);

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
    three::main("failover", USAGE, Args::parse(std::env::args().skip(1)), async |args| compare(&args).await)
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
            let took = fail_over(cluster, moment).await.map_err(|error| format!("{name}, kill {kill}: {error}"))?;
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

/// Kills the leader after a moment, and says how long it takes until a survivor takes a write. Afterwards all is as it was.
async fn fail_over(cluster: &mut Cluster, moment: Duration) -> Result<Duration> {
    cluster.all_answer().await?;
    tokio::time::sleep(REST).await;
    let leader = cluster.leader().await?;
    let mut survivors = Vec::new();
    for (_, member) in cluster.members.iter().enumerate().filter(|(at, _)| *at != leader) {
        let mut kv = KvClient::new(member.channel()?);
        // The connection is not part of what is measured.
        kv.put(put("before")).await?;
        survivors.push(kv);
    }
    tokio::time::sleep(moment).await;
    let killed = Instant::now();
    cluster.members[leader].process = None;
    let first = timeout(LIMIT, first_success(survivors)).await.map_err(|_| format!("no write within {LIMIT:?}: {}", cluster.logs()))?;
    let took = first.duration_since(killed);
    cluster.members[leader].start()?;
    cluster.all_answer().await?;
    Ok(took)
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
