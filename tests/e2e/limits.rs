//! Bounds on connections: peers that are silent, slow or too many hold up themselves and nobody else.

mod downloads;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use futures::future::join_all;
use fwpush_proto::v1::{FileRequest, file_service_client::FileServiceClient};
use fwpush_tests::{
    client::{Certificates, Stream, download, words},
    http2::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, INITIAL_WINDOW,
        PING, RST_STREAM, Wire, call_headers, connect_from, frame, grpc, literal, settings_ack,
    },
    site::{PRODUCT, Site},
    wait::{self, LONG},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_silent_connections_hold_up_nobody_and_are_closed() {
    raise_file_limit();
    let mut site = Site::started();
    site.add_device("dev-1");
    let image = site.image("image.img", 16 << 20, 1);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let before = site.server().resident_bytes();

    let mut silent = Vec::new();
    for _ in 0..2_000 {
        silent.push(connect_from(None, site.devices).await.unwrap());
    }
    // From the same address, after all of them.
    let channel = site.connect("dev-1").await;
    let (mut stream, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
    let request = FileRequest {
        file_id,
        ..Default::default()
    };
    let chunks = download(channel, request).await.unwrap();
    assert_eq!(
        chunks
            .iter()
            .map(|chunk| chunk.content.len())
            .sum::<usize>(),
        16 << 20
    );
    stream.beat("dev-1", 1).await.unwrap();
    // The image is mapped; each socket costs a task.
    let after = site.server().resident_bytes();
    assert!(
        after < before + (16 << 20) + (64 << 20),
        "{before} bytes grew to {after}"
    );

    join_all(silent.iter_mut().map(closed)).await;
    site.server().line_with("the peer sent nothing");
    assert!(stream.beat("dev-1", 2).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_handshakes_hold_up_their_own_address_and_no_other() {
    let mut site = Site::new();
    site.edit_config(|config| {
        config["limits"]
            .as_table_mut()
            .unwrap()
            .insert("handshakes_per_address".into(), 4.into());
    });
    site.start();
    site.add_device("dev-1");
    site.add_device("dev-2");
    // Twice as many of one address as may be in their handshakes: each sends a byte and then, slowly, more.
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut tcp = connect_from(Some(another_address()), site.devices)
            .await
            .unwrap();
        tcp.write_all(&[22]).await.unwrap();
        slow.push(tokio::spawn(drip(tcp)));
    }
    // An honest peer of that address has to wait for its turn, once the server has seen the first bytes of those before it.
    let mut early = 0;
    let late = loop {
        let certificates = site.device_certificates("dev-2");
        let address = site.devices;
        let mut late = tokio::spawn(async move {
            // One that has waited in vain comes again.
            while register_from(address, &certificates, Some(another_address()))
                .await
                .is_err()
            {}
        });
        match timeout(Duration::from_secs(1), &mut late).await {
            Ok(served) => served.unwrap(),
            Err(_) => break late,
        }
        early += 1;
        assert!(early < 4, "the bound of an address does not hold");
    };
    register_from(site.devices, &site.device_certificates("dev-1"), None)
        .await
        .unwrap();
    assert!(!late.is_finished(), "another address is served first");
    // The slow ones are cut, and whoever waited is served.
    timeout(LONG, late).await.unwrap().unwrap();
    for cut in slow {
        cut.await.unwrap();
    }
    site.server().line_with("the handshake took more than 10 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_health_question_is_bounded_like_any_message_of_a_device() {
    let site = Site::started();
    site.add_device("dev-1");
    let mut health = HealthClient::new(site.connect("dev-1").await);
    // Of a message the name takes all but 4 bytes, its tag and length.
    for (bytes, answer) in [
        (0, Ok(())),
        (64 << 10, Err(Code::NotFound)),
        ((64 << 10) + 1, Err(Code::OutOfRange)),
        ((4 << 20) + 1, Err(Code::OutOfRange)),
    ] {
        let service = "x".repeat(usize::saturating_sub(bytes, 4));
        let checked = health.check(HealthCheckRequest { service }).await;
        let checked = checked.map(|_| ()).map_err(|status| status.code());
        assert_eq!(checked, answer, "{bytes} bytes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_listener_closes_newcomers_until_somebody_leaves() {
    let mut site = Site::new();
    site.edit_config(|config| {
        config["limits"]
            .as_table_mut()
            .unwrap()
            .insert("connections".into(), 3.into());
    });
    site.start();
    for id in ["dev-1", "dev-2", "dev-3", "dev-4"] {
        site.add_device(id);
    }
    let mut streams = Vec::new();
    for id in ["dev-1", "dev-2", "dev-3"] {
        let channel = site.connect(id).await;
        let (stream, _) = Stream::register(channel.clone(), id).await.unwrap();
        streams.push((id, stream, channel));
    }
    let fourth = site.device_certificates("dev-4");
    assert!(fourth.connect(&site.devices.to_string()).await.is_err());
    let full = "fwpush_handshake_failures_total{reason=\"full\"}";
    assert!(
        site.metrics_text().contains(full),
        "{}",
        site.metrics_text()
    );
    for (id, stream, _) in &mut streams {
        stream.beat(id, 1).await.unwrap();
    }
    streams.pop();
    wait::until("a place", || async {
        let channel = fourth
            .connect(&site.devices.to_string())
            .await
            .map_err(|error| error.to_string())?;
        Stream::register(channel, "dev-4")
            .await
            .map_err(|status| words(&status))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_too_many_connections_of_one_device_the_oldest_ends() {
    let site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let tls = site.device_certificates("dev-1").tls();
    let (mut other, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    let mut wires = Vec::new();
    for _ in 0..9 {
        let mut wire = Wire::open(site.devices, tls.clone(), &[]).await.unwrap();
        // The server's settings: it is among the device's connections now.
        wire.receive().await.unwrap();
        wires.push(wire);
    }
    let mut rest = wires.split_off(1);
    wires[0].ended().await;
    for wire in &mut rest {
        wire.send(&[settings_ack(), frame(PING, 0, 0, &[7; 8])].concat())
            .await
            .unwrap();
        while wire.receive().await.unwrap().kind != PING {}
    }
    other.beat("dev-2", 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_on_which_nothing_is_asked_is_closed() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let tls = site.device_certificates("dev-1").tls();
    // One says nothing after TLS, the other begins HTTP/2 properly and stops there.
    let mut mute = Wire::tls(site.devices, tls.clone()).await.unwrap();
    let mut idle = Wire::open(site.devices, tls, &[]).await.unwrap();
    idle.send(&settings_ack()).await.unwrap();
    let (_, ()) = tokio::join!(idle.ended(), async {
        mute.ended().await;
    });
    site.server().line_with("nothing was asked on it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_calls_of_one_connection_are_bounded() {
    let site = Site::started();
    site.add_device("dev-1");
    let tls = site.device_certificates("dev-1").tls();
    let block = call_headers("/fwpush.v1.PushService/Connect");

    // Sixteen calls at once are served, the seventeenth is refused by itself.
    let mut wire = Wire::open(site.devices, tls.clone(), &[]).await.unwrap();
    let calls = (0..17)
        .flat_map(|n| frame(HEADERS, END_HEADERS, 2 * n + 1, &block))
        .collect::<Vec<u8>>();
    wire.send(&[settings_ack(), calls].concat()).await.unwrap();
    let refused = loop {
        let frame = wire.receive().await.unwrap();
        assert_ne!(frame.kind, GOAWAY);
        if frame.kind == RST_STREAM {
            break frame;
        }
    };
    // REFUSED_STREAM (RFC 9113 section 7).
    assert_eq!(
        (refused.stream, &refused.payload[..]),
        (33, &[0, 0, 0, 7][..])
    );

    // A list of 8 KiB of headers is too much, in one frame or in several.
    let more = literal("x-more", &"y".repeat(100)).repeat(100);
    let (first, second) = more.split_at(5_000);
    for frames in [
        frame(HEADERS, END_HEADERS, 1, &[&block[..], &more].concat()),
        [
            frame(HEADERS, 0, 1, &[&block[..], first].concat()),
            frame(CONTINUATION, END_HEADERS, 1, second),
        ]
        .concat(),
    ] {
        let mut wire = Wire::open(site.devices, tls.clone(), &[]).await.unwrap();
        wire.send(&[settings_ack(), frames].concat()).await.unwrap();
        loop {
            let frame = wire.receive().await.unwrap();
            match frame.kind {
                // The whole answer is its status; of a call that is served it is the beginning.
                HEADERS => break assert_ne!(frame.flags & END_STREAM, 0),
                RST_STREAM => break,
                GOAWAY => break,
                _ => {}
            }
        }
    }
    Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_beyond_the_bounds_are_told_when_to_try_again() {
    let mut site = Site::new();
    site.edit_config(|config| {
        config["limits"]
            .as_table_mut()
            .unwrap()
            .insert("downloads".into(), 6.into());
    });
    site.start();
    for id in ["dev-1", "dev-2"] {
        site.add_device(id);
    }
    let image = site.image("image.img", 32 << 20, 1);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let request = || FileRequest {
        file_id: file_id.clone(),
        ..Default::default()
    };
    let (first, second) = (site.connect("dev-1").await, site.connect("dev-2").await);
    let begin = async |channel: &tonic::transport::Channel| {
        let mut stream = FileServiceClient::new(channel.clone())
            .download_file(request())
            .await?
            .into_inner();
        stream.message().await.map(|_| stream)
    };
    let mut under_way = Vec::new();
    for _ in 0..4 {
        under_way.push(begin(&first).await.unwrap());
    }
    let refused = begin(&first).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(
        refused.message(),
        "this device has too many downloads under way"
    );
    assert_eq!(retry_after_ms(&refused), 5_000);

    for _ in 0..2 {
        under_way.push(begin(&second).await.unwrap());
    }
    let refused = begin(&second).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::ResourceExhausted, "too many downloads now")
    );
    assert_eq!(retry_after_ms(&refused), 5_000);

    // What was refused is given once another has ended.
    under_way.remove(0);
    wait::until("a place", || begin(&first)).await;
}

// ---- Helpers ----

fn retry_after_ms(refused: &tonic::Status) -> u64 {
    refused
        .metadata()
        .get("retry-after-ms")
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap()
}

/// This process has both ends of some thousand connections' worth of sockets open.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )
    .unwrap();
}

/// Another address of this machine than connections usually come from.
fn another_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), 0)
}

/// Reads until the server closes the connection.
async fn closed(tcp: &mut TcpStream) {
    let mut byte = [0];
    // A reset is an end as well.
    let ended = timeout(LONG, tcp.read(&mut byte))
        .await
        .expect("the server closes the connection");
    assert!(matches!(ended, Ok(0) | Err(_)));
}

/// Sends one byte after the other of a handshake that never comes to its end, until it is cut.
async fn drip(mut tcp: TcpStream) {
    let ended: io::Result<()> = async {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            // The rest of a record header that announces more than ever comes, then the record.
            tcp.write_all(&[3]).await?;
        }
    }
    .await;
    ended.unwrap_err();
}

async fn register_from(
    server: SocketAddr,
    certificates: &Certificates,
    from: Option<SocketAddr>,
) -> Result<(), String> {
    let mut wire = Wire::tls_from(from, server, certificates.tls())
        .await
        .map_err(|error| error.to_string())?;
    wire.begin(&[]).await.map_err(|error| error.to_string())?;
    // The server's settings come when it has accepted the certificate.
    wire.receive()
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}
