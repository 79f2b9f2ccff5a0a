//! Changing who the servers are: from one server to three, another in a dead one's place, one less.
//!
//! ```no_run
//! # async fn change(node: &quorate::embed::Node) -> Result<(), quorate::Error> {
//! node.grow(&["10.0.0.2", "10.0.0.3"]).await?; // of one server: three
//! node.replace("node-3", "10.0.0.4").await?; // node-3 is dead
//! node.remove("node-1").await?;
//! # Ok(())
//! # }
//! ```
//!
//! Any node takes such an order; one that is a client hands it to a server. That looks whether it may be (below), and has it written into the
//! servers' log. From then on it is carried out by itself, by whoever leads, whoever is started again in between:
//!
//! ```text
//! order         the servers' log            the nodes that are to be servers
//! grow b c      b, c enlisted, no votes     told, on disk: a server from the next start on; until then a client
//!                                           started again: b and c fetch the data
//!               a, b, c vote, in one change servers; all others hear of them
//! ```
//!
//! A node's role does not change while it runs, so *the host starts an enlisted node again*: [`Node::enlisted`](super::Node::enlisted) tells it when,
//! as do the health and a warning in the log. One that does not come, or gets no further, for [`EmbedConfig::enlist_timeout`](super::EmbedConfig::enlist_timeout) is put out
//! again, with those it was to vote with; it finds that out when it is started, and is a client then.
//!
//! # By itself
//! With [`EmbedConfig::replace_after`](super::EmbedConfig::replace_after) the server that leads gives such an order itself, once one of three was not
//! heard of for that long: it is replaced by a client that answers, and is eligible. The host sees what it sees of any order: the client's
//! [`Node::enlisted`](super::Node::enlisted) turns true, *and the host starts that node again*. A host that does not has its node put out after
//! `enlist_timeout`, and others are tried before it. `replacing.rs` has the rules; by default nothing is replaced by itself.
//!
//! # Who is eligible
//! All of it is looked at before anything is changed. A refusal is an [`Error::Ineligible`] with one of these reasons:
//!
//! | reason | |
//! |---|---|
//! | `Unreachable` | a node that is to be a server does not answer the server that looks |
//! | `NoCluster`, `OtherCluster` | it belongs to no cluster yet, or to another one |
//! | `NotAClient` | it is a server, or was one and was removed |
//! | `SameNode`, `AlreadyMember`, `AddressTaken` | two addresses are one node; it is enlisted already; its address is another server's |
//! | `NotAServer`, `Ambiguous` | no server is called so; or more than one is: use its address, or its id |
//! | `StillAlive` | a server that is to be replaced is heard of; [`replace_alive`](super::Node::replace_alive) does it all the same |
//! | `ServerCount` | there would be neither one server nor three |
//! | `QuorumAtRisk` | the servers that stay and are heard of are too few to decide anything |
//! | `Busy` | another change is not done yet |
//! | `NotEmbedded` | the store is an external etcd |
//! | `Failed` | it came to nothing; the text says why |
//!
//! # Invariants
//! - There are never two servers that vote on the way from one to three, nor four on the way from one that is dead to another.
//! - Enlisting founds nothing: see [`founding`](super::founding).
//! - A server that was replaced or removed finds that out when it comes back, and starts no more; its host may remove its data directory, and
//!   start it as a client.
//!
//! # Caveats
//! - Removing one server of three leaves two, and neither of them may fail; that is told in the log. To replace it is better.
//! - Once a client is enlisted in its place, a server that comes back is replaced all the same; [`remove`](super::Node::remove) of that client calls
//!   it off, until it votes.
//! - The first start of an enlisted node as a server needs the other servers, and waits for them; every later one needs nobody. Until it
//!   votes its own client reads nothing: start all that are enlisted together, soon.
//! - A list of one entry has no other memory than that node's disk, also when there are three servers by now: with its directory removed it
//!   founds another cluster. Give all nodes a `JOIN` with the others before that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::config::{Backend, EmbedConfig, address};
use super::founding::agree::{Answer, Ask, Candidate, Decision, Grant, Known, NodeId, NodeStanding, Refusal};
use super::founding::drive::{Caller, Driver, Progress, node_url};
use super::life::{founder_id, join_urls};
use super::moved::PLACES_MAX;
use super::secure::{Secure, speaks_tls};
use crate::error::{ApplyError, Error, ErrorKind, Result};
use crate::node::members::enlist::{Listed, ineligible, reason};
use crate::proto::etcdserverpb::Member;
use crate::proto::peer::{Enlist, Enlisted};
use crate::server::Server;

pub use super::founding::agree::Order;

/// How often a server that leads tells those that are enlisted so, until they have it on disk.
const TELL: Duration = Duration::from_secs(1);

