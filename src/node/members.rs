//! The members of the cluster: changes of who belongs to it, and what each member does about it by itself.
//!
//! Any member takes a change from its client and hands it to the leader, which checks it as etcd does and makes it one entry of the log.
//! A change moves one member; it begins when the one before is committed.
//!
//! ```text
//! add d (learner)  ->  Raft: learner          promote d  ->  Raft: voter, if d has the log
//! add d            ->  Raft: learner, told to clients as the voter that it becomes by itself as soon as it has the log
//! remove d         ->  Raft: gone, its id for good; d is told when it asks, and stops
//! enlist d, e      ->  Raft: learners, and voters in one change by themselves: see `enlist`
//! ```
//!
//! # Invariants
//! - A voter counts for the quorum only once it has (nearly) all of the log: one that never starts, or was given wrong URLs, costs nothing.
//!   etcd counts it at once; its checks are kept, for they are about the members as they are told.
//! - A voter that was alone reads by itself no more from before another is appended: see `growing`.
//! - A change that the leader has refused, or has not come to, was not made; whether one was made is said to be open only when it is.

use std::collections::BTreeMap;

use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::Precondition;
use openraft::{ChangeMembers, EntryPayload, Instant as _};

use super::peers::{Handed, LEADER_RETRY};
use super::*;
use crate::config::Url;
use crate::proto::internal::{Member, MemberAttributes};
use crate::proto::peer::change_request::Change;
use crate::proto::peer::change_response::Outcome as Changed;
use crate::proto::peer::{
    AddMember, ChangeRequest, ChangeResponse, ListedMember, MembersRequest, MembersResponse, Nothing, TransferLeaderRequest,
    TransferLeaderResponse, UpdateMember,
};
use crate::raft::{Membership, log_id_from_proto, vote_from_proto};

pub(crate) mod enlist;

/// Entries that a learner may lack to be promoted, beside etcd's tenth of the log: the quorum may have to wait for them.
const LAG_MAX: u64 = 1000;

/// Entries that a voter may lack to be handed the lead: nothing is proposed until it has them.
pub(super) const TRANSFER_LAG_MAX: u64 = 1000;

/// How often the leader looks whether an added voter has the log.
const PROMOTE_LOOK: Duration = Duration::from_millis(100);

/// How often a member asks another whether it still belongs to the cluster.
const BELONG_LOOK: Duration = Duration::from_secs(1);

/// How long a removed member goes on, so that the others hear of it and its client of the outcome. As long as etcd's.
const REMOVED_GRACE: Duration = Duration::from_secs(1);

/// How long a member waits before it tries again to publish itself.
const PUBLISH_RETRY: Duration = Duration::from_millis(200);

/// What the peer port says to a removed member, by which that knows it.
pub(crate) const REMOVED: &str = "the member has been permanently removed from the cluster";

/// What the peer port says of a member with another data directory than it has published, in the midst of a longer text.
pub(crate) const OTHER_DATA: &str = "has come back with another data directory than it had";

/// One member, as it is told, and as the leader sees it.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// It votes, or will by itself.
    voter: bool,
    /// It has been up, once.
    started: bool,
    /// The leader has heard of it lately; itself always.
    active: bool,
    /// Up to which entry it is known to have the log.
    matched: u64,
}

/// The members as the leader sees them.
struct View {
    /// The entry that brought the membership.
    at: Option<LogId>,
    membership: Membership,
    ours: u64,
    last: u64,
    members: BTreeMap<u64, Seen>,
    max_learners: usize,
}

/// What to put into the log.
#[derive(Debug, PartialEq)]
enum Plan {
    Whole(Membership),
    Update(u64, Member),
}

/// What came of trying it.
enum Tried {
    /// Applied, with this entry.
    Done(u64),
    /// Nothing was appended: the state it was planned for has passed, or is not settled yet.
    Again,
    NotLeader,
    Unknown,
}

/// While it lives, this member does not take itself for the only voter.
struct Growing<'a>(&'a Node);

impl Growing<'_> {
    fn begin(node: &Node) -> Growing<'_> {
        node.growing.fetch_add(1, Ordering::AcqRel);
        node.alone.store(false, Ordering::Release);
        Growing(node)
    }
}

impl Drop for Growing<'_> {
    fn drop(&mut self) {
        self.0.growing.fetch_sub(1, Ordering::AcqRel);
    }
}

impl View {
    fn voters(&self) -> impl Iterator<Item = (&u64, &Seen)> {
        self.members.iter().filter(|(_, seen)| seen.voter)
    }

    fn count(&self, what: impl Fn(&Seen) -> bool) -> usize {
        self.voters().filter(|(_, seen)| what(seen)).count()
    }

    /// Whether another member than `own` has one of these peer URLs.
    fn are_taken(&self, urls: &[String], own: u64) -> bool {
        self.membership.nodes().any(|(&id, member)| id != own && member.peer_urls.iter().any(|url| urls.contains(url)))
    }

