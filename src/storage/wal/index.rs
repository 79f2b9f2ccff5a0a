//! What the log keeps in memory about its entries: where they stand on disk, whose they are, and the newest of them whole.
//!
//! Three plain structures, each over a contiguous range of indexes that grows at the end, is cut at the end by truncation and at the
//! front by a purge. [`Places`] speaks of what is durable, [`Terms`] and [`Cache`] of what the caller has appended.

use super::{LogEntry, LogId};
use std::collections::VecDeque;

/// Where a record stands in its segment; 8 bytes an entry is all the memory that an old entry costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub offset: u32,
    pub len: u32,
}

/// Gives back memory after a large purge, but not after every small one.
fn relax<T>(queue: &mut VecDeque<T>) {
    if queue.capacity() > 1024 && queue.len() < queue.capacity() / 4 {
        queue.shrink_to(queue.len() * 2);
    }
}

/// Entry index -> segment and slot, for every durable entry.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The index of `slots[0]`, or of the entry to come.
    first: u64,
    slots: VecDeque<Slot>,
    /// (first index, segment): from this index on, up to the next run's, entries stand in this segment. The first run covers `first`.
    runs: VecDeque<(u64, u64)>,
}

impl Places {
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// The index after the last.
    pub(super) fn next(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// Adds the entry `index`, which is `next()` unless the log was empty.
    pub(super) fn push(&mut self, index: u64, segment: u64, slot: Slot) {
        if self.slots.is_empty() {
            self.first = index;
        }
        debug_assert_eq!(index, self.next(), "entries are placed in order");
        if self.runs.back().is_none_or(|run| run.1 != segment) {
            self.runs.push_back((index, segment));
        }
        self.slots.push_back(slot);
    }

    /// Forgets entries from `next` on.
    pub(super) fn truncate(&mut self, next: u64) {
        let keep = next.saturating_sub(self.first).min(self.slots.len() as u64);
        self.slots.truncate(keep as usize);
        self.first = self.first.min(next);
        while self.runs.back().is_some_and(|run| run.0 >= next) {
            self.runs.pop_back();
        }
    }

    /// Forgets entries before `first`.
    pub(super) fn purge(&mut self, first: u64) {
        if first >= self.next() {
            self.slots.clear();
            self.runs.clear();
        } else if first > self.first {
            self.slots.drain(..(first - self.first) as usize);
            while self.runs.get(1).is_some_and(|run| run.0 <= first) {
                self.runs.pop_front();
            }
        }
        self.first = self.first.max(first);
        relax(&mut self.slots);
    }

    pub(super) fn get(&self, index: u64) -> Option<(u64, Slot)> {
        let slot = *self.slots.get(usize::try_from(index.checked_sub(self.first)?).ok()?)?;
        let run = self.runs.partition_point(|run| run.0 <= index).checked_sub(1)?;
        Some((self.runs.get(run)?.1, slot))
    }

    /// The oldest segment that holds an entry.
    pub(super) fn oldest_segment(&self) -> Option<u64> {
        if self.slots.is_empty() { None } else { self.runs.front().map(|run| run.1) }
    }
}

/// Entry index -> log id. Terms change seldom, so runs of equal leadership take next to no memory.
#[derive(Debug, Default)]
pub(super) struct Terms {
    runs: VecDeque<LogId>,
}

impl Terms {
    pub(super) fn push(&mut self, id: LogId) {
        if self.runs.back().is_none_or(|run| (run.term, run.node) != (id.term, id.node)) {
            self.runs.push_back(id);
        }
    }

    /// Forgets entries from `next` on.
    pub(super) fn truncate(&mut self, next: u64) {
        while self.runs.back().is_some_and(|run| run.index >= next) {
            self.runs.pop_back();
        }
    }

    /// Forgets entries before `first`.
    pub(super) fn purge(&mut self, first: u64) {
        while self.runs.get(1).is_some_and(|run| run.index <= first) {
            self.runs.pop_front();
        }
    }

    /// The id of entry `index`, which the caller knows to be in the log.
    pub(super) fn get(&self, index: u64) -> Option<LogId> {
        let run = self.runs.get(self.runs.partition_point(|run| run.index <= index).checked_sub(1)?)?;
        Some(LogId { index, ..*run })
    }
}

/// What one cached entry takes besides its payload.
const CACHED_OVERHEAD: usize = 80;

/// The newest entries, whole. Those that are not durable yet stand only here, so only durable ones are ever let go.
#[derive(Debug)]
pub(super) struct Cache {
    first: u64,
    items: VecDeque<(LogEntry, u64)>,
    bytes: usize,
    limit: usize,
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self { first: 0, items: VecDeque::new(), bytes: 0, limit }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds the entry after the last; `ticket` says which durable ticket makes it durable.
    pub(super) fn push(&mut self, entry: LogEntry, ticket: u64) {
        if self.items.is_empty() {
            self.first = entry.id.index;
        }
        self.bytes += entry.payload.len() + CACHED_OVERHEAD;
        self.items.push_back((entry, ticket));
    }

