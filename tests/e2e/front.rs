//! Behind a front: who a connection is counted and logged as, headers that are wrong or missing, and a real HAProxy.

use std::{net::SocketAddrV4, time::Duration};

use fwpush_tests::{
    agent::{Device, SLOT_BYTES},
    client::{Stream, connect_by, words},
    front::{Haproxy, SOURCE, Through, header, header_for, header_of_a_probe},
    http2::connect_from,
    node::Node,
    postgres::postgres,
    site::{Site, bear_silence},
    wait::{LONG, until},
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::fleet::{all_online, fleet, version};

/// Addresses for documentation (RFC 5737), which no test comes from.
const PEER: &str = "198.51.100.7:4711";
const ANOTHER: &str = "203.0.113.9:4711";

const DEVICES: usize = 40;

const REFUSED: &str = "A connection was refused";

/// A site whose fronts have these addresses, with devices dev-1 and dev-2.
fn site_behind(fronts: &[&str]) -> Site {
    let mut site = Site::new();
    list(&site, fronts);
    site.edit_config(bear_silence);
    site.edit_config(|config| {
        let limits = config["limits"].as_table_mut().unwrap();
        limits.insert("handshakes_per_address".into(), 4.into());
    });
    site.start();
    for id in ["dev-1", "dev-2"] {
        site.add_device(id);
    }
    site
}

fn list(site: &Site, fronts: &[&str]) {
    site.edit_config(|config| {
        let listen = config["listen"].as_table_mut().unwrap();
        listen.insert("proxies".into(), fronts.to_vec().into());
    });
}

fn through(peer: &str) -> Through {
    Through(header_for(peer.parse::<SocketAddrV4>().unwrap()))
}

/// A stream of a device that comes through a front.
async fn register(site: &Site, id: &str, front: &Through) -> Result<Stream, String> {
    let tls = site.device_certificates(id).tls();
    let channel = connect_by(front, &site.devices.to_string(), tls).await;
    let channel = channel.map_err(|error| error.to_string())?;
    let stream = Stream::register(channel, id).await;
    stream
        .map(|(stream, _)| stream)
        .map_err(|status| words(&status))
}

/// Reads until the connection ends.
async fn ended(tcp: &mut TcpStream) {
    let mut unread = Vec::new();
    // A reset is an end as well.
    let _ = timeout(LONG, tcp.read_to_end(&mut unread))
        .await
        .expect("the server closes the connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_front_a_device_has_the_address_that_the_front_tells() {
    let mut site = site_behind(&["10.0.0.5", "127.0.0.0/28"]);
    let mut stream = register(&site, "dev-1", &through(PEER)).await.unwrap();
    let line = site.server().line_with("A device registered");
    assert!(line.contains(PEER), "{line}");
    stream.beat("dev-1", 1).await.unwrap();

    // So has one that is refused.
    let seen = site.server().lines().len();
    site.fwpush(&["device", "block", "dev-2", "--reason", "lost"])
        .ok();
    register(&site, "dev-2", &through(ANOTHER))
        .await
        .unwrap_err();
    let (_, line) = site.server().line_after(seen, REFUSED);
    assert!(line.contains(ANOTHER), "{line}");

    // A front that speaks TLS for itself is known by its own address.
    let seen = site.server().lines().len();
    let stream = register(&site, "dev-1", &Through(header_of_a_probe()))
        .await
        .unwrap();
    let (_, line) = site.server().line_after(seen, "A device registered");
    assert!(line.contains("127.0.0.1:"), "{line}");
    drop(stream);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_must_come_from_a_front_and_must_not_from_anyone_else() {
    let mut site = site_behind(&["10.0.0.5"]);
    let no_tls = "does not speak TLS on this port";
    register(&site, "dev-1", &through(PEER)).await.unwrap_err();
    let (seen, line) = site.server().line_after(0, REFUSED);
    assert!(
        line.contains(no_tls) && line.contains("127.0.0.1:"),
        "{line}"
    );

    // Fronts are read again while the server runs; streams that are there stay.
    let mut direct = register(&site, "dev-2", &Through(Vec::new()))
        .await
        .unwrap();
    list(&site, &["127.0.0.1"]);
    site.server().signal(Signal::HUP);
    site.server()
        .line_with("Certificates and configuration were read again");
    let mut fronted = register(&site, "dev-1", &through(PEER)).await.unwrap();
    register(&site, "dev-1", &Through(Vec::new()))
        .await
        .unwrap_err();
    let (_, line) = site.server().line_after(seen, REFUSED);
    assert!(
        line.contains("the front sends no header of version 2"),
        "{line}"
    );
    direct.beat("dev-2", 1).await.unwrap();
    fronted.beat("dev-1", 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_header_is_refused_in_words() {
    let mut site = site_behind(&["127.0.0.1"]);
    let addresses = &header_for(PEER.parse().unwrap())[16..];
    let mut seen = 0;
    for (bytes, words) in [
        (
            b"PROXY TCP4 198.51.100.7 127.0.0.1 4711 7443\r\n".to_vec(),
            "is of version 1",
        ),
        (
            header(0x21, 0x11, 12, &addresses[..5]),
            "closed the connection after 21 bytes",
        ),
        (header(0x21, 0x11, 4, addresses), "is broken"),
        (header(0x21, 0x11, 600, addresses), "announces 616 bytes"),
        (
            header(0x21, 0x11, 15, &[addresses, &[4, 0, 9]].concat()),
            "is broken",
        ),
        (header(0x21, 0x31, 216, &[1; 216]), "has no TCP address"),
        (header(0x21, 0x00, 0, &[]), "has no TCP address"),
    ] {
        let mut tcp = Through(bytes).tcp(site.devices).await.unwrap();
        tcp.shutdown().await.unwrap();
        ended(&mut tcp).await;
        let line;
        (seen, line) = site.server().line_after(seen, REFUSED);
        assert!(
            line.contains("PROXY protocol") && line.contains(words),
            "{words}: {line}"
        );
        assert!(line.contains("127.0.0.1:"), "{line}");
    }
    assert!(site.metrics_text().contains("{reason=\"proxy\"} 7"));
    register(&site, "dev-1", &through(PEER)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_front_that_looks_whether_the_node_is_there_is_no_refusal() {
    let mut site = site_behind(&["127.0.0.1"]);
    for _ in 0..3 {
        // Closed at once, and closed behind a header that says what it is.
        drop(connect_from(None, site.devices).await.unwrap());
        let mut probe = Through(header_of_a_probe())
            .tcp(site.devices)
            .await
            .unwrap();
        probe.shutdown().await.unwrap();
        ended(&mut probe).await;
    }
    // A device that went away within its handshake is one.
    let mut tcp = through(PEER).tcp(site.devices).await.unwrap();
    tcp.shutdown().await.unwrap();
    ended(&mut tcp).await;
    let line = site.server().line_with(REFUSED);
    assert!(line.contains(PEER), "{line}");
    let refusals = site.server().lines();
    let refusals = refusals.iter().filter(|line| line.contains(REFUSED));
    assert_eq!(refusals.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_front_that_stay_silent_hold_up_nobody_and_are_closed() {
    let mut site = site_behind(&["127.0.0.1"]);
    // Many more than one address may have in their handshakes, and one that sends its header a byte at a time.
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(connect_from(None, site.devices).await.unwrap());
    }
    let mut slow = connect_from(None, site.devices).await.unwrap();
    let slow = tokio::spawn(async move {
        for byte in header_for(PEER.parse().unwrap()) {
            if slow.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        ended(&mut slow).await;
    });
    let mut stream = register(&site, "dev-1", &through(PEER)).await.unwrap();
    stream.beat("dev-1", 1).await.unwrap();
    for tcp in &mut silent {
        ended(tcp).await;
    }
    timeout(LONG, slow).await.unwrap().unwrap();
    let lines = site.server().lines();
    let late = lines
        .iter()
        .filter(|line| line.contains("the front's header did not come in time"));
    assert_eq!(late.count(), 201);
    stream.beat("dev-1", 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_front_slow_handshakes_hold_up_their_own_address_and_no_other() {
    let site = site_behind(&["127.0.0.1"]);
    let (honest, theirs) = (through(PEER), through(ANOTHER));
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut tcp = theirs.tcp(site.devices).await.unwrap();
        // The beginning of a TLS record, and no more.
        tcp.write_all(&[22]).await.unwrap();
        slow.push(tcp);
    }
    // Once the server has seen them, an honest peer of their address has to wait, and one of another address has not.
    let (mut late, mut early) = (Box::pin(register(&site, "dev-2", &theirs)), 0);
    while let Ok(served) = timeout(Duration::from_secs(1), &mut late).await {
        served.unwrap();
        early += 1;
        assert!(early < 4, "the bound of an address does not hold");
        late = Box::pin(register(&site, "dev-2", &theirs));
    }
    tokio::select! {
        biased;
        served = register(&site, "dev-1", &honest) => drop(served.unwrap()),
        _ = &mut late => panic!("another address is served first"),
    }
    // The slow ones are cut, and whoever waited is served, then or when it comes again.
    for tcp in &mut slow {
        ended(tcp).await;
    }
    let _ = late.await;
    register(&site, "dev-2", &theirs).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_update_through_haproxy_and_come_back_when_it_restarts() {
    let mut site = site_behind(&[&SOURCE.to_string()]);
    let Some(mut front) = Haproxy::before(&[(site.devices, site.metrics)]).await else {
        return;
    };
    let mut device = Device::add(&site, "gw-1", SLOT_BYTES);
    device.configure(|config| {
        config.insert("servers".into(), vec![front.address.to_string()].into());
    });
    device.start();
    let (seen, line) = site.server().line_after(0, "A device registered");
    assert!(
        line.contains("gw-1") && line.contains("peer=127.0.0.1:"),
        "{line}"
    );

    let image = site.image("1.1.0.img", 1 << 20, 1);
    site.release(&image, "1.1.0").ok();
    device.expect_image("b", &std::fs::read(&image).unwrap());

    front.restart().await;
    let (_, line) = site.server().line_after(seen, "A device registered");
    assert!(line.contains("gw-1"), "{line}");
    let image = site.image("1.2.0.img", 1 << 20, 2);
    site.release(&image, "1.2.0").ok();
    device.expect_image("a", &std::fs::read(&image).unwrap());

    // The very address and port that a peer has on its side.
    let from = "127.0.0.2:0".parse().unwrap();
    let mut tcp = connect_from(Some(from), front.address).await.unwrap();
    let own = tcp.local_addr().unwrap().to_string();
    tcp.write_all(b"hello").await.unwrap();
    ended(&mut tcp).await;
    let line = site
        .server()
        .line_where(0, "the peer's own port", |line| line.contains(&own))
        .1;
    assert!(line.contains(REFUSED), "{line}");
    // Nothing was said about its questions after the node's health.
    let lines = site.server().lines();
    assert!(
        !lines.iter().any(|line| line.contains(&SOURCE.to_string())),
        "{}",
        lines.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_haproxy_devices_are_spread_over_two_nodes_and_leave_one_that_drains() {
    let Some(postgres) = postgres() else { return };
    let mut site = Site::new();
    list(&site, &[&SOURCE.to_string()]);
    site.use_database(&postgres.url("fwpush"));
    // A directory that both nodes share.
    let files = format!("file:{}", site.temp().join("images").display());
    site.edit_config(|config| {
        let files = toml::Table::from_iter([("url".to_owned(), files.into())]);
        config.insert("files".into(), files.into());
    });
    site.start();
    let mut second = Node::add(&site, "node-2");
    second.start();
    let nodes = [
        (site.devices, site.metrics),
        (second.devices, second.metrics),
    ];
    let Some(front) = Haproxy::before(&nodes).await else {
        return;
    };
    let fleet = fleet(&site, "sim-", DEVICES, |config| {
        config.servers = vec![front.address.to_string()];
    });
    all_online(&fleet).await;
    // leastconn: each has its half, give or take those that connected while one was not yet counted.
    let online = |text: String| {
        let mut values = text
            .lines()
            .filter_map(|line| line.strip_prefix("fwpush_devices_online "));
        values.next().unwrap().parse::<usize>().unwrap()
    };
    let on_each = [
        online(site.metrics_text()),
        online(second.get("/metrics").1),
    ];
    assert!(
        on_each.iter().all(|count| *count >= DEVICES / 4),
        "{on_each:?}"
    );

    // The second learns of a rollout that the first was asked for, and serves the image.
    let image = site.image("1.1.0.img", 1 << 20, 1);
    site.release(&image, "1.1.0").ok();
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!(
        outcomes.as_expected, DEVICES as u64,
        "{:?}",
        outcomes.unexpected
    );

    // The front sees /readyz turn, and new connections go to the other node; so do its devices.
    second.stop_server();
    all_online(&fleet).await;
    until("all devices on the first node", || async {
        match online(site.metrics_text()) {
            DEVICES => Ok(()),
            count => Err(count),
        }
    })
    .await;
    let image = site.image("1.2.0.img", 1 << 20, 2);
    site.release(&image, "1.2.0").ok();
    let outcomes = fleet.wait_for(&version("1.2.0"), LONG).await;
    assert_eq!(
        outcomes.as_expected, DEVICES as u64,
        "{:?}",
        outcomes.unexpected
    );
}
