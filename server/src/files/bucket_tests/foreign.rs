//! What is not ours, and what is there no more.

use super::*;

#[tokio::test]
async fn a_directory_that_is_no_cache_is_refused_as_it_is() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let dir = node.dir.path().join("cache");
    // As in a data directory, and in that of `file:` before the images went to a bucket.
    let (content, id) = image(1, 10);
    let name = id.to_string();
    let shard = dir.join(&name[..2]);
    fs::create_dir_all(&shard).unwrap();
    fs::create_dir_all(dir.join("uploads")).unwrap();
    for path in [shard.join(&name), shard.join("x"), dir.join("fwpush.db")] {
        fs::write(path, &content).unwrap();
    }
    let refused = node.try_open().await.unwrap_err();
    assert!(matches!(refused, StoreError::NoCache { .. }), "{refused:?}");
    assert!(refused.to_string().contains("files.cache_dir"), "{refused}");
    for path in [shard.join(&name), shard.join("x"), dir.join("fwpush.db")] {
        assert_eq!(fs::read(path).unwrap(), content);
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 3, "nothing was made");
}

#[tokio::test]
async fn what_somebody_put_into_the_cache_or_the_bucket_is_left_alone() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (bytes, id) = put_image(&store, 1, 100_000).await;
    drop(store);
    let shard = node.cached(&id);
    let elsewhere = node.dir.path().join("cache/notes");
    fs::create_dir(&elsewhere).unwrap();
    let foreign = [
        shard.with_file_name("README"),
        shard.with_file_name("x.outline"),
        elsewhere.join("todo"),
        elsewhere.join(id.to_string()),
        node.dir.path().join("cache/uploads/mine"),
    ];
    for path in &foreign {
        fs::write(path, "mine").unwrap();
    }
    let long_ago = std::time::SystemTime::now() - 2 * crate::limits::UPLOAD_KEPT;
    let old = File::options().write(true).open(&foreign[4]).unwrap();
    old.set_modified(long_ago).unwrap();
    // Another fleet's image below our prefix, and ours under the wrong letters.
    let (_, theirs) = image(2, 10);
    for key in [
        format!("fleet/a/b/{}/{theirs}", &theirs.to_string()[..2]),
        format!("fleet/a/zz/{theirs}"),
    ] {
        let path = s3.object(&key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "theirs").unwrap();
    }
    let store = node.open().await;
    for path in &foreign {
        assert_eq!(fs::read(path).unwrap(), b"mine", "{}", path.display());
    }
    assert_eq!(store.cached(), [id]);
    assert!(served(&store, &id).await == bytes);
    let listed = store.list().await.unwrap();
    let listed: Vec<_> = listed.iter().map(|stored| stored.file).collect();
    assert_eq!(listed, [id]);
}

#[tokio::test]
async fn a_bucket_that_is_gone_is_not_a_bucket_without_the_image() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (_, id) = put_image(&store, 1, 100_000).await;
    let (_, missing) = image(2, 10);
    store.drop_cached(&id).await.unwrap();
    store.delete(&missing).await.unwrap();
    store.check().await.unwrap();
    let bucket = s3.object("");
    let aside = bucket.with_file_name("aside");
    fs::rename(&bucket, &aside).unwrap();
    let gone = |answer: Result<(), StoreError>| {
        assert!(
            matches!(answer, Err(StoreError::NoBucket { .. })),
            "{answer:?}"
        );
    };
    gone(store.check().await);
    gone(store.size(&missing).await.map(drop));
    gone(store.delete(&id).await);
    let answer = get(&store, &id).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    fs::rename(&aside, &bucket).unwrap();
    served_at_last(&store, &id).await;
    store.delete(&id).await.unwrap();
    assert_eq!(store.size(&id).await.unwrap(), None);
}

#[tokio::test]
async fn an_image_that_cannot_be_removed_counts_and_goes_when_it_can() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3).cache_bytes(MIB));
    let (a, b) = (first.open().await, second.open().await);
    let (_, old) = put_image(&a, 1, 700_000).await;
    let (bytes, new) = put_image(&a, 2, 700_000).await;
    served(&b, &old).await;
    // Not even the superuser unlinks a directory.
    let (path, aside) = (second.cached(&old), second.dir.path().join("aside"));
    fs::rename(&path, &aside).unwrap();
    fs::create_dir(&path).unwrap();
    let answer = get(&b, &new).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    assert!(b.drop_cached(&old).await.is_err());
    assert_eq!(b.cached(), [old], "its bytes are not given away");
    fs::remove_dir(&path).unwrap();
    fs::rename(&aside, &path).unwrap();
    assert!(content(&*served_at_last(&b, &new).await) == bytes);
    assert_eq!(b.cached(), [new]);
    assert!(second.on_disk() <= MIB as u64);
}
