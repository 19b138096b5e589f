//! Whole updates.

use super::bench::*;
use crate::{
    AgentEvent, Bootloader, DirStore, Document, Exit, FileSlots, FileSlotsSettings, ImageFacts,
    Phase, SlotId, Store, StoreError,
    agent::memory::Status,
    health::{Health, HealthCheck, Verdict},
};
use fwpush_proto::v1::{self, client_message::Kind as FromDevice};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

fn ended(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal())
}

fn phases(events: &[AgentEvent]) -> Vec<Phase> {
    let phases = events.iter().filter_map(|event| match event {
        AgentEvent::Phase { phase, .. } => Some(*phase),
        _ => None,
    });
    phases.collect()
}

#[tokio::test]
async fn an_image_is_installed_byte_for_byte_and_confirmed() {
    let bench = Bench::new();
    let image = image(5, 1_000);
    let release_id = bench.release(1, "1.1.0", &image);
    let (exit, events) = bench.run_until(ended).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    use Phase::*;
    assert_eq!(
        phases(&events),
        [Accepted, Downloading, Verified, Installing, Rebooting]
    );
    assert_eq!(bench.slots.content(SlotId::B, image.len()), image);
    assert_eq!(bench.store.groups_written(), 6);
    bench.slots.reboot();
    let (_, events) = bench.run_until(ended).await;
    assert_eq!(phases(&events), [Confirming, Succeeded]);
    let status = bench.agent(|_| {}).status();
    assert_eq!(
        (status.release_id, status.confirmed, status.slot),
        (Some(release_id), true, SlotId::B)
    );
    assert_eq!(status.phase, Some(Succeeded));
}

#[tokio::test]
async fn images_of_every_awkward_size_arrive_whole() {
    for length in [
        1, 1023, 1024, 65_535, 65_536, 65_537, 131_072, 131_073, 300_000,
    ] {
        let bench = Bench::new();
        let image = image(0, length);
        bench.release(1, "1.1.0", &image);
        let (exit, _) = bench.run_until(ended).await;
        assert_eq!(exit, Some(Exit::RebootDue), "{length} bytes");
        assert_eq!(bench.slots.content(SlotId::B, length), image);
    }
}

#[tokio::test]
async fn files_on_disk_are_updated_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let settings = FileSlotsSettings {
        paths: [path("a"), path("b")],
        capacity: Some(20 * GROUP as u64),
        bootloader: Bootloader::Emulated,
        boot_record: path("boot.rec"),
        first_image: ImageFacts {
            release_id: None,
            version: "1.0.0".parse().unwrap(),
            security_counter: 1,
            size: 0,
            blake3: None,
        },
    };
    let mut bench = Bench::new();
    bench.store = Arc::new(DirStore::open(&path("state")).unwrap());
    let image = image(17, 5);
    bench.release(1, "1.1.0", &image);
    bench.faults(&[Fault::CutAfter(200_000), Fault::BreakAfter(300_000)]);
    let (exit, _) = bench
        .run_on(FileSlots::open(settings.clone()).unwrap(), ended)
        .await;
    assert_eq!(exit, Some(Exit::RebootDue));
    assert_eq!(std::fs::read(path("b")).unwrap()[..image.len()], image);
    assert_eq!(
        bench.store.groups_written(),
        18,
        "no group was written twice"
    );
    let mut slots = FileSlots::open(settings.clone()).unwrap();
    slots.emulate_boot().unwrap();
    let (_, events) = bench.run_on(slots, ended).await;
    assert_eq!(phases(&events).last(), Some(&Phase::Succeeded));
    // What `fwpush-device status` shows, from the files alone.
    let boot = FileSlots::look(&settings).unwrap().unwrap();
    let document = DirStore::look(&path("state"), Document::State)
        .unwrap()
        .unwrap();
    let status = Status::read(
        &document,
        &boot,
        DirStore::look_groups_written(&path("state")),
    )
    .unwrap();
    assert_eq!(
        (status.version, status.groups_written),
        (Some("1.1.0".parse().unwrap()), 18)
    );
    assert_eq!(
        (status.phase, status.generation, status.slot),
        (Some(Phase::Succeeded), 1, SlotId::B)
    );
}

