//! The node: requests in, outcomes out. Everything that waits, times out or happens by itself is here.
//!
//! # A write
//! [`Node::propose`] queues a command and waits. One task takes all that is queued, makes it one Raft entry and hands it to
//! openraft, with at most [`IN_FLIGHT`] entries under way: while the disk syncs one batch, the next gathers. The applier
//! calls each waiter back with its own outcome.
//!
//! # A read
//! A linearizable read waits for [`Node::read_barrier`]. A write is acknowledged only after it was applied here, so the
//! only voter of a cluster reads what it has at once; others ask a quorum, one round for all that wait. Then it reads the
//! store without another task in between; a long one goes to a few threads kept for that.
//!
//! # By itself
//! Members publish themselves, added ones become voters, removed ones stop (see [`members`]); states are compared (see [`corruption`]); a
//! leader whose disk stands still [hands over](handover). Leases that have expired are revoked, the space quota raises its alarm and takes
//! it back, old revisions are compacted if so configured. The storage is the [background writer's](crate::background) business.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::ClientWriteResult;
use prost::Message;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::background::{self, Background};
use crate::config::AutoCompaction;
use crate::error::{ApplyError, Error, Result};
use crate::lease::Renewal;
use crate::lock::lock;
use crate::metrics::Counters;
use crate::mvcc::hash::KvHash;
use crate::mvcc::range::{HOLD_BYTES, RangeResult, RangeScan};
use crate::mvcc::watch::Session;
use crate::mvcc::{Pin, Store, range, txn};
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    LeaseCheckpoint, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, RangeRequest,
    ResponseHeader, TxnRequest, TxnResponse,
};
use crate::proto::internal::{self, command::Op};
use crate::raft::apply::{BY_QUOTA, Machine};
use crate::raft::network::{Link, Network};
use crate::raft::outgoing::SnapshotStart;
use crate::raft::{Callback, LogId, Outcome, Proposal, Raft, Reply, TypeConfig};
use crate::storage::dir::Identity;
use crate::storage::history::HistoryOptions;
use crate::storage::wal::{MAX_QUEUED_BYTES, Wal};
use crate::world;

mod corruption;
mod duties;
mod forward;
mod handover;
pub(crate) mod members;
mod offers;
mod peers;
mod propose;
mod roster;
mod snapshots;

/// Entries of the Raft log under way at the same time. More would make smaller batches, fewer would let the disk rest while
/// a batch is applied.
const IN_FLIGHT: usize = 2;

/// Requests that wait to be proposed. Beyond it they are refused with `too many requests`.
const QUEUE_MAX: usize = 20_000;

/// Bytes of requests that wait to be proposed. What is beyond waits for its turn, as long as any request may wait, and is then refused
/// as above. No less than the largest request.
const QUEUE_BYTES_MAX: usize = 32 << 20;

/// How long a request waits, while the storage is behind, before it looks again.
const BEHIND_RETRY: Duration = Duration::from_millis(5);

/// Commands, and their bytes, in one entry of the log. What is beyond waits for the next entry.
const BATCH_MAX: usize = 1024;
const BATCH_BYTES_MAX: usize = 2 << 20;

/// What a request may wait beside two election timeouts, as in etcd.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Leases revoked in one go. What else has expired waits for these to be gone.
const REVOKE_MAX: usize = 1000;

/// How long a renewal waits before it looks again whether an expired lease was revoked.
const EXPIRED_RETRY: Duration = Duration::from_millis(50);

/// How often quota and disk are looked at.
const WATCHDOG_INTERVAL: Duration = Duration::from_millis(500);

/// An alarm that the quota raised is taken back when no more than this part of the quota is in use, in percent.
const HEAL_PERCENT: u64 = 90;

/// Log left in the current segment below which nothing is proposed while the disk is full: room for Raft's own entries.
const LOG_RESERVE_BYTES: u64 = 256 << 10;

/// Bytes of log up to which it is kept whole for members that are being sent a snapshot. Beyond it, or when the disk is full, it is cut
/// off all the same, and they may need another snapshot.
const LOG_KEPT_BYTES: u64 = 4 << 30;

