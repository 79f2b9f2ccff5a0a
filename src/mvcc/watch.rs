//! Watches: who is told of what, and how those that fall behind catch up.
//!
//! The [`WatchHub`] knows which ranges are watched. The applier [publishes](WatchHub::publish) each commit once; the hub
//! finds the groups of watchers that it concerns and hands each watcher a pointer to one shared [`Batch`], whose wire
//! bytes are made when the first of them is sent and copied for the others. A [`Session`] is the other side: the watches
//! of one client stream, polled by whatever sends to the client.
//!
//! # Two states
//! A watcher is *synced*, and gets what is published, or *catching up*, and reads the history from its own `next`
//! revision. It starts catching up when its start lies in the past, and is thrown back there when the session's queue is
//! full: then what was queued for it is dropped, for the history has it all. Nothing the slow client does costs the
//! writer more than the look at a full queue. It is synced again when, *under the hub's lock*, the revision it has read
//! up to is the one published last: everything later will be queued, everything earlier was read, so there is neither a
//! gap nor a repeat.
//!
//! ```text
//! publish 7 8 9 10 11        queue holds 7 8, is full at 9: watcher catches up from 7
//!                            ... client reads again: history 7..=11, published is 11: synced, next 12
//! ```
//!
//! # Promises
//! Of each matching event a watcher gets exactly one, in the order of the revisions; the events of one revision come in
//! one response, unless it asked for fragments; a progress response of revision *r* comes after all events up to *r*.
//!
//! # Source
//! The wire behaviour is etcd's: `server/etcdserver/api/v3rpc/watch.go`, `server/storage/mvcc/watchable_store.go`.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::proto::EncodedKv;
use crate::proto::etcdserverpb::WatchCreateRequest;
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::storage::Revision;

use super::intervals::Intervals;
use super::{Committed, Event, KeyRange, Store, deleted};

/// Bytes of events that wait for one session. Beyond it the watcher that is next in line for an event is thrown back to
/// catching up, and its queued events are dropped: they are read from the history once the client takes them.
const QUEUE_BYTES: usize = 8 << 20;

/// How many times a full queue the shares of one commit may cost together, of all the groups of watchers that it concerns.
/// Beyond it the groups that still have events to come are thrown back.
const COMMIT_QUEUES: usize = 8;

/// What one queued batch counts for beside its events' bytes.
const BATCH_OVERHEAD: usize = 64;

/// Revisions in one response at most; those beyond wait for the next. etcd's own bound.
const RESPONSE_REVISIONS: usize = 1000;

/// Bytes of events after which a response takes no further revision. One revision is never split for it.
const RESPONSE_BYTES: usize = 1 << 20;

/// A response with more than this many bytes of events is split for a watcher that asked for fragments.
const FRAGMENT_BYTES: usize = 2 << 20;

/// Records of the history that catching up looks at in one go, before others get their turn.
const CATCH_UP_RECORDS: usize = 4096;

/// The bounds above; only tests set others, to reach them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub queue_bytes: usize,
    pub response_revisions: usize,
    pub response_bytes: usize,
    pub fragment_bytes: usize,
    pub catch_up_records: usize,
}

const LIMITS: Limits = Limits {
    queue_bytes: QUEUE_BYTES,
    response_revisions: RESPONSE_REVISIONS,
    response_bytes: RESPONSE_BYTES,
    fragment_bytes: FRAGMENT_BYTES,
    catch_up_records: CATCH_UP_RECORDS,
};

/// Watches of one server. Beyond it a watch is created and canceled at once, with a reason.
const WATCHES_MAX: usize = 1_000_000;

/// The id in responses that concern no watcher in particular.
pub(crate) const NO_WATCH: i64 = -1;

/// Numbers of the fields that are written by hand: `WatchResponse.events`, and `Event`'s own.
const EVENTS_FIELD: u32 = 11;
const EVENT_TYPE_FIELD: u32 = 1;
const EVENT_KV_FIELD: u32 = 2;
const EVENT_PREV_FIELD: u32 = 3;
/// `Event.EventType.DELETE`; PUT is 0 and thus not written.
const EVENT_DELETE: u64 = 1;

/// The events of one revision that concern a group of watchers, shared by all of them.
#[derive(Debug)]
pub(crate) struct Batch {
    pub revision: i64,
    pub events: Vec<Event>,
    plain: OnceLock<Body>,
    with_prev: OnceLock<Body>,
}

/// Events on the wire, each with the tag of `WatchResponse.events` before it.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub bytes: Bytes,
    /// Where each event ends.
    ends: Vec<usize>,
}

