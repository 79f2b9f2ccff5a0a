//! What the parts of a member cost by themselves: `cargo bench --bench micro --features internals`.
//!
//! The comparison with etcd, `benches/versus`, says how fast the whole is; this says where the time goes, and which change has made a
//! part slower. Nothing here waits for a network, and only `log` for a disk.
//!
//! ```text
//! cargo bench --bench micro --features internals                   everything, some two minutes
//! cargo bench --bench micro --features internals -- apply          those with `apply` in the name
//! cargo bench --bench micro --features internals -- --quick        about
//! cargo bench --bench micro --features internals -- --test         each once: does it work?
//! ```
//!
//! | group | what is measured |
//! |---|---|
//! | `index` | the tree of keys with [`KEYS`] in it: 1000 new keys, one key looked up, a walk over 1000 |
//! | `range` | a Range of 1000 keys, from the request to the pairs: the index, and the values from the history's cache |
//! | `txn` | if a key is there, put it and get it: a Txn on the store |
//! | `apply` | a committed log entry of 64 puts: what openraft has the state machine do |
//! | `watch` | one event, from its commit to the frames of 1, 100 and 1000 clients, which share one encoding |
//! | `log` | 64 entries of 300 bytes, until one group commit has them on disk; and beside it the disk alone |
//! | `encoding` | the answer to a Range of 1000 keys, with gRPC's prefix; a put taken apart |
//!
//! Times are those that the thread spent on the processor, so that a busy machine only blurs them; but `log` waits for others, and goes by
//! the clock on the wall.
//!
//! # What the figures leave out
//! - Stores are kept as a member keeps them that compacts often: each write goes to a key that is there, and now and then all is compacted
//!   and written out, *while the clock stands*. That work is the background thread's, and would be measured by itself.
//! - Each key is visited in an order that jumps, so that neither the processor's caches nor its guesses are better than in real life. They are
//!   still good: nothing else runs in between.
//! - The disk of `log` is the one that `TMPDIR` lies on. On a disk in memory it says nothing.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use prost::Message;
use quorate::internals::{Delivered, Index, Member, Watchers, frame};
use quorate::proto::KeyValue;
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::{Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, request_op::Request};
use quorate::proto::internal::{Command, command::Op};
use quorate::storage::wal::{Done, LogEntry, LogId, Wal, WalOptions};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// Keys of the index and of the stores.
const KEYS: usize = 100_000;
/// Keys of a range, and new keys in one go.
const SOME_KEYS: usize = 1000;
/// From one key to the next that is visited. It shares no factor with [`KEYS`], so each has its turn before any comes again.
const STRIDE: usize = 61_803;
/// Bytes of a value; with its key, a record has about 300.
const VALUE_BYTES: usize = 256;
/// Puts or log entries at a time.
const BATCH: usize = 64;
/// Bytes of a log entry.
const ENTRY_BYTES: usize = 300;
/// Writes after which a store is tidied: some seconds' worth.
const TIDY_WRITES: usize = 65_536;
/// Batches after which the log is purged, so that it does not fill the disk.
const PURGE_BATCHES: u64 = 256;

/// A key as Kubernetes would make it. Odd numbers are keys that are not there.
fn key(number: usize) -> Bytes {
    format!("/registry/pods/default/web-{number:08}").into()
}

fn keys() -> Vec<Bytes> {
    (0..KEYS).map(|number| key(2 * number)).collect()
}

fn value() -> Bytes {
    (0..VALUE_BYTES).map(|at| b'a' + (at * 7 % 26) as u8).collect::<Vec<_>>().into()
}

/// Places in the list of keys, one after the other and far from each other.
struct Places(Cell<usize>);

impl Places {
    fn new() -> Places {
        Places(Cell::new(0))
    }

    fn next(&self) -> usize {
        self.0.set((self.0.get() + STRIDE) % KEYS);
        self.0.get()
    }
}

/// What a benchmark works on, made when it is first needed: those that the command line leaves out cost nothing.
fn made<T>(slot: &mut Option<T>, make: impl FnOnce() -> T) -> &T {
    slot.get_or_insert_with(make)
}

