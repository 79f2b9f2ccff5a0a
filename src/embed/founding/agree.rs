//! The agreement itself: who founds the cluster, or which cluster is there to be joined. Pure logic, without a clock, a socket or a disk.
//!
//! [`Agreement`] is one node's part in it. It is told what happens ([`asked`](Agreement::asked), [`answered`](Agreement::answered),
//! [`tick`](Agreement::tick)) and returns what is to be done: [`Effect`]s, in the order in which they have to be carried out. The contract
//! with whoever runs it:
//!
//! - An effect begins when the one before it is done. [`Effect::Save`] is done when it is on disk; what stands behind it counts on that.
//! - Who cannot carry out a `Save` carries out nothing behind it, and throws this machine away: what it holds is ahead of the disk.
//! - Whatever else fails may be left undone. Messages may be lost, repeated, late and out of order.
//!
//! So a crash is a list of effects that was cut off anywhere, and the next life begins with what was saved last. Production, the exhaustive
//! model and the simulation (`tests/founding.rs`) run this very code.
//!
//! # One decision
//! It is Paxos for one value, a [`Decision`]. Its acceptors are the nodes that answer at the addresses of the JOIN list; any listed node may
//! propose. A node that belongs to a cluster answers everything with that, and takes no part in forming another: joining beats forming.
//!
//! ```text
//! a: Prepare(ballot)          ->  b, c: Promise, with what each has accepted before
//! a: Accept(ballot, decision) ->  b, c: Accepted                  (decision: the newest that was accepted before, or a's own)
//! a has a quorum: decided     ->  a is bound, tells b and c, who are bound, and say so to everyone who asks
//! ```
//!
//! # Joining
//! A node that belongs to a cluster says so, and who hears it joins that one, unless another answers as well: `join`.
//!
//! # Later
//! What becomes of a node that belongs to a cluster is in `enlist`: a client may be made a server.

use std::collections::BTreeMap;
use std::fmt;

use sha2::{Digest, Sha256};

mod enlist;
mod join;
mod message;

pub use self::enlist::{Grant, NodeStanding, Order, Refusal};
use self::join::Claims;
pub use self::join::JOIN_TICKS;
pub use self::message::{Answer, Ask};

/// Ticks between two rounds of questions to the listed nodes; messages of an attempt that were not answered are sent again as often.
pub const HELLO_TICKS: u64 = 2;

/// Ticks after which a node that has not been heard of does not count as there.
pub const FRESH_TICKS: u64 = 15;

/// Ticks that an attempt may take. Each that fails doubles the time for the next, four times at most: disks and links may be slow.
pub const ATTEMPT_TICKS: u64 = 20;

/// Ticks by which a node waits longer to propose than the one listed before it, so that usually one proposes.
pub const RANK_TICKS: u64 = 3;

/// The most entries that a JOIN list may have. Beyond it the configuration is refused: all of them are asked, all the time.
pub const JOIN_MAX: usize = 64;

/// A node: more exactly, its directory. Drawn at random when that is made, so that a node whose disk was wiped is another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u128);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A number for an attempt; no two attempts have the same, for no two nodes have the same id and each counts its own up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    pub round: u64,
    pub by: NodeId,
}

/// A node as it presents itself: what the others have to know of it, should it become a server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    pub node: NodeId,
    /// For people.
    pub name: String,
    pub peer_url: String,
    pub client_url: String,
}

/// What is decided, once for a JOIN list: a cluster, and who founds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decision {
    pub cluster: u128,
    /// One or three, as the list was made for.
    pub founders: Vec<Candidate>,
}

/// A cluster as it is told to others: the decision, and who its servers are now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Known {
    pub decision: Decision,
    /// How each of them is reached. At first these are the founders.
    pub servers: Vec<Candidate>,
    /// An entry of the log by which the servers were these, or 0 for the founders; of two sets the one with the higher entry is newer.
    pub as_of: u64,
}

/// What a node is for the life of its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It holds the data, and votes.
    Server,
    /// It calls the servers.
    Client,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Server => "server",
            Role::Client => "client",
        })
    }
}

