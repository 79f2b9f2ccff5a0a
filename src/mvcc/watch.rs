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
//! # Another store
//! When a snapshot takes the place of the member's store ([`WatchHub::replace`]), every watch is thrown back to where it stands, and
//! reads on in the new history: it gets what it would have got, unless that history begins behind it. Then it is canceled as by a
//! compaction. What a step has read in the old store is as good as ever, for one history is the continuation of the other.
//!
//! # What catching up costs
//! It goes in steps. A step reads for all watches of its stream that are behind: it looks at each record once, finds the
//! watches that its key concerns as a publication does, and reads the rest of a large value only if there are any. It ends
//! after 512 records or 256 KiB looked at: 1 or 2 ms when all of it comes from the disk. Only what must not be divided takes
//! longer: one large value (5 ms per MiB), one revision of many records, and, for those who asked for them, the previous
//! pairs, one more read each. So a member's sessions let threads that may wait for the disk read each step
//! ([`Session::reading_elsewhere`]), and what is left for the runtime is to hand on what was found.
//!
//! While a step is under way its watches are behind, and nobody but its end moves them on: what is published meanwhile they
//! read with the next step. A watch that was canceled meanwhile, known by its serial number, gets nothing.
//!
//! # Promises
//! Of each matching event a watcher gets exactly one, in the order of the revisions; the events of one revision come in
//! one response, unless it asked for fragments; a progress response of revision *r* comes after all events up to *r*.
//!
//! # Source
//! The wire behaviour is etcd's: `server/etcdserver/api/v3rpc/watch.go`, `server/storage/mvcc/watchable_store.go`.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::proto::etcdserverpb::WatchCreateRequest;
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::{EncodedKv, leading_key};
use crate::storage::Revision;

use super::intervals::Intervals;
use super::{Committed, Event, KeyRange, Store, deleted};

use self::catch_up::{Errand, Found, Handed, Readers, Step};
pub(crate) use self::session::{Session, WatchAnswer, encode_answer};

mod catch_up;
mod session;

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

/// Records of the history that one step of catching up looks at, and bytes that it looks at, whether they concern anyone or
/// not: from a cold disk it then takes a millisecond or two. A single revision that is larger is a step of its own.
const CATCH_UP_RECORDS: usize = 512;
const CATCH_UP_BYTES: usize = 256 << 10;

/// Events that one step collects for all groups of watches together. Beyond it all but one of the groups that a revision
/// concerns leave the rest of it, and what comes later, to another step.
const CATCH_UP_EVENTS: usize = 64 << 10;

/// The bounds above; only tests set others, to reach them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub queue_bytes: usize,
    pub response_revisions: usize,
    pub response_bytes: usize,
    pub fragment_bytes: usize,
    pub catch_up_records: usize,
    pub catch_up_bytes: usize,
    pub catch_up_events: usize,
}

