//! The peer port: what members ask each other. See `proto/quorate/peer.proto`.
//!
//! Who calls says in three headers of which cluster it is, who it is and whom it means; see [`network`]. They are looked at
//! before anything else of the call is: a member of another cluster, or one that takes this member for another, is refused with
//! FAILED_PRECONDITION and a text that names both sides, and so is one that was removed. Who is about to join does not know all that
//! yet, and calls Members without any of the headers. Founding messages have none either; they have a seal of their own.
//!
//! # A member without its data
//! A member that comes back with another data directory than it had has forgotten what it has voted and acknowledged: with its vote a
//! leader could be elected that lacks what clients were told is safe. So it says which [incarnation](crate::storage::dir) its directory is,
//! and the others refuse one that is not the one it has published; and each says which one it takes the other to be, so that such a
//! member refuses itself to those who know better. Not recognized is a copy of the same directory from an earlier time, nor is a directory
//! that was lost before all others had applied the entry with its incarnation, which is among the first of a cluster.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::HeaderMap;
use prost::Message;
use tonic::Status;

use crate::lock::lock;
use crate::metrics::Metrics;
use crate::node::Node;
use crate::node::members::{OTHER_DATA, REMOVED};
use crate::proto::founding::Envelope;
use crate::proto::peer::{
    AppendRequest, ChangeRequest, GetSnapshotRequest, HashRequest, InstallSnapshotRequest, MembersRequest, ProposeRequest,
    PutSnapshotRequest, ReadIndexRequest, RenewRequest, TimeToLiveRequest, TransferLeaderRequest, VoteRequest,
};
use crate::raft::members::Members;
use crate::raft::network::{self, MESSAGE_BYTES_MAX};
use crate::slow::Refusals;
use crate::storage::dir::Identity;

use super::status;
use super::unary::{Metadata, Router};

/// Answers what nodes ask each other before there is a cluster, and of one that there is; see `proto/quorate/founding.proto`.
pub(crate) type Say = Arc<dyn Fn(Envelope) -> BoxFuture<'static, Result<Envelope, Status>> + Send + Sync>;

/// The largest founding message. Beyond it it is refused.
const FOUNDING_BYTES_MAX: usize = 256 << 10;

const FOUNDING: &str = "quorate.founding.Founding";
const SAY: &str = "/quorate.founding.Founding/Say";

const PEER: &str = "quorate.peer.Peer";
const MEMBERS: &str = "/quorate.peer.Peer/Members";

/// The router of the peer port of a node that is no member, or not yet.
pub(crate) fn founding(say: &Say, slow: Duration, metrics: &Arc<Metrics>) -> Router {
    add_founding(Router::new(FOUNDING_BYTES_MAX, slow, metrics.clone()), say)
}

fn add_founding(router: Router, say: &Say) -> Router {
    router.unary(FOUNDING, "Say", say, |say: Say, _, envelope: Envelope| async move { say(envelope).await })
}

/// The router of a peer port. Requests that take longer than `slow` are logged.
pub(crate) fn router(node: &Arc<Node>, say: Option<&Say>, slow: Duration, metrics: &Arc<Metrics>) -> Router {
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
    let (ours, refused) = (node.clone(), Refusals::new());
    let guard = move |path: &str, headers: &HeaderMap| {
        let checked = check(&ours.identity, path, headers, &lock(&ours.machine.members));
        if let Err(status) = &checked
            && let Some(unreported) = refused.tell()
        {
            // Who calls does not end by that, and may not be looked at by anybody: so it can be found from either side.
            tracing::warn!(path, error = status.message(), unreported, "refused a call on the peer port");
        }
        checked
    };
    let router = Router::new(MESSAGE_BYTES_MAX, slow, metrics.clone())
        .guard(guard)
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
        .unary(PEER, "Hash", node, of!(peer_hash, HashRequest))
        .unary(PEER, "GetSnapshot", node, of!(peer_get_snapshot, GetSnapshotRequest));
    match say {
        Some(say) => add_founding(router, say),
        None => router,
    }
}

