//! The stored values of the history, byte by byte: blocks, chunks, dead marks, meta values and the summary.
//!
//! # The seal
//! Every value ends in four bytes: the CRC-32C of *its own key* and of all bytes before the checksum. So a changed byte
//! is found, and so is a whole value that stands under another value's key. What a value adds to the [`digest_of`] the
//! set is a 64-bit hash of key and checksum; the wrapping sum over all values says whether one is missing, surplus or stale.
//!
//! # A block
//! All numbers big-endian.
//! ```text
//! format u8 = 1 | 0 u8 | count u16
//! count x { main i64 | sub u32 | flags (2 bits) and end (30 bits) u32 | crc u32 }      20 bytes each, revisions ascending
//! the records' bytes, one after the other
//! seal u32
//! ```
//! `end` is where the record's bytes end, counted from where the first one's begin; they start at the `end` before it. Bit
//! 31 says tombstone, bit 30 says that the bytes are not the record's but a [`Stub`]. `crc` covers revision, tombstone
//! flag and the record's own bytes (the whole of them, also behind a stub), and travels with the record from block to block.
//!
//! So 2/0 = `ab` and 3/0 = a tombstone `c` are stored under `01 0000000000000002 00000000` as
//! ```text
//! 01 00 0002
//! 0000000000000002 00000000 00000002 crc
//! 0000000000000003 00000000 80000003 crc
//! 6162 63
//! seal
//! ```
//!
//! # Caveats
//! - A record is handed out as a slice of its block, and keeps the whole block (16 KiB) in memory for as long as it lives.
//! - The seal is checked when a block comes from the backend, not at each look at a cached one.

use bytes::Bytes;

use crate::storage::keys::Key;
use crate::storage::{Record, Revision, VALUE_BYTES_MAX};

/// Records in a block, at most: beyond it a new block is begun. With 16, 32 and 64 of 300 bytes each a `write_out` to sled took
/// 1.7, 1.4 and 1.2 us a record, and a random `get` from 300 MB beside a cache of 64 MB took 70, 105 and 150 us.
pub(super) const BLOCK_RECORDS: usize = 32;

/// Bytes of a block as it is stored, at most: beyond it a new block is begun, and a record that fits in no block goes to chunks.
pub(super) const BLOCK_BYTES: usize = VALUE_BYTES_MAX;

/// Records in a block that a reader accepts, whatever the writer's [`BLOCK_RECORDS`]: as many as [`Bits`] has bits.
const BLOCK_RECORDS_READ: usize = Bits::BITS as usize;

/// One bit per record of a block, the first record's the lowest: set when the record is dead.
pub(super) type Bits = u64;

const _: () = assert!(BLOCK_RECORDS <= BLOCK_RECORDS_READ);

/// The format of all values here. A reader refuses a higher one.
const FORMAT: u8 = 1;
const HEAD: usize = 4;
/// Bytes that a record takes in a block's table.
pub(super) const ENTRY: usize = 20;
const SEAL: usize = 4;
/// Bytes of a block beside its items.
const FRAME: usize = HEAD + SEAL;

/// What the items of a block may cost together.
pub(super) const ITEMS_BYTES: usize = BLOCK_BYTES - FRAME;

/// Largest record that stands in a block itself.
pub(super) const INLINE_BYTES_MAX: usize = ITEMS_BYTES - ENTRY;

/// Bytes of a large record in each of its chunks; the last chunk has what is left.
pub(super) const CHUNK_BYTES: usize = VALUE_BYTES_MAX - SEAL;

const TOMBSTONE: u32 = 1 << 31;
const LARGE: u32 = 1 << 30;
const END: u32 = LARGE - 1;

/// Puts the seal at the end of a value. Returns the value and its checksum.
pub(super) fn seal(key: &[u8], mut body: Vec<u8>) -> (Bytes, u32) {
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), &body);
    body.extend_from_slice(&crc.to_be_bytes());
    (Bytes::from(body), crc)
}

