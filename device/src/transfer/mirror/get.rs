//! One GET of a range from a mirror: HTTP/1.1 over TLS, no certificate of ours, nothing followed, no more than asked for.

use std::{io, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use fwpush_keys::tls::{TlsError, explain};
use http::{
    HeaderMap, Request, Response, StatusCode, Version,
    header::{
        ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HOST, RANGE, USER_AGENT,
    },
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    channel::Dial,
    limits,
    mirrors::{Mirror, MirrorHost, Verdict},
    transfer::{drain::Chunks, flow::Flow, sink::SinkError},
    words::printable,
};

/// Why a range did not come from a mirror. Never has a word of its url.
#[derive(Debug, Error)]
pub(super) enum MirrorError {
    #[error("there is nobody to judge mirrors by")]
    Roots(#[source] TlsError),
    #[error("its certificate is refused: {0}")]
    Certificate(String),
    #[error("it cannot be reached: {0}")]
    Connect(String),
    #[error("the connection to it was cut: {0}")]
    Cut(String),
    #[error("it stalled: not a byte in {0:?}")]
    Silent(Duration),
    #[error("it is too slow: no 64 KiB in {0:?}")]
    Slow(Duration),
    #[error("it sends us elsewhere (HTTP status {0}), which is not followed")]
    Redirect(u16),
    #[error("it does not take the url any more (HTTP status {0})")]
    Expired(u16),
    #[error("it refused (HTTP status {0})")]
    Status(u16),
    /// Not what a range of a file looks like.
    #[error("it answered with something else: {0}")]
    Answer(&'static str),
    #[error(transparent)]
    Sink(#[from] SinkError),
}

impl MirrorError {
    /// A stable code for logs and reports.
    pub(super) fn code(&self) -> &'static str {
        match self {
            MirrorError::Roots(_) => "MIRROR_ROOTS",
            MirrorError::Certificate(_) => "MIRROR_CERTIFICATE",
            MirrorError::Connect(_) => "MIRROR_UNREACHABLE",
            MirrorError::Cut(_) => "MIRROR_CUT",
            MirrorError::Silent(_) | MirrorError::Slow(_) => "MIRROR_STALLED",
            MirrorError::Redirect(_) => "MIRROR_REDIRECT",
            MirrorError::Expired(_) => "MIRROR_EXPIRED",
            MirrorError::Status(_) => "MIRROR_STATUS",
            MirrorError::Answer(_) => "MIRROR_ANSWER",
            MirrorError::Sink(error) => error.code(),
        }
    }

    /// What follows from it for the mirror.
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            MirrorError::Connect(_) | MirrorError::Cut(_) | MirrorError::Silent(_) => {
                Verdict::Retry
            }
            // Overloaded, or behind something that is.
            MirrorError::Status(408 | 425 | 429 | 500..) => Verdict::Retry,
            MirrorError::Expired(_) => Verdict::Spent,
            MirrorError::Roots(_)
            | MirrorError::Certificate(_)
            | MirrorError::Slow(_)
            | MirrorError::Redirect(_)
            | MirrorError::Status(_)
            | MirrorError::Answer(_)
            | MirrorError::Sink(_) => Verdict::Leave,
        }
    }

    fn connect(error: &io::Error) -> Self {
        let words = printable(&explain(error), limits::WORDS_BYTES);
        let tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::InvalidCertificate(_)) => Self::Certificate(words),
            _ => Self::Connect(words),
        }
    }

    fn cut(error: &hyper::Error) -> Self {
        if error.is_parse() {
            return Self::Answer("it does not speak HTTP/1.1, or its header is too long");
        }
        Self::Cut(printable(&explain(error), limits::WORDS_BYTES))
    }
}

/// How mirrors are reached.
pub(super) struct Reach {
    pub dial: Arc<dyn Dial>,
    pub tls: Arc<rustls::ClientConfig>,
    pub connect_timeout: Duration,
    /// No byte for this long while some are due.
    pub stall: Duration,
}

/// A connection to a mirror, kept for its next range.
pub(super) struct Open {
    host: MirrorHost,
    sender: SendRequest<Empty<Bytes>>,
    /// Reads and writes; ends with us.
    _driver: AbortOnDropHandle<()>,
}

