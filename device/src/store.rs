//! Where the agent keeps what must outlive a restart: one JSON document and the signed documents beside it.

use std::{fmt, io, path::PathBuf};

use thiserror::Error;

mod dir;
mod memory;
mod place;

pub use dir::DirStore;
#[cfg(test)]
pub(crate) use dir::Documents;
pub use memory::MemoryStore;
pub use place::BadPlace;
pub(crate) use place::look as look_at_place;

/// What the store keeps, each replaced as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Document {
    /// The agent's own state, JSON.
    State,
    /// The signed release that the present update installs, exact envelope bytes.
    Manifest,
    /// A trust root by its version, exact envelope bytes.
    Root(u64),
    /// The newest revocation list, exact envelope bytes.
    Revocation,
}

impl fmt::Display for Document {
    /// The document's file name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Document::State => f.write_str("state.json"),
            Document::Manifest => f.write_str("manifest.json"),
            Document::Root(version) => write!(f, "{version}.root.json"),
            Document::Revocation => f.write_str("revocation.json"),
        }
    }
}

/// Durable storage of a few small documents, outside both slots.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The document, or `None` if it was never saved. Longer than [`crate::limits::DOCUMENT_BYTES`]: an error.
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError>;

    /// Replaces the document. Durable when it returns; after an error or a crash either the old or the new one is there.
    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError>;

    /// Counts groups that are about to be written to a slot, over the whole life of the store. Survives a kill of the
    /// process but need not survive a power cut: it is for people and tests, nothing is decided by it.
    fn count_groups_written(&self, groups: u64);

    /// The count so far.
    fn groups_written(&self) -> u64;
}

/// Why state could not be read or kept.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is larger than {limit} bytes; it is not a document of this agent", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("write the state as JSON")]
    Encode(#[source] serde_json::Error),
    #[error("the state directory {} {place}: choose another state_dir, on storage of its own", path.display())]
    Place { path: PathBuf, place: BadPlace },
    #[error("the state directory {} is in use by another fwpush-device, the agent or an install: stop it, or wait for its end", path.display())]
    InUse { path: PathBuf },
}