    fn in_sync(&self, id: u64) -> bool {
        let matched = self.members.get(&id).map_or(0, |seen| seen.matched);
        matched.saturating_mul(10) >= self.last.saturating_mul(9) && self.last.saturating_sub(matched) <= LAG_MAX
    }

    fn is_active(&self, id: u64) -> bool {
        self.members.get(&id).is_some_and(|seen| seen.active)
    }

    /// The membership with a voter more or less, and a member more or less.
    fn with(&self, change: impl FnOnce(&mut std::collections::BTreeSet<u64>, &mut BTreeMap<u64, Member>)) -> Result<Plan> {
        let mut voters = self.membership.voter_ids().collect();
        let mut members = self.membership.nodes().map(|(&id, member)| (id, member.clone())).collect();
        change(&mut voters, &mut members);
        Membership::new(vec![voters], members).map(Plan::Whole).map_err(|err| Error::Failed(err.to_string()))
    }

    /// Checks a change in etcd's order, and says what is to be done. A new member gets the id `new`.
    fn plan(&self, change: &Change, new: u64, strict: bool) -> Result<Plan> {
        match change {
            Change::Add(add) => {
                if strict {
                    self.may_add(add.learner)?;
                }
                if self.are_taken(&add.peer_urls, new) {
                    return Err(ApplyError::PeerUrlExists.into());
                }
                if add.learner && self.members.len() - self.count(|_| true) >= self.max_learners {
                    return Err(ApplyError::TooManyLearners.into());
                }
                let member = Member { peer_urls: add.peer_urls.clone(), voter_to_be: !add.learner, ..Member::default() };
                self.with(|_, members| drop(members.insert(new, member)))
            }
            Change::Remove(id) => {
                if strict {
                    self.may_remove(*id)?;
                }
                self.member(*id)?;
                if self.membership.voter_ids().eq([*id]) {
                    // Nobody would be left to decide anything.
                    return Err(ApplyError::NotEnoughStarted.into());
                }
                if strict {
                    self.keeps_quorum(*id)?;
                }
                self.with(|voters, members| {
                    voters.remove(id);
                    members.remove(id);
                })
            }
            Change::Update(update) => {
                let mut member = self.member(update.id)?.clone();
                if self.are_taken(&update.peer_urls, update.id) {
                    return Err(ApplyError::PeerUrlExists.into());
                }
                member.peer_urls = update.peer_urls.clone();
                Ok(Plan::Update(update.id, member))
            }
            Change::Promote(id) => {
                self.member(*id)?;
                if self.members.get(id).is_some_and(|seen| seen.voter) {
                    return Err(ApplyError::MemberNotLearner.into());
                }
                if self.member(*id)?.enlisted != 0 {
                    // It votes from one change on with others, who may not be ready: alone it would make two voters of one.
                    return Err(ApplyError::LearnerNotReady.into());
                }
                // Other than in etcd one that is not there is not ready, whatever it once had: it would cost a voter that is.
                if !self.in_sync(*id) || (strict && !self.is_active(*id)) {
                    return Err(ApplyError::LearnerNotReady.into());
                }
                // The promoted one counts as started.
                if strict && 1 + self.count(|seen| seen.started) < quorum(1 + self.count(|_| true)) {
                    return Err(ApplyError::NotEnoughStarted.into());
                }
                if strict && 1 + self.count(|seen| seen.active) < quorum(1 + self.count(|_| true)) {
                    return Err(ApplyError::UnhealthyCluster.into());
                }
                self.with(|voters, _| voters.extend([*id]))
            }
            Change::Enlist(enlist) => self.plan_enlisting(enlist, &[new]),
        }
    }

    fn member(&self, id: u64) -> Result<&Member, ApplyError> {
        self.membership.get_node(&id).ok_or(ApplyError::MemberNotFound)
    }

    /// Whether the cluster can bear one more, taken for dead.
    fn may_add(&self, learner: bool) -> Result<(), ApplyError> {
        let (voters, started) = (self.count(|_| true), self.count(|seen| seen.started));
        if voters == 1 {
            return if learner || started == 1 { Ok(()) } else { Err(ApplyError::NotEnoughStarted) };
        }
        if !learner && started < quorum(voters + 1) {
            return Err(ApplyError::NotEnoughStarted);
        }
        if self.count(|seen| seen.active) < quorum(voters + 1) {
            return Err(ApplyError::UnhealthyCluster);
        }
        Ok(())
    }

    /// Whether those who vote now, without this one, can go on: one that was added as a voter and does not vote yet is no help.
    fn keeps_quorum(&self, id: u64) -> Result<(), ApplyError> {
        let active = |voter: &u64| self.members.get(voter).is_some_and(|seen| seen.active);
        let voters: Vec<u64> = self.membership.voter_ids().filter(|voter| *voter != id).collect();
        let votes = voters.len() < self.membership.voter_ids().count();
        if votes && voters.iter().filter(|voter| active(voter)).count() < quorum(voters.len()) {
            return Err(ApplyError::UnhealthyCluster);
        }
        Ok(())
    }

