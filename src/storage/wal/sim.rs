//! A disk in memory that can fail: it keeps, for each sector of 512 bytes, every version written since the last sync, and a power cut
//! leaves an arbitrary one of them. Creates, renames and removes survive a cut in order, up to an arbitrary one.

use super::disk::{Disk, DiskFile};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

const SECTOR: usize = 512;
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

/// splitmix64
#[derive(Clone)]
pub(crate) struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

#[derive(Clone, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Sector -> its versions since the last sync.
    dirty: BTreeMap<usize, Vec<Vec<u8>>>,
}

#[derive(Clone)]
enum NameOp {
    Set(String, u64),
    Remove(String),
    Rename(String, String),
}

fn apply(names: &mut BTreeMap<String, u64>, op: &NameOp) {
    match op {
        NameOp::Set(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        NameOp::Remove(name) => {
            names.remove(name);
        }
        NameOp::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
    }
}

#[derive(Clone)]
struct Inner {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    pending: Vec<NameOp>,
    next_inode: u64,
    rng: Rng,
    /// No power: every call fails. `era` makes handles from before a cut useless for ever.
    off: bool,
    era: u64,
    /// How many in a hundred sectors survive a cut, if it is not left to chance.
    survival: Option<usize>,
    /// After so many more changes, the power goes.
    cut_in: Option<u64>,
    /// After so many more syncs of files or writes, one fails.
    fail_sync_in: Option<u64>,
    fail_write_in: Option<u64>,
    free: u64,
    hold_syncs: bool,
    hold_creates: bool,
    waiting: u64,
    file_syncs: u64,
}

pub(crate) struct SimDisk {
    shared: Arc<(Mutex<Inner>, Condvar)>,
}

struct SimFile {
    shared: Arc<(Mutex<Inner>, Condvar)>,
    inode: u64,
    era: u64,
}

fn lock(shared: &(Mutex<Inner>, Condvar)) -> MutexGuard<'_, Inner> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Inner {
    fn alive(&self, era: u64) -> io::Result<()> {
        if self.off || era != self.era { Err(error(EIO)) } else { Ok(()) }
    }

    /// Counts a change; `true` if the power goes now.
    fn tick(&mut self) -> bool {
        match &mut self.cut_in {
            Some(0) => {
                self.cut();
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn cut(&mut self) {
        self.cut_in = None;
        self.off = true;
        self.era += 1;
        let chance = self.survival.unwrap_or([0, 10, 50, 90, 100][self.rng.below(5)]);
        for inode in self.inodes.values_mut() {
            let mut rng = self.rng.clone();
            let keep_len = rng.below(100) < chance;
            let len = if keep_len { inode.live.len() } else { inode.durable.len().min(inode.live.len()) };
            inode.durable.resize(inode.live.len().max(inode.durable.len()), 0);
            for (sector, versions) in std::mem::take(&mut inode.dirty) {
                if rng.below(100) < chance {
                    // Mostly the newest, but a version that was overwritten since may have got there too.
                    let which = if rng.below(4) > 0 { versions.len() - 1 } else { rng.below(versions.len()) };
                    let start = sector * SECTOR;
                    let end = (start + versions[which].len()).min(inode.durable.len());
                    inode.durable[start..end].copy_from_slice(&versions[which][..end - start]);
                }
            }
            self.rng = rng;
            inode.durable.truncate(len);
            inode.live = inode.durable.clone();
        }
        let survive = self.rng.below(self.pending.len() + 1);
        for op in self.pending.drain(..).take(survive) {
            apply(&mut self.durable_names, &op);
        }
        self.names = self.durable_names.clone();
        let kept: Vec<u64> = self.names.values().copied().collect();
        self.inodes.retain(|inode, _| kept.contains(inode));
    }

    fn name_op(&mut self, op: NameOp) -> io::Result<()> {
        apply(&mut self.names, &op);
        self.pending.push(op);
        if self.tick() { Err(error(EIO)) } else { Ok(()) }
    }
}

impl SimDisk {
    pub fn new(seed: u64) -> Arc<Self> {
        let inner = Inner {
            inodes: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
            next_inode: 1,
            rng: Rng(seed),
            off: false,
            era: 0,
            survival: None,
            cut_in: None,
            fail_sync_in: None,
            fail_write_in: None,
            free: u64::MAX,
            hold_syncs: false,
            hold_creates: false,
            waiting: 0,
            file_syncs: 0,
        };
        Arc::new(Self { shared: Arc::new((Mutex::new(inner), Condvar::new())) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.shared)
    }

    /// An independent copy, with what is live taken as durable.
    pub fn copy(&self) -> Arc<Self> {
        let mut inner = self.inner().clone();
        inner.pending.clear();
        inner.durable_names = inner.names.clone();
        for inode in inner.inodes.values_mut() {
            inode.durable = inode.live.clone();
            inode.dirty.clear();
        }
        (inner.off, inner.cut_in, inner.fail_sync_in, inner.fail_write_in) = (false, None, None, None);
        Arc::new(Self { shared: Arc::new((Mutex::new(inner), Condvar::new())) })
    }

    /// The power goes after `changes` more changes; 0: with the next one.
    pub fn cut_in(&self, changes: u64) {
        self.inner().cut_in = Some(changes);
    }

    /// The power goes, and nothing survives that was not synced.
    pub fn cut_losing_all(&self) {
        let mut inner = self.inner();
        inner.survival = Some(0);
        inner.cut();
        inner.survival = None;
    }

    pub fn cut_now(&self) {
        self.inner().cut();
    }

    /// As if the process were killed: what was written stays, what is not durable is still not, and old handles are useless.
    pub fn kill(&self) {
        let mut inner = self.inner();
        inner.era += 1;
        inner.off = true;
    }

    pub fn is_off(&self) -> bool {
        self.inner().off
    }

    pub fn power_on(&self) {
        let mut inner = self.inner();
        (inner.off, inner.cut_in, inner.fail_sync_in, inner.fail_write_in) = (false, None, None, None);
    }

    pub fn fail_sync_in(&self, syncs: u64) {
        self.inner().fail_sync_in = Some(syncs);
    }

    pub fn fail_write_in(&self, writes: u64) {
        self.inner().fail_write_in = Some(writes);
    }

    pub fn set_free(&self, bytes: u64) {
        self.inner().free = bytes;
    }

    pub fn hold_syncs(&self, hold: bool) {
        self.inner().hold_syncs = hold;
        self.shared.1.notify_all();
    }

    pub fn hold_creates(&self, hold: bool) {
        self.inner().hold_creates = hold;
        self.shared.1.notify_all();
    }

    /// Waits until a call is held.
    pub fn wait_for_held(&self) {
        let mut inner = self.inner();
        while inner.waiting == 0 {
            inner = self.shared.1.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn file_syncs(&self) -> u64 {
        self.inner().file_syncs
    }

    pub fn names(&self) -> Vec<String> {
        self.inner().names.keys().cloned().collect()
    }

    pub fn content(&self, name: &str) -> Vec<u8> {
        let inner = self.inner();
        inner.names.get(name).map(|inode| inner.inodes[inode].live.clone()).unwrap_or_default()
    }

    /// Changes what a file holds, durably.
    pub fn tamper(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut inner = self.inner();
        let inode = inner.names[name];
        let inode = inner.inodes.get_mut(&inode).expect("named");
        change(&mut inode.live);
        inode.durable = inode.live.clone();
        inode.dirty.clear();
    }
}

impl Disk for SimDisk {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("log").join(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let inner = self.inner();
        inner.alive(inner.era)?;
        Ok(inner.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut inner = self.inner();
        inner.waiting += 1;
        self.shared.1.notify_all();
        while inner.hold_creates {
            inner = self.shared.1.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.waiting -= 1;
        inner.alive(inner.era)?;
        let inode = inner.next_inode;
        inner.next_inode += 1;
        inner.inodes.insert(inode, Inode::default());
        inner.name_op(NameOp::Set(name.to_owned(), inode))?;
        Ok(Arc::new(SimFile { shared: self.shared.clone(), inode, era: inner.era }))
    }

    fn open(&self, name: &str, _writable: bool) -> io::Result<Arc<dyn DiskFile>> {
        let inner = self.inner();
        inner.alive(inner.era)?;
        let inode = *inner.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { shared: self.shared.clone(), inode, era: inner.era }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.inner();
        inner.alive(inner.era)?;
        assert!(inner.names.contains_key(from), "rename {from} to {to}");
        if let Some(replaced) = inner.names.get(to) {
            assert!(!to.ends_with(".spare"), "{to} is there already");
            let len = inner.inodes[replaced].live.len() as u64;
            inner.free = inner.free.saturating_add(len);
        }
        inner.name_op(NameOp::Rename(from.to_owned(), to.to_owned()))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut inner = self.inner();
        inner.alive(inner.era)?;
        let inode = *inner.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        let len = inner.inodes[&inode].live.len() as u64;
        inner.free = inner.free.saturating_add(len);
        inner.name_op(NameOp::Remove(name.to_owned()))
    }

    fn free(&self) -> u64 {
        self.inner().free
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.inner();
        inner.alive(inner.era)?;
        if inner.tick() {
            return Err(error(EIO));
        }
        let inner = &mut *inner;
        for op in inner.pending.drain(..) {
            apply(&mut inner.durable_names, &op);
        }
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        let inner = lock(&self.shared);
        inner.alive(self.era)?;
        Ok(inner.inodes[&self.inode].live.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = lock(&self.shared);
        inner.alive(self.era)?;
        let file = &inner.inodes[&self.inode].live;
        let from = file.get(offset as usize..offset as usize + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = lock(&self.shared);
        inner.alive(self.era)?;
        let fails = inner.fail_write_in == Some(0);
        inner.fail_write_in = inner.fail_write_in.and_then(|left| left.checked_sub(1));
        let part = if fails { inner.rng.below(buf.len() + 1) } else { buf.len() };
        let (buf, start) = (&buf[..part], offset as usize);
        let file = inner.inodes.get_mut(&self.inode).expect("open");
        let end = start + buf.len();
        assert!(end <= file.live.len() || offset == 0, "a write beyond what was reserved: {end} > {}", file.live.len());
        file.live[start..end].copy_from_slice(buf);
        for sector in start / SECTOR..end.div_ceil(SECTOR) {
            let version = file.live[sector * SECTOR..((sector + 1) * SECTOR).min(file.live.len())].to_vec();
            file.dirty.entry(sector).or_default().push(version);
        }
        if inner.tick() || fails { Err(error(EIO)) } else { Ok(()) }
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        let mut inner = lock(&self.shared);
        inner.alive(self.era)?;
        let inner = &mut *inner;
        let file = inner.inodes.get_mut(&self.inode).expect("open");
        let more = len.saturating_sub(file.live.len() as u64);
        if more > inner.free {
            return Err(error(ENOSPC));
        }
        if inner.free != u64::MAX {
            inner.free -= more;
        }
        file.live.resize(len as usize, 0);
        if inner.tick() { Err(error(EIO)) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = lock(&self.shared);
        inner.waiting += 1;
        self.shared.1.notify_all();
        while inner.hold_syncs {
            inner = self.shared.1.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.waiting -= 1;
        inner.alive(self.era)?;
        if inner.tick() {
            return Err(error(EIO));
        }
        inner.file_syncs += 1;
        let fails = inner.fail_sync_in == Some(0);
        inner.fail_sync_in = inner.fail_sync_in.and_then(|left| left.checked_sub(1));
        let file = inner.inodes.get_mut(&self.inode).expect("open");
        let dirty = std::mem::take(&mut file.dirty);
        if fails {
            // As Linux does: the pages are clean now, and what they hold is nowhere but in memory.
            return Err(error(EIO));
        }
        file.durable.resize(file.live.len(), 0);
        for sector in dirty.into_keys() {
            let (start, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(file.live.len()));
            file.durable[start..end].copy_from_slice(&file.live[start..end]);
        }
        Ok(())
    }
}
