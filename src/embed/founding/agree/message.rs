//! What nodes ask each other, and what they answer. How it is put on the wire is another matter: see [`wire`](super::super::wire).

use super::{Ballot, Candidate, Decision, Grant, Known, NodeId, NodeStanding, Order, Refusal};

/// What nodes ask each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ask {
    /// Who is there?
    Hello,
    /// The list is that of the one who asks; who has another takes no part.
    Prepare {
        list: u128,
        ballot: Ballot,
    },
    Accept {
        list: u128,
        ballot: Ballot,
        decision: Decision,
    },
    /// This is decided.
    Decided {
        decision: Decision,
    },
    /// Who is there, where, and of which cluster? A server that asks says where it is, and its cluster.
    Present {
        from: Option<(u128, Candidate)>,
    },
    /// You are a server from your next start on. From a server.
    Enlist {
        known: Known,
        grant: Grant,
    },
    /// Change who the servers are. To a server; it answers when that is done. The ticket is the one it has told last.
    Order {
        ticket: u128,
        order: Order,
    },
}

/// What they answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// To Hello, and to Prepare and Accept from one with another list.
    Unbound {
        who: Candidate,
        list: u128,
        listed: usize,
        servers: usize,
    },
    Promise {
        who: Candidate,
        ballot: Ballot,
        accepted: Option<(Ballot, Decision)>,
    },
    Accepted {
        who: NodeId,
        ballot: Ballot,
    },
    /// It takes part in a higher one.
    Refused {
        who: NodeId,
        ballot: Ballot,
        promised: Ballot,
    },
    /// To everything: there is a cluster already.
    Bound {
        who: NodeId,
        known: Known,
    },
    /// To everything: it was a server, once.
    Removed {
        who: NodeId,
    },
    /// To Present, of who belongs to a cluster.
    Present {
        who: Candidate,
        standing: NodeStanding,
        known: Known,
        /// For the next order; put in by who carries orders out.
        ticket: u128,
    },
    /// To Enlist: it is on disk.
    Enlisted {
        who: NodeId,
    },
    /// To Order.
    Ordered {
        who: NodeId,
        outcome: Result<(), Refusal>,
    },
}

impl Answer {
    /// Who says so.
    pub fn who(&self) -> NodeId {
        match self {
            Answer::Unbound { who, .. } | Answer::Promise { who, .. } | Answer::Present { who, .. } => who.node,
            Answer::Accepted { who, .. } | Answer::Refused { who, .. } | Answer::Bound { who, .. } | Answer::Removed { who } => *who,
            Answer::Enlisted { who } | Answer::Ordered { who, .. } => *who,
        }
    }
}
