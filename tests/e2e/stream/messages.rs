//! What a single message may be, and what an operator lets devices hear.

use std::{fs, time::Instant};

use bytes::Bytes;
use fwpush_proto::v1::{
    ClientMessage, EventType, FileRequest, Phase, PublishTrustRequest, RunningImage,
    SendTextRequest, SetDeviceEventsRequest, TrustState, TrustUpdate, UpdateError, UpdateReport,
    client_message::Kind as FromDevice, file_service_client::FileServiceClient,
    server_message::Kind as ToDevice,
};
use fwpush_tests::{
    client::{Stream, download, facts},
    offline::Offline,
    site::{PRODUCT, Site, bear_silence},
};
use rustix::process::Signal;
use tonic::{Code, Status, transport::Channel};

use super::{beat, beat_of, heard, offline, raw};

// ---- Single messages ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_at_the_limit_is_taken_and_one_over_it_ends_the_stream() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let mut stream = raw(channel.clone(), "dev-1").await.unwrap();
    stream.say(beat_of(64 << 10, "dev-1", 5)).await;
    assert!(
        matches!(stream.next().await.unwrap(), ToDevice::HeartbeatAck(ack) if ack.timestamp == 5)
    );
    let before = site.server().resident_bytes();
    for bytes in [(64 << 10) + 1, (4 << 20) + 1] {
        let mut stream = raw(channel.clone(), "dev-1").await.unwrap();
        stream.say(beat_of(bytes, "dev-1", 6)).await;
        let refused = stream.end().await;
        assert_eq!(
            refused.code(),
            Code::ResourceExhausted,
            "{bytes}: {refused}"
        );
        assert_eq!(
            refused.message(),
            "a message of at most 65536 bytes is wanted"
        );
    }
    assert!(
        site.server().resident_bytes() < before + (16 << 20),
        "what is over the limit is not read"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_cannot_be_decoded_is_refused_and_fields_from_the_future_are_not() {
    let site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    for (what, bytes) in [
        // ClientMessage.heartbeat.client_id = "\xff\xfe".
        ("no UTF-8", vec![0x12, 0x04, 0x0a, 0x02, 0xff, 0xfe]),
        ("a field that ends in the middle", vec![0x12, 0x7f, 0x0a]),
        ("a varint without end", vec![0xff; 11]),
        ("field number 0", vec![0x02, 0x00]),
        ("the wrong wire type", vec![0x10, 0x01]),
    ] {
        let mut stream = raw(channel.clone(), "dev-1").await.unwrap();
        stream.say(bytes).await;
        let refused = stream.end().await;
        assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused}");
        assert_eq!(
            refused.message(),
            "a message could not be decoded",
            "{what}"
        );
    }
    let mut stream = raw(channel, "dev-1").await.unwrap();
    // A kind of message that nobody knows yet, field 99; and none at all.
    stream.say(vec![0x9a, 0x06, 0x02, 0x08, 0x01]).await;
    stream.say(vec![]).await;
    stream.say(beat_of(200, "dev-1", 3)).await;
    assert!(
        matches!(stream.next().await.unwrap(), ToDevice::HeartbeatAck(ack) if ack.timestamp == 3)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_nobody_knows_are_refused_and_never_guessed() {
    let site = Site::started();
    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let report = |phase, seq| {
        FromDevice::Report(UpdateReport {
            seq,
            phase,
            boot_count: 1,
            ..Default::default()
        })
    };
    let notice = Default::default();
    for (said, words) in [
        (
            FromDevice::NoticeReply(super::reply(1, &notice, 0)),
            "unknown decision",
        ),
        (
            FromDevice::NoticeReply(super::reply(1, &notice, 99)),
            "unknown decision",
        ),
        (report(0, 1), "a phase that no device reports"),
        (report(99, 1), "a phase that no device reports"),
        // Phases that are the server's to say: PENDING, OFFERED, TIMED_OUT.
        (report(1, 1), "a phase that no device reports"),
        (report(2, 1), "a phase that no device reports"),
        (report(15, 1), "a phase that no device reports"),
        (report(5, 0), "seq begins at 1"),
        (report(5, 1 << 53), "above 2^53 - 1"),
    ] {
        let (mut stream, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
        stream.say(said).await;
        let refused = stream.end().await;
        assert_eq!(refused.code(), Code::InvalidArgument, "{words}: {refused}");
        assert!(
            refused.message().contains(words),
            "{words:?} is not in {refused}"
        );
    }
}

// ---- What devices hear ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_is_heard_only_where_an_operator_allowed_it() {
    let mut site = Site::new();
    site.edit_config(bear_silence);
    site.start();
    let mut admin = site.admin().await;
    for id in ["dev-1", "named", "all", "none", "other"] {
        site.add_device(id);
    }
    for (id, hears) in [("named", "dev-1"), ("all", "*"), ("other", "dev-9")] {
        let request = SetDeviceEventsRequest {
            client_id: id.into(),
            hears: vec![hears.into()],
        };
        admin.set_device_events(request).await.unwrap();
    }
    let mut listeners = Vec::new();
    for id in ["named", "all", "none", "other"] {
        let (stream, _) = Stream::register(site.connect(id).await, id).await.unwrap();
        listeners.push((id, stream));
    }
    // Of each other they hear what they may; that is not looked at here.
    for (id, stream) in &mut listeners {
        heard(stream, id).await;
    }

    let image = site.image("image.img", 1_000, 1);
    let release_id = site.publish(&image, PRODUCT, "1.2.3").release_id;
    let start = ["rollout", "start", "--release", &release_id];
    site.fwpush(&[&start[..], &["--to", "dev-1", "--yes", "--detach"]].concat())
        .ok();
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    expect_event(&mut listeners, EventType::Online, "").await;
    let offered = stream.wait_for(|message| match message {
        ToDevice::FileNotice(notice) => Some(notice.generation),
        _ => None,
    });
    let generation = offered.await.unwrap();
    let success = |seq, generation, release_id: &str| {
        FromDevice::Report(UpdateReport {
            seq,
            boot_count: 1,
            generation,
            phase: Phase::Succeeded.into(),
            current: Some(RunningImage {
                release_id: release_id.into(),
                version: "1.2.3".into(),
                slot: "b".into(),
                confirmed: true,
                ..Default::default()
            }),
            ..Default::default()
        })
    };
    // Only a success that counts is told, and only once.
    for report in [
        success(1, generation + 1, &release_id),
        success(2, generation, ""),
        success(3, generation, &release_id),
        success(3, generation, &release_id),
        success(4, generation, &release_id),
    ] {
        stream.say(report).await;
    }
    let committed = stream.wait_for(|message| match message {
        ToDevice::ReportAck(ack) if ack.upto_seq == 4 => Some(()),
        _ => None,
    });
    committed.await.unwrap();
    expect_event(&mut listeners, EventType::Update, "1.2.3").await;
    drop(stream);
    expect_event(&mut listeners, EventType::Offline, "").await;

    // Taken back while both are connected.
    let request = SetDeviceEventsRequest {
        client_id: "named".into(),
        hears: vec![],
    };
    admin.set_device_events(request).await.unwrap();
    let (_stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let (_, all) = &mut listeners[1];
    assert_eq!(
        event(all.next().await.unwrap()),
        ("dev-1".to_owned(), EventType::Online, String::new())
    );
    let (_, named) = &mut listeners[0];
    assert_eq!(heard(named, "named").await, []);

    for hears in [vec!["a b".to_owned()], vec!["*".to_owned(); 101]] {
        let request = SetDeviceEventsRequest {
            client_id: "named".into(),
            hears,
        };
        assert_eq!(
            admin.set_device_events(request).await.unwrap_err().code(),
            Code::InvalidArgument
        );
    }
}

/// `named` and `all` hear this of dev-1, the others nothing.
async fn expect_event(listeners: &mut [(&str, Stream)], kind: EventType, details: &str) {
    for (id, stream) in listeners {
        if ["named", "all"].contains(id) {
            let told = event(stream.next().await.unwrap());
            assert_eq!(told, ("dev-1".to_owned(), kind, details.to_owned()), "{id}");
        }
        assert_eq!(heard(stream, id).await, [], "{id} hears no more");
    }
}

fn event(message: ToDevice) -> (String, EventType, String) {
    match message {
        ToDevice::Event(event) => (
            event.client_id.clone(),
            event.r#type(),
            event.details.clone(),
        ),
        other => panic!("no event: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_reaches_the_device_it_is_for_if_it_is_connected() {
    let site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let mut admin = site.admin().await;
    let mut send = async |id: &str, text: &str| {
        let request = SendTextRequest {
            client_id: id.into(),
            text: text.into(),
        };
        admin
            .send_text(request)
            .await
            .map(|sent| sent.into_inner().outcome)
    };
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let (mut other, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    let longest = "ä".repeat(2048);
    assert_eq!(send("dev-1", &longest).await.unwrap(), "DELIVERED");
    assert!(matches!(stream.next().await.unwrap(), ToDevice::Text(text) if text.text == longest));
    assert_eq!(heard(&mut other, "dev-2").await, []);
    for bad in ["", &format!("{longest}.")] {
        assert_eq!(
            send("dev-1", bad).await.unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    assert_eq!(
        send("dev-9", "hello").await.unwrap_err().code(),
        Code::NotFound
    );
    drop(stream);
    offline(&site, "dev-1").await;
    assert_eq!(send("dev-1", "hello").await.unwrap(), "NOT_HERE");
    let said = site.fwpush(&["device", "text", "dev-1", "hello"]);
    assert_eq!(said.code, 1);
    assert!(
        said.stderr.contains("device dev-1 is not connected"),
        "{}",
        said.stderr
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trust_documents_reach_devices_at_once_and_sixteen_roots_at_a_time() {
    let site = Site::started();
    site.add_device("dev-1");
    let mut admin = site.admin().await;
    let mut offline = Offline::of(&site);
    let channel = site.connect("dev-1").await;
    let (mut stream, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
    let second = offline.rotate(|_| {});
    admin.publish_trust(publication(&second)).await.unwrap();
    let update = trust_update(&mut stream).await;
    assert_eq!((update.roots, update.revocation.len()), (vec![second], 0));
    stream.say(trust_state(2)).await;
    assert_eq!(heard(&mut stream, "dev-1").await, [], "it has everything");

    let mut roots = Vec::new();
    for _ in 3..=19 {
        roots.push(offline.rotate(|_| {}));
        admin
            .publish_trust(publication(roots.last().unwrap()))
            .await
            .unwrap();
    }
    let list = offline.revoke(1, &[]);
    admin.publish_trust(publication(&list)).await.unwrap();
    drop(stream);

    // A device that was away: 17 roots behind, and a list that only the last of them vouches for.
    let mut behind = facts();
    behind.root_version = 2;
    let first = super::reconnect("dev-1", "", &behind);
    let (mut stream, _) = Stream::begin(channel, first).await.unwrap();
    let update = trust_update(&mut stream).await;
    assert_eq!(
        (&update.roots[..], update.revocation.len()),
        (&roots[..16], 0)
    );
    // A refusal is noted, and nothing more is sent for it.
    let refused = UpdateError {
        code: "SIGNATURES".into(),
        message: "not\nenough".into(),
    };
    let state = TrustState {
        root_version: 2,
        error: Some(refused),
        ..Default::default()
    };
    stream.say(FromDevice::TrustState(state)).await;
    assert_eq!(heard(&mut stream, "dev-1").await, []);
    let shown = site.device("dev-1")["events"].to_string();
    assert!(
        shown.contains("TRUST_REFUSED") && shown.contains("SIGNATURES: not enough"),
        "{shown}"
    );
    stream.say(trust_state(18)).await;
    let update = trust_update(&mut stream).await;
    assert_eq!((&update.roots[..], update.revocation), (&roots[16..], list));
}

fn publication(envelope: &Bytes) -> PublishTrustRequest {
    PublishTrustRequest {
        envelope: envelope.clone(),
    }
}

fn trust_state(root_version: u64) -> FromDevice {
    FromDevice::TrustState(TrustState {
        root_version,
        ..Default::default()
    })
}

async fn trust_update(stream: &mut Stream) -> TrustUpdate {
    match stream.next().await.unwrap() {
        ToDevice::TrustUpdate(update) => update,
        other => panic!("no trust update: {other:?}"),
    }
}

// ---- The end ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_tells_every_device_and_lets_a_running_download_finish() {
    let mut site = Site::started();
    let ids = ["dev-1", "dev-2", "dev-3"];
    for id in ids {
        site.add_device(id);
    }
    let image = site.image("drained.img", 24 << 20, 3);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let mut streams = Vec::new();
    for id in ids {
        streams.push(
            Stream::register(site.connect(id).await, id)
                .await
                .unwrap()
                .0,
        );
    }
    let puller = site.connect("dev-1").await;
    let request = FileRequest {
        file_id,
        ..Default::default()
    };
    let call = FileServiceClient::new(puller.clone())
        .download_file(request.clone())
        .await;
    let mut pulled = call.unwrap().into_inner();
    let first = pulled.message().await.unwrap().unwrap();

    site.server().signal(Signal::TERM);
    for stream in &mut streams {
        let drain = stream.wait_for(|message| match message {
            ToDevice::Drain(drain) => Some(drain),
            _ => None,
        });
        let drain = drain.await.unwrap();
        assert!(
            drain.min_ms <= drain.max_ms && drain.max_ms <= 600_000,
            "{drain:?}"
        );
        let ended = stream.end().await;
        assert_eq!(
            (ended.code(), ended.message()),
            (Code::Unavailable, "this node is stopping; connect again")
        );
    }
    // Alive, and not to be sent to: a download still runs.
    let status = |path: &str| site.get(path).0;
    assert!(status("/livez").contains("200"), "{}", status("/livez"));
    assert!(status("/readyz").contains("503"), "{}", status("/readyz"));
    let mut content = first.content.to_vec();
    while let Some(chunk) = pulled.message().await.unwrap() {
        content.extend_from_slice(&chunk.content);
    }
    assert!(content == fs::read(image).unwrap(), "the download is whole");
    assert!(
        download(puller, request).await.is_err(),
        "nothing new is begun"
    );
    drop((streams, pulled));
    assert!(site.server().wait().success());
    site.server().line_with("The server has stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_fifty_messages_a_second_end_the_stream() {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let (mut other, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    let start = Instant::now();
    let (answered, ended) = beat_until_ended(site.connect("dev-1").await).await;
    assert_eq!(
        (ended.code(), ended.message()),
        (Code::ResourceExhausted, "more than 50 messages a second")
    );
    // The stream itself cost something too.
    let most = 500 + 50 * (start.elapsed().as_secs() + 1);
    assert!(
        (490..=most).contains(&answered),
        "{answered} of at most {most} were answered"
    );
    other.beat("dev-2", 1).await.unwrap();
    site.server().line_with("more than 50 messages a second");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_streams_and_connections_earn_a_device_nothing() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let start = Instant::now();
    let mut answered = 0;
    for _ in 0..4 {
        let (more, ended) = beat_until_ended(site.connect("dev-1").await).await;
        assert_eq!(ended.code(), Code::ResourceExhausted, "{ended}");
        answered += more;
    }
    let most = 500 + 50 * (start.elapsed().as_secs() + 1);
    assert!(
        answered <= most,
        "{answered} of at most {most} were answered"
    );
    // Nor does asking for streams without using them, or for downloads. What is refused is told when to come back.
    let channel = site.connect("dev-1").await;
    let request = FileRequest {
        file_id: "0".repeat(64),
        ..Default::default()
    };
    let mut refused = None;
    for _ in 0..1_000 {
        refused = Stream::open(channel.clone()).await.err();
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("streams without end");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().contains_key("retry-after-ms"));
    let mut refused = Status::ok("");
    for _ in 0..1_000 {
        refused = download(channel.clone(), request.clone())
            .await
            .unwrap_err();
        if refused.code() != Code::NotFound {
            break;
        }
    }
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().contains_key("retry-after-ms"));
    assert!(site.server().runs());
}

/// Registers as dev-1 and beats without end. Gives how many beats were answered, and how the stream ended.
async fn beat_until_ended(channel: Channel) -> (u64, Status) {
    let mut stream = match Stream::register(channel, "dev-1").await {
        Ok((stream, _)) => stream,
        Err(refused) => return (0, refused),
    };
    let sender = stream.send.clone();
    let flood = tokio::spawn(async move {
        let message = ClientMessage {
            kind: Some(beat("dev-1", 1)),
        };
        while sender.send(message.clone()).await.is_ok() {}
    });
    let mut answered = 0;
    let ended = loop {
        match stream.next().await {
            Ok(ToDevice::HeartbeatAck(_)) => answered += 1,
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    drop(stream);
    flood.await.unwrap();
    (answered, ended)
}
