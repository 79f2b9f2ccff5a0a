//! The backend in memory, which can lose power, run out of space and fail to sync whenever a test wants it to.
//!
//! What is *live* is what readers see. What is *durable* is what the last sync left. Between them stand the batches that were
//! applied since, in order, and a crash keeps a prefix of them, as a disk does that got some of the writes and not the rest:
//!
//! ```text
//! apply A, sync, apply B, apply C, crash(1)   ->   A and B are there, C is not
//! ```
//!
//! Everything else is as the trait has it, on its strict side: after a failed change nothing can be changed until
//! [`reopen`](Backend::reopen), and with [`Fault::reads_fail`] nothing can be read either.
//!
//! # Caveats
//! - `disk_bytes` is a model: live bytes, and garbage that only a rewrite takes away.
//! - A batch is cloned into the list of unsynced ones; its values are shared, not copied.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use super::{Backend, Batch, Visit};
use crate::error::{Error, Result};
use crate::lock::lock;

/// Entries that a scan holds at a time between two calls of its visitor.
const CHUNK_ENTRIES: usize = 64;

/// What goes wrong, and how things stand afterwards.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The error that the caller sees: `StorageFull` for a full disk, anything else for a broken one.
    pub kind: io::ErrorKind,
    /// For a failing `apply`: whether the batch is there after `reopen` all the same.
    pub batch_stays: bool,
    /// Whether reads fail too until `reopen`.
    pub reads_fail: bool,
}

impl Fault {
    /// A full disk that is noticed before anything was changed, which is what usually happens.
    pub fn disk_full() -> Fault {
        Fault { kind: io::ErrorKind::StorageFull, batch_stays: false, reads_fail: false }
    }

    /// A disk that does not work.
    pub fn broken() -> Fault {
        Fault { kind: io::ErrorKind::Other, batch_stays: false, reads_fail: true }
    }

    fn error(self, what: &'static str) -> Error {
        Error::io(what, "(memory)", io::Error::from(self.kind))
    }
}

/// The backend in memory. See the module head.
#[derive(Default)]
pub struct Mem {
    inner: Arc<Mutex<Inner>>,
    /// The one that counts of this and its [successors](Backend::successor): none before one of them has taken over.
    counts: Arc<Mutex<Option<Arc<Mutex<Inner>>>>>,
}

#[derive(Default)]
struct Inner {
    live: BTreeMap<Vec<u8>, Bytes>,
    durable: BTreeMap<Vec<u8>, Bytes>,
    live_bytes: u64,
    /// Applied since the last sync, in order.
    unsynced: Vec<Batch>,
    /// The error that closed the store until `reopen`, and whether it closes it to readers.
    down: Option<(Error, bool)>,
    /// The batch whose apply failed, when `reopen` is to find it.
    stays: Option<Batch>,
    next_apply: Option<Fault>,
    next_sync: Option<Fault>,
    capacity: Option<u64>,
    /// Bytes overwritten or deleted since the last rewrite.
    garbage: u64,
    /// Bytes that the rewrite under way has yet to copy.
    rewrite: Option<u64>,
}

impl Mem {
    /// An empty store.
    pub fn new() -> Mem {
        Mem::default()
    }

    /// Loses power: what was synced stays, and the first `keep` of the batches applied since. Everything else that was set,
    /// faults and a limit too, is gone, and the store is open as after a restart.
    pub fn crash(&self, keep: usize) {
        let mut inner = self.lock();
        let mut durable = std::mem::take(&mut inner.durable);
        for batch in inner.unsynced.iter().take(keep) {
            change(&mut durable, batch);
        }
        let live_bytes = bytes(&durable);
        *inner = Inner { live: durable.clone(), durable, live_bytes, ..Inner::default() };
    }

    /// The store that a restart finds: this one, or the successor that has last taken over.
    pub fn reopened(&self) -> Mem {
        let inner = lock(&self.counts).clone().unwrap_or_else(|| self.inner.clone());
        Mem { inner, counts: self.counts.clone() }
    }

    /// How many batches a crash could lose: `crash(0)` loses them all, `crash(unsynced())` none.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Makes the next `apply` fail.
    pub fn fail_next_apply(&self, fault: Fault) {
        self.lock().next_apply = Some(fault);
    }

    /// Makes the next `sync` fail.
    pub fn fail_next_sync(&self, fault: Fault) {
        self.lock().next_sync = Some(fault);
    }

