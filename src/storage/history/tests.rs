//! Against a plain model, under crashes and failing disks, beside concurrent readers, and with every stored value damaged.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::thread;

use proptest::prelude::*;

use super::block::{BLOCK_BYTES, BLOCK_RECORDS, CHUNK_BYTES, INLINE_BYTES_MAX};
use super::*;
use crate::error::Error;
use crate::storage::Visit;
use crate::storage::keys::tag;

mod measure;
mod scripts;

type Meanwhile = Box<dyn FnOnce() + Send>;
type Values = BTreeMap<Vec<u8>, Bytes>;

/// A backend in memory that is nastier than it need be: after a `reopen` it may have lost any number of the batches since
/// the last sync, not only the one that failed.
#[derive(Default)]
struct Nasty {
    state: RwLock<NastyState>,
    /// Whether others get a chance to run before and after each apply.
    yields: AtomicBool,
    /// Carried out once, at the end of the next get of a key of that tag: what another thread does just then.
    meanwhile: Mutex<Option<(u8, Meanwhile)>>,
}

#[derive(Default)]
struct NastyState {
    durable: Values,
    /// Applied since the last sync.
    since: Vec<Batch>,
    live: Values,
    /// The next apply fails.
    fail: bool,
    /// An apply has failed; nothing goes on before a reopen.
    broken: bool,
    /// The batch that failed.
    limbo: Option<Batch>,
    batches: usize,
    syncs: usize,
    /// Gets and scans.
    reads: usize,
}

fn change(values: &mut Values, batch: &Batch) {
    batch.deletes.iter().for_each(|key| drop(values.remove(key)));
    batch.puts.iter().for_each(|(key, value)| drop(values.insert(key.clone(), value.clone())));
}

fn full() -> Error {
    Error::io("write", "test", io::Error::from(io::ErrorKind::StorageFull))
}

impl Nasty {
    fn new(values: Values) -> Arc<Nasty> {
        let state = NastyState { durable: values.clone(), live: values, ..NastyState::default() };
        Arc::new(Nasty { state: RwLock::new(state), ..Nasty::default() })
    }

    fn write(&self) -> RwLockWriteGuard<'_, NastyState> {
        self.state.write().unwrap()
    }

    fn values(&self) -> Values {
        self.state.read().unwrap().live.clone()
    }

    /// What is there when all but the first `kept` batches since the last sync are lost.
    fn after_loss(&self, kept: usize) -> Values {
        let state = self.state.read().unwrap();
        let mut values = state.durable.clone();
        let batches = state.since.iter().chain(&state.limbo);
        batches.take(kept).for_each(|batch| change(&mut values, batch));
        values
    }

    fn unsynced(&self) -> usize {
        let state = self.state.read().unwrap();
        state.since.len() + state.limbo.iter().len()
    }

    fn give_way(&self) {
        if self.yields.load(Ordering::Relaxed) {
            thread::yield_now();
        }
    }

    fn reopen_with_loss(&self, kept: usize) {
        let values = self.after_loss(kept);
        let mut state = self.write();
        let limbo = state.limbo.take();
        state.since.extend(limbo);
        state.since.truncate(kept);
        state.live = values;
        state.broken = false;
        state.fail = false;
    }
}