#[tokio::test]
async fn a_bad_image_is_rolled_back_and_told() {
    let mut bench = Bench::new();
    let check = HealthCheck::Function(Arc::new(|subject| {
        assert_eq!(subject.version.to_string(), "1.1.0");
        Verdict::Unhealthy("no network".into())
    }));
    bench.health = Health {
        check: Some(check),
        ..Health::default()
    };
    bench.release(1, "1.1.0", &image(3, 0));
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
    bench.slots.reboot();
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
    bench.slots.reboot();
    let over = |event: &AgentEvent| matches!(event, AgentEvent::Acked { .. });
    let (_, events) = bench.run_until(over).await;
    assert_eq!(phases(&events), [Phase::RolledBack]);
    let mut report = bench.heard().into_iter().filter_map(|kind| match kind {
        FromDevice::Report(report) if report.phase() == v1::Phase::RolledBack => Some(report),
        _ => None,
    });
    let report = report.next_back().expect("the server heard of it");
    assert_eq!(report.error.unwrap().code, "HEALTH_CHECK");
    assert_eq!(report.current.unwrap().version, "1.0.0");
}

#[tokio::test]
async fn what_the_device_has_is_not_fetched() {
    let bench = Bench::new();
    let mut image = image(8, 100);
    image[2 * GROUP..3 * GROUP].fill(0);
    {
        let mut inner = bench.slots.0.lock().unwrap();
        // Two groups in the running slot, one in the spare, one all zero; of nine.
        inner.content[0][4 * GROUP..6 * GROUP].copy_from_slice(&image[4 * GROUP..6 * GROUP]);
        inner.content[1][..GROUP].copy_from_slice(&image[..GROUP]);
    }
    bench.release(1, "1.1.0", &image);
    let (exit, events) = bench.run_until(ended).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    assert!(
        events
            .iter()
            .any(|event| matches!(event, AgentEvent::GroupsReused(4)))
    );
    assert_eq!(bench.slots.content(SlotId::B, image.len()), image);
    let outline = 9 * 32;
    assert_eq!(bench.sent(), (4 * GROUP + 100 + outline) as u64);
    assert_eq!(
        bench.store.groups_written(),
        8,
        "the one in the spare is not written again"
    );
}

#[tokio::test]
async fn an_image_that_rots_after_it_was_written_is_not_tried() {
    let bench = Bench::new();
    bench.slots.0.lock().unwrap().rot = Some(GROUP + 7);
    bench.release(1, "1.1.0", &image(3, 0));
    let over = |event: &AgentEvent| {
        matches!(
            event,
            AgentEvent::Phase {
                phase: Phase::Deferred,
                ..
            }
        )
    };
    let (exit, events) = bench.run_until(over).await;
    assert_eq!(exit, None);
    let Some(AgentEvent::Phase {
        failure: Some(failure),
        ..
    }) = events.last()
    else {
        panic!()
    };
    assert_eq!(failure.code, "READ_BACK_MISMATCH");
    assert_eq!(
        bench.slots.0.lock().unwrap().record.slots[1].state,
        crate::SlotState::Unbootable
    );
}

#[tokio::test]
async fn a_run_once_ends_when_there_is_nothing_left_to_do() {
    let mut bench = Bench::new();
    bench.settings.once = true;
    assert_eq!(bench.run_until(|_| false).await.0, Some(Exit::Idle));
    bench.release(1, "1.1.0", &image(1, 0));
    assert_eq!(bench.run_until(|_| false).await.0, Some(Exit::RebootDue));
    bench.slots.reboot();
    assert_eq!(bench.run_until(|_| false).await.0, Some(Exit::Idle));
    assert_eq!(bench.agent(|_| {}).status().phase, Some(Phase::Succeeded));
    // An image for other hardware.
    let mut notice = bench.notice(2, "1.2.0", &image(1, 0));
    notice.manifest = b"{}".as_slice().into();
    bench.server.books.lock().unwrap().generation = 2;
    bench.server.notice.send_replace(Some(notice));
    assert_eq!(bench.run_until(|_| false).await.0, Some(Exit::Failed));
}

