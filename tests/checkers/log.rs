//! A history against the store's own log: what each revision changed, read afterwards by a watch from the first of them.
//!
//! The revisions are the order, so that nothing has to be searched for:
//!
//! - *Nothing lost, nothing invented, nothing twice.* Each revision is the work of one request, whole; each request whose answer says
//!   that it changed something has its revision; one that was refused, or whose guard is said not to have held, has none.
//! - *Real time.* An operation has a revision no lower than any that had been answered before it was sent; a change has a higher one.
//! - *Reads.* What was found, also in a whole span of keys, is what the log gives at the answer's revision, or at the earlier one that
//!   was asked for, with how often and since when the keys were written; and a guard held or not as the log says.
//! - *No member goes back.* Revisions of one member's answers, serializable reads too, do not fall from its start to its end.
//!
//! A delete without an answer cannot be told from another one of the same key: each unclaimed deletion in the log is given to the one
//! that was sent first, which fits if anything does. That is so for deletes of one key; a request that deletes several has to put
//! something besides, by which it is recognised.

use std::collections::BTreeMap;

use super::history::{Change, Item, Key, Op, Outcome};

/// What the store held at `base`, and what it changed after it, up to and with `end`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    pub base: i64,
    pub start: BTreeMap<Key, Item>,
    pub revisions: BTreeMap<i64, Vec<Change>>,
    pub end: i64,
}

/// What holds after a revision.
pub fn apply(items: &mut BTreeMap<Key, Item>, revision: i64, changes: &[Change]) {
    for change in changes {
        match change.value {
            Some(value) => items.insert(change.key.clone(), written(items.get(&change.key), value, revision)),
            None => items.remove(&change.key),
        };
    }
}

/// What a key holds after a revision has written it.
pub fn written(before: Option<&Item>, value: u64, revision: i64) -> Item {
    let (created, version) = before.map_or((revision, 0), |before| (before.created, before.version));
    Item { value, modified: revision, created, version: version + 1 }
}

impl Log {
    /// What the store holds at the end.
    pub fn last(&self) -> BTreeMap<Key, Item> {
        self.at(self.end)
    }

    /// What it holds after a revision.
    pub fn at(&self, upto: i64) -> BTreeMap<Key, Item> {
        let mut items = self.start.clone();
        self.revisions.range(..=upto).for_each(|(revision, changes)| apply(&mut items, *revision, changes));
        items
    }
}

/// What came of judging.
#[derive(Debug, Default)]
pub struct Verdict {
    /// One sentence each.
    pub wrong: Vec<String>,
    /// For each operation, the revision of its changes, if it made any.
    pub effects: Vec<Option<i64>>,
}

/// Judges a history. What has no answer may be from before `base`; everything else was sent after `base` had been seen.
pub fn judge(log: &Log, ops: &[Op]) -> Verdict {
    let mut verdict = Verdict { wrong: Vec::new(), effects: vec![None; ops.len()] };
    check_log(log, &mut verdict);
    find_effects(log, ops, &mut verdict);
    check_states(log, ops, &mut verdict);
    check_real_time(log, ops, &mut verdict);
    check_members(ops, &mut verdict);
    verdict
}

fn check_log(log: &Log, verdict: &mut Verdict) {
    let mut next = log.base + 1;
    for (revision, changes) in &log.revisions {
        if *revision != next || changes.is_empty() {
            verdict.wrong.push(format!("the log has revision {revision} with {changes:?} where {next} ought to be"));
        }
        next = revision + 1;
    }
    if next != log.end + 1 {
        verdict.wrong.push(format!("the log ends before revision {next}, and the store is at {}", log.end));
    }
}