impl Backend for Nasty {
    fn path(&self) -> std::path::PathBuf {
        "test".into()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        self.write().reads += 1;
        let value = self.state.read().unwrap().live.get(key).cloned();
        let meanwhile = self.meanwhile.lock().unwrap().take_if(|(tag, _)| key.first() == Some(tag));
        if let Some((_, meanwhile)) = meanwhile {
            meanwhile();
        }
        Ok(value)
    }

    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.write().reads += 1;
        let values = self.values();
        for (key, value) in values.range(start.to_vec()..) {
            if (!end.is_empty() && key.as_slice() >= end) || !visit(key, value)? {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &Batch) -> Result<()> {
        batch.check();
        self.give_way();
        let mut state = self.write();
        if state.broken || state.fail {
            if !state.broken {
                state.limbo = Some(batch.clone());
            }
            state.broken = true;
            return Err(full());
        }
        change(&mut state.live, batch);
        state.since.push(batch.clone());
        state.batches += 1;
        drop(state);
        self.give_way();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.write();
        if state.broken {
            return Err(full());
        }
        state.durable = state.live.clone();
        state.since.clear();
        state.syncs += 1;
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.state.read().unwrap().live.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }

    fn reopen(&self) -> Result<()> {
        self.reopen_with_loss(self.unsynced());
        Ok(())
    }

    fn rewrite_step(&self, _: usize) -> Result<bool> {
        Ok(false)
    }

    fn start_rewrite(&self) -> Result<()> {
        Ok(())
    }
}

const SMALL: Limits = Limits { cut_bytes: 4000, batch_bytes: 12_000, unsynced_bytes: 100_000, behind_bytes: 20_000 };

fn rev(main: i64) -> Revision {
    Revision { main, sub: 0 }
}

/// A record that says which one it is.
fn record(rev: Revision, length: usize) -> Record {
    let text = format!("{}/{}.", rev.main, rev.sub);
    let bytes: Vec<u8> = text.bytes().cycle().take(length.max(text.len())).collect();
    Record { bytes: Bytes::from(bytes), tombstone: rev.main % 7 == 3 }
}

type Opened = (History, Saved, BTreeMap<Revision, Record>);

fn open(backend: &Arc<Nasty>, cache_bytes: usize) -> Result<Opened> {
    open_limited(backend, cache_bytes, SMALL)
}

fn open_limited(backend: &Arc<Nasty>, cache_bytes: usize, limits: Limits) -> Result<Opened> {
    let mut records = BTreeMap::new();
    let opts = HistoryOptions { cache_bytes, gate: None };
    let (history, saved) = History::open_limited(backend.clone(), opts, limits, &mut |rev, record| {
        assert!(records.last_key_value().is_none_or(|(last, _)| *last < rev), "{rev:?} is visited out of order");
        records.insert(rev, record.clone());
        Ok(())
    })?;
    Ok((history, saved, records))
}

fn all(history: &History, from: Revision, to: Revision) -> Vec<(Revision, Record)> {
    let mut found = Vec::new();
    let collect = &mut |rev, record: &Record| {
        found.push((rev, record.clone()));
        Ok(true)
    };
    history.scan(from, to, collect).unwrap();
    found
}

const END: Revision = Revision { main: i64::MAX, sub: 0 };

#[derive(Clone, Debug)]
enum Op {
    Append { records: usize, length: usize },
    Commit,
    Dead(Vec<prop::sample::Index>),
    DeadRange(prop::sample::Index, usize),
    Meta(u8, Option<u8>),
    WriteOut,
    Collect(usize),
    Sync,
    FailNext,
    Reopen(prop::sample::Index),
    Crash(prop::sample::Index),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let length = prop_oneof![
        8 => 1..400usize,
        2 => 400..6000usize,
        1 => INLINE_BYTES_MAX - 2..INLINE_BYTES_MAX + 3,
        1 => CHUNK_BYTES * 2 - 1..CHUNK_BYTES * 2 + 2,
    ];
    prop_oneof![
        10 => (1..20usize, length).prop_map(|(records, length)| Op::Append { records: if length > 6000 { 1 } else { records }, length }),
        10 => Just(Op::Commit),
        4 => prop::collection::vec(any::<prop::sample::Index>(), 1..20).prop_map(Op::Dead),
        3 => (any::<prop::sample::Index>(), 1..120usize).prop_map(|(start, count)| Op::DeadRange(start, count)),
        3 => (0..6u8, any::<Option<u8>>()).prop_map(|(key, value)| Op::Meta(key, value)),
        8 => Just(Op::WriteOut),
        4 => prop_oneof![Just(1), 1000..100_000usize].prop_map(Op::Collect),
        2 => Just(Op::Sync),
        1 => Just(Op::FailNext),
        2 => any::<prop::sample::Index>().prop_map(Op::Reopen),
        1 => any::<prop::sample::Index>().prop_map(Op::Crash),
        1 => Just(Op::Restart),
    ]
}

/// What a history should hold: a map, and a copy of it for each commit.
#[derive(Clone, Default, PartialEq, Debug)]
struct State {
    live: BTreeMap<Revision, Record>,
    meta: BTreeMap<Vec<u8>, Bytes>,
    last: Revision,
}

struct Model {
    now: State,
    /// The states after 0, 1, 2, ... commits; `applied` is the number.
    commits: Vec<State>,
    /// The number that is safe from a power cut.
    synced: usize,
    /// Whether something was changed since the last commit.
    open: bool,
    /// What died between two entries and is not known to be safe: by number of commits. A crash may bring it back.
    late: BTreeMap<usize, BTreeMap<Revision, Record>>,
}

impl Model {
    fn live_bytes(&self) -> u64 {
        self.now.live.values().map(|record| record.bytes.len() as u64 + RECORD_OVERHEAD).sum()
    }

