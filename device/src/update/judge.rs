//! Is this release to be believed, and is it for this device? The only way to an [`Admitted`] release.

use fwpush_keys::{
    TrustStore,
    admit::{self, AdmitFacts},
    error_text,
    id::FileId,
    release::Release,
    time::Timestamp,
    trust::Verified,
};

use super::{
    facts::{BootView, DeviceFacts, ImageFacts},
    report::Failure,
};

/// A release that was verified against the present root and passed every check of this device. Nothing is fetched or
/// installed without one.
#[derive(Debug, Clone)]
pub struct Admitted(Verified<Release>);

impl Admitted {
    /// Name of the plain image's file.
    pub fn file_id(&self) -> FileId {
        self.0.plain().blake3
    }

    /// The image, as it will be recorded.
    pub fn image(&self) -> ImageFacts {
        image_of(&self.0)
    }
}

/// The device's side of the judgement.
pub(super) struct Judge<'a> {
    pub device: &'a DeviceFacts,
    pub boot: &'a BootView,
    pub floor: u64,
    pub spare_capacity: u64,
}

/// Code of a refusal that a newer revocation list may lift.
pub(super) const LIST_MISSING: &str = "REVOCATION_MISSING";

/// Verifies a manifest for the device's own product. `file_id`, where the server suggested one, must be among its files.
pub(super) fn verify(
    trust: &mut TrustStore,
    device: &DeviceFacts,
    envelope: &[u8],
    file_id: Option<&str>,
) -> Result<Verified<Release>, Failure> {
    let release = trust
        .accept_release(&device.product, envelope)
        .map_err(|error| Failure::new(error.code(), error_text(&error)))?;
    if let Some(file_id) = file_id {
        let named = file_id
            .parse::<FileId>()
            .is_ok_and(|id| release.file_ids().any(|file| file == id));
        if !named {
            return Err(Failure::new(
                "FILE_ID",
                "the file of the notice is not one that the manifest names",
            ));
        }
    }
    Ok(release)
}

impl Judge<'_> {
    /// Checks all that does not pass by waiting, but for [`LIST_MISSING`].
    pub(super) fn admit(
        &self,
        release: Verified<Release>,
        trust: &TrustStore,
        now: Timestamp,
    ) -> Result<Admitted, Failure> {
        let running = self.boot.running_slot().image.as_ref();
        let facts = AdmitFacts {
            product: &self.device.product,
            hw_id: &self.device.hw_id,
            hw_rev: self.device.hw_rev,
            channels: &self.device.channels,
            running_version: running.map(|image| &image.version),
            floor: self.floor,
            agent_version: &self.device.agent_version,
            revocation: trust.revocation(&self.device.product),
            root: trust.root(),
            now,
        };
        admit::admit(&release, &facts)
            .map_err(|refusal| Failure::new(refusal.code(), refusal.to_string()))?;
        // The manifest's size, before anything is allocated or asked for by it.
        let size = release.image().size;
        if size > self.spare_capacity {
            let message = format!(
                "the image has {size} bytes; a slot holds {}",
                self.spare_capacity
            );
            return Err(Failure::new("SLOT_TOO_SMALL", message));
        }
        Ok(Admitted(release))
    }
}

/// The image of a release, as it is recorded.
pub(super) fn image_of(release: &Release) -> ImageFacts {
    ImageFacts {
        release_id: Some(release.release_id),
        version: release.version.clone(),
        security_counter: release.security_counter,
        size: release.image().size,
        blake3: Some(release.image().blake3),
    }
}
