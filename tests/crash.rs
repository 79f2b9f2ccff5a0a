//! Crashes: the real binary under load, and everything that can befall it from outside. What it has acknowledged must be there
//! afterwards, and nothing that is wrong may ever be served.
//!
//! | file | fault | count, by default and on CI | set by |
//! |---|---|---|---|
//! | `kill.rs` | kill -9 at random under load, also during the start | 5, 50 rounds | `QUORATE_KILL_ROUNDS` |
//! | `kill.rs` | SIGTERM under load; two servers on one directory | 2, 10 rounds | `QUORATE_STOP_ROUNDS` |
//! | `power.rs` | the power of the disk is cut | 3, 20 rounds | `QUORATE_POWER_ROUNDS` |
//! | `flip.rs` | a byte is flipped in a file of a stopped member | 3, 40 for each kind of file | `QUORATE_FLIPS` |
//! | `sync.rs` | fsync, fdatasync or a write fails with EIO | 1, 3 rounds of each | `QUORATE_SYNC_ROUNDS` |
//! | `full.rs` | the disk, or the space quota, is full | once | |
//!
//! `member.rs` runs the processes, `wire.rs` speaks with them, `load.rs` makes the load and keeps a record of every answer, `model.rs` knows what each request
//! ought to do, and `ledger.rs` judges. Where a reference etcd is at hand (`QUORATE_REFERENCE_DIR`) it is sent the same requests in the
//! same order, and HashKV must be equal.
//!
//! `power.rs` and `full.rs` mount file systems, which takes root, and `sync.rs` needs strace. What cannot run says `skipped: ...` in one
//! line, and fails when `CI` is `true`. `QUORATE_CRASH_SEED` repeats a run's choices (not its timing), `QUORATE_CRASH_KEEP=1` keeps
//! the directories of a test that failed, `QUORATE_SUBJECT=etcd` tries the tests themselves on etcd.
//!
//! ```text
//! cargo test --test crash                          # a minute or two
//! QUORATE_KILL_ROUNDS=200 cargo test --test crash killed -- --nocapture
//! CI=true QUORATE_REFERENCE_DIR=/opt/etcd cargo test --test crash -- --nocapture
//! ```
#![cfg(feature = "cli")]

#[allow(dead_code, reason = "shared with the fault tests")]
#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/flip.rs"]
mod flip;
#[path = "crash/full.rs"]
mod full;
#[path = "crash/kill.rs"]
mod kill;
#[path = "crash/ledger.rs"]
mod ledger;
#[path = "crash/load.rs"]
mod load;
#[path = "crash/member.rs"]
mod member;
#[path = "crash/model.rs"]
mod model;
#[path = "crash/power.rs"]
mod power;
#[path = "crash/sync.rs"]
mod sync;
#[path = "crash/wire.rs"]
mod wire;

use std::sync::OnceLock;

use rand::prelude::*;
use rand::rngs::StdRng;

/// Whether every test must run, and in full.
fn on_ci() -> bool {
    std::env::var("CI").is_ok_and(|ci| ci == "true")
}

/// A number from a variable; otherwise its default, or that of CI.
fn setting(name: &str, default: u64, on_ci_default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) if on_ci() => on_ci_default,
        Err(_) => default,
    }
}

/// Says that a test cannot run here, and fails it where it must.
fn unavailable(why: &str) {
    println!("skipped: {why}");
    assert!(!on_ci(), "with CI=true nothing may be skipped: {why}");
}

/// Choices for one test. All tests of a process have the same seed, which is printed when a test fails.
fn random() -> StdRng {
    static SEED: OnceLock<u64> = OnceLock::new();
    let seed =
        *SEED.get_or_init(|| setting("QUORATE_CRASH_SEED", rand::rng().random_range(0..1_000_000), rand::rng().random_range(0..1_000_000)));
    println!("QUORATE_CRASH_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Runs a test's one future to its end.
fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(test);
}
