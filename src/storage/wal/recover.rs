//! Opening a log: reads every segment, judges it, rebuilds the state, then mends the end.
//!
//! [`load`] only reads, and is what offline tools use; so does [`read`]. [`Opening::mend`] then cuts a torn tail, writes the last frame and its
//! mark once more, syncs, and puts aside files without frames. Nothing is changed before everything has been found in order. Who has more to look at
//! reads, looks, and accepts: what looks like a torn write may be a damaged one, of which others know.

use super::disk::Disk;
use super::flusher::Position;
use super::frame::{FrameBuf, Record, SEGMENT_HEADER_LEN, Seen, SegmentHeader, SegmentScan, Tail, decode_segment};
use super::index::{Cache, Places, Slot, Terms};
use super::space::{NEW_NAME, found, new_salt, spare_name};
use super::state::{Segment, Sleep, State, segment_name};
use super::{FIRST_SEGMENT_BYTES, FORMAT_VERSION, Flaw, LogEntry, LogState, MAX_FRAME_BYTES, MAX_SPARES, Recovered, WalOptions};
use crate::error::{Error, Result};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

/// The unit in which a torn tail is overwritten with zeros.
const BLOCK: u64 = 4096;

/// What the records read so far amount to.
struct Replay {
    log: LogState,
    places: Places,
    terms: Terms,
    cache: Cache,
    evicted: Vec<LogEntry>,
    /// The segment of the last record.
    segment: Option<u64>,
}

impl Replay {
    fn apply(&mut self, segment: u64, seen: Seen<'_>) -> std::result::Result<(), String> {
        let opens = self.segment != Some(segment);
        if opens != matches!(seen.record, Record::Opening { .. }) {
            return Err("the record with the state before a segment must be its first, and only that".into());
        }
        match seen.record {
            Record::Opening { first, vote, committed, purged, last } => {
                let owned = |bytes: Option<&[u8]>| bytes.map(Bytes::copy_from_slice);
                let opening = LogState { vote: owned(vote), committed: owned(committed), purged, first, last };
                if opening.first > opening.next() || opening.purged.map(|id| id.index) > opening.last.map(|id| id.index) {
                    return Err("the state before the segment contradicts itself".into());
                }
                if self.segment.is_none() {
                    // Entries before the oldest segment are gone. If they were not purged, that shows at the end.
                    self.places.purge(opening.next());
                } else if (&opening.vote, opening.purged, opening.first, opening.last)
                    != (&self.log.vote, self.log.purged, self.log.first, self.log.last)
                {
                    return Err("the state before the segment is not what the segments before it amount to".into());
                }
                // The committed mark may be a newer one: it need not have been in a frame.
                self.log = opening;
                self.segment = Some(segment);
            }
            Record::Entry { id, payload } => {
                self.log.push(id)?;
                let offset = u32::try_from(seen.offset).map_err(|_| "an entry beyond 4 GiB")?;
                self.places.push(id.index, segment, Slot { offset, len: seen.len });
                self.terms.push(id);
                self.cache.push(LogEntry { id, payload: Bytes::copy_from_slice(payload) }, 0);
                self.cache.evict(0, &mut self.evicted);
                self.evicted.clear();
            }
            Record::Truncate { last } => {
                if last.is_some_and(|last| last.index >= self.log.next()) && last != self.log.last {
                    return Err("a truncation to an entry that is not there".into());
                }
                self.log.truncate(last);
                let next = self.log.next();
                self.places.truncate(next);
                self.terms.truncate(next);
                self.cache.truncate(next);
            }
            Record::Purge { upto } => {
                self.log.purge(upto);
                self.places.purge(upto.index + 1);
                self.terms.purge(upto.index + 1);
                self.cache.purge(upto.index + 1);
            }
            Record::Vote(vote) => self.log.vote = Some(Bytes::copy_from_slice(vote)),
            Record::Committed(committed) => self.log.committed = Some(Bytes::copy_from_slice(committed)),
        }
        Ok(())
    }

    /// Every entry that the log should hold stands somewhere.
    fn complete(&self) -> std::result::Result<(), String> {
        let (log, places) = (&self.log, &self.places);
        if log.is_empty() || (places.first() <= log.first && places.next() == log.next()) {
            return Ok(());
        }
        let missing = places.first().min(log.next());
        Err(format!("entries {} to {} are missing; they were not purged", log.first, missing.saturating_sub(1)))
    }
}