impl Batch {
    fn new(revision: i64, events: Vec<Event>) -> Arc<Self> {
        Arc::new(Batch { revision, events, plain: OnceLock::new(), with_prev: OnceLock::new() })
    }

    fn cost(&self) -> usize {
        BATCH_OVERHEAD + self.events.iter().map(|event| event.kv.encoded_len()).sum::<usize>()
    }

    /// The key-value that an event replaced: none for a creation, or when it has been compacted.
    pub fn prev(event: &Event, store: &Store) -> Result<Option<EncodedKv>> {
        let created = |kv: &EncodedKv| kv.view().is_ok_and(|kv| kv.create_revision == kv.mod_revision);
        if !event.delete && created(&event.kv) {
            return Ok(None);
        }
        store.before(&event.key, event.revision.main)
    }

    /// The events' bytes, made once.
    fn body(&self, prev_kv: bool, store: &Store) -> Result<&Body> {
        let cell = if prev_kv { &self.with_prev } else { &self.plain };
        if let Some(body) = cell.get() {
            return Ok(body);
        }
        let mut bytes = BytesMut::with_capacity(self.cost());
        let mut ends = Vec::with_capacity(self.events.len());
        for event in &self.events {
            let prev = if prev_kv { Batch::prev(event, store)? } else { None };
            encode_event(event, prev.as_ref(), &mut bytes);
            ends.push(bytes.len());
        }
        Ok(cell.get_or_init(|| Body { bytes: bytes.freeze(), ends }))
    }
}

fn encode_event(event: &Event, prev: Option<&EncodedKv>, out: &mut BytesMut) {
    // Each of the three fields has a tag of one byte.
    let field = |len: usize| 1 + encoded_len_varint(len as u64) + len;
    let len = if event.delete { 2 } else { 0 } + field(event.kv.encoded_len()) + prev.map_or(0, |kv| field(kv.encoded_len()));
    encode_key(EVENTS_FIELD, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
    if event.delete {
        encode_key(EVENT_TYPE_FIELD, WireType::Varint, out);
        encode_varint(EVENT_DELETE, out);
    }
    for (number, kv) in [(EVENT_KV_FIELD, Some(&event.kv)), (EVENT_PREV_FIELD, prev)] {
        if let Some(kv) = kv {
            encode_key(number, WireType::LengthDelimited, out);
            encode_varint(kv.encoded_len() as u64, out);
            kv.encode_raw(out);
        }
    }
}

/// Which events a group of watchers is interested in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
struct Filters {
    no_put: bool,
    no_delete: bool,
}

impl Filters {
    fn passes(self, delete: bool) -> bool {
        if delete { !self.no_delete } else { !self.no_put }
    }
}

/// Watchers of one range with the same filters: by session and watch id.
#[derive(Default)]
struct Group {
    members: BTreeMap<(u64, i64), Arc<Queue>>,
    /// Its place among the shares of the commit that is being published, once it has one.
    share: Cell<Option<usize>>,
}

/// What of a commit concerns a group.
struct Share<'a> {
    group: &'a Group,
    /// The numbers of the commit's events: a share that nobody takes in the end has cost four bytes for each.
    events: Vec<u32>,
    cost: usize,
    /// It has grown beyond what can be queued: its events were let go of, and its watchers will read them.
    too_much: bool,
}

type Groups = BTreeMap<Filters, Group>;

/// All watches of a server. See the module's head.
pub(crate) struct WatchHub {
    inner: Mutex<Inner>,
    limits: Limits,
    counters: Arc<Counters>,
}

/// What watches there are, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchFigures {
    pub streams: usize,
    pub watches: usize,
    /// Watches that are catching up.
    pub slow: usize,
    /// Events that wait to be sent.
    pub pending: usize,
}

struct Inner {
    keys: BTreeMap<Bytes, Groups>,
    spans: Intervals<Groups>,
    /// The revision published last.
    published: i64,
    watches: usize,
    sessions: BTreeMap<u64, Arc<Queue>>,
    next_session: u64,
}

