//! Errors to peers: what they can act on, and no internals. The rest goes to the log.

use tonic::{Code, Status};

use crate::{access, files::StoreError, limits};

/// The trailer that has the words of [`with_next`].
pub const NEXT: &str = "fwpush-next";

/// Of the database.
pub use crate::wire::db;

/// Of a device that may not be served.
pub fn access(refused: access::Refused) -> Status {
    match refused {
        access::Refused::Database(error) => db(error),
        // Its number is the device's choice: no line in the log for each.
        access::Refused::Hasty(_) => try_later(refused.to_string()),
        refused => {
            tracing::info!(reason = %refused, "A device was refused.");
            Status::permission_denied(refused.to_string())
        }
    }
}

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
    let mut status = Status::unavailable(why);
    let retry = limits::DOWNLOAD_RETRY.as_millis() as u64;
    status.metadata_mut().insert("retry-after-ms", retry.into());
    status
}

/// Too much now; the device is told when to ask again.
pub fn try_later(why: impl Into<String>) -> Status {
    let mut status = Status::new(Code::ResourceExhausted, why);
    let retry = limits::DOWNLOAD_RETRY.as_millis() as u64;
    status.metadata_mut().insert("retry-after-ms", retry.into());
    status
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
