//! The Cluster service. Members can be listed; changing them comes with clusters of more than one.

use tonic::{Request, Response, Status};

use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest, MemberPromoteResponse,
    MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
};

use super::{Api, status};

fn unbuilt<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("etcdserver: changing the members is not implemented"))
}

impl Api {
    /// All members, in the order of their ids.
    pub fn members(&self) -> Vec<Member> {
        let membership = self.node.machine.applied().membership;
        let voters: Vec<u64> = membership.voter_ids().collect();
        let members = membership.nodes().map(|(&id, member)| Member {
            id,
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            // A member knows its own best: where it listens may change from one start to the next.
            client_urls: if id == self.node.identity.member_id { self.info.client_urls.clone() } else { member.client_urls.clone() },
            is_learner: !voters.contains(&id),
        });
        members.collect()
    }
}

#[tonic::async_trait]
impl Cluster for Api {
    async fn member_add(&self, _: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        unbuilt()
    }

    async fn member_remove(&self, _: Request<MemberRemoveRequest>) -> Result<Response<MemberRemoveResponse>, Status> {
        unbuilt()
    }

    async fn member_update(&self, _: Request<MemberUpdateRequest>) -> Result<Response<MemberUpdateResponse>, Status> {
        unbuilt()
    }

    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        if request.into_inner().linearizable {
            self.node.read_barrier().await.map_err(status)?;
        }
        // Headers of this service say nothing of revisions.
        Ok(Response::new(MemberListResponse { header: Some(self.node.header(0)), members: self.members() }))
    }

    async fn member_promote(&self, _: Request<MemberPromoteRequest>) -> Result<Response<MemberPromoteResponse>, Status> {
        unbuilt()
    }
}
