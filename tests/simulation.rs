//! Whole clusters in simulated time, from seeds: the members are the real ones, and the seed decides when what is sent arrives, whose
//! disk takes how long, who crashes and loses what was not synced, who is paused or cut off, who joins and who leaves.
//!
//! After each run everything is healed and judged (see `simulation/judge.rs`). The same seed gives the same run, if tokio is built for
//! it; the alias `cargo sim` does that, with a directory of its own and optimised.
//!
//! ```text
//! cargo sim                                                     # new seeds for 20 seconds, and all that ever failed
//! QUORATE_SIM_SECONDS=120 cargo sim                             # ... for 2 minutes
//! QUORATE_SIM_FROM=1 QUORATE_SIM_SEEDS=10000 cargo sim          # these
//! QUORATE_SIM_FROM=17 QUORATE_SIM_SEEDS=1 QUORATE_SIM_TRACE=/tmp/trace cargo sim   # one, with everything that happened in a file
//! QUORATE_SIM_FAULT=EarlyAcknowledgement QUORATE_SIM_FROM=1 cargo sim whatever     # with a mistake built in, which is to be found
//! ```
//! That the judges see something is itself tested: `the_judges_find_what_is_built_in` plays each of the mistakes that can be built into
//! the members. And that there was something to see: who runs [`ENOUGH`] seeds or more has to have seen all of [`TO_BE_SEEN`].
#[path = "checkers/mod.rs"]
mod checkers;
#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/joint.rs"]
mod joint;
#[path = "simulation/judge.rs"]
mod judge;
#[path = "simulation/load.rs"]
mod load;
#[path = "common/requests.rs"]
mod requests;
#[path = "simulation/scenario.rs"]
mod scenario;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use quorate::sim::Fault;
use scenario::Report;

/// Seeds that have found something, each with a word on what it was. They are run each time.
const FAILED_BEFORE: &[(u64, &str)] = &[(1762, "one that was removed before it was sent anything went on for ever")];

/// What so many seeds must have seen between them; otherwise something is no longer tried at all.
const TO_BE_SEEN: &[&str] = &[
    "bookmarks",
    "calls of InstallSnapshot",
    "calls of Propose",
    "calls of PutSnapshot",
    "calls of ReadIndex",
    "calls of Renew",
    "calls of TransferLeader",
    "calls of Vote",
    "compactions",
    "earlier revisions read",
    "guards that held",
    "leases",
    "leases whose end was timed",
    "members joined",
    "members removed",
    "moves of the lead",
    "promotions",
    "spans read",
    "writes without an answer that took effect",
];
const ENOUGH: u64 = 200;

/// The mistakes that can be built in, and a word by which a judge is known that has found it.
const MISTAKES: [(Fault, &str); 4] = [
    (Fault::RestoredLeader, "stale: "),
    (Fault::EarlyAcknowledgement, ""),
    (Fault::UnconfirmedReads, "stale: "),
    (Fault::UnsureRenewals, "lease"),
];

/// How many seeds a mistake may stay hidden: several times what it takes.
const HIDDEN_MAX: u64 = 20;

/// How long new seeds are tried, unless told otherwise.
const SECONDS: u64 = 20;

thread_local! {
    /// Panics of tasks, which tokio keeps to itself.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static IS_EXPECTED: Cell<bool> = const { Cell::new(false) };
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn fault() -> Option<Fault> {
    let name = std::env::var("QUORATE_SIM_FAULT").ok()?;
    let all = MISTAKES.map(|(fault, _)| fault);
    let found = all.into_iter().find(|fault| format!("{fault:?}") == name);
    Some(found.unwrap_or_else(|| panic!("QUORATE_SIM_FAULT={name}: there are {all:?}")))
}

fn listen_for_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            // With a mistake built in they are to be expected, and to say where they come from takes longer than a run.
            if !IS_EXPECTED.get() {
                before(info);
            }
        }));
    });
}

/// Runs one seed, and judges it.
fn run(seed: u64, fault: Option<Fault>, keep_lines: bool) -> Report {
    play(seed, fault, fault, keep_lines)
}

/// The same, with what brings a mistake to light whether or not it is built in.
fn play(seed: u64, fault: Option<Fault>, aim: Option<Fault>, keep_lines: bool) -> Report {
    listen_for_panics();
    PANICS.take();
    IS_EXPECTED.set(fault.is_some());
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary directory");
    let mut report = quorate::sim::run(seed, fault, dir.path(), |cluster| scenario::play(cluster, seed, aim, keep_lines));
    IS_EXPECTED.set(false);
    report.wrong.extend(PANICS.take().into_iter().map(|panic| format!("a task has panicked: {panic}")));
    report
}

fn command(seed: u64, fault: Option<Fault>) -> String {
    let fault = fault.map_or_else(String::new, |fault| format!("QUORATE_SIM_FAULT={fault:?} "));
    format!("{fault}QUORATE_SIM_FROM={seed} QUORATE_SIM_SEEDS=1 QUORATE_SIM_TRACE=trace.txt cargo sim")
}

fn text(seed: u64, fault: Option<Fault>, report: &Report) -> String {
    let shown: String = report.wrong.iter().take(5).map(|wrong| format!("  {wrong}\n")).collect();
    format!("seed {seed}: {} things are wrong, first of them\n{shown}again: {}", report.wrong.len(), command(seed, fault))
}

