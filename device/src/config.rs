//! `agent.toml`. Relative paths are relative to the file; an unknown key is an error, so that a typo is not a default.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use fwpush_keys::{
    error_text,
    id::{Channel, DeviceId, HwId, Product, TrustDomain},
    tls::{Credentials, certificates_from_pem},
};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use thiserror::Error;

use crate::{
    health::{Health, HealthCheck},
    limits,
    settings::{AgentSettings, TransferSettings},
};

mod slots;

use slots::SlotsSection;

/// A configuration file that was read and checked. What it names is not opened yet.
#[derive(Debug, Clone)]
pub struct Config {
    file: ConfigFile,
    path: PathBuf,
}

/// Certificates and the first root, read from where the configuration says.
#[derive(Debug)]
pub struct IdentityFiles {
    pub credentials: Credentials,
    pub node_ca: Vec<CertificateDer<'static>>,
    pub first_root: Vec<u8>,
}

/// What is wrong with a configuration, and what to do about it.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {message}", path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("{}: {key} {problem}", path.display())]
    Value {
        path: PathBuf,
        key: &'static str,
        problem: String,
    },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    servers: Vec<String>,
    trust_domain: TrustDomain,
    client_id: DeviceId,
    product: Product,
    hw_id: HwId,
    #[serde(default)]
    hw_rev: u32,
    channels: Vec<Channel>,
    state_dir: PathBuf,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
    identity: IdentitySection,
    slots: SlotsSection,
    running: RunningSection,
    #[serde(default)]
    health: HealthSection,
    #[serde(default)]
    transfer: TransferSection,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentitySection {
    certificate: PathBuf,
    key: PathBuf,
    node_ca: PathBuf,
    root: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunningSection {
    version: semver::Version,
    #[serde(default)]
    security_counter: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthSection {
    command: Option<Vec<String>>,
    timeout_s: Option<u64>,
    confirm_timeout_s: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TransferSection {
    stream_window_bytes: Option<u32>,
    connection_window_bytes: Option<u32>,
    max_frame_bytes: Option<u32>,
    chunk_bytes: Option<u32>,
    bandwidth_limit_bytes_per_s: Option<u64>,
    #[serde(default)]
    mirror_hosts: Vec<String>,
}

impl Config {
    /// Reads and checks a file; opens nothing that it names.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.into(),
            message: error.to_string(),
        })?;
        let config = Self {
            file,
            path: path.into(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let file = &self.file;
        let wrong = |key, problem: String| {
            Err(ConfigError::Value {
                path: self.path.clone(),
                key,
                problem,
            })
        };
        if file.servers.is_empty() || file.servers.len() > limits::SERVERS {
            return wrong(
                "servers",
                format!(
                    "must list 1 to {} servers as \"HOST:PORT\"",
                    limits::SERVERS
                ),
            );
        }
        if let Some(server) = file.servers.iter().find(|server| !is_host_and_port(server)) {
            return wrong(
                "servers",
                format!("has {server:?}; write \"HOST:PORT\", such as \"updates.example:7443\""),
            );
        }
        if file.channels.is_empty() || file.channels.len() > limits::CHANNELS {
            return wrong(
                "channels",
                format!(
                    "must list 1 to {} channels, such as \"stable\"",
                    limits::CHANNELS
                ),
            );
        }
        let attribute_bytes: usize = file
            .attributes
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        if file.attributes.len() > limits::ATTRIBUTES || attribute_bytes > limits::ATTRIBUTES_BYTES
        {
            let problem = format!(
                "may have at most {} pairs and {} bytes",
                limits::ATTRIBUTES,
                limits::ATTRIBUTES_BYTES
            );
            return wrong("attributes", problem);
        }
        if let Err((key, problem)) = file.slots.check() {
            return wrong(key, problem);
        }
        if file.health.command.as_ref().is_some_and(Vec::is_empty) {
            return wrong(
                "health.command",
                "must name a program; leave it out for no check of your own".into(),
            );
        }
        self.check_transfer()
    }

    fn check_transfer(&self) -> Result<(), ConfigError> {
        let transfer = self.transfer();
        let (frames, chunks) = (limits::FRAME_BYTES_RANGE, limits::CHUNK_BYTES_RANGE);
        let windows = limits::WINDOW_BYTES_MIN..=limits::WINDOW_BYTES_MAX;
        let values = [
            (
                "transfer.stream_window_bytes",
                transfer.stream_window_bytes,
                windows.clone(),
            ),
            (
                "transfer.connection_window_bytes",
                transfer.connection_window_bytes,
                windows,
            ),
            ("transfer.max_frame_bytes", transfer.max_frame_bytes, frames),
            ("transfer.chunk_bytes", transfer.chunk_bytes, chunks),
        ];
        for (key, value, range) in values {
            if !range.contains(&value) {
                let problem = format!(
                    "is {value}; {} to {} is allowed",
                    range.start(),
                    range.end()
                );
                return Err(ConfigError::Value {
                    path: self.path.clone(),
                    key,
                    problem,
                });
            }
        }
        Ok(())
    }

    fn resolve(&self, path: &Path) -> PathBuf {
        // An absolute path replaces the folder.
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }

    /// How the agent is to behave.
    pub fn settings(&self) -> AgentSettings {
        let file = &self.file;
        AgentSettings {
            channels: file.channels.clone(),
            attributes: file.attributes.clone(),
            // The factory image passed the factory's tests: it is the first floor.
            built_in_floor: file.running.security_counter,
            trial_boots: file.slots.trial_boots(),
            transfer: self.transfer(),
            ..AgentSettings::new(
                file.servers.clone(),
                file.trust_domain.clone(),
                file.client_id.clone(),
                file.product.clone(),
                file.hw_id.clone(),
                file.hw_rev,
                file.channels[0].clone(),
            )
        }
    }

    fn transfer(&self) -> TransferSettings {
        let section = &self.file.transfer;
        let default = TransferSettings::default();
        TransferSettings {
            stream_window_bytes: section
                .stream_window_bytes
                .unwrap_or(default.stream_window_bytes),
            connection_window_bytes: section
                .connection_window_bytes
                .unwrap_or(default.connection_window_bytes),
            max_frame_bytes: section.max_frame_bytes.unwrap_or(default.max_frame_bytes),
            chunk_bytes: section.chunk_bytes.unwrap_or(default.chunk_bytes),
            retry: default.retry,
            bandwidth_limit: section.bandwidth_limit_bytes_per_s,
            mirror_hosts: section.mirror_hosts.clone(),
        }
    }

    /// Where state is kept.
    pub fn state_dir(&self) -> PathBuf {
        self.resolve(&self.file.state_dir)
    }

    /// How a new image is judged.
    pub fn health(&self) -> Health {
        let section = &self.file.health;
        let timeout = section
            .timeout_s
            .map_or(limits::HEALTH_TIMEOUT, Duration::from_secs);
        Health {
            check: section
                .command
                .clone()
                .map(|argv| HealthCheck::Command { argv, timeout }),
            confirm_timeout: section
                .confirm_timeout_s
                .map_or(limits::CONFIRM_TIMEOUT, Duration::from_secs),
        }
    }

    /// Reads the certificates, the key and the first root.
    pub fn identity(&self) -> Result<IdentityFiles, ConfigError> {
        let section = &self.file.identity;
        let value = |key, problem| ConfigError::Value {
            path: self.path.clone(),
            key,
            problem,
        };
        let text = |path: &Path| {
            let path = self.resolve(path);
            fs::read_to_string(&path).map_err(|source| ConfigError::Read { path, source })
        };
        let (certificate, key) = (text(&section.certificate)?, text(&section.key)?);
        let credentials = Credentials::from_pem(&certificate, &key)
            .map_err(|error| value("identity.certificate, identity.key", error_text(&error)))?;
        let node_ca = certificates_from_pem(&text(&section.node_ca)?)
            .map_err(|error| value("identity.node_ca", error_text(&error)))?;
        let root = self.resolve(&section.root);
        let first_root =
            fs::read(&root).map_err(|source| ConfigError::Read { path: root, source })?;
        Ok(IdentityFiles {
            credentials,
            node_ca,
            first_root,
        })
    }
}

fn is_host_and_port(server: &str) -> bool {
    let Some((host, port)) = server.rsplit_once(':') else {
        return false;
    };
    !host.is_empty()
        && port.parse::<u16>().is_ok_and(|port| port > 0)
        && crate::channel::server_name(server).is_ok()
}

#[cfg(test)]
mod tests;
