//! Founding: how nodes that know nothing but one list of addresses come to one cluster.
//!
//! Every node is started with the same `JOIN` list. The first ones that are there become its servers (one or three), all others its
//! clients. None of them is special, none is asked in advance, and they may be started in any order, be cut off from each other, and crash.
//!
//! | file | what it is |
//! |---|---|
//! | `agree` | the agreement: a state machine without clock, disk and network, which is what the tests examine |
//! | `state` | what a node remembers of it: `kv-state.json` |
//! | `wire` | its messages, and the seal by which nodes that share a token know each other |
//! | `desk` | what is asked of a server beside it: orders, and where other servers are |
//! | `drive` | runs it: the timer, the messages, the disk, and lines in the log that say who is missing |
//!
//! # What is promised
//! *Never two clusters from one JOIN list*, whatever is lost, delayed, repeated or cut off, whoever crashes at whatever point, and in
//! whichever order they start, as long as no more listed nodes lose their disk during the founding than this:
//!
//! | entries in the list | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
//! |---|---|---|---|---|---|---|---|
//! | must be up to found | 1 | 2 | 3 | 3 | 4 | 4 | 5 |
//! | may lose their disk | 0 | 1 | 2 | 1 | 2 | 1 | 2 |
//!
//! Why it holds. A decision was accepted by a quorum, and whoever wants another has to hear of a quorum first, that it has not. The two
//! quorums have `2q - n` nodes in common, at least; take away those that have lost their memory, and one is left that remembers: it has
//! either accepted the first decision, and says so, or has promised not to. A plain majority has one node in common, and one wiped disk
//! founds a second cluster; the model in `tests/founding.rs` finds the way to it.
//!
//! *It comes to an end* once so many of the listed nodes can talk to each other and have the time to: a few seconds. And *who belongs to a
//! cluster says so* to everyone who asks: one node of the cluster that is up is enough for any other to join it, with whatever list. Where
//! nodes of two clusters answer, none is joined, and both are named with their entries, also after a restart while one of them is silent. A
//! node that has learned it is no longer one that could forget; the table counts only until then.
//!
//! A node's role never changes while it runs, and is remembered with the cluster. A client may be [enlisted](agree::Grant): then it is a server from
//! its next start on. No founding comes of that, and no binding: who belongs to no cluster cannot be enlisted. A directory without memory is a new node, also at an old address:
//! it never takes the place of the one that was there.
//!
//! # What is not promised
//! - Two lists may make two clusters. Nodes with different lists take no part in each other's founding (that is told in the log), but each
//!   list has its own quorum. Give all nodes one list.
//! - A list of one entry has no other memory than that node's disk: when it is lost, the node founds another cluster. The first one is lost with it, unless it has grown;
//!   before its directory is removed then, give it a list with the others.
//! - More wiped disks than the table allows, before their nodes have heard of the cluster again, may lead to a second one. So may copying a
//!   node's directory to another, which counts as a wipe; while both are up this is seen, and neither proposes.
//! - Founding with three entries needs all three up. That is the price of outliving a wiped disk.
//! - A founder that loses its disk before it has started its server is dead from the start; the other two go on. A cluster of one server
//!   is then lost, and says so by never being there.
//! - Nodes trust each other: one that lies can do as it likes. TLS, or the shared token, keeps others out.
//!
//! # When JOIN changes
//! A bound node takes no notice. An unbound one goes by the new list, and keeps its promises, which only makes it more careful; unless it
//! has accepted a decision under the old list. That may have been decided, so it keeps to the old list until it is bound, and says so.

pub mod agree;
pub(crate) mod desk;
pub(crate) mod drive;
pub(crate) mod state;
pub(crate) mod wire;
