//! What a client asks a node for, one function for each: what is checked before it is proposed or read, and what is said back.
//!
//! ```text
//! put    checked, space looked at  ->  one command in an entry of the log  ->  the applier's answer, with this member's header
//! range  ReadIndex, if linearizable  ->  read at the revision that is held  ->  what is large is fetched elsewhere, part by part
//! ```
//!
//! # Invariants
//! - What is refused here has changed nothing. What depends on the state is decided by the applier, the same at every member.
//! - What needs space is refused while there is none; what gives space back never is.
//! - A request waits no longer than its limit, whatever it waits for.

use futures_util::future::BoxFuture;

use super::propose::Begun;
use super::*;
use crate::lease::Renewal;
use crate::mvcc::Pin;
use crate::mvcc::range::{HOLD_BYTES, RangeResult, RangeScan};
use crate::mvcc::watch::Session;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmResponse, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, PutResponse, TxnResponse,
};
use crate::raft::apply::BY_QUOTA;
use crate::raft::outgoing::SnapshotStart;

/// How long a renewal waits before it looks again whether an expired lease was revoked.
const EXPIRED_RETRY: Duration = Duration::from_millis(50);

/// What a put costs against the quota beside its key and value, as in etcd.
const PUT_OVERHEAD: u64 = 256;

/// A Range's answer: what was found, and the hold on the revision it was found at; none when nothing has to be fetched any more.
pub(crate) struct RangeAnswer {
    pub result: RangeResult,
    pub pin: Option<Pin>,
    pub keys_only: bool,
    pub header: ResponseHeader,
}

