//! The keys of one leaf, packed: what they share is stored once, the rest end to end.
//!
//! ```text
//! keys    /registry/pods/a   /registry/pods/b1   /registry/pods/b2
//! bytes   /registry/pods/ a b1 b2        one allocation: the shared prefix, then every key's rest
//! starts                  0 1  3         where each rest begins, counted from the end of the prefix
//! heads   "a"   "b1"   "b2"              the first four bytes of each rest as a big-endian number
//! ```
//!
//! A search compares the prefix once and then looks for a number among the heads, which lie side by side in the node
//! itself. Only the keys whose head equals the sought one (nearly always at most one) are compared byte by byte.
//!
//! Invariants: the keys ascend strictly; every key starts with the prefix, which may be shorter than what they really
//! share (taking a key out does not lengthen it); the rests together are at most [`RESTS_BYTES_MAX`] bytes. A key of any
//! length fits an empty leaf, because a single key is all prefix.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

/// Most keys in a leaf: as many as a `u64` has bits, which say what is live. A full leaf is divided.
pub(super) const KEYS_MAX: usize = 64;

/// Most bytes that the rests of a leaf's keys take together: `starts` are 16 bits, and putting a key in moves on average
/// half of these bytes. A leaf that would need more is divided, however few keys it has.
pub(super) const RESTS_BYTES_MAX: usize = 16 * 1024;

/// A key where it lies in the tree; a cheap copyable reference, and nothing of the key is read before it is asked for.
///
/// Keys are not stored in one piece: compare with [`Key::cmp_bytes`] or `==`, copy with [`Key::to_vec`] or
/// [`Key::copy_to`], or take the two pieces.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    keys: &'a Keys,
    i: usize,
}

impl<'a> Key<'a> {
    pub(super) fn new(keys: &'a Keys, i: usize) -> Key<'a> {
        Key { keys, i }
    }

    /// The two pieces, which together are the key. Where the cut lies means nothing and may change with any write.
    pub fn parts(self) -> (&'a [u8], &'a [u8]) {
        let Parts { prefix, rest } = self.keys.key(self.i);
        (prefix, rest)
    }

    /// Length in bytes.
    pub fn len(self) -> usize {
        self.keys.key(self.i).len()
    }

    /// Whether this is the empty key.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The key in one piece.
    pub fn to_vec(self) -> Vec<u8> {
        self.keys.key(self.i).to_vec()
    }

    /// Makes `buf` hold the key and nothing else, reusing its memory.
    pub fn copy_to(self, buf: &mut Vec<u8>) {
        let (prefix, rest) = self.parts();
        buf.clear();
        buf.reserve(prefix.len() + rest.len());
        buf.extend_from_slice(prefix);
        buf.extend_from_slice(rest);
    }

    /// Order of this key against one that lies in one piece.
    pub fn cmp_bytes(self, other: &[u8]) -> Ordering {
        self.keys.key(self.i).cmp_bytes(other)
    }
}

impl PartialEq<[u8]> for Key<'_> {
    fn eq(&self, other: &[u8]) -> bool {
        self.cmp_bytes(other) == Ordering::Equal
    }
}

impl fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.keys.key(self.i).fmt(f)
    }
}

/// The bytes of a key: what all keys of its leaf start with, and the rest.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) prefix: &'a [u8],
    pub(super) rest: &'a [u8],
}

impl<'a> Parts<'a> {
    pub(super) fn len(self) -> usize {
        self.prefix.len() + self.rest.len()
    }

    pub(super) fn to_vec(self) -> Vec<u8> {
        [self.prefix, self.rest].concat()
    }

    pub(super) fn cmp_bytes(self, other: &[u8]) -> Ordering {
        match other.split_at_checked(self.prefix.len()) {
            Some((front, back)) => self.prefix.cmp(front).then_with(|| self.rest.cmp(back)),
            // `other` ends inside the prefix: it decides there, or else it is a proper prefix of this key.
            None => self.prefix.cmp(other),
        }
    }

