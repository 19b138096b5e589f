//! A site: a directory made by `fwpush init`, with its server as a process of its own.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use fwpush_keys::{
    Ca, DeviceId, Role, TrustDomain,
    tls::{Credentials, certificates_from_pem},
};
use fwpush_proto::v1::admin_service_client::AdminServiceClient;
use fwpush_services::s3::{ACCESS_KEY_ID, BUCKET, S3};
use rustix::process::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{
    bins::bin,
    client::Certificates,
    process::{Finished, Process, run},
};

/// The product of every test.
pub const PRODUCT: &str = "gateway";
/// The hardware of every test, revision 1.
pub const HW: &str = "board-a";

/// A directory made by `fwpush init`, and its server while it runs.
#[derive(Debug)]
pub struct Site {
    temp: TempDir,
    server: Option<Process>,
    pub devices: SocketAddr,
    pub operators: SocketAddr,
    pub metrics: SocketAddr,
}

/// A release that the server has.
#[derive(Clone, Debug)]
pub struct Published {
    pub release_id: String,
    pub file_id: String,
}

/// An address that nobody takes before the test does: on a loopback host of its own, because ports of 127.0.0.1 are given to
/// whatever connects or listens meanwhile.
pub fn free_address() -> SocketAddr {
    let [a, b, c]: [u8; 3] = rand::random();
    let host = Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254));
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap()
}

impl Site {
    /// Makes a site on free ports; the server is not started.
    pub fn new() -> Self {
        let temp = TempDir::with_prefix("fwpush-test-").unwrap();
        let site = Self {
            devices: free_address(),
            operators: free_address(),
            metrics: free_address(),
            temp,
            server: None,
        };
        let init = site.fwpush_raw(&[
            "init",
            site.dir().to_str().unwrap(),
            "--trust-domain",
            "test",
            "--product",
            PRODUCT,
        ]);
        run(init).ok();
        site.edit_config(|config| {
            let listen = config["listen"].as_table_mut().unwrap();
            listen.insert("devices".into(), site.devices.to_string().into());
            listen.insert("operators".into(), site.operators.to_string().into());
            listen.insert("metrics".into(), site.metrics.to_string().into());
            listen.insert("advertise".into(), vec![site.devices.to_string()].into());
            let limits = config
                .entry("limits")
                .or_insert(toml::Table::new().into())
                .as_table_mut()
                .unwrap();
            // Tests reconnect often and wait for it.
            limits.insert("reconnect_spread_s".into(), 0.into());
            limits.insert("heartbeat_interval_s".into(), 5.into());
        });
        site.edit("operator/fwpush.toml", |config| {
            config.insert("server".into(), site.operators.to_string().into());
        });
        site
    }

    /// Makes a site and starts its server.
    pub fn started() -> Self {
        let mut site = Self::new();
        site.start();
        site
    }

    /// Has the server use another database from its next start on.
    pub fn use_database(&self, url: &str) {
        self.edit_config(|config| {
            let database = toml::Table::from_iter([("url".to_owned(), url.into())]);
            config.insert("database".into(), database.into());
        });
    }

    /// The directory given to `fwpush init`.
    pub fn dir(&self) -> PathBuf {
        self.temp.path().join("site")
    }

    /// A place beside it, for images and devices.
    pub fn temp(&self) -> &Path {
        self.temp.path()
    }

