//! `fwpush.toml`, the server's configuration.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use fwpush_keys::id::{NodeId, TrustDomain};
use serde::Deserialize;

use crate::limits;

/// Why a configuration cannot be used; the message names the file and what to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read the configuration {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Parse {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{}: `{key}` {problem}", path.display())]
    Value {
        path: PathBuf,
        key: &'static str,
        problem: String,
    },
}

/// The server's configuration, with every relative path resolved against the file's directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name in every certificate of this installation: `fwpush://<trust-domain>/...`.
    pub trust_domain: TrustDomain,
    pub node_id: NodeId,
    pub listen: Listen,
    #[serde(default)]
    pub pki: Pki,
    #[serde(default)]
    pub trust: Trust,
    #[serde(default)]
    pub database: Database,
    #[serde(default)]
    pub files: Files,
    #[serde(default)]
    pub limits: Tunables,
    /// The file this was read from.
    #[serde(skip)]
    pub path: PathBuf,
}

/// Where to listen; port 0 takes a free one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    pub devices: SocketAddr,
    pub operators: SocketAddr,
    /// Prometheus metrics and health over plain HTTP; absent: none.
    pub metrics: Option<SocketAddr>,
    /// `host:port` that new devices are told to connect to; empty: this node's listening addresses.
    #[serde(default)]
    pub advertise: Vec<String>,
}

/// Certificates and the two private keys that a server has: its own, and that of the device CA.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pki {
    pub device_ca: PathBuf,
    pub device_ca_key: PathBuf,
    pub node_ca: PathBuf,
    pub operator_ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Default for Pki {
    fn default() -> Self {
        Self {
            device_ca: "pki/device-ca.crt".into(),
            device_ca_key: "pki/device-ca.key".into(),
            node_ca: "pki/node-ca.crt".into(),
            operator_ca: "pki/operator-ca.crt".into(),
            certificate: "pki/node.crt".into(),
            key: "pki/node.key".into(),
        }
    }
}

/// Trust documents that the server starts from; later ones are kept in the database.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trust {
    /// Directory with `1.root.json`.
    pub dir: PathBuf,
}

impl Default for Trust {
    fn default() -> Self {
        Self {
            dir: "trust".into(),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `sqlite:<path>`.
    pub url: String,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: "sqlite:data/fwpush.db".into(),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Files {
    /// `file:<directory>`.
    pub url: String,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            url: "file:data/files".into(),
        }
    }
}

/// Bounds that an installation may want to set; each default is explained in `limits.rs`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tunables {
    /// 1 .. 100,000.
    pub connections: usize,
    /// 1 .. 65,536: raise it where many devices sit behind one address.
    pub handshakes_per_address: usize,
    /// 1 .. 100,000.
    pub downloads: usize,
    /// 5 .. 3,600.
    pub heartbeat_interval_s: u64,
    /// 0 .. 3,600.
    pub reconnect_spread_s: u64,
}

impl Default for Tunables {
    fn default() -> Self {
        Self {
            connections: limits::CONNECTIONS,
            handshakes_per_address: limits::HANDSHAKES_PER_ADDRESS,
            downloads: limits::DOWNLOADS,
            heartbeat_interval_s: limits::HEARTBEAT_INTERVAL.as_secs(),
            reconnect_spread_s: limits::RECONNECT_SPREAD.as_secs(),
        }
    }
}

impl Config {
    /// Reads `fwpush.toml`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// The configuration of a directory made by `fwpush init`: `DIR/server/fwpush.toml`.
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        Self::load(&dir.join("server").join("fwpush.toml"))
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.path = path.to_owned();
        let base = path.parent().unwrap_or(Path::new("")).to_owned();
        let pki = &mut config.pki;
        for relative in [
            &mut pki.device_ca,
            &mut pki.device_ca_key,
            &mut pki.node_ca,
            &mut pki.operator_ca,
            &mut pki.certificate,
            &mut pki.key,
            &mut config.trust.dir,
        ] {
            *relative = base.join(&*relative);
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let between = |key, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(self.problem(key, format!("is {value}; it must be from {low} to {high}")))
        };
        let limits = &self.limits;
        between("limits.connections", limits.connections as u64, 1, 100_000)?;
        between(
            "limits.handshakes_per_address",
            limits.handshakes_per_address as u64,
            1,
            65_536,
        )?;
        between("limits.downloads", limits.downloads as u64, 1, 100_000)?;
        between(
            "limits.heartbeat_interval_s",
            limits.heartbeat_interval_s,
            5,
            3_600,
        )?;
        between(
            "limits.reconnect_spread_s",
            limits.reconnect_spread_s,
            0,
            3_600,
        )?;
        self.files_dir()?;
        if !self.database.url.starts_with("sqlite:") {
            let problem = "must begin with `sqlite:` followed by a path".to_owned();
            return Err(self.problem("database.url", problem));
        }
        if self
            .listen
            .advertise
            .iter()
            .any(|name| !name.contains(':') || name.contains(char::is_whitespace))
        {
            return Err(self.problem("listen.advertise", "must list `host:port` names".to_owned()));
        }
        Ok(())
    }

    /// Directory of the image store.
    pub fn files_dir(&self) -> Result<PathBuf, ConfigError> {
        match self.files.url.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(self.base().join(path)),
            _ => Err(self.problem(
                "files.url",
                "must begin with `file:` followed by a directory".to_owned(),
            )),
        }
    }

    /// Directory that relative paths start from.
    pub fn base(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    fn problem(&self, key: &'static str, problem: String) -> ConfigError {
        ConfigError::Value {
            path: self.path.clone(),
            key,
            problem,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "trust_domain = \"example\"\nnode_id = \"n1\"\n[listen]\ndevices = \"127.0.0.1:0\"\noperators = \"127.0.0.1:0\"\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/fwpush/fwpush.toml"))
    }

    #[test]
    fn defaults_are_found_beside_the_file() {
        let config = parse(LEAST).unwrap();
        assert_eq!(config.pki.key, Path::new("/etc/fwpush/pki/node.key"));
        assert_eq!(
            config.files_dir().unwrap(),
            Path::new("/etc/fwpush/data/files")
        );
    }

    #[test]
    fn a_wrong_value_is_named_with_its_range() {
        let error = parse(&format!("{LEAST}[limits]\nheartbeat_interval_s = 1\n")).unwrap_err();
        assert!(
            error.to_string().contains("limits.heartbeat_interval_s"),
            "{error}"
        );
        assert!(error.to_string().contains("from 5 to 3600"), "{error}");
        assert!(
            parse(&format!("{LEAST}[limits]\nheartbeats = 1\n")).is_err(),
            "a typing error is not ignored"
        );
        assert!(parse(&format!("{LEAST}[files]\nurl = \"ftp://x\"\n")).is_err());
    }
}
