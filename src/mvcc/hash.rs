//! HashKV: a checksum over the history that is equal on all members with the same history, and equal to etcd's.
//!
//! # What is hashed
//! A CRC-32C over the bytes `key`, and then each record up to a revision, in order: its revision as etcd writes it in its
//! store (main and sub as 8 bytes each with a `_` between, and a `t` behind for a tombstone), and the record itself. Of the
//! records at or below the last compaction only those count that a compaction at the hashed revision would keep too, so
//! that it does not matter how far the compaction has come; where it would keep none, all that are there.
//!
//! ```text
//! records   2 {a}  3 {b}  4 {a}  5+ {b}      compacted at 3, hashed up to 5
//! counted                 4      5+          2 and 3 lie below, and would not be kept at 5
//! ```
//!
//! # Remembered
//! A compaction at *C* remembers the hash up to *C* as it was before it, with the compaction before that. Members compare
//! these: they are the same whenever each of them comes to compact. HashKV of a revision that is remembered answers it.
//!
//! # Source
//! etcd's `server/storage/mvcc/hash.go`; compared with a live one by `tests/differential.rs`.

use std::sync::Arc;

use crate::error::{ApplyError, Result};
use crate::lock::lock;
use crate::proto::EncodedKv;
use crate::storage::{Record, Revision};

use super::tree::Bound;
use super::{Pin, STEP_KEYS, State, Store};

/// Hashes of compactions that are remembered, as many as etcd does; beyond it the one of the oldest revision is forgotten.
const REMEMBERED: usize = 10;

/// The hash of no record: of the name of etcd's bucket.
const SEED: &[u8] = b"key";

/// A HashKV answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvHash {
    pub hash: u32,
    /// The newest revision when the answer was given.
    pub revision: i64,
    /// The compaction below which records were left out.
    pub compacted: i64,
    /// The revision up to which was hashed.
    pub hashed: i64,
}

/// Which records at or below the compaction count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// Of each key the last one up to the hashed revision, if it is no tombstone.
    Live,
    /// The same, and a tombstone at the hashed revision itself.
    LiveAndLast,
    /// There is no live key: all that the compaction has left.
    Left,
}

/// A hash being computed in steps.
#[derive(Debug)]
pub(super) struct HashScan {
    upto: i64,
    compacted: i64,
    keep: Keep,
    next: Revision,
    crc: u32,
}

impl HashScan {
    /// The hash that a compaction at `upto` remembers; `compacted` is the one before.
    pub fn of_compaction(upto: i64, compacted: i64) -> Self {
        HashScan { upto, compacted, keep: Keep::LiveAndLast, next: Revision::default(), crc: crc32c::crc32c(SEED) }
    }

    /// Looks at `max` records, or at fewer when they come to `max_bytes`. Returns whether more are left. After an error the step
    /// can be taken again.
    pub fn step(&mut self, store: &Store, max: usize, max_bytes: usize) -> Result<bool> {
        let (mut looked_at, mut bytes) = (0, 0);
        let mut more = None;
        let mut crc = self.crc;
        let from = self.next;
        let end = Revision { main: self.upto.saturating_add(1).max(0), sub: 0 };
        store.history.scan(from, end, &mut |revision, record| {
            if looked_at == max || bytes >= max_bytes {
                more = Some(revision);
                return Ok(false);
            }
            looked_at += 1;
            bytes += record.bytes.len();
            if revision.main > self.compacted || self.keeps(store, revision, record)? {
                let mut key = [0u8; 18];
                key[..8].copy_from_slice(&revision.main.to_be_bytes());
                key[8] = b'_';
                key[9..17].copy_from_slice(&i64::from(revision.sub).to_be_bytes());
                key[17] = b't';
                crc = crc32c::crc32c_append(crc, &key[..if record.tombstone { 18 } else { 17 }]);
                crc = crc32c::crc32c_append(crc, &record.bytes);
            }
            Ok(true)
        })?;
        self.crc = crc;
        self.next = more.unwrap_or(from);
        Ok(more.is_some())
    }

    fn keeps(&self, store: &Store, revision: Revision, record: &Record) -> Result<bool> {
        let kv = EncodedKv::from_encoded(record.bytes.clone());
        let key = kv.view().map_err(|_| store.history.missing(revision))?.key;
        let state = store.state();
        let Some(entry) = state.index.get(key) else { return Ok(false) };
        Ok(match self.keep {
            Keep::Live => entry.at(self.upto).is_some_and(|found| found.revision == revision),
            Keep::LiveAndLast => entry.kept_at(self.upto) == Some(revision),
            Keep::Left => entry.kept_at(self.compacted) == Some(revision),
        })
    }

