//! Members that are enlisted: they come as learners, and become voters by themselves, all in one change, as soon as all of them have the log.
//!
//! So a cluster of one server grows to three without ever being one of two, which the loss of either would stop; and a server that is replaced
//! goes by the very change by which the other comes.
//!
//! ```text
//! voters        enlisted                     when all of them have the log
//! [a]           b, c                         [a] to [a b c], which is joint; then [a b c]
//! [a b d]       c, in place of d             [a b d] to [a b c]; then [a b c], and d is removed
//! ```
//!
//! What is intended stands in the membership itself, with the learners: which others each is to vote with, and whom they replace. So it is made
//! with the entry that brings them, and whoever leads goes on with it, after any change of leader and any restart. So does whoever leads with
//! a joint membership: it takes it to its second set. Only how long a learner has made no progress is counted anew by each leader.
//!
//! # A leader that ends between the two entries
//! Whoever leads next finishes the change, and never takes it back half done:
//!
//! ```text
//! its log has the joint entry     it was committed, or is by the next leader's first entry: then that appends the last one
//! its log has not                 nobody votes otherwise than before; the learners are there still, and it begins the change anew
//! ```
//!
//! While the entry is in a log it takes a majority of both sets to be elected there, and to commit anything. So a leader that ends when one
//! of three servers is dead, or that was alone, is waited for, as with any change; nothing that was acknowledged is lost. Being joint is left
//! towards the second set alone: those that were enlisted are put out only before the joint entry.
//!
//! # Invariants
//! - Whether it may be is looked at before anything is changed. Who leads has led for an election timeout then, in which it has heard of everyone
//!   who is there; and who is to be replaced as dead was not heard of for three.
//! - One is enlisted at a time, with those it is to vote with. While they wait, they cost no quorum.
//! - The voters are one or three, before and after. One that is enlisted is promoted in no other way.
//! - One that makes no progress for a limit is put out, with those it was to vote with: they could never vote. Progress is a longer log, the
//!   whole log while it is heard of, or a snapshot under way, which is given up by itself when it stands still.

use std::collections::BTreeSet;

use super::*;
use crate::proto::peer::{Enlist, Enlisted, Ineligible};

/// How many servers may vote. Any other number is refused: two are less sure than one, and four no surer than three.
const SERVERS: [usize; 2] = [1, 3];

/// Election timeouts for which one that is to be replaced as dead may not have been heard of. One may pass on a busy machine.
pub(super) const DEAD_LOOKS: u32 = 3;

/// Bytes of the id of a node.
const NODE_BYTES: usize = 16;

/// Why a change of the servers is refused: names that stay, for programs.
pub(crate) mod reason {
    pub const BUSY: &str = "Busy";
    /// Who is asked carries no orders out; another one may.
    pub const NOT_READY: &str = "NotReady";
    pub const ALREADY_MEMBER: &str = "AlreadyMember";
    pub const ADDRESS_TAKEN: &str = "AddressTaken";
    pub const NOT_A_SERVER: &str = "NotAServer";
    pub const STILL_ALIVE: &str = "StillAlive";
    pub const SERVER_COUNT: &str = "ServerCount";
    pub const QUORUM_AT_RISK: &str = "QuorumAtRisk";
}

/// A refusal.
pub(crate) fn ineligible(reason: &str, what: impl Into<String>) -> Error {
    Error::Ineligible { reason: reason.into(), what: what.into() }
}

/// A refusal on the wire, and back.
pub(super) fn to_proto(reason: String, what: String) -> Changed {
    Changed::Ineligible(Ineligible { reason, what })
}

pub(super) fn from_proto(Ineligible { reason, what }: Ineligible) -> Error {
    Error::Ineligible { reason, what }
}

/// A member, as one that has applied the log knows it.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub member: Member,
    pub votes: bool,
    /// It has been up, and said so.
    pub published: bool,
}