const LIMITS: Limits = Limits {
    queue_bytes: QUEUE_BYTES,
    response_revisions: RESPONSE_REVISIONS,
    response_bytes: RESPONSE_BYTES,
    fragment_bytes: FRAGMENT_BYTES,
    catch_up_records: CATCH_UP_RECORDS,
    catch_up_bytes: CATCH_UP_BYTES,
    catch_up_events: CATCH_UP_EVENTS,
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
    /// How many stores have taken the place of another. Grows under the lock; a session that finds it grown asks for the store.
    stores: AtomicU64,
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
    /// The store that has taken the place of the one with which it began.
    store: Option<Arc<Store>>,
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
        let inner = Inner { keys, spans, published: revision, watches: 0, sessions, next_session: 0, store: None };
        WatchHub { inner: Mutex::new(inner), stores: AtomicU64::new(0), limits: LIMITS, counters }
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

    /// Goes over to another store, whose history continues the one of the store before. Nothing is published meanwhile.
    pub fn replace(&self, store: &Arc<Store>) {
        let mut inner = lock(&self.inner);
        let told = std::mem::replace(&mut inner.published, store.revision());
        inner.store = Some(store.clone());
        self.stores.fetch_add(1, Ordering::Release);
        for queue in inner.sessions.values() {
            lock(&queue.state).throw_all_back(told);
            queue.waker.wake();
        }
    }

    /// Has all sessions looked at, those too that have nothing to tell.
    pub fn wake_all(&self) {
        lock(&self.inner).sessions.values().for_each(|queue| queue.waker.wake());
    }

    /// How many stores there were before the present one, and that one, if there were any.
    fn store(&self) -> (u64, Option<Arc<Store>>) {
        let inner = lock(&self.inner);
        (self.stores.load(Ordering::Acquire), inner.store.clone())
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

    /// Makes those watches of a session synced that have all there is behind them. Each is given with the revision that it
    /// reads next.
    fn rejoin(&self, queue: &Queue, watches: impl IntoIterator<Item = (i64, i64)>) {
        let inner = lock(&self.inner);
        let mut state = lock(&queue.state);
        for (id, next) in watches {
            if inner.published < next {
                state.behind.remove(&id);
                if let Some(slot) = state.slots.get_mut(&id) {
                    slot.next = next;
                }
            }
        }
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

    /// Each watch reads on where it stands, from a revision of which it was not told.
    fn throw_all_back(&mut self, published: i64) {
        self.ready.clear();
        self.load = Load::default();
        for (&id, slot) in &mut self.slots {
            let waiting = std::mem::take(&mut slot.waiting);
            let from = waiting.first().map_or(published + 1, |first| first.revision);
            // Of one that begins later, or was just synced, `next` says more.
            self.behind.entry(id).or_insert(from.max(slot.next));
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Waker;

    use super::*;
    use crate::mvcc::model::both::poll;
    use crate::storage::history::HistoryOptions;
    use crate::storage::mem::Mem;
    use crate::storage::{self, Backend};

    /// Memory that counts what is read.
    #[derive(Default)]
    struct Counting {
        mem: Mem,
        reads: AtomicUsize,
    }

    impl Counting {
        fn reads(&self) -> usize {
            self.reads.load(Ordering::Relaxed)
        }
    }

    impl Backend for Counting {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.mem.get(key)
        }

        fn scan(&self, start: &[u8], end: &[u8], visit: &mut storage::Visit<'_>) -> Result<()> {
            self.mem.scan(start, end, visit)
        }

        fn apply(&self, batch: &storage::Batch) -> Result<()> {
            self.mem.apply(batch)
        }

        fn sync(&self) -> Result<()> {
            self.mem.sync()
        }

        fn disk_bytes(&self) -> u64 {
            self.mem.disk_bytes()
        }

        fn reopen(&self) -> Result<()> {
            self.mem.reopen()
        }

        fn start_rewrite(&self) -> Result<()> {
            self.mem.start_rewrite()
        }

        fn rewrite_step(&self, max_bytes: usize) -> Result<bool> {
            self.mem.rewrite_step(max_bytes)
        }
    }

    fn furnished(limits: Limits) -> (Arc<Counting>, Arc<Store>, Arc<WatchHub>) {
        let backend = Arc::new(Counting::default());
        let (store, _) =
            Store::open(backend.clone(), HistoryOptions { cache_bytes: 1, ..HistoryOptions::default() }, &mut |_, _| {}).unwrap();
        let hub = Arc::new(WatchHub::with_limits(store.revision(), limits));
        (backend, Arc::new(store), hub)
    }

    fn watch(key: String, range_end: &str) -> WatchCreateRequest {
        WatchCreateRequest { key: key.into(), range_end: range_end.to_owned().into(), ..WatchCreateRequest::default() }
    }

    fn from(start_revision: i64, watch: WatchCreateRequest) -> WatchCreateRequest {
        WatchCreateRequest { start_revision, ..watch }
    }

    /// Puts keys in one revision, and tells the hub.
    fn put(store: &Store, hub: &WatchHub, keys: impl IntoIterator<Item = String>, value: &Bytes) {
        let mut writer = store.begin();
        for key in keys {
            writer.put(&key.into(), value, 0);
        }
        hub.publish(&writer.finish().unwrap());
        store.history().commit(Bytes::new());
    }

    /// How many events each watch is told of, when all is told.
    fn told(session: &mut Session) -> BTreeMap<i64, usize> {
        let mut told = BTreeMap::new();
        while let Some(answer) = poll(session) {
            assert!(!answer.canceled, "{}", answer.cancel_reason);
            *told.entry(answer.watch_id).or_default() += answer.batches.iter().map(|batch| batch.events.len()).sum::<usize>();
        }
        told
    }

    /// Large values are spread over many places of the disk. Of those that nobody watches only the beginning is read, and
    /// not of many in one go.
    #[test]
    fn what_nobody_watches_is_not_read_whole() {
        let (backend, store, hub) = furnished(LIMITS);
        let value = Bytes::from(vec![b'x'; 300_000]);
        for number in 0..100 {
            put(&store, &hub, [format!("k{number}")], &value);
        }
        store.history().sync().unwrap();
        let mut session = Session::new(hub.clone(), store.clone());
        session.create(&from(2, watch("none".to_owned(), "")));
        assert!(poll(&mut session).unwrap().created);
        let before = backend.reads();
        assert!(session.poll_next(&mut Context::from_waker(Waker::noop())).is_pending());
        let one_step = backend.reads() - before;
        assert!((1..=20).contains(&one_step), "{one_step} reads in one step");
        assert_eq!(told(&mut session), BTreeMap::new());
        assert!(session.behind().is_empty());
        let all = backend.reads() - before;
        assert!((100..200).contains(&all), "{all} reads in all");
        // And if somebody watches one of them, that one is read: 19 pieces.
        session.create(&from(2, watch("k7".to_owned(), "")));
        let before = backend.reads();
        assert_eq!(told(&mut session), [(1, 1)].into());
        let all = backend.reads() - before;
        assert!((119..220).contains(&all), "{all} reads in all");
    }

    /// What is published, canceled and asked for while a step is away, and a step that never comes back.
    #[test]
    fn whoever_polls_reads_nothing() {
        let (backend, store, hub) = furnished(LIMITS);
        let value = Bytes::from_static(b"value");
        for number in 0..100 {
            put(&store, &hub, [format!("k{}", number % 10)], &value);
        }
        store.history().sync().unwrap();
        let away: Arc<Mutex<Vec<Box<dyn FnOnce() + Send>>>> = Arc::default();
        let to = away.clone();
        let mut session = Session::new(hub.clone(), store.clone()).reading_elsewhere(Arc::new(move |step| lock(&to).push(step)));
        let before = backend.reads();
        session.create(&from(2, watch("k".to_owned(), "l")));
        session.create(&from(2, WatchCreateRequest { watch_id: 7, ..watch("k3".to_owned(), "") }));
        assert_eq!(told(&mut session), [(0, 0), (7, 0)].into());
        assert_eq!((backend.reads() - before, lock(&away).len()), (0, 1));
        // It is read, and before it is handed over one watch gets another range, and all get news.
        session.cancel(7);
        assert!(poll(&mut session).unwrap().canceled);
        session.create(&from(2, WatchCreateRequest { watch_id: 7, ..watch("k4".to_owned(), "") }));
        put(&store, &hub, ["k3".to_owned(), "k4".to_owned()], &value);
        let step = lock(&away).pop().unwrap();
        step();
        put(&store, &hub, ["k4".to_owned()], &value);
        let before = backend.reads();
        let mut sum = told(&mut session);
        assert_eq!(sum, [(0, 100), (7, 0)].into());
        assert_eq!(backend.reads(), before);
        loop {
            let Some(step) = lock(&away).pop() else { break };
            step();
            for (id, events) in told(&mut session) {
                *sum.entry(id).or_default() += events;
            }
        }
        assert_eq!(sum, [(0, 103), (7, 12)].into());
        assert!(session.behind().is_empty());
        // The server stops: the step is dropped, and the stream ends.
        session.create(&from(2, watch("k5".to_owned(), "")));
        assert!(poll(&mut session).unwrap().created);
        assert_eq!(told(&mut session), BTreeMap::new());
        lock(&away).clear();
        let end = session.poll_next(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(end, Poll::Ready(Err(Error::Stopped))));
    }

    /// A snapshot takes the store's place: whoever watches is told of every revision once and in order, or that it was compacted.
    #[test]
    fn another_store_goes_on_where_the_old_one_was() {
        let value = Bytes::from_static(b"value");
        let key = |number: i64| [format!("k{}", number % 3)];
        let ((_, old, hub), (_, new, other)) = (furnished(LIMITS), furnished(LIMITS));
        for number in 0..20 {
            put(&new, &other, key(number), &value);
        }
        new.compact(4).unwrap();
        for number in 0..5 {
            put(&old, &hub, key(number), &value);
        }
        let mut session = Session::new(hub.clone(), old.clone());
        // From now on, from what will be compacted, from what will not, from what only the new store has, and from what is to come.
        for start in [0, 2, 5, 12, 22] {
            session.create(&from(start, watch("k".to_owned(), "l")));
        }
        for _ in 0..5 {
            assert!(poll(&mut session).unwrap().created);
        }
        for number in 5..10 {
            put(&old, &hub, key(number), &value);
        }
        hub.replace(&new);
        // Whoever asked for the store before that watches the new one all the same.
        let mut later = Session::new(hub.clone(), old);
        later.create(&watch("k".to_owned(), "l"));
        put(&new, &hub, key(20), &value);
        let mut seen: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        let mut compacted = Vec::new();
        while let Some(answer) = poll(&mut session) {
            if answer.canceled {
                compacted.push((answer.watch_id, answer.compact_revision));
            }
            seen.entry(answer.watch_id).or_default().extend(answer.batches.iter().map(|batch| batch.revision));
        }
        assert_eq!(compacted, [(1, 4)]);
        for (id, first) in [(0, 7), (2, 5), (3, 12), (4, 22)] {
            assert_eq!(seen[&id], (first..=22).collect::<Vec<_>>(), "watch {id}");
        }
        assert_eq!(told(&mut later), [(0, 1)].into());
        assert!(session.behind().is_empty() && later.behind().is_empty());
    }

    /// A large revision under many overlapping ranges: no step holds it for all of them, and all get it whole.
    #[test]
    fn a_step_is_bounded_whoever_watches() {
        const KEYS: usize = 300;
        const RANGES: usize = 20;
        let limits = Limits { catch_up_events: 500, ..LIMITS };
        let (_, store, hub) = furnished(limits);
        put(&store, &hub, ["k".to_owned()], &Bytes::new());
        put(&store, &hub, (0..KEYS).map(|number| format!("k{number:04}")), &Bytes::new());
        put(&store, &hub, ["k1".to_owned()], &Bytes::new());
        let mut session = Session::new(hub.clone(), store.clone());
        for number in 0..RANGES {
            session.create(&from(2, watch(format!("k{number:04}"), "l")));
            // One more of the same costs nothing.
            session.create(&from(2, watch(format!("k{number:04}"), "l")));
        }
        let found = session.next_step().unwrap().read().unwrap();
        let events: usize = found.hauls.iter().flat_map(|haul| &haul.batches).map(|batch| batch.events.len()).sum();
        assert!((KEYS..=500 + KEYS).contains(&events), "{events} events in one step");
        assert_eq!((found.hauls.len(), found.nexts.len()), (RANGES, 2 * RANGES));
        let expected = (0..2 * RANGES).map(|id| (id as i64, KEYS - id / 2 + 1));
        assert_eq!(told(&mut session), expected.collect());
    }

    #[test]
    fn the_shares_of_a_commit_are_bounded() {
        const KEYS: usize = 2000;
        const RANGES: usize = 50;
        let limits = Limits { queue_bytes: 10_000, ..LIMITS };
        let (_, store, hub) = furnished(limits);
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
