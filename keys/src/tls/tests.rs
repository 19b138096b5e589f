//! Real handshakes between a client and a server in memory.

mod harness;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::client::ClientSessionMemoryCache;
use rustls::{AlertDescription, Error, HandshakeKind, ProtocolVersion, ServerConnection};

use self::harness::*;
use super::*;
use crate::clock::TrustedClock;
use crate::explain::explain;
use crate::pki::{Ca, new_key_and_csr};

const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_000); // 2026-01-01
const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn each_role_is_accepted_with_the_certificate_of_its_authority() {
    let pki = Pki::new();
    for role in Role::ALL {
        let done = pki.connect(pki.credentials(role));
        assert_eq!(done.client, Ok(()));
        assert_eq!(done.server, Ok(()));
        let peer = peer_of(done.server_connection.peer_certificates().expect("sent"));
        let peer = peer.expect("one identity");
        assert_eq!(peer.identity, identity(role));
        assert_eq!(peer.serial.len(), 16);
        assert_eq!(peer.not_after, NOW.saturating_add(DAY * 30));
        let server = done.client_connection.peer_certificates().expect("sent");
        let server = peer_of(server).expect("one identity");
        assert_eq!(server.identity.role, Role::Node);
        assert_ne!(server.fingerprint, peer.fingerprint);
        let connection = &done.server_connection;
        assert_eq!(
            connection.protocol_version(),
            Some(ProtocolVersion::TLSv1_3)
        );
        assert_eq!(connection.alpn_protocol(), Some(ALPN_H2));
    }
}

#[test]
fn an_authority_cannot_vouch_for_another_role() {
    let pki = Pki::new();
    for signer in Role::ALL {
        for named in Role::ALL.into_iter().filter(|role| *role != signer) {
            let forged = Leaf::naming(&identity(named)).signed_by(pki.ca(signer));
            let done = pki.connect(forged);
            let words = done.refused_by_server();
            assert!(words.contains(&format!("has the role {named}")), "{words}");
            assert_eq!(done.alert_at_client(), AlertDescription::CertificateUnknown);
        }
    }
}

#[test]
fn a_foreign_authority_is_refused_and_the_client_is_told() {
    let (pki, foreign) = (Pki::new(), Pki::new());
    // The foreign authorities even have the names of ours.
    let done = pki.connect(foreign.credentials(Role::Device));
    let words = done.refused_by_server();
    assert!(words.contains("authority that is not trusted"), "{words}");
    let told = explain(&done.client.expect_err("refused"));
    assert!(told.contains("refused our certificate"), "{told}");
}

#[test]
fn another_trust_domain_is_refused_on_both_sides() {
    let pki = Pki::new();
    let elsewhere = |role| {
        let domain = "elsewhere".parse().expect("valid");
        Identity::new(domain, role, "some-1").expect("valid")
    };
    let forged = Leaf::naming(&elsewhere(Role::Device)).signed_by(pki.ca(Role::Device));
    let words = pki.connect(forged).refused_by_server();
    assert!(words.contains("trust domain elsewhere"), "{words}");
    let forged = Leaf::naming(&elsewhere(Role::Node)).signed_by(pki.ca(Role::Node));
    let words = pki.connect_to(forged).refused_by_client();
    assert!(words.contains("trust domain elsewhere"), "{words}");
}

#[test]
fn only_a_node_is_accepted_as_a_server() {
    let pki = Pki::new();
    for role in [Role::Device, Role::Operator] {
        // Signed by its own authority, and by that of the nodes.
        for signer in [role, Role::Node] {
            let mut leaf = Leaf::naming(&identity(role));
            leaf.usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            pki.connect_to(leaf.signed_by(pki.ca(signer)))
                .refused_by_client();
        }
    }
    let mut leaf = Leaf::naming(&identity(Role::Node));
    leaf.usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let words = pki
        .connect_to(leaf.signed_by(pki.ca(Role::Node)))
        .refused_by_client();
    assert!(words.contains("another purpose"), "{words}");
}

#[test]
fn a_client_without_a_certificate_is_refused_and_told_so() {
    let pki = Pki::new();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = NodeVerifier {
        roots: root_store(Role::Node, &[pki.ca(Role::Node).cert_der().clone()]).expect("one"),
        trust_domain: domain(),
        provider: Arc::clone(&provider),
    };
    let mut config = ClientConfig::builder_with_details(provider, at(NOW))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    let done = handshake(config, pki.server_config(NOW));
    assert_eq!(done.server, Err(Error::NoCertificatesPresented));
    assert_eq!(
        done.alert_at_client(),
        AlertDescription::CertificateRequired
    );
}

#[test]
fn a_certificate_for_servers_only_is_refused_as_a_client() {
    let pki = Pki::new();
    let mut leaf = Leaf::naming(&identity(Role::Device));
    leaf.usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let done = pki.connect(leaf.signed_by(pki.ca(Role::Device)));
    let words = done.refused_by_server();
    assert!(words.contains("another purpose"), "{words}");
}

