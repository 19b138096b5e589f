//! A server that answers, and not as it should; a line that does not last.

use super::{super::s3::Bucket, *};

/// Longer than a request is repeated.
const ALWAYS: usize = 1_000;

#[tokio::test]
async fn what_is_wrong_with_the_bucket_is_told_apart() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    store.check().await.unwrap();
    let refused = |error: &StoreError| matches!(error, StoreError::Refused { .. });
    let faulty = |error: &StoreError| matches!(error, StoreError::Faulty { .. });
    let missing = |error: &StoreError| matches!(error, StoreError::NoBucket { .. });
    type Is<'a> = &'a dyn Fn(&StoreError) -> bool;
    // Of the list, which the client gives no kind of error, and of an object.
    let cases: [(&str, u16, Is<'_>); 9] = [
        ("list-type=2", 503, &faulty),
        ("list-type=2", 500, &faulty),
        ("list-type=2", 403, &refused),
        ("list-type=2", 404, &missing),
        ("list-type=2", 301, &refused),
        ("list-type=2", 400, &refused),
        ("HEAD", 503, &faulty),
        ("HEAD", 403, &refused),
        ("HEAD", 301, &refused),
    ];
    for (words, status, is) in cases {
        s3.spoil(words, Fault::Status(status), ALWAYS);
        let error = store.check().await.unwrap_err();
        assert!(is(&error), "{words} {status}: {error:?}");
        let says = error.to_string();
        assert_eq!(
            says.contains("at fault or overloaded"),
            faulty(&error),
            "{says}"
        );
        assert_eq!(
            says.contains("files.access_key_id"),
            refused(&error),
            "{says}"
        );
        assert_eq!(says.contains("there is no"), missing(&error), "{says}");
        assert!(error.passes());
    }
    s3.spoil("", Fault::Cut(0), 0);
    // A server that is at fault is no reason not to start; one that says no is.
    drop(store);
    s3.spoil("list-type=2", Fault::Status(503), ALWAYS);
    drop(node.open().await);
    s3.spoil("list-type=2", Fault::Status(403), ALWAYS);
    let refused = node.try_open().await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused:?}");
}

#[tokio::test]
async fn a_bucket_that_says_nothing_does_not_hold_up_the_start() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let (bytes, id) = put_image(&node.open().await, 1, 100_000).await;
    s3.hold("/");
    let began = tokio::time::Instant::now();
    let store = node.open().await;
    assert!(began.elapsed() < 2 * crate::limits::S3_OPEN);
    assert!(served(&store, &id).await == bytes);
}

#[tokio::test]
async fn a_fetch_that_is_cut_off_again_and_again_goes_on_where_it_was() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (bytes, id) = put_image(&first.open().await, 1, 14 * MIB).await;
    let store = second.open().await;
    // Nine times 1.5 MiB, and the outline, which is shorter: more often than the client goes on by itself.
    let words = format!("GET /{BUCKET}/{}", key(&id));
    s3.spoil(&words, Fault::Cut(3 * MIB as u64 / 2), 10);
    // The first waits no longer than a device does.
    assert!(content(&*served_at_last(&store, &id).await) == bytes);
    let asked = s3.requests();
    let asked = asked.iter().filter(|line| line.contains(&key(&id)));
    let contents = asked.filter(|line| line.starts_with("GET") && !line.contains(".outline"));
    assert_eq!(contents.count(), 10, "and never from the start");
}

#[tokio::test]
async fn a_line_that_brings_next_to_nothing_is_given_up_for_the_moment() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (bytes, id) = put_image(&first.open().await, 1, MIB).await;
    let store = second.open().await;
    let words = format!("GET /{BUCKET}/{}", key(&id));
    s3.spoil(&words, Fault::Cut(1_000), ALWAYS);
    let answer = get(&store, &id).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    assert_eq!(second.on_disk(), 0, "nothing of it stays");
    assert!(store.cached().is_empty() && store.take_found(&id).is_none());
    s3.spoil("", Fault::Cut(0), 0);
    assert!(content(&*served_at_last(&store, &id).await) == bytes);
}

#[tokio::test]
async fn an_image_without_room_is_not_asked_for() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3).cache_bytes(MIB));
    let (a, b) = (first.open().await, second.open().await);
    let (_, large) = put_image(&a, 1, 2 * MIB).await;
    let (_, held) = put_image(&a, 2, 700_000).await;
    let (_, other) = put_image(&a, 3, 700_000).await;
    let download = get(&b, &held).await.unwrap().unwrap();
    let before = s3.requests().len();
    let answer = get(&b, &large).await;
    assert!(
        matches!(answer, Err(StoreError::AboveCache { .. })),
        "{answer:?}"
    );
    let answer = get(&b, &other).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    assert_eq!(s3.requests().len(), before, "the bucket was asked nothing");
    drop(download);
    served_at_last(&b, &other).await;
}

