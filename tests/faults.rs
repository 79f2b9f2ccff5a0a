//! Three members as real processes, under load from clients at all of them, and under faults chosen at random: kill -9 of one, of all,
//! SIGSTOP, rolling restarts, links cut wholly, one way or between two, slow links, power lost by one or by all, a disk that stands still
//! beyond the election timeout, a full disk, a member removed, wiped and added anew. Some of the keys hang on leases.
//!
//! After each round everything is healed, and all that the clients were told is judged (see `checkers/mod.rs`): is it linearizable,
//! is nothing lost, invented or done twice; were watchers told everything once and in order; do members keep to what they have said;
//! have they the same state; does what a member's own log has, carried out in that order, give what watchers were told; did leases last as long
//! as promised, and not much longer. And the cluster must go on: each member has to take a write and to answer a read.
//!
//! What befalls disks takes root: each member has a file system on a loop device. Without it these faults are left out (`skipped: ...` says
//! so, and fails when `CI` is `true`).
//!
//! A round that fails prints its seed and leaves the history, and the members' logs, in a directory that it names. The seed repeats the
//! choices, not the timing.
//!
//! ```text
//! cargo test --test faults                                             # 3 rounds, 10 with CI=true
//! QUORATE_FAULT_ROUNDS=200 cargo test --test faults -- --nocapture
//! QUORATE_FAULT_SEED=17 cargo test --test faults whatever -- --nocapture
//! cargo test --test faults all_are -- --nocapture                      # rolling restart and replacement, with figures
//! QUORATE_SUBJECT=etcd QUORATE_REFERENCE_DIR=/opt/etcd cargo test --test faults     # tries the test itself on etcd
//! ```
#![cfg(feature = "cli")]

#[path = "checkers/mod.rs"]
mod checkers;
#[path = "faults/cluster.rs"]
mod cluster;
#[allow(dead_code, reason = "shared with the crash tests")]
#[path = "crash/disk.rs"]
mod disk;
#[path = "faults/leases.rs"]
mod leases;
#[path = "faults/links.rs"]
mod links;
#[path = "faults/load.rs"]
mod load;
#[allow(dead_code, reason = "shared with the crash tests")]
#[path = "crash/member.rs"]
mod member;
#[path = "faults/order.rs"]
mod order;
#[path = "common/requests.rs"]
mod requests;
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
use checkers::watch::{self, Scope, Told};
use checkers::{kv, log};
use cluster::Cluster;
use leases::Held;
use links::MEMBERS;
use load::{Load, Record, WITNESSES};
use order::Order;

/// What a wait may take, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Faults of one round, at most, one after the other.
const FAULTS_MAX: u32 = 3;

/// Holders of leases.
const HOLDERS: usize = 3;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// What befalls the cluster in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Chosen,
    RestartAll,
    ReplaceAll,
    KillAll,
    KillBusy,
    CutOffPastTheLog,
    PauseLeader,
    LeadersDiskStandsStill,
}

