//! Access that ends or changes while a device is connected: blocked, removed, added again, a new certificate of the server.

use std::{
    fs,
    time::{Duration, Instant},
};

use fwpush_keys::{
    Ca, Identity, Role, SanName, Timestamp, TrustDomain, explain, new_key_and_csr, tls::peer_of,
};
use fwpush_proto::v1::{
    FileRequest, Heartbeat, UnblockDeviceRequest, client_message::Kind as FromDevice,
    file_service_client::FileServiceClient, server_message::Kind as ToDevice,
};
use fwpush_tests::{
    client::{Certificates, Stream, connect, download, words},
    http2::Wire,
    site::{HW, PRODUCT, Site, authorities},
};
use rustix::process::Signal;
use tonic::Code;

use super::{REVOKED, refusal};

/// A blocked device is cut off within a second; this machine may have more to do.
const AT_ONCE: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocked_device_is_cut_off_at_once_and_let_in_again_when_unblocked() {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let file = site
        .publish(&site.image("big.img", 48 << 20, 1), PRODUCT, "1.1.0")
        .file_id;
    let channel = site.connect("dev-1").await;
    let (mut stream, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
    let (mut other, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    let request = || FileRequest {
        file_id: file.clone(),
        ..Default::default()
    };
    // Under way: more is to come than the windows of the client hold.
    let mut pulled = FileServiceClient::new(channel.clone())
        .download_file(request())
        .await
        .unwrap()
        .into_inner();
    pulled.message().await.unwrap().unwrap();

    let block = ["device", "block", "dev-1", "--reason", "stolen", "--json"];
    let shown = site.fwpush(&block).ok().json();
    assert_eq!(shown["blocked"], true, "{shown}");
    let answered = Instant::now();

    // Nothing that the device says from here on is answered.
    let beat = Heartbeat {
        client_id: "dev-1".into(),
        timestamp: 77,
    };
    stream.say(FromDevice::Heartbeat(beat)).await;
    let refused = loop {
        match stream.next().await {
            Ok(ToDevice::HeartbeatAck(ack)) => panic!("{ack:?} after the block"),
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::PermissionDenied,
            "this device is blocked or was removed"
        )
    );
    let cut = loop {
        match pulled.message().await {
            Ok(Some(chunk)) => assert!(!chunk.is_last, "the download went on to its end"),
            Ok(None) => panic!("the download ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert!(!words(&cut).is_empty());
    let took = answered.elapsed();
    assert!(took < AT_ONCE, "it goes on {took:?} after the block");
    assert!(
        download(channel, request()).await.is_err(),
        "its connection is closed"
    );

    let told = refusal_of_dev_1(&site).await;
    assert_eq!(told, REVOKED);
    let fresh = connect(
        &site.devices.to_string(),
        site.device_certificates("dev-1").tls(),
    )
    .await;
    let refused = match fresh {
        Ok(channel) => words(&download(channel, request()).await.unwrap_err()),
        Err(error) => explain(&error),
    };
    assert_eq!(refused, REVOKED);
    let line = site
        .server()
        .line_with("A blocked device is refused in its handshake");
    assert!(line.contains("device.id=dev-1"), "{line}");
    other.beat("dev-2", 5).await.unwrap();

    // A restart does not forget it.
    site.stop_server();
    site.start();
    let told = refusal_of_dev_1(&site).await;
    assert_eq!(told, REVOKED);

    let mut admin = site.admin().await;
    admin
        .unblock_device(UnblockDeviceRequest {
            client_id: "dev-1".into(),
        })
        .await
        .unwrap();
    let channel = site.connect("dev-1").await;
    Stream::register(channel.clone(), "dev-1").await.unwrap();
    let chunks = download(channel, request()).await.unwrap();
    assert_eq!(
        chunks
            .iter()
            .map(|chunk| chunk.content.len())
            .sum::<usize>(),
        48 << 20
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_device_is_refused_and_so_is_the_old_certificate_of_one_added_again() {
    let site = Site::started();
    site.add_device("dev-1");
    let first = site.device_certificates("dev-1");
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    site.fwpush(&["device", "remove", "dev-1", "--yes"]).ok();
    let refused = stream.end().await;
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::PermissionDenied,
            "this device is blocked or was removed"
        )
    );
    let address = site.devices.to_string();
    let told = refusal(&address, first.tls(), "dev-1").await;
    assert!(told.contains("device dev-1 is not known here"), "{told}");

    let second = add_again(&site, "second");
    let told = refusal(&address, first.tls(), "dev-1").await;
    assert_eq!(told, "this is not the newest certificate of device dev-1");
    let (mut stream, _) = Stream::register(second.connect(&address).await.unwrap(), "dev-1")
        .await
        .unwrap();
    stream.beat("dev-1", 1).await.unwrap();

    // Also a certificate that is replaced while it is in use.
    let third = add_again(&site, "third");
    stream.end().await;
    let told = refusal(&address, second.tls(), "dev-1").await;
    assert_eq!(told, "this is not the newest certificate of device dev-1");
    Stream::register(third.connect(&address).await.unwrap(), "dev-1")
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_changes_the_certificate_of_new_handshakes_and_no_live_stream() {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let before = server_fingerprint(&site).await;

    let (key, certificate) = node_certificate(&site.authority(Role::Node), &site.trust_domain());
    let pki = site.dir().join("server/pki");
    fs::write(pki.join("node.crt"), &certificate).unwrap();
    fs::write(pki.join("node.key"), key).unwrap();
    site.server().signal(Signal::HUP);
    site.server()
        .line_with("Certificates and configuration were read again");
    let after = server_fingerprint(&site).await;
    assert_ne!(before, after);
    assert_eq!(
        after,
        peer_of(&authorities(&certificate)).unwrap().fingerprint
    );
    // The live stream goes on.
    stream.beat("dev-1", 1).await.unwrap();
    assert!(site.device("dev-1")["device"]["online"].as_bool().unwrap());

    // One that cannot be used is not taken.
    fs::write(pki.join("node.crt"), "nothing\n").unwrap();
    site.server().signal(Signal::HUP);
    site.server()
        .line_with("The configuration was not taken; the old one stays");
    assert_eq!(server_fingerprint(&site).await, after);
    stream.beat("dev-1", 2).await.unwrap();
    Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
}

// ---- Helpers ----

async fn refusal_of_dev_1(site: &Site) -> String {
    let tls = site.device_certificates("dev-1").tls();
    refusal(&site.devices.to_string(), tls, "dev-1").await
}

/// Adds dev-1 as it is (again), with a new key.
fn add_again(site: &Site, dir: &str) -> Certificates {
    let out = site.temp().join(dir);
    let hw = format!("{HW}:1");
    site.fwpush(&[
        "device",
        "add",
        "dev-1",
        "--product",
        PRODUCT,
        "--hw",
        &hw,
        "--out",
        out.to_str().unwrap(),
    ])
    .ok();
    let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
    site.certificates_of((read("device.crt"), read("device.key")))
}

/// Key and certificate of a node, PEM.
fn node_certificate(authority: &Ca, domain: &TrustDomain) -> (String, String) {
    let (key, csr) = new_key_and_csr().unwrap();
    let identity = Identity::node(domain, &"node-1".parse().unwrap());
    let name: SanName = "localhost".parse().unwrap();
    let certificate = authority
        .issue_for_csr(&csr, &identity, &[name], Timestamp::now(), 30)
        .unwrap();
    (key.to_string(), certificate)
}

/// SHA-256 of the certificate that the server shows now.
async fn server_fingerprint(site: &Site) -> [u8; 32] {
    let wire = Wire::tls(site.devices, site.device_certificates("dev-2").tls())
        .await
        .unwrap();
    peer_of(wire.io.get_ref().1.peer_certificates().unwrap())
        .unwrap()
        .fingerprint
}
