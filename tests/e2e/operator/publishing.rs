//! What the server takes as a release and what it refuses; images on their way to it.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use fwpush_keys::{Component, FileId, Release, ReleaseId, SigningKey, Timestamp};
use fwpush_proto::v1::{
    GetUploadRequest, PublishReleaseRequest, UploadChunk, UploadStatus,
    admin_service_client::AdminServiceClient,
};
use fwpush_tests::{
    offline::{HOUR, Offline, signed},
    process::{Process, run},
    site::{HW, PRODUCT, Site, random_bytes},
    wait::{LONG, until},
};
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, copy},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use super::{expect_failure, expect_usage, text};

/// A site with one published release, and what is needed to make more.
struct Shop {
    site: Site,
    offline: Offline,
    image: PathBuf,
    /// The published one.
    first: Release,
    first_envelope: Bytes,
}

impl Shop {
    fn open() -> Self {
        let site = Site::started();
        let offline = Offline::of(&site);
        let content = random_bytes(100_000, 1);
        let image = site.image("fw.img", content.len(), 1);
        let first = offline.release(&content, "1.1.0");
        let first_envelope = offline.sign(&first);
        let shop = Self {
            site,
            offline,
            image,
            first,
            first_envelope,
        };
        let published = shop.publish(&shop.first_envelope).ok().json();
        assert_eq!(
            text(&published, "release_id"),
            shop.first.release_id.to_string()
        );
        shop
    }

    /// Another release of the same image: all that is needed for it to be published.
    fn another(&self) -> Release {
        let mut release = self.first.clone();
        release.release_id = ReleaseId::new_v7(Timestamp::now());
        release.version = "1.2.0".parse().unwrap();
        release.seq += 1;
        release
    }

    fn publish(&self, envelope: &[u8]) -> fwpush_tests::process::Finished {
        let file = tempfile::NamedTempFile::new_in(self.site.temp()).unwrap();
        fs::write(file.path(), envelope).unwrap();
        let (file, image) = (file.path().to_str().unwrap(), self.image.to_str().unwrap());
        self.site
            .fwpush(&["release", "publish", file, "--image", image, "--json"])
    }