    fn kill(&mut self, revs: &[Revision]) {
        let at = self.commits.len() - 1;
        for rev in revs {
            if let Some(record) = self.now.live.remove(rev)
                && !self.open
            {
                self.commits[at].live.remove(rev);
                self.late.entry(at).or_default().insert(*rev, record);
            }
        }
    }
}

fn number(applied: Option<&Bytes>) -> usize {
    applied.map_or(0, |bytes| std::str::from_utf8(bytes).unwrap().parse().unwrap())
}

fn run(ops: &[Op], cache_bytes: usize) {
    let mut backend = Nasty::new(Values::new());
    let (mut history, ..) = open(&backend, cache_bytes).unwrap();
    let mut model = Model { now: State::default(), commits: vec![State::default()], synced: 0, open: false, late: BTreeMap::new() };
    let pick = |model: &Model, index: &prop::sample::Index| {
        let live = &model.now.live;
        (!live.is_empty()).then(|| *live.keys().nth(index.index(live.len())).unwrap())
    };
    for op in ops {
        match op {
            Op::Append { records, length } => {
                model.open = true;
                for _ in 0..*records {
                    let last = model.now.last;
                    let rev = if last.sub < 2 && last.main > 0 { successor(last) } else { rev(last.main + 1) };
                    // Lengths tell the records of one revision apart that a crash and another future may bring.
                    let record = record(rev, length + model.commits.len() % 5);
                    history.append(rev, record.clone());
                    model.now.live.insert(rev, record);
                    model.now.last = rev;
                }
            }
            Op::Commit => {
                history.commit(Bytes::from(model.commits.len().to_string()));
                model.commits.push(model.now.clone());
                model.open = false;
            }
            Op::Dead(picks) => {
                let mut revs: Vec<Revision> = picks.iter().filter_map(|index| pick(&model, index)).collect();
                revs.push(Revision { main: 1, sub: 77 });
                history.mark_dead(&revs);
                model.kill(&revs);
            }
            Op::DeadRange(start, count) => {
                let Some(start) = pick(&model, start) else { continue };
                let revs: Vec<Revision> = model.now.live.range(start..).take(*count).map(|(rev, _)| *rev).collect();
                history.mark_dead(&revs);
                model.kill(&revs);
            }
            Op::Meta(key, value) => {
                model.open = true;
                let value = value.map(|value| Bytes::from(vec![value; usize::from(value)]));
                history.put_meta(&[*key], value.clone());
                match value {
                    Some(value) => drop(model.now.meta.insert(vec![*key], value)),
                    None => drop(model.now.meta.remove([*key].as_slice())),
                }
            }
            Op::WriteOut => {
                if history.write_out().is_ok() {
                    // What the backend has now is everything committed.
                    let (_, saved, records) = open(&Nasty::new(backend.values()), 0).unwrap();
                    assert_eq!(number(saved.applied.as_ref()), model.commits.len() - 1);
                    assert!(records == model.commits.last().unwrap().live, "records on the backend");
                    if model.commits.last() == Some(&model.now) {
                        assert_eq!(history.stats().live_bytes, model.live_bytes());
                        assert_eq!(history.stats().live_records, model.now.live.len() as u64);
                    }
                }
            }
            Op::Collect(bytes) => drop(history.collect(*bytes)),
            Op::Sync => {
                if let Ok(applied) = history.sync() {
                    model.synced = number(applied.as_ref());
                    assert_eq!(model.synced, model.commits.len() - 1, "a sync takes everything committed");
                    model.late.clear();
                }
            }
            Op::FailNext => backend.write().fail = true,
            Op::Reopen(kept) => backend.reopen_with_loss(kept.index(backend.unsynced() + 1)),
            Op::Crash(_) | Op::Restart => {
                let kept = if let Op::Crash(kept) = op { kept.index(backend.unsynced() + 1) } else { backend.unsynced() };
                backend = Nasty::new(backend.after_loss(kept));
                let (next, saved, records) = open(&backend, cache_bytes).unwrap();
                let at = number(saved.applied.as_ref());
                assert!(at >= model.synced, "commit {at} is there, {} was synced", model.synced);
                model.commits.truncate(at + 1);
                for (rev, record) in model.late.remove(&at).unwrap_or_default() {
                    if records.contains_key(&rev) {
                        model.commits[at].live.insert(rev, record);
                    }
                }
                model.late.clear();
                model.open = false;
                model.now = model.commits[at].clone();
                model.synced = at;
                assert_eq!(records, model.now.live, "records after {at} commits");
                assert_eq!(saved.meta, model.now.meta, "meta values after {at} commits");
                assert_eq!(next.stats().live_bytes, model.live_bytes());
                history = next;
            }
        }
        history.check_invariants();
        let found = all(&history, Revision::default(), END);
        assert!(found.iter().map(|(rev, record)| (rev, record)).eq(&model.now.live), "a scan after {op:?}");
        for (rev, record) in &model.now.live {
            assert_eq!(history.get(*rev).unwrap().as_ref(), Some(record), "{rev:?} after {op:?}");
        }
        let mut reader = history.reader();
        for (rev, record) in &model.now.live {
            assert_eq!(reader.get(*rev).unwrap().as_ref(), Some(record), "{rev:?} read one after the other after {op:?}");
        }
        assert_eq!(history.get(successor(model.now.last)).unwrap(), None);
        let (from, to) = (rev(model.now.last.main / 3), rev(model.now.last.main / 2));
        assert!(all(&history, from, to).iter().map(|(rev, record)| (rev, record)).eq(model.now.live.range(from..to)), "{from:?} to {to:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn like_the_model(ops in prop::collection::vec(op(), 1..80), cache_bytes in prop_oneof![Just(0), Just(40_000usize), Just(1 << 26)]) {
        run(&ops, cache_bytes);
    }
}

/// A history with a bit of everything: full and small blocks, dead marks, large records, meta values.
fn furnished() -> Arc<Nasty> {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 1 << 20).unwrap();
    for main in 2..60 {
        history.append(rev(main), record(rev(main), if main % 20 == 0 { CHUNK_BYTES * 2 + 5 } else { 30 }));
        history.put_meta(format!("lease/{}", main % 5).as_bytes(), Some(Bytes::from(main.to_string())));
        history.commit(Bytes::from(main.to_string()));
        if main % 9 == 0 {
            history.write_out().unwrap();
        }
    }
    history.mark_dead(&[rev(3), rev(20), rev(21), rev(59)]);
    history.commit(Bytes::from_static(b"59"));
    history.sync().unwrap();
    history.check_invariants();
    let kinds: BTreeSet<u8> = backend.values().keys().filter_map(|key| key.first().copied()).collect();
    assert_eq!(kinds.len(), 5, "a value of each kind");
    backend
}

fn refused(values: Values, what: &str) {
    match open(&Nasty::new(values), 1 << 20) {
        Err(Error::Corrupt { path, what, .. }) => assert!(path.ends_with("test") && !what.is_empty()),
        Err(error) => panic!("{what}: {error}"),
        Ok(_) => panic!("{what}: opened"),
    }
}

#[test]
fn a_flipped_byte_in_any_value_is_refused() {
    let values = furnished().values();
    for (key, value) in &values {
        // All of a small value; of a large one both ends, and samples between.
        let places = (0..value.len()).filter(|at| *at < 1500 || at % 997 == 0 || at + 40 > value.len());
        for at in places {
            let mut bytes = value.to_vec();
            bytes[at] ^= 1 << (at % 8);
            let mut values = values.clone();
            values.insert(key.clone(), Bytes::from(bytes));
            refused(values, &format!("byte {at} of {key:02x?}"));
        }
    }
}

#[test]
fn a_missing_or_moved_or_surplus_or_cut_value_is_refused() {
    let values = furnished().values();
    for (key, value) in &values {
        let mut without = values.clone();
        without.remove(key);
        refused(without.clone(), &format!("without {key:02x?}"));
        for end in [vec![0], vec![0xff; 4]] {
            let mut elsewhere = without.clone();
            elsewhere.insert([key.as_slice(), &end].concat(), value.clone());
            refused(elsewhere, &format!("{key:02x?} under another key"));
        }
        let mut short = values.clone();
        short.insert(key.clone(), value.slice(..value.len() / 2));
        refused(short, &format!("half of {key:02x?}"));
        for (other, _) in values.iter().filter(|(other, _)| *other != key) {
            let mut swapped = values.clone();
            swapped.insert(other.clone(), value.clone());
            refused(swapped, &format!("{key:02x?} under {other:02x?}"));
        }
    }
    for key in [Key::Chunk(rev(1), 0), Key::Chunk(rev(45), 3), Key::Chunk(rev(99), 0), Key::Dead(rev(1)), Key::Meta(b"new")] {
        let mut surplus = values.clone();
        surplus.insert(key.encode(), seal_of(&key));
        refused(surplus, &format!("{key:?} more"));
    }
}

fn seal_of(key: &Key<'_>) -> Bytes {
    match key {
        Key::Dead(first) => block::encode_dead(*first, 1).1,
        key => block::seal(&key.encode(), vec![1; 9]).0,
    }
}

/// Each value is good, but one of them is from an earlier time.
#[test]
fn a_stale_value_is_refused() {
    let backend = furnished();
    let before = backend.values();
    let (history, ..) = open(&backend, 0).unwrap();
    history.mark_dead(&[rev(4), rev(40), rev(58)]);
    history.put_meta(b"lease/1", Some(Bytes::from_static(b"later")));
    history.put_meta(b"lease/2", None);
    history.append(rev(100), record(rev(100), 9));
    history.commit(Bytes::from_static(b"100"));
    history.write_out().unwrap();
    let after = backend.values();
    for key in before.keys().chain(after.keys()) {
        if before.get(key) == after.get(key) {
            continue;
        }
        let mut mixed = after.clone();
        match before.get(key) {
            Some(value) => drop(mixed.insert(key.clone(), value.clone())),
            None => drop(mixed.remove(key)),
        }
        refused(mixed, &format!("{key:02x?} as it was"));
    }
}

#[test]
fn damage_that_comes_later_is_told_and_not_served() {
    let backend = furnished();
    let (history, ..) = open(&backend, 0).unwrap();
    let mut told = 0;
    for (key, value) in backend.values() {
        let mut bytes = value.to_vec();
        bytes[value.len() / 2] ^= 0x10;
        backend.write().live.insert(key.clone(), Bytes::from(bytes));
        for main in 2..60 {
            match history.get(rev(main)) {
                Ok(found) => assert!(found.is_none_or(|found| found == record(rev(main), found.bytes.len()))),
                Err(error) => {
                    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
                    told += 1;
                }
            }
        }
        backend.write().live.insert(key, value);
    }
    assert!(told > 20, "{told} damaged records");
}

/// The batch fails, is there or not after the reopen, and is there once in the end.
#[test]
fn a_failed_batch_is_applied_once_more() {
    for kept in [false, true] {
        let backend = Nasty::new(Values::new());
        let (history, ..) = open(&backend, 0).unwrap();
        history.append(rev(2), record(rev(2), 50));
        history.commit(Bytes::from_static(b"2"));
        history.sync().unwrap();
        history.append(rev(3), record(rev(3), CHUNK_BYTES * 3));
        history.mark_dead(&[rev(2)]);
        history.put_meta(b"a", Some(Bytes::from_static(b"b")));
        history.commit(Bytes::from_static(b"3"));
        backend.write().fail = true;
        assert!(history.write_out().unwrap_err().is_disk_full());
        assert!(history.sync().unwrap_err().is_disk_full(), "nothing goes on before a reopen");
        // The log goes on, and readers do not notice.
        history.append(rev(4), record(rev(4), 50));
        history.mark_dead(&[rev(3)]);
        history.commit(Bytes::from_static(b"4"));
        assert!(history.get(rev(3)).unwrap().is_some_and(|found| found == record(rev(3), CHUNK_BYTES * 3)));
        history.check_invariants();
        backend.reopen_with_loss(usize::from(kept));
        assert_eq!(all(&history, rev(0), END), [(rev(4), record(rev(4), 50))]);
        assert_eq!(history.sync().unwrap().unwrap(), "4");
        history.check_invariants();
        let (_, saved, records) = open(&Nasty::new(backend.after_loss(0)), 0).unwrap();
        assert_eq!(records.into_iter().collect::<Vec<_>>(), [(rev(4), record(rev(4), 50))]);
        assert_eq!((saved.applied.unwrap(), saved.meta.len()), (Bytes::from_static(b"4"), 1));
    }
}

/// Only the batches that are gone are given once more, in order: whenever the power is cut, a whole batch was the last.
#[test]
fn catching_up_goes_through_whole_batches_only() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    for main in 2..8 {
        history.append(rev(main), record(rev(main), 3000));
        history.mark_dead(&[rev(main - 2)]);
        history.commit(Bytes::from(main.to_string()));
        history.write_out().unwrap();
    }
    backend.reopen_with_loss(3);
    history.write_out().unwrap();
    assert_eq!(backend.unsynced(), 6);
    for kept in 0..=6 {
        let (_, saved, records) = open(&Nasty::new(backend.after_loss(kept)), 0).unwrap();
        assert_eq!(number(saved.applied.as_ref()), if kept == 0 { 0 } else { kept + 1 });
        assert_eq!(records.len(), kept.min(2));
    }
}

