//! Releases and their files.

use fwpush_keys::id::FileId;

use crate::{
    db::{
        Published, ReleaseRow,
        testing::{Bench, release},
    },
    limits,
};

on_each_engine!(
    publishing_refuses_a_reused_id_seq_or_version_and_older_ones,
    a_release_comes_back_as_it_was_published,
    a_file_belongs_to_the_products_whose_releases_name_it,
);

async fn publishing_refuses_a_reused_id_seq_or_version_and_older_ones(bench: Bench) {
    let file = FileId::of(b"image");
    let now = bench.db.now();
    let publish = async |row: &ReleaseRow| {
        bench
            .db
            .insert_release(row, &[row.file_id], "tester")
            .await
            .unwrap()
    };
    let first = release("1.1.0", 10, file, now);
    assert!(matches!(publish(&first).await, Published::FileMissing(missing) if missing == file));
    bench.db.add_file(&file, 5).await.unwrap();
    bench.db.add_file(&file, 5).await.unwrap();
    assert_eq!(bench.db.file(&file).await.unwrap().unwrap().size, 5);
    assert!(
        bench
            .db
            .file(&FileId::of(b"other"))
            .await
            .unwrap()
            .is_none()
    );
    assert!(matches!(publish(&first).await, Published::New));
    let Published::Same(again) = publish(&first).await else {
        panic!("published twice")
    };
    assert_eq!(again.release_id, first.release_id);
    let same_id = ReleaseRow {
        release_id: first.release_id,
        ..release("1.2.0", 11, file, now)
    };
    assert!(matches!(publish(&same_id).await, Published::IdTaken));
    assert!(
        matches!(publish(&release("1.2.0", 10, file, now)).await, Published::SeqTaken(id) if id == first.release_id)
    );
    assert!(
        matches!(publish(&release("1.1.0", 11, file, now)).await, Published::VersionTaken(id) if id == first.release_id)
    );
    assert!(matches!(
        publish(&release("1.0.9", 9, file, now)).await,
        Published::SeqOlder { newest: 10 }
    ));
    let beta = ReleaseRow {
        channel: "beta".parse().unwrap(),
        ..release("1.1.0", 10, file, now)
    };
    assert!(
        matches!(publish(&beta).await, Published::New),
        "another channel has its own order"
    );
    let listed = bench.db.list_releases(Some(&first.product)).await.unwrap();
    assert_eq!(listed.len(), 2);
    assert!(
        bench
            .db
            .list_releases(Some(&"other".parse().unwrap()))
            .await
            .unwrap()
            .is_empty()
    );
}

async fn a_release_comes_back_as_it_was_published(mut bench: Bench) {
    let special = |row: &mut ReleaseRow| {
        (row.from_min, row.min_agent) = (
            Some("1.0.0".parse().unwrap()),
            Some("0.9.1-rc.1+b2".parse().unwrap()),
        );
        row.envelope = (0..=255).collect::<Vec<u8>>().into();
        row.security_counter = limits::NUMBER;
    };
    let held = bench.publish_with("2.0.0-rc.1+build.7", special).await;
    bench.restart().await;
    let read = bench.db.release(&held.release_id).await.unwrap().unwrap();
    assert_eq!(format!("{read:?}"), format!("{held:?}"));
    assert_eq!(read.security_counter, limits::NUMBER);
}

async fn a_file_belongs_to_the_products_whose_releases_name_it(mut bench: Bench) {
    let first = bench.publish("1.0.0").await;
    let file = first.file_id;
    let sensor: fwpush_keys::id::Product = "sensor".parse().unwrap();
    let shared = ReleaseRow {
        product: sensor.clone(),
        ..release("9.0.0", 1, file, bench.db.now())
    };
    bench
        .db
        .insert_release(&shared, &[file], "tester")
        .await
        .unwrap();
    assert!(
        bench
            .db
            .named_file(&FileId::of(b"nobody's"))
            .await
            .unwrap()
            .is_none()
    );
    let whose = async || {
        let named = bench.db.named_file(&file).await.unwrap().unwrap();
        assert_eq!(
            named.size,
            bench.db.file(&file).await.unwrap().unwrap().size
        );
        let mut whose = named.products;
        whose.sort();
        whose
    };
    assert_eq!(
        whose().await,
        [(first.product.clone(), false), (sensor.clone(), false)]
    );
    bench
        .db
        .set_revoked(&sensor, &[shared.release_id, first.release_id], "tester")
        .await
        .unwrap();
    assert_eq!(
        whose().await,
        [(first.product.clone(), false), (sensor.clone(), true)]
    );
    assert!(
        bench
            .db
            .release(&shared.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked
    );
    assert!(
        !bench
            .db
            .release(&first.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked,
        "a list binds its own product only"
    );
    bench.db.set_revoked(&sensor, &[], "tester").await.unwrap();
    assert!(
        !bench
            .db
            .release(&shared.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked
    );
}
