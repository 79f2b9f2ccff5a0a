//! The generated types and clients that the tests use, in one place.
//!
//! Everything else in `tests/` names them through this module, and takes key-value pairs out of answers by [`kv`] only,
//! because the crate's own types hold a pair in its encoded form.

pub use quorate::proto::etcdserverpb::*;
pub use quorate::proto::mvccpb::Event;
pub use quorate::proto::{EncodedKv as WireKv, KeyValue};

/// The pair that an answer holds.
pub fn kv(wire: &WireKv) -> KeyValue {
    wire.decode().expect("a member sends well-formed pairs")
}
