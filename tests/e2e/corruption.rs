//! A flipped byte on the server's disk, in the outline, on the wire, in the slot: found within its group, named, and nothing
//! of it reaches the slot. See invariant 5 of ARCHITECTURE.md.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use futures::stream;
use fwpush_keys::GROUP_BYTES;
use fwpush_proto::v1::{
    Action, FileChunk, FileRequest, Part, Phase, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use fwpush_tests::{
    agent::{Device, filler, table},
    hostile::{Download, Image, proper},
    scene::Scene,
    site::Site,
};
use serde_json::Value;
use tonic::Status;

const GROUP: usize = GROUP_BYTES as usize;
/// Forty groups and a bit of one.
const IMAGE_BYTES: usize = 40 * GROUP + 1_000;

/// A real server with a published release, and a device that has not come yet.
struct Published {
    site: Site,
    device: Device,
    image: Vec<u8>,
    release_id: String,
    /// The image in the server's store.
    stored: PathBuf,
}

impl Published {
    fn new() -> Self {
        let site = Site::started();
        let device = Device::add(&site, "dev-1", 4 << 20);
        let image = filler("an image", IMAGE_BYTES);
        let path = site.temp().join("image");
        fs::write(&path, &image).unwrap();
        let released = site.release_with(&path, "1.1.0", &["--detach", "--json"]);
        let released = released.ok().json();
        let id = blake3::hash(&image).to_string();
        let stored = site
            .dir()
            .join("server/data/files")
            .join(&id[..2])
            .join(&id);
        assert!(fs::read(&stored).unwrap() == image);
        Self {
            site,
            device,
            image,
            release_id: released["release"]["release_id"]
                .as_str()
                .unwrap()
                .to_owned(),
            stored,
        }
    }

    fn outline(&self) -> PathBuf {
        self.stored.with_extension("outline")
    }

    /// How the newest update of the device ended, as the server has it.
    fn update(&self) -> Value {
        self.site.device("dev-1")["updates"][0].clone()
    }

    /// Waits until the device says that the update has failed; gives its line.
    fn failure(&mut self) -> String {
        let line = self.device.agent().line_with("The update ended.");
        assert!(line.contains("phase=FAILED"), "{line}");
        line
    }

    /// Offers the release again and expects it to be installed.
    fn expect_install(&mut self) {
        let start = [
            "rollout",
            "start",
            "--release",
            &self.release_id,
            "--to",
            "all",
            "--yes",
        ];
        self.site.fwpush(&start).ok();
        let status = self.device.status();
        assert_eq!(status["version"], "1.1.0", "{status}");
        assert_eq!(status["slot"], "b", "{status}");
        self.device.expect_image("b", &self.image);
        self.device.expect_image("a", &[]);
    }
}

/// Flips a bit in place; done twice it is as before.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn a_flipped_byte_in_a_stored_file_is_found_within_its_group() {
    let mut published = Published::new();
    let at = 17 * GROUP_BYTES + 4_711;
    flip(&published.stored, at);
    published.device.start();
    let line = published.failure();
    let words = "group 17 (bytes 1114112 to 1179648) does not match the signed outline";
    assert!(
        line.contains("GROUP_MISMATCH") && line.contains(words),
        "{line}"
    );
    let written = published
        .device
        .expect_nothing_foreign("b", &published.image);
    assert_eq!(
        written,
        Vec::from_iter(0..17),
        "all before it, nothing from it on"
    );
    assert_eq!(published.device.status()["groups_written"], 17);

    // The server was told, in the same words.
    let update = told(&published, "FAILED");
    assert_eq!(update["error"]["code"], "GROUP_MISMATCH", "{update}");
    assert!(
        update["error"]["message"].as_str().unwrap().contains(words),
        "{update}"
    );

    // Once the file is repaired the rest is fetched, and only the rest.
    flip(&published.stored, at);
    published.expect_install();
    assert_eq!(published.device.status()["groups_written"], 41);
}

