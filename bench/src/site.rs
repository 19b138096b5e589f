//! An installation in a temporary directory: certificates, trust root and configuration, made for one run.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use fwpush_keys::{
    Ca, Credentials, DeviceId, HwId, HwRange, Identity, NodeId, OperatorId, Product, ProductRule,
    Release, ReleaseId, Requires, RevocationVersion, Role, Root, SanName, SigningKey, Timestamp,
    TrustDomain, new_key_and_csr,
    release::Component,
    tls::{certificates_from_pem, client_config},
};
use rustls::{pki_types::CertificateDer, time_provider::DefaultTimeProvider};
use tempfile::TempDir;

use crate::image::Image;

/// Life of everything that is signed here: a run takes minutes.
const DAYS: u32 = 1;

/// Hardware revision of every device.
pub const HW_REV: u32 = 1;

/// The installation. Its directory is removed when this is dropped.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    pub trust_domain: TrustDomain,
    pub product: Product,
    pub hw_id: HwId,
    pub node_ca: Vec<CertificateDer<'static>>,
    /// The first root, DSSE envelope.
    pub root: Vec<u8>,
    pub operator: Credentials,
    release_key: SigningKey,
    /// One key for all devices: making thousands would only take time. Certificates differ.
    device_key: zeroize::Zeroizing<String>,
    /// The request for it.
    pub device_csr: String,
}

impl Site {
    /// Makes an installation whose server listens on free ports of the loopback address.
    pub fn make() -> Result<Self> {
        let dir = TempDir::with_prefix("fwpush-bench-").context("make a temporary directory")?;
        let trust_domain: TrustDomain = "bench".parse()?;
        let product: Product = "bench".parse()?;
        let now = Timestamp::now();
        let files = Files { base: dir.path() };
        for part in ["pki", "trust", "data"] {
            files.make_dir(part)?;
        }

        let ca = |role| Ca::generate(role, &trust_domain, now, 1).context("make an authority");
        let (device_ca, node_ca, operator_ca) =
            (ca(Role::Device)?, ca(Role::Node)?, ca(Role::Operator)?);
        files.write("pki/device-ca.crt", device_ca.cert_pem())?;
        files.write("pki/device-ca.key", device_ca.key_pem())?;
        files.write("pki/node-ca.crt", node_ca.cert_pem())?;
        files.write("pki/operator-ca.crt", operator_ca.cert_pem())?;

        let node_id: NodeId = "node-1".parse()?;
        let names: [SanName; 1] = ["127.0.0.1".parse()?];
        let (node_key, csr) = new_key_and_csr()?;
        let node = node_ca.issue_for_csr(
            &csr,
            &Identity::node(&trust_domain, &node_id),
            &names,
            now,
            DAYS,
        )?;
        files.write("pki/node.crt", node)?;
        files.write("pki/node.key", node_key)?;

        let operator_id: OperatorId = "bench".parse()?;
        let (operator_key, csr) = new_key_and_csr()?;
        let identity = Identity::operator(&trust_domain, &operator_id);
        let operator = operator_ca.issue_for_csr(&csr, &identity, &[], now, DAYS)?;

        let release_key = SigningKey::generate();
        let root = first_root(&product, &release_key, now)?;
        files.write("trust/1.root.json", &root)?;
        files.write("fwpush.toml", CONFIG)?;

        let (device_key, device_csr) = new_key_and_csr()?;
        Ok(Self {
            operator: Credentials::from_pem(&operator, &operator_key)?,
            node_ca: certificates_from_pem(&node_ca.cert_pem())?,
            hw_id: "board".parse()?,
            dir,
            trust_domain,
            product,
            root,
            release_key,
            device_key,
            device_csr,
        })
    }

