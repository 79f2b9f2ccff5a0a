//! The generator: clients that each have one request under way, on threads of their own.
//!
//! [`run`] makes one round. Every client sets itself up (a stream, a lease), all wait for each other, then the load begins: a while to
//! get warm, the measured time, and the end, when each client finishes what it has under way. CPU and bytes are read once more a moment
//! after the end, over all operations since the first reading; what a server puts off for longer it does in its next round.
//!
//! ```text
//! set up | warm | measured: latencies and operations count | last answers | settle | over
//!               ^ first reading of CPU and bytes                                   ^ second
//! ```
//!
//! The load is closed: a slow server is asked less often, and its quantiles are those of its own pace. [`paced`](crate::pause) does not
//! wait and is used where a stall is to be seen.
//!
//! The clients of one thread share a few connections and one current-thread runtime. Every answer is checked; whatever is not as it
//! must be counts as an error, and a row with errors is no result.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::Request;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::embedded::Direct;
use crate::member::{Cluster, Usage, machine_cpu_us, usage_of};
use crate::requests::{Check, LOAD_BATCH, PUT, RANGE, Stamp, TXN, load_txn, value};
use crate::rows::{FAN_SLOTS, FAN_STREAMS, MIXED_STREAMS, MIXED_WATCHES, RANGE_KEYS, Row, Work};
use crate::stats::{Histogram, Rng};
use crate::streams::{Fan, FanWriter, GrantRevoke, KeepAlive, Mixed, Watches};
use crate::wire::{Channel, Result, block_on};

/// Longest wait for all clients to be set up, and for the last answers. Beyond it the round has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// After the last answer, until CPU and bytes are read: what a server does right after an answer belongs to it; what it puts off for
/// longer falls into its next round, for it stands still while the other is measured.
const SETTLE: Duration = Duration::from_millis(250);
/// Longest time for data to be written before anything is measured.
const BULK_PATIENCE: Duration = Duration::from_secs(3600);
/// A client that saw an error waits this long, so that a dead server is not asked a million times.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// Transactions under way while data are loaded.
const LOAD_CLIENTS: u64 = 16;
/// Connections that carry them.
const LOAD_CONNECTIONS: usize = 4;
/// Transactions between two signs of progress.
const LOAD_PROGRESS: u64 = 500;

/// How a row is measured.
#[derive(Clone)]
pub struct Settings {
    /// Keys in the store.
    pub keys: u64,
    pub value_bytes: usize,
    /// Connections at most; never more than clients.
    pub connections: usize,
    pub threads: usize,
    pub warm: Duration,
    pub measured: Duration,
}

/// What one round of one row gave.
#[derive(Clone, Debug, Default)]
pub struct Round {
    pub seconds: f64,
    pub operations: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    pub errors: u64,
    pub first_error: Option<String>,
    /// Operations between the two readings of CPU and bytes: some more than were measured.
    pub weighed_operations: u64,
    pub server: Option<Usage>,
    pub generator_cpu_us: f64,
    /// CPU of everything that is neither server nor generator, as a share of the machine: how much the round was disturbed.
    pub others: Option<f64>,
}

