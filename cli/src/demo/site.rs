//! The demo's own installation: made by `init`, served in this process or by nodes of their own, with a record and a
//! certificate for each device.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
};

use device_sim::{Pki, SimIdentity};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use fwpush_keys::{
    Channel, DeviceId, HwId, Product, SanName, Timestamp, TrustDomain, new_key_and_csr,
};
use fwpush_proto::v1::{AddDeviceRequest, AddDeviceResponse};
use fwpush_server::{Addresses, Config, Running, Server};

use super::{
    cluster::{self, Cluster, Engines},
    limits,
};
use crate::{
    args::InitArgs,
    client::Client,
    config::{FILE_NAME, OperatorConfig},
    disk,
    failure::{Doing as _, Failure, Result},
    init,
    limits::ADDING_AT_ONCE,
    progress,
};

/// Stand in the files that `init` makes, until the system has chosen.
const PORTS: Ports = Ports {
    devices: 7443,
    operators: 7444,
    metrics: 7445,
};

/// What the devices of the demo are.
#[derive(Clone, Debug)]
pub struct Model {
    pub trust_domain: TrustDomain,
    pub product: Product,
    pub hw_id: HwId,
    pub channel: Channel,
}

impl Model {
    pub fn new() -> Result<Self> {
        let names = || {
            Ok::<_, fwpush_keys::InvalidId>(Self {
                trust_domain: "demo".parse()?,
                product: "gateway".parse()?,
                hw_id: "board-a".parse()?,
                channel: "stable".parse()?,
            })
        };
        names().doing(|| "name the demo's devices".to_owned())
    }
}

/// An installation whose servers run.
#[derive(Debug)]
pub struct Site {
    pub servers: Servers,
    /// Of the first server.
    pub client: Client,
}

/// Who serves it.
#[derive(Debug)]
pub enum Servers {
    /// One server in this process.
    Here(Box<Running>),
    /// Processes of their own.
    Nodes(Box<Cluster>),
}

impl Servers {
    /// `host:port` each, where devices connect.
    pub fn device_addresses(&self) -> Vec<String> {
        let addresses = match self {
            Self::Here(server) => vec![server.addresses().devices],
            Self::Nodes(cluster) => cluster.device_addresses(),
        };
        addresses.iter().map(SocketAddr::to_string).collect()
    }

    /// Of those that still run.
    pub fn metrics_addresses(&mut self) -> Result<Vec<SocketAddr>> {
        match self {
            Self::Here(server) => Ok(server.addresses().metrics.into_iter().collect()),
            Self::Nodes(cluster) => cluster.metrics_addresses(),
        }
    }

    pub async fn drain_and_stop(self) {
        match self {
            Self::Here(server) => server.drain_and_stop().await,
            Self::Nodes(cluster) => cluster.stop().await,
        }
    }
}

impl Site {
    /// Makes an installation in `dir`, which must not hold one, and starts its server on free ports of the loopback
    /// address.
    pub async fn start(dir: &Path, model: &Model) -> Result<Self> {
        init::make(
            &init_args(dir, model, Ipv4Addr::LOCALHOST, PORTS)?,
            Timestamp::now(),
        )?;
        let mut config =
            Config::from_dir(dir).doing(|| "read the server's configuration".to_owned())?;
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.listen.devices = any_port;
        config.listen.operators = any_port;
        config.listen.metrics = Some(any_port);
        config.limits.reconnect_spread_s = limits::RECONNECT_SPREAD_S.into();
        let server = Server::start(config)
            .await
            .doing(|| "start the server".to_owned())?;
        settle_ports(dir, server.addresses())?;
        Ok(Self {
            servers: Servers::Here(Box::new(server)),
            client: connect(dir).await?,
        })
    }

    /// The same served by `nodes` nodes, each a process with its own certificate on a loopback host of its own.
    pub async fn start_cluster(
        dir: &Path,
        model: &Model,
        nodes: u32,
        engines: Engines,
    ) -> Result<Self> {
        let places = cluster::places(dir, nodes)?;
        let Some(first) = places.first() else {
            return Err(Failure::usage("a cluster has at least one node"));
        };
        init::make(
            &init_args(dir, model, first.host, first.ports)?,
            Timestamp::now(),
        )?;
        let cluster = Cluster::start(dir, places, engines).await?;
        Ok(Self {
            servers: Servers::Nodes(Box::new(cluster)),
            client: connect(dir).await?,
        })
    }

    /// Adds devices `demo-00001` and so on, several at once, and gives what they start from.
    pub async fn add_devices(&self, model: &Model, count: u32) -> Result<Pki> {
        let bar = progress::count_bar("adding", count.into());
        let adding = stream::iter(1..=count).map(|number| {
            let bar = &bar;
            async move {
                let added = self.add_device(model, number).await?;
                bar.inc(1);
                Ok::<_, Failure>(added)
            }
        });
        let added: Vec<_> = adding
            .buffer_unordered(ADDING_AT_ONCE)
            .try_collect()
            .await?;
        bar.finish_and_clear();
        let Some((_, first)) = added.first() else {
            return Err(Failure::usage("a fleet has at least one device"));
        };
        Ok(Pki {
            trust_domain: model.trust_domain.clone(),
            node_ca_pem: first.node_ca_pem.clone(),
            root: first.root.to_vec(),
            devices: added.into_iter().map(|(identity, _)| identity).collect(),
        })
    }

