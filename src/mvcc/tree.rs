//! An ordered map from byte strings to values that also counts: how many live entries a range has, in O(log n).
//!
//! # Idea
//!
//! A B+ tree. Leaves hold up to 64 entries: the keys packed without their common prefix (`keys`), the values side by side
//! in the same order, and one bit per entry that says whether its value is *live* ([`Weighted::live`]; a key whose newest
//! revision is a deletion stays in the index but is not live). Inner nodes (`inner`) know for each child how many live
//! entries lie below it. So the number of live entries before a key is a sum along one path, and the count of a range is
//! the difference of two such sums.
//!
//! Nodes stand in two pools and name each other by number; leaves also name their neighbours, so that an iterator steps
//! from leaf to leaf without the inner nodes.
//!
//! Cost per entry beside the key's bytes and a value of 48 bytes: about 15 bytes if keys come in random order, 9 if they
//! come in order; less than nothing where neighbours share a prefix, which is stored once per leaf.
//!
//! # Example
//!
//! ```ignore
//! struct Revision { number: i64, deleted: bool }
//! impl Weighted for Revision {
//!     fn live(&self) -> bool { !self.deleted }
//! }
//!
//! let mut index = Tree::new();
//! for (number, key) in [(2, "pods/a"), (3, "pods/b"), (4, "services/a")] {
//!     index.insert(key.as_bytes(), Revision { number, deleted: false });
//! }
//! // One descent: look, change, and put in or take out if need be.
//! let previous = index.update(b"pods/a", |found| match found {
//!     Some(revision) => (Edit::Keep, Some(std::mem::replace(revision, Revision { number: 5, deleted: true }).number)),
//!     None => (Edit::Keep, None),
//! });
//! assert_eq!(previous, Some(2));
//! assert_eq!((index.len(), index.live()), (3, 2));
//! assert_eq!(index.count_live(b"pods/", Bound::Before(b"pods0")), 1);
//!
//! // A walk in steps: remember the last key, let go of the lock, go on behind it.
//! let step = |last: &[u8]| index.range_after(last, Bound::Unbounded).take(1).last().map(|(key, _)| key.to_vec());
//! assert_eq!(step(b"pods/a").as_deref(), Some(&b"pods/b"[..]));
//! ```
//!
//! # Invariants ([`Tree::check_invariants`])
//!
//! - Keys ascend strictly within a leaf and from leaf to leaf, and lie between the separators above them.
//! - All leaves are at the same depth. No leaf is empty, unless it is the root.
//! - A bit of `Leaf::live` equals `Weighted::live` of its value; a count in an inner node equals the bits below it.
//!
//! # Caveats
//!
//! - `live()` must depend on the value alone and change only through [`Tree::update`]; a value that changes its mind
//!   behind a `Cell` makes the counts wrong.
//! - Keys are not stored in one piece, so an iterator yields [`Key`], which compares with and copies to a byte string.
//! - Nodes taken out leave their place in the pool for later ones; the pool shrinks only when the tree gets empty.
//! - Leaves of few entries are joined with a neighbour only if the result is at most three quarters full, so a tree that
//!   has shrunk can stay at a quarter of its capacity. Only the fixed part of a leaf (about 8 bytes per possible entry)
//!   is wasted then; values and keys give their room back.

mod inner;
mod keys;
mod leaf;
mod pool;
#[cfg(test)]
mod tests;

use inner::{CHILDREN_MAX, Inner};
pub use keys::Key;
use keys::{KEYS_MAX, Keys, separator};
use leaf::{Leaf, NONE};
use pool::Pool;
use std::iter::FusedIterator;

/// A value that counts or does not count.
pub trait Weighted {
    /// Whether [`Tree::count_live`] counts the entry.
    fn live(&self) -> bool;
}

/// Where a range ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound<'a> {
    /// Before this key, which is not part of the range.
    Before(&'a [u8]),
    /// Behind the last key.
    Unbounded,
}

/// What [`Tree::update`] does with the entry after the caller has seen (and perhaps changed) its value.
#[derive(Debug)]
pub enum Edit<V> {
    /// Leaves the entry, or its absence, as it is now.
    Keep,
    /// Puts the value in, or in place of the old one.
    Set(V),
    /// Takes the entry out, if there is one.
    Remove,
}

