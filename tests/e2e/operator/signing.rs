//! Building, signing and publishing as steps of their own, on machines of their own; and what keys never do: show up.

use std::{fs, path::Path, process::Command, thread};

use fwpush_keys::{Envelope, SigningKey};
use fwpush_tests::{
    bins::bin,
    process::{Process, run},
    site::{HW, PRODUCT, Site},
};
use tempfile::TempDir;

use super::{command, expect_failure, running_device, secrets_below, text};

/// Two of two release keys: the new one's file, and nothing else changed.
fn ask_for_two_signatures(site: &Site) -> String {
    let second = site.temp().join("release-2.key");
    let second = second.to_str().unwrap().to_owned();
    site.fwpush(&["keys", "new-release-key", "--out", &second])
        .ok();
    let public = format!("{second}.pub");
    let root = site.temp().join("2.root.json");
    let root = root.to_str().unwrap();
    let args = [
        "--add-release-key",
        &public,
        "--release-threshold",
        "2",
        "--out",
        root,
    ];
    site.fwpush(&[&["keys", "rotate-root"][..], &args].concat())
        .ok();
    site.fwpush(&["keys", "publish", root]).ok();
    second
}

/// A security module: a signing command that passes on what it gets, and a thread that has the key.
struct Module {
    dir: TempDir,
    thread: thread::JoinHandle<Vec<u8>>,
}

impl Module {
    /// Signs one message with the key of a file.
    fn holding(key: &Path) -> Self {
        let key = SigningKey::from_pem(&fs::read_to_string(key).unwrap()).unwrap();
        let dir = TempDir::with_prefix("fwpush-module-").unwrap();
        let (asked, answer) = (dir.path().join("asked"), dir.path().join("answer"));
        assert!(
            Command::new("mkfifo")
                .args([&asked, &answer])
                .status()
                .unwrap()
                .success()
        );
        let thread = thread::spawn(move || {
            let message = fs::read(asked).unwrap();
            fs::write(answer, key.sign(&message)).unwrap();
            message
        });
        Self { dir, thread }
    }

    /// What `--signer` is given.
    fn command(&self) -> String {
        format!(
            "cd '{}' && cat > asked && cat answer",
            self.dir.path().display()
        )
    }

    /// What was signed.
    fn signed(self) -> Vec<u8> {
        self.thread.join().unwrap()
    }
}

#[test]
fn a_release_is_built_signed_by_two_on_machines_of_their_own_and_published() {
    let mut site = Site::started();
    let second_key = ask_for_two_signatures(&site);
    let image = site.image("fw.img", 200_000, 7);
    let other = site.image("other.img", 200_000, 8);
    let image = image.to_str().unwrap();

    // Built where there is no installation and no server.
    let bench = TempDir::with_prefix("fwpush-bench-").unwrap();
    let manifest = bench.path().join("gw.json");
    let manifest = manifest.to_str().unwrap();
    let away = |args: &[&str]| {
        let mut command = command(bin("fwpush"), args);
        command.current_dir(bench.path());
        run(command)
    };
    let build = [
        "release",
        "build",
        image,
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
        "--hw",
        HW,
    ];
    away(&[&build[..], &["--out", manifest]].concat()).ok();

    // The first signs with a file, knowing nothing but the root document; what is signed is shown, another image refused.
    let offline = site.dir().join("offline");
    let first_key = offline.join("release-1.key");
    let root = site.dir().join("operator/root.json");
    let sign = [
        "release",
        "sign",
        manifest,
        "--root",
        root.to_str().unwrap(),
    ];
    let with_key = ["--key", first_key.to_str().unwrap()];
    let wrong = away(
        &[
            &sign[..],
            &with_key[..],
            &["--image", other.to_str().unwrap()],
        ]
        .concat(),
    );
    expect_failure(&wrong, "is not the image that the manifest names");
    let signed = away(&[&sign[..], &with_key[..], &["--image", image]].concat()).ok();
    for shown in [PRODUCT, "1.1.0", HW] {
        assert!(
            signed.stderr.contains(shown),
            "what is signed is shown: {signed:?}"
        );
    }
    assert!(signed.stdout.contains("1 of 2"), "{signed:?}");

    let publish = ["release", "publish", manifest, "--image", image, "--json"];
    let early = site.fwpush(&publish);
    expect_failure(&early, "signature");
    assert!(
        early.stderr.contains("release sign"),
        "what to do: {early:?}"
    );
    // Twice the same key is still one signature.
    away(&[&sign[..], &with_key[..]].concat()).ok();
    expect_failure(&site.fwpush(&publish), "signature");

    // The second key is in a module that gets exactly the bytes to be signed.
    let module = Module::holding(Path::new(&second_key));
    let done = away(&[&sign[..], &["--signer", &module.command()]].concat()).ok();
    assert!(done.stdout.contains("2 of 2"), "{done:?}");
    let envelope = Envelope::parse(&fs::read(manifest).unwrap()).unwrap();
    assert_eq!(module.signed(), envelope.pae());

    let published = site.fwpush(&publish).ok().json();
    let mut device = running_device(&site, "dev-1");
    let release = text(&published, "release_id");
    site.fwpush(&[
        "rollout",
        "start",
        "--release",
        release,
        "--to",
        "all",
        "--yes",
    ])
    .ok();
    assert_eq!(device.status()["version"], "1.1.0");
    device.kill();
    site.stop_server();
}

