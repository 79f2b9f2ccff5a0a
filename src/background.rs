//! The background writer: one thread that takes applied state to the storage and keeps the storage in shape.
//!
//! Nothing a client waits for happens here. What has been applied is in memory, and in the Raft log on disk; this thread
//! packs it into the storage every [`WRITE_INTERVAL`] or [`WRITE_BYTES`], syncs it every [`SYNC_INTERVAL`] so that the log may be cut off
//! below, carries out compactions, and gives space back. Each of its steps is bounded, so that it can turn to the next
//! matter, and stop, within milliseconds. While clients write, it works [gently](crate::pace), in smaller steps and a third of the time,
//! until so much waits that it would not keep up; a stop then waits for up to a turn of that.
//!
//! ```text
//! apply -> tail (memory) --write_out--> storage --sync--> durable up to entry 900 -> the log before 900 may go
//! ```
//!
//! It works on the store that is the member's [at the time](Current). When a snapshot has put another one in its place, the old one is
//! let go of at the next turn, with all that was to be written: nothing of it is wanted any more.
//!
//! # Compaction
//! It goes in rounds of at most about [`COMPACT_TIME`], and what a round has marked dead is written out before the next one, so that
//! neither the memory for it grows nor the batch. It needs no log entry to follow: also an idle store gets its space back. A
//! compaction counts as [carried out](Background::compacted) when its deaths have been given to the storage.
//!
//! # When the disk is full
//! Writing out fails, and the tail stays in memory; [`Background::is_full`] tells the node, which then refuses requests
//! that need space and goes on with those that free it. Every [`FULL_RETRY`] the storage is opened anew and the write is
//! tried again; once it succeeds, all is as before. Any other failure is final: the member stops.
//!
//! Compaction goes on meanwhile, in memory, up to [`DEATHS_HIGH`]: what dies in the tail need never be written. The batch that
//! failed stays as it is, at most some MiB: it is published, with its number and its place in the digest, and a part of what
//! follows may be in it. A compaction that finds anything is carried out only when that batch and its own deaths fit.
//!
//! # When a rewrite fails
//! The live files go on unharmed, so it is no reason to refuse or to stop anything, be it for want of space (a rewrite needs
//! room for a second copy) or of file descriptors. Who asked for it gets the error, and it is not begun again by itself before
//! [`REWRITE_REST`] has passed. Only damage that the copy comes upon is final, as wherever damage is met; and when the live
//! files themselves have failed, the next write says so.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::mvcc::{Current, Store};
use crate::pace::{Activity, REST, breathe, gently, is_gentle};
use crate::raft::apply::Clock;
use crate::storage::Backend;

/// How often the thread looks whether there is something to do.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How long applied state waits in memory before it is written out, and how much of it does not wait longer than for the next look. The more
/// goes out at a time, the less of it shares pages with what is there and is written twice. With this, and places held for what is to
/// come, a put of 64 clients wrote 1.0 kB where it had written 2.8.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);
const WRITE_BYTES: u64 = 2 * 1024 * 1024;

/// How long written state waits before it is synced, and with it the longest stretch of log that a start replays.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// How long to wait before trying a full disk again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// Steps of compaction between two writes, and the time after which no further one is begun: a step is bounded in keys and
/// bytes, but a disk may be slow to read them. 16 steps mark at most 16,384 deaths. While clients write it is two: sled takes the changes of
/// a batch in one go, half a millisecond for each thousand deaths.
const COMPACT_STEPS: usize = 16;
const GENTLE_STEPS: usize = 2;
const COMPACT_TIME: Duration = Duration::from_millis(10);

/// Rest after each step of compaction. The lock that steps share with requests goes to whoever is awake when it is given up: without
/// a rest that is the next step, not the request that is being woken.
const STEP_REST: Duration = Duration::from_micros(100);

/// While clients write, the work is done [gently](crate::pace): disk and processors are theirs first, unless so many bytes wait to be written
/// out that it would not keep up.
const GENTLE_BYTES: u64 = 4 * WRITE_BYTES;

