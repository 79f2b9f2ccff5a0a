//! The state machine: from a committed log entry to new state, answers and events.
//!
//! [`Machine`] is the applied state of a member: the [store](Store), the [leases](Lessor), the alarms and the membership.
//! One task applies, entry by entry and command by command; everything an entry changes, with the entry's log id, becomes
//! one atomic batch of the storage, so that a restart never finds half of an entry or an entry twice.
//!
//! ```text
//! entry 17: put a=1 lease=5 | lease_revoke 5 | put b=2 lease=5
//!           revision 2        revision 3        lease not found: no revision
//!           watchers: put a   watchers: delete a
//! commit  : records 2 and 3, lease 5 gone, applied = 17
//! ```
//!
//! # Invariants
//! - The outcome of a command depends on the state and the command alone. What is not an outcome ([`ApplyError`]) but a
//!   fault, such as a record that cannot be read, stops the member: to go on would make it differ from the others.
//! - The store calls neither watchers nor lessor; they are joined here, after the commit, before the answer.
//! - The lessor's lock is a leaf: it is taken while the store's writer is held, never the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use prost::Message;

use crate::error::{ApplyError, Error, Result};
use crate::lease::{Lease, Lessor};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::mvcc::txn::{self, Tally};
use crate::mvcc::watch::WatchHub;
use crate::mvcc::{Committed, Saved, Store, Writer};
use crate::proto::EncodedKv;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionResponse, DeleteRangeResponse, LeaseGrantResponse, LeaseRevokeResponse,
    PutResponse, ResponseHeader, TxnResponse,
};
use crate::proto::internal::{self, command};
use crate::slow::Slow;

use super::{
    LogId, Outcome, Reply, SnapshotMeta, StoredMembership, TypeConfig, log_id_from_proto, log_id_to_proto, stored_membership_from_proto,
    stored_membership_to_proto, to_io,
};

/// Names of what is stored beside the history. Frozen.
const META_LEASE: &[u8] = b"lease/";
const META_ALARM: &[u8] = b"alarm/";
const META_QUOTA: &[u8] = b"alarm-by-quota/";
const META_MEMBERSHIP: &[u8] = b"raft/membership";
const META_VERSION: &[u8] = b"cluster/version";

/// The command id of an alarm that the space quota raises, and no client.
pub(crate) const BY_QUOTA: u64 = 1;

/// Bytes of pairs that the answers to one entry's commands may have, all together, before a further command that reads is refused
/// with `too many requests`: without a trace, so that its client may try again. The last one may go beyond it by its own bound.
const ENTRY_ANSWER_BYTES_MAX: usize = 128 << 20;

/// As above, for what evaluating the Txns of one entry may cost; see `Tally::work`.
const ENTRY_WORK_MAX: u64 = 16 << 20;

/// Monotonic time since the server's start. Handed in, so that nothing below the node reads a clock.
pub(crate) type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The applied state of a member. See the module's head.
pub(crate) struct Machine {
    pub store: Arc<Store>,
    pub hub: Arc<WatchHub>,
    pub lessor: Mutex<Lessor>,
    pub counters: Arc<Counters>,
    alarms: Mutex<BTreeSet<(i32, u64)>>,
    /// Members whose NOSPACE alarm was raised by the space quota, and is taken back by it.
    by_quota: Mutex<BTreeSet<u64>>,
    clock: Clock,
    slow: Slow,
    /// What has been applied, and what of it is on disk.
    applied: Mutex<Position>,
    durable: Mutex<Position>,
}

/// How far the state has come.
#[derive(Clone, Default, Debug)]
pub(crate) struct Position {
    pub log_id: Option<LogId>,
    pub membership: StoredMembership,
}