/// What a node has on disk. See [`Effect::Save`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Unbound(Unbound),
    Bound {
        role: Role,
        known: Known,
    },
    /// It is a client that was enlisted: a server from its next start on, and no more than that until it votes.
    Enlisted {
        known: Known,
        grant: Grant,
    },
    /// It was a server, and was removed. It takes part in nothing any more.
    Removed {
        cluster: u128,
    },
}

/// The memory of an acceptor. That of a new node is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Unbound {
    /// The id of the JOIN list that `accepted` belongs to, and its entries.
    pub list: u128,
    pub entries: Vec<String>,
    /// The highest ballot that it takes part in; none lower.
    pub promised: Option<Ballot>,
    pub accepted: Option<(Ballot, Decision)>,
    /// The clusters that entries of the list have said they belong to, if they are two or more: none of them is joined.
    pub met: BTreeMap<String, u128>,
}

impl Unbound {
    /// Whether this node has agreed to that decision itself.
    pub fn has_accepted(&self, decision: &Decision) -> bool {
        self.accepted.as_ref().is_some_and(|(_, accepted)| accepted.cluster == decision.cluster)
    }
}

/// A JOIN list, as far as the agreement has to know it. The addresses themselves are the business of whoever sends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct List {
    /// Of the addresses, in whatever order, and the number of servers: nodes that are told the same have the same.
    pub id: u128,
    pub entries: Vec<String>,
    pub servers: usize,
    pub quorum: usize,
}

impl List {
    /// A list of addresses, each in its one spelling. The entries' places in it are what [`Effect::Ask`] names.
    pub fn new(entries: Vec<String>, servers: usize) -> List {
        let mut sorted: Vec<&String> = entries.iter().collect();
        sorted.sort();
        let mut hash = Sha256::new();
        hash.update((servers as u64).to_be_bytes());
        for entry in sorted {
            hash.update((entry.len() as u64).to_be_bytes());
            hash.update(entry);
        }
        let quorum = quorum(entries.len());
        List { id: first_u128(&hash.finalize()), entries, servers, quorum }
    }
}

/// How many of the listed nodes decide: any two such sets have at least two nodes in common (all of them, where there are no more than
/// three), so that one still remembers when another has lost its disk.
pub fn quorum(listed: usize) -> usize {
    listed.min((listed + 2).div_ceil(2))
}

/// What is to be done. See the [module's head](self) for the contract.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Put this on disk, in place of what was there.
    Save(State),
    /// Answer the question that was just asked.
    Answer(Answer),
    /// Ask the node at this place of the list.
    Ask { at: usize, ask: Ask },
    /// The node belongs to a cluster from now on.
    Bound,
    /// Somebody belongs to another cluster than this node does. Nothing is changed: it is for people to look at.
    Conflict { ours: u128, theirs: u128 },
}

/// How a listed node stands, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Nothing was heard of it, or not lately.
    Silent,
    /// It is there, and ready.
    Ready(Candidate),
    /// This node itself.
    Own,
    /// It belongs to a cluster.
    Member { cluster: u128 },
    /// It has another list, of so many entries for so many servers.
    OtherList { name: String, listed: usize, servers: usize },
    /// It has the same entries, for another number of servers.
    OtherServers { name: String, servers: usize },
    /// It was removed from a cluster, and does not count.
    Removed,
    /// It is the same node as another entry.
    Twice,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Seen {
    standing: Standing,
    first: u64,
    last: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Attempt {
    ballot: Ballot,
    began: u64,
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// What each has promised, by its place in the list.
    Prepare(BTreeMap<usize, (Candidate, Option<(Ballot, Decision)>)>),
    Accept(Decision, BTreeMap<usize, NodeId>),
}

/// One node's part. See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Agreement {
    me: Candidate,
    list: List,
    state: State,
    /// Where in the list this node is: the place from which its own answer came.
    own: Option<usize>,
    /// It has answered from two places: two addresses are one node, or two nodes have copies of one directory. It must not propose then.
    own_twice: bool,
    seen: BTreeMap<usize, Seen>,
    claims: Claims,
    attempt: Option<Attempt>,
    failures: u32,
    /// The highest round heard of.
    round: u64,
    now: u64,
    ready_since: Option<u64>,
    quiet_until: u64,
    /// It was enlisted before this life began, and is a server in it.
    serves: bool,
}

