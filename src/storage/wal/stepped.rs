//! The log without threads, for simulations: who has opened it does their work, a step at a time, on a [simulated disk](super::sim).
//!
//! The code that writes, syncs and calls back is that of the threads. What is different is who waits: a frame is *taken* from the queue,
//! the simulation lets the time pass that a disk takes, and only then is it written and synced. If the power goes in between, the frame
//! is lost, or the first sectors of it are there, or all of it: see [`Stepper::lose_power`].

use super::flusher::{COMMITTED_NAP, Flusher, Step};
use super::sim::SimDisk;
use super::state::Shared;
use super::{Recovered, Wal, WalOptions, space};
use crate::error::Result;
use crate::lock::lock;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Does the work of a log's threads.
pub(crate) struct Stepper {
    shared: Arc<Shared>,
    flusher: Mutex<Flusher>,
}

/// Opens the log on a simulated disk.
///
/// # Errors
/// As [`Wal::open`].
pub(crate) fn open(disk: Arc<SimDisk>, options: WalOptions) -> Result<(Wal, Recovered, Arc<Stepper>)> {
    let (mut shared, opening, recovered) = Wal::recover(disk, options)?;
    let at = shared.mend(opening)?;
    shared.lock().accepted = true;
    shared.stepper = Some(tokio::sync::Notify::new());
    let shared = Arc::new(shared);
    let flusher = Mutex::new(Flusher::new(shared.clone(), at));
    Ok((
        Wal { shared: shared.clone(), opening: Mutex::default(), threads: Mutex::default() },
        recovered,
        Arc::new(Stepper { shared, flusher }),
    ))
}

impl Stepper {
    /// Writes what is to be written, each frame after the time that `delay` says. Ends when the log has failed, or was closed.
    pub async fn drive(self: Arc<Self>, mut delay: impl FnMut() -> Duration) {
        let Some(wanted) = &self.shared.stepper else { return };
        let mut napped = false;
        loop {
            while space::turn(&self.shared) {}
            let due = lock(&self.flusher).look(napped);
            match due {
                Ok(Some(Step::Flush)) => {
                    tokio::time::sleep(delay()).await;
                    if lock(&self.flusher).flush_taken().is_err() {
                        return;
                    }
                    napped = false;
                }
                Ok(Some(Step::Mark)) => {
                    if lock(&self.flusher).write_mark().is_err() {
                        return;
                    }
                }
                Ok(Some(Step::Close)) | Err(_) => return,
                Ok(None) if napped => {
                    wanted.notified().await;
                    napped = false;
                }
                Ok(None) => napped = tokio::time::timeout(COMMITTED_NAP, wanted.notified()).await.is_err(),
            }
        }
    }

    /// Writes and syncs everything that waits, now.
    ///
    /// # Errors
    /// What has ended the log.
    pub fn drain(&self) -> Result<()> {
        let mut flusher = lock(&self.flusher);
        while let Some(Step::Flush) = flusher.look(false)? {
            flusher.flush_taken()?;
            while space::turn(&self.shared) {}
        }
        Ok(())
    }

    /// The power goes at the `at`th next change of the disk, while the frame that is due is written; or right after it.
    pub fn lose_power(&self, disk: &SimDisk, at: u64) {
        disk.cut_in(at);
        let mut flusher = lock(&self.flusher);
        if let Ok(Some(Step::Flush)) = flusher.look(false) {
            // However it ends: nobody is there any more to hear of it.
            let _ = flusher.flush_taken();
        }
        if !disk.is_off() {
            disk.cut_now();
        }
    }
}
