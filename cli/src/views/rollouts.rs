//! Rollouts, their previews and their devices.

use fwpush_proto::v1::{Action, Rollout, RolloutDevice, RolloutPreview, RolloutState, UpdateError};
use serde_json::{Map, Value, json};

use crate::{
    output::{Facts, Table, json_time, plural, time},
    progress::{devices, line, phase_id, phase_words},
    values::hw_words,
};

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
            match rollout.state() {
                RolloutState::Active => line(rollout),
                _ => devices(rollout),
            },
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
            why_words(device),
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
        "deferred_until": json_time(device.deferred_until_at_ms),
        "bytes_done": device.bytes_done,
        "offered": json_time(device.offered_at_ms),
        "updated": json_time(device.updated_at_ms),
    })
}

/// Why a device is where it is: what went wrong, or what it waits for and until when.
pub(super) fn why_words(device: &RolloutDevice) -> String {
    let error = error_words(device.error.as_ref());
    match device.deferred_until_at_ms {
        0 => error,
        until if error.is_empty() => format!("put off until {}", time(until)),
        until => format!("put off until {}: {error}", time(until)),
    }
}

fn error_words(error: Option<&UpdateError>) -> String {
    error
        .map(|error| format!("{}: {}", error.code, error.message))
        .unwrap_or_default()
}