/// Finds out whose work each revision is.
fn find_effects(log: &Log, ops: &[Op], verdict: &mut Verdict) {
    let mut marks: BTreeMap<u64, i64> = BTreeMap::new();
    for (revision, changes) in &log.revisions {
        for value in changes.iter().filter_map(|change| change.value) {
            if let Some(other) = marks.insert(value, *revision).filter(|other| other != revision) {
                verdict.wrong.push(format!("value {value} was written at {other} and again at {revision}"));
            }
        }
    }
    let mut owners: BTreeMap<i64, usize> = BTreeMap::new();
    let mut lost_deletes: Vec<usize> = Vec::new();
    for (place, op) in ops.iter().enumerate().filter(|(_, op)| !op.request.writes.is_empty()) {
        let in_log = op.request.mark().and_then(|mark| marks.get(&mark)).copied();
        let claimed = match (&op.outcome, op.request.mark()) {
            (Outcome::Answered { answer, .. }, mark) => {
                let says = (answer.applied && (mark.is_some() || answer.deleted > 0)).then_some(answer.revision);
                if mark.is_some() && in_log != says {
                    verdict.wrong.push(format!("the log has it at {in_log:?}: {op:?}"));
                }
                says
            }
            (Outcome::Refused, _) => {
                if let Some(revision) = in_log {
                    verdict.wrong.push(format!("refused, and yet carried out at {revision}: {op:?}"));
                }
                in_log
            }
            (Outcome::Unknown, Some(_)) => in_log,
            (Outcome::Unknown, None) => {
                lost_deletes.push(place);
                None
            }
        };
        if let Some(revision) = claimed {
            verdict.effects[place] = Some(revision);
            if let Some(other) = owners.insert(revision, place) {
                verdict.wrong.push(format!("revision {revision} belongs to two:\n    {:?}\n    {op:?}", ops[other]));
            }
        }
    }
    lost_deletes.sort_by_key(|place| ops[*place].call);
    let mut items = log.start.clone();
    for (revision, changes) in &log.revisions {
        if !owners.contains_key(revision) {
            let fits = |place: &usize| ops[*place].request.writes.iter().filter(|write| items.contains_key(&write.key)).eq(changes);
            match lost_deletes.iter().position(fits) {
                Some(at) => {
                    let place = lost_deletes.remove(at);
                    verdict.effects[place] = Some(*revision);
                }
                None => verdict.wrong.push(format!("nobody asked for revision {revision}: {changes:?}")),
            }
        }
        apply(&mut items, *revision, changes);
    }
}

/// Goes through the log, and looks at each operation where its revision puts it.
fn check_states(log: &Log, ops: &[Op], verdict: &mut Verdict) {
    let mut by_revision: Vec<(i64, usize)> = Vec::new();
    for (place, op) in ops.iter().enumerate() {
        by_revision.extend(op.answer().map(|(_, answer)| answer.revision).or(verdict.effects[place]).map(|revision| (revision, place)));
    }
    by_revision.sort_unstable();
    let (mut items, mut before) = (log.start.clone(), log.start.clone());
    let mut at = log.base;
    let nothing = Vec::new();
    for (revision, place) in by_revision {
        let op = &ops[place];
        if revision < log.base {
            // A serializable read of a member that had just been started: older than the log that is at hand.
            if !op.request.serializable {
                verdict.wrong.push(format!("older than what had been seen before, revision {}: {op:?}", log.base));
            }
            continue;
        }
        if revision > log.end {
            verdict.wrong.push(format!("the store has not reached this revision, it is at {}: {op:?}", log.end));
            continue;
        }
        while at < revision {
            at += 1;
            before.clone_from(&items);
            apply(&mut items, at, log.revisions.get(&at).unwrap_or(&nothing));
        }
        let is_effect = verdict.effects[place] == Some(revision);
        let changes = log.revisions.get(&revision).unwrap_or(&nothing);
        let seen = if is_effect { &before } else { &items };
        let applied = match &op.request.guard {
            Some((key, expected)) => seen.get(key).map_or(0, |item| item.modified) == *expected,
            None => true,
        };
        if is_effect {
            let happens = |write: &&Change| write.value.is_some() || before.contains_key(&write.key);
            let mut wanted: Vec<&Change> = op.request.writes.iter().filter(happens).collect();
            let mut made: Vec<&Change> = changes.iter().collect();
            wanted.sort_unstable();
            made.sort_unstable();
            if wanted != made || !applied {
                verdict.wrong.push(format!("revision {revision} changed {changes:?} from {before:?}, by {op:?}"));
            }
        }
        let Some((_, answer)) = op.answer() else { continue };
        let deleted = if is_effect { changes.iter().filter(|change| change.value.is_none()).count() as i64 } else { 0 };
        let earlier = match op.request.at {
            0 => None,
            // Of that nothing is known any more.
            at if at < log.base => continue,
            at if at > revision => {
                verdict.wrong.push(format!("read at a revision that it had not reached: {op:?}"));
                continue;
            }
            at => Some(log.at(at)),
        };
        let items = earlier.as_ref().unwrap_or(&items);
        let found: Vec<Option<Item>> = op.request.reads.iter().map(|key| items.get(key).copied()).collect();
        let within = op.request.span.iter().flat_map(|(from, to)| items.range(from.clone()..to.clone()));
        let span: Vec<(Key, Item)> = within.map(|(key, item)| (key.clone(), *item)).collect();
        if answer.applied != applied || answer.deleted != deleted || answer.found != found || answer.span != span {
            verdict.wrong.push(format!("revision {revision} has {items:?}: {op:?}"));
        } else if applied && !is_effect && op.request.writes.iter().any(|write| items.contains_key(&write.key)) {
            verdict.wrong.push(format!("revision {revision} has {items:?}, and nothing was deleted: {op:?}"));
        }
    }
}

