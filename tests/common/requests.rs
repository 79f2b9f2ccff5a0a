//! What clients of a cluster under test ask for, and how a history's requests look in etcd's messages. For tests that have `checkers`.

use std::collections::BTreeMap;

use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::request_op::Request as Union;
use quorate::proto::etcdserverpb::response_op::Response as Reply;
use quorate::proto::etcdserverpb::*;
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::checkers::history::{Answer, Change, Item, Request};

/// Keys that requests name one by one, and two that are also written together, and read together.
const KEYS: [&str; 6] = ["a", "b", "c", "d", "left", "right"];
const PAIR: [&str; 2] = ["left", "right"];

/// The next request of a client that knows of these revisions of keys; `value` gives one that no other request has.
pub fn choose(rng: &mut StdRng, known: &BTreeMap<String, i64>, value: impl Fn() -> u64) -> Request {
    let key = *KEYS.choose(rng).expect("not empty");
    match rng.random_range(0..100) {
        0..25 => Request::get(key),
        25..35 => Request { serializable: true, ..Request::get(key) },
        35..40 => Request { reads: PAIR.map(String::from).into(), serializable: rng.random_ratio(1, 4), ..Request::default() },
        40..62 => Request::put(key, value()),
        62..70 => Request::delete(key),
        70..77 => {
            // At times one of the pair is deleted: not both, see `checkers/log.rs`.
            let (value, is_half) = (value(), rng.random_ratio(1, 6));
            let change = |key| Change { key: String::from(key), value: (key == PAIR[0] || !is_half).then_some(value) };
            Request { writes: PAIR.map(change).into(), ..Request::default() }
        }
        _ => Request::swap(key, known.get(key).copied().unwrap_or(0), value()),
    }
}

pub fn revision(header: Option<ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

pub fn put(key: &str, value: u64, lease: i64) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_string().into(), lease, ..Default::default() }
}

pub fn delete(key: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }
}

pub fn range(key: &str, serializable: bool) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), serializable, ..Default::default() }
}

/// Any request as a Txn.
pub fn txn(request: &Request) -> TxnRequest {
    let op = |request| RequestOp { request: Some(request) };
    let reads = || request.reads.iter().map(|key| op(Union::RequestRange(range(key, request.serializable))));
    let writes = request.writes.iter().map(|change| match change.value {
        Some(value) => op(Union::RequestPut(put(&change.key, value, request.lease))),
        None => op(Union::RequestDeleteRange(delete(&change.key))),
    });
    let compare = request.guard.iter().map(|(key, modified)| Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Mod as i32,
        key: key.clone().into(),
        target_union: Some(TargetUnion::ModRevision(*modified)),
        ..Default::default()
    });
    TxnRequest { compare: compare.collect(), success: writes.chain(reads()).collect(), failure: reads().collect() }
}

/// The answer to such a Txn.
pub fn answer_of(answer: TxnResponse, found: impl Fn(&RangeResponse) -> Option<Item>) -> Answer {
    let mut deleted = 0;
    let mut seen = Vec::new();
    for one in answer.responses {
        match one.response.expect("each operation has its answer") {
            Reply::ResponseRange(answer) => seen.push(found(&answer)),
            Reply::ResponseDeleteRange(answer) => deleted += answer.deleted,
            Reply::ResponsePut(_) | Reply::ResponseTxn(_) => {}
        }
    }
    Answer { revision: revision(answer.header), applied: answer.succeeded, deleted, found: seen }
}
