//! From a source into the sink.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::task::{JoinError, JoinHandle};

use super::sink::{Sink, SinkError};
use crate::{limits, slots::Slots, update::Trouble};

/// Bytes of an image as they arrive, in order and no more than were asked for.
pub(super) trait Chunks: Send {
    /// Why the source ended before its last byte, or the sink did not take them.
    type Error: From<SinkError> + Send;

    /// The next bytes; `None` after the last. May be dropped while it waits: nothing is lost.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;
}

/// The end of a drain: the sink, and why the source ended early.
pub(super) type Drained<S, E> = Result<(Sink<S>, Result<(), E>), Trouble>;

/// Takes everything that a source has into the sink, which comes back either way; what was verified and written before an error
/// stays.
pub(super) async fn drain<S: Slots, C: Chunks>(
    sink: Sink<S>,
    chunks: &mut C,
) -> Drained<S, C::Error> {
    if sink.blocks() {
        beside(sink, chunks).await
    } else {
        Ok(inline(sink, chunks).await)
    }
}

/// Slots that never block: each chunk is verified and written where it was received.
async fn inline<S: Slots, C: Chunks>(
    mut sink: Sink<S>,
    chunks: &mut C,
) -> (Sink<S>, Result<(), C::Error>) {
    loop {
        let taken = match chunks.next().await {
            Ok(None) => return (sink, Ok(())),
            Ok(Some(bytes)) => sink.take(bytes).map_err(C::Error::from),
            Err(error) => Err(error),
        };
        if taken.is_err() {
            return (sink, taken);
        }
    }
}

/// Slots that may block: while one thread verifies and writes what has come, the next is received, up to
/// [`limits::RECEIVED_BYTES`].
async fn beside<S: Slots, C: Chunks>(sink: Sink<S>, chunks: &mut C) -> Drained<S, C::Error> {
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
