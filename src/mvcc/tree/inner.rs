//! An inner node: which child has a key, and how many live entries each child has below it.
//!
//! Child `i` holds the keys from separator `i - 1` (included) to separator `i` (excluded); the outermost have no limit
//! of their own. Separators are byte strings, as short as they can be, that need not be keys.
//!
//! As in a leaf, a search goes by numbers that lie in the node itself, because every separator it has to look at costs a
//! cache miss. `heads` has the eight bytes behind what all separators share. Keys of several directories in one node
//! often have that in common too: `/registry/pods/...` beside `/registry/services/...` leaves many with the head
//! `pods/def`. So each group with the same head has its own shared length (`depth`) and the eight bytes behind that
//! (`deeper`). Then one separator is looked at for the shared bytes, and nearly always none for the rest:
//!
//! ```text
//! separators  /registry/pods/default/a7   /registry/pods/default/c   /registry/services/b
//! heads       "pods/def"                  "pods/def"                 "services"
//! depth       23                          23                         0
//! deeper      "a7"                        "c"
//! ```
//!
//! Invariants: separators ascend strictly and are one fewer than the children; there is at least one child, and at most
//! [`CHILDREN_MAX`] once the node has been divided; all that serves the search follows from the separators.

use super::keys::common;

/// Most children of a node. One more and it is divided in two.
pub(super) const CHILDREN_MAX: usize = 128;

/// Children a node can hold between a child's division, which adds up to two, and its own.
const SLOTS: usize = CHILDREN_MAX + 2;

/// How many bytes of the prefix a node holds itself.
const FRONT: usize = 48;

/// The first eight bytes as a number that orders as they do; a missing byte counts as zero.
#[inline]
fn head(rest: &[u8]) -> u64 {
    match rest.first_chunk() {
        Some(first) => u64::from_be_bytes(*first),
        None => rest.iter().enumerate().fold(0, |head, (i, byte)| head | u64::from(*byte) << (56 - 8 * i)),
    }
}

pub(super) struct Inner {
    heads: [u64; SLOTS],
    /// For separators that have their head in common with a neighbour: the eight bytes at `depth`.
    deeper: [u64; SLOTS],
    /// For the same: how many bytes all separators with this head start with.
    depth: [usize; SLOTS],
    children: [u32; SLOTS],
    live: [usize; SLOTS],
    separators: Vec<Box<[u8]>>,
    /// How many bytes all separators start with; 0 if there are none.
    prefix_len: usize,
    /// The first of these bytes, here so that most searches need not touch a separator for them.
    front: [u8; FRONT],
}

impl Inner {
    /// A node with one child.
    pub(super) fn new(child: u32, live: usize) -> Inner {
        let mut inner = Inner {
            heads: [0; SLOTS],
            deeper: [0; SLOTS],
            depth: [0; SLOTS],
            children: [0; SLOTS],
            live: [0; SLOTS],
            separators: Vec::new(),
            prefix_len: 0,
            front: [0; FRONT],
        };
        inner.children[0] = child;
        inner.live[0] = live;
        inner
    }

    pub(super) fn len(&self) -> usize {
        self.separators.len() + 1
    }

    pub(super) fn child(&self, i: usize) -> u32 {
        self.children[i]
    }

    pub(super) fn live(&self, i: usize) -> usize {
        self.live[i]
    }

    pub(super) fn set_live(&mut self, i: usize, live: usize) {
        self.live[i] = live;
    }

    pub(super) fn live_before(&self, i: usize) -> usize {
        self.live[..i].iter().sum()
    }

    pub(super) fn live_total(&self) -> usize {
        self.live_before(self.len())
    }

    pub(super) fn separators(&self) -> &[Box<[u8]>] {
        &self.separators
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let separators: usize = self.separators.iter().map(|s| s.len()).sum();
        separators + self.separators.capacity() * size_of::<Box<[u8]>>()
    }

    fn prefix(&self) -> &[u8] {
        self.separators.first().map_or(&[], |first| &first[..self.prefix_len])
    }

