//! A dead server is replaced by itself, after a time: [`EmbedConfig::replace_after`], which is off by default.
//!
//! The server that leads counts for how long it has not heard of each other one. When that is long enough it asks the nodes that it knows of, those
//! in its `JOIN` first, and does with the first that is eligible what [`Node::replace`](super::Node::replace) does:
//!
//! ```text
//! n3 is not heard of        n1, which leads, counts
//! ... for replace_after     asked: 10.0.0.4, no node answers; 10.0.0.5, a client of this cluster: it is enlisted in the place of n3
//! n5 is started again       n5 has the log: n3 goes by the change by which n5 comes
//! or n5 never comes         it is put out after enlist_timeout; n3 is a server as before, and others are tried before n5
//! ```
//!
//! A client that is not in the servers' `JOIN` makes itself known to each of them every now and then, if it has a `replace_after`, too. A server
//! that was started again knows nobody but those in its `JOIN`, until they have.
//!
//! # Invariants
//! - [`decide`] decides. It begins nothing but in a cluster of three servers, of which two others are heard of at that moment, one of them being
//!   the leader itself; nothing while the members are being changed; and nothing sooner after another than `replace_after`.
//! - What was counted is of one leader in one term, without a break: while it does not hear of a quorum, or was stopped itself, it counts
//!   nothing, and begins anew afterwards. For it is then that it may be the one who is cut off.
//! - Nothing is removed before who comes votes. What may be is looked at again as for every order: see [`members`](super::members).
//! - A client that was enlisted and did not come, whoever had it enlisted, is left alone for twice `replace_after`, then twice as long each time, an
//!   hour at most. It is tried again then if nobody else is there who has failed less often: its host may have been away.
//!
//! # Caveats
//! - What is known of failures is this server's own, since it was started: another one that leads may try the same client once more.
//! - A server that comes back once a client is enlisted in its place is replaced all the same, if that client comes. Until then it votes.
//! - The order among clients is that of their addresses as texts. It is the same for every server, and means nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Fuse, join_all};
use tokio::time::Instant;

use super::config::EmbedConfig;
use super::founding::agree::{Ask, Candidate, NodeId};
use super::founding::drive::{Caller, Driver};
use super::members::{enlisted_node, enlisting, known_by, nodes_of, present};
use super::moved::ask;
use super::secure::speaks_tls;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::node::ReplacementFigures;
use crate::node::members::enlist::{Heard, Hearing, Listed, reason};
use crate::server::Server;

/// How often the leader looks who is heard of.
const LOOK: Duration = Duration::from_millis(500);

/// A look that comes so late has not been counted up to: this process stood still, and what it has not heard is its own doing.
const GAP_MAX: Duration = Duration::from_secs(5);

/// How often the candidates are asked, while a server is to be replaced.
const ASK_INTERVAL: Duration = Duration::from_secs(5);

/// How often the log is told that nobody can take a dead server's place.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

/// How many servers there are where one is replaced: of one there would be nobody left to do it, and other numbers come by hand alone.
const SERVERS: usize = 3;

/// The longest time for which a client that did not come is left alone. Whatever is begun, `replace_after` is waited for besides.
const BACK_OFF_MAX: Duration = Duration::from_secs(3600);

/// Clients that did not come, and are remembered. Beyond it the one that may be tried soonest is forgotten: it is tried as if it were new.
const FAILED_MAX: usize = 64;

/// How often at most, and how seldom, a client makes itself known to every server. In between it does so in thirds of its own `replace_after`: who
/// was started anew, and counts anew, has heard of it by the time at which it may replace anybody, also when one word was lost.
const INTRODUCE_MIN: Duration = Duration::from_secs(2);
const INTRODUCE_MAX: Duration = Duration::from_secs(30);

// ---- What is decided

/// What there is to be known for a decision.
#[derive(Clone, Copy)]
struct Facts<'a> {
    after: Duration,
    /// For how long this server has led and heard of a quorum, without a break; none if it does not now.
    counted: Option<Duration>,
    is_changing: bool,
    /// How long ago this server has begun a replacement, or may have.
    last: Option<Duration>,
    voters: &'a BTreeMap<u64, Heard>,
    /// Those that were asked, in their order. None: nobody was asked yet.
    asked: Option<&'a [Asked]>,
}

