//! The messages of one DownloadFile call, their content left where the connection put it.
//!
//! tonic gathers each message in a buffer of its own, which is one more copy of the whole image. Here a message is a list of
//! slices of the frames that it came in, and its content some of them.

use std::collections::VecDeque;

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use fwpush_proto::v1::FileRequest;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use prost::{
    DecodeError, Message as _,
    encoding::{
        DecodeContext, WireType, bool, check_wire_type, decode_key, decode_varint, skip_field,
        uint64,
    },
};
use tonic::{Code, Status, body::Body, transport::Channel};
use tower::ServiceExt as _;

use super::PullError;
use crate::limits;

const METHOD: &str = "/fwpush.v1.FileService/DownloadFile";

/// gRPC over HTTP/2, Length-Prefixed-Message: a byte that says whether it is compressed, and the length in four.
const PREFIX_BYTES: usize = 5;

// Field numbers of FileChunk.
const CONTENT: u32 = 1;
const IS_LAST: u32 = 3;
const OFFSET: u32 = 4;

/// A `FileChunk` in the pieces that it came in.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// In their order; none is empty.
    pub content: VecDeque<Bytes>,
    pub is_last: bool,
    pub offset: u64,
}

/// Bytes that are no `FileChunk`.
#[derive(Debug)]
struct Malformed;

impl From<DecodeError> for Malformed {
    fn from(_: DecodeError) -> Self {
        Self
    }
}

/// The answer to one call.
#[derive(Debug)]
pub(super) struct Messages {
    body: Body,
    /// Where it came before the messages: gRPC's Trailers-Only.
    status: Option<Status>,
    unread: Slices,
    /// Length of the message whose prefix was read.
    length: Option<usize>,
}

impl Messages {
    /// Asks, and waits for the head of the answer. A call that the server refuses fails here or at its first message.
    pub(super) async fn call(channel: Channel, request: &FileRequest) -> Result<Self, PullError> {
        let answer = channel
            .oneshot(post(request))
            .await
            .map_err(|error| PullError::of(Status::from_error(Box::new(error))))?;
        Self::of(answer)
    }

    fn of(answer: Response<Body>) -> Result<Self, PullError> {
        let status = Status::from_header_map(answer.headers());
        if let Some(status) = status.as_ref().filter(|status| status.code() != Code::Ok) {
            return Err(PullError::of(status.clone()));
        }
        if answer.status() != StatusCode::OK {
            // Something on the way, not the server.
            let words = format!("HTTP status {}", answer.status().as_u16());
            return Err(PullError::of(Status::unknown(words)));
        }
        Ok(Self {
            body: answer.into_body(),
            status,
            unread: Slices::default(),
            length: None,
        })
    }

    /// The next chunk; `None` after the last. May be dropped while it waits: nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Option<Chunk>, PullError> {
        loop {
            if let Some(chunk) = self.whole_message()? {
                return Ok(Some(chunk));
            }
            let Some(frame) = self.body.frame().await else {
                return self.end(None);
            };
            match frame.map_err(PullError::of)?.into_data() {
                Ok(data) => self.unread.push(data),
                Err(frame) => return self.end(frame.into_trailers().ok().as_ref()),
            }
        }
    }

    /// The next message, if all of it is here.
    fn whole_message(&mut self) -> Result<Option<Chunk>, PullError> {
        if self.length.is_none() && self.unread.remaining() >= PREFIX_BYTES {
            if self.unread.get_u8() != 0 {
                return Err(PullError::wrong("it sent a compressed message"));
            }
            let length = self.unread.get_u32() as usize;
            if length > limits::CHUNK_MESSAGE_BYTES {
                return Err(PullError::wrong("it sent a message that is too long"));
            }
            self.length = Some(length);
        }
        let here = |length: &mut usize| *length <= self.unread.remaining();
        let Some(length) = self.length.take_if(here) else {
            return Ok(None);
        };
        Chunk::decode((&mut self.unread).take(length))
            .map(Some)
            .map_err(|Malformed| PullError::wrong("it sent a message that is no FileChunk"))
    }

    /// The call is over. Only its status says that it ended and was not cut.
    fn end(&self, trailers: Option<&HeaderMap>) -> Result<Option<Chunk>, PullError> {
        let status = trailers.and_then(Status::from_header_map);
        match status.as_ref().or(self.status.as_ref()) {
            Some(status) if status.code() == Code::Ok => Ok(None),
            Some(status) => Err(PullError::of(status.clone())),
            None => Err(PullError::of(Status::unknown(
                "the answer ended without a status",
            ))),
        }
    }
}

