//! The Lease service: Grant, Revoke, KeepAlive, TimeToLive, Leases.

use std::pin::Pin;

use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::error::ApplyError;
use crate::lock::lock;
use crate::proto::etcdserverpb::lease_server::Lease;
use crate::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};

use super::{Api, status};

impl Api {
    async fn keep_alive(&self, request: Result<LeaseKeepAliveRequest, Status>) -> Result<LeaseKeepAliveResponse, Status> {
        let id = request?.id;
        // The revision from before the renewal: whoever sees the lease alive in the answer may rely on it from then on.
        let header = Some(self.node.header_now());
        let ttl = self.node.lease_renew(id).await.map_err(status)?;
        Ok(LeaseKeepAliveResponse { header, id, ttl })
    }
}

#[tonic::async_trait]
impl Lease for Api {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        self.node.lease_grant(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn lease_revoke(&self, request: Request<LeaseRevokeRequest>) -> Result<Response<LeaseRevokeResponse>, Status> {
        self.node.lease_revoke(request.into_inner()).await.map(Response::new).map_err(status)
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let api = self.clone();
        let answers = request.into_inner().then(move |request| {
            let api = api.clone();
            async move { api.keep_alive(request).await }
        });
        let stopped = futures_util::stream::once(std::future::ready(Err(status(ApplyError::Stopped.into()))));
        let stop = self.stop.clone();
        // When the server stops, the stream ends with an error; when the client ends it, without.
        let told = stop.clone().cancelled_owned();
        let stream = answers.take_until(told).chain(stopped.filter(move |_| std::future::ready(stop.is_cancelled())));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn lease_time_to_live(&self, request: Request<LeaseTimeToLiveRequest>) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let request = request.into_inner();
        self.node.read_barrier().await.map_err(status)?;
        let found = lock(&self.node.machine.lessor).time_to_live(request.id, self.node.machine.now(), request.keys);
        let header = Some(self.node.header_now());
        let response = match found {
            Some(found) => {
                LeaseTimeToLiveResponse { header, id: request.id, ttl: found.remaining, granted_ttl: found.granted, keys: found.keys }
            }
            None => LeaseTimeToLiveResponse { header, id: request.id, ttl: -1, granted_ttl: 0, keys: Vec::new() },
        };
        Ok(Response::new(response))
    }

    async fn lease_leases(&self, _: Request<LeaseLeasesRequest>) -> Result<Response<LeaseLeasesResponse>, Status> {
        self.node.read_barrier().await.map_err(status)?;
        let leases = lock(&self.node.machine.lessor).leases().into_iter().map(|id| LeaseStatus { id }).collect();
        Ok(Response::new(LeaseLeasesResponse { header: Some(self.node.header_now()), leases }))
    }
}
