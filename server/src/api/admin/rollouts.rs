//! Rollouts: preview, start, watch, abort.

use std::sync::Arc;

use futures::{StreamExt as _, stream::BoxStream};
use fwpush_keys::id::{DeviceId, OperatorId, ReleaseId, RolloutId};
use fwpush_proto::v1;
use tonic::{Code, Status};

use super::{Admin, id, optional_id, page, views};
use crate::{
    api::status as map,
    db::ReleaseRow,
    limits,
    rollout::{Phase, RolloutAction, RolloutState},
    rollouts::{self, RolloutError, StartRollout, Target},
};

pub fn refused(error: RolloutError) -> Status {
    let (code, next) = match error {
        RolloutError::Db(error) => return map::db(error),
        RolloutError::NotFound(_) => (
            Code::NotFound,
            "`fwpush rollout list` shows those there are.",
        ),
        RolloutError::UnknownRelease(_) => (
            Code::NotFound,
            "`fwpush release list` shows those there are.",
        ),
        RolloutError::Conflict(_) => (
            Code::FailedPrecondition,
            "`fwpush rollout list` and `fwpush release list` show how it stands.",
        ),
        RolloutError::Ended(_) => (
            Code::FailedPrecondition,
            "Publish a new release: fwpush release FILE ...",
        ),
        RolloutError::Invalid(_) => (
            Code::InvalidArgument,
            "--to takes `all` or device ids with commas between.",
        ),
    };
    map::with_next(Status::new(code, error.to_string()), next)
}

fn target(target: Option<v1::Target>) -> Result<Target, Status> {
    let target = target
        .ok_or_else(|| Status::invalid_argument("no target: all devices, or a list of them"))?;
    match (target.all, target.device_ids.len()) {
        (true, 0) => Ok(Target::All),
        (false, 1..=limits::ROLLOUT_DEVICE_IDS) => {
            let ids = target.device_ids.iter().map(|device| id("target", device));
            Ok(Target::Devices(ids.collect::<Result<_, _>>()?))
        }
        (false, 0) => Err(Status::invalid_argument("the target is empty")),
        (false, _) => {
            let most = limits::ROLLOUT_DEVICE_IDS;
            Err(Status::invalid_argument(format!(
                "a target lists at most {most} devices; use `all`"
            )))
        }
        (true, _) => Err(Status::invalid_argument(
            "a target is either all devices or a list of them",
        )),
    }
}

fn action(action: v1::Action) -> Result<RolloutAction, Status> {
    match action {
        v1::Action::Install => Ok(RolloutAction::Install),
        v1::Action::Rollback => Ok(RolloutAction::Rollback),
        _ => Err(Status::invalid_argument(
            "a rollout's action is INSTALL or ROLLBACK",
        )),
    }
}

pub async fn preview(
    admin: &Admin,
    _: &OperatorId,
    request: v1::StartRolloutRequest,
) -> Result<v1::RolloutPreview, Status> {
    let action = action(request.action())?;
    let release = if request.envelope.is_empty() {
        let release: ReleaseId = id("release_id", &request.release_id)?;
        let row = admin.db.release(&release).await.map_err(map::db)?;
        row.ok_or_else(|| refused(RolloutError::UnknownRelease(release)))?
    } else {
        let release = admin
            .releases
            .verify(&request.envelope)
            .map_err(super::releases::refused)?;
        Arc::new(ReleaseRow::of(&release, "preview", admin.db.now()))
    };
    let preview = rollouts::preview(
        &admin.db,
        &release,
        &target(request.target)?,
        action,
        &admin.route,
    )
    .await;
    Ok(views::preview(preview.map_err(refused)?))
}

pub async fn start(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::StartRolloutRequest,
) -> Result<v1::Rollout, Status> {
    let start = StartRollout {
        rollout_id: id("rollout_id", &request.rollout_id)?,
        release_id: id("release_id", &request.release_id)?,
        action: action(request.action())?,
        target: target(request.target)?,
        actor: operator.to_string(),
    };
    Ok(views::rollout(
        &rollouts::start(&admin.db, start).await.map_err(refused)?,
    ))
}

