//! Random requests to real etcd and to the member under test, one by one: every field of every answer, every error code
//! and text, and every watch event must be the same.
//!
//! `QUORATE_DIFF_SEEDS` (2) and `QUORATE_DIFF_OPS` (3000) say how much; `QUORATE_DIFF_SEED` runs one seed only. A
//! failure prints the seed, the number of the operation, the request, both answers and how to have it again; with
//! `QUORATE_DIFF_STOP_AT` above 1 the test goes on until so many differences have been found.
//!
//! What is normalised is said in `common/render.rs` (ids, terms, order where etcd has none) and in
//! `common/generate.rs` (requests left out). Three more things depend on the moment, not on the member:
//!
//! - How a watch's events are cut into answers. Compared is the sequence of events of each watch; that no revision is
//!   cut in two is checked for each member by itself.
//! - Whether etcd's first answer of a watch has the earlier values that were asked for: it notes the wish after it has
//!   created the watch, and what it sends in between is without them. Where that shows, they are not compared.
//! - What a compaction in the background has not removed yet. After every accepted one the test sends a second,
//!   `physical` one to the same revision, which both members answer when the first has finished.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use common::generate::{Generator, KEYS, Known, LEASES, Op, STREAMS, has_open_delete, has_put};
use common::pb::watch_request::RequestUnion;
use common::pb::*;
use common::watch::{WatchStream, is_progress};
use common::{Clients, Kind, Process, render};

/// A watch that every stream has all the time: progress is answered only where there is one.
const SENTINEL: i64 = 1_000_000;

/// The key that is written to reach a revision.
const FILLER: &[u8] = b"filler";

/// One of the two members, with what the test holds open on it.
struct Side {
    process: Process,
    clients: Clients,
    streams: Vec<WatchStream>,
    /// The newest revision that each watch has been sent, by stream and id, and whether more of it is to come.
    newest: [BTreeMap<i64, (i64, bool)>; STREAMS],
    /// The watches, by stream and id, that asked for earlier values and have not been sent an event yet.
    fresh: BTreeSet<(usize, i64)>,
}

/// How many events came in the first answer of a watch, by stream and id, where that answer lacks its earlier values.
type Silent = BTreeMap<(usize, i64), usize>;

impl Side {
    async fn start(kind: Kind) -> Side {
        let process = Process::start(kind, &[]).await;
        let clients = process.clients().await;
        let mut side = Side { process, clients, streams: Vec::new(), newest: Default::default(), fresh: BTreeSet::new() };
        for _ in 0..STREAMS {
            let stream = side.open().await;
            side.streams.push(stream);
        }
        side
    }

    async fn open(&self) -> WatchStream {
        let mut stream = WatchStream::open(&self.clients.watch).await;
        let sentinel = WatchCreateRequest { key: "sentinel".into(), watch_id: SENTINEL, ..Default::default() };
        stream.create(sentinel).await;
        stream.seen.clear();
        stream
    }

