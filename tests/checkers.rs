//! The judges' own tests: histories that are right, histories that are wrong, and right ones made wrong at random.

#[path = "checkers/mod.rs"]
mod checkers;

use std::collections::BTreeMap;

use checkers::history::{Answer, Change, Item, Key, Op, Outcome, Request};
use checkers::kv;
use checkers::linear::{Timed, linearize};
use checkers::log::{self, Hash, Log, check_hashes};
use checkers::watch::{self, Event, Scope, Told, next_revision};
use rand::prelude::*;
use rand::rngs::StdRng;

// ---- The search, on a register without revisions

#[derive(Clone, Debug)]
enum Register {
    Write(u32),
    Read(u32),
}

use Register::{Read, Write};

fn is_linearizable(history: &[(u64, Option<u64>, Register)]) -> bool {
    let history: Vec<_> = history.iter().map(|(call, end, op)| Timed { call: *call, end: *end, op: op.clone() }).collect();
    linearize(0, &history, |state, op| match op {
        Write(value) => Some(*value),
        Read(value) => (state == value).then_some(*state),
    })
    .is_ok()
}

#[test]
fn a_register() {
    let right: &[&[(u64, Option<u64>, Register)]] = &[
        &[],
        &[(0, Some(1), Read(0))],
        // Concurrent with the write, either is fine, but not the old after the new.
        &[(0, Some(9), Write(1)), (1, Some(2), Read(0)), (3, Some(4), Read(1))],
        &[(0, Some(9), Write(1)), (1, Some(9), Write(2)), (10, Some(11), Read(1)), (12, Some(13), Read(1))],
        // Never answered: it may come late, or never.
        &[(0, None, Write(1)), (1, Some(2), Read(0)), (3, Some(4), Read(1))],
        &[(0, None, Write(1)), (1, Some(2), Write(2)), (3, Some(4), Read(2)), (5, Some(6), Read(1)), (7, None, Read(5))],
        &[(0, None, Write(1)), (1, Some(2), Read(0))],
        // Equal times are concurrent.
        &[(0, Some(1), Write(1)), (1, Some(2), Read(0))],
    ];
    for history in right {
        assert!(is_linearizable(history), "{history:?}");
    }
    let wrong: &[&[(u64, Option<u64>, Register)]] = &[
        &[(0, Some(1), Read(7))],
        &[(0, Some(1), Write(1)), (2, Some(3), Read(0))],
        &[(0, Some(9), Write(1)), (1, Some(2), Read(1)), (3, Some(4), Read(0))],
        &[(0, Some(9), Write(1)), (1, Some(9), Write(2)), (10, Some(11), Read(1)), (12, Some(13), Read(2))],
        // It was sent after the read had ended.
        &[(0, Some(1), Read(1)), (2, None, Write(1))],
        // It comes once.
        &[(0, None, Write(1)), (1, Some(2), Read(1)), (3, Some(4), Write(2)), (5, Some(6), Read(1))],
    ];
    for history in wrong {
        assert!(!is_linearizable(history), "{history:?}");
    }
}

/// Against the plainest check there is: all orders.
#[test]
fn small_random_histories_as_all_orders_say() {
    fn any_order(left: &mut Vec<(u64, Option<u64>, Register)>, state: u32) -> bool {
        if left.iter().all(|(_, end, _)| end.is_none()) {
            return true;
        }
        let first_end = left.iter().filter_map(|(_, end, _)| *end).min().unwrap_or(u64::MAX);
        (0..left.len()).any(|at| {
            let (call, _, op) = &left[at];
            let next = match op {
                Write(value) => *value,
                Read(value) if *value == state => state,
                Read(_) => return false,
            };
            if *call > first_end {
                return false;
            }
            let taken = left.swap_remove(at);
            let found = any_order(left, next);
            left.push(taken);
            let last = left.len() - 1;
            left.swap(at, last);
            found
        })
    }
    let (mut rng, mut right) = (StdRng::seed_from_u64(1), 0);
    for _ in 0..20_000 {
        let mut history = Vec::new();
        for _ in 0..rng.random_range(1..7) {
            let call = rng.random_range(0..12);
            let end = rng.random_ratio(5, 6).then(|| call + rng.random_range(0..6));
            let op = if rng.random() { Write(rng.random_range(0..3)) } else { Read(rng.random_range(0..3)) };
            history.push((call, end, op));
        }
        let expected = any_order(&mut history.clone(), 0);
        assert_eq!(is_linearizable(&history), expected, "{history:?}");
        right += u32::from(expected);
    }
    assert!((5_000..15_000).contains(&right), "{right} of 20000 are right: the test looks at one side only");
}

