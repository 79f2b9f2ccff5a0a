//! What it costs when a member lags far behind: `cargo bench --bench catchup`.
//!
//! One of three members is stopped, and a million keys are written to the others. Then it is started again, while writers go on at both
//! others, one put at a time each. It is too far behind for the log, so it gets a snapshot. Told are how long that takes, the most
//! memory that the sender and the receiver have resident meanwhile (the kernel's high-water mark, set back when the receiver is started), and
//! the longest time for which no write was acknowledged, beside that of as long a time before.
//!
//! ```text
//! cargo bench --bench catchup -- --run                          a million keys of 100 bytes
//! cargo bench --bench catchup -- --run --keys 20000             does it work?
//! cargo bench --bench catchup -- --run --quorate /opt/etcd      the same of an etcd
//! ```
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::{PutRequest, RangeRequest, RequestOp, TxnRequest};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use three::{Cluster, Member, Result};

#[allow(dead_code, reason = "shared with the bench of the failover")]
#[path = "three/mod.rs"]
mod three;

const USAGE: &str = "\
usage: cargo bench --bench catchup -- --run [options]

  --keys N          keys that the member lacks [1000000]
  --value BYTES     bytes of each value [100]
  --quorate PATH    another binary than this package's own
  --dir DIR         where the members keep their data; not a tmpfs [below target]
";

/// Puts in one Txn, and Txns under way: the keys are to be there soon.
const KEYS_AT_ONCE: usize = 100;
const TXNS: usize = 8;

/// Writers at each of the members that are there.
const WRITERS: usize = 4;

/// How long the writers are watched before the member comes back.
const BEFORE: Duration = Duration::from_secs(10);

/// How long a state may take to be durable, so that the log before it is cut off.
const SETTLE: Duration = Duration::from_secs(20);

/// How long the member may take.
const LIMIT: Duration = Duration::from_secs(900);

struct Args {
    quorate: PathBuf,
    keys: usize,
    value: usize,
    dir: PathBuf,
}

impl Args {
    /// None when there is nothing to do: `cargo bench` without arguments runs every bench target, this one too.
    fn parse(args: impl Iterator<Item = String>) -> Result<Option<Args>> {
        let mut quorate = option_env!("CARGO_BIN_EXE_quorate").map(PathBuf::from);
        let (mut keys, mut value, mut run) = (1_000_000, 100, false);
        let mut dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let mut args = args.filter(|arg| arg != "--bench");
        while let Some(arg) = args.next() {
            if arg == "--run" {
                run = true;
                continue;
            }
            let given = args.next().ok_or_else(|| format!("{arg}: unknown, or its value is missing"))?;
            match &*arg {
                "--keys" => keys = given.parse()?,
                "--value" => value = given.parse()?,
                "--quorate" => quorate = Some(given.into()),
                "--dir" => dir = given.into(),
                _ => return Err(format!("{arg}: unknown").into()),
            }
        }
        let quorate = quorate.ok_or("--quorate: missing")?;
        Ok(run.then_some(Args { quorate, keys, value, dir }))
    }
}

fn main() -> ExitCode {
    three::main("catchup", USAGE, Args::parse(std::env::args().skip(1)), async |args| catch_up(&args).await)
}

