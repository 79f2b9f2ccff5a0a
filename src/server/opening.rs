//! Opening the state of a member that is on disk, and seeing to it that it and the log belong together.
//!
//! The log lets go of what the state has been seen to hold on disk, so the state reaches at least to where the log begins, and never beyond
//! its end:
//!
//! ```text
//! log     |  cut off  | 301 302 303 ... 310 |
//! state   300 ... 310: fits      299: the state has lost something      311: the log has
//! ```
//!
//! # Invariants
//! - Who opens a state and does not keep it has closed it again.
//! - Of the two it is said which one is damaged: a lost state is given by the others (see [`rebuild`](super::rebuild)), a lost log is not made up.

use std::path::PathBuf;
use std::sync::Arc;
#[cfg(feature = "simulation")]
use std::time::Duration;

use super::min_ttl;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lease::{Lessor, LessorOptions};
use crate::metrics::Counters;
use crate::mvcc::Store;
use crate::raft::LogId;
use crate::raft::apply::{Clock, Machine};
use crate::storage::Backend;
use crate::storage::history::HistoryOptions;
use crate::storage::sled::Sled;
use crate::storage::wal::{LogState, Wal};
use crate::tls::Connector;
#[cfg(feature = "simulation")]
use crate::world;

/// The snapshot whose installation a crash has interrupted: it has taken the state's place, and the log up to it is still to be purged.
///
/// Only if the state is exactly what came as that snapshot, and the log is there, with the vote that the snapshot came under: a state
/// that has gone on since, beyond its log, has lost its log.
fn half_installed(machine: &Machine, log: &LogState) -> Option<LogId> {
    let installed = machine.installed()?;
    let done = log.purged.is_some_and(|purged| purged.index >= installed.index);
    (!done && log.vote.is_some() && machine.applied().log_id == Some(installed)).then_some(installed)
}

/// Lets the log go up to a snapshot.
async fn finish_install(wal: &Wal, installed: LogId) -> Result<()> {
    tracing::info!(entry = installed.index, "finishing the installation of a snapshot: the log before it goes");
    if wal.log_id(installed.index).is_some_and(|id| id.term != *installed.leader_id) {
        // What stands there was never committed, nor is what follows it.
        let before = installed.index.checked_sub(1);
        crate::raft::log::truncate_after(wal, before).await?;
    }
    crate::raft::log::purge(wal, installed).await
}

/// What it takes to open the state of a member.
pub(super) struct Opener<'a> {
    pub config: &'a Config,
    pub state: PathBuf,
    pub wal: &'a Wal,
    pub history: HistoryOptions,
    pub clock: Clock,
    pub counters: Arc<Counters>,
    /// For members with `https` URLs, should they be asked for their state.
    pub tls: Option<Connector>,
}

/// Why a state could not be opened.
pub(crate) enum Damage {
    /// It is not whole, or has lost something: with the log as it is, another can take its place.
    State(Error),
    /// Anything else.
    Other(Error),
}

impl Damage {
    pub(crate) fn into_error(self) -> Error {
        match self {
            Damage::State(err) | Damage::Other(err) => err,
        }
    }
}

impl Opener<'_> {
    /// Opens the state as it is on disk, or makes an empty one.
    ///
    /// # Errors
    /// `Corrupt` and `Format` as they are, `Io`. What was opened is closed again.
    pub fn read(&self) -> Result<Arc<Machine>> {
        let config = self.config;
        let backend: Arc<dyn Backend> = Arc::new(Sled::open_with(&self.state, !config.unsafe_no_fsync)?);
        machine_on(config, backend, &self.history, &self.clock, &self.counters)
    }

    /// Opens the state, and sees to it that it and the log belong together.
    pub async fn open(&self) -> Result<Arc<Machine>, Damage> {
        let machine = self.read().map_err(|err| match err {
            Error::Corrupt { .. } => Damage::State(err),
            err => Damage::Other(err),
        })?;
        match fit(&machine, self.wal).await {
            Ok(()) => Ok(machine),
            Err(damage) => {
                machine.close();
                Err(damage)
            }
        }
    }
}

