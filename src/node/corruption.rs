//! Members compare their states, so that one which has come to differ is found before anybody builds on it.
//!
//! All members apply the same log and come to the same state, unless a bug or a broken machine is in the way. That is not noticed by itself:
//! etcd 3.5.0 lost entries at a crash on single members, and they served what they had for as long as nobody looked. So hashes over
//! the history are compared, in three places:
//!
//! | when | by whom | of what | by default |
//! |---|---|---|---|
//! | before it serves clients | a member that starts | its history, computed by all | yes: a start is when damage comes to light |
//! | every `corrupt-check-time` | the leader | its newest history, computed by all | no: it reads everything, everywhere |
//! | every `compact-hash-check-time` | the leader | what compactions have found, and kept | yes: it costs a message |
//!
//! ```text
//! leader a: compaction at 900 found 5d1b3f0a     b: 5d1b3f0a    c: 77ac0e12    -> CORRUPT alarm for c
//!                                                b: 5d1b3f0a    c: none there  -> skipped, counted, tried again
//!           two voters, a and b                  b: 77ac0e12                   -> CORRUPT alarm for nobody in particular (0)
//! ```
//!
//! # What an alarm does
//! As soon as a majority of the voters has one hash, whoever has another is wrong, and the alarm names it. A member that is named serves
//! no client: reads, writes, renewals, backups and watches fail with etcd's `corrupt cluster`. It does not lead, it hands its state to nobody; but its log is as sound
//! as before, so it goes on to vote and to keep entries, and the quorum has not lost it. **The others go on**, other than in etcd, where any CORRUPT alarm ends all writes everywhere: what a sound
//! majority says is not made doubtful by one that differs, and to stop all is what an alarm is to prevent. Where there is no such majority (an
//! alarm for id 0, or for half of the voters or more), nobody knows who is right, and writes end everywhere, as in etcd.
//!
//! A member that differs when it starts does not start. Either way the operator stops it, takes its `state` directory away, and starts it:
//! it fetches the state anew (see `server/rebuild.rs`). An alarm is then taken back with `etcdctl alarm disarm`.
//!
//! # Invariants
//! - Only hashes of one kind, of one revision and above one compaction are compared. Each is a function of these and of the history alone: how
//!   far a member's compaction has come does not matter.
//! - A mismatch is looked at twice before an alarm is raised.
//! - Whoever could not be compared is counted and told of: a check that finds nothing says what it has looked at.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::proto::peer::{HashRequest, HashResponse};

/// How long the comparison before serving may take. What is not there by then is skipped: a member with much history serves all the same.
const INITIAL_LIMIT: Duration = Duration::from_secs(5);

/// How long the leader's comparisons wait for a member's hash.
const COMPARE_LIMIT: Duration = Duration::from_secs(120);

/// How long a member that is asked waits for a revision that it has not applied yet.
const REVISION_WAIT: Duration = Duration::from_secs(2);

/// What is hashed at once. Beyond it whoever waits for a thread for long work comes first.
const HASH_STEP_BYTES: usize = 16 << 20;

/// How often it looks whether it has.
const REVISION_LOOK: Duration = Duration::from_millis(10);

/// What is to be compared: a hash of one revision, and the compaction below it.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    revision: i64,
    compacted: i64,
    of_compaction: bool,
}

/// What a comparison comes to.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All that could be compared have the same.
    Equal,
    /// A majority of the voters has the same; these have not.
    Wrong(Vec<u64>),
    /// They differ, and no hash has a majority of the voters.
    Open,
}

/// Judges the hashes of members, of which some vote.
fn judge(voters: &BTreeSet<u64>, hashes: &BTreeMap<u64, u32>) -> Verdict {
    let mut holders: BTreeMap<u32, usize> = BTreeMap::new();
    for (id, hash) in hashes {
        *holders.entry(*hash).or_default() += usize::from(voters.contains(id));
    }
    if holders.len() <= 1 {
        return Verdict::Equal;
    }
    match holders.iter().find(|(_, count)| **count * 2 > voters.len()) {
        Some((right, _)) => Verdict::Wrong(hashes.iter().filter(|(_, hash)| *hash != right).map(|(id, _)| *id).collect()),
        None => Verdict::Open,
    }
}

fn names(ids: &[u64]) -> String {
    ids.iter().map(|id| format!("{id:x}")).collect::<Vec<_>>().join(", ")
}

