//! Clients of a simulated cluster, and the record of everything that they ask and are told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quorate::client::{EventKind, WatchMessage};
use quorate::proto::etcdserverpb::*;
use quorate::proto::{EncodedKv, KeyValue};
use quorate::sim::Cluster;
use quorate::{ApplyError, Client, Error};
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::checkers::history::{Answer, Change, Item, Op, Outcome, Request};
use crate::checkers::watch::{Event, Scope, Told, next_revision};
use crate::requests::{SCOPES, answer_of, answer_of_read, choose, delete, put, read, revision, txn, watch};

/// How long a client waits for an answer: at most longer than a member does, and often too short.
const PATIENCE: Duration = Duration::from_secs(9);
const IMPATIENCE: Duration = Duration::from_millis(300);

/// A client's rest after an answer, at most, and after an error.
const REST_MS: u64 = 120;
const REST_AFTER_ERROR: Duration = Duration::from_millis(50);

/// The watchers, and how many of them ask for everything.
pub const WITNESSES: usize = ALL_SEEING + SCOPES.len();
pub const ALL_SEEING: usize = 3;

/// What a witness asks for.
pub fn scope(witness: usize) -> Scope {
    witness.checked_sub(ALL_SEEING).map_or(Scope::All, |at| SCOPES[at])
}

/// How long a watcher is content with silence, before it asks for a bookmark, and how many times before it goes elsewhere.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
const SILENCES_MAX: u32 = 10;

/// The first letters of the keys that leases hold.
pub const LEASED: &str = "leased-";

/// What is known of a lease.
#[derive(Clone, Debug, Default)]
pub struct Leased {
    #[allow(dead_code, reason = "shown")]
    pub id: i64,
    /// The TTL in seconds.
    pub ttl: i64,
    /// It holds this key, if it was put.
    pub key: String,
    /// Until when it must not have expired: as it was granted or renewed by the newest request that was answered, from when that was sent.
    pub safe_until: Duration,
    /// When it may have been granted or renewed for the last time.
    pub touched: Duration,
    /// It was revoked by a client, or may have been.
    pub revoked: bool,
}

