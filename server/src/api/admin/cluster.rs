//! The nodes that serve together, and the engines that they share.

use std::time::{Duration, Instant};

use fwpush_keys::{id::OperatorId, time::Timestamp};
use fwpush_proto::v1;
use tokio::time::timeout;
use tonic::Status;

use super::Admin;
use crate::{
    api::{node::in_us, status as map},
    limits,
    route::{NodeState, NodeView},
};

/// Looks at everything now; what is away is said so and is no error.
pub async fn status(
    admin: &Admin,
    _: &OperatorId,
    _: v1::GetClusterStatusRequest,
) -> Result<v1::ClusterStatus, Status> {
    let (database, files, redis, listed) = tokio::join!(
        database(admin),
        files(admin),
        redis(admin),
        admin.route.nodes()
    );
    let nodes = match listed {
        Some(Ok(nodes)) => nodes.into_iter().map(node).collect(),
        // Of the others nothing is known.
        None | Some(Err(_)) => vec![this_node(admin)],
    };
    let leases = if database.up {
        admin.db.leases().await.map_err(map::db)?
    } else {
        Vec::new()
    };
    Ok(v1::ClusterStatus {
        node_id: admin.about.node_id.to_string(),
        nodes,
        leases: leases
            .into_iter()
            .map(|lease| v1::LeaseStatus {
                name: lease.name,
                node_id: lease.owner,
                expires_at_ms: lease.expires_at.as_ms(),
            })
            .collect(),
        engines: [Some(database), Some(files), redis]
            .into_iter()
            .flatten()
            .collect(),
    })
}

fn node(view: NodeView) -> v1::NodeStatus {
    let state = match view.state {
        NodeState::Up => "up",
        NodeState::Draining => "draining",
        NodeState::Gone => "gone",
    };
    v1::NodeStatus {
        node_id: view.node.to_string(),
        address: view.address,
        state: state.to_owned(),
        devices_online: view.sessions,
        seen_at_ms: view.seen_at.as_ms(),
    }
}

fn this_node(admin: &Admin) -> v1::NodeStatus {
    let draining = admin.sessions.is_draining();
    v1::NodeStatus {
        node_id: admin.about.node_id.to_string(),
        address: admin.route.advertised().unwrap_or_default().to_owned(),
        state: if draining { "draining" } else { "up" }.to_owned(),
        devices_online: admin.sessions.online_count(),
        seen_at_ms: Timestamp::now().as_ms(),
    }
}

async fn database(admin: &Admin) -> v1::EngineStatus {
    let asked = Instant::now();
    let answer = timeout(limits::DB_WATCH, admin.db.check()).await;
    let answer = match answer {
        Ok(Ok(())) => Ok(asked.elapsed()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", limits::DB_WATCH.as_secs())),
    };
    engine("database", admin.about.database.clone(), answer)
}

async fn files(admin: &Admin) -> v1::EngineStatus {
    let asked = Instant::now();
    let answer = match timeout(limits::FILES_WATCH, admin.store.check()).await {
        Ok(Ok(())) => Ok(asked.elapsed()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!(
            "no answer within {} s",
            limits::FILES_WATCH.as_secs()
        )),
    };
    engine("files", admin.about.files.clone(), answer)
}

async fn redis(admin: &Admin) -> Option<v1::EngineStatus> {
    let place = admin.route.redis_place()?.to_string();
    let answer = admin.route.check_redis().await?;
    Some(engine("redis", place, answer))
}

fn engine(name: &str, place: String, answer: Result<Duration, String>) -> v1::EngineStatus {
    let (answered_us, problem) = match answer {
        Ok(took) => (in_us(took), String::new()),
        Err(problem) => (0, problem),
    };
    v1::EngineStatus {
        name: name.to_owned(),
        place,
        up: problem.is_empty(),
        answered_us,
        problem,
    }
}
