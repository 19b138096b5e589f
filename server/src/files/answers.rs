//! What an S3 server says when it says no, for requests of which the client keeps it to itself.
//!
//! The client gives refusals kinds where it asks for an object, and none where it lists a bucket: a missing bucket, one that lets nobody
//! in, and a server that is broken would look alike. Seen from between the client and the network they do not.

use std::{error::Error, future::Future, pin::Pin};

use http::StatusCode;
use http_body_util::{BodyExt as _, Limited};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpService, ReqwestConnector,
    },
};

use crate::limits;

/// What the server said instead of doing what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{status}: {words}")]
struct Said {
    status: StatusCode,
    /// As far as they are text, and not too long.
    words: String,
}

/// Makes the connections of a bucket.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let network = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Answers(network)))
    }
}

#[derive(Debug)]
struct Answers(HttpClient);

impl HttpService for Answers {
    fn call<'call, 'answer>(
        &'call self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'answer>>
    where
        'call: 'answer,
        Self: 'answer,
    {
        Box::pin(async move {
            let lists = request.uri().query().is_some_and(is_list);
            let response = self.0.execute(request).await?;
            if has_a_kind(response.status(), lists) {
                return Ok(response);
            }
            let status = response.status();
            let words = Limited::new(response.into_body(), limits::S3_WORDS_BYTES)
                .collect()
                .await
                .map(|words| String::from_utf8_lossy(&words.to_bytes()).into_owned());
            let words = words.unwrap_or_default();
            // Of this kind, so that it is not asked again.
            Err(HttpError::new(
                HttpErrorKind::Unknown,
                Said { status, words },
            ))
        })
    }
}

/// `ListObjectsV2` of the S3 API.
fn is_list(query: &str) -> bool {
    query.split('&').any(|part| part == "list-type=2")
}

/// Whether the client makes of the answer what it is: a success, a kind of error, or one after which it asks again.
fn has_a_kind(status: StatusCode, lists: bool) -> bool {
    let again = status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT;
    let refused = status.is_client_error() && status != StatusCode::BAD_REQUEST;
    status.is_success() || status == StatusCode::NOT_MODIFIED || again || (refused && !lists)
}

/// Why a request without a kind of error failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There was no answer, or it broke off.
    Silence,
    /// There is nothing of the name.
    Missing,
    /// It is not for us, or not here.
    Refusal,
    /// The server could not, or answered what is no answer.
    Fault,
}

impl Why {
    pub(super) fn of(error: &object_store::Error) -> Self {
        use object_store::Error as E;
        match error {
            E::NotFound { .. } => return Self::Missing,
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => return Self::Refusal,
            _ => {}
        }
        let first: Option<&(dyn Error + 'static)> = Error::source(error);
        let mut silence = false;
        for cause in std::iter::successors(first, |&error| error.source()) {
            match cause.downcast_ref() {
                Some(Said {
                    status: StatusCode::NOT_FOUND,
                    ..
                }) => return Self::Missing,
                // A line too slow for it, under the code of a wrong request.
                Some(said) if said.words.contains("<Code>RequestTimeout</Code>") => {
                    return Self::Silence;
                }
                Some(_) => return Self::Refusal,
                None => silence |= cause.is::<HttpError>(),
            }
        }
        if silence { Self::Silence } else { Self::Fault }
    }
}
