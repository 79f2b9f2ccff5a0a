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
//! # Another state
//! A member that lags too far is sent a snapshot. It is [made into a state](super::incoming) beside the one in use, and takes its place
//! [between two entries](Machine::replace): the store, the leases, the alarms, the membership and the position change together. Who
//! reads the old store in several steps keeps it until the end, and its files with it.
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
use tokio::sync::Notify;

use crate::error::{ApplyError, Error, Result};
use crate::lease::{Lease, Lessor};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::mvcc::txn::{self, Tally};
use crate::mvcc::watch::WatchHub;
use crate::mvcc::{Committed, Current, Saved, Store, Writer};
use crate::proto::EncodedKv;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionResponse, DeleteRangeResponse, LeaseCheckpoint, LeaseGrantResponse,
    LeaseRevokeResponse, PutResponse, ResponseHeader, TxnResponse,
};
use crate::proto::internal::{self, command};
use crate::slow::Slow;
use crate::world;

use super::members::{Members, Stored};
use super::outgoing::{Sendings, SnapshotStart};
use super::{
    LogId, Outcome, Reply, SnapshotMeta, StoredMembership, TypeConfig, log_id_from_proto, log_id_to_proto, stored_membership_from_proto,
    stored_membership_to_proto, to_io,
};

/// Names of what is stored beside the history. Frozen.
pub(super) const META_LEASE: &[u8] = b"lease/";
const META_ALARM: &[u8] = b"alarm/";
const META_QUOTA: &[u8] = b"alarm-by-quota/";
pub(super) const META_MEMBERSHIP: &[u8] = b"raft/membership";
pub(super) const META_VERSION: &[u8] = b"cluster/version";
/// The entry up to which the state came as a snapshot; of this member alone, and of no snapshot.
pub(super) const META_INSTALLED: &[u8] = b"raft/installed";

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
    pub current: Arc<Current>,
    pub hub: Arc<WatchHub>,
    pub lessor: Mutex<Lessor>,
    /// Told of each lease that is granted, whoever has asked for it: one may be due before all others.
    pub leases_changed: Notify,
    pub counters: Arc<Counters>,
    alarms: Mutex<BTreeSet<(i32, u64)>>,
    /// Members whose NOSPACE alarm was raised by the space quota, and is taken back by it.
    by_quota: Mutex<BTreeSet<u64>>,
    /// What members have published, and who was removed. Changed before `applied` is.
    pub members: Mutex<Members>,
    /// The version that all members speak, once they have agreed on one.
    cluster_version: Mutex<Option<Bytes>>,
    clock: Clock,
    slow: Slow,
    /// What has been applied, and what of it is on disk.
    applied: Mutex<Position>,
    durable: Mutex<Position>,
    /// See [`Machine::installed`].
    installed: Option<LogId>,
    /// Stores that nobody is given any more, until those who still read them have come to their end; and what goes with them.
    retired: Mutex<Vec<Retired>>,
    pub sendings: Arc<Sendings>,
}

/// A store that is not the member's any more.
pub(crate) struct Retired {
    store: Arc<Store>,
    /// The leases of its time.
    #[allow(dead_code, reason = "kept for its drop, which may take long")]
    leases: Option<Lessor>,
}

/// A whole state on disk that nobody uses yet: what a snapshot was made into.
pub(crate) struct Prepared {
    store: Arc<Store>,
    held: Held,
}

impl Prepared {
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What openraft is to know of it.
    pub fn meta(&self) -> SnapshotMeta {
        let Position { log_id, membership } = self.held.position.clone();
        SnapshotMeta { last_log_id: log_id, last_membership: membership }
    }
}

