//! `fwpush.toml`, the server's configuration.

mod reload;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use fwpush_keys::id::{NodeId, TrustDomain};
use serde::Deserialize;

use crate::{
    db::{Options, Place, PlaceError, TlsMode},
    files::{FileStore, Files, FilesError, FilesPlace},
    limits,
    listen::Proxies,
    mirrors::Mirrors,
    route::{self, RedisPlace},
};

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
    pub cluster: Cluster,
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
    /// Addresses and networks of the fronts that pass devices on to this node. Connections to `devices` from there must begin with a
    /// header of the PROXY protocol, version 2; those to `operators` never do.
    #[serde(default)]
    pub proxies: Proxies,
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

/// Where the durable state is. The environment decides before the file: [`DATABASE_URL`], [`DATABASE_PASSWORD_FILE`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `sqlite:<path>` or `postgres://<user>@<host>:<port>/<database>`, without a password.
    pub url: String,
    /// A file that holds the password of a PostgreSQL database.
    pub password_file: Option<PathBuf>,
    /// Authorities by which a PostgreSQL server is known, beside public ones.
    pub ca_file: Option<PathBuf>,
    /// Absent: in full, but for this machine's own server.
    pub tls: Option<TlsMode>,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: "sqlite:data/fwpush.db".into(),
            password_file: None,
            ca_file: None,
            tls: None,
        }
    }
}

/// Environment variables that stand above `[database] url` and `password_file`.
pub const DATABASE_URL: &str = "FWPUSH_DATABASE_URL";
pub const DATABASE_PASSWORD_FILE: &str = "FWPUSH_DATABASE_PASSWORD_FILE";

/// What the nodes of a cluster share beside the database and the images, and how they reach one another. The environment decides
/// before the file: [`REDIS_URL`], [`REDIS_PASSWORD_FILE`], [`NODE_ID`], [`ADVERTISE_ADDR`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// `redis://<host>:<port>` or `rediss://<host>:<port>`, without a password. Absent: this node serves alone.
    pub redis_url: Option<String>,
    /// A file that holds the password of Redis.
    pub redis_password_file: Option<PathBuf>,
    /// Authorities by which a `rediss:` server is known, instead of the system's.
    pub redis_ca_file: Option<PathBuf>,
    /// This node's name, above the one at the top of the file: for a file that all nodes share.
    pub node_id: Option<NodeId>,
    /// `host:port` at which other nodes reach this node's listener for operators.
    pub advertise_addr: Option<String>,
}

/// Environment variables that stand above `[cluster]`.
pub const REDIS_URL: &str = "FWPUSH_REDIS_URL";
pub const REDIS_PASSWORD_FILE: &str = "FWPUSH_REDIS_PASSWORD_FILE";
pub const NODE_ID: &str = "FWPUSH_NODE_ID";
pub const ADVERTISE_ADDR: &str = "FWPUSH_ADVERTISE_ADDR";

/// How this node is one of several: [`Config::cluster`], checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    pub redis: RedisPlace,
    pub advertise_addr: String,
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
    /// 0 .. 604,800: devices begin an update after a random part of this.
    pub update_spread_s: u64,
}

impl Default for Tunables {
    fn default() -> Self {
        Self {
            connections: limits::CONNECTIONS,
            handshakes_per_address: limits::HANDSHAKES_PER_ADDRESS,
            downloads: limits::DOWNLOADS,
            heartbeat_interval_s: limits::HEARTBEAT_INTERVAL.as_secs(),
            reconnect_spread_s: limits::RECONNECT_SPREAD.as_secs(),
            update_spread_s: 0,
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
        Self::parse(&text, path, |name| std::env::var(name).ok())
    }

    /// The configuration of a directory made by `fwpush init`: `DIR/server/fwpush.toml`.
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        Self::load(&dir.join("server").join("fwpush.toml"))
    }

