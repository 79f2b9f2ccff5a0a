//! Power loss: what was not synced is gone, whatever the operating system had accepted.

use std::time::Duration;

use rustix::process::Signal;

use crate::disk::PowerDisk;
use crate::kill::{run_for_a_while, shape, start_again};
use crate::ledger::{Ledger, Mirror};
use crate::load::Load;
use crate::member::{Home, Member, reference, subject};
use crate::{random, run, setting, unavailable};

const DISK_BYTES: u64 = 3 << 30;

#[test]
fn power_lost_at_random_nothing_is_lost() {
    run(async {
        let mut rng = random();
        let (home, program) = (Home::new("power"), subject());
        let mut disk = match PowerDisk::new(home.path(), DISK_BYTES) {
            Ok(disk) => disk,
            Err(why) => return unavailable(&why),
        };
        let mut mirror = match reference() {
            Some(reference) => Some(Mirror::start(&reference, home.path()).await),
            None => None,
        };
        let mut member = Member::new(&program, home.path(), &disk.mount.path.join("data"), &[]);
        let mut ledger = Ledger::new();
        member.start().await;
        for _ in 0..setting("QUORATE_POWER_ROUNDS", 3, 20) {
            let load = Load::start(&member, &ledger, shape(&mut rng), &mut rng).await;
            run_for_a_while(&load, &mut rng).await;
            // Paused first: an fsync that the cut meets half-way may return success, which no program can help.
            member.signal(Signal::STOP);
            tokio::time::sleep(Duration::from_millis(30)).await;
            disk.cut_power().expect("the power can be cut");
            member.assert_calm();
            member.kill();
            let round = load.finish().await;
            disk.power_off().expect("nobody uses the disk");
            disk.power_on().expect("the file system recovers");
            start_again(&mut member, &mut ledger, &mut rng).await;
            ledger.settle(&member, round, &mut rng).await;
            if let Some(mirror) = &mut mirror {
                mirror.compare(&mut ledger, &member).await;
            }
            member.assert_calm();
        }
        member.kill();
        println!("{}", ledger.summary("power"));
    });
}
