//! Judges of what a cluster has told its clients: pure functions from a recorded history to what is wrong with it.
//!
//! | file | question |
//! |---|---|
//! | `history.rs` | how a history is written down |
//! | `linear.rs` | is there an order of these operations that explains all answers and keeps to real time? (any model) |
//! | `kv.rs` | the model of a store with revisions for it, key by key |
//! | `log.rs` | the same question by etcd's revisions and the store's own log: quick, stronger, and about all keys at once |
//! | `watch.rs` | was a watcher told everything, once, in order, each revision whole? |
//!
//! `kv.rs` and `log.rs` are twins: what the one accepts the other must accept, and they have only the history in common.
//!
//! # What a history is
//! Clients put values that are never used twice, so that a value names the request that wrote it. A request whose answer did not
//! come may be carried out at any time after it was sent, or never; the log says which. A member's answers bear its revision:
//!
//! ```text
//! a: put x=1 ........ revision 7        real time: the put ended before the get began, so the get's revision is 7 or more;
//! b:          get x ........ 7: x=1     the log: at revision 7 the store held x=1
//! ```
#![allow(dead_code)]

pub mod history;
pub mod kv;
pub mod linear;
pub mod log;
pub mod watch;
