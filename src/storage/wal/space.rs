//! The second thread: keeps the next segment ready, and recycles or removes the purged ones.
//!
//! Everything here is slow and none of it is waited for, unless a segment fills up before the next one is ready. Each step leaves a
//! directory that opens: a file gets its segment's name only when it is complete and durable, and a purged segment's new name is durable
//! before its bytes change.

use super::MAX_SPARES;
use super::disk::{Disk, DiskFile};
use super::frame::{SEGMENT_HEADER_LEN, SegmentHeader};
use super::state::{FailOnPanic, Segment, Shared, State, segment_name};
use crate::error::{Error, Result};
use rustix::io::Errno;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::{Arc, PoisonError};

/// The name of a file that is being prepared; on opening, what bears it is removed.
pub(super) const NEW_NAME: &str = "new.tmp";

/// How many zeros are written before a sync: enough to be quick, little enough that a frame's sync beside it does not wait long.
const ZERO_CHUNK: usize = 1 << 20;

/// How many zeros go into one write. The page cache keeps what one write brought in one folio, and counts and writes back
/// the whole folio when a byte of it changes: with large ones, each small frame later would cost a megabyte.
const ZERO_WRITE: usize = 4 << 10;

/// On a disk that has no room for two whole segments, smaller ones are made, down to this part of a whole one. The other's room is left to the
/// state: while that has none to be written in, the log cannot be cut off, and would take all there is.
const SCANT: u64 = 8;

/// Segments made for one large entry have a multiple of this many bytes.
const OVERSIZE_STEP: u64 = 4096;

/// What failed, as an error's text has it.
const SYNC: &str = "sync";
const RESERVE: &str = "reserve space for the log in";

/// The name of a segment that waits to be used again: its old salt, because two spares may have had the same sequence.
pub(super) fn spare_name(salt: u64) -> String {
    format!("{salt:016x}.spare")
}

/// A salt that nobody outside this process can guess.
pub(super) fn new_salt(sequence: u64) -> u64 {
    #[cfg(feature = "simulation")]
    if crate::world::is_simulated() {
        return crate::world::random();
    }
    RandomState::new().hash_one(sequence)
}

enum Job {
    /// Recycle or remove the oldest dropped segment.
    Drop { segment: Segment, keep: bool },
    /// Make the next segment, out of a spare if there is one. If there is no space for it, a smaller one will do, down to `least`.
    Prepare { sequence: u64, capacity: u64, least: u64, spare: Option<String> },
}