    /// Sends a request and returns its outcome, printed.
    async fn run(&mut self, op: &Op) -> String {
        let Clients { kv, lease, maintenance, cluster, .. } = &mut self.clients;
        use render::outcome;
        match op.clone() {
            Op::Put(r) => outcome(kv.put(r).await, render::put),
            Op::Range(r) => outcome(kv.range(r.clone()).await, |a| render::range(a, &r)),
            Op::Delete(r) => outcome(kv.delete_range(r).await, render::delete),
            Op::Txn(r) => outcome(kv.txn(r.clone()).await, |a| render::txn(a, &r)),
            Op::Compact(r) => {
                let first = outcome(kv.compact(r).await, render::compact);
                if first.starts_with("ERROR") {
                    return first;
                }
                let wait = CompactionRequest { revision: r.revision, physical: true };
                format!("{first}; then {}", outcome(kv.compact(wait).await, render::compact))
            }
            Op::Grant(r) => outcome(lease.lease_grant(r).await, |a| render::grant(a, true)),
            Op::GrantAndRevoke(r) => match lease.lease_grant(r).await {
                Ok(granted) => {
                    let id = granted.get_ref().id;
                    let revoked = outcome(lease.lease_revoke(LeaseRevokeRequest { id }).await, render::revoke);
                    format!("{}; then {revoked}", render::grant(granted.get_ref(), r.id != 0))
                }
                Err(status) => render::error(&status),
            },
            Op::Revoke(r) => outcome(lease.lease_revoke(r).await, render::revoke),
            Op::TimeToLive(r) => outcome(lease.lease_time_to_live(r).await, render::ttl),
            Op::Leases => outcome(lease.lease_leases(LeaseLeasesRequest {}).await, render::leases),
            Op::KeepAlive(r) => match lease.lease_keep_alive(tokio_stream::iter([r])).await {
                Ok(answers) => {
                    let mut answers = answers.into_inner();
                    let mut out = String::new();
                    loop {
                        match answers.message().await {
                            Ok(Some(answer)) => writeln!(out, "{}", render::keep_alive(&answer)).unwrap_or_default(),
                            Ok(None) => return out + "end",
                            Err(status) => return out + &render::error(&status),
                        }
                    }
                }
                Err(status) => render::error(&status),
            },
            Op::HashKv(r) => outcome(maintenance.hash_kv(r).await, render::hash_kv),
            Op::Members => {
                let name = self.process.name.clone();
                outcome(cluster.member_list(MemberListRequest { linearizable: true }).await, |a| render::members(a, &name))
            }
            Op::Alarms(r) => outcome(maintenance.alarm(r).await, render::alarm),
            Op::Watch(stream, r) => {
                let earlier = r.prev_kv;
                let created = self.streams[stream].create(r).await;
                if earlier && !created.canceled {
                    self.fresh.insert((stream, created.watch_id));
                }
                render::watch(&created)
            }
            Op::CancelWatch(stream, id) => {
                self.streams[stream].cancel(id).await;
                self.fresh.remove(&(stream, id));
                "CANCELED".into()
            }
            Op::Reopen(stream) => {
                self.streams[stream] = self.open().await;
                self.newest[stream].clear();
                self.fresh.retain(|watch| watch.0 != stream);
                "REOPENED".into()
            }
            Op::Barrier | Op::FullState => unreachable!("made of other steps"),
        }
    }

    /// Waits until everything up to `revision` has been delivered on all streams.
    async fn delivered(&mut self, revision: i64) {
        let [a, b, c] = &mut self.streams[..] else { unreachable!("there are {STREAMS} streams") };
        tokio::join!(deliver(a, revision), deliver(b, revision), deliver(c, revision));
    }

    /// The first answers, of those not printed yet, that must have some earlier value and have none.
    fn silent(&self) -> Silent {
        let mut fresh = self.fresh.clone();
        let mut silent = Silent::new();
        for (i, stream) in self.streams.iter().enumerate() {
            for answer in stream.seen.iter().filter(|a| !a.events.is_empty()) {
                let first = fresh.remove(&(i, answer.watch_id));
                let must = |e: &Event| e.r#type == 1 || e.kv.as_ref().is_some_and(|kv| common::pb::kv(kv).version > 1);
                if first && answer.events.iter().any(must) && answer.events.iter().all(|e| e.prev_kv.is_none()) {
                    silent.insert((i, answer.watch_id), answer.events.len());
                }
            }
        }
        silent
    }

    /// Prints what has been delivered, by stream and watch, without the earlier values that `silent` names.
    fn events(&mut self, silent: &Silent) -> String {
        let mut silent = silent.clone();
        let mut out = String::new();
        for (i, stream) in self.streams.iter_mut().enumerate() {
            check_order(&stream.seen, &mut self.newest[i]);
            let mut by_watch: BTreeMap<i64, String> = BTreeMap::new();
            // Progress has been waited for, and what a creation answers was compared when it came.
            for answer in stream.seen.drain(..).filter(|a| !is_progress(a) && !a.created) {
                let lines = by_watch.entry(answer.watch_id).or_default();
                if answer.canceled {
                    let _ =
                        writeln!(lines, "    rev={} {}", answer.header.as_ref().map_or(-1, |h| h.revision), render::watch_control(&answer));
                }
                if !answer.events.is_empty() {
                    self.fresh.remove(&(i, answer.watch_id));
                }
                for mut event in answer.events {
                    if let Some(left) = silent.get_mut(&(i, answer.watch_id)).filter(|left| **left > 0) {
                        *left -= 1;
                        event.prev_kv = None;
                    }
                    let _ = writeln!(lines, "    {}", render::event(&event));
                }
            }
            for (id, lines) in by_watch {
                let _ = write!(out, "  stream {i} watch {id}\n{lines}");
            }
        }
        out
    }
}

