//! Leases: promises that keys stay for so many seconds unless somebody renews them.
//!
//! The [`Lessor`] is a pure state machine. It reads no clock, does no I/O and keeps nothing on disk: every call that needs
//! the time is given `now`, the monotonic time since the server's start, and whoever applies the log stores what
//! [`Lease::encode`] yields.
//!
//! # Two halves
//!
//! *What is replicated*: which leases exist, their TTL, their last checkpoint, and their keys. It changes only when a log entry
//! is applied (`grant`, `revoke`, `attach`, `detach`, `set_checkpoint`), comes out the same on every member, and never
//! depends on `now`.
//!
//! *What is local*: when each lease expires. Only the *primary*, the member that leads, has expiries. It looks for
//! [`expired`](Lessor::expired) leases and proposes their revocation; the lease goes when that entry is applied, not before.
//! Expiries are never replicated, so a new leader gives every lease its whole TTL again (or what its checkpoint says was
//! left): a lease may live longer than its TTL, and never shorter.
//!
//! # The life of a lease on the primary
//!
//! ```text
//!            renew                   not applied within `revoke_retry`: offered again
//!           ┌─────┐                          ┌─────┐
//! grant ──► waiting ──── expired() offers it ──► revoking ──── revoke ──► gone
//! ```
//!
//! A lease that has been offered, or whose expiry is past, is not renewed any more: [`Renewal::Expired`] says that its
//! fate is being decided. It returns to `waiting` only through [`promote`](Lessor::promote).
//!
//! # Example, in the language of `tests/scripts/lease/*.txt`
//!
//! ```text
//! > promote now=0s
//! > grant 7 ttl=10 now=0s
//! ttl=10
//! > attach 7 locks/a
//! > renew 7 now=6s
//! ttl=10
//! > expired now=15.999s            # 6 s + 10 s is not over
//! none
//! > expired now=16s
//! 7
//! > revoke 7                       # the entry is applied; the applier deletes these keys in one revision
//! locks/a
//! ```
//!
//! # Invariants
//!
//! - [`Lessor::each_lease_queued_once`]: on the primary each lease stands once in either queue, at the time its own entry says;
//!   otherwise the queues are empty.
//! - [`Lessor::keys_point_back`]: a lease lists a key exactly if the store says that the key has this lease.
//! - A lease is offered by `expired` at or after its expiry, never before; a renewal never moves an expiry backwards.
//!
//! # Caveats
//!
//! - `min_ttl` changes the outcome of a grant, so it must be the same on all members (it follows from the election timeout).
//! - The number of leases is not limited here: they are data, and the space quota limits them as it limits keys.
//! - etcd spreads expiries on promotion where more than 750 fall into one second, because it revokes one lease per log entry.
//!   Here many revocations share an entry and each call of `expired` has a `max`, so nothing is delayed beyond its due time
//!   by more than the proposals take.
//! - A key is kept as the `Bytes` it is given; one that is a slice of a request keeps the whole request in memory. Give the
//!   store's own copy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::{Buf, Bytes};

use crate::error::ApplyError;

/// The id that means "no lease" on a key, and "choose one" in a grant request (which the proposer does before it proposes).
pub const NO_LEASE: i64 = 0;

/// The largest TTL in seconds; a grant that asks for more is refused.
pub const MAX_TTL: i64 = 9_000_000_000;

/// Checkpoints in one batch of [`Lessor::checkpoints_due`]; the rest is offered by the next call.
pub const MAX_CHECKPOINTS: usize = 1000;

/// The settings of a [`Lessor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LessorOptions {
    /// Shorter TTLs are raised to this many seconds. etcd: 1.5 election timeouts, rounded up. Default 2; at least 1.
    pub min_ttl: i64,
    /// How often the remaining time of a long lease is checkpointed; leases with no more than this left are not. Default 300 s,
    /// `None` (or zero) for never.
    pub checkpoint_interval: Option<Duration>,
    /// After this long a revocation that has not been applied is offered again. Default 3 s; at least 1 ms.
    pub revoke_retry: Duration,
}

impl Default for LessorOptions {
    fn default() -> Self {
        LessorOptions { min_ttl: 2, checkpoint_interval: Some(Duration::from_secs(300)), revoke_retry: Duration::from_secs(3) }
    }
}

/// What is stored of a lease. Its keys are not: the store finds them by its keys' lease ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Never [`NO_LEASE`]; negative ids are legal.
    pub id: i64,
    /// The granted TTL in seconds, from 1 to [`MAX_TTL`].
    pub ttl: i64,
    /// The last checkpoint in seconds, from 1 to `ttl`; 0 if there is none and the whole TTL counts.
    pub remaining_ttl: i64,
}

impl Lease {
    /// Bytes of an encoded lease.
    pub const ENCODED: usize = 29;
    const FORMAT: u8 = 1;

