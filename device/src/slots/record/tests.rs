use proptest::prelude::*;

use super::*;
use crate::disk::RealDisk;

fn disk() -> Arc<dyn Disk> {
    Arc::new(RealDisk)
}

fn image(counter: u64) -> ImageFacts {
    ImageFacts {
        release_id: Some("0191d5a0-0000-7000-8000-000000000001".parse().unwrap()),
        version: "1.2.3-rc.1+build.5".parse().unwrap(),
        security_counter: counter,
        size: 70_000,
        blake3: Some(FileId::from_bytes([7; 32])),
    }
}

fn installed(folder: &tempfile::TempDir) -> (PathBuf, RecordFile) {
    let path = folder.path().join("boot.rec");
    let file = RecordFile::create(&disk(), &path, &BootRecord::first(SlotId::A, image(3))).unwrap();
    (path, file)
}

#[test]
fn a_record_survives_encoding() {
    let mut record = BootRecord::first(SlotId::B, image(u64::MAX));
    record
        .mark_trial(
            SlotId::A,
            ImageFacts {
                release_id: None,
                blake3: None,
                ..image(0)
            },
            3,
        )
        .unwrap();
    assert_eq!(
        BootRecord::decode(&record.encode().unwrap()).unwrap(),
        record
    );
}

#[test]
fn a_trial_runs_out_and_the_confirmed_slot_comes_back() {
    let mut record = BootRecord::first(SlotId::A, image(1));
    record.mark_trial(SlotId::B, image(2), 2).unwrap();
    let boots: Vec<_> = (0..4).map(|_| record.boot()).collect();
    assert_eq!(
        boots,
        [
            Some(SlotId::B),
            Some(SlotId::B),
            Some(SlotId::A),
            Some(SlotId::A)
        ]
    );
}

#[test]
fn confirming_bars_a_spare_below_the_floor_and_keeps_one_at_it() {
    for (floor, state) in [(2, SlotState::Unbootable), (1, SlotState::Confirmed)] {
        let mut record = BootRecord::first(SlotId::A, image(1));
        record.mark_trial(SlotId::B, image(2), 1).unwrap();
        record.boot();
        assert!(record.confirm(SlotId::B, floor).unwrap());
        assert!(
            !record.confirm(SlotId::B, floor).unwrap(),
            "a second time changes nothing"
        );
        assert_eq!(record.slot(SlotId::A).state, state);
        assert_eq!(record.boot(), Some(SlotId::B));
    }
}

#[test]
fn no_change_leaves_the_device_without_a_confirmed_slot() {
    let mut record = BootRecord::first(SlotId::A, image(1));
    assert!(record.invalidate(SlotId::A).is_err());
    assert!(record.reject(SlotId::A).is_err());
    record.mark_trial(SlotId::B, image(2), 1).unwrap();
    assert!(
        record.mark_trial(SlotId::B, image(2), 1).is_err(),
        "written without being marked unbootable"
    );
    assert!(record.invalidate(SlotId::A).is_err());
    assert!(record.reject(SlotId::B).unwrap());
    assert_eq!(record.boot(), Some(SlotId::A));
}

#[test]
fn a_write_torn_at_any_byte_leaves_the_old_or_the_new_record() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut file) = installed(&folder);
    file.update(|record| record.mark_trial(SlotId::B, image(4), 3).map(|()| true))
        .unwrap();
    let old = file.get().unwrap().clone();
    let before = std::fs::read(&path).unwrap();
    file.update(|record| record.reject(SlotId::B)).unwrap();
    let new = file.get().unwrap().clone();
    let after = std::fs::read(&path).unwrap();
    for cut in (0..=COPY_BYTES).chain(4096..=after.len()) {
        // The first `cut` bytes reached the medium; and the other way round, as sectors may be reordered.
        for (first, second) in [(&after, &before), (&before, &after)] {
            let torn: Vec<u8> = first[..cut].iter().chain(&second[cut..]).copied().collect();
            std::fs::write(&path, &torn).unwrap();
            let found = RecordFile::look(&RealDisk, &path).unwrap().unwrap();
            assert!(found == old || found == new, "cut at {cut}: {found:?}");
        }
    }
}

#[test]
fn two_broken_copies_are_an_error_and_not_a_default() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = installed(&folder);
    for garbage in [
        vec![],
        [vec![0; 4096], vec![1; 4096]].concat(),
        vec![0xff; 100],
        b"FWPBOOT1 and no more".repeat(400),
    ] {
        std::fs::write(&path, garbage).unwrap();
        let error = RecordFile::open(&disk(), &path).unwrap_err();
        assert!(
            matches!(
                error,
                SlotError::Record {
                    source: RecordError::BothBroken { .. },
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn a_broken_newer_copy_falls_back_to_the_older() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut file) = installed(&folder);
    let old = file.get().unwrap().clone();
    file.update(|record| record.mark_trial(SlotId::B, image(4), 3).map(|()| true))
        .unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(
        *RecordFile::open(&disk(), &path)
            .unwrap()
            .unwrap()
            .get()
            .unwrap(),
        old
    );
}

#[derive(Debug, Clone)]
enum Change {
    Invalidate(SlotId),
    Trial(SlotId, u8),
    Confirm(SlotId, u64),
    Reject(SlotId),
    Boot,
}

fn change() -> impl Strategy<Value = Change> {
    let slot = prop_oneof![Just(SlotId::A), Just(SlotId::B)];
    prop_oneof![
        slot.clone().prop_map(Change::Invalidate),
        (slot.clone(), 0u8..4).prop_map(|(slot, tries)| Change::Trial(slot, tries)),
        (slot.clone(), 0u64..5).prop_map(|(slot, floor)| Change::Confirm(slot, floor)),
        slot.prop_map(Change::Reject),
        Just(Change::Boot),
    ]
}

proptest! {
    #[test]
    fn whatever_is_asked_a_confirmed_slot_remains(changes in prop::collection::vec(change(), 0..40)) {
        let mut record = BootRecord::first(SlotId::A, image(1));
        for change in changes {
            // A refused change leaves the record as it was: `update` works on a copy.
            let mut next = record.clone();
            let result = match change {
                Change::Invalidate(slot) => next.invalidate(slot).map(|_| ()),
                Change::Trial(slot, tries) => next.mark_trial(slot, image(2), tries),
                Change::Confirm(slot, floor) => next.confirm(slot, floor).map(|_| ()),
                Change::Reject(slot) => next.reject(slot).map(|_| ()),
                Change::Boot => { prop_assert!(next.boot().is_some()); Ok(()) }
            };
            if result.is_ok() {
                record = next;
            }
            prop_assert!(record.slots.iter().any(|slot| slot.state == SlotState::Confirmed), "{record:?}");
            prop_assert_eq!(&BootRecord::decode(&record.encode().unwrap()).unwrap(), &record);
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed(bit in 0..COPY_BYTES * 8) {
        let mut copy = BootRecord::first(SlotId::A, image(1)).encode().unwrap();
        copy[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(BootRecord::decode(&copy).is_err());
    }
}