/// Between a reader's looks at the backend (not yet there) and into the overlay (no longer there) a sync goes through.
#[test]
fn a_sync_between_two_looks_hides_nothing() {
    for (tag, length) in [(tag::BLOCK, 50), (tag::BLOCK, CHUNK_BYTES * 2), (tag::CHUNK, CHUNK_BYTES * 2)] {
        let backend = Nasty::new(Values::new());
        let (history, ..) = open(&backend, 0).unwrap();
        let history = Arc::new(history);
        (2..100).for_each(|main| history.append(rev(main), record(rev(main), length)));
        history.commit(Bytes::from_static(b"99"));
        backend.write().fail = true;
        history.write_out().unwrap_err();
        backend.reopen_with_loss(0);
        assert!(backend.values().is_empty());
        let syncing = history.clone();
        *backend.meanwhile.lock().unwrap() = Some((tag, Box::new(move || drop(syncing.sync().unwrap()))));
        assert_eq!(history.get(rev(2)).unwrap().unwrap(), record(rev(2), length));
        assert_eq!(history.stats().unsynced_bytes, 0);
    }
}

/// Between a reader's look at the map and its look at the backend the block is packed anew, or the record dies.
#[test]
fn a_block_that_moves_between_two_looks_is_found() {
    for dies in [false, true] {
        for (tag, length) in [(tag::BLOCK, 50), (tag::BLOCK, CHUNK_BYTES * 2), (tag::CHUNK, CHUNK_BYTES * 2)] {
            let backend = Nasty::new(Values::new());
            let (history, ..) = open(&backend, 0).unwrap();
            let history = Arc::new(history);
            (2..100).for_each(|main| history.append(rev(main), record(rev(main), length)));
            history.commit(Bytes::from_static(b"99"));
            history.sync().unwrap();
            let moving = history.clone();
            let move_it = move || {
                let dying: Vec<Revision> = (2..60).filter(|main| dies || *main != 20).map(rev).collect();
                moving.mark_dead(&dying);
                moving.commit(Bytes::from_static(b"100"));
                moving.sync().unwrap();
                while moving.collect(1 << 20).unwrap() {}
            };
            *backend.meanwhile.lock().unwrap() = Some((tag, Box::new(move_it)));
            let found = history.get(rev(20)).unwrap();
            assert!(dies || found.is_some(), "{length} bytes");
            assert!(found.is_none_or(|found| found == record(rev(20), length)));
            history.check_invariants();
        }
    }
}