/// Deaths that may wait in memory while the disk is full, some 64 MiB; beyond it compaction waits too.
const DEATHS_HIGH: usize = 1 << 20;

/// How long after a rewrite that failed, or that had filled the disk, none is begun unless somebody asks for one.
const REWRITE_REST: Duration = Duration::from_secs(10 * 60);

/// Bytes that one step of tidying up may rewrite, and while clients write: a write to the log waits for the disk to have taken them.
const STEP_BYTES: usize = 256 << 10;
const GENTLE_STEP_BYTES: usize = 64 << 10;

/// The storage is rewritten into fresh files when it takes more than two and a half times its live bytes and this on disk,
/// and has grown well beyond what the last rewrite left.
const REWRITE_BYTES_MIN: u64 = 64 << 20;

/// What the thread tells the node.
pub(crate) trait Events: Send + 'static {
    /// The state is on disk up to the entry that these bytes were committed with.
    fn durable(&self, applied: Bytes);
    /// A compaction has been carried out.
    fn compacted(&self);
    /// The storage has failed for good.
    fn failed(&self, err: Error);
}

#[derive(Default)]
struct Wants {
    stop: bool,
    wake: bool,
    defragment: Vec<oneshot::Sender<Result<()>>>,
}

struct Shared {
    wants: Mutex<Wants>,
    woken: Condvar,
    full: AtomicBool,
    rewriting: AtomicBool,
    /// Nothing more is to be written out.
    hurry: AtomicBool,
    compacted: watch::Sender<i64>,
    /// As `woken`, for a simulation's task.
    #[cfg(feature = "simulation")]
    nudged: tokio::sync::Notify,
}

impl Shared {
    fn nudge(&self) {
        self.woken.notify_one();
        #[cfg(feature = "simulation")]
        self.nudged.notify_one();
    }
}

