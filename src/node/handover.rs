//! A leader whose disk stands still hands over.
//!
//! Commits do not need the leader's own disk, so a cluster whose leader cannot write goes on for a while; but what that leader acknowledges
//! piles up in its memory, until it takes no more (`LOG_QUEUED_BYTES`), and its own clients wait for what needs its vote. So a
//! leader that has had something to write for an election timeout, none of which has come to the disk, asks the voter that has most of the log to
//! stand for election.
//!
//! ```text
//! look ........ look ........ (10 of them, nothing written) ........ hand over to b ........ b leads
//! ```
//!
//! A leader that hands over, for this reason or because it was told to, sends no more heartbeats and takes no more writes. Were the one it has asked
//! gone by then, and the third too far behind to be elected, nobody would ever lead: so it asks again until it is not the leader any more.
//!
//! # Invariants
//! - Whether the disk stands still is counted in looks, not measured by the clock: a process that was itself paused has not waited for its disk.
//! - Nothing is handed over to one who was not heard of lately, or lacks much, unless it has been begun already.

use super::members::TRANSFER_LAG_MAX;
use super::*;

/// Looks in an election timeout. More find out earlier, and cost more.
const LOOKS: u32 = 10;

/// Counts looks at a log that waits for its disk.
#[derive(Debug, Default)]
struct Stall {
    waits_at: Option<u64>,
    looks: u32,
}

impl Stall {
    /// Notes what a look has found ([`Wal::waits_at`]). Returns whether the disk has stood still for an election timeout.
    fn look(&mut self, waits_at: Option<u64>) -> bool {
        self.looks = if waits_at.is_some() && waits_at == self.waits_at { self.looks.saturating_add(1) } else { 0 };
        self.waits_at = waits_at;
        self.looks >= LOOKS
    }
}

/// Who is to lead: of those that may, the one that has most of the log, but rather not who was asked before.
fn choose(others: impl Iterator<Item = (u64, bool, u64)>, last: u64, begun: bool, asked: Option<u64>) -> Option<u64> {
    let may = |&(_, active, matched): &(u64, bool, u64)| begun || (active && matched + TRANSFER_LAG_MAX >= last);
    let others = others.filter(may).map(|(id, _, matched)| (Some(id) != asked, matched, id));
    others.max().map(|(.., id)| id)
}

impl Node {
    /// Hands over when the disk stands still, and sees to it that what was begun comes to an end.
    pub(super) async fn watch_disk(self: Arc<Self>) {
        let mut stall = Stall::default();
        let mut asked = None;
        loop {
            tokio::time::sleep(self.options.election_timeout / LOOKS).await;
            let stands_still = stall.look(self.wal.waits_at());
            if !self.is_leader() || !self.has_peers() {
                asked = None;
                continue;
            }
            let begun = self.handing_over.load(Ordering::Relaxed) == self.term();
            if !stands_still && !begun {
                asked = None;
                continue;
            }
            if begun && asked.is_none() {
                // By a request: it has just been sent.
                asked = Some(0);
                tokio::time::sleep(2 * self.options.election_timeout).await;
                continue;
            }
            let Some(heir) = self.heir(begun, asked) else { continue };
            if !begun {
                tracing::warn!(to = %format_args!("{heir:x}"), "the disk stands still: leadership is handed over");
            }
            asked = Some(heir);
            if let Err(err) = self.hand_over(heir).await {
                tracing::debug!(error = %err, "handing over");
            }
            tokio::time::sleep(self.options.election_timeout).await;
        }
    }

    /// Asks a voter to lead in this member's place.
    pub(super) async fn hand_over(&self, to: u64) -> Result<()> {
        self.handing_over.store(self.term(), Ordering::Release);
        self.raft.trigger().transfer_leader(to).await.map_err(|err| Error::Failed(err.to_string()))
    }

    /// Whom to ask, as the leader: nobody whose state is known to be wrong.
    pub(super) fn heir(&self, begun: bool, asked: Option<u64>) -> Option<u64> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        let last = now.last_log_index.unwrap_or(0);
        let voters = now.membership_config.membership().voter_ids();
        let others = voters.filter(|id| *id != self.identity.member_id && !self.machine.is_corrupt(*id)).map(|id| {
            let (active, matched) = self.heard_of(&now, id);
            (id, active, matched.unwrap_or(0))
        });
        choose(others, last, begun, asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_writes_does_not_stand_still() {
        let mut stall = Stall::default();
        // However long something waits: what is written is another thing each time.
        assert!((0..100).all(|at| !stall.look(Some(at))));
        assert!((0..100).all(|_| !stall.look(None)));
        assert!((0..LOOKS).all(|_| !stall.look(Some(7))));
        assert!(stall.look(Some(7)));
        assert!(!stall.look(None));
        assert!(!stall.look(Some(7)));
    }

    #[test]
    fn the_heir_is_there_and_has_the_log() {
        let others = || [(2, true, 90), (3, true, 100)].into_iter();
        assert_eq!(choose(others(), 100, false, None), Some(3));
        // Another one is asked next, and then the first again.
        assert_eq!(choose(others(), 100, true, Some(3)), Some(2));
        assert_eq!(choose(others(), 100, true, Some(2)), Some(3));
        let lost = || [(2, false, 100), (3, true, 100)].into_iter();
        assert_eq!(choose(lost(), 100 + TRANSFER_LAG_MAX + 1, false, None), None);
        assert_eq!(choose(lost(), 100, false, None), Some(3));
        assert_eq!(choose(std::iter::once((2, false, 0)), 100, true, Some(2)), Some(2));
    }
}
