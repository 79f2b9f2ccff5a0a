//! Three members as real processes, under load from clients at all of them, and under faults chosen at random: kill -9 of one, of all,
//! SIGSTOP, rolling restarts, links cut wholly, one way or between two, slow links.
//!
//! After each round everything is healed, and all that the clients were told is judged (see `checkers/mod.rs`): is it linearizable,
//! is nothing lost, invented or done twice; were watchers told everything once and in order; do members keep to what they have said;
//! have they the same state. And the cluster must go on: each member has to take a write and to answer a read.
//!
//! A round that fails prints its seed and leaves the history, and the members' logs, in a directory that it names. The seed repeats the
//! choices, not the timing.
//!
//! ```text
//! cargo test --test faults                                             # 3 rounds, 10 with CI=true
//! QUORATE_FAULT_ROUNDS=200 cargo test --test faults -- --nocapture
//! QUORATE_FAULT_SEED=17 cargo test --test faults -- --nocapture
//! QUORATE_SUBJECT=etcd QUORATE_REFERENCE_DIR=/opt/etcd cargo test --test faults     # tries the test itself on etcd
//! ```
#![cfg(feature = "cli")]

#[path = "checkers/mod.rs"]
mod checkers;
#[path = "faults/cluster.rs"]
mod cluster;
#[path = "faults/links.rs"]
mod links;
#[path = "faults/load.rs"]
mod load;
#[allow(dead_code, reason = "shared with the crash tests")]
#[path = "crash/member.rs"]
mod member;
#[path = "faults/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::prelude::*;
use rand::rngs::StdRng;

use checkers::history::{Op, Outcome};
use checkers::log::{Log, check_hashes};
use checkers::watch::{self, Told};
use checkers::{kv, log};
use cluster::Cluster;
use links::MEMBERS;
use load::{Load, Record};

/// What a wait may take, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Faults of one round, at most, one after the other.
const FAULTS_MAX: u32 = 3;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

#[test]
fn whatever_befalls_them_they_keep_their_word() {
    let seed = setting("QUORATE_FAULT_SEED").unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    let rounds = setting("QUORATE_FAULT_ROUNDS").unwrap_or(if is_ci { 10 } else { 3 });
    println!("QUORATE_FAULT_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut rng = StdRng::seed_from_u64(seed);
        let record = Record::new();
        let cluster = Cluster::start(&member::subject(), &record).await;
        let mut run =
            Run { cluster, record, base: 0, start: BTreeMap::new(), lost: Vec::new(), witnesses: Vec::new(), sums: Sums::default() };
        for round in 0..rounds {
            // A seed of its own, so that how many choices a round has made changes nothing in the next.
            let mut rng = StdRng::seed_from_u64(rng.random());
            let mut seen = Seen::default();
            let mut wrong = run.round(&mut rng, &mut seen).await.err().into_iter().collect::<Vec<_>>();
            wrong.append(&mut seen.wrong);
            if !wrong.is_empty() {
                let left = run.leave(seed, round, &wrong, &seen);
                let shown: String = wrong.iter().take(5).map(|wrong| format!("  {wrong}\n")).collect();
                panic!(
                    "round {round}: {} things are wrong, first of them\n{shown}everything is in {}\n\
                     again: QUORATE_FAULT_SEED={seed} QUORATE_FAULT_ROUNDS={rounds} cargo test --test faults -- --nocapture",
                    wrong.len(),
                    left.display()
                );
            }
            println!("round {round}: {}", seen.summary());
        }
        println!("{rounds} rounds, seed {seed}: 0 violations; {}", run.sums.text());
    });
}

/// What a round has seen.
#[derive(Default)]
struct Seen {
    /// Also those of earlier rounds that may have been carried out in this one.
    ops: Vec<Op>,
    /// Those of this round alone.
    sent: usize,
    log: Log,
    told: Vec<Vec<Told>>,
    notes: Vec<String>,
    errors: BTreeMap<String, u64>,
    wrong: Vec<String>,
}

#[derive(Default)]
struct Sums {
    answered: usize,
    refused: usize,
    unknown: usize,
    revisions: i64,
    watched: usize,
    errors: BTreeMap<String, u64>,
}

impl Sums {
    fn text(&self) -> String {
        let errors: String = self.errors.iter().map(|(text, times)| format!("\n  {times} x {text}")).collect();
        let Sums { answered, refused, unknown, revisions, watched, .. } = self;
        format!(
            "{answered} requests answered, {refused} refused, {unknown} without an answer, {revisions} revisions, {watched} events watched; errors:{errors}"
        )
    }
}

