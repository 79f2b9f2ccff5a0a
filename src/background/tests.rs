//! The thread beside a store in memory: compactions of an idle store and on a full disk, and rewrites that fail.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Instant;

use super::*;
use crate::storage::history::HistoryOptions;
use crate::storage::mem::Mem;
use crate::storage::{Batch, Visit};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A backend in memory whose rewrites fail when they are told to, and which says that it takes as much as it is told.
#[derive(Default)]
struct Disk {
    mem: Mem,
    refuses: Mutex<Option<ErrorKind>>,
    begun: AtomicUsize,
    /// Added to `disk_bytes`.
    waste: AtomicU64,
}

impl Backend for Disk {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        self.mem.get(key)
    }

    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.mem.scan(start, end, visit)
    }

    fn apply(&self, batch: &Batch) -> Result<()> {
        self.mem.apply(batch)
    }

    fn sync(&self) -> Result<()> {
        self.mem.sync()
    }

    fn disk_bytes(&self) -> u64 {
        self.mem.disk_bytes() + self.waste.load(Ordering::Relaxed)
    }

    fn reopen(&self) -> Result<()> {
        self.mem.reopen()
    }

    fn start_rewrite(&self) -> Result<()> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        match *lock(&self.refuses) {
            Some(kind) => Err(Error::io("begin to rewrite", "(memory)", kind.into())),
            None => self.mem.start_rewrite(),
        }
    }

    fn rewrite_step(&self, max_bytes: usize) -> Result<bool> {
        self.mem.rewrite_step(max_bytes)
    }
}

/// Keeps the fault that the thread has told of.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Option<Error>>>);

impl Events for Told {
    fn durable(&self, _: Bytes) {}
    fn compacted(&self) {}
    fn failed(&self, err: Error) {
        *lock(&self.0) = Some(err);
    }
}

fn open(disk: &Arc<Disk>) -> Arc<Store> {
    Arc::new(Store::open(disk.clone(), HistoryOptions::default(), &mut |_, _| {}).unwrap().0)
}

fn start(store: &Arc<Store>, disk: &Arc<Disk>, told: &Told, clock: Clock) -> Background {
    debug_assert_eq!(store.history().backend().path(), disk.path());
    Background::start(Arc::new(Current::new(store.clone())), told.clone(), "test", clock, Arc::default()).unwrap()
}

fn real_clock() -> Clock {
    let began = Instant::now();
    Arc::new(move || began.elapsed())
}

/// Writes one key again and again, each time in an entry of its own.
fn write(store: &Store, times: usize) {
    for _ in 0..times {
        let mut writer = store.begin();
        writer.put(&Bytes::from_static(b"key"), &Bytes::from_static(&[b'v'; 100]), 0);
        writer.finish().unwrap();
        store.history().commit(Bytes::from_static(b"applied"));
    }
}

