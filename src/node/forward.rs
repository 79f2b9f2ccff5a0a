//! Commands of this member's clients on their way to the member that leads.
//!
//! They gather while those before them are under way, and go as one message; the leader puts them into its log as one entry and answers
//! when it has applied them. So a thousand clients cost two members a few messages, and not a thousand.
//!
//! Renewals of leases, which the log has nothing of, gather and go in the same way.
//!
//! ```text
//! put, put, txn at b:   b --Propose [put, put, txn]--> a (leads): log, quorum, apply   --index 17, three outcomes-->  b has applied 17, answers
//! ```
//!
//! # Invariants
//! - A command is sent again only after an answer that says that it was not proposed, or when it was never sent. When that is not known,
//!   the client is told that the request has timed out: it may have been carried out, and is never carried out twice by our own doing.
//! - A leader that is silent holds up nobody who comes after another one was elected.

use super::peers::{Handed, LEADER_RETRY, refusal};
use super::*;
use crate::proto::peer::proposed::Outcome as Answer;
use crate::proto::peer::{Nothing, ProposeRequest, ProposeResponse, Proposed, RenewRequest, RenewResponse};
use crate::raft::network::{Link, MESSAGE_BYTES_MAX};

/// Messages under way to one leader. What comes meanwhile gathers for the next.
const UNDER_WAY: usize = 2;

/// What the answers of one message may come to, as far as can be said before. A command whose answer may be larger goes alone.
const ANSWER_BYTES: usize = MESSAGE_BYTES_MAX / 2;

/// A command that waits to be sent, or is under way.
struct Forwarded {
    command: internal::Command,
    /// The command's own.
    bytes: usize,
    /// Of the answer, at most, by what it may read.
    answer_bytes: usize,
    answer: oneshot::Sender<Handed<Answer>>,
    /// Its share of [`QUEUE_BYTES_MAX`], until it is answered.
    #[allow(dead_code, reason = "kept for its drop")]
    room: OwnedSemaphorePermit,
}

/// Commands that wait to be sent: at most [`QUEUE_MAX`], and [`QUEUE_BYTES_MAX`] together with those under way.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: Mutex<Vec<Forwarded>>,
    wanted: Notify,
}

/// Renewals of leases that wait to be sent: as many as there are streams of them, and a message takes [`RENEWALS_MAX`].
#[derive(Default)]
pub(super) struct Renewals {
    waiting: Mutex<Vec<(i64, oneshot::Sender<Option<i64>>)>>,
    wanted: Notify,
}

/// Renewals in one message. What is beyond waits for the next.
const RENEWALS_MAX: usize = 4096;

/// Of a renewal among many: it has to be asked for alone.
const ALONE: i64 = -1;

impl Node {
    /// Has the leader carry out a command, and waits until this member has applied it, too.
    pub(super) async fn propose_elsewhere(&self, command: internal::Command, until: Instant) -> Result<Reply> {
        let mut pause = LEADER_RETRY;
        loop {
            if Instant::now() >= until {
                return Err(Error::Timeout);
            }
            if self.is_leader() {
                match self.propose_here(command.clone(), until).await {
                    // It hands over, or has lost its quorum: nothing was appended.
                    Err(Error::Apply(ApplyError::NotLeader)) => {
                        self.leader_settles(&mut pause).await?;
                        continue;
                    }
                    outcome => return outcome,
                }
            }
            match self.send_along(command.clone(), until).await? {
                Handed::Refused => self.leader_settles(&mut pause).await?,
                Handed::Unknown => return Err(ApplyError::TimeoutLeaderFail.into()),
                Handed::Done(outcome) => return Ok(from_answer(outcome)?),
            }
        }
    }

