//! Making one connection to the operators' address, and saying why there is none.

use std::{
    io::{self, Cursor},
    path::Path,
    sync::Arc,
    time::Duration,
};

use fwpush_device::{
    Dial, Dialling, Io, TcpDial,
    channel::{self, ChannelSettings, ConnectError},
};
use fwpush_keys::tls::{self, Credentials};
use fwpush_proto::v1::admin_service_client::AdminServiceClient;
use rustls::{pki_types::CertificateDer, time_provider::DefaultTimeProvider};
use tokio::io::AsyncReadExt as _;

use crate::{
    client::Admin,
    config::OperatorConfig,
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    limits,
};

/// Reads the operator's certificates.
pub fn settings(config: &OperatorConfig) -> Result<rustls::ClientConfig> {
    let read = || {
        let credentials = Credentials::from_pem(
            &disk::read_text(&config.certificate)?,
            &disk::read_text(&config.key)?,
        )
        .doing(|| {
            format!(
                "use {} with {}",
                config.certificate.display(),
                config.key.display()
            )
        })?;
        let authorities = certificates(&config.node_ca)?;
        tls::client_config(
            credentials,
            authorities,
            &config.trust_domain,
            Arc::new(DefaultTimeProvider),
        )
        .doing(|| "prepare TLS".to_owned())
    };
    read().map_err(Failure::as_usage).next_step(|| {
        format!(
            "{} names certificate, key and node_ca: correct it, or the files.",
            config.path.display()
        )
    })
}

/// The certificates in a PEM file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    tls::certificates_from_pem(&disk::read_text(path)?)
        .doing(|| format!("read certificates from {}", path.display()))
}

/// Connects once.
pub async fn connect(config: &OperatorConfig, tls: &Arc<rustls::ClientConfig>) -> Result<Admin> {
    let settings = ChannelSettings {
        // Backups and listings come to us: a window for 100 ms at 1 Gbit/s.
        stream_window_bytes: 8 << 20,
        connection_window_bytes: 16 << 20,
        connect_timeout: Duration::from_secs(10),
        ..ChannelSettings::default()
    };
    let connection = channel::connect(&settings, &config.server, tls.clone(), &HearFirst)
        .await
        .map_err(|error| explain(config, error))?;
    Ok(AdminServiceClient::new(connection.channel)
        .max_decoding_message_size(limits::ANSWER_BYTES)
        .max_encoding_message_size(limits::ANSWER_BYTES))
}

fn explain(config: &OperatorConfig, error: ConnectError) -> Failure {
    let (server, file) = (&config.server, config.path.display());
    let (why, refused) = match &error {
        ConnectError::Dial { source, .. } => (
            tls::explain(source),
            source.kind() == io::ErrorKind::InvalidData,
        ),
        ConnectError::Timeout { timeout, .. } => {
            (format!("no answer within {} s", timeout.as_secs()), false)
        }
        ConnectError::Http2 { source, .. } => (tls::explain(source), false),
    };
    let failure = Failure::new(format!("connect to {server}: {why}"));
    if refused {
        return failure.next(format!(
            "{file} names the server (its address for operators, not the one for devices), certificate, key and node_ca: \
             all must be of the same installation."
        ));
    }
    failure.next(format!(
        "Is the server running (`fwpush serve --dir DIR`)? {file} says where it is."
    ))
}

/// TCP and TLS, then waits for the server's first bytes.
///
/// In TLS 1.3 a client is done before the server has looked at its certificate. A server that takes it begins with its
/// HTTP/2 settings at once; one that refuses it sends an alert, which is a plain error here and would be one line of text
/// inside others after the first call.
#[derive(Debug)]
struct HearFirst;

impl Dial for HearFirst {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let mut io = TcpDial.dial(server, tls).await?;
            // An HTTP/2 frame header has 9 bytes; whatever comes is passed on.
            let mut first = vec![0; 64];
            let heard = io.read(&mut first).await?;
            if heard == 0 {
                let closed = "the server closed the connection before it said anything";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, closed));
            }
            first.truncate(heard);
            let (rest, writer) = tokio::io::split(io);
            Ok(Box::new(tokio::io::join(Cursor::new(first).chain(rest), writer)) as Box<dyn Io>)
        })
    }
}