/// A node that was asked whether it may be enlisted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    /// `host:port`.
    place: String,
    /// Who it is, or why it may not be.
    found: std::result::Result<Candidate, String>,
}

/// Why nothing is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    NotLeading,
    NotThree,
    AllHeard,
    NoQuorum,
    Changing,
    TooSoon,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    Rest(Rest),
    /// This server is to be replaced: ask who may take its place.
    Ask(u64),
    /// By this one of those that were asked.
    Enlist {
        gone: u64,
        by: usize,
    },
    /// Nobody may; why, for each.
    Nobody {
        gone: u64,
        why: Vec<String>,
    },
}

/// How often a client did not come, and for how long yet it is left alone for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    times: u32,
    left: Duration,
}

/// Decides. `record` says what is known of a client.
fn decide(facts: Facts<'_>, record: impl Fn(NodeId) -> Record) -> Decision {
    let Facts { after, counted, is_changing, last, voters, asked } = facts;
    let Some(counted) = counted else { return Decision::Rest(Rest::NotLeading) };
    if voters.len() != SERVERS {
        return Decision::Rest(Rest::NotThree);
    }
    let silent = |heard: &Heard| heard.ago.map_or(counted, |ago| ago.min(counted));
    let overdue = voters.iter().filter(|(_, heard)| !heard.lately && silent(heard) >= after);
    let Some((&gone, _)) = overdue.max_by_key(|(_, heard)| silent(heard)) else { return Decision::Rest(Rest::AllHeard) };
    if !has_quorum(voters) {
        return Decision::Rest(Rest::NoQuorum);
    }
    if is_changing {
        return Decision::Rest(Rest::Changing);
    }
    if last.is_some_and(|last| last < after) {
        return Decision::Rest(Rest::TooSoon);
    }
    let Some(asked) = asked else { return Decision::Ask(gone) };
    // How often it has failed, or why it may not be.
    let judge = |asked: &Asked| {
        let Record { times, left } = record(asked.found.as_ref().map_err(Clone::clone)?.node);
        if left.is_zero() {
            return Ok(times);
        }
        let (place, left) = (&asked.place, left.as_secs() + 1);
        Err(format!("the node at {place} did not come when it was enlisted, or could not be: it is left alone for {left}s yet"))
    };
    let judged: Vec<std::result::Result<u32, String>> = asked.iter().map(judge).collect();
    let may = judged.iter().enumerate().filter_map(|(by, judged)| Some((*judged.as_ref().ok()?, by)));
    match may.min() {
        Some((_, by)) => Decision::Enlist { gone, by },
        None => Decision::Nobody { gone, why: judged.into_iter().filter_map(std::result::Result::err).collect() },
    }
}

/// Whether those that are heard of are a majority.
fn has_quorum(voters: &BTreeMap<u64, Heard>) -> bool {
    voters.values().filter(|heard| heard.lately).count() > voters.len() / 2
}

/// For how long this server has led, and heard of a quorum, without a break.
#[derive(Default)]
struct Count {
    /// The term, since when, and when that was looked at last.
    of: Option<(u64, Instant, Instant)>,
}

impl Count {
    fn look(&mut self, now: Instant, hearing: Option<&Hearing>) -> Option<Duration> {
        let Some(hearing) = hearing.filter(|hearing| has_quorum(&hearing.voters)) else {
            self.of = None;
            return None;
        };
        let since = match self.of {
            Some((term, since, last)) if term == hearing.term && now.duration_since(last) < GAP_MAX => since,
            _ => now,
        };
        self.of = Some((hearing.term, since, now));
        Some(now.duration_since(since))
    }
}

/// The clients that were enlisted and did not come.
#[derive(Default)]
struct Failures {
    /// Those that are enlisted, and do not vote yet.
    waiting: BTreeSet<NodeId>,
    /// How often each has failed without having come in between, and until when it is left alone.
    failed: BTreeMap<NodeId, (u32, Instant)>,
}

