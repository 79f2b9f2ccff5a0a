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

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

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
pub(crate) const ANSWER_BYTES_MAX: usize = 48 << 20;

/// Pairs that an answer may have without being measured beforehand: each is as large as a request at most.
const PAIRS_UNMEASURED: usize = 32;

/// What evaluating one Txn may cost in all: a key that is looked at counts 1, a record that is read [`READ_COST`]. About a
/// second of work; a Txn that needs more is refused as having too many operations before it has changed anything. Its place in
/// the log makes every member refuse it alike.
const WORK_MAX: usize = 8 << 20;

/// What a record that is read counts, beside the key that was looked at.
pub(super) const READ_COST: usize = 8;

/// What is left of the bounds on one Txn.
pub(super) struct Budget {
    work: usize,
    bytes: usize,
}

impl Budget {
    fn new() -> Budget {
        Budget { work: WORK_MAX, bytes: ANSWER_BYTES_MAX }
    }

    /// Takes work from what is left.
    pub(super) fn work(&mut self, work: usize) -> Result<()> {
        let left = self.work.checked_sub(work);
        // What was too much has been done all the same, up to the bound.
        self.work = left.unwrap_or(0);
        left.map(drop).ok_or_else(|| ApplyError::TooManyOps.into())
    }

    /// Takes bytes of the answer from what is left.
    pub(super) fn answer(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(ApplyError::ResponseTooLarge)?;
        Ok(())
    }
}

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
    /// What evaluating Txns has cost; see [`WORK_MAX`].
    pub work: u64,
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
        self.work += other.work;
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

/// A set of keys: single ones, and spans, of which no two touch. To add one and to ask for one takes logarithmic time,
/// however a request has arranged them.
#[derive(Default)]
pub(super) struct KeySet<'a> {
    pub(super) keys: BTreeSet<&'a [u8]>,
    /// First key, and the end, exclusive; none: to the last key there is.
    spans: BTreeMap<&'a [u8], Option<&'a [u8]>>,
}

impl<'a> KeySet<'a> {
    pub(super) fn add_span(&mut self, mut start: &'a [u8], mut end: Option<&'a [u8]>) {
        if end.is_some_and(|end| end <= start) {
            return;
        }
        let later = |a: Option<&'a [u8]>, b: Option<&'a [u8]>| Some(a?.max(b?));
        if let Some((&first, &last)) = self.spans.range(..=start).next_back()
            && last.is_none_or(|last| last >= start)
        {
            (start, end) = (first, later(end, last));
        }
        while let Some((&first, &last)) = self.spans.range(start..).next()
            && end.is_none_or(|end| first <= end)
        {
            self.spans.remove(first);
            end = later(end, last);
        }
        self.spans.insert(start, end);
    }

    fn extend(&mut self, other: KeySet<'a>) {
        self.keys.extend(other.keys);
        for (start, end) in other.spans {
            self.add_span(start, end);
        }
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        let within = |(_, end): (&&[u8], &Option<&[u8]>)| end.is_none_or(|end| key < end);
        self.keys.contains(key) || self.spans.range(..=key).next_back().is_some_and(within)
    }
}

/// Keys that a list of operations puts, and those that it deletes.
#[derive(Default)]
struct Writes<'a> {
    puts: BTreeSet<&'a Bytes>,
    deleted: KeySet<'a>,
}

impl Writes<'_> {
    fn deletes(&self, key: &Bytes) -> bool {
        self.deleted.contains(key)
    }
}

/// What the operations write, unless two of them write one key. Deletes may overlap each other, and of one nested Txn only
/// one of the two branches is ever taken.
fn writes(ops: &[RequestOp]) -> Result<Writes<'_>, ApplyError> {
    let mut all = Writes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            match &delete.range_end[..] {
                b"" => _ = all.deleted.keys.insert(&delete.key),
                // An end of one zero byte is to etcd, here alone, what it says: no key is below it. See the module's head.
                end => all.deleted.add_span(&delete.key, Some(end)),
            }
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
        all.deleted.extend(then.deleted);
        all.deleted.extend(otherwise.deleted);
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
        let mut budget = Budget::new();
        let (key, range_end, at) = (&request.key, &request.range_end, writer.at());
        if count_range(writer, &KeyRange::new(key, range_end), usize::MAX, at, &mut budget)? > PAIRS_UNMEASURED {
            measure_now(writer, key, range_end, &mut budget)?;
        }
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
    let mut budget = Budget::new();
    let response = txn_within(writer, request, lease_exists, &mut budget);
    writer.tally.work += (WORK_MAX - budget.work) as u64;
    response
}

