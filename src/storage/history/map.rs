//! Which blocks there are, and those of them that are in memory.
//!
//! One ordered map serves both: a look at a revision finds the block's line, and in the line the block itself when it is
//! cached, under one short read lock. Eviction is second chance: cached blocks queue up in a ring; one that was used since
//! it was last at the front goes to the back once more, any other is dropped. A use is one relaxed store, no list moves.
//!
//! # Invariants
//! - Blocks do not overlap: every record of a block lies below the next block's first revision.
//! - `cached_bytes` is the sum over the cached blocks, and at most `capacity`, or what one block takes if that is more.
//! - Each cached block stands in the ring once. The ring may hold lines of blocks that are gone; they are skipped, and
//!   thrown out when they make up more than half of it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};

use super::RECORD_OVERHEAD;
use super::block::{BLOCK_RECORDS, Bits, Block, ENTRY, ITEMS_BYTES, Item};
use crate::storage::Revision;

/// What a cached block takes beside its bytes: two allocations and its places in the map and the ring.
const CACHED_OVERHEAD: usize = 128;

/// What is known of a block without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Meta {
    /// Never used twice in a process: tells a block from another one under the same key.
    pub id: u64,
    /// The live records' own bytes, also those in chunks, and [`RECORD_OVERHEAD`] for each.
    pub live_bytes: u64,
    /// A set bit for each dead record.
    pub dead: Bits,
    /// The block's checksum.
    pub crc: u32,
    /// What the live records take in the block.
    pub live_cost: u32,
    /// What all its records take in the block.
    pub cost: u32,
    pub records: u8,
}

impl Meta {
    /// The line of a block of these items, none of them dead.
    pub fn new(id: u64, crc: u32, items: &[Item]) -> Meta {
        let cost = items.iter().map(|item| item.cost() as u32).sum();
        let live_bytes = items.iter().map(|item| item.length() + RECORD_OVERHEAD).sum();
        Meta { id, live_bytes, dead: 0, crc, live_cost: cost, cost, records: items.len() as u8 }
    }

    /// Whether the record at a place is dead.
    pub fn is_dead(&self, index: usize) -> bool {
        self.dead & (1 << index) != 0
    }

    /// Marks a record dead, if it is not already; says whether it was alive.
    pub fn bury(&mut self, index: usize, item: &Item) -> bool {
        if self.is_dead(index) {
            return false;
        }
        self.dead |= 1 << index;
        self.live_cost -= item.cost() as u32;
        self.live_bytes -= item.length() + RECORD_OVERHEAD;
        true
    }

    /// How many records are alive.
    pub fn live(&self) -> usize {
        usize::from(self.records) - self.dead.count_ones() as usize
    }

    /// Less than half of the block is alive: it is worth being rewritten.
    pub fn is_sparse(&self) -> bool {
        self.live_cost * 2 < self.cost
    }

    /// Less than half of a block's limits is alive: a neighbour that is rewritten may take its records along.
    pub fn is_small(&self) -> bool {
        self.live() * 2 < BLOCK_RECORDS && (self.live_cost as usize) * 2 < ITEMS_BYTES
    }
}

/// A block's line in the map.
#[derive(Debug)]
pub(super) struct Line {
    pub meta: Meta,
    cached: Option<Box<Block>>,
    used: AtomicBool,
}

impl Line {
    /// Whether the block is in memory; this is not a use.
    pub fn is_cached(&self) -> bool {
        self.cached.is_some()
    }

    /// The block, if it is in memory.
    pub fn block(&self) -> Option<&Block> {
        let block = self.cached.as_deref()?;
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(block)
    }
}

/// See the module head.
#[derive(Debug)]
pub(super) struct BlockMap {
    blocks: BTreeMap<Revision, Line>,
    ring: VecDeque<(Revision, u64)>,
    cached: usize,
    cached_bytes: usize,
    capacity: usize,
}

impl BlockMap {
    /// An empty map whose cached blocks take at most `capacity` bytes.
    pub fn new(capacity: usize) -> BlockMap {
        BlockMap { blocks: BTreeMap::new(), ring: VecDeque::new(), cached: 0, cached_bytes: 0, capacity }
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn cached_bytes(&self) -> usize {
        self.cached_bytes
    }

    /// Whether so many bytes more can be cached before any are dropped.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.cached_bytes + bytes <= self.capacity
    }

    /// The only block that may hold the revision.
    pub fn find(&self, rev: Revision) -> Option<(Revision, &Line)> {
        self.blocks.range(..=rev).next_back().map(|(first, line)| (*first, line))
    }

    /// The block of that first revision.
    pub fn get(&self, first: Revision) -> Option<&Line> {
        self.blocks.get(&first)
    }

