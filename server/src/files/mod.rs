//! Images by content: a file's name is its BLAKE3 hash, and it never changes.

mod frames;
mod local;
mod mapped;

pub use frames::{DownloadBody, Range};
pub use local::{FileStore, RESTORE_HINT, StoreError, StoredFile, Upload};
pub use mapped::{Damaged, Mapped};
