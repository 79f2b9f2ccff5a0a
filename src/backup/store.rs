//! Where backups are kept: [`Place`], and what there is of it: directories, and, in `bucket`, object stores.
//!
//! ```text
//! <dir>/
//!   LOCK                                          held while a process makes backups here
//!   quorate-20261123T044012.345Z-r900.backup      whole, synced, and read back: what has such a name has been all of that
//!   unfinished-6a1f00c2d3b4e597                   being written; removed by whoever comes next
//!   last-try                                      when a backup was last tried, and what came of it
//! ```
//!
//! A [`Directory`] is held for as long as a process makes backups there. One that is [`Visited`] is held for one backup, and may be
//! shared by several that make some now and then; it may be out of reach in between.
//!
//! # Invariants
//! - A backup gets its name only after it was synced, read back from the file, and found sound. The rename is atomic, and synced.
//! - Whatever goes wrong before, a full disk above all, the unfinished file is removed at once, and its space with it.
//! - The newest sound backup is never removed, whatever [retention](surplus) says.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use chrono::{DateTime, NaiveDateTime, SubsecRound, Utc};
use futures_util::future::BoxFuture;
use rustix::fs::{Advice, fadvise};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

#[cfg(feature = "object-store")]
use super::bucket::Bucket;
use super::format::{self, Source};
use crate::config::{BackupConfig, StoreOptions, Where, shown_place};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::storage::dir;
use crate::world;

/// How the name begins of what is being written. A number drawn by chance follows: one that was given up may take a moment to go, and
/// must not take the next one along.
const UNFINISHED: &str = "unfinished";
pub(super) const LAST_TRY: &str = "last-try";
const PREFIX: &str = "quorate-";
const ENDING: &str = ".backup";

/// How the time of a backup stands in its name. Ordered as the times are.
const TIME: &str = "%Y%m%dT%H%M%S%.3fZ";

/// The size of `last-try`, whatever it says: so it can be written over in place when there is no room for another. A text that does not fit
/// is cut.
pub(super) const LAST_TRY_BYTES: usize = 4096;

/// Bytes of an error that are remembered; in JSON each may take six.
const ERROR_BYTES: usize = 600;

