//! Images by content: a file's name is its BLAKE3 hash, and it never changes.

mod answers;
mod arrival;
#[cfg(test)]
mod bucket_tests;
mod cache;
mod cache_dir;
mod error;
mod frames;
mod left;
mod local;
mod mapped;
mod place;
mod remote;
mod s3;
mod store;

pub use error::{RESTORE_HINT, StoreError};
pub use frames::{DownloadBody, Range};
pub use local::{LocalStore, StoredFile, Upload};
pub use mapped::{Damaged, Mapped};
pub use place::{Files, FilesError, FilesPlace, S3Place};
pub use remote::Found;
pub use s3::{Presigned, Stored};
pub use store::FileStore;

/// Runs work that waits for a disk off the async threads.
pub(crate) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|failed| Err(StoreError::Open(std::io::Error::other(failed))))
}
