//! Floods of HTTP/2 frames, by hand (RUSTSEC-2024-0003, RUSTSEC-2024-0332): the connection ends, memory stays, others are served.

use std::io;

use fwpush_proto::v1::FileRequest;
use fwpush_tests::{
    client::{Stream, download},
    http2::{
        CONTINUATION, DATA, END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS, Wire, call_headers,
        frame, literal, settings_ack,
    },
    site::{PRODUCT, Site},
    wait::LONG,
};
use tokio::time::timeout;

/// What a flood may add to the server's memory. A peer that were not bounded would add hundreds of MiB.
const MEMORY: u64 = 48 << 20;
/// Frames written at once.
const BATCH: u64 = 256;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_reset_streams_ends_its_connection() {
    // Rapid reset: each stream is cancelled before the server has answered it (CVE-2023-44487).
    let block = call_headers("/fwpush.v1.PushService/Connect");
    endure(Vec::new(), move |n| {
        let stream = 2 * n as u32 + 1;
        [
            frame(HEADERS, END_HEADERS, stream, &block),
            frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()),
        ]
        .concat()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_block_without_end_ends_its_connection() {
    let begin = frame(
        HEADERS,
        0,
        1,
        &call_headers("/fwpush.v1.PushService/Connect"),
    );
    let piece = literal("x-more", &"y".repeat(100)).repeat(100);
    endure(begin, move |_| frame(CONTINUATION, 0, 1, &piece)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_continuations_without_end_end_their_connection() {
    let begin = frame(
        HEADERS,
        0,
        1,
        &call_headers("/fwpush.v1.PushService/Connect"),
    );
    endure(begin, |_| frame(CONTINUATION, 0, 1, &[])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_pings_that_are_never_read_ends_its_connection() {
    let mut site = endure(Vec::new(), |n| frame(PING, 0, 0, &n.to_be_bytes())).await;
    site.server()
        .line_with("A connection was closed: nothing was asked on it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_settings_ends_its_connection() {
    let mut site = endure(Vec::new(), |_| frame(SETTINGS, 0, 0, &[])).await;
    site.server()
        .line_with("A connection was closed: nothing was asked on it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_empty_data_ends_its_connection() {
    let begin = frame(
        HEADERS,
        END_HEADERS,
        1,
        &call_headers("/fwpush.v1.PushService/Connect"),
    );
    endure(begin, |_| frame(DATA, 0, 1, &[])).await;
}

/// Sends `begin` and then `next` for ever, reading nothing, until the server ends the connection. Meanwhile another
/// device registers, beats and downloads; afterwards the server's memory is what it was.
async fn endure(begin: Vec<u8>, next: impl FnMut(u64) -> Vec<u8> + Send + 'static) -> Site {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let image = site.image("meanwhile.img", 4 << 20, 5);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let request = FileRequest {
        file_id,
        ..Default::default()
    };
    // What a download maps and buffers is there before the measure begins.
    download(site.connect("dev-2").await, request.clone())
        .await
        .unwrap();
    let before = site.server().resident_bytes();

    let tls = site.device_certificates("dev-1").tls();
    let wire = Wire::open(site.devices, tls, &[]).await.unwrap();
    let flood = tokio::spawn(flood(wire, begin, next));
    let channel = site.connect("dev-2").await;
    let (mut stream, _) = Stream::register(channel.clone(), "dev-2").await.unwrap();
    let mut peak = before;
    let mut beats = 0;
    while !flood.is_finished() {
        beats += 1;
        stream.beat("dev-2", beats).await.unwrap();
        let chunks = download(channel.clone(), request.clone()).await.unwrap();
        assert_eq!(
            chunks
                .iter()
                .map(|chunk| chunk.content.len())
                .sum::<usize>(),
            4 << 20
        );
        peak = peak.max(site.server().resident_bytes());
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let frames = flood.await.unwrap();
    assert!(
        peak < before + MEMORY,
        "{before} bytes grew to {peak} over {frames} frames"
    );
    stream.beat("dev-2", beats + 1).await.unwrap();
    assert!(site.server().runs());
    site
}

/// Gives how many frames it could send.
async fn flood(mut wire: Wire, begin: Vec<u8>, mut next: impl FnMut(u64) -> Vec<u8>) -> u64 {
    wire.send(&[settings_ack(), begin].concat()).await.unwrap();
    let mut sent = 0;
    let ended = async {
        loop {
            let batch: Vec<u8> = (sent..sent + BATCH).flat_map(&mut next).collect();
            wire.send(&batch).await?;
            sent += BATCH;
        }
        #[allow(unreachable_code)]
        Ok::<(), io::Error>(())
    };
    timeout(LONG, ended)
        .await
        .expect("the server ends the flood")
        .unwrap_err();
    sent
}