impl Listed {
    /// Whether it is enlisted, and does not vote yet.
    pub fn is_enlisted(&self) -> bool {
        self.member.enlisted != 0 && !self.votes
    }
}

/// How a leader hears of the servers that vote. See [`Node::hearing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hearing {
    pub term: u64,
    /// The members are being changed, or somebody is there who is to vote and does not yet.
    pub is_changing: bool,
    /// Each that votes, by its id.
    pub voters: BTreeMap<u64, Heard>,
}

/// See [`Hearing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    /// It was, within an election timeout; the leader itself always.
    pub lately: bool,
    /// How long ago; none: never by this leader.
    pub ago: Option<Duration>,
}

/// What is to be done about those that are enlisted.
#[derive(Debug, PartialEq)]
enum Step {
    Wait,
    /// All of them have the log: this joint membership is next.
    Vote(Membership),
    /// They can never vote; why.
    PutOut(String),
}

/// Those that are enlisted in a membership, and do not vote yet.
fn waiting(membership: &Membership) -> BTreeMap<u64, &Member> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    membership.nodes().filter(|(id, member)| member.enlisted != 0 && !voters.contains(id)).map(|(&id, member)| (id, member)).collect()
}

/// What a joint membership comes to: its last set votes, and who has voted by another set alone is gone. None for one that is not joint.
fn settled(membership: &Membership) -> Option<Membership> {
    let (last, before) = membership.get_joint_config().split_last().filter(|(_, before)| !before.is_empty())?;
    let stays = |id: &u64| last.contains(id) || !before.iter().any(|set| set.contains(id));
    let members: BTreeMap<u64, Member> = membership.nodes().filter(|(id, _)| stays(id)).map(|(&id, member)| (id, member.clone())).collect();
    Membership::new(vec![last.clone()], members).ok()
}

fn list(ids: impl IntoIterator<Item = u64>) -> String {
    ids.into_iter().map(|id| format!("{id:x}")).collect::<Vec<_>>().join(", ")
}

impl View {
    fn name(&self, id: u64) -> String {
        match self.membership.get_node(&id) {
            Some(member) => format!("member {id:x} at {}", member.peer_urls.join(", ")),
            None => format!("member {id:x}"),
        }
    }

    fn active(&self, ids: &BTreeSet<u64>) -> usize {
        ids.iter().filter(|id| self.is_active(**id)).count()
    }