fn test(plan: Plan, name: &str, rounds: u64) {
    let seed = setting("QUORATE_FAULT_SEED").unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    println!("QUORATE_FAULT_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut rng = StdRng::seed_from_u64(seed);
        let record = Record::new();
        let catchup_entries = if plan == Plan::CutOffPastTheLog { 10 } else { 100_000_000 };
        let cluster = Cluster::start(&member::subject(), &record, catchup_entries).await;
        let mut run = Run {
            cluster,
            record,
            base: 0,
            start: BTreeMap::new(),
            lost: Vec::new(),
            held: vec![None; HOLDERS],
            order: Order::default(),
            witnesses: Vec::new(),
            sums: Sums::default(),
        };
        // Of a leader that answers nothing after it was paused nothing is learnt: some rounds more.
        let is_enough = |round: u64, sums: &Sums| round >= rounds && (plan != Plan::PauseLeader || sums.answered_late > 0);
        for round in 0..4 * rounds {
            if is_enough(round, &run.sums) {
                break;
            }
            // A seed of its own, so that how many choices a round has made changes nothing in the next.
            let mut rng = StdRng::seed_from_u64(rng.random());
            let mut seen = Seen::default();
            let mut wrong = run.round(plan, &mut rng, &mut seen).await.err().into_iter().collect::<Vec<_>>();
            wrong.append(&mut seen.wrong);
            if !wrong.is_empty() {
                let left = run.leave(seed, round, &wrong, &seen);
                let shown: String = wrong.iter().take(5).map(|wrong| format!("  {wrong}\n")).collect();
                panic!(
                    "round {round}: {} things are wrong, first of them\n{shown}everything is in {}\n\
                     again: QUORATE_FAULT_SEED={seed} QUORATE_FAULT_ROUNDS={rounds} cargo test --test faults {name} -- --nocapture",
                    wrong.len(),
                    left.display()
                );
            }
            println!("round {round}: {}", seen.summary());
        }
        assert!(is_enough(rounds, &run.sums), "no paused leader has answered a read");
        let (leases, late) = run.record.leases();
        println!("{rounds} rounds, seed {seed}: 0 violations; {leases} leases ran out, at most {late:.1?} late; {}", run.sums.text());
    });
}

#[test]
fn whatever_befalls_them_they_keep_their_word() {
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    let rounds = setting("QUORATE_FAULT_ROUNDS").unwrap_or(if is_ci { 10 } else { 3 });
    test(Plan::Chosen, "whatever_befalls_them_they_keep_their_word", rounds);
}

/// Each member is stopped and started again, one after the other, and everything is judged as after the faults.
#[test]
fn all_are_restarted_under_load() {
    test(Plan::RestartAll, "all_are_restarted_under_load", 1);
}

/// Each member is removed, wiped, added as a learner and promoted, one after the other.
#[test]
fn all_are_replaced_under_load() {
    test(Plan::ReplaceAll, "all_are_replaced_under_load", 1);
}

/// A leader that cannot write hands over to one who can, and all goes on.
#[test]
fn a_leader_whose_disk_stands_still_hands_over() {
    test(Plan::LeadersDiskStandsStill, "a_leader_whose_disk_stands_still_hands_over", 3);
}

/// etcd's issue 13766: a crash under load, after which revisions differ.
#[test]
fn all_are_killed_under_load() {
    test(Plan::KillAll, "all_are_killed_under_load", 3);
}

/// etcd's issue 14685: a crash while the storage is rewritten, after which revisions differ.
#[test]
fn killed_while_they_defragment() {
    test(Plan::KillBusy, "killed_while_they_defragment", 2);
}

/// etcd's issue 15271: a watcher at a member that was cut off for so long that it needs a snapshot must not be told again what it was.
#[test]
fn cut_off_past_the_log_and_back() {
    test(Plan::CutOffPastTheLog, "cut_off_past_the_log_and_back", 1);
}

/// etcd's issue 20418: a paused leader that goes on answers by what it knew before.
#[test]
fn a_paused_leader_says_nothing_stale() {
    test(Plan::PauseLeader, "a_paused_leader_says_nothing_stale", 3);
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
    ordered: usize,
    watched: usize,
    /// Reads that a leader answered that had been paused.
    answered_late: usize,
    errors: BTreeMap<String, u64>,
}