/// Waits until a stream has been sent everything up to `revision`. A watch that was canceled by a compaction keeps its
/// id until the client cancels it too, which is answered once more; etcd speaks of no progress before that.
async fn deliver(stream: &mut WatchStream, revision: i64) {
    // In the order of the answers, for an id may be given to another watch once its cancel was answered.
    let unanswered = |seen: &[WatchResponse]| -> BTreeSet<i64> {
        let mut ids = BTreeSet::new();
        for answer in seen.iter().filter(|a| a.canceled && !a.created) {
            if answer.compact_revision != 0 {
                ids.insert(answer.watch_id)
            } else {
                ids.remove(&answer.watch_id)
            };
        }
        ids
    };
    let progress = |a: &WatchResponse| is_progress(a) && a.watch_id == -1 && a.header.as_ref().is_some_and(|h| h.revision >= revision);
    let complete = |seen: &[WatchResponse]| seen.iter().any(progress) && unanswered(seen).is_empty();
    let mut acknowledged = BTreeSet::new();
    for _ in 0..1000 {
        stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        if stream.until(std::time::Duration::from_millis(20), complete).await {
            return;
        }
        assert!(stream.ended.is_none(), "the stream ended: {:?}", stream.ended);
        for id in unanswered(&stream.seen) {
            if acknowledged.insert(id) {
                stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id })).await;
            }
        }
    }
    panic!("not all answers up to revision {revision}; seen: {:#?}", stream.seen.iter().map(render::watch).collect::<Vec<_>>());
}

/// No revision may be cut in two, unless the answer is a fragment, and a watch must not be sent anything twice.
fn check_order(seen: &[WatchResponse], newest: &mut BTreeMap<i64, (i64, bool)>) {
    for answer in seen {
        if answer.created {
            newest.remove(&answer.watch_id);
        }
        let revisions: Vec<i64> = answer.events.iter().map(|e| e.kv.as_ref().map_or(0, |kv| common::pb::kv(kv).mod_revision)).collect();
        let (Some(first), Some(last)) = (revisions.first().copied(), revisions.last().copied()) else { continue };
        let (before, fragment) = newest.get(&answer.watch_id).copied().unwrap_or_default();
        assert!(first > before || (fragment && first == before), "revision {first} after {before}: {}", render::watch(answer));
        assert!(revisions.is_sorted(), "revisions out of order: {}", render::watch(answer));
        let header = answer.header.as_ref().map_or(0, |h| h.revision);
        assert!(header >= last, "an event newer than its header: {}", render::watch(answer));
        newest.insert(answer.watch_id, (last, answer.fragment));
    }
}

/// Both members, and what the test knows about them.
struct Pair {
    reference: Side,
    subject: Side,
    known: Known,
    seed: u64,
    /// Operations so far, for messages.
    count: usize,
    ops: usize,
    /// Differences found, and how many make the test stop.
    differences: u64,
    bearable: u64,
    /// How often each kind of step and each error came up.
    tally: BTreeMap<String, usize>,
}

impl Pair {
    async fn start(reference: Kind, subject: Kind, seed: u64, ops: usize) -> Pair {
        let (reference, subject) = tokio::join!(Side::start(reference), Side::start(subject));
        let known = Known { revision: 1, compacted: -1, ..Default::default() };
        let bearable = setting("QUORATE_DIFF_STOP_AT", 1);
        Pair { reference, subject, known, seed, count: 0, ops, differences: 0, bearable, tally: BTreeMap::new() }
    }

