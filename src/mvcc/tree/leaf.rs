//! A leaf: up to 64 entries, their keys packed, their values side by side, and a bit each for what is live.

use super::Weighted;
use super::keys::Keys;

/// How many more values a leaf makes room for when it has none left. Small, because a value takes far more than the rest
/// of its entry; the price is a reallocation of at most 64 values every so many insertions.
const VALUES_STEP: usize = 4;

/// Stands for "no leaf" in the links between leaves.
pub(super) const NONE: u32 = u32::MAX;

pub(super) struct Leaf<V> {
    pub(super) keys: Keys,
    /// Bit `i` = `values[i].live()`; the bits above are zero.
    pub(super) live: u64,
    pub(super) values: Vec<V>,
    pub(super) prev: u32,
    pub(super) next: u32,
}

impl<V: Weighted> Leaf<V> {
    pub(super) fn new(keys: Keys, values: Vec<V>, live: u64) -> Leaf<V> {
        Leaf { keys, live, values, prev: NONE, next: NONE }
    }

    fn one(key: &[u8], value: V) -> Leaf<V> {
        let mut values = Vec::with_capacity(VALUES_STEP);
        let live = u64::from(value.live());
        values.push(value);
        Leaf::new(Keys::one(key), values, live)
    }

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn live_count(&self) -> usize {
        self.live.count_ones() as usize
    }

    /// How many live entries stand before place `i`, which may be the end.
    pub(super) fn live_before(&self, i: usize) -> usize {
        let below = 1u64.checked_shl(i as u32).map_or(u64::MAX, |bit| bit - 1);
        (self.live & below).count_ones() as usize
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.keys.heap_bytes() + self.values.capacity() * size_of::<V>()
    }

    /// Puts the value of a key in, whose key stands at `i` already.
    pub(super) fn insert_value(&mut self, i: usize, value: V) {
        if self.values.len() == self.values.capacity() {
            self.values.reserve_exact(VALUES_STEP);
        }
        let below = (1u64 << i) - 1;
        self.live = (self.live & below) | u64::from(value.live()) << i | (self.live & !below) << 1;
        self.values.insert(i, value);
    }

    pub(super) fn remove(&mut self, i: usize) -> V {
        self.keys.remove(i);
        let below = (1u64 << i) - 1;
        self.live = (self.live & below) | (self.live >> 1 & !below);
        let value = self.values.remove(i);
        if self.values.capacity() - self.values.len() > 2 * VALUES_STEP {
            self.values.shrink_to(self.values.len() + VALUES_STEP);
        }
        value
    }

    /// Keeps the entries before `cut` and returns the others.
    fn split_off(&mut self, cut: usize) -> Leaf<V> {
        let right = Leaf::new(self.keys.split_off(cut), self.values.split_off(cut), self.live >> cut);
        self.values.shrink_to(cut + VALUES_STEP);
        self.live &= (1 << cut) - 1;
        right
    }

    /// Puts an entry into a leaf that has no room for it, by dividing the leaf in two or, around a very long key, three.
    /// `self` keeps the front; the result is what lies behind it, in order.
    pub(super) fn insert_divided(&mut self, i: usize, key: &[u8], value: V) -> Vec<Leaf<V>> {
        // At either end of the tree the full leaf stays full, since keys that come in order will go on that way. A key
        // without the leaf's prefix stays out too, for it would undo what the prefix saves.
        let at_end = i == self.len() && self.next == NONE || i == 0 && self.prev == NONE || self.keys.is_outside(key);
        if !at_end && let Some(cut) = self.keys.cut_for(i, key) {
            let mut right = self.split_off(cut);
            let (side, i) = if i <= cut { (self, i) } else { (&mut right, i - cut) };
            let fits = side.keys.try_insert(i, key);
            assert!(fits, "key of {} bytes was said to fit beside {} others", key.len(), side.len());
            side.insert_value(i, value);
            return vec![right];
        }
        let one = Leaf::one(key, value);
        if i == self.len() {
            return vec![one];
        }
        if i > 0 {
            let behind = self.split_off(i);
            return vec![one, behind];
        }
        let behind = std::mem::replace(self, one);
        (self.prev, self.next) = (behind.prev, behind.next);
        vec![behind]
    }
}
