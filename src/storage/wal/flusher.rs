//! The log's own thread: takes what waits, writes it as frames, syncs, calls back.
//!
//! It alone writes to the current segment, and it alone decides what goes where. It holds the state's lock only to take the queue (a
//! swap) and to publish what has become durable, never over a file operation.

use super::frame::{ALIGN, FrameBuf, SEGMENT_HEADER_LEN, opaque_len, opening_len};
use super::index::Slot;
use super::space;
use super::state::{FailOnPanic, Item, Queued, Segment, Shared, Sleep, State};
use super::{FRAME_OVERHEAD, LogEntry, LogState, MARK_BYTES, MAX_FRAME_BYTES, MAX_OPAQUE_BYTES};
use crate::error::Error;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long nothing may have come before the mark is written, and how long a committed mark may wait for a frame to ride on. Longer than a
/// round of replication, so that under load there is none: written through the page cache, it would have to go to the disk by itself before
/// the next frame.
pub(super) const COMMITTED_NAP: Duration = Duration::from_millis(if cfg!(test) { 2 } else { 100 });

/// A queue that had to hold more items than this is given back once it is empty.
const KEPT_CAPACITY: usize = 64 << 10;

/// Where writing goes on after opening.
pub(super) struct Position {
    pub segment: Segment,
    /// Where the next frame goes.
    pub offset: u64,
    /// The sequence number of the last frame.
    pub frame: u64,
    /// The state that the frames written so far amount to.
    pub written: LogState,
}

/// What a durable record changes in the index.
enum Effect {
    Place { index: u64, slot: Slot },
    Truncate { next: u64 },
    Purge { first: u64 },
}

/// Why the thread ends early: `poison` if the log must not be written to again.
pub(super) struct Stop {
    error: Error,
    poison: bool,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop { error, poison: true }
    }
}

pub(super) enum Step {
    Flush,
    Mark,
    Close,
}

pub(super) struct Flusher {
    shared: Arc<Shared>,
    at: Position,
    buf: FrameBuf,
    /// Taken from the queue, not durable yet.
    taken: VecDeque<Queued>,
    effects: Vec<Effect>,
    evicted: Vec<LogEntry>,
    /// A mark stands after the last frame; it may not be durable.
    marked: bool,
    mark_synced: bool,
    /// Which committed marks the last frame that had one, and the last frame or mark, carried.
    frame_committed: u64,
    marked_committed: u64,
}

/// The body of the log's thread.
pub(super) fn run(shared: Arc<Shared>, at: Position) {
    let for_guard = shared.clone();
    let _guard = FailOnPanic(&for_guard);
    let mut flusher = Flusher::new(shared, at);
    let stop = loop {
        let step = match flusher.next_step() {
            Ok(Step::Flush) => flusher.flush(),
            Ok(Step::Mark) => flusher.mark(),
            Ok(Step::Close) => break flusher.close().err(),
            Err(stop) => Err(stop),
        };
        if let Err(stop) = step {
            break Some(stop);
        }
    };
    flusher.end(stop);
}

impl Flusher {
    pub(super) fn new(shared: Arc<Shared>, at: Position) -> Flusher {
        let opened_committed = shared.lock().committed_version;
        Flusher {
            shared,
            at,
            buf: FrameBuf::default(),
            taken: VecDeque::new(),
            effects: Vec::new(),
            evicted: Vec::new(),
            // Opening has written a mark and synced it; the committed mark in it is not in a frame, though.
            marked: true,
            mark_synced: true,
            frame_committed: 0,
            marked_committed: opened_committed,
        }
    }

    /// What is to be done now, if anything is.
    fn due(state: &mut State, taken: &mut VecDeque<Queued>, marked: Option<u64>, napped: bool) -> Result<Option<Step>, Stop> {
        if let Some(error) = &state.failed {
            return Err(error.clone().into());
        }
        if !taken.is_empty() {
            return Ok(Some(Step::Flush));
        }
        if !state.queue.is_empty() {
            std::mem::swap(&mut state.queue, taken);
            return Ok(Some(Step::Flush));
        }
        if napped && marked.is_none_or(|committed| state.committed_version != committed) {
            return Ok(Some(Step::Mark));
        }
        Ok(state.closing.then_some(Step::Close))
    }

