//! Whatever the bytes, the snapshot decoder ends with items or an error: no panic, no runaway memory; and what it takes
//! the encoder takes again.
//!
//! Checksums would keep a fuzzer at the door, so each input is tried twice: as it is, and cut into frames with right lengths,
//! sequence and checksums. For the second each frame is taken from the input as kind, two bytes of length, payload.
//! The framing is written here once more, from the table in the head of `snapshot.rs`.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use quorate::snapshot::{self, Decoder, Item};
use sha2::{Digest, Sha256};

/// The items, if the stream is sound from end to end.
fn decode(bytes: &[u8]) -> Option<(snapshot::Header, Vec<Item>)> {
    let mut decoder = Decoder::new(bytes, Path::new("input")).ok()?;
    let mut items = Vec::new();
    while let Some(item) = decoder.next_item().ok()? {
        items.push(item);
    }
    Some((decoder.header().clone(), items))
}

fn framed(mut input: &[u8]) -> Vec<u8> {
    let mut out = b"\x89QSNAP\r\n".to_vec();
    let mut sequence = 0u64;
    while let Some(([kind, low, high], rest)) = input.split_first_chunk() {
        let (payload, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        let start = out.len();
        out.extend((payload.len() as u32).to_le_bytes());
        out.push(*kind);
        out.extend(sequence.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[start..]), payload);
        out.extend(crc.to_le_bytes());
        out.extend(payload);
        sequence += 1;
        input = rest;
    }
    let sha256 = Sha256::digest(&out);
    out.extend(sha256);
    out
}

fuzz_target!(|input: &[u8]| {
    let _ = decode(input);
    if let Some((header, items)) = decode(&framed(input)) {
        // The same items may be cut into frames otherwise, so not the bytes but the items must come back.
        let mut again = Vec::new();
        snapshot::write(&header, items.iter().cloned().map(Ok), &mut again, Path::new("again")).expect("taken once, taken again");
        assert_eq!(decode(&again), Some((header, items)));
    }
});