impl Failures {
    /// Looks at those that are enlisted now, and whether they vote: who waited, and is not there any more, was put out.
    fn look(&mut self, now: Instant, after: Duration, enlisted: &BTreeMap<NodeId, bool>) {
        self.failed.retain(|node, _| enlisted.get(node) != Some(&true));
        let out: Vec<NodeId> = self.waiting.iter().copied().filter(|node| !enlisted.contains_key(node)).collect();
        for node in out {
            self.note(now, after, node);
        }
        self.waiting = enlisted.iter().filter(|(_, votes)| !**votes).map(|(&node, _)| node).collect();
    }

    fn note(&mut self, now: Instant, after: Duration, node: NodeId) {
        let times = self.failed.get(&node).map_or(0, |(times, _)| *times).saturating_add(1);
        self.failed.insert(node, (times, now + back_off(times, after)));
        if self.failed.len() > FAILED_MAX
            && let Some(soonest) = self.failed.iter().min_by_key(|(_, (_, until))| *until).map(|(&node, _)| node)
        {
            self.failed.remove(&soonest);
        }
    }

    fn record(&self, now: Instant, node: NodeId) -> Record {
        let record = |(times, until): &(u32, Instant)| Record { times: *times, left: until.saturating_duration_since(now) };
        self.failed.get(&node).map(record).unwrap_or_default()
    }
}

fn back_off(times: u32, after: Duration) -> Duration {
    after.saturating_mul(1 << times.min(16)).min(BACK_OFF_MAX)
}

/// The client that this server has had enlisted last, or may have, until it votes or is put out; and whether it was seen to be enlisted.
#[derive(Default)]
struct Attempt(Option<(NodeId, bool)>);

/// What an attempt has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Begun,
    Failed,
}

impl Attempt {
    /// Looks at those that are enlisted now, and whether they vote.
    fn look(&mut self, enlisted: &BTreeMap<NodeId, bool>) -> Option<Turn> {
        let (node, is_seen) = self.0?;
        let votes = enlisted.get(&node);
        if votes.is_some() || is_seen {
            self.0 = votes.filter(|votes| !**votes).map(|_| (node, true));
        }
        match votes {
            Some(_) if !is_seen => Some(Turn::Begun),
            None if is_seen => Some(Turn::Failed),
            _ => None,
        }
    }
}

/// The places of those that may be asked, each `host:port`: the entries of JOIN, then the nodes that have made themselves known. Not among them are
/// this node and the members, but for where the one is that goes: there may be a node by now whose disk is new.
fn places(join: &[String], met: &[Candidate], own: NodeId, taken: &BTreeSet<String>, members: &BTreeSet<NodeId>) -> Vec<String> {
    let mut listed: Vec<String> = join.iter().filter(|place| !taken.contains(*place)).cloned().collect();
    listed.sort();
    let met = met.iter().filter(|who| who.node != own && !members.contains(&who.node)).map(|who| place(&who.peer_url).to_owned());
    let mut met: Vec<String> = met.filter(|place| !taken.contains(place) && !listed.contains(place)).collect();
    met.sort();
    met.dedup();
    listed.into_iter().chain(met).collect()
}

/// Where a URL leads to, `host:port`.
fn place(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, place)| place)
}

// ---- What is told

/// How it stands, for the health page and the metrics.
#[derive(Debug, Default)]
pub(super) struct Notice {
    after: Option<Duration>,
    told: Mutex<Told>,
}

#[derive(Clone, Debug, Default)]
struct Told {
    begun: u64,
    failed: u64,
    /// The server that is to be replaced, and why nobody can take its place.
    wanted: Option<(String, Vec<String>)>,
}

impl Notice {
    pub fn new(after: Option<Duration>) -> Arc<Notice> {
        Arc::new(Notice { after, told: Mutex::default() })
    }

    /// Null where nothing is replaced by itself. See [`Node::health_json`](super::Node::health_json).
    pub fn to_json(&self) -> serde_json::Value {
        let Some(after) = self.after else { return serde_json::Value::Null };
        let Told { begun, failed, wanted } = lock(&self.told).clone();
        let wanted = wanted.map(|(server, refused)| serde_json::json!({ "server": server, "refused": refused }));
        serde_json::json!({ "afterSeconds": after.as_secs_f64(), "begun": begun, "failed": failed, "wanted": wanted })
    }

