//! A server that asks for absurd things: actions, intervals, generations, repetitions, amounts.

use std::time::{Duration, Instant};

use fwpush_keys::Timestamp;
use fwpush_proto::v1::{Drain, TextMessage};
use tonic::Status;

use super::*;

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_action_is_refused_though_its_manifest_is_good() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    for (action, generation) in [0, 5, -1, i32::MAX].into_iter().zip(1..) {
        let notice = FileNotice {
            action,
            ..scene.notice(Action::Install, generation, manifest.clone())
        };
        expect_refusal(&mut scene, notice, "ACTION").await;
    }
    let notice = scene.notice(Action::Install, 9, manifest);
    scene.expect_install(notice, "1.1.0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_interval_of_nothing_does_not_make_the_device_beat_without_pause() {
    let mut scene = Scene::new().await;
    scene.server.welcome(|registered| {
        registered.heartbeat_interval_ms = 0;
        registered.report_interval_ms = 0;
        registered.reconnect_spread_ms = 0;
    });
    let registered = Instant::now();
    scene.restart().await;
    // The first comes after a random part of the interval, the second a whole one later: 5 s less 10 %.
    scene.session.heartbeat().await;
    scene.session.heartbeat().await;
    assert!(registered.elapsed() >= Duration::from_millis(4_500));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn intervals_of_centuries_leave_the_device_at_work() {
    let mut scene = Scene::new().await;
    scene.server.welcome(|registered| {
        registered.heartbeat_interval_ms = u64::MAX;
        registered.report_interval_ms = u64::MAX;
        registered.reconnect_spread_ms = u64::MAX;
        registered.server_time_at_ms = i64::MAX;
        registered.session_id = "x".repeat(100_000);
    });
    scene.restart().await;
    let forever = Drain {
        min_ms: u64::MAX,
        max_ms: u64::MAX,
    };
    scene.session.say(ToDevice::Drain(forever)).await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.expect_install(notice, "1.1.0").await;
}

/// Sent away as soon as it has registered, the device waits longer and longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_sends_the_device_away_again_and_again_does_not_keep_it_connecting() {
    let mut scene = Scene::new().await;
    let (start, mut sessions) = (Instant::now(), 0);
    let window = Duration::from_secs(6);
    while start.elapsed() < window {
        scene.session.say(ToDevice::Drain(Drain::default())).await;
        sessions += 1;
        let left = window.saturating_sub(start.elapsed());
        match tokio::time::timeout(left, scene.server.session()).await {
            Ok(session) => scene.session = session,
            Err(_) => break,
        }
    }
    // Waits of up to 1, 2, 4, 8, ... s: more than a dozen within six seconds do not happen.
    assert!(sessions <= 12, "{sessions} sessions within {window:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_in_the_far_future_is_put_off_for_a_week_at_most() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let absurd = [(i64::MAX, 0), (1, u64::MAX), (i64::MAX, u64::MAX)];
    for ((not_before_at_ms, spread_ms), generation) in absurd.into_iter().zip(1..) {
        let notice = FileNotice {
            not_before_at_ms,
            spread_ms,
            ..scene.notice(Action::Install, generation, manifest.clone())
        };
        let reply = scene.session.notify(notice).await;
        assert_eq!(reply.decision(), Decision::Deferred, "{reply:?}");
        let latest = Timestamp::now().saturating_add(7 * DAY);
        assert!(reply.until_at_ms <= latest.as_ms(), "{reply:?}");
    }
    // It was put off, not given up: whoever has the say next is heard.
    let notice = FileNotice {
        not_before_at_ms: i64::MIN,
        ..scene.notice(Action::Install, 9, manifest)
    };
    scene.expect_install(notice, "1.1.0").await;
}

/// A generation near the end of the numbers would make the device deaf to all that follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absurd_generations_do_not_make_the_device_deaf() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    for generation in [u64::MAX, 1 << 53, (1 << 53) - 1, 1 << 52 | 1, 0] {
        let notice = scene.notice(Action::Hold, generation, Bytes::new());
        scene.session.say(ToDevice::FileNotice(notice)).await;
    }
    scene.session.settle().await;
    let observed = scene.device.status()["generation"].as_u64().unwrap();
    assert_eq!(observed, 0);

    // One that a device with a lost state may meet at a real server.
    let high = 1 << 40;
    let notice = scene.notice(Action::Hold, high, Bytes::new());
    assert_eq!(
        scene.session.notify(notice).await.decision(),
        Decision::Accepted
    );
    for generation in [high - 1, high + (1 << 40), (1 << 53) - 1] {
        let notice = scene.notice(Action::Hold, generation, Bytes::new());
        scene.session.say(ToDevice::FileNotice(notice)).await;
    }
    scene.session.settle().await;
    let notice = scene.notice(Action::Install, high + 1, manifest);
    scene.expect_install(notice, "1.1.0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_notice_is_answered_and_not_carried_out_again() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.expect_install(notice.clone(), "1.1.0").await;
    let (storage, asked) = (scene.device.storage(), scene.server.asked());
    let boots = scene.device.status()["boot_count"].clone();
    for _ in 0..10 {
        scene
            .session
            .say(ToDevice::FileNotice(notice.clone()))
            .await;
        let report = scene.session.phase(Phase::Succeeded).await;
        assert_eq!(report.generation, 1);
    }
    scene.restart().await;
    scene.session.say(ToDevice::FileNotice(notice)).await;
    scene.session.phase(Phase::Succeeded).await;
    assert!(scene.device.storage() == storage, "something was written");
    assert_eq!(scene.server.asked(), asked);
    assert_eq!(scene.device.status()["boot_count"], boots);
}

