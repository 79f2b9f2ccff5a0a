//! The Raft log on disk: segments of our own, with group commit.
//!
//! # Idea
//! Whatever waits is written as one *frame*: one write that returns when it is on the disk (direct, or followed by fdatasync: see
//! `wal/disk.rs`), then every callback, in order. The next frame is written only after that. So at most one frame is ever in doubt, and
//! what a file looks like after a crash says which: bytes that are not a frame, with nothing of the log after them, are that one frame,
//! torn, and are cut off. Anything else that cannot be read is damage, and the log refuses to open, naming file and offset.
//!
//! ```text
//! append ->  queue ->  [frame 7 ................][mark 7]        one segment file, written ahead with zeros
//!            cache      opening entry entry vote  "7 is on disk"
//! ```
//!
//! A segment has 64 MiB; the first of a new log is smaller, so that a start need not wait for it, and so are those made on a disk that has
//! no room for two whole ones.
//!
//! When nothing has come for a moment, a *mark* is written behind the last frame, without a sync of its own: it says that the frame had reached the
//! disk, and holds the newest committed log id. The next frame overwrites it. Thanks to it a byte that flips in the last acknowledged
//! frame is told apart from a torn write. Frames and records are described in `wal/frame.rs`.
//!
//! Two threads: `quorate-log` writes, syncs and calls back; `quorate-log-space` keeps the next segment ready (space reserved and zeros
//! written, so that a sync need not touch the file system's own books) and recycles or removes what is purged. Appending neither waits
//! for the disk nor for them.
//!
//! # Invariants
//! - A callback gets `Ok` only after the sync of the frame that holds its records, and of all earlier frames.
//! - The records on disk are always a prefix of those accepted, in the order of the calls. Only a purge may overtake, and only entries
//!   that wait for space, because it is what makes space.
//! - The first frame of a segment begins with an *opening*: vote, committed, purged, first and last log id. So a segment whose entries are
//!   all purged is dropped whole, oldest first, each removal durable before the next.
//! - A segment bears its name only once it is complete and durable; the name gives the sequence, and sequences have no gap.
//! - The *salt* of a segment is a random number, new for each use of the file, in each frame's header and in each record's checksum.
//!   Hence neither what a recycled file held, nor a value made up by a client, nor the rest of a frame that was cut can pass for a frame.
//! - After one failed write or sync nothing more is accepted; a failed sync is never tried again. On the next open the last
//!   frame is written once more before it is trusted, because after a failed sync the kernel may hold as clean what never reached the disk.
//! - A full disk is not a failure. It shows first while the *next* segment is prepared ([`Wal::space_low`]), a whole segment ahead. If the
//!   current one runs full too, calls are refused before anything is accepted, with the error of the reservation; the last few KiB of each
//!   segment are kept for votes, truncations and purges. It heals by itself when space comes back or a purge frees a segment.
//!
//! # Example
//! ```
//! use quorate::storage::wal::{LogEntry, LogId, Wal, WalOptions};
//! # let dir = tempfile::tempdir().unwrap();
//! let (wal, recovered) = Wal::open(dir.path(), WalOptions { segment_bytes: 1 << 20, ..WalOptions::default() })?;
//! assert_eq!(recovered.state.last, None);
//!
//! let id = LogId { term: 1, node: 7, index: 0 };
//! let (sender, durable) = std::sync::mpsc::channel();
//! wal.append(vec![LogEntry { id, payload: "x".into() }], Box::new(move |result| sender.send(result).unwrap()))?;
//! assert_eq!(wal.entries(0..1, usize::MAX)?[0].payload, "x"); // readable at once
//! durable.recv().unwrap()?; // and now it is on disk
//! wal.close()?;
//! # Ok::<(), quorate::Error>(())
//! ```
//!
//! # Caveats
//! - The window that remains: if the process or the power ends after a frame was acknowledged and before its mark was written, or reached the
//!   disk (under steady load the next frame follows at once and takes the mark's part), *and* a byte of just that frame is damaged as well,
//!   the frame looks torn. It is cut, unless the caller knows better ([`Wal::read`]). One fault alone never loses what was acknowledged.
//! - A disk is taken to write sectors of 512 bytes whole or not at all, and to keep them once a sync has returned.
//! - The loss of whole files at the end cannot be seen from those that remain. The caller's lock keeps two servers apart; this has none.
//! - [`Wal::entries`] reads from files what the cache no longer has; it may block for the time of a read.

