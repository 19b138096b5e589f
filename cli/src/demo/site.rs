//! The demo's own installation: made by `init`, served in this process, with a record and a certificate for each device.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use device_sim::{Pki, SimIdentity};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use fwpush_keys::{
    Channel, DeviceId, HwId, Product, SanName, Timestamp, TrustDomain, new_key_and_csr,
};
use fwpush_proto::v1::{AddDeviceRequest, AddDeviceResponse};
use fwpush_server::{Addresses, Config, Running, Server};

use super::limits;
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

/// A server that runs in this process.
#[derive(Debug)]
pub struct Site {
    pub server: Running,
    pub client: Client,
    pub addresses: Addresses,
}

impl Site {
    /// Makes an installation in `dir`, which must not hold one, and starts its server on free ports of the loopback
    /// address.
    pub async fn start(dir: &Path, model: &Model) -> Result<Self> {
        init::make(&init_args(dir, model)?, Timestamp::now())?;
        let mut config =
            Config::from_dir(dir).doing(|| "read the server's configuration".to_owned())?;
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.listen.devices = any_port;
        config.listen.operators = any_port;
        config.listen.metrics = Some(any_port);
        config.limits.reconnect_spread_s = limits::RECONNECT_SPREAD_S;
        let server = Server::start(config)
            .await
            .doing(|| "start the server".to_owned())?;
        let addresses = server.addresses();
        settle_ports(dir, addresses)?;
        let client =
            Client::connect(OperatorConfig::load(&dir.join("operator").join(FILE_NAME))?).await?;
        Ok(Self {
            server,
            client,
            addresses,
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

fn init_args(dir: &Path, model: &Model) -> Result<InitArgs> {
    let localhost = SanName::Ip(Ipv4Addr::LOCALHOST.into());
    let name = || "name the demo's server".to_owned();
    Ok(InitArgs {
        target: dir.to_owned(),
        trust_domain: model.trust_domain.clone(),
        server_names: vec![localhost, "localhost".parse().doing(name)?],
        products: vec![model.product.clone()],
        max_counter: 100,
        node_id: "node-1".parse().doing(name)?,
        operator_id: "operator-1".parse().doing(name)?,
        device_port: PORTS.devices,
        operator_port: PORTS.operators,
        metrics_port: PORTS.metrics,
    })
}

/// Ports of the three listeners.
#[derive(Clone, Copy, Debug)]
struct Ports {
    devices: u16,
    operators: u16,
    metrics: u16,
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
    fn the_files_of_the_installation_name_the_ports_that_were_taken() {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::new().unwrap();
        init::make(&init_args(dir.path(), &model).unwrap(), Timestamp::now()).unwrap();
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
