//! A server whose images are in a bucket: a real S3 server, which checks signatures, goes away, and has its objects tampered with.

use std::{fs, path::Path};

use fwpush_proto::v1::{FileChunk, FileRequest};
use fwpush_services::s3::{BUCKET, S3, S3Options, SECRET_KEY};
use fwpush_tests::{
    client::download,
    process::Process,
    site::{PRODUCT, Published, Site, in_bucket},
    wait::{LONG, until},
};
use tonic::{Code, Status};

use crate::fleet::{all_online, fleet, version};

const MIB: usize = 1 << 20;

/// A site whose images are in the bucket of a server of its own; not started.
fn site() -> (S3, Site) {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let site = Site::new();
    fs::write(site.dir().join("server/s3.secret"), SECRET_KEY).unwrap();
    site.edit_config(|config| {
        config.insert("files".into(), in_bucket(&s3, "s3.secret"));
    });
    (s3, site)
}

fn key(file: &str) -> String {
    format!("{}/{file}", &file[..2])
}

/// Stops the server, takes what it cached, and starts it again.
fn restart_without_cache(site: &mut Site, file: &str) {
    site.stop_server();
    fs::remove_file(site.dir().join("server/data/cache").join(key(file))).unwrap();
    site.start();
}

fn fetches(s3: &S3, file: &str) -> usize {
    let line = format!("GET /{BUCKET}/{}", key(file));
    s3.requests().iter().filter(|seen| **seen == line).count()
}

async fn fetch(site: &Site, device: &str, file: &str) -> Result<Vec<u8>, Status> {
    let request = FileRequest {
        file_id: file.to_owned(),
        ..FileRequest::default()
    };
    let chunks: Vec<FileChunk> = download(site.connect(device).await, request).await?;
    Ok(chunks
        .iter()
        .flat_map(|chunk| chunk.content.to_vec())
        .collect())
}

async fn fetch_at_last(site: &Site, device: &str, file: &str) -> Vec<u8> {
    until("the image to be served", || async {
        match fetch(site, device, file).await {
            Ok(bytes) => Ok(bytes),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                Err(status)
            }
        }
    })
    .await
}

fn publish_args<'a>(manifest: &'a str, image: &'a str) -> [&'a str; 5] {
    ["release", "publish", manifest, "--image", image]
}