/// The value without its seal, and the checksum; `None` when the seal does not fit the key and the bytes.
pub(super) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Option<(&'a [u8], u32)> {
    let (body, crc) = value.split_last_chunk::<SEAL>()?;
    let crc = u32::from_be_bytes(*crc);
    (crc32c::crc32c_append(crc32c::crc32c(key), body) == crc).then_some((body, crc))
}

/// What one stored value adds to the set's digest. Frozen: it is recomputed at every start.
///
/// A sum of hashes, so that it can be kept up to date by adding and subtracting, whatever the order.
pub(super) fn digest_of(key: &[u8], crc: u32) -> u64 {
    let mut hash = mix(0x7175_6f72_6174_6531 ^ key.len() as u64);
    for part in key.chunks(8) {
        let mut word = [0; 8];
        word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        hash = mix(hash ^ u64::from_be_bytes(word));
    }
    mix(hash ^ u64::from(crc))
}

/// A bijection of 64 bits in which each bit of the input moves about half the bits of the output (splitmix64's finalizer).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The checksum that a record keeps for life.
pub(super) fn record_crc(rev: Revision, tombstone: bool, bytes: &[u8]) -> u32 {
    let mut head = [0; 13];
    head[..8].copy_from_slice(&rev.main.to_be_bytes());
    head[8..12].copy_from_slice(&rev.sub.to_be_bytes());
    head[12] = u8::from(tombstone);
    crc32c::crc32c_append(crc32c::crc32c(&head), bytes)
}

/// What stands in a block in the place of a record that is too large for it: `length u32 | digest u64`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stub {
    /// Bytes of the record.
    pub length: u32,
    /// What its chunks add to the set's digest.
    pub digest: u64,
}

impl Stub {
    /// How many chunks the record has.
    pub fn chunks(&self) -> u32 {
        self.length.div_ceil(CHUNK_BYTES as u32)
    }

    fn encode(self) -> Bytes {
        let mut bytes = Vec::with_capacity(12);
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes.extend_from_slice(&self.digest.to_be_bytes());
        Bytes::from(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Stub> {
        let (length, rest) = bytes.split_first_chunk()?;
        let digest = u64::from_be_bytes(rest.try_into().ok()?);
        Some(Stub { length: u32::from_be_bytes(*length), digest })
    }
}

/// A record on its way into a block, or from one block into another.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub rev: Revision,
    pub tombstone: bool,
    /// What goes into the block: the record's bytes, or the encoded stub.
    pub stored: Bytes,
    pub stub: Option<Stub>,
    pub crc: u32,
}

impl Item {
    /// An item for a new record, and the chunks (key and value) of one that is too large for a block.
    pub fn new(rev: Revision, record: &Record) -> (Item, Vec<(Vec<u8>, Bytes)>) {
        let crc = record_crc(rev, record.tombstone, &record.bytes);
        let tombstone = record.tombstone;
        if record.bytes.len() <= INLINE_BYTES_MAX {
            return (Item { rev, tombstone, stored: record.bytes.clone(), stub: None, crc }, Vec::new());
        }
        let length = u32::try_from(record.bytes.len()).expect("append() takes no record beyond RECORD_BYTES_MAX");
        let mut stub = Stub { length, digest: 0 };
        let chunks = (0u32..).zip(record.bytes.chunks(CHUNK_BYTES)).map(|(number, part)| {
            let key = Key::Chunk(rev, number).encode();
            let mut body = Vec::with_capacity(part.len() + SEAL);
            body.extend_from_slice(part);
            let (value, crc) = seal(&key, body);
            stub.digest = stub.digest.wrapping_add(digest_of(&key, crc));
            (key, value)
        });
        let chunks = chunks.collect();
        (Item { rev, tombstone, stored: stub.encode(), stub: Some(stub), crc }, chunks)
    }

    /// Bytes of the record itself, wherever they are.
    pub fn length(&self) -> u64 {
        self.stub.map_or(self.stored.len() as u64, |stub| u64::from(stub.length))
    }

