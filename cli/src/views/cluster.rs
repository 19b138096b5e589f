//! A cluster: nodes, leases, and what nodes share.

use fwpush_proto::v1::{ClusterStatus, EngineStatus, LeaseStatus, NodeStatus};
use serde_json::{Value, json};

use crate::output::{Table, json_time, time};

pub fn cluster_json(status: &ClusterStatus) -> Value {
    let node = |node: &NodeStatus| {
        json!({
            "node_id": node.node_id,
            "address": node.address,
            "state": node.state,
            "devices_online": node.devices_online,
            "seen": json_time(node.seen_at_ms),
        })
    };
    let lease = |lease: &LeaseStatus| json!({ "name": lease.name, "node_id": lease.node_id, "expires": json_time(lease.expires_at_ms) });
    let engine = |engine: &EngineStatus| {
        json!({
            "name": engine.name,
            "place": engine.place,
            "up": engine.up,
            "answered_us": engine.up.then_some(engine.answered_us),
            "problem": (!engine.up).then_some(&engine.problem),
        })
    };
    json!({
        "node_id": status.node_id,
        "nodes": status.nodes.iter().map(node).collect::<Vec<_>>(),
        "leases": status.leases.iter().map(lease).collect::<Vec<_>>(),
        "engines": status.engines.iter().map(engine).collect::<Vec<_>>(),
    })
}

pub fn cluster_text(status: &ClusterStatus) -> String {
    let mut nodes = Table::new(["NODE", "STATE", "DEVICES", "LAST SEEN", "ADDRESS"]);
    for node in &status.nodes {
        let asked = if node.node_id == status.node_id {
            " (asked)"
        } else {
            ""
        };
        nodes.row([
            format!("{}{asked}", node.node_id),
            node.state.clone(),
            node.devices_online.to_string(),
            time(node.seen_at_ms),
            or_dash(&node.address),
        ]);
    }
    let mut engines = Table::new(["SHARED", "STATE", "ANSWERS IN", "PLACE"]);
    for engine in &status.engines {
        let (state, took) = if engine.up {
            ("up".to_owned(), milliseconds(engine.answered_us))
        } else {
            (format!("AWAY: {}", engine.problem), "-".to_owned())
        };
        engines.row([engine.name.clone(), state, took, engine.place.clone()]);
    }
    let mut leases = Table::new(["LEASE", "NODE", "UNTIL"]);
    for lease in &status.leases {
        leases.row([
            lease.name.clone(),
            lease.node_id.clone(),
            time(lease.expires_at_ms),
        ]);
    }
    format!(
        "{}\n{}\n{}",
        nodes.or("No nodes."),
        engines.or("Nothing shared."),
        leases.or("No node drives anything now.")
    )
}

/// A time in words.
pub fn milliseconds(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1_000.0)
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}
