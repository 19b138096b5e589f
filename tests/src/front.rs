//! Fronts of a cluster: one made by hand that says whatever a test wants, and a real HAProxy with the configuration that the
//! documentation has.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream as StdTcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use fwpush_device::channel::{Dial, Dialling, Io, server_name};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_rustls::TlsConnector;

use crate::{http2::connect_from, process::Process, site::free_address, wait::until};

/// Where a node sees HAProxy come from: another address than that of its peers, which come from 127.0.0.1.
pub const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 9, 9, 9);

/// A header of the PROXY protocol, version 2: command and version, family and protocol, what it claims to hold, what it holds
/// (section 2.2 of its specification).
pub fn header(command: u8, family: u8, claims: u16, rest: &[u8]) -> Vec<u8> {
    let signature = b"\r\n\r\n\0\r\nQUIT\n";
    [
        signature,
        &[command, family][..],
        &claims.to_be_bytes(),
        rest,
    ]
    .concat()
}

/// The header of a front that passes on TCP over IPv4 for `peer`.
pub fn header_for(peer: SocketAddrV4) -> Vec<u8> {
    let node = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7443);
    let ports = [peer.port().to_be_bytes(), node.port().to_be_bytes()].concat();
    let addresses = [&peer.ip().octets()[..], &node.ip().octets(), &ports].concat();
    header(0x21, 0x11, 12, &addresses)
}

/// The header of a front that looks whether the node is there.
pub fn header_of_a_probe() -> Vec<u8> {
    header(0x20, 0x00, 0, &[])
}

/// Connects as a front does: sends a header, then is the peer.
#[derive(Debug, Clone)]
pub struct Through(pub Vec<u8>);

impl Through {
    /// A connection on which the header was sent.
    pub async fn tcp(&self, node: SocketAddr) -> io::Result<TcpStream> {
        let mut tcp = connect_from(None, node).await?;
        tcp.write_all(&self.0).await?;
        Ok(tcp)
    }
}

impl Dial for Through {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let node = server.parse().map_err(io::Error::other)?;
            let tcp = self.tcp(node).await?;
            let tls = TlsConnector::from(tls)
                .connect(server_name(server)?, tcp)
                .await?;
            Ok(Box::new(tls) as Box<dyn Io>)
        })
    }
}

/// A running HAProxy in front of nodes, as `docs/front/haproxy.cfg` has it.
#[derive(Debug)]
pub struct Haproxy {
    /// Where devices connect.
    pub address: SocketAddr,
    program: PathBuf,
    config: PathBuf,
    process: Process,
    _dir: TempDir,
}

impl Haproxy {
    /// In front of one node, or of two: where each listens for devices and for probes. None, and a line that says so: HAProxy is not
    /// installed.
    pub async fn before(nodes: &[(SocketAddr, SocketAddr)]) -> Option<Self> {
        let program = program()?;
        let dir = TempDir::with_prefix("fwpush-haproxy-").unwrap();
        let (address, config) = (free_address(), dir.path().join("haproxy.cfg"));
        fs::write(&config, configuration(address, nodes)).unwrap();
        let front = Self {
            address,
            process: start(&program, &config),
            program,
            config,
            _dir: dir,
        };
        front.listens().await;
        Some(front)
    }

    /// SIGKILL, with every connection through it, and a new start on the same address.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = start(&self.program, &self.config);
        self.listens().await;
    }

    async fn listens(&self) {
        until("HAProxy to listen", || async {
            let tried = StdTcpStream::connect(self.address);
            tried
                .map(drop)
                .map_err(|error| (error, self.process.lines()))
        })
        .await;
    }
}

fn start(program: &Path, config: &Path) -> Process {
    // -db: one process, in the foreground.
    Process::start(program, ["-db".as_ref(), "-f".as_ref(), config.as_os_str()])
}

/// HAProxy, which is not in every user's PATH.
fn program() -> Option<PathBuf> {
    let runs = |program: &Path| {
        let mut version = Command::new(program);
        let version = version.arg("-v").stdout(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    let mut places = ["haproxy", "/usr/sbin/haproxy"]
        .into_iter()
        .map(PathBuf::from);
    let found = places.find(|program| runs(program));
    if found.is_none() {
        println!("SKIPPED: haproxy is not installed (Debian: apt-get install haproxy)");
    }
    found
}

/// The documentation's configuration with the addresses of this test. Each thing that is replaced must be there.
fn configuration(address: SocketAddr, nodes: &[(SocketAddr, SocketAddr)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/front/haproxy.cfg");
    let mut config = fs::read_to_string(path).unwrap();
    let mut put = |old: &str, new: &str| {
        assert_eq!(config.matches(old).count(), 1, "{old} in:\n{config}");
        config = config.replace(old, new);
    };
    put("bind :7443", &format!("bind {address}"));
    put("source 10.0.0.5", &format!("source {SOURCE}"));
    // Its descriptors come out of the limit that all tests share.
    put("maxconn 26000", "maxconn 1000");
    for (number, node) in [(1, "10.0.0.11"), (2, "10.0.0.12")] {
        let line = format!("    server node-{number} {node}:7443 addr {node} port 7445\n");
        let own = nodes.get(number - 1).map(|(devices, metrics)| {
            let (ip, port) = (metrics.ip(), metrics.port());
            format!("    server node-{number} {devices} addr {ip} port {port}\n")
        });
        put(&line, &own.unwrap_or_default());
    }
    config
}
