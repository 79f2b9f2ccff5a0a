//! Reading many records: a [`Reader`] remembers the block of the last one, since neighbours in the index are often neighbours in the
//! history, and reads ahead when they are. It tells what is at hand from what the backend has to be asked for, so that a thread that must not wait need not.

use super::block::Held;
use super::*;

/// Reads records that are not dead. What it remembers is one block.
pub struct Reader<'a> {
    history: &'a History,
    /// First and last revision of a block, and the block. It may have been replaced since: what was live in it then is the same now.
    open: Option<(Revision, Revision, Block)>,
    /// The block behind those that the backend was asked for last, and how many they were.
    next: Option<(Revision, usize)>,
}

impl History {
    /// One record, if it is in memory: as [`Reader::at_hand`], for who wants no other.
    pub fn at_hand(&self, rev: Revision) -> Option<Record> {
        if let Some(record) = self.tail().get(rev) {
            return Some(record.clone());
        }
        whole(self.map().find(rev)?.1.block()?, rev)
    }

    /// A reader for a few or many records.
    pub fn reader(&self) -> Reader<'_> {
        Reader { history: self, open: None, next: None }
    }
}

impl Reader<'_> {
    /// The record of a revision, if it is in memory. `None` says nothing about whether there is one.
    pub fn at_hand(&mut self, rev: Revision) -> Option<Record> {
        if let Some((first, last, block)) = &self.open
            && *first <= rev
            && rev <= *last
            && let Some(record) = whole(block, rev)
        {
            return Some(record);
        }
        if let Some(record) = self.history.tail().get(rev) {
            return Some(record.clone());
        }
        let block = self.history.map().find(rev)?.1.block()?.clone();
        let record = whole(&block, rev)?;
        self.open = Some((block.entry(0).rev, block.entry(block.count() - 1).rev, block));
        Some(record)
    }

    /// The record of a revision, as [`History::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(&mut self, rev: Revision) -> Result<Option<Record>> {
        if let Some(record) = self.at_hand(rev) {
            return Ok(Some(record));
        }
        self.read_ahead(rev)?;
        self.history.get(rev)
    }

    /// Brings the block of a revision into the cache, and with it some of those behind when one after the other was asked for.
    fn read_ahead(&mut self, rev: Revision) -> Result<()> {
        let Some(first) = self.history.map().find(rev).map(|(first, _)| first) else { return Ok(()) };
        let run = match self.next {
            Some((next, run)) if next == first => (2 * run).min(RUN_BLOCKS),
            _ => 1,
        };
        let mut last = first;
        if run > 1 {
            let blocks = self.history.fetch_run(first, run)?;
            last = blocks.last().map_or(first, |block| block.first);
            self.history.keep_run(blocks);
        }
        self.next = self.history.map().after(last).next().map(|(next, _)| (next, run));
        Ok(())
    }
}

/// A record that stands in the block as a whole.
fn whole(block: &Block, rev: Revision) -> Option<Record> {
    match block.held(block.find(rev)?) {
        Held::Whole(record) => Some(record),
        Held::Large { .. } => None,
    }
}
