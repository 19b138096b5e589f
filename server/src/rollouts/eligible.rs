//! Whether a release is for a device, by what the server knows of it. The device judges again, by what is so.

use semver::Version;

use crate::{
    db::{DeviceRecord, ReleaseRow},
    rollout::RolloutAction,
};

/// Why a device is left out of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unfit {
    /// No record has this id.
    UnknownDevice,
    /// The release is for another product.
    Product,
    /// The release is for another channel, or the device's own configuration does not allow its channel.
    Channel,
    /// The release does not name the device's hardware.
    Hardware,
    Blocked,
    /// The release runs on it, confirmed.
    Already,
    /// It runs a newer version, and the rollout is no rollback.
    Newer,
    /// A confirmed image of the device has a higher security counter.
    Floor,
    /// The release does not install over the version that runs.
    Requires,
    /// The device's agent is older than the release needs.
    Agent,
}

impl Unfit {
    /// The stable word of `fwpush.v1.Excluded`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownDevice => "UNKNOWN_DEVICE",
            Self::Product => "PRODUCT",
            Self::Channel => "CHANNEL",
            Self::Hardware => "HARDWARE",
            Self::Blocked => "BLOCKED",
            Self::Already => "ALREADY",
            Self::Newer => "NEWER",
            Self::Floor => "FLOOR",
            Self::Requires => "REQUIRES",
            Self::Agent => "AGENT",
        }
    }
}

/// Judges one device. What is not known of it (a device that never connected runs no known version) speaks for it: it is
/// judged again when it connects.
pub(crate) fn judge(
    release: &ReleaseRow,
    action: RolloutAction,
    device: &DeviceRecord,
) -> Result<(), Unfit> {
    if device.product != release.product {
        return Err(Unfit::Product);
    }
    let allowed = device.channels.is_empty()
        || device
            .channels
            .iter()
            .any(|channel| channel == release.channel.as_str());
    if device.channel != release.channel || !allowed {
        return Err(Unfit::Channel);
    }
    let supported = |range: &fwpush_keys::release::HwRange| {
        range.id == device.hw_id && (range.rev_min..=range.rev_max).contains(&device.hw_rev)
    };
    if !release.hw.iter().any(supported) {
        return Err(Unfit::Hardware);
    }
    if device.blocked {
        return Err(Unfit::Blocked);
    }
    let current = &device.current;
    // An image that fwpush did not install is known by its version only.
    let same = match current.release_id {
        Some(id) => id == release.release_id,
        None => current.version == release.version.to_string(),
    };
    if same && current.confirmed {
        return Err(Unfit::Already);
    }
    let running = Version::parse(&current.version).ok();
    let precedes = |a: &Version, b: &Version| a.cmp_precedence(b).is_lt();
    if let Some(running) = &running {
        if action == RolloutAction::Install && precedes(&release.version, running) {
            return Err(Unfit::Newer);
        }
        let too_old = release
            .from_min
            .as_ref()
            .is_some_and(|min| precedes(running, min));
        let too_new = release
            .from_max
            .as_ref()
            .is_some_and(|max| precedes(max, running));
        if too_old || too_new {
            return Err(Unfit::Requires);
        }
    }
    if current.confirmed && current.security_counter > release.security_counter {
        return Err(Unfit::Floor);
    }
    let agent = Version::parse(&device.agent_version).ok();
    if let (Some(needed), Some(agent)) = (&release.min_agent, &agent)
        && precedes(agent, needed)
    {
        return Err(Unfit::Agent);
    }
    Ok(())
}
