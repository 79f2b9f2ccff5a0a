//! Whether metadata can be written and read: one signal, made of many probes, that does not flap.
//!
//! Twice a second the node tries what its host would: a linearizable read, which needs a quorum as a write does but changes nothing, and a
//! look at the alarms. A serializable read, made beside it or when it fails, tells what can be read without a quorum. [`Tracker`] makes a
//! state of the outcomes; it is told the time, so that its rules can be tested without waiting.
//!
//! ```text
//!              good                      bad                      no good one for 5 s
//!  Starting ---------->  ReadWrite  ----------->  Degraded  ------------------------->  ReadOnly
//!      |                     ^                        |                                    |  ^
//!      |                     +---- 3 good in a row ---+----------- 3 good in a row --------+  |
//!      +--------- no good one for 5 s, or a certain refusal (no space, no login, removed) ----+
//! ```
//!
//! - A change of leader takes less than [`PATIENCE`], so it is `Degraded` and never `ReadOnly`.
//! - A network that flaps leaves the state where it is: now and then a good probe keeps it from `ReadOnly`, now and then a bad one
//!   from `ReadWrite`.
//! - Latency changes nothing, below the probe's timeout. [`Latencies`] tells the log of a slow server.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime};

/// How long there must have been no good probe before the store counts as read-only.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Good probes in a row after which it can be written again.
pub const RECOVERED: u32 = 3;

/// How often a probe is made, and how long it may take.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// See [`PROBE_INTERVAL`].
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// The 99th percentile above which a server is slow.
pub const SLOW: Duration = Duration::from_millis(10);

/// Probes that the percentile is taken of: the oldest goes when there are more. Fewer than [`SAMPLES_MIN`] say nothing.
const SAMPLES_MAX: usize = 100;
const SAMPLES_MIN: usize = 20;

/// Servers whose latency is kept, where a cluster has three. For one beyond it that is forgotten which was not heard for the longest.
const SERVERS_MAX: usize = 32;

/// How often the log is told of the same slow server.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// What can be done with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// It is not known yet.
    Starting,
    /// Everything.
    ReadWrite,
    /// Something failed a moment ago. Requests may take longer, or fail and be worth trying again.
    Degraded,
    /// Writes by [`Node::client`](super::Node::client) fail at once: with [`Unavailable`](crate::ErrorKind::Unavailable) when no quorum answers, so
    /// that nothing was done, or with what the servers say. Serializable reads go on, if [`Availability::kv`] says so.
    ReadOnly,
}

impl std::fmt::Display for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Access::Starting => "starting",
            Access::ReadWrite => "read-write",
            Access::Degraded => "degraded",
            Access::ReadOnly => "read-only",
        })
    }
}

/// The signal. See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Availability {
    /// What can be done.
    pub access: Access,
    /// Why it is not `ReadWrite`; empty if it is.
    pub reason: String,
    /// Since when `access` is what it is.
    pub since: SystemTime,
    /// Whether the last probe could read, at least what one server has.
    pub kv: bool,
    /// Since when `kv` is what it is.
    pub kv_since: SystemTime,
    /// Whether the last probe says that a write would succeed.
    pub kv_write: bool,
    /// Since when `kv_write` is what it is.
    pub kv_write_since: SystemTime,
}

impl Default for Availability {
    fn default() -> Self {
        let since = SystemTime::now();
        let (access, reason) = (Access::Starting, "nothing was tried yet".into());
        Availability { access, reason, since, kv: false, kv_since: since, kv_write: false, kv_write_since: since }
    }
}

impl Availability {
    /// Takes what is the case from `now` on, and says whether that is anything new.
    pub(crate) fn set(&mut self, now: SystemTime, access: Access, reason: &str, kv: bool, kv_write: bool) -> bool {
        if (self.access, self.reason.as_str(), self.kv, self.kv_write) == (access, reason, kv, kv_write) {
            return false;
        }
        if self.access != access {
            self.since = now;
        }
        if self.kv != kv {
            self.kv_since = now;
        }
        if self.kv_write != kv_write {
            self.kv_write_since = now;
        }
        (self.access, self.kv, self.kv_write) = (access, kv, kv_write);
        reason.clone_into(&mut self.reason);
        true
    }

