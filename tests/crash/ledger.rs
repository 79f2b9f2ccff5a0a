//! The judge: what was said before a crash against what is there after it.
//!
//! The history is complete: the watch after the restart tells of every revision above the compaction, the witness of those
//! below, and where both speak they must agree. Each revision is then attributed to the request that made it. A writer's
//! requests came one after the other, so the next revision of its keys is that of its next request that changes anything:
//!
//! ```text
//! acknowledged        put a @5   delete x (nothing there)   put b @9   | unknown: put c
//! revisions found     5: a                                  9: b         12: c      fine; and fine without 12
//!                     5: a                                               12: c      put b @9 is lost
//!                     5: a                                  9: b         12: d      d is invented
//! ```
//!
//! With every revision attributed, the requests are known in the order in which they were carried out, and a reference member that
//! is sent the same comes to the same HashKV ([`Mirror`]).

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use quorate::proto::etcdserverpb::ResponseHeader;
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::load::{Entry, Outcome, Round, owner};
use crate::member::{Member, Program};
use crate::model::{Event, Op, State};
use crate::wire::{Client, Found};

/// Older revisions that are read and compared after each round.
const PAST_READS: usize = 4;

/// Leases whose keys are asked for after each round.
const LEASE_READS: usize = 6;

/// What has been counted, for the line at the end of a test.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub rounds: usize,
    pub acknowledged: usize,
    pub refused: usize,
    /// Requests that were under way when the member went down, and how many of them had been carried out.
    pub unknown: usize,
    pub unknown_done: usize,
    pub revisions: usize,
    pub witnessed: usize,
    pub sightings: usize,
    pub slowest_start: Duration,
}

/// What a member must hold.
pub struct Ledger {
    pub state: State,
    pub head: i64,
    pub compacted: i64,
    /// The last number used in a value or a lease.
    pub serial: Arc<AtomicU64>,
    pub totals: Totals,
    /// Events by revision, above the compaction.
    history: BTreeMap<i64, Vec<Event>>,
    term: u64,
    /// Cluster and member.
    ids: Option<(u64, u64)>,
    /// What was carried out, in order, with its revision if it used one; taken by the mirror.
    carried_out: Vec<(Op, Option<i64>)>,
}

impl Ledger {
    /// Of an empty store.
    pub fn new() -> Ledger {
        Ledger {
            state: State::default(),
            head: 1,
            compacted: 0,
            serial: Arc::new(AtomicU64::new(1)),
            totals: Totals::default(),
            history: BTreeMap::new(),
            term: 0,
            ids: None,
            carried_out: Vec::new(),
        }
    }

    /// Compares a member with what it must hold after a round, and takes over what it holds.
    ///
    /// # Panics
    /// When anything is lost, invented or contradictory.
    pub async fn settle(&mut self, member: &Member, round: Round, rng: &mut StdRng) {
        let mut client = member.client();
        let Found { header, items } = read_all(&mut client, 0).await;
        let head = header.revision;
        self.check_header(&header);
        let compacted = self.check_compaction(&mut client, &round, head).await;
        let history = self.complete_history(&mut client, &round, head, compacted).await;
        self.attribute(&mut client, &round, &history, head, compacted, rng).await;
        assert_eq!(self.state.items, items, "the keys at revision {head}");
        self.check_leases(&mut client, rng).await;
        check_below_compaction(&mut client, compacted).await;

        if compacted > self.compacted {
            self.carried_out.push((Op::Compact { revision: compacted }, None));
        }
        self.history.extend(history);
        self.history = self.history.split_off(&(compacted + 1));
        (self.head, self.compacted) = (head, compacted);
        self.totals.rounds += 1;
        self.totals.witnessed += round.witnessed.len();
        self.totals.sightings += round.sightings.len();
    }

