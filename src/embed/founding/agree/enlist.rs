//! How a client becomes a server: it is enlisted, by a server of its cluster, and is one from its next start on.
//!
//! ```text
//! client --Enlist{member 7}--> on disk: enlisted as 7 --next start--> a server, as yet without a vote --it votes--> on disk: a server
//!                                                     `-- 7 was put out meanwhile --> a client again
//! ```
//!
//! # Invariants
//! - It founds nothing and joins nothing: who belongs to no cluster is not enlisted, and who belongs to another one neither.
//! - A node's role does not change while it runs. One that is enlisted while it runs as a client goes on as one.
//! - What is enlisted as another member than before is so by a newer entry of the log alone. A client that is sent an old message again is enlisted until its
//!   next start, which finds that it was put out.

use super::{Agreement, Answer, Ask, Candidate, Effect, Known, Role, State};

/// As whom a node is enlisted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grant {
    /// Its id among the members of the servers' cluster, and the id of that.
    pub member: u64,
    /// See `member`.
    pub cluster: u64,
    /// An entry of the log in which it is a member; of two grants the one with the higher entry is newer.
    pub since: u64,
}

/// What a node of a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeStanding {
    /// It calls the servers.
    Client,
    /// It does, and is a server from its next start on.
    Enlisted,
    /// It is one.
    Server,
}

/// A change of the servers, as it is asked for: see [`members`](crate::embed::members). Nodes are named by their addresses, servers by name,
/// address or id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Order {
    /// These become servers, all at once.
    Grow {
        /// `host:port` of each.
        nodes: Vec<String>,
    },
    /// One becomes a server in another's place.
    Replace {
        /// Who goes.
        server: String,
        /// Who comes.
        by: String,
        /// Also if who goes is heard of.
        even_alive: bool,
    },
    /// One is a server no more.
    Remove {
        /// Who goes.
        server: String,
    },
}

/// Why an order was not carried out, or why that is not known: then there is no reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Its name, which stays. Empty: what became of the order is not known.
    pub reason: String,
    /// Who is meant, and what would be right.
    pub what: String,
}

impl Agreement {
    /// As whom this node is enlisted.
    pub fn grant(&self) -> Option<&Grant> {
        match &self.state {
            State::Enlisted { grant, .. } => Some(grant),
            _ => None,
        }
    }

    /// Whether it was enlisted before this life began: then it is a server in it, and otherwise only from its next start on.
    pub fn serves(&self) -> bool {
        self.serves
    }

    /// To who asks for it, as one of a cluster.
    pub(super) fn present_member(&self) -> Vec<Effect> {
        let Some((role, known)) = self.bound() else { return Vec::new() };
        let standing = match role {
            Role::Server => NodeStanding::Server,
            Role::Client if self.grant().is_some() => NodeStanding::Enlisted,
            Role::Client => NodeStanding::Client,
        };
        let answer = Answer::Present { who: self.me().clone(), standing, known: known.clone(), ticket: 0 };
        vec![Effect::Answer(answer)]
    }

    /// A server enlists this node, which belongs to a cluster.
    pub(super) fn enlist(&mut self, ask: &Ask) -> Vec<Effect> {
        let who = self.me().node;
        let Some((role, ours)) = self.bound() else { return Vec::new() };
        let Ask::Enlist { known: theirs, grant } = ask else { return Vec::new() };
        let refusal = vec![Effect::Answer(Answer::Bound { who, known: ours.clone() })];
        if theirs.decision.cluster != ours.decision.cluster {
            return refusal;
        }
        match self.grant() {
            Some(before) if before.member == grant.member => return vec![Effect::Answer(Answer::Enlisted { who })],
            Some(before) if before.since >= grant.since => return refusal,
            _ if role == Role::Server => return refusal,
            _ => {}
        }
        let newer = if ours.as_of < theirs.as_of && !theirs.servers.is_empty() { theirs } else { ours };
        self.state = State::Enlisted { known: newer.clone(), grant: grant.clone() };
        vec![Effect::Save(self.state.clone()), Effect::Answer(Answer::Enlisted { who })]
    }

    /// This node was enlisted, and votes now: it is a server like any other.
    pub fn votes(&mut self) -> Vec<Effect> {
        let State::Enlisted { known, .. } = &self.state else { return Vec::new() };
        if !self.serves {
            return Vec::new();
        }
        self.state = State::Bound { role: Role::Server, known: known.clone() };
        vec![Effect::Save(self.state.clone())]
    }
}

impl State {
    /// The cluster that the node belongs to.
    pub fn known(&self) -> Option<&Known> {
        match self {
            State::Bound { known, .. } | State::Enlisted { known, .. } => Some(known),
            _ => None,
        }
    }

