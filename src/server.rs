//! The server: one member, whole, from its directory to its listeners, on threads of its own.
//!
//! [`Server::start`] puts the parts together from below and returns when the member can serve; [`Server::shutdown`] takes
//! them apart from above. Everything in between belongs to the server: its threads have its name, its metrics their own
//! registry, and what it was given by the host is nothing but the configuration. Any number of servers live in one process.
//!
//! # Threads
//! | thread | does |
//! |---|---|
//! | `quorate-<name>` | a current-thread runtime: connections, Raft, apply, timers |
//! | `quorate-log` and a helper | make the Raft log durable |
//! | `quorate-store-<name>` | writes the state out, compacts, tidies up |
//! | up to [`BLOCKING_THREADS`] | long reads and backups, kept only while there are any |
//!
//! # Order
//! Start: directory and lock, log, state (from the others, if it is damaged: see [`rebuild`]), Raft, peers' listeners, a look whether the
//! state is the others', clients' listeners. Stop: listeners and connections, node and Raft, state, log,
//! lock. What was acknowledged is on disk at every point of both.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::http::{Checks, Http, Versions};
use crate::api::maintenance::{SNAPSHOTS_MAX, STORAGE_VERSION};
use crate::api::peer::Say;
use crate::api::router::router;
use crate::api::serve::{App, Listener, Serving};
use crate::api::wire::{Limits, ServeOptions};
use crate::api::{self, Api};
use crate::background::Background;
use crate::client::Client;
use crate::config::{ClusterState, Config, ETCD_VERSION, Url};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::{Gauges, Histogram, Metrics, SYNC_BUCKETS};
use crate::node::{Health, Node, NodeOptions, StorageEvents};
use crate::proto::etcdserverpb::RangeRequest;
use crate::proto::internal;
use crate::raft::Raft;
use crate::raft::apply::{Clock, Machine, StateMachine};
use crate::raft::log::LogStore;
use crate::raft::network::Network;
use crate::storage::dir::{DataDir, Identity};
use crate::storage::history::{Gate, HistoryOptions};
use crate::storage::wal::{Wal, WalOptions};
use crate::tls::{Acceptor, Connector, Tls};
use crate::world;

pub(crate) use founding::{Enlistment, cluster_id, found, founders, member_id};
use founding::{check_not_founded, join_cluster, join_enlisted};
pub(crate) use opening::Damage;
use opening::Opener;
#[cfg(feature = "simulation")]
pub(crate) use opening::{fit, machine_on};

mod founding;
mod opening;
mod rebuild;

/// Threads for long reads and steps of backups. Beyond it they wait for each other; none of them waits for a client.
const BLOCKING_THREADS: usize = 4;

/// How long connections may take to finish what they are at when the server stops; then they are cut.
const DRAIN: Duration = Duration::from_secs(2);

/// A running member. Dropping it stops it without waiting; [`shutdown`](Self::shutdown) waits.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// let dir = tempfile::tempdir()?;
/// let mut config = quorate::Config::default();
/// config.data_dir = Some(dir.path().into());
/// config.listen_client_urls.clear(); // in this process only: no socket at all
/// config.listen_peer_urls.clear();
/// let server = quorate::Server::start(config).await?;
/// server.client().put("greeting", "hello").await?;
/// server.shutdown().await?;
/// # Ok(())
/// # })
/// # }
/// ```
pub struct Server {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    done: Mutex<Option<oneshot::Receiver<Result<()>>>>,
}

struct Shared {
    node: Arc<Node>,
    api: Api,
    client_addrs: Vec<SocketAddr>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    /// Until when the stop may wait for others; and what was cut off for that.
    until: Mutex<Option<Instant>>,
    cut: Mutex<Vec<&'static str>>,
}

impl Server {
    /// Starts a member and returns when it serves clients.
    ///
    /// The configuration is [validated](Config::validate) first. A new data directory makes a new cluster of one member.
    ///
    /// # Errors
    /// `Config`; `Locked`, `Format` or `Corrupt` for the data directory; `Io` for the disk and the listeners. After an error
    /// nothing is left running or open.
    pub async fn start(config: Config) -> Result<Server> {
        Server::start_with(config, None, CancellationToken::new()).await
    }