    /// Sends a command to the leader with the next message.
    async fn send_along(&self, command: internal::Command, until: Instant) -> Result<Handed<Answer>> {
        let bytes = command.encoded_len();
        let answer_bytes = answer_bytes(&command, self.options.max_request_bytes);
        let room = match self.queue_room.clone().try_acquire_many_owned(bytes as u32) {
            Ok(room) => room,
            Err(_) => match self.by(until, self.queue_room.clone().acquire_many_owned(bytes as u32)).await {
                Ok(room) => room.map_err(|_| Error::Stopped)?,
                Err(Error::Timeout) => return Err(ApplyError::TooManyRequests.into()),
                Err(err) => return Err(err),
            },
        };
        let (answer, wait) = oneshot::channel();
        {
            let mut waiting = lock(&self.outbox.waiting);
            if waiting.len() >= QUEUE_MAX {
                return Err(ApplyError::TooManyRequests.into());
            }
            waiting.push(Forwarded { command, bytes, answer_bytes, answer, room });
        }
        self.outbox.wanted.notify_one();
        // Once it is sent nobody can say what became of it before the answer is there; and until then it may be sent any moment.
        self.by(until, wait).await?.map_err(|_| Error::Stopped)
    }

    /// Sends what waits, a message at a time.
    pub(super) async fn forward_batches(self: Arc<Self>) {
        let under_way = Arc::new(Semaphore::new(UNDER_WAY));
        loop {
            self.outbox.wanted.notified().await;
            loop {
                let Ok(place) = under_way.clone().acquire_owned().await else { return };
                let batch = self.take_forwarded();
                if batch.is_empty() {
                    break;
                }
                let node = self.clone();
                self.spawn(async move { node.forward(batch, place).await });
            }
        }
    }

    /// Takes what waits, as much as makes one message.
    fn take_forwarded(&self) -> Vec<Forwarded> {
        let mut waiting = lock(&self.outbox.waiting);
        // Who has given up is told that it is not known, which is true of what was never sent, too.
        waiting.retain(|forwarded| !forwarded.answer.is_closed());
        let (mut bytes, mut answers, mut count) = (0, 0, 0);
        for forwarded in waiting.iter().take(BATCH_MAX) {
            bytes += forwarded.bytes;
            answers += forwarded.answer_bytes;
            if count > 0 && (bytes > BATCH_BYTES_MAX || answers > ANSWER_BYTES) {
                break;
            }
            count += 1;
        }
        let rest = waiting.split_off(count);
        std::mem::replace(&mut waiting, rest)
    }

