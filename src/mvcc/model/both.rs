//! A member without a network beside its model, both fed with the same operations.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::source::Source;
use super::{Answer, Change, KEYS, LEASES, MAX_OPS, Model, check, header, within};
use crate::error::{ApplyError, Error};
use crate::lease::{Lease, Lessor, LessorOptions};
use crate::lock::lock;
use crate::mvcc::range::{self, RangeResult, RangeScan};
use crate::mvcc::watch::{Limits, NO_WATCH, Session, WatchAnswer, WatchHub, encode_answer};
use crate::mvcc::{Pin, Store, Writer, txn};
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::etcdserverpb::{
    CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest, RangeRequest, RangeResponse, WatchCreateRequest, WatchResponse,
};
use crate::proto::internal::command::Op;
use crate::proto::mvccpb::{Event, event::EventType};
use crate::storage::history::HistoryOptions;
use crate::storage::mem::{Fault, Mem};
use crate::storage::{Backend, Revision};

/// What is known of a watch: the events from `next` on are yet to come. Once it was canceled for a compaction none come any
/// more, but its id stays taken until the client cancels it too.
struct Watch {
    request: WatchCreateRequest,
    next: i64,
    ended: bool,
}

/// One stream of watches, and what it has been asked.
struct Stream {
    session: Session,
    /// Watches asked for, each with its start, and not yet answered.
    asked: VecDeque<(WatchCreateRequest, i64)>,
    cancels: BTreeSet<i64>,
    progress: usize,
    open: BTreeMap<i64, Watch>,
    /// Fragments, until the last one is there.
    parts: BTreeMap<i64, Vec<Event>>,
}

