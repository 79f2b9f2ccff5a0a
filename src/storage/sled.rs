//! The backend on a real disk: generations of sled databases, of which one counts, and the rewrite from one to the next.
//!
//! ```text
//! state/                   0700, handed in by the caller, who holds the data directory's lock
//!   CURRENT                "quorate-state v1 gen-0000002 crc32c=...": which generation counts
//!   gen-0000002/           0700; db, conf, snap.*, blobs/ are sled's own
//!   gen-0000003/           only while a rewrite, or a successor, is under way; removed by the next start when the process died in it
//!   gen-0000002.keep/      as it was before a start that was not sure of it, until it is; see `keep.rs`
//! ```
//!
//! What it takes to trust one sled database is in `generation.rs`. This file adds what sled cannot do at all: shrink.
//!
//! # The rewrite
//! Everything live is copied to the next generation, in key order and bounded steps. A batch that is applied meanwhile also
//! changes the copy where it has passed already (the keys below the cursor); keys from the cursor on are copied later, as
//! they are then. So at any time the copy holds exactly what is live below the cursor, and nothing else:
//!
//! ```text
//! live a=1 b=1 c=1 d=1   copied: a b | cursor: c      batch: a=2, -b, c=2, -d
//! live a=2 c=2           copy a=2                      then c is copied as 2; d is not there to be copied
//! ```
//!
//! At the end the copy is synced, `CURRENT` is replaced (written beside, synced, renamed, directory synced), readers are
//! moved over, and the old directory is removed. An error in the copy gives the rewrite up and removes it; what is live is
//! never touched by a rewrite, whatever happens to it. A damaged page that is met by the copy gives it up too.
//!
//! # The successor
//! A member that is sent another one's whole state builds it in a store of its own, [beside](Backend::successor) the one in use and in
//! the same directory. It counts from the moment at which `CURRENT` names it ([`take_over`](Backend::take_over)): before that a
//! crash leaves the old state, after it the new one. Whichever of two stores does not count removes its files when it is closed or
//! dropped, so that readers of the old one may come to their end. Generations are numbered for the directory, not for the store, and
//! only the store that counts may write `CURRENT`: so a rewrite of the old one and the making of its successor do not meet.
//!
//! # Locks
//! Whoever changes the content holds the lock on changes, from a batch's first look to its sync, or for one step of a rewrite; within it
//! comes a `RwLock`, and within that at most the lock on who counts. Reading: get, one chunk of a scan (never a visitor), flush, fsync,
//! copying one chunk. Writing: handing a batch to sled, changing the generation. So readers never see a part of a batch, not even of one
//! that fails in the middle, and wait for a millisecond or some. A reopen and the removal of the old files happen outside the `RwLock`.
//! Gentle work rests while it holds the first, and the second for reading: as nobody but its holder takes the second for writing, reads go on.
//!
//! # Measured
//! On two cores and ext4, batches of 64 values of 8 KiB: 12,900 values/s (apply 4 ms with its flush, fdatasync 0.3 ms; a
//! third of that on a busy machine); segments of 512 KiB gave 7,600 and blob files, of 8 MiB 5,900, and sled's `mode` does
//! nothing, as 0.34.7 never reads it. A get from a page that is not in memory takes 27, 44 or 75 us for values of 4, 8 or
//! 16 KiB, from one that is 3 us. 256 MB of values took 446 MB on disk, 500 after each was replaced, still 500 with a quarter
//! left, and 136 after a rewrite of 2 s. Memory stayed at 70 to 100 MB; without the trimming it was the size of the data.
//!
//! # Caveats
//! - A `CURRENT` that names generation 0 says that the first one was not finished. No `CURRENT` beside a generation is damage.
//! - A rewrite is worth its while from about 2.5 times the live bytes: freshly rewritten, a database has 1.8 times, and 12 MB
//!   more of reserve. Its own growth under steady replacement levels off at 3 times.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::dir::sync_dir;
use super::generation::{Chunk, Generation, generation_name, make_dir, sled_batch};
use super::keep::Kept;
use super::{Backend, Batch, Visit};
use crate::error::{Error, Result};
use crate::lock::{lock, read, write};
use crate::pace::breathe;

/// Entries and bytes that a scan holds at a time between two calls of its visitor, and that a rewrite copies in one batch.
const CHUNK_ENTRIES: usize = 64;
const CHUNK_BYTES: usize = 512 * 1024;

/// How many entries ahead, and in how many bytes, a rewrite [holds places](Generation::hold_places) in the copy: eight batches of it.
const AHEAD_ENTRIES: usize = 4 * CHUNK_ENTRIES;
const AHEAD_BYTES: usize = 2 * 1024 * 1024;

const CURRENT: &str = "CURRENT";

/// The backend on sled. See the module head.
///
/// ```text
/// let backend = Sled::open(&data_dir.join("state"))?;
/// backend.apply(&batch)?;
/// backend.sync()?;
/// ```
pub struct Sled {
    dir: PathBuf,
    fsync: bool,
    /// The number of its first generation: tells it from the other stores of the directory.
    id: u64,
    place: Arc<Place>,
    /// Held by whoever changes what is stored, copies it, or closes it: a batch and a step of a rewrite follow each other.
    changing: Mutex<()>,
    /// Read: get, scan, flush and fsync, and all of a rewrite but its end. Written: changes of content and of generation, for as long as
    /// readers must wait.
    state: RwLock<State>,
    /// The files as they were, until what stands in them is [accepted](Backend::accept).
    kept: Mutex<Option<Kept>>,
}

/// What the stores of one directory share.
struct Place {
    /// The next number for a generation.
    next: AtomicU64,
    /// The store that `CURRENT` names a generation of; none when a failed write of `CURRENT` has left that open: then nothing is written
    /// or removed any more. Held while `CURRENT` is written.
    counts: Mutex<Option<u64>>,
}

impl Place {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

struct State {
    /// `Err` says why there is none: while, or because, a `reopen` did not bring it back.
    live: Result<Generation>,
    rewrite: Option<Rewrite>,
    /// Why the last rewrite was given up, until `rewrite_step` has said so.
    given_up: Option<Error>,
}

/// A copy under way: `to` holds every live key below `cursor` and none from there on.
struct Rewrite {
    to: Generation,
    cursor: Vec<u8>,
    /// Below it, places are held in the copy.
    held: Vec<u8>,
}

impl Sled {
    /// Opens the store in `dir`, or makes an empty one there. The caller holds a lock on the data directory: what an
    /// earlier process left half done is removed.
    ///
    /// # Errors
    /// `Corrupt` names the file when `CURRENT`, or the generation it names, is missing or damaged; it is left as it was. `Format` for a
    /// `CURRENT` of a newer release. `Locked` when another handle is open.
    pub fn open(dir: &Path) -> Result<Sled> {
        Self::open_with(dir, true)
    }

