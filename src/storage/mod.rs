//! Bytes on disk. Nothing in this folder knows what a lease or a watch is.
//!
//! [`Backend`] is an ordered map of bytes to bytes that changes by whole [`Batch`]es. There are two of them:
//! `sled.rs` for real disks, and `mem.rs`, which can lose power, run out of space and fail to sync at will.
//! What stands under which key is settled here, once, in [`keys`]; what is in the values is `history.rs`'s own.
//!
//! # Three degrees of safety
//! 1. `apply` failed: the batch is there whole or not at all, and only after `reopen` (or a restart) does one know which.
//!    Nothing else can be applied until then, and reads see the state before the batch, or fail; never a part of it.
//! 2. `apply` returned `Ok`: the batch outlives the process (kill -9) and a `reopen`.
//! 3. `sync` returned `Ok`: every batch applied before the call outlives a power cut.
//!
//! After a power cut the store holds everything that was synced, and of the batches after that a *prefix* in the order
//! of their application: never the third without the second, never half of one.
//!
//! # Example
//! ```text
//! let mut batch = Batch::default();
//! batch.put(Key::Meta(b"applied").encode(), Bytes::from_static(b"7"));
//! batch.delete(Key::Block(Revision { main: 3, sub: 0 }).encode());
//! backend.apply(&batch)?;   // readers see both changes, the process may die
//! backend.sync()?;          // the machine may lose power
//! ```
//!
//! # Caveats
//! - Integrity is not promised: a damaged file ends in [`Error::Corrupt`](crate::Error::Corrupt), in an intact answer, *in a
//!   missing key, or in an older value of a key that was overwritten*. Whoever stores values adds a checksum to each, and a
//!   digest of which keys, with which values, there must be.
//! - A scan is not a snapshot: beside a concurrent `apply` it may see some of the batch's changes and not others.
//!
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};

pub mod dir;
mod generation;
pub mod history;
mod inspect;
mod keep;
pub mod mem;
pub mod sled;
pub mod wal;

/// Largest value a caller may store, in bytes. Pages hold up to 19 of them, and sled would put one beyond 512 KiB into a
/// file of its own, which it neither syncs nor gets over a full disk with. Beyond it: `apply` refuses, debug builds assert.
pub const VALUE_BYTES_MAX: usize = 16 * 1024;

/// Largest key a caller may store, in bytes; for the same reason (256 of them share a page), and handled the same.
pub const KEY_BYTES_MAX: usize = 1024;

/// Where a record stands in the history: the revision of its transaction, and its place among that transaction's writes.
///
/// Ordered as the history is: by `main`, then by `sub`. `main` is never negative in anything that is stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Revision {
    /// The store's revision that the transaction made; the first write of an empty store makes 2, as etcd's does.
    pub main: i64,
    /// 0 for the first write of the transaction, 1 for the second, and so on.
    pub sub: u32,
}

/// One immutable entry of the history: the encoded `mvccpb.KeyValue`, and whether it says that the key was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The encoded message, copied as it is into answers, events and hashes.
    pub bytes: Bytes,
    /// True when the record marks a deletion; `bytes` then holds the key alone.
    pub tombstone: bool,
}

/// One atomic set of changes: applied whole or not at all, also across a crash.
///
/// A key stands at most once in a batch, in `puts` or in `deletes`, and no value is without bytes; debug builds assert it when the batch is
/// applied.
/// Deleting a key that is not there is no error. An empty batch changes nothing.
#[derive(Default, Debug, Clone)]
pub struct Batch {
    /// Keys and their new values.
    pub puts: Vec<(Vec<u8>, Bytes)>,
    /// Keys to remove.
    pub deletes: Vec<Vec<u8>>,
}

impl Batch {
    /// Adds a key with its new value.
    pub fn put(&mut self, key: Vec<u8>, value: Bytes) {
        self.puts.push((key, value));
    }

    /// Adds a key to remove.
    pub fn delete(&mut self, key: Vec<u8>) {
        self.deletes.push(key);
    }

    /// Whether the batch changes nothing.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }

    /// Bytes of all keys and values: what the batch costs in memory and, roughly, on disk.
    pub fn bytes(&self) -> usize {
        let puts: usize = self.puts.iter().map(|(key, value)| key.len() + value.len()).sum();
        puts + self.deletes.iter().map(Vec::len).sum::<usize>()
    }

