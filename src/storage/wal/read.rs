//! Reading entries back: from the cache, from segment files, and from the files of a log that nobody has open.

use super::disk::{Directory, Disk, DiskFile};
use super::frame::{Record, decode_record, seed_of};
use super::index::{Places, Slot};
use super::state::{Segment, Shared, segment_name};
use super::{LogEntry, Recovered, recover};
use crate::error::{Error, Result};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The most bytes of a file that one read takes, unless one entry is larger. Longer ranges take several reads.
const MAX_READ_BYTES: u64 = 1 << 20;

/// Entries that one read of one file gets.
struct Piece {
    segment: u64,
    salt: u64,
    file: Arc<dyn DiskFile>,
    first: u64,
    slots: Vec<Slot>,
}

impl Piece {
    /// Whether `slot`, of the entry that follows, can be got by the same read.
    fn takes(&self, segment: u64, slot: Slot) -> bool {
        let start = self.slots.first().map_or(0, |first| u64::from(first.offset));
        segment == self.segment && u64::from(slot.offset) + u64::from(slot.len) <= start + MAX_READ_BYTES
    }

    /// Reads it. Payloads are slices of the buffer that was read.
    fn read(&self, disk: &dyn Disk, out: &mut Vec<LogEntry>) -> Result<()> {
        let path = || disk.path(&segment_name(self.segment));
        let (Some(head), Some(tail)) = (self.slots.first(), self.slots.last()) else { return Ok(()) };
        let start = u64::from(head.offset);
        let end = u64::from(tail.offset) + u64::from(tail.len);
        let mut bytes = vec![0; end.saturating_sub(start) as usize];
        self.file.read_at(&mut bytes, start).map_err(|e| Error::io("read", path(), e))?;
        let bytes = Bytes::from(bytes);
        let seed = seed_of(self.salt);
        for (slot, index) in self.slots.iter().zip(self.first..) {
            let at = slot.offset.saturating_sub(head.offset) as usize;
            match bytes.get(at..).and_then(|rest| decode_record(rest, seed)) {
                Some((Record::Entry { id, payload }, ..)) if id.index == index => {
                    out.push(LogEntry { id, payload: bytes.slice_ref(payload) });
                }
                _ => {
                    let what = format!("entry {index} is not what was written here");
                    return Err(Error::Corrupt { path: path(), offset: Some(u64::from(slot.offset)), what });
                }
            }
        }
        Ok(())
    }
}

/// Adds the entry `index` to the pieces to be read; its length on disk, or `None` if it has no place.
fn plan(pieces: &mut Vec<Piece>, places: &Places, segments: &BTreeMap<u64, Segment>, index: u64) -> Option<u32> {
    let (sequence, slot) = places.get(index)?;
    match pieces.last_mut() {
        Some(piece) if piece.takes(sequence, slot) => piece.slots.push(slot),
        _ => {
            let segment = segments.get(&sequence)?;
            let (salt, file) = (segment.salt, segment.file.clone());
            pieces.push(Piece { segment: sequence, salt, file, first: index, slots: vec![slot] });
        }
    }
    Some(slot.len)
}

/// The entries from `start` to before `end` that the log holds.
pub(super) fn entries(shared: &Shared, start: u64, end: u64, max_bytes: usize) -> Result<Vec<LogEntry>> {
    loop {
        let mut pieces = Vec::new();
        let mut cached = Vec::new();
        let mut bytes = 0;
        {
            let state = shared.lock();
            let range = start.max(state.log.first)..end.min(state.log.next());
            for index in range.clone() {
                if bytes >= max_bytes && index > range.start {
                    break;
                }
                // The cache is the newest part, so what has no place in it comes before all that has.
                if let Some(entry) = state.cache.get(index) {
                    bytes += entry.payload.len();
                    cached.push(entry.clone());
                } else if let Some(len) = plan(&mut pieces, &state.places, &state.segments, index) {
                    bytes += len as usize;
                } else {
                    return Err(Error::Failed(format!("entry {index} of the log is neither in memory nor on disk")));
                }
            }
        }
        if pieces.is_empty() {
            return Ok(cached);
        }
        let mut entries = Vec::with_capacity(pieces.iter().map(|piece| piece.slots.len()).sum::<usize>() + cached.len());
        match pieces.iter().try_for_each(|piece| piece.read(&*shared.disk, &mut entries)) {
            Ok(()) => {
                entries.append(&mut cached);
                return Ok(entries);
            }
            Err(error) => {
                // A purge may have sent a file to its next use while it was read; then the answer has changed. Sequences are not reused.
                let state = shared.lock();
                if pieces.iter().all(|piece| state.segments.contains_key(&piece.segment)) {
                    return Err(error);
                }
            }
        }
    }
}

/// The entries of a log that nobody has open, in order; see [`dump`].
pub struct Entries {
    disk: Directory,
    places: Places,
    segments: BTreeMap<u64, Segment>,
    next: u64,
    end: u64,
    read: std::vec::IntoIter<LogEntry>,
}

/// Reads the log in `dir` without opening it for writing: no lock, no change, a torn tail left where it is. For tools; on a log that is
/// in use it may report damage that is none.
///
/// # Errors
/// As [`super::Wal::open`]; a directory without a log is an empty one.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// let (recovered, entries) = quorate::storage::wal::dump(dir.path())?;
/// assert!(recovered.state.is_empty());
/// assert_eq!(entries.count(), 0);
/// # Ok::<(), quorate::Error>(())
/// ```
pub fn dump(dir: impl AsRef<Path>) -> Result<(Recovered, Entries)> {
    let dir = dir.as_ref();
    let disk = Directory::open(dir, false, true).map_err(|e| Error::io("open the log directory", dir, e))?;
    let loaded = recover::load(&disk, 0, false)?;
    let (next, end) = (loaded.log.first, loaded.log.next());
    let recovered = Recovered { state: loaded.log, torn: loaded.torn };
    Ok((recovered, Entries { disk, places: loaded.places, segments: loaded.segments, next, end, read: Vec::new().into_iter() }))
}

impl Entries {
    /// Leaves out what comes before an entry, without reading it. Before the first entry is taken.
    pub fn skip_to(&mut self, index: u64) {
        self.next = self.next.max(index);
    }
}

impl Iterator for Entries {
    type Item = Result<LogEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(entry) = self.read.next() {
            return Some(Ok(entry));
        }
        let mut pieces = Vec::new();
        while self.next < self.end && pieces.len() < 2 {
            if plan(&mut pieces, &self.places, &self.segments, self.next).is_none() {
                break;
            }
            self.next += 1;
        }
        // The second piece has only shown where the first one ends.
        if pieces.len() > 1 {
            pieces.pop();
            self.next -= 1;
        }
        let piece = pieces.pop()?;
        let mut entries = Vec::new();
        if let Err(error) = piece.read(&self.disk, &mut entries) {
            self.next = self.end;
            return Some(Err(error));
        }
        self.read = entries.into_iter();
        self.read.next().map(Ok)
    }
}
