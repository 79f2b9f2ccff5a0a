//! Files that are read again when they change, so that certificates are renewed without a restart.
//!
//! ```text
//! handshake at 10.0 s   the files are as they were          what was made of them is used
//! 10.5 s                server.crt is replaced
//! 10.7 s  handshake     looked at less than a second ago    the old one
//! 11.1 s  handshake     it has changed: read                the new one; if it is broken, the old one, and a line in the log
//! ```
//!
//! # Invariants
//! - The files are looked at before a handshake, once in [`LOOK_EVERY`] at most, by a thread that may wait for the disk. The handshake waits
//!   for it no longer than [`LOOK_PATIENCE`], so that a disk that does not answer, or threads that are all busy, keep nobody out.
//! - What is in use is whole: of files that do not fit together, as while they are being replaced, nothing is used. They are tried again
//!   at each look, and told of once.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::error::Result;
use crate::lock::lock;

/// How often files are looked at, at most. A certificate that was replaced is in use no later than at the first handshake after that.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a handshake waits for a look. Beyond it what is in use is used once more; a look goes on, and no other begins meanwhile.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);

/// What tells one state of a file from another; none for a file that is not there.
type Stamp = Option<(SystemTime, u64, u64)>;

/// Makes something of the files.
type Make<T> = Box<dyn Fn() -> Result<T> + Send + Sync>;

/// Something made of files, and made anew when they change. See the module's head.
pub(super) struct Watched<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    made: Arc<T>,
    looked: Instant,
    /// Whether a look is under way.
    looking: bool,
    /// How the files were when they were read last.
    stamps: Vec<Stamp>,
    /// Whether they could not be used then.
    failed: bool,
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Makes it for the first time.
    ///
    /// # Errors
    /// What `make` says.
    pub fn open(files: Vec<PathBuf>, make: impl Fn() -> Result<T> + Send + Sync + 'static) -> Result<Arc<Self>> {
        // Before they are read: what changes meanwhile is found by the next look.
        let stamps = stamps(&files);
        let state = State { made: Arc::new(make()?), looked: Instant::now(), looking: false, stamps, failed: false };
        Ok(Arc::new(Watched { files, make: Box::new(make), state: Mutex::new(state) }))
    }

    /// It, as the files are now, or have been lately.
    pub async fn current(self: &Arc<Self>) -> Arc<T> {
        {
            let mut state = lock(&self.state);
            if state.looking || state.looked.elapsed() < LOOK_EVERY {
                return state.made.clone();
            }
            (state.looking, state.looked) = (true, Instant::now());
        }
        let looking = Looking(self.clone());
        let look = tokio::task::spawn_blocking(move || looking.0.look());
        // It ends only with the server, and then the old one does as well.
        let _ = tokio::time::timeout(LOOK_PATIENCE, look).await;
        lock(&self.state).made.clone()
    }

    fn look(&self) {
        let stamps = stamps(&self.files);
        let (changed, failed) = {
            let state = lock(&self.state);
            (state.stamps != stamps, state.failed)
        };
        if !changed && !failed {
            return;
        }
        let made = (self.make)();
        let mut state = lock(&self.state);
        state.stamps = stamps;
        state.failed = made.is_err();
        match made {
            Ok(made) => {
                state.made = Arc::new(made);
                tracing::info!(files = ?self.files, "certificates have changed and are in use from now on");
            }
            Err(err) if changed => tracing::error!(error = %err, "certificates have changed, but cannot be used: those from before are"),
            Err(_) => {}
        }
    }
}

/// A look under way, also while it waits for a thread.
struct Looking<T>(Arc<Watched<T>>);

impl<T> Drop for Looking<T> {
    fn drop(&mut self) {
        lock(&self.0.state).looking = false;
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let data = std::fs::metadata(path).ok()?;
        Some((data.modified().ok()?, data.len(), data.ino()))
    };
    files.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[tokio::test]
    async fn what_is_broken_does_not_replace_what_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "1").unwrap();
        let (read, made) = (path.clone(), Arc::new(Mutex::new(0)));
        let count = made.clone();
        let watched = Watched::open(vec![path.clone()], move || {
            *count.lock().unwrap() += 1;
            let text = std::fs::read_to_string(&read).map_err(|err| Error::Config(err.to_string()))?;
            text.parse::<u32>().map_err(|err| Error::Config(err.to_string()))
        });
        let watched = watched.unwrap();
        assert_eq!(*watched.current().await, 1);
        tokio::time::pause();
        for (text, want, read) in
            [(None, 1, 1), (Some("22"), 22, 2), (Some("xxx"), 22, 3), (None, 22, 4), (Some("4444"), 4444, 5), (None, 4444, 5)]
        {
            if let Some(text) = text {
                std::fs::write(&path, text).unwrap();
                // Not looked at again so soon.
                assert_eq!(*made.lock().unwrap(), read - 1);
            }
            tokio::time::advance(LOOK_EVERY).await;
            assert_eq!((*watched.current().await, *made.lock().unwrap()), (want, read), "{text:?}");
        }
        std::fs::remove_file(&path).unwrap();
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(*watched.current().await, 4444);
    }

    /// A disk that does not answer: a handshake waits for it for a while, those behind it not at all; and what is read in the end is used.
    #[tokio::test]
    async fn a_look_that_takes_long_keeps_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "1").unwrap();
        let (answer, disk) = std::sync::mpsc::channel::<()>();
        let (read, disk) = (path.clone(), Mutex::new(disk));
        let watched = Watched::open(vec![path.clone()], move || {
            let text = std::fs::read_to_string(&read).map_err(|err| Error::Config(err.to_string()))?;
            if text != "1" {
                let _ = disk.lock().unwrap().recv();
            }
            text.parse::<u32>().map_err(|err| Error::Config(err.to_string()))
        });
        let watched = watched.unwrap();
        tokio::time::pause();
        std::fs::write(&path, "22").unwrap();
        tokio::time::advance(LOOK_EVERY).await;
        let ours = watched.clone();
        let waiting = tokio::spawn(async move { *ours.current().await });
        while !lock(&watched.state).looking {
            tokio::task::yield_now().await;
        }
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(*watched.current().await, 1);
        assert!(!waiting.is_finished());
        tokio::time::advance(LOOK_PATIENCE).await;
        assert_eq!(waiting.await.unwrap(), 1);
        answer.send(()).unwrap();
        while lock(&watched.state).looking {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(*watched.current().await, 22);
    }
}