impl Agreement {
    /// A node's part, with what its disk holds. A new directory is [`State::Unbound`] with neither promise nor decision.
    ///
    /// A node that has accepted a decision under another list keeps that list until it is bound: what it has agreed to may have been
    /// decided. [`list`](Self::list) tells which one counts.
    pub fn new(me: Candidate, list: List, state: State) -> Agreement {
        let join = list.entries.clone();
        let mut list = list;
        let mut state = state;
        let serves = matches!(state, State::Enlisted { .. });
        if let State::Unbound(unbound) = &mut state {
            if unbound.accepted.is_some() && unbound.list != list.id {
                let servers = unbound.accepted.as_ref().map_or(1, |(_, decision)| decision.founders.len());
                let quorum = quorum(unbound.entries.len());
                list = List { id: unbound.list, entries: unbound.entries.clone(), servers, quorum };
            } else {
                unbound.list = list.id;
                unbound.entries = list.entries.clone();
            }
        }
        let mut agreement = Agreement {
            me,
            list,
            state,
            own: None,
            own_twice: false,
            seen: BTreeMap::new(),
            claims: Claims::default(),
            attempt: None,
            failures: 0,
            round: 0,
            now: 0,
            ready_since: None,
            quiet_until: 0,
            serves,
        };
        agreement.recall(&join);
        agreement
    }

    /// This node.
    pub fn me(&self) -> &Candidate {
        &self.me
    }

    /// The list that counts.
    pub fn list(&self) -> &List {
        &self.list
    }

    /// As it is on disk, once the effects are carried out.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The cluster, once the node belongs to one.
    pub fn bound(&self) -> Option<(Role, &Known)> {
        match &self.state {
            State::Bound { role, known } => Some((*role, known)),
            State::Enlisted { known, .. } => Some((if self.serves { Role::Server } else { Role::Client }, known)),
            _ => None,
        }
    }

    /// How each entry of the list stands.
    pub fn standings(&self) -> Vec<Standing> {
        let all = 0..self.list.entries.len();
        all.map(|at| match (self.seen.get(&at), self.claims.at(at)) {
            _ if self.own == Some(at) => Standing::Own,
            (_, Some(cluster)) => Standing::Member { cluster },
            (Some(seen), _) if self.is_fresh(seen) => seen.standing.clone(),
            _ => Standing::Silent,
        })
        .collect()
    }

    /// How many must be ready before founding begins.
    pub fn needed(&self) -> usize {
        self.list.quorum.max(self.list.servers)
    }

    /// Whether the node itself is at two places of the list.
    pub fn is_twice(&self) -> bool {
        self.own_twice
    }