impl Node {
    /// Refuses what needs space, while there is none. When the quota is used up, what is returned tells everybody so before it refuses.
    fn check_space(&self, cost: u64) -> Result<Option<BoxFuture<'_, Result<Reply>>>> {
        self.check_corrupt()?;
        if self.machine.has_alarm(AlarmType::Nospace) || self.background.is_full() || self.wal.space_low() {
            return Err(ApplyError::NoSpace.into());
        }
        let Some(quota) = self.options.quota_bytes else { return Ok(None) };
        if self.store().history().live_bytes() + cost <= quota {
            return Ok(None);
        }
        tracing::warn!(quota, "the space quota is used up: raising the NOSPACE alarm");
        Ok(Some(Box::pin(async {
            self.propose_alarm(self.identity.member_id, AlarmAction::Activate).await?;
            Err(ApplyError::NoSpace.into())
        })))
    }

    pub(super) async fn propose_alarm(&self, member_id: u64, action: AlarmAction) -> Result<()> {
        let request = AlarmRequest { action: action as i32, member_id, alarm: AlarmType::Nospace as i32 };
        self.propose_command(internal::Command { id: BY_QUOTA, op: Some(Op::Alarm(request)) }).await.map(|_| ())
    }

    /// Refuses what changes something while it is not known whose state is right, or this member's is known to be wrong.
    fn check_corrupt(&self) -> Result<()> {
        self.check_sound()?;
        if self.machine.is_all_corrupt() { Err(ApplyError::Corrupt.into()) } else { Ok(()) }
    }

    /// Puts a key. Begun now, and not when the future is first asked, which then need not hold the request.
    pub fn put(&self, request: PutRequest) -> impl Future<Output = Result<PutResponse>> + Send + '_ {
        let begun = self.begin_put(request);
        async move {
            let Reply::Put(mut response) = self.end(begun).await? else { return Err(mismatch()) };
            response.header = self.complete(response.header);
            Ok(response)
        }
    }

    fn begin_put(&self, request: PutRequest) -> Result<Begun<'_>> {
        txn::check_put(&request)?;
        match self.check_space(put_cost(&request))? {
            Some(used_up) => Ok(Begun::Slow(used_up)),
            None => self.begin(Op::Put(request)),
        }
    }

    pub async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        txn::check_delete(&request)?;
        self.check_corrupt()?;
        let Reply::DeleteRange(mut response) = self.propose(Op::DeleteRange(request)).await? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
    }

    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        txn::check_txn(&request, self.options.max_txn_ops)?;
        let mut response = if txn::is_read_only(&request) {
            self.check_sound()?;
            if !txn::is_serializable(&request) {
                self.read_barrier().await?;
            }
            self.check_running()?;
            let store = self.store();
            let mut reader = store.begin();
            let response = txn::txn(&mut reader, &request, &|_| false);
            reader.tally.end_txn();
            reader.tally.count(self.counters());
            response?
        } else {
            self.check_corrupt()?;
            if txn::may_put(&request)
                && let Some(used_up) = self.check_space(txn_cost(&request))?
            {
                used_up.await?;
            }
            let Reply::Txn(response) = self.propose(Op::Txn(request)).await? else { return Err(mismatch()) };
            response
        };
        response.header = self.complete(response.header);
        Ok(response)
    }

    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        self.check_corrupt()?;
        let physical = request.physical;
        let revision = request.revision;
        let outcome = self.propose(Op::Compaction(request)).await;
        self.background.wake();
        if physical && matches!(outcome, Ok(_) | Err(Error::Apply(ApplyError::Compacted))) {
            // As etcd does, also behind a compaction that someone else asked for.
            let mut done = self.background.compacted();
            let wanted = revision.min(self.store().revisions().1);
            // However long it takes, for the client says what it is ready to wait; but not for another's read to end.
            loop {
                match self.within(self.request_timeout(), done.wait_for(|done| *done >= wanted)).await {
                    Ok(_) => break,
                    Err(Error::Timeout) if !self.store().is_held(wanted) && self.background.is_at_work() => {}
                    Err(err) => return Err(err),
                }
            }
        }
        let Reply::Compaction(mut response) = outcome? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
    }

    pub async fn lease_grant(&self, mut request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        if let Some(used_up) = self.check_space(0)? {
            used_up.await?;
        }
        while request.id == 0 {
            // The same range that etcd draws from: positive, so that the id prints alike everywhere.
            let id = world::random() as i64 & i64::MAX;
            if !lock(&self.machine.lessor).contains(id) {
                request.id = id;
            }
        }
        let Reply::LeaseGrant(mut response) = self.propose(Op::LeaseGrant(request)).await? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
    }

    pub async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        self.check_corrupt()?;
        let Reply::LeaseRevoke(mut response) = self.propose(Op::LeaseRevoke(request)).await? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
    }

    /// Renews a lease and returns its TTL in seconds; 0 when there is no such lease.
    pub async fn lease_renew(&self, id: i64) -> Result<i64> {
        self.check_running()?;
        self.check_sound()?;
        let (deadline, mut pause) = (self.deadline(), peers::LEADER_RETRY);
        loop {
            let renewed = {
                let mut lessor = lock(&self.machine.lessor);
                let unsure = lessor.is_primary() && !self.leads_surely() && !world::has_fault(world::Fault::UnsureRenewals);
                if unsure { None } else { Some(lessor.renew(id, self.machine.now())) }
            };
            let Some(renewed) = renewed else {
                // It may have been deposed without having heard of it: the new leader may let the lease expire.
                if Instant::now() >= deadline {
                    return Err(Error::Timeout);
                }
                self.pause(EXPIRED_RETRY).await?;
                continue;
            };
            match renewed {
                Ok(Renewal::Renewed { ttl, clear_checkpoint }) => {
                    if clear_checkpoint {
                        let checkpoint = LeaseCheckpoint { id, remaining_ttl: 0 };
                        self.propose(Op::LeaseCheckpoint(checkpoint)).await?;
                        // Another may lead by now, and have counted from what was left when it began: the lease is renewed where it counts.
                        if Instant::now() >= deadline {
                            return Err(Error::Timeout);
                        }
                        continue;
                    }
                    // Nobody waits for less time because of it: who rings for the old expiry finds the new one.
                    self.counters().leases_renewed.inc();
                    return Ok(ttl);
                }
                // It is about to be revoked; what to answer is known once it was.
                Ok(Renewal::Expired) if Instant::now() < deadline => self.pause(EXPIRED_RETRY).await?,
                Ok(Renewal::Expired) => return Err(Error::Timeout),
                Err(ApplyError::LeaseNotFound) => return Ok(0),
                Err(ApplyError::NotLeader) if Instant::now() < deadline => match self.renew_elsewhere(id).await {
                    Some(ttl) => return Ok(ttl),
                    None => self.leader_settles(&mut pause).await?,
                },
                Err(ApplyError::NotLeader) => return Err(Error::Timeout),
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Renews a lease, if that needs nothing to be waited for. None: ask [`lease_renew`](Self::lease_renew).
    pub(super) fn renew_at_once(&self, id: i64) -> Option<i64> {
        if !self.leads_surely() {
            return None;
        }
        match lock(&self.machine.lessor).renew(id, self.machine.now()) {
            Ok(Renewal::Renewed { ttl, clear_checkpoint: false }) => {
                self.counters().leases_renewed.inc();
                Some(ttl)
            }
            Err(ApplyError::LeaseNotFound) => Some(0),
            _ => None,
        }
    }

    /// Reads, raises or lowers alarms.
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let action = AlarmAction::try_from(request.action).map_err(|_| ApplyError::InvalidAlarm)?;
        let alarm = AlarmType::try_from(request.alarm);
        if action == AlarmAction::Get || (action == AlarmAction::Deactivate && alarm.is_err()) {
            self.read_barrier().await?;
            // Of a type that there is not, none is raised.
            let alarms = alarm.map(|alarm| self.machine.list_alarms(alarm)).unwrap_or_default();
            return Ok(AlarmResponse { header: Some(self.header_now()), alarms });
        }
        alarm.map_err(|_| ApplyError::InvalidAlarm)?;
        let Reply::Alarm(mut response) = self.propose(Op::Alarm(request)).await? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
    }

    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.machine.alarms()
    }

    /// Requests that wait to be proposed.
    pub fn waiting(&self) -> usize {
        lock(&self.queue).waiting.len()
    }

    // ---- Reads

    /// Returns when everything that was acknowledged before the call can be read here.
    pub async fn read_barrier(&self) -> Result<()> {
        self.check_running()?;
        if self.alone.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_voter()?;
        if world::has_fault(world::Fault::UnconfirmedReads) && self.is_leader() {
            return Ok(());
        }
        Box::pin(self.confirm_read()).await
    }

    pub async fn range(&self, request: &RangeRequest) -> Result<RangeAnswer> {
        range::check(request)?;
        self.check_sound()?;
        if request.serializable {
            self.check_running()?;
        } else {
            self.read_barrier().await?;
        }
        let elsewhere = match self.range_from(request)? {
            Ok(answer) => return Ok(answer),
            Err(elsewhere) => elsewhere,
        };
        elsewhere.await
    }

    /// A Range whose barrier and checks are behind it.
    /// What is read now, or what has to be read elsewhere.
    fn range_from(&self, request: &RangeRequest) -> Result<Result<RangeAnswer, BoxFuture<'_, Result<RangeAnswer>>>> {
        self.counters().ranges.inc();
        let store = self.store();
        if let Some((result, revision)) = RangeResult::of_one(&store, request) {
            return Ok(Ok(RangeAnswer { result, pin: None, keys_only: false, header: self.header(revision) }));
        }
        let pin = store.pin(request.revision)?;
        // Of a read of what is newest, the revision that it is of: who watches from the next one on shall miss nothing that was applied in between.
        let header = self.header(if request.revision > 0 { store.revision() } else { pin.at() });
        let keys_only = request.keys_only;
        let scan = match RangeScan::new(request, pin.at(), HOLD_BYTES).start(&store) {
            Ok(result) => return Ok(Ok(RangeAnswer { result: result?, pin: Some(pin), keys_only, header })),
            Err(scan) => scan,
        };
        Ok(Err(Box::pin(async move {
            let (result, pin) = self.blocking(move || (scan.run(&pin), pin)).await?;
            Ok(RangeAnswer { result: result?, pin: Some(pin), keys_only, header })
        })))
    }

    /// Runs long work on the threads kept for it. It must not wait for a client, or it would keep others from theirs.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let done = world::blocking(&self.runtime, work).await;
        done.map_err(|err| if err.is_cancelled() { Error::Stopped } else { Error::Failed(format!("a long read ended early: {err}")) })
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<KvHash> {
        if let Some(known) = self.store().known_hash(revision) {
            return Ok(known);
        }
        let began = self.machine.now();
        let hash = self.compute_hash(revision).await;
        self.counters().hash_rev.observe(self.machine.now().saturating_sub(began));
        hash
    }

    /// Begins a backup: a point of the log, held, and the small things as they are there.
    pub async fn start_backup(&self) -> Result<SnapshotStart> {
        self.check_sound()?;
        // A learner gives what it has, as etcd's does.
        if !self.is_learner() {
            self.read_barrier().await?;
        }
        let machine = self.machine.clone();
        // Run by the applier between two entries, so that revision, leases and alarms belong together.
        let taken = self.raft.with_state_machine(move |_| Box::pin(async move { machine.begin_snapshot(false) }));
        taken.await.map_err(|err| Error::Failed(err.to_string()))?
    }

    /// A new stream of watches.
    pub fn watch(&self) -> Session {
        let runtime = self.runtime.clone();
        let elsewhere = move |step: Box<dyn FnOnce() + Send>| drop(world::blocking(&runtime, step));
        Session::new(self.machine.hub.clone(), self.store()).reading_elsewhere(Arc::new(elsewhere))
    }
}

fn put_cost(put: &PutRequest) -> u64 {
    PUT_OVERHEAD + put.key.len() as u64 + put.value.len() as u64
}

fn txn_cost(txn: &TxnRequest) -> u64 {
    use crate::proto::etcdserverpb::request_op::Request;
    let branch = |ops: &[crate::proto::etcdserverpb::RequestOp]| -> u64 {
        let costs = ops.iter().map(|op| match &op.request {
            Some(Request::RequestPut(put)) => put_cost(put),
            Some(Request::RequestTxn(txn)) => txn_cost(txn),
            _ => 0,
        });
        costs.sum()
    };
    branch(&txn.success).max(branch(&txn.failure))
}

/// An answer of another kind than the request: a bug, answered rather than panicked over.
fn mismatch() -> Error {
    Error::Failed("an entry was answered with another request's answer".into())
}
