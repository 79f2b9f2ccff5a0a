//! A plain twin of the store, and an interpreter that runs the two side by side.
//!
//! The [`Model`] keeps the whole store as a map, once for each revision, and answers by looking at all of it: too slow to
//! use, and easy to believe. [`run`] reads operations out of any bytes, lets the store and the model carry them out, and
//! compares every field of what they answer. In between it does to the store what a member's life does to it: log entries
//! end, records are written out, synced and collected, compactions take a step, the disk is full, the power fails. Watches
//! look on, through queues so small that they are thrown back to the history all the time.
//!
//! ```text
//! bytes   03 00 05 ..    put a/b=10 lease=1      store: revision 7, created 4     model: the same, or panic
//!         0b 02          write out
//!         0f 01          lose power, keep one batch; open again; apply the log from there on: the same answers again
//! ```
//!
//! # What is compared
//! - after each step: revisions, number of keys, the whole newest state, an older one, and [`Store::check`]; that leases
//!   and keys point at each other; that the history holds what reads and watches may still ask for, and nothing unheard of;
//! - of each request: every field of the answer, or the error;
//! - of each watch: that every event comes once, in order, whole, with the previous key-value that belongs to it; and that
//!   a progress response is the truth.
//!
//! # Caveats
//! - The twins share the reading of a request ([`KeyRange`](super::KeyRange) apart) but no code that answers it. Where both
//!   misunderstand etcd they agree: that is what the differential test against etcd is for.
//! - Time plays no part: leases are granted and revoked, and never expire.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::error::ApplyError;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, PutResponse,
    RangeRequest, RangeResponse, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};
use crate::proto::internal::command::Op;
use crate::proto::{EncodedKv, KeyValue};
use crate::storage::Revision;

pub(super) mod both;
mod source;

use both::Both;
use source::Source;

/// Operations of one Txn at most: few, so that the bound is met.
const MAX_OPS: usize = 6;

/// The keys there are, prefixes of each other, with the least and the greatest bytes; and the one that is none.
const KEYS: [&[u8]; 14] = [b"a", b"a\0", b"a/", b"a/b", b"a/b/c", b"a0", b"b", b"ba", b"c", b"d", b"\0", b"\xff", b"\xff\xff", b""];

const LEASES: [i64; 4] = [1, 2, -3, i64::MAX];

/// The store at one revision.
type State = BTreeMap<Bytes, KeyValue>;

/// One write of one key: what the key then is, or nothing when it was deleted.
type Change = (Bytes, Option<KeyValue>);

/// What a request that writes answers.
#[derive(Clone, Debug, PartialEq)]
enum Answer {
    Put(PutResponse),
    Delete(DeleteRangeResponse),
    Txn(TxnResponse),
    Done,
}

/// The store as a list of maps. See the module's head.
struct Model {
    /// The store at each revision, from 1 on, when it is empty.
    states: Vec<State>,
    /// What each of these revisions changed, in order.
    changes: Vec<Vec<Change>>,
    compacted: i64,
    /// All revisions that were ever compacted at.
    compactions: BTreeSet<i64>,
    leases: BTreeSet<i64>,
}

fn within(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        b"" => key == start,
        b"\0" => key >= start,
        _ => key >= start && key < end,
    }
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

fn number(kv: &KeyValue, target: SortTarget) -> i64 {
    match target {
        SortTarget::Version => kv.version,
        SortTarget::Create => kv.create_revision,
        SortTarget::Mod => kv.mod_revision,
        SortTarget::Key | SortTarget::Value => 0,
    }
}

