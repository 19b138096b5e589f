//! Who a certificate names: `fwpush://<trust-domain>/{device|node|operator}/<id>`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::id::{DeviceId, InvalidId, NodeId, OperatorId, TrustDomain, check_name};
use crate::limits::{CERTIFICATE_BYTES, IDENTITY_URI_BYTES};

const SCHEME: &str = "fwpush://";

/// What a certificate's holder is. Each role has a certificate authority of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A device that is updated.
    Device,
    /// A server node.
    Node,
    /// A person or program that operates the service.
    Operator,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 3] = [Self::Device, Self::Node, Self::Operator];

    /// `device`, `node` or `operator`, as in the URI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Node => "node",
            Self::Operator => "operator",
        }
    }

    const fn id_kind(self) -> &'static str {
        match self {
            Self::Device => "device id",
            Self::Node => "node id",
            Self::Operator => "operator id",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or(IdentityError::UnknownRole)
    }
}

/// The holder of a certificate. Who signed it is not said here: see [`crate::tls`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The installation it belongs to.
    pub trust_domain: TrustDomain,
    /// What it is.
    pub role: Role,
    /// Its id, valid as [`DeviceId`], [`NodeId`] and [`OperatorId`] are.
    pub id: String,
}

/// Why a certificate or a URI names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The peer sent no certificate.
    #[error("no certificate was presented")]
    NoCertificate,
    /// Larger than [`CERTIFICATE_BYTES`].
    #[error("certificate has {0} bytes; at most {CERTIFICATE_BYTES} are read")]
    CertificateTooLong(usize),
    /// Not DER, bytes after it, or the name extension is broken or there twice.
    #[error("certificate cannot be parsed")]
    Malformed,
    /// No URI among the alternative names; a common name alone does not count.
    #[error(
        "certificate names no identity (no URI in subjectAltName; a common name does not count)"
    )]
    NoUri,
    /// Which one would count?
    #[error("certificate names {0} URIs in subjectAltName; exactly one is allowed")]
    ManyUris(usize),
    /// Longer than any valid identity.
    #[error("identity URI has {0} bytes; at most {IDENTITY_URI_BYTES} are allowed")]
    UriTooLong(usize),
    /// Not of the form `fwpush://domain/role/id`.
    #[error("identity URI is not of the form fwpush://<trust-domain>/<role>/<id>")]
    NotFwpushUri,
    /// Neither device, node nor operator.
    #[error("role is not one of device, node, operator")]
    UnknownRole,
    /// The trust domain or the id is not a valid name.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
}

impl IdentityError {
    /// A stable word for logs and reports.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "CERTIFICATE_MISSING",
            Self::CertificateTooLong(_) | Self::Malformed => "CERTIFICATE_MALFORMED",
            Self::NoUri => "IDENTITY_MISSING",
            Self::ManyUris(_) => "IDENTITY_AMBIGUOUS",
            Self::UriTooLong(_) | Self::NotFwpushUri | Self::UnknownRole | Self::InvalidId(_) => {
                "IDENTITY_MALFORMED"
            }
        }
    }
}

impl Identity {
    /// An identity from its parts; the id is checked.
    pub fn new(trust_domain: TrustDomain, role: Role, id: &str) -> Result<Self, InvalidId> {
        check_name(role.id_kind(), id)?;
        Ok(Self {
            trust_domain,
            role,
            id: id.to_owned(),
        })
    }

    /// The identity of a device.
    pub fn device(trust_domain: &TrustDomain, id: &DeviceId) -> Self {
        Self::of(trust_domain, Role::Device, id.as_str())
    }

    /// The identity of a node.
    pub fn node(trust_domain: &TrustDomain, id: &NodeId) -> Self {
        Self::of(trust_domain, Role::Node, id.as_str())
    }

    /// The identity of an operator.
    pub fn operator(trust_domain: &TrustDomain, id: &OperatorId) -> Self {
        Self::of(trust_domain, Role::Operator, id.as_str())
    }

