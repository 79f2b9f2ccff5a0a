//! The embedded mode: the same few lines in every node of a platform, and the platform's metadata store is there.
//!
//! No node is special. All are given one list of addresses, `JOIN`; the first one or three of those that are there found the cluster and
//! hold the data, all others call them. A host asks for the [client](Node::client), for its [role](Node::role), and
//! for one signal that says whether metadata can be written, [`availability`](Node::availability).
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let dir = tempfile::tempdir()?;
//! # let port = || std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map(|addr| addr.port());
//! # let (peer, client) = (port()?, port()?);
//! use quorate::embed::{Access, EmbedConfig, Node, Role};
//!
//! // In production: EmbedConfig::from_env()?
//! # let vars = [("JOIN", format!("127.0.0.1:{peer}")), ("KV_PEER_PORT", peer.to_string()), ("KV_CLIENT_PORT", client.to_string())];
//! # let data_dir = ("KV_DATA_DIR".to_owned(), dir.path().join("data").to_string_lossy().into_owned());
//! # let config = EmbedConfig::from_vars(vars.map(|(name, value)| (name.to_owned(), value)).into_iter().chain([data_dir]))?;
//! let node = Node::start(config).await?;
//! assert_eq!(node.role(), Role::Server); // it is alone in its list
//! let mut availability = node.availability();
//! availability.wait_for(|now| now.access == Access::ReadWrite).await?;
//! node.client().put("volumes/a", "3 replicas").await?; // the same on every node
//! node.shutdown().await?;
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! # Invariants
//! - A node's role and cluster are on disk before it acts in that role, and do not change while it runs; [`founding`] says how they come
//!   about. A client may be made a [server](members), and is one from its next start on; nothing else ever changes.
//! - A restart with data needs no network. A server that was removed remembers that, and starts no more.
//! - [`Node::start`] waits for other nodes no longer than the configured time, and can be tried again; after an error nothing is left
//!   running or open. What it does not wait for others with, as reading its own data, takes as long as it takes. Everything runs on threads
//!   of the node's own: the host's runtime is neither used nor blocked, and the process is never ended. Nor does a name that is looked
//!   up stand in the way of anything; its thread may end a little after the node has.
//!
//! # Names and ids
//! The server's ids are derived as etcd derives them, from its peer URL and the cluster's token; and the token is the id that was agreed
//! on, which no other founding has. So the ids are as unique as the agreement, every founder computes those of all, and a node whose disk
//! is new, at an old address, cannot come by the old one: it is not among the founders, by its node id, and becomes a client. A server that
//! came later has an id that is drawn for it; the membership says which node it is.
//!
//! # Looking after it
//! Backups are made on a schedule by the server that leads, and by any node that is asked to; see [`Node::back_up`]. A backup becomes a new
//! cluster with [`restore()`]. How a node is, [`Node::health_json`] says, and `KV_HEALTH_PORT`; how far away the servers are, [`Node::peers`].
//! History is compacted and space given back without a hand.
//!
//! # Addresses
//! A node that was not told its address finds it out once, when it starts (`address`). A server that comes back with another address tells the
//! others' membership so, which takes a quorum. When all have moved, they find each other at the entries of `JOIN` first (`moved`). Clients
//! follow the servers by asking any of them; if none is where it was, the addresses in `JOIN` are asked, too (`follow`).
//!
//! # TLS
//! Nodes that are given certificates show them to each other on every port, and take nobody in who has none; without, a node has to be told
//! that plain text will do, unless it is on loopback (`secure`). An external etcd has certificates and users of its own.
//!
//! # Caveats
//! - A cluster keeps to what it was founded with, TLS or plain text.
//! - With certificates, who asks a server's port for `/health` or `/metrics` needs one, too.
//! - A server that has moved is found by those that have one of the new addresses in their `JOIN`, or know somebody who has.

mod address;
pub mod availability;
mod backups;
pub mod config;
mod follow;
pub mod founding;
mod health;
mod life;
pub mod members;
mod moved;
mod peers;
mod probe;
mod replacing;
mod restore;
mod secure;
mod strangers;
mod way;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::backups::Keeper;
use self::founding::agree::{Agreement, Candidate, Decision, Grant, Known, List, Order, State};
use self::founding::drive::{Driver, Progress, node_url};
use self::founding::state::NodeDir;
use self::health::Report;
use self::life::{Parts, cluster_number, join_urls};
use self::peers::watch_peers;
use self::probe::{Local, Remote, Signal, Store, watch_store};
use self::replacing::Notice;
use self::secure::{Secure, speaks_tls};
use crate::api::peer::founding as founding_router;
use crate::api::serve::{App, Listener, Serving};
use crate::api::wire::{Limits, ServeOptions};
use crate::backup::{self, BackupInfo};
use crate::client::{Client, Gate, RemoteOptions, RuntimeEnd};
use crate::config::{ClusterState, Config, ETCD_VERSION, Url};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::Metrics;
use crate::server::{Enlistment, Server, cluster_id, member_id};
use crate::storage::dir::identity_in;

