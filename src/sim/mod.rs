//! A cluster in one thread, whose time, chance, disks and network a seed decides. For tests (feature `simulation`); no part of the API.
//!
//! The members are the real ones: [`Member::assemble`] puts the same parts together as for a server. In the place of what is outside of
//! a member stand:
//!
//! | outside | in a simulation |
//! |---|---|
//! | time | tokio's paused clock, which goes on to the next timer when nothing else is to be done |
//! | chance, threads | [`world`]: numbers of the seed, tasks |
//! | the log's disk | [`SimDisk`], under the log's own code: at a power cut each sector that was not synced is there or not |
//! | the state's storage | [`Mem`]: at a power cut a prefix of the batches that were not synced is there |
//! | peer connections | [`net`]: the calls' bytes, delayed, held back, or lost with their connection |
//! | the system's clock | for leases, one that goes somewhat fast or slow at each member |
//!
//! ```text
//! run(seed, fault, |cluster| async move {
//!     cluster.start(0); ...                             members start, crash, pause, are cut off
//!     cluster.at(0, |client| async move { ... }).await  a client's call at member 0; none if the member has gone meanwhile
//! })
//! ```
//!
//! # The same seed, the same run
//! Everything that happens is added to a [trace](Cluster::trace), and the same seed has to give the same. That takes tokio's own random
//! numbers (which it uses to wake the watchers of one value) from the seed, too, which tokio only allows if it is built with
//! `--cfg tokio_unstable`; without it the simulation is as good, but a seed may not repeat it.
//!
//! # What is not simulated
//! HTTP/2 and TCP below the calls, sled, the files of snapshots that are received (they are real ones), full or broken disks, and clocks
//! that jump. Election timers go at the same rate everywhere.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::Future;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::{Api, Info};
use crate::client::Client;
use crate::config::{ClusterState, Config, ETCD_VERSION};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::Metrics;
use crate::node::{Health, Node};
use crate::proto::peer::{Enlist, Enlisted};
use crate::raft::apply::Clock;
use crate::raft::wire::dial_with;
use crate::server::{Damage, Member, Place, fit, machine_on};
use crate::storage::dir::Identity;
use crate::storage::history::{Gate, HistoryOptions};
use crate::storage::mem::Mem;
use crate::storage::wal::sim::SimDisk;
use crate::storage::wal::stepped::{self, Stepper};
use crate::storage::wal::{Wal, WalOptions};
use crate::tls::Tls;
use crate::world::{self, Life};

pub use crate::world::Fault;

mod net;

pub use net::{Net, Weather};

/// The size of the log's segments, small enough that a run goes through several.
const SEGMENT_BYTES: u64 = 128 << 10;

/// Lives that one member may have, so that the number of a life tells the member.
const LIVES_MAX: u64 = 1 << 20;

/// How long a member that could not start rests before it is started again, as by a supervisor.
const START_RETRY: Duration = Duration::from_millis(500);

/// Runs a scenario in a cluster without members yet. `dir` is where members put what they receive of snapshots.
pub fn run<T, F: Future<Output = T>>(seed: u64, fault: Option<Fault>, dir: &Path, scenario: impl FnOnce(Arc<Cluster>) -> F) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    #[allow(clippy::expect_used, reason = "a test")]
    let runtime = builder.build().expect("a runtime without threads");
    let _entered = world::enter(seed, fault);
    let result = runtime.block_on(async {
        let cluster = Cluster::new(seed, dir);
        scenario(cluster).await
    });
    dial_with(None);
    // Members that are still there are dropped where their timers are known.
    drop(runtime);
    result
}

/// How a member ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As by a signal: what was written to its disks is there afterwards.
    Killed,
    /// What was not synced may not be.
    Powerless,
}

/// How a member's surroundings are.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// How fast its clock goes.
    pub rate: f64,
    /// How long its disk takes for a sync, from and to, in milliseconds.
    pub sync_ms: (u64, u64),
}

impl Default for Surroundings {
    fn default() -> Self {
        Surroundings { rate: 1.0, sync_ms: (0, 3) }
    }
}

/// The members, and everything around them. See the [module](self).
pub struct Cluster {
    began: Instant,
    dir: PathBuf,
    net: Net,
    inner: Mutex<Inner>,
}

