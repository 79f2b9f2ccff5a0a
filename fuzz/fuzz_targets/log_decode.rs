//! The log's decoder on foreign bytes: it must neither panic nor take memory, and what it accepts must be consistent.
//!
//! The first byte chooses whether the segment is the oldest of its log. The checksums of headers are made right for half of the inputs,
//! since a fuzzer seldom guesses them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quorate::storage::wal::{Record, decode_segment};

/// Offsets and lengths in a segment, as its format has them.
const SEGMENT_HEADER: usize = 64;
const FRAME_HEADER: usize = 40;
const ALIGN: usize = 8;

fn put_crc(bytes: &mut [u8], len: usize) {
    let crc = crc32c::crc32c(&bytes[..len]);
    bytes[len..len + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Makes every header right that looks like one, so that the records behind it are reached.
fn mend(bytes: &mut [u8]) {
    if bytes.len() < SEGMENT_HEADER {
        return;
    }
    let capacity = bytes.len() as u64;
    bytes[..8].copy_from_slice(b"qrtrlog\n");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    bytes[32..40].copy_from_slice(&capacity.to_le_bytes());
    put_crc(bytes, 60);
    let salt: [u8; 8] = bytes[24..32].try_into().expect("eight bytes");
    let seed = crc32c::crc32c(&salt);
    let mut at = SEGMENT_HEADER;
    while at + FRAME_HEADER <= bytes.len() {
        let (head, body) = bytes[at..].split_at_mut(FRAME_HEADER);
        if head[0] == b'q' {
            head[8..16].copy_from_slice(&salt);
            let len = u32::from_le_bytes(head[4..8].try_into().expect("four bytes")) as usize;
            // Records: right checksums as far as their lengths lead.
            let (mut digest, mut records, mut next) = (seed, 0u32, 0);
            while next + 9 <= len.min(body.len()) {
                let data = u32::from_le_bytes(body[next + 4..next + 8].try_into().expect("four bytes")) as usize;
                let Some(end) = next.checked_add(9 + data).filter(|end| *end <= len.min(body.len())) else { break };
                let crc = crc32c::crc32c_append(seed, &body[next + 4..end]).to_le_bytes();
                body[next..next + 4].copy_from_slice(&crc);
                digest = crc32c::crc32c_append(digest, &crc);
                records += 1;
                next = end;
            }
            head[24..28].copy_from_slice(&records.to_le_bytes());
            head[28..32].copy_from_slice(&digest.to_le_bytes());
            put_crc(head, 36);
        }
        at += ALIGN;
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if first & 1 == 0 {
        mend(&mut bytes);
    }
    let expected = if first & 2 == 0 { None } else { Some(u64::from(first >> 2)) };
    let mut payload = 0;
    let mut last = 0;
    let scan = decode_segment(&bytes, expected, &mut |seen| {
        assert!(seen.offset >= last, "records in order");
        last = seen.offset + u64::from(seen.len);
        assert!(last <= bytes.len() as u64, "within the file");
        if let Record::Entry { payload: bytes, .. } = seen.record {
            payload += bytes.len();
        }
        Ok(())
    });
    assert!(payload <= bytes.len());
    if let Ok(scan) = scan {
        assert!(scan.end <= scan.capacity && scan.capacity <= bytes.len() as u64);
    }
});
