//! Put, DeleteRange and Txn: what they check, in etcd's order, and what they do.
//!
//! A request is checked three times. *By itself*, before anything is proposed ([`check_put`] and its siblings): a request
//! that can never succeed costs no log entry. *Against the state*, when its turn has come and before it changes anything
//! ([`txn`] walks the branches it will take): so that a Txn happens whole or leaves no trace. And *by construction*: the
//! steps that write cannot fail any more.
//!
//! ```text
//! txn  if version(a) > 0             compared with the state before the Txn, nested ones too
//!      then put b=1                  3.0
//!           delete c                 3.1    (a tombstone, if c is there)
//!           range a..z               sees b=1 and no c
//!      else get a
//! ```
//!
//! # Caveats
//! - Two ops may write one key in one case only: a delete up to the end of all keys (`range_end` of one zero byte), then
//!   a put of a key of that range. etcd's check of overlaps does not see it, so it is part of the API. The put then meets
//!   a key that is gone, and with `ignore_value` or `ignore_lease` there is nothing to take over: `key not found`.
//! - Responses within a Txn have a header with the revision alone, as in etcd.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;

use crate::error::{ApplyError, Result};
use crate::metrics::Counters;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseHeader,
    ResponseOp, TxnRequest, TxnResponse,
};

use super::index::{Found, Meta};
use super::range::{self, RangeScan};
use super::tree::Bound;
use super::{KeyRange, Writer};

/// Txns may stand within Txns this deep; a deeper one is refused as having too many operations. Decoding a message stops
/// at a depth of 100, at two levels for each Txn and some for the log entry around it, and what is written to the log has
/// to be read back from it.
pub(crate) const NESTING_MAX: usize = 32;

/// Bytes of pairs that the answer to one Txn or DeleteRange may have. They are held in memory until it is sent, and unlike
/// those of a Range cannot be fetched a second time; a request that asks for more is refused before it has changed anything.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What requests have done, as etcd counts it: a Txn's operations like those that stand alone, a compare as a Range, a
/// DeleteRange as one, however many keys it deletes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub puts: u64,
    pub deletes: u64,
    pub ranges: u64,
    pub txns: u64,
    /// Keys and values of the puts, in bytes.
    pub put_bytes: u64,
    /// Where the transaction under way began: puts, deletes and ranges before it.
    before: u64,
}

impl Tally {
    /// Ends what etcd takes for one transaction of its store. Only one that did more than one thing counts as such: a Put
    /// that returns the previous pair, but not a Txn of one Put.
    pub fn end_txn(&mut self) {
        let done = self.puts + self.deletes + self.ranges;
        self.txns += u64::from(done - self.before > 1);
        self.before = done;
    }

    /// Adds what another request has done.
    pub fn add(&mut self, other: &Tally) {
        self.puts += other.puts;
        self.deletes += other.deletes;
        self.ranges += other.ranges;
        self.txns += other.txns;
        self.put_bytes += other.put_bytes;
        self.before = self.puts + self.deletes + self.ranges;
    }

    /// Counts it all.
    pub fn count(&self, counters: &Counters) {
        for (counter, count) in [
            (&counters.puts, self.puts),
            (&counters.deletes, self.deletes),
            (&counters.ranges, self.ranges),
            (&counters.txns, self.txns),
            (&counters.put_bytes, self.put_bytes),
        ] {
            if count > 0 {
                counter.add(count);
            }
        }
    }
}

/// Checks what can be checked of a Put without the state.
pub(crate) fn check_put(put: &PutRequest) -> Result<(), ApplyError> {
    if put.key.is_empty() {
        Err(ApplyError::EmptyKey)
    } else if put.ignore_value && !put.value.is_empty() {
        Err(ApplyError::ValueProvided)
    } else if put.ignore_lease && put.lease != 0 {
        Err(ApplyError::LeaseProvided)
    } else {
        Ok(())
    }
}

/// Checks what can be checked of a DeleteRange without the state.
pub(crate) fn check_delete(delete: &DeleteRangeRequest) -> Result<(), ApplyError> {
    if delete.key.is_empty() { Err(ApplyError::EmptyKey) } else { Ok(()) }
}

