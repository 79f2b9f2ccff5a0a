//! What a store ought to hold: requests, what each of them changes, and the state that results. Pure: no member, no clock.
//!
//! ```text
//! state { a: version 1 }   + Put { a }        at revision 7  ->  [Put a, version 2, modified 7]
//!                          + Delete { b }     at revision 7  ->  []    nothing there: no revision is used
//! ```

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

/// A key or a value; printed short, as values may be large.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Text(pub Bytes);

impl Text {
    pub fn new(text: impl Into<Vec<u8>>) -> Text {
        Text(Bytes::from(text.into()))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 24;
        let start = String::from_utf8_lossy(&self.0[..self.0.len().min(SHOWN)]);
        if self.0.len() > SHOWN { write!(f, "{start}...({} bytes)", self.0.len()) } else { write!(f, "{start}") }
    }
}

/// What is stored with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub created: i64,
    pub modified: i64,
    pub version: i64,
    pub lease: i64,
    pub value: Text,
}

/// One change of one key, as a watcher is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put(Text, Item),
    Delete(Text),
}

/// A request that changes something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Put {
        key: Text,
        value: Text,
        lease: i64,
    },
    /// The keys from `key` to before `end`; the one key when `end` is empty.
    Delete {
        key: Text,
        end: Text,
    },
    /// `then` if `key` has this version, else `otherwise`: Put and Delete only, and no key twice.
    Txn {
        key: Text,
        version: i64,
        then: Vec<Op>,
        otherwise: Vec<Op>,
    },
    Grant {
        id: i64,
        ttl: i64,
    },
    Revoke {
        id: i64,
    },
    Compact {
        revision: i64,
    },
}

/// What a member says to a request that it has carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub revision: i64,
    /// Keys deleted by a Delete; otherwise 0.
    pub deleted: i64,
    /// Whether a Txn took its first branch; otherwise true.
    pub succeeded: bool,
}

/// The keys and the leases (id -> TTL in seconds) of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub items: BTreeMap<Text, Item>,
    pub leases: BTreeMap<i64, i64>,
}

impl State {
    fn version(&self, key: &Text) -> i64 {
        self.items.get(key).map_or(0, |item| item.version)
    }

    fn keys(&self, key: &Text, end: &Text) -> Vec<Text> {
        if end.0.is_empty() {
            return self.items.get_key_value(key).map(|(key, _)| key.clone()).into_iter().collect();
        }
        self.items.range(key.clone()..end.clone()).map(|(key, _)| key.clone()).collect()
    }

    /// The keys that a lease holds, in order.
    pub fn attached(&self, lease: i64) -> Vec<Text> {
        self.items.iter().filter(|(_, item)| item.lease == lease).map(|(key, _)| key.clone()).collect()
    }

    /// The branch that a Txn takes now.
    pub fn succeeds(&self, op: &Op) -> bool {
        if let Op::Txn { key, version, .. } = op { self.version(key) == *version } else { true }
    }

    /// What `op` changes if it gets this revision. Nothing means that it uses none.
    pub fn effects(&self, op: &Op, revision: i64) -> Vec<Event> {
        match op {
            Op::Put { key, value, lease } => {
                let created = self.items.get(key).map_or(revision, |item| item.created);
                let item = Item { created, modified: revision, version: self.version(key) + 1, lease: *lease, value: value.clone() };
                vec![Event::Put(key.clone(), item)]
            }
            Op::Delete { key, end } => self.keys(key, end).into_iter().map(Event::Delete).collect(),
            Op::Txn { then, otherwise, .. } => {
                // The operations of a branch touch different keys, so that none sees what another does.
                let branch = if self.succeeds(op) { then } else { otherwise };
                branch.iter().flat_map(|op| self.effects(op, revision)).collect()
            }
            Op::Revoke { id } => self.attached(*id).into_iter().map(Event::Delete).collect(),
            Op::Grant { .. } | Op::Compact { .. } => Vec::new(),
        }
    }

    pub fn absorb(&mut self, events: &[Event]) {
        for event in events {
            match event {
                Event::Put(key, item) => {
                    self.items.insert(key.clone(), item.clone());
                }
                Event::Delete(key) => {
                    self.items.remove(key);
                }
            }
        }
    }

    /// What `op` does to the leases themselves.
    pub fn absorb_lease(&mut self, op: &Op) {
        match op {
            Op::Grant { id, ttl } => {
                self.leases.insert(*id, *ttl);
            }
            Op::Revoke { id } => {
                self.leases.remove(id);
            }
            _ => {}
        }
    }

    /// Only what belongs to one writer: its keys and its leases.
    pub fn part(&self, prefix: &str, owns: impl Fn(i64) -> bool) -> State {
        let items = self.items.iter().filter(|(key, _)| key.0.starts_with(prefix.as_bytes()));
        let leases = self.leases.iter().filter(|(id, _)| owns(**id));
        State { items: items.map(|(k, v)| (k.clone(), v.clone())).collect(), leases: leases.map(|(k, v)| (*k, *v)).collect() }
    }
}

#[test]
fn a_store_in_small() {
    let put = |key: &str| Op::Put { key: Text::new(key), value: Text::new("v"), lease: 0 };
    let mut state = State::default();
    for (revision, key) in [(2, "a"), (3, "b"), (4, "a")] {
        let events = state.effects(&put(key), revision);
        state.absorb(&events);
    }
    assert_eq!((state.version(&Text::new("a")), state.items[&Text::new("a")].created), (2, 2));
    let txn = Op::Txn {
        key: Text::new("a"),
        version: 2,
        then: vec![put("c"), Op::Delete { key: Text::new("a"), end: Text::new("b") }],
        otherwise: vec![],
    };
    let events = state.effects(&txn, 5);
    assert!(matches!(&events[..], [Event::Put(c, _), Event::Delete(a)] if c.0 == "c" && a.0 == "a"), "{events:?}");
    state.absorb(&events);
    assert!(!state.succeeds(&txn) && state.effects(&txn, 6).is_empty());
}
