//! One DownloadFile call: bytes from the server, in order, no more than asked for.

use std::{collections::VecDeque, error::Error as _, ops::Range, time::Duration};

use bytes::Bytes;
use fwpush_keys::{id::FileId, outline::OutlineError, tls::explain};
use fwpush_proto::v1::{FileRequest, Part};
use thiserror::Error;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Code, Status};

use super::{
    drain::{Chunks, drain},
    flow::Flow,
    sink::{Sink, SinkError},
};
use crate::{agent::Observer, channel::Connection, limits, slots::Slots, update::Trouble};

mod messages;

use messages::Messages;

/// Why a call ended before its last byte.
#[derive(Debug, Error)]
pub(super) enum PullError {
    #[error("the download was cut: {}", words(.0))]
    Link(Box<Status>),
    #[error("the download stalled: no 64 KiB within its time")]
    Stalled,
    #[error("the download stalled: not a byte from the server")]
    Silent,
    #[error("the server has too many downloads; it asks to wait {0:?}")]
    Busy(Duration),
    /// The server will not send what was asked for, or sent something else.
    #[error("the server refused the download: {message}")]
    Refused {
        code: &'static str,
        message: String,
        lasting: bool,
    },
    #[error(transparent)]
    Outline(OutlineError),
    #[error(transparent)]
    Sink(#[from] SinkError),
}

impl PullError {
    fn of(status: Status) -> Self {
        let refused = |code, lasting| {
            let mut message = status.message().to_owned();
            message.truncate(message.floor_char_boundary(limits::WORDS_BYTES));
            Self::Refused {
                code,
                message,
                lasting,
            }
        };
        match status.code() {
            Code::ResourceExhausted => Self::Busy(retry_after(&status)),
            // It has the words of the server itself: the link is well, and the file not at hand yet.
            Code::Unavailable if status.metadata().contains_key(RETRY_AFTER) => {
                Self::Busy(retry_after(&status))
            }
            Code::NotFound => refused("FILE_NOT_FOUND", false),
            Code::DataLoss => refused("FILE_DAMAGED", false),
            Code::PermissionDenied => refused("FILE_DENIED", true),
            Code::FailedPrecondition => refused("FILE_REVOKED", true),
            Code::OutOfRange => refused("FILE_RANGE", true),
            Code::InvalidArgument | Code::Unimplemented => refused("FILE_REQUEST", true),
            _ => Self::Link(Box::new(status)),
        }
    }

    /// A stable code for logs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            PullError::Link(_) => "DOWNLOAD_CUT",
            PullError::Stalled | PullError::Silent => "DOWNLOAD_STALLED",
            PullError::Busy(_) => "SERVER_BUSY",
            PullError::Refused { code, .. } => code,
            PullError::Outline(error) => error.code(),
            PullError::Sink(error) => error.code(),
        }
    }

    /// The server sent other bytes than it was asked for.
    fn wrong(message: &str) -> Self {
        Self::Refused {
            code: "FILE_STREAM",
            message: message.to_owned(),
            lasting: false,
        }
    }
}

/// A status of the server has words; one made here of a broken transport has a source that explains it.
fn words(status: &Status) -> String {
    let mut words = status
        .source()
        .map_or_else(|| status.message().to_owned(), explain);
    words.truncate(words.floor_char_boundary(limits::WORDS_BYTES));
    words
}

/// A trailer with milliseconds, by which the server says when to ask again.
const RETRY_AFTER: &str = "retry-after-ms";

/// What [`RETRY_AFTER`] says, clamped; a second without it.
fn retry_after(status: &Status) -> Duration {
    let trailer = status
        .metadata()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok());
    let wait = trailer
        .and_then(|value| value.parse().ok())
        .map_or(Duration::from_secs(1), Duration::from_millis);
    wait.clamp(limits::RETRY_MIN, limits::RETRY_AFTER_MAX)
}

/// A connection and what is asked over it.
pub(super) struct Pull {
    pub connection: Connection,
    pub file: FileId,
    pub chunk_bytes: u32,
    pub stall: Duration,
    pub group_timeout: Duration,
    pub bandwidth_limit: Option<u64>,
    pub observe: Observer,
}

impl Pull {
    /// The outline, exactly `expected` bytes.
    pub(super) async fn outline(self, expected: u64) -> Result<Vec<u8>, PullError> {
        let mut chunks = self.open(Part::Outline, 0..expected).await?;
        // The size came from the manifest and fits the slot; the outline is a two-thousandth of it.
        let mut outline = Vec::with_capacity(usize::try_from(expected).unwrap_or(0));
        while let Some(bytes) = chunks.next().await? {
            outline.extend_from_slice(&bytes);
        }
        Ok(outline)
    }