    fn count(&self) -> usize {
        let list = self.site.fwpush(&["release", "list", "--json"]).ok().json();
        list["releases"].as_array().unwrap().len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_a_proper_release_is_refused_in_words_by_command_and_server() {
    let shop = Shop::open();
    let now = Timestamp::now();
    let make = |change: &dyn Fn(&mut Release)| {
        let mut release = shop.another();
        change(&mut release);
        shop.offline.sign(&release)
    };
    let foreign = [SigningKey::generate()];
    let envelope = || shop.another().to_envelope().unwrap();
    let cases: Vec<(&str, Bytes, &str)> = vec![
        ("unsigned", signed(envelope(), &[]), "signature"),
        (
            "signed by a stranger",
            signed(envelope(), &foreign),
            "signature",
        ),
        (
            "signed by root keys",
            signed(envelope(), &shop.offline.root_keys),
            "signature",
        ),
        (
            "expired",
            make(&|release| release.expires = now.saturating_sub(HOUR)),
            "expired",
        ),
        (
            "issued in the future",
            make(&|release| {
                release.issued = now.saturating_add(HOUR * 24 * 2);
                release.expires = now.saturating_add(HOUR * 24 * 9);
            }),
            "in the future",
        ),
        (
            "unknown product",
            make(&|release| release.product = "toaster".parse().unwrap()),
            "toaster",
        ),
        (
            "over max_counter",
            make(&|release| release.security_counter = 1_000_000_000),
            "counter",
        ),
        ("older seq", make(&|release| release.seq -= 2), "newest"),
        ("the same seq", make(&|release| release.seq -= 1), "seq"),
        (
            "the same version",
            make(&|release| release.version = shop.first.version.clone()),
            "version 1.1.0 is taken",
        ),
        (
            "the same id",
            make(&|release| release.release_id = shop.first.release_id),
            "other content",
        ),
    ];
    let mut admin = shop.site.admin().await;
    // All of them, so that it is seen which are not refused.
    let mut wrong = Vec::new();
    for (what, envelope, why) in cases {
        let done = shop.publish(&envelope);
        let told = done.stderr.contains("next: ") && done.stderr.contains(why);
        if done.code != 1 || !told {
            wrong.push(format!("{what}, by the command: {done:?}"));
        }
        let request = PublishReleaseRequest {
            envelope,
            file_name: "fw.img".into(),
        };
        let Err(status) = admin.publish_release(request).await else {
            wrong.push(format!("{what}: published"));
            continue;
        };
        let told = status.message().contains(why) && status.metadata().contains_key("fwpush-next");
        let code = matches!(
            status.code(),
            Code::PermissionDenied
                | Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::AlreadyExists
        );
        if !told || !code {
            wrong.push(format!("{what}, by the server: {status:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Names that would do harm in a device's file system or on its terminal.
    let long = "x".repeat(256);
    for name in ["", ".", "..", "a/b", "a\\b", "a\nb", "\u{1b}[2J", &long] {
        let request = PublishReleaseRequest {
            envelope: make(&|_| ()),
            file_name: name.into(),
        };
        let status = admin.publish_release(request).await.expect_err(name);
        assert!(status.message().contains("the file name is"), "{status:?}");
    }
    assert_eq!(shop.count(), 1, "something of it was published");

    // The same bytes again are no error and no second release; a proper release still goes through.
    let again = shop.publish(&shop.first_envelope).ok().json();
    assert_eq!(
        text(&again, "release_id"),
        shop.first.release_id.to_string()
    );
    assert_eq!(shop.count(), 1);
    shop.publish(&shop.offline.sign(&shop.another())).ok();
    assert_eq!(shop.count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_whose_image_never_came_is_not_published() {
    let shop = Shop::open();
    let mut release = shop.another();
    let content = random_bytes(5_000, 2);
    let digest = Sha256::digest(&content).into();
    release.components = vec![Component::plain(
        "system",
        5_000,
        FileId::of(&content),
        digest,
    )];
    let envelope = shop.offline.sign(&release);
    // The command looks at the image that it is given, and the server at what it has.
    expect_failure(
        &shop.publish(&envelope),
        "not the image that the manifest names",
    );
    let request = PublishReleaseRequest {
        envelope,
        file_name: "fw.img".into(),
    };
    let status = shop
        .site
        .admin()
        .await
        .publish_release(request)
        .await
        .unwrap_err();
    assert!(status.message().contains("was not uploaded"), "{status:?}");
}

#[test]
fn an_image_that_is_still_being_written_is_refused() {
    let site = Site::new();
    let image = site.image("fw.img", 16 << 20, 1);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (image, stop) = (image.clone(), stop.clone());
        move || {
            let mut file = fs::OpenOptions::new().append(true).open(image).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b".").unwrap();
                thread::sleep(Duration::from_micros(100));
            }
        }
    });
    let out = site.temp().join("gw.json");
    let args = [
        "release",
        "build",
        image.to_str().unwrap(),
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
    ];
    let args = [&args[..], &["--hw", HW, "--out", out.to_str().unwrap()]].concat();
    let refused = site.fwpush(&args);
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    expect_failure(&refused, "changed while it was read");
    assert!(refused.stderr.contains("next:"), "{refused:?}");
    assert!(!out.exists());
    site.fwpush(&args).ok();
}

/// Relays one connection to `server` and stops reading from the client after `bytes`, keeping everything open until the
/// task is aborted.
async fn clogged_relay(server: SocketAddr, bytes: u64) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let relay = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let upstream = TcpStream::connect(server).await.unwrap();
        let (from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = upstream.into_split();
        let mut some = from_client.take(bytes);
        let forward = async {
            let _ = copy(&mut some, &mut to_server).await;
            std::future::pending::<()>().await;
        };
        let _ = tokio::join!(forward, copy(&mut from_server, &mut to_client));
    });
    (address, relay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_line_died_unnoticed_goes_on_at_once_where_it_stopped() {
    let site = Site::started();
    let size = 8 << 20;
    let image = site.image("fw.img", size, 3);
    let file_id = blake3::hash(&fs::read(&image).unwrap()).to_string();
    let publish = |name: &str| {
        let image = image.to_str().unwrap();
        let args = [
            "release",
            image,
            "--product",
            PRODUCT,
            "--version",
            name,
            "--hw",
            HW,
        ];
        [&args[..], &["--to", "all", "--yes", "--detach"]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };

    // Half of it reaches the server, then the line is clogged and the command killed.
    let (address, relay) = clogged_relay(site.operators, size as u64 / 2).await;
    let config = site.dir().join("operator/fwpush.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace(&site.operators.to_string(), &address.to_string()),
    )
    .unwrap();
    let args = publish("1.1.0");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut killed = Process::spawn(site.fwpush_raw(&args));
    let admin = site.admin().await;
    until("the first half", || {
        let request = GetUploadRequest {
            file_id: file_id.clone(),
            size: size as u64,
        };
        let mut admin = admin.clone();
        async move {
            let standing = admin.get_upload(request).await.unwrap().into_inner();
            assert!(
                !standing.complete,
                "all of it went through the clogged line"
            );
            // Every whole chunk of 256 KiB that went through; what TLS and HTTP/2 add to them is less than one, and more than nothing.
            if standing.received + (256 << 10) >= size as u64 / 2 {
                Ok(())
            } else {
                Err(standing.received)
            }
        }
    })
    .await;
    killed.signal(Signal::KILL);
    killed.wait();
    // The server does not know yet: for it the line is open, and the upload under way.
    fs::write(&config, text).unwrap();

    let sent = |metrics: String| {
        let lines = metrics.lines().map(str::to_owned).collect::<Vec<_>>();
        let line = lines
            .iter()
            .find(|line| line.starts_with("fwpush_upload_bytes_total"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let done = run(site.fwpush_raw(&args)).ok();
    relay.abort();
    let (all, rest) = (sent(site.metrics_text()), size as u64);
    assert!(
        all <= rest + (1 << 20),
        "{all} bytes were sent of an image of {rest}"
    );
    assert!(done.stdout.contains("has started"), "{done:?}");
    let stored = site
        .dir()
        .join("server/data/files")
        .join(&file_id[..2])
        .join(&file_id);
    assert!(
        fs::read(stored).unwrap() == fs::read(&image).unwrap(),
        "the server's copy is another"
    );
}

/// Opens an upload that brings `content` and says nothing more for as long as the sender lives.
fn upload(
    admin: &AdminServiceClient<Channel>,
    content: &[u8],
    size: u64,
) -> (
    mpsc::Sender<UploadChunk>,
    JoinHandle<Result<UploadStatus, Status>>,
) {
    let (send, chunks) = mpsc::channel(1);
    let chunk = UploadChunk {
        file_id: FileId::of(content).to_string(),
        size,
        offset: 0,
        content: Bytes::copy_from_slice(content),
    };
    send.try_send(chunk).unwrap();
    let mut admin = admin.clone();
    let call = tokio::spawn(async move {
        let answer = admin.upload_file(ReceiverStream::new(chunks)).await;
        answer.map(tonic::Response::into_inner)
    });
    (send, call)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_that_stall_hold_their_places_for_a_minute_and_no_longer() {
    let site = Site::started();
    let admin = site.admin().await;
    let stalled: Vec<_> = (0..4_u8).map(|n| upload(&admin, &[n; 100], 200)).collect();
    until("all places taken", || {
        let mut admin = admin.clone();
        async move {
            let mut received = Vec::new();
            for n in 0..4_u8 {
                let file_id = FileId::of(&[n; 100]).to_string();
                let request = GetUploadRequest { file_id, size: 200 };
                received.push(
                    admin
                        .get_upload(request)
                        .await
                        .unwrap()
                        .into_inner()
                        .received,
                );
            }
            if received == [100; 4] {
                Ok(())
            } else {
                Err(received)
            }
        }
    })
    .await;
    let (_send, refused) = upload(&admin, b"whole", 5);
    let refused = refused.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().contains_key("retry-after-ms"));
    for (_send, call) in stalled {
        let ended = timeout(LONG, call).await.expect("it ends").unwrap();
        assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
    }
    let (send, call) = upload(&admin, b"whole", 5);
    drop(send);
    assert!(call.await.unwrap().unwrap().complete);
}

#[test]
fn a_release_command_that_was_cut_off_goes_on_when_it_is_repeated() {
    let site = Site::started();
    let image = site.image("fw.img", 100_000, 5);
    let release = |image: &PathBuf, more: &[&str]| {
        let more = [&["--to", "dev-1", "--detach", "--json"], more].concat();
        site.release_with(image, "1.1.0", &more)
    };
    let count = |what: &str| {
        let list = site.fwpush(&[what, "list", "--json"]).ok().json();
        list[format!("{what}s")].as_array().unwrap().len()
    };
    // Published, and then it ends: there is no such device yet.
    expect_failure(&release(&image, &[]), "no rollout was started");
    assert_eq!((count("release"), count("rollout")), (1, 0));
    site.add_device("dev-1");
    let first = release(&image, &[]).ok();
    assert!(first.stderr.contains("published already"), "{first:?}");
    // Cut off later: neither a release nor a rollout is made twice.
    let again = release(&image, &[]).ok();
    assert!(again.stderr.contains("was started before"), "{again:?}");
    for id in ["release_id", "rollout_id"] {
        assert_eq!(text(&first.json(), id), text(&again.json(), id), "{id}");
    }
    assert_eq!((count("release"), count("rollout")), (1, 1));

    // It is not the same command with another image, or where it says something else of it.
    let other = site.image("other.img", 100_000, 6);
    expect_failure(&release(&other, &[]), "with other content");
    for more in [
        ["--from-min", "1.0.0"],
        ["--seq", "7"],
        ["--security-counter", "7"],
        ["--expires", "30d"],
        ["--class", "security"],
    ] {
        expect_failure(&release(&image, &more), "with other content");
    }
    assert_eq!((count("release"), count("rollout")), (1, 1));

    // A rollout that an operator stopped does not go on by itself.
    let id = text(&first.json(), "rollout_id").to_owned();
    site.fwpush(&["rollout", "abort", &id, "--yes"]).ok();
    let refused = release(&image, &[]);
    expect_failure(&refused, "is aborted");
    assert!(
        refused.stderr.contains("fwpush rollout start"),
        "{refused:?}"
    );
    assert_eq!(count("rollout"), 1);
    // To other devices it is another rollout.
    site.add_device("dev-2");
    site.release_with(&image, "1.1.0", &["--to", "dev-2", "--detach"])
        .ok();
    assert_eq!((count("release"), count("rollout")), (1, 2));
}

#[test]
fn names_that_would_steer_a_terminal_or_look_like_options_do_no_harm() {
    let site = Site::started();
    let image = site.image("-rf\n\u{1b}[2J\u{202e}.img", 10_000, 1);
    let release = site.release(&image, "1.1.0").ok();
    let list = site.fwpush(&["release", "list", "--json"]).ok();
    let show = site.fwpush(&["release", "list"]).ok();
    for done in [&release, &list, &show] {
        assert!(
            !done.stdout.contains('\u{1b}') && !done.stderr.contains('\u{1b}'),
            "{done:?}"
        );
    }
    let name = list.json()["releases"][0]["file_name"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(!name.contains(['\n', '\u{1b}', '/']), "{name:?}");

    // A name that begins with a hyphen is an option unless it is set apart.
    expect_usage(&site.fwpush(&["device", "show", "-rf"]), "-r");
    let out = site.temp().join("rf");
    let add = [
        "device",
        "add",
        "--product",
        PRODUCT,
        "--hw",
        HW,
        "--out",
        out.to_str().unwrap(),
    ];
    site.fwpush(&[&add[..], &["--", "-rf"]].concat()).ok();
    site.fwpush(&["device", "show", "--", "-rf"]).ok();

    // Names of devices, products and versions are checked before anything else; what is printed of them is harmless.
    for bad in [
        "a\nb",
        "\u{1b}[31mred",
        "..",
        "a/b",
        "",
        "x y",
        "\u{202e}gw",
    ] {
        for args in [
            vec!["device", "show", "--", bad],
            vec!["device", "list", "--product", bad],
            vec!["device", "block", "--", bad],
        ] {
            let done = site.fwpush(&args);
            expect_usage(&done, "error:");
            let raw = |text: &str| text.contains(['\u{1b}', '\u{202e}']);
            assert!(!raw(&done.stderr) && !raw(&done.stdout), "{done:?}");
        }
    }

    // Words that an operator wrote come back as they were, but harmless.
    let reason = "lost\n\u{1b}[2Jnothing here";
    site.fwpush(&["device", "block", "--reason", reason, "--", "-rf"])
        .ok();
    let shown = site.fwpush(&["device", "show", "--", "-rf"]).ok();
    assert!(shown.stdout.contains("nothing here"), "{shown:?}");
    assert!(!shown.stdout.contains('\u{1b}'), "{shown:?}");
    let json = site.fwpush(&["device", "show", "--json", "--", "-rf"]).ok();
    assert!(!json.stdout.contains('\u{1b}'), "{json:?}");
}
