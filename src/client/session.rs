//! Sessions: a lease that is kept alive, and a word in time when it can be no more.
//!
//! # The word
//! What hangs on the lease (a lock, a lead) is lost when the lease runs out, and another may have it from then on. A session counts from
//! *before* each renewal was sent: until that moment and the TTL have gone by, no member lets the lease expire. It says `lost` a *margin*
//! before that, if no renewal has succeeded: a quarter of the TTL, from half a second to five seconds. That is the time in which to stop what
//! relied on it. Time is the monotonic clock's.
//!
//! # Elections
//! A third of the TTL after the last renewal was sent the next one is tried, and then again and again, at all members at once if need be
//! ([`renew`](super::remote) says how). So a session outlives an election, or any other trouble, after which some member answers while there is more
//! left than the margin, a tenth of a second and the way there and back. With a TTL of 15 s that is trouble of 6 s whenever it begins, and
//! of 11 s if it begins with a renewal. Who wants a session to outlive more wants a longer TTL.
//!
//! # Caveat
//! A process that stands still (suspended, swapped out, stopped) hears nothing in time. Whoever must be sure gives the
//! [fencing revision](super::Lock::revision) to what it writes to, or writes with the [lock's condition](super::Lock::is_held) in a Txn.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backend::Task;
use super::turns::Turns;
use super::{Client, Result};
use crate::error::{ApplyError, Error, ErrorKind};

/// Renewals in the time of a TTL, when they succeed.
const RENEWALS: u32 = 3;

/// The pause before a renewal that has failed is tried again.
const RENEWAL_RETRY: Duration = Duration::from_millis(100);

/// The pause before something is tried again that has to be done before the session ends.
const INSIST_RETRY: Duration = Duration::from_millis(100);

/// Of the TTL, how much before its end the session counts as lost.
fn margin(ttl: Duration) -> Duration {
    (ttl / 4).clamp(Duration::from_millis(500), Duration::from_secs(5))
}

/// A lease that is kept alive as long as there is a clone of this, a [`Lock`](super::Lock) or a [`Leadership`](super::Leadership) of it. After that it
/// runs out by itself; [`close`](Self::close) ends it at once. From [`Client::session`].
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    client: Client,
    lease: i64,
    life: Arc<Life>,
    turns: Arc<Turns>,
    /// Keeps it alive.
    #[allow(dead_code, reason = "it ends when this is dropped")]
    keeper: Task,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lease = format_args!("{:x}", self.0.lease).to_string();
        f.debug_struct("Session").field("lease", &lease).field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}

/// How long the lease can be relied on.
struct Life {
    began: Instant,
    /// Milliseconds from then.
    until_ms: AtomicU64,
    lost: CancellationToken,
}

impl Life {
    fn extend(&self, until: Instant) {
        let ms = until.saturating_duration_since(self.began).as_millis();
        self.until_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// The clock is asked, too: who keeps the lease alive may be late.
    fn is_lost(&self) -> bool {
        self.lost.is_cancelled() || self.began.elapsed().as_millis() >= u128::from(self.until_ms.load(Ordering::Acquire))
    }
}

impl Client {
    /// Grants a lease of `ttl` seconds and keeps it alive. Servers have a least TTL (2 s by default) and take less for that.
    ///
    /// # Errors
    /// As [`put`](Self::put). One that leaves the outcome open may leave a lease behind, which runs out unused.
    pub async fn session(&self, ttl: i64) -> Result<Session> {
        let sent = Instant::now();
        let granted = self.lease_grant(0, ttl).await?;
        Ok(Session::keep(self.clone(), granted.id, granted.ttl, sent))
    }

