//! The Cluster service: the members, listed and changed. Changes are taken by any member; see [`members`](crate::node::members).

use tonic::{Request, Response, Status};

use crate::error::{ApplyError, Result};
use crate::lock::lock;
use crate::node::members::is_learner;
use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest, MemberPromoteResponse,
    MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
};

use super::{Api, status};

impl Api {
    /// All members, in the order of their ids.
    pub fn members(&self) -> Vec<Member> {
        let applied = self.node.machine.applied().membership;
        let membership = applied.membership();
        let known = lock(&self.node.machine.members);
        let members = membership.nodes().map(|(&id, member)| {
            let published = known.attributes(id);
            let client_urls = match published {
                // A member knows its own best: where it listens may change from one start to the next.
                _ if id == self.node.identity.member_id => &self.info.client_urls,
                Some(published) => &published.client_urls,
                None => &member.client_urls,
            };
            Member {
                id,
                name: published.map_or(&member.name, |published| &published.name).clone(),
                peer_urls: member.peer_urls.clone(),
                client_urls: client_urls.clone(),
                is_learner: is_learner(membership, id),
            }
        });
        members.collect()
    }
}

// Headers of this service say nothing of revisions.
#[tonic::async_trait]
impl Cluster for Api {
    async fn member_add(&self, request: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        let MemberAddRequest { peer_urls, is_learner } = request.into_inner();
        let id = self.node.member_add(&peer_urls, is_learner).await.map_err(status)?;
        let members = self.members();
        let member = members.iter().find(|member| member.id == id).cloned();
        Ok(Response::new(MemberAddResponse { header: Some(self.node.header(0)), member, members }))
    }

    async fn member_remove(&self, request: Request<MemberRemoveRequest>) -> Result<Response<MemberRemoveResponse>, Status> {
        let id = request.into_inner().id;
        self.node.member_remove(id).await.map_err(status)?;
        let mut members = self.members();
        // One that was removed itself need not have heard of it.
        members.retain(|member| member.id != id);
        Ok(Response::new(MemberRemoveResponse { header: Some(self.node.header(0)), members }))
    }

    async fn member_update(&self, request: Request<MemberUpdateRequest>) -> Result<Response<MemberUpdateResponse>, Status> {
        let MemberUpdateRequest { id, peer_urls } = request.into_inner();
        self.node.member_update(id, &peer_urls).await.map_err(status)?;
        Ok(Response::new(MemberUpdateResponse { header: Some(self.node.header(0)), members: self.members() }))
    }

    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        if request.into_inner().linearizable {
            self.node.read_barrier().await.map_err(status)?;
        }
        Ok(Response::new(MemberListResponse { header: Some(self.node.header(0)), members: self.members() }))
    }

    async fn member_promote(&self, request: Request<MemberPromoteRequest>) -> Result<Response<MemberPromoteResponse>, Status> {
        self.node.member_promote(request.into_inner().id).await.map_err(status)?;
        Ok(Response::new(MemberPromoteResponse { header: Some(self.node.header(0)), members: self.members() }))
    }
}

/// What a learner's client may ask for, as in etcd. Of a Range, it is decided where it is known whether it is serializable.
const FOR_LEARNERS: [&str; 3] = ["/etcdserverpb.KV/Range", "/etcdserverpb.Maintenance/Status", "/etcdserverpb.Maintenance/Snapshot"];

/// # Errors
/// That a learner does not serve this call.
pub(super) fn check_learner(learner: bool, path: &str) -> Result<(), Status> {
    if learner && path.starts_with("/etcdserverpb.") && !FOR_LEARNERS.contains(&path) {
        return Err(status(ApplyError::NotSupportedForLearner.into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learners_serve_what_needs_no_vote() {
        for (path, served) in [
            ("/etcdserverpb.KV/Range", true),
            ("/etcdserverpb.KV/Put", false),
            ("/etcdserverpb.Watch/Watch", false),
            ("/etcdserverpb.Cluster/MemberList", false),
            ("/etcdserverpb.Maintenance/HashKV", false),
            ("/etcdserverpb.Maintenance/Snapshot", true),
            ("/grpc.health.v1.Health/Check", true),
        ] {
            assert_eq!(check_learner(true, path).is_ok(), served, "{path}");
            assert!(check_learner(false, path).is_ok());
        }
    }
}
