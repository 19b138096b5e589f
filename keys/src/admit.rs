//! Whether a device may install a verified release now.

use semver::Version;

use crate::id::{Channel, HwId, Product};
use crate::release::{Release, Requires};
use crate::revocation::{Revocation, RevocationVersion};
use crate::root::Root;
use crate::time::Timestamp;
use crate::trust::Verified;

/// What a device knows of itself and of the time.
#[derive(Debug, Clone, Copy)]
pub struct AdmitFacts<'a> {
    /// Its product.
    pub product: &'a Product,
    /// Its hardware model.
    pub hw_id: &'a HwId,
    /// Its hardware revision.
    pub hw_rev: u32,
    /// The channels that its own configuration allows.
    pub channels: &'a [Channel],
    /// What it runs; `None` when that is not known.
    pub running_version: Option<&'a Version>,
    /// The highest security counter that it ran healthily.
    pub floor: u64,
    /// Version of the agent.
    pub agent_version: &'a Version,
    /// The newest revocation list it holds.
    pub revocation: Option<&'a Verified<Revocation>>,
    /// The newest root it holds.
    pub root: &'a Verified<Root>,
    /// Trusted time: see [`crate::clock`].
    pub now: Timestamp,
}

/// Why a verified release is not installed on this device now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// For another product, or one that the present root does not list.
    #[error("release is for product {release}, this device is a {device}")]
    Product {
        /// The release's.
        release: Product,
        /// The device's.
        device: Product,
    },
    /// The root dropped the product since the release was made.
    #[error("product {product} is not in root version {root_version} any more")]
    ProductWithdrawn {
        /// The product.
        product: Product,
        /// The present root.
        root_version: u64,
    },
    /// From a channel that the device's own configuration does not allow.
    #[error("release is in channel {0}, which this device is not configured for")]
    Channel(Channel),
    /// Made for other hardware.
    #[error("release does not support hardware {id} revision {rev}")]
    Hardware {
        /// The device's model.
        id: HwId,
        /// The device's revision.
        rev: u32,
    },
    /// Older, in the sense of security, than what ran healthily here before.
    #[error("security counter {counter} is below this device's floor {floor}")]
    Floor {
        /// The release's.
        counter: u64,
        /// The device's.
        floor: u64,
    },
    /// The root lowered what it allows since the release was made.
    #[error("security counter {counter} is above the {max} that the present root allows")]
    Counter {
        /// The release's.
        counter: u64,
        /// The root's.
        max: u64,
    },
    /// Does not start from what runs here.
    #[error("release installs over {needed}, this device runs {running}")]
    Requires {
        /// Which versions it starts from, in words.
        needed: String,
        /// What the device runs, in words.
        running: String,
    },
    /// Needs a newer agent.
    #[error("release needs agent {needed} or newer, this is {agent}")]
    Agent {
        /// The oldest that can.
        needed: Version,
        /// This one.
        agent: Version,
    },
    /// Revoked by name.
    #[error("release is revoked: {reason}")]
    Revoked {
        /// Why, as the list says.
        reason: String,
    },
    /// Revoked by its counter.
    #[error("security counter {counter} is below {min}, under which all releases are revoked")]
    RevocationCounter {
        /// The release's.
        counter: u64,
        /// The list's.
        min: u64,
    },
    /// The release names a revocation list that the device does not have yet.
    #[error("release needs revocation list {needed}, this device holds {held}")]
    RevocationMissing {
        /// At least this.
        needed: RevocationVersion,
        /// (0, 0) for none.
        held: RevocationVersion,
    },
    /// Too late.
    #[error("release expired at {0}")]
    ReleaseExpired(Timestamp),
    /// The root must be replaced first.
    #[error("root version {version} expired at {expires}")]
    RootExpired {
        /// Which root.
        version: u64,
        /// When.
        expires: Timestamp,
    },
}

impl Refusal {
    /// A stable word for reports.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Product { .. } | Self::ProductWithdrawn { .. } => "PRODUCT",
            Self::Channel(_) => "CHANNEL",
            Self::Hardware { .. } => "HARDWARE",
            Self::Floor { .. } => "FLOOR",
            Self::Counter { .. } => "COUNTER",
            Self::Requires { .. } => "REQUIRES",
            Self::Agent { .. } => "AGENT",
            Self::Revoked { .. } => "REVOKED",
            Self::RevocationCounter { .. } => "REVOCATION_COUNTER",
            Self::RevocationMissing { .. } => "REVOCATION_MISSING",
            Self::ReleaseExpired(_) => "RELEASE_EXPIRED",
            Self::RootExpired { .. } => "ROOT_EXPIRED",
        }
    }
}

