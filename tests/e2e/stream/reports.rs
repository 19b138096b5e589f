//! What a device reports: only what is about its own open update, in order, changes anything.

use fwpush_proto::v1::{
    FileAck, FileNotice, GetDeviceRequest, ReportAck, RunningImage, UpdateReport,
    client_message::Kind as FromDevice, server_message::Kind as ToDevice,
};
use fwpush_tests::{client::Stream, site::Site};

use super::{notice, offer, phase, reply, until_offered};

const DOWNLOADING: i32 = 5;
const INSTALLING: i32 = 7;
const SUCCEEDED: i32 = 10;
const FAILED: i32 = 11;

/// Says it and waits until the server says that it is committed.
async fn acked(stream: &mut Stream, seq: u64, said: FromDevice) -> ReportAck {
    stream.say(said).await;
    let ack = stream.wait_for(|message| match message {
        ToDevice::ReportAck(ack) if ack.upto_seq >= seq => Some(ack),
        _ => None,
    });
    ack.await.unwrap()
}

fn report(seq: u64, generation: u64, phase: i32) -> UpdateReport {
    UpdateReport {
        seq,
        generation,
        phase,
        boot_count: 1,
        attempt: 1,
        ..Default::default()
    }
}

fn file_ack(seq: u64, notice: &FileNotice, blake3: &str, bytes: u64) -> FromDevice {
    let (generation, file_id, blake3) =
        (notice.generation, notice.file_id.clone(), blake3.to_owned());
    FromDevice::FileAck(FileAck {
        seq,
        generation,
        file_id,
        bytes,
        blake3,
        boot_count: 1,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_foreign_doubled_and_late_reports_change_nothing_and_are_acknowledged() {
    let site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    offer(&site, "dev-1").await;
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let told = notice(&mut stream).await;
    until_offered(&site, "dev-1").await;
    let generation = told.generation;
    let expect = async |wanted: &str, after: &str| {
        assert_eq!(phase(&site, "dev-1").await, wanted, "after {after}")
    };

    // Of a generation that never was, and of none.
    for (seq, invented) in [(1, generation + 5), (2, 0)] {
        acked(
            &mut stream,
            seq,
            FromDevice::Report(report(seq, invented, FAILED)),
        )
        .await;
        expect("offered", "a report of an invented generation").await;
    }
    // Of another device: the same generation, the same words.
    let (mut foreign, _) = Stream::register(site.connect("dev-2").await, "dev-2")
        .await
        .unwrap();
    acked(&mut foreign, 1, FromDevice::NoticeReply(reply(1, &told, 3))).await;
    acked(
        &mut foreign,
        2,
        FromDevice::Report(report(2, generation, FAILED)),
    )
    .await;
    expect("offered", "the report of another device").await;

    acked(&mut stream, 3, FromDevice::NoticeReply(reply(3, &told, 1))).await;
    expect("accepted", "its own reply").await;
    // The same number again, saying something else.
    acked(&mut stream, 3, FromDevice::NoticeReply(reply(3, &told, 3))).await;
    expect("accepted", "a second report of one number").await;
    acked(
        &mut stream,
        5,
        FromDevice::Report(report(5, generation, DOWNLOADING)),
    )
    .await;
    expect("downloading", "progress").await;
    acked(&mut stream, 4, FromDevice::NoticeReply(reply(4, &told, 3))).await;
    expect("downloading", "a report that was overtaken").await;

    // Another file, another size: noted, not believed.
    let other = "0".repeat(64);
    acked(&mut stream, 6, file_ack(6, &told, &other, told.file_size)).await;
    acked(
        &mut stream,
        7,
        file_ack(7, &told, &told.file_id, told.file_size - 1),
    )
    .await;
    expect("downloading", "acknowledgements of something else").await;
    // Success of another release: as well.
    let another = RunningImage {
        release_id: uuid::Uuid::now_v7().to_string(),
        confirmed: true,
        ..running(&told)
    };
    let success = UpdateReport {
        current: Some(another),
        ..report(8, generation, SUCCEEDED)
    };
    acked(&mut stream, 8, FromDevice::Report(success)).await;
    expect("downloading", "success of another release").await;
    let events = site.device("dev-1")["events"].to_string();
    assert_eq!(events.matches("ACK_DIFFERS").count(), 2, "{events}");
    assert_eq!(events.matches("SUCCESS_DIFFERS").count(), 1, "{events}");

    let ack = acked(
        &mut stream,
        9,
        file_ack(9, &told, &told.file_id, told.file_size),
    )
    .await;
    assert_eq!(
        ack.generation, generation,
        "under this one the trial may begin"
    );
    expect("verified", "the right acknowledgement").await;
    acked(
        &mut stream,
        10,
        FromDevice::Report(report(10, generation, DOWNLOADING)),
    )
    .await;
    expect("verified", "a step back").await;
    acked(
        &mut stream,
        11,
        FromDevice::Report(report(11, generation, FAILED)),
    )
    .await;
    expect("failed", "its own failure").await;

    // What has ended stays ended.
    let late = UpdateReport {
        current: Some(running(&told)),
        ..report(12, generation, SUCCEEDED)
    };
    acked(&mut stream, 12, FromDevice::Report(late)).await;
    acked(
        &mut stream,
        13,
        FromDevice::Report(report(13, generation, INSTALLING)),
    )
    .await;
    expect("failed", "reports of an update that has ended").await;
    let request = GetDeviceRequest {
        client_id: "dev-2".into(),
    };
    let other = site
        .admin()
        .await
        .get_device(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        other.updates,
        [],
        "nothing came of what the other device said"
    );
}

fn running(_: &FileNotice) -> RunningImage {
    RunningImage {
        version: "1.1.0".into(),
        slot: "b".into(),
        confirmed: true,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_are_ordered_by_boot_before_number_and_anew_with_a_new_state() {
    let site = Site::started();
    site.add_device("dev-1");
    offer(&site, "dev-1").await;
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let told = notice(&mut stream).await;
    acked(
        &mut stream,
        100,
        FromDevice::NoticeReply(reply(100, &told, 1)),
    )
    .await;
    // A lower number, of a later boot.
    let later = UpdateReport {
        boot_count: 2,
        ..report(50, told.generation, DOWNLOADING)
    };
    acked(&mut stream, 50, FromDevice::Report(later)).await;
    assert_eq!(phase(&site, "dev-1").await, "downloading");
    // A higher number, of the boot before.
    acked(
        &mut stream,
        200,
        FromDevice::Report(report(200, told.generation, FAILED)),
    )
    .await;
    assert_eq!(phase(&site, "dev-1").await, "downloading");

    // The state directory was lost: numbers begin at 1, and it is told again under a newer generation.
    let (mut stream, _) = Stream::register(site.connect("dev-1").await, "dev-1")
        .await
        .unwrap();
    let again = notice(&mut stream).await;
    assert!(again.generation > told.generation);
    assert_eq!(again.attempt, told.attempt + 1);
    acked(&mut stream, 1, FromDevice::NoticeReply(reply(1, &again, 1))).await;
    assert_eq!(phase(&site, "dev-1").await, "accepted");
}
