//! The encoded-once download: gRPC frames whose content is a slice of the mapped file.
//!
//! Each message is a prepared header (5 bytes of gRPC prefix, the small fields, tag and length of `content`) followed by
//! the slice itself, so a thousand devices share one page cache and nothing is serialised per chunk. On the wire it is
//! the plain `FileChunk` of `file_transfer.proto`; a test decodes it with the generated type.

use std::{
    ops,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use tokio_util::sync::DropGuard;
use tonic::Code;

use crate::{
    files::{Damaged, Mapped},
    limits,
};

// Field numbers of FileChunk, as tags (field << 3 | wire type).
const TAG_CONTENT: u8 = 1 << 3 | 2;
const TAG_SEQUENCE: u8 = 2 << 3;
const TAG_IS_LAST: u8 = 3 << 3;
const TAG_OFFSET: u8 = 4 << 3;

/// gRPC prefix (5) and, at most, three fields with 10-byte varints and the content's tag and length.
const HEADER_BYTES: usize = 5 + 11 + 2 + 11 + 11;

/// What part of a file is wanted; only [`Range::of`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    bytes: ops::Range<usize>,
    chunk: usize,
}

impl Range {
    /// `length` 0 means to the end; a longer one ends at the end. `max_chunk` is clamped. `None`: `offset` past the end.
    pub fn of(size: usize, offset: u64, length: u64, max_chunk: u32) -> Option<Self> {
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| *start <= size)?;
        let rest = size - start;
        let length = match usize::try_from(length) {
            Ok(0) | Err(_) => rest,
            Ok(length) => length.min(rest),
        };
        let chunk = match max_chunk as usize {
            0 => limits::CHUNK_DEFAULT_BYTES,
            asked => asked.clamp(limits::CHUNK_MIN_BYTES, limits::CHUNK_MAX_BYTES),
        };
        Some(Self {
            bytes: start..start + length,
            chunk,
        })
    }
}

/// The response body of one download.
#[derive(Debug)]
pub struct DownloadBody<Guard> {
    file: Mapped,
    range: Range,
    sequence: u64,
    /// Content whose header was just handed out.
    pending: Bytes,
    state: State,
    /// Bytes handed out so far; the watchdog looks whether it still moves.
    progress: Arc<AtomicU64>,
    _guards: (Guard, DropGuard),
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Chunks,
    /// Every chunk was handed out.
    Trailers,
    Done,
}

impl<Guard> DownloadBody<Guard> {
    /// `guard` is held until the body is dropped; `ended` is cancelled then.
    pub fn new(
        file: Mapped,
        range: Range,
        progress: Arc<AtomicU64>,
        guard: Guard,
        ended: DropGuard,
    ) -> Self {
        Self {
            file,
            range,
            sequence: 0,
            pending: Bytes::new(),
            state: State::Chunks,
            progress,
            _guards: (guard, ended),
        }
    }

    /// The header of the next chunk, whose content is then pending.
    fn next_header(&mut self) -> Result<Bytes, Damaged> {
        let offset = self.range.bytes.start;
        let end = self.range.bytes.end.min(offset + self.range.chunk);
        let is_last = end == self.range.bytes.end;
        self.pending = self.file.slice(offset..end)?;
        self.range.bytes.start = end;
        if is_last {
            self.state = State::Trailers;
        }
        let header = encode_header(self.sequence, is_last, offset as u64, self.pending.len());
        self.sequence += 1;
        Ok(header)
    }
}

impl<Guard: Unpin> Body for DownloadBody<Guard> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if !self.pending.is_empty() {
            let content = std::mem::take(&mut self.pending);
            self.progress
                .fetch_add(content.len() as u64, Ordering::Relaxed);
            return Poll::Ready(Some(Ok(Frame::data(content))));
        }
        let code = match self.state {
            State::Chunks => match self.next_header() {
                Ok(header) => return Poll::Ready(Some(Ok(Frame::data(header)))),
                Err(Damaged) => Code::DataLoss,
            },
            // What was handed out may have been lost before it was sent.
            State::Trailers if self.file.is_damaged() => Code::DataLoss,
            State::Trailers => Code::Ok,
            State::Done => return Poll::Ready(None),
        };
        self.state = State::Done;
        Poll::Ready(Some(Ok(Frame::trailers(trailers(code)))))
    }

    fn is_end_stream(&self) -> bool {
        self.state == State::Done
    }
}

fn trailers(code: Code) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(code as i32));
    if code == Code::DataLoss {
        let words =
            HeaderValue::from_static("the stored file is damaged; the server's log says more");
        trailers.insert("grpc-message", words);
    }
    trailers
}