    /// Bytes that the item takes in a block.
    pub fn cost(&self) -> usize {
        ENTRY + self.stored.len()
    }
}

/// Cuts items into blocks, each as full as it gets: the numbers of items of the blocks, in order.
pub(super) fn pack(items: &[Item]) -> Vec<usize> {
    let mut counts = Vec::new();
    let (mut count, mut cost) = (0, 0);
    for item in items {
        if count == BLOCK_RECORDS || (count > 0 && cost + item.cost() > ITEMS_BYTES) {
            counts.push(count);
            (count, cost) = (0, 0);
        }
        count += 1;
        cost += item.cost();
    }
    if count > 0 {
        counts.push(count);
    }
    counts
}

/// A block whose seal and structure were found good; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Block {
    bytes: Bytes,
}

/// One line of a block's table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub rev: Revision,
    pub tombstone: bool,
    large: bool,
    end: usize,
    pub crc: u32,
}

/// What a block holds of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Held {
    /// All of it.
    Whole(Record),
    /// Where to look for its bytes.
    Large { tombstone: bool, stub: Stub },
}

impl Block {
    /// A block of 1 to [`BLOCK_RECORDS`] items, stored under the first one's revision. Returns its checksum too.
    pub fn build(items: &[Item]) -> (Block, u32) {
        let first = items.first().map(|item| item.rev).unwrap_or_default();
        assert!(!items.is_empty() && items.len() <= BLOCK_RECORDS_READ, "a block of {} records", items.len());
        let mut body = Vec::with_capacity(FRAME + items.iter().map(Item::cost).sum::<usize>());
        body.extend_from_slice(&[FORMAT, 0]);
        body.extend_from_slice(&(items.len() as u16).to_be_bytes());
        let mut end = 0;
        for item in items {
            end += item.stored.len() as u32;
            let flags = if item.tombstone { TOMBSTONE } else { 0 } | if item.stub.is_some() { LARGE } else { 0 };
            body.extend_from_slice(&item.rev.main.to_be_bytes());
            body.extend_from_slice(&item.rev.sub.to_be_bytes());
            body.extend_from_slice(&(end | flags).to_be_bytes());
            body.extend_from_slice(&item.crc.to_be_bytes());
        }
        items.iter().for_each(|item| body.extend_from_slice(&item.stored));
        let (bytes, crc) = seal(&Key::Block(first).encode(), body);
        (Block { bytes }, crc)
    }

