//! A copy of a generation, kept while it is not known whether what stands in it is whole.
//!
//! sled changes what it opens, and what it takes for the end of its log it overwrites; see [`inspect`](super::inspect). Where there is
//! a doubt, the directory is copied before. When the state has been found whole the copy goes; when it is refused, the copy takes the
//! directory's place, so that a start which fails leaves everything as it was, for another try, another release, or somebody who can
//! mend it.
//!
//! ```text
//! gen-0000002.keep.tmp/   being made, or being removed: means nothing
//! gen-0000002.keep/       whole and synced: as long as it is there, it counts, and gen-0000002/ does not
//! gen-0000002.undone/     what a refused start has made of it: on its way out
//! ```

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::dir::sync_dir;
use crate::error::{Error, Result};

/// A copy of the directory `path`, beside it.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
    name.push(ending);
    path.with_file_name(name)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, err)),
        _ => Ok(()),
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|err| Error::io("rename", from, err))
}

/// Makes what was renamed beside the directory durable.
fn sync_beside(path: &Path) -> Result<()> {
    sync_dir(path.parent().unwrap_or(path))
}

impl Kept {
    /// Copies the directory and what is in it, and syncs the copy.
    ///
    /// # Errors
    /// `Io`; nothing is left of the copy then.
    pub fn make(path: &Path) -> Result<Kept> {
        let unfinished = beside(path, ".keep.tmp");
        let made = copy_dir(path, &unfinished).and_then(|()| {
            rename(&unfinished, &beside(path, ".keep"))?;
            sync_beside(path)
        });
        if let Err(err) = made {
            // The next start tries again.
            let _ = remove(&unfinished);
            return Err(err);
        }
        Ok(Kept { path: path.to_owned() })
    }

    /// Ends what an earlier process has begun: a copy that is there takes its directory's place.
    ///
    /// # Errors
    /// `Io`.
    pub fn recover(path: &Path) -> Result<()> {
        remove(&beside(path, ".keep.tmp"))?;
        let kept = beside(path, ".keep");
        if kept.exists() {
            tracing::warn!(path = %path.display(), "a start that did not get to its end is undone");
            Kept { path: path.to_owned() }.restore()?;
        }
        remove(&beside(path, ".undone"))
    }

    /// The copy is not needed any more.
    ///
    /// # Errors
    /// `Io` when it may still count at the next start.
    pub fn release(self) -> Result<()> {
        let (kept, unfinished) = (beside(&self.path, ".keep"), beside(&self.path, ".keep.tmp"));
        // Renamed first: a half of it must not count.
        rename(&kept, &unfinished)?;
        sync_beside(&self.path)?;
        if let Err(error) = remove(&unfinished) {
            tracing::warn!(path = %kept.display(), %error, "could not remove a copy that is not needed any more; the next start tries again");
        }
        Ok(())
    }

    /// The copy takes its directory's place.
    ///
    /// # Errors
    /// `Io`; the next start tries again.
    pub fn restore(self) -> Result<()> {
        let undone = beside(&self.path, ".undone");
        if self.path.exists() {
            remove(&undone)?;
            rename(&self.path, &undone)?;
        }
        rename(&beside(&self.path, ".keep"), &self.path)?;
        sync_beside(&self.path)?;
        remove(&undone)
    }
}

/// Copies a directory with what is below it: files and directories are all that sled makes.
fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    remove(to)?;
    DirBuilder::new().mode(0o700).create(to).map_err(|err| Error::io("create the directory", to, err))?;
    for entry in fs::read_dir(from).map_err(|err| Error::io("list", from, err))? {
        let entry = entry.map_err(|err| Error::io("list", from, err))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(|err| Error::io("look at", &from, err))?.is_dir() {
            copy_dir(&from, &to)?;
        } else {
            // Shares the blocks where the file system can.
            let copied = fs::copy(&from, &to).and_then(|_| fs::File::open(&to)?.sync_all());
            copied.map_err(|err| Error::io("keep a copy of", &from, err))?;
        }
    }
    sync_dir(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn generation(dir: &Path) -> PathBuf {
        let path = dir.join("gen-0000001");
        fs::create_dir_all(path.join("blobs")).unwrap();
        fs::write(path.join("db"), "as it was").unwrap();
        path
    }

    #[test]
    fn a_copy_goes_or_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = generation(dir.path());
        let kept = Kept::make(&path).unwrap();
        fs::write(path.join("db"), "changed").unwrap();
        kept.release().unwrap();
        assert_eq!((fs::read_to_string(path.join("db")).unwrap().as_str(), there(dir.path())), ("changed", vec!["gen-0000001".into()]));
        let kept = Kept::make(&path).unwrap();
        fs::write(path.join("db"), "changed again").unwrap();
        fs::write(path.join("snap.1"), "new").unwrap();
        kept.restore().unwrap();
        assert_eq!((fs::read_to_string(path.join("db")).unwrap().as_str(), there(dir.path())), ("changed", vec!["gen-0000001".into()]));
        assert_eq!(there(&path), ["blobs", "db"]);
    }

    #[test]
    fn wherever_it_was_cut_off() {
        // What is there when the process dies, and what the generation then holds.
        let whole: &[(&[&str], &str)] = &[
            (&["gen-0000001.keep.tmp"], "as it was"),
            (&["gen-0000001.keep"], "kept"),
            (&["gen-0000001.keep", "gen-0000001.undone"], "kept"),
            (&["gen-0000001.undone"], "as it was"),
            (&[], "as it was"),
        ];
        for (others, expected) in whole {
            for gone in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let path = generation(dir.path());
                for other in *others {
                    fs::create_dir(dir.path().join(other)).unwrap();
                    fs::write(dir.path().join(other).join("db"), "kept").unwrap();
                }
                // The directory itself is away only between the two renames of a restore.
                if gone {
                    if *expected != "kept" {
                        continue;
                    }
                    fs::remove_dir_all(&path).unwrap();
                }
                Kept::recover(&path).unwrap();
                assert_eq!((&*fs::read_to_string(path.join("db")).unwrap(), there(dir.path())), (*expected, vec!["gen-0000001".into()]));
            }
        }
    }
}