/// Sends and answers of operations, in the order of time: sends that are as late as an answer come first, they are concurrent.
fn moments(ops: &[Op], concerns: impl Fn(&Op) -> bool) -> Vec<(u64, bool, usize)> {
    let mut moments = Vec::new();
    for (place, op) in ops.iter().enumerate().filter(|(_, op)| concerns(op)) {
        moments.push((op.call, false, place));
        moments.extend(op.answer().map(|(at, _)| (at, true, place)));
    }
    moments.sort_unstable();
    moments
}

fn check_real_time(log: &Log, ops: &[Op], verdict: &mut Verdict) {
    let (mut seen, mut by) = (log.base, None);
    for (_, is_answer, place) in moments(ops, |op| !op.request.serializable) {
        let op = &ops[place];
        let effect = verdict.effects[place];
        let Some(revision) = op.answer().map(|(_, answer)| answer.revision).or(effect) else { continue };
        if is_answer {
            if revision > seen {
                (seen, by) = (revision, Some(place));
            }
        } else if revision < seen + i64::from(effect.is_some()) {
            let by = by.map_or_else(|| "that of the beginning".to_owned(), |by| format!("{:?}", ops[by]));
            verdict.wrong.push(format!("stale: revision {seen} had been seen before it was sent:\n    {op:?}\n    {by}"));
        }
    }
}

fn check_members(ops: &[Op], verdict: &mut Verdict) {
    let mut starts: Vec<(usize, u32)> = ops.iter().map(|op| (op.member, op.start)).collect();
    starts.sort_unstable();
    starts.dedup();
    for (member, start) in starts {
        let mut seen = 0;
        for (_, is_answer, place) in moments(ops, |op| (op.member, op.start) == (member, start)) {
            let Some((_, answer)) = ops[place].answer() else { continue };
            if is_answer {
                seen = seen.max(answer.revision);
            } else if answer.revision < seen {
                verdict.wrong.push(format!("member {member} had said revision {seen} before, and now {:?}", ops[place]));
            }
        }
    }
}

/// What a member says of its history: its revision hashed at, how far it is compacted, and the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash {
    pub revision: i64,
    pub compacted: i64,
    pub hash: u32,
}

/// Equal state at equal revision: what is wrong with the hashes that members gave, if anything is. Those of other revisions, or
/// compacted elsewhere, cannot be compared.
pub fn check_hashes(hashes: &[(usize, Hash)]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (at, (member, hash)) in hashes.iter().enumerate() {
        for (other, its) in &hashes[at + 1..] {
            if (hash.revision, hash.compacted) == (its.revision, its.compacted) && hash.hash != its.hash {
                wrong
                    .push(format!("members {member} and {other} differ at revision {}: {:x} and {:x}", hash.revision, hash.hash, its.hash));
            }
        }
    }
    wrong
}
