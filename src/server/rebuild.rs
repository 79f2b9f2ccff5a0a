//! A state that is damaged, replaced: set aside, and fetched from another member.
//!
//! The state is what comes of applying the log. When it is lost, or not what was written, a member that is alone can only refuse to start, for
//! the log goes back no further than what the state was to hold. One of several can have it from the others:
//!
//! ```text
//! start: state damaged, log and vote whole     state -> state.damaged-1, an empty state in its place
//! log from entry 1 on                          Raft starts and applies what was committed again
//! log from entry 901 on                        a snapshot of entry 900 or later is fetched from whoever has one, and takes the empty
//!                                              state's place; then Raft starts and goes on behind it
//! ```
//!
//! # Why this is safe
//! What Raft must never forget is the vote and the log, and neither is touched. Until the state is there no Raft runs: to the others the member
//! is one that is down. It neither votes, nor stands for election, nor acknowledges. What it starts with in the end is what any member has that
//! was down for a while: its vote, its log from some entry on, and a state of at least that entry. A snapshot holds only what was committed; so what
//! the log has up to that entry is in it, or was never committed (and goes, if it is other than what was).
//!
//! Who gives the state need not lead: with one of three down and another one's state damaged, no leader can be elected before it is mended.
//!
//! A log or a vote that is damaged cannot be had from others: the member may have acknowledged what is in no other log, and voted for
//! somebody. The error says what to do: the cluster has to do without this member, and it is added as a new one.
//!
//! # A crash in between
//! - After the state was set aside: the next start finds an empty state behind its log, and goes on from there.
//! - After the snapshot has taken its place: as after any [snapshot](crate::raft::incoming).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::founding::others_told;
use super::{Damage, Opener};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::node::members::REMOVED;
use crate::proto::internal::Member;
use crate::proto::peer::GetSnapshotResponse;
use crate::raft::apply::Machine;
use crate::raft::incoming::Builder;
use crate::raft::network::{self, Link, Network};
use crate::raft::{LogId, log_id_from_proto};
use crate::storage::dir::{self, DataDir, Identity};
use crate::storage::history::HistoryOptions;
use crate::storage::wal::LogState;
use crate::tls::Connector;

/// How long to wait before the others are asked again, when none of them has given the state.
const RETRY: Duration = Duration::from_millis(500);

/// How often it is told that the member still waits.
const TELL: Duration = Duration::from_secs(10);

/// Pieces in a row that may fail to come before another member is asked; a piece that has arrived begins a new count.
const TRIES: u32 = 5;

/// Where other members may be, by what is known without a state: as noted, or else as the member was told to found or to join. None: it is
/// alone.
pub(super) fn others(dir: &DataDir, config: &Config, identity: &Identity) -> Result<Vec<String>> {
    if let Some(peers) = dir.peers() {
        return Ok(peers.into_iter().filter(|(id, _)| *id != identity.member_id).flat_map(|(_, urls)| urls).collect());
    }
    others_told(config, identity)
}

/// Adds to an error about the log what is to be done, if there are others.
pub(super) fn log_is_lost(err: Error, others: &[String], identity: &Identity) -> Error {
    match err {
        Error::Corrupt { path, offset, what } if !others.is_empty() => {
            let id = identity.member_id;
            let remedy = format!(
                "the log of a member cannot be had from the others, for it may have acknowledged and voted what no other knows: remove it \
                 (etcdctl member remove {id:x}), delete its data directory, and add it anew (etcdctl member add)"
            );
            Error::Corrupt { path, offset, what: format!("{what}; {remedy}") }
        }
        err => err,
    }
}

/// A member that has once known others has a log.
///
/// # Errors
/// `Corrupt`, when it has none.
pub(super) fn check_log(dir: &DataDir, log: &LogState) -> Result<()> {
    let has_had = dir.peers().is_some_and(|peers| !peers.is_empty());
    if has_had && log.vote.is_none() && log.last.is_none() {
        let what = "it is empty, but the member has been one of a cluster".to_owned();
        return Err(Error::Corrupt { path: dir.wal().to_owned(), offset: None, what });
    }
    Ok(())
}