struct Inner {
    chance: StdRng,
    slots: Vec<Slot>,
    trace: Trace,
    /// What went wrong by itself: a member that stopped, or did not start; two leaders of one term.
    wrong: Vec<String>,
    /// Who led in each term.
    leaders: BTreeMap<u64, u64>,
    /// How long one that is enlisted may make no progress; none: nobody looks after those.
    enlist_limit: Option<Duration>,
}

/// A member's place, whether it runs or not.
struct Slot {
    config: Config,
    surroundings: Surroundings,
    disk: Arc<SimDisk>,
    mem: Mem,
    /// Known once it has been started for the first time.
    identity: Option<Identity>,
    starts: u64,
    running: Option<Running>,
    removed: bool,
}

/// A member that was started.
struct Running {
    life: Arc<Life>,
    gone: CancellationToken,
    stepper: Option<Arc<Stepper>>,
    /// Once it is ready.
    up: Option<Up>,
}

#[derive(Clone)]
struct Up {
    node: Arc<Node>,
    client: Client,
    // Kept for its drop.
    _member: Arc<Member>,
}

/// Everything that happened, as a sum, and in words if that is wanted.
#[derive(Default)]
struct Trace {
    hasher: DefaultHasher,
    events: u64,
    lines: Option<Vec<String>>,
}

