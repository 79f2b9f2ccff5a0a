//! The second thread: keeps the next segment ready, and recycles or removes the purged ones.
//!
//! Everything here is slow and none of it is waited for, unless a segment fills up before the next one is ready. Each step leaves a
//! directory that opens: a file gets its segment's name only when it is complete and durable, and a purged segment's new name is durable
//! before its bytes change.

use super::disk::{Disk, DiskFile};
use super::frame::{SEGMENT_HEADER_LEN, SegmentHeader};
use super::{MAX_SPARES, Segment, Shared, State, segment_name};
use crate::error::{Error, Result};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, PoisonError};

/// The name of a file that is being prepared; on opening, what bears it is removed.
pub(super) const NEW_NAME: &str = "new.tmp";
/// How many zeros are written before a sync: enough to be quick, little enough that a frame's sync beside it does not wait long.
const ZERO_CHUNK: usize = 1 << 20;
/// Segments made for one large entry have a multiple of this many bytes.
const OVERSIZE_STEP: u64 = 4096;

/// The name of a purged segment that waits to be used again, by its old sequence.
pub(super) fn spare_name(sequence: u64) -> String {
    format!("{sequence:016x}.spare")
}

/// A salt that nobody outside this process can guess.
pub(super) fn new_salt(sequence: u64) -> u64 {
    RandomState::new().hash_one(sequence)
}

enum Job {
    /// Recycle or remove the oldest dropped segment.
    Drop { segment: Segment, keep: bool },
    /// Make the next segment, out of a spare if there is one.
    Prepare { sequence: u64, capacity: u64, spare: Option<String> },
    /// Make the next segment larger.
    Extend { segment: Segment, capacity: u64 },
}

