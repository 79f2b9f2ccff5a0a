//! What members do for each other's clients: a member that does not lead hands writes to the one that does (see [`forward`](super::forward)),
//! asks it how far a linearizable read must see, and renews leases with it.
//!
//! ```text
//! get at b:   b --ReadIndex--> a: confirms that it leads     --index 17-->               b waits until it has applied 17, reads its own
//! ```
//!
//! # Invariants
//! - One confirmation serves all reads that wait for one when it begins, and none that come later.

use std::future::Future;

use tonic::{Request, Response, Status};

use super::*;
use crate::proto::peer::peer_client::PeerClient;
use crate::proto::peer::{
    AppendRequest, AppendResponse, ReadIndexRequest, ReadIndexResponse, TimeToLiveRequest, TimeToLiveResponse, VoteRequest, VoteResponse,
};
use crate::raft::network::{self, Link};
use crate::raft::wire::Wire;
use crate::raft::{log_id_from_proto, log_id_to_proto, vote_from_proto, vote_to_proto};

/// How long a request waits before it looks again for a leader: at first, and at most.
pub(super) const LEADER_RETRY: Duration = Duration::from_millis(10);
const LEADER_RETRY_MAX: Duration = Duration::from_millis(160);

/// What came of handing something to the leader.
pub(super) enum Handed<T> {
    Done(T),
    /// Nothing was done: try again.
    Refused,
    /// It is not known whether it was done.
    Unknown,
}

impl Node {
    /// A link to the leader; none when there is no leader, or it is this member.
    pub(super) fn leader_link(&self) -> Option<Link> {
        let leader = self.leader();
        if leader == 0 || self.is_leader() {
            return None;
        }
        let mut link = lock(&self.leader_link);
        if link.as_ref().is_none_or(|link| link.id() != leader) {
            let membership = self.machine.applied().membership;
            let member = membership.membership().get_node(&leader)?.clone();
            *link = Some(self.network.link(leader, &member));
        }
        link.clone()
    }

    /// Takes a hint where another member is: see [`Network::hint`]. Returns whether it is news.
    pub fn hint(&self, id: u64, url: &str) -> bool {
        id != self.identity.member_id && self.network.hint(id, url)
    }

    /// Puts a link back that may have learnt that its connection is broken.
    pub(super) fn keep_link(&self, link: Link) {
        let mut kept = lock(&self.leader_link);
        if kept.as_ref().is_some_and(|kept| kept.id() == link.id()) {
            *kept = Some(link);
        }
    }

    /// Waits until this member has applied the log up to an index.
    pub(super) async fn applied_upto(&self, index: u64, until: Instant) -> Result<()> {
        let applied = || self.machine.applied().log_id.is_some_and(|id| id.index >= index);
        if applied() {
            return Ok(());
        }
        let mut metrics = self.raft.metrics();
        let reached = async {
            while !applied() {
                metrics.changed().await.map_err(|_| Error::Stopped)?;
            }
            Ok(())
        };
        self.by(until, reached).await?
    }

    /// Waits for the next confirmation that a leader leads, and until this member has applied what it had committed by then.
    pub(super) async fn confirm_read(&self) -> Result<()> {
        let until = self.deadline();
        let (answer, wait) = oneshot::channel();
        lock(&self.reads).push(answer);
        self.read_wanted.notify_one();
        let index = match self.by(until, wait).await {
            Ok(Ok(index)) => index,
            Ok(Err(_)) => return Err(Error::Stopped),
            Err(err) => {
                if matches!(err, Error::Timeout) {
                    self.counters().slow_read_indexes.inc();
                }
                return Err(err);
            }
        };
        self.applied_upto(index, until).await
    }

