//! Following a rollout until it is done, also over a restart of the server.

use std::time::Instant;

use fwpush_keys::id::RolloutId;
use fwpush_proto::v1::{GetRolloutRequest, Phase, Rollout, RolloutState};
use tonic::{Status, Streaming};

use crate::{
    client::{Backoff, Client, is_lost},
    failure::{Failure, Result},
    limits,
    output::plural,
    progress::{Board, count, phase_words},
};

/// Shows progress on stderr until the rollout is no longer active, and returns its last state.
///
/// A server that restarts meanwhile is waited for, up to [`limits::WATCH_AWAY`]. Ctrl-C ends the watching, not the rollout.
pub async fn follow(client: &mut Client, id: &RolloutId) -> Result<Rollout> {
    let mut board = Board::new();
    let ended = tokio::select! {
        rollout = until_ended(client, id, &mut board) => rollout,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted; the rollout goes on")
            .next(format!("To watch it: fwpush rollout show {id} --follow. To stop it: fwpush rollout abort {id}"))),
    };
    match ended {
        Ok(rollout) => {
            board.finish(&rollout);
            Ok(rollout)
        }
        Err(failure) => Err(failure.next(format!(
            "Watch it again with `fwpush rollout show {id} --follow`, stop it with `fwpush rollout abort {id}`."
        ))),
    }
}

async fn until_ended(client: &mut Client, id: &RolloutId, board: &mut Board) -> Result<Rollout> {
    // Since when the server is away, and how long to wait for it next.
    let mut away: Option<(Instant, Backoff)> = None;
    loop {
        let watched = watch_once(client, id, |rollout| {
            away = None;
            board.show(rollout);
        });
        let lost = match watched.await {
            Ok(rollout) => return Ok(rollout),
            Err(status) if is_lost(&status) => status,
            Err(status) => return Err(client.refused("watch the rollout", &status)),
        };
        if away.is_none() {
            board.note("The server is away; the rollout goes on when it is back.");
        }
        let (since, backoff) = away.get_or_insert_with(|| (Instant::now(), Backoff::default()));
        if since.elapsed() > limits::WATCH_AWAY {
            return Err(client.refused("watch the rollout", &lost));
        }
        backoff.wait().await;
        // When this fails, so does the next watch.
        let _ = client.reconnect().await;
    }
}

/// Watches over one connection. Ends well only when the rollout has ended.
async fn watch_once(
    client: &Client,
    id: &RolloutId,
    mut show: impl FnMut(&Rollout),
) -> Result<Rollout, Status> {
    let request = GetRolloutRequest {
        rollout_id: id.to_string(),
    };
    let mut stream: Streaming<Rollout> = client
        .try_call(async |admin| admin.watch_rollout(request.clone()).await)
        .await
        .map_err(as_lost)?;
    loop {
        let rollout = match tokio::time::timeout(limits::WATCH_SILENCE, stream.message()).await {
            Ok(message) => {
                message?.ok_or_else(|| Status::unavailable("the server ended the stream"))?
            }
            // Quiet, or a connection that is dead without saying so?
            Err(_) => client
                .try_call(async |admin| admin.get_rollout(request.clone()).await)
                .await
                .map_err(as_lost)?,
        };
        show(&rollout);
        if rollout.state() != RolloutState::Active {
            return Ok(rollout);
        }
    }
}

/// A connection over which nothing comes back any more is lost.
fn as_lost(status: Status) -> Status {
    if status.code() == tonic::Code::DeadlineExceeded {
        Status::unavailable(status.message())
    } else {
        status
    }
}

/// Whether a rollout that has ended did so well: no device failed, rolled back, refused or gave up.
pub fn verdict(rollout: &Rollout) -> Result<()> {
    let id = &rollout.rollout_id;
    match rollout.state() {
        RolloutState::Complete => {}
        RolloutState::Aborted => {
            return Err(Failure::new("the rollout was aborted").next(format!(
                "To start another: fwpush rollout start --release {} --to ...",
                rollout.release_id
            )));
        }
        RolloutState::Superseded => {
            return Err(Failure::new("a newer rollout took this one's devices over")
                .next("`fwpush rollout list` shows it."));
        }
        RolloutState::Active | RolloutState::Unspecified => {
            return Err(Failure::new("the rollout has not ended")
                .next(format!("To watch it: fwpush rollout show {id} --follow")));
        }
    }
    let bad = [
        Phase::Failed,
        Phase::RolledBack,
        Phase::Rejected,
        Phase::TimedOut,
        Phase::Cancelled,
    ]
    .map(|phase| (phase, count(rollout, phase)));
    let Some((worst, _)) = bad
        .iter()
        .max_by_key(|(_, devices)| *devices)
        .filter(|(_, devices)| *devices > 0)
    else {
        return Ok(());
    };
    let words: Vec<String> = bad
        .iter()
        .filter(|(_, devices)| *devices > 0)
        .map(|(phase, devices)| format!("{devices} {}", phase_words(*phase)))
        .collect();
    let total: u64 = bad.iter().map(|(_, devices)| devices).sum();
    Err(Failure::new(format!(
        "{} did not take the update: {}",
        plural(total, "device"),
        words.join(", ")
    ))
    .next(format!(
        "`fwpush rollout show {id} --phase {}` shows why.",
        phase_words(*worst).replace(' ', "-")
    )))
}

#[cfg(test)]
mod tests {
    use fwpush_proto::v1::PhaseCount;

    use super::*;

    fn rollout(state: RolloutState, phases: &[(Phase, u64)]) -> Rollout {
        let phases = phases.iter().map(|&(phase, devices)| PhaseCount {
            phase: phase.into(),
            devices,
        });
        Rollout {
            state: state.into(),
            phases: phases.collect(),
            ..Rollout::default()
        }
    }

    #[test]
    fn only_a_complete_rollout_without_losses_is_well() {
        let complete = RolloutState::Complete;
        assert!(
            verdict(&rollout(
                complete,
                &[(Phase::Succeeded, 3), (Phase::Pending, 2)]
            ))
            .is_ok()
        );
        for bad in [
            Phase::Failed,
            Phase::RolledBack,
            Phase::Rejected,
            Phase::TimedOut,
            Phase::Cancelled,
        ] {
            assert!(
                verdict(&rollout(complete, &[(Phase::Succeeded, 3), (bad, 1)])).is_err(),
                "{bad:?}"
            );
        }
        assert!(verdict(&rollout(RolloutState::Aborted, &[])).is_err());
        assert!(verdict(&rollout(RolloutState::Superseded, &[])).is_err());
    }
}