pub use self::availability::{Access, Availability};
pub use self::config::{Backend, EmbedConfig, Servers};
pub use self::founding::agree::Role;
pub use self::founding::wire::Token;
pub use self::peers::Peer;
pub use self::restore::{RestoredNode, restore};
pub use crate::client::{Secret, TlsFiles};
pub use crate::config::{BackupConfig, StoreOptions};

/// Threads for looking up names, those of other nodes, and for looking at the files of certificates. They are in one pool with those for
/// [backups](backups::THREADS): what is beyond both numbers together waits, whatever it is for.
const LOOKUP_THREADS: usize = 4;

/// A running node. Dropping it stops it without waiting; [`shutdown`](Self::shutdown) waits. See the [module](self).
pub struct Node {
    role: Role,
    client: Client,
    local: Option<Client>,
    cluster: Option<u128>,
    availability: watch::Receiver<Availability>,
    endpoints: watch::Receiver<Vec<String>>,
    report: Arc<Report>,
    keeper: Option<Arc<Keeper>>,
    ended: watch::Receiver<Option<Error>>,
    enlisted: watch::Receiver<bool>,
    orders: mpsc::Sender<members::Request>,
    stop: CancellationToken,
    /// Until when the stop may wait for others.
    until: Arc<Mutex<Option<Instant>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    done: Mutex<Option<oneshot::Receiver<Result<()>>>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("role", &self.role).field("cluster", &self.cluster_id()).finish_non_exhaustive()
    }
}

impl Node {
    /// Starts a node, and returns when its role is known and, if it is a server, that serves.
    ///
    /// It waits for other nodes no longer than [`EmbedConfig::start_timeout`]: for a cluster that is there, or for enough of them to found
    /// one; and, as a server that has lost its state, for the others'. Then it gives up, which includes what it had received of that state.
    ///
    /// # Errors
    /// `Config`; `Founding` when there is no cluster in time, with the nodes that are missing, and `Unavailable` when no other server has
    /// given its state: try again; `Removed` for a server that was removed from its cluster; `Locked`, `Format` or `Corrupt` for the data
    /// directory; `Io`. After an error nothing is left running or open.
    pub async fn start(mut config: EmbedConfig) -> Result<Node> {
        config.validate()?;
        let stop = CancellationToken::new();
        // Who gives up waiting for the start ends it.
        let guard = stop.clone().drop_guard();
        let (started, wait) = oneshot::channel();
        let (finished, done) = oneshot::channel();
        let (theirs, until) = (stop.clone(), Arc::<Mutex<Option<Instant>>>::default());
        let asked = until.clone();
        let thread = std::thread::Builder::new().name(format!("quorate-embed-{}", config.hostname)).spawn(move || {
            let mut started = Some(started);
            let threads = LOOKUP_THREADS + backups::THREADS;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(threads).build();
            let ended = match runtime {
                Ok(runtime) => {
                    let ended = runtime.block_on(run(config, theirs, &asked, &mut started));
                    // It is gone before the last word is said: who hears that waits for nothing but the end of a thread. A name that is
                    // still looked up is not waited for: it holds nothing. Nor is a store of backups that does not answer.
                    runtime.shutdown_background();
                    ended
                }
                Err(err) => Err(Error::io("making the runtime of", "the node", err)),
            };
            // Who started, or was to stop it, may have given up waiting.
            match (started, ended) {
                (Some(started), Err(err)) => drop(started.send(Err(err))),
                (_, ended) => drop(finished.send(ended)),
            }
        });
        let thread = thread.map_err(|err| Error::io("starting the thread of", "the node", err))?;
        let parts = match wait.await.unwrap_or_else(|_| Err(Error::Failed("the node's thread ended before it had started".into()))) {
            Ok(parts) => parts,
            Err(err) => {
                join(thread);
                return Err(err);
            }
        };
        let Started { role, client, local, cluster, availability, endpoints, report, keeper, ended, enlisted, orders } = parts;
        let _ = guard.disarm();
        let (thread, done) = (Mutex::new(Some(thread)), Mutex::new(Some(done)));
        Ok(Node {
            role,
            client,
            local,
            cluster,
            availability,
            endpoints,
            report,
            keeper,
            ended,
            enlisted,
            orders,
            stop,
            until,
            thread,
            done,
        })
    }

