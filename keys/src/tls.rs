//! TLS as fwpush uses it: version 1.3 only, certificates on both sides, no resumption, no early data, HTTP/2.
//!
//! A resumed session would skip the certificate verifiers, and with them expiry and revocation; so neither side offers
//! one. The cryptography is named explicitly (aws-lc-rs): nothing depends on what else is linked.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::id::TrustDomain;
use crate::identity::{Identity, IdentityError, Role};
use crate::limits::PEM_BYTES;
use crate::time::Timestamp;

pub use crate::explain::{error_text, explain};
pub use web::web_client_config;

mod web;

const ALPN_H2: &[u8] = b"h2";

/// Why TLS cannot be set up with what was configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Too large to be what it should be.
    #[error("{what} has {got} bytes; at most {PEM_BYTES} are read")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// Its size.
        got: usize,
    },
    /// No such thing in the PEM file.
    #[error("no {0} in the PEM file, or it is damaged")]
    Pem(&'static str),
    /// A role without an authority, or none at all.
    #[error("no authority certificate for role {0}")]
    NoAuthority(Role),
    /// No role at all.
    #[error("no authority certificates")]
    NoAuthorities,
    /// One authority for two roles would accept a device as an operator.
    #[error("the same authority key is configured for {0} and {1}")]
    SharedAuthority(Role, Role),
    /// An authority certificate that cannot be used.
    #[error("authority certificate for role {role} is not usable")]
    Authority {
        /// Of which role.
        role: Role,
        /// What is wrong.
        source: rustls::Error,
    },
    /// Certificate and key do not fit together, or the key is of a kind that TLS does not have.
    #[error("certificate and private key are not usable")]
    Credentials(#[source] rustls::Error),
    /// The cryptography lacks what TLS 1.3 needs.
    #[error("TLS 1.3 is not available")]
    Protocol(#[source] rustls::Error),
    /// The client verifier refused its authorities.
    #[error("authorities are not usable")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Why a peer with a certificate of a known authority is refused all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    /// Which role would it have?
    #[error("certificate is accepted by the authorities of more than one role")]
    Ambiguous,
    /// Its certificate names nobody.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// An authority may only vouch for its own role.
    #[error("certificate has the role {named} but was signed by the {authority} authority")]
    Role {
        /// In the certificate.
        named: Role,
        /// Who signed it.
        authority: Role,
    },
    /// Another installation.
    #[error("certificate belongs to trust domain {got}, not {expected}")]
    TrustDomain {
        /// Ours.
        expected: TrustDomain,
        /// The certificate's.
        got: TrustDomain,
    },
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        CertificateError::Other(OtherError(Arc::new(refused))).into()
    }
}

/// A certificate chain, leaf first, with the leaf's private key.
pub struct Credentials {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's.
    pub key: PrivateKeyDer<'static>,
}

impl Credentials {
    /// Reads PEM files: at least one certificate, and one private key (PKCS#8, SEC1 or PKCS#1). Whether they fit together
    /// shows when they are used.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, TlsError> {
        if key_pem.len() > PEM_BYTES {
            return Err(TlsError::TooLong {
                what: "private key",
                got: key_pem.len(),
            });
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| TlsError::Pem("private key"))?;
        Ok(Self {
            chain: certificates_from_pem(cert_pem)?,
            key,
        })
    }

    /// Who the leaf says we are.
    pub fn peer(&self) -> Result<Peer, IdentityError> {
        peer_of(&self.chain)
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("certificates", &self.chain.len())
            .finish_non_exhaustive()
    }
}

/// All certificates of a PEM file; at least one.
pub fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let what = "certificate";
    if pem.len() > PEM_BYTES {
        return Err(TlsError::TooLong {
            what,
            got: pem.len(),
        });
    }
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| TlsError::Pem(what))?;
    if certificates.is_empty() {
        return Err(TlsError::Pem(what));
    }
    Ok(certificates)
}