/// What all tasks write to.
pub struct Record {
    pub cluster: Arc<Cluster>,
    ops: Mutex<Vec<Op>>,
    told: [Mutex<Vec<Told>>; WITNESSES],
    /// When a witness was first told that a lease's key was deleted.
    deleted: Mutex<BTreeMap<String, Duration>>,
    pub leases: Mutex<BTreeMap<i64, Leased>>,
    /// From when to when something befell the cluster.
    befallen: Mutex<Vec<(Duration, Duration)>>,
    /// The network is not calm, or was not at some time.
    pub is_rough: AtomicBool,
    /// Members that were removed for certain, by place and id.
    pub removed: Mutex<BTreeSet<(usize, u64)>>,
    errors: Mutex<BTreeMap<String, u64>>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    wrong: Mutex<Vec<String>>,
    values: AtomicU64,
    clients: AtomicU64,
    /// Clients are to come to an end.
    pub stop: AtomicBool,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    pub fn new(cluster: Arc<Cluster>) -> Arc<Record> {
        Arc::new(Record {
            cluster,
            ops: Mutex::default(),
            told: Default::default(),
            deleted: Mutex::default(),
            leases: Mutex::default(),
            befallen: Mutex::default(),
            is_rough: AtomicBool::new(false),
            removed: Mutex::default(),
            errors: Mutex::default(),
            counts: Mutex::default(),
            wrong: Mutex::default(),
            values: AtomicU64::new(1),
            clients: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    pub fn value(&self) -> u64 {
        self.values.fetch_add(1, SeqCst)
    }

    pub fn client(&self) -> usize {
        self.clients.fetch_add(1, SeqCst) as usize
    }

    pub fn ops(&self) -> Vec<Op> {
        lock(&self.ops).clone()
    }

    pub fn told(&self, witness: usize) -> Vec<Told> {
        lock(&self.told[witness]).clone()
    }

    pub fn deleted(&self) -> BTreeMap<String, Duration> {
        lock(&self.deleted).clone()
    }

    pub fn errors(&self) -> BTreeMap<String, u64> {
        lock(&self.errors).clone()
    }

    /// Counts something that has been seen, so that nobody believes to have tried what never happened.
    pub fn count(&self, what: &'static str, times: usize) {
        *lock(&self.counts).entry(what).or_default() += times as u64;
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.counts).clone()
    }

    pub fn wrong(&self) -> Vec<String> {
        lock(&self.wrong).clone()
    }

    pub fn blame(&self, what: String) {
        self.cluster.note(&what);
        lock(&self.wrong).push(what);
    }

    /// Something has befallen the cluster until now.
    pub fn has_befallen(&self, from: Duration) {
        lock(&self.befallen).push((from, self.cluster.now()));
    }

    /// What has, by its beginning.
    pub fn befallen(&self) -> Vec<(Duration, Duration)> {
        let mut befallen = lock(&self.befallen).clone();
        befallen.sort_unstable();
        befallen
    }

    fn now(&self) -> u64 {
        self.cluster.now().as_nanos() as u64
    }

    /// The first revision of which some witness has not been told.
    pub fn told_before(&self) -> i64 {
        (0..WITNESSES).map(|witness| next_revision(&lock(&self.told[witness]), 2)).min().unwrap_or(2)
    }

    /// A witness was told something.
    fn tell(&self, witness: usize, one: Told) {
        if let Told::Events(_, events) = &one {
            for gone in events.iter().map(|event| &event.change).filter(|change| change.value.is_none() && change.key.starts_with(LEASED)) {
                lock(&self.deleted).entry(gone.key.clone()).or_insert(self.cluster.now());
            }
        }
        lock(&self.told[witness]).push(one);
    }

    /// Adds an operation whose outcome is not known.
    pub fn add_unknown(&self, request: Request, call: Duration) {
        let op = Op { client: self.client(), member: 0, start: 0, call: call.as_nanos() as u64, request, outcome: Outcome::Unknown };
        lock(&self.ops).push(op);
    }

    /// Calls a member. None when there is no answer in time, or the member has gone.
    pub async fn ask<T, F>(&self, member: usize, limit: Duration, call: impl FnOnce(Client) -> F) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        tokio::time::timeout(limit, self.cluster.at(member, call)).await.ok()?
    }

    /// Sends a request and writes down what came of it.
    pub async fn send(&self, number: usize, member: usize, request: Request, limit: Duration) -> Op {
        let start = self.cluster.starts(member) as u32;
        let call = self.now();
        let asked = request.clone();
        let answer = self.ask(member, limit, move |client| async move { send(&client, &asked).await }).await;
        let at = self.now();
        let outcome = match answer {
            Some(Ok(answer)) => Outcome::Answered { at, answer },
            Some(Err(err)) => {
                if request.at > 0 && !request.serializable && matches!(err, Error::Apply(ApplyError::FutureRevision)) {
                    self.blame(format!("a revision that had been seen is said to be still to come: {request:?}"));
                }
                *lock(&self.errors).entry(err.to_string()).or_default() += 1;
                if leaves_open(&err) { Outcome::Unknown } else { Outcome::Refused }
            }
            None => Outcome::Unknown,
        };
        let op = Op { client: number, member, start, call, request, outcome };
        self.cluster.note(&format!("{op:?}"));
        lock(&self.ops).push(op.clone());
        op
    }
}

impl Record {
    /// What came of a put, in the words of the history.
    fn outcome_of_put(&self, answer: Option<quorate::Result<PutResponse>>) -> Outcome {
        match answer {
            Some(Ok(answer)) => {
                let answer = Answer { revision: revision(answer.header), applied: true, ..Answer::default() };
                Outcome::Answered { at: self.now(), answer }
            }
            Some(Err(err)) if !leaves_open(&err) => Outcome::Refused,
            _ => Outcome::Unknown,
        }
    }
}

/// Whether an error leaves it open if a write was, or will be, carried out.
pub fn leaves_open(err: &Error) -> bool {
    matches!(err, Error::Timeout | Error::Stopped | Error::Failed(_) | Error::Apply(ApplyError::TimeoutLeaderFail | ApplyError::Stopped))
}

async fn send(client: &Client, request: &Request) -> Result<Answer, Error> {
    if let Some(range) = read(request) {
        let answer = client.range(range).await?;
        let decode = |kv: &EncodedKv| {
            let kv = kv.decode().expect("a member has well-formed pairs");
            (text(&kv.key), item(&kv))
        };
        return Ok(answer_of_read(request, &answer, decode));
    }
    match (&request.guard, &request.writes[..], &request.reads[..]) {
        (None, [Change { key, value: Some(value) }], []) => {
            let answer = client.put_with(put(key, *value, request.lease)).await?;
            Ok(Answer { revision: revision(answer.header), applied: true, ..Answer::default() })
        }
        (None, [Change { key, value: None }], []) => {
            let answer = client.delete_with(delete(key)).await?;
            Ok(Answer { revision: revision(answer.header), applied: true, deleted: answer.deleted, ..Answer::default() })
        }
        _ => Ok(answer_of(client.txn(txn(request)).await?, found)),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("only texts are written")
}

/// A deletion has no value: it counts as 0 here. Of a value only its beginning is the number.
fn number(value: &[u8]) -> u64 {
    text(value).split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn found(answer: &RangeResponse) -> Option<Item> {
    let kv = answer.kvs.first().map(EncodedKv::decode)?.expect("a member has well-formed pairs");
    Some(item(&kv))
}

fn item(kv: &KeyValue) -> Item {
    Item { value: number(&kv.value), modified: kv.mod_revision, created: kv.create_revision, version: kv.version }
}

/// A client at work.
pub async fn work(record: Arc<Record>, mut rng: StdRng) {
    let number = record.client();
    let mut member = rng.random_range(0..record.cluster.places());
    // The newest revision of each key that the client knows of, for its swaps.
    let mut known: BTreeMap<String, i64> = BTreeMap::new();
    while !record.stop.load(SeqCst) {
        if !record.cluster.is_running(member) || rng.random_ratio(1, 20) {
            member = rng.random_range(0..record.cluster.places());
        }
        let request = choose(&mut rng, &known, || record.value());
        let limit = if rng.random_ratio(1, 6) { IMPATIENCE } else { PATIENCE };
        let op = record.send(number, member, request, limit).await;
        let rest = match op.answer() {
            Some((_, answer)) => {
                for (key, item) in op.request.reads.iter().zip(&answer.found) {
                    known.insert(key.clone(), item.map_or(0, |item| item.modified));
                }
                Duration::from_millis(rng.random_range(0..REST_MS))
            }
            None => REST_AFTER_ERROR,
        };
        tokio::time::sleep(rest).await;
    }
}

/// A client that waits for no answer long, but asks somebody else: whoever answers late answers what was asked a moment ago.
pub async fn impatient(record: Arc<Record>, mut rng: StdRng) {
    let number = record.client();
    while !record.stop.load(SeqCst) {
        let member = rng.random_range(0..record.cluster.places());
        let request = choose(&mut rng, &BTreeMap::new(), || record.value());
        record.send(number, member, request, IMPATIENCE).await;
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..50))).await;
    }
}