    /// What this node is, as long as it runs. A server is one for the life of its data directory; a client may be [`enlisted`](Self::enlisted).
    pub fn role(&self) -> Role {
        self.role
    }

    /// The id of the cluster that the nodes have agreed on; none with an external etcd.
    pub fn cluster_id(&self) -> Option<String> {
        self.cluster.map(|cluster| format!("{cluster:032x}"))
    }

    /// The client of the store, whatever is behind it: the server in this process, the servers as they change, or an external etcd.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The client of the server in this process, if there is one: no socket, no encoding.
    pub fn local(&self) -> Option<&Client> {
        self.local.as_ref()
    }

    /// The client URLs of all servers, as they change.
    pub fn endpoints(&self) -> watch::Receiver<Vec<String>> {
        self.endpoints.clone()
    }

    /// Whether the store can be written, and read, as it changes.
    pub fn availability(&self) -> watch::Receiver<Availability> {
        self.availability.clone()
    }

    /// The [availability](Self::availability) as it is now, as JSON for a health page, see [`Availability::to_json`]; with the node's `role` and
    /// `cluster`, its [`servers`](Self::peers), and what there is to be said of its [`backups`](Self::back_up): `newestAt` in milliseconds
    /// since 1970 and `ageSeconds`, of the newest of this cluster's; `made` and `failed` by this process, and the `lastTry`. `strangers`
    /// are nodes of another cluster at the entries of JOIN, with `address` and `cluster`; `founding` says who is missing, and why, before
    /// there is a cluster. Its `replacement` is null, unless [`EmbedConfig::replace_after`] is set: then it has `afterSeconds`, what this
    /// node has `begun` while it led, and what of that has `failed`, and as `wanted` null, or the `server` to be replaced now, whose place
    /// nobody can take, and in `refused` why, for each node that was asked.
    pub fn health_json(&self) -> serde_json::Value {
        self.report.to_json()
    }

    /// How far away each server is, but for the one in this process. They are asked every other second; empty before the first answers.
    pub fn peers(&self) -> Vec<Peer> {
        self.report.peers()
    }