#[cfg(test)]
mod chaos;
mod disk;
mod flusher;
mod frame;
mod index;
mod read;
mod recover;
#[cfg(test)]
mod script;
#[cfg(any(test, feature = "simulation"))]
#[cfg_attr(not(test), allow(dead_code, reason = "what only the tests of the log do to it"))]
pub(crate) mod sim;
mod space;
mod state;
#[cfg(feature = "simulation")]
pub(crate) mod stepped;
#[cfg(test)]
mod tests;

pub use frame::{FORMAT_VERSION, Flaw, Record, Seen, SegmentScan, Tail, decode_segment};
pub use read::{Entries, dump};

use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use bytes::Bytes;
use disk::{Directory, Disk};
use recover::Opening;
use state::{Item, Meters, Shared, Sleep, State};
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// A frame takes records up to this many bytes; what is beyond waits for the next frame. One larger record is a frame of its own.
pub const MAX_FRAME_BYTES: usize = 4 << 20;
/// The largest payload of an entry, in bytes. A larger one is refused.
pub const MAX_ENTRY_BYTES: usize = 32 << 20;
/// The largest vote or committed mark, in bytes. A larger one is refused.
pub const MAX_OPAQUE_BYTES: usize = 512;
/// How much may wait to become durable, in bytes on disk. Appends beyond it are refused with [`ApplyError::TooManyRequests`], unless
/// nothing waits. The caller keeps well below by bounding its proposals: for Raft, a refused append is a fault.
pub const MAX_QUEUED_BYTES: u64 = 64 << 20;
/// The default bound of the cache of the newest entries, in bytes. Beyond it the oldest durable ones are read back from disk.
pub const CACHE_BYTES: usize = 16 << 20;
/// The default size of a segment, in bytes.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// The most that the first segment of a new log takes. It is filled with zeros before the log opens, so it is small; those to come are
/// filled in the background.
const FIRST_SEGMENT_BYTES: u64 = 4 << 20;
/// The sizes that a segment may be given; offsets in it must fit 32 bits with room for one oversized entry.
const SEGMENT_BYTES_RANGE: std::ops::RangeInclusive<u64> = (4 << 10)..=(1 << 30);
/// Purged segments kept for reuse; more are removed.
const MAX_SPARES: usize = 2;
/// The end of each segment, in bytes, that entries leave to votes, truncations and purges; an eighth in small segments.
const CONTROL_BYTES: u64 = 16 << 10;
/// The end of each segment that is left for a mark.
const MARK_BYTES: u64 = (frame::FRAME_HEADER_LEN + frame::RECORD_HEADER_LEN + MAX_OPAQUE_BYTES).next_multiple_of(frame::ALIGN) as u64;
/// The most that one record can take in a frame of its own, besides the record itself.
const FRAME_OVERHEAD: u64 = (frame::FRAME_HEADER_LEN + frame::ALIGN) as u64;

/// Upper bounds, in seconds, of the buckets of [`WalMetrics::fsync_buckets`]; the last bucket has none.
pub const FSYNC_BUCKETS_SECONDS: [f64; 14] =
    [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];

/// Which entry: the term and node of the leader that made it, and its place in the log. Indexes start where the first append starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LogId {
    pub term: u64,
    pub node: u64,
    /// Below `u64::MAX`, so that there is always a next one.
    pub index: u64,
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub id: LogId,
    pub payload: Bytes,
}

/// What a log amounts to, apart from its entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogState {
    /// The vote last saved.
    pub vote: Option<Bytes>,
    /// The committed mark last saved. After a crash it may be an older one.
    pub committed: Option<Bytes>,
    /// Up to here, inclusive, the log was purged.
    pub purged: Option<LogId>,
    /// The first index that the log holds, or would hold next if it is empty.
    pub first: u64,
    /// The last entry, or `purged` if there is none after it.
    pub last: Option<LogId>,
}

impl LogState {
    /// The index after the last.
    pub fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    /// Whether it holds no entry.
    pub fn is_empty(&self) -> bool {
        self.first >= self.next()
    }

    /// Adds an entry, or says why it does not follow. A log that never held anything may start anywhere.
    fn push(&mut self, id: LogId) -> std::result::Result<(), String> {
        follows(self.last, id)?;
        if self.last.is_none() {
            self.first = id.index;
        }
        self.last = Some(id);
        Ok(())
    }

