//! The snapshot format: one framed, checksummed stream for Raft's snapshots, for backups, and for restoring from them.
//!
//! This is a pure codec. The [`Encoder`] takes items one by one and yields chunks of at most [`CHUNK`] bytes; the [`Decoder`]
//! reads any `std::io::Read` and yields the items. Both need constant memory: one frame, and one item of at most [`ITEM_MAX`].
//! The same items make the same bytes.
//!
//! # Layout
//!
//! All numbers are little-endian.
//!
//! ```text
//! stream   bytes  field
//!              8  magic: 89 'Q' 'S' 'N' 'A' 'P' 0d 0a
//!              …  frame 0: the header
//!              …  frames of items: all metas by ascending key, then all records by ascending revision
//!              …  the end frame
//!              …  the padding frame, which ends at a multiple of 512 bytes
//!             32  sha256 of everything before it; then nothing more
//!
//! frame    offset  bytes  field
//!               0      4  length of the payload, u32
//!               4      1  kind: 1 header, 2 items, 3 end, 4 padding
//!               5      8  sequence number, u64: 0, 1, 2, … without gaps
//!              13      4  crc32c of bytes 0 to 12 and the payload
//!              17      …  payload
//!
//! header   offset  bytes  field
//!               0      4  format, u32: 1
//!               4      8  cluster id, u64
//!              12      8  member id, u64: who made it
//!              20      8  revision, i64: the main revision it shows
//!              28      8  compact revision, i64
//!              36     24  applied log position: term u64, node u64, index u64
//!              60      8  created at, u64: seconds since 1970
//!              68      1  length of the version, at most 64
//!              69      …  version of quorate that made it, UTF-8
//!
//! items    one or more of these, at most 64 KiB together, or a single one that is larger
//!   meta        1  tag: 1
//!               4  length of the key, u32
//!               4  length of the value, u32
//!               …  key, value
//!   record      1  tag: 2 live, 3 tombstone
//!               8  main revision, i64: from 1 to the header's
//!               4  sub revision, u32
//!               4  length of the bytes, u32
//!               …  bytes
//!
//! end      offset  bytes  field
//!               0      8  number of metas, u64
//!               8      8  number of records, u64
//!              16      8  bytes of all keys, values and records, u64
//!
//! padding  0 to 511 zero bytes
//! ```
//!
//! The total size is therefore 32 more than a multiple of 512, with a sha256 at the end: what `etcdctl snapshot save` expects
//! of a snapshot before it keeps it. The magic follows PNG's: its first byte is no text and its last two do not survive a
//! transfer that takes it for text.
//!
//! # Example
//!
//! ```text
//! let items = [Item::Record { main: 2, sub: 0, tombstone: false, bytes: kv }].map(Ok);
//! let written = snapshot::write(&header, items, &mut file, &path)?;
//! assert_eq!(snapshot::verify(&path)?, written);
//! let mut decoder = Decoder::new(File::open(&path)?, &path)?;
//! while let Some(item) = decoder.next_item()? { /* into a store that nobody uses yet */ }
//! ```
//!
//! # Invariants
//!
//! - [`Decoder::next_item`] says `None` only if every frame's checksum, the sequence, the order of the items, the counts, the
//!   padding and the sha256 are right and nothing follows. A stream cut short, at any byte, is an error.
//! - Both sides check the order of items with the same code, so what the encoder takes the decoder takes.
//! - Whatever the bytes, the decoder neither panics nor allocates more than about twice what it has read of one frame.
//!
//! # Caveats
//!
//! - Items are yielded as they come, before the end has been seen. A restore must write them to a place that counts only once
//!   `None` was returned; or run [`verify`] first.
//! - Checksums find damage, not forgery: whoever can write the file can write a valid one.
//! - A record is a slice of its frame: while it is kept, so is the frame.
//! - The total size is not known until the end.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes of a chunk from [`Encoder::next_chunk`]; only the last is smaller.
pub const CHUNK: usize = 64 << 10;

/// The largest meta (key and value) or record. The encoder refuses larger ones, so a configuration must not let a request get
/// near this size.
pub const ITEM_MAX: usize = 16 << 20;

/// Payload bytes up to which items share a frame. An item that does not fit gets a frame of its own.
const FRAME_MAX: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"\x89QSNAP\r\n";
const FORMAT: u32 = 1;
const BLOCK: u64 = 512;
const FRAME_HEAD: usize = 17;
const META_HEAD: usize = 9;
const RECORD_HEAD: usize = 17;
const HEADER_FIXED: usize = 69;
const VERSION_MAX: usize = 64;
const END_LEN: usize = 24;
const SHA_LEN: usize = 32;

mod kind {
    pub const HEADER: u8 = 1;
    pub const ITEMS: u8 = 2;
    pub const END: u8 = 3;
    pub const PADDING: u8 = 4;
}

mod tag {
    pub const META: u8 = 1;
    pub const RECORD: u8 = 2;
    pub const TOMBSTONE: u8 = 3;
}

/// A place in the Raft log; all zero before the first entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPosition {
    pub term: u64,
    pub node: u64,
    pub index: u64,
}

/// What a snapshot says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub cluster_id: u64,
    /// The member that made the snapshot.
    pub member_id: u64,
    /// The main revision of the store that the snapshot shows; not negative.
    pub revision: i64,
    /// The revision compacted to, at most `revision`.
    pub compact_revision: i64,
    /// The last log entry whose effects are in it.
    pub applied: LogPosition,
    /// Seconds since 1970 by the maker's clock.
    pub created_unix_s: u64,
    /// The version of this crate that made it, at most 64 bytes.
    pub version: String,
}

/// One thing in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A small named value: a lease, an alarm, the membership. All metas come before all records, by ascending key.
    Meta { key: Bytes, value: Bytes },
    /// One record of the revision history, by ascending (main, sub).
    Record { main: i64, sub: u32, tombstone: bool, bytes: Bytes },
}

