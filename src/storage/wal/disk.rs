//! The few file operations that the log needs, as a seam.
//!
//! Two implementations: [`Directory`], the real one, and `sim::SimDisk` in the tests, which keeps what is written apart from what is
//! durable and can cut the power, fill up, or fail. Names are plain file names inside the one directory of the log.
//!
//! What callers rely on: `sync` of a file covers every byte and the length written before it; `sync` of the directory covers every
//! create, rename and remove before it; a failed `sync` says nothing about what is durable and must never be tried again.
//!
//! # Past the page cache
//! A frame goes to the disk with one direct write of whole blocks that returns when they are durable (`O_DIRECT`, `O_DSYNC`), where the file
//! system has that: 100 us instead of 116 for a frame of 400 bytes, and 46 us of CPU instead of 62, for nothing is copied into the page
//! cache, marked there, looked for and written back. The block in which a frame begins is written again, as it would be from the page
//! cache. Everything else is read and written through the page cache, which the kernel keeps in step.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::lock::lock;

/// What direct writes are made of: the largest block of the disks there are, and the size of a page.
const BLOCK: usize = 4096;

/// The largest write that goes past the page cache, for it is copied into blocks of its own. A larger one does not notice the difference.
const DIRECT_BYTES_MAX: usize = 1 << 20;

/// A directory of files.
pub(super) trait Disk: Send + Sync {
    /// Where `name` stands, for error texts.
    fn path(&self, name: &str) -> PathBuf;
    /// The names of all files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes an empty file for reading and writing, in place of one of the same name.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn DiskFile>>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creates, renames and removes durable.
    fn sync(&self) -> io::Result<()>;
    /// Bytes that files may still take, as far as that can be known.
    fn free(&self) -> u64;
}

/// An open file.
pub(super) trait DiskFile: Send + Sync {
    fn len(&self) -> io::Result<u64>;
    /// Fills the whole buffer or fails.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes the whole buffer or fails, then perhaps with some of it written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the file `len` bytes long and sets space aside for all of it, where the file system can; elsewhere only writing takes space.
    fn reserve(&self, len: u64) -> io::Result<()>;
    /// Makes everything written durable, with the length.
    fn sync(&self) -> io::Result<()>;
    /// Writes the whole buffer within the file's length, and returns when it is durable, or fails as `write_at` and `sync` do. What stands
    /// behind it, up to the end of its block, is lost: to be used by who writes from the front to the back.
    fn append_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)?;
        self.sync()
    }
}

/// The real directory.
pub(super) struct Directory {
    path: PathBuf,
    /// Whether syncs are carried out. If not, the kernel writes when it likes, and a power cut may leave anything.
    fsync: bool,
}

impl Directory {
    /// Opens the directory; with `create`, makes it (mode 0700) if it is missing, durably.
    pub(super) fn open(path: &Path, create: bool, fsync: bool) -> io::Result<Self> {
        if create {
            let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
            for dir in missing.into_iter().rev() {
                fs::DirBuilder::new().mode(0o700).create(dir)?;
                let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(Self { path: path.to_owned(), fsync })
    }

    fn file(&self, name: &str, file: File, writable: bool) -> Arc<dyn DiskFile> {
        let direct = if writable && self.fsync { Direct::open(&self.path.join(name)) } else { None };
        Arc::new(RealFile { file, fsync: self.fsync, direct: Mutex::new(direct) })
    }
}

impl Disk for Directory {
    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(self.path.join(name))?;
        Ok(self.file(name, file, true))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(writable).open(self.path.join(name))?;
        Ok(self.file(name, file, writable))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        if self.fsync { File::open(&self.path)?.sync_all() } else { Ok(()) }
    }

    fn free(&self) -> u64 {
        rustix::fs::statvfs(&self.path).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

struct RealFile {
    file: File,
    fsync: bool,
    /// None where the file system has no such thing, or has turned out not to.
    direct: Mutex<Option<Direct>>,
}

/// A way to the file past the page cache.
struct Direct {
    file: File,
    /// How long the file is known to be.
    len: u64,
    /// Room for the blocks that are written, with what it takes to begin at a multiple of [`BLOCK`] in memory. At most [`DIRECT_BYTES_MAX`]
    /// and three blocks.
    room: Vec<u8>,
    /// Where the last write ended, and what stands before that in its block.
    end: u64,
    tail: Vec<u8>,
}

impl Direct {
    #[cfg(target_os = "linux")]
    fn open(path: &Path) -> Option<Direct> {
        let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC;
        let file = OpenOptions::new().write(true).custom_flags(flags.bits() as i32).open(path).ok()?;
        Some(Direct { file, len: 0, room: Vec::new(), end: 0, tail: Vec::with_capacity(BLOCK) })
    }

    #[cfg(not(target_os = "linux"))]
    fn open(_: &Path) -> Option<Direct> {
        None
    }

    /// Whether so many bytes can be written there this way: not too many, and no block of them beyond the file's end.
    fn takes(&mut self, bytes: usize, offset: u64) -> io::Result<bool> {
        let to = (offset + bytes as u64).next_multiple_of(BLOCK as u64);
        if to > self.len {
            self.len = self.file.metadata()?.len();
        }
        Ok(bytes <= DIRECT_BYTES_MAX && to <= self.len)
    }

    /// Writes `buf`, durably, where it [takes](Self::takes) it; `false` if the file system does not have it this way: it is not yet written
    /// then, or only in part.
    fn append_at(&mut self, cached: &File, buf: &[u8], offset: u64) -> io::Result<bool> {
        let end = offset + buf.len() as u64;
        let (from, to) = (offset - offset % BLOCK as u64, end.next_multiple_of(BLOCK as u64));
        let before = (offset - from) as usize;
        if self.end != offset {
            self.tail.resize(before, 0);
            cached.read_exact_at(&mut self.tail, from)?;
        }
        let len = (to - from) as usize;
        self.room.resize(self.room.len().max(len + BLOCK), 0);
        let at = self.room.as_ptr().align_offset(BLOCK);
        let Some(blocks) = self.room.get_mut(at..at.saturating_add(len)) else { return Ok(false) };
        let (head, rest) = blocks.split_at_mut(before);
        let (body, behind) = rest.split_at_mut(buf.len());
        head.copy_from_slice(&self.tail);
        body.copy_from_slice(buf);
        behind.fill(0);
        match self.file.write_all_at(blocks, from) {
            Ok(()) => {}
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INVAL | Errno::OPNOTSUPP)) => return Ok(false),
            Err(e) => return Err(e),
        }
        self.end = end;
        self.tail.clear();
        let last = end - end % BLOCK as u64 - from;
        self.tail.extend_from_slice(blocks.get(last as usize..(end - from) as usize).unwrap_or_default());
        Ok(true)
    }
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Some(direct) = &mut *lock(&self.direct)
            && offset < direct.end
        {
            // What is kept of the last block may not be what stands there.
            direct.end = u64::MAX;
        }
        self.file.write_all_at(buf, offset)
    }