impl Node {
    /// Whether this member's state is known to be wrong.
    pub fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Relaxed)
    }

    /// Refuses what would be answered from a wrong state.
    pub(super) fn check_sound(&self) -> Result<()> {
        if self.is_condemned() { Err(ApplyError::Corrupt.into()) } else { Ok(()) }
    }

    /// Follows the alarms: is this member named?
    pub(super) fn heed_corruption(&self) {
        // Where those that are not named are no majority, nobody is known to be right: nothing is written then, and all can be read, as in etcd.
        let named = self.machine.is_corrupt(self.identity.member_id) && !self.machine.is_all_corrupt();
        if named == self.condemned.swap(named, Ordering::Relaxed) {
            return;
        }
        self.raft.runtime_config().elect(!named);
        if named {
            let state = self.store().history().backend().path();
            tracing::error!(state = %state.display(), "the state of this member is not what the majority has: it serves no client. {REMEDY}");
            // Watches that have nothing to tell, too, are to go elsewhere.
            self.machine.hub.wake_all();
        } else {
            tracing::info!("the CORRUPT alarm of this member was taken back: it serves again");
        }
    }

    /// Hands over, if this member leads and should not.
    pub(super) async fn stand_back(&self) {
        if !self.is_condemned() || !self.is_leader() {
            return;
        }
        let Some(to) = self.heir(false, None) else { return };
        tracing::warn!(to = %format_args!("{to:x}"), "this member leads and its state is wrong: it hands over");
        if let Err(err) = self.hand_over(to).await {
            tracing::warn!(error = %err, "handing over");
        }
    }

    /// Hashes the history up to a revision: one after the other, whoever asks, and in steps, so that the threads for long work are there
    /// for others in between, and nothing goes on for those who have given up waiting.
    ///
    /// # Errors
    /// `Compacted` or `FutureRevision`; or a record that cannot be read.
    pub(super) async fn compute_hash(&self, revision: i64) -> Result<KvHash> {
        let _one = self.hashing.lock().await;
        let store = self.store();
        let mut hashing = self.blocking(move || store.begin_hash(revision)).await??;
        loop {
            let (back, more) = self
                .blocking(move || {
                    let more = hashing.step(HASH_STEP_BYTES);
                    (hashing, more)
                })
                .await?;
            if !more? {
                return Ok(back.finish());
            }
            hashing = back;
        }
    }

    // ---- Comparing

    /// Compares the state with the other members' before this one serves.
    ///
    /// # Errors
    /// `Corrupt` when the members differ, and this one is not with the majority.
    pub(crate) async fn check_initially(self: &Arc<Self>) -> Result<()> {
        if !self.has_peers() {
            return Ok(());
        }
        let (store, began) = (self.store(), Instant::now());
        let own = self.within(INITIAL_LIMIT, self.compute_hash(store.revision())).await;
        let own = match own {
            Err(Error::Timeout) => {
                self.counters().corruption_skipped.inc();
                tracing::warn!(limit = ?INITIAL_LIMIT, "the state takes too long to be hashed: it was not compared before serving");
                return Ok(());
            }
            own => own??,
        };
        let wanted = Wanted { revision: own.hashed, compacted: own.compacted, of_compaction: false };
        let mut hashes = self.ask_all(wanted, INITIAL_LIMIT.saturating_sub(began.elapsed())).await;
        let compared = hashes.len();
        hashes.insert(self.identity.member_id, own.hash);
        let (revision, hash) = (own.hashed, own.hash);
        match judge(&self.voters(), &hashes) {
            Verdict::Equal => {
                tracing::info!(revision, hash, compared, took = ?began.elapsed(), "the state was compared with the other members'");
                return Ok(());
            }
            Verdict::Wrong(wrong) if !wrong.contains(&self.identity.member_id) => {
                self.counters().corruption_mismatches.inc();
                tracing::error!(revision, members = names(&wrong), "the state of members is not what this one and the majority have");
                let node = self.clone();
                self.spawn(async move { node.raise(&wrong).await });
                return Ok(());
            }
            Verdict::Wrong(_) | Verdict::Open => {}
        }
        self.counters().corruption_mismatches.inc();
        let others: Vec<u64> = hashes.iter().filter(|(_, other)| **other != hash).map(|(id, _)| *id).collect();
        let what = format!(
            "found data inconsistency with peers: at revision {revision}, above compaction {}, members {} have another state. {REMEDY}",
            own.compacted,
            names(&others)
        );
        Err(Error::Corrupt { path: store.history().backend().path(), offset: None, what })
    }

    /// As the leader, compares all members' histories.
    pub(super) async fn compare_states(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.options.corrupt_check_time).await;
            if !self.is_leader() || !self.has_peers() {
                continue;
            }
            // Once more when something is found: with all of it computed anew.
            for again in [false, true] {
                let own = match self.compute_hash(self.store().revision()).await {
                    Ok(own) => own,
                    Err(err) => {
                        tracing::warn!(error = %err, "hashing the history");
                        break;
                    }
                };
                if self.compare(own, false, again).await.found_nothing {
                    break;
                }
            }
        }
    }

    /// As the leader, compares what all members have found at compactions.
    pub(super) async fn compare_compactions(self: Arc<Self>) {
        // All members have been compared up to here, in this term.
        let (mut done, mut term) = (0, 0);
        loop {
            tokio::time::sleep(self.options.compact_hash_check_time).await;
            if !self.is_leader() || !self.has_peers() {
                continue;
            }
            if term != self.term() {
                (done, term) = (0, self.term());
            }
            // From the newest to the oldest, until one was there at all members: what differs stays different.
            let found = self.store().compaction_hashes();
            for own in found.into_iter().rev().filter(|own| own.hashed > done) {
                let mut seen = self.compare(own, true, false).await;
                if !seen.found_nothing {
                    seen = self.compare(own, true, true).await;
                }
                if seen.of_all || !seen.found_nothing {
                    done = own.hashed;
                    tracing::info!(revision = own.hashed, hash = own.hash, equal = seen.found_nothing, "finished compaction hash check");
                    break;
                }
            }
        }
    }

    /// Compares a hash with the others', and raises alarms if they differ and it was said to.
    async fn compare(&self, own: KvHash, of_compaction: bool, raise: bool) -> Seen {
        let wanted = Wanted { revision: own.hashed, compacted: own.compacted, of_compaction };
        let mut hashes = self.ask_all(wanted, COMPARE_LIMIT).await;
        let of_all = self.others().all(|id| hashes.contains_key(&id) || self.machine.is_corrupt(id));
        hashes.insert(self.identity.member_id, own.hash);
        let verdict = judge(&self.voters(), &hashes);
        if verdict == Verdict::Equal {
            return Seen { found_nothing: true, of_all };
        }
        let all: Vec<String> = hashes.iter().map(|(id, hash)| format!("{id:x}: {hash:08x}")).collect();
        tracing::error!(revision = own.hashed, compacted = own.compacted, hashes = all.join(", "), "found hash mismatch");
        if raise {
            self.counters().corruption_mismatches.inc();
            match verdict {
                Verdict::Wrong(wrong) => self.raise(&wrong).await,
                // For nobody in particular, which is for all.
                _ => self.raise(&[0]).await,
            }
        }
        Seen { found_nothing: false, of_all }
    }

    /// Raises the alarm for members for whom it is not raised yet.
    async fn raise(&self, members: &[u64]) {
        for &member_id in members.iter().filter(|id| !self.machine.is_corrupt(**id)) {
            let request = AlarmRequest { action: AlarmAction::Activate as i32, member_id, alarm: AlarmType::Corrupt as i32 };
            match self.propose(Op::Alarm(request)).await {
                Ok(_) => tracing::error!(member = %format_args!("{member_id:x}"), "raised the CORRUPT alarm. {REMEDY}"),
                Err(err) => tracing::error!(member = %format_args!("{member_id:x}"), error = %err, "raising the CORRUPT alarm"),
            }
        }
    }

    fn voters(&self) -> BTreeSet<u64> {
        self.machine.applied().membership.voter_ids().collect()
    }

    fn others(&self) -> impl Iterator<Item = u64> {
        let others: Vec<u64> = self.machine.applied().membership.nodes().map(|(id, _)| *id).collect();
        others.into_iter().filter(|id| *id != self.identity.member_id)
    }

    /// Asks all other members for a hash, but for those who are known to be wrong. Who has none to compare is counted and told of.
    async fn ask_all(&self, wanted: Wanted, limit: Duration) -> BTreeMap<u64, u32> {
        let membership = self.machine.applied().membership;
        let own = self.identity.member_id;
        let others = membership.nodes().filter(|(id, _)| **id != own && !self.machine.is_corrupt(**id));
        let asked = others.map(|(&id, member)| async move {
            let mut link = self.network.link(id, member);
            let request = HashRequest { revision: wanted.revision, of_compaction: wanted.of_compaction };
            let answer = link.call(request, limit, |mut client, request| async move { client.hash(request).await }).await;
            let hash = match answer {
                Err(status) => Err(status.message().to_owned()),
                Ok(answer) if !answer.skipped.is_empty() => Err(answer.skipped),
                Ok(answer) if answer.compacted != wanted.compacted => {
                    Err(format!("its compaction is {}, and {} here", answer.compacted, wanted.compacted))
                }
                Ok(answer) => Ok(answer.hash),
            };
            (id, hash)
        });
        let mut hashes = BTreeMap::new();
        for (id, hash) in futures_util::future::join_all(asked).await {
            match hash {
                Ok(hash) => {
                    self.counters().corruption_compared.inc();
                    hashes.insert(id, hash);
                }
                Err(reason) => {
                    self.counters().corruption_skipped.inc();
                    let member = format_args!("{id:x}");
                    tracing::warn!(%member, revision = wanted.revision, reason, "the state of a member could not be compared");
                }
            }
        }
        hashes
    }

    // ---- What other members ask

    /// A hash for another member to compare with its own.
    pub async fn peer_hash(&self, request: HashRequest) -> Result<HashResponse> {
        self.check_running()?;
        let skipped = |what: String| Ok(HashResponse { skipped: what, ..HashResponse::default() });
        let revision = request.revision;
        let began = Instant::now();
        while self.store().revision() < revision {
            if began.elapsed() > REVISION_WAIT {
                return skipped(format!("it has come only to revision {}", self.store().revision()));
            }
            self.pause(REVISION_LOOK).await?;
        }
        let store = self.store();
        let hash = if request.of_compaction {
            match store.compaction_hashes().into_iter().find(|hash| hash.hashed == revision) {
                Some(hash) => hash,
                None => return skipped(format!("it has no hash of a compaction at revision {revision}")),
            }
        } else {
            match self.compute_hash(revision).await {
                Ok(hash) => hash,
                Err(Error::Apply(err)) => return skipped(err.to_string()),
                Err(err) => return Err(err),
            }
        };
        Ok(HashResponse { hash: hash.hash, compacted: hash.compacted, skipped: String::new() })
    }
}