/// Checks what can be checked of a Txn without the state.
pub(crate) fn check_txn(txn: &TxnRequest, max_ops: usize) -> Result<(), ApplyError> {
    check_ops(txn, max_ops, NESTING_MAX)?;
    writes(&txn.success)?;
    writes(&txn.failure)?;
    Ok(())
}

fn check_ops(txn: &TxnRequest, max_ops: usize, depth: usize) -> Result<(), ApplyError> {
    let ops = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    let Some(left) = max_ops.checked_sub(ops) else { return Err(ApplyError::TooManyOps) };
    let Some(depth) = depth.checked_sub(1) else { return Err(ApplyError::TooManyOps) };
    if txn.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(ApplyError::EmptyKey);
    }
    txn.success.iter().chain(&txn.failure).try_for_each(|op| match &op.request {
        Some(Request::RequestRange(request)) => range::check(request),
        Some(Request::RequestPut(request)) => check_put(request),
        Some(Request::RequestDeleteRange(request)) => check_delete(request),
        Some(Request::RequestTxn(request)) => check_ops(request, left, depth),
        // An operation without content; etcd answers as if its key were not there.
        None => Err(ApplyError::KeyNotFound),
    })
}

/// Keys that a list of operations puts, and ranges that it deletes.
#[derive(Default)]
struct Writes<'a> {
    puts: BTreeSet<&'a Bytes>,
    /// First key and end, exclusive; no end for a single key.
    deletes: Vec<(&'a Bytes, &'a Bytes)>,
}

impl Writes<'_> {
    fn deletes(&self, key: &Bytes) -> bool {
        self.deletes.iter().any(|&(start, end)| if end.is_empty() { start == key } else { start <= key && key < end })
    }
}

/// What the operations write, unless two of them write one key. Deletes may overlap each other, and of one nested Txn only
/// one of the two branches is ever taken.
fn writes(ops: &[RequestOp]) -> Result<Writes<'_>, ApplyError> {
    let mut all = Writes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            all.deletes.push((&delete.key, &delete.range_end));
        }
    }
    for op in ops {
        let Some(Request::RequestTxn(txn)) = &op.request else { continue };
        let then = writes(&txn.success)?;
        let otherwise = writes(&txn.failure)?;
        for key in &then.puts {
            if all.puts.contains(key) || all.deletes(key) {
                return Err(ApplyError::DuplicateKey);
            }
        }
        for key in &otherwise.puts {
            if all.puts.contains(key) || all.deletes(key) {
                return Err(ApplyError::DuplicateKey);
            }
        }
        all.puts.extend(then.puts);
        all.puts.extend(otherwise.puts);
        all.deletes.extend(then.deletes);
        all.deletes.extend(otherwise.deletes);
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request
            && (all.deletes(&put.key) || !all.puts.insert(&put.key))
        {
            return Err(ApplyError::DuplicateKey);
        }
    }
    Ok(all)
}

/// Whether the Txn can only read: no writes, and no Txn within it.
pub(crate) fn is_read_only(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

/// Whether all reads of a read-only Txn are content with what this member has.
pub(crate) fn is_serializable(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).all(|op| matches!(&op.request, Some(Request::RequestRange(range)) if range.serializable))
}

/// Whether the Txn may put something, and with it need space.
pub(crate) fn may_put(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(txn)) => may_put(txn),
        _ => false,
    })
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// Carries out a Put that stands alone.
pub(crate) fn put(writer: &mut Writer<'_>, request: &PutRequest, lease_exists: &dyn Fn(i64) -> bool) -> Result<PutResponse> {
    if request.lease != 0 && !lease_exists(request.lease) {
        return Err(ApplyError::LeaseNotFound.into());
    }
    if (request.ignore_value || request.ignore_lease) && writer.current(&request.key).is_none() {
        writer.tally.ranges += 1;
        return Err(ApplyError::KeyNotFound.into());
    }
    do_put(writer, request)
}

