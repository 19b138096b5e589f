//! Bundles: a release carried to a device on a stick, installed under the same checks as from a server.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fwpush_keys::{
    Release,
    bundle::{self, Contents},
    outline::outline_of,
};
use fwpush_tests::{
    agent::{Device, SLOT_BYTES, filler, table},
    offline::{COUNTER, Offline},
    process::{Finished, Process},
    site::{PRODUCT, Site},
    wait::LONG,
};
use rustix::process::Signal;
use serde_json::{Value, json};

mod kills;
mod refused;

/// Some groups and a bit of one.
const IMAGE_BYTES: usize = 300_000;

/// A device whose agent does not run, its site, and the offline keys.
struct Bench {
    site: Site,
    device: Device,
    offline: Offline,
    image: Vec<u8>,
}

/// What a bundle is made of; anything of it may be wrong.
#[derive(Clone)]
struct Made {
    roots: Vec<Bytes>,
    list: Option<Bytes>,
    release: Bytes,
    image: Vec<u8>,
}

impl Bench {
    /// A device that has no health check.
    fn new() -> Self {
        let site = Site::started();
        let device = Device::add(&site, "dev-1", SLOT_BYTES);
        device.configure(|config| {
            table(config, "running").insert("security_counter".into(), (COUNTER as i64).into());
        });
        // Its first boot: there is a record, and the server knows it.
        assert_eq!(device.once().code, 0);
        let offline = Offline::of(&site);
        let image = filler("an image", IMAGE_BYTES);
        Self {
            site,
            device,
            offline,
            image,
        }
    }

    /// One whose health check says this.
    fn with_check(exit_code: i32) -> Self {
        let bench = Self::new();
        let command = [
            "sh".to_owned(),
            "-c".to_owned(),
            format!("exit {exit_code}"),
        ];
        bench.device.configure(|config| {
            let command = command.map(toml::Value::from).to_vec();
            table(config, "health").insert("command".into(), command.into());
        });
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.temp().join(name)
    }

    /// A release of the image that the device accepts.
    fn release(&self, version: &str) -> Release {
        self.offline.release(&self.image, version)
    }

    /// A bundle with nothing but a release.
    fn made(&self, release: &Release) -> Made {
        Made {
            roots: Vec::new(),
            list: None,
            release: self.offline.sign(release),
            image: self.image.clone(),
        }
    }

    /// A bundle that the device accepts.
    fn good(&self, name: &str, version: &str) -> PathBuf {
        let path = self.path(name);
        self.made(&self.release(version)).write(&path);
        path
    }

    fn fwpush(&self, args: &[&str]) -> Finished {
        self.site.fwpush(args)
    }

    #[track_caller]
    fn expect_running(&self, version: &str, slot: &str, confirmed: bool) {
        let status = self.device.status();
        let got = (&status["version"], &status["slot"], &status["confirmed"]);
        assert_eq!(
            got,
            (&version.into(), &slot.into(), &confirmed.into()),
            "{status}"
        );
    }
}

impl Made {
    fn bytes(&self) -> Vec<u8> {
        let outline = outline_of(self.image.as_slice()).unwrap();
        let roots: Vec<Vec<u8>> = self.roots.iter().map(|root| root.to_vec()).collect();
        let contents = Contents {
            roots: &roots,
            revocation: self.list.as_deref(),
            release: &self.release,
            outline: &outline,
        };
        let mut out = Vec::new();
        bundle::write(&contents, self.image.as_slice(), &mut out, |_| ()).unwrap();
        out
    }

    fn write(&self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }
}

/// What an install said: exit code, outcome, code.
#[track_caller]
fn verdict(finished: &Finished) -> (i32, Value, Value) {
    let said = finished.json();
    assert_eq!(said["exit_code"], finished.code, "{said}");
    (finished.code, said["outcome"].clone(), said["code"].clone())
}

