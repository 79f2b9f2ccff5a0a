//! What clients of a cluster under test ask for, and how a history's requests look in etcd's messages. For tests that have `checkers`.

use std::collections::BTreeMap;

use quorate::proto::EncodedKv;
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::request_op::Request as Union;
use quorate::proto::etcdserverpb::response_op::Response as Reply;
use quorate::proto::etcdserverpb::watch_create_request::FilterType;
use quorate::proto::etcdserverpb::*;
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::checkers::history::{Answer, Change, Item, Key, Request};
use crate::checkers::watch::Scope;

/// Keys that requests name one by one, and two that are also written together, and read together.
const KEYS: [&str; 6] = ["a", "b", "c", "d", "left", "right"];
const PAIR: [&str; 2] = ["left", "right"];

/// Spans to read: one with the single keys, one with one of the pair and what leases hold, and almost everything.
const SPANS: [(&str, &str); 3] = [("a", "e"), ("l", "m"), ("a", "zz")];

/// What watchers besides those of everything ask for.
pub const SCOPES: [Scope; 3] = [Scope::Key("a"), Scope::Prefix("l"), Scope::Deletions("")];

/// The next request of a client that knows of these revisions of keys; `value` gives one that no other request has.
pub fn choose(rng: &mut StdRng, known: &BTreeMap<String, i64>, value: impl Fn() -> u64) -> Request {
    let key = *KEYS.choose(rng).expect("not empty");
    match rng.random_range(0..100) {
        0..15 => Request::get(key),
        15..20 => {
            let span = *SPANS.choose(rng).expect("not empty");
            let span = Some((span.0.to_owned(), span.1.to_owned()));
            Request { span, serializable: rng.random_ratio(1, 4), ..Request::default() }
        }
        20..25 => {
            // Some revision that the client has heard of; none: what it holds.
            let at = known.values().copied().filter(|revision| *revision > 0).choose(rng).unwrap_or(0);
            Request { at, serializable: rng.random_ratio(1, 4), ..Request::get(key) }
        }
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

/// A request that reads one key or a span, and does nothing else.
pub fn read(request: &Request) -> Option<RangeRequest> {
    if request.guard.is_some() || !request.writes.is_empty() {
        return None;
    }
    let (from, to) = match (&request.span, &request.reads[..]) {
        (Some((from, to)), []) => (from.as_str(), to.clone()),
        (None, [key]) => (key.as_str(), String::new()),
        _ => return None,
    };
    Some(RangeRequest { range_end: to.into(), revision: request.at, ..range(from, request.serializable) })
}

/// The answer to such a read.
pub fn answer_of_read(request: &Request, answer: &RangeResponse, decode: impl Fn(&EncodedKv) -> (Key, Item)) -> Answer {
    let mut pairs: Vec<(Key, Item)> = answer.kvs.iter().map(decode).collect();
    assert!(answer.count == pairs.len() as i64 && !answer.more, "{} of {} keys, more: {}", pairs.len(), answer.count, answer.more);
    let told = Answer { revision: revision(answer.header), applied: true, ..Answer::default() };
    match request.span {
        Some(_) => Answer { span: pairs, ..told },
        None => Answer { found: vec![pairs.pop().map(|(_, item)| item)], ..told },
    }
}

/// A watch with bookmarks and with what keys held before.
pub fn watch(scope: Scope, start_revision: i64) -> WatchCreateRequest {
    let (key, range_end) = match scope {
        Scope::All | Scope::Deletions("") => (vec![0], vec![0]),
        Scope::Key(key) => (key.into(), Vec::new()),
        Scope::Prefix(prefix) | Scope::Deletions(prefix) => {
            let mut end = prefix.as_bytes().to_vec();
            *end.last_mut().expect("no prefix is all keys") += 1;
            (prefix.into(), end)
        }
    };
    let filters = if matches!(scope, Scope::Deletions(_)) { vec![FilterType::Noput as i32] } else { Vec::new() };
    let (key, range_end) = (key.into(), range_end.into());
    WatchCreateRequest { key, range_end, start_revision, filters, progress_notify: true, prev_kv: true, ..Default::default() }
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
    Answer { revision: revision(answer.header), applied: answer.succeeded, deleted, found: seen, ..Answer::default() }
}
