//! What a database restored from a backup needs before a server goes on with it.
//!
//! Devices remember the newest generation that they handled, and one is handled once. A restored database counts on from an older
//! one: it would give numbers out again that devices already know for something else, and they would answer with what came
//! of that. So every device's count begins anew above all that the lost server can have given out.

use std::{io, path::Path};

use rand::RngExt as _;

use crate::{
    db::{Db, DbError, Place},
    limits,
};

/// Why a restored database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoredError {
    #[error("open the restored database")]
    Open(#[source] DbError),
    #[error("count generations on in the restored database")]
    Lift(#[source] DbError),
    #[error("close the restored database")]
    Close(#[source] io::Error),
}

/// Prepares the database `file` in `dir`, which no server uses yet. Its schema becomes that of this version. Afterwards the file
/// is whole by itself, without a write-ahead log, and synced. Gives the number of devices in it.
pub async fn prepare(dir: &Path, file: &str) -> Result<u64, RestoredError> {
    let db = Db::open(&Place::sqlite(dir.join(file)))
        .await
        .map_err(RestoredError::Open)?;
    // A second restore of the same backup must not repeat the numbers of the first.
    let by = limits::RESTORED_STEP + rand::rng().random_range(0..limits::RESTORED_SPREAD);
    let lifted = db.lift_generations(by).await;
    db.close().await;
    let devices = lifted.map_err(RestoredError::Lift)?;
    check_closed(dir, file).map_err(RestoredError::Close)?;
    Ok(devices)
}

/// SQLite folds the log into the file when its last connection closes; a log that stayed would be lost with `dir`.
fn check_closed(dir: &Path, file: &str) -> io::Result<()> {
    if dir.join(format!("{file}-wal")).exists() {
        return Err(io::Error::other(
            "its write-ahead log could not be folded in",
        ));
    }
    std::fs::File::open(dir.join(file))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        db::testing::{Bench, accepted, facts, id, running},
        desired::DesiredAction,
        rollout::Phase,
        rollouts::Target,
    };

    /// A copy of the bench's database, as a backup has it.
    async fn copy(bench: &Bench) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        bench
            .db
            .vacuum_into(&dir.path().join("fwpush.db"))
            .await
            .unwrap();
        dir
    }

    async fn restored(dir: &tempfile::TempDir) -> Bench {
        prepare(dir.path(), "fwpush.db").await.unwrap();
        Bench::at(Place::sqlite(dir.path().join("fwpush.db"))).await
    }

    #[tokio::test]
    async fn what_is_released_after_a_restore_is_news_to_devices_that_saw_more() {
        let mut bench = Bench::new().await;
        bench.add_all(&["a", "away"]).await;
        let (first, _) = bench.roll_out("1.1.0").await;
        bench.update("a", &first).await;
        let backup = copy(&bench).await;
        // What the lost server did afterwards.
        let mut newest = first;
        for version in ["1.2.0", "1.3.0", "1.4.0"] {
            newest = bench.roll_out(version).await.0;
            bench.update("a", &newest).await;
        }
        let seen = bench.generation("a").await;

        let mut bench = restored(&backup).await;
        bench.check_counts().await;
        let mut last = None;
        // As many rollouts as would make the old counts meet.
        for number in 0..seen {
            let (_, rollout) = bench.roll_out(&format!("2.{number}.0")).await;
            let desired = bench.desired("a").await;
            assert!(desired.generation > seen, "{} is old", desired.generation);
            assert_eq!(desired.rollout_id, Some(rollout));
            last = Some(rollout);
        }
        let mut facts = facts("1.4.0");
        facts.current = running(&newest);
        facts.observed_generation = seen;
        let desired = bench.register("a", facts).await;
        assert_eq!(desired.rollout_id, last);
        assert!(
            !bench
                .event_kinds("a")
                .await
                .contains(&"GENERATION_LIFTED".to_owned()),
            "it was above already"
        );
        bench.check_counts().await;
    }

    #[tokio::test]
    async fn an_update_under_way_at_the_backup_is_told_anew() {
        let mut bench = Bench::new().await;
        bench.add_all(&["a", "b"]).await;
        let (_, rollout) = bench.roll_out("1.1.0").await;
        bench.register("a", facts("1.0.0")).await;
        bench.hear("a").await;
        bench.say("a", accepted()).await;
        let (before, backup) = (bench.generation("a").await, copy(&bench).await);

        let bench = restored(&backup).await;
        for name in ["a", "b"] {
            assert_eq!(bench.phase(&rollout, name).await, Some(Phase::Pending));
            let desired = bench.desired(name).await;
            assert_eq!(desired.action, DesiredAction::Install);
            assert!(desired.generation >= before + limits::RESTORED_STEP);
            assert!(desired.generation < before + limits::GENERATION_STEP);
        }
        bench.check_counts().await;
    }

    #[tokio::test]
    async fn a_device_that_the_backup_does_not_know_begins_above_what_it_saw() {
        let bench = Bench::new().await;
        bench.add("a").await;
        let backup = copy(&bench).await;
        let mut bench = restored(&backup).await;
        bench.add("added-after-the-backup").await;
        let release = bench.publish("1.1.0").await;
        bench.start(&release, Target::All).await;
        bench.drive().await;
        for name in ["a", "added-after-the-backup"] {
            assert!(
                bench.generation(name).await > limits::RESTORED_STEP,
                "{name}"
            );
        }
    }

    #[tokio::test]
    async fn more_devices_than_one_page_are_lifted() {
        let bench = Bench::new().await;
        let names: Vec<String> = (0..limits::STATE_ROWS + 3)
            .map(|n| format!("d{n}"))
            .collect();
        for name in &names {
            bench.add(name).await;
        }
        assert_eq!(
            bench.db.lift_generations(7).await.unwrap(),
            names.len() as u64
        );
        for name in &names {
            let record = bench.db.device(&id(name)).await.unwrap().unwrap();
            assert_eq!(record.desired_generation, 7, "{name}");
        }
    }
}
