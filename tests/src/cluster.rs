//! A cluster: one site, a private PostgreSQL and Redis, and nodes as processes of their own.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use fwpush_keys::{Identity, Role, SanName, Timestamp, pki::new_key_and_csr};
use fwpush_services::{Postgres, Redis, RedisOptions};
use rustix::process::Signal;

use crate::{
    bins::bin,
    client::Certificates,
    postgres::postgres,
    process::{Finished, Process, run},
    redis::redis_with,
    site::{Site, free_address},
    wait::until,
};

/// Nodes that serve one site together. The first one is the site's own server.
#[derive(Debug)]
pub struct Cluster {
    /// Its server is not started through it.
    pub site: Site,
    pub postgres: Postgres,
    pub redis: Redis,
    pub nodes: Vec<Node>,
}

/// One node. Its directory is laid out as `fwpush init` does it.
#[derive(Debug)]
pub struct Node {
    pub id: String,
    dir: PathBuf,
    pub devices: SocketAddr,
    pub operators: SocketAddr,
    pub metrics: SocketAddr,
    /// Of its process, beside what this one has.
    env: Vec<(&'static str, String)>,
    process: Option<Process>,
}

impl Cluster {
    /// Starts `count` nodes and waits until each has joined. None, and a line that says so: an engine is not installed.
    pub async fn start(count: usize) -> Option<Self> {
        Self::start_with(count, &RedisOptions::default(), |_| {}).await
    }

    /// As [`Self::start`]; `change` has a say in each node's configuration.
    pub async fn start_with(
        count: usize,
        options: &RedisOptions,
        change: impl Fn(&mut toml::Table),
    ) -> Option<Self> {
        Some(Self::start_on(postgres()?, redis_with(options)?, count, change).await)
    }

    /// As [`Self::start_with`], with these engines.
    pub async fn start_on(
        postgres: Postgres,
        redis: Redis,
        count: usize,
        change: impl Fn(&mut toml::Table),
    ) -> Self {
        let site = Site::new();
        let nodes = (1..=count)
            .map(|number| Node::make(&site, number))
            .collect();
        let mut cluster = Self {
            site,
            postgres,
            redis,
            nodes,
        };
        let all: Vec<String> = cluster.servers();
        for node in &cluster.nodes {
            node.edit_config(|config| {
                node.listens(config, &all);
                let url = cluster.postgres.url("fwpush");
                config.insert("database".into(), table([("url", url.into())]));
                let files = format!("file:{}", cluster.site.temp().join("files").display());
                let shared = [("url", files.into()), ("shared", true.into())];
                config.insert("files".into(), table(shared));
                let redis = cluster.redis.url();
                let address = node.operators.to_string();
                let member = [
                    ("redis_url", redis.into()),
                    ("advertise_addr", address.into()),
                ];
                config.insert("cluster".into(), table(member));
                change(config);
            });
        }
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.all_joined().await;
        cluster
    }

    /// Where devices connect, to each node.
    pub fn servers(&self) -> Vec<String> {
        self.nodes
            .iter()
            .map(|node| node.devices.to_string())
            .collect()
    }

    /// Runs `fwpush` as an operator of node number `node`.
    pub fn fwpush_at(&self, node: usize, args: &[&str]) -> Finished {
        self.nodes[node].fwpush(args)
    }

    /// Waits until every node that runs sees every other.
    pub async fn all_joined(&self) {
        let running: Vec<&Node> = self
            .nodes
            .iter()
            .filter(|node| node.process.is_some())
            .collect();
        for node in &running {
            until("all nodes to be up", || async {
                let status = node.status();
                let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
                let up = nodes.iter().filter(|node| node["state"] == "up").count();
                if up == running.len() {
                    Ok(())
                } else {
                    Err(status)
                }
            })
            .await;
        }
    }

    /// Waits until the registry of every node that runs counts `devices` in all.
    pub async fn all_registered(&self, devices: u64) {
        until("the registry to count every device", || async {
            let status = self.running().status();
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            let online: u64 = nodes
                .iter()
                .filter_map(|node| node["devices_online"].as_u64())
                .sum();
            if online == devices {
                Ok(())
            } else {
                Err(status)
            }
        })
        .await;
    }