    /// The stored form, all numbers little-endian:
    ///
    /// | offset | bytes | field |
    /// |---|---|---|
    /// | 0 | 1 | format, 1 |
    /// | 1 | 8 | id, i64 |
    /// | 9 | 8 | ttl, i64 |
    /// | 17 | 8 | remaining_ttl, i64 |
    /// | 25 | 4 | crc32c of bytes 0 to 24 |
    pub fn encode(&self) -> [u8; Lease::ENCODED] {
        let mut out = [0; Lease::ENCODED];
        out[0] = Lease::FORMAT;
        out[1..9].copy_from_slice(&self.id.to_le_bytes());
        out[9..17].copy_from_slice(&self.ttl.to_le_bytes());
        out[17..25].copy_from_slice(&self.remaining_ttl.to_le_bytes());
        let crc = crc32c::crc32c(&out[..25]);
        out[25..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads what [`encode`](Lease::encode) wrote.
    ///
    /// # Errors
    /// A text that says what is wrong with the bytes; the caller knows where they are from and makes an `Error::Corrupt` of it.
    pub fn decode(bytes: &[u8]) -> Result<Lease, String> {
        if bytes.len() != Lease::ENCODED {
            return Err(format!("a stored lease has {} bytes instead of {}", bytes.len(), Lease::ENCODED));
        }
        let (mut fields, mut crc) = bytes.split_at(Lease::ENCODED - 4);
        if crc.get_u32_le() != crc32c::crc32c(fields) {
            return Err("a stored lease fails its checksum".into());
        }
        let format = fields.get_u8();
        if format != Lease::FORMAT {
            return Err(format!("a stored lease has format {format}, this release reads {}", Lease::FORMAT));
        }
        let lease = Lease { id: fields.get_i64_le(), ttl: fields.get_i64_le(), remaining_ttl: fields.get_i64_le() };
        let sound = lease.id != NO_LEASE && (1..=MAX_TTL).contains(&lease.ttl) && (0..=lease.ttl).contains(&lease.remaining_ttl);
        if sound { Ok(lease) } else { Err(format!("a stored lease has impossible values: {lease:?}")) }
    }
}

/// The outcome of [`Lessor::renew`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease lives for `ttl` seconds from now. If `clear_checkpoint`, the answer must wait until `set_checkpoint(id, 0)` has
    /// been proposed and applied: until then a new leader would count from the checkpoint and expire the lease too early.
    Renewed { ttl: i64, clear_checkpoint: bool },
    /// The lease is past its expiry and about to be revoked. The answer must wait for the revocation to be applied (then it is
    /// "not found"), or for the loss of leadership (then the lease may live on and the request goes to the new leader).
    Expired,
}

/// The outcome of [`Lessor::time_to_live`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeToLive {
    /// The TTL in seconds that was granted.
    pub granted: i64,
    /// Whole seconds left, rounded down; 0 if overdue. On a member that is not primary: what a promotion would give.
    pub remaining: i64,
    /// The keys in order, if they were asked for.
    pub keys: Vec<Bytes>,
}

/// The times of one lease on the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Clock {
    expiry: Duration,
    /// Set once the lease has been offered for revocation: when to offer it again.
    retry: Option<Duration>,
    /// When to checkpoint it next.
    checkpoint: Option<Duration>,
}

#[derive(Debug)]
struct Entry {
    ttl: i64,
    remaining_ttl: i64,
    /// `Some` exactly on the primary.
    clock: Option<Clock>,
    /// A checkpoint was handed out since the promotion and none has been applied since: one may still be in the log.
    checkpoint_offered: bool,
    keys: BTreeSet<Bytes>,
}

impl Entry {
    fn new(ttl: i64, remaining_ttl: i64) -> Self {
        Entry { ttl, remaining_ttl, clock: None, checkpoint_offered: false, keys: BTreeSet::new() }
    }

    /// What a promotion gives the lease, in seconds.
    fn full(&self) -> i64 {
        if self.remaining_ttl > 0 { self.remaining_ttl } else { self.ttl }
    }
}

/// All leases, ordered by what is to be done next. Each is an ordered set of (time, id), so that a renewal costs O(log n).
#[derive(Debug, Default)]
struct Queues {
    waiting: BTreeSet<(Duration, i64)>,
    revoking: BTreeSet<(Duration, i64)>,
    checkpoints: BTreeSet<(Duration, i64)>,
}

impl Queues {
    fn arm(&mut self, id: i64, clock: Clock) {
        match clock.retry {
            None => self.waiting.insert((clock.expiry, id)),
            Some(at) => self.revoking.insert((at, id)),
        };
        if let Some(at) = clock.checkpoint {
            self.checkpoints.insert((at, id));
        }
    }

    fn disarm(&mut self, id: i64, clock: Clock) {
        match clock.retry {
            None => self.waiting.remove(&(clock.expiry, id)),
            Some(at) => self.revoking.remove(&(at, id)),
        };
        if let Some(at) = clock.checkpoint {
            self.checkpoints.remove(&(at, id));
        }
    }

    /// The lease to look at next, and when.
    fn next(&self) -> Option<(Duration, i64)> {
        let (waiting, revoking) = (self.waiting.first().copied(), self.revoking.first().copied());
        waiting.into_iter().chain(revoking).min()
    }
}

/// The leases of one member. See the module's head.
#[derive(Debug)]
pub struct Lessor {
    options: LessorOptions,
    primary: bool,
    leases: BTreeMap<i64, Entry>,
    queues: Queues,
}

impl Lessor {
    /// No leases, and not primary. Settings below their least value are raised to it.
    pub fn new(mut options: LessorOptions) -> Self {
        options.min_ttl = options.min_ttl.clamp(1, MAX_TTL);
        options.checkpoint_interval = options.checkpoint_interval.filter(|interval| !interval.is_zero());
        options.revoke_retry = options.revoke_retry.max(Duration::from_millis(1));
        Lessor { options, primary: false, leases: BTreeMap::new(), queues: Queues::default() }
    }

    /// One with the same settings, with no leases and not primary.
    pub fn fresh(&self) -> Self {
        Lessor::new(self.options)
    }

    // What is replicated.