/// Where backups are kept. All of it may block.
pub(super) trait Place: Send + Sync + 'static {
    /// The whole backups, oldest first, by what can be seen without reading more of them than how they begin.
    ///
    /// # Errors
    /// `Io`.
    fn list(&self) -> Result<Vec<BackupInfo>>;

    /// Begins one, now. What was left of others that were not finished is removed. Only one is made at a time.
    ///
    /// # Errors
    /// `Io`.
    fn begin(&self, now: SystemTime) -> Result<Box<dyn Part>>;

    /// Reads one, from its beginning.
    ///
    /// # Errors
    /// `Io`.
    fn open(&self, name: &str) -> Result<Source>;

    /// Removes one, if it is there.
    ///
    /// # Errors
    /// `Io`.
    fn remove(&self, name: &str) -> Result<()>;

    /// Remembers what came of the last try.
    ///
    /// # Errors
    /// `Io`.
    fn note(&self, last: &LastTry) -> Result<()>;

    /// What was remembered; none also when it cannot be read.
    fn noted(&self) -> Option<LastTry>;

    /// Returns, once the backups are to stop, when nothing is left of what was begun, or after a short time. A directory has nothing to wait
    /// for: there it is removed by whoever drops it.
    fn ended(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// A backup being written. Dropped before its end, it is removed.
pub(super) trait Part: Send {
    /// # Errors
    /// `Io`.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Makes it durable, reads it back, and gives it its name, unless it is to stop before that, or shows less than a revision.
    ///
    /// # Errors
    /// `Io`; `Stopped`; `Failed`; `Corrupt` or `Format` when what is there is not what was to be written.
    fn finish(self: Box<Self>, least: i64, stop: &CancellationToken) -> Result<BackupInfo>;
}

/// The place of a configuration, for who makes backups: a directory is held from now on, unless it `is_shared`. What an object store is at
/// is given up when `stop` says so.
///
/// # Errors
/// `Config`; of a directory that is to be held, `Locked` and `Io`.
pub(super) fn place(config: &BackupConfig, is_shared: bool, stop: &CancellationToken) -> Result<Arc<dyn Place>> {
    Ok(match look(&config.dir)? {
        Where::Directory(path) if is_shared => Arc::new(Visited::new(&path)),
        Where::Directory(path) => Arc::new(Directory::open(&path)?),
        Where::Store(url) => bucket(&url, &config.store_options, stop)?,
    })
}

/// A place to look at, and to make nothing in.
///
/// # Errors
/// `Config`.
pub(super) fn place_to_read(dir: &Path, options: &StoreOptions) -> Result<Arc<dyn Place>> {
    Ok(match look(dir)? {
        Where::Directory(path) => Arc::new(Visited { must_be_there: true, ..Visited::new(&path) }),
        Where::Store(url) => bucket(&url, options, &CancellationToken::new())?,
    })
}

/// Opens one backup: a file, or the URL of one.
///
/// # Errors
/// `Config`; `Io`.
pub(super) fn open(file: &Path, options: &StoreOptions) -> Result<Source> {
    match look(file)? {
        Where::Directory(path) => open_file(&path),
        Where::Store(url) => {
            let is_store = |url: &str| matches!(Where::read(Path::new(url)), Ok(Where::Store(_)));
            let Some((place, name)) = url.rsplit_once('/').filter(|(place, _)| is_store(place)) else {
                return Err(Error::Config(format!("{url} is where backups may be, and none of them; write {url}/{PREFIX}...{ENDING}")));
            };
            bucket(place, options, &CancellationToken::new())?.open(name)
        }
    }
}

fn look(place: &Path) -> Result<Where> {
    Where::read(place).map_err(|right| Error::Config(format!("the place of backups is {:?}; {right}", shown_place(place))))
}

#[cfg(feature = "object-store")]
fn bucket(url: &str, options: &StoreOptions, stop: &CancellationToken) -> Result<Arc<dyn Place>> {
    Ok(Arc::new(Bucket::open(url, options, stop)?))
}

/// Where there are none, none was ever read.
#[cfg(not(feature = "object-store"))]
fn bucket(url: &str, _: &StoreOptions, _: &CancellationToken) -> Result<Arc<dyn Place>> {
    Err(Error::Config(format!("{url} is the URL of an object store: this build knows none (the cargo feature `object-store`)")))
}

fn open_file(path: &Path) -> Result<Source> {
    Ok(Box::new(File::open(path).map_err(|err| Error::io("open", path, err))?))
}

/// A backup that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupInfo {
    /// Its name in the directory, or behind the URL of the store.
    pub name: String,
    /// The file, or the URL: what [`restore`](super::restore()) takes.
    pub path: PathBuf,
    /// When it was begun, to the millisecond.
    pub created: SystemTime,
    /// The cluster that it is of, as its members have the id, by how the backup begins. None when that cannot be read: it is damaged, or
    /// out of reach.
    pub cluster_id: Option<u64>,
    /// The revision that it shows: what was written later is not in it.
    pub revision: i64,
    /// Its size.
    pub bytes: u64,
    /// Whether it is known to be sound.
    pub soundness: Soundness,
}

/// What is known of a backup's content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Soundness {
    /// It was read back and found sound before it got its name, and has not been read since. In an object store it has its name a moment
    /// before it is read back, and loses it again if it is not sound.
    WhenWritten,
    /// It was read just now, and is sound.
    Verified,
    /// It was read just now, and is not: this is what was found.
    Damaged(String),
}

/// What came of the newest try to make a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastTry {
    /// When it was begun, to the second.
    pub at: SystemTime,
    /// The backup that it made, or the error that ended it.
    pub outcome: std::result::Result<String, String>,
}

impl LastTry {
    pub(super) fn new(at: SystemTime, outcome: std::result::Result<String, String>) -> Self {
        LastTry { at, outcome }
    }
}

/// Which cluster each backup is of, as far as that was looked at. What has a name never changes, so each is looked at once.
#[derive(Default)]
pub(super) struct Clusters(Mutex<BTreeMap<String, u64>>);

impl Clusters {
    /// Fills it in. What is listed no more is forgotten; what was found before an error is not looked at again.
    ///
    /// # Errors
    /// The first of `look`. It is not called again then.
    pub fn fill(&self, backups: &mut [BackupInfo], look: impl Fn(&BackupInfo) -> Result<Option<u64>>) -> Result<()> {
        let known = lock(&self.0).clone();
        let (mut found, mut looked) = (BTreeMap::new(), Ok(()));
        for backup in backups {
            backup.cluster_id = match known.get(&backup.name) {
                Some(id) => Some(*id),
                None if looked.is_err() => None,
                None => look(backup).unwrap_or_else(|err| {
                    looked = Err(err);
                    None
                }),
            };
            found.extend(backup.cluster_id.map(|id| (backup.name.clone(), id)));
        }
        *lock(&self.0) = found;
        looked
    }
}

