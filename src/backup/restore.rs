//! From a backup to the data directory of a new cluster, offline.
//!
//! ```text
//! quorate-...-r900.backup  ->  <data-dir>/restoring/member/    identity, log, state: written, synced, read back
//!                              <data-dir>/changing-20261123T050000Z/   the same, renamed ...
//!                              <data-dir>/member/              ... changed places with what was there, at once ...
//!                              <data-dir>/old-20261123T050000Z/   ... which has this name then
//! ```
//!
//! The new cluster has another id, also when it has the members, the URLs and the token of the one that the backup was made of: who
//! belongs to that one, and has not heard of the restore, is refused. Its revision lies [far above](crate::config::BUMP_REVISION) the
//! backup's, and all below counts as compacted: so a watch that goes on from before is told that it has missed something, and a revision
//! that was seen before never comes to stand for something else.
//!
//! Several members are restored with the same file, list and token, each on its own machine: what they are to agree on follows from these.
//! A member that is alone has nobody to agree with, and its ids are drawn by chance.
//!
//! # Invariants
//! - The file is read from end to end, and found sound, before anything is written. It is read again as it is written: one in an object
//!   store comes over the network twice, and no copy of it lies on the disk.
//! - Until the new state is whole and on disk, what was there is untouched; then it is moved aside, and never removed. Where the file system
//!   exchanges two names at once, which ext4, XFS, Btrfs and tmpfs do, there is always the one or the other.
//! - A directory in use is refused, by a server or by another restore; who is refused removes nothing.
//! - What has the name `old-` is what was there. What has the name `changing-` was left by a process that died in between: the one or the
//!   other, told apart by the cluster id in its `member/identity`. Nothing here removes it.
//!
//! # Caveats
//! - Several members restored from different files would be one cluster of different states, if they could talk: they cannot, for
//!   their cluster ids differ. The same file restored twice to the same list needs another token; over the first one it is refused without.
//! - Leases have their whole time again once the cluster has a leader. Alarms are not restored; those that still have a cause are raised anew.
//! - A log elsewhere than in the data directory (`--wal-dir`) is not restored to; the member is to be started without it.
//! - Only what is a member's is replaced. What a node of the embedded mode remembers beside it is not: such a one is restored as
//!   a whole, see [`embed::restore`](crate::embed::restore()).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::SystemTime;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::format::{self, Facts, Item, Reader};
use super::store::open;
use crate::config::{Config, RestoreOptions, StoreOptions, Url};
use crate::error::{Error, Result};
use crate::mvcc::{META_COMPACTED, Store};
use crate::proto::internal;
use crate::raft::restored::{Beginning, is_kept, renewed};
use crate::server::{found, founders};
use crate::storage::dir::{self, DataDir};
use crate::storage::history::{History, HistoryOptions, META_BYTES_MAX, META_NAME_BYTES_MAX};
use crate::storage::sled::Sled;
use crate::storage::wal::{Done, Wal, WalOptions};
use crate::storage::{Backend, Record, Revision};
use crate::world;

/// What is in the data directory while it is not a member's yet.
const RESTORING: &str = "restoring";
const MEMBER: &str = "member";

/// Bytes of items that are written out together, or one item more.
const STEP_BYTES: usize = 2 << 20;

/// What a restore has made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// The new cluster.
    pub cluster_id: u64,
    /// The member in this directory.
    pub member_id: u64,
    /// The cluster that the backup was made of.
    pub from_cluster_id: u64,
    /// When the backup was made, by the clock of who made it.
    pub created: SystemTime,
    /// The revision that the backup shows: what was written later is lost.
    pub backup_revision: i64,
    /// The new cluster's revision.
    pub revision: i64,
    /// Keys that exist.
    pub keys: u64,
    /// Where the member is now that was in the directory: a data directory as it was. None if there was none.
    pub aside: Option<PathBuf>,
}

