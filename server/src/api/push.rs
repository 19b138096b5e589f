//! `PushService.Connect`: authorises the stream and hands it to [`crate::stream`].

use fwpush_proto::v1::{ClientMessage, ServerMessage, push_service_server::PushService};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use crate::{
    api::{authorize, status},
    budget::Ask,
    listen::Caller,
    stream::{self, Context},
};

/// The service devices open their control stream on.
#[derive(Clone, Debug)]
pub struct Push {
    context: Context,
}

impl Push {
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl PushService for Push {
    type ConnectStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ClientMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (device, caller) = authorize::device(request.extensions().get::<Caller>())?;
        let access = &self.context.access;
        access
            .spend(&device, Ask::Connect)
            .map_err(status::access)?;
        let (context, caller) = (self.context.clone(), caller.clone());
        // One message ahead of the socket: what waits longer waits in the session's latest-wins slot.
        let (out, answer) = mpsc::channel(1);
        let span = tracing::info_span!("stream", device.id = %device, peer = %caller.address);
        let inbound = request.into_inner();
        tokio::spawn(stream::run(context, device, caller, inbound, out).instrument(span));
        Ok(Response::new(ReceiverStream::new(answer)))
    }
}
