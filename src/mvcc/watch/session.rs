//! A [`Session`]: the watches of one client stream, polled by whatever sends to the client. It takes from its queue what was published,
//! and sends those that are behind to [catch up](super::catch_up). The head of [watch](super) has the whole picture.

use super::*;

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
    pub(super) part: Option<Bytes>,
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

pub(super) struct Watcher {
    /// Tells it from another one that had its id before.
    pub(super) serial: u64,
    pub(super) range: KeyRange,
    pub(super) filters: Filters,
    pub(super) prev_kv: bool,
    pub(super) fragment: bool,
    pub(super) progress_notify: bool,
    /// The revision it was asked to start at; 0: now. Before that revision has come there is no progress to report.
    pub(super) start: i64,
    /// Whether it got events since the last round of progress responses.
    pub(super) busy: bool,
    /// It was canceled because its start had been compacted. The client's own cancel is still to come; until then the id
    /// stays taken, as in etcd.
    pub(super) compacted: bool,
}

/// The watches of one client stream. Dropping it ends them.
pub(crate) struct Session {
    pub(super) hub: Arc<WatchHub>,
    pub(super) store: Arc<Store>,
    /// How many stores the hub had before that one.
    pub(super) stores: u64,
    pub(super) queue: Arc<Queue>,
    pub(super) watchers: BTreeMap<i64, Watcher>,
    pub(super) next_id: i64,
    /// Watches created so far.
    pub(super) created: u64,
    /// Runs a step of catching up on another thread; none to do it on the spot.
    pub(super) elsewhere: Option<Elsewhere>,
    /// The step that is being read elsewhere. Until it is back its watches stay as they are.
    pub(super) step: Option<Handed>,
    /// Who the last step read for. Mostly the next one reads for the same.
    pub(super) readers: Option<Arc<Readers>>,
    /// Answers that are ready, before all events: creations, cancellations, fragments.
    pub(super) answers: VecDeque<WatchAnswer>,
    /// A progress response was asked for, and is due as soon as nothing waits before it.
    pub(super) progress: bool,
    /// Whose turn it is: flips with each poll.
    pub(super) turn: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        for (id, watcher) in &self.watchers {
            self.hub.remove(&watcher.range, watcher.filters, &self.queue, *id);
        }
        lock(&self.hub.inner).sessions.remove(&self.queue.session);
    }
}