impl Machine {
    /// Takes over what the storage held.
    ///
    /// `attached` are the keys with leases, as [`Store::open`] told them. An entry that takes longer than `slow` to apply is
    /// logged.
    ///
    /// # Errors
    /// `Corrupt` when something stored cannot be read, or when the history does not reach as far as was recorded.
    pub fn new(
        store: Arc<Store>,
        saved: Saved,
        attached: Vec<(i64, Bytes)>,
        mut lessor: Lessor,
        clock: Clock,
        slow: Duration,
        counters: Arc<Counters>,
    ) -> Result<Machine> {
        let damaged = |what: String| store.history().damaged(what);
        let mut position = Position::default();
        if let Some(bytes) = saved.applied {
            let applied = internal::Applied::decode(bytes).map_err(|err| damaged(format!("the applied position: {err}")))?;
            if applied.revision != store.revision() {
                let what = format!("the history ends at revision {}, but the applied position says {}", store.revision(), applied.revision);
                return Err(damaged(what));
            }
            position.log_id = applied.log_id.map(log_id_from_proto);
        }
        let mut leases = Vec::new();
        let mut alarms = BTreeSet::new();
        let mut by_quota = BTreeSet::new();
        for (name, value) in saved.meta {
            if let Some(id) = name.strip_prefix(META_LEASE) {
                let lease = Lease::decode(&value).map_err(|what| damaged(format!("lease {id:02x?}: {what}")))?;
                leases.push(lease);
            } else if name.starts_with(META_ALARM) {
                let alarm = AlarmMember::decode(value).map_err(|err| damaged(format!("an alarm: {err}")))?;
                alarms.insert((alarm.alarm, alarm.member_id));
            } else if let Some(member) = name.strip_prefix(META_QUOTA) {
                let member = <[u8; 8]>::try_from(member).map_err(|_| damaged("an alarm's member is not 8 bytes long".into()))?;
                by_quota.insert(u64::from_be_bytes(member));
            } else if name == META_MEMBERSHIP {
                let stored = internal::StoredMembership::decode(value).map_err(|err| damaged(format!("the membership: {err}")))?;
                position.membership = stored_membership_from_proto(stored).map_err(|what| damaged(format!("the membership: {what}")))?;
            }
        }
        lessor.restore(leases);
        for (lease, key) in attached {
            // A key whose lease is gone is told apart by the check of invariants, not refused: its value is intact.
            if lessor.attach(lease, key).is_err() {
                tracing::warn!(lease, "a key is attached to a lease that does not exist");
            }
        }
        let hub = Arc::new(WatchHub::new(store.revision(), counters.clone()));
        Ok(Machine {
            store,
            hub,
            lessor: Mutex::new(lessor),
            counters,
            alarms: Mutex::new(alarms),
            by_quota: Mutex::new(by_quota),
            clock,
            slow: Slow::new(slow),
            applied: Mutex::new(position.clone()),
            durable: Mutex::new(position),
        })
    }

    /// What has been applied.
    pub fn applied(&self) -> Position {
        lock(&self.applied).clone()
    }

    /// What of it would survive a power cut without the log.
    pub fn durable(&self) -> Position {
        lock(&self.durable).clone()
    }

    /// Notes what the storage has synced: the bytes given with the last commit it covers. Returns the log index.
    pub fn set_durable(&self, applied: Bytes) -> Option<u64> {
        let applied = internal::Applied::decode(applied).ok()?;
        let log_id = applied.log_id.map(log_id_from_proto)?;
        let membership = {
            let now = lock(&self.applied);
            // The membership was stored in the batch of its own entry or before; a newer one is not durable yet.
            if *now.membership.log_id() <= Some(log_id) { Some(now.membership.clone()) } else { None }
        };
        let mut durable = lock(&self.durable);
        durable.log_id = Some(log_id);
        if let Some(membership) = membership {
            durable.membership = membership;
        }
        Some(log_id.index)
    }

