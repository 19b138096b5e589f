//! The demo's cluster: private engines, and nodes that are processes of their own, so that one of them can be killed.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use device_sim::{DeviceStatus, Fleet};
use fwpush_keys::{
    Ca, DeviceId, Identity, NodeId, SanName, Timestamp, TrustDomain, new_key_and_csr,
};
use fwpush_services::{Error, Kept, Options, Postgres, Redis, RedisOptions, own_host};
use semver::Version;
use tokio::{net::TcpStream, time::Instant};

use super::{limits, site::Ports};
use crate::{
    config::FILE_NAME,
    disk,
    failure::{Doing as _, Failure, Result},
    limits::NODE_CERTIFICATE_DAYS,
};

/// The database on the private server.
const DATABASE: &str = "fwpush";

/// The file beside a node's configuration that holds the password of Redis.
const REDIS_PASSWORD: &str = "redis.password";

/// Above the configuration of each node.
const HEAD: &str =
    "# A node of `fwpush demo --nodes`. Its database and its Redis have ended with the demo.\n";

/// Several servers that share a database, a Redis and a store of images. Dropped, every process ends.
#[derive(Debug)]
pub struct Cluster {
    // In this order: nodes end before what they need.
    nodes: Vec<Node>,
    _engines: Engines,
}

/// What the nodes share.
#[derive(Debug)]
pub struct Engines {
    redis: Redis,
    redis_password: String,
    postgres: Postgres,
}

/// What every node's configuration says of them.
#[derive(Clone, Debug)]
struct Shared {
    database_url: String,
    redis_url: String,
    files_url: String,
}

/// One `fwpush serve`.
#[derive(Debug)]
struct Node {
    place: Place,
    process: Kept,
}

/// Where a node is: on a loopback host of its own, so that its ports stay free while it is away.
#[derive(Clone, Debug)]
pub struct Place {
    pub id: NodeId,
    pub host: Ipv4Addr,
    pub ports: Ports,
    /// Holds `server/`.
    dir: PathBuf,
    log: PathBuf,
}

/// A node that was killed.
#[derive(Clone, Debug)]
pub struct Loss {
    pub node: NodeId,
    /// Its listener for devices.
    address: SocketAddr,
    /// Those that were connected to it.
    devices: Vec<DeviceId>,
    /// Of the whole fleet, those whose update had not ended.
    pub unfinished: u64,
}

impl Engines {
    /// Starts them, empty. Names every package that is missing.
    pub async fn start() -> Result<Self> {
        let starting = tokio::task::spawn_blocking(|| {
            let password: [u8; 16] = rand::random();
            let redis_password = hex::encode(password);
            let redis = Redis::start(&RedisOptions {
                password: Some(redis_password.clone()),
                ..RedisOptions::default()
            });
            let postgres = Postgres::start(&Options::default());
            (redis_password, redis, postgres)
        });
        let (redis_password, redis, postgres) = starting
            .await
            .doing(|| "start Redis and PostgreSQL".to_owned())?;
        let missing = [redis.as_ref().err(), postgres.as_ref().err()];
        if let Some(failure) = missing_packages(&missing) {
            return Err(failure);
        }
        let redis = redis.doing(|| "start a private Redis".to_owned())?;
        let postgres = postgres.doing(|| "start a private PostgreSQL".to_owned())?;
        postgres
            .create_database(DATABASE)
            .doing(|| "make a database in the private PostgreSQL".to_owned())?;
        Ok(Self {
            redis,
            redis_password,
            postgres,
        })
    }
}

fn missing_packages(errors: &[Option<&Error>]) -> Option<Failure> {
    let missing = errors.iter().filter_map(|error| match error {
        Some(Error::Missing { program, package }) => Some((*program, *package)),
        _ => None,
    });
    let (programs, packages): (Vec<_>, Vec<_>) = missing.unzip();
    if packages.is_empty() {
        return None;
    }
    let missing = format!(
        "a cluster needs {}, which cannot be found on the PATH",
        programs.join(" and ")
    );
    Some(Failure::usage(missing).next(format!(
        "On Debian or Ubuntu: sudo apt-get install {}. Without --nodes the demo needs neither.",
        packages.join(" ")
    )))
}

