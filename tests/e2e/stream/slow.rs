//! Peers that do not read, and lines that fall silent.

use fwpush_proto::v1::{
    RegisterRequest, SendTextRequest, SessionKind, client_message::Kind as FromDevice,
};
use fwpush_tests::{
    agent::{Device, SLOT_BYTES},
    client::{Stream, facts},
    http2::{
        DATA, END_HEADERS, HEADERS, INITIAL_WINDOW, Wire, call_headers, frame, grpc, settings_ack,
    },
    proxy::Proxy,
    raw::encoded,
    site::{Site, bear_silence},
};

use rustix::process::Signal;

use super::{beat, offline, online, reconnect};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_reads_fills_a_short_queue_and_is_ended() {
    let mut site = Site::new();
    site.edit_config(bear_silence);
    site.start();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let (mut other, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();

    // It opens no window: not one byte of an answer may be sent.
    let tls = site.device_certificates("dev-1").tls();
    let mut wire = Wire::open(site.devices, tls, &[(INITIAL_WINDOW, 0)])
        .await
        .unwrap();
    let register = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(facts()),
    });
    let call = [
        settings_ack(),
        frame(
            HEADERS,
            END_HEADERS,
            1,
            &call_headers("/fwpush.v1.PushService/Connect"),
        ),
        frame(DATA, 0, 1, &grpc(&encoded(register))),
        frame(DATA, 0, 1, &grpc(&encoded(beat("dev-1", 1)))),
    ];
    wire.send(&call.concat()).await.unwrap();
    fwpush_tests::wait::until("dev-1 to be online", || async {
        if online(&site, "dev-1").await {
            Ok(())
        } else {
            Err("offline")
        }
    })
    .await;

    let before = site.server().resident_bytes();
    let mut admin = site.admin().await;
    let text = |id: &str| SendTextRequest {
        client_id: id.into(),
        text: "x".repeat(4096),
    };
    let mut delivered = 0;
    for _ in 0..1_000 {
        match admin
            .send_text(text("dev-1"))
            .await
            .unwrap()
            .into_inner()
            .outcome
            .as_str()
        {
            "DELIVERED" => delivered += 1,
            outcome => assert_eq!(outcome, "BUSY"),
        }
    }
    // Eight wait, and one or two are on their way; the others are turned away at once.
    assert!((8..=10).contains(&delivered), "{delivered} were taken");
    assert!(site.server().resident_bytes() < before + (16 << 20));
    assert_eq!(
        admin
            .send_text(text("dev-2"))
            .await
            .unwrap()
            .into_inner()
            .outcome,
        "DELIVERED"
    );
    other.beat("dev-2", 1).await.unwrap();

    // Its stream is ended after 30 s, and the other one is not.
    let ended = tokio::task::spawn_blocking(move || {
        site.server().line_with("the device read nothing for 30 s");
        site
    });
    let site = ended.await.unwrap();
    offline(&site, "dev-1").await;
    other.beat("dev-2", 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_falls_silent_is_noticed_and_the_device_takes_its_session_up_again() {
    let site = Site::started();
    site.add_device("dev-1");
    let proxy = Proxy::to(site.devices).await;
    let certificates = site.device_certificates("dev-1");
    let channel = certificates
        .connect(&proxy.address.to_string())
        .await
        .unwrap();
    let first = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(facts()),
    });
    let (mut stream, registered) = Stream::begin(channel, first).await.unwrap();
    stream.beat("dev-1", 1).await.unwrap();
    proxy.cut();

    // The device comes back before the server has noticed: the old session ends at once.
    assert!(online(&site, "dev-1").await);
    let channel = certificates
        .connect(&proxy.address.to_string())
        .await
        .unwrap();
    let back = reconnect("dev-1", &registered.session_id, &facts());
    let (mut second, resumed) = Stream::begin(channel, back).await.unwrap();
    assert_eq!(resumed.kind(), SessionKind::Resumed);
    second.beat("dev-1", 2).await.unwrap();

    // It does not come back: the server notices by itself.
    proxy.cut();
    offline(&site, "dev-1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_notices_a_silent_line_and_connects_again() {
    let site = Site::started();
    let proxy = Proxy::to(site.devices).await;
    let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
    device.configure(|config| {
        config.insert("servers".into(), vec![proxy.address.to_string()].into());
    });
    device.start().line_with("Registered.");
    let before = device.agent().lines().len();
    proxy.cut();
    let device = tokio::task::spawn_blocking(move || {
        let (at, line) = device
            .agent()
            .line_after(before, "Not connected; trying again.");
        assert!(line.contains("not a byte from the server"), "{line}");
        device.agent().line_after(at, "Registered.");
        device
    });
    let device = device.await.unwrap();
    assert!(online(&site, "dev-1").await);
    drop(device);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stood_still_comes_back() {
    let site = Site::started();
    let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
    device.start().line_with("Registered.");
    let before = device.agent().lines().len();
    device.agent().signal(Signal::STOP);
    offline(&site, "dev-1").await;
    device.agent().signal(Signal::CONT);
    let device = tokio::task::spawn_blocking(move || {
        device.agent().line_after(before, "Registered.");
        device
    });
    let device = device.await.unwrap();
    assert!(online(&site, "dev-1").await);
    drop(device);
}