impl Inner {
    /// Sorts the events of a commit by the groups that they concern, in the order in which the groups are met.
    ///
    /// Ranges may overlap, so there can be many times as many shares as events. A share that fits no queue is dropped on
    /// the way, and so is all that still grows once the shares together are larger than [`COMMIT_QUEUES`] queues.
    fn shares(&self, committed: &Committed, limits: Limits) -> Vec<Share<'_>> {
        let mut shares: Vec<Share<'_>> = Vec::new();
        let mut total = 0usize;
        let mut concerned: Vec<&Groups> = Vec::new();
        for (number, event) in (0u32..).zip(&committed.events) {
            let cost = event.kv.encoded_len();
            concerned.clear();
            concerned.extend(self.keys.get(&event.key));
            self.spans.stab(&event.key, &mut |_, groups| concerned.push(groups));
            let groups = concerned.iter().copied().flatten().filter(|(filters, _)| filters.passes(event.delete));
            for (_, group) in groups {
                let place = group.share.get().unwrap_or(shares.len());
                if place == shares.len() {
                    group.share.set(Some(place));
                    shares.push(Share { group, events: Vec::new(), cost: BATCH_OVERHEAD, too_much: false });
                }
                let Some(share) = shares.get_mut(place) else { continue };
                if share.too_much {
                    continue;
                }
                share.cost += cost;
                total += cost;
                if share.cost > limits.queue_bytes || total > limits.queue_bytes.saturating_mul(COMMIT_QUEUES) {
                    share.too_much = true;
                    share.events = Vec::new();
                } else {
                    share.events.push(number);
                }
            }
        }
        for share in &shares {
            share.group.share.set(None);
        }
        shares
    }
}

impl WatchHub {
    /// A hub for a store whose newest revision is `revision`. The events that it sends are counted.
    pub fn new(revision: i64, counters: Arc<Counters>) -> Self {
        let (keys, spans, sessions) = (BTreeMap::new(), Intervals::new(), BTreeMap::new());
        let inner = Inner { keys, spans, published: revision, watches: 0, sessions, next_session: 0 };
        WatchHub { inner: Mutex::new(inner), limits: LIMITS, counters }
    }

    /// A hub with bounds that a test can reach.
    #[cfg(any(test, fuzzing))]
    pub fn with_limits(revision: i64, limits: Limits) -> Self {
        WatchHub { limits, ..WatchHub::new(revision, Arc::default()) }
    }

    /// What watches there are. It looks at each stream, so it is for now and then.
    pub fn figures(&self) -> WatchFigures {
        let (watches, queues) = {
            let inner = lock(&self.inner);
            (inner.watches, inner.sessions.values().cloned().collect::<Vec<_>>())
        };
        let mut figures = WatchFigures { streams: queues.len(), watches, ..WatchFigures::default() };
        for queue in queues {
            let state = lock(&queue.state);
            figures.slow += state.behind.len();
            figures.pending += state.load.events;
        }
        figures
    }

    /// Tells the watchers of a commit. Commits are published in the order of their revisions, all of them.
    pub fn publish(&self, committed: &Committed) {
        let mut inner = lock(&self.inner);
        debug_assert!(inner.published < committed.revision, "published {} after {}", committed.revision, inner.published);
        inner.published = committed.revision;
        if inner.watches == 0 {
            return;
        }
        if let [event] = committed.events.as_slice() {
            // By far the most frequent commit: one event, thus one batch for everyone.
            let batch = Batch::new(committed.revision, vec![event.clone()]);
            let tell = |groups: &Groups| {
                for (filters, group) in groups {
                    if filters.passes(event.delete) {
                        group.tell(&batch);
                    }
                }
            };
            if let Some(groups) = inner.keys.get(&event.key) {
                tell(groups);
            }
            inner.spans.stab(&event.key, &mut |_, groups| tell(groups));
            return;
        }
        // Several events: collect those of each group first, so that each watcher gets its share in one piece.
        for share in inner.shares(committed, self.limits) {
            if share.too_much {
                share.group.throw_back(committed.revision);
            } else {
                let events = share.events.iter().map(|&number| committed.events[number as usize].clone()).collect();
                share.group.tell(&Batch::new(committed.revision, events));
            }
        }
    }

    fn add(&self, range: &KeyRange, filters: Filters, queue: &Arc<Queue>, id: i64) -> bool {
        let mut inner = lock(&self.inner);
        if inner.watches >= WATCHES_MAX {
            return false;
        }
        inner.watches += 1;
        let groups = match range {
            KeyRange::Key(key) => inner.keys.entry(key.clone()).or_default(),
            KeyRange::Span(start, end) => inner.spans.entry(start.clone(), Some(end.clone())),
            KeyRange::From(start) => inner.spans.entry(start.clone(), None),
        };
        groups.entry(filters).or_default().members.insert((queue.session, id), queue.clone());
        true
    }