/// Everything of a message up to the content's own bytes. Protobuf allows any order of fields; `content` comes last.
fn encode_header(sequence: u64, is_last: bool, offset: u64, content: usize) -> Bytes {
    let mut header = BytesMut::with_capacity(HEADER_BYTES);
    header.put_bytes(0, 5);
    // proto3 leaves out fields that have their default value.
    if sequence > 0 {
        header.put_u8(TAG_SEQUENCE);
        put_varint(&mut header, sequence);
    }
    if is_last {
        header.put_slice(&[TAG_IS_LAST, 1]);
    }
    if offset > 0 {
        header.put_u8(TAG_OFFSET);
        put_varint(&mut header, offset);
    }
    if content > 0 {
        header.put_u8(TAG_CONTENT);
        put_varint(&mut header, content as u64);
    }
    // gRPC over HTTP/2, Length-Prefixed-Message: a compression flag of 0, then the length, big endian.
    let length = (header.len() - 5 + content) as u32;
    header[1..5].copy_from_slice(&length.to_be_bytes());
    header.freeze()
}

fn put_varint(buffer: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        buffer.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    buffer.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _};

    use futures::{FutureExt as _, StreamExt as _};
    use fwpush_proto::v1::FileChunk;
    use http_body_util::BodyStream;
    use proptest::prelude::*;
    use prost::Message as _;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn stored(content: &[u8]) -> (File, Mapped) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
        (file, mapped)
    }

    fn body(file: Mapped, range: Range) -> DownloadBody<()> {
        let guard = CancellationToken::new().drop_guard();
        DownloadBody::new(file, range, Arc::default(), (), guard)
    }

    /// Decodes a body the way any gRPC client does.
    fn chunks(file: &[u8], range: Range) -> Vec<FileChunk> {
        let body = body(stored(file).1, range);
        let frames: Vec<_> = BodyStream::new(body)
            .collect::<Vec<_>>()
            .now_or_never()
            .unwrap();
        let mut wire = BytesMut::new();
        let mut status = None;
        for frame in frames {
            match frame.unwrap().into_data() {
                Ok(data) => wire.put(data),
                Err(frame) => status = frame.into_trailers().ok(),
            }
        }
        assert_eq!(status.unwrap()["grpc-status"], "0");
        let mut messages = Vec::new();
        while !wire.is_empty() {
            assert_eq!(wire[0], 0, "not compressed");
            let length = u32::from_be_bytes(wire[1..5].try_into().unwrap()) as usize;
            let message = wire.split_to(5 + length).freeze().slice(5..);
            messages.push(FileChunk::decode(message).unwrap());
        }
        messages
    }

    proptest! {
        #[test]
        fn any_client_reads_back_exactly_the_range(
            size in 0usize..200_000, offset in 0u64..200_000, length in 0u64..200_000, chunk in 0u32..100_000,
        ) {
            let file: Vec<u8> = (0..size).map(|at| at as u8).collect();
            let Some(range) = Range::of(size, offset, length, chunk) else {
                prop_assert!(offset > size as u64);
                return Ok(());
            };
            let start = offset as usize;
            let end = if length == 0 { size } else { size.min(start + length as usize) };
            let got = chunks(&file, range);
            let content: Vec<u8> = got.iter().flat_map(|chunk| chunk.content.iter().copied()).collect();
            prop_assert_eq!(&content[..], &file[start..end]);
            let mut at = offset;
            for (index, chunk) in got.iter().enumerate() {
                prop_assert_eq!(chunk.sequence, index as u64);
                prop_assert_eq!(chunk.offset, at);
                prop_assert_eq!(chunk.is_last, index + 1 == got.len());
                at += chunk.content.len() as u64;
            }
        }
    }

    #[test]
    fn a_file_that_is_cut_short_ends_its_download_with_data_loss() {
        let next = |body: &mut BodyStream<DownloadBody<()>>| {
            let frame = body.next().now_or_never().unwrap();
            frame.map(|frame| frame.unwrap().into_data())
        };
        let status = |frame: Option<Result<Bytes, Frame<Bytes>>>| {
            let trailers = frame.unwrap().unwrap_err().into_trailers().unwrap();
            (
                trailers["grpc-status"].clone(),
                trailers.contains_key("grpc-message"),
            )
        };
        let chunk = limits::CHUNK_MIN_BYTES;
        for cut_after in [1, 3] {
            let (file, mapped) = stored(&vec![7; 3 * chunk]);
            let range = Range::of(3 * chunk, 0, 0, chunk as u32).unwrap();
            let mut body = BodyStream::new(body(mapped, range));
            let mut sent = Vec::new();
            for _ in 0..cut_after {
                next(&mut body).unwrap().unwrap();
                sent.push(next(&mut body).unwrap().unwrap());
            }
            file.set_len(0).unwrap();
            // What waits to be written to the socket, too.
            assert!(sent.concat().iter().all(|byte| *byte == 0));
            assert_eq!(status(next(&mut body)), ("15".parse().unwrap(), true));
            assert!(next(&mut body).is_none());
        }
    }

    #[test]
    fn offsets_at_and_past_the_end_are_told_apart() {
        let at_end = Range::of(100, 100, 0, 0).unwrap();
        let got = chunks(&[0; 100], at_end);
        assert_eq!(
            (got.len(), got[0].is_last, got[0].content.len()),
            (1, true, 0)
        );
        assert_eq!(Range::of(100, 101, 0, 0), None);
        assert_eq!(Range::of(100, u64::MAX, 0, 0), None);
        assert!(Range::of(100, 1, u64::MAX, u32::MAX).is_some());
    }
}
