//! A mirror that does as it is told: HTTP/1.1 by hand over an in-memory stream, in place of TLS.

use std::{
    collections::HashSet,
    io,
    ops::Range,
    sync::{Arc, Mutex},
};

use fwpush_keys::tls::certificates_from_pem;
use fwpush_proto::v1;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::bench::Bench;
use crate::{Dial, Dialling, Io, MirrorRoots};

pub const HOST: &str = "mirror.example";

/// What a mirror does wrong.
#[derive(Debug, Clone, Copy)]
pub enum Wrong {
    /// Cannot be connected to.
    Unreachable,
    /// Flips a bit of the file at this offset.
    Flip(usize),
    /// Closes after so many bytes of each answer.
    CutAfter(usize),
    /// Says nothing more after so many bytes of each answer.
    SilentAfter(usize),
    /// A byte a second.
    Trickle,
    /// Sends on past what was asked for.
    Endless,
    /// Says that it sends other bytes than it was asked for.
    OtherRange,
    /// Says nothing of a range.
    NoRange,
    Status(u16),
    Gzip,
    /// A header without end.
    HugeHeader,
    /// No HTTP at all.
    Noise,
}

/// What it has, what it does wrong, and what it saw.
#[derive(Debug, Default)]
pub struct Books {
    pub image: Arc<Vec<u8>>,
    /// Taken by one request each, first to last; the last for ever where `stuck`.
    pub wrongs: Vec<Wrong>,
    pub stuck: bool,
    /// Does not know ranges.
    pub whole: bool,
    /// Hosts that were connected to.
    pub dialled: Vec<String>,
    /// Heads of the requests.
    pub heads: Vec<String>,
    /// First and last byte of each.
    pub ranges: Vec<(usize, usize)>,
    pub sent: usize,
}

impl Books {
    fn wrong(&mut self) -> Option<Wrong> {
        let wrong = self.wrongs.first().copied();
        if wrong.is_some() && !self.stuck {
            self.wrongs.remove(0);
        }
        wrong
    }
}

/// Some mirrors beside a server. They have the same books.
#[derive(Debug)]
pub struct Mirrors {
    server: Arc<dyn Dial>,
    hosts: HashSet<String>,
    pub books: Arc<Mutex<Books>>,
}

/// Has a device use mirrors, which have its image.
pub fn mirrors_of(bench: &mut Bench, image: &[u8], hosts: &[&str]) -> Arc<Mutex<Books>> {
    let authority = certificates_from_pem(bench.node_ca_pem()).unwrap();
    let transfer = &mut bench.settings.transfer;
    transfer.mirror_hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
    transfer.mirror_roots = MirrorRoots::These(authority.into());
    let books = Arc::new(Mutex::new(Books {
        image: Arc::new(image.to_vec()),
        ..Books::default()
    }));
    let hosts = hosts.iter().map(|host| format!("{host}:443")).collect();
    bench.dial = Arc::new(Mirrors {
        server: Arc::clone(&bench.dial),
        hosts,
        books: Arc::clone(&books),
    });
    books
}

/// What a server says of a mirror.
pub fn mirror(host: &str) -> v1::Mirror {
    v1::Mirror {
        url: format!("https://{host}/fw/image?signature=s3cret"),
        expires_at_ms: i64::MAX,
    }
}

impl Dial for Mirrors {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        if !self.hosts.contains(server) {
            return self.server.dial(server, tls);
        }
        assert!(tls.alpn_protocols == [b"http/1.1"], "settings for the web");
        assert!(
            !tls.client_auth_cert_resolver.has_certs(),
            "no certificate of ours"
        );
        Box::pin(async move {
            let mut books = self.books.lock().unwrap();
            books.dialled.push(server.to_owned());
            if matches!(books.wrongs.first(), Some(Wrong::Unreachable)) {
                books.wrong();
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (near, far) = tokio::io::duplex(1 << 16);
            tokio::spawn(serve(far, Arc::clone(&self.books)));
            Ok(Box::new(near) as Box<dyn Io>)
        })
    }
}

