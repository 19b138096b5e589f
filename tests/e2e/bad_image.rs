//! An image that does not come up healthy: the device goes back by itself, and stays there.

use std::{fs, path::PathBuf};

use fwpush_proto::v1::{Action, Decision, Phase};
use fwpush_tests::{
    agent::{Device, SLOT_BYTES, filler, table},
    offline::COUNTER,
    scene::Scene,
    site::Site,
};
use serde_json::Value;

/// Makes every image of `bad` versions fail its health check. Each check leaves a line in a file beside `agent.toml`: how
/// often an image was tried.
fn fails_health_check(config: &mut toml::Table, trials: &str, bad: &str) {
    let check = format!(
        "echo $FWPUSH_VERSION >> {trials}; case $FWPUSH_VERSION in {bad}) echo no network >&2; exit 1;; esac"
    );
    let command = ["sh", "-c", &check].map(toml::Value::from);
    table(config, "health").insert("command".into(), command.to_vec().into());
}

/// A real site with a device whose version 1.1.0 is bad.
struct Bench {
    site: Site,
    device: Device,
    trials: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let site = Site::started();
        let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
        let trials = site.temp().join("trials");
        device.configure(|config| fails_health_check(config, trials.to_str().unwrap(), "1.1.0"));
        device.start().line_with("Registered.");
        Self {
            site,
            device,
            trials,
        }
    }

    /// Writes an image for [`Site::release`].
    fn image(&self, name: &str) -> (PathBuf, Vec<u8>) {
        let (path, content) = (self.site.temp().join(name), filler(name, 300_000));
        fs::write(&path, &content).unwrap();
        (path, content)
    }

    fn trials(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.trials).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The device's updates as the server has them, newest first: phase, generation, attempt.
    fn updates(&self) -> Vec<(String, u64, u64)> {
        let device = self.site.device("dev-1");
        let updates = device["updates"].as_array().unwrap();
        let of = |update: &Value| {
            let phase = update["phase"].as_str().unwrap().to_owned();
            let number = |name: &str| update[name].as_u64().unwrap();
            (phase, number("generation"), number("attempt"))
        };
        updates.iter().map(of).collect()
    }
}

#[test]
fn a_bad_image_is_installed_once_and_the_device_goes_back() {
    let mut bench = Bench::new();
    let (path, bad) = bench.image("bad");
    let released = bench
        .site
        .release_with(&path, "1.1.0", &["--security-counter", "7"]);
    assert_eq!(
        released.code, 1,
        "a rollback is a failed release: {released:?}"
    );

    let on_the_old_image = |bench: &Bench| {
        let status = bench.device.status();
        let runs = (&status["version"], &status["slot"], &status["confirmed"]);
        assert_eq!(
            runs,
            (&"1.0.0".into(), &"a".into(), &true.into()),
            "{status}"
        );
        assert_eq!(status["phase"], "ROLLED_BACK", "{status}");
        assert_eq!(status["floor"], 0, "a bad image raised the floor: {status}");
        // The first boot, the trial, and the way back.
        assert_eq!(status["boot_count"], 3, "{status}");
        assert_eq!(status["groups_written"], 5, "{status}");
        assert_eq!(bench.trials(), ["1.1.0"]);
        let updates = bench.updates();
        assert_eq!(updates.len(), 1, "{updates:?}");
        assert_eq!((updates[0].0.as_str(), updates[0].2), ("ROLLED_BACK", 1));
        let shown = bench.site.device("dev-1");
        let current = &shown["device"]["current"];
        assert_eq!(current["version"], "1.0.0", "{shown}");
        let error = &shown["updates"][0]["error"];
        assert_eq!(error["code"], "HEALTH_CHECK", "{shown}");
        assert!(
            error["message"].as_str().unwrap().contains("no network"),
            "{shown}"
        );
    };
    on_the_old_image(&bench);
    let shown = bench.site.fwpush(&["device", "show", "dev-1"]).ok().stdout;
    let (_, log) = shown
        .split_once("The device's log of the update that went wrong")
        .unwrap_or_else(|| panic!("{shown}"));
    for line in [
        "DOWNLOADING",
        "starts in slot b in boot 2",
        "no network",
        "starts in slot a in boot 3",
    ] {
        assert!(log.contains(line), "{line}: {shown}");
    }
    bench.device.expect_image("b", &bad);
    bench.device.expect_image("a", &[]);

    // Ten reconnects, in the middle of which the server is killed. `--once` ends when the server has nothing to do.
    bench.device.kill();
    for reconnect in 0..10 {
        bench.device.start().line_with("Registered.");
        bench.device.kill();
        if reconnect == 4 {
            assert_eq!(bench.device.once().code, 0);
            bench.site.kill_server();
            bench.site.start();
        }
    }
    let once = bench.device.once();
    assert_eq!(once.code, 0, "{once:?}");
    on_the_old_image(&bench);

    // What is good is installed all the same.
    let (path, good) = bench.image("good");
    bench.device.start().line_with("Registered.");
    bench.site.release(&path, "1.2.0").ok();
    let status = bench.device.status();
    assert_eq!(status["version"], "1.2.0", "{status}");
    assert_eq!(
        status["floor"], 7,
        "the product's counter went up with the bad release: {status}"
    );
    bench.device.expect_image("b", &good);
    assert_eq!(bench.trials(), ["1.1.0", "1.2.0"]);
    assert_eq!(bench.updates()[0].0, "SUCCEEDED");
}

