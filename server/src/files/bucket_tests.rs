//! The store on a real S3 server, which checks every signature.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use fwpush_keys::{
    Ca, Identity, Role,
    id::FileId,
    new_key_and_csr,
    outline::{Outline, outline_of},
    time::Timestamp,
};
use fwpush_services::s3::{ACCESS_KEY_ID, BUCKET, Fault, S3, S3Options, SECRET_KEY};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{FileStore, Files, FilesPlace, StoreError, StoredFile, Upload};

mod faults;
mod foreign;

const MIB: usize = 1 << 20;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A node's directory, and its way to the bucket.
struct Node {
    dir: TempDir,
    files: Files,
}

impl Node {
    fn new(s3: &S3) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), format!("{SECRET_KEY}\n")).unwrap();
        let files = Files {
            url: format!("s3://{BUCKET}/fleet/a"),
            endpoint: Some(s3.endpoint()),
            access_key_id: Some(ACCESS_KEY_ID.into()),
            secret_key_file: Some("secret".into()),
            allow_http: s3.endpoint().starts_with("http:"),
            cache_dir: Some("cache".into()),
            ..Files::default()
        };
        Self { dir, files }
    }

    fn cache_bytes(mut self, bytes: usize) -> Self {
        self.files.cache_bytes = Some(bytes as u64);
        self
    }

    fn place(&self) -> FilesPlace {
        self.files.place(self.dir.path()).unwrap()
    }

    async fn try_open(&self) -> Result<FileStore, StoreError> {
        FileStore::open(&self.place(), &"n1".parse().unwrap()).await
    }

    async fn open(&self) -> FileStore {
        self.try_open().await.unwrap()
    }

    fn cached(&self, id: &FileId) -> std::path::PathBuf {
        let name = id.to_string();
        self.dir.path().join("cache").join(&name[..2]).join(name)
    }

    /// Bytes of finished files and of those on their way.
    fn on_disk(&self) -> u64 {
        let mut bytes = 0;
        for shard in fs::read_dir(self.dir.path().join("cache")).unwrap() {
            let shard = shard.unwrap();
            if shard.file_type().unwrap().is_dir() {
                for entry in fs::read_dir(shard.path()).unwrap() {
                    // It may be renamed at this moment.
                    bytes += entry.unwrap().metadata().map_or(0, |found| found.len());
                }
            }
        }
        bytes
    }
}

/// What the database knows of images: how long they are.
static SIZES: Mutex<BTreeMap<FileId, u64>> = Mutex::new(BTreeMap::new());

fn image(seed: u8, bytes: usize) -> (Vec<u8>, FileId) {
    let content: Vec<u8> = (0..bytes)
        .map(|at| (at / 11) as u8 ^ (at >> 14) as u8 ^ seed)
        .collect();
    let id = FileId::of(&content);
    SIZES.lock().unwrap().insert(id, bytes as u64);
    (content, id)
}

async fn get(store: &FileStore, id: &FileId) -> Result<Option<Arc<StoredFile>>, StoreError> {
    let size = SIZES.lock().unwrap()[id];
    store.get(id, size).await
}

async fn put(store: &FileStore, content: &[u8]) -> Result<FileId, StoreError> {
    let id = FileId::of(content);
    let from = store.uploads().received(&id)?;
    let mut upload = store
        .uploads()
        .upload(id, content.len() as u64, from, "op")?;
    upload.append(&content[from as usize..])?;
    store.finish(upload, &CancellationToken::new()).await?;
    Ok(id)
}

async fn put_image(store: &FileStore, seed: u8, bytes: usize) -> (Vec<u8>, FileId) {
    let (content, id) = image(seed, bytes);
    assert_eq!(put(store, &content).await.unwrap(), id);
    (content, id)
}

fn key(id: &FileId) -> String {
    let name = id.to_string();
    format!("fleet/a/{}/{name}", &name[..2])
}

fn content(file: &StoredFile) -> Vec<u8> {
    file.content.slice(0..file.content.len()).unwrap().to_vec()
}

async fn served(store: &FileStore, id: &FileId) -> Vec<u8> {
    content(&get(store, id).await.unwrap().unwrap())
}