/// Log on disk beyond which less of it is kept for members that lag than `snapshot-catchup-entries` asks for: an entry is as large as the
/// batch of requests in it.
const LOG_LAG_BYTES: u64 = 512 << 20;

/// Bytes that wait for the log's disk beyond which nothing more is proposed here until some are written: half of what the log bears. It comes
/// to that where the disk of a leader stands still, and the others' do not.
const LOG_QUEUED_BYTES: u64 = MAX_QUEUED_BYTES / 2;

/// What etcd adds to a request before it measures it against `max-request-bytes`, about.
const ENVELOPE_BYTES: usize = 20;

/// What a put costs against the quota beside its key and value, as in etcd.
const PUT_OVERHEAD: u64 = 256;

/// What of the configuration concerns the node.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions {
    /// Bytes in use beyond which puts are refused; none is no quota.
    pub quota_bytes: Option<u64>,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub heartbeat: Duration,
    pub election_timeout: Duration,
    pub auto_compaction: Option<AutoCompaction>,
    /// Entries of the log that are kept, at most, below what the state holds on disk, for members that lag.
    pub catchup_entries: u64,
    /// How the history is opened when a snapshot takes the state's place.
    pub history: HistoryOptions,
    /// Where snapshots are put while they are received.
    pub member_dir: PathBuf,
    /// Peer URLs of the others that this member was told to found or to join a cluster with.
    pub told: Vec<String>,
    /// Refuse changes of the members that might cost the quorum.
    pub strict_reconfig: bool,
    /// Learners that the cluster may have.
    pub max_learners: usize,
    /// How often the leader compares the members' states; zero: never. And what they found at compactions.
    pub corrupt_check_time: Duration,
    pub compact_hash_check_time: Duration,
}

/// Whether the member can do its work.
#[derive(Clone, Debug)]
pub(crate) enum Health {
    Running,
    /// It has stopped because it was told to.
    Stopped,
    /// It has stopped because it could not keep its promises.
    Failed(Error),
}

struct Waiting {
    command: internal::Command,
    /// The command's own.
    bytes: usize,
    answer: oneshot::Sender<Outcome>,
    /// Its share of [`QUEUE_BYTES_MAX`], until it is proposed.
    #[allow(dead_code, reason = "kept for its drop")]
    room: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    bytes: usize,
}

