//! Reading a stored history at the start: every value is checked, and that none is missing.
//!
//! Values pass through memory one by one; what stays is a line per block, as many blocks as the cache holds, the dead marks
//! while the blocks are read, and the meta values. The order is: summary, dead marks, meta values, then blocks with the chunks of
//! their large records beside them, since blocks and chunks are both in the order of the revisions.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::block::{self, Bits, Block, Stub, Summary, Totals};
use super::map::{BlockMap, Meta};
use super::{HistoryOptions, Saved, Writer, successor};
use crate::error::{Error, Result};
use crate::storage::keys::{self, Key, tag};
use crate::storage::{Backend, Record, Revision};

/// What a start hands to the history.
pub(super) struct Loaded {
    pub map: BlockMap,
    pub writer: Writer,
    pub saved: Saved,
    pub last: Revision,
}

/// Meta values by name, and their checksums.
type Values = BTreeMap<Vec<u8>, Bytes>;
type Checksums = BTreeMap<Box<[u8]>, u32>;

type Visit<'a> = &'a mut dyn FnMut(Revision, &Record) -> Result<()>;

/// Reads and checks everything. See [`History::open`](super::History::open).
pub(super) fn load(backend: &Arc<dyn Backend>, opts: &HistoryOptions, visit: Visit<'_>) -> Result<Loaded> {
    let mut loader = Loader {
        backend: &**backend,
        map: BlockMap::new(opts.cache_bytes),
        found: Totals::default(),
        chunk_from: keys::range(tag::CHUNK).0.to_vec(),
        last: None,
        next_id: 0,
    };
    let summary = loader.summary()?;
    let mut dead = loader.dead_marks()?;
    let (meta, metas) = loader.metas()?;
    loader.blocks(&mut dead, visit)?;
    loader.no_chunks_below(None)?;
    if let Some((first, _)) = dead.first_key_value() {
        return Err(loader.corrupt(format!("dead records of block {first:?} are marked, but there is no such block")));
    }
    let Loader { map, found, last, next_id, .. } = loader;
    let (sequence, totals, applied) = match summary {
        Some(summary) => (summary.sequence, summary.totals, Some(summary.applied)),
        None => (0, Totals::default(), None),
    };
    if let Some(difference) = Totals::difference(&found, &totals) {
        let what = if sequence == 0 { format!("the summary is missing: {difference}") } else { difference };
        return Err(corrupt(&**backend, what));
    }
    let sparse = map.iter().filter(|(_, line)| line.meta.is_sparse()).map(|(first, _)| first).collect();
    let writer = Writer { sequence, totals, applied: applied.clone(), metas, sparse, next_id };
    Ok(Loaded { map, writer, saved: Saved { applied, meta }, last: last.unwrap_or_default() })
}

/// A damaged history, in words.
pub(super) fn corrupt(backend: &dyn Backend, what: String) -> Error {
    Error::Corrupt { path: backend.path(), offset: None, what }
}

struct Loader<'a> {
    backend: &'a dyn Backend,
    map: BlockMap,
    found: Totals,
    /// Chunks below this key have been seen.
    chunk_from: Vec<u8>,
    last: Option<Revision>,
    next_id: u64,
}

