//! Devices.

use fwpush_proto::v1::{Device, DeviceDetail, RunningImage};
use serde_json::{Value, json};

use super::rollouts::{rollout_device_json, why_words};
use crate::{
    output::{Facts, Table, json_time, time},
    progress::phase_words,
    values::hw_words,
};

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

/// The event that carries what a device noted about an update that went wrong.
const UPDATE_LOG: &str = "UPDATE_LOG";

/// What a table has room for.
fn first_line(details: &str) -> String {
    let mut lines = details.lines();
    let first = lines.next().unwrap_or_default();
    match lines.count() {
        0 => first.to_owned(),
        more => format!("{first} (and {more} more lines)"),
    }
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
                why_words(update),
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
                first_line(&event.details),
            ]);
        }
        text.push('\n');
        text.push_str(&table.or(""));
    }
    let newest_log = detail
        .events
        .iter()
        .filter(|event| event.kind == UPDATE_LOG);
    if let Some(log) = newest_log.max_by_key(|event| event.at_ms) {
        text.push_str(&format!(
            "\nThe device's log of the update that went wrong, {}:\n",
            time(log.at_ms)
        ));
        for line in log.details.lines() {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text
}