impl Cluster {
    fn new(seed: u64, dir: &Path) -> Arc<Cluster> {
        // Not the numbers that the members draw.
        let mut chance = StdRng::seed_from_u64(seed ^ 0x5eed);
        let net = Net::new(StdRng::from_rng(&mut chance));
        let inner =
            Inner { chance, slots: Vec::new(), trace: Trace::default(), wrong: Vec::new(), leaders: BTreeMap::new(), enlist_limit: None };
        let cluster = Arc::new(Cluster { began: Instant::now(), dir: dir.to_owned(), net, inner: Mutex::new(inner) });
        let dialer = Arc::downgrade(&cluster);
        dial_with(Some(Box::new(move |life, url| net::dial(dialer.clone(), life, url.to_owned()))));
        cluster
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// The network.
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// Writes the trace down in words, too.
    pub fn keep_lines(&self) {
        self.inner().trace.lines = Some(Vec::new());
    }

    /// Adds something that has happened to the trace.
    pub fn note(&self, what: &str) {
        let now = self.now();
        let trace = &mut self.inner().trace;
        trace.events += 1;
        trace.hasher.write_u128(now.as_nanos());
        trace.hasher.write(what.as_bytes());
        if let Some(lines) = &mut trace.lines {
            lines.push(format!("{:10.3} {what}", now.as_secs_f64() * 1e3));
        }
    }

    /// The sum of everything that has happened, and how much that was.
    pub fn trace(&self) -> (u64, u64) {
        let trace = &self.inner().trace;
        (trace.hasher.finish(), trace.events)
    }

    /// The trace in words, if it was kept.
    pub fn lines(&self) -> Vec<String> {
        self.inner().trace.lines.clone().unwrap_or_default()
    }

    /// What went wrong by itself.
    pub fn wrong(&self) -> Vec<String> {
        self.inner().wrong.clone()
    }

    fn blame(&self, what: String) {
        self.note(&what);
        self.inner().wrong.push(what);
    }

    // ---- Members

    /// Where a member's peer port is.
    pub fn peer_url(member: usize) -> String {
        format!("http://10.0.0.{}:2380", member + 1)
    }

    fn name(member: usize) -> String {
        format!("m{member}")
    }

    /// Makes room for the founders of the cluster; nothing is started.
    pub fn found(&self, members: usize, config: &Config) {
        let all: Vec<usize> = (0..members).collect();
        for member in 0..members {
            self.place(member, &all, ClusterState::New, config);
        }
    }

    /// Makes room for one more, that is to join the given ones. Returns its place.
    pub fn joiner(&self, others: &[usize], config: &Config) -> usize {
        let member = self.inner().slots.len();
        let all: Vec<usize> = others.iter().copied().chain([member]).collect();
        self.place(member, &all, ClusterState::Existing, config);
        member
    }

    fn place(&self, member: usize, all: &[usize], state: ClusterState, config: &Config) {
        let mut config = config.clone();
        config.name = Self::name(member);
        let mut initial = String::new();
        for one in all {
            let _ = write!(initial, "{}{}={}", if initial.is_empty() { "" } else { "," }, Self::name(*one), Self::peer_url(*one));
        }
        config.initial_cluster = initial;
        config.initial_cluster_state = state;
        let mut inner = self.inner();
        let disk = SimDisk::new(inner.chance.random());
        inner.slots.push(Slot {
            config,
            surroundings: Surroundings::default(),
            disk,
            mem: Mem::new(),
            identity: None,
            starts: 0,
            running: None,
            removed: false,
        });
    }

    /// How many places there are.
    pub fn places(&self) -> usize {
        self.inner().slots.len()
    }

    /// Changes what surrounds a member: from its next start on.
    pub fn surround(&self, member: usize, surroundings: Surroundings) {
        if let Some(slot) = self.inner().slots.get_mut(member) {
            slot.surroundings = surroundings;
        }
    }

    /// Starts a member that does not run; one that cannot start yet is started again until it can.
    pub fn start(self: &Arc<Self>, member: usize) {
        let (life, gone) = {
            let mut inner = self.inner();
            let Some(slot) = inner.slots.get_mut(member).filter(|slot| slot.running.is_none() && !slot.removed) else { return };
            slot.starts += 1;
            let life = Life::new(member as u64 * LIVES_MAX + slot.starts);
            let gone = CancellationToken::new();
            slot.disk.power_on();
            slot.mem = slot.mem.reopened();
            slot.running = Some(Running { life: life.clone(), gone: gone.clone(), stepper: None, up: None });
            (life, gone)
        };
        self.note(&format!("member {member} starts"));
        let starting = tokio::spawn(life.enter(open(self.clone(), member)));
        let cluster = self.clone();
        // Its supervisor.
        tokio::spawn(async move {
            let opened = tokio::select! {
                biased;
                () = gone.cancelled() => return,
                opened = starting => opened.unwrap_or_else(|err| Err(Error::Failed(err.to_string()))),
            };
            let err = match opened {
                Ok(up) => {
                    let mut health = up.node.health();
                    if let Some(running) = cluster.inner().slots.get_mut(member).and_then(|slot| slot.running.as_mut()) {
                        running.up = Some(up);
                    }
                    cluster.note(&format!("member {member} is up"));
                    let ended = tokio::select! {
                        biased;
                        () = gone.cancelled() => return,
                        ended = health.wait_for(|health| !matches!(health, Health::Running)) => ended.map(|health| health.clone()),
                    };
                    match ended {
                        Ok(Health::Failed(err)) => err,
                        _ => Error::Stopped,
                    }
                }
                Err(err) => err,
            };
            let again = matches!(err, Error::Config(_));
            match err {
                Error::Removed => {
                    cluster.note(&format!("member {member} was removed, and stops"));
                    if let Some(slot) = cluster.inner().slots.get_mut(member) {
                        slot.removed = true;
                    }
                }
                // It found nobody to tell it what it needs to know.
                Error::Config(_) => cluster.note(&format!("member {member} cannot start yet")),
                err => cluster.blame(format!("member {member} has stopped by itself: {err}")),
            }
            cluster.end(member, End::Killed);
            if again {
                tokio::time::sleep(START_RETRY).await;
                cluster.start(member);
            }
        });
    }

    /// Ends a member at once.
    pub fn end(&self, member: usize, how: End) {
        let mut inner = self.inner();
        let Inner { chance, slots, .. } = &mut *inner;
        let Some(slot) = slots.get_mut(member) else { return };
        let Some(running) = slot.running.take() else { return };
        running.life.end();
        running.gone.cancel();
        match how {
            End::Killed => {
                // What it was just writing is there, or not.
                if let Some(stepper) = running.stepper.filter(|_| chance.random_ratio(1, 2)) {
                    let _ = stepper.drain();
                }
                slot.disk.kill();
            }
            End::Powerless => {
                match running.stepper {
                    Some(stepper) => stepper.lose_power(&slot.disk, chance.random_range(0..4)),
                    None => slot.disk.cut_now(),
                }
                let mem = slot.mem.reopened();
                let keep = chance.random_range(0..=mem.unsynced());
                mem.crash(keep);
            }
        }
        drop(inner);
        self.note(&format!("member {member} ends: {how:?}"));
    }

    /// Has a member do nothing at all until it is [resumed](Self::resume), while time goes on.
    pub fn pause(&self, member: usize) {
        self.note(&format!("member {member} is paused"));
        if let Some(running) = self.inner().slots.get(member).and_then(|slot| slot.running.as_ref()) {
            running.life.pause();
        }
    }

    /// Lets a paused member go on.
    pub fn resume(&self, member: usize) {
        self.note(&format!("member {member} is resumed"));
        if let Some(running) = self.inner().slots.get(member).and_then(|slot| slot.running.as_ref()) {
            running.life.resume();
        }
    }

    /// Whether a member was started, and has not ended.
    pub fn is_running(&self, member: usize) -> bool {
        self.inner().slots.get(member).is_some_and(|slot| slot.running.is_some())
    }

    /// Whether a member was removed from the cluster, and knows it.
    pub fn is_removed(&self, member: usize) -> bool {
        self.inner().slots.get(member).is_some_and(|slot| slot.removed)
    }

    /// How often a member was started.
    pub fn starts(&self, member: usize) -> u64 {
        self.inner().slots.get(member).map_or(0, |slot| slot.starts)
    }

    /// A member's id, once it has one.
    pub fn id(&self, member: usize) -> Option<u64> {
        self.inner().slots.get(member)?.identity.as_ref().map(|identity| identity.member_id)
    }

    fn up(&self, member: usize) -> Option<(Up, Arc<Life>, CancellationToken)> {
        let inner = self.inner();
        let running = inner.slots.get(member)?.running.as_ref()?;
        Some((running.up.clone()?, running.life.clone(), running.gone.clone()))
    }

    /// The member that leads, as far as some member knows that is up; the one of the highest term.
    pub fn leader(&self) -> Option<usize> {
        let ups: Vec<(usize, Arc<Node>)> =
            (0..self.places()).filter_map(|member| Some((member, self.up(member)?.0.node))).filter(|(_, node)| node.is_leader()).collect();
        ups.into_iter().max_by_key(|(_, node)| node.term()).map(|(member, _)| member)
    }

    /// Calls a member as a client in its process. None when it is not up, or goes before it has answered.
    pub async fn at<T, F>(&self, member: usize, call: impl FnOnce(Client) -> F) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (up, life, gone) = self.up(member)?;
        live(&life, &gone, call(up.client)).await
    }

