//! kill -9 at random, and SIGTERM: the process dies, the operating system lives on.

use std::time::{Duration, Instant};

use rand::prelude::*;
use rand::rngs::StdRng;

use crate::ledger::{Ledger, Mirror};
use crate::load::{Load, Shape};
use crate::member::{Home, Member, reference, subject};
use crate::{random, run, setting, unavailable};

/// The most requests that a round waits for. Beyond it a round shows nothing new.
const MOST: u64 = 800;

/// A load unlike the one of the round before.
pub fn shape(rng: &mut StdRng) -> Shape {
    Shape {
        writers: *[1, 3, 8].choose(rng).expect("not empty"),
        heavy: rng.random_ratio(1, 6),
        compact: rng.random_ratio(2, 3),
        defragment: rng.random_ratio(1, 3),
    }
}

/// Lets a load run until a random number of requests has been acknowledged; at times for some seconds, in which the log is cut off.
pub async fn run_for_a_while(load: &Load, rng: &mut StdRng) {
    /// Even a slow disk acknowledges something in this time.
    const PATIENCE: Duration = Duration::from_secs(10);
    let begun = Instant::now();
    if rng.random_ratio(1, 10) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(5_000..7_000))).await;
    }
    let wanted = rng.random_range(0..MOST);
    while load.acknowledged() < wanted && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
}

/// Starts a member that has crashed, at times after killing it once more in the middle of its start.
pub async fn start_again(member: &mut Member, ledger: &mut Ledger, rng: &mut StdRng) {
    if rng.random_ratio(1, 3) {
        member.spawn();
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..150))).await;
        member.kill();
    }
    let took = member.start().await;
    ledger.note_start(took);
}

async fn killed_under_load(name: &str, rounds: u64, mirrored: bool, one_writer: bool) {
    let mut rng = random();
    let (home, program) = (Home::new(name), subject());
    let mut mirror = None;
    if mirrored {
        let Some(reference) = reference() else {
            return unavailable("QUORATE_REFERENCE_DIR is not set, so that there is nothing to compare HashKV with");
        };
        mirror = Some(Mirror::start(&reference, home.path()).await);
    }
    let mut member = Member::new(&program, home.path(), &home.path().join("data"), &[]);
    let mut ledger = Ledger::new();
    member.start().await;
    for _ in 0..rounds {
        let shape = if one_writer { Shape { writers: 1, ..shape(&mut rng) } } else { shape(&mut rng) };
        let load = Load::start(&member, &ledger, shape, &mut rng).await;
        run_for_a_while(&load, &mut rng).await;
        member.assert_calm();
        member.kill();
        let round = load.finish().await;
        start_again(&mut member, &mut ledger, &mut rng).await;
        ledger.settle(&member, round, &mut rng).await;
        if let Some(mirror) = &mut mirror {
            mirror.compare(&mut ledger, &member).await;
        }
        member.assert_calm();
    }
    println!("{}", ledger.summary(name));
}

/// Many writers; after each round HashKV is compared with a reference that was sent the same requests in the same order, if
/// there is a reference.
#[test]
fn killed_at_random_nothing_is_lost() {
    let rounds = setting("QUORATE_KILL_ROUNDS", 5, 50);
    run(killed_under_load("kill", rounds, reference().is_some(), false));
}

/// One writer, whose requests the reference gets one by one.
#[test]
fn killed_at_random_the_hash_equals_the_references() {
    run(killed_under_load("kill-one-writer", setting("QUORATE_KILL_ROUNDS", 5, 50).div_ceil(5), true, true));
}

#[test]
fn told_to_stop_it_ends_well_and_loses_nothing() {
    run(async {
        let mut rng = random();
        let (home, program) = (Home::new("stop"), subject());
        let mut member = Member::new(&program, home.path(), &home.path().join("data"), &[]);
        let mut ledger = Ledger::new();
        member.start().await;
        for _ in 0..setting("QUORATE_STOP_ROUNDS", 2, 10) {
            let load = Load::start(&member, &ledger, shape(&mut rng), &mut rng).await;
            run_for_a_while(&load, &mut rng).await;
            let status = member.stop().await;
            // etcd ends itself by the same signal instead.
            assert!(program.is_etcd || status.code() == Some(0), "{status}: {}", member.log());
            member.assert_calm();
            let round = load.finish().await;
            let took = member.start().await;
            ledger.note_start(took);
            ledger.settle(&member, round, &mut rng).await;
        }
        println!("{}", ledger.summary("stop"));
    });
}

#[test]
fn a_second_server_on_a_directory_is_refused() {
    run(async {
        let (home, program) = (Home::new("two"), subject());
        if program.is_etcd {
            return; // etcd waits for the lock instead.
        }
        let data = home.path().join("data");
        let mut first = Member::new(&program, home.path(), &data, &[]);
        let mut second = Member::new(&program, home.path(), &data, &[]);
        first.start().await;
        let refusal = second.try_start().await.expect_err("the directory is taken");
        assert_eq!(refusal.status.code(), Some(1), "{refusal:?}");
        assert!(refusal.log.contains(&*data.to_string_lossy()) && refusal.log.contains("in use"), "{refusal:?}");
        assert!(first.answers().await);
        first.kill();
        second.start().await;
    });
}