/// Asks until it is there: as a device does.
async fn served_at_last(store: &FileStore, id: &FileId) -> Arc<StoredFile> {
    let asked = tokio::time::Instant::now();
    loop {
        match get(store, id).await {
            Ok(Some(file)) => return file,
            Err(StoreError::NotHereNow) if asked.elapsed() < LONG => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Changes one byte, and neither length nor time.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn fetches(s3: &S3, id: &FileId) -> usize {
    let line = format!("GET /{BUCKET}/{}", key(id));
    let requests = s3.requests();
    requests.iter().filter(|seen| **seen == line).count()
}

#[tokio::test]
async fn an_image_uploaded_on_one_node_is_served_by_another() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (a, b) = (first.open().await, second.open().await);
    // One of a single group, one of a few, and one of several parts.
    for bytes in [1, 200_000, 17 * MIB + 5] {
        let (bytes, id) = put_image(&a, 1, bytes).await;
        assert_eq!(a.size(&id).await.unwrap(), Some(bytes.len() as u64));
        assert_eq!(b.size(&id).await.unwrap(), Some(bytes.len() as u64));
        assert!(
            !second.cached(&id).exists(),
            "asking for the size fetches nothing"
        );
        let file = served_at_last(&b, &id).await;
        assert_eq!(content(&file), bytes);
        let outline = file.outline.slice(0..file.outline.len()).unwrap();
        Outline::from_bytes(id, bytes.len() as u64, &outline).unwrap();
        assert_eq!(served(&a, &id).await, bytes);
        assert_eq!(fetches(&s3, &id), 1, "the first node has what it uploaded");
        assert_eq!(a.uploads().received(&id).unwrap(), 0);
    }
    let stored = a.list().await.unwrap();
    assert_eq!(stored.len(), 3);
    assert!(
        stored
            .iter()
            .any(|stored| stored.size == 17 * MIB as u64 + 5)
    );
    for stored in stored {
        a.delete(&stored.file).await.unwrap();
    }
    assert_eq!(s3.keys().unwrap(), Vec::<String>::new());
    assert_eq!(first.on_disk(), 0);
    let (_, id) = image(1, 200_000);
    assert!(get(&a, &id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_file_that_many_ask_for_is_fetched_once() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (bytes, id) = put_image(&first.open().await, 1, 3 * MIB).await;
    let store = second.open().await;
    s3.hold(&key(&id));
    let asking: Vec<_> = (0..100)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { content(&*served_at_last(&store, &id).await) })
        })
        .collect();
    let (s3, seen) = tokio::task::spawn_blocking(move || {
        let seen = s3.saw(&format!("GET /{BUCKET}/{}", key(&id)), LONG);
        (s3, seen)
    })
    .await
    .unwrap();
    assert!(seen);
    s3.release();
    for asked in asking {
        assert!(asked.await.unwrap() == bytes);
    }
    assert_eq!(fetches(&s3, &id), 1);
}

#[tokio::test]
async fn who_waits_too_long_is_told_to_come_back_and_the_fetch_goes_on() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (bytes, id) = put_image(&first.open().await, 1, MIB).await;
    let store = second.open().await;
    s3.hold(&key(&id));
    let answer = get(&store, &id).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    s3.release();
    assert!(content(&*served_at_last(&store, &id).await) == bytes);
    assert_eq!(fetches(&s3, &id), 1);
}