#[test]
fn histories_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<History>();
}

#[test]
fn a_backend_that_lost_what_it_synced_is_refused() {
    let backend = furnished();
    let (history, ..) = open(&backend, 0).unwrap();
    for main in [100, 101] {
        history.append(rev(main), record(rev(main), 9));
        history.commit(Bytes::from(main.to_string()));
        history.sync().unwrap();
    }
    let mut state = backend.write();
    state.live.remove(&Key::Summary.encode());
    drop(state);
    history.append(rev(102), record(rev(102), 9));
    history.commit(Bytes::from_static(b"102"));
    assert!(matches!(history.write_out(), Err(Error::Corrupt { .. })));
}

/// What is not committed is in memory only, also beside what is.
#[test]
fn nothing_is_written_beyond_the_last_commit() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    history.append(rev(2), record(rev(2), 5));
    assert!(!history.write_out().unwrap());
    history.put_meta(b"k", Some(Bytes::from_static(b"1")));
    history.commit(Bytes::from_static(b"one"));
    history.append(rev(3), record(rev(3), 5));
    history.mark_dead(&[rev(2)]);
    history.put_meta(b"k", Some(Bytes::from_static(b"2")));
    assert!(history.write_out().unwrap());
    assert!(!history.write_out().unwrap());
    history.check_invariants();
    let (_, saved, records) = open(&Nasty::new(backend.values()), 0).unwrap();
    assert_eq!(saved.applied.unwrap(), "one");
    assert_eq!(saved.meta[b"k".as_slice()], "1");
    assert_eq!(records.into_keys().collect::<Vec<_>>(), [rev(2)]);
    assert_eq!(all(&history, rev(0), END).len(), 1);
}