    fn truncate(&mut self, last: Option<LogId>) {
        self.last = last;
        self.first = self.first.min(self.next());
    }

    fn purge(&mut self, upto: LogId) {
        self.purged = Some(upto);
        self.first = self.first.max(upto.index + 1);
        if self.next() <= upto.index {
            self.last = Some(upto);
        }
    }
}

/// Whether an entry may come after `last`.
fn follows(last: Option<LogId>, id: LogId) -> std::result::Result<(), String> {
    match last {
        _ if id.index == u64::MAX => Err("an entry has the index 2^64-1, which is not used".into()),
        Some(last) if last.index + 1 != id.index || last.term > id.term => {
            Err(format!("entry {} of term {} follows entry {} of term {}", id.index, id.term, last.index, last.term))
        }
        _ => Ok(()),
    }
}

/// A monotonic clock, for measuring; its zero does not matter.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;
/// Called once, on the log's thread, when what it belongs to is durable or never will be. It must not block.
pub type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// How a log is kept.
#[derive(Clone)]
pub struct WalOptions {
    /// The size of a segment in bytes, 4 KiB to 1 GiB. Up to four times as much is on disk beyond what is in use.
    pub segment_bytes: u64,
    /// The bound of the cache of the newest entries, in bytes.
    pub cache_bytes: usize,
    /// How long after a failed reservation of space it is tried again.
    pub reserve_retry: Duration,
    /// Measures syncs; without it they are counted, but not measured.
    pub clock: Option<Clock>,
    /// Whether the disk is waited for. If not, what was called durable outlives the process, and nothing more.
    pub fsync: bool,
}

impl Default for WalOptions {
    fn default() -> Self {
        Self { segment_bytes: SEGMENT_BYTES, cache_bytes: CACHE_BYTES, reserve_retry: Duration::from_secs(1), clock: None, fsync: true }
    }
}

impl WalOptions {
    /// What entries leave free at a segment's end.
    fn control_bytes(&self) -> u64 {
        (self.segment_bytes / 8).min(CONTROL_BYTES)
    }
}

/// What was found on opening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub state: LogState,
    /// Where a torn write is cut off once the log is accepted, if one was seen: the file, and its offset.
    pub torn: Option<(PathBuf, u64)>,
}

/// Figures of a log since it was opened, but for the last four, which are of now.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WalMetrics {
    pub fsyncs: u64,
    /// How many syncs of frames took up to each of [`FSYNC_BUCKETS_SECONDS`] and no less than the one before; the last: longer than all.
    pub fsync_buckets: [u64; FSYNC_BUCKETS_SECONDS.len() + 1],
    pub fsync_seconds: f64,
    pub entries: u64,
    pub written_bytes: u64,
    /// What waits to become durable, in bytes on disk.
    pub queued_bytes: u64,
    pub cache_bytes: u64,
    pub segments: u64,
    pub disk_bytes: u64,
}

/// A Raft log on disk. All calls are quick and from any thread; see the module's head.
///
/// A call that returns an error has changed nothing, and its `done` is never called. A call that returns `Ok` has taken effect for
/// readers, and its `done` is called exactly once: with `Ok` when it is durable, or with the error that ended the log before that.
pub struct Wal {
    shared: Arc<Shared>,
    /// What is to be done before the log is written to; none once it was accepted.
    opening: Mutex<Option<Opening>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Wal {
    /// Opens the log in `dir`, or makes an empty one; the directory is made (mode 0700) if it is missing. The caller holds the lock
    /// that keeps others away from it.
    ///
    /// # Errors
    /// [`Error::Config`] for a segment size out of range, [`Error::Io`], [`Error::Format`] for another release's files, and
    /// [`Error::Corrupt`] if any file but for a torn tail is not what was written; then nothing has been changed.
    pub fn open(dir: impl AsRef<Path>, options: WalOptions) -> Result<(Wal, Recovered)> {
        let (wal, recovered) = Self::read(dir, options)?;
        wal.accept()?;
        Ok((wal, recovered))
    }

    /// Reads the log in `dir` as [`open`](Self::open) does, making the directory if it is missing, but changes nothing of a log until
    /// [`accept`](Self::accept), and refuses writes until then with [`Error::Failed`]: for who has to see first whether it belongs to
    /// something else. What looks like a write that was cut short, which opening removes, may be a damaged one that others know of.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(dir: impl AsRef<Path>, options: WalOptions) -> Result<(Wal, Recovered)> {
        let dir = dir.as_ref();
        let disk = Directory::open(dir, true, options.fsync).map_err(|e| Error::io("open the log directory", dir, e))?;
        Self::read_on(Arc::new(disk), options)
    }