    /// Bytes of the file into the sink. What was verified and written before an error stays; the sink comes back either way.
    pub(super) async fn content<S: Slots>(
        self,
        sink: Sink<S>,
        bytes: Range<u64>,
    ) -> Result<(Sink<S>, Result<(), PullError>), Trouble> {
        match self.open(Part::Content, bytes).await {
            Err(error) => Ok((sink, Err(error))),
            Ok(mut chunks) => drain(sink, &mut chunks).await,
        }
    }

    async fn open(self, part: Part, range: Range<u64>) -> Result<Answer, PullError> {
        let request = FileRequest {
            file_id: self.file.to_string(),
            offset: range.start,
            length: range.end - range.start,
            max_chunk_bytes: self.chunk_bytes,
            part: part.into(),
        };
        let flow = Flow::new(
            range,
            self.group_timeout,
            self.bandwidth_limit,
            self.observe,
        );
        let call = Messages::call(self.connection.channel.clone(), &request);
        let messages = watched(&self.connection, self.stall, flow.give_up(), call).await??;
        Ok(Answer {
            messages,
            here: VecDeque::new(),
            flow,
            connection: self.connection,
            stall: self.stall,
        })
    }
}

/// The chunks of one call.
struct Answer {
    messages: Messages,
    /// The rest of the chunk that came last, checked and counted.
    here: VecDeque<Bytes>,
    flow: Flow,
    connection: Connection,
    stall: Duration,
}

impl Chunks for Answer {
    type Error = PullError;

    async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        if let Some(bytes) = self.here.pop_front() {
            return Ok(Some(bytes));
        }
        if self.flow.left() == 0 {
            // Only for the server's books; what it may still say changes nothing.
            let _ = timeout(limits::TRAILERS_TIMEOUT, self.messages.next()).await;
            return Ok(None);
        }
        self.flow.wait().await;
        let next = self.messages.next();
        let chunk = watched(&self.connection, self.stall, self.flow.give_up(), next)
            .await??
            .ok_or_else(|| PullError::wrong("the stream ended early"))?;
        let length = chunk.len();
        if chunk.offset != self.flow.offset() || length > self.flow.left() {
            return Err(PullError::wrong("it sent other bytes than were asked for"));
        }
        if chunk.is_last && length < self.flow.left() {
            return Err(PullError::wrong(
                "the file is shorter than its manifest says",
            ));
        }
        if length == 0 {
            // Else a server could keep the call alive without sending anything.
            return Err(PullError::wrong("it sent an empty chunk"));
        }
        self.flow.arrived(length);
        self.here = chunk.content;
        Ok(self.here.pop_front())
    }
}

/// Waits for a part of a call while its connection lives. Silence raises doubts, which whoever has the session looks into;
/// without one, it is given up after as long again. `give_up`: too late, whatever else comes over the connection.
async fn watched<T>(
    connection: &Connection,
    stall: Duration,
    give_up: Instant,
    part: impl Future<Output = T>,
) -> Result<T, PullError> {
    let begun = Instant::now();
    let mut part = std::pin::pin!(part);
    let mut look_at = begun + stall;
    loop {
        tokio::select! {
            biased;
            part = &mut part => return Ok(part),
            () = connection.dead.cancelled() => return Err(PullError::Silent),
            () = sleep_until(give_up) => return Err(PullError::Stalled),
            () = sleep_until(look_at) => {}
        }
        // Before that, nothing was due.
        let silence = connection.last_byte.silence().min(begun.elapsed());
        if silence >= stall * 2 {
            return Err(PullError::Silent);
        }
        look_at = Instant::now() + stall.saturating_sub(silence);
        if silence >= stall {
            connection.doubts.notify_one();
            look_at += stall;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_says_when_to_come_back_is_busy_and_a_broken_link_is_not() {
        for code in [Code::Unavailable, Code::ResourceExhausted] {
            let mut status = Status::new(code, "later");
            status.metadata_mut().insert(RETRY_AFTER, 5_000_u64.into());
            let waits = PullError::of(status);
            assert!(
                matches!(waits, PullError::Busy(wait) if wait == Duration::from_secs(5)),
                "{waits:?}"
            );
        }
        let cut = PullError::of(Status::unavailable("the line is dead"));
        assert!(matches!(cut, PullError::Link(_)), "{cut:?}");
    }
}