/// What came of comparing one hash.
struct Seen {
    found_nothing: bool,
    /// Nobody was skipped, but for those who are known to be wrong.
    of_all: bool,
}

/// What the operator does.
const REMEDY: &str = "To mend a member: stop it, move its member/state directory away, start it, and it fetches the state from the others; \
                      then etcdctl alarm disarm";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_of_the_voters_is_right() {
        let voters = |n: u64| (1..=n).collect::<BTreeSet<u64>>();
        let judged = |n, hashes: &[(u64, u32)]| judge(&voters(n), &hashes.iter().copied().collect());
        assert_eq!(judged(3, &[(1, 7), (2, 7), (3, 7)]), Verdict::Equal);
        assert_eq!(judged(3, &[(1, 7)]), Verdict::Equal);
        assert_eq!(judged(3, &[(1, 7), (2, 8), (3, 7)]), Verdict::Wrong(vec![2]));
        // Whoever compares may be the one.
        assert_eq!(judged(3, &[(1, 7), (2, 8), (3, 8)]), Verdict::Wrong(vec![1]));
        assert_eq!(judged(3, &[(1, 7), (2, 8)]), Verdict::Open);
        assert_eq!(judged(3, &[(1, 7), (2, 8), (3, 9)]), Verdict::Open);
        assert_eq!(judged(2, &[(1, 7), (2, 8)]), Verdict::Open);
        assert_eq!(judged(5, &[(1, 7), (2, 8), (3, 7), (4, 9), (5, 7)]), Verdict::Wrong(vec![2, 4]));
        // Learners do not decide, and may be wrong.
        assert_eq!(judged(3, &[(1, 7), (2, 7), (9, 8)]), Verdict::Wrong(vec![9]));
        assert_eq!(judged(3, &[(1, 7), (8, 7), (9, 8)]), Verdict::Open);
    }
}