/// Leaves with fewer entries look for a neighbour to join.
const LEAF_MIN: usize = KEYS_MAX / 4;

/// Inner nodes with fewer children look for a neighbour to join.
const CHILDREN_MIN: usize = CHILDREN_MAX / 4;

/// One step down: at node `node`, child `at` was taken.
#[derive(Clone, Copy)]
struct Step {
    node: u32,
    at: usize,
}

/// An ordered map with counts. See the module head.
pub struct Tree<V> {
    leaves: Pool<Leaf<V>>,
    inners: Pool<Inner>,
    /// An inner node, or if `height` is 0, a leaf.
    root: u32,
    /// How many inner nodes lie on the way from the root to a leaf.
    height: usize,
    len: usize,
    live: usize,
    /// Heap bytes of all nodes' own allocations.
    heap: usize,
    /// The way of the last descent that may change something, kept for its memory.
    path: Vec<Step>,
}

impl<V: Weighted> Default for Tree<V> {
    fn default() -> Self {
        Tree::new()
    }
}

impl<V: Weighted> Tree<V> {
    /// An empty tree.
    pub fn new() -> Tree<V> {
        let (leaves, inners) = (Pool::new(), Pool::new());
        let mut tree = Tree { leaves, inners, root: 0, height: 0, len: 0, live: 0, heap: 0, path: Vec::new() };
        tree.clear();
        tree
    }

    /// Takes all entries out.
    pub fn clear(&mut self) {
        self.leaves.clear();
        self.inners.clear();
        self.root = self.leaves.add(Leaf::new(Keys::new(), Vec::new(), 0));
        (self.height, self.len, self.live, self.heap) = (0, 0, 0, 0);
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many entries have a live value.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Bytes of heap the tree takes, without what the values own elsewhere and without the allocator's rounding. O(1).
    pub fn heap_bytes(&self) -> usize {
        self.leaves.heap_bytes() + self.inners.heap_bytes() + self.heap
    }

    /// The value of `key`.
    pub fn get(&self, key: &[u8]) -> Option<&V> {
        let leaf = self.leaves.at(self.leaf_for(key));
        let i = leaf.keys.find(key).ok()?;
        leaf.values.get(i)
    }

    /// Puts a value in and returns the one it replaces.
    pub fn insert(&mut self, key: &[u8], value: V) -> Option<V> {
        self.update(key, |found| match found {
            Some(old) => (Edit::Keep, Some(std::mem::replace(old, value))),
            None => (Edit::Set(value), None),
        })
    }

    /// Takes an entry out and returns its value.
    pub fn remove(&mut self, key: &[u8]) -> Option<V> {
        match self.descend(key) {
            (leaf, Ok(i)) => Some(self.remove_at(leaf, i)),
            (_, Err(_)) => None,
        }
    }

    /// Shows `edit` the value of `key`, if there is one, to look at and change, and then does what it says. One descent,
    /// whatever it does, and the counts follow.
    ///
    /// Returns the second part of what `edit` returned.
    pub fn update<R>(&mut self, key: &[u8], edit: impl FnOnce(Option<&mut V>) -> (Edit<V>, R)) -> R {
        let (leaf, place) = self.descend(key);
        let found = place.ok().and_then(|i| self.leaves.at_mut(leaf).values.get_mut(i));
        let (edit, result) = edit(found);
        match (place, edit) {
            (Ok(i), Edit::Keep) => self.settle(leaf, i),
            (Ok(i), Edit::Set(value)) => {
                self.leaves.at_mut(leaf).values[i] = value;
                self.settle(leaf, i);
            }
            (Ok(i), Edit::Remove) => drop(self.remove_at(leaf, i)),
            (Err(i), Edit::Set(value)) => self.insert_at(leaf, i, key, value),
            (Err(_), Edit::Keep | Edit::Remove) => {}
        }
        result
    }

    /// How many live entries have `start <= key` and lie before `end`. O(log n).
    pub fn count_live(&self, start: &[u8], end: Bound<'_>) -> usize {
        let before_end = match end {
            Bound::Before(key) => self.rank(key),
            Bound::Unbounded => self.live,
        };
        // An empty range whose end lies before its start counts nothing.
        before_end.saturating_sub(self.rank(start))
    }

    /// The live entry that has exactly `skip` live entries between `start` and itself; 0 gives the first from `start` on.
    /// O(log n).
    pub fn nth_live(&self, start: &[u8], skip: usize) -> Option<(Key<'_>, &V)> {
        let mut rank = self.rank(start).checked_add(skip).filter(|rank| *rank < self.live)?;
        let mut id = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(id);
            let mut at = 0;
            while rank >= inner.live(at) {
                rank -= inner.live(at);
                at += 1;
            }
            id = inner.child(at);
        }
        let leaf = self.leaves.at(id);
        let mut live = leaf.live;
        for _ in 0..rank {
            live &= live - 1;
        }
        let i = live.trailing_zeros() as usize;
        Some((Key::new(&leaf.keys, i), leaf.values.get(i)?))
    }