#[track_caller]
fn expect(finished: &Finished, code: i32, outcome: &str, why: Option<&str>) {
    let expected = (code, json!(outcome), json!(why));
    assert_eq!(
        verdict(finished),
        expected,
        "{}\n{}",
        finished.stdout,
        finished.stderr
    );
}

#[test]
fn a_published_release_is_carried_to_a_device_that_no_server_reaches() {
    let mut bench = Bench::with_check(0);
    let image = bench.path("gw.img");
    fs::write(&image, &bench.image).unwrap();
    // Published, and rolled out to nobody.
    let manifest = bench.path("gw.json");
    let [image, manifest] = [&image, &manifest].map(|path| path.to_str().unwrap().to_owned());
    let build = [
        "release",
        "build",
        &image,
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
    ];
    let more = [
        "--hw",
        "board-a",
        "--security-counter",
        "5",
        "--out",
        &manifest,
    ];
    bench.fwpush(&[&build[..], &more].concat()).ok();
    bench.fwpush(&["release", "sign", &manifest]).ok();
    let publish = ["release", "publish", &manifest, "--image", &image, "--json"];
    let published = bench.fwpush(&publish).ok().json();
    let id = published["release_id"].as_str().unwrap();

    // From the server, and from files alone: the same bundle.
    let made = bench
        .fwpush(&["release", "bundle", id, "--out", "one.fwb", "--json"])
        .ok()
        .json();
    bench.site.stop_server();
    let files = [
        "--manifest",
        &manifest,
        "--image",
        &image,
        "--out",
        "two.fwb",
        "--json",
    ];
    let other = bench
        .fwpush(&[&["release", "bundle"], &files[..]].concat())
        .ok()
        .json();
    let (one, two) = (bench.path("one.fwb"), bench.path("two.fwb"));
    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
    assert_eq!(made["bytes"], fs::metadata(&one).unwrap().len());
    assert_eq!(
        (&made["release_id"], &made["roots"]),
        (&published["release_id"], &json!([]))
    );
    assert_eq!(made["image"], other["image"]);

    // The stick is all that the device sees.
    let installed = bench.device.install(&one);
    expect(&installed, 10, "REBOOTING", None);
    let said = installed.json();
    assert_eq!(
        (&said["version"], &said["slot"]),
        (&json!("1.1.0"), &json!("b"))
    );
    bench.device.expect_image("b", &bench.image);
    bench.expect_running("1.1.0", "b", false);
    // After the reboot the same command judges it.
    expect(&bench.device.install(&one), 0, "SUCCEEDED", None);
    bench.expect_running("1.1.0", "b", true);
    assert_eq!(bench.device.status()["floor"], 5);

    // Once more it has nothing to do, and touches nothing.
    let storage = bench.device.storage();
    let status = bench.device.status();
    expect(&bench.device.install(&one), 0, "SUCCEEDED", None);
    assert!(bench.device.storage() == storage);
    assert_eq!(
        bench.device.status()["groups_written"],
        status["groups_written"]
    );
    assert_eq!(status["phase"], "SUCCEEDED");
    bench.device.expect_image("a", &[]);
}

/// The agent judges what was installed, as it does any image; and then the server knows what runs, and is not confused.
#[test]
fn afterwards_the_agent_connects_and_the_server_knows_what_runs() {
    let mut bench = Bench::new();
    // A release that the server has never seen.
    let bundle = bench.good("gw.fwb", "1.1.0");
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
    // Without a health check nobody but the agent can judge it.
    let early = bench.device.install(&bundle);
    expect(&early, 1, "REJECTED", Some("UNCONFIRMED"));
    bench.device.start().line_with("update.succeeded");
    let device = until(&bench, |device| {
        device["device"]["current"]["confirmed"] == true
    });
    assert_eq!(device["device"]["current"]["version"], "1.1.0", "{device}");
    assert_eq!(device["updates"], json!([]), "{device}");
    bench.device.kill();
    bench.expect_running("1.1.0", "b", true);

    // And the server's next release follows, as if nothing had been.
    let next = bench.site.image("next.img", 200_000, 7);
    bench.device.start().line_with("Registered.");
    bench
        .site
        .release_with(&next, "1.2.0", &["--security-counter", "5"])
        .ok();
    let device = until(&bench, |device| {
        device["device"]["current"]["version"] == "1.2.0"
    });
    assert_eq!(device["updates"][0]["phase"], "SUCCEEDED", "{device}");
}