    async fn at_node<T, F>(&self, member: usize, call: impl FnOnce(Arc<Node>) -> F) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (up, life, gone) = self.up(member)?;
        live(&life, &gone, call(up.node)).await
    }

    /// Has a member add another one. Returns the new one's id; none when the member has gone.
    pub async fn member_add(&self, at: usize, member: usize, learner: bool) -> Option<Result<u64>> {
        self.at_node(at, move |node| async move { node.member_add(&[Self::peer_url(member)], learner).await }).await
    }

    /// Has a member remove one.
    pub async fn member_remove(&self, at: usize, id: u64) -> Option<Result<()>> {
        self.at_node(at, move |node| async move { node.member_remove(id).await }).await
    }

    /// Has a member promote a learner.
    pub async fn member_promote(&self, at: usize, id: u64) -> Option<Result<()>> {
        self.at_node(at, move |node| async move { node.member_promote(id).await }).await
    }

    /// Has every member look after those that are enlisted, as those of nodes do: from its next start on.
    pub fn mind_enlisted(&self, limit: Duration) {
        self.inner().enlist_limit = Some(limit);
    }

    /// Has a member enlist others, in the place of one or of nobody.
    pub async fn member_enlist(&self, at: usize, members: &[usize], replaces: Option<u64>, even_alive: bool) -> Option<Result<()>> {
        let node = |member: usize| (member as u128).to_be_bytes().to_vec().into();
        let members = members.iter().map(|&member| Enlisted { peer_urls: vec![Self::peer_url(member)], node: node(member) });
        let enlist = Enlist { members: members.collect(), replaces: replaces.into_iter().collect(), even_alive };
        self.at_node(at, move |node| async move { node.member_enlist(enlist).await }).await
    }

    /// The sets of those that vote, as a member's log has them, two while one gives way to the other; and whether that is committed.
    pub fn voting(&self, member: usize) -> Option<(Vec<BTreeSet<u64>>, bool)> {
        Some(self.up(member)?.0.node.voting())
    }

    /// Waits until a member's log has a joint membership, or knows that one is committed. None when the member has gone.
    pub async fn until_joint(&self, member: usize, is_committed: bool) -> Option<()> {
        self.at_node(member, move |node| async move { node.until_joint(is_committed).await }).await
    }

    /// Has a member hand its lead over.
    pub async fn move_leader(&self, at: usize, to: u64) -> Option<Result<()>> {
        self.at_node(at, move |node| async move { node.move_leader(to).await }).await
    }
}

