//! Clients of a cluster under fault, and the record of everything that they ask and are told.
//!
//! Each client speaks with one member, one request at a time; each member has a watcher of everything besides, and one of something,
//! which resume where their streams broke off.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::prelude::*;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::checkers::history::{Op, Outcome, Request};
use crate::checkers::watch::{Scope, Told};
use crate::leases::{self, Held};
use crate::links::MEMBERS;
use crate::requests::{SCOPES, choose};
use crate::wire::Client;

/// Watchers: one of everything for each member, and then one of something for each.
pub const WITNESSES: usize = MEMBERS + SCOPES.len();

/// What a watcher asks for.
pub fn scope(witness: usize) -> Scope {
    witness.checked_sub(MEMBERS).map_or(Scope::All, |at| SCOPES[at])
}

/// Clients of each member.
const CLIENTS: usize = 2;

/// How long a client waits for an answer: at most longer than a member does, and often too short.
const PATIENCE: Duration = Duration::from_secs(9);
const IMPATIENCE: Duration = Duration::from_millis(300);

/// A client's rest after an answer, at most, and after an error.
const REST_MS: u64 = 8;
const REST_AFTER_ERROR: Duration = Duration::from_millis(25);

/// How long a stream may take to begin, and a watcher to try again.
const STREAM_LIMIT: Duration = Duration::from_secs(5);
const STREAM_RETRY: Duration = Duration::from_millis(50);

/// How often a watcher asks for a bookmark.
const ASK_INTERVAL: Duration = Duration::from_millis(70);

/// What all tasks write to.
pub struct Record {
    began: Instant,
    ops: Mutex<Vec<Op>>,
    /// What each watcher was told.
    told: [Mutex<Vec<Told>>; WITNESSES],
    /// How often each member was started.
    pub starts: [AtomicU32; MEMBERS],
    /// What was done to the cluster, and when.
    notes: Mutex<Vec<String>>,
    /// What was found wrong on the way.
    wrong: Mutex<Vec<String>>,
    /// Leases that have run out by themselves, and by how much the latest was late.
    leases: Mutex<(u64, Duration)>,
    /// When the last fault was healed; u64::MAX while there is one.
    pub healed: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
    values: AtomicU64,
    clients: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    pub fn new() -> Arc<Record> {
        Arc::new(Record {
            began: Instant::now(),
            ops: Mutex::default(),
            told: Default::default(),
            starts: Default::default(),
            notes: Mutex::default(),
            wrong: Mutex::default(),
            leases: Mutex::default(),
            healed: AtomicU64::new(u64::MAX),
            errors: Mutex::default(),
            values: AtomicU64::new(1),
            clients: AtomicU32::new(0),
        })
    }

    /// Nanoseconds on the clock of the history.
    pub fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    pub fn note(&self, text: &str) {
        lock(&self.notes).push(format!("{:10.3} {text}", self.now() as f64 / 1e6));
    }

    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.notes))
    }

    /// A lease has ended, so much later than it might have.
    pub fn lease_ended(&self, late_nanos: u64, revoked: bool) {
        if !revoked {
            let mut leases = lock(&self.leases);
            *leases = (leases.0 + 1, leases.1.max(Duration::from_nanos(late_nanos)));
        }
    }

    pub fn leases(&self) -> (u64, Duration) {
        *lock(&self.leases)
    }

    pub fn wrong(&self, text: String) {
        lock(&self.wrong).push(text);
    }

    pub fn take_wrong(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.wrong))
    }

    pub fn push(&self, op: Op) {
        lock(&self.ops).push(op);
    }

    pub fn take_ops(&self) -> Vec<Op> {
        std::mem::take(&mut *lock(&self.ops))
    }

    pub fn take_errors(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut *lock(&self.errors))
    }

    pub fn value(&self) -> u64 {
        self.values.fetch_add(1, SeqCst)
    }

    pub fn told(&self, witness: usize) -> MutexGuard<'_, Vec<Told>> {
        lock(&self.told[witness])
    }

    /// Sends a request and writes down what came of it; false after an error.
    pub async fn send(&self, number: usize, member: usize, client: &mut Client, request: Request, limit: Duration) -> (bool, Op) {
        let start = self.starts[member].load(SeqCst);
        let call = self.now();
        let answer = tokio::time::timeout(limit, client.send(&request)).await;
        let at = self.now();
        let outcome = match answer {
            Ok(Ok(answer)) => Outcome::Answered { at, answer },
            Ok(Err(status)) => {
                if request.at > 0 && !request.serializable && status.message() == "etcdserver: mvcc: required revision is a future revision"
                {
                    self.wrong(format!("a revision that had been seen is said to be still to come: {request:?}"));
                }
                *lock(&self.errors).entry(format!("{:?}: {}", status.code(), status.message())).or_default() += 1;
                if is_refusal(&status) { Outcome::Refused } else { Outcome::Unknown }
            }
            Err(_) => Outcome::Unknown,
        };
        let op = Op { client: number, member, start, call, request, outcome };
        lock(&self.ops).push(op.clone());
        (op.answer().is_some(), op)
    }

    /// A number for a client that nobody else has.
    pub fn client(&self) -> usize {
        self.clients.fetch_add(1, SeqCst) as usize
    }
}

