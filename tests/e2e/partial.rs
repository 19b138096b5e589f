//! Downloads that were cut off: what the slot holds is used where it is the image's, and nowhere else.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use fwpush_keys::GROUP_BYTES;
use fwpush_proto::v1::{Action, FileNotice, FileRequest, Part, server_message::Kind as ToDevice};
use fwpush_tests::{
    agent::table,
    hostile::{Download, Image, proper},
    scene::Scene,
};
use tonic::Status;

/// The image of a scene has four whole groups and a part of one.
const GROUPS: u64 = 5;

/// A scene whose device asks for chunks of a group.
async fn scene() -> Scene {
    Scene::with(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("chunk_bytes".into(), (GROUP_BYTES as i64).into());
        transfer.insert("stall_timeout_s".into(), 2.into());
        transfer.insert("group_timeout_s".into(), 4.into());
    })
    .await
}

/// Answers with the first `bytes` of the image and then with silence.
fn silent_after(image: &Image, bytes: usize, request: &FileRequest) -> Download {
    let mut left = bytes.saturating_sub(request.offset as usize);
    let mut chunks = Vec::new();
    for mut chunk in image.chunks(request) {
        if left == 0 {
            break;
        }
        let length = chunk.content.len().min(left);
        left -= length;
        chunk.content.truncate(length);
        chunk.is_last = false;
        chunks.push(Ok(chunk));
    }
    Box::pin(stream::iter(chunks).chain(stream::pending()))
}

fn ranges(scene: &Scene, of: &Image) -> Vec<(u64, u64)> {
    let id = blake3::hash(&of.content).to_string();
    let asked = scene.server.asked();
    asked
        .iter()
        .filter(|request| request.part() == Part::Content && request.file_id == id)
        .map(|request| (request.offset, request.length))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_stalls_before_its_last_kibibyte_goes_on_there() {
    let mut scene = scene().await;
    let (image, stalled) = (scene.image.clone(), AtomicBool::new(false));
    let all_but = image.content.len() - 1_024;
    scene.server.serve(move |request| {
        if request.part() == Part::Content && !stalled.swap(true, Ordering::Relaxed) {
            return Ok(silent_after(&image, all_but, request));
        }
        Ok(image.answer(request))
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    // The server never ends that call, and answers everything else: it is the agent that ends it and comes back.
    scene.expect_install(notice, "1.1.0").await;
    let asked = ranges(&scene, &scene.image);
    assert_eq!((asked.len(), asked[0].0), (2, 0), "{asked:?}");
    assert!(
        asked[1].0 >= (GROUPS - 1) * GROUP_BYTES,
        "asked again for what it had: {asked:?}"
    );
    assert_eq!(scene.device.status()["groups_written"], GROUPS);
}

/// Has three groups of the image written, then kills the agent; gives the notice of the release.
async fn cut_off_after_three_groups(scene: &mut Scene) -> FileNotice {
    let image = scene.image.clone();
    scene.server.serve(move |request| match request.part() {
        Part::Outline => Ok(image.answer(request)),
        Part::Content => Ok(silent_after(&image, 3 * GROUP_BYTES as usize, request)),
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.session.generation = 1;
    scene
        .session
        .say(ToDevice::FileNotice(notice.clone()))
        .await;
    scene.device.agent().line_after(
        0,
        "A group was written. event=\"transfer.group-written\" group=2",
    );
    scene.device.kill();
    notice
}

/// The agent goes on with a server that has the whole image. Gives the ranges that it asks for, and how many groups it writes.
async fn go_on(scene: &mut Scene, notice: FileNotice) -> (Vec<(u64, u64)>, u64) {
    let (asked, written) = (ranges(scene, &scene.image).len(), groups_written(scene));
    scene.server.serve(proper(&scene.image));
    scene.device.start();
    scene.session = scene.server.session().await;
    scene.expect_install(notice, "1.1.0").await;
    (
        ranges(scene, &scene.image).split_off(asked),
        groups_written(scene) - written,
    )
}

/// The slot that the update goes to, as somebody else may write it.
fn spare(scene: &Scene) -> File {
    let path = scene.device.slot_path("b");
    OpenOptions::new().write(true).open(path).unwrap()
}

fn groups_written(scene: &Scene) -> u64 {
    scene.device.status()["groups_written"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_partial_image_whose_slot_was_cut_off_the_rest_is_fetched_again() {
    // In the middle of a group, and before everything.
    for (left, whole) in [(GROUP_BYTES + 100, 1), (0, 0)] {
        let mut scene = scene().await;
        let notice = cut_off_after_three_groups(&mut scene).await;
        spare(&scene).set_len(left).unwrap();
        let (asked, written) = go_on(&mut scene, notice).await;
        let size = scene.image.content.len() as u64;
        let from = whole * GROUP_BYTES;
        assert_eq!(asked, [(from, size - from)], "{left} bytes left");
        assert_eq!(written, GROUPS - whole, "{left} bytes left");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partial_image_in_a_slot_that_grew_is_gone_on_with() {
    let mut scene = scene().await;
    let notice = cut_off_after_three_groups(&mut scene).await;
    let slot = spare(&scene);
    let end = slot.metadata().unwrap().len();
    slot.write_all_at(&[0xee; 100_000], end).unwrap();
    let (asked, written) = go_on(&mut scene, notice).await;
    let (from, size) = (3 * GROUP_BYTES, scene.image.content.len() as u64);
    assert_eq!(asked, [(from, size - from)]);
    assert_eq!(written, GROUPS - 3);
    let slot = scene.device.slot("b");
    assert!(slot[end as usize..].iter().all(|byte| *byte == 0xee));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_release_over_a_half_written_one_has_every_byte_of_its_own() {
    // While the agent runs, and over a restart.
    for restarted in [false, true] {
        let mut scene = scene().await;
        cut_off_after_three_groups(&mut scene).await;
        let old = scene.image.clone();
        // In each group that is there already, one byte is another.
        let mut newer = old.content.to_vec();
        for group in 0..3 {
            newer[group * GROUP_BYTES as usize + 1_000 * (group + 1)] ^= 1;
        }
        let newer = Image::new(newer);
        if !restarted {
            // It is in the middle of the old one again.
            let from = groups_written(&scene);
            assert_eq!(from, 3);
            scene.device.start();
            scene.session = scene.server.session().await;
        }
        scene.image = newer.clone();
        let (old_id, served) = (blake3::hash(&old.content).to_string(), newer.clone());
        scene.server.serve(move |request| {
            if request.file_id == old_id {
                return Ok(Box::pin(stream::pending::<Result<_, Status>>()));
            }
            Ok(served.answer(request))
        });
        if restarted {
            scene.device.start();
            scene.session = scene.server.session().await;
        }
        let release = scene.offline.release(&newer.content, "1.2.0");
        let notice = scene.notice(Action::Install, 2, scene.offline.sign(&release));
        scene.expect_install(notice, "1.2.0").await;
        scene
            .device
            .expect_image("b", &Bytes::clone(&newer.content));
        let asked = ranges(&scene, &newer);
        assert_eq!(asked[0].0, 0, "{asked:?}");
        assert_eq!(
            scene.device.status()["groups_written"],
            3 + GROUPS,
            "every group of the newer one was written"
        );
    }
}