/// A disk that is full for a while.
#[derive(Debug)]
struct FullStore {
    inner: Arc<dyn Store>,
    full: AtomicBool,
}

impl Store for FullStore {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.load(document)
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        if self.full.load(Ordering::Relaxed) {
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(StoreError::File {
                operation: "write",
                path: document.to_string().into(),
                source,
            });
        }
        self.inner.save(document, bytes)
    }

    fn count_groups_written(&self, groups: u64) {
        self.inner.count_groups_written(groups);
    }

    fn groups_written(&self) -> u64 {
        self.inner.groups_written()
    }
}

#[tokio::test]
async fn nothing_happens_that_cannot_be_remembered() {
    let mut bench = Bench::new();
    let store = Arc::new(FullStore {
        inner: Arc::clone(&bench.store),
        full: AtomicBool::new(true),
    });
    bench.store = Arc::clone(&store) as Arc<dyn Store>;
    let image = image(2, 0);
    bench.release(1, "1.1.0", &image);
    let noticed = |event: &AgentEvent| matches!(event, AgentEvent::Notice { .. });
    bench.run_until(noticed).await;
    assert!(bench.writes().is_empty() && bench.sent() == 0);
    store.full.store(false, Ordering::Relaxed);
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
}

#[tokio::test]
async fn garbage_for_state_is_replaced_and_the_floor_comes_from_the_boot_record() {
    for garbage in [&b""[..], b"{", b"\0\0\0\0", b"[]", br#"{"state_id": 5}"#] {
        let bench = Bench::new();
        bench.store.save(Document::State, garbage).unwrap();
        let agent = bench.agent(|_| {});
        assert_eq!(agent.status().floor, 1);
        assert_eq!(agent.status().state_id.len(), 32);
    }
}

#[tokio::test]
async fn of_a_state_that_a_newer_agent_wrote_all_is_kept_that_can_be_read() {
    let bench = Bench::new();
    bench.release(1, "1.1.0", &image(1, 0));
    bench.run_until(ended).await;
    let read = || -> serde_json::Value {
        serde_json::from_slice(&bench.store.load(Document::State).unwrap().unwrap()).unwrap()
    };
    let save = |state: &serde_json::Value| {
        let text = state.to_string();
        bench.store.save(Document::State, text.as_bytes()).unwrap();
    };
    let old = read();
    // A stage that this agent does not know.
    let mut state = old.clone();
    state["update"]["stage"] = serde_json::json!({"hovering": {"metres": 3}});
    save(&state);
    let status = bench.agent(|_| {}).status();
    assert_eq!(status.state_id, old["state_id"].as_str().unwrap());
    assert_eq!(
        (status.generation, status.phase, status.floor),
        (1, Some(Phase::Failed), 1)
    );
    assert_eq!(
        status.unacknowledged,
        old["outbox"]["kept"].as_array().unwrap().len()
    );
    // A report that it does not know: numbers may not be given out twice under one name.
    let mut state = old.clone();
    state["outbox"]["kept"] = serde_json::json!([{"seq": 1, "kind": "song"}]);
    save(&state);
    let status = bench.agent(|_| {}).status();
    assert_ne!(status.state_id, old["state_id"].as_str().unwrap());
    assert_eq!((status.generation, status.floor), (1, 1));
}

