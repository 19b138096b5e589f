//! The log: one line an event, each with a stable code in its field `event`, listed in docs/device-agent.md.

use crate::{
    agent::AgentEvent,
    update::{Failure, Phase},
};

/// The code of a phase's line.
fn phase_event(phase: Phase) -> &'static str {
    match phase {
        Phase::Accepted => "update.accepted",
        Phase::Deferred => "update.deferred",
        Phase::Downloading => "update.downloading",
        Phase::Verified => "update.verified",
        Phase::Installing => "update.installing",
        Phase::Rebooting => "update.rebooting",
        Phase::Confirming => "update.confirming",
        Phase::Succeeded => "update.succeeded",
        Phase::Failed => "update.failed",
        Phase::RolledBack => "update.rolled-back",
        Phase::Rejected => "update.rejected",
        Phase::Cancelled => "update.cancelled",
    }
}

/// Logs what happened in the agent.
pub(super) fn log(event: &AgentEvent) {
    match event {
        AgentEvent::Connecting { server } => {
            tracing::debug!(event = "link.connecting", server, "Connecting.")
        }
        AgentEvent::Registered {
            server,
            session_id,
            resumed,
        } => {
            tracing::info!(
                event = "link.registered",
                server,
                session.id = session_id,
                resumed,
                "Registered."
            );
        }
        AgentEvent::Disconnected { reason } => {
            tracing::warn!(event = "link.lost", reason, "Not connected; trying again.")
        }
        AgentEvent::IdentityRefused { reason } => {
            tracing::error!(
                event = "link.refused",
                reason,
                "The connection was refused for who we are or who they are; trying again."
            );
        }
        AgentEvent::Notice { generation, action } => {
            tracing::info!(
                event = "update.notice",
                generation,
                ?action,
                "A notice came."
            )
        }
        AgentEvent::Phase {
            generation,
            phase,
            failure,
        } => log_phase(*generation, *phase, failure.as_ref()),
        AgentEvent::GroupRefused { index, message } => {
            tracing::warn!(
                event = "transfer.group-refused",
                group = index,
                message,
                "A group was refused."
            )
        }
        AgentEvent::DownloadCut {
            code,
            message,
            wait,
        } => {
            tracing::warn!(
                event = "transfer.cut",
                code,
                reason = message,
                wait_ms = wait.as_millis() as u64,
                "The download was cut; it goes on where it stopped."
            )
        }
        AgentEvent::Source { mirror } => {
            let from = mirror.as_deref().unwrap_or("the node");
            tracing::info!(
                event = "transfer.source",
                from,
                "The image comes from here."
            )
        }
        AgentEvent::MirrorLeft { host, failure } => {
            tracing::warn!(
                event = "transfer.mirror-left",
                host,
                code = failure.code,
                reason = failure.message,
                "A mirror is not used again in this update."
            )
        }
        AgentEvent::GroupsReused(groups) => {
            tracing::info!(
                event = "transfer.groups-reused",
                groups,
                "Some groups need not be fetched."
            )
        }
        AgentEvent::GroupWritten { index } => {
            tracing::trace!(
                event = "transfer.group-written",
                group = index,
                "A group was written."
            )
        }
        AgentEvent::Bytes(bytes) => {
            tracing::trace!(event = "transfer.bytes", bytes, "Bytes arrived.")
        }
        AgentEvent::Acked { upto_seq } => tracing::debug!(
            event = "link.acknowledged",
            upto_seq,
            "Reports were acknowledged."
        ),
        AgentEvent::Text(text) => tracing::info!(
            event = "operator.text",
            text,
            "A message from the operator."
        ),
        AgentEvent::Presence {
            client_id,
            kind,
            details,
        } => {
            tracing::info!(
                event = "operator.device",
                client_id,
                kind,
                details,
                "Another device."
            );
        }
        AgentEvent::Trust {
            root_version,
            revocation: (root, list),
        } => {
            tracing::info!(
                event = "trust.accepted",
                root_version,
                revocation = format!("{root}.{list}"),
                "Trust documents were accepted."
            );
        }
        AgentEvent::TrustRefused(failure) => {
            tracing::warn!(
                event = "trust.refused",
                code = failure.code,
                reason = failure.message,
                "A trust document was refused."
            );
        }
    }
}

fn log_phase(generation: u64, phase: Phase, failure: Option<&Failure>) {
    let event = phase_event(phase);
    let (code, reason) = match failure {
        Some(failure) => (Some(&failure.code), Some(&failure.message)),
        None => (None, None),
    };
    match phase {
        Phase::Failed | Phase::RolledBack | Phase::Rejected => {
            tracing::error!(event, generation, %phase, code, reason, "The update ended.");
        }
        Phase::Succeeded => tracing::info!(event, generation, %phase, "The update ended."),
        _ => tracing::info!(event, generation, %phase, code, reason, "The update goes on."),
    }
}

/// One line for `systemctl status`, where an event is worth one.
pub(super) fn status_line(event: &AgentEvent) -> Option<String> {
    match event {
        AgentEvent::Registered { server, .. } => Some(format!("registered with {server}")),
        AgentEvent::Disconnected { reason } => Some(format!("not connected: {reason}")),
        AgentEvent::IdentityRefused { reason } => Some(format!("refused: {reason}")),
        AgentEvent::Phase {
            generation,
            phase,
            failure,
        } => {
            let why = failure
                .as_ref()
                .map_or(String::new(), |failure| format!(" ({failure})"));
            Some(format!("update {generation}: {phase}{why}"))
        }
        _ => None,
    }
}