    /// What follows the first `n` bytes, which must exist.
    fn skip(self, n: usize) -> Parts<'a> {
        match n.checked_sub(self.prefix.len()) {
            None => Parts { prefix: &self.prefix[n..], rest: self.rest },
            Some(n) => Parts { prefix: &[], rest: &self.rest[n..] },
        }
    }

    /// How many bytes two keys have in common at their front.
    pub(super) fn common(self, other: Parts<'_>) -> usize {
        let fronts = common(self.prefix, other.prefix);
        let shorter = self.prefix.len().min(other.prefix.len());
        if fronts < shorter {
            return fronts;
        }
        let (a, b) = (self.skip(shorter), other.skip(shorter));
        // At most one of the two still has a prefix part.
        let next = a.prefix.len().max(b.prefix.len());
        let (front, back) = if a.prefix.is_empty() { (b, a) } else { (a, b) };
        let middle = common(front.prefix, back.rest);
        if middle < next {
            return shorter + middle;
        }
        shorter + next + common(front.rest, &back.rest[next..])
    }
}

impl fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}{}\"", self.prefix.escape_ascii(), self.rest.escape_ascii())
    }
}

/// The shortest byte string `s` with `left < s <= right`; `left < right` is given.
pub(super) fn separator(left: Parts<'_>, right: Parts<'_>) -> Box<[u8]> {
    let mut bytes = right.to_vec();
    bytes.truncate(left.common(right) + 1);
    bytes.into_boxed_slice()
}

/// How many bytes two slices have in common at their front.
pub(super) fn common(a: &[u8], b: &[u8]) -> usize {
    // Blocks first, which compare much faster than bytes; keys may be megabytes long.
    const BLOCK: usize = 32;
    let equal = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count() * BLOCK;
    equal + a[equal..].iter().zip(&b[equal..]).take_while(|(a, b)| a == b).count()
}

/// The first four bytes as a number that orders as they do; a missing byte counts as zero.
#[inline]
fn head(rest: &[u8]) -> u32 {
    match rest.first_chunk() {
        Some(first) => u32::from_be_bytes(*first),
        None => rest.iter().enumerate().fold(0, |head, (i, byte)| head | u32::from(*byte) << (24 - 8 * i)),
    }
}

/// Up to [`KEYS_MAX`] keys in ascending order. See the module head.
pub(super) struct Keys {
    heads: [u32; KEYS_MAX],
    starts: [u16; KEYS_MAX],
    len: usize,
    prefix_len: usize,
    bytes: Vec<u8>,
}

impl Keys {
    pub(super) fn new() -> Keys {
        Keys { heads: [0; KEYS_MAX], starts: [0; KEYS_MAX], len: 0, prefix_len: 0, bytes: Vec::new() }
    }

    pub(super) fn one(key: &[u8]) -> Keys {
        Keys { len: 1, prefix_len: key.len(), bytes: key.to_vec(), ..Keys::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes held on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    fn prefix(&self) -> &[u8] {
        &self.bytes[..self.prefix_len]
    }

    fn rests_bytes(&self) -> usize {
        self.bytes.len() - self.prefix_len
    }

    /// Where rest `i` lies in `bytes`; `i == len` gives the end of all.
    #[inline]
    fn start(&self, i: usize) -> usize {
        if i < self.len { self.prefix_len + usize::from(self.starts[i]) } else { self.bytes.len() }
    }

    #[inline]
    fn rest(&self, i: usize) -> &[u8] {
        &self.bytes[self.start(i)..self.start(i + 1)]
    }

    /// Key `i`, which must exist.
    #[inline]
    pub(super) fn key(&self, i: usize) -> Parts<'_> {
        Parts { prefix: self.prefix(), rest: self.rest(i) }
    }

    pub(super) fn first(&self) -> Parts<'_> {
        self.key(0)
    }

