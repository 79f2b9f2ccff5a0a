//! What has been applied and is not yet in a block: the history's end, in memory.
//!
//! The tail is a queue of [`Cut`]s. A cut holds the changes of whole log entries, many of them, up to about
//! [`Limits::cut_bytes`](super::Limits); the last one, `building`, still grows. Behind its committed part come the changes of the entry that is
//! just being applied, which no batch may contain yet. A batch takes cuts from the front, whole ones, so that what is
//! stored always ends where a log entry ends.
//!
//! A death that is marked while no entry is open belongs to none: it joins the committed part at once, so that it goes out
//! also when no entry ever follows. One that is marked while an entry is open waits for that entry's end, for the entry may
//! be the one that allows it.
//!
//! ```text
//! sealed: [ entries 1..9 ] [ entries 10..14 ]     building: [ entries 15, 16 | of entry 17, so far ]
//! ```
//!
//! # Invariants
//! - Revisions ascend through the whole tail.
//! - A cut leaves the queue only after its records are in the block map, so that a reader who looks here first and there
//!   next finds them in one of the two.
//! - `dead` holds exactly the revisions in the cuts' lists of dead records.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::RECORD_OVERHEAD;
use crate::storage::{Record, Revision};

/// What a dead mark counts towards the size of a cut.
const DEAD_BYTES: usize = 48;

/// A revision that has died, and whether the tail still held its record then (the live counters are then lower already).
#[derive(Clone, Copy, Debug)]
pub(super) struct Death {
    pub rev: Revision,
    pub counted: bool,
}

/// The changes of whole log entries, and deaths that belong to no entry.
#[derive(Default, Debug)]
pub(super) struct Cut {
    pub records: Vec<(Revision, Record)>,
    pub dead: Vec<Death>,
    /// By key; `None` removes it. Only the last of several changes of a key is kept.
    pub metas: BTreeMap<Vec<u8>, Option<Bytes>>,
    /// What the last of the entries was committed with; none when there are only deaths.
    pub applied: Option<Bytes>,
    /// The highest revision up to here, also when it stands in an earlier cut.
    last: Revision,
    bytes: usize,
}

/// See the module head.
#[derive(Default, Debug)]
pub(super) struct Tail {
    sealed: VecDeque<Arc<Cut>>,
    building: Cut,
    /// How many of `building`'s records and deaths belong to no open entry.
    committed_records: usize,
    committed_dead: usize,
    /// Whether `building` holds a commit at all; an entry may change nothing.
    committed: bool,
    /// The changes of the entry that is being applied; they join `building.metas` when it is committed.
    open_metas: BTreeMap<Vec<u8>, Option<Bytes>>,
    open_bytes: usize,
    dead: BTreeSet<Revision>,
    last: Revision,
    records: usize,
    bytes: usize,
    cut_bytes: usize,
}

impl Tail {
    /// An empty tail behind a history that ends at `last`, whose cuts are sealed at `cut_bytes`.
    pub fn new(last: Revision, cut_bytes: usize) -> Tail {
        Tail { last, cut_bytes, building: Cut { last, ..Cut::default() }, ..Tail::default() }
    }

    /// The number of records, and the bytes of all changes.
    pub fn size(&self) -> (usize, usize) {
        (self.records, self.bytes)
    }

    /// How many deaths there are.
    pub fn deaths(&self) -> usize {
        self.dead.len()
    }

    /// Bytes of all changes but deaths.
    pub fn bytes_without_deaths(&self) -> usize {
        self.bytes - self.dead.len() * DEAD_BYTES
    }

    /// The highest revision there has been.
    pub fn last(&self) -> Revision {
        self.last
    }

    /// See [`History::append`](super::History::append).
    pub fn append(&mut self, rev: Revision, record: Record) {
        assert!(rev > self.last && rev.main >= 0, "revision {rev:?} is appended after {:?}", self.last);
        let bytes = record.bytes.len() + RECORD_OVERHEAD as usize;
        self.last = rev;
        self.building.records.push((rev, record));
        self.records += 1;
        self.grow(bytes);
    }

    /// See [`History::put_meta`](super::History::put_meta).
    pub fn put_meta(&mut self, key: &[u8], value: Option<Bytes>) {
        let bytes = key.len() + value.as_ref().map_or(0, Bytes::len) + RECORD_OVERHEAD as usize;
        if self.open_metas.insert(key.to_vec(), value).is_none() {
            self.grow(bytes);
        }
    }

    /// Marks revisions dead. Calls `died` with each record that is still in the tail and was not marked before.
    pub fn mark_dead(&mut self, revs: &[Revision], mut died: impl FnMut(&Record)) {
        for &rev in revs {
            if !self.dead.insert(rev) {
                continue;
            }
            let held = self.get(rev);
            let counted = held.is_some();
            held.iter().for_each(|record| died(record));
            self.building.dead.push(Death { rev, counted });
            if self.is_open() {
                self.grow(DEAD_BYTES);
                continue;
            }
            self.committed_dead = self.building.dead.len();
            self.building.bytes += DEAD_BYTES;
            self.bytes += DEAD_BYTES;
            if self.building.bytes >= self.cut_bytes {
                self.seal();
            }
        }
    }

