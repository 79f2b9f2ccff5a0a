//! What is counted of backups: how many were made, how many failed, and when the newest good one was made.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::Counter;

/// See the module's head. All times are seconds since 1970; 0 stands for never.
#[derive(Debug, Default)]
pub struct Backups {
    /// Backups made and verified.
    pub made: Counter,
    /// Tries that came to nothing.
    pub failed: Counter,
    /// Since when there should be backups.
    since: AtomicU64,
    newest: AtomicU64,
}

impl Backups {
    /// From now on there should be backups; the newest that is there already is of this time.
    pub(crate) fn begin(&self, now: SystemTime, newest: Option<SystemTime>) {
        self.since.store(seconds(now), Ordering::Relaxed);
        if let Some(newest) = newest {
            self.newest.fetch_max(seconds(newest), Ordering::Relaxed);
        }
    }

    /// A good one was made at this time. It is the newest, also when the clock was ahead before.
    pub(crate) fn note(&self, made: SystemTime) {
        self.newest.store(seconds(made), Ordering::Relaxed);
    }

    /// The newest that was found where they are kept; others may have made it, or removed what there was.
    pub(crate) fn see(&self, newest: Option<SystemTime>) {
        self.newest.store(newest.map_or(0, seconds), Ordering::Relaxed);
    }

    /// When the newest was made.
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Relaxed)
    }

    /// How old the newest is, in seconds. Without any it is how long they have been wanted, so that one rule tells of a backup that is too
    /// old and of one that never came; where none are wanted, 0.
    pub fn age(&self, now: SystemTime) -> u64 {
        let newest = self.newest();
        let from = if newest == 0 { self.since.load(Ordering::Relaxed) } else { newest };
        if from == 0 { 0 } else { seconds(now).saturating_sub(from) }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_is_that_of_the_newest_or_of_the_wish() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let backups = Backups::default();
        assert_eq!((backups.age(at(500)), backups.newest()), (0, 0));
        backups.begin(at(100), None);
        assert_eq!((backups.age(at(500)), backups.newest()), (400, 0));
        backups.note(at(9000));
        backups.note(at(450));
        assert_eq!((backups.age(at(500)), backups.newest()), (50, 450));
        assert_eq!(backups.age(at(440)), 0, "a clock that was set back");
        backups.see(Some(at(470)));
        assert_eq!(backups.age(at(500)), 30);
        backups.see(None);
        assert_eq!((backups.age(at(500)), backups.newest()), (400, 0));
        let again = Backups::default();
        again.begin(at(1000), Some(at(900)));
        assert_eq!(again.age(at(1001)), 101);
    }
}
