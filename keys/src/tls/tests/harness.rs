//! Authorities, certificates that no honest authority would sign, and handshakes in memory.

use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls::{AlertDescription, ClientConnection, Error, ServerConnection};

use super::*;

/// The authorities of one installation.
pub(super) struct Pki {
    authorities: Vec<Ca>,
}

impl Pki {
    pub(super) fn new() -> Self {
        let make = |role| Ca::generate(role, &domain(), NOW, 20).expect("made");
        Self {
            authorities: Role::ALL.map(make).into(),
        }
    }

    pub(super) fn ca(&self, role: Role) -> &Ca {
        let mut authorities = self.authorities.iter();
        authorities.find(|ca| ca.role() == role).expect("all roles")
    }

    /// Issued as in real life, for 30 days.
    pub(super) fn credentials(&self, role: Role) -> Credentials {
        let (key, csr) = new_key_and_csr().expect("made");
        let leaf = self
            .ca(role)
            .issue_for_csr(&csr, &identity(role), &[], NOW, 30)
            .expect("issued");
        Credentials::from_pem(&leaf, &key).expect("our own")
    }

    pub(super) fn server_config(&self, time: Timestamp) -> ServerConfig {
        self.server_config_of(self.credentials(Role::Node), time)
    }

    pub(super) fn server_config_of(
        &self,
        credentials: Credentials,
        time: Timestamp,
    ) -> ServerConfig {
        self.server_config_barring(credentials, time, Bar::none())
    }

    pub(super) fn server_config_barring(
        &self,
        credentials: Credentials,
        time: Timestamp,
        bar: Bar,
    ) -> ServerConfig {
        let authorities: Vec<_> = self
            .authorities
            .iter()
            .map(|ca| (ca.role(), vec![ca.cert_der().clone()]))
            .collect();
        server_config_at(credentials, &authorities, &domain(), at(time), bar).expect("configured")
    }

    pub(super) fn client_config(&self, credentials: Credentials, time: Timestamp) -> ClientConfig {
        let node = vec![self.ca(Role::Node).cert_der().clone()];
        client_config(credentials, node, &domain(), at(time)).expect("configured")
    }

    /// A client with these credentials at an honest server.
    pub(super) fn connect(&self, client: Credentials) -> Handshake {
        handshake(self.client_config(client, NOW), self.server_config(NOW))
    }

    /// An honest device at a server with these credentials.
    pub(super) fn connect_to(&self, server: Credentials) -> Handshake {
        let client = self.client_config(self.credentials(Role::Device), NOW);
        handshake(client, self.server_config_of(server, NOW))
    }
}

/// A certificate that no honest authority would sign.
pub(super) struct Leaf {
    pub(super) uris: Vec<String>,
    pub(super) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    pub(super) fn naming(identity: &Identity) -> Self {
        Self {
            uris: vec![identity.uri()],
            usages: vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ],
        }
    }

    pub(super) fn signed_by(self, ca: &Ca) -> Credentials {
        let key = PrivateKeyDer::from_pem_slice(ca.key_pem().as_bytes()).expect("a key");
        self.signed_with(ca.cert_der(), &key)
    }

    pub(super) fn signed_with(
        self,
        issuer: &CertificateDer<'_>,
        key: &PrivateKeyDer<'_>,
    ) -> Credentials {
        let issuer_key = KeyPair::try_from(key).unwrap();
        let issuer = Issuer::from_ca_cert_der(issuer, &issuer_key).unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "fwpush://example/device/some-1");
        params.subject_alt_names = self
            .uris
            .into_iter()
            .map(|uri| SanType::URI(uri.try_into().unwrap()))
            .collect();
        params.extended_key_usages = self.usages;
        (params.not_before, params.not_after) = validity();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        Credentials {
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        }
    }
}

/// How a handshake ended on both sides.
pub(super) struct Handshake {
    pub(super) client_connection: ClientConnection,
    pub(super) server_connection: ServerConnection,
    pub(super) client: Result<(), Error>,
    pub(super) server: Result<(), Error>,
}

