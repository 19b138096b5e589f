//! Certificates anew.

use std::net::IpAddr;

use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Ca, PkiError, SanName};
use crate::identity::{Identity, Role};
use crate::time::Timestamp;

impl Ca {
    /// A node's certificate anew: for the key and the identity of `certificate`, which this authority has signed at some time, for
    /// these names and `days` days from `now`. Its holder needs no new key, and shows nothing: the certificate goes to the key.
    pub fn renew_node(
        &self,
        certificate: &CertificateDer<'_>,
        names: &[SanName],
        now: Timestamp,
        days: u32,
    ) -> Result<String, PkiError> {
        let (_, authority) =
            X509Certificate::from_der(&self.certificate).map_err(|_| PkiError::NotOurs)?;
        let (_, old) = X509Certificate::from_der(certificate).map_err(|_| PkiError::NotOurs)?;
        old.verify_signature(Some(authority.public_key()))
            .map_err(|_| PkiError::NotOurs)?;
        let identity = Identity::from_certificate(certificate).map_err(|_| PkiError::NotOurs)?;
        if self.role != Role::Node || identity.role != Role::Node {
            return Err(PkiError::NotOurs);
        }
        let key = SubjectPublicKeyInfo::from_der(old.public_key().raw)
            .map_err(|_| PkiError::RequestKey)?;
        self.issue(&key, &identity, names, now, days)
    }
}

/// The names under which a certificate's holder is reached: what [`Ca::issue_for_csr`] put into it.
pub fn names_of(certificate: &CertificateDer<'_>) -> Result<Vec<SanName>, PkiError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| PkiError::NotOurs)?;
    let extension = parsed
        .subject_alternative_name()
        .map_err(|_| PkiError::NotOurs)?;
    let names = extension.map_or(&[][..], |names| &names.value.general_names);
    let name = |name: &GeneralName<'_>| match *name {
        GeneralName::DNSName(name) => Some(Ok(SanName::Dns(name.to_owned()))),
        GeneralName::IPAddress(bytes) => Some(ip(bytes).map(SanName::Ip)),
        _ => None,
    };
    names.iter().filter_map(name).collect()
}

fn ip(bytes: &[u8]) -> Result<IpAddr, PkiError> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .map_err(|_| PkiError::NotOurs)
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;
    use crate::id::TrustDomain;
    use crate::pki::new_key_and_csr;
    use crate::tls::{certificates_from_pem, peer_of};

    const NOW: Timestamp = Timestamp::from_ms(1_800_000_000_000);

    fn authority(role: Role, domain: &TrustDomain) -> Ca {
        Ca::generate(role, domain, NOW, 20).unwrap()
    }

    fn leaf(ca: &Ca, id: &str, names: &[SanName]) -> CertificateDer<'static> {
        let (_, csr) = new_key_and_csr().unwrap();
        let identity = Identity::new(ca.trust_domain().clone(), ca.role(), id).unwrap();
        let pem = ca.issue_for_csr(&csr, &identity, names, NOW, 30).unwrap();
        certificates_from_pem(&pem).unwrap().remove(0)
    }

    fn names(texts: &[&str]) -> Vec<SanName> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_renewed_certificate_is_for_the_same_key_and_identity_and_for_the_names_given() {
        let domain = "example".parse().unwrap();
        let ca = authority(Role::Node, &domain);
        let before = names(&["fw-1.example.com", "10.0.0.11", "2001:db8::11"]);
        let old = leaf(&ca, "n1", &before);
        assert_eq!(names_of(&old).unwrap(), before);
        let later = NOW.saturating_add(std::time::Duration::from_secs(86_400));
        let after = names(&["updates.example.com"]);
        let renewed = ca.renew_node(&old, &after, later, 30).unwrap();
        let renewed = certificates_from_pem(&renewed).unwrap().remove(0);
        assert_eq!(names_of(&renewed).unwrap(), after);
        let (was, is) = (
            peer_of(slice::from_ref(&old)).unwrap(),
            peer_of(slice::from_ref(&renewed)).unwrap(),
        );
        assert_eq!(is.identity, was.identity);
        assert!(is.not_after > was.not_after);
        assert_ne!(is.serial, was.serial);
        let key = |der: &CertificateDer<'_>| {
            let (_, parsed) = X509Certificate::from_der(der).unwrap();
            parsed.public_key().raw.to_vec()
        };
        assert_eq!(key(&old), key(&renewed));
    }

    #[test]
    fn only_a_nodes_certificate_of_this_authority_is_renewed() {
        let domain = "example".parse().unwrap();
        let ca = authority(Role::Node, &domain);
        let devices = authority(Role::Device, &domain);
        let refused = |ca: &Ca, old: &CertificateDer<'_>| {
            matches!(ca.renew_node(old, &[], NOW, 30), Err(PkiError::NotOurs))
        };
        let foreign = leaf(&authority(Role::Node, &domain), "n1", &[]);
        assert!(refused(&ca, &foreign), "of an authority of the same name");
        let device = leaf(&devices, "d1", &[]);
        assert!(refused(&ca, &device) && refused(&devices, &device));
        let node = leaf(&ca, "n1", &[]);
        let mut torn = node.to_vec();
        *torn.last_mut().unwrap() ^= 1;
        assert!(refused(&ca, &torn.into()), "its signature does not check");
        assert!(refused(&ca, &CertificateDer::from(vec![0x30, 0])));
        assert!(!refused(&ca, &node));
    }
}
