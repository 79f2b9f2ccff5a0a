//! What a watcher was told, against the log, or against what of it the watcher asked for: etcd's guarantees for watches.
//!
//! - *Ordered* and *unique*: revisions rise, and none comes twice, over all streams that the watcher opened one after the other.
//! - *Atomic*: all changes of a revision come in one answer.
//! - *Reliable* and *resumable*: nothing between two events is left out, also where a stream broke off and the next one took over.
//! - *Bookmarkable*: when progress is notified everything up to that revision has been delivered.
//! - *Complete*: an event says since when and how often the key was written, and what it held before.

use super::history::{Change, Item};
use super::log::{Log, apply, written};

/// What a watcher asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    All,
    Key(&'static str),
    /// Keys that begin so.
    Prefix(&'static str),
    /// Deletions alone, of keys that begin so.
    Deletions(&'static str),
}

impl Scope {
    pub fn concerns(&self, change: &Change) -> bool {
        match self {
            Scope::All => true,
            Scope::Key(key) => change.key == *key,
            Scope::Prefix(prefix) => change.key.starts_with(prefix),
            Scope::Deletions(prefix) => change.value.is_none() && change.key.starts_with(prefix),
        }
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub revision: i64,
    pub change: Change,
    /// Of a put, as in [`Item`]; 0 of a deletion.
    pub created: i64,
    pub version: i64,
    /// What the key held before.
    pub before: Option<Item>,
}

/// One thing that a watcher was told, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It has opened a stream from this revision on.
    Opened(i64),
    /// One answer: its header's revision, and its events, each with its own.
    Events(i64, Vec<Event>),
    /// A bookmark.
    Progress(i64),
}

/// The next revision that such a watcher asks for: it has all before it.
pub fn next_revision(told: &[Told], first: i64) -> i64 {
    told.iter().fold(first, |next, told| match told {
        Told::Opened(_) => next,
        Told::Events(_, events) => events.iter().map(|event| event.revision + 1).fold(next, i64::max),
        Told::Progress(revision) => next.max(revision + 1),
    })
}

/// What is wrong with what a watcher was told, if anything is. It was to be told everything that it asked for from `first` up to the
/// log's end.
pub fn check(told: &[Told], log: &Log, first: i64, scope: Scope) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut next = first;
    let wanted = |changes: &Vec<Change>| changes.iter().filter(|change| scope.concerns(change)).cloned().collect::<Vec<_>>();
    let skipped = |from: i64, to: i64| {
        let mut within = log.revisions.range(from..to.max(from)).map(|(revision, changes)| (*revision, wanted(changes)));
        within.find(|(_, changes)| !changes.is_empty())
    };
    // What the store held after all revisions before this one.
    let (mut items, mut at) = (log.start.clone(), log.base + 1);
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
                for group in events.chunk_by(|a, b| a.revision == b.revision) {
                    let revision = group[0].revision;
                    if revision < next {
                        wrong.push(format!(
                            "{place}: events of revision {revision} though everything before {next} had been delivered: {group:?}"
                        ));
                        continue;
                    }
                    if let Some((missing, changes)) = skipped(next, revision) {
                        wrong.push(format!("{place}: revision {missing}, {changes:?}, was left out before {revision}"));
                    }
                    let mut got: Vec<Change> = group.iter().map(|event| event.change.clone()).collect();
                    let mut made: Vec<Change> = log.revisions.get(&revision).map(wanted).unwrap_or_default();
                    got.sort_unstable();
                    made.sort_unstable();
                    if got != made {
                        wrong.push(format!("{place}: revision {revision} was told as {got:?} and is {made:?}"));
                    }
                    for (revision, changes) in log.revisions.range(at..revision.max(at)) {
                        apply(&mut items, *revision, changes);
                    }
                    at = at.max(revision);
                    for event in group {
                        let before = items.get(&event.change.key);
                        let after = event.change.value.map(|value| written(before, value, revision));
                        let (created, version) = after.map_or((0, 0), |after| (after.created, after.version));
                        if (event.created, event.version) != (created, version) || event.before.as_ref() != before {
                            wrong.push(format!(
                                "{place}: created {created}, version {version}, before it {before:?}, was told as {event:?}"
                            ));
                        }
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
