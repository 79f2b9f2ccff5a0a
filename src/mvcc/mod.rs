//! Revisions: the store as etcd defines it, over a history of records. Pure logic: no clocks, no network, no tasks.
//!
//! Every request that writes makes one new *main revision*; its writes are numbered within it by the *sub* part. Nothing
//! is overwritten: a put or a deletion adds a [`Record`] to the [`History`] and its revision to the [index](index), and a
//! read at revision *r* sees, of each key, the last write up to *r*. [Compaction](Store::compact_step) forgets what no
//! read at the compacted revision or later can see.
//!
//! The store calls nobody: a commit *returns* what happened ([`Committed`]), and the applier joins it with leases and
//! watches.
//!
//! # Who may do what
//! One thread at a time writes, through [`Store::begin`]; it holds the state's lock for one request, and publishes the
//! new revision when it is done, so that no reader ever sees half a transaction. Any thread reads. Readers of more than
//! a few keys work in steps and let go of the lock in between; a [`Pin`] keeps the compaction from pulling the revision
//! they read out from under them.
//!
//! # Example
//! ```text
//! put a=1        -> revision 2        history: 2 {a,1}
//! txn put a=2,
//!     put b=1    -> revision 3                 3.0 {a,2}   3.1 {b,1}
//! delete a       -> revision 4                 4+ {a}
//! range a..z     -> b=1               a is gone, b is as it was
//! range at 3     -> a=2, b=1
//! compact 4      -> 2 and 3.0 may go; 4+ stays until the next compaction, for watches that start at 4
//! ```
//!
//! # Invariants ([`Store::check`])
//! - the index is what a scan of the history gives;
//! - `compacted <= revision`, and both only grow;
//! - a request that writes makes one main revision, one that does not makes none.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use crate::error::{ApplyError, Error, Result};
use crate::lock::{lock, read, write};
use crate::proto::{EncodedKv, KeyValue};
use crate::storage::history::{History, HistoryOptions, Reader};
use crate::storage::{Backend, Record, Revision};

pub(crate) mod hash;
pub(crate) mod index;
pub(crate) mod intervals;
#[cfg(any(test, fuzzing))]
pub mod model;
pub(crate) mod range;
pub(crate) mod tree;
pub(crate) mod txn;
pub(crate) mod watch;

use hash::{HashScan, KvHash};
use index::{Found, KeyIndex, Meta};
use tree::{Bound, Edit, Tree};
use txn::Tally;

/// Keys that one step of a long read or of a compaction looks at before it lets go of the lock: some tens of
/// microseconds. A longer walk takes more steps; nobody else waits for longer than one. Tests take many small steps.
pub(crate) const STEP_KEYS: usize = if cfg!(any(test, fuzzing)) { 3 } else { 1024 };

/// Revisions that a compaction gathers before it marks them: 16 MiB of them, and those of one step or of one key more.
const DYING_MAX: usize = if cfg!(any(test, fuzzing)) { 20 } else { 1 << 20 };

/// Keys that one step of a compaction changes, under the lock.
const COMPACT_KEYS: usize = if cfg!(any(test, fuzzing)) { 2 } else { 128 };

/// Bytes of records that one step of a compaction's hash reads, or one record more.
const STEP_BYTES: usize = if cfg!(any(test, fuzzing)) { 100 } else { 1 << 20 };

/// Name of the stored compaction mark: the revision that was asked for, as 8 bytes, big-endian. All that lies below it
/// is out of reach at once, and goes physically when the background gets to it, also after a restart.
pub(crate) const META_COMPACTED: &[u8] = b"mvcc/compacted";

/// An empty store is at this revision, as etcd's is.
pub(crate) const FIRST_REVISION: i64 = 1;

/// The keys a request speaks of, as its `key` and `range_end` say: one key, `[start, end)`, or all from a key on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyRange {
    Key(Bytes),
    Span(Bytes, Bytes),
    From(Bytes),
}

impl KeyRange {
    /// Reads etcd's two fields: no end is the key alone, an end of one zero byte is no end.
    pub fn new(key: &Bytes, range_end: &Bytes) -> Self {
        match range_end.as_ref() {
            [] => KeyRange::Key(key.clone()),
            [0] => KeyRange::From(key.clone()),
            _ => KeyRange::Span(key.clone(), range_end.clone()),
        }
    }

