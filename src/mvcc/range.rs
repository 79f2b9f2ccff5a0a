//! Range: reading the keys of a range as they stood at one revision, in steps.
//!
//! A Range has three phases. *Walk* the index and note where each key's record stands; with a limit the walk stops as
//! soon as there is enough, since at the newest revision the index counts the rest without visiting it. *Choose*: filter,
//! sort, cut to the limit; from the index alone wherever it knows enough. *Fetch* the values of what is left.
//!
//! ```text
//! range a..z limit=2 at 7      walk: a@3 c@7 d@5, stop      count: 9, by the tree
//!                              choose: a@3 c@7, more
//!                              fetch: two records
//! ```
//!
//! Each phase goes on in bounded steps, so that a Range over millions of keys neither holds the lock for long nor keeps
//! an I/O thread from others. What it keeps per key until the values are fetched is a [`Hit`], 56 bytes; and of the
//! values no more than `hold_bytes` are held: beyond that only their sizes are kept, and they are fetched once more when
//! the answer is written. A huge answer thus costs its list of revisions, never its size.

use bytes::Bytes;
use prost::Message;

use crate::error::{ApplyError, Error, Result};
use crate::proto::etcdserverpb::RangeRequest;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::{EncodedKv, KeyValue};
use crate::storage::{Record, Revision};

use super::index::{Found, KeyIndex, Meta};
use super::tree::Bound;
use super::txn::{Budget, READ_COST};
use super::{KeyRange, Pin, STEP_KEYS, State, Store, Writer};

/// Bytes of values that one Range holds on to before it is answered; beyond it they are fetched a second time as the
/// answer is written out.
pub(crate) const HOLD_BYTES: usize = 8 << 20;

/// Bytes of values that a sort by value holds on to.
const SORT_HOLD_BYTES: usize = 64 << 20;

/// What it keeps of each value beyond that.
const SORT_PREFIX_BYTES: usize = 64;

/// Keys that fit one step of a walk that is done on the spot; see [`STEP_KEYS`].
pub(crate) const INLINE_KEYS: usize = STEP_KEYS;

/// What is read from the backend, and fetched in all, on the spot. A Range that needs more goes on where it keeps nobody waiting. One
/// read takes some 0.1 ms, and 10 ms for a value of a megabyte.
const INLINE_READS: usize = 2;
const INLINE_BYTES: usize = 1 << 20;

/// Records that are looked at on the spot to filter or sort by them.
const INLINE_CHOICE: usize = 64;