    /// The first node that runs.
    pub fn running(&self) -> &Node {
        self.nodes
            .iter()
            .find(|node| node.process.is_some())
            .expect("a node runs")
    }
}

impl Node {
    fn make(site: &Site, number: usize) -> Self {
        let node = Self {
            id: format!("node-{number}"),
            dir: if number == 1 {
                site.dir()
            } else {
                site.temp().join(format!("node-{number}"))
            },
            devices: if number == 1 {
                site.devices
            } else {
                free_address()
            },
            operators: if number == 1 {
                site.operators
            } else {
                free_address()
            },
            metrics: if number == 1 {
                site.metrics
            } else {
                free_address()
            },
            env: Vec::new(),
            process: None,
        };
        if number > 1 {
            copy(&site.dir().join("server"), &node.dir.join("server"));
            copy(&site.dir().join("operator"), &node.dir.join("operator"));
            node.issue_certificate(site);
            let path = node.dir.join("operator/fwpush.toml");
            let mut config: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
            config.insert("server".into(), node.operators.to_string().into());
            fs::write(path, config.to_string()).unwrap();
        }
        node
    }

    fn issue_certificate(&self, site: &Site) {
        let (key, csr) = new_key_and_csr().unwrap();
        let identity = Identity::node(&site.trust_domain(), &self.id.parse().unwrap());
        let names: [SanName; 2] = ["localhost".parse().unwrap(), "127.0.0.1".parse().unwrap()];
        let authority = site.authority(Role::Node);
        let certificate = authority
            .issue_for_csr(&csr, &identity, &names, Timestamp::now(), 30)
            .unwrap();
        let pki = self.dir.join("server/pki");
        fs::write(pki.join("node.crt"), certificate).unwrap();
        fs::write(pki.join("node.key"), key.as_bytes()).unwrap();
    }

    fn listens(&self, config: &mut toml::Table, all: &[String]) {
        config.insert("node_id".into(), self.id.clone().into());
        let listen = config["listen"].as_table_mut().unwrap();
        listen.insert("devices".into(), self.devices.to_string().into());
        listen.insert("operators".into(), self.operators.to_string().into());
        listen.insert("metrics".into(), self.metrics.to_string().into());
        listen.insert("advertise".into(), all.to_vec().into());
    }

    /// Changes its configuration; takes effect at the next start or reload.
    pub fn edit_config(&self, change: impl FnOnce(&mut toml::Table)) {
        let path = self.dir.join("server/fwpush.toml");
        let mut config: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    /// Sets a variable of its environment, from its next start on.
    pub fn set_env(&mut self, name: &'static str, value: &str) {
        self.env.push((name, value.to_owned()));
    }

    /// Starts it and waits until it accepts connections.
    pub fn start(&mut self) {
        let mut command = Command::new(bin("fwpush"));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
            .args(["serve", "--dir"])
            .arg(&self.dir)
            .env("FWPUSH_LOG", "info");
        let process = Process::spawn(command);
        process.line_with("The server accepts connections");
        self.process = Some(process);
    }

    /// Its process.
    pub fn server(&mut self) -> &mut Process {
        self.process.as_mut().expect("the node was started")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.server().kill();
        self.process = None;
    }

    /// SIGTERM, and waits for the drain to end.
    pub fn stop(&mut self) {
        self.server().signal(Signal::TERM);
        let ended = self.server().wait();
        assert!(ended.success(), "{}", self.server().lines().join("\n"));
        self.process = None;
    }

    /// SIGSTOP: it is there and does nothing.
    pub fn freeze(&mut self) {
        self.server().signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&mut self) {
        self.server().signal(Signal::CONT);
    }

    /// Runs `fwpush` as an operator of this node.
    pub fn fwpush(&self, args: &[&str]) -> Finished {
        let mut command = Command::new(bin("fwpush"));
        command
            .arg("--dir")
            .arg(&self.dir)
            .args(args)
            .env_remove("FWPUSH_DIR");
        run(command)
    }

    /// What `fwpush cluster status` says, whatever its exit code.
    pub fn status(&self) -> serde_json::Value {
        self.fwpush(&["cluster", "status", "--json"]).json()
    }

    /// Status line and body of a plain GET from its listener of probes and metrics.
    pub fn get(&self, path: &str) -> (String, String) {
        crate::site::get(self.metrics, path)
    }

    /// A metric without labels.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let name = format!("{name} ");
        let text = self.get("/metrics").1;
        text.lines()
            .find_map(|line| line.strip_prefix(&name)?.parse().ok())
    }

    /// Connects as a device.
    pub async fn connect(&self, certificates: &Certificates) -> tonic::transport::Channel {
        certificates
            .connect(&self.devices.to_string())
            .await
            .unwrap()
    }
}

fn table<const N: usize>(entries: [(&str, toml::Value); N]) -> toml::Value {
    let entries = entries.map(|(key, value)| (key.to_owned(), value));
    toml::Table::from_iter(entries).into()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).unwrap();
        }
    }
}
