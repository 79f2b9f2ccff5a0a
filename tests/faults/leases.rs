//! Leases under fault: each holder has one at a time, with two keys, renews it for a while, and then lets it run out, or revokes it.
//!
//! - *Never early*: the keys are there until the TTL has passed since the last renewal that was answered was *sent*. Who finds them gone
//!   has found so no earlier than that.
//! - *Late by at most TTL and election timeout*, counted from when the last fault was healed, for until then there may have been nobody
//!   to revoke anything, and each new leader may give the lease its time once more. What the machine may take besides is generous.
//!
//! That a lease takes both keys with it, at one revision, is seen by the judges of the history: its end stands there as a request that
//! deletes both, whose answer never comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use rand::prelude::*;
use rand::rngs::StdRng;

use crate::checkers::history::{Change, Op, Outcome, Request};
use crate::cluster::ELECTION_MS;
use crate::links::MEMBERS;
use crate::load::Record;
use crate::wire::Client;

/// How long a request of a holder may take. Longer than a member takes at most.
const LIMIT: Duration = Duration::from_secs(9);

/// How often the keys are looked at once the lease is left alone.
const LOOK: Duration = Duration::from_millis(60);

/// What a busy machine may take beside the promised time.
const GRACE: Duration = Duration::from_secs(60);

/// A lease that is left alone may be there for so long, whatever befalls the cluster.
const NEVER: Duration = Duration::from_secs(180);

/// A lease and its keys. Times are nanoseconds on the history's clock.
#[derive(Clone, Debug)]
pub struct Held {
    id: i64,
    keys: [String; 2],
    ttl: Duration,
    /// When the last renewal that was answered was sent: the lease runs no shorter than its TTL from then on.
    renewed: u64,
    /// When the last renewal that may have been one was over: it runs no longer than its TTL from then on.
    touched: u64,
    /// Renewals still to be tried.
    renewals: u32,
    /// It has been revoked, or may have been.
    revoked: bool,
}

impl Held {
    fn ends(&self) -> u64 {
        self.renewed + self.ttl.as_nanos() as u64
    }

    /// The keys were found gone, or the lease said not to be there, at this time.
    fn check_gone(&self, record: &Record, at: u64) {
        if !self.revoked && at < self.ends() {
            let early = Duration::from_nanos(self.ends() - at);
            record.wrong(format!("a lease has ended at least {early:?} early, found so at {:.3} ms: {self:?}", at as f64 / 1e6));
        }
    }

    /// The keys were found there, by a read sent at this time.
    fn check_there(&self, record: &Record, sent: u64) {
        let nanos = |time: Duration| time.as_nanos() as u64;
        let due = self.touched + nanos(self.ttl);
        // Beyond u64::MAX while there is a fault.
        let promised = due.max(record.healed.load(SeqCst)).saturating_add(nanos(self.ttl + Duration::from_millis(ELECTION_MS) + GRACE));
        if sent > promised || sent > due + nanos(NEVER) {
            record.wrong(format!("a lease that ought to have ended long ago is there at {:.3} ms: {self:?}", sent as f64 / 1e6));
        }
    }
}

/// Holds leases until told to stop. Returns the one that is held then.
pub async fn hold(
    record: Arc<Record>,
    stop: Arc<AtomicBool>,
    mut clients: [Client; MEMBERS],
    mut held: Option<Held>,
    mut rng: StdRng,
) -> Option<Held> {
    let number = record.client();
    while !stop.load(SeqCst) {
        let at = rng.random_range(0..MEMBERS);
        let client = &mut clients[at];
        let Some(lease) = &mut held else {
            held = begin(&record, number, at, client, &mut rng).await;
            tokio::time::sleep(LOOK).await;
            continue;
        };
        if lease.renewals > 0 {
            lease.renewals -= 1;
            tokio::time::sleep(lease.ttl.mul_f64(rng.random_range(0.05..0.6))).await;
            if stop.load(SeqCst) {
                break;
            }
            let sent = record.now();
            let renewed = tokio::time::timeout(LIMIT, client.renew(lease.id)).await;
            lease.touched = record.now();
            match renewed {
                Ok(Ok(0)) => {
                    lease.check_gone(&record, lease.touched);
                    lease.renewals = 0;
                }
                Ok(Ok(_)) => lease.renewed = sent,
                _ => {}
            }
            continue;
        }
        if !lease.revoked && rng.random_ratio(1, 40) {
            lease.revoked = true;
            let _ = tokio::time::timeout(LIMIT, client.revoke(lease.id)).await;
        }
        let sent = record.now();
        let request = Request { reads: lease.keys.to_vec(), ..Request::default() };
        let (answered, op) = record.send(number, at, client, request, LIMIT).await;
        if answered && let Some((at, answer)) = op.answer() {
            if answer.found.iter().all(Option::is_none) {
                lease.check_gone(&record, at);
                record.lease_ended(at.saturating_sub(lease.touched + lease.ttl.as_nanos() as u64), lease.revoked);
                held = None;
            } else {
                lease.check_there(&record, sent);
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    held
}

/// Grants a lease and puts its keys. None if that was not answered: then nobody knows.
async fn begin(record: &Record, number: usize, at: usize, client: &mut Client, rng: &mut StdRng) -> Option<Held> {
    let (id, sent) = (rng.random_range(1..i64::MAX), record.now());
    let granted = tokio::time::timeout(LIMIT, client.grant(id, rng.random_range(1..5))).await;
    let ttl = Duration::from_secs(granted.ok()?.ok()?.unsigned_abs());
    let name = record.value();
    let keys = ["1", "2"].map(|half| format!("lease/{name}/{half}"));
    let changes = |value: Option<u64>| keys.clone().map(|key| Change { key, value }).to_vec();
    // It stands for the lease's end, whenever that is.
    let end = Request { writes: changes(None), ..Request::default() };
    let start = record.starts[at].load(SeqCst);
    record.push(Op { client: number, member: at, start, call: record.now(), request: end, outcome: Outcome::Unknown });
    let put = Request { writes: changes(Some(record.value())), lease: id, ..Request::default() };
    let (answered, _) = record.send(number, at, client, put, LIMIT).await;
    answered.then(|| Held { id, keys, ttl, renewed: sent, touched: record.now(), renewals: rng.random_range(0..6), revoked: false })
}
