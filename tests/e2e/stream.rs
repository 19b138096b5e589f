//! The control stream: its order of messages, its bounds, who hears what, and how it ends.

use fwpush_keys::Timestamp;
use fwpush_proto::v1::{
    DeviceFacts, FileNotice, GetDeviceRequest, Heartbeat, NoticeReply, ReconnectRequest,
    RegisterRequest, SessionKind, StartRolloutRequest, Target, UpdateReport,
    client_message::Kind as FromDevice, server_message::Kind as ToDevice,
};
use fwpush_tests::{
    client::{Stream, facts},
    raw::{RawStream, encoded, padded},
    site::{PRODUCT, Site},
    wait,
};
use tonic::{Code, Status, transport::Channel};

mod floods;
mod messages;
mod reports;
mod slow;

// ---- The first message ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_message_must_be_a_registration_with_facts_within_their_bounds() {
    let site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let register = |facts| {
        FromDevice::Register(RegisterRequest {
            client_id: "dev-1".into(),
            facts,
        })
    };
    let with = |change: fn(&mut DeviceFacts)| {
        let mut facts = facts();
        change(&mut facts);
        register(Some(facts))
    };
    let pairs = |count: usize, bytes: usize| {
        (0..count).map(move |at| (format!("{at:02}"), "v".repeat(bytes)))
    };
    let attributes = |count, bytes| {
        let mut facts = facts();
        facts.attributes = pairs(count, bytes).collect();
        register(Some(facts))
    };
    for (first, words) in [
        (
            beat("dev-1", 1),
            "the first message must be register or reconnect",
        ),
        (
            FromDevice::Report(UpdateReport {
                seq: 1,
                phase: 5,
                ..Default::default()
            }),
            "the first message must be",
        ),
        (register(None), "no facts"),
        (with(|facts| facts.state_id = "X".repeat(32)), "state_id"),
        (
            with(|facts| facts.channels = vec!["stable".into(); 17]),
            "channels: more than 16",
        ),
        (
            with(|facts| facts.channels = vec!["../stable".into()]),
            "channels",
        ),
        (
            with(|facts| facts.agent_version = "v1".into()),
            "agent_version",
        ),
        (with(|facts| facts.current = None), "current is missing"),
        (
            with(|facts| facts.current.as_mut().unwrap().version = "01.0.0".into()),
            "current",
        ),
        (with(|facts| facts.boot_count = 1 << 53), "boot_count"),
        (
            with(|facts| facts.observed_generation = u64::MAX),
            "observed_generation",
        ),
        (with(|facts| facts.boot_id = "b".repeat(65)), "boot_id"),
        (attributes(65, 1), "attributes: more than 64"),
        (attributes(64, 63), "attributes: more than 4096"),
    ] {
        let refused = Stream::begin(channel.clone(), first).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{words}: {refused}");
        assert!(
            refused.message().contains(words),
            "{words:?} is not in {refused}"
        );
    }
    // Everything at its bound.
    Stream::begin(channel, attributes(64, 62)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_on_which_nothing_is_sent_is_ended() {
    let site = Site::started();
    site.add_device("dev-1");
    let mut silent = Stream::open(site.connect("dev-1").await).await.unwrap();
    let ended = silent.end().await;
    assert_eq!(ended.code(), Code::DeadlineExceeded);
    assert!(
        ended
            .message()
            .contains("no register or reconnect message within 10 s"),
        "{ended}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_registered_once() {
    let site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let again = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(facts()),
    });
    for second in [again, reconnect("dev-1", "x", &facts())] {
        let (mut stream, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
        stream.say(second).await;
        let refused = stream.end().await;
        assert_eq!(
            (refused.code(), refused.message()),
            (
                Code::FailedPrecondition,
                "this stream is registered already"
            )
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_logged_of_a_stream_names_its_device_rollout_and_generation() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    // While it is connected: registered before there was anything to do.
    offer(&site, "dev-1").await;
    let told = notice(&mut stream).await;
    let sent = site.server().line_with("A notice was sent");
    stream.say(reconnect("dev-1", "x", &facts())).await;
    stream.end().await;
    let ended = site.server().line_with("A stream was ended");
    for line in [sent, ended] {
        for field in [
            "device.id=dev-1".to_owned(),
            format!("rollout.id={}", told.rollout_id),
            format!("generation={}", told.generation),
        ] {
            assert!(line.contains(&field), "{field} is not in {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notice_spreads_the_beginning_of_an_update_as_configured() {
    let mut site = Site::new();
    site.edit_config(|config| {
        let limits = config["limits"].as_table_mut().unwrap();
        limits.insert("update_spread_s".into(), 600.into());
    });
    site.start();
    site.add_device("dev-1");
    offer(&site, "dev-1").await;
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let told = notice(&mut stream).await;
    assert_eq!(told.spread_ms, 600_000);
    // To give it up cannot wait.
    site.fwpush(&["rollout", "abort", &told.rollout_id, "--yes"])
        .ok();
    let abort = notice(&mut stream).await;
    assert_eq!((abort.action, abort.spread_ms), (3, 0));
}

// ---- Sessions ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_names_its_last_session_is_resumed_and_not_told_again() {
    let mut site = Site::started();
    site.add_device("dev-1");
    offer(&site, "dev-1").await;
    let mut facts = facts();
    let first = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(facts.clone()),
    });
    let (mut stream, registered) = Stream::begin(site.connect("dev-1").await, first)
        .await
        .unwrap();
    assert_eq!(registered.kind(), SessionKind::Fresh);
    let notice = notice(&mut stream).await;

    // The old stream still seems alive; the device has not handled the notice, so it hears it again.
    let back = reconnect("dev-1", &registered.session_id, &facts);
    let (mut second, resumed) = Stream::begin(site.connect("dev-1").await, back)
        .await
        .unwrap();
    assert_eq!(resumed.kind(), SessionKind::Resumed);
    assert!(resumed.epoch > registered.epoch);
    assert_eq!(stream.end().await.code(), Code::Aborted);
    assert_eq!(
        self::notice(&mut second).await.generation,
        notice.generation
    );

    // Now it has, and left properly: nothing has changed, nothing is said.
    facts.observed_generation = notice.generation;
    drop(second);
    offline(&site, "dev-1").await;
    let back = reconnect("dev-1", &resumed.session_id, &facts);
    let (mut third, resumed) = Stream::begin(site.connect("dev-1").await, back)
        .await
        .unwrap();
    assert_eq!(resumed.kind(), SessionKind::Resumed);
    assert_eq!(
        heard(&mut third, "dev-1").await,
        [],
        "a resumed device that is up to date is told nothing"
    );

    // A session that is not the last one is worth nothing.
    let back = reconnect("dev-1", &registered.session_id, &facts);
    let (mut fourth, fresh) = Stream::begin(site.connect("dev-1").await, back)
        .await
        .unwrap();
    assert_eq!(fresh.kind(), SessionKind::Fresh);
    assert_eq!(
        self::notice(&mut fourth).await.generation,
        notice.generation
    );

    // Nor is one that the server's last run gave out; its epochs are below those of this run.
    site.kill_server();
    site.start();
    let back = reconnect("dev-1", &fresh.session_id, &facts);
    let (_fifth, after_restart) = Stream::begin(site.connect("dev-1").await, back)
        .await
        .unwrap();
    assert_eq!(after_restart.kind(), SessionKind::Fresh);
    assert!(after_restart.epoch > fresh.epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_streams_the_newer_wins_and_late_reports_of_the_older_change_nothing() {
    let site = Site::started();
    site.add_device("dev-1");
    offer(&site, "dev-1").await;
    let facts = facts();
    let register = || {
        FromDevice::Register(RegisterRequest {
            client_id: "dev-1".into(),
            facts: Some(facts.clone()),
        })
    };
    let (mut older, _) = Stream::begin(site.connect("dev-1").await, register())
        .await
        .unwrap();
    let told = notice(&mut older).await;
    let (mut newer, _) = Stream::begin(site.connect("dev-1").await, register())
        .await
        .unwrap();
    notice(&mut newer).await;

    until_offered(&site, "dev-1").await;
    older.say(FromDevice::NoticeReply(reply(1, &told, 3))).await;
    let ended = older.end().await;
    assert_eq!(
        (ended.code(), ended.message()),
        (Code::Aborted, "a newer stream of this device took over")
    );
    newer.beat("dev-1", 1).await.unwrap();
    assert_eq!(phase(&site, "dev-1").await, "offered");

    newer.say(FromDevice::NoticeReply(reply(1, &told, 1))).await;
    let acked = newer.wait_for(|message| match message {
        ToDevice::ReportAck(ack) => Some(ack.upto_seq),
        _ => None,
    });
    assert_eq!(acked.await.unwrap(), 1);
    assert_eq!(phase(&site, "dev-1").await, "accepted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_are_answered_and_a_stream_without_them_is_ended() {
    let site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let (mut beating, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let (mut silent, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    for timestamp in [1, -1, 0, i64::MAX, i64::MIN] {
        assert_eq!(
            beating.beat("dev-1", timestamp).await.unwrap().timestamp,
            timestamp
        );
    }
    // Three intervals of 5 s, in which the other one beats as it should.
    let silence = silent.end();
    tokio::pin!(silence);
    let mut beats = 0;
    let ended = loop {
        tokio::select! {
            ended = &mut silence => break ended,
            () = tokio::time::sleep(std::time::Duration::from_secs(1)) => {
                beats += 1;
                beating.beat("dev-1", beats).await.unwrap();
            }
        }
    };
    assert_eq!(
        (ended.code(), ended.message()),
        (Code::DeadlineExceeded, "no heartbeat came; connect again")
    );
    assert!(beats >= 10, "it was ended after {beats} s");
    offline(&site, "dev-2").await;
    assert!(online(&site, "dev-1").await);
}

// ---- Helpers, for the modules below too ----

fn beat(id: &str, timestamp: i64) -> FromDevice {
    FromDevice::Heartbeat(Heartbeat {
        client_id: id.into(),
        timestamp,
    })
}

fn reconnect(id: &str, session: &str, facts: &DeviceFacts) -> FromDevice {
    let (client_id, last_session_id, facts) = (id.into(), session.into(), Some(facts.clone()));
    FromDevice::Reconnect(ReconnectRequest {
        client_id,
        last_session_id,
        facts,
    })
}

/// A reply to a notice: 1 accepts, 2 defers, 3 rejects.
fn reply(seq: u64, notice: &FileNotice, decision: i32) -> NoticeReply {
    NoticeReply {
        seq,
        nonce: notice.nonce.clone(),
        generation: notice.generation,
        decision,
        boot_count: 1,
        ..Default::default()
    }
}

/// Publishes an image and starts a rollout to one device.
async fn offer(site: &Site, device: &str) -> String {
    let released = site.publish(&site.image("offered.img", 200_000, 7), PRODUCT, "1.1.0");
    let request = StartRolloutRequest {
        rollout_id: uuid::Uuid::now_v7().to_string(),
        release_id: released.release_id.clone(),
        target: Some(Target {
            all: false,
            device_ids: vec![device.into()],
        }),
        action: 1,
        ..Default::default()
    };
    site.admin().await.start_rollout(request).await.unwrap();
    released.release_id
}

/// The next notice.
async fn notice(stream: &mut Stream) -> FileNotice {
    let noticed = stream.wait_for(|message| match message {
        ToDevice::FileNotice(notice) => Some(notice),
        _ => None,
    });
    noticed.await.unwrap()
}

/// Everything that the device is told up to now.
async fn heard(stream: &mut Stream, id: &str) -> Vec<ToDevice> {
    let mark = Timestamp::now().as_ms();
    stream.say(beat(id, mark)).await;
    let mut heard = Vec::new();
    loop {
        match stream.next().await.unwrap() {
            ToDevice::HeartbeatAck(ack) if ack.timestamp == mark => return heard,
            other => heard.push(other),
        }
    }
}

/// Where the device's newest update stands, as in `PHASE_*`, in lower case.
async fn phase(site: &Site, id: &str) -> String {
    let request = GetDeviceRequest {
        client_id: id.into(),
    };
    let detail = site
        .admin()
        .await
        .get_device(request)
        .await
        .unwrap()
        .into_inner();
    let newest = detail.updates.first().expect("it has an update");
    newest
        .phase()
        .as_str_name()
        .trim_start_matches("PHASE_")
        .to_lowercase()
}

/// Waits for the note that the device was told, which follows the notice.
async fn until_offered(site: &Site, id: &str) {
    wait::until("the note that it was told", || async {
        let phase = phase(site, id).await;
        if phase == "offered" {
            Ok(())
        } else {
            Err(phase)
        }
    })
    .await;
}

async fn online(site: &Site, id: &str) -> bool {
    let request = GetDeviceRequest {
        client_id: id.into(),
    };
    site.admin()
        .await
        .get_device(request)
        .await
        .unwrap()
        .into_inner()
        .device
        .unwrap()
        .online
}

/// Waits until the server knows that the device has gone.
async fn offline(site: &Site, id: &str) {
    wait::until(&format!("{id} to be offline"), || async {
        if online(site, id).await {
            Err("online")
        } else {
            Ok(())
        }
    })
    .await;
}

/// Registers with a stream of bytes.
async fn raw(channel: Channel, id: &str) -> Result<RawStream, Status> {
    let mut stream = RawStream::open(channel).await?;
    let register = FromDevice::Register(RegisterRequest {
        client_id: id.into(),
        facts: Some(facts()),
    });
    stream.say(encoded(register)).await;
    match stream.next().await? {
        ToDevice::Registered(_) => Ok(stream),
        other => panic!("not registered: {other:?}"),
    }
}

/// A heartbeat of exactly `bytes` bytes.
fn beat_of(bytes: usize, id: &str, timestamp: i64) -> Vec<u8> {
    padded(encoded(beat(id, timestamp)), bytes)
}