/// Runs seeds on all processors. Returns the texts of those that failed, and the sums of what was seen.
fn run_all(seeds: impl Iterator<Item = u64> + Send, fault: Option<Fault>) -> (Vec<String>, BTreeMap<String, u64>) {
    let jobs = setting("QUORATE_SIM_JOBS").unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u64));
    let (seeds, failed, sums) = (Mutex::new(seeds), Mutex::new(Vec::new()), Mutex::new(BTreeMap::new()));
    let (many, done) = (AtomicBool::new(false), AtomicU64::new(0));
    fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while !many.load(SeqCst) {
                    let Some(seed) = lock(&seeds).next() else { return };
                    let report = run(seed, fault, false);
                    let count = done.fetch_add(1, SeqCst) + 1;
                    if count % 500 == 0 {
                        println!("{count} seeds, {} failed", lock(&failed).len());
                    }
                    if !report.wrong.is_empty() {
                        let text = text(seed, fault, &report);
                        println!("{text}");
                        lock(&failed).push(text);
                        many.store(lock(&failed).len() >= 20 || fault.is_some(), SeqCst);
                    }
                    let mut sums = lock(&sums);
                    *sums.entry("seeds".into()).or_insert(0) += 1;
                    for (what, times) in report.counts {
                        *sums.entry(what).or_insert(0) += times;
                    }
                }
            });
        }
    });
    (failed.into_inner().unwrap_or_default(), sums.into_inner().unwrap_or_default())
}

#[test]
fn whatever_the_seed_they_keep_their_word() {
    let fault = fault();
    if let Ok(path) = std::env::var("QUORATE_SIM_TRACE") {
        let seed = setting("QUORATE_SIM_FROM").expect("QUORATE_SIM_TRACE is for one seed, QUORATE_SIM_FROM");
        let report = run(seed, fault, true);
        std::fs::write(&path, report.lines.join("\n")).expect("room for the trace");
        assert!(report.wrong.is_empty(), "{}", text(seed, fault, &report));
        return;
    }
    let began = Instant::now();
    let limit = Duration::from_secs(setting("QUORATE_SIM_SECONDS").unwrap_or(SECONDS));
    let from = setting("QUORATE_SIM_FROM").unwrap_or_else(|| rand::random_range(1..1_000_000_000));
    let seeds: Box<dyn Iterator<Item = u64> + Send> = match setting("QUORATE_SIM_SEEDS") {
        Some(count) => Box::new(from..from + count),
        None => Box::new((from..).take_while(move |_| began.elapsed() < limit)),
    };
    let before = FAILED_BEFORE.iter().map(|(seed, _)| *seed).filter(|_| fault.is_none());
    println!("new seeds from {from}");
    let (failed, sums) = run_all(before.chain(seeds), fault);
    let unseen: Vec<&str> = TO_BE_SEEN.iter().copied().filter(|what| sums.get(*what).is_none_or(|times| *times == 0)).collect();
    let seeds = sums.get("seeds").copied().unwrap_or(0);
    let sums: String = sums.iter().map(|(what, times)| format!("\n  {times} {what}")).collect();
    println!("in {:?}:{sums}", began.elapsed());
    assert!(failed.is_empty(), "{} seeds failed; the first: {}", failed.len(), failed.first().map_or("", String::as_str));
    assert!(fault.is_some() || seeds < ENOUGH || unseen.is_empty(), "{seeds} seeds have never seen {unseen:?}");
}

/// A judge that has gone blind is as content as one that has nothing to find. And what is found is the mistake: the same without it is right.
#[test]
fn the_judges_find_what_is_built_in() {
    for (fault, word) in MISTAKES {
        let began = Instant::now();
        let find = |seed: u64| run(seed, Some(fault), false).wrong.into_iter().find(|wrong| wrong.contains(word));
        let found = (1..=HIDDEN_MAX).find_map(|seed| Some((seed, find(seed)?)));
        let Some((seed, wrong)) = found else { panic!("{fault:?}: in {HIDDEN_MAX} seeds nothing was wrong") };
        let sound = play(seed, None, Some(fault), false);
        assert!(sound.wrong.is_empty(), "{fault:?} is not built in, and with seed {seed} this is wrong: {:#?}", sound.wrong);
        println!("{fault:?}: found by seed {seed} after {:.1?}: {}", began.elapsed(), wrong.lines().next().unwrap_or_default());
    }
}

/// Twice the same, to the last message: otherwise no seed could be run again.
#[test]
#[cfg_attr(not(tokio_unstable), ignore = "needs a tokio whose random numbers can be given: cargo sim")]
fn the_same_seed_gives_the_same_run() {
    let mut told = 0;
    for seed in 1..=6 {
        let [once, again] = [(); 2].map(|()| run(seed, None, true));
        if once.trace != again.trace {
            let differ = once.lines.iter().zip(&again.lines).position(|(a, b)| a != b).unwrap_or(0);
            let around = |lines: &[String]| lines.iter().skip(differ.saturating_sub(5)).take(8).cloned().collect::<Vec<_>>().join("\n");
            panic!("seed {seed}, line {differ}:\n{}\n---\n{}", around(&once.lines), around(&again.lines));
        }
        told += once.trace.1;
    }
    assert!(told > 6000, "{told} lines in all: too little for a comparison");
}
