//! The history of all revisions: immutable records, from revision to bytes, packed into blocks on a [`Backend`].
//!
//! # Idea
//! A record that is written lives in three places, one after the other, and is found in each:
//! ```text
//! append ──> tail (memory) ──write_out──> block, in the batch overlay and the cache ──backend.apply──> block on the backend
//!                                                                                    ──sync──────────> safe from a power cut
//! ```
//! - The **tail** (`history/tail.rs`) takes what the applier appends. [`commit`](History::commit) marks where a log entry ends.
//! - [`write_out`](History::write_out), on the background writer's thread, packs everything committed into blocks and makes
//!   *one atomic batch* of them with the dead marks, the meta values, the summary and what `commit` was given: what is
//!   stored is always the state after a whole number of log entries.
//! - The batch is **published first and applied second**: it goes to the overlay, its blocks into the map, its records
//!   leave the tail, and only then the backend gets it. So memory is always ahead of the backend, by the batches in the
//!   overlay, which stay there until a sync: a backend that fails, or comes back from a `reopen` without its last batches,
//!   gets them once more, in order, known by the sequence number in the summary that it still has. Readers notice nothing.
//! - A record dies by [`mark_dead`](History::mark_dead): in the tail it is never written; in a block a bit is set beside the
//!   block. Deaths need no log entry: those that are marked between two entries go out with the next batch, which then repeats
//!   what the last `commit` was given, so that a compaction comes to its end on a store to which nobody writes. A crash may
//!   take them back; whoever marks them does so again after a restart. A block without a live record goes at once. One that is less than half alive is rewritten, together with small
//!   neighbours, by [`collect`](History::collect).
//!
//! # How full blocks are, and how often a record is written
//! A batch of a few records makes a small block, and the last block is not rewritten each time for it. Only when
//! the small blocks at the end together with the new records fill a block are they packed anew. As the old ones alone do not
//! fill one, what is left over for the next time are new records only: **each record is written once or twice**, at 40,000
//! puts/s (thousands of records a batch) practically once, where they come a few at a time twice, and at the end there are never
//! more than 31 small blocks. Rewriting the last block in place would write each record up to 31 times where they come one at a time.
//!
//! # Measured
//! 1M records of 300 bytes; CPU time of the calling thread on a busy 2-core machine, `tests/measure.rs`, in memory and on sled:
//! append and commit 0.04 us; `write_out` 0.5 and 1.3 us a record, of 4000 each; a cached `get` 0.1 us when its block is in the
//! processor's cache, about 1 us when it is not; a missed one 4 and 75 us (sled reads a whole page of its own for it, so neighbours are
//! taken along where they are likely wanted: in order, or while the cache has room);
//! `open` 0.3 and 0.6 s. Bytes given to the backend for each appended, at 1, 16, 100 and 4000 records a `write_out`:
//! 2.5, 2.1, 1.25, 1.07.
//!
//! # Example
//! ```text
//! let (history, saved) = History::open(backend, HistoryOptions::default(), &mut |rev, record| index.add(rev, record))?;
//! history.append(Revision { main: 2, sub: 0 }, Record { bytes, tombstone: false });
//! history.put_meta(b"lease/7", Some(ttl));
//! history.commit(log_id);          // end of the log entry
//! history.get(Revision { main: 2, sub: 0 })?;   // there at once
//! history.write_out()?;            // each second or sooner, on the background writer
//! history.sync()?;                 // before the log is purged: returns the log id that is safe
//! ```
//!
//! # Invariants
//! - Blocks do not overlap and lie below the tail; within each, revisions ascend. [`check_invariants`](History::check_invariants)
//!   holds the whole list.
//! - Readers look into the tail first and then into the map; a record is in the map before it leaves the tail.
//! - Whatever the summary says about counts and digest holds for the backend that it is read from.
//!
//! # Caveats
//! - An empty backend cannot be told from a new one: that something ought to be there, the log has to know.
//! - A death is in [`HistoryStats::live_bytes`] at once if the record is still in the tail, otherwise with the next `write_out`.
//! - A record's bytes share the memory of its block: whoever keeps a few bytes for long should copy them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use self::block::{Block, Held, Stub, Summary, Totals};
use self::map::{BlockMap, Line, Meta};
pub use self::reader::Reader;
use self::tail::Tail;
use super::keys::Key;
use super::{Backend, Batch, Record, Revision};
use crate::error::Result;
use crate::lock::{lock, read, write};