/// What is known of a snapshot once it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub header: Header,
    pub metas: u64,
    pub records: u64,
    /// Bytes of all keys, values and records.
    pub content_bytes: u64,
    /// Bytes of the whole stream.
    pub size: u64,
    /// The last 32 bytes of the stream: the hash of all others.
    pub sha256: [u8; 32],
}

/// The order and the counts of the items so far. Used by both sides.
#[derive(Debug, Default)]
struct Tally {
    revision: i64,
    last_meta: Option<Bytes>,
    last_record: Option<(i64, u32)>,
    metas: u64,
    records: u64,
    content_bytes: u64,
}

impl Tally {
    /// Counts an item, or says why it may not come here.
    fn take(&mut self, item: &Item) -> std::result::Result<(), String> {
        let bytes = match item {
            Item::Meta { key, value } => {
                if self.last_record.is_some() {
                    return Err(format!("meta \"{}\" after the first record", key.escape_ascii()));
                }
                if let Some(last) = self.last_meta.as_ref().filter(|last| *last >= key) {
                    return Err(format!("meta \"{}\" after \"{}\"", key.escape_ascii(), last.escape_ascii()));
                }
                key.len() + value.len()
            }
            Item::Record { main, sub, bytes, .. } => {
                if *main < 1 || *main > self.revision {
                    return Err(format!("record {main}.{sub} in a snapshot of revision {}", self.revision));
                }
                if let Some(last) = self.last_record.filter(|last| *last >= (*main, *sub)) {
                    return Err(format!("record {main}.{sub} after {}.{}", last.0, last.1));
                }
                bytes.len()
            }
        };
        if bytes > ITEM_MAX {
            return Err(format!("an item of {bytes} bytes; {ITEM_MAX} is the most"));
        }
        match item {
            Item::Meta { key, .. } => {
                self.last_meta = Some(key.clone());
                self.metas += 1;
            }
            Item::Record { main, sub, .. } => {
                self.last_record = Some((*main, *sub));
                self.records += 1;
            }
        }
        self.content_bytes = self.content_bytes.saturating_add(bytes as u64);
        Ok(())
    }

    fn summary(&self, header: &Header, size: u64, sha256: [u8; SHA_LEN]) -> Summary {
        let Tally { metas, records, content_bytes, .. } = *self;
        Summary { header: header.clone(), metas, records, content_bytes, size, sha256 }
    }
}

impl Header {
    fn check(&self) -> std::result::Result<(), String> {
        if self.revision < 0 || self.compact_revision > self.revision {
            return Err(format!("revision {} compacted to {}", self.revision, self.compact_revision));
        }
        if self.version.len() > VERSION_MAX {
            return Err(format!("a version of {} bytes", self.version.len()));
        }
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_FIXED + self.version.len());
        out.put_u32_le(FORMAT);
        out.put_u64_le(self.cluster_id);
        out.put_u64_le(self.member_id);
        out.put_i64_le(self.revision);
        out.put_i64_le(self.compact_revision);
        out.put_u64_le(self.applied.term);
        out.put_u64_le(self.applied.node);
        out.put_u64_le(self.applied.index);
        out.put_u64_le(self.created_unix_s);
        out.put_u8(self.version.len() as u8); // checked to be at most VERSION_MAX
        out.put_slice(self.version.as_bytes());
        out
    }

    /// Reads what follows the format number.
    fn decode(mut payload: Bytes) -> std::result::Result<Header, String> {
        let mut fixed = || {
            let header = Header {
                cluster_id: payload.try_get_u64_le()?,
                member_id: payload.try_get_u64_le()?,
                revision: payload.try_get_i64_le()?,
                compact_revision: payload.try_get_i64_le()?,
                applied: LogPosition { term: payload.try_get_u64_le()?, node: payload.try_get_u64_le()?, index: payload.try_get_u64_le()? },
                created_unix_s: payload.try_get_u64_le()?,
                version: String::new(),
            };
            Ok::<_, bytes::TryGetError>((header, payload.try_get_u8()?))
        };
        let (mut header, version_len) = fixed().map_err(|_| "the header is too short".to_string())?;
        if payload.len() != usize::from(version_len) {
            return Err(format!("the header has {} bytes of version instead of {version_len}", payload.len()));
        }
        header.version = String::from_utf8(payload.into()).map_err(|_| "the version is not UTF-8".to_string())?;
        header.check()?;
        Ok(header)
    }
}

/// Makes a snapshot, item by item.
///
/// ```text
/// let mut encoder = Encoder::new(&header)?;
/// for item in items {
///     encoder.push(&item)?;
///     while let Some(chunk) = encoder.next_chunk() { send(chunk) }
/// }
/// encoder.finish()?;
/// while let Some(chunk) = encoder.next_chunk() { send(chunk) }
/// ```
///
/// [`Chunks`] and [`write()`] are this loop for an iterator of items. If the producer fails half-way it just stops: without its
/// end, what was sent is no snapshot.
pub struct Encoder {
    header: Header,
    tally: Tally,
    /// The payload of the items frame that is not full yet.
    frame: Vec<u8>,
    frame_max: usize,
    /// Closed frames that have not been taken. Below [`CHUNK`] before each item, so never above a chunk, a frame and an item.
    out: BytesMut,
    sequence: u64,
    size: u64,
    sha: Sha256,
    summary: Option<Summary>,
}

impl Encoder {
    /// Starts a snapshot.
    ///
    /// # Errors
    /// `Error::Failed` if the header contradicts itself or its version is too long.
    pub fn new(header: &Header) -> Result<Encoder> {
        Encoder::with_frame_max(header, FRAME_MAX)
    }

