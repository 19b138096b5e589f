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
