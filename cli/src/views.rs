//! What the server's answers look like: as JSON for programs, as text for people.

use fwpush_keys::{Envelope, PublicKey, Release as Manifest, Root, Timestamp};
use fwpush_proto::v1::{
    Action, Device, DeviceDetail, Release, Rollout, RolloutDevice, RolloutPreview, RolloutState,
    RunningImage, UpdateError,
};
use serde_json::{Map, Value, json};

use crate::{
    output::{Facts, Table, bytes, json_time, plural, time},
    progress::{line, phase_id, phase_words},
    values::hw_words,
};

// ---- Releases ----

pub fn release_json(release: &Release) -> Value {
    let hw: Vec<Value> = release
        .hw
        .iter()
        .map(|hw| json!({ "id": hw.id, "rev_min": hw.rev_min, "rev_max": hw.rev_max }))
        .collect();
    json!({
        "release_id": release.release_id,
        "product": release.product,
        "channel": release.channel,
        "version": release.version,
        "seq": release.seq,
        "security_counter": release.security_counter,
        "file_id": release.file_id,
        "size": release.size,
        "file_name": release.file_name,
        "issued": json_time(release.issued_at_ms),
        "expires": json_time(release.expires_at_ms),
        "published": json_time(release.published_at_ms),
        "revoked": release.revoked,
        "hw": hw,
    })
}

pub fn release_text(release: &Release) -> String {
    let hw: Vec<String> = release
        .hw
        .iter()
        .map(|hw| hw_words(&hw.id, hw.rev_min, hw.rev_max))
        .collect();
    let mut facts = Facts::default();
    facts
        .add("release", &release.release_id)
        .add(
            "product",
            format!("{}, channel {}", release.product, release.channel),
        )
        .add("version", &release.version)
        .add("hardware", hw.join(", "))
        .add(
            "image",
            format!(
                "{} ({}), {}",
                release.file_name,
                bytes(release.size),
                release.file_id
            ),
        )
        .add("seq", release.seq.to_string())
        .add("security counter", release.security_counter.to_string())
        .add("issued", time(release.issued_at_ms))
        .add("expires", time(release.expires_at_ms))
        .add("published", time(release.published_at_ms));
    if release.revoked {
        facts.add("revoked", "yes");
    }
    facts.text()
}

pub fn releases_text(releases: &[Release]) -> String {
    let mut table = Table::new([
        "RELEASE",
        "PRODUCT",
        "CHANNEL",
        "VERSION",
        "COUNTER",
        "SIZE",
        "PUBLISHED",
        "STATE",
    ]);
    for release in releases {
        table.row([
            release.release_id.clone(),
            release.product.clone(),
            release.channel.clone(),
            release.version.clone(),
            release.security_counter.to_string(),
            bytes(release.size),
            time(release.published_at_ms),
            release_state(release),
        ]);
    }
    table.or("No releases. Make one with `fwpush release FILE`.")
}

fn release_state(release: &Release) -> String {
    if release.revoked {
        "revoked".to_owned()
    } else if release.expires_at_ms <= Timestamp::now().as_ms() {
        "expired".to_owned()
    } else {
        String::new()
    }
}

/// What a manifest says and who has signed it. `root` gives the signers' standing.
pub fn manifest_json(manifest: &Manifest, envelope: &Envelope, root: Option<&Root>) -> Value {
    json!({
        "manifest": manifest,
        "signatures": envelope.signatures().iter().map(|signature| json!(signature.keyid)).collect::<Vec<_>>(),
        "needed": root.and_then(|root| root.release_keys(&manifest.product)).map(|role| role.threshold),
        "valid": root.map(|root| valid_signers(manifest, envelope, root).len()),
    })
}

/// The distinct keys of the product that have signed.
pub fn valid_signers(manifest: &Manifest, envelope: &Envelope, root: &Root) -> Vec<PublicKey> {
    let Some(role) = root.release_keys(&manifest.product) else {
        return Vec::new();
    };
    envelope
        .signers(root.public_keys(&role))
        .into_iter()
        .collect()
}

