//! TLS towards a web server that is none of ours, such as a mirror.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};

use super::TlsError;

const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Settings of a client that shows no certificate of its own. A server is accepted when one of `authorities` vouches for its
/// certificate, at the time that `time` says, under the name that is connected to. TLS 1.3 and HTTP/1.1, no resumption.
///
/// Authorities that cannot be read are left out, as browsers do with a system's store; [`TlsError::NoAuthorities`] when
/// none is left.
pub fn web_client_config(
    authorities: impl IntoIterator<Item = CertificateDer<'static>>,
    time: Arc<dyn TimeProvider>,
) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities);
    if roots.is_empty() {
        return Err(TlsError::NoAuthorities);
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