/// The image that a newer agent belongs to was rolled back in the middle of something that this one does not know.
#[tokio::test]
async fn an_update_whose_stage_only_a_newer_agent_knows_is_reported_as_failed() {
    let bench = Bench::new();
    bench.release(1, "1.1.0", &image(1, 0));
    bench.server.books.lock().unwrap().silent = true;
    let verified = |event: &AgentEvent| matches!(event, AgentEvent::Phase { phase, .. } if *phase == Phase::Verified);
    bench.run_until(verified).await;
    bench.server.books.lock().unwrap().silent = false;
    let bytes = bench.store.load(Document::State).unwrap().unwrap();
    let mut state: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    state["update"]["stage"] = serde_json::json!({"hovering": {"metres": 3}});
    let text = state.to_string();
    bench.store.save(Document::State, text.as_bytes()).unwrap();
    let told = |kind: &FromDevice| {
        matches!(kind, FromDevice::Report(report)
            if report.phase() == v1::Phase::Failed && report.generation == 1
                && report.error.as_ref().is_some_and(|error| error.code == "UPDATE_UNREADABLE"))
    };
    let acked = |event: &AgentEvent| matches!(event, AgentEvent::Acked { .. });
    while !bench.heard().iter().any(told) {
        bench.run_until(acked).await;
    }
    // What the server wants next is done.
    bench.release(2, "1.1.0", &image(1, 0));
    let (_, events) = bench.run_until(ended).await;
    let phases = events.iter().filter_map(|event| match event {
        AgentEvent::Phase { phase, .. } => Some(*phase),
        _ => None,
    });
    assert!(phases.into_iter().any(|phase| phase == Phase::Verified));
}

#[tokio::test]
async fn fields_of_a_newer_agent_survive_this_one() {
    let bench = Bench::new();
    let noticed = |event: &AgentEvent| matches!(event, AgentEvent::Registered { .. });
    bench.run_until(noticed).await;
    let read = || -> serde_json::Value {
        serde_json::from_slice(&bench.store.load(Document::State).unwrap().unwrap()).unwrap()
    };
    let mut state = read();
    state["from_the_future"] = serde_json::json!({"a": [1, 2]});
    bench
        .store
        .save(Document::State, state.to_string().as_bytes())
        .unwrap();
    bench.release(1, "1.1.0", &image(1, 0));
    bench.run_until(ended).await;
    let after = read();
    assert_eq!(after["from_the_future"], state["from_the_future"]);
    assert_eq!(after["state_id"], state["state_id"]);
    assert_eq!(after["observed_generation"], 1);
}

#[tokio::test]
async fn an_idle_agent_does_not_write_its_state() {
    let bench = Bench::new();
    let registered = |event: &AgentEvent| matches!(event, AgentEvent::Registered { .. });
    bench.run_until(registered).await;
    let before = bench.store.load(Document::State).unwrap();
    let store = Arc::new(FullStore {
        inner: Arc::clone(&bench.store),
        full: AtomicBool::new(true),
    });
    let mut again = bench;
    again.store = store;
    // A write would be refused and tried again; the session goes on without one.
    again.run_until(registered).await;
    assert_eq!(again.store.load(Document::State).unwrap(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_stopped_has_not_failed() {
    // Whether the end of its link or the order to stop is seen first is chance.
    for _ in 0..100 {
        let bench = Bench::new();
        let (registered_tx, mut registered) = tokio::sync::mpsc::unbounded_channel();
        let mut agent = bench.agent(move |event| {
            if matches!(event, AgentEvent::Registered { .. }) {
                let _ = registered_tx.send(());
            }
        });
        let stop = tokio_util::sync::CancellationToken::new();
        let stopped = stop.clone();
        let run = tokio::spawn(async move { agent.run(stopped).await });
        registered.recv().await.unwrap();
        stop.cancel();
        assert_eq!(run.await.unwrap().unwrap(), Exit::Stopped);
    }
}

#[tokio::test]
async fn a_stopped_agent_gives_its_slots_back() {
    let bench = Bench::new();
    let mut agent = bench.agent(|_| {});
    let stop = tokio_util::sync::CancellationToken::new();
    stop.cancel();
    assert_eq!(agent.run(stop).await.unwrap(), Exit::Stopped);
    assert!(agent.into_slots().is_some());
    tokio::time::sleep(Duration::ZERO).await;
}