    /// Changes the server's configuration; takes effect at the next start or reload.
    pub fn edit_config(&self, change: impl FnOnce(&mut toml::Table)) {
        self.edit("server/fwpush.toml", change);
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut toml::Table)) {
        let path = self.dir().join(file);
        let mut config: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&mut self) {
        let server = Process::spawn(self.serve_command());
        server.line_with("The server accepts connections");
        self.server = Some(server);
    }

    /// The command that [`Self::start`] runs, for a test that runs it in its own way.
    pub fn serve_command(&self) -> Command {
        let mut command = Command::new(bin("fwpush"));
        command
            .args(["serve", "--dir"])
            .arg(self.dir())
            .env("FWPUSH_LOG", "info");
        command
    }

    /// The running server.
    pub fn server(&mut self) -> &mut Process {
        self.server.as_mut().expect("the server was started")
    }

    /// SIGKILL.
    pub fn kill_server(&mut self) {
        self.server().kill();
    }

    /// SIGTERM, and waits for the drain to end.
    pub fn stop_server(&mut self) {
        self.server().signal(Signal::TERM);
        assert!(
            self.server().wait().success(),
            "{}",
            self.server().lines().join("\n")
        );
    }

    /// Runs `fwpush --dir DIR ARGS...` to its end.
    pub fn fwpush(&self, args: &[&str]) -> Finished {
        run(self.fwpush_raw(args))
    }

    /// The command that [`Self::fwpush`] runs.
    pub fn fwpush_raw(&self, args: &[&str]) -> Command {
        let mut command = Command::new(bin("fwpush"));
        if args.first() != Some(&"init") {
            command.arg("--dir").arg(self.dir());
        }
        command
            .args(args)
            .env_remove("FWPUSH_DIR")
            .current_dir(self.temp.path());
        command
    }

    /// An image of pseudo-random bytes; the same seed gives the same bytes.
    pub fn image(&self, name: &str, bytes: usize, seed: u64) -> PathBuf {
        let path = self.temp.path().join(name);
        fs::write(&path, random_bytes(bytes, seed)).unwrap();
        path
    }

    /// Releases `image` as `version` to every device and waits until the rollout is complete.
    pub fn release(&self, image: &Path, version: &str) -> Finished {
        self.fwpush(
            &self
                .release_args(image, version, &[])
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        )
    }

    /// As [`Self::release`], with more arguments.
    pub fn release_with(&self, image: &Path, version: &str, more: &[&str]) -> Finished {
        self.fwpush(
            &self
                .release_args(image, version, more)
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        )
    }

    /// Publishes an image, without a rollout.
    pub fn publish(&self, image: &Path, product: &str, version: &str) -> Published {
        let manifest = self.temp.path().join(format!("{product}-{version}.json"));
        let (image, file) = (image.to_str().unwrap(), manifest.to_str().unwrap());
        // Releases may be made within the same second here.
        static SEQ: AtomicU64 = AtomicU64::new(1);
        let seq = SEQ.fetch_add(1, Ordering::Relaxed).to_string();
        let mut build = vec![
            "release",
            "build",
            image,
            "--product",
            product,
            "--version",
            version,
            "--hw",
            HW,
        ];
        build.extend(["--seq", &seq, "--out", file]);
        self.fwpush(&build).ok();
        self.fwpush(&["release", "sign", file]).ok();
        let published = self
            .fwpush(&["release", "publish", file, "--image", image, "--json"])
            .ok()
            .json();
        let text = |key: &str| published[key].as_str().unwrap().to_owned();
        Published {
            release_id: text("release_id"),
            file_id: text("file_id"),
        }
    }

    fn release_args(&self, image: &Path, version: &str, more: &[&str]) -> Vec<String> {
        let mut args = vec![
            "release",
            image.to_str().unwrap(),
            "--product",
            PRODUCT,
            "--version",
            version,
        ];
        args.extend(["--hw", HW, "--yes"]);
        if !more.contains(&"--to") {
            args.extend(["--to", "all"]);
        }
        args.extend(more);
        args.into_iter().map(str::to_owned).collect()
    }

    /// Adds a device with a working agent configuration; gives the directory with `agent.toml`.
    pub fn add_device(&self, id: &str) -> PathBuf {
        let dir = self.temp.path().join("devices").join(id);
        fs::create_dir_all(dir.parent().unwrap()).unwrap();
        let hw = format!("{HW}:1");
        self.fwpush(&[
            "device",
            "add",
            id,
            "--product",
            PRODUCT,
            "--hw",
            &hw,
            "--out",
            dir.to_str().unwrap(),
        ])
        .ok();
        dir
    }

    /// Adds `count` devices for the simulator; gives its `--pki` directory.
    pub fn add_fleet(&self, prefix: &str, count: usize) -> PathBuf {
        let dir = self.temp.path().join(format!("fleet-{prefix}"));
        let (hw, count) = (format!("{HW}:1"), count.to_string());
        let args = [
            "device",
            "add",
            prefix,
            "--count",
            &count,
            "--product",
            PRODUCT,
            "--hw",
            &hw,
            "--out",
        ];
        let mut args = args.to_vec();
        args.push(dir.to_str().unwrap());
        self.fwpush(&args).ok();
        dir
    }

    /// The certificates of a device that [`Self::add_device`] made.
    pub fn device_certificates(&self, id: &str) -> Certificates {
        let dir = self.temp.path().join("devices").join(id);
        self.certificates(&dir.join("device.crt"), &dir.join("device.key"))
    }

    /// The operator's certificates.
    pub fn operator_certificates(&self) -> Certificates {
        let dir = self.dir().join("operator");
        self.certificates(&dir.join("operator.crt"), &dir.join("operator.key"))
    }

    /// The node's own certificates: what an attacker has who took the server over.
    pub fn node_certificates(&self) -> Certificates {
        let dir = self.dir().join("server/pki");
        self.certificates(&dir.join("node.crt"), &dir.join("node.key"))
    }

    fn certificates(&self, certificate: &Path, key: &Path) -> Certificates {
        self.certificates_of((read(certificate), read(key)))
    }

    /// Certificate and key (PEM) of anybody who wants to talk to this site.
    pub fn certificates_of(&self, (certificate_pem, key_pem): (String, String)) -> Certificates {
        Certificates {
            certificate_pem,
            key_pem,
            node_ca_pem: read(&self.dir().join("server/pki/node-ca.crt")),
            trust_domain: self.trust_domain(),
        }
    }

    /// An authority of the site, with its key.
    pub fn authority(&self, role: Role) -> Ca {
        let part = if role == Role::Device {
            "server/pki"
        } else {
            "offline"
        };
        let file = |end: &str| read(&self.dir().join(part).join(format!("{role}-ca.{end}")));
        Ca::load(&file("crt"), &file("key")).unwrap()
    }

    /// The operators' calls.
    pub async fn admin(&self) -> AdminServiceClient<Channel> {
        let server = self.operators.to_string();
        AdminServiceClient::new(self.operator_certificates().connect(&server).await.unwrap())
    }

    /// A device's connection.
    pub async fn connect(&self, id: &str) -> Channel {
        self.device_certificates(id)
            .connect(&self.devices.to_string())
            .await
            .unwrap()
    }

    pub fn trust_domain(&self) -> TrustDomain {
        "test".parse().unwrap()
    }

    /// What `fwpush device show` says, as JSON.
    pub fn device(&self, id: &str) -> serde_json::Value {
        self.fwpush(&["device", "show", id, "--json"]).ok().json()
    }

    /// Status line and body of a plain GET from the listener of probes and metrics.
    pub fn get(&self, path: &str) -> (String, String) {
        get(self.metrics, path)
    }

    /// The server's metrics.
    pub fn metrics_text(&self) -> String {
        self.get("/metrics").1
    }
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

