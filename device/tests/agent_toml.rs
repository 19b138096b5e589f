//! What lies in `examples/` works, and says everything that there is to say.

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use fwpush_device::{Config, ConfigError};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// Reads a text as `agent.toml`.
fn load(text: &str) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(&path, text).unwrap();
    Config::load(&path)
}

fn example() -> String {
    fs::read_to_string(examples().join("agent.toml")).unwrap()
}

/// The example with the other kind of slots, which it shows in a comment.
fn example_with_commands() -> String {
    let example = example();
    let (head, rest) = example.split_once("[slots]\n").unwrap();
    let (_, rest) = rest.split_once("#\n#   [slots]\n").unwrap();
    let (commented, tail) = rest.split_once("\n\n").unwrap();
    let slots: Vec<_> = commented
        .lines()
        .map(|line| line.strip_prefix("#   ").unwrap())
        .collect();
    format!("{head}[slots]\n{}\n\n{tail}", slots.join("\n"))
}

#[test]
fn the_example_is_a_configuration() {
    let config = load(&example()).unwrap();
    let settings = config.settings();
    assert!(settings.install_window.is_some());
    assert_eq!(settings.attributes["site"], "north");
}

/// The name of an option, where a line gives it a value or shows it commented out.
fn option(line: &str) -> Option<&str> {
    let line = line.strip_prefix("# ").unwrap_or(line);
    let (name, _) = line.split_once(" = ")?;
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    name.chars().all(is_name).then_some(name)
}

/// The options of each table that a text names.
fn named(text: &str) -> Vec<(String, Vec<String>)> {
    let mut tables = vec![(String::new(), Vec::new())];
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('[') {
            tables.push((table.trim_end_matches(']').to_owned(), Vec::new()));
        } else if let Some(name) = option(line) {
            tables.last_mut().unwrap().1.push(name.to_owned());
        }
    }
    tables
}

/// What a table may hold, as the refusal of an unknown name lists it.
fn known(text: &str, table: &str) -> Vec<String> {
    let header = format!("[{table}]\n");
    let text = match table {
        "" => format!("no_such_option = 1\n{text}"),
        _ => text.replacen(&header, &format!("{header}no_such_option = 1\n"), 1),
    };
    let refused = load(&text).unwrap_err().to_string();
    let (_, names) = refused
        .split_once("expected")
        .unwrap_or_else(|| panic!("[{table}] takes any name: {refused}"));
    names
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_example_has_every_option_of_every_table_and_no_other() {
    for text in [example(), example_with_commands()] {
        load(&text).unwrap();
        let named = named(&text);
        for (table, options) in named.iter().filter(|(table, _)| table != "attributes") {
            let known = known(&text, table);
            assert!(known.len() > 1, "[{table}] has {known:?}");
            // `kind` says which options there are, and is not one of them.
            for name in options.iter().filter(|name| *name != "kind") {
                assert!(known.contains(name), "[{table}] has no {name}");
            }
            for name in &known {
                let inner = match table.as_str() {
                    "" => name.clone(),
                    outer => format!("{outer}.{name}"),
                };
                let is_there =
                    options.contains(name) || named.iter().any(|(table, _)| *table == inner);
                assert!(is_there, "the example does not show {name} of [{table}]");
            }
        }
    }
}

#[test]
fn an_option_that_is_commented_out_has_a_value_of_its_kind() {
    let text = example();
    let mut tried = 0;
    for line in text.lines().filter(|line| line.starts_with("# ")) {
        if option(line).is_none() {
            continue;
        }
        let with = text.replacen(&format!("{line}\n"), &format!("{}\n", &line[2..]), 1);
        let loaded = load(&with);
        // Some need another option beside them, which the message names.
        assert!(
            matches!(loaded, Ok(_) | Err(ConfigError::Value { .. })),
            "{line}: {loaded:?}"
        );
        tried += 1;
    }
    assert!(tried > 15);
}

#[test]
fn systemd_takes_the_units() {
    let exists = Command::new("systemd-analyze").arg("--version").output();
    if exists.is_err() {
        eprintln!("skipped: systemd-analyze is not installed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for entry in fs::read_dir(examples().join("systemd")).unwrap() {
        let path = entry.unwrap().path();
        let is_unit = path
            .extension()
            .is_some_and(|kind| kind == "service" || kind == "path");
        if !is_unit {
            continue;
        }
        // The program is not installed here; the one of this build stands for it.
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace(
            "/usr/bin/fwpush-device",
            env!("CARGO_BIN_EXE_fwpush-device"),
        );
        let copy = folder.path().join(path.file_name().unwrap());
        fs::write(&copy, text).unwrap();
        units.push(copy);
    }
    assert_eq!(units.len(), 4);
    let verified = Command::new("systemd-analyze")
        .arg("verify")
        .args(&units)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    // Units of this machine, which ours pull in, may have faults of their own.
    let ours: Vec<_> = said
        .lines()
        .filter(|line| line.contains("fwpush"))
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
}