#[test]
fn a_flipped_byte_in_a_stored_outline_is_found_before_anything_is_written() {
    let mut published = Published::new();
    let outline = published.outline();
    flip(&outline, 17 * 32 + 5);
    published.device.start();
    let line = published.failure();
    assert!(line.contains("OUTLINE_MISMATCH"), "{line}");
    published.device.expect_image("b", &[]);
    assert_eq!(published.device.status()["groups_written"], 0);
    let update = told(&published, "FAILED");
    assert_eq!(update["error"]["code"], "OUTLINE_MISMATCH", "{update}");

    flip(&outline, 17 * 32 + 5);
    published.expect_install();
}

#[test]
fn a_stored_file_that_lost_its_end_is_noticed_and_harms_nobody() {
    let mut published = Published::new();
    // As a crash of the machine may leave it.
    published.site.stop_server();
    let file = OpenOptions::new()
        .write(true)
        .open(&published.stored)
        .unwrap();
    file.set_len(20 * GROUP_BYTES + 100).unwrap();
    published.site.start();
    published.device.start();
    published.device.agent().line_with("phase=DEFERRED");
    let written = published
        .device
        .expect_nothing_foreign("b", &published.image);
    assert!(written.is_empty(), "a file that is not whole is not begun");

    let line = published.site.server().line_with("is damaged");
    let name = published.stored.file_name().unwrap().to_str().unwrap();
    assert!(line.contains(name), "{line}");
    assert!(published.site.server().runs());
    published.site.stop_server();
    fs::write(&published.stored, &published.image).unwrap();
    published.site.start();
    published.expect_install();
}

/// The newest update once the server knows that it is in this phase.
fn told(published: &Published, phase: &str) -> Value {
    let start = std::time::Instant::now();
    loop {
        let update = published.update();
        if update["phase"] == phase {
            return update;
        }
        let waited = start.elapsed();
        assert!(waited < fwpush_tests::wait::LONG, "{update} is not {phase}");
    }
}

// ---- On the wire ----

