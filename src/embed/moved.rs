//! Servers that find each other again after they have moved while none of them led, such as all at once.
//!
//! One that moves alone tells the membership its new address (`follow`), which takes a quorum. When there is no leader, that cannot be. Then
//! a server asks around, at the entries of JOIN, and wherever it hears of a server: who is there, where, and says where itself is:
//!
//! ```text
//! a, b, c are started anew at a', b', c', with JOIN a' b' c'
//! a' asks b'   "I am a, at a'"  ->  "I am b, at b'"       each tries the other there
//! one is elected; each tells the membership its address, and the hints are forgotten
//! ```
//!
//! # Invariants
//! - What is heard is a hint, and is not saved: it is tried beside the address that the membership has, until that says something newer.
//! - Heard is only who belongs to the same cluster, by messages that are sealed with the shared token if there is one; and whoever is found at
//!   an address has to be the member that was looked for, as on every connection between members.
//! - Nobody asks while there is a leader. But everybody listens: who leads hears of one that was cut off.
//!
//! # Caveat
//! Two servers that have exchanged their addresses cannot tell the membership so, for each finds its own taken.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::founding::agree::{Answer, Ask, Candidate, JOIN_MAX, NodeStanding};
use super::founding::drive::{Caller, Driver, Progress};
use super::members::nodes_of;
use super::secure::speaks_tls;
use crate::server::Server;

/// How often.
const LOOK: Duration = Duration::from_secs(1);

/// Places that are asked, and remembered to be asked. Those beyond it are not: there are as many in JOIN, at most, as many clients that have said
/// where they are (see `replacing`), and a few servers.
pub(super) const PLACES_MAX: usize = 2 * JOIN_MAX + 32;

/// Looks for the others, and takes note of where they say they are. `join` are the URLs of the listed nodes.
pub(super) async fn look_around(server: &Server, driver: &Driver, join: &[String]) {
    let mut callers: BTreeMap<String, Caller> = BTreeMap::new();
    let mut heard_of: BTreeSet<String> = BTreeSet::new();
    let own = driver.me();
    loop {
        tokio::time::sleep(LOOK).await;
        let Progress::Bound(_, known) = driver.progress().borrow().clone() else { continue };
        let cluster = known.decision.cluster;
        let mut there: Vec<Candidate> =
            driver.desk().heard().into_iter().filter(|(theirs, _)| *theirs == cluster).map(|(_, who)| who).collect();
        if server.node().has_leader() {
            callers.clear();
            heard_of.clear();
        } else {
            heard_of.extend(there.iter().chain(&known.servers).map(|server| server.peer_url.clone()));
            let places: BTreeSet<&String> = join.iter().chain(&heard_of).filter(|url| **url != own.peer_url).take(PLACES_MAX).collect();
            let asked = places.into_iter().map(|url| {
                let caller = callers.remove(url).unwrap_or_else(|| driver.caller(url.clone()));
                ask(caller, Ask::Present { from: Some((cluster, own.clone())) })
            });
            let answers = futures_util::future::join_all(asked.collect::<Vec<_>>()).await;
            heard_of.clear();
            for (caller, answer) in answers {
                if heard_of.len() < PLACES_MAX
                    && let Some(Answer::Present { who, standing, known: theirs, .. }) = answer
                    && theirs.decision.cluster == cluster
                    && who.node != own.node
                {
                    heard_of.extend(theirs.servers.into_iter().map(|server| server.peer_url));
                    if standing == NodeStanding::Server {
                        heard_of.insert(who.peer_url.clone());
                        there.push(who);
                    }
                }
                callers.insert(caller.url().to_owned(), caller);
            }
        }
        // A node speaks to no other in plain text that has certificates, nor the other way round.
        there.retain(|who| speaks_tls(&who.peer_url) == driver.is_tls());
        if there.is_empty() {
            continue;
        }
        let members = server.node().listed().1;
        for (id, node) in nodes_of(&known.decision, &members) {
            for who in there.iter().filter(|who| who.node == node && who.node != own.node) {
                if server.node().hint(id, &who.peer_url) {
                    tracing::info!(member = %format_args!("{id:x}"), name = %who.name, url = %who.peer_url, "a server is somewhere else than it was");
                }
            }
        }
    }
}

pub(super) async fn ask(mut caller: Caller, ask: Ask) -> (Caller, Option<Answer>) {
    let answer = caller.ask(None, &ask).await.ok();
    (caller, answer)
}