    /// Whether a grant would succeed, and the TTL in seconds it would give. This is the part of [`grant`](Lessor::grant) that
    /// all members must agree on.
    ///
    /// # Errors
    /// `LeaseNotFound` for id 0, `LeaseTtlTooLarge` above [`MAX_TTL`], `LeaseExists`; in this order, which is etcd's.
    pub fn check_grant(&self, id: i64, ttl: i64) -> Result<i64, ApplyError> {
        if id == NO_LEASE {
            return Err(ApplyError::LeaseNotFound);
        }
        if ttl > MAX_TTL {
            return Err(ApplyError::LeaseTtlTooLarge);
        }
        if self.leases.contains_key(&id) {
            return Err(ApplyError::LeaseExists);
        }
        Ok(ttl.max(self.options.min_ttl))
    }

    /// Creates a lease and returns its TTL in seconds; a TTL below the least one, zero and negative ones too, is raised.
    /// `now` counts only on the primary.
    ///
    /// # Errors
    /// Those of [`check_grant`](Lessor::check_grant); nothing has changed then.
    pub fn grant(&mut self, id: i64, ttl: i64, now: Duration) -> Result<i64, ApplyError> {
        let ttl = self.check_grant(id, ttl)?;
        let mut entry = Entry::new(ttl, 0);
        if self.primary {
            let clock = new_clock(self.options.checkpoint_interval, now, now.saturating_add(seconds(ttl)));
            self.queues.arm(id, clock);
            entry.clock = Some(clock);
        }
        self.leases.insert(id, entry);
        Ok(ttl)
    }

    /// Removes a lease and returns its keys in order. The caller deletes them, and the stored lease, in one revision;
    /// it need not `detach` them.
    ///
    /// # Errors
    /// `LeaseNotFound`.
    pub fn revoke(&mut self, id: i64) -> Result<Vec<Bytes>, ApplyError> {
        let entry = self.leases.remove(&id).ok_or(ApplyError::LeaseNotFound)?;
        if let Some(clock) = entry.clock {
            self.queues.disarm(id, clock);
        }
        Ok(entry.keys.into_iter().collect())
    }

    /// Notes that `key` now has this lease. A key has one lease: the caller, who knows the old one, detaches it there first.
    ///
    /// # Errors
    /// `LeaseNotFound`. A Txn must check with [`contains`](Lessor::contains) before it writes anything.
    pub fn attach(&mut self, id: i64, key: Bytes) -> Result<(), ApplyError> {
        self.leases.get_mut(&id).ok_or(ApplyError::LeaseNotFound)?.keys.insert(key);
        Ok(())
    }

    /// Notes that `key` has this lease no longer. Returns whether it had: false also when the lease itself is gone, as it is
    /// while the keys of a revoked lease are deleted.
    pub fn detach(&mut self, id: i64, key: &[u8]) -> bool {
        self.leases.get_mut(&id).is_some_and(|entry| entry.keys.remove(key))
    }

    /// Sets what is left of a lease, in seconds, for the next promotion; 0 for its whole TTL. Expiries do not move.
    /// Values outside 0 to the TTL are brought inside. Returns what is to be stored, or `None` if the lease is gone, which is
    /// no error.
    pub fn set_checkpoint(&mut self, id: i64, remaining_ttl: i64) -> Option<Lease> {
        let entry = self.leases.get_mut(&id)?;
        entry.remaining_ttl = remaining_ttl.clamp(0, entry.ttl);
        entry.checkpoint_offered = false;
        Some(Lease { id, ttl: entry.ttl, remaining_ttl: entry.remaining_ttl })
    }

    /// Replaces everything by leases from storage or a snapshot; the member is not primary then. The keys are attached
    /// afterwards, one by one, while the store reads its own.
    pub fn restore(&mut self, leases: impl IntoIterator<Item = Lease>) {
        self.primary = false;
        self.queues = Queues::default();
        self.leases = leases.into_iter().map(|lease| (lease.id, Entry::new(lease.ttl, lease.remaining_ttl))).collect();
    }

    /// Whether the lease exists; it does until its revocation is applied, also when it is overdue.
    pub fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// What is to be stored of a lease.
    pub fn lease(&self, id: i64) -> Option<Lease> {
        self.leases.get(&id).map(|entry| Lease { id, ttl: entry.ttl, remaining_ttl: entry.remaining_ttl })
    }