/// The proper answer with one byte of the file flipped, in as many answers as `times` says.
fn flipping(
    image: &Image,
    at: usize,
    times: u32,
) -> impl Fn(&FileRequest) -> Result<Download, Status> + Send + Sync + 'static {
    let (image, left) = (image.clone(), AtomicU32::new(times));
    move |request| {
        let mut chunks = image.chunks(request);
        let hit = |chunk: &&mut FileChunk| {
            let start = chunk.offset as usize;
            (start..start + chunk.content.len()).contains(&at)
        };
        if request.part() == Part::Content
            && let Some(chunk) = chunks.iter_mut().find(hit)
            && left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
        {
            let mut content = chunk.content.to_vec();
            content[at - chunk.offset as usize] ^= 1;
            chunk.content = content.into();
        }
        Ok(Box::pin(stream::iter(chunks.into_iter().map(Ok))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_flipped_on_the_wire_costs_its_group_and_no_more() {
    let mut scene = Scene::new().await;
    scene.server.serve(flipping(&scene.image, 3 * GROUP - 1, 1));
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.expect_install(notice, "1.1.0").await;
    let line = scene.device.agent().line_with("A group was refused.");
    assert!(line.contains("group=2"), "{line}");
    scene.device.expect_image("b", &scene.image.content);
    assert_eq!(
        scene.device.status()["groups_written"],
        5,
        "each group was written once"
    );
    // From the bad group on, nothing before it.
    let offsets: Vec<u64> = content_of(&scene)
        .iter()
        .map(|request| request.offset)
        .collect();
    assert_eq!(offsets, [0, 2 * GROUP_BYTES]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_never_has_the_right_bytes_is_given_up_and_the_group_is_named() {
    let mut scene = Scene::new().await;
    scene
        .server
        .serve(flipping(&scene.image, 4 * GROUP + 100, u32::MAX));
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest.clone());
    let report = scene
        .server
        .see_through(&mut scene.session, notice)
        .await
        .unwrap();
    assert_eq!(report.phase(), Phase::Failed);
    let error = report.error.unwrap();
    assert_eq!(error.code, "GROUP_MISMATCH");
    // The last group, which is not a whole one.
    assert!(
        error.message.contains("group 4 (bytes 262144 to 300000)"),
        "{}",
        error.message
    );
    let written = scene
        .device
        .expect_nothing_foreign("b", &scene.image.content);
    assert_eq!(written, [0, 1, 2, 3]);
    assert!(content_of(&scene).len() <= 8, "it went on asking");

    scene.server.serve(proper(&scene.image));
    let notice = scene.notice(Action::Install, 2, manifest);
    scene.expect_install(notice, "1.1.0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn right_groups_in_the_wrong_order_are_not_written() {
    let mut scene = Scene::new().await;
    let mut swapped = scene.image.content.to_vec();
    let (first, second) = swapped.split_at_mut(GROUP);
    first.swap_with_slice(&mut second[..GROUP]);
    let swapped = Image {
        content: swapped.into(),
        outline: scene.image.outline.clone(),
    };
    scene.server.serve(proper(&swapped));
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    let report = scene
        .server
        .see_through(&mut scene.session, notice)
        .await
        .unwrap();
    assert_eq!(report.error.unwrap().code, "GROUP_MISMATCH");
    assert!(
        scene
            .device
            .expect_nothing_foreign("b", &scene.image.content)
            .is_empty()
    );
}

fn content_of(scene: &Scene) -> Vec<FileRequest> {
    let mut asked = scene.server.asked();
    asked.retain(|request| request.part() == Part::Content);
    asked
}

// ---- In the slot ----

/// CVE-2020-25860: what was verified is not what is installed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_change_between_verification_and_trial_are_found_before_the_trial() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest.clone());
    let ack = scene.until_verified(notice).await;
    let record = scene.device.storage().boot_record;
    flip(&scene.device.slot_path("b"), 2 * GROUP_BYTES + 7);
    scene.session.acknowledge(ack.seq, 1).await;
    let deferred = |kind: &FromDevice| matches!(kind, FromDevice::NoticeReply(reply) if reply.reason.is_some());
    let FromDevice::NoticeReply(reply) = scene.session.until(deferred).await else {
        unreachable!()
    };
    assert_eq!(reply.reason.unwrap().code, "READ_BACK_MISMATCH");
    assert!(
        scene.device.storage().boot_record == record,
        "the trial was marked"
    );

    scene.session.acknowledges = true;
    let notice = scene.notice(Action::Install, 2, manifest);
    scene.expect_install(notice, "1.1.0").await;
    scene.device.expect_image("b", &scene.image.content);
    assert_eq!(
        scene.device.status()["groups_written"],
        6,
        "five groups, and one of them again"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_rots_while_the_device_is_off_is_fetched_again() {
    let mut scene = Scene::with(|config| {
        table(config, "transfer").insert("chunk_bytes".into(), (GROUP as i64).into());
    })
    .await;
    // Three groups arrive, then nothing more.
    let image = scene.image.clone();
    scene.server.serve(move |request| {
        let mut chunks = image.chunks(request);
        if request.part() == Part::Outline {
            return Ok(Box::pin(stream::iter(chunks.into_iter().map(Ok))));
        }
        chunks.truncate(3);
        let rest = stream::pending();
        Ok(Box::pin(futures::StreamExt::chain(
            stream::iter(chunks.into_iter().map(Ok)),
            rest,
        )))
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.session.generation = 1;
    scene
        .session
        .say(ToDevice::FileNotice(notice.clone()))
        .await;
    let device = scene.device.agent();
    let (third, _) = device.line_after(
        0,
        "A group was written. event=\"transfer.group-written\" group=2",
    );
    assert!(third > 0);
    scene.device.kill();
    flip(&scene.device.slot_path("b"), GROUP_BYTES + 9);

    let asked: Arc<[FileRequest]> = content_of(&scene).into();
    scene.server.serve(proper(&scene.image));
    scene.device.start();
    scene.session = scene.server.session().await;
    scene.expect_install(notice, "1.1.0").await;
    let ranges: Vec<(u64, u64)> = content_of(&scene)[asked.len()..]
        .iter()
        .map(|request| (request.offset, request.length))
        .collect();
    let rest = scene.image.content.len() as u64 - 3 * GROUP_BYTES;
    assert_eq!(
        ranges,
        [(GROUP_BYTES, GROUP_BYTES), (3 * GROUP_BYTES, rest)]
    );
    scene
        .device
        .expect_image("b", &Bytes::clone(&scene.image.content));
}