    /// The entries with `start <= key` that lie before `end`, in ascending order; [`Iterator::rev`] for descending.
    pub fn range<'a>(&'a self, start: &[u8], end: Bound<'_>) -> Range<'a, V> {
        self.range_from(start, false, end)
    }

    /// The entries with `start < key` that lie before `end`: goes on behind the last key of an earlier walk.
    pub fn range_after<'a>(&'a self, start: &[u8], end: Bound<'_>) -> Range<'a, V> {
        self.range_from(start, true, end)
    }

    fn range_from<'a>(&'a self, start: &[u8], behind: bool, end: Bound<'_>) -> Range<'a, V> {
        let front = self.seek(start, behind);
        let back = match end {
            Bound::Before(key) if key <= start => front,
            Bound::Before(key) => self.seek(key, false),
            Bound::Unbounded => self.end(),
        };
        let leaf = self.leaves.at(front.leaf);
        let mut range = Range { leaves: &self.leaves, leaf, front, stop: 0, back_leaf: self.leaves.at(back.leaf), back };
        range.find_stop();
        range
    }

    /// Between which entries `key` lies: before its own if it has one, or else (`behind`) after it.
    fn seek(&self, key: &[u8], behind: bool) -> Gap {
        let id = self.leaf_for(key);
        let leaf = self.leaves.at(id);
        let at = match leaf.keys.find(key) {
            Ok(i) => i + usize::from(behind),
            Err(i) => i,
        };
        Gap { leaf: id, at }
    }