    /// Prints a difference, and fails the test if it was the last one to be reported.
    fn differ(&mut self, what: &dyn std::fmt::Debug, expected: &str, found: &str) {
        let first = expected.lines().zip(found.lines()).position(|(a, b)| a != b);
        let first = first.unwrap_or_else(|| expected.lines().count().min(found.lines().count()));
        let Pair { seed, count, ops, known, .. } = self;
        let message = format!(
            "seed {seed}, operation {count} ({known:?}): the members differ\nREQUEST: {what:?}\nETCD: {expected}\nFOUND: {found}\n\
             first in line {first}:\n  etcd:  {:?}\n  found: {:?}\nREPRODUCE WITH: QUORATE_DIFF_SEED={seed} QUORATE_DIFF_OPS={ops} \
             cargo test --test differential random_requests -- --nocapture",
            expected.lines().nth(first),
            found.lines().nth(first),
        );
        self.differences += 1;
        assert!(self.differences < self.bearable, "{message}");
        println!("{message}\n");
    }

    /// One request to both; the outcome if it is the same.
    async fn send(&mut self, op: &Op) -> String {
        let (expected, found) = tokio::join!(self.reference.run(op), self.subject.run(op));
        if expected != found {
            self.differ(op, &expected, &found);
        }
        let name = format!("{op:?}");
        let name = name.split(['(', ' ']).next().unwrap_or_default();
        let error = expected.lines().next().filter(|l| l.starts_with("ERROR")).unwrap_or("ok");
        *self.tally.entry(format!("{name}: {error}")).or_default() += 1;
        // Every answer of these carries the current revision, unless it is an error.
        if let Some(revision) = expected.split("rev=").nth(1).and_then(|r| r.split([' ', ';']).next()?.parse::<i64>().ok()) {
            self.known.revision = self.known.revision.max(revision);
        }
        expected
    }

    async fn step(&mut self, op: Op) {
        self.count += 1;
        match &op {
            Op::Barrier => return self.barrier().await,
            Op::FullState => return self.full_state().await,
            // What a watch has been sent when it ends, or when history is cut, must not depend on the moment.
            Op::Compact(_) | Op::CancelWatch(..) | Op::Reopen(_) => self.barrier().await,
            _ => {}
        }
        if let Op::CancelWatch(stream, id) = op
            && !self.known.watches[stream].iter().any(|w| w.0 == id)
        {
            return; // The compaction that this barrier waited for has canceled it.
        }
        let answer = self.send(&op).await;
        match op {
            Op::Compact(r) if !answer.starts_with("ERROR") => self.known.compacted = r.revision,
            Op::Txn(r) if has_open_delete(&r) && has_put(&r) && answer.starts_with("TXN") => {
                self.known.poisoned.push(self.known.revision);
            }
            Op::Watch(stream, r) if !answer.contains("canceled=true") => {
                let id = answer.split("id=").nth(1).and_then(|id| id.split(' ').next()?.parse().ok()).expect("a created watch has an id");
                self.known.watches[stream].push((id, r.start_revision));
            }
            Op::CancelWatch(stream, id) => self.known.watches[stream].retain(|w| w.0 != id),
            Op::Reopen(stream) => self.known.watches[stream].clear(),
            _ => {}
        }
    }

    /// Compares all events up to now.
    async fn barrier(&mut self) {
        // etcd speaks of no progress while a watch of the stream waits for a revision to come: let it come.
        let waited_for = self.known.watches.iter().flatten().map(|w| w.1).max().unwrap_or(0);
        // At least one revision, so that an answer about progress that names it is younger than every watch.
        let waited_for = waited_for.max(self.known.revision + 1);
        while self.known.revision < waited_for {
            self.send(&Op::Put(PutRequest { key: FILLER.into(), ..Default::default() })).await;
        }
        let revision = self.known.revision;
        tokio::join!(self.reference.delivered(revision), self.subject.delivered(revision));
        let silent = self.reference.silent();
        *self.tally.entry("first answers without earlier values".into()).or_default() += silent.len();
        let (expected, found) = (self.reference.events(&silent), self.subject.events(&silent));
        if expected != found {
            self.differ(&format!("all events up to revision {revision}"), &expected, &found);
        }
        *self.tally.entry("events".into()).or_default() += expected.lines().filter(|l| l.contains("prev: ")).count();
        *self.tally.entry("watches canceled by compaction".into()).or_default() += expected.matches("rev=0 ").count();
        // Those below the compaction are gone by now.
        let compacted = self.known.compacted;
        for watches in &mut self.known.watches {
            watches.retain(|w| w.1 == 0 || w.1 >= compacted || !expected.contains(&format!("rev=0 id={} ", w.0)));
        }
    }

