//! openraft's log storage on our [segments](crate::storage::wal).
//!
//! An append is encoded and queued, and is then readable; the segment's own thread makes everything queued durable with
//! one sync and calls openraft back. So appends that arrive while the disk is busy share its next turn.
//!
//! # The newest entries
//! The applier reads each entry shortly after it was appended. It gets the very entry, not a copy decoded from the log:
//! the last [`RECENT_ENTRIES`] are kept as they came, up to [`RECENT_BYTES`]. Older ones, after a restart or for a member that lags,
//! are read from the segments.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use prost::Message;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::proto::internal;
use crate::storage::wal::{self, LogEntry, Wal};

use super::{
    LogId, RaftEntry, TypeConfig, Vote, decode_payload, encode_payload, log_id, log_id_from_proto, log_id_to_proto, to_io, vote_from_proto,
    vote_to_proto,
};

/// Entries kept as they were appended. Beyond it the oldest are forgotten, and read from the segments if need be; entries
/// in flight are far fewer.
const RECENT_ENTRIES: usize = 64;

/// Bytes of their payloads. Beyond it the oldest are forgotten, too; the newest is always kept.
const RECENT_BYTES: usize = 4 << 20;

/// Bytes of payload that another member is sent in one go; an entry that is larger goes alone. A slow line carries this much in the time that
/// an append has.
const READ_BYTES: usize = 512 << 10;

/// The newest entries, one after another, each with the bytes of its payload.
#[derive(Default)]
struct Recent {
    entries: VecDeque<(RaftEntry, usize)>,
    bytes: usize,
}

impl Recent {
    fn extend(&mut self, entries: Vec<RaftEntry>, sizes: impl Iterator<Item = usize>) {
        // After a jump, what is there is of no use.
        if let (Some((last, _)), Some(first)) = (self.entries.back(), entries.first())
            && last.log_id.index + 1 != first.log_id.index
        {
            *self = Recent::default();
        }
        for (entry, bytes) in entries.into_iter().zip(sizes) {
            self.bytes += bytes;
            self.entries.push_back((entry, bytes));
        }
        while self.entries.len() > RECENT_ENTRIES || (self.bytes > RECENT_BYTES && self.entries.len() > 1) {
            self.bytes -= self.entries.pop_front().map_or(0, |(_, bytes)| bytes);
        }
    }

    fn truncate_after(&mut self, last: Option<u64>) {
        while self.entries.back().is_some_and(|(entry, _)| Some(entry.log_id.index) > last) {
            self.bytes -= self.entries.pop_back().map_or(0, |(_, bytes)| bytes);
        }
    }

    /// The entries from `start` to before `end`, the first of them and as many more as `max_bytes` allow; none if the first may be older.
    fn get(&self, start: u64, end: u64, max_bytes: usize) -> Option<Vec<RaftEntry>> {
        let first = self.entries.front()?.0.log_id.index;
        let skip = usize::try_from(start.checked_sub(first)?).ok()?;
        let mut bytes = 0usize;
        let wanted = self.entries.iter().skip(skip).take_while(|(entry, size)| {
            bytes = bytes.saturating_add(*size);
            entry.log_id.index < end && (entry.log_id.index == start || bytes <= max_bytes)
        });
        Some(wanted.map(|(entry, _)| entry.clone()).collect())
    }
}

/// The log as openraft sees it. Clones share it.
#[derive(Clone)]
pub(crate) struct LogStore {
    wal: Arc<Wal>,
    recent: Arc<Mutex<Recent>>,
}

impl LogStore {
    pub fn new(wal: Arc<Wal>) -> Self {
        LogStore { wal, recent: Arc::default() }
    }

    fn read(&self, range: impl RangeBounds<u64>, max_bytes: usize) -> Result<Vec<RaftEntry>> {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.wal.log_state().next(),
        };
        if let Some(entries) = lock(&self.recent).get(start, end, max_bytes) {
            return Ok(entries);
        }
        let entries = self.wal.entries(start..end, max_bytes)?;
        entries.into_iter().map(|entry| decode(&entry)).collect()
    }
}

/// An entry as it stands in the log, decoded.
pub(crate) fn decode(entry: &LogEntry) -> Result<RaftEntry> {
    let payload =
        decode_payload(entry.payload.clone()).map_err(|what| Error::Failed(format!("entry {} of the log: {what}", entry.id.index)))?;
    Ok(RaftEntry { log_id: from_wal(entry.id), payload })
}

fn from_wal(id: wal::LogId) -> LogId {
    log_id(id.term, id.index)
}

fn to_wal(id: LogId) -> wal::LogId {
    wal::LogId { term: *id.leader_id, node: 0, index: id.index }
}

fn encode_vote(vote: &Vote) -> Bytes {
    vote_to_proto(vote).encode_to_vec().into()
}

fn decode_vote(bytes: Bytes) -> io::Result<Vote> {
    internal::Vote::decode(bytes).map(vote_from_proto).map_err(io::Error::other)
}