    async fn add_device(
        &self,
        model: &Model,
        number: u32,
    ) -> Result<(SimIdentity, AddDeviceResponse)> {
        let id: DeviceId = format!("demo-{number:05}")
            .parse()
            .doing(|| "name a device".to_owned())?;
        let (key_pem, csr_pem) = new_key_and_csr().doing(|| "make a device's key".to_owned())?;
        let request = AddDeviceRequest {
            client_id: id.to_string(),
            product: model.product.to_string(),
            hw_id: model.hw_id.to_string(),
            hw_rev: 1,
            channel: model.channel.to_string(),
            csr_pem,
            days: 1,
        };
        let what = format!("add device {id}");
        let added = self
            .client
            .call(&what, async |admin| admin.add_device(request).await)
            .await?;
        let identity = SimIdentity {
            id,
            cert_pem: added.certificate_pem.clone(),
            key_pem,
        };
        Ok((identity, added))
    }
}

async fn connect(dir: &Path) -> Result<Client> {
    Client::connect(OperatorConfig::load(&dir.join("operator").join(FILE_NAME))?).await
}

pub fn init_args(dir: &Path, model: &Model, host: Ipv4Addr, ports: Ports) -> Result<InitArgs> {
    let host = SanName::Ip(host.into());
    let name = || "name the demo's server".to_owned();
    Ok(InitArgs {
        target: dir.to_owned(),
        trust_domain: model.trust_domain.clone(),
        server_names: vec![host, "localhost".parse().doing(name)?],
        products: vec![model.product.clone()],
        max_counter: 100,
        node_id: "node-1".parse().doing(name)?,
        operator_id: "operator-1".parse().doing(name)?,
        device_port: ports.devices,
        operator_port: ports.operators,
        metrics_port: ports.metrics,
    })
}

/// Ports of the three listeners.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub devices: u16,
    pub operators: u16,
    pub metrics: u16,
}

impl Ports {
    /// Three ports of `host` that are free on `0.0.0.0` too, where another server would answer for the node.
    pub fn free(host: Ipv4Addr) -> io::Result<Self> {
        // All held before any is given back, so that they differ.
        let any = || TcpListener::bind((host, 0));
        let (devices, operators, metrics) = (any()?, any()?, any()?);
        let port = |of: &TcpListener| of.local_addr().map(|at| at.port());
        Ok(Self {
            devices: port(&devices)?,
            operators: port(&operators)?,
            metrics: port(&metrics)?,
        })
    }
}

/// Writes the ports that the system chose into the installation's files, so that other commands find the server, also
/// when it is started again later.
fn settle_ports(dir: &Path, at: Addresses) -> Result<()> {
    let ports = Ports {
        devices: at.devices.port(),
        operators: at.operators.port(),
        metrics: at.metrics.map_or(PORTS.metrics, |metrics| metrics.port()),
    };
    for part in ["server", "operator"] {
        let path = dir.join(part).join(FILE_NAME);
        disk::replace(
            &path,
            with_ports(&disk::read_text(&path)?, ports).as_bytes(),
        )?;
    }
    Ok(())
}

fn with_ports(text: &str, ports: Ports) -> String {
    let renamed = [
        (PORTS.devices, ports.devices),
        (PORTS.operators, ports.operators),
        (PORTS.metrics, ports.metrics),
    ];
    // At once for all: a port that was chosen may be one that stands for another.
    let line = |line: &str| {
        let found = renamed
            .iter()
            .find(|(placeholder, _)| line.contains(&format!(":{placeholder}\"")));
        let line = line.replace("0.0.0.0:", "127.0.0.1:");
        found.map_or(line.clone(), |(placeholder, port)| {
            line.replace(&format!(":{placeholder}\""), &format!(":{port}\""))
        })
    };
    text.lines().map(|text| line(text) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_not_those_of_a_server_on_every_address() {
        let host = fwpush_services::own_host();
        let elsewhere = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let taken = elsewhere.local_addr().unwrap().port();
        TcpListener::bind((host, taken)).unwrap_err();
        let ports = Ports::free(host).unwrap();
        let mut all = [ports.devices, ports.operators, ports.metrics, taken].to_vec();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 4, "{ports:?}");
    }

    #[test]
    fn the_files_of_the_installation_name_the_ports_that_were_taken() {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::new().unwrap();
        let args = init_args(dir.path(), &model, Ipv4Addr::LOCALHOST, PORTS).unwrap();
        init::make(&args, Timestamp::now()).unwrap();
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        // As unlucky as can be: each is another's placeholder.
        settle_ports(
            dir.path(),
            Addresses {
                devices: at(7444),
                operators: at(7445),
                metrics: Some(at(7443)),
            },
        )
        .unwrap();
        let server = Config::from_dir(dir.path()).unwrap().listen;
        assert_eq!(
            (server.devices, server.operators, server.metrics),
            (at(7444), at(7445), Some(at(7443)))
        );
        assert_eq!(server.advertise, ["127.0.0.1:7444", "localhost:7444"]);
        let operator = OperatorConfig::find(Some(dir.path())).unwrap();
        assert_eq!(operator.server, "127.0.0.1:7445");
    }
}