    /// What is to be stored of all leases, by id.
    pub fn stored(&self) -> impl Iterator<Item = Lease> + '_ {
        self.leases.iter().map(|(id, entry)| Lease { id: *id, ttl: entry.ttl, remaining_ttl: entry.remaining_ttl })
    }

    /// The number of leases.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are no leases.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    // What is local to the primary.

    /// Whether this member keeps the expiries.
    pub fn is_primary(&self) -> bool {
        self.primary
    }

    /// The member leads: every lease gets its whole TTL, or what its checkpoint says is left, and `extend` (etcd: one election
    /// timeout, in which clients could not reach a leader). To be called when all entries of earlier terms have been applied, so
    /// that no old checkpoint is still to come. Costs O(n log n), once per election.
    pub fn promote(&mut self, now: Duration, extend: Duration) {
        self.primary = true;
        let interval = self.options.checkpoint_interval;
        let (mut waiting, mut checkpoints) = (Vec::with_capacity(self.leases.len()), Vec::new());
        for (id, entry) in &mut self.leases {
            let clock = new_clock(interval, now, now.saturating_add(seconds(entry.full())).saturating_add(extend));
            waiting.push((clock.expiry, *id));
            checkpoints.extend(clock.checkpoint.map(|at| (at, *id)));
            entry.clock = Some(clock);
            entry.checkpoint_offered = false;
        }
        // Sets are built from a sorted list in one go, several times faster than by 100,000 insertions.
        self.queues =
            Queues { waiting: waiting.into_iter().collect(), revoking: BTreeSet::new(), checkpoints: checkpoints.into_iter().collect() };
    }

    /// The member leads no more: no lease expires here until the next promotion. Costs O(n).
    pub fn demote(&mut self) {
        self.primary = false;
        self.queues = Queues::default();
        for entry in self.leases.values_mut() {
            entry.clock = None;
            entry.checkpoint_offered = false;
        }
    }

    /// Gives a lease its whole TTL from `now` on. O(log n).
    ///
    /// # Errors
    /// `NotLeader` if the member is not primary, `LeaseNotFound`.
    pub fn renew(&mut self, id: i64, now: Duration) -> Result<Renewal, ApplyError> {
        if !self.primary {
            return Err(ApplyError::NotLeader);
        }
        let entry = self.leases.get_mut(&id).ok_or(ApplyError::LeaseNotFound)?;
        let Some(old) = entry.clock else { return Err(ApplyError::NotLeader) };
        if old.retry.is_some() || now >= old.expiry {
            return Ok(Renewal::Expired);
        }
        // Not backwards: another renewal with a slightly later `now`, or a promotion, may have promised more.
        let expiry = now.saturating_add(seconds(entry.ttl)).max(old.expiry);
        let new = new_clock(self.options.checkpoint_interval, now, expiry);
        self.queues.disarm(id, old);
        self.queues.arm(id, new);
        entry.clock = Some(new);
        // A checkpoint that is still on its way through the log would come after this renewal and undo it.
        Ok(Renewal::Renewed { ttl: entry.ttl, clear_checkpoint: entry.remaining_ttl > 0 || entry.checkpoint_offered })
    }

    /// Up to `max` leases that are to be revoked: those whose expiry has come, and those offered at least `revoke_retry` ago and
    /// still there; the longest due first. Empty if not primary. O(log n) each.
    pub fn expired(&mut self, now: Duration, max: usize) -> Vec<i64> {
        let mut ids = Vec::new();
        let retry = now.saturating_add(self.options.revoke_retry);
        while ids.len() < max
            && let Some((at, id)) = self.queues.next()
            && at <= now
        {
            let Some(entry) = self.leases.get_mut(&id) else { break };
            let Some(old) = entry.clock else { break };
            let new = Clock { expiry: old.expiry, retry: Some(retry), checkpoint: None };
            self.queues.disarm(id, old);
            self.queues.arm(id, new);
            entry.clock = Some(new);
            ids.push(id);
        }
        ids
    }

    /// When [`expired`](Lessor::expired) next has something to say; past if it has now, `None` if never.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.queues.next().map(|(at, _)| at)
    }

    /// Up to [`MAX_CHECKPOINTS`] checkpoints to be proposed: (id, seconds left, rounded up). Each is offered again after another
    /// interval, whether it was applied or not, as long as more than an interval is left and nobody renews the lease.
    pub fn checkpoints_due(&mut self, now: Duration) -> Vec<(i64, i64)> {
        let mut due = Vec::new();
        while due.len() < MAX_CHECKPOINTS
            && let Some((at, id)) = self.queues.checkpoints.first().copied()
            && at <= now
        {
            self.queues.checkpoints.remove(&(at, id));
            let Some(entry) = self.leases.get_mut(&id) else { continue };
            let Some(clock) = entry.clock.as_mut() else { continue };
            clock.checkpoint = new_clock(self.options.checkpoint_interval, now, clock.expiry).checkpoint;
            self.queues.checkpoints.extend(clock.checkpoint.map(|at| (at, id)));
            let left = clock.expiry.saturating_sub(now);
            let left = whole(left) + i64::from(left.subsec_nanos() > 0);
            // Overdue leases are revoked instead; and there is nothing to note of one that a promotion gave more than its TTL.
            if left > 0 && left < entry.ttl {
                entry.checkpoint_offered = true;
                due.push((id, left));
            }
        }
        due
    }

    /// When [`checkpoints_due`](Lessor::checkpoints_due) next has something to look at.
    pub fn next_checkpoint(&self) -> Option<Duration> {
        self.queues.checkpoints.first().map(|(at, _)| *at)
    }

    /// A lease's times, and its keys if wanted; `None` if it is not there, which etcd's API says as TTL -1 and no error.
    pub fn time_to_live(&self, id: i64, now: Duration, want_keys: bool) -> Option<TimeToLive> {
        let entry = self.leases.get(&id)?;
        let remaining = entry.clock.map_or(entry.full(), |clock| whole(clock.expiry.saturating_sub(now)));
        let keys = if want_keys { entry.keys.iter().cloned().collect() } else { Vec::new() };
        Some(TimeToLive { granted: entry.ttl, remaining, keys })
    }

    /// All ids: on the primary those that expire first come first, as in etcd; elsewhere by id.
    pub fn leases(&self) -> Vec<i64> {
        if !self.primary {
            return self.leases.keys().copied().collect();
        }
        // What has been offered for revocation expired before all that still waits.
        let expiry = |id: &i64| self.leases.get(id).and_then(|entry| entry.clock).map(|clock| clock.expiry);
        let mut ids: Vec<i64> = self.queues.revoking.iter().map(|(_, id)| *id).collect();
        ids.sort_by_key(|id| (expiry(id), *id));
        ids.extend(self.queues.waiting.iter().map(|(_, id)| *id));
        ids
    }

    // Invariants, for tests, debug builds and simulation. Each costs O(everything).

    /// On the primary each lease stands in exactly one of the two queues, at its own time, and in the checkpoint queue if it
    /// says so; otherwise all queues are empty.
    ///
    /// # Errors
    /// A text that names the first lease for which this is not so.
    pub fn each_lease_queued_once(&self) -> Result<(), String> {
        let mut expected = Queues::default();
        for (id, entry) in &self.leases {
            match entry.clock {
                Some(clock) if self.primary => expected.arm(*id, clock),
                None if !self.primary => {}
                clock => return Err(format!("lease {id} has clock {clock:?} while primary is {}", self.primary)),
            }
        }
        for (name, is, should) in [
            ("waiting", &self.queues.waiting, &expected.waiting),
            ("revoking", &self.queues.revoking, &expected.revoking),
            ("checkpoint", &self.queues.checkpoints, &expected.checkpoints),
        ] {
            if let Some(odd) = is.symmetric_difference(should).next() {
                return Err(format!("{name} queue: {odd:?} is {}", if is.contains(odd) { "left over" } else { "missing" }));
            }
        }
        Ok(())
    }

    /// `attached` is the store's view: each live key and its lease id, which may be [`NO_LEASE`]. Both views must be the same.
    ///
    /// # Errors
    /// A text that names the first key, or the counts, in which they differ.
    pub fn keys_point_back<'a>(&self, attached: impl IntoIterator<Item = (&'a [u8], i64)>) -> Result<(), String> {
        let mut count = 0;
        for (key, id) in attached.into_iter().filter(|(_, id)| *id != NO_LEASE) {
            count += 1;
            if !self.leases.get(&id).is_some_and(|entry| entry.keys.contains(key)) {
                return Err(format!("key {} has lease {id}, which does not list it", key.escape_ascii()));
            }
        }
        let listed: usize = self.leases.values().map(|entry| entry.keys.len()).sum();
        if listed == count { Ok(()) } else { Err(format!("leases list {listed} keys, but {count} keys have leases")) }
    }
}