    fn change(&self, server: &Server, change: impl FnOnce(&mut Told)) {
        let figures = {
            let mut told = lock(&self.told);
            change(&mut told);
            ReplacementFigures { begun: told.begun, failed: told.failed, is_wanting: told.wanted.is_some() }
        };
        server.metrics().counters.node.set_replacements(figures);
    }
}

// ---- Of a server

/// As the leader, replaces servers that were not heard of for too long; see the module's head.
pub(super) async fn as_server(server: &Server, driver: &Driver, config: &EmbedConfig, notice: &Notice) {
    let Some(after) = config.replace_after else { return std::future::pending().await };
    notice.change(server, |_| {});
    let (mut count, mut failures, mut attempt) = (Count::default(), Failures::default(), Attempt::default());
    let mut last: Option<Instant> = None;
    let (mut asked_at, mut told_at): (Option<Instant>, Option<Instant>) = (None, None);
    // Beside the looks, for each may take longer than the time between two of them. There is one of either at most.
    let (mut asking, mut entering) = (pin!(Fuse::terminated()), pin!(Fuse::terminated()));
    let mut is_busy = false;
    loop {
        let mut answers: Option<Vec<Asked>> = None;
        let mut outcome: Option<(Candidate, u64, Result<bool>)> = None;
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            found = &mut asking => (answers, is_busy) = (Some(found), false),
            done = &mut entering => (outcome, is_busy) = (Some(done), false),
        }
        let now = Instant::now();
        let listed = server.node().listed().1;
        let enlisted = enlisted(&listed);
        failures.look(now, after, &enlisted);
        match attempt.look(&enlisted) {
            None => {}
            Some(Turn::Begun) => notice.change(server, |told| told.begun += 1),
            Some(Turn::Failed) => {
                notice.change(server, |told| told.failed += 1);
                tracing::warn!(
                    "a server that is dead is not replaced: the client that was enlisted in its place has not come, or was put out"
                );
            }
        }
        if let Some((who, gone, done)) = outcome {
            let (name, node) = (name(server, gone), who.node);
            match done {
                Ok(true) => {
                    (last, attempt) = (Some(now), Attempt(Some((node, false))));
                    tracing::warn!(server = name, by = %who.peer_url, "a server was not heard of for {after:?}: a client is enlisted in its place, and has to be started again");
                }
                // Somebody else leads.
                Ok(false) => {}
                Err(Error::Ineligible { reason, what }) => {
                    // What is wrong with the client itself passes less soon than what is wrong with the moment.
                    if [reason::ALREADY_MEMBER, reason::ADDRESS_TAKEN].contains(&&*reason) {
                        failures.note(now, after, node);
                    }
                    tracing::debug!(server = name, by = %who.peer_url, reason, what, "replacing a server by itself");
                    notice.change(server, |told| told.wanted = Some((name, vec![format!("{reason}: {what}")])));
                }
                Err(err) => {
                    // It may have been made: then it is seen.
                    (last, attempt) = (Some(now), Attempt(Some((node, false))));
                    tracing::warn!(server = name, by = %who.peer_url, error = %err, "it is not known whether a server is being replaced");
                }
            }
            continue;
        }
        let hearing = server.node().hearing();
        let counted = count.look(now, hearing.as_ref());
        let (term, is_changing, voters) = hearing.map_or_else(Default::default, |now| (now.term, now.is_changing, now.voters));
        let ago = |at: Option<Instant>| at.map(|at| now.duration_since(at));
        let facts = Facts { after, counted, is_changing, last: ago(last), voters: &voters, asked: answers.as_deref() };
        match decide(facts, |node| failures.record(now, node)) {
            Decision::Rest(Rest::TooSoon) => {}
            Decision::Rest(_) => {
                if lock(&notice.told).wanted.is_some() {
                    notice.change(server, |told| told.wanted = None);
                }
            }
            Decision::Ask(gone) => {
                if !is_busy && ago(asked_at).is_none_or(|ago| ago >= ASK_INTERVAL) {
                    (asked_at, is_busy) = (Some(now), true);
                    asking.set(ask_all(driver, config.peer_port, candidates(driver, &config.join, &listed, gone)).fuse());
                }
            }
            Decision::Enlist { gone, by } => {
                if let Some(who) = answers.into_iter().flatten().nth(by).and_then(|asked| asked.found.ok()) {
                    is_busy = true;
                    entering.set(enter(server, who, gone, term).fuse());
                }
            }
            Decision::Nobody { gone, why } => {
                let name = name(server, gone);
                if ago(told_at).is_none_or(|ago| ago >= TELL_INTERVAL) {
                    told_at = Some(now);
                    tracing::warn!(server = name, refused = ?why, "a server was not heard of for {after:?}, and no client can take its place");
                }
                notice.change(server, |told| told.wanted = Some((name, why)));
            }
        }
    }
}