    pub fn start(&self) -> &Bytes {
        match self {
            KeyRange::Key(key) | KeyRange::Span(key, _) | KeyRange::From(key) => key,
        }
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::Key(only) => only == key,
            KeyRange::Span(start, end) => start.as_ref() <= key && key < end.as_ref(),
            KeyRange::From(start) => start.as_ref() <= key,
        }
    }
}

/// One change of one key, as watches see it.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub key: Bytes,
    pub revision: Revision,
    /// A deletion; `kv` then has the key and the revision of the deletion and nothing else.
    pub delete: bool,
    pub kv: EncodedKv,
}

/// What a request that wrote has done.
#[derive(Debug)]
pub(crate) struct Committed {
    /// The main revision it made.
    pub revision: i64,
    /// Its writes, in order.
    pub events: Vec<Event>,
    /// Keys whose lease changed, in order: the key, the lease it left (0: none), the lease it joined (0: none).
    pub leases: Vec<(Bytes, i64, i64)>,
}

/// The state that readers and the writer share.
struct State {
    index: Tree<KeyIndex>,
    /// The newest complete revision.
    revision: i64,
    /// The revision of the last compaction asked for; reads below it are refused. -1 before the first, as in etcd.
    compacted: i64,
}

/// Where the background compaction stands.
struct Compaction {
    /// The compaction that was carried out last; -1 before the first.
    done: i64,
    pass: Option<Pass>,
}

/// A pass over all keys, under way.
struct Pass {
    /// Up to where it compacts.
    upto: i64,
    /// The hash to remember, until it is computed: first, for it is over what the pass takes away.
    hash: Option<HashScan>,
    /// The key to go on from, until all have been looked at.
    from: Option<Vec<u8>>,
    /// What has left the index and has yet to be marked in the history. It is gathered from many keys, up to [`DYING_MAX`], and then
    /// handed over in steps, so that it can be written out in between, and in the order of the revisions: so a block of the history
    /// is marked once, and mostly goes whole, and not once for each key that has a record in it. Those that a crash loses are found
    /// again after the restart, which must find a sound key: as each key's revisions go in ascending order, what is left is the end
    /// of its history.
    dying: Vec<Revision>,
    /// While they are handed over they descend, to be taken off the end.
    is_sorted: bool,
}

/// The revisioned store. See the module's head.
pub(crate) struct Store {
    state: RwLock<State>,
    history: History,
    /// The compaction that the storage knew of at start; -1 for none.
    restored: i64,
    /// Revisions that long reads hold on to, each with how many do.
    pins: Mutex<BTreeMap<i64, usize>>,
    compaction: Mutex<Compaction>,
    /// What the last compactions remembered.
    hashes: Mutex<VecDeque<KvHash>>,
}

/// The store that holds a member's state now. It is another one once a snapshot has taken the old one's place: whoever reads in several
/// steps keeps the store that it began with, and whoever works on the newest asks each time.
pub(crate) struct Current(RwLock<Arc<Store>>);

impl Current {
    pub fn new(store: Arc<Store>) -> Self {
        Current(RwLock::new(store))
    }

    pub fn get(&self) -> Arc<Store> {
        read(&self.0).clone()
    }

    /// Puts another store in the place of the one that is returned.
    pub fn replace(&self, store: Arc<Store>) -> Arc<Store> {
        std::mem::replace(&mut *write(&self.0), store)
    }

    /// Whether it is this very one.
    pub fn is(&self, store: &Arc<Store>) -> bool {
        Arc::ptr_eq(&read(&self.0), store)
    }
}

/// Holds a revision against compaction while a read in several steps uses it.
pub(crate) struct Pin {
    store: Arc<Store>,
    at: i64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.store.unpin(self.at);
    }
}

impl Pin {
    /// The revision held.
    pub fn at(&self) -> i64 {
        self.at
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }
}

/// What else the storage held at start: the applier's mark, and the small things kept by name.
pub(crate) struct Saved {
    pub applied: Option<Bytes>,
    pub meta: BTreeMap<Vec<u8>, Bytes>,
}

