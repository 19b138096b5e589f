//! The nodes that serve together, and the engines that they share.

use fwpush_keys::{id::OperatorId, time::Timestamp};
use fwpush_proto::v1;
use tonic::Status;

use super::Admin;
use crate::{
    api::{node::in_us, status as map},
    engines::{self, Answer},
    route::{NodeState, NodeView},
};

/// Looks at everything now; what is away is said so and is no error.
pub async fn status(
    admin: &Admin,
    _: &OperatorId,
    _: v1::GetClusterStatusRequest,
) -> Result<v1::ClusterStatus, Status> {
    let (database, files, redis, listed) = tokio::join!(
        engines::database(&admin.db),
        engines::files(&admin.store),
        admin.route.check_redis(),
        admin.route.nodes(),
    );
    let database = database.unwrap_or_else(|| Err("it is closed".to_owned()));
    let nodes = match listed {
        Some(Ok(nodes)) => nodes.into_iter().map(node).collect(),
        // Of the others nothing is known.
        None | Some(Err(_)) => vec![this_node(admin)],
    };
    let leases = if database.is_ok() {
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
        engines: [
            Some(engine("database", admin.about.database.clone(), database)),
            Some(engine("files", admin.about.files.clone(), files)),
            redis.map(|answer| {
                let place = admin.route.redis_place().map(ToString::to_string);
                engine("redis", place.unwrap_or_default(), answer)
            }),
        ]
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

fn engine(name: &str, place: String, answer: Answer) -> v1::EngineStatus {
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