/// What `fwpush files list` says of a file.
fn listed(site: &Site, file: &str) -> serde_json::Value {
    let list = site.fwpush(&["files", "list", "--json"]).ok().json();
    let files = list["files"].as_array().unwrap();
    let found = files.iter().find(|listed| listed["file_id"] == file);
    found.cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_updates_from_a_bucket_that_is_asked_once() {
    let (s3, mut site) = site();
    site.start();
    let image = site.image("1.1.0.img", 3 * MIB, 1);
    let Published {
        release_id,
        file_id,
    } = site.publish(&image, PRODUCT, "1.1.0");
    assert_eq!(
        s3.keys().unwrap(),
        [key(&file_id), format!("{}.outline", key(&file_id))]
    );
    restart_without_cache(&mut site, &file_id);
    let fleet = fleet(&site, "s3-", 100, |_| {});
    all_online(&fleet).await;
    site.fwpush(&[
        "rollout",
        "start",
        "--release",
        &release_id,
        "--to",
        "all",
        "--yes",
        "--detach",
    ])
    .ok();
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!(outcomes.as_expected, 100, "{:?}", outcomes.unexpected);
    assert_eq!(fetches(&s3, &file_id), 1);
    site.stop_server();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_bucket_is_away_cached_images_are_served_and_others_wait() {
    let (s3, mut site) = site();
    site.start();
    site.add_device("gw-1");
    let (first, second) = (
        site.image("a.img", 300_000, 1),
        site.image("b.img", 300_000, 2),
    );
    let cached = site.publish(&first, PRODUCT, "1.1.0").file_id;
    let wanted = site.publish(&second, PRODUCT, "1.2.0").file_id;
    restart_without_cache(&mut site, &wanted);
    s3.stop();
    site.server().line_with("The image store is away");
    assert!(site.metrics_text().contains("fwpush_files_up 0"));
    assert!(site.get("/readyz").0.contains("200"), "there is other work");
    let status = site.fwpush(&["cluster", "status", "--json"]);
    assert_eq!(status.code, 1, "something is away");
    let status = status.json();
    let engines = status["engines"].as_array().unwrap();
    let files = engines.iter().find(|engine| engine["name"] == "files");
    assert_eq!(files.unwrap()["up"], false, "{status}");
    assert!(fetch(&site, "gw-1", &cached).await.unwrap() == fs::read(&first).unwrap());
    let refused = fetch(&site, "gw-1", &wanted).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(
        refused.metadata().contains_key("retry-after-ms"),
        "{refused:?}"
    );
    s3.resume().unwrap();
    site.server().line_with("The image store is back");
    assert!(fetch_at_last(&site, "gw-1", &wanted).await == fs::read(&second).unwrap());
    assert!(site.metrics_text().contains("fwpush_files_up 1"));
    let log = site.server().lines().join("\n");
    assert!(!log.contains(SECRET_KEY));
    site.stop_server();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_is_never_served_and_publishing_again_mends_it() {
    let (s3, mut site) = site();
    site.start();
    site.add_device("gw-1");
    let image = site.image("a.img", 300_000, 1);
    let file = site.publish(&image, PRODUCT, "1.1.0").file_id;
    assert_eq!(listed(&site, &file)["state"], "stored");
    let object = s3.object(&key(&file));
    let mut bytes = fs::read(&object).unwrap();
    bytes[299_000] ^= 1;
    fs::write(&object, bytes).unwrap();
    restart_without_cache(&mut site, &file);
    for _ in 0..2 {
        let refused = fetch(&site, "gw-1", &file).await.unwrap_err();
        assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    }
    let line = site
        .server()
        .line_with("is something else, and is not served");
    assert!(line.contains(&file), "{line}");
    // Once more, since the way there may be at fault.
    assert_eq!(fetches(&s3, &file), 2, "not again and again");
    assert_eq!(listed(&site, &file)["state"], "damaged");
    // Put right by hand: the next fetch finds that out, and is not made at once.
    fs::copy(&image, &object).unwrap();
    site.stop_server();
    site.start();
    assert_eq!(listed(&site, &file)["state"], "damaged");
    assert!(fetch(&site, "gw-1", &file).await.unwrap() == fs::read(&image).unwrap());
    assert_eq!(listed(&site, &file)["state"], "stored");
    let manifest = site.temp().join(format!("{PRODUCT}-1.1.0.json"));
    let publish_again = |site: &Site| {
        let (manifest, image) = (manifest.to_str().unwrap(), image.to_str().unwrap());
        site.fwpush(&publish_args(manifest, image)).ok();
    };
    // Cut short by a byte, which its outline does not show.
    let cut = fs::File::options().write(true).open(&object).unwrap();
    cut.set_len(299_999).unwrap();
    publish_again(&site);
    assert!(fs::read(&object).unwrap() == fs::read(&image).unwrap());
    assert_eq!(listed(&site, &file)["size"], 300_000);
    // And noted, so that it does not matter what it looks like.
    fs::write(&object, vec![0; 300_000]).unwrap();
    restart_without_cache(&mut site, &file);
    fetch(&site, "gw-1", &file).await.unwrap_err();
    assert_eq!(listed(&site, &file)["state"], "damaged");
    publish_again(&site);
    assert_eq!(listed(&site, &file)["state"], "stored");
    assert!(fetch(&site, "gw-1", &file).await.unwrap() == fs::read(&image).unwrap());
    restart_without_cache(&mut site, &file);
    assert!(fetch(&site, "gw-1", &file).await.unwrap() == fs::read(&image).unwrap());
    site.stop_server();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_on_its_way_to_the_bucket_leaves_nothing_to_serve_and_the_command_ends_well()
 {
    let (s3, mut site) = site();
    site.start();
    site.add_device("gw-1");
    let image = site.image("a.img", 20 * MIB, 1);
    let manifest = site.temp().join("manifest.json");
    let (image_arg, manifest) = (image.to_str().unwrap(), manifest.to_str().unwrap());
    let build = [
        "release",
        "build",
        image_arg,
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
    ];
    site.fwpush(
        &[
            &build[..],
            &["--hw", fwpush_tests::site::HW, "--out", manifest],
        ]
        .concat(),
    )
    .ok();
    site.fwpush(&["release", "sign", manifest]).ok();
    s3.hold("partNumber=2");
    let mut publishing = Process::spawn(site.fwpush_raw(&publish_args(manifest, image_arg)));
    let s3 = tokio::task::spawn_blocking(move || {
        assert!(s3.saw("partNumber=2", LONG));
        s3
    })
    .await
    .unwrap();
    site.kill_server();
    let content = |s3: &S3| {
        let keys = s3.keys().unwrap();
        keys.into_iter()
            .filter(|key| !key.ends_with(".outline"))
            .count()
    };
    assert_eq!(content(&s3), 0);
    s3.release();
    site.start();
    assert!(
        publishing.wait().success(),
        "{}",
        publishing.lines().join("\n")
    );
    assert_eq!(content(&s3), 1);
    let released = site.fwpush(&["release", "list", "--json"]).ok().json();
    let file = released["releases"][0]["file_id"]
        .as_str()
        .unwrap()
        .to_owned();
    restart_without_cache(&mut site, &file);
    assert!(fetch_at_last(&site, "gw-1", &file).await == fs::read(&image).unwrap());
    site.stop_server();
}

#[test]
fn a_wrong_secret_ends_the_start_with_words_that_say_where_to_look() {
    let (_s3, site) = site();
    fs::write(site.dir().join("server/s3.secret"), "guessed-by-somebody").unwrap();
    let mut server = Process::spawn(site.serve_command());
    assert!(!server.wait().success());
    let said = server.all_lines().join("\n");
    assert!(said.contains("files.secret_key_file"), "{said}");
    assert!(!said.contains("guessed-by-somebody"), "{said}");
}

#[test]
fn unused_images_are_listed_and_marked_and_a_release_takes_the_mark_away() {
    let (s3, mut site) = site();
    site.start();
    let (named, stray) = (
        site.image("a.img", 100_000, 1),
        site.image("b.img", 100_000, 2),
    );
    let named = site.publish(&named, PRODUCT, "1.1.0").file_id;
    // Its version is taken: it is uploaded, and not published.
    let manifest = site.temp().join("stray.json");
    let (stray, manifest) = (stray.to_str().unwrap(), manifest.to_str().unwrap());
    let build = [
        "release",
        "build",
        stray,
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
    ];
    site.fwpush(
        &[
            &build[..],
            &["--hw", fwpush_tests::site::HW, "--out", manifest],
        ]
        .concat(),
    )
    .ok();
    site.fwpush(&["release", "sign", manifest]).ok();
    assert_eq!(site.fwpush(&publish_args(manifest, stray)).code, 1);
    let gc = |more: &[&str]| {
        let args = [&["files", "gc", "--json"], more].concat();
        site.fwpush(&args).ok().json()
    };
    let dry = gc(&["--dry-run"]);
    let unused = dry["unused"].as_array().unwrap();
    assert_eq!(
        (unused.len(), &unused[0]["state"]),
        (1, &"stored".into()),
        "{dry}"
    );
    let id = unused[0]["file_id"].as_str().unwrap().to_owned();
    assert_ne!(id, named);
    let done = gc(&[]);
    assert_eq!(done["removed"].as_array().map(Vec::len), Some(0), "{done}");
    assert_eq!(done["unused"][0]["state"], "marked", "{done}");
    assert_eq!(listed(&site, &named)["state"], "stored");
    assert!(site.fwpush(&["files", "gc"]).ok().stdout.contains(&id));
    assert!(
        site.fwpush(&["files", "list"])
            .ok()
            .stdout
            .contains("marked")
    );
    site.publish(Path::new(stray), PRODUCT, "1.2.0");
    assert_eq!(listed(&site, &id)["state"], "stored");
    assert_eq!(gc(&[])["unused"], serde_json::json!([]));
    assert_eq!(s3.keys().unwrap().len(), 4);
    let backup = site.temp().join("fw.tar");
    let made = site
        .fwpush(&["backup", backup.to_str().unwrap(), "--json"])
        .ok()
        .json();
    assert!(
        made["without"].as_str().unwrap().contains("bucket"),
        "{made}"
    );
    site.stop_server();
}
