//! The bytes of a segment: its header, its frames, the records in them, and the decoder that judges a file.
//!
//! All numbers are little-endian; every checksum is CRC-32C.
//!
//! ```text
//! segment   header (64 bytes), then frames, each on a multiple of 8, then bytes of no meaning up to the capacity
//! header    magic "qrtrlog\n" | version u32 | 0 u32 | sequence u64 | salt u64 | capacity u64 | 0 x 20 | crc u32
//! frame     magic u32 | body length u32 | salt u64 | sequence u64 | records u32 | digest u32 | 0 u32 | crc of these 36 bytes u32 | body
//! record    crc u32 | length u32 | kind u8 | data        (the crc starts from the salt's and covers the rest of the record)
//! log id    term u64 | node u64 | index u64
//! ```
//!
//! A frame's *digest* is a checksum over the checksums of its records, so every payload byte is summed once, and one record can still
//! be verified by itself when it is read back. A *mark* is a frame with another magic that repeats the sequence of the frame before
//! it and says: that frame had reached the disk. The next frame overwrites it.
//!
//! The *salt* is a random number of each use of a file. It makes what a recycled file held before unreadable as current, and because
//! no client can know it, no stored value can pass for a frame.

use super::{LogId, LogState};
use bytes::Bytes;
use crc32c::{crc32c, crc32c_append};

/// The version that this release writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes before the first frame.
pub(super) const SEGMENT_HEADER_LEN: usize = 64;
pub(super) const FRAME_HEADER_LEN: usize = 40;
pub(super) const RECORD_HEADER_LEN: usize = 9;
const LOG_ID_LEN: usize = 24;
/// Frames start on multiples of this.
pub(super) const ALIGN: usize = 8;

const SEGMENT_MAGIC: [u8; 8] = *b"qrtrlog\n";
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"qfrm");
const MARK_MAGIC: u32 = u32::from_le_bytes(*b"qmrk");

const KIND_ENTRY: u8 = 1;
const KIND_TRUNCATE: u8 = 2;
const KIND_PURGE: u8 = 3;
const KIND_VOTE: u8 = 4;
const KIND_COMMITTED: u8 = 5;
const KIND_OPENING: u8 = 6;

/// The bytes that an entry's record takes in a frame.
pub(super) fn entry_len(payload: usize) -> usize {
    RECORD_HEADER_LEN + LOG_ID_LEN + payload
}

/// The bytes that a vote's or a committed mark's record takes.
pub(super) fn opaque_len(bytes: usize) -> usize {
    RECORD_HEADER_LEN + bytes
}

/// The most bytes that a truncate or purge record takes.
pub(super) const LOG_ID_RECORD_LEN: usize = RECORD_HEADER_LEN + 1 + LOG_ID_LEN;

/// The bytes that the record at a segment's start takes.
pub(super) fn opening_len(state: &LogState) -> usize {
    let opaque = |bytes: &Option<Bytes>| 1 + bytes.as_ref().map_or(0, |b| 4 + b.len());
    RECORD_HEADER_LEN + 8 + 2 * (1 + LOG_ID_LEN) + opaque(&state.vote) + opaque(&state.committed)
}

/// What every checksum of records starts from.
pub(super) fn seed_of(salt: u64) -> u32 {
    crc32c(&salt.to_le_bytes())
}

/// Little-endian number at `at`; `None` past the end.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What stands at the start of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub sequence: u64,
    pub salt: u64,
    pub capacity: u64,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER_LEN] {
        let mut bytes = [0; SEGMENT_HEADER_LEN];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.salt.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.capacity.to_le_bytes());
        let crc = crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Flaw> {
        let damaged = |what: &str| Flaw::Damaged { offset: 0, what: what.to_owned() };
        let head: &[u8; SEGMENT_HEADER_LEN] =
            bytes.first_chunk().ok_or_else(|| damaged("the file is too short to hold a segment's header"))?;
        if head[..8] != SEGMENT_MAGIC {
            return Err(damaged("not a segment of this log: wrong magic number"));
        }
        // The place and the reach of this checksum are the same in all versions, so a flipped version is not taken for a newer one.
        if u32_at(head, 60) != Some(crc32c(&head[..60])) {
            return Err(damaged("the segment's header fails its checksum"));
        }
        let version = u32_at(head, 8).unwrap_or_default();
        if version != FORMAT_VERSION {
            return Err(Flaw::Version { version });
        }
        let number = |at| u64_at(head, at).unwrap_or_default();
        Ok(Self { sequence: number(16), salt: number(24), capacity: number(32) })
    }
}