mod block;
mod map;
mod open;
mod reader;
mod tail;
#[cfg(test)]
mod tests;
mod write;

/// What a live record counts in [`HistoryStats::live_bytes`] beside its own bytes: its line in the block's table (20
/// bytes), and its share of the block's key, frame and dead mark.
pub const RECORD_OVERHEAD: u64 = 32;

/// Largest record, in bytes. Requests are limited far below it; appending a larger one is a bug, and panics.
pub const RECORD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Largest name and value of [`History::put_meta`] together, and largest `applied` of [`History::commit`], in bytes: both
/// stand in one value of the backend. Whoever keeps more there splits it; a larger one is a bug, and panics.
pub const META_BYTES_MAX: usize = super::VALUE_BYTES_MAX / 2;

/// Largest name of [`History::put_meta`], in bytes; a larger one is a bug, and panics.
pub const META_NAME_BYTES_MAX: usize = super::KEY_BYTES_MAX - 1;

/// Bytes of the tail, deaths left out, from which on [`History::is_behind`] says so. Nothing is refused beyond it: whoever
/// proposes holds back.
pub const TAIL_BYTES_HIGH: usize = 32 * 1024 * 1024;

/// Blocks that are read in one go when one after the other is asked for: at most half a megabyte that may not be wanted. The first time it is
/// one, then twice as many each time.
const RUN_BLOCKS: usize = 32;

/// Blocks that are read in one go while the cache is not full, when one is asked for. The backend's page holds 3, or about 12 of those that came
/// a few at a time.
const NEAR_BLOCKS: usize = 8;

/// Records that a scan copies out of the tail under one lock. A longer scan comes back for more.
const SCAN_TAIL_RECORDS: usize = 64;

/// Bounds within; only tests set others, to reach them.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes of changes at which a cut of the tail is sealed, and the next entry begins a new one. An entry that is larger is
    /// a cut of its own.
    cut_bytes: usize,
    /// Bytes of changes in a batch: the rest of the tail goes into further batches. A cut that is larger is a batch of its own. Little, for
    /// the backend reserves a multiple of a batch before it takes it, and a nearly full disk must have that much left.
    batch_bytes: usize,
    /// Bytes of batches that the backend has not synced yet, and that are kept to be given to it once more. Beyond it
    /// the next batch waits for a sync first.
    unsynced_bytes: usize,
    /// See [`TAIL_BYTES_HIGH`].
    behind_bytes: usize,
}

const LIMITS: Limits =
    Limits { cut_bytes: 256 * 1024, batch_bytes: 4 * 1024 * 1024, unsynced_bytes: 4 * 1024 * 1024, behind_bytes: TAIL_BYTES_HIGH };

/// How a history is opened.
#[derive(Clone, Debug)]
pub struct HistoryOptions {
    /// What the cached blocks may take in memory, in bytes. One block is kept even if it takes more.
    pub cache_bytes: usize,
    /// Called before what has been committed is written: returns when it may be.
    pub gate: Option<Gate>,
}

/// Keeps the storage from getting ahead of the log: an entry may be applied, since others have it on disk, before this member's own log
/// has. Its effects must not be on disk then, for after a crash the log would end before the state.
#[derive(Clone)]
pub struct Gate(pub Arc<dyn Fn() -> Result<()> + Send + Sync>);

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

impl Default for HistoryOptions {
    fn default() -> Self {
        HistoryOptions { cache_bytes: 64 * 1024 * 1024, gate: None }
    }
}

/// What was stored beside the records.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Saved {
    /// What the last stored [`History::commit`] was given; `None` in a new history.
    pub applied: Option<Bytes>,
    /// The values of [`History::put_meta`], by key.
    pub meta: BTreeMap<Vec<u8>, Bytes>,
}

/// Figures for metrics, quota and the background writer's decisions. Taken one after the other, not at one instant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HistoryStats {
    /// What the space quota counts: the bytes of all live records, and [`RECORD_OVERHEAD`] for each.
    pub live_bytes: u64,
    /// Live records, in tail and blocks.
    pub live_records: u64,
    /// Records of the tail, dead ones included.
    pub tail_records: u64,
    /// Bytes of all changes in the tail.
    pub tail_bytes: u64,
    /// Blocks.
    pub blocks: u64,
    /// What cached blocks take in memory, in bytes.
    pub cache_bytes: u64,
    /// What the backend's files take, in bytes.
    pub disk_bytes: u64,
    /// Bytes of batches kept in memory until the next sync.
    pub unsynced_bytes: u64,
    /// Bytes given to the backend since the start, keys included: over what was appended, the write amplification.
    pub written_bytes: u64,
}