impl Round {
    pub fn per_second(&self) -> f64 {
        self.operations as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    pub fn per_operation(&self, sum: f64) -> f64 {
        if self.weighed_operations == 0 { f64::NAN } else { sum / self.weighed_operations as f64 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    SetUp,
    Warm,
    Measured,
    Last,
    Over,
}

/// What a thread's clients count together.
struct Tally {
    histogram: Histogram,
    operations: u64,
    /// Operations that ended after the measured time.
    late: u64,
    errors: u64,
    first_error: Option<String>,
}

enum Signal {
    Ready,
    Finished,
    /// The thread could not even connect.
    Failed(String),
}

/// What the clients of one thread have in common.
pub struct Shared {
    phase: watch::Receiver<Phase>,
    tally: Mutex<Tally>,
    signals: Sender<Signal>,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn fail(&self, error: impl ToString) {
        let mut tally = self.tally();
        tally.errors += 1;
        tally.first_error.get_or_insert_with(|| error.to_string());
    }

    fn count(&self, operations: u64, latency: Duration) {
        let phase = *self.phase.borrow();
        let mut tally = self.tally();
        match phase {
            Phase::SetUp | Phase::Warm => {}
            Phase::Measured => {
                tally.operations += operations;
                tally.histogram.record(latency);
            }
            Phase::Last | Phase::Over => {
                // It was begun in the measured time: it is no part of the throughput, but how long it took counts.
                tally.late += operations;
                tally.histogram.record(latency);
            }
        }
    }
}

/// One client: it has one operation under way, always.
pub trait Client: Send + 'static {
    fn set_up(&mut self) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// One operation, as the row counts them, or several at once. What it takes is one latency.
    fn step(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

async fn drive(mut client: impl Client, shared: Arc<Shared>) {
    let mut phase = shared.phase.clone();
    let set_up = client.set_up().await;
    let _ = shared.signals.send(Signal::Ready);
    match set_up {
        Err(error) => shared.fail(error),
        Ok(()) => {
            if phase.wait_for(|phase| *phase > Phase::SetUp).await.is_err() {
                return;
            }
            while *phase.borrow() < Phase::Last {
                let began = Instant::now();
                match client.step().await {
                    Ok(operations) => shared.count(operations, began.elapsed()),
                    Err(error) => {
                        shared.fail(error);
                        tokio::time::sleep(AFTER_ERROR).await;
                    }
                }
            }
        }
    }
    let _ = shared.signals.send(Signal::Finished);
    // Streams stay open until CPU and bytes are read: to close a thousand is work for the server.
    let _ = phase.wait_for(|phase| *phase == Phase::Over).await;
}

/// One round of one row against one side.
pub fn run(cluster: &Cluster, row: &Row, settings: &Settings) -> Result<Round> {
    let (phase, watcher) = watch::channel(Phase::SetUp);
    let (signals, inbox) = channel();
    // All writers of a fan wait for the same watchers, so they share a thread.
    let threads = if matches!(row.work, Work::Fan { .. }) { 1 } else { settings.threads.clamp(1, row.clients) };
    let mut workers = Vec::new();
    for thread in 0..threads {
        let job = Job {
            row: *row,
            settings: settings.clone(),
            endpoints: cluster.endpoints.clone(),
            direct: cluster.direct.clone(),
            clients: (thread..row.clients).step_by(threads).collect(),
            connections: settings.connections.div_ceil(threads),
        };
        let shared = Shared { phase: watcher.clone(), tally: Mutex::new(Tally::new()), signals: signals.clone() };
        workers.push(thread::Builder::new().name(format!("load-{thread}")).spawn(move || job.work(Arc::new(shared)))?);
    }
    drop((signals, watcher));

    // Whatever fails from here on, dropping `phase` ends the workers.
    let mut inbox = Inbox { signals: inbox, ready: 0, finished: 0 };
    let mut round = Round::default();
    inbox.wait("could not be set up", |inbox| row.clients - inbox.ready)?;
    phase.send_replace(Phase::Warm);
    thread::sleep(settings.warm);
    let weighed = (Instant::now(), cluster.usage(), usage_of("self"), machine_cpu_us());
    phase.send_replace(Phase::Measured);
    let began = Instant::now();
    thread::sleep(settings.measured);
    phase.send_replace(Phase::Last);
    round.seconds = began.elapsed().as_secs_f64();
    let answered = inbox.wait("had no answer at the end", |inbox| row.clients - inbox.finished);
    let generator = usage_of("self");
    thread::sleep(SETTLE);
    round.weigh(weighed, cluster.usage(), generator, machine_cpu_us());
    if let Err(error) = answered {
        round.errors += 1;
        round.first_error = Some(error.to_string());
        drop(phase);
    } else {
        phase.send_replace(Phase::Over);
    }

    let mut histogram = Histogram::new();
    for worker in workers {
        let tally = worker.join().map_err(|_| "a thread of the generator panicked")?;
        histogram.merge(&tally.histogram);
        round.operations += tally.operations;
        round.weighed_operations += tally.operations + tally.late;
        round.errors += tally.errors;
        round.first_error = round.first_error.or(tally.first_error);
    }
    (round.p50_us, round.p99_us, round.max_us) = (histogram.quantile_us(0.5), histogram.quantile_us(0.99), histogram.max_us());
    Ok(round)
}

/// Counts what the clients signal.
struct Inbox {
    signals: Receiver<Signal>,
    ready: usize,
    finished: usize,
}

impl Inbox {
    fn wait(&mut self, what: &str, missing: impl Fn(&Self) -> usize) -> Result<()> {
        let began = Instant::now();
        while missing(self) > 0 {
            match self.signals.recv_timeout(PATIENCE.saturating_sub(began.elapsed())) {
                Ok(Signal::Ready) => self.ready += 1,
                Ok(Signal::Finished) => self.finished += 1,
                Ok(Signal::Failed(error)) => return Err(error.into()),
                Err(RecvTimeoutError::Timeout) => return Err(format!("{} clients {what}", missing(self)).into()),
                Err(RecvTimeoutError::Disconnected) => return Err("the generator's threads are gone".into()),
            }
        }
        Ok(())
    }
}

impl Round {
    fn weigh(
        &mut self,
        (since, server, generator, machine): (Instant, Option<Usage>, Option<Usage>, Option<f64>),
        server_now: Option<Usage>,
        generator_now: Option<Usage>,
        machine_now: Option<f64>,
    ) {
        if let (Some(then), Some(now)) = (server, server_now) {
            self.server = Some(Usage {
                cpu_us: now.cpu_us - then.cpu_us,
                rss_bytes: now.rss_bytes,
                written_bytes: now.written_bytes - then.written_bytes,
            });
        }
        if let (Some(then), Some(now)) = (generator, generator_now) {
            self.generator_cpu_us = now.cpu_us - then.cpu_us;
        }
        if let (Some(then), Some(now), Some(server)) = (machine, machine_now, self.server) {
            let cores = thread::available_parallelism().map_or(1, usize::from) as f64;
            let all = since.elapsed().as_micros() as f64 * cores;
            self.others = Some(((now - then - server.cpu_us - self.generator_cpu_us) / all).max(0.0));
        }
    }
}

impl Tally {
    fn new() -> Self {
        Self { histogram: Histogram::new(), operations: 0, late: 0, errors: 0, first_error: None }
    }
}

/// What one thread has to do.
struct Job {
    row: Row,
    settings: Settings,
    endpoints: Vec<String>,
    direct: Option<quorate::Client>,
    /// Numbers of this thread's clients, of all clients of the row.
    clients: Vec<usize>,
    connections: usize,
}

impl Job {
    fn work(self, shared: Arc<Shared>) -> Tally {
        let done = block_on(async {
            let mut tasks = JoinSet::new();
            self.spawn(&mut tasks, &shared).await?;
            // A round that has failed drops the phase; then nobody waits for answers any more.
            let mut phase = shared.phase.clone();
            let all = async { while tasks.join_next().await.is_some() {} };
            tokio::select! {
                () = all => {},
                () = async { while phase.changed().await.is_ok() {} } => {},
            }
            Ok(())
        });
        if let Err(error) = done {
            let _ = shared.signals.send(Signal::Failed(error.to_string()));
        }
        std::mem::replace(&mut *shared.tally(), Tally::new())
    }

    async fn spawn(&self, tasks: &mut JoinSet<()>, shared: &Arc<Shared>) -> Result<()> {
        if let Some(direct) = &self.direct {
            for client in &self.clients {
                let direct = Direct::new(direct.clone(), self.row.work, *client, self.settings.keys, self.settings.value_bytes);
                tasks.spawn(drive(direct, shared.clone()));
            }
            return Ok(());
        }
        let mut channels = Vec::new();
        for index in 0..self.connections.clamp(1, self.clients.len().max(1)) {
            let endpoint = self.endpoints.get(index % self.endpoints.len().max(1)).ok_or("no endpoints")?;
            channels.push(Channel::connect(endpoint).await?);
        }
        let channel = |index: usize| channels.get(index % channels.len()).expect("there is at least one").clone();
        let mine = || self.clients.iter().enumerate().map(|(index, client)| (*client, channel(index)));
        let keys = self.settings.keys;
        let stamped = |stamp: Stamp, method: &str, span: u64, check: Check, tasks: &mut JoinSet<()>| {
            let stamp = Arc::new(stamp);
            for (client, channel) in mine() {
                let unary = Unary {
                    method: channel.method(method),
                    channel,
                    stamp: stamp.clone(),
                    starts: keys.saturating_sub(span) + 1,
                    span,
                    check,
                    rng: Rng::new(client as u64),
                    buffer: BytesMut::new(),
                };
                tasks.spawn(drive(unary, shared.clone()));
            }
        };
        match self.row.work {
            Work::Put | Work::Null => stamped(Stamp::put(self.settings.value_bytes), PUT, 1, Check::Put, tasks),
            Work::Get { serializable } => stamped(Stamp::get(serializable), RANGE, 1, Check::Range(1), tasks),
            Work::Range | Work::NullRange => stamped(Stamp::range(), RANGE, RANGE_KEYS, Check::Range(RANGE_KEYS), tasks),
            Work::Txn => stamped(Stamp::txn(self.settings.value_bytes), TXN, 1, Check::Txn, tasks),
            Work::Fan { watchers } => {
                let fan = Arc::new(Fan::new(FAN_SLOTS, watchers));
                for stream in 0..FAN_STREAMS {
                    fan.clone().watch(&mut channel(stream), watchers / FAN_STREAMS, shared.clone()).await?;
                }
                for (client, channel) in mine() {
                    tasks.spawn(drive(FanWriter::new(fan.clone(), client, channel, self.settings.value_bytes), shared.clone()));
                }
            }
            Work::KeepAlive => {
                for (client, channel) in mine() {
                    tasks.spawn(drive(KeepAlive::new(client, channel), shared.clone()));
                }
            }
            Work::GrantRevoke => {
                for (_, channel) in mine() {
                    tasks.spawn(drive(GrantRevoke::new(channel), shared.clone()));
                }
            }
            Work::Mixed => {
                // Each thread keeps its share of the watches alive.
                let share = (MIXED_WATCHES * self.clients.len()).div_ceil(self.row.clients * MIXED_STREAMS);
                let mut streams = Vec::new();
                for stream in 0..MIXED_STREAMS {
                    streams.push(Watches::open(&mut channel(stream), shared.clone()).await?);
                }
                let mut rng = Rng::new(keys);
                for watches in &streams {
                    for _ in 0..share {
                        watches.start(&mut rng, keys).await?;
                    }
                }
                for (client, channel) in mine() {
                    let watches = streams.get(client % streams.len()).expect("there are some").clone();
                    let place = (client as u64, self.row.clients as u64);
                    tasks.spawn(drive(Mixed::new(channel, watches, place, keys, self.settings.value_bytes), shared.clone()));
                }
            }
        }
        Ok(())
    }
}

/// A client that sends one kind of request for random keys.
struct Unary {
    channel: Channel,
    method: Request<()>,
    stamp: Arc<Stamp>,
    /// Keys that a range of `span` may begin at.
    starts: u64,
    span: u64,
    check: Check,
    rng: Rng,
    buffer: BytesMut,
}

impl Client for Unary {
    async fn step(&mut self) -> Result<u64> {
        let first = self.rng.below(self.starts);
        let frame = self.stamp.fill(&mut self.buffer, first, first + self.span, self.rng.next());
        let answer = self.channel.unary(&self.method, frame).await?;
        self.check.check(&answer)?;
        Ok(1)
    }
}

/// Writes the keys below `keys`, in transactions of [`LOAD_BATCH`] puts, once for each version wanted. `progress` hears now and then how
/// many puts were sent.
pub fn load(cluster: &Cluster, keys: u64, versions: u64, value_bytes: usize, progress: fn(u64)) -> Result<()> {
    for version in 0..versions {
        let value = Bytes::from(value(value_bytes));
        bulk(cluster, TXN, keys.div_ceil(LOAD_BATCH), LOAD_CLIENTS, move |batch, _| {
            let first = batch * LOAD_BATCH;
            if batch.is_multiple_of(LOAD_PROGRESS) {
                progress(version * keys + first);
            }
            load_txn(first..(first + LOAD_BATCH).min(keys), &value)
        })?;
    }
    Ok(())
}

/// Sends a number of requests, so many of them under way at any time. `make` gets ascending numbers, and a buffer to use.
pub fn bulk(
    cluster: &Cluster,
    method: &str,
    requests: u64,
    clients: u64,
    make: impl Fn(u64, &mut BytesMut) -> Bytes + Send + Sync + 'static,
) -> Result<()> {
    let shared = Arc::new((AtomicU64::new(0), make));
    let all = async {
        let mut channels = Vec::new();
        for endpoint in cluster.endpoints.iter().cycle().take(cluster.endpoints.len().max(LOAD_CONNECTIONS)) {
            channels.push(Channel::connect(endpoint).await?);
        }
        let mut tasks = JoinSet::new();
        for (_, channel) in (0..clients.min(requests)).zip(channels.iter().cycle()) {
            let (mut channel, mut buffer, shared) = (channel.clone(), BytesMut::new(), shared.clone());
            let method = channel.method(method);
            tasks.spawn(async move {
                loop {
                    let number = shared.0.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return Ok(());
                    }
                    channel.unary(&method, (shared.1)(number, &mut buffer)).await?;
                }
            });
        }
        while let Some(task) = tasks.join_next().await {
            let done: Result<()> = task?;
            done?;
        }
        Ok(())
    };
    block_on(async { tokio::time::timeout(BULK_PATIENCE, all).await.unwrap_or_else(|_| Err("the data were not written in time".into())) })
}
