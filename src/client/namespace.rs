//! A namespace: a part of the key space that its user takes for the whole, as etcd's namespace package has it.
//!
//! Keys get the prefix on their way to the store and lose it on the way back; a range "from here to the end" ends where the prefix does.
//! Leases are not divided: they belong to all, but of their keys only those in the namespace are told.
//!
//! ```text
//! namespace a/:   put k          -> put a/k
//!                 range \0 .. \0 -> range a/\0 .. a0
//!                 a/k changed    -> k changed
//! ```

use bytes::{Bytes, BytesMut};

use super::watch::{WatchEvent, WatchMessage, decode};
use super::{LeaseTime, Result, prefix_end};
use crate::error::ApplyError;
use crate::proto::EncodedKv;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse,
    WatchCreateRequest,
};

/// A prefix that is not empty.
#[derive(Clone, Debug)]
pub(super) struct Namespace(Bytes);

impl Namespace {
    /// That of `prefix` within `outer`; none if there is no prefix at all.
    pub fn within(outer: Option<&Namespace>, prefix: Bytes) -> Option<Namespace> {
        let whole = match outer {
            Some(outer) => outer.prefixed(&prefix),
            None => prefix,
        };
        (!whole.is_empty()).then_some(Namespace(whole))
    }

    fn prefixed(&self, key: &[u8]) -> Bytes {
        let mut whole = BytesMut::with_capacity(self.0.len() + key.len());
        whole.extend_from_slice(&self.0);
        whole.extend_from_slice(key);
        whole.freeze()
    }

    /// The store would take no key at all for an error; with the prefix it would be one.
    fn key(&self, key: &[u8]) -> Result<Bytes> {
        if key.is_empty() { Err(ApplyError::EmptyKey.into()) } else { Ok(self.prefixed(key)) }
    }

    fn end(&self, end: &Bytes) -> Bytes {
        match &end[..] {
            [] => Bytes::new(),
            [0] => prefix_end(&self.0),
            _ => self.prefixed(end),
        }
    }

    pub fn put(&self, request: PutRequest) -> Result<PutRequest> {
        Ok(PutRequest { key: self.key(&request.key)?, ..request })
    }

    pub fn range(&self, request: RangeRequest) -> Result<RangeRequest> {
        Ok(RangeRequest { key: self.key(&request.key)?, range_end: self.end(&request.range_end), ..request })
    }

    pub fn delete(&self, request: DeleteRangeRequest) -> Result<DeleteRangeRequest> {
        Ok(DeleteRangeRequest { key: self.key(&request.key)?, range_end: self.end(&request.range_end), ..request })
    }

    /// # Errors
    /// A key is missing; or the Txn is nested deeper than any server takes it.
    pub fn txn(&self, request: TxnRequest) -> Result<TxnRequest> {
        self.nested_txn(request, crate::mvcc::txn::NESTING_MAX)
    }

    fn nested_txn(&self, mut request: TxnRequest, depth: usize) -> Result<TxnRequest> {
        let deeper = depth.checked_sub(1).ok_or(ApplyError::TooManyOps)?;
        for compare in &mut request.compare {
            compare.key = self.key(&compare.key)?;
            compare.range_end = self.end(&compare.range_end);
        }
        for RequestOp { request } in request.success.iter_mut().chain(&mut request.failure) {
            *request = match request.take() {
                Some(Request::RequestRange(range)) => Some(Request::RequestRange(self.range(range)?)),
                Some(Request::RequestPut(put)) => Some(Request::RequestPut(self.put(put)?)),
                Some(Request::RequestDeleteRange(delete)) => Some(Request::RequestDeleteRange(self.delete(delete)?)),
                Some(Request::RequestTxn(txn)) => Some(Request::RequestTxn(self.nested_txn(txn, deeper)?)),
                None => None,
            };
        }
        Ok(request)
    }

    pub fn watch(&self, request: WatchCreateRequest) -> WatchCreateRequest {
        // No key means the first there can be.
        let key = if request.key.is_empty() { Bytes::from_static(&[0]) } else { request.key };
        WatchCreateRequest { key: self.prefixed(&key), range_end: self.end(&request.range_end), ..request }
    }

    // ---- And back

    fn strip(&self, key: &Bytes) -> Bytes {
        if key.starts_with(&self.0) { key.slice(self.0.len()..) } else { key.clone() }
    }

    fn stripped(&self, kv: &EncodedKv) -> Result<EncodedKv> {
        let mut kv = decode(kv)?;
        kv.key = self.strip(&kv.key);
        Ok(EncodedKv::encode(&kv))
    }

    fn strip_all(&self, kvs: &mut [EncodedKv]) -> Result<()> {
        for kv in kvs {
            *kv = self.stripped(kv)?;
        }
        Ok(())
    }

    pub fn ranged(&self, mut answer: RangeResponse) -> Result<RangeResponse> {
        self.strip_all(&mut answer.kvs)?;
        Ok(answer)
    }

    pub fn was_put(&self, mut answer: PutResponse) -> Result<PutResponse> {
        answer.prev_kv = answer.prev_kv.map(|kv| self.stripped(&kv)).transpose()?;
        Ok(answer)
    }

    pub fn deleted(&self, mut answer: DeleteRangeResponse) -> Result<DeleteRangeResponse> {
        self.strip_all(&mut answer.prev_kvs)?;
        Ok(answer)
    }

    pub fn done(&self, mut answer: TxnResponse) -> Result<TxnResponse> {
        for op in &mut answer.responses {
            op.response = match op.response.take() {
                Some(Response::ResponseRange(range)) => Some(Response::ResponseRange(self.ranged(range)?)),
                Some(Response::ResponsePut(put)) => Some(Response::ResponsePut(self.was_put(put)?)),
                Some(Response::ResponseDeleteRange(delete)) => Some(Response::ResponseDeleteRange(self.deleted(delete)?)),
                // No deeper than its request.
                Some(Response::ResponseTxn(txn)) => Some(Response::ResponseTxn(self.done(txn)?)),
                None => None,
            };
        }
        Ok(answer)
    }

    pub fn told(&self, mut message: WatchMessage) -> WatchMessage {
        if let WatchMessage::Events(events) = &mut message {
            for WatchEvent { kv, prev_kv, .. } in events {
                kv.key = self.strip(&kv.key);
                if let Some(prev) = prev_kv {
                    prev.key = self.strip(&prev.key);
                }
            }
        }
        message
    }

    pub fn lease(&self, mut lease: LeaseTime) -> LeaseTime {
        lease.keys.retain(|key| key.starts_with(&self.0));
        for key in &mut lease.keys {
            *key = self.strip(key);
        }
        lease
    }
}