/// Why a segment is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Flaw {
    /// Bytes at `offset` are not what was written there.
    Damaged { offset: u64, what: String },
    /// Written by another release.
    Version { version: u32 },
    /// The first frame is intact, but frames are missing between the segment before and this one.
    Gap { expected: u64, found: u64 },
}

/// One record of a frame, borrowed from the segment's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// A log entry.
    Entry { id: LogId, payload: &'a [u8] },
    /// The log ends at `last` from here on; `None` empties it.
    Truncate { last: Option<LogId> },
    /// Entries up to and including `upto` are no longer needed.
    Purge { upto: LogId },
    /// The vote, opaque.
    Vote(&'a [u8]),
    /// The committed log id, opaque.
    Committed(&'a [u8]),
    /// The state before this segment, first in its first frame.
    Opening { first: u64, vote: Option<&'a [u8]>, committed: Option<&'a [u8]>, purged: Option<LogId>, last: Option<LogId> },
}

/// Takes values from the front of foreign bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        u32_at(self.take(4)?, 0)
    }

    fn u64(&mut self) -> Option<u64> {
        u64_at(self.take(8)?, 0)
    }

    /// The last index is never used, so that "the next index" always exists.
    fn log_id(&mut self) -> Option<LogId> {
        Some(LogId { term: self.u64()?, node: self.u64()?, index: self.u64().filter(|index| *index < u64::MAX)? })
    }

    fn option<T>(&mut self, value: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.u8()? {
            0 => Some(None),
            1 => value(self).map(Some),
            _ => None,
        }
    }

    fn opaque(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(usize::try_from(len).ok()?)
    }
}

/// Decodes a record's data; `None` if it is not what its kind asks for.
fn decode_data(kind: u8, data: &[u8]) -> Option<Record<'_>> {
    let mut reader = Reader(data);
    let record = match kind {
        KIND_ENTRY => Record::Entry { id: reader.log_id()?, payload: std::mem::take(&mut reader.0) },
        KIND_TRUNCATE => Record::Truncate { last: reader.option(Reader::log_id)? },
        KIND_PURGE => Record::Purge { upto: reader.log_id()? },
        KIND_VOTE => Record::Vote(std::mem::take(&mut reader.0)),
        KIND_COMMITTED => Record::Committed(std::mem::take(&mut reader.0)),
        KIND_OPENING => Record::Opening {
            first: reader.u64()?,
            purged: reader.option(Reader::log_id)?,
            last: reader.option(Reader::log_id)?,
            vote: reader.option(Reader::opaque)?,
            committed: reader.option(Reader::opaque)?,
        },
        _ => return None,
    };
    reader.0.is_empty().then_some(record)
}

/// The record at the front of `bytes`, verified, with its checksum and length; `None` if it is not intact.
pub(super) fn decode_record(bytes: &[u8], seed: u32) -> Option<(Record<'_>, u32, usize)> {
    let crc = u32_at(bytes, 0)?;
    let len = RECORD_HEADER_LEN.checked_add(usize::try_from(u32_at(bytes, 4)?).ok()?)?;
    let whole = bytes.get(..len)?;
    if crc32c_append(seed, whole.get(4..)?) != crc {
        return None;
    }
    let record = decode_data(*whole.get(8)?, whole.get(RECORD_HEADER_LEN..)?)?;
    Some((record, crc, len))
}

/// A frame's header that passed its own checksum and carries the segment's salt.
#[derive(Clone, Copy)]
struct FrameHeader {
    mark: bool,
    body: u32,
    sequence: u64,
    records: u32,
    digest: u32,
}

