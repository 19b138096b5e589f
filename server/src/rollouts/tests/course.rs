//! How the update of a device goes on, whatever it says or fails to say.

use std::time::Duration;

use super::super::*;
use crate::{
    db::testing::*,
    desired::DesiredAction,
    ingest::{Decision, ReportError, ReportKind},
    rollout::Phase,
};
use Phase::{
    Accepted, Cancelled, Downloading, Installing, Offered, Pending, Rebooting, Rejected,
    RolledBack, Succeeded, TimedOut, Verified,
};

on_postgres_too!(
    a_device_that_was_away_gets_it_on_connecting_and_the_rollout_completes_again,
    silence_is_told_again_before_the_answer_and_fails_after_it,
    a_claim_that_differs_means_hold_and_one_event_until_it_agrees_again,
    a_generation_above_ours_lifts_ours_so_that_the_update_is_news,
    a_device_that_lost_its_state_is_told_again_a_bounded_number_of_times,
    a_bad_image_is_tried_once_whatever_reconnects,
    a_blocked_devices_pending_update_waits_and_a_started_one_runs_into_its_deadline,
    a_rejection_keeps_its_reason_and_a_deferral_too,
    a_device_that_puts_off_what_it_has_begun_stays_in_its_phase_and_shows_why_and_until_when,
    a_generation_beyond_any_backup_lifts_nothing_and_is_noted_once,
);

#[tokio::test]
async fn a_device_that_was_away_gets_it_on_connecting_and_the_rollout_completes_again() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.update("a", &release).await;
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    assert_eq!(bench.phases(&rollout).await, [(Pending, 1), (Succeeded, 1)]);
    let desired = bench.register("b", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 1)
    );
    bench.hear("b").await;
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Active);
    bench.update("b", &release).await;
    bench.drive().await;
    let view = bench.view(&rollout).await;
    assert_eq!(
        (view.state, view.waiting_for.as_str()),
        (RolloutState::Complete, "")
    );
    assert!(view.ended_at.is_some());
    bench.check_counts().await;
}

#[tokio::test]
async fn silence_is_told_again_before_the_answer_and_fails_after_it() {
    let mut bench = Bench::new().await;
    bench
        .add_all(&["silent", "stuck", "slow", "deferring"])
        .await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    for name in ["silent", "stuck", "slow", "deferring"] {
        bench.register(name, facts("1.0.0")).await;
        bench.hear(name).await;
    }
    assert_eq!(bench.phases(&rollout).await, [(Offered, 4)]);
    bench.say("stuck", accepted()).await;
    bench.say("slow", downloading(1)).await;
    let until = bench
        .db
        .now()
        .saturating_add(Duration::from_secs(6 * 3_600));
    bench
        .say(
            "deferring",
            ReportKind::Reply {
                decision: Decision::Deferred { until },
                error: None,
            },
        )
        .await;
    bench.db.advance_clock(limits::TIMEOUTS.reply);
    bench.drive().await;
    assert_eq!(bench.phase(&rollout, "silent").await, Some(Pending));
    assert_eq!(
        bench.desired("silent").await.generation,
        1,
        "the same notice is told again"
    );
    bench
        .db
        .advance_clock(limits::TIMEOUTS.step - limits::TIMEOUTS.reply);
    bench.say("slow", downloading(2)).await;
    bench.drive().await;
    assert_eq!(bench.phase(&rollout, "stuck").await, Some(TimedOut));
    assert_eq!(bench.desired("stuck").await.action, DesiredAction::Abort);
    assert_eq!(bench.phase(&rollout, "slow").await, Some(Downloading));
    assert_eq!(
        bench.phase(&rollout, "deferring").await,
        Some(Phase::Deferred)
    );
    bench.say("slow", downloading(2)).await;
    bench.db.advance_clock(limits::TIMEOUTS.step);
    bench.drive().await;
    assert_eq!(
        bench.phase(&rollout, "slow").await,
        Some(TimedOut),
        "the same bytes again are no progress"
    );
    bench.say("deferring", accepted()).await;
    assert_eq!(bench.phase(&rollout, "deferring").await, Some(Accepted));
    bench.check_counts().await;
}