/// Makes a backup into a member of a new cluster. See the module's head. It blocks on the disk; nobody may use the directory meanwhile.
/// `file` may also be the URL of a backup in an object store, as [`BackupInfo::path`](super::BackupInfo::path) has it.
///
/// # Errors
/// `Config`; `Format` or `Corrupt` for a file that is not a backup, or a damaged one; `Locked` when the directory is in use; `Io`. The
/// directory is as it was then. Otherwise it is `Failed`, and the text says where what was there is: when the restored member is in place
/// but may not be after a power cut, and when the file system let two directories be renamed halfway only.
pub fn restore(file: impl AsRef<Path>, options: &RestoreOptions) -> Result<Restored> {
    restore_as(file.as_ref(), options, false)
}

/// As [`restore`]. If `is_exact`, no other cluster ever had the options' token, and the ids follow from that alone, as a founder's do.
///
/// # Errors
/// As [`restore`].
pub(crate) fn restore_as(file: &Path, options: &RestoreOptions, is_exact: bool) -> Result<Restored> {
    let mut config = options.founding()?;
    let facts = format::verify(open(file, &options.store_options)?, file)?;
    let bump = i64::try_from(options.bump_revision).ok().and_then(|bump| facts.revision.checked_add(bump));
    let revision = bump.ok_or_else(|| {
        Error::Config(format!("bump-revision is {}: no revision is that much above {}", options.bump_revision, facts.revision))
    })?;

    if !is_exact {
        config.initial_cluster_token = token(&config, &facts)?;
    }
    let peer_urls = config.advertised_peer_urls(&Config::default().listen_peer_urls);
    let mut identity = found(&config, &peer_urls)?;
    identity.incarnation = world::random().max(1);
    let members = founders(&config, &peer_urls)?.into_iter().map(|(id, name, urls)| {
        let peer_urls = urls.iter().map(Url::to_string).collect();
        (id, internal::Member { name, peer_urls, ..internal::Member::default() })
    });
    let beginning = Beginning::of(members.collect())?;

    let data_dir = &options.data_dir;
    let member = data_dir.join(MEMBER);
    // One restore at a time, whatever it makes and removes.
    let _alone = dir::hold_itself(data_dir)?;
    // Held to the end, whoever it was.
    let _old = if member.exists() { Some(dir::hold(&member)?) } else { None };
    // A damaged identity hinders nobody from restoring in its place.
    if let Ok(Some(old)) = dir::identity_in(&member)
        && old.cluster_id == identity.cluster_id
    {
        let what = "the member in this directory belongs to the very cluster that this restore would make, and its revisions would come to \
                    stand for something else: give another --initial-cluster-token, the same to all members";
        return Err(Error::Config(what.into()));
    }
    let working = data_dir.join(RESTORING);
    if working.exists() {
        // Of a restore that was cut off.
        let _left = dir::hold(&working.join(MEMBER))?;
        fs::remove_dir_all(&working).map_err(|err| Error::io("removing", &working, err))?;
    }
    // Ours from here on, and to the end: who is refused it leaves it alone.
    let mut dir = DataDir::open(&working, None)?;
    let made = dir.set_identity(identity.clone()).and_then(|()| {
        let keys = write_state(&dir.state(), (file, &options.store_options), &facts, revision, &beginning)?;
        write_log(dir.wal(), &beginning)?;
        dir::sync_dir(dir.member())?;
        let aside = take_place(data_dir, &working)?;
        Ok((keys, aside))
    });
    let (keys, aside) = made.inspect_err(|_| {
        // What cannot be removed now is removed by the next one.
        let _ = fs::remove_dir_all(&working);
    })?;
    let Facts { cluster_id: from_cluster_id, revision: backup_revision, created, .. } = facts;
    let (cluster_id, member_id) = (identity.cluster_id, identity.member_id);
    tracing::info!(
        cluster = %format_args!("{cluster_id:x}"),
        member = %format_args!("{member_id:x}"),
        backup_revision,
        revision,
        keys,
        "a backup was restored"
    );
    Ok(Restored { cluster_id, member_id, from_cluster_id, created, backup_revision, revision, keys, aside })
}

