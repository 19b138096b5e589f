//! Backups: taken from a running server, restored into a fresh one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use fwpush_tests::{agent::Device, site::Site, wait::until};

use super::{expect_failure, running_device};

fn back_up(site: &Site) -> PathBuf {
    let file = site.temp().join("backup.tar");
    site.fwpush(&["backup", file.to_str().unwrap()]).ok();
    file
}

/// The server's machine is lost: what is left of it is what was kept apart, `pki/`, and what the operator has.
fn lose_the_server(site: &mut Site) {
    site.kill_server();
    let (server, lost) = (site.dir().join("server"), site.dir().join("lost"));
    fs::rename(&server, &lost).unwrap();
    fs::create_dir_all(server.join("pki")).unwrap();
    fs::copy(lost.join("fwpush.toml"), server.join("fwpush.toml")).unwrap();
    for file in fs::read_dir(lost.join("pki")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), server.join("pki").join(file.file_name())).unwrap();
    }
    fs::remove_dir_all(lost).unwrap();
}

fn generation(site: &Site) -> u64 {
    site.device("dev-1")["device"]["desired_generation"]
        .as_u64()
        .unwrap()
}

#[test]
fn a_restored_server_goes_on_with_devices_that_know_more_than_it_does() {
    let mut site = Site::started();
    let mut device: Device = running_device(&site, "dev-1");
    let first = site.image("first.img", 100_000, 1);
    site.release(&first, "1.1.0").ok();
    let (archive, then) = (back_up(&site), generation(&site));
    // After the backup: two releases more, of which the restored server knows nothing.
    site.release(&site.image("second.img", 110_000, 2), "1.2.0")
        .ok();
    site.release(&site.image("third.img", 120_000, 3), "1.3.0")
        .ok();
    assert!(generation(&site) > then);

    lose_the_server(&mut site);
    let from = device.agent().lines().len();
    let restored = site.fwpush(&["restore", archive.to_str().unwrap()]).ok();
    assert!(restored.stdout.contains("1 image"), "{restored:?}");
    assert!(
        !restored.stdout.contains("before-restore"),
        "there was nothing to be kept: {restored:?}"
    );
    site.start();
    device.agent().line_after(from, "Registered.");
    let shown = site.device("dev-1");
    assert_eq!(shown["device"]["current"]["version"], "1.3.0", "{shown}");
    assert_eq!(
        device.status()["version"],
        "1.3.0",
        "nothing older is forced on the device"
    );

    // The device takes orders again, though the server's own count was behind the device's.
    site.release(&site.image("fourth.img", 130_000, 4), "1.4.0")
        .ok();
    assert_eq!(device.status()["version"], "1.4.0");
    // What was restored can be released: the image is there and whole.
    let list = site.fwpush(&["release", "list", "--json"]).ok().json();
    let versions: Vec<&str> = list["releases"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|release| release["version"].as_str())
        .collect();
    assert!(
        versions.contains(&"1.1.0") && !versions.contains(&"1.2.0"),
        "{versions:?}"
    );
    let old = list["releases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|release| release["version"] == "1.1.0")
        .unwrap();
    let id = old["release_id"].as_str().unwrap();
    let back = [
        "rollout",
        "start",
        "--release",
        id,
        "--to",
        "all",
        "--rollback",
        "--yes",
    ];
    site.fwpush(&back).ok();
    assert_eq!(device.status()["version"], "1.1.0");
    let status = device.status();
    let slot = device.slot(status["slot"].as_str().unwrap());
    assert!(
        slot.starts_with(&fs::read(first).unwrap()),
        "the restored image is another"
    );
}

#[tokio::test]
async fn what_a_restored_server_releases_is_news_to_a_device_that_was_away() {
    let mut site = Site::started();
    let mut device: Device = running_device(&site, "dev-1");
    site.release(&site.image("first.img", 100_000, 1), "1.1.0")
        .ok();
    let archive = back_up(&site);
    for (version, seed) in [("1.2.0", 2), ("1.3.0", 3), ("1.4.0", 4)] {
        let image = site.image(version, 100_000 + seed as usize, seed);
        site.release(&image, version).ok();
    }
    let seen = generation(&site);
    device.kill();

    lose_the_server(&mut site);
    site.fwpush(&["restore", archive.to_str().unwrap()]).ok();
    site.start();
    // Rollouts while the device is away: the server's count from the backup on would meet the one that the device knows.
    let mut newest = PathBuf::new();
    for (version, seed) in [("2.0.0", 5), ("2.1.0", 6), ("2.2.0", 7)] {
        newest = site.image(version, 100_000 + seed as usize, seed);
        site.release_with(&newest, version, &["--detach"]).ok();
        if generation(&site) == seen {
            break;
        }
    }
    device.start();
    let version = newest.file_name().unwrap().to_str().unwrap();
    until("the newest release on the device", async || {
        let shown = site.device("dev-1");
        if shown["device"]["current"]["version"] == version {
            return Ok(());
        }
        Err(shown)
    })
    .await;
    let status = device.status();
    let slot = device.slot(status["slot"].as_str().unwrap());
    assert!(slot.starts_with(&fs::read(newest).unwrap()));
}

/// Every file below a directory.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for path in fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

#[test]
fn restore_leaves_a_running_server_and_an_existing_database_alone() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let archive = back_up(&site);
    let archive = archive.to_str().unwrap();
    site.add_device("dev-2");
    for force in [&[][..], &["--force"]] {
        let refused = site.fwpush(&[&["restore", archive][..], force].concat());
        expect_failure(&refused, "another server runs");
        assert!(
            refused.stderr.contains("Stop `fwpush serve`"),
            "{refused:?}"
        );
    }
    site.device("dev-2");
    site.stop_server();
    let refused = site.fwpush(&["restore", archive]);
    expect_failure(&refused, "there is a database already");
    assert!(refused.stderr.contains("--force"), "{refused:?}");
    site.start();
    site.device("dev-2");
    site.stop_server();
    let forced = site.fwpush(&["restore", archive, "--force"]).ok();
    assert!(
        forced.stdout.contains("before-restore"),
        "the old one is kept: {forced:?}"
    );
    site.start();
    site.device("dev-1");
    assert_eq!(site.fwpush(&["device", "show", "dev-2"]).code, 1);
    // A backup is never overwritten.
    assert_eq!(site.fwpush(&["backup", archive]).code, 2);
}