    /// The metrics of this node's server, or those that a client has, to be read or taken into the host's own registry.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.report.facts().metrics
    }

    /// Makes a backup now, of whatever server this node reads from, into [`EmbedConfig::backup`]'s directory. Any node may be asked. It goes on
    /// when the future is dropped.
    ///
    /// # Errors
    /// As [`Backups::back_up`](crate::backup::Backups::back_up); `Config` when no directory is set; `Locked` when another node is making one
    /// there, and goes on to.
    pub async fn back_up(&self) -> Result<BackupInfo> {
        self.keeper()?.back_up().await
    }

    /// The backups in [`EmbedConfig::backup`]'s directory, whoever has made them, and what goes on. On a server `next` is when the leader makes
    /// the next one, by this server's own clock and chance; on a client it is none.
    ///
    /// # Errors
    /// `Io` for the directory; `Config` when none is set.
    pub async fn backups(&self) -> Result<backup::Status> {
        self.keeper()?.status().await
    }

    fn keeper(&self) -> Result<&Arc<Keeper>> {
        self.keeper
            .as_ref()
            .ok_or_else(|| Error::Config("KV_BACKUP_STORE is not set; name a directory for backups, or the URL of an object store".into()))
    }

    /// Whether this client is to be a server, which it is from its next start on: the host [shuts it down](Self::shutdown), and starts it again.
    pub fn enlisted(&self) -> watch::Receiver<bool> {
        self.enlisted.clone()
    }

    /// Makes servers of clients, so that there are three: see [`members`]. They are named by their addresses, `host[:port]`.
    ///
    /// Returns when it is in the servers' log. They are servers when they have been started again, and vote when all of them have the data.
    ///
    /// # Errors
    /// `Ineligible`, and nothing was changed; `Unavailable`, when no server was there to be told; those of a write.
    pub async fn grow(&self, nodes: &[&str]) -> Result<()> {
        self.order(Order::Grow { nodes: nodes.iter().map(|node| (*node).to_owned()).collect() }).await
    }

    /// Makes a server of a client, in the place of a server that is dead. The server is named by its name, its address or its id, the
    /// client by its address.
    ///
    /// # Errors
    /// As [`grow`](Self::grow).
    pub async fn replace(&self, server: &str, by: &str) -> Result<()> {
        self.order(Order::Replace { server: server.to_owned(), by: by.to_owned(), even_alive: false }).await
    }

    /// As [`replace`](Self::replace), whether the server is dead or not.
    ///
    /// # Errors
    /// As [`grow`](Self::grow).
    pub async fn replace_alive(&self, server: &str, by: &str) -> Result<()> {
        self.order(Order::Replace { server: server.to_owned(), by: by.to_owned(), even_alive: true }).await
    }

    /// Removes a server, or one that is enlisted and does not vote yet.
    ///
    /// # Errors
    /// As [`grow`](Self::grow).
    pub async fn remove(&self, server: &str) -> Result<()> {
        self.order(Order::Remove { server: server.to_owned() }).await
    }

    async fn order(&self, order: Order) -> Result<()> {
        if self.cluster.is_none() {
            return Err(members::not_embedded());
        }
        let (answer, wait) = oneshot::channel();
        self.orders.send((order, answer)).await.map_err(|_| Error::Stopped)?;
        wait.await.unwrap_or(Err(Error::Stopped))
    }

    /// Returns when the node's server has stopped by itself, or the node was told to stop. A client node has no server that could.
    ///
    /// # Errors
    /// Why it stopped by itself; [`Error::Removed`] among others. The node says so by its [availability](Self::availability), too, and is
    /// of no use any more: call [`shutdown`](Self::shutdown), which releases what is left.
    pub async fn stopped(&self) -> Result<()> {
        let mut ended = self.ended.clone();
        tokio::select! {
            biased;
            ended = ended.wait_for(Option::is_some) => match ended.map(|why| why.clone()) {
                Ok(Some(why)) => Err(why),
                _ => Ok(()),
            },
            () = self.stop.cancelled() => Ok(()),
        }
    }

    /// Stops the node: hands over the lead, if it has it, and gives up ports, files, locks and threads.
    ///
    /// # Errors
    /// What went wrong on the way, or had made its server stop before; everything is given up all the same.
    pub async fn shutdown(self) -> Result<()> {
        self.stop(None).await
    }

    /// The same in a given time. What waits for others is cut off when it is over: handing over the lead, connections that have something
    /// under way, a backup. Nor is the state written out if it is over by then, for the log has it; the next start takes longer. What the
    /// disk is at is waited for, and a state that is being written out, too: nothing may be left behind.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown); [`CutOff`](Error::CutOff) names what was cut off.
    pub async fn shutdown_within(self, limit: Duration) -> Result<()> {
        self.stop(Some(limit)).await
    }

    async fn stop(self, limit: Option<Duration>) -> Result<()> {
        *lock(&self.until) = limit.and_then(|limit| Instant::now().checked_add(limit));
        self.stop.cancel();
        let done = lock(&self.done).take();
        let result = match done {
            Some(done) => done.await.unwrap_or_else(|_| Err(Error::Failed("the node's thread ended early".into()))),
            None => Ok(()),
        };
        // Its last word was said; what is left is the end of a thread.
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            join(thread);
        }
        result
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("the node's thread has panicked");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What the handle has of a node.
struct Started {
    role: Role,
    client: Client,
    local: Option<Client>,
    cluster: Option<u128>,
    availability: watch::Receiver<Availability>,
    endpoints: watch::Receiver<Vec<String>>,
    report: Arc<Report>,
    keeper: Option<Arc<Keeper>>,
    /// Why its server has stopped by itself.
    ended: watch::Receiver<Option<Error>>,
    enlisted: watch::Receiver<bool>,
    orders: mpsc::Sender<members::Request>,
}

