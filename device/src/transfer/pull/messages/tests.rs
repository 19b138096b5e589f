use std::{
    convert::Infallible,
    pin::pin,
    task::{Context, Poll, Waker},
};

use fwpush_proto::v1::FileChunk;
use http_body::Frame;
use http_body_util::StreamBody;
use proptest::prelude::*;

use super::*;

/// An answer of these frames, and trailers with this status.
fn answer(frames: Vec<Bytes>, status: Option<Code>) -> Response<Body> {
    let trailers = status.map(|code| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", (code as i32).into());
        Frame::trailers(trailers)
    });
    let frames = frames.into_iter().map(Frame::data);
    let frames: Vec<_> = frames.chain(trailers).map(Ok::<_, Infallible>).collect();
    Response::new(Body::new(StreamBody::new(tokio_stream::iter(frames))))
}

/// As gRPC has it: prefix and message.
fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    bytes
}

/// Cuts bytes into frames of these lengths, over and over.
fn cut(bytes: Vec<u8>, lengths: &[usize]) -> Vec<Bytes> {
    let mut bytes = Bytes::from(bytes);
    let mut frames = Vec::new();
    for length in lengths.iter().cycle() {
        if bytes.is_empty() {
            break;
        }
        frames.push(bytes.split_to((*length).min(bytes.len())));
    }
    frames
}

/// Everything that comes until the end, or until an error.
async fn read(answer: Response<Body>) -> (Vec<Chunk>, Result<(), PullError>) {
    let mut chunks = Vec::new();
    let mut messages = match Messages::of(answer) {
        Ok(messages) => messages,
        Err(error) => return (chunks, Err(error)),
    };
    loop {
        match messages.next().await {
            Ok(Some(chunk)) => chunks.push(chunk),
            Ok(None) => return (chunks, Ok(())),
            Err(error) => return (chunks, Err(error)),
        }
    }
}

/// As [`read`]. Nothing here waits for anything but its turn.
fn read_now(answer: Response<Body>) -> (Vec<Chunk>, Result<(), PullError>) {
    let mut reading = pin!(read(answer));
    loop {
        if let Poll::Ready(read) = reading
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            return read;
        }
    }
}

fn code_of(answer: Response<Body>) -> &'static str {
    read_now(answer).1.unwrap_err().code()
}

fn same(chunk: &Chunk, expected: &FileChunk) -> bool {
    let content: Vec<u8> = chunk.content.iter().flatten().copied().collect();
    content == expected.content
        && chunk.offset == expected.offset
        && chunk.is_last == expected.is_last
        && chunk.content.iter().all(|piece| !piece.is_empty())
}

prop_compose! {
    fn chunk()(size in prop_oneof![0usize..100, 0usize..200_000], seed: u8, sequence: u64, is_last: bool, offset: u64) -> FileChunk {
        let content: Vec<u8> = (0..size).map(|at| (at / 3) as u8 ^ seed).collect();
        FileChunk { content: content.into(), sequence, is_last, offset }
    }
}

/// The fields in another order, and one that is not known yet, as our server and a later one may send them.
fn reordered(chunk: &FileChunk) -> Vec<u8> {
    let field = |field: u32| {
        let mut only = FileChunk::default();
        match field {
            CONTENT => only.content = chunk.content.clone(),
            IS_LAST => only.is_last = chunk.is_last,
            OFFSET => only.offset = chunk.offset,
            _ => only.sequence = chunk.sequence,
        }
        only.encode_to_vec()
    };
    let mut bytes = [field(OFFSET), field(2), field(IS_LAST)].concat();
    prost::encoding::string::encode(1_000, &"later".to_owned(), &mut bytes);
    bytes.extend(field(CONTENT));
    bytes
}

proptest! {
    #[test]
    fn messages_come_out_as_they_were_whatever_frames_they_come_in(
        sent in prop::collection::vec((chunk(), any::<bool>()), 0..5),
        lengths in prop::collection::vec(prop_oneof![1usize..40, 1usize..70_000], 1..6),
    ) {
        let mut wire = Vec::new();
        for (chunk, reorder) in &sent {
            let message = if *reorder { reordered(chunk) } else { chunk.encode_to_vec() };
            wire.extend(framed(&message));
        }
        let (chunks, end) = read_now(answer(cut(wire, &lengths), Some(Code::Ok)));
        prop_assert!(end.is_ok());
        prop_assert_eq!(chunks.len(), sent.len());
        for (chunk, (expected, _)) in chunks.iter().zip(&sent) {
            prop_assert!(same(chunk, expected));
            // The end of one frame, the beginning of another, each whole one between them, and what is small before and after it.
            let whole = expected.content.len() / limits::SLICE_BYTES;
            prop_assert!(chunk.content.len() <= 3 + 2 * whole);
        }
    }

    #[test]
    fn what_generated_code_decodes_is_decoded_alike(
        // Bytes that look like our fields more often than chance has it.
        message in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(vec![8u8, 10, 16, 24, 32, 0, 1, 2])], 0..40),
        lengths in prop::collection::vec(1usize..10, 1..4),
    ) {
        let expected = FileChunk::decode(message.as_slice());
        let (chunks, end) = read_now(answer(cut(framed(&message), &lengths), Some(Code::Ok)));
        match expected {
            Ok(expected) => prop_assert!(end.is_ok() && same(&chunks[0], &expected)),
            // A sequence that is none is not looked at.
            Err(_) => prop_assert!(end.is_ok() || end.unwrap_err().code() == "FILE_STREAM"),
        }
    }
}