impl Reach {
    async fn open(&self, host: &MirrorHost) -> Result<Open, MirrorError> {
        let address = host.address();
        let dialling = self.dial.dial(&address, Arc::clone(&self.tls));
        let io = timeout(self.connect_timeout, dialling)
            .await
            .map_err(|_| MirrorError::Connect(format!("no answer in {:?}", self.connect_timeout)))?
            .map_err(|error| MirrorError::connect(&error))?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(limits::MIRROR_BUFFER_BYTES)
            .max_header_size(limits::MIRROR_HEADER_BYTES)
            .max_headers(limits::MIRROR_HEADERS)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| MirrorError::cut(&error))?;
        let driver = tokio::spawn(async move {
            // Whoever waits for an answer is told of the error.
            let _ = connection.await;
        });
        Ok(Open {
            host: host.clone(),
            sender,
            _driver: AbortOnDropHandle::new(driver),
        })
    }

    /// Asks a mirror for a range of a file of `size` bytes, over a connection that is open already where it leads there. An
    /// answer that is not that range ends in an error before a byte of it is taken.
    pub(super) async fn get(
        &self,
        mirror: &Mirror,
        open: Option<Open>,
        size: u64,
        flow: Flow,
    ) -> Result<Answer, MirrorError> {
        let range = flow.offset()..flow.offset() + flow.left();
        let kept = open.filter(|open| open.host == mirror.host);
        let response = match kept {
            Some(mut open) => match self.ask(&mut open, mirror, &range).await {
                Ok(response) => Ok((open, response)),
                // It was closed while nothing was asked for: that is nobody's failure.
                Err(MirrorError::Cut(_)) => self.ask_anew(mirror, &range).await,
                Err(error) => Err(error),
            },
            None => self.ask_anew(mirror, &range).await,
        };
        let (open, response) = response?;
        let whole = judge(&response, &range, size)?;
        Ok(Answer {
            body: response.into_body(),
            flow,
            whole: whole && range.end < size,
            stall: self.stall,
            waits_since: None,
            open: Some(open),
        })
    }

    async fn ask_anew(
        &self,
        mirror: &Mirror,
        range: &Range<u64>,
    ) -> Result<(Open, Response<Incoming>), MirrorError> {
        let mut open = self.open(&mirror.host).await?;
        let response = self.ask(&mut open, mirror, range).await?;
        Ok((open, response))
    }

    async fn ask(
        &self,
        open: &mut Open,
        mirror: &Mirror,
        range: &Range<u64>,
    ) -> Result<Response<Incoming>, MirrorError> {
        let request = Request::get(mirror.path.as_str())
            .header(HOST, mirror.host.to_string())
            .header(
                USER_AGENT,
                format!("fwpush-device/{}", crate::agent_version()),
            )
            .header(ACCEPT_ENCODING, "identity")
            .header(RANGE, format!("bytes={}-{}", range.start, range.end - 1))
            .body(Empty::new())
            .map_err(|_| MirrorError::Answer("its url is none that can be asked for"))?;
        let asked = async {
            open.sender.ready().await?;
            open.sender.send_request(request).await
        };
        timeout(self.stall, asked)
            .await
            .map_err(|_| MirrorError::Silent(self.stall))?
            .map_err(|error| MirrorError::cut(&error))
    }
}