    fn remove(&self, range: &KeyRange, filters: Filters, queue: &Queue, id: i64) {
        let mut inner = lock(&self.inner);
        let leave = |groups: &mut Groups| {
            let left = groups.get_mut(&filters).and_then(|group| group.members.remove(&(queue.session, id))).is_some();
            groups.retain(|_, group| !group.members.is_empty());
            (left, groups.is_empty())
        };
        let left = match range {
            KeyRange::Key(key) => {
                let (left, empty) = inner.keys.get_mut(key).map_or((false, false), leave);
                if empty {
                    inner.keys.remove(key);
                }
                left
            }
            KeyRange::Span(..) | KeyRange::From(_) => {
                let end = if let KeyRange::Span(_, end) = range { Some(end) } else { None };
                let (left, empty) = inner.spans.get_mut(range.start(), end).map_or((false, false), leave);
                if empty {
                    inner.spans.remove(range.start(), end);
                }
                left
            }
        };
        inner.watches -= usize::from(left);
    }

    /// Makes a watcher that has read everything up to `position` synced, if that is all there is.
    fn rejoin(&self, queue: &Queue, id: i64, position: i64) -> bool {
        let inner = lock(&self.inner);
        if inner.published > position {
            return false;
        }
        let mut state = lock(&queue.state);
        state.behind.remove(&id);
        if let Some(slot) = state.slots.get_mut(&id) {
            slot.next = position + 1;
        }
        true
    }

    /// The revision up to which a session has been told everything, if nothing waits for it.
    fn settled(&self, queue: &Queue) -> Option<i64> {
        let inner = lock(&self.inner);
        let state = lock(&queue.state);
        (state.ready.is_empty() && state.behind.is_empty()).then_some(inner.published)
    }
}

impl Group {
    fn tell(&self, batch: &Arc<Batch>) {
        let cost = batch.cost();
        for (&(_, id), queue) in &self.members {
            queue.push(id, batch, cost);
        }
    }

    /// Throws the watchers back to catching up: they read this revision from the history.
    fn throw_back(&self, revision: i64) {
        for (&(_, id), queue) in &self.members {
            queue.throw_back(id, revision);
        }
    }
}

/// What waits for one session. The hub pushes, the session takes.
struct Queue {
    session: u64,
    limits: Limits,
    state: Mutex<QueueState>,
    waker: AtomicWaker,
}

#[derive(Default)]
struct QueueState {
    slots: BTreeMap<i64, Slot>,
    /// Watches that have something waiting, in the order in which they got it; each at most once.
    ready: VecDeque<i64>,
    /// Watches that are catching up, each with the revision it has to read next.
    behind: BTreeMap<i64, i64>,
    load: Load,
}

/// What waits in a queue.
#[derive(Default)]
struct Load {
    bytes: usize,
    events: usize,
}

impl Load {
    fn take(&mut self, batches: &[Arc<Batch>]) {
        self.bytes -= batches.iter().map(|batch| batch.cost()).sum::<usize>();
        self.events -= batches.iter().map(|batch| batch.events.len()).sum::<usize>();
    }
}

impl QueueState {
    /// A watch that cannot be given this revision reads from here on, and what it has waiting is dropped.
    fn throw_back(&mut self, id: i64, revision: i64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let from = slot.waiting.first().map_or(revision, |first| first.revision);
        if !slot.waiting.is_empty() {
            self.load.take(&std::mem::take(&mut slot.waiting));
            self.ready.retain(|&ready| ready != id);
        }
        self.behind.insert(id, from);
    }
}

#[derive(Default)]
struct Slot {
    /// Events before this revision are not for this watcher.
    next: i64,
    waiting: Vec<Arc<Batch>>,
}

impl Queue {
    fn push(&self, id: i64, batch: &Arc<Batch>, cost: usize) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let Some(slot) = state.slots.get_mut(&id) else { return };
        if batch.revision < slot.next || state.behind.contains_key(&id) {
            return;
        }
        if state.load.bytes + cost > self.limits.queue_bytes {
            state.throw_back(id, batch.revision);
        } else {
            if slot.waiting.is_empty() {
                state.ready.push_back(id);
            }
            slot.waiting.push(batch.clone());
            state.load.bytes += cost;
            state.load.events += batch.events.len();
        }
        self.waker.wake();
    }

    fn throw_back(&self, id: i64, revision: i64) {
        let mut state = lock(&self.state);
        if state.slots.get(&id).is_some_and(|slot| revision >= slot.next) && !state.behind.contains_key(&id) {
            state.throw_back(id, revision);
            self.waker.wake();
        }
    }

    /// The next watch that has something, and as much of it as goes into one response.
    fn pop(&self) -> Option<(i64, Vec<Arc<Batch>>)> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        while let Some(id) = state.ready.pop_front() {
            let Some(slot) = state.slots.get_mut(&id) else { continue };
            let mut bytes = 0;
            let fits = slot.waiting.iter().take(self.limits.response_revisions).take_while(|batch| {
                let before = bytes;
                bytes += batch.cost();
                before < self.limits.response_bytes
            });
            let fits = fits.count();
            let rest = slot.waiting.split_off(fits);
            let batches = std::mem::replace(&mut slot.waiting, rest);
            state.load.take(&batches);
            if !slot.waiting.is_empty() {
                state.ready.push_back(id);
            }
            if !batches.is_empty() {
                return Some((id, batches));
            }
        }
        None
    }
}