/// The revision history. See the module head; shared by reference between the applier, the background writer and readers.
///
/// [`append`](Self::append), [`put_meta`](Self::put_meta), [`mark_dead`](Self::mark_dead) and [`commit`](Self::commit) touch memory
/// only. [`write_out`](Self::write_out), [`sync`](Self::sync) and [`collect`](Self::collect) block on the backend, and on each other.
pub struct History {
    backend: Arc<dyn Backend>,
    limits: Limits,
    gate: Option<Gate>,
    // No two of these locks are ever held together, and none during a call to the backend.
    tail: Mutex<Tail>,
    map: RwLock<BlockMap>,
    overlay: Mutex<Overlay>,
    writer: Turnstile<Writer>,
    live_records: AtomicU64,
    live_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// What only `write_out`, `sync` and `collect` know and change.
struct Writer {
    /// Number of the newest batch, and what its summary says.
    sequence: u64,
    totals: Totals,
    applied: Option<Bytes>,
    /// The checksum of each stored meta value, to take it out of the digest.
    metas: BTreeMap<Box<[u8]>, u32>,
    /// The blocks that are less than half alive.
    sparse: BTreeSet<Revision>,
    next_id: u64,
}

/// A batch that is published, and perhaps applied, but not yet synced.
struct Pending {
    sequence: u64,
    /// Its puts ascend by key.
    batch: Batch,
    bytes: usize,
}

/// The batches since the last sync, oldest first. Bounded by [`Limits::unsynced_bytes`] and one batch.
#[derive(Default)]
struct Overlay {
    batches: VecDeque<Arc<Pending>>,
    bytes: usize,
    /// The newest batch that is safe from a power cut.
    synced: u64,
}

impl Overlay {
    /// What the newest of these batches that put the key has put there.
    fn find(&self, key: &[u8]) -> Option<Bytes> {
        self.batches.iter().rev().find_map(|pending| {
            let puts = &pending.batch.puts;
            let index = puts.binary_search_by(|(put, _)| put.as_slice().cmp(key)).ok()?;
            puts.get(index).map(|(_, value)| value.clone())
        })
    }

    fn push(&mut self, pending: Arc<Pending>) {
        self.bytes += pending.bytes;
        self.batches.push_back(pending);
    }

    /// Takes out the batches up to that number: they are synced.
    fn synced(&mut self, sequence: u64) -> Vec<Arc<Pending>> {
        self.synced = sequence;
        let done: Vec<_> = self.batches.drain(..self.batches.partition_point(|pending| pending.sequence <= sequence)).collect();
        self.bytes -= done.iter().map(|pending| pending.bytes).sum::<usize>();
        done
    }
}

impl History {
    /// Reads and checks the whole history, and visits every live record in ascending order of revisions.
    ///
    /// # Errors
    /// [`Corrupt`](crate::Error::Corrupt) when a value is damaged, stands under another's key, or when a value is missing,
    /// surplus or older than the rest; whatever the backend or `visit` returns.
    pub fn open(
        backend: Arc<dyn Backend>,
        opts: HistoryOptions,
        visit: &mut dyn FnMut(Revision, &Record) -> Result<()>,
    ) -> Result<(History, Saved)> {
        History::open_limited(backend, opts, LIMITS, visit)
    }

    fn open_limited(
        backend: Arc<dyn Backend>,
        opts: HistoryOptions,
        limits: Limits,
        visit: &mut dyn FnMut(Revision, &Record) -> Result<()>,
    ) -> Result<(History, Saved)> {
        let open::Loaded { map, writer, saved, last } = open::load(&backend, &opts, visit)?;
        let totals = writer.totals;
        tracing::debug!(blocks = totals.blocks, records = totals.records, live_bytes = totals.live_bytes, "history opened");
        let overlay = Overlay { synced: writer.sequence, ..Overlay::default() };
        let history = History {
            backend,
            limits,
            gate: opts.gate,
            tail: Mutex::new(Tail::new(last, limits.cut_bytes)),
            map: RwLock::new(map),
            overlay: Mutex::new(overlay),
            writer: Turnstile::new(writer),
            live_records: AtomicU64::new(totals.records),
            live_bytes: AtomicU64::new(totals.live_bytes),
            written_bytes: AtomicU64::new(0),
        };
        Ok((history, saved))
    }