#[test]
fn a_signing_command_that_fails_or_answers_nonsense_signs_nothing() {
    let site = Site::new();
    let image = site.image("fw.img", 1_000, 1);
    let manifest = site.temp().join("gw.json");
    let manifest = manifest.to_str().unwrap();
    let build = [
        "release",
        "build",
        image.to_str().unwrap(),
        "--product",
        PRODUCT,
        "--version",
        "1.1.0",
    ];
    site.fwpush(&[&build[..], &["--hw", HW, "--out", manifest]].concat())
        .ok();
    let before = fs::read(manifest).unwrap();
    for (signer, why) in [
        ("echo the card is locked >&2; exit 3", "the card is locked"),
        ("cat > /dev/null; echo hello", "no signature"),
        ("cat > /dev/null; head -c 64 /dev/zero", "signature"),
        ("head -c 1000000 /dev/zero", "printed more than"),
        ("exit 0", "bytes that it has to sign unread"),
    ] {
        let done = site.fwpush(&["release", "sign", manifest, "--signer", signer]);
        expect_failure(&done, why);
        assert!(done.stderr.contains("next: "), "{done:?}");
        assert_eq!(fs::read(manifest).unwrap(), before, "after {signer:?}");
    }
}

#[test]
fn no_private_key_shows_up_in_any_output_log_or_backup() {
    let site = Site::new();
    let mut serve = site.fwpush_raw(&["serve"]);
    serve.env("FWPUSH_LOG", "trace");
    let mut server = Process::spawn(serve);
    server.line_with("The server accepts connections");
    let mut device = running_device(&site, "dev-1");
    let image = site.image("fw.img", 100_000, 1);
    let backup = site.temp().join("backup.tar");
    let backup = backup.to_str().unwrap();

    // A key file with a line lost, and a key where something else belongs.
    let key = fs::read_to_string(site.dir().join("offline/release-1.key")).unwrap();
    let torn = site.temp().join("torn.pem");
    fs::write(&torn, key.replace("-----END", "----END")).unwrap();
    let torn = torn.to_str().unwrap();
    let whole = site.dir().join("offline/root-1.key");
    let whole = whole.to_str().unwrap();
    let release = [
        "release",
        image.to_str().unwrap(),
        "--product",
        PRODUCT,
        "--hw",
        HW,
        "--to",
        "all",
        "--yes",
    ];
    let commands: Vec<Vec<&str>> = vec![
        [&release[..], &["--version", "1.1.0", "--key", torn]].concat(),
        [&release[..], &["--version", "1.1.0", "--key", whole]].concat(),
        [&release[..], &["--version", "1.1.0"]].concat(),
        vec!["release", "publish", whole],
        vec!["release", "show", "--file", whole],
        vec!["keys", "verify", whole],
        vec!["keys", "publish", torn],
        vec!["keys", "show", "--json"],
        vec![
            "device",
            "add",
            "dev-2",
            "--product",
            PRODUCT,
            "--hw",
            HW,
            "--csr",
            whole,
        ],
        vec![
            "device",
            "add",
            "dev-3",
            "--product",
            PRODUCT,
            "--hw",
            HW,
            "--out",
            "dev-3",
            "--json",
        ],
        vec!["device", "show", "dev-1", "--json"],
        vec!["backup", backup],
    ];
    let mut said: Vec<String> = commands
        .iter()
        .map(|args| {
            let mut command = site.fwpush_raw(args);
            command
                .env("FWPUSH_LOG", "trace")
                .env("RUST_BACKTRACE", "1");
            let done = run(command);
            format!("{args:?}: {}\n{}", done.stdout, done.stderr)
        })
        .collect();
    said.push(device.kill().join("\n"));
    server.signal(rustix::process::Signal::TERM);
    server.wait();
    said.push(server.all_lines().join("\n"));
    said.push(String::from_utf8_lossy(&fs::read(backup).unwrap()).into_owned());

    let secrets = secrets_below(site.temp());
    assert!(secrets.len() >= 10, "the keys are found");
    for text in &said {
        let shown = secrets.iter().any(|secret| text.contains(secret));
        assert!(!shown, "a private key in:\n{text}");
    }
}