/// What the server says of the device, once it says this.
fn until(bench: &Bench, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_for(|| {
        let device = bench.site.device("dev-1");
        wanted(&device).then_some(device)
    })
}

/// Waits until there is something.
fn wait_for<T>(look: impl Fn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LONG, "waited for {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_bad_image_is_left_again_and_no_server_is_told_of_an_update() {
    let mut bench = Bench::with_check(1);
    let bundle = bench.good("gw.fwb", "1.1.0");
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
    expect(
        &bench.device.install(&bundle),
        10,
        "FALLING_BACK",
        Some("HEALTH_CHECK"),
    );
    expect(
        &bench.device.install(&bundle),
        5,
        "ROLLED_BACK",
        Some("HEALTH_CHECK"),
    );
    bench.expect_running("1.0.0", "a", true);
    assert_eq!(bench.device.status()["error"]["code"], "HEALTH_CHECK");
    bench.device.start().line_with("Registered.");
    let device = until(&bench, |device| {
        device["device"]["current"]["version"] == "1.0.0"
    });
    assert_eq!(device["updates"], json!([]), "{device}");
    bench.device.kill();
    // Asked again, it tries again: with a better image in the same release it could not know.
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
}

/// Level-triggered: the server's open order stands, and is carried out when the agent is back.
#[test]
fn an_install_takes_the_place_of_a_servers_update_which_follows_it() {
    let mut bench = Bench::with_check(0);
    bench.device.configure(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("bandwidth_limit_bytes_per_s".into(), 200_000.into());
        transfer.insert("chunk_bytes".into(), 65_536.into());
    });
    let ordered = bench.site.image("ordered.img", 1_000_000, 3);
    bench.device.start().line_with("Registered.");
    let more = ["--security-counter", "5", "--detach"];
    bench.site.release_with(&ordered, "2.0.0", &more).ok();
    bench.device.agent().line_with("A group was written.");
    bench.device.kill();

    // A bundle that is refused leaves it alone.
    let mut old = bench.release("0.1.0");
    old.security_counter = 1;
    let refused = bench.path("refused.fwb");
    bench.made(&old).write(&refused);
    let before = bench.device.state()["update"].clone();
    expect(
        &bench.device.install(&refused),
        1,
        "REJECTED",
        Some("FLOOR"),
    );
    assert_eq!(bench.device.state()["update"], before);

    let bundle = bench.good("gw.fwb", "1.1.0");
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
    bench.device.expect_image("b", &bench.image);
    bench.device.configure(|config| {
        table(config, "transfer").remove("bandwidth_limit_bytes_per_s");
    });
    bench.device.start();
    let device = until(&bench, |device| {
        device["device"]["current"]["version"] == "2.0.0"
    });
    let updates = device["updates"].as_array().unwrap();
    assert_eq!(updates.len(), 1, "{device}");
    assert_eq!(updates[0]["phase"], "SUCCEEDED", "{device}");
    assert_eq!(updates[0]["attempt"], 1, "{device}");
}