    fn read_on(disk: Arc<dyn Disk>, options: WalOptions) -> Result<(Wal, Recovered)> {
        let (shared, opening, recovered) = Self::recover(disk, options)?;
        Ok((Wal { shared: Arc::new(shared), opening: Mutex::new(Some(opening)), threads: Mutex::default() }, recovered))
    }

    /// Takes a log that was only [read](Self::read) for what it is: removes what a crash has left of a write, makes sure that the rest is on
    /// the disk, for which it waits, and begins to work. Calling it again is harmless.
    ///
    /// # Errors
    /// [`Error::Io`], and then the log takes no writes; whatever else has ended the log; [`Error::Stopped`] after `close`.
    pub fn accept(&self) -> Result<()> {
        let mut opening = lock(&self.opening);
        {
            let state = self.shared.lock();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.closing {
                return Err(Error::Stopped);
            }
        }
        let Some(opening) = opening.take() else { return Ok(()) };
        let begun = self.shared.mend(opening).and_then(|at| {
            let (writer, space) = (self.shared.clone(), self.shared.clone());
            self.spawn("quorate-log", move || flusher::run(writer, at))?;
            self.spawn("quorate-log-space", move || space::run(space))
        });
        begun.inspect_err(|error| self.shared.fail(error.clone()))?;
        self.shared.lock().accepted = true;
        Ok(())
    }

    /// Where what can be read of the log ends, as long as it is only [read](Self::read): the file, and the offset of what comes next, which
    /// goes when the log is accepted. The directory, if it holds no log, or the log was accepted.
    pub fn end(&self) -> (PathBuf, Option<u64>) {
        let disk = &*self.shared.disk;
        let end = lock(&self.opening).as_ref().and_then(|opening| opening.end(disk));
        end.map_or_else(|| (disk.path(""), None), |(path, offset)| (path, Some(offset)))
    }