    /// Opens the store as [`open`](Self::open) does. Without `fsync` a batch that was synced outlives the process, but not
    /// a power cut; the small files that are written once are synced all the same.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(dir: &Path, fsync: bool) -> Result<Sled> {
        make_dir(dir)?;
        let number = match read_current(dir)? {
            Some(number) => number,
            None => {
                if let Some(found) = generations(dir)?.first() {
                    let what = format!("it is missing, but {} is there", found.1.display());
                    return Err(Error::Corrupt { path: dir.join(CURRENT), offset: None, what });
                }
                // Generation 0 is the empty one, without a directory: from here on a missing CURRENT means damage.
                write_current(dir, 0)?;
                0
            }
        };
        for (found, path) in generations(dir)? {
            if found != number {
                fs::remove_dir_all(&path).map_err(|e| Error::io("remove the leftover generation", &path, e))?;
            }
        }
        let (live, kept) = if number == 0 {
            let live = Generation::create(dir, 1, fsync)?;
            write_current(dir, 1)?;
            (live, None)
        } else {
            Generation::open_kept(dir, number, fsync)?
        };
        let place = Place { next: AtomicU64::new(live.number + 1), counts: Mutex::new(Some(live.number)) };
        Ok(Sled::of(dir, fsync, live, kept, Arc::new(place)))
    }

    fn of(dir: &Path, fsync: bool, live: Generation, kept: Option<Kept>, place: Arc<Place>) -> Sled {
        let (dir, id) = (dir.to_owned(), live.number);
        let state = RwLock::new(State { live: Ok(live), rewrite: None, given_up: None });
        Sled { dir, fsync, id, place, changing: Mutex::default(), state, kept: Mutex::new(kept) }
    }

    /// Gives the live generation up, and removes it if it does not count.
    fn let_go(&self) {
        let old = std::mem::replace(&mut self.write().live, Err(Error::Stopped));
        let counts = lock(&self.place.counts).is_none_or(|counts| counts == self.id);
        // Outside of the lock: sled writes out what it still has.
        match old {
            Ok(old) if !counts => old.discard(),
            old => drop(old),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        read(&self.state)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        write(&self.state)
    }

    /// One chunk of a scan.
    fn chunk(&self, start: &[u8], end: &[u8]) -> Result<Chunk> {
        self.read().live()?.chunk(start, end, CHUNK_ENTRIES, CHUNK_BYTES)
    }

    /// Copies one chunk. Returns its bytes, or `None` when there was nothing left to copy.
    fn copy_chunk(&self, max_bytes: usize) -> Result<Option<usize>> {
        self.hold_places_ahead()?;
        let (copied, cursor) = {
            let state = self.read();
            let State { live: Ok(live), rewrite: Some(rewrite), .. } = &*state else { return Ok(None) };
            // After a failed change the half of a batch may be in there.
            live.check()?;
            let chunk = live.chunk(&rewrite.cursor, &[], CHUNK_ENTRIES, max_bytes.min(CHUNK_BYTES))?;
            let Some(cursor) = chunk.end() else { return Ok(None) };
            if !chunk.entries.is_empty() {
                let mut batch = ::sled::Batch::default();
                chunk.entries.iter().for_each(|(key, value)| batch.insert(key, value));
                rewrite.to.reserve(chunk.bytes)?;
                rewrite.to.change(batch, chunk.bytes)?;
            }
            (chunk.bytes, cursor)
        };
        if let Some(rewrite) = &mut self.write().rewrite {
            rewrite.cursor = cursor;
        }
        Ok(Some(copied))
    }

    /// Has the copy make its pages for what comes next, beside readers.
    fn hold_places_ahead(&self) -> Result<()> {
        let held = {
            let state = self.read();
            let State { live: Ok(live), rewrite: Some(rewrite), .. } = &*state else { return Ok(()) };
            if rewrite.cursor < rewrite.held {
                return Ok(());
            }
            live.check()?;
            let chunk = live.chunk(&rewrite.cursor, &[], AHEAD_ENTRIES, AHEAD_BYTES)?;
            let Some(held) = chunk.end() else { return Ok(()) };
            rewrite.to.reserve(0)?;
            rewrite.to.hold_places(chunk.entries.iter().map(|(key, value)| (key.as_ref(), value.as_ref())))?;
            held
        };
        if let Some(rewrite) = &mut self.write().rewrite {
            rewrite.held = held;
        }
        Ok(())
    }

    /// Puts the finished copy in the place of the live generation.
    fn switch(&self) -> Result<()> {
        let in_doubt = {
            let state = self.read();
            let State { live: Ok(live), rewrite: Some(rewrite), .. } = &*state else { return Ok(()) };
            live.check()?;
            rewrite.to.sync()?;
            let mut counts = lock(&self.place.counts);
            if *counts != Some(self.id) {
                return Err(Error::Stopped);
            }
            let written = write_current(&self.dir, rewrite.to.number);
            if written.is_err() && read_current(&self.dir).is_ok_and(|number| number == Some(live.number)) {
                return written;
            }
            // It may be replaced on disk, or not: what is applied from here on could stand in the wrong one. Both stay.
            let in_doubt = written.map_err(|error| live.fail(error)).err();
            if in_doubt.is_some() {
                *counts = None;
            }
            in_doubt
        };
        let mut state = self.write();
        let Some(rewrite) = state.rewrite.take() else { return Ok(()) };
        if let Some(error) = in_doubt {
            // The copy is closed outside of the lock.
            drop(state);
            return Err(error);
        }
        let old = std::mem::replace(&mut state.live, Ok(rewrite.to));
        drop(state);
        if let Ok(old) = old {
            old.discard();
        }
        Ok(())
    }

    /// Removes what was copied so far. The live generation does not notice.
    fn give_up_rewrite(&self, why: Option<Error>) {
        let mut state = self.write();
        let rewrite = state.rewrite.take();
        if rewrite.is_some() {
            state.given_up = why;
        }
        drop(state);
        if let Some(rewrite) = rewrite {
            rewrite.to.discard();
        }
    }
}

impl Backend for Sled {
    fn path(&self) -> PathBuf {
        self.read().live().map_or_else(|_| self.dir.clone(), |live| live.path.join("db"))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        self.read().live()?.get(key)
    }

    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut start = start.to_vec();
        loop {
            let Chunk { entries, next, .. } = self.chunk(&start, end)?;
            for (key, value) in &entries {
                if !visit(key, value)? {
                    return Ok(());
                }
            }
            let Some(next) = next else { return Ok(()) };
            start = next;
        }
    }

