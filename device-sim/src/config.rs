//! What a fleet is made of.

use std::{
    collections::BTreeSet, fmt, fs, io, io::Read as _, ops::RangeInclusive, path::Path,
    path::PathBuf, sync::Arc, time::Duration,
};

use fwpush_device::{Dial, ReconnectSettings, TcpDial, TransferSettings};
use fwpush_keys::{Channel, DeviceId, HwId, Product, TrustDomain};
use semver::Version;
use zeroize::Zeroizing;

use crate::{
    faults::{BadShare, FaultShares},
    limits,
};

/// A fleet of devices of one product and hardware.
#[derive(Debug, Clone)]
pub struct FleetConfig {
    /// `host:port` each, at least one.
    pub servers: Vec<String>,
    pub pki: Pki,
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    pub channel: Channel,
    /// What every device runs at first.
    pub version: Version,
    /// Its security counter.
    pub security_counter: u64,
    /// Everything random follows from it.
    pub seed: u64,
    pub faults: FaultShares,
    /// Versions that come up unhealthy on every device, besides [`FaultShares::bad_health`].
    pub bad_versions: BTreeSet<Version>,
    /// Bytes a second that a device receives, drawn from the range for each; `None` for as fast as it goes.
    pub bandwidth: Option<RangeInclusive<u64>>,
    /// Added to all that a device receives, drawn from the range for each.
    pub delay: RangeInclusive<Duration>,
    /// Of each slot, bytes. Memory is taken only for what is written.
    pub slot_capacity: u64,
    pub transfer: TransferSettings,
    pub reconnect: ReconnectSettings,
    /// Agents that are started and not yet registered.
    pub starting_at_once: usize,
    /// How a server is reached, before the device's line and faults are put on it.
    pub dial: Arc<dyn Dial>,
}

impl FleetConfig {
    /// Devices of hardware revision 1, running 1.0.0, without faults.
    pub fn new(
        servers: Vec<String>,
        pki: Pki,
        product: Product,
        hw_id: HwId,
        channel: Channel,
    ) -> Self {
        Self {
            servers,
            pki,
            product,
            hw_id,
            hw_rev: 1,
            channel,
            version: Version::new(1, 0, 0),
            security_counter: 0,
            seed: 1,
            faults: FaultShares::default(),
            bad_versions: BTreeSet::new(),
            bandwidth: None,
            delay: Duration::ZERO..=Duration::ZERO,
            slot_capacity: limits::SLOT_CAPACITY_BYTES,
            transfer: TransferSettings::default(),
            reconnect: ReconnectSettings::default(),
            starting_at_once: limits::STARTING_AT_ONCE,
            dial: Arc::new(TcpDial),
        }
    }
}

/// What the devices are made known with and what they trust.
#[derive(Debug, Clone)]
pub struct Pki {
    pub trust_domain: TrustDomain,
    /// By which the devices know a server.
    pub node_ca_pem: String,
    /// The first trust root, DSSE envelope.
    pub root: Vec<u8>,
    pub devices: Vec<SimIdentity>,
}

/// A device's certificate and key.
#[derive(Clone)]
pub struct SimIdentity {
    pub id: DeviceId,
    pub cert_pem: String,
    pub key_pem: Zeroizing<String>,
}

impl fmt::Debug for SimIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimIdentity")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Pki {
    /// Reads the directory that `fwpush device add PREFIX --count N --out DIR` makes: `node-ca.crt`, `root.json`,
    /// `trust-domain`, and a directory with `device.crt` and `device.key` for each device. Takes the first `devices` of
    /// them by name, or all.
    pub fn load(dir: &Path, devices: Option<usize>) -> Result<Self, SimError> {
        let trust_domain = read_text(&dir.join("trust-domain"))?;
        let trust_domain = trust_domain
            .trim()
            .parse()
            .map_err(|source| SimError::TrustDomain {
                path: dir.join("trust-domain"),
                source,
            })?;
        let mut found = device_ids(dir)?;
        let wanted = devices.unwrap_or(found.len());
        if found.len() < wanted || found.is_empty() {
            return Err(SimError::TooFewDevices {
                dir: dir.to_owned(),
                found: found.len(),
                wanted,
            });
        }
        found.truncate(wanted);
        let identity = |id: DeviceId| {
            let dir = dir.join(id.as_str());
            Ok::<_, SimError>(SimIdentity {
                cert_pem: read_text(&dir.join("device.crt"))?,
                key_pem: Zeroizing::new(read_text(&dir.join("device.key"))?),
                id,
            })
        };
        Ok(Self {
            trust_domain,
            node_ca_pem: read_text(&dir.join("node-ca.crt"))?,
            root: read_text(&dir.join("root.json"))?.into_bytes(),
            devices: found.into_iter().map(identity).collect::<Result<_, _>>()?,
        })
    }
}

