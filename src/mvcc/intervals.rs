//! A map from ranges of byte strings to values that answers: which ranges contain this key?
//!
//! # Idea
//!
//! A range is half-open, `[start, end)`; without an end it is unbounded. The ranges stand in an AVL tree, ordered by start
//! and then by end (no end is the greatest). Each node also knows which range below it, itself included, ends last
//! ([`Node::reach`]), and which does so without its right side ([`Node::lower`]).
//!
//! A search for a key goes down one path, to where the key would stand among the starts. What lies to the left of the path
//! starts at or before the key, so there only the ends matter: a subtree is entered if its reach lies behind the key,
//! which is to say if there is a hit in it. That makes O(log n) nodes for the path and at most as many again for each
//! hit; neighbouring hits share theirs.
//!
//! The nodes stand side by side in one vector and name each other by number. A removal moves the last node into the gap,
//! so there is no free list and each place in the vector is a node of the tree.
//!
//! # Example
//!
//! ```text
//! let mut spans: Intervals<Vec<&str>> = Intervals::new();
//! spans.entry("a".into(), Some("c".into())).push("first");
//! spans.entry("a".into(), Some("c".into())).push("again");        // the same range: the same value
//! spans.entry("b".into(), Some("d".into())).push("overlaps");
//! spans.entry("c".into(), None).push("all from c");
//!
//!            [b, d)  reach [c, ∞), lower [b, d)     stab("b"): the path goes to [b, d), then towards [c, ∞), which starts
//!           /      \                                           behind b. To its left: [a, c) and [b, d), both end behind b
//!      [a, c)      [c, ∞)                            stab("c"): the path goes through [b, d) to [c, ∞). Both are hits; the
//!                                                              reach of what is left of [b, d) is c: not entered
//! ```
//!
//! # Invariants ([`Intervals::check`])
//!
//! - Each place of the vector is in the tree exactly once, and ranges ascend strictly from left to right.
//! - The heights of a node's two subtrees differ by one at most, thus the height, and with it the depth of all recursion,
//!   is below 1.45 log2(n + 2): 46 for as many nodes as 32 bits can name.
//! - `reach` names the range that ends last among the non-empty ones at and below a node, or none if all are empty; and so
//!   does `lower` for the node and what is on its left.
//!
//! # Caveats
//!
//! - A range that ends at or before its start is empty: it is kept and found like any other, and contains no key. It does
//!   not count for a reach, so that not even thousands of them, with starts small and large, slow a search down.
//! - The bounds of a new range are copied, into one allocation for both: a search mostly waits for memory, and wants them
//!   side by side; and a `Bytes` cut out of a large message would keep all of that message alive.
//! - Values move within the vector when ranges come and go, so their addresses hold only while the map is borrowed.

use std::cmp::Ordering;

use bytes::{Bytes, BytesMut};

/// Stands for "no node" in a node's links. There are thus at most `u32::MAX` ranges, for which the
/// nodes alone would take some 400 GB: whoever fills the map has its own bound far below.
const NIL: u32 = u32::MAX;

/// Places that an almost empty vector may keep in stock. A larger one gives room back when three quarters lie idle.
const SPARE_NODES: usize = 64;

/// The two sides of a node; the other side is `1 - side`.
const LEFT: usize = 0;
const RIGHT: usize = 1;

/// A map from ranges of byte strings to `T`. See the module's head.
#[derive(Debug)]
pub(crate) struct Intervals<T> {
    nodes: Vec<Node<T>>,
    root: u32,
}

#[derive(Debug)]
struct Node<T> {
    start: Bytes,
    end: Option<Bytes>,
    value: T,
    child: [u32; 2],
    /// The node at or below this one whose range ends last, of those that contain anything.
    reach: u32,
    /// The same of this node and what is on its left.
    lower: u32,
    /// Nodes on the longest way down, this one included.
    height: u8,
}