/// A directory as it was read.
pub(super) struct Loaded {
    pub log: LogState,
    pub places: Places,
    terms: Terms,
    cache: Cache,
    pub segments: BTreeMap<u64, Segment>,
    /// The last segment with frames, its bytes, and what the decoder said; `None` for a directory without a log.
    end: Option<(Segment, Vec<u8>, SegmentScan)>,
    /// Where a torn write begins, if the log ends in one.
    pub torn: Option<(PathBuf, u64)>,
    /// Prepared segments, not used yet.
    unused: Vec<Segment>,
    /// Spare files, and those that are of no use.
    spares: Vec<String>,
    junk: Vec<String>,
}

/// The sequence that a segment's file name gives; `None` for other files.
fn sequence_of(name: &str) -> Option<u64> {
    let sequence = u64::from_str_radix(name.strip_suffix(".log")?, 16).ok()?;
    (segment_name(sequence) == name).then_some(sequence)
}

/// Reads and judges a directory, changing nothing. It keeps up to `cache_bytes` of the newest entries.
pub(super) fn load(disk: &dyn Disk, cache_bytes: usize, writable: bool) -> Result<Loaded> {
    let names = disk.list().map_err(|e| Error::io("list", disk.path(""), e))?;
    let mut loaded = Loaded {
        log: LogState::default(),
        places: Places::default(),
        terms: Terms::default(),
        cache: Cache::new(cache_bytes),
        segments: BTreeMap::new(),
        end: None,
        torn: None,
        unused: Vec::new(),
        spares: Vec::new(),
        junk: Vec::new(),
    };
    let mut sequences = Vec::new();
    for name in names {
        match sequence_of(&name) {
            Some(sequence) => sequences.push(sequence),
            None if name == NEW_NAME => loaded.junk.push(name),
            None if name.ends_with(".spare") => loaded.spares.push(name),
            None => tracing::warn!(file = %disk.path(&name).display(), "not a file of the log; left alone"),
        }
    }
    sequences.sort_unstable();
    let mut replay = Replay {
        log: LogState::default(),
        places: Places::default(),
        terms: Terms::default(),
        cache: Cache::new(cache_bytes),
        evicted: Vec::new(),
        segment: None,
    };
    let mut previous: Option<u64> = None;
    for sequence in sequences {
        let name = segment_name(sequence);
        let corrupt = |offset, what| Error::Corrupt { path: disk.path(&name), offset: Some(offset), what };
        if let Some(previous) = previous
            && previous.checked_add(1) != Some(sequence)
        {
            return Err(corrupt(0, format!("the segments between {} and this one are missing", segment_name(previous))));
        }
        previous = Some(sequence);
        let file = disk.open(&name, writable).map_err(|e| Error::io("open", disk.path(&name), e))?;
        let len = file.len().map_err(|e| Error::io("read the size of", disk.path(&name), e))?;
        let Ok(len) = u32::try_from(len) else {
            return Err(corrupt(0, format!("a segment of {len} bytes is larger than any log writes")));
        };
        let mut bytes = vec![0; len as usize];
        file.read_at(&mut bytes, 0).map_err(|e| Error::io("read", disk.path(&name), e))?;
        let judge = |flaw| match flaw {
            Flaw::Damaged { offset, what } => corrupt(offset, what),
            Flaw::Version { version } => {
                Error::Format { path: disk.path(&name), what: format!("log format {version}; this release reads format {FORMAT_VERSION}") }
            }
            Flaw::Gap { expected, found } => match &loaded.end {
                Some((segment, _, scan)) if found > expected => Error::Corrupt {
                    path: disk.path(&segment.name()),
                    offset: Some(scan.end),
                    what: format!("frame {expected} is not readable, but frame {found} begins the next segment"),
                },
                _ => corrupt(SEGMENT_HEADER_LEN as u64, format!("frame {found} stands where frame {expected} belongs")),
            },
        };
        let header = SegmentHeader::decode(&bytes).map_err(judge)?;
        if header.sequence != sequence {
            return Err(corrupt(0, format!("its header says that it is segment {:016x}", header.sequence)));
        }
        let expected = loaded.end.as_ref().map(|(_, _, scan)| scan.last_frame.saturating_add(1));
        let scan = decode_segment(&bytes, expected, &mut |seen| replay.apply(sequence, seen)).map_err(judge)?;
        let segment = Segment { sequence, salt: scan.salt, capacity: scan.capacity, file };
        // The write in doubt was to stand after the last frame of all, or as the first of the segment after it.
        let torn = (scan.tail == Tail::Torn).then(|| (disk.path(&name), scan.end));
        if scan.frames > 0 || torn.is_some() {
            loaded.torn = torn;
        }
        if scan.frames == 0 {
            loaded.unused.push(segment);
            continue;
        }
        if let Some(unused) = loaded.unused.first() {
            let path = disk.path(&unused.name());
            return Err(Error::Corrupt {
                path,
                offset: Some(SEGMENT_HEADER_LEN as u64),
                what: "no frames, but later segments have some".into(),
            });
        }
        loaded.segments.insert(sequence, segment.clone());
        loaded.end = Some((segment, bytes, scan));
    }
    if let Some((oldest, _)) = loaded.segments.first_key_value() {
        let path = disk.path(&segment_name(*oldest));
        replay.complete().map_err(|what| Error::Corrupt { path, offset: Some(SEGMENT_HEADER_LEN as u64), what })?;
    }
    (loaded.log, loaded.places, loaded.terms, loaded.cache) = (replay.log, replay.places, replay.terms, replay.cache);
    Ok(loaded)
}

