//! What an operator may send at once: taken at its bound, refused one above it.

use fwpush_keys::{RolloutId, Timestamp};
use fwpush_proto::v1::{
    Action, Excluded, PublishTrustRequest, StartRolloutRequest, Target, UploadChunk,
};
use fwpush_tests::site::{PRODUCT, Site, random_bytes};
use prost::Message as _;
use tonic::Code;

const CHUNK: usize = 1 << 20;
const MESSAGE: usize = 2 << 20;
const IDS: usize = 10_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_sends_is_taken_at_each_bound_and_refused_above_it() {
    let site = Site::started();
    let release = site.publish(&site.image("image.img", 100_000, 1), PRODUCT, "1.1.0");
    let mut admin = site.admin().await;
    let mut seen = Vec::new();

    // A chunk, which is the whole of an upload.
    let image = random_bytes(CHUNK + 1, 2);
    for bytes in [CHUNK, CHUNK + 1] {
        let chunk = UploadChunk {
            file_id: blake3::hash(&image[..bytes]).to_string(),
            size: bytes as u64,
            offset: 0,
            content: image[..bytes].to_vec().into(),
        };
        let answer = admin.upload_file(tokio_stream::once(chunk)).await;
        let received = answer.map(|status| status.into_inner().received);
        seen.push(("a chunk", bytes, received));
    }
    // A message; this one is no envelope, whatever its size.
    for bytes in [MESSAGE, MESSAGE + 1] {
        // Before its content stand a tag and the length.
        let before = if bytes - 4 < 1 << 21 { 4 } else { 5 };
        let message = PublishTrustRequest {
            envelope: vec![b' '; bytes - before].into(),
        };
        assert_eq!(message.encoded_len(), bytes);
        let answer = admin.publish_trust(message).await;
        seen.push(("a message", bytes, answer.map(|_| 0)));
    }
    // Devices of a target, with the longest ids.
    for ids in [IDS, IDS + 1] {
        let request = StartRolloutRequest {
            release_id: release.release_id.clone(),
            target: Some(Target {
                all: false,
                device_ids: (0..ids).map(|n| format!("{n:064}")).collect(),
            }),
            rollout_id: RolloutId::new_v7(Timestamp::now()).to_string(),
            action: Action::Install.into(),
            ..StartRolloutRequest::default()
        };
        let answer = admin.preview_rollout(request.clone()).await;
        let left_out = |left: &Excluded| left.devices;
        let looked_at = answer.map(|preview| {
            let excluded = preview.into_inner().excluded;
            excluded.iter().map(left_out).sum()
        });
        seen.push(("a preview", ids, looked_at));
        if ids > IDS {
            let answer = admin.start_rollout(request).await;
            seen.push(("a target", ids, answer.map(|_| 0)));
        }
    }

    let too_many = "a target lists at most 10000 devices; use `all`";
    let expected = [
        ("a chunk", CHUNK, Ok(CHUNK as u64)),
        (
            "a chunk",
            CHUNK + 1,
            Err((Code::InvalidArgument, "a chunk has at most 1048576 bytes")),
        ),
        ("a message", MESSAGE, Err((Code::InvalidArgument, ""))),
        (
            "a message",
            MESSAGE + 1,
            Err((Code::OutOfRange, "decoded message length too large")),
        ),
        ("a preview", IDS, Ok(IDS as u64)),
        ("a preview", IDS + 1, Err((Code::InvalidArgument, too_many))),
        ("a target", IDS + 1, Err((Code::InvalidArgument, too_many))),
    ];
    for ((what, size, answer), (of, at, wanted)) in seen.iter().zip(&expected) {
        assert_eq!((what, size), (of, at));
        match (answer, wanted) {
            (Ok(taken), Ok(wanted)) => assert_eq!(taken, wanted, "{what} of {size}"),
            (Err(status), Err((code, words))) => assert!(
                status.code() == *code && status.message().contains(words),
                "{what} of {size}: {status:?}"
            ),
            _ => panic!("{what} of {size}: {answer:?}"),
        }
    }
    assert_eq!(seen.len(), expected.len());
}
