use rcgen::CustomExtension;
use x509_parser::extensions::GeneralName;

use super::*;
use crate::identity::IdentityError;

const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_000); // 2026-01-01

#[test]
fn an_authority_is_what_its_certificate_says() {
    for role in Role::ALL {
        let ca = Ca::generate(role, &domain(), NOW, 20).expect("made");
        with_certificate(&ca.cert_pem(), |certificate| {
            let constraints = certificate.basic_constraints().unwrap().unwrap().value;
            assert!(constraints.ca);
            assert_eq!(constraints.path_len_constraint, Some(0));
            let usage = certificate.key_usage().unwrap().unwrap().value;
            assert!(usage.key_cert_sign() && !usage.digital_signature());
            let validity = certificate.validity();
            assert_eq!(validity.not_before.timestamp(), NOW.as_secs() - 300);
            assert_eq!(
                validity.not_after.timestamp(),
                NOW.as_secs() + 7305 * 86_400
            );
        });
        let loaded = Ca::load(&ca.cert_pem(), &ca.key_pem()).expect("our own");
        assert_eq!(loaded.role(), role);
        assert_eq!(loaded.trust_domain(), &domain());
        assert_eq!(loaded.cert_der(), ca.cert_der());
        assert_eq!(loaded.not_after(), ca.not_after());
    }
}

#[test]
fn an_authority_is_loaded_with_its_own_key_only() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let other = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let error = Ca::load(&ca.cert_pem(), &other.key_pem()).expect_err("another key");
    assert!(matches!(error, PkiError::KeyMismatch));
    let error = Ca::load("", &ca.key_pem()).expect_err("no certificate");
    assert!(matches!(error, PkiError::Pem("certificate")));
    let two = format!("{}{}", ca.cert_pem(), other.cert_pem());
    let error = Ca::load(&two, &ca.key_pem()).expect_err("two certificates");
    assert!(matches!(error, PkiError::Pem("certificate")));
    let error = Ca::load(&ca.cert_pem(), "no key").expect_err("no key");
    assert!(!error.to_string().contains("no key"), "{error}");
}

#[test]
fn a_leaf_cannot_be_loaded_as_an_authority() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let (key, csr) = new_key_and_csr().expect("made");
    let leaf = ca
        .issue_for_csr(&csr, &identity(Role::Device), &[], NOW, 30)
        .expect("issued");
    let error = Ca::load(&leaf, &key).expect_err("a leaf");
    assert!(matches!(error, PkiError::NotAnAuthority));
}

#[test]
fn a_leaf_has_its_identity_and_nothing_that_was_not_decided_here() {
    for role in Role::ALL {
        let ca = Ca::generate(role, &domain(), NOW, 20).expect("made");
        let (_, csr) = new_key_and_csr().expect("made");
        let leaf = ca
            .issue_for_csr(&csr, &identity(role), &[], NOW, 30)
            .expect("issued");
        with_certificate(&leaf, |certificate| {
            assert_is_plain_leaf(certificate, role);
            let begins = certificate.validity().not_before.timestamp();
            assert_eq!(begins, NOW.as_secs() - 300);
            let ends = certificate.validity().not_after.timestamp();
            assert_eq!(ends, NOW.as_secs() + 30 * 86_400);
        });
    }
}

#[test]
fn a_request_for_ca_true_and_other_names_gets_a_plain_leaf() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut wishes = CertificateParams::new(vec!["admin.example".to_owned()]).unwrap();
    wishes
        .distinguished_name
        .push(DnType::CommonName, "fwpush operator authority");
    wishes.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    wishes.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    wishes.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    let operator = Identity::new(domain(), Role::Operator, "root").unwrap();
    for uri in [operator.uri(), "fwpush://example/device/another".to_owned()] {
        let uri = SanType::URI(uri.try_into().unwrap());
        wishes.subject_alt_names.push(uri);
    }
    // An extension that some parsers do not know, for good measure.
    wishes
        .custom_extensions
        .push(CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]));
    let csr = wishes.serialize_request(&key).unwrap().pem().unwrap();
    let leaf = ca
        .issue_for_csr(&csr, &identity(Role::Device), &[], NOW, 30)
        .expect("issued");
    with_certificate(&leaf, |certificate| {
        assert_is_plain_leaf(certificate, Role::Device);
        assert_eq!(
            certificate.public_key().subject_public_key.data.as_ref(),
            key.public_key_raw()
        );
        assert_eq!(certificate.subject().to_string(), "O=example, CN=some-1");
    });
}