/// A directory that was read, and what is to be done there before it is written to.
pub(super) struct Opening {
    end: Option<End>,
    /// Where a torn write begins, if the log ends in one.
    torn: Option<(PathBuf, u64)>,
    unused: Vec<Segment>,
    spares: Vec<String>,
    junk: Vec<String>,
}

/// Where the log ends.
struct End {
    segment: Segment,
    scan: SegmentScan,
    /// What the file holds from the last frame on: to that frame's end, or to the last byte that is to be cut off.
    rest: Vec<u8>,
}

/// Reads a directory that is to be written to, and changes nothing yet.
pub(super) fn read(disk: &dyn Disk, options: &WalOptions) -> Result<(State, Opening, Recovered)> {
    let loaded = load(disk, options.cache_bytes, true)?;
    let end = loaded.end.map(|(segment, bytes, scan)| {
        // Only what is to be cut is looked for.
        let is_cut = matches!(scan.tail, Tail::Torn | Tail::Stale);
        let used = if is_cut { bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1) } else { 0 };
        let rest = bytes.get(scan.last_offset as usize..used.max(scan.end as usize)).unwrap_or_default().to_vec();
        End { segment, scan, rest }
    });
    let recovered = Recovered { state: loaded.log.clone(), torn: loaded.torn.clone() };
    let opening = Opening { end, torn: loaded.torn, unused: loaded.unused, spares: loaded.spares, junk: loaded.junk };
    let state = State {
        committed_version: u64::from(loaded.log.committed.is_some()),
        committed_ticket: 0,
        log: loaded.log,
        terms: loaded.terms,
        cache: loaded.cache,
        queue: VecDeque::new(),
        queued_bytes: 0,
        published: 0,
        ticket: 0,
        sleep: Sleep::Awake,
        places: loaded.places,
        segments: loaded.segments,
        room: 0,
        next: None,
        wanted: 0,
        low: None,
        dropped: VecDeque::new(),
        spares: Vec::new(),
        accepted: false,
        failed: None,
        closing: false,
        stopped: false,
    };
    Ok((state, opening, recovered))
}

impl Opening {
    /// Where what can be read of the log ends: the file and the offset of what comes next. None for a log that is to be made.
    pub(super) fn end(&self, disk: &dyn Disk) -> Option<(PathBuf, u64)> {
        let end = self.end.as_ref().map(|end| (disk.path(&end.segment.name()), end.scan.end));
        self.torn.clone().or(end)
    }

