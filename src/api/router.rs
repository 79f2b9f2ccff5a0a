//! Which path leads where: every RPC, in one list.
//!
//! Unary calls are served by [`unary`](super::unary) itself, and so is LeaseKeepAlive by [`conversation`](super::conversation); other
//! streams by tonic services behind it. A Range whose answer is too large to be held is streamed as one message: its length is known, its
//! bytes are fetched as the client takes them.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use http::HeaderMap;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use tonic::service::Routes;
use tonic::{Request, Status};

use crate::error::Result;
use crate::metrics::{MethodKind, Metrics};
use crate::node::{Node, RangeAnswer};
use crate::proto::FILE_DESCRIPTOR_SET;
use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::kv_server::KvServer;
use crate::proto::etcdserverpb::maintenance_server::{Maintenance, MaintenanceServer};
use crate::proto::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseLeasesRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RangeResponse, TxnRequest,
};
use crate::proto::health::health_server::{Health, HealthServer};
use crate::raft::network::CLUSTER;

use super::cluster::check_learner;
use super::conversation::Conversation;
use super::kv::Left;
use super::unary::{Either, MESSAGE_OVERHEAD, Pace, Router, Streamed, check_leader};
use super::watch::WatchService;
use super::{Api, status};

/// Bytes of a streamed answer that are fetched in one go.
const PIECE_BYTES: usize = 256 << 10;

/// Number of `RangeResponse.kvs`.
const KVS_FIELD: u32 = 2;

/// How a call is refused that means another cluster; nothing of it was done.
pub(crate) const OTHER_CLUSTER: &str = "this member belongs to another cluster";

/// Refuses a call that says which cluster it means, as those of nodes of the embedded mode do, if it is not this one. etcd's clients do not say.
fn check_cluster(ours: u64, headers: &HeaderMap) -> Result<(), Status> {
    match headers.get(CLUSTER).and_then(|value| value.to_str().ok()) {
        Some(meant) if u64::from_str_radix(meant, 16) != Ok(ours) => {
            Err(Status::failed_precondition(format!("{OTHER_CLUSTER}: {ours:x}, and not {meant}")))
        }
        _ => Ok(()),
    }
}

/// The router of a client port. Unary requests that take longer than `slow` are logged.
pub(crate) fn router(api: &Api, slow: Duration, metrics: &Arc<Metrics>) -> crate::error::Result<Router> {
    const KV: &str = "etcdserverpb.KV";
    const LEASE: &str = "etcdserverpb.Lease";
    const CLUSTER: &str = "etcdserverpb.Cluster";
    const MAINTENANCE: &str = "etcdserverpb.Maintenance";
    const HEALTH: &str = "grpc.health.v1.Health";
    /// A method of a tonic service, called without its wrappers.
    macro_rules! of {
        ($trait:ident::$method:ident) => {
            |api: Api, _, request| async move { $trait::$method(&api, Request::new(request)).await.map(tonic::Response::into_inner) }
        };
    }
    let keep_alive = |api: Api, request| async move { api.keep_alive(request).await };
    let limit = api.node.options.max_request_bytes + MESSAGE_OVERHEAD;
    let node = api.node.clone();
    let mut router = Router::new(limit, slow, metrics.clone())
        .guard(move |path, headers| {
            check_cluster(node.identity.cluster_id, headers)?;
            check_learner(node.is_learner(), path)?;
            check_leader(node.has_leader(), headers)
        })
        .unary(KV, "Range", api, |api: Api, _, request: RangeRequest| async move { range_answer(api, request).await })
        .unary(KV, "Put", api, |api: Api, _, request: PutRequest| async move { api.node.put(request).await.map_err(status) })
        .unary(KV, "DeleteRange", api, |api: Api, _, request: DeleteRangeRequest| async move {
            api.node.delete_range(request).await.map_err(status)
        })
        .unary(KV, "Txn", api, |api: Api, _, request: TxnRequest| async move { api.node.txn(request).await.map_err(status) })
        .unary(KV, "Compact", api, |api: Api, _, request: CompactionRequest| async move { api.node.compact(request).await.map_err(status) })
        .streaming(KV, "RangeStream", MethodKind::ServerStream, Pace::Steady)
        .streaming("etcdserverpb.Watch", "Watch", MethodKind::BidiStream, Pace::Any)
        .unary(LEASE, "LeaseGrant", api, |api: Api, _, request: LeaseGrantRequest| async move {
            api.node.lease_grant(request).await.map_err(status)
        })
        .unary(LEASE, "LeaseRevoke", api, |api: Api, _, request: LeaseRevokeRequest| async move {
            api.node.lease_revoke(request).await.map_err(status)
        })
        .unary(LEASE, "LeaseTimeToLive", api, |api: Api, _, request| async move { api.time_to_live(request).await })
        .unary(LEASE, "LeaseLeases", api, |api: Api, _, _: LeaseLeasesRequest| async move { api.leases().await })
        .conversation(LEASE, "LeaseKeepAlive", Conversation::new(api, api.stop.clone(), keep_alive))
        .unary(CLUSTER, "MemberAdd", api, of!(Cluster::member_add))
        .unary(CLUSTER, "MemberRemove", api, of!(Cluster::member_remove))
        .unary(CLUSTER, "MemberUpdate", api, of!(Cluster::member_update))
        .unary(CLUSTER, "MemberList", api, of!(Cluster::member_list))
        .unary(CLUSTER, "MemberPromote", api, of!(Cluster::member_promote))
        .unary(MAINTENANCE, "Alarm", api, of!(Maintenance::alarm))
        .unary(MAINTENANCE, "Status", api, of!(Maintenance::status))
        .unary(MAINTENANCE, "Defragment", api, of!(Maintenance::defragment))
        .unary(MAINTENANCE, "Hash", api, of!(Maintenance::hash))
        .unary(MAINTENANCE, "HashKV", api, of!(Maintenance::hash_kv))
        .unary(MAINTENANCE, "MoveLeader", api, of!(Maintenance::move_leader))
        .unary(MAINTENANCE, "Downgrade", api, of!(Maintenance::downgrade))
        .streaming(MAINTENANCE, "Snapshot", MethodKind::ServerStream, Pace::Steady)
        .unary(HEALTH, "Check", api, of!(Health::check))
        .unary(HEALTH, "List", api, of!(Health::list))
        .streaming(HEALTH, "Watch", MethodKind::ServerStream, Pace::Any)
        .streaming("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo", MethodKind::BidiStream, Pace::Any)
        .streaming("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo", MethodKind::BidiStream, Pace::Any);
    let reflection = || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET);
    let unusable = |err: tonic_reflection::server::Error| crate::error::Error::Failed(format!("describing the services: {err}"));
    let routes = Routes::new(WatchService { api: api.clone(), max_request_bytes: limit })
        .add_service(KvServer::new(api.clone()).max_decoding_message_size(limit))
        .add_service(MaintenanceServer::new(api.clone()).max_decoding_message_size(limit))
        .add_service(HealthServer::new(api.clone()).max_decoding_message_size(limit))
        .add_service(reflection().build_v1().map_err(unusable)?)
        .add_service(reflection().build_v1alpha().map_err(unusable)?);
    router = router.routes(routes);
    Ok(router)
}

