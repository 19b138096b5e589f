//! What goes wrong in the store of images.

use std::{io, path::PathBuf};

use fwpush_keys::id::FileId;

use crate::limits;

/// What to do about a stored file that is not whole any more.
pub const RESTORE_HINT: &str = "it was cut short, or its disk cannot read it; publish its release again with --image, or restore a backup";

/// What went wrong in the store; the path stands in the source, for the log and not for the peer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{operation} file {file}")]
    Io {
        operation: &'static str,
        file: FileId,
        source: io::Error,
    },
    #[error("stored file {0} is damaged: {hint}", hint = RESTORE_HINT)]
    Damaged(FileId),
    #[error("prepare the file store")]
    Open(#[source] io::Error),
    #[error("another upload of this file is under way")]
    UploadBusy,
    #[error("the upload holds {received} bytes; it goes on there, not at {offset}")]
    WrongOffset { received: u64, offset: u64 },
    #[error("the upload is longer than the {size} bytes announced")]
    TooLong { size: u64 },
    #[error("the upload has {received} of {size} bytes")]
    TooShort { received: u64, size: u64 },
    #[error("the bytes hash to {found}, not to {expected}; the upload was discarded")]
    WrongHash { expected: FileId, found: FileId },
    #[error("an image has 1 to {} bytes", limits::FILE_BYTES)]
    Size,
    /// Of a file that the configuration names.
    #[error("read {}", path.display())]
    Config { path: PathBuf, source: io::Error },
    /// Settings that the client of the bucket does not take.
    #[error("prepare the connection to {bucket}")]
    Client {
        bucket: String,
        source: object_store::Error,
    },
    #[error("another server uses the cache {}: give each node a `files.cache_dir` of its own", path.display())]
    CacheInUse { path: PathBuf },
    #[error("{} holds something else than a cache of images, and was left as it is: give `files.cache_dir` a directory of its own", path.display())]
    NoCache { path: PathBuf },
    /// The bucket does not answer.
    #[error("{operation} in {bucket}: it cannot be reached, or does not answer in time")]
    Away {
        operation: &'static str,
        bucket: String,
        source: object_store::Error,
    },
    /// It answers that it cannot now, or with what S3 does not answer.
    #[error(
        "{operation} in {bucket}: its server is at fault or overloaded, or is no S3 server (`files.endpoint`)"
    )]
    Faulty {
        operation: &'static str,
        bucket: String,
        source: object_store::Error,
    },
    /// It answers, and says no.
    #[error(
        "{operation} in {bucket}: it refuses; look at `files.access_key_id`, `files.secret_key_file`, `files.region`, this machine's \
         clock, and what the bucket's policy allows this key"
    )]
    Refused {
        operation: &'static str,
        bucket: String,
        source: object_store::Error,
    },
    #[error("there is no {bucket} at this endpoint; look at `files.url` and `files.endpoint`")]
    NoBucket {
        bucket: String,
        source: object_store::Error,
    },
    /// It is on its way to this node, or was just not to be had; the log says more.
    #[error("the file is not on this node now; try again")]
    NotHereNow,
    #[error("file {file} has {size} bytes, the cache {most}: raise `files.cache_bytes`")]
    AboveCache { file: FileId, size: u64, most: u64 },
    #[error("the server is stopping; repeat the upload later")]
    Stopping,
}

impl StoreError {
    /// Whether the same call may do better in a while.
    pub fn passes(&self) -> bool {
        matches!(
            self,
            Self::Away { .. }
                | Self::Faulty { .. }
                | Self::Refused { .. }
                | Self::NoBucket { .. }
                | Self::NotHereNow
                | Self::Stopping
        )
    }
}
