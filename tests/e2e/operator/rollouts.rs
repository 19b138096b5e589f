//! Rollouts as an operator starts, previews and stops them.

use fwpush_keys::{RolloutId, Timestamp};
use fwpush_proto::v1::{AbortRolloutRequest, Action, RolloutState, StartRolloutRequest, Target};
use fwpush_tests::site::{PRODUCT, Site};

use super::{expect_failure, expect_usage, running_device, text};

/// How many rollouts the server knows.
fn rollouts(site: &Site) -> usize {
    let list = site.fwpush(&["rollout", "list", "--json"]).ok().json();
    list["rollouts"].as_array().unwrap().len()
}

fn releases(site: &Site) -> usize {
    let list = site.fwpush(&["release", "list", "--json"]).ok().json();
    list["releases"].as_array().unwrap().len()
}

#[test]
fn a_dry_run_shows_whom_it_would_reach_and_leaves_no_trace() {
    let site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    site.fwpush(&["device", "block", "dev-2"]).ok();
    let image = site.image("fw.img", 50_000, 1);
    let done = site
        .release_with(&image, "1.1.0", &["--dry-run", "--json"])
        .ok();
    let preview = &done.json()["preview"];
    assert_eq!(preview["eligible"], 1, "{preview}");
    assert_eq!(preview["excluded"][0]["reason"], "BLOCKED", "{preview}");
    assert_eq!(preview["excluded"][0]["examples"][0], "dev-2", "{preview}");
    assert_eq!((releases(&site), rollouts(&site)), (0, 0));
    assert!(
        !site.metrics_text().contains("fwpush_upload_bytes_total "),
        "an image was uploaded"
    );
    let id = blake3::hash(&std::fs::read(&image).unwrap()).to_string();
    assert!(
        !site
            .dir()
            .join("server/data/files")
            .join(&id[..2])
            .join(&id)
            .exists()
    );

    let published = site.publish(&image, PRODUCT, "1.1.0");
    let start = [
        "rollout",
        "start",
        "--release",
        &published.release_id,
        "--to",
        "all",
    ];
    site.fwpush(&[&start[..], &["--dry-run"]].concat()).ok();
    assert_eq!(rollouts(&site), 0);
}

#[test]
fn without_a_terminal_nothing_begins_unless_consent_is_given() {
    let site = Site::started();
    site.add_device("dev-1");
    let image = site.image("fw.img", 50_000, 1);
    let image = image.to_str().unwrap();
    let release = [
        "release",
        image,
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
        "--hw",
        "board-a",
        "--to",
        "all",
    ];
    expect_usage(&site.fwpush(&release), "--yes");
    assert_eq!((releases(&site), rollouts(&site)), (0, 0));
    site.fwpush(&[&release[..], &["--yes", "--detach"]].concat())
        .ok();
    let list = site.fwpush(&["rollout", "list", "--json"]).ok().json();
    let rollout = &list["rollouts"][0];
    expect_usage(
        &site.fwpush(&["rollout", "abort", text(rollout, "rollout_id")]),
        "--yes",
    );
    let start = [
        "rollout",
        "start",
        "--release",
        text(rollout, "release_id"),
        "--to",
        "dev-1",
    ];
    expect_usage(&site.fwpush(&start), "--yes");
    expect_usage(&site.fwpush(&["device", "remove", "dev-1"]), "--yes");
    assert_eq!(rollouts(&site), 1);
    let list = site.fwpush(&["rollout", "list", "--json"]).ok().json();
    assert_eq!(list["rollouts"][0]["state"], "ACTIVE", "{list}");
    site.device("dev-1");
}

#[test]
fn an_aborted_rollout_reaches_nobody_any_more_and_a_new_one_does() {
    let site = Site::started();
    let mut device =
        fwpush_tests::agent::Device::add(&site, "dev-1", fwpush_tests::agent::SLOT_BYTES);
    let image = site.image("fw.img", 50_000, 1);
    let released = site
        .release_with(&image, "1.1.0", &["--detach", "--json"])
        .ok()
        .json();
    let id = text(&released, "rollout_id");
    let aborted = site
        .fwpush(&["rollout", "abort", id, "--yes", "--json"])
        .ok()
        .json();
    assert_eq!(aborted["state"], "ABORTED", "{aborted}");
    // Again: the same answer. Watching it ends with a failure.
    site.fwpush(&["rollout", "abort", id, "--yes"]).ok();
    expect_failure(
        &site.fwpush(&["rollout", "show", id, "--follow"]),
        "aborted",
    );

    device.start().line_with("Registered.");
    device.kill();
    assert_eq!(device.once().code, 0);
    assert_eq!(device.status()["version"], "1.0.0");
    assert_eq!(device.status()["groups_written"], 0);

    device.start().line_with("Registered.");
    let release = text(&released, "release_id");
    site.fwpush(&[
        "rollout",
        "start",
        "--release",
        release,
        "--to",
        "dev-1",
        "--yes",
    ])
    .ok();
    assert_eq!(device.status()["version"], "1.1.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_and_aborts_that_race_leave_one_state_and_a_device_that_can_be_updated() {
    let site = Site::started();
    let device = running_device(&site, "dev-1");
    let image = site.image("fw.img", 50_000, 1);
    let published = site.publish(&image, PRODUCT, "1.1.0");
    let admin = site.admin().await;
    for _ in 0..5 {
        let rollout_id = RolloutId::new_v7(Timestamp::now()).to_string();
        let start = StartRolloutRequest {
            rollout_id: rollout_id.clone(),
            release_id: published.release_id.clone(),
            target: Some(Target {
                all: true,
                device_ids: Vec::new(),
            }),
            action: Action::Install.into(),
            ..Default::default()
        };
        let started = (0..3).map(|_| {
            let (mut admin, start) = (admin.clone(), start.clone());
            async move {
                admin
                    .start_rollout(start)
                    .await
                    .map(|answer| answer.into_inner())
            }
        });
        let aborted = (0..3).map(|_| {
            let (mut admin, rollout_id) = (admin.clone(), rollout_id.clone());
            async move {
                let request = AbortRolloutRequest { rollout_id };
                admin
                    .abort_rollout(request)
                    .await
                    .map(|answer| answer.into_inner())
            }
        });
        let (started, aborted) = tokio::join!(
            futures::future::join_all(started),
            futures::future::join_all(aborted)
        );
        for answer in &started {
            let rollout = answer.as_ref().expect("the same start again is no error");
            assert_eq!(rollout.rollout_id, rollout_id);
        }
        for answer in &aborted {
            match answer {
                Ok(rollout) => assert_eq!(rollout.state(), RolloutState::Aborted),
                Err(status) => assert_eq!(status.code(), tonic::Code::NotFound, "{status:?}"),
            }
        }
        let request = AbortRolloutRequest {
            rollout_id: rollout_id.clone(),
        };
        let last = admin
            .clone()
            .abort_rollout(request)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(last.state(), RolloutState::Aborted);
        // Started again under the same id, it stays aborted.
        let again = admin
            .clone()
            .start_rollout(start)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(again.state(), RolloutState::Aborted);
    }
    let list = site.fwpush(&["rollout", "list", "--json"]).ok().json();
    let list = list["rollouts"].as_array().unwrap();
    assert_eq!(list.len(), 5, "{list:?}");
    assert!(
        list.iter().all(|rollout| rollout["state"] == "ABORTED"),
        "{list:?}"
    );
    // Some of it may have reached the device; either way it takes the next release.
    site.release(&site.image("next.img", 60_000, 2), "1.2.0")
        .ok();
    assert_eq!(device.status()["version"], "1.2.0");
}
