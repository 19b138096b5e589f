//! The guide lists every code that the agent logs or reports, and no other.

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Upper-case words in quotes that are no error codes: variables, phases, TLS alerts and the like.
const NO_CODES: [&str; 29] = [
    "CARGO_PKG_VERSION_MAJOR",
    "CARGO_PKG_VERSION_MINOR",
    "CARGO_PKG_VERSION_PATCH",
    "ACCEPTED",
    "CANCELLED",
    "CONFIRMING",
    "DEFERRED",
    "DOWNLOADING",
    "FAILED",
    "FALLING_BACK",
    "FWPUSH_DEVICE_CONFIG",
    "FWPUSH_LOG",
    "INSTALLING",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "PATH",
    "REBOOTING",
    "REJECTED",
    "ROLLED_BACK",
    "SCREAMING_SNAKE_CASE",
    "SUCCEEDED",
    "VERIFIED",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "FWPBOOT1",
    "FILE",
    "UTC",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources of a crate, without tests.
fn sources(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() && name != "tests" {
            all += &sources(&path);
        } else if name.ends_with(".rs") && name != "tests.rs" {
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            all += &code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .fold(String::new(), |all, line| all + line + "\n");
        }
    }
    all
}

/// Texts between two marks that are made of some characters only.
fn between(text: &str, mark: char, is_part: impl Fn(char) -> bool) -> BTreeSet<String> {
    text.lines()
        .flat_map(|line| line.split(mark).skip(1).step_by(2))
        .filter(|word| word.len() > 2 && word.chars().all(&is_part))
        .map(str::to_owned)
        .collect()
}

fn guide() -> String {
    fs::read_to_string(repository().join("docs/device-agent.md")).unwrap()
}

/// The first cells of the table under a heading.
fn first_cells(heading: &str) -> String {
    let guide = guide();
    let (_, section) = guide.split_once(heading).expect("the section is there");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.split(" | ").next().unwrap().to_owned() + "\n")
        .collect()
}

#[test]
fn the_guide_lists_every_event_of_the_log() {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '.' || c == '-';
    let is_event = |word: &String| word.contains('.') && !word.ends_with(".rs");
    let code = sources(&repository().join("device/src"));
    // Where they are made: `event = "..."`, and the phases' own function.
    let phases = code.split("fn phase_event").nth(1).unwrap();
    let phases = phases.split("\n}").next().unwrap();
    let made: String = code
        .lines()
        .filter(|line| line.contains("event = \""))
        .map(|line| line.split("event = ").nth(1).unwrap().to_owned() + "\n")
        .collect();
    let made: BTreeSet<_> = between(&(made + phases), '"', is_part)
        .into_iter()
        .filter(is_event)
        .collect();
    let listed = between(&first_cells("## Log\n"), '`', is_part);
    assert!(made.len() > 20, "{made:?}");
    assert_eq!(made, listed);
}

#[test]
fn the_guide_explains_every_error_code() {
    let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
    let ours = sources(&repository().join("device/src"));
    let keys = sources(&repository().join("keys/src"));
    // What the keys can refuse is what their functions `code` name.
    let codes_of_keys: String = keys
        .split("fn code(")
        .skip(1)
        .map(|function| function.split("\n    }").next().unwrap())
        .collect();
    let is_code =
        |word: &String| !word.starts_with("FWPUSH_") && !NO_CODES.contains(&word.as_str());
    let made: BTreeSet<_> = between(&(ours + &codes_of_keys), '"', is_part)
        .into_iter()
        .filter(is_code)
        .collect();
    let listed = between(&first_cells("## Error codes\n"), '`', is_part);
    let missing: Vec<_> = made.difference(&listed).collect();
    let invented: Vec<_> = listed.difference(&made).collect();
    assert!(missing.is_empty(), "the guide does not explain {missing:?}");
    assert!(invented.is_empty(), "nothing makes {invented:?}");
}

#[test]
fn the_guide_names_every_variable_of_a_hook() {
    let code = fs::read_to_string(repository().join("device/src/hooks.rs")).unwrap();
    let code = code.split("#[cfg(test)]").next().unwrap();
    let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
    let guide = guide();
    let variables: Vec<_> = between(code, '"', is_part)
        .into_iter()
        .filter(|word| word.starts_with("FWPUSH_"))
        .collect();
    assert!(variables.len() > 8);
    for name in variables {
        assert!(
            guide.contains(&format!("`{name}`")),
            "{name} is not in the guide"
        );
    }
}