/// Whether the answer is the range that was asked for, or else, true, the whole file from its beginning.
fn judge<B>(response: &Response<B>, range: &Range<u64>, size: u64) -> Result<bool, MirrorError> {
    let status = response.status();
    let headers = response.headers();
    let whole = match status {
        StatusCode::PARTIAL_CONTENT => false,
        StatusCode::OK => true,
        StatusCode::FORBIDDEN | StatusCode::GONE => {
            return Err(MirrorError::Expired(status.as_u16()));
        }
        _ if status.is_redirection() => return Err(MirrorError::Redirect(status.as_u16())),
        _ => return Err(MirrorError::Status(status.as_u16())),
    };
    if response.version() != Version::HTTP_11 && response.version() != Version::HTTP_10 {
        return Err(MirrorError::Answer("it does not speak HTTP/1.1"));
    }
    if one(headers, CONTENT_ENCODING)?
        .is_some_and(|coding| !coding.eq_ignore_ascii_case("identity"))
    {
        return Err(MirrorError::Answer("an encoded file"));
    }
    if whole {
        if range.start > 0 {
            return Err(MirrorError::Answer("the whole file instead of a range"));
        }
        if length(headers)?.is_some_and(|length| length != size) {
            return Err(MirrorError::Answer("a file of another size"));
        }
        return Ok(true);
    }
    let told = one(headers, CONTENT_RANGE)?.and_then(content_range);
    let (first, last, total) = told.ok_or(MirrorError::Answer("a part without saying which"))?;
    if total.is_some_and(|total| total != size) {
        return Err(MirrorError::Answer("a part of a file of another size"));
    }
    if first != range.start || last != range.end - 1 {
        return Err(MirrorError::Answer("another range"));
    }
    if length(headers)?.is_some_and(|length| length != range.end - range.start) {
        return Err(MirrorError::Answer("a part of another length"));
    }
    Ok(false)
}

/// A header that may stand there once.
fn one(headers: &HeaderMap, name: http::HeaderName) -> Result<Option<&str>, MirrorError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(MirrorError::Answer("a header twice"));
    }
    let unreadable = |_| MirrorError::Answer("a header that cannot be read");
    first
        .map(|value| value.to_str().map_err(unreadable))
        .transpose()
}

fn length(headers: &HeaderMap) -> Result<Option<u64>, MirrorError> {
    let unreadable = |_| MirrorError::Answer("a length that is no number");
    one(headers, CONTENT_LENGTH)?
        .map(|length| length.parse().map_err(unreadable))
        .transpose()
}

/// `bytes 0-65535/1000000` or `bytes 0-65535/*` (RFC 9110, 14.4): first, last, size.
fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, size) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let size = match size {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    Some((first.parse().ok()?, last.parse().ok()?, size))
}

/// The bytes of one answer.
pub(super) struct Answer {
    body: Incoming,
    flow: Flow,
    /// It is more than was asked for, from the same beginning: what follows is not read.
    whole: bool,
    stall: Duration,
    /// Since when bytes are waited for.
    waits_since: Option<Instant>,
    open: Option<Open>,
}

impl Answer {
    /// The connection, where it can be asked for more.
    pub(super) fn into_open(self) -> Option<Open> {
        self.open
    }

    /// The body ends where the range does.
    async fn end(&mut self) -> Result<Option<Bytes>, MirrorError> {
        if self.whole {
            self.open = None;
            return Ok(None);
        }
        match timeout(limits::TRAILERS_TIMEOUT, self.body.frame()).await {
            Ok(None) => Ok(None),
            Ok(Some(Ok(frame))) if frame.is_data() => {
                Err(MirrorError::Answer("more bytes than were asked for"))
            }
            // What was asked for is here.
            Ok(Some(_)) | Err(_) => {
                self.open = None;
                Ok(None)
            }
        }
    }
}

impl Chunks for Answer {
    type Error = MirrorError;

