//! What a node is asked that is no business of the agreement: orders to a server, and where other nodes say they are.
//!
//! ```text
//! Present                 -> ..., ticket 4f...
//! Order{ticket 4f.., ..}  -> carried out by the server, then Ordered; the ticket is used up
//! Order{ticket 4f.., ..}  -> refused: it was used
//! ```
//!
//! # Invariants
//! - A ticket is good for one order, and for one life of the node: an order that was recorded is of no use a second time.
//! - Orders are carried out one after the other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::sync::{mpsc, oneshot};

use super::agree::{Candidate, JOIN_MAX, NodeId, Order, Refusal};
use crate::lock::lock;
use crate::node::members::enlist::reason;

/// Orders that wait for the one that is carried out. Beyond it they are refused: changes of the servers are rare, and the next one is to be
/// made in view of what came of the last.
const ORDERS_MAX: usize = 1;

/// Servers that have said where they are, and were not taken note of. One beyond it is not noted; it says so again.
const HEARD_MAX: usize = JOIN_MAX;

/// Nodes that are remembered to have said where they are. One beyond them takes the place of the one that has said so longest ago.
const MET_MAX: usize = JOIN_MAX;

/// What came of an order.
pub(crate) type Outcome = Result<(), Refusal>;

/// An order, and who is to be told what came of it.
pub(crate) type Ordered = (Order, oneshot::Sender<Outcome>);

/// See the module's head.
pub(crate) struct Desk {
    /// The next order's ticket, and who carries orders out; nobody, unless this node is a server.
    open: Mutex<(u128, Option<mpsc::Sender<Ordered>>)>,
    heard: Mutex<BTreeMap<NodeId, (u128, Candidate)>>,
    met: Mutex<Met>,
}

/// The nodes that have said where they are, each with the number of when it did last, and its cluster.
#[derive(Default)]
struct Met {
    count: u64,
    nodes: BTreeMap<NodeId, (u64, u128, Candidate)>,
}

impl Desk {
    pub fn new() -> Desk {
        Desk { open: Mutex::new((rand::random(), None)), heard: Mutex::default(), met: Mutex::default() }
    }

    /// From here on orders are taken; they come out where this points to.
    pub fn open(&self) -> mpsc::Receiver<Ordered> {
        let (orders, queue) = mpsc::channel(ORDERS_MAX);
        lock(&self.open).1 = Some(orders);
        queue
    }

    pub fn ticket(&self) -> u128 {
        lock(&self.open).0
    }

    /// Takes an order.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn order(&self, ticket: u128, order: Order) -> Result<oneshot::Receiver<Outcome>, Refusal> {
        let refused = |reason: &str, what: &str| Refusal { reason: reason.into(), what: what.into() };
        let (answer, wait) = oneshot::channel();
        let mut open = lock(&self.open);
        let (expected, orders) = &mut *open;
        let Some(orders) = orders else { return Err(refused(reason::NOT_READY, "this node is no server, and changes none")) };
        if ticket != *expected {
            return Err(refused(reason::BUSY, "another order has come first; look at what it has changed, and try again"));
        }
        *expected = rand::random();
        match orders.try_send((order, answer)) {
            Ok(()) => Ok(wait),
            Err(mpsc::error::TrySendError::Full(_)) => Err(refused(reason::BUSY, "another order is being carried out; try again later")),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(refused(reason::NOT_READY, "the server of this node has stopped")),
        }
    }

    /// Notes where a node of a cluster says it is.
    pub fn hear(&self, cluster: u128, who: Candidate) {
        {
            let mut met = lock(&self.met);
            if met.nodes.len() >= MET_MAX && !met.nodes.contains_key(&who.node) {
                let oldest = met.nodes.iter().min_by_key(|(_, (at, ..))| *at).map(|(&node, _)| node);
                oldest.map(|node| met.nodes.remove(&node));
            }
            met.count += 1;
            let at = met.count;
            met.nodes.insert(who.node, (at, cluster, who.clone()));
        }
        let mut heard = lock(&self.heard);
        if heard.len() < HEARD_MAX || heard.contains_key(&who.node) {
            heard.insert(who.node, (cluster, who));
        }
    }

    /// Those that have said where they are since this was asked last.
    pub fn heard(&self) -> Vec<(u128, Candidate)> {
        std::mem::take(&mut *lock(&self.heard)).into_values().collect()
    }

    /// Those of a cluster that have ever said where they are, and are remembered.
    pub fn met(&self, cluster: u128) -> Vec<Candidate> {
        let met = lock(&self.met);
        met.nodes.values().filter(|(_, theirs, _)| *theirs == cluster).map(|(.., who)| who.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_good_for_one_order() {
        let desk = Desk::new();
        let order = || Order::Remove { server: "n1".into() };
        let reason = |refused: Result<oneshot::Receiver<Outcome>, Refusal>| refused.unwrap_err().reason;
        assert_eq!(reason(desk.order(desk.ticket(), order())), reason::NOT_READY);
        let mut queue = desk.open();
        let ticket = desk.ticket();
        assert!(desk.order(ticket, order()).is_ok());
        assert_eq!(reason(desk.order(ticket, order())), reason::BUSY);
        // One waits already.
        assert_eq!(reason(desk.order(desk.ticket(), order())), reason::BUSY);
        assert_eq!(queue.try_recv().unwrap().0, order());
        assert!(desk.order(desk.ticket(), order()).is_ok());
        drop(queue);
        assert_eq!(reason(desk.order(desk.ticket(), order())), reason::NOT_READY);
    }

    #[test]
    fn those_that_have_spoken_last_are_remembered() {
        let desk = Desk::new();
        let who = |node: u128| Candidate { node: NodeId(node), name: "n".into(), peer_url: String::new(), client_url: String::new() };
        let most = MET_MAX as u128;
        (0..most).for_each(|node| desk.hear(7, who(node)));
        desk.hear(7, who(0));
        desk.hear(8, who(most));
        desk.hear(7, who(most + 1));
        // The ones that have said it longest ago, 1 and 2, are forgotten.
        let met: Vec<u128> = desk.met(7).iter().map(|who| who.node.0).collect();
        assert!(met.iter().copied().eq([0].into_iter().chain(3..most).chain([most + 1])), "{met:?}");
        assert_eq!(desk.met(8), [who(most)]);
    }
}