/// Who is at the other end, from the certificate that a handshake has verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Whom it names.
    pub identity: Identity,
    /// The serial number's bytes, without leading zeros.
    pub serial: Vec<u8>,
    /// When it ends; live streams outlive it unless somebody looks.
    pub not_after: Timestamp,
    /// SHA-256 of the leaf certificate.
    pub fingerprint: [u8; 32],
}

/// Reads the peer from its chain, leaf first. Verifies nothing: only for chains that a handshake has accepted.
pub fn peer_of(certificates: &[CertificateDer<'_>]) -> Result<Peer, IdentityError> {
    let leaf = certificates.first().ok_or(IdentityError::NoCertificate)?;
    let identity = Identity::from_certificate(leaf)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| IdentityError::Malformed)?;
    let serial = parsed.raw_serial();
    let zeros = serial.iter().take_while(|b| **b == 0).count();
    Ok(Peer {
        identity,
        serial: serial[zeros..].to_vec(),
        not_after: Timestamp::from_ms(parsed.validity().not_after.timestamp().saturating_mul(1000)),
        fingerprint: Sha256::digest(leaf).into(),
    })
}

/// Settings of a server that judges by the system's clock: see [`server_config_at`].
pub fn server_config(
    credentials: Credentials,
    authorities: &[(Role, Vec<CertificateDer<'static>>)],
    trust_domain: &TrustDomain,
    bar: Bar,
) -> Result<ServerConfig, TlsError> {
    let time = Arc::new(DefaultTimeProvider);
    server_config_at(credentials, authorities, trust_domain, time, bar)
}

/// Names clients that are refused although their certificates are in order: blocked ones. They are told that their
/// certificate is revoked, in the handshake, before anything of theirs is read.
#[derive(Clone)]
pub struct Bar(Arc<dyn Fn(&Identity) -> bool + Send + Sync>);

impl Bar {
    /// Refuses those for whom `barred` is true. It is asked in every handshake and must not wait for anything.
    pub fn new(barred: impl Fn(&Identity) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(barred))
    }

    /// Refuses nobody.
    pub fn none() -> Self {
        Self::new(|_| false)
    }
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bar")
    }
}

/// Settings of a server. A client is accepted when exactly one role's authorities vouch for its certificate, it names that
/// same role, it belongs to `trust_domain`, and it is not barred. Which roles a service admits is the service's to say.
///
/// Fails when a role has no authority, two roles share one, or the credentials do not fit together.
pub fn server_config_at(
    credentials: Credentials,
    authorities: &[(Role, Vec<CertificateDer<'static>>)],
    trust_domain: &TrustDomain,
    time: Arc<dyn TimeProvider>,
    bar: Bar,
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = RoleVerifier::new(authorities, trust_domain, &provider, bar)?;
    let mut config = ServerConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(credentials.chain, credentials.key)
        .map_err(TlsError::Credentials)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// Settings of a client. A server is accepted when the node authority vouches for its certificate at the time that `time`
/// says, it names a node, and it belongs to `trust_domain`. Host names are not compared: devices are told addresses that
/// no certificate may list, and the node authority signs nothing but nodes.
pub fn client_config(
    credentials: Credentials,
    node_authority: Vec<CertificateDer<'static>>,
    trust_domain: &TrustDomain,
    time: Arc<dyn TimeProvider>,
) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = NodeVerifier {
        roots: root_store(Role::Node, &node_authority)?,
        trust_domain: trust_domain.clone(),
        provider: Arc::clone(&provider),
    };
    let mut config = ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(credentials.chain, credentials.key)
        .map_err(TlsError::Credentials)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// TLS's view of a clock of ours, such as a [`TrustedClock`](crate::clock::TrustedClock) behind a lock.
pub struct ClockFn<F>(pub F);

impl<F> fmt::Debug for ClockFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClockFn")
    }
}

impl<F: Fn() -> Timestamp + Send + Sync> TimeProvider for ClockFn<F> {
    /// `None` (the handshake fails) for a time before 1970.
    fn current_time(&self) -> Option<UnixTime> {
        let ms = u64::try_from((self.0)().as_ms()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_millis(ms)))
    }
}