/// One answer to a watching client, before it is put on the wire.
#[derive(Debug, Default)]
pub(crate) struct WatchAnswer {
    /// Revision for the header.
    pub revision: i64,
    pub watch_id: i64,
    pub created: bool,
    pub canceled: bool,
    pub compact_revision: i64,
    pub cancel_reason: String,
    /// More of the same revision follows.
    pub fragment: bool,
    /// The batches whose events this is about, in order; for the in-process client, which encodes nothing.
    pub batches: Vec<Arc<Batch>>,
    /// Whether the watcher asked for the previous key-values.
    pub prev_kv: bool,
    /// Part of the batches' wire bytes, when this is one fragment of them.
    part: Option<Bytes>,
}

impl WatchAnswer {
    /// The events as they go on the wire, each with the tag of `WatchResponse.events`.
    pub fn bodies(&self, store: &Store) -> Result<Vec<Bytes>> {
        match &self.part {
            Some(part) => Ok(vec![part.clone()]),
            None => self.batches.iter().map(|batch| Ok(batch.body(self.prev_kv, store)?.bytes.clone())).collect(),
        }
    }
}

struct Watcher {
    range: KeyRange,
    filters: Filters,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// The revision it was asked to start at; 0: now. Before that revision has come there is no progress to report.
    start: i64,
    /// Whether it got events since the last round of progress responses.
    busy: bool,
    /// It was canceled because its start had been compacted. The client's own cancel is still to come; until then the id
    /// stays taken, as in etcd.
    compacted: bool,
}

/// The watches of one client stream. Dropping it ends them.
pub(crate) struct Session {
    hub: Arc<WatchHub>,
    store: Arc<Store>,
    queue: Arc<Queue>,
    watchers: BTreeMap<i64, Watcher>,
    next_id: i64,
    /// Answers that are ready, before all events: creations, cancellations, fragments.
    answers: VecDeque<WatchAnswer>,
    /// A progress response was asked for, and is due as soon as nothing waits before it.
    progress: bool,
    /// Whose turn it is: flips with each poll.
    turn: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        for (id, watcher) in &self.watchers {
            self.hub.remove(&watcher.range, watcher.filters, &self.queue, *id);
        }
        lock(&self.hub.inner).sessions.remove(&self.queue.session);
    }
}

impl Session {
    pub fn new(hub: Arc<WatchHub>, store: Arc<Store>) -> Self {
        let queue = {
            let mut inner = lock(&hub.inner);
            inner.next_session += 1;
            let session = inner.next_session;
            let queue = Arc::new(Queue { session, limits: hub.limits, state: Mutex::default(), waker: AtomicWaker::new() });
            inner.sessions.insert(session, queue.clone());
            queue
        };
        Session { hub, store, queue, watchers: BTreeMap::new(), next_id: 0, answers: VecDeque::new(), progress: false, turn: false }
    }