/// Answers one call of another member, as the router would, in a simulation that carries the bytes itself.
#[cfg(feature = "simulation")]
pub(crate) async fn serve(node: &Arc<Node>, call: crate::raft::wire::Call) -> Result<bytes::Bytes, Status> {
    let crate::raft::wire::Call { path, headers, message } = call;
    check(&node.identity, &path, &headers, &lock(&node.machine.members))?;
    macro_rules! of {
        ($method:ident) => {{
            let request = Message::decode(message).map_err(super::unary::undecodable)?;
            node.$method(request).await.map_err(status)?.encode_to_vec().into()
        }};
    }
    Ok(match path.strip_prefix("/quorate.peer.Peer/") {
        Some("Append") => of!(peer_append),
        Some("Vote") => of!(peer_vote),
        Some("Propose") => of!(peer_propose),
        Some("ReadIndex") => of!(peer_read_index),
        Some("Renew") => of!(peer_renew),
        Some("TimeToLive") => of!(peer_time_to_live),
        Some("PutSnapshot") => of!(peer_put_snapshot),
        Some("InstallSnapshot") => of!(peer_install_snapshot),
        Some("TransferLeader") => of!(peer_transfer_leader),
        Some("Change") => of!(peer_change),
        Some("Members") => of!(peer_members),
        Some("Hash") => of!(peer_hash),
        Some("GetSnapshot") => of!(peer_get_snapshot),
        _ => return Err(Status::unimplemented(path)),
    })
}

fn check(ours: &Identity, path: &str, headers: &HeaderMap, members: &Members) -> Result<(), Status> {
    let named = [network::CLUSTER, network::FROM, network::TO].iter().any(|name| headers.contains_key(*name));
    if (path == MEMBERS && !named) || path == SAY {
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
    if members.is_removed(from) {
        return Err(Status::failed_precondition(REMOVED));
    }
    let incarnation = |name: &str| headers.contains_key(name).then(|| id(name)).transpose();
    if let (Some(says), Some(known)) = (incarnation(network::FROM_INCARNATION)?, members.incarnation(from))
        && says != known
    {
        let name = members.attributes(from).map_or("", |attributes| &attributes.name);
        return Err(Status::failed_precondition(without_its_data(from, name)));
    }
    if let Some(known) = incarnation(network::TO_INCARNATION)?
        && ours.incarnation != 0
        && ours.incarnation != known
    {
        return Err(Status::failed_precondition(without_its_data(ours.member_id, &ours.name)));
    }
    Ok(())
}

/// What both sides of a refused call are told.
fn without_its_data(id: u64, name: &str) -> String {
    format!(
        "member {id:x} ({name:?}) {OTHER_DATA}, and so without what it has acknowledged: \
         remove it (etcdctl member remove {id:x}), delete its data directory, and add it anew (etcdctl member add)"
    )
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::internal::MemberAttributes;

    #[test]
    fn strangers_are_told_apart() {
        let ours = Identity { cluster_id: 0xc, member_id: 0xa, name: "ours".into(), joined: false, incarnation: 0x77 };
        let mut removed = Members::default();
        removed.load(b"member/removed/\0\0\0\0\0\0\0\x0d", &bytes::Bytes::new()).unwrap();
        let published = MemberAttributes { id: 0xb, name: "other".into(), client_urls: Vec::new(), incarnation: 0x99 };
        removed.load(b"member/attributes/\0\0\0\0\0\0\0\x0b", &published.encode_to_vec().into()).unwrap();
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
        // Which data directory each has, where both are known.
        let incarnations = |from: Option<&str>, to: Option<&str>| {
            let mut headers = HeaderMap::new();
            let all = [(network::CLUSTER, Some("c")), (network::FROM, Some("b")), (network::TO, Some("a"))];
            let all = all.into_iter().chain([(network::FROM_INCARNATION, from), (network::TO_INCARNATION, to)]);
            for (name, value) in all.filter_map(|(name, value)| Some((name, value?))) {
                headers.insert(name, value.parse().unwrap());
            }
            check(&ours, "/quorate.peer.Peer/Vote", &headers, &removed).map_err(|status| status.message().to_owned())
        };
        assert_eq!(incarnations(Some("99"), Some("77")), Ok(()));
        assert_eq!(incarnations(None, None), Ok(()));
        let refusal = incarnations(Some("98"), Some("77")).unwrap_err();
        assert!(refusal.contains("member b (\"other\") has come back") && refusal.contains("etcdctl member remove b"), "{refusal}");
        let refusal = incarnations(Some("99"), Some("76")).unwrap_err();
        assert!(refusal.contains("member a (\"ours\") has come back"), "{refusal}");
        assert!(incarnations(Some("x"), None).is_err());
        // Who is about to join.
        assert!(check(&ours, MEMBERS, &HeaderMap::new(), &removed).is_ok());
        assert!(check(&ours, "/quorate.peer.Peer/Append", &HeaderMap::new(), &removed).unwrap_err().message().contains("quorate-cluster"));
    }
}