impl Stream {
    fn new(session: Session) -> Stream {
        let (asked, cancels, open, parts) = (VecDeque::new(), BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        Stream { session, asked, cancels, progress: 0, open, parts }
    }
}

/// Steps of reading for watches that another thread would do.
type Away = Arc<Mutex<Vec<Box<dyn FnOnce() + Send>>>>;

fn session(hub: &Arc<WatchHub>, store: &Arc<Store>, away: Option<&Away>) -> Session {
    let session = Session::new(hub.clone(), store.clone());
    match away.cloned() {
        Some(away) => session.reading_elsewhere(Arc::new(move |step| lock(&away).push(step))),
        None => session,
    }
}

/// A Range that has taken its first step, and what it has to answer in the end.
struct Long {
    scan: RangeScan,
    pin: Pin,
    request: RangeRequest,
    hold: usize,
    expected: RangeResponse,
}

/// A member without a network: the store and what belongs to it, its log, and the model.
pub(super) struct Both {
    mem: Arc<Mem>,
    store: Arc<Store>,
    hub: Arc<WatchHub>,
    lessor: Lessor,
    limits: Limits,
    model: Model,
    /// What was applied, and what came of it. A crash takes back the state, never the log.
    log: Vec<(Op, Result<Answer, ApplyError>)>,
    /// None if whoever polls reads as well.
    away: Option<Away>,
    stream: Stream,
    long: Option<Long>,
}

fn lease_name(id: i64) -> Vec<u8> {
    [b"lease/".as_slice(), &id.to_be_bytes()].concat()
}

/// The answer as a client receives it.
pub(in crate::mvcc) fn on_the_wire(answer: &WatchAnswer, store: &Store) -> WatchResponse {
    let head = WatchResponse {
        header: header(answer.revision),
        watch_id: answer.watch_id,
        created: answer.created,
        canceled: answer.canceled,
        compact_revision: answer.compact_revision,
        cancel_reason: answer.cancel_reason.clone(),
        fragment: answer.fragment,
        events: Vec::new(),
    };
    let mut bytes = Vec::new();
    encode_answer(&head, &answer.bodies(store).expect("the history can be read"), &mut bytes).expect("a vector has room");
    WatchResponse::decode(bytes.as_slice()).expect("what was encoded can be decoded")
}

/// Remembers that it was called.
#[derive(Default)]
struct Called(AtomicBool);

impl Wake for Called {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The next answer of a session, if there is one without anything more happening.
pub(in crate::mvcc) fn poll(session: &mut Session) -> Option<WatchAnswer> {
    let called = Arc::new(Called::default());
    let waker = Waker::from(called.clone());
    loop {
        called.0.store(false, Ordering::Relaxed);
        match session.poll_next(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => return Some(answer.expect("the history can be read")),
            Poll::Pending if called.0.load(Ordering::Relaxed) => {}
            Poll::Pending => return None,
        }
    }
}

/// Makes the answer of what a Range found.
pub(in crate::mvcc) fn collect(result: RangeResult, pin: &Pin, keys_only: bool, hold: usize) -> RangeResponse {
    assert_eq!(result.held, result.hits.iter().map(|hit| hit.len).sum::<usize>() <= hold);
    let fetch = |hit: range::Hit| {
        assert!(hit.kv.is_some() || !result.held);
        let kv = hit.kv.unwrap_or_else(|| range::answer(pin.store(), hit.revision, keys_only).expect("the history can be read"));
        assert_eq!(kv.encoded_len(), hit.len);
        kv
    };
    RangeResponse { header: None, kvs: result.hits.into_iter().map(fetch).collect(), more: result.more, count: result.count }
}

/// Opens what a member keeps. Returns it with the number of commands of the log that it contains.
fn open(mem: &Arc<Mem>) -> (Arc<Store>, Lessor, usize) {
    let mut attached = Vec::new();
    let options = HistoryOptions { cache_bytes: 1, ..HistoryOptions::default() };
    let (store, saved) = Store::open(mem.clone(), options, &mut |lease, key| attached.push((lease, key))).expect("the storage is sound");
    let (applied, revision) = saved.applied.map_or((0, 1), |bytes| {
        let (applied, revision) = bytes.split_at(8);
        (u64::from_be_bytes(applied.try_into().unwrap()), i64::from_be_bytes(revision.try_into().unwrap()))
    });
    assert_eq!(store.revision(), revision, "the revision after {applied} commands");
    let mut lessor = Lessor::new(LessorOptions::default());
    lessor.restore(saved.meta.iter().filter(|(name, _)| name.starts_with(b"lease/")).map(|(_, lease)| Lease::decode(lease).unwrap()));
    for (lease, key) in attached {
        lessor.attach(lease, key).expect("a key's lease exists");
    }
    (Arc::new(store), lessor, applied as usize)
}

impl Both {
    pub fn new(source: &mut Source<'_>) -> Both {
        let limits = Limits {
            queue_bytes: source.pick(&[0, 100, 300, 1000, 8 << 20]),
            response_revisions: source.pick(&[1, 2, 5, 1000]),
            response_bytes: source.pick(&[1, 50, 300, 1 << 20]),
            fragment_bytes: source.pick(&[1, 60, 200, 2 << 20]),
            catch_up_records: source.pick(&[1, 2, 7, 4096]),
            catch_up_bytes: source.pick(&[1, 100, 1 << 20]),
            catch_up_events: source.pick(&[0, 1, 3, 1000]),
        };
        let mem = Arc::new(Mem::new());
        let (store, lessor, _) = open(&mem);
        let hub = Arc::new(WatchHub::with_limits(store.revision(), limits));
        let away = source.one_in(2).then(Away::default);
        let stream = Stream::new(session(&hub, &store, away.as_ref()));
        Both { away, mem, store, hub, lessor, limits, model: Model::new(), log: Vec::new(), stream, long: None }
    }

    /// Reads what watches wait for, if that is left to another thread; what it brings is handed over with a later poll.
    fn read_away(&self) -> bool {
        let steps = self.away.as_ref().map(|away| std::mem::take(&mut *lock(away))).unwrap_or_default();
        let any = !steps.is_empty();
        steps.into_iter().for_each(|step| step());
        any
    }