impl Loader<'_> {
    fn corrupt(&self, what: String) -> Error {
        corrupt(self.backend, what)
    }

    fn summary(&self) -> Result<Option<Summary>> {
        let Some(value) = self.backend.get(&Key::Summary.encode())? else { return Ok(None) };
        Summary::decode(&value).map(Some).ok_or_else(|| self.corrupt("the summary's checksum or format does not fit".into()))
    }

    /// Checks a value's seal and counts it into the digest.
    fn unseal<'v>(&mut self, key: &[u8], value: &'v [u8]) -> Result<(&'v [u8], u32)> {
        let (body, crc) = block::unseal(key, value)
            .ok_or_else(|| self.corrupt(format!("the checksum of the value of {:?} does not fit", Key::decode(key))))?;
        self.found.digest = self.found.digest.wrapping_add(block::digest_of(key, crc));
        Ok((body, crc))
    }

    fn dead_marks(&mut self) -> Result<BTreeMap<Revision, Bits>> {
        let backend = self.backend;
        let mut marks = BTreeMap::new();
        let (start, end) = keys::range(tag::DEAD);
        backend.scan(&start, &end, &mut |key, value| {
            let (body, _) = self.unseal(key, value)?;
            match (Key::decode(key), block::decode_dead(body)) {
                (Some(Key::Dead(first)), Some(bits)) => marks.insert(first, bits),
                (key, _) => return Err(self.corrupt(format!("the dead mark {key:?} cannot be read"))),
            };
            Ok(true)
        })?;
        Ok(marks)
    }

    fn metas(&mut self) -> Result<(Values, Checksums)> {
        let backend = self.backend;
        let (mut values, mut crcs) = (BTreeMap::new(), BTreeMap::new());
        let (start, end) = keys::range(tag::META);
        backend.scan(&start, &end, &mut |key, value| {
            let (body, crc) = self.unseal(key, value)?;
            let Some(Key::Meta(name)) = Key::decode(key) else {
                return Err(self.corrupt(format!("key {key:02x?} cannot be read")));
            };
            values.insert(name.to_vec(), Bytes::copy_from_slice(body));
            crcs.insert(name.into(), crc);
            self.found.metas += 1;
            Ok(true)
        })?;
        Ok((values, crcs))
    }

    fn blocks(&mut self, dead: &mut BTreeMap<Revision, Bits>, visit: Visit<'_>) -> Result<()> {
        let backend = self.backend;
        let (start, end) = keys::range(tag::BLOCK);
        backend.scan(&start, &end, &mut |key, value| {
            let Some(Key::Block(first)) = Key::decode(key) else {
                return Err(self.corrupt(format!("key {key:02x?} cannot be read")));
            };
            // The chunks of the block's large records are read from within the scan.
            self.block(first, Bytes::copy_from_slice(value), dead.remove(&first).unwrap_or(0), visit)?;
            Ok(true)
        })
    }

    fn block(&mut self, first: Revision, value: Bytes, dead: Bits, visit: Visit<'_>) -> Result<()> {
        let (block, crc) = Block::read(first, value).map_err(|what| self.corrupt(format!("block {first:?}: {what}")))?;
        if self.last.is_some_and(|last| last >= first) {
            return Err(self.corrupt(format!("block {first:?} begins before the one before it ends, at {:?}", self.last)));
        }
        if dead.checked_shr(block.count() as u32).unwrap_or(0) != 0 {
            return Err(self.corrupt(format!("block {first:?} has {} records, but the dead ones are {dead:#b}", block.count())));
        }
        let key = Key::Block(first).encode();
        self.found.digest = self.found.digest.wrapping_add(block::digest_of(&key, crc));
        let mut meta = Meta { id: self.next_id, live_bytes: 0, dead, crc, live_cost: 0, cost: 0, records: block.count() as u8 };
        for (index, entry) in block.entries().enumerate() {
            let item = block.item(index);
            meta.cost += item.cost() as u32;
            self.last = Some(entry.rev);
            if meta.is_dead(index) {
                continue;
            }
            meta.live_cost += item.cost() as u32;
            meta.live_bytes += item.length() + super::RECORD_OVERHEAD;
            let bytes = match item.stub {
                None => item.stored,
                Some(stub) => self.chunks(entry.rev, stub)?,
            };
            let record = Record { bytes, tombstone: entry.tombstone };
            if block::record_crc(entry.rev, record.tombstone, &record.bytes) != entry.crc {
                return Err(self.corrupt(format!("the checksum of record {:?} does not fit", entry.rev)));
            }
            visit(entry.rev, &record)?;
        }
        self.next_id += 1;
        self.found.blocks += 1;
        self.found.records += meta.live() as u64;
        self.found.dead += u64::from(dead.count_ones());
        self.found.live_bytes += meta.live_bytes;
        self.map.set(first, meta, Some(block));
        Ok(())
    }

    /// The bytes of a large record. There must be no chunk of another record before it.
    fn chunks(&mut self, rev: Revision, stub: Stub) -> Result<Bytes> {
        self.no_chunks_below(Some(rev))?;
        let backend = self.backend;
        let digest_before = self.found.digest;
        let mut bytes = Vec::new();
        let mut number = 0;
        let end = Key::Chunk(successor(rev), 0).encode();
        backend.scan(&Key::Chunk(rev, 0).encode(), &end, &mut |key, value| {
            let (body, _) = self.unseal(key, value)?;
            if Key::decode(key) != Some(Key::Chunk(rev, number)) || bytes.len() + body.len() > stub.length as usize {
                return Err(self.corrupt(format!("large record {rev:?} has {:?} where chunk {number} is expected", Key::decode(key))));
            }
            bytes.extend_from_slice(body);
            number += 1;
            Ok(true)
        })?;
        self.found.chunks += u64::from(number);
        self.chunk_from = end;
        let digest = self.found.digest.wrapping_sub(digest_before);
        if bytes.len() != stub.length as usize || digest != stub.digest {
            return Err(self.corrupt(format!(
                "large record {rev:?} should have {} chunks and {} bytes, but {number} and {} are there",
                stub.chunks(),
                stub.length,
                bytes.len()
            )));
        }
        Ok(Bytes::from(bytes))
    }

    /// No chunk may stand between the last large record and the next one, or behind all of them.
    fn no_chunks_below(&mut self, rev: Option<Revision>) -> Result<()> {
        let start = &self.chunk_from;
        let end = rev.map_or(keys::range(tag::CHUNK).1.to_vec(), |rev| Key::Chunk(rev, 0).encode());
        self.backend.scan(start, &end, &mut |key, _| Err(self.corrupt(format!("{:?} belongs to no record", Key::decode(key)))))
    }
}