    /// This node among the servers and founders that it knows.
    pub(crate) fn own(&self, node: super::NodeId) -> Option<&Candidate> {
        let known = self.known()?;
        known.servers.iter().chain(&known.decision.founders).find(|server| server.node == node)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decision, List, NodeId, Unbound, candidate};
    use super::*;

    fn known(cluster: u128, as_of: u64) -> Known {
        Known { decision: Decision { cluster, founders: vec![candidate(1)] }, servers: vec![candidate(1)], as_of }
    }

    fn begin(state: State) -> Agreement {
        Agreement::new(candidate(4), List::new(vec!["10.0.0.1:5707".into()], 1), state)
    }

    fn enlist(cluster: u128, member: u64, since: u64) -> Ask {
        Ask::Enlist { known: known(cluster, since), grant: Grant { member, cluster: 9, since } }
    }

    fn client() -> State {
        State::Bound { role: Role::Client, known: known(7, 1) }
    }

    fn saved(effects: &[Effect]) -> Option<&State> {
        effects.iter().find_map(|effect| match effect {
            Effect::Save(state) => Some(state),
            _ => None,
        })
    }

    #[test]
    fn a_client_is_a_server_from_its_next_start_on() {
        let mut node = begin(client());
        let effects = node.asked(&enlist(7, 70, 5));
        // On disk before it is said.
        assert!(matches!(&effects[..], [Effect::Save(_), Effect::Answer(Answer::Enlisted { .. })]), "{effects:?}");
        assert!(node.bound().unwrap().0 == Role::Client && !node.serves() && node.bound().unwrap().1.as_of == 5);
        assert!(saved(&node.asked(&enlist(7, 70, 6))).is_none());
        let state = node.state().clone();
        let mut node = begin(state.clone());
        assert!(node.bound().unwrap().0 == Role::Server && node.serves());
        assert_eq!(saved(&node.votes()), Some(&State::Bound { role: Role::Server, known: known(7, 5) }));
        assert!(node.votes().is_empty());
        // Another one was put out: it is a client again, and can be enlisted again.
        let mut node = begin(state);
        assert_eq!(saved(&node.removed()), Some(&State::Bound { role: Role::Client, known: known(7, 5) }));
        assert!(saved(&node.asked(&enlist(7, 71, 8))).is_some());
        // A server that was removed is none that could be.
        let mut node = begin(State::Bound { role: Role::Server, known: known(7, 5) });
        assert_eq!(saved(&node.removed()), Some(&State::Removed { cluster: 7 }));
        assert!(saved(&node.asked(&enlist(7, 72, 9))).is_none());
    }

    #[test]
    fn nobody_else_is_enlisted() {
        let unbound = State::Unbound(Unbound::default());
        let server = State::Bound { role: Role::Server, known: known(7, 1) };
        let enlisted = State::Enlisted { known: known(7, 6), grant: Grant { member: 70, cluster: 9, since: 6 } };
        for (state, ask) in [
            (unbound, enlist(7, 70, 5)),
            (server, enlist(7, 70, 5)),
            (client(), enlist(8, 70, 5)),
            // It serves as another member: it is put out first.
            (enlisted, enlist(7, 71, 9)),
        ] {
            let mut node = begin(state.clone());
            let before = node.state().clone();
            let effects = node.asked(&ask);
            assert!(matches!(&effects[..], [Effect::Answer(Answer::Bound { .. } | Answer::Unbound { .. })]), "{state:?}: {effects:?}");
            assert_eq!(*node.state(), before);
        }
        // In the life in which it was enlisted, an older message changes nothing, and a newer one counts.
        let mut node = begin(client());
        node.asked(&enlist(7, 70, 5));
        assert!(saved(&node.asked(&enlist(7, 69, 5))).is_none() && saved(&node.asked(&enlist(7, 68, 4))).is_none());
        assert!(saved(&node.asked(&enlist(7, 71, 6))).is_some());
        assert_eq!(node.grant().unwrap().member, 71);
    }

    #[test]
    fn each_says_what_it_is() {
        let says = |mut node: Agreement| match &node.asked(&Ask::Present { from: None })[..] {
            [Effect::Answer(Answer::Present { who, standing, known, .. })] => Some((who.node, *standing, known.decision.cluster)),
            _ => None,
        };
        let enlisted = || State::Enlisted { known: known(7, 6), grant: Grant { member: 70, cluster: 9, since: 6 } };
        let mut meanwhile = begin(client());
        meanwhile.asked(&enlist(7, 70, 5));
        assert_eq!(says(begin(client())), Some((NodeId(4), NodeStanding::Client, 7)));
        assert_eq!(says(meanwhile), Some((NodeId(4), NodeStanding::Enlisted, 7)));
        assert_eq!(says(begin(enlisted())), Some((NodeId(4), NodeStanding::Server, 7)));
        assert_eq!(says(begin(State::Removed { cluster: 7 })), None);
    }
}