/// Puts; what `ignore_value` and `ignore_lease` need has been seen to be there.
fn do_put(writer: &mut Writer<'_>, request: &PutRequest) -> Result<PutResponse> {
    let before = writer.current(&request.key);
    writer.tally.ranges += u64::from(request.prev_kv || request.ignore_value || request.ignore_lease);
    let prev = match before {
        Some(found) if request.prev_kv || request.ignore_value => Some(writer.fetch(found)?),
        _ => None,
    };
    let value = match &prev {
        Some(kv) if request.ignore_value => kv.decode().map_err(|_| writer.damaged(&request.key))?.value,
        _ => request.value.clone(),
    };
    let lease = match before {
        Some(Found { meta: Some(Meta { lease, .. }), .. }) if request.ignore_lease => lease,
        _ => request.lease,
    };
    writer.put(&request.key, &value, lease);
    Ok(PutResponse { header: header(writer.at()), prev_kv: prev.filter(|_| request.prev_kv) })
}

/// Carries out a DeleteRange that stands alone.
pub(crate) fn delete_range(writer: &mut Writer<'_>, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse> {
    if request.prev_kv {
        measure_range(writer, &KeyRange::new(&request.key, &request.range_end), usize::MAX, writer.at(), &mut ANSWER_BYTES_MAX.clone())?;
    }
    do_delete_range(writer, request)
}

/// Deletes, alone or in a Txn.
fn do_delete_range(writer: &mut Writer<'_>, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse> {
    let found = writer.find(&KeyRange::new(&request.key, &request.range_end));
    writer.tally.deletes += 1;
    let mut prev_kvs = Vec::new();
    if request.prev_kv {
        writer.tally.ranges += 1;
        prev_kvs.reserve(found.len());
        for (_, found) in &found {
            prev_kvs.push(writer.fetch(*found)?);
        }
    }
    for (key, _) in &found {
        writer.delete(key);
    }
    let deleted = i64::try_from(found.len()).unwrap_or(i64::MAX);
    Ok(DeleteRangeResponse { header: header(writer.at()), deleted, prev_kvs })
}

/// Carries out a Range within a Txn.
fn range_in(writer: &mut Writer<'_>, request: &RangeRequest) -> Result<RangeResponse> {
    writer.tally.ranges += 1;
    let newest = writer.at();
    // A revision below 0 means the newest, and one below the compaction was refused before the first write.
    let at = if request.revision <= 0 { newest } else { request.revision };
    let result = RangeScan::new(request, at, usize::MAX).run_in(writer)?;
    let kvs = result.hits.into_iter().filter_map(|hit| hit.kv).collect();
    Ok(RangeResponse { header: header(newest), kvs, more: result.more, count: result.count })
}

/// Carries out a Txn: compares, checks the branches it takes, and only then executes them.
pub(crate) fn txn(writer: &mut Writer<'_>, request: &TxnRequest, lease_exists: &dyn Fn(i64) -> bool) -> Result<TxnResponse> {
    let mut path = Vec::new();
    compare(writer, request, &mut path)?;
    if !is_read_only(request) {
        check_puts(writer, request, &mut path.iter(), &mut Vec::new(), lease_exists)?;
    }
    check_ranges(writer, request, &mut path.iter())?;
    if !is_read_only(request) {
        // etcd compares in a transaction of its own when it is going to write.
        writer.tally.end_txn();
    }
    measure(writer, request, &mut path.iter(), &mut ANSWER_BYTES_MAX.clone())?;
    let mut response = execute(writer, request, &mut path.iter())?;
    response.header = header(writer.at());
    Ok(response)
}

/// Evaluates the compares of the Txn and of those nested in the branches taken, in the order in which they are met.
fn compare(writer: &mut Writer<'_>, txn: &TxnRequest, path: &mut Vec<bool>) -> Result<()> {
    let mut holds = true;
    for one in &txn.compare {
        writer.tally.ranges += 1;
        if !compare_one(writer, one)? {
            holds = false;
            break;
        }
    }
    path.push(holds);
    for op in branch(txn, holds) {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            compare(writer, nested, path)?;
        }
    }
    Ok(())
}

fn branch(txn: &TxnRequest, holds: bool) -> &[RequestOp] {
    if holds { &txn.success } else { &txn.failure }
}