    /// What a log on a disk begins with, before anything is done to it.
    fn recover(disk: Arc<dyn Disk>, options: WalOptions) -> Result<(Shared, Opening, Recovered)> {
        if !SEGMENT_BYTES_RANGE.contains(&options.segment_bytes) {
            return Err(Error::Config(format!("log segment size {}: must be from 4 KiB to 1 GiB", options.segment_bytes)));
        }
        let (state, opening, recovered) = recover::read(&*disk, &options)?;
        let shared = Shared {
            disk,
            options,
            state: Mutex::new(state),
            work: Condvar::new(),
            space: Condvar::new(),
            meters: Meters::default(),
            #[cfg(feature = "simulation")]
            stepper: None,
        };
        Ok((shared, opening, recovered))
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = spawned.map_err(|e| Error::io("start the thread of the log in", self.shared.disk.path(""), e))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Appends entries; they can be read as soon as this returns. No entries at all: `done` waits for what was asked before.
    ///
    /// # Errors
    /// The failure that ended the log; [`Error::Stopped`] after `close`; [`Error::Failed`] for entries that do not follow the last one;
    /// [`ApplyError::RequestTooLarge`] beyond [`MAX_ENTRY_BYTES`], [`ApplyError::TooManyRequests`] beyond [`MAX_QUEUED_BYTES`], and an
    /// [`Error::Io`] with `is_disk_full()` if the disk is full and the segment too.
    pub fn append(&self, entries: Vec<LogEntry>, done: Done) -> Result<()> {
        #[cfg(feature = "simulation")]
        if crate::world::has_fault(crate::world::Fault::EarlyAcknowledgement) {
            self.append_entries(entries, Box::new(|_| ()))?;
            done(Ok(()));
            return Ok(());
        }
        self.append_entries(entries, done)
    }

    fn append_entries(&self, entries: Vec<LogEntry>, done: Done) -> Result<()> {
        if entries.iter().any(|entry| entry.payload.len() > MAX_ENTRY_BYTES) {
            return Err(ApplyError::RequestTooLarge.into());
        }
        let bytes = entries.iter().map(|e| frame::entry_len(e.payload.len()) as u64 + FRAME_OVERHEAD).sum();
        let floor = if entries.is_empty() { 0 } else { self.shared.options.control_bytes() };
        let mut state = self.shared.lock();
        state.admit(bytes, floor, true)?;
        // All are looked at before anything changes.
        entries
            .iter()
            .try_fold(state.log.last, |last, entry| follows(last, entry.id).map(|()| Some(entry.id)))
            .map_err(|what| Error::Failed(format!("append to the log: {what}")))?;
        if entries.is_empty() {
            state.enqueue(Item::Barrier, Some(done));
        } else {
            let mut done = Some(done);
            let count = entries.len();
            for (n, entry) in entries.into_iter().enumerate() {
                state.log.push(entry.id).map_err(Error::Failed)?;
                state.terms.push(entry.id);
                let ticket = state.ticket + 1;
                state.cache.push(entry.clone(), ticket);
                let done = if n + 1 == count { done.take() } else { None };
                state.enqueue(Item::Entry(entry), done);
            }
        }
        self.shared.wake(state);
        Ok(())
    }

    /// Saves the vote, at most [`MAX_OPAQUE_BYTES`].
    ///
    /// # Errors
    /// As [`Wal::append`], but for the queue's bound.
    pub fn save_vote(&self, vote: Bytes, done: Done) -> Result<()> {
        check_opaque(&vote)?;
        let mut state = self.shared.lock();
        self.admit_control(&state, &Item::Vote(vote.clone()))?;
        state.log.vote = Some(vote.clone());
        state.enqueue(Item::Vote(vote), Some(done));
        self.shared.wake(state);
        Ok(())
    }

    /// Saves the committed mark, at most [`MAX_OPAQUE_BYTES`]: it rides on the next frame, or on a mark within a tenth of a second, and
    /// costs no sync. A crash may bring back an older one, but none that is ahead of what had been asked for before it.
    ///
    /// # Errors
    /// The failure that ended the log, [`Error::Stopped`] after `close`, [`ApplyError::RequestTooLarge`].
    pub fn save_committed(&self, committed: Bytes) -> Result<()> {
        check_opaque(&committed)?;
        let mut state = self.shared.lock();
        state.admit(0, 0, false)?;
        state.log.committed = Some(committed);
        state.committed_version += 1;
        state.committed_ticket = state.ticket;
        // A nap ends by itself; waking the thread for each of these would cost more than it is worth.
        if state.sleep == Sleep::Deep {
            self.shared.wake(state);
        }
        Ok(())
    }

    /// Removes all entries after `index`; `None` removes all. Entries may be appended again right after.
    ///
    /// # Errors
    /// As [`Wal::append`]; [`Error::Failed`] if `index` was purged.
    pub fn truncate_after(&self, index: Option<u64>, done: Done) -> Result<()> {
        let mut state = self.shared.lock();
        let log = &state.log;
        let last = match index {
            Some(index) if index >= log.next() => Some(log.last),
            Some(index) if index >= log.first => state.terms.get(index).map(Some),
            Some(index) if log.purged.is_some_and(|purged| purged.index == index) => Some(log.purged),
            None if log.purged.is_none() => Some(None),
            _ => None,
        };
        let Some(last) = last else {
            return Err(Error::Failed(format!("truncate the log after {index:?}: it starts at {} after a purge", log.first)));
        };
        let item = Item::Truncate(last);
        self.admit_control(&state, &item)?;
        state.log.truncate(last);
        let next = state.log.next();
        state.terms.truncate(next);
        state.cache.truncate(next);
        state.enqueue(item, Some(done));
        self.shared.wake(state);
        Ok(())
    }

    /// Forgets all entries up to and including `upto`, which may lie beyond the last: the log then goes on after it. The space comes back
    /// segment by segment.
    ///
    /// # Errors
    /// As [`Wal::append`], but for the queue's bound.
    pub fn purge(&self, upto: LogId, done: Done) -> Result<()> {
        if upto.index == u64::MAX {
            return Err(Error::Failed("purge the log: the index 2^64-1 is not used".into()));
        }
        let mut state = self.shared.lock();
        let known = state.log.purged.is_some_and(|purged| purged.index >= upto.index);
        let item = if known { Item::Barrier } else { Item::Purge(upto) };
        self.admit_control(&state, &item)?;
        if !known {
            state.log.purge(upto);
            let first = upto.index + 1;
            state.terms.purge(first);
            state.cache.purge(first);
        }
        state.enqueue(item, Some(done));
        self.shared.wake(state);
        Ok(())
    }

    fn admit_control(&self, state: &State, item: &Item) -> Result<()> {
        state.admit(item.cost(), item.floor(self.shared.options.control_bytes()), false)
    }

    /// The entries of `range` that the log holds, in order, without a gap. It stops after `max_bytes` of payload, but never before the
    /// first entry.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Corrupt`] if what is read back from disk is not what was written.
    pub fn entries(&self, range: impl RangeBounds<u64>, max_bytes: usize) -> Result<Vec<LogEntry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        read::entries(&self.shared, start, end, max_bytes)
    }