#[test]
fn an_agent_and_an_install_never_work_at_once() {
    let mut bench = Bench::with_check(0);
    let bundle = bench.good("gw.fwb", "1.1.0");
    bench.device.start().line_with("Registered.");
    let storage = bench.device.storage();
    let refused = bench.device.install(&bundle);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("in use by another fwpush-device"),
        "{}",
        refused.stderr
    );
    assert!(bench.device.storage() == storage);
    bench.device.agent().signal(Signal::TERM);
    bench.device.agent().wait();
    bench.device.kill();

    // The other way round: a hook holds the install up.
    let (begun, go) = (bench.path("begun"), bench.path("go"));
    let wait = "touch \"$0\"; until [ -e \"$1\" ]; do sleep 0.02; done";
    let hook = [
        "sh",
        "-c",
        wait,
        begun.to_str().unwrap(),
        go.to_str().unwrap(),
    ];
    bench.device.configure(|config| {
        let hook = hook.map(toml::Value::from).to_vec();
        table(config, "hooks").insert("pre_download".into(), hook.into());
    });
    let mut install = Process::spawn(bench.device.install_command(&bundle));
    wait_for(|| begun.exists().then_some(()));
    let agent = bench.device.once();
    assert_eq!(agent.code, 4, "{}", agent.stderr);
    fs::write(&go, "").unwrap();
    assert_eq!(install.wait().code(), Some(10));
}

#[test]
fn hooks_have_their_say_and_the_window_has_none() {
    let bench = Bench::with_check(0);
    let (log, bundle) = (bench.path("hooks"), bench.good("gw.fwb", "1.1.0"));
    let note = "echo $FWPUSH_HOOK $FWPUSH_GENERATION $FWPUSH_VERSION $FWPUSH_SLOT >> \"$0\"";
    let configure = |pre_install: &str| {
        let scripts = [
            ("pre_download", "exit 0"),
            ("pre_install", pre_install),
            ("pre_reboot", "exit 0"),
            ("post_confirm", "exit 0"),
        ];
        bench.device.configure(|config| {
            for (hook, script) in scripts {
                let script = format!("{note}; {script}");
                let argv = ["sh", "-c", &script, log.to_str().unwrap()];
                let argv = argv.map(toml::Value::from).to_vec();
                table(config, "hooks").insert(hook.into(), argv.into());
            }
            // Never: the device would wait for it.
            let closed = if is_near_noon() {
                "00:00-00:01"
            } else {
                "12:00-12:01"
            };
            table(config, "install").insert("window".into(), vec![closed].into());
            table(config, "install").insert("time_zone".into(), "UTC".into());
            table(config, "transfer").insert("metered_command".into(), vec!["true"].into());
        });
    };
    configure("echo 90; echo not yet >&2; exit 75");
    let deferred = bench.device.install(&bundle);
    expect(&deferred, 1, "DEFERRED", Some("HOOK_DEFERRED"));
    assert!(
        deferred.json()["message"]
            .as_str()
            .unwrap()
            .contains("not yet")
    );
    assert!(deferred.json()["deferred_until"].is_string());
    configure("echo never >&2; exit 1");
    expect(
        &bench.device.install(&bundle),
        1,
        "FAILED",
        Some("HOOK_REJECTED"),
    );
    bench.expect_running("1.0.0", "a", true);
    fs::remove_file(&log).unwrap();
    configure("exit 0");
    let written = bench.device.status()["groups_written"].clone();
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
    // What the slot held already was not written again.
    assert_eq!(bench.device.status()["groups_written"], written);
    expect(&bench.device.install(&bundle), 0, "SUCCEEDED", None);
    let expected: String = ["pre-download", "pre-install", "pre-reboot", "post-confirm"]
        .map(|hook| format!("{hook} 0 1.1.0 b\n"))
        .concat();
    assert_eq!(fs::read_to_string(&log).unwrap(), expected);
}

/// Whether it is nearer to noon than to midnight, UTC.
fn is_near_noon() -> bool {
    let second = fwpush_keys::Timestamp::now().as_secs().rem_euclid(86_400);
    (21_600..64_800).contains(&second)
}