/// How long a client waits for a server to carry out an order: longer than that may take.
const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// Orders of the host that wait. Who gives one beyond it waits, too.
pub(super) const ORDERS_MAX: usize = 4;

/// Reasons that only nodes have; see the module's head.
const UNREACHABLE: &str = "Unreachable";
const NO_CLUSTER: &str = "NoCluster";
const OTHER_CLUSTER: &str = "OtherCluster";
const NOT_A_CLIENT: &str = "NotAClient";
const SAME_NODE: &str = "SameNode";
const AMBIGUOUS: &str = "Ambiguous";
const FAILED: &str = "Failed";
const NOT_EMBEDDED: &str = "NotEmbedded";

/// An order of the host, and who is told what came of it.
pub(super) type Request = (Order, oneshot::Sender<Result<()>>);

/// That there is nobody to give an order to.
pub(super) fn not_embedded() -> Error {
    ineligible(NOT_EMBEDDED, "the store is an external etcd, whose members are its own business")
}

/// The node's id that a member was enlisted with.
pub(super) fn enlisted_node(listed: &Listed) -> Option<NodeId> {
    <[u8; 16]>::try_from(&listed.member.node[..]).ok().map(|id| NodeId(u128::from_be_bytes(id)))
}

/// Which node each member is: founders by the decision, others by what they were enlisted with. One that was added by hand is none.
pub(super) fn nodes_of(decision: &Decision, members: &BTreeMap<u64, Listed>) -> BTreeMap<u64, NodeId> {
    let founders = decision.founders.iter().filter_map(|founder| Some((founder_id(decision, founder)?, founder.node)));
    let mut nodes: BTreeMap<u64, NodeId> = founders.collect();
    nodes.extend(members.iter().filter_map(|(&id, listed)| Some((id, enlisted_node(listed)?))));
    nodes
}

pub(super) fn known_by(driver: &Driver) -> Option<Known> {
    match &*driver.progress().borrow() {
        Progress::Bound(_, known) => Some(known.clone()),
        _ => None,
    }
}

// ---- Of a server

/// Carries out orders, of this node's host and of other nodes. `port` is that of addresses without one.
pub(super) async fn as_server(server: &Server, driver: &Driver, port: u16, host: &mut mpsc::Receiver<Request>) {
    let mut others = driver.desk().open();
    loop {
        tokio::select! {
            Some((order, answer)) = host.recv() => {
                // Whoever has asked may have given up.
                let done = if server.node().is_learner() { hand_on(driver, order).await } else { carry_out(server, driver, port, &order).await };
                let _ = answer.send(done);
            }
            Some((order, answer)) = others.recv() => {
                let _ = answer.send(carry_out(server, driver, port, &order).await.map_err(refusal));
            }
            else => std::future::pending().await,
        }
    }
}

/// An error as another node is told of it.
fn refusal(err: Error) -> Refusal {
    match err {
        Error::Ineligible { reason, what } => Refusal { reason, what },
        err if err.kind() == ErrorKind::OutcomeUnknown => Refusal { reason: String::new(), what: err.to_string() },
        err => Refusal { reason: FAILED.into(), what: err.to_string() },
    }
}

async fn carry_out(server: &Server, driver: &Driver, port: u16, order: &Order) -> Result<()> {
    if server.node().is_learner() {
        return Err(ineligible(reason::NOT_READY, "this server does not vote yet"));
    }
    tracing::info!(?order, "a change of the servers is asked for");
    let done = match order {
        Order::Grow { nodes } => enlist(server, driver, port, nodes, Vec::new(), false).await,
        Order::Replace { server: gone, by, even_alive } => {
            let gone = find(server, port, gone)?;
            enlist(server, driver, port, std::slice::from_ref(by), vec![gone], *even_alive).await
        }
        Order::Remove { server: gone } => remove(server, port, gone).await,
    };
    match &done {
        Ok(()) => tracing::info!(?order, "it is in the log"),
        Err(err) => tracing::warn!(?order, error = %err, "a change of the servers was refused, or is not known to be made"),
    }
    done
}

/// The member that is called so: by its name, its address, or its id.
fn find(server: &Server, port: u16, named: &str) -> Result<u64> {
    let members = server.client().last_members();
    let at = address(named, port).unwrap_or_default();
    let is_meant = |member: &&Member| {
        let urls = member.peer_urls.iter().filter_map(|url| url.split_once("://"));
        member.name == named || format!("{:x}", member.id) == named || urls.into_iter().any(|(_, there)| there == at)
    };
    let meant: Vec<u64> = members.iter().filter(is_meant).map(|member| member.id).collect();
    match meant[..] {
        [one] => Ok(one),
        [] => {
            let all: Vec<String> = members.iter().map(|member| format!("{} ({:x})", member.name, member.id)).collect();
            Err(ineligible(reason::NOT_A_SERVER, format!("{named:?} is no server; there are {}", all.join(", "))))
        }
        _ => Err(ineligible(AMBIGUOUS, format!("{named:?} are {} servers; name it by its address, or its id", meant.len()))),
    }
}