fn frame_header(bytes: &[u8], salt: u64) -> Option<FrameHeader> {
    let magic = u32_at(bytes, 0)?;
    // The cheap comparisons first: the search for later frames comes here at every eighth byte.
    if (magic != FRAME_MAGIC && magic != MARK_MAGIC) || u64_at(bytes, 8)? != salt {
        return None;
    }
    if u32_at(bytes, 36)? != crc32c(bytes.get(..36)?) {
        return None;
    }
    Some(FrameHeader {
        mark: magic == MARK_MAGIC,
        body: u32_at(bytes, 4)?,
        sequence: u64_at(bytes, 16)?,
        records: u32_at(bytes, 24)?,
        digest: u32_at(bytes, 28)?,
    })
}

/// The intact frame at `offset`: its header, its body, and where the next one starts.
fn frame_at(bytes: &[u8], offset: usize, salt: u64) -> Option<(FrameHeader, &[u8], usize)> {
    let header = frame_header(bytes.get(offset..)?, salt)?;
    let start = offset.checked_add(FRAME_HEADER_LEN)?;
    let end = start.checked_add(usize::try_from(header.body).ok()?)?;
    let body = bytes.get(start..end)?;
    let next = end.checked_next_multiple_of(ALIGN).filter(|next| *next <= bytes.len())?;
    let seed = seed_of(salt);
    let (mut rest, mut digest, mut records) = (body, seed, 0u32);
    while !rest.is_empty() {
        let (_, crc, len) = decode_record(rest, seed)?;
        digest = crc32c_append(digest, &crc.to_le_bytes());
        records = records.checked_add(1)?;
        rest = rest.get(len..)?;
    }
    (digest == header.digest && records == header.records).then_some((header, body, next))
}

/// One record as the decoder meets it.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The sequence number of its frame; a mark has that of the frame before it.
    pub frame: u64,
    /// Where the record starts in the segment, and its bytes there.
    pub offset: u64,
    pub len: u32,
    pub record: Record<'a>,
}

/// What stands where a segment's next frame would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Zeros, or nothing.
    Blank,
    /// A mark: all frames before it had reached the disk.
    Marked,
    /// A frame of this segment that is not whole: it was being written.
    Torn,
    /// Something else: what the file held in an earlier use, a torn frame whose start is missing, or a torn mark.
    Stale,
}

/// What [`decode_segment`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentScan {
    pub sequence: u64,
    pub salt: u64,
    pub capacity: u64,
    /// The number of frames, where the last one starts, and its sequence number; 0 frames leave the latter two without meaning.
    pub frames: u64,
    pub last_offset: u64,
    pub last_frame: u64,
    /// Where the next frame goes.
    pub end: u64,
    pub tail: Tail,
}