/// Whether an error says for certain that nothing was done: there are too many requests, or nobody to send one to.
fn is_refusal(status: &tonic::Status) -> bool {
    status.code() == Code::ResourceExhausted
        || status.message() == "etcdserver: rpc not supported for learner"
        || (status.code() == Code::Unavailable && status.message() == "tcp connect error")
}

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
    holders: Vec<JoinHandle<Option<Held>>>,
}

impl Load {
    /// Starts it; `held` are the leases that were held when the load before this one ended.
    pub fn start(record: &Arc<Record>, urls: &[String; MEMBERS], held: Vec<Option<Held>>, rng: &mut StdRng) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        let holder = |held| {
            let clients = urls.each_ref().map(|url| Client::new(url));
            tokio::spawn(leases::hold(record.clone(), stop.clone(), clients, held, StdRng::from_rng(rng)))
        };
        let holders = held.into_iter().map(holder).collect();
        for (member, url) in urls.iter().enumerate() {
            for _ in 0..CLIENTS {
                let (record, stop, client) = (record.clone(), stop.clone(), Client::new(url));
                tasks.push(tokio::spawn(work(record, stop, member, client, StdRng::from_rng(rng))));
            }
        }
        Load { stop, tasks, holders }
    }

    /// Waits for all requests under way. Returns the leases that are still held.
    pub async fn finish(mut self) -> Vec<Option<Held>> {
        self.stop.store(true, SeqCst);
        for task in self.tasks.drain(..) {
            task.await.expect("a client does not panic");
        }
        let mut held = Vec::new();
        for holder in self.holders.drain(..) {
            held.push(holder.await.expect("a holder does not panic"));
        }
        held
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.holders.iter().for_each(JoinHandle::abort);
    }
}

async fn work(record: Arc<Record>, stop: Arc<AtomicBool>, member: usize, mut client: Client, mut rng: StdRng) {
    let number = record.client();
    // The newest revision of each key that the client knows of, for its swaps.
    let mut known: BTreeMap<String, i64> = BTreeMap::new();
    while !stop.load(SeqCst) {
        let request = choose(&mut rng, &known, || record.value());
        let limit = if rng.random_ratio(1, 6) { IMPATIENCE } else { PATIENCE };
        let (answered, op) = record.send(number, member, &mut client, request, limit).await;
        if let Some((_, answer)) = op.answer() {
            for (key, item) in op.request.reads.iter().zip(&answer.found) {
                known.insert(key.clone(), item.map_or(0, |item| item.modified));
            }
        }
        let rest = if answered { Duration::from_millis(rng.random_range(0..REST_MS)) } else { REST_AFTER_ERROR };
        tokio::time::sleep(rest).await;
    }
}

/// Watches at one member, from one revision on, for ever.
pub async fn witness(record: Arc<Record>, witness: usize, url: String, mut next: i64) {
    loop {
        let mut client = Client::new(&url);
        if let Ok(Ok(mut watching)) = tokio::time::timeout(STREAM_LIMIT, client.watch(scope(witness), next)).await {
            record.told(witness).push(Told::Opened(next));
            let mut ask = tokio::time::interval(ASK_INTERVAL);
            loop {
                let told = tokio::select! {
                    told = watching.next() => told,
                    _ = ask.tick() => {
                        watching.ask_for_progress();
                        continue;
                    }
                };
                match told {
                    Ok(Some(told)) => {
                        next = crate::checkers::watch::next_revision(std::slice::from_ref(&told), next);
                        record.told(witness).push(told);
                    }
                    Ok(None) => break,
                    Err(status) => {
                        if status.code() == Code::Aborted {
                            record.note(&format!("watcher {witness} at revision {next}: {}", status.message()));
                        }
                        break;
                    }
                }
            }
        }
        tokio::time::sleep(STREAM_RETRY).await;
    }
}

/// What a watcher was told of revisions up to `end`; the rest stays where it is.
pub fn told_upto(told: &mut Vec<Told>, end: i64) -> Vec<Told> {
    let mut upto = Vec::new();
    while !told.is_empty() {
        match &mut told[0] {
            Told::Progress(revision) if *revision > end => break,
            Told::Opened(next) if *next > end + 1 => break,
            Told::Events(header, events) if events.iter().any(|event| event.revision > end) => {
                let first: Vec<_> = events.extract_if(.., |event| event.revision <= end).collect();
                if !first.is_empty() {
                    upto.push(Told::Events(*header, first));
                }
                break;
            }
            _ => upto.push(told.remove(0)),
        }
    }
    upto
}