/// Answers requests until something goes wrong.
async fn serve(mut io: DuplexStream, books: Arc<Mutex<Books>>) {
    while let Some(head) = head(&mut io).await {
        let (image, wrong, whole, range) = {
            let mut books = books.lock().unwrap();
            let range = asked_range(&head);
            books.ranges.push((range.start, range.end - 1));
            books.heads.push(head);
            (Arc::clone(&books.image), books.wrong(), books.whole, range)
        };
        if answer(&mut io, &image, range, whole, wrong, &books)
            .await
            .is_none()
        {
            return;
        }
    }
}

async fn head(io: &mut DuplexStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

fn asked_range(head: &str) -> Range<usize> {
    let range = head.split_once("range: bytes=").unwrap().1;
    let (first, last) = range.split_once("\r\n").unwrap().0.split_once('-').unwrap();
    first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
}

/// None: the connection is to be closed.
async fn answer(
    io: &mut DuplexStream,
    image: &[u8],
    range: Range<usize>,
    whole: bool,
    wrong: Option<Wrong>,
    books: &Mutex<Books>,
) -> Option<()> {
    let size = image.len();
    let mut body = if whole { image } else { &image[range.clone()] }.to_vec();
    let mut header = match whole {
        true => format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n"),
        false => format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {}-{}/{size}\r\n",
            range.len(),
            range.start,
            range.end - 1
        ),
    };
    let chunked = |header: &str| {
        let (head, rest) = header.split_once("content-length").unwrap();
        let rest = rest.split_once("\r\n").unwrap().1;
        format!("{head}transfer-encoding: chunked\r\n{rest}")
    };
    match wrong {
        Some(Wrong::Flip(at)) if range.contains(&at) => body[at - range.start] ^= 0x20,
        Some(Wrong::OtherRange) => {
            header = header.replace(
                &format!("bytes {}-", range.start),
                &format!("bytes {}-", range.start + 1),
            );
        }
        Some(Wrong::NoRange) => header = header.replace("content-range", "x-range"),
        Some(Wrong::Status(status)) => {
            header = format!(
                "HTTP/1.1 {status} Something\r\ncontent-length: 0\r\nlocation: https://evil.example/\r\n"
            );
            body.clear();
        }
        Some(Wrong::Gzip) => header += "content-encoding: gzip\r\n",
        Some(Wrong::HugeHeader) => {
            io.write_all(b"HTTP/1.1 206 Partial Content\r\nx: ")
                .await
                .ok()?;
            loop {
                io.write_all(&[b'x'; 4096]).await.ok()?;
            }
        }
        Some(Wrong::Noise) => {
            io.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n\r\n")
                .await
                .ok()?;
            return None;
        }
        Some(Wrong::Endless) => {
            io.write_all((chunked(&header) + "\r\n").as_bytes())
                .await
                .ok()?;
            let first = format!("{:x}\r\n", body.len());
            io.write_all(&[first.as_bytes(), &body, b"\r\n"].concat())
                .await
                .ok()?;
            loop {
                io.write_all(&[b"1000\r\n", &[7; 4096][..], b"\r\n"].concat())
                    .await
                    .ok()?;
            }
        }
        _ => {}
    }
    io.write_all((header + "\r\n").as_bytes()).await.ok()?;
    let until = match wrong {
        Some(Wrong::CutAfter(bytes) | Wrong::SilentAfter(bytes)) => bytes.min(body.len()),
        Some(Wrong::Trickle) => 0,
        _ => body.len(),
    };
    for part in body[..until].chunks(10_000) {
        books.lock().unwrap().sent += part.len();
        io.write_all(part).await.ok()?;
    }
    match wrong {
        Some(Wrong::CutAfter(_)) => None,
        Some(Wrong::SilentAfter(_)) => std::future::pending().await,
        Some(Wrong::Trickle) => {
            for byte in body {
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                io.write_all(&[byte]).await.ok()?;
            }
            None
        }
        _ => Some(()),
    }
}