/// The directories that hold a device's certificate, by name.
fn device_ids(dir: &Path) -> Result<Vec<DeviceId>, SimError> {
    let failed = |source| SimError::Read {
        path: dir.to_owned(),
        source,
    };
    let mut ids = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.path().join("device.crt").is_file() {
            continue;
        }
        // A name that is no id cannot be a device's.
        if let Some(Ok(id)) = entry.file_name().to_str().map(str::parse) {
            ids.push(id);
        }
    }
    ids.sort();
    Ok(ids)
}

fn read_text(path: &Path) -> Result<String, SimError> {
    let failed = |source| SimError::Read {
        path: path.to_owned(),
        source,
    };
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(limits::FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > limits::FILE_BYTES {
        let large = format!("larger than {} bytes", limits::FILE_BYTES);
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, large)));
    }
    Ok(text)
}

/// Why a fleet cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} names no trust domain", path.display())]
    TrustDomain {
        path: PathBuf,
        source: fwpush_keys::InvalidId,
    },
    #[error(
        "{} has {found} devices; {wanted} are wanted: make them with `fwpush device add PREFIX --count {wanted} --out {}`",
        dir.display(), dir.display()
    )]
    TooFewDevices {
        dir: PathBuf,
        found: usize,
        wanted: usize,
    },
    #[error("a fleet has 1 to {} devices, not {devices}", limits::DEVICES)]
    FleetSize { devices: usize },
    #[error("device {0} is there twice")]
    Twice(DeviceId),
    #[error("no server is named")]
    NoServer,
    #[error("the range of {what} is empty or 0")]
    EmptyRange { what: &'static str },
    #[error(transparent)]
    Share(#[from] BadShare),
    #[error("the certificate and key of device {device}")]
    Credentials {
        device: DeviceId,
        source: fwpush_keys::TlsError,
    },
    #[error("the node CA's certificate")]
    NodeCa { source: fwpush_keys::TlsError },
    #[error(
        "{wanted} open files are needed and {limit} are allowed: raise the limit (`ulimit -n {wanted}`, or LimitNOFILE)"
    )]
    OpenFiles { wanted: u64, limit: u64 },
    #[error("raise the limit of open files to {wanted}")]
    RaiseOpenFiles { wanted: u64, source: io::Error },
}

/// Raises this process's limit of open files to what `sockets` and a little more take. Changes nothing when it is high
/// enough already.
pub fn raise_open_files(sockets: u64) -> Result<(), SimError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let wanted = sockets.saturating_add(limits::OTHER_OPEN_FILES);
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|limit| limit >= wanted) {
        return Ok(());
    }
    if let Some(limit) = now.maximum.filter(|limit| *limit < wanted) {
        return Err(SimError::OpenFiles { wanted, limit });
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum: now.maximum,
    };
    setrlimit(Resource::Nofile, raised).map_err(|errno| SimError::RaiseOpenFiles {
        wanted,
        source: errno.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(ids: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("trust-domain", "example\n");
        write("node-ca.crt", "CA");
        write("root.json", "{}");
        fs::create_dir(dir.path().join("not-a-device")).unwrap();
        for id in ids {
            fs::create_dir(dir.path().join(id)).unwrap();
            write(&format!("{id}/device.crt"), id);
            write(&format!("{id}/device.key"), "KEY");
        }
        dir
    }

    #[test]
    fn the_first_devices_by_name_are_taken() {
        let dir = directory(&["dev-2", "dev-3", "dev-1"]);
        let pki = Pki::load(dir.path(), Some(2)).unwrap();
        assert_eq!(pki.trust_domain.as_str(), "example");
        let ids: Vec<_> = pki
            .devices
            .iter()
            .map(|device| device.id.as_str())
            .collect();
        assert_eq!(ids, ["dev-1", "dev-2"]);
        assert_eq!(pki.devices[1].cert_pem, "dev-2");
        assert_eq!(Pki::load(dir.path(), None).unwrap().devices.len(), 3);
    }

    #[test]
    fn too_few_devices_are_an_error_that_says_how_to_make_more() {
        let error = Pki::load(directory(&["dev-1"]).path(), Some(2)).unwrap_err();
        assert!(error.to_string().contains("fwpush device add"), "{error}");
        assert!(Pki::load(directory(&[]).path(), None).is_err());
    }

    #[test]
    fn a_missing_or_endless_file_is_named() {
        let dir = directory(&["dev-1"]);
        fs::remove_file(dir.path().join("dev-1/device.key")).unwrap();
        let error = Pki::load(dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("dev-1/device.key"), "{error}");
        fs::write(dir.path().join("dev-1/device.key"), vec![b' '; 100_000]).unwrap();
        let error = Pki::load(dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("dev-1/device.key"), "{error}");
    }

    #[test]
    fn a_key_is_not_shown() {
        let pki = Pki::load(directory(&["dev-1"]).path(), None).unwrap();
        assert!(!format!("{pki:?}").contains("KEY"));
    }

    #[test]
    fn more_files_than_allowed_are_refused_with_the_figure() {
        raise_open_files(1).unwrap();
        let error = raise_open_files(u64::MAX / 2);
        if let Err(error) = error {
            assert!(error.to_string().contains("open files"), "{error}");
        }
    }
}
