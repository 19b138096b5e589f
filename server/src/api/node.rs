//! `NodeService`: what other nodes ask of this one.

use std::time::Duration;

use fwpush_keys::id::DeviceId;
use fwpush_proto::v1::{
    PushOutcome, PushRequest, PushResponse, ServerMessage, node_service_server::NodeService,
    server_message::Kind as ToDevice,
};
use tonic::{Request, Response, Status};

use crate::{api::authorize, limits, route::Route, session::Sessions};

/// Delivers to the sessions of this node.
#[derive(Clone, Debug)]
pub struct Nodes {
    sessions: Sessions,
    route: Route,
}

impl Nodes {
    pub fn new(sessions: Sessions, route: Route) -> Self {
        Self { sessions, route }
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
        check_kind(&message)?;
        let mut answered_us = 0;
        let outcome = if matches!(message.kind, Some(ToDevice::Ping(_))) {
            let pushed = self.route.ping_here(&device, request.epoch).await;
            answered_us = pushed.answered.map_or(0, in_us);
            pushed.outcome
        } else {
            self.sessions.push(&device, message, request.epoch)
        };
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
            answered_us,
        }))
    }
}

/// What a device should run, and what of its reports is committed, it hears from the node that holds its stream and from no other.
fn check_kind(message: &ServerMessage) -> Result<(), Status> {
    match &message.kind {
        Some(ToDevice::Ping(_)) => Ok(()),
        Some(ToDevice::Text(text)) if text.text.len() <= limits::MESSAGE_TEXT_BYTES => Ok(()),
        Some(ToDevice::Text(_)) => {
            let most = limits::MESSAGE_TEXT_BYTES;
            Err(Status::invalid_argument(format!(
                "a text has at most {most} bytes"
            )))
        }
        _ => Err(Status::invalid_argument(
            "nodes pass on texts and pings, nothing else",
        )),
    }
}

/// Microseconds; at least one, since 0 means that no answer came.
pub fn in_us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
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