/// The tail may grow while nobody writes: then it goes out in batches of bounded size, each of whole entries.
#[test]
fn a_long_tail_goes_out_in_bounded_batches() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    for main in 2..400 {
        history.append(rev(main), record(rev(main), 300));
        history.append(successor(rev(main)), record(successor(rev(main)), 300));
        // The second record of each fourth entry dies two entries later: in another cut, perhaps in another batch.
        if main % 4 == 0 {
            history.mark_dead(&[successor(rev(main - 2))]);
        }
        history.commit(Bytes::from(main.to_string()));
    }
    history.write_out().unwrap();
    history.check_invariants();
    let state = backend.write();
    assert!(state.batches > 20 && state.syncs > 0, "{} batches, {} syncs", state.batches, state.syncs);
    drop(state);
    // Wherever it is cut off, whole entries are there.
    for kept in 0..backend.unsynced() {
        let (_, saved, records) = open(&Nasty::new(backend.after_loss(kept)), 0).unwrap();
        let applied = number(saved.applied.as_ref()) as i64;
        for main in 2..400 {
            let dead = main % 4 == 2 && main + 2 <= applied;
            assert_eq!(records.contains_key(&rev(main)), main <= applied, "{main} at {applied}");
            assert_eq!(records.contains_key(&successor(rev(main))), main <= applied && !dead, "{main}/1 at {applied}");
        }
    }
}

/// Nothing is committed any more, however much dies: the deaths go out by themselves, and hold nobody up meanwhile.
#[test]
fn deaths_need_no_entry_to_go_out() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    let everything: Vec<Revision> = (2..3000).map(rev).collect();
    everything.iter().for_each(|rev| history.append(*rev, record(*rev, 100)));
    history.commit(Bytes::from_static(b"all"));
    history.sync().unwrap();
    history.mark_dead(&everything[1..]);
    assert!(history.stats().tail_bytes > SMALL.behind_bytes as u64 && !history.is_behind(), "deaths are not what holds writers back");
    history.check_invariants();
    assert!(history.write_out().unwrap());
    assert!(!history.write_out().unwrap());
    assert_eq!((history.deaths_waiting(), history.stats().live_records), (0, 1));
    while history.collect(1 << 20).unwrap() {}
    history.check_invariants();
    assert!(backend.disk_bytes() < 1000, "{} bytes are left", backend.disk_bytes());
    let (_, saved, records) = open(&Nasty::new(backend.values()), 0).unwrap();
    assert_eq!((saved.applied.unwrap(), records.len()), (Bytes::from_static(b"all"), 1));
}

/// The entry that is being applied may be the one that allows the deaths: they stay with it, and it stays whole.
#[test]
fn deaths_within_an_entry_wait_for_its_end() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    history.append(rev(2), record(rev(2), 5));
    history.append(rev(3), record(rev(3), 5));
    history.commit(Bytes::from_static(b"one"));
    history.mark_dead(&[rev(2)]);
    history.append(rev(4), record(rev(4), 5));
    history.mark_dead(&[rev(3)]);
    assert!(history.write_out().unwrap());
    assert_eq!(history.deaths_waiting(), 1);
    assert_eq!(open(&Nasty::new(backend.values()), 0).unwrap().2.into_keys().collect::<Vec<_>>(), [rev(3)]);
    history.append(rev(5), record(rev(5), 5));
    history.commit(Bytes::from_static(b"two"));
    history.write_out().unwrap();
    history.check_invariants();
    assert_eq!(history.deaths_waiting(), 0);
    let (_, saved, records) = open(&Nasty::new(backend.values()), 0).unwrap();
    assert_eq!((saved.applied.unwrap(), records.into_keys().collect()), (Bytes::from_static(b"two"), vec![rev(4), rev(5)]));
}

/// In a new history nothing is stored, and a batch of deaths must not make it look as if something were.
#[test]
fn deaths_in_a_new_history_write_nothing() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    history.mark_dead(&[rev(2)]);
    history.write_out().unwrap();
    history.check_invariants();
    assert_eq!((history.deaths_waiting(), backend.values().len()), (0, 0));
}