    /// Makes a directory ready to be written to. Returns where to go on, and the spare files with their lengths.
    pub(super) fn mend(self, disk: &dyn Disk, options: &WalOptions, log: &LogState) -> Result<(Position, Vec<(String, u64)>)> {
        let Opening { end, torn, unused, spares: mut spare_names, junk } = self;
        if let Some((path, offset)) = torn {
            tracing::warn!(file = %path.display(), offset, "the log ends in a write that was cut short, never acknowledged; it is removed");
        }
        for name in junk {
            disk.remove(&name).map_err(|e| Error::io("remove", disk.path(&name), e))?;
        }
        // A prepared segment may hold the rest of a torn frame. As a spare it gets a new salt before it is used.
        for segment in unused.into_iter().rev() {
            let (from, to) = (segment.name(), spare_name(segment.salt));
            disk.rename(&from, &to).map_err(|e| Error::io("put away", disk.path(&from), e))?;
            spare_names.push(to);
        }
        let mut spares = Vec::new();
        for name in spare_names {
            let len = disk.open(&name, false).and_then(|file| file.len());
            match len {
                Ok(len) if len == options.segment_bytes && spares.len() < MAX_SPARES => spares.push((name, len)),
                _ => {
                    disk.remove(&name).map_err(|e| Error::io("remove", disk.path(&name), e))?;
                }
            }
        }
        let position = match end {
            Some(end) => {
                if matches!(end.scan.tail, Tail::Torn | Tail::Stale) {
                    end.cut(disk)?;
                }
                end.trust(disk, log)?;
                Position { segment: end.segment, offset: end.scan.end, frame: end.scan.last_frame, written: log.clone() }
            }
            None => create(disk, options)?,
        };
        // Also what a killed process renamed but did not sync: a spare must not be written to while a crash could give it its old name back.
        disk.sync().map_err(|e| Error::io("sync the directory", disk.path(""), e))?;
        Ok((position, spares))
    }
}

impl End {
    /// Overwrites what follows the last frame with zeros. The salt already keeps it from ever passing for a frame; this also keeps the next
    /// opening from meeting it again.
    fn cut(&self, disk: &dyn Disk) -> Result<()> {
        let path = disk.path(&self.segment.name());
        let (mut at, used) = (self.scan.end, self.scan.last_offset + self.rest.len() as u64);
        while at < used {
            let to = (at + 1).next_multiple_of(BLOCK).min(used);
            if self.rest(at, to).iter().any(|byte| *byte != 0) {
                self.segment.file.write_at(&[0; BLOCK as usize][..(to - at) as usize], at).map_err(|e| Error::io("write to", &path, e))?;
            }
            at = to;
        }
        Ok(())
    }

    /// Makes sure that what was read is what the disk holds: a process that was killed may have left the last frame in the kernel's memory
    /// only, and after a failed sync the kernel no longer even knows that it must write it. Earlier frames had been synced.
    fn trust(&self, disk: &dyn Disk, log: &LogState) -> Result<()> {
        let (segment, scan) = (&self.segment, &self.scan);
        let path = disk.path(&segment.name());
        let fail = |what| {
            let path = &path;
            move |e| Error::io(what, path, e)
        };
        segment.file.write_at(self.rest(scan.last_offset, scan.end), scan.last_offset).map_err(fail("write to"))?;
        // A mark beside a frame that may still be lost would make a crash here look like damage.
        segment.file.sync().map_err(fail("sync"))?;
        let mut mark = FrameBuf::default();
        mark.begin(segment.salt, MAX_FRAME_BYTES);
        if let Some(committed) = &log.committed {
            mark.committed(committed);
        }
        let mark = mark.finish_mark(scan.last_frame);
        // It always fits, unless an even larger one was written by another release.
        if scan.end + mark.len() as u64 <= segment.capacity {
            segment.file.write_at(mark, scan.end).map_err(fail("write to"))?;
        }
        segment.file.sync().map_err(fail("sync"))
    }

    /// What was read there.
    fn rest(&self, from: u64, to: u64) -> &[u8] {
        let place = |offset: u64| (offset.saturating_sub(self.scan.last_offset) as usize).min(self.rest.len());
        &self.rest[place(from)..place(to)]
    }
}

/// Makes the first segment of a new log, which bears its name only with its first frame in it.
fn create(disk: &dyn Disk, options: &WalOptions) -> Result<Position> {
    let header = SegmentHeader { sequence: 1, salt: new_salt(1), capacity: options.segment_bytes.min(FIRST_SEGMENT_BYTES) };
    let mut buf = FrameBuf::default();
    buf.begin(header.salt, MAX_FRAME_BYTES);
    buf.opening(&LogState::default());
    let mut bytes = buf.finish(1).to_vec();
    let offset = (SEGMENT_HEADER_LEN + bytes.len()) as u64;
    buf.begin(header.salt, MAX_FRAME_BYTES);
    bytes.extend_from_slice(buf.finish_mark(1));
    let file = found(disk, header, &bytes)?;
    let name = segment_name(header.sequence);
    disk.rename(NEW_NAME, &name).map_err(|e| Error::io("name", disk.path(&name), e))?;
    let segment = Segment { sequence: header.sequence, salt: header.salt, capacity: header.capacity, file };
    Ok(Position { segment, offset, frame: 1, written: LogState::default() })
}