#[tokio::test]
async fn wrong_bytes_in_the_bucket_are_never_served_and_an_upload_mends_them() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (a, b) = (first.open().await, second.open().await);
    let (other, _) = image(99, 300_000);
    type Harm<'a> = (&'a str, &'a dyn Fn(&Path, &Path));
    let not_its_own = outline_of(&other[..]).unwrap().to_bytes();
    let harms: [Harm<'_>; 6] = [
        ("flipped", &|content, _| flip(content, 250_000)),
        ("cut short", &|content, _| {
            File::options()
                .write(true)
                .open(content)
                .unwrap()
                .set_len(299_999)
                .unwrap();
        }),
        ("empty", &|content, _| fs::write(content, "").unwrap()),
        ("an outline of another", &|_, outline| {
            fs::write(outline, &not_its_own).unwrap();
        }),
        ("an outline cut short", &|_, outline| {
            fs::write(outline, [1; 31]).unwrap()
        }),
        ("no outline", &|_, outline| {
            fs::remove_file(outline).unwrap()
        }),
    ];
    for (seed, (what, harm)) in harms.into_iter().enumerate() {
        let (bytes, id) = put_image(&a, seed as u8, 300_000).await;
        harm(
            &s3.object(&key(&id)),
            &s3.object(&format!("{}.outline", key(&id))),
        );
        for _ in 0..2 {
            let answer = get(&b, &id).await;
            assert!(
                matches!(answer, Err(StoreError::Damaged(found)) if found == id),
                "{what}: {answer:?}"
            );
        }
        assert!(fetches(&s3, &id) <= 2, "{what}: not again and again");
        if what == "flipped" {
            assert_eq!(fetches(&s3, &id), 2, "once may be the way");
        }
        assert_eq!(second.on_disk(), 0, "{what}");
        put(&b, &bytes).await.unwrap();
        assert!(served(&b, &id).await == bytes, "{what}");
        b.drop_cached(&id).await.unwrap();
        assert!(
            served(&b, &id).await == bytes,
            "{what}: it is right in the bucket too"
        );
        b.drop_cached(&id).await.unwrap();
    }
}

#[tokio::test]
async fn while_the_bucket_is_away_the_cache_serves_and_all_is_well_when_it_is_back() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (a, b) = (first.open().await, second.open().await);
    let (cached, cached_id) = put_image(&a, 1, 100_000).await;
    let (wanted, wanted_id) = put_image(&a, 2, 100_000).await;
    assert!(served(&b, &cached_id).await == cached);
    b.check().await.unwrap();
    s3.stop();
    assert!(matches!(b.check().await, Err(StoreError::Away { .. })));
    assert!(served(&b, &cached_id).await == cached);
    let answer = get(&b, &wanted_id).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    let (new, new_id) = image(3, 9 * MIB);
    assert!(matches!(put(&b, &new).await, Err(StoreError::Away { .. })));
    assert_eq!(
        b.uploads().received(&new_id).unwrap(),
        new.len() as u64,
        "the upload stays"
    );
    drop(b);
    // A node that starts meanwhile starts, and serves what it has.
    let b = second.open().await;
    assert!(served(&b, &cached_id).await == cached);
    s3.resume().unwrap();
    assert!(content(&*served_at_last(&b, &wanted_id).await) == wanted);
    put(&b, &new).await.unwrap();
    assert!(served(&a, &new_id).await == new);
    b.check().await.unwrap();
}

#[tokio::test]
async fn the_cache_keeps_its_bound_and_what_is_used_most() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3).cache_bytes(MIB));
    let (a, b) = (first.open().await, second.open().await);
    let mut images = Vec::new();
    for seed in 0..6 {
        images.push(put_image(&a, seed, 300_000).await);
    }
    for (bytes, id) in &images {
        assert!(served(&b, id).await == *bytes);
        assert!(served(&b, &images[0].1).await == images[0].0);
        assert!(second.on_disk() <= MIB as u64, "{}", second.on_disk());
    }
    assert_eq!(
        fetches(&s3, &images[0].1),
        1,
        "it was never the longest unused"
    );
    assert_eq!(b.cached().len(), 3);
    // What is being downloaded stays, and then there is no room.
    let mut downloads = Vec::new();
    for id in b.cached() {
        let file = get(&b, &id).await.unwrap().unwrap();
        downloads.push((file.content.clone(), id));
    }
    let other = images
        .iter()
        .find(|(_, id)| !b.cached().contains(id))
        .unwrap();
    assert!(matches!(
        get(&b, &other.1).await,
        Err(StoreError::NotHereNow)
    ));
    for (download, id) in &downloads {
        assert!(second.cached(id).exists());
        assert_eq!(FileId::of(&download.slice(0..300_000).unwrap()), *id);
    }
    downloads.clear();
    assert!(content(&*served_at_last(&b, &other.1).await) == other.0);
    assert!(second.on_disk() <= MIB as u64);
    // One that never fits is said to be.
    let (_, large) = put_image(&a, 9, 2 * MIB).await;
    assert!(
        matches!(get(&b, &large).await, Err(StoreError::AboveCache { size, .. }) if size == 2 * MIB as u64)
    );
    let refused = b.takes(&large, 2 * MIB as u64);
    assert!(matches!(refused, Err(StoreError::AboveCache { .. })));
    b.takes(&large, 500_000).unwrap();
    // Outlines count: 512 bytes of this one.
    b.takes(&large, MIB as u64 - 512).unwrap();
    assert!(b.takes(&large, MIB as u64 - 511).is_err());
    a.takes(&large, 2 * MIB as u64).unwrap();
    // Uploaded here it goes to the bucket, and is not cached.
    let (large, id) = put_image(&b, 10, 2 * MIB).await;
    assert!(second.on_disk() <= MIB as u64);
    assert!(served(&a, &id).await == large);
}