    fn with_frame_max(header: &Header, frame_max: usize) -> Result<Encoder> {
        header.check().map_err(refused)?;
        let mut encoder = Encoder {
            header: header.clone(),
            tally: Tally { revision: header.revision, ..Tally::default() },
            frame: Vec::with_capacity(frame_max),
            frame_max,
            out: BytesMut::with_capacity(2 * CHUNK),
            sequence: 0,
            size: 0,
            sha: Sha256::new(),
            summary: None,
        };
        encoder.emit(&MAGIC);
        encoder.emit_frame(kind::HEADER, &header.encode());
        Ok(encoder)
    }

    /// Adds an item.
    ///
    /// # Errors
    /// `Error::Failed`, and nothing is added, if the item is too large or out of order, or full chunks have not been taken, or
    /// the snapshot is finished. All but the first are mistakes of the caller.
    pub fn push(&mut self, item: &Item) -> Result<()> {
        if self.summary.is_some() || self.out.len() >= CHUNK {
            return Err(refused("an item after the end, or before all chunks were taken".into()));
        }
        self.tally.take(item).map_err(refused)?;
        let len = match item {
            Item::Meta { key, value } => META_HEAD + key.len() + value.len(),
            Item::Record { bytes, .. } => RECORD_HEAD + bytes.len(),
        };
        if self.frame.len() + len > self.frame_max {
            self.close_frame();
        }
        // The lengths fit: Tally has checked that they are at most ITEM_MAX.
        match item {
            Item::Meta { key, value } => {
                self.frame.put_u8(tag::META);
                self.frame.put_u32_le(key.len() as u32);
                self.frame.put_u32_le(value.len() as u32);
                self.frame.put_slice(key);
                self.frame.put_slice(value);
            }
            Item::Record { main, sub, tombstone, bytes } => {
                self.frame.put_u8(if *tombstone { tag::TOMBSTONE } else { tag::RECORD });
                self.frame.put_i64_le(*main);
                self.frame.put_u32_le(*sub);
                self.frame.put_u32_le(bytes.len() as u32);
                self.frame.put_slice(bytes);
            }
        }
        if self.frame.len() >= self.frame_max {
            self.close_frame();
        }
        Ok(())
    }

    /// Adds the end; the remaining chunks can be taken afterwards. Calling it again changes nothing.
    pub fn finish(&mut self) -> Summary {
        if let Some(summary) = &self.summary {
            return summary.clone();
        }
        self.close_frame();
        let mut end = [0; END_LEN];
        let mut fields = &mut end[..];
        fields.put_u64_le(self.tally.metas);
        fields.put_u64_le(self.tally.records);
        fields.put_u64_le(self.tally.content_bytes);
        self.emit_frame(kind::END, &end);
        let padding = padding(self.size + FRAME_HEAD as u64);
        self.emit_frame(kind::PADDING, &[0; BLOCK as usize][..padding]);
        let sha256: [u8; SHA_LEN] = self.sha.clone().finalize().into();
        self.out.put_slice(&sha256);
        let summary = self.tally.summary(&self.header, self.size + SHA_LEN as u64, sha256);
        self.summary.insert(summary).clone()
    }

    /// The next [`CHUNK`] bytes if there are as many; after [`finish`](Encoder::finish) also the smaller rest.
    pub fn next_chunk(&mut self) -> Option<Bytes> {
        let ready = if self.summary.is_some() { self.out.len().min(CHUNK) } else { CHUNK };
        (ready > 0 && self.out.len() >= ready).then(|| self.out.split_to(ready).freeze())
    }

    fn close_frame(&mut self) {
        if !self.frame.is_empty() {
            let mut frame = std::mem::take(&mut self.frame);
            self.emit_frame(kind::ITEMS, &frame);
            frame.clear();
            frame.shrink_to(self.frame_max); // after a large item
            self.frame = frame;
        }
    }

    fn emit_frame(&mut self, kind: u8, payload: &[u8]) {
        let head = frame_head(kind, self.sequence, payload);
        self.sequence += 1;
        self.emit(&head);
        self.emit(payload);
    }

    fn emit(&mut self, bytes: &[u8]) {
        self.sha.update(bytes);
        self.size += bytes.len() as u64;
        self.out.put_slice(bytes);
    }
}

/// The chunks of a snapshot of an iterator's items. Stops after the first error, its own or the iterator's.
pub struct Chunks<I> {
    encoder: Encoder,
    items: I,
    over: bool,
}

impl<I: Iterator<Item = Result<Item>>> Chunks<I> {
    /// # Errors
    /// Those of [`Encoder::new`].
    pub fn new(header: &Header, items: impl IntoIterator<IntoIter = I>) -> Result<Self> {
        Ok(Chunks { encoder: Encoder::new(header)?, items: items.into_iter(), over: false })
    }

    /// What has been made, once all items have been taken.
    pub fn summary(&self) -> Option<&Summary> {
        self.encoder.summary.as_ref()
    }
}

impl<I: Iterator<Item = Result<Item>>> Iterator for Chunks<I> {
    type Item = Result<Bytes>;

    fn next(&mut self) -> Option<Result<Bytes>> {
        while !self.over {
            if let Some(chunk) = self.encoder.next_chunk() {
                return Some(Ok(chunk));
            }
            if self.encoder.summary.is_some() {
                break;
            }
            match self.items.next() {
                None => _ = self.encoder.finish(),
                Some(item) => {
                    if let Err(e) = item.and_then(|item| self.encoder.push(&item)) {
                        self.over = true;
                        return Some(Err(e));
                    }
                }
            }
        }
        None
    }
}

/// Writes a whole snapshot. `path` is named in errors. Neither flushes nor syncs the writer.
///
/// # Errors
/// The items' own, the encoder's, and `Error::Io`. What has been written is no snapshot then.
pub fn write(header: &Header, items: impl IntoIterator<Item = Result<Item>>, mut writer: impl Write, path: &Path) -> Result<Summary> {
    let mut chunks = Chunks::new(header, items)?;
    for chunk in &mut chunks {
        writer.write_all(&chunk?).map_err(|e| Error::io("write the snapshot", path, e))?;
    }
    Ok(chunks.encoder.finish())
}