impl<T> Node<T> {
    fn is_void(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    fn ends_behind(&self, key: &[u8]) -> bool {
        self.end.as_ref().is_none_or(|end| key < end.as_ref())
    }

    fn order(&self, start: &[u8], end: Option<&Bytes>) -> Ordering {
        self.start.as_ref().cmp(start).then_with(|| order_ends(self.end.as_ref(), end))
    }
}

/// Orders ends: no end is behind every end.
fn order_ends(a: Option<&Bytes>, b: Option<&Bytes>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.cmp(b),
        (a, b) => a.is_none().cmp(&b.is_none()),
    }
}

/// Copies of both bounds in one piece of memory.
fn side_by_side(start: &[u8], end: Option<&[u8]>) -> (Bytes, Option<Bytes>) {
    let mut both = BytesMut::with_capacity(start.len() + end.map_or(0, <[u8]>::len));
    both.extend_from_slice(start);
    both.extend_from_slice(end.unwrap_or_default());
    let mut first = both.freeze();
    let second = first.split_off(start.len());
    (first, end.map(|_| second))
}

/// The side on which to look for what the node at hand compares to as `order`.
fn side(order: Ordering) -> usize {
    if order == Ordering::Greater { LEFT } else { RIGHT }
}

impl<T> Default for Intervals<T> {
    fn default() -> Self {
        Intervals::new()
    }
}

impl<T> Intervals<T> {
    /// A map without ranges. Allocates nothing.
    pub fn new() -> Self {
        Intervals { nodes: Vec::new(), root: NIL }
    }

    /// The value of the range `[start, end)`, made by default if the range is new. O(log n).
    pub fn entry(&mut self, start: Bytes, end: Option<Bytes>) -> &mut T
    where
        T: Default,
    {
        let at = match self.find(&start, end.as_ref()) {
            Some(at) => at,
            None => {
                let new = u32::try_from(self.nodes.len()).unwrap_or(NIL);
                assert!(new != NIL, "{} ranges, more than can be numbered", self.nodes.len());
                let (start, end) = side_by_side(&start, end.as_deref());
                self.nodes.push(Node { start, end, value: T::default(), child: [NIL; 2], reach: NIL, lower: NIL, height: 0 });
                self.root = self.link(self.root, new);
                new
            }
        };
        &mut self.node_mut(at).value
    }

    /// The value of exactly this range, if there is one. O(log n).
    pub fn get_mut(&mut self, start: &Bytes, end: Option<&Bytes>) -> Option<&mut T> {
        let at = self.find(start, end)?;
        Some(&mut self.node_mut(at).value)
    }

    /// Takes out exactly this range and gives its value back, if there is one. O(log n).
    pub fn remove(&mut self, start: &Bytes, end: Option<&Bytes>) -> Option<T> {
        let gone = self.find(start, end)?;
        self.root = self.unlink(self.root, gone);
        // The vector has at least the node that goes, and no number above what `entry` handed out.
        self.rename(self.nodes.len() as u32 - 1, gone);
        let value = self.nodes.swap_remove(gone as usize).value;
        let (len, room) = (self.nodes.len(), self.nodes.capacity());
        if room > SPARE_NODES && len < room / 4 {
            // Half full afterwards, so that the next reallocation is as many changes away as nodes are left.
            self.nodes.shrink_to((2 * len).max(SPARE_NODES));
        }
        Some(value)
    }