    /// Reads a block that was stored under the revision `first`. Returns its checksum too, or what is wrong with it.
    pub fn read(first: Revision, bytes: Bytes) -> Result<(Block, u32), &'static str> {
        let (body, crc) = unseal(&Key::Block(first).encode(), &bytes).ok_or("its checksum does not fit")?;
        let (&[format, _, high, low], rest) = body.split_first_chunk::<HEAD>().ok_or("it is too short")?;
        if format != FORMAT {
            return Err("its format is unknown");
        }
        let count = usize::from(u16::from_be_bytes([high, low]));
        if count == 0 || count > BLOCK_RECORDS_READ || rest.len() < count * ENTRY {
            return Err("its count of records cannot be");
        }
        let payload = rest.len() - count * ENTRY;
        let block = Block { bytes };
        let (mut before, mut start) = (None, 0);
        for entry in block.entries() {
            if before.map_or(entry.rev != first, |before| before >= entry.rev) || entry.rev.main < 0 {
                return Err("its revisions do not ascend from its key's");
            }
            if entry.end < start || entry.end > payload {
                return Err("its table of lengths cannot be");
            }
            if entry.large && block.bytes.get(block.at(start)..block.at(entry.end)).and_then(Stub::decode).is_none() {
                return Err("its reference to a large record cannot be");
            }
            (before, start) = (Some(entry.rev), entry.end);
        }
        if start != payload {
            return Err("its table of lengths does not add up");
        }
        Ok((block, crc))
    }

    /// How many records there are, dead ones included.
    pub fn count(&self) -> usize {
        usize::from(u16::from_be_bytes(self.array(2)))
    }

    /// Bytes as stored.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The block as it is stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The table, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.count()).map(|index| self.entry(index))
    }

    /// The place of a revision in the table.
    pub fn find(&self, rev: Revision) -> Option<usize> {
        let (mut low, mut high) = (0, self.count());
        // Mostly each revision has one record and none has been collected: then the place is known, and one look is enough.
        let guess = usize::try_from(rev.main.saturating_sub(self.rev(0).main)).unwrap_or(high);
        if guess < high && self.rev(guess) == rev {
            return Some(guess);
        }
        while low < high {
            let middle = low.midpoint(high);
            match self.rev(middle).cmp(&rev) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// The line at a place below [`count`](Self::count).
    pub fn entry(&self, index: usize) -> Entry {
        let at = HEAD + index * ENTRY;
        let word = u32::from_be_bytes(self.array(at + 12));
        Entry {
            rev: self.rev(index),
            tombstone: word & TOMBSTONE != 0,
            large: word & LARGE != 0,
            end: (word & END) as usize,
            crc: u32::from_be_bytes(self.array(at + 16)),
        }
    }

    /// The record at a place below [`count`](Self::count), sharing the block's memory.
    pub fn held(&self, index: usize) -> Held {
        let entry = self.entry(index);
        let bytes = self.stored(index, &entry);
        match self.stub(&entry, &bytes) {
            None => Held::Whole(Record { bytes, tombstone: entry.tombstone }),
            Some(stub) => Held::Large { tombstone: entry.tombstone, stub },
        }
    }

    /// The record at a place below [`count`](Self::count), to be written into another block.
    pub fn item(&self, index: usize) -> Item {
        let entry = self.entry(index);
        let stored = self.stored(index, &entry);
        Item { rev: entry.rev, tombstone: entry.tombstone, stub: self.stub(&entry, &stored), stored, crc: entry.crc }
    }

    fn stored(&self, index: usize, entry: &Entry) -> Bytes {
        let start = if index == 0 { 0 } else { self.entry(index - 1).end };
        self.bytes.slice(self.at(start)..self.at(entry.end))
    }

    fn stub(&self, entry: &Entry, stored: &[u8]) -> Option<Stub> {
        entry.large.then(|| Stub::decode(stored).expect("Block::read decoded every stub"))
    }

    fn rev(&self, index: usize) -> Revision {
        let at = HEAD + index * ENTRY;
        Revision { main: i64::from_be_bytes(self.array(at)), sub: u32::from_be_bytes(self.array(at + 8)) }
    }

    /// Where in the block a position among the payloads is.
    fn at(&self, position: usize) -> usize {
        HEAD + self.count() * ENTRY + position
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        *self.bytes.get(at..).and_then(|rest| rest.first_chunk()).expect("Block::read checked that the table is whole")
    }
}

/// The value of a dead mark: `format u8 | bits u64`. Returns its checksum too.
pub(super) fn encode_dead(first: Revision, dead: Bits) -> (Vec<u8>, Bytes, u32) {
    let key = Key::Dead(first).encode();
    let mut body = Vec::with_capacity(9 + SEAL);
    body.push(FORMAT);
    body.extend_from_slice(&dead.to_be_bytes());
    let (value, crc) = seal(&key, body);
    (key, value, crc)
}

/// What a block's dead mark adds to the set's digest: nothing when no record is dead, for then there is no mark.
pub(super) fn dead_digest(first: Revision, dead: Bits) -> u64 {
    if dead == 0 {
        return 0;
    }
    let (key, _, crc) = encode_dead(first, dead);
    digest_of(&key, crc)
}

/// The bits of a dead mark without its seal.
pub(super) fn decode_dead(body: &[u8]) -> Option<Bits> {
    let (&format, bits) = body.split_first()?;
    (format == FORMAT).then_some(Bits::from_be_bytes(bits.try_into().ok()?))
}

/// How much is stored, as the summary says it and as a start counts it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Totals {
    pub blocks: u64,
    /// Live records in the blocks.
    pub records: u64,
    /// Dead records in the blocks.
    pub dead: u64,
    pub chunks: u64,
    pub metas: u64,
    /// See [`HistoryStats::live_bytes`](super::HistoryStats::live_bytes).
    pub live_bytes: u64,
    /// The wrapping sum of [`digest_of`] over every value but the summary itself.
    pub digest: u64,
}

