//! Backups: made on demand and on a schedule, verified, kept and forgotten, and made into a new cluster again.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let dir = tempfile::tempdir()?;
//! # let at = |name: &str| dir.path().join(name);
//! # let mut config = quorate::Config::default();
//! # config.data_dir = Some(at("data"));
//! # config.listen_client_urls.clear();
//! # config.listen_peer_urls.clear();
//! use quorate::backup::{BackupConfig, Backups, RestoreOptions, restore};
//!
//! let server = quorate::Server::start(config.clone()).await?;
//! server.client().put("volumes/a", "3 replicas").await?;
//!
//! let mut wanted = BackupConfig::new(at("backups"));
//! wanted.schedule = Some("0 */12 * * *".into());
//! let backups = Backups::start(&server, wanted)?;
//! let made = backups.back_up().await?; // and one at noon and at midnight
//! assert_eq!((made.revision, backups.status().await?.backups), (2, vec![made.clone()]));
//! backups.shutdown().await;
//! server.shutdown().await?;
//!
//! // Offline, and without the cluster: what it held is kept aside.
//! let restored = restore(&made.path, &RestoreOptions::new(at("data")))?;
//! assert!(restored.aside.is_some());
//! let server = quorate::Server::start(config).await?;
//! assert!(server.client().get("volumes/a").await?.is_some());
//! assert_eq!(server.client().revision(), 1_000_000_002);
//! # server.shutdown().await?;
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `mod` | the tries, one at a time, and what came of them |
//! | `schedule` | when the next one is due |
//! | `store` | the place: a directory, a process's own or shared: names, fsync, retention |
//! | `bucket`, `dial` | the place: an object store, and the way there (cargo feature `object-store`) |
//! | `format` | the seam: what is in a file |
//! | `restore` | from a file to the data directory of a new cluster |
//!
//! # Invariants
//! - One backup is made at a time. One that is asked for waits its turn; a scheduled one is left out instead.
//! - What is listed was synced, read back and found sound when it was written. A try that fails, on a full disk above all, leaves nothing
//!   behind, says why, and hinders none of those that follow.
//! - Nothing is removed before a new backup is there. So there has to be room for one more than are kept.
//! - The figures of a member or a node, in metrics and health, are of the backups of its own cluster. Listings show all that there are, and
//!   say of which cluster each is.
//! - A directory that nodes of the embedded mode share is held by one of them at a time, for one backup; the others wait a little for it.
//! - Only backups of the cluster that was just backed up are counted and removed. What a lost cluster has left in the directory stays, until
//!   somebody removes it: a restored or newly founded one has another id.
//!
//! # Caveats
//! - An object store is held by nobody, and is shared by nature: who leads makes the scheduled ones, and what two make at the same time are
//!   two backups. `bucket` says what is promised there, and what not.
//! - A backup is what one member holds, and is no larger a promise than its disk's. Each member may make its own, in a directory of its own;
//!   a learner may not, for it cannot tell how far it has fallen behind.
//! - What the platform did after the backup is not in it: after a restore, what hangs on the store may have moved on.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::Client;
use crate::config::Where;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::Counters;
use crate::server::Server;

#[cfg(feature = "object-store")]
mod bucket;
#[cfg(feature = "object-store")]
mod dial;
mod format;
mod restore;
mod schedule;
mod store;

pub use crate::config::{BUMP_REVISION, BackupConfig, JITTER_MAX, RestoreOptions, StoreOptions};
pub use restore::{Restored, restore};
pub(crate) use restore::{free_names, restore_as};
pub use store::{BackupInfo, LastTry, Soundness};

use schedule::{Schedule, sleep_until};
use store::Place;

/// Bytes that are handed to the disk in one go. Beyond it the rest of the backup waits until they are written.
const WRITE_BYTES: usize = 1 << 20;