/// Reads a snapshot. See the module's head for what it promises.
pub struct Decoder<R> {
    frames: Frames<R>,
    header: Header,
    tally: Tally,
    /// What is left of the current items frame, and where in the stream the frame's payload ends.
    frame: Bytes,
    frame_end: u64,
    /// The current frame is larger than several items may be together.
    single: bool,
    state: State,
}

enum State {
    Items,
    Done(Summary),
    Failed(Error),
}

impl<R: Read> Decoder<R> {
    /// Reads the header. `path` is named in errors. The decoder reads frame by frame: give it a buffered reader.
    ///
    /// # Errors
    /// `Error::Format` if it is not a snapshot, or one of a newer format; `Error::Corrupt` or `Error::Io`.
    pub fn new(source: R, path: &Path) -> Result<Self> {
        let mut frames = Frames { source, path: path.to_owned(), offset: 0, sequence: 0, sha: Sha256::new() };
        let mut magic = [0; MAGIC.len()];
        frames.fill(&mut magic)?;
        if magic != MAGIC {
            return Err(Error::Format { path: frames.path, what: "this is not a snapshot".into() });
        }
        let (found, mut payload) = frames.next()?;
        if found != kind::HEADER {
            return Err(frames.corrupt(MAGIC.len() as u64, "the first frame is not a header"));
        }
        match payload.try_get_u32_le() {
            Ok(FORMAT) => {}
            Ok(other) => {
                return Err(Error::Format { path: frames.path, what: format!("snapshot format {other}; this release reads {FORMAT}") });
            }
            Err(_) => return Err(frames.corrupt(MAGIC.len() as u64, "the header is too short")),
        }
        let header = Header::decode(payload).map_err(|what| frames.corrupt(MAGIC.len() as u64, what))?;
        let tally = Tally { revision: header.revision, ..Tally::default() };
        Ok(Decoder { frames, header, tally, frame: Bytes::new(), frame_end: 0, single: false, state: State::Items })
    }

    /// What the snapshot says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next item; `None` when the snapshot has ended and all of it is sound.
    ///
    /// # Errors
    /// `Error::Corrupt` with the byte where the damage was noticed, or `Error::Io`; the same again if called again.
    pub fn next_item(&mut self) -> Result<Option<Item>> {
        match &self.state {
            State::Items => {}
            State::Done(_) => return Ok(None),
            State::Failed(e) => return Err(e.clone()),
        }
        self.advance().inspect_err(|e| self.state = State::Failed(e.clone()))
    }

    /// What has been read, once [`next_item`](Decoder::next_item) has said `None`.
    pub fn summary(&self) -> Option<&Summary> {
        match &self.state {
            State::Done(summary) => Some(summary),
            _ => None,
        }
    }

    fn advance(&mut self) -> Result<Option<Item>> {
        if self.frame.is_empty() {
            let at = self.frames.offset;
            let (found, payload) = self.frames.next()?;
            match found {
                kind::ITEMS => {
                    self.single = payload.len() > FRAME_MAX;
                    self.frame = payload;
                    self.frame_end = self.frames.offset;
                }
                kind::END => {
                    let summary = self.end(at, payload)?;
                    self.state = State::Done(summary);
                    return Ok(None);
                }
                _ => return Err(self.frames.corrupt(at, format!("a frame of kind {found} among the items"))),
            }
        }
        let at = self.frame_end - self.frame.len() as u64;
        let item = parse_item(&mut self.frame).ok_or_else(|| self.frames.corrupt(at, "an item that does not fit its frame"))?;
        if self.single && !self.frame.is_empty() {
            return Err(self.frames.corrupt(at, "several items in a frame of more than 64 KiB"));
        }
        self.tally.take(&item).map_err(|what| self.frames.corrupt(at, what))?;
        Ok(Some(item))
    }

    /// Checks the end frame and all that must follow it.
    fn end(&mut self, at: u64, mut end: Bytes) -> Result<Summary> {
        let tally = &self.tally;
        let counted = [tally.metas, tally.records, tally.content_bytes];
        let stated = counted.map(|_| end.try_get_u64_le().unwrap_or_default()); // its length has been checked
        if stated != counted {
            return Err(self.frames.corrupt(at, format!("the end counts metas, records and bytes as {stated:?}, there were {counted:?}")));
        }
        let at = self.frames.offset;
        let (found, zeros) = self.frames.next()?;
        if found != kind::PADDING || !self.frames.offset.is_multiple_of(BLOCK) || zeros.iter().any(|byte| *byte != 0) {
            return Err(self.frames.corrupt(at, "the end is not followed by the right padding"));
        }
        let at = self.frames.offset;
        let sha256: [u8; SHA_LEN] = self.frames.sha.clone().finalize().into();
        let mut stored = [0; SHA_LEN];
        self.frames.fill(&mut stored)?;
        if stored != sha256 {
            return Err(self.frames.corrupt(at, "the sha256 of the whole is wrong"));
        }
        if !self.frames.read_up_to(1)?.is_empty() {
            return Err(self.frames.corrupt(at + SHA_LEN as u64, "something follows the end"));
        }
        Ok(tally.summary(&self.header, at + SHA_LEN as u64, sha256))
    }
}

/// Reads a snapshot file from end to end and says what it holds.
///
/// # Errors
/// Those of [`Decoder::new`] and [`Decoder::next_item`].
pub fn verify(path: &Path) -> Result<Summary> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut decoder = Decoder::new(std::io::BufReader::with_capacity(FRAME_MAX, file), path)?;
    while decoder.next_item()?.is_some() {}
    match decoder.state {
        State::Done(summary) => Ok(summary),
        State::Failed(e) => Err(e),
        State::Items => Err(decoder.frames.corrupt(decoder.frames.offset, "the snapshot has no end")),
    }
}

/// The layer of frames below the items: lengths, kinds, checksums, sequence.
struct Frames<R> {
    source: R,
    path: PathBuf,
    /// Bytes read so far.
    offset: u64,
    sequence: u64,
    /// Over all that has been read.
    sha: Sha256,
}