/// As it was found to be: a device that was in a drawer for two roots and a revocation.
#[test]
fn a_bundle_brings_the_roots_and_the_list_that_its_release_needs() {
    let mut bench = Bench::with_check(0);
    let key = fwpush_keys::SigningKey::generate();
    let second = bench.offline.rotate(|_| {});
    let third = bench.offline.rotate(|root| {
        root.add_key(key.public());
        root.roles.release = fwpush_keys::RoleKeys::new(1, &[key.public()]);
    });
    let under_the_old = bench.made(&bench.release("1.0.5"));
    bench.offline.release_keys = vec![key];
    let bad = bench.release("1.0.9");
    let mut release = bench.release("1.1.0");
    release.revocation_version = fwpush_keys::RevocationVersion {
        root_version: 3,
        version: 1,
    };
    let mut made = bench.made(&release);
    made.roots = vec![second, third];
    let path = bench.path("gw.fwb");
    // Without the list it is not enough; the roots stay.
    made.write(&path);
    expect(
        &bench.device.install(&path),
        1,
        "REJECTED",
        Some("REVOCATION_MISSING"),
    );
    let root = bench.device.dir().join("state/3.root.json");
    assert_eq!(fs::read(root).unwrap(), made.roots[1]);
    under_the_old.write(&path);
    expect(
        &bench.device.install(&path),
        1,
        "REJECTED",
        Some("SIGNATURES"),
    );

    made.list = Some(bench.offline.revoke(1, &[&bad]));
    made.write(&path);
    expect(&bench.device.install(&path), 10, "REBOOTING", None);
    expect(&bench.device.install(&path), 0, "SUCCEEDED", None);
    let revoked = bench.made(&bad);
    revoked.write(&path);
    expect(&bench.device.install(&path), 1, "REJECTED", Some("REVOKED"));
}

#[test]
fn a_bundle_that_every_device_would_refuse_is_not_made() {
    let bench = Bench::new();
    let (image, other) = (bench.path("gw.img"), bench.path("other.img"));
    fs::write(&image, &bench.image).unwrap();
    fs::write(&other, filler("other", IMAGE_BYTES)).unwrap();
    let manifest = bench.path("gw.json");
    let args = |image: &Path, more: &[&str]| {
        let [manifest, image] = [&manifest, image].map(|path| path.to_str().unwrap().to_owned());
        let line = [
            "release",
            "bundle",
            "--manifest",
            &manifest,
            "--image",
            &image,
        ];
        let out = ["--out", "gw.fwb"];
        bench.fwpush(&[&line[..], &out, more].concat())
    };
    let write = |release: &Release| fs::write(&manifest, bench.offline.sign(release)).unwrap();
    let release = bench.release("1.1.0");
    write(&release);
    let refused = |finished: Finished, code: i32, words: &str| {
        assert_eq!(finished.code, code, "{}", finished.stderr);
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
        assert!(finished.stderr.contains(" next: "), "{}", finished.stderr);
        assert!(!bench.path("gw.fwb").exists());
    };
    refused(
        args(&other, &[]),
        1,
        "is not the image that the manifest names",
    );
    let list = bench.path("list.json");
    fs::write(&list, bench.offline.revoke(1, &[&release])).unwrap();
    let list = ["--revocation", list.to_str().unwrap()];
    refused(
        args(&image, &list),
        1,
        "release is revoked: it bricks devices",
    );
    let mut wanting = release.clone();
    wanting.revocation_version = fwpush_keys::RevocationVersion {
        root_version: 1,
        version: 4,
    };
    write(&wanting);
    refused(args(&image, &[]), 1, "needs revocation list 1.4");
    let mut late = release.clone();
    late.expires = late.issued.saturating_add(fwpush_tests::offline::HOUR);
    write(&late);
    refused(args(&image, &[]), 1, "expired");
    fs::write(&manifest, release.to_envelope().unwrap().to_bytes()).unwrap();
    refused(args(&image, &[]), 1, "0 of 1 needed signatures");

    // And never over another file.
    write(&release);
    args(&image, &[]).ok();
    let made = fs::read(bench.path("gw.fwb")).unwrap();
    let again = args(&image, &[]);
    assert_eq!(again.code, 2, "{}", again.stderr);
    assert!(again.stderr.contains("exists already"), "{}", again.stderr);
    assert_eq!(fs::read(bench.path("gw.fwb")).unwrap(), made);
    let left: Vec<_> = fs::read_dir(bench.site.temp())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().starts_with('.')),
        "{left:?}"
    );
}
