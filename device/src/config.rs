//! `agent.toml`. Relative paths are relative to the file; an unknown key is an error, so that a typo is not a default.

use std::{
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
    attributes::{self, Attributes},
    health::{Health, HealthCheck},
    limits,
    settings::{AgentSettings, TransferSettings},
    slots::{Bootloader, FileSlotsSettings, SlotsSettings},
    window::Window,
};

mod link;
mod owner;
mod running;
mod service;
mod slots;
mod transfer;

use link::LinkSection;
use owner::{HooksSection, InstallSection, Problem, check_command, check_seconds};
use running::{Running, RunningSection};
pub use service::RebootSettings;
use service::ServiceSection;
use slots::SlotsSection;
use transfer::TransferSection;

/// A configuration file that was read and checked. What it names is not opened yet, but the file of `[running]` and
/// `mirror_ca_file`.
#[derive(Debug, Clone)]
pub struct Config {
    file: ConfigFile,
    path: PathBuf,
    transfer: TransferSettings,
    window: Option<Window>,
    running: Running,
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
    attributes: Attributes,
    attributes_dir: Option<PathBuf>,
    identity: IdentitySection,
    slots: SlotsSection,
    running: RunningSection,
    #[serde(default)]
    health: HealthSection,
    #[serde(default)]
    link: LinkSection,
    #[serde(default)]
    transfer: TransferSection,
    #[serde(default)]
    hooks: HooksSection,
    #[serde(default)]
    install: InstallSection,
    #[serde(default)]
    service: ServiceSection,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentitySection {
    certificate: PathBuf,
    key: PathBuf,
    node_ca: PathBuf,
    root: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthSection {
    command: Option<Vec<String>>,
    timeout_s: Option<u64>,
    confirm_timeout_s: Option<u64>,
}

impl Config {
    /// Reads and checks a file; opens nothing that it names but `running.file` and `mirror_ca_file`.
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
        Self::checked(file, path).map_err(|(key, problem)| ConfigError::Value {
            path: path.into(),
            key,
            problem,
        })
    }

    fn checked(file: ConfigFile, path: &Path) -> Result<Self, Problem> {
        if file.servers.is_empty() || file.servers.len() > limits::SERVERS {
            let most = limits::SERVERS;
            let problem = format!("must list 1 to {most} servers as \"HOST:PORT\"");
            return Err(("servers", problem));
        }
        if let Some(server) = file.servers.iter().find(|server| !is_host_and_port(server)) {
            let problem =
                format!("has {server:?}; write \"HOST:PORT\", such as \"updates.example:7443\"");
            return Err(("servers", problem));
        }
        if file.channels.is_empty() || file.channels.len() > limits::CHANNELS {
            let most = limits::CHANNELS;
            let problem = format!("must list 1 to {most} channels, such as \"stable\"");
            return Err(("channels", problem));
        }
        if !attributes::fit(&file.attributes) {
            let (pairs, bytes) = (limits::ATTRIBUTES, limits::ATTRIBUTES_BYTES);
            let problem = format!("may have at most {pairs} pairs and {bytes} bytes");
            return Err(("attributes", problem));
        }
        file.slots.check()?;
        check_command("health.command", file.health.command.as_deref())?;
        check_seconds("health.timeout_s", file.health.timeout_s)?;
        check_seconds("health.confirm_timeout_s", file.health.confirm_timeout_s)?;
        file.hooks.check()?;
        file.link.check()?;
        file.service.check()?;
        let dir = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            transfer: file.transfer.settings(dir)?,
            window: file.install.window()?,
            running: file.running.read(dir)?,
            file,
            path: path.into(),
        })
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
            built_in_floor: self.running.built_in_floor,
            trial_boots: file.slots.trial_boots(),
            reconnect: file.link.reconnect(),
            transfer: self.transfer.clone(),
            hooks: file.hooks.hooks(),
            install_window: self.window.clone(),
            attributes_dir: file
                .attributes_dir
                .as_deref()
                .map(|path| self.resolve(path)),
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

    /// Whether this is a bench, whose bootloader the agent plays.
    pub fn is_emulated(&self) -> bool {
        matches!(
            self.slots(),
            SlotsSettings::Files(FileSlotsSettings {
                bootloader: Bootloader::Emulated,
                ..
            })
        )
    }

    /// How the board is rebooted.
    pub fn reboot(&self) -> RebootSettings {
        self.file.service.reboot()
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
        Ok(IdentityFiles {
            credentials,
            node_ca,
            first_root: self.first_root()?,
        })
    }

    /// Reads the first root.
    pub fn first_root(&self) -> Result<Vec<u8>, ConfigError> {
        let root = self.resolve(&self.file.identity.root);
        fs::read(&root).map_err(|source| ConfigError::Read { path: root, source })
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