/// Checks what can be checked of a Range without the store.
pub(crate) fn check(request: &RangeRequest) -> Result<(), ApplyError> {
    if request.key.is_empty() {
        return Err(ApplyError::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err() {
        return Err(ApplyError::InvalidSortOption);
    }
    Ok(())
}

/// A key that a Range has found.
#[derive(Debug)]
pub(crate) struct Hit {
    pub revision: Revision,
    /// Known when the record is the key's current one, or once it has been looked at.
    meta: Option<Meta>,
    /// The answer for this key, if it is held.
    pub kv: Option<EncodedKv>,
    /// Size of the answer for this key, in bytes, once it was fetched.
    pub len: usize,
}

/// Lower and upper bounds on revisions; 0 is no bound.
#[derive(Debug, Default, PartialEq, Eq)]
struct Filter {
    min_mod: i64,
    max_mod: i64,
    min_create: i64,
    max_create: i64,
}

impl Filter {
    fn passes(&self, modified: i64, created: i64) -> bool {
        let within = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
        within(modified, self.min_mod, self.max_mod) && within(created, self.min_create, self.max_create)
    }
}

impl Hit {
    /// The answer for this key: the one that is held, or fetched at the revision that `pin` holds.
    ///
    /// # Errors
    /// Those of reading the storage.
    pub fn fetch(self, pin: Option<&Pin>, keys_only: bool) -> Result<EncodedKv> {
        match (self.kv, pin) {
            (Some(kv), _) => Ok(kv),
            (None, Some(pin)) => answer(pin.store(), self.revision, keys_only),
            (None, None) => Err(Error::Failed(format!("the record {:?} is neither held nor kept", self.revision))),
        }
    }
}

/// A Range under way. See the module's head.
#[derive(Debug)]
pub(crate) struct RangeScan {
    range: KeyRange,
    at: i64,
    limit: usize,
    sort: Option<(SortTarget, bool)>,
    /// Whether the limit comes before the sort: so it is when a target is given without an order.
    sort_what_fits: bool,
    filter: Filter,
    keys_only: bool,
    count_only: bool,
    hold_bytes: usize,
    /// The key to go on from; none before the first step.
    cursor: Option<Vec<u8>>,
    hits: Vec<Hit>,
    count: i64,
    /// The walk has not come to its end yet.
    walking: bool,
    /// Filtered, sorted and cut; and whether the limit cut anything off.
    chosen: bool,
    more: bool,
    /// How many of the hits have been fetched, and what their answers take, in bytes.
    fetched: usize,
    held: usize,
}

/// What a Range found.
#[derive(Debug, Default)]
pub(crate) struct RangeResult {
    pub hits: Vec<Hit>,
    pub more: bool,
    /// Keys in the range, whatever the limit and the filters.
    pub count: i64,
    /// Whether all of `hits` hold their answers; if not, those without are to be fetched anew.
    pub held: bool,
}

impl RangeResult {
    /// Answers at once what most requests ask for: one key as it is now, whose record is in memory; and at which revision. It takes
    /// two looks and no hold on a revision. None when it is not that simple.
    pub fn of_one(store: &Store, request: &RangeRequest) -> Option<(RangeResult, i64)> {
        let RangeRequest { keys_only, count_only, .. } = *request;
        let filtered = request.min_mod_revision | request.max_mod_revision | request.min_create_revision | request.max_create_revision != 0;
        if !request.range_end.is_empty() || request.revision > 0 || keys_only || count_only || filtered {
            return None;
        }
        let (found, revision) = {
            let state = store.state();
            (state.index.get(&request.key).and_then(KeyIndex::current), state.revision)
        };
        let Some(found) = found else { return Some((RangeResult { held: true, ..RangeResult::default() }, revision)) };
        // A compaction that has passed in between took an older record, or this one with the key: then the long way finds out.
        let kv = EncodedKv::from_encoded(store.history().at_hand(found.revision)?.bytes);
        let hit = Hit { revision: found.revision, meta: found.meta, len: kv.encoded_len(), kv: Some(kv) };
        Some((RangeResult { hits: vec![hit], more: false, count: 1, held: true }, revision))
    }
}

impl RangeScan {
    /// A Range at revision `at`, which the caller has checked and holds. The request has passed [`check`].
    pub fn new(request: &RangeRequest, at: i64, hold_bytes: usize) -> Self {
        let order = SortOrder::try_from(request.sort_order).unwrap_or_default();
        let target = SortTarget::try_from(request.sort_target).unwrap_or_default();
        let sort = match (order, target) {
            // The index is in the order of the keys already; and a target without an order means ascending.
            (SortOrder::None | SortOrder::Ascend, SortTarget::Key) => None,
            (order, target) => Some((target, order == SortOrder::Descend)),
        };
        let filter = Filter {
            min_mod: request.min_mod_revision,
            max_mod: request.max_mod_revision,
            min_create: request.min_create_revision,
            max_create: request.max_create_revision,
        };
        RangeScan {
            range: KeyRange::new(&request.key, &request.range_end),
            at,
            limit: usize::try_from(request.limit).unwrap_or(0),
            sort,
            sort_what_fits: order == SortOrder::None,
            filter,
            keys_only: request.keys_only,
            count_only: request.count_only,
            hold_bytes,
            cursor: None,
            hits: Vec::new(),
            count: 0,
            walking: true,
            chosen: false,
            more: false,
            fetched: 0,
            held: 0,
        }
    }

    /// Whether the whole range has to be looked at before the first key can be answered.
    pub(super) fn selects(&self) -> bool {
        (self.sort.is_some() && !self.sort_what_fits) || self.filter != Filter::default()
    }

    /// Walks over at most `max` keys. `newest` is the revision at which the index counts. Returns whether more are left.
    fn walk(&mut self, state: &State, newest: i64, max: usize) -> bool {
        let (start, end) = match &self.range {
            KeyRange::Key(key) => {
                if let Some(found) = state.index.get(key).and_then(|entry| entry.at(self.at)) {
                    self.count = 1;
                    if !self.count_only {
                        self.hits.push(hit(key.clone(), found, self.keys_only));
                    }
                }
                return false;
            }
            KeyRange::Span(start, end) => (start.clone(), end.clone()),
            KeyRange::From(start) => (start.clone(), Bytes::new()),
        };
        let to = if end.is_empty() { Bound::Unbounded } else { Bound::Before(&end) };
        let wanted = if self.count_only {
            0
        } else if self.limit == 0 || self.selects() {
            usize::MAX
        } else {
            // One more than asked for, to see whether there is more.
            self.limit.saturating_add(1)
        };
        let from = self.cursor.take();
        for (looked_at, (key, entry)) in state.index.range(from.as_deref().unwrap_or(&start), to).enumerate() {
            if self.hits.len() >= wanted && self.at == newest {
                self.count = i64::try_from(state.index.count_live(&start, to)).unwrap_or(i64::MAX);
                return false;
            }
            if looked_at == max {
                self.cursor = Some(key.to_vec());
                return true;
            }
            if let Some(found) = entry.at(self.at) {
                self.count += 1;
                if self.hits.len() < wanted {
                    let name = if self.keys_only { key.to_vec().into() } else { Bytes::new() };
                    self.hits.push(hit(name, found, self.keys_only));
                }
            }
        }
        false
    }

    /// Filters, sorts and cuts. Returns whether the limit cut anything off.
    fn choose(&mut self, store: &Store) -> Result<bool> {
        if self.sort.is_some() || self.selects() {
            for hit in self.hits.iter_mut().filter(|hit| hit.meta.is_none()) {
                let kv = decode(store, hit.revision)?;
                hit.meta = Some(Meta { created: kv.create_revision, version: kv.version, lease: kv.lease });
            }
            let filter = &self.filter;
            self.hits.retain(|hit| filter.passes(hit.revision.main, hit.meta.map_or(0, |meta| meta.created)));
            if let Some((target, descending)) = self.sort {
                self.sort(target, descending, store)?;
            }
        }
        let more = self.limit > 0 && self.hits.len() > self.limit;
        if more {
            self.hits.truncate(self.limit);
        }
        Ok(more)
    }

    /// Sorts by the target; keys that are equal in it stay in the order of the keys, also when descending, as in etcd.
    fn sort(&mut self, target: SortTarget, descending: bool, store: &Store) -> Result<()> {
        let number = |hit: &Hit| match target {
            SortTarget::Version => hit.meta.map_or(0, |meta| meta.version),
            SortTarget::Create => hit.meta.map_or(0, |meta| meta.created),
            SortTarget::Mod => hit.revision.main,
            SortTarget::Key | SortTarget::Value => 0,
        };
        match target {
            SortTarget::Key if descending => self.hits.reverse(),
            SortTarget::Key => {}
            SortTarget::Value => self.sort_by_value(descending, store)?,
            _ if descending => self.hits.sort_by_key(|hit| std::cmp::Reverse(number(hit))),
            _ => self.hits.sort_by_key(number),
        }
        Ok(())
    }

    /// Sorts by value, holding [`SORT_HOLD_BYTES`] of values at most: beyond them the first bytes of each, and where these are
    /// alike the values are fetched anew for each comparison, which is slow, but ends.
    fn sort_by_value(&mut self, descending: bool, store: &Store) -> Result<()> {
        let mut held = 0;
        let mut values = Vec::with_capacity(self.hits.len());
        for hit in self.hits.drain(..) {
            let value = decode(store, hit.revision)?.value;
            let whole = held + value.len() <= SORT_HOLD_BYTES;
            // Copied when cut: a slice would hold the whole.
            let known = if whole { value } else { Bytes::copy_from_slice(value.get(..SORT_PREFIX_BYTES).unwrap_or(&value)) };
            held += known.len();
            values.push((known, whole, hit));
        }
        let mut failed = None;
        let mut whole = |(value, whole, hit): &(Bytes, bool, Hit)| match if *whole {
            Ok(value.clone())
        } else {
            decode(store, hit.revision).map(|kv| kv.value)
        } {
            Ok(value) => value,
            Err(err) => {
                failed.get_or_insert(err);
                Bytes::new()
            }
        };
        values.sort_by(|a, b| {
            let common = a.0.len().min(b.0.len());
            let alike = !(a.1 && b.1) && a.0[..common] == b.0[..common];
            let order = if alike { whole(a).cmp(&whole(b)) } else { a.0.cmp(&b.0) };
            if descending { order.reverse() } else { order }
        });
        self.hits.extend(values.into_iter().map(|(.., hit)| hit));
        failed.map_or(Ok(()), Err)
    }

    /// Fetches what is not there yet, holding no more than was agreed. On the spot it does so as long as little has to be waited
    /// for, and returns false when more is left.
    fn fetch(&mut self, store: &Store, on_the_spot: bool) -> Result<bool> {
        let mut reader = store.history().reader();
        let (mut reads, mut bytes) = (0, 0);
        while let Some(hit) = self.hits.get_mut(self.fetched) {
            let kv = match hit.kv.take() {
                Some(kv) => kv,
                None => {
                    let record = match reader.at_hand(hit.revision) {
                        Some(record) => record,
                        None if on_the_spot && reads == INLINE_READS => return Ok(false),
                        None => {
                            reads += 1;
                            store.fetch_with(&mut reader, hit.revision)?
                        }
                    };
                    answer_of(store, hit.revision, record, self.keys_only)?
                }
            };
            hit.len = kv.encoded_len();
            bytes += hit.len;
            self.held += hit.len;
            if self.held <= self.hold_bytes {
                hit.kv = Some(kv);
            }
            self.fetched += 1;
            if on_the_spot && bytes > INLINE_BYTES {
                return Ok(self.fetched == self.hits.len());
            }
        }
        Ok(true)
    }

    fn result(self) -> RangeResult {
        RangeResult { held: self.held <= self.hold_bytes, hits: self.hits, more: self.more, count: self.count }
    }

    fn finish(mut self, store: &Store) -> Result<RangeResult> {
        if !self.chosen {
            self.more = self.choose(store)?;
            self.chosen = true;
        }
        self.fetch(store, false)?;
        Ok(self.result())
    }

    /// Whether choosing means to read many records first.
    fn is_long_choice(&self) -> bool {
        let by_value = matches!(self.sort, Some((SortTarget::Value, _)));
        self.hits.len() > INLINE_CHOICE && (by_value || (self.selects() && self.hits.iter().any(|hit| hit.meta.is_none())))
    }

    /// Runs within a request that writes, in one go: nobody can pass in between anyway.
    pub fn run_in(mut self, writer: &Writer<'_>) -> Result<RangeResult> {
        self.walk(&writer.state, writer.at(), usize::MAX);
        self.finish(writer.store)
    }

    /// What the answer would hold, and what it costs to find out, taken from a Txn's bounds.
    pub(super) fn measure_in(mut self, writer: &Writer<'_>, budget: &mut Budget) -> Result<()> {
        self.walk(&writer.state, writer.at(), usize::MAX);
        let unknown = self.hits.iter().filter(|hit| hit.meta.is_none()).count();
        let by_value = matches!(self.sort, Some((SortTarget::Value, _)));
        // Looked at here and once more when it is answered.
        budget.work(
            2 * READ_COST
                * if by_value {
                    self.hits.len()
                } else if self.selects() {
                    unknown
                } else {
                    0
                },
        )?;
        self.choose(writer.store)?;
        for hit in self.hits {
            let len = match hit.kv {
                Some(kv) => kv.encoded_len(),
                None => {
                    budget.work(2 * READ_COST)?;
                    answer(writer.store, hit.revision, self.keys_only)?.encoded_len()
                }
            };
            // Beside its bytes a pair takes some memory of its own.
            budget.answer(len + std::mem::size_of::<Hit>())?;
        }
        Ok(())
    }

    /// The first step, on the spot. `Ok` is the whole answer; `Err` gives the scan back when it is longer than that, to
    /// be [continued](Self::run) where it keeps nobody waiting.
    #[allow(clippy::result_large_err, reason = "the scan goes on where it is, not up a chain of callers")]
    pub fn start(mut self, store: &Store) -> Result<Result<RangeResult>, Self> {
        self.walking = {
            let state = store.state();
            self.walk(&state, state.revision, INLINE_KEYS)
        };
        if self.walking || self.is_long_choice() {
            return Err(self);
        }
        match self.choose(store) {
            Ok(more) => (self.more, self.chosen) = (more, true),
            Err(err) => return Ok(Err(err)),
        }
        match self.fetch(store, true) {
            Ok(true) => Ok(Ok(self.result())),
            Ok(false) => Err(self),
            Err(err) => Ok(Err(err)),
        }
    }

    /// The remaining steps, letting go of the lock between them.
    pub fn run(mut self, pin: &Pin) -> Result<RangeResult> {
        let store = pin.store();
        while self.walking {
            let state = store.state();
            self.walking = self.walk(&state, state.revision, STEP_KEYS);
        }
        self.finish(store)
    }
}

/// The record at `revision`, decoded; its key and value share the stored bytes.
fn decode(store: &Store, revision: Revision) -> Result<KeyValue> {
    EncodedKv::from_encoded(store.fetch(revision)?.bytes).decode().map_err(|_| store.history().missing(revision))
}

/// The answer for the key whose record stands at `revision`.
pub(crate) fn answer(store: &Store, revision: Revision, keys_only: bool) -> Result<EncodedKv> {
    answer_of(store, revision, store.fetch(revision)?, keys_only)
}

fn answer_of(store: &Store, revision: Revision, record: Record, keys_only: bool) -> Result<EncodedKv> {
    let kv = EncodedKv::from_encoded(record.bytes);
    if keys_only {
        let kv = kv.decode().map_err(|_| store.history().missing(revision))?;
        Ok(EncodedKv::encode(&KeyValue { value: Bytes::new(), ..kv }))
    } else {
        Ok(kv)
    }
}

/// A key found in the index; without values its answer is there at once.
fn hit(key: Bytes, found: Found, keys_only: bool) -> Hit {
    let kv = found.meta.filter(|_| keys_only).map(|meta| {
        EncodedKv::encode(&KeyValue {
            key: key.clone(),
            create_revision: meta.created,
            mod_revision: found.revision.main,
            version: meta.version,
            value: Bytes::new(),
            lease: meta.lease,
        })
    });
    Hit { revision: found.revision, meta: found.meta, kv, len: 0 }
}
