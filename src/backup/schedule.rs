//! When the next backup is due: a cron expression, in UTC.
//!
//! ```text
//! schedule "0 */12 * * *"    next(10:00) = 12:00    next(12:00) = 24:00    and up to the jitter later, by chance
//! ```
//!
//! A time that has passed while a backup was being made, or while the process was down, is not made up for: the next one comes anyway.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use croner::Cron;

use crate::world;

/// Longest sleep before the clock is looked at again: it may be set, and the machine may sleep.
const NAP: Duration = Duration::from_secs(30);

/// A schedule.
#[derive(Debug)]
pub(super) struct Schedule {
    cron: Cron,
    jitter: Duration,
}

impl Schedule {
    pub fn new(cron: Cron, jitter: Duration) -> Self {
        Schedule { cron, jitter }
    }

    /// The first time of the schedule after another; none if there is none.
    pub fn next(&self, after: SystemTime) -> Option<SystemTime> {
        self.cron.find_next_occurrence(&DateTime::<Utc>::from(after), false).ok().map(SystemTime::from)
    }

    /// Somewhere between nothing and the jitter.
    pub fn delay(&self) -> Duration {
        let jitter = u64::try_from(self.jitter.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(world::random().checked_rem(jitter).unwrap_or(0))
    }
}

/// Returns when the clock has come to a time.
///
/// # Errors
/// What time it is, when the clock was set back meanwhile.
pub(super) async fn sleep_until(due: SystemTime) -> Result<(), SystemTime> {
    let mut before = SystemTime::now();
    loop {
        let now = SystemTime::now();
        let Some(left) = nap(before, now, due)? else { return Ok(()) };
        before = now;
        tokio::time::sleep(left).await;
    }
}

/// How long to sleep before the next look; none when the time has come.
fn nap(before: SystemTime, now: SystemTime, due: SystemTime) -> Result<Option<Duration>, SystemTime> {
    if now < before {
        return Err(now);
    }
    Ok(due.duration_since(now).ok().filter(|left| !left.is_zero()).map(|left| left.min(NAP)))
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn at(text: &str) -> SystemTime {
        DateTime::parse_from_rfc3339(text).unwrap().with_timezone(&Utc).into()
    }

    fn next(cron: &str, after: &str) -> Option<SystemTime> {
        Schedule::new(Cron::from_str(cron).unwrap(), Duration::ZERO).next(at(after))
    }

    #[test]
    fn the_next_time_is_after_the_last() {
        for (cron, after, due) in [
            ("0 */12 * * *", "2026-11-23T10:00:00Z", "2026-11-23T12:00:00Z"),
            ("0 */12 * * *", "2026-11-23T12:00:00Z", "2026-11-24T00:00:00Z"),
            ("0 */12 * * *", "2026-11-23T12:00:00.001Z", "2026-11-24T00:00:00Z"),
            ("*/5 * * * * *", "2026-11-23T12:00:03.2Z", "2026-11-23T12:00:05Z"),
            ("30 2 29 2 *", "2026-11-23T12:00:00Z", "2028-02-29T02:30:00Z"),
            ("0 0 * * SUN", "2026-11-23T12:00:00Z", "2026-11-29T00:00:00Z"),
            ("@daily", "2026-12-31T12:00:00Z", "2027-01-01T00:00:00Z"),
        ] {
            assert_eq!(next(cron, after), Some(at(due)), "{cron} after {after}");
        }
        assert_eq!(next("0 0 30 2 *", "2026-11-23T12:00:00Z"), None);
    }

    #[test]
    fn the_delay_is_below_the_jitter() {
        let cron = Cron::from_str("@daily").unwrap();
        assert_eq!(Schedule::new(cron.clone(), Duration::ZERO).delay(), Duration::ZERO);
        let schedule = Schedule::new(cron, Duration::from_secs(5));
        let delays: std::collections::BTreeSet<Duration> = (0..100).map(|_| schedule.delay()).collect();
        assert!(delays.len() > 50 && delays.last() < Some(&Duration::from_secs(5)));
    }

    #[test]
    fn a_clock_that_is_set_back_is_noticed() {
        let (before, due) = (at("2027-11-23T12:00:00Z"), at("2027-11-24T00:00:00Z"));
        let second = Duration::from_secs(1);
        assert_eq!(nap(before, at("2026-11-23T12:00:00Z"), due), Err(at("2026-11-23T12:00:00Z")));
        assert_eq!(nap(before, before, due), Ok(Some(NAP)));
        assert_eq!(nap(before, due - second, due), Ok(Some(second)));
        assert_eq!((nap(before, due, due), nap(before, due + second, due)), (Ok(None), Ok(None)));
    }

    #[tokio::test]
    async fn a_time_that_has_passed_is_not_waited_for() {
        sleep_until(SystemTime::now() - Duration::from_secs(5)).await.unwrap();
        let due = SystemTime::now() + Duration::from_millis(50);
        sleep_until(due).await.unwrap();
        assert!(SystemTime::now() >= due);
    }
}
