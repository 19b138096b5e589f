//! Who is let in: certificates, clocks, resumption.

use std::{fs, path::Path, process::Command, sync::Arc};

use fwpush_keys::{
    Role, Timestamp, TrustDomain, TrustStore, TrustedClock, Verified, explain,
    tls::{self, ClockFn},
};
use fwpush_proto::v1::{
    GetServerInfoRequest, Heartbeat, PushRequest, ReportAck, ServerMessage, TextMessage,
    admin_service_client::AdminServiceClient, client_message::Kind as FromDevice,
    node_service_client::NodeServiceClient, push_service_client::PushServiceClient,
    server_message::Kind as ToDevice,
};
use fwpush_tests::{
    bins::bin,
    client::{Certificates, Stream, connect, words},
    http2::{Wire, connect_from},
    pki::{Leaf, foreign_authority},
    process::Process,
    site::{Site, authorities, credentials},
};
use rustls::{ClientConfig, HandshakeKind, client::Resumption};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

mod access;

/// A client that the server must not let in.
struct Stranger {
    who: &'static str,
    tls: Arc<ClientConfig>,
    /// In the server's log.
    logged: &'static str,
    /// In what the client can tell its user.
    told: &'static str,
}

/// What a client is told whose certificate is fine for TLS but does not say who it is.
const NOT_ACCEPTABLE: &str = "its role, trust domain or identity is not acceptable there";
const UNKNOWN_THERE: &str = "it was signed by an authority that is not trusted there";
const REVOKED: &str = "the other side refused our certificate: it is revoked";
const UNKNOWN_HERE: &str = "it was signed by an authority that is not trusted here";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_without_a_right_certificate_is_refused_in_words_on_both_sides() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let (authority, domain) = (site.authority(Role::Device), site.trust_domain());
    let elsewhere: TrustDomain = "elsewhere".parse().unwrap();
    let huge = format!("fwpush://test/device/{}", "x".repeat(10_240));
    let device = || Leaf::of(Role::Device, &domain, "dev-1");
    let by_authority = |leaf: Leaf| site.certificates_of(leaf.signed_by(&authority)).tls();
    let strangers = [
        Stranger {
            who: "nobody",
            tls: without_certificate(&site.device_certificates("dev-1")),
            logged: "the other side presented no certificate",
            told: "none was sent; configure a certificate and its key",
        },
        Stranger {
            who: "a foreign authority's device",
            tls: site
                .certificates_of(device().signed_by(&foreign_authority(Role::Device, &elsewhere)))
                .tls(),
            logged: UNKNOWN_HERE,
            told: UNKNOWN_THERE,
        },
        Stranger {
            who: "a device of a foreign authority with the name of ours",
            tls: site
                .certificates_of(device().signed_by(&foreign_authority(Role::Device, &domain)))
                .tls(),
            logged: UNKNOWN_HERE,
            told: "its signature or key does not check",
        },
        Stranger {
            who: "a certificate for servers",
            tls: by_authority(device().for_servers()),
            logged: "it was issued for another purpose (client or server)",
            told: "it was issued for another purpose (client or server)",
        },
        Stranger {
            who: "an expired certificate",
            tls: by_authority(device().valid(2020, 2021)),
            logged: "it has expired, or the clock here is wrong",
            told: "it has expired or is not valid yet, or a clock is wrong",
        },
        Stranger {
            who: "a certificate of the next decades",
            tls: by_authority(device().valid(2080, 2090)),
            logged: "it is not valid yet, or the clock here is wrong",
            told: "it has expired or is not valid yet, or a clock is wrong",
        },
        Stranger {
            who: "an operator",
            tls: site.operator_certificates().tls(),
            logged: UNKNOWN_HERE,
            told: UNKNOWN_THERE,
        },
        Stranger {
            who: "an operator that the device authority signed",
            tls: by_authority(Leaf::of(Role::Operator, &domain, "operator-1")),
            logged: "certificate has the role operator but was signed by the device authority",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "a common name alone",
            tls: by_authority(device().in_common_name_only()),
            logged: "certificate names no identity",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "two identities",
            tls: by_authority(device().also_naming("fwpush://test/device/dev-2")),
            logged: "certificate names 2 URIs in subjectAltName",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "another kind of identity",
            tls: by_authority(Leaf::naming("spiffe://test/device/dev-1")),
            logged: "identity URI is not of the form fwpush://",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "an identity with a path that goes up",
            tls: by_authority(Leaf::naming("fwpush://test/device/..")),
            logged: "device id",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "names that end in the middle",
            tls: by_authority(device().with_torn_names()),
            logged: "the other side's certificate is refused",
            told: "the other side refused our certificate",
        },
        Stranger {
            who: "an id of 10 KiB",
            tls: by_authority(Leaf::naming(&huge)),
            logged: "identity URI has 10261 bytes",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "a device of another trust domain",
            tls: by_authority(Leaf::of(Role::Device, &elsewhere, "dev-1")),
            logged: "certificate belongs to trust domain elsewhere, not test",
            told: NOT_ACCEPTABLE,
        },
        Stranger {
            who: "a device without a record",
            tls: by_authority(Leaf::of(Role::Device, &domain, "dev-9")),
            logged: "device dev-9 is not known here",
            told: "device dev-9 is not known here",
        },
        Stranger {
            who: "a second certificate in the name of a device",
            tls: by_authority(device()),
            logged: "this is not the newest certificate of device dev-1",
            told: "this is not the newest certificate of device dev-1",
        },
    ];
    let address = site.devices.to_string();
    let mut seen = 0;
    for Stranger {
        who,
        tls,
        logged,
        told,
    } in strangers
    {
        let said = refusal(&address, tls, "dev-1").await;
        assert!(said.contains(told), "{who} is told: {said}");
        let line;
        (seen, line) = site.server().line_after(seen, "A connection was refused");
        assert!(line.contains(logged), "of {who} the log says: {line}");
    }
    let (stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    drop(stream);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_listener_and_each_service_admits_exactly_its_role() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let operators = site.operators.to_string();

    // A device and strangers at the operators' listener.
    let told = refusal(&operators, site.device_certificates("dev-1").tls(), "dev-1").await;
    assert!(told.contains(UNKNOWN_THERE), "{told}");
    let told = refusal(
        &operators,
        without_certificate(&site.operator_certificates()),
        "dev-1",
    )
    .await;
    assert!(told.contains("none was sent"), "{told}");
    site.server().line_with("listener=\"operators\"");

    // A node is let in there, but not to what operators do.
    let node = site.node_certificates().connect(&operators).await.unwrap();
    let refused = AdminServiceClient::new(node.clone())
        .get_server_info(GetServerInfoRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        "this service is for operator certificates; the role in yours is node"
    );
    // Nor an operator to what nodes do.
    let operator = site
        .operator_certificates()
        .connect(&operators)
        .await
        .unwrap();
    let push = || PushRequest {
        client_id: "dev-1".into(),
        message: Some(ServerMessage {
            kind: Some(ToDevice::Text(TextMessage::default())),
        }),
        epoch: 0,
    };
    let refused = NodeServiceClient::new(operator.clone())
        .push_to_client(push())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        "this service is for node certificates; the role in yours is operator"
    );
    // What devices do is not there at all.
    let refused = PushServiceClient::new(operator)
        .connect(tokio_stream::empty())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);

    // What a device should run, and what of its reports is committed, only the node that holds its stream says.
    let mut forged = push();
    let ack = ReportAck {
        upto_seq: 9,
        generation: 9,
    };
    forged.message = Some(ServerMessage {
        kind: Some(ToDevice::ReportAck(ack)),
    });
    let refused = NodeServiceClient::new(node.clone())
        .push_to_client(forged)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let answer = NodeServiceClient::new(node)
        .push_to_client(push())
        .await
        .unwrap()
        .into_inner();
    assert!(
        !answer.success && answer.error.contains("no stream here"),
        "{answer:?}"
    );
    let device = site.connect("dev-1").await;
    let refused = AdminServiceClient::new(device)
        .get_server_info(GetServerInfoRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_says_why_it_is_refused_and_ends_with_code_3() {
    let site = Site::started();
    let (authority, domain) = (site.authority(Role::Device), site.trust_domain());
    let device = || Leaf::of(Role::Device, &domain, "dev-1");
    let dir = site.add_device("dev-1");
    assert_eq!(
        agent_once(&dir).0,
        Some(0),
        "with its own certificate it is let in"
    );
    let own = fs::read(dir.join("device.crt")).unwrap();

    let put = |(certificate, key): (String, String)| {
        fs::write(dir.join("device.crt"), certificate).unwrap();
        fs::write(dir.join("device.key"), key).unwrap();
    };
    let key = fs::read(dir.join("device.key")).unwrap();
    let elsewhere: TrustDomain = "elsewhere".parse().unwrap();
    put(device().signed_by(&foreign_authority(Role::Device, &elsewhere)));
    expect_refused(&dir, UNKNOWN_THERE);
    put(device().valid(2020, 2021).signed_by(&authority));
    expect_refused(&dir, "it has expired");
    put(device().in_common_name_only().signed_by(&authority));
    expect_refused(&dir, NOT_ACCEPTABLE);
    put(device().signed_by(&authority));
    expect_refused(&dir, "this is not the newest certificate of device dev-1");
    fs::write(dir.join("device.crt"), &own).unwrap();
    fs::write(dir.join("device.key"), key).unwrap();

    // A server of somebody else, as this device sees it.
    let node_ca = fs::read(dir.join("node-ca.crt")).unwrap();
    fs::write(
        dir.join("node-ca.crt"),
        foreign_authority(Role::Node, &domain).cert_pem(),
    )
    .unwrap();
    expect_refused(&dir, UNKNOWN_HERE);
    fs::write(dir.join("node-ca.crt"), node_ca).unwrap();

    edit(
        &dir.join("agent.toml"),
        "client_id = \"dev-1\"",
        "client_id = \"dev-2\"",
    );
    expect_refused(&dir, "dev-2");
    edit(
        &dir.join("agent.toml"),
        "client_id = \"dev-2\"",
        "client_id = \"dev-1\"",
    );

    site.fwpush(&["device", "block", "dev-1", "--reason", "lost"])
        .ok();
    expect_refused(&dir, REVOKED);
    site.fwpush(&["device", "unblock", "dev-1"]).ok();
    assert_eq!(agent_once(&dir).0, Some(0), "unblocked, it is let in again");
    site.fwpush(&["device", "remove", "dev-1", "--yes"]).ok();
    expect_refused(&dir, "device dev-1 is not known here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_other_than_the_certificates_is_refused_on_the_stream() {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let channel = site.connect("dev-1").await;
    let refused = Stream::register(channel.clone(), "dev-2")
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        "client_id \"dev-2\" is not the id in the certificate, dev-1"
    );
    let line = site.server().line_with("A stream was ended");
    assert!(line.contains("is not the id in the certificate"), "{line}");

    let (mut stream, _) = Stream::register(channel, "dev-1").await.unwrap();
    stream
        .say(FromDevice::Heartbeat(Heartbeat {
            client_id: "dev-2".into(),
            timestamp: 1,
        }))
        .await;
    let refused = stream.end().await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("another client_id"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_tls_1_2_is_told_the_version_and_one_without_alpn_is_not_served() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let mut tcp = connect_from(None, site.devices).await.unwrap();
    tcp.write_all(&tls12_client_hello()).await.unwrap();
    let mut alert = Vec::new();
    tcp.read_to_end(&mut alert).await.unwrap();
    // An alert record, fatal, protocol_version (RFC 8446 section 6).
    assert_eq!(
        (alert[0], &alert[alert.len() - 2..]),
        (21, &[2, 70][..]),
        "{alert:?}"
    );
    let line = site.server().line_with("A connection was refused");
    assert!(line.contains("does not speak TLS 1.3"), "{line}");

    for (protocols, logged) in [(vec![], "HTTP/2"), (vec![b"http/1.1".to_vec()], "HTTP/2")] {
        let mut tls = Arc::unwrap_or_clone(site.device_certificates("dev-1").tls());
        tls.alpn_protocols = protocols;
        let before = site.server().lines().len();
        let told = refusal(&site.devices.to_string(), Arc::new(tls), "dev-1").await;
        assert!(!told.is_empty());
        let (_, line) = site.server().line_after(before, "A connection was refused");
        assert!(line.contains(logged), "{line}");
    }
    let plain = connect_from(None, site.devices).await.unwrap();
    let (mut from, mut to) = plain.into_split();
    to.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    from.read_to_end(&mut Vec::new()).await.unwrap();
    site.server()
        .line_with("the other side does not speak TLS on this port");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_clock_of_1970_or_2100_fails_alone_and_works_under_the_trusted_clock() {
    let site = Site::started();
    let dir = site.add_device("dev-1");
    let certificates = site.device_certificates("dev-1");
    let first_root = Verified::bootstrap(&fs::read(dir.join("root.json")).unwrap()).unwrap();
    // As an agent does that was built before the site was made.
    let built = Timestamp::now().saturating_sub(std::time::Duration::from_secs(90 * 86_400));
    let trusted = *TrustStore::new(first_root, TrustedClock::new(built, None)).clock();
    for rtc in ["1970-01-01T00:00:01Z", "2100-01-01T00:00:00Z"]
        .map(|time| time.parse::<Timestamp>().unwrap())
    {
        let told = refusal(&site.devices.to_string(), at(&certificates, rtc), "dev-1").await;
        assert!(told.contains("or the clock here is wrong"), "{told}");
        let channel = connect(
            &site.devices.to_string(),
            at(&certificates, trusted.judge(rtc)),
        )
        .await
        .unwrap();
        Stream::register(channel, "dev-1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_session_is_ever_resumed() {
    let site = Site::started();
    site.add_device("dev-1");
    let mut tls = Arc::unwrap_or_clone(site.device_certificates("dev-1").tls());
    // A client that would, if only it got a ticket.
    tls.resumption = Resumption::in_memory_sessions(16);
    let tls = Arc::new(tls);
    for _ in 0..3 {
        let mut wire = Wire::open(site.devices, tls.clone(), &[]).await.unwrap();
        // The server's settings come after whatever tickets it would send.
        wire.receive().await.unwrap();
        let connection = wire.io.get_ref().1;
        assert_eq!(connection.tls13_tickets_received(), 0);
        // A server that knows no tickets is asked for none.
        assert!(matches!(
            connection.handshake_kind(),
            Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)
        ));
    }
}

// ---- Helpers ----

/// Tries to register as `id`; gives the words that the user of a client sees.
async fn refusal(server: &str, tls: Arc<ClientConfig>, id: &str) -> String {
    let channel = match connect(server, tls).await {
        Ok(channel) => channel,
        Err(error) => return explain(&error),
    };
    match Stream::register(channel, id).await {
        Ok(_) => panic!("{id} was let in"),
        Err(status) => words(&status),
    }
}

/// The same client, with nothing to show.
fn without_certificate(of: &Certificates) -> Arc<ClientConfig> {
    #[derive(Debug)]
    struct Nothing;
    impl rustls::client::ResolvesClientCert for Nothing {
        fn resolve(
            &self,
            _: &[&[u8]],
            _: &[rustls::SignatureScheme],
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            None
        }

        fn has_certs(&self) -> bool {
            false
        }
    }
    let mut tls = Arc::unwrap_or_clone(of.tls());
    tls.client_auth_cert_resolver = Arc::new(Nothing);
    Arc::new(tls)
}

/// TLS settings of a client whose clock says `time`.
fn at(of: &Certificates, time: Timestamp) -> Arc<ClientConfig> {
    let credentials = credentials(&of.certificate_pem, &of.key_pem);
    let clock = Arc::new(ClockFn(move || time));
    Arc::new(
        tls::client_config(
            credentials,
            authorities(&of.node_ca_pem),
            &of.trust_domain,
            clock,
        )
        .unwrap(),
    )
}

/// Runs the real agent until nothing is left to do; gives its exit code and what it said.
fn agent_once(dir: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(bin("fwpush-device"));
    command
        .arg("--config")
        .arg(dir.join("agent.toml"))
        .arg("--once")
        .env("FWPUSH_LOG", "info");
    let mut agent = Process::spawn(command);
    let code = agent.wait().code();
    (code, agent.all_lines().join("\n"))
}

fn expect_refused(dir: &Path, told: &str) {
    let (code, said) = agent_once(dir);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains(told), "{told:?} is not in:\n{said}");
}

fn edit(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replace(from, to)).unwrap();
}

/// What a client that knows nothing newer than TLS 1.2 sends first (RFC 5246 section 7.4.1.2).
fn tls12_client_hello() -> Vec<u8> {
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
    // Version, random, no session, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression.
    let begin = [
        &[0x03, 0x03][..],
        &[7; 32],
        &[0],
        &[0x00, 0x02, 0xc0, 0x2b],
        &[0x01, 0x00],
    ]
    .concat();
    let body = [
        &begin[..],
        &(extensions.len() as u16).to_be_bytes(),
        &extensions,
    ]
    .concat();
    let message = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
    [
        &[22, 3, 1][..],
        &(message.len() as u16).to_be_bytes(),
        &message,
    ]
    .concat()
}
