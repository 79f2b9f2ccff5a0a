//! One [`Step`] of catching up: what the history holds for the watches of a stream that are behind, read in one go and bounded; and the way
//! to a thread that may wait for the disk, and back. What a step costs is said in the head of [watch](super).

use super::*;

/// The watches that a step reads for, and which of them a key concerns.
pub(super) struct Readers {
    /// Their ids and serial numbers, ascending by id.
    pub(super) who: Vec<(i64, u64)>,
    /// The group of each. Those of one range with the same filters share what is found.
    pub(super) groups: Vec<usize>,
    /// Of each group: which events it wants, and whether any watch in it wants the previous pairs with them.
    pub(super) wants: Vec<(Filters, bool)>,
    /// The groups by their ranges.
    pub(super) keys: BTreeMap<Bytes, Vec<usize>>,
    pub(super) spans: Intervals<Vec<usize>>,
}

impl Readers {
    pub(super) fn new(who: Vec<(i64, u64)>, ranges: Vec<(KeyRange, Filters, bool)>) -> Self {
        let (keys, spans) = (BTreeMap::new(), Intervals::new());
        let mut readers = Readers { who, groups: Vec::new(), wants: Vec::new(), keys, spans };
        for (range, filters, prev_kv) in ranges {
            let here = match range {
                KeyRange::Key(key) => readers.keys.entry(key).or_default(),
                KeyRange::Span(start, end) => readers.spans.entry(start, Some(end)),
                KeyRange::From(start) => readers.spans.entry(start, None),
            };
            let same = here.iter().copied().find(|&group| readers.wants.get(group).is_some_and(|wants| wants.0 == filters));
            let group = same.unwrap_or(readers.wants.len());
            if let Some((_, prev)) = readers.wants.get_mut(group) {
                *prev |= prev_kv;
            } else {
                here.push(group);
                readers.wants.push((filters, prev_kv));
            }
            readers.groups.push(group);
        }
        readers
    }

    /// Puts the groups whose ranges contain the key into `into`.
    pub(super) fn concerned(&self, key: &[u8], into: &mut Vec<usize>) {
        into.clear();
        into.extend(self.keys.get(key).into_iter().flatten());
        self.spans.stab(key, &mut |_, groups| into.extend(groups));
    }
}

/// A step of catching up, to be read on any thread: it touches neither the session nor the hub.
pub(super) struct Step {
    pub(super) store: Arc<Store>,
    pub(super) limits: Limits,
    pub(super) who: Vec<(i64, u64)>,
    /// What they watch; empty if `readers` knows that already.
    pub(super) ranges: Vec<(KeyRange, Filters, bool)>,
    pub(super) readers: Option<Arc<Readers>>,
    /// The revision that each reads next, and the least of these.
    pub(super) nexts: Vec<i64>,
    pub(super) from: i64,
    pub(super) upto: i64,
}

/// What a step has found.
pub(super) struct Found {
    pub(super) readers: Arc<Readers>,
    pub(super) nexts: Vec<i64>,
    /// By group.
    pub(super) hauls: Vec<Haul<Arc<Batch>>>,
    /// The revision up to which everything was looked at, and whether it was the newest.
    pub(super) position: i64,
    pub(super) whole: bool,
}

/// What a step has found for one group of watches, by revision.
pub(super) struct Haul<T> {
    /// The first revision that any of its watches wants.
    pub(super) from: i64,
    pub(super) batches: Vec<T>,
    /// The revision that it leaves, with all that follows, to another step.
    pub(super) cut: Option<i64>,
}