#[test]
fn expired_and_not_yet_valid_certificates_are_refused_in_words() {
    let pki = Pki::new();
    let device = pki.credentials(Role::Device);
    for (moment, words) in [
        (NOW.saturating_add(DAY * 31), "has expired"),
        (NOW.saturating_sub(DAY), "not valid yet"),
    ] {
        let config = pki.client_config(device.clone(), NOW);
        let done = handshake(config, pki.server_config(moment));
        let said = done.refused_by_server();
        assert!(said.contains(words), "{said}");
        assert_eq!(done.alert_at_client(), AlertDescription::CertificateExpired);
    }
    // The last moment, and the first.
    for moment in [
        NOW.saturating_add(DAY * 30),
        NOW.saturating_sub(Duration::from_secs(300)),
    ] {
        let config = pki.client_config(device.clone(), NOW);
        let done = handshake(config, pki.server_config(moment));
        assert_eq!(done.server, Ok(()));
    }
}

#[test]
fn a_device_clock_in_1970_or_2100_fails_alone_and_works_under_the_trusted_clock() {
    let pki = Pki::new();
    let trusted = TrustedClock::new(NOW.saturating_sub(DAY * 100), Some(NOW));
    for wrong in ["1970-01-01T00:00:01Z", "2100-01-01T00:00:00Z"] {
        let rtc: Timestamp = wrong.parse().expect("a time");
        let config = pki.client_config(pki.credentials(Role::Device), rtc);
        let words = handshake(config, pki.server_config(NOW)).refused_by_client();
        assert!(words.contains("clock here is wrong"), "{words}");
        let config = pki.client_config(pki.credentials(Role::Device), trusted.judge(rtc));
        assert_eq!(handshake(config, pki.server_config(NOW)).client, Ok(()));
    }
    // Before 1970 there is no TLS time at all.
    assert_eq!(ClockFn(|| Timestamp::from_ms(-1)).current_time(), None);
}

#[test]
fn a_certificate_without_exactly_one_proper_identity_is_refused() {
    let pki = Pki::new();
    let device = identity(Role::Device).uri();
    let other = "fwpush://example/device/other".to_owned();
    let huge = format!("fwpush://example/device/{}", "x".repeat(10_240));
    for (uris, words) in [
        (vec![], "names no identity"),
        (vec![device, other], "names 2 URIs"),
        (vec!["fwpush://example/device/".to_owned()], "is empty"),
        (vec!["urn:device:1".to_owned()], "not of the form"),
        (vec![huge], "10264 bytes"),
    ] {
        let mut leaf = Leaf::naming(&identity(Role::Device));
        leaf.uris = uris;
        let done = pki.connect(leaf.signed_by(pki.ca(Role::Device)));
        let said = done.refused_by_server();
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_device_cannot_sign_for_another() {
    let pki = Pki::new();
    let mut signer = pki.credentials(Role::Device);
    let forged = Leaf::naming(&identity(Role::Device)).signed_with(&signer.chain[0], &signer.key);
    signer.chain.insert(0, forged.chain[0].clone());
    signer.key = forged.key;
    pki.connect(signer).refused_by_server();
}

#[test]
fn a_certificate_that_two_authorities_accept_is_refused() {
    let pki = Pki::new();
    // An intermediate with one key, certified by two of our authorities.
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = validity();
    let certified_by = |role| {
        let ca_key = KeyPair::from_pem(&pki.ca(role).key_pem()).unwrap();
        let issuer = Issuer::from_ca_cert_der(pki.ca(role).cert_der(), &ca_key).unwrap();
        params.signed_by(&key, &issuer).unwrap().der().clone()
    };
    let ours = [certified_by(Role::Device), certified_by(Role::Operator)];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut leaf = Leaf::naming(&identity(Role::Device)).signed_with(&ours[0], &key);
    leaf.chain.extend(ours);
    let words = pki.connect(leaf).refused_by_server();
    assert!(words.contains("more than one role"), "{words}");
}

#[test]
fn tls_1_2_is_refused() {
    let pki = Pki::new();
    let mut server = ServerConnection::new(Arc::new(pki.server_config(NOW))).expect("configured");
    server
        .read_tls(&mut tls12_client_hello().as_slice())
        .expect("in memory");
    let error = server.process_new_packets().expect_err("TLS 1.2");
    let words = explain(&error);
    assert!(words.contains("does not speak TLS 1.3"), "{words}");
    let mut answer = Vec::new();
    server.write_tls(&mut answer).expect("in memory");
    // An alert record: fatal (2), protocol_version (70).
    assert_eq!((answer[0], &answer[5..]), (21, [2, 70].as_slice()));
}

#[test]
fn what_is_not_tls_is_refused_in_words() {
    let pki = Pki::new();
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0xff; 64], &[0; 64]] {
        let mut server = ServerConnection::new(Arc::new(pki.server_config(NOW))).expect("made");
        server.read_tls(&mut &*bytes).expect("in memory");
        let words = explain(&server.process_new_packets().expect_err("no TLS"));
        assert!(words.contains("does not speak TLS"), "{words}");
    }
}