impl Totals {
    /// The first thing in which what was found differs from what was recorded, in words.
    pub fn difference(found: &Totals, recorded: &Totals) -> Option<String> {
        let rows = [
            ("blocks", found.blocks, recorded.blocks),
            ("chunks of large records", found.chunks, recorded.chunks),
            ("live records", found.records, recorded.records),
            ("dead records", found.dead, recorded.dead),
            ("meta values", found.metas, recorded.metas),
            ("live bytes", found.live_bytes, recorded.live_bytes),
        ];
        if let Some((name, found, recorded)) = rows.into_iter().find(|(_, found, recorded)| found != recorded) {
            return Some(format!("{found} {name} are there, but {recorded} were written"));
        }
        (found.digest != recorded.digest).then(|| {
            format!(
                "as many values as were written are there, but not the same ones (digest {:016x}, not {:016x})",
                found.digest, recorded.digest
            )
        })
    }
}

/// The history's own record of how much there must be, written with every batch:
/// `format u8 | sequence u64 | blocks, records, dead, chunks, metas, live bytes, digest u64 | applied, to the end`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Summary {
    /// Number of the batch that wrote it: 1, 2, 3, ...
    pub sequence: u64,
    pub totals: Totals,
    /// What the last [`commit`](super::History::commit) in the batch was given.
    pub applied: Bytes,
}

impl Summary {
    /// The value to store under [`Key::Summary`].
    pub fn encode(&self) -> Bytes {
        let t = &self.totals;
        let mut body = Vec::with_capacity(65 + self.applied.len() + SEAL);
        body.push(FORMAT);
        for number in [self.sequence, t.blocks, t.records, t.dead, t.chunks, t.metas, t.live_bytes, t.digest] {
            body.extend_from_slice(&number.to_be_bytes());
        }
        body.extend_from_slice(&self.applied);
        seal(&Key::Summary.encode(), body).0
    }

