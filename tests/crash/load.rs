//! Load for a member that is about to crash, and a record of everything it said.
//!
//! - Each *writer* has keys and leases of its own and one request under way at a time, so that what its next request will do is
//!   known, and so is, after a crash, whether the last one was carried out.
//! - The *janitor* compacts, and defragments if asked to.
//! - The *witness* watches all keys; what it was told of must still be there after the crash.
//! - The *reader* reads linearizably; what it saw must be what the history says of that revision.
//!
//! Numbers in values grow, none is used twice: a value that nobody wrote is recognised.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::prelude::*;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::ledger::Ledger;
use crate::member::{Member, REQUEST_LIMIT};
use crate::model::{Answer, Event, Item, Op, State, Text};
use crate::wire::Client;

/// Keys of a writer. Few, so that most requests meet what earlier ones left.
const KEYS: usize = 24;

/// Leases that a writer holds at most.
const LEASES: usize = 12;

/// Reads recorded in one round; the reader rests beyond it.
const SIGHTINGS: usize = 300;

/// How many of the newest revisions the janitor leaves alone.
const KEEP: i64 = 100;

/// Bytes of the largest value: three of them, which is what a transaction may hold, still fit into one request of 1.5 MiB.
const LARGEST: usize = 500_000;

/// What a member says, with ResourceExhausted, when there is no space.
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

/// What kind of load.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub writers: usize,
    /// Large values, which fill the log's segments and the quota.
    pub heavy: bool,
    pub compact: bool,
    pub defragment: bool,
}

/// How a request ended, for who sent it.
#[derive(Clone, Debug)]
pub enum Outcome {
    Done(Answer),
    /// Certainly not carried out: there was no space, or there were too many requests.
    Refused,
    /// Nobody knows; what was said instead of an answer.
    Unknown(String),
}

/// A request and what became of it.
#[derive(Clone, Debug)]
pub struct Entry {
    pub op: Op,
    /// The newest revision that anybody had been told of when it was sent. Its own must be above.
    pub floor: i64,
    pub sent: Instant,
    pub outcome: Outcome,
}

/// A part of the keys as a linearizable read saw it.
pub struct Sighting {
    pub revision: i64,
    pub prefix: String,
    pub items: BTreeMap<Text, Item>,
}

/// Everything that was said during a load.
#[derive(Default)]
pub struct Round {
    /// By writer, in the order of sending.
    pub writers: Vec<Vec<Entry>>,
    pub compactions: Vec<Entry>,
    /// Events by revision.
    pub witnessed: BTreeMap<i64, Vec<Event>>,
    pub sightings: Vec<Sighting>,
}

impl Round {
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.writers.iter().flatten().chain(&self.compactions)
    }
}

struct Shared {
    stop: AtomicBool,
    /// The newest revision that anybody was told of.
    newest: AtomicI64,
    acknowledged: AtomicU64,
    puts: AtomicU64,
    no_space: AtomicU64,
    /// What was said instead of answers. A writer ends with it.
    unknown: Mutex<Vec<String>>,
    serial: Arc<AtomicU64>,
    witnessed: Mutex<BTreeMap<i64, Vec<Event>>>,
    sightings: Mutex<Vec<Sighting>>,
}

/// The prefix of a writer's keys, in the order of the writers.
pub fn prefix(writer: usize) -> String {
    format!("w{writer:02}/")
}

/// The writer that owns a key, which is known from its prefix.
pub fn owner(key: &Text) -> Option<usize> {
    std::str::from_utf8(key.0.get(1..3)?).ok()?.parse().ok()
}