    /// The server's configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("fwpush.toml")
    }

    /// The signed manifest of `image` as version 1.`minor`.0, for every device here.
    pub fn release(&self, image: &Image, minor: u64) -> Result<(ReleaseId, Vec<u8>)> {
        let now = Timestamp::now();
        let release = Release {
            product: self.product.clone(),
            channel: "stable".parse()?,
            release_id: ReleaseId::new_v7(now),
            version: semver::Version::new(1, minor, 0),
            seq: minor,
            security_counter: 0,
            revocation_version: RevocationVersion::NONE,
            issued: now,
            expires: after_a_day(now),
            hw: vec![HwRange {
                id: self.hw_id.clone(),
                rev_min: HW_REV,
                rev_max: HW_REV,
            }],
            requires: Requires::default(),
            min_agent: None,
            class: None,
            advisory_url: None,
            components: vec![Component::plain(
                "system",
                image.size(),
                image.id,
                image.sha256,
            )],
            crit: Vec::new(),
        };
        let mut envelope = release.to_envelope()?;
        envelope.sign(&self.release_key)?;
        Ok((release.release_id, envelope.to_bytes()))
    }

    /// The key of every device with the certificate of one.
    pub fn device(&self, certificate_pem: &str) -> Result<Credentials> {
        Ok(Credentials::from_pem(certificate_pem, &self.device_key)?)
    }

    /// Makes the directory of a device whose slots hold `capacity` bytes; gives its `agent.toml`, which sets nothing that has a
    /// default, but that nobody boots it.
    pub fn device_files(
        &self,
        id: &DeviceId,
        certificate_pem: &str,
        server: SocketAddr,
        capacity: u64,
    ) -> Result<PathBuf> {
        let (trust_domain, product, hw_id) = (&self.trust_domain, &self.product, &self.hw_id);
        let files = Files {
            base: self.dir.path(),
        };
        files.make_dir("device")?;
        files.write("device/device.crt", certificate_pem)?;
        files.write("device/device.key", self.device_key.as_bytes())?;
        files.write(
            "device/agent.toml",
            format!(
                r#"servers = ["{server}"]
trust_domain = "{trust_domain}"
client_id = "{id}"
product = "{product}"
hw_id = "{hw_id}"
hw_rev = {HW_REV}
channels = ["stable"]
state_dir = "state"

[identity]
certificate = "device.crt"
key = "device.key"
node_ca = "../pki/node-ca.crt"
root = "../trust/1.root.json"

[slots]
kind = "files"
a = "slot-a.img"
b = "slot-b.img"
capacity_bytes = {capacity}
boot_record = "boot.rec"
boot = "emulated"

[running]
version = "1.0.0"
security_counter = 0
"#
            ),
        )?;
        Ok(self.dir.path().join("device/agent.toml"))
    }

    /// TLS towards the servers.
    pub fn tls(&self, credentials: Credentials) -> Result<Arc<rustls::ClientConfig>> {
        let time = Arc::new(DefaultTimeProvider);
        Ok(Arc::new(client_config(
            credentials,
            self.node_ca.clone(),
            &self.trust_domain,
            time,
        )?))
    }
}

/// `kind` and a number, such as `idle-17`.
pub fn device_id(kind: &str, number: u32) -> Result<DeviceId> {
    Ok(format!("{kind}-{number}").parse()?)
}

/// Heartbeats and reconnects would disturb what is measured.
const CONFIG: &str = r#"trust_domain = "bench"
node_id = "node-1"

[listen]
devices = "127.0.0.1:0"
operators = "127.0.0.1:0"
metrics = "127.0.0.1:0"

[limits]
heartbeat_interval_s = 3600
reconnect_spread_s = 0
"#;

fn first_root(product: &Product, release_key: &SigningKey, now: Timestamp) -> Result<Vec<u8>> {
    let root_key = SigningKey::generate();
    let mut root = Root::first(
        now,
        after_a_day(now),
        (1, &[root_key.public()]),
        (1, &[release_key.public()]),
    );
    root.products.insert(product.clone(), ProductRule::new(1));
    let mut envelope = root.to_envelope()?;
    envelope.sign(&root_key)?;
    Ok(envelope.to_bytes())
}

fn after_a_day(now: Timestamp) -> Timestamp {
    now.saturating_add(Duration::from_secs(u64::from(DAYS) * 86_400))
}

struct Files<'a> {
    base: &'a Path,
}

impl Files<'_> {
    fn make_dir(&self, name: &str) -> Result<()> {
        let path = self.base.join(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("make {}", path.display()))
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let path = self.base.join(name);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(content.as_ref()))
            .with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use fwpush_keys::Verified;

    use super::*;

    #[test]
    fn a_release_of_the_site_is_accepted_under_its_root() {
        let site = Site::make().unwrap();
        let image = Image::random(100_000).unwrap();
        let (id, envelope) = site.release(&image, 1).unwrap();
        let root = Verified::bootstrap(&site.root).unwrap();
        let release = root.verify_release(&site.product, &envelope).unwrap();
        assert_eq!((release.release_id, release.plain().size), (id, 100_000));
    }

    #[test]
    fn the_directory_goes_with_the_site() {
        let site = Site::make().unwrap();
        let config = site.config();
        assert!(config.is_file());
        drop(site);
        assert!(!config.parent().unwrap().exists());
    }
}
