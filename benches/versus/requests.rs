//! What is sent, encoded once, and what must come back.
//!
//! A request is a [`Stamp`]: its whole frame, encoded ahead, with holes for numbers. To send one is to copy a few hundred bytes and
//! write eight digits, which is cheaper than encoding and kinder to the processor's caches than a large supply of ready requests, and
//! every key of the store can be drawn, however many there are.
//!
//! ```text
//! stamp of a put:  "\0\0\0\x01\x1e \x0a\x18/versus/things/[first] \x12\x80\x02[fresh]qwlkjh..."
//! filled with 42:  "\0\0\0\x01\x1e \x0a\x18/versus/things/00000042 \x12\x80\x0200000001qwlkjh..."
//! ```
//!
//! Keys are `/versus/things/00000000` and so on without gaps, so that a range of n keys has exactly n in its answer. Every answer is
//! checked: its fields are counted, nothing of it is copied.

use bytes::{BufMut, Bytes, BytesMut};
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::{Compare, PutRequest, RangeRequest, RequestOp, TxnRequest};

use crate::stats::Rng;
use crate::wire::{Field, Result, fields, frame};

pub const PUT: &str = "/etcdserverpb.KV/Put";
pub const RANGE: &str = "/etcdserverpb.KV/Range";
pub const TXN: &str = "/etcdserverpb.KV/Txn";
pub const DELETE_RANGE: &str = "/etcdserverpb.KV/DeleteRange";
pub const COMPACT: &str = "/etcdserverpb.KV/Compact";
pub const WATCH: &str = "/etcdserverpb.Watch/Watch";
pub const LEASE_GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
pub const LEASE_REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
pub const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
pub const STATUS: &str = "/etcdserverpb.Maintenance/Status";
pub const DEFRAGMENT: &str = "/etcdserverpb.Maintenance/Defragment";
pub const SNAPSHOT: &str = "/etcdserverpb.Maintenance/Snapshot";

/// Everything the harness writes has a key below this prefix, and nothing else is ever deleted.
pub const PREFIX: &str = "/versus/";
/// The end of that range: the prefix with its last byte raised.
pub const PREFIX_END: &str = "/versus0";
/// A key before its number is known.
const KEY: &str = "/versus/things/00000000";
/// Where the watch rows write.
pub const FAN_PREFIX: &str = "/versus/fan/";
/// The end of that range.
pub const FAN_PREFIX_END: &str = "/versus/fan0";
/// Digits of a number in a key, and the length of every hole.
const DIGITS: usize = 8;
/// Puts in one transaction while data are loaded; servers refuse more than 128 operations.
pub const LOAD_BATCH: u64 = 100;

// The holes. As long as the digits, and unlike anything in a key or a value.
const FIRST: &str = "<first#>";
const BEYOND: &str = "<beyond>";
const FRESH: &str = "<fresh#>";

/// The key with this number.
pub fn key(number: u64) -> String {
    format!("{PREFIX}things/{number:08}")
}

/// The key that one of the writers of the watch rows writes.
pub fn fan_key(slot: usize) -> String {
    format!("{FAN_PREFIX}{slot:08}")
}

