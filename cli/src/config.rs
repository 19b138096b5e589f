//! Where an installation lies: finding `fwpush.toml`, and what the operator's one says.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use fwpush_keys::id::{OperatorId, TrustDomain};
use serde::Deserialize;

use crate::{
    disk,
    failure::{Failure, NextStep as _, Result},
};

/// The name of every configuration file.
pub const FILE_NAME: &str = "fwpush.toml";

/// `DIR/operator/fwpush.toml`: how to reach the server, and as whom.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorConfig {
    /// `host:port` of the server's listener for operators.
    pub server: String,
    pub trust_domain: TrustDomain,
    pub operator: OperatorId,
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// CA certificates by which the server is known.
    pub node_ca: PathBuf,
    /// The newest root document that this operator has accepted.
    pub root: PathBuf,
    /// The file this was read from.
    #[serde(skip)]
    pub path: PathBuf,
}

impl OperatorConfig {
    /// Reads the configuration that `dir` (from `--dir`), `FWPUSH_DIR` or the present directory leads to.
    pub fn find(dir: Option<&Path>) -> Result<Self> {
        Self::load(&find_operator_config(dir)?)
    }

    /// The same for commands that also work without one, such as signing on an offline machine.
    pub fn find_optional(dir: Option<&Path>) -> Result<Option<Self>> {
        match find_operator_config(dir) {
            Ok(path) => Self::load(&path).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Reads a configuration; relative paths in it start from its directory.
    pub fn load(path: &Path) -> Result<Self> {
        let text = disk::read_text(path).map_err(Failure::as_usage)?;
        let mut config: Self = toml::from_str(&text).map_err(|error| {
            Failure::usage(format!(
                "{}: {}",
                path.display(),
                error.to_string().trim_end()
            ))
            .next("Compare it with one that `fwpush init` makes.")
        })?;
        let base = disk::parent_of(path);
        for file in [
            &mut config.certificate,
            &mut config.key,
            &mut config.node_ca,
            &mut config.root,
        ] {
            *file = base.join(&*file);
        }
        config.path = path.to_owned();
        Ok(config)
    }
}

/// The directory that was asked for: `--dir`, else `FWPUSH_DIR`.
pub fn chosen_dir(dir: Option<&Path>) -> Option<PathBuf> {
    let from_env = || {
        env::var_os("FWPUSH_DIR")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
    };
    dir.map(Path::to_owned).or_else(from_env)
}

fn find_operator_config(dir: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = chosen_dir(dir) {
        return operator_config_of(&dir).ok_or_else(|| {
            if let Some(hidden) = hidden(&dir) {
                return hidden;
            }
            Failure::usage(format!("{} has no operator/{FILE_NAME}", dir.display()))
                .next("Give --dir (or FWPUSH_DIR) the directory that `fwpush init` made, or its operator/ part.")
        });
    }
    let here = env::current_dir().map_err(|error| {
        Failure::usage(format!("the present directory cannot be found: {error}"))
    })?;
    here.ancestors()
        .find_map(operator_config_of)
        .ok_or_else(|| {
            Failure::usage(format!(
                "no operator's {FILE_NAME} in {} or above",
                here.display()
            ))
            .next("Give --dir DIR, set FWPUSH_DIR, or make an installation with `fwpush init DIR`.")
        })
}

/// The failure where nobody may look into `dir`: what it holds is not known.
fn hidden(dir: &Path) -> Option<Failure> {
    let error = fs::metadata(dir.join(FILE_NAME)).err()?;
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    denied.then(|| {
        Failure::from_error(error)
            .doing(format!("look into {}", dir.display()))
            .as_usage()
    })
}

/// The operator's configuration in a directory made by `init`, in its `operator` part, or beside its `server` part.
fn operator_config_of(dir: &Path) -> Option<PathBuf> {
    let own = dir.join(FILE_NAME);
    let mut places = vec![dir.join("operator").join(FILE_NAME)];
    if own.is_file() {
        if is_server_config(&own) {
            places.push(dir.join("..").join("operator").join(FILE_NAME));
        } else {
            places.push(own);
        }
    }
    places.into_iter().find(|path| path.is_file())
}

/// The server's configuration for `--dir`, `FWPUSH_DIR` or the present directory, else `explicit`.
pub fn find_server_config(dir: Option<&Path>, explicit: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = explicit {
        return Ok(path.to_owned());
    }
    let of = |dir: &Path| {
        [dir.join("server").join(FILE_NAME), dir.join(FILE_NAME)]
            .into_iter()
            .find(|path| path.is_file() && is_server_config(path))
    };
    if let Some(dir) = chosen_dir(dir) {
        return of(&dir).ok_or_else(|| {
            if let Some(hidden) = hidden(&dir) {
                return hidden;
            }
            Failure::usage(format!("{} has no server/{FILE_NAME}", dir.display()))
                .next("Give --dir (or FWPUSH_DIR) the directory that `fwpush init` made, or its server/ part.")
        });
    }
    let here = env::current_dir().map_err(|error| {
        Failure::usage(format!("the present directory cannot be found: {error}"))
    })?;
    here.ancestors().find_map(of).ok_or_else(|| {
        Failure::usage(format!(
            "no server's {FILE_NAME} in {} or above",
            here.display()
        ))
        .next("Give --dir DIR, set FWPUSH_DIR, or make an installation with `fwpush init DIR`.")
    })
}

/// Whether a `fwpush.toml` is a server's: only those have `[listen]`. A file that cannot be read is not; one with a mistake in it may
/// be, so that reading it tells the mistake.
fn is_server_config(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| match text.parse::<toml::Table>() {
        Ok(table) => table.contains_key("listen"),
        Err(_) => text.lines().any(|line| line.trim() == "[listen]"),
    })
}

/// The directory with the offline keys, if it lies beside the operator's configuration.
pub fn offline_dir(dir: Option<&Path>) -> Option<PathBuf> {
    let beside = |path: &Path| [path.join("offline"), path.join("..").join("offline")];
    let mut places = Vec::new();
    if let Some(dir) = chosen_dir(dir) {
        places.extend(beside(&dir));
    } else if let Ok(path) = find_operator_config(None) {
        places.extend(beside(disk::parent_of(&path)));
    }
    places.into_iter().find(|path| path.is_dir())
}

/// The offline directory, or words on how to name a key instead.
pub fn need_offline_dir(dir: Option<&Path>) -> Result<PathBuf> {
    offline_dir(dir)
        .ok_or_else(|| Failure::usage("the directory with the offline keys is not here"))
        .next_step(|| {
            "Give the files with --key, or --dir the directory that has offline/.".to_owned()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATOR: &str = "server = \"localhost:7444\"\ntrust_domain = \"example\"\noperator = \"op\"\n\
        certificate = \"operator.crt\"\nkey = \"operator.key\"\nnode_ca = \"node-ca.crt\"\nroot = \"root.json\"\n";
    const SERVER: &str =
        "trust_domain = \"example\"\nnode_id = \"n\"\n[listen]\ndevices = \"0.0.0.0:7443\"\n";

    fn installation() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (part, text) in [("operator", OPERATOR), ("server", SERVER)] {
            fs::create_dir_all(dir.path().join(part)).unwrap();
            fs::write(dir.path().join(part).join(FILE_NAME), text).unwrap();
        }
        fs::create_dir(dir.path().join("offline")).unwrap();
        dir
    }

    #[test]
    fn the_operators_part_is_found_from_every_part() {
        let dir = installation();
        for part in ["", "operator", "server"] {
            let config = OperatorConfig::find(Some(&dir.path().join(part))).unwrap();
            assert_eq!(config.server, "localhost:7444", "from {part:?}");
            assert!(config.key.ends_with("operator/operator.key"));
        }
        assert!(offline_dir(Some(dir.path())).is_some());
        assert!(offline_dir(Some(&dir.path().join("operator"))).is_some());
    }

    #[test]
    fn a_servers_configuration_with_a_mistake_is_found_all_the_same() {
        let dir = installation();
        let path = dir.path().join("server").join(FILE_NAME);
        fs::write(&path, format!("{SERVER}oops\n")).unwrap();
        for part in ["", "server"] {
            assert!(
                find_server_config(Some(&dir.path().join(part)), None).is_ok(),
                "from {part:?}"
            );
        }
    }

    #[test]
    fn the_servers_part_is_told_from_the_operators() {
        let dir = installation();
        for part in ["", "server"] {
            let path = find_server_config(Some(&dir.path().join(part)), None).unwrap();
            assert!(path.ends_with("server/fwpush.toml"), "{path:?}");
        }
        assert!(find_server_config(Some(&dir.path().join("operator")), None).is_err());
    }

    #[test]
    fn a_directory_without_an_installation_is_wrong_usage() {
        let dir = tempfile::tempdir().unwrap();
        let failure = OperatorConfig::find(Some(dir.path())).unwrap_err();
        assert_eq!(failure.exit(), crate::failure::Exit::Usage);
    }

    #[test]
    fn a_mistyped_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        fs::write(&path, OPERATOR.replace("node_ca", "nodeca")).unwrap();
        let failure = OperatorConfig::load(&path).unwrap_err();
        assert!(failure.to_string().contains("nodeca"), "{failure}");
    }
}