// ---- Histories of a store

/// A store that does everything at one moment, and clients that do not know when that was.
struct World {
    log: Log,
    items: BTreeMap<Key, Item>,
    ops: Vec<Op>,
}

fn carry_out(world: &mut World, request: &Request) -> Answer {
    let holds = |(key, expected): &(Key, i64)| world.items.get(key).map_or(0, |item| item.modified) == *expected;
    let applied = request.guard.as_ref().is_none_or(holds);
    let mut changes = Vec::new();
    if applied {
        changes = request.writes.iter().filter(|write| write.value.is_some() || world.items.contains_key(&write.key)).cloned().collect();
    }
    if !changes.is_empty() {
        world.log.end += 1;
        log::apply(&mut world.items, world.log.end, &changes);
        world.log.revisions.insert(world.log.end, changes.clone());
    }
    let deleted = changes.iter().filter(|change| change.value.is_none()).count() as i64;
    let items = if request.at > 0 { &world.log.at(request.at) } else { &world.items };
    let found = request.reads.iter().map(|key| items.get(key).copied()).collect();
    let within = |(from, to): &(Key, Key)| items.range(from.clone()..to.clone()).map(|(key, item)| (key.clone(), *item)).collect();
    let span = request.span.as_ref().map(within).unwrap_or_default();
    Answer { revision: world.log.end, applied, deleted, found, span }
}

fn world(rng: &mut StdRng) -> World {
    let start: BTreeMap<Key, Item> = [("a".to_owned(), Item { value: 1, modified: 4, created: 3, version: 2 })].into();
    let log = Log { base: 5, start: start.clone(), revisions: BTreeMap::new(), end: 5 };
    let mut world = World { log, items: start, ops: Vec::new() };
    let clients = rng.random_range(1..6);
    // Each client's next moment: of its request's call, effect and end.
    let mut busy: Vec<(u64, u64, u64)> = (0..clients).map(|_| (rng.random_range(0..10), 0, 0)).collect();
    let mut effects: Vec<(u64, usize)> = Vec::new();
    let mut sent: Vec<(u64, usize)> = Vec::new();
    for value in 0..rng.random_range(5..60) {
        let client = rng.random_range(0..clients);
        let call = busy[client].0;
        let effect = call + rng.random_range(0..10);
        let end = effect + rng.random_range(0..10);
        busy[client].0 = end + rng.random_range(1..5);
        let place = world.ops.len();
        sent.push((call, place));
        // The request is chosen when it takes effect below; here it is a promise.
        let outcome = if rng.random_ratio(1, 8) {
            Outcome::Unknown
        } else {
            Outcome::Answered { at: end, answer: Answer { applied: true, ..Answer::default() } }
        };
        let late = if outcome == Outcome::Unknown { rng.random_range(0..100) } else { 0 };
        if late < 60 {
            effects.push((effect + late, place));
        }
        let request = Request::put("", 100 + value);
        world.ops.push(Op { client, member: client % 3, start: 0, call, request, outcome });
    }
    effects.sort_unstable();
    for place in 0..world.ops.len() {
        let key = *["a", "b", "c", "d"].choose(rng).unwrap();
        let value = 100 + place as u64;
        let request = match rng.random_range(0..9) {
            8 => Request { span: Some(("b".into(), "d".into())), ..Request::default() },
            0 | 1 => Request::put(key, value),
            2 => Request::delete(key),
            3 | 4 => Request::get(key),
            5 => Request { reads: vec!["c".into(), "d".into()], ..Request::default() },
            6 => Request { writes: ["c", "d"].map(|key| Change { key: key.into(), value: Some(value) }).into(), ..Request::default() },
            _ => Request::swap(key, 0, value),
        };
        world.ops[place].request = request;
    }
    for (_, place) in effects {
        let mut request = world.ops[place].request.clone();
        if let Some((key, modified)) = &mut request.guard {
            // Half of the swaps know what they swap.
            if rng.random() {
                *modified = world.items.get(key).map_or(0, |item| item.modified);
            }
        }
        if request.reads.len() == 1 && request.writes.is_empty() && rng.random_ratio(1, 3) {
            request.at = rng.random_range(world.log.base..=world.log.end);
        }
        world.ops[place].request = request.clone();
        let told = carry_out(&mut world, &request);
        if let Outcome::Answered { answer, .. } = &mut world.ops[place].outcome {
            *answer = told;
        }
    }
    world
}

