//! Bringing an image to the server: from where the last attempt ended, over as many connections as it takes.

use std::{io, time::Duration};

use bytes::Bytes;
use fwpush_proto::v1::{GetUploadRequest, UploadChunk, UploadStatus};
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Status};

use crate::{
    client::{Backoff, Client, is_lost},
    failure::{Failure, Result},
    image::Image,
    limits, progress,
};

/// No byte goes out for this long: the connection is dead.
const STALL: Duration = Duration::from_secs(60);

/// Makes sure that the server has the whole image. Returns the bytes that had to be sent: 0 when it had it already.
///
/// A lost connection is made anew and the upload goes on where the server stands; so it does when the command is repeated.
/// The server hashes what it got: an image that changed since it was hashed is refused.
pub async fn upload(client: &mut Client, image: &Image) -> Result<u64> {
    let bar = progress::byte_bar("uploading", image.size);
    let (mut backoff, mut fruitless, mut reached) = (Backoff::default(), 0, 0);
    let mut first = None;
    loop {
        let problem = match attempt(client, image, &bar).await {
            Ok(Attempt::Complete { from }) => {
                bar.finish_and_clear();
                return Ok(image.size - first.unwrap_or(from));
            }
            Ok(Attempt::Lost { from, status }) => {
                if let Some(from) = from {
                    first.get_or_insert(from);
                    if from > reached {
                        (fruitless, reached, backoff) = (0, from, Backoff::default());
                    }
                }
                status
            }
            Err(failure) => {
                bar.abandon();
                return Err(failure);
            }
        };
        fruitless += 1;
        if fruitless > limits::UPLOAD_ATTEMPTS {
            bar.abandon();
            return Err(client
                .refused("upload the image", &problem)
                .next("Repeat the command when the server answers again: the upload goes on where it stopped."));
        }
        backoff.wait().await;
        if is_lost(&problem) {
            // When this fails, so does the next attempt.
            let _ = client.reconnect().await;
        }
    }
}

enum Attempt {
    /// The server has everything; this attempt began at `from`.
    Complete { from: u64 },
    /// Worth another attempt; this one began at `from`, unless it did not even get there.
    Lost { from: Option<u64>, status: Status },
}

async fn attempt(client: &Client, image: &Image, bar: &ProgressBar) -> Result<Attempt> {
    let file_id = image.blake3.to_string();
    let request = GetUploadRequest {
        file_id,
        size: image.size,
    };
    let standing = client
        .try_call(async move |admin| admin.get_upload(request).await)
        .await;
    let from = match standing {
        Ok(UploadStatus { complete: true, .. }) => {
            return Ok(Attempt::Complete { from: image.size });
        }
        Ok(status) if status.received <= image.size => status.received,
        Ok(status) => {
            return Err(Failure::new(format!(
                "the server says it has {} bytes of an image of {}",
                status.received, image.size
            ))
            .next("Is it a newer server? The server's log says more."));
        }
        Err(status) if is_lost(&status) => return Ok(Attempt::Lost { from: None, status }),
        Err(status) => return Err(client.refused("ask how far the upload is", &status)),
    };
    bar.set_position(from);
    bar.reset_eta();
    let (chunks, reader) = read_ahead(image.clone(), from);
    let counted = bar.clone();
    let chunks = chunks.map(move |chunk| {
        counted.inc(chunk.content.len() as u64);
        chunk
    });
    let answer = send(client, chunks, bar, image.size).await;
    if let Ok(Err(error)) = reader.await {
        return Err(Failure::new(format!(
            "read the image {}: {error}",
            image.path().display()
        ))
        .next("It changed while it was uploaded. Build and sign again."));
    }
    match answer {
        Ok(UploadStatus { complete: true, .. }) => Ok(Attempt::Complete { from }),
        Ok(status) => Ok(Attempt::Lost {
            from: Some(from),
            status: Status::unavailable(format!("the server has only {} bytes", status.received)),
        }),
        Err(status) if status.code() == Code::AlreadyExists => Err(client
            .refused("upload the image", &status)
            .next("Another command uploads it now. When that has ended, repeat this one: it goes on where the upload stands.")),
        Err(status) if status.code() == Code::DataLoss => Err(Failure::new(format!(
            "upload the image: what the server received does not hash to {}",
            image.blake3
        ))
        .next("The image changed after it was hashed. Repeat the command.")),
        // Another upload of the same image was faster, or all places are taken: look again.
        Err(status)
            if is_lost(&status)
                || matches!(
                    status.code(),
                    Code::Aborted
                        | Code::DeadlineExceeded
                        | Code::FailedPrecondition
                        | Code::ResourceExhausted
                ) =>
        {
            Ok(Attempt::Lost {
                from: Some(from),
                status,
            })
        }
        Err(status) => Err(client.refused("upload the image", &status)),
    }
}

/// The call itself, given up when nothing moves.
async fn send(
    client: &Client,
    chunks: impl tokio_stream::Stream<Item = UploadChunk> + Send + 'static,
    bar: &ProgressBar,
    size: u64,
) -> Result<UploadStatus, Status> {
    let mut admin = client.admin();
    let call = admin.upload_file(chunks);
    tokio::pin!(call);
    loop {
        let position = bar.position();
        let patience = if position < size {
            STALL
        } else {
            limits::UPLOAD_END_TIME
        };
        match tokio::time::timeout(patience, &mut call).await {
            Ok(answer) => return answer.map(tonic::Response::into_inner),
            Err(_) if bar.position() > position => {}
            Err(_) => {
                return Err(Status::unavailable(format!(
                    "nothing moved for {} s",
                    patience.as_secs()
                )));
            }
        }
    }
}

/// Reads the image in a thread of its own, a bounded number of chunks ahead of the network.
fn read_ahead(
    image: Image,
    from: u64,
) -> (
    ReceiverStream<UploadChunk>,
    tokio::task::JoinHandle<io::Result<()>>,
) {
    let (queue, chunks) = mpsc::channel(limits::UPLOAD_AHEAD);
    let reader = tokio::task::spawn_blocking(move || {
        let mut offset = from;
        loop {
            let left = usize::try_from(image.size - offset).unwrap_or(usize::MAX);
            let mut content = vec![0; left.min(limits::UPLOAD_CHUNK_BYTES)];
            image.read_at(offset, &mut content)?;
            let first = offset == from;
            let chunk = UploadChunk {
                file_id: if first {
                    image.blake3.to_string()
                } else {
                    String::new()
                },
                size: image.size,
                offset,
                content: Bytes::from(content),
            };
            offset += chunk.content.len() as u64;
            // The call has ended: why, it says itself.
            if queue.blocking_send(chunk).is_err() || offset == image.size {
                return Ok(());
            }
        }
    });
    (ReceiverStream::new(chunks), reader)
}