/// Puts another state in the place of one that is damaged; it is to be opened then.
///
/// # Errors
/// The damage itself, when it cannot be mended here: it is not the state's, or the member is alone. `Removed`; `Unavailable` or
/// `Stopped` when the start was given up.
pub(super) async fn rebuild(
    damage: Damage,
    had_state: bool,
    dir: &DataDir,
    identity: &Identity,
    others: &[String],
    opener: &Opener<'_>,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let err = match damage {
        Damage::State(err) if !others.is_empty() => err,
        Damage::State(err) => return Err(err),
        Damage::Other(err) => return Err(log_is_lost(err, others, identity)),
    };
    let log = opener.wal.log_state();
    if log.vote.is_none() || log.last.is_none() {
        let what = "it is empty, and the state is damaged, too".to_owned();
        tracing::error!(error = %err, "the state cannot be opened");
        return Err(log_is_lost(Error::Corrupt { path: dir.wal().to_owned(), offset: None, what }, others, identity));
    }
    // Where somebody has taken it away there is nothing to keep but what this start has just made.
    match if had_state { dir.set_state_aside()? } else { None } {
        Some(aside) => {
            tracing::error!(error = %err, aside = %aside.display(), "the state is damaged, and was set aside: the member makes itself a new one");
        }
        None => tracing::warn!("the member has no state, and its log begins later: the others are asked for theirs"),
    }
    opener.counters.state_rebuilds.inc();
    let Some(purged) = log.purged else {
        tracing::info!("the log goes back to the beginning: the state is made from it alone");
        return Ok(());
    };
    fetch(dir, identity, others, opener, purged.index, given_up).await
}