    fn of(trust_domain: &TrustDomain, role: Role, id: &str) -> Self {
        Self {
            trust_domain: trust_domain.clone(),
            role,
            id: id.to_owned(),
        }
    }

    /// The URI that stands in the certificate.
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}", self.trust_domain, self.role, self.id)
    }

    /// Parses the URI of a certificate. Nothing is decoded or normalised: one identity has one spelling.
    pub fn from_uri(uri: &str) -> Result<Self, IdentityError> {
        if uri.len() > IDENTITY_URI_BYTES {
            return Err(IdentityError::UriTooLong(uri.len()));
        }
        let rest = uri
            .strip_prefix(SCHEME)
            .ok_or(IdentityError::NotFwpushUri)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(IdentityError::NotFwpushUri);
        };
        Ok(Self::new(domain.parse()?, role.parse()?, id)?)
    }

    /// The identity that a certificate names: exactly one URI in its subjectAltName, of our form. Neither the signature
    /// nor the dates are looked at.
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        if der.len() > CERTIFICATE_BYTES {
            return Err(IdentityError::CertificateTooLong(der.len()));
        }
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
        if !rest.is_empty() {
            return Err(IdentityError::Malformed);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::Malformed)?
            .ok_or(IdentityError::NoUri)?;
        let mut uris = Vec::new();
        for name in &names.value.general_names {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                // A name that cannot be read could be another identity.
                GeneralName::Invalid(..) => return Err(IdentityError::Malformed),
                _ => {}
            }
        }
        match uris.as_slice() {
            [] => Err(IdentityError::NoUri),
            [uri] => Self::from_uri(uri),
            many => Err(IdentityError::ManyUris(many.len())),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.uri())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_has_one_spelling() {
        for role in Role::ALL {
            let domain: TrustDomain = "example".parse().expect("valid");
            let identity = Identity::new(domain, role, "dev-1").expect("valid");
            assert_eq!(identity.uri(), format!("fwpush://example/{role}/dev-1"));
            assert_eq!(Identity::from_uri(&identity.uri()), Ok(identity));
        }
        let longest = format!("fwpush://{}/operator/{}", "d".repeat(64), "i".repeat(64));
        assert_eq!(longest.len(), IDENTITY_URI_BYTES);
        assert_eq!(Identity::from_uri(&longest).expect("fits").uri(), longest);
    }

    #[test]
    fn other_spellings_are_refused() {
        let huge = format!("fwpush://example/device/{}", "x".repeat(10_240));
        for uri in [
            "",
            "fwpush:",
            "fwpush://",
            "fwpush://example",
            "fwpush://example/device",
            "fwpush://example/device/",
            "fwpush://example//dev-1",
            "fwpush:///device/dev-1",
            "fwpush://example/device/dev-1/",
            "fwpush://example/device/dev-1/x",
            "fwpush://example/device/..",
            "fwpush://example/device/dev%2D1",
            "fwpush://example/device/dev-1?x",
            "fwpush://example/device/dev-1#x",
            "fwpush://user@example/device/dev-1",
            "fwpush://example:1/device/dev-1",
            "fwpush://example/Device/dev-1",
            "fwpush://example/root/dev-1",
            "FWPUSH://example/device/dev-1",
            "spiffe://example/device/dev-1",
            " fwpush://example/device/dev-1",
            "fwpush://example/device/dev-1\n",
            &huge,
        ] {
            let error = Identity::from_uri(uri).expect_err(uri);
            assert_eq!(error.code(), "IDENTITY_MALFORMED", "{uri}");
        }
    }

    #[test]
    fn garbage_is_no_certificate() {
        for der in [vec![], vec![0x30], vec![0xff; 1000]] {
            assert_eq!(
                Identity::from_certificate(&der),
                Err(IdentityError::Malformed)
            );
        }
        assert_eq!(
            Identity::from_certificate(&vec![0x30; 100_000]),
            Err(IdentityError::CertificateTooLong(100_000))
        );
    }
}
