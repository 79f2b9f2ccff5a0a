//! Taking in a snapshot: what a leader sends to a member that lacks entries which are no longer in the log.
//!
//! The leader sends it in pieces, each with its checksum, its place, and the id of this very snapshot; the answer says how much of it
//! is in the file here. So after a broken connection the leader goes on where the file ends. When all of it is there, the leader asks to
//! have it installed, again and again until that is done: a call is short, however long the work takes.
//!
//! ```text
//! PutSnapshot {id 7, offset 0, 512 KiB}        ->  have 524288
//! PutSnapshot {id 7, offset 524288, 512 KiB}   ->  the connection breaks
//! PutSnapshot {id 7, offset 524288, 512 KiB}   ->  have 1048576
//! InstallSnapshot {id 7, size 1048576, vote}   ->  pending … the vote, as the answer to any message of a leader
//! ```
//!
//! # Invariants
//! - There is one file at most; a leader of a later term, and a leader's new attempt, begin another one. While a state is being made of a
//!   file no other is begun.
//! - The state in use is not touched before openraft has said so; see [`incoming`](crate::raft::incoming).
//! - Disk work is done in bounded steps by the threads that are kept for it, but for the last, which reads the new store as a start does.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::*;
use crate::metrics::peers::Transfer;
use crate::proto::internal::Vote as VoteMessage;
use crate::proto::peer::install_snapshot_response::Outcome as Installed;
use crate::proto::peer::{InstallSnapshotRequest, InstallSnapshotResponse, Nothing, PutSnapshotRequest, PutSnapshotResponse};
use crate::raft::apply::{Prepared, SnapshotHandle};
use crate::raft::incoming::Builder;
use crate::raft::{Vote, log_id_from_proto, vote_from_proto, vote_to_proto};
use crate::storage::dir;

/// How long a call to install a snapshot waits before it says that it is pending.
const INSTALL_WAIT: Duration = Duration::from_millis(100);

/// How long a snapshot waits for its next piece. Beyond it, it is given up: a sender that goes on all the same begins anew.
const INCOMING_IDLE: Duration = Duration::from_secs(120);

/// A snapshot that is being received, or made into a state.
pub(super) struct Incoming {
    /// The sender's name for it.
    id: u64,
    /// The term of the leader that sends it.
    term: u64,
    path: PathBuf,
    /// None once it was asked to be installed.
    file: Option<Arc<File>>,
    /// Bytes of it that are in the file.
    have: u64,
    /// When a piece of it has last come.
    touched: Instant,
    /// Counts how it goes, until all of it is here.
    transfer: Option<Transfer>,
    /// How the installation goes, once it was asked for: none while it is under way, and in the end the vote or what was wrong.
    install: Option<watch::Receiver<Option<Result<VoteMessage, String>>>>,
}

impl Incoming {
    /// Whether a state is being made of it now.
    fn is_busy(&self) -> bool {
        self.install.as_ref().is_some_and(|done| done.borrow().is_none() && done.has_changed().is_ok())
    }
}