impl Store {
    /// Reads the history and builds the index from it.
    ///
    /// `attached` is told of each live key with a lease.
    ///
    /// # Errors
    /// `Corrupt` when a record cannot be what was written, `Io` when the disk fails.
    pub fn open(backend: Arc<dyn Backend>, options: HistoryOptions, attached: &mut dyn FnMut(i64, Bytes)) -> Result<(Store, Saved)> {
        let path = backend.path();
        let mut index: Tree<KeyIndex> = Tree::new();
        let mut revision = FIRST_REVISION;
        let (history, saved) = History::open(backend, options, &mut |rev, record| {
            let damaged = |what: String| Error::Corrupt {
                path: path.clone(),
                offset: None,
                what: format!("record {}.{}: {what}", rev.main, rev.sub),
            };
            let kv = EncodedKv::from_encoded(record.bytes.clone()).decode().map_err(|err| damaged(err.to_string()))?;
            let meta = Meta { created: kv.create_revision, version: kv.version, lease: kv.lease };
            if !record.tombstone
                && (kv.mod_revision != rev.main || kv.create_revision < 1 || kv.create_revision > rev.main || kv.version < 1)
            {
                return Err(damaged(format!(
                    "it says mod_revision {}, create_revision {}, version {}",
                    kv.mod_revision, kv.create_revision, kv.version
                )));
            }
            let meta = (!record.tombstone).then_some(meta);
            index.update(&kv.key, |entry| write_entry(entry, rev, meta));
            revision = rev.main;
            Ok(())
        })?;
        let compacted = match saved.meta.get(META_COMPACTED).map(|bytes| <[u8; 8]>::try_from(bytes.as_ref())) {
            None => -1,
            Some(Ok(bytes)) => i64::from_be_bytes(bytes),
            Some(Err(_)) => return Err(Error::Corrupt { path, offset: None, what: "the compaction mark is not 8 bytes long".into() }),
        };
        for (key, entry) in index.range(&[], Bound::Unbounded) {
            if let Some(Found { meta: Some(Meta { lease, .. }), .. }) = entry.current()
                && lease != 0
            {
                attached(lease, key.to_vec().into());
            }
        }
        let store = Store {
            state: RwLock::new(State { index, revision: revision.max(compacted), compacted }),
            history,
            restored: compacted,
            pins: Mutex::new(BTreeMap::new()),
            // A compaction that a crash interrupted is taken up where it was; one more pass finds nothing or the rest.
            compaction: Mutex::new(Compaction { done: -1, pass: None }),
            hashes: Mutex::default(),
        };
        Ok((store, Saved { applied: saved.applied, meta: saved.meta }))
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    /// The newest revision.
    pub fn revision(&self) -> i64 {
        read(&self.state).revision
    }

    /// The newest revision, and the last compaction's (-1: never).
    pub fn revisions(&self) -> (i64, i64) {
        let state = read(&self.state);
        (state.revision, state.compacted)
    }

    /// Number of keys, the deleted ones that are not yet compacted left out.
    pub fn keys(&self) -> usize {
        read(&self.state).index.live()
    }

    /// What the index takes in memory, in bytes, about.
    pub fn index_bytes(&self) -> usize {
        read(&self.state).index.heap_bytes()
    }

    /// All keys that are attached to a lease, with it. For tests and debugging.
    pub fn attached(&self) -> Vec<(Bytes, i64)> {
        let state = self.state();
        let live = state.index.range(&[], Bound::Unbounded).filter_map(|(key, entry)| Some((key, entry.current()?.meta?.lease)));
        live.filter(|(_, lease)| *lease != 0).map(|(key, lease)| (key.to_vec().into(), lease)).collect()
    }

    /// Holds revision `at` (0: the newest) for a read in several steps.
    pub fn pin(self: &Arc<Self>, at: i64) -> Result<Pin, ApplyError> {
        // Pinned first and looked at second: the compaction raises its mark first and looks at the pins second, so one
        // of the two sees the other.
        let newest = self.revision();
        let at = if at <= 0 { newest } else { at };
        if at > newest {
            return Err(ApplyError::FutureRevision);
        }
        *lock(&self.pins).entry(at).or_default() += 1;
        let pin = Pin { store: self.clone(), at };
        if at < read(&self.state).compacted { Err(ApplyError::Compacted) } else { Ok(pin) }
    }

    fn unpin(&self, at: i64) {
        let mut pins = lock(&self.pins);
        if let Some(count) = pins.get_mut(&at) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&at);
            }
        }
    }

    /// Whether a read holds what a compaction at `upto` would take away.
    pub fn is_held(&self, upto: i64) -> bool {
        lock(&self.pins).keys().next().is_some_and(|pinned| *pinned < upto)
    }

    /// Reads that hold a revision now.
    pub fn open_reads(&self) -> usize {
        lock(&self.pins).values().sum()
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        read(&self.state)
    }

    /// The record at a revision that the index gave. A record that is not there is a fault of the store, not an answer.
    fn fetch(&self, revision: Revision) -> Result<Record> {
        self.history.get(revision)?.ok_or_else(|| self.history.missing(revision))
    }

    /// The record that a reader of this store finds.
    fn fetch_with(&self, reader: &mut Reader<'_>, revision: Revision) -> Result<Record> {
        reader.get(revision)?.ok_or_else(|| self.history.missing(revision))
    }

    /// The key as it stood at `at` (0: now), for one key and without a pin.
    pub fn get(&self, key: &[u8], at: i64) -> Result<Option<EncodedKv>> {
        loop {
            let found = {
                let state = self.state();
                state.check(at)?;
                let at = if at <= 0 { state.revision } else { at };
                match state.index.get(key).and_then(|entry| entry.at(at)) {
                    None => return Ok(None),
                    Some(found) => found,
                }
            };
            // Between the index and the history a compaction may have passed: then the index gives another answer now.
            if let Some(record) = self.history.get(found.revision)? {
                return Ok(Some(EncodedKv::from_encoded(record.bytes)));
            }
            let state = self.state();
            let again = state.index.get(key).and_then(|entry| entry.at(if at <= 0 { state.revision } else { at }));
            if again == Some(found) {
                return Err(self.history.missing(found.revision));
            }
        }
    }

    /// The key just before main revision `main`, for `prev_kv`; none when it was not there or has been compacted.
    pub fn before(&self, key: &[u8], main: i64) -> Result<Option<EncodedKv>> {
        match self.get(key, main - 1) {
            Ok(kv) if main > 1 => Ok(kv),
            Ok(_) | Err(Error::Apply(_)) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Begins a request that may write. Readers wait until the [`Writer`] is dropped or finished.
    pub fn begin(&self) -> Writer<'_> {
        let state = write(&self.state);
        let main = state.revision + 1;
        Writer { store: self, state, main, sub: 0, events: Vec::new(), leases: Vec::new(), tally: Tally::default() }
    }

    /// Writes the compaction mark of a request to compact at `at`; the work itself is [`compact_step`](Self::compact_step)'s.
    pub fn compact(&self, at: i64) -> Result<(), ApplyError> {
        let mut state = write(&self.state);
        if at <= state.compacted {
            return Err(ApplyError::Compacted);
        }
        if at > state.revision {
            return Err(ApplyError::FutureRevision);
        }
        state.compacted = at;
        self.history.put_meta(META_COMPACTED, Some(Bytes::copy_from_slice(&at.to_be_bytes())));
        Ok(())
    }

    /// The compaction mark as it is stored, by name; none before the first compaction.
    pub fn compaction_mark(&self) -> Option<(Vec<u8>, Bytes)> {
        let compacted = self.state().compacted;
        (compacted >= 0).then(|| (META_COMPACTED.to_vec(), Bytes::copy_from_slice(&compacted.to_be_bytes())))
    }

    /// One bounded step of the compaction that was asked for last. Returns how many records it took away; none when there
    /// is nothing to do now: all is done, or a [`Pin`] holds the rest.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn compact_step(&self) -> Result<Option<usize>> {
        let mut compaction = lock(&self.compaction);
        let mut pass = match compaction.pass.take() {
            Some(pass) => pass,
            None => {
                let wanted = self.state().compacted;
                let pinned = lock(&self.pins).keys().next().copied();
                let upto = pinned.map_or(wanted, |pinned| pinned.min(wanted));
                if upto <= compaction.done {
                    return Ok(None);
                }
                // After a restart the history below may be gone in part, and so is what was remembered.
                let whole = upto == wanted && upto > 0 && upto > self.restored;
                let hash = whole.then(|| HashScan::of_compaction(upto, compaction.done.max(self.restored)));
                Pass { upto, hash, from: Some(Vec::new()), dying: Vec::new(), is_sorted: false }
            }
        };
        let step = self.pass_step(&mut pass);
        // Also after an error: what has left the index must not be forgotten.
        if pass.hash.is_none() && pass.from.is_none() && pass.dying.is_empty() {
            compaction.done = pass.upto;
        } else {
            compaction.pass = Some(pass);
        }
        step.map(Some)
    }

    /// One step of a pass: of the hash, or of the walk over the keys, or of handing over what the walk has found.
    fn pass_step(&self, pass: &mut Pass) -> Result<usize> {
        if let Some(hash) = &mut pass.hash {
            if !hash.step(self, STEP_KEYS, STEP_BYTES)?
                && let Some(hash) = pass.hash.take()
            {
                self.remember(hash);
            }
            return Ok(0);
        }
        if !pass.is_sorted {
            if let Some(from) = pass.from.take() {
                pass.from = self.drop_superseded(&from, pass.upto, &mut pass.dying);
            }
            if pass.from.is_some() && pass.dying.len() < DYING_MAX {
                return Ok(0);
            }
            pass.dying.sort_unstable_by(|a, b| b.cmp(a));
            pass.is_sorted = true;
        }
        let rest = pass.dying.len().saturating_sub(STEP_KEYS);
        let mut dying = pass.dying.split_off(rest);
        dying.reverse();
        self.history.mark_dead(&dying);
        pass.is_sorted = !pass.dying.is_empty();
        Ok(dying.len())
    }

    /// Takes out of the index what a compaction at `upto` leaves nothing to read of, from a key on. Returns the key to go on from.
    fn drop_superseded(&self, from: &[u8], upto: i64, dying: &mut Vec<Revision>) -> Option<Vec<u8>> {
        // A look with the lock shared, and the lock alone only for the keys that have something to drop.
        let mut candidates: Vec<Vec<u8>> = Vec::new();
        let mut next = None;
        {
            let state = self.state();
            for (looked_at, (key, entry)) in state.index.range(from, Bound::Unbounded).enumerate() {
                if looked_at == STEP_KEYS || candidates.len() == COMPACT_KEYS {
                    next = Some(key.to_vec());
                    break;
                }
                if entry.compactable(upto) {
                    candidates.push(key.to_vec());
                }
            }
        }
        let mut state = write(&self.state);
        for key in &candidates {
            state.index.update(key, |entry| {
                let gone = entry.is_some_and(|entry| !entry.compact(upto, dying));
                (if gone { Edit::Remove } else { Edit::Keep }, ())
            });
        }
        drop(state);
        next
    }

    /// The revision up to which compaction has been carried out.
    pub fn compaction_done(&self) -> i64 {
        lock(&self.compaction).done
    }

    /// Whether a compaction that was asked for still has work to do.
    pub fn compaction_pending(&self) -> bool {
        let wanted = self.state().compacted;
        lock(&self.compaction).done < wanted
    }

    /// Checks the invariants of the module's head against a scan of the whole history. For tests and debugging: it holds
    /// the state's lock throughout.
    pub fn check(&self) -> Result<(), String> {
        let compaction = lock(&self.compaction);
        let state = self.state();
        if state.compacted > state.revision {
            return Err(format!("compacted {} above revision {}", state.compacted, state.revision));
        }
        state.index.check_invariants();
        let mut indexed = BTreeMap::new();
        for (key, entry) in state.index.range(&[], Bound::Unbounded) {
            entry.check().map_err(|what| format!("key {:02x?}: {what}", key.to_vec()))?;
            for (revision, tombstone) in entry.revisions() {
                if indexed.insert(revision, (key.to_vec(), tombstone)).is_some() {
                    return Err(format!("revision {revision:?} stands under two keys"));
                }
            }
        }
        let mut stored = BTreeMap::new();
        let scanned = self.history.scan(Revision::default(), Revision { main: i64::MAX, sub: 0 }, &mut |revision, record| {
            let kv = EncodedKv::from_encoded(record.bytes.clone()).decode().map_err(|_| self.history.missing(revision))?;
            stored.insert(revision, (kv.key.to_vec(), record.tombstone));
            Ok(true)
        });
        scanned.map_err(|err| err.to_string())?;
        // A compaction under way has taken these out of the index first.
        for revision in compaction.pass.iter().flat_map(|pass| &pass.dying) {
            if stored.remove(revision).is_none() {
                return Err(format!("revision {revision:?} is to be marked dead, and is not there"));
            }
        }
        if indexed != stored {
            let only: Vec<_> = indexed.iter().filter(|entry| stored.get(entry.0) != Some(entry.1)).take(3).collect();
            let other: Vec<_> = stored.iter().filter(|entry| indexed.get(entry.0) != Some(entry.1)).take(3).collect();
            return Err(format!("only in the index: {only:?}; only in the history: {other:?}"));
        }
        Ok(())
    }
}