    /// Limits the bytes of keys, values and garbage: a put beyond it fails as on a full disk. `None`: no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity = bytes;
    }

    /// Everything that readers see, for comparing.
    pub fn dump(&self) -> BTreeMap<Vec<u8>, Bytes> {
        self.lock().live.clone()
    }

    /// Replaces, or with `None` removes, the bytes under a key behind everyone's back, as a damaged disk would.
    pub fn tamper(&self, key: &[u8], value: Option<Bytes>) {
        let mut inner = self.lock();
        let Inner { live, durable, .. } = &mut *inner;
        for map in [live, durable] {
            match &value {
                Some(value) => drop(map.insert(key.to_vec(), value.clone())),
                None => drop(map.remove(key)),
            }
        }
        inner.live_bytes = bytes(&inner.live);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Inner {
    fn readable(&self) -> Result<()> {
        match &self.down {
            Some((error, true)) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    fn changeable(&self) -> Result<()> {
        self.down.as_ref().map_or(Ok(()), |(error, _)| Err(error.clone()))
    }

    /// Applies a batch to what is live, and counts what it leaves behind.
    fn apply(&mut self, batch: Batch) {
        let before = self.live_bytes + batch.bytes() as u64;
        self.live_bytes = self.live_bytes.saturating_add_signed(change(&mut self.live, &batch));
        self.garbage += before.saturating_sub(self.live_bytes);
        self.unsynced.push(batch);
    }

    fn sync(&mut self) {
        for batch in self.unsynced.drain(..) {
            change(&mut self.durable, &batch);
        }
    }

    fn fail(&mut self, fault: Fault, what: &'static str) -> Error {
        let error = fault.error(what);
        self.down = Some((error.clone(), fault.reads_fail));
        error
    }
}

fn bytes(map: &BTreeMap<Vec<u8>, Bytes>) -> u64 {
    map.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
}

/// Applies a batch, and returns by how many bytes of keys and values the map has grown.
fn change(map: &mut BTreeMap<Vec<u8>, Bytes>, batch: &Batch) -> i64 {
    let mut grown = 0;
    for (key, value) in &batch.puts {
        let old = map.insert(key.clone(), value.clone());
        grown += value.len() as i64 - old.map_or(-(key.len() as i64), |old| old.len() as i64);
    }
    for key in &batch.deletes {
        grown -= map.remove(key).map_or(0, |old| (key.len() + old.len()) as i64);
    }
    grown
}

impl Backend for Mem {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>> {
        let inner = self.lock();
        inner.readable()?;
        Ok(inner.live.get(key).cloned())
    }

    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut lower = Bound::Included(start.to_vec());
        loop {
            let chunk: Vec<(Vec<u8>, Bytes)> = {
                let inner = self.lock();
                inner.readable()?;
                let below_end = |key: &Vec<u8>| end.is_empty() || key.as_slice() < end;
                let range = inner.live.range((lower, Bound::Unbounded)).take_while(|(key, _)| below_end(key));
                range.take(CHUNK_ENTRIES).map(|(key, value)| (key.clone(), value.clone())).collect()
            };
            for (key, value) in &chunk {
                if !visit(key, value)? {
                    return Ok(());
                }
            }
            match chunk.into_iter().last() {
                Some((last, _)) => lower = Bound::Excluded(last),
                None => return Ok(()),
            }
        }
    }

    fn apply(&self, batch: &Batch) -> Result<()> {
        #[cfg(debug_assertions)]
        batch.check();
        let mut inner = self.lock();
        inner.changeable()?;
        if batch.is_empty() {
            return Ok(());
        }
        // A batch of deletes alone goes through, as the reserve of a real disk lets it.
        let full =
            !batch.puts.is_empty() && inner.capacity.is_some_and(|most| inner.live_bytes + inner.garbage + batch.bytes() as u64 > most);
        let fault = inner.next_apply.take().or_else(|| full.then(Fault::disk_full));
        if let Some(fault) = fault {
            inner.stays = fault.batch_stays.then(|| batch.clone());
            return Err(inner.fail(fault, "apply to"));
        }
        inner.apply(batch.clone());
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.changeable()?;
        if let Some(fault) = inner.next_sync.take() {
            return Err(inner.fail(fault, "sync"));
        }
        inner.sync();
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        let inner = self.lock();
        inner.live_bytes + inner.garbage
    }

    fn reopen(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.down = None;
        inner.rewrite = None;
        if let Some(batch) = inner.stays.take() {
            inner.apply(batch);
        }
        Ok(())
    }

    fn successor(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Mem { inner: Arc::default(), counts: self.counts.clone() }))
    }

    fn take_over(&self) -> Result<()> {
        *lock(&self.counts) = Some(self.inner.clone());
        Ok(())
    }

    fn start_rewrite(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.changeable()?;
        if inner.rewrite.is_none() {
            inner.rewrite = Some(inner.live_bytes);
        }
        Ok(())
    }

    fn rewrite_step(&self, max_bytes: usize) -> Result<bool> {
        let mut inner = self.lock();
        inner.changeable()?;
        let Some(left) = inner.rewrite else { return Ok(false) };
        if left > max_bytes as u64 {
            inner.rewrite = Some(left - max_bytes as u64);
            return Ok(true);
        }
        inner.rewrite = None;
        inner.garbage = 0;
        // The new files are synced before they take the place of the old.
        inner.sync();
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(keys: &[u8]) -> Batch {
        let mut batch = Batch::default();
        keys.iter().for_each(|key| batch.put(vec![*key], Bytes::from_static(b"v")));
        batch
    }

    fn keys(mem: &Mem) -> Vec<u8> {
        mem.dump().keys().map(|key| key[0]).collect()
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_a_prefix_of_the_rest() {
        for keep in 0..4 {
            let mem = Mem::new();
            mem.apply(&batch(b"a")).unwrap();
            mem.sync().unwrap();
            for key in [b"b", b"c", b"d"] {
                mem.apply(&batch(key)).unwrap();
            }
            let mut gone = Batch::default();
            gone.delete(b"a".to_vec());
            mem.apply(&gone).unwrap();
            assert_eq!(mem.unsynced(), 4);
            mem.crash(keep);
            assert_eq!(keys(&mem), b"abcd"[..=keep].to_vec(), "keep {keep}");
            assert_eq!(mem.unsynced(), 0);
            mem.crash(9);
            assert_eq!(keys(&mem), b"abcd"[..=keep].to_vec(), "a second crash loses nothing more");
        }
    }

    #[test]
    fn a_failed_sync_leaves_nothing_durable_and_takes_nothing_more() {
        let mem = Mem::new();
        mem.apply(&batch(b"a")).unwrap();
        mem.fail_next_sync(Fault::broken());
        assert!(!mem.sync().unwrap_err().is_disk_full());
        assert!(mem.sync().is_err() && mem.apply(&batch(b"b")).is_err() && mem.get(b"a").is_err());
        mem.crash(0);
        assert!(keys(&mem).is_empty());
    }

    #[test]
    fn a_full_disk_keeps_reads_alive_and_heals() {
        let mem = Mem::new();
        mem.apply(&batch(b"abc")).unwrap();
        mem.set_capacity(Some(7));
        assert!(mem.apply(&batch(b"de")).unwrap_err().is_disk_full());
        assert!(mem.apply(&batch(b"d")).unwrap_err().is_disk_full(), "nothing is taken before reopen, whether it fits or not");
        assert_eq!(mem.get(b"a").unwrap().as_deref(), Some(&b"v"[..]));
        mem.set_capacity(None);
        mem.reopen().unwrap();
        assert_eq!(keys(&mem), b"abc");
        mem.apply(&batch(b"de")).unwrap();
        mem.fail_next_apply(Fault { batch_stays: true, ..Fault::disk_full() });
        assert!(mem.apply(&batch(b"f")).is_err());
        assert_eq!(keys(&mem), b"abcde");
        mem.reopen().unwrap();
        assert_eq!(keys(&mem), b"abcdef", "the batch whose apply failed may be there after all");
    }

    #[test]
    fn a_successor_counts_once_it_has_taken_over() {
        let mem = Mem::new();
        mem.apply(&batch(b"a")).unwrap();
        let next = mem.successor().unwrap();
        next.apply(&batch(b"b")).unwrap();
        next.sync().unwrap();
        assert_eq!(keys(&mem.reopened()), b"a");
        next.take_over().unwrap();
        assert_eq!((keys(&mem), keys(&mem.reopened())), (b"a".to_vec(), b"b".to_vec()));
        mem.reopened().crash(0);
        assert_eq!(keys(&mem.reopened().reopened()), b"b");
    }

    #[test]
    fn only_a_rewrite_takes_garbage_away() {
        let mem = Mem::new();
        mem.apply(&batch(b"abcd")).unwrap();
        let mut gone = Batch::default();
        b"abc".iter().for_each(|key| gone.delete(vec![*key]));
        mem.apply(&gone).unwrap();
        assert!(mem.disk_bytes() > 2);
        assert!(!mem.rewrite_step(1).unwrap(), "nothing was started");
        mem.start_rewrite().unwrap();
        assert!(mem.rewrite_step(1).unwrap());
        assert!(!mem.rewrite_step(1).unwrap());
        assert_eq!(mem.disk_bytes(), 2);
        assert_eq!(mem.unsynced(), 0);
    }
}