    fn check_header(&mut self, header: &ResponseHeader) {
        let ids = (header.cluster_id, header.member_id);
        assert_eq!(*self.ids.get_or_insert(ids), ids, "the ids of cluster and member");
        assert!(header.raft_term >= self.term, "the term fell from {} to {}", self.term, header.raft_term);
        assert!(header.revision >= self.head, "the revision fell from {} to {}", self.head, header.revision);
        self.term = header.raft_term;
    }

    async fn check_compaction(&self, client: &mut Client, round: &Round, head: i64) -> i64 {
        let (_, compacted, _) = client.hash().await.expect("HashKV is answered");
        let mut least = self.compacted;
        let mut possible = vec![self.compacted];
        for entry in &round.compactions {
            let Op::Compact { revision } = entry.op else { panic!("{entry:?} among the compactions") };
            possible.push(revision);
            if matches!(entry.outcome, Outcome::Done(_)) {
                least = least.max(revision);
            }
        }
        assert!(compacted >= least, "compacted at {compacted}, though a compaction at {least} was acknowledged");
        assert!(possible.contains(&compacted) && compacted <= head, "compacted at {compacted}, where nobody asked for it: {possible:?}");
        compacted
    }

    /// The events of all revisions after the ledger's head, from watch and witness.
    async fn complete_history(&self, client: &mut Client, round: &Round, head: i64, compacted: i64) -> BTreeMap<i64, Vec<Event>> {
        let mut history = round.witnessed.clone();
        if let Some((last, events)) = history.last_key_value() {
            assert!(*last <= head, "a watcher was told of revision {last}, {events:?}; now the newest is {head}");
        }
        for (revision, events) in replay(client, compacted + 1, head).await {
            let known = if revision <= self.head { self.history.get(&revision) } else { history.get(&revision) };
            assert!(known.is_none_or(|known| *known == events), "revision {revision} was {known:?}, and is now {events:?}");
            assert!(revision > self.head || known.is_some(), "revision {revision} is new below {}", self.head);
            if revision > self.head {
                history.insert(revision, events);
            }
        }
        for revision in self.head + 1..=head {
            assert!(history.contains_key(&revision), "nothing happened at revision {revision} of {head}, compacted at {compacted}");
        }
        history
    }

    /// Finds the request behind each revision, and checks on the way what was read at it.
    async fn attribute(
        &mut self,
        client: &mut Client,
        round: &Round,
        history: &BTreeMap<i64, Vec<Event>>,
        head: i64,
        compacted: i64,
        rng: &mut StdRng,
    ) {
        let readable: Vec<i64> = (self.head.max(compacted)..=head).collect();
        let past: Vec<i64> = readable.choose_multiple(rng, PAST_READS).copied().collect();
        let mut waiting: Vec<VecDeque<&Entry>> = round.writers.iter().map(|entries| entries.iter().collect()).collect();
        for revision in self.head..=head {
            if let Some(events) = history.get(&revision) {
                let (Event::Put(key, _) | Event::Delete(key)) = &events[0];
                let queue = owner(key).and_then(|number| waiting.get_mut(number));
                let queue = queue.unwrap_or_else(|| panic!("revision {revision} is nobody's: {events:?}"));
                self.take_author(queue, revision, events);
                self.state.absorb(events);
            }
            for sighting in round.sightings.iter().filter(|sighting| sighting.revision == revision) {
                let part = self.state.part(&sighting.prefix, |_| false);
                assert_eq!(sighting.items, part.items, "a read of {} before the crash, at revision {revision}", sighting.prefix);
            }
            if past.contains(&revision) {
                let Found { items, .. } = read_all(client, revision).await;
                assert_eq!(items, self.state.items, "a read at revision {revision} of {head}");
            }
        }
        let beyond = round.sightings.iter().find(|sighting| sighting.revision > head);
        assert!(beyond.is_none(), "a read came from revision {:?}; now the newest is {head}", beyond.map(|it| it.revision));
        let found = client.leases().await.expect("LeaseLeases is answered");
        for queue in waiting {
            for entry in queue {
                self.skip(entry, head, &found);
            }
        }
        self.totals.revisions += history.len();
    }

