use std::time::Duration;

use super::*;

fn store() -> (tempfile::TempDir, LocalStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open(&dir.path().join("files")).unwrap();
    (dir, store)
}

fn image(bytes: usize) -> (Vec<u8>, FileId) {
    let content: Vec<u8> = (0..bytes).map(|at| (at / 7) as u8).collect();
    let id = outline_of(&content[..]).unwrap().root();
    (content, id)
}

fn put(store: &LocalStore, content: &[u8], id: FileId) -> Result<Outline, StoreError> {
    let mut upload = store.upload(id, content.len() as u64, 0, "op")?;
    upload.append(content)?;
    upload.finish()
}

#[test]
fn an_upload_is_resumed_where_it_was_cut_off_and_then_served() {
    let (_dir, store) = store();
    let (content, id) = image(200_000);
    let mut first = store.upload(id, 200_000, 0, "op").unwrap();
    first.append(&content[..70_000]).unwrap();
    assert!(matches!(
        store.upload(id, 200_000, 0, "op"),
        Err(StoreError::UploadBusy)
    ));
    drop(first);
    assert!(matches!(
        store.upload(id, 200_000, 0, "op"),
        Err(StoreError::WrongOffset {
            received: 70_000,
            ..
        })
    ));
    let mut second = store
        .upload(id, 200_000, store.received(&id).unwrap(), "op")
        .unwrap();
    second.append(&content[70_000..]).unwrap();
    second.finish().unwrap();
    let file = store.get(&id).unwrap().unwrap();
    assert_eq!(file.content.slice(0..content.len()).unwrap(), content);
    assert_eq!(
        Outline::from_bytes(
            id,
            200_000,
            &file.outline.slice(0..file.outline.len()).unwrap()
        )
        .unwrap()
        .groups(),
        4
    );
    assert_eq!(store.list().unwrap(), [id]);
}

#[test]
fn only_its_own_operator_takes_an_upload_over() {
    let (_dir, store) = store();
    let (content, id) = image(1_000);
    assert!(store.take_over(&id, "op").is_none(), "there is none");
    let mut first = store.upload(id, 1_000, 0, "op").unwrap();
    first.append(&content[..400]).unwrap();
    assert!(store.take_over(&id, "somebody else").is_none());
    assert!(!first.give_up().is_cancelled());
    let ended = store.take_over(&id, "op").unwrap();
    assert!(first.give_up().is_cancelled() && !ended.is_cancelled());
    drop(first);
    assert!(ended.is_cancelled());
    let second = store.upload(id, 1_000, 400, "op").unwrap();
    assert!(!second.give_up().is_cancelled());
}

#[test]
fn uploads_that_nobody_goes_on_with_are_forgotten_while_the_store_is_open() {
    let (_dir, store) = store();
    let ids = [b"old", b"now", b"new"].map(|name| FileId::of(name));
    let [old, now, new] = ids;
    for id in ids {
        store
            .upload(id, 10, 0, "op")
            .unwrap()
            .append(b"12345")
            .unwrap();
    }
    let under_way = store.upload(now, 10, 5, "op").unwrap();
    let long_ago = SystemTime::now() - limits::UPLOAD_KEPT - Duration::from_secs(60);
    for id in [old, now] {
        let file = File::options().write(true).open(store.upload_path(&id));
        file.unwrap().set_modified(long_ago).unwrap();
    }
    store.forget_old_uploads().unwrap();
    let held = ids.map(|id| store.received(&id).unwrap());
    assert_eq!(held, [0, 5, 5]);
    drop(under_way);
    store.forget_old_uploads().unwrap();
    assert_eq!(store.received(&now).unwrap(), 0);
    assert_eq!(store.received(&new).unwrap(), 5);
}