    /// Keeps alive a lease that is there already.
    ///
    /// # Errors
    /// `LeaseNotFound` when it is not.
    pub async fn session_of(&self, lease: i64) -> Result<Session> {
        let sent = Instant::now();
        let ttl = self.lease_keep_alive(lease).await?;
        Ok(Session::keep(self.clone(), lease, ttl, sent))
    }
}

impl Session {
    fn keep(client: Client, lease: i64, ttl: i64, sent: Instant) -> Session {
        let life = Arc::new(Life { began: sent, until_ms: AtomicU64::new(0), lost: CancellationToken::new() });
        // Set before anybody can ask.
        let ttl = seconds(ttl);
        life.extend(sent + ttl - margin(ttl).min(ttl));
        let backend = client.backend.clone();
        let renew = move |patience, is_late| {
            let backend = backend.clone();
            async move { backend.lease_renew_soon(lease, patience, is_late).await }
        };
        let keeper = client.backend.spawn(keep_alive(renew, lease, ttl, sent, life.clone()));
        Session(Arc::new(Inner { client, lease, life, turns: Arc::default(), keeper }))
    }

    /// The lease's id, for [`PutRequest::lease`](crate::proto::etcdserverpb::PutRequest).
    pub fn lease(&self) -> i64 {
        self.0.lease
    }

    /// The client that the session was made with.
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// Returns when the lease is not to be relied on any more: before it runs out, or as soon as it is known to be gone. See the head of the
    /// module for the margin.
    pub async fn lost(&self) {
        self.0.life.lost.cancelled().await;
    }

    /// Whether the lease is not to be relied on any more.
    pub fn is_lost(&self) -> bool {
        self.0.life.is_lost()
    }

    /// Ends the lease, and with it deletes its keys: locks and leads are free at once. All clones are lost.
    ///
    /// # Errors
    /// As [`Client::lease_revoke`]; the lease then runs out by itself.
    pub async fn close(self) -> Result<()> {
        self.0.life.lost.cancel();
        match self.0.client.lease_revoke(self.0.lease).await {
            Err(err) if err.kind() == ErrorKind::LeaseNotFound => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Who of those that share the session has to do with which queue.
    pub(super) fn turns(&self) -> &Arc<Turns> {
        &self.0.turns
    }

    /// What comes of it, unless the session is lost before.
    ///
    /// # Errors
    /// `SessionLost`.
    pub(super) async fn unless_lost<T>(&self, what: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.lost() => Err(Error::SessionLost),
            outcome = what => Ok(outcome),
        }
    }

    /// Tries until there is an answer, or the session is lost. Only for what may be done twice.
    ///
    /// # Errors
    /// The answer, if it is an error; `SessionLost`.
    pub(super) async fn insist<T, F: Future<Output = Result<T>>>(&self, attempt: impl Fn() -> F) -> Result<T> {
        let trying = async {
            loop {
                match attempt().await {
                    Err(err) if err.kind().nothing_was_done() || err.kind() == ErrorKind::OutcomeUnknown => {
                        tracing::debug!(error = %err, "tried again, as long as the session lasts");
                        self.0.client.backend.pause(INSIST_RETRY).await?;
                    }
                    // The lease that the key was to hang on.
                    Err(Error::Apply(ApplyError::LeaseNotFound)) => return Err(Error::SessionLost),
                    outcome => return outcome,
                }
            }
        };
        self.unless_lost(trying).await?
    }
}

/// The longest TTL there is: etcd's, some 285 years. What a server says beyond it counts as this, so that no moment in time overflows.
const TTL_MAX_SECS: u64 = 9_000_000_000;

fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0).min(TTL_MAX_SECS))
}