    /// Calls `visit` with the start and the value of each range that contains `key`, in the order of (start, end).
    /// O(log n) and at most as much again for each hit; see the module's head.
    pub fn stab<'a>(&'a self, key: &[u8], visit: &mut dyn FnMut(&'a Bytes, &'a T)) {
        let mut at = self.root;
        while at != NIL {
            let node = self.node(at);
            if node.start.as_ref() > key {
                at = node.child[LEFT];
                continue;
            }
            self.visit_lower(node, key, visit);
            at = node.child[RIGHT];
        }
    }

    /// Visits the hits in the node and on its left, all of which start at or before the key.
    fn visit_lower<'a>(&'a self, node: &'a Node<T>, key: &[u8], visit: &mut dyn FnMut(&'a Bytes, &'a T)) {
        if !self.ends_behind(node.lower, key) {
            return;
        }
        let mut at = node.child[LEFT];
        while at != NIL && self.ends_behind(self.node(at).reach, key) {
            let below = self.node(at);
            self.visit_lower(below, key, visit);
            at = below.child[RIGHT];
        }
        if node.ends_behind(key) {
            visit(&node.start, &node.value);
        }
    }

    /// Whether the range of a node that may be none ends behind the key.
    fn ends_behind(&self, at: u32, key: &[u8]) -> bool {
        at != NIL && self.node(at).ends_behind(key)
    }

    fn node(&self, at: u32) -> &Node<T> {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node<T> {
        &mut self.nodes[at as usize]
    }

    fn height(&self, at: u32) -> u8 {
        if at == NIL { 0 } else { self.node(at).height }
    }

    fn find(&self, start: &[u8], end: Option<&Bytes>) -> Option<u32> {
        let mut at = self.root;
        while at != NIL {
            let node = self.node(at);
            match node.order(start, end) {
                Ordering::Equal => return Some(at),
                order => at = node.child[side(order)],
            }
        }
        None
    }

    /// How the range of node `at` compares to that of node `other`.
    fn order(&self, at: u32, other: u32) -> Ordering {
        let other = self.node(other);
        self.node(at).order(&other.start, other.end.as_ref())
    }

    /// Puts node `new`, whose range is not there yet, below `at`. Gives back what now stands in place of `at`.
    fn link(&mut self, at: u32, new: u32) -> u32 {
        if at == NIL {
            return self.balance(new);
        }
        let side = side(self.order(at, new));
        self.node_mut(at).child[side] = self.link(self.node(at).child[side], new);
        self.balance(at)
    }

    /// Takes node `gone` out of the tree at `at`, where it is. Gives back what now stands in place of `at`.
    fn unlink(&mut self, at: u32, gone: u32) -> u32 {
        let child = self.node(at).child;
        if at != gone {
            let side = side(self.order(at, gone));
            self.node_mut(at).child[side] = self.unlink(child[side], gone);
            return self.balance(at);
        }
        match child {
            [only, NIL] | [NIL, only] => only,
            [left, right] => {
                let (next, rest) = self.unlink_first(right);
                self.node_mut(next).child = [left, rest];
                self.balance(next)
            }
        }
    }

    /// Takes the leftmost node out of the tree at `at`. Gives back that node, and what now stands in place of `at`.
    fn unlink_first(&mut self, at: u32) -> (u32, u32) {
        let [left, right] = self.node(at).child;
        if left == NIL {
            return (at, right);
        }
        let (first, rest) = self.unlink_first(left);
        self.node_mut(at).child[LEFT] = rest;
        (first, self.balance(at))
    }

    /// Writes `to` wherever the tree says `from`. Only what stands above a node, or is it, can name it.
    fn rename(&mut self, from: u32, to: u32) {
        if from == to {
            return;
        }
        let mut at = self.root;
        if at == from {
            self.root = to;
        }
        loop {
            let side = side(self.order(at, from));
            let node = self.node_mut(at);
            for link in [&mut node.reach, &mut node.lower] {
                if *link == from {
                    *link = to;
                }
            }
            if at == from {
                return;
            }
            at = node.child[side];
            if at == from {
                node.child[side] = to;
            }
        }
    }

    /// Makes the node right again, given that its subtrees are, and that their heights differ by two at most. Gives back
    /// what now stands in its place.
    fn balance(&mut self, at: u32) -> u32 {
        let child = self.node(at).child;
        let heights = child.map(|child| self.height(child));
        if heights[LEFT].abs_diff(heights[RIGHT]) <= 1 {
            self.refresh(at);
            return at;
        }
        let high = if heights[LEFT] > heights[RIGHT] { LEFT } else { RIGHT };
        let below = self.node(child[high]).child;
        if self.height(below[high]) < self.height(below[1 - high]) {
            self.node_mut(at).child[high] = self.raise(child[high], 1 - high);
        }
        self.raise(at, high)
    }

    /// Puts the child on `side` of a node in the node's place and the node below it. Gives back that child.
    fn raise(&mut self, at: u32, side: usize) -> u32 {
        let up = self.node(at).child[side];
        self.node_mut(at).child[side] = self.node(up).child[1 - side];
        self.node_mut(up).child[1 - side] = at;
        self.refresh(at);
        self.refresh(up);
        up
    }

    /// Sets what a node knows of those below it, given that they are right.
    fn refresh(&mut self, at: u32) {
        let node = self.node(at);
        let [left, right] = node.child;
        let own = if node.is_void() { NIL } else { at };
        let lower = self.last_to_end(own, self.reach(left));
        let reach = self.last_to_end(lower, self.reach(right));
        let height = 1 + self.height(left).max(self.height(right));
        let node = self.node_mut(at);
        (node.lower, node.reach, node.height) = (lower, reach, height);
    }

    fn reach(&self, at: u32) -> u32 {
        if at == NIL { NIL } else { self.node(at).reach }
    }

    /// Which of two nodes ends later; either may be none. The first, the nearer one, if they end alike.
    fn last_to_end(&self, a: u32, b: u32) -> u32 {
        if b == NIL || (a != NIL && self.order_ends(a, b).is_ge()) { a } else { b }
    }

    fn order_ends(&self, a: u32, b: u32) -> Ordering {
        order_ends(self.node(a).end.as_ref(), self.node(b).end.as_ref())
    }
}