/// The state that a storage holds.
///
/// # Errors
/// `Corrupt` and `Format` as they are, `Io`.
pub(crate) fn machine_on(
    config: &Config,
    backend: Arc<dyn Backend>,
    history: &HistoryOptions,
    clock: &Clock,
    counters: &Arc<Counters>,
) -> Result<Arc<Machine>> {
    let mut attached = Vec::new();
    let (store, saved) = Store::open(backend, history.clone(), &mut |lease, key| attached.push((lease, key)))?;
    let options = LessorOptions { min_ttl: min_ttl(config), ..LessorOptions::default() };
    // No simulated lease lives long enough otherwise.
    #[cfg(feature = "simulation")]
    let options = LessorOptions {
        checkpoint_interval: if world::is_simulated() { Some(Duration::from_secs(1)) } else { options.checkpoint_interval },
        ..options
    };
    let lessor = Lessor::new(options);
    let slow = config.warning_apply_duration;
    let machine = Machine::new(Arc::new(store), saved, attached, lessor, clock.clone(), slow, counters.clone())?;
    Ok(Arc::new(machine))
}

/// Sees to it that state and log belong together, and accepts the log then. If they do not, nothing was changed in it.
pub(crate) async fn fit(machine: &Machine, wal: &Wal) -> Result<(), Damage> {
    let half = half_installed(machine, &wal.log_state());
    if half.is_none() {
        check_reach(machine, wal)?;
    }
    wal.accept().map_err(Damage::Other)?;
    match half {
        Some(installed) => finish_install(wal, installed).await.map_err(Damage::Other),
        None => Ok(()),
    }
}