    /// Adds a record at the end. It can be read at once, and is stored with a later [`write_out`](Self::write_out) after the
    /// next [`commit`](Self::commit).
    ///
    /// # Panics
    /// When the revision is not above every earlier one, or the record beyond [`RECORD_BYTES_MAX`]: both are bugs of the caller.
    pub fn append(&self, rev: Revision, record: Record) {
        let bytes = record.bytes.len();
        assert!(bytes <= RECORD_BYTES_MAX, "record {rev:?} has {bytes} bytes, at most {RECORD_BYTES_MAX} are allowed");
        self.tail().append(rev, record);
        self.live_records.fetch_add(1, Ordering::Relaxed);
        self.live_bytes.fetch_add(bytes as u64 + RECORD_OVERHEAD, Ordering::Relaxed);
    }

    /// Sets or removes a small value under a name. Of several changes of a name before it is written only the last counts.
    /// The values come back from [`open`](Self::open) only; whoever needs them in between keeps them.
    ///
    /// # Panics
    /// When the name is beyond [`META_NAME_BYTES_MAX`], or it and the value beyond [`META_BYTES_MAX`].
    pub fn put_meta(&self, key: &[u8], value: Option<Bytes>) {
        let bytes = key.len() + value.as_ref().map_or(0, Bytes::len);
        assert!(key.len() <= META_NAME_BYTES_MAX && bytes <= META_BYTES_MAX, "meta value {key:02x?} has {bytes} bytes");
        self.tail().put_meta(key, value);
    }

    /// Marks records dead. They are never asked for again: `get` may still find them for a while. A revision that is unknown or
    /// dead already is passed over, so that a call may be repeated.
    ///
    /// Within an entry the deaths are stored with it. Between two entries they are stored with the next batch, or the one after
    /// it; a crash before that takes them back, the last ones first: what is stored is always a beginning of what was marked.
    ///
    /// The tail's lock is held meanwhile: give it thousands at a time, not millions.
    pub fn mark_dead(&self, revs: &[Revision]) {
        let (mut records, mut bytes) = (0, 0);
        self.tail().mark_dead(revs, |record| {
            records += 1;
            bytes += record.bytes.len() as u64 + RECORD_OVERHEAD;
        });
        self.died(records, bytes);
    }

    /// Ends a log entry: everything since the last commit is stored in one batch with `applied`, or not at all.
    ///
    /// # Panics
    /// When `applied` is beyond [`META_BYTES_MAX`].
    pub fn commit(&self, applied: Bytes) {
        assert!(applied.len() <= META_BYTES_MAX, "applied has {} bytes", applied.len());
        self.tail().commit(applied);
    }

    /// The record of a revision; `None` when there is none. A dead one may be found or not.
    ///
    /// # Errors
    /// [`Corrupt`](crate::Error::Corrupt) when what was stored cannot be read back, and whatever the backend returns.
    pub fn get(&self, rev: Revision) -> Result<Option<Record>> {
        if let Some(record) = self.tail().get(rev) {
            return Ok(Some(record.clone()));
        }
        loop {
            let look = |(first, line): (Revision, &Line)| (first, line.meta, line.block().map(|block| live(block, &line.meta, rev)));
            let Some((first, meta, cached)) = self.map().find(rev).map(look) else { return Ok(None) };
            let found = match cached {
                Some(found) => found,
                None => match self.fetch_near(first, &meta)? {
                    Some(block) => live(&block, &meta, rev),
                    // Gone since the look: the record is in another block by now.
                    None => continue,
                },
            };
            match found {
                None => return Ok(None),
                Some((_, Held::Whole(record))) => return Ok(Some(record)),
                Some((index, Held::Large { tombstone, stub })) => {
                    if let Some(bytes) = self.fetch_large(rev, stub, Place { first, id: meta.id, index })? {
                        return Ok(Some(Record { bytes, tombstone }));
                    }
                }
            }
        }
    }

    /// Visits the live records of `[from, to)` in ascending order until `visit` returns false or an error, which is passed on.
    /// No lock is held during a visit. A record that is appended or dies meanwhile may be visited or not.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn scan(&self, from: Revision, to: Revision, visit: &mut dyn FnMut(Revision, &Record) -> Result<bool>) -> Result<()> {
        self.look_through(from, to, &mut |rev, sight| match sight.record()? {
            Some(record) => visit(rev, &record),
            None => Ok(true),
        })
    }