impl<R: Read> Frames<R> {
    fn next(&mut self) -> Result<(u8, Bytes)> {
        let at = self.offset;
        let mut head = [0; FRAME_HEAD];
        self.fill(&mut head)?;
        let mut fields = &head[..];
        let (len, kind, sequence) = (fields.get_u32_le() as usize, fields.get_u8(), fields.get_u64_le());
        // Before the checksum can be looked at: a length that no such frame has must not be believed.
        let possible = match kind {
            kind::HEADER => (HEADER_FIXED..=HEADER_FIXED + VERSION_MAX).contains(&len),
            kind::ITEMS => (META_HEAD..=RECORD_HEAD + ITEM_MAX).contains(&len),
            kind::END => len == END_LEN,
            kind::PADDING => len < BLOCK as usize,
            _ => return Err(self.corrupt(at, format!("a frame of unknown kind {kind}"))),
        };
        if !possible {
            return Err(self.corrupt(at, format!("a frame of kind {kind} with {len} bytes")));
        }
        let payload = self.read_up_to(len)?;
        if payload.len() < len {
            return Err(self.corrupt(self.offset, "the snapshot is cut off"));
        }
        if head != frame_head(kind, sequence, &payload) {
            return Err(self.corrupt(at, "a frame fails its checksum"));
        }
        if sequence != self.sequence {
            return Err(self.corrupt(at, format!("frame {sequence} where frame {} belongs", self.sequence)));
        }
        self.sequence += 1;
        Ok((kind, payload.into()))
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        let found = self.read_up_to(buffer.len())?;
        if found.len() < buffer.len() {
            return Err(self.corrupt(self.offset, "the snapshot is cut off"));
        }
        buffer.copy_from_slice(&found);
        Ok(())
    }

    /// Reads `len` bytes, or what is there. The buffer grows with what arrives, not with what `len` promises.
    fn read_up_to(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut found = Vec::with_capacity(len.min(FRAME_MAX));
        (&mut self.source).take(len as u64).read_to_end(&mut found).map_err(|e| Error::io("read", &self.path, e))?;
        self.sha.update(&found);
        self.offset += found.len() as u64;
        Ok(found)
    }

    fn corrupt(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::Corrupt { path: self.path.clone(), offset: Some(offset), what: what.into() }
    }
}

fn frame_head(kind: u8, sequence: u64, payload: &[u8]) -> [u8; FRAME_HEAD] {
    let mut head = [0; FRAME_HEAD];
    let (fields, mut crc) = head.split_at_mut(FRAME_HEAD - 4);
    let mut put = &mut *fields;
    put.put_u32_le(payload.len() as u32); // at most ITEM_MAX and a few
    put.put_u8(kind);
    put.put_u64_le(sequence);
    crc.put_u32_le(crc32c::crc32c_append(crc32c::crc32c(fields), payload));
    head
}

/// Takes one item from the front of a frame; `None` if there is no whole one.
fn parse_item(frame: &mut Bytes) -> Option<Item> {
    let split = |len: usize, frame: &mut Bytes| (len <= frame.len()).then(|| frame.split_to(len));
    match frame.try_get_u8().ok()? {
        tag::META => {
            let (key, value) = (frame.try_get_u32_le().ok()? as usize, frame.try_get_u32_le().ok()? as usize);
            // Copied, because metas tend to be kept and would each keep their frame.
            let (key, value) = (split(key, frame)?, split(value, frame)?);
            Some(Item::Meta { key: Bytes::copy_from_slice(&key), value: Bytes::copy_from_slice(&value) })
        }
        tag @ (tag::RECORD | tag::TOMBSTONE) => {
            let (main, sub) = (frame.try_get_i64_le().ok()?, frame.try_get_u32_le().ok()?);
            let len = frame.try_get_u32_le().ok()? as usize;
            Some(Item::Record { main, sub, tombstone: tag == tag::TOMBSTONE, bytes: split(len, frame)? })
        }
        _ => None,
    }
}

/// Zero bytes from `size` to the next multiple of the block.
fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK) - size) as usize
}

