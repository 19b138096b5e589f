//! One DownloadFile call: bytes from the server, in order, no more than asked for.

use std::{collections::VecDeque, error::Error as _, ops::Range, time::Duration};

use bytes::Bytes;
use fwpush_keys::{
    id::FileId,
    outline::{GROUP_BYTES, OutlineError},
    tls::explain,
};
use fwpush_proto::v1::{FileRequest, Part};
use thiserror::Error;
use tokio::{
    task::{JoinError, JoinHandle},
    time::{Instant, sleep_until, timeout},
};
use tonic::{Code, Status};

use super::{
    Pace,
    sink::{Sink, SinkError},
};
use crate::{
    agent::{AgentEvent, Observer},
    channel::Connection,
    limits,
    slots::Slots,
    update::Trouble,
};

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
            Ok(chunks) if sink.blocks() => drain_beside(sink, chunks).await,
            Ok(chunks) => Ok(drain_inline(sink, chunks).await),
        }
    }

    async fn open(self, part: Part, range: Range<u64>) -> Result<Chunks, PullError> {
        let request = FileRequest {
            file_id: self.file.to_string(),
            offset: range.start,
            length: range.end - range.start,
            max_chunk_bytes: self.chunk_bytes,
            part: part.into(),
        };
        let give_up = Instant::now() + self.group_timeout;
        let call = Messages::call(self.connection.channel.clone(), &request);
        let messages = watched(&self.connection, self.stall, give_up, call).await??;
        Ok(Chunks {
            messages,
            here: VecDeque::new(),
            range,
            connection: self.connection,
            stall: self.stall,
            group_timeout: self.group_timeout,
            since_group: 0,
            give_up,
            pace: Pace::new(self.bandwidth_limit),
            observe: self.observe,
        })
    }
}

/// Slots that never block: each chunk is verified and written where it was received.
async fn drain_inline<S: Slots>(
    mut sink: Sink<S>,
    mut chunks: Chunks,
) -> (Sink<S>, Result<(), PullError>) {
    loop {
        let taken = match chunks.next().await {
            Ok(None) => return (sink, Ok(())),
            Ok(Some(bytes)) => sink.take(bytes).map_err(PullError::from),
            Err(error) => Err(error),
        };
        if taken.is_err() {
            return (sink, taken);
        }
    }
}

/// Slots that may block: while one thread verifies and writes what has come, the next is received, up to
/// [`limits::RECEIVED_BYTES`].
async fn drain_beside<S: Slots>(
    sink: Sink<S>,
    mut chunks: Chunks,
) -> Result<(Sink<S>, Result<(), PullError>), Trouble> {
    let mut received: VecDeque<Bytes> = VecDeque::new();
    let mut ended = None;
    let mut writer = Writer::Idle(sink);
    loop {
        writer = match writer {
            Writer::Idle(sink) if !received.is_empty() => {
                let batch = std::mem::take(&mut received);
                Writer::Busy(
                    sink.spawn(|sink| batch.into_iter().try_for_each(|bytes| sink.take(bytes))),
                )
            }
            Writer::Idle(sink) => match ended {
                Some(result) => return Ok((sink, result)),
                None => Writer::Idle(sink),
            },
            busy => busy,
        };
        let room = received.iter().map(Bytes::len).sum::<usize>() < limits::RECEIVED_BYTES;
        tokio::select! {
            written = writer.written() => {
                let (sink, result) = written?;
                if let Err(error) = result {
                    return Ok((sink, Err(error.into())));
                }
                writer = Writer::Idle(sink);
            }
            next = chunks.next(), if room && ended.is_none() => match next {
                Ok(Some(bytes)) => received.push_back(bytes),
                Ok(None) => ended = Some(Ok(())),
                Err(error) => ended = Some(Err(error)),
            },
        }
    }
}

/// The sink, here or on the thread that writes.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one, and it does not move far"
)]
enum Writer<S> {
    Idle(Sink<S>),
    Busy(JoinHandle<(Sink<S>, Result<(), SinkError>)>),
}

impl<S: Slots> Writer<S> {
    /// The end of the write that is under way; never, without one.
    async fn written(&mut self) -> Result<(Sink<S>, Result<(), SinkError>), Trouble> {
        match self {
            Writer::Idle(_) => std::future::pending().await,
            Writer::Busy(handle) => handle.await.map_err(stopped),
        }
    }
}

/// The writing thread is gone because the process is stopping. A panic goes on where its work was waited for.
pub(super) fn stopped(error: JoinError) -> Trouble {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Trouble::transient("STOPPED", error.to_string()),
    }
}

/// The chunks of one call.
struct Chunks {
    messages: Messages,
    /// The rest of the chunk that came last, checked and counted.
    here: VecDeque<Bytes>,
    /// What is still to come.
    range: Range<u64>,
    connection: Connection,
    stall: Duration,
    group_timeout: Duration,
    /// Bytes that have come since the last whole group.
    since_group: u64,
    /// When the next group must have come.
    give_up: Instant,
    pace: Pace,
    observe: Observer,
}

impl Chunks {
    /// The next bytes; `None` after the last. May be dropped while it waits: nothing is lost.
    async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        if let Some(bytes) = self.here.pop_front() {
            return Ok(Some(bytes));
        }
        if self.range.is_empty() {
            // Only for the server's books; what it may still say changes nothing.
            let _ = timeout(limits::TRAILERS_TIMEOUT, self.messages.next()).await;
            return Ok(None);
        }
        self.pace.wait().await;
        let next = self.messages.next();
        let chunk = watched(&self.connection, self.stall, self.give_up, next)
            .await??
            .ok_or_else(|| PullError::wrong("the stream ended early"))?;
        let length = chunk.len();
        if chunk.offset != self.range.start || length > self.range.end - self.range.start {
            return Err(PullError::wrong("it sent other bytes than were asked for"));
        }
        if chunk.is_last && length < self.range.end - self.range.start {
            return Err(PullError::wrong(
                "the file is shorter than its manifest says",
            ));
        }
        if length == 0 {
            // Else a server could keep the call alive without sending anything.
            return Err(PullError::wrong("it sent an empty chunk"));
        }
        self.range.start += length;
        (self.observe)(AgentEvent::Bytes(length));
        self.arrived(length);
        self.here = chunk.content;
        Ok(self.here.pop_front())
    }

    /// Sets when the next group must have come: a server that trickles single bytes does not keep a call alive.
    fn arrived(&mut self, bytes: u64) {
        self.since_group += bytes;
        let paced = self.pace.received(bytes);
        self.give_up += paced;
        if self.since_group >= GROUP_BYTES {
            self.since_group = 0;
            self.give_up = Instant::now() + paced + self.group_timeout;
        }
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