    /// Whether the cluster can do without this one.
    fn may_remove(&self, id: u64) -> Result<(), ApplyError> {
        let seen = self.members.get(&id);
        if seen.is_some_and(|seen| !seen.voter) {
            return Ok(());
        }
        let (voters, started) = (self.count(|_| true), self.count(|seen| seen.started));
        let (less, less_started) = match seen {
            Some(seen) => (voters - 1, started - usize::from(seen.started)),
            None => (voters, started),
        };
        if less_started < quorum(less) {
            return Err(ApplyError::NotEnoughStarted);
        }
        // One that is down is no part of the quorum that is up.
        if id != self.ours && !seen.is_some_and(|seen| seen.active) {
            return Ok(());
        }
        if self.count(|seen| seen.active).saturating_sub(1) < quorum(less) {
            return Err(ApplyError::UnhealthyCluster);
        }
        Ok(())
    }
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

/// Whether Raft has a member as a learner, and clients are told so.
pub(crate) fn is_learner(membership: &Membership, id: u64) -> bool {
    membership.get_node(&id).is_some_and(|member| !member.voter_to_be) && !membership.voter_ids().any(|voter| voter == id)
}

impl Node {
    /// Whether this member is a learner.
    pub fn is_learner(&self) -> bool {
        self.learner.load(Ordering::Relaxed)
    }

    /// # Errors
    /// That a learner does not serve what needs a vote.
    pub(super) fn check_voter(&self) -> Result<()> {
        if self.is_learner() { Err(ApplyError::NotSupportedForLearner.into()) } else { Ok(()) }
    }

    // ---- Changes

    /// Adds a member, as a voter or a learner. Returns its id.
    pub async fn member_add(&self, peer_urls: &[String], learner: bool) -> Result<u64> {
        self.change(Change::Add(AddMember { peer_urls: checked(peer_urls)?, learner })).await
    }

    /// Removes a member, this one or another.
    pub async fn member_remove(&self, id: u64) -> Result<()> {
        self.change(Change::Remove(id)).await.map(drop)
    }

    /// Says where the other members reach a member from now on.
    pub async fn member_update(&self, id: u64, peer_urls: &[String]) -> Result<()> {
        self.change(Change::Update(UpdateMember { id, peer_urls: checked(peer_urls)? })).await.map(drop)
    }

    /// Makes a learner a voter.
    pub async fn member_promote(&self, id: u64) -> Result<()> {
        self.change(Change::Promote(id)).await.map(drop)
    }