    fn finish(self, revision: i64) -> KvHash {
        KvHash { hash: self.crc, revision, compacted: self.compacted, hashed: self.upto }
    }
}

/// A hash that is being computed.
pub(crate) struct Hashing {
    store: Arc<Store>,
    scan: HashScan,
    /// What is hashed stays until it is. None where there is nothing to hash.
    pin: Option<Pin>,
    /// The newest revision at the beginning.
    newest: i64,
}

impl Hashing {
    /// Hashes what comes to `max_bytes`. Returns whether there is more.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn step(&mut self, max_bytes: usize) -> Result<bool> {
        if self.pin.is_none() { Ok(false) } else { self.scan.step(&self.store, usize::MAX, max_bytes) }
    }

    /// The hash, when there is no more.
    pub fn finish(self) -> KvHash {
        self.scan.finish(self.newest)
    }
}

impl Store {
    /// The hash of the history up to `at` (0: all), as etcd's HashKV computes it. Long; others work meanwhile.
    ///
    /// # Errors
    /// `Compacted` or `FutureRevision`; or a record that cannot be read.
    pub fn hash(self: &Arc<Self>, at: i64) -> Result<KvHash> {
        if let Some(known) = self.known_hash(at) {
            return Ok(known);
        }
        let mut hashing = self.begin_hash(at)?;
        while hashing.step(usize::MAX)? {}
        Ok(hashing.finish())
    }

    /// The hash that a compaction has remembered of a revision.
    pub fn known_hash(&self, at: i64) -> Option<KvHash> {
        lock(&self.hashes).iter().find(|known| known.hashed == at).map(|known| KvHash { revision: self.revision(), ..*known })
    }

    /// Begins with a hash that is taken in steps; what it is of is held until it is done. Without a look at what compactions have remembered:
    /// theirs differs where the revision is the last deletion of all keys there were. So members compare either what all of them compute, or
    /// what all of them remember.
    ///
    /// # Errors
    /// As [`hash`](Self::hash).
    pub fn begin_hash(self: &Arc<Self>, at: i64) -> Result<Hashing> {
        let (newest, compacted) = self.revisions();
        if at > newest {
            return Err(ApplyError::FutureRevision.into());
        }
        // As in etcd, only 0 stands for the newest; up to a revision below it there is nothing to hash.
        let scan = |upto, compacted, keep| HashScan { upto, compacted, keep, next: Revision::default(), crc: crc32c::crc32c(SEED) };
        if at < 0 {
            return Ok(Hashing { store: self.clone(), pin: None, newest, scan: scan(at, compacted, Keep::Live) });
        }
        let pin = self.pin(at)?;
        let upto = pin.at();
        let keep = if self.any_live(upto) { Keep::Live } else { Keep::Left };
        Ok(Hashing { store: self.clone(), pin: Some(pin), newest, scan: scan(upto, compacted.min(upto), keep) })
    }

    /// What compactions have remembered, oldest first.
    pub fn compaction_hashes(&self) -> Vec<KvHash> {
        lock(&self.hashes).iter().copied().collect()
    }

    /// Whether any key was there at a revision.
    fn any_live(&self, at: i64) -> bool {
        let mut from: Option<Vec<u8>> = None;
        loop {
            let state: &State = &self.state();
            if at == state.revision {
                return state.index.live() > 0;
            }
            let mut last = None;
            for (key, entry) in state.index.range(from.as_deref().unwrap_or_default(), Bound::Unbounded).take(STEP_KEYS) {
                if entry.at(at).is_some() {
                    return true;
                }
                last = Some(key.to_vec());
            }
            // On from the key after the last: the shortest one above it.
            match last {
                Some(mut key) => {
                    key.push(0);
                    from = Some(key);
                }
                None => return false,
            }
        }
    }

    /// Remembers a compaction's hash.
    pub(super) fn remember(&self, scan: HashScan) {
        let hash = scan.finish(0);
        let mut hashes = lock(&self.hashes);
        hashes.push_back(hash);
        if hashes.len() > REMEMBERED {
            hashes.pop_front();
        }
    }
}