async fn remove(server: &Server, port: u16, named: &str) -> Result<()> {
    let id = find(server, port, named)?;
    let at_risk = || ineligible(reason::QUORUM_AT_RISK, format!("without {named} too few servers are left that are heard of"));
    server.node().member_remove(id).await.map_err(|err| match err {
        Error::Apply(ApplyError::UnhealthyCluster | ApplyError::NotEnoughStarted) => at_risk(),
        Error::Apply(ApplyError::MemberNotFound) => ineligible(reason::NOT_A_SERVER, format!("{named:?} is no server any more")),
        err => err,
    })?;
    let left = server.node().listed().1.values().filter(|listed| listed.votes).count();
    if left == 2 {
        tracing::warn!("two servers are left, and neither may fail: let one be added");
    }
    Ok(())
}

async fn enlist(server: &Server, driver: &Driver, port: u16, nodes: &[String], replaces: Vec<u64>, even_alive: bool) -> Result<()> {
    let asked = nodes.iter().map(|node| present(driver, port, node));
    let mut new: Vec<Candidate> = Vec::new();
    for (node, who) in nodes.iter().zip(futures_util::future::join_all(asked).await) {
        let who = who?;
        if let Some(twice) = new.iter().find(|other| other.node == who.node) {
            return Err(ineligible(SAME_NODE, format!("{node} is the same node as the one at {}", twice.peer_url)));
        }
        new.push(who);
    }
    server.node().member_enlist(enlisting(new, replaces, even_alive)).await?;
    // Who cannot be told now is told by the leader, again and again.
    tell(server, driver, &mut BTreeSet::new()).await;
    Ok(())
}

/// These nodes as new members.
pub(super) fn enlisting(new: Vec<Candidate>, replaces: Vec<u64>, even_alive: bool) -> Enlist {
    let member = |who: Candidate| Enlisted { peer_urls: vec![who.peer_url], node: Bytes::copy_from_slice(&who.node.0.to_be_bytes()) };
    Enlist { members: new.into_iter().map(member).collect(), replaces, even_alive }
}

/// The node at an address, if it may be enlisted.
pub(super) async fn present(driver: &Driver, port: u16, node: &str) -> Result<Candidate> {
    let at = address(node, port).map_err(|why| ineligible(UNREACHABLE, format!("{node:?} is no address of a node: {why}")))?;
    let ours = known_by(driver).ok_or(Error::Stopped)?.decision.cluster;
    let answer = driver.caller(node_url(&at, driver.is_tls())).ask(None, &Ask::Present { from: None }).await;
    let not_a_client = |what: &str| Err(ineligible(NOT_A_CLIENT, format!("the node at {at} {what}")));
    match answer {
        Err(status) => Err(ineligible(UNREACHABLE, format!("no node answers at {at}: {}", status.message()))),
        Ok(Answer::Present { known, .. }) if known.decision.cluster != ours => {
            let theirs = format_args!("{:032x}", known.decision.cluster);
            Err(ineligible(OTHER_CLUSTER, format!("the node at {at} belongs to the cluster {theirs}, not to this one, {ours:032x}")))
        }
        Ok(Answer::Present { standing: NodeStanding::Server, .. }) => not_a_client("is a server already"),
        Ok(Answer::Present { who, .. }) if speaks_tls(&who.peer_url) != driver.is_tls() => {
            Err(ineligible(UNREACHABLE, format!("the node at {at} says that it is at {}: these nodes speak otherwise", who.peer_url)))
        }
        Ok(Answer::Present { who, .. }) => Ok(who),
        Ok(Answer::Removed { .. }) => not_a_client(
            "was a server, and was removed; remove its data directory, and start it as a client first, with other servers in JOIN",
        ),
        Ok(Answer::Unbound { .. }) => {
            Err(ineligible(NO_CLUSTER, format!("the node at {at} belongs to no cluster yet; wait until it is a client of this one")))
        }
        Ok(_) => Err(ineligible(UNREACHABLE, format!("the node at {at} does not say who it is"))),
    }
}

/// As the leader, tells those that are enlisted so, until each has it on disk.
pub(super) async fn tell_enlisted(server: &Server, driver: &Driver) {
    let mut told = BTreeSet::new();
    loop {
        tokio::time::sleep(TELL).await;
        if server.node().is_leader() {
            tell(server, driver, &mut told).await;
        } else {
            told.clear();
        }
    }
}

