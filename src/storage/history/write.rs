//! From the tail to the backend: how a batch is made, published and applied; how the backend catches up; how blocks that
//! are mostly dead are rewritten.
//!
//! A [`Draft`] collects what a batch changes, block by block. While it is made nothing else changes, so that an error on
//! the way (a block cannot be read) leaves no trace. Then [`History::publish`] turns the differences between the old lines
//! and the new ones into puts, deletes and new totals: each stored value enters and leaves the digest in that one place.

use super::block::{BLOCK_RECORDS, ITEMS_BYTES, Item, dead_digest, digest_of, encode_dead, pack, seal};
use super::tail::Cut;
use super::*;
use crate::pace::breathe;

/// Lines of the map that are marked or removed under one lock, for readers wait meanwhile. More follow in further turns.
const PUBLISH_LINES: usize = 256;

/// What a batch does to a block.
enum Change {
    /// All its records are dead.
    Gone,
    /// Its live records stand in new blocks.
    Replaced,
    /// Some of its records have died.
    Marked(Meta),
    /// It is new; `keep` says that it is worth a place in the cache.
    New { meta: Meta, block: Block, keep: bool },
}

/// The changes of a batch that is being made.
struct Draft {
    blocks: BTreeMap<Revision, Change>,
    /// Puts and deletes of chunks.
    batch: Batch,
    metas: BTreeMap<Vec<u8>, Option<Bytes>>,
    totals: Totals,
    next_id: u64,
    died_records: u64,
    died_bytes: u64,
}

impl Draft {
    fn new(writer: &Writer) -> Draft {
        Draft {
            blocks: BTreeMap::new(),
            batch: Batch::default(),
            metas: BTreeMap::new(),
            totals: writer.totals,
            next_id: writer.next_id,
            died_records: 0,
            died_bytes: 0,
        }
    }

    /// Packs items, which ascend, into new blocks.
    fn add_blocks(&mut self, mut items: &[Item], keep: bool) {
        for count in pack(items) {
            let (now, rest) = items.split_at(count);
            items = rest;
            let Some(first) = now.first() else { continue };
            let (block, crc) = Block::build(now);
            let meta = Meta::new(self.next_id, crc, now);
            self.next_id += 1;
            self.blocks.insert(first.rev, Change::New { meta, block, keep });
            breathe();
        }
    }
}

impl History {
    /// Writes everything committed so far, and the deaths that wait for no commit, in one atomic batch, or in several if there
    /// is more than one may hold. Returns whether there was anything. To be called when some MiB have gathered, or a second has passed.
    ///
    /// # Errors
    /// Whatever the backend returns. Nothing is lost by it: what could not be applied is tried again, before anything
    /// else, by the next call of this, of [`sync`](Self::sync) or of [`collect`](Self::collect). `Corrupt` when the backend has
    /// lost what it had synced.
    pub fn write_out(&self) -> Result<bool> {
        self.write_all(&mut self.writer.enter())
    }

    /// Writes everything committed so far and returns when it is safe from a power cut: the `applied` of the newest commit
    /// that is; `None` when there never was one.
    ///
    /// # Errors
    /// As [`write_out`](Self::write_out).
    pub fn sync(&self) -> Result<Option<Bytes>> {
        let mut writer = self.writer.enter();
        self.write_all(&mut writer)?;
        self.sync_backend(&writer)?;
        Ok(writer.applied.clone())
    }

    /// Rewrites blocks that are less than half alive, with their small neighbours, reading about `max_bytes` of blocks and at
    /// least one. Returns whether there is more to do. Costs next to nothing when there is nothing.
    ///
    /// # Errors
    /// As [`write_out`](Self::write_out).
    pub fn collect(&self, max_bytes: usize) -> Result<bool> {
        let mut writer = self.writer.enter();
        if writer.sparse.is_empty() {
            return Ok(false);
        }
        self.catch_up(&writer)?;
        self.make_room(&writer)?;
        let mut draft = Draft::new(&writer);
        let mut left = max_bytes;
        for first in &writer.sparse {
            if draft.blocks.contains_key(first) {
                continue;
            }
            let Some(run) = self.run_around(&draft, *first, left) else { break };
            left = left.saturating_sub(run.iter().map(|(_, meta)| meta.cost as usize).sum());
            self.repack(&mut draft, &run, Vec::new())?;
        }
        let applied = writer.applied.clone().unwrap_or_default();
        let pending = self.publish(&mut writer, draft, applied);
        breathe();
        self.apply(&pending)?;
        Ok(!writer.sparse.is_empty())
    }

