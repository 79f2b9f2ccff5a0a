//! From bytes to operations: each decision takes a byte.
//!
//! What is drawn is mostly sensible and now and then absurd: keys that are none, revisions far away, enums out of range.

use bytes::Bytes;

use super::{KEYS, LEASES, Model};
use crate::proto::etcdserverpb::compare::TargetUnion;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest};

/// Bytes that decide what happens; zeros when they have run out.
pub(super) struct Source<'a>(pub &'a [u8]);

impl Source<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == times - 1
    }

    pub fn key(&mut self) -> Bytes {
        Bytes::from_static(self.pick(&KEYS))
    }

    pub fn end(&mut self) -> Bytes {
        match self.below(4) {
            0 | 1 => Bytes::new(),
            2 => Bytes::from_static(b"\0"),
            _ => self.key(),
        }
    }

    pub fn value(&mut self) -> Bytes {
        match self.below(32) {
            // Of several blocks, or chunks, of the history.
            31 => Bytes::from(vec![b'x'; 20_000]),
            30 => Bytes::from(vec![b'y'; 700]),
            other => Bytes::from_static([b"".as_slice(), b"1", b"10", b"2"][other % 4]),
        }
    }

    pub fn revision(&mut self, model: &Model) -> i64 {
        match self.below(16) {
            0..6 => 0,
            6..11 => (model.newest() - self.below(8) as i64).max(1),
            11 => model.compacted,
            12 => model.compacted - 1,
            13 => model.newest() + 1,
            14 => -(self.below(3) as i64),
            _ => self.pick(&[i64::MAX, i64::MIN]),
        }
    }

    pub fn put(&mut self) -> PutRequest {
        let mut put = PutRequest { key: self.key(), value: self.value(), ..PutRequest::default() };
        let flags = self.byte();
        put.prev_kv = flags & 1 != 0;
        put.ignore_value = flags & 0x0e == 0x0e;
        put.ignore_lease = flags & 0x70 == 0x70;
        if (put.ignore_value && flags & 1 == 0) || self.0.is_empty() {
            put.value = Bytes::new();
        }
        if !put.ignore_lease && flags & 0x80 != 0 {
            put.lease = self.pick(&LEASES);
        }
        put
    }

    pub fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.end(), prev_kv: self.one_in(2) }
    }

    pub fn range(&mut self, model: &Model) -> RangeRequest {
        let mut range = RangeRequest { key: self.key(), range_end: self.end(), revision: self.revision(model), ..RangeRequest::default() };
        if self.one_in(2) {
            range.limit = self.pick(&[0, 1, 2, 3, 5, -1, i64::MAX]);
        }
        if self.one_in(2) {
            range.sort_order = self.pick(&[0, 0, 1, 1, 2, 2, 3]);
            range.sort_target = self.pick(&[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1]);
        }
        let flags = self.byte();
        range.keys_only = flags & 3 == 3;
        range.count_only = flags & 12 == 12;
        for (bit, bound) in [
            (0x10, &mut range.min_mod_revision),
            (0x20, &mut range.max_mod_revision),
            (0x40, &mut range.min_create_revision),
            (0x80, &mut range.max_create_revision),
        ] {
            if flags & bit != 0 && self.one_in(2) {
                *bound = model.newest() - self.below(12) as i64;
            }
        }
        range
    }

    pub fn compare(&mut self, model: &Model) -> Compare {
        let (target, kind) = (self.pick(&[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 9]), self.below(7));
        // Mostly a union of the target's kind, as a client would send.
        let target_union = match if kind < 5 { target } else { kind as i32 - 5 } {
            0 => Some(TargetUnion::Version(self.below(4) as i64)),
            1 => Some(TargetUnion::CreateRevision(self.revision(model))),
            2 => Some(TargetUnion::ModRevision(self.revision(model))),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(self.pick(&LEASES))),
            _ => None,
        };
        Compare { result: self.pick(&[0, 1, 2, 3, 0, 1, 2, 3, 7]), target, key: self.key(), range_end: self.end(), target_union }
    }

    pub fn txn(&mut self, model: &Model, depth: usize) -> TxnRequest {
        let compares = self.below(3);
        let compare = (0..compares).map(|_| self.compare(model)).collect();
        let mut ops = || {
            let count = self.below(5 - depth);
            (0..count).map(|_| self.op(model, depth)).collect()
        };
        TxnRequest { compare, success: ops(), failure: ops() }
    }

    pub fn op(&mut self, model: &Model, depth: usize) -> RequestOp {
        let request = match self.below(16) {
            0..6 => Some(Request::RequestPut(self.put())),
            6..9 => Some(Request::RequestDeleteRange(self.delete())),
            9..12 => Some(Request::RequestRange(self.range(model))),
            12..15 if depth < 3 => Some(Request::RequestTxn(self.txn(model, depth + 1))),
            12..15 => Some(Request::RequestPut(self.put())),
            _ => (!self.one_in(4)).then(|| Request::RequestRange(self.range(model))),
        };
        RequestOp { request }
    }

    pub fn watch(&mut self, model: &Model) -> WatchCreateRequest {
        let flags = self.byte();
        WatchCreateRequest {
            key: self.key(),
            range_end: self.end(),
            start_revision: if flags & 1 == 0 { 0 } else { self.revision(model).min(model.newest() + 3) },
            progress_notify: flags & 2 != 0,
            filters: self.pick(&[&[][..], &[0], &[1], &[0, 1], &[7], &[], &[], &[]]).to_vec(),
            prev_kv: flags & 4 != 0,
            watch_id: self.pick(&[0, 0, 0, 1, 2, 7, -2]),
            fragment: flags & 8 != 0,
        }
    }
}