    /// As [`start`](Self::start), with something that answers founding messages on the peer port. When `late` is cancelled no other member
    /// is waited for any more, and the start fails with `Stopped` or `Unavailable`; what it has to do by itself is done to its end.
    pub(crate) async fn start_with(config: Config, say: Option<Say>, late: CancellationToken) -> Result<Server> {
        Server::start_as(config, say, late, None).await
    }

    /// As [`start_with`](Self::start_with), for one that is enlisted: with an empty directory it takes its place among the members.
    pub(crate) async fn start_as(
        config: Config,
        say: Option<Say>,
        late: CancellationToken,
        enlistment: Option<Enlistment>,
    ) -> Result<Server> {
        config.validate()?;
        let (started, wait) = oneshot::channel();
        let (finished, done) = oneshot::channel();
        let name = config.name.clone();
        let thread = std::thread::Builder::new().name(format!("quorate-{name}")).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS)
                .thread_name(format!("quorate-read-{name}"))
                .build();
            let mut started = Some(started);
            let ended = match runtime {
                // It is gone before the last word is said: who hears that waits for nothing but the end of a thread.
                Ok(runtime) => runtime.block_on(run(config, say, &late, enlistment, &mut started)),
                Err(err) => Err(Error::io("making the runtime of", &name, err)),
            };
            // Who started, or was to stop it, may have given up waiting.
            match (started, ended) {
                (Some(started), Err(err)) => drop(started.send(Err(err))),
                (_, ended) => drop(finished.send(ended)),
            }
        });
        let thread = thread.map_err(|err| Error::io("starting the thread of", "the server", err))?;
        let shared = match wait.await {
            Ok(Ok(shared)) => shared,
            Ok(Err(err)) => {
                join(thread);
                return Err(err);
            }
            Err(_) => {
                join(thread);
                return Err(Error::Failed("the server's thread ended before it had started".into()));
            }
        };
        Ok(Server { shared, thread: Mutex::new(Some(thread)), done: Mutex::new(Some(done)) })
    }

    /// A client of this member that calls it directly: no socket, no encoding.
    pub fn client(&self) -> Client {
        Client::local(self.shared.node.clone(), self.shared.api.clone())
    }

    /// Where clients can connect: the addresses bound, with the ports that the system has picked where 0 was asked for.
    pub fn client_addrs(&self) -> &[SocketAddr] {
        &self.shared.client_addrs
    }

    /// This member's metrics, to be read, or taken into the host's own registry. They outlive the server; what they ask the
    /// server for is then as that of a member that has just begun.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// This member's id.
    pub fn member_id(&self) -> u64 {
        self.shared.node.identity.member_id
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        self.shared.node.identity.cluster_id
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.shared.node
    }

    /// The newest entry of the log that this member has applied.
    pub(crate) fn applied(&self) -> u64 {
        self.shared.node.machine.applied().log_id.map_or(0, |id| id.index)
    }

    /// Returns when the member has stopped by itself, or was told to.
    ///
    /// # Errors
    /// Why it stopped by itself. Call [`shutdown`](Self::shutdown) then, too: it releases what is left.
    pub async fn stopped(&self) -> Result<()> {
        let mut health = self.shared.node.health();
        let stopped = health.wait_for(|health| !matches!(health, Health::Running)).await.map(|health| health.clone());
        match stopped {
            Ok(Health::Failed(err)) => Err(err),
            _ => Ok(()),
        }
    }

    /// Stops the member: ends the connections, writes everything out, and gives up ports, files, locks and threads.
    ///
    /// # Errors
    /// What went wrong on the way, or had made the member stop before; everything is given up all the same.
    pub async fn shutdown(self) -> Result<()> {
        self.shutdown_by(None).await.0
    }

    /// The same, in a hurry from a moment on: connections are cut then, and the state is not written out any more, for the log has it. What
    /// the disk is at is waited for: nothing can be left to a thread that nobody waits for. Returns what was cut off, too.
    pub(crate) async fn shutdown_by(self, until: Option<Instant>) -> (Result<()>, Vec<&'static str>) {
        *lock(&self.shared.until) = until;
        self.shared.stop.cancel();
        let done = lock(&self.done).take();
        let result = match done {
            Some(done) => done.await.unwrap_or_else(|_| Err(Error::Failed("the server's thread ended early".into()))),
            None => Ok(()),
        };
        // Its last word was said; what is left is the end of a thread.
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            join(thread);
        }
        let cut = std::mem::take(&mut *lock(&self.shared.cut));
        (result, cut)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("identity", &self.shared.node.identity)
            .field("client_addrs", &self.shared.client_addrs)
            .finish_non_exhaustive()
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread of the server has panicked");
    }
}