/// The whole backups of a directory, oldest first.
fn list(dir: &Path, clusters: &Clusters) -> Result<Vec<BackupInfo>> {
    let fault = |err| Error::io("listing", dir, err);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let name = entry.file_name();
        let Some((name, (created, revision))) = name.to_str().and_then(|name| Some((name, parse_name(name)?))) else { continue };
        let bytes = match entry.metadata() {
            Ok(meta) => meta.len(),
            // Removed meanwhile.
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            Err(err) => return Err(fault(err)),
        };
        let soundness = Soundness::WhenWritten;
        found.push(BackupInfo { name: name.to_owned(), path: entry.path(), created, cluster_id: None, revision, bytes, soundness });
    }
    found.sort_by_key(|backup| (backup.created, backup.revision));
    clusters.fill(&mut found, |backup| {
        let begins = open_file(&backup.path).and_then(|file| format::beginning(file, &backup.path));
        let begins = begins.inspect_err(|error| tracing::debug!(%error, name = %backup.name, "how a backup begins cannot be read"));
        Ok(begins.ok().map(|(cluster_id, _)| cluster_id))
    })?;
    Ok(found)
}

/// What came of the last try in a directory.
fn last_try(dir: &Path) -> Option<LastTry> {
    use std::io::Read;
    let mut text = String::new();
    File::open(dir.join(LAST_TRY)).ok()?.take(LAST_TRY_BYTES as u64).read_to_string(&mut text).ok()?;
    read_try(&text)
}

/// What `last-try` says.
pub(super) fn read_try(text: &str) -> Option<LastTry> {
    let fields: serde_json::Value = serde_json::from_str(text).ok()?;
    let field = |name: &str| fields.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(fields.get("at")?.as_u64()?))?;
    Some(LastTry { at, outcome: field("made").map(Ok).or_else(|| field("error").map(Err))? })
}

/// What `last-try` is to say, filled up to its size.
pub(super) fn write_try(last: &LastTry) -> String {
    let at = last.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let fields = match &last.outcome {
        Ok(made) => serde_json::json!({ "at": at, "made": made }),
        Err(error) => serde_json::json!({ "at": at, "error": error.get(..error.floor_char_boundary(ERROR_BYTES)) }),
    };
    let mut text = fields.to_string();
    text.push_str(&" ".repeat(LAST_TRY_BYTES.saturating_sub(text.len() + 1)));
    text.push('\n');
    text
}

/// Those of one cluster. One whose beginning cannot be read is of none, and so is never removed.
pub(super) fn of_cluster(mut backups: Vec<BackupInfo>, cluster_id: u64) -> Vec<BackupInfo> {
    backups.retain(|backup| {
        if backup.cluster_id.is_none() {
            tracing::warn!(name = %backup.name, "it cannot be told which cluster a backup is of: it is kept");
        }
        backup.cluster_id == Some(cluster_id)
    });
    backups
}

/// Which backups go. They are given oldest first; `newest` is the one that is known to be sound, and stays. Those of a time that is yet to
/// come, by a clock that was ahead, count as the oldest: they would stay forever otherwise, and push out the others. All are of one cluster.
///
/// ```text
/// keep 2, of at most a week   9 days, 3 days, 2 days, new  ->  9 days, 3 days
/// keep any number             9 days, 8 days (the newest)  ->  9 days
/// ```
pub(super) fn surplus<'a>(
    backups: &'a [BackupInfo],
    newest: &str,
    keep: usize,
    keep_for: Option<Duration>,
    now: SystemTime,
) -> Vec<&'a BackupInfo> {
    let (past, future) = backups.split_at(backups.partition_point(|backup| backup.created <= now));
    let too_many = if keep == 0 { 0 } else { backups.len().saturating_sub(keep) };
    let is_old = |backup: &BackupInfo| {
        let age = now.duration_since(backup.created).unwrap_or_default();
        keep_for.is_some_and(|most| age > most)
    };
    let going = future.iter().chain(past).enumerate().filter(|(at, backup)| *at < too_many || is_old(backup));
    going.map(|(_, backup)| backup).filter(|backup| backup.name != newest).collect()
}

