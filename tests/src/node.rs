//! A further node of a site, made by `fwpush node add`, with its server as a process of its own.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command};

use rustix::process::Signal;

use crate::{
    bins::bin,
    process::Process,
    site::{self, Site, free_address},
};

/// A directory made by `fwpush node add`, and its server while it runs.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    server: Option<Process>,
    pub devices: SocketAddr,
    pub operators: SocketAddr,
    pub metrics: SocketAddr,
}

impl Node {
    /// Makes a node of a site, whose database must be PostgreSQL; its server is not started.
    pub fn add(site: &Site, id: &str) -> Self {
        let dir = site.temp().join(id);
        let out = dir.to_str().unwrap();
        site.fwpush(&[
            "node",
            "add",
            id,
            "--server-name",
            "localhost",
            "--out",
            out,
        ])
        .ok();
        let node = Self {
            dir,
            server: None,
            devices: free_address(),
            operators: free_address(),
            metrics: free_address(),
        };
        let path = node.dir.join("server/fwpush.toml");
        let mut config: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        let listen = config["listen"].as_table_mut().unwrap();
        for (key, address) in [
            ("devices", node.devices),
            ("operators", node.operators),
            ("metrics", node.metrics),
        ] {
            listen.insert(key.into(), address.to_string().into());
        }
        fs::write(&path, config.to_string()).unwrap();
        node
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&mut self) {
        let mut command = Command::new(bin("fwpush"));
        command
            .args(["serve", "--dir"])
            .arg(&self.dir)
            .env("FWPUSH_LOG", "info");
        let server = Process::spawn(command);
        server.line_with("The server accepts connections");
        self.server = Some(server);
    }

    /// The running server.
    pub fn server(&mut self) -> &mut Process {
        self.server.as_mut().expect("the server was started")
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

    /// Status line and body of a plain GET from the listener of probes and metrics.
    pub fn get(&self, path: &str) -> (String, String) {
        site::get(self.metrics, path)
    }
}