/// A client that renews one lease for a while, at whichever member, and waits for no answer long.
pub async fn renewals(record: Arc<Record>, mut rng: StdRng) {
    while !record.stop.load(SeqCst) {
        let (id, ttl) = (record.value() as i64 + 1_000_000, rng.random_range(2..5));
        let pick = |rng: &mut StdRng| rng.random_range(0..record.cluster.places());
        if !grant(&record, id, ttl, pick(&mut rng), pick(&mut rng)).await {
            tokio::time::sleep(REST_AFTER_ERROR).await;
            continue;
        }
        let until = record.cluster.now() + Duration::from_millis(rng.random_range(1000..4000));
        while record.cluster.now() < until && renew(&record, id, pick(&mut rng), IMPATIENCE).await {
            tokio::time::sleep(Duration::from_millis(rng.random_range(1..200))).await;
        }
    }
}

/// A client that writes much that nobody else looks at, so that members that lag need snapshots, and the log goes through segments.
pub async fn bulk(record: Arc<Record>, mut rng: StdRng, rest_ms: u64) {
    let number = record.client();
    while !record.stop.load(SeqCst) {
        let member = rng.random_range(0..record.cluster.places());
        let key = format!("bulk-{}", rng.random_range(0..20));
        let (value, start, call) = (record.value(), record.cluster.starts(member) as u32, record.now());
        let request = Request::put(&key, value);
        let put = PutRequest {
            key: key.into(),
            value: format!("{value} {}", "x".repeat(rng.random_range(0..3000))).into(),
            ..Default::default()
        };
        let answer = record.ask(member, PATIENCE, move |client| async move { client.put_with(put).await }).await;
        let outcome = record.outcome_of_put(answer);
        lock(&record.ops).push(Op { client: number, member, start, call, request, outcome });
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..=rest_ms))).await;
    }
}