    /// Looks whether these may be enlisted, and says what is to be done. They get the given ids, in their order.
    pub(super) fn plan_enlisting(&self, enlist: &Enlist, ids: &[u64]) -> Result<Plan> {
        let Enlist { members: new, replaces, even_alive } = enlist;
        let malformed = new.is_empty() || ids.len() != new.len() || new.iter().any(|member| member.node.len() != NODE_BYTES);
        if malformed {
            return Err(Error::Failed("members are to be enlisted, and it is not said which".into()));
        }
        if let Some((&id, _)) = waiting(&self.membership).first_key_value() {
            let what = format!("{} is enlisted, and does not vote yet; wait until it does, or remove it", self.name(id));
            return Err(ineligible(reason::BUSY, what));
        }
        let mut members: BTreeMap<u64, Member> = self.membership.nodes().map(|(&id, member)| (id, member.clone())).collect();
        for (&id, Enlisted { peer_urls, node }) in ids.iter().zip(new) {
            let urls = checked(peer_urls)?;
            if let Some((&id, _)) = members.iter().find(|(_, member)| member.node == *node) {
                return Err(ineligible(reason::ALREADY_MEMBER, format!("the node at {} is {}", urls.join(", "), self.name(id))));
            }
            // A dead server's place may be taken where it was, by a node whose disk is new.
            let is_there = |(id, member): &(&u64, &Member)| !replaces.contains(id) && member.peer_urls.iter().any(|url| urls.contains(url));
            if let Some((&id, _)) = members.iter().find(is_there) {
                let what = format!("{} is the address of {}; remove that first", urls.join(", "), self.name(id));
                return Err(ineligible(reason::ADDRESS_TAKEN, what));
            }
            let enlisted = ids.first().copied().unwrap_or(id);
            members.insert(id, Member { peer_urls: urls, node: node.clone(), enlisted, replaces: replaces.clone(), ..Member::default() });
        }
        let voters: BTreeSet<u64> = self.membership.voter_ids().collect();
        for &id in replaces {
            if !voters.contains(&id) {
                return Err(ineligible(reason::NOT_A_SERVER, format!("{} is none that votes, and cannot be replaced", self.name(id))));
            }
            if !even_alive && self.is_active(id) {
                let what = format!(
                    "{} is heard of; while it is there it is replaced only if that is asked for (--even-alive, replace_alive)",
                    self.name(id)
                );
                return Err(ineligible(reason::STILL_ALIVE, what));
            }
        }
        let stay: BTreeSet<u64> = voters.iter().copied().filter(|id| !replaces.contains(id)).collect();
        let after = stay.len() + new.len();
        if !SERVERS.contains(&after) {
            let what = format!("there are {} servers, and there would be {after}; a cluster has one or three", voters.len());
            return Err(ineligible(reason::SERVER_COUNT, what));
        }
        let (active, needed) = (self.active(&stay), quorum(voters.len()));
        // A server that is moved whole, to another node, has nobody beside it.
        if !stay.is_empty() && active < needed {
            let what = format!("of the {} servers that stay {active} are heard of, and it takes {needed}", stay.len());
            return Err(ineligible(reason::QUORUM_AT_RISK, what));
        }
        Membership::new(vec![voters], members).map(Plan::Whole).map_err(|err| Error::Failed(err.to_string()))
    }

    /// What is to be done about those that are enlisted. None when nobody is.
    fn step(&self) -> Option<Step> {
        let waiting = waiting(&self.membership);
        if waiting.is_empty() {
            return None;
        }
        let voters: BTreeSet<u64> = self.membership.voter_ids().collect();
        let gone: BTreeSet<u64> = waiting.values().flat_map(|member| &member.replaces).copied().collect();
        let goal: BTreeSet<u64> = voters.difference(&gone).copied().chain(waiting.keys().copied()).collect();
        if !SERVERS.contains(&goal.len()) {
            // The membership was changed by hand meanwhile.
            return Some(Step::PutOut(format!("with {} others it would make {} voters", goal.len() - waiting.len(), goal.len())));
        }
        let ready = waiting.keys().all(|id| self.in_sync(*id) && self.is_active(*id));
        let is_quorum = |set: &BTreeSet<u64>| self.active(set) >= quorum(set.len());
        if !ready || !is_quorum(&voters) || !is_quorum(&goal) {
            return Some(Step::Wait);
        }
        let members: BTreeMap<u64, Member> = self.membership.nodes().map(|(&id, member)| (id, member.clone())).collect();
        Some(Membership::new(vec![voters, goal], members).map_or(Step::Wait, Step::Vote))
    }
}

/// Since when each of those that are enlisted has made no progress, and how much of the log it had then.
#[derive(Default)]
struct Patience(BTreeMap<u64, (u64, Instant)>);

impl Patience {
    /// Notes how each is: its id, how much of the log it has, and whether it makes progress otherwise. Returns those that have made none for
    /// the limit.
    fn look(&mut self, now: Instant, limit: Duration, all: impl IntoIterator<Item = (u64, u64, bool)>) -> Vec<u64> {
        let (mut noted, mut late) = (BTreeMap::new(), Vec::new());
        for (id, matched, progresses) in all {
            let since = match self.0.get(&id) {
                Some(&(before, since)) if matched <= before && !progresses => since,
                _ => now,
            };
            if now.duration_since(since) >= limit {
                late.push(id);
            }
            noted.insert(id, (matched, since));
        }
        self.0 = noted;
        late
    }
}