pub fn manifest_text(manifest: &Manifest) -> String {
    let image = manifest.image();
    let hw: Vec<String> = manifest
        .hw
        .iter()
        .map(|hw| hw_words(hw.id.as_str(), hw.rev_min, hw.rev_max))
        .collect();
    let optional = |version: &Option<semver::Version>| {
        version
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    let mut facts = Facts::default();
    facts
        .add("release", manifest.release_id.to_string())
        .add(
            "product",
            format!("{}, channel {}", manifest.product, manifest.channel),
        )
        .add("version", manifest.version.to_string())
        .add("hardware", hw.join(", "))
        .add(
            "image",
            format!("{} bytes ({})", image.size, bytes(image.size)),
        )
        .add("blake3", image.blake3.to_string())
        .add("sha256", &image.sha256)
        .add("seq", manifest.seq.to_string())
        .add("security counter", manifest.security_counter.to_string())
        .add("issued", manifest.issued.to_string())
        .add("expires", manifest.expires.to_string())
        .add_some("updates from", optional(&manifest.requires.from_min))
        .add_some("updates up to", optional(&manifest.requires.from_max))
        .add_some("agent from", optional(&manifest.min_agent))
        .add_some("class", manifest.class.as_deref().unwrap_or_default())
        .add_some(
            "advisory",
            manifest.advisory_url.as_deref().unwrap_or_default(),
        );
    if !manifest.revocation_version.is_none() {
        facts.add("revocation list", manifest.revocation_version.to_string());
    }
    facts.text()
}

// ---- Rollouts ----

/// The protocol's word for an action: `INSTALL`.
fn action_id(action: Action) -> &'static str {
    action.as_str_name().trim_start_matches("ACTION_")
}

/// The protocol's word for a rollout's state: `COMPLETE`.
fn state_id(state: RolloutState) -> &'static str {
    state.as_str_name().trim_start_matches("ROLLOUT_STATE_")
}

/// What a person calls a rollout's state.
pub fn state_words(state: RolloutState) -> String {
    state_id(state).to_ascii_lowercase()
}

pub fn rollout_json(rollout: &Rollout) -> Value {
    let phases: Map<String, Value> = rollout
        .phases
        .iter()
        .map(|of| (phase_id(of.phase()).to_owned(), of.devices.into()))
        .collect();
    json!({
        "rollout_id": rollout.rollout_id,
        "release_id": rollout.release_id,
        "product": rollout.product,
        "version": rollout.version,
        "action": action_id(rollout.action()),
        "state": state_id(rollout.state()),
        "created": json_time(rollout.created_at_ms),
        "ended": json_time(rollout.ended_at_ms),
        "created_by": rollout.created_by,
        "targeted": rollout.targeted,
        "phases": phases,
        "bytes_done": rollout.bytes_done,
        "bytes_total": rollout.bytes_total,
        "waiting_for": rollout.waiting_for,
    })
}

pub fn rollout_text(rollout: &Rollout) -> String {
    let mut facts = Facts::default();
    facts
        .add("rollout", &rollout.rollout_id)
        .add("release", &rollout.release_id)
        .add(
            "does",
            format!(
                "{} {} {}",
                action_id(rollout.action()).to_ascii_lowercase(),
                rollout.product,
                rollout.version
            ),
        )
        .add("state", state_words(rollout.state()))
        .add("devices", line(rollout))
        .add_some("waiting for", &rollout.waiting_for)
        .add(
            "started",
            format!("{} by {}", time(rollout.created_at_ms), rollout.created_by),
        );
    if rollout.ended_at_ms != 0 {
        facts.add("ended", time(rollout.ended_at_ms));
    }
    facts.text()
}

pub fn rollouts_text(rollouts: &[Rollout]) -> String {
    let mut table = Table::new([
        "ROLLOUT", "PRODUCT", "VERSION", "STATE", "STARTED", "DEVICES",
    ]);
    for rollout in rollouts {
        table.row([
            rollout.rollout_id.clone(),
            rollout.product.clone(),
            rollout.version.clone(),
            state_words(rollout.state()),
            time(rollout.created_at_ms),
            line(rollout),
        ]);
    }
    table.or("No rollouts. Start one with `fwpush release FILE`.")
}

