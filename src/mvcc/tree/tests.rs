use super::keys::Parts;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included, Unbounded};

#[derive(Clone, Debug, PartialEq)]
struct Value {
    number: u32,
    live: bool,
}

impl Weighted for Value {
    fn live(&self) -> bool {
        self.live
    }
}

/// The tree and its plain twin, changed together and compared.
#[derive(Default)]
struct Both {
    tree: Tree<Value>,
    model: BTreeMap<Vec<u8>, Value>,
    number: u32,
}

impl Both {
    fn value(&mut self, live: bool) -> Value {
        self.number += 1;
        Value { number: self.number, live }
    }

    fn insert(&mut self, key: &[u8], live: bool) {
        let value = self.value(live);
        assert_eq!(self.tree.insert(key, value.clone()), self.model.insert(key.to_vec(), value));
    }

    fn remove(&mut self, key: &[u8]) {
        assert_eq!(self.tree.remove(key), self.model.remove(key));
    }

    /// Turns a live entry dead and the other way round.
    fn flip(&mut self, key: &[u8]) {
        let seen = self.tree.update(key, |found| {
            let seen = found.as_deref().cloned();
            if let Some(value) = found {
                value.live = !value.live;
            }
            (Edit::Keep, seen)
        });
        assert_eq!(seen.as_ref(), self.model.get(key));
        self.model.entry(key.to_vec()).and_modify(|value| value.live = !value.live);
        if seen.is_none() {
            self.model.remove(key);
        }
    }

    /// What a write and a compaction do in one descent each.
    fn set_or_take(&mut self, key: &[u8], set: bool) {
        let value = self.value(true);
        let edit = if set { Edit::Set(value.clone()) } else { Edit::Remove };
        let was = self.tree.update(key, |found| (edit, found.is_some()));
        let expected = if set { self.model.insert(key.to_vec(), value) } else { self.model.remove(key) };
        assert_eq!(was, expected.is_some());
    }

    fn compare(&self) {
        self.tree.check_invariants();
        assert_eq!(self.tree.len(), self.model.len());
        assert_eq!(self.tree.is_empty(), self.model.is_empty());
        assert_eq!(self.tree.live(), self.model.values().filter(|value| value.live).count());
        let ours = self.tree.range(b"", Bound::Unbounded);
        assert!(ours.map(|(key, value)| (key.to_vec(), value)).eq(self.model.iter().map(|(key, value)| (key.clone(), value))));
    }

    /// Compares everything that can be asked about a range; `from_back` says from which end to take each next entry.
    fn compare_range(&self, start: &[u8], end: Option<&[u8]>, mut from_back: impl FnMut() -> bool) {
        let bound = end.map_or(Bound::Unbounded, Bound::Before);
        let mut buf = vec![1, 2, 3];
        let empty = end.is_some_and(|end| end <= start);
        for behind in [false, true] {
            let low = if behind { Excluded(start) } else { Included(start) };
            let mut theirs = (!empty).then(|| self.model.range::<[u8], _>((low, end.map_or(Unbounded, Excluded))));
            let mut ours = if behind { self.tree.range_after(start, bound) } else { self.tree.range(start, bound) };
            loop {
                let back = from_back();
                let theirs = theirs.as_mut().and_then(|range| if back { range.next_back() } else { range.next() });
                let ours = if back { ours.next_back() } else { ours.next() };
                assert_eq!(ours.map(|(key, value)| (key.to_vec(), value)), theirs.map(|(key, value)| (key.clone(), value)));
                if let (Some((ours, _)), Some((theirs, _))) = (ours, theirs) {
                    assert_eq!((ours.len(), ours.is_empty()), (theirs.len(), theirs.is_empty()));
                    assert!(ours == **theirs && ours != [&theirs[..], b"x"].concat()[..], "{ours:?}");
                    ours.copy_to(&mut buf);
                    assert_eq!((ours.parts().0.len() + ours.parts().1.len(), &buf), (theirs.len(), theirs));
                }
                if theirs.is_none() {
                    break;
                }
            }
            assert!(ours.next().is_none() && ours.next_back().is_none());
        }
        let live: Vec<_> = self.model.range::<[u8], _>((Included(start), Unbounded)).filter(|(_, value)| value.live).collect();
        let within = if empty { 0 } else { live.iter().filter(|(key, _)| end.is_none_or(|end| key.as_slice() < end)).count() };
        assert_eq!(self.tree.count_live(start, bound), within);
        for skip in [0, within / 2, live.len().saturating_sub(1), live.len(), usize::MAX] {
            let ours = self.tree.nth_live(start, skip).map(|(key, value)| (key.to_vec(), value));
            assert_eq!(ours, live.get(skip).map(|(key, value)| (key.to_vec(), *value)));
        }
        assert_eq!(self.tree.get(start), self.model.get(start));
    }
}

