//! A look at sled's log before sled opens it: is it what sled has written?
//!
//! sled takes the first message that does not match its checksum, in the newest part of its log, for the place where a crash has cut a
//! write short: it fills what follows with zeros, and begins to write there. Right after a power cut that is what should be done. For a
//! flipped bit, or a read that went wrong this once, it destroys what was whole; and elsewhere in the log it drops pages, and then
//! gives the space that they had to others. So before an open the whole log is read and nothing is written; when something in it looks odd
//! the owner keeps a copy until the state has been found whole.
//!
//! ```text
//! segment   20 bytes  crc32 of the rest, !(first log position), !(position known to be stable)   (i64, the top bit kept)
//!                  …  messages, one behind the other
//! message          4  crc32 of body and head
//!                  1  kind: 1 to 11; 0 is no message
//!           1 to 9 x3  length of the body, segment's number, page: as sled writes integers
//!                  …  body
//! ```
//!
//! # What is odd
//! - A segment whose head is neither zeros nor matches its checksum.
//! - Bytes where a message should begin, in any segment but the newest, that are neither zeros nor a message of that segment.
//! - In the newest one, where the log ends in zeros or in what the segment had held before: such a place with a message of that segment
//!   behind it. What hits the very last message cannot be told from the log's end: [`Findings::open_end`] says that there is a doubt.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Sizes of a segment's head, and of the longest head of a message: so close to the segment's end none begins.
const SEGMENT_HEAD: usize = 20;
const MESSAGE_HEAD_MAX: usize = 32;

/// The kind that ends a segment before its end, and the highest kind.
const KIND_CAP: u8 = 2;
const KIND_MAX: u8 = 11;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    /// The first thing that sled has not written so: where in the file, and what.
    pub odd: Option<(u64, &'static str)>,
    /// The log ends in bytes that may be left from before, or be a message that was damaged.
    pub open_end: bool,
}

/// Reads the log in `path`, of segments of `segment` bytes.
///
/// # Errors
/// `Io` when it cannot be read.
pub(super) fn inspect(path: &Path, segment: usize) -> Result<Findings> {
    let fault = |err| Error::io("read", path, err);
    let file = File::open(path).map_err(fault)?;
    let len = file.metadata().map_err(fault)?.len();
    let mut findings = Findings::default();
    let mut buffer = vec![0; segment];
    let mut newest: Option<(i64, u64)> = None;
    // Where the messages of each segment end too early. The newest one's may.
    let mut ends: Vec<(i64, u64, usize)> = Vec::new();
    for at in (0..len).step_by(segment.max(1)) {
        let bytes = read_segment(&file, at, &mut buffer).map_err(fault)?;
        let Some(head) = bytes.get(..SEGMENT_HEAD) else {
            if bytes.iter().any(|byte| *byte != 0) {
                findings.odd.get_or_insert((at, "a segment that ends within its head"));
            }
            continue;
        };
        let Some(position) = segment_position(head) else {
            if head.iter().any(|byte| *byte != 0) {
                findings.odd.get_or_insert((at, "a segment's head does not match its checksum"));
            }
            continue;
        };
        newest = newest.max(Some((position, at)));
        if let Some(end) = walk(bytes, segment, number(position, segment)) {
            ends.push((position, at, end));
        }
    }
    for (position, at, end) in ends {
        if newest != Some((position, at)) {
            findings.odd.get_or_insert((at + end as u64, "a message does not match its checksum"));
            continue;
        }
        let bytes = read_segment(&file, at, &mut buffer).map_err(fault)?;
        if (end + 1..bytes.len()).any(|from| message(bytes, from, number(position, segment)).is_some()) {
            findings.odd.get_or_insert((at + end as u64, "a message does not match its checksum, and there are others behind it"));
        }
        findings.open_end = true;
    }
    Ok(findings)
}

/// As much of the segment as there is.
fn read_segment<'a>(file: &File, at: u64, buffer: &'a mut [u8]) -> std::io::Result<&'a [u8]> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(buffer.get(..filled).unwrap_or_default())
}

fn number(position: i64, segment: usize) -> u64 {
    position.unsigned_abs() / (segment.max(1) as u64)
}

/// Where in sled's log a segment stands, from its head; none when the head is not whole.
fn segment_position(head: &[u8]) -> Option<i64> {
    let (crc, rest) = head.split_first_chunk::<4>()?;
    if crc32fast::hash(rest) != !u32::from_le_bytes(*crc) {
        return None;
    }
    let position = i64::from_le_bytes(*rest.first_chunk::<8>()?) ^ i64::MAX;
    (position >= 0).then_some(position)
}

/// Goes from message to message. Returns where it cannot go on although there is something.
fn walk(bytes: &[u8], segment: usize, number: u64) -> Option<usize> {
    let mut at = SEGMENT_HEAD;
    while at + MESSAGE_HEAD_MAX <= segment {
        match message(bytes, at, number) {
            Some((KIND_CAP, _)) => return None,
            Some((_, end)) => at = end,
            None => {
                // When sled cuts its log off at an open, it leaves the segment's last byte as it was.
                let rest = bytes.get(at..).unwrap_or_default();
                let rest = if bytes.len() == segment { rest.split_last().map_or(rest, |(_, rest)| rest) } else { rest };
                return rest.iter().any(|byte| *byte != 0).then_some(at);
            }
        }
    }
    None
}