    /// Which committed mark the mark after the last frame carries; none: there is no such mark yet.
    fn marked(&self) -> Option<u64> {
        self.marked.then_some(self.marked_committed)
    }

    /// Looks for something to do, and takes it if it is to be written.
    ///
    /// # Errors
    /// What has ended the log.
    #[cfg(feature = "simulation")]
    pub(super) fn look(&mut self, napped: bool) -> crate::error::Result<Option<Step>> {
        let marked = self.marked();
        let mut state = self.shared.lock();
        let due = Self::due(&mut state, &mut self.taken, marked, napped).map_err(|stop| stop.error)?;
        state.sleep = match due {
            Some(_) => Sleep::Awake,
            None if napped => Sleep::Deep,
            None => Sleep::Nap,
        };
        Ok(due)
    }

    /// Writes one frame of what was taken, unless that has been done meanwhile.
    ///
    /// # Errors
    /// What has ended the log.
    #[cfg(feature = "simulation")]
    pub(super) fn flush_taken(&mut self) -> crate::error::Result<()> {
        if self.taken.is_empty() { Ok(()) } else { self.flush().map_err(|stop| self.fail(stop)) }
    }

    /// Writes the mark.
    ///
    /// # Errors
    /// What has ended the log.
    #[cfg(feature = "simulation")]
    pub(super) fn write_mark(&mut self) -> crate::error::Result<()> {
        self.mark().map_err(|stop| self.fail(stop))
    }

    #[cfg(feature = "simulation")]
    fn fail(&self, stop: Stop) -> Error {
        self.shared.fail(stop.error.clone());
        stop.error
    }

    /// Waits for something to do.
    fn next_step(&mut self) -> Result<Step, Stop> {
        let mut napped = false;
        let marked = self.marked();
        let mut state = self.shared.lock();
        loop {
            if let Some(step) = Self::due(&mut state, &mut self.taken, marked, napped)? {
                return Ok(step);
            }
            if napped {
                state.sleep = Sleep::Deep;
                state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                state.sleep = Sleep::Nap;
                let woken = self.shared.work.wait_timeout(state, COMMITTED_NAP).unwrap_or_else(PoisonError::into_inner);
                (state, napped) = (woken.0, woken.1.timed_out());
            }
            state.sleep = Sleep::Awake;
        }
    }