/// The life of a member, on its own runtime. `started` is told, and taken, when it serves; an error before that is returned.
async fn run(
    config: Config,
    say: Option<Say>,
    late: &CancellationToken,
    enlistment: Option<Enlistment>,
    started: &mut Option<oneshot::Sender<Result<Arc<Shared>>>>,
) -> Result<()> {
    let given_up = || late.is_cancelled() || started.as_ref().is_none_or(oneshot::Sender::is_closed);
    let member = Member::open(&config, enlistment.as_ref(), &given_up).await?;
    let stop = CancellationToken::new();
    let listening = match member.listen(&config, say.as_ref(), &stop).await {
        Ok(listening) => listening,
        Err(err) => {
            let _ = member.close().await;
            return Err(err);
        }
    };
    let shared = Arc::new(Shared {
        node: member.node.clone(),
        api: listening.api.clone(),
        client_addrs: listening.addrs.clone(),
        metrics: member.metrics.clone(),
        stop: stop.clone(),
        until: Mutex::default(),
        cut: Mutex::default(),
    });
    let ours = shared.clone();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name = %member.node.identity.name,
        member = %format_args!("{:x}", member.node.identity.member_id),
        cluster = %format_args!("{:x}", member.node.identity.cluster_id),
        data_dir = %config.effective_data_dir().display(),
        clients = ?listening.addrs,
        peers = ?listening.peer_addrs,
        "ready to serve client requests"
    );
    if started.take().is_none_or(|started| started.send(Ok(shared)).is_err()) {
        // Nobody waits for the server any more, so nobody will ever stop it.
        stop.cancel();
    }
    let mut health = member.node.health();
    tokio::select! {
        () = stop.cancelled() => {}
        // A member that has failed gives its ports up at once, so that clients go elsewhere.
        _ = health.wait_for(|health| !matches!(health, Health::Running)) => stop.cancel(),
    }
    let failed = match &*health.borrow() {
        Health::Failed(err) => Err(err.clone()),
        _ => Ok(()),
    };
    let until = *lock(&ours.until);
    let left = |most: Duration| until.map_or(most, |until| until.saturating_duration_since(Instant::now()).min(most));
    if listening.drain(left(DRAIN)).await && until.is_some() {
        lock(&ours.cut).push("connections");
    }
    if left(Duration::MAX).is_zero() {
        member.background.hurry();
        lock(&ours.cut).push("writing the state out, which the log has");
    }
    if matches!(failed, Err(Error::Removed))
        && let Some(dir) = &member.dir
        && let Err(err) = dir.set_removed()
    {
        tracing::warn!(error = %err, "noting that the member was removed");
    }
    let closed = member.close().await;
    failed.and(closed)
}

/// What a member is put together of.
pub(crate) struct Place {
    pub identity: Identity,
    pub wal: Arc<Wal>,
    /// The state, as far as the log was seen to belong to it.
    pub machine: Arc<Machine>,
    pub metrics: Arc<Metrics>,
    pub history: HistoryOptions,
    pub clock: Clock,
    /// Where snapshots are put while they are received.
    pub member_dir: PathBuf,
    /// The directory of all this; none in a simulation.
    pub dir: Option<DataDir>,
    pub tls: Tls,
}

/// The parts of a member below the wire.
pub(crate) struct Member {
    pub node: Arc<Node>,
    background: Arc<Background>,
    wal: Arc<Wal>,
    pub metrics: Arc<Metrics>,
    compacted_at: Arc<AtomicU64>,
    tls: Tls,
    // Held until everything else is closed.
    dir: Option<DataDir>,
}

