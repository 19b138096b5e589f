//! What an operator does, right and wrong, with the real command against a real server.

mod backup;
mod bounds;
mod devices;
mod installation;
mod publishing;
mod rollouts;
mod signing;
mod trust;

use std::{fs, path::Path, process::Command};

use fwpush_tests::{agent::Device, process::Finished, site::Site};
use serde_json::Value;

/// The command must have failed (exit code 1) in words that name the reason and say what to do.
#[track_caller]
fn expect_failure(done: &Finished, why: &str) {
    assert_eq!(done.code, 1, "{done:?}");
    assert!(done.stderr.contains(why), "no {why:?} in {done:?}");
    assert!(done.stderr.contains("next: "), "no next step in {done:?}");
}

/// The command must have refused its arguments (exit code 2) before it did anything.
#[track_caller]
fn expect_usage(done: &Finished, why: &str) {
    assert_eq!(done.code, 2, "{done:?}");
    assert!(done.stderr.contains(why), "no {why:?} in {done:?}");
}

/// A part of every private key below `dir`: of each `*.key`, 16 characters that are nothing but secret. PKCS#8 has up to
/// 36 bytes before the key itself (P-256), which are 48 characters of the first line.
fn secrets_below(dir: &Path) -> Vec<String> {
    let mut secrets = Vec::new();
    for entry in fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if entry.is_dir() {
            secrets.extend(secrets_below(&entry));
        } else if entry.extension().is_some_and(|end| end == "key") {
            let pem = fs::read_to_string(&entry).unwrap();
            secrets.push(pem.lines().nth(1).unwrap()[48..64].to_owned());
        }
    }
    secrets
}

/// A command of `path`, not led anywhere by this process's environment.
fn command(path: impl AsRef<Path>, args: &[&str]) -> Command {
    let mut command = Command::new(path.as_ref());
    command.args(args).env_remove("FWPUSH_DIR");
    command
}

/// A text field of a command's JSON.
#[track_caller]
fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field} in {value}"))
}

/// A real agent that is connected.
fn running_device(site: &Site, id: &str) -> Device {
    let mut device = Device::add(site, id, fwpush_tests::agent::SLOT_BYTES);
    device.start().line_with("Registered.");
    device
}