/// A local directory, held for this process.
pub(super) struct Directory {
    path: PathBuf,
    /// Shared with what is being written: nobody else comes in before that is gone.
    hold: Arc<dir::Hold>,
    clusters: Clusters,
}

impl Directory {
    /// Makes it if it is missing, for this user alone.
    ///
    /// # Errors
    /// `Locked` when another process, or another schedule in this one, makes backups there; `Io`.
    pub fn open(path: &Path) -> Result<Directory> {
        let hold = dir::hold(path)?;
        let directory = Directory { path: path.to_owned(), hold: Arc::new(hold), clusters: Clusters::default() };
        directory.clear()?;
        if !path.join(LAST_TRY).exists()
            && let Err(error) = dir::write_whole(path, LAST_TRY, &[b' '; LAST_TRY_BYTES])
        {
            tracing::warn!(%error, "what comes of backups may not be noted in their directory");
        }
        Ok(directory)
    }

    /// Removes what was begun and not finished, by a process that has ended above all.
    fn clear(&self) -> Result<()> {
        let fault = |err| Error::io("listing", &self.path, err);
        for entry in fs::read_dir(&self.path).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED)) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

impl Place for Directory {
    fn list(&self) -> Result<Vec<BackupInfo>> {
        list(&self.path, &self.clusters)
    }

    fn begin(&self, now: SystemTime) -> Result<Box<dyn Part>> {
        self.clear()?;
        let path = self.path.join(format!("{UNFINISHED}-{:016x}", world::random()));
        // Read as well: what is in it is looked at through the same file.
        let file = OpenOptions::new().create_new(true).read(true).write(true).mode(0o600).open(&path);
        let file = file.map_err(|err| Error::io("making", &path, err))?;
        Ok(Box::new(Unfinished { dir: self.path.clone(), begun: now, path, file, is_done: false, _hold: self.hold.clone() }))
    }

    fn open(&self, name: &str) -> Result<Source> {
        open_file(&self.path.join(name))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path.join(name);
        remove(&path)?;
        dir::sync_dir(&self.path)
    }

    fn note(&self, last: &LastTry) -> Result<()> {
        let text = write_try(last);
        match dir::write_whole(&self.path, LAST_TRY, text.as_bytes()) {
            Err(err) if err.is_disk_full() => {
                remove(&self.path.join(LAST_TRY).with_extension("new"))?;
                let path = self.path.join(LAST_TRY);
                let write = || -> io::Result<()> {
                    let mut file = OpenOptions::new().write(true).open(&path)?;
                    file.write_all(text.as_bytes())?;
                    file.sync_all()
                };
                write().map_err(|err| Error::io("writing", &path, err))
            }
            done => done,
        }
    }

    fn noted(&self) -> Option<LastTry> {
        last_try(&self.path)
    }
}

/// How long who visits a directory waits for who is there, and between two tries. Beyond it the backup has failed.
const VISIT_PATIENCE: Duration = Duration::from_secs(5);
const VISIT_RETRY: Duration = Duration::from_millis(50);

/// A directory that others use, too.
pub(super) struct Visited {
    path: PathBuf,
    /// Whether it is a mistake when there is no such directory, or it is only not there yet.
    must_be_there: bool,
    clusters: Clusters,
}

impl Visited {
    pub fn new(path: &Path) -> Visited {
        Visited { path: path.to_owned(), must_be_there: false, clusters: Clusters::default() }
    }

    /// # Errors
    /// As [`Directory::open`]; `Locked` only after some patience.
    fn enter(&self) -> Result<Directory> {
        let until = Instant::now() + VISIT_PATIENCE;
        loop {
            match Directory::open(&self.path) {
                Err(Error::Locked { .. }) if Instant::now() < until => std::thread::sleep(VISIT_RETRY),
                entered => return entered,
            }
        }
    }
}

impl Place for Visited {
    fn list(&self) -> Result<Vec<BackupInfo>> {
        match list(&self.path, &self.clusters) {
            // There was none yet.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && !self.must_be_there => Ok(Vec::new()),
            listed => listed,
        }
    }

    fn begin(&self, now: SystemTime) -> Result<Box<dyn Part>> {
        self.enter()?.begin(now)
    }