    fn end(&self) -> Gap {
        let mut id = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(id);
            id = inner.child(inner.len() - 1);
        }
        Gap { leaf: id, at: self.leaves.at(id).len() }
    }

    /// The leaf that has `key` if any has.
    #[inline]
    fn leaf_for(&self, key: &[u8]) -> u32 {
        let mut id = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(id);
            id = inner.child(inner.route(key));
        }
        id
    }

    /// How many live entries lie before `key`.
    fn rank(&self, key: &[u8]) -> usize {
        let (mut id, mut rank) = (self.root, 0);
        for _ in 0..self.height {
            let inner = self.inners.at(id);
            let at = inner.route(key);
            rank += inner.live_before(at);
            id = inner.child(at);
        }
        let leaf = self.leaves.at(id);
        let (Ok(i) | Err(i)) = leaf.keys.find(key);
        rank + leaf.live_before(i)
    }

    /// Like `leaf_for`, with the place in the leaf, and `path` filled for what follows.
    fn descend(&mut self, key: &[u8]) -> (u32, Result<usize, usize>) {
        self.path.clear();
        let mut id = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(id);
            let at = inner.route(key);
            self.path.push(Step { node: id, at });
            id = inner.child(at);
        }
        (id, self.leaves.at(id).keys.find(key))
    }

    /// Makes the counts agree with entry `i`, which may have changed. `path` leads to `leaf`.
    fn settle(&mut self, leaf: u32, i: usize) {
        let leaf = self.leaves.at_mut(leaf);
        let (was, is) = (leaf.live >> i & 1 == 1, leaf.values[i].live());
        if was != is {
            leaf.live ^= 1 << i;
            self.count(is);
        }
    }

    /// One live entry more or less at the end of `path`.
    fn count(&mut self, more: bool) {
        let by = |n: usize| if more { n + 1 } else { n - 1 };
        self.live = by(self.live);
        for step in &self.path {
            let inner = self.inners.at_mut(step.node);
            inner.set_live(step.at, by(inner.live(step.at)));
        }
    }

    /// Runs `f` on a leaf and keeps `heap` right.
    fn with_leaf<R>(&mut self, id: u32, f: impl FnOnce(&mut Leaf<V>) -> R) -> R {
        let leaf = self.leaves.at_mut(id);
        let before = leaf.heap_bytes();
        let result = f(leaf);
        self.heap = self.heap + leaf.heap_bytes() - before;
        result
    }

    fn add_leaf(&mut self, leaf: Leaf<V>) -> u32 {
        self.heap += leaf.heap_bytes();
        self.leaves.add(leaf)
    }

    /// Takes a leaf out of the pool and out of the chain of leaves.
    fn take_leaf(&mut self, id: u32) -> Leaf<V> {
        let leaf = self.leaves.take(id, Leaf::new(Keys::new(), Vec::new(), 0));
        self.heap -= leaf.heap_bytes();
        self.link(leaf.prev, leaf.next);
        leaf
    }

    /// Makes two leaves neighbours; either may be `NONE`.
    fn link(&mut self, left: u32, right: u32) {
        if left != NONE {
            self.leaves.at_mut(left).next = right;
        }
        if right != NONE {
            self.leaves.at_mut(right).prev = left;
        }
    }

    fn with_inner<R>(&mut self, id: u32, f: impl FnOnce(&mut Inner) -> R) -> R {
        let inner = self.inners.at_mut(id);
        let before = inner.heap_bytes();
        let result = f(inner);
        self.heap = self.heap + inner.heap_bytes() - before;
        result
    }

    fn add_inner(&mut self, inner: Inner) -> u32 {
        self.heap += inner.heap_bytes();
        self.inners.add(inner)
    }

    fn take_inner(&mut self, id: u32) -> Inner {
        let inner = self.inners.take(id, Inner::new(NONE, 0));
        self.heap -= inner.heap_bytes();
        inner
    }

    /// Puts an entry in at place `i` of the leaf `path` leads to.
    fn insert_at(&mut self, id: u32, i: usize, key: &[u8], value: V) {
        self.len += 1;
        if value.live() {
            self.count(true);
        }
        let behind = self.with_leaf(id, |leaf| {
            if leaf.keys.try_insert(i, key) {
                leaf.insert_value(i, value);
                return Vec::new();
            }
            leaf.insert_divided(i, key, value)
        });
        if behind.is_empty() {
            return;
        }
        let mut added = Vec::with_capacity(behind.len());
        let mut left = id;
        for leaf in behind {
            let separator = separator(self.leaves.at(left).keys.last(), leaf.keys.first());
            let live = leaf.live_count();
            let right = self.add_leaf(leaf);
            let next = self.leaves.at(left).next;
            self.link(left, right);
            self.link(right, next);
            added.push(Child { separator, id: right, live });
            left = right;
        }
        let at_end = self.leaves.at(left).next == NONE;
        self.adopt(id, self.leaves.at(id).live_count(), added, at_end);
    }

    /// Gives the node at the end of `path`, which now has `live` live entries, new neighbours behind it; divides the
    /// nodes above as need be. `at_end` says that the last of them is the last of the tree.
    fn adopt(&mut self, mut id: u32, mut live: usize, mut added: Vec<Child>, at_end: bool) {
        while let Some(Step { node, at }) = self.path.pop() {
            let len = self.with_inner(node, |inner| {
                inner.set_live(at, live);
                for (i, child) in added.drain(..).enumerate() {
                    inner.insert_after(at + i, child.separator, child.id, child.live);
                }
                inner.len()
            });
            if len <= CHILDREN_MAX {
                return;
            }
            // As with leaves, what is filled in order stays full.
            let cut = if at_end { len - 2 } else { len / 2 };
            let (separator, right) = self.with_inner(node, |inner| inner.split_off(cut));
            let child = Child { separator, live: right.live_total(), id: self.add_inner(right) };
            added.push(child);
            (id, live) = (node, self.inners.at(node).live_total());
        }
        let mut root = Inner::new(id, live);
        for (i, child) in added.into_iter().enumerate() {
            root.insert_after(i, child.separator, child.id, child.live);
        }
        self.root = self.add_inner(root);
        self.height += 1;
    }

    /// Takes entry `i` out of the leaf `path` leads to.
    fn remove_at(&mut self, id: u32, i: usize) -> V {
        let was_live = self.leaves.at(id).live >> i & 1 == 1;
        let value = self.with_leaf(id, |leaf| leaf.remove(i));
        self.len -= 1;
        if was_live {
            self.count(false);
        }
        if self.len == 0 {
            self.clear();
        } else if self.leaves.at(id).len() < LEAF_MIN {
            self.join_leaf(id);
        }
        value
    }

    /// Removes the leaf at the end of `path` if it is empty, or joins it with a neighbour if there is a suitable one.
    fn join_leaf(&mut self, id: u32) {
        let Some(&Step { node, at }) = self.path.last() else { return };
        if self.leaves.at(id).len() == 0 {
            self.take_leaf(id);
            self.remove_child(at);
            return;
        }
        let parent = self.inners.at(node);
        for at in [Some(at), at.checked_sub(1)].into_iter().flatten().filter(|at| at + 1 < parent.len()) {
            let (left, right) = (parent.child(at), parent.child(at + 1));
            let (left_leaf, right_leaf) = (self.leaves.at(left), self.leaves.at(right));
            if left_leaf.len() + right_leaf.len() > KEYS_MAX * 3 / 4 {
                continue;
            }
            let Some(keys) = left_leaf.keys.joined(&right_leaf.keys) else { continue };
            let behind = self.take_leaf(right);
            let live = self.with_leaf(left, |leaf| {
                leaf.live |= behind.live << leaf.len();
                leaf.keys = keys;
                leaf.values.reserve_exact(behind.values.len());
                leaf.values.extend(behind.values);
                leaf.live_count()
            });
            self.inners.at_mut(node).set_live(at, live);
            self.remove_child(at + 1);
            return;
        }
    }

    /// Takes child `at` out of the inner node at the end of `path`, and does for this node what `join_leaf` does for leaves.
    fn remove_child(&mut self, mut at: usize) {
        while let Some(Step { node, .. }) = self.path.pop() {
            let above = self.path.last().copied();
            if self.inners.at(node).len() == 1 {
                self.take_inner(node);
                match above {
                    Some(step) => at = step.at,
                    None => unreachable!("a tree with entries has a root with children"),
                }
                continue;
            }
            let len = self.with_inner(node, |inner| {
                inner.remove(at);
                inner.len()
            });
            let Some(above) = above else { break };
            if len >= CHILDREN_MIN {
                return;
            }
            let parent = self.inners.at(above.node);
            let fitting = [Some(above.at), above.at.checked_sub(1)].into_iter().flatten().find(|at| {
                let children = |at| self.inners.at(parent.child(at)).len();
                at + 1 < parent.len() && children(*at) + children(at + 1) <= CHILDREN_MAX * 3 / 4
            });
            let Some(left_at) = fitting else { return };
            let (left, right) = (parent.child(left_at), parent.child(left_at + 1));
            let between = parent.separators()[left_at].clone();
            let live = parent.live(left_at) + parent.live(left_at + 1);
            let behind = self.take_inner(right);
            self.with_inner(left, |inner| inner.append(between, behind));
            self.inners.at_mut(above.node).set_live(left_at, live);
            at = left_at + 1;
        }
        while self.height > 0 && self.inners.at(self.root).len() == 1 {
            let old = self.root;
            self.root = self.inners.at(old).child(0);
            self.take_inner(old);
            self.height -= 1;
        }
    }

    /// Panics, saying what is wrong, unless the invariants of the module head hold. O(n).
    pub fn check_invariants(&self) {
        let mut chain = Vec::new();
        let mut heap = 0;
        let (len, live) = self.check_node(self.root, self.height, &[], None, &mut chain, &mut heap);
        assert_eq!((len, live, heap), (self.len, self.live, self.heap), "entries, live entries and heap bytes of the tree");
        assert_eq!(chain.len(), self.leaves.used(), "leaves in the tree and in the pool");
        for (i, id) in chain.iter().enumerate() {
            let prev = if i == 0 { NONE } else { chain[i - 1] };
            let next = chain.get(i + 1).copied().unwrap_or(NONE);
            assert_eq!((self.leaves.at(*id).prev, self.leaves.at(*id).next), (prev, next), "neighbours of leaf {id}, number {i}");
        }
    }

    /// Checks what lies below `id`, whose keys must be at least `low` and below `high`; returns its counts.
    fn check_node(
        &self,
        id: u32,
        height: usize,
        low: &[u8],
        high: Option<&[u8]>,
        chain: &mut Vec<u32>,
        heap: &mut usize,
    ) -> (usize, usize) {
        if height == 0 {
            let leaf = self.leaves.at(id);
            chain.push(id);
            *heap += leaf.heap_bytes();
            leaf.keys.check_invariants();
            assert_eq!(leaf.keys.len(), leaf.len(), "keys and values of leaf {id}");
            assert!(leaf.len() > 0 || self.height == 0, "leaf {id} is empty");
            for (i, value) in leaf.values.iter().enumerate() {
                assert_eq!(leaf.live >> i & 1 == 1, value.live(), "live bit of {:?}", leaf.keys.key(i));
                assert!(leaf.keys.key(i).cmp_bytes(low).is_ge(), "{:?} is below its leaf's {:?}", leaf.keys.key(i), low);
                assert!(high.is_none_or(|high| leaf.keys.key(i).cmp_bytes(high).is_lt()), "{:?} is not below {high:?}", leaf.keys.key(i));
            }
            assert_eq!(leaf.live_count(), leaf.live_before(leaf.len()), "live bits behind the last entry of leaf {id}");
            return (leaf.len(), leaf.live_count());
        }
        let inner = self.inners.at(id);
        inner.check_invariants();
        *heap += inner.heap_bytes();
        let (mut len, mut live) = (0, 0);
        for i in 0..inner.len() {
            let low = if i == 0 { low } else { &inner.separators()[i - 1] };
            let high = inner.separators().get(i).map(|s| &**s).or(high);
            let below = self.check_node(inner.child(i), height - 1, low, high, chain, heap);
            assert_eq!(below.1, inner.live(i), "live entries below child {i} of inner node {id}");
            len += below.0;
            live += below.1;
        }
        (len, live)
    }
}