    fn write_all(&self, writer: &mut Writer) -> Result<bool> {
        self.catch_up(writer)?;
        let mut left = self.tail().seal();
        let written = left > 0;
        if written && let Some(Gate(pass)) = &self.gate {
            pass()?;
        }
        while left > 0 {
            self.make_room(writer)?;
            let cuts = self.tail().front(left, self.limits.batch_bytes);
            left -= cuts.len();
            // A batch of deaths alone leaves the state where it was.
            let applied = cuts.iter().rev().find_map(|cut| cut.applied.clone()).or_else(|| writer.applied.clone());
            let Some(applied) = applied else {
                // Nothing was ever committed, so that nothing is stored that could have died.
                let done = self.tail().pop(cuts.len());
                drop(done);
                continue;
            };
            let draft = self.draft_of(writer, &cuts)?;
            let pending = self.publish(writer, draft, applied);
            let done = self.tail().pop(cuts.len());
            drop(done);
            self.apply(&pending)?;
            cuts.into_iter().for_each(|cut| {
                // The last to hold it gives back the memory of thousands of records.
                let records = Arc::into_inner(cut).map_or(Vec::new(), |cut| cut.records);
                records.into_iter().for_each(|record| {
                    drop(record);
                    breathe();
                });
            });
        }
        Ok(written)
    }