/// Tells each that is enlisted, has not been up as a member, and was not told before.
async fn tell(server: &Server, driver: &Driver, told: &mut BTreeSet<u64>) {
    let (since, members) = server.node().listed();
    let Some(known) = known_by(driver) else { return };
    told.retain(|id| members.contains_key(id));
    let waits = |(id, listed): &(&u64, &Listed)| listed.is_enlisted() && !listed.published && !told.contains(id);
    let asked = members.iter().filter(waits).filter_map(|(&id, listed)| {
        let (node, url) = (enlisted_node(listed)?, listed.member.peer_urls.first()?.clone());
        let ask = Ask::Enlist { known: known.clone(), grant: Grant { member: id, cluster: server.cluster_id(), since } };
        Some(async move { (id, driver.caller(url).ask(Some(node), &ask).await) })
    });
    let answers = futures_util::future::join_all(asked.collect::<Vec<_>>()).await;
    for (id, answer) in answers {
        let member = format_args!("{id:x}");
        match answer {
            Ok(Answer::Enlisted { .. }) => {
                tracing::info!(%member, "a node is enlisted, and knows it: it has to be started again");
                told.insert(id);
            }
            Ok(answer) => tracing::warn!(%member, ?answer, "a node that is to be enlisted refuses"),
            Err(status) => tracing::debug!(%member, error = status.message(), "telling a node that it is enlisted"),
        }
    }
}

// ---- Of a client

/// Hands orders of this node's host to a server.
pub(super) async fn as_client(driver: &Driver, host: &mut mpsc::Receiver<Request>) {
    while let Some((order, answer)) = host.recv().await {
        let _ = answer.send(hand_on(driver, order).await);
    }
    std::future::pending().await
}

async fn hand_on(driver: &Driver, order: Order) -> Result<()> {
    let known = known_by(driver).ok_or(Error::Stopped)?;
    let servers = known.servers.into_iter().map(|server| server.peer_url);
    give_at(|url| driver.caller(url), servers.collect(), Some(known.decision.cluster), &order).await
}

/// Gives an order as one who is no node: `quorate node` does. The nodes in the `JOIN` of the configuration are asked where the servers are.
///
/// # Errors
/// As [`Node::grow`](super::Node::grow).
pub async fn give(config: &EmbedConfig, order: &Order) -> Result<()> {
    if config.backend == Backend::Etcd {
        return Err(not_embedded());
    }
    let (token, secure) = (&config.token, Secure::open(config)?);
    give_at(|url| Caller::new(url, token.clone(), secure.peers.clone()), join_urls(config), None, order).await
}

/// Looks for a server, at these places and where those say who are there, and gives it the order.
async fn give_at(caller: impl Fn(String) -> Caller, places: Vec<String>, cluster: Option<u128>, order: &Order) -> Result<()> {
    let (mut cluster, mut tried) = (cluster, Vec::new());
    let mut next = VecDeque::from(places);
    let mut seen: BTreeSet<String> = next.iter().cloned().collect();
    while let Some(url) = next.pop_front() {
        let mut caller = caller(url.clone());
        let answer = caller.ask(None, &Ask::Present { from: None }).await;
        let (who, ticket) = match answer {
            Ok(Answer::Present { known, .. }) if *cluster.get_or_insert(known.decision.cluster) != known.decision.cluster => {
                tried.push(format!("{url}: it belongs to another cluster"));
                continue;
            }
            Ok(Answer::Present { who, standing: NodeStanding::Server, ticket, .. }) => (who.node, ticket),
            Ok(Answer::Present { known, .. }) => {
                let servers = known.servers.into_iter().map(|server| server.peer_url);
                next.extend(servers.filter(|server| seen.len() < PLACES_MAX && seen.insert(server.clone())));
                tried.push(format!("{url}: it is no server"));
                continue;
            }
            Ok(_) => {
                tried.push(format!("{url}: it belongs to no cluster"));
                continue;
            }
            Err(status) => {
                tried.push(format!("{url}: {}", status.message()));
                continue;
            }
        };
        match caller.ask_within(ORDER_TIMEOUT, Some(who), &Ask::Order { ticket, order: order.clone() }).await {
            Ok(Answer::Ordered { outcome: Ok(()), .. }) => return Ok(()),
            Ok(Answer::Ordered { outcome: Err(Refusal { reason, what }), .. }) if reason == reason::NOT_READY => {
                tried.push(format!("{url}: {what}"));
            }
            Ok(Answer::Ordered { outcome: Err(Refusal { reason, what }), .. }) if reason.is_empty() => {
                return Err(Error::OutcomeUnknown(what));
            }
            Ok(Answer::Ordered { outcome: Err(Refusal { reason, what }), .. }) => return Err(Error::Ineligible { reason, what }),
            Ok(_) => tried.push(format!("{url}: it carries out no orders")),
            Err(status) => return Err(Error::OutcomeUnknown(format!("{url}: {}", status.message()))),
        }
    }
    Err(Error::Unavailable(tried.join("; ")))
}