fn post(request: &FileRequest) -> Request<Body> {
    let length = request.encoded_len();
    let mut message = BytesMut::with_capacity(PREFIX_BYTES + length);
    message.put_u8(0);
    // An id, four numbers: far below 4 GiB.
    message.put_u32(length as u32);
    message.extend_from_slice(&request.encode_to_vec());
    let mut post = Request::new(Body::new(Full::new(message.freeze())));
    *post.method_mut() = http::Method::POST;
    *post.uri_mut() = http::Uri::from_static(METHOD);
    *post.version_mut() = http::Version::HTTP_2;
    let headers = post.headers_mut();
    let grpc = http::HeaderValue::from_static("application/grpc");
    headers.insert(header::CONTENT_TYPE, grpc);
    headers.insert(header::TE, http::HeaderValue::from_static("trailers"));
    post
}

impl Chunk {
    /// Bytes of content.
    pub(super) fn len(&self) -> u64 {
        self.content.iter().map(|piece| piece.len() as u64).sum()
    }

    /// As generated code decodes it (and with its functions), but for the content.
    fn decode(mut message: impl Buf) -> Result<Self, Malformed> {
        let mut chunk = Self::default();
        while message.has_remaining() {
            let (field, wire_type) = decode_key(&mut message)?;
            let context = DecodeContext::default();
            match field {
                CONTENT => {
                    check_wire_type(WireType::LengthDelimited, wire_type)?;
                    chunk.content = pieces(&mut message)?;
                }
                IS_LAST => bool::merge(wire_type, &mut chunk.is_last, &mut message, context)?,
                OFFSET => uint64::merge(wire_type, &mut chunk.offset, &mut message, context)?,
                _ => skip_field(wire_type, field, &mut message, context)?,
            }
        }
        Ok(chunk)
    }
}

/// The bytes of one field, each piece a slice of what it came in.
fn pieces(message: &mut impl Buf) -> Result<VecDeque<Bytes>, Malformed> {
    let length = decode_varint(message)?;
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    if left > message.remaining() {
        return Err(Malformed);
    }
    let mut pieces = VecDeque::new();
    while left > 0 {
        let piece = message.chunk().len().min(left);
        pieces.push_back(message.copy_to_bytes(piece));
        left -= piece;
    }
    Ok(pieces)
}

/// Bytes that were received and not read yet.
#[derive(Debug, Default)]
struct Slices {
    /// What comes first. None is empty.
    large: VecDeque<Bytes>,
    /// What comes behind them.
    small: BytesMut,
    remaining: usize,
}

impl Slices {
    fn push(&mut self, data: Bytes) {
        self.remaining += data.len();
        if data.len() < limits::SLICE_BYTES {
            // Thousands of them would take many times the memory of their bytes.
            self.small.extend_from_slice(&data);
            return;
        }
        if !self.small.is_empty() {
            self.large.push_back(self.small.split().freeze());
        }
        self.large.push_back(data);
    }
}

impl Buf for Slices {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.large.front().map_or(&self.small, |front| front)
    }

    fn advance(&mut self, mut count: usize) {
        self.remaining -= count;
        while count > 0 {
            let Some(front) = self.large.front_mut() else {
                return self.small.advance(count);
            };
            let taken = front.len().min(count);
            front.advance(taken);
            count -= taken;
            self.large.pop_front_if(|front| front.is_empty());
        }
    }

    /// A slice, where the bytes lie in one piece.
    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        match self.large.front_mut() {
            Some(front) if front.len() >= length => {
                self.remaining -= length;
                let slice = front.split_to(length);
                self.large.pop_front_if(|front| front.is_empty());
                slice
            }
            None if self.small.len() >= length => {
                self.remaining -= length;
                self.small.split_to(length).freeze()
            }
            _ => {
                assert!(length <= self.remaining, "more than there is");
                let mut copy = BytesMut::with_capacity(length);
                copy.put(self.take(length));
                copy.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests;