    /// As [`scan`](Self::scan), but what is not in a block itself is read only when the visitor asks for it: a large record
    /// costs a read for each 16 KiB, and one look at its beginning may show that nobody wants the rest.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn look_through(&self, from: Revision, to: Revision, visit: &mut dyn FnMut(Revision, &Sight<'_>) -> Result<bool>) -> Result<()> {
        let mut cursor = from;
        // The block that was just visited: the one to go on behind, unless another one has taken its place.
        let mut seen = None;
        let (mut ahead, mut run) = (VecDeque::new(), 1);
        while cursor < to {
            let next = |(first, line): (Revision, &Line)| (first, line.meta, line.block().cloned());
            let block = self.map().next(cursor, to, seen).map(next);
            if let Some((first, meta, cached)) = block {
                // A scan leaves the cache alone: it reads each block once, and would push out what others read often.
                let block = match cached {
                    Some(block) => block,
                    None => match self.next_of_run(&mut ahead, &mut run, first, &meta)? {
                        Some(block) => block,
                        None => continue,
                    },
                };
                let last = block.entry(block.count() - 1).rev;
                let dying = self.tail().dead(first, last);
                for (index, entry) in block.entries().enumerate() {
                    if entry.rev < cursor || meta.is_dead(index) || dying.binary_search(&entry.rev).is_ok() {
                        continue;
                    }
                    if entry.rev >= to {
                        return Ok(());
                    }
                    let sight = Sight { history: self, rev: entry.rev, tombstone: entry.tombstone, held: block.held(index) };
                    if !visit(entry.rev, &sight)? {
                        return Ok(());
                    }
                }
                cursor = cursor.max(successor(last));
                seen = Some((first, meta.id));
                continue;
            }
            let records = self.tail().range(cursor, to, SCAN_TAIL_RECORDS);
            // Between the look at the map and the one at the tail, records may have moved from here to there.
            if self.map().next(cursor, to, seen).is_some() {
                continue;
            }
            let Some((last, _)) = records.last() else { return Ok(()) };
            cursor = successor(*last);
            for (rev, record) in records {
                let sight = Sight { history: self, rev, tombstone: record.tombstone, held: Held::Whole(record) };
                if !visit(rev, &sight)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Where it is stored.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// What the space quota counts; see [`HistoryStats::live_bytes`]. Cheap: asked for each request that needs space.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Relaxed)
    }

    /// The error for stored bytes that are not what was written, for those who read them.
    pub(crate) fn damaged(&self, what: String) -> crate::error::Error {
        open::corrupt(&*self.backend, what)
    }

    /// The error for a record that the index knows and the history does not.
    pub(crate) fn missing(&self, revision: Revision) -> crate::error::Error {
        self.damaged(format!("the record of revision {}.{} is missing or unreadable", revision.main, revision.sub))
    }

    /// Whether the background writer falls behind: more than [`TAIL_BYTES_HIGH`] wait in the tail. Deaths do not count: it is
    /// not clients who mark them, and to refuse their requests would not make them fewer.
    pub fn is_behind(&self) -> bool {
        self.tail().bytes_without_deaths() > self.limits.behind_bytes
    }

    /// How many deaths are in memory only, in no batch yet.
    pub fn deaths_waiting(&self) -> usize {
        self.tail().deaths()
    }

    /// Figures; see [`HistoryStats`].
    pub fn stats(&self) -> HistoryStats {
        let (tail_records, tail_bytes) = self.tail().size();
        let (blocks, cache_bytes) = {
            let map = self.map();
            (map.len(), map.cached_bytes())
        };
        HistoryStats {
            live_bytes: self.live_bytes.load(Ordering::Relaxed),
            live_records: self.live_records.load(Ordering::Relaxed),
            tail_records: tail_records as u64,
            tail_bytes: tail_bytes as u64,
            blocks: blocks as u64,
            cache_bytes: cache_bytes as u64,
            disk_bytes: self.backend.disk_bytes(),
            unsynced_bytes: self.overlay().bytes as u64,
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
        }
    }

    /// Reads a block that is not cached; `None` when the map has another one there by now. `keep` puts it into the cache.
    fn fetch(&self, first: Revision, meta: &Meta, keep: bool) -> Result<Option<Block>> {
        loop {
            let synced = self.overlay().synced;
            let mut problem = "it is missing";
            let found = self.stored(&Key::Block(first).encode(), |value| match Block::read(first, value) {
                Ok((block, crc)) if crc == meta.crc => Some(block),
                Ok(_) => {
                    problem = "it is not the one last written";
                    None
                }
                Err(what) => {
                    problem = what;
                    None
                }
            })?;
            if let Some(block) = found {
                if keep {
                    self.map_mut().keep(first, meta.id, block.clone());
                }
                return Ok(Some(block));
            }
            if self.map().get(first).is_none_or(|line| line.meta.id != meta.id) {
                return Ok(None);
            }
            // A sync between the looks at backend and overlay moves a batch from the one to the other: look again.
            if self.overlay().synced == synced {
                return Err(open::corrupt(&*self.backend, format!("block {first:?}: {problem}")));
            }
        }
    }

    /// Reads a block into the cache, and as long as there is room those behind it, which the backend has in its hands anyway: a member
    /// that was just started comes to its speed so many times sooner.
    fn fetch_near(&self, first: Revision, meta: &Meta) -> Result<Option<Block>> {
        if self.map().has_room(NEAR_BLOCKS * block::BLOCK_BYTES) {
            let near = self.fetch_run(first, NEAR_BLOCKS)?;
            let block = near.first().filter(|ahead| ahead.first == first && ahead.id == meta.id).map(|ahead| ahead.block.clone());
            self.keep_run(near);
            if block.is_some() {
                return Ok(block);
            }
        }
        self.fetch(first, meta, true)
    }

    /// The block that a scan has come to: of the run that was read last, or the first of a new one, which is twice as long.
    fn next_of_run(&self, ahead: &mut VecDeque<Ahead>, run: &mut usize, first: Revision, meta: &Meta) -> Result<Option<Block>> {
        while let Some(next) = ahead.pop_front() {
            if next.first == first && next.id == meta.id {
                return Ok(Some(next.block));
            }
        }
        if *run > 1 {
            ahead.extend(self.fetch_run(first, *run)?);
        }
        *run = (*run * 2).min(RUN_BLOCKS);
        match ahead.pop_front() {
            Some(next) if next.first == first && next.id == meta.id => Ok(Some(next.block)),
            // It is on its way to the backend, or something is wrong with it: a look of its own tells.
            _ => self.fetch(first, meta, false),
        }
    }

    /// Puts what was read in one go into the cache.
    fn keep_run(&self, run: Vec<Ahead>) {
        let mut map = self.map_mut();
        run.into_iter().for_each(|ahead| map.keep(ahead.first, ahead.id, ahead.block));
    }

    /// Reads uncached blocks, at most `blocks` from `first` on, in one go: the backend reads several at once whether it is asked for
    /// one or for all of them. What is not found as it ought to be is left out.
    fn fetch_run(&self, first: Revision, blocks: usize) -> Result<Vec<Ahead>> {
        let wanted: Vec<(Revision, Meta)> = {
            let map = self.map();
            let lines = map.from(first).take_while(|(_, line)| !line.is_cached());
            lines.take(blocks).map(|(first, line)| (first, line.meta)).collect()
        };
        let Some((last, _)) = wanted.last() else { return Ok(Vec::new()) };
        let (from, to) = (Key::Block(first).encode(), Key::Block(successor(*last)).encode());
        let mut found = Vec::with_capacity(wanted.len());
        let mut wanted = wanted.into_iter().map(|(first, meta)| (Key::Block(first).encode(), first, meta)).peekable();
        self.backend.scan(&from, &to, &mut |key, value| {
            while wanted.next_if(|(wanted, ..)| wanted[..] < *key).is_some() {}
            if let Some((_, first, meta)) = wanted.next_if(|(wanted, ..)| wanted[..] == *key)
                && let Ok((block, crc)) = Block::read(first, Bytes::copy_from_slice(value))
                && crc == meta.crc
            {
                found.push(Ahead { first, id: meta.id, block });
            }
            Ok(true)
        })?;
        Ok(found)
    }

    /// Puts a large record together; `None` when it is dead or in another block by now.
    fn fetch_large(&self, rev: Revision, stub: Stub, place: Place) -> Result<Option<Bytes>> {
        'again: loop {
            let synced = self.overlay().synced;
            let mut bytes = Vec::with_capacity(stub.length as usize);
            for number in 0..stub.chunks() {
                let key = Key::Chunk(rev, number).encode();
                let chunk = self.stored(&key, |value| block::unseal(&key, &value).is_some().then_some(value))?;
                if let Some((body, _)) = chunk.as_deref().and_then(|value| block::unseal(&key, value)) {
                    bytes.extend_from_slice(body);
                    continue;
                }
                if self.map().get(place.first).is_none_or(|line| line.meta.id != place.id || line.meta.is_dead(place.index)) {
                    return Ok(None);
                }
                if self.overlay().synced == synced {
                    return Err(open::corrupt(&*self.backend, format!("chunk {number} of large record {rev:?} is missing or damaged")));
                }
                continue 'again;
            }
            return Ok(Some(Bytes::from(bytes)));
        }
    }