impl Seen {
    fn summary(&self) -> String {
        let answered = self.ops.iter().filter(|op| op.answer().is_some()).count();
        let notes = || self.notes.iter().filter_map(|note| Some(note.trim_start().split_once(' ')?.1));
        let faults: Vec<&str> = notes().filter_map(|note| Some(note.split_once(": any")?.0)).collect();
        let paused: String = notes().filter(|note| note.contains("paused leader")).map(|note| format!("; {note}")).collect();
        let revisions = self.log.revisions.len();
        format!("{}; {answered} of {} requests answered, {revisions} revisions{paused}", faults.join(", "), self.sent)
    }
}

struct Run {
    cluster: Cluster,
    record: Arc<Record>,
    /// The newest revision of the last round, and what the store held then.
    base: i64,
    start: BTreeMap<String, checkers::history::Item>,
    /// Writes of earlier rounds whose answer never came: they may still be carried out.
    lost: Vec<Op>,
    witnesses: Vec<tokio::task::JoinHandle<()>>,
    sums: Sums,
}

impl Run {
    /// One round.
    ///
    /// # Errors
    /// When the cluster is stuck, or a member has ended. What is wrong with the answers is in `seen`.
    async fn round(&mut self, rng: &mut StdRng, seen: &mut Seen) -> Result<(), String> {
        if self.base == 0 {
            self.found().await?;
        } else if rng.random_ratio(1, 3) {
            // All watchers have what is before the base. Whether it is carried out is not known, nor does it matter.
            let _ =
                tokio::time::timeout(Duration::from_secs(5), self.cluster.client(rng.random_range(0..MEMBERS)).compact(self.base)).await;
        }
        let load = Load::start(&self.record, &self.cluster.urls(), rng);
        let mut outcome = Ok(());
        for _ in 0..rng.random_range(1..=FAULTS_MAX) {
            tokio::time::sleep(Duration::from_millis(rng.random_range(100..1_000))).await;
            outcome = self.cluster.suffer(rng).await.and_then(|()| self.cluster.check_running());
            if outcome.is_err() {
                break;
            }
        }
        for at in 0..MEMBERS {
            if outcome.is_ok() {
                outcome = self.cluster.answers(at).await;
            }
        }
        load.finish().await;
        if outcome.is_ok() {
            outcome = self.gather(rng, seen).await.and_then(|()| self.cluster.check_running());
        }
        seen.notes = self.record.take_notes();
        seen.ops.extend(self.record.take_ops());
        seen.errors = self.record.take_errors();
        for (text, times) in &seen.errors {
            *self.sums.errors.entry(text.clone()).or_default() += times;
        }
        outcome?;
        self.judge(seen);
        Ok(())
    }

    /// Waits for the new cluster, and lets watchers begin before anything is written.
    async fn found(&mut self) -> Result<(), String> {
        for at in 0..MEMBERS {
            let began = Instant::now();
            while !self.cluster.members[at].answers().await {
                self.cluster.check_running()?;
                if began.elapsed() > PATIENCE {
                    return Err(format!("member {at} does not answer after the cluster's foundation"));
                }
            }
        }
        self.base = 1;
        for (at, url) in self.cluster.urls().into_iter().enumerate() {
            self.witnesses.push(tokio::spawn(load::witness(self.record.clone(), at, url, self.base + 1)));
        }
        Ok(())
    }