/// The number at the end of a key of ours.
pub fn number_of(key: &[u8]) -> Option<usize> {
    let digits = key.get(key.len().checked_sub(DIGITS)?..)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// A value that does not compress: letters from a fixed seed, with the hole for a fresh number at its head when it has room.
pub fn value(bytes: usize) -> String {
    let mut rng = Rng::new(7);
    let mut value = if bytes >= DIGITS { FRESH.to_string() } else { String::new() };
    while value.len() < bytes {
        value.push(char::from(b'a' + (rng.below(26) as u8)));
    }
    value
}

/// A request with holes.
pub struct Stamp {
    template: Bytes,
    /// Where each hole is, and which number belongs there.
    holes: Vec<(usize, Hole)>,
}

#[derive(Clone, Copy)]
enum Hole {
    First,
    Beyond,
    Fresh,
}

impl Stamp {
    fn new(message: &impl prost::Message) -> Self {
        let template = frame(message);
        let mut holes = Vec::new();
        for (at, window) in template.windows(DIGITS).enumerate() {
            for (mark, hole) in [(FIRST, Hole::First), (BEYOND, Hole::Beyond), (FRESH, Hole::Fresh)] {
                if window == mark.as_bytes() {
                    holes.push((at, hole));
                }
            }
        }
        Self { template, holes }
    }

    /// A put of one key with a value that nobody wrote before.
    pub fn put(value_bytes: usize) -> Self {
        Self::new(&put_of(value_bytes))
    }

    /// A get of one key.
    pub fn get(serializable: bool) -> Self {
        Self::new(&RangeRequest { serializable, ..get_of() })
    }

    /// A range of keys, as many as lie between the two numbers it is filled with.
    pub fn range() -> Self {
        Self::new(&RangeRequest { range_end: hole_key(BEYOND), ..get_of() })
    }

    /// "If the key exists, put it and get it, otherwise get it."
    pub fn txn(value_bytes: usize) -> Self {
        let exists = Compare {
            result: CompareResult::Greater.into(),
            target: CompareTarget::Version.into(),
            key: hole_key(FIRST),
            target_union: Some(TargetUnion::Version(0)),
            ..Default::default()
        };
        let (put, get) = (Request::RequestPut(put_of(value_bytes)), Request::RequestRange(get_of()));
        Self::new(&TxnRequest { compare: vec![exists], success: vec![op(put), op(get.clone())], failure: vec![op(get)] })
    }

    /// The request for the given numbers. The buffer is reused once earlier requests have left.
    pub fn fill(&self, buffer: &mut BytesMut, first: u64, beyond: u64, fresh: u64) -> Bytes {
        buffer.reserve(self.template.len());
        buffer.put_slice(&self.template);
        for (at, hole) in &self.holes {
            let number = match hole {
                Hole::First => first,
                Hole::Beyond => beyond,
                Hole::Fresh => fresh,
            };
            write_digits(buffer, *at, number);
        }
        buffer.split().freeze()
    }
}

fn write_digits(buffer: &mut [u8], at: usize, mut number: u64) {
    for digit in buffer.iter_mut().skip(at).take(DIGITS).rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// As [`key`], without the price of formatting.
pub fn quick_key(buffer: &mut BytesMut, number: u64) -> Bytes {
    buffer.reserve(KEY.len());
    buffer.put_slice(KEY.as_bytes());
    write_digits(buffer, KEY.len() - DIGITS, number);
    buffer.split().freeze()
}

fn hole_key(hole: &str) -> Bytes {
    format!("{PREFIX}things/{hole}").into()
}

fn put_of(value_bytes: usize) -> PutRequest {
    PutRequest { key: hole_key(FIRST), value: value(value_bytes).into(), ..Default::default() }
}

fn get_of() -> RangeRequest {
    RangeRequest { key: hole_key(FIRST), ..Default::default() }
}

pub fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// A transaction that writes the given keys.
pub fn load_txn(numbers: std::ops::Range<u64>, value: &Bytes) -> Bytes {
    let put = |number| op(Request::RequestPut(PutRequest { key: key(number).into(), value: value.clone(), ..Default::default() }));
    frame(&TxnRequest { success: numbers.map(put).collect(), ..Default::default() })
}

/// What an answer must be.
#[derive(Clone, Copy)]
pub enum Check {
    /// A header, thus a revision.
    Put,
    /// Exactly this many keys, and as many counted.
    Range(u64),
    /// The comparison held, and there are two results.
    Txn,
}

impl Check {
    pub fn check(self, answer: &[u8]) -> Result<()> {
        let (mut headers, mut items, mut number) = (0_u64, 0_u64, 0_u64);
        for field in fields(answer) {
            match (self, field?) {
                (_, Field::Bytes(1, header)) if !header.is_empty() => headers += 1,
                (Self::Range(_), Field::Bytes(2, _)) | (Self::Txn, Field::Bytes(3, _)) => items += 1,
                (Self::Range(_), Field::Number(4, count)) => number = count,
                (Self::Txn, Field::Number(2, succeeded)) => number = succeeded,
                (_, other) => return Err(format!("unexpected in the answer: {other:?}").into()),
            }
        }
        let (items_wanted, number_wanted) = match self {
            Self::Put => (0, 0),
            Self::Range(keys) => (keys, keys),
            Self::Txn => (2, 1),
        };
        if (headers, items, number) != (1, items_wanted, number_wanted) {
            return Err(format!("an answer with {headers} headers, {items} items (not {items_wanted}), count or success {number}").into());
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use prost::Message;
    use quorate::proto::etcdserverpb::{PutResponse, RangeResponse, ResponseHeader, ResponseOp, TxnResponse};
    use quorate::proto::{EncodedKv, KeyValue};

    use super::*;

    #[test]
    fn a_filled_stamp_is_the_request() {
        let mut buffer = BytesMut::new();
        let frame = Stamp::put(256).fill(&mut buffer, 42, 0, 7);
        let put = PutRequest::decode(&frame[5..]).unwrap();
        assert_eq!(put.key, key(42));
        assert_eq!(put.value.len(), 256);
        assert!(put.value.starts_with(b"00000007"));

        let frame = Stamp::range().fill(&mut buffer, 99_999_000, 100_000_000 - 1, 0);
        let range = RangeRequest::decode(&frame[5..]).unwrap();
        assert_eq!((range.key, range.range_end), (key(99_999_000).into(), key(99_999_999).into()));

        let frame = Stamp::txn(256).fill(&mut buffer, 1, 0, 0);
        let txn = TxnRequest::decode(&frame[5..]).unwrap();
        assert_eq!(txn.compare[0].key, key(1));
        assert_eq!((txn.success.len(), txn.failure.len()), (2, 1));

        assert_eq!(Stamp::put(3).fill(&mut buffer, 1, 0, 0).len(), 5 + 2 + key(1).len() + 2 + 3);
    }

    #[test]
    fn numbers_come_back() {
        assert_eq!(number_of(fan_key(17).as_bytes()), Some(17));
        assert_eq!(quick_key(&mut BytesMut::new(), 1042), key(1042));
        assert_eq!(number_of(b"short"), None);
        assert_eq!(number_of(b"/versus/things/0000x042"), None);
    }

    #[test]
    fn answers_are_checked() {
        let header = Some(ResponseHeader { revision: 7, ..Default::default() });
        let kv = EncodedKv::encode(&KeyValue { key: "k".into(), ..Default::default() });
        let range = |kvs: usize, count| RangeResponse { header, kvs: vec![kv.clone(); kvs], count, more: false }.encode_to_vec();
        Check::Range(2).check(&range(2, 2)).unwrap();
        Check::Range(2).check(&range(1, 2)).unwrap_err();
        Check::Range(2).check(&range(2, 3)).unwrap_err();
        Check::Put.check(&PutResponse { header, prev_kv: None }.encode_to_vec()).unwrap();
        Check::Put.check(&[]).unwrap_err();
        Check::Put.check(b"\x0a").unwrap_err();
        let txn = |succeeded| TxnResponse { header, succeeded, responses: vec![ResponseOp::default(); 2] }.encode_to_vec();
        Check::Txn.check(&txn(true)).unwrap();
        Check::Txn.check(&txn(false)).unwrap_err();
    }
}