impl Member {
    /// Opens everything below the wire. It may have to wait for other members; when `given_up` says so, it ends.
    async fn open(config: &Config, enlistment: Option<&Enlistment>, given_up: &(dyn Fn() -> bool + Sync)) -> Result<Member> {
        // First, for nothing has been touched yet.
        let tls = Tls::open(config)?;
        let path = config.effective_data_dir();
        let mut dir = DataDir::open(&path, config.wal_dir.as_deref())?;
        let fresh = dir.identity().is_none();
        if fresh {
            dir.set_identity(match enlistment {
                Some(enlistment) => join_enlisted(config, enlistment, &tls.connector, given_up).await?,
                None => Self::identify(config, &tls.connector, given_up).await?,
            })?;
        }
        let mut identity = dir.identity().cloned().ok_or_else(|| Error::Failed("the data directory has no identity".into()))?;
        if identity.incarnation == 0 {
            // A new directory, or one of a release that knew of no incarnations.
            identity.incarnation = rand::random::<u64>().max(1);
            dir.set_identity(identity.clone())?;
        }
        if identity.name != config.name {
            tracing::warn!(name = %identity.name, asked = %config.name, "the member keeps the name that its data directory was made with");
        }

        let started = std::time::Instant::now();
        let clock: Clock = Arc::new(move || started.elapsed());
        if config.unsafe_no_fsync {
            tracing::warn!("unsafe-no-fsync: nothing waits for the disk, and a crash of the machine loses acknowledged writes");
        }
        let wal_options = WalOptions { clock: Some(clock.clone()), fsync: !config.unsafe_no_fsync, ..WalOptions::default() };
        let others = rebuild::others(&dir, config, &identity)?;
        // Nothing is changed in the log before the state was seen to belong to it.
        let (wal, recovered) = Wal::read(dir.wal(), wal_options).map_err(|err| rebuild::log_is_lost(err, &others, &identity))?;
        let wal = Arc::new(wal);
        rebuild::check_log(&dir, &recovered.state).map_err(|err| rebuild::log_is_lost(err, &others, &identity))?;
        let history = HistoryOptions { cache_bytes: config.value_cache(), gate: Some(gate_of(&wal)) };
        let metrics = Metrics::new(ETCD_VERSION, "3.7");
        let counters = metrics.counters.clone();
        let had_state = dir.state().exists();
        let opener = Opener {
            config,
            state: dir.state(),
            wal: &wal,
            history: history.clone(),
            clock: clock.clone(),
            counters: counters.clone(),
            tls: tls.connector.clone(),
        };
        let machine = match opener.open().await {
            Ok(machine) => machine,
            Err(damage) => {
                rebuild::rebuild(damage, had_state, &dir, &identity, &others, &opener, given_up).await?;
                opener.open().await.map_err(Damage::into_error)?
            }
        };
        machine.store().history().backend().accept()?;
        dir.set_rebuilt()?;
        let (member_dir, dir) = (dir.member().to_owned(), Some(dir));
        Self::assemble(config, Place { identity, wal, machine, metrics, history, clock, member_dir, dir, tls }).await
    }

    /// Who a new member is: as the cluster knows it that it joins, or as follows from who founds one.
    ///
    /// # Errors
    /// `Config`.
    pub async fn identify(config: &Config, tls: &Option<Connector>, given_up: &(dyn Fn() -> bool + Sync)) -> Result<Identity> {
        config.validate_bootstrap()?;
        if config.initial_cluster_state == ClusterState::Existing {
            return join_cluster(config, tls, given_up).await;
        }
        let identity = found(config, &config.advertised_peer_urls(&config.listen_peer_urls))?;
        check_not_founded(config, &identity, tls).await?;
        Ok(identity)
    }