#[test]
fn wrong_bytes_are_discarded_and_never_get_the_name() {
    let (_dir, store) = store();
    let (mut content, id) = image(100_000);
    content[99_999] ^= 1;
    assert!(matches!(
        put(&store, &content, id),
        Err(StoreError::WrongHash { .. })
    ));
    assert!(store.get(&id).unwrap().is_none());
    assert_eq!(store.received(&id).unwrap(), 0);
}

#[test]
fn an_upload_longer_or_shorter_than_announced_is_refused() {
    let (_dir, store) = store();
    let (content, id) = image(1_000);
    let mut upload = store.upload(id, 999, 0, "op").unwrap();
    assert!(matches!(
        upload.append(&content),
        Err(StoreError::TooLong { size: 999 })
    ));
    drop(upload);
    let upload = store.upload(id, 1_000, 0, "op").unwrap();
    assert!(matches!(
        upload.finish(),
        Err(StoreError::TooShort { received: 0, .. })
    ));
    assert!(matches!(
        store.upload(id, 0, 0, "op"),
        Err(StoreError::Size)
    ));
}

#[test]
fn a_damaged_file_is_said_to_be_and_can_be_uploaded_again() {
    let (_dir, store) = store();
    let (content, id) = image(200_000);
    put(&store, &content, id).unwrap();
    let held = store.get(&id).unwrap().unwrap();
    let stored = File::options().write(true).open(store.path(&id)).unwrap();
    stored.set_len(100_000).unwrap();
    assert_eq!(
        held.content.slice(190_000..200_000),
        Err(crate::files::Damaged)
    );
    assert!(matches!(store.get(&id), Err(StoreError::Damaged(found)) if found == id));
    put(&store, &content, id).unwrap();
    let file = store.get(&id).unwrap().unwrap();
    assert_eq!(file.content.slice(0..200_000).unwrap(), content);
}

#[test]
fn a_symbolic_link_in_the_store_is_not_followed() {
    let (dir, store) = store();
    let (content, id) = image(10);
    put(&store, &content, id).unwrap();
    // Also where it leads to the right bytes: whoever can make it lead there can make it lead elsewhere.
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(store.path(&id), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, store.path(&id)).unwrap();
    assert!(store.get(&id).is_err());
}

#[test]
fn an_upload_is_not_written_through_a_symbolic_link() {
    let (dir, store) = store();
    let (content, id) = image(200_000);
    let foreign = dir.path().join("foreign");
    fs::write(&foreign, "x").unwrap();
    std::os::unix::fs::symlink(&foreign, store.upload_path(&id)).unwrap();
    // Whatever it says that it holds.
    let received = store.received(&id).unwrap();
    let written = store
        .upload(id, 200_000, received, "op")
        .and_then(|mut upload| upload.append(&content[..100]));
    assert!(matches!(written, Err(StoreError::Io { .. })), "{written:?}");
    assert_eq!(fs::read(&foreign).unwrap(), b"x");
}

#[test]
fn what_a_download_reads_is_in_use_however_many_files_are_open() {
    let (_dir, store) = store();
    let mut downloads = Vec::new();
    for seed in 0..=limits::OPEN_FILES {
        let content = (seed as u32).to_le_bytes();
        let id = FileId::of(&content);
        put(&store, &content, id).unwrap();
        assert!(!store.is_in_use(&id));
        let file = store.get(&id).unwrap().unwrap();
        // As a download has it: neither the file nor, at its end, more than bytes.
        let mapped = file.content.clone();
        let bytes = mapped.slice(0..4).unwrap();
        downloads.push((id, mapped, bytes));
    }
    for (id, ..) in &downloads {
        assert!(store.is_in_use(id), "{id}");
    }
    // Mapped anew, the old mapping is still read.
    let (first, mapped, bytes) = downloads.swap_remove(0);
    store.close(&first);
    assert!(store.is_in_use(&first));
    drop(mapped);
    assert!(store.is_in_use(&first));
    drop(bytes);
    assert!(!store.is_in_use(&first));
    let ids: Vec<_> = downloads.drain(..).map(|(id, ..)| id).collect();
    assert!(ids.iter().all(|id| !store.is_in_use(id)));
    assert!(store.opened().kept.len() <= limits::OPEN_FILES);
}