#[tokio::test]
async fn a_cache_outlives_its_server_but_for_what_is_damaged() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let mut images = Vec::new();
    for seed in 0..4 {
        images.push(put_image(&store, seed, 200_000).await);
    }
    let again = node.try_open().await.unwrap_err();
    assert!(matches!(again, StoreError::CacheInUse { .. }), "{again}");
    drop(store);
    flip(&node.cached(&images[1].1), 150_000);
    File::options()
        .write(true)
        .open(node.cached(&images[2].1))
        .unwrap()
        .set_len(150_000)
        .unwrap();
    fs::remove_file(node.cached(&images[3].1)).unwrap();
    let shard = node.cached(&images[0].1);
    fs::write(shard.with_file_name(".fetch-x1"), "cut off").unwrap();
    let store = node.open().await;
    assert_eq!(store.cached().len(), 2);
    assert!(!shard.with_file_name(".fetch-x1").exists());
    for (bytes, id) in &images {
        assert!(served(&store, id).await == *bytes);
    }
    let fetched: Vec<_> = images.iter().map(|(_, id)| fetches(&s3, id)).collect();
    assert_eq!(fetched, [0, 1, 1, 1]);
    // Cut short while the server runs.
    File::options()
        .write(true)
        .open(node.cached(&images[0].1))
        .unwrap()
        .set_len(100)
        .unwrap();
    let held = get(&store, &images[0].1).await.unwrap().unwrap();
    held.content.slice(0..200_000).unwrap_err();
    assert!(served(&store, &images[0].1).await == images[0].0);
    assert_eq!(fetches(&s3, &images[0].1), 1);
}

/// An image that was brought whole, and that will be in the middle of its way to the bucket for as long as the test likes.
fn held_at_its_second_part(s3: &S3, store: &FileStore) -> (Vec<u8>, FileId, Upload) {
    let (bytes, id) = image(1, 20 * MIB);
    let mut upload = store
        .uploads()
        .upload(id, bytes.len() as u64, 0, "op")
        .unwrap();
    upload.append(&bytes).unwrap();
    s3.hold("partNumber=2");
    (bytes, id, upload)
}

/// Waits until the bucket was asked for something with these words.
async fn saw(s3: S3, words: &'static str) -> S3 {
    let waited = tokio::task::spawn_blocking(move || {
        assert!(s3.saw(words, LONG));
        s3
    });
    waited.await.unwrap()
}

#[tokio::test]
async fn an_upload_that_is_cut_off_on_its_way_to_the_bucket_leaves_nothing_to_serve_and_is_made_good()
 {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (bytes, id, upload) = held_at_its_second_part(&s3, &store);
    let stop = CancellationToken::new();
    let finishing = {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move { store.finish(upload, &stop).await.map(drop) })
    };
    let s3 = saw(s3, "partNumber=2").await;
    stop.cancel();
    let stopped = finishing.await.unwrap();
    assert!(matches!(stopped, Err(StoreError::Stopping)), "{stopped:?}");
    s3.release();
    let asked = s3.requests();
    let forgets = |line: &String| line.starts_with("DELETE") && line.contains("uploadId=");
    assert!(asked.iter().any(forgets), "parts that stay cost room");
    assert_eq!(s3.keys().unwrap(), [format!("{}.outline", key(&id))]);
    assert_eq!(store.size(&id).await.unwrap(), None);
    assert!(get(&store, &id).await.unwrap().is_none());
    // No byte has to be sent again to us.
    assert_eq!(store.uploads().received(&id).unwrap(), bytes.len() as u64);
    put(&store, &bytes).await.unwrap();
    assert!(served(&store, &id).await == bytes);
}