    async fn next(&mut self) -> Result<Option<Bytes>, MirrorError> {
        if self.flow.left() == 0 {
            return self.end().await;
        }
        self.flow.wait().await;
        let stalled_at = *self.waits_since.get_or_insert_with(Instant::now) + self.stall;
        let frame = tokio::select! {
            biased;
            frame = self.body.frame() => frame,
            () = sleep_until(self.flow.give_up()) => {
                return Err(MirrorError::Slow(self.flow.group_timeout()));
            }
            () = sleep_until(stalled_at) => return Err(MirrorError::Silent(self.stall)),
        };
        let frame = frame
            .ok_or_else(|| MirrorError::Cut("the answer ended early".to_owned()))?
            .map_err(|error| MirrorError::cut(&error))?;
        let mut bytes = frame
            .into_data()
            .map_err(|_| MirrorError::Cut("the answer ended early".to_owned()))?;
        let left = self.flow.left();
        if bytes.len() as u64 > left {
            if !self.whole {
                return Err(MirrorError::Answer("more bytes than were asked for"));
            }
            // It fits: `left` is less than a length.
            bytes.truncate(left as usize);
        }
        if !bytes.is_empty() {
            self.waits_since = None;
        }
        self.flow.arrived(bytes.len() as u64);
        Ok(Some(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1_000_000;

    fn response(status: u16, headers: &[(&str, &str)]) -> Response<()> {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap()
    }

    fn judged(status: u16, headers: &[(&str, &str)]) -> Result<bool, &'static str> {
        judge(&response(status, headers), &(0..65_536), SIZE).map_err(|error| error.code())
    }

    #[test]
    fn only_the_range_that_was_asked_for_is_taken() {
        let right = ("content-range", "bytes 0-65535/1000000");
        assert_eq!(judged(206, &[right]), Ok(false));
        assert_eq!(
            judged(206, &[right, ("content-length", "65536")]),
            Ok(false)
        );
        assert_eq!(
            judged(206, &[("content-range", "bytes 0-65535/*")]),
            Ok(false)
        );
        for wrong in [
            "bytes 0-65536/1000000",
            "bytes 1-65535/1000000",
            "bytes 65536-131071/1000000",
            "bytes 0-65535/1000001",
            "bytes */1000000",
            "bytes 0-65535",
            "items 0-65535/1000000",
            "bytes 0--1/1000000",
            "bytes 0-18446744073709551616/1000000",
            "",
        ] {
            assert_eq!(
                judged(206, &[("content-range", wrong)]),
                Err("MIRROR_ANSWER"),
                "{wrong:?}"
            );
        }
        assert_eq!(judged(206, &[]), Err("MIRROR_ANSWER"));
        assert_eq!(judged(206, &[right, right]), Err("MIRROR_ANSWER"));
        assert_eq!(
            judged(206, &[right, ("content-length", "65537")]),
            Err("MIRROR_ANSWER")
        );
        assert_eq!(
            judged(206, &[("content-type", "multipart/byteranges; boundary=x")]),
            Err("MIRROR_ANSWER")
        );
    }

    #[test]
    fn the_whole_file_is_taken_only_where_its_beginning_was_asked_for() {
        assert_eq!(judged(200, &[]), Ok(true));
        assert_eq!(judged(200, &[("content-length", "1000000")]), Ok(true));
        assert_eq!(
            judged(200, &[("content-length", "999999")]),
            Err("MIRROR_ANSWER")
        );
        let later = judge(&response(200, &[]), &(65_536..131_072), SIZE);
        assert_eq!(later.unwrap_err().code(), "MIRROR_ANSWER");
    }

    #[test]
    fn what_is_encoded_is_refused() {
        let right = ("content-range", "bytes 0-65535/1000000");
        for coding in ["gzip", "br", "identity, gzip", ""] {
            assert_eq!(
                judged(206, &[right, ("content-encoding", coding)]),
                Err("MIRROR_ANSWER"),
                "{coding}"
            );
        }
        assert_eq!(
            judged(206, &[right, ("content-encoding", "Identity")]),
            Ok(false)
        );
    }

    #[test]
    fn a_status_says_whether_the_mirror_is_left_tried_again_or_asked_for_anew() {
        for (status, code, verdict) in [
            (301, "MIRROR_REDIRECT", Verdict::Leave),
            (304, "MIRROR_REDIRECT", Verdict::Leave),
            (307, "MIRROR_REDIRECT", Verdict::Leave),
            (400, "MIRROR_STATUS", Verdict::Leave),
            (401, "MIRROR_STATUS", Verdict::Leave),
            (403, "MIRROR_EXPIRED", Verdict::Spent),
            (404, "MIRROR_STATUS", Verdict::Leave),
            (410, "MIRROR_EXPIRED", Verdict::Spent),
            (416, "MIRROR_STATUS", Verdict::Leave),
            (429, "MIRROR_STATUS", Verdict::Retry),
            (503, "MIRROR_STATUS", Verdict::Retry),
            (204, "MIRROR_STATUS", Verdict::Leave),
        ] {
            let error = judge(&response(status, &[]), &(0..65_536), SIZE).unwrap_err();
            assert_eq!((error.code(), error.verdict()), (code, verdict), "{status}");
        }
    }
}
