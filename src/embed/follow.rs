//! How a node that runs keeps up with who the servers are: a server reads it from the membership, a client asks a server.
//!
//! A client asks one server, again and again, for as long as that one answers. When it does not, the client goes round: the other servers,
//! and then the entries of JOIN, in case all servers have moved. Whoever of the cluster is there may know more than it does, another client
//! too, but it stays only with a server:
//!
//! ```text
//! servers s1 s2 s3, JOIN s1 s2 s3 d e      asked: s1 s1 s1 ... (s1 is silent) s2 s2 s2 ...
//! all servers are silent                   asked: s3 s1 s2 s3 d e s1 s2 ...      d and e say what they know, and are left again
//! ```
//!
//! # Invariants
//! - A client that nobody answers for the servers asks every entry of JOIN, over and over: it never settles with itself, with another client,
//!   or with a node of another cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use super::founding::agree::{Answer, Ask, Candidate, JOIN_MAX, Known, NodeId};
use super::founding::drive::{Caller, Driver, Progress};
use super::life::founder_id;
use super::members::nodes_of;
use crate::server::Server;

/// How often a server looks whether the membership has changed, and a client asks a server.
const SERVER_LOOK: Duration = Duration::from_secs(1);
const CLIENT_LOOK: Duration = Duration::from_secs(2);

/// How often a client asks while no server has answered: it may have many places to go through, and most of them may be deserted.
const CLIENT_RETRY: Duration = Duration::from_millis(500);

/// Addresses of foreign nodes that the log is told of, once each. Of those beyond it is not told.
const STRANGERS_MAX: usize = JOIN_MAX;

/// Takes changes of the membership to those who ask this node, and this node's new address to the membership.
pub(super) async fn as_server(server: &Server, driver: &Driver, mut known: Known) {
    let client = server.client();
    let own = &driver.me().peer_url;
    let mut ticks = tokio::time::interval(SERVER_LOOK);
    let mut votes = driver.grant().is_none();
    loop {
        ticks.tick().await;
        // First, so that what is told of it is not newer than the members are.
        let applied = server.applied();
        let members = client.last_members();
        let listed = server.node().listed().1;
        if !votes && listed.get(&server.member_id()).is_some_and(|own| own.votes) {
            votes = true;
            driver.votes().await;
            tracing::info!("this node was enlisted, and votes: it is a server like any other");
        }
        let nodes = nodes_of(&known.decision, &listed);
        let founder = |id: u64| known.decision.founders.iter().find(|founder| founder_id(&known.decision, founder) == Some(id));
        // One that was added by hand is no node, and goes by its id.
        let node = |id: u64| nodes.get(&id).copied().unwrap_or(NodeId(id.into()));
        let before = |id: u64| known.servers.iter().find(|server| server.node == node(id)).or_else(|| founder(id));
        let servers = members.iter().filter(|member| !member.is_learner).filter_map(|member| {
            let before = before(member.id);
            Some(Candidate {
                node: node(member.id),
                name: member.name.clone(),
                peer_url: member.peer_urls.first()?.clone(),
                client_url: member.client_urls.first().cloned().or_else(|| before.map(|before| before.client_url.clone()))?,
            })
        });
        let mut servers: Vec<Candidate> = servers.collect();
        servers.sort();
        let unlike = |a: &[Candidate], b: &[Candidate]| {
            a.len() != b.len() || a.iter().zip(b).any(|(a, b)| (a.node, &a.peer_url, &a.client_url) != (b.node, &b.peer_url, &b.client_url))
        };
        // Of one that has yet to catch up, what it knows of the members is old.
        if !servers.is_empty() && applied >= known.as_of && unlike(&servers, &known.servers) {
            known = Known { decision: known.decision.clone(), servers, as_of: applied.max(known.as_of.saturating_add(1)) };
            driver.learn(known.clone()).await;
        }
        let moved = members.iter().find(|member| member.id == server.member_id() && !member.is_learner && !member.peer_urls.contains(own));
        if let Some(member) = moved {
            match server.node().member_update(member.id, std::slice::from_ref(own)).await {
                Ok(()) => {
                    tracing::info!(before = ?member.peer_urls, now = %own, "this server has moved: the members know its new address")
                }
                Err(err) => {
                    tracing::warn!(error = %err, before = ?member.peer_urls, now = %own, "this server has moved, and the members cannot be told yet")
                }
            }
        }
    }
}

/// Asks who the servers are. `join` are the URLs of the listed nodes.
pub(super) async fn as_client(driver: &Driver, join: &[String]) {
    let progress = driver.progress();
    let mut round = Round { join: join.to_vec(), own: driver.me().peer_url.clone(), ..Round::default() };
    let mut caller: Option<Caller> = None;
    loop {
        tokio::time::sleep(if round.stay.is_some() { CLIENT_LOOK } else { CLIENT_RETRY }).await;
        let Progress::Bound(_, known) = progress.borrow().clone() else { continue };
        let Some(url) = round.next(&known) else { continue };
        let mut asked = match caller.take() {
            Some(caller) if caller.url() == url => caller,
            _ => driver.caller(url),
        };
        let Ok(answer) = asked.ask(None, &Ask::Hello).await else { continue };
        if let Some(news) = round.heard(asked.url(), answer, &known, driver.node()) {
            driver.learn(news).await;
        }
        caller = Some(asked);
    }
}

