//! What takes longer than it should, and how often the log says so.
//!
//! A [`Slow`] has the threshold and remembers when it last told: on a machine whose disk has stalled everything is slow at
//! once, and a line for each request would be one more load.
//!
//! ```text
//! 10.0 s  a request takes 2 s    told, 0 unreported before it
//! 10.1 s  another one            not told
//! 11.2 s  another one            told, 1 unreported before it
//! ```

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::lock::lock;

/// One line in this time; what comes in between is only counted.
const EVERY: Duration = Duration::from_secs(1);

/// See the module's head. Each kind of thing has its own.
#[derive(Debug)]
pub(crate) struct Slow {
    threshold: Duration,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    last: Option<Duration>,
    unreported: u64,
}

impl Slow {
    /// Beyond `threshold` something is slow.
    pub fn new(threshold: Duration) -> Self {
        Slow { threshold, told: Mutex::default() }
    }

    /// Whether that is slow. It costs a comparison.
    pub fn is_slow(&self, took: Duration) -> bool {
        took > self.threshold
    }

    /// Whether to tell of something slow at `now`, a time on any monotonic clock: then how many went unreported since last time.
    pub fn tell(&self, now: Duration) -> Option<u64> {
        let mut told = lock(&self.told);
        if told.last.is_some_and(|last| now < last.saturating_add(EVERY)) {
            told.unreported += 1;
            return None;
        }
        told.last = Some(now);
        Some(std::mem::take(&mut told.unreported))
    }
}

/// Refusals, of which the log is told in the same way.
#[derive(Debug)]
pub(crate) struct Refusals {
    slow: Slow,
    began: Instant,
}

impl Refusals {
    pub fn new() -> Self {
        Refusals { slow: Slow::new(Duration::ZERO), began: Instant::now() }
    }

    /// Whether to tell of one now: then how many went unreported since last time.
    pub fn tell(&self) -> Option<u64> {
        self.slow.tell(self.began.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second() {
        let slow = Slow::new(Duration::from_millis(100));
        assert!(!slow.is_slow(Duration::from_millis(100)) && slow.is_slow(Duration::from_millis(101)));
        let told: Vec<_> = [0, 1, 999, 1000, 1500, 5000, 6000].map(|ms| slow.tell(Duration::from_millis(ms))).into();
        assert_eq!(told, [Some(0), None, None, Some(2), None, Some(1), Some(0)]);
    }
}