/// What both judges say.
fn both(world: &World) -> (Vec<String>, Vec<String>) {
    let verdict = log::judge(&world.log, &world.ops);
    let searched = kv::check(&world.ops, world.log.base, &world.log.start, Some(&verdict.effects));
    (verdict.wrong, searched)
}

#[test]
fn right_histories_are_accepted() {
    for seed in 0..2_000 {
        let world = world(&mut StdRng::seed_from_u64(seed));
        let (judged, searched) = both(&world);
        assert!(judged.is_empty() && searched.is_empty(), "seed {seed}\n{judged:#?}\n{searched:#?}\n{:#?}\n{:#?}", world.log, world.ops);
        // Without knowing what became of those without an answer the search has to find it out.
        let unknowing = kv::check(&world.ops, world.log.base, &world.log.start, None);
        assert!(unknowing.is_empty(), "seed {seed}\n{unknowing:#?}\n{:#?}\n{:#?}", world.log, world.ops);
    }
}

/// Makes a history wrong. False when this history has nothing that can be made wrong in this way.
type Wrong = fn(&mut World, &mut StdRng) -> bool;

/// The operations of which something holds, and their answers.
fn pick(world: &World, rng: &mut StdRng, what: impl Fn(&Op, &Answer) -> bool) -> Option<usize> {
    let fits = |(_, op): &(usize, &Op)| op.answer().is_some_and(|(_, answer)| what(op, answer));
    world.ops.iter().enumerate().filter(fits).map(|(place, _)| place).choose(rng)
}

/// The same, of those that ask for what keys hold at that moment: what the search looks at.
fn pick_plain(world: &World, rng: &mut StdRng, what: impl Fn(&Op, &Answer) -> bool) -> Option<usize> {
    pick(world, rng, |op, answer| op.request.at == 0 && op.request.span.is_none() && what(op, answer))
}

fn answer(world: &mut World, place: usize) -> &mut Answer {
    match &mut world.ops[place].outcome {
        Outcome::Answered { answer, .. } => answer,
        other => panic!("{:?}", matches!(other, Outcome::Unknown)),
    }
}

