//! What fwpush is compared with: the least that can be served over HTTP/2 and TLS.
//!
//! The same TLS settings, the same mapped file, the same messages on the wire, and nothing else: no identity, no bounds, no
//! database, no metrics. What fwpush needs above this is the price of what it does.

use std::{
    convert::Infallible,
    fs,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use anyhow::{Context as _, Result};
use bytes::{BufMut as _, Bytes, BytesMut};
use fwpush_keys::{
    FileId, Role, error_text,
    tls::{Bar, Credentials, certificates_from_pem, server_config},
};
use fwpush_server::{Config, files::LocalStore};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::encoding::{WireType, bool, encode_key, encode_varint, uint64};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// A server of one file.
#[derive(Clone)]
pub struct Reference {
    tls: TlsAcceptor,
    file: Bytes,
    chunk: usize,
}

impl std::fmt::Debug for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reference")
            .field("file_bytes", &self.file.len())
            .field("chunk_bytes", &self.chunk)
            .finish_non_exhaustive()
    }
}

impl Reference {
    /// Takes certificates and the file from an installation of fwpush.
    pub fn open(config: &Config, file: &FileId, chunk: usize) -> Result<Self> {
        let pki = &config.pki;
        let read = |path: &std::path::Path| {
            fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
        };
        let credentials = Credentials::from_pem(&read(&pki.certificate)?, &read(&pki.key)?)?;
        let devices = certificates_from_pem(&read(&pki.device_ca)?)?;
        let tls = server_config(
            credentials,
            &[(Role::Device, devices)],
            &config.trust_domain,
            Bar::none(),
        )?;
        let dir = config.files_dir()?.context("the images are in a bucket")?;
        let store = LocalStore::open(&dir).map_err(|error| anyhow::anyhow!(error_text(&error)))?;
        let stored = store
            .get(file)
            .map_err(|error| anyhow::anyhow!(error_text(&error)))?;
        let content = &stored.context("the file is not in the store")?.content;
        let file = content.slice(0..content.len())?;
        Ok(Self {
            tls: TlsAcceptor::from(Arc::new(tls)),
            file,
            chunk,
        })
    }

    /// Serves until it is dropped.
    pub async fn serve(self, socket: TcpListener) {
        loop {
            match socket.accept().await {
                Ok((tcp, _)) => drop(tokio::spawn(self.clone().connection(tcp))),
                Err(error) => return eprintln!("the reference server accepts no more: {error}"),
            }
        }
    }

    async fn connection(self, tcp: TcpStream) {
        // A peer that has gone is seen by the clients, who count what they get.
        let _ = self.serve_connection(tcp).await;
    }

    async fn serve_connection(self, tcp: TcpStream) -> Result<()> {
        tcp.set_nodelay(true)?;
        let io = TokioIo::new(self.tls.accept(tcp).await?);
        let service = service_fn(move |_: Request<Incoming>| {
            let body = Prepared::new(self.file.clone(), self.chunk);
            let response = Response::builder()
                .header("content-type", "application/grpc")
                .body(body);
            async move { response }
        });
        Ok(http2::Builder::new(TokioExecutor::new())
            .serve_connection(io, service)
            .await?)
    }
}

/// A response with the whole file: before each chunk its header, prepared here; the chunk itself is a part of the mapping.
struct Prepared {
    file: Bytes,
    chunk: usize,
    offset: usize,
    sequence: u64,
    next: Next,
}

enum Next {
    Header,
    Content(Bytes),
    Trailers,
    End,
}

impl Prepared {
    fn new(file: Bytes, chunk: usize) -> Self {
        Self {
            file,
            chunk,
            offset: 0,
            sequence: 0,
            next: Next::Header,
        }
    }

    /// The header of the chunk at `offset`, which becomes the next to be sent.
    fn header(&mut self) -> Bytes {
        let end = self.file.len().min(self.offset + self.chunk);
        let content = self.file.slice(self.offset..end);
        let mut header = BytesMut::with_capacity(64);
        // gRPC's prefix: not compressed, then the length, known below.
        header.put_bytes(0, 5);
        // FileChunk: sequence 2, is_last 3, offset 4, and last content 1.
        uint64::encode(2, &self.sequence, &mut header);
        bool::encode(3, &(end == self.file.len()), &mut header);
        uint64::encode(4, &(self.offset as u64), &mut header);
        encode_key(1, WireType::LengthDelimited, &mut header);
        encode_varint(content.len() as u64, &mut header);
        let length = (header.len() - 5 + content.len()) as u32;
        header[1..5].copy_from_slice(&length.to_be_bytes());
        self.offset = end;
        self.sequence += 1;
        self.next = Next::Content(content);
        header.freeze()
    }
}

impl Body for Prepared {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match std::mem::replace(&mut self.next, Next::End) {
            Next::Header => Frame::data(self.header()),
            Next::Content(content) => {
                self.next = if self.offset == self.file.len() {
                    Next::Trailers
                } else {
                    Next::Header
                };
                Frame::data(content)
            }
            Next::Trailers => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                Frame::trailers(trailers)
            }
            Next::End => return Poll::Ready(None),
        };
        Poll::Ready(Some(Ok(frame)))
    }
}

#[cfg(test)]
mod tests {
    use fwpush_proto::v1::FileChunk;
    use http_body_util::BodyExt as _;
    use prost::Message as _;

    use super::*;

    #[tokio::test]
    async fn the_reference_sends_what_fwpush_would() {
        let file = Bytes::from_iter((0..2_500_u32).map(|at| at as u8));
        let body = Prepared::new(file.clone(), 1_000).collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        let mut wire = body.to_bytes();
        let mut chunks = Vec::new();
        while !wire.is_empty() {
            let length = u32::from_be_bytes(wire[1..5].try_into().unwrap()) as usize;
            let message = wire.split_to(5 + length).slice(5..);
            chunks.push(FileChunk::decode(message).unwrap());
        }
        let content: Vec<u8> = chunks
            .iter()
            .flat_map(|chunk| chunk.content.to_vec())
            .collect();
        assert_eq!(content, file);
        let places: Vec<_> = chunks
            .iter()
            .map(|chunk| (chunk.sequence, chunk.offset, chunk.is_last))
            .collect();
        assert_eq!(places, [(0, 0, false), (1, 1_000, false), (2, 2_000, true)]);
    }
}