/// Deaths of the whole range: blocks and chunks go at once, and nothing is left but the summary and what lives.
#[test]
fn dead_blocks_and_chunks_leave_the_backend() {
    let backend = furnished();
    let (history, ..) = open(&backend, 0).unwrap();
    let everything: Vec<Revision> = (2..59).map(rev).collect();
    history.mark_dead(&everything);
    (0..5).for_each(|lease| history.put_meta(format!("lease/{lease}").as_bytes(), None));
    history.commit(Bytes::from_static(b"end"));
    history.write_out().unwrap();
    history.check_invariants();
    assert_eq!(backend.values().into_keys().collect::<Vec<_>>(), [Key::Summary.encode()]);
    assert_eq!((history.stats().live_bytes, history.stats().live_records), (0, 0));
    assert!(open(&backend, 0).unwrap().2.is_empty());
}

/// Three of four records die: collection brings the blocks back to about what lives, in steps of bounded size.
#[test]
fn collection_brings_the_space_back_in_bounded_steps() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 0).unwrap();
    for main in 2..2002 {
        history.append(rev(main), record(rev(main), 200));
        history.commit(Bytes::from(main.to_string()));
    }
    history.write_out().unwrap();
    assert!(!history.collect(1 << 20).unwrap(), "nothing to do");
    let full = backend.disk_bytes();
    let dying: Vec<Revision> = (2..2002).filter(|main| main % 4 != 0).map(rev).collect();
    history.mark_dead(&dying);
    history.commit(Bytes::from_static(b"x"));
    history.write_out().unwrap();
    let mut steps = 0;
    loop {
        let before = history.stats().written_bytes;
        let more = history.collect(40_000).unwrap();
        assert!(history.stats().written_bytes - before < 40_000);
        history.check_invariants();
        steps += 1;
        if !more {
            break;
        }
    }
    assert!(steps > 5, "{steps} steps");
    assert!(backend.disk_bytes() * 10 < full * 3, "{} of {full} bytes are left", backend.disk_bytes());
    let blocks = history.stats().blocks;
    assert!(blocks <= 500 / BLOCK_RECORDS as u64 + steps, "{blocks} blocks after {steps} steps: each but a step's last should be full");
    assert_eq!(all(&history, rev(0), END).len(), 500);
}

/// Bytes written over bytes appended, at several rates of puts between two write_outs. See the module head.
#[test]
fn a_record_is_written_once_or_twice() {
    for (per_write, limit_percent) in [(1, 300), (4, 250), (16, 250), (31, 240), (33, 240), (100, 180), (4000, 125)] {
        let (history, ..) = open_limited(&Nasty::new(Values::new()), 1 << 20, LIMITS).unwrap();
        let mut appended = 0;
        for main in 2..8002 {
            let record = record(rev(main), 300);
            appended += record.bytes.len() as u64;
            history.append(rev(main), record);
            history.commit(Bytes::from(main.to_string()));
            if main % per_write == 0 {
                history.write_out().unwrap();
                let small = history.map().iter().rev().take_while(|(_, line)| line.meta.live() < BLOCK_RECORDS).count();
                assert!(small < BLOCK_RECORDS, "{small} small blocks at the end");
            }
        }
        let written = history.stats().written_bytes;
        println!("{per_write} records a batch: {:.2} bytes written for each appended", written as f64 / appended as f64);
        assert!(written * 100 < appended * limit_percent, "{written} bytes written for {appended} at {per_write} records a batch");
        history.check_invariants();
    }
}

#[test]
fn records_of_all_sizes_come_back() {
    let backend = Nasty::new(Values::new());
    let (history, ..) = open(&backend, 30_000).unwrap();
    let lengths = [0, 1, 100, BLOCK_BYTES / 2, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1_600_000];
    let expected: Vec<(Revision, Record)> = (2..).zip(lengths).map(|(main, length)| (rev(main), record(rev(main), length))).collect();
    expected.iter().for_each(|(rev, record)| history.append(*rev, record.clone()));
    history.commit(Bytes::new());
    for _ in 0..3 {
        assert_eq!(all(&history, rev(0), END), expected);
        assert!(expected.iter().all(|(rev, record)| history.get(*rev).unwrap().as_ref() == Some(record)));
        history.sync().unwrap();
    }
    assert!(backend.values().values().all(|value| value.len() <= BLOCK_BYTES));
    assert!(open(&backend, 0).unwrap().2.into_iter().eq(expected));
}

/// A visit that stops, and one that fails.
#[test]
fn a_scan_ends_when_it_is_told_to() {
    let (history, ..) = open(&furnished(), 0).unwrap();
    history.append(rev(70), record(rev(70), 5));
    let mut seen = Vec::new();
    let visit = &mut |rev: Revision, _: &Record| {
        seen.push(rev.main);
        Ok(seen.len() < 3)
    };
    history.scan(rev(57), END, visit).unwrap();
    assert_eq!(seen, [57, 58, 70]);
    assert!(history.scan(rev(2), END, &mut |_, _| Err(Error::Stopped)).is_err());
    history.scan(rev(9), rev(9), &mut |_, _| panic!("an empty range")).unwrap();
    history.scan(rev(9), rev(2), &mut |_, _| panic!("a range from right to left")).unwrap();
}

