//! Real agents on boards whose clock is wrong, or steps while an update is on its way.

use std::{
    fs,
    path::{Path, PathBuf},
};

use fwpush_keys::GROUP_BYTES;
use fwpush_tests::{
    agent::{Device, filler, table},
    clock::library,
    site::Site,
};

const GROUPS: u64 = 32;

/// The clock of one device: of the day and not the monotonic one, as when a board sets its clock.
struct Clock {
    preload: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// `offset` from the present, such as `-56y`.
    fn new(preload: &Path, folder: &Path, offset: &str) -> Self {
        let clock = Self {
            preload: preload.to_owned(),
            file: folder.join("clock"),
        };
        clock.set(offset);
        clock
    }

    /// Steps to another offset at once.
    fn set(&self, offset: &str) {
        // Replaced, so that it is never read half-written.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{offset}\n")).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    fn start(&self, device: &mut Device) {
        let yes = Path::new("1");
        let env: [(&str, &Path); 4] = [
            ("LD_PRELOAD", &self.preload),
            ("FAKETIME_TIMESTAMP_FILE", &self.file),
            ("FAKETIME_NO_CACHE", yes),
            ("FAKETIME_DONT_FAKE_MONOTONIC", yes),
        ];
        device.start_with(&env).line_with("link.registered");
    }
}

fn image(site: &Site) -> (PathBuf, Vec<u8>) {
    let (path, image) = (
        site.temp().join("image"),
        filler("an image", (GROUPS * GROUP_BYTES) as usize),
    );
    fs::write(&path, &image).unwrap();
    (path, image)
}

fn expect_success(device: &mut Device, image: &[u8]) {
    device.agent().line_with("update.succeeded");
    device.expect_image("b", image);
    let status = device.status();
    assert_eq!(status["version"], "1.1.0", "{status}");
    assert_eq!(status["groups_written"], GROUPS, "{status}");
}

/// The year that the agent's own log gives: whether the clock is what the test says.
fn logged_year(device: &mut Device) -> u32 {
    let line = device.agent().line_with("link.registered");
    line.trim_start()[..4].parse().unwrap()
}

#[test]
fn an_update_succeeds_in_1970_and_in_2100() {
    let Some(library) = library() else { return };
    let site = Site::started();
    let (path, image) = image(&site);
    let mut devices = [("dev-1970", "-56y"), ("dev-2100", "+80y")].map(|(id, offset)| {
        let mut device = Device::add(&site, id, image.len() + (1 << 20));
        Clock::new(&library, device.dir(), offset).start(&mut device);
        device
    });
    let [early, late] = &mut devices;
    assert!(
        logged_year(early) <= 1972,
        "the clock is not what it should be"
    );
    assert!(
        logged_year(late) >= 2100,
        "the clock is not what it should be"
    );
    site.release(&path, "1.1.0").ok();
    for device in &mut devices {
        expect_success(device, &image);
    }
}

/// Forward by 80 years and back by 50, while the image is fetched and while the update is put off: what waits, waits as long as
/// it should, and nothing is given up.
#[test]
fn a_clock_that_steps_during_an_update_neither_stalls_nor_ends_it() {
    let Some(library) = library() else { return };
    let site = Site::started();
    let (path, image) = image(&site);
    let mut device = Device::add(&site, "dev-1", image.len() + (1 << 20));
    let asked = device.dir().join("asked");
    device.configure(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("bandwidth_limit_bytes_per_s".into(), (1 << 20).into());
        transfer.insert("chunk_bytes".into(), (GROUP_BYTES as i64).into());
        // Puts it off once, for ten seconds.
        let script = r#"[ -e "$0" ] && exit 0; touch "$0"; echo 10; exit 75"#;
        let hook = ["sh", "-c", script, asked.to_str().unwrap()].map(toml::Value::from);
        table(config, "hooks").insert("pre_install".into(), hook.to_vec().into());
    });
    let clock = Clock::new(&library, device.dir(), "+0");
    clock.start(&mut device);
    site.release_with(&path, "1.1.0", &["--detach"]).ok();
    let wait_for_group = |device: &mut Device, index: u64| {
        let written =
            format!("A group was written. event=\"transfer.group-written\" group={index}");
        device.agent().line_with(&written);
    };
    for (index, offset) in [(4, "+80y"), (12, "-50y"), (20, "+0")] {
        wait_for_group(&mut device, index);
        clock.set(offset);
    }
    device.agent().line_with("update.deferred");
    clock.set("-50y");
    device.agent().line_with("update.installing");
    clock.set("+80y");
    expect_success(&mut device, &image);
    let lines = device.agent().lines();
    for word in [
        "link.lost",
        "transfer.cut",
        "update.failed",
        "update.rejected",
    ] {
        assert!(!lines.iter().any(|line| line.contains(word)), "{word}");
    }
    // The steps were seen: the log carries the device's own time.
    for year in ["20", "21", "19"] {
        assert!(
            lines.iter().any(|line| line.trim_start().starts_with(year)),
            "no line of 19xx, 20xx and 21xx each"
        );
    }
}