/// A Range over one state; the answer has no header.
fn range_over(state: &State, request: &RangeRequest) -> RangeResponse {
    let mut kvs: Vec<KeyValue> = state.values().filter(|kv| within(&kv.key, &request.key, &request.range_end)).cloned().collect();
    let count = kvs.len() as i64;
    if request.count_only {
        return RangeResponse { count, ..RangeResponse::default() };
    }
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let order = SortOrder::try_from(request.sort_order).unwrap();
    let target = SortTarget::try_from(request.sort_target).unwrap();
    let bounds = [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    if order == SortOrder::None && bounds == [0; 4] && limit > 0 {
        // Without an order etcd fetches what the limit lets through, and one more, and sorts that.
        kvs.truncate(limit.saturating_add(1));
    }
    kvs.retain(|kv| {
        (bounds[0] == 0 || kv.mod_revision >= bounds[0])
            && (bounds[1] == 0 || kv.mod_revision <= bounds[1])
            && (bounds[2] == 0 || kv.create_revision >= bounds[2])
            && (bounds[3] == 0 || kv.create_revision <= bounds[3])
    });
    kvs.sort_by(|a, b| {
        let ascending = match target {
            SortTarget::Key => a.key.cmp(&b.key),
            SortTarget::Value => a.value.cmp(&b.value),
            _ => number(a, target).cmp(&number(b, target)),
        };
        if order == SortOrder::Descend { ascending.reverse() } else { ascending }
    });
    let more = limit > 0 && kvs.len() > limit;
    kvs.truncate(if limit > 0 { limit } else { usize::MAX });
    if request.keys_only {
        kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
    }
    RangeResponse { header: None, kvs: kvs.iter().map(EncodedKv::encode).collect(), more, count }
}

/// Whether a compare holds of a state.
fn holds(compare: &Compare, state: &State) -> bool {
    let target = CompareTarget::try_from(compare.target).ok();
    let result = |ordering: Ordering| match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering == Ordering::Equal,
        Ok(CompareResult::NotEqual) => ordering != Ordering::Equal,
        Ok(CompareResult::Greater) => ordering == Ordering::Greater,
        Ok(CompareResult::Less) => ordering == Ordering::Less,
        Err(_) => true,
    };
    let holds_of = |kv: &KeyValue| {
        let (has, wanted) = match (target, &compare.target_union) {
            (Some(CompareTarget::Value), Some(TargetUnion::Value(value))) => return result(kv.value.cmp(value)),
            (Some(CompareTarget::Value), _) => return result(kv.value.as_ref().cmp(b"")),
            (Some(CompareTarget::Version), Some(TargetUnion::Version(wanted))) => (kv.version, *wanted),
            (Some(CompareTarget::Version), _) => (kv.version, 0),
            (Some(CompareTarget::Create), Some(TargetUnion::CreateRevision(wanted))) => (kv.create_revision, *wanted),
            (Some(CompareTarget::Create), _) => (kv.create_revision, 0),
            (Some(CompareTarget::Mod), Some(TargetUnion::ModRevision(wanted))) => (kv.mod_revision, *wanted),
            (Some(CompareTarget::Mod), _) => (kv.mod_revision, 0),
            (Some(CompareTarget::Lease), Some(TargetUnion::Lease(wanted))) => (kv.lease, *wanted),
            (Some(CompareTarget::Lease), _) => (kv.lease, 0),
            (None, _) => (0, 0),
        };
        result(has.cmp(&wanted))
    };
    let mut found = state.values().filter(|kv| within(&kv.key, &compare.key, &compare.range_end)).peekable();
    match found.peek() {
        None => target != Some(CompareTarget::Value) && holds_of(&KeyValue::default()),
        Some(_) => found.all(holds_of),
    }
}

// What can be refused without the state.

fn check(op: &Op) -> Result<(), ApplyError> {
    match op {
        Op::Put(put) => check_request(&Request::RequestPut(put.clone()), MAX_OPS),
        Op::DeleteRange(delete) => check_request(&Request::RequestDeleteRange(delete.clone()), MAX_OPS),
        Op::Txn(txn) => {
            check_request(&Request::RequestTxn(txn.clone()), MAX_OPS)?;
            written(&txn.success)?;
            written(&txn.failure).map(|_| ())
        }
        _ => Ok(()),
    }
}