async fn range_answer(api: Api, request: RangeRequest) -> Result<Either<RangeResponse>, Status> {
    let answer = api.node.range(&request).await.map_err(status)?;
    if answer.result.held {
        return answer.collect().map(Either::Message).map_err(status);
    }
    Ok(Either::Streamed(stream_answer(api.node, answer)))
}

/// A large answer as one message in pieces: header first, then the pairs, then the rest.
fn stream_answer(node: Arc<Node>, answer: RangeAnswer) -> Streamed {
    let RangeAnswer { result, pin, keys_only, header } = answer;
    let head = RangeResponse { header: Some(header), ..RangeResponse::default() }.encode_to_vec();
    let tail = RangeResponse { more: result.more, count: result.count, ..RangeResponse::default() }.encode_to_vec();
    let field = |len: usize| 1 + encoded_len_varint(len as u64) + len;
    let len = head.len() + result.hits.iter().map(|hit| field(hit.len)).sum::<usize>() + tail.len();
    let begin = (node, Left::new(result.hits, pin, keys_only), Some(tail));
    let pieces = futures_util::stream::try_unfold(begin, |(node, left, tail)| async move {
        let Some(tail) = tail else { return Ok(None) };
        let (left, mut piece) = left.part(&node, piece).await.map_err(status)?;
        let tail = if left.is_empty() {
            piece.put_slice(&tail);
            None
        } else {
            Some(tail)
        };
        Ok(Some((piece.freeze(), (node, left, tail))))
    });
    let first = futures_util::stream::once(std::future::ready(Ok(Bytes::from(head))));
    Streamed { len, chunks: first.chain(pieces).boxed() }
}

/// The next piece of an answer.
fn piece(left: &mut Left) -> Result<BytesMut> {
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    while piece.len() < PIECE_BYTES {
        let Some(kv) = left.fetch()? else { break };
        encode_key(KVS_FIELD, WireType::LengthDelimited, &mut piece);
        encode_varint(kv.encoded_len() as u64, &mut piece);
        kv.encode_raw(&mut piece);
    }
    Ok(piece)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_for_another_cluster_is_refused() {
        let checked = |meant: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(meant) = meant {
                headers.insert(CLUSTER, meant.parse().unwrap());
            }
            check_cluster(0xc, &headers).map_err(|status| status.message().to_owned())
        };
        assert_eq!((checked(None), checked(Some("000000000000000c"))), (Ok(()), Ok(())));
        assert_eq!(checked(Some("d")).unwrap_err(), format!("{OTHER_CLUSTER}: c, and not d"));
        assert!(checked(Some("x")).is_err());
    }
}
