//! `NodeService`: what other nodes ask of this one.

use fwpush_keys::id::DeviceId;
use fwpush_proto::v1::{PushOutcome, PushRequest, PushResponse, node_service_server::NodeService};
use tonic::{Request, Response, Status};

use crate::{api::authorize, session::Sessions};

/// Delivers to the sessions of this node.
#[derive(Clone, Debug)]
pub struct Nodes {
    sessions: Sessions,
}

impl Nodes {
    pub fn new(sessions: Sessions) -> Self {
        Self { sessions }
    }
}

#[tonic::async_trait]
impl NodeService for Nodes {
    async fn push_to_client(
        &self,
        request: Request<PushRequest>,
    ) -> Result<Response<PushResponse>, Status> {
        let node = authorize::node(request.extensions())?;
        let request = request.into_inner();
        let device: DeviceId = request
            .client_id
            .parse()
            .map_err(|_| Status::invalid_argument("client_id is not an id"))?;
        let message = request
            .message
            .ok_or_else(|| Status::invalid_argument("no message"))?;
        let outcome = self.sessions.push(&device, message, request.epoch);
        tracing::debug!(device.id = %device, node.id = %node, ?outcome, "A node pushed a message.");
        let success = outcome == PushOutcome::Delivered;
        let error = if success {
            String::new()
        } else {
            explain(outcome).to_owned()
        };
        Ok(Response::new(PushResponse {
            success,
            error,
            outcome: outcome.into(),
        }))
    }
}

/// An outcome in words, for people.
pub fn explain(outcome: PushOutcome) -> &'static str {
    match outcome {
        PushOutcome::Unspecified => "unknown",
        PushOutcome::Delivered => "handed to the device's stream",
        PushOutcome::NotHere => "the device has no stream here",
        PushOutcome::StaleEpoch => "the device has another session by now",
        PushOutcome::Busy => "the device's queue is full; it reads too slowly",
    }
}
