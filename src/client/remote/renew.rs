//! Renewals of a lease of which the time is short: a session's.
//!
//! ```text
//! the member in use ── answers within the patience ───────────────────────────> done
//!                   ── refuses, fails or is silent ─> leave it, and ask all members at once,
//!                                                     each again and again ──> the first that answers is in use from then on
//!                                                     none in the same time ─> connections are made anew with the next try
//! ```
//!
//! # What it is for
//! After a leader is gone, nobody knows which member will answer first, and how long the others will be silent. Asked one after the other,
//! each silent one costs its time. Asked all at once, none delays another: a member that answers a renewal at any moment of the round
//! is heard, at the latest a pause after it could have answered. To renew a lease twice does no harm. So a session outlives an election if the
//! cluster is back before the session counts as lost, less [`RETRY`] and the way there and back.

use std::time::Duration;

use futures_util::future::select_all;

use super::Timers;
use crate::error::{Error, Result};

/// The pause before a member is asked again that has refused or failed. Short, for it may be the last moment; and long enough that members
/// without a leader are not kept busy with saying so.
pub(in crate::client) const RETRY: Duration = Duration::from_millis(100);

/// Asks the first, and then all.
///
/// # Errors
/// `Timeout` when there is no answer in twice that patience; `Unavailable` when there is nobody to ask; `Stopped`.
pub(in crate::client) async fn soon<M: Clone, T, F: Future<Output = Result<T>>>(
    timers: &Timers,
    patience: Duration,
    first: Option<M>,
    all: impl FnOnce() -> Vec<M>,
    ask: impl Fn(M) -> F,
) -> Result<T> {
    if let Some(first) = first {
        match timers.within(Some(patience), ask(first)).await {
            Ok(Ok(done)) => return Ok(done),
            Err(Error::Stopped) => return Err(Error::Stopped),
            Ok(Err(err)) | Err(err) => tracing::debug!(error = %err, "the member in use does not renew a lease: all are asked"),
        }
    }
    let ask = &ask;
    let again = |member: M| async move {
        loop {
            match ask(member.clone()).await {
                Ok(done) => return Ok::<T, Error>(done),
                // One that is mistaken shall not keep the others from answering.
                Err(err) => tracing::debug!(error = %err, "a member does not renew a lease yet"),
            }
            timers.sleep(RETRY).await?;
        }
    };
    let asked: Vec<_> = all().into_iter().map(|member| Box::pin(again(member))).collect();
    if asked.is_empty() {
        return Err(Error::Unavailable("no endpoints are known".into()));
    }
    timers.within(Some(patience), select_all(asked)).await?.0
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::runtime::Handle;
    use tokio::time::{Instant, sleep, sleep_until};

    use super::*;
    use crate::client::backend::RuntimeEnd;

    /// How a member behaves until the cluster is back.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Until {
        /// It says nothing, and never will.
        Silent,
        /// It has no leader, and says so.
        Refuses,
        /// It waits for a leader before it answers.
        Holds,
        /// Nobody listens, and never will.
        Gone,
    }

    /// The way there and back.
    const WAY: Duration = Duration::from_millis(10);

    async fn ask(member: Until, back: Instant) -> Result<i64> {
        sleep(WAY).await;
        match member {
            Until::Silent => std::future::pending().await,
            Until::Holds => sleep_until(back).await,
            Until::Refuses if Instant::now() >= back => {}
            Until::Refuses | Until::Gone => return Err(Error::Unavailable("for the test".into())),
        }
        Ok(12)
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_answers_is_heard() {
        use Until::*;
        let timers = Timers::new(Handle::current(), RuntimeEnd::default());
        let patience = Duration::from_secs(2);
        for first in [None, Some(Silent), Some(Refuses), Some(Gone), Some(Holds)] {
            for others in [vec![Silent, Gone, Refuses], vec![Silent, Holds, Gone], vec![Refuses], vec![Gone, Gone, Silent, Holds]] {
                for ms in (0..=3_800).step_by(37) {
                    let began = Instant::now();
                    let back = began + Duration::from_millis(ms);
                    // As a session does: again, until it is done.
                    let first = Cell::new(first);
                    let done = loop {
                        let outcome = soon(&timers, patience, first.take(), || others.clone(), |member| ask(member, back)).await;
                        if let Ok(ttl) = outcome {
                            break ttl;
                        }
                    };
                    assert_eq!(done, 12);
                    // The first one's silence is its own; after that nobody costs anybody anything.
                    let heard = back.max(began + patience) + RETRY + 3 * WAY;
                    assert!(Instant::now() <= heard, "{first:?} and {others:?}, back after {ms} ms: {:?}", began.elapsed());
                }
            }
        }
        let nobody = soon(&timers, patience, None::<Until>, Vec::new, |member| ask(member, Instant::now())).await;
        assert!(matches!(nobody, Err(Error::Unavailable(_))));
    }
}