    /// Answers that wait to be polled; the caller takes no further requests while there are many.
    pub fn backlog(&self) -> usize {
        self.answers.len()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Opens a watch and answers with its id: an event of it never comes before that.
    pub fn create(&mut self, request: &WatchCreateRequest) {
        let revision = self.store.revision();
        let refuse = |reason: &str| WatchAnswer {
            revision,
            watch_id: NO_WATCH,
            created: true,
            canceled: true,
            cancel_reason: reason.to_owned(),
            ..WatchAnswer::default()
        };
        if request.start_revision < 0 {
            self.answers.push_back(refuse(&ApplyError::Compacted.to_string()));
            return;
        }
        // No key means the first there can be.
        let key = if request.key.is_empty() { Bytes::from_static(&[0]) } else { request.key.clone() };
        let range = KeyRange::new(&key, &request.range_end);
        if matches!(&range, KeyRange::Span(start, end) if start >= end) {
            self.answers.push_back(refuse("mvcc: watcher range is empty"));
            return;
        }
        let id = if request.watch_id == 0 {
            while self.watchers.contains_key(&self.next_id) {
                self.next_id += 1;
            }
            self.next_id
        } else {
            request.watch_id
        };
        if self.watchers.contains_key(&id) {
            self.answers.push_back(refuse("mvcc: duplicate watch ID provided on the WatchStream"));
            return;
        }
        let mut filters = Filters::default();
        for filter in &request.filters {
            match FilterType::try_from(*filter) {
                Ok(FilterType::Noput) => filters.no_put = true,
                Ok(FilterType::Nodelete) => filters.no_delete = true,
                Err(_) => {}
            }
        }
        let start = if request.start_revision == 0 { revision + 1 } else { request.start_revision };
        {
            // Catching up first, whatever the start: whether there is anything to catch up with is settled under the
            // hub's lock, below.
            let mut state = lock(&self.queue.state);
            state.slots.insert(id, Slot { next: start, waiting: Vec::new() });
            state.behind.insert(id, start);
        }
        // Those that were canceled for a compaction are not in the hub any more, but still take up room here.
        if self.watchers.len() >= WATCHES_MAX || !self.hub.add(&range, filters, &self.queue, id) {
            self.forget(id);
            self.answers.push_back(refuse("etcdserver: too many watches"));
            return;
        }
        if request.watch_id == 0 {
            self.next_id += 1;
        }
        // At once, not with the first poll: a compaction in between would else end a watch that begins now.
        self.hub.rejoin(&self.queue, id, start - 1);
        let watcher = Watcher {
            range,
            filters,
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            start: request.start_revision,
            busy: false,
            compacted: false,
        };
        self.watchers.insert(id, watcher);
        self.answers.push_back(WatchAnswer { revision, watch_id: id, created: true, ..WatchAnswer::default() });
        self.queue.waker.wake();
    }

    /// Ends a watch, and says so; an id that there is none of is passed over.
    pub fn cancel(&mut self, id: i64) {
        if self.end(id) {
            self.answers.push_back(WatchAnswer { revision: self.store.revision(), watch_id: id, canceled: true, ..WatchAnswer::default() });
            self.queue.waker.wake();
        }
    }

    /// Takes the watch out of the hub, and with it everything that waits for it.
    fn end(&mut self, id: i64) -> bool {
        let Some(watcher) = self.watchers.remove(&id) else { return false };
        self.hub.remove(&watcher.range, watcher.filters, &self.queue, id);
        self.forget(id);
        true
    }

    /// Ends a watch whose next revision is gone, and says so.
    fn end_compacted(&mut self, id: i64, compacted: i64) {
        let Some(watcher) = self.watchers.get_mut(&id) else { return };
        watcher.compacted = true;
        self.hub.remove(&watcher.range, watcher.filters, &self.queue, id);
        self.forget(id);
        self.answers.push_back(WatchAnswer { watch_id: id, canceled: true, compact_revision: compacted, ..WatchAnswer::default() });
    }

    fn forget(&self, id: i64) {
        let mut state = lock(&self.queue.state);
        state.behind.remove(&id);
        if let Some(slot) = state.slots.remove(&id) {
            state.load.take(&slot.waiting);
        }
        state.ready.retain(|&ready| ready != id);
    }

    /// Asks for one progress response for the whole stream. It comes when every watch has been told all there is; if a
    /// watch is catching up or waits for a revision to come, it does not come at all, as in etcd.
    pub fn progress(&mut self) {
        // A watch may have nothing left to catch up with; see to that first.
        self.settle();
        let newest = self.store.revision();
        let synced = lock(&self.queue.state).behind.is_empty();
        let started = self.watchers.values().all(|watcher| watcher.start <= newest);
        if synced && started && !self.watchers.is_empty() {
            self.progress = true;
            self.queue.waker.wake();
        }
    }

    /// The periodic progress: a response for each watch that asked for them, is synced, and got nothing since last time.
    pub fn notify_progress(&mut self) {
        let Some(revision) = self.hub.settled(&self.queue) else { return };
        for (id, watcher) in &mut self.watchers {
            if watcher.progress_notify && !watcher.compacted && !watcher.busy && watcher.start <= revision {
                self.answers.push_back(WatchAnswer { revision, watch_id: *id, ..WatchAnswer::default() });
            }
            watcher.busy = false;
        }
        self.queue.waker.wake();
    }

    /// Whether any watch of the session asked for periodic progress.
    pub fn wants_progress(&self) -> bool {
        self.watchers.values().any(|watcher| watcher.progress_notify)
    }

    /// The next answer.
    ///
    /// # Errors
    /// When the history cannot be read: a fault of the member, which ends the stream.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<WatchAnswer>> {
        self.queue.waker.register(cx.waker());
        if let Some(answer) = self.answers.pop_front() {
            return Poll::Ready(Ok(answer));
        }
        // Those behind and those synced take turns, so that neither starves the other.
        let behind = !lock(&self.queue.state).behind.is_empty();
        self.turn = !self.turn;
        let queued = if behind && self.turn { None } else { self.queue.pop() };
        if let Some((id, batches)) = queued {
            self.answer(id, batches, 0)?;
        } else if behind {
            self.catch_up()?;
            // There may be more to read, or to take; let others have their turn before.
            cx.waker().wake_by_ref();
        }
        if self.answers.is_empty()
            && self.progress
            && let Some(revision) = self.hub.settled(&self.queue)
        {
            self.progress = false;
            return Poll::Ready(Ok(WatchAnswer { revision, watch_id: NO_WATCH, ..WatchAnswer::default() }));
        }
        match self.answers.pop_front() {
            Some(answer) => Poll::Ready(Ok(answer)),
            None => Poll::Pending,
        }
    }