/// The token that the new ids follow from: all who restore the same file to the same cluster have the same one, and nobody else.
fn token(config: &Config, facts: &Facts) -> Result<String> {
    let digest: String = facts.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let chance = if config.initial_members()?.len() < 2 { world::random() } else { 0 };
    Ok(format!("{} restored {digest} {chance:x}", config.initial_cluster_token))
}

/// Writes the state, and reads it back. Returns how many keys it has.
fn write_state(path: &Path, (file, store): (&Path, &StoreOptions), facts: &Facts, revision: i64, beginning: &Beginning) -> Result<u64> {
    let is_bumped = revision > facts.revision;
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(path)?);
    let (history, _) = History::open(backend.clone(), HistoryOptions::default(), &mut |_, _| Ok(()))?;
    let mut reader = Reader::new(open(file, store)?, file)?;
    let applied = beginning.applied(revision);
    let mut more = true;
    while more {
        let mut bytes = 0;
        while more && bytes < STEP_BYTES {
            match reader.next()? {
                None => more = false,
                Some(Item::Meta { key, value }) => {
                    if key.len() > META_NAME_BYTES_MAX || key.len() + value.len() > META_BYTES_MAX {
                        let what = format!("{:?} is larger than this release stores", key.escape_ascii().to_string());
                        return Err(Error::Corrupt { path: file.to_owned(), offset: None, what });
                    }
                    bytes += key.len() + value.len();
                    if is_kept(&key) {
                        let value = renewed(&key, value).map_err(|what| Error::Corrupt { path: file.to_owned(), offset: None, what })?;
                        history.put_meta(&key, Some(value));
                    } else if key == META_COMPACTED && !is_bumped {
                        history.put_meta(&key, Some(value));
                    }
                }
                Some(Item::Record { main, sub, tombstone, bytes: record }) => {
                    bytes += record.len();
                    // The reader has checked the order and the size.
                    history.append(Revision { main, sub }, Record { bytes: record, tombstone });
                }
            }
        }
        if !more {
            let (name, members) = &beginning.membership;
            history.put_meta(name, Some(members.clone()));
            if is_bumped {
                history.put_meta(META_COMPACTED, Some(Bytes::copy_from_slice(&revision.to_be_bytes())));
            }
        }
        history.commit(applied.clone());
        history.write_out()?;
    }
    if reader.facts()? != *facts {
        return Err(Error::Failed(format!("{} was changed while it was read", file.display())));
    }
    history.sync()?;
    drop(history);
    backend.close();
    drop(backend);

    let backend: Arc<dyn Backend> = Arc::new(Sled::open(path)?);
    let (store, saved) = Store::open(backend.clone(), HistoryOptions::default(), &mut |_, _| ())?;
    if store.revision() != revision || saved.applied.as_ref() != Some(&applied) {
        let what = format!("it reads back as revision {}, and was written as {revision}", store.revision());
        return Err(Error::Corrupt { path: path.to_owned(), offset: None, what });
    }
    let keys = store.keys() as u64;
    backend.accept()?;
    backend.close();
    Ok(keys)
}

/// Writes a log that begins behind the entry that the state is of.
fn write_log(path: &Path, beginning: &Beginning) -> Result<()> {
    let (wal, _) = Wal::open(path, WalOptions::default())?;
    let written =
        durable(|done| wal.save_vote(beginning.vote.clone(), done)).and_then(|()| durable(|done| wal.purge(beginning.purged, done)));
    written.and(wal.close())
}

/// Runs a change of the log, and waits until it is on disk.
fn durable(change: impl FnOnce(Done) -> Result<()>) -> Result<()> {
    let (tell, told) = mpsc::sync_channel(1);
    change(Box::new(move |result| drop(tell.send(result))))?;
    told.recv().unwrap_or(Err(Error::Stopped))
}

