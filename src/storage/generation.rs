//! One sled 0.34.7 database in its directory, and what it takes to trust it.
//!
//! - **`flush()` is not an fsync**: it writes and waits with `sync_file_range`, which leaves the device's cache and a grown
//!   file's extents behind. [`Generation::sync`] calls fdatasync on `db` after it, on a descriptor of our own.
//! - **It recycles segments that it believes durable.** A page that moved from one segment to another may have its old place
//!   overwritten while the new one is still in a cache, and a power cut then loses what an *earlier* sync had promised.
//!   Within a batch sled recycles nothing of before the batch; so the owner syncs every batch before it hands over the next,
//!   and once more right before that one, because reads merge pages and write them, too; and sled's own flusher thread, which
//!   moves pages at any time, stays off. Likewise `db` is synced before it is opened,
//!   since recovery clears the segments that it finds unused.
//! - **A full disk wedges it** until reopened, with half a batch in memory. Room is therefore reserved (fallocate behind the
//!   end of `db`) before sled sees a batch: a batch that does not fit is refused with nothing changed. A part of the reserve
//!   is kept for batches that write next to nothing, so that deletes still work on a full disk and make room inside the
//!   file. Should sled run out all the same, nothing can be read or changed through the handle any more.
//! - **It leaves a half-written summary of its pages** (`snap.*.generating`) when it is killed, or runs out of space, while it
//!   opens, and then takes it for a damaged one. What is left of such is removed before every open.
//! - **Its cache has no bound that matters.** Each of 256 queues must collect 64 page accesses before anything is evicted:
//!   with pages of 100 KiB that is 1.6 GB, whatever `cache_capacity` says. A second tree of tiny pages, one or more for
//!   each queue, is touched in step with what is read and written ([`Trim`]), which holds sled to some 30 MB more than
//!   [`CACHE_WINDOW_BYTES`].
//! - **It panics on damage.** Every call runs under `catch_unwind` and a panic becomes [`Error::Corrupt`]. The panic's own
//!   line still appears on stderr: silencing it would need a process-wide panic hook, which is the host program's to set.
//!   This needs `panic = "unwind"`; with `panic = "abort"` a damaged store aborts the process. An I/O thread of sled's that
//!   panics leaves `flush` waiting for ever, hence [`STALL`].
//! - **A batch that fails half-way for any reason but a failed write is finished by sled as if the half were the whole.**
//!   The generation is then marked with a file `DAMAGED`, and never opened again.
//! - **It writes a page anew for every tenth change, and both halves of it for a split**: in key order each value of 16 KiB was written 3.5
//!   to 4 times, and the first deletion on a page wrote the eight others again. So the keys of large values that come last are
//!   [held places for](Generation::hold_places) first: each gets a placeholder, and [`FILLERS`] behind it, at some 60 bytes. The pages are
//!   split while they are empty, and take three values and their deletions before the tenth change; of 256 values all but the few on the
//!   page with earlier ones are written once. The fillers also keep pages from being merged, and small, so that a read fetches 48 KiB and
//!   not 150. The space of what is deleted is given back by the rewrite. Whatever has no bytes is a placeholder, and is not there to a
//!   reader; a crash leaves some, and a rewrite copies none.
//! - **Blob files**, into which it puts pages beyond a quarter of a segment, it neither syncs nor survives running out of
//!   space in. Segments are large enough for the largest page: 19 values of [`VALUE_BYTES_MAX`] stay below a quarter.
//!
//! # Caveats
//! - sled keeps at least 7 idle threads (`sled-io-N`) per *process*, once used, that no call ends. The file and its lock are
//!   released when a [`Generation`] is dropped, some of it a moment later by one of them; opening waits for that
//!   ([`LOCK_TRIES`]).
//! - A flipped byte may cost keys silently, or bring back older content: at open sled skips the rest of a damaged log
//!   segment, or takes it for the log's end, and overwrites what follows: of 891 random flips in a log of 3.5 MB that nothing else held,
//!   818 made the start fail, and each of these had destroyed what followed. So the log is looked through before ([`inspect`]), and a
//!   copy is kept where there is a doubt ([`Kept`]). That the state is whole the digest of `history.rs` tells. In a log
//!   larger than [`COPY_BYTES`] a flip in the very last message is not suspected.
//! - sled's batches take one lock for the process: several servers in one process wait for each other's.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use ::sled::{Db, IVec, Tree};
use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::dir::sync_dir;
use super::inspect::{Findings, inspect};
use super::keep::Kept;
use super::{Batch, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::error::{Error, Result};
use crate::pace::breathe;

/// Size of sled's log segments. A page beyond a quarter of it goes to a blob file; see the module head.
const SEGMENT_BYTES: usize = 2 * 1024 * 1024;

/// What sled is told to cache. Its least unit, one page in each of 256 parts, exceeds this; the bound that counts is
/// [`CACHE_WINDOW_BYTES`].
const CACHE_CAPACITY: u64 = 1024 * 1024;

/// How many bytes of pages may have been touched since a part of sled's cache was last trimmed. Beyond it memory does not
/// grow: the touching calls do the trimming, at about 30 us for each 55 KB.
const CACHE_WINDOW_BYTES: u64 = 16 * 1024 * 1024;

/// Keys in the tree of tiny pages. sled splits a page at 17 keys into halves, and numbers pages in the order of their making:
/// every eighth of these keys is on a page of its own, and 256 or more pages in a row reach every part of the cache.
const TRIM_KEYS: usize = 2400;

/// Distance between the keys that are touched, and the touches that make sled look at one part of its cache: 64, and one.
const TRIM_STRIDE: usize = 8;
const TRIM_TOUCHES: usize = 65;

/// How many values share a page on the average; turns the size of a value into an estimate of the page's. Three where places were held, 12
/// elsewhere.
const PAGE_VALUES: usize = 6;

/// Keys remembered as touched lately. Beyond it trimming is done more often than it need be.
const RECENT_KEYS: usize = 1024;

/// Disk space kept allocated behind the end of `db` for batches below [`SMALL_BATCH_BYTES`], and for the next open: larger batches are
/// refused as on a full disk when they would have to take from it.
const KEPT_BACK_BYTES: u64 = 8 * 1024 * 1024;

/// Up to this size a batch may use what is kept back: deletes, marks, counters, of which a full disk needs more to recover.
const SMALL_BATCH_BYTES: usize = 64 * 1024;

/// What a batch is reckoned to write, as a multiple of its own bytes: each value once, and its page when it is next merged
/// or split. 2.5 to 5 were measured.
const WRITE_FACTOR: u64 = 5;

/// From how many bytes on a value is worth a placeholder, and from how many such values on a batch is: with fewer most of them share their
/// pages with earlier ones, and the placeholders cost a sync.
pub(super) const PLACE_BYTES: usize = 1024;
pub(super) const PLACES_MIN: usize = 6;

/// Values that are held places for before the next sync: with one old page that is split and merged, half a segment. Within two segments sled
/// has not yet taken for free what they have replaced. What is beyond goes without.
pub(super) const PLACES_MAX: usize = 512;

/// Placeholders behind each value's, under its key and one byte more: of the nine keys that a split leaves on a page three are values'.
pub(super) const FILLERS: u8 = 2;

/// What a placeholder counts towards the bytes of a [chunk](Generation::chunk): looking at a few hundred takes as long as reading one page.
const PLACE_COST: usize = 128;

/// Attempts, 10 ms apart, at a database whose last owner in this process is still letting go. Beyond it: `Error::Locked`.
const LOCK_TRIES: usize = 300;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// How a file that is not needed any more is cut down: pieces, and the pause after each. A gigabyte takes a fifth of a second.
const CUT_BYTES: u64 = 16 * 1024 * 1024;
const CUT_PAUSE: Duration = Duration::from_millis(3);

/// A log up to this size is copied before it is opened also when all that is in doubt is whether its last message is whole, which is so
/// after most starts. A larger one is copied when something is odd for sure: a copy takes time and space.
const COPY_BYTES: u64 = 64 * 1024 * 1024;

/// How long a flush may take. Beyond it sled's I/O thread is taken for dead, and the handle is abandoned with its memory
/// and its lock, rather than the calling thread. A disk of 1 MB/s writes the largest batch in a tenth of it.
const STALL: Duration = Duration::from_secs(300);

/// Marks a generation that holds a part of a batch.
const DAMAGED: &str = "DAMAGED";

/// One sled database in its directory, open.
pub(super) struct Generation {
    /// Its place in the order of generations, from 1.
    pub(super) number: u64,
    pub(super) path: PathBuf,
    /// `None` only while being dropped.
    handle: Option<Handle>,
    /// Our own descriptor of `db`: to fsync, to reserve, to measure. The kernel reports a failed write once to each
    /// descriptor that was open at the time, so this one is opened first and kept.
    file: File,
    /// Why nothing more may be read or changed through this handle. Set once.
    failed: OnceLock<Error>,
    /// Batches handed to sled, and how many of them are known to be on disk.
    applied: AtomicU64,
    synced: AtomicU64,
    /// Whether [`sync`](Self::sync) waits for the disk.
    fsync: bool,
    /// Everything in the directory but `db`, in bytes, as it was when opened.
    other_bytes: u64,
}

pub(super) struct Handle {
    pub(super) tree: Tree,
    trim: Trim,
    db: Db,
    /// Set when sled stopped answering: dropping it would wait for ever too.
    stalled: OnceLock<()>,
}

/// A part of a range.
#[derive(Default)]
pub(super) struct Chunk {
    /// Without placeholders.
    pub(super) entries: Vec<(IVec, IVec)>,
    /// Of the entries, and what the placeholders count.
    pub(super) bytes: usize,
    /// Where it goes on; none at the range's end.
    pub(super) next: Option<Vec<u8>>,
}

impl Chunk {
    /// Behind what was looked at; none when there was nothing.
    pub(super) fn end(&self) -> Option<Vec<u8>> {
        self.next.clone().or_else(|| self.entries.last().map(|(last, _)| after(last)))
    }
}

impl Generation {
    /// Makes an empty generation and syncs it. Whatever is in its place is removed.
    pub(super) fn create(dir: &Path, number: u64, fsync: bool) -> Result<Generation> {
        let path = dir.join(generation_name(number));
        if path.exists() {
            fs::remove_dir_all(&path).map_err(|e| Error::io("remove the leftover generation", &path, e))?;
        }
        let made = make_dir(&path).and_then(|()| {
            let generation = Generation::start(&path, number, fsync)?;
            let handle = generation.handle()?;
            guarded(&path, "create", || handle.trim.fill())?;
            generation.applied.fetch_add(1, Ordering::SeqCst);
            generation.sync()?;
            sync_file(&path.join("conf"))?;
            sync_dir(&path)?;
            sync_dir(dir)?;
            Ok(generation)
        });
        if made.is_err() {
            remove_quietly(&path);
        }
        made
    }

    /// Opens the generation that `CURRENT` names. Where it is in doubt whether its log is whole, a copy of it as it was is kept.
    pub(super) fn open_kept(dir: &Path, number: u64, fsync: bool) -> Result<(Generation, Option<Kept>)> {
        let path = dir.join(generation_name(number));
        Kept::recover(&path)?;
        let kept = keep_if_odd(&path)?;
        match Generation::open(dir, number, fsync) {
            Ok(generation) => Ok((generation, kept)),
            Err(error) => {
                // Under another handle's hands the files are as they should be, and the copy need not be.
                let end = if matches!(error, Error::Locked { .. }) { Kept::release } else { Kept::restore };
                if let Some(Err(failed)) = kept.map(end) {
                    tracing::warn!(error = %failed, "putting the state back as it was; the next start tries again");
                }
                Err(error)
            }
        }
    }

    /// Opens a generation as it is.
    pub(super) fn open(dir: &Path, number: u64, fsync: bool) -> Result<Generation> {
        let path = dir.join(generation_name(number));
        let mark = path.join(DAMAGED);
        if let Ok(what) = fs::read_to_string(&mark) {
            return Err(Error::Corrupt { path: mark, offset: None, what: format!("a batch was cut short: {what}") });
        }
        // sled makes what is missing, and would begin an empty database in the place of a lost one.
        for file in [path.join("db"), path.join("conf")] {
            let there = fs::metadata(&file).is_ok_and(|meta| meta.len() > 0);
            if !there {
                return Err(Error::Corrupt { path: file, offset: None, what: "it is missing or empty".to_owned() });
            }
        }
        // Recovery overwrites the segments that it finds unused, so what it reads must be on disk first.
        sync_file(&path.join("db"))?;
        let generation = Generation::start(&path, number, fsync)?;
        generation.applied.fetch_add(1, Ordering::SeqCst);
        generation.sync()?;
        sync_dir(&path)?;
        Ok(generation)
    }

    fn start(path: &Path, number: u64, fsync: bool) -> Result<Generation> {
        let db_path = path.join("db");
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&db_path).map_err(|e| Error::io("open", &db_path, e))?;
        let (mut tries, mut let_go) = (0, false);
        let db = loop {
            remove_unfinished(path);
            let config = ::sled::Config::new()
                .path(path)
                .segment_size(SEGMENT_BYTES)
                .cache_capacity(CACHE_CAPACITY)
                .flush_every_ms(None)
                .use_compression(false);
            match guarded(path, "open", || config.open()) {
                Ok(db) => break db,
                Err(Error::Io { source, .. }) if is_lock_held(&source) => {
                    tries += 1;
                    if tries > LOCK_TRIES {
                        return Err(Error::Locked { path: path.to_owned() });
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                // It writes when it opens: a summary of its pages, and zeros. What is kept back is for that too.
                Err(error) if error.is_disk_full() && !let_go => {
                    tracing::warn!(path = %path.display(), "the disk is full: opening with the space that was kept back for it");
                    let_go = true;
                    let len = file.metadata().map_err(|e| Error::io("read the size of", &db_path, e))?.len();
                    file.set_len(len).map_err(|e| Error::io("give up the space behind the end of", &db_path, e))?;
                }
                // Anything that sled refuses to open it has found to be other than it wrote it; only the disk is excused.
                Err(Error::Failed(what)) => return Err(Error::Corrupt { path: path.to_owned(), offset: None, what }),
                Err(error) => return Err(error),
            }
        };
        let trim = guarded(path, "open", || db.open_tree("trim"))?;
        keep_back(&file);
        let other_bytes = files_below(path).saturating_sub(file.metadata().map_or(0, |meta| meta.len()));
        Ok(Generation {
            number,
            path: path.to_owned(),
            handle: Some(Handle { tree: Tree::clone(&db), trim: Trim::new(trim), db, stalled: OnceLock::new() }),
            file,
            failed: OnceLock::new(),
            applied: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            fsync,
            other_bytes,
        })
    }

    pub(super) fn handle(&self) -> Result<&Handle> {
        self.handle.as_ref().ok_or(Error::Stopped)
    }

    pub(super) fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Remembers the first error of a change: nothing is read or changed through this handle after it.
    pub(super) fn fail(&self, error: Error) -> Error {
        tracing::warn!(path = %self.path.display(), %error, "a state database failed and takes nothing more until it is reopened");
        self.failed.get_or_init(|| error).clone()
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        let handle = self.handle()?;
        let value = guarded(&self.path, "read", || handle.tree.get(key))?.filter(|value| !value.is_empty());
        self.trim(key, value.as_ref().map_or(256, |value| value.len()) * PAGE_VALUES);
        // Copied: sled's own buffer would hold the page's memory for as long as the caller's cache holds the value.
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// The first entries of `[start, end)`, at most `max_entries` and `max_bytes` or one more. Placeholders count as [`PLACE_COST`] bytes:
    /// where much was deleted there may be nothing else for a long way.
    pub(super) fn chunk(&self, start: &[u8], end: &[u8], max_entries: usize, max_bytes: usize) -> Result<Chunk> {
        let mut chunk = Chunk::default();
        if !end.is_empty() && start >= end {
            return Ok(chunk);
        }
        let handle = self.handle()?;
        guarded(&self.path, "scan", || {
            let iter = if end.is_empty() { handle.tree.range(start..) } else { handle.tree.range(start..end) };
            for entry in iter {
                let (key, value) = entry?;
                chunk.bytes += if value.is_empty() { PLACE_COST } else { key.len() + value.len() };
                if chunk.bytes >= max_bytes || chunk.entries.len() + 1 >= max_entries {
                    chunk.next = Some(after(&key));
                }
                if !value.is_empty() {
                    chunk.entries.push((key, value));
                }
                if chunk.next.is_some() {
                    break;
                }
                breathe();
            }
            Ok(())
        })?;
        self.trim(start, chunk.bytes);
        Ok(chunk)
    }

    /// Makes pages for the values that are about to come behind all others of their kind; see the module head. Nothing that a reader can
    /// see changes. Synced when it returns, for sled may recycle what the splits have replaced while it takes the batch.
    pub(super) fn hold_places<'a>(&self, puts: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<()> {
        let is_large = |(key, value): &(&[u8], &[u8])| value.len() >= PLACE_BYTES && key.len() < KEY_BYTES_MAX;
        let mut large: Vec<&[u8]> = puts.filter(is_large).map(|(key, _)| key).collect();
        large.sort_unstable();
        let Some(last) = large.last().filter(|_| large.len() >= PLACES_MIN) else { return Ok(()) };
        self.check()?;
        let handle = self.handle()?;
        self.applied.fetch_add(1, Ordering::SeqCst);
        let made = guarded(&self.path, "make pages in", || {
            // Behind what is there, all fall on one old page, and on no key that is another's; between old ones each would have another
            // page split and written anew.
            let before = handle.tree.range(..=filler(last, FILLERS)).keys().next_back().transpose()?;
            let from = before.map_or(0, |before| large.partition_point(|key| *key <= before.as_ref()));
            let new = large.get(from..).filter(|new| new.len() >= PLACES_MIN).unwrap_or_default();
            for key in new.iter().take(PLACES_MAX) {
                handle.tree.insert(key, IVec::default())?;
                (0..FILLERS).try_for_each(|n| handle.tree.insert(filler(key, n), IVec::default()).map(drop))?;
                breathe();
            }
            Ok(!new.is_empty())
        });
        match made {
            Ok(true) => self.sync(),
            Ok(false) => Ok(()),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Hands a batch to sled. The caller excludes readers, who would see the half of it when it fails.
    pub(super) fn change(&self, batch: ::sled::Batch, bytes: usize) -> Result<()> {
        self.check()?;
        let handle = self.handle()?;
        self.applied.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = guarded(&self.path, "apply to", || handle.tree.apply_batch(batch)) {
            // With a failed write sled stops writing, and recovery drops the unfinished batch. Without one it goes on.
            if guarded(&self.path, "apply to", || handle.db.context.global_error()).is_ok() {
                let _ = fs::write(self.path.join(DAMAGED), error.to_string());
                let _ = sync_file(&self.path.join(DAMAGED)).and_then(|()| sync_dir(&self.path));
            }
            return Err(self.fail(error));
        }
        self.trim(&[], bytes);
        Ok(())
    }

    /// Waits until sled has written everything to the file; the kernel may still hold it.
    pub(super) fn flush(&self) -> Result<()> {
        self.check()?;
        self.drain().map_err(|error| self.fail(error))
    }

    /// [`flush`](Self::flush) without looking at, or remembering, a failure.
    ///
    /// A thread of its own, joined before this returns, so that a flush that waits for ever does not take the caller along.
    /// (sled's `flush_async` would block one of the few threads that do the writing: a deadlock between several servers.)
    fn drain(&self) -> Result<()> {
        let handle = self.handle()?;
        let (send, receive) = mpsc::sync_channel(1);
        let (tree, path) = (handle.tree.clone(), self.path.clone());
        let flush = move || {
            let result = guarded(&path, "write to", || tree.flush());
            drop(tree);
            let _ = send.send(result);
        };
        let thread = thread::Builder::new().name("state-flush".to_owned()).spawn(flush);
        let thread = thread.map_err(|e| Error::io("start a thread to write to", &self.path, e))?;
        match receive.recv_timeout(STALL) {
            Ok(result) => {
                let _ = thread.join();
                result.map(drop)
            }
            Err(_) => {
                let _ = handle.stalled.set(());
                Err(Error::Failed(format!("sled does not finish writing to {}", self.path.display())))
            }
        }
    }

    /// As [`sync`](Self::sync), and for what reads have written, too: sled merges pages when a read comes upon them.
    pub(super) fn settle(&self) -> Result<()> {
        self.applied.fetch_add(1, Ordering::SeqCst);
        self.sync()
    }

    /// Returns when every batch handed to sled before the call is on disk. Costs nothing when they are already.
    pub(super) fn sync(&self) -> Result<()> {
        self.check()?;
        let applied = self.applied.load(Ordering::SeqCst);
        if self.synced.load(Ordering::SeqCst) >= applied {
            return Ok(());
        }
        self.flush()?;
        if self.fsync {
            // After a failure the kernel takes the lost pages for clean: a second try would prove nothing, so there is none.
            self.file.sync_data().map_err(|e| self.fail(Error::io("sync", self.path.join("db"), e)))?;
        }
        self.synced.fetch_max(applied, Ordering::SeqCst);
        Ok(())
    }

    /// Makes sure that there is disk space for a batch before sled, which does not recover from a full disk, sees it.
    pub(super) fn reserve(&self, bytes: usize) -> Result<()> {
        let db = self.path.join("db");
        let meta = self.file.metadata().map_err(|e| Error::io("read the size of", &db, e))?;
        let size = meta.len();
        let allocated = meta.blocks() * 512;
        let least = bytes as u64 * WRITE_FACTOR + SEGMENT_BYTES as u64;
        let wanted = least + KEPT_BACK_BYTES;
        // Asked first: a file system may hand out the last of its space to a request that it then refuses.
        let free = rustix::fs::fstatvfs(&self.file).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        let result = if (size + wanted).saturating_sub(allocated) > free {
            Err(Errno::NOSPC)
        } else {
            rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, size, wanted)
        };
        match result {
            // Where space cannot be reserved, sled runs out of it by itself.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            // What was reserved earlier. Holes in the file make this less than it is, never more.
            Err(Errno::NOSPC | Errno::DQUOT) if bytes <= SMALL_BATCH_BYTES && allocated.saturating_sub(size) >= least => Ok(()),
            Err(errno) => Err(Error::io("make room in", &db, errno.into())),
        }
    }

    pub(super) fn check_sizes(&self, batch: &Batch) -> Result<()> {
        let keys = batch.puts.iter().map(|(key, _)| key).chain(&batch.deletes);
        let key = keys.map(Vec::len).max().unwrap_or(0);
        let value = batch.puts.iter().map(|(_, value)| value.len()).max().unwrap_or(0);
        if let Some((key, _)) = batch.puts.iter().find(|(_, value)| value.is_empty()) {
            return Err(Error::Failed(format!("a value without bytes cannot be stored, as that of key {key:02x?}")));
        }
        if key > KEY_BYTES_MAX || value > VALUE_BYTES_MAX {
            // Not stored all the same: beyond these sizes sled is on paths that do not survive a full disk.
            return Err(Error::Failed(format!("a key of {key} or a value of {value} bytes is too large for {}", self.path.display())));
        }
        Ok(())
    }

    /// Lets sled evict in step with what is touched. Failures are of no interest: nothing of worth is in those pages.
    fn trim(&self, key: &[u8], bytes: usize) {
        if let Some(handle) = &self.handle {
            let _ = guarded(&self.path, "read", || handle.trim.touched(key, bytes as u64));
        }
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| meta.blocks() * 512) + self.other_bytes
    }

    /// Closes the database and removes its files. What cannot be removed now is removed by the next open.
    pub(super) fn discard(self) {
        let path = self.path.clone();
        drop(self);
        cut_down(&path.join("db"));
        remove_quietly(&path);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Dropping makes sled write what it still has, and wait for it: first see that it answers at all.
        let _ = self.drain();
        let Some(handle) = self.handle.take() else { return };
        if handle.stalled.get().is_some() {
            std::mem::forget(handle);
        } else {
            let _ = guarded(&self.path, "close", move || {
                drop(handle);
                Ok(())
            });
        }
    }
}

/// Makes sled evict what it would keep; see the module head.
///
/// Each part of sled's cache looks for pages to evict when 64 accesses have queued up in it. So whenever a share of the
/// window has been touched, one page of a tree of our own is read that often, and the next time the next page: after a whole
/// window every part has been looked through, and holds that tiny page, of which it keeps one, instead of a large one.
struct Trim {
    tree: Tree,
    /// Estimated bytes of pages touched so far.
    touched: AtomicU64,
    /// The key that is next.
    next: AtomicUsize,
    /// Hashes of keys touched in this window, by their low bits: reading a key again touches nothing new. A key that was
    /// pushed out by another counts twice, which costs time and not memory.
    recent: Vec<AtomicU64>,
}

impl Trim {
    fn new(tree: Tree) -> Trim {
        let recent = (0..RECENT_KEYS).map(|_| AtomicU64::new(0)).collect();
        Trim { tree, touched: AtomicU64::new(0), next: AtomicUsize::new(0), recent }
    }

    fn key(n: usize) -> [u8; 4] {
        (n as u32).to_be_bytes()
    }

    /// Fills the tree, in a database that is otherwise empty: its pages then have consecutive numbers.
    fn fill(&self) -> ::sled::Result<()> {
        (0..TRIM_KEYS).try_for_each(|n| self.tree.insert(Self::key(n), IVec::default()).map(drop))
    }

    /// Counts bytes at and behind a key as touched, and does the trimming that has become due. Calls from several threads
    /// share the work.
    fn touched(&self, key: &[u8], bytes: u64) -> ::sled::Result<()> {
        const STEPS: usize = TRIM_KEYS / TRIM_STRIDE;
        const SHARE: u64 = CACHE_WINDOW_BYTES / STEPS as u64;
        let window = self.touched.load(Ordering::Relaxed) / CACHE_WINDOW_BYTES;
        let hash = crc32c::crc32c(key);
        let mark = u64::from(hash) << 32 | (window + 1) & u64::from(u32::MAX);
        if let Some(slot) = self.recent.get(hash as usize % RECENT_KEYS)
            && !key.is_empty()
            && slot.swap(mark, Ordering::Relaxed) == mark
        {
            return Ok(());
        }
        let before = self.touched.fetch_add(bytes, Ordering::Relaxed);
        let due = (before + bytes) / SHARE - before / SHARE;
        (0..due.min(STEPS as u64)).try_for_each(|_| {
            let key = Self::key(self.next.fetch_add(TRIM_STRIDE, Ordering::Relaxed) % TRIM_KEYS);
            (0..TRIM_TOUCHES).try_for_each(|_| self.tree.get(key).map(drop))
        })
    }
}

/// Keeps a copy of a generation whose log is not certainly as sled has written it.
fn keep_if_odd(path: &Path) -> Result<Option<Kept>> {
    let db = path.join("db");
    let len = match fs::metadata(&db) {
        Ok(meta) => meta.len(),
        // Opening says what is missing.
        Err(_) => return Ok(None),
    };
    let Findings { odd, open_end } = inspect(&db, SEGMENT_BYTES)?;
    if let Some((offset, what)) = odd {
        // So does a power cut in the middle of a write, which is no damage.
        tracing::warn!(path = %db.display(), offset, what, "the state's log is not as it was written; a copy is kept until the state is found whole");
    } else if !open_end || len > COPY_BYTES {
        return Ok(None);
    }
    match Kept::make(path) {
        Err(error) if error.is_disk_full() && odd.is_none() => {
            tracing::warn!(path = %db.display(), "no space for a copy of the state's log, which is opened without one");
            Ok(None)
        }
        made => made.map(Some),
    }
}

/// Removes what sled has left of a summary of its pages ("snapshot") that it did not get to finish: it would take it for a damaged one. The
/// one before it, or the log alone, says the same.
fn remove_unfinished(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(".generating") {
            // What cannot be removed is named by sled's refusal.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Allocates as much as there is of [`KEPT_BACK_BYTES`] behind the end of the file, before somebody else takes it.
fn keep_back(file: &File) {
    let len = file.metadata().map_or(0, |meta| meta.len());
    let fits = |bytes: &u64| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, len, *bytes).is_ok();
    let _ = (1..=KEPT_BACK_BYTES / SEGMENT_BYTES as u64).rev().map(|segments| segments * SEGMENT_BYTES as u64).find(fits);
}

/// Runs a call into sled and turns its errors, and a panic, into ours.
///
/// `AssertUnwindSafe` holds because nothing of ours is left half changed: what the closures capture is either handed over, or
/// thrown away when an error comes back. sled's own state may be half changed; after a failed change the handle is not
/// used again, and a failed read changes nothing. sled's locks (parking_lot) are released by unwinding and know no poison.
fn guarded<T>(path: &Path, what: &'static str, call: impl FnOnce() -> ::sled::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| translate(path, what, error)),
        Err(panic) => Err(panicked(path, &*panic)),
    }
}

fn panicked(path: &Path, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    // Some of sled's messages print a whole page.
    let text: String = text.unwrap_or("no message").chars().take(300).collect();
    Error::Corrupt { path: path.to_owned(), offset: None, what: format!("sled panicked: {text}") }
}

fn translate(path: &Path, what: &'static str, error: ::sled::Error) -> Error {
    use io::ErrorKind::{InvalidData, NotFound, Other, UnexpectedEof};
    match error {
        // A part that is not there, ends too early, or that sled (the kernel never says Other) does not like: the disk works,
        // the file is not what it was.
        ::sled::Error::Io(e) if matches!(e.kind(), UnexpectedEof | InvalidData | NotFound | Other) && !is_lock_held(&e) => {
            Error::Corrupt { path: path.to_owned(), offset: None, what: format!("sled: {e}") }
        }
        ::sled::Error::Io(e) => Error::io(what, path, e),
        ::sled::Error::Corruption { .. } => Error::Corrupt { path: path.to_owned(), offset: None, what: format!("sled: {error}") },
        other => Error::Failed(format!("{what} {}: sled: {other}", path.display())),
    }
}

/// sled has no kind for it: the text is all there is to tell a held lock by.
fn is_lock_held(error: &io::Error) -> bool {
    error.to_string().starts_with("could not acquire lock")
}

/// The changes in sled's form.
pub(super) fn sled_batch<'a>(
    puts: impl IntoIterator<Item = &'a (Vec<u8>, Bytes)>,
    deletes: impl IntoIterator<Item = &'a Vec<u8>>,
) -> ::sled::Batch {
    let mut out = ::sled::Batch::default();
    puts.into_iter().for_each(|(key, value)| out.insert(key.as_slice(), value.as_ref()));
    deletes.into_iter().for_each(|key| out.remove(key.as_slice()));
    out
}

/// The key of a placeholder behind `key`'s own.
fn filler(key: &[u8], n: u8) -> Vec<u8> {
    [key, &[n]].concat()
}

/// The first key behind `key`.
pub(super) fn after(key: &[u8]) -> Vec<u8> {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next
}

/// The directory's name.
pub(super) fn generation_name(number: u64) -> String {
    format!("gen-{number:07}")
}

/// Makes a directory that only its owner can look into.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| Error::io("create the directory", path, e))
}

fn sync_file(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Error::io("sync", path, e))
}

fn remove_quietly(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "could not remove a generation; the next start tries again");
    }
}

/// Cuts a file down piece by piece. To free hundreds of megabytes at once keeps the file system's journal, and whoever syncs meanwhile,
/// waiting. What fails here is only less smooth: removing the file frees the rest.
fn cut_down(path: &Path) {
    let Ok(file) = File::options().write(true).open(path) else { return };
    let mut len = file.metadata().map_or(0, |meta| meta.len());
    while len > CUT_BYTES {
        len -= CUT_BYTES;
        if file.set_len(len).is_err() {
            return;
        }
        thread::sleep(CUT_PAUSE);
    }
}

/// Bytes of the files directly in a directory.
fn files_below(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).filter(|meta| meta.is_file()).map(|meta| meta.len()).sum()
}