fn lease_owner(id: i64) -> usize {
    (id >> 32) as usize - 1
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A load under way.
pub struct Load {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<Vec<Entry>>>,
    janitor: JoinHandle<Vec<Entry>>,
    onlookers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Begins where the ledger stands.
    pub async fn start(member: &Member, ledger: &Ledger, shape: Shape, rng: &mut StdRng) -> Load {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            newest: AtomicI64::new(ledger.head),
            acknowledged: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            no_space: AtomicU64::new(0),
            unknown: Mutex::default(),
            serial: ledger.serial.clone(),
            witnessed: Mutex::default(),
            sightings: Mutex::default(),
        });
        let mut seeded = || StdRng::seed_from_u64(rng.random());
        let mut writers = Vec::new();
        for number in 0..shape.writers {
            let state = ledger.state.part(&prefix(number), |lease| lease_owner(lease) == number);
            let writer = Writer { number, state, shape, shared: shared.clone(), rng: seeded(), entries: Vec::new() };
            writers.push(tokio::spawn(writer.run(member.client())));
        }
        let janitor = tokio::spawn(tidy(member.client(), shared.clone(), shape, ledger.compacted, seeded()));
        let onlookers = vec![
            tokio::spawn(witness(member.client(), shared.clone(), ledger.head + 1)),
            tokio::spawn(read(member.client(), shared.clone(), shape, seeded())),
        ];
        println!("{shape:?}");
        Load { shared, writers, janitor, onlookers }
    }

    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(SeqCst)
    }

    /// How many of them were Puts.
    pub fn puts(&self) -> u64 {
        self.shared.puts.load(SeqCst)
    }

    /// How many requests were refused because there was no space.
    pub fn no_space(&self) -> u64 {
        self.shared.no_space.load(SeqCst)
    }

    /// What was said instead of answers.
    pub fn unknown(&self) -> Vec<String> {
        locked(&self.shared.unknown).clone()
    }

    /// Ends the load, if the end of the member has not done so already, and returns what was said.
    ///
    /// # Panics
    /// When a read was stale, or the watch told of the same revision twice.
    pub async fn finish(self) -> Round {
        self.shared.stop.store(true, SeqCst);
        let mut round = Round::default();
        for writer in self.writers {
            round.writers.push(writer.await.expect("a writer does not panic"));
        }
        round.compactions = self.janitor.await.expect("the janitor does not panic");
        for onlooker in self.onlookers {
            onlooker.await.expect("nothing stale or repeated is seen");
        }
        round.witnessed = std::mem::take(&mut *locked(&self.shared.witnessed));
        round.sightings = std::mem::take(&mut *locked(&self.shared.sightings));
        round
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// Keeps what was read; false when that is enough.
    fn note(&self, sighting: Sighting) -> bool {
        let mut sightings = locked(&self.sightings);
        sightings.push(sighting);
        sightings.len() < SIGHTINGS
    }

    /// Sends a request and records what comes of it.
    async fn send(&self, client: &mut Client, op: Op) -> Entry {
        let floor = self.newest.load(SeqCst);
        let sent = Instant::now();
        let unknown = |what: String| {
            locked(&self.unknown).push(format!("{op:.60?} after {:?}: {what}", sent.elapsed()));
            Outcome::Unknown(what)
        };
        let outcome = match tokio::time::timeout(REQUEST_LIMIT, client.send(&op)).await {
            Ok(Ok(answer)) => {
                self.newest.fetch_max(answer.revision, SeqCst);
                self.acknowledged.fetch_add(1, SeqCst);
                self.puts.fetch_add(u64::from(matches!(op, Op::Put { .. })), SeqCst);
                Outcome::Done(answer)
            }
            Ok(Err(status)) if is_refusal(status.code(), status.message()) => {
                if status.message() == NO_SPACE {
                    self.no_space.fetch_add(1, SeqCst);
                }
                Outcome::Refused
            }
            Ok(Err(status)) => unknown(status.to_string()),
            Err(_) => unknown(format!("no answer within {REQUEST_LIMIT:?}")),
        };
        Entry { op, floor, sent, outcome }
    }
}

/// Whether an error says that the request was certainly not carried out.
fn is_refusal(code: Code, message: &str) -> bool {
    (code == Code::ResourceExhausted && message == NO_SPACE) || message == "etcdserver: too many requests"
}

struct Writer {
    number: usize,
    /// Its own keys and leases.
    state: State,
    shape: Shape,
    shared: Arc<Shared>,
    rng: StdRng,
    entries: Vec<Entry>,
}

impl Writer {
    /// Writes until it is told to stop, or does not know any more what it has done.
    async fn run(mut self, mut client: Client) -> Vec<Entry> {
        while !self.shared.stopped() {
            let op = self.next_op();
            let entry = self.shared.send(&mut client, op).await;
            let outcome = entry.outcome.clone();
            if let Outcome::Done(answer) = outcome {
                let events = self.state.effects(&entry.op, answer.revision);
                self.state.absorb(&events);
                self.state.absorb_lease(&entry.op);
            }
            self.entries.push(entry);
            match outcome {
                Outcome::Done(_) => {}
                Outcome::Refused => tokio::time::sleep(Duration::from_millis(10)).await,
                Outcome::Unknown(_) => break,
            }
        }
        self.entries
    }

    fn key(&self, number: usize) -> Text {
        Text::new(format!("{}{number:02}", prefix(self.number)))
    }

    fn put(&mut self, number: usize) -> Op {
        let size = match self.rng.random_range(0..1000) {
            _ if self.shape.heavy => self.rng.random_range(1_000..LARGEST),
            0 => self.rng.random_range(100_000..LARGEST),
            1..20 => self.rng.random_range(10_000..100_000),
            20..150 => self.rng.random_range(500..10_000),
            _ => self.rng.random_range(0..500),
        };
        let key = self.key(number);
        let serial = self.shared.serial.fetch_add(1, SeqCst);
        let lease = if self.rng.random_ratio(1, 4) { self.state.leases.keys().copied().choose(&mut self.rng) } else { None };
        Op::Put { value: filled(serial, size), key, lease: lease.unwrap_or(0) }
    }

