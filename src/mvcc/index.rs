//! The index: for each key, the revisions at which it was written, newest first to hand.
//!
//! All of it is in memory; the values are in the [history](crate::storage::history) under the revisions found here. A
//! key's *current* state is held inline, with everything a compare, a filter or a count can ask for, so that only the
//! value itself is ever fetched. Older revisions hang off the entry and cost nothing for a key that was written once.
//!
//! # Example
//! A key put at revision 2, put at 3, deleted at 5 and put again at 7 has two *generations*, lives of the key from a
//! creation to a deletion:
//!
//! ```text
//! current  7   created 7, version 1
//! older    2   3   5+                  (+ marks a tombstone)
//! ```
//!
//! Asked for revision 4 it answers 3; for 5 or 6, nothing; for 1, nothing. Compacted at 4, the entry keeps what can be
//! read at 4 or later: `3 5+ 7`. Compacted at 5 it keeps `5+ 7`: nothing can be *read* at 5, but a watch may start there
//! and must see the deletion. Compacted at 6 it keeps `7`.
//!
//! # Invariants ([`KeyIndex::check`])
//! - revisions of an entry ascend strictly, from the oldest in `older` to the current one;
//! - a live entry has `1 <= created <= modified` and `version >= 1`; a tombstone has 0 for both, and no lease;
//! - two tombstones never follow one another.

use crate::storage::Revision;

use super::tree::Weighted;

/// One key: its current state, and the revisions before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyIndex {
    /// Main part of the revision of the last write.
    main: i64,
    /// Revision that created the current generation; 0 when the last write was a deletion.
    created: i64,
    /// Writes since the creation, counting it; 0 after a deletion.
    version: i64,
    /// The lease it is attached to; 0 for none.
    lease: i64,
    /// Sub part of the revision of the last write.
    sub: u32,
    /// What came before, oldest first. Boxed, since most keys of most stores have nothing here: eight bytes, not 24.
    #[allow(clippy::box_collection)]
    older: Option<Box<Vec<Past>>>,
}

/// A superseded write of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Past {
    main: i64,
    sub: u32,
    tombstone: bool,
}

impl Past {
    fn revision(self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }
}

/// What the index knows of a key as it stood at some revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Where the record stands in the history.
    pub revision: Revision,
    /// The rest, when it is the key's current state; an older record has to be fetched to know it.
    pub meta: Option<Meta>,
}

/// Everything about a live key but its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub created: i64,
    pub version: i64,
    pub lease: i64,
}

impl Weighted for KeyIndex {
    fn live(&self) -> bool {
        self.created != 0
    }
}

impl KeyIndex {
    /// A key's first known write: a creation, or a record read back at start.
    pub fn first(revision: Revision, meta: Option<Meta>) -> Self {
        let Meta { created, version, lease } = meta.unwrap_or(Meta { created: 0, version: 0, lease: 0 });
        KeyIndex { main: revision.main, sub: revision.sub, created, version, lease, older: None }
    }

    /// Records a later write: `Some` for a put, `None` for a deletion.
    pub fn push(&mut self, revision: Revision, meta: Option<Meta>) {
        debug_assert!(self.revision() < revision, "revision {revision:?} after {:?}", self.revision());
        let past = Past { main: self.main, sub: self.sub, tombstone: self.created == 0 };
        let older = self.older.take();
        *self = KeyIndex::first(revision, meta);
        let mut older = older.unwrap_or_default();
        if older.len() == older.capacity() {
            // Grow gently: most keys that have a past have a short one, and there may be millions of them.
            let more = (older.len() / 2).clamp(1, 1024);
            older.reserve_exact(more);
        }
        older.push(past);
        self.older = Some(older);
    }

    /// The current state, unless the key is deleted.
    pub fn current(&self) -> Option<Found> {
        (self.created != 0).then(|| Found { revision: self.revision(), meta: Some(self.meta()) })
    }

    /// Where the last write stands, deletion or not.
    pub fn revision(&self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }

    fn meta(&self) -> Meta {
        Meta { created: self.created, version: self.version, lease: self.lease }
    }

    /// The key as it stood once revision `at` was complete.
    pub fn at(&self, at: i64) -> Option<Found> {
        if self.main <= at {
            return self.current();
        }
        let older = self.older.as_deref()?;
        let after = older.partition_point(|past| past.main <= at);
        let past = older.get(after.checked_sub(1)?)?;
        (!past.tombstone).then(|| Found { revision: past.revision(), meta: None })
    }

    /// The one revision up to `at` that [`compact`](Self::compact) at `at` would keep.
    pub fn kept_at(&self, at: i64) -> Option<Revision> {
        let (revision, tombstone) = if self.main <= at {
            (self.revision(), self.created == 0)
        } else {
            let older = self.older.as_deref()?;
            let past = older.get(older.partition_point(|past| past.main <= at).checked_sub(1)?)?;
            (past.revision(), past.tombstone)
        };
        (!tombstone || revision.main == at).then_some(revision)
    }

    /// Whether [`compact`](Self::compact) at this revision would drop anything: the common no costs two comparisons.
    pub fn compactable(&self, at: i64) -> bool {
        self.older.is_some() || (self.created == 0 && self.main < at)
    }