/// A member of the cluster. See the module's head.
pub(crate) struct Node {
    pub identity: Identity,
    pub options: NodeOptions,
    pub machine: Arc<Machine>,
    raft: Raft,
    wal: Arc<Wal>,
    background: Arc<Background>,
    queue: Mutex<Queue>,
    /// What of [`QUEUE_BYTES_MAX`] is not taken.
    queue_room: Arc<Semaphore>,
    /// Bytes of commands handed to Raft and not answered yet.
    in_flight_bytes: Arc<AtomicUsize>,
    queued: Notify,
    health: watch::Sender<Health>,
    term: AtomicU64,
    leader: AtomicU64,
    /// When the leader was last heard of, on the machine's clock.
    leader_heard_ms: AtomicU64,
    /// Whether this member is its cluster's only voter, and leads it: then it reads without asking anyone.
    alone: AtomicBool,
    /// Whether this member is a learner, and is told to be one.
    learner: AtomicBool,
    /// Changes of the members, one at a time.
    changing: tokio::sync::Mutex<()>,
    /// Changes under way that give this member company: it reads by itself no more once one has begun.
    growing: AtomicUsize,
    /// The term in which this member has begun to hand over; see [`handover`].
    handing_over: AtomicU64,
    network: Network,
    /// Where the others are, for the next start.
    roster: Arc<roster::Roster>,
    /// The way to the leader, if it is another member.
    leader_link: Mutex<Option<Link>>,
    /// Commands for the leader, if it is another member.
    outbox: forward::Outbox,
    /// Renewals of leases for it.
    renewals: forward::Renewals,
    /// Reads that wait for a leader's confirmation. As many as there are requests: connections bound them.
    reads: Mutex<Vec<oneshot::Sender<u64>>>,
    read_wanted: Notify,
    /// The snapshot that is being received.
    receiving: tokio::sync::Mutex<Option<snapshots::Incoming>>,
    installing: AtomicBool,
    /// The snapshot that another member fetches.
    offer: tokio::sync::Mutex<Option<offers::Offer>>,
    /// One hash over the history at a time. Whoever else wants one waits, as long as its call lasts.
    hashing: tokio::sync::Mutex<()>,
    /// Rung when another leads than before, or nobody.
    leader_changed: Notify,
    /// Whether this member's state is known to be wrong: it serves no client.
    condemned: AtomicBool,
    /// The term for which the lessor is in charge; changed with the lessor locked.
    lease_term: AtomicU64,
    runtime: tokio::runtime::Handle,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A Range's answer: what was found, and the hold on the revision it was found at; none when nothing has to be fetched any more.
pub(crate) struct RangeAnswer {
    pub result: RangeResult,
    pub pin: Option<Pin>,
    pub keys_only: bool,
    pub header: ResponseHeader,
}

impl Node {
    /// Puts the parts together and starts what happens by itself. Call it on the server's runtime.
    #[allow(clippy::too_many_arguments)]
    pub fn start(
        identity: Identity,
        options: NodeOptions,
        machine: Arc<Machine>,
        raft: Raft,
        wal: Arc<Wal>,
        background: Arc<Background>,
        health: watch::Sender<Health>,
        network: Network,
    ) -> Arc<Node> {
        let roster = Arc::new(roster::Roster::new(options.member_dir.clone()));
        let node = Arc::new(Node {
            identity,
            options,
            machine,
            raft,
            wal,
            background,
            queue: Mutex::default(),
            queue_room: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            in_flight_bytes: Arc::default(),
            queued: Notify::new(),
            health,
            term: AtomicU64::new(0),
            leader: AtomicU64::new(0),
            leader_heard_ms: AtomicU64::new(0),
            alone: AtomicBool::new(false),
            learner: AtomicBool::new(false),
            changing: tokio::sync::Mutex::new(()),
            growing: AtomicUsize::new(0),
            handing_over: AtomicU64::new(0),
            network,
            roster,
            leader_link: Mutex::new(None),
            outbox: forward::Outbox::default(),
            renewals: forward::Renewals::default(),
            reads: Mutex::default(),
            read_wanted: Notify::new(),
            receiving: tokio::sync::Mutex::new(None),
            installing: AtomicBool::new(false),
            offer: tokio::sync::Mutex::new(None),
            hashing: tokio::sync::Mutex::new(()),
            leader_changed: Notify::new(),
            condemned: AtomicBool::new(false),
            lease_term: AtomicU64::new(0),
            runtime: tokio::runtime::Handle::current(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        node.spawn(node.clone().propose_batches());
        node.spawn(node.clone().forward_batches());
        node.spawn(node.clone().forward_renewals());
        node.spawn(node.clone().follow_raft());
        node.spawn(node.clone().confirm_reads());
        node.spawn(node.clone().revoke_expired());
        node.spawn(node.clone().watch_space());
        node.spawn(node.clone().promote_added());
        node.spawn(node.clone().watch_members());
        node.spawn(node.clone().watch_heartbeats());
        node.spawn(node.clone().watch_disk());
        node.spawn(node.clone().call_round());
        node.heed_corruption();
        if !node.options.corrupt_check_time.is_zero() {
            node.spawn(node.clone().compare_states());
        }
        if !node.options.compact_hash_check_time.is_zero() {
            node.spawn(node.clone().compare_compactions());
        }
        if let Some(auto) = node.options.auto_compaction {
            node.spawn(node.clone().compact_by_itself(auto));
        }
        node
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(world::owned(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = task => {}
            }
        }));
    }

    /// Ends everything the node does by itself, and refuses what comes.
    pub async fn stop(&self) {
        self.health.send_if_modified(|health| {
            let running = matches!(health, Health::Running);
            if running {
                *health = Health::Stopped;
            }
            running
        });
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let waiting = std::mem::take(&mut *lock(&self.queue)).waiting;
        drop(waiting);
        if let Err(err) = self.raft.shutdown().await {
            tracing::error!(error = %err, "stopping raft");
        }
    }

    /// The member stops by itself: it takes no further requests, and says why.
    pub fn fail(&self, err: Error) {
        fail(&self.health, err);
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// The server's own: where timers and tasks of clients in this process live. It ends with the server.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// The store as it is now. A snapshot may put another one in its place: whoever asks it more than one thing asks the same one.
    pub fn store(&self) -> Arc<Store> {
        self.machine.store()
    }

    /// Whether a snapshot is being made into a state.
    pub fn is_installing(&self) -> bool {
        self.installing.load(Ordering::Relaxed)
    }

    pub fn counters(&self) -> &Counters {
        &self.machine.counters
    }

    pub fn background(&self) -> &Background {
        &self.background
    }

    pub fn wal(&self) -> &Wal {
        &self.wal
    }

    pub fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// The leader's member id; 0 when there is none.
    pub fn leader(&self) -> u64 {
        self.leader.load(Ordering::Relaxed)
    }

    /// The newest entry that is known to be committed.
    pub fn committed(&self) -> u64 {
        self.raft.metrics().borrow_watched().local_committed.as_ref().map_or(0, |id| id.index)
    }

    pub fn is_leader(&self) -> bool {
        self.leader() == self.identity.member_id
    }

    /// Whether there are other members.
    pub fn has_peers(&self) -> bool {
        self.raft.metrics().borrow_watched().membership_config.membership().nodes().count() > 1
    }

    /// A header with this member's ids and the given revision.
    pub fn header(&self, revision: i64) -> ResponseHeader {
        ResponseHeader { cluster_id: self.identity.cluster_id, member_id: self.identity.member_id, revision, raft_term: self.term() }
    }

    /// A header with the newest revision.
    pub fn header_now(&self) -> ResponseHeader {
        self.header(self.store().revision())
    }

    fn complete(&self, header: Option<ResponseHeader>) -> Option<ResponseHeader> {
        Some(self.header(header.map_or(0, |header| header.revision)))
    }

    fn check_running(&self) -> Result<()> {
        match &*self.health.borrow() {
            Health::Running => Ok(()),
            Health::Stopped => Err(Error::Stopped),
            Health::Failed(_) => Err(ApplyError::Stopped.into()),
        }
    }

    fn request_timeout(&self) -> Duration {
        REQUEST_TIMEOUT + 2 * self.options.election_timeout
    }

    // ---- Time

    /// Waits for something, as long as the limit allows and the member runs.
    ///
    /// The timer belongs to the server's own runtime: whoever calls may be on any executor, or on none. After the member's stop it
    /// is not looked at any more, for that runtime may be gone by then.
    ///
    /// # Errors
    /// `Timeout` and `Stopped`.
    async fn within<T>(&self, limit: Duration, what: impl Future<Output = T>) -> Result<T> {
        let timer = {
            let _entered = self.runtime.enter();
            tokio::time::sleep(limit)
        };
        tokio::select! {
            biased;
            value = what => Ok(value),
            () = self.stop.cancelled() => Err(Error::Stopped),
            () = timer => Err(Error::Timeout),
        }
    }

    /// As [`within`](Self::within), for what has a deadline.
    async fn by<T>(&self, until: Instant, what: impl Future<Output = T>) -> Result<T> {
        self.within(until.saturating_duration_since(Instant::now()), what).await
    }

    /// When a request that comes now has to be answered.
    fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout()
    }

    /// Waits for that long, as long as the member runs.
    pub async fn pause(&self, pause: Duration) -> Result<()> {
        match self.within(pause, std::future::pending()).await {
            Err(Error::Timeout) => Ok(()),
            stopped => stopped,
        }
    }

    // ---- Writes

    /// Refuses what needs space, while there is none.
    async fn check_space(&self, cost: u64) -> Result<()> {
        self.check_corrupt()?;
        if self.machine.has_alarm(AlarmType::Nospace) || self.background.is_full() || self.wal.space_low() {
            return Err(ApplyError::NoSpace.into());
        }
        let Some(quota) = self.options.quota_bytes else { return Ok(()) };
        if self.store().history().live_bytes() + cost <= quota {
            return Ok(());
        }
        tracing::warn!(quota, "the space quota is used up: raising the NOSPACE alarm");
        self.propose_alarm(self.identity.member_id, AlarmAction::Activate).await?;
        Err(ApplyError::NoSpace.into())
    }

    async fn propose_alarm(&self, member_id: u64, action: AlarmAction) -> Result<()> {
        let request = AlarmRequest { action: action as i32, member_id, alarm: AlarmType::Nospace as i32 };
        self.propose_command(internal::Command { id: BY_QUOTA, op: Some(Op::Alarm(request)) }).await.map(|_| ())
    }

    /// Refuses what changes something while it is not known whose state is right, or this member's is known to be wrong.
    fn check_corrupt(&self) -> Result<()> {
        self.check_sound()?;
        if self.machine.is_all_corrupt() { Err(ApplyError::Corrupt.into()) } else { Ok(()) }
    }

    pub async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        txn::check_put(&request)?;
        self.check_space(put_cost(&request)).await?;
        let Reply::Put(mut response) = self.propose(Op::Put(request)).await? else { return Err(mismatch()) };
        response.header = self.complete(response.header);
        Ok(response)
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
            if txn::may_put(&request) {
                self.check_space(txn_cost(&request)).await?;
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
        self.check_space(0).await?;
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
    fn renew_at_once(&self, id: i64) -> Option<i64> {
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
        self.confirm_read().await
    }

    pub async fn range(&self, request: &RangeRequest) -> Result<RangeAnswer> {
        range::check(request)?;
        self.check_sound()?;
        if request.serializable {
            self.check_running()?;
        } else {
            self.read_barrier().await?;
        }
        self.range_from(request).await
    }

    /// A Range whose barrier and checks are behind it.
    async fn range_from(&self, request: &RangeRequest) -> Result<RangeAnswer> {
        self.counters().ranges.inc();
        let store = self.store();
        if let Some((result, revision)) = RangeResult::of_one(&store, request) {
            return Ok(RangeAnswer { result, pin: None, keys_only: false, header: self.header(revision) });
        }
        let pin = store.pin(request.revision)?;
        // Of a read of what is newest, the revision that it is of: who watches from the next one on shall miss nothing that was applied in between.
        let header = self.header(if request.revision > 0 { store.revision() } else { pin.at() });
        let keys_only = request.keys_only;
        match RangeScan::new(request, pin.at(), HOLD_BYTES).start(&store) {
            Ok(result) => Ok(RangeAnswer { result: result?, pin: Some(pin), keys_only, header }),
            Err(scan) => {
                let (result, pin) = self.blocking(move || (scan.run(&pin), pin)).await?;
                Ok(RangeAnswer { result: result?, pin: Some(pin), keys_only, header })
            }
        }
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

fn fail(health: &watch::Sender<Health>, err: Error) {
    health.send_if_modified(|health| {
        let running = matches!(health, Health::Running);
        if running {
            tracing::error!(error = %err, "the member has failed and stops");
            *health = Health::Failed(err);
        }
        running
    });
}

/// What the background writer tells the node; made before the node is, for the storage starts first.
pub(crate) struct StorageEvents {
    pub machine: Arc<Machine>,
    pub health: watch::Sender<Health>,
    /// The log index up to which the state is durable, as it moves.
    pub durable: watch::Sender<u64>,
    /// When a compaction was last carried out, as Unix time in seconds; 0: not since the start.
    pub compacted_at: Arc<AtomicU64>,
}

impl background::Events for StorageEvents {
    fn durable(&self, applied: bytes::Bytes) {
        if let Some(index) = self.machine.set_durable(applied) {
            self.durable.send_replace(index);
        }
    }

    fn compacted(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.compacted_at.store(now.as_secs(), Ordering::Relaxed);
    }

    fn failed(&self, err: Error) {
        fail(&self.health, err);
    }
}