impl Node {
    /// Enlists members: see the module's head. Returns when it is in the log, and applied here.
    ///
    /// # Errors
    /// `Ineligible`, and then nothing was changed; those of any change of the members.
    pub async fn member_enlist(&self, enlist: Enlist) -> Result<()> {
        self.change(Change::Enlist(enlist)).await.map(drop)
    }

    /// The same, by the leader of this term alone: whoever leads next has its own view of who is dead. Returns whether it was that still; if
    /// not, nothing was changed.
    ///
    /// # Errors
    /// As [`member_enlist`](Self::member_enlist).
    pub async fn enlist_in_term(&self, enlist: Enlist, term: u64) -> Result<bool> {
        self.check_running()?;
        match self.change_in_term(&Change::Enlist(enlist), term).await? {
            Handed::Done(_) => Ok(true),
            Handed::Refused => Ok(false),
            Handed::Unknown => Err(ApplyError::TimeoutLeaderFail.into()),
        }
    }

    /// How the servers that vote are heard of, by this one if it leads.
    pub fn hearing(&self) -> Option<Hearing> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        if !self.is_leader() || now.current_leader != Some(self.identity.member_id) {
            return None;
        }
        // Of the same moment as the rest.
        let term = now.current_term;
        let membership = now.membership_config.membership();
        let is_settled = now.membership_config.log_id() == now.committed_membership_config.log_id();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let waits = |(id, member): (&u64, &Member)| !voters.contains(id) && (member.enlisted != 0 || member.voter_to_be);
        let is_changing = !is_settled || membership.get_joint_config().len() > 1 || membership.nodes().any(waits);
        let heard = voters.iter().map(|&id| {
            if id == self.identity.member_id {
                return (id, Heard { lately: true, ago: Some(Duration::ZERO) });
            }
            let at = now.heartbeat.as_ref().and_then(|all| all.get(&id)).and_then(Option::as_ref);
            (id, Heard { lately: self.heard_of(&now, id).0, ago: at.map(|at| at.elapsed()) })
        });
        Some(Hearing { term, is_changing, voters: heard.collect() })
    }

    /// As the leader, takes the time to hear of those that are there: who has just been elected has not heard of anyone, and would take them for
    /// dead. Returns whether it `leads` still.
    pub(super) async fn look_before_enlisting(&self, enlist: &Enlist, leads: impl Fn() -> bool) -> Result<bool> {
        let looks = if enlist.replaces.is_empty() || enlist.even_alive { 1 } else { DEAD_LOOKS };
        for _ in 0..looks {
            if !leads() {
                return Ok(false);
            }
            self.pause(self.options.election_timeout).await?;
            let is_heard = |id: &u64| self.heard_of(&self.raft.metrics().borrow_watched(), *id).0;
            // Then it is refused.
            if !enlist.even_alive && enlist.replaces.iter().any(is_heard) {
                break;
            }
        }
        Ok(leads())
    }

    /// All members by their ids, as far as this one has applied the log; and the entry that has brought them.
    pub fn listed(&self) -> (u64, BTreeMap<u64, Listed>) {
        let applied = self.machine.applied().membership;
        let membership = applied.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let known = lock(&self.machine.members);
        let listed = membership.nodes().map(|(&id, member)| {
            let published = known.attributes(id).is_some();
            (id, Listed { member: member.clone(), votes: voters.contains(&id), published })
        });
        (applied.log_id().map_or(0, |at| at.index), listed.collect())
    }

    /// The sets of those that vote, as this member's log has them, two of them while one gives way to the other; and whether that is committed.
    #[cfg(feature = "simulation")]
    pub fn voting(&self) -> (Vec<BTreeSet<u64>>, bool) {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        let is_committed = now.membership_config.log_id() == now.committed_membership_config.log_id();
        (now.membership_config.membership().get_joint_config().clone(), is_committed)
    }

    /// Returns when this member's log has a joint membership, or knows of one that it is committed.
    #[cfg(feature = "simulation")]
    pub async fn until_joint(&self, is_committed: bool) {
        let mut metrics = self.raft.metrics();
        loop {
            let is_joint = {
                let now = metrics.borrow_watched();
                let config = if is_committed { &now.committed_membership_config } else { &now.membership_config };
                config.membership().get_joint_config().len() > 1
            };
            if is_joint || metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// Begins to look after those that are enlisted, whenever this member leads. One that makes no progress for so long is put out.
    pub fn mind_enlisted(self: &Arc<Self>, limit: Duration) {
        let (node, stop) = (self.clone(), self.stop.clone());
        let task = async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = node.look_after_enlisted(limit) => {}
            }
        };
        // Whoever calls may be on another runtime than the member's.
        self.tasks.spawn_on(world::owned(task), &self.runtime);
    }

    async fn look_after_enlisted(self: Arc<Self>, limit: Duration) {
        let mut patience = Patience::default();
        loop {
            tokio::time::sleep(PROMOTE_LOOK).await;
            let concerned = self.is_leader() && {
                let metrics = self.raft.metrics();
                let now = metrics.borrow_watched();
                let membership = now.membership_config.membership();
                membership.get_joint_config().len() > 1 || !waiting(membership).is_empty()
            };
            if !concerned {
                patience = Patience::default();
                continue;
            }
            let _one = self.changing.lock().await;
            if let Err(err) = self.settle_joint().await {
                tracing::warn!(error = %err, "bringing a change of the servers to its end");
                continue;
            }
            let Some(view) = self.view() else { continue };
            let Some(step) = view.step() else { continue };
            let waiting: Vec<u64> = waiting(&view.membership).into_keys().collect();
            let late = patience.look(
                Instant::now(),
                limit,
                waiting.iter().map(|&id| {
                    let is_sent = self.counters().peers.get(id).is_some_and(|peer| peer.is_sent_snapshot());
                    let matched = view.members.get(&id).map_or(0, |seen| seen.matched);
                    (id, matched, is_sent || (view.in_sync(id) && view.is_active(id)))
                }),
            );
            let why = match &step {
                Step::PutOut(why) => Some(why.clone()),
                Step::Vote(_) | Step::Wait if late.is_empty() => None,
                _ => Some(format!("{} has made no progress for {limit:?}", list(late))),
            };
            let tried = match (why, step) {
                (Some(why), _) => self.put_out(&view, &waiting, &why).await,
                (None, Step::Vote(membership)) => {
                    let tried = self.enter(Plan::Whole(membership), view.at).await;
                    if matches!(tried, Ok(true)) {
                        tracing::info!(members = list(waiting), "those that were enlisted have the log, and vote");
                    }
                    match tried {
                        Ok(true) => self.settle_joint().await,
                        other => other.map(drop),
                    }
                }
                (None, _) => Ok(()),
            };
            if let Err(err) = tried {
                // It is looked at again.
                tracing::warn!(error = %err, "looking after those that are enlisted");
            }
        }
    }

    /// Makes a change, unless that takes too long: then it may be made yet. Returns whether it was.
    async fn enter(&self, plan: Plan, at: Option<LogId>) -> Result<bool> {
        Ok(matches!(self.within(self.request_timeout(), self.carry_out(plan, at)).await??, Tried::Done(_)))
    }

    async fn put_out(&self, view: &View, ids: &[u64], why: &str) -> Result<()> {
        let plan = view.with(|_, members| members.retain(|id, _| !ids.contains(id)))?;
        if self.enter(plan, view.at).await? {
            let members = list(ids.iter().copied());
            tracing::warn!(members, why, "those that were enlisted are put out again: they are clients from their next start on");
        }
        Ok(())
    }

    /// Takes a joint membership, if there is one and it is committed, to its last set.
    async fn settle_joint(&self) -> Result<()> {
        let (at, next) = {
            let metrics = self.raft.metrics();
            let now = metrics.borrow_watched();
            if now.membership_config.log_id() != now.committed_membership_config.log_id() {
                return Ok(());
            }
            (*now.membership_config.log_id(), settled(now.membership_config.membership()))
        };
        let Some(next) = next else { return Ok(()) };
        let voters = list(next.voter_ids());
        if self.enter(Plan::Whole(next), at).await? {
            tracing::info!(voters, "the change of the servers is made");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{DOWN, LEARNER, UP, url, view};
    use super::*;

    fn node(id: u8) -> bytes::Bytes {
        vec![id; NODE_BYTES].into()
    }

    fn enlist(urls: &[u64], replaces: &[u64]) -> Enlist {
        let members = urls.iter().map(|&id| Enlisted { peer_urls: url(id), node: node(id as u8) }).collect();
        Enlist { members, replaces: replaces.to_vec(), even_alive: false }
    }

    fn refused(view: &View, enlist: &Enlist) -> Option<String> {
        let ids: Vec<u64> = (90..90 + enlist.members.len() as u64).collect();
        match view.plan_enlisting(enlist, &ids) {
            Ok(_) => None,
            Err(Error::Ineligible { reason, .. }) => Some(reason),
            Err(err) => panic!("{err}"),
        }
    }

    /// What comes of a plan, with the new ones as they are told.
    fn after(mut view: View, enlist: &Enlist, new: &[Seen]) -> View {
        let ids: Vec<u64> = (90..90 + new.len() as u64).collect();
        let Ok(Plan::Whole(membership)) = view.plan_enlisting(enlist, &ids) else { panic!("refused") };
        view.membership = membership;
        view.members.extend(ids.into_iter().zip(new.iter().cloned()));
        view
    }

    #[test]
    fn who_is_not_eligible_is_refused_by_name() {
        use reason::*;
        let alive = Enlist { even_alive: true, ..enlist(&[9], &[3]) };
        for (n, but, change, outcome) in [
            (1, &[][..], enlist(&[8, 9], &[]), None),
            (1, &[], enlist(&[9], &[]), Some(SERVER_COUNT)),
            (1, &[], enlist(&[7, 8, 9], &[]), Some(SERVER_COUNT)),
            (1, &[], enlist(&[1, 9], &[]), Some(ADDRESS_TAKEN)),
            (1, &[], enlist(&[9, 9], &[]), Some(ALREADY_MEMBER)),
            (2, &[], enlist(&[9], &[]), None),
            (2, &[(2, DOWN)], enlist(&[9], &[]), Some(QUORUM_AT_RISK)),
            (3, &[], enlist(&[8, 9], &[]), Some(SERVER_COUNT)),
            (3, &[], enlist(&[9], &[3]), Some(STILL_ALIVE)),
            (3, &[], alive.clone(), None),
            (3, &[(2, DOWN)], alive, Some(QUORUM_AT_RISK)),
            (3, &[(3, DOWN)], enlist(&[9], &[3]), None),
            (3, &[(3, DOWN)], enlist(&[3], &[3]), None),
            (3, &[(3, DOWN)], enlist(&[2], &[3]), Some(ADDRESS_TAKEN)),
            (3, &[(3, DOWN)], enlist(&[9], &[4]), Some(NOT_A_SERVER)),
            (3, &[(3, DOWN), (2, DOWN)], enlist(&[9], &[3]), Some(QUORUM_AT_RISK)),
            (4, &[(3, DOWN), (4, LEARNER)], enlist(&[9], &[4]), Some(NOT_A_SERVER)),
            (1, &[], Enlist { even_alive: true, ..enlist(&[9], &[1]) }, None),
            (1, &[], enlist(&[9], &[1]), Some(STILL_ALIVE)),
        ] {
            assert_eq!(refused(&view(n, but), &change).as_deref(), outcome, "{n} {but:?} {change:?}");
        }
        let busy = after(view(1, &[]), &enlist(&[8, 9], &[]), &[DOWN, DOWN]);
        assert_eq!(refused(&busy, &enlist(&[6, 7], &[])).as_deref(), Some(BUSY));
        // Nor is one of them promoted alone.
        let alone = after(view(1, &[]), &enlist(&[8, 9], &[]), &[LEARNER, LEARNER]);
        assert!(matches!(alone.plan(&Change::Promote(90), 0, true), Err(Error::Apply(ApplyError::LearnerNotReady))));
    }

    /// One joint change, when both are there and have the log, and not before.
    #[test]
    fn one_becomes_three_at_once() {
        let behind = Seen { matched: 89, ..LEARNER };
        let away = Seen { active: false, ..LEARNER };
        for (b, c, ready) in [(LEARNER, behind, false), (LEARNER, away, false), (LEARNER, LEARNER, true)] {
            let view = after(view(1, &[]), &enlist(&[8, 9], &[]), &[b, c]);
            assert!(view.membership.voter_ids().eq([1]));
            let step = view.step().unwrap();
            let Step::Vote(joint) = step else {
                assert!(!ready && step == Step::Wait);
                continue;
            };
            assert!(ready && *joint.get_joint_config() == vec![[1].into(), [1, 90, 91].into()], "{joint:?}");
            let last = settled(&joint).unwrap();
            assert_eq!(*last.get_joint_config(), vec![[1, 90, 91].into()]);
            assert!(settled(&last).is_none() && waiting(&last).is_empty());
        }
    }

    #[test]
    fn the_dead_one_goes_as_the_new_one_comes() {
        let view = after(view(3, &[(3, DOWN)]), &enlist(&[9], &[3]), &[LEARNER]);
        let Some(Step::Vote(joint)) = view.step() else { panic!("it waits") };
        assert_eq!(*joint.get_joint_config(), vec![[1, 2, 3].into(), [1, 2, 90].into()]);
        let last = settled(&joint).unwrap();
        assert_eq!(*last.get_joint_config(), vec![[1, 2, 90].into()]);
        assert!(last.get_node(&3).is_none() && last.get_node(&90).is_some());
    }

    /// It is begun only while it can come to its end, and given up when it cannot any more.
    #[test]
    fn what_was_changed_by_hand_meanwhile_is_seen() {
        let mut one_left = after(view(1, &[]), &enlist(&[8, 9], &[]), &[LEARNER, LEARNER]);
        let Ok(Plan::Whole(without)) = one_left.with(|_, members| drop(members.remove(&91))) else { panic!("refused") };
        one_left.membership = without;
        assert!(matches!(one_left.step(), Some(Step::PutOut(_))));
        let mut two_down = after(view(3, &[(3, DOWN)]), &enlist(&[9], &[3]), &[LEARNER]);
        two_down.members.insert(2, DOWN);
        assert_eq!(two_down.step(), Some(Step::Wait));
        two_down.members.insert(2, UP);
        assert!(matches!(two_down.step(), Some(Step::Vote(_))));
        assert_eq!(view(3, &[]).step(), None);
    }

    #[test]
    fn who_makes_no_progress_is_late() {
        let (start, limit) = (Instant::now(), Duration::from_secs(300));
        let mut patience = Patience::default();
        let mut look = |after: u64, all: &[(u64, u64, bool)]| patience.look(start + Duration::from_secs(after), limit, all.iter().copied());
        assert!(look(0, &[(1, 0, false), (2, 0, false), (3, 7, true)]).is_empty());
        // 1 gets something, 2 is sent a snapshot, 3 has all there is; then each stops.
        assert!(look(299, &[(1, 5, false), (2, 0, true), (3, 7, true)]).is_empty());
        assert!(look(598, &[(1, 5, false), (2, 0, false), (3, 7, true)]).is_empty());
        assert_eq!(look(599, &[(1, 5, false), (2, 0, false), (3, 7, false)]), [1, 2]);
        // One that was put out and is enlisted again begins anew.
        assert_eq!(look(898, &[(3, 7, false)]), [3]);
        assert!(look(900, &[(1, 5, false)]).is_empty());
    }
}