/// Whether a compare holds: for every key of its range, or for what a missing key is taken to be.
fn compare_one(writer: &Writer<'_>, compare: &Compare) -> Result<bool> {
    let target = CompareTarget::try_from(compare.target);
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let found = match &range {
        KeyRange::Key(key) => writer.current(key).map(|found| (Bytes::new(), found)).into_iter().collect(),
        range => writer.find(range),
    };
    if found.is_empty() {
        // No value is like that of a key that does not exist; its numbers are all 0.
        return Ok(target != Ok(CompareTarget::Value) && holds(compare, target, Meta { created: 0, version: 0, lease: 0 }, 0));
    }
    for (_, found) in found {
        let holds = if target == Ok(CompareTarget::Value) {
            let kv = writer.fetch(found)?.decode().map_err(|_| writer.damaged(&compare.key))?;
            let wanted = match &compare.target_union {
                Some(TargetUnion::Value(value)) => value.as_ref(),
                _ => b"",
            };
            ordering(compare, kv.value.as_ref().cmp(wanted))
        } else {
            found.meta.is_some_and(|meta| holds(compare, target, meta, found.revision.main))
        };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Compares a number of a key with the one given; a union of another kind than the target counts as 0.
fn holds(compare: &Compare, target: Result<CompareTarget, prost::UnknownEnumValue>, meta: Meta, modified: i64) -> bool {
    let (has, wanted) = match (target, &compare.target_union) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(wanted))) => (meta.version, *wanted),
        (Ok(CompareTarget::Version), _) => (meta.version, 0),
        (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(wanted))) => (meta.created, *wanted),
        (Ok(CompareTarget::Create), _) => (meta.created, 0),
        (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(wanted))) => (modified, *wanted),
        (Ok(CompareTarget::Mod), _) => (modified, 0),
        (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(wanted))) => (meta.lease, *wanted),
        (Ok(CompareTarget::Lease), _) => (meta.lease, 0),
        // etcd compares nothing with nothing for a target that it does not know.
        (Ok(CompareTarget::Value) | Err(_), _) => (0, 0),
    };
    ordering(compare, has.cmp(&wanted))
}

fn ordering(compare: &Compare, ordering: std::cmp::Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        // etcd holds a relation that it does not know for true.
        Err(_) => true,
    }
}

/// Checks the puts of the branches taken: the key that `ignore_*` relies on, and the lease. `deleted` collects the ranges
/// that are gone by then.
fn check_puts(
    writer: &mut Writer<'_>,
    txn: &TxnRequest,
    path: &mut std::slice::Iter<'_, bool>,
    deleted: &mut Vec<KeyRange>,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<(), ApplyError> {
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        match &op.request {
            Some(Request::RequestPut(put)) => {
                if put.ignore_value || put.ignore_lease {
                    writer.tally.ranges += 1;
                    let gone = deleted.iter().any(|range| range.contains(&put.key));
                    if gone || writer.current(&put.key).is_none() {
                        return Err(ApplyError::KeyNotFound);
                    }
                }
                if put.lease != 0 && !lease_exists(put.lease) {
                    return Err(ApplyError::LeaseNotFound);
                }
            }
            Some(Request::RequestDeleteRange(delete)) => deleted.push(KeyRange::new(&delete.key, &delete.range_end)),
            Some(Request::RequestTxn(nested)) => check_puts(writer, nested, path, deleted, lease_exists)?,
            Some(Request::RequestRange(_)) | None => {}
        }
    }
    Ok(())
}