impl Step {
    pub(super) fn read(self) -> Result<Found> {
        let Step { store, limits, who, ranges, readers, nexts, from, upto } = self;
        let readers = readers.unwrap_or_else(|| Arc::new(Readers::new(who, ranges)));
        let mut hauls: Vec<Haul<(i64, Vec<Event>)>> =
            readers.wants.iter().map(|_| Haul { from: i64::MAX, batches: Vec::new(), cut: None }).collect();
        for (&group, &next) in readers.groups.iter().zip(&nexts) {
            if let Some(haul) = hauls.get_mut(group) {
                haul.from = haul.from.min(next);
            }
        }
        let history = store.history();
        let mut concerned = Vec::new();
        let (mut records, mut read, mut matched, mut events) = (0, 0, 0, 0);
        let mut last = from - 1;
        let mut whole = true;
        // The group that is given a revision whole, however large it is: thus each step gets somewhere.
        let mut first = None;
        history.look_through(Revision { main: from, sub: 0 }, Revision { main: upto + 1, sub: 0 }, &mut |revision, sight| {
            let main = revision.main;
            if main != last {
                // Stop between two revisions only, and never before the first.
                let enough = records >= limits.catch_up_records
                    || read >= limits.catch_up_bytes
                    || matched >= limits.response_bytes
                    || events >= limits.catch_up_events;
                if enough && records > 0 {
                    whole = false;
                    return Ok(false);
                }
                (last, first) = (main, None);
            }
            let Some(head) = sight.head()? else { return Ok(true) };
            records += 1;
            read += head.len();
            let key = leading_key(&head);
            let key = match key {
                Some(key) => key,
                // A key of 16 KiB and more, which the beginning does not hold.
                None => match sight.record()? {
                    Some(record) => EncodedKv::from_encoded(record.bytes).decode().map_err(|_| history.missing(revision))?.key,
                    None => return Ok(true),
                },
            };
            readers.concerned(&key, &mut concerned);
            let mut event: Option<Event> = None;
            for &group in &concerned {
                let (Some(haul), Some((filters, _))) = (hauls.get_mut(group), readers.wants.get(group)) else { continue };
                if main < haul.from || haul.cut.is_some() || !filters.passes(sight.tombstone) {
                    continue;
                }
                if events >= limits.catch_up_events && *first.get_or_insert(group) != group {
                    haul.cut = Some(main);
                    haul.batches.pop_if(|(begun, _)| *begun == main);
                    continue;
                }
                first.get_or_insert(group);
                let event = match &event {
                    Some(event) => event,
                    None => {
                        let kv = if sight.tombstone {
                            deleted(&key, main)
                        } else {
                            let Some(record) = sight.record()? else { return Ok(true) };
                            read += record.bytes.len() - head.len();
                            EncodedKv::from_encoded(record.bytes)
                        };
                        event.insert(Event { key: key.clone(), revision, delete: sight.tombstone, kv })
                    }
                };
                matched += event.kv.encoded_len();
                events += 1;
                match haul.batches.last_mut() {
                    Some((begun, events)) if *begun == main => events.push(event.clone()),
                    _ => haul.batches.push((main, vec![event.clone()])),
                }
            }
            Ok(true)
        })?;
        let mut done = Vec::with_capacity(hauls.len());
        for (Haul { from, batches, cut }, (_, prev_kv)) in hauls.into_iter().zip(&readers.wants) {
            let batches: Vec<_> = batches.into_iter().map(|(main, events)| Batch::new(main, events)).collect();
            if *prev_kv {
                // The pairs that were replaced stand anywhere on the disk: better fetched here than where the answer is sent.
                for batch in &batches {
                    batch.body(true, &store)?;
                }
            }
            done.push(Haul { from, batches, cut });
        }
        Ok(Found { readers, nexts, hauls: done, position: if whole { upto } else { last }, whole })
    }
}

/// Where a step that is read elsewhere comes back to.
pub(super) struct Handed(pub(super) Arc<Mutex<Option<Result<Found>>>>);

impl Handed {
    pub(super) fn is_back(&self) -> bool {
        lock(&self.0).is_some()
    }

    pub(super) fn take(&self) -> Option<Result<Found>> {
        lock(&self.0).take()
    }
}

/// The other end of a [`Handed`]. It brings something back in any case, lest the session wait forever.
pub(super) struct Errand {
    pub(super) back: Arc<Mutex<Option<Result<Found>>>>,
    pub(super) queue: Arc<Queue>,
}

impl Errand {
    pub(super) fn done(self, found: Result<Found>) {
        *lock(&self.back) = Some(found);
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        // Nothing is there when the step was thrown away, as when the server stops, or when it panicked.
        lock(&self.back).get_or_insert_with(|| Err(Error::Stopped));
        self.queue.waker.wake();
    }
}