    pub(super) fn last(&self) -> Parts<'_> {
        self.key(self.len - 1)
    }

    /// Where `key` is (`Ok`), or where it would have to be put (`Err`).
    #[inline]
    pub(super) fn find(&self, key: &[u8]) -> Result<usize, usize> {
        let prefix = self.prefix();
        let Some(rest) = key.strip_prefix(prefix) else {
            return Err(if key < prefix { 0 } else { self.len });
        };
        let sought = head(rest);
        let heads = &self.heads[..self.len];
        let mut low = heads.partition_point(|head| *head < sought);
        let mut high = low;
        while high < heads.len() && heads[high] == sought {
            high += 1;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            match self.rest(middle).cmp(rest) {
                Ordering::Equal => return Ok(middle),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }

    /// Puts `key` at place `i`, where `find` said it belongs, or returns false because there is no room.
    pub(super) fn try_insert(&mut self, i: usize, key: &[u8]) -> bool {
        if self.len == 0 {
            *self = Keys::one(key);
            return true;
        }
        let shared = if key.starts_with(self.prefix()) { self.prefix_len } else { common(self.prefix(), key) };
        let rest = &key[shared..];
        // What the others take once the prefix ends at `shared`, without overflow even for absurd lengths.
        let others = self.rests_bytes().saturating_add(self.len.saturating_mul(self.prefix_len - shared));
        if self.len == KEYS_MAX || others.saturating_add(rest.len()) > RESTS_BYTES_MAX {
            return false;
        }
        if shared < self.prefix_len {
            *self = Keys::pack((0..self.len).map(|i| self.key(i)), shared, others);
        }
        let at = self.start(i);
        let start = (at - self.prefix_len) as u16;
        let grown = rest.len() as u16;
        self.starts.copy_within(i..self.len, i + 1);
        self.heads.copy_within(i..self.len, i + 1);
        self.starts[i] = start;
        self.heads[i] = head(rest);
        self.len += 1;
        for start in &mut self.starts[i + 1..self.len] {
            *start += grown;
        }
        let old = self.bytes.len();
        if self.bytes.capacity() - old < rest.len() {
            // Tight, because at a million keys the doubling of `Vec` would cost more than the keys' rests.
            self.bytes.reserve_exact(rest.len() + old / 16 + 32);
        }
        self.bytes.resize(old + rest.len(), 0);
        self.bytes.copy_within(at..old, at + rest.len());
        self.bytes[at..at + rest.len()].copy_from_slice(rest);
        true
    }

    /// Takes key `i` out.
    pub(super) fn remove(&mut self, i: usize) {
        let Range { start, end } = self.start(i)..self.start(i + 1);
        let shrunk = (end - start) as u16;
        self.bytes.drain(start..end);
        self.starts.copy_within(i + 1..self.len, i);
        self.heads.copy_within(i + 1..self.len, i);
        self.len -= 1;
        for start in &mut self.starts[i..self.len] {
            *start -= shrunk;
        }
        if self.len == 0 {
            *self = Keys::new();
        } else if self.bytes.capacity() - self.bytes.len() > 64 + self.bytes.len() / 8 {
            self.bytes.shrink_to_fit();
        }
    }

    /// Whether `key` lacks the prefix, and therefore lies before or behind all keys.
    pub(super) fn is_outside(&self, key: &[u8]) -> bool {
        !key.starts_with(self.prefix())
    }

    /// Where to divide a full leaf so that `key`, which belongs at place `i`, fits its side: near the middle, between the
    /// two neighbours that share least, since both sides then keep the longest prefixes and the separator is short.
    /// `None` if one side would still be too long.
    pub(super) fn cut_for(&self, i: usize, key: &[u8]) -> Option<usize> {
        let window = self.len * 3 / 8..self.len * 5 / 8 + 1;
        let cut = window.filter(|cut| (1..self.len).contains(cut)).min_by_key(|cut| {
            let shared = common(self.rest(cut - 1), self.rest(*cut));
            (shared, cut.abs_diff(self.len / 2))
        })?;
        let side = if i <= cut { self.start(cut) - self.start(0) } else { self.start(self.len) - self.start(cut) };
        (side + key.len() - self.prefix_len <= RESTS_BYTES_MAX).then_some(cut)
    }

    /// Keeps the keys before `cut` and returns the others. Both lists must have at least one key.
    pub(super) fn split_off(&mut self, cut: usize) -> Keys {
        let right = self.slice(cut..self.len);
        *self = self.slice(0..cut);
        right
    }

    fn slice(&self, range: Range<usize>) -> Keys {
        let prefix_len = self.key(range.start).common(self.key(range.end - 1));
        let whole = self.start(range.end) - self.start(range.start);
        Keys::pack(range.clone().map(|i| self.key(i)), prefix_len, whole - range.len() * (prefix_len - self.prefix_len))
    }

    /// Both lists as one, if that has room; all of `right` must lie behind `self`.
    pub(super) fn joined(&self, right: &Keys) -> Option<Keys> {
        let prefix_len = self.first().common(right.last());
        let side = |keys: &Keys| keys.rests_bytes().saturating_add(keys.len.saturating_mul(keys.prefix_len.saturating_sub(prefix_len)));
        // A prefix of `self` or `right` may be shorter than the common one; then this estimate is on the safe side.
        let rests = side(self).saturating_add(side(right));
        if self.len + right.len > KEYS_MAX || rests > RESTS_BYTES_MAX {
            return None;
        }
        let keys = (0..self.len).map(|i| self.key(i)).chain((0..right.len).map(|i| right.key(i)));
        Some(Keys::pack(keys, prefix_len, rests))
    }

    /// Packs keys that share at least `prefix_len` bytes and whose rests take `rests` bytes or fewer.
    fn pack<'k>(keys: impl Iterator<Item = Parts<'k>>, prefix_len: usize, rests: usize) -> Keys {
        let mut packed = Keys::new();
        packed.prefix_len = prefix_len;
        packed.bytes.reserve_exact(prefix_len + rests);
        for key in keys {
            let Parts { prefix, rest } = key;
            if packed.len == 0 {
                let from_rest = prefix_len.saturating_sub(prefix.len());
                packed.bytes.extend_from_slice(&prefix[..prefix_len.min(prefix.len())]);
                packed.bytes.extend_from_slice(&rest[..from_rest]);
            }
            let tail = key.skip(prefix_len);
            let at = packed.bytes.len();
            packed.bytes.extend_from_slice(tail.prefix);
            packed.bytes.extend_from_slice(tail.rest);
            packed.starts[packed.len] = (at - prefix_len) as u16;
            packed.heads[packed.len] = head(&packed.bytes[at..]);
            packed.len += 1;
        }
        packed
    }

    /// Panics unless the invariants of the module head hold.
    pub(super) fn check_invariants(&self) {
        assert!(self.len <= KEYS_MAX, "{} keys in a leaf", self.len);
        assert!(self.prefix_len <= self.bytes.len(), "prefix of {} in {} bytes", self.prefix_len, self.bytes.len());
        assert!(self.rests_bytes() <= RESTS_BYTES_MAX, "rests of {} bytes", self.rests_bytes());
        for i in 0..self.len {
            assert!(self.start(i) <= self.start(i + 1), "start {} of {i} behind {}", self.start(i), self.start(i + 1));
            assert_eq!(self.heads[i], head(self.rest(i)), "head of {:?}", self.key(i));
            assert!(i == 0 || self.rest(i - 1) < self.rest(i), "{:?} before {:?}", self.key(i.max(1) - 1), self.key(i));
        }
        assert!(self.len == 0 || self.start(0) == self.prefix_len, "first rest at {}", self.start(0));
    }
}
