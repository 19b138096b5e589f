//! Devices: enrolled, spoken to, shut out and forgotten.

use std::fs;

use fwpush_keys::{Identity, new_key_and_csr, tls::certificates_from_pem};
use fwpush_proto::v1::server_message::Kind as ToDevice;
use fwpush_tests::{
    client::{Certificates, Stream},
    site::{HW, PRODUCT, Site},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};

use super::{expect_failure, running_device};

#[test]
fn words_of_the_operator_reach_the_devices_log_and_cannot_steer_its_terminal() {
    let site = Site::started();
    let mut device = running_device(&site, "dev-1");
    let sent = site
        .fwpush(&[
            "device",
            "text",
            "dev-1",
            "maintenance\n\u{1b}[2Jat 22:00",
            "--json",
        ])
        .ok();
    assert_eq!(sent.json()["outcome"], "DELIVERED");
    let line = device.agent().line_with("maintenance");
    assert!(line.contains("at 22:00"), "in one line: {line}");
    assert!(!line.contains('\u{1b}'), "{line}");
    device.kill();
    site.add_device("dev-2");
    let away = site.fwpush(&["device", "text", "dev-2", "hello"]);
    expect_failure(&away, "not connected");
    assert!(away.stderr.contains("next:"), "{away:?}");
    let long = "x".repeat(5_000);
    assert_ne!(site.fwpush(&["device", "text", "dev-1", &long]).code, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_certificate_request_nothing_counts_but_the_key() {
    let site = Site::started();
    // It asks to be an authority, for another device's name, and for a host name.
    let mut params = CertificateParams::new(vec!["fw.example".to_owned()]).unwrap();
    let other = Identity::device(&site.trust_domain(), &"dev-9".parse().unwrap()).uri();
    params
        .subject_alt_names
        .push(SanType::URI(other.as_str().try_into().unwrap()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let csr = site.temp().join("dev-1.csr");
    fs::write(&csr, params.serialize_request(&key).unwrap().pem().unwrap()).unwrap();
    let args = [
        "device",
        "add",
        "dev-1",
        "--product",
        PRODUCT,
        "--hw",
        HW,
        "--csr",
        csr.to_str().unwrap(),
    ];
    let certificate = site.fwpush(&args).ok().stdout;

    let issued = certificates_from_pem(&certificate).unwrap();
    let identity = Identity::from_certificate(&issued[0]).unwrap();
    assert_eq!(identity.uri(), "fwpush://test/device/dev-1");
    let der = |text: &[u8]| issued[0].windows(text.len()).any(|part| part == text);
    assert!(
        !der(b"fw.example") && !der(b"dev-9"),
        "names of the request are in the certificate"
    );
    // id-ce-basicConstraints with cA TRUE: SEQUENCE { BOOLEAN TRUE } (RFC 5280 section 4.2.1.9).
    assert!(
        !der(&[0x30, 0x03, 0x01, 0x01, 0xff]),
        "the device was made an authority"
    );

    // The device, which alone has the key, gets in with it.
    let certificates: Certificates =
        site.certificates_of((certificate.clone(), key.serialize_pem()));
    let channel = certificates
        .connect(&site.devices.to_string())
        .await
        .unwrap();
    Stream::register(channel, "dev-1").await.unwrap();

    // A request that is signed with another key than it names proves nothing.
    let (_, csr_text) = new_key_and_csr().unwrap();
    let torn = site.temp().join("torn.csr");
    let mut der = csr_text.into_bytes();
    let at = der.len() - 60;
    der[at] = if der[at] == b'A' { b'B' } else { b'A' };
    fs::write(&torn, der).unwrap();
    let args = [
        "device",
        "add",
        "dev-2",
        "--product",
        PRODUCT,
        "--hw",
        HW,
        "--csr",
        torn.to_str().unwrap(),
    ];
    assert_ne!(site.fwpush(&args).code, 0);
    assert_eq!(
        site.fwpush(&["device", "show", "dev-2"]).code,
        1,
        "the record of a refused request stays"
    );
}

#[test]
fn a_blocked_device_is_out_until_unblocked_and_a_removed_one_for_good() {
    let site = Site::started();
    let mut device = running_device(&site, "dev-1");
    let from = device.agent().lines().len();
    site.fwpush(&["device", "block", "dev-1", "--reason", "stolen"])
        .ok();
    device.agent().line_after(from, "blocked");
    let shown = site.device("dev-1");
    assert_eq!(shown["device"]["blocked"], true, "{shown}");
    assert!(shown["events"].to_string().contains("stolen"), "{shown}");
    let image = site.image("fw.img", 50_000, 1);
    let refused = site.release_with(&image, "1.1.0", &["--to", "dev-1"]);
    expect_failure(&refused, "none of the named devices");

    // Unblocked, it comes back by itself once its own wait is over; a new start does not wait.
    site.fwpush(&["device", "unblock", "dev-1"]).ok();
    device.kill();
    device.start().line_with("Registered.");
    site.fwpush(&["device", "remove", "dev-1", "--yes"]).ok();
    assert_eq!(site.fwpush(&["device", "show", "dev-1"]).code, 1);
    device.kill();
    let once = device.once();
    assert_eq!(once.code, 3, "identity refused: {once:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_device_says_of_itself_cannot_steer_the_operators_terminal() {
    let site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let mut stream = Stream::open(channel).await.unwrap();
    let mut facts = fwpush_tests::client::facts();
    facts
        .attributes
        .insert("site".into(), "roof\u{1b}[2J\u{202e}".into());
    let register = fwpush_proto::v1::RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(facts),
    };
    stream
        .say(fwpush_proto::v1::client_message::Kind::Register(register))
        .await;
    // Taken or refused: neither may bring the sequence to a terminal.
    if let Ok(ToDevice::Registered(_)) = stream.next().await {
        assert!(site.device("dev-1").to_string().contains("roof"));
    }
    for args in [
        &["device", "show", "dev-1"][..],
        &["device", "show", "dev-1", "--json"],
        &["device", "list"],
    ] {
        let done = site.fwpush(args).ok();
        assert!(!done.stdout.contains(['\u{1b}', '\u{202e}']), "{done:?}");
    }
}
