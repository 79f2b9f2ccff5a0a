//! The store with revisions, as a model for [`linearize`]: keys that no request names together are looked at by themselves.
//!
//! The state is what the keys hold, and the lowest revision that the store can have by now: every answer raises it, and a change has to
//! have a higher one. Of a change whose answer did not come the revision is known only if the caller knows it (see
//! [`log`](super::log)); otherwise the first read that shows the value tells.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Answer, Item, Key, Op, Outcome, Request};
use super::linear::{Timed, linearize};

/// A request with what is known of its outcome.
#[derive(Clone, Debug)]
pub struct Step {
    pub request: Request,
    pub answer: Option<Answer>,
    /// The revision of its changes, if they are known to have been made though no answer came.
    pub revision: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Written {
    At(i64),
    /// Later than this.
    After(i64),
}

impl Written {
    /// Whether it may have been this revision; if so it was.
    fn settle(&mut self, revision: i64) -> bool {
        let may = match *self {
            Written::At(at) => at == revision,
            Written::After(floor) => revision > floor,
        };
        if may {
            *self = Written::At(revision);
        }
        may
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    floor: i64,
    items: BTreeMap<Key, (u64, Written)>,
}

/// The state after a request, if that can be its outcome.
fn step(state: &State, step: &Step) -> Option<State> {
    let mut next = state.clone();
    let (request, answer) = (&step.request, step.answer.as_ref());
    // Without an answer only an effect matters: without one it is as good as never carried out.
    let applied = answer.is_none_or(|answer| answer.applied);
    if let Some((key, expected)) = &request.guard {
        let holds = match next.items.get_mut(key) {
            None => *expected == 0,
            Some((_, written @ Written::After(_))) => applied && written.settle(*expected),
            Some((_, Written::At(at))) => at == expected,
        };
        if holds != applied {
            return None;
        }
    } else if !applied {
        return None;
    }
    let (mut deleted, mut changes) = (0, false);
    if applied {
        for write in &request.writes {
            match write.value {
                Some(_) => changes = true,
                None if state.items.contains_key(&write.key) => (deleted, changes) = (deleted + 1, true),
                None => {}
            }
        }
    }
    let known = answer.map(|answer| answer.revision).or(step.revision);
    let floor = state.floor + i64::from(changes);
    if known.is_some_and(|revision| revision < floor) || answer.is_some_and(|answer| answer.deleted != deleted) {
        return None;
    }
    next.floor = known.unwrap_or(floor);
    if changes {
        let written = known.map_or(Written::After(state.floor), Written::At);
        for write in &request.writes {
            match write.value {
                Some(value) => drop(next.items.insert(write.key.clone(), (value, written))),
                None => drop(next.items.remove(&write.key)),
            }
        }
    }
    if let Some(answer) = answer {
        if answer.found.len() != request.reads.len() {
            return None;
        }
        for (key, found) in request.reads.iter().zip(&answer.found) {
            match (next.items.get_mut(key), found) {
                (None, None) => {}
                (Some((value, written)), Some(found)) => {
                    if *value != found.value || found.modified > answer.revision || !written.settle(found.modified) {
                        return None;
                    }
                }
                _ => return None,
            }
        }
    }
    Some(next)
}

/// What is wrong with the linearizable operations of a history, if anything is, for each set of keys that belong together.
///
/// `start` is what the store held at `base`, before the first operation; `effects`, if it is known, says for each operation at which
/// revision it took effect, or that it did not.
pub fn check(ops: &[Op], base: i64, start: &BTreeMap<Key, Item>, effects: Option<&[Option<i64>]>) -> Vec<String> {
    let mut wrong = Vec::new();
    for keys in partitions(ops) {
        let mut history = Vec::new();
        let mut places = Vec::new();
        for (place, op) in ops.iter().enumerate() {
            // What the store held before, and what it holds in a whole span, is seen by the log's judge alone.
            let is_other = op.request.serializable || op.request.at != 0 || op.request.span.is_some();
            if is_other || op.outcome == Outcome::Refused || !op.request.keys().any(|key| keys.contains(key)) {
                continue;
            }
            let (end, answer) = op.answer().map_or((None, None), |(at, answer)| (Some(at), Some(answer.clone())));
            let revision = effects.and_then(|effects| effects[place]);
            if answer.is_none() && (op.request.writes.is_empty() || effects.is_some() && revision.is_none()) {
                continue;
            }
            let op_step = Step { request: op.request.clone(), answer, revision };
            history.push(Timed { call: op.call, end, op: op_step });
            places.push(place);
        }
        bound(&mut history);
        let items = start.iter().filter(|(key, _)| keys.contains(*key));
        let items = items.map(|(key, item)| (key.clone(), (item.value, Written::At(item.modified)))).collect();
        if let Err(stuck) = linearize(State { floor: base, items }, &history, step) {
            /// The end of the order that is shown; more would not be read.
            const SHOWN: usize = 12;
            let mut text = format!("no order of the operations on {keys:?} explains them; the best one ends with\n");
            for place in &stuck.order[stuck.order.len().saturating_sub(SHOWN)..] {
                text += &format!("    {:?}\n", ops[places[*place]]);
            }
            wrong.push(text + &format!("  and has no place for\n    {:?}", ops[places[stuck.stuck]]));
        }
    }
    wrong
}

/// What took effect at a known revision did so before anyone returned with that revision or a later one: a return for what has none.
/// It spares the search most of its wrong turns.
fn bound(history: &mut [Timed<Step>]) {
    let mut ends: Vec<(i64, u64)> = history.iter().filter_map(|timed| Some((timed.op.answer.as_ref()?.revision, timed.end?))).collect();
    ends.sort_unstable();
    // From the highest revision down, the earliest return so far.
    for at in (1..ends.len()).rev() {
        ends[at - 1].1 = ends[at - 1].1.min(ends[at].1);
    }
    for timed in history.iter_mut().filter(|timed| timed.end.is_none()) {
        if let Some(revision) = timed.op.revision {
            let at = ends.partition_point(|(other, _)| *other < revision);
            timed.end = ends.get(at).map(|(_, end)| *end);
        }
    }
}

/// Sets of keys such that no request names keys of two of them.
fn partitions(ops: &[Op]) -> Vec<BTreeSet<Key>> {
    let mut sets: Vec<BTreeSet<Key>> = Vec::new();
    for op in ops {
        let keys: BTreeSet<Key> = op.request.keys().cloned().collect();
        if sets.iter().any(|set| keys.is_subset(set)) {
            continue;
        }
        let (touched, apart): (Vec<_>, Vec<_>) = sets.into_iter().partition(|set| !set.is_disjoint(&keys));
        sets = apart;
        sets.push(touched.into_iter().fold(keys, |mut all, set| {
            all.extend(set);
            all
        }));
    }
    sets
}