    /// Sends a batch to the leader, and hands out what became of it once this member has applied that, too.
    async fn forward(&self, batch: Vec<Forwarded>, place: OwnedSemaphorePermit) {
        let (commands, waiting): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|forwarded| (forwarded.command, (forwarded.answer, forwarded.room))).unzip();
        let sent = match self.leader_link() {
            Some(link) => self.send_commands(link, commands, place).await,
            None => Handed::Refused,
        };
        let outcomes: Vec<_> = match sent {
            Handed::Done(answer)
                if answer.outcomes.len() == waiting.len() && self.applied_upto(answer.index, self.deadline()).await.is_ok() =>
            {
                answer.outcomes.into_iter().map(handed).collect()
            }
            Handed::Refused => waiting.iter().map(|_| Handed::Refused).collect(),
            Handed::Done(_) | Handed::Unknown => waiting.iter().map(|_| Handed::Unknown).collect(),
        };
        for ((answer, _room), outcome) in waiting.into_iter().zip(outcomes) {
            // Who asked may have given up waiting.
            let _ = answer.send(outcome);
        }
    }

    /// Sends commands and waits for the answer; once another member leads, others need not wait for it any more.
    async fn send_commands(
        &self,
        mut link: Link,
        commands: Vec<internal::Command>,
        place: OwnedSemaphorePermit,
    ) -> Handed<ProposeResponse> {
        if let Err(status) = link.reach().await {
            tracing::debug!(peer = %format_args!("{:x}", link.id()), error = status.message(), "the leader cannot be reached");
            self.keep_link(link);
            return Handed::Refused;
        }
        let leader = link.id();
        let request = ProposeRequest { commands };
        let handed = {
            let call = link.call(request, self.request_timeout(), |mut client, request| async move { client.propose(request).await });
            let mut call = std::pin::pin!(call);
            let answer = tokio::select! {
                biased;
                answer = &mut call => answer,
                () = self.leads_no_more(leader) => {
                    drop(place);
                    call.await
                }
            };
            match answer {
                Ok(answer) => Handed::Done(answer),
                Err(status) if status.code() == tonic::Code::FailedPrecondition => Handed::Refused,
                Err(status) => {
                    let peer = format_args!("{leader:x}");
                    tracing::debug!(%peer, code = ?status.code(), error = status.message(), "what became of commands is not known");
                    Handed::Unknown
                }
            }
        };
        self.keep_link(link);
        handed
    }

    /// Returns when a member does not lead any more, by what this one knows.
    pub(super) async fn leads_no_more(&self, leader: u64) {
        let mut metrics = self.raft.metrics();
        // Not what [`leader`](Self::leader) says: that may be brought up to date only after this has looked, and nothing changes then for long.
        while metrics.borrow_and_update().current_leader == Some(leader) && metrics.changed().await.is_ok() {}
    }

    /// Has the leader renew a lease. None: try again.
    pub(super) async fn renew_elsewhere(&self, id: i64) -> Option<i64> {
        let (answer, wait) = oneshot::channel();
        lock(&self.renewals.waiting).push((id, answer));
        self.renewals.wanted.notify_one();
        match self.within(self.request_timeout(), wait).await.ok()?.ok()?? {
            ALONE => {
                let answer = self.send_renewals(RenewRequest { id, ids: Vec::new() }).await?;
                Some(answer.ttl)
            }
            ttl => Some(ttl),
        }
    }

    /// Sends renewals, all that wait at a time.
    pub(super) async fn forward_renewals(self: Arc<Self>) {
        loop {
            self.renewals.wanted.notified().await;
            loop {
                let batch = {
                    let mut waiting = lock(&self.renewals.waiting);
                    waiting.retain(|(_, answer)| !answer.is_closed());
                    let count = waiting.len().min(RENEWALS_MAX);
                    let rest = waiting.split_off(count);
                    std::mem::replace(&mut *waiting, rest)
                };
                if batch.is_empty() {
                    break;
                }
                let ids = batch.iter().map(|(id, _)| *id).collect();
                let ttls = self.send_renewals(RenewRequest { id: 0, ids }).await.map(|answer| answer.ttls).unwrap_or_default();
                let mut ttls = ttls.into_iter();
                for (_, answer) in batch {
                    let _ = answer.send(ttls.next());
                }
            }
        }
    }

    async fn send_renewals(&self, request: RenewRequest) -> Option<RenewResponse> {
        let mut link = self.leader_link()?;
        let leader = link.id();
        let limit = self.request_timeout();
        let answer = {
            let call = link.call(request, limit, |mut client, request| async move { client.renew(request).await });
            tokio::select! {
                biased;
                answer = call => answer.ok(),
                // To renew a lease once more does no harm.
                () = self.leads_no_more(leader) => None,
            }
        };
        self.keep_link(link);
        answer.filter(|answer| !answer.not_leader)
    }

    /// Renews leases of another member's clients.
    pub async fn peer_renew(&self, request: RenewRequest) -> Result<RenewResponse> {
        if !lock(&self.machine.lessor).is_primary() || self.is_condemned() {
            return Ok(RenewResponse { not_leader: true, ..RenewResponse::default() });
        }
        if request.ids.is_empty() {
            return Ok(RenewResponse { ttl: self.lease_renew(request.id).await?, ..RenewResponse::default() });
        }
        if !self.leads_surely() {
            // All of them would have to wait here, each by itself.
            return Ok(RenewResponse { not_leader: true, ..RenewResponse::default() });
        }
        let ttls = request.ids.iter().map(|id| self.renew_at_once(*id).unwrap_or(ALONE)).collect();
        Ok(RenewResponse { ttls, ..RenewResponse::default() })
    }

    /// Checks a command of another member's client, as that one should have: once it is in the log there is no refusing it any more, and
    /// one that the leader does not know would be the end of all members.
    fn check_forwarded(&self, command: &internal::Command) -> Result<(), ApplyError> {
        if command.encoded_len() + ENVELOPE_BYTES > self.options.max_request_bytes {
            return Err(ApplyError::RequestTooLarge);
        }
        match &command.op {
            Some(Op::Put(put)) => txn::check_put(put),
            Some(Op::DeleteRange(delete)) => txn::check_delete(delete),
            Some(Op::Txn(txn)) => txn::check_txn(txn, self.options.max_txn_ops),
            Some(_) => Ok(()),
            // Of a later release, whose members follow when all of them are of it.
            None => Err(ApplyError::NotCapable),
        }
    }

    /// Carries out commands of another member's clients: all of them are queued before the first is waited for.
    pub async fn peer_propose(&self, request: ProposeRequest) -> Result<ProposeResponse> {
        // One whose state is wrong leads only until another does: its outcomes would be wrong, too.
        if !self.is_leader() || self.is_condemned() {
            let outcomes = request.commands.iter().map(|_| Proposed { outcome: Some(Answer::NotLeader(Nothing {})) }).collect();
            return Ok(ProposeResponse { index: 0, outcomes });
        }
        self.check_running()?;
        let until = self.deadline();
        let mut queued = Vec::with_capacity(request.commands.len());
        let mut has_room = true;
        for command in request.commands {
            queued.push(match self.check_forwarded(&command) {
                Err(refused) => Err(refused.into()),
                Ok(()) if has_room => self.enqueue(command, until).await,
                // Time was spent on waiting for room already: what became of the others has to be told before it is up.
                Ok(()) => self.enqueue_at_once(command),
            });
            has_room = has_room && !matches!(queued.last(), Some(Err(Error::Apply(ApplyError::TooManyRequests))));
        }
        let mut outcomes = Vec::with_capacity(queued.len());
        let mut bytes = 0;
        for queued in queued {
            let outcome = match queued {
                Ok(wait) => self.outcome_of(wait, until).await,
                Err(err) => Err(err),
            };
            let mut outcome = Proposed {
                outcome: Some(match outcome {
                    Ok(reply) => to_answer(reply),
                    Err(Error::Apply(ApplyError::NotLeader)) => Answer::NotLeader(Nothing {}),
                    Err(Error::Apply(ApplyError::TimeoutLeaderFail) | Error::Timeout | Error::Stopped) => Answer::Unknown(Nothing {}),
                    Err(Error::Apply(refused)) => Answer::Refused(refused.to_string()),
                    Err(err) => return Err(err),
                }),
            };
            // Only values larger than any request may be come to this.
            if bytes + outcome.encoded_len() > MESSAGE_BYTES_MAX - MESSAGE_BYTES_MAX / 8 {
                outcome.outcome = Some(Answer::Unknown(Nothing {}));
            }
            bytes += outcome.encoded_len();
            outcomes.push(outcome);
        }
        let index = self.machine.applied().log_id.map_or(0, |id| id.index);
        Ok(ProposeResponse { index, outcomes })
    }
}