    /// Compares everything that can be read, at several revisions.
    async fn full_state(&mut self) {
        self.barrier().await;
        let Known { revision, compacted, .. } = self.known;
        let oldest = compacted.max(1);
        let revisions = [0, oldest, (oldest + revision) / 2, (oldest + 3 * revision) / 4, revision - 1, revision];
        for at in revisions.into_iter().filter(|at| *at == 0 || *at >= oldest) {
            let all = RangeRequest { key: b"\0".as_slice().into(), range_end: b"\0".as_slice().into(), revision: at, ..Default::default() };
            self.send(&Op::Range(all)).await;
            self.send(&Op::HashKv(HashKvRequest { revision: at })).await;
        }
        for key in KEYS {
            self.send(&Op::Range(RangeRequest { key: key.into(), ..Default::default() })).await;
        }
        for id in LEASES {
            self.send(&Op::TimeToLive(LeaseTimeToLiveRequest { id, keys: true })).await;
        }
        self.send(&Op::Leases).await;
    }

    /// Stops both, starts them on their data again, and compares the state.
    async fn restart(&mut self) {
        for side in [&mut self.reference, &mut self.subject] {
            side.streams.clear();
            side.newest = Default::default();
            side.fresh.clear();
            side.process.stop().await;
            side.process.restart().await;
            side.clients = side.process.clients().await;
            for _ in 0..STREAMS {
                let stream = side.open().await;
                side.streams.push(stream);
            }
        }
        self.known.watches = Default::default();
        self.full_state().await;
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|e| panic!("{name}={v}: {e}")))
}

/// One seed, from two empty members to the comparison after their restart; how often everything came up.
async fn run_seed(reference: Kind, subject: Kind, seed: u64, ops: usize) -> BTreeMap<String, usize> {
    let mut pair = Pair::start(reference, subject, seed, ops).await;
    let mut generator = Generator::new(seed);
    while pair.count < ops {
        let op = generator.next(&pair.known);
        pair.step(op).await;
        if pair.count % 400 == 0 {
            pair.full_state().await;
        }
    }
    pair.full_state().await;
    pair.restart().await;
    assert_eq!(pair.differences, 0, "differences were printed above");
    println!("seed {seed}: {} operations, the same; revision {}, compacted {}", pair.count, pair.known.revision, pair.known.compacted);
    pair.tally
}

/// Seeds at a time: most of a run is waiting for events.
const JOBS: usize = 4;

#[test]
fn random_requests() {
    let Some(reference) = common::reference() else { return };
    let Some(subject) = Kind::subject(Some(&reference)) else { return };
    let ops = setting("QUORATE_DIFF_OPS", 3000) as usize;
    let seeds: Vec<u64> = match setting("QUORATE_DIFF_SEED", 0) {
        0 => (1..=setting("QUORATE_DIFF_SEEDS", 2)).collect(),
        one => vec![one],
    };
    let mut tally: BTreeMap<String, usize> = BTreeMap::new();
    for some in seeds.chunks(JOBS) {
        let run = &|seed| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(run_seed(Kind::Etcd(reference.etcd.clone()), subject.clone(), seed, ops))
        };
        let tallies: Vec<_> = std::thread::scope(|threads| {
            let running: Vec<_> = some.iter().map(|seed| threads.spawn(move || run(*seed))).collect();
            // A thread that failed has printed why.
            running.into_iter().map(|thread| thread.join().expect("the members do not differ")).collect()
        });
        for (what, count) in tallies.into_iter().flatten() {
            *tally.entry(what).or_default() += count;
        }
    }
    for (what, count) in tally {
        println!("{count:>8} {what}");
    }
}
