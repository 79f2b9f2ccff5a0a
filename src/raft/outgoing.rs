//! A snapshot on its way out: from the state at one point of the log to chunks of [the format](crate::snapshot), a bounded step at a time.
//!
//! [`SnapshotStart`] is taken between two entries: the revision is held, what is kept beside the history is copied, and the two belong to
//! the same entry. [`Writer`] then reads the history behind it, while the member goes on.
//!
//! ```text
//! start = machine.begin_snapshot(true)?              revision 900 held, entry 17, leases, alarms, membership
//! writer = Writer::new(cluster, member, 0, start)?
//! while !writer.is_finished() { send(writer.step()?) }
//! ```
//!
//! # Invariants
//! - A snapshot for a member holds the history from the compaction on that it tells of, without a hole: a compaction that is asked for
//!   meanwhile waits until it is written. What a compaction before it has yet to take away may be in it or not.
//! - A step makes about [`STEP_BYTES`], or one item more.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;

use crate::error::Result;
use crate::lock::lock;
use crate::mvcc::Pin;
use crate::snapshot::{Encoder, Header, Item, LogPosition};
use crate::storage::Revision;

use super::apply::{Clock, Position};

/// Bytes of a snapshot that are made in one go, in a third of a millisecond. The next are made when these were taken.
pub(crate) const STEP_BYTES: usize = 128 << 10;

/// Bytes from which on a [piece](Writer::piece) is one. It is at most a step longer.
const PIECE_BYTES: usize = 512 << 10;

/// The checksum behind a snapshot: a SHA-256.
const CHECKSUM_BYTES: usize = 32;

/// How long after a snapshot was sent the log is still kept for the member that has got it, as in etcd: so long it may take to be told
/// what has been written meanwhile.
const RELEASE_DELAY: Duration = Duration::from_secs(30);

/// Where a snapshot begins.
pub(crate) struct SnapshotStart {
    pub pin: Pin,
    /// Holds what lies between the last compaction and the pin; none for a backup, which is for the newest revision.
    pub floor: Option<Pin>,
    pub compacted: i64,
    pub position: Position,
    /// What is kept beside the history, by ascending name.
    pub metas: BTreeMap<Vec<u8>, Bytes>,
    pub sendings: Arc<Sendings>,
}

/// The snapshots that are being sent to members.
pub(crate) struct Sendings {
    clock: Clock,
    under_way: AtomicUsize,
    /// Until when the log is kept for those who were sent one.
    until: Mutex<Duration>,
}

impl Sendings {
    pub fn new(clock: Clock) -> Self {
        Sendings { clock, under_way: AtomicUsize::new(0), until: Mutex::default() }
    }

    /// Notes that one is being sent, until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> Sending {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        Sending(self.clone())
    }

    /// Whether somebody will ask for entries from now on, and would need another snapshot if they were gone.
    pub fn need_log(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0 || (self.clock)() < *lock(&self.until)
    }
}

/// A snapshot that is being sent.
pub(crate) struct Sending(Arc<Sendings>);

impl Drop for Sending {
    fn drop(&mut self) {
        *lock(&self.0.until) = (self.0.clock)() + RELEASE_DELAY;
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a snapshot has come to.
pub(crate) struct Writer {
    encoder: Encoder,
    metas: VecDeque<(Bytes, Bytes)>,
    pin: Pin,
    /// Held until the end, for its drop.
    _floor: Option<Pin>,
    /// The records before it are written.
    next: Revision,
    /// The newest chunk: the last one has the checksum at its end, which goes into a part of its own.
    last: Bytes,
    finished: bool,
}

impl Writer {
    /// Begins the snapshot of a member. `created` is in seconds since 1970.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn new(cluster_id: u64, member_id: u64, created: u64, start: SnapshotStart) -> Result<Writer> {
        let SnapshotStart { pin, floor, compacted, position, metas, .. } = start;
        let applied = position.log_id;
        let header = Header {
            cluster_id,
            member_id,
            revision: pin.at(),
            compact_revision: compacted,
            applied: LogPosition { term: applied.map_or(0, |id| *id.leader_id), node: 0, index: applied.map_or(0, |id| id.index) },
            created_unix_s: created,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let encoder = Encoder::new(&header)?;
        let metas = metas.into_iter().map(|(key, value)| (key.into(), value)).collect();
        Ok(Writer { encoder, metas, pin, _floor: floor, next: Revision::default(), last: Bytes::new(), finished: false })
    }

    /// Whether all chunks have been made.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Makes the next chunks in one piece, for a member: each costs a turn on the line. Empty only after the last.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn piece(&mut self) -> Result<Bytes> {
        let mut piece = Vec::with_capacity(PIECE_BYTES + STEP_BYTES);
        while piece.len() < PIECE_BYTES && !self.finished {
            self.step()?.iter().for_each(|chunk| piece.extend_from_slice(chunk));
        }
        Ok(piece.into())
    }

    /// Makes the next chunks: some, or the last of all. It reads from the disk.
    ///
    /// # Errors
    /// What reading the history fails with.
    pub fn step(&mut self) -> Result<VecDeque<Bytes>> {
        let mut chunks = VecDeque::new();
        let mut bytes = 0;
        while let Some((key, value)) = self.metas.pop_front() {
            self.encoder.push(&Item::Meta { key, value })?;
            bytes += take_chunks(&mut self.encoder, &mut self.last, &mut chunks);
            if bytes >= STEP_BYTES {
                return Ok(chunks);
            }
        }
        let end = Revision { main: self.pin.at() + 1, sub: 0 };
        let Writer { encoder, pin, next, last, .. } = self;
        pin.store().history().scan(*next, end, &mut |revision, record| {
            encoder.push(&Item::Record {
                main: revision.main,
                sub: revision.sub,
                tombstone: record.tombstone,
                bytes: record.bytes.clone(),
            })?;
            *next = Revision { main: revision.main, sub: revision.sub + 1 };
            bytes += take_chunks(encoder, last, &mut chunks);
            Ok(bytes < STEP_BYTES)
        })?;
        if bytes >= STEP_BYTES {
            return Ok(chunks);
        }
        self.encoder.finish();
        take_chunks(&mut self.encoder, &mut self.last, &mut chunks);
        let sum = self.last.split_off(self.last.len().saturating_sub(CHECKSUM_BYTES));
        chunks.extend([std::mem::take(&mut self.last), sum].into_iter().filter(|chunk| !chunk.is_empty()));
        self.finished = true;
        Ok(chunks)
    }
}

/// Takes what the encoder has ready, and keeps the newest chunk back. Returns how many bytes there were.
fn take_chunks(encoder: &mut Encoder, last: &mut Bytes, chunks: &mut VecDeque<Bytes>) -> usize {
    let mut bytes = 0;
    while let Some(chunk) = encoder.next_chunk() {
        bytes += chunk.len();
        let before = std::mem::replace(last, chunk);
        if !before.is_empty() {
            chunks.push_back(before);
        }
    }
    bytes
}