impl Node {
    /// Takes a piece of a snapshot.
    pub async fn peer_put_snapshot(&self, request: PutSnapshotRequest) -> Result<PutSnapshotResponse> {
        self.check_running()?;
        let refused = |what: String| Ok(PutSnapshotResponse { have: 0, refused: what });
        let mut receiving = self.receiving.lock().await;
        if self.wal.space_low() && !receiving.as_ref().is_some_and(Incoming::is_busy) {
            // What there is is wanted for the log. The leader waits until there is more, and begins anew.
            if let Some(old) = receiving.take() {
                self.blocking(move || remove(&old.path)).await?;
            }
            return refused("its disk is full".into());
        }
        if receiving.as_ref().is_none_or(|incoming| incoming.id != request.id) {
            match &*receiving {
                Some(incoming) if incoming.is_busy() => return refused("another snapshot is being installed".into()),
                Some(incoming) if incoming.term > request.term && request.offset == 0 => {
                    return refused(format!("the leader of term {} is sending one", incoming.term));
                }
                // Not this one: it was begun before this member was started, or was given up for another.
                _ if request.offset > 0 => return Ok(PutSnapshotResponse::default()),
                _ => {}
            }
            let (old, path) = (receiving.take(), dir::incoming(&self.options.member_dir, request.id));
            let made = path.clone();
            let file = self.blocking(move || {
                if let Some(old) = old {
                    remove(&old.path);
                }
                let mut options = OpenOptions::new();
                let opened = options.create(true).truncate(true).read(true).write(true).mode(0o600).open(&made);
                opened.map_err(|err| Error::io("making the file of a snapshot,", &made, err))
            });
            let file = Some(Arc::new(file.await??));
            let transfer = self.counters().peers.get(self.leader()).map(|leader| leader.begin_receiving());
            tracing::info!(id = %format_args!("{:x}", request.id), term = request.term, "a leader begins to send a snapshot");
            *receiving = Some(Incoming {
                id: request.id,
                term: request.term,
                path,
                file,
                have: 0,
                touched: Instant::now(),
                transfer,
                install: None,
            });
        }
        let Some(incoming) = receiving.as_mut() else { return refused("there is no snapshot".into()) };
        incoming.touched = Instant::now();
        let Some(file) = incoming.file.clone().filter(|_| request.offset == incoming.have && !request.bytes.is_empty()) else {
            return Ok(PutSnapshotResponse { have: incoming.have, refused: String::new() });
        };
        if crc32c::crc32c(&request.bytes) != request.crc32c {
            tracing::warn!(offset = request.offset, "a piece of a snapshot has arrived damaged, and is asked for again");
            return Ok(PutSnapshotResponse { have: incoming.have, refused: String::new() });
        }
        let (path, bytes) = (incoming.path.clone(), request.bytes.clone());
        // When the call ends before this does, the same piece comes again and is written over itself.
        let written = self.blocking(move || {
            file.write_all_at(&bytes, request.offset).map_err(|err| {
                // Its room is wanted for the log.
                remove(&path);
                Error::io("writing the snapshot", &path, err)
            })
        });
        if let Err(err) = written.await? {
            *receiving = None;
            return Err(err);
        }
        incoming.have += request.bytes.len() as u64;
        self.counters().snapshot_received_bytes.add(request.bytes.len() as u64);
        Ok(PutSnapshotResponse { have: incoming.have, refused: String::new() })
    }

    /// Lets go of a snapshot of which nothing has come for long: who sent it is gone, or has given it up. Its file may be as large as the state.
    pub(super) async fn give_up_incoming(&self) {
        let idle = |incoming: &Incoming| incoming.install.is_none() && incoming.touched.elapsed() >= INCOMING_IDLE;
        let given_up = {
            let Ok(mut receiving) = self.receiving.try_lock() else { return };
            if !receiving.as_ref().is_some_and(idle) {
                return;
            }
            receiving.take()
        };
        if let Some(given_up) = given_up {
            tracing::info!(id = %format_args!("{:x}", given_up.id), have = given_up.have, "a snapshot of which nothing more has come is given up");
            let _ = self.blocking(move || remove(&given_up.path)).await;
        }
    }