/// The life of a node, on its own runtime. `started` is told, and taken, when it runs; an error before that is returned.
async fn run(
    mut config: EmbedConfig,
    stop: CancellationToken,
    until: &Mutex<Option<Instant>>,
    started: &mut Option<oneshot::Sender<Result<Started>>>,
) -> Result<()> {
    let (tell, availability) = watch::channel(Availability::default());
    let (tell_peers, peers) = watch::channel(Vec::new());
    let report = Report::new(availability.clone(), peers);
    // From here on it waits for no other node any more: it is told to stop, or the time is over. It is not dropped, for what it has
    // begun has to be ended in order.
    let late = stop.child_token();
    let (timeout, timer) = (config.start_timeout, late.clone());
    let timer = async move {
        tokio::time::sleep(timeout).await;
        timer.cancel();
        std::future::pending().await
    };
    let parts = tokio::select! {
        biased;
        parts = Parts::start(&mut config, &late, &report) => parts,
        never = timer => never,
    };
    let mut parts = parts?;
    let (announce, endpoints) = watch::channel(parts.endpoints.clone());
    let end = RuntimeEnd::default();
    let gate = Arc::new(Gate::default());
    let cluster = parts.known.as_ref().and_then(|known| cluster_number(&known.decision));
    let options = RemoteOptions { cluster, ..parts.secure.options.clone() };
    let made = parts.local().map_or_else(|| remote(endpoints.clone(), options, end.clone()), Ok).and_then(|whole| {
        parts.keep_backups(&config, whole.clone(), &report)?;
        Ok(whole)
    });
    let client = match made.map(|whole| whole.gated(gate.clone())) {
        Ok(client) if config.namespace.is_empty() => client,
        Ok(client) => client.namespaced(config.namespace.clone()),
        Err(err) => {
            let _ = parts.close(&mut Limit::default()).await;
            return Err(err);
        }
    };
    let counters = report.facts().metrics.counters.clone();
    let signal = Signal { tell, gate, counters: counters.clone() };
    let (tell_end, ended) = watch::channel(None);
    let (orders, mut asked) = mpsc::channel(members::ORDERS_MAX);
    let handle = Started {
        role: parts.role,
        client,
        local: parts.local(),
        cluster: parts.known.as_ref().map(|known| known.decision.cluster),
        availability,
        endpoints: endpoints.clone(),
        report: report.clone(),
        keeper: parts.keeper.clone(),
        ended,
        enlisted: parts.driver.as_ref().map_or_else(|| watch::channel(false).1, Driver::enlisted),
        orders,
    };
    if started.take().is_none_or(|started| started.send(Ok(handle)).is_err()) {
        stop.cancel();
    }
    let lines = parts.secure.store.clone().of_cluster(cluster);
    let servers = || Remote::new(endpoints.clone(), config.backend == Backend::Embedded, lines.clone());
    let store: Box<dyn Store> = match parts.local() {
        Some(client) => Box::new(Local(client)),
        None => Box::new(servers()),
    };
    let own = parts.server.as_ref().and_then(|_| config.client_url().ok()).map(|url| url.to_string());
    let listed = join_urls(&config);
    let result = {
        let ended = parts.live(&config, announce, &mut asked);
        let keeper = parts.keeper.clone();
        let kept = async {
            match &keeper {
                Some(keeper) => keeper.watch().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            () = watch_store(store, &signal) => Ok(()),
            () = watch_peers(servers(), own, &tell_peers, &counters) => Ok(()),
            () = kept => Ok(()),
            () = strangers::watch(parts.driver.as_ref(), &listed, &report) => Ok(()),
            ended = ended => ended,
        }
    };
    if let Err(err) = &result {
        // The host goes on; it is told, and nothing here tries to be a server any more.
        tracing::error!(error = %err, "this node's server has stopped");
        signal.set(Access::ReadOnly, &err.to_string(), false, false, true);
        tell_peers.send_replace(Vec::new());
        tell_end.send_replace(Some(err.clone()));
        drop(asked);
        stop.cancelled().await;
    }
    // From here on its client says itself that it has stopped.
    signal.gate.set(None);
    end.announce();
    let mut limit = Limit { until: *lock(until), cut: Vec::new() };
    let closed = parts.close(&mut limit).await;
    let in_time = if limit.cut.is_empty() { Ok(()) } else { Err(Error::CutOff(limit.cut.join(", "))) };
    result.and(closed).and(in_time)
}

/// How long a stop may wait for others, and what it has cut off for that.
#[derive(Default)]
struct Limit {
    until: Option<Instant>,
    cut: Vec<&'static str>,
}

impl Limit {
    /// What is left of the time, but no more than is usual.
    fn left(&self, usual: Duration) -> Duration {
        self.until.map_or(usual, |until| until.saturating_duration_since(Instant::now()).min(usual))
    }

    /// Something has not come to its end in time. Without a limit that is how it is.
    fn cut(&mut self, what: &'static str) {
        if self.until.is_some() {
            self.cut.push(what);
        } else {
            tracing::warn!(what, "it has taken too long, and was cut off");
        }
    }
}

/// A client of servers elsewhere, as they change. What tells it of them ends with the node's runtime.
fn remote(mut endpoints: watch::Receiver<Vec<String>>, options: RemoteOptions, end: RuntimeEnd) -> Result<Client> {
    let urls_of = |urls: &[String]| urls.iter().filter_map(|url| url.parse().ok()).collect::<Vec<Url>>();
    let (tell, urls) = watch::channel(urls_of(&endpoints.borrow_and_update()));
    tokio::spawn(async move {
        while endpoints.changed().await.is_ok() {
            let next = urls_of(&endpoints.borrow_and_update());
            tell.send_replace(next);
        }
    });
    Client::remote_until(urls, options, end)
}