#[test]
fn content_without_its_outline_is_damaged_and_can_be_uploaded_again() {
    let (_dir, store) = store();
    let (content, id) = image(200_000);
    put(&store, &content, id).unwrap();
    fs::remove_file(store.outline_path(&id)).unwrap();
    store.close(&id);
    assert!(matches!(store.get(&id), Err(StoreError::Damaged(found)) if found == id));
    put(&store, &content, id).unwrap();
    assert!(store.get(&id).unwrap().is_some());
}

#[test]
fn nodes_that_share_a_directory_do_not_write_each_others_uploads() {
    let dir = tempfile::tempdir().unwrap();
    let node = |name: &str| LocalStore::open_shared(dir.path(), &name.parse().unwrap()).unwrap();
    let (a, b) = (node("a"), node("b"));
    let (content, id) = image(100_000);
    let mut slow = a.upload(id, 100_000, 0, "op").unwrap();
    slow.append(&content[..50_000]).unwrap();
    // The operator comes again, by the other node; the first one's line is not dead yet.
    assert_eq!(b.received(&id).unwrap(), 0);
    put(&b, &content, id).unwrap();
    slow.append(&[9; 50_000]).unwrap();
    for store in [&a, &b] {
        let file = store.get(&id).unwrap().unwrap();
        assert_eq!(file.content.slice(0..100_000).unwrap(), content);
        assert_eq!(store.list().unwrap(), [id]);
    }
    assert!(matches!(slow.finish(), Err(StoreError::WrongHash { .. })));
    assert!(b.get(&id).unwrap().is_some());
}

/// A day more than an upload is kept, and an hour.
const LONG_AGO: Duration = Duration::from_secs(8 * 24 * 3_600 + 3_600);

fn age(path: &Path, by: Duration) {
    let file = File::open(path).unwrap();
    file.set_modified(SystemTime::now() - by).unwrap();
}

#[test]
fn what_a_node_that_is_gone_left_behind_is_forgotten_and_nothing_of_one_that_lives() {
    let dir = tempfile::tempdir().unwrap();
    let node = |name: &str| LocalStore::open_shared(dir.path(), &name.parse().unwrap()).unwrap();
    let (a, b) = (node("a"), node("b"));
    let [old, new] = [b"old", b"new"].map(|name| FileId::of(name));
    let begin = |store: &LocalStore, id| {
        let mut upload = store.upload(id, 10, 0, "op").unwrap();
        upload.append(b"12345").unwrap();
    };
    for id in [old, new] {
        begin(&a, id);
    }
    // From before the directory was shared.
    let before = dir.path().join("uploads").join(old.to_string());
    fs::write(&before, "12345").unwrap();
    for path in [&before, &a.upload_path(&old)] {
        age(path, LONG_AGO);
    }
    let foreign = dir.path().join("uploads/notes");
    fs::write(&foreign, "mine").unwrap();
    age(&foreign, LONG_AGO);
    let (alive, day) = (a.inner.uploads.join(".alive"), limits::UPLOADER_GONE);
    b.forget_old_uploads().unwrap();
    assert_eq!(a.received(&old).unwrap(), 5, "the node lives");
    assert!(!before.exists() && foreign.exists());
    age(&alive, day + Duration::from_secs(60));
    for (upload, held) in [(old, 0), (new, 5)] {
        b.forget_old_uploads().unwrap();
        assert_eq!(a.received(&upload).unwrap(), held);
    }
    age(&a.upload_path(&new), limits::UPLOAD_KEPT + day / 2);
    b.forget_old_uploads().unwrap();
    assert_eq!(a.received(&new).unwrap(), 5, "not before it would itself");
    // It comes back in time.
    age(&a.upload_path(&new), LONG_AGO);
    left::beat(&a.inner.uploads).unwrap();
    b.forget_old_uploads().unwrap();
    assert_eq!(a.received(&new).unwrap(), 5);
    // And in the very moment in which it was found to be gone.
    let now = SystemTime::now();
    left::forget_of(&a.inner.uploads, &"a".parse().unwrap(), now).unwrap();
    assert_eq!(a.received(&new).unwrap(), 5);
    age(&alive, 2 * day);
    b.forget_old_uploads().unwrap();
    assert!(!a.inner.uploads.exists(), "nothing is left of it");
    // It was only suspended.
    let (content, id) = image(1_000);
    put(&a, &content, id).unwrap();
    a.forget_old_uploads().unwrap();
    assert!(alive.exists() && b.inner.uploads.exists());
}