    /// Reads a stored summary; `None` when it is damaged or of an unknown format.
    pub fn decode(value: &[u8]) -> Option<Summary> {
        let (body, _) = unseal(&Key::Summary.encode(), value)?;
        let (&format, mut rest) = body.split_first()?;
        let mut numbers = [0; 8];
        for number in &mut numbers {
            let (head, tail) = rest.split_first_chunk()?;
            (*number, rest) = (u64::from_be_bytes(*head), tail);
        }
        let [sequence, blocks, records, dead, chunks, metas, live_bytes, digest] = numbers;
        let totals = Totals { blocks, records, dead, chunks, metas, live_bytes, digest };
        (format == FORMAT).then(|| Summary { sequence, totals, applied: Bytes::copy_from_slice(rest) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(main: i64, bytes: &'static [u8], tombstone: bool) -> Item {
        Item::new(Revision { main, sub: 0 }, &Record { bytes: Bytes::from_static(bytes), tombstone }).0
    }

    #[test]
    fn a_block_is_laid_out_as_the_module_head_says() {
        let (block, _) = Block::build(&[item(2, b"ab", false), item(3, b"c", true)]);
        let hex: String = block.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let masked = format!("{}[crc]{}[crc]{}[seal]", &hex[..40], &hex[48..80], &hex[88..94]);
        assert_eq!(masked, "0100000200000000000000020000000000000002[crc]00000000000000030000000080000003[crc]616263[seal]");
        assert_eq!(hex.len(), 102);
        let (again, _) = Block::read(Revision { main: 2, sub: 0 }, block.bytes().clone()).unwrap();
        assert_eq!(again.held(1), Held::Whole(Record { bytes: Bytes::from_static(b"c"), tombstone: true }));
        assert_eq!(again.find(Revision { main: 3, sub: 0 }), Some(1));
        assert_eq!(again.find(Revision { main: 3, sub: 1 }), None);
    }

    /// The digest and the checksums are on people's disks.
    #[test]
    fn digest_and_checksum_are_frozen() {
        assert_eq!(record_crc(Revision { main: 7, sub: 1 }, false, b"value"), 0xefd5_c8ee);
        assert_eq!(digest_of(&Key::Block(Revision { main: 7, sub: 1 }).encode(), 0x1234_5678), 0xd41c_59d0_3814_bc0a);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let first = Revision { main: 2, sub: 0 };
        let (block, _) = Block::build(&[item(2, b"ab", false), item(3, b"c", true)]);
        for at in 0..block.len() * 8 {
            let mut bytes = block.bytes().to_vec();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(Block::read(first, Bytes::from(bytes)).is_err(), "bit {at}");
        }
        for length in 0..block.len() {
            assert!(Block::read(first, block.bytes().slice(..length)).is_err(), "cut to {length}");
        }
        assert!(Block::read(Revision { main: 3, sub: 0 }, block.bytes().clone()).is_err(), "under another key");
    }

    /// Sealed as it should be, but nonsense inside: no panic, no record.
    #[test]
    fn nonsense_behind_a_good_seal_is_refused() {
        let first = Revision { main: 2, sub: 0 };
        let (block, _) = Block::build(&[item(2, b"ab", false), item(3, b"c", true)]);
        let body = &block.bytes()[..block.len() - SEAL];
        // A changed payload or record checksum is the record's own business; all before that is structure.
        for at in 0..body.len() - 3 {
            let is_record_crc = at >= HEAD && (at - HEAD) % ENTRY >= 16;
            for with in [0x00, 0x01, 0x40, 0x7f, 0x80, 0xff] {
                let mut body = body.to_vec();
                if body[at] == with || is_record_crc || at == 1 {
                    continue;
                }
                body[at] = with;
                let (bytes, _) = seal(&Key::Block(first).encode(), body);
                if let Ok((block, _)) = Block::read(first, bytes) {
                    (0..block.count()).for_each(|index| drop(block.held(index)));
                }
            }
        }
    }

    #[test]
    fn packing_keeps_both_limits() {
        let small: Vec<Item> = (1..).map(|main| item(main, b"x", false)).take(2 * BLOCK_RECORDS + 6).collect();
        assert_eq!(pack(&small), [BLOCK_RECORDS, BLOCK_RECORDS, 6]);
        let record = Record { bytes: Bytes::from(vec![0; INLINE_BYTES_MAX]), tombstone: false };
        let full: Vec<Item> = (1..=3).map(|main| Item::new(Revision { main, sub: 0 }, &record).0).collect();
        assert_eq!(pack(&full), [1, 1, 1]);
        assert_eq!(Block::build(&full[..1]).0.len(), BLOCK_BYTES);
    }

    #[test]
    fn a_large_record_becomes_chunks_that_fit_in_a_value() {
        let record = Record { bytes: Bytes::from(vec![7; CHUNK_BYTES * 2 + 1]), tombstone: false };
        let (item, chunks) = Item::new(Revision { main: 5, sub: 1 }, &record);
        assert_eq!(chunks.len(), 3);
        assert_eq!(item.stub.unwrap().chunks(), 3);
        assert!(chunks.iter().all(|(_, value)| value.len() <= VALUE_BYTES_MAX));
        assert_eq!(item.length(), record.bytes.len() as u64);
    }

    #[test]
    fn summary_and_dead_marks_come_back() {
        let totals = Totals { blocks: 1, records: 2, dead: 3, chunks: 4, metas: 5, live_bytes: 6, digest: u64::MAX };
        let summary = Summary { sequence: 9, totals, applied: Bytes::from_static(b"log id") };
        assert_eq!(Summary::decode(&summary.encode()), Some(summary));
        let (key, value, _) = encode_dead(Revision { main: 2, sub: 0 }, 0b101);
        assert_eq!(unseal(&key, &value).and_then(|(body, _)| decode_dead(body)), Some(0b101));
    }
}