    /// Raised alarms: type and member.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        lock(&self.alarms).iter().map(|&(alarm, member_id)| AlarmMember { member_id, alarm }).collect()
    }

    /// Whether the space quota has raised a member's alarm, and not a client.
    pub fn raised_by_quota(&self, member: u64) -> bool {
        lock(&self.by_quota).contains(&member)
    }

    /// Whether any member has raised an alarm of this type.
    pub fn has_alarm(&self, alarm: AlarmType) -> bool {
        lock(&self.alarms).iter().any(|&(raised, _)| raised == alarm as i32)
    }

    /// What is kept beside the history, by name, as it is stored. Asked for between two entries.
    pub fn metas(&self) -> BTreeMap<Vec<u8>, Bytes> {
        let mut metas = BTreeMap::new();
        for lease in lock(&self.lessor).stored() {
            metas.insert(lease_name(lease.id), Bytes::copy_from_slice(&lease.encode()));
        }
        for member in self.alarms() {
            metas.insert(alarm_name(&member), member.encode_to_vec().into());
        }
        metas.extend(lock(&self.by_quota).iter().map(|&member| (quota_name(member), Bytes::new())));
        let membership = stored_membership_to_proto(&lock(&self.applied).membership);
        metas.insert(META_MEMBERSHIP.to_vec(), membership.encode_to_vec().into());
        metas.extend(self.store.compaction_mark());
        metas
    }

    /// Monotonic time since the server's start.
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Applies one command, and adds what it did to the tally.
    fn apply(&self, command: &internal::Command, tally: &mut Tally) -> Result<Outcome> {
        let applied = match &command.op {
            Some(command::Op::Put(request)) => self.write(tally, |writer, leases| txn::put(writer, request, leases)).map(Reply::Put),
            Some(command::Op::DeleteRange(request)) => {
                self.write(tally, |writer, _| txn::delete_range(writer, request)).map(Reply::DeleteRange)
            }
            Some(command::Op::Txn(request)) => self.write(tally, |writer, leases| txn::txn(writer, request, leases)).map(Reply::Txn),
            Some(command::Op::Compaction(request)) => self
                .store
                .compact(request.revision)
                .map(|()| Reply::Compaction(CompactionResponse { header: self.header() }))
                .map_err(Error::from),
            Some(command::Op::LeaseGrant(request)) => self.grant(request.id, request.ttl),
            Some(command::Op::LeaseRevoke(request)) => self.revoke(request.id, tally),
            Some(command::Op::LeaseCheckpoint(checkpoint)) => {
                if let Some(lease) = lock(&self.lessor).set_checkpoint(checkpoint.id, checkpoint.remaining_ttl) {
                    self.save_lease(&lease);
                }
                Ok(Reply::LeaseCheckpoint)
            }
            Some(command::Op::Alarm(request)) => self.alarm(request, command.id == BY_QUOTA),
            Some(command::Op::ClusterVersion(version)) => {
                self.store.history().put_meta(META_VERSION, Some(Bytes::copy_from_slice(version.version.as_bytes())));
                Ok(Reply::ClusterVersion)
            }
            None => return Err(Error::Failed("the log holds a command that this release does not know".into())),
        };
        match applied {
            Ok(reply) => Ok(Ok(reply)),
            Err(Error::Apply(refused)) => Ok(Err(refused)),
            Err(fault) => Err(fault),
        }
    }

    /// Runs a request that writes, and tells leases and watchers what it wrote.
    fn write<T>(&self, tally: &mut Tally, request: impl FnOnce(&mut Writer<'_>, &dyn Fn(i64) -> bool) -> Result<T>) -> Result<T> {
        let mut writer = self.store.begin();
        let response = request(&mut writer, &|id| lock(&self.lessor).contains(id));
        writer.tally.end_txn();
        tally.add(&writer.tally);
        // A refusal drops the writer before it has written anything.
        let response = response?;
        if let Some(committed) = writer.finish() {
            self.publish(&committed);
        }
        Ok(response)
    }

    fn publish(&self, committed: &Committed) {
        if !committed.leases.is_empty() {
            let mut lessor = lock(&self.lessor);
            for (key, left, joined) in &committed.leases {
                if *left != 0 {
                    lessor.detach(*left, key);
                }
                // A copy: the key is a part of the request, or of a whole entry, which it would keep in memory for as long as it is attached.
                if *joined != 0 && lessor.attach(*joined, Bytes::copy_from_slice(key)).is_err() {
                    tracing::error!(lease = *joined, "a key was attached to a lease that does not exist");
                }
            }
        }
        self.hub.publish(committed);
    }

    fn grant(&self, id: i64, ttl: i64) -> Result<Reply> {
        let (ttl, lease) = {
            let mut lessor = lock(&self.lessor);
            let ttl = lessor.grant(id, ttl, self.now())?;
            (ttl, lessor.lease(id))
        };
        if let Some(lease) = lease {
            self.save_lease(&lease);
        }
        self.counters.leases_granted.inc();
        Ok(Reply::LeaseGrant(LeaseGrantResponse { header: self.header(), id, ttl, error: String::new() }))
    }

    fn revoke(&self, id: i64, tally: &mut Tally) -> Result<Reply> {
        let keys = lock(&self.lessor).revoke(id)?;
        self.counters.leases_revoked.inc();
        self.store.history().put_meta(&lease_name(id), None);
        self.write(tally, |writer, _| {
            for key in &keys {
                writer.delete(key);
            }
            writer.tally.deletes += keys.len() as u64;
            Ok(())
        })?;
        Ok(Reply::LeaseRevoke(LeaseRevokeResponse { header: self.header() }))
    }

    fn save_lease(&self, lease: &Lease) {
        self.store.history().put_meta(&lease_name(lease.id), Some(Bytes::copy_from_slice(&lease.encode())));
    }

    fn alarm(&self, request: &AlarmRequest, by_quota: bool) -> Result<Reply> {
        let alarm = AlarmType::try_from(request.alarm).map_err(|_| ApplyError::InvalidAlarm)?;
        let action = AlarmAction::try_from(request.action).map_err(|_| ApplyError::InvalidAlarm)?;
        let member = AlarmMember { member_id: request.member_id, alarm: request.alarm };
        let entry = (request.alarm, request.member_id);
        let name = alarm_name(&member);
        let alarms = match action {
            AlarmAction::Get => self.list_alarms(alarm),
            // There is no alarm of no type; etcd takes the request and does nothing.
            AlarmAction::Activate | AlarmAction::Deactivate if alarm == AlarmType::None => Vec::new(),
            AlarmAction::Activate => {
                lock(&self.alarms).insert(entry);
                self.store.history().put_meta(&name, Some(member.encode_to_vec().into()));
                if by_quota {
                    lock(&self.by_quota).insert(request.member_id);
                    self.store.history().put_meta(&quota_name(request.member_id), Some(Bytes::new()));
                }
                vec![member]
            }
            AlarmAction::Deactivate => {
                if lock(&self.alarms).remove(&entry) {
                    self.store.history().put_meta(&name, None);
                    if alarm == AlarmType::Nospace && lock(&self.by_quota).remove(&request.member_id) {
                        self.store.history().put_meta(&quota_name(request.member_id), None);
                    }
                    vec![member]
                } else {
                    Vec::new()
                }
            }
        };
        Ok(Reply::Alarm(AlarmResponse { header: self.header(), alarms }))
    }

    /// Raised alarms of a type; of any, for none.
    pub fn list_alarms(&self, alarm: AlarmType) -> Vec<AlarmMember> {
        self.alarms().into_iter().filter(|member| alarm == AlarmType::None || member.alarm == alarm as i32).collect()
    }

    fn header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { revision: self.store.revision(), ..ResponseHeader::default() })
    }

    /// Checks that leases and keys point at each other. For tests and debugging.
    pub fn check(&self) -> Result<(), String> {
        self.store.check()?;
        let lessor = lock(&self.lessor);
        lessor.each_lease_queued_once()?;
        let attached = self.store.attached();
        lessor.keys_point_back(attached.iter().map(|(key, lease)| (key.as_ref(), *lease)))
    }
}