    /// What follows the prefix in `key`, if it has the prefix.
    #[inline]
    fn strip_prefix<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        let (prefix, rest) = key.split_at_checked(self.prefix_len)?;
        let inline = self.front.get(..self.prefix_len).unwrap_or(&self.front);
        if prefix[..inline.len()] != *inline || inline.len() < prefix.len() && prefix != self.prefix() {
            return None;
        }
        Some(rest)
    }

    /// The place of the child that has `key` if any has: how many separators are at most `key`.
    #[inline]
    pub(super) fn route(&self, key: &[u8]) -> usize {
        let separators = &*self.separators;
        let Some(rest) = self.strip_prefix(key) else {
            return if *key < *self.prefix() { 0 } else { separators.len() };
        };
        let sought = head(rest);
        let heads = &self.heads[..separators.len()];
        let low = heads.partition_point(|head| *head < sought);
        let Some(found) = heads.get(low).filter(|head| **head == sought) else { return low };
        let high = low + 1 + heads[low + 1..].iter().take_while(|head| *head == found).count();
        if high == low + 1 {
            return low + usize::from(separators[low][self.prefix_len..] <= *rest);
        }
        // Several have this head. They share even more: compare that once, and go by the number behind it.
        let shared = &separators[low][..self.depth[low]];
        let Some(rest) = key.strip_prefix(shared) else {
            return if key < shared { low } else { high };
        };
        let sought = head(rest);
        let deeper = &self.deeper[..high];
        let low = low + deeper[low..].partition_point(|head| *head < sought);
        let same = deeper[low..].iter().take_while(|head| **head == sought).count();
        low + separators[low..low + same].partition_point(|separator| **separator <= *key)
    }

    /// Puts a child behind child `i`; `separator` is the lower limit of its keys.
    pub(super) fn insert_after(&mut self, i: usize, separator: Box<[u8]>, child: u32, live: usize) {
        let len = self.len();
        self.children.copy_within(i + 1..len, i + 2);
        self.live.copy_within(i + 1..len, i + 2);
        self.children[i + 1] = child;
        self.live[i + 1] = live;
        if len > 1 && separator.starts_with(self.prefix()) {
            self.heads.copy_within(i..len - 1, i + 1);
            self.deeper.copy_within(i..len - 1, i + 1);
            self.depth.copy_within(i..len - 1, i + 1);
            self.heads[i] = head(&separator[self.prefix_len..]);
            self.separators.insert(i, separator);
            let heads = &self.heads[..len];
            let low = heads[..i].iter().rposition(|head| *head != heads[i]).map_or(0, |other| other + 1);
            self.refresh_group(low);
        } else {
            self.separators.insert(i, separator);
            self.refresh();
        }
    }

    /// Takes child `i` out, one of several. Its keys, if there are any left, are the caller's business.
    pub(super) fn remove(&mut self, i: usize) {
        let len = self.len();
        self.children.copy_within(i + 1..len, i);
        self.live.copy_within(i + 1..len, i);
        self.separators.remove(i.saturating_sub(1));
        self.refresh();
    }

    /// Keeps the children before `cut` (at least one, and not all) and returns the others with the separator between.
    pub(super) fn split_off(&mut self, cut: usize) -> (Box<[u8]>, Inner) {
        let len = self.len();
        let mut right = Inner::new(0, 0);
        right.children[..len - cut].copy_from_slice(&self.children[cut..len]);
        right.live[..len - cut].copy_from_slice(&self.live[cut..len]);
        right.separators = self.separators.split_off(cut);
        let between = self.separators.pop().expect("there is a separator before every child but the first");
        self.separators.shrink_to(CHILDREN_MAX / 2);
        self.refresh();
        right.refresh();
        (between, right)
    }

    /// Adds the children of `right`, whose keys start at `between`; together they must be at most [`CHILDREN_MAX`].
    pub(super) fn append(&mut self, between: Box<[u8]>, right: Inner) {
        let (len, added) = (self.len(), right.len());
        self.children[len..len + added].copy_from_slice(&right.children[..added]);
        self.live[len..len + added].copy_from_slice(&right.live[..added]);
        self.separators.push(between);
        self.separators.extend(right.separators);
        self.refresh();
    }

    /// Makes `deeper` and `depth` follow from the separators for all with the head of `low`, the first with it. Returns
    /// the end of this group.
    fn refresh_group(&mut self, low: usize) -> usize {
        let heads = &self.heads[..self.separators.len()];
        let group = low..low + heads[low..].iter().take_while(|head| **head == heads[low]).count();
        let depth = if group.len() == 1 { 0 } else { common(&self.separators[low], &self.separators[group.end - 1]) };
        for i in group.clone() {
            self.depth[i] = depth;
            self.deeper[i] = if group.len() == 1 { 0 } else { head(&self.separators[i][depth..]) };
        }
        group.end
    }

    /// Makes all that serves the search follow from the separators.
    fn refresh(&mut self) {
        let shared = match &*self.separators {
            [] => 0,
            [first, .., last] => common(first, last),
            [only] => only.len(),
        };
        self.prefix_len = shared;
        if let Some(first) = self.separators.first() {
            let inline = shared.min(FRONT);
            self.front[..inline].copy_from_slice(&first[..inline]);
        }
        for (slot, separator) in self.heads.iter_mut().zip(&self.separators) {
            *slot = head(&separator[shared..]);
        }
        let mut low = 0;
        while low < self.separators.len() {
            low = self.refresh_group(low);
        }
    }

    /// Panics unless the invariants of the module head hold.
    pub(super) fn check_invariants(&self) {
        assert!(self.len() <= CHILDREN_MAX, "{} children", self.len());
        let inline = self.prefix_len.min(FRONT);
        assert_eq!(self.front[..inline], self.prefix()[..inline], "copy of the prefix");
        for (i, separator) in self.separators.iter().enumerate() {
            assert!(separator.starts_with(self.prefix()), "separator {i} lacks the prefix");
            assert_eq!(self.heads[i], head(&separator[self.prefix_len..]), "head of separator {i}");
            assert!(i == 0 || self.separators[i - 1] < *separator, "separator {i} is not above the one before");
            if i > 0 && self.heads[i] == self.heads[i - 1] {
                let depth = self.depth[i];
                assert_eq!(depth, self.depth[i - 1], "depth of separators {} and {i}", i - 1);
                assert_eq!(self.separators[i - 1].get(..depth), separator.get(..depth), "bytes shared by {} and {i}", i - 1);
                assert_eq!(self.deeper[i], head(&separator[depth..]), "deeper head of {i}");
                assert_eq!(self.deeper[i - 1], head(&self.separators[i - 1][depth..]), "deeper head of {}", i - 1);
            }
        }
    }
}
