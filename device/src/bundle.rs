//! A bundle as a file at hand: on a stick, a card, a disk.

use std::{
    fs::{self, File},
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use fwpush_keys::{
    bundle::{Bundle, BundleError},
    dsse::Envelope,
    id::ReleaseId,
    release::Release,
};

/// An open bundle; clones share it. Nothing of it is believed.
#[derive(Debug, Clone)]
pub struct BundleFile {
    bundle: Arc<Mutex<Bundle<File>>>,
}

impl BundleFile {
    /// Opens a bundle and checks its header. Blocks on the medium.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        // Asked before it is opened: opening a pipe would wait for its other end.
        if !fs::metadata(path).map_err(BundleError::Read)?.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(BundleError::Read(error));
        }
        let file = File::open(path).map_err(BundleError::Read)?;
        Ok(Self {
            bundle: Arc::new(Mutex::new(Bundle::open(file)?)),
        })
    }

    /// Bytes of the image, as the bundle says: they are there.
    pub fn image_size(&self) -> u64 {
        self.call(|bundle| bundle.image_size())
    }

    /// The id that the release claims, verified by nobody: to tell whether it is the one under way, and for nothing else.
    pub fn claimed_release(&self) -> Option<ReleaseId> {
        let envelope = self.call(Bundle::release).ok()?;
        let envelope = Envelope::parse(&envelope).ok()?;
        let release = Release::from_payload(envelope.payload()).ok()?;
        Some(release.release_id)
    }

    fn call<T>(&self, call: impl FnOnce(&mut Bundle<File>) -> T) -> T {
        // What a panic left behind is a position in a file, which each read sets.
        let mut bundle = self.bundle.lock().unwrap_or_else(PoisonError::into_inner);
        call(&mut bundle)
    }

    /// Reads something, on a thread that may wait for the medium.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut Bundle<File>) -> Result<T, BundleError> + Send + 'static,
    ) -> Result<T, BundleError> {
        let bundle = self.clone();
        tokio::task::spawn_blocking(move || bundle.call(read))
            .await
            .unwrap_or_else(|error| Err(BundleError::Read(io::Error::other(error))))
    }
}