/// The places of `count` nodes, whose first is the one that `init` makes in `dir`.
pub fn places(dir: &Path, count: u32) -> Result<Vec<Place>> {
    let place = |number: u32| {
        let name = format!("node-{number}");
        let host = own_host();
        Ok(Place {
            host,
            ports: Ports::free(host).doing(|| format!("find free ports for {name}"))?,
            dir: match number {
                1 => dir.to_owned(),
                _ => dir.join("nodes").join(&name),
            },
            log: dir.join("logs").join(format!("{name}.log")),
            id: name.parse().doing(|| "name a node".to_owned())?,
        })
    };
    (1..=count).map(place).collect()
}

impl Cluster {
    /// Makes the other nodes' directories after the first one's and starts them all; returns when they accept connections.
    pub async fn start(dir: &Path, places: Vec<Place>, engines: Engines) -> Result<Self> {
        let first = dir.join("server");
        let password = first.join(REDIS_PASSWORD);
        disk::write_new(&password, engines.redis_password.as_bytes())?;
        let files = absolute(&first.join("data").join("files"))?;
        let shared = Shared {
            database_url: engines.postgres.url(DATABASE),
            redis_url: engines.redis.url(),
            files_url: format!("file:{}", files.display()),
        };
        for (number, place) in places.iter().enumerate() {
            if number > 0 {
                make_directory(dir, place)?;
            }
            settle(place, &shared)?;
        }
        disk::private_dir(&dir.join("logs"))?;
        let mut cluster = Self {
            nodes: Vec::new(),
            _engines: engines,
        };
        for place in places {
            let process = launch(&place)?;
            cluster.nodes.push(Node { place, process });
            // The first makes the tables.
            if let [first] = &mut cluster.nodes[..] {
                first.ready().await?;
            }
        }
        for node in &mut cluster.nodes {
            node.ready().await?;
        }
        Ok(cluster)
    }

    /// Where devices connect.
    pub fn device_addresses(&self) -> Vec<SocketAddr> {
        let nodes = self.nodes.iter();
        nodes.map(|node| node.place.devices()).collect()
    }

    /// Where each node that runs tells of itself.
    pub fn metrics_addresses(&mut self) -> Result<Vec<SocketAddr>> {
        let mut running = Vec::new();
        for node in &mut self.nodes {
            if node.ended()?.is_none() {
                running.push((node.place.host, node.place.ports.metrics).into());
            }
        }
        Ok(running)
    }

    /// Kills a node (SIGKILL) once a third of the fleet has the release's image: the one with the most devices, but never the
    /// first, through which the demo commands. None: within `time` it did not come to that.
    pub async fn lose_one(
        &mut self,
        fleet: &Fleet,
        release: &Version,
        time: Duration,
    ) -> Result<Option<Loss>> {
        let a_third_has_it = || {
            let progress = fleet.progress(release);
            progress.verified * 3 >= progress.devices
        };
        if fleet.wait_until(|_| a_third_has_it(), time).await.is_err() {
            // Those that are missing tell why, when the devices are judged.
            return Ok(None);
        }
        let snapshot = fleet.snapshot();
        let connected = |node: &Node| snapshot.on_server(&node.place.devices().to_string());
        let others = self.nodes.iter_mut().skip(1);
        let Some(node) = others.max_by_key(|node| connected(node)) else {
            return Ok(None);
        };
        let address = node.place.devices();
        let name = address.to_string();
        let is_on = |device: &DeviceStatus| device.online && device.server.as_ref() == Some(&name);
        let devices = fleet.devices().into_iter().filter(is_on);
        let devices = devices.map(|device| device.id).collect();
        if let Some(ended) = node.ended()? {
            return Err(node.failure(&format!("ended by itself: {ended}")));
        }
        let progress = fleet.progress(release);
        node.process
            .kill()
            .doing(|| format!("kill {}", node.place.id))?;
        Ok(Some(Loss {
            unfinished: progress.devices - progress.ended,
            node: node.place.id.clone(),
            address,
            devices,
        }))
    }

    /// Drains every node that still runs, and waits for its end.
    pub async fn stop(mut self) {
        for node in &mut self.nodes {
            // One that has ended needs no word.
            let _ = node.process.terminate();
        }
        let ended = async {
            for node in &mut self.nodes {
                while node.ended().is_ok_and(|ended| ended.is_none()) {
                    tokio::time::sleep(limits::NODE_LOOK).await;
                }
            }
        };
        // One that does not end is killed with its handle.
        let _ = tokio::time::timeout(limits::NODE_STOP_TIME, ended).await;
    }
}