fn alarm_name(member: &AlarmMember) -> Vec<u8> {
    let mut name = META_ALARM.to_vec();
    name.extend_from_slice(&member.alarm.to_be_bytes());
    name.extend_from_slice(&member.member_id.to_be_bytes());
    name
}

fn quota_name(member: u64) -> Vec<u8> {
    let mut name = META_QUOTA.to_vec();
    name.extend_from_slice(&member.to_be_bytes());
    name
}

fn lease_name(id: i64) -> Vec<u8> {
    let mut name = META_LEASE.to_vec();
    name.extend_from_slice(&id.to_be_bytes());
    name
}

/// Whether a command answers with what it has read, or reads much to find its answer.
fn reads(command: &internal::Command) -> bool {
    match &command.op {
        Some(command::Op::Txn(_)) => true,
        Some(command::Op::DeleteRange(request)) => request.prev_kv,
        Some(command::Op::Put(request)) => request.prev_kv,
        _ => false,
    }
}

/// Bytes of the pairs in an answer.
fn pairs_bytes(reply: &Reply) -> usize {
    match reply {
        Reply::Put(response) => put_bytes(response),
        Reply::DeleteRange(response) => delete_bytes(response),
        Reply::Txn(response) => txn_bytes(response),
        _ => 0,
    }
}

fn put_bytes(response: &PutResponse) -> usize {
    response.prev_kv.as_ref().map_or(0, EncodedKv::encoded_len)
}