/// Whom a client asks next.
#[derive(Default)]
struct Round {
    join: Vec<String>,
    own: String,
    turn: usize,
    /// The server that has just answered.
    stay: Option<String>,
    strangers: BTreeSet<String>,
}

impl Round {
    fn next(&mut self, known: &Known) -> Option<String> {
        let servers = known.servers.iter().map(|server| &server.peer_url);
        if let Some(url) = self.stay.take()
            && servers.clone().any(|server| *server == url)
        {
            return Some(url);
        }
        let all: Vec<&String> = servers.chain(&self.join).filter(|url| **url != self.own).collect();
        let url = all.get(self.turn % all.len().max(1)).map(|url| (*url).clone());
        self.turn = self.turn.wrapping_add(1);
        url
    }

    /// What there is to be learned from an answer; and whether who gave it is asked again.
    fn heard(&mut self, url: &str, answer: Answer, known: &Known, own: NodeId) -> Option<Known> {
        let Answer::Bound { who, known: theirs } = answer else { return None };
        if who == own {
            return None;
        }
        if theirs.decision.cluster != known.decision.cluster {
            if self.strangers.len() < STRANGERS_MAX && self.strangers.insert(url.to_owned()) {
                tracing::error!(
                    %url, ours = %format_args!("{:032x}", known.decision.cluster), theirs = %format_args!("{:032x}", theirs.decision.cluster),
                    "a node of another cluster is there; nothing is changed"
                );
            }
            return None;
        }
        if known.servers.iter().any(|server| server.peer_url == url) {
            self.stay = Some(url.to_owned());
        }
        Some(theirs)
    }
}

#[cfg(test)]
mod tests {
    use super::super::founding::agree::{Decision, candidate};
    use super::*;

    fn known(cluster: u128, servers: &[u128], as_of: u64) -> Known {
        let servers: Vec<Candidate> = servers.iter().map(|node| candidate(*node)).collect();
        Known { decision: Decision { cluster, founders: servers.clone() }, servers, as_of }
    }

    fn at(node: u128) -> String {
        candidate(node).peer_url
    }

    /// Node 4 of five, with its own name in the list once as an address and once as a name.
    fn round() -> Round {
        let join = [1, 2, 3, 4, 5].map(at).into_iter().chain(["http://four:5707".to_owned()]).collect();
        Round { join, own: at(4), ..Round::default() }
    }

    #[test]
    fn a_client_stays_with_a_server_that_answers() {
        let (mut round, ours) = (round(), known(7, &[1, 2, 3], 0));
        for _ in 0..3 {
            assert_eq!(round.next(&ours), Some(at(1)));
            let news = round.heard(&at(1), Answer::Bound { who: NodeId(1), known: ours.clone() }, &ours, NodeId(4));
            assert_eq!(news.as_ref(), Some(&ours));
        }
        // It falls silent; the next one answers.
        assert_eq!([round.next(&ours), round.next(&ours)], [Some(at(1)), Some(at(2))]);
        round.heard(&at(2), Answer::Bound { who: NodeId(2), known: ours.clone() }, &ours, NodeId(4));
        assert_eq!(round.next(&ours), Some(at(2)));
        round.heard(&at(2), Answer::Bound { who: NodeId(2), known: ours.clone() }, &ours, NodeId(4));
        // It is no server any more.
        assert_eq!(round.next(&known(7, &[1, 3], 1)), Some(at(1)));
    }

    /// The servers are away. Another client answers, a node of another cluster does, and the node itself by its name: each is heard, and
    /// left, so that the servers are found when they come back, wherever that is in the list.
    #[test]
    fn a_client_settles_with_nobody_else() {
        let (mut round, ours) = (round(), known(7, &[1, 2, 3], 0));
        let mut asked = Vec::new();
        for _ in 0..24 {
            let url = round.next(&ours).unwrap();
            let bound = |node, cluster| Some(Answer::Bound { who: NodeId(node), known: known(cluster, &[1, 2, 3], 0) });
            let answer = match &url {
                url if *url == at(5) => bound(5, 7),
                url if url == "http://four:5707" => bound(4, 7),
                url if *url == at(2) && asked.len() % 2 == 0 => bound(2, 8),
                _ => None,
            };
            if let Some(answer) = answer {
                let news = round.heard(&url, answer, &ours, NodeId(4));
                assert_eq!(news.is_some(), url == at(5));
            }
            asked.push(url);
        }
        for (node, times) in [(1, 6), (2, 6), (3, 6), (4, 0), (5, 3)] {
            assert_eq!(asked.iter().filter(|url| **url == at(node)).count(), times, "{asked:?}");
        }
        assert!(round.strangers.iter().eq([&at(2)]));
    }
}