/// Wrongs, and whether the search without the log can see them.
const WRONGS: &[(&str, bool, Wrong)] = &[
    ("a value that nobody wrote", true, |world, rng| {
        let Some(place) = pick_plain(world, rng, |_, answer| answer.found.iter().any(Option::is_some)) else { return false };
        answer(world, place).found.iter_mut().flatten().for_each(|item| item.value = 7);
        true
    }),
    ("a stale read", true, |world, rng| {
        // What the store held before the newest change that was answered before the read was sent.
        let Some(place) = pick_plain(world, rng, |op, _| op.request.writes.is_empty()) else { return false };
        let call = world.ops[place].call;
        let (reads, mut items, mut seen) = (world.ops[place].request.reads.clone(), world.log.start.clone(), world.log.base);
        for (at, answer) in world.ops.iter().filter_map(Op::answer) {
            if at < call {
                seen = seen.max(answer.revision);
            }
        }
        if seen == world.log.base {
            return false;
        }
        for (revision, changes) in world.log.revisions.range(..seen) {
            log::apply(&mut items, *revision, changes);
        }
        let revision = seen - 1;
        let found = reads.iter().map(|key| items.get(key).copied()).collect();
        // Revisions are the whole store's: one key by itself may not show it.
        let same_keys = |(at, (op, answer)): (u64, (&Op, &Answer))| {
            at < call && answer.revision > revision && op.request.at == 0 && op.request.keys().any(|key| reads.contains(key))
        };
        if !world.ops.iter().any(|op| op.answer().is_some_and(|(at, answer)| same_keys((at, (op, answer))))) {
            return false;
        }
        *answer(world, place) = Answer { revision, found, ..answer(world, place).clone() };
        true
    }),
    ("a lost write", false, |world, rng| {
        let Some((revision, _)) = world.log.revisions.iter().choose(rng).map(|(revision, changes)| (*revision, changes.clone())) else {
            return false;
        };
        // One that was acknowledged: it is gone from the log, and what comes after it moves up.
        if pick(world, rng, |op, answer| op.request.mark().is_some() && answer.applied && answer.revision == revision).is_none() {
            return false;
        }
        world.log.revisions = world
            .log
            .revisions
            .iter()
            .filter(|(at, _)| **at != revision)
            .map(|(at, changes)| (at - i64::from(*at > revision), changes.clone()))
            .collect();
        world.log.end -= 1;
        true
    }),
    ("a write done twice", false, |world, rng| {
        let Some(changes) = world.log.revisions.values().filter(|changes| changes[0].value.is_some()).choose(rng).cloned() else {
            return false;
        };
        world.log.end += 1;
        world.log.revisions.insert(world.log.end, changes);
        true
    }),
    ("a write that nobody asked for", false, |world, _| {
        world.log.end += 1;
        world.log.revisions.insert(world.log.end, vec![Change { key: "a".into(), value: Some(7) }]);
        true
    }),
    ("a write before its time", true, |world, rng| {
        // Two writes to one key, one after the other, with their revisions exchanged.
        let writes = |op: &Op, answer: &Answer| op.request.guard.is_none() && op.request.mark().is_some() && answer.applied;
        let Some(first) = pick(world, rng, writes) else { return false };
        let (end, key) = (world.ops[first].answer().unwrap().0, world.ops[first].request.writes[0].key.clone());
        let Some(second) = pick(world, rng, |op, answer| writes(op, answer) && op.call > end && op.request.writes[0].key == key) else {
            return false;
        };
        let revisions = [answer(world, first).revision, answer(world, second).revision];
        (answer(world, second).revision, answer(world, first).revision) = (revisions[0], revisions[1]);
        true
    }),
    ("half of a transaction", true, |world, rng| {
        let Some(place) = pick(world, rng, |op, answer| {
            op.request.reads.len() == 2 && matches!(&answer.found[..], [Some(c), Some(d)] if c.modified == d.modified && c.value == d.value)
        }) else {
            return false;
        };
        answer(world, place).found[1] = None;
        true
    }),
    ("a guard that held after all", true, |world, rng| {
        let Some(place) = pick(world, rng, |op, answer| op.request.guard.is_some() && !answer.applied) else { return false };
        answer(world, place).applied = true;
        true
    }),
    ("a guard that is said not to have held", true, |world, rng| {
        let Some(place) = pick(world, rng, |op, answer| op.request.guard.is_some() && answer.applied) else { return false };
        answer(world, place).applied = false;
        true
    }),
    ("a refusal of what was done", false, |world, rng| {
        let Some(place) = pick(world, rng, |op, answer| op.request.mark().is_some() && answer.applied) else { return false };
        world.ops[place].outcome = Outcome::Refused;
        true
    }),
    ("a delete that found nothing, they say", true, |world, rng| {
        let Some(place) = pick(world, rng, |_, answer| answer.deleted > 0) else { return false };
        // Another delete of the key that was never answered could have been the one.
        let writes = world.ops[place].request.writes.clone();
        if world.ops.iter().any(|op| op.outcome == Outcome::Unknown && op.request.writes == writes) {
            return false;
        }
        answer(world, place).deleted = 0;
        true
    }),
    ("another version", false, |world, rng| {
        let Some(place) = pick(world, rng, |_, answer| answer.found.iter().any(Option::is_some)) else { return false };
        answer(world, place).found.iter_mut().flatten().for_each(|item| item.version += 1);
        true
    }),
    ("another creation", false, |world, rng| {
        let Some(place) = pick(world, rng, |_, answer| answer.found.iter().any(Option::is_some)) else { return false };
        answer(world, place).found.iter_mut().flatten().for_each(|item| item.created -= 1);
        true
    }),
    ("a span without one of its keys", false, |world, rng| {
        let Some(place) = pick(world, rng, |_, answer| !answer.span.is_empty()) else { return false };
        answer(world, place).span.pop();
        true
    }),
    ("a span with a key from elsewhere", false, |world, rng| {
        let Some(place) = pick(world, rng, |op, _| op.request.span.is_some()) else { return false };
        answer(world, place).span.push(("d".into(), Item { value: 1, modified: 1, created: 1, version: 1 }));
        true
    }),
    ("what is there now, though an earlier revision was asked for", false, |world, rng| {
        let now =
            |world: &World, op: &Op| world.log.at(op.answer().map_or(0, |(_, answer)| answer.revision)).get(&op.request.reads[0]).copied();
        let Some(place) = pick(world, rng, |op, answer| op.request.at > 0 && answer.found != [now(world, op)]) else { return false };
        let found = now(world, &world.ops[place]);
        answer(world, place).found = vec![found];
        true
    }),
    ("another modification revision", true, |world, rng| {
        let Some(place) = pick_plain(world, rng, |_, answer| answer.found.iter().any(Option::is_some)) else { return false };
        let by = *[-1, 1].choose(rng).unwrap();
        answer(world, place).found.iter_mut().flatten().for_each(|item| item.modified += by);
        true
    }),
];