    /// All that the outcome can depend on: what is left out only decides when something is tried. For the exhaustive model, which tries
    /// everything at all times.
    #[doc(hidden)]
    pub fn essence(&self) -> impl std::hash::Hash + '_ {
        (&self.me.node, &self.state, self.own, self.round, &self.attempt, self.serves, self.claims.essence())
    }

    fn is_fresh(&self, seen: &Seen) -> bool {
        self.now.saturating_sub(seen.last) <= FRESH_TICKS
    }

    fn unbound(&mut self) -> Option<&mut Unbound> {
        match &mut self.state {
            State::Unbound(unbound) => Some(unbound),
            _ => None,
        }
    }

    // ---- As the one who is asked

    /// Somebody asks.
    pub fn asked(&mut self, ask: &Ask) -> Vec<Effect> {
        let who = self.me.node;
        match &self.state {
            State::Bound { .. } | State::Enlisted { .. } if matches!(ask, Ask::Present { .. }) => self.present_member(),
            State::Bound { .. } | State::Enlisted { .. } if matches!(ask, Ask::Enlist { .. }) => self.enlist(ask),
            State::Bound { known, .. } | State::Enlisted { known, .. } => {
                let mut effects = vec![Effect::Answer(Answer::Bound { who, known: known.clone() })];
                if let Ask::Decided { decision } = ask
                    && decision.cluster != known.decision.cluster
                {
                    effects.push(Effect::Conflict { ours: known.decision.cluster, theirs: decision.cluster });
                }
                effects
            }
            State::Removed { .. } => vec![Effect::Answer(Answer::Removed { who })],
            State::Unbound(unbound) => match ask {
                // Who belongs to no cluster is no server of one either, whoever says so.
                Ask::Hello | Ask::Present { .. } | Ask::Enlist { .. } | Ask::Order { .. } => vec![self.present()],
                Ask::Prepare { list, .. } | Ask::Accept { list, .. } if *list != self.list.id => vec![self.present()],
                Ask::Prepare { .. } | Ask::Accept { .. } if !self.claims.is_empty() => vec![self.present()],
                // What it has agreed to itself it is a part of, whatever else it has heard.
                Ask::Decided { decision }
                    if !unbound.has_accepted(decision) && self.clusters().keys().any(|heard| *heard != decision.cluster) =>
                {
                    vec![self.present()]
                }
                Ask::Prepare { ballot, .. } => self.prepare(*ballot),
                Ask::Accept { ballot, decision, .. } => self.accept(*ballot, decision),
                Ask::Decided { decision } => {
                    let known = Known { decision: decision.clone(), servers: decision.founders.clone(), as_of: 0 };
                    let mut effects = self.bind(known.clone());
                    effects.push(Effect::Answer(Answer::Bound { who, known }));
                    effects
                }
            },
        }
    }

    fn present(&self) -> Effect {
        let (listed, servers) = (self.list.entries.len(), self.list.servers);
        Effect::Answer(Answer::Unbound { who: self.me.clone(), list: self.list.id, listed, servers })
    }

    fn prepare(&mut self, ballot: Ballot) -> Vec<Effect> {
        let who = self.me.clone();
        self.hear_of(ballot);
        let Some(unbound) = self.unbound() else { return Vec::new() };
        if let Some(promised) = unbound.promised.filter(|promised| *promised > ballot) {
            return vec![Effect::Answer(Answer::Refused { who: who.node, ballot, promised })];
        }
        let mut effects = Vec::new();
        let accepted = unbound.accepted.clone();
        if unbound.promised != Some(ballot) {
            unbound.promised = Some(ballot);
            effects.push(Effect::Save(self.state.clone()));
        }
        effects.push(Effect::Answer(Answer::Promise { who, ballot, accepted }));
        effects
    }

    fn accept(&mut self, ballot: Ballot, decision: &Decision) -> Vec<Effect> {
        let who = self.me.node;
        self.hear_of(ballot);
        let Some(unbound) = self.unbound() else { return Vec::new() };
        if let Some(promised) = unbound.promised.filter(|promised| *promised > ballot) {
            return vec![Effect::Answer(Answer::Refused { who, ballot, promised })];
        }
        let mut effects = Vec::new();
        if unbound.accepted.as_ref().is_none_or(|(accepted, _)| *accepted != ballot) {
            unbound.promised = Some(ballot);
            unbound.accepted = Some((ballot, decision.clone()));
            effects.push(Effect::Save(self.state.clone()));
        }
        effects.push(Effect::Answer(Answer::Accepted { who, ballot }));
        effects
    }

    /// Somebody else's attempt is under way: it is given the time to come to its end.
    fn hear_of(&mut self, ballot: Ballot) {
        self.round = self.round.max(ballot.round);
        if ballot.by != self.me.node {
            self.quiet_until = self.quiet_until.max(self.now + ATTEMPT_TICKS / 2 + self.jitter(ATTEMPT_TICKS / 2));
        }
    }

    // ---- As the one who asks

    /// The node at a place of the list has answered.
    pub fn answered(&mut self, at: usize, answer: Answer) -> Vec<Effect> {
        let mut effects = self.take(at, answer);
        effects.extend(self.remember());
        effects
    }

    fn take(&mut self, at: usize, answer: Answer) -> Vec<Effect> {
        if answer.who() == self.me.node {
            self.own_twice |= self.own.is_some_and(|own| own != at);
            self.own = Some(at);
            self.seen.remove(&at);
            self.claims.hear(at, self.now, false);
            return Vec::new();
        }
        self.claims.hear(at, self.now, !matches!(answer, Answer::Unbound { .. } | Answer::Removed { .. }));
        match answer {
            Answer::Bound { known, .. } => return self.claim(at, known),
            Answer::Unbound { who, list, listed, servers } => {
                let standing = if list == self.list.id {
                    Standing::Ready(who)
                } else if List::new(self.list.entries.clone(), servers).id == list {
                    Standing::OtherServers { name: who.name, servers }
                } else {
                    Standing::OtherList { name: who.name, listed, servers }
                };
                self.note(at, standing);
            }
            Answer::Removed { .. } => self.note(at, Standing::Removed),
            Answer::Refused { ballot, promised, .. } => {
                self.round = self.round.max(promised.round);
                if self.attempt.as_ref().is_some_and(|attempt| attempt.ballot == ballot) {
                    self.give_up();
                }
            }
            Answer::Promise { who, ballot, accepted } => {
                if let Some(Attempt { ballot: ours, phase: Phase::Prepare(promises), .. }) = &mut self.attempt
                    && *ours == ballot
                {
                    // What an entry has said first stays: if its disk was wiped since, it knew more then.
                    promises.entry(at).or_insert((who, accepted));
                    return self.look_at_promises();
                }
            }
            Answer::Accepted { who, ballot } => {
                if let Some(Attempt { ballot: ours, phase: Phase::Accept(_, accepted), .. }) = &mut self.attempt
                    && *ours == ballot
                {
                    accepted.insert(at, who);
                    return self.look_at_accepted();
                }
            }
            // Nothing that is asked for founding is answered so.
            Answer::Present { .. } | Answer::Enlisted { .. } | Answer::Ordered { .. } => {}
        }
        Vec::new()
    }

    fn note(&mut self, at: usize, standing: Standing) {
        let now = self.now;
        let node = |standing: &Standing| match standing {
            Standing::Ready(who) => Some(who.node),
            _ => None,
        };
        // One node at two addresses counts once.
        let twice =
            self.seen.iter().any(|(&other, seen)| other != at && node(&standing).is_some() && node(&seen.standing) == node(&standing));
        let standing = if twice { Standing::Twice } else { standing };
        let first = match self.seen.get(&at) {
            Some(seen) if node(&seen.standing) == node(&standing) => seen.first,
            _ => now,
        };
        self.seen.insert(at, Seen { standing, first, last: now });
    }

    /// A tenth of a second or so has passed.
    pub fn tick(&mut self) -> Vec<Effect> {
        self.now += 1;
        if !matches!(self.state, State::Unbound(_)) {
            return Vec::new();
        }
        let mut effects = Vec::new();
        if self.now % HELLO_TICKS == 1 {
            effects.extend(self.others().map(|at| Effect::Ask { at, ask: Ask::Hello }));
            effects.extend(self.again());
        }
        if !self.claims.is_empty() {
            // Joining beats forming.
            self.ready_since = None;
            if self.have_all_spoken() {
                effects.extend(self.settle());
            }
            return effects;
        }
        let limit = ATTEMPT_TICKS << self.failures.min(4);
        if self.attempt.as_ref().is_some_and(|attempt| self.now.saturating_sub(attempt.began) > limit) {
            self.give_up();
        }
        if self.attempt.is_some() {
            return effects;
        }
        let Some(rank) = self.rank() else {
            self.ready_since = None;
            return effects;
        };
        let since = *self.ready_since.get_or_insert(self.now);
        if self.now >= since + rank * RANK_TICKS && self.now >= self.quiet_until {
            effects.extend(self.propose());
        }
        effects
    }

    /// How many that are ready are listed before this node; none when too few are.
    fn rank(&self) -> Option<u64> {
        let own = self.own.filter(|_| !self.own_twice)?;
        let ready = |(at, seen): (&usize, &Seen)| (self.is_fresh(seen) && matches!(seen.standing, Standing::Ready(_))).then_some(*at);
        let ready: Vec<usize> = self.seen.iter().filter_map(ready).filter(|at| *at != own).collect();
        (ready.len() + 1 >= self.needed()).then(|| ready.iter().filter(|at| **at < own).count() as u64)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.own;
        (0..self.list.entries.len()).filter(move |at| Some(*at) != own)
    }

    /// The messages of the attempt that were not answered.
    fn again(&self) -> Vec<Effect> {
        let Some(attempt) = &self.attempt else { return Vec::new() };
        let missing = |has: &dyn Fn(usize) -> bool, ask: Ask| {
            self.others().filter(|at| !has(*at)).map(|at| Effect::Ask { at, ask: ask.clone() }).collect()
        };
        let (list, ballot) = (self.list.id, attempt.ballot);
        match &attempt.phase {
            Phase::Prepare(promises) => missing(&|at| promises.contains_key(&at), Ask::Prepare { list, ballot }),
            Phase::Accept(decision, accepted) => {
                missing(&|at| accepted.contains_key(&at), Ask::Accept { list, ballot, decision: decision.clone() })
            }
        }
    }

    fn give_up(&mut self) {
        self.attempt = None;
        self.failures = self.failures.saturating_add(1);
        self.quiet_until = self.now + 1 + self.jitter(ATTEMPT_TICKS);
    }

    /// A number below `limit` that differs from node to node and from time to time, and is the same in each run of a simulation.
    fn jitter(&self, limit: u64) -> u64 {
        let mut mixed = (self.me.node.0 as u64) ^ self.now.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    /// Begins an attempt. [`tick`](Self::tick) calls it when enough nodes are ready; it is harmless at any other time.
    pub fn propose(&mut self) -> Vec<Effect> {
        let (me, round, began) = (self.me.clone(), self.round, self.now);
        let Some(own) = self.own.filter(|_| !self.own_twice) else { return Vec::new() };
        let Some(unbound) = self.unbound() else { return Vec::new() };
        let round = unbound.promised.map_or(0, |promised| promised.round).max(round).saturating_add(1);
        let ballot = Ballot { round, by: me.node };
        // Saved before anyone hears of it, so that it is never used again.
        unbound.promised = Some(ballot);
        let promises = BTreeMap::from([(own, (me, unbound.accepted.clone()))]);
        self.round = round;
        self.attempt = Some(Attempt { ballot, began, phase: Phase::Prepare(promises) });
        let mut effects = vec![Effect::Save(self.state.clone())];
        effects.extend(self.again());
        effects.extend(self.look_at_promises());
        effects
    }

    fn look_at_promises(&mut self) -> Vec<Effect> {
        let quorum = self.list.quorum;
        let Some(Attempt { ballot, phase: Phase::Prepare(promises), .. }) = &self.attempt else { return Vec::new() };
        let (ballot, me) = (*ballot, self.me.node);
        if !are_enough(promises.values().map(|(who, _)| who.node), quorum) {
            return Vec::new();
        }
        let before = promises.values().filter_map(|(_, accepted)| accepted.as_ref()).max_by_key(|(ballot, _)| *ballot);
        let decision = before.map(|(_, decision)| decision.clone()).or_else(|| self.choose(ballot, promises));
        let (Some(decision), Some(own)) = (decision, self.own) else {
            self.give_up();
            return Vec::new();
        };
        let Some(unbound) = self.unbound() else { return Vec::new() };
        if unbound.promised != Some(ballot) {
            // It has promised itself to somebody else's attempt meanwhile.
            self.give_up();
            return Vec::new();
        }
        unbound.accepted = Some((ballot, decision.clone()));
        if let Some(attempt) = &mut self.attempt {
            attempt.phase = Phase::Accept(decision, BTreeMap::from([(own, me)]));
        }
        let mut effects = vec![Effect::Save(self.state.clone())];
        effects.extend(self.again());
        effects.extend(self.look_at_accepted());
        effects
    }

    /// The founders, when there is a choice: those who have promised, the first seen first, and in the order of the list.
    fn choose(&self, ballot: Ballot, promises: &BTreeMap<usize, (Candidate, Option<(Ballot, Decision)>)>) -> Option<Decision> {
        let first = |at: &usize| if self.own == Some(*at) { 0 } else { self.seen.get(at).map_or(u64::MAX, |seen| seen.first) };
        let mut order: Vec<(u64, usize, &Candidate)> = promises.iter().map(|(at, (who, _))| (first(at), *at, who)).collect();
        order.sort();
        let mut founders: Vec<Candidate> = Vec::new();
        for (_, _, who) in order {
            // Two that say they are reached at one address cannot both be servers.
            if founders.len() < self.list.servers && !founders.iter().any(|other| other.peer_url == who.peer_url) {
                founders.push(who.clone());
            }
        }
        founders.sort();
        (founders.len() == self.list.servers).then(|| Decision { cluster: cluster_of(ballot), founders })
    }

    fn look_at_accepted(&mut self) -> Vec<Effect> {
        let Some(Attempt { phase: Phase::Accept(decision, accepted), .. }) = &self.attempt else { return Vec::new() };
        if !are_enough(accepted.values().copied(), self.list.quorum) {
            return Vec::new();
        }
        let decision = decision.clone();
        let mut effects = self.bind(Known { decision: decision.clone(), servers: decision.founders.clone(), as_of: 0 });
        effects.extend(self.others().map(|at| Effect::Ask { at, ask: Ask::Decided { decision: decision.clone() } }));
        effects
    }

    // ---- The cluster

    /// Somebody who belongs to a cluster has said so.
    pub fn learn(&mut self, known: Known) -> Vec<Effect> {
        match &mut self.state {
            State::Unbound(_) => self.bind(known),
            State::Bound { known: ours, .. } | State::Enlisted { known: ours, .. } if ours.decision.cluster != known.decision.cluster => {
                vec![Effect::Conflict { ours: ours.decision.cluster, theirs: known.decision.cluster }]
            }
            State::Bound { known: ours, .. } | State::Enlisted { known: ours, .. }
                if ours.as_of < known.as_of && !known.servers.is_empty() =>
            {
                *ours = known;
                vec![Effect::Save(self.state.clone())]
            }
            State::Bound { .. } | State::Enlisted { .. } | State::Removed { .. } => Vec::new(),
        }
    }

    fn bind(&mut self, known: Known) -> Vec<Effect> {
        let is_ours = |all: &[Candidate]| all.iter().any(|one| one.node == self.me.node);
        // A founder that has slept while the others have put somebody else in its place does not come back as if nothing had happened.
        let role = if is_ours(&known.decision.founders) && is_ours(&known.servers) { Role::Server } else { Role::Client };
        self.state = State::Bound { role, known };
        self.attempt = None;
        self.claims = Claims::default();
        vec![Effect::Save(self.state.clone()), Effect::Bound]
    }

    /// This node was a server, and was removed from the cluster; or it was enlisted and put out before it has voted: then it is a client again.
    pub fn removed(&mut self) -> Vec<Effect> {
        self.serves = false;
        self.state = match &self.state {
            State::Bound { known, .. } => State::Removed { cluster: known.decision.cluster },
            State::Enlisted { known, .. } => State::Bound { role: Role::Client, known: known.clone() },
            _ => return Vec::new(),
        };
        vec![Effect::Save(self.state.clone())]
    }
}

/// Whether these answers, each from another place of the list, are from so many different nodes.
fn are_enough(nodes: impl Iterator<Item = NodeId>, quorum: usize) -> bool {
    let mut nodes: Vec<NodeId> = nodes.collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes.len() >= quorum
}

/// The id of the cluster that an attempt would found: no other attempt has the same.
fn cluster_of(ballot: Ballot) -> u128 {
    let mut hash = Sha256::new();
    hash.update(b"quorate cluster");
    hash.update(ballot.round.to_be_bytes());
    hash.update(ballot.by.0.to_be_bytes());
    first_u128(&hash.finalize())
}

fn first_u128(digest: &[u8]) -> u128 {
    digest.iter().take(16).fold(0, |id, byte| id << 8 | u128::from(*byte))
}

/// A node for tests, each with an address of its own.
#[cfg(test)]
pub(crate) fn candidate(node: u128) -> Candidate {
    let url = |port| format!("http://10.0.0.{node}:{port}");
    Candidate { node: NodeId(node), name: format!("n{node}"), peer_url: url(5707), client_url: url(5706) }
}
