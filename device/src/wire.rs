//! Between the messages of the wire and what the updater understands.

use std::{collections::HashMap, time::Duration};

use fwpush_keys::{TrustStore, time::Timestamp};
use fwpush_proto::v1;

use crate::{
    attributes::Attributes,
    limits,
    settings::AgentSettings,
    update::{Action, Decision, Failure, Notice, Phase, Report, ReportKind, Running, Updater},
};

/// Version of the protocol that this agent speaks.
const PROTOCOL_VERSION: u32 = 1;

/// A notice as the updater takes it. An envelope over the bound becomes an empty one, which no signature fits.
pub fn notice(notice: v1::FileNotice) -> Notice {
    let action = match v1::Action::try_from(notice.action) {
        Ok(v1::Action::Install) => Action::Install,
        Ok(v1::Action::Rollback) => Action::Rollback,
        Ok(v1::Action::Hold) => Action::Hold,
        Ok(v1::Action::Abort) => Action::Abort,
        Ok(v1::Action::Unspecified) | Err(_) => Action::Unknown(notice.action),
    };
    let manifest = if notice.manifest.len() <= limits::ENVELOPE_BYTES {
        &notice.manifest[..]
    } else {
        &[]
    };
    Notice {
        generation: notice.generation,
        attempt: notice.attempt,
        nonce: notice.nonce,
        action,
        file_id: notice.file_id,
        manifest: manifest.into(),
        not_before: (notice.not_before_at_ms > 0)
            .then_some(Timestamp::from_ms(notice.not_before_at_ms)),
        spread: Duration::from_millis(notice.spread_ms),
    }
}

/// What the device says of itself.
pub fn facts(
    settings: &AgentSettings,
    attributes: &Attributes,
    updater: &Updater,
    trust: &TrustStore,
) -> v1::DeviceFacts {
    let state = updater.state();
    v1::DeviceFacts {
        state_id: state.state_id.clone(),
        product: settings.product.to_string(),
        hw_id: settings.hw_id.to_string(),
        hw_rev: settings.hw_rev,
        channels: settings.channels.iter().map(ToString::to_string).collect(),
        attributes: attributes.clone().into_iter().collect::<HashMap<_, _>>(),
        agent_version: settings.agent_version.to_string(),
        current: updater.running().as_ref().map(running),
        observed_generation: state.observed_generation,
        boot_id: state.boot_id.clone(),
        boot_count: state.boot_count,
        root_version: trust.root().version,
        revocation: Some(revocation_version(settings, trust)),
        protocol_version: PROTOCOL_VERSION,
        last_report_seq: state.outbox.last_seq(),
    }
}

/// Which trust documents the device holds, and why it refused one.
pub fn trust_state(
    settings: &AgentSettings,
    trust: &TrustStore,
    refused: Option<&Failure>,
) -> v1::TrustState {
    v1::TrustState {
        root_version: trust.root().version,
        revocation: Some(revocation_version(settings, trust)),
        error: refused.map(error),
    }
}

fn revocation_version(settings: &AgentSettings, trust: &TrustStore) -> v1::RevocationVersion {
    let held = trust.revocation_version(&settings.product);
    v1::RevocationVersion {
        root_version: held.root_version,
        version: held.version,
    }
}

/// A report in a message for the stream.
pub fn report(report: &Report) -> v1::ClientMessage {
    use v1::client_message::Kind;
    let &Report {
        seq,
        boot_count,
        generation,
        ..
    } = report;
    let kind = match &report.kind {
        ReportKind::Reply { nonce, decision } => {
            let (decision, until, reason) = match decision {
                Decision::Accepted => (v1::Decision::Accepted, None, None),
                Decision::Deferred { until, reason } => {
                    (v1::Decision::Deferred, Some(until), Some(reason))
                }
                Decision::Rejected { reason } => (v1::Decision::Rejected, None, Some(reason)),
            };
            Kind::NoticeReply(v1::NoticeReply {
                seq,
                nonce: nonce.clone(),
                generation,
                decision: decision.into(),
                until_at_ms: until.map_or(0, |until| until.as_ms()),
                reason: reason.map(error),
                boot_count,
            })
        }
        ReportKind::FileAck { file_id, bytes } => Kind::FileAck(v1::FileAck {
            seq,
            generation,
            file_id: file_id.to_string(),
            bytes: *bytes,
            blake3: file_id.to_string(),
            boot_count,
        }),
        ReportKind::Phase {
            attempt,
            phase,
            bytes_done,
            bytes_total,
            error: failure,
            current,
            log,
        } => Kind::Report(v1::UpdateReport {
            seq,
            boot_count,
            generation,
            attempt: *attempt,
            phase: wire_phase(*phase).into(),
            bytes_done: *bytes_done,
            bytes_total: *bytes_total,
            error: failure.as_ref().map(error),
            current: current.as_ref().map(running),
            log: log.clone(),
        }),
    };
    v1::ClientMessage { kind: Some(kind) }
}

fn running(running: &Running) -> v1::RunningImage {
    v1::RunningImage {
        release_id: running
            .release_id
            .map(|id| id.to_string())
            .unwrap_or_default(),
        version: running.version.to_string(),
        security_counter: running.security_counter,
        slot: running.slot.to_string(),
        confirmed: running.confirmed,
    }
}

fn error(failure: &Failure) -> v1::UpdateError {
    v1::UpdateError {
        code: failure.code.clone(),
        message: failure.message.clone(),
    }
}

fn wire_phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Accepted => v1::Phase::Accepted,
        Phase::Deferred => v1::Phase::Deferred,
        Phase::Downloading => v1::Phase::Downloading,
        Phase::Verified => v1::Phase::Verified,
        Phase::Installing => v1::Phase::Installing,
        Phase::Rebooting => v1::Phase::Rebooting,
        Phase::Confirming => v1::Phase::Confirming,
        Phase::Succeeded => v1::Phase::Succeeded,
        Phase::Failed => v1::Phase::Failed,
        Phase::RolledBack => v1::Phase::RolledBack,
        Phase::Rejected => v1::Phase::Rejected,
        Phase::Cancelled => v1::Phase::Cancelled,
    }
}