async fn catch_up(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.dir)?;
    let mut cluster = Cluster::start(&args.quorate, &args.dir, vec!["--quota-backend-bytes=8000000000".to_owned()]).await?;
    let leader = cluster.leader().await?;
    let (behind, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.members[behind].process = None;

    let began = Instant::now();
    fill(&cluster.members[leader], args).await?;
    eprintln!("{} keys written in {:.1?}", args.keys, began.elapsed());
    tokio::time::sleep(SETTLE).await;

    let writers = Writers::start(&[&cluster.members[leader], &cluster.members[other]])?;
    tokio::time::sleep(BEFORE).await;
    let (before, writes_before) = writers.take_pause();
    for at in [leader, other] {
        // Sets the high-water mark back to what is resident now.
        std::fs::write(format!("/proc/{}/clear_refs", pid(&cluster.members[at])?), "5")?;
    }
    let resident = memory(&cluster.members[leader], "VmRSS:")?;
    let wanted = revision(&cluster.members[leader]).await?;
    let began = Instant::now();
    cluster.members[behind].start()?;
    while revision(&cluster.members[behind]).await.unwrap_or(0) < wanted {
        if began.elapsed() > LIMIT {
            return Err(format!("it has not caught up within {LIMIT:?}: {}", cluster.logs()).into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = began.elapsed();
    let (during, writes_during) = writers.take_pause();
    writers.stop().await;

    println!(
        "A member that lacks {} keys of {} bytes gets a snapshot, version {}; {} writers.\n",
        args.keys,
        args.value,
        cluster.version().await?,
        2 * WRITERS
    );
    println!("| | |\n|---|---:|");
    println!("| until it has caught up | {:.1} s |", took.as_secs_f64());
    println!("| sender: most memory resident meanwhile | {} MB |", memory(&cluster.members[leader], "VmHWM:")? / 1000);
    println!("| sender: memory resident before | {} MB |", resident / 1000);
    println!("| receiver: most memory resident | {} MB |", memory(&cluster.members[behind], "VmHWM:")? / 1000);
    println!("| longest time without an acknowledged write, meanwhile | {} ms |", during.as_millis());
    println!("| the same, {} s before | {} ms |", BEFORE.as_secs(), before.as_millis());
    println!("| writes a second, meanwhile | {:.0} |", writes_during as f64 / took.as_secs_f64());
    println!("| the same, before | {:.0} |", writes_before as f64 / BEFORE.as_secs_f64());
    Ok(())
}

/// Writes the keys.
async fn fill(member: &Member, args: &Args) -> Result<()> {
    let kv = KvClient::new(member.channel()?);
    let mut txns: JoinSet<Result<()>> = JoinSet::new();
    for first in (0..args.keys).step_by(KEYS_AT_ONCE) {
        if txns.len() >= TXNS
            && let Some(done) = txns.join_next().await
        {
            done??;
        }
        let value = bytes::Bytes::from(vec![b'v'; args.value]);
        let puts = (first..args.keys.min(first + KEYS_AT_ONCE)).map(|key| {
            let put = PutRequest { key: format!("key/{key:012}").into(), value: value.clone(), ..Default::default() };
            RequestOp { request: Some(Request::RequestPut(put)) }
        });
        let txn = TxnRequest { success: puts.collect(), ..Default::default() };
        let mut kv = kv.clone();
        txns.spawn(async move {
            kv.txn(txn).await?;
            Ok(())
        });
    }
    while let Some(done) = txns.join_next().await {
        done??;
    }
    Ok(())
}

/// The newest revision that a member has itself.
async fn revision(member: &Member) -> Result<i64> {
    let own = RangeRequest { key: "none".into(), serializable: true, ..Default::default() };
    let answer = tokio::time::timeout(three::LIMIT, KvClient::new(member.channel()?).range(own)).await??.into_inner();
    Ok(answer.header.map_or(0, |header| header.revision))
}

fn pid(member: &Member) -> Result<u32> {
    Ok(member.process.as_ref().ok_or("it does not run")?.0.id())
}

/// A line of the kernel's account of a process, in kB.
fn memory(member: &Member, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid(member)?))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).ok_or("no such line")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// When the last write was acknowledged, the longest time between two, and how many there were.
struct Acknowledged {
    last: Instant,
    pause: Duration,
    count: u64,
}

struct Writers {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Acknowledged>>,
}

impl Writers {
    fn start(members: &[&Member]) -> Result<Writers> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Acknowledged { last: Instant::now(), pause: Duration::ZERO, count: 0 }));
        let mut tasks = JoinSet::new();
        for member in members {
            for _ in 0..WRITERS {
                tasks.spawn(write(KvClient::new(member.channel()?), stop.clone(), seen.clone()));
            }
        }
        Ok(Writers { tasks, stop, seen })
    }

    /// The longest time without an acknowledged write since this was asked last, and how many there were.
    fn take_pause(&self) -> (Duration, u64) {
        let Ok(mut seen) = self.seen.lock() else { return Default::default() };
        let pause = seen.pause.max(seen.last.elapsed());
        let count = seen.count;
        (seen.pause, seen.count) = Default::default();
        (pause, count)
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn write(mut kv: KvClient<Channel>, stop: Arc<AtomicBool>, seen: Arc<Mutex<Acknowledged>>) {
    while !stop.load(Ordering::Relaxed) {
        let put = PutRequest { key: "load".into(), value: "x".into(), ..Default::default() };
        if kv.put(put).await.is_ok()
            && let Ok(mut seen) = seen.lock()
        {
            seen.pause = seen.pause.max(seen.last.elapsed());
            seen.last = Instant::now();
            seen.count += 1;
        }
    }
}