/// What is read in order, or while there is room in the cache, is not asked for block by block.
#[test]
fn neighbours_are_read_in_one_go() {
    const BLOCKS: usize = 100;
    let fill = |cache_bytes| {
        let backend = Nasty::new(Values::new());
        let (history, ..) = open(&backend, cache_bytes).unwrap();
        for main in 1..=(BLOCKS * BLOCK_RECORDS) as i64 {
            history.append(rev(main), record(rev(main), 9));
        }
        history.commit(Bytes::from_static(b"1"));
        history.write_out().unwrap();
        history.sync().unwrap();
        drop(history);
        let (history, ..) = open(&backend, cache_bytes).unwrap();
        backend.write().reads = 0;
        (backend, history)
    };
    let reads = |backend: &Nasty| std::mem::take(&mut backend.write().reads);
    let all = || (1..=(BLOCKS * BLOCK_RECORDS) as i64).map(rev);

    // 1, 2, 4, 8, 16, 32, 32 blocks, and what is left.
    let (backend, history) = fill(0);
    history.scan(Revision::default(), END, &mut |_, _| Ok(true)).unwrap();
    assert_eq!(reads(&backend), 8);

    // A cache of one block keeps nothing of a run but its last; the reader then asks for each.
    let (backend, history) = fill(1 << 20);
    let mut reader = history.reader();
    all().for_each(|rev| assert!(reader.get(rev).unwrap().is_some()));
    assert!(reads(&backend) <= 13, "a reader that goes through all");

    let (backend, history) = fill(1 << 24);
    let mut mixed: Vec<Revision> = all().collect();
    mixed.sort_by_key(|rev| rev.main * 7919 % 4001);
    mixed.iter().for_each(|rev| assert!(history.get(*rev).unwrap().is_some()));
    assert!(reads(&backend) < BLOCKS / 2, "gets while the cache fills");
    mixed.iter().for_each(|rev| assert!(history.get(*rev).unwrap().is_some()));
    assert_eq!(reads(&backend), 0, "all of it is cached");
}

/// Readers never miss a record while it moves from the tail to a block and from block to block, nor while the backend fails
/// and comes back without its last batches. Revisions divisible by three never die.
#[test]
fn readers_miss_nothing_while_records_move() {
    let backend = Nasty::new(Values::new());
    backend.yields.store(true, Ordering::Relaxed);
    let (history, ..) = open(&backend, 20_000).unwrap();
    let (history, backend, newest, stop) = (&history, &backend, &AtomicI64::new(1), &AtomicBool::new(false));
    let length = |main: i64| if main % 60 == 0 { CHUNK_BYTES + 9 } else { 40 };
    thread::scope(|scope| {
        for seed in 1..4u64 {
            scope.spawn(move || {
                let mut random = seed;
                let mut next = |below: i64| {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (random >> 33) as i64 % below.max(1)
                };
                while !stop.load(Ordering::Acquire) {
                    let last = newest.load(Ordering::Acquire);
                    for _ in 0..20 {
                        // Half of the looks go to the newest ones, which are about to move.
                        let main = if next(2) == 0 { next(last) } else { last - next(100.min(last)) } / 3 * 3;
                        if main < 2 {
                            continue;
                        }
                        let found = history.get(rev(main)).unwrap().unwrap_or_else(|| panic!("{main} of {last} is missing"));
                        assert_eq!(found, record(rev(main), length(main)));
                    }
                    let from = next(last);
                    let to = last.min(from + 300) + 1;
                    let found: Vec<i64> = all(history, rev(from), rev(to)).iter().map(|(rev, _)| rev.main).collect();
                    assert!(found.is_sorted_by(|a, b| a < b));
                    let lasting: Vec<i64> = found.into_iter().filter(|main| main % 3 == 0).collect();
                    assert_eq!(lasting, (from.max(2)..to).filter(|main| main % 3 == 0).collect::<Vec<_>>());
                }
            });
        }
        scope.spawn(move || {
            for turn in 0.. {
                let stopping = stop.load(Ordering::Acquire);
                let written = history.write_out().and_then(|_| history.collect(20_000));
                if turn % 7 == 0 {
                    let _ = history.sync();
                }
                match turn % 11 {
                    3 => backend.write().fail = true,
                    _ if written.is_err() => backend.reopen_with_loss(turn % (backend.unsynced() + 1)),
                    _ => {}
                }
                if stopping {
                    break;
                }
                thread::yield_now();
            }
        });
        for main in 2..6000 {
            history.append(rev(main), record(rev(main), length(main)));
            if main % 3 != 0 && main > 40 {
                history.mark_dead(&[rev(main - 39 + main % 3)].map(|rev| if rev.main % 3 == 0 { successor(rev) } else { rev }));
            }
            history.commit(Bytes::from(main.to_string()));
            newest.store(main, Ordering::Release);
            if main % 16 == 0 {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Release);
    });
    backend.reopen().unwrap();
    history.sync().unwrap();
    history.check_invariants();
    let (again, _, records) = open(backend, 0).unwrap();
    assert_eq!(records.into_iter().collect::<Vec<_>>(), all(history, rev(0), END));
    assert_eq!(again.stats().live_bytes, history.stats().live_bytes);
}

#[test]
#[should_panic(expected = "is appended after")]
fn a_revision_that_goes_back_panics() {
    let (history, ..) = open(&Nasty::new(Values::new()), 0).unwrap();
    history.append(rev(5), record(rev(5), 1));
    history.append(rev(5), record(rev(5), 1));
}