/// The state must reach at least as far as the log was cut off, or entries are missing between the two: the log only lets
/// go of what the state has been seen to hold on disk, so it is the state that has lost something.
fn check_reach(machine: &Machine, wal: &Wal) -> Result<(), Damage> {
    let log = wal.log_state();
    let state = machine.store().history().backend().path();
    let applied = machine.applied().log_id.map_or(0, |id| id.index);
    let purged = log.purged.map_or(0, |id| id.index);
    if applied < purged {
        let what = format!("it has come only to entry {applied}, but the log begins after entry {purged}, which it held before");
        return Err(Damage::State(Error::Corrupt { path: state, offset: None, what }));
    }
    if log.last.is_none_or(|last| last.index < applied) && applied > 0 {
        let last = log.last.map_or(0, |last| last.index);
        // The state is whole: it is the log that has lost something.
        let (path, offset) = wal.end();
        let what = format!("the log cannot be read beyond entry {last}, but the state in {} has come to entry {applied}", state.display());
        return Err(Damage::Other(Error::Corrupt { path, offset, what }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prost::Message;
    use tokio::sync::oneshot;

    use super::*;
    use crate::proto::internal;
    use crate::raft::{log_id, log_id_to_proto};
    use crate::storage::history::History;
    use crate::storage::mem::Mem;
    use crate::storage::wal::{LogEntry, LogId, WalOptions};

    /// A state that came as a snapshot up to one entry and has gone on to another.
    fn machine(installed: u64, applied: u64) -> Machine {
        let backend = Arc::new(Mem::new());
        let (history, _) = History::open(backend.clone(), HistoryOptions::default(), &mut |_, _| Ok(())).unwrap();
        history.put_meta(b"raft/installed", Some(log_id_to_proto(log_id(2, installed)).encode_to_vec().into()));
        let position = internal::Applied { log_id: Some(log_id_to_proto(log_id(2, applied))), revision: 1 };
        history.commit(position.encode_to_vec().into());
        history.sync().unwrap();
        let (store, saved) = Store::open(backend, HistoryOptions::default(), &mut |_, _| ()).unwrap();
        let lessor = Lessor::new(LessorOptions::default());
        Machine::new(Arc::new(store), saved, Vec::new(), lessor, Arc::new(|| Duration::ZERO), Duration::MAX, Arc::default()).unwrap()
    }

    async fn durable(change: impl FnOnce(crate::storage::wal::Done)) {
        let (tell, told) = oneshot::channel();
        change(Box::new(move |result| tell.send(result).unwrap()));
        told.await.unwrap().unwrap();
    }

    /// The process died after the state was replaced, and before the log up to it was purged.
    #[tokio::test]
    async fn an_interrupted_installation_is_finished() {
        // The log ends before the snapshot, at it, and behind it; and one that was lost, with its vote, is not taken for one of these.
        for (last, vote) in [(100, true), (300, true), (310, true), (100, false)] {
            let dir = tempfile::tempdir().unwrap();
            let (wal, _) = Wal::open(dir.path(), WalOptions::default()).unwrap();
            if vote {
                durable(|done| wal.save_vote("vote".into(), done).unwrap()).await;
            }
            let entries = (1..=last).map(|index| LogEntry { id: LogId { term: 2, node: 0, index }, payload: "x".into() });
            durable(|done| wal.append(entries.collect(), done).unwrap()).await;
            wal.close().unwrap();
            let (wal, _) = Wal::read(dir.path(), WalOptions::default()).unwrap();
            let checked = fit(&machine(300, 300), &wal).await.map_err(Damage::into_error);
            if !vote {
                assert!(matches!(checked, Err(Error::Corrupt { .. })), "{checked:?}");
                continue;
            }
            checked.unwrap();
            wal.close().unwrap();
            let (_, recovered) = Wal::open(dir.path(), WalOptions::default()).unwrap();
            let LogState { purged, last: found, .. } = recovered.state;
            assert_eq!((purged.unwrap().index, found.unwrap().index), (300, last.max(300)));
        }
    }

    /// A state that has gone on beyond its log has lost a part of the log, however it began.
    #[tokio::test]
    async fn a_state_ahead_of_its_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (wal, _) = Wal::open(dir.path(), WalOptions::default()).unwrap();
        durable(|done| wal.save_vote("vote".into(), done).unwrap()).await;
        let machine = machine(300, 301);
        assert!(matches!(fit(&machine, &wal).await, Err(Damage::Other(Error::Corrupt { .. }))));
    }

    /// A byte that flips in the last write makes it look like one that was cut short. While the state tells that it was whole it is not removed.
    #[tokio::test]
    async fn a_write_that_the_state_knows_of_is_never_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let (wal, _) = Wal::open(dir.path(), WalOptions::default()).unwrap();
        durable(|done| wal.save_vote("vote".into(), done).unwrap()).await;
        let entry = |index| LogEntry { id: LogId { term: 2, node: 0, index }, payload: "x".into() };
        durable(|done| wal.append((1..300).map(entry).collect(), done).unwrap()).await;
        let file = dir.path().join("0000000000000001.log");
        durable(|done| wal.append(vec![entry(300), entry(301)], done).unwrap()).await;
        let mut whole = std::fs::read(&file).unwrap();
        wal.close().unwrap();
        drop(wal);
        // As a process leaves it that is killed before the write is marked, and with a byte of it flipped.
        let at = whole.windows(4).rposition(|bytes| bytes == b"qfrm").unwrap();
        let body = u32::from_le_bytes(whole[at + 4..at + 8].try_into().unwrap()) as usize;
        whole[at + 40 + body..].fill(0);
        let mut damaged = whole.clone();
        damaged[at + 50] ^= 4;
        std::fs::write(&file, &damaged).unwrap();

        let machine = machine(200, 301);
        let (wal, recovered) = Wal::read(dir.path(), WalOptions::default()).unwrap();
        assert_eq!((recovered.state.last.unwrap().index, recovered.torn.clone()), (299, Some((file.clone(), at as u64))));
        let refused = fit(&machine, &wal).await.map_err(Damage::into_error);
        assert!(
            matches!(&refused, Err(Error::Corrupt { path, offset: Some(offset), .. }) if *path == file && *offset == at as u64),
            "{refused:?}"
        );
        assert!(wal.save_vote("other".into(), Box::new(|_| ())).is_err(), "writes are refused while the log is only read");
        wal.close().unwrap();
        drop(wal);
        assert!(std::fs::read(&file).unwrap() == damaged, "a refusal changes nothing");

        std::fs::write(&file, &whole).unwrap();
        let (wal, recovered) = Wal::read(dir.path(), WalOptions::default()).unwrap();
        assert_eq!((recovered.state.last.unwrap().index, recovered.torn), (301, None));
        fit(&machine, &wal).await.map_err(Damage::into_error).unwrap();
        wal.close().unwrap();
    }
}