/// Has what was made take the place of what is there. Returns where that is now.
fn take_place(data_dir: &Path, working: &Path) -> Result<Option<PathBuf>> {
    let (made, member) = (working.join(MEMBER), data_dir.join(MEMBER));
    if !member.exists() {
        fs::rename(&made, &member).map_err(|err| Error::io("renaming", &made, err))?;
        dir::sync_dir(data_dir).map_err(|err| Error::Failed(format!("the backup is restored, but may not be after a power cut: {err}")))?;
        // Empty by now. What cannot be removed is removed by the next restore.
        let _ = fs::remove_dir_all(working);
        return Ok(None);
    }
    // Renamed first: once the two have changed places it must not have a name under which a later restore would remove it. Nor one that
    // calls it the old one before it is.
    let (changing, old) = free_names(data_dir);
    fs::rename(working, &changing).map_err(|err| Error::io("renaming", working, err))?;
    match exchange(&changing.join(MEMBER), &member) {
        Ok(()) => {}
        Err(Unexchanged::AsItWas(err)) => {
            // Back, so that it is removed.
            let _ = fs::rename(&changing, working);
            return Err(Error::io("exchanging the restored member with", &member, err));
        }
        Err(Unexchanged::Halfway { old, new, error }) => {
            let (old, new, member) = (old.display(), new.display(), member.display());
            let what =
                format!("renaming failed halfway: {error}. What was there is {old}, what was restored is {new}; rename one to {member}");
            return Err(Error::Failed(what));
        }
    }
    let aside = match fs::rename(&changing, &old) {
        Ok(()) => old,
        Err(error) => {
            tracing::warn!(%error, path = %changing.display(), "what was there has no better name than this");
            changing
        }
    };
    dir::sync_dir(&aside).and_then(|()| dir::sync_dir(data_dir)).map_err(|err| {
        let aside = aside.display();
        Error::Failed(format!("the backup is restored, and what was there is in {aside}, but it may not be so after a power cut: {err}"))
    })?;
    Ok(Some(aside))
}

/// Why two directories have not changed their names.
#[derive(Debug)]
enum Unexchanged {
    /// What was there is in its place.
    AsItWas(io::Error),
    /// It is not: nothing has the name of the member.
    Halfway { old: PathBuf, new: PathBuf, error: io::Error },
}

/// Has two directories change their names.
fn exchange(made: &Path, member: &Path) -> std::result::Result<(), Unexchanged> {
    match renameat_with(CWD, made, CWD, member, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => exchange_in_steps(made, member, |from, to| fs::rename(from, to)),
        other => other.map_err(|err| Unexchanged::AsItWas(err.into())),
    }
}

/// As [`exchange`], where the file system does not do it at once. When the process dies in between, `member` is missing: it has to be
/// renamed by hand, or restored again. A step that fails is undone.
fn exchange_in_steps(made: &Path, member: &Path, rename: impl Fn(&Path, &Path) -> io::Result<()>) -> std::result::Result<(), Unexchanged> {
    let between = made.with_file_name("restored");
    rename(made, &between).map_err(Unexchanged::AsItWas)?;
    let moved = rename(member, made);
    let Err(error) = moved.and_then(|()| {
        let placed = rename(&between, member);
        placed.inspect_err(|_| drop(rename(made, member)))
    }) else {
        return Ok(());
    };
    if !member.exists() {
        return Err(Unexchanged::Halfway { old: made.to_owned(), new: between, error });
    }
    // What was made goes anyway, wherever it is in there.
    let _ = rename(&between, made);
    Err(Unexchanged::AsItWas(error))
}

