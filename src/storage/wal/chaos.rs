//! Random histories against a plain model: appends, truncations, purges, votes; closed, killed, cut from power, failing syncs and
//! writes; then a byte flipped here or a file cut short there.
//!
//! The model is a list of steps. Whatever happens, the log opens again and is what the first *k* steps amount to, for a *k* that covers
//! everything acknowledged. And whichever byte of a closed log is changed, opening it either names the damage or finds the same log.

use super::sim::{Rng, SimDisk};
use super::tests::{entry, open, options};
use super::*;
use proptest::prelude::*;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::channel;

#[derive(Debug, Clone)]
enum Step {
    Entry(LogEntry),
    Truncate(Option<u64>),
    Purge(LogId),
    Vote(Bytes),
}

/// What the log amounts to, told as simply as can be.
#[derive(Debug, Clone, PartialEq, Default)]
struct Model {
    vote: Option<Bytes>,
    purged: Option<LogId>,
    last: Option<LogId>,
    entries: Vec<LogEntry>,
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Entry(entry) => {
                self.last = Some(entry.id);
                self.entries.push(entry.clone());
            }
            Step::Truncate(after) => {
                self.entries.retain(|entry| after.is_some_and(|after| entry.id.index <= after));
                self.last = self.entries.last().map(|entry| entry.id).or(self.purged);
            }
            Step::Purge(upto) => {
                if self.purged.is_none_or(|purged| purged.index < upto.index) {
                    self.purged = Some(*upto);
                    self.entries.retain(|entry| entry.id.index > upto.index);
                    self.last = self.entries.last().map(|entry| entry.id).or(self.purged);
                }
            }
            Step::Vote(vote) => self.vote = Some(vote.clone()),
        }
    }

    fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    fn of(wal: &Wal) -> Result<Model> {
        let state = wal.log_state();
        let entries = wal.entries(.., usize::MAX)?;
        assert_eq!(entries.len() as u64, state.next() - state.first);
        Ok(Model { vote: state.vote, purged: state.purged, last: state.last, entries })
    }
}

#[derive(Debug, Clone)]
enum Op {
    Append { count: u64, size: usize, new_term: bool },
    Truncate { back: u64 },
    Purge { part: u64 },
    PurgeBeyond { by: u64 },
    Vote(usize),
    Committed,
    Wait,
    Reopen,
    Kill,
    CutIn(u64),
    FailSyncIn(u64),
    FailWriteIn(u64),
    Flip,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (1u64..6, prop_oneof![8 => 0usize..200, 2 => 200usize..3000, 1 => 3000usize..20000], prop::bool::weighted(0.1))
            .prop_map(|(count, size, new_term)| Op::Append { count, size, new_term }),
        2 => (0u64..8).prop_map(|back| Op::Truncate { back }),
        2 => (0u64..5).prop_map(|part| Op::Purge { part }),
        1 => (1u64..5).prop_map(|by| Op::PurgeBeyond { by }),
        1 => (0usize..MAX_OPAQUE_BYTES).prop_map(Op::Vote),
        2 => Just(Op::Committed),
        3 => Just(Op::Wait),
        1 => Just(Op::Reopen),
        1 => Just(Op::Kill),
        2 => (0u64..25).prop_map(Op::CutIn),
        1 => (0u64..6).prop_map(Op::FailSyncIn),
        1 => (0u64..6).prop_map(Op::FailWriteIn),
        1 => Just(Op::Flip),
    ]
}

struct World {
    disk: Arc<SimDisk>,
    options: WalOptions,
    wal: Option<Wal>,
    /// What has happened since the model `base`, as far as the log accepted it.
    base: Model,
    steps: Vec<Step>,
    /// How many of the steps were acknowledged.
    acked: Arc<AtomicUsize>,
    now: Model,
    term: u64,
    committed: u64,
    rng: Rng,
}