    fn open(&self, name: &str) -> Result<Source> {
        open_file(&self.path.join(name))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.enter()?.remove(name)
    }

    fn note(&self, last: &LastTry) -> Result<()> {
        match self.enter() {
            Ok(directory) => directory.note(last),
            // Out of reach, of which the log has just been told.
            Err(_) if last.outcome.is_err() => Ok(()),
            Err(err) => Err(err),
        }
    }

    fn noted(&self) -> Option<LastTry> {
        last_try(&self.path)
    }
}

/// A file being written.
struct Unfinished {
    dir: PathBuf,
    begun: SystemTime,
    path: PathBuf,
    file: File,
    is_done: bool,
    _hold: Arc<dir::Hold>,
}

impl Part for Unfinished {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|err| Error::io("writing", &self.path, err))
    }

    fn finish(mut self: Box<Self>, least: i64, stop: &CancellationToken) -> Result<BackupInfo> {
        self.file.sync_all().map_err(|err| Error::io("syncing", &self.path, err))?;
        // What is read back is to come from the disk, not from what the system still remembers of it. Where that cannot be had it is
        // read from there.
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        let facts = format::verify(open_file(&self.path)?, &self.path)?;
        check_least(facts.revision, least)?;
        let mut created = self.begun;
        let path = loop {
            let path = self.dir.join(name(created, facts.revision));
            if !path.exists() {
                break path;
            }
            created += Duration::from_millis(1);
        };
        if stop.is_cancelled() {
            return Err(Error::Stopped);
        }
        fs::rename(&self.path, &path).map_err(|err| Error::io("renaming", &self.path, err))?;
        // Removed by this name when it cannot be made durable: a try that failed leaves nothing.
        self.path.clone_from(&path);
        dir::sync_dir(&self.dir)?;
        self.is_done = true;
        let name = name(created, facts.revision);
        let created = parse_name(&name).map_or(created, |(created, _)| created);
        let (cluster_id, revision, bytes) = (Some(facts.cluster_id), facts.revision, facts.bytes);
        Ok(BackupInfo { name, path, created, cluster_id, revision, bytes, soundness: Soundness::WhenWritten })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "could not remove an unfinished backup; the next one tries again");
        }
        // It had its name perhaps. Whether this works or not, the try has failed.
        let _ = dir::sync_dir(&self.dir);
    }
}

/// Sees to it that a backup shows what the store had when it was begun.
pub(super) fn check_least(revision: i64, least: i64) -> Result<()> {
    if revision >= least {
        return Ok(());
    }
    Err(Error::Failed(format!("the member has fallen behind: its backup shows revision {revision}, and the store had {least}")))
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", path, err)),
        _ => Ok(()),
    }
}

pub(super) fn name(created: SystemTime, revision: i64) -> String {
    let created = DateTime::<Utc>::from(created).trunc_subsecs(3);
    format!("{PREFIX}{}-r{revision}{ENDING}", created.format(TIME))
}

