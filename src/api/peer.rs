//! The peer port: what members ask each other. See `proto/quorate/peer.proto`.
//!
//! Who calls says in three headers of which cluster it is, who it is and whom it means; see [`network`]. They are looked at
//! before anything else of the call is: a member of another cluster, or one that takes this member for another, is refused with
//! FAILED_PRECONDITION and a text that names both sides, and so is one that was removed. Who is about to join does not know all that
//! yet, and calls Members without any of the headers.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use prost::Message;
use tonic::Status;

use crate::lock::lock;
use crate::metrics::Metrics;
use crate::node::Node;
use crate::node::members::REMOVED;
use crate::proto::peer::{
    AppendRequest, ChangeRequest, InstallSnapshotRequest, MembersRequest, ProposeRequest, PutSnapshotRequest, ReadIndexRequest,
    RenewRequest, TimeToLiveRequest, TransferLeaderRequest, VoteRequest,
};
use crate::raft::network::{self, MESSAGE_BYTES_MAX};
use crate::storage::dir::Identity;

use super::status;
use super::unary::{Metadata, Router};

const PEER: &str = "quorate.peer.Peer";
const MEMBERS: &str = "/quorate.peer.Peer/Members";

/// The router of a peer port. Requests that take longer than `slow` are logged.
pub(crate) fn router(node: &Arc<Node>, slow: Duration, metrics: &Arc<Metrics>) -> Router {
    macro_rules! of {
        ($method:ident, $request:ty) => {
            |node: Arc<Node>, metadata: Metadata, request: $request| async move {
                let from = metadata.get(network::FROM).and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0);
                let peer = node.counters().peers.get(from);
                if let Some(peer) = &peer {
                    peer.received_bytes.add(request.encoded_len() as u64);
                }
                let answer = node.$method(request).await.map_err(status)?;
                if let Some(peer) = &peer {
                    peer.sent_bytes.add(answer.encoded_len() as u64);
                }
                Ok(answer)
            }
        };
    }
    let ours = node.clone();
    Router::new(MESSAGE_BYTES_MAX, slow, metrics.clone())
        .guard(move |path, headers| check(&ours.identity, path, headers, &|id| lock(&ours.machine.members).is_removed(id)))
        .unary(PEER, "Append", node, of!(peer_append, AppendRequest))
        .unary(PEER, "Vote", node, of!(peer_vote, VoteRequest))
        .unary(PEER, "Propose", node, of!(peer_propose, ProposeRequest))
        .unary(PEER, "ReadIndex", node, of!(peer_read_index, ReadIndexRequest))
        .unary(PEER, "Renew", node, of!(peer_renew, RenewRequest))
        .unary(PEER, "TimeToLive", node, of!(peer_time_to_live, TimeToLiveRequest))
        .unary(PEER, "PutSnapshot", node, of!(peer_put_snapshot, PutSnapshotRequest))
        .unary(PEER, "InstallSnapshot", node, of!(peer_install_snapshot, InstallSnapshotRequest))
        .unary(PEER, "TransferLeader", node, of!(peer_transfer_leader, TransferLeaderRequest))
        .unary(PEER, "Change", node, of!(peer_change, ChangeRequest))
        .unary(PEER, "Members", node, of!(peer_members, MembersRequest))
}

fn check(ours: &Identity, path: &str, headers: &HeaderMap, is_removed: &dyn Fn(u64) -> bool) -> Result<(), Status> {
    let named = [network::CLUSTER, network::FROM, network::TO].iter().any(|name| headers.contains_key(*name));
    if path == MEMBERS && !named {
        return Ok(());
    }
    let id = |name: &str| {
        let text = headers.get(name).and_then(|value| value.to_str().ok());
        let id = text.and_then(|text| u64::from_str_radix(text, 16).ok());
        id.ok_or_else(|| Status::failed_precondition(format!("this is a peer port, and the header {name} says nothing of a member")))
    };
    let (cluster, from, to) = (id(network::CLUSTER)?, id(network::FROM)?, id(network::TO)?);
    if cluster != ours.cluster_id {
        let text = format!("member {:x} belongs to cluster {:x}, not to {cluster:x}", ours.member_id, ours.cluster_id);
        return Err(Status::failed_precondition(text));
    }
    if to != ours.member_id {
        return Err(Status::failed_precondition(format!("this is member {:x}, not {to:x}", ours.member_id)));
    }
    if is_removed(from) {
        return Err(Status::failed_precondition(REMOVED));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_told_apart() {
        let ours = Identity { cluster_id: 0xc, member_id: 0xa, name: String::new(), joined: false };
        let removed = |id| id == 0xd;
        let checked = |cluster: &str, from: &str, to: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(network::CLUSTER, cluster.parse().unwrap());
            headers.insert(network::FROM, from.parse().unwrap());
            headers.insert(network::TO, to.parse().unwrap());
            check(&ours, MEMBERS, &headers, &removed).map_err(|status| status.message().to_owned())
        };
        assert_eq!(checked("000000000000000c", "000000000000000b", "000000000000000a"), Ok(()));
        assert_eq!(checked("d", "b", "a").unwrap_err(), "member a belongs to cluster c, not to d");
        assert_eq!(checked("c", "b", "b").unwrap_err(), "this is member a, not b");
        assert!(checked("c", "b", "x").unwrap_err().contains("quorate-to"));
        assert_eq!(checked("c", "d", "a").unwrap_err(), REMOVED);
        // Who is about to join.
        assert!(check(&ours, MEMBERS, &HeaderMap::new(), &removed).is_ok());
        assert!(check(&ours, "/quorate.peer.Peer/Append", &HeaderMap::new(), &removed).unwrap_err().message().contains("quorate-cluster"));
    }
}