/// Takes a piece of work to a thread that may wait for the disk.
pub(crate) type Elsewhere = Arc<dyn Fn(Box<dyn FnOnce() + Send>) + Send + Sync>;

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
        // The hub may have gone over to another store since the caller has asked for it.
        let (stores, newer) = hub.store();
        Session {
            hub,
            store: newer.unwrap_or(store),
            stores,
            queue,
            watchers: BTreeMap::new(),
            next_id: 0,
            created: 0,
            elsewhere: None,
            step: None,
            readers: None,
            answers: VecDeque::new(),
            progress: false,
            turn: false,
        }
    }

    /// Has the history read by threads that may wait for the disk, instead of by whoever polls.
    pub fn reading_elsewhere(mut self, elsewhere: Elsewhere) -> Self {
        self.elsewhere = Some(elsewhere);
        self
    }

    /// Answers that wait to be polled; the caller takes no further requests while there are many.
    pub fn backlog(&self) -> usize {
        self.answers.len()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Goes over to another store when the hub has.
    fn refresh(&mut self) {
        if self.stores != self.hub.stores.load(Ordering::Acquire) {
            let (stores, store) = self.hub.store();
            self.stores = stores;
            self.store = store.unwrap_or_else(|| self.store.clone());
        }
    }

    /// Opens a watch and answers with its id: an event of it never comes before that.
    pub fn create(&mut self, request: &WatchCreateRequest) {
        self.refresh();
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
        self.hub.rejoin(&self.queue, [(id, start)]);
        self.created += 1;
        let watcher = Watcher {
            serial: self.created,
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
    pub(super) fn end(&mut self, id: i64) -> bool {
        let Some(watcher) = self.watchers.remove(&id) else { return false };
        self.hub.remove(&watcher.range, watcher.filters, &self.queue, id);
        self.forget(id);
        true
    }

    /// Ends a watch whose next revision is gone, and says so.
    pub(super) fn end_compacted(&mut self, id: i64, compacted: i64) {
        let Some(watcher) = self.watchers.get_mut(&id) else { return };
        watcher.compacted = true;
        self.hub.remove(&watcher.range, watcher.filters, &self.queue, id);
        self.forget(id);
        self.answers.push_back(WatchAnswer { watch_id: id, canceled: true, compact_revision: compacted, ..WatchAnswer::default() });
    }

    pub(super) fn forget(&self, id: i64) {
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
        self.refresh();
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
        self.refresh();
        if let Some(answer) = self.answers.pop_front() {
            return Poll::Ready(Ok(answer));
        }
        // Those behind and those synced take turns, so that neither starves the other.
        let behind = match &self.step {
            Some(step) => step.is_back(),
            None => !lock(&self.queue.state).behind.is_empty(),
        };
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
    pub(super) fn answer(&mut self, id: i64, batches: Vec<Arc<Batch>>, revision: i64) -> Result<()> {
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

    /// Makes those watches synced that have nothing to catch up with. Not while a step reads for them: what it brings would
    /// then come twice.
    pub(super) fn settle(&mut self) {
        if self.step.is_some() {
            return;
        }
        let mut behind = lock(&self.queue.state).behind.clone();
        let compacted = self.store.revisions().1;
        behind.retain(|&id, next| {
            let gone = *next < compacted;
            if gone {
                self.end_compacted(id, compacted);
            }
            !gone
        });
        self.hub.rejoin(&self.queue, behind);
    }

    /// The watches that are catching up, each with the revision it reads next.
    #[cfg(test)]
    pub fn behind(&self) -> BTreeMap<i64, i64> {
        lock(&self.queue.state).behind.clone()
    }

    /// Begins a bounded step of reading the history for the watches that are behind, or ends the one that is back.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        if let Some(step) = self.step.take() {
            return match step.take() {
                Some(found) => self.caught_up(found?),
                None => {
                    self.step = Some(step);
                    Ok(())
                }
            };
        }
        self.settle();
        let Some(step) = self.next_step() else { return Ok(()) };
        let Some(elsewhere) = &self.elsewhere else {
            let found = step.read()?;
            return self.caught_up(found);
        };
        let back = Arc::new(Mutex::new(None));
        let errand = Errand { back: back.clone(), queue: self.queue.clone() };
        self.step = Some(Handed(back));
        elsewhere(Box::new(move || errand.done(step.read())));
        Ok(())
    }

    /// What there is to read for the watches that are behind.
    pub(super) fn next_step(&self) -> Option<Step> {
        let mut who = Vec::new();
        let mut nexts = Vec::new();
        for (&id, &next) in &lock(&self.queue.state).behind {
            if let Some(watcher) = self.watchers.get(&id) {
                who.push((id, watcher.serial));
                nexts.push(next);
            }
        }
        let from = *nexts.iter().min()?;
        let readers = self.readers.clone().filter(|readers| readers.who == who);
        let ranges = match &readers {
            Some(_) => Vec::new(),
            None => {
                let watchers = who.iter().filter_map(|(id, _)| self.watchers.get(id));
                watchers.map(|watcher| (watcher.range.clone(), watcher.filters, watcher.prev_kv)).collect()
            }
        };
        Some(Step { store: self.store.clone(), limits: self.hub.limits, who, ranges, readers, nexts, from, upto: self.store.revision() })
    }

    /// Hands on what a step has found.
    pub(super) fn caught_up(&mut self, found: Found) -> Result<()> {
        let Found { readers, nexts, hauls, position, whole } = found;
        // A compaction may have passed while we read; then what was read may have holes.
        let compacted = self.store.revisions().1;
        let mut done = Vec::new();
        for ((&(id, serial), &next), &group) in readers.who.iter().zip(&nexts).zip(&readers.groups) {
            // It may have been canceled meanwhile, and another one may have its id.
            if self.watchers.get(&id).is_none_or(|watcher| watcher.serial != serial || watcher.compacted) {
                continue;
            }
            if next < compacted {
                self.end_compacted(id, compacted);
            } else if let Some(haul) = hauls.get(group) {
                done.push((id, next, haul));
            }
        }
        let mut positions = Vec::new();
        for (id, next, haul) in done {
            let upto = haul.cut.map_or(position, |cut| cut - 1);
            let news: Vec<_> = haul.batches.iter().filter(|batch| batch.revision >= next).cloned().collect();
            for batches in news.chunks(self.hub.limits.response_revisions) {
                self.answer(id, batches.to_vec(), if whole && haul.cut.is_none() { upto } else { 0 })?;
            }
            positions.push((id, next.max(upto + 1)));
        }
        {
            let mut state = lock(&self.queue.state);
            for (id, position) in &positions {
                if let Some(next) = state.behind.get_mut(id) {
                    *next = *position;
                }
            }
        }
        self.hub.rejoin(&self.queue, positions);
        self.readers = Some(readers);
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