    /// Has the leader make a change, and waits until this member has applied it, too.
    async fn change(&self, change: Change) -> Result<u64> {
        self.check_running()?;
        self.check_voter()?;
        // Of one that looks first, whoever leads.
        let looks = if matches!(change, Change::Enlist(_)) { enlist::DEAD_LOOKS } else { 0 };
        let (until, mut pause) = (self.deadline() + looks * self.options.election_timeout, LEADER_RETRY);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout);
            }
            let handed = if self.is_leader() { self.change_here(&change).await? } else { self.change_elsewhere(&change, left).await? };
            match handed {
                Handed::Done((index, id)) => {
                    // Who is removed is not sent what removes it.
                    if change != Change::Remove(self.identity.member_id) {
                        self.applied_upto(index, until).await?;
                    }
                    return Ok(id);
                }
                Handed::Refused => self.leader_settles(&mut pause).await?,
                Handed::Unknown => return Err(ApplyError::TimeoutLeaderFail.into()),
            }
        }
    }

    async fn change_elsewhere(&self, change: &Change, left: Duration) -> Result<Handed<(u64, u64)>> {
        let Some(mut link) = self.leader_link() else { return Ok(Handed::Refused) };
        let request = ChangeRequest { change: Some(change.clone()) };
        if self.within(left, link.reach()).await?.is_err() {
            self.keep_link(link);
            return Ok(Handed::Refused);
        }
        let answer = link.call(request, left, |mut client, request| async move { client.change(request).await }).await;
        self.keep_link(link);
        match answer.map(|answer| (answer.index, answer.outcome)) {
            Ok((index, Some(Changed::Done(id)))) => Ok(Handed::Done((index, id))),
            Ok((_, Some(Changed::Refused(text)))) => Err(peers::refusal(&text).into()),
            Ok((_, Some(Changed::Ineligible(refused)))) => Err(enlist::from_proto(refused)),
            Ok((_, Some(Changed::NotLeader(_)))) => Ok(Handed::Refused),
            Ok((_, Some(Changed::Unknown(_)) | None)) => Ok(Handed::Unknown),
            Err(status) if status.code() == tonic::Code::FailedPrecondition => Ok(Handed::Refused),
            Err(_) => Ok(Handed::Unknown),
        }
    }

    /// Makes a change, as the leader. Returns its entry, and the id of the member.
    async fn change_here(&self, change: &Change) -> Result<Handed<(u64, u64)>> {
        self.change_in_term(change, self.term()).await
    }

    /// The same; members are enlisted by the leader of this term alone.
    async fn change_in_term(&self, change: &Change, term: u64) -> Result<Handed<(u64, u64)>> {
        // Who is elected anew has heard of nobody, and would take them all for dead.
        let leads = || self.is_leader() && (self.term() == term || !matches!(change, Change::Enlist(_)));
        if let Change::Enlist(enlist) = change
            && !self.look_before_enlisting(enlist, leads).await?
        {
            return Ok(Handed::Refused);
        }
        // The look takes its own time.
        let began = Instant::now();
        let _one = self.within(self.request_timeout(), self.changing.lock()).await?;
        loop {
            let left = self.request_timeout().saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(Error::Timeout);
            }
            let view = self.view();
            // Not before: the view is of that leader, too.
            if !leads() {
                return Ok(Handed::Refused);
            }
            let Some(view) = view else {
                self.pause(LEADER_RETRY).await?;
                continue;
            };
            let new = self.unused_id(&view);
            let id = match change {
                Change::Add(_) => new,
                Change::Remove(id) | Change::Promote(id) => *id,
                Change::Update(update) => update.id,
                Change::Enlist(_) => new,
            };
            let plan = match change {
                Change::Enlist(enlist) => {
                    let others = enlist.members.iter().skip(1).map(|_| self.unused_id(&view));
                    view.plan_enlisting(enlist, &std::iter::once(new).chain(others).collect::<Vec<_>>())?
                }
                change => view.plan(change, new, self.options.strict_reconfig)?,
            };
            match self.within(left, self.carry_out(plan, view.at)).await {
                Ok(tried) => match tried? {
                    Tried::Done(index) => {
                        if matches!(change, Change::Promote(_)) {
                            self.counters().learner_promote_successes.inc();
                        }
                        return Ok(Handed::Done((index, id)));
                    }
                    Tried::Again => self.pause(LEADER_RETRY).await?,
                    Tried::NotLeader => return Ok(Handed::Refused),
                    Tried::Unknown => return Ok(Handed::Unknown),
                },
                Err(Error::Timeout) => return Ok(Handed::Unknown),
                Err(err) => return Err(err),
            }
        }
    }

    /// An id that no member has, or ever had.
    fn unused_id(&self, view: &View) -> u64 {
        loop {
            let id = world::random();
            if id != 0 && view.membership.get_node(&id).is_none() && !lock(&self.machine.members).is_removed(id) {
                return id;
            }
        }
    }

    async fn carry_out(&self, plan: Plan, at: Option<LogId>) -> Result<Tried> {
        let settled = [Precondition::LastMembershipLogId { last_membership_log_id: at }];
        // Another voter may elect itself before this member's own tasks have heard that it is there.
        let _growing = match &plan {
            Plan::Whole(membership) if !membership.voter_ids().eq([self.identity.member_id]) => Some(Growing::begin(self)),
            _ => None,
        };
        let result = match plan {
            Plan::Whole(membership) => self.raft.append_membership(membership, EntryPayload::Blank, settled).await,
            Plan::Update(id, member) => self.raft.change_membership_if(ChangeMembers::SetNodes([(id, member)].into()), true, settled).await,
        };
        use ChangeMembershipError::{InProgress, UncommittedLeaderLog};
        match result {
            Ok(response) => Ok(Tried::Done(response.log_id.index)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Ok(Tried::NotLeader),
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Ok(Tried::Unknown),
            Err(RaftError::APIError(
                ClientWriteError::ChangeMembershipError(InProgress(_) | UncommittedLeaderLog(_)) | ClientWriteError::PreconditionFailed(_),
            )) => Ok(Tried::Again),
            Err(err) => Err(Error::Failed(err.to_string())),
        }
    }

    /// The members as this leader sees them. None while a change is under way, or once this member does not vote.
    fn view(&self) -> Option<View> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        if now.membership_config.log_id() != now.committed_membership_config.log_id() {
            return None;
        }
        let membership = now.membership_config.membership().clone();
        if membership.get_joint_config().len() > 1 {
            return None;
        }
        let voters: Vec<u64> = membership.voter_ids().collect();
        if !voters.contains(&self.identity.member_id) {
            // It has removed itself, and leads until another does: the next change is for that one.
            return None;
        }
        let members = membership.nodes().map(|(&id, member)| {
            let ours = id == self.identity.member_id;
            let published = lock(&self.machine.members).attributes(id).is_some();
            let (heard, matched) = self.heard_of(&now, id);
            let seen = Seen {
                voter: member.voter_to_be || voters.contains(&id),
                started: published || !member.name.is_empty(),
                active: ours || heard,
                matched: matched.unwrap_or(0),
            };
            (id, seen)
        });
        let members = members.collect();
        let last = now.last_log_index.unwrap_or(0);
        let (at, max_learners) = (*now.membership_config.log_id(), self.options.max_learners);
        Some(View { at, membership, ours: self.identity.member_id, last, members, max_learners })
    }

    /// Whether this leader has heard of another member lately, and up to which entry that one is known to have the log.
    pub(super) fn heard_of(&self, now: &openraft::RaftMetrics<TypeConfig>, id: u64) -> (bool, Option<u64>) {
        let heard = now.heartbeat.as_ref().and_then(|all| all.get(&id)).and_then(|at| at.as_ref().map(|at| at.elapsed()));
        let matched = now.replication.as_ref().and_then(|all| all.get(&id)).and_then(|matched| matched.as_ref().map(|at| at.index));
        (heard.is_some_and(|ago| ago < self.options.election_timeout), matched)
    }

    /// Hands leadership over, and waits until the other leads.
    ///
    /// # Errors
    /// `NotLeader`; `BadLeaderTransferee` for who is no voter; `TimeoutLeaderTransfer`.
    pub async fn move_leader(&self, to: u64) -> Result<()> {
        self.check_running()?;
        if !self.is_leader() {
            return Err(ApplyError::NotLeader.into());
        }
        let (voter, active, near) = {
            let metrics = self.raft.metrics();
            let now = metrics.borrow_watched();
            let (active, matched) = self.heard_of(&now, to);
            let near = matched.is_some_and(|matched| matched + TRANSFER_LAG_MAX >= now.last_log_index.unwrap_or(0));
            let voter = now.membership_config.membership().voter_ids().any(|id| id == to);
            (voter, active, near)
        };
        if !voter {
            return Err(ApplyError::BadLeaderTransferee.into());
        }
        if to == self.identity.member_id {
            return Ok(());
        }
        if !active || !near || (self.machine.is_corrupt(to) && !self.machine.is_all_corrupt()) {
            // Nothing is proposed while leadership is handed over: not to one who is not there, has much to fetch first, or would not take it.
            return Err(ApplyError::TimeoutLeaderTransfer.into());
        }
        tracing::info!(to = %format_args!("{to:x}"), "leadership is handed over");
        self.hand_over(to).await?;
        let taken = async {
            while self.leader() != to {
                self.pause(LEADER_RETRY).await?;
            }
            Ok(())
        };
        match self.within(self.request_timeout(), taken).await {
            Err(Error::Timeout) => Err(ApplyError::TimeoutLeaderTransfer.into()),
            taken => taken?,
        }
    }

    // ---- By itself

    /// Tells, as the leader, of members that are not heard of any more, and of those that are again: once each.
    pub(super) async fn watch_members(self: Arc<Self>) {
        let mut silent = std::collections::BTreeSet::new();
        let mut leads_since = None;
        loop {
            tokio::time::sleep(WATCHDOG_INTERVAL).await;
            if !self.is_leader() {
                (silent, leads_since) = Default::default();
                continue;
            }
            let since = *leads_since.get_or_insert_with(Instant::now);
            let Some(view) = self.view().filter(|_| since.elapsed() > self.options.election_timeout) else { continue };
            for (&id, seen) in &view.members {
                let member = format_args!("{id:x}");
                if seen.active && silent.remove(&id) {
                    tracing::info!(%member, "a member is heard of again");
                } else if !seen.active && silent.insert(id) {
                    tracing::warn!(%member, "a member is not heard of: it is down, or cut off");
                }
            }
            silent.retain(|id| view.members.contains_key(id));
        }
    }

    /// Tells all members, through the log, how this one is called and where clients reach it. Alone there is nobody to tell.
    /// One that was added as a voter waits until it votes: who is listed as started counts.
    pub fn publish(self: &Arc<Self>, client_urls: Vec<String>) {
        let Identity { member_id, name, incarnation, .. } = self.identity.clone();
        let wanted = MemberAttributes { id: member_id, name, client_urls, incarnation };
        let node = self.clone();
        self.spawn(async move {
            let mut metrics = node.raft.metrics();
            loop {
                let belongs = {
                    let applied = node.machine.applied().membership;
                    let members = applied.membership();
                    let votes = members.voter_ids().any(|id| id == wanted.id);
                    members.get_node(&wanted.id).is_some_and(|member| votes || !member.voter_to_be) && members.nodes().count() > 1
                };
                if !belongs {
                    if metrics.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
                if lock(&node.machine.members).attributes(wanted.id) == Some(&wanted) {
                    tracing::info!(name = wanted.name, client_urls = ?wanted.client_urls, "published local member to cluster");
                    return;
                }
                let command = internal::Command { id: 0, op: Some(Op::MemberAttributes(wanted.clone())) };
                if let Err(err) = node.propose_command(command).await {
                    tracing::debug!(error = %err, "publishing this member");
                    if node.pause(PUBLISH_RETRY).await.is_err() {
                        return;
                    }
                }
            }
        });
    }

    /// As the leader, makes added voters vote once they have the log.
    pub(super) async fn promote_added(self: Arc<Self>) {
        let waits = |membership: &Membership| {
            let voters: Vec<u64> = membership.voter_ids().collect();
            membership.nodes().find(|(id, member)| member.voter_to_be && !voters.contains(id)).map(|(&id, _)| id)
        };
        loop {
            tokio::time::sleep(PROMOTE_LOOK).await;
            if !self.is_leader() || waits(self.raft.metrics().borrow_watched().membership_config.membership()).is_none() {
                continue;
            }
            let _one = self.changing.lock().await;
            let Some(view) = self.view() else { continue };
            // One that has the log and is not there would cost a voter that is: of one, the quorum.
            let Some(id) = waits(&view.membership).filter(|id| view.in_sync(*id) && view.is_active(*id)) else { continue };
            let tried = match view.with(|voters, _| voters.extend([id])) {
                Ok(plan) => self.carry_out(plan, view.at).await,
                Err(err) => Err(err),
            };
            match tried {
                Ok(Tried::Done(_)) => tracing::info!(member = %format_args!("{id:x}"), "an added member has the log, and votes"),
                // It is looked at again.
                Ok(_) => {}
                Err(err) => tracing::warn!(member = %format_args!("{id:x}"), error = %err, "making an added member vote"),
            }
        }
    }

    /// Calls the others in turn: whether they are there, how long they take to say so, and whether this member was removed while it was not told,
    /// or has lost its data, which whoever is called then says.
    pub(super) async fn call_round(self: Arc<Self>) {
        let mut last = 0;
        let mut links = BTreeMap::new();
        let mut told = self.options.told.iter().cycle();
        loop {
            tokio::time::sleep(BELONG_LOOK).await;
            // Also one that is not committed: who has founded its cluster a second time is told so, and comes no further by itself.
            let membership = self.raft.metrics().borrow_watched().membership_config.membership().clone();
            let others = || membership.nodes().filter(|(id, _)| **id != self.identity.member_id);
            let Some((&id, member)) = others().find(|(id, _)| **id > last).or_else(|| others().next()) else {
                // One that was added, and removed before it was sent anything, knows only whom it was told to join. Not the last of its
                // cluster, whoever is found at an address of one that was removed.
                if self.identity.joined
                    && membership.get_node(&self.identity.member_id).is_none()
                    && let Some(url) = told.next()
                    && self.is_removed_at(url).await
                {
                    self.fail(Error::Removed);
                    return;
                }
                continue;
            };
            last = id;
            links.retain(|id, _| membership.get_node(id).is_some());
            let link = links.entry(id).or_insert_with(|| self.network.link(id, member));
            // A connection that has to be made first is no part of a round trip.
            let _ = tokio::time::timeout(BELONG_LOOK, link.reach()).await;
            let (asked, peer) = (Instant::now(), self.counters().peers.get(id));
            let answer = link
                .call(MembersRequest { newest: false }, BELONG_LOOK, |mut client, request| async move { client.members(request).await })
                .await;
            match &answer {
                Ok(_) => peer.inspect(|peer| peer.answered(asked.elapsed())),
                Err(_) => peer.inspect(|peer| peer.lost()),
            };
            match answer {
                Err(status) if status.code() != tonic::Code::FailedPrecondition => {}
                Err(status) if status.message() == REMOVED => {
                    tokio::time::sleep(REMOVED_GRACE).await;
                    self.fail(Error::Removed);
                    return;
                }
                // It may vote, and be elected, by those alone who know as little as it does: the sooner it is gone, the better.
                Err(status) if status.message().contains(OTHER_DATA) => {
                    self.fail(Error::Failed(status.message().to_owned()));
                    return;
                }
                _ => {}
            }
        }
    }

    /// Whether who listens there belongs to this cluster, knows who its members are at this moment, and this one is none of them.
    async fn is_removed_at(&self, url: &str) -> bool {
        let there = self.network.members_at(url).await;
        let of_ours = there.ok().filter(|there| there.newest && there.cluster_id == self.identity.cluster_id);
        of_ours.is_some_and(|there| there.members.iter().all(|member| member.id != self.identity.member_id))
    }

    /// Follows a membership that Raft goes by from now on.
    pub(super) fn follow_membership(&self, membership: &Membership) {
        self.network.note(membership);
        self.roster.note(&self.runtime, membership, self.identity.member_id);
        self.learner.store(is_learner(membership, self.identity.member_id), Ordering::Relaxed);
    }

    /// Stops in a moment if the log says that this member was removed.
    pub(super) fn stop_if_removed(self: &Arc<Self>) -> bool {
        if !lock(&self.machine.members).is_removed(self.identity.member_id) {
            return false;
        }
        let node = self.clone();
        self.spawn(async move {
            tokio::time::sleep(REMOVED_GRACE).await;
            node.fail(Error::Removed);
        });
        true
    }

    // ---- What other members ask

    pub async fn peer_transfer_leader(&self, request: TransferLeaderRequest) -> Result<TransferLeaderResponse> {
        if self.is_condemned() {
            return Ok(TransferLeaderResponse { refused: "its state is known to be wrong".into() });
        }
        let vote = vote_from_proto(request.vote.unwrap_or_default());
        let request = openraft::raft::TransferLeaderRequest::new(vote, request.to, request.last.map(log_id_from_proto));
        let answer = self.raft.handle_transfer_leader(request).await.map_err(|err| Error::Failed(err.to_string()))?;
        Ok(TransferLeaderResponse { refused: answer.err().map_or_else(String::new, |err| err.to_string()) })
    }

    pub async fn peer_change(&self, request: ChangeRequest) -> Result<ChangeResponse> {
        let change = request.change.ok_or_else(|| Error::Failed("a change of the members without one".into()))?;
        self.check_running()?;
        let (index, outcome) = match if self.is_leader() { self.change_here(&change).await } else { Ok(Handed::Refused) } {
            Ok(Handed::Done((index, id))) => (index, Changed::Done(id)),
            Ok(Handed::Refused) => (0, Changed::NotLeader(Nothing {})),
            Ok(Handed::Unknown) => (0, Changed::Unknown(Nothing {})),
            Err(Error::Apply(refused)) => (0, Changed::Refused(refused.to_string())),
            Err(Error::Ineligible { reason, what }) => (0, enlist::to_proto(reason, what)),
            Err(Error::Timeout) => (0, Changed::NotLeader(Nothing {})),
            Err(Error::Stopped) => (0, Changed::Unknown(Nothing {})),
            Err(err) => return Err(err),
        };
        Ok(ChangeResponse { index, outcome: Some(outcome) })
    }

    pub async fn peer_members(&self, request: MembersRequest) -> Result<MembersResponse> {
        // Without a leader it is told what is known here.
        let newest = request.newest && matches!(self.within(BELONG_LOOK, self.read_barrier()).await, Ok(Ok(())));
        let membership = self.machine.applied().membership;
        let known = lock(&self.machine.members);
        let members = membership.membership().nodes().map(|(&id, member)| ListedMember {
            id,
            name: known.attributes(id).map_or_else(|| member.name.clone(), |attributes| attributes.name.clone()),
            peer_urls: member.peer_urls.clone(),
            published: known.attributes(id).is_some(),
            votes: membership.membership().voter_ids().any(|voter| voter == id),
        });
        Ok(MembersResponse { cluster_id: self.identity.cluster_id, members: members.collect(), newest })
    }
}