/// Back and forth between two proper releases, without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_cannot_reinstall_for_ever() {
    let mut scene = Scene::new().await;
    let first = scene.offline.sign(&scene.release(Action::Install));
    let second = scene.offline.sign(&scene.release(Action::Rollback));
    let moves = [(Action::Install, &first), (Action::Rollback, &second)];
    let mut installs = 0;
    let refusal = loop {
        let (action, manifest) = moves[installs % 2];
        let notice = scene.notice(action, installs as u64 + 1, manifest.clone());
        match scene.server.see_through(&mut scene.session, notice).await {
            Ok(report) => assert_eq!(report.phase(), Phase::Succeeded, "{report:?}"),
            Err(reply) => break reply,
        }
        installs += 1;
        assert!(installs < 20, "installs have no bound");
    };
    assert_eq!(installs, 6);
    assert_eq!(refusal.decision(), Decision::Deferred);
    assert_eq!(refusal.reason.unwrap().code, "INSTALL_LIMIT");
    let latest = Timestamp::now().saturating_add(DAY);
    assert!(refusal.until_at_ms <= latest.as_ms());
    // A restart does not begin the count anew.
    scene.restart().await;
    let notice = scene.notice(Action::Install, 100, first);
    let reply = scene.session.notify(notice).await;
    assert_eq!(reply.reason.unwrap().code, "INSTALL_LIMIT");
    assert_eq!(scene.device.status()["boot_count"], installs + 1);
}

/// What runs is not installed again, under whatever number it is asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_already_is_not_installed_again_however_often_it_is_pushed() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest.clone());
    scene.expect_install(notice, "1.1.0").await;
    let (storage, asked) = (scene.device.storage(), scene.server.asked());
    let boots = scene.device.status()["boot_count"].clone();
    for generation in 2..12 {
        let notice = scene.notice(Action::Install, generation * 1_000, manifest.clone());
        let report = scene.server.see_through(&mut scene.session, notice).await;
        assert_eq!(report.unwrap().phase(), Phase::Succeeded);
    }
    assert!(scene.device.storage() == storage, "something was written");
    assert_eq!(scene.server.asked(), asked);
    assert_eq!(scene.device.status()["boot_count"], boots);
}