/// A lease that has just got a new expiry. Counting the checkpoint interval from here means that a lease renewed more often
/// than that is never checkpointed, and needs no log entries at all.
fn new_clock(interval: Option<Duration>, now: Duration, expiry: Duration) -> Clock {
    let checkpoint = interval.filter(|interval| expiry.saturating_sub(now) > *interval).map(|interval| now.saturating_add(interval));
    Clock { expiry, retry: None, checkpoint }
}

fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0))
}

fn whole(left: Duration) -> i64 {
    i64::try_from(left.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    // Golden scripts. `tests/scripts/lease/README.txt` says what the commands mean.

    /// A lessor and what the store would know beside it: the lease of each key.
    struct Script {
        options: LessorOptions,
        lessor: Lessor,
        store: BTreeMap<Bytes, i64>,
    }

    impl Script {
        fn new() -> Self {
            let options = LessorOptions::default();
            Script { options, lessor: Lessor::new(options), store: BTreeMap::new() }
        }

        fn run(&mut self, command: &str) -> Result<String, String> {
            let mut words = command.split_whitespace();
            let verb = words.next().ok_or("no command")?;
            let (named, plain): (Vec<&str>, Vec<&str>) = words.partition(|word| word.contains('='));
            let named: BTreeMap<&str, &str> = named.iter().filter_map(|word| word.split_once('=')).collect();
            let get = |name: &str| named.get(name).copied().ok_or(format!("{name}= is missing"));
            let number = |name: &str| get(name)?.parse::<i64>().map_err(|e| e.to_string());
            let time = |name: &str| {
                let text = get(name)?.strip_suffix('s').ok_or("times end in s")?;
                text.parse::<f64>().map(Duration::from_secs_f64).map_err(|e| e.to_string())
            };
            let id = || plain.first().ok_or("no id")?.parse::<i64>().map_err(|e| e.to_string());
            let key = || Ok::<_, String>(Bytes::copy_from_slice(plain.get(1).ok_or("no key")?.as_bytes()));
            let lessor = &mut self.lessor;
            let mut out = String::new();
            match verb {
                "options" => {
                    self.options.min_ttl = number("min_ttl")?;
                    self.options.checkpoint_interval = if get("checkpoint")? == "never" { None } else { Some(time("checkpoint")?) };
                    self.options.revoke_retry = time("retry")?;
                    *self = Script { options: self.options, lessor: Lessor::new(self.options), store: BTreeMap::new() };
                }
                "restart" => {
                    let stored: Vec<_> = self.lessor.stored().map(|lease| lease.encode()).collect();
                    self.lessor = Lessor::new(self.options);
                    self.lessor.restore(stored.iter().map(|bytes| Lease::decode(bytes).unwrap()));
                    for (key, id) in &self.store {
                        self.lessor.attach(*id, key.clone()).unwrap();
                    }
                }
                "promote" => lessor.promote(time("now")?, time("extend").unwrap_or_default()),
                "demote" => lessor.demote(),
                "grant" => match lessor.grant(id()?, number("ttl")?, time("now")?) {
                    Ok(ttl) => writeln!(out, "ttl={ttl}").unwrap(),
                    Err(e) => writeln!(out, "error: {e}").unwrap(),
                },
                "revoke" => match lessor.revoke(id()?) {
                    Ok(keys) => {
                        for key in keys {
                            assert_eq!(self.store.remove(&key), Some(id()?));
                            writeln!(out, "{}", key.escape_ascii()).unwrap();
                        }
                    }
                    Err(e) => writeln!(out, "error: {e}").unwrap(),
                },
                "attach" => {
                    if !lessor.contains(id()?) {
                        writeln!(out, "error: {}", lessor.attach(id()?, key()?).unwrap_err()).unwrap();
                    } else {
                        if let Some(old) = self.store.insert(key()?, id()?) {
                            assert!(lessor.detach(old, &key()?));
                        }
                        lessor.attach(id()?, key()?).unwrap();
                    }
                }
                "detach" => {
                    let was = lessor.detach(id()?, &key()?);
                    assert_eq!(self.store.remove(&key()?).is_some(), was);
                    writeln!(out, "{}", if was { "detached" } else { "was not attached" }).unwrap();
                }
                "renew" => match lessor.renew(id()?, time("now")?) {
                    Ok(Renewal::Renewed { ttl, clear_checkpoint }) => {
                        writeln!(out, "ttl={ttl}{}", if clear_checkpoint { " clear_checkpoint" } else { "" }).unwrap()
                    }
                    Ok(Renewal::Expired) => writeln!(out, "expired").unwrap(),
                    Err(e) => writeln!(out, "error: {e}").unwrap(),
                },
                "ttl" => match lessor.time_to_live(id()?, time("now")?, true) {
                    Some(found) => {
                        write!(out, "granted={} remaining={}", found.granted, found.remaining).unwrap();
                        found.keys.iter().for_each(|key| write!(out, " {}", key.escape_ascii()).unwrap());
                        out.push('\n');
                    }
                    None => writeln!(out, "none").unwrap(),
                },
                "leases" => list(&mut out, lessor.leases()),
                "expired" => list(&mut out, lessor.expired(time("now")?, number("max").map_or(usize::MAX, |max| max as usize))),
                "next" => match lessor.next_expiry() {
                    Some(at) => writeln!(out, "{}s", at.as_secs_f64()).unwrap(),
                    None => writeln!(out, "never").unwrap(),
                },
                "checkpoints" => list(&mut out, lessor.checkpoints_due(time("now")?).iter().map(|(id, left)| format!("{id}:{left}"))),
                "checkpoint" => {
                    let stored = lessor.set_checkpoint(id()?, number("remaining")?);
                    writeln!(out, "{}", stored.map_or("none".into(), |lease| format!("stored {lease:?}"))).unwrap();
                }
                _ => return Err(format!("unknown command {verb}")),
            }
            self.lessor.each_lease_queued_once()?;
            self.lessor.keys_point_back(self.store.iter().map(|(key, id)| (&key[..], *id)))?;
            Ok(out)
        }
    }

    fn list<T: ToString>(out: &mut String, items: impl IntoIterator<Item = T>) {
        let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
        writeln!(out, "{}", if items.is_empty() { "none".into() } else { items.join(" ") }).unwrap();
    }

    #[test]
    fn golden_scripts() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/lease");
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.file_name().is_some_and(|name| name != "README.txt"));
        paths.sort();
        assert!(!paths.is_empty());
        for path in paths {
            let text = fs::read_to_string(&path).unwrap();
            let lines: Vec<(usize, &str)> = (1..)
                .zip(text.lines().map(|line| line.split('#').next().unwrap_or("").trim_end()))
                .filter(|(_, line)| !line.is_empty())
                .collect();
            let mut script = Script::new();
            for block in lines.chunk_by(|_, (_, next)| !next.starts_with("> ")) {
                let (at, command) = block[0];
                let place = format!("{}:{at}: {command}", path.display());
                let actual = script.run(command.strip_prefix("> ").expect(&place)).unwrap_or_else(|e| panic!("{place}: {e}"));
                let expected: String = block[1..].iter().flat_map(|(_, line)| [line, "\n"]).collect();
                assert_eq!(actual, expected, "{place}\n--- got ---\n{actual}--- expected ---\n{expected}");
            }
        }
    }

    // Properties, against a model that looks at every lease at every step.

    #[derive(Debug, Clone)]
    struct Plain {
        id: i64,
        ttl: i64,
        remaining_ttl: i64,
        expiry: Duration,
        retry: Option<Duration>,
        refreshed: Duration,
        offered: bool,
        keys: Vec<Bytes>,
    }

    #[derive(Debug, Default)]
    struct Model {
        primary: bool,
        leases: Vec<Plain>,
    }

    const RETRY: Duration = Duration::from_secs(3);
    const INTERVAL: Duration = Duration::from_secs(20);

    impl Model {
        fn get(&mut self, id: i64) -> Option<&mut Plain> {
            self.leases.iter_mut().find(|lease| lease.id == id)
        }

        fn sorted(&self) -> Vec<i64> {
            let mut all: Vec<&Plain> = self.leases.iter().collect();
            all.sort_by_key(|lease| (self.primary.then_some(lease.expiry), lease.id));
            all.iter().map(|lease| lease.id).collect()
        }

        fn expired(&mut self, now: Duration, max: usize) -> Vec<i64> {
            if !self.primary {
                return vec![];
            }
            let mut due: Vec<&mut Plain> = self.leases.iter_mut().filter(|lease| lease.retry.unwrap_or(lease.expiry) <= now).collect();
            due.sort_by_key(|lease| (lease.retry.unwrap_or(lease.expiry), lease.id));
            due.truncate(max);
            due.iter_mut().for_each(|lease| lease.retry = Some(now + RETRY));
            due.iter().map(|lease| lease.id).collect()
        }

        fn checkpoints(&mut self, now: Duration) -> Vec<(i64, i64)> {
            let mut due = vec![];
            for lease in self.leases.iter_mut().filter(|lease| self.primary && lease.retry.is_none()) {
                let long = lease.expiry > lease.refreshed + INTERVAL;
                if long && lease.refreshed + INTERVAL <= now {
                    let place = lease.refreshed;
                    lease.refreshed = now;
                    let left = lease.expiry.saturating_sub(now).as_secs_f64().ceil() as i64;
                    if left > 0 && left < lease.ttl {
                        lease.offered = true;
                        due.push((place, lease.id, left));
                    }
                }
            }
            due.sort();
            due.into_iter().map(|(_, id, left)| (id, left)).collect()
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Grant(i64, i64),
        Revoke(i64),
        Attach(i64, u8),
        Detach(i64, u8),
        Renew(i64),
        Checkpoint(i64, i64),
        Expired(usize),
        Due,
        Promote(u64),
        Demote,
        Restart,
        Wait(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let id = -2i64..8;
        prop_oneof![
            6 => (id.clone(), -5i64..60).prop_map(|(id, ttl)| Op::Grant(id, ttl)),
            1 => (id.clone(), MAX_TTL - 1..MAX_TTL + 2).prop_map(|(id, ttl)| Op::Grant(id, ttl)),
            2 => id.clone().prop_map(Op::Revoke),
            3 => (id.clone(), 0u8..6).prop_map(|(id, key)| Op::Attach(id, key)),
            2 => (id.clone(), 0u8..6).prop_map(|(id, key)| Op::Detach(id, key)),
            4 => id.clone().prop_map(Op::Renew),
            2 => (id, -5i64..70).prop_map(|(id, left)| Op::Checkpoint(id, left)),
            4 => (0usize..4).prop_map(Op::Expired),
            3 => Just(Op::Due),
            2 => (0u64..3).prop_map(Op::Promote),
            1 => Just(Op::Demote),
            1 => Just(Op::Restart),
            8 => (0u64..15_000).prop_map(Op::Wait),
        ]
    }

    proptest! {
        #[test]
        fn does_what_the_plain_model_does(ops in prop::collection::vec(op(), 1..120)) {
            let options = LessorOptions { min_ttl: 2, checkpoint_interval: Some(INTERVAL), revoke_retry: RETRY };
            let (mut lessor, mut model) = (Lessor::new(options), Model::default());
            let mut now = Duration::ZERO;
            for op in ops {
                match op {
                    Op::Wait(millis) => now += Duration::from_millis(millis),
                    Op::Grant(id, ttl) => {
                        let expected = match model.get(id) {
                            _ if id == 0 => Err(ApplyError::LeaseNotFound),
                            _ if ttl > MAX_TTL => Err(ApplyError::LeaseTtlTooLarge),
                            Some(_) => Err(ApplyError::LeaseExists),
                            None => Ok(ttl.max(2)),
                        };
                        prop_assert_eq!(lessor.grant(id, ttl, now), expected);
                        if let Ok(ttl) = expected {
                            let expiry = now + Duration::from_secs(ttl as u64);
                            let (retry, offered, keys) = (None, false, vec![]);
                            model.leases.push(Plain { id, ttl, remaining_ttl: 0, expiry, retry, refreshed: now, offered, keys });
                        }
                    }
                    Op::Revoke(id) => {
                        let mut expected = model.get(id).map(|lease| lease.keys.clone()).ok_or(ApplyError::LeaseNotFound);
                        let _ = expected.as_mut().map(|keys| keys.sort());
                        prop_assert_eq!(lessor.revoke(id), expected);
                        model.leases.retain(|lease| lease.id != id);
                    }
                    Op::Attach(id, key) => {
                        let key = Bytes::copy_from_slice(&[key]);
                        if model.get(id).is_some() {
                            if let Some(old) = model.leases.iter_mut().find(|lease| lease.keys.contains(&key)) {
                                old.keys.retain(|other| *other != key);
                                prop_assert!(lessor.detach(old.id, &key));
                            }
                            model.get(id).unwrap().keys.push(key.clone());
                            prop_assert_eq!(lessor.attach(id, key), Ok(()));
                        } else {
                            prop_assert_eq!(lessor.attach(id, key), Err(ApplyError::LeaseNotFound));
                        }
                    }
                    Op::Detach(id, key) => {
                        let mut was = false;
                        if let Some(lease) = model.get(id) {
                            was = lease.keys.contains(&Bytes::copy_from_slice(&[key]));
                            lease.keys.retain(|other| other[..] != [key]);
                        }
                        prop_assert_eq!(lessor.detach(id, &[key]), was);
                    }
                    Op::Renew(id) => {
                        let primary = model.primary;
                        let expected = match model.get(id) {
                            _ if !primary => Err(ApplyError::NotLeader),
                            None => Err(ApplyError::LeaseNotFound),
                            Some(lease) if lease.retry.is_some() || lease.expiry <= now => Ok(Renewal::Expired),
                            Some(lease) => {
                                lease.expiry = lease.expiry.max(now + Duration::from_secs(lease.ttl as u64));
                                lease.refreshed = now;
                                Ok(Renewal::Renewed { ttl: lease.ttl, clear_checkpoint: lease.offered || lease.remaining_ttl > 0 })
                            }
                        };
                        prop_assert_eq!(lessor.renew(id, now), expected);
                    }
                    Op::Checkpoint(id, left) => {
                        let expected = model.get(id).map(|lease| {
                            lease.remaining_ttl = left.max(0).min(lease.ttl);
                            lease.offered = false;
                            Lease { id, ttl: lease.ttl, remaining_ttl: lease.remaining_ttl }
                        });
                        prop_assert_eq!(lessor.set_checkpoint(id, left), expected);
                    }
                    Op::Expired(max) => prop_assert_eq!(lessor.expired(now, max), model.expired(now, max)),
                    Op::Due => prop_assert_eq!(lessor.checkpoints_due(now), model.checkpoints(now)),
                    Op::Promote(extend) => {
                        let extend = Duration::from_secs(extend);
                        lessor.promote(now, extend);
                        model.primary = true;
                        for lease in &mut model.leases {
                            let full = if lease.remaining_ttl > 0 { lease.remaining_ttl } else { lease.ttl };
                            lease.expiry = now + Duration::from_secs(full as u64) + extend;
                            (lease.refreshed, lease.retry, lease.offered) = (now, None, false);
                        }
                    }
                    Op::Demote => {
                        lessor.demote();
                        model.primary = false;
                        model.leases.iter_mut().for_each(|lease| lease.offered = false);
                    }
                    Op::Restart => {
                        let stored: Vec<Lease> = lessor.stored().collect();
                        for lease in &stored {
                            prop_assert_eq!(&Lease::decode(&lease.encode()), &Ok(*lease));
                        }
                        lessor.restore(stored);
                        model.primary = false;
                        for lease in &mut model.leases {
                            lease.offered = false;
                            for key in &lease.keys {
                                lessor.attach(lease.id, key.clone()).unwrap();
                            }
                        }
                    }
                }
                prop_assert_eq!(lessor.each_lease_queued_once(), Ok(()));
                let attached = model.leases.iter().flat_map(|lease| lease.keys.iter().map(|key| (&key[..], lease.id)));
                prop_assert_eq!(lessor.keys_point_back(attached), Ok(()));
                prop_assert_eq!(lessor.leases(), model.sorted());
                prop_assert_eq!(lessor.len(), model.leases.len());
                let next = model.leases.iter().map(|lease| lease.retry.unwrap_or(lease.expiry)).min();
                prop_assert_eq!(lessor.next_expiry(), next.filter(|_| model.primary));
                for lease in &mut model.leases {
                    lease.keys.sort();
                    let full = if lease.remaining_ttl > 0 { lease.remaining_ttl } else { lease.ttl };
                    let remaining = if model.primary { lease.expiry.saturating_sub(now).as_secs() as i64 } else { full };
                    let expected = TimeToLive { granted: lease.ttl, remaining, keys: lease.keys.clone() };
                    prop_assert_eq!(lessor.time_to_live(lease.id, now, true), Some(expected));
                    prop_assert_eq!(lessor.lease(lease.id).map(|stored| stored.ttl), Some(lease.ttl));
                }
            }
        }

        #[test]
        fn decode_takes_only_what_encode_wrote(bytes in prop::collection::vec(any::<u8>(), 0..40), at in 0usize..Lease::ENCODED, flip in 1u8..) {
            prop_assert!(Lease::decode(&bytes).is_err());
            let mut stored = Lease { id: 7, ttl: 60, remaining_ttl: 5 }.encode();
            prop_assert!(Lease::decode(&stored).is_ok());
            stored[at] ^= flip;
            prop_assert!(Lease::decode(&stored).is_err());
        }
    }

    #[test]
    fn decode_refuses_impossible_values() {
        for (id, ttl, remaining_ttl) in [(0, 10, 0), (7, 0, 0), (7, -1, 0), (7, MAX_TTL + 1, 0), (7, 10, 11), (7, 10, -1)] {
            let lease = Lease { id, ttl, remaining_ttl };
            assert!(Lease::decode(&lease.encode()).unwrap_err().contains("impossible"), "{lease:?}");
        }
    }

    #[test]
    fn the_invariants_notice_what_they_are_for() {
        let mut lessor = Lessor::new(LessorOptions::default());
        lessor.promote(Duration::ZERO, Duration::ZERO);
        lessor.grant(7, 600, Duration::ZERO).unwrap();
        lessor.attach(7, Bytes::from_static(b"a")).unwrap();
        assert_eq!(lessor.keys_point_back([(&b"a"[..], 7), (b"b", 0)]), Ok(()));
        assert_eq!(lessor.keys_point_back([]), Err("leases list 1 keys, but 0 keys have leases".into()));
        assert_eq!(lessor.keys_point_back([(&b"b"[..], 7)]), Err("key b has lease 7, which does not list it".into()));
        lessor.queues.checkpoints.clear();
        assert_eq!(lessor.each_lease_queued_once(), Err("checkpoint queue: (300s, 7) is missing".into()));
        lessor.queues.revoking.insert((Duration::ZERO, 7));
        assert_eq!(lessor.each_lease_queued_once(), Err("revoking queue: (0ns, 7) is left over".into()));
    }

    #[test]
    fn checkpoints_come_in_bounded_batches() {
        let mut lessor = Lessor::new(LessorOptions::default());
        lessor.promote(Duration::ZERO, Duration::ZERO);
        for id in 1..=MAX_CHECKPOINTS as i64 + 5 {
            lessor.grant(id, 1000, Duration::ZERO).unwrap();
        }
        let now = Duration::from_secs(300);
        assert_eq!(lessor.checkpoints_due(now).len(), MAX_CHECKPOINTS);
        assert_eq!(lessor.checkpoints_due(now), (1001..=1005).map(|id| (id, 700)).collect::<Vec<_>>());
        assert_eq!(lessor.checkpoints_due(now), []);
    }
}