fn root_store(
    role: Role,
    certificates: &[CertificateDer<'static>],
) -> Result<Arc<RootCertStore>, TlsError> {
    if certificates.is_empty() {
        return Err(TlsError::NoAuthority(role));
    }
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots
            .add(certificate.clone())
            .map_err(|source| TlsError::Authority { role, source })?;
    }
    Ok(Arc::new(roots))
}

/// The identity of a leaf whose signer is an authority for `authority`.
fn check_identity(
    leaf: &CertificateDer<'_>,
    authority: Role,
    trust_domain: &TrustDomain,
) -> Result<Identity, PeerRefused> {
    let identity = Identity::from_certificate(leaf)?;
    if identity.role != authority {
        return Err(PeerRefused::Role {
            named: identity.role,
            authority,
        });
    }
    if identity.trust_domain != *trust_domain {
        return Err(PeerRefused::TrustDomain {
            expected: trust_domain.clone(),
            got: identity.trust_domain,
        });
    }
    Ok(identity)
}

/// Accepts clients: one verifier per role.
#[derive(Debug)]
struct RoleVerifier {
    roles: Vec<(Role, Arc<dyn ClientCertVerifier>)>,
    trust_domain: TrustDomain,
    provider: Arc<CryptoProvider>,
    bar: Bar,
}

impl RoleVerifier {
    fn new(
        authorities: &[(Role, Vec<CertificateDer<'static>>)],
        trust_domain: &TrustDomain,
        provider: &Arc<CryptoProvider>,
        bar: Bar,
    ) -> Result<Self, TlsError> {
        let mut roles = Vec::new();
        let mut keys: Vec<(Role, Vec<u8>)> = Vec::new();
        for (role, certificates) in authorities {
            let roots = root_store(*role, certificates)?;
            for root in &roots.roots {
                let key = root.subject_public_key_info.to_vec();
                if let Some((other, _)) = keys.iter().find(|(r, k)| r != role && *k == key) {
                    return Err(TlsError::SharedAuthority(*other, *role));
                }
                keys.push((*role, key));
            }
            let provider = Arc::clone(provider);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build()?;
            roles.push((*role, verifier));
        }
        if roles.is_empty() {
            return Err(TlsError::NoAuthorities);
        }
        Ok(Self {
            roles,
            trust_domain: trust_domain.clone(),
            provider: Arc::clone(provider),
            bar,
        })
    }
}

impl ClientCertVerifier for RoleVerifier {
    /// None: a client of ours has one certificate and needs no hint which to send.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let mut accepted = None;
        let mut refusal = None;
        for (role, verifier) in &self.roles {
            match verifier.verify_client_cert(end_entity, intermediates, now) {
                Ok(verified) => {
                    if accepted.replace((*role, verified)).is_some() {
                        return Err(PeerRefused::Ambiguous.into());
                    }
                }
                Err(error) => refusal = Some(more_telling(refusal, error)),
            }
        }
        let Some((role, verified)) = accepted else {
            return Err(refusal.unwrap_or_else(|| CertificateError::UnknownIssuer.into()));
        };
        let identity = check_identity(end_entity, role, &self.trust_domain)?;
        if (self.bar.0)(&identity) {
            return Err(CertificateError::Revoked.into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Of the refusals of several authorities, that of the one which signed it: the others only say that they did not.
fn more_telling(first: Option<rustls::Error>, second: rustls::Error) -> rustls::Error {
    let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    match first {
        Some(first) if first != unknown => first,
        _ => second,
    }
}

/// TLS 1.2 is never offered, so that nothing asks for its signatures.
fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

/// Accepts servers: nodes of our trust domain, whatever their host name.
#[derive(Debug)]
struct NodeVerifier {
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        check_identity(end_entity, Role::Node, &self.trust_domain)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests;
