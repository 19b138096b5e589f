//! The real binary as a service: what systemd hears, and how it ends.

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use fwpush_keys::{
    Ca, Role, Root, SigningKey, Timestamp, id::Identity, new_key_and_csr, root::ProductRule,
};

/// A device's directory: certificates, root, slots, `agent.toml`. No server is there.
struct Device(tempfile::TempDir);

impl Device {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        let now = Timestamp::now();
        let domain = "example".parse().unwrap();
        let device_ca = Ca::generate(Role::Device, &domain, now, 10).unwrap();
        let node_ca = Ca::generate(Role::Node, &domain, now, 10).unwrap();
        let (key, csr) = new_key_and_csr().unwrap();
        let identity = Identity {
            trust_domain: domain,
            role: Role::Device,
            id: "dev-1".into(),
        };
        let certificate = device_ca
            .issue_for_csr(&csr, &identity, &[], now, 9)
            .unwrap();
        let [root_key, release_key] = [1, 2].map(|number| SigningKey::from_secret(&[number; 32]));
        let expires = now.saturating_add(Duration::from_secs(1_000_000));
        let (root_role, release_role) = ([root_key.public()], [release_key.public()]);
        let mut root = Root::first(now, expires, (1, &root_role), (1, &release_role));
        root.products
            .insert("gateway".parse().unwrap(), ProductRule::new(1_000));
        let mut root = root.to_envelope().unwrap();
        root.sign(&root_key).unwrap();
        write("device.crt", certificate.as_bytes());
        write("device.key", key.as_bytes());
        write("node-ca.crt", node_ca.cert_pem().as_bytes());
        write("root.json", &root.to_bytes());
        write("agent.toml", CONFIG.as_bytes());
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fwpush-device"));
        command
            .arg("--config")
            .arg(self.path().join("agent.toml"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let Output { status, stderr, .. } = self.command().args(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        (status.code().unwrap(), stderr)
    }
}

const CONFIG: &str = r#"
servers = ["127.0.0.1:9"]
trust_domain = "example"
client_id = "dev-1"
product = "gateway"
hw_id = "board-a"
channels = ["stable"]
state_dir = "state"
[identity]
certificate = "device.crt"
key = "device.key"
node_ca = "node-ca.crt"
root = "root.json"
[slots]
kind = "files"
a = "slot-a.img"
b = "slot-b.img"
capacity_bytes = 1048576
boot_record = "boot.rec"
[running]
version = "1.0.0"
"#;

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the service manager has heard each of these as often as it stands here, in any order.
fn hear(socket: &UnixDatagram, wanted: &[&str]) {
    let mut wanted = wanted.to_vec();
    let mut buffer = [0; 4096];
    let begun = Instant::now();
    while !wanted.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "{wanted:?} was not said");
        let length = socket.recv(&mut buffer).unwrap();
        let said = String::from_utf8_lossy(&buffer[..length]);
        if let Some(at) = wanted.iter().position(|words| said.starts_with(words)) {
            wanted.remove(at);
        }
    }
}

/// For a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn systemd_hears_that_it_is_ready_alive_and_stopping() {
    let device = Device::new();
    let socket = UnixDatagram::bind(device.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = device.command();
    command
        .env("NOTIFY_SOCKET", device.path().join("notify"))
        .env("WATCHDOG_USEC", "200000")
        .stderr(Stdio::null());
    let mut running = Running(command.spawn().unwrap());
    hear(
        &socket,
        &[
            "READY=1",
            "STATUS=not connected: ",
            "WATCHDOG=1",
            "WATCHDOG=1",
            "WATCHDOG=1",
        ],
    );
    let pid = rustix::process::Pid::from_child(&running.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    hear(&socket, &["STOPPING=1"]);
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
    // The image runs confirmed: nothing is on trial.
    assert_eq!(device.run(&["status", "--on-trial"]).0, 1);
    assert_eq!(device.run(&["status"]).0, 0);
}

#[test]
fn what_keeps_it_from_starting_is_told_by_the_exit_code_and_in_words() {
    let device = Device::new();
    let (code, said) = device.run(&["status"]);
    assert_eq!(code, 4, "{said}");
    fs::write(device.path().join("state"), "a file").unwrap();
    let (code, said) = device.run(&["--once"]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("state"), "{said}");
    fs::write(device.path().join("node-ca.crt"), "no certificate").unwrap();
    fs::remove_file(device.path().join("state")).unwrap();
    let (code, said) = device.run(&["--once"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("identity.node_ca"), "{said}");
    let config = CONFIG.replace("hw_id", "hwid");
    fs::write(device.path().join("agent.toml"), config).unwrap();
    let (code, said) = device.run(&["--once"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("hwid"), "{said}");
}