    /// The rules of a batch, checked in debug builds by every backend before it applies one.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn check(&self) {
        let mut seen = std::collections::BTreeSet::new();
        for key in self.puts.iter().map(|(key, _)| key).chain(&self.deletes) {
            assert!(seen.insert(key), "key {key:02x?} stands twice in one batch");
            assert!(key.len() <= KEY_BYTES_MAX, "key {key:02x?} has {} bytes, at most {KEY_BYTES_MAX} are allowed", key.len());
        }
        for (key, value) in &self.puts {
            assert!(!value.is_empty(), "the value of key {key:02x?} has no bytes");
            assert!(
                value.len() <= VALUE_BYTES_MAX,
                "value of key {key:02x?} has {} bytes, at most {VALUE_BYTES_MAX} are allowed",
                value.len()
            );
        }
    }
}

/// What a scan calls with each key and value; false ends the scan.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<bool> + 'a;

/// An ordered map of bytes to bytes, changed by atomic batches.
///
/// `get`, `scan` and `disk_bytes` may be called from any thread at any time. The rest belongs to one thread at a time, the
/// background writer's.
pub trait Backend: Send + Sync + 'static {
    /// The value of a key.
    ///
    /// # Errors
    /// `Corrupt` when the stored bytes cannot be read as what was written, `Io` when the disk fails.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>>;

    /// Visits the keys of `[start, end)` in ascending order of their bytes until `visit` returns false or an error,
    /// which is passed on; an empty `end` means to the last key. `visit` may call the backend: nothing is locked meanwhile.
    ///
    /// # Errors
    /// As [`get`](Backend::get), and whatever `visit` returns.
    fn scan(&self, start: &[u8], end: &[u8], visit: &mut Visit<'_>) -> Result<()>;

    /// Applies a batch atomically. Readers see it at once; a power cut may take it back until [`sync`](Backend::sync).
    ///
    /// # Errors
    /// After any error call [`reopen`](Backend::reopen) before anything else is applied or synced. `Error::is_disk_full`
    /// tells the errors that are worth it: try again when there is space. After any other the member has to stop.
    fn apply(&self, batch: &Batch) -> Result<()>;

    /// Returns when everything applied before the call is on disk.
    ///
    /// # Errors
    /// As [`apply`](Backend::apply). A failed sync is never repeated on the same handle: the kernel marks the pages that
    /// it could not write as clean, so that a second try would succeed without having written them.
    fn sync(&self) -> Result<()>;

    /// The file that holds the live state, for errors to name; empty if there is none.
    fn path(&self) -> PathBuf {
        PathBuf::new()
    }

    /// What the files take on disk, in bytes: both generations during a rewrite. Cheap enough to ask every second.
    fn disk_bytes(&self) -> u64;

    /// After a disk-full error: throws the handle away, when something is wrong with it, and opens the files again. The batch
    /// whose `apply` failed is there whole or gone; those that were applied before are there. A rewrite under way is given up.
    ///
    /// # Errors
    /// As opening. The backend then stays unusable, and `reopen` may be called again.
    fn reopen(&self) -> Result<()>;

    /// What was opened has been found whole. Before that the files are put back as they were when they are given up.
    ///
    /// # Errors
    /// `Io` when that cannot be made to last: nothing may be changed then, for the next start would put them back all the same.
    fn accept(&self) -> Result<()> {
        Ok(())
    }

    /// Gives the files up, for good: every later call ends with `Stopped`. Readers may still hold the backend by then.
    fn close(&self) {}

    /// Makes an empty store beside this one, to be filled by whoever asked for it and then to [take its place](Backend::take_over). Until
    /// then nothing of it is there after a restart, and this store goes on as if it were not there.
    ///
    /// # Errors
    /// `Io` when the files cannot be made; `Failed` when this kind of store has no successors.
    fn successor(&self) -> Result<Arc<dyn Backend>> {
        Err(Error::Failed("this storage cannot be replaced by another".into()))
    }

    /// Makes a successor that is filled and synced the one that counts: at once, also across a crash. The store that was there before
    /// can still be read, is to be written no more, and takes its files with it when it is closed or dropped.
    ///
    /// # Errors
    /// `Io`; the old store counts then, unless a restart finds otherwise.
    fn take_over(&self) -> Result<()> {
        Err(Error::Failed("this storage cannot replace another".into()))
    }

    /// Begins to copy what is live into fresh files, which is how space comes back. Does nothing while one is under way.
    ///
    /// # Errors
    /// `Io` when the new files cannot be made; the old ones go on unharmed.
    fn start_rewrite(&self) -> Result<()>;

    /// Copies about `max_bytes` more, and with the last step puts the new files in the place of the old. Returns false when
    /// there is nothing (more) to do. Reads and applies go on between and beside the steps.
    ///
    /// # Errors
    /// `Io` or `Corrupt`; the rewrite is then given up and its files are removed, and the old files go on unharmed.
    fn rewrite_step(&self, max_bytes: usize) -> Result<bool>;
}