/// Renews a lease again and again. When it ends, whyever, the lease is lost. `renew` is given the time after which to ask other
/// members, and whether it has failed before.
async fn keep_alive<F: Future<Output = Result<i64>>>(
    renew: impl Fn(Duration, bool) -> F,
    lease: i64,
    mut ttl: Duration,
    mut confirmed: Instant,
    life: Arc<Life>,
) {
    let lost = life.lost.clone();
    let _lost_in_the_end = lost.clone().drop_guard();
    loop {
        let until = confirmed + ttl - margin(ttl).min(ttl);
        life.extend(until);
        tokio::select! {
            () = lost.cancelled() => return,
            () = tokio::time::sleep_until((confirmed + ttl / RENEWALS).min(until)) => {}
        }
        let mut is_late = false;
        loop {
            let sent = Instant::now();
            if sent >= until {
                tracing::warn!(lease = %format_args!("{lease:x}"), "a session is lost: its lease could not be renewed in time");
                return;
            }
            // A member that is silent is not waited for until it is too late to ask another.
            let renewing = renew(ttl / RENEWALS / 2, is_late);
            is_late = true;
            let outcome = tokio::select! {
                () = lost.cancelled() => return,
                outcome = tokio::time::timeout_at(until, renewing) => outcome,
            };
            match outcome {
                Ok(Ok(0)) => {
                    tracing::warn!(lease = %format_args!("{lease:x}"), "a session is lost: its lease is gone");
                    return;
                }
                Ok(Ok(renewed)) => {
                    (ttl, confirmed) = (seconds(renewed), sent);
                    break;
                }
                Ok(Err(err)) => {
                    tracing::debug!(lease = %format_args!("{lease:x}"), error = %err, "a lease could not be renewed yet");
                    tokio::time::sleep_until((sent + RENEWAL_RETRY).max(Instant::now()).min(until)).await;
                }
                // Too late.
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::backend::{RuntimeEnd, Timers};
    use crate::client::remote::renew::{RETRY, soon};

    /// With a member that is silent, one that is gone, and one that answers as soon as the cluster is back: whenever that is before the last
    /// moment, the session lasts; and if it never is, the session is lost at that moment.
    #[tokio::test(start_paused = true)]
    async fn a_session_outlives_an_election() {
        const WAY: Duration = Duration::from_millis(10);
        #[derive(Clone)]
        enum Member {
            Silent,
            Gone,
            Back(Instant),
        }
        let timers = Timers::new(tokio::runtime::Handle::current(), RuntimeEnd::default());
        for secs in [2u32, 5, 15, 60] {
            let ttl = Duration::from_secs(secs.into());
            let reliable = ttl - margin(ttl);
            let steps = 97;
            for step in 0..=steps + 1 {
                let began = Instant::now();
                let in_time = step <= steps;
                // The last moment, at the latest; or never.
                let trouble = if in_time { (reliable - RETRY - 3 * WAY) * step / steps } else { 10 * ttl };
                let back = began + trouble;
                let life = Arc::new(Life { began, until_ms: AtomicU64::new(0), lost: CancellationToken::new() });
                let ask = |member: Member| async move {
                    tokio::time::sleep(WAY).await;
                    match member {
                        Member::Silent => std::future::pending().await,
                        Member::Back(back) if Instant::now() >= back => Ok(i64::from(secs)),
                        Member::Gone | Member::Back(_) => Err(Error::Unavailable("for the test".into())),
                    }
                };
                let renew = |patience, is_late: bool| {
                    let (timers, first) = (&timers, (!is_late).then_some(Member::Silent));
                    let all = move || vec![Member::Silent, Member::Gone, Member::Back(back)];
                    async move { soon(timers, patience, first, all, ask).await }
                };
                let keeping = keep_alive(renew, 7, ttl, began, life.clone());
                let kept = tokio::time::timeout(3 * ttl, keeping).await.is_err();
                assert_eq!(kept, in_time, "TTL {secs} s, trouble for {trouble:?}");
                if !in_time {
                    let lost = began.elapsed();
                    assert!((reliable..=reliable + WAY).contains(&lost), "TTL {secs} s: lost after {lost:?}");
                }
            }
        }
    }

    #[test]
    fn no_ttl_is_too_long_for_the_clock() {
        for ttl in [i64::MIN, -1, 0, 1, 9_000_000_000, i64::MAX] {
            assert!(Instant::now().checked_add(seconds(ttl)).is_some(), "{ttl} s");
        }
    }

    #[test]
    fn the_margin_is_a_quarter_within_bounds() {
        for (ttl, ms) in [(1, 500), (2, 500), (8, 2_000), (20, 5_000), (600, 5_000)] {
            assert_eq!(margin(Duration::from_secs(ttl)), Duration::from_millis(ms), "{ttl} s");
        }
    }
}
