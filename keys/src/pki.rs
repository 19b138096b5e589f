//! Certificate authorities, and certificates for those who ask.
//!
//! One authority per role (device, node, operator), P-256, each signing leaves only (path length 0). From a request only
//! the public key is taken: what else it asks for (names, CA:TRUE, usages) is nobody's business but ours.

mod renew;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

use crate::id::TrustDomain;
use crate::identity::{Identity, Role};
use crate::limits::{CERTIFICATE_BYTES, CERTIFICATE_DAYS, PEM_BYTES, SAN_NAMES};
use crate::time::Timestamp;

pub use self::renew::names_of;

const DAY: Duration = Duration::from_secs(86_400);

/// How far certificates reach back before they were made: clocks of one installation may differ by minutes.
const BACKDATE: Duration = Duration::from_secs(300);

/// Why an authority or a certificate could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Too large to be what it should be.
    #[error("{what} has {got} bytes; at most {limit} are read")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The bound.
        limit: usize,
    },
    /// Not exactly one PEM block of the kind.
    #[error("expected exactly one {0} in PEM")]
    Pem(&'static str),
    /// The request's structure is broken.
    #[error("certificate request cannot be parsed")]
    MalformedRequest,
    /// The requester does not hold the key that it asks a certificate for.
    #[error("certificate request is not signed by the key it contains")]
    RequestSignature,
    /// Any key but P-256.
    #[error("certificate request has a key that is not ECDSA P-256")]
    RequestKey,
    /// The certificate's structure is broken.
    #[error("certificate of the authority cannot be parsed")]
    MalformedAuthority,
    /// A certificate that cannot sign others, or not one of ours.
    #[error("certificate is not that of a fwpush authority (made by `fwpush init`)")]
    NotAnAuthority,
    /// Key and certificate do not belong together.
    #[error("private key does not belong to the authority's certificate")]
    KeyMismatch,
    /// Each authority signs its own role only.
    #[error("the {authority} authority does not sign certificates for a {asked}")]
    Role {
        /// The authority's.
        authority: Role,
        /// The identity's.
        asked: Role,
    },
    /// Each authority signs for its own trust domain only.
    #[error("the authority is for trust domain {authority}, not {asked}")]
    TrustDomain {
        /// The authority's.
        authority: TrustDomain,
        /// The identity's.
        asked: TrustDomain,
    },
    /// Names under which a server is reached make sense in node certificates only.
    #[error("only a node's certificate has DNS names and IP addresses")]
    NamesNotAllowed,
    /// More than [`SAN_NAMES`].
    #[error("{0} names; at most {SAN_NAMES} are allowed")]
    TooManyNames(usize),
    /// Not a name that DNS has.
    #[error("not a DNS name: {0:?}")]
    DnsName(String),
    /// Zero, beyond [`CERTIFICATE_DAYS`], or not representable in a certificate.
    #[error("a certificate lasts from 1 to {CERTIFICATE_DAYS} days")]
    Validity,
    /// A certificate cannot outlive its authority.
    #[error(
        "the authority's own certificate ends at {authority_ends}: ask for fewer days or renew it first"
    )]
    OutlivesAuthority {
        /// When the authority's certificate ends.
        authority_ends: Timestamp,
    },
    /// A certificate to renew is not one that the authority has given a node.
    #[error("the certificate is not a node's of this authority")]
    NotOurs,
    /// The library that writes certificates refused.
    #[error("cannot make the certificate or key")]
    Make(#[from] rcgen::Error),
}

/// A name under which a node is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SanName {
    /// A host name; a leading `*.` label is allowed.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

impl std::str::FromStr for SanName {
    type Err = PkiError;

    /// An IP address where it reads as one, else a DNS name.
    fn from_str(text: &str) -> Result<Self, PkiError> {
        if let Ok(ip) = text.parse() {
            return Ok(Self::Ip(ip));
        }
        check_dns_name(text)?;
        Ok(Self::Dns(text.to_owned()))
    }
}

impl fmt::Display for SanName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.pad(name),
            Self::Ip(ip) => f.pad(&ip.to_string()),
        }
    }
}

/// Letters, digits and hyphens in labels of 1 to 63, at most 253 in all (RFC 1035 section 2.3.1, RFC 1123).
fn check_dns_name(name: &str) -> Result<(), PkiError> {
    let labels = name.strip_prefix("*.").unwrap_or(name);
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if name.len() > 253 || !labels.split('.').all(label_ok) {
        return Err(PkiError::DnsName(name.chars().take(80).collect()));
    }
    Ok(())
}