    /// The same as JSON, as for a health page. Times are milliseconds since 1970.
    ///
    /// ```
    /// let health = quorate::embed::Availability::default().to_json();
    /// assert_eq!(health["access"], "starting");
    /// assert_eq!(health["submodules"]["kv_write"]["status"], "unavailable"); // or "alive"
    /// assert!(health["submodules"]["kv_write"]["changedAt"].as_u64() > Some(1_700_000_000_000));
    /// ```
    pub fn to_json(&self) -> serde_json::Value {
        let part = |good: bool, since: SystemTime| {
            let (status, message) = if good { ("alive", "") } else { ("unavailable", self.reason.as_str()) };
            serde_json::json!({ "status": status, "message": message, "changedAt": unix_ms(since) })
        };
        serde_json::json!({
            "access": self.access.to_string(),
            "reason": self.reason,
            "changedAt": unix_ms(self.since),
            "submodules": { "kv": part(self.kv, self.kv_since), "kv_write": part(self.kv_write, self.kv_write_since) },
        })
    }
}

/// A time as health pages have it: milliseconds since 1970.
pub(super) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    Good,
    /// It failed; the next may not.
    Bad(String),
    /// Writes are refused, for certain and until something is done about it.
    Refused(String),
}

/// Makes a state of probes. Times count from any beginning.
#[derive(Clone, Debug)]
pub(crate) struct Tracker {
    access: Access,
    reason: String,
    good: u32,
    /// When there was a good probe last; at first, when it began.
    last_good: Duration,
    /// The same of a probe that was answered for certain, good or not.
    last_certain: Duration,
}

impl Tracker {
    pub fn new(now: Duration) -> Tracker {
        Tracker { access: Access::Starting, reason: String::new(), good: 0, last_good: now, last_certain: now }
    }

    pub fn access(&self) -> Access {
        self.access
    }

    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether it takes no writes, as far as anybody can tell. A store that refuses some, as one without space, takes others, and says so itself;
    /// and one that has just been good may take them before it counts as [recovered](RECOVERED).
    pub fn is_lost(&self, now: Duration) -> bool {
        self.access == Access::ReadOnly && now.saturating_sub(self.last_certain) >= PATIENCE
    }

    pub fn probed(&mut self, now: Duration, probe: Probe) {
        if !matches!(probe, Probe::Bad(_)) {
            self.last_certain = now;
        }
        match probe {
            Probe::Good => {
                self.good = self.good.saturating_add(1);
                self.last_good = now;
                if self.access == Access::Starting || self.good >= RECOVERED {
                    self.access = Access::ReadWrite;
                    self.reason.clear();
                }
            }
            Probe::Bad(why) => {
                self.good = 0;
                self.reason = why;
                if self.access == Access::ReadWrite {
                    self.access = Access::Degraded;
                }
            }
            Probe::Refused(why) => {
                self.good = 0;
                self.reason = why;
                self.access = Access::ReadOnly;
            }
        }
        self.passed(now);
    }

    /// Time has passed.
    pub fn passed(&mut self, now: Duration) {
        if matches!(self.access, Access::Starting | Access::Degraded) && now.saturating_sub(self.last_good) >= PATIENCE {
            self.access = Access::ReadOnly;
        }
    }
}

/// How long the servers take to answer probes.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    of: BTreeMap<String, Heard>,
}

/// What one server took, and when it was heard and told of last.
#[derive(Debug, Default)]
struct Heard {
    samples: VecDeque<Duration>,
    last: Duration,
    told: Option<Duration>,
}

impl Latencies {
    /// Notes how long a server took. Returns its 99th percentile if the log should be told that it is slow.
    pub fn note(&mut self, now: Duration, server: &str, took: Duration) -> Option<Duration> {
        if self.of.len() >= SERVERS_MAX
            && !self.of.contains_key(server)
            && let Some(oldest) = self.of.iter().min_by_key(|(_, heard)| heard.last).map(|(server, _)| server.clone())
        {
            self.of.remove(&oldest);
        }
        let heard = self.of.entry(server.to_owned()).or_default();
        heard.last = now;
        heard.samples.push_back(took);
        if heard.samples.len() > SAMPLES_MAX {
            heard.samples.pop_front();
        }
        let p99 = percentile(&heard.samples)?;
        let quiet = heard.told.is_some_and(|told| now.saturating_sub(told) < WARN_INTERVAL);
        if p99 <= SLOW || quiet {
            return None;
        }
        heard.told = Some(now);
        Some(p99)
    }