    /// What is stored under a key and passes the check: on the backend, or in the batches on the way there.
    fn stored<T>(&self, key: &[u8], mut check: impl FnMut(Bytes) -> Option<T>) -> Result<Option<T>> {
        let on_backend = self.backend.get(key);
        if let Ok(Some(value)) = &on_backend
            && let Some(found) = check(value.clone())
        {
            return Ok(Some(found));
        }
        let on_the_way = self.overlay().find(key);
        if let Some(found) = on_the_way.and_then(check) {
            return Ok(Some(found));
        }
        on_backend.map(|_| None)
    }

    fn died(&self, records: u64, bytes: u64) {
        self.live_records.fetch_sub(records, Ordering::Relaxed);
        self.live_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        lock(&self.tail)
    }

    fn overlay(&self) -> MutexGuard<'_, Overlay> {
        lock(&self.overlay)
    }

    fn map(&self) -> RwLockReadGuard<'_, BlockMap> {
        read(&self.map)
    }

    fn map_mut(&self) -> RwLockWriteGuard<'_, BlockMap> {
        write(&self.map)
    }

    /// Panics with the values when an invariant does not hold. Reads every block: for tests and debug builds. No other
    /// thread may append, mark or commit meanwhile.
    ///
    /// - Within a block and from block to block and on into the tail, revisions ascend.
    /// - Each line of the map says what its block holds; counts, live bytes and digest of the summary are the sums over the lines.
    /// - `live_records` and `live_bytes` are what is live in blocks and tail.
    /// - The blocks that await `collect` are the sparse ones; none is without a live record.
    /// - The overlay holds the batches from the last synced one to the newest, without a gap.
    pub fn check_invariants(&self) {
        let writer = self.writer.enter();
        let lines: Vec<(Revision, Meta)> = {
            let map = self.map();
            map.check();
            map.iter().map(|(first, line)| (first, line.meta)).collect()
        };
        let mut totals = Totals { metas: writer.metas.len() as u64, ..Totals::default() };
        let mut last: Option<Revision> = None;
        let mut digests: Vec<u64> = writer.metas.iter().map(|(key, crc)| block::digest_of(&Key::Meta(key).encode(), *crc)).collect();
        let (_, _, deaths) = self.tail().check();
        let counted: BTreeSet<Revision> = deaths.iter().filter(|death| death.counted).map(|death| death.rev).collect();
        let (mut uncounted_records, mut uncounted_bytes) = (0, 0);
        for (first, meta) in &lines {
            let block = self.fetch(*first, meta, false).expect("the block can be read").expect("nobody moves blocks meanwhile");
            digests.extend([block::digest_of(&Key::Block(*first).encode(), meta.crc), block::dead_digest(*first, meta.dead)]);
            assert_eq!(block.count(), usize::from(meta.records), "records of block {first:?}");
            assert!(meta.live() > 0, "block {first:?} has no live record");
            let items: Vec<_> = (0..block.count()).map(|index| block.item(index)).collect();
            let mut expected = Meta::new(meta.id, meta.crc, &items);
            for (index, item) in items.iter().enumerate() {
                assert!(last < Some(item.rev), "record {:?} of block {first:?} stands after {last:?}", item.rev);
                last = Some(item.rev);
                if meta.is_dead(index) {
                    expected.bury(index, item);
                } else if let Some(stub) = item.stub {
                    totals.chunks += u64::from(stub.chunks());
                    digests.push(stub.digest);
                }
                if counted.contains(&item.rev) && !meta.is_dead(index) {
                    uncounted_records += 1;
                    uncounted_bytes += item.length() + RECORD_OVERHEAD;
                }
            }
            assert_eq!(*meta, expected, "the line of block {first:?}");
            totals.blocks += 1;
            totals.records += meta.live() as u64;
            totals.dead += u64::from(meta.dead.count_ones());
            totals.live_bytes += meta.live_bytes;
        }
        totals.digest = digests.into_iter().fold(0, u64::wrapping_add);
        assert_eq!(totals, writer.totals, "what is stored, and what the summary says");
        let sparse: BTreeSet<Revision> = lines.iter().filter(|(_, meta)| meta.is_sparse()).map(|(first, _)| *first).collect();
        assert_eq!(sparse, writer.sparse, "blocks that await collection");
        let tail = self.tail();
        let (live, live_bytes, _) = tail.check();
        let first_of_tail = tail.range(Revision::default(), successor(tail.last()), 1).first().map(|(rev, _)| *rev);
        drop(tail);
        assert!(first_of_tail.is_none_or(|first| last < Some(first)), "the tail begins at {first_of_tail:?}, the blocks end at {last:?}");
        assert_eq!(self.live_records.load(Ordering::Relaxed), totals.records + live - uncounted_records, "live records");
        assert_eq!(self.live_bytes.load(Ordering::Relaxed), totals.live_bytes + live_bytes - uncounted_bytes, "live bytes");
        let overlay = self.overlay();
        let sequences: Vec<u64> = overlay.batches.iter().map(|pending| pending.sequence).collect();
        assert_eq!(sequences, (overlay.synced + 1..=writer.sequence).collect::<Vec<_>>(), "batches that are not synced");
        assert_eq!(overlay.bytes, overlay.batches.iter().map(|pending| pending.bytes).sum::<usize>(), "their bytes");
    }
}