    /// The log's state as callers see it: everything accepted, durable or not.
    pub fn log_state(&self) -> LogState {
        self.shared.lock().log.clone()
    }

    /// The vote last saved, durable or not.
    pub fn vote(&self) -> Option<Bytes> {
        self.shared.lock().log.vote.clone()
    }

    /// The id of the entry at `index`, or of the last purged one. Never reads the disk.
    pub fn log_id(&self, index: u64) -> Option<LogId> {
        let state = self.shared.lock();
        if (state.log.first..state.log.next()).contains(&index) {
            state.terms.get(index)
        } else {
            state.log.purged.filter(|purged| purged.index == index)
        }
    }

    /// The error that ended the log, if one did.
    pub fn failed(&self) -> Option<Error> {
        self.shared.lock().failed.clone()
    }

    /// Whether the next segment could not be reserved. There is still room in the current one; it is time to refuse what grows.
    pub fn space_low(&self) -> bool {
        self.shared.lock().low.is_some()
    }

    /// Bytes that the current segment still takes, about: what there is while [`space_low`](Self::space_low).
    pub fn room_bytes(&self) -> u64 {
        let state = self.shared.lock();
        state.room.saturating_sub(state.queued_bytes)
    }

    /// What waits to become durable, in bytes on disk; see [`MAX_QUEUED_BYTES`].
    pub fn queued_bytes(&self) -> u64 {
        self.shared.lock().queued_bytes
    }

    /// None if all that was accepted is durable; otherwise how often something has become durable since the log was opened. Who finds the
    /// same number for long knows that the disk stands still.
    pub fn waits_at(&self) -> Option<u64> {
        let state = self.shared.lock();
        (state.queued_bytes > 0).then_some(state.published)
    }

    /// The bytes of all files of the log, used or kept ready.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.lock().disk_bytes()
    }

    /// The figures for monitoring.
    pub fn metrics(&self) -> WalMetrics {
        let meters = &self.shared.meters;
        let mut metrics = WalMetrics {
            fsyncs: meters.fsyncs.load(Relaxed),
            fsync_seconds: Duration::from_nanos(meters.fsync_nanos.load(Relaxed)).as_secs_f64(),
            entries: meters.entries.load(Relaxed),
            written_bytes: meters.written_bytes.load(Relaxed),
            ..WalMetrics::default()
        };
        for (count, bucket) in metrics.fsync_buckets.iter_mut().zip(&meters.fsync_buckets) {
            *count = bucket.load(Relaxed);
        }
        let state = self.shared.lock();
        metrics.queued_bytes = state.queued_bytes;
        metrics.cache_bytes = state.cache.bytes() as u64;
        metrics.segments = state.segments.len() as u64;
        metrics.disk_bytes = state.disk_bytes();
        metrics
    }

    /// Writes what waits, and ends both threads; blocks until then. Calls after it are refused; reads still work. Calling it again is harmless.
    ///
    /// # Errors
    /// The failure that ended the log, whenever that was.
    pub fn close(&self) -> Result<()> {
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.wake(state);
        let threads = std::mem::take(&mut *lock(&self.threads));
        // A callback may hold the last handle. Its thread cannot wait for itself, nor for the other one, which waits for it.
        let within = threads.iter().any(|thread| thread.thread().id() == std::thread::current().id());
        for thread in threads {
            if !within && thread.join().is_err() {
                self.shared.fail(Error::Failed("a thread of the log panicked".into()));
            }
        }
        self.failed().map_or(Ok(()), Err)
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        // Nobody is left to be told; the failure was logged when it happened.
        let _ = self.close();
    }
}

fn check_opaque(bytes: &Bytes) -> Result<()> {
    if bytes.len() > MAX_OPAQUE_BYTES { Err(ApplyError::RequestTooLarge.into()) } else { Ok(()) }
}