fn delete_bytes(response: &DeleteRangeResponse) -> usize {
    response.prev_kvs.iter().map(EncodedKv::encoded_len).sum()
}

fn txn_bytes(response: &TxnResponse) -> usize {
    let responses = response.responses.iter().filter_map(|op| op.response.as_ref());
    let bytes = responses.map(|one| match one {
        Response::ResponseRange(response) => response.kvs.iter().map(EncodedKv::encoded_len).sum(),
        Response::ResponsePut(response) => put_bytes(response),
        Response::ResponseDeleteRange(response) => delete_bytes(response),
        Response::ResponseTxn(nested) => txn_bytes(nested),
    });
    bytes.sum()
}

/// The machine as openraft drives it.
#[derive(Clone)]
pub(crate) struct StateMachine {
    pub machine: Arc<Machine>,
}

/// A snapshot of a member. The state that is on disk *is* the snapshot, so that making one costs nothing: it only tells
/// openraft up to where the log is no longer needed. A member that needs the contents is sent them by `snapshot.rs`.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotHandle;

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotHandle>;

impl StateMachine {
    fn durable_snapshot(&self) -> Option<Snapshot> {
        let Position { log_id, membership } = self.machine.durable();
        let log_id = log_id?;
        let meta = SnapshotMeta { last_log_id: Some(log_id), last_membership: membership };
        Some(Snapshot { meta, snapshot: SnapshotHandle })
    }
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> std::io::Result<Snapshot> {
        self.durable_snapshot().ok_or_else(|| std::io::Error::other("nothing has been applied and synced yet"))
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = StateMachine;

    async fn applied_state(&mut self) -> std::io::Result<(Option<LogId>, StoredMembership)> {
        let Position { log_id, membership } = self.machine.applied();
        Ok((log_id, membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> std::io::Result<()>
    where
        S: Stream<Item = std::io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let machine = &self.machine;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let began = machine.now();
            let mut outcomes = Vec::new();
            match &entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(proposal) => {
                    outcomes.reserve(if responder.is_some() { proposal.commands.len() } else { 0 });
                    let mut tally = Tally::default();
                    // Counted whether anybody waits for the answers or not: outcomes are the same at every member, and at every replay.
                    let mut answered = 0;
                    for command in proposal.commands.iter() {
                        let full = answered > ENTRY_ANSWER_BYTES_MAX || tally.work > ENTRY_WORK_MAX;
                        let outcome = if full && reads(command) {
                            Err(ApplyError::TooManyRequests)
                        } else {
                            machine.apply(command, &mut tally).map_err(to_io)?
                        };
                        answered += outcome.as_ref().map_or(0, pairs_bytes);
                        if responder.is_some() {
                            outcomes.push(outcome);
                        }
                    }
                    tally.count(&machine.counters);
                }
                EntryPayload::Membership(membership) => {
                    let stored = StoredMembership::new(Some(entry.log_id), membership.clone());
                    let bytes = stored_membership_to_proto(&stored).encode_to_vec();
                    machine.store.history().put_meta(META_MEMBERSHIP, Some(bytes.into()));
                    lock(&machine.applied).membership = stored;
                }
            }
            let applied = internal::Applied { log_id: Some(log_id_to_proto(entry.log_id)), revision: machine.store.revision() };
            machine.store.history().commit(applied.encode_to_vec().into());
            lock(&machine.applied).log_id = Some(entry.log_id);
            let now = machine.now();
            let took = now.saturating_sub(began);
            if machine.slow.is_slow(took) {
                machine.counters.slow_apply.inc();
                if let Some(unreported) = machine.slow.tell(now) {
                    let index = entry.log_id.index;
                    let commands = if let EntryPayload::Normal(proposal) = &entry.payload { proposal.commands.len() } else { 0 };
                    tracing::warn!(index, commands, ?took, unreported, "an entry took long to apply");
                }
            }
            if let Some(responder) = responder {
                responder.send(outcomes);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _: SnapshotHandle) -> std::io::Result<()> {
        // Members that are sent a snapshot come with clusters of more than one.
        Err(std::io::Error::other(format!("a snapshot up to {:?} cannot be installed", meta.last_log_id)))
    }

    async fn get_current_snapshot(&mut self) -> std::io::Result<Option<Snapshot>> {
        Ok(self.durable_snapshot())
    }
}