/// What is known of the backups of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listing {
    /// Those that are there, oldest first.
    pub backups: Vec<BackupInfo>,
    /// What came of the last try; none before the first.
    pub last_try: Option<LastTry>,
}

/// Lists the backups of a directory, or at the URL of an object store, without reading more than how they begin. Nobody need be making any.
/// It blocks on the disk, or on the network.
///
/// # Errors
/// `Io`; `Config` for a URL that is none.
pub fn list(dir: impl AsRef<Path>) -> Result<Listing> {
    list_with(dir, &StoreOptions::default())
}

/// As [`list`], with what an object store is told besides its variables: the [options](BackupConfig::store_options) by which backups are
/// made there. For a directory they mean nothing.
///
/// # Errors
/// As [`list`]; `Config` for an option that the store has not.
pub fn list_with(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Listing> {
    let place = store::place_to_read(dir.as_ref(), options)?;
    Ok(Listing { backups: place.list()?, last_try: place.noted() })
}

/// As [`list`], and reads each of them from end to end. It blocks on the disk for as long as that takes.
///
/// # Errors
/// `Io` for the directory. One that is damaged, or cannot be read, says so [itself](BackupInfo::soundness).
pub fn list_verified(dir: impl AsRef<Path>) -> Result<Listing> {
    list_verified_with(dir, &StoreOptions::default())
}

/// As [`list_verified`], with what an object store is told, as [`list_with`] has it.
///
/// # Errors
/// As [`list_verified`]; `Config` for an option that the store has not.
pub fn list_verified_with(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Listing> {
    let place = store::place_to_read(dir.as_ref(), options)?;
    let mut listing = Listing { backups: place.list()?, last_try: place.noted() };
    for backup in &mut listing.backups {
        let read = place.open(&backup.name).and_then(|source| format::verify(source, &backup.path));
        backup.soundness = match read {
            Ok(facts) if facts.revision == backup.revision => Soundness::Verified,
            Ok(facts) => Soundness::Damaged(format!("it shows revision {}, not what its name says", facts.revision)),
            Err(err) => Soundness::Damaged(err.to_string()),
        };
    }
    Ok(listing)
}

/// When the newest of one cluster's was made. One of a time that is yet to come says nothing of how old that is.
pub(crate) fn newest(backups: &[BackupInfo], cluster_id: Option<u64>, now: SystemTime) -> Option<SystemTime> {
    let own = backups.iter().rev().filter(|backup| backup.cluster_id.is_some() && backup.cluster_id == cluster_id);
    own.map(|backup| backup.created).find(|created| *created <= now)
}

/// What [`Backups`] are at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Those that are there, oldest first.
    pub backups: Vec<BackupInfo>,
    /// What came of the last try, of an earlier process, too; none before the first.
    pub last_try: Option<LastTry>,
    /// Whether one is being made.
    pub is_running: bool,
    /// When the next one is due by the schedule, its delay by chance included; none without a schedule.
    pub next: Option<SystemTime>,
}

/// Backups of one store, as long as this is not dropped. See the [module](self).
pub struct Backups {
    shared: Arc<Shared>,
    runtime: Handle,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Tells who makes the scheduled backups, where several could.
pub(crate) type IsOurs = Arc<dyn Fn() -> bool + Send + Sync>;

struct Shared {
    client: Client,
    config: BackupConfig,
    place: Arc<dyn Place>,
    counters: Option<Arc<Counters>>,
    /// Whether those that the schedule asks for are this process's to make, now.
    is_ours: IsOurs,
    /// Held while one is being made. It is never tried but by who would make one: a scheduled backup is left out when it is held.
    turn: tokio::sync::Mutex<()>,
    /// Held while the directory is listed: however many ask of one that does not answer, one thread waits for it.
    listing: tokio::sync::Mutex<()>,
    is_running: AtomicBool,
    last_try: Mutex<Option<LastTry>>,
    next: Mutex<Option<SystemTime>>,
    /// The work on the disk, too: who shuts down waits for it.
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Backups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backups").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

impl Backups {
    /// Takes hold of the directory, and begins to follow the schedule, if there is one. The server's metrics tell of it.
    ///
    /// Call it on a tokio runtime: that one then does the work, but for what the server does. An object store is not waited for: whether it
    /// is there, and what is in it, shows later.
    ///
    /// # Errors
    /// `Config`; `Locked` when somebody else makes backups in that directory; `Io`.
    pub fn start(server: &Server, config: BackupConfig) -> Result<Backups> {
        Backups::alone(server.client(), config, Some((server.metrics().counters.clone(), server.cluster_id())))
    }

    /// As [`start`](Self::start), of whatever is behind a client: a member in this process or in another. It has to be quorate's; what an
    /// etcd gives is not taken for a backup.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn of(client: Client, config: BackupConfig) -> Result<Backups> {
        Backups::alone(client, config, None)
    }

    /// As [`of`](Self::of), with a directory that others may use, too, each for the time of one backup; it need not be there yet. Of those that
    /// the schedule asks for are made which `is_ours` says so of, when they are due.
    ///
    /// # Errors
    /// `Config`.
    pub(crate) fn shared(client: Client, config: BackupConfig, counters: Arc<Counters>, is_ours: IsOurs) -> Result<Backups> {
        config.validate()?;
        let stop = CancellationToken::new();
        let place = store::place(&config, true, &stop)?;
        counters.backups.begin(SystemTime::now(), None);
        Backups::begin(client, config, Some(counters), (place, stop), None, is_ours)
    }

    /// The counters are of a member of that cluster.
    fn alone(client: Client, config: BackupConfig, counters: Option<(Arc<Counters>, u64)>) -> Result<Backups> {
        config.validate()?;
        let stop = CancellationToken::new();
        let place = store::place(&config, false, &stop)?;
        let now = SystemTime::now();
        // An object store may take its time, and this is no thread to wait on.
        let is_far = matches!(Where::read(&config.dir), Ok(Where::Store(_)));
        let (there, noted) = if is_far { (Vec::new(), None) } else { (place.list()?, place.noted()) };
        if let Some((counters, cluster_id)) = &counters {
            counters.backups.begin(now, newest(&there, Some(*cluster_id), now));
        }
        let cluster_id = counters.as_ref().filter(|_| is_far).map(|(_, cluster_id)| *cluster_id);
        let counters = counters.map(|(counters, _)| counters);
        let backups = Backups::begin(client, config, counters, (place, stop), noted, Arc::new(|| true))?;
        if let Some(cluster_id) = cluster_id {
            let (shared, stop) = (backups.shared.clone(), backups.stop.clone());
            let look = async move { stop.run_until_cancelled(shared.look(cluster_id)).await };
            backups.tasks.spawn_on(look, &backups.runtime);
        }
        Ok(backups)
    }

    fn begin(
        client: Client,
        config: BackupConfig,
        counters: Option<Arc<Counters>>,
        (place, stop): (Arc<dyn Place>, CancellationToken),
        noted: Option<LastTry>,
        is_ours: IsOurs,
    ) -> Result<Backups> {
        let schedule = config.cron()?.map(|cron| Schedule::new(cron, config.jitter));
        let runtime = Handle::try_current().map_err(|_| Error::Config("backups need a tokio runtime to begin on".into()))?;
        let last_try = Mutex::new(noted);
        let (turn, listing, is_running, next) = Default::default();
        let tasks = TaskTracker::new();
        let (work, stopping) = (tasks.clone(), stop.clone());
        let shared =
            Shared { client, config, place, counters, is_ours, turn, listing, is_running, last_try, next, tasks: work, stop: stopping };
        let backups = Backups { shared: Arc::new(shared), runtime, tasks, stop };
        if let Some(schedule) = schedule {
            let (shared, stop) = (backups.shared.clone(), backups.stop.clone());
            let follow = async move { stop.run_until_cancelled(shared.follow(schedule)).await };
            backups.tasks.spawn_on(follow, &backups.runtime);
        }
        Ok(backups)
    }

    /// Makes a backup now, or when the one that is being made is done. It goes on when the future is dropped.
    ///
    /// # Errors
    /// As a linearizable read; `Io` for the directory: with the kind [`NoSpace`](crate::ErrorKind::NoSpace) its disk is full; `Corrupt` when
    /// what was written does not read back; `Stopped` after [`shutdown`](Self::shutdown). Nothing is left of it then.
    pub async fn back_up(&self) -> Result<BackupInfo> {
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let run = async move {
            let make = async {
                let _turn = shared.turn.lock().await;
                shared.attempt().await
            };
            stop.run_until_cancelled(make).await.unwrap_or(Err(Error::Stopped))
        };
        self.tasks.spawn_on(run, &self.runtime).await.map_err(ended)?
    }

    /// What is there, and what is going on.
    ///
    /// # Errors
    /// `Io` for the directory.
    pub async fn status(&self) -> Result<Status> {
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let run = async move {
            let list = async {
                let _listing = shared.listing.lock().await;
                let place = shared.place.clone();
                shared.blocking(move || Ok((place.list()?, place.noted()))).await
            };
            stop.run_until_cancelled(list).await.unwrap_or(Err(Error::Stopped))
        };
        let (backups, noted) = self.runtime.spawn(run).await.map_err(ended)??;
        let is_running = self.is_running();
        // What others have noted where the directory is shared may be newer than what this process has tried.
        let own = self.last_try();
        let last_try = if noted.as_ref().map(|noted| noted.at) > own.as_ref().map(|own| own.at) { noted } else { own };
        Ok(Status { backups, last_try, is_running, next: *lock(&self.shared.next) })
    }

    /// Whether one is being made.
    pub(crate) fn is_running(&self) -> bool {
        self.shared.is_running.load(Ordering::Relaxed)
    }

    /// What came of the last try, as far as it is known without a look at the directory.
    pub(crate) fn last_try(&self) -> Option<LastTry> {
        lock(&self.shared.last_try).clone()
    }

    /// Ends the schedule, gives up the backup that is being made, and lets go of the directory.
    pub async fn shutdown(self) {
        self.close().await;
    }

    /// The same for one that others have a share in. Who waits no longer leaves behind what waits for the disk, on its thread.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.shared.place.ended().await;
    }
}

impl Drop for Backups {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    /// Looks how old the newest is that is there already.
    async fn look(&self, cluster_id: u64) {
        let _listing = self.listing.lock().await;
        let place = self.place.clone();
        match (self.blocking(move || place.list()).await, &self.counters) {
            (Ok(there), Some(counters)) => {
                let now = SystemTime::now();
                counters.backups.begin(now, newest(&there, Some(cluster_id), now));
            }
            (Err(error), _) => tracing::warn!(%error, "the store of backups cannot be looked at"),
            (Ok(_), None) => {}
        }
    }

    /// Makes backups when they are due.
    async fn follow(self: Arc<Self>, schedule: Schedule) {
        let mut after = SystemTime::now();
        loop {
            let Some(due) = schedule.next(after) else {
                tracing::warn!(schedule = self.config.schedule, "the schedule of backups has come to its end");
                *lock(&self.next) = None;
                return;
            };
            let due = due + schedule.delay();
            *lock(&self.next) = Some(due);
            if let Err(now) = sleep_until(due).await {
                // The clock was set back: what was waited for may be years away. What was due before still is.
                after = after.min(now);
                continue;
            }
            after = SystemTime::now();
            if !(self.is_ours)() {
                continue;
            }
            let Ok(_turn) = self.turn.try_lock() else {
                tracing::warn!("a scheduled backup is left out, for another is being made");
                continue;
            };
            if matches!(self.attempt().await, Err(Error::Stopped)) {
                *lock(&self.next) = None;
                return;
            }
            // What fell due meanwhile is not made up for.
            after = SystemTime::now();
        }
    }

    /// Makes one, and tells what came of it. Whoever calls has the turn.
    async fn attempt(&self) -> Result<BackupInfo> {
        let begun = SystemTime::now();
        self.is_running.store(true, Ordering::Relaxed);
        // Also when this is given up halfway.
        let _running = Running(&self.is_running);
        let made = self.make(begun).await;
        match &made {
            Ok(made) => {
                tracing::info!(name = %made.name, revision = made.revision, bytes = made.bytes, took = ?begun.elapsed().ok(), "a backup was made");
                self.retire(made).await;
            }
            Err(error) => tracing::error!(%error, dir = %self.config.dir.display(), "a backup has failed"),
        }
        if let Some(counters) = &self.counters {
            match &made {
                Ok(made) => {
                    counters.backups.made.inc();
                    counters.backups.note(made.created);
                }
                Err(_) => counters.backups.failed.inc(),
            }
        }
        let last = LastTry::new(begun, made.as_ref().map(|made| made.name.clone()).map_err(Error::to_string));
        *lock(&self.last_try) = Some(last.clone());
        let place = self.place.clone();
        if let Err(error) = self.blocking(move || place.note(&last)).await {
            tracing::warn!(%error, "what came of the last backup could not be noted in its directory");
        }
        made
    }

    async fn make(&self, begun: SystemTime) -> Result<BackupInfo> {
        let place = self.place.clone();
        let mut part = self.blocking(move || place.begin(begun)).await?;
        let least = format::least(&self.client).await?;
        let mut source = format::begin(&self.client).await?;
        let mut more = true;
        while more {
            let (mut chunks, mut bytes) = (Vec::new(), 0);
            while more && bytes < WRITE_BYTES {
                match source.next().await? {
                    Some(chunk) => {
                        bytes += chunk.len();
                        chunks.push(chunk);
                    }
                    None => more = false,
                }
            }
            // When this is given up meanwhile the part is dropped over there, and its file goes with it.
            part = self.blocking(move || chunks.iter().try_for_each(|chunk| part.write(chunk)).map(|()| part)).await?;
        }
        drop(source);
        let stop = self.stop.clone();
        self.blocking(move || part.finish(least, &stop)).await
    }

    /// Runs work that blocks on the disk. It goes on when the future is dropped.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.tasks.spawn_blocking(work).await.map_err(ended)?
    }

    /// Removes what need not be kept any more. What cannot be removed now is tried again after the next backup.
    async fn retire(&self, newest: &BackupInfo) {
        let (place, newest) = (self.place.clone(), newest.clone());
        let (keep, keep_for) = (self.config.keep, self.config.keep_for);
        let retired = self.blocking(move || {
            if keep == 0 && keep_for.is_none() {
                return Ok(());
            }
            let Some(cluster_id) = newest.cluster_id else { return Ok(()) };
            let backups = store::of_cluster(place.list()?, cluster_id);
            let mut first = Ok(());
            for backup in store::surplus(&backups, &newest.name, keep, keep_for, SystemTime::now()) {
                match place.remove(&backup.name) {
                    Ok(()) => tracing::info!(name = %backup.name, "an old backup was removed"),
                    // The others go all the same.
                    Err(error) => first = first.and(Err(error)),
                }
            }
            first
        });
        if let Err(error) = retired.await {
            tracing::warn!(%error, "old backups could not be removed");
        }
    }
}

/// Notes at its end that nothing is being made any more.
struct Running<'a>(&'a AtomicBool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn ended(err: tokio::task::JoinError) -> Error {
    if err.is_cancelled() { Error::Stopped } else { Error::Failed(format!("a backup ended early: {err}")) }
}
