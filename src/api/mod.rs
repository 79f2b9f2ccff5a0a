//! The wire: etcd's services, over the node.
//!
//! Each file serves one of etcd's services and does three things only: look at what concerns the wire (headers, streams,
//! limits), call the [node](crate::node), and give its outcome etcd's form. What a request *means* is decided below.
//!
//! Services that are not built yet (Auth, Lock, Election) answer UNIMPLEMENTED.

use std::sync::Arc;

use tonic::{Code, Status};

use crate::error::{ApplyError, Error};
use crate::node::Node;

pub(crate) mod cluster;
mod conversation;
pub(crate) mod health;
pub(crate) mod http;
pub(crate) mod kv;
pub(crate) mod lease;
pub(crate) mod maintenance;
pub(crate) mod peer;
pub(crate) mod router;
pub(crate) mod serve;
pub(crate) mod stream;
#[cfg(test)]
mod testing;
pub(crate) mod unary;
pub(crate) mod watch;
pub(crate) mod wire;

/// What every service works on.
#[derive(Clone)]
pub(crate) struct Api {
    pub node: Arc<Node>,
    pub info: Arc<Info>,
    /// Ends the streams when the server stops.
    pub stop: tokio_util::sync::CancellationToken,
    /// Places for the snapshots that clients take.
    pub snapshots: Arc<tokio::sync::Semaphore>,
}

/// What the services say about this member, beside the node's own state.
#[derive(Debug)]
pub(crate) struct Info {
    pub client_urls: Vec<String>,
    pub watch_progress_interval: std::time::Duration,
}

/// An error in its form on the wire. Texts of etcd's own errors are kept to the letter: clients match on them.
pub(crate) fn status(err: Error) -> Status {
    match err {
        Error::Apply(err) => Status::new(Code::from_i32(err.code()), err.to_string()),
        Error::Stopped => status(ApplyError::Stopped.into()),
        Error::Timeout => status(ApplyError::Timeout.into()),
        Error::Corrupt { .. } => Status::new(Code::DataLoss, err.to_string()),
        err if err.is_disk_full() => status(ApplyError::NoSpace.into()),
        err => Status::new(Code::Unavailable, err.to_string()),
    }
}