pub async fn list(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListRolloutsRequest,
) -> Result<v1::ListRolloutsResponse, Status> {
    let rollouts = rollouts::list(&admin.db, request.limit)
        .await
        .map_err(refused)?;
    Ok(v1::ListRolloutsResponse {
        rollouts: rollouts.iter().map(views::rollout).collect(),
    })
}

pub async fn get(
    admin: &Admin,
    _: &OperatorId,
    request: v1::GetRolloutRequest,
) -> Result<v1::Rollout, Status> {
    let rollout: RolloutId = id("rollout_id", &request.rollout_id)?;
    Ok(views::rollout(
        &rollouts::get(&admin.db, &rollout).await.map_err(refused)?,
    ))
}

/// The rollout now, and again after each change, until it is no longer active or the server stops.
pub async fn watch(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::GetRolloutRequest,
) -> Result<BoxStream<'static, Result<v1::Rollout, Status>>, Status> {
    // An unknown rollout is an error at once, not at the first poll.
    let first = get(admin, operator, request.clone()).await?;
    let rollout: RolloutId = id("rollout_id", &request.rollout_id)?;
    let mut changes = admin.db.changes();
    changes.mark_unchanged();
    let watcher = Watcher {
        admin: admin.clone(),
        rollout,
        changes,
        shown: first.clone(),
    };
    let rest = futures::stream::unfold(
        Some(watcher),
        |watcher| async move { watcher?.next().await },
    );
    Ok(futures::stream::once(async move { Ok(first) })
        .chain(rest)
        .boxed())
}

struct Watcher {
    admin: Admin,
    rollout: RolloutId,
    changes: tokio::sync::watch::Receiver<u64>,
    shown: v1::Rollout,
}

impl Watcher {
    async fn next(mut self) -> Option<(Result<v1::Rollout, Status>, Option<Self>)> {
        let ended = |rollout: &v1::Rollout| rollout.state != RolloutState::Active.as_i32();
        if ended(&self.shown) {
            return None;
        }
        loop {
            tokio::select! {
                () = self.admin.stop.cancelled() => {
                    let status = Status::unavailable("the server is stopping; ask again later");
                    return Some((Err(status), None));
                }
                changed = self.changes.changed() => changed.ok()?,
                // Of what other nodes commit only what concerns devices is announced, not their progress.
                () = tokio::time::sleep(limits::WATCH_ELSEWHERE), if self.admin.db.is_shared() => {}
            }
            match rollouts::get(&self.admin.db, &self.rollout).await {
                Ok(now) => {
                    let now = views::rollout(&now);
                    if now != self.shown {
                        self.shown = now.clone();
                        return Some((Ok(now), Some(self)));
                    }
                }
                Err(error) => return Some((Err(refused(error)), None)),
            }
            // Several changes in a row are shown as one.
            tokio::time::sleep(limits::WATCH_INTERVAL).await;
        }
    }
}

pub async fn devices(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListRolloutDevicesRequest,
) -> Result<v1::ListRolloutDevicesResponse, Status> {
    let rollout: RolloutId = id("rollout_id", &request.rollout_id)?;
    let after: Option<DeviceId> = optional_id("after", &request.after)?;
    let phase = match request.phase {
        0 => None,
        phase => {
            Some(Phase::from_i32(phase).ok_or_else(|| Status::invalid_argument("unknown phase"))?)
        }
    };
    let rows = rollouts::devices(
        &admin.db,
        &rollout,
        phase,
        after.as_ref(),
        page(request.limit),
    )
    .await;
    let devices = rows
        .map_err(refused)?
        .iter()
        .map(views::rollout_device)
        .collect();
    Ok(v1::ListRolloutDevicesResponse { devices })
}

pub async fn abort(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::AbortRolloutRequest,
) -> Result<v1::Rollout, Status> {
    let rollout: RolloutId = id("rollout_id", &request.rollout_id)?;
    let aborted = rollouts::abort(&admin.db, &rollout, operator.as_str())
        .await
        .map_err(refused)?;
    tracing::info!(operator.id = %operator, rollout.id = %rollout, "A rollout was aborted.");
    Ok(views::rollout(&aborted))
}
