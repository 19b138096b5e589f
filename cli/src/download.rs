//! A stored file from the server, over as many connections as it takes.

use std::{io, time::Duration};

use bytes::{Buf as _, Bytes};
use fwpush_keys::{FileId, Outline};
use fwpush_proto::v1::{FileRequest, Part};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tonic::Status;

use crate::{
    client::{Backoff, Client, is_lost},
    failure::{Doing as _, Failure, Result},
    limits,
};

/// Nothing comes for this long: the connection is dead.
const STALL: Duration = Duration::from_secs(60);

/// The verified outline of a file of `size` bytes.
pub async fn outline(client: &mut Client, file: FileId, size: u64) -> Result<Outline> {
    let (out, mut pieces) = mpsc::channel::<Bytes>(limits::DOWNLOAD_AHEAD);
    let expected = Outline::encoded_len(size);
    let mut list = Vec::new();
    let receive = async {
        while let Some(piece) = pieces.recv().await {
            list.extend_from_slice(&piece);
        }
    };
    // Without a list there is nothing to ask for.
    let fetch = async {
        match expected {
            0 => Ok(()),
            _ => fetch(client, file, Part::Outline, expected, out).await,
        }
    };
    let (fetched, ()) = tokio::join!(fetch, receive);
    fetched?;
    Outline::from_bytes(file, size, &list).doing(|| "check what the server sent".to_owned())
}

/// The content of a file as a reader for another thread, and the task that fetches it.
pub fn content(
    mut client: Client,
    file: FileId,
    size: u64,
) -> (impl io::Read + Send, JoinHandle<Result<()>>) {
    let (out, pieces) = mpsc::channel(limits::DOWNLOAD_AHEAD);
    let fetched =
        tokio::spawn(async move { fetch(&mut client, file, Part::Content, size, out).await });
    let reader = Pieces {
        pieces,
        rest: Bytes::new(),
    };
    (reader, fetched)
}

/// Fetches `size` bytes; a lost connection is made anew. Ends early where nobody wants them any more.
async fn fetch(
    client: &mut Client,
    file: FileId,
    part: Part,
    size: u64,
    out: mpsc::Sender<Bytes>,
) -> Result<()> {
    let (mut backoff, mut fruitless, mut received) = (Backoff::default(), 0, 0);
    while received < size {
        let before = received;
        let Err(status) = attempt(client, file, part, size, &mut received, &out).await else {
            break;
        };
        if received > before {
            (fruitless, backoff) = (0, Backoff::default());
        }
        fruitless += 1;
        if !is_lost(&status) || fruitless > limits::UPLOAD_ATTEMPTS {
            return Err(client.refused("download the image", &status));
        }
        backoff.wait().await;
        // When this fails, so does the next attempt.
        let _ = client.reconnect().await;
    }
    Ok(())
}

async fn attempt(
    client: &Client,
    file: FileId,
    part: Part,
    size: u64,
    received: &mut u64,
    out: &mpsc::Sender<Bytes>,
) -> Result<(), Status> {
    let request = FileRequest {
        file_id: file.to_string(),
        offset: *received,
        part: part.into(),
        ..FileRequest::default()
    };
    let silent = |_| Status::unavailable("the server sends nothing any more");
    let mut admin = client.admin();
    let call = timeout(STALL, admin.download_file(request)).await;
    let mut chunks = call.map_err(silent)??.into_inner();
    while *received < size {
        let chunk = timeout(STALL, chunks.message()).await.map_err(silent)??;
        let chunk = chunk.ok_or_else(|| Status::unavailable("the download ended early"))?;
        let length = chunk.content.len() as u64;
        if chunk.offset != *received || length == 0 || length > size - *received {
            return Err(Status::data_loss(
                "the server sent other bytes than were asked for",
            ));
        }
        *received += length;
        if out.send(chunk.content).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Reads what a task fetches.
struct Pieces {
    pieces: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.rest.len());
        self.rest
            .split_to(length)
            .copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// What a download that ended with an error means for whoever read it.
pub async fn ended(fetched: JoinHandle<Result<()>>) -> Result<()> {
    fetched
        .await
        .map_err(|error| Failure::new(format!("download the image: {error}")))?
}
