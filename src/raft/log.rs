//! openraft's log storage on our [segments](crate::storage::wal).
//!
//! An append is encoded and queued, and is then readable; the segment's own thread makes everything queued durable with
//! one sync and calls openraft back. So appends that arrive while the disk is busy share its next turn.
//!
//! # The newest entries
//! The applier reads each entry shortly after it was appended. It gets the very entry, not a copy decoded from the log:
//! the last [`RECENT_ENTRIES`] are kept as they came. Older ones, after a restart or for a member that lags, are read
//! from the segments.

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

/// Bytes of payload that are read from the segments in one go when openraft leaves the choice to us.
const READ_BYTES: usize = 4 << 20;

/// The log as openraft sees it. Clones share it.
#[derive(Clone)]
pub(crate) struct LogStore {
    wal: Arc<Wal>,
    recent: Arc<Mutex<VecDeque<RaftEntry>>>,
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
        {
            let recent = lock(&self.recent);
            if recent.front().is_some_and(|first| first.log_id.index <= start) {
                let wanted = recent.iter().filter(|entry| (start..end).contains(&entry.log_id.index));
                return Ok(wanted.cloned().collect());
            }
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
async fn durable(change: impl FnOnce(wal::Done) -> Result<()>) -> io::Result<()> {
    let (done, wait) = oneshot::channel();
    change(Box::new(move |result| {
        // Who waited may have been stopped in the meantime.
        let _ = done.send(result);
    }))
    .map_err(to_io)?;
    wait.await.unwrap_or(Err(Error::Stopped)).map_err(to_io)
}

/// Purges the log up to an entry, which may lie beyond its last, and returns when that is on disk.
///
/// # Errors
/// As [`Wal::purge`], and its failure.
pub(crate) async fn purge(wal: &Wal, upto: LogId) -> Result<()> {
    let (done, wait) = oneshot::channel();
    wal.purge(
        to_wal(upto),
        Box::new(move |result| {
            let _ = done.send(result);
        }),
    )?;
    wait.await.unwrap_or(Err(Error::Stopped))
}

/// Removes the entries after an index, all of them for none, and returns when that is on disk.
///
/// # Errors
/// As [`Wal::truncate_after`], and its failure.
pub(crate) async fn truncate_after(wal: &Wal, index: Option<u64>) -> Result<()> {
    let (done, wait) = oneshot::channel();
    wal.truncate_after(
        index,
        Box::new(move |result| {
            let _ = done.send(result);
        }),
    )?;
    wait.await.unwrap_or(Err(Error::Stopped))
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
        durable(|done| self.wal.save_vote(encode_vote(vote), done)).await
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
        let encoded = entries.iter().map(|entry| LogEntry { id: to_wal(entry.log_id), payload: encode_payload(&entry.payload) });
        let encoded = encoded.collect();
        {
            let mut recent = lock(&self.recent);
            // The entries follow one another; after a jump, what is there is of no use.
            if let (Some(last), Some(first)) = (recent.back(), entries.first())
                && last.log_id.index + 1 != first.log_id.index
            {
                recent.clear();
            }
            recent.extend(entries);
            let surplus = recent.len().saturating_sub(RECENT_ENTRIES);
            recent.drain(..surplus);
        }
        let appended = self.wal.append(encoded, Box::new(move |result| callback.io_completed(result.map_err(to_io))));
        appended.map_err(to_io)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        lock(&self.recent).retain(|entry| Some(entry.log_id.index) <= last.map(|last| last.index));
        durable(|done| self.wal.truncate_after(last.map(|last| last.index), done)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        // What was purged is not read again, so nobody waits for it to be on disk.
        self.wal.purge(to_wal(upto), Box::new(|_| ())).map_err(to_io)
    }
}