#[tokio::test]
async fn a_bucket_that_refuses_us_or_is_not_there_is_said_at_the_start() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    fs::write(node.dir.path().join("secret"), "wrong").unwrap();
    let refused = node.try_open().await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains("files.secret_key_file"));
    fs::remove_file(node.dir.path().join("secret")).unwrap();
    let unread = node.try_open().await.unwrap_err();
    assert!(unread.to_string().contains("secret"), "{unread}");
    let mut node = Node::new(&s3);
    node.files.url = "s3://elsewhere".into();
    let nowhere = node.try_open().await.unwrap_err();
    assert!(
        matches!(nowhere, StoreError::NoBucket { .. }),
        "{nowhere:?}"
    );
    assert!(nowhere.to_string().contains("files.url"));
}

/// An authority, and a certificate for `localhost` with its key; PEM.
fn authority() -> (String, (String, String)) {
    let (domain, now) = ("test".parse().unwrap(), Timestamp::now());
    let ca = Ca::generate(Role::Node, &domain, now, 1).unwrap();
    let (key, csr) = new_key_and_csr().unwrap();
    let identity = Identity::node(&domain, &"s3".parse().unwrap());
    let names = ["localhost".parse().unwrap()];
    let certificate = ca.issue_for_csr(&csr, &identity, &names, now, 1).unwrap();
    (ca.cert_pem(), (certificate, key.to_string()))
}

#[tokio::test]
async fn over_tls_the_server_must_be_one_that_the_ca_file_vouches_for_and_urls_can_be_signed() {
    let (ca, tls) = authority();
    let s3 = S3::start(&S3Options { tls: Some(tls) }).unwrap();
    let mut node = Node::new(&s3);
    fs::write(node.dir.path().join("ca.crt"), &ca).unwrap();
    node.files.ca_file = Some("ca.crt".into());
    let store = node.open().await;
    let (bytes, id) = put_image(&store, 1, 200_000).await;
    store.drop_cached(&id).await.unwrap();
    assert!(served(&store, &id).await == bytes);

    let signed = store.presign(&id).await.unwrap().unwrap();
    let life = format!("X-Amz-Expires={}&", crate::limits::PRESIGNED_LIFE.as_secs());
    assert!(signed.url.contains(&life), "for the server too");
    let left = signed.expires.since(Timestamp::now());
    assert!(left <= crate::limits::PRESIGNED_LIFE && left > crate::limits::PRESIGNED_LIFE / 2);
    assert!(
        !format!("{signed:?}").contains("Signature"),
        "it is a secret"
    );
    let ca = reqwest::Certificate::from_pem(ca.as_bytes()).unwrap();
    let client = reqwest::Client::builder()
        .tls_certs_only([ca])
        .build()
        .unwrap();
    let got = client.get(&signed.url).send().await.unwrap();
    assert!(got.status().is_success(), "{}", got.status());
    assert!(got.bytes().await.unwrap() == bytes);
    let unsigned = signed.url.split('?').next().unwrap();
    assert_eq!(client.get(unsigned).send().await.unwrap().status(), 403);

    // Without it the system's authorities decide, and none of them knows this server.
    let mut stranger = Node::new(&s3);
    let (other, _) = authority();
    fs::write(stranger.dir.path().join("ca.crt"), other).unwrap();
    stranger.files.ca_file = Some("ca.crt".into());
    let store = stranger.open().await;
    let answer = store.check().await;
    assert!(matches!(answer, Err(StoreError::Away { .. })), "{answer:?}");
}

#[tokio::test]
async fn over_plain_http_no_url_is_given_to_devices() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (_, id) = put_image(&store, 1, 10).await;
    assert!(store.presign(&id).await.unwrap().is_none());
    let directory = FilesPlace::directory(node.dir.path().join("files"));
    let local = FileStore::open(&directory, &"n1".parse().unwrap()).await;
    assert!(local.unwrap().presign(&id).await.unwrap().is_none());
}