    /// Puts the parts together and starts them. Returns when the member can serve.
    pub async fn assemble(config: &Config, place: Place) -> Result<Member> {
        let Place { identity, wal, machine, metrics, history, clock, member_dir, dir, tls } = place;
        let peer_urls = config.advertised_peer_urls(&config.listen_peer_urls);
        let counters = metrics.counters.clone();
        if lock(&machine.members).is_removed(identity.member_id) {
            if let Some(dir) = &dir {
                dir.set_removed()?;
            }
            return Err(Error::Removed);
        }

        let health = watch::Sender::new(Health::Running);
        let durable = watch::Sender::new(0);
        let purge = durable.subscribe();
        let compacted_at = Arc::new(AtomicU64::new(0));
        let events = StorageEvents { machine: machine.clone(), health: health.clone(), durable, compacted_at: compacted_at.clone() };
        let background = Arc::new(Background::start(machine.current.clone(), events, &config.name, clock, counters.clone())?);

        let raft_config = openraft::Config {
            cluster_name: format!("{:x}", identity.cluster_id),
            heartbeat_interval: config.heartbeat_interval_ms,
            // A member stands for election when it has heard of no leader for the greatest of these (the time for which it supports a leader)
            // and a random part between them: in all from one election timeout to one and a quarter, which is never earlier than the flag
            // says, and sooner than etcd's one to two. The lesser is also what a vote may take, with its connection and the voter's fsync.
            election_timeout_min: config.election_timeout_ms * 3 / 8,
            election_timeout_max: config.election_timeout_ms * 5 / 8,
            // Snapshots follow the background writer's syncs, not the number of entries.
            snapshot_policy: openraft::SnapshotPolicy::Never,
            // The node says how much of the log goes, see `Node::purge_log`.
            max_in_snapshot_log_to_keep: u64::MAX,
            purge_batch_size: 1,
            // A leader that is started again in its own term would confirm reads by the first entry of that term, and has forgotten what
            // was committed since: it has to be elected anew, and commit an entry of a new term, before it serves any.
            enable_leader_restore: Some(world::has_fault(world::Fault::RestoredLeader)),
            enable_pre_vote: Some(config.pre_vote),
            ..openraft::Config::default()
        };
        let raft_config = raft_config.validate().map_err(|err| Error::Config(err.to_string()))?;
        let network = Network::new(identity.clone(), counters, Some(machine.clone()), tls.connector.clone());
        let log_store = LogStore::new(wal.clone());
        let raft =
            Raft::new(identity.member_id, Arc::new(raft_config), network.clone(), log_store, StateMachine { machine: machine.clone() })
                .await;
        let raft = raft.map_err(|err| wal.failed().unwrap_or(Error::Failed(err.to_string())))?;
        let initialized = raft.is_initialized().await.map_err(|err| Error::Failed(err.to_string()))?;
        if !initialized && !identity.joined {
            // Each founder says the same, to the byte, so that it does not matter who is heard: of the others' client URLs none knows.
            let mut founders = founders(config, &peer_urls)?;
            let alone = founders.len() == 1;
            if let [(id, name, _)] = &mut founders[..] {
                // Who it is was settled when the directory was made; a first start that was interrupted may be repeated with other settings.
                (*id, *name) = (identity.member_id, identity.name.clone());
            } else if !founders.iter().any(|(id, ..)| *id == identity.member_id) {
                let what = format!("initial-cluster and its token do not make member {:x}, whose directory this is", identity.member_id);
                return Err(Error::Config(what));
            }
            let members = founders.into_iter().map(|(id, name, urls)| {
                let client_urls = if alone { &config.advertise_client_urls[..] } else { &[] };
                let texts = |urls: &[Url]| urls.iter().map(Url::to_string).collect();
                (id, internal::Member { name, peer_urls: texts(&urls), client_urls: texts(client_urls), ..Default::default() })
            });
            let members: BTreeMap<u64, internal::Member> = members.collect();
            raft.initialize(members).await.map_err(|err| Error::Failed(err.to_string()))?;
        } else if initialized && raft.metrics().borrow_watched().membership_config.membership().voter_ids().eq([identity.member_id]) {
            // The only voter need not wait for a leader to be heard of.
            raft.trigger().elect(false).await.map_err(|err| Error::Failed(err.to_string()))?;
        }
        let options = NodeOptions {
            quota_bytes: config.quota(),
            max_request_bytes: config.max_request_bytes,
            max_txn_ops: config.max_txn_ops,
            heartbeat: Duration::from_millis(config.heartbeat_interval_ms),
            election_timeout: Duration::from_millis(config.election_timeout_ms),
            auto_compaction: config.auto_compaction()?,
            catchup_entries: config.snapshot_catchup_entries,
            history,
            member_dir,
            told: founding::others_told(config, &identity)?,
            strict_reconfig: config.strict_reconfig_check,
            max_learners: config.max_learners,
            corrupt_check_time: config.corrupt_check_time,
            compact_hash_check_time: if config.compact_hash_check { config.compact_hash_check_time } else { Duration::ZERO },
        };
        let node = Node::start(identity, options, machine, raft, wal.clone(), background.clone(), health, network);
        node.spawn_purge(purge);
        let member = Member { node, background, wal, metrics, compacted_at, tls, dir };
        match member.node.ready().await {
            Ok(()) => Ok(member),
            Err(err) => {
                let _ = member.close().await;
                Err(err)
            }
        }
    }