/// The body of the thread.
pub(super) fn run(shared: Arc<Shared>) {
    let _guard = FailOnPanic(&shared);
    let mut rests = Rests::default();
    loop {
        let job = {
            let mut state = shared.lock();
            loop {
                if state.stopped || state.failed.is_some() {
                    return;
                }
                if let Some(job) = next_job(&mut state, &rests, shared.options.segment_bytes) {
                    break job;
                }
                if rests.drop || rests.prepare {
                    let woken = shared.space.wait_timeout(state, shared.options.reserve_retry).unwrap_or_else(PoisonError::into_inner);
                    if woken.1.timed_out() {
                        rests = Rests::default();
                    }
                    state = woken.0;
                } else {
                    state = shared.space.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        carry_out(&shared, job, &mut rests);
    }
}

/// Does the next job, if there is one: the thread's work in a simulation, which has no threads.
pub(super) fn turn(shared: &Shared) -> bool {
    let mut rests = Rests::default();
    let job = {
        let mut state = shared.lock();
        if state.stopped || state.failed.is_some() {
            return false;
        }
        next_job(&mut state, &rests, shared.options.segment_bytes)
    };
    let Some(job) = job else { return false };
    carry_out(shared, job, &mut rests);
    true
}

/// After a failure, that kind of work rests until the retry, or until something else has made space.
#[derive(Default)]
struct Rests {
    drop: bool,
    prepare: bool,
}

fn next_job(state: &mut State, rests: &Rests, usual: u64) -> Option<Job> {
    let job = if rests.drop { None } else { drop_job(state, usual) };
    job.or_else(|| if rests.prepare { None } else { prepare_job(state, usual) })
}

fn carry_out(shared: &Shared, job: Job, rests: &mut Rests) {
    match job {
        Job::Drop { segment, keep } => match drop_segment(&*shared.disk, &segment, keep) {
            Ok(()) => {
                let mut state = shared.lock();
                state.dropped.pop_front();
                if keep {
                    state.spares.push((spare_name(segment.salt), segment.capacity));
                }
                rests.prepare = false;
            }
            // Something that may pass: the file stays where it is, which is harmless.
            Err(DropError::Name(error)) => {
                tracing::warn!(%error, "a purged log segment could not be put away; it is tried again");
                rests.drop = true;
            }
            Err(DropError::Sync(error)) => shared.fail(error),
        },
        Job::Prepare { sequence, capacity, least, spare } => {
            let mut capacity = capacity;
            let smaller = |capacity: u64| (capacity / 2 >= least).then(|| (capacity / 2).next_multiple_of(OVERSIZE_STEP));
            while spare.is_none()
                && shared.disk.free() < capacity.saturating_add(shared.options.segment_bytes)
                && let Some(half) = smaller(capacity)
            {
                capacity = half;
            }
            let mut made = prepare(shared, sequence, capacity, spare.as_deref());
            while matches!(made, Err(NoSegment::NotNow(_)))
                && let Some(half) = smaller(capacity)
            {
                capacity = half;
                made = prepare(shared, sequence, capacity, None);
            }
            rests.prepare = settle(shared, made);
        }
    }
}

fn drop_job(state: &State, usual: u64) -> Option<Job> {
    let segment = state.dropped.front()?;
    let keep = segment.capacity == usual && state.spares.len() < MAX_SPARES;
    Some(Job::Drop { segment: segment.clone(), keep })
}

fn prepare_job(state: &mut State, usual: u64) -> Option<Job> {
    let capacity = if state.wanted > usual { state.wanted.next_multiple_of(OVERSIZE_STEP) } else { usual };
    if state.next.as_ref().is_some_and(|next| next.capacity >= state.wanted) {
        return None;
    }
    // One that is too small is taken away first, so that nobody starts to write to it, and then replaced under the same name.
    state.next = None;
    let sequence = state.segments.last_key_value()?.0 + 1;
    let spare = state.spares.iter().position(|spare| spare.1 >= capacity).map(|at| state.spares.swap_remove(at).0);
    Some(Job::Prepare { sequence, capacity, least: state.wanted.max(usual / SCANT).max(OVERSIZE_STEP), spare })
}

/// Judges a failed operation of `what` on a file of the log. A sync that failed is never a matter of space.
fn refused(disk: &dyn Disk, what: &'static str, name: &str) -> impl FnOnce(io::Error) -> NoSegment {
    let path = disk.path(name);
    move |error| {
        let passing = [Errno::NOSPC, Errno::DQUOT, Errno::MFILE, Errno::NFILE, Errno::NOMEM];
        let passes = what != SYNC && Errno::from_io_error(&error).is_some_and(|errno| passing.contains(&errno));
        let error = Error::io(what, path, error);
        if passes { NoSegment::NotNow(error) } else { NoSegment::Failed(error) }
    }
}

enum DropError {
    Name(Error),
    Sync(Error),
}

/// Renames or removes a purged segment, durably, so that the next older one can never be missing before this one is.
fn drop_segment(disk: &dyn Disk, segment: &Segment, keep: bool) -> std::result::Result<(), DropError> {
    let name = segment.name();
    let renamed = if keep { disk.rename(&name, &spare_name(segment.salt)) } else { disk.remove(&name) };
    renamed.map_err(|e| DropError::Name(Error::io("put away", disk.path(&name), e)))?;
    disk.sync().map_err(|e| DropError::Sync(Error::io("sync the directory", disk.path(""), e)))
}

/// How preparing a segment can end without one.
enum NoSegment {
    /// There is no space, or too little of something else that may come back.
    NotNow(Error),
    /// The disk cannot be trusted any more.
    Failed(Error),
    /// The log is being closed.
    Stopped,
}

/// Publishes the outcome of a preparation; `true` if it should rest.
fn settle(shared: &Shared, made: std::result::Result<Segment, NoSegment>) -> bool {
    let mut state = shared.lock();
    let rests = match made {
        Ok(segment) => {
            if state.low.take().is_some() {
                tracing::info!("there is space for the log again");
            }
            state.next = Some(segment);
            false
        }
        Err(NoSegment::NotNow(error)) => {
            if state.low.is_none() {
                tracing::warn!(%error, "no space could be reserved for the log's next segment; it is tried again");
            }
            state.low = Some(error);
            true
        }
        Err(NoSegment::Failed(error)) => {
            drop(state);
            shared.fail(error);
            return true;
        }
        Err(NoSegment::Stopped) => return true,
    };
    // The log's thread may wait for the outcome, good or bad.
    shared.wake(state);
    rests
}

/// Makes a segment without frames, durable under its name.
fn prepare(shared: &Shared, sequence: u64, capacity: u64, spare: Option<&str>) -> std::result::Result<Segment, NoSegment> {
    let disk = &*shared.disk;
    let from = spare.unwrap_or(NEW_NAME);
    let header = SegmentHeader { sequence, salt: new_salt(sequence), capacity };
    let made = (|| {
        let file = if spare.is_some() {
            // What it held stays; the new salt makes it unreadable.
            disk.open(from, true).map_err(refused(disk, "open", from))?
        } else {
            let file = disk.create(from).map_err(refused(disk, "create", from))?;
            fill(shared, &*file, capacity)?;
            file
        };
        file.write_at(&header.encode(), 0).map_err(refused(disk, "write to", from))?;
        file.sync().map_err(refused(disk, SYNC, from))?;
        Ok(file)
    })();
    let file = made.inspect_err(|_| {
        // What it took may be just what is missing elsewhere.
        let _ = disk.remove(from);
    })?;
    let name = segment_name(sequence);
    disk.rename(from, &name).map_err(refused(disk, "name", &name))?;
    disk.sync().map_err(refused(disk, SYNC, ""))?;
    Ok(Segment { sequence, salt: header.salt, capacity, file })
}

/// Reserves a file's space and writes zeros, so that a later sync finds every block allocated and initialised.
fn fill(shared: &Shared, file: &dyn DiskFile, capacity: u64) -> std::result::Result<(), NoSegment> {
    let disk = &*shared.disk;
    file.reserve(capacity).map_err(refused(disk, RESERVE, NEW_NAME))?;
    zero(file, capacity, || {
        if shared.lock().stopped {
            return Err(NoSegment::Stopped);
        }
        file.sync().map_err(refused(disk, SYNC, NEW_NAME))
    })
    .map_err(refused(disk, "write zeros to", NEW_NAME))?
}

/// Writes zeros up to `capacity`; after each chunk `then` may end it.
fn zero<E>(
    file: &dyn DiskFile,
    capacity: u64,
    mut then: impl FnMut() -> std::result::Result<(), E>,
) -> io::Result<std::result::Result<(), E>> {
    let zeros = [0; ZERO_WRITE];
    let mut at = 0;
    while at < capacity {
        let len = (capacity - at).min(ZERO_CHUNK as u64);
        for piece in (0..len).step_by(ZERO_WRITE) {
            let part = (len - piece).min(ZERO_WRITE as u64) as usize;
            file.write_at(&zeros[..part], at + piece)?;
        }
        at += len;
        if let Err(stop) = then() {
            return Ok(Err(stop));
        }
    }
    Ok(Ok(()))
}

/// Makes the first file of a new log, still without its name: a header and, right after it, `frame`.
pub(super) fn found(disk: &dyn Disk, header: SegmentHeader, frame: &[u8]) -> Result<Arc<dyn DiskFile>> {
    let fail = |what| move |e| Error::io(what, disk.path(NEW_NAME), e);
    let file = disk.create(NEW_NAME).map_err(fail("create"))?;
    file.reserve(header.capacity).map_err(fail(RESERVE))?;
    let Ok(()) = zero::<std::convert::Infallible>(&*file, header.capacity, || Ok(())).map_err(fail("write zeros to"))?;
    file.write_at(&header.encode(), 0).map_err(fail("write to"))?;
    file.write_at(frame, SEGMENT_HEADER_LEN as u64).map_err(fail("write to"))?;
    file.sync().map_err(fail(SYNC))?;
    Ok(file)
}
