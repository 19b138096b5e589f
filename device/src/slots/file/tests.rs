use super::*;

const CAPACITY: u64 = 200_000;

fn image(version: &str, counter: u64) -> ImageFacts {
    ImageFacts {
        release_id: None,
        version: version.parse().unwrap(),
        security_counter: counter,
        size: 0,
        blake3: None,
    }
}

fn settings(folder: &tempfile::TempDir) -> FileSlotsSettings {
    let path = |name| folder.path().join(name);
    FileSlotsSettings {
        paths: [path("a.img"), path("b.img")],
        capacity: Some(CAPACITY),
        bootloader: Bootloader::Emulated,
        boot_record: path("boot.rec"),
        first_image: image("1.0.0", 1),
    }
}

fn update(slots: &mut FileSlots) {
    slots.invalidate_spare().unwrap();
    slots.write_spare(70_000, b"new").unwrap();
    slots.sync_spare().unwrap();
    slots.forget_cached_spare().unwrap();
    let mut bytes = [0; 3];
    slots.read(SlotId::B, 70_000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"new");
    slots.mark_trial(&image("1.1.0", 2), 2).unwrap();
}

#[test]
fn a_trial_becomes_the_confirmed_slot_and_survives_restarts_of_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    let first = slots.view().unwrap();
    assert!(first.confirmed() && first.running == SlotId::A);
    update(&mut slots);
    drop(slots);
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    assert_eq!(
        slots.view().unwrap().boot_id,
        first.boot_id,
        "a restart of the process is no boot"
    );
    assert_eq!(slots.emulate_boot().unwrap(), SlotId::B);
    let trial = slots.view().unwrap();
    assert_ne!(trial.boot_id, first.boot_id);
    assert_eq!(
        trial.running_slot().state,
        SlotState::Trial { tries_left: 1 }
    );
    slots.confirm_running(2).unwrap();
    let confirmed = FileSlots::look(&settings(&folder)).unwrap().unwrap();
    assert!(confirmed.confirmed());
    assert_eq!(confirmed.running_slot().image, Some(image("1.1.0", 2)));
    assert_eq!(
        confirmed.spare_slot().state,
        SlotState::Unbootable,
        "its counter is below the floor"
    );
}

#[test]
fn a_rejected_trial_boots_the_old_slot() {
    let folder = tempfile::tempdir().unwrap();
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    update(&mut slots);
    slots.emulate_boot().unwrap();
    slots.reject_running().unwrap();
    assert_eq!(slots.emulate_boot().unwrap(), SlotId::A);
    assert!(slots.view().unwrap().confirmed());
}

#[test]
fn the_spare_is_not_written_before_it_is_marked_unbootable() {
    let folder = tempfile::tempdir().unwrap();
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    update(&mut slots);
    assert!(matches!(
        slots.write_spare(0, b"x"),
        Err(SlotError::Refused { .. })
    ));
}

#[test]
fn nothing_is_written_while_the_running_slot_is_on_trial() {
    let folder = tempfile::tempdir().unwrap();
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    update(&mut slots);
    slots.emulate_boot().unwrap();
    assert!(slots.invalidate_spare().is_err());
    assert!(slots.write_spare(0, b"x").is_err());
}

#[test]
fn writes_and_reads_past_the_end_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut slots = FileSlots::open(settings(&folder)).unwrap();
    slots.invalidate_spare().unwrap();
    assert!(matches!(
        slots.write_spare(199_999, b"xy"),
        Err(SlotError::Bounds { .. })
    ));
    assert!(matches!(
        slots.write_spare(u64::MAX, b"xy"),
        Err(SlotError::Bounds { .. })
    ));
    assert!(slots.read(SlotId::B, 199_999, &mut [0; 2]).is_err());
}

#[test]
fn a_given_image_is_kept_and_grows_only_when_it_becomes_the_spare() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    std::fs::write(&settings.paths[0], b"the factory image").unwrap();
    let mut slots = FileSlots::open(settings.clone()).unwrap();
    update(&mut slots);
    assert_eq!(
        std::fs::read(&settings.paths[0]).unwrap(),
        b"the factory image"
    );
    slots.emulate_boot().unwrap();
    slots.confirm_running(0).unwrap();
    slots.invalidate_spare().unwrap();
    assert_eq!(
        std::fs::metadata(&settings.paths[0]).unwrap().len(),
        CAPACITY
    );
}

#[test]
fn one_file_as_both_slots_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(&folder);
    std::fs::write(&settings.paths[0], b"image").unwrap();
    std::fs::hard_link(&settings.paths[0], &settings.paths[1]).unwrap();
    assert!(matches!(
        FileSlots::open(settings.clone()),
        Err(SlotError::Refused { .. })
    ));
    settings.paths[1] = settings.paths[0].clone();
    assert!(matches!(
        FileSlots::open(settings),
        Err(SlotError::Refused { .. })
    ));
}

#[test]
fn a_missing_slot_beside_a_boot_record_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    drop(FileSlots::open(settings(&folder)).unwrap());
    std::fs::remove_file(&settings(&folder).paths[0]).unwrap();
    assert!(matches!(
        FileSlots::open(settings(&folder)),
        Err(SlotError::File {
            operation: "open slot",
            ..
        })
    ));
}

#[test]
fn another_file_in_place_of_the_verified_one_is_not_put_on_trial() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let mut slots = FileSlots::open(settings.clone()).unwrap();
    slots.invalidate_spare().unwrap();
    slots.write_spare(0, b"good").unwrap();
    slots.forget_cached_spare().unwrap();
    std::fs::write(folder.path().join("evil"), b"evil").unwrap();
    std::fs::rename(folder.path().join("evil"), &settings.paths[1]).unwrap();
    let error = slots.mark_trial(&image("1.1.0", 2), 2).unwrap_err();
    assert!(error.to_string().contains("another file"), "{error}");
    assert_eq!(slots.emulate_boot().unwrap(), SlotId::A);
}

#[test]
fn two_bad_slots_are_told_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let mut slots = FileSlots::open(settings).unwrap();
    slots
        .record
        .update(|record| {
            record.slots[0].state = SlotState::Unbootable;
            Ok(true)
        })
        .unwrap();
    let error = slots.emulate_boot().unwrap_err();
    assert!(error.to_string().contains("neither slot"), "{error}");
    assert!(!slots.view().unwrap().confirmed());
    assert!(slots.invalidate_spare().is_err());
    assert!(slots.mark_trial(&image("1.1.0", 2), 2).is_err());
    assert!(slots.confirm_running(0).is_err());
}
