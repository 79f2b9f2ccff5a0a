//! Founding under a seed: start orders, partitions, loss, delay, repetition, crashes between any two effects, and one wiped disk.
//!
//! A run has two parts. First the network and the nodes are treated badly for some hundred ticks. Then the harm ends, but only for a set of
//! nodes that is just sufficient: the others stay down. By the limit all nodes of that set belong to one cluster, and in no part of
//! the run does any node belong to another. Nothing but the seed decides: the same seed has the same trace, to the byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use quorate::embed::founding::agree::{Agreement, Answer, Ask, Candidate, Effect, List, NodeId, Role, State, Unbound, quorum};

/// Ticks after the end of the harm within which all that are up must be bound.
const PATIENCE: u64 = 2_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

enum Message {
    Ask {
        from: usize,
        ask: Ask,
    },
    /// From an address of the list.
    Answer {
        at: usize,
        answer: Answer,
    },
}

/// A machine, with its disk. The first ones are listed, in the order of the list; the others know the list and are not in it.
struct Machine {
    id: NodeId,
    disk: Option<State>,
    running: Option<Agreement>,
    /// When it starts, or starts again.
    starts: u64,
    role: Option<Role>,
}

struct Sim {
    random: Random,
    list: List,
    listed: usize,
    machines: Vec<Machine>,
    /// By when they are due, and a running number.
    wire: BTreeMap<(u64, u64), (usize, Message)>,
    sent: u64,
    now: u64,
    /// Machines on different sides do not hear each other.
    side: Vec<u8>,
    loss: u64,
    crash: u64,
    delay: u64,
    wipes: u64,
    clusters: BTreeSet<u128>,
    founders: BTreeMap<u128, Vec<Candidate>>,
    trace: String,
    saves: u64,
    crashes: u64,
}