/// A client that holds leases for some time, each with a key.
pub async fn lease(record: Arc<Record>, mut rng: StdRng) {
    let pick = |rng: &mut StdRng| rng.random_range(0..record.cluster.places());
    while !record.stop.load(SeqCst) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..1500))).await;
        let (id, ttl) = (record.value() as i64 + 1_000_000, rng.random_range(2..6));
        if !grant(&record, id, ttl, pick(&mut rng), pick(&mut rng)).await {
            // It may be there, and expires by itself.
            continue;
        }
        for _ in 0..rng.random_range(0..8) {
            tokio::time::sleep(Duration::from_millis(rng.random_range(100..ttl as u64 * 700))).await;
            if !renew(&record, id, pick(&mut rng), PATIENCE).await {
                break;
            }
        }
        if rng.random_ratio(1, 5) {
            if let Some(lease) = lock(&record.leases).get_mut(&id) {
                lease.revoked = true;
            }
            let _ = record.ask(pick(&mut rng), PATIENCE, move |client| async move { client.lease_revoke(id).await }).await;
        }
    }
}

/// Grants a lease at one member, and puts its key at another. False if the first was not answered.
async fn grant(record: &Record, id: i64, ttl: i64, at: usize, member: usize) -> bool {
    let called = record.cluster.now();
    let granted = record.ask(at, PATIENCE, move |client| async move { client.lease_grant(id, ttl).await }).await;
    record.cluster.note(&format!("lease {id}, ttl {ttl}: granted {}", matches!(granted, Some(Ok(_)))));
    let Some(Ok(granted)) = granted else { return false };
    let key = format!("{LEASED}{id}");
    let safe_until = called + Duration::from_secs(granted.ttl as u64);
    lock(&record.leases)
        .insert(id, Leased { id, ttl: granted.ttl, key: key.clone(), safe_until, touched: record.cluster.now(), revoked: false });
    // Whenever it expires, its key goes, and nobody has asked for it.
    record.add_unknown(Request::delete(&key), called);
    let value = record.value();
    let (request, start, call) = (Request::put(&key, value), record.cluster.starts(member) as u32, record.now());
    let put = put(&key, value, id);
    let answer = record.ask(member, PATIENCE, move |client| async move { client.put_with(put).await }).await;
    let outcome = record.outcome_of_put(answer);
    lock(&record.ops).push(Op { client: record.client(), member, start, call, request, outcome });
    true
}

