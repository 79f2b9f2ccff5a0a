//! The Lease service: what its answers hold beyond what the node gives.

use tonic::Status;

use crate::lock::lock;
use crate::proto::etcdserverpb::{
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};

use super::{Api, status};

impl Api {
    /// Renews a lease: one message of a LeaseKeepAlive.
    pub async fn keep_alive(&self, request: LeaseKeepAliveRequest) -> Result<LeaseKeepAliveResponse, Status> {
        let id = request.id;
        // The revision from before the renewal: whoever sees the lease alive in the answer may rely on it from then on.
        let header = Some(self.node.header_now());
        let ttl = self.node.lease_renew(id).await.map_err(status)?;
        Ok(LeaseKeepAliveResponse { header, id, ttl })
    }

    pub async fn time_to_live(&self, request: LeaseTimeToLiveRequest) -> Result<LeaseTimeToLiveResponse, Status> {
        self.node.read_barrier().await.map_err(status)?;
        let remaining = self.node.lease_remaining(request.id).await.map_err(status)?;
        let found = lock(&self.node.machine.lessor).time_to_live(request.id, self.node.machine.now(), request.keys);
        let header = Some(self.node.header_now());
        // Without the second, it came or went between the two looks.
        Ok(match found.filter(|_| remaining >= 0) {
            Some(found) => LeaseTimeToLiveResponse { header, id: request.id, ttl: remaining, granted_ttl: found.granted, keys: found.keys },
            None => LeaseTimeToLiveResponse { header, id: request.id, ttl: -1, granted_ttl: 0, keys: Vec::new() },
        })
    }

    pub async fn leases(&self) -> Result<LeaseLeasesResponse, Status> {
        self.node.read_barrier().await.map_err(status)?;
        let leases = lock(&self.node.machine.lessor).leases().into_iter().map(|id| LeaseStatus { id }).collect();
        Ok(LeaseLeasesResponse { header: Some(self.node.header_now()), leases })
    }
}