impl World {
    fn new(seed: u64, segment_bytes: u64, cache_bytes: usize) -> World {
        let disk = SimDisk::new(seed);
        let options = WalOptions { cache_bytes, ..options(segment_bytes) };
        let wal = open(&disk, options.clone()).expect("a new log").0;
        World {
            disk,
            options,
            wal: Some(wal),
            base: Model::default(),
            steps: Vec::new(),
            acked: Arc::default(),
            now: Model::default(),
            term: 1,
            committed: 0,
            rng: Rng(seed ^ 1),
        }
    }

    fn wal(&self) -> &Wal {
        self.wal.as_ref().expect("open between operations")
    }

    /// A callback for all steps up to now and `more`.
    fn done(&self, more: usize) -> Done {
        let (acked, count) = (self.acked.clone(), self.steps.len() + more);
        Box::new(move |result| {
            if result.is_ok() {
                assert!(acked.fetch_max(count, Relaxed) <= count, "callbacks in order");
            }
        })
    }

    fn did(&mut self, result: Result<()>, steps: Vec<Step>) {
        match result {
            Ok(()) => {
                for step in steps {
                    self.now.apply(&step);
                    self.steps.push(step);
                }
            }
            Err(error) => {
                assert!(matches!(error, Error::Io { .. }), "{error}");
                self.reopen();
            }
        }
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Append { count, size, new_term } => {
                self.term += u64::from(new_term);
                let first = self.now.next();
                let payload = |rng: &mut Rng| {
                    let byte = rng.next() as u8;
                    Bytes::from(vec![byte; size])
                };
                let entries: Vec<_> = (first..first + count).map(|index| entry(self.term, index, payload(&mut self.rng))).collect();
                let result = self.wal().append(entries.clone(), self.done(entries.len()));
                self.did(result, entries.into_iter().map(Step::Entry).collect());
            }
            Op::Truncate { back } => {
                let lowest = self.now.purged.map(|purged| purged.index);
                let after = match self.now.next().checked_sub(back + 1) {
                    Some(index) => lowest.map_or(Some(index), |lowest| Some(lowest.max(index))),
                    None => lowest,
                };
                let result = self.wal().truncate_after(after, self.done(1));
                self.did(result, vec![Step::Truncate(after)]);
            }
            Op::Purge { part } => {
                if let Some(upto) = self.now.entries.get(self.now.entries.len() * part as usize / 5).map(|entry| entry.id) {
                    let result = self.wal().purge(upto, self.done(1));
                    self.did(result, vec![Step::Purge(upto)]);
                }
            }
            Op::PurgeBeyond { by } => {
                let upto = LogId { term: self.term, node: 1, index: self.now.next() + by };
                let result = self.wal().purge(upto, self.done(1));
                self.did(result, vec![Step::Purge(upto)]);
            }
            Op::Vote(size) => {
                let vote = Bytes::from(vec![self.rng.next() as u8; size]);
                let result = self.wal().save_vote(vote.clone(), self.done(1));
                self.did(result, vec![Step::Vote(vote)]);
            }
            Op::Committed => {
                let value = Bytes::copy_from_slice(&(self.committed + 1).to_le_bytes());
                if self.wal().save_committed(value).is_ok() {
                    self.committed += 1;
                }
            }
            Op::Wait => {
                let (sender, receiver) = channel();
                let done: Done = Box::new(move |result| {
                    let _ = sender.send(result);
                });
                let ended = match self.wal().append(vec![], done) {
                    Ok(()) => receiver.recv_timeout(Duration::from_secs(60)).expect("an answer"),
                    Err(error) => Err(error),
                };
                if ended.is_err() {
                    self.reopen();
                }
            }
            Op::Reopen => {
                let _ = self.wal().close();
                self.reopen();
            }
            Op::Kill => {
                self.disk.kill();
                self.reopen();
            }
            Op::CutIn(changes) => self.disk.cut_in(changes),
            Op::FailSyncIn(syncs) => self.disk.fail_sync_in(syncs),
            Op::FailWriteIn(writes) => self.disk.fail_write_in(writes),
            Op::Flip => self.flip(),
        }
        // What is accepted can be read at once, wherever it stands.
        if self.rng.below(3) == 0 && !self.disk.is_off() {
            match Model::of(self.wal()) {
                Ok(found) => assert_eq!(found, self.now),
                Err(error) => assert!(self.disk.is_off(), "{error}"),
            }
        }
    }

    /// Opens the log again, whatever happened to it, and finds out how much of it survived.
    fn reopen(&mut self) {
        self.wal = None;
        let (recovered, found) = loop {
            let was_off = self.disk.is_off();
            self.disk.power_on();
            if self.rng.below(4) == 0 {
                self.disk.cut_in(self.rng.below(12) as u64);
            }
            match open(&self.disk, self.options.clone()) {
                Ok((wal, recovered)) => match Model::of(&wal) {
                    Ok(found) => {
                        self.wal = Some(wal);
                        break (recovered, found);
                    }
                    Err(error) => assert!(self.disk.is_off(), "{error}"),
                },
                // The power went while it was opened.
                Err(Error::Io { .. }) if !was_off || self.disk.is_off() => {}
                Err(error) => panic!("refused to open after a mere crash: {error}"),
            }
        };
        let acked = self.acked.load(Relaxed);
        let mut model = self.base.clone();
        let mut fits = None;
        for count in 0..=self.steps.len() {
            if count > 0 {
                model.apply(&self.steps[count - 1]);
            }
            if count >= acked && model == found {
                fits = Some(count);
            }
        }
        assert!(fits.is_some(), "{acked} of {} steps were acknowledged, but none from there on gives {found:?}", self.steps.len());
        let committed = recovered.state.committed.map_or(0, |bytes| u64::from_le_bytes(bytes[..].try_into().expect("as saved")));
        assert!(committed <= self.committed);
        self.term = self.term.max(found.last.map_or(0, |last| last.term));
        self.base = found.clone();
        self.now = found;
        self.steps.clear();
        self.acked = Arc::default();
    }

    /// Closes the log, tries changes on copies of it, and opens it again.
    fn flip(&mut self) {
        let closed = self.wal().close();
        self.reopen();
        if closed.is_err() {
            return;
        }
        let _ = self.wal().close();
        if self.disk.is_off() || self.wal().failed().is_some() {
            return self.reopen();
        }
        for _ in 0..20 {
            let copy = self.disk.copy();
            let names = copy.names();
            let name = &names[self.rng.below(names.len())];
            let content = copy.content(name);
            // Most of a segment has no meaning; half of the flips aim at its first frames.
            let reach = if self.rng.below(2) == 0 { content.len() } else { content.len().min(600) };
            let at = self.rng.below(reach);
            let bit = 1 << self.rng.below(8);
            let cut = self.rng.below(8) == 0;
            if content.is_empty() {
                continue;
            }
            copy.tamper(name, |bytes| if cut { bytes.truncate(at) } else { bytes[at] ^= bit });
            match open(&copy, self.options.clone()) {
                Ok((wal, _)) => assert_eq!(Model::of(&wal).expect("readable"), self.now, "byte {at} of {name} changed, cut: {cut}"),
                Err(Error::Corrupt { .. } | Error::Format { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        self.reopen();
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_acknowledged_is_lost(
        ops in prop::collection::vec(op(), 1..80),
        seed in any::<u64>(),
        segment_bytes in prop_oneof![Just(4096u64), Just(16384), Just(65536)],
        cache_bytes in prop_oneof![Just(0usize), Just(2000), Just(1 << 20)],
    ) {
        let mut world = World::new(seed, segment_bytes, cache_bytes);
        for op in &ops {
            world.run(op);
        }
        world.disk.cut_now();
        world.reopen();
    }
}