fn index(c: &mut Criterion<CpuTime>) {
    let keys = keys();
    let places = Places::new();
    let full = || {
        let mut index = Index::default();
        for (revision, key) in (2..).zip(&keys) {
            index.put(key, revision);
        }
        index
    };
    let mut shared = None;
    let mut growing = None;

    let mut group = c.benchmark_group("index");
    group.throughput(Throughput::Elements(SOME_KEYS as u64));
    group.bench_function("insert-1000", |b| {
        let (index, inserted) = made(&mut growing, || (RefCell::new(full()), RefCell::new(Vec::<Bytes>::new())));
        let fresh = || {
            let mut index = index.borrow_mut();
            inserted.borrow_mut().drain(..).for_each(|key| index.remove(&key));
            (0..SOME_KEYS).map(|_| key(2 * places.next() + 1)).collect::<Vec<_>>()
        };
        let insert = |fresh: Vec<Bytes>| {
            let mut index = index.borrow_mut();
            for (revision, key) in (KEYS as i64 + 2..).zip(&fresh) {
                index.put(key, revision);
            }
            inserted.replace(fresh)
        };
        b.iter_batched(fresh, insert, BatchSize::PerIteration);
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("get", |b| {
        let index = made(&mut shared, full);
        b.iter(|| index.get(&keys[places.next()]).unwrap());
    });
    group.throughput(Throughput::Elements(SOME_KEYS as u64));
    group.bench_function("range-1000", |b| {
        let index = made(&mut shared, full);
        b.iter(|| index.range(&keys[places.next().min(KEYS - SOME_KEYS)], SOME_KEYS, i64::MAX));
    });
    group.finish();
}

/// A member's state with all keys put once, and what goes on being written to it.
struct Filled {
    member: RefCell<Member>,
    keys: Vec<Bytes>,
    value: Bytes,
    places: Places,
    /// Writes since it was tidied.
    writes: Cell<usize>,
}

impl Filled {
    fn new() -> Filled {
        let (keys, value) = (keys(), value());
        let mut member = Member::new().unwrap();
        for some in keys.chunks(BATCH) {
            let commands = some.iter().map(|key| put(key, &value)).collect();
            let entry = member.entry(commands);
            member.apply(entry).unwrap();
        }
        member.tidy().unwrap();
        Filled { member: RefCell::new(member), keys, value, places: Places::new(), writes: Cell::new(0) }
    }

    fn key(&self) -> &Bytes {
        &self.keys[self.places.next()]
    }

    /// To be told of writes while no clock runs.
    fn about_to_write(&self, count: usize) {
        self.writes.set(self.writes.get() + count);
        if self.writes.get() > TIDY_WRITES {
            self.writes.set(count);
            self.member.borrow_mut().tidy().unwrap();
        }
    }
}

fn put(key: &Bytes, value: &Bytes) -> Command {
    Command { id: 1, op: Some(Op::Put(PutRequest { key: key.clone(), value: value.clone(), ..PutRequest::default() })) }
}

fn store(c: &mut Criterion<CpuTime>) {
    let mut filled = None;

    let mut group = c.benchmark_group("range");
    group.throughput(Throughput::Elements(SOME_KEYS as u64));
    group.bench_function("1000", |b| {
        let filled = made(&mut filled, Filled::new);
        let member = filled.member.borrow();
        b.iter(|| {
            let start = filled.places.next().min(KEYS - SOME_KEYS - 1);
            let (key, range_end) = (filled.keys[start].clone(), filled.keys[start + SOME_KEYS].clone());
            let answer = member.range(&RangeRequest { key, range_end, ..RangeRequest::default() }).unwrap();
            assert_eq!(answer.kvs.len(), SOME_KEYS);
            answer
        });
    });
    group.finish();

    let mut group = c.benchmark_group("txn");
    group.throughput(Throughput::Elements(1));
    group.bench_function("compare-put-get", |b| {
        let filled = made(&mut filled, Filled::new);
        let request = || {
            filled.about_to_write(1);
            let (key, value) = (filled.key().clone(), filled.value.clone());
            let there = Compare {
                result: CompareResult::Greater as i32,
                target: CompareTarget::Version as i32,
                key: key.clone(),
                target_union: Some(TargetUnion::Version(0)),
                ..Compare::default()
            };
            let put = Request::RequestPut(PutRequest { key: key.clone(), value, ..PutRequest::default() });
            let get = Request::RequestRange(RangeRequest { key, ..RangeRequest::default() });
            let success = [put, get].map(|request| RequestOp { request: Some(request) }).into();
            TxnRequest { compare: vec![there], success, failure: Vec::new() }
        };
        let run = |request: TxnRequest| {
            let answer = filled.member.borrow_mut().txn(&request).unwrap();
            assert!(answer.succeeded);
            (request, answer)
        };
        b.iter_batched(request, run, BatchSize::NumIterations(BATCH as u64));
    });
    group.finish();

    let mut group = c.benchmark_group("apply");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("64-puts", |b| {
        let filled = made(&mut filled, Filled::new);
        let entry = || {
            filled.about_to_write(BATCH);
            let commands = (0..BATCH).map(|_| put(filled.key(), &filled.value)).collect();
            filled.member.borrow_mut().entry(commands)
        };
        b.iter_batched(entry, |entry| filled.member.borrow_mut().apply(entry).unwrap(), BatchSize::PerIteration);
    });
    group.finish();
}

fn watch(c: &mut Criterion<CpuTime>) {
    let kv = KeyValue { key: key(0), create_revision: 2, mod_revision: 9, version: 3, value: value(), lease: 0 };
    let request =
        WatchCreateRequest { key: "/registry/pods/".into(), range_end: "/registry/pods0".into(), ..WatchCreateRequest::default() };
    let mut group = c.benchmark_group("watch");
    for count in [1, 100, 1000] {
        let mut watchers = None;
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{count}-watchers"), |b| {
            let watchers = watchers.get_or_insert_with(|| Watchers::new(count, &request, &kv).unwrap());
            b.iter(|| {
                let Delivered { answers, encodings, bytes } = watchers.deliver().unwrap();
                assert_eq!((answers, encodings), (count, 1), "each is told once, and all of them with the same bytes");
                bytes
            });
        });
    }
    group.finish();
}