/// The map as a whole, for tests, debugging and numbers.
#[allow(dead_code, reason = "a map should be able to tell these even if nobody asks at present")]
impl<T> Intervals<T> {
    /// Number of ranges, empty ones included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no ranges.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All ranges, start and end, with their values, in the order of (start, end).
    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, Option<&Bytes>, &T)> {
        let mut above = Vec::new();
        let mut at = self.root;
        std::iter::from_fn(move || {
            while at != NIL {
                above.push(at);
                at = self.node(at).child[LEFT];
            }
            let node = self.node(above.pop()?);
            at = node.child[RIGHT];
            Some((&node.start, node.end.as_ref(), &node.value))
        })
    }

    /// Checks the invariants of the module's head. O(n log n).
    ///
    /// # Errors
    /// The first invariant that does not hold, with the numbers of the nodes.
    pub fn check(&self) -> Result<(), String> {
        let mut seen = vec![false; self.nodes.len()];
        self.check_below(self.root, &mut seen)?;
        if let Some(lost) = seen.iter().position(|seen| !seen) {
            return Err(format!("node {lost} of {} is not in the tree", seen.len()));
        }
        let mut before: Option<(&Bytes, Option<&Bytes>)> = None;
        for (start, end, _) in self.iter() {
            if let Some((s, e)) = before
                && s.cmp(start).then_with(|| order_ends(e, end)).is_ge()
            {
                return Err(format!("[{s:?}, {e:?}) stands before [{start:?}, {end:?})"));
            }
            before = Some((start, end));
        }
        Ok(())
    }

    /// From the leaves up, so that what is stored in the children can be relied on for their parent.
    fn check_below(&self, at: u32, seen: &mut [bool]) -> Result<(), String> {
        if at == NIL {
            return Ok(());
        }
        match seen.get_mut(at as usize) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(format!("node {at} is in the tree twice")),
            None => return Err(format!("node {at} of {} does not exist", self.nodes.len())),
        }
        let node = self.node(at);
        for child in node.child {
            self.check_below(child, seen)?;
        }
        let heights = node.child.map(|child| self.height(child));
        if heights[LEFT].abs_diff(heights[RIGHT]) > 1 || node.height != 1 + heights[LEFT].max(heights[RIGHT]) {
            return Err(format!("node {at} has height {} above {} and {}", node.height, heights[LEFT], heights[RIGHT]));
        }
        let [left, right] = node.child.map(|child| self.reach(child));
        let own = if node.is_void() { NIL } else { at };
        for (name, found, candidates) in [("lower", node.lower, [own, left, NIL]), ("reach", node.reach, [own, left, right])] {
            // Of several that end alike any will do; but it must be one of these, or it might not be below.
            let best = candidates.into_iter().fold(NIL, |best, next| self.last_to_end(best, next));
            if !candidates.contains(&found) || self.last_to_end(found, best) != found {
                return Err(format!("node {at} has {found} for its {name} instead of {best}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The plain twin: a list.
    #[derive(Default)]
    struct Plain(Vec<(Bytes, Option<Bytes>, u64)>);

    impl Plain {
        fn place(&self, start: &Bytes, end: Option<&Bytes>) -> Option<usize> {
            self.0.iter().position(|(s, e, _)| s == start && e.as_ref() == end)
        }

        fn entry(&mut self, start: Bytes, end: Option<Bytes>) -> &mut u64 {
            let at = self.place(&start, end.as_ref()).unwrap_or_else(|| {
                self.0.push((start, end, 0));
                self.0.len() - 1
            });
            &mut self.0[at].2
        }

        /// In order: the starts ascend, and among equal starts the ends, no end last.
        fn sorted(&self) -> Vec<(Bytes, Option<Bytes>, u64)> {
            let mut all = self.0.clone();
            all.sort_by_key(|(start, end, _)| (start.clone(), end.is_none(), end.clone()));
            all
        }

        fn stab(&self, key: &[u8]) -> Vec<(Bytes, u64)> {
            let contains = |start: &Bytes, end: &Option<Bytes>| start.as_ref() <= key && end.as_ref().is_none_or(|end| key < end.as_ref());
            self.sorted().into_iter().filter(|(start, end, _)| contains(start, end)).map(|(start, _, value)| (start, value)).collect()
        }
    }

    fn all(spans: &Intervals<u64>) -> Vec<(Bytes, Option<Bytes>, u64)> {
        spans.iter().map(|(start, end, value)| (start.clone(), end.cloned(), *value)).collect()
    }

    fn hits(spans: &Intervals<u64>, key: &[u8]) -> Vec<(Bytes, u64)> {
        let mut hits = Vec::new();
        spans.stab(key, &mut |start, value| hits.push((start.clone(), *value)));
        hits
    }

    fn number(n: u32) -> Bytes {
        Bytes::copy_from_slice(&n.to_be_bytes())
    }

    /// The numbers below `count` in an order without order, the same each time: `count` is a power of two.
    fn shuffled(count: u32) -> impl Iterator<Item = u32> {
        (0..count).scan(1, move |at, _| {
            *at = (*at * 5 + 12345) % count;
            Some(*at)
        })
    }

    #[derive(Debug, Clone)]
    enum Op {
        Entry(Bytes, Option<Bytes>, u64),
        Get(Bytes, Option<Bytes>),
        Remove(Bytes, Option<Bytes>),
        /// Removes the n-th range there is, modulo their number.
        RemoveNth(usize),
        Stab(Bytes),
    }

    /// Short keys of few bytes, so that bounds meet often: equal, prefixes of each other, empty, extremes.
    fn key() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(prop::sample::select(vec![0u8, b'a', b'b', 255]), 0..4).prop_map(Bytes::from)
    }

    fn op() -> impl Strategy<Value = Op> {
        let end = || prop::option::weighted(0.85, key());
        prop_oneof![
            6 => (key(), end(), any::<u64>()).prop_map(|(start, end, value)| Op::Entry(start, end, value)),
            1 => (key(), end()).prop_map(|(start, end)| Op::Get(start, end)),
            1 => (key(), end()).prop_map(|(start, end)| Op::Remove(start, end)),
            3 => any::<usize>().prop_map(Op::RemoveNth),
            4 => key().prop_map(Op::Stab),
        ]
    }

    proptest! {
        #[test]
        fn does_what_a_list_does(ops in prop::collection::vec(op(), 0..150)) {
            let (mut spans, mut plain) = (Intervals::new(), Plain::default());
            for op in ops {
                match op {
                    Op::Entry(start, end, value) => {
                        let (ours, theirs) = (spans.entry(start.clone(), end.clone()), plain.entry(start, end));
                        prop_assert_eq!(*ours, *theirs);
                        (*ours, *theirs) = (value, value);
                    }
                    Op::Get(start, end) => {
                        let theirs = plain.place(&start, end.as_ref()).map(|at| plain.0[at].2);
                        prop_assert_eq!(spans.get_mut(&start, end.as_ref()).map(|value| *value), theirs);
                    }
                    Op::Remove(start, end) => {
                        let theirs = plain.place(&start, end.as_ref()).map(|at| plain.0.swap_remove(at).2);
                        prop_assert_eq!(spans.remove(&start, end.as_ref()), theirs);
                    }
                    Op::RemoveNth(nth) => {
                        if !plain.0.is_empty() {
                            let (start, end, value) = plain.0.swap_remove(nth % plain.0.len());
                            prop_assert_eq!(spans.remove(&start, end.as_ref()), Some(value));
                        }
                    }
                    Op::Stab(key) => {
                        prop_assert_eq!(hits(&spans, &key), plain.stab(&key));
                        continue;
                    }
                }
                prop_assert_eq!(spans.check(), Ok(()));
                prop_assert_eq!((spans.len(), spans.is_empty()), (plain.0.len(), plain.0.is_empty()));
            }
            prop_assert_eq!(all(&spans), plain.sorted());
        }
    }

    #[test]
    fn example_of_the_head() {
        let mut spans: Intervals<Vec<&str>> = Intervals::new();
        spans.entry("a".into(), Some("c".into())).push("first");
        spans.entry("a".into(), Some("c".into())).push("again");
        spans.entry("b".into(), Some("d".into())).push("overlaps");
        spans.entry("c".into(), None).push("all from c");
        assert_eq!(spans.node(spans.root).start, "b");
        for (key, expected) in [
            ("", vec![]),
            ("a", vec!["first", "again"]),
            ("b", vec!["first", "again", "overlaps"]),
            ("c", vec!["overlaps", "all from c"]),
            ("z", vec!["all from c"]),
        ] {
            let mut found: Vec<&str> = Vec::new();
            spans.stab(key.as_bytes(), &mut |_, values| found.extend(values));
            assert_eq!(found, expected, "stab({key:?})");
        }
    }

    #[test]
    fn empty_ranges_are_kept_and_contain_nothing() {
        let mut spans = Intervals::new();
        for (n, (start, end)) in [("b", "b"), ("c", "a"), ("", ""), ("a", "")].into_iter().enumerate() {
            *spans.entry(start.into(), Some(end.into())) = n as u64;
        }
        assert_eq!(spans.node(spans.root).reach, NIL);
        for key in ["", "a", "b", "c", "d"] {
            assert_eq!(hits(&spans, key.as_bytes()), []);
        }
        *spans.entry("a".into(), Some("c".into())) = 9;
        assert_eq!(hits(&spans, b"b"), [("a".into(), 9)]);
        assert_eq!(spans.remove(&"c".into(), Some(&"a".into())), Some(1));
        assert_eq!(spans.remove(&"c".into(), Some(&"a".into())), None);
        assert_eq!((spans.len(), spans.check()), (4, Ok(())));
    }

    #[test]
    fn many_ranges_come_and_go() {
        // Ascending is what a tree that does not balance minds most.
        for (count, ascending) in [(1 << 12, true), (1 << 17, false)] {
            let mut spans = Intervals::new();
            let order: Vec<u32> = if ascending { (0..count).collect() } else { shuffled(count).collect() };
            for &n in &order {
                *spans.entry(number(n), Some(number(n + 2))) = u64::from(n);
            }
            assert_eq!((spans.len(), spans.check()), (count as usize, Ok(())));
            assert!(spans.height(spans.root) <= 25, "height {}", spans.height(spans.root));
            assert_eq!(hits(&spans, &number(500)), [(number(499), 499), (number(500), 500)]);

            // All but each 64th go, and the memory with them.
            for &n in order.iter().filter(|&n| n % 64 != 0) {
                assert_eq!(spans.remove(&number(n), Some(&number(n + 2))), Some(u64::from(n)));
            }
            assert_eq!((spans.len(), spans.check()), (count as usize / 64, Ok(())));
            assert!(spans.nodes.capacity() <= 4 * spans.len(), "room for {}", spans.nodes.capacity());
            assert_eq!(hits(&spans, &number(641)), [(number(640), 640)]);
            assert_eq!(hits(&spans, &number(642)), []);
            for n in (0..count).step_by(64) {
                spans.remove(&number(n), Some(&number(n + 2)));
            }
            assert_eq!((spans.len(), spans.root, spans.check()), (0, NIL, Ok(())));
        }
    }

    #[test]
    fn check_sees_what_is_wrong() {
        let broken = |harm: fn(&mut Intervals<u64>)| {
            let mut spans = Intervals::new();
            for n in 0..7 {
                *spans.entry(number(n), Some(number(n + 1))) = 0;
            }
            assert_eq!(spans.check(), Ok(()));
            harm(&mut spans);
            spans.check().expect_err("harm was done")
        };
        // Node 3 is the root, 1 and 5 are below it.
        assert_eq!(broken(|spans| spans.node_mut(3).child[LEFT] = 0), "node 1 of 7 is not in the tree");
        assert_eq!(broken(|spans| spans.node_mut(5).child[LEFT] = 2), "node 2 is in the tree twice");
        assert_eq!(broken(|spans| spans.node_mut(1).child[LEFT] = 7), "node 7 of 7 does not exist");
        assert_eq!(broken(|spans| spans.node_mut(5).height = 3), "node 5 has height 3 above 1 and 1");
        assert_eq!(broken(|spans| spans.node_mut(5).reach = 5), "node 5 has 5 for its reach instead of 6");
        assert_eq!(broken(|spans| spans.node_mut(1).lower = 0), "node 1 has 0 for its lower instead of 1");
        assert_eq!(broken(|spans| spans.node_mut(3).reach = NIL), format!("node 3 has {NIL} for its reach instead of 6"));
        let misplaced = broken(|spans| (spans.node_mut(0).start, spans.node_mut(0).end) = (number(1), Some(number(2))));
        assert!(misplaced.contains("stands before"), "{misplaced}");
    }

    /// Prints what a search costs: `cargo test --release intervals -- --ignored --nocapture measure`.
    #[test]
    #[ignore = "a measurement"]
    #[allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "it measures time")]
    fn measure() {
        const BATCH: usize = 200;
        const BATCHES: usize = 1000;
        let prefix = |n: u32| Bytes::from(format!("/registry/tenants/{n:08}/"));
        let prefix_end = |n: u32| Bytes::from(format!("/registry/tenants/{n:08}0"));
        // Name, and how many of the following prefixes the range of one spans.
        for (name, width) in [("disjoint", 1), ("overlapping", 4), ("all overlapping, none hit", 0)] {
            for count in [1, 1000, 100_000] {
                let mut spans: Intervals<u64> = Intervals::new();
                let built = std::time::Instant::now();
                for i in 0..count {
                    // A stride that is prime to each count, so that they come in no particular order.
                    let n = (u64::from(i) * 7919 % u64::from(count)) as u32;
                    let (start, end) = if width == 0 { (prefix(n), prefix_end(count)) } else { (prefix(n), prefix_end(n + width - 1)) };
                    *spans.entry(start, Some(end)) = 1;
                }
                let built = built.elapsed() / count;
                let keys: Vec<Vec<u8>> = (0..10_000u64)
                    .map(|i| {
                        if width == 0 {
                            return b"/registry/tenants/".to_vec();
                        }
                        format!("/registry/tenants/{:08}/pods/{i}", i * 104_729 % u64::from(count)).into_bytes()
                    })
                    .collect();
                // The best of small batches: others use the machine as well.
                let (mut found, mut best) = (0, std::time::Duration::MAX);
                for batch in keys.chunks(BATCH).cycle().take(BATCHES) {
                    let began = std::time::Instant::now();
                    for key in batch {
                        spans.stab(key, &mut |_, value| found += value);
                    }
                    best = best.min(began.elapsed() / BATCH as u32);
                }
                let hits = found as f64 / (BATCH * BATCHES) as f64;
                println!("{name:>26} {count:>7} ranges: insert {built:>9.0?}  stab {best:>9.0?}  hits {hits:.1}");
            }
        }
    }
}