/// What the answer to a command may take, in bytes, given the most that a value may have. Counted is only what may be large.
fn answer_bytes(command: &internal::Command, value_bytes: usize) -> usize {
    match &command.op {
        Some(Op::Put(put)) if put.prev_kv => value_bytes,
        Some(Op::DeleteRange(delete)) if delete.prev_kv => pairs_bytes(&delete.range_end, value_bytes),
        Some(Op::Txn(txn)) => txn_answer_bytes(txn, value_bytes),
        _ => 0,
    }
}

fn txn_answer_bytes(txn: &TxnRequest, value_bytes: usize) -> usize {
    use crate::proto::etcdserverpb::request_op::Request;
    let branch = |ops: &[crate::proto::etcdserverpb::RequestOp]| -> usize {
        let bytes = ops.iter().map(|op| match &op.request {
            Some(Request::RequestRange(range)) if !range.count_only && !range.keys_only => pairs_bytes(&range.range_end, value_bytes),
            Some(Request::RequestRange(range)) if range.keys_only => ANSWER_BYTES,
            Some(Request::RequestPut(put)) if put.prev_kv => value_bytes,
            Some(Request::RequestDeleteRange(delete)) if delete.prev_kv => pairs_bytes(&delete.range_end, value_bytes),
            Some(Request::RequestTxn(txn)) => txn_answer_bytes(txn, value_bytes),
            _ => 0,
        });
        bytes.fold(0, usize::saturating_add)
    };
    branch(&txn.success).max(branch(&txn.failure))
}