/// Fetches a state of at least the entry `purged`, from whoever has one.
async fn fetch(
    dir: &DataDir,
    identity: &Identity,
    others: &[String],
    opener: &Opener<'_>,
    purged: u64,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let network = Network::new(identity.clone(), opener.counters.clone(), None, opener.tls.clone());
    let mut told: Option<Instant> = None;
    loop {
        let mut tried = Vec::new();
        for (id, member) in members(others, identity, &opener.tls, &mut tried).await {
            let mut link = network.link(id, &member);
            match fetch_from(&mut link, dir, identity, opener, purged, given_up).await {
                Ok(()) => return Ok(()),
                Err(Failed::Here(err)) => return Err(err),
                Err(Failed::There(what)) if what == REMOVED => {
                    dir.set_removed()?;
                    return Err(Error::Removed);
                }
                Err(Failed::There(what)) => tried.push(format!("{id:x}: {what}")),
            }
        }
        if told.is_none_or(|told| told.elapsed() >= TELL) {
            tracing::warn!(tried = tried.join("; "), "no member has given its state yet: asking on");
            told = Some(Instant::now());
        }
        // Also when the state was there: who has given up takes nothing over.
        if given_up() {
            return Err(Error::Unavailable(format!("no member has given its state: {}", tried.join("; "))));
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The other members, as those say who answer.
async fn members(others: &[String], identity: &Identity, tls: &Option<Connector>, tried: &mut Vec<String>) -> BTreeMap<u64, Member> {
    let asked = others.iter().map(|url| async move { (url, network::members_at(url, tls).await) });
    let mut members = BTreeMap::new();
    for (url, answer) in futures_util::future::join_all(asked).await {
        match answer {
            Ok(there) if there.cluster_id != identity.cluster_id => {
                tried.push(format!("{url}: it belongs to cluster {:x}, not to {:x}", there.cluster_id, identity.cluster_id));
            }
            Ok(there) => members.extend(there.members.into_iter().filter(|member| member.id != identity.member_id).map(|member| {
                let of = Member { name: member.name, peer_urls: member.peer_urls, ..Member::default() };
                (member.id, of)
            })),
            Err(status) => tried.push(status.message().to_owned()),
        }
    }
    members
}

/// Why a state did not come.
enum Failed {
    /// This member cannot take it, from nobody.
    Here(Error),
    /// The other one has none now, or is not there.
    There(String),
}

impl From<Error> for Failed {
    fn from(err: Error) -> Self {
        Failed::Here(err)
    }
}

async fn fetch_from(
    link: &mut Link,
    dir: &DataDir,
    identity: &Identity,
    opener: &Opener<'_>,
    purged: u64,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<(), Failed> {
    let id = rand::random::<u64>();
    let path = dir::incoming(dir.member(), id);
    let received = receive(link, id, &path, opener, purged, given_up).await;
    let taken = match received {
        Ok(last) => {
            // It blocks on the disk, for as long as the state is large; nothing else runs here yet.
            let (from, cluster, state) = (path.clone(), identity.cluster_id, opener.read()?);
            let history = opener.history.clone();
            let built = tokio::task::spawn_blocking(move || {
                let built = build(&from, &state, cluster, last, history);
                state.close();
                built
            });
            match built.await {
                Ok(Ok(())) => {
                    tracing::info!(from = %format_args!("{:x}", link.id()), entry = last.index, "the state was rebuilt from another member's");
                    Ok(())
                }
                // It is damaged, or not what it was to be: another may have a better one.
                Ok(Err(err @ (Error::Corrupt { .. } | Error::Format { .. }))) => Err(Failed::There(err.to_string())),
                Ok(Err(err)) => Err(Failed::Here(err)),
                Err(err) => Err(Failed::Here(Error::Failed(format!("building the state ended early: {err}")))),
            }
        }
        Err(failed) => Err(failed),
    };
    if let Err(err) = std::fs::remove_file(&path)
        && err.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %err, "could not remove a snapshot; the next start tries again");
    }
    taken
}

/// Receives a snapshot into a file. Returns the entry that it is of.
async fn receive(
    link: &mut Link,
    id: u64,
    path: &Path,
    opener: &Opener<'_>,
    purged: u64,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<LogId, Failed> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).truncate(true).write(true).mode(0o600).open(path);
    let mut file: File = opened.map_err(|err| Error::io("making the file of a snapshot,", path, err))?;
    let (mut offset, mut tries) = (0, 0);
    loop {
        if given_up() {
            return Err(Failed::Here(Error::Stopped));
        }
        let answer = match link.get_snapshot(id, offset).await {
            Ok(answer) if !answer.refused.is_empty() => return Err(Failed::There(answer.refused)),
            Ok(answer) if crc32c::crc32c(&answer.bytes) == answer.crc32c => answer,
            Ok(_) if tries < TRIES => {
                tries += 1;
                continue;
            }
            Ok(_) => return Err(Failed::There("what it sends does not arrive whole".into())),
            Err(status) if status.code() == Code::FailedPrecondition || tries >= TRIES || offset == 0 => {
                return Err(Failed::There(status.message().to_owned()));
            }
            Err(_) => {
                tries += 1;
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        tries = 0;
        let GetSnapshotResponse { bytes, end, last, .. } = answer;
        let last = last.map(log_id_from_proto).ok_or_else(|| Failed::There("it does not say what its snapshot is of".into()))?;
        if last.index < purged {
            return Err(Failed::There(format!("it has come only to entry {}, and the log here begins after {purged}", last.index)));
        }
        if offset == 0 {
            tracing::info!(from = %format_args!("{:x}", link.id()), entry = last.index, "fetching the state of another member");
        }
        file.write_all(&bytes).map_err(|err| Error::io("writing the snapshot", path, err))?;
        opener.counters.snapshot_received_bytes.add(bytes.len() as u64);
        offset += bytes.len() as u64;
        if end {
            return Ok(last);
        }
    }
}

/// Makes a state of a file, and has it take the empty one's place.
fn build(path: &Path, empty: &Arc<Machine>, cluster: u64, last: LogId, history: HistoryOptions) -> Result<()> {
    let mut builder = Builder::begin(path, empty, cluster, last)?;
    while builder.step()? {}
    let prepared = builder.finish(empty, history)?;
    prepared.store().history().backend().take_over()?;
    prepared.store().history().backend().close();
    Ok(())
}