    /// Queues the answer that brings a watch these events, in pieces if it asked for that. `revision` 0 is the last batch's.
    fn answer(&mut self, id: i64, batches: Vec<Arc<Batch>>, revision: i64) -> Result<()> {
        let Some(watcher) = self.watchers.get_mut(&id) else { return Ok(()) };
        watcher.busy = true;
        self.hub.counters.events.add(batches.iter().map(|batch| batch.events.len() as u64).sum());
        let last = batches.last().map_or(0, |batch| batch.revision);
        let head = || WatchAnswer { revision: revision.max(last), watch_id: id, prev_kv: watcher.prev_kv, ..WatchAnswer::default() };
        if watcher.fragment {
            let mut parts = Vec::new();
            let mut part = BytesMut::new();
            for batch in &batches {
                let body = batch.body(watcher.prev_kv, &self.store)?;
                let mut from = 0;
                for &end in &body.ends {
                    if !part.is_empty() && part.len() + (end - from) > self.hub.limits.fragment_bytes {
                        parts.push(part.split().freeze());
                    }
                    part.put_slice(&body.bytes[from..end]);
                    from = end;
                }
            }
            if !parts.is_empty() {
                parts.push(part.freeze());
                let fragments = parts.len();
                for (number, part) in parts.into_iter().enumerate() {
                    // The in-process client takes the events from the batches, whole; it never asks for fragments.
                    self.answers.push_back(WatchAnswer { part: Some(part), fragment: number + 1 < fragments, ..head() });
                }
                return Ok(());
            }
        }
        self.answers.push_back(WatchAnswer { batches, ..head() });
        Ok(())
    }

    /// Makes those watches synced that have nothing to catch up with.
    fn settle(&mut self) {
        let behind: Vec<(i64, i64)> = lock(&self.queue.state).behind.iter().map(|(&id, &next)| (id, next)).collect();
        let compacted = self.store.revisions().1;
        for (id, next) in behind {
            if next < compacted {
                self.end_compacted(id, compacted);
            } else {
                self.hub.rejoin(&self.queue, id, next - 1);
            }
        }
    }

    /// The watches that are catching up, each with the revision it reads next.
    #[cfg(test)]
    pub fn behind(&self) -> BTreeMap<i64, i64> {
        lock(&self.queue.state).behind.clone()
    }