impl Handshake {
    pub(super) fn refused_by_server(&self) -> String {
        explain(self.server.as_ref().expect_err("the server refuses"))
    }

    pub(super) fn refused_by_client(&self) -> String {
        let error = self.client.as_ref().expect_err("the client refuses");
        assert!(!matches!(error, Error::AlertReceived(_)), "{error}");
        explain(error)
    }

    pub(super) fn alert_at_client(&self) -> AlertDescription {
        match &self.client {
            Err(Error::AlertReceived(alert)) => *alert,
            other => panic!("no alert: {other:?}"),
        }
    }
}

pub(super) fn handshake(client: ClientConfig, server: ServerConfig) -> Handshake {
    handshake_with(Arc::new(client), Arc::new(server))
}

/// Carries bytes back and forth until nobody has any left, or both have ended.
pub(super) fn handshake_with(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Handshake {
    // A name that the certificate does not have: it does not matter.
    let name = ServerName::try_from("any.name").expect("a name");
    let mut done = Handshake {
        client_connection: ClientConnection::new(client, name).expect("configured"),
        server_connection: ServerConnection::new(server).expect("configured"),
        client: Ok(()),
        server: Ok(()),
    };
    loop {
        let mut to_server = Vec::new();
        let mut to_client = Vec::new();
        let (client, server) = (&mut done.client_connection, &mut done.server_connection);
        while client.wants_write() {
            client.write_tls(&mut to_server).expect("in memory");
        }
        let mut rest = to_server.as_slice();
        while !rest.is_empty() && done.server.is_ok() {
            server.read_tls(&mut rest).expect("in memory");
            done.server = server.process_new_packets().map(drop);
        }
        while server.wants_write() {
            server.write_tls(&mut to_client).expect("in memory");
        }
        let mut rest = to_client.as_slice();
        while !rest.is_empty() && done.client.is_ok() {
            client.read_tls(&mut rest).expect("in memory");
            done.client = client.process_new_packets().map(drop);
        }
        if to_server.is_empty() && to_client.is_empty() {
            return done;
        }
    }
}

/// What a client that knows nothing newer than TLS 1.2 sends first.
pub(super) fn tls12_client_hello() -> Vec<u8> {
    let extensions = [
        // supported_groups: secp256r1
        &[0x00, 0x0a, 0x00, 0x04, 0x00, 0x02, 0x00, 0x17][..],
        // ec_point_formats: uncompressed
        &[0x00, 0x0b, 0x00, 0x02, 0x01, 0x00],
        // signature_algorithms: ecdsa_secp256r1_sha256
        &[0x00, 0x0d, 0x00, 0x04, 0x00, 0x02, 0x04, 0x03],
        // extended_master_secret
        &[0x00, 0x17, 0x00, 0x00],
    ]
    .concat();
    let body = [
        &[0x03, 0x03][..],
        &[7; 32],
        &[0],
        // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        &[0x00, 0x02, 0xc0, 0x2b],
        &[0x01, 0x00],
        &(extensions.len() as u16).to_be_bytes(),
        &extensions,
    ]
    .concat();
    let message = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    let length = (message.len() as u16).to_be_bytes();
    [&[22, 3, 1][..], &length, &message].concat()
}

pub(super) fn at(time: Timestamp) -> Arc<dyn TimeProvider> {
    Arc::new(ClockFn(move || time))
}

pub(super) fn validity() -> (time::OffsetDateTime, time::OffsetDateTime) {
    let from = NOW.saturating_sub(DAY).calendar().expect("a date");
    let to = NOW.saturating_add(DAY * 30).calendar().expect("a date");
    (from, to)
}

pub(super) fn domain() -> TrustDomain {
    "example".parse().expect("valid")
}

pub(super) fn identity(role: Role) -> Identity {
    Identity::new(domain(), role, "some-1").expect("valid")
}