/// Names for what is kept aside, by the time, that nobody has: while it changes places, and after.
pub(crate) fn free_names(data_dir: &Path) -> (PathBuf, PathBuf) {
    let now = DateTime::<Utc>::from(SystemTime::now()).format("%Y%m%dT%H%M%SZ").to_string();
    let names = |end: &str| (data_dir.join(format!("changing-{now}{end}")), data_dir.join(format!("old-{now}{end}")));
    let mut free = names("");
    let mut count = 1;
    while free.0.exists() || free.1.exists() {
        count += 1;
        free = names(&format!("-{count}"));
    }
    free
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::snapshot;

    /// Two directories with a file each, and what came of exchanging them when some of the renames fail, counted from 1.
    fn in_steps(failing: &[usize]) -> (tempfile::TempDir, std::result::Result<(), Unexchanged>) {
        let dir = tempfile::tempdir().unwrap();
        let (made, member) = (dir.path().join("changing/member"), dir.path().join("member"));
        for (path, text) in [(&made, "new"), (&member, "old")] {
            fs::create_dir_all(path).unwrap();
            fs::write(path.join("text"), text).unwrap();
        }
        let count = Cell::new(0);
        let done = exchange_in_steps(&made, &member, |from, to| {
            count.set(count.get() + 1);
            if failing.contains(&count.get()) { Err(io::Error::other("it fails")) } else { fs::rename(from, to) }
        });
        (dir, done)
    }

    fn text(dir: &Path) -> Option<String> {
        fs::read_to_string(dir.join("text")).ok()
    }

    #[test]
    fn an_exchange_in_steps_that_fails_leaves_the_old_one_in_place() {
        let (dir, done) = in_steps(&[]);
        done.unwrap();
        assert_eq!(text(&dir.path().join("member")).as_deref(), Some("new"));
        assert_eq!(text(&dir.path().join("changing/member")).as_deref(), Some("old"));
        for failing in [&[1][..], &[2], &[3], &[2, 3], &[3, 5]] {
            let (dir, done) = in_steps(failing);
            assert!(matches!(done, Err(Unexchanged::AsItWas(_))), "{failing:?}: {done:?}");
            assert_eq!(text(&dir.path().join("member")).as_deref(), Some("old"), "{failing:?}");
        }
        let (dir, done) = in_steps(&[3, 4]);
        let Err(Unexchanged::Halfway { old, new, .. }) = done else { panic!("{done:?}") };
        assert_eq!((text(&old).as_deref(), text(&new).as_deref()), (Some("old"), Some("new")));
        assert!(!dir.path().join("member").exists());
    }

    #[test]
    fn who_is_refused_removes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data_dir) = (dir.path().join("a backup"), dir.path().join("data"));
        let header = snapshot::Header { cluster_id: 7, revision: 1, ..snapshot::Header::default() };
        snapshot::write(&header, [], &mut fs::File::create(&file).unwrap(), &file).unwrap();
        let first = dir::hold_itself(&data_dir).unwrap();
        let working = data_dir.join(RESTORING).join(MEMBER);
        fs::create_dir_all(&working).unwrap();
        assert!(matches!(restore(&file, &RestoreOptions::new(&data_dir)), Err(Error::Locked { .. })));
        assert!(working.exists());
        drop(first);
        restore(&file, &RestoreOptions::new(&data_dir)).unwrap();
        assert!(!working.exists() && data_dir.join(MEMBER).exists());
    }

    #[test]
    fn over_itself_it_needs_another_token() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a backup");
        let header = snapshot::Header { cluster_id: 7, revision: 1, ..snapshot::Header::default() };
        snapshot::write(&header, [], &mut fs::File::create(&file).unwrap(), &file).unwrap();
        let mut options = RestoreOptions::new(dir.path().join("data"));
        options.initial_cluster = "default=http://127.0.0.1:1,other=http://127.0.0.1:2".into();
        options.initial_advertise_peer_urls = vec!["http://127.0.0.1:1".parse().unwrap()];
        let first = restore(&file, &options).unwrap();
        assert!(matches!(restore(&file, &options), Err(Error::Config(what)) if what.contains("--initial-cluster-token")));
        options.initial_cluster_token = "another".into();
        let second = restore(&file, &options).unwrap();
        assert!(second.cluster_id != first.cluster_id);
        assert!(second.aside.unwrap().file_name().unwrap().to_str().unwrap().starts_with("old-"));
    }
}