    /// Waits for the watchers, reads the log, compares the members.
    async fn gather(&mut self, rng: &mut StdRng, seen: &mut Seen) -> Result<(), String> {
        let began = Instant::now();
        let mut client = self.cluster.client(rng.random_range(0..MEMBERS));
        let end = loop {
            match tokio::time::timeout(PATIENCE, client.send(&checkers::history::Request::get("a"))).await {
                Ok(Ok(answer)) => break answer.revision,
                other if began.elapsed() > PATIENCE => return Err(format!("no read after the round: {other:?}")),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        for at in 0..MEMBERS {
            while watch::next_revision(&self.record.told(at), self.base + 1) <= end {
                if began.elapsed() > PATIENCE {
                    let next = watch::next_revision(&self.record.told(at), self.base + 1);
                    seen.wrong.push(format!("the watcher of member {at} is not told of revision {next}, the store is at {end}"));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen.told.push(load::told_upto(&mut self.record.told(at), end));
        }
        seen.log = Log { base: self.base, start: self.start.clone(), revisions: BTreeMap::new(), end };
        self.read_log(rng.random_range(0..MEMBERS), &mut seen.log).await?;
        loop {
            let mut hashes = Vec::new();
            for at in 0..MEMBERS {
                let hash = tokio::time::timeout(PATIENCE, self.cluster.client(at).hash(end)).await;
                hashes.push((
                    at,
                    hash.map_err(|_| format!("no hash from member {at}"))?.map_err(|err| format!("hash of member {at}: {err}"))?,
                ));
            }
            // A compaction may be under way, here earlier than there.
            if hashes.windows(2).all(|pair| pair[0].1.compacted == pair[1].1.compacted) || began.elapsed() > PATIENCE {
                seen.wrong.extend(check_hashes(&hashes));
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What each revision changed, as one member tells it afterwards.
    async fn read_log(&self, at: usize, log: &mut Log) -> Result<(), String> {
        let mut client = self.cluster.client(at);
        let read = async {
            let mut watching = client.watch(log.base + 1).await?;
            while log.revisions.last_key_value().map_or(log.base, |(revision, _)| *revision) < log.end {
                let Some(told) = watching.next().await? else { return Err(tonic::Status::aborted("the stream ended")) };
                let Told::Events(_, events) = told else { continue };
                for (revision, change) in events.into_iter().filter(|(revision, _)| *revision <= log.end) {
                    log.revisions.entry(revision).or_default().push(change);
                }
            }
            Ok(())
        };
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => Err(format!("reading the log of member {at}: {status}")),
            Err(_) => Err(format!("the log of member {at} does not come to revision {}", log.end)),
        }
    }

    fn judge(&mut self, seen: &mut Seen) {
        self.sums.answered += seen.ops.iter().filter(|op| op.answer().is_some()).count();
        self.sums.refused += seen.ops.iter().filter(|op| op.outcome == Outcome::Refused).count();
        self.sums.unknown += seen.ops.iter().filter(|op| op.outcome == Outcome::Unknown).count();
        self.sums.revisions += seen.log.end - seen.log.base;
        seen.sent = seen.ops.len();
        seen.ops.extend(std::mem::take(&mut self.lost));
        let verdict = log::judge(&seen.log, &seen.ops);
        seen.wrong.extend(kv::check(&seen.ops, seen.log.base, &seen.log.start, Some(&verdict.effects)));
        seen.wrong.extend(verdict.wrong);
        for (at, told) in seen.told.iter().enumerate() {
            let wrong = watch::check(told, &seen.log, seen.log.base + 1);
            seen.wrong.extend(wrong.into_iter().map(|wrong| format!("the watcher of member {at}: {wrong}")));
            self.sums.watched += told.iter().map(|told| if let Told::Events(_, events) = told { events.len() } else { 0 }).sum::<usize>();
        }
        let is_lost = |op: &Op, effect: &Option<i64>| op.outcome == Outcome::Unknown && !op.request.writes.is_empty() && effect.is_none();
        self.lost = seen.ops.iter().zip(&verdict.effects).filter(|(op, effect)| is_lost(op, effect)).map(|(op, _)| op.clone()).collect();
        (self.base, self.start) = (seen.log.end, seen.log.last());
    }

    /// Leaves everything that there is of a failed round in a directory.
    fn leave(&self, seed: u64, round: u64, wrong: &[String], seen: &Seen) -> PathBuf {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{seed}-{round}"));
        std::fs::create_dir_all(&dir).expect("a directory for what is left");
        let mut text = String::new();
        let mut part = |title: &str, lines: &mut dyn Iterator<Item = String>| {
            text += &format!("# {title}\n");
            lines.for_each(|line| text += &(line + "\n"));
            text += "\n";
        };
        let mut ops: Vec<&Op> = seen.ops.iter().collect();
        ops.sort_by_key(|op| op.call);
        part("wrong", &mut wrong.iter().cloned());
        part("what was done, ms", &mut seen.notes.iter().cloned());
        part("errors that clients saw", &mut seen.errors.iter().map(|(error, times)| format!("{times} x {error}")));
        part("operations: sent, answered (ms)", &mut ops.iter().map(|op| format!("{op:?}")));
        let title = format!("the log, from revision {} to {}, beginning with {:?}", seen.log.base, seen.log.end, seen.log.start);
        part(&title, &mut seen.log.revisions.iter().map(|(revision, changes)| format!("{revision} {changes:?}")));
        for (at, told) in seen.told.iter().enumerate() {
            let title = format!("what the watcher of member {at} was told");
            part(&title, &mut told.iter().enumerate().map(|(place, told)| format!("{place} {told:?}")));
        }
        std::fs::write(dir.join("history.txt"), text).expect("space for the history");
        for (at, member) in self.cluster.members.iter().enumerate() {
            let earlier = std::fs::read_to_string(self.cluster.earlier_log(at)).unwrap_or_default();
            std::fs::write(dir.join(format!("member-{at}.log")), earlier + &member.log()).expect("space for the logs");
        }
        dir
    }
}