/// Adds a write to a key's entry, or begins one.
pub(crate) fn write_entry(entry: Option<&mut KeyIndex>, revision: Revision, meta: Option<Meta>) -> (Edit<KeyIndex>, ()) {
    match entry {
        Some(entry) => {
            entry.push(revision, meta);
            (Edit::Keep, ())
        }
        None => (Edit::Set(KeyIndex::first(revision, meta)), ()),
    }
}

impl State {
    /// Whether a read at `at` (0: now) can be answered.
    fn check(&self, at: i64) -> Result<(), ApplyError> {
        if at > self.revision {
            Err(ApplyError::FutureRevision)
        } else if at > 0 && at < self.compacted {
            Err(ApplyError::Compacted)
        } else {
            Ok(())
        }
    }
}

/// A request that writes, under way. What it has written it reads itself; others see it when it is [finished](Self::finish).
pub(crate) struct Writer<'a> {
    store: &'a Store,
    state: RwLockWriteGuard<'a, State>,
    main: i64,
    sub: u32,
    events: Vec<Event>,
    leases: Vec<(Bytes, i64, i64)>,
    /// What it has done so far, also if it is refused in the end.
    pub tally: Tally,
}

impl Writer<'_> {
    /// The revision at which this request reads now: the newest, or its own once it has written.
    pub fn at(&self) -> i64 {
        if self.events.is_empty() { self.state.revision } else { self.main }
    }

    /// The key's current state.
    pub fn current(&self, key: &[u8]) -> Option<Found> {
        self.state.index.get(key).and_then(KeyIndex::current)
    }

    /// The record of a state that [`current`](Self::current) gave.
    pub fn fetch(&self, found: Found) -> Result<EncodedKv> {
        Ok(EncodedKv::from_encoded(self.store.fetch(found.revision)?.bytes))
    }

    /// Writes a key.
    pub fn put(&mut self, key: &Bytes, value: &Bytes, lease: i64) {
        let revision = Revision { main: self.main, sub: self.sub };
        let before = self.current(key).and_then(|found| found.meta);
        let (created, version, left) = before.map_or((self.main, 1, 0), |meta| (meta.created, meta.version + 1, meta.lease));
        let kv = KeyValue { key: key.clone(), create_revision: created, mod_revision: self.main, version, value: value.clone(), lease };
        let kv = EncodedKv::encode(&kv);
        if left != lease {
            self.leases.push((key.clone(), left, lease));
        }
        self.record(key, revision, Some(Meta { created, version, lease }), Record { bytes: kv.to_bytes(), tombstone: false });
        self.events.push(Event { key: key.clone(), revision, delete: false, kv });
        self.tally.puts += 1;
        self.tally.put_bytes += (key.len() + value.len()) as u64;
    }

    /// Deletes a key that is there; does nothing to one that is not.
    pub fn delete(&mut self, key: &Bytes) {
        let Some(Meta { lease, .. }) = self.current(key).and_then(|found| found.meta) else { return };
        let revision = Revision { main: self.main, sub: self.sub };
        if lease != 0 {
            self.leases.push((key.clone(), lease, 0));
        }
        let tombstone = EncodedKv::encode(&KeyValue { key: key.clone(), ..KeyValue::default() });
        self.record(key, revision, None, Record { bytes: tombstone.to_bytes(), tombstone: true });
        self.events.push(Event { key: key.clone(), revision, delete: true, kv: deleted(key, self.main) });
    }

    fn record(&mut self, key: &Bytes, revision: Revision, meta: Option<Meta>, record: Record) {
        self.store.history.append(revision, record);
        self.state.index.update(key, |entry| write_entry(entry, revision, meta));
        self.sub += 1;
    }

    /// Publishes what was written, if anything was.
    pub fn finish(mut self) -> Option<Committed> {
        if self.events.is_empty() {
            return None;
        }
        self.state.revision = self.main;
        Some(Committed { revision: self.main, events: std::mem::take(&mut self.events), leases: std::mem::take(&mut self.leases) })
    }
}

/// The key-value of a deletion event: the key, and the revision of the deletion.
pub(crate) fn deleted(key: &Bytes, main: i64) -> EncodedKv {
    EncodedKv::encode(&KeyValue { key: key.clone(), mod_revision: main, ..KeyValue::default() })
}

#[cfg(test)]
mod tests;