fn compact(store: &Store) -> i64 {
    let revision = store.revision();
    store.compact(revision).unwrap();
    store.history().commit(Bytes::from_static(b"compacted"));
    revision
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Records that a start would find.
fn stored_records(disk: &Disk) -> u64 {
    let copy = Arc::new(Disk::default());
    copy.mem.apply(&Batch { puts: disk.mem.dump().into_iter().collect(), deletes: Vec::new() }).unwrap();
    open(&copy).history().stats().live_records
}

/// Nobody writes after the compaction, and it is carried out all the same: what it took away is gone from the storage when it
/// says so.
#[test]
fn an_idle_store_is_compacted_to_the_end() {
    let (disk, told) = (Arc::new(Disk::default()), Told::default());
    let store = open(&disk);
    write(&store, 3000);
    let wanted = compact(&store);
    store.history().sync().unwrap();
    assert_eq!(stored_records(&disk), 3000);
    let background = start(&store, &disk, &told, real_clock());
    let compacted = background.compacted();
    wait_for("the compaction", || *compacted.borrow() == wanted);
    assert_eq!((stored_records(&disk), store.history().deaths_waiting()), (1, 0));
    wait_for("the space", || disk.mem.dump().values().map(Bytes::len).sum::<usize>() < 1000);
    background.stop();
    assert!(lock(&told.0).is_none());
    store.check().unwrap();
    assert!(store.get(b"key", 0).unwrap().is_some());
}

/// What is done gently, beside one who writes all the time, comes to its end, too: a compaction, a rewrite, and the stop.
#[test]
fn beside_writes_everything_comes_to_its_end() {
    let (disk, told) = (Arc::new(Disk::default()), Told::default());
    let store = open(&disk);
    write(&store, 200);
    let background = start(&store, &disk, &told, real_clock());
    struct Ending<'a>(&'a AtomicBool);
    impl Drop for Ending<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (done, applier) = (AtomicBool::new(false), Mutex::new(()));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    std::thread::scope(|scope| {
        // Also when a wait was in vain, or the writer would be waited for.
        let _done = Ending(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let applying = lock(&applier);
                write(&store, 1);
                drop(applying);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        for _ in 0..3 {
            let compacted = background.compacted();
            let applying = lock(&applier);
            let wanted = compact(&store);
            drop(applying);
            wait_for("the compaction", || *compacted.borrow() >= wanted);
            runtime.block_on(background.defragment()).unwrap();
        }
        // The thread has seen the writes before it is stopped.
        let (written, before) = (|| store.history().stats().written_bytes, store.history().stats().written_bytes);
        wait_for("a write", || written() > before);
        background.stop();
    });
    assert!(lock(&told.0).is_none() && disk.begun.load(Ordering::Relaxed) >= 3);
    store.history().sync().unwrap();
    assert_eq!(stored_records(&disk), store.history().stats().live_records);
    store.check().unwrap();
}

/// Compaction goes on while nothing can be written, and is told of once what it marked has been.
#[test]
fn a_full_disk_does_not_stop_a_compaction() {
    let (disk, told) = (Arc::new(Disk::default()), Told::default());
    let store = open(&disk);
    write(&store, 300);
    store.history().sync().unwrap();
    disk.mem.set_capacity(Some(0));
    let background = start(&store, &disk, &told, real_clock());
    let compacted = background.compacted();
    write(&store, 200);
    wait_for("the disk to be full", || background.is_full());
    // These are in no batch yet, and need never be in one.
    write(&store, 300);
    let wanted = compact(&store);
    background.wake();
    wait_for("the compaction in memory", || store.compaction_done() == wanted);
    assert!(background.is_full() && *compacted.borrow() < wanted, "it was told of before it was written");
    assert_eq!(stored_records(&disk), 300);
    disk.mem.set_capacity(None);
    wait_for("the compaction", || *compacted.borrow() == wanted);
    assert!(!background.is_full());
    assert_eq!(stored_records(&disk), 1);
    background.stop();
    assert!(lock(&told.0).is_none());
}

/// A rewrite that fails is answered, and nothing else comes of it; by itself it is not begun again for minutes.
#[test]
fn a_rewrite_that_fails_harms_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for kind in [ErrorKind::StorageFull, ErrorKind::Other] {
        let (disk, told) = (Arc::new(Disk::default()), Told::default());
        let store = open(&disk);
        let now = Arc::new(AtomicU64::new(0));
        let clock: Clock = {
            let now = now.clone();
            Arc::new(move || Duration::from_secs(now.load(Ordering::Relaxed)))
        };
        *lock(&disk.refuses) = Some(kind);
        let background = start(&store, &disk, &told, clock);
        let begun = || disk.begun.load(Ordering::Relaxed);
        let error = runtime.block_on(background.defragment()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!((begun(), background.is_full(), background.is_rewriting()), (1, false, false));
        // There is much to gain by one, and the rest is not over.
        disk.waste.store(10 * REWRITE_BYTES_MIN, Ordering::Relaxed);
        write(&store, 10);
        background.wake();
        wait_for("a write", || store.history().stats().tail_records == 0);
        std::thread::sleep(3 * LOOK_INTERVAL);
        assert_eq!(begun(), 1);
        now.store(REWRITE_REST.as_secs() + 1, Ordering::Relaxed);
        wait_for("the next attempt", || begun() > 1);
        std::thread::sleep(3 * LOOK_INTERVAL);
        assert_eq!(begun(), 2, "it is begun again at once");
        // Who asks does not have to wait.
        *lock(&disk.refuses) = None;
        runtime.block_on(background.defragment()).unwrap();
        assert_eq!(begun(), 3);
        assert!(!background.is_full() && lock(&told.0).is_none());
        background.stop();
    }
}