    /// The 99th percentile of a server, once enough is known of it.
    pub fn p99(&self, server: &str) -> Option<Duration> {
        self.of.get(server).and_then(|heard| percentile(&heard.samples))
    }

    /// Forgets the servers that are none any more.
    pub fn retain(&mut self, is_one: impl Fn(&str) -> bool) {
        self.of.retain(|server, _| is_one(server));
    }
}

fn percentile(samples: &VecDeque<Duration>) -> Option<Duration> {
    if samples.len() < SAMPLES_MIN {
        return None;
    }
    let mut sorted: Vec<Duration> = samples.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad() -> Probe {
        Probe::Bad("no leader".into())
    }

    /// Probes every half second, from `from` on; what the state was after each.
    fn run(tracker: &mut Tracker, from: &mut u64, probes: impl IntoIterator<Item = Probe>) -> Vec<Access> {
        let step = |probe| {
            *from += 500;
            tracker.probed(Duration::from_millis(*from), probe);
            tracker.access()
        };
        probes.into_iter().map(step).collect()
    }

    #[test]
    fn a_change_of_leader_is_never_read_only() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        assert_eq!(run(&mut tracker, &mut now, [Probe::Good]), [Access::ReadWrite]);
        // 4.5 seconds without.
        assert_eq!(run(&mut tracker, &mut now, (0..9).map(|_| bad())), [Access::Degraded; 9]);
        assert_eq!(tracker.reason(), "no leader");
        let recovering = run(&mut tracker, &mut now, (0..3).map(|_| Probe::Good));
        assert_eq!(recovering, [Access::Degraded, Access::Degraded, Access::ReadWrite]);
        assert_eq!(tracker.reason(), "");
    }

    #[test]
    fn a_lost_quorum_is_read_only_after_five_seconds_and_until_it_is_surely_back() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        run(&mut tracker, &mut now, [Probe::Good]);
        let seen = run(&mut tracker, &mut now, (0..10).map(|_| bad()));
        assert_eq!(seen.iter().position(|access| *access == Access::ReadOnly), Some(9));
        let seen = run(&mut tracker, &mut now, [Probe::Good, Probe::Good, bad(), Probe::Good, Probe::Good, Probe::Good]);
        assert_eq!(seen[..5], [Access::ReadOnly; 5]);
        assert_eq!(seen[5], Access::ReadWrite);
        // Also while a probe hangs.
        tracker.probed(Duration::from_millis(now + 500), bad());
        tracker.passed(Duration::from_millis(now + 4_999));
        assert_eq!(tracker.access(), Access::Degraded);
        tracker.passed(Duration::from_millis(now + 5_000));
        assert_eq!(tracker.access(), Access::ReadOnly);
    }

    #[test]
    fn a_flapping_network_does_not_flap_the_state() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        run(&mut tracker, &mut now, [Probe::Good, bad()]);
        let flapping = (0..1_000).map(|at| if at % 4 == 0 { bad() } else { Probe::Good });
        // Three good ones between two bad ones are a recovery; two are not.
        let seen = run(&mut tracker, &mut now, flapping);
        let changes = seen.windows(2).filter(|two| two[0] != two[1]).count();
        assert!(!seen.contains(&Access::ReadOnly) && changes > 0);
        run(&mut tracker, &mut now, [bad()]);
        let flapping = (0..1_000).map(|at| if at % 3 == 0 { bad() } else { Probe::Good });
        assert!(run(&mut tracker, &mut now, flapping).iter().all(|access| *access == Access::Degraded));
        let mostly_bad = (0..1_000).map(|at| if at % 9 == 0 { Probe::Good } else { bad() });
        assert!(run(&mut tracker, &mut now, mostly_bad).iter().all(|access| *access == Access::Degraded));
    }

    /// Writes are refused without asking only where nobody would answer.
    #[test]
    fn writes_are_stopped_only_while_nobody_answers() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        let is_lost = |tracker: &Tracker, now: u64| tracker.is_lost(Duration::from_millis(now));
        run(&mut tracker, &mut now, [Probe::Good, bad()]);
        assert!(!is_lost(&tracker, now));
        run(&mut tracker, &mut now, (0..9).map(|_| bad()));
        assert!(tracker.access() == Access::ReadOnly && is_lost(&tracker, now));
        // The first good answer is enough, long before all is well again.
        run(&mut tracker, &mut now, [Probe::Good]);
        assert!(tracker.access() == Access::ReadOnly && !is_lost(&tracker, now));
        // Who has no space takes deletions, also when a probe or two get lost.
        run(&mut tracker, &mut now, [Probe::Refused("no space".into()), bad()]);
        assert!(tracker.access() == Access::ReadOnly && !is_lost(&tracker, now));
        // One that never answered.
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        run(&mut tracker, &mut now, (0..10).map(|_| bad()));
        assert!(is_lost(&tracker, now));
    }

    #[test]
    fn what_is_certain_needs_no_patience() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        let full = Probe::Refused("no space".into());
        assert_eq!(run(&mut tracker, &mut now, [Probe::Good, full]), [Access::ReadWrite, Access::ReadOnly]);
        assert_eq!(tracker.reason(), "no space");
    }

    /// Each part keeps the time of its own change.
    #[test]
    fn health_says_since_when() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut now = Availability::default();
        assert!(now.set(at(1), Access::ReadWrite, "", true, true));
        assert!(!now.set(at(2), Access::ReadWrite, "", true, true));
        assert!(now.set(at(3), Access::Degraded, "no leader", true, false));
        assert!(now.set(at(4), Access::Degraded, "still none", true, false));
        assert!(now.set(at(8), Access::ReadOnly, "still none", true, false));
        assert_eq!((now.since, now.kv_since, now.kv_write_since), (at(8), at(1), at(3)));
        let json = now.to_json();
        assert_eq!((json["access"].as_str(), json["changedAt"].as_u64()), (Some("read-only"), Some(8000)));
        let part = |name: &str| json["submodules"][name].to_string();
        assert_eq!(part("kv"), r#"{"changedAt":1000,"message":"","status":"alive"}"#);
        assert_eq!(part("kv_write"), r#"{"changedAt":3000,"message":"still none","status":"unavailable"}"#);
    }

    #[test]
    fn a_start_without_a_quorum_ends() {
        let (mut tracker, mut now) = (Tracker::new(Duration::ZERO), 0);
        let seen = run(&mut tracker, &mut now, (0..10).map(|_| bad()));
        assert_eq!((seen[0], seen[8], seen[9]), (Access::Starting, Access::Starting, Access::ReadOnly));
    }

    #[test]
    fn a_slow_server_is_told_of_once_in_a_while() {
        let mut latencies = Latencies::default();
        let second = Duration::from_secs;
        let slow = Duration::from_millis(11);
        let told: Vec<u64> = (0..200).filter(|at| latencies.note(second(*at), "a", slow) == Some(slow)).collect();
        assert_eq!(told, [19, 79, 139, 199]);
        assert!((0..200).all(|at| latencies.note(second(at), "b", SLOW).is_none()));
        // One slow answer of a hundred is what happens.
        assert!((0..200).all(|at| latencies.note(second(at), "c", if at == 150 { slow } else { SLOW }).is_none()));
        let p99: Vec<_> = latencies.of.values().map(|heard| percentile(&heard.samples)).collect();
        assert_eq!(p99, [Some(slow), Some(SLOW), Some(SLOW)]);
        for at in 0..100 {
            latencies.note(second(at), &format!("server {at}"), slow);
        }
        assert_eq!((latencies.of.len(), latencies.of.contains_key("server 99")), (SERVERS_MAX, true));
        latencies.retain(|server| server == "a");
        assert_eq!((latencies.p99("a"), latencies.p99("b"), latencies.of.len()), (Some(slow), None, 1));
    }
}