fn refused(what: String) -> Error {
    Error::Failed(format!("a snapshot cannot be made: {what}"))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            cluster_id: 0x0102_0304_0506_0708,
            member_id: 0x1112_1314_1516_1718,
            revision: 9,
            compact_revision: 3,
            applied: LogPosition { term: 4, node: 1, index: 77 },
            created_unix_s: 1_700_000_000,
            version: "0.1.0".into(),
        }
    }

    fn meta(key: &'static str, value: &'static str) -> Item {
        Item::Meta { key: Bytes::from_static(key.as_bytes()), value: Bytes::from_static(value.as_bytes()) }
    }

    fn record(main: i64, sub: u32, bytes: impl Into<Bytes>) -> Item {
        Item::Record { main, sub, tombstone: sub == 1, bytes: bytes.into() }
    }

    fn sample() -> Vec<Item> {
        vec![
            meta("", ""),
            meta("alarm", "nospace"),
            meta("lease/7", "ten seconds"),
            record(2, 0, "the first"),
            record(2, 1, "gone"),
            record(5, 0, ""),
            record(9, 0, vec![0xab; 300]),
        ]
    }

    /// The stream of `items` with frames of `frame_max`, so that a small sample has many frames.
    fn stream_with(header: &Header, items: &[Item], frame_max: usize) -> Vec<u8> {
        let mut encoder = Encoder::with_frame_max(header, frame_max).unwrap();
        let mut out = vec![];
        for item in items {
            encoder.push(item).unwrap();
            out.extend(std::iter::from_fn(|| encoder.next_chunk()).flatten());
        }
        let summary = encoder.finish();
        assert_eq!(encoder.finish(), summary);
        out.extend(std::iter::from_fn(|| encoder.next_chunk()).flatten());
        assert_eq!(summary.size, out.len() as u64);
        out
    }

    fn stream() -> Vec<u8> {
        stream_with(&header(), &sample(), 40)
    }

    fn read_all(bytes: &[u8]) -> Result<(Vec<Item>, Summary)> {
        let mut decoder = Decoder::new(bytes, Path::new("backup"))?;
        let mut items = vec![];
        loop {
            match decoder.next_item() {
                Ok(Some(item)) => items.push(item),
                Ok(None) => {
                    assert_eq!(decoder.next_item().unwrap(), None);
                    return Ok((items, decoder.summary().cloned().unwrap()));
                }
                Err(e) => {
                    assert_eq!(decoder.next_item().unwrap_err().to_string(), e.to_string(), "an error stays");
                    assert!(decoder.summary().is_none());
                    return Err(e);
                }
            }
        }
    }

    /// The error of a stream that must not be taken: always one that names the file.
    fn error(bytes: &[u8]) -> String {
        match read_all(bytes).unwrap_err() {
            Error::Corrupt { path, offset: Some(offset), what } => {
                assert_eq!(path, Path::new("backup"));
                assert!(offset <= bytes.len() as u64, "{what} at {offset} of {}", bytes.len());
                format!("{offset}: {what}")
            }
            Error::Format { path, what } => {
                assert_eq!(path, Path::new("backup"));
                what
            }
            other => panic!("{other:?}"),
        }
    }

    /// Where the frames are.
    fn frames(bytes: &[u8]) -> Vec<Range<usize>> {
        let (mut at, mut all) = (MAGIC.len(), vec![]);
        while at < bytes.len() - SHA_LEN {
            let len = FRAME_HEAD + (&bytes[at..]).get_u32_le() as usize;
            all.push(at..at + len);
            at += len;
        }
        all
    }

    /// A frame's kind and payload.
    type Part = (u8, Vec<u8>);

    /// A stream of these frames with everything made right that can be: checksums, sequence, sha256.
    fn forge(frames: &[Part]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for (sequence, (kind, payload)) in (0..).zip(frames) {
            out.extend(frame_head(*kind, sequence, payload));
            out.extend(payload);
        }
        out.extend(<[u8; SHA_LEN]>::from(Sha256::digest(&out)));
        out
    }

    /// The frames of a stream, to be changed and forged again.
    fn parts(bytes: &[u8]) -> Vec<Part> {
        frames(bytes).into_iter().map(|at| (bytes[at.start + 4], bytes[at.start + FRAME_HEAD..at.end].to_vec())).collect()
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = stream();
        assert!(frames(&bytes).len() > 7, "the sample has many frames");
        assert_eq!(bytes.len() % 512, 32, "as etcdctl wants it");
        let (items, summary) = read_all(&bytes).unwrap();
        assert_eq!(items, sample());
        assert_eq!(summary.header, header());
        assert_eq!((summary.metas, summary.records), (3, 4));
        assert_eq!(summary.content_bytes, 5 + 7 + 7 + 11 + 9 + 4 + 300);
        assert_eq!(summary.sha256, bytes[bytes.len() - 32..]);
        assert_eq!(summary.sha256, <[u8; 32]>::from(Sha256::digest(&bytes[..bytes.len() - 32])));
        assert_eq!(forge(&parts(&bytes)), bytes, "the tests below change only what they say");
        let (items, summary) = read_all(&stream_with(&Header::default(), &[], FRAME_MAX)).unwrap();
        assert_eq!((items, summary.records, summary.header), (vec![], 0, Header::default()));
    }

    /// The format is frozen: the file holds a snapshot byte for byte, with comments.
    #[test]
    fn frozen_format() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts/snapshot/format_1.txt");
        let text = std::fs::read_to_string(path).unwrap();
        let mut frozen = vec![];
        for word in text.lines().flat_map(|line| line.split('#').next().unwrap_or("").split_whitespace()) {
            let (byte, times) = word.split_once('*').unwrap_or((word, "1"));
            let byte = u8::from_str_radix(byte, 16).expect(word);
            frozen.extend(std::iter::repeat_n(byte, times.parse().expect(word)));
        }
        let items = [meta("lease", "ten"), record(2, 0, "live"), record(2, 1, "dead")];
        assert_eq!(read_all(&frozen).unwrap().0, items);
        assert_eq!(stream_with(&header(), &items, FRAME_MAX), frozen);
    }

    #[test]
    fn every_flip_is_noticed() {
        let sound = stream();
        for at in 0..sound.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = sound.clone();
                bytes[at] ^= flip;
                error(&bytes);
            }
        }
    }

    #[test]
    fn every_cut_and_every_tail_is_noticed() {
        let sound = stream();
        for len in 0..sound.len() {
            assert_eq!(error(&sound[..len]), format!("{len}: the snapshot is cut off"));
        }
        for tail in [&b"\0"[..], &sound, &[0; 512]] {
            assert_eq!(error(&[&sound, tail].concat()), format!("{}: something follows the end", sound.len()));
        }
    }

    #[test]
    fn frames_missing_repeated_or_swapped_are_noticed() {
        let sound = stream();
        let frames = frames(&sound);
        for (place, frame) in frames.iter().enumerate() {
            let mut without = sound.clone();
            without.drain(frame.clone());
            error(&without);
            let twice = [&sound[..frame.end], &sound[frame.start..]].concat();
            error(&twice);
            if let Some(next) = frames.get(place + 1) {
                let swapped = [&sound[..frame.start], &sound[next.clone()], &sound[frame.clone()], &sound[next.end..]].concat();
                error(&swapped);
            }
        }
        let twice = [&sound[..frames[2].end], &sound[frames[2].start..]].concat();
        assert_eq!(error(&twice), format!("{}: frame 2 where frame 3 belongs", frames[2].end));
    }

    /// Streams whose checksums are right and whose content is not.
    #[test]
    fn forged_content_is_refused() {
        let sound = parts(&stream());
        let (last, end) = (sound.len() - 1, sound.len() - 2);
        let changed = |change: &dyn Fn(&mut Vec<Part>)| {
            let mut frames = sound.clone();
            change(&mut frames);
            error(&forge(&frames))
        };
        let ends_with = |text: String, what: &str| assert!(text.ends_with(what), "{text:?} instead of {what:?}");

        assert_eq!(changed(&|frames| frames[0].1[0] = 2), "snapshot format 2; this release reads 1");
        ends_with(changed(&|frames| frames[0].1[68] = 4), "the header has 5 bytes of version instead of 4");
        ends_with(changed(&|frames| frames[0].1[69] = 0xff), "the version is not UTF-8");
        ends_with(changed(&|frames| frames[0].1[27] = 0x80), "revision -9223372036854775799 compacted to 3");
        ends_with(changed(&|frames| frames[0].1[28] = 10), "revision 9 compacted to 10");
        ends_with(changed(&|frames| _ = frames.remove(0)), "the first frame is not a header");
        ends_with(changed(&|frames| frames.insert(1, sound[0].clone())), "a frame of kind 1 among the items");
        ends_with(changed(&|frames| frames[1].0 = 9), "a frame of unknown kind 9");
        ends_with(changed(&|frames| frames[1].1.clear()), "a frame of kind 2 with 0 bytes");
        ends_with(changed(&|frames| frames[1].1[0] = 9), "an item that does not fit its frame");
        ends_with(changed(&|frames| frames[1].1[1] = 200), "an item that does not fit its frame");
        ends_with(changed(&|frames| frames[1].1[4] = 0xff), "an item that does not fit its frame");
        ends_with(changed(&|frames| frames[1].1.push(1)), "an item that does not fit its frame");
        ends_with(changed(&|frames| frames.swap(1, 2)), r#"meta "" after "lease/7""#);
        ends_with(changed(&|frames| frames.swap(2, 3)), r#"meta "lease/7" after the first record"#);
        ends_with(changed(&|frames| _ = frames.remove(2)), "metas, records and bytes as [3, 4, 343], there were [2, 4, 325]");
        ends_with(changed(&|frames| frames[end].1[8] += 1), "metas, records and bytes as [3, 5, 343], there were [3, 4, 343]");
        ends_with(changed(&|frames| _ = frames[end].1.pop()), "a frame of kind 3 with 23 bytes");
        changed(&|frames| _ = frames.pop()); // the sha256 stands where a frame belongs; what it says there is chance
        ends_with(changed(&|frames| frames[last].1[3] = 1), "the end is not followed by the right padding");
        ends_with(changed(&|frames| _ = frames[last].1.pop()), "the end is not followed by the right padding");
        ends_with(changed(&|frames| frames[last].1.resize(512, 0)), "a frame of kind 4 with 512 bytes");

        let with = |item: fn() -> Vec<u8>| changed(&|frames| frames.insert(3, (kind::ITEMS, item())));
        fn raw(tag: u8, main: i64, len: u32) -> Vec<u8> {
            let mut out = vec![tag];
            out.put_i64_le(main);
            out.put_u32_le(0);
            out.put_u32_le(len);
            out.resize(RECORD_HEAD + len as usize, 0);
            out
        }
        ends_with(with(|| raw(2, 0, 0)), "record 0.0 in a snapshot of revision 9");
        ends_with(with(|| raw(2, 10, 0)), "record 10.0 in a snapshot of revision 9");
        ends_with(with(|| raw(2, 2, 0)), "record 2.0 after 2.0");
        ends_with(with(|| [raw(2, 1, 70_000), raw(2, 2, 0)].concat()), "several items in a frame of more than 64 KiB");
        ends_with(with(|| raw(2, 1, ITEM_MAX as u32 + 1)), "a frame of kind 2 with 16777234 bytes");
    }

    #[test]
    fn a_promised_length_is_not_believed() {
        let mut bytes = stream()[..MAGIC.len()].to_vec();
        bytes.extend(frame_head(kind::HEADER, 0, &header().encode()));
        bytes.extend(header().encode());
        let mut head = frame_head(kind::ITEMS, 1, b"");
        head[..4].copy_from_slice(&(ITEM_MAX as u32).to_le_bytes());
        bytes.extend(head);
        let mut frames = Frames { source: &bytes[..], path: "backup".into(), offset: 0, sequence: 0, sha: Sha256::new() };
        let found = frames.read_up_to(ITEM_MAX).unwrap();
        assert_eq!(found, bytes);
        assert!(found.capacity() <= 2 * FRAME_MAX, "{}", found.capacity());
        assert_eq!(error(&bytes), format!("{}: the snapshot is cut off", bytes.len()));
    }

    #[test]
    fn what_the_encoder_refuses_changes_nothing() {
        let refusal = |encoder: &mut Encoder, item: &Item| encoder.push(item).unwrap_err().to_string();
        let mut encoder = Encoder::new(&header()).unwrap();
        encoder.push(&meta("b", "")).unwrap();
        assert!(refusal(&mut encoder, &meta("b", "")).ends_with(r#"meta "b" after "b""#));
        let large = Item::Meta { key: Bytes::from_static(b"c"), value: vec![0; ITEM_MAX].into() };
        assert!(refusal(&mut encoder, &large).ends_with("an item of 16777217 bytes; 16777216 is the most"));
        encoder.push(&record(2, 0, "x")).unwrap();
        assert!(refusal(&mut encoder, &meta("c", "")).ends_with(r#"meta "c" after the first record"#));
        assert!(refusal(&mut encoder, &record(2, 0, "x")).ends_with("record 2.0 after 2.0"));
        assert!(refusal(&mut encoder, &record(10, 0, "x")).ends_with("record 10.0 in a snapshot of revision 9"));
        encoder.finish();
        assert!(refusal(&mut encoder, &record(3, 0, "x")).contains("after the end"));
        let bytes: Vec<u8> = std::iter::from_fn(|| encoder.next_chunk()).flatten().collect();
        assert_eq!(bytes, stream_with(&header(), &[meta("b", ""), record(2, 0, "x")], FRAME_MAX));

        assert!(Encoder::new(&Header { version: "x".repeat(65), ..header() }).is_err());
        assert!(Encoder::new(&Header { version: "x".repeat(64), ..header() }).is_ok());
        assert!(Encoder::new(&Header { revision: -1, ..header() }).is_err());
        assert!(Encoder::new(&Header { compact_revision: 10, ..header() }).is_err());
    }

    /// The largest item, those around the size of a frame, and that chunks are bounded and must be taken.
    #[test]
    fn large_items_and_bounded_chunks() {
        let sizes = [0, FRAME_MAX - RECORD_HEAD - 1, FRAME_MAX - RECORD_HEAD, FRAME_MAX - RECORD_HEAD + 1, FRAME_MAX, 3 * FRAME_MAX + 5, 1];
        let sizes = sizes.into_iter().chain([ITEM_MAX, 0, 7]);
        let items: Vec<Item> = (1..).zip(sizes).map(|(main, size)| record(main, 0, vec![main as u8; size])).collect();
        let header = Header { revision: 99, ..header() };
        let mut chunks = Chunks::new(&header, items.iter().cloned().map(Ok)).unwrap();
        assert!(chunks.summary().is_none());
        let made: Vec<Bytes> = (&mut chunks).collect::<Result<_>>().unwrap();
        let (last, full) = made.split_last().unwrap();
        assert!(full.iter().all(|chunk| chunk.len() == CHUNK) && (1..=CHUNK).contains(&last.len()));
        let (read, summary) = read_all(&made.concat()).unwrap();
        assert!(read == items);
        assert_eq!(chunks.summary(), Some(&summary));

        let mut encoder = Encoder::new(&header).unwrap();
        encoder.push(&record(1, 0, vec![0; 2 * CHUNK])).unwrap();
        assert!(encoder.push(&record(2, 0, "x")).unwrap_err().to_string().contains("before all chunks were taken"));
        assert_eq!(std::iter::from_fn(|| encoder.next_chunk()).count(), 2);
        encoder.push(&record(2, 0, "x")).unwrap();
    }

    #[test]
    fn a_producer_that_fails_ends_the_chunks() {
        let items = [Ok(meta("a", "b")), Err(Error::Stopped), Ok(meta("c", "d"))];
        let mut chunks = Chunks::new(&header(), items).unwrap();
        assert!(matches!(chunks.next(), Some(Err(Error::Stopped))));
        assert!(chunks.next().is_none() && chunks.summary().is_none());
    }

    #[test]
    fn files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backup");
        let mut file = File::create(&path).unwrap();
        let written = write(&header(), sample().into_iter().map(Ok), &mut file, &path).unwrap();
        assert_eq!(verify(&path).unwrap(), written);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), written.size);
        file.write_all(b"x").unwrap();
        let error = verify(&path).unwrap_err().to_string();
        assert_eq!(error, format!("{} is damaged at byte {}: something follows the end", path.display(), written.size));
        std::fs::write(&path, b"GIF89a, surely").unwrap();
        assert_eq!(verify(&path).unwrap_err().to_string(), format!("{}: this is not a snapshot", path.display()));
        assert!(matches!(verify(&folder.path().join("none")), Err(Error::Io { what: "open", .. })));
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        assert!(write(&header(), [], Full, &path).unwrap_err().is_disk_full());
    }

    /// A source that gives a few bytes at a time and is interrupted in between.
    struct Dribble<'a>(&'a [u8], usize);

    impl Read for Dribble<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(3) {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            let len = out.len().min(self.1 % 5 + 1);
            self.0.read(&mut out[..len])
        }
    }

    fn items() -> impl Strategy<Value = Vec<Item>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        let metas = prop::collection::btree_map(bytes(), bytes(), 0..10);
        let records = prop::collection::btree_map((1i64..50, 0u32..5), (any::<bool>(), bytes()), 0..40);
        (metas, records).prop_map(|(metas, records)| {
            let metas = metas.into_iter().map(|(key, value)| Item::Meta { key, value });
            let record = |((main, sub), (tombstone, bytes))| Item::Record { main, sub, tombstone, bytes };
            metas.chain(records.into_iter().map(record)).collect()
        })
    }

    proptest! {
        #[test]
        fn any_items_survive(items in items(), frame_max in 1usize..3000) {
            let header = Header { revision: 50, ..header() };
            let bytes = stream_with(&header, &items, frame_max);
            prop_assert_eq!(bytes.len() % 512, 32);
            let mut decoder = Decoder::new(Dribble(&bytes, 0), Path::new("backup")).unwrap();
            for item in &items {
                let read = decoder.next_item().unwrap();
                prop_assert_eq!(read.as_ref(), Some(item));
            }
            prop_assert_eq!(decoder.next_item().unwrap(), None);
        }

        #[test]
        fn foreign_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), valid_start in any::<bool>()) {
            let start = if valid_start { MAGIC.to_vec() } else { vec![] };
            error(&[start, bytes].concat());
        }

        /// Right checksums around anything: reaches what lies behind them.
        #[test]
        fn forged_frames_never_panic(
            payloads in prop::collection::vec((1u8..5, prop::collection::vec(0u8..6, 0..90)), 0..6),
            keep in 0usize..12,
        ) {
            let mut frames = parts(&stream());
            frames.truncate(keep);
            frames.extend(payloads);
            let _ = read_all(&forge(&frames));
        }

        #[test]
        fn any_damage_is_noticed(at in 0usize..10_000, damage in prop::collection::vec(any::<u8>(), 1..40)) {
            let sound = stream();
            let at = at % sound.len();
            let mut bytes = sound.clone();
            for (byte, damage) in bytes[at..].iter_mut().zip(damage) {
                *byte = damage;
            }
            prop_assume!(bytes != sound);
            error(&bytes);
        }
    }
}