/// Status line and body of a plain GET.
pub fn get(address: SocketAddr, path: &str) -> (String, String) {
    use std::io::{Read as _, Write as _};
    let mut tcp = std::net::TcpStream::connect(address).unwrap();
    tcp.set_read_timeout(Some(crate::wait::LONG)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Pseudo-random bytes; the same seed gives the same bytes.
pub fn random_bytes(bytes: usize, seed: u64) -> Vec<u8> {
    use rand::{RngExt as _, SeedableRng as _};
    let mut content = vec![0; bytes];
    rand::rngs::StdRng::seed_from_u64(seed).fill(&mut content[..]);
    content
}

/// A device id.
pub fn device_id(id: &str) -> DeviceId {
    id.parse().unwrap()
}

/// Credentials of a pair of PEM texts.
pub fn credentials(certificate: &str, key: &str) -> Credentials {
    Credentials::from_pem(certificate, key).unwrap()
}

/// The certificates in a PEM text.
pub fn authorities(pem: &str) -> Vec<rustls::pki_types::CertificateDer<'static>> {
    certificates_from_pem(pem).unwrap()
}

/// Has a server bear three minutes of silence: for tests whose own streams say nothing while something slow happens.
pub fn bear_silence(config: &mut toml::Table) {
    let limits = config["limits"].as_table_mut().unwrap();
    limits.insert("heartbeat_interval_s".into(), 60.into());
}

/// `[files]` for the images in this bucket; the secret key is in the file `secret`.
pub fn in_bucket(s3: &S3, secret: &str) -> toml::Value {
    let text = |text: &str| toml::Value::from(text);
    let files = [
        ("url", text(&format!("s3://{BUCKET}"))),
        ("endpoint", text(&s3.endpoint())),
        ("allow_http", true.into()),
        ("access_key_id", text(ACCESS_KEY_ID)),
        ("secret_key_file", text(secret)),
    ];
    let files = files.map(|(key, value)| (key.to_owned(), value));
    toml::Table::from_iter(files).into()
}