    /// Opens the listeners and begins to serve.
    async fn listen(&self, config: &Config, say: Option<&Say>, stop: &CancellationToken) -> Result<Listening> {
        let clients = bind_all(&config.listen_client_urls, &self.tls.client).await?;
        let https = bind_all(&config.listen_client_http_urls, &self.tls.client).await?;
        let metrics_only = bind_all(&config.listen_metrics_urls, &self.tls.client).await?;
        let peers = bind_all(&config.listen_peer_urls, &self.tls.peer).await?;
        let peer_addrs = addrs_of(&peers);
        let addrs = addrs_of(&clients);
        let bound = config.listen_client_urls.iter().zip(&clients);
        let bound: Vec<Url> =
            bound.map(|(url, at)| at.local_addr().map_or_else(|| url.clone(), |addr| url.with_port(addr.port()))).collect();
        let info = api::Info {
            client_urls: config.advertised_client_urls(&bound).iter().map(Url::to_string).collect(),
            watch_progress_interval: config.watch_progress_notify_interval,
        };
        let client_urls = info.client_urls.clone();
        let snapshots = Arc::new(Semaphore::new(SNAPSHOTS_MAX));
        let api = Api { node: self.node.clone(), info: Arc::new(info), stop: stop.child_token(), snapshots };
        let options = ServeOptions { max_concurrent_streams: config.max_concurrent_streams, keepalive: config.grpc_keepalive() };
        let limits = Limits::new(options);
        let metrics = self.metrics.clone();
        metrics.set_source(Some(gauges(self.node.clone(), limits.clone(), self.compacted_at.clone())));
        let versions = Versions { server: ETCD_VERSION, cluster: STORAGE_VERSION, storage: STORAGE_VERSION };
        let grpc = Arc::new(router(&api, config.warning_unary_request_duration, &metrics)?);
        let http = Arc::new(Http::new(self.node.clone(), metrics.clone(), versions));
        // With a port for HTTP alone, the client port speaks gRPC alone, as etcd's does.
        let client = App { grpc: Some(grpc), http: config.listen_client_http_urls.is_empty().then(|| http.clone()) };
        let plain = App { grpc: None, http: Some(http) };
        let mut serving = Vec::new();
        let router = Arc::new(api::peer::router(&self.node, say, config.warning_unary_request_duration, &metrics));
        let peer = App { grpc: Some(router), http: plain.http.clone() };
        for listener in peers {
            serving.push(Serving::start(listener, limits.clone(), peer.clone()));
        }
        // The others are heard before any client is: what this member would tell may be wrong.
        if config.initial_corrupt_check
            && let Err(err) = self.node.check_initially().await
        {
            futures_util::future::join_all(serving.iter().map(|serving| serving.stop(DRAIN))).await;
            metrics.set_source(None);
            return Err(err);
        }
        for listener in clients {
            serving.push(Serving::start(listener, limits.clone(), client.clone()));
        }
        for listener in https.into_iter().chain(metrics_only) {
            serving.push(Serving::start(listener, limits.clone(), plain.clone()));
        }
        self.node.publish(client_urls);
        Ok(Listening { api, addrs, peer_addrs, serving, metrics })
    }

    /// Stops everything, in order. All of it is tried, whatever fails.
    async fn close(self) -> Result<()> {
        self.node.stop().await;
        self.background.stop();
        self.node.machine.close();
        self.wal.close()
    }
}

struct Listening {
    api: Api,
    addrs: Vec<SocketAddr>,
    peer_addrs: Vec<SocketAddr>,
    serving: Vec<Serving>,
    metrics: Arc<Metrics>,
}

impl Listening {
    /// Returns whether any connection had to be cut.
    async fn drain(self, limit: Duration) -> bool {
        let cut = futures_util::future::join_all(self.serving.iter().map(|serving| serving.stop(limit))).await;
        // The source holds the node; a host that keeps the metrics need not keep that.
        self.metrics.set_source(None);
        cut.contains(&true)
    }
}