#[test]
fn only_a_node_has_names_and_it_has_all_of_them() {
    let node = Ca::generate(Role::Node, &domain(), NOW, 20).expect("made");
    let (_, csr) = new_key_and_csr().expect("made");
    let names: Vec<SanName> = ["localhost", "*.example.com", "127.0.0.1", "::1"]
        .map(|name| name.parse().expect(name))
        .to_vec();
    let leaf = node
        .issue_for_csr(&csr, &identity(Role::Node), &names, NOW, 30)
        .expect("issued");
    with_certificate(&leaf, |certificate| {
        let list = certificate.subject_alternative_name().unwrap().unwrap();
        let list = &list.value.general_names;
        assert_eq!(list.len(), 5);
        assert!(list.contains(&GeneralName::DNSName("*.example.com")));
        assert!(list.contains(&GeneralName::IPAddress(&[127, 0, 0, 1])));
        let identity = Identity::from_certificate(&one_der(&leaf)).expect("one URI");
        assert_eq!(identity.role, Role::Node);
    });
    let device = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let error = device.issue_for_csr(&csr, &identity(Role::Device), &names, NOW, 30);
    assert!(matches!(error, Err(PkiError::NamesNotAllowed)));
    let many = vec![names[0].clone(); SAN_NAMES + 1];
    let error = node.issue_for_csr(&csr, &identity(Role::Node), &many, NOW, 30);
    assert!(matches!(error, Err(PkiError::TooManyNames(65))));
}

#[test]
fn names_that_dns_does_not_have_are_refused() {
    let long = "a".repeat(64);
    for name in [
        "", ".", "a..b", "-a", "a-", "a b", "a\n", "*", "a.*.b", "http://a", &long,
    ] {
        let error = name.parse::<SanName>().expect_err(name);
        assert!(matches!(error, PkiError::DnsName(_)), "{name}");
    }
}

#[test]
fn an_authority_signs_its_own_role_and_domain_only() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let (_, csr) = new_key_and_csr().expect("made");
    let error = ca.issue_for_csr(&csr, &identity(Role::Operator), &[], NOW, 30);
    assert!(matches!(error, Err(PkiError::Role { .. })));
    let foreign = Identity::new("elsewhere".parse().unwrap(), Role::Device, "some-1").unwrap();
    let error = ca.issue_for_csr(&csr, &foreign, &[], NOW, 30);
    assert!(matches!(error, Err(PkiError::TrustDomain { .. })));
}

#[test]
fn a_node_certificate_made_later_is_valid_for_a_device_without_a_clock() {
    let ca = Ca::generate(Role::Node, &domain(), NOW, 20).expect("made");
    let (_, csr) = new_key_and_csr().expect("made");
    let years_later = NOW.saturating_add(DAY * 1000);
    let leaf = ca
        .issue_for_csr(&csr, &identity(Role::Node), &[], years_later, 30)
        .expect("issued");
    with_certificate(&leaf, |certificate| {
        let begins = certificate.validity().not_before.timestamp();
        assert!(begins <= NOW.as_secs());
    });
}

#[test]
fn a_certificate_does_not_outlive_its_authority() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 1).expect("made");
    let (_, csr) = new_key_and_csr().expect("made");
    let issue = |days| ca.issue_for_csr(&csr, &identity(Role::Device), &[], NOW, days);
    issue(365).expect("as long as the authority");
    let error = issue(366).expect_err("one day longer");
    assert!(matches!(error, PkiError::OutlivesAuthority { .. }));
    for days in [0, CERTIFICATE_DAYS + 1, u32::MAX] {
        assert!(matches!(issue(days), Err(PkiError::Validity)));
    }
    let error = Ca::generate(Role::Device, &domain(), NOW, u32::MAX);
    assert!(matches!(error, Err(PkiError::Validity)));
    let error = Ca::generate(Role::Device, &domain(), NOW, 0);
    assert!(matches!(error, Err(PkiError::Validity)));
    let end_of_time = Timestamp::from_ms(i64::MAX);
    let error = Ca::generate(Role::Device, &domain(), end_of_time, 1);
    assert!(matches!(error, Err(PkiError::Validity)));
}

