//! Certificates that no honest authority would sign, made with the authorities' own keys.

use fwpush_keys::{Ca, Identity, Role, Timestamp, TrustDomain};
use rcgen::{
    CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType,
    date_time_ymd,
};

/// A certificate to be. It begins as one that is fine for a client, and is then spoilt.
#[derive(Debug)]
pub struct Leaf {
    params: CertificateParams,
}

/// id-ce-subjectAltName (RFC 5280 section 4.2.1.6).
const SUBJECT_ALT_NAME: [u64; 4] = [2, 5, 29, 17];

impl Leaf {
    /// Names one URI, any text.
    pub fn naming(uri: &str) -> Self {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) =
            (date_time_ymd(2020, 1, 1), date_time_ymd(2090, 1, 1));
        Self { params }
    }

    /// Names a device, node or operator.
    pub fn of(role: Role, trust_domain: &TrustDomain, id: &str) -> Self {
        Self::naming(&Identity::new(trust_domain.clone(), role, id).unwrap().uri())
    }

    pub fn also_naming(mut self, uri: &str) -> Self {
        self.params
            .subject_alt_names
            .push(SanType::URI(uri.try_into().unwrap()));
        self
    }

    /// The name stands in the common name alone.
    pub fn in_common_name_only(mut self) -> Self {
        let Some(SanType::URI(uri)) = self.params.subject_alt_names.pop() else {
            panic!("a URI is named")
        };
        self.params
            .distinguished_name
            .push(DnType::CommonName, uri.as_str());
        self
    }

    /// A list of alternative names that ends in the middle of a name.
    pub fn with_torn_names(mut self) -> Self {
        self.params.subject_alt_names.clear();
        // SEQUENCE of 4 bytes: a URI that claims 10 bytes and has 2.
        let torn = CustomExtension::from_oid_content(
            &SUBJECT_ALT_NAME,
            vec![0x30, 0x04, 0x86, 0x0a, b'f', b'w'],
        );
        self.params.custom_extensions.push(torn);
        self
    }

    /// For servers only.
    pub fn for_servers(mut self) -> Self {
        self.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self
    }

    /// Valid in the years from the beginning of `from` to the beginning of `to`.
    pub fn valid(mut self, from: i32, to: i32) -> Self {
        (self.params.not_before, self.params.not_after) =
            (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        self
    }

    /// Certificate and private key, PEM.
    pub fn signed_by(self, authority: &Ca) -> (String, String) {
        let authority_key = KeyPair::from_pem(&authority.key_pem()).unwrap();
        let issuer = Issuer::from_ca_cert_der(authority.cert_der(), &authority_key).unwrap();
        let key = KeyPair::generate().unwrap();
        (
            self.params.signed_by(&key, &issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

/// An authority of the same names that nobody trusts.
pub fn foreign_authority(role: Role, trust_domain: &TrustDomain) -> Ca {
    Ca::generate(role, trust_domain, Timestamp::now(), 20).unwrap()
}