#[tokio::test]
async fn a_claim_that_differs_means_hold_and_one_event_until_it_agrees_again() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let lie = |change: fn(&mut crate::desired::Facts)| {
        let mut facts = facts("1.0.0");
        change(&mut facts);
        facts
    };
    for other in [
        lie(|facts| "other".clone_into(&mut facts.product)),
        lie(|facts| "board-b".clone_into(&mut facts.hw_id)),
        lie(|facts| facts.hw_rev = 9),
        lie(|facts| facts.channels = vec!["beta".to_owned()]),
    ] {
        let desired = bench.register("a", other).await;
        assert_eq!(
            (desired.action, desired.generation),
            (DesiredAction::Hold, 0)
        );
    }
    assert_eq!(bench.event_kinds("a").await, ["FACTS_DIFFER", "ADDED"]);
    let desired = bench.register("a", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 1)
    );
    assert_eq!(bench.event_kinds("a").await[0], "FACTS_AGREE");
    // Told already: the device is told to stop.
    bench.register("b", facts("1.0.0")).await;
    bench.hear("b").await;
    let desired = bench.register("b", lie(|facts| facts.hw_rev = 9)).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 2)
    );
    assert_eq!(bench.phase(&rollout, "b").await, Some(Cancelled));
    let desired = bench.register("b", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 3),
        "it joins again once it is fit"
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_generation_above_ours_lifts_ours_so_that_the_update_is_news() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.hear("a").await;
    bench.say("a", downloading(10)).await;
    let mut remembers = facts("1.0.0");
    remembers.observed_generation = 40;
    let desired = bench.register("a", remembers.clone()).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 41)
    );
    assert_eq!(bench.phase(&rollout, "a").await, Some(Pending));
    bench.say("a", downloading(10)).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Downloading));
    bench.db.remove_device(&id("b"), "tester").await.unwrap();
    abort(&bench.db, &rollout, "tester").await.unwrap();
    bench.add("b").await;
    let desired = bench.register("b", remembers).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 41)
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_device_that_lost_its_state_is_told_again_a_bounded_number_of_times() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    for attempt in 1..=limits::ATTEMPTS {
        let mut fresh = facts("1.0.0");
        fresh.state_id = format!("{attempt:032}");
        let desired = bench.register("a", fresh.clone()).await;
        assert_eq!(
            (desired.attempt, desired.generation),
            (attempt, u64::from(attempt))
        );
        bench.hear("a").await;
        let mut ack = crate::db::testing::report("a", desired.generation, 1, file_ack(&release));
        ack.state_id = fresh.state_id;
        crate::ingest::testing::report(&bench.db, ack, &crate::db::testing::sink())
            .await
            .unwrap();
        assert_eq!(
            bench.phase(&rollout, "a").await,
            Some(Verified),
            "seq starts anew with the state"
        );
    }
    let mut fresh = facts("1.0.0");
    fresh.state_id = "f".repeat(32);
    bench.register("a", fresh).await;
    assert_eq!(
        (
            bench.phase(&rollout, "a").await,
            bench.error_code(&rollout, "a").await.as_str()
        ),
        (Some(Phase::Failed), "STATE_LOST")
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_bad_image_is_tried_once_whatever_reconnects() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", file_ack(&release)).await;
    bench
        .say("a", ended(RolledBack, Some(facts("1.0.0").current)))
        .await;
    for boot in 2..12 {
        let mut back = facts("1.0.0");
        (
            back.boot_count,
            back.observed_generation,
            back.last_report_seq,
        ) = (boot, 1, 2);
        let desired = bench.register("a", back).await;
        assert_eq!(
            (desired.action, desired.generation),
            (DesiredAction::Hold, 1)
        );
    }
    bench.restart().await;
    bench.drive().await;
    assert_eq!(bench.desired("a").await.action, DesiredAction::Hold);
    assert_eq!(bench.phases(&rollout).await, [(RolledBack, 1)]);
}

#[tokio::test]
async fn a_blocked_devices_pending_update_waits_and_a_started_one_runs_into_its_deadline() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.register("b", facts("1.0.0")).await;
    bench.say("b", downloading(1)).await;
    for name in ["a", "b"] {
        bench
            .db
            .set_blocked(&id(name), true, "", "tester")
            .await
            .unwrap();
    }
    bench.db.advance_clock(limits::TIMEOUTS.step);
    bench.drive().await;
    assert_eq!(bench.phases(&rollout).await, [(Pending, 1), (TimedOut, 1)]);
}