pub fn preview_json(preview: &RolloutPreview) -> Value {
    let groups: Vec<Value> = preview
        .groups
        .iter()
        .map(|group| {
            json!({ "hw_id": group.hw_id, "hw_rev": group.hw_rev, "version": group.version, "devices": group.devices })
        })
        .collect();
    let excluded: Vec<Value> = preview
        .excluded
        .iter()
        .map(|left| json!({ "reason": left.reason, "devices": left.devices, "examples": left.examples }))
        .collect();
    json!({ "eligible": preview.eligible, "online": preview.online, "groups": groups, "excluded": excluded })
}

/// Counts by hardware and running version, then who is left out and why.
pub fn preview_text(preview: &RolloutPreview) -> String {
    let mut text = format!(
        "Reaches {}, {} online now.\n",
        plural(preview.eligible, "device"),
        preview.online
    );
    if !preview.groups.is_empty() {
        let mut table = Table::new(["HARDWARE", "RUNS", "DEVICES"]);
        for group in &preview.groups {
            let version = if group.version.is_empty() {
                "(never seen)"
            } else {
                &group.version
            };
            table.row([
                hw_words(&group.hw_id, group.hw_rev, group.hw_rev),
                version.to_owned(),
                group.devices.to_string(),
            ]);
        }
        text.push_str(&table.or(""));
    }
    if !preview.excluded.is_empty() {
        let mut table = Table::new(["LEFT OUT", "DEVICES", "SUCH AS"]);
        for left in &preview.excluded {
            table.row([
                exclusion_words(&left.reason),
                left.devices.to_string(),
                left.examples.join(", "),
            ]);
        }
        text.push_str(&table.or(""));
    }
    text
}

fn exclusion_words(reason: &str) -> String {
    match reason {
        "HARDWARE" => "other hardware",
        "CHANNEL" => "other channel",
        "NEWER" => "runs a newer version",
        "ALREADY" => "runs it already",
        "BLOCKED" => "blocked",
        "FLOOR" => "security counter too low",
        "REQUIRES" => "cannot update from its version",
        "UNKNOWN_DEVICE" => "not known",
        "PRODUCT" => "other product",
        "AGENT" => "agent too old",
        other => other,
    }
    .to_owned()
}

pub fn rollout_devices_text(devices: &[RolloutDevice]) -> String {
    let mut table = Table::new(["DEVICE", "PHASE", "ATTEMPT", "SINCE", "WHY"]);
    for device in devices {
        table.row([
            device.client_id.clone(),
            phase_words(device.phase()),
            device.attempt.to_string(),
            time(device.updated_at_ms),
            error_words(device.error.as_ref()),
        ]);
    }
    table.or("No devices.")
}

pub fn rollout_device_json(device: &RolloutDevice) -> Value {
    json!({
        "client_id": device.client_id,
        "rollout_id": device.rollout_id,
        "phase": phase_id(device.phase()),
        "generation": device.generation,
        "attempt": device.attempt,
        "error": device.error.as_ref().map(|error| json!({ "code": error.code, "message": error.message })),
        "bytes_done": device.bytes_done,
        "offered": json_time(device.offered_at_ms),
        "updated": json_time(device.updated_at_ms),
    })
}

fn error_words(error: Option<&UpdateError>) -> String {
    error
        .map(|error| format!("{}: {}", error.code, error.message))
        .unwrap_or_default()
}

// ---- Devices ----