impl Place {
    fn devices(&self) -> SocketAddr {
        (self.host, self.ports.devices).into()
    }
}

impl Node {
    fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        let id = &self.place.id;
        self.process.ended().doing(|| format!("look at {id}"))
    }

    /// Waits until it accepts devices.
    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + limits::NODE_READY_TIME;
        while TcpStream::connect(self.place.devices()).await.is_err() {
            if let Some(ended) = self.ended()? {
                return Err(self.failure(&format!("did not start: {ended}")));
            }
            if Instant::now() > deadline {
                let words = format!("is not ready after {:?}", limits::NODE_READY_TIME);
                return Err(self.failure(&words));
            }
            tokio::time::sleep(limits::NODE_LOOK).await;
        }
        Ok(())
    }

    /// With the end of its log: the directory may go away with the demo.
    fn failure(&self, what: &str) -> Failure {
        let log = fs::read(&self.place.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(limits::LOG_LINES)..];
        Failure::new(format!("{} {what}\n{}", self.place.id, last.join("\n")))
            .next("FWPUSH_LOG=debug makes the nodes say more.")
    }
}

/// Starts `fwpush serve` as a process of its own.
fn launch(place: &Place) -> Result<Kept> {
    let what = || format!("start {}", place.id);
    let program = env::current_exe().doing(what)?;
    let mut command = Command::new(program);
    command
        .arg("serve")
        .arg("--config")
        .arg(place.dir.join("server").join(FILE_NAME));
    // The environment stands above the file, and is meant for this person's own server.
    for (name, _) in env::vars_os() {
        let of_ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("FWPUSH_"));
        if of_ours && name != "FWPUSH_LOG" {
            command.env_remove(name);
        }
    }
    Kept::start(&command, &place.log).doing(what)
}

/// Writes into a node's configuration where it listens and what it shares.
fn settle(place: &Place, shared: &Shared) -> Result<()> {
    let path = place.dir.join("server").join(FILE_NAME);
    let text = disk::read_text(&path)?;
    let mut config: toml::Table =
        toml::from_str(&text).doing(|| format!("read {}", path.display()))?;
    config.insert("node_id".to_owned(), place.id.to_string().into());
    let at = |port: u16| format!("{}:{port}", place.host);
    let advertise: toml::Value = vec![at(place.ports.devices)].into();
    let spread: toml::Value = limits::RECONNECT_SPREAD_S.into();
    for (section, key, value) in [
        ("listen", "devices", at(place.ports.devices).into()),
        ("listen", "operators", at(place.ports.operators).into()),
        ("listen", "metrics", at(place.ports.metrics).into()),
        ("listen", "advertise", advertise),
        ("database", "url", shared.database_url.clone().into()),
        ("files", "url", shared.files_url.clone().into()),
        ("files", "shared", true.into()),
        ("cluster", "redis_url", shared.redis_url.clone().into()),
        ("cluster", "redis_password_file", REDIS_PASSWORD.into()),
        (
            "cluster",
            "advertise_addr",
            at(place.ports.operators).into(),
        ),
        ("limits", "reconnect_spread_s", spread),
    ] {
        let section = config
            .entry(section)
            .or_insert_with(|| toml::Table::new().into());
        if let Some(section) = section.as_table_mut() {
            section.insert(key.to_owned(), value);
        }
    }
    let text = toml::to_string(&config).doing(|| format!("write {}", path.display()))?;
    disk::replace(&path, (HEAD.to_owned() + &text).as_bytes())
}