    /// The first block below `to` that may hold a revision from `from` on, other than the block `seen`.
    pub fn next(&self, from: Revision, to: Revision, seen: Option<(Revision, u64)>) -> Option<(Revision, &Line)> {
        let around = self.find(from).filter(|(first, line)| seen != Some((*first, line.meta.id)));
        around.or_else(|| {
            let behind = self.blocks.range((Bound::Excluded(from), Bound::Unbounded)).next();
            behind.filter(|(first, _)| **first < to).map(|(first, line)| (*first, line))
        })
    }

    /// All lines, ascending, or descending by `rev()`.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (Revision, &Line)> {
        self.blocks.iter().map(|(first, line)| (*first, line))
    }

    /// The lines before a block, the nearest first.
    pub fn before(&self, first: Revision) -> impl Iterator<Item = (Revision, &Line)> {
        self.blocks.range(..first).rev().map(|(first, line)| (*first, line))
    }

    /// The lines from a block on, ascending.
    pub fn from(&self, first: Revision) -> impl Iterator<Item = (Revision, &Line)> {
        self.blocks.range(first..).map(|(first, line)| (*first, line))
    }

    /// The lines after a block, the nearest first.
    pub fn after(&self, first: Revision) -> impl Iterator<Item = (Revision, &Line)> {
        self.blocks.range((Bound::Excluded(first), Bound::Unbounded)).map(|(first, line)| (*first, line))
    }

    /// Sets a block's line, in the place of any other of that first revision. The block goes into the cache if one is given.
    pub fn set(&mut self, first: Revision, meta: Meta, block: Option<Block>) {
        match self.blocks.get_mut(&first) {
            Some(line) if line.meta.id == meta.id => line.meta = meta,
            _ => {
                self.remove(first);
                self.blocks.insert(first, Line { meta, cached: None, used: AtomicBool::new(false) });
            }
        }
        if let Some(block) = block {
            self.keep(first, meta.id, block);
        }
    }

    /// Forgets a block.
    pub fn remove(&mut self, first: Revision) {
        if let Some(block) = self.blocks.remove(&first).and_then(|line| line.cached) {
            self.cached_bytes -= weight(&block);
            self.cached -= 1;
        }
    }

    /// Puts a block into the cache, unless the map has another one there by now.
    pub fn keep(&mut self, first: Revision, id: u64, block: Block) {
        let Some(line) = self.blocks.get_mut(&first).filter(|line| line.meta.id == id && line.cached.is_none()) else { return };
        self.cached_bytes += weight(&block);
        self.cached += 1;
        line.cached = Some(Box::new(block));
        line.used = AtomicBool::new(false);
        self.ring.push_back((first, id));
        self.evict();
    }

    fn evict(&mut self) {
        while self.cached_bytes > self.capacity && self.cached > 1 {
            let Some((first, id)) = self.ring.pop_front() else { return };
            let Some(line) = self.blocks.get_mut(&first).filter(|line| line.meta.id == id) else { continue };
            if std::mem::take(line.used.get_mut()) {
                self.ring.push_back((first, id));
            } else if let Some(block) = line.cached.take() {
                self.cached_bytes -= weight(&block);
                self.cached -= 1;
            }
        }
        if self.ring.len() > 2 * self.cached + 64 {
            let blocks = &self.blocks;
            self.ring.retain(|(first, id)| blocks.get(first).is_some_and(|line| line.meta.id == *id && line.cached.is_some()));
        }
    }

    /// The invariants of the module head, but for the one on overlap, which needs the blocks.
    pub fn check(&self) {
        let cached: Vec<_> = self.iter().filter_map(|(first, line)| line.cached.as_ref().map(|block| (first, line, block))).collect();
        assert_eq!(cached.len(), self.cached, "count of cached blocks");
        assert_eq!(cached.iter().map(|(.., block)| weight(block)).sum::<usize>(), self.cached_bytes, "bytes of cached blocks");
        assert!(self.cached_bytes <= self.capacity || self.cached == 1, "{} bytes cached, {} allowed", self.cached_bytes, self.capacity);
        for (first, line, _) in cached {
            let places = self.ring.iter().filter(|place| **place == (first, line.meta.id)).count();
            assert_eq!(places, 1, "places of block {first:?} in the ring");
        }
        for (first, line) in self.iter() {
            let meta = line.meta;
            assert!(usize::from(meta.records) <= Bits::BITS as usize && meta.records > 0, "block {first:?} has {} records", meta.records);
            assert_eq!(meta.dead.checked_shr(u32::from(meta.records)).unwrap_or(0), 0, "block {first:?} marks records that it has not");
            assert!(meta.live_cost as usize >= meta.live() * ENTRY && meta.live_cost <= meta.cost, "block {first:?}: {meta:?}");
        }
    }
}

fn weight(block: &Block) -> usize {
    block.len() + CACHED_OVERHEAD
}