pub(super) fn parse_name(name: &str) -> Option<(SystemTime, i64)> {
    let (time, revision) = name.strip_prefix(PREFIX)?.strip_suffix(ENDING)?.split_once("-r")?;
    let created = NaiveDateTime::parse_from_str(time, TIME).ok()?.and_utc();
    Some((created.into(), revision.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{self, Header, Item};

    fn bytes(revision: i64) -> Vec<u8> {
        let header = Header { cluster_id: 7, revision, ..Header::default() };
        let item = Item::Record { main: revision, sub: 0, tombstone: false, bytes: vec![b'v'; 3000].into() };
        let mut out = Vec::new();
        snapshot::write(&header, [Ok(item)], &mut out, Path::new("memory")).unwrap();
        out
    }

    fn make(place: &Directory, bytes: &[u8]) -> Result<BackupInfo> {
        let mut part = place.begin(SystemTime::now())?;
        part.write(bytes)?;
        part.finish(0, &CancellationToken::new())
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        files
    }

    #[test]
    fn names_are_read_back_and_ordered() {
        let begun = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_408_812_345);
        let text = name(begun, 900);
        assert_eq!(text, "quorate-20261123T044012.345Z-r900.backup");
        assert_eq!(parse_name(&text), Some((begun, 900)));
        for other in ["quorate-20261123T044012.345Z-r900", "quorate-2026-r1.backup", "quorate-20261323T044012.345Z-r9.backup", "LOCK"] {
            assert_eq!(parse_name(other), None, "{other}");
        }
        assert!(name(begun, 900) < name(begun + Duration::from_millis(1), 7));
    }

    #[test]
    fn what_has_a_name_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = Directory::open(dir.path()).unwrap();
        assert!(matches!(Directory::open(dir.path()), Err(Error::Locked { .. })));
        let good = bytes(900);
        let first = make(&place, &good).unwrap();
        let second = make(&place, &bytes(901)).unwrap();
        assert_eq!(place.list().unwrap(), [first.clone(), second]);
        assert_eq!((first.revision, first.bytes), (900, good.len() as u64));
        // Cut short, changed, given up, or left behind by a process that died: nothing is left of it.
        let mut changed = good.clone();
        changed[2000] ^= 1;
        for bad in [&good[..good.len() - 1], &changed, b""] {
            assert!(matches!(make(&place, bad), Err(Error::Corrupt { .. } | Error::Format { .. })));
        }
        let stop = CancellationToken::new();
        stop.cancel();
        let mut late = place.begin(SystemTime::now()).unwrap();
        late.write(&good).unwrap();
        assert!(matches!(late.finish(900, &stop), Err(Error::Stopped)));
        let mut behind = place.begin(SystemTime::now()).unwrap();
        behind.write(&good).unwrap();
        assert!(matches!(behind.finish(901, &CancellationToken::new()), Err(Error::Failed(_))));
        let given_up = place.begin(SystemTime::now()).unwrap();
        let next = place.begin(SystemTime::now()).unwrap();
        drop(given_up);
        assert_eq!(files(dir.path()).len(), 5, "what was given up takes nothing along");
        drop(next);
        assert_eq!(files(dir.path()).len(), 4);
        fs::write(dir.path().join(UNFINISHED), &good).unwrap();
        let going_on = place.begin(SystemTime::now()).unwrap();
        drop(place);
        assert!(matches!(Directory::open(dir.path()), Err(Error::Locked { .. })), "who writes still holds it");
        drop(going_on);
        Directory::open(dir.path()).unwrap();
        assert_eq!(files(dir.path()).len(), 4);
    }

    /// Who visits holds the directory for one backup, and waits for who is there; what is out of reach is said once.
    #[test]
    fn a_directory_is_shared_by_turns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared");
        let (one, two) = (Visited::new(&path), Visited::new(&path));
        assert_eq!((one.list().unwrap(), one.noted()), (Vec::new(), None));
        let whole = |place: &Visited, revision: i64| {
            let mut part = place.begin(SystemTime::now()).unwrap();
            part.write(&bytes(revision)).unwrap();
            part.finish(0, &CancellationToken::new()).unwrap()
        };
        let first = whole(&one, 900);
        let under_way = one.begin(SystemTime::now()).unwrap();
        assert!(matches!(Directory::open(&path), Err(Error::Locked { .. })));
        let second = std::thread::scope(|scope| {
            let waits = scope.spawn(|| whole(&two, 901));
            drop(under_way);
            waits.join().unwrap()
        });
        assert_eq!(two.list().unwrap(), [first.clone(), second.clone()]);
        let last = LastTry { at: SystemTime::UNIX_EPOCH, outcome: Ok(second.name.clone()) };
        two.note(&last).unwrap();
        assert_eq!(one.noted(), Some(last));
        one.remove(&first.name).unwrap();
        assert_eq!(one.list().unwrap(), [second]);
        let file = dir.path().join("a file");
        fs::write(&file, "").unwrap();
        let away = Visited::new(&file.join("below"));
        assert!(matches!(away.begin(SystemTime::now()).map(drop), Err(Error::Io { .. })));
        away.note(&LastTry { at: SystemTime::UNIX_EPOCH, outcome: Err("away".into()) }).unwrap();
        assert!(away.note(&LastTry { at: SystemTime::UNIX_EPOCH, outcome: Ok("a name".into()) }).is_err());
    }

    #[test]
    fn two_of_the_same_moment_have_two_names() {
        let dir = tempfile::tempdir().unwrap();
        let place = Directory::open(dir.path()).unwrap();
        let begun = SystemTime::now();
        for count in 1..=3 {
            let mut part = place.begin(begun).unwrap();
            part.write(&bytes(5)).unwrap();
            part.finish(0, &CancellationToken::new()).unwrap();
            assert_eq!(place.list().unwrap().len(), count);
        }
    }

    #[test]
    fn the_last_try_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let place = Directory::open(dir.path()).unwrap();
        assert_eq!(place.noted(), None);
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_408_812);
        for outcome in [Ok("a name".to_owned()), Err("it said \"no\"\n".to_owned())] {
            let last = LastTry { at, outcome };
            place.note(&last).unwrap();
            assert_eq!(place.noted(), Some(last));
        }
        let last = LastTry { at, outcome: Err("\u{fc}\u{1}".repeat(1000)) };
        place.note(&last).unwrap();
        assert!(
            matches!(place.noted().unwrap().outcome, Err(text) if text.starts_with("\u{fc}\u{1}\u{fc}") && text.len() > ERROR_BYTES - 4)
        );
        assert_eq!(fs::metadata(dir.path().join(LAST_TRY)).unwrap().len(), LAST_TRY_BYTES as u64);
        for text in ["", "{}", "[]", "{\"at\":-1,\"made\":\"x\"}", "{\"at\":18446744073709551615,\"made\":\"x\"}"] {
            fs::write(dir.path().join(LAST_TRY), text).unwrap();
            assert_eq!(place.noted(), None, "{text}");
        }
    }

    #[test]
    fn only_those_of_the_same_cluster_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let place = Directory::open(dir.path()).unwrap();
        let of = |cluster_id: u64| {
            let mut out = Vec::new();
            snapshot::write(&Header { cluster_id, revision: 1, ..Header::default() }, [], &mut out, Path::new("memory")).unwrap();
            make(&place, &out).unwrap()
        };
        let (first, other, newest) = (of(7), of(8), of(7));
        fs::write(dir.path().join(name(SystemTime::now(), 3)), "damaged").unwrap();
        assert_eq!(of_cluster(place.list().unwrap(), 7), [first, newest]);
        assert_eq!(of_cluster(place.list().unwrap(), 8), [other]);
    }

    #[test]
    fn one_of_a_time_to_come_goes_first() {
        let now = SystemTime::now();
        let one = |name: &str, created| BackupInfo {
            name: name.to_owned(),
            path: PathBuf::new(),
            cluster_id: None,
            created,
            revision: 1,
            bytes: 1,
            soundness: Soundness::WhenWritten,
        };
        let hour = Duration::from_secs(60 * 60);
        let backups = [one("old", now - hour), one("new", now), one("ahead", now + hour)];
        for (keep, going) in [(3, &[][..]), (2, &["ahead"]), (1, &["ahead", "old"])] {
            let found = surplus(&backups, "new", keep, None, now);
            assert_eq!(found.iter().map(|backup| backup.name.as_str()).collect::<Vec<_>>(), going);
        }
    }

    #[test]
    fn retention_never_takes_the_newest() {
        let now = SystemTime::now();
        let day = Duration::from_secs(24 * 60 * 60);
        let aged = |ages: &[u32]| -> Vec<BackupInfo> {
            let one = |age: &u32| BackupInfo {
                name: format!("{age}"),
                path: PathBuf::new(),
                cluster_id: None,
                created: now - day * *age,
                revision: 1,
                bytes: 1,
                soundness: Soundness::WhenWritten,
            };
            ages.iter().map(one).collect()
        };
        for (ages, newest, keep, days, going) in [
            (&[9, 3, 2, 0][..], "0", 2, Some(7), &["9", "3"][..]),
            (&[9, 3, 2, 0], "0", 0, Some(7), &["9"]),
            (&[9, 3, 2, 0], "0", 0, None, &[]),
            (&[9, 3, 2, 0], "0", 1, None, &["9", "3", "2"]),
            (&[9, 8], "8", 0, Some(7), &["9"]),
            (&[8], "8", 1, Some(7), &[]),
            // A clock that was set back: the one that was just made is not the last by name.
            (&[3, 2, 1], "3", 1, None, &["2"]),
            (&[], "0", 1, Some(1), &[]),
        ] {
            let backups = aged(ages);
            let found = surplus(&backups, newest, keep, days.map(|days| day * days), now);
            assert_eq!(found.iter().map(|backup| backup.name.as_str()).collect::<Vec<_>>(), going, "{ages:?}");
        }
    }
}
