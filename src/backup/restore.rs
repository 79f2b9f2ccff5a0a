//! From a backup to the data directory of a new cluster, offline.
//!
//! ```text
//! quorate-...-r900.backup  ->  <data-dir>/restoring/member/    identity, log, state: written, synced, read back
//!                              <data-dir>/old-20261123T050000Z/   the same, renamed ...
//!                              <data-dir>/member/              ... and changed places with what was there, at once
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
//! - The file is read from end to end, and found sound, before anything is written.
//! - Until the new state is whole and on disk, what was there is untouched; then it is moved aside, and never removed. Where the file system
//!   exchanges two names at once, which ext4, XFS, Btrfs and tmpfs do, there is always the one or the other.
//! - A directory in use is refused.
//!
//! # Caveats
//! - Several members restored from different files would be one cluster of different states, if they could talk: they cannot, for
//!   their cluster ids differ. The same file restored twice to the same list needs another token.
//! - Leases have their whole time again once the cluster has a leader. Alarms are not restored; those that still have a cause are raised anew.
//! - A log elsewhere than in the data directory (`--wal-dir`) is not restored to; the member is to be started without it.
//! - Only what is a member's is replaced. What a node of the embedded mode remembers beside it is not.

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
use crate::config::{Config, RestoreOptions, Url};
use crate::error::{Error, Result};
use crate::mvcc::{META_COMPACTED, Store};
use crate::proto::internal;
use crate::raft::restored::{Beginning, is_kept};
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
///
/// # Errors
/// `Config`; `Format` or `Corrupt` for a file that is not a backup, or a damaged one; `Locked` when the directory is in use; `Io`. The
/// directory is as it was then.
pub fn restore(file: impl AsRef<Path>, options: &RestoreOptions) -> Result<Restored> {
    let file = file.as_ref();
    let mut config = options.founding()?;
    let facts = format::verify(file)?;
    let bump = i64::try_from(options.bump_revision).ok().and_then(|bump| facts.revision.checked_add(bump));
    let revision = bump.ok_or_else(|| {
        Error::Config(format!("bump-revision is {}: no revision is that much above {}", options.bump_revision, facts.revision))
    })?;

    config.initial_cluster_token = token(&config, &facts)?;
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
    // Held to the end, whoever it was.
    let _old = if member.exists() { Some(dir::hold(&member)?) } else { None };
    let working = data_dir.join(RESTORING);
    if working.exists() {
        // Of a restore that was cut off; or of one that goes on.
        drop(dir::hold(&working.join(MEMBER))?);
        fs::remove_dir_all(&working).map_err(|err| Error::io("removing", &working, err))?;
    }
    let made = DataDir::open(&working, None).and_then(|mut dir| {
        dir.set_identity(identity.clone())?;
        let keys = write_state(&dir.state(), file, &facts, revision, &beginning)?;
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
fn write_state(path: &Path, file: &Path, facts: &Facts, revision: i64, beginning: &Beginning) -> Result<u64> {
    let is_bumped = revision > facts.revision;
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(path)?);
    let (history, _) = History::open(backend.clone(), HistoryOptions::default(), &mut |_, _| Ok(()))?;
    let mut reader = Reader::open(file)?;
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
                    if is_kept(&key) || (key == META_COMPACTED && !is_bumped) {
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
        dir::sync_dir(data_dir)?;
        // Empty by now. What cannot be removed is removed by the next restore.
        let _ = fs::remove_dir_all(working);
        return Ok(None);
    }
    // Renamed first: once the two have changed places it must not have a name under which a later restore would remove it.
    let aside = free_name(data_dir);
    fs::rename(working, &aside).map_err(|err| Error::io("renaming", working, err))?;
    let made = aside.join(MEMBER);
    if let Err(err) = exchange(&made, &member) {
        // Back, so that it is removed.
        let _ = fs::rename(&aside, working);
        return Err(Error::io("exchanging the restored member with", &member, err));
    }
    dir::sync_dir(&aside)?;
    dir::sync_dir(data_dir)?;
    Ok(Some(aside))
}

/// Has two directories change their names.
fn exchange(made: &Path, member: &Path) -> io::Result<()> {
    match renameat_with(CWD, made, CWD, member, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            // Not at once then. When the process dies in between, `member` is missing: it has to be renamed by hand, or restored again.
            let between = made.with_file_name("restored");
            fs::rename(made, &between)?;
            fs::rename(member, made)?;
            fs::rename(&between, member)
        }
        other => other.map_err(io::Error::from),
    }
}

/// A name for what is kept aside, by the time, that nobody has.
fn free_name(data_dir: &Path) -> PathBuf {
    let now = DateTime::<Utc>::from(SystemTime::now()).format("%Y%m%dT%H%M%SZ").to_string();
    let mut name = data_dir.join(format!("old-{now}"));
    let mut count = 1;
    while name.exists() {
        count += 1;
        name = data_dir.join(format!("old-{now}-{count}"));
    }
    name
}