#[test]
fn histories_made_wrong_are_refused() {
    let mut tried: BTreeMap<&str, u32> = BTreeMap::new();
    for seed in 0..1_000 {
        for (name, by_search, wrong) in WRONGS {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut world = world(&mut rng);
            if !wrong(&mut world, &mut rng) {
                continue;
            }
            *tried.entry(name).or_default() += 1;
            let (judged, searched) = both(&world);
            assert!(!judged.is_empty(), "{name}, seed {seed}: not seen by the log\n{:#?}\n{:#?}", world.log, world.ops);
            assert!(!by_search || !searched.is_empty(), "{name}, seed {seed}: not seen by the search\n{:#?}\n{:#?}", world.log, world.ops);
        }
    }
    for (name, _, _) in WRONGS {
        assert!(tried.get(name).is_some_and(|times| *times > 100), "{name}: {tried:?}");
    }
}

/// A member that goes back, though each of its answers is true of some moment.
#[test]
fn a_member_that_goes_back_is_seen() {
    let peek = |call, revision, start| Op {
        client: 0,
        member: 1,
        start,
        call,
        request: Request { serializable: true, ..Request::get("a") },
        outcome: Outcome::Answered { at: call + 1, answer: Answer { revision, applied: true, found: vec![None], ..Answer::default() } },
    };
    let change = |value| vec![Change { key: "b".into(), value: Some(value) }];
    let log = Log { base: 1, start: BTreeMap::new(), revisions: [(2, change(1)), (3, change(2))].into(), end: 3 };
    let lost = [1, 2].map(|value| Op { outcome: Outcome::Unknown, request: Request::put("b", value), ..peek(0, 0, 0) });
    let judged = |ops: &[Op]| log::judge(&log, &[&lost, ops].concat()).wrong;
    assert_eq!(judged(&[peek(5, 2, 0), peek(7, 2, 0), peek(9, 3, 0)]), Vec::<String>::new());
    // After a new start it may be behind what it was.
    assert_eq!(judged(&[peek(5, 3, 0), peek(7, 2, 1)]), Vec::<String>::new());
    assert_eq!(judged(&[peek(5, 3, 0), peek(7, 2, 0)]).len(), 1);
}

#[test]
fn hashes() {
    let hash = |revision, compacted, hash| Hash { revision, compacted, hash };
    assert!(check_hashes(&[(0, hash(9, 1, 5)), (1, hash(9, 1, 5)), (2, hash(9, 1, 5))]).is_empty());
    assert!(check_hashes(&[(0, hash(9, 1, 5)), (1, hash(8, 1, 6)), (2, hash(9, 2, 7))]).is_empty());
    assert_eq!(check_hashes(&[(0, hash(9, 1, 5)), (1, hash(9, 1, 5)), (2, hash(9, 1, 6))]).len(), 2);
}

// ---- Watches