fn from_span(requires: &Requires) -> String {
    match (&requires.from_min, &requires.from_max) {
        (Some(min), Some(max)) => format!("{min} to {max}"),
        (Some(min), None) => format!("{min} or newer"),
        (None, Some(max)) => format!("{max} or older"),
        (None, None) => "any version".to_owned(),
    }
}

/// Judges a release for a device. Ok means that nothing in the documents forbids installing it; space, power and the
/// user's wishes are the agent's own matter. Used for an INSTALL and a ROLLBACK alike, and again right before the trial.
pub fn admit(release: &Verified<Release>, facts: &AdmitFacts<'_>) -> Result<(), Refusal> {
    admit_device(release, facts)?;
    admit_root(release, facts)?;
    admit_revocation(release, facts)?;
    if facts.now >= release.expires {
        return Err(Refusal::ReleaseExpired(release.expires));
    }
    Ok(())
}

/// What depends on the device alone.
fn admit_device(release: &Release, facts: &AdmitFacts<'_>) -> Result<(), Refusal> {
    if release.product != *facts.product {
        return Err(Refusal::Product {
            release: release.product.clone(),
            device: facts.product.clone(),
        });
    }
    if !facts.channels.contains(&release.channel) {
        return Err(Refusal::Channel(release.channel.clone()));
    }
    if !release.supports_hw(facts.hw_id, facts.hw_rev) {
        return Err(Refusal::Hardware {
            id: facts.hw_id.clone(),
            rev: facts.hw_rev,
        });
    }
    if release.security_counter < facts.floor {
        return Err(Refusal::Floor {
            counter: release.security_counter,
            floor: facts.floor,
        });
    }
    if !starts_from(&release.requires, facts.running_version) {
        return Err(Refusal::Requires {
            needed: from_span(&release.requires),
            running: facts
                .running_version
                .map_or_else(|| "an unknown version".to_owned(), Version::to_string),
        });
    }
    match &release.min_agent {
        Some(needed) if facts.agent_version.cmp_precedence(needed).is_lt() => Err(Refusal::Agent {
            needed: needed.clone(),
            agent: facts.agent_version.clone(),
        }),
        _ => Ok(()),
    }
}

/// Whether the running version is in the range. Build metadata does not count (SemVer 2.0 section 10). An unknown version
/// satisfies no condition.
fn starts_from(requires: &Requires, running: Option<&Version>) -> bool {
    let above_min = |min: &Version| running.is_some_and(|v| v.cmp_precedence(min).is_ge());
    let below_max = |max: &Version| running.is_some_and(|v| v.cmp_precedence(max).is_le());
    requires.from_min.as_ref().is_none_or(above_min)
        && requires.from_max.as_ref().is_none_or(below_max)
}

/// The release may have been verified under an older root than the present one.
fn admit_root(release: &Release, facts: &AdmitFacts<'_>) -> Result<(), Refusal> {
    let Some(rule) = facts.root.products.get(facts.product) else {
        return Err(Refusal::ProductWithdrawn {
            product: facts.product.clone(),
            root_version: facts.root.version,
        });
    };
    if release.security_counter > rule.max_counter {
        return Err(Refusal::Counter {
            counter: release.security_counter,
            max: rule.max_counter,
        });
    }
    if facts.root.check_expiry(facts.now).is_err() {
        return Err(Refusal::RootExpired {
            version: facts.root.version,
            expires: facts.root.expires,
        });
    }
    Ok(())
}

/// An expired list binds on; one of another product is none.
fn admit_revocation(release: &Release, facts: &AdmitFacts<'_>) -> Result<(), Refusal> {
    let list = facts
        .revocation
        .filter(|list| list.product == *facts.product);
    let held = list.map_or(RevocationVersion::NONE, |list| list.list_version());
    let needed = release.revocation_version;
    if held < needed {
        return Err(Refusal::RevocationMissing { needed, held });
    }
    let Some(list) = list else { return Ok(()) };
    if let Some(entry) = list.find(&release.release_id) {
        return Err(Refusal::Revoked {
            reason: entry.reason.clone(),
        });
    }
    if release.security_counter < list.min_security_counter {
        return Err(Refusal::RevocationCounter {
            counter: release.security_counter,
            min: list.min_security_counter,
        });
    }
    Ok(())
}
