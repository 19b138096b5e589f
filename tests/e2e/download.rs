//! Downloads: every offset gives the image's own bytes, and nothing else than a device's own files is given at all.

use std::{fs, future::poll_fn, os::unix::fs::symlink, path::PathBuf};

use bytes::Bytes;
use fwpush_keys::{FileId, Outline, ProductRule};
use fwpush_proto::v1::{
    FileChunk, FileRequest, Part, PublishTrustRequest, RegisterRequest,
    client_message::Kind as FromDevice, file_service_client::FileServiceClient,
};
use fwpush_tests::{
    client::{Stream, download, facts},
    http2::{
        DATA, END_HEADERS, END_STREAM, HEADERS, INITIAL_WINDOW, WINDOW_UPDATE, Wire, call_headers,
        frame, grpc, settings_ack,
    },
    offline::Offline,
    raw::padded,
    site::{PRODUCT, Published, Site, random_bytes},
    wait,
};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tonic::{
    Code, Status,
    codegen::{Service as _, http},
    transport::Channel,
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// A site with a published image of an odd size, and the connection of a device of its product.
struct Scene {
    site: Site,
    image: Vec<u8>,
    release: Published,
    channel: Channel,
}

impl Scene {
    async fn new(bytes: usize) -> Self {
        let site = Site::started();
        site.add_device("dev-1");
        let path = site.image("image.img", bytes, 11);
        let release = site.publish(&path, PRODUCT, "1.1.0");
        let channel = site.connect("dev-1").await;
        Self {
            image: random_bytes(bytes, 11),
            site,
            release,
            channel,
        }
    }

    /// A connection on which nothing is asked for 10 s is closed, and a busy machine takes its time to publish.
    async fn connect_anew(&mut self) {
        self.channel = self.site.connect("dev-1").await;
    }

    fn request(&self) -> FileRequest {
        FileRequest {
            file_id: self.release.file_id.clone(),
            ..Default::default()
        }
    }

    async fn refusal(&self, request: FileRequest) -> (Code, String) {
        let refused = download(self.channel.clone(), request).await.unwrap_err();
        (refused.code(), refused.message().to_owned())
    }

    /// Where the store keeps the file.
    fn stored(&self) -> PathBuf {
        self.site
            .dir()
            .join("server/data/files")
            .join(&self.release.file_id[..2])
            .join(&self.release.file_id)
    }
}

fn content(chunks: &[FileChunk]) -> Vec<u8> {
    chunks
        .iter()
        .flat_map(|chunk| chunk.content.iter().copied())
        .collect()
}

/// Chunks are numbered from 0, follow on each other, and only the last says so.
fn check_order(chunks: &[FileChunk], offset: u64) {
    let mut at = offset;
    for (number, chunk) in chunks.iter().enumerate() {
        assert_eq!((chunk.sequence, chunk.offset), (number as u64, at));
        assert_eq!(chunk.is_last, number + 1 == chunks.len());
        at += chunk.content.len() as u64;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_range_in_chunks_of_any_size_is_the_images_own_bytes() {
    let scene = Scene::new(1_500_001).await;
    let size = scene.image.len() as u64;
    let mut random = StdRng::seed_from_u64(0x5eed);
    let mut ranges = vec![
        (0, 0, 0),
        (0, 1, 0),
        // At, before and after the border of a group; and lengths beyond the end.
        (64 * KIB - 1, 2, 1),
        (64 * KIB, 64 * KIB, 0),
        (1, u64::MAX, u32::MAX),
        (size - 1, 0, 0),
        (size - 1, 5, 0),
    ];
    ranges.extend((0..60).map(|_| {
        let length = if random.random_range(0..4) == 0 {
            0
        } else {
            random.random_range(1..size)
        };
        (
            random.random_range(0..size),
            length,
            random.random_range(0..2 * MIB as u32),
        )
    }));
    for (offset, length, max_chunk_bytes) in ranges {
        let request = FileRequest {
            offset,
            length,
            max_chunk_bytes,
            ..scene.request()
        };
        let chunks = download(scene.channel.clone(), request).await.unwrap();
        let case = format!("offset {offset}, length {length}, chunks of {max_chunk_bytes}");
        let end = if length == 0 {
            size
        } else {
            size.min(offset.saturating_add(length))
        };
        assert!(
            content(&chunks) == scene.image[offset as usize..end as usize],
            "{case}"
        );
        check_order(&chunks, offset);
        let most = match u64::from(max_chunk_bytes) {
            0 => 256 * KIB,
            asked => asked.clamp(16 * KIB, MIB),
        };
        let (last, full) = chunks.split_last().unwrap();
        assert!(
            full.iter().all(|chunk| chunk.content.len() as u64 == most),
            "{case}"
        );
        assert!(last.content.len() as u64 <= most, "{case}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_file_and_what_is_past_it_are_told_apart() {
    let scene = Scene::new(200_000).await;
    let at_end = FileRequest {
        offset: 200_000,
        ..scene.request()
    };
    let chunks = download(scene.channel.clone(), at_end).await.unwrap();
    assert_eq!(chunks.len(), 1);
    assert_eq!(
        (chunks[0].content.len(), chunks[0].is_last, chunks[0].offset),
        (0, true, 200_000)
    );
    for offset in [200_001, 1 << 32, 1 << 63, u64::MAX] {
        let (code, words) = scene
            .refusal(FileRequest {
                offset,
                ..scene.request()
            })
            .await;
        assert_eq!(code, Code::OutOfRange);
        assert_eq!(words, format!("offset {offset} is past the end, 200000"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outline_is_that_of_the_image_and_a_small_file_has_none() {
    let scene = Scene::new(1_000_000).await;
    let outline = FileRequest {
        part: Part::Outline.into(),
        ..scene.request()
    };
    let chunks = download(scene.channel.clone(), outline.clone())
        .await
        .unwrap();
    check_order(&chunks, 0);
    let root: FileId = scene.release.file_id.parse().unwrap();
    let verified = Outline::from_bytes(root, 1_000_000, &content(&chunks)).unwrap();
    for (group, bytes) in scene.image.chunks(64 * KIB as usize).enumerate() {
        verified.check(group as u64, bytes).unwrap();
    }
    // It is a file of its own, with offsets of its own.
    let rest = FileRequest {
        offset: 32,
        ..outline.clone()
    };
    assert_eq!(
        content(&download(scene.channel.clone(), rest).await.unwrap()),
        content(&chunks)[32..]
    );
    let past = FileRequest {
        offset: 32 * 16 + 1,
        ..outline
    };
    assert_eq!(scene.refusal(past).await.0, Code::OutOfRange);

    let small = scene.site.image("small.img", 64 * KIB as usize, 2);
    let file_id = scene.site.publish(&small, PRODUCT, "1.2.0").file_id;
    let none = FileRequest {
        file_id: file_id.clone(),
        part: Part::Outline.into(),
        ..Default::default()
    };
    let chunks = download(scene.channel.clone(), none).await.unwrap();
    assert_eq!(
        (chunks.len(), chunks[0].content.len(), chunks[0].is_last),
        (1, 0, true)
    );
    let whole = FileRequest {
        file_id,
        ..Default::default()
    };
    assert_eq!(
        content(&download(scene.channel.clone(), whole).await.unwrap()),
        fs::read(small).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_files_of_unrevoked_releases_of_the_devices_own_product_are_given() {
    let mut scene = Scene::new(100_000).await;
    let mut admin = scene.site.admin().await;
    let mut offline = Offline::of(&scene.site);
    let root = offline.rotate(|root| {
        root.products
            .insert("meter".parse().unwrap(), ProductRule::new(100));
    });
    admin
        .publish_trust(PublishTrustRequest {
            envelope: root.clone(),
        })
        .await
        .unwrap();
    fs::write(scene.site.dir().join("operator/root.json"), &root).unwrap();

    let meter = scene.site.image("meter.img", 50_000, 4);
    let other = scene.site.publish(&meter, "meter", "1.0.0");
    scene.connect_anew().await;
    let (code, words) = scene
        .refusal(FileRequest {
            file_id: other.file_id,
            ..Default::default()
        })
        .await;
    assert_eq!(
        (code, &words[..]),
        (
            Code::PermissionDenied,
            "no release for this device's product names this file"
        )
    );

    let unknown = blake3::hash(b"never uploaded").to_hex().to_string();
    let (code, words) = scene
        .refusal(FileRequest {
            file_id: unknown,
            ..Default::default()
        })
        .await;
    assert_eq!(
        (code, &words[..]),
        (Code::NotFound, "no release names this file")
    );
    // Uploaded, but in no release.
    let lonely = scene.site.image("lonely.img", 10_000, 5);
    let lonely_id = blake3::hash(&fs::read(&lonely).unwrap())
        .to_hex()
        .to_string();
    let shard = scene
        .site
        .dir()
        .join("server/data/files")
        .join(&lonely_id[..2]);
    fs::create_dir_all(&shard).unwrap();
    fs::copy(&lonely, shard.join(&lonely_id)).unwrap();
    fs::write(shard.join(format!("{lonely_id}.outline")), b"").unwrap();
    let (code, _) = scene
        .refusal(FileRequest {
            file_id: lonely_id,
            ..Default::default()
        })
        .await;
    assert_eq!(code, Code::NotFound);

    // The same bytes in two releases: given until both are revoked.
    let image = scene.site.temp().join("image.img");
    let second = scene.site.publish(&image, PRODUCT, "1.2.0");
    assert_eq!(second.file_id, scene.release.file_id);
    revoke(&scene.site, &scene.release.release_id);
    download(scene.channel.clone(), scene.request())
        .await
        .unwrap();
    revoke(&scene.site, &second.release_id);
    let (code, words) = scene.refusal(scene.request()).await;
    assert_eq!(
        (code, &words[..]),
        (
            Code::FailedPrecondition,
            "every release with this file is revoked"
        )
    );

    // The answers are the record's, whatever the device says of itself.
    let mut lying = facts();
    lying.product = "meter".into();
    let first = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(lying),
    });
    let (_stream, _) = Stream::begin(scene.channel.clone(), first).await.unwrap();
    let of_meter = blake3::hash(&fs::read(meter).unwrap()).to_hex().to_string();
    let (code, _) = scene
        .refusal(FileRequest {
            file_id: of_meter,
            ..Default::default()
        })
        .await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(scene.site.server().runs());
}

/// Revokes a release, as an operator does.
fn revoke(site: &Site, release_id: &str) {
    let out = site.temp().join(format!("{release_id}.revocation.json"));
    let out = out.to_str().unwrap();
    let release = format!("{release_id}=bad");
    site.fwpush(&[
        "keys",
        "revoke",
        "--product",
        PRODUCT,
        "--release",
        &release,
        "--out",
        out,
        "--publish",
    ])
    .ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_no_hash_reaches_no_file() {
    let scene = Scene::new(100_000).await;
    let id = &scene.release.file_id;
    for file_id in [
        String::new(),
        "../fwpush.db".into(),
        format!("../{}", &id[3..]),
        format!("{}/../{}", &id[..2], &id[..58]),
        "/etc/passwd".into(),
        format!("/{}", &id[1..]),
        format!("{}\0", &id[..63]),
        format!("{id}\0.img"),
        id.to_uppercase(),
        id[..63].into(),
        format!("{id}0"),
        format!("{id}.outline"),
        format!(" {}", &id[1..]),
        format!("ä{}", &id[2..]),
    ] {
        let (code, words) = scene
            .refusal(FileRequest {
                file_id: file_id.clone(),
                ..Default::default()
            })
            .await;
        assert_eq!(code, Code::InvalidArgument, "{file_id:?}");
        assert_eq!(
            words, "file_id is not 64 lower-case hex digits",
            "{file_id:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_symbolic_link_in_the_store_is_not_followed() {
    let mut scene = Scene::new(100_000).await;
    let secret = scene.site.temp().join("secret");
    fs::write(&secret, random_bytes(100_000, 12)).unwrap();
    fs::remove_file(scene.stored()).unwrap();
    symlink(&secret, scene.stored()).unwrap();
    // Nothing is open any more after a restart.
    scene.site.stop_server();
    scene.site.start();
    scene.channel = scene.site.connect("dev-1").await;
    let (code, words) = scene.refusal(scene.request()).await;
    assert_eq!(
        (code, &words[..]),
        (
            Code::Unavailable,
            "the file store failed; the server's log says why"
        )
    );
    scene.site.server().line_with("The file store failed");

    // A file that is gone: later, perhaps.
    fs::remove_file(scene.stored()).unwrap();
    let (code, _) = scene.refusal(scene.request()).await;
    assert_eq!(code, Code::Unavailable);
    scene
        .site
        .server()
        .line_with("A published file is not in the store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_part_is_refused_and_a_broken_request_too() {
    let scene = Scene::new(100_000).await;
    let (code, _) = scene
        .refusal(FileRequest {
            part: 7,
            ..scene.request()
        })
        .await;
    assert_eq!(
        code,
        Code::InvalidArgument,
        "a part that nobody knows is not guessed"
    );

    let whole = scene.request().encode_to_vec();
    let mut long = grpc(&padded(whole.clone(), 4091));
    assert_eq!(
        call(&scene, &long).await,
        Code::Ok,
        "4 KiB with the prefix are read"
    );
    long = grpc(&padded(whole.clone(), 4092));
    assert_eq!(
        call(&scene, &long).await,
        Code::InvalidArgument,
        "one more is not"
    );
    assert_eq!(
        call(&scene, &padded(whole.clone(), 1 << 20)).await,
        Code::InvalidArgument,
        "nor is a megabyte"
    );
    assert_eq!(
        call(&scene, &[grpc(&whole), grpc(&whole)].concat()).await,
        Code::InvalidArgument,
        "nor a second message"
    );
    assert_eq!(
        call(&scene, &grpc(&whole)[..20]).await,
        Code::InvalidArgument,
        "nor half of one"
    );
    assert_eq!(
        call(&scene, &grpc(b"\xff\xff")).await,
        Code::InvalidArgument,
        "nor what cannot be decoded"
    );
    assert_eq!(call(&scene, &[]).await, Code::Unimplemented, "nor nothing");
    let mut compressed = grpc(&whole);
    compressed[0] = 1;
    assert_eq!(
        call(&scene, &compressed).await,
        Code::Unimplemented,
        "nor what is compressed"
    );
    download(scene.channel.clone(), scene.request())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_never_comes_whole_is_given_up() {
    let scene = Scene::new(100_000).await;
    let tls = scene.site.device_certificates("dev-1").tls();
    let mut wire = Wire::open(scene.site.devices, tls, &[]).await.unwrap();
    let half = &grpc(&scene.request().encode_to_vec())[..20];
    let call = [
        settings_ack(),
        frame(
            HEADERS,
            END_HEADERS,
            1,
            &call_headers("/fwpush.v1.FileService/DownloadFile"),
        ),
        frame(DATA, 0, 1, half),
    ];
    wire.send(&call.concat()).await.unwrap();
    loop {
        let frame = wire.receive().await.unwrap();
        if frame.stream == 1 && frame.flags & END_STREAM != 0 {
            break;
        }
    }
    let refused = "fwpush_downloads_refused_total{reason=\"DeadlineExceeded\"} 1";
    assert!(
        scene.site.metrics_text().contains(refused),
        "{}",
        scene.site.metrics_text()
    );
}

/// Calls DownloadFile with a body of these bytes.
async fn call(scene: &Scene, body: &[u8]) -> Code {
    let mut channel = scene.channel.clone();
    let request = http::Request::post("http://fwpush/fwpush.v1.FileService/DownloadFile")
        .header("content-type", "application/grpc")
        .body(tonic::body::Body::new(Full::new(Bytes::copy_from_slice(
            body,
        ))))
        .unwrap();
    poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
    let response = channel.call(request).await.unwrap();
    // A refusal has its status in the headers, an answer after its body.
    let refused = Status::from_header_map(response.headers());
    let ended = response.into_body().collect().await.unwrap();
    let status = refused.or_else(|| Status::from_header_map(ended.trailers()?));
    status.expect("the answer has a status").code()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_a_byte_a_second_holds_up_nobody() {
    let mut scene = Scene::new(8 << 20).await;
    scene.site.add_device("dev-2");
    let before = scene.site.server().resident_bytes();
    // Six slow readers on two connections; each opens its window by one byte now and then.
    let mut readers = Vec::new();
    for id in ["dev-1", "dev-2"] {
        let tls = scene.site.device_certificates(id).tls();
        let mut wire = Wire::open(scene.site.devices, tls, &[(INITIAL_WINDOW, 1)])
            .await
            .unwrap();
        let mut calls = settings_ack();
        for stream in [1, 3, 5] {
            calls.extend(frame(
                HEADERS,
                END_HEADERS,
                stream,
                &call_headers("/fwpush.v1.FileService/DownloadFile"),
            ));
            calls.extend(frame(
                DATA,
                END_STREAM,
                stream,
                &grpc(&scene.request().encode_to_vec()),
            ));
        }
        wire.send(&calls).await.unwrap();
        readers.push(wire);
    }
    scene.connect_anew().await;
    let (mut stream, _) = Stream::register(scene.channel.clone(), "dev-1")
        .await
        .unwrap();
    let mut read = 0;
    for beat in 0..5 {
        for wire in &mut readers {
            for stream in [1, 3, 5] {
                wire.send(&frame(WINDOW_UPDATE, 0, stream, &1_u32.to_be_bytes()))
                    .await
                    .unwrap();
            }
            // A byte was allowed from the start.
            let mut data = 0;
            while data < 3 {
                let frame = wire.receive().await.unwrap();
                if frame.kind == DATA {
                    assert!(frame.payload.len() <= 2, "more than the window");
                    data += 1;
                    read += frame.payload.len();
                }
            }
        }
        stream.beat("dev-1", beat).await.unwrap();
        let chunks = download(scene.channel.clone(), scene.request())
            .await
            .unwrap();
        assert!(content(&chunks) == scene.image, "others get all of it");
    }
    assert!(read >= 5 * 6);
    let after = scene.site.server().resident_bytes();
    // The image is mapped once; six readers hold a chunk each at most.
    assert!(
        after < before + (8 << 20) + (24 << 20),
        "{before} bytes grew to {after}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_is_dropped_gives_its_place_back() {
    let scene = Scene::new(8 << 20).await;
    for _ in 0..40 {
        let mut client = FileServiceClient::new(scene.channel.clone());
        let mut stream = client
            .download_file(scene.request())
            .await
            .unwrap()
            .into_inner();
        stream.message().await.unwrap().unwrap();
        drop(stream);
        // The cancellation is on its way; until it is there the place is taken.
        wait::until("a place", || async {
            let short = FileRequest {
                length: 1,
                ..scene.request()
            };
            match download(scene.channel.clone(), short).await {
                Err(status) if status.code() == Code::ResourceExhausted => Err(status),
                other => Ok(other.unwrap()),
            }
        })
        .await;
    }
    wait::until("no download under way", || async {
        let text = scene.site.metrics_text();
        if text.contains("fwpush_downloads_active 0\n") {
            Ok(())
        } else {
            Err(text)
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_file_that_is_cut_short_ends_its_downloads_and_not_the_server() {
    let mut scene = Scene::new(32 << 20).await;
    let other = scene.site.image("other.img", 3 << 20, 12);
    let other_id = scene.site.publish(&other, PRODUCT, "1.2.0").file_id;
    scene.connect_anew().await;
    let mut client = FileServiceClient::new(scene.channel.clone());
    let request = scene.request();
    let mut pulled = client.download_file(request).await.unwrap().into_inner();
    pulled.message().await.unwrap().unwrap();
    // The server waits for this client with a part of the file in hand.
    let stored = fs::File::options().write(true).open(scene.stored());
    stored.unwrap().set_len(0).unwrap();
    let lost = loop {
        match pulled.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the download ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!(lost.code(), Code::DataLoss, "{lost}");
    let line = scene.site.server().line_with("the stored file is damaged");
    assert!(line.contains(&scene.release.file_id), "{line}");

    let (code, _) = scene.refusal(scene.request()).await;
    assert_eq!(code, Code::DataLoss, "nothing of it is given any more");
    let request = FileRequest {
        file_id: other_id,
        ..Default::default()
    };
    let chunks = download(scene.channel.clone(), request).await.unwrap();
    assert!(content(&chunks) == fs::read(other).unwrap());

    // Publishing it again, with its image, makes it good.
    let manifest = scene.site.temp().join(format!("{PRODUCT}-1.1.0.json"));
    let image = scene.site.temp().join("image.img");
    let publish = ["release", "publish", manifest.to_str().unwrap(), "--image"];
    scene
        .site
        .fwpush(&[&publish[..], &[image.to_str().unwrap()]].concat())
        .ok();
    let chunks = download(scene.channel.clone(), scene.request())
        .await
        .unwrap();
    assert!(content(&chunks) == scene.image);
}