/// A block that was read before it was asked for.
struct Ahead {
    first: Revision,
    /// Of its [`Meta`]: a block of another number has taken its place when they differ.
    id: u64,
    block: Block,
}

/// A record that [`History::look_through`] has come to.
pub struct Sight<'a> {
    history: &'a History,
    rev: Revision,
    pub tombstone: bool,
    held: Held,
}

impl Sight<'_> {
    /// How the record begins: all of a small one, at most 16 KiB of a large one, which is one read. `None` when it has died.
    ///
    /// # Errors
    /// As [`History::get`].
    pub fn head(&self) -> Result<Option<Bytes>> {
        if let Held::Whole(record) = &self.held {
            return Ok(Some(record.bytes.clone()));
        }
        let key = Key::Chunk(self.rev, 0).encode();
        let chunk = self.history.stored(&key, |value| {
            let length = block::unseal(&key, &value)?.0.len();
            Some(value.slice(..length))
        })?;
        match chunk {
            Some(head) => Ok(Some(head)),
            // It has died, or is on its way from the overlay to the backend: the longer way knows how to tell.
            None => Ok(self.record()?.map(|record| record.bytes)),
        }
    }

    /// The whole record; `None` when it has died.
    ///
    /// # Errors
    /// As [`History::get`].
    pub fn record(&self) -> Result<Option<Record>> {
        match &self.held {
            Held::Whole(record) => Ok(Some(record.clone())),
            Held::Large { .. } => self.history.get(self.rev),
        }
    }
}