/// What is kept beside the history, in memory.
struct Held {
    lessor: Lessor,
    alarms: BTreeSet<(i32, u64)>,
    by_quota: BTreeSet<u64>,
    members: Members,
    cluster_version: Option<Bytes>,
    position: Position,
    installed: Option<LogId>,
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
        lessor: Lessor,
        clock: Clock,
        slow: Duration,
        counters: Arc<Counters>,
    ) -> Result<Machine> {
        let Held { lessor, alarms, by_quota, members, cluster_version, position, installed } = Held::read(&store, saved, attached, lessor)?;
        let hub = Arc::new(WatchHub::new(store.revision(), counters.clone()));
        let sendings = Arc::new(Sendings::new(clock.clone()));
        Ok(Machine {
            current: Arc::new(Current::new(store)),
            hub,
            lessor: Mutex::new(lessor),
            leases_changed: Notify::new(),
            counters,
            alarms: Mutex::new(alarms),
            by_quota: Mutex::new(by_quota),
            members: Mutex::new(members),
            cluster_version: Mutex::new(cluster_version),
            clock,
            slow: Slow::new(slow),
            applied: Mutex::new(position.clone()),
            durable: Mutex::new(position),
            installed,
            retired: Mutex::default(),
            sendings,
        })
    }

    /// The store as it is now. Whoever asks it more than one thing asks the same one.
    pub fn store(&self) -> Arc<Store> {
        self.current.get()
    }

    /// The entry up to which the state had come as a snapshot when the member started. The log up to it was to be purged.
    pub fn installed(&self) -> Option<LogId> {
        self.installed
    }

    /// Reads what a store holds, to [take it over](Self::replace) later. It may take long.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn prepare(&self, store: Arc<Store>, saved: Saved, attached: Vec<(i64, Bytes)>) -> Result<Prepared> {
        let lessor = lock(&self.lessor).fresh();
        let held = Held::read(&store, saved, attached, lessor)?;
        Ok(Prepared { store, held })
    }

    /// Goes over to another state, of a later point of the same log. To be called between two entries.
    pub(super) fn replace(&self, prepared: Prepared) {
        let Prepared { store, held } = prepared;
        let Held { lessor, alarms, by_quota, members, cluster_version, position, .. } = held;
        let leases = std::mem::replace(&mut *lock(&self.lessor), lessor);
        *lock(&self.alarms) = alarms;
        *lock(&self.by_quota) = by_quota;
        *lock(&self.members) = members;
        *lock(&self.cluster_version) = cluster_version;
        let old = self.current.replace(store.clone());
        self.hub.replace(&store);
        *lock(&self.durable) = position.clone();
        // Last, for who waits for this point of the log reads then.
        *lock(&self.applied) = position;
        lock(&self.retired).push(Retired { store: old, leases: Some(leases) });
    }

    /// Takes a store that will not be used, to be dropped where that may take long.
    pub fn retire(&self, store: Arc<Store>) {
        lock(&self.retired).push(Retired { store, leases: None });
    }

    /// The retired stores that nobody reads any more. To be dropped where that may take long: their files go.
    pub fn take_unused(&self) -> Vec<Retired> {
        lock(&self.retired).extract_if(.., |retired| Arc::strong_count(&retired.store) == 1).collect()
    }

    /// Gives up the files of all stores, whoever still reads them.
    pub fn close(&self) {
        for retired in std::mem::take(&mut *lock(&self.retired)) {
            retired.store.history().backend().close();
        }
        self.store().history().backend().close();
    }

    /// Where a snapshot begins that is made now. To be called between two entries. One for a member has all of the history since the
    /// last compaction; one for people has all that can be read at its own revision.
    ///
    /// # Errors
    /// None but faults.
    pub fn begin_snapshot(&self, for_member: bool) -> Result<SnapshotStart> {
        let store = self.store();
        let compacted = store.revisions().1;
        let floor = if for_member { Some(store.pin(compacted.max(1))?) } else { None };
        let (position, metas, sendings) = (self.applied(), self.metas(), self.sendings.clone());
        Ok(SnapshotStart { pin: store.pin(0)?, floor, compacted, position, metas, sendings })
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
        if durable.log_id > Some(log_id) {
            // Of the store that a snapshot has just replaced.
            return None;
        }
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

    /// The members whose alarm the space quota has raised, and not a client.
    pub fn raised_by_quota(&self) -> Vec<u64> {
        lock(&self.by_quota).iter().copied().collect()
    }

    /// Whether any member has raised an alarm of this type.
    pub fn has_alarm(&self, alarm: AlarmType) -> bool {
        lock(&self.alarms).iter().any(|&(raised, _)| raised == alarm as i32)
    }

    /// Whether a member's state is known to be another than the majority's: it serves nobody, and its state goes to nobody.
    pub fn is_corrupt(&self, member: u64) -> bool {
        lock(&self.alarms).contains(&(AlarmType::Corrupt as i32, member))
    }

    /// Whether some member's state is wrong, and it is not known whose, or it is the only one: nobody may change anything then, as in
    /// etcd. Where it is known, the others go on.
    pub fn is_all_corrupt(&self) -> bool {
        let named: Vec<u64> = self.list_alarms(AlarmType::Corrupt).iter().map(|alarm| alarm.member_id).collect();
        if named.is_empty() {
            return false;
        }
        let applied = lock(&self.applied);
        let membership = applied.membership.membership();
        // Those that are not named have to be a majority, or they are not known to be right. Who is named and was removed is no
        // member any more, and 0 stands for nobody in particular.
        let sound = membership.voter_ids().filter(|id| !named.contains(id)).count();
        named.contains(&0) || sound * 2 <= membership.voter_ids().count()
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
        metas.extend(lock(&self.members).metas());
        metas.extend(lock(&self.cluster_version).clone().map(|version| (META_VERSION.to_vec(), version)));
        metas.extend(self.store().compaction_mark());
        metas
    }

    /// Monotonic time since the server's start.
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Applies one command of an entry of a term, and adds what it did to the tally.
    fn apply(&self, command: &internal::Command, term: u64, tally: &mut Tally) -> Result<Outcome> {
        let applied = match &command.op {
            Some(command::Op::Put(request)) => self.write(tally, |writer, leases| txn::put(writer, request, leases)).map(Reply::Put),
            Some(command::Op::DeleteRange(request)) => {
                self.write(tally, |writer, _| txn::delete_range(writer, request)).map(Reply::DeleteRange)
            }
            Some(command::Op::Txn(request)) => self.write(tally, |writer, leases| txn::txn(writer, request, leases)).map(Reply::Txn),
            Some(command::Op::Compaction(request)) => self
                .store()
                .compact(request.revision)
                .map(|()| Reply::Compaction(CompactionResponse { header: self.header() }))
                .map_err(Error::from),
            Some(command::Op::LeaseGrant(request)) => self.grant(request.id, request.ttl),
            Some(command::Op::LeaseRevoke(request)) => self.revoke(request.id, tally),
            Some(command::Op::LeaseExpiry(expiry)) if expiry.term == term => self.revoke(expiry.id, tally),
            Some(command::Op::LeaseExpiry(_)) => Err(ApplyError::NotLeader.into()),
            Some(command::Op::LeaseCheckpoint(checkpoint)) => self.checkpoint(&[*checkpoint]),
            Some(command::Op::LeaseCheckpoints(seen)) if seen.term == term => self.checkpoint(&seen.checkpoints),
            Some(command::Op::LeaseCheckpoints(_)) => Err(ApplyError::NotLeader.into()),
            Some(command::Op::Alarm(request)) => self.alarm(request, command.id == BY_QUOTA),
            Some(command::Op::ClusterVersion(version)) => {
                let version = Bytes::copy_from_slice(version.version.as_bytes());
                self.store().history().put_meta(META_VERSION, Some(version.clone()));
                *lock(&self.cluster_version) = Some(version);
                Ok(Reply::ClusterVersion)
            }
            Some(command::Op::MemberAttributes(attributes)) => {
                let membership = lock(&self.applied).membership.clone();
                let stored = lock(&self.members).publish(attributes, membership.membership());
                self.store_members(stored);
                Ok(Reply::MemberAttributes)
            }
            None => return Err(Error::Failed("the log holds a command that this release does not know".into())),
        };
        match applied {
            Ok(reply) => Ok(Ok(reply)),
            Err(Error::Apply(refused)) => Ok(Err(refused)),
            Err(fault) => Err(fault),
        }
    }

    /// Notes what leases have left. Those that are gone are left out.
    fn checkpoint(&self, checkpoints: &[LeaseCheckpoint]) -> Result<Reply> {
        for checkpoint in checkpoints {
            let noted = lock(&self.lessor).set_checkpoint(checkpoint.id, checkpoint.remaining_ttl);
            if let Some(lease) = noted {
                self.save_lease(&lease);
            }
        }
        Ok(Reply::LeaseCheckpoint)
    }

    /// Runs a request that writes, and tells leases and watchers what it wrote.
    fn write<T>(&self, tally: &mut Tally, request: impl FnOnce(&mut Writer<'_>, &dyn Fn(i64) -> bool) -> Result<T>) -> Result<T> {
        let store = self.store();
        let mut writer = store.begin();
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
        self.leases_changed.notify_one();
        Ok(Reply::LeaseGrant(LeaseGrantResponse { header: self.header(), id, ttl, error: String::new() }))
    }

    fn revoke(&self, id: i64, tally: &mut Tally) -> Result<Reply> {
        let keys = lock(&self.lessor).revoke(id)?;
        self.counters.leases_revoked.inc();
        self.store().history().put_meta(&lease_name(id), None);
        self.write(tally, |writer, _| {
            for key in &keys {
                writer.delete(key);
            }
            writer.tally.deletes += keys.len() as u64;
            Ok(())
        })?;
        Ok(Reply::LeaseRevoke(LeaseRevokeResponse { header: self.header() }))
    }

    fn store_members(&self, stored: impl IntoIterator<Item = Stored>) {
        for (name, value) in stored {
            self.store().history().put_meta(&name, value);
        }
    }

    fn save_lease(&self, lease: &Lease) {
        self.store().history().put_meta(&lease_name(lease.id), Some(Bytes::copy_from_slice(&lease.encode())));
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
                let is_new = lock(&self.alarms).insert(entry);
                self.store().history().put_meta(&name, Some(member.encode_to_vec().into()));
                if by_quota && is_new {
                    lock(&self.by_quota).insert(request.member_id);
                    self.store().history().put_meta(&quota_name(request.member_id), Some(Bytes::new()));
                } else if !by_quota && alarm == AlarmType::Nospace && lock(&self.by_quota).remove(&request.member_id) {
                    // Whoever wants it raised takes it back, too.
                    self.store().history().put_meta(&quota_name(request.member_id), None);
                }
                vec![member]
            }
            // A client has taken it back meanwhile, and perhaps raised it for itself.
            AlarmAction::Deactivate if by_quota && !lock(&self.by_quota).contains(&request.member_id) => Vec::new(),
            AlarmAction::Deactivate => {
                if lock(&self.alarms).remove(&entry) {
                    self.store().history().put_meta(&name, None);
                    if alarm == AlarmType::Nospace && lock(&self.by_quota).remove(&request.member_id) {
                        self.store().history().put_meta(&quota_name(request.member_id), None);
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
        Some(ResponseHeader { revision: self.store().revision(), ..ResponseHeader::default() })
    }

    /// Checks that leases and keys point at each other. For tests and debugging.
    pub fn check(&self) -> Result<(), String> {
        self.store().check()?;
        let lessor = lock(&self.lessor);
        lessor.each_lease_queued_once()?;
        let attached = self.store().attached();
        lessor.keys_point_back(attached.iter().map(|(key, lease)| (key.as_ref(), *lease)))
    }
}

impl Held {
    /// Reads back what is stored beside the history.
    fn read(store: &Store, saved: Saved, attached: Vec<(i64, Bytes)>, mut lessor: Lessor) -> Result<Held> {
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
        let mut members = Members::default();
        let mut cluster_version = None;
        let mut installed = None;
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
            } else if name == META_VERSION {
                cluster_version = Some(value);
            } else if name == META_INSTALLED {
                let id = internal::LogId::decode(value).map_err(|err| damaged(format!("the installed position: {err}")))?;
                installed = Some(log_id_from_proto(id));
            } else {
                members.load(&name, &value).map_err(|what| damaged(format!("{}: {what}", String::from_utf8_lossy(&name))))?;
            }
        }
        lessor.restore(leases);
        for (lease, key) in attached {
            // A key whose lease is gone is told apart by the check of invariants, not refused: its value is intact.
            if lessor.attach(lease, key).is_err() {
                tracing::warn!(lease, "a key is attached to a lease that does not exist");
            }
        }
        Ok(Held { lessor, alarms, by_quota, members, cluster_version, position, installed })
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

/// A snapshot of a member, as openraft hands it about.
pub(crate) enum SnapshotHandle {
    /// The state that is on disk: it only tells openraft up to where the log is no longer needed. Making it costs nothing.
    Durable,
    /// Where one begins that is to be sent.
    Outgoing(Box<SnapshotStart>),
    /// One that was received, and is to take the state's place.
    Incoming(Box<Prepared>),
}

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotHandle>;

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> std::io::Result<Snapshot> {
        let Position { log_id, membership } = self.machine.durable();
        let log_id = log_id.ok_or_else(|| std::io::Error::other("nothing has been applied and synced yet"))?;
        let meta = SnapshotMeta { last_log_id: Some(log_id), last_membership: membership };
        Ok(Snapshot { meta, snapshot: SnapshotHandle::Durable })
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
                            machine.apply(command, *entry.log_id.leader_id, &mut tally).map_err(to_io)?
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
                    machine.store().history().put_meta(META_MEMBERSHIP, Some(bytes.into()));
                    let before = lock(&machine.applied).membership.clone();
                    let changed = lock(&machine.members).follow(before.membership(), membership);
                    machine.store_members(changed);
                    lock(&machine.applied).membership = stored;
                }
            }
            let applied = internal::Applied { log_id: Some(log_id_to_proto(entry.log_id)), revision: machine.store().revision() };
            machine.store().history().commit(applied.encode_to_vec().into());
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

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, handle: SnapshotHandle) -> std::io::Result<()> {
        let SnapshotHandle::Incoming(prepared) = handle else {
            return Err(std::io::Error::other(format!("a snapshot up to {:?} has nothing in it", meta.last_log_id)));
        };
        let backend = prepared.store.history().backend().clone();
        world::blocking(&tokio::runtime::Handle::current(), move || backend.take_over()).await?.map_err(to_io)?;
        let (revision, index) = (prepared.store.revision(), meta.last_log_id.map_or(0, |id| id.index));
        self.machine.replace(*prepared);
        self.machine.counters.snapshots_received.inc();
        tracing::info!(revision, index, "a snapshot from the leader has taken the state's place");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> std::io::Result<Option<Snapshot>> {
        let Position { log_id: Some(log_id), membership } = self.machine.applied() else { return Ok(None) };
        let start = self.machine.begin_snapshot(true).map_err(to_io)?;
        let meta = SnapshotMeta { last_log_id: Some(log_id), last_membership: membership };
        Ok(Some(Snapshot { meta, snapshot: SnapshotHandle::Outgoing(Box::new(start)) }))
    }
}