/// A log in a directory of its own, which goes with it.
struct Log {
    wal: Wal,
    payload: Bytes,
    /// Index of the next entry.
    next: Cell<u64>,
    _dir: TempDir,
}

impl Log {
    fn new() -> Log {
        let dir = tempfile::tempdir().unwrap();
        let (wal, _) = Wal::open(dir.path(), WalOptions::default()).unwrap();
        Log { wal, payload: vec![b'x'; ENTRY_BYTES].into(), next: Cell::new(0), _dir: dir }
    }

    /// Makes a call of the log, and waits until it is on disk.
    fn wait(&self, call: impl FnOnce(Done) -> quorate::Result<()>) {
        let (sender, done) = mpsc::channel();
        call(Box::new(move |result| sender.send(result).unwrap())).unwrap();
        done.recv().unwrap().unwrap();
    }

    /// The next batch of entries.
    fn entries(&self) -> Vec<LogEntry> {
        let id = |index| LogId { term: 1, node: 1, index };
        let first = self.next.get();
        if first > 0 && first.is_multiple_of(PURGE_BATCHES * BATCH as u64) {
            self.wait(|done| self.wal.purge(id(first - 1), done));
        }
        self.next.set(first + BATCH as u64);
        (first..self.next.get()).map(|index| LogEntry { id: id(index), payload: self.payload.clone() }).collect()
    }
}

fn log(c: &mut Criterion) {
    let mut group = c.benchmark_group("log");
    group.throughput(Throughput::Elements(BATCH as u64));

    let mut appending = None;
    group.bench_function("append-64", |b| {
        let log = made(&mut appending, Log::new);
        let append = |entries: Vec<LogEntry>| log.wait(|done| log.wal.append(entries, done));
        b.iter_batched(|| log.entries(), append, BatchSize::PerIteration);
    });

    // What no log can do better: as many bytes, to a file that has them already.
    let mut bare = None;
    group.bench_function("disk-alone", |b| {
        let frame = [b'x'; BATCH * ENTRY_BYTES];
        let at = |place: u64| place * frame.len() as u64;
        let file = made(&mut bare, || {
            let file = tempfile::tempfile().unwrap();
            (0..PURGE_BATCHES).for_each(|place| file.write_all_at(&frame, at(place)).unwrap());
            file.sync_all().unwrap();
            file
        });
        let mut place = 0;
        b.iter(|| {
            place = (place + 1) % PURGE_BATCHES;
            file.write_all_at(&frame, at(place)).unwrap();
            file.sync_data().unwrap();
        });
    });
    group.finish();
}

fn encoding(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("encoding");
    group.throughput(Throughput::Elements(SOME_KEYS as u64));
    let mut answer = None;
    group.bench_function("range-answer-1000", |b| {
        let answer = made(&mut answer, || {
            let filled = Filled::new();
            let (key, range_end) = (filled.keys[0].clone(), filled.keys[SOME_KEYS].clone());
            filled.member.into_inner().range(&RangeRequest { key, range_end, ..RangeRequest::default() }).unwrap()
        });
        b.iter(|| frame(answer).unwrap());
    });
    group.throughput(Throughput::Elements(1));
    let put = PutRequest { key: key(0), value: value(), lease: 0x1234_5678_9abc_def0, ..PutRequest::default() };
    let bytes = Bytes::from(put.encode_to_vec());
    group.bench_function("put-decode", |b| b.iter(|| PutRequest::decode(black_box(bytes.clone())).unwrap()));
    group.finish();
}

/// The time that the thread has spent on the processor.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap()
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, time: &Duration) -> f64 {
        time.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn config() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3)).sample_size(50)
}

criterion_group! {
    name = cpu;
    config = config().with_measurement(CpuTime);
    targets = index, store, watch, encoding
}
criterion_group! {
    name = disk;
    config = config();
    targets = log
}
criterion_main!(cpu, disk);