pub fn device_json(device: &Device) -> Value {
    let current = device
        .current
        .as_ref()
        .filter(|current| !current.version.is_empty());
    let current = current.map(|current| {
        json!({
            "version": current.version,
            "release_id": current.release_id,
            "security_counter": current.security_counter,
            "slot": current.slot,
            "confirmed": current.confirmed,
        })
    });
    json!({
        "client_id": device.client_id,
        "product": device.product,
        "hw_id": device.hw_id,
        "hw_rev": device.hw_rev,
        "channel": device.channel,
        "blocked": device.blocked,
        "online": device.online,
        "current": current,
        "desired_generation": device.desired_generation,
        "last_seen": json_time(device.last_seen_at_ms),
        "created": json_time(device.created_at_ms),
        "agent_version": device.agent_version,
        "attributes": device.attributes,
        "hears": device.hears,
    })
}

fn device_state(device: &Device) -> &'static str {
    match (device.blocked, device.online) {
        (true, _) => "blocked",
        (false, true) => "online",
        (false, false) => "offline",
    }
}

fn running_words(current: Option<&RunningImage>) -> String {
    match current {
        Some(current) if !current.version.is_empty() => {
            let trial = if current.confirmed { "" } else { " (on trial)" };
            format!("{}{trial}", current.version)
        }
        _ => "-".to_owned(),
    }
}

pub fn devices_text(devices: &[Device]) -> String {
    let mut table = Table::new([
        "DEVICE",
        "PRODUCT",
        "HARDWARE",
        "CHANNEL",
        "RUNS",
        "STATE",
        "LAST SEEN",
    ]);
    for device in devices {
        table.row([
            device.client_id.clone(),
            device.product.clone(),
            hw_words(&device.hw_id, device.hw_rev, device.hw_rev),
            device.channel.clone(),
            running_words(device.current.as_ref()),
            device_state(device).to_owned(),
            time(device.last_seen_at_ms),
        ]);
    }
    table.or("No devices. Add one with `fwpush device add`.")
}

pub fn device_text(device: &Device) -> String {
    let mut facts = Facts::default();
    facts
        .add("device", &device.client_id)
        .add("state", device_state(device))
        .add(
            "product",
            format!("{}, channel {}", device.product, device.channel),
        )
        .add(
            "hardware",
            hw_words(&device.hw_id, device.hw_rev, device.hw_rev),
        )
        .add("runs", running_words(device.current.as_ref()));
    if let Some(current) = &device.current {
        facts
            .add_some("release", &current.release_id)
            .add_some("slot", &current.slot);
    }
    facts
        .add_some("agent", &device.agent_version)
        .add("generation", device.desired_generation.to_string())
        .add("last seen", time(device.last_seen_at_ms))
        .add("added", time(device.created_at_ms))
        .add_some("hears of", device.hears.join(", "));
    let mut attributes: Vec<_> = device.attributes.iter().collect();
    attributes.sort();
    let attributes: Vec<String> = attributes
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    facts.add_some("attributes", attributes.join(", "));
    facts.text()
}

pub fn device_detail_json(detail: &DeviceDetail) -> Value {
    let events: Vec<Value> = detail
        .events
        .iter()
        .map(|event| {
            json!({ "at": json_time(event.at_ms), "kind": event.kind, "details": event.details, "actor": event.actor })
        })
        .collect();
    json!({
        "device": detail.device.as_ref().map(device_json),
        "updates": detail.updates.iter().map(rollout_device_json).collect::<Vec<_>>(),
        "events": events,
    })
}

pub fn device_detail_text(detail: &DeviceDetail) -> String {
    let mut text = detail.device.as_ref().map(device_text).unwrap_or_default();
    if !detail.updates.is_empty() {
        let mut table = Table::new(["ROLLOUT", "PHASE", "ATTEMPT", "SINCE", "WHY"]);
        for update in &detail.updates {
            table.row([
                update.rollout_id.clone(),
                phase_words(update.phase()),
                update.attempt.to_string(),
                time(update.updated_at_ms),
                error_words(update.error.as_ref()),
            ]);
        }
        text.push('\n');
        text.push_str(&table.or(""));
    }
    if !detail.events.is_empty() {
        let mut table = Table::new(["WHEN", "EVENT", "BY", "DETAILS"]);
        for event in &detail.events {
            table.row([
                time(event.at_ms),
                event.kind.clone(),
                event.actor.clone(),
                event.details.clone(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.or(""));
    }
    text
}