/// A certificate authority with its private key.
pub struct Ca {
    role: Role,
    trust_domain: TrustDomain,
    certificate: CertificateDer<'static>,
    not_before: Timestamp,
    not_after: Timestamp,
    key: KeyPair,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca")
            .field("role", &self.role)
            .field("trust_domain", &self.trust_domain)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Drop for Ca {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl Ca {
    /// A new authority for `role`, valid from 5 minutes before `now` for `years` years of 365.25 days.
    pub fn generate(
        role: Role,
        trust_domain: &TrustDomain,
        now: Timestamp,
        years: u32,
    ) -> Result<Self, PkiError> {
        let days = years.checked_mul(1461).map(|quarters| quarters / 4);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = leaf_params();
        params.not_before = calendar(now.saturating_sub(BACKDATE))?;
        params.not_after = calendar(end(now, days.unwrap_or(u32::MAX))?)?;
        params.distinguished_name = subject(&authority_name(role), trust_domain);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = false;
        let certificate = params.self_signed(&key)?.der().clone();
        Self::from_parts(certificate, key)
    }

    /// Reads an authority that [`Ca::generate`] made. Role and trust domain are those of its certificate; the key must be
    /// the certificate's. Whether it is still valid is judged when it signs.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        check_len("certificate", cert_pem.len(), PEM_BYTES)?;
        check_len("private key", key_pem.len(), PEM_BYTES)?;
        let certificate = one_pem::<CertificateDer<'static>>("certificate", cert_pem)?;
        let key = KeyPair::from_pem(key_pem).map_err(|_| PkiError::Pem("private key"))?;
        Self::from_parts(certificate, key)
    }

    fn from_parts(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, PkiError> {
        check_len("certificate", certificate.len(), CERTIFICATE_BYTES)?;
        let (rest, parsed) =
            X509Certificate::from_der(&certificate).map_err(|_| PkiError::MalformedAuthority)?;
        if !rest.is_empty() {
            return Err(PkiError::MalformedAuthority);
        }
        let is_ca = parsed
            .basic_constraints()
            .map_err(|_| PkiError::MalformedAuthority)?
            .is_some_and(|constraints| constraints.value.ca);
        let names = parsed.subject();
        let common_name = only(names.iter_common_name()).ok_or(PkiError::NotAnAuthority)?;
        let organization = only(names.iter_organization()).ok_or(PkiError::NotAnAuthority)?;
        let role = Role::ALL
            .into_iter()
            .find(|role| authority_name(*role) == common_name)
            .filter(|_| is_ca)
            .ok_or(PkiError::NotAnAuthority)?;
        let trust_domain = organization.parse().map_err(|_| PkiError::NotAnAuthority)?;
        if *parsed.public_key().subject_public_key.data != *key.public_key_raw() {
            return Err(PkiError::KeyMismatch);
        }
        let validity = parsed.validity();
        let (not_before, not_after) = (
            Timestamp::from_ms(validity.not_before.timestamp().saturating_mul(1000)),
            Timestamp::from_ms(validity.not_after.timestamp().saturating_mul(1000)),
        );
        Ok(Self {
            role,
            trust_domain,
            certificate,
            not_before,
            not_after,
            key,
        })
    }

    /// Whom it signs for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// In which installation.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// When its certificate ends.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// The certificate.
    pub fn cert_der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The certificate in PEM.
    pub fn cert_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The private key, PKCS#8 in PEM.
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// A leaf certificate in PEM for the public key of a request and the identity that *we* give it, for `days` days from
    /// `now`. `names` are for nodes only.
    ///
    /// Device and operator certificates begin 5 minutes before `now`. Node certificates begin with their authority: a
    /// device without a clock judges by a lower bound of time, and would refuse a renewed one as not yet valid.
    ///
    /// Fails when the request is not signed by its own P-256 key, the identity is of another role or trust domain, or the
    /// certificate would outlive the authority.
    pub fn issue_for_csr(
        &self,
        csr_pem: &str,
        identity: &Identity,
        names: &[SanName],
        now: Timestamp,
        days: u32,
    ) -> Result<String, PkiError> {
        if identity.role != self.role {
            return Err(PkiError::Role {
                authority: self.role,
                asked: identity.role,
            });
        }
        if identity.trust_domain != self.trust_domain {
            return Err(PkiError::TrustDomain {
                authority: self.trust_domain.clone(),
                asked: identity.trust_domain.clone(),
            });
        }
        let public_key = request_key(csr_pem)?;
        self.issue(&public_key, identity, names, now, days)
    }

    fn issue(
        &self,
        public_key: &SubjectPublicKeyInfo,
        identity: &Identity,
        names: &[SanName],
        now: Timestamp,
        days: u32,
    ) -> Result<String, PkiError> {
        let not_after = end(now, days)?;
        if not_after > self.not_after {
            return Err(PkiError::OutlivesAuthority {
                authority_ends: self.not_after,
            });
        }
        let mut params = leaf_params();
        params.not_before = calendar(match self.role {
            Role::Node => self.not_before,
            Role::Device | Role::Operator => now.saturating_sub(BACKDATE),
        })?;
        params.not_after = calendar(not_after)?;
        params.distinguished_name = subject(&identity.id, &self.trust_domain);
        params.subject_alt_names = alt_names(identity, names)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match self.role {
            // A node is a server, and a client of other nodes.
            Role::Node => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            Role::Device | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        Ok(params.signed_by(public_key, &issuer)?.pem())
    }
}

/// A new P-256 key and a request for it: (PKCS#8 in PEM, request in PEM). The request names nothing; the authority
/// decides.
pub fn new_key_and_csr() -> Result<(Zeroizing<String>, String), PkiError> {
    let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key).and_then(|csr| csr.pem());
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok((key_pem, csr?))
}

/// The public key of a request, of which the requester has shown to hold the private half.
fn request_key(csr_pem: &str) -> Result<SubjectPublicKeyInfo, PkiError> {
    check_len("certificate request", csr_pem.len(), PEM_BYTES)?;
    let der = one_pem::<CertificateSigningRequestDer<'static>>("certificate request", csr_pem)?;
    let (rest, request) =
        X509CertificationRequest::from_der(&der).map_err(|_| PkiError::MalformedRequest)?;
    if !rest.is_empty() {
        return Err(PkiError::MalformedRequest);
    }
    let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|_| PkiError::RequestKey)?;
    if key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
        return Err(PkiError::RequestKey);
    }
    request
        .verify_signature()
        .map_err(|_| PkiError::RequestSignature)?;
    Ok(key)
}