/// Listens on all of them; with TLS where they say so.
async fn bind_all(urls: &[Url], tls: &Option<Acceptor>) -> Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for url in urls {
        let listener = match (url.socket_path(), url.listen_ip(), url.port()) {
            (Some(path), _, _) => Listener::unix(path).await?,
            (None, Some(ip), Some(port)) => Listener::tcp(SocketAddr::new(ip, port)).await?,
            _ => return Err(Error::Config(format!("{url} cannot be listened on: it has no address"))),
        };
        listeners.push(match (url.is_tls(), tls) {
            (false, _) => listener,
            (true, Some(tls)) => listener.with_tls(tls.clone()),
            // Refused by the configuration; to be sure that it is never listened on in plain.
            (true, None) => return Err(Error::Config(format!("{url} cannot be listened on: there is no certificate for it"))),
        });
    }
    Ok(listeners)
}

fn addrs_of(listeners: &[Listener]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(Listener::local_addr).collect()
}

impl Checks for Node {
    fn alarms(&self) -> Vec<i32> {
        Node::alarms(self).iter().map(|alarm| alarm.alarm).collect()
    }

    fn has_leader(&self) -> bool {
        Node::has_leader(self)
    }

    fn is_learner(&self) -> bool {
        Node::is_learner(self)
    }

    fn read(&self, serializable: bool) -> futures_util::future::BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let request = RangeRequest { key: bytes::Bytes::from_static(b"health"), serializable, limit: 1, ..RangeRequest::default() };
            self.range(&request).await.map(|_| ())
        })
    }
}

/// What a scrape asks the other rooms for.
fn gauges(node: Arc<Node>, limits: Arc<Limits>, compacted_at: Arc<AtomicU64>) -> Arc<dyn Fn() -> Gauges + Send + Sync> {
    Arc::new(move || {
        let store = node.store();
        let history = store.history().stats();
        let wal = node.wal().metrics();
        let (revision, compact_revision) = store.revisions();
        let applied = node.machine.applied().log_id.map_or(0, |id| id.index);
        let watches = node.machine.hub.figures();
        Gauges {
            member_id: node.identity.member_id,
            has_leader: node.has_leader(),
            is_leader: node.is_leader() && node.has_leader(),
            snapshot_apply_in_progress: node.is_installing(),
            is_learner: node.is_learner(),
            proposals_committed: node.committed().max(applied),
            proposals_applied: applied,
            proposals_pending: node.waiting() as u64,
            quota_bytes: node.options.quota_bytes.unwrap_or(0),
            db_total_bytes: history.disk_bytes,
            db_in_use_bytes: history.live_bytes,
            defrag_inflight: node.background().is_rewriting(),
            open_reads: store.open_reads() as u64,
            revision,
            compact_revision,
            keys: store.keys() as u64,
            compacted_at: compacted_at.load(Ordering::Relaxed),
            watch_streams: watches.streams as u64,
            watchers: watches.watches as u64,
            slow_watchers: watches.slow as u64,
            pending_events: watches.pending as u64,
            leases: lock(&node.machine.lessor).len() as u64,
            wal_fsync: Histogram { bounds: &SYNC_BUCKETS, counts: wal.fsync_buckets.to_vec(), sum: wal.fsync_seconds },
            wal_written_bytes: wal.written_bytes,
            wal_segments: wal.segments,
            wal_disk_bytes: wal.disk_bytes,
            wal_cache_bytes: wal.cache_bytes,
            wal_queued_bytes: wal.queued_bytes,
            tail_records: history.tail_records,
            tail_bytes: history.tail_bytes,
            block_cache_bytes: history.cache_bytes,
            backend_written_bytes: history.written_bytes,
            connections: limits.connections() as u64,
            streams: limits.streams() as u64,
        }
    })
}

/// The shortest TTL of a lease, in seconds: one and a half election timeouts, rounded up, as in etcd.
fn min_ttl(config: &Config) -> i64 {
    let ms = config.election_timeout_ms.saturating_mul(3).div_ceil(2);
    i64::try_from(ms.div_ceil(1000)).unwrap_or(i64::MAX).max(1)
}

/// Lets the state be written when the log is on disk as far as it was asked to be.
fn gate_of(wal: &Arc<Wal>) -> Gate {
    let wal = wal.clone();
    Gate(Arc::new(move || {
        let (done, wait) = std::sync::mpsc::sync_channel(1);
        // No entries: what was asked before.
        wal.append(Vec::new(), Box::new(move |result| drop(done.send(result))))?;
        wait.recv().unwrap_or(Err(Error::Stopped))
    }))
}
