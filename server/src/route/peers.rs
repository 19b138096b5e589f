//! Calls to other nodes, over mutual TLS with node certificates.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use fwpush_keys::{id::NodeId, tls};
use fwpush_proto::v1::{PushRequest, PushResponse, node_service_client::NodeServiceClient};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::limits;

/// Connections to other nodes, made when they are needed.
#[derive(Debug)]
pub(super) struct Peers {
    tls: Arc<ArcSwap<rustls::ClientConfig>>,
    channels: Mutex<HashMap<NodeId, (String, Channel)>>,
}

impl Peers {
    /// `tls` may be replaced while this runs; new connections use the new one.
    pub(super) fn new(tls: Arc<ArcSwap<rustls::ClientConfig>>) -> Self {
        Self {
            tls,
            channels: Mutex::default(),
        }
    }

    /// Asks `node` to deliver a message; `patience` covers everything.
    pub(super) async fn push(
        &self,
        node: &NodeId,
        address: &str,
        request: PushRequest,
        patience: Duration,
    ) -> Result<PushResponse, Status> {
        let mut client = NodeServiceClient::new(self.channel(node, address)?);
        let called = timeout(patience, client.push_to_client(request)).await;
        let answer = called
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("the node did not answer in time")));
        if answer.is_err() {
            // The next call connects anew: the node may have moved, or the line between us died without a word.
            self.channels().remove(node);
        }
        answer.map(tonic::Response::into_inner)
    }

    fn channel(&self, node: &NodeId, address: &str) -> Result<Channel, Status> {
        let mut channels = self.channels();
        if let Some((at, channel)) = channels.get(node)
            && at == address
        {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| Status::internal("the node's address is malformed"))?
            .connect_timeout(limits::PEER_CONNECT)
            .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
            .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT);
        let (tls, wanted, to) = (self.tls.clone(), node.clone(), address.to_owned());
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            dial(tls.load_full(), wanted.clone(), to.clone())
        }));
        channels.insert(node.clone(), (address.to_owned(), channel.clone()));
        Ok(channel)
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, HashMap<NodeId, (String, Channel)>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects, and makes sure that it is `wanted` who answers: the node authority vouches for every node.
async fn dial(
    tls: Arc<rustls::ClientConfig>,
    wanted: NodeId,
    address: String,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let tcp = TcpStream::connect(&address).await?;
    tcp.set_nodelay(true)?;
    let host = address.rsplit_once(':').map_or(&*address, |(host, _)| host);
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    // Not compared: who answers is known by the id in its certificate.
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let io = TlsConnector::from(tls).connect(name, tcp).await?;
    let certificates = io.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = tls::peer_of(certificates).map_err(io::Error::other)?;
    if peer.identity.id != wanted.as_str() {
        let found = peer.identity.id;
        return Err(io::Error::other(format!(
            "{address} is node {found}, not {wanted}"
        )));
    }
    Ok(TokioIo::new(io))
}
