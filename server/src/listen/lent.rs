//! A connection that HTTP gives back when it is done with it.
//!
//! HTTP would only drop it. To close a socket that has unread bytes (a peer that takes a download says all the time how much it has
//! read) resets the connection, and what was sent last is lost on its way.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
};
use tokio_rustls::server::TlsStream;

/// The connection as HTTP has it.
#[derive(Debug)]
pub(super) struct Lent(Option<(TlsStream<TcpStream>, oneshot::Sender<TcpStream>)>);

impl Lent {
    /// The second part is given the socket when HTTP has dropped the first.
    pub(super) fn new(io: TlsStream<TcpStream>) -> (Self, oneshot::Receiver<TcpStream>) {
        let (back, returned) = oneshot::channel();
        (Self(Some((io, back))), returned)
    }

    fn io(&mut self) -> io::Result<Pin<&mut TlsStream<TcpStream>>> {
        match &mut self.0 {
            Some((io, _)) => Ok(Pin::new(io)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some((io, back)) = self.0.take() {
            // Nobody waits for it where the connection is cut.
            let _ = back.send(io.into_inner().0);
        }
    }
}

impl AsyncRead for Lent {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io()?.poll_read(context, bytes)
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.io()?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io()?.poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|(io, _)| io.is_write_vectored())
    }
}