    /// Has what was received take the state's place, or says how far that has come.
    pub async fn peer_install_snapshot(self: &Arc<Self>, request: InstallSnapshotRequest) -> Result<InstallSnapshotResponse> {
        self.check_running()?;
        let answer = |outcome| Ok(InstallSnapshotResponse { outcome: Some(outcome) });
        let mut done = {
            let mut receiving = self.receiving.lock().await;
            let Some(incoming) = receiving.as_mut().filter(|incoming| incoming.id == request.id) else {
                return answer(Installed::Refused("there is no such snapshot here".into()));
            };
            match &incoming.install {
                Some(done) => done.clone(),
                None if incoming.have != request.size => {
                    let what = format!("of its {} bytes {} are here", request.size, incoming.have);
                    return answer(Installed::Refused(what));
                }
                None => {
                    let (Some(vote), Some(last)) = (request.vote, request.last) else {
                        return answer(Installed::Refused("it says neither who sends it nor what it holds".into()));
                    };
                    let (tell, done) = watch::channel(None);
                    incoming.install = Some(done.clone());
                    incoming.file = None;
                    if let Some(transfer) = incoming.transfer.take() {
                        transfer.done();
                    }
                    let (node, path) = (self.clone(), incoming.path.clone());
                    self.spawn(async move {
                        node.installing.store(true, Ordering::Relaxed);
                        let outcome = node.install(&path, vote_from_proto(vote), log_id_from_proto(last)).await;
                        node.installing.store(false, Ordering::Relaxed);
                        let outcome = outcome.map_err(|err| {
                            tracing::error!(error = %err, "a snapshot from the leader is not installed");
                            err.to_string()
                        });
                        let _ = node.blocking(move || remove(&path)).await;
                        // Who asked may be gone.
                        let _ = tell.send(Some(outcome));
                    });
                    done
                }
            }
        };
        // When the member stops meanwhile it will never be known.
        let _ = tokio::time::timeout(INSTALL_WAIT, done.wait_for(Option::is_some)).await;
        let outcome = done.borrow().clone();
        match outcome {
            None => answer(Installed::Pending(Nothing {})),
            Some(Ok(vote)) => answer(Installed::Vote(vote)),
            Some(Err(what)) => answer(Installed::Refused(what)),
        }
    }

    /// Makes a state of a file and hands it to openraft, which has it take the old one's place if it is newer.
    async fn install(&self, path: &Path, vote: Vote, last: LogId) -> Result<VoteMessage> {
        let began = self.machine.now();
        let prepared = self.prepare(path.to_owned(), last).await?;
        let store = prepared.store().clone();
        let snapshot = openraft::storage::Snapshot { meta: prepared.meta(), snapshot: SnapshotHandle::Incoming(Box::new(prepared)) };
        let answer = self.raft.install_full_snapshot(vote, snapshot).await;
        if !self.machine.current.is(&store) {
            tracing::info!(entry = last.index, "a snapshot was not wanted any more");
            self.machine.retire(store);
        }
        let answer = answer.map_err(|err| Error::Failed(err.to_string()))?;
        tracing::info!(entry = last.index, took = ?self.machine.now().saturating_sub(began), "a snapshot was taken in");
        Ok(vote_to_proto(&answer.vote))
    }

    /// Makes a store of a file, step by step.
    async fn prepare(&self, path: PathBuf, last: LogId) -> Result<Prepared> {
        let (machine, cluster) = (self.machine.clone(), self.identity.cluster_id);
        let mut builder = self.blocking(move || Builder::begin(&path, &machine, cluster, last)).await??;
        loop {
            // A builder that has failed is dropped in there, with its files.
            let step = self.blocking(move || builder.step().map(|more| (builder, more)));
            let (back, more) = step.await??;
            builder = back;
            if !more {
                break;
            }
        }
        let (machine, options) = (self.machine.clone(), self.options.history.clone());
        self.blocking(move || builder.finish(&machine, options)).await?
    }

    /// Gives up the files of stores that snapshots have replaced, when nobody reads them any more.
    pub(super) async fn give_up_replaced(&self) {
        let unused = self.machine.take_unused();
        if !unused.is_empty() {
            // What cannot be removed now is removed by the next start.
            let _ = self.blocking(move || drop(unused)).await;
        }
    }
}

fn remove(path: &Path) {
    if let Err(err) = std::fs::remove_file(path)
        && err.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %err, "could not remove a snapshot; the next start tries again");
    }
}