    /// Forgets what cannot be read at `at` or later, adds its revisions to `dead`, and says whether anything is left.
    ///
    /// Kept are all writes after `at`, and the last one up to `at`, if it is a put, or a deletion at `at` itself.
    pub fn compact(&mut self, at: i64, dead: &mut Vec<Revision>) -> bool {
        if let Some(older) = self.older.as_deref_mut() {
            // The last write up to `at` is in `older` only if the current one lies above it.
            let upto = older.partition_point(|past| past.main <= at);
            let keep_from = if self.main <= at {
                upto
            } else {
                match upto.checked_sub(1).and_then(|last| older.get(last)) {
                    Some(last) if last.tombstone && last.main < at => upto,
                    _ => upto.saturating_sub(1),
                }
            };
            dead.extend(older.drain(..keep_from).map(Past::revision));
            if older.is_empty() {
                self.older = None;
            } else if older.capacity() > 2 * older.len() + 8 {
                older.shrink_to_fit();
            }
        }
        let gone = self.created == 0 && self.main < at;
        if gone {
            dead.push(self.revision());
        }
        !gone
    }

    /// All revisions of the key, oldest first, each with whether it is a tombstone.
    pub fn revisions(&self) -> impl Iterator<Item = (Revision, bool)> + '_ {
        let older = self.older.as_deref().map(Vec::as_slice).unwrap_or_default();
        older.iter().map(|past| (past.revision(), past.tombstone)).chain(std::iter::once((self.revision(), self.created == 0)))
    }

    /// Checks the invariants in the module's head.
    pub fn check(&self) -> Result<(), String> {
        let mut last: Option<(Revision, bool)> = None;
        for (revision, tombstone) in self.revisions() {
            if let Some((before, was_tombstone)) = last {
                if before >= revision {
                    return Err(format!("revision {revision:?} after {before:?}"));
                }
                if was_tombstone && tombstone {
                    return Err(format!("tombstone {revision:?} after tombstone {before:?}"));
                }
            }
            last = Some((revision, tombstone));
        }
        let live = self.created != 0;
        if live && !(1 <= self.created && self.created <= self.main && self.version >= 1) {
            return Err(format!("live entry {self:?}"));
        }
        if !live && (self.version != 0 || self.lease != 0) {
            return Err(format!("deleted entry {self:?}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    /// Runs `tests/scripts/index/*.txt`: each command, and below it what the entry then answers.
    ///
    /// `put 7`, `put 7.1` and `delete 9` write; `at 4` reads; `compact 5` prints what died; `show` prints the entry.
    #[test]
    fn scripts() {
        crate::testing::run_scripts("index", |script| {
            let mut entry: Option<KeyIndex> = None;
            move |command: &[&str]| {
                let mut out = String::new();
                match command {
                    ["put", rev] => {
                        let revision = parse(rev);
                        let before = entry.as_ref().and_then(KeyIndex::current).and_then(|found| found.meta);
                        let meta = match before {
                            Some(meta) => Meta { version: meta.version + 1, ..meta },
                            None => Meta { created: revision.main, version: 1, lease: 0 },
                        };
                        write_entry(&mut entry, revision, Some(meta));
                    }
                    ["delete", rev] => write_entry(&mut entry, parse(rev), None),
                    ["at", at] => {
                        let found = entry.as_ref().and_then(|entry| entry.at(at.parse().unwrap()));
                        match found {
                            None => out.push_str("nothing\n"),
                            Some(Found { revision, meta: None }) => writeln!(out, "{}", show(revision)).unwrap(),
                            Some(Found { revision, meta: Some(meta) }) => {
                                writeln!(out, "{} created {} version {}", show(revision), meta.created, meta.version).unwrap();
                            }
                        }
                    }
                    ["compact", at] => {
                        let mut dead = vec![];
                        let kept = entry.as_mut().is_some_and(|entry| entry.compact(at.parse().unwrap(), &mut dead));
                        if !kept {
                            entry = None;
                        }
                        let dead: Vec<_> = dead.into_iter().map(show).collect();
                        writeln!(out, "dead: {}", if dead.is_empty() { "none".into() } else { dead.join(" ") }).unwrap();
                        if !kept {
                            out.push_str("the key is forgotten\n");
                        }
                    }
                    ["show"] => {
                        let all: Vec<_> = entry
                            .iter()
                            .flat_map(|entry| entry.revisions())
                            .map(|(revision, tombstone)| format!("{}{}", show(revision), if tombstone { "+" } else { "" }))
                            .collect();
                        writeln!(out, "{}", all.join(" ")).unwrap();
                    }
                    other => panic!("{script}: unknown command {other:?}"),
                }
                if let Some(entry) = &entry {
                    entry.check().unwrap();
                }
                out
            }
        });
    }

    fn write_entry(entry: &mut Option<KeyIndex>, revision: Revision, meta: Option<Meta>) {
        match entry {
            Some(entry) => entry.push(revision, meta),
            None => *entry = Some(KeyIndex::first(revision, meta)),
        }
    }

    fn parse(text: &str) -> Revision {
        let (main, sub) = text.split_once('.').unwrap_or((text, "0"));
        Revision { main: main.parse().unwrap(), sub: sub.parse().unwrap() }
    }

    fn show(revision: Revision) -> String {
        if revision.sub == 0 { revision.main.to_string() } else { format!("{}.{}", revision.main, revision.sub) }
    }
}
