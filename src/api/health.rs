//! `grpc.health.v1`: whether the server serves. There is one service to ask about, the one without a name.

use std::pin::Pin;

use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::node::Health as NodeHealth;
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::health_server::Health;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};

use super::Api;

fn answer(health: &NodeHealth) -> HealthCheckResponse {
    let serving = matches!(health, NodeHealth::Running);
    HealthCheckResponse { status: if serving { ServingStatus::Serving } else { ServingStatus::NotServing } as i32 }
}

#[tonic::async_trait]
impl Health for Api {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !request.into_inner().service.is_empty() {
            return Err(Status::not_found("unknown service"));
        }
        Ok(Response::new(answer(&self.node.health().borrow())))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        let statuses = [(String::new(), answer(&self.node.health().borrow()))].into();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let known = request.into_inner().service.is_empty();
        let health = self.node.health();
        let states = futures_util::stream::unfold((health, true), move |(mut health, first)| async move {
            if !first && health.changed().await.is_err() {
                return None;
            }
            let unknown = HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 };
            let now = if known { answer(&health.borrow_and_update()) } else { unknown };
            Some((Ok(now), (health, false)))
        });
        Ok(Response::new(Box::pin(states.take_until(self.stop.clone().cancelled_owned()))))
    }
}