#[tokio::test]
async fn a_rejection_keeps_its_reason_and_a_deferral_too() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    for name in ["a", "b"] {
        bench.register(name, facts("1.0.0")).await;
    }
    let error = |code: &str| Some(crate::ingest::ReportError::new(code, "words"));
    let until = bench.db.now();
    bench
        .say(
            "a",
            ReportKind::Reply {
                decision: Decision::Rejected,
                error: error("HARDWARE"),
            },
        )
        .await;
    bench
        .say(
            "b",
            ReportKind::Reply {
                decision: Decision::Deferred { until },
                error: error("BUSY"),
            },
        )
        .await;
    assert_eq!(
        (
            bench.phase(&rollout, "a").await,
            bench.error_code(&rollout, "a").await.as_str()
        ),
        (Some(Rejected), "HARDWARE")
    );
    assert_eq!(bench.error_code(&rollout, "b").await, "BUSY");
    bench.say("b", accepted()).await;
    assert_eq!(bench.error_code(&rollout, "b").await, "");
    assert_eq!(bench.event_kinds("a").await[0], "REJECTED");
}

/// An install window, a metered link, a hook before the trial: the device waits where it is, for longer than a step may take.
#[tokio::test]
async fn a_device_that_puts_off_what_it_has_begun_stays_in_its_phase_and_shows_why_and_until_when()
{
    const DAY: Duration = Duration::from_secs(86_400);
    let deferred = |until| ReportKind::Reply {
        decision: Decision::Deferred { until },
        error: Some(ReportError::new("INSTALL_WINDOW", "")),
    };
    for (phase, silent) in [
        (Downloading, false),
        (Verified, false),
        (Installing, false),
        (Verified, true),
    ] {
        let mut bench = Bench::new().await;
        bench.add_all(&["a"]).await;
        let (release, rollout) = bench.roll_out("1.1.0").await;
        bench.register("a", facts("1.0.0")).await;
        bench.say("a", accepted()).await;
        bench.say("a", downloading(10)).await;
        if phase != Downloading {
            bench.say("a", file_ack(&release)).await;
        }
        if phase == Installing {
            bench.say("a", reached(Installing)).await;
        }
        let until = bench.db.now().saturating_add(2 * DAY);
        bench.say("a", deferred(until)).await;
        bench.db.advance_clock(DAY);
        bench.drive().await;
        let row = bench.row(&rollout, "a").await;
        assert_eq!((row.phase, row.deferred_until), (phase, Some(until)));
        assert_eq!(row.error.unwrap().code, "INSTALL_WINDOW");
        bench.check_counts().await;
        if silent {
            bench.db.advance_clock(2 * DAY);
            bench.drive().await;
            assert_eq!(bench.phase(&rollout, "a").await, Some(TimedOut));
            continue;
        }
        // It goes on: what it says next depends on where it waited.
        let next = match phase {
            Downloading => downloading(20),
            _ => file_ack(&release),
        };
        bench.say("a", next).await;
        let row = bench.row(&rollout, "a").await;
        assert_eq!((row.phase, row.deferred_until), (phase, None));
        assert!(row.error.is_none());
        bench.say("a", reached(Rebooting)).await;
        bench.say("a", deferred(until)).await;
        let row = bench.row(&rollout, "a").await;
        assert_eq!((row.phase, row.deferred_until), (Rebooting, None));
    }
}

#[tokio::test]
async fn a_generation_beyond_any_backup_lifts_nothing_and_is_noted_once() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    bench.roll_out("1.1.0").await;
    let mut lies = facts("1.0.0");
    lies.observed_generation = limits::NUMBER;
    for _ in 0..3 {
        bench.register("a", lies.clone()).await;
    }
    assert_eq!(bench.generation("a").await, 1);
    assert_eq!(bench.event_kinds("a").await, ["GENERATION_ABSURD", "ADDED"]);
    let desired = bench.register("a", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 1)
    );
}