    /// Takes requests from a writer's queue up to the one that made this revision.
    fn take_author(&mut self, queue: &mut VecDeque<&Entry>, revision: i64, events: &[Event]) {
        loop {
            let entry = queue.pop_front().unwrap_or_else(|| panic!("revision {revision} is invented: {events:?}"));
            let effects = self.state.effects(&entry.op, revision);
            match &entry.outcome {
                Outcome::Refused => self.totals.refused += 1,
                Outcome::Unknown(why) => {
                    assert_eq!(effects, events, "revision {revision} is not that of {:?}, which ended with {why}", entry.op);
                    self.totals.unknown += 1;
                    self.totals.unknown_done += 1;
                }
                Outcome::Done(_) if effects.is_empty() => {
                    self.skip(entry, revision - 1, &[]);
                    continue;
                }
                Outcome::Done(answer) => {
                    let deleted = if matches!(entry.op, Op::Delete { .. }) { events.len() as i64 } else { 0 };
                    assert_eq!(
                        answer.revision, revision,
                        "the revision of {:?}, acknowledged; the next of this writer is {events:?}",
                        entry.op
                    );
                    assert_eq!(effects, events, "the events of {:?}, acknowledged at {revision}", entry.op);
                    assert_eq!(answer.deleted, deleted, "keys deleted by {:?} at {revision}", entry.op);
                    assert_eq!(answer.succeeded, self.state.succeeds(&entry.op), "the branch of {:?} at {revision}", entry.op);
                    self.totals.acknowledged += 1;
                }
            }
            if matches!(entry.outcome, Outcome::Refused) {
                continue;
            }
            assert!(revision > entry.floor, "{:?} got revision {revision}, but was sent after {} was acknowledged", entry.op, entry.floor);
            self.state.absorb_lease(&entry.op);
            self.carried_out.push((entry.op.clone(), Some(revision)));
            return;
        }
    }

    /// Accounts for a request that made no revision, at or before `last`. `found`: the leases that are there.
    fn skip(&mut self, entry: &Entry, last: i64, found: &[i64]) {
        match &entry.outcome {
            Outcome::Refused => self.totals.refused += 1,
            Outcome::Unknown(_) => {
                self.totals.unknown += 1;
                let done = match &entry.op {
                    Op::Grant { id, .. } => found.contains(id),
                    Op::Revoke { id } => !found.contains(id),
                    _ => false,
                };
                if done {
                    assert!(self.state.effects(&entry.op, last + 1).is_empty(), "{:?} was half done: the keys are there", entry.op);
                    self.totals.unknown_done += 1;
                    self.state.absorb_lease(&entry.op);
                    self.carried_out.push((entry.op.clone(), None));
                }
            }
            Outcome::Done(answer) => {
                let effects = self.state.effects(&entry.op, answer.revision);
                assert!(effects.is_empty(), "lost: {:?}, acknowledged at {}; the newest revision is {last}", entry.op, answer.revision);
                assert!((entry.floor..=last).contains(&answer.revision), "{entry:?} changed nothing and was sent before revision {last}");
                assert_eq!((answer.deleted, answer.succeeded), (0, self.state.succeeds(&entry.op)), "the answer to {:?}", entry.op);
                self.totals.acknowledged += 1;
                if matches!(entry.op, Op::Grant { .. } | Op::Revoke { .. }) {
                    self.state.absorb_lease(&entry.op);
                    self.carried_out.push((entry.op.clone(), None));
                }
            }
        }
    }

    async fn check_leases(&self, client: &mut Client, rng: &mut StdRng) {
        let expected: Vec<i64> = self.state.leases.keys().copied().collect();
        assert_eq!(client.leases().await.expect("LeaseLeases is answered"), expected, "the leases");
        for id in expected.choose_multiple(rng, LEASE_READS) {
            let (left, granted, keys) = client.lease(*id).await.expect("LeaseTimeToLive is answered");
            assert_eq!((granted, keys), (self.state.leases[id], self.state.attached(*id)), "lease {id:x}");
            assert!((1..=granted).contains(&left), "lease {id:x} has {left} s left");
        }
    }