    /// Writes one frame of what was taken, syncs it, publishes it and calls back.
    fn flush(&mut self) -> Result<(), Stop> {
        let control = self.shared.options.control_bytes();
        let Some(first) = self.taken.iter().find(|queued| queued.item.record_len() > 0) else {
            // Only callbacks that wait for what is durable already.
            self.publish(self.taken.len());
            return Ok(());
        };
        let (len, floor) = (first.item.record_len() as u64, first.item.floor(control));
        let mut fresh = false;
        if self.at.offset + FRAME_OVERHEAD + len > self.limit(floor) {
            let opening = opening_len(&LogState { committed: None, ..self.at.written.clone() }) + 4 + MAX_OPAQUE_BYTES;
            let need = (SEGMENT_HEADER_LEN + opening) as u64 + FRAME_OVERHEAD + len + floor + MARK_BYTES;
            if !self.rotate(need)? {
                // The order has changed.
                return Ok(());
            }
            fresh = true;
        }

        self.buf.begin(self.at.segment.salt, MAX_FRAME_BYTES);
        if fresh {
            // It speaks of what was before this frame.
            let (committed, version) = self.shared.lock().writable_committed(&self.taken);
            if committed.is_some() {
                (self.at.written.committed, self.frame_committed) = (committed, version);
            }
            self.buf.opening(&self.at.written);
        }
        let (mut count, mut any, mut entries) = (0, false, 0);
        for queued in &self.taken {
            let len = queued.item.record_len();
            if len > 0 {
                // The first record was seen to fit; it may be larger than frames are otherwise.
                let end = self.at.offset + (self.buf.len() + len + ALIGN) as u64;
                if any && (self.buf.len() + len > MAX_FRAME_BYTES || end > self.limit(queued.item.floor(control))) {
                    break;
                }
                any = true;
            }
            count += 1;
            match &queued.item {
                Item::Entry(entry) => {
                    let (offset, len) = self.buf.entry(entry.id, &entry.payload);
                    // Both fit: a segment is at most 1 GiB, or made for one entry, and entries are bounded.
                    let slot = Slot { offset: (self.at.offset + offset as u64) as u32, len: len as u32 };
                    self.effects.push(Effect::Place { index: entry.id.index, slot });
                    self.at.written.push(entry.id).map_err(Error::Failed)?;
                    entries += 1;
                }
                Item::Truncate(last) => {
                    self.buf.truncate(*last);
                    self.at.written.truncate(*last);
                    self.effects.push(Effect::Truncate { next: self.at.written.next() });
                }
                Item::Purge(upto) => {
                    self.buf.purge(*upto);
                    self.at.written.purge(*upto);
                    self.effects.push(Effect::Purge { first: upto.index + 1 });
                }
                Item::Vote(vote) => {
                    self.buf.vote(vote);
                    self.at.written.vote = Some(vote.clone());
                }
                Item::Barrier => {}
            }
        }
        let (committed, version, low) = {
            let state = self.shared.lock();
            let (committed, version) = state.writable_committed(self.taken.iter().skip(count));
            (committed, version, state.low.is_some())
        };
        if let Some(committed) = committed
            && !fresh
            && version != self.frame_committed
        {
            let end = self.at.offset + (self.buf.len() + opaque_len(committed.len()) + ALIGN) as u64;
            // Without room here it goes into the mark, and into the next opening. When space is low, the room is for what was accepted.
            if end <= self.limit(control) && !low {
                self.buf.committed(&committed);
                self.frame_committed = version;
                self.at.written.committed = Some(committed);
            }
        }

        let segment = &self.at.segment;
        let bytes = self.buf.finish(self.at.frame + 1);
        self.shared.append(segment, bytes, self.at.offset)?;
        let meters = &self.shared.meters;
        meters.written_bytes.fetch_add(bytes.len() as u64, Relaxed);
        meters.entries.fetch_add(entries, Relaxed);
        self.at.offset += bytes.len() as u64;
        self.at.frame += 1;
        self.marked = false;
        self.publish(count);
        Ok(())
    }

    /// How far into the current segment a frame may reach that leaves `floor` free.
    fn limit(&self, floor: u64) -> u64 {
        self.at.segment.capacity.saturating_sub(MARK_BYTES + floor)
    }