    fn append_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut direct = lock(&self.direct);
        if let Some(way) = &mut *direct
            && way.takes(buf.len(), offset)?
        {
            if way.append_at(&self.file, buf, offset)? {
                return Ok(());
            }
            *direct = None;
        }
        drop(direct);
        self.write_at(buf, offset)?;
        self.sync()
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn reserve(&self, len: u64) -> io::Result<()> {
        use rustix::io::Errno;
        match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            // EOPNOTSUPP and ENOTSUP are one number on Linux.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.file.set_len(len),
            Err(errno) => Err(errno.into()),
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn reserve(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    // fdatasync: the data and what is needed to find it again, the length included, but no time stamps.
    fn sync(&self) -> io::Result<()> {
        if self.fsync { self.file.sync_data() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole, in halves of a block and over many, after marks, and after writes that go the other way: what is read is what was written.
    #[test]
    fn what_is_appended_is_there_whichever_way_it_takes() {
        let len = 3 << 20;
        let here = tempfile::tempdir_in(".").unwrap();
        for (fsync, dir) in [(true, here.path().to_owned()), (false, here.path().join("again"))] {
            let disk = Directory::open(&dir, true, fsync).unwrap();
            let file = disk.create("file").unwrap();
            file.reserve(len).unwrap();
            let mut expected = vec![0; len as usize];
            let (mut at, mut seed) = (64, 1u64);
            let sizes = [1, 40, 400, 4095, 4096, 4097, 8000, 100_000, DIRECT_BYTES_MAX + 1].into_iter().cycle();
            for (n, size) in sizes.enumerate() {
                let bytes: Vec<u8> = (0..size)
                    .map(|_| {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        (seed >> 56) as u8
                    })
                    .collect();
                if at + size > len as usize {
                    break;
                }
                match n % 5 {
                    // A mark behind the last, which the next overwrites.
                    2 => file.write_at(&[9; 40], at as u64).unwrap(),
                    // What has nothing to do with it.
                    3 => {
                        file.write_at(&[7; 3], at as u64 - 10).unwrap();
                        expected[at - 10..at - 7].fill(7);
                    }
                    _ => {}
                }
                file.append_at(&bytes, at as u64).unwrap();
                expected[at..at + size].copy_from_slice(&bytes);
                at += size;
                let mut found = vec![0; at];
                file.read_at(&mut found, 0).unwrap();
                assert!(found == expected[..at], "after append {n} of {size} bytes");
            }
            // The last block of a file that is no multiple of it, and one beyond its end.
            let file = disk.create("odd").unwrap();
            file.reserve(5000).unwrap();
            file.append_at(&[1; 4000], 64).unwrap();
            file.append_at(&[2; 900], 4064).unwrap();
            assert_eq!(file.len().unwrap(), 5000);
            let mut found = [0; 900];
            disk.open("odd", true).unwrap().read_at(&mut found, 4064).unwrap();
            assert_eq!(found, [2; 900]);
            assert!(disk.open("odd", false).unwrap().append_at(&[1], 0).is_err());
        }
    }
}