    fn apply(&self, batch: &Batch) -> Result<()> {
        #[cfg(debug_assertions)]
        batch.check();
        if batch.is_empty() {
            return Ok(());
        }
        let bytes = batch.bytes();
        let _changing = lock(&self.changing);
        {
            let state = self.read();
            let live = state.live()?;
            live.check_sizes(batch)?;
            // What was written before this batch has to be on disk before sled recycles what it replaced.
            live.settle()?;
            live.reserve(bytes)?;
            live.hold_places(batch.puts.iter().map(|(key, value)| (key.as_slice(), value.as_ref())))?;
        }
        let changes = sled_batch(&batch.puts, &batch.deletes);
        self.write().live()?.change(changes, bytes)?;
        // At once, for a read that meets a page to be merged writes, too, and may recycle what this batch has replaced.
        self.read().live()?.sync()?;
        breathe();
        let failed_copy = self.read().rewrite.as_ref().and_then(|rewrite| rewrite.follow(batch, bytes).err());
        if failed_copy.is_some() {
            self.give_up_rewrite(failed_copy);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.read().live()?.sync()
    }

    fn disk_bytes(&self) -> u64 {
        let state = self.read();
        let live = state.live.as_ref().map_or(0, Generation::disk_bytes);
        live + state.rewrite.as_ref().map_or(0, |rewrite| rewrite.to.disk_bytes())
    }

    fn reopen(&self) -> Result<()> {
        let _changing = lock(&self.changing);
        self.give_up_rewrite(None);
        let mut state = self.write();
        let why = match state.live().map(drop) {
            // Nothing reached sled: the handle is as good as a new one.
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let old = std::mem::replace(&mut state.live, Err(why));
        drop(state);
        // Readers get the error, rather than wait, for as long as this takes.
        drop(old);
        let number = read_current(&self.dir)?.unwrap_or(0);
        if *lock(&self.place.counts) != Some(self.id) {
            // Nothing is written any more to a store whose place was taken, and a successor that fails is made anew.
            return Err(Error::Stopped);
        }
        let opened = Generation::open(&self.dir, number, self.fsync)?;
        self.write().live = Ok(opened);
        Ok(())
    }

    fn accept(&self) -> Result<()> {
        lock(&self.kept).take().map_or(Ok(()), Kept::release)
    }

    fn close(&self) {
        let _changing = lock(&self.changing);
        self.give_up_rewrite(None);
        self.let_go();
        if let Some(Err(error)) = lock(&self.kept).take().map(Kept::restore) {
            tracing::warn!(%error, "putting the state back as it was; the next start tries again");
        }
    }

    fn successor(&self) -> Result<Arc<dyn Backend>> {
        let live = Generation::create(&self.dir, self.place.number(), self.fsync)?;
        Ok(Arc::new(Sled::of(&self.dir, self.fsync, live, None, self.place.clone())))
    }

    fn take_over(&self) -> Result<()> {
        let number = {
            let state = self.read();
            let live = state.live()?;
            live.sync()?;
            live.number
        };
        let mut counts = lock(&self.place.counts);
        if *counts == Some(self.id) {
            return Ok(());
        }
        let before = read_current(&self.dir)?;
        if let Err(error) = write_current(&self.dir, number) {
            if !read_current(&self.dir).is_ok_and(|now| now == before) {
                *counts = None;
            }
            return Err(error);
        }
        *counts = Some(self.id);
        Ok(())
    }

    fn start_rewrite(&self) -> Result<()> {
        let _changing = lock(&self.changing);
        {
            let state = self.read();
            if state.rewrite.is_some() {
                return Ok(());
            }
            state.live()?;
        }
        let number = self.place.number();
        let to = Generation::create(&self.dir, number, self.fsync)?;
        let mut state = self.write();
        if state.rewrite.is_none() {
            state.given_up = None;
            state.rewrite = Some(Rewrite { to, cursor: Vec::new(), held: Vec::new() });
        }
        Ok(())
    }

    fn rewrite_step(&self, max_bytes: usize) -> Result<bool> {
        let _changing = lock(&self.changing);
        {
            let mut state = self.write();
            if let Some(error) = state.given_up.take() {
                return Err(error);
            }
            if state.rewrite.is_none() {
                return Ok(false);
            }
        }
        let mut copied = 0;
        let result = loop {
            match self.copy_chunk(max_bytes - copied) {
                Ok(None) => break self.switch().map(|()| false),
                Ok(Some(bytes)) => copied += bytes,
                Err(error) => break Err(error),
            }
            // Not more than one chunk in flight: what sled has not written yet is in memory. And to the disk at once: the log's next sync
            // has to wait for all that the device has taken until then.
            if let Some(rewrite) = &self.read().rewrite
                && let Err(error) = rewrite.to.sync()
            {
                break Err(error);
            }
            if copied >= max_bytes {
                break Ok(true);
            }
        };
        if result.is_err() {
            self.give_up_rewrite(None);
        }
        result
    }
}

impl Drop for Sled {
    fn drop(&mut self) {
        // A copy under way is worth nothing without its end; the next open would remove it just the same.
        self.close();
    }
}

impl State {
    fn live(&self) -> Result<&Generation> {
        let live = self.live.as_ref().map_err(Clone::clone)?;
        live.check()?;
        Ok(live)
    }
}

impl Rewrite {
    /// Does to the copy what a batch does to the keys that it has already.
    fn follow(&self, batch: &Batch, bytes: usize) -> Result<()> {
        let passed = |key: &[u8]| key < self.cursor.as_slice();
        let mut puts = batch.puts.iter().filter(|(key, _)| passed(key)).peekable();
        let mut deletes = batch.deletes.iter().filter(|key| passed(key)).peekable();
        if puts.peek().is_none() && deletes.peek().is_none() {
            return Ok(());
        }
        self.to.reserve(bytes)?;
        self.to.change(sled_batch(puts, deletes), bytes)
    }
}

/// Every generation directory, by number. Anything else in the directory is not ours, and is left alone.
fn generations(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let entry = entry.map_err(|e| Error::io("list", dir, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let number = name.strip_prefix("gen-").and_then(|number| number.parse::<u64>().ok());
        if let Some(number) = number.filter(|number| generation_name(*number) == name) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn encode_current(number: u64) -> String {
    let head = format!("quorate-state v1 {}", generation_name(number));
    format!("{head} crc32c={:08x}\n", crc32c::crc32c(head.as_bytes()))
}

/// The generation that counts; `None` when there is no `CURRENT`.
fn read_current(dir: &Path) -> Result<Option<u64>> {
    let path = dir.join(CURRENT);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", &path, e)),
    };
    let corrupt = |what: &str| Error::Corrupt { path: path.clone(), offset: None, what: what.to_owned() };
    let text = std::str::from_utf8(&bytes).map_err(|_| corrupt("it is not text"))?;
    let (head, crc) = text.trim_end().rsplit_once(" crc32c=").ok_or_else(|| corrupt("it has no checksum"))?;
    if crc != format!("{:08x}", crc32c::crc32c(head.as_bytes())) {
        return Err(corrupt("the checksum does not match"));
    }
    let number = head.strip_prefix("quorate-state v1 gen-").and_then(|number| number.parse().ok());
    match number {
        Some(number) if encode_current(number) == text => Ok(Some(number)),
        _ => Err(Error::Format { path, what: format!("{head:?} was not written by this release") }),
    }
}

/// Replaces `CURRENT`: after a power cut it is the old one or the new one.
fn write_current(dir: &Path, number: u64) -> Result<()> {
    let path = dir.join(CURRENT);
    let temporary = dir.join("CURRENT.tmp");
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(encode_current(number).as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|e| Error::io("replace", &path, e))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::super::generation::{FILLERS, PLACE_BYTES, PLACES_MAX, PLACES_MIN};
    use super::super::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    type Map = BTreeMap<Vec<u8>, Bytes>;

    /// In memory where there is such a place: nothing here asks whether the disk keeps its promises.
    fn tempdir() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
    }

    fn dump(backend: &Sled) -> Result<Map> {
        let mut map = Map::new();
        backend.scan(&[], &[], &mut |key, value| {
            map.insert(key.to_vec(), Bytes::copy_from_slice(value));
            Ok(true)
        })?;
        Ok(map)
    }

    fn value(seed: u64, len: usize) -> Bytes {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(next).collect::<Vec<u8>>().into()
    }

    fn key(n: u64) -> Vec<u8> {
        n.to_be_bytes().to_vec()
    }

    fn puts(keys: impl IntoIterator<Item = u64>, seed: u64, len: usize) -> Batch {
        Batch { puts: keys.into_iter().map(|n| (key(n), value(n ^ seed << 32, len))).collect(), deletes: Vec::new() }
    }

    fn deletes(keys: impl IntoIterator<Item = u64>) -> Batch {
        Batch { puts: Vec::new(), deletes: keys.into_iter().map(key).collect() }
    }

    fn replay<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> Map {
        let mut map = Map::new();
        for batch in batches {
            batch.deletes.iter().for_each(|key| drop(map.remove(key)));
            map.extend(batch.puts.iter().cloned());
        }
        map
    }

    fn rewrite(backend: &Sled) {
        backend.start_rewrite().unwrap();
        while backend.rewrite_step(64 * 1024).unwrap() {}
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn open_error(dir: &Path) -> Error {
        Sled::open(dir).err().expect("the store must not open")
    }

    #[track_caller]
    fn assert_corrupt(error: &Error, file: &str) {
        assert!(matches!(error, Error::Corrupt { path, .. } if path.ends_with(file)), "{error}");
    }

    #[test]
    fn the_layout_is_as_described_and_private() {
        let dir = tempdir();
        let state = dir.path().join("a/state");
        let backend = Sled::open(&state).unwrap();
        assert_eq!(names(&state), ["CURRENT", "gen-0000001"]);
        assert_eq!(fs::read_to_string(state.join("CURRENT")).unwrap(), "quorate-state v1 gen-0000001 crc32c=4f83ad48\n");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&state), mode(&state.join("gen-0000001"))), (0o700, 0o700));
        assert_eq!((mode(&state.join("CURRENT")), mode(&state.join("gen-0000001/db"))), (0o600, 0o600));

        backend.apply(&puts(0..100, 1, 1000)).unwrap();
        backend.start_rewrite().unwrap();
        assert!(backend.rewrite_step(1).unwrap());
        assert_eq!(names(&state), ["CURRENT", "gen-0000001", "gen-0000002"]);
        while backend.rewrite_step(1000).unwrap() {}
        assert_eq!(names(&state), ["CURRENT", "gen-0000002"]);
        assert_eq!(dump(&backend).unwrap(), replay([&puts(0..100, 1, 1000)]));
    }

    #[test]
    fn leftovers_are_removed_and_strangers_are_not() {
        let dir = tempdir();
        drop(Sled::open(dir.path()).unwrap());
        for name in ["gen-0000002", "gen-0000007", "gen-8", "lost+found"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        drop(Sled::open(dir.path()).unwrap());
        assert_eq!(names(dir.path()), ["CURRENT", "gen-0000001", "gen-8", "lost+found"]);
    }

    /// What a crash at this moment would leave.
    fn crashed(dir: &Path) -> tempfile::TempDir {
        let to = tempdir();
        let mut waiting = vec![(dir.to_owned(), to.path().to_owned())];
        while let Some((from, to)) = waiting.pop() {
            fs::create_dir_all(&to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                let to = to.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    waiting.push((entry.path(), to));
                } else {
                    fs::copy(entry.path(), to).unwrap();
                }
            }
        }
        to
    }

    /// Whatever a crash leaves of a successor in the making, it is the old state until the moment at which it is the new one.
    #[test]
    fn a_successor_counts_from_its_take_over_on() {
        let dir = tempdir();
        let old = Sled::open(dir.path()).unwrap();
        old.apply(&puts(0..100, 1, 1000)).unwrap();
        let (before, after) = (replay([&puts(0..100, 1, 1000)]), replay([&puts(50..300, 2, 1000)]));
        let holds = |expected: &Map| {
            let left = crashed(dir.path());
            let opened = Sled::open(left.path()).unwrap();
            assert_eq!(dump(&opened).unwrap(), *expected);
            assert_eq!(names(left.path()).len(), 2, "{:?}", names(left.path()));
        };
        let new = old.successor().unwrap();
        holds(&before);
        new.apply(&puts(50..200, 2, 1000)).unwrap();
        holds(&before);
        // The old one goes on, and may even be rewritten.
        rewrite(&old);
        holds(&before);
        new.apply(&puts(200..300, 2, 1000)).unwrap();
        new.sync().unwrap();
        holds(&before);
        new.take_over().unwrap();
        holds(&after);
        // A reader of the old one comes to its end; a rewrite of it comes to nothing.
        assert_eq!(dump(&old).unwrap(), before);
        old.start_rewrite().unwrap();
        let failed = std::iter::from_fn(|| Some(old.rewrite_step(1 << 20))).find(|step| !matches!(step, Ok(true))).unwrap();
        assert!(matches!(failed, Err(Error::Stopped)), "{failed:?}");
        holds(&after);
        drop(old);
        holds(&after);
        assert_eq!(names(dir.path()), ["CURRENT", "gen-0000002"]);
        new.close();
        assert_eq!(dump(&Sled::open(dir.path()).unwrap()).unwrap(), after);
    }

    #[test]
    fn a_successor_that_is_given_up_leaves_nothing() {
        let dir = tempdir();
        let old = Sled::open(dir.path()).unwrap();
        old.apply(&puts(0..10, 1, 100)).unwrap();
        for _ in 0..2 {
            let new = old.successor().unwrap();
            new.apply(&puts(0..10, 2, 100)).unwrap();
            drop(new);
            assert_eq!(names(dir.path()), ["CURRENT", "gen-0000001"]);
        }
        rewrite(&old);
        drop(old);
        assert_eq!(dump(&Sled::open(dir.path()).unwrap()).unwrap(), replay([&puts(0..10, 1, 100)]));
    }

    /// A process that dies while it makes the very first generation leaves a `CURRENT` that names none.
    #[test]
    fn a_founding_cut_short_starts_again() {
        let dir = tempdir();
        write_current(dir.path(), 0).unwrap();
        fs::create_dir(dir.path().join("gen-0000001")).unwrap();
        fs::write(dir.path().join("gen-0000001/db"), b"half").unwrap();
        let backend = Sled::open(dir.path()).unwrap();
        backend.apply(&puts(0..1, 1, 1)).unwrap();
        assert_eq!(names(dir.path()), ["CURRENT", "gen-0000001"]);
    }

    #[test]
    fn a_damaged_pointer_is_refused_by_name() {
        let dir = tempdir();
        drop(Sled::open(dir.path()).unwrap());
        let current = dir.path().join(CURRENT);
        let good = fs::read(&current).unwrap();
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 0x01;
            fs::write(&current, bad).unwrap();
            assert_corrupt(&open_error(dir.path()), CURRENT);
        }
        for cut in 0..good.len() - 1 {
            fs::write(&current, &good[..cut]).unwrap();
            assert_corrupt(&open_error(dir.path()), CURRENT);
        }
        let head = "quorate-state v2 gen-0000001";
        fs::write(&current, format!("{head} crc32c={:08x}\n", crc32c::crc32c(head.as_bytes()))).unwrap();
        assert!(matches!(open_error(dir.path()), Error::Format { .. }));
        fs::remove_file(&current).unwrap();
        assert_corrupt(&open_error(dir.path()), CURRENT);
        fs::write(&current, good).unwrap();
        Sled::open(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_database_is_not_begun_anew() {
        let dir = tempdir();
        drop(Sled::open(dir.path()).unwrap());
        fs::remove_file(dir.path().join("gen-0000001/db")).unwrap();
        assert_corrupt(&open_error(dir.path()), "gen-0000001/db");
        fs::remove_dir_all(dir.path().join("gen-0000001")).unwrap();
        assert_corrupt(&open_error(dir.path()), "gen-0000001/db");
    }

    #[test]
    fn an_open_store_is_locked_and_a_dropped_one_is_not() {
        let dir = tempdir();
        let first = Sled::open(dir.path()).unwrap();
        assert!(matches!(open_error(dir.path()), Error::Locked { .. }));
        drop(first);
        for _ in 0..20 {
            drop(Sled::open(dir.path()).unwrap());
        }
    }

    /// Values beyond the limit would go to sled's blob files.
    #[test]
    fn the_largest_pages_stay_in_the_log() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        for round in 0..3 {
            for start in (0..200).step_by(40) {
                backend.apply(&puts((start..start + 40).map(|n| n * 7919 % 200), round, VALUE_BYTES_MAX)).unwrap();
            }
            backend.apply(&deletes((0..200).filter(|n| n % 3 != round % 3))).unwrap();
        }
        assert_eq!(names(&dir.path().join("gen-0000001/blobs")), [""; 0]);
        let mut large = Batch::default();
        large.put(vec![0; KEY_BYTES_MAX], value(1, VALUE_BYTES_MAX));
        backend.apply(&large).unwrap();
        if !cfg!(debug_assertions) {
            large.put(vec![1], value(1, VALUE_BYTES_MAX + 1));
            assert!(matches!(backend.apply(&large), Err(Error::Failed(_))));
            backend.apply(&puts(0..1, 1, 1)).unwrap();
        }
    }

    /// Also after a crash between them and their values; and a rewrite leaves them behind.
    #[test]
    fn places_that_are_held_are_not_seen() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        let (first, second) = (puts((0..20).map(|n| 2 * n), 1, 4096), puts((0..60).map(|n| 20 + n), 2, 4096));
        let empty = |backend: &Sled| {
            let state = backend.read();
            let tree = &state.live().unwrap().handle().unwrap().tree;
            tree.iter().values().filter(|value| value.as_ref().unwrap().is_empty()).count()
        };
        let hold = |backend: &Sled, batch: &Batch| {
            backend.read().live().unwrap().hold_places(batch.puts.iter().map(|(key, value)| (key.as_slice(), value.as_ref()))).unwrap();
            empty(backend)
        };
        backend.apply(&first).unwrap();
        let fillers = usize::from(FILLERS);
        assert_eq!(empty(&backend), 20 * fillers);
        // Behind the last only: what is there stays as it is, and nothing is put between.
        let held = 20 * fillers + 41 * (1 + fillers);
        assert_eq!(hold(&backend, &second), held);
        assert_eq!(dump(&backend).unwrap(), replay([&first]));
        assert!(backend.get(&key(39)).unwrap().is_none() && backend.get(&key(38)).unwrap().is_some());
        let mut seen = Vec::new();
        let mut see = |key: &[u8], _: &[u8]| {
            seen.push(key.to_vec());
            Ok(true)
        };
        backend.scan(&key(37), &key(60), &mut see).unwrap();
        assert_eq!(seen, [key(38)]);

        let copy = crashed(dir.path());
        drop(backend);
        for (dir, rewritten) in [(dir.path(), false), (copy.path(), true)] {
            let backend = Sled::open(dir).unwrap();
            assert_eq!((empty(&backend), dump(&backend).unwrap()), (held, replay([&first])));
            if rewritten {
                rewrite(&backend);
                assert_eq!((empty(&backend), dump(&backend).unwrap()), (20 * fillers, replay([&first])));
            }
            backend.apply(&second).unwrap();
            assert_eq!(dump(&backend).unwrap(), replay([&first, &second]));
            // Few or small values are not worth it.
            let before = empty(&backend);
            assert_eq!(hold(&backend, &puts(100..100 + PLACES_MIN as u64 - 1, 1, 4096)), before);
            assert_eq!(hold(&backend, &puts(100..200, 1, PLACE_BYTES - 1)), before);
            assert_eq!(hold(&backend, &puts(100..2000, 1, PLACE_BYTES)), before + PLACES_MAX * (1 + fillers));
        }
        // None has no bytes.
        let backend = Sled::open(dir.path()).unwrap();
        if !cfg!(debug_assertions) {
            assert!(matches!(backend.apply(&puts(0..1, 1, 0)), Err(Error::Failed(_))));
        }
    }