/// Where a reader found a record, to see afterwards whether it is still there.
struct Place {
    first: Revision,
    id: u64,
    index: usize,
}

/// A live record of a block, and its place.
fn live(block: &Block, meta: &Meta, rev: Revision) -> Option<(usize, Held)> {
    let index = block.find(rev).filter(|index| !meta.is_dead(*index))?;
    Some((index, block.held(index)))
}

/// The least revision above another one.
fn successor(rev: Revision) -> Revision {
    match rev.sub.checked_add(1) {
        Some(sub) => Revision { sub, ..rev },
        None => Revision { main: rev.main.saturating_add(1), sub: 0 },
    }
}

/// Lets one thread at a time to a value, for long and across blocking calls, without a lock being held meanwhile: the value
/// is taken out, and others wait until it is back.
struct Turnstile<T> {
    value: Mutex<Option<T>>,
    back: Condvar,
}

struct Pass<'a, T> {
    of: &'a Turnstile<T>,
    /// `Some` until it is dropped.
    value: Option<T>,
}

impl<T> Turnstile<T> {
    fn new(value: T) -> Turnstile<T> {
        Turnstile { value: Mutex::new(Some(value)), back: Condvar::new() }
    }

    fn enter(&self) -> Pass<'_, T> {
        let mut place = lock(&self.value);
        loop {
            if let Some(value) = place.take() {
                return Pass { of: self, value: Some(value) };
            }
            place = self.back.wait(place).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Deref for Pass<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("only drop takes it")
    }
}

impl<T> DerefMut for Pass<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("only drop takes it")
    }
}

impl<T> Drop for Pass<'_, T> {
    fn drop(&mut self) {
        *lock(&self.of.value) = self.value.take();
        self.of.back.notify_one();
    }
}
