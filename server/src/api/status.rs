//! Errors to peers: what they can act on, and no internals. The rest goes to the log.

use tonic::{Code, Status};

use crate::{files::StoreError, wire::with_retry};

/// The trailer that has the words of [`with_next`].
pub const NEXT: &str = "fwpush-next";

pub use crate::wire::{access, db, try_later};

/// What the caller can do about a refusal, in words for the person: the command line shows them as its `next:` line.
pub fn with_next(mut status: Status, next: impl AsRef<str>) -> Status {
    // Words that a header cannot carry are left out; the message stands for itself.
    if let Ok(next) = next.as_ref().parse() {
        status.metadata_mut().insert(NEXT, next);
    }
    status
}

/// What was asked for is not to be had now; the peer is told when to ask again.
pub fn ask_again(why: impl Into<String>) -> Status {
    with_retry(Status::unavailable(why))
}

/// Of an image that is brought or published, and that this node could never serve.
pub fn above_cache(error: StoreError) -> Status {
    let status = Status::failed_precondition(error.to_string());
    let next = "Raise files.cache_bytes in the configuration of each node, and start it again.";
    with_next(status, next)
}

/// Of the file store.
pub fn store(error: StoreError) -> Status {
    let words = error.to_string();
    let code = match error {
        StoreError::Io { .. }
        | StoreError::Open(_)
        | StoreError::Config { .. }
        | StoreError::Client { .. }
        | StoreError::CacheInUse { .. }
        | StoreError::NoCache { .. } => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "The file store failed."
            );
            return Status::unavailable("the file store failed; the server's log says why");
        }
        StoreError::Damaged(_) => {
            tracing::error!(error = words, "The file store failed.");
            return Status::data_loss("the stored file is damaged; the server's log says more");
        }
        StoreError::Away { .. }
        | StoreError::Faulty { .. }
        | StoreError::Refused { .. }
        | StoreError::NoBucket { .. } => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "The image store failed."
            );
            return ask_again(
                "the image store does not answer as it should now; the server's log says more",
            );
        }
        // Logged where it was found out.
        StoreError::NotHereNow | StoreError::AboveCache { .. } => {
            return ask_again("the file is not on this node now; try again later");
        }
        StoreError::Stopping => Code::Unavailable,
        StoreError::UploadBusy => Code::Aborted,
        StoreError::WrongOffset { .. } => Code::FailedPrecondition,
        StoreError::TooLong { .. } | StoreError::TooShort { .. } | StoreError::Size => {
            Code::InvalidArgument
        }
        StoreError::WrongHash { .. } => Code::DataLoss,
    };
    Status::new(code, words)
}