/// Runs something as a part of a member's life. None when that ends first.
async fn live<T, F>(life: &Arc<Life>, gone: &CancellationToken, what: F) -> Option<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    let task = tokio::spawn(life.enter(async move {
        // Whoever asked may have given up.
        let _ = tell.send(what.await);
    }));
    // A client that gives up ends its call.
    let _guard = AbortOnDrop(task.abort_handle());
    tokio::select! {
        biased;
        () = gone.cancelled() => None,
        told = told => told.ok(),
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A member's start, as a part of its life.
async fn open(cluster: Arc<Cluster>, member: usize) -> Result<Up> {
    let missing = || Error::Failed("there is no such member".into());
    let (config, surroundings, disk, mem, identity, seed) = {
        let mut inner = cluster.inner();
        let seed: u64 = inner.chance.random();
        let slot = inner.slots.get(member).ok_or_else(missing)?;
        (slot.config.clone(), slot.surroundings.clone(), slot.disk.clone(), slot.mem.reopened(), slot.identity.clone(), seed)
    };
    let identity = match identity {
        Some(identity) => identity,
        None => Identity { incarnation: world::random().max(1), ..Member::identify(&config, &None, &|| false).await? },
    };
    let options = WalOptions { segment_bytes: SEGMENT_BYTES, ..WalOptions::default() };
    let (wal, recovered, stepper) = stepped::open(disk, options)?;
    let wal: Arc<Wal> = Arc::new(wal);
    if recovered.torn.is_some() {
        cluster.note(&format!("member {member} finds a torn write"));
    }
    {
        let mut inner = cluster.inner();
        let slot = inner.slots.get_mut(member).ok_or_else(missing)?;
        slot.identity = Some(identity.clone());
        slot.running.as_mut().ok_or(Error::Stopped)?.stepper = Some(stepper.clone());
    }
    let (from, to) = surroundings.sync_ms;
    let mut chance = StdRng::seed_from_u64(seed);
    let disk_time = move || Duration::from_millis(chance.random_range(from..=to));
    tokio::spawn(world::owned(stepper.clone().drive(disk_time)));
    let (began, rate) = (Instant::now(), surroundings.rate);
    let clock: Clock = Arc::new(move || began.elapsed().mul_f64(rate));
    let member_dir = cluster.dir.join(Cluster::name(member));
    std::fs::create_dir_all(&member_dir).map_err(|err| Error::io("making", &member_dir, err))?;
    let gate = Gate(Arc::new(move || stepper.drain()));
    let history = HistoryOptions { cache_bytes: config.value_cache(), gate: Some(gate) };
    let metrics = Metrics::new(ETCD_VERSION, "3.7");
    let machine = machine_on(&config, Arc::new(mem), &history, &clock, &metrics.counters)?;
    fit(&machine, &wal).await.map_err(Damage::into_error)?;
    let tls = Tls::open(&config)?;
    let place = Place { identity, wal, machine, metrics, history, clock, member_dir, dir: None, tls };
    let assembled = Member::assemble(&config, place).await?;
    let node = assembled.node.clone();
    let client_urls = vec![format!("http://client-of-{}", config.name)];
    let info = Info { client_urls: client_urls.clone(), watch_progress_interval: config.watch_progress_notify_interval };
    let api = Api { node: node.clone(), info: Arc::new(info), stop: CancellationToken::new(), snapshots: Arc::new(Semaphore::new(1)) };
    node.publish(client_urls);
    let limit = cluster.inner().enlist_limit;
    if let Some(limit) = limit {
        node.mind_enlisted(limit);
    }
    Ok(Up { client: Client::local(node.clone(), api), node, _member: Arc::new(assembled) })
}
