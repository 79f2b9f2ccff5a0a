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
use crate::lock::lock;
use crate::metrics::Counters;
use crate::mvcc::hash::KvHash;
use crate::mvcc::{Store, range, txn};
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmType, CompactionRequest, LeaseCheckpoint, PutRequest, RangeRequest, ResponseHeader, TxnRequest,
};
use crate::proto::internal::{self, command::Op};
use crate::raft::apply::Machine;
use crate::raft::network::{Link, Network};
use crate::raft::{Callback, LogId, Outcome, Proposal, Raft, Reply, TypeConfig};
use crate::storage::dir::Identity;
use crate::storage::history::HistoryOptions;
use crate::storage::wal::{MAX_QUEUED_BYTES, Wal};
use crate::world;

pub(crate) use requests::RangeAnswer;

mod corruption;
mod duties;
mod forward;
mod handover;
pub(crate) mod members;
mod offers;
mod peers;
mod propose;
mod requests;
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
        let timer = || {
            let _entered = self.runtime.enter();
            tokio::time::sleep(limit)
        };
        // In a box: futures that hold it stay small enough for the allocator's quick lists, and what is moved takes its room twice.
        let given_up = Box::pin(async {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => Error::Stopped,
                () = timer() => Error::Timeout,
            }
        });
        tokio::select! {
            biased;
            value = what => Ok(value),
            err = given_up => Err(err),
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