#[test]
fn content_that_comes_in_large_frames_is_not_copied() {
    let content = Bytes::from(vec![7; 100_000]);
    let whole = FileChunk {
        content: content.clone(),
        offset: 9,
        ..FileChunk::default()
    }
    .encode_to_vec();
    let wire = framed(&whole);
    let at = wire.windows(8).position(|bytes| bytes == [7; 8]).unwrap();
    let frames = vec![
        Bytes::from(wire[..at].to_vec()),
        content.slice(..30_000),
        content.slice(30_000..),
        Bytes::from(wire[at + content.len()..].to_vec()),
    ];
    let (chunks, end) = read_now(answer(frames, Some(Code::Ok)));
    end.unwrap();
    let at: Vec<_> = chunks[0]
        .content
        .iter()
        .map(|piece| piece.as_ptr())
        .collect();
    assert_eq!(at, [content.as_ptr(), content[30_000..].as_ptr()]);
    assert_eq!(chunks[0].offset, 9);
}

#[test]
fn content_comes_in_as_many_pieces_as_the_limit_says_at_most() {
    // In front of it and behind it a field that is not known, so that two frames are large of which little is content.
    let mut filler = Vec::new();
    let filler_text = "a".repeat(limits::SLICE_BYTES);
    prost::encoding::string::encode(1_000, &filler_text, &mut filler);
    let whole = 3;
    let content = vec![7; whole * limits::SLICE_BYTES + whole + 3];
    let chunk = FileChunk {
        content: content.clone().into(),
        ..FileChunk::default()
    };
    let message = [filler.clone(), chunk.encode_to_vec(), filler.clone()].concat();
    let wire = framed(&message);
    let first = wire.len() - filler.len() - content.len() + 1;
    let mut lengths = vec![first];
    for _ in 0..whole {
        lengths.extend([1, limits::SLICE_BYTES]);
    }
    lengths.extend([1, 1 + filler.len()]);
    assert_eq!(lengths.iter().sum::<usize>(), wire.len());
    let (chunks, end) = read_now(answer(cut(wire, &lengths), Some(Code::Ok)));
    end.unwrap();
    assert!(same(&chunks[0], &chunk));
    assert_eq!(chunks[0].content.len(), 3 + 2 * whole);
}

#[test]
fn a_message_in_the_smallest_frames_takes_little_more_than_its_bytes() {
    let mut slices = Slices::default();
    for _ in 0..limits::CHUNK_MESSAGE_BYTES {
        slices.push(Bytes::from_static(b"a"));
    }
    assert_eq!(
        (slices.large.len(), slices.remaining()),
        (0, limits::CHUNK_MESSAGE_BYTES)
    );
    assert!(slices.small.capacity() <= 2 * limits::CHUNK_MESSAGE_BYTES);
}

#[test]
fn a_message_of_the_greatest_length_is_taken_and_a_longer_one_refused_at_its_prefix() {
    let mut most = FileChunk {
        content: vec![7; limits::CHUNK_MESSAGE_BYTES - 4].into(),
        ..FileChunk::default()
    };
    assert_eq!(most.encoded_len(), limits::CHUNK_MESSAGE_BYTES);
    let (chunks, end) = read_now(answer(
        vec![framed(&most.encode_to_vec()).into()],
        Some(Code::Ok),
    ));
    assert!(end.is_ok() && same(&chunks[0], &most));
    most.is_last = true;
    let prefix = framed(&most.encode_to_vec())[..PREFIX_BYTES].to_vec();
    assert_eq!(code_of(answer(vec![prefix.into()], None)), "FILE_STREAM");
}

#[test]
fn what_is_no_message_is_refused() {
    let mut compressed = framed(&FileChunk::default().encode_to_vec());
    compressed[0] = 1;
    assert_eq!(
        code_of(answer(vec![compressed.into()], Some(Code::Ok))),
        "FILE_STREAM"
    );
    // Content that is longer than its message; a field of group 0; a length where a number belongs.
    for wrong in [&[10, 5, 1][..], &[2, 0], &[34, 0]] {
        assert_eq!(
            code_of(answer(vec![framed(wrong).into()], Some(Code::Ok))),
            "FILE_STREAM",
            "{wrong:?}"
        );
    }
}

#[test]
fn only_a_status_ends_a_call() {
    let message = Bytes::from(framed(
        &FileChunk {
            offset: 1,
            ..FileChunk::default()
        }
        .encode_to_vec(),
    ));
    // Cut: between two messages, within one, within a prefix.
    for cut in [message.len(), message.len() - 1, 3] {
        let (chunks, end) = read_now(answer(vec![message.slice(..cut)], None));
        assert_eq!(
            (chunks.len(), end.unwrap_err().code()),
            ((cut == message.len()).into(), "DOWNLOAD_CUT")
        );
    }
    let (chunks, end) = read_now(answer(vec![message.clone()], Some(Code::DataLoss)));
    assert_eq!((chunks.len(), end.unwrap_err().code()), (1, "FILE_DAMAGED"));
    // Over in its head already.
    for (status, code) in [
        ("5", "FILE_NOT_FOUND"),
        ("7", "FILE_DENIED"),
        ("14", "DOWNLOAD_CUT"),
    ] {
        let mut refused = answer(Vec::new(), None);
        refused
            .headers_mut()
            .insert("grpc-status", status.parse().unwrap());
        assert_eq!(code_of(refused), code);
    }
    let mut empty = answer(Vec::new(), None);
    empty
        .headers_mut()
        .insert("grpc-status", "0".parse().unwrap());
    assert!(read_now(empty).1.is_ok());
}

#[test]
fn an_answer_of_something_on_the_way_is_a_cut() {
    for status in [StatusCode::NOT_FOUND, StatusCode::BAD_GATEWAY] {
        let mut page = answer(vec![Bytes::from_static(b"<html>")], None);
        *page.status_mut() = status;
        assert_eq!(code_of(page), "DOWNLOAD_CUT");
    }
}
