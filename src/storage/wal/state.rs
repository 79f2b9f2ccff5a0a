//! What the callers and the two threads of the log share: one state under one lock, which is never held over a file operation.

use super::disk::{Disk, DiskFile};
use super::flusher::Position;
use super::index::{Cache, Places, Terms};
use super::recover::Opening;
use super::{Done, FRAME_OVERHEAD, FSYNC_BUCKETS_SECONDS, LogEntry, LogId, LogState, MARK_BYTES, MAX_QUEUED_BYTES, WalOptions, frame};
use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// The counters behind [`WalMetrics`].
#[derive(Default)]
pub(super) struct Meters {
    pub(super) fsyncs: AtomicU64,
    pub(super) fsync_buckets: [AtomicU64; FSYNC_BUCKETS_SECONDS.len() + 1],
    pub(super) fsync_nanos: AtomicU64,
    pub(super) entries: AtomicU64,
    pub(super) written_bytes: AtomicU64,
}

/// What one call asks to be written.
pub(super) enum Item {
    Entry(LogEntry),
    Truncate(Option<LogId>),
    Purge(LogId),
    Vote(Bytes),
    /// Nothing; its callback waits for what came before.
    Barrier,
}

impl Item {
    /// The bytes of its record.
    pub(super) fn record_len(&self) -> usize {
        match self {
            Item::Entry(entry) => frame::entry_len(entry.payload.len()),
            Item::Truncate(_) | Item::Purge(_) => frame::LOG_ID_RECORD_LEN,
            Item::Vote(bytes) => frame::opaque_len(bytes.len()),
            Item::Barrier => 0,
        }
    }

    /// The most bytes that it takes on disk.
    pub(super) fn cost(&self) -> u64 {
        if let Item::Barrier = self { 0 } else { self.record_len() as u64 + FRAME_OVERHEAD }
    }

    /// What it must leave free at the end of a segment. Purges come before all else: they make room.
    pub(super) fn floor(&self, control_bytes: u64) -> u64 {
        match self {
            Item::Entry(_) => control_bytes,
            Item::Truncate(_) | Item::Vote(_) => control_bytes / 4,
            Item::Purge(_) | Item::Barrier => 0,
        }
    }
}

/// An item on its way to the disk.
pub(super) struct Queued {
    pub(super) item: Item,
    pub(super) ticket: u64,
    pub(super) done: Option<Done>,
}

/// A segment's file.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) sequence: u64,
    pub(super) salt: u64,
    pub(super) capacity: u64,
    pub(super) file: Arc<dyn DiskFile>,
}

impl Segment {
    pub(super) fn name(&self) -> String {
        segment_name(self.sequence)
    }
}

/// The file name of a segment: its sequence in 16 hexadecimal digits.
pub(super) fn segment_name(sequence: u64) -> String {
    format!("{sequence:016x}.log")
}

/// Whether the log's thread has to be woken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sleep {
    /// It will look by itself.
    Awake,
    /// Asleep, but looks after a committed mark by itself soon.
    Nap,
    Deep,
}

/// Everything that the threads share.
pub(super) struct State {
    /// What the callers have asked for, durable or not.
    pub(super) log: LogState,
    pub(super) terms: Terms,
    pub(super) cache: Cache,
    /// Counts the values of `log.committed`, so that the writer sees a new one.
    pub(super) committed_version: u64,
    /// What had been asked for when it was saved: it is not written before all of that is.
    pub(super) committed_ticket: u64,

    pub(super) queue: VecDeque<Queued>,
    /// The cost of everything that is not durable yet, whether in `queue` or already taken by the log's thread.
    pub(super) queued_bytes: u64,
    /// How often something has become durable.
    pub(super) published: u64,
    pub(super) ticket: u64,
    pub(super) sleep: Sleep,

    /// Where durable entries stand, and in which files. The last segment is the one that is written.
    pub(super) places: Places,
    pub(super) segments: BTreeMap<u64, Segment>,
    /// Bytes left in the last segment, but for the mark's.
    pub(super) room: u64,

    /// The segment to come.
    pub(super) next: Option<Segment>,
    /// How large it has to be, if larger than usual.
    pub(super) wanted: u64,
    /// Why there is none, if the last try failed.
    pub(super) low: Option<Error>,
    /// Segments to recycle or remove, oldest first, and files that wait to be used again, with their lengths.
    pub(super) dropped: VecDeque<Segment>,
    pub(super) spares: Vec<(String, u64)>,

    /// Whether what was read is mended, and worked on.
    pub(super) accepted: bool,
    pub(super) failed: Option<Error>,
    pub(super) closing: bool,
    /// The log's thread is done; the other one need not go on.
    pub(super) stopped: bool,
}

pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) options: WalOptions,
    pub(super) state: Mutex<State>,
    /// Wakes the log's thread, and the one that keeps space ready.
    pub(super) work: Condvar,
    pub(super) space: Condvar,
    pub(super) meters: Meters,
    /// There are no threads: who does their work step by step, in a simulation, is told here that there is some.
    #[cfg(feature = "simulation")]
    pub(super) stepper: Option<tokio::sync::Notify>,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before the lock is let go, so a panic elsewhere leaves nothing half done.
        lock(&self.state)
    }

    /// Makes ready to be written to what was read. Returns where to go on.
    pub(super) fn mend(&self, opening: Opening) -> Result<Position> {
        let log = self.lock().log.clone();
        let (position, spares) = opening.mend(&*self.disk, &self.options, &log)?;
        let mut state = self.lock();
        state.segments.insert(position.segment.sequence, position.segment.clone());
        state.room = position.segment.capacity.saturating_sub(MARK_BYTES).saturating_sub(position.offset);
        state.spares = spares;
        Ok(position)
    }

    /// Lets the lock go and wakes the log's thread if it sleeps.
    pub(super) fn wake(&self, mut state: MutexGuard<'_, State>) {
        let asleep = std::mem::replace(&mut state.sleep, Sleep::Awake) != Sleep::Awake;
        drop(state);
        if asleep {
            self.work.notify_one();
            #[cfg(feature = "simulation")]
            if let Some(stepper) = &self.stepper {
                stepper.notify_one();
            }
        }
    }

    /// Whether the work of the threads is done step by step.
    pub(super) fn is_stepped(&self) -> bool {
        #[cfg(feature = "simulation")]
        return self.stepper.is_some();
        #[cfg(not(feature = "simulation"))]
        false
    }

    /// Marks the log as failed; the first error stays.
    pub(super) fn fail(&self, error: Error) {
        tracing::error!(%error, "the log takes no more writes");
        let mut state = self.lock();
        state.failed.get_or_insert(error);
        state.sleep = Sleep::Awake;
        drop(state);
        self.work.notify_one();
        self.space.notify_one();
    }

    /// Syncs a file, counting and measuring.
    pub(super) fn sync(&self, segment: &Segment) -> Result<()> {
        self.measured(|| segment.file.sync().map_err(|e| Error::io("sync", self.disk.path(&segment.name()), e)))
    }

    /// Writes durably behind what stands in a file, counting and measuring.
    pub(super) fn append(&self, segment: &Segment, bytes: &[u8], offset: u64) -> Result<()> {
        self.measured(|| segment.file.append_at(bytes, offset).map_err(|e| Error::io("write and sync", self.disk.path(&segment.name()), e)))
    }

    fn measured(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = self.options.clock.as_ref().map(|clock| clock());
        sync()?;
        self.meters.fsyncs.fetch_add(1, Relaxed);
        if let (Some(clock), Some(start)) = (&self.options.clock, start) {
            let took = clock().saturating_sub(start);
            let bucket = FSYNC_BUCKETS_SECONDS.partition_point(|bound| *bound < took.as_secs_f64());
            self.meters.fsync_buckets[bucket].fetch_add(1, Relaxed);
            self.meters.fsync_nanos.fetch_add(took.as_nanos() as u64, Relaxed);
        }
        Ok(())
    }
}

/// Ends the log if the thread that holds it panics: nobody must wait for ever for a thread that is gone.
pub(super) struct FailOnPanic<'a>(pub(super) &'a Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::Failed("a thread of the log panicked".into()));
            let queue = std::mem::take(&mut self.0.lock().queue);
            // Callbacks that are dropped tell those who wait on their other end.
            drop(queue);
        }
    }
}

impl State {
    /// Whether `bytes` more can be accepted that must leave `floor` of a segment free. `bounded`: the queue's bound holds for it.
    pub(super) fn admit(&self, bytes: u64, floor: u64, bounded: bool) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.closing {
            return Err(Error::Stopped);
        }
        if !self.accepted {
            return Err(Error::Failed("write to the log: it was read, and is not accepted yet".into()));
        }
        if bounded && self.queued_bytes > 0 && self.queued_bytes + bytes > MAX_QUEUED_BYTES {
            return Err(ApplyError::TooManyRequests.into());
        }
        match &self.low {
            Some(low) if self.queued_bytes + bytes + floor > self.room => Err(low.clone()),
            _ => Ok(()),
        }
    }

    /// The bytes of all files.
    pub(super) fn disk_bytes(&self) -> u64 {
        let segments = self.segments.values().chain(&self.next).chain(&self.dropped).map(|segment| segment.capacity);
        segments.chain(self.spares.iter().map(|spare| spare.1)).sum()
    }

    /// The committed mark with its version, if everything that it may speak of is written once `left` of what was taken remains. Entries
    /// are committed by other members' disks, too: a mark ahead of this disk would, after a crash, speak of entries that are not there.
    pub(super) fn writable_committed<'a>(&'a self, left: impl IntoIterator<Item = &'a Queued>) -> (Option<Bytes>, u64) {
        let behind = left.into_iter().chain(self.queue.front()).any(|queued| queued.ticket <= self.committed_ticket);
        if behind { (None, 0) } else { (self.log.committed.clone(), self.committed_version) }
    }

    pub(super) fn enqueue(&mut self, item: Item, done: Option<Done>) {
        self.ticket += 1;
        self.queued_bytes += item.cost();
        self.queue.push_back(Queued { item, ticket: self.ticket, done });
    }
}
