//! What a watcher of all keys was told, against the log: etcd's guarantees for watches.
//!
//! - *Ordered* and *unique*: revisions rise, and none comes twice, over all streams that the watcher opened one after the other.
//! - *Atomic*: all changes of a revision come in one answer.
//! - *Reliable* and *resumable*: nothing between two events is left out, also where a stream broke off and the next one took over.
//! - *Bookmarkable*: when progress is notified everything up to that revision has been delivered.

use super::history::Change;
use super::log::Log;

/// One thing that a watcher was told, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It has opened a stream from this revision on.
    Opened(i64),
    /// One answer: its header's revision, and its events, each with its own.
    Events(i64, Vec<(i64, Change)>),
    /// A bookmark.
    Progress(i64),
}

/// The next revision that such a watcher asks for: it has all before it.
pub fn next_revision(told: &[Told], first: i64) -> i64 {
    told.iter().fold(first, |next, told| match told {
        Told::Opened(_) => next,
        Told::Events(_, events) => events.iter().map(|(revision, _)| revision + 1).fold(next, i64::max),
        Told::Progress(revision) => next.max(revision + 1),
    })
}

/// What is wrong with what a watcher was told, if anything is. It was to be told everything from `first` up to the log's end.
pub fn check(told: &[Told], log: &Log, first: i64) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut next = first;
    let skipped =
        |from: i64, to: i64| log.revisions.range(from..to.max(from)).next().map(|(revision, changes)| (*revision, changes.clone()));
    for (place, one) in told.iter().enumerate() {
        match one {
            Told::Opened(from) if *from != next => {
                wrong.push(format!("{place}: the watcher asked for {from} and lacks {next}: fix the test"))
            }
            Told::Opened(_) => {}
            Told::Progress(revision) => {
                if let Some((missing, changes)) = skipped(next, revision + 1) {
                    wrong.push(format!("{place}: a bookmark at {revision} before revision {missing}, {changes:?}, was delivered"));
                }
                next = next.max(revision + 1);
            }
            Told::Events(header, events) => {
                for group in events.chunk_by(|(a, _), (b, _)| a == b) {
                    let revision = group[0].0;
                    if revision < next {
                        wrong.push(format!(
                            "{place}: events of revision {revision} though everything before {next} had been delivered: {group:?}"
                        ));
                        continue;
                    }
                    if let Some((missing, changes)) = skipped(next, revision) {
                        wrong.push(format!("{place}: revision {missing}, {changes:?}, was left out before {revision}"));
                    }
                    let mut got: Vec<&Change> = group.iter().map(|(_, change)| change).collect();
                    let mut made: Vec<&Change> = log.revisions.get(&revision).into_iter().flatten().collect();
                    got.sort_unstable();
                    made.sort_unstable();
                    if got != made {
                        wrong.push(format!("{place}: revision {revision} was told as {got:?} and is {made:?}"));
                    }
                    if revision > *header {
                        wrong.push(format!("{place}: an event of revision {revision} under a header of revision {header}"));
                    }
                    next = revision + 1;
                }
            }
        }
    }
    if let Some((missing, changes)) = skipped(next, log.end + 1) {
        wrong.push(format!("revision {missing}, {changes:?}, was never delivered"));
    }
    wrong
}