    pub fn step(&mut self, source: &mut Source<'_>) {
        if self.away.as_ref().is_some_and(|away| !lock(away).is_empty()) && source.one_in(2) {
            self.read_away();
        }
        match source.below(36) {
            0..7 => self.execute(Op::Put(source.put())),
            7..10 => self.execute(Op::DeleteRange(source.delete())),
            10..15 => {
                let txn = source.txn(&self.model, 0);
                self.execute(Op::Txn(txn));
            }
            15..18 => {
                let request = source.range(&self.model);
                let (hold, postpone) = (source.pick(&[range::HOLD_BYTES, 0, 60]), source.one_in(2));
                self.range(&request, hold, postpone);
            }
            18 => self.finish_long(),
            19 => self.execute(Op::Compaction(CompactionRequest { revision: source.revision(&self.model), physical: false })),
            20 => self.execute(Op::LeaseGrant(LeaseGrantRequest { id: source.pick(&LEASES), ttl: 10 })),
            21 => self.execute(Op::LeaseRevoke(LeaseRevokeRequest { id: source.pick(&LEASES) })),
            22 | 23 => {
                self.compact_step();
                self.check_records(false);
            }
            24 => self.commit(),
            25 => self.store.history().write_out().map(|_| ()).expect("the disk takes it"),
            26 => self.store.history().sync().map(|_| ()).expect("the disk takes it"),
            27 => self.collect_blocks(source),
            28 => self.fill_disk(source),
            29 => self.crash(source),
            30 => {
                let request = source.watch(&self.model);
                let start = if request.start_revision == 0 { self.model.newest() + 1 } else { request.start_revision };
                self.stream.session.create(&request);
                self.stream.asked.push_back((request, start));
            }
            31 => {
                let id = source.pick(&[0, 1, 2, 3, 7, -2]);
                self.stream.cancels.insert(id);
                self.stream.session.cancel(id);
            }
            32..34 => {
                for _ in 0..=source.below(4) {
                    if let Some(answer) = poll(&mut self.stream.session) {
                        self.told(&answer);
                    }
                }
            }
            34 if source.one_in(2) => {
                self.stream.progress += 1;
                self.stream.session.progress();
            }
            34 => self.stream.session.notify_progress(),
            _ if source.one_in(4) => self.calm(),
            _ => {}
        }
    }

    // What clients do.

    fn execute(&mut self, op: Op) {
        let checked = match &op {
            Op::Put(put) => txn::check_put(put),
            Op::DeleteRange(delete) => txn::check_delete(delete),
            Op::Txn(txn) => txn::check_txn(txn, MAX_OPS),
            _ => Ok(()),
        };
        assert_eq!(checked, check(&op), "{op:?}");
        if checked.is_err() {
            return;
        }
        let expected = self.model.apply(&op);
        let answer = self.apply(&op);
        assert_eq!(answer, expected, "{op:?}");
        self.log.push((op, expected));
    }

    /// Applies a command to the store, as a member does.
    fn apply(&mut self, op: &Op) -> Result<Answer, ApplyError> {
        let answer = match op {
            Op::Put(request) => self.write(|writer, leases| txn::put(writer, request, leases)).map(Answer::Put),
            Op::DeleteRange(request) => self.write(|writer, _| txn::delete_range(writer, request)).map(Answer::Delete),
            Op::Txn(request) => self.write(|writer, leases| txn::txn(writer, request, leases)).map(Answer::Txn),
            Op::Compaction(request) => self.store.compact(request.revision).map(|()| Answer::Done).map_err(Error::from),
            Op::LeaseGrant(LeaseGrantRequest { id, ttl }) => {
                self.lessor.grant(*id, *ttl, Duration::ZERO)?;
                let lease = self.lessor.lease(*id).expect("it was just granted");
                self.store.history().put_meta(&lease_name(*id), Some(Bytes::copy_from_slice(&lease.encode())));
                Ok(Answer::Done)
            }
            Op::LeaseRevoke(LeaseRevokeRequest { id }) => {
                let keys = self.lessor.revoke(*id)?;
                self.store.history().put_meta(&lease_name(*id), None);
                let delete = |writer: &mut Writer<'_>| keys.iter().for_each(|key| writer.delete(key));
                self.write(|writer, _| {
                    let _: () = delete(writer);
                    Ok(())
                })
                .map(|()| Answer::Done)
            }
            other => panic!("the model does not know {other:?}"),
        };
        answer.map_err(|err| match err {
            Error::Apply(refused) => refused,
            fault => panic!("{fault}"),
        })
    }