    /// Publishes the first `count` items as durable and calls back.
    fn publish(&mut self, count: usize) {
        let mut state = self.shared.lock();
        let current = self.at.segment.sequence;
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Place { index, slot } => state.places.push(index, current, slot),
                Effect::Truncate { next } => state.places.truncate(next),
                Effect::Purge { first } => state.places.purge(first),
            }
        }
        let items = || self.taken.iter().take(count);
        let cost: u64 = items().map(|queued| queued.item.cost()).sum();
        state.queued_bytes = state.queued_bytes.saturating_sub(cost);
        state.published += 1;
        state.room = self.limit(0).saturating_sub(self.at.offset);
        // Only entries count: a purge may have overtaken some.
        if let Some(durable) = items().rev().find(|queued| matches!(queued.item, Item::Entry(_))).map(|queued| queued.ticket) {
            state.cache.evict(durable, &mut self.evicted);
        }
        let oldest = state.places.oldest_segment().unwrap_or(current).min(current);
        let mut dropped = false;
        while let Some(entry) = state.segments.first_entry().filter(|entry| *entry.key() < oldest) {
            let segment = entry.remove();
            state.dropped.push_back(segment);
            dropped = true;
        }
        drop(state);
        if dropped {
            self.shared.space.notify_one();
        }
        for done in self.taken.drain(..count).filter_map(|queued| queued.done) {
            done(Ok(()));
        }
        self.evicted.clear();
        if self.taken.is_empty() && self.taken.capacity() > KEPT_CAPACITY {
            self.taken = VecDeque::new();
        }
    }

    /// Goes on to the next segment, which has at least `need` bytes, waiting for it if it is not ready. `false`: a purge has overtaken
    /// what waits for space, and fits where we are.
    fn rotate(&mut self, need: u64) -> Result<bool, Stop> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone().into());
            }
            if let Some(next) = state.next.take_if(|next| next.capacity >= need) {
                state.wanted = 0;
                state.segments.insert(next.sequence, next.clone());
                self.at.segment = next;
                self.at.offset = SEGMENT_HEADER_LEN as u64;
                state.room = self.limit(0).saturating_sub(self.at.offset);
                drop(state);
                self.shared.space.notify_one();
                return Ok(true);
            }
            if state.wanted < need {
                state.wanted = need;
                self.shared.space.notify_one();
            }
            if let Some(low) = &state.low {
                if state.closing {
                    return Err(Stop { error: low.clone(), poison: false });
                }
                self.taken.append(&mut state.queue);
                if promote_purges(&mut self.taken) {
                    return Ok(false);
                }
            }
            if self.shared.is_stepped() {
                drop(state);
                if !space::turn(&self.shared) {
                    let error = Error::Failed("the simulated log has no room for the next segment".into());
                    return Err(Stop { error, poison: true });
                }
                state = self.shared.lock();
                continue;
            }
            state.sleep = Sleep::Deep;
            state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.sleep = Sleep::Awake;
        }
    }

    /// Writes the mark after the last frame, with a committed mark that is in no frame yet.
    fn mark(&mut self) -> Result<(), Stop> {
        let (committed, version) = self.shared.lock().writable_committed(&self.taken);
        let segment = &self.at.segment;
        self.buf.begin(segment.salt, MAX_FRAME_BYTES);
        if let Some(committed) = committed.filter(|_| version != self.frame_committed) {
            self.buf.committed(&committed);
        }
        let written = segment.file.write_at(self.buf.finish_mark(self.at.frame), self.at.offset);
        written.map_err(|e| Error::io("write to", self.shared.disk.path(&segment.name()), e))?;
        (self.marked, self.mark_synced, self.marked_committed) = (true, false, version);
        Ok(())
    }

    /// Leaves the segment as a reader can trust it most.
    fn close(&mut self) -> Result<(), Stop> {
        if self.shared.lock().committed_version != self.marked_committed {
            self.mark()?;
        }
        if !self.mark_synced {
            self.shared.sync(&self.at.segment)?;
        }
        Ok(())
    }

    /// Tells everyone who still waits why it will not be.
    fn end(mut self, stop: Option<Stop>) {
        let error = match stop {
            None => Error::Stopped,
            Some(Stop { error, poison }) => {
                if poison && self.shared.lock().failed.is_none() {
                    self.shared.fail(error.clone());
                }
                error
            }
        };
        let mut state = self.shared.lock();
        state.stopped = true;
        self.taken.append(&mut state.queue);
        state.queued_bytes = 0;
        drop(state);
        self.shared.space.notify_one();
        for done in self.taken.drain(..).filter_map(|queued| queued.done) {
            done(Err(error.clone()));
        }
    }
}

/// Brings purges to the front that have only entries to overtake, and none that they purge. `false` if that changes nothing.
///
/// Such a purge may be written before those entries: whichever of the two a crash leaves, the log is one that the caller has seen.
fn promote_purges(taken: &mut VecDeque<Queued>) -> bool {
    let lowest = taken.iter().filter_map(|queued| match &queued.item {
        Item::Entry(entry) => Some(entry.id.index),
        Item::Truncate(last) => Some(last.map_or(0, |last| last.index)),
        _ => None,
    });
    let Some(lowest) = lowest.min() else { return false };
    let free = |queued: &Queued| matches!(&queued.item, Item::Purge(upto) if upto.index < lowest);
    if taken.iter().skip_while(|queued| free(queued)).all(|queued| !free(queued)) {
        return false;
    }
    let (mut purges, rest): (VecDeque<_>, VecDeque<_>) = taken.drain(..).partition(free);
    purges.extend(rest);
    *taken = purges;
    true
}