    fn next_op(&mut self) -> Op {
        let key = self.rng.random_range(0..KEYS);
        match self.rng.random_range(0..100) {
            0..12 => Op::Delete { key: self.key(key), end: Text::default() },
            12..16 => {
                let end = key + self.rng.random_range(0..8);
                Op::Delete { key: self.key(key), end: self.key(end) }
            }
            16..32 => self.txn(),
            32..37 if self.state.leases.len() < LEASES => {
                let id = ((self.number as i64 + 1) << 32) | self.shared.serial.fetch_add(1, SeqCst) as i64;
                Op::Grant { id, ttl: self.rng.random_range(10_000..1_000_000) }
            }
            37..40 => match self.state.leases.keys().copied().choose(&mut self.rng) {
                Some(id) => Op::Revoke { id },
                None => self.put(key),
            },
            _ => self.put(key),
        }
    }

    fn txn(&mut self) -> Op {
        let mut keys: Vec<usize> = (0..KEYS).choose_multiple(&mut self.rng, 4);
        keys.shuffle(&mut self.rng);
        let guard = self.key(keys[0]);
        let version = self.state.items.get(&guard).map_or(0, |item| item.version) + i64::from(self.rng.random_ratio(1, 4));
        let delete = |key| Op::Delete { key, end: Text::default() };
        let then = vec![self.put(keys[1]), delete(self.key(keys[2])), self.put(keys[3])];
        let otherwise = vec![delete(self.key(keys[1])), self.put(keys[0])];
        Op::Txn { key: guard, version, then, otherwise }
    }
}

/// A value of `size` bytes or a little more, unlike any other.
fn filled(serial: u64, size: usize) -> Text {
    let mut value = format!("{serial}:").into_bytes();
    let mut word = serial | 1;
    while value.len() < size {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        value.extend_from_slice(&word.to_be_bytes());
    }
    Text::new(value)
}

/// Compacts behind the witness, so that no revision is lost to the record.
async fn tidy(mut client: Client, shared: Arc<Shared>, shape: Shape, mut compacted: i64, mut rng: StdRng) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut defragments = u32::from(shape.defragment);
    while !shared.stopped() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(10..120))).await;
        if defragments > 0 && rng.random_ratio(1, 4) {
            defragments -= 1;
            // Its outcome says nothing about the data.
            let _ = tokio::time::timeout(REQUEST_LIMIT, client.defragment()).await;
        }
        let seen = locked(&shared.witnessed).last_key_value().map_or(0, |(revision, _)| *revision);
        let revision = seen - rng.random_range(0..KEEP.min(seen / 2 + 1));
        if !shape.compact || revision <= compacted {
            continue;
        }
        let entry = shared.send(&mut client, Op::Compact { revision }).await;
        let unknown = matches!(entry.outcome, Outcome::Unknown(_));
        compacted = revision;
        entries.push(entry);
        if unknown {
            break;
        }
    }
    entries
}

/// Records every event from a revision on.
async fn witness(mut client: Client, shared: Arc<Shared>, from: i64) {
    let Ok(mut stream) = client.watch(from).await else { return };
    let mut last = from - 1;
    loop {
        let message = match tokio::time::timeout(Duration::from_millis(50), stream.next()).await {
            Ok(Ok(Some(message))) => message,
            Ok(_) => return,
            // Quiet: stop if asked to and nothing more can come.
            Err(_) if shared.stopped() => return,
            Err(_) => continue,
        };
        for (revision, events) in message {
            assert!(revision > last, "the watch told of revision {revision} after {last}");
            last = revision;
            locked(&shared.witnessed).insert(revision, events);
        }
    }
}

/// Reads what belongs to one writer, over and over.
async fn read(mut client: Client, shared: Arc<Shared>, shape: Shape, mut rng: StdRng) {
    while !shared.stopped() {
        let prefix = prefix(rng.random_range(0..shape.writers));
        let floor = shared.newest.load(SeqCst);
        let found = match tokio::time::timeout(REQUEST_LIMIT, client.read(&prefix, 0)).await {
            Ok(Ok(found)) => found,
            _ => return,
        };
        let revision = found.header.revision;
        assert!(revision >= floor, "a linearizable read came from revision {revision}, but {floor} had been acknowledged before");
        shared.newest.fetch_max(revision, SeqCst);
        if !shared.note(Sighting { revision, prefix, items: found.items }) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..20))).await;
    }
}