fn txn_within(
    writer: &mut Writer<'_>,
    request: &TxnRequest,
    lease_exists: &dyn Fn(i64) -> bool,
    budget: &mut Budget,
) -> Result<TxnResponse> {
    let mut path = Vec::new();
    compare(writer, request, &mut path, budget)?;
    if !is_read_only(request) {
        check_puts(writer, request, &mut path.iter(), &mut KeySet::default(), lease_exists)?;
    }
    check_ranges(writer, request, &mut path.iter())?;
    if !is_read_only(request) {
        // etcd compares in a transaction of its own when it is going to write.
        writer.tally.end_txn();
    }
    if count(writer, request, &mut path.iter(), budget)? > PAIRS_UNMEASURED {
        measure(writer, request, &mut path.iter(), budget)?;
    }
    let mut response = execute(writer, request, &mut path.iter())?;
    response.header = header(writer.at());
    Ok(response)
}

/// Evaluates the compares of the Txn and of those nested in the branches taken, in the order in which they are met.
fn compare(writer: &mut Writer<'_>, txn: &TxnRequest, path: &mut Vec<bool>, budget: &mut Budget) -> Result<()> {
    let mut holds = true;
    for one in &txn.compare {
        writer.tally.ranges += 1;
        if !compare_one(writer, one, budget)? {
            holds = false;
            break;
        }
    }
    path.push(holds);
    for op in branch(txn, holds) {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            compare(writer, nested, path, budget)?;
        }
    }
    Ok(())
}

fn branch(txn: &TxnRequest, holds: bool) -> &[RequestOp] {
    if holds { &txn.success } else { &txn.failure }
}