#[test]
fn a_request_must_be_signed_by_the_key_that_it_contains() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let (_, csr) = new_key_and_csr().expect("made");
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap();
    let issue = |der: &[u8]| {
        let csr = pem("CERTIFICATE REQUEST", der);
        ca.issue_for_csr(&csr, &identity(Role::Device), &[], NOW, 30)
    };
    issue(&der).expect("the model");
    // The last bytes are the signature; some flips break its encoding.
    let mut flipped = der.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(issue(&flipped), Err(PkiError::RequestSignature)));
    // A flip that some encoding rule lets pass is outside of what was asked and signed.
    let asked = request_key(&csr).expect("the model");
    for bit in 0..der.len() * 8 {
        let mut flipped = der.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(key) = request_key(&pem("CERTIFICATE REQUEST", &flipped)) {
            assert_eq!(key, asked, "bit {bit}");
        }
    }
    let trailing = [&der[..], &[0]].concat();
    assert!(matches!(issue(&trailing), Err(PkiError::MalformedRequest)));
}

#[test]
fn other_keys_and_other_files_are_no_requests() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let issue = |csr: &str| ca.issue_for_csr(csr, &identity(Role::Device), &[], NOW, 30);
    for algorithm in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert_ne!(key.algorithm(), &PKCS_ECDSA_P256_SHA256);
        let csr = CertificateParams::default().serialize_request(&key);
        let error = issue(&csr.unwrap().pem().unwrap()).expect_err("another kind of key");
        assert!(matches!(error, PkiError::RequestKey));
    }
    let (key, csr) = new_key_and_csr().expect("made");
    for text in ["", "garbage", &key, &ca.cert_pem(), &format!("{csr}{csr}")] {
        let error = issue(text).expect_err("no request");
        assert!(matches!(error, PkiError::Pem("certificate request")));
    }
    let error = issue(&"x".repeat(PEM_BYTES + 1)).expect_err("huge");
    assert!(matches!(error, PkiError::TooLong { .. }));
}

#[test]
fn serial_numbers_are_positive_and_do_not_repeat() {
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..1000 {
        let serial = random_serial().to_bytes();
        assert_eq!(serial.len(), 16);
        assert!((0x40..0x80).contains(&serial[0]));
        assert!(seen.insert(serial));
    }
}

#[test]
fn the_identity_must_be_the_only_uri_and_stand_in_the_alternative_names() {
    let device = "fwpush://example/device/dev-1".to_owned();
    let huge = format!("fwpush://example/device/{}", "x".repeat(10_240));
    for (uris, expected) in [
        (vec![], Err(IdentityError::NoUri)),
        (vec![device.clone()], Ok("dev-1")),
        (
            vec![device.clone(), device.clone()],
            Err(IdentityError::ManyUris(2)),
        ),
        (
            vec![device.clone(), "https://example.com".to_owned()],
            Err(IdentityError::ManyUris(2)),
        ),
        (
            vec!["https://example.com".to_owned()],
            Err(IdentityError::NotFwpushUri),
        ),
        (
            vec!["fwpush://example/device".to_owned()],
            Err(IdentityError::NotFwpushUri),
        ),
        (
            vec!["fwpush://example/owner/x".to_owned()],
            Err(IdentityError::UnknownRole),
        ),
        (
            vec![huge.clone()],
            Err(IdentityError::UriTooLong(huge.len())),
        ),
    ] {
        // The common name says what the alternative name should: it does not count.
        let got = Identity::from_certificate(&self_signed(&uris, &device));
        assert_eq!(
            got.as_ref().map(|i| i.id.as_str()),
            expected.as_ref().copied(),
            "{uris:?}"
        );
    }
    let too_long = self_signed(&[format!("fwpush://{}", "x".repeat(20_000))], "x");
    assert!(matches!(
        Identity::from_certificate(&too_long),
        Err(IdentityError::CertificateTooLong(_))
    ));
    let trailing = [self_signed(std::slice::from_ref(&device), "x"), vec![0]].concat();
    assert_eq!(
        Identity::from_certificate(&trailing),
        Err(IdentityError::Malformed)
    );
}