    /// `env` gives the environment's variables.
    fn parse(
        text: &str,
        path: &Path,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.path = path.to_owned();
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        if let Some(url) = env(DATABASE_URL) {
            config.database.url = url;
        }
        if let Some(file) = env(DATABASE_PASSWORD_FILE) {
            config.database.password_file = Some(file.into());
        }
        config
            .files
            .overlay(env)
            .map_err(|error| config.files_problem(error))?;
        config.take_cluster(env)?;
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

    /// What the environment says of the cluster, and the name that this node goes by in the end.
    fn take_cluster(&mut self, env: impl Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        let cluster = &mut self.cluster;
        if let Some(url) = env(REDIS_URL) {
            cluster.redis_url = Some(url);
        }
        if let Some(file) = env(REDIS_PASSWORD_FILE) {
            cluster.redis_password_file = Some(file.into());
        }
        if let Some(address) = env(ADVERTISE_ADDR) {
            cluster.advertise_addr = Some(address);
        }
        let named = match env(NODE_ID) {
            None => cluster.node_id.clone(),
            Some(id) => Some(id.parse().map_err(|_| {
                let problem =
                    format!("is {id:?} by the environment's {NODE_ID}, which is not an id");
                self.problem("cluster.node_id", problem)
            })?),
        };
        if let Some(id) = named {
            self.node_id = id;
        }
        Ok(())
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
        between(
            "limits.update_spread_s",
            limits.update_spread_s,
            0,
            crate::limits::UPDATE_SPREAD_MAX.as_secs(),
        )?;
        self.files_place()?;
        self.mirrors(None)?;
        self.place()?;
        self.membership()?;
        if !self
            .listen
            .advertise
            .iter()
            .all(|name| is_host_and_port(name))
        {
            return Err(self.problem("listen.advertise", "must list `host:port` names".to_owned()));
        }
        Ok(())
    }

    /// Where the images are.
    pub fn files_place(&self) -> Result<FilesPlace, ConfigError> {
        self.files
            .place(self.base())
            .map_err(|error| self.files_problem(error))
    }

    /// Directory of the image store; `None`: it is a bucket.
    pub fn files_dir(&self) -> Result<Option<PathBuf>, ConfigError> {
        Ok(match self.files_place()? {
            FilesPlace::Directory { path, .. } => Some(path),
            FilesPlace::S3(_) => None,
        })
    }

    fn files_problem(&self, FilesError { key, problem }: FilesError) -> ConfigError {
        self.problem(key, problem)
    }

    /// Where else devices find the files of `store`.
    pub fn mirrors(&self, store: Option<&FileStore>) -> Result<Mirrors, ConfigError> {
        let store = store.filter(|_| self.files.presign);
        Mirrors::new(self.files.mirror_url.as_deref(), store.cloned())
            .map_err(|problem| self.problem("files.mirror_url", problem.to_string()))
    }

    /// Where the database is.
    pub fn place(&self) -> Result<Place, ConfigError> {
        let Database {
            url,
            password_file,
            ca_file,
            tls,
        } = &self.database;
        let options = Options {
            password_file: password_file.clone(),
            ca_file: ca_file.clone(),
            tls: *tls,
        };
        let wrong = |PlaceError { key, problem }| {
            let key = match key {
                "password_file" => "database.password_file",
                "ca_file" => "database.ca_file",
                "tls" => "database.tls",
                _ => "database.url",
            };
            self.problem(key, problem)
        };
        Place::parse(url, &options, self.base()).map_err(wrong)
    }

    /// How this node is one of several; None: it serves alone.
    pub fn membership(&self) -> Result<Option<Membership>, ConfigError> {
        let Cluster {
            redis_url,
            redis_password_file,
            redis_ca_file,
            advertise_addr,
            ..
        } = &self.cluster;
        let Some(url) = redis_url else {
            let alone = [
                ("cluster.redis_password_file", redis_password_file.is_some()),
                ("cluster.redis_ca_file", redis_ca_file.is_some()),
                ("cluster.advertise_addr", advertise_addr.is_some()),
            ];
            return match alone.into_iter().find(|(_, given)| *given) {
                None => Ok(None),
                Some((key, _)) => Err(self.problem(
                    key,
                    "is for a node of a cluster: set `redis_url` too, or leave it out".to_owned(),
                )),
            };
        };
        let wrong = |route::PlaceError { key, problem }| {
            let key = match key {
                "redis_password_file" => "cluster.redis_password_file",
                "redis_ca_file" => "cluster.redis_ca_file",
                _ => "cluster.redis_url",
            };
            self.problem(key, problem)
        };
        let redis = RedisPlace::parse(
            url,
            redis_password_file.as_deref(),
            redis_ca_file.as_deref(),
            self.base(),
        )
        .map_err(wrong)?;
        if let Place::Sqlite(_) = self.place()? {
            let problem = "makes this a node of a cluster, whose nodes share one database: \
                set `[database] url` to a `postgres:` one, or leave it out"
                .to_owned();
            return Err(self.problem("cluster.redis_url", problem));
        }
        if !self.files_place()?.is_shared() {
            let problem = "is a directory of this node, and the nodes of a cluster share their images: set it to an `s3:` one, or \
                `shared = true` beside it where all nodes have the directory (NFS)"
                .to_owned();
            return Err(self.problem("files.url", problem));
        }
        match advertise_addr {
            Some(address) if is_host_and_port(address) => Ok(Some(Membership {
                redis,
                advertise_addr: address.clone(),
            })),
            Some(_) => {
                Err(self.problem("cluster.advertise_addr", "must be `host:port`".to_owned()))
            }
            None => Err(self.problem(
                "cluster.advertise_addr",
                "is missing: set the `host:port` at which other nodes reach `listen.operators` of this one"
                    .to_owned(),
            )),
        }
    }

    /// Directory of what belongs to this node and no other: the lock, and room for work.
    pub fn data_dir(&self) -> PathBuf {
        match self.place() {
            Ok(Place::Sqlite(path)) => path.parent().unwrap_or(self.base()).to_owned(),
            _ => self.base().join("data"),
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

fn is_host_and_port(name: &str) -> bool {
    let port = name
        .rsplit_once(':')
        .map(|(host, port)| (host, port.parse::<u16>()));
    matches!(port, Some((host, Ok(1..))) if !host.is_empty() && !name.contains(char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const LEAST: &str = "trust_domain = \"example\"\nnode_id = \"n1\"\n[listen]\ndevices = \"127.0.0.1:0\"\noperators = \"127.0.0.1:0\"\n";

    pub(super) fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/fwpush/fwpush.toml"), |_| None)
    }

    #[test]
    fn defaults_are_found_beside_the_file() {
        let config = parse(LEAST).unwrap();
        assert_eq!(config.pki.key, Path::new("/etc/fwpush/pki/node.key"));
        assert_eq!(
            config.files_dir().unwrap().as_deref(),
            Some(Path::new("/etc/fwpush/data/files"))
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
        let http = format!("{LEAST}[files]\nmirror_url = \"http://cdn.example/fw\"\n");
        let refused = parse(&http).unwrap_err().to_string();
        assert!(
            refused.contains("`files.mirror_url` must be `https://"),
            "{refused}"
        );
    }

    #[test]
    fn a_node_of_a_cluster_is_told_what_it_lacks() {
        let refused = |lines: &str| parse(&format!("{LEAST}{lines}")).unwrap_err().to_string();
        let lonely = refused("[cluster]\nadvertise_addr = \"fw-1:7444\"\n");
        assert!(lonely.contains("set `redis_url` too"), "{lonely}");
        let sqlite =
            refused("[cluster]\nredis_url = \"redis://cache\"\nadvertise_addr = \"fw-1:7444\"\n");
        assert!(sqlite.contains("`[database] url`"), "{sqlite}");
        let postgres =
            "[database]\nurl = \"postgres://fw@db/fw\"\n[cluster]\nredis_url = \"redis://cache\"\n";
        let alone = refused(&format!("{postgres}advertise_addr = \"fw-1:7444\"\n"));
        assert!(
            alone.contains("`files.url`") && alone.contains("shared = true"),
            "{alone}"
        );
        let postgres = &format!("[files]\nshared = true\n{postgres}");
        let unreachable = refused(postgres);
        assert!(
            unreachable.contains("`cluster.advertise_addr` is missing"),
            "{unreachable}"
        );
        let nowhere = refused(&format!("{postgres}advertise_addr = \"fw-1\"\n"));
        assert!(nowhere.contains("must be `host:port`"), "{nowhere}");
    }

    #[test]
    fn one_file_serves_all_nodes_by_the_environment() {
        let text = format!(
            "{LEAST}[files]\nshared = true\n[database]\nurl = \"postgres://fw@db/fw\"\n[cluster]\nnode_id = \"n2\"\n"
        );
        let path = Path::new("/etc/fwpush/fwpush.toml");
        let alone = Config::parse(&text, path, |_| None).unwrap();
        assert_eq!(
            (alone.node_id.as_str(), alone.membership().unwrap()),
            ("n2", None)
        );
        let env = |name: &str| match name {
            NODE_ID => Some("n3".to_owned()),
            REDIS_URL => Some("redis://cache".to_owned()),
            ADVERTISE_ADDR => Some("fw-3:7444".to_owned()),
            _ => None,
        };
        let third = Config::parse(&text, path, env).unwrap();
        assert_eq!(third.node_id.as_str(), "n3");
        let member = third.membership().unwrap().unwrap();
        assert_eq!(
            (
                member.redis.to_string().as_str(),
                member.advertise_addr.as_str()
            ),
            ("redis://cache:6379", "fw-3:7444")
        );
        let wrong = |name: &str| (name == NODE_ID).then(|| "no id".to_owned());
        let words = Config::parse(&text, path, wrong).unwrap_err().to_string();
        assert!(words.contains("FWPUSH_NODE_ID"), "{words}");
    }

    #[test]
    fn the_environment_decides_where_the_database_is() {
        let env = |name: &str| match name {
            DATABASE_URL => Some("postgres://fw@db.example/fw".to_owned()),
            DATABASE_PASSWORD_FILE => Some("/run/secrets/db".to_owned()),
            _ => None,
        };
        let text = format!("{LEAST}[database]\nurl = \"sqlite:a.db\"\n");
        let config = Config::parse(&text, Path::new("/etc/fwpush/fwpush.toml"), env).unwrap();
        let place = config.place().unwrap().to_string();
        assert_eq!(place, "postgres://fw@db.example:5432/fw");
        assert_eq!(config.data_dir(), Path::new("/etc/fwpush/data"));
        let empty = Config::parse(&text, Path::new("/f.toml"), |_| Some(String::new())).unwrap();
        assert_eq!(empty.place().unwrap(), Place::sqlite("/a.db"));
    }

    #[test]
    fn what_is_wrong_with_the_database_is_named_without_its_password() {
        let refused = |lines: &str| {
            parse(&format!("{LEAST}[database]\n{lines}\n"))
                .unwrap_err()
                .to_string()
        };
        let words = refused("url = \"postgres://fw:s3cret@db/fw\"");
        assert!(
            words.contains("`database.url`") && words.contains("password_file"),
            "{words}"
        );
        assert!(!words.contains("s3cret"), "{words}");
        let words = refused("ca_file = \"ca.crt\"");
        assert!(
            words.contains("`database.ca_file` goes with a `postgres:` url only"),
            "{words}"
        );
        let words = refused("url = \"postgres://fw@db/fw\"\ntls = \"prefer\"");
        assert!(words.contains("verify-full"), "{words}");
    }
}