/// A log, and a watcher that is told all of it that it asks for, in answers of one or more revisions, with bookmarks and broken streams.
fn watched(rng: &mut StdRng, scope: Scope) -> (Log, Vec<Told>) {
    let start: BTreeMap<Key, Item> = [("b".to_owned(), Item { value: 1, modified: 4, created: 3, version: 2 })].into();
    let mut log = Log { base: 5, start, end: 5, ..Log::default() };
    let mut items = log.start.clone();
    let mut all: BTreeMap<i64, Vec<Event>> = BTreeMap::new();
    for value in 0..rng.random_range(4..30) {
        log.end += 1;
        let keys: &[&str] = if rng.random_ratio(1, 3) { &["a", "b"] } else { &["a"] };
        let value = rng.random_ratio(3, 4).then_some(value);
        let changes: Vec<Change> = keys.iter().map(|key| Change { key: (*key).into(), value }).collect();
        for change in &changes {
            let before = items.get(&change.key).copied();
            let (mut created, mut version) = (0, 0);
            if value.is_some() {
                (created, version) = before.map_or((log.end, 1), |before| (before.created, before.version + 1));
            }
            let event = Event { revision: log.end, change: change.clone(), created, version, before };
            if scope.concerns(change) {
                all.entry(log.end).or_default().push(event);
            }
        }
        log::apply(&mut items, log.end, &changes);
        log.revisions.insert(log.end, changes);
    }
    let mut told = vec![Told::Opened(6)];
    let mut next = 6;
    while next <= log.end {
        match rng.random_range(0..6) {
            0 => told.push(Told::Progress(next - 1)),
            1 => told.push(Told::Opened(next_revision(&told, 6))),
            _ => {
                let last = (next + rng.random_range(0..3)).min(log.end);
                let events: Vec<Event> = all.range(next..=last).flat_map(|(_, events)| events.clone()).collect();
                if !events.is_empty() {
                    told.push(Told::Events(log.end, events));
                }
                next = last + 1;
            }
        }
    }
    told.push(Told::Progress(log.end));
    (log, told)
}

#[test]
fn watchers_made_wrong_are_refused() {
    const WRONGS: [&str; 10] = [
        "an answer lost",
        "an answer twice",
        "two answers exchanged",
        "an event lost",
        "cut in two",
        "bookmark ahead",
        "another value",
        "another version",
        "another creation",
        "nothing before it",
    ];
    let mut tried: BTreeMap<&str, u32> = BTreeMap::new();
    for seed in 0..4_000 {
        let scope = [Scope::All, Scope::Key("b"), Scope::Prefix("a"), Scope::Deletions("")][seed as usize % 4];
        let (log, told) = watched(&mut StdRng::seed_from_u64(seed), scope);
        assert_eq!(watch::check(&told, &log, 6, scope), Vec::<String>::new(), "seed {seed}: {told:#?} {log:#?}");
        assert_eq!(next_revision(&told, 6), log.end + 1);
        let with_events: Vec<usize> = (0..told.len()).filter(|at| matches!(told[*at], Told::Events(..))).collect();
        for name in WRONGS {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut wrong = told.clone();
            let Some(&at) = with_events.choose(&mut rng) else { continue };
            let Told::Events(header, mut events) = told[at].clone() else { panic!("chosen above") };
            match name {
                "an answer lost" => drop(wrong.remove(at)),
                "an answer twice" => wrong.insert(at, told[at].clone()),
                "two answers exchanged" => match with_events.iter().find(|other| **other > at) {
                    Some(other) => wrong.swap(at, *other),
                    None => continue,
                },
                "cut in two" => {
                    let Some(cut) = (1..events.len()).find(|cut| events[cut - 1].revision == events[*cut].revision) else { continue };
                    wrong[at] = Told::Events(header, events[..cut].to_vec());
                    wrong.insert(at + 1, Told::Events(header, events[cut..].to_vec()));
                }
                "bookmark ahead" => wrong.insert(at, Told::Progress(events[0].revision)),
                _ => {
                    match name {
                        "an event lost" => drop(events.remove(rng.random_range(0..events.len()))),
                        "another version" => events[0].version += 1,
                        "another creation" => events[0].created -= 1,
                        "nothing before it" if events[0].before.is_none() => continue,
                        "nothing before it" => events[0].before = None,
                        _ => events[0].change.value = Some(1_000),
                    }
                    wrong[at] = Told::Events(header, events);
                }
            }
            *tried.entry(name).or_default() += 1;
            // Whoever lost events asks for what it lacks, so that streams opened later are no proof.
            let found = watch::check(&wrong, &log, 6, scope);
            assert!(found.iter().any(|wrong| !wrong.contains("fix the test")), "{name}, seed {seed}: {wrong:#?} {log:#?}");
        }
    }
    assert!(tried.len() == WRONGS.len() && tried.values().all(|times| *times > 300), "{tried:?}");
}
