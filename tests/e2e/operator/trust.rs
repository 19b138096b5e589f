//! Keys that come and go, and releases that are taken back.

use fwpush_tests::{
    agent::{Device, SLOT_BYTES},
    site::{PRODUCT, Site},
    wait::until,
};

use super::{expect_failure, running_device, text};

/// Moves releases from `release-1.key` to a new key; gives the root document's file.
fn replace_release_key(site: &Site) {
    let show = site.fwpush(&["keys", "show", "--json"]).ok().json();
    let old = show["root"]["roles"]["release"]["keyids"][0]
        .as_str()
        .unwrap()
        .to_owned();
    let made = site
        .fwpush(&["keys", "new-release-key", "--json"])
        .ok()
        .json();
    let public = text(&made, "public_file");
    let root = site.temp().join("2.root.json");
    let root = root.to_str().unwrap();
    let change = [
        "--add-release-key",
        public,
        "--remove-release-key",
        &old,
        "--out",
        root,
    ];
    site.fwpush(&[&["keys", "rotate-root"][..], &change].concat())
        .ok();
    site.fwpush(&["keys", "verify", root]).ok();
    site.fwpush(&["keys", "publish", root]).ok();
}

#[test]
fn after_a_rotation_the_new_key_counts_on_devices_and_the_removed_one_no_more() {
    let site = Site::started();
    let mut device = running_device(&site, "dev-1");
    let old_image = site.image("old.img", 50_000, 1);
    // Signed by the key that is about to go, published, and rolled out only after it has gone.
    let old = site.publish(&old_image, PRODUCT, "1.1.0");
    replace_release_key(&site);
    device.agent().line_with("root_version=2");

    let image = site.image("new.img", 60_000, 2);
    let old_key = site.dir().join("offline/release-1.key");
    let by_old_key = site.release_with(&image, "1.2.0", &["--key", old_key.to_str().unwrap()]);
    expect_failure(&by_old_key, "signature");
    let refused = site.fwpush(&[
        "rollout",
        "start",
        "--release",
        &old.release_id,
        "--to",
        "all",
        "--yes",
    ]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert_eq!(device.status()["version"], "1.0.0");
    assert_eq!(
        device.status()["groups_written"],
        0,
        "not a byte of it was taken"
    );

    // The new key is found among those in offline/ by what the root lists.
    site.release(&image, "1.2.0").ok();
    assert_eq!(device.status()["version"], "1.2.0");
    assert_eq!(
        site.device("dev-1")["device"]["current"]["version"],
        "1.2.0"
    );
}

#[test]
fn a_root_that_lacks_signatures_is_written_but_neither_published_nor_verified() {
    let site = Site::started();
    let root = site.temp().join("2.root.json");
    let root = root.to_str().unwrap();
    let offline = site.dir().join("offline");
    let key = |name: &str| offline.join(name).to_str().unwrap().to_owned();
    let rotate = [
        "keys",
        "rotate-root",
        "--add-product",
        "meter",
        "--out",
        root,
        "--key",
        &key("root-1.key"),
    ];
    let done = site.fwpush(&rotate).ok();
    assert!(done.stderr.contains("cannot be published yet"), "{done:?}");
    assert_eq!(site.fwpush(&["keys", "verify", root]).code, 1);
    assert_eq!(site.fwpush(&["keys", "publish", root]).code, 1);
    let show = site.fwpush(&["keys", "show", "--json"]).ok().json();
    assert_eq!(show["server_root_version"], 1, "{show}");
    // Nor with a release key's help.
    site.fwpush(&["keys", "sign", root, "--key", &key("release-1.key")])
        .ok();
    assert_eq!(site.fwpush(&["keys", "publish", root]).code, 1);
    site.fwpush(&["keys", "sign", root, "--key", &key("root-3.key")])
        .ok();
    site.fwpush(&["keys", "publish", root]).ok();
    // Published again: the same.
    site.fwpush(&["keys", "publish", root]).ok();
    let show = site.fwpush(&["keys", "show", "--json"]).ok().json();
    assert_eq!(show["server_root_version"], 2, "{show}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_release_stops_is_never_started_again_and_the_next_one_installs() {
    let site = Site::started();
    let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
    let image = site.image("bad.img", 50_000, 1);
    let released = site
        .release_with(&image, "1.1.0", &["--detach", "--json"])
        .ok()
        .json();
    let (release, rollout) = (text(&released, "release_id"), text(&released, "rollout_id"));
    let list = site.temp().join("gateway.revocation.json");
    let named = format!("{release}=it bricks devices");
    let revoke = [
        "keys",
        "revoke",
        "--product",
        PRODUCT,
        "--release",
        &named,
        "--out",
        list.to_str().unwrap(),
    ];
    site.fwpush(&[&revoke[..], &["--publish"]].concat()).ok();

    until("the rollout to stop", async || {
        let shown = site
            .fwpush(&["rollout", "show", rollout, "--json"])
            .ok()
            .json();
        if shown["state"] == "ACTIVE" {
            Err(shown)
        } else {
            Ok(())
        }
    })
    .await;
    let again = site.fwpush(&[
        "rollout",
        "start",
        "--release",
        release,
        "--to",
        "all",
        "--yes",
    ]);
    expect_failure(&again, "revoked");
    assert_eq!(device.once().code, 0);
    assert_eq!(device.status()["version"], "1.0.0");
    assert_eq!(device.status()["groups_written"], 0);

    // The next release asks for that list, and the device has it.
    device.start().line_with("Registered.");
    site.release(&site.image("good.img", 60_000, 2), "1.2.0")
        .ok();
    assert_eq!(device.status()["version"], "1.2.0");

    // A lowest counter bars what lies below it.
    let list = site.temp().join("second.json");
    let raise = [
        "keys",
        "revoke",
        "--product",
        PRODUCT,
        "--min-security-counter",
        "3",
        "--publish",
        "--out",
    ];
    site.fwpush(&[&raise[..], &[list.to_str().unwrap()]].concat())
        .ok();
    let image = site.image("third.img", 70_000, 3);
    expect_failure(
        &site.release_with(&image, "1.3.0", &["--security-counter", "2"]),
        "counter",
    );
    site.release_with(&image, "1.3.0", &["--security-counter", "3"])
        .ok();
    assert_eq!(device.status()["floor"], 3);
}