fn check_request(request: &Request, budget: usize) -> Result<(), ApplyError> {
    match request {
        Request::RequestRange(range) if range.key.is_empty() => Err(ApplyError::EmptyKey),
        Request::RequestRange(range) if !(0..=2).contains(&range.sort_order) => Err(ApplyError::InvalidSortOption),
        Request::RequestRange(range) if !(0..=4).contains(&range.sort_target) => Err(ApplyError::InvalidSortOption),
        Request::RequestPut(put) if put.key.is_empty() => Err(ApplyError::EmptyKey),
        Request::RequestPut(put) if put.ignore_value && !put.value.is_empty() => Err(ApplyError::ValueProvided),
        Request::RequestPut(put) if put.ignore_lease && put.lease != 0 => Err(ApplyError::LeaseProvided),
        Request::RequestDeleteRange(delete) if delete.key.is_empty() => Err(ApplyError::EmptyKey),
        Request::RequestTxn(txn) => {
            let longest = [txn.compare.len(), txn.success.len(), txn.failure.len()].into_iter().max().unwrap();
            if longest > budget {
                return Err(ApplyError::TooManyOps);
            }
            if txn.compare.iter().any(|compare| compare.key.is_empty()) {
                return Err(ApplyError::EmptyKey);
            }
            for op in txn.success.iter().chain(&txn.failure) {
                check_request(op.request.as_ref().ok_or(ApplyError::KeyNotFound)?, budget - longest)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Keys put and ranges deleted by a list of operations, unless two of them write one key in a way that etcd notices: on
/// each level all deletes come first, then the nested Txns in order, then the puts.
#[allow(clippy::type_complexity)]
fn written(ops: &[RequestOp]) -> Result<(BTreeSet<Bytes>, Vec<(Bytes, Bytes)>), ApplyError> {
    let (mut puts, mut deletes) = (BTreeSet::new(), Vec::new());
    let clash = |key: &Bytes, puts: &BTreeSet<Bytes>, deletes: &[(Bytes, Bytes)]| {
        // A delete from a key on, whose end is one zero byte, looks empty here.
        let deleted = |(start, end): &(Bytes, Bytes)| if end.is_empty() { key == start } else { key >= start && key < end };
        if puts.contains(key) || deletes.iter().any(deleted) { Err(ApplyError::DuplicateKey) } else { Ok(()) }
    };
    let requests = || ops.iter().filter_map(|op| op.request.as_ref());
    for request in requests() {
        if let Request::RequestDeleteRange(delete) = request {
            deletes.push((delete.key.clone(), delete.range_end.clone()));
        }
    }
    for request in requests() {
        if let Request::RequestTxn(txn) = request {
            let (then, otherwise) = (written(&txn.success)?, written(&txn.failure)?);
            then.0.iter().chain(&otherwise.0).try_for_each(|key| clash(key, &puts, &deletes))?;
            for (more_puts, more_deletes) in [then, otherwise] {
                puts.extend(more_puts);
                deletes.extend(more_deletes);
            }
        }
    }
    for request in requests() {
        if let Request::RequestPut(put) = request {
            clash(&put.key, &puts, &deletes)?;
            puts.insert(put.key.clone());
        }
    }
    Ok((puts, deletes))
}

/// A request that writes, on its way.
struct Draft<'a> {
    model: &'a Model,
    state: State,
    changes: Vec<Change>,
}

impl Draft<'_> {
    fn at(&self) -> i64 {
        self.model.newest() + i64::from(!self.changes.is_empty())
    }

    fn put(&mut self, put: &PutRequest, in_txn: bool) -> Result<PutResponse, ApplyError> {
        let before = self.state.get(&put.key).cloned();
        let no_lease = put.lease != 0 && !self.model.leases.contains(&put.lease);
        let no_key = (put.ignore_value || put.ignore_lease) && before.is_none();
        match (no_key, no_lease) {
            (true, true) => return Err(if in_txn { ApplyError::KeyNotFound } else { ApplyError::LeaseNotFound }),
            (true, false) => return Err(ApplyError::KeyNotFound),
            (false, true) => return Err(ApplyError::LeaseNotFound),
            (false, false) => {}
        }
        let main = self.model.newest() + 1;
        let old = before.clone().unwrap_or(KeyValue { create_revision: main, ..KeyValue::default() });
        let kv = KeyValue {
            key: put.key.clone(),
            create_revision: old.create_revision,
            mod_revision: main,
            version: old.version + 1,
            value: if put.ignore_value { old.value } else { put.value.clone() },
            lease: if put.ignore_lease { old.lease } else { put.lease },
        };
        self.state.insert(put.key.clone(), kv.clone());
        self.changes.push((put.key.clone(), Some(kv)));
        Ok(PutResponse { header: header(main), prev_kv: before.filter(|_| put.prev_kv).map(|kv| EncodedKv::encode(&kv)) })
    }

    fn delete(&mut self, delete: &DeleteRangeRequest) -> DeleteRangeResponse {
        let gone: Vec<KeyValue> = self.state.values().filter(|kv| within(&kv.key, &delete.key, &delete.range_end)).cloned().collect();
        for kv in &gone {
            self.state.remove(&kv.key);
            self.changes.push((kv.key.clone(), None));
        }
        let prev_kvs = if delete.prev_kv { gone.iter().map(EncodedKv::encode).collect() } else { Vec::new() };
        DeleteRangeResponse { header: header(self.at()), deleted: gone.len() as i64, prev_kvs }
    }

    /// `heed_ranges`: whether a Range may refuse the Txn.
    fn txn(&mut self, txn: &TxnRequest, before: &State, heed_ranges: bool) -> Result<TxnResponse, ApplyError> {
        let succeeded = txn.compare.iter().all(|compare| holds(compare, before));
        let mut responses = Vec::new();
        for op in if succeeded { &txn.success } else { &txn.failure } {
            let response = match op.request.as_ref().unwrap() {
                Request::RequestPut(put) => Response::ResponsePut(self.put(put, true)?),
                Request::RequestDeleteRange(delete) => Response::ResponseDeleteRange(self.delete(delete)),
                Request::RequestTxn(nested) => Response::ResponseTxn(self.txn(nested, before, heed_ranges)?),
                Request::RequestRange(range) => {
                    let at = range.revision;
                    let refused = if at > self.model.newest() {
                        Some(ApplyError::FutureRevision)
                    } else {
                        (at != 0 && at < self.model.compacted).then_some(ApplyError::Compacted)
                    };
                    let mut response = match refused {
                        Some(err) if heed_ranges => return Err(err),
                        Some(_) => RangeResponse::default(),
                        None if at <= 0 => range_over(&self.state, range),
                        None => range_over(self.model.state(at), range),
                    };
                    response.header = header(self.at());
                    Response::ResponseRange(response)
                }
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        Ok(TxnResponse { header: header(0), succeeded, responses })
    }
}

impl Model {
    fn new() -> Model {
        Model {
            states: vec![State::new()],
            changes: vec![Vec::new()],
            compacted: -1,
            compactions: BTreeSet::new(),
            leases: BTreeSet::new(),
        }
    }

    fn newest(&self) -> i64 {
        self.states.len() as i64
    }

    fn state(&self, revision: i64) -> &State {
        &self.states[revision as usize - 1]
    }

    fn changes(&self, revision: i64) -> &[Change] {
        &self.changes[revision as usize - 1]
    }

    /// The revision that a read at `at` means.
    fn readable(&self, at: i64) -> Result<i64, ApplyError> {
        match at {
            at if at <= 0 => Ok(self.newest()),
            at if at > self.newest() => Err(ApplyError::FutureRevision),
            at if at < self.compacted => Err(ApplyError::Compacted),
            at => Ok(at),
        }
    }

    fn range(&self, request: &RangeRequest) -> Result<RangeResponse, ApplyError> {
        check_request(&Request::RequestRange(request.clone()), 0)?;
        Ok(range_over(self.state(self.readable(request.revision)?), request))
    }

    /// Carries out what [`check`] has let through.
    fn apply(&mut self, op: &Op) -> Result<Answer, ApplyError> {
        let mut draft = Draft { model: self, state: self.state(self.newest()).clone(), changes: Vec::new() };
        let answer = match op {
            Op::Put(put) => Answer::Put(draft.put(put, false)?),
            Op::DeleteRange(delete) => Answer::Delete(draft.delete(delete)),
            Op::Txn(txn) => {
                let before = draft.state.clone();
                // All puts are looked at before the first range.
                Draft { model: self, state: before.clone(), changes: Vec::new() }.txn(txn, &before, false)?;
                let mut response = draft.txn(txn, &before, true)?;
                response.header = header(draft.at());
                Answer::Txn(response)
            }
            Op::Compaction(CompactionRequest { revision, .. }) => {
                if *revision <= self.compacted {
                    return Err(ApplyError::Compacted);
                }
                if *revision > self.newest() {
                    return Err(ApplyError::FutureRevision);
                }
                self.compacted = *revision;
                self.compactions.insert(*revision);
                return Ok(Answer::Done);
            }
            Op::LeaseGrant(LeaseGrantRequest { id, .. }) => {
                return if self.leases.insert(*id) { Ok(Answer::Done) } else { Err(ApplyError::LeaseExists) };
            }
            Op::LeaseRevoke(LeaseRevokeRequest { id }) => {
                if !self.leases.contains(id) {
                    return Err(ApplyError::LeaseNotFound);
                }
                let keys: Vec<Bytes> = draft.state.values().filter(|kv| kv.lease == *id).map(|kv| kv.key.clone()).collect();
                for key in keys {
                    draft.delete(&DeleteRangeRequest { key, ..DeleteRangeRequest::default() });
                }
                Answer::Done
            }
            other => panic!("the model does not know {other:?}"),
        };
        let Draft { state, changes, .. } = draft;
        if let Op::LeaseRevoke(revoke) = op {
            self.leases.remove(&revoke.id);
        }
        if !changes.is_empty() {
            self.states.push(state);
            self.changes.push(changes);
        }
        Ok(answer)
    }

    /// The records that have to be there when everything up to revision `upto` has been compacted, and whether each is a
    /// tombstone: all later writes, and of each key the last one before, unless it is a deletion below `upto`.
    fn records(&self, upto: i64) -> BTreeMap<Revision, bool> {
        let mut records = BTreeMap::new();
        let mut last: BTreeMap<&Bytes, (Revision, bool)> = BTreeMap::new();
        for main in 1..=self.newest() {
            for (sub, (key, kv)) in self.changes(main).iter().enumerate() {
                let record = (Revision { main, sub: sub as u32 }, kv.is_none());
                if main > upto {
                    records.insert(record.0, record.1);
                } else {
                    last.insert(key, record);
                }
            }
        }
        records.extend(last.into_values().filter(|(revision, tombstone)| !tombstone || revision.main == upto));
        records
    }
}

/// Lets the store and the model carry out whatever the bytes say.
///
/// # Panics
/// When the two differ, or an invariant does not hold.
pub fn run(bytes: &[u8]) {
    let mut source = Source(bytes);
    let mut both = Both::new(&mut source);
    while !source.0.is_empty() {
        both.step(&mut source);
        both.check();
    }
    both.calm();
    both.check();
}