/// Whether a compare holds: for every key of its range, or for what a missing key is taken to be.
fn compare_one(writer: &Writer<'_>, compare: &Compare, budget: &mut Budget) -> Result<bool> {
    let target = CompareTarget::try_from(compare.target);
    let mut check = |found: Found| {
        if target != Ok(CompareTarget::Value) {
            return Ok(found.meta.is_some_and(|meta| holds(compare, target, meta, found.revision.main)));
        }
        budget.work(READ_COST)?;
        let kv = writer.fetch(found)?.decode().map_err(|_| writer.damaged(&compare.key))?;
        let wanted = match &compare.target_union {
            Some(TargetUnion::Value(value)) => value.as_ref(),
            _ => b"",
        };
        Ok(ordering(compare, kv.value.as_ref().cmp(wanted)))
    };
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let (start, end) = match &range {
        KeyRange::Key(key) => match writer.current(key) {
            Some(found) => return check(found),
            None => (key, Bound::Before(key)),
        },
        KeyRange::Span(start, end) => (start, Bound::Before(end)),
        KeyRange::From(start) => (start, Bound::Unbounded),
    };
    let (mut looked_at, mut all_hold) = (0, true);
    // Keys that are there alone: how many others the index still has depends on how far this member's compaction has come.
    for found in writer.state.index.range(start, end).filter_map(|(_, entry)| entry.current()) {
        looked_at += 1;
        all_hold = check(found)?;
        if !all_hold || looked_at > WORK_MAX {
            break;
        }
    }
    budget.work(looked_at)?;
    let is_empty = looked_at == 0;
    // No value is like that of a key that does not exist; its numbers are all 0.
    let missing = Meta { created: 0, version: 0, lease: 0 };
    Ok(if is_empty { target != Ok(CompareTarget::Value) && holds(compare, target, missing, 0) } else { all_hold })
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
fn check_puts<'a>(
    writer: &mut Writer<'_>,
    txn: &'a TxnRequest,
    path: &mut std::slice::Iter<'_, bool>,
    deleted: &mut KeySet<'a>,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<(), ApplyError> {
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        match &op.request {
            Some(Request::RequestPut(put)) => {
                if put.ignore_value || put.ignore_lease {
                    writer.tally.ranges += 1;
                    if deleted.contains(&put.key) || writer.current(&put.key).is_none() {
                        return Err(ApplyError::KeyNotFound);
                    }
                }
                if put.lease != 0 && !lease_exists(put.lease) {
                    return Err(ApplyError::LeaseNotFound);
                }
            }
            Some(Request::RequestDeleteRange(delete)) => match &delete.range_end[..] {
                b"" => _ = deleted.keys.insert(&delete.key),
                b"\0" => deleted.add_span(&delete.key, None),
                end => deleted.add_span(&delete.key, Some(end)),
            },
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

/// How many pairs the answers of the branches taken can have, as the state is before the Txn. What the Txn itself writes is left
/// out, here and below: it came in one request, and is small against the bound.
fn count(writer: &Writer<'_>, txn: &TxnRequest, path: &mut std::slice::Iter<'_, bool>, budget: &mut Budget) -> Result<usize> {
    let mut pairs = 0;
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        pairs += match &op.request {
            Some(Request::RequestRange(range)) if !range.count_only => {
                let at = if range.revision <= 0 { writer.at() } else { range.revision };
                let limit = usize::try_from(range.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
                // A sort or a filter looks at the whole range, whatever the limit.
                let looks = if RangeScan::new(range, at, 0).selects() { usize::MAX } else { limit };
                count_range(writer, &KeyRange::new(&range.key, &range.range_end), looks, at, budget)?.min(limit)
            }
            Some(Request::RequestDeleteRange(delete)) if delete.prev_kv => {
                count_range(writer, &KeyRange::new(&delete.key, &delete.range_end), usize::MAX, writer.at(), budget)?
            }
            Some(Request::RequestPut(put)) => usize::from(put.prev_kv),
            Some(Request::RequestTxn(nested)) => count(writer, nested, path, budget)?,
            _ => 0,
        };
    }
    Ok(pairs)
}

/// Counts the keys of a range as they were at a revision, up to `limit`. Each of them is work; keys that were not there then are not, for
/// how many of them the index still has depends on how far this member's compaction has come, and the outcome must not.
fn count_range(writer: &Writer<'_>, range: &KeyRange, limit: usize, at: i64, budget: &mut Budget) -> Result<usize> {
    let (start, end) = match range {
        // What a single key costs is the operation's own share.
        KeyRange::Key(_) => return Ok(1),
        KeyRange::Span(start, end) => (start, Bound::Before(end)),
        KeyRange::From(start) => (start, Bound::Unbounded),
    };
    let found = writer.state.index.range(start, end).filter(|(_, entry)| entry.at(at).is_some());
    let count = found.take(limit.min(WORK_MAX)).count();
    // Once here, once when it is measured, once when it is answered.
    budget.work(3 * count)?;
    Ok(count)
}

/// Adds up what the answers of the branches taken will hold, and refuses too much.
fn measure(writer: &Writer<'_>, txn: &TxnRequest, path: &mut std::slice::Iter<'_, bool>, budget: &mut Budget) -> Result<()> {
    for op in branch(txn, path.next().copied().unwrap_or(false)) {
        match &op.request {
            Some(Request::RequestRange(range)) if !range.count_only => {
                let at = if range.revision <= 0 { writer.at() } else { range.revision };
                RangeScan::new(range, at, 0).measure_in(writer, budget)?;
            }
            Some(Request::RequestDeleteRange(delete)) if delete.prev_kv => {
                measure_now(writer, &delete.key, &delete.range_end, budget)?;
            }
            Some(Request::RequestPut(put)) if put.prev_kv => {
                measure_now(writer, &put.key, &Bytes::new(), budget)?;
            }
            Some(Request::RequestTxn(nested)) => measure(writer, nested, path, budget)?,
            _ => {}
        }
    }
    Ok(())
}

/// Takes the size of each pair that a range has now from what is left.
fn measure_now(writer: &Writer<'_>, key: &Bytes, range_end: &Bytes, budget: &mut Budget) -> Result<()> {
    let request = RangeRequest { key: key.clone(), range_end: range_end.clone(), ..RangeRequest::default() };
    RangeScan::new(&request, writer.at(), 0).measure_in(writer, budget)
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