/// The archive with one entry more, of a name and kind that the library would not write.
fn with_entry(archive: &[u8], name: &str, kind: tar::EntryType, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o600);
    if kind.is_symlink() {
        header.set_link_name("/etc/passwd").unwrap();
    }
    header.set_cksum();
    let mut forged = tar::Builder::new(Vec::new());
    forged.append(&header, content).unwrap();
    let mut bytes = forged.get_ref().clone();
    bytes.extend_from_slice(archive);
    bytes
}

#[test]
fn an_archive_with_anything_foreign_in_it_changes_nothing() {
    let mut site = Site::started();
    site.publish(
        &site.image("fw.img", 100_000, 1),
        fwpush_tests::site::PRODUCT,
        "1.1.0",
    );
    let archive = fs::read(back_up(&site)).unwrap();
    lose_the_server(&mut site);
    let image = format!("files/00/{}", "0".repeat(64));
    let regular = tar::EntryType::Regular;
    let mut flipped = archive.clone();
    let byte = in_the_image(&archive);
    flipped[byte] ^= 1;
    let cases = [
        (
            "upwards",
            with_entry(&archive, "../../evil", regular, b"x"),
            "evil",
        ),
        (
            "absolute",
            with_entry(&archive, "/tmp/fwpush-evil", regular, b"x"),
            "evil",
        ),
        (
            "in files",
            with_entry(&archive, "files/../../evil", regular, b"x"),
            "evil",
        ),
        (
            "a key",
            with_entry(&archive, "pki/node.key", regular, b"x"),
            "node.key",
        ),
        (
            "a link",
            with_entry(&archive, &image, tar::EntryType::Symlink, b""),
            "no regular file",
        ),
        (
            "a second database",
            with_entry(&archive, "fwpush.db", regular, b"SQLite format 3\0"),
            "2 databases",
        ),
        (
            "cut",
            archive[..archive.len() / 2 / 512 * 512].to_vec(),
            "no whole tar archive",
        ),
        ("garbage", vec![7; 4096], "no whole tar archive"),
    ];
    let before = files(&site.dir().join("server"));
    let path = site.temp().join("forged.tar");
    for (what, forged, why) in cases {
        fs::write(&path, forged).unwrap();
        let done = site.fwpush(&["restore", path.to_str().unwrap()]);
        assert_eq!(done.code, 1, "{what}: {done:?}");
        assert!(done.stderr.contains(why), "{what}: {done:?}");
        let mut after = files(&site.dir().join("server"));
        after.retain(|path, _| !path.ends_with("fwpush.lock"));
        assert!(after == before, "{what}: {:?}", after.keys());
        assert!(!site.temp().join("evil").exists() && !site.dir().join("evil").exists());
    }
    // An image that is not what its name says never gets into the store; the database stays away too.
    fs::write(&path, &flipped).unwrap();
    let done = site.fwpush(&["restore", path.to_str().unwrap()]);
    assert_eq!(done.code, 1, "{done:?}");
    assert!(!site.dir().join("server/data/fwpush.db").exists());
    // The honest archive still works.
    fs::write(&path, &archive).unwrap();
    site.fwpush(&["restore", path.to_str().unwrap()]).ok();
}

/// Somewhere in the image within the archive.
fn in_the_image(archive: &[u8]) -> usize {
    let image = fwpush_tests::site::random_bytes(100_000, 1);
    let start = archive
        .windows(64)
        .position(|part| part == &image[..64])
        .expect("the image is in the backup");
    start + 50_000
}
