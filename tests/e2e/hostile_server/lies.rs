//! A server that lies about files: their size, their bytes, their end.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use futures::{StreamExt as _, stream};
use fwpush_proto::v1::{FileChunk, FileRequest, Part};
use fwpush_tests::hostile::Download;

use super::*;

/// Tells the device of a proper release and serves it badly; gives the code with which the device gives up or puts the
/// update off. Nothing but bytes of the image reaches the slot, and once it is served well it is installed.
async fn gives_up(
    serve: impl Fn(&Image, &FileRequest) -> Download + Send + Sync + 'static,
) -> String {
    let mut scene = Scene::new().await;
    let image = scene.image.clone();
    scene
        .server
        .serve(move |request| Ok(serve(&image, request)));
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest.clone());
    scene.session.generation = 1;
    scene.session.say(ToDevice::FileNotice(notice)).await;
    let failure = loop {
        let error = match scene.session.next().await.expect("the device stays") {
            FromDevice::NoticeReply(reply) => reply.reason,
            FromDevice::Report(report) => report.error,
            _ => None,
        };
        if let Some(error) = error {
            break error;
        }
    };
    let asked = scene.server.asked().len();
    assert!(asked < 20, "asked {asked} times");
    let written = scene
        .device
        .expect_nothing_foreign("b", &scene.image.content);
    let groups = scene.device.status()["groups_written"].as_u64().unwrap();
    assert_eq!(written.len() as u64, groups, "groups were written in vain");
    scene.device.expect_image("a", &[]);

    scene.server.serve(proper(&scene.image));
    let notice = scene.notice(Action::Install, 2, manifest);
    scene.expect_install(notice, "1.1.0").await;
    failure.code
}

/// The chunks of a proper answer, changed; the outline is served well.
fn content(
    image: &Image,
    request: &FileRequest,
    change: impl FnOnce(Vec<FileChunk>) -> Vec<FileChunk>,
) -> Download {
    let chunks = image.chunks(request);
    let chunks = match request.part() {
        Part::Content => change(chunks),
        Part::Outline => chunks,
    };
    Box::pin(stream::iter(chunks.into_iter().map(Ok)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_ends_before_its_signed_size_is_not_installed() {
    let code = gives_up(|image, request| {
        content(image, request, |mut chunks| {
            // Two groups and a half.
            let short = chunks[0].content.len().min(160_000);
            chunks.truncate(1);
            chunks[0].content.truncate(short);
            chunks[0].is_last = true;
            chunks
        })
    });
    assert_eq!(code.await, "FILE_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_just_ends_is_not_installed() {
    let code = gives_up(|image, request| content(image, request, |_| Vec::new()));
    assert_eq!(code.await, "FILE_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_another_place_are_not_written() {
    let code = gives_up(|image, request| {
        content(image, request, |mut chunks| {
            for chunk in &mut chunks {
                chunk.offset += 65_536;
            }
            chunks
        })
    });
    assert_eq!(code.await, "FILE_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_larger_than_the_rest_of_the_file_is_not_taken() {
    let code = gives_up(|image, request| {
        let wanted = request.length as usize;
        content(image, request, |mut chunks| {
            chunks[0].content = vec![7; wanted + 1].into();
            chunks
        })
    });
    assert_eq!(code.await, "FILE_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_chunks_do_not_keep_a_download_alive() {
    let code = gives_up(|image, request| {
        let (offset, part) = (request.offset, request.part());
        let empty = FileChunk {
            offset,
            ..FileChunk::default()
        };
        match part {
            Part::Content => Box::pin(stream::repeat_with(move || Ok(empty.clone()))),
            Part::Outline => image.answer(request),
        }
    });
    assert_eq!(code.await, "FILE_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_garbage_is_given_up_after_a_bounded_number_of_tries() {
    let code = gives_up(|image, request| match request.part() {
        Part::Outline => image.answer(request),
        Part::Content => endless(request.offset, Arc::default()),
    });
    assert_eq!(code.await, "GROUP_MISMATCH");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outline_of_another_file_is_refused_before_a_byte_of_content_is_fetched() {
    let code = gives_up(|image, request| match request.part() {
        Part::Outline => Image::new(filler("another image", image.content.len())).answer(request),
        Part::Content => panic!("content was asked for under a wrong outline"),
    });
    assert_eq!(code.await, "OUTLINE_MISMATCH");
}

/// Content and outline go on for ever; the device takes what the signed size says, and lets go of the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_beyond_the_signed_size_is_not_taken() {
    let mut scene = Scene::new().await;
    let (image, sent) = (scene.image.clone(), Arc::new(AtomicU64::new(0)));
    let beyond = sent.clone();
    scene.server.serve(move |request| {
        let mut chunks = image.chunks(request);
        for chunk in &mut chunks {
            chunk.is_last = false;
        }
        let end = image.part(request).len() as u64;
        let rest = endless(end, beyond.clone());
        Ok(Box::pin(
            stream::iter(chunks.into_iter().map(Ok)).chain(rest),
        ))
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.expect_install(notice, "1.1.0").await;
    scene.device.expect_image("b", &scene.image.content);
    // What fits into the windows and buffers of the two downloads, no more.
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent < 32 << 20, "{sent} bytes too many were sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn size_and_name_in_the_notice_decide_nothing() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    for (generation, size) in [(1, 0), (2, u64::MAX)] {
        let notice = FileNotice {
            file_size: size,
            file_name: "../../etc/passwd\0\u{1b}[2J".into(),
            ..scene.notice(Action::Install, generation, manifest.clone())
        };
        scene.expect_install(notice, "1.1.0").await;
    }
    scene.device.expect_image("b", &scene.image.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_the_manifest_does_not_name_is_refused() {
    for action in [Action::Install, Action::Rollback] {
        let mut scene = Scene::new().await;
        let manifest = scene.offline.sign(&scene.release(action));
        let other = blake3::hash(b"another file").to_string();
        let upper = scene.notice(action, 1, Bytes::new()).file_id.to_uppercase();
        let names = [other, upper, String::new(), "../../etc/passwd".into()];
        for (name, generation) in names.into_iter().zip(1..) {
            let notice = FileNotice {
                file_id: name,
                ..scene.notice(action, generation, manifest.clone())
            };
            expect_refusal(&mut scene, notice, "FILE_ID").await;
        }
    }
}

/// Bytes without end from `offset` on.
fn endless(offset: u64, sent: Arc<AtomicU64>) -> Download {
    let content = Bytes::from(vec![0x5a; 256 << 10]);
    let chunks = stream::iter(0..).map(move |sequence| {
        sent.fetch_add(content.len() as u64, Ordering::Relaxed);
        Ok(FileChunk {
            content: content.clone(),
            sequence,
            is_last: false,
            offset: offset + sequence * content.len() as u64,
        })
    });
    Box::pin(chunks)
}