/// Which nodes were enlisted, and whether they vote.
fn enlisted(listed: &BTreeMap<u64, Listed>) -> BTreeMap<NodeId, bool> {
    listed.values().filter_map(|listed| Some((enlisted_node(listed)?, listed.votes))).collect()
}

/// A member as people know it.
fn name(server: &Server, id: u64) -> String {
    let members = server.client().last_members();
    let name = members.iter().find(|member| member.id == id).map_or("", |member| &member.name);
    format!("{name} ({id:x})")
}

/// Where those are that may be asked: as many as there may be in JOIN, at most, and as many that the desk remembers.
fn candidates(driver: &Driver, join: &[String], listed: &BTreeMap<u64, Listed>, gone: u64) -> Vec<String> {
    let Some(known) = known_by(driver) else { return Vec::new() };
    let others = listed.iter().filter(|(id, _)| **id != gone);
    let urls = others.flat_map(|(_, listed)| &listed.member.peer_urls).chain([&driver.me().peer_url]);
    let taken = urls.map(|url| place(url).to_owned()).collect();
    let nodes = nodes_of(&known.decision, listed);
    let members = listed.keys().filter_map(|id| nodes.get(id).copied()).collect();
    let mut met = driver.desk().met(known.decision.cluster);
    met.retain(|who| speaks_tls(&who.peer_url) == driver.is_tls());
    places(join, &met, driver.node(), &taken, &members)
}

async fn ask_all(driver: &Driver, port: u16, places: Vec<String>) -> Vec<Asked> {
    let asked = places.into_iter().map(|place| async move {
        let found = present(driver, port, &place).await.map_err(|err| match err {
            Error::Ineligible { reason, what } => format!("{reason}: {what}"),
            err => format!("{place}: {err}"),
        });
        Asked { place, found }
    });
    join_all(asked.collect::<Vec<_>>()).await
}

async fn enter(server: &Server, who: Candidate, gone: u64, term: u64) -> (Candidate, u64, Result<bool>) {
    let done = server.node().enlist_in_term(enlisting(vec![who.clone()], vec![gone], false), term).await;
    (who, gone, done)
}

// ---- Of a client