    /// The changes of some cuts.
    fn draft_of(&self, writer: &Writer, cuts: &[Arc<Cut>]) -> Result<Draft> {
        let mut draft = Draft::new(writer);
        let mut deaths: BTreeMap<Revision, bool> = BTreeMap::new();
        for cut in cuts {
            deaths.extend(cut.dead.iter().map(|death| (death.rev, death.counted)));
        }
        let mut items = Vec::with_capacity(cuts.iter().map(|cut| cut.records.len()).sum());
        for (rev, record) in cuts.iter().flat_map(|cut| &cut.records) {
            if deaths.remove(rev).is_some() {
                continue;
            }
            let (item, chunks) = Item::new(*rev, record);
            draft.totals.chunks += chunks.len() as u64;
            draft.totals.digest = draft.totals.digest.wrapping_add(item.stub.map_or(0, |stub| stub.digest));
            draft.batch.puts.extend(chunks);
            items.push(item);
            breathe();
        }
        self.bury(&mut draft, &deaths)?;
        self.add_records(&mut draft, items)?;
        for cut in cuts {
            draft.metas.extend(cut.metas.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        Ok(draft)
    }

    /// Marks records in blocks dead; removes blocks in which none is left, and the chunks of large records.
    fn bury(&self, draft: &mut Draft, deaths: &BTreeMap<Revision, bool>) -> Result<()> {
        let mut open: Option<(Revision, Meta, Block)> = None;
        for (rev, counted) in deaths {
            let Some((first, meta)) = self.map().find(*rev).map(|(first, line)| (first, line.meta)) else { continue };
            if open.as_ref().is_none_or(|(open, ..)| *open != first) {
                Self::close(draft, open.take());
                open = Some((first, meta, self.read(first, &meta)?));
                breathe();
            }
            let Some((_, meta, block)) = &mut open else { continue };
            let Some(index) = block.find(*rev) else { continue };
            let item = block.item(index);
            if !meta.bury(index, &item) {
                continue;
            }
            if !counted {
                draft.died_records += 1;
                draft.died_bytes += item.length() + RECORD_OVERHEAD;
            }
            if let Some(stub) = item.stub {
                draft.totals.chunks -= u64::from(stub.chunks());
                draft.totals.digest = draft.totals.digest.wrapping_sub(stub.digest);
                draft.batch.deletes.extend((0..stub.chunks()).map(|number| Key::Chunk(*rev, number).encode()));
            }
        }
        Self::close(draft, open);
        Ok(())
    }

    fn close(draft: &mut Draft, open: Option<(Revision, Meta, Block)>) {
        if let Some((first, meta, _)) = open {
            draft.blocks.insert(first, if meta.live() == 0 { Change::Gone } else { Change::Marked(meta) });
        }
    }

    /// Packs new records into blocks. The small blocks at the end are packed anew with them if that fills a block.
    fn add_records(&self, draft: &mut Draft, items: Vec<Item>) -> Result<()> {
        let Some(next) = items.first() else { return Ok(()) };
        let fits = |records: usize, cost: usize| records < BLOCK_RECORDS && cost <= ITEMS_BYTES;
        let (mut run, mut records, mut cost) = (Vec::new(), 0, 0);
        for (first, line) in self.map().iter().rev() {
            let meta = match draft.blocks.get(&first) {
                Some(Change::Gone) => continue,
                Some(Change::Marked(meta)) => *meta,
                _ => line.meta,
            };
            if !fits(records + meta.live(), cost + meta.live_cost as usize) {
                break;
            }
            records += meta.live();
            cost += meta.live_cost as usize;
            run.push((first, meta));
        }
        run.reverse();
        let fills = !fits(records + items.len(), cost + items.iter().map(Item::cost).sum::<usize>());
        // A single block to which not even the next record can be added would only be copied.
        let gains = run.len() > 1 || cost + next.cost() <= ITEMS_BYTES;
        if fills && gains {
            return self.repack(draft, &run, items);
        }
        draft.add_blocks(&items, true);
        Ok(())
    }

    /// Packs the live records of neighbouring blocks, and new ones behind them, into new blocks.
    fn repack(&self, draft: &mut Draft, run: &[(Revision, Meta)], new: Vec<Item>) -> Result<()> {
        let mut keep = !new.is_empty();
        let mut items = Vec::new();
        for (first, meta) in run {
            keep |= self.map().get(*first).is_some_and(|line| line.block().is_some());
            let block = self.read(*first, meta)?;
            items.extend((0..block.count()).filter(|index| !meta.is_dead(*index)).map(|index| block.item(index)));
            draft.blocks.insert(*first, Change::Replaced);
            breathe();
        }
        // The records' own checksums travel along; here they are checked once, so that memory cannot spoil what was good.
        for item in items.iter().filter(|item| item.stub.is_none()) {
            if block::record_crc(item.rev, item.tombstone, &item.stored) != item.crc {
                return Err(open::corrupt(&*self.backend, format!("the checksum of record {:?} does not fit", item.rev)));
            }
        }
        items.extend(new);
        draft.add_blocks(&items, keep);
        Ok(())
    }

    /// A sparse block with the sparse and small blocks around it, about `max_bytes` together. `None` when the block itself is
    /// more than that, unless nothing else is in the draft.
    fn run_around(&self, draft: &Draft, first: Revision, max_bytes: usize) -> Option<Vec<(Revision, Meta)>> {
        let map = self.map();
        let meta = map.get(first)?.meta;
        let mut bytes = meta.cost as usize;
        if bytes > max_bytes && !draft.blocks.is_empty() {
            return None;
        }
        let mut take = |first: Revision, meta: Meta| {
            bytes += meta.cost as usize;
            let wanted = meta.is_sparse() || meta.is_small();
            (wanted && bytes <= max_bytes && !draft.blocks.contains_key(&first)).then_some((first, meta))
        };
        let mut run: Vec<_> = map.before(first).map_while(|(first, line)| take(first, line.meta)).collect();
        run.reverse();
        run.push((first, meta));
        run.extend(map.after(first).map_while(|(first, line)| take(first, line.meta)));
        Some(run)
    }

    /// Makes the batch of a draft, and makes it true in memory: first in the overlay, then in the map. It cannot fail.
    fn publish(&self, writer: &mut Writer, draft: Draft, applied: Bytes) -> Arc<Pending> {
        let Draft { blocks, mut batch, metas, mut totals, next_id, died_records, died_bytes } = draft;
        let old: Vec<Option<Meta>> = {
            let map = self.map();
            blocks.keys().map(|first| map.get(*first).map(|line| line.meta)).collect()
        };
        for ((first, change), old) in blocks.iter().zip(old) {
            let new = match change {
                Change::Gone | Change::Replaced => None,
                Change::Marked(meta) | Change::New { meta, .. } => Some(*meta),
            };
            let key = Key::Block(*first).encode();
            for (meta, sign) in [(old, -1), (new, 1)] {
                let Some(meta) = meta else { continue };
                totals.blocks = totals.blocks.wrapping_add_signed(sign);
                totals.records = totals.records.wrapping_add_signed(sign * meta.live() as i64);
                totals.dead = totals.dead.wrapping_add_signed(sign * i64::from(meta.dead.count_ones()));
                totals.live_bytes = totals.live_bytes.wrapping_add_signed(sign * meta.live_bytes as i64);
                let digest = digest_of(&key, meta.crc).wrapping_add(dead_digest(*first, meta.dead));
                totals.digest = if sign > 0 { totals.digest.wrapping_add(digest) } else { totals.digest.wrapping_sub(digest) };
            }
            match change {
                Change::New { block, .. } => batch.put(key, block.bytes().clone()),
                Change::Gone | Change::Replaced if old.is_some() => batch.delete(key),
                Change::Gone | Change::Replaced | Change::Marked(_) => {}
            }
            let (old_dead, new_dead) = (old.map_or(0, |meta| meta.dead), new.map_or(0, |meta| meta.dead));
            if new_dead != 0 {
                let (key, value, _) = encode_dead(*first, new_dead);
                batch.put(key, value);
            } else if old_dead != 0 {
                batch.delete(Key::Dead(*first).encode());
            }
            writer.sparse.remove(first);
            if new.is_some_and(|meta| meta.is_sparse()) {
                writer.sparse.insert(*first);
            }
        }
        for (name, value) in metas {
            let key = Key::Meta(&name).encode();
            if let Some(crc) = writer.metas.remove(name.as_slice()) {
                totals.metas -= 1;
                totals.digest = totals.digest.wrapping_sub(digest_of(&key, crc));
                if value.is_none() {
                    batch.delete(key.clone());
                }
            }
            if let Some(value) = value {
                let (value, crc) = seal(&key, value.to_vec());
                totals.metas += 1;
                totals.digest = totals.digest.wrapping_add(digest_of(&key, crc));
                batch.put(key, value);
                writer.metas.insert(name.into(), crc);
            }
        }
        writer.sequence += 1;
        writer.next_id = next_id;
        writer.totals = totals;
        writer.applied = Some(applied.clone());
        batch.put(Key::Summary.encode(), Summary { sequence: writer.sequence, totals, applied }.encode());
        batch.puts.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));

        let pending = Arc::new(Pending { sequence: writer.sequence, bytes: batch.bytes(), batch });
        self.overlay().push(pending.clone());
        // A reader looks only into the nearest block below a revision: no block may be replaced by halves.
        let (moving, staying): (Vec<_>, Vec<_>) =
            blocks.into_iter().partition(|(_, change)| matches!(change, Change::New { .. } | Change::Replaced));
        for changes in staying.chunks(PUBLISH_LINES) {
            let mut map = self.map_mut();
            for (first, change) in changes {
                if let Change::Marked(meta) = change { map.set(*first, *meta, None) } else { map.remove(*first) }
            }
            drop(map);
            breathe();
        }
        let mut map = self.map_mut();
        for (first, change) in moving {
            match change {
                Change::New { meta, block, keep } => map.set(first, meta, keep.then_some(block)),
                _ => map.remove(first),
            }
        }
        drop(map);
        self.died(died_records, died_bytes);
        pending
    }