/// The body of the thread.
pub(super) fn run(shared: Arc<Shared>) {
    // After a failure, that kind of work rests until the retry, or until something else has made space.
    let (mut drop_rests, mut prepare_rests) = (false, false);
    loop {
        let job = {
            let mut state = shared.lock();
            loop {
                if state.stopped || state.failed.is_some() {
                    return;
                }
                let job = if drop_rests { None } else { drop_job(&state, shared.options.segment_bytes) };
                let job = job.or_else(|| if prepare_rests { None } else { prepare_job(&mut state, shared.options.segment_bytes) });
                if let Some(job) = job {
                    break job;
                }
                if drop_rests || prepare_rests {
                    let woken = shared.space.wait_timeout(state, shared.options.reserve_retry).unwrap_or_else(PoisonError::into_inner);
                    if woken.1.timed_out() {
                        (drop_rests, prepare_rests) = (false, false);
                    }
                    state = woken.0;
                } else {
                    state = shared.space.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        match job {
            Job::Drop { segment, keep } => match drop_segment(&*shared.disk, &segment, keep) {
                Ok(()) => {
                    let mut state = shared.lock();
                    state.dropped.pop_front();
                    if keep {
                        state.spares.push((spare_name(segment.sequence), segment.capacity));
                    }
                    prepare_rests = false;
                }
                Err(DropError::Name(error)) => {
                    tracing::warn!(%error, "a purged log segment could not be put away; it is tried again");
                    drop_rests = true;
                }
                Err(DropError::Sync(error)) => return shared.fail(error),
            },
            Job::Prepare { sequence, capacity, spare } => {
                let made = prepare(&shared, sequence, capacity, spare.as_deref());
                prepare_rests = settle(&shared, made);
            }
            Job::Extend { segment, capacity } => {
                let made = extend(&shared, segment, capacity);
                prepare_rests = settle(&shared, made);
            }
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
    if let Some(next) = &state.next {
        let short = next.capacity < state.wanted;
        return short.then(|| Job::Extend { segment: next.clone(), capacity });
    }
    let sequence = state.segments.last_key_value()?.0 + 1;
    let spare = state.spares.iter().position(|spare| spare.1 >= capacity).map(|at| state.spares.swap_remove(at).0);
    Some(Job::Prepare { sequence, capacity, spare })
}

enum DropError {
    Name(Error),
    Sync(Error),
}

/// Renames or removes a purged segment, durably, so that the next older one can never be missing before this one is.
fn drop_segment(disk: &dyn Disk, segment: &Segment, keep: bool) -> std::result::Result<(), DropError> {
    let name = segment.name();
    let renamed = if keep { disk.rename(&name, &spare_name(segment.sequence)) } else { disk.remove(&name) };
    renamed.map_err(|e| DropError::Name(Error::io("put away", disk.path(&name), e)))?;
    disk.sync().map_err(|e| DropError::Sync(Error::io("sync the directory", disk.path(""), e)))
}

/// How preparing a segment can end without one.
enum NoSegment {
    /// There is no space, or something else that may pass.
    NotNow(Error),
    /// A sync failed: the disk cannot be trusted any more.
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
            disk.open(from, true).map_err(|e| NoSegment::NotNow(Error::io("open", disk.path(from), e)))?
        } else {
            let file = disk.create(from).map_err(|e| NoSegment::NotNow(Error::io("create", disk.path(from), e)))?;
            fill(shared, &*file, from, SEGMENT_HEADER_LEN as u64, capacity)?;
            file
        };
        let written = file.write_at(&header.encode(), 0);
        written.map_err(|e| NoSegment::NotNow(Error::io("write to", disk.path(from), e)))?;
        file.sync().map_err(|e| NoSegment::Failed(Error::io("sync", disk.path(from), e)))?;
        Ok(file)
    })();
    let file = made.inspect_err(|_| {
        // What it took may be just what is missing elsewhere.
        let _ = disk.remove(from);
    })?;
    let name = segment_name(sequence);
    disk.rename(from, &name).map_err(|e| NoSegment::NotNow(Error::io("name", disk.path(&name), e)))?;
    disk.sync().map_err(|e| NoSegment::Failed(Error::io("sync the directory", disk.path(""), e)))?;
    Ok(Segment { sequence, salt: header.salt, capacity, file })
}

/// Makes a segment without frames larger.
fn extend(shared: &Shared, segment: Segment, capacity: u64) -> std::result::Result<Segment, NoSegment> {
    let name = segment.name();
    fill(shared, &*segment.file, &name, segment.capacity, capacity)?;
    // One sector, so that a crash leaves the old header or the new one; the longer file is right for both.
    let header = SegmentHeader { sequence: segment.sequence, salt: segment.salt, capacity };
    let written = segment.file.write_at(&header.encode(), 0);
    written.map_err(|e| NoSegment::NotNow(Error::io("write to", shared.disk.path(&name), e)))?;
    segment.file.sync().map_err(|e| NoSegment::Failed(Error::io("sync", shared.disk.path(&name), e)))?;
    Ok(Segment { capacity, ..segment })
}

/// Reserves a file up to `to` and writes zeros from `from` on, so that a later sync finds every block allocated and initialised.
fn fill(shared: &Shared, file: &dyn DiskFile, name: &str, from: u64, to: u64) -> std::result::Result<(), NoSegment> {
    let path = || shared.disk.path(name);
    file.reserve(to).map_err(|e| NoSegment::NotNow(Error::io("reserve space for the log in", path(), e)))?;
    zero(file, from, to, || {
        if shared.lock().stopped {
            return Err(NoSegment::Stopped);
        }
        file.sync().map_err(|e| NoSegment::Failed(Error::io("sync", path(), e)))
    })
    .map_err(|e| NoSegment::NotNow(Error::io("write zeros to", path(), e)))?
}

/// Writes zeros from `from` to `to`; after each chunk `then` may end it.
fn zero<E>(
    file: &dyn DiskFile,
    from: u64,
    to: u64,
    mut then: impl FnMut() -> std::result::Result<(), E>,
) -> std::io::Result<std::result::Result<(), E>> {
    let zeros = vec![0; ZERO_CHUNK.min(usize::try_from(to.saturating_sub(from)).unwrap_or(ZERO_CHUNK))];
    let mut at = from;
    while at < to {
        let len = zeros.len().min(usize::try_from(to - at).unwrap_or(zeros.len()));
        file.write_at(&zeros[..len], at)?;
        at += len as u64;
        if let Err(stop) = then() {
            return Ok(Err(stop));
        }
    }
    Ok(Ok(()))
}

/// Makes the first file of a new log, still without its name: a header and, right after it, `frame`. Its space is reserved but not
/// written with zeros, so that a new log opens at once; the next segment has both.
pub(super) fn found(disk: &dyn Disk, header: SegmentHeader, frame: &[u8]) -> Result<Arc<dyn DiskFile>> {
    let fail = |what| move |e| Error::io(what, disk.path(NEW_NAME), e);
    let file = disk.create(NEW_NAME).map_err(fail("create"))?;
    if !file.reserve(header.capacity).map_err(fail("reserve space for the log in"))? {
        let filled = zero::<std::convert::Infallible>(&*file, SEGMENT_HEADER_LEN as u64, header.capacity, || Ok(()));
        let Ok(()) = filled.map_err(fail("write zeros to"))?;
    }
    file.write_at(&header.encode(), 0).map_err(fail("write to"))?;
    file.write_at(frame, SEGMENT_HEADER_LEN as u64).map_err(fail("write to"))?;
    file.sync().map_err(fail("sync"))?;
    Ok(file)
}