/// Of one pair, or of nobody knows how many.
fn pairs_bytes(range_end: &[u8], value_bytes: usize) -> usize {
    if range_end.is_empty() { value_bytes } else { ANSWER_BYTES }
}

fn handed(outcome: Proposed) -> Handed<Answer> {
    match outcome.outcome {
        Some(Answer::NotLeader(_)) => Handed::Refused,
        Some(Answer::Unknown(_)) | None => Handed::Unknown,
        Some(outcome) => Handed::Done(outcome),
    }
}

fn to_answer(reply: Reply) -> Answer {
    match reply {
        Reply::Put(response) => Answer::Put(response),
        Reply::DeleteRange(response) => Answer::DeleteRange(response),
        Reply::Txn(response) => Answer::Txn(response),
        Reply::Compaction(response) => Answer::Compaction(response),
        Reply::LeaseGrant(response) => Answer::LeaseGrant(response),
        Reply::LeaseRevoke(response) => Answer::LeaseRevoke(response),
        Reply::LeaseCheckpoint => Answer::LeaseCheckpoint(Nothing {}),
        Reply::Alarm(response) => Answer::Alarm(response),
        Reply::ClusterVersion => Answer::ClusterVersion(Nothing {}),
        Reply::MemberAttributes => Answer::MemberAttributes(Nothing {}),
    }
}

fn from_answer(answer: Answer) -> Outcome {
    Ok(match answer {
        Answer::Put(response) => Reply::Put(response),
        Answer::DeleteRange(response) => Reply::DeleteRange(response),
        Answer::Txn(response) => Reply::Txn(response),
        Answer::Compaction(response) => Reply::Compaction(response),
        Answer::LeaseGrant(response) => Reply::LeaseGrant(response),
        Answer::LeaseRevoke(response) => Reply::LeaseRevoke(response),
        Answer::LeaseCheckpoint(_) => Reply::LeaseCheckpoint,
        Answer::Alarm(response) => Reply::Alarm(response),
        Answer::ClusterVersion(_) => Reply::ClusterVersion,
        Answer::MemberAttributes(_) => Reply::MemberAttributes,
        Answer::Refused(text) => return Err(refusal(&text)),
        Answer::NotLeader(_) | Answer::Unknown(_) => return Err(ApplyError::TimeoutLeaderFail),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::request_op::Request;
    use crate::proto::etcdserverpb::{RangeRequest, RequestOp};

    #[test]
    fn what_answers_may_come_to() {
        let of = |op| answer_bytes(&internal::Command { id: 0, op: Some(op) }, 100);
        let put = |prev_kv| PutRequest { prev_kv, ..PutRequest::default() };
        assert_eq!((of(Op::Put(put(false))), of(Op::Put(put(true)))), (0, 100));
        let get = |range_end: &'static str, count_only| {
            let range = RangeRequest { range_end: range_end.into(), count_only, ..RangeRequest::default() };
            RequestOp { request: Some(Request::RequestRange(range)) }
        };
        let txn = |success: Vec<RequestOp>, failure: Vec<RequestOp>| Op::Txn(TxnRequest { compare: vec![], success, failure });
        assert_eq!(of(txn(vec![get("", false)], vec![get("", false), get("", false), get("", true)])), 200);
        assert_eq!(of(txn(vec![get("z", false)], vec![])), ANSWER_BYTES);
        let inner = TxnRequest { compare: vec![], success: vec![get("", false)], failure: vec![] };
        assert_eq!(of(txn(vec![RequestOp { request: Some(Request::RequestTxn(inner)) }], vec![])), 100);
    }
}