    /// Whether an entry is being applied that has changed something already.
    fn is_open(&self) -> bool {
        !self.open_metas.is_empty() || self.building.records.len() > self.committed_records
    }

    /// See [`History::commit`](super::History::commit).
    pub fn commit(&mut self, applied: Bytes) {
        while let Some((key, value)) = self.open_metas.pop_first() {
            self.building.metas.insert(key, value);
        }
        self.building.applied = Some(applied);
        self.building.last = self.last;
        self.building.bytes += std::mem::take(&mut self.open_bytes);
        self.committed_records = self.building.records.len();
        self.committed_dead = self.building.dead.len();
        self.committed = true;
        if self.building.bytes >= self.cut_bytes {
            self.seal();
        }
    }

    /// Closes the cut that is being built, and says how many there are to write.
    pub fn seal(&mut self) -> usize {
        if self.committed || self.committed_dead > 0 {
            let records = self.building.records.split_off(self.committed_records);
            let dead = self.building.dead.split_off(self.committed_dead);
            let next = Cut { records, dead, last: self.building.last, ..Cut::default() };
            self.sealed.push_back(Arc::new(std::mem::replace(&mut self.building, next)));
            (self.committed_records, self.committed_dead, self.committed) = (0, 0, false);
        }
        self.sealed.len()
    }

    /// The first sealed cuts, at most `count`, up to about `max_bytes`, and at least one if there is one.
    pub fn front(&self, count: usize, max_bytes: usize) -> Vec<Arc<Cut>> {
        let mut bytes = 0;
        let within = |cut: &&Arc<Cut>| {
            let first = bytes == 0;
            bytes += cut.bytes.max(1);
            first || bytes <= max_bytes
        };
        self.sealed.iter().take(count).take_while(within).cloned().collect()
    }

    /// Takes cuts off the front that are in blocks by now. Whoever gets them drops them outside the lock.
    pub fn pop(&mut self, count: usize) -> Vec<Arc<Cut>> {
        let cuts: Vec<_> = self.sealed.drain(..count.min(self.sealed.len())).collect();
        for cut in &cuts {
            self.bytes -= cut.bytes;
            self.records -= cut.records.len();
            cut.dead.iter().for_each(|death| {
                self.dead.remove(&death.rev);
            });
        }
        cuts
    }

    /// The record of a revision, dead or not, if it is here.
    pub fn get(&self, rev: Revision) -> Option<&Record> {
        let records = match self.sealed.partition_point(|cut| cut.last < rev) {
            index if index < self.sealed.len() => &self.sealed.get(index)?.records,
            _ => &self.building.records,
        };
        let index = records.binary_search_by_key(&rev, |(rev, _)| *rev).ok()?;
        records.get(index).map(|(_, record)| record)
    }

    /// Up to `max` live records of `[from, to)`, ascending.
    pub fn range(&self, from: Revision, to: Revision, max: usize) -> Vec<(Revision, Record)> {
        let start = self.sealed.partition_point(|cut| cut.last < from);
        let sealed = self.sealed.iter().skip(start).map(|cut| &cut.records);
        let from_each = sealed.chain([&self.building.records]).flat_map(|records| {
            let start = records.partition_point(|(rev, _)| *rev < from);
            records.iter().skip(start)
        });
        from_each.take_while(|(rev, _)| *rev < to).filter(|(rev, _)| !self.dead.contains(rev)).take(max).cloned().collect()
    }

    /// The marked revisions of `[from, to]` that are not yet marked in a block.
    pub fn dead(&self, from: Revision, to: Revision) -> Vec<Revision> {
        if self.dead.is_empty() { Vec::new() } else { self.dead.range(from..=to).copied().collect() }
    }

    /// Sums over the tail, for [`History::check_invariants`](super::History::check_invariants): records and bytes that are
    /// live, and those that are dead here but whose death the blocks do not know yet.
    pub fn check(&self) -> (u64, u64, Vec<Death>) {
        let cuts = || self.sealed.iter().map(|cut| &**cut).chain([&self.building]);
        let mut before = None;
        let (mut live, mut live_bytes) = (0, 0);
        for (rev, record) in cuts().flat_map(|cut| &cut.records) {
            assert!(before < Some(*rev), "revision {rev:?} stands after {before:?} in the tail");
            before = Some(*rev);
            if !self.dead.contains(rev) {
                live += 1;
                live_bytes += record.bytes.len() as u64 + RECORD_OVERHEAD;
            }
        }
        let deaths: Vec<Death> = cuts().flat_map(|cut| &cut.dead).copied().collect();
        let marked: BTreeSet<Revision> = deaths.iter().map(|death| death.rev).collect();
        assert_eq!(marked, self.dead, "the set of dead revisions is not what the cuts hold");
        assert_eq!(cuts().map(|cut| cut.records.len()).sum::<usize>(), self.records, "count of records in the tail");
        assert_eq!(cuts().map(|cut| cut.bytes).sum::<usize>() + self.open_bytes, self.bytes, "bytes of the tail");
        (live, live_bytes, deaths)
    }

    fn grow(&mut self, bytes: usize) {
        self.open_bytes += bytes;
        self.bytes += bytes;
    }
}