/// Makes this node known to all servers, so that whoever leads may enlist it.
pub(super) async fn as_client(driver: &Driver, config: &EmbedConfig) {
    let Some(after) = config.replace_after else { return std::future::pending().await };
    let often = (after / 3).clamp(INTRODUCE_MIN, INTRODUCE_MAX);
    let mut retry = INTRODUCE_MIN;
    let mut progress = driver.progress();
    let mut callers: BTreeMap<String, Caller> = BTreeMap::new();
    loop {
        progress.borrow_and_update();
        let mut all_have_heard = false;
        if let Some(known) = known_by(driver) {
            let from = Some((known.decision.cluster, driver.me().clone()));
            let asked = known.servers.into_iter().map(|server| {
                let caller = callers.remove(&server.peer_url).unwrap_or_else(|| driver.caller(server.peer_url));
                ask(caller, Ask::Present { from: from.clone() })
            });
            let answers = join_all(asked.collect::<Vec<_>>()).await;
            all_have_heard = answers.iter().all(|(_, answer)| answer.is_some());
            // The ways to servers that are none any more are given up with this.
            callers = answers.into_iter().map(|(caller, _)| (caller.url().to_owned(), caller)).collect();
        }
        // One that is silent is tried sooner, and less and less so: it is likely to be dead.
        let pause = if all_have_heard { often } else { retry };
        retry = if all_have_heard { INTRODUCE_MIN } else { (2 * retry).min(often) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = progress.changed() => match changed {
                // The servers are others now, or elsewhere.
                Ok(()) => retry = INTRODUCE_MIN,
                Err(_) => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(180);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn heard(ago: u64) -> Heard {
        Heard { lately: ago == 0, ago: Some(seconds(ago)) }
    }

    const NEVER: Heard = Heard { lately: false, ago: None };

    /// 1 leads; the others were heard of so long ago.
    fn voters(others: &[Heard]) -> BTreeMap<u64, Heard> {
        [heard(0)].iter().chain(others).enumerate().map(|(at, heard)| (at as u64 + 1, *heard)).collect()
    }

    fn client(node: u128) -> Asked {
        let url = |port| format!("http://10.0.0.{node}:{port}");
        let who = Candidate { node: NodeId(node), name: format!("n{node}"), peer_url: url(5707), client_url: url(5706) };
        Asked { place: place(&who.peer_url).to_owned(), found: Ok(who) }
    }

    fn none(node: u128, why: &str) -> Asked {
        Asked { found: Err(why.into()), ..client(node) }
    }

    /// Nothing is begun unless everything speaks for it.
    #[test]
    fn a_server_is_replaced_when_it_is_sure_to_be_dead() {
        use Rest::*;
        let (dead, long) = (heard(200), Some(seconds(500)));
        let asks = Decision::Ask(3);
        let rest = Decision::Rest;
        for (others, counted, is_changing, last, wanted) in [
            // All is well, or not for long enough yet.
            (&[heard(0), heard(0)][..], long, false, None, rest(AllHeard)),
            (&[heard(0), heard(179)], long, false, None, rest(AllHeard)),
            (&[heard(0), heard(180)], long, false, None, asks.clone()),
            (&[heard(0), dead], long, false, None, asks.clone()),
            (&[dead, heard(0)], long, false, None, Decision::Ask(2)),
            // As this leader has counted, whatever it has heard before; one that was never heard of it has missed since it counts.
            (&[heard(0), dead], Some(seconds(179)), false, None, rest(AllHeard)),
            (&[heard(0), dead], Some(AFTER), false, None, asks.clone()),
            (&[heard(0), NEVER], Some(seconds(179)), false, None, rest(AllHeard)),
            (&[heard(0), NEVER], Some(AFTER), false, None, asks.clone()),
            // It does not lead, or is cut off itself.
            (&[heard(0), dead], None, false, None, rest(NotLeading)),
            (&[dead, dead], long, false, None, rest(NoQuorum)),
            (&[heard(2), dead], long, false, None, rest(NoQuorum)),
            (&[NEVER, NEVER], long, false, None, rest(NoQuorum)),
            // One at a time, and not one after the other.
            (&[heard(0), dead], long, true, None, rest(Changing)),
            (&[heard(0), dead], long, false, Some(seconds(179)), rest(TooSoon)),
            (&[heard(0), dead], long, false, Some(AFTER), asks.clone()),
            (&[heard(0), dead], long, true, Some(seconds(500)), rest(Changing)),
            // Other numbers of servers are left alone.
            (&[], long, false, None, rest(NotThree)),
            (&[dead], long, false, None, rest(NotThree)),
            (&[heard(0), heard(0), dead], long, false, None, rest(NotThree)),
            (&[heard(0), heard(0), dead, dead], long, false, None, rest(NotThree)),
        ] {
            let voters = voters(others);
            let facts = Facts { after: AFTER, counted, is_changing, last, voters: &voters, asked: None };
            assert_eq!(decide(facts, |_| Record::default()), wanted, "{others:?} {counted:?} {is_changing} {last:?}");
            // Whoever could come changes nothing about that.
            let all = [client(4)];
            let with = decide(Facts { asked: Some(&all), ..facts }, |_| Record::default());
            match wanted {
                Decision::Ask(gone) => assert_eq!(with, Decision::Enlist { gone, by: 0 }),
                other => assert_eq!(with, other),
            }
        }
    }

    #[test]
    fn the_first_that_may_takes_the_place() {
        let voters = voters(&[heard(0), heard(200)]);
        let enlist = |by| Decision::Enlist { gone: 3, by };
        let nobody = |why: &[&str]| Decision::Nobody { gone: 3, why: why.iter().map(|why| (*why).to_owned()).collect() };
        let rests_4 = "the node at 10.0.0.4:5707 did not come when it was enlisted, or could not be: it is left alone for 61s yet";
        let rests_5 = rests_4.replace(".4:", ".5:");
        // How often each has failed, and for how many seconds it is left alone.
        for (asked, failed, wanted) in [
            (&[client(4), client(5)][..], &[][..], enlist(0)),
            (&[none(4, "silent"), client(5)], &[], enlist(1)),
            (&[client(4), client(5)], &[(4, 1, 60)], enlist(1)),
            (&[client(4), none(5, "silent"), client(6)], &[(4, 1, 60)], enlist(2)),
            // Who may be tried again is tried after all who have failed less often.
            (&[client(4), client(5)], &[(4, 1, 0)], enlist(1)),
            (&[client(4), client(5), client(6)], &[(4, 2, 0), (5, 1, 0), (6, 1, 0)], enlist(1)),
            (&[client(4), client(5), client(6)], &[(4, 2, 0), (5, 1, 60), (6, 3, 0)], enlist(0)),
            (&[client(4), none(5, "silent")], &[(4, 7, 0)], enlist(0)),
            (&[], &[], nobody(&[])),
            (&[none(4, "silent"), none(5, "a server")], &[], nobody(&["silent", "a server"])),
            (&[client(4), client(5)], &[(4, 1, 60), (5, 2, 60)], nobody(&[rests_4, &rests_5])),
            (&[client(4), none(5, "silent")], &[(4, 1, 60)], nobody(&[rests_4, "silent"])),
        ] {
            let facts = Facts { after: AFTER, counted: Some(AFTER), is_changing: false, last: None, voters: &voters, asked: Some(asked) };
            let record = |node: NodeId| {
                let failed = failed.iter().find(|(failed, ..)| *failed == node.0);
                failed.map_or_else(Record::default, |&(_, times, left)| Record { times, left: seconds(left) })
            };
            assert_eq!(decide(facts, record), wanted, "{asked:?} {failed:?}");
        }
    }

    #[test]
    fn what_is_counted_is_without_a_break() {
        let start = Instant::now();
        let hearing = |term, others: &[Heard]| Some(Hearing { term, is_changing: false, voters: voters(others) });
        let (well, alone) = (&[heard(0), NEVER], &[NEVER, heard(2)]);
        let mut count = Count::default();
        for (at_ms, hearing, wanted) in [
            (0, None, None),
            (500, hearing(1, well), Some(0)),
            (1000, hearing(1, well), Some(500)),
            (4000, hearing(1, &[heard(0), heard(0)]), Some(3500)),
            (6000, hearing(1, well), Some(5500)),
            // It hears of nobody, and then of one again: nothing of what was before counts.
            (6500, hearing(1, alone), None),
            (7000, hearing(1, well), Some(0)),
            (7500, hearing(1, well), Some(500)),
            // It has lost the lead and has it again, unnoticed but for the term.
            (8000, hearing(3, well), Some(0)),
            (9000, hearing(3, well), Some(1000)),
            (9500, None, None),
            (10_000, hearing(3, well), Some(0)),
            (14_999, hearing(3, well), Some(4999)),
            // It was stopped.
            (19_999, hearing(3, well), Some(0)),
            (20_000, hearing(3, well), Some(1)),
        ] {
            let counted = count.look(start + Duration::from_millis(at_ms), hearing.as_ref());
            assert_eq!(counted, wanted.map(Duration::from_millis), "{at_ms} {hearing:?}");
        }
    }

    #[test]
    fn who_did_not_come_is_left_alone_for_longer_each_time() {
        let start = Instant::now();
        let mut failures = Failures::default();
        let mut look = |at: u64, enlisted: &[(u128, bool)]| {
            let now = start + seconds(at);
            let enlisted = enlisted.iter().map(|&(node, votes)| (NodeId(node), votes)).collect();
            failures.look(now, AFTER, &enlisted);
            let Record { times, left } = failures.record(now, NodeId(4));
            (times, left.as_secs())
        };
        assert_eq!(look(0, &[(4, false)]), (0, 0));
        assert_eq!(look(300, &[]), (1, 360));
        assert_eq!(look(659, &[(5, false)]), (1, 1));
        assert_eq!(look(660, &[(5, true)]), (1, 0));
        // Again, twice as long, and so on, up to an hour.
        for (at, times, left) in [(1000, 2, 720), (2000, 3, 1440), (4000, 4, 2880), (8000, 5, 3600), (12_000, 6, 3600)] {
            assert_eq!(look(at, &[(4, false), (5, true)]).0, times - 1);
            assert_eq!(look(at, &[(5, true)]), (times, left), "{at}");
        }
        // It comes at last: what was is forgotten, also when it is removed later.
        look(16_000, &[(4, false)]);
        assert_eq!(look(16_001, &[(4, true)]), (0, 0));
        assert_eq!(look(16_002, &[]), (0, 0));
        look(16_003, &[(4, false)]);
        assert_eq!(look(16_004, &[]), (1, 360));
        // As many are remembered as may be, those that rest longest.
        for node in 100..200 {
            failures.note(start + seconds(20_000), AFTER, NodeId(node));
        }
        assert_eq!(failures.failed.len(), FAILED_MAX);
        assert_eq!([back_off(1, seconds(7200)), back_off(9, Duration::MAX)], [BACK_OFF_MAX; 2]);
        assert_eq!(back_off(u32::MAX, Duration::from_millis(1)), Duration::from_millis(65_536));
    }

    #[test]
    fn an_attempt_is_counted_once_it_is_seen() {
        use Turn::*;
        let mut attempt = Attempt::default();
        let mut look = |begin: bool, enlisted: &[(u128, bool)]| {
            if begin {
                attempt = Attempt(Some((NodeId(4), false)));
            }
            attempt.look(&enlisted.iter().map(|&(node, votes)| (NodeId(node), votes)).collect())
        };
        let steps: [(bool, &[(u128, bool)], Option<Turn>); 13] = [
            (false, &[(4, false)], None),
            // It does not come.
            (true, &[(4, false)], Some(Begun)),
            (false, &[(4, false), (5, true)], None),
            (false, &[(5, true)], Some(Failed)),
            (false, &[], None),
            // It comes. What becomes of it later is no matter of this.
            (true, &[(4, false)], Some(Begun)),
            (false, &[(4, true)], None),
            (false, &[(4, false)], None),
            (false, &[], None),
            // It was not known whether it was made, and it is seen late; it votes by then.
            (true, &[], None),
            (false, &[], None),
            (false, &[(4, true)], Some(Begun)),
            (false, &[], None),
        ];
        for (at, (begin, enlisted, wanted)) in steps.into_iter().enumerate() {
            assert_eq!(look(begin, enlisted), wanted, "{at}");
        }
    }

    #[test]
    fn those_are_asked_that_may_be_there() {
        let who = |node: u128| client(node).found.unwrap();
        let at = |node: u128| client(node).place;
        // 1 is this node, 2 and 3 are servers, 3 is dead; 2 is met at another address than the members have.
        let (join, taken) = ([5, 3, 1, 2, 4].map(at), [1, 2].map(at).into());
        let moved = Candidate { peer_url: "http://10.0.0.22:5707".into(), ..who(2) };
        let met = [who(4), who(9), moved, who(1), who(8), Candidate { node: NodeId(80), ..who(8) }];
        let members = [1, 2, 3].map(NodeId).into();
        let asked = places(&join, &met, NodeId(1), &taken, &members);
        assert_eq!(asked, [3, 4, 5, 8, 9].map(at));
    }

    #[test]
    fn health_says_who_is_wanted() {
        assert!(Notice::default().to_json().is_null());
        let notice = Notice::new(Some(AFTER));
        let json = notice.to_json();
        assert!(json["afterSeconds"] == 180.0 && json["begun"] == 0 && json["failed"] == 0 && json["wanted"].is_null(), "{json}");
        lock(&notice.told).wanted = Some(("n3 (abc)".into(), vec!["Unreachable: no node answers".into()]));
        let json = notice.to_json();
        assert!(json["wanted"]["server"] == "n3 (abc)" && json["wanted"]["refused"][0] == "Unreachable: no node answers", "{json}");
    }
}