/// A handle on the thread; [`stop`](Self::stop) joins it.
pub(crate) struct Background {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Background {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Io` when the system gives no thread.
    pub fn start(current: Arc<Current>, events: impl Events, name: &str, clock: Clock, counters: Arc<Counters>) -> Result<Background> {
        let store = current.get();
        let backend = store.history().backend().clone();
        let compacted = watch::Sender::new(store.compaction_done());
        let (full, rewriting, hurry) = Default::default();
        let shared = Arc::new(Shared {
            wants: Mutex::default(),
            woken: Condvar::new(),
            full,
            rewriting,
            hurry,
            compacted,
            #[cfg(feature = "simulation")]
            nudged: tokio::sync::Notify::new(),
        });
        let synced = clock();
        let worker = Worker {
            current,
            store,
            backend,
            events: Box::new(events),
            shared: shared.clone(),
            clock,
            counters,
            dirty: false,
            rewriting: Vec::new(),
            copying: false,
            rewritten: 0,
            began: None,
            rest_until: Duration::ZERO,
            unwritten: false,
            failed: false,
            activity: Activity::default(),
            synced,
            tried: Duration::ZERO,
        };
        #[cfg(feature = "simulation")]
        if crate::world::is_simulated() {
            tokio::spawn(crate::world::owned(worker.run_as_task()));
            return Ok(Background { shared, thread: Mutex::new(None) });
        }
        let thread = std::thread::Builder::new().name(format!("quorate-store-{name}")).spawn(move || worker.run());
        let thread = thread.map_err(|err| Error::io("starting the background writer of", name, err))?;
        Ok(Background { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Whether the disk was full when the state was last written out.
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed)
    }

    /// Whether the storage is being rewritten.
    pub fn is_rewriting(&self) -> bool {
        self.shared.rewriting.load(Ordering::Relaxed)
    }

    /// Whether the thread is there to do what it is asked.
    pub fn is_at_work(&self) -> bool {
        #[cfg(feature = "simulation")]
        if crate::world::is_simulated() {
            return true;
        }
        lock(&self.thread).as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Has the thread look around now: there is much to write, or a compaction to do.
    pub fn wake(&self) {
        lock(&self.shared.wants).wake = true;
        self.shared.nudge();
    }

    /// Rewrites the storage into fresh files that take no more than they need, while it goes on being used.
    pub async fn defragment(&self) -> Result<()> {
        let (done, wait) = oneshot::channel();
        {
            let mut wants = lock(&self.shared.wants);
            if wants.stop {
                return Err(Error::Stopped);
            }
            wants.defragment.push(done);
        }
        self.shared.nudge();
        wait.await.unwrap_or(Err(Error::Stopped))
    }

    /// The revision up to which compactions have been carried out and written out, as it moves.
    pub fn compacted(&self) -> watch::Receiver<i64> {
        self.shared.compacted.subscribe()
    }

    /// Has the [stop](Self::stop) write nothing out, as after a crash: the log has it all, and the next start takes longer.
    pub fn hurry(&self) {
        self.shared.hurry.store(true, Ordering::Relaxed);
    }

    /// Writes out and syncs what there is, and joins the thread. It blocks: not for async threads.
    pub fn stop(&self) {
        lock(&self.shared.wants).stop = true;
        self.shared.nudge();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // A panic in it has been reported by the panic hook; there is nothing left to do about it here.
            let _ = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    current: Arc<Current>,
    /// The store it works on, and where that is stored.
    store: Arc<Store>,
    backend: Arc<dyn Backend>,
    events: Box<dyn Events>,
    shared: Arc<Shared>,
    clock: Clock,
    counters: Arc<Counters>,
    /// Something was written since the last sync.
    dirty: bool,
    /// Who waits for the rewrite under way.
    rewriting: Vec<oneshot::Sender<Result<()>>>,
    /// A rewrite is under way; and what the storage took on disk after the last one, in bytes.
    copying: bool,
    rewritten: u64,
    /// When the rewrite under way began.
    began: Option<Duration>,
    /// Until then no rewrite is begun unasked.
    rest_until: Duration,
    /// Compaction has marked deaths that the storage has not got yet.
    unwritten: bool,
    failed: bool,
    /// Of the store's revision.
    activity: Activity,
    /// When the storage was last synced, and last given anything.
    synced: Duration,
    tried: Duration,
}

impl Worker {
    fn run(mut self) {
        let turns = std::panic::AssertUnwindSafe(|| {
            let mut rest = Some(LOOK_INTERVAL);
            while let Some(wait) = rest {
                let full = self.shared.full.load(Ordering::Relaxed);
                let wants = self.wait(wait);
                let gentle = !wants.stop && self.is_shared();
                rest = gently(gentle, || self.turn(full, wants));
            }
        });
        if std::panic::catch_unwind(turns).is_err() {
            // Without it nothing would come to the disk any more, and nobody would know why.
            self.events.failed(Error::Failed("the thread that writes the state has panicked".into()));
        }
    }

    /// As [`run`](Self::run), in a simulation: the others go on between two turns.
    #[cfg(feature = "simulation")]
    async fn run_as_task(mut self) {
        let shared = self.shared.clone();
        let mut rest = Some(LOOK_INTERVAL);
        while let Some(wait) = rest {
            let full = shared.full.load(Ordering::Relaxed);
            let _ = tokio::time::timeout(wait.max(Duration::from_millis(1)), shared.nudged.notified()).await;
            let wants = self.wait(Duration::ZERO);
            rest = self.turn(full, wants);
        }
    }

    /// Does what is to be done. Returns how long to rest before the next turn; none after the last.
    fn turn(&mut self, full: bool, wants: Wants) -> Option<Duration> {
        let Wants { stop, wake, defragment } = wants;
        if stop && self.shared.hurry.load(Ordering::Relaxed) {
            return None;
        }
        self.follow();
        let began = (self.clock)();
        let ask_rewrite = !defragment.is_empty();
        self.rewriting.extend(defragment);
        let must_sync = stop || ask_rewrite || began.saturating_sub(self.synced) >= SYNC_INTERVAL;
        let mut busy = !self.failed && !stop && self.compact().unwrap_or_else(|err| self.fault(err));
        // A full disk is not tried again after each round of compaction.
        if full && !stop && !ask_rewrite && (self.clock)().saturating_sub(self.tried) < FULL_RETRY {
            return Some(if busy { Duration::ZERO } else { FULL_RETRY });
        }
        // Deaths go out at once, for the next round of compaction waits for it. While one only gathers, what clients write waits as otherwise.
        let history = self.store.history();
        let waited = (self.clock)().saturating_sub(self.tried) >= WRITE_INTERVAL;
        let due = must_sync || full || wake || waited || history.deaths_waiting() > 0 || history.stats().tail_bytes >= WRITE_BYTES;
        let written = if self.failed {
            Err(Error::Stopped)
        } else if due {
            self.write(must_sync)
        } else {
            Ok(())
        };
        if must_sync {
            self.synced = (self.clock)();
        }
        if stop {
            return None;
        }
        let tidied = written.and_then(|()| {
            self.unwritten &= self.store.history().deaths_waiting() > 0;
            self.tidy(ask_rewrite, busy)
        });
        busy |= tidied.unwrap_or_else(|err| self.fault(err));
        self.tell_compacted();
        if due {
            self.tried = (self.clock)();
        }
        Some(if self.store.history().is_behind() && !self.failed {
            // Writers are held back until this has caught up.
            Duration::ZERO
        } else if busy {
            if is_gentle() { REST } else { Duration::ZERO }
        } else if self.shared.full.load(Ordering::Relaxed) {
            FULL_RETRY
        } else {
            LOOK_INTERVAL
        })
    }

    /// Whether clients write, and this keeps up with them.
    fn is_shared(&mut self) -> bool {
        self.activity.is_recent((self.clock)(), self.store.revision()) && self.store.history().stats().tail_bytes < GENTLE_BYTES
    }

    /// Goes over to another store, if the member has.
    fn follow(&mut self) {
        if self.current.is(&self.store) {
            return;
        }
        tracing::debug!("the background writer goes over to another store");
        self.end_rewrite(&Err(Error::Failed("a snapshot from the leader has taken the storage's place".into())));
        self.store = self.current.get();
        self.backend = self.store.history().backend().clone();
        self.shared.full.store(false, Ordering::Relaxed);
        (self.dirty, self.unwritten, self.rewritten, self.rest_until) = (false, false, 0, Duration::ZERO);
    }

    /// Tells how far compaction has come, once the storage has got what it marked.
    fn tell_compacted(&self) {
        if self.unwritten {
            return;
        }
        let done = self.store.compaction_done();
        if self.shared.compacted.send_if_modified(|before| std::mem::replace(before, done) != done) {
            self.events.compacted();
        }
    }

    /// Sleeps until it is time, or somebody wants something.
    fn wait(&self, wait: Duration) -> Wants {
        let mut wants = lock(&self.shared.wants);
        if !wants.stop && !wants.wake && wants.defragment.is_empty() && !wait.is_zero() {
            wants = self.shared.woken.wait_timeout(wants, wait).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        Wants { stop: wants.stop, wake: std::mem::take(&mut wants.wake), defragment: std::mem::take(&mut wants.defragment) }
    }

    /// Writes out what was applied, and syncs if it is time. A full disk is waited out here, up to the next round.
    fn write(&mut self, sync: bool) -> Result<()> {
        if self.shared.full.load(Ordering::Relaxed) {
            // The handle that failed takes no more; a new one may find space.
            self.backend.reopen()?;
        }
        let began = (self.clock)();
        // Once: what is applied meanwhile waits for its own turn. Small batches cost most, in syncs and in bytes.
        if self.store.history().write_out()? {
            self.dirty = true;
            self.counters.backend_commit.observe((self.clock)().saturating_sub(began));
        }
        if sync && self.dirty {
            if let Some(applied) = self.store.history().sync()? {
                self.events.durable(applied);
            }
            self.dirty = false;
        }
        if self.shared.full.swap(false, Ordering::Relaxed) {
            tracing::info!("the disk takes writes again");
        }
        Ok(())
    }

    /// Notes a failure. A full disk passes; everything else is final.
    fn fault(&mut self, err: Error) -> bool {
        if self.failed {
            return false;
        }
        if !self.current.is(&self.store) {
            tracing::info!(error = %err, "the storage that a snapshot has replaced has failed");
            return false;
        }
        if err.is_disk_full() {
            if !self.shared.full.swap(true, Ordering::Relaxed) {
                tracing::error!(error = %err, "the disk is full: writes that need space are refused until it is not");
            }
        } else {
            self.failed = true;
            tracing::error!(error = %err, "the storage has failed");
            self.events.failed(err.clone());
        }
        // A rewrite under way is given up, now or before the next write.
        if self.copying {
            // It may be what has filled the disk.
            self.rest_until = (self.clock)() + REWRITE_REST;
        }
        self.end_rewrite(&Err(err));
        false
    }

    /// Answers those who wait for the rewrite under way.
    fn end_rewrite(&mut self, outcome: &Result<()>) {
        self.copying = false;
        self.began = None;
        self.shared.rewriting.store(false, Ordering::Relaxed);
        for done in self.rewriting.drain(..) {
            let _ = done.send(outcome.clone());
        }
    }

    /// A round of compaction, in memory. Returns whether there is more to do at once.
    fn compact(&mut self) -> Result<bool> {
        if self.store.history().deaths_waiting() >= DEATHS_HIGH {
            return Ok(false);
        }
        let began = (self.clock)();
        let mut marked = 0;
        for _ in 0..COMPACT_STEPS {
            let Some(removed) = self.store.compact_step()? else { return Ok(false) };
            self.counters.compacted_keys.add(removed as u64);
            self.unwritten |= removed > 0;
            if (self.clock)().saturating_sub(began) >= COMPACT_TIME {
                break;
            }
            #[cfg(feature = "simulation")]
            if crate::world::is_simulated() {
                continue;
            }
            marked += usize::from(removed > 0);
            if is_gentle() && marked == GENTLE_STEPS {
                break;
            }
            breathe();
            std::thread::sleep(STEP_REST);
        }
        Ok(true)
    }

    /// Collects and rewrites, a bounded piece of each. Returns whether there is more to do at once.
    fn tidy(&mut self, ask_rewrite: bool, busy: bool) -> Result<bool> {
        let more = self.store.history().collect(step_bytes())?;
        breathe();
        let stats = self.store.history().stats();
        let wasteful = stats.disk_bytes > stats.live_bytes / 2 * 5 + REWRITE_BYTES_MIN && stats.disk_bytes > self.rewritten / 5 * 7;
        let rested = (self.clock)() >= self.rest_until;
        match self.rewrite(ask_rewrite || (wasteful && rested && !busy && !more)) {
            Ok(copying) => Ok(more || copying),
            Err(err @ Error::Corrupt { .. }) => Err(err),
            Err(err) => {
                tracing::warn!(error = %err, rest = ?REWRITE_REST, "rewriting the storage failed; it goes on as it is");
                self.rest_until = (self.clock)() + REWRITE_REST;
                self.end_rewrite(&Err(err));
                Ok(more)
            }
        }
    }

    /// Begins a rewrite, or goes on with the one under way. Returns whether there is more to copy.
    fn rewrite(&mut self, begin: bool) -> Result<bool> {
        if begin {
            self.backend.start_rewrite()?;
            self.began.get_or_insert((self.clock)());
            self.shared.rewriting.store(true, Ordering::Relaxed);
        }
        let more = self.backend.rewrite_step(step_bytes())?;
        if !more && self.copying {
            self.rewritten = self.backend.disk_bytes();
        }
        self.copying = more;
        if !more {
            if let Some(began) = self.began {
                self.counters.defragment.observe((self.clock)().saturating_sub(began));
            }
            self.end_rewrite(&Ok(()));
        }
        Ok(more)
    }
}

/// Bytes that a step of tidying up may rewrite now.
fn step_bytes() -> usize {
    if is_gentle() { GENTLE_STEP_BYTES } else { STEP_BYTES }
}

#[cfg(test)]
mod tests;