#[test]
fn two_extensions_of_alternative_names_are_refused() {
    let uri = "fwpush://example/device/dev-1".to_owned();
    let with_one = self_signed_with(std::slice::from_ref(&uri), "x", None);
    Identity::from_certificate(&with_one).expect("the model");
    // A second subjectAltName with another URI: which one counts would depend on the reader.
    let second = uri_names(&[b"fwpush://example/device/dev-2"]);
    let with_two = self_signed_with(&[uri], "x", Some(second));
    assert_eq!(
        Identity::from_certificate(&with_two),
        Err(IdentityError::Malformed)
    );
}

#[test]
fn a_name_that_cannot_be_read_beside_the_identity_is_refused() {
    let uri = b"fwpush://example/device/dev-1".as_slice();
    let readable = self_signed_with(&[], "x", Some(uri_names(&[uri])));
    Identity::from_certificate(&readable).expect("the model");
    // Not UTF-8: another reader might make another identity of it.
    let unreadable = b"fwpush://example/device/\xff".as_slice();
    for names in [&[uri, unreadable][..], &[unreadable, uri], &[unreadable]] {
        let certificate = self_signed_with(&[], "x", Some(uri_names(names)));
        assert_eq!(
            Identity::from_certificate(&certificate),
            Err(IdentityError::Malformed)
        );
    }
}

#[test]
fn private_keys_are_not_shown() {
    let ca = Ca::generate(Role::Device, &domain(), NOW, 20).expect("made");
    let shown = format!("{ca:?}");
    assert!(shown.starts_with("Ca { role: Device"), "{shown}");
    assert!(!shown.contains("key"), "{shown}");
}

fn assert_is_plain_leaf(certificate: &X509Certificate<'_>, role: Role) {
    let constraints = certificate.basic_constraints().unwrap().unwrap().value;
    assert!(!constraints.ca);
    let usage = certificate.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let extended = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.client_auth && !extended.any && !extended.code_signing);
    assert_eq!(extended.server_auth, role == Role::Node);
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let uri = identity(role).uri();
    assert_eq!(names.value.general_names, [GeneralName::URI(&uri)]);
    // Constraints, usage, extended usage, names and the two key identifiers: nothing else.
    assert!(certificate.extensions().len() <= 6);
    assert!(
        !certificate
            .extensions()
            .iter()
            .any(|e| e.oid.to_id_string() == "1.2.3.4")
    );
}

fn domain() -> TrustDomain {
    "example".parse().expect("valid")
}

fn identity(role: Role) -> Identity {
    Identity::new(domain(), role, "some-1").expect("valid")
}

fn one_der(pem: &str) -> Vec<u8> {
    one_pem::<CertificateDer<'static>>("certificate", pem)
        .expect("one certificate")
        .to_vec()
}

fn with_certificate(pem: &str, look: impl FnOnce(&X509Certificate<'_>)) {
    let der = one_der(pem);
    let (_, certificate) = X509Certificate::from_der(&der).expect("a certificate");
    look(&certificate);
}

fn self_signed(uris: &[String], common_name: &str) -> Vec<u8> {
    self_signed_with(uris, common_name, None)
}

fn self_signed_with(
    uris: &[String],
    common_name: &str,
    extension: Option<CustomExtension>,
) -> Vec<u8> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.subject_alt_names = uris
        .iter()
        .map(|uri| SanType::URI(uri.as_str().try_into().unwrap()))
        .collect();
    params.custom_extensions.extend(extension);
    params.self_signed(&key).unwrap().der().to_vec()
}

/// A subjectAltName extension of URIs, byte for byte as given; at most 127 bytes in all.
fn uri_names(uris: &[&[u8]]) -> CustomExtension {
    let length = |bytes: &[u8]| u8::try_from(bytes.len()).expect("short");
    let names: Vec<u8> = uris
        .iter()
        .flat_map(|uri| [&[0x86, length(uri)], *uri].concat())
        .collect();
    let content = [&[0x30, length(&names)], names.as_slice()].concat();
    CustomExtension::from_oid_content(&[2, 5, 29, 17], content)
}