#[tokio::test]
async fn while_the_bucket_is_away_nothing_is_given_up_for_what_cannot_come() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3).cache_bytes(MIB));
    let (a, b) = (first.open().await, second.open().await);
    let (bytes, cached) = put_image(&a, 1, 700_000).await;
    let (_, wanted) = put_image(&a, 2, 700_000).await;
    served(&b, &cached).await;
    s3.stop();
    let answer = get(&b, &wanted).await;
    assert!(matches!(answer, Err(StoreError::NotHereNow)), "{answer:?}");
    assert!(served(&b, &cached).await == bytes);
}

#[tokio::test]
async fn an_object_of_another_size_than_was_uploaded_is_damaged_and_makes_no_room() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3).cache_bytes(MIB));
    let (a, b) = (first.open().await, second.open().await);
    let (bytes, cached) = put_image(&a, 1, 700_000).await;
    let (_, wanted) = put_image(&a, 2, 200_000).await;
    served(&b, &cached).await;
    let object = File::options().write(true).open(s3.object(&key(&wanted)));
    // Its outline is as long as before.
    object.unwrap().set_len(200_001).unwrap();
    let answer = get(&b, &wanted).await;
    assert!(matches!(answer, Err(StoreError::Damaged(_))), "{answer:?}");
    let outline = format!("GET /{BUCKET}/{}.outline", key(&wanted));
    let asked = s3.requests().contains(&outline);
    assert!(!asked, "the headers told");
    assert_eq!(b.cached(), [cached]);
    assert!(served(&b, &cached).await == bytes);
}

#[tokio::test]
async fn what_a_fetch_found_is_told_once() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let (first, second) = (Node::new(&s3), Node::new(&s3));
    let (a, b) = (first.open().await, second.open().await);
    let (bytes, id) = put_image(&a, 1, 300_000).await;
    assert!(a.take_found(&id).is_none(), "an upload was entered");
    flip(&s3.object(&key(&id)), 250_000);
    get(&b, &id).await.unwrap_err();
    assert!(!b.take_found(&id).unwrap().whole);
    get(&b, &id).await.unwrap_err();
    assert!(b.take_found(&id).is_none(), "it did not look again");
    put(&b, &bytes).await.unwrap();
    b.drop_cached(&id).await.unwrap();
    let before = tokio::time::Instant::now();
    served(&b, &id).await;
    let found = b.take_found(&id).unwrap();
    assert!(found.whole && found.since >= before);
    b.keep_found(&id, found);
    assert!(b.take_found(&id).unwrap().whole, "it could not be noted");
    served(&b, &id).await;
    assert!(b.take_found(&id).is_none(), "it was not fetched");
}

#[tokio::test]
async fn what_was_found_damaged_while_it_was_read_is_looked_at_before_it_is_read_again() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (bytes, id) = put_image(&store, 1, 200_000).await;
    let held = get(&store, &id).await.unwrap().unwrap();
    let cached = File::options().write(true).open(node.cached(&id)).unwrap();
    cached.set_len(100).unwrap();
    held.content.slice(0..200_000).unwrap_err();
    // As long as before, like a file on a disk that could not read it a moment ago.
    cached.set_len(200_000).unwrap();
    assert!(served(&store, &id).await == bytes);
    assert_eq!(fetches(&s3, &id), 1);
}

#[tokio::test]
async fn what_is_gone_in_the_middle_is_not_taken_for_a_bucket_that_is() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    // As where somebody cleared unfinished uploads away.
    let (content, id) = image(1, 14 * MIB);
    s3.spoil("partNumber=2", Fault::Status(404), ALWAYS);
    let error = put(&store, &content).await.unwrap_err();
    assert!(matches!(error, StoreError::Faulty { .. }), "{error:?}");
    s3.spoil("", Fault::Cut(0), 0);
    let FilesPlace::S3(place) = node.place() else {
        panic!("a bucket is configured");
    };
    let bucket = Bucket::open(&place).unwrap();
    let rest = |offset| bucket.get_rest(&id, offset, content.len() as u64);
    assert!(rest(1_000).await.unwrap().is_none());
    assert_eq!(put(&store, &content).await.unwrap(), id);
    assert!(rest(1_000).await.unwrap().is_some());
    s3.spoil("", Fault::Status(404), ALWAYS);
    let error = rest(1_000).await.map(drop).unwrap_err();
    assert!(matches!(error, StoreError::NoBucket { .. }), "{error:?}");
}

#[tokio::test]
async fn whoever_hangs_up_on_the_way_to_the_bucket_leaves_no_parts_there() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let node = Node::new(&s3);
    let store = node.open().await;
    let (bytes, id, upload) = held_at_its_second_part(&s3, &store);
    let finishing = {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .finish(upload, &CancellationToken::new())
                .await
                .map(drop)
        })
    };
    let s3 = saw(s3, "partNumber=2").await;
    finishing.abort();
    assert!(finishing.await.unwrap_err().is_cancelled());
    s3.release();
    let s3 = saw(s3, "DELETE").await;
    let deleted = s3.requests();
    let deleted = deleted
        .iter()
        .find(|line| line.starts_with("DELETE"))
        .unwrap();
    assert!(deleted.contains("uploadId="), "{deleted}");
    assert_eq!(store.size(&id).await.unwrap(), None);
    assert_eq!(put(&store, &bytes).await.unwrap(), id);
}
