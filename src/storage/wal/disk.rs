//! The few file operations that the log needs, as a seam.
//!
//! Two implementations: [`Directory`], the real one, and `sim::SimDisk` in the tests, which keeps what is written apart from what is
//! durable and can cut the power, fill up, or fail. Names are plain file names inside the one directory of the log.
//!
//! What callers rely on: `sync` of a file covers every byte and the length written before it; `sync` of the directory covers every
//! create, rename and remove before it; a failed `sync` says nothing about what is durable and must never be tried again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

    fn file(&self, file: File) -> Arc<dyn DiskFile> {
        Arc::new(RealFile { file, fsync: self.fsync })
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
        Ok(self.file(file))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(OpenOptions::new().read(true).write(writable).open(self.path.join(name))?))
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
}

struct RealFile {
    file: File,
    fsync: bool,
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
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