fn alt_names(identity: &Identity, names: &[SanName]) -> Result<Vec<SanType>, PkiError> {
    if !names.is_empty() && identity.role != Role::Node {
        return Err(PkiError::NamesNotAllowed);
    }
    if names.len() > SAN_NAMES {
        return Err(PkiError::TooManyNames(names.len()));
    }
    let mut list = vec![SanType::URI(identity.uri().try_into()?)];
    for name in names {
        list.push(match name {
            SanName::Ip(ip) => SanType::IpAddress(*ip),
            SanName::Dns(name) => {
                check_dns_name(name)?;
                SanType::DnsName(name.as_str().try_into()?)
            }
        });
    }
    Ok(list)
}

/// Everything that the library would otherwise choose, set: its default dates run to the year 4096.
fn leaf_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(random_serial());
    params.subject_alt_names = Vec::new();
    params.use_authority_key_identifier_extension = true;
    params
}

/// 16 random bytes, positive and not zero (RFC 5280 section 4.1.2.2).
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn subject(common_name: &str, trust_domain: &TrustDomain) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, trust_domain.as_str());
    name.push(DnType::CommonName, common_name);
    name
}

fn authority_name(role: Role) -> String {
    format!("fwpush {role} authority")
}

/// `days` after `now`; bounded.
fn end(now: Timestamp, days: u32) -> Result<Timestamp, PkiError> {
    if days == 0 || days > CERTIFICATE_DAYS {
        return Err(PkiError::Validity);
    }
    now.checked_add(DAY * days).ok_or(PkiError::Validity)
}

fn calendar(time: Timestamp) -> Result<time::OffsetDateTime, PkiError> {
    Timestamp::from_ms(time.as_secs() * 1000)
        .calendar()
        .ok_or(PkiError::Validity)
}

fn check_len(what: &'static str, got: usize, limit: usize) -> Result<(), PkiError> {
    if got > limit {
        return Err(PkiError::TooLong { what, got, limit });
    }
    Ok(())
}

fn one_pem<T: PemObject>(what: &'static str, pem: &str) -> Result<T, PkiError> {
    let mut items = T::pem_slice_iter(pem.as_bytes());
    match (items.next(), items.next()) {
        (Some(Ok(item)), None) => Ok(item),
        _ => Err(PkiError::Pem(what)),
    }
}

/// The one value of an attribute; `None` when there are none, several, or it is not text.
fn only<'a>(
    mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>,
) -> Option<&'a str> {
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_str().ok(),
        _ => None,
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    // RFC 7468 section 2: lines of 64 characters.
    for line in body.as_bytes().chunks(64) {
        text.extend(line.iter().map(|b| char::from(*b)));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests;
