//! The KV service: Range, RangeStream, Put, DeleteRange, Txn, Compact.
//!
//! RangeStream answers in chunks: the keys in order, and with the last chunk the header, `more` and the count. A chunk
//! begins with few keys and grows towards [`CHUNK_BYTES`], so that the first keys are there at once and a large range
//! costs few messages. The revision is held from the first chunk to the last.

use std::pin::Pin;

use futures_util::Stream;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::error::Result;
use crate::mvcc::range::{self, RangeResult};
use crate::node::RangeAnswer;
use crate::proto::EncodedKv;
use crate::proto::etcdserverpb::kv_server::Kv;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
    RangeStreamResponse, TxnRequest, TxnResponse,
};

use super::{Api, status};

/// Keys in the first chunk of a RangeStream; each later one may have twice as many as the one before.
const CHUNK_KEYS: usize = 10;

/// Bytes towards which chunks grow. A single key may be larger, and is then a chunk of its own.
const CHUNK_BYTES: usize = 1 << 20;

impl RangeAnswer {
    /// The whole answer in memory.
    pub fn collect(self) -> Result<RangeResponse> {
        let RangeAnswer { result: RangeResult { hits, more, count, .. }, pin, keys_only, header } = self;
        let mut kvs = Vec::with_capacity(hits.len());
        for hit in hits {
            kvs.push(hit.fetch(pin.as_ref(), keys_only)?);
        }
        Ok(RangeResponse { header: Some(header), kvs, more, count })
    }
}

#[tonic::async_trait]
impl Kv for Api {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let answer = self.node.range(&request.into_inner()).await.map_err(status)?;
        Ok(Response::new(answer.collect().map_err(status)?))
    }

    type RangeStreamStream = Pin<Box<dyn Stream<Item = Result<RangeStreamResponse, Status>> + Send>>;

    async fn range_stream(&self, request: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        let request = request.into_inner();
        range::check(&request).map_err(|err| status(err.into()))?;
        let sorted = request.sort_order != SortOrder::None as i32 || request.sort_target != SortTarget::Key as i32;
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        if sorted || filtered {
            return Err(Status::unimplemented("etcdserver: range stream does not sort or filter"));
        }
        let answer = self.node.range(&request).await.map_err(status)?;
        Ok(Response::new(Box::pin(stream_range(answer))))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.node.put(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn delete_range(&self, request: Request<DeleteRangeRequest>) -> Result<Response<DeleteRangeResponse>, Status> {
        self.node.delete_range(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        self.node.txn(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        self.node.compact(request.into_inner()).await.map(Response::new).map_err(status)
    }
}

/// Cuts an answer into chunks, fetching what it does not hold when its turn comes.
fn stream_range(answer: RangeAnswer) -> impl Stream<Item = Result<RangeStreamResponse, Status>> + Send {
    let RangeAnswer { result: RangeResult { hits, more, count, .. }, pin, keys_only, header } = answer;
    let state = (hits.into_iter().peekable(), CHUNK_KEYS, false);
    futures_util::stream::unfold(state, move |(mut hits, keys, done)| {
        let chunk = (!done).then(|| {
            let mut kvs: Vec<EncodedKv> = Vec::new();
            let mut bytes = 0;
            while kvs.len() < keys && bytes < CHUNK_BYTES {
                let Some(hit) = hits.next() else { break };
                let kv = hit.fetch(pin.as_ref(), keys_only).map_err(status)?;
                bytes += kv.encoded_len();
                kvs.push(kv);
            }
            let last = hits.peek().is_none();
            let response = if last {
                RangeResponse { header: Some(header), kvs, more, count }
            } else {
                RangeResponse { kvs, ..RangeResponse::default() }
            };
            Ok((RangeStreamResponse { range_response: Some(response) }, last))
        });
        async move {
            match chunk? {
                Ok((response, last)) => Some((Ok(response), (hits, keys * 2, last))),
                Err(err) => Some((Err(err), (hits, keys, true))),
            }
        }
    })
}