    fn forget(&mut self, item: Option<(LogEntry, u64)>) -> Option<LogEntry> {
        let (entry, _) = item?;
        self.bytes -= entry.payload.len() + CACHED_OVERHEAD;
        Some(entry)
    }

    /// Forgets entries from `next` on.
    pub(super) fn truncate(&mut self, next: u64) {
        while self.items.back().is_some_and(|(entry, _)| entry.id.index >= next) {
            let item = self.items.pop_back();
            self.forget(item);
        }
    }

    /// Forgets entries before `first`.
    pub(super) fn purge(&mut self, first: u64) {
        while self.items.front().is_some_and(|(entry, _)| entry.id.index < first) {
            let item = self.items.pop_front();
            self.first += 1;
            self.forget(item);
        }
        relax(&mut self.items);
    }

    /// Moves the oldest entries beyond the limit into `out`, which the caller empties without the lock, as long as they are durable.
    pub(super) fn evict(&mut self, durable: u64, out: &mut Vec<LogEntry>) {
        while self.bytes > self.limit && self.items.front().is_some_and(|(_, ticket)| *ticket <= durable) {
            let item = self.items.pop_front();
            self.first += 1;
            out.extend(self.forget(item));
        }
    }

    pub(super) fn get(&self, index: u64) -> Option<&LogEntry> {
        self.items.get(usize::try_from(index.checked_sub(self.first)?).ok()?).map(|(entry, _)| entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(offset: u32) -> Slot {
        Slot { offset, len: 1 }
    }

    #[test]
    fn places_follow_truncation_and_purge() {
        let mut places = Places::default();
        for (index, segment) in [(5, 1), (6, 1), (7, 2), (8, 2), (9, 3)] {
            places.push(index, segment, slot(index as u32));
        }
        assert_eq!(places.get(4), None);
        assert_eq!(places.get(6), Some((1, slot(6))));
        assert_eq!(places.get(8), Some((2, slot(8))));
        places.truncate(8);
        assert_eq!((places.first(), places.next()), (5, 8));
        places.push(8, 3, slot(80));
        assert_eq!(places.get(8), Some((3, slot(80))));
        places.purge(7);
        assert_eq!(places.oldest_segment(), Some(2));
        places.purge(8);
        assert_eq!(places.oldest_segment(), Some(3));
        assert_eq!(places.get(8), Some((3, slot(80))));
        places.purge(20);
        assert_eq!((places.first(), places.next(), places.oldest_segment()), (20, 20, None));
        places.truncate(3);
        assert_eq!((places.first(), places.next()), (3, 3));
        places.push(3, 9, slot(0));
        assert_eq!(places.get(3), Some((9, slot(0))));
    }

    #[test]
    fn terms_are_runs() {
        let mut terms = Terms::default();
        let id = |term, index| LogId { term, node: 1, index };
        for entry in [id(1, 0), id(1, 1), id(3, 2), id(3, 3), id(4, 4)] {
            terms.push(entry);
        }
        assert_eq!(terms.get(1), Some(id(1, 1)));
        assert_eq!(terms.get(3), Some(id(3, 3)));
        terms.truncate(3);
        terms.push(id(5, 3));
        assert_eq!(terms.get(2), Some(id(3, 2)));
        assert_eq!(terms.get(3), Some(id(5, 3)));
        terms.purge(3);
        assert_eq!(terms.get(3), Some(id(5, 3)));
    }

    #[test]
    fn the_cache_lets_go_of_durable_entries_only() {
        let mut cache = Cache::new(2 * (CACHED_OVERHEAD + 1));
        let mut out = Vec::new();
        for index in 0..4 {
            cache.push(LogEntry { id: LogId { term: 1, node: 1, index }, payload: bytes::Bytes::from_static(b"x") }, index + 1);
        }
        cache.evict(1, &mut out);
        assert_eq!(out.len(), 1);
        assert!(cache.get(0).is_none() && cache.get(1).is_some());
        cache.evict(4, &mut out);
        assert!(cache.get(1).is_none() && cache.get(2).is_some() && cache.get(3).is_some());
        cache.truncate(3);
        assert!(cache.get(3).is_none() && cache.get(2).is_some());
        cache.purge(9);
        assert_eq!(cache.bytes(), 0);
    }
}
