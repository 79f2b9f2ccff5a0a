//! Whether a history is linearizable: the search of Wing and Gong, with Lowe's memory of what was tried, as in porcupine.
//!
//! The calls and returns stand in one list by their time. An operation can come next if it was called before the first return in the
//! list: it is tried, and taken out with its return. When that first return is reached without success, the last choice was wrong and is
//! taken back. No state is tried twice after the same set of operations.
//!
//! ```text
//! call a, call b, return b, call c, return a, return c        next may be a or b; not c, which was called after b's return
//! ```
//!
//! An operation that never returned may come at any time after its call, or not at all.

use std::collections::BTreeSet;

/// An operation and its times. The order of equal times counts as unknown.
#[derive(Clone, Debug)]
pub struct Timed<O> {
    pub call: u64,
    /// None: it never returned.
    pub end: Option<u64>,
    pub op: O,
}

/// There is no such order.
#[derive(Debug)]
pub struct Stuck {
    /// The longest beginning of an order that was found, as places in the history.
    pub order: Vec<usize>,
    /// The operation that could not be fitted in before it returned.
    pub stuck: usize,
}

const HEAD: usize = 0;
const NONE: usize = usize::MAX;

struct Node {
    op: usize,
    is_call: bool,
    /// Of a call, its return.
    mate: usize,
    before: usize,
    after: usize,
}

/// Finds an order, or says how far it came. `step` gives the state after an operation, if it can happen in this state.
pub fn linearize<S, O>(start: S, history: &[Timed<O>], step: impl Fn(&S, &O) -> Option<S>) -> Result<Vec<usize>, Stuck>
where
    S: Clone + Ord,
{
    let mut list = List::new(history);
    let mut open = history.iter().filter(|timed| timed.end.is_some()).count();
    let mut done = vec![0_u64; history.len().div_ceil(64)];
    let mut tried: BTreeSet<(S, Vec<u64>)> = BTreeSet::new();
    let (mut state, mut taken): (S, Vec<(usize, S)>) = (start, Vec::new());
    let mut best = Stuck { order: Vec::new(), stuck: NONE };
    let mut at = list.0[HEAD].after;
    while open > 0 {
        // As long as something is open its return is in the list, and nothing goes past a return.
        let Node { op, is_call, after, .. } = list.0[at];
        if !is_call {
            if best.stuck == NONE || taken.len() > best.order.len() {
                best = Stuck { order: taken.iter().map(|(call, _)| list.0[*call].op).collect(), stuck: op };
            }
            let Some((call, before)) = taken.pop() else { return Err(best) };
            list.put_back(call);
            let op = list.0[call].op;
            done[op / 64] ^= 1 << (op % 64);
            open += usize::from(history[op].end.is_some());
            (state, at) = (before, list.0[call].after);
            continue;
        }
        if let Some(next) = step(&state, &history[op].op) {
            done[op / 64] ^= 1 << (op % 64);
            if tried.insert((next.clone(), done.clone())) {
                taken.push((at, std::mem::replace(&mut state, next)));
                open -= usize::from(history[op].end.is_some());
                list.take_out(at);
                at = list.0[HEAD].after;
                continue;
            }
            done[op / 64] ^= 1 << (op % 64);
        }
        at = after;
    }
    Ok(taken.iter().map(|(call, _)| list.0[*call].op).collect())
}

/// Calls and returns, doubly linked. Operations without a return have a call alone.
struct List(Vec<Node>);

impl List {
    fn new<O>(history: &[Timed<O>]) -> List {
        let mut events: Vec<(u64, bool, usize)> = Vec::new();
        for (op, timed) in history.iter().enumerate() {
            events.push((timed.call, false, op));
            events.extend(timed.end.map(|end| (end.max(timed.call), true, op)));
        }
        // Of equal times the calls first: they are concurrent then.
        events.sort_unstable();
        let mut nodes = vec![Node { op: NONE, is_call: false, mate: NONE, before: NONE, after: NONE }];
        let mut calls = vec![NONE; history.len()];
        for (_, is_return, op) in events {
            let at = nodes.len();
            if is_return {
                let call: usize = calls[op];
                nodes[call].mate = at;
            } else {
                calls[op] = at;
            }
            nodes[at - 1].after = at;
            nodes.push(Node { op, is_call: !is_return, mate: NONE, before: at - 1, after: NONE });
        }
        List(nodes)
    }

    fn unlink(&mut self, at: usize) {
        let Node { before, after, .. } = self.0[at];
        self.0[before].after = after;
        if after != NONE {
            self.0[after].before = before;
        }
    }

    fn link(&mut self, at: usize) {
        let Node { before, after, .. } = self.0[at];
        self.0[before].after = at;
        if after != NONE {
            self.0[after].before = at;
        }
    }

    fn take_out(&mut self, call: usize) {
        self.unlink(call);
        if self.0[call].mate != NONE {
            self.unlink(self.0[call].mate);
        }
    }

    /// Undoes the last [`List::take_out`] that was not undone yet.
    fn put_back(&mut self, call: usize) {
        if self.0[call].mate != NONE {
            self.link(self.0[call].mate);
        }
        self.link(call);
    }
}