/// A node that has come into being, on its way into a parent.
struct Child {
    separator: Box<[u8]>,
    id: u32,
    live: usize,
}

/// A place between two entries of a leaf, or at its front or end: as many entries of the leaf as `at` lie before it. The
/// end of a leaf and the front of the next are the same place.
#[derive(Clone, Copy)]
struct Gap {
    leaf: u32,
    at: usize,
}

/// Entries of a range in order, from either end. See [`Tree::range`].
pub struct Range<'a, V> {
    leaves: &'a Pool<Leaf<V>>,
    /// The leaf of `front`.
    leaf: &'a Leaf<V>,
    front: Gap,
    /// Where to stop in this leaf, going forward: at `back` if that is here, or else at the end.
    stop: usize,
    /// The leaf of `back`.
    back_leaf: &'a Leaf<V>,
    back: Gap,
}

impl<V: Weighted> Range<'_, V> {
    fn find_stop(&mut self) {
        self.stop = if self.front.leaf == self.back.leaf { self.back.at } else { self.leaf.len() };
    }
}

impl<'a, V: Weighted> Iterator for Range<'a, V> {
    type Item = (Key<'a>, &'a V);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while self.front.at >= self.stop {
            if self.front.leaf == self.back.leaf {
                return None;
            }
            self.front = Gap { leaf: self.leaf.next, at: 0 };
            self.leaf = self.leaves.at(self.front.leaf);
            self.find_stop();
        }
        let i = self.front.at;
        self.front.at += 1;
        Some((Key::new(&self.leaf.keys, i), self.leaf.values.get(i)?))
    }
}

impl<V: Weighted> DoubleEndedIterator for Range<'_, V> {
    #[inline]
    fn next_back(&mut self) -> Option<Self::Item> {
        loop {
            if self.front.leaf == self.back.leaf && self.front.at >= self.back.at {
                return None;
            }
            if self.back.at > 0 {
                break;
            }
            self.back.leaf = self.back_leaf.prev;
            self.back_leaf = self.leaves.at(self.back.leaf);
            self.back.at = self.back_leaf.len();
            self.find_stop();
        }
        self.back.at -= 1;
        if self.front.leaf == self.back.leaf {
            self.stop = self.back.at;
        }
        Some((Key::new(&self.back_leaf.keys, self.back.at), self.back_leaf.values.get(self.back.at)?))
    }
}

impl<V: Weighted> FusedIterator for Range<'_, V> {}
