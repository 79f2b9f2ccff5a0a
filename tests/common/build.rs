//! Short ways to write requests down.

use bytes::Bytes;

use super::pb::request_op::Request;
use super::pb::*;

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }
}

/// The keys from `key` to before `end`; `""` for the one key, `"\0"` for an open end.
pub fn range(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), ..Default::default() }
}

pub fn everything() -> RangeRequest {
    range("\0", "\0")
}

pub fn delete(key: &str, end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), ..Default::default() }
}

/// A Txn without compares.
pub fn txn(ops: impl IntoIterator<Item = RequestOp>) -> TxnRequest {
    TxnRequest { success: ops.into_iter().collect(), ..Default::default() }
}

/// A request as an operation of a Txn.
pub trait IntoOp {
    fn op(self) -> RequestOp;
}

impl IntoOp for PutRequest {
    fn op(self) -> RequestOp {
        RequestOp { request: Some(Request::RequestPut(self)) }
    }
}

impl IntoOp for RangeRequest {
    fn op(self) -> RequestOp {
        RequestOp { request: Some(Request::RequestRange(self)) }
    }
}

impl IntoOp for DeleteRangeRequest {
    fn op(self) -> RequestOp {
        RequestOp { request: Some(Request::RequestDeleteRange(self)) }
    }
}

impl IntoOp for TxnRequest {
    fn op(self) -> RequestOp {
        RequestOp { request: Some(Request::RequestTxn(self)) }
    }
}

/// A watch on a key or range, from a revision on (0: from now).
pub fn watch(key: &str, end: &str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), start_revision, ..Default::default() }
}

/// `size` bytes that are the same in every run and do not compress well.
pub fn blob(size: usize) -> Bytes {
    (0..size as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<u8>>().into()
}