/// Renews a lease at a member. False if it says that there is none.
async fn renew(record: &Record, id: i64, member: usize, limit: Duration) -> bool {
    let called = record.cluster.now();
    let renewed = record.ask(member, limit, move |client| async move { client.lease_keep_alive(id).await }).await;
    record.cluster.note(&format!("lease {id}: renewed at member {member} {renewed:?}"));
    match renewed {
        Some(Ok(ttl)) => {
            if let Some(lease) = lock(&record.leases).get_mut(&id) {
                lease.safe_until = lease.safe_until.max(called + Duration::from_secs(ttl as u64));
                lease.touched = lease.touched.max(record.cluster.now());
            }
            true
        }
        Some(Err(Error::Apply(ApplyError::LeaseNotFound))) => {
            let lease = lock(&record.leases).get(&id).cloned().unwrap_or_default();
            let now = record.cluster.now();
            if now < early(&lease) {
                record.blame(format!("at {now:?} member {member} has no {lease:?}"));
            }
            false
        }
        _ => {
            // It may be under way still.
            if let Some(lease) = lock(&record.leases).get_mut(&id) {
                lease.touched = lease.touched.max(record.cluster.now() + PATIENCE);
            }
            true
        }
    }
}

/// Before this a lease must not have expired, whosever clock goes how fast.
pub fn early(lease: &Leased) -> Duration {
    if lease.revoked {
        Duration::ZERO
    } else {
        lease.safe_until.saturating_sub(Duration::from_secs(lease.ttl as u64).mul_f64(super::faults::CLOCK_DRIFT * 2.0))
    }
}

/// Watches, now at this member, now at that, for ever.
pub async fn witness(record: Arc<Record>, witness: usize, mut rng: StdRng) {
    let mut next = 2;
    loop {
        let member = if rng.random_ratio(2, 3) { witness % ALL_SEEING } else { rng.random_range(0..record.cluster.places()) };
        let request = watch(scope(witness), next);
        let (tell, mut told) = tokio::sync::mpsc::channel::<Told>(16);
        let watching = record.cluster.at(member, move |client| async move {
            let mut watcher = client.watch(request)?;
            loop {
                let message = match tokio::time::timeout(ASK_INTERVAL, watcher.next()).await {
                    Ok(message) => message?,
                    Err(_) => {
                        watcher.request_progress();
                        continue;
                    }
                };
                let one = match message {
                    Some(WatchMessage::Events(events)) => {
                        let events: Vec<_> = events
                            .into_iter()
                            .map(|event| {
                                let value = (event.kind == EventKind::Put).then(|| number(&event.kv.value));
                                let Item { modified: revision, created, version, .. } = item(&event.kv);
                                let before = event.prev_kv.as_ref().map(item);
                                Event { revision, change: Change { key: text(&event.kv.key), value }, created, version, before }
                            })
                            .collect();
                        // There is no header here; what it would say is no less.
                        Told::Events(events.iter().map(|event: &Event| event.revision).max().unwrap_or(0), events)
                    }
                    Some(WatchMessage::Progress { revision }) => Told::Progress(revision),
                    Some(WatchMessage::Compacted { revision }) => return Err(Error::Failed(format!("compacted at {revision}"))),
                    Some(other) => return Err(Error::Failed(format!("a witness cannot judge {other:?}"))),
                    None => return Ok(()),
                };
                if tell.send(one).await.is_err() {
                    return Ok(());
                }
            }
        });
        lock(&record.told[witness]).push(Told::Opened(next));
        let mut watching = std::pin::pin!(watching);
        let mut silences = 0;
        loop {
            tokio::select! {
                biased;
                one = told.recv() => {
                    let Some(one) = one else { break };
                    silences = 0;
                    next = next_revision(std::slice::from_ref(&one), next);
                    record.cluster.note(&format!("witness {witness} at member {member}: {one:?}"));
                    record.tell(witness, one);
                    if rng.random_ratio(1, 400) {
                        break;
                    }
                }
                ended = &mut watching => {
                    if let Some(Err(Error::Failed(what))) = ended {
                        record.blame(format!("witness {witness} at member {member}, revision {next}: {what}"));
                    }
                    // What it was told before its end is not lost.
                    while let Ok(one) = told.try_recv() {
                        next = next_revision(std::slice::from_ref(&one), next);
                        record.tell(witness, one);
                    }
                    break;
                }
                () = tokio::time::sleep(ASK_INTERVAL * 2) => {
                    silences += 1;
                    if silences > SILENCES_MAX {
                        break;
                    }
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