/// Makes the directory of a further node: as the first one's, with a certificate of its own.
fn make_directory(dir: &Path, place: &Place) -> Result<()> {
    let (first, server) = (dir.join("server"), place.dir.join("server"));
    for part in ["pki", "trust", "data"] {
        disk::private_dir(&server.join(part))?;
    }
    for file in [
        FILE_NAME,
        REDIS_PASSWORD,
        "pki/device-ca.crt",
        "pki/device-ca.key",
        "pki/node-ca.crt",
        "pki/operator-ca.crt",
        "trust/1.root.json",
    ] {
        let content = disk::read_text(&first.join(file))?;
        disk::write_new(&server.join(file), content.as_bytes())?;
    }
    let what = || format!("make the certificate of {}", place.id);
    let offline = |name: &str| disk::read_text(&dir.join("offline").join(name));
    let ca = Ca::load(&offline("node-ca.crt")?, &offline("node-ca.key")?).doing(what)?;
    let domain: &TrustDomain = ca.trust_domain();
    let (key, csr) = new_key_and_csr().doing(what)?;
    let identity = Identity::node(domain, &place.id);
    let names = [SanName::Ip(place.host.into())];
    let certificate = ca
        .issue_for_csr(
            &csr,
            &identity,
            &names,
            Timestamp::now(),
            NODE_CERTIFICATE_DAYS,
        )
        .doing(what)?;
    disk::write_new(&server.join("pki/node.crt"), certificate.as_bytes())?;
    disk::write_new(&server.join("pki/node.key"), key.as_bytes())
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).doing(|| format!("find {}", path.display()))
}

impl Loss {
    /// How many devices were on the node.
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Waits until all of them have a stream on another node; gives those that have not in time.
    pub async fn stranded(&self, fleet: &Fleet) -> Vec<DeviceId> {
        let gone = self.address.to_string();
        let is_elsewhere = |id: &&DeviceId| {
            fleet
                .device(id)
                .is_some_and(|device| device.online && device.server.as_ref() != Some(&gone))
        };
        // Whether they came in time shows in who has not.
        let all = |_: &device_sim::Snapshot| self.devices.iter().all(|id| is_elsewhere(&id));
        let _ = fleet.wait_until(all, limits::MOVED_TIME).await;
        let stranded = self.devices.iter().filter(|id| !is_elsewhere(id));
        stranded.cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use fwpush_server::Config;

    use super::*;
    use crate::demo::site::{Model, init_args};

    #[test]
    fn every_node_has_its_own_name_certificate_and_addresses_and_shares_the_rest() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("demo");
        let places = places(&dir, 3).unwrap();
        let (host, ports) = (places[0].host, places[0].ports);
        let args = init_args(&dir, &Model::new().unwrap(), host, ports).unwrap();
        crate::init::make(&args, Timestamp::now()).unwrap();
        fs::write(dir.join("server").join(REDIS_PASSWORD), "secret").unwrap();
        let shared = Shared {
            database_url: "postgres://fwpush@/fwpush?host=/run/pg".to_owned(),
            redis_url: "redis://127.1.2.3:6379".to_owned(),
            files_url: "file:/srv/files".to_owned(),
        };
        let mut seen = std::collections::BTreeSet::new();
        for place in &places {
            if place.dir != dir {
                make_directory(&dir, place).unwrap();
            }
            settle(place, &shared).unwrap();
            let config = Config::from_dir(&place.dir).unwrap();
            assert_eq!(config.node_id, place.id);
            assert_eq!(config.listen.devices, place.devices());
            let files = config.files_dir().unwrap();
            assert_eq!(files.as_deref(), Some(Path::new("/srv/files")));
            assert_eq!(config.database.url, shared.database_url);
            let membership = config.membership().unwrap().unwrap();
            assert_eq!(
                membership.advertise_addr,
                config.listen.operators.to_string()
            );
            let pem = disk::read_text(&config.pki.certificate).unwrap();
            let key = disk::read_text(&config.pki.key).unwrap();
            fwpush_keys::Credentials::from_pem(&pem, &key).unwrap();
            assert!(seen.insert((place.host, pem)), "{place:?}");
        }
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn every_missing_package_is_named_at_once() {
        let missing = |program, package| Error::Missing { program, package };
        let (redis, postgres) = (
            missing("redis-server", "redis-server"),
            missing("initdb", "postgresql"),
        );
        let words = |errors: &[Option<&Error>]| {
            let mut words = Vec::new();
            let failure = missing_packages(errors)?;
            assert_eq!(failure.exit(), crate::failure::Exit::Usage);
            failure.report(&mut words).unwrap();
            Some(String::from_utf8(words).unwrap())
        };
        let both = words(&[Some(&redis), Some(&postgres)]).unwrap();
        assert!(both.contains("redis-server and initdb"), "{both}");
        assert!(both.contains("install redis-server postgresql."), "{both}");
        let one = words(&[None, Some(&postgres)]).unwrap();
        assert!(
            one.contains("install postgresql.") && !one.contains("redis"),
            "{one}"
        );
        assert_eq!(words(&[None, None]), None);
    }
}
