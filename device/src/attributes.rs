//! What a device says of itself to operators: fixed pairs, and those that programs print.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use fwpush_keys::error_text;
use tokio::time::{Instant, timeout_at};

use crate::{limits, program::Program};

/// Pairs of names and values.
pub type Attributes = BTreeMap<String, String>;

/// Whether so many pairs of such a length may be sent.
pub fn fit(attributes: &Attributes) -> bool {
    let bytes: usize = attributes
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    attributes.len() <= limits::ATTRIBUTES && bytes <= limits::ATTRIBUTES_BYTES
}

/// The fixed pairs and what the programs of a directory print, later ones before earlier ones: the programs run one after
/// the other in the order of their names, all of them within [`limits::ATTRIBUTES_TIMEOUT`]. A program that fails, or whose
/// pairs would go over a bound, adds nothing; the log says so.
pub(crate) async fn collect(fixed: &Attributes, folder: &Path) -> Attributes {
    collect_within(limits::ATTRIBUTES_TIMEOUT, fixed, folder).await
}

async fn collect_within(limit: Duration, fixed: &Attributes, folder: &Path) -> Attributes {
    let mut all = fixed.clone();
    let programs = match programs(folder) {
        Ok(programs) => programs,
        Err(error) => {
            complain(folder, &error.to_string());
            return all;
        }
    };
    let end = Instant::now() + limit;
    for path in programs {
        let Ok(printed) = timeout_at(end, ask(&path)).await else {
            complain(&path, "there was no time left for it");
            break;
        };
        let with = printed.and_then(|printed| {
            let mut with = all.clone();
            with.extend(printed);
            let problem = || {
                format!(
                    "there would be more than {} pairs or {} bytes",
                    limits::ATTRIBUTES,
                    limits::ATTRIBUTES_BYTES
                )
            };
            fit(&with).then_some(with).ok_or_else(problem)
        });
        match with {
            Ok(with) => all = with,
            Err(problem) => complain(&path, &problem),
        }
    }
    all
}

fn complain(path: &Path, problem: &str) {
    tracing::warn!(
        event = "attributes.failed",
        path = %path.display(),
        reason = problem,
        "Attributes could not be had."
    );
}

/// Executable files by name; others, such as a README, are none of ours.
fn programs(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // Through links: packages install them so.
        let Ok(kind) = fs::metadata(&path) else {
            continue;
        };
        if kind.is_file() && kind.permissions().mode() & 0o111 != 0 {
            programs.push(path);
        }
    }
    programs.sort();
    programs.truncate(limits::ATTRIBUTES_PROGRAMS);
    Ok(programs)
}

async fn ask(path: &Path) -> Result<Attributes, String> {
    let argv = [path.to_str().ok_or("its name is not UTF-8")?.to_owned()];
    let program = Program::new(&argv, Vec::new(), limits::ATTRIBUTES_TIMEOUT);
    let ended = program.run().await.map_err(|error| error_text(&error))?;
    if !ended.status.success() {
        return Err(format!("it ended with {}", ended.explain()));
    }
    parse(&ended.answer())
}

/// Lines `key=value`; empty ones are passed over.
fn parse(printed: &str) -> Result<Attributes, String> {
    let mut pairs = Attributes::new();
    for line in printed
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        let (key, value) = line
            .split_once('=')
            .map(|(key, value)| (key.trim(), value.trim()))
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| format!("the line {line:?} is not key=value"))?;
        pairs.insert(key.to_owned(), value.to_owned());
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn program(&self, name: &str, script: &str) -> &Self {
            let path = self.0.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            self
        }

        async fn collect(&self, fixed: &[(&str, &str)]) -> Vec<(String, String)> {
            let fixed = fixed
                .iter()
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect();
            collect(&fixed, self.0.path()).await.into_iter().collect()
        }
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect()
    }

    #[tokio::test]
    async fn programs_add_to_fixed_pairs_in_the_order_of_their_names() {
        let folder = Folder::new();
        folder
            .program("20-late", "echo site = roof; echo; echo 'note=a=b '")
            .program("10-early", "echo site=cellar; echo disk=80");
        fs::write(folder.0.path().join("README"), "echo not=run").unwrap();
        assert_eq!(
            folder.collect(&[("site", "here"), ("rack", "3")]).await,
            pairs(&[
                ("disk", "80"),
                ("note", "a=b"),
                ("rack", "3"),
                ("site", "roof")
            ])
        );
    }

    #[tokio::test]
    async fn a_program_that_fails_or_says_too_much_adds_nothing() {
        let folder = Folder::new();
        folder
            .program("1", "echo a=1; exit 1")
            .program("2", "for i in $(seq 65); do echo k$i=v; done")
            .program("3", "printf 'big='; yes | head -c 5000")
            .program("4", "echo no pair")
            .program("5", "echo =nothing")
            .program("6", "echo good=1");
        assert_eq!(folder.collect(&[]).await, pairs(&[("good", "1")]));
    }

    #[tokio::test]
    async fn what_takes_too_long_costs_the_rest_and_not_the_agent() {
        let folder = Folder::new();
        folder
            .program("1", "echo first=1")
            .program("2", "sleep 1000")
            .program("3", "echo last=1");
        let limit = Duration::from_secs(1);
        let all = collect_within(limit, &Attributes::new(), folder.0.path()).await;
        assert_eq!(
            all.into_iter().collect::<Vec<_>>(),
            pairs(&[("first", "1")])
        );
    }

    #[tokio::test]
    async fn without_the_directory_the_fixed_pairs_stay() {
        let fixed = Attributes::from([("a".to_owned(), "1".to_owned())]);
        assert_eq!(collect(&fixed, Path::new("/does/not/exist")).await, fixed);
    }
}