/// Killed whenever it is asked for a verdict, the agent does not keep the trial open for ever.
#[test]
fn an_image_under_which_the_agent_keeps_dying_is_given_up() {
    let mut bench = Bench::new();
    bench.device.configure(|config| {
        let command = ["sleep", "30"].map(toml::Value::from);
        table(config, "health").insert("command".into(), command.to_vec().into());
    });
    bench.device.kill();
    bench.device.start().line_with("Registered.");
    let (path, _) = bench.image("hangs");
    bench.site.release_with(&path, "1.1.0", &["--detach"]).ok();
    let mut starts = 0;
    loop {
        let line = bench.device.agent().line_with("CONFIRMING");
        if line.contains("CRASH_LOOP") {
            break;
        }
        bench.device.kill();
        starts += 1;
        assert!(starts < 20, "the trial has no end");
        bench.device.start();
    }
    let line = bench.device.agent().line_with("phase=ROLLED_BACK");
    assert!(line.contains("CRASH_LOOP"), "{line}");
    assert_eq!(bench.device.status()["version"], "1.0.0");
}

#[test]
fn a_health_check_that_does_not_end_is_a_bad_verdict() {
    let mut bench = Bench::new();
    bench.device.configure(|config| {
        let command = ["sleep", "1000"].map(toml::Value::from);
        let health = table(config, "health");
        health.insert("command".into(), command.to_vec().into());
        health.insert("timeout_s".into(), 1.into());
    });
    bench.device.kill();
    bench.device.start().line_with("Registered.");
    let (path, _) = bench.image("hangs");
    let released = bench.site.release(&path, "1.1.0");
    assert_eq!(released.code, 1, "{released:?}");
    let status = bench.device.status();
    assert_eq!(status["version"], "1.0.0", "{status}");
    assert_eq!(status["error"]["code"], "HEALTH_CHECK", "{status}");
}

/// Without a check of its own an image is good when it has registered with the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_reach_the_server_is_rolled_back() {
    let mut scene = Scene::with(|config| {
        table(config, "health").insert("confirm_timeout_s".into(), 2.into());
    })
    .await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    let ack = scene.until_verified(notice).await;
    scene.server.refuse(true);
    scene.session.acknowledge(ack.seq, 1).await;
    let line = scene.device.agent().line_with("phase=ROLLED_BACK");
    assert!(line.contains("CONFIRM_TIMEOUT"), "{line}");
    let status = scene.device.status();
    assert_eq!(
        (&status["version"], &status["slot"]),
        (&"1.0.0".into(), &"a".into()),
        "{status}"
    );

    // What nobody heard is said once somebody listens.
    scene.server.refuse(false);
    scene.session = scene.server.session().await;
    scene.session.generation = 1;
    let report = scene.session.phase(Phase::RolledBack).await;
    assert_eq!(report.current.unwrap().version, "1.0.0");
}

/// A signed release that is bad on this device, offered again and again by a server that wants it down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_release_is_tried_a_bounded_number_of_times() {
    let trials = tempfile::NamedTempFile::new().unwrap();
    let path = trials.path().to_str().unwrap().to_owned();
    let mut scene = Scene::with(|config| fails_health_check(config, &path, "1.1.0")).await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let mut offers = 0;
    let refusal = loop {
        offers += 1;
        assert!(offers < 20, "it is tried for ever");
        let notice = scene.notice(Action::Install, offers, manifest.clone());
        match scene.server.see_through(&mut scene.session, notice).await {
            Ok(report) => assert_eq!(report.phase(), Phase::RolledBack, "{report:?}"),
            Err(reply) => break reply,
        }
    };
    assert_eq!(refusal.decision(), Decision::Rejected);
    assert_eq!(refusal.reason.unwrap().code, "ATTEMPTS");
    assert_eq!(
        fs::read_to_string(trials.path()).unwrap(),
        "1.1.0\n".repeat(3)
    );
    let status = scene.device.status();
    assert_eq!(status["floor"], COUNTER, "{status}");

    // Another release of another version is not held against it.
    let release = scene.offline.release(&scene.image.content, "1.2.0");
    let manifest = scene.offline.sign(&release);
    let notice = scene.notice(Action::Install, 100, manifest);
    scene.expect_install(notice, "1.2.0").await;
}