    fn apply(&self, pending: &Pending) -> Result<()> {
        self.backend.apply(&pending.batch)?;
        self.written_bytes.fetch_add(pending.bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the backend the batches that it has not, whether their `apply` failed or it has lost them in a `reopen`.
    fn catch_up(&self, writer: &Writer) -> Result<()> {
        let stored = match self.backend.get(&Key::Summary.encode())? {
            Some(value) => Summary::decode(&value).ok_or_else(|| open::corrupt(&*self.backend, "the summary is damaged".into()))?.sequence,
            None => 0,
        };
        if stored == writer.sequence {
            return Ok(());
        }
        let (synced, missing): (u64, Vec<Arc<Pending>>) = {
            let overlay = self.overlay();
            (overlay.synced, overlay.batches.iter().filter(|pending| pending.sequence > stored).cloned().collect())
        };
        if stored > writer.sequence || stored < synced {
            let what = format!("batch {stored} is the last one there, but {synced} was synced and {} written", writer.sequence);
            return Err(open::corrupt(&*self.backend, what));
        }
        tracing::warn!(stored, newest = writer.sequence, "the backend has not got all batches, giving them to it again");
        missing.iter().try_for_each(|pending| self.apply(pending))
    }

    /// Syncs if too much is not.
    fn make_room(&self, writer: &Writer) -> Result<()> {
        if self.overlay().bytes > self.limits.unsynced_bytes { self.sync_backend(writer) } else { Ok(()) }
    }

    fn sync_backend(&self, writer: &Writer) -> Result<()> {
        self.backend.sync()?;
        let done = self.overlay().synced(writer.sequence);
        drop(done);
        Ok(())
    }

    /// Reads a block for the writer, which is the only one to move blocks.
    fn read(&self, first: Revision, meta: &Meta) -> Result<Block> {
        let cached = self.map().get(first).and_then(|line| line.block().cloned());
        let block = cached.map_or_else(|| self.fetch(first, meta, false), |block| Ok(Some(block)))?;
        block.ok_or_else(|| open::corrupt(&*self.backend, format!("block {first:?} was moved by somebody else")))
    }
}