    /// Confirms reads, all that wait in one round.
    pub(super) async fn confirm_reads(self: Arc<Self>) {
        loop {
            self.read_wanted.notified().await;
            loop {
                let mut waiting = std::mem::take(&mut *lock(&self.reads));
                // Who has given up needs no answer.
                waiting.retain(|answer| !answer.is_closed());
                if waiting.is_empty() {
                    break;
                }
                match self.confirm().await {
                    Some(index) => {
                        for answer in waiting {
                            let _ = answer.send(index);
                        }
                    }
                    None => {
                        self.counters().read_indexes_failed.inc();
                        lock(&self.reads).append(&mut waiting);
                        if self.pause(LEADER_RETRY).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Waits before a leader is asked again, or asked for: `pause` at first and longer each time, but not when another leads meanwhile, or
    /// none does: all that wait here would keep those busy who elect one.
    pub(super) async fn leader_settles(&self, pause: &mut Duration) -> Result<()> {
        let waited = self.within(*pause, self.leader_changed.notified()).await;
        *pause = LEADER_RETRY_MAX.min(2 * *pause);
        match waited {
            Ok(()) | Err(Error::Timeout) => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// One confirmation: how far a read must see. None when nobody can say so now.
    async fn confirm(&self) -> Option<u64> {
        let limit = 2 * self.options.election_timeout;
        if self.is_leader() {
            return self.confirm_here().await;
        }
        let answer =
            self.ask_leader(ReadIndexRequest {}, limit, |mut client, request| async move { client.read_index(request).await }).await?;
        (!answer.not_leader).then_some(answer.index)
    }

    /// Asks the leader something that does no harm when it is asked twice. None when there is nobody to ask, or no answer, or another leads
    /// before the answer has come: one that is silently gone holds up nobody for longer than its election.
    async fn ask_leader<Req, Resp, F, Fut>(&self, request: Req, limit: Duration, method: F) -> Option<Resp>
    where
        F: FnOnce(PeerClient<Wire>, Request<Req>) -> Fut,
        Fut: Future<Output = Result<Response<Resp>, Status>>,
        Req: prost::Message,
        Resp: prost::Message,
    {
        let mut link = self.leader_link()?;
        let leader = link.id();
        let answer = tokio::select! {
            biased;
            answer = link.call(request, limit, method) => answer.ok(),
            () = self.leads_no_more(leader) => None,
        };
        self.keep_link(link);
        answer
    }

    /// As above, by this member, which believes that it leads.
    async fn confirm_here(&self) -> Option<u64> {
        let confirmed = self.raft.get_read_log_id(openraft::ReadPolicy::ReadIndex);
        let (read, _) = tokio::time::timeout(2 * self.options.election_timeout, confirmed).await.ok()?.ok()?;
        Some(read.index())
    }

    /// Whether nobody else can lead: a quorum has heard of this leader so lately that none of it supports another yet; unless it was asked to,
    /// because this one hands over.
    pub(super) fn leads_surely(&self) -> bool {
        if self.alone.load(Ordering::Acquire) {
            return true;
        }
        if self.handing_over.load(Ordering::Acquire) == self.term() {
            return false;
        }
        use openraft::Instant as _;
        let metrics = self.raft.metrics();
        let acknowledged = metrics.borrow_watched().last_quorum_acked.as_ref().map(|at| at.elapsed());
        acknowledged.is_some_and(|ago| ago < self.options.election_timeout / 2)
    }

    /// Whether there is a leader, as far as it can be known here: one that was heard of within two election timeouts, or that a quorum has
    /// heard of, if it is this one. [`leader`](Self::leader) keeps the name of one that is gone until there is another, for who
    /// stands for election asks around first and changes nothing.
    pub fn has_leader(&self) -> bool {
        use openraft::Instant as _;
        if self.alone.load(Ordering::Acquire) {
            return true;
        }
        let leader = self.leader();
        let recent = 2 * self.options.election_timeout;
        if leader == self.identity.member_id {
            let metrics = self.raft.metrics();
            let acknowledged = metrics.borrow_watched().last_quorum_acked.as_ref().map(|at| at.elapsed());
            return acknowledged.is_some_and(|ago| ago < recent);
        }
        let heard = Duration::from_millis(self.leader_heard_ms.load(Ordering::Relaxed));
        leader != 0 && self.machine.now().saturating_sub(heard) < recent
    }

    /// Who leads, as it is told to clients: 0 when nobody does, by [`has_leader`](Self::has_leader).
    pub fn present_leader(&self) -> u64 {
        if self.has_leader() { self.leader() } else { 0 }
    }

    /// The time that a lease has left, in seconds; -1 when there is no such lease.
    pub async fn lease_remaining(&self, id: i64) -> Result<i64> {
        self.check_sound()?;
        let (until, mut pause) = (self.deadline(), LEADER_RETRY);
        loop {
            {
                let lessor = lock(&self.machine.lessor);
                if lessor.is_primary() && self.leads_surely() {
                    return Ok(lessor.time_to_live(id, self.machine.now(), false).map_or(-1, |found| found.remaining));
                }
            }
            let limit = until.saturating_duration_since(Instant::now());
            let asked =
                self.ask_leader(TimeToLiveRequest { id }, limit, |mut client, request| async move { client.time_to_live(request).await });
            if let Some(answer) = asked.await
                && !answer.not_leader
            {
                return Ok(answer.remaining);
            }
            if Instant::now() >= until {
                return Err(Error::Timeout);
            }
            self.leader_settles(&mut pause).await?;
        }
    }

    // ---- What other members ask

    /// Takes entries, or a heartbeat.
    ///
    /// # Errors
    /// That there is no room for the entries on the disk: the leader tries again, and this member goes on when there is. Were Raft given
    /// them, it would be its end.
    pub async fn peer_append(&self, request: AppendRequest) -> Result<AppendResponse> {
        if !request.entries.is_empty() && !self.has_log_room(request.encoded_len()) {
            return Err(ApplyError::NoSpace.into());
        }
        let request = network::append_from_proto(request).map_err(Error::Failed)?;
        let answer = self.raft.append_entries(request).await.map_err(|err| Error::Failed(err.to_string()))?;
        if !matches!(answer, openraft::raft::AppendEntriesResponse::HigherVote(_)) {
            // Only who leads appends.
            let now = u64::try_from(self.machine.now().as_millis()).unwrap_or(u64::MAX);
            self.leader_heard_ms.store(now, Ordering::Relaxed);
        }
        Ok(network::append_answer(answer))
    }

    /// Votes, or says how it would vote.
    pub async fn peer_vote(&self, request: VoteRequest) -> Result<VoteResponse> {
        let mut rpc =
            openraft::raft::VoteRequest::new(vote_from_proto(request.vote.unwrap_or_default()), request.last.map(log_id_from_proto));
        rpc.leadership_transfer = request.transfer;
        let answer = if request.ask_only { self.raft.pre_vote(rpc).await } else { self.raft.vote(rpc).await };
        let answer = answer.map_err(|err| Error::Failed(err.to_string()))?;
        Ok(VoteResponse {
            vote: Some(vote_to_proto(&answer.vote)),
            granted: answer.vote_granted,
            last: answer.last_log_id.map(log_id_to_proto),
        })
    }

    pub async fn peer_read_index(&self, _: ReadIndexRequest) -> Result<ReadIndexResponse> {
        let index = if self.is_leader() { self.confirm_here().await } else { None };
        Ok(ReadIndexResponse { index: index.unwrap_or(0), not_leader: index.is_none() })
    }

    pub async fn peer_time_to_live(&self, request: TimeToLiveRequest) -> Result<TimeToLiveResponse> {
        let lessor = lock(&self.machine.lessor);
        let not_leader = !lessor.is_primary() || !self.leads_surely() || self.is_condemned();
        let remaining = lessor.time_to_live(request.id, self.machine.now(), false).map_or(-1, |found| found.remaining);
        Ok(TimeToLiveResponse { remaining, not_leader })
    }
}

/// The refusal of which another member has told the text.
pub(super) fn refusal(text: &str) -> ApplyError {
    ApplyError::ALL.iter().find(|err| err.to_string() == text).copied().unwrap_or(ApplyError::Internal)
}