/// Peer URLs, each in its one form.
fn checked(urls: &[String]) -> Result<Vec<String>, ApplyError> {
    if urls.is_empty() {
        return Err(ApplyError::MemberBadUrls);
    }
    let mut checked = Vec::with_capacity(urls.len());
    for url in urls {
        checked.push(url.parse::<Url>().map_err(|_| ApplyError::MemberBadUrls)?.to_string());
    }
    checked.sort();
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn url(id: u64) -> Vec<String> {
        vec![format!("http://127.0.0.1:{id}")]
    }

    /// Members 1 to n, 1 leading, all voters, up and with the whole log of 100 entries, but for what is told otherwise.
    pub(super) fn view(n: u64, but: &[(u64, Seen)]) -> View {
        let seen = |id| but.iter().find(|(other, _)| *other == id).map_or(UP, |(_, seen)| seen.clone());
        let members: BTreeMap<u64, Seen> = (1..=n).map(|id| (id, seen(id))).collect();
        let nodes: BTreeMap<u64, Member> = (1..=n).map(|id| (id, Member { peer_urls: url(id), ..Member::default() })).collect();
        let voters = members.iter().filter(|(_, seen)| seen.voter).map(|(&id, _)| id).collect();
        View { at: None, membership: Membership::new(vec![voters], nodes).unwrap(), ours: 1, last: 100, members, max_learners: 1 }
    }

    #[test]
    fn as_many_learners_as_may_be() {
        let add = Change::Add(AddMember { peer_urls: url(9), learner: true });
        for (max_learners, outcome) in [(0, Some(ApplyError::TooManyLearners)), (1, Some(ApplyError::TooManyLearners)), (2, None)] {
            assert_eq!(refused(&View { max_learners, ..view(4, &[(4, LEARNER)]) }, &add), outcome, "{max_learners}");
        }
        assert_eq!(refused(&View { max_learners: 0, ..view(3, &[]) }, &add), Some(ApplyError::TooManyLearners));
    }

    pub(super) const UP: Seen = Seen { voter: true, started: true, active: true, matched: 100 };
    pub(super) const DOWN: Seen = Seen { active: false, ..UP };
    const UNSTARTED: Seen = Seen { started: false, ..DOWN };
    pub(super) const LEARNER: Seen = Seen { voter: false, ..UP };

    fn refused(view: &View, change: &Change) -> Option<ApplyError> {
        match view.plan(change, 99, true) {
            Ok(_) => None,
            Err(Error::Apply(err)) => Some(err),
            Err(err) => panic!("{err}"),
        }
    }

    /// One that was added as a voter and has not got the log yet counts as a voter for etcd's checks, and is no help to the quorum.
    #[test]
    fn who_does_not_vote_yet_does_not_hold_the_quorum() {
        let mut view = view(4, &[(3, DOWN)]);
        let nodes: BTreeMap<u64, Member> = view.membership.nodes().map(|(&id, member)| (id, member.clone())).collect();
        view.membership = Membership::new(vec![[1, 2, 3].into()], nodes).unwrap();
        assert_eq!(refused(&view, &Change::Remove(2)), Some(ApplyError::UnhealthyCluster));
        assert_eq!(refused(&view, &Change::Remove(3)), None);
    }

    /// The outcomes that etcd 3.5 has in the same places.
    #[test]
    fn changes_are_checked_as_etcd_does() {
        use ApplyError::*;
        let add = |id: u64, learner| Change::Add(AddMember { peer_urls: url(id), learner });
        let update = |id, to| Change::Update(UpdateMember { id, peer_urls: url(to) });
        let none: &[(u64, Seen)] = &[];
        for (n, but, change, outcome) in [
            (1, none, add(9, false), None),
            (3, none, add(9, false), None),
            (3, none, add(9, true), None),
            (3, none, add(2, true), Some(PeerUrlExists)),
            (3, &[(3, DOWN)], add(9, false), Some(UnhealthyCluster)),
            (3, &[(3, DOWN)], add(9, true), Some(UnhealthyCluster)),
            (4, &[(4, DOWN)], add(9, false), None),
            (2, &[(2, UNSTARTED)], add(9, false), Some(NotEnoughStarted)),
            (4, &[(4, LEARNER)], add(9, true), Some(TooManyLearners)),
            (4, &[(4, LEARNER)], add(9, false), None),
            (3, none, Change::Remove(8), Some(MemberNotFound)),
            (3, none, Change::Remove(1), None),
            (3, none, Change::Remove(2), None),
            (1, none, Change::Remove(1), Some(NotEnoughStarted)),
            (3, &[(3, DOWN)], Change::Remove(2), Some(UnhealthyCluster)),
            (3, &[(3, DOWN)], Change::Remove(1), Some(UnhealthyCluster)),
            (3, &[(3, DOWN)], Change::Remove(3), None),
            (3, &[(3, UNSTARTED)], Change::Remove(2), Some(NotEnoughStarted)),
            (3, &[(3, UNSTARTED)], Change::Remove(3), None),
            (4, &[(4, LEARNER)], Change::Remove(4), None),
            (3, none, update(8, 9), Some(MemberNotFound)),
            (3, none, update(2, 3), Some(PeerUrlExists)),
            (3, none, update(2, 2), None),
            (3, none, Change::Promote(8), Some(MemberNotFound)),
            (3, none, Change::Promote(2), Some(MemberNotLearner)),
            (4, &[(4, LEARNER)], Change::Promote(4), None),
            (4, &[(4, Seen { matched: 89, ..LEARNER })], Change::Promote(4), Some(LearnerNotReady)),
            (4, &[(4, Seen { matched: 90, ..LEARNER })], Change::Promote(4), None),
            // Two for which there is no oracle: etcd promotes both, and may have lost its quorum by that.
            (4, &[(4, Seen { active: false, ..LEARNER })], Change::Promote(4), Some(LearnerNotReady)),
            (4, &[(4, LEARNER), (2, DOWN), (3, DOWN)], Change::Promote(4), Some(UnhealthyCluster)),
        ] {
            assert_eq!(refused(&view(n, but), &change), outcome, "{n} {but:?} {change:?}");
        }
        // Without the strict checks, what would leave nobody is refused all the same.
        assert!(view(1, none).plan(&Change::Remove(1), 9, false).is_err());
        assert!(view(3, &[(3, DOWN)]).plan(&Change::Remove(2), 9, false).is_ok());
    }

    #[test]
    fn an_added_voter_does_not_vote_yet() {
        let Plan::Whole(membership) = view(3, &[]).plan(&Change::Add(AddMember { peer_urls: url(9), learner: false }), 9, true).unwrap()
        else {
            panic!("an update");
        };
        assert!(membership.voter_ids().eq([1, 2, 3]) && membership.get_node(&9).unwrap().voter_to_be);
        assert!(!is_learner(&membership, 9) && !is_learner(&membership, 1) && !is_learner(&membership, 8));
    }

    #[test]
    fn peer_urls_are_put_in_order() {
        let urls = |texts: &[&str]| checked(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(urls(&["http://b:2", "http://a:1"]).unwrap(), ["http://a:1", "http://b:2"]);
        assert!(urls(&[]).is_err() && urls(&["nowhere"]).is_err());
    }
}