    /// One bounded step of reading the history for the watches that are behind.
    fn catch_up(&mut self) -> Result<()> {
        self.settle();
        let behind: BTreeMap<i64, i64> = lock(&self.queue.state).behind.clone();
        let Some(&from) = behind.values().min() else { return Ok(()) };
        let upto = self.store.revision();
        let limits = self.hub.limits;
        let mut found: BTreeMap<i64, Vec<(i64, Vec<Event>)>> = BTreeMap::new();
        let mut looked_at = 0;
        let mut bytes = 0;
        let mut last = from - 1;
        let mut whole = true;
        let from_revision = Revision { main: from, sub: 0 };
        self.store.history().scan(from_revision, Revision { main: upto + 1, sub: 0 }, &mut |revision, record| {
            // Stop between two revisions only, and never before the first.
            if revision.main != last && (looked_at >= limits.catch_up_records || bytes >= limits.response_bytes) {
                whole = false;
                return Ok(false);
            }
            looked_at += 1;
            last = revision.main;
            let kv = EncodedKv::from_encoded(record.bytes.clone());
            let key = kv.decode().map_err(|_| self.store.history().missing(revision))?.key;
            let mut event = None;
            for (id, next) in &behind {
                let Some(watcher) = self.watchers.get(id) else { continue };
                if revision.main < *next || !watcher.range.contains(&key) {
                    continue;
                }
                let event = event.get_or_insert_with(|| Event {
                    key: key.clone(),
                    revision,
                    delete: record.tombstone,
                    kv: if record.tombstone { deleted(&key, revision.main) } else { kv.clone() },
                });
                if !watcher.filters.passes(event.delete) {
                    continue;
                }
                bytes += event.kv.encoded_len();
                let batches = found.entry(*id).or_default();
                match batches.last_mut() {
                    Some((main, events)) if *main == revision.main => events.push(event.clone()),
                    _ => batches.push((revision.main, vec![event.clone()])),
                }
            }
            Ok(true)
        })?;
        let position = if whole { upto } else { last };
        // A compaction may have passed while we read; then what was read may have holes.
        let compacted = self.store.revisions().1;
        for (&id, &next) in &behind {
            if next < compacted {
                self.end_compacted(id, compacted);
                found.remove(&id);
            }
        }
        for (id, batches) in found {
            for batches in batches.chunks(limits.response_revisions) {
                let batches = batches.iter().map(|(main, events)| Batch::new(*main, events.clone())).collect();
                self.answer(id, batches, if whole { upto } else { 0 })?;
            }
        }
        let ids: Vec<(i64, i64)> = {
            let mut state = lock(&self.queue.state);
            // Only those that were read for: a publisher may have thrown another watch back in the meantime.
            for id in behind.keys() {
                if let Some(next) = state.behind.get_mut(id) {
                    *next = (*next).max(position + 1);
                }
            }
            state.behind.iter().map(|(&id, &next)| (id, next)).collect()
        };
        for (id, next) in ids {
            self.hub.rejoin(&self.queue, id, next - 1);
        }
        Ok(())
    }
}

/// Puts an answer on the wire: the head as a message, then the events' own bytes.
pub(crate) fn encode_answer(head: &crate::proto::etcdserverpb::WatchResponse, bodies: &[Bytes], out: &mut impl BufMut) -> Result<()> {
    head.encode(out)
        .map_err(|err| Error::Failed(format!("a watch response of {} bytes does not fit its buffer: {err}", head.encoded_len())))?;
    for body in bodies {
        out.put_slice(body);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::history::HistoryOptions;
    use crate::storage::mem::Mem;

    fn furnished(limits: Limits) -> (Arc<Store>, Arc<WatchHub>) {
        let (store, _) = Store::open(Arc::new(Mem::new()), HistoryOptions::default(), &mut |_, _| {}).unwrap();
        let hub = Arc::new(WatchHub::with_limits(store.revision(), limits));
        (Arc::new(store), hub)
    }

    fn watch(key: String, range_end: &str) -> WatchCreateRequest {
        WatchCreateRequest { key: key.into(), range_end: range_end.to_owned().into(), ..WatchCreateRequest::default() }
    }

    #[test]
    fn the_shares_of_a_commit_are_bounded() {
        const KEYS: usize = 2000;
        const RANGES: usize = 50;
        let limits = Limits { queue_bytes: 10_000, ..LIMITS };
        let (store, hub) = furnished(limits);
        let mut session = Session::new(hub.clone(), store.clone());
        for number in 0..RANGES {
            // Overlapping ranges, each another one: all end at the same key.
            session.create(&watch(format!("k{number:04}"), "l"));
        }
        // And one that few of the keys concern.
        session.create(&watch("k0000".to_owned(), "k0004"));
        let mut writer = store.begin();
        for number in 0..KEYS {
            writer.put(&format!("k{number:04}").into(), &Bytes::from_static(b"value"), 0);
        }
        let committed = writer.finish().unwrap();
        {
            let inner = lock(&hub.inner);
            let shares = inner.shares(&committed, limits);
            assert_eq!(shares.len(), RANGES + 1);
            let kept: usize = shares.iter().map(|share| share.events.len()).sum();
            assert!(kept * committed.events[0].kv.encoded_len() <= limits.queue_bytes * COMMIT_QUEUES, "{kept} events are kept");
            assert_eq!(shares.iter().filter(|share| !share.too_much).count(), 1);
            assert!(inner.shares(&committed, limits).iter().all(|share| share.events.len() <= 4), "the same once more");
        }
        hub.publish(&committed);
        let behind = session.behind();
        assert_eq!(behind, (0..RANGES as i64).map(|id| (id, committed.revision)).collect());
    }
}