    /// Notes how long the member took to start after a round.
    pub fn note_start(&mut self, took: Duration) {
        self.totals.slowest_start = self.totals.slowest_start.max(took);
        println!("round {}: served again after {} ms", self.totals.rounds + 1, took.as_millis());
    }

    /// One line on what was done.
    pub fn summary(&self, name: &str) -> String {
        let t = &self.totals;
        format!(
            "{name}: {} rounds, {} requests acknowledged, 0 lost, {} refused; {} unknown, of which {} were carried out; {} revisions, \
             {} seen by the watch and {} reads checked; slowest start {} ms",
            t.rounds,
            t.acknowledged,
            t.refused,
            t.unknown,
            t.unknown_done,
            t.revisions,
            t.witnessed,
            t.sightings,
            t.slowest_start.as_millis()
        )
    }
}

/// All keys at a revision (0: now).
pub async fn read_all(client: &mut Client, revision: i64) -> Found {
    client.read("", revision).await.unwrap_or_else(|err| panic!("reading all at revision {revision}: {err}"))
}

/// All events from one revision to another, as a watch tells them.
pub async fn replay(client: &mut Client, from: i64, head: i64) -> BTreeMap<i64, Vec<Event>> {
    let mut history = BTreeMap::new();
    // Nothing has happened at revision 1.
    if from.max(2) > head {
        return history;
    }
    let mut stream = client.watch(from).await.expect("a watch opens");
    while history.last_key_value().is_none_or(|(revision, _)| *revision < head) {
        let message = tokio::time::timeout(Duration::from_secs(30), stream.next()).await;
        let message = message.unwrap_or_else(|_| panic!("the watch from {from} stops at {:?} of {head}", history.last_key_value()));
        let message = message.expect("a watch goes on").expect("a watch goes on");
        for (revision, events) in message {
            let newest = history.last_key_value().map_or(from - 1, |(newest, _)| *newest);
            assert!((newest + 1..=head).contains(&revision), "revision {revision} after {newest}, head {head}");
            history.insert(revision, events);
        }
    }
    history
}

async fn check_below_compaction(client: &mut Client, compacted: i64) {
    if compacted > 1 {
        let answer = client.read("none", compacted - 1).await.map(|found| found.items);
        let err = answer.expect_err("a read below the compaction is refused");
        assert_eq!(err.message(), "etcdserver: mvcc: required revision has been compacted");
    }
}

/// A reference member that is told to do what the ledger knows was done.
pub struct Mirror {
    member: Member,
}

impl Mirror {
    pub async fn start(program: &Program, home: &Path) -> Mirror {
        // Only speed: this one is not going to crash.
        let flags = ["--unsafe-no-fsync", "--quota-backend-bytes=8589934592"];
        let mut member = Member::new(program, home, &home.join("mirror"), &flags);
        member.start().await;
        Mirror { member }
    }

    /// Brings the reference up to the ledger, and compares the hashes of both histories.
    ///
    /// # Panics
    /// When they differ.
    pub async fn compare(&mut self, ledger: &mut Ledger, member: &Member) {
        let mut client = self.member.client();
        for (op, revision) in std::mem::take(&mut ledger.carried_out) {
            let answer = client.send(&op).await.unwrap_or_else(|err| panic!("the reference refuses {op:?}: {err}"));
            assert!(revision.is_none_or(|revision| answer.revision == revision), "{op:?} made {revision:?}, here it made {answer:?}");
        }
        let theirs = client.hash().await.expect("HashKV is answered");
        let ours = member.client().hash().await.expect("HashKV is answered");
        assert_eq!(ours, theirs, "revision, compaction and HashKV of {} and of the reference", member.program.path.display());
    }
}