/// Checks the revisions that the ranges of the branches taken read at.
fn check_ranges(writer: &Writer<'_>, txn: &TxnRequest, path: &mut std::slice::Iter<'_, bool>) -> Result<(), ApplyError> {
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        match &op.request {
            Some(Request::RequestRange(range)) => writer.check_in_txn(range.revision)?,
            Some(Request::RequestTxn(nested)) => check_ranges(writer, nested, path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Adds up what the answers of the branches taken will hold, as the state is before the Txn, and refuses too much. What the
/// Txn itself writes is left out: it came in one request, and is small against the bound.
fn measure(writer: &Writer<'_>, txn: &TxnRequest, path: &mut std::slice::Iter<'_, bool>, left: &mut usize) -> Result<()> {
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        match &op.request {
            Some(Request::RequestRange(range)) if !range.count_only && !range.keys_only => {
                let at = if range.revision <= 0 { writer.at() } else { range.revision };
                let limit = usize::try_from(range.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
                measure_range(writer, &KeyRange::new(&range.key, &range.range_end), limit, at, left)?;
            }
            Some(Request::RequestDeleteRange(delete)) if delete.prev_kv => {
                measure_range(writer, &KeyRange::new(&delete.key, &delete.range_end), usize::MAX, writer.at(), left)?;
            }
            Some(Request::RequestPut(put)) if put.prev_kv => {
                measure_range(writer, &KeyRange::Key(put.key.clone()), 1, writer.at(), left)?;
            }
            Some(Request::RequestTxn(nested)) => measure(writer, nested, path, left)?,
            _ => {}
        }
    }
    Ok(())
}

/// Takes the size of each pair of a range from what is `left`, up to `limit` pairs.
fn measure_range(writer: &Writer<'_>, range: &KeyRange, limit: usize, at: i64, left: &mut usize) -> Result<()> {
    let (start, end) = match range {
        KeyRange::Key(key) => {
            if let Some(found) = writer.state.index.get(key).and_then(|entry| entry.at(at)) {
                take(left, writer.fetch(found)?.encoded_len())?;
            }
            return Ok(());
        }
        KeyRange::Span(start, end) => (start, Bound::Before(end)),
        KeyRange::From(start) => (start, Bound::Unbounded),
    };
    let found = writer.state.index.range(start, end).filter_map(|(_, entry)| entry.at(at));
    for found in found.take(limit) {
        take(left, writer.fetch(found)?.encoded_len())?;
    }
    Ok(())
}

fn take(left: &mut usize, bytes: usize) -> Result<()> {
    *left = left.checked_sub(bytes).ok_or(ApplyError::ResponseTooLarge)?;
    Ok(())
}

fn execute(writer: &mut Writer<'_>, txn: &TxnRequest, path: &mut std::slice::Iter<'_, bool>) -> Result<TxnResponse> {
    let succeeded = path.next().copied().unwrap_or(false);
    let ops = branch(txn, succeeded);
    let mut responses = Vec::with_capacity(ops.len());
    for op in ops {
        let response = match &op.request {
            Some(Request::RequestRange(request)) => Some(Response::ResponseRange(range_in(writer, request)?)),
            Some(Request::RequestPut(request)) => Some(Response::ResponsePut(do_put(writer, request)?)),
            Some(Request::RequestDeleteRange(request)) => Some(Response::ResponseDeleteRange(do_delete_range(writer, request)?)),
            Some(Request::RequestTxn(request)) => Some(Response::ResponseTxn(execute(writer, request, path)?)),
            None => None,
        };
        responses.push(ResponseOp { response });
    }
    Ok(TxnResponse { header: Some(ResponseHeader::default()), succeeded, responses })
}

impl Writer<'_> {
    /// The live keys of a range as this request sees them now.
    fn find(&self, range: &KeyRange) -> Vec<(Bytes, Found)> {
        let (start, end) = match range {
            KeyRange::Key(key) => return self.current(key).map(|found| (key.clone(), found)).into_iter().collect(),
            KeyRange::Span(start, end) => (start, Bound::Before(end)),
            KeyRange::From(start) => (start, Bound::Unbounded),
        };
        let live = self.state.index.range(start, end).filter_map(|(key, entry)| Some((key, entry.current()?)));
        live.map(|(key, found)| (key.to_vec().into(), found)).collect()
    }

    /// Whether a Range of a Txn may read at a revision. Unlike a Range alone, a Txn takes only 0 for the newest.
    fn check_in_txn(&self, at: i64) -> Result<(), ApplyError> {
        if at == 0 {
            Ok(())
        } else if at > self.state.revision {
            Err(ApplyError::FutureRevision)
        } else if at < self.state.compacted {
            Err(ApplyError::Compacted)
        } else {
            Ok(())
        }
    }

    fn damaged(&self, key: &[u8]) -> crate::error::Error {
        let revision = self.state.index.get(key).map(super::index::KeyIndex::revision).unwrap_or_default();
        self.store.history().missing(revision)
    }
}