/// Runs a change of the log and waits until it is durable.
async fn durable(change: impl FnOnce(wal::Done) -> Result<()>) -> Result<()> {
    let (done, wait) = oneshot::channel();
    change(Box::new(move |result| {
        // Who waited may have been stopped in the meantime.
        let _ = done.send(result);
    }))?;
    wait.await.unwrap_or(Err(Error::Stopped))
}

/// Purges the log up to an entry, which may lie beyond its last, and returns when that is on disk.
///
/// # Errors
/// As [`Wal::purge`], and its failure.
pub(crate) async fn purge(wal: &Wal, upto: LogId) -> Result<()> {
    durable(|done| wal.purge(to_wal(upto), done)).await
}

/// Removes the entries after an index, all of them for none, and returns when that is on disk.
///
/// # Errors
/// As [`Wal::truncate_after`], and its failure.
pub(crate) async fn truncate_after(wal: &Wal, index: Option<u64>) -> Result<()> {
    durable(|done| wal.truncate_after(index, done)).await
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<RaftEntry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(range, usize::MAX).map_err(to_io)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<RaftEntry>> {
        self.read(start..end, READ_BYTES).map_err(to_io)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.wal.vote().map(decode_vote).transpose()
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let state = self.wal.log_state();
        Ok(LogState { last_purged_log_id: state.purged.map(from_wal), last_log_id: state.last.map(from_wal) })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        durable(|done| self.wal.save_vote(encode_vote(vote), done)).await.map_err(to_io)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        match committed {
            Some(id) => self.wal.save_committed(log_id_to_proto(id).encode_to_vec().into()).map_err(to_io),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let Some(bytes) = self.wal.log_state().committed else { return Ok(None) };
        internal::LogId::decode(bytes).map(|id| Some(log_id_from_proto(id))).map_err(io::Error::other)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<RaftEntry> = entries.into_iter().collect();
        let encode = |entry: &RaftEntry| LogEntry { id: to_wal(entry.log_id), payload: encode_payload(&entry.payload) };
        let encoded: Vec<LogEntry> = entries.iter().map(encode).collect();
        lock(&self.recent).extend(entries, encoded.iter().map(|entry| entry.payload.len()));
        let appended = self.wal.append(encoded, Box::new(move |result| callback.io_completed(result.map_err(to_io))));
        appended.map_err(to_io)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        lock(&self.recent).truncate_after(last.map(|last| last.index));
        truncate_after(&self.wal, last.map(|last| last.index)).await.map_err(to_io)
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        // What was purged is not read again, so nobody waits for it to be on disk.
        self.wal.purge(to_wal(upto), Box::new(|_| ())).map_err(to_io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::EntryPayload;

    fn entries(indexes: std::ops::Range<u64>) -> Vec<RaftEntry> {
        indexes.map(|index| RaftEntry { log_id: log_id(1, index), payload: EntryPayload::Blank }).collect()
    }

    fn indexes(found: Option<Vec<RaftEntry>>) -> Option<Vec<u64>> {
        Some(found?.iter().map(|entry| entry.log_id.index).collect())
    }

    #[test]
    fn recent_entries_are_bounded_in_number_and_bytes() {
        let mut recent = Recent::default();
        assert_eq!(recent.get(1, 9, 100), None);
        recent.extend(entries(1..101), std::iter::repeat(10));
        assert_eq!((recent.entries.len(), recent.bytes), (RECENT_ENTRIES, 10 * RECENT_ENTRIES));
        assert_eq!(indexes(recent.get(36, 40, usize::MAX)), None);
        assert_eq!(indexes(recent.get(37, 40, usize::MAX)), Some(vec![37, 38, 39]));
        assert_eq!(indexes(recent.get(98, 200, usize::MAX)), Some(vec![98, 99, 100]));
        assert_eq!(indexes(recent.get(101, 200, usize::MAX)), Some(vec![]));
        // As many as are asked for in bytes, and the first in any case.
        assert_eq!(indexes(recent.get(90, 101, 29)), Some(vec![90, 91]));
        assert_eq!(indexes(recent.get(90, 101, 1)), Some(vec![90]));
        recent.truncate_after(Some(99));
        assert_eq!((indexes(recent.get(99, 200, usize::MAX)), recent.bytes), (Some(vec![99]), 10 * (RECENT_ENTRIES - 1)));
        // Large ones push the others out, and themselves all but the last.
        recent.extend(entries(100..102), [RECENT_BYTES, RECENT_BYTES + 1].into_iter());
        assert_eq!((recent.entries.len(), recent.bytes), (1, RECENT_BYTES + 1));
        assert_eq!(indexes(recent.get(101, 102, 1)), Some(vec![101]));
        // A jump, as after a snapshot.
        recent.extend(entries(500..502), std::iter::repeat(1));
        assert_eq!((indexes(recent.get(500, 502, usize::MAX)), recent.bytes), (Some(vec![500, 501]), 2));
        recent.truncate_after(None);
        assert_eq!((recent.get(500, 502, usize::MAX), recent.bytes), (None, 0));
    }
}
