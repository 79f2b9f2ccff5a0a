//! No space: on the disk, or within the quota. Requests that need space are refused with etcd's error, and everything else goes on;
//! with space again all is as before, without anybody's help.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;

use crate::disk::small_disk;
use crate::ledger::{Ledger, Mirror};
use crate::load::{Entry, Load, Outcome, Round, Shape};
use crate::member::{Home, Member, reference, subject, tail};
use crate::model::Op;
use crate::{random, run, unavailable};

/// Room for two segments of the log, a small state, and not much more.
const DISK_BYTES: u64 = 160 << 20;

/// A quota that the load uses up in no time.
const QUOTA: &str = "--quota-backend-bytes=16777216";

/// How long it may take until a member notices that there is no space, or that there is again. Also how long it may be silent.
const NOTICE: Duration = Duration::from_secs(30);

/// How many refusals are awaited, so that the member is seen to live on.
const REFUSALS: u64 = 40;

/// How many Puts are awaited once there is space again.
const PUTS: u64 = 50;

const HEAVY: Shape = Shape { writers: 4, heavy: true, compact: false, defragment: false };
const LIGHT: Shape = Shape { writers: 4, heavy: false, compact: true, defragment: false };

/// Takes all space that is left, in a file.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).expect("an empty file needs no space");
    let chunk = [1; 4096];
    while file.write_all(&chunk).is_ok() {}
}

/// Loads a member until there is enough of what is counted.
///
/// # Panics
/// When the member ends, or what is counted does not begin to grow, or stops growing.
async fn load_until(
    member: &mut Member,
    ledger: &Ledger,
    shape: Shape,
    rng: &mut StdRng,
    what: &str,
    count: impl Fn(&Load) -> bool,
) -> Round {
    let load = Load::start(member, ledger, shape, rng).await;
    let mut progress = (Instant::now(), 0);
    let begun = Instant::now();
    while !count(&load) {
        let said = load.acknowledged() + load.no_space();
        if said > progress.1 {
            progress = (Instant::now(), said);
        }
        assert!(progress.0.elapsed() < NOTICE, "{what}: silent after {said} answers, {:#?}:\n{}", load.unknown(), tail(&member.log()));
        assert!(begun.elapsed() < 4 * NOTICE, "{what}: not within {:?}, after {said} answers:\n{}", 4 * NOTICE, tail(&member.log()));
        assert!(member.exited().is_none(), "{what}: it has ended:\n{}", tail(&member.log()));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("{what}: after {} ms; {} acknowledged, {} without space", begun.elapsed().as_millis(), load.acknowledged(), load.no_space());
    load.finish().await
}

/// Kills the member, starts it, and compares everything once more.
async fn restart(member: &mut Member, ledger: &mut Ledger, rng: &mut StdRng) {
    member.assert_calm();
    member.kill();
    member.start().await;
    ledger.settle(member, Round::default(), rng).await;
}

async fn compare(member: &Member, ledger: &mut Ledger, home: &Home) {
    if let Some(reference) = reference() {
        Mirror::start(&reference, home.path()).await.compare(ledger, member).await;
    }
}

async fn full_disk(restarted: bool) {
    let mut rng = random();
    let (home, program) = (Home::new("full"), subject());
    if program.is_etcd {
        return; // etcd dies of a full disk.
    }
    let disk = match small_disk(&home.path().join("disk"), DISK_BYTES) {
        Ok(disk) => disk,
        Err(why) => return unavailable(&why),
    };
    let mut member = Member::new(&program, home.path(), &disk.path.join("data"), &[]);
    let mut ledger = Ledger::new();
    member.start().await;
    let ballast = disk.path.join("ballast");
    fill(&ballast);
    let round = load_until(&mut member, &ledger, HEAVY, &mut rng, "full disk", |load| load.no_space() >= REFUSALS).await;
    // This reads everything there is, too.
    ledger.settle(&member, round, &mut rng).await;
    if restarted {
        restart(&mut member, &mut ledger, &mut rng).await;
    }

    let load = Load::start(&member, &ledger, LIGHT, &mut rng).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let round = load.finish().await;
    let frees = |entry: &&Entry| matches!(entry.op, Op::Delete { .. } | Op::Compact { .. } | Op::Revoke { .. });
    let done = |entry: &Entry| matches!(entry.outcome, Outcome::Done(_));
    assert!(
        round.entries().filter(frees).all(done),
        "what frees space was refused: {:?}",
        round.entries().filter(frees).find(|it| !done(it))
    );
    assert!(round.writers.iter().flatten().any(|entry| frees(&entry)) && !round.compactions.is_empty(), "too little was tried");
    ledger.settle(&member, round, &mut rng).await;

    std::fs::remove_file(&ballast).expect("the ballast can be removed");
    let round = load_until(&mut member, &ledger, LIGHT, &mut rng, "space again", |load| load.puts() >= PUTS).await;
    ledger.settle(&member, round, &mut rng).await;
    restart(&mut member, &mut ledger, &mut rng).await;
    compare(&member, &mut ledger, &home).await;
    member.kill();
    println!("{}", ledger.summary("full disk"));
}

#[test]
fn a_full_disk_is_survived() {
    run(full_disk(false));
}

#[test]
fn a_full_disk_is_survived_across_a_crash() {
    run(full_disk(true));
}

#[test]
fn a_used_up_quota_heals() {
    run(async {
        let mut rng = random();
        let (home, program) = (Home::new("quota"), subject());
        if program.is_etcd {
            return; // etcd's alarm is taken back by hand.
        }
        let mut member = Member::new(&program, home.path(), &home.path().join("data"), &[QUOTA]);
        let mut ledger = Ledger::new();
        member.start().await;
        let round = load_until(&mut member, &ledger, HEAVY, &mut rng, "quota used up", |load| load.no_space() >= REFUSALS).await;
        ledger.settle(&member, round, &mut rng).await;
        assert!(has_alarm(&member).await, "no alarm");
        restart(&mut member, &mut ledger, &mut rng).await;
        assert!(has_alarm(&member).await, "no alarm after a restart");

        // Deletes and compactions make room; then Puts are taken, use it up, and so on.
        let again = Shape { compact: true, ..HEAVY };
        let round = load_until(&mut member, &ledger, again, &mut rng, "room within the quota", |load| load.puts() >= PUTS).await;
        ledger.settle(&member, round, &mut rng).await;
        let round = load_until(&mut member, &ledger, LIGHT, &mut rng, "little used", |load| load.puts() >= 4 * PUTS).await;
        ledger.settle(&member, round, &mut rng).await;
        let begun = Instant::now();
        while has_alarm(&member).await {
            assert!(begun.elapsed() < NOTICE, "the alarm stays");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        restart(&mut member, &mut ledger, &mut rng).await;
        compare(&member, &mut ledger, &home).await;
        println!("{}", ledger.summary("quota"));
    });
}

async fn has_alarm(member: &Member) -> bool {
    member.client().has_alarm().await.expect("Alarm is answered")
}