pub mod keys {
    //! What stands under which key: one enum, whose bytes are frozen.
    //!
    //! A key is one tag byte and then a body. Numbers are big-endian, so that the order of the bytes is the order of the
    //! revisions. **Tags and bodies are on people's disks: add new ones, never change or reuse one.**
    //!
    //! | tag | key | body |
    //! |---|---|---|
    //! | 0x01 | [`Key::Block`] | revision main u64, sub u32: of the block's first record |
    //! | 0x02 | [`Key::Dead`] | the same as its block's |
    //! | 0x03 | [`Key::Chunk`] | revision main u64, sub u32: of the record; chunk number u32 |
    //! | 0x04 | [`Key::Meta`] | the name, any bytes |
    //! | 0x05 | [`Key::Summary`] | nothing |
    //!
    //! Block 2/0 is `01 0000000000000002 00000000`, and the third chunk of record 5/1 is `03 0000000000000005 00000001 00000002`.

    use super::Revision;

    /// A stored key.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
    pub enum Key<'a> {
        /// A block of records, named by the revision of its first one. Value: the block.
        Block(Revision),
        /// Which records of a block are dead. Value: a bitmap. No such key: none is.
        Dead(Revision),
        /// A part of a record that is too large for a block: the record's revision, and the part's number from 0.
        Chunk(Revision, u32),
        /// Something small that is kept under a name: the applied log id, a lease, the compaction mark.
        Meta(&'a [u8]),
        /// The history's own record of how much there must be: counts, and a digest of the set of keys.
        Summary,
    }

    /// First byte of each kind of key. Frozen.
    pub mod tag {
        /// [`Key::Block`](super::Key::Block).
        pub const BLOCK: u8 = 0x01;
        /// [`Key::Dead`](super::Key::Dead).
        pub const DEAD: u8 = 0x02;
        /// [`Key::Chunk`](super::Key::Chunk).
        pub const CHUNK: u8 = 0x03;
        /// [`Key::Meta`](super::Key::Meta).
        pub const META: u8 = 0x04;
        /// [`Key::Summary`](super::Key::Summary).
        pub const SUMMARY: u8 = 0x05;
    }

    impl<'a> Key<'a> {
        /// The bytes to store the key under.
        pub fn encode(&self) -> Vec<u8> {
            match *self {
                Key::Block(rev) => with_revision(tag::BLOCK, rev, 0),
                Key::Dead(rev) => with_revision(tag::DEAD, rev, 0),
                Key::Chunk(rev, number) => {
                    let mut bytes = with_revision(tag::CHUNK, rev, 4);
                    bytes.extend_from_slice(&number.to_be_bytes());
                    bytes
                }
                Key::Meta(name) => {
                    let mut bytes = Vec::with_capacity(1 + name.len());
                    bytes.push(tag::META);
                    bytes.extend_from_slice(name);
                    bytes
                }
                Key::Summary => vec![tag::SUMMARY],
            }
        }

        /// The key that the bytes stand for, or `None` when they are no key of ours: an unknown tag, a body of the wrong
        /// length, or a revision beyond the largest.
        pub fn decode(bytes: &'a [u8]) -> Option<Key<'a>> {
            let (&tag, body) = bytes.split_first()?;
            match tag {
                tag::BLOCK => take_revision(body).filter(|(_, rest)| rest.is_empty()).map(|(rev, _)| Key::Block(rev)),
                tag::DEAD => take_revision(body).filter(|(_, rest)| rest.is_empty()).map(|(rev, _)| Key::Dead(rev)),
                tag::CHUNK => {
                    let (rev, rest) = take_revision(body)?;
                    Some(Key::Chunk(rev, u32::from_be_bytes(rest.try_into().ok()?)))
                }
                tag::META => Some(Key::Meta(body)),
                tag::SUMMARY if body.is_empty() => Some(Key::Summary),
                _ => None,
            }
        }
    }