/// What a seed came to.
pub struct Outcome {
    pub trace: String,
    pub listed: usize,
    pub saves: u64,
    pub crashes: u64,
    pub wiped: bool,
    /// Ticks from the end of the harm to the last node's being bound.
    pub took: u64,
    pub wrong: Option<String>,
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut random = Random(seed);
        let listed = 1 + random.below(5) as usize;
        let unlisted = random.below(3) as usize;
        let servers = if listed >= 3 && random.percent(80) { 3 } else { 1 };
        let entries = (0..listed).map(|at| format!("node-{at}:5707")).collect();
        let list = List::new(entries, servers);
        let mut machines = Vec::new();
        for _ in 0..listed + unlisted {
            let id = NodeId(u128::from(random.next()));
            let starts = if random.percent(50) { random.below(10) } else { random.below(300) };
            machines.push(Machine { id, disk: None, running: None, starts, role: None });
        }
        let mut sim = Sim {
            loss: [0, 5, 20, 50][random.below(4) as usize],
            crash: [0, 1, 5, 20][random.below(4) as usize],
            delay: [1, 3, 30][random.below(3) as usize],
            // A store of one listed node has nobody who would remember.
            wipes: u64::from(listed > 1 && random.percent(60)),
            side: vec![0; machines.len()],
            random,
            list,
            listed,
            machines,
            wire: BTreeMap::new(),
            sent: 0,
            now: 0,
            clusters: BTreeSet::new(),
            founders: BTreeMap::new(),
            trace: String::new(),
            saves: 0,
            crashes: 0,
        };
        let (loss, crash, delay) = (sim.loss, sim.crash, sim.delay);
        sim.say(format_args!("{listed} listed, {unlisted} not, {servers} servers, loss {loss} %, crashes {crash} %, delay to {delay}"));
        sim
    }

    fn say(&mut self, what: std::fmt::Arguments<'_>) {
        writeln!(self.trace, "{:>5} {what}", self.now).unwrap();
    }

    fn candidate(&self, at: usize) -> Candidate {
        let name = format!("node-{at}");
        Candidate { node: self.machines[at].id, peer_url: format!("http://{name}:5707"), client_url: format!("http://{name}:5706"), name }
    }

    fn start(&mut self, at: usize) {
        let empty = || State::Unbound(Unbound::default());
        let state = self.machines[at].disk.clone().unwrap_or_else(empty);
        self.say(format_args!("{at} starts"));
        self.machines[at].running = Some(Agreement::new(self.candidate(at), self.list.clone(), state));
    }

    fn stop(&mut self, at: usize, pause: u64) {
        self.crashes += 1;
        self.machines[at].running = None;
        self.machines[at].starts = self.now + 1 + self.random.below(pause);
        self.say(format_args!("{at} crashes"));
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        let copies = if self.random.percent(self.loss) { 0 } else { 1 + u64::from(self.random.percent(self.loss / 4)) };
        for _ in 0..copies {
            let due = self.now + self.random.below(self.delay);
            self.sent += 1;
            // Who is cut off when it is sent does not get it; delay makes up for those cut off later.
            if self.side[from] == self.side[to] {
                let message = match &message {
                    Message::Ask { from, ask } => Message::Ask { from: *from, ask: ask.clone() },
                    Message::Answer { at, answer } => Message::Answer { at: *at, answer: answer.clone() },
                };
                self.wire.insert((due, self.sent), (to, message));
            }
        }
    }

    /// Carries out what a machine wants done, and may cut it off before, in the midst of, or after each piece.
    fn carry(&mut self, at: usize, asker: Option<usize>, effects: Vec<Effect>) {
        for effect in effects {
            if matches!(effect, Effect::Save(_)) && self.random.percent(self.crash) {
                if self.random.percent(50) {
                    self.save(at, effect);
                }
                self.stop(at, 50);
                return;
            }
            match effect {
                Effect::Save(_) => self.save(at, effect),
                Effect::Ask { at: to, ask } => self.send(at, to, Message::Ask { from: at, ask }),
                Effect::Answer(answer) => {
                    if let Some(asker) = asker {
                        self.send(at, asker, Message::Answer { at, answer });
                    }
                }
                Effect::Bound => {}
                Effect::Conflict { ours, theirs } => self.clusters.extend([ours, theirs]),
            }
        }
    }

    fn save(&mut self, at: usize, effect: Effect) {
        let Effect::Save(state) = effect else { return };
        self.saves += 1;
        match &state {
            State::Unbound(unbound) => {
                let (promised, accepted) = (unbound.promised.map(|ballot| ballot.round), unbound.accepted.is_some());
                self.say(format_args!("{at} saves a promise of {promised:?}, accepted: {accepted}"));
            }
            State::Bound { role, known } => {
                self.say(format_args!("{at} is a {role} of {:032x}", known.decision.cluster));
                self.clusters.insert(known.decision.cluster);
                self.founders.insert(known.decision.cluster, known.decision.founders.clone());
                self.machines[at].role.get_or_insert(*role);
            }
            // Nobody enlists or removes anyone here.
            State::Enlisted { .. } | State::Removed { .. } => {}
        }
        self.machines[at].disk = Some(state);
    }

    fn tick(&mut self) {
        self.now += 1;
        let mut order: Vec<usize> = (0..self.machines.len()).collect();
        self.random.shuffle(&mut order);
        for at in order {
            if self.machines[at].running.is_none() && self.machines[at].starts <= self.now {
                self.start(at);
            }
            if let Some(running) = &mut self.machines[at].running {
                let effects = running.tick();
                self.carry(at, None, effects);
            }
        }
        while let Some(entry) = self.wire.first_entry()
            && entry.key().0 <= self.now
        {
            let (to, message) = entry.remove();
            let Some(running) = &mut self.machines[to].running else { continue };
            match message {
                Message::Ask { from, ask } => {
                    let effects = running.asked(&ask);
                    self.carry(to, Some(from), effects);
                }
                Message::Answer { at, answer } => {
                    let effects = running.answered(at, answer);
                    self.carry(to, None, effects);
                }
            }
        }
    }

    fn harm(&mut self) {
        if self.random.percent(5) {
            for at in 0..self.machines.len() {
                self.side[at] = self.random.below(2) as u8;
            }
            self.say(format_args!("cut: {:?}", self.side.clone()));
        } else if self.random.percent(5) {
            self.side.fill(0);
        }
        if self.random.percent(self.crash) {
            let at = self.random.below(self.machines.len() as u64) as usize;
            if self.machines[at].running.is_some() {
                self.stop(at, 100);
            }
        }
        if self.wipes > 0 && self.random.percent(2) {
            self.wipes -= 1;
            self.wipe();
        }
    }

    fn wipe(&mut self) {
        let at = self.random.below(self.listed as u64) as usize;
        let id = NodeId(u128::from(self.random.next()));
        let starts = self.now + self.random.below(50);
        self.machines[at] = Machine { id, disk: None, running: None, starts, role: None };
        self.say(format_args!("the disk of {at} is wiped"));
    }

    /// The end of the harm, for a sufficient set: a quorum of the listed nodes, or, if there is a cluster, one of its nodes.
    fn heal(&mut self) -> Vec<usize> {
        let mut listed: Vec<usize> = (0..self.listed).collect();
        self.random.shuffle(&mut listed);
        listed.truncate(quorum(self.listed).max(self.list.servers));
        let mut up = listed;
        up.extend(self.listed..self.machines.len());
        up.sort_unstable();
        self.say(format_args!("healed for {up:?}"));
        self.side.fill(0);
        (self.loss, self.crash, self.delay) = (0, 0, 2);
        for at in 0..self.machines.len() {
            if up.contains(&at) {
                self.machines[at].starts = self.machines[at].starts.min(self.now + 20);
            } else {
                self.machines[at].running = None;
                self.machines[at].starts = u64::MAX;
            }
        }
        up
    }

    /// What must hold at all times.
    fn check(&self) -> Option<String> {
        if self.clusters.len() > 1 {
            return Some(format!("{} clusters from one list", self.clusters.len()));
        }
        for (cluster, founders) in &self.founders {
            if founders.len() != self.list.servers {
                return Some(format!("{cluster:032x} has {} founders", founders.len()));
            }
        }
        for (at, machine) in self.machines.iter().enumerate() {
            if let (Some(State::Bound { role, known }), Some(first)) = (&machine.disk, machine.role) {
                if *role != first {
                    return Some(format!("{at} was a {first} and is a {role}"));
                }
                if (*role == Role::Server) != known.decision.founders.iter().any(|founder| founder.node == machine.id) {
                    return Some(format!("{at} is a {role}, against the decision"));
                }
            }
        }
        None
    }
}