    /// What is stored in the order of its keys is written little more than once, and so is what a rewrite copies.
    #[test]
    fn values_in_order_are_written_about_once() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        let size = |number| fs::metadata(dir.path().join(format!("gen-000000{number}/db"))).unwrap().len();
        let before = size(1);
        for n in 0..16 {
            backend.apply(&puts(n * 128..(n + 1) * 128, 1, VALUE_BYTES_MAX)).unwrap();
        }
        let bytes = 16 * 128 * VALUE_BYTES_MAX as u64;
        let written = size(1) - before;
        backend.start_rewrite().unwrap();
        while backend.rewrite_step(256 * 1024).unwrap() {}
        let copied = size(2) - before;
        assert!(written < bytes * 12 / 10 && copied < bytes * 12 / 10, "{written} and {copied} bytes for {bytes}");
        // Nor does their deletion write what stays.
        for n in 0..16 {
            backend.apply(&deletes((n * 128..(n + 1) * 128).filter(|n| n % 4 > 0))).unwrap();
        }
        let deleted = size(2) - before - copied;
        assert!(deleted < bytes / 10, "{deleted} bytes to delete of {bytes}");
    }

    /// Deleted values leave their fillers: a chunk ends among them, and so does a step of a rewrite, which comes to the other side all the same.
    #[test]
    fn a_long_stretch_of_deletions_is_crossed_in_steps() {
        const STEP: usize = 32 * 1024;
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        let mut batches: Vec<Batch> = (0..4).map(|n| puts(n * 200..(n + 1) * 200, 1, PLACE_BYTES)).collect();
        batches.push(deletes(1..799));
        batches.iter().for_each(|batch| backend.apply(batch).unwrap());

        let (mut start, mut found, mut chunks) = (Vec::new(), Vec::new(), 0);
        loop {
            let chunk = backend.read().live().unwrap().chunk(&start, &[], CHUNK_ENTRIES, STEP).unwrap();
            assert!(chunk.bytes < STEP + PLACE_BYTES + 8, "{} bytes", chunk.bytes);
            found.extend(chunk.entries.into_iter().map(|(key, _)| key.to_vec()));
            chunks += 1;
            let Some(next) = chunk.next else { break };
            assert!(next > start);
            start = next;
        }
        assert!(found == [key(0), key(799)] && chunks > 5, "{found:?} in {chunks}");

        backend.start_rewrite().unwrap();
        assert!(backend.rewrite_step(STEP).unwrap() && backend.rewrite_step(STEP).unwrap());
        // On either side of the cursor, and where both stores have only fillers.
        batches.push(puts([1, 2, 3, 500, 797, 1000], 2, PLACE_BYTES));
        batches.push(deletes([0, 2]));
        batches.iter().skip(5).for_each(|batch| backend.apply(batch).unwrap());
        let mut steps = 0;
        while backend.rewrite_step(STEP).unwrap() {
            steps += 1;
        }
        assert!(steps > 2, "{steps}");
        assert_eq!(names(dir.path()), ["CURRENT", "gen-0000002"]);
        assert_eq!(dump(&backend).unwrap(), replay(&batches));
    }

    #[test]
    fn a_scan_sees_every_key_that_stays_while_others_come_and_go() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        let steady: Vec<u64> = (0..300).map(|n| n * 2).collect();
        backend.apply(&puts(steady.iter().copied(), 0, 500)).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = || {
                while !done.load(Ordering::Relaxed) {
                    let found = dump(&backend).unwrap();
                    let there: Vec<u64> = steady.iter().copied().filter(|n| found.get(&key(*n)) == Some(&value(*n, 500))).collect();
                    assert_eq!(there, steady);
                    for n in steady.iter().step_by(17) {
                        assert_eq!(backend.get(&key(*n)).unwrap(), Some(value(*n, 500)));
                    }
                }
            };
            let readers = [scope.spawn(reader), scope.spawn(reader)];
            for round in 0..3 {
                backend.start_rewrite().unwrap();
                for n in 0..20 {
                    backend.apply(&puts((0..30).map(|i| (i * 20 + n) * 2 + 1), round, 300)).unwrap();
                    backend.apply(&deletes((0..30).map(|i| (i * 20 + n) * 2 + 1))).unwrap();
                    backend.rewrite_step(20_000).unwrap();
                }
                while backend.rewrite_step(20_000).unwrap() {}
            }
            done.store(true, Ordering::Relaxed);
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
        assert_eq!(names(dir.path()), ["CURRENT", "gen-0000004"]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Apply(Vec<(u8, Option<u16>)>),
        Sync,
        Restart,
        Begin,
        Copy(usize),
        Scan(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let change = (0u8..120, proptest::option::weighted(0.8, 1u16..6000));
        prop_oneof![
            8 => proptest::collection::vec(change, 0..40).prop_map(Step::Apply),
            1 => Just(Step::Sync),
            1 => Just(Step::Restart),
            2 => Just(Step::Begin),
            5 => (0usize..60_000).prop_map(Step::Copy),
            2 => (0u8..128, 0u8..128).prop_map(|(from, to)| Step::Scan(from, to)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

        #[test]
        fn it_is_a_map(steps in proptest::collection::vec(step(), 1..40)) {
            let dir = tempdir();
            let mut backend = Sled::open(dir.path()).unwrap();
            let mut model = Map::new();
            for (at, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Apply(changes) => {
                        let mut batch = Batch::default();
                        for (n, len) in changes.into_iter().collect::<BTreeMap<_, _>>() {
                            match len {
                                Some(len) => batch.put(vec![n], value(at as u64, len.into())),
                                None => batch.delete(vec![n]),
                            }
                        }
                        backend.apply(&batch).unwrap();
                        batch.deletes.iter().for_each(|key| drop(model.remove(key)));
                        model.extend(batch.puts);
                    }
                    Step::Sync => backend.sync().unwrap(),
                    Step::Restart => {
                        drop(backend);
                        backend = Sled::open(dir.path()).unwrap();
                    }
                    Step::Begin => backend.start_rewrite().unwrap(),
                    Step::Copy(bytes) => drop(backend.rewrite_step(bytes).unwrap()),
                    Step::Scan(from, to) => {
                        let mut found = Vec::new();
                        backend.scan(&[from], &[to], &mut |key, _| { found.push(key.to_vec()); Ok(true) }).unwrap();
                        let expected: Vec<_> = model.keys().filter(|key| key[0] >= from && key[0] < to).cloned().collect();
                        prop_assert_eq!(found, expected);
                    }
                }
            }
            prop_assert_eq!(dump(&backend).unwrap(), model.clone());
            rewrite(&backend);
            prop_assert_eq!(dump(&backend).unwrap(), model);
        }
    }

    /// A tmpfs of its own, or nothing where mounting is not permitted.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn mount(megabytes: u32) -> Option<Tmpfs> {
            let dir = tempdir();
            let options = format!("size={megabytes}m,mode=700");
            let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).output();
            if mounted.is_ok_and(|output| output.status.success()) {
                return Some(Tmpfs(dir));
            }
            eprintln!("skipped: mounting a tmpfs is not permitted here");
            None
        }

        fn resize(&self, megabytes: u32) {
            let options = format!("remount,size={megabytes}m");
            assert!(Command::new("mount").args(["-o", &options]).arg(self.0.path()).status().unwrap().success());
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
        }
    }

    #[test]
    fn a_full_disk_is_noticed_before_anything_changes_and_heals() {
        let Some(mount) = Tmpfs::mount(48) else { return };
        let dir = mount.0.path().join("state");
        let backend = Sled::open(&dir).unwrap();
        let mut applied = Vec::new();
        let refused = loop {
            let n = applied.len() as u64;
            let batch = puts(n * 20..(n + 1) * 20, 1, 8192);
            match backend.apply(&batch) {
                Ok(()) => applied.push(batch),
                Err(error) => break error,
            }
            backend.sync().unwrap();
        };
        assert!(refused.is_disk_full(), "{refused}");
        assert!(applied.len() > 20, "{} batches", applied.len());
        assert_eq!(dump(&backend).unwrap(), replay(&applied), "reads go on");
        backend.reopen().unwrap();

        // A rewrite has no room, says so, and leaves no trace.
        let given_up = backend.start_rewrite().and_then(|()| {
            while backend.rewrite_step(1 << 20)? {}
            Ok(())
        });
        assert!(given_up.unwrap_err().is_disk_full());
        assert_eq!(names(&dir), ["CURRENT", "gen-0000001"]);

        // Deletes still go through, many of them, and make room for puts again.
        for n in (0..applied.len() as u64 * 20).step_by(10) {
            let batch = deletes(n..n + 10);
            backend.apply(&batch).unwrap_or_else(|error| panic!("delete from {n}: {error}"));
            applied.push(batch);
        }
        assert_eq!(dump(&backend).unwrap(), replay(&applied));

        mount.resize(96);
        let batch = puts(0..40, 2, 8192);
        backend.reopen().unwrap();
        backend.apply(&batch).unwrap();
        applied.push(batch);
        rewrite(&backend);
        assert_eq!(dump(&backend).unwrap(), replay(&applied));
        drop(backend);
        assert_eq!(dump(&Sled::open(&dir).unwrap()).unwrap(), replay(&applied));
    }

    /// The same when the reserve was not enough and sled itself runs out in the middle of a batch.
    #[test]
    fn sled_running_out_of_space_is_survived_by_reopening() {
        for batch_values in [1, 7, 60] {
            let Some(mount) = Tmpfs::mount(40) else { return };
            let dir = mount.0.path().join("state");
            let backend = Sled::open(&dir).unwrap();
            let mut batches = Vec::new();
            backend.start_rewrite().unwrap();
            let error = loop {
                let n = batches.len() as u64;
                let batch = puts((0..batch_values).map(|i| (n * batch_values + i) * 7919 % 1_000_003), 1, 8192);
                let state = backend.write();
                let live = state.live().unwrap();
                let result = live.change(sled_batch(&batch.puts, &batch.deletes), 0).and_then(|()| live.flush());
                drop(state);
                batches.push(batch);
                if let Err(error) = result {
                    break error;
                }
                if n.is_multiple_of(3) {
                    backend.sync().unwrap();
                }
            };
            assert!(error.is_disk_full(), "{error}");
            for result in [
                backend.rewrite_step(1).map(drop),
                backend.start_rewrite(),
                backend.sync(),
                backend.apply(&puts(0..1, 1, 1)),
                backend.get(b"x").map(drop),
                dump(&backend).map(drop),
            ] {
                assert!(result.unwrap_err().is_disk_full());
            }
            mount.resize(200);
            backend.reopen().unwrap();
            let found = dump(&backend).unwrap();
            let without_last = replay(&batches[..batches.len() - 1]);
            let whole = found == replay(&batches);
            assert!(whole || found == without_last, "{} found, {} expected", found.len(), without_last.len());
            backend.apply(&puts(0..50, 2, 100)).unwrap();
            backend.sync().unwrap();
            let expected = dump(&backend).unwrap();
            drop(backend);
            assert_eq!(dump(&Sled::open(&dir).unwrap()).unwrap(), expected);
        }
    }

    /// A closed database of about 1 MB whose log sled has already summed up in a snapshot, as after a clean restart.
    fn closed_database(dir: &Path) -> Map {
        let backend = Sled::open(dir).unwrap();
        for round in 0..6 {
            backend.apply(&puts((0..60).map(|n| n * 31 % 90), round, 2000)).unwrap();
            backend.apply(&deletes((0..90).filter(|n| n % 5 == round % 5))).unwrap();
        }
        let map = dump(&backend).unwrap();
        drop(backend);
        map
    }

    /// Flips a byte at every so many places of every file. Never is there a value that was not written under that key.
    #[test]
    fn a_flipped_byte_is_an_error_or_a_miss_and_never_an_invention() {
        let (mut refused, mut intact, mut missing, mut stale) = (0, 0, 0, 0);
        for reopened in [false, true] {
            let dir = tempdir();
            let expected = closed_database(dir.path());
            if reopened {
                drop(Sled::open(dir.path()).unwrap());
            }
            let generation = dir.path().join("gen-0000001");
            let written: Vec<Bytes> = (0..6).flat_map(|round| (0..90).map(move |n| value(n ^ round << 32, 2000))).collect();
            for name in names(&generation).iter().filter(|name| *name != "blobs") {
                let good = fs::read(generation.join(name)).unwrap();
                let end = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
                let places = if name == "db" { 40 } else { 12 };
                for place in 0..places {
                    let at = end * place / places;
                    let copy = tempdir();
                    let to = copy.path().join("gen-0000001");
                    fs::create_dir_all(to.join("blobs")).unwrap();
                    fs::copy(dir.path().join(CURRENT), copy.path().join(CURRENT)).unwrap();
                    names(&generation).iter().filter(|name| *name != "blobs").for_each(|name| {
                        fs::copy(generation.join(name), to.join(name)).unwrap();
                    });
                    let mut bad = good.clone();
                    bad[at] ^= 0x10;
                    fs::write(to.join(name), bad).unwrap();
                    match Sled::open(copy.path()).and_then(|backend| dump(&backend)) {
                        Err(Error::Corrupt { .. }) => refused += 1,
                        Err(other) => panic!("{name} at {at}: {other}"),
                        Ok(found) if found == expected => intact += 1,
                        Ok(found) => {
                            assert!(found.values().all(|value| written.contains(value)), "{name} at {at}: an invented value");
                            if found.iter().all(|(key, value)| expected.get(key) == Some(value)) { missing += 1 } else { stale += 1 }
                        }
                    }
                }
            }
        }
        eprintln!("flipped bytes: {refused} refused, {intact} intact, {missing} with missing keys, {stale} with older content");
        assert!(refused > 0 && intact > 0);
    }

    #[test]
    fn a_refused_state_is_left_as_it_was() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        (0..20).for_each(|n| backend.apply(&puts(n * 30..(n + 1) * 30, 0, 8000)).unwrap());
        let expected = dump(&backend).unwrap();
        drop(backend);
        let db = dir.path().join("gen-0000001/db");
        let good = fs::read(&db).unwrap();
        let end = good.iter().rposition(|byte| *byte != 0).unwrap();
        let mut wrong = 0;
        for at in (1..end).step_by(end / 16) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&db, &bad).unwrap();
            // Nobody accepts what it holds: the digest, which this test does without, would not fit.
            let found = Sled::open(dir.path()).and_then(|backend| dump(&backend));
            wrong += usize::from(!found.is_ok_and(|found| found == expected));
            assert!(fs::read(&db).unwrap() == bad, "{at}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "CURRENT and the generation");
        }
        assert!(wrong > 8, "{wrong}");
        fs::write(&db, &good).unwrap();
        let backend = Sled::open(dir.path()).unwrap();
        backend.accept().unwrap();
        assert_eq!(dump(&backend).unwrap(), expected);
    }

    #[test]
    fn a_batch_cut_short_by_damage_is_never_taken_for_whole() {
        let dir = tempdir();
        let backend = Sled::open(dir.path()).unwrap();
        (0..20).for_each(|n| backend.apply(&puts(n * 30..(n + 1) * 30, 0, 8000)).unwrap());
        let expected = dump(&backend).unwrap();
        drop(backend);
        drop(Sled::open(dir.path()).unwrap());
        let db = dir.path().join("gen-0000001/db");
        let good = fs::read(&db).unwrap();
        let end = good.iter().rposition(|byte| *byte != 0).unwrap();
        // Opening does not look at what its snapshot sums up: find a place whose damage only shows when its page is read.
        let backend = (end / 8..end / 2)
            .step_by(100_000)
            .find_map(|at| {
                let mut bad = good.clone();
                bad[at] ^= 1;
                fs::write(&db, bad).unwrap();
                Sled::open(dir.path()).ok().filter(|backend| dump(backend).is_err())
            })
            .unwrap();
        // Otherwise closing it would undo what follows.
        backend.accept().unwrap();
        let change = Batch { puts: expected.keys().map(|key| (key.clone(), Bytes::from_static(b"new"))).collect(), deletes: Vec::new() };
        assert_corrupt(&backend.apply(&change).unwrap_err(), "gen-0000001");
        assert!(backend.get(&key(1)).is_err() && backend.sync().is_err());
        assert_corrupt(&backend.reopen().unwrap_err(), "gen-0000001/DAMAGED");
        assert!(backend.get(&key(1)).is_err());
        drop(backend);
        assert_corrupt(&open_error(dir.path()), "gen-0000001/DAMAGED");
    }

    /// Not a test by itself: the process that `killed_at_any_time` kills.
    #[test]
    #[ignore = "run by another test"]
    fn victim() {
        let Some(dir) = std::env::var_os("QUORATE_VICTIM") else { return };
        let backend = Sled::open(Path::new(&dir)).unwrap();
        let from = dump(&backend).unwrap().get(&b"n"[..]).map_or(0, |value| u64::from_be_bytes(value[..].try_into().unwrap()));
        for n in from + 1.. {
            backend.apply(&victim_batch(n)).unwrap();
            println!("applied {n}");
            if n % 40 == 0 {
                backend.start_rewrite().unwrap();
            }
            backend.rewrite_step(20_000).unwrap();
        }
    }

    /// Batch n writes the number n and values, in every third so many that their places are held, and deletes two that stood 50 batches before.
    fn victim_batch(n: u64) -> Batch {
        let values = if n.is_multiple_of(3) { 20 } else { 5 };
        let mut batch = puts((0..values).map(|i| n * 20 + i), 0, 3000);
        batch.put(b"n".to_vec(), Bytes::copy_from_slice(&n.to_be_bytes()));
        if n > 50 {
            batch.deletes = (0..2).map(|i| key((n - 50) * 20 + i)).collect();
        }
        batch
    }

    #[test]
    fn killed_at_any_time_it_holds_whole_batches_and_every_one_that_was_applied() {
        use std::io::{BufRead, BufReader};
        let dir = tempdir();
        for round in 1..=6u32 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "storage::sled::tests::victim", "--ignored", "--nocapture"])
                .env("QUORATE_VICTIM", dir.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(|line| line.ok());
            let number = |line: String| line.rsplit_once("applied ").and_then(|(_, n)| n.parse::<u64>().ok());
            let seen = lines.by_ref().filter_map(number).nth(20 + round as usize * 13).unwrap();
            child.kill().unwrap();
            let seen = lines.filter_map(number).last().unwrap_or(seen);
            child.wait().unwrap();

            let found = dump(&Sled::open(dir.path()).unwrap()).unwrap();
            let n = u64::from_be_bytes(found[&b"n"[..]][..].try_into().unwrap());
            assert!(n == seen || n == seen + 1, "{seen} applied, {n} found");
            assert_eq!(found, replay((1..=n).map(victim_batch).collect::<Vec<_>>().iter()), "round {round}");
        }
    }

    /// Figures for the module head: `cargo test --release -- --ignored --nocapture measure`.
    #[test]
    #[ignore = "takes a minute and prints figures"]
    fn measure() {
        use std::time::Instant;
        let rss = || -> u64 {
            let statm = fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() / 256
        };
        let dir = tempfile::tempdir_in(".").unwrap();
        let backend = Sled::open(dir.path()).unwrap();
        let disk = |backend: &Sled| backend.disk_bytes() >> 20;
        println!("empty: {} MB on disk", disk(&backend));
        let total = 32768u64;
        let (mut apply, mut sync) = (Duration::ZERO, Duration::ZERO);
        let batches: Vec<Batch> = (0..64).map(|n| puts(n * 64..(n + 1) * 64, n, 8192)).collect();
        let begin = Instant::now();
        for n in 0..total / 64 {
            let mut batch = batches[n as usize % 64].clone();
            batch.puts.iter_mut().enumerate().for_each(|(i, put)| put.0 = key(n * 64 + i as u64));
            let start = Instant::now();
            backend.apply(&batch).unwrap();
            apply += start.elapsed();
            let start = Instant::now();
            backend.sync().unwrap();
            sync += start.elapsed();
        }
        let n = (total / 64) as u32;
        println!(
            "{:.0} values/s; apply {:?}, sync {:?}; {} MB on disk for {} MB; rss {} MB",
            total as f64 / begin.elapsed().as_secs_f64(),
            apply / n,
            sync / n,
            disk(&backend),
            total / 128,
            rss()
        );
        drop(backend);
        let start = Instant::now();
        let backend = Sled::open(dir.path()).unwrap();
        println!("open {:?}, rss {} MB", start.elapsed(), rss());
        for _ in 0..2 {
            let start = Instant::now();
            let mut bytes = 0;
            backend
                .scan(&[], &[], &mut |_, value| {
                    bytes += value.len();
                    Ok(true)
                })
                .unwrap();
            println!("scan of {} MB: {:?}, rss {} MB", bytes >> 20, start.elapsed(), rss());
        }
        let start = Instant::now();
        for n in 0..20_000u64 {
            assert!(backend.get(&key(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % total)).unwrap().is_some());
        }
        println!("random get {:?}, rss {} MB", start.elapsed() / 20_000, rss());
        let start = Instant::now();
        for _ in 0..20_000 {
            backend.get(&key(7)).unwrap();
        }
        println!("same get {:?}, rss {} MB", start.elapsed() / 20_000, rss());
        let start = Instant::now();
        for n in 0..total / 64 {
            let mut batch = batches[n as usize % 64].clone();
            batch.puts.iter_mut().enumerate().for_each(|(i, put)| put.0 = key(total + n * 64 + i as u64));
            batch.deletes = (n * 64..(n + 1) * 64).map(key).collect();
            backend.apply(&batch).unwrap();
        }
        println!("all replaced: {:?}, {} MB on disk, rss {} MB", start.elapsed(), disk(&backend), rss());
        for n in (total..total * 2).step_by(256) {
            backend.apply(&deletes((n..n + 256).filter(|n| n % 4 != 0))).unwrap();
        }
        println!("three quarters deleted: {} MB on disk for {} MB", disk(&backend), total / 128 / 4);
        let start = Instant::now();
        rewrite(&backend);
        println!("rewritten in {:?}: {} MB on disk, rss {} MB", start.elapsed(), disk(&backend), rss());
        let start = Instant::now();
        drop(backend);
        println!("closed in {:?}", start.elapsed());
    }
}