    /// The range `[start, end)` of all keys of one kind, to [`scan`](super::Backend::scan): `range(tag::BLOCK)`.
    pub fn range(tag: u8) -> ([u8; 1], [u8; 1]) {
        debug_assert!(tag < u8::MAX, "tag 0xff has no successor");
        ([tag], [tag.saturating_add(1)])
    }

    fn with_revision(tag: u8, rev: Revision, spare: usize) -> Vec<u8> {
        debug_assert!(rev.main >= 0, "revision {} is negative", rev.main);
        let mut bytes = Vec::with_capacity(13 + spare);
        bytes.push(tag);
        bytes.extend_from_slice(&rev.main.to_be_bytes());
        bytes.extend_from_slice(&rev.sub.to_be_bytes());
        bytes
    }

    fn take_revision(body: &[u8]) -> Option<(Revision, &[u8])> {
        let (main, rest) = body.split_first_chunk::<8>()?;
        let (sub, rest) = rest.split_first_chunk::<4>()?;
        let main = i64::from_be_bytes(*main);
        (main >= 0).then_some((Revision { main, sub: u32::from_be_bytes(*sub) }, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::keys::{Key, range, tag};
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write;
    use std::ops::ControlFlow;
    use std::path::Path;

    /// Runs one script of `tests/scripts/backend`: a line is a command, and the lines with `>` below it are its answer.
    ///
    /// ```text
    /// apply a=1 b=22 -c       one batch: two puts and a delete
    /// get a
    /// scan a..c               from a to before c; either side may be empty
    /// first 2                 a scan whose visitor stops after two
    /// sync
    /// restart                 sync, close, open
    /// rewrite [bytes]         start a rewrite and take one step, or all steps
    /// step bytes              take one step of the rewrite
    /// crash keep | full | eio in-memory backend only: lose power; the next apply, or sync, fails
    /// reopen                  after an error
    /// ```
    fn run_script<B: Backend>(name: &str, mut backend: B, restart: impl Fn(B) -> B, fault: impl Fn(&B, &str, usize)) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/backend").join(name);
        let script = std::fs::read_to_string(&path).unwrap();
        let mut actual = String::new();
        for line in script.lines().filter(|line| !line.starts_with('>')) {
            writeln!(actual, "{line}").unwrap();
            let (command, argument) = line.split_once(' ').unwrap_or((line, ""));
            let number = || argument.trim().parse().unwrap_or(usize::MAX);
            let mut seen = Vec::new();
            let mut collect = |from: &str, to: &str, most: usize| {
                let result = backend.scan(from.as_bytes(), to.as_bytes(), &mut |key, value| {
                    seen.push(format!("{}={}", String::from_utf8_lossy(key), String::from_utf8_lossy(value)));
                    Ok(seen.len() < most)
                });
                result.map(|()| if seen.is_empty() { "nothing".to_owned() } else { seen.join(" ") })
            };
            let done = |_| "ok".to_owned();
            let answer = match command {
                "" | "#" => continue,
                "apply" => {
                    let mut batch = Batch::default();
                    for change in argument.split_whitespace() {
                        match change.split_once('=') {
                            Some((key, value)) => batch.put(key.into(), Bytes::copy_from_slice(value.as_bytes())),
                            None => batch.delete(change.trim_start_matches('-').into()),
                        }
                    }
                    backend.apply(&batch).map(done)
                }
                "get" => backend.get(argument.as_bytes()).map(|value| match value {
                    Some(value) => String::from_utf8_lossy(&value).into_owned(),
                    None => "nothing".to_owned(),
                }),
                "scan" => {
                    let (from, to) = argument.split_once("..").unwrap();
                    collect(from, to, usize::MAX)
                }
                "first" => collect("", "", number()),
                "sync" => backend.sync().map(done),
                "reopen" => backend.reopen().map(done),
                "restart" => {
                    backend.sync().unwrap();
                    backend = restart(backend);
                    Ok("ok".to_owned())
                }
                "rewrite" => {
                    backend.start_rewrite().unwrap();
                    rewrite_all(&backend, number())
                }
                "step" => backend.rewrite_step(number()).map(|more| if more { "more" } else { "done" }.to_owned()),
                _ => {
                    fault(&backend, command, number());
                    Ok("ok".to_owned())
                }
            };
            let answer = answer.unwrap_or_else(|error| if error.is_disk_full() { "disk full".into() } else { "broken".into() });
            writeln!(actual, "> {answer}").unwrap();
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            return std::fs::write(&path, &actual).unwrap();
        }
        assert_eq!(actual, script, "{name}: run with UPDATE_SCRIPTS=1 to accept, then read the difference");
    }

    /// With a step's size: one step. Without: all of them.
    fn rewrite_all(backend: &dyn Backend, max_bytes: usize) -> Result<String> {
        let flow = std::iter::from_fn(|| Some(backend.rewrite_step(max_bytes.min(1 << 20)))).try_for_each(|step| match step {
            Ok(true) if max_bytes == usize::MAX => ControlFlow::Continue(()),
            other => ControlFlow::Break(other),
        });
        match flow {
            ControlFlow::Break(step) => step.map(|more| if more { "more" } else { "done" }.to_owned()),
            ControlFlow::Continue(()) => Ok("done".to_owned()),
        }
    }

    const COMMON: [&str; 3] = ["order.txt", "batches.txt", "rewrite.txt"];

    #[test]
    fn scripts_in_memory() {
        let fault = |mem: &mem::Mem, command: &str, number: usize| match command {
            "crash" => mem.crash(number),
            "full" => mem.fail_next_apply(mem::Fault::disk_full()),
            "eio" => mem.fail_next_sync(mem::Fault::broken()),
            other => panic!("unknown command {other}"),
        };
        let restart = |mem: mem::Mem| {
            mem.crash(0);
            mem
        };
        COMMON.iter().chain(&["crash.txt"]).for_each(|name| run_script(name, mem::Mem::new(), restart, fault));
    }

    #[test]
    fn scripts_on_sled() {
        for name in COMMON {
            let dir = tempfile::tempdir().unwrap();
            let open = || sled::Sled::open(dir.path()).unwrap();
            let restart = |backend| {
                drop(backend);
                open()
            };
            run_script(name, open(), restart, |_, command, _| panic!("unknown command {command}"));
        }
    }

    /// The bytes are on people's disks: this test is to be added to, never changed.
    #[test]
    fn keys_have_their_frozen_bytes() {
        let rev = Revision { main: 0x0102, sub: 3 };
        let hex = |key: Key<'_>| key.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(Key::Block(rev)), "01000000000000010200000003");
        assert_eq!(hex(Key::Dead(rev)), "02000000000000010200000003");
        assert_eq!(hex(Key::Chunk(rev, 7)), "0300000000000001020000000300000007");
        assert_eq!(hex(Key::Meta(b"term")), "047465726d");
        assert_eq!(hex(Key::Summary), "05");
    }

    fn revision() -> impl Strategy<Value = Revision> {
        (0..=i64::MAX, any::<u32>()).prop_map(|(main, sub)| Revision { main, sub })
    }

    proptest! {
        #[test]
        fn keys_come_back(rev in revision(), number: u32, name: Vec<u8>) {
            for key in [Key::Block(rev), Key::Dead(rev), Key::Chunk(rev, number), Key::Meta(&name), Key::Summary] {
                let bytes = key.encode();
                prop_assert_eq!(Key::decode(&bytes), Some(key));
                let (start, end) = range(bytes[0]);
                prop_assert!(start.as_slice() <= bytes.as_slice() && bytes.as_slice() < end.as_slice());
            }
        }

        #[test]
        fn block_keys_sort_as_their_revisions(a in revision(), b in revision()) {
            prop_assert_eq!(a.cmp(&b), Key::Block(a).encode().cmp(&Key::Block(b).encode()));
        }

        #[test]
        fn any_bytes_decode_to_a_key_of_the_same_bytes_or_to_none(bytes in proptest::collection::vec(0u8..8, 0..20)) {
            if let Some(key) = Key::decode(&bytes) {
                prop_assert_eq!(key.encode(), bytes);
            }
        }
    }

    #[test]
    fn keys_of_the_wrong_shape_are_refused() {
        let block = Key::Block(Revision { main: 1, sub: 0 }).encode();
        assert_eq!(Key::decode(&block[..12]), None);
        assert_eq!(Key::decode(&[block.as_slice(), &[0]].concat()), None);
        assert_eq!(Key::decode(&[tag::SUMMARY, 0]), None);
        assert_eq!(Key::decode(&[]), None);
        let mut negative = block;
        negative[1] = 0x80;
        assert_eq!(Key::decode(&negative), None);
    }
}