pub fn run(seed: u64) -> Outcome {
    let mut sim = Sim::new(seed);
    let harm = 50 + sim.random.below(400);
    let mut wrong = None;
    for _ in 0..harm {
        sim.harm();
        sim.tick();
        wrong = wrong.or_else(|| sim.check());
    }
    let wiped = sim.listed > 1 && sim.trace.contains("wiped");
    let up = sim.heal();
    let healed = sim.now;
    let is_bound = |sim: &Sim, at: usize| matches!(sim.machines[at].disk, Some(State::Bound { .. }));
    while wrong.is_none() && !up.iter().all(|at| is_bound(&sim, *at)) {
        sim.tick();
        wrong = sim.check();
        if wrong.is_none() && sim.now - healed > PATIENCE {
            let missing: Vec<_> = up.iter().filter(|at| !is_bound(&sim, **at)).collect();
            wrong = Some(format!("{missing:?} of {up:?} are not bound {PATIENCE} ticks after the harm has ended"));
        }
    }
    let Sim { trace, listed, saves, crashes, .. } = sim;
    Outcome { took: sim.now - healed, trace, listed, saves, crashes, wiped, wrong }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn seeds_found_one_cluster() {
    let seeds = number("FOUNDING_SEEDS").unwrap_or(2_000);
    let began = std::time::Instant::now();
    let (mut wiped, mut saves, mut crashes, mut took, mut failed) = (0, 0, 0, Vec::new(), 0);
    let mut by_size = [0; 6];
    for seed in 0..seeds {
        let outcome = run(seed);
        if let Some(wrong) = &outcome.wrong {
            failed += 1;
            println!("seed {seed}: {wrong}\n  FOUNDING_SEED={seed} cargo test --test founding one_seed -- --nocapture");
        }
        wiped += u64::from(outcome.wiped);
        saves += outcome.saves;
        crashes += outcome.crashes;
        took.push(outcome.took);
        by_size[outcome.listed] += 1;
    }
    took.sort_unstable();
    let per_seed = began.elapsed() / seeds.max(1) as u32;
    println!(
        "{seeds} seeds ({per_seed:?} each; of 1 to 5 listed nodes: {:?}), {wiped} with a wiped disk, {crashes} crashes, {saves} saves: {failed} failed",
        &by_size[1..]
    );
    println!("ticks from the end of the harm until all are bound: median {}, most {}", took[took.len() / 2], took[took.len() - 1]);
    assert_eq!(failed, 0);
}

/// One seed again, to be looked at.
#[test]
fn one_seed() {
    let seed = number("FOUNDING_SEED").unwrap_or(7);
    let outcome = run(seed);
    println!("{}", outcome.trace);
    assert_eq!(outcome.wrong, None, "seed {seed}");
}

#[test]
fn the_same_seed_has_the_same_trace() {
    for seed in [1, 2, 3, 77, 1234] {
        assert_eq!(run(seed).trace, run(seed).trace, "seed {seed}");
    }
}