    fn write<T>(&mut self, request: impl FnOnce(&mut Writer<'_>, &dyn Fn(i64) -> bool) -> Result<T, Error>) -> Result<T, Error> {
        let store = self.store.clone();
        let mut writer = store.begin();
        let response = request(&mut writer, &|id| self.lessor.contains(id))?;
        let Some(committed) = writer.finish() else { return Ok(response) };
        let changes = self.model.changes(committed.revision);
        assert_eq!(committed.events.len(), changes.len(), "events of revision {}", committed.revision);
        for (sub, (event, (key, kv))) in committed.events.iter().zip(changes).enumerate() {
            assert_eq!(event.revision, Revision { main: committed.revision, sub: sub as u32 });
            assert_eq!((&event.key, event.delete), (key, kv.is_none()));
            assert_eq!(event.kv.decode().unwrap(), changed(key, kv.as_ref(), committed.revision));
        }
        for (key, left, joined) in &committed.leases {
            if *left != 0 {
                self.lessor.detach(*left, key);
            }
            if *joined != 0 {
                self.lessor.attach(*joined, key.clone()).expect("a Txn checks leases before it writes");
            }
        }
        self.hub.publish(&committed);
        Ok(response)
    }

    fn range(&mut self, request: &RangeRequest, hold: usize, postpone: bool) {
        let expected = self.model.range(request);
        let answer = match range::check(request).and_then(|()| self.store.pin(request.revision)) {
            Err(err) => Err(err),
            Ok(pin) => match RangeScan::new(request, pin.at(), hold).start(&self.store) {
                Ok(result) => Ok(collect(result.expect("the history can be read"), &pin, request.keys_only, hold)),
                Err(scan) if postpone && self.long.is_none() => {
                    let expected = expected.expect("what is refused never starts");
                    self.long = Some(Long { scan, pin, request: request.clone(), hold, expected });
                    return;
                }
                Err(scan) => Ok(collect(scan.run(&pin).expect("the history can be read"), &pin, request.keys_only, hold)),
            },
        };
        assert_eq!(answer, expected, "{request:?}");
    }

    /// Goes on with a Range that took its first step some operations ago: it must not notice what happened since.
    fn finish_long(&mut self) {
        if let Some(Long { scan, pin, request, hold, expected }) = self.long.take() {
            let result = scan.run(&pin).expect("the history can be read");
            assert_eq!(collect(result, &pin, request.keys_only, hold), expected, "{request:?}");
        }
    }

    // What a member does by itself.

    /// Ends a log entry.
    fn commit(&mut self) {
        let applied = [(self.log.len() as u64).to_be_bytes(), self.store.revision().to_be_bytes()].concat();
        self.store.history().commit(applied.into());
    }

    fn compact_step(&self) -> bool {
        self.store.compact_step().expect("the history can be read").is_some()
    }

    fn collect_blocks(&mut self, source: &mut Source<'_>) {
        self.store.history().collect(source.pick(&[1, 1000, 1 << 20])).expect("the disk takes it");
        self.store.history().check_invariants();
        self.check_records(false);
    }

    /// The disk is full for a while, and the batch that failed may be there in the end or not.
    fn fill_disk(&mut self, source: &mut Source<'_>) {
        self.commit();
        self.mem.fail_next_apply(Fault { batch_stays: source.one_in(2), ..Fault::disk_full() });
        if let Err(err) = self.store.history().write_out() {
            assert!(err.is_disk_full(), "{err}");
            self.check();
        }
        self.mem.reopen().expect("memory can be opened");
        self.store.history().write_out().expect("there is space again");
    }

    /// Loses power, and with it some of what was not synced; starts again; and applies the log from where the storage stands.
    fn crash(&mut self, source: &mut Source<'_>) {
        self.finish_long();
        let hash = self.store.hash(0).expect("the history can be read");
        self.mem.crash(source.below(self.mem.unsynced() + 1));
        let (store, lessor, applied) = open(&self.mem);
        self.hub = Arc::new(WatchHub::with_limits(store.revision(), self.limits));
        self.stream = Stream::new(session(&self.hub, &store, self.away.as_ref()));
        (self.store, self.lessor) = (store, lessor);
        for (op, answered) in self.log.split_off(applied) {
            assert_eq!(self.apply(&op), answered, "applied once more: {op:?}");
            self.log.push((op, answered));
        }
        self.commit();
        assert_eq!(self.store.hash(0).expect("the history can be read"), hash);
        self.store.history().check_invariants();
        self.check_records(false);
    }

    /// Does all that is left to do: then everything has been told, and nothing is kept for nobody.
    pub fn calm(&mut self) {
        self.finish_long();
        while self.compact_step() {}
        self.commit();
        self.store.history().sync().expect("the disk takes it");
        while self.store.history().collect(1 << 20).expect("the disk takes it") {}
        self.store.history().check_invariants();
        self.check_records(true);
        loop {
            while let Some(answer) = poll(&mut self.stream.session) {
                self.told(&answer);
            }
            if !self.read_away() {
                break;
            }
        }
        assert!(self.stream.asked.is_empty() && self.stream.parts.is_empty());
        for (id, watch) in &self.stream.open {
            self.nothing_untold(*id, watch, self.model.newest());
        }
    }

    // What has to be so.

    pub fn check(&self) {
        let model = &self.model;
        assert_eq!(self.store.revisions(), (model.newest(), model.compacted));
        assert_eq!(self.store.keys(), model.state(model.newest()).len());
        self.store.check().unwrap();
        self.lessor.each_lease_queued_once().unwrap();
        let attached = self.store.attached();
        self.lessor.keys_point_back(attached.iter().map(|(key, lease)| (key.as_ref(), *lease))).unwrap();
        let leased = model.state(model.newest()).values().filter(|kv| kv.lease != 0).map(|kv| (kv.key.clone(), kv.lease));
        assert_eq!(attached, leased.collect::<Vec<_>>());
        // One key as it was at some revision, another one each time; and everything there is now.
        let key = KEYS[self.log.len() % KEYS.len()];
        let oldest = model.compacted.max(1);
        let at = oldest + (self.log.len() as i64 * 7) % (model.newest() - oldest + 1);
        let kv = self.store.get(key, at).expect("the history can be read").map(|kv| kv.decode().unwrap());
        assert_eq!(kv.as_ref(), model.state(at).get(key), "{} at {at}", key.escape_ascii());
        for (key, kv) in model.state(model.newest()) {
            let current = self.store.get(key, 0).expect("the history can be read").map(|kv| kv.decode().unwrap());
            assert_eq!(current.as_ref(), Some(kv));
        }
    }

    /// The history holds what the compaction leaves; and when that is done, nothing else.
    fn check_records(&self, compacted: bool) {
        let mut stored = BTreeMap::new();
        let to = Revision { main: i64::MAX, sub: 0 };
        let scanned = self.store.history().scan(Revision::default(), to, &mut |revision, record| {
            stored.insert(revision, record.tombstone);
            Ok(true)
        });
        scanned.expect("the history can be read");
        let needed = self.model.records(self.model.compacted);
        if compacted {
            assert_eq!(stored, needed);
        } else {
            let all = self.model.records(-1);
            assert!(needed.iter().all(|record| stored.contains_key(record.0)), "{stored:?} lacks some of {needed:?}");
            assert!(stored.iter().all(|(revision, tombstone)| all.get(revision) == Some(tombstone)), "{stored:?} has more than {all:?}");
        }
    }

    // Watches.

    /// The changes of a revision that a watch is to be told of: all, and those that no compaction takes from it.
    fn wanted(&self, watch: &Watch, revision: i64) -> (Vec<&Change>, Vec<&Change>) {
        let request = &watch.request;
        let start: &[u8] = if request.key.is_empty() { b"\0" } else { &request.key };
        let changes = self.model.changes(revision);
        let passes = |(key, kv): &Change| {
            let filter = if kv.is_some() { FilterType::Noput } else { FilterType::Nodelete };
            within(key, start, &request.range_end) && !request.filters.contains(&(filter as i32))
        };
        // Of a revision that was compacted at, only the last write of a key may be left.
        let superseded =
            |at: usize| self.model.compactions.contains(&revision) && changes[at + 1..].iter().any(|later| later.0 == changes[at].0);
        let all: Vec<usize> = (0..changes.len()).filter(|at| passes(&changes[*at])).collect();
        let kept = all.iter().filter(|at| !superseded(**at)).map(|at| &changes[*at]).collect();
        (all.into_iter().map(|at| &changes[at]).collect(), kept)
    }

    fn nothing_untold(&self, id: i64, watch: &Watch, upto: i64) {
        for revision in watch.next..=if watch.ended { 0 } else { upto } {
            let kept = self.wanted(watch, revision).1;
            assert!(kept.is_empty(), "watch {id} was not told of {kept:?} at {revision}");
        }
    }

    /// Compares an answer with what the stream was asked and what happened since.
    fn told(&mut self, answer: &WatchAnswer) {
        let response = on_the_wire(answer, &self.store);
        let (id, revision) = (response.watch_id, response.header.as_ref().unwrap().revision);
        assert!(revision <= self.model.newest());
        if response.created {
            let (request, start) = self.stream.asked.pop_front().expect("somebody asked for a watch");
            let key: &[u8] = if request.key.is_empty() { b"\0" } else { &request.key };
            let refused = if request.start_revision < 0 {
                "etcdserver: mvcc: required revision has been compacted"
            } else if !request.range_end.is_empty() && request.range_end.as_ref() != b"\0" && key >= request.range_end.as_ref() {
                "mvcc: watcher range is empty"
            } else if request.watch_id != 0 && self.stream.open.contains_key(&request.watch_id) {
                "mvcc: duplicate watch ID provided on the WatchStream"
            } else {
                ""
            };
            assert_eq!((response.cancel_reason.as_str(), response.canceled), (refused, !refused.is_empty()));
            if response.canceled {
                assert_eq!(id, NO_WATCH);
            } else {
                assert!(request.watch_id == 0 || request.watch_id == id);
                let before = self.stream.open.insert(id, Watch { request, next: start, ended: false });
                assert!(before.is_none(), "id {id} is given twice");
            }
        } else if response.canceled {
            let mut watch = self.stream.open.remove(&id).expect("only a watch that is open is canceled");
            self.stream.parts.remove(&id);
            if response.compact_revision == 0 {
                assert!(self.stream.cancels.contains(&id));
            } else {
                let compacted = response.compact_revision;
                assert!(!watch.ended && watch.next < compacted && compacted <= self.model.compacted && revision == 0);
                watch.ended = true;
                self.stream.open.insert(id, watch);
            }
        } else if id == NO_WATCH {
            assert!(response.events.is_empty() && self.stream.progress > 0);
            self.stream.progress -= 1;
            for id in self.stream.open.keys().copied().collect::<Vec<_>>() {
                self.progressed(id, revision);
            }
        } else {
            let parts = self.stream.parts.entry(id).or_default();
            parts.extend(response.events);
            if response.fragment {
                return;
            }
            let events = self.stream.parts.remove(&id).unwrap_or_default();
            self.told_events(id, revision, &events);
        }
    }

    /// Every event up to `revision` was told, or so it was said.
    fn progressed(&mut self, id: i64, revision: i64) {
        let mut watch = self.stream.open.remove(&id).expect("the watch is open");
        self.nothing_untold(id, &watch, revision);
        watch.next = watch.next.max(revision + 1);
        self.stream.open.insert(id, watch);
    }

    fn told_events(&mut self, id: i64, header: i64, events: &[Event]) {
        if events.is_empty() {
            let watch = &self.stream.open[&id];
            assert!(watch.request.progress_notify && !watch.ended);
            return self.progressed(id, header);
        }
        let mut watch = self.stream.open.remove(&id).expect("the watch is open");
        assert!(!watch.ended, "watch {id} was canceled");
        let mod_revision = |event: &Event| event.kv.as_ref().unwrap().decode().unwrap().mod_revision;
        for events in events.chunk_by(|a, b| mod_revision(a) == mod_revision(b)) {
            let revision = mod_revision(&events[0]);
            assert!(watch.next <= revision && revision <= header, "watch {id} is at {} and told of {revision}", watch.next);
            self.nothing_untold(id, &watch, revision - 1);
            let (all, kept) = self.wanted(&watch, revision);
            let same = |event: &Event, (key, kv): &Change| {
                (event.r#type == EventType::Put as i32) == kv.is_some()
                    && event.kv.as_ref().unwrap().decode().unwrap() == changed(key, kv.as_ref(), revision)
            };
            let is = |expected: &[&Change]| {
                expected.len() == events.len() && events.iter().zip(expected).all(|(event, change)| same(event, change))
            };
            assert!(is(&all) || is(&kept), "watch {id}, revision {revision}: {events:?} instead of {all:?}");
            for event in events {
                let prev = event.prev_kv.as_ref().map(|kv| kv.decode().unwrap());
                let kv = event.kv.as_ref().unwrap().decode().unwrap();
                // What is created in a revision has nothing before it, even if the same revision deleted it first.
                let wanted = watch.request.prev_kv && kv.create_revision != revision;
                let before = self.model.state(revision - 1).get(&kv.key).filter(|_| wanted);
                let lost = revision - 1 < self.model.compacted && prev.is_none();
                assert!(lost || prev.as_ref() == before, "watch {id}, revision {revision}: before was {prev:?} instead of {before:?}");
            }
            watch.next = revision + 1;
        }
        self.stream.open.insert(id, watch);
    }
}

/// The key-value of an event.
fn changed(key: &Bytes, kv: Option<&KeyValue>, revision: i64) -> KeyValue {
    kv.cloned().unwrap_or_else(|| KeyValue { key: key.clone(), mod_revision: revision, ..KeyValue::default() })
}