/// The whole message at `at`, if there is one: its kind and its end.
fn message(bytes: &[u8], at: usize, number: u64) -> Option<(u8, usize)> {
    let head = bytes.get(at..)?;
    let (crc, rest) = head.split_first_chunk::<4>()?;
    let (&kind, rest) = rest.split_first()?;
    if kind == 0 || kind > KIND_MAX {
        return None;
    }
    let (len, rest) = integer(rest)?;
    let (found, rest) = integer(rest)?;
    if found != number {
        return None;
    }
    let (_, body) = integer(rest)?;
    let body = body.get(..usize::try_from(len).ok()?)?;
    let head_len = head.len() - integer(rest)?.1.len();
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(body);
    hasher.update(head.get(4..head_len)?);
    (hasher.finalize() == !u32::from_le_bytes(*crc)).then_some((kind, at + head_len + body.len()))
}

/// An integer as sled writes it, and what follows.
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (&first, rest) = bytes.split_first()?;
    let more = match first {
        0..=240 => 0,
        241..=248 => 1,
        249 => 2,
        250.. => usize::from(first) - 247,
    };
    let (digits, rest) = rest.split_at_checked(more)?;
    let little = digits.iter().rev().fold(0, |value, digit| value << 8 | u64::from(*digit));
    let big = digits.iter().fold(0, |value, digit| value << 8 | u64::from(*digit));
    let value = match first {
        0..=240 => u64::from(first),
        241..=248 => 240 + ((u64::from(first) - 241) << 8) + big,
        249 => 2288 + big,
        250.. => little,
    };
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: usize = 8 * 1024;

    /// A log that goes through many segments, some of them used again; closed.
    fn log(dir: &Path) -> Vec<u8> {
        let db = ::sled::Config::new().path(dir).segment_size(SEGMENT).flush_every_ms(None).open().unwrap();
        for round in 0..60_u32 {
            for key in 0..40_u32 {
                db.insert(key.to_be_bytes(), vec![round as u8 ^ key as u8; 3 + (key as usize * 37 + round as usize) % 150]).unwrap();
            }
            db.flush().unwrap();
        }
        drop(db);
        std::fs::read(dir.join("db")).unwrap()
    }

    fn look(dir: &Path, bytes: &[u8]) -> Findings {
        let path = dir.join("copy");
        std::fs::write(&path, bytes).unwrap();
        inspect(&path, SEGMENT).unwrap()
    }

    #[test]
    fn what_sled_has_written_is_not_odd() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = log(dir.path());
        assert!(bytes.len() > 4 * SEGMENT, "{}", bytes.len());
        assert_eq!(look(dir.path(), &bytes).odd, None);
        // Nor what it has made of its log by opening it.
        for _ in 0..3 {
            // sled lets go of its file a moment after it was dropped.
            let open = || ::sled::Config::new().path(dir.path()).segment_size(SEGMENT).flush_every_ms(None).open();
            let opened = (0..6000).find_map(|_| open().inspect_err(|_| std::thread::sleep(std::time::Duration::from_millis(10))).ok());
            drop(opened.unwrap());
            assert_eq!(inspect(&dir.path().join("db"), SEGMENT).unwrap().odd, None);
        }
        assert_eq!(look(dir.path(), &[]), Findings::default());
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = log(dir.path());
        let (mut seen, mut doubtful, mut unused) = (0, 0, 0);
        for at in (0..bytes.len()).step_by(59) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            let findings = look(dir.path(), &bytes);
            match findings.odd {
                Some((offset, _)) => {
                    assert!(offset <= at as u64 && at as u64 - offset < SEGMENT as u64, "{at}: {findings:?}");
                    seen += 1;
                }
                None if findings.open_end => doubtful += 1,
                // The last bytes of a segment, in which no message begins.
                None => unused += usize::from(at % SEGMENT >= SEGMENT - MESSAGE_HEAD_MAX - SEGMENT_HEAD),
            }
        }
        let all = bytes.len().div_ceil(59);
        // What is not seen is in the newest segment, at the log's end, or unused.
        assert!(seen + doubtful + unused == all && doubtful * 59 <= SEGMENT, "{seen} + {doubtful} + {unused} of {all}");
    }

    #[test]
    fn integers_are_sleds() {
        for (bytes, value) in [
            (&[0][..], 0),
            (&[240], 240),
            (&[241, 0], 240),
            (&[248, 255], 2287),
            (&[249, 0, 0], 2288),
            (&[249, 255, 255], 67_823),
            (&[250, 1, 2, 3], 0x03_02_01),
            (&[255, 1, 0, 0, 0, 0, 0, 0, 0x80], 0x8000_0000_0000_0001),
        ] {
            assert_eq!(integer(bytes), Some((value, &[][..])), "{bytes:?}");
            assert_eq!(integer(&bytes[..bytes.len() - 1]), None);
        }
    }
}
