//! What a device says of itself, checked against its bounds.

use std::collections::BTreeMap;

use fwpush_keys::id::{Channel, HwId, InvalidId, Product, ReleaseId};
use fwpush_proto::v1;

use crate::{db::RunningImage, limits};

/// Parsed [`v1::DeviceFacts`]. Every text is bounded and every number at most 2^53 - 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// 32 hex digits; made with the device's state directory.
    pub state_id: String,
    /// A claim; the record decides.
    pub product: String,
    pub hw_id: String,
    pub hw_rev: u32,
    pub channels: Vec<String>,
    pub attributes: BTreeMap<String, String>,
    /// A semantic version.
    pub agent_version: String,
    pub current: RunningImage,
    /// The newest generation whose notice the device has handled; 0 for none.
    pub observed_generation: u64,
    pub boot_id: String,
    pub boot_count: u64,
    /// The newest `seq` that the device has given out.
    pub last_report_seq: u64,
}

/// Facts that cannot be used: INVALID_ARGUMENT to the device. Names the field.
#[derive(Debug, thiserror::Error)]
pub enum InvalidFacts {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field}: {problem}")]
    Invalid {
        field: &'static str,
        problem: String,
    },
    #[error("{field}: more than {most}")]
    TooMuch { field: &'static str, most: u64 },
}

fn invalid(field: &'static str, problem: impl ToString) -> InvalidFacts {
    InvalidFacts::Invalid {
        field,
        problem: problem.to_string(),
    }
}

impl Facts {
    /// Checks every bound of the message; the device's ids are only compared with its record later.
    pub fn parse(facts: &v1::DeviceFacts) -> Result<Self, InvalidFacts> {
        let id =
            |field, result: Result<(), InvalidId>| result.map_err(|error| invalid(field, error));
        id("product", facts.product.parse::<Product>().map(|_| ()))?;
        id("hw_id", facts.hw_id.parse::<HwId>().map(|_| ()))?;
        at_most("channels", facts.channels.len(), limits::CHANNELS)?;
        for channel in &facts.channels {
            id("channels", channel.parse::<Channel>().map(|_| ()))?;
        }
        at_most("attributes", facts.attributes.len(), limits::ATTRIBUTES)?;
        let attribute_bytes = facts
            .attributes
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        at_most("attributes", attribute_bytes, limits::ATTRIBUTE_BYTES)?;
        let state_id = &facts.state_id;
        if state_id.len() != 32
            || !state_id
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        {
            return Err(invalid("state_id", "wanted 32 lower-case hex digits"));
        }
        at_most("boot_id", facts.boot_id.len(), limits::BOOT_ID_BYTES)?;
        let current = facts
            .current
            .as_ref()
            .ok_or(InvalidFacts::Missing { field: "current" })?;
        Ok(Self {
            state_id: state_id.clone(),
            product: facts.product.clone(),
            hw_id: facts.hw_id.clone(),
            hw_rev: facts.hw_rev,
            channels: facts.channels.clone(),
            attributes: facts
                .attributes
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            agent_version: version("agent_version", &facts.agent_version)?,
            current: running("current", current)?,
            observed_generation: number("observed_generation", facts.observed_generation)?,
            boot_id: facts.boot_id.clone(),
            boot_count: number("boot_count", facts.boot_count)?,
            last_report_seq: number("last_report_seq", facts.last_report_seq)?,
        })
    }
}

/// A running image as a device reports it, checked like the rest.
pub fn running(
    field: &'static str,
    image: &v1::RunningImage,
) -> Result<RunningImage, InvalidFacts> {
    let release_id: Option<ReleaseId> = match image.release_id.as_str() {
        "" => None,
        id => Some(id.parse().map_err(|error| invalid(field, error))?),
    };
    if !matches!(image.slot.as_str(), "" | "a" | "b") {
        return Err(invalid(field, "slot must be a or b"));
    }
    Ok(RunningImage {
        release_id,
        version: version(field, &image.version)?,
        security_counter: number(field, image.security_counter)?,
        slot: image.slot.clone(),
        confirmed: image.confirmed,
    })
}

/// A number that every part of the system can hold.
pub fn number(field: &'static str, number: u64) -> Result<u64, InvalidFacts> {
    if number > limits::NUMBER {
        return Err(InvalidFacts::TooMuch {
            field,
            most: limits::NUMBER,
        });
    }
    Ok(number)
}

fn version(field: &'static str, text: &str) -> Result<String, InvalidFacts> {
    at_most(field, text.len(), limits::VERSION_BYTES)?;
    let version = semver::Version::parse(text).map_err(|error| invalid(field, error))?;
    Ok(version.to_string())
}

fn at_most(field: &'static str, found: usize, most: usize) -> Result<(), InvalidFacts> {
    if found > most {
        return Err(InvalidFacts::TooMuch {
            field,
            most: most as u64,
        });
    }
    Ok(())
}
