//! Our types in the shapes that operators see.

use bytes::Bytes;
use fwpush_keys::time::Timestamp;
use fwpush_proto::v1;

use crate::{
    db::{DeviceRecord, EventRow, ReleaseRow, RunningImage},
    ingest::ReportError,
    rollout::RolloutAction,
    rollouts::{Preview, RolloutDeviceRow, RolloutView},
    trust::TrustDocs,
};

fn ms(at: Option<Timestamp>) -> i64 {
    at.map_or(0, Timestamp::as_ms)
}

pub fn release(row: &ReleaseRow) -> v1::Release {
    v1::Release {
        release_id: row.release_id.to_string(),
        product: row.product.to_string(),
        channel: row.channel.to_string(),
        version: row.version.to_string(),
        seq: row.seq,
        security_counter: row.security_counter,
        file_id: row.file_id.to_string(),
        size: row.size,
        file_name: row.file_name.clone(),
        issued_at_ms: row.issued_at.as_ms(),
        expires_at_ms: row.expires_at.as_ms(),
        published_at_ms: row.published_at.as_ms(),
        revoked: row.revoked,
        hw: row
            .hw
            .iter()
            .map(|hw| v1::HwRange {
                id: hw.id.to_string(),
                rev_min: hw.rev_min,
                rev_max: hw.rev_max,
            })
            .collect(),
        envelope: bytes::Bytes::from_owner(std::sync::Arc::clone(&row.envelope)),
    }
}

fn running(image: &RunningImage) -> v1::RunningImage {
    v1::RunningImage {
        release_id: image
            .release_id
            .map(|id| id.to_string())
            .unwrap_or_default(),
        version: image.version.clone(),
        security_counter: image.security_counter,
        slot: image.slot.clone(),
        confirmed: image.confirmed,
    }
}

pub fn device(record: &DeviceRecord, online: bool) -> v1::Device {
    v1::Device {
        client_id: record.client_id.to_string(),
        product: record.product.to_string(),
        hw_id: record.hw_id.to_string(),
        hw_rev: record.hw_rev,
        channel: record.channel.to_string(),
        blocked: record.blocked,
        online,
        current: Some(running(&record.current)),
        desired_generation: record.desired_generation,
        // The database hears of a live device only every few minutes.
        last_seen_at_ms: if online {
            Timestamp::now().as_ms()
        } else {
            ms(record.last_seen_at)
        },
        created_at_ms: record.created_at.as_ms(),
        agent_version: record.agent_version.clone(),
        attributes: record.attributes.clone().into_iter().collect(),
        hears: record.hears.clone(),
    }
}

pub fn event(row: EventRow) -> v1::Event {
    v1::Event {
        at_ms: row.at.as_ms(),
        kind: row.kind,
        details: row.details,
        actor: row.actor,
    }
}

fn error(error: &ReportError) -> v1::UpdateError {
    v1::UpdateError {
        code: error.code.clone(),
        message: error.message.clone(),
    }
}

pub fn rollout_device(row: &RolloutDeviceRow) -> v1::RolloutDevice {
    v1::RolloutDevice {
        client_id: row.client_id.to_string(),
        phase: row.phase.as_i32(),
        generation: row.generation,
        attempt: row.attempt,
        error: row.error.as_ref().map(error),
        bytes_done: row.bytes_done,
        offered_at_ms: ms(row.offered_at),
        updated_at_ms: row.updated_at.as_ms(),
        rollout_id: row.rollout_id.to_string(),
        deferred_until_at_ms: ms(row.deferred_until),
    }
}

pub fn rollout(view: &RolloutView) -> v1::Rollout {
    let action = match view.action {
        RolloutAction::Install => v1::Action::Install,
        RolloutAction::Rollback => v1::Action::Rollback,
    };
    v1::Rollout {
        rollout_id: view.rollout_id.to_string(),
        release_id: view.release_id.to_string(),
        product: view.product.to_string(),
        version: view.version.clone(),
        action: action.into(),
        state: view.state.as_i32(),
        created_at_ms: view.created_at.as_ms(),
        ended_at_ms: ms(view.ended_at),
        created_by: view.created_by.clone(),
        targeted: view.targeted,
        phases: view
            .phases
            .iter()
            .map(|(phase, devices)| v1::PhaseCount {
                phase: phase.as_i32(),
                devices: *devices,
            })
            .collect(),
        bytes_done: view.bytes_done,
        bytes_total: view.bytes_total,
        waiting_for: view.waiting_for.clone(),
    }
}

pub fn preview(preview: Preview) -> v1::RolloutPreview {
    v1::RolloutPreview {
        eligible: preview.eligible,
        online: preview.online,
        groups: preview
            .groups
            .into_iter()
            .map(|group| v1::PreviewGroup {
                hw_id: group.hw_id.to_string(),
                hw_rev: group.hw_rev,
                version: group.version,
                devices: group.devices,
            })
            .collect(),
        excluded: preview
            .excluded
            .into_iter()
            .map(|left_out| v1::Excluded {
                reason: left_out.reason.to_owned(),
                devices: left_out.devices,
                examples: left_out.examples.iter().map(ToString::to_string).collect(),
            })
            .collect(),
    }
}

pub fn trust(docs: &TrustDocs) -> v1::TrustInfo {
    let root = docs.root();
    let mut revocations: Vec<_> = docs
        .revocations()
        .iter()
        .map(|list| v1::RevocationInfo {
            product: list.product.to_string(),
            version: Some(v1::RevocationVersion {
                root_version: list.root_version,
                version: list.version,
            }),
            revoked: u32::try_from(list.revoked.len()).unwrap_or(u32::MAX),
            min_security_counter: list.min_security_counter,
            envelope: Bytes::copy_from_slice(list.envelope()),
        })
        .collect();
    revocations.sort_by(|a, b| a.product.cmp(&b.product));
    v1::TrustInfo {
        root_version: root.version,
        root_expires_at_ms: root.expires.as_ms(),
        roots: docs.roots(),
        revocations,
    }
}