#[test]
fn no_session_is_ever_resumed() {
    let pki = Pki::new();
    // A client that would like to resume.
    let mut eager = pki.client_config(pki.credentials(Role::Device), NOW);
    eager.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)));
    let server = Arc::new(pki.server_config(NOW));
    let eager = Arc::new(eager);
    for _ in 0..2 {
        let done = handshake_with(Arc::clone(&eager), Arc::clone(&server));
        assert_eq!(done.server, Ok(()));
        let kind = done.client_connection.handshake_kind();
        assert!(matches!(kind, Some(HandshakeKind::Full)), "{kind:?}");
        assert_eq!(done.client_connection.tls13_tickets_received(), 0);
    }
    // And a client of ours at a server that would.
    let mut generous = pki.server_config(NOW);
    generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    generous.send_tls13_tickets = 2;
    let ours = Arc::new(pki.client_config(pki.credentials(Role::Device), NOW));
    let generous = Arc::new(generous);
    for _ in 0..2 {
        let done = handshake_with(Arc::clone(&ours), Arc::clone(&generous));
        let kind = done.client_connection.handshake_kind();
        assert!(matches!(kind, Some(HandshakeKind::Full)), "{kind:?}");
        assert!(!done.client_connection.is_early_data_accepted());
    }
}

#[test]
fn another_protocol_is_refused_and_none_is_visible() {
    let pki = Pki::new();
    let mut config = pki.client_config(pki.credentials(Role::Device), NOW);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let done = handshake(config, pki.server_config(NOW));
    assert_eq!(done.server, Err(Error::NoApplicationProtocol));
    assert_eq!(
        done.alert_at_client(),
        AlertDescription::NoApplicationProtocol
    );
    let mut config = pki.client_config(pki.credentials(Role::Device), NOW);
    config.alpn_protocols = Vec::new();
    let done = handshake(config, pki.server_config(NOW));
    assert_eq!(done.server, Ok(()));
    assert_eq!(done.server_connection.alpn_protocol(), None);
}

#[test]
fn a_barred_client_is_refused_in_the_handshake_and_told_that_it_is_revoked() {
    let pki = Pki::new();
    let bar = |role| Bar::new(move |identity| identity.role == role);
    let connect = |bar| {
        let server = pki.server_config_barring(pki.credentials(Role::Node), NOW, bar);
        let client = pki.client_config(pki.credentials(Role::Device), NOW);
        handshake(client, server)
    };
    let barred = connect(bar(Role::Device));
    assert_eq!(barred.server, Err(CertificateError::Revoked.into()));
    assert_eq!(
        barred.alert_at_client(),
        AlertDescription::CertificateRevoked
    );
    assert_eq!(connect(bar(Role::Operator)).server, Ok(()));
}

#[test]
fn settings_that_cannot_work_are_refused_when_they_are_made() {
    let pki = Pki::new();
    let server = |authorities: &[(Role, Vec<CertificateDer<'static>>)]| {
        server_config(
            pki.credentials(Role::Node),
            authorities,
            &domain(),
            Bar::none(),
        )
        .expect_err("cannot work")
    };
    let ca = |role| pki.ca(role).cert_der().clone();
    assert!(matches!(server(&[]), TlsError::NoAuthorities));
    let error = server(&[(Role::Device, vec![])]);
    assert!(matches!(error, TlsError::NoAuthority(Role::Device)));
    let error = server(&[
        (Role::Device, vec![ca(Role::Device)]),
        (Role::Operator, vec![ca(Role::Operator), ca(Role::Device)]),
    ]);
    assert!(matches!(
        error,
        TlsError::SharedAuthority(Role::Device, Role::Operator)
    ));
    let error = server(&[(Role::Device, vec![vec![0x30; 9].into()])]);
    assert!(matches!(error, TlsError::Authority { .. }));
    let mut mixed = pki.credentials(Role::Device);
    mixed.key = pki.credentials(Role::Operator).key;
    let time = Arc::new(DefaultTimeProvider);
    let error = client_config(mixed, vec![ca(Role::Node)], &domain(), time);
    assert!(matches!(error, Err(TlsError::Credentials(_))));
}

#[test]
fn pem_files_that_are_something_else_are_refused() {
    let pki = Pki::new();
    let ca = pki.ca(Role::Device);
    let key = ca.key_pem();
    Credentials::from_pem(&ca.cert_pem(), &key).expect("both");
    let error = Credentials::from_pem(&key, &ca.cert_pem()).expect_err("swapped");
    assert!(matches!(error, TlsError::Pem("private key")));
    let error = Credentials::from_pem("", &key).expect_err("no certificate");
    assert!(matches!(error, TlsError::Pem("certificate")));
    let cut = ca.cert_pem().replace("-----END", "");
    let error = Credentials::from_pem(&cut, &key).expect_err("damaged");
    assert!(matches!(error, TlsError::Pem("certificate")));
    let huge = "x".repeat(PEM_BYTES + 1);
    let error = Credentials::from_pem(&huge, &key).expect_err("huge");
    assert!(matches!(error, TlsError::TooLong { .. }));
    let shown = format!("{:?}", Credentials::from_pem(&ca.cert_pem(), &key));
    assert_eq!(shown, "Ok(Credentials { certificates: 1, .. })");
}