#[test]
fn a_node_of_a_version_that_does_not_say_that_it_lives_keeps_what_it_works_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open_shared(dir.path(), &"b".parse().unwrap()).unwrap();
    let theirs = dir.path().join("uploads/a");
    fs::create_dir(&theirs).unwrap();
    let uploads = [b"x", b"y"].map(|name| theirs.join(FileId::of(name).to_string()));
    for upload in &uploads {
        fs::write(upload, "12345").unwrap();
        age(upload, LONG_AGO);
    }
    store.forget_old_uploads().unwrap();
    assert!(uploads[0].exists(), "its directory was changed today");
    age(&theirs, LONG_AGO);
    store.forget_old_uploads().unwrap();
    assert!(!theirs.exists());
}

#[test]
fn how_long_an_upload_got_nothing_is_told_by_the_file_server() {
    let dir = tempfile::tempdir().unwrap();
    let all = dir.path();
    let (own, theirs) = (all.join("own"), all.join("theirs"));
    for path in [&own, &theirs] {
        left::beat(path).unwrap();
    }
    let upload = theirs.join(FileId::of(b"x").to_string());
    fs::write(&upload, "12345").unwrap();
    // The file server's clock, not this machine's, is ten days on, and the other node has just said that it lives.
    let later = SystemTime::now() + Duration::from_secs(10 * 24 * 3_600);
    let alive = File::open(theirs.join(".alive")).unwrap();
    alive.set_modified(later).unwrap();
    left::forget(all, &own, later).unwrap();
    assert!(upload.exists());
    left::forget(all, &own, later + 2 * limits::UPLOADER_GONE).unwrap();
    assert!(!theirs.exists() && own.exists());
}

#[test]
fn an_upload_under_way_is_not_thrown_away_because_somebody_announces_another_size() {
    let (_dir, store) = store();
    let (content, id) = image(1_000);
    let mut upload = store.upload(id, 1_000, 0, "op").unwrap();
    upload.append(&content).unwrap();
    assert!(matches!(
        store.discard_idle(&id),
        Err(StoreError::UploadBusy)
    ));
    upload.finish().unwrap();
    drop(store.upload(id, 1_000, 0, "op").unwrap());
    store.discard_idle(&id).unwrap();
    assert!(!store.upload_path(&id).exists());
}

#[test]
fn bytes_that_changed_since_they_were_hashed_are_not_passed_on() {
    let (_dir, store) = store();
    let (content, id) = image(200_000);
    let mut upload = store.upload(id, 200_000, 0, "op").unwrap();
    upload.append(&content).unwrap();
    let whole = upload.check().unwrap();
    assert_eq!(
        whole.read(65_536, 65_536).unwrap(),
        content[65_536..131_072]
    );
    let path = store.upload_path(&id);
    let changed = File::options().write(true).open(path).unwrap();
    changed.write_all_at(b"x", 70_000).unwrap();
    whole.read(0, 65_536).unwrap();
    assert!(matches!(
        whole.read(65_536, 65_536),
        Err(StoreError::Damaged(found)) if found == id
    ));
}
