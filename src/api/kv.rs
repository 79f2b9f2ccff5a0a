//! The KV service: Range, RangeStream, Put, DeleteRange, Txn, Compact.
//!
//! RangeStream answers in chunks: the keys in order, and with the last chunk the header, `more` and the count. A chunk
//! begins with few keys and grows towards [`CHUNK_BYTES`], so that the first keys are there at once and a large range
//! costs few messages. The revision is held from the first chunk to the last.

use std::sync::Arc;

use futures_util::Stream;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::error::Result;
use crate::mvcc::Pin;
use crate::mvcc::range::{self, Hit, RangeResult};
use crate::node::{Node, RangeAnswer};
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

/// The whole answer in memory. What of it has to be read from the disk is read elsewhere, so that nobody's thread stands still meanwhile.
pub(crate) async fn collect(node: &Node, answer: RangeAnswer) -> Result<RangeResponse> {
    if answer.result.held { answer.collect() } else { node.blocking(move || answer.collect()).await? }
}

#[tonic::async_trait]
impl Kv for Api {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let answer = self.node.range(&request.into_inner()).await.map_err(status)?;
        Ok(Response::new(collect(&self.node, answer).await.map_err(status)?))
    }

    type RangeStreamStream = std::pin::Pin<Box<dyn Stream<Item = Result<RangeStreamResponse, Status>> + Send>>;

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
        Ok(Response::new(Box::pin(stream_range(self.node.clone(), answer))))
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

/// What is left of an answer that is sent in parts: pairs, and what holds their revision.
pub(super) struct Left {
    hits: std::vec::IntoIter<Hit>,
    pin: Option<Pin>,
    keys_only: bool,
}

impl Left {
    pub fn new(hits: Vec<Hit>, pin: Option<Pin>, keys_only: bool) -> Left {
        Left { hits: hits.into_iter(), pin, keys_only }
    }

    pub fn is_empty(&self) -> bool {
        self.hits.as_slice().is_empty()
    }

    /// The next pair.
    pub fn fetch(&mut self) -> Result<Option<EncodedKv>> {
        self.hits.next().map(|hit| hit.fetch(self.pin.as_ref(), self.keys_only)).transpose()
    }

    /// Makes the next part: elsewhere, when what it begins with is not held, for then it is on the disk, and this thread does everything else.
    pub async fn part<T: Send + 'static>(
        mut self,
        node: &Node,
        make: impl FnOnce(&mut Left) -> Result<T> + Send + 'static,
    ) -> Result<(Left, T)> {
        let held = self.hits.as_slice().first().is_none_or(|hit| hit.kv.is_some());
        let make = move || make(&mut self).map(|part| (self, part));
        if held { make() } else { node.blocking(make).await? }
    }
}

/// Cuts an answer into chunks, fetching what it does not hold when its turn comes.
fn stream_range(node: Arc<Node>, answer: RangeAnswer) -> impl Stream<Item = Result<RangeStreamResponse, Status>> + Send {
    let RangeAnswer { result: RangeResult { hits, more, count, .. }, pin, keys_only, header } = answer;
    let begin = (node, Some(Left::new(hits, pin, keys_only)), CHUNK_KEYS);
    futures_util::stream::try_unfold(begin, move |(node, left, keys)| async move {
        // None: the last chunk was made.
        let Some(left) = left else { return Ok(None) };
        let (left, kvs) = left.part(&node, move |left| chunk(left, keys)).await.map_err(status)?;
        let left = Some(left).filter(|left| !left.is_empty());
        let response = match left {
            None => RangeResponse { header: Some(header), kvs, more, count },
            Some(_) => RangeResponse { kvs, ..RangeResponse::default() },
        };
        // Beyond this a chunk is bounded by its bytes alone.
        let keys = CHUNK_BYTES.min(2 * keys);
        Ok(Some((RangeStreamResponse { range_response: Some(response) }, (node, left, keys))))
    })
}

/// The next chunk of an answer.
fn chunk(left: &mut Left, keys: usize) -> Result<Vec<EncodedKv>> {
    let mut kvs: Vec<EncodedKv> = Vec::new();
    let mut bytes = 0;
    while kvs.len() < keys && bytes < CHUNK_BYTES {
        let Some(kv) = left.fetch()? else { break };
        bytes += kv.encoded_len();
        kvs.push(kv);
    }
    Ok(kvs)
}