/// Judges the bytes of one segment file and hands every record of every intact frame, and of a mark, to `visit`, in order.
///
/// `expected` is the sequence number that the segment's first frame must have; `None` for the oldest segment of a log, which must
/// have a frame and starts the count. A segment without an intact frame is fine otherwise: it was prepared and not yet used.
///
/// The bytes may be anything: this neither panics nor allocates, but for the text of an error.
///
/// # Errors
/// [`Flaw`] if the file is damaged, from another release, or does not follow the segment before it, and whatever text `visit`
/// returns, as damage at that record.
///
/// ```
/// use quorate::storage::wal::{Flaw, decode_segment};
/// let flaw = decode_segment(b"no segment", None, &mut |_| Ok(())).unwrap_err();
/// assert!(matches!(flaw, Flaw::Damaged { offset: 0, .. }));
/// ```
pub fn decode_segment<'a>(
    bytes: &'a [u8],
    expected: Option<u64>,
    visit: &mut dyn FnMut(Seen<'a>) -> Result<(), String>,
) -> Result<SegmentScan, Flaw> {
    let SegmentHeader { sequence, salt, capacity } = SegmentHeader::decode(bytes)?;
    let Some(bytes) = usize::try_from(capacity).ok().and_then(|capacity| bytes.get(..capacity)) else {
        let what = format!("the file ends here, but its header says {capacity} bytes");
        return Err(Flaw::Damaged { offset: bytes.len() as u64, what });
    };
    let mut scan = SegmentScan {
        sequence,
        salt,
        capacity,
        frames: 0,
        last_offset: 0,
        last_frame: 0,
        end: SEGMENT_HEADER_LEN as u64,
        tail: Tail::Blank,
    };
    let mut next = expected;
    let mut offset = SEGMENT_HEADER_LEN;
    while let Some((header, body, end)) = frame_at(bytes, offset, salt) {
        if header.mark {
            // A mark with an older number could only be a leftover; it proves nothing.
            if next.is_some() && header.sequence.checked_add(1) == next {
                visit_records(&header, body, offset, salt, visit)?;
                scan.tail = Tail::Marked;
            }
            break;
        }
        match next {
            Some(expected) if expected != header.sequence && scan.frames == 0 => {
                return Err(Flaw::Gap { expected, found: header.sequence });
            }
            Some(expected) if expected != header.sequence => {
                let what = format!("frame {} stands where frame {expected} belongs", header.sequence);
                return Err(Flaw::Damaged { offset: offset as u64, what });
            }
            _ => {}
        }
        visit_records(&header, body, offset, salt, visit)?;
        next = header.sequence.checked_add(1);
        scan.frames += 1;
        scan.last_offset = offset as u64;
        scan.last_frame = header.sequence;
        offset = end;
    }
    scan.end = offset as u64;
    let Some(next) = next else {
        return Err(Flaw::Damaged { offset: offset as u64, what: "the first frame of the oldest segment is not readable".into() });
    };
    let rest = bytes.get(offset..).unwrap_or_default();
    if let Some((at, later)) = later_frame(rest, salt, next) {
        let (kind, at) = (if later.mark { "the mark of frame" } else { "frame" }, offset + at);
        let what = format!("frame {next} is not readable, but {kind} {} stands at byte {at}", later.sequence);
        return Err(Flaw::Damaged { offset: offset as u64, what });
    }
    if scan.tail != Tail::Marked {
        let blank = rest.iter().take(FRAME_HEADER_LEN).all(|byte| *byte == 0);
        let ours = u64_at(rest, 8) == Some(salt) && u32_at(rest, 0) != Some(MARK_MAGIC);
        scan.tail = if blank {
            Tail::Blank
        } else if ours {
            Tail::Torn
        } else {
            Tail::Stale
        };
    }
    Ok(scan)
}

/// A header in `rest` that can only have been written after frame `next` had reached the disk. Headers alone are proof enough, and
/// looking at nothing else keeps this linear. At the very front, frame `next` itself may stand, torn; its mark may not.
fn later_frame(rest: &[u8], salt: u64, next: u64) -> Option<(usize, FrameHeader)> {
    (0..rest.len()).step_by(ALIGN).find_map(|at| {
        let header = frame_header(rest.get(at..)?, salt)?;
        let torn = at == 0 && !header.mark && header.sequence == next;
        (header.sequence >= next && !torn).then_some((at, header))
    })
}