/// xorshift64*: the long tests want one cheap fixed stream.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % sides
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Vec<u8>, bool),
    /// Many keys `prefix` + number, `step` apart.
    InsertRun(Vec<u8>, u16, u8),
    Remove(Vec<u8>),
    /// Everything from the first key up to the second.
    RemoveRange(Vec<u8>, Vec<u8>),
    Flip(Vec<u8>),
    FlipRange(Vec<u8>, Vec<u8>),
    SetOrTake(Vec<u8>, bool),
    Look(Vec<u8>, Option<Vec<u8>>, u64),
}

/// Keys that hurt: empty, runs of 0 and 0xff, heads that tie, long shared prefixes, rests too long for one leaf.
fn key() -> impl Strategy<Value = Vec<u8>> {
    let letters = || prop::sample::select(vec![0u8, 1, b'a', b'b', 0xff]);
    let name = |directory: &'static str| (0u32..400).prop_map(move |n| format!("{directory}{n}").into_bytes());
    prop_oneof![
        4 => prop::collection::vec(letters(), 0..5),
        2 => prop::collection::vec(letters(), 5..30),
        2 => (prop::sample::select(vec![0u8, 0xff]), 0usize..40).prop_map(|(byte, n)| vec![byte; n]),
        4 => name("/registry/pods/default/name-"),
        2 => name("/registry/pods/kube-system/name-"),
        2 => name("/registry/services/endpoints/default/a-service-with-a-long-name-"),
        2 => (letters(), 1usize..20_000, letters()).prop_map(|(a, n, b)| [vec![a], vec![b'x'; n], vec![b]].concat()),
        2 => (letters(), letters(), 5_000usize..9_000).prop_map(|(a, b, n)| [vec![a, b], vec![b'y'; n]].concat()),
        1 => (0u8..6, letters()).prop_map(|(n, a)| [vec![b'z'; 50_000 + usize::from(n)], vec![a]].concat()),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (key(), any::<bool>()).prop_map(|(key, live)| Op::Insert(key, live)),
        1 => (key(), 1u16..600, 1u8..20).prop_map(|(key, n, step)| Op::InsertRun(key, n, step)),
        5 => key().prop_map(Op::Remove),
        1 => (key(), key()).prop_map(|(a, b)| Op::RemoveRange(a, b)),
        3 => key().prop_map(Op::Flip),
        1 => (key(), key()).prop_map(|(a, b)| Op::FlipRange(a, b)),
        3 => (key(), any::<bool>()).prop_map(|(key, set)| Op::SetOrTake(key, set)),
        3 => (key(), prop::option::of(key()), any::<u64>()).prop_map(|(a, b, ends)| Op::Look(a, b, ends)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn does_what_a_btreemap_does(ops in prop::collection::vec(op(), 1..100)) {
        let mut both = Both::default();
        for op in ops {
            match op {
                Op::Insert(key, live) => both.insert(&key, live),
                Op::InsertRun(prefix, n, step) => {
                    for i in 0..n {
                        // Runs of long keys would only be slow.
                        let prefix = &prefix[..prefix.len().min(300)];
                        let number = usize::from(i) * usize::from(step) % usize::from(n);
                        both.insert(&[prefix, format!("{number:04}").as_bytes()].concat(), i % 3 > 0);
                    }
                }
                Op::Remove(key) => both.remove(&key),
                Op::RemoveRange(a, b) | Op::FlipRange(a, b) if a > b => {
                    let keys: Vec<_> = both.model.range(b..a).map(|(key, _)| key.clone()).collect();
                    keys.iter().for_each(|key| both.flip(key));
                }
                Op::RemoveRange(a, b) => {
                    let keys: Vec<_> = both.model.range(a..b).map(|(key, _)| key.clone()).collect();
                    keys.iter().for_each(|key| both.remove(key));
                }
                Op::Flip(key) => both.flip(&key),
                Op::FlipRange(a, b) => {
                    let keys: Vec<_> = both.model.range(a..b).map(|(key, _)| key.clone()).collect();
                    keys.iter().for_each(|key| both.flip(key));
                }
                Op::SetOrTake(key, set) => both.set_or_take(&key, set),
                Op::Look(start, end, mut ends) => both.compare_range(&start, end.as_deref(), || {
                    ends = ends.rotate_left(1);
                    ends & 1 == 1
                }),
            }
            both.tree.check_invariants();
        }
        both.compare();
        let keys: Vec<_> = both.model.keys().cloned().collect();
        for key in keys.iter().step_by(2).chain(keys.iter().skip(1).step_by(2)) {
            both.remove(key);
        }
        both.compare();
        prop_assert_eq!(both.tree.heap, 0);
    }

    #[test]
    fn a_key_in_two_parts_is_its_bytes(
        (a, cut_a) in (prop::collection::vec(0u8..2, 0..9), 0usize..9), (b, cut_b) in (prop::collection::vec(0u8..2, 0..9), 0usize..9)
    ) {
        let (a, b) = (&a[..], &b[..]);
        let in_parts = |(prefix, rest)| Parts { prefix, rest };
        let key_a = in_parts(a.split_at(cut_a.min(a.len())));
        let key_b = in_parts(b.split_at(cut_b.min(b.len())));
        prop_assert_eq!(key_a.to_vec(), a);
        prop_assert_eq!(key_a.len(), a.len());
        prop_assert_eq!(key_a.cmp_bytes(b), a.cmp(b));
        prop_assert_eq!(key_a.common(key_b), keys::common(a, b));
        if a < b {
            let between = separator(key_a, key_b);
            prop_assert!(*a < *between && *between <= *b);
            prop_assert!(between.len() <= 1 + keys::common(a, b));
        }
    }
}

#[test]
fn common_counts_across_blocks() {
    let a = [7u8; 200];
    for n in 0..200 {
        let mut b = a;
        b[n] = 8;
        assert_eq!(keys::common(&a, &b), n);
        assert_eq!(keys::common(&a, &b[..n]), n);
    }
    assert_eq!(keys::common(&a, &a), 200);
}

/// The example of the module head, as code.
#[test]
fn worked_example() {
    struct Revision {
        number: i64,
        deleted: bool,
    }
    impl Weighted for Revision {
        fn live(&self) -> bool {
            !self.deleted
        }
    }
    let mut index = Tree::new();
    for (number, key) in [(2, "pods/a"), (3, "pods/b"), (4, "services/a")] {
        index.insert(key.as_bytes(), Revision { number, deleted: false });
    }
    let previous = index.update(b"pods/a", |found| match found {
        Some(revision) => (Edit::Keep, Some(std::mem::replace(revision, Revision { number: 5, deleted: true }).number)),
        None => (Edit::Keep, None),
    });
    assert_eq!(previous, Some(2));
    assert_eq!((index.len(), index.live()), (3, 2));
    assert_eq!(index.count_live(b"pods/", Bound::Before(b"pods0")), 1);
    let step = |last: &[u8]| index.range_after(last, Bound::Unbounded).take(1).last().map(|(key, _)| key.to_vec());
    assert_eq!(step(b"pods/a").as_deref(), Some(&b"pods/b"[..]));
}

/// Large enough for three levels, in every order of filling and emptying.
#[test]
fn grows_and_shrinks_through_all_levels() {
    let n = 12_000usize;
    let name = |i: usize| format!("/registry/{}/ns-{}/name-{i}", ["pods", "leases", "events"][i % 3], i % 17).into_bytes();
    for (fill, drain) in [("up", "down"), ("down", "up"), ("any", "any"), ("any", "up"), ("up", "any")] {
        let mut dice = Dice(0xfeed);
        let mut order = |order: &str| {
            let mut keys: Vec<_> = (0..n).map(name).collect();
            match order {
                "up" => keys.sort(),
                "down" => keys.sort_by(|a, b| b.cmp(a)),
                _ => (1..n).for_each(|i| keys.swap(i, dice.roll(i + 1))),
            }
            keys
        };
        let (fill, drain) = (order(fill), order(drain));
        let mut both = Both::default();
        for (i, key) in fill.iter().enumerate() {
            both.insert(key, i % 5 > 0);
        }
        both.compare();
        assert!(both.tree.height >= 2, "height {}", both.tree.height);
        for (i, key) in drain.iter().enumerate() {
            match i % 4 {
                0 => both.flip(key),
                1 => both.set_or_take(key, false),
                _ => both.remove(key),
            }
            if i % 3000 == 0 {
                both.compare();
                both.compare_range(key, Some(&drain[n / 2]), || i % 2 == 0);
            }
        }
        both.compare();
        let rest: Vec<_> = both.model.keys().cloned().collect();
        rest.iter().for_each(|key| both.remove(key));
        both.compare();
        assert_eq!((both.tree.height, both.tree.heap), (0, 0));
    }
}

#[test]
fn keys_in_order_fill_their_leaves() {
    let n = 10_000usize;
    for descending in [false, true] {
        let mut tree = Tree::new();
        for i in 0..n {
            let i = if descending { n - i } else { i };
            tree.insert(format!("key-{i:08}").as_bytes(), Value { number: 0, live: true });
        }
        tree.check_invariants();
        let leaves = tree.leaves.used();
        assert!(leaves <= n / KEYS_MAX * 21 / 20, "{leaves} leaves for {n} keys");
    }
}

#[test]
fn an_entry_costs_twenty_bytes_beside_key_and_value() {
    struct Wide([u64; 6]);
    impl Weighted for Wide {
        fn live(&self) -> bool {
            self.0[0] > 0
        }
    }
    let (n, mut dice, mut tree) = (60_000usize, Dice(99), Tree::new());
    for _ in 0..n {
        let key: Vec<u8> = (0..32).map(|_| dice.roll(256) as u8).collect();
        tree.insert(&key, Wide([1; 6]));
    }
    let each = tree.heap_bytes() / n;
    assert!(each <= 32 + 48 + 20, "{each} bytes per entry");
}

#[test]
fn very_long_keys_work_and_are_stored_once() {
    let long = vec![b'k'; 1_500_000];
    let name = |i: u8| [&long[..], &[i]].concat();
    let mut both = Both::default();
    // More than a leaf of keys that differ only at the end; then some that would blow the shared prefix up.
    (0..70).for_each(|i| both.insert(&name(i), true));
    both.compare();
    for other in [&b""[..], b"a", b"z", &long[..7], &long, &[&long[..1000], b"z"].concat()] {
        both.insert(other, true);
        both.insert(&[other, &long].concat(), false);
    }
    both.compare();
    // Keys of 115 MB; only the few that stand alone in a leaf, prefixes and separators are there in full.
    let megabytes = both.tree.heap_bytes() / 1_000_000;
    assert!(megabytes < 40, "{megabytes} MB");
    both.compare_range(&name(33), Some(b"z"), || false);
    (0..70).for_each(|i| both.remove(&name(i)));
    both.compare();
}

#[test]
fn a_walk_goes_on_while_the_tree_changes() {
    let mut both = Both::default();
    let name = |i: usize| format!("key-{i:05}").into_bytes();
    (0..5000).for_each(|i| both.insert(&name(i), true));
    let (mut last, mut seen, mut next_victim) = (None::<Vec<u8>>, Vec::new(), 1);
    loop {
        let before = seen.len();
        let mut step = match &last {
            None => both.tree.range(b"", Bound::Unbounded),
            Some(last) => both.tree.range_after(last, Bound::Unbounded),
        };
        seen.extend(step.by_ref().take(100).map(|(key, _)| key.to_vec()));
        if seen.len() == before {
            break;
        }
        last = seen.last().cloned();
        // Between the steps entries go, before, at and behind the place where the walk stands; new ones come.
        for _ in 0..150 {
            both.remove(&name(next_victim));
            next_victim += 2;
        }
        both.insert(format!("key-{:05}-new", seen.len()).as_bytes(), true);
    }
    assert!(seen.is_sorted_by(|a, b| a < b));
    // What was there all the time was seen.
    assert!((0..5000).step_by(2).all(|i| seen.binary_search(&name(i)).is_ok()));
}

#[test]
fn ranges_that_end_before_they_start_are_empty() {
    let mut both = Both::default();
    (0..300).for_each(|i| both.insert(format!("{i:03}").as_bytes(), true));
    for (start, end) in [("200", "100"), ("200", "200"), ("100", ""), ("", ""), ("4", "3"), ("0640", "064")] {
        both.compare_range(start.as_bytes(), Some(end.as_bytes()), || false);
        assert_eq!(both.tree.count_live(start.as_bytes(), Bound::Before(end.as_bytes())), 0);
    }
}

#[test]
fn the_tree_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>(_: &T) {}
    shared(&Tree::<Value>::new());
}