/// Mirrors at hosts that the device's configuration does not allow: not even a connection is made to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_mirror_is_never_contacted() {
    // Mirrors are used, elsewhere.
    let mut scene = Scene::with(|config| {
        let hosts = ["updates.example", "127.0.0.1", "localhost"].map(str::to_owned);
        table(config, "transfer").insert("mirror_hosts".into(), hosts.to_vec().into());
    })
    .await;
    let foreign = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    foreign.set_nonblocking(true).unwrap();
    let port = foreign.local_addr().unwrap().port();
    let urls = [
        format!("https://127.0.0.1:{port}/image"),
        format!("http://127.0.0.1:{port}/image"),
        format!("https://localhost:{port}/image"),
        format!("https://{0}@127.0.0.1:{port}/image", "updates.example"),
        format!("file:///proc/self/environ#127.0.0.1:{port}"),
    ];
    let mirrors = urls.map(|url| fwpush_proto::v1::Mirror {
        url,
        expires_at_ms: i64::MAX,
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let mut notice = scene.notice(Action::Install, 1, manifest.clone());
    notice.mirrors = mirrors.to_vec();
    scene.expect_install(notice, "1.1.0").await;
    // Nor where the server itself sends nothing.
    scene
        .server
        .serve(|_| Err(Status::not_found("look at a mirror")));
    scene.image = Image::new(filler("another image", 200_000));
    let release = scene.offline.release(&scene.image.content, "1.2.0");
    let manifest = scene.offline.sign(&release);
    let mut notice = scene.notice(Action::Install, 2, manifest);
    notice.mirrors = mirrors.to_vec();
    scene.session.generation = 2;
    scene.session.say(ToDevice::FileNotice(notice)).await;
    let deferred = |kind: &FromDevice| matches!(kind, FromDevice::NoticeReply(reply) if reply.reason.as_ref().is_some_and(|reason| reason.code == "FILE_NOT_FOUND"));
    scene.session.until(deferred).await;
    let seen = foreign.accept().map(|(_, from)| from).unwrap_err();
    assert_eq!(seen.kind(), std::io::ErrorKind::WouldBlock, "{seen}");
}

/// A server that is always busy and says "at once" is asked with pauses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_server_that_names_no_wait_or_an_absurd_one_is_not_asked_in_a_loop() {
    for wait in ["0", "-1", "soon"] {
        let mut scene = Scene::new().await;
        scene.server.serve(move |_| {
            let mut busy = Status::resource_exhausted("too many downloads");
            let wait = wait.parse().unwrap();
            busy.metadata_mut().insert("retry-after-ms", wait);
            Err(busy)
        });
        let manifest = scene.offline.sign(&scene.release(Action::Install));
        let notice = scene.notice(Action::Install, 1, manifest);
        let (start, cpu) = (Instant::now(), scene.device.agent().cpu_time());
        scene
            .session
            .say(ToDevice::FileNotice(notice.clone()))
            .await;
        let busy = |line: &str| line.contains("transfer.cut") && line.contains("SERVER_BUSY");
        let mut from = 0;
        for _ in 0..3 {
            from = scene.device.agent().line_where(from, "busy", busy).0;
        }
        // Half a second at least between two calls.
        let asked = scene.server.asked().len() as u64;
        let most = 1 + start.elapsed().as_millis() as u64 / 500;
        assert!(asked <= most, "{asked} calls in {:?}", start.elapsed());
        let cpu = scene.device.agent().cpu_time() - cpu;
        assert!(cpu < start.elapsed() / 2, "busy for {cpu:?}");
        scene.server.serve(proper(&scene.image));
        scene.expect_install(notice, "1.1.0").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_begins_only_when_the_server_has_acknowledged_the_file() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 7, manifest);
    let ack = scene.until_verified(notice).await;
    let record = scene.device.storage().boot_record;
    // Not this report; numbers never given out; another generation.
    for (upto_seq, generation) in [
        (ack.seq - 1, 7),
        (ack.seq + 1_000, 7),
        (u64::MAX, 7),
        (ack.seq, 6),
    ] {
        scene.session.acknowledge(upto_seq, generation).await;
        scene.session.settle().await;
        assert_eq!(scene.device.status()["phase"], "VERIFIED");
        assert!(
            scene.device.storage().boot_record == record,
            "the trial was marked"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_of_absurd_size_ends_the_session_and_nothing_else() {
    let mut scene = Scene::new().await;
    let huge = TextMessage {
        text: "x".repeat(64 << 20),
    };
    scene.session.say(ToDevice::Text(huge)).await;
    assert_eq!(scene.session.next().await, None);
    scene.session = scene.server.session().await;
    // Envelopes over their bound are not even parsed.
    let notice = scene.notice(Action::Install, 1, vec![b'{'; 1 << 20].into());
    expect_refusal(&mut scene, notice, "ENVELOPE_MALFORMED").await;
    let update = TrustUpdate {
        roots: vec![vec![b'{'; 70_000].into(); 16],
        revocation: Bytes::new(),
    };
    let error = scene.session.trust(update).await.error.unwrap();
    assert_eq!(error.code, "ENVELOPE_TOO_LARGE");
    let peak = scene.device.peak_memory();
    assert!(peak < 256 << 20, "the agent took {peak} bytes");
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 2, manifest);
    scene.expect_install(notice, "1.1.0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_notices_is_survived_in_bounded_memory() {
    let mut scene = Scene::new().await;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    for generation in 1..=300 {
        let padding = Bytes::from(vec![b'{'; 60_000]);
        let notice = scene.notice(Action::Install, generation, padding);
        scene.session.say(ToDevice::FileNotice(notice)).await;
    }
    // Only the newest of a flood counts.
    let notice = scene.notice(Action::Install, 301, manifest);
    scene.expect_install(notice, "1.1.0").await;
    let lines = scene.device.agent().lines();
    let seen = lines.iter().filter(|line| line.contains("A notice came."));
    assert!(seen.count() < 40, "each notice was looked at");
    let peak = scene.device.peak_memory();
    assert!(peak < 256 << 20, "the agent took {peak} bytes");
}

/// UNAUTHENTICATED, garbage and early ends: the device comes back to whoever answers properly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_ends_badly_is_opened_again() {
    let mut scene = Scene::new().await;
    for status in [
        Status::unauthenticated("go away"),
        Status::internal("\u{1b}[2J"),
    ] {
        scene.session.end(status).await;
        scene.session = scene.server.session().await;
    }
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    scene.expect_install(notice, "1.1.0").await;
}