/// Hands the records of a frame that is known to be intact to `visit`.
fn visit_records<'a>(
    header: &FrameHeader,
    body: &'a [u8],
    frame_offset: usize,
    salt: u64,
    visit: &mut dyn FnMut(Seen<'a>) -> Result<(), String>,
) -> Result<(), Flaw> {
    let seed = seed_of(salt);
    let mut rest = body;
    let mut offset = (frame_offset + FRAME_HEADER_LEN) as u64;
    while let Some((record, _, len)) = decode_record(rest, seed) {
        // A record is shorter than its frame's body, whose length is a u32.
        let seen = Seen { frame: header.sequence, offset, len: len as u32, record };
        visit(seen).map_err(|what| Flaw::Damaged { offset, what })?;
        offset += len as u64;
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(())
}

/// Builds one frame after the other in one reused buffer.
#[derive(Default)]
pub(super) struct FrameBuf {
    bytes: Vec<u8>,
    salt: u64,
    seed: u32,
    digest: u32,
    records: u32,
}

impl FrameBuf {
    /// Starts a frame, forgetting the one before. A buffer that had to hold more than `keep` bytes is given back.
    pub(super) fn begin(&mut self, salt: u64, keep: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(keep);
        self.bytes.resize(FRAME_HEADER_LEN, 0);
        self.salt = salt;
        self.seed = seed_of(salt);
        self.digest = self.seed;
        self.records = 0;
    }

    /// Bytes so far, with the header.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends a record; returns where it starts, from the frame's start, and its length.
    fn record(&mut self, kind: u8, write: impl FnOnce(&mut Vec<u8>)) -> (usize, usize) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, kind]);
        write(&mut self.bytes);
        let len = self.bytes.len() - start;
        // Payloads are bounded by MAX_ENTRY_BYTES, so the length fits.
        self.bytes[start + 4..start + 8].copy_from_slice(&((len - RECORD_HEADER_LEN) as u32).to_le_bytes());
        let crc = crc32c_append(self.seed, &self.bytes[start + 4..]).to_le_bytes();
        self.bytes[start..start + 4].copy_from_slice(&crc);
        self.digest = crc32c_append(self.digest, &crc);
        self.records += 1;
        (start, len)
    }

    pub(super) fn entry(&mut self, id: LogId, payload: &[u8]) -> (usize, usize) {
        self.record(KIND_ENTRY, |out| {
            put_log_id(out, id);
            out.extend_from_slice(payload);
        })
    }

    pub(super) fn truncate(&mut self, last: Option<LogId>) {
        self.record(KIND_TRUNCATE, |out| put_option_id(out, last));
    }

    pub(super) fn purge(&mut self, upto: LogId) {
        self.record(KIND_PURGE, |out| put_log_id(out, upto));
    }

    pub(super) fn vote(&mut self, bytes: &[u8]) {
        self.record(KIND_VOTE, |out| out.extend_from_slice(bytes));
    }

    pub(super) fn committed(&mut self, bytes: &[u8]) {
        self.record(KIND_COMMITTED, |out| out.extend_from_slice(bytes));
    }

    pub(super) fn opening(&mut self, state: &LogState) {
        self.record(KIND_OPENING, |out| {
            out.extend_from_slice(&state.first.to_le_bytes());
            put_option_id(out, state.purged);
            put_option_id(out, state.last);
            put_option_opaque(out, state.vote.as_ref());
            put_option_opaque(out, state.committed.as_ref());
        });
    }

    /// Ends a frame and returns its bytes, padded to the alignment.
    pub(super) fn finish(&mut self, sequence: u64) -> &[u8] {
        self.seal(FRAME_MAGIC, sequence)
    }

    /// Ends a mark that says that the frame `sequence` has reached the disk.
    pub(super) fn finish_mark(&mut self, sequence: u64) -> &[u8] {
        self.seal(MARK_MAGIC, sequence)
    }

    fn seal(&mut self, magic: u32, sequence: u64) -> &[u8] {
        let body = (self.bytes.len() - FRAME_HEADER_LEN) as u32;
        let padded = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(padded, 0);
        let head = &mut self.bytes[..FRAME_HEADER_LEN];
        head[..4].copy_from_slice(&magic.to_le_bytes());
        head[4..8].copy_from_slice(&body.to_le_bytes());
        head[8..16].copy_from_slice(&self.salt.to_le_bytes());
        head[16..24].copy_from_slice(&sequence.to_le_bytes());
        head[24..28].copy_from_slice(&self.records.to_le_bytes());
        head[28..32].copy_from_slice(&self.digest.to_le_bytes());
        let crc = crc32c(&head[..36]);
        head[36..40].copy_from_slice(&crc.to_le_bytes());
        &self.bytes
    }
}

fn put_log_id(out: &mut Vec<u8>, id: LogId) {
    out.extend_from_slice(&id.term.to_le_bytes());
    out.extend_from_slice(&id.node.to_le_bytes());
    out.extend_from_slice(&id.index.to_le_bytes());
}

fn put_option_id(out: &mut Vec<u8>, id: Option<LogId>) {
    out.push(id.is_some() as u8);
    if let Some(id) = id {
        put_log_id(out, id);
    }
}

fn put_option_opaque(out: &mut Vec<u8>, bytes: Option<&Bytes>) {
    out.push(bytes.is_some() as u8);
    if let Some(bytes) = bytes {
        // Bounded by MAX_OPAQUE_BYTES.
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(bytes);
    }
}