impl Sums {
    fn text(&self) -> String {
        let errors: String = self.errors.iter().map(|(text, times)| format!("\n  {times} x {text}")).collect();
        let Sums { answered, refused, unknown, revisions, ordered, watched, .. } = self;
        format!(
            "{answered} requests answered, {refused} refused, {unknown} without an answer, {revisions} revisions, {ordered} of them by a member's own log, {watched} events watched; errors:{errors}"
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
        let pause = self.longest_pause();
        format!(
            "{}; {answered} of {} requests answered, {revisions} revisions, {pause} ms at most between acknowledged writes{paused}",
            faults.join(", "),
            self.sent
        )
    }

    /// The longest time in which no write was acknowledged, in milliseconds.
    fn longest_pause(&self) -> u64 {
        let writes = self.ops.iter().filter(|op| !op.request.writes.is_empty());
        let mut times: Vec<u64> = writes.filter_map(|op| Some(op.answer()?.0)).collect();
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0) / 1_000_000
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
    /// Leases that are held from one round to the next.
    held: Vec<Option<Held>>,
    order: Order,
    witnesses: Vec<tokio::task::JoinHandle<()>>,
    sums: Sums,
}

impl Run {
    /// One round.
    ///
    /// # Errors
    /// When the cluster is stuck, or a member has ended. What is wrong with the answers is in `seen`.
    async fn round(&mut self, plan: Plan, rng: &mut StdRng, seen: &mut Seen) -> Result<(), String> {
        if self.base == 0 {
            self.found().await?;
        } else if rng.random_ratio(1, 3) {
            // All watchers have what is before the base. Whether it is carried out is not known, nor does it matter.
            let _ =
                tokio::time::timeout(Duration::from_secs(5), self.cluster.client(rng.random_range(0..MEMBERS)).compact(self.base)).await;
        }
        let load = Load::start(&self.record, &self.cluster.urls(), std::mem::take(&mut self.held), rng);
        let mut outcome = Ok(());
        for _ in 0..if plan == Plan::Chosen { rng.random_range(1..=FAULTS_MAX) } else { 1 } {
            tokio::time::sleep(Duration::from_millis(rng.random_range(100..1_000))).await;
            let befallen = match plan {
                Plan::Chosen => self.cluster.suffer(rng).await,
                Plan::RestartAll => self.cluster.restart_all().await,
                Plan::ReplaceAll => self.replace_all().await,
                Plan::KillAll => {
                    self.cluster.kill_all(rng).await;
                    Ok(())
                }
                Plan::KillBusy => self.cluster.kill_busy(self.base, rng).await,
                Plan::CutOffPastTheLog => self.cluster.cut_off_past_the_log(rng.random_range(0..MEMBERS)).await,
                Plan::PauseLeader => self.cluster.pause_leader().await.map(|answered| self.sums.answered_late += answered),
                Plan::LeadersDiskStandsStill => self.cluster.leaders_disk_stands_still().await,
            };
            outcome = befallen.and_then(|()| self.cluster.check_running());
            if outcome.is_err() {
                break;
            }
        }
        for at in 0..MEMBERS {
            if outcome.is_ok() {
                outcome = self.cluster.answers(at).await;
            }
        }
        self.held = load.finish().await;
        if outcome.is_ok() {
            outcome = self.gather(plan, rng, seen).await.and_then(|()| self.cluster.check_running());
        }
        seen.wrong.extend(self.record.take_wrong());
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

    async fn replace_all(&mut self) -> Result<(), String> {
        for at in 0..MEMBERS {
            self.cluster.replace(at).await?;
        }
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
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        self.base = 1;
        let urls = self.cluster.urls();
        for witness in 0..WITNESSES {
            let url = urls[witness % MEMBERS].clone();
            self.witnesses.push(tokio::spawn(load::witness(self.record.clone(), witness, url, self.base + 1)));
        }
        Ok(())
    }

    /// Waits for the watchers, reads the log, compares the members.
    async fn gather(&mut self, plan: Plan, rng: &mut StdRng, seen: &mut Seen) -> Result<(), String> {
        let began = Instant::now();
        let mut client = self.cluster.client(rng.random_range(0..MEMBERS));
        let end = loop {
            match tokio::time::timeout(PATIENCE, client.send(&checkers::history::Request::get("a"))).await {
                Ok(Ok(answer)) => break answer.revision,
                other if began.elapsed() > PATIENCE => return Err(format!("no read after the round: {other:?}")),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        for at in 0..WITNESSES {
            while watch::next_revision(&self.record.told(at), self.base + 1) <= end {
                if began.elapsed() > PATIENCE {
                    let next = watch::next_revision(&self.record.told(at), self.base + 1);
                    seen.wrong.push(format!("watcher {at} is not told of revision {next}, the store is at {end}"));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen.told.push(load::told_upto(&mut self.record.told(at), end));
        }
        seen.log = Log { base: self.base, start: self.start.clone(), revisions: BTreeMap::new(), end };
        self.read_log(rng.random_range(0..MEMBERS), &mut seen.log).await?;
        // Logs that are cut off early do not go back far enough.
        if !self.cluster.members[0].program.is_etcd && plan != Plan::CutOffPastTheLog {
            self.compare_order(rng, seen).await?;
        }
        // The time that watchers took is not this loop's.
        let began = Instant::now();
        loop {
            let is_last = began.elapsed() > PATIENCE;
            let mut hashes = Vec::new();
            for at in 0..MEMBERS {
                let hash = tokio::time::timeout(PATIENCE, self.cluster.client(at).hash(end)).await;
                hashes.push((
                    at,
                    hash.map_err(|_| format!("no hash from member {at}"))?.map_err(|err| format!("hash of member {at}: {err}"))?,
                ));
            }
            // A compaction may be under way, here earlier than there.
            let are_alike = hashes.windows(2).all(|pair| pair[0].1.compacted == pair[1].1.compacted);
            if are_alike || is_last {
                if !are_alike {
                    seen.wrong.push(format!("members are not compacted alike: {hashes:?}"));
                }
                seen.wrong.extend(check_hashes(&hashes));
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        loop {
            match tokio::time::timeout(PATIENCE, client.alarms()).await {
                Ok(Ok(alarms)) if alarms.is_empty() => return Ok(()),
                other if began.elapsed() > PATIENCE => return Err(format!("the alarms after the round: {other:?}")),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// What each revision changed, as one member tells it afterwards.
    async fn read_log(&self, at: usize, log: &mut Log) -> Result<(), String> {
        let mut client = self.cluster.client(at);
        let read = async {
            let mut watching = client.watch(Scope::All, log.base + 1).await?;
            while log.revisions.last_key_value().map_or(log.base, |(revision, _)| *revision) < log.end {
                let Some(told) = watching.next().await? else { return Err(tonic::Status::aborted("the stream ended")) };
                let Told::Events(_, events) = told else { continue };
                for event in events.into_iter().filter(|event| event.revision <= log.end) {
                    log.revisions.entry(event.revision).or_default().push(event.change);
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

    /// Carries out what a member's own log has, and compares.
    async fn compare_order(&mut self, rng: &mut StdRng, seen: &mut Seen) -> Result<(), String> {
        let began = Instant::now();
        let first = rng.random_range(0..MEMBERS);
        loop {
            for at in (0..MEMBERS).map(|at| (first + at) % MEMBERS) {
                let member = &self.cluster.members[at];
                // Who has been replaced has only the end of it.
                let read = self.order.read(&member.program.path, &member.data, seen.log.end);
                if read.map_err(|what| format!("the log of member {at}: {what}"))?.is_none() {
                    continue;
                }
                let order = self.order.take(seen.log.end);
                for (revision, changes) in &seen.log.revisions {
                    let mut told = changes.clone();
                    told.sort_unstable();
                    if order.get(revision) != Some(&told) {
                        let has = order.get(revision);
                        seen.wrong
                            .push(format!("by the log of member {at} revision {revision} changes {has:?}, a watcher was told {told:?}"));
                    }
                }
                if order.len() != seen.log.revisions.len() {
                    let (has, told) = (order.len(), seen.log.revisions.len());
                    seen.wrong.push(format!("the log of member {at} has {has} revisions, a watcher was told of {told}"));
                }
                self.sums.ordered += order.len();
                return Ok(());
            }
            // The leader applies what it may not have written itself.
            if began.elapsed() > PATIENCE {
                return Err(format!("no member's log comes to revision {}: {:?}", seen.log.end, self.order));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
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
            let wrong = watch::check(told, &seen.log, seen.log.base + 1, load::scope(at));
            seen.wrong.extend(wrong.into_iter().map(|wrong| format!("watcher {at}, at member {}: {wrong}", at % MEMBERS)));
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
            let title = format!("what watcher {at} was told, at member {} of {:?}", at % MEMBERS, load::scope(at));
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
