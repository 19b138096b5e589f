//! `fwpush device add`: records, keys, certificates, and a configuration that the agent starts with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use futures::stream::{self, StreamExt as _};
use fwpush_keys::{DeviceId, new_key_and_csr};
use fwpush_proto::v1::{AddDeviceRequest, AddDeviceResponse};
use serde::Serialize;
use serde_json::json;

use crate::{
    Context,
    args::DeviceAdd,
    client::Client,
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    limits, progress, views,
};

/// Runs the command.
pub async fn run(context: &Context, args: &DeviceAdd) -> Result<()> {
    match (&args.csr, &args.out, args.count) {
        (Some(csr), _, _) => with_csr(context, args, csr).await,
        (None, Some(out), None) => one(context, args, out).await,
        (None, Some(out), Some(count)) => many(context, args, out, count).await,
        (None, None, _) => Err(Failure::usage(
            "say where the certificate goes: --out DIR or --csr FILE",
        )),
    }
}

async fn add(
    client: &Client,
    args: &DeviceAdd,
    id: &DeviceId,
    csr_pem: String,
) -> Result<AddDeviceResponse> {
    let request = AddDeviceRequest {
        client_id: id.to_string(),
        product: args.product.to_string(),
        hw_id: args.hw.id.to_string(),
        hw_rev: args.hw.rev,
        channel: args.channel.to_string(),
        csr_pem,
        days: args.days,
    };
    let what = format!("add device {id}");
    client
        .call(&what, async |admin| admin.add_device(request).await)
        .await
}

/// The key was made on the device and stays there: prints the certificate.
async fn with_csr(context: &Context, args: &DeviceAdd, csr: &Path) -> Result<()> {
    let csr = disk::read_text(csr)?;
    let client = context.client().await?;
    let added = add(&client, args, &args.id, csr).await?;
    context.out.data(
        || {
            json!({
                "device": added.device.as_ref().map(views::device_json),
                "certificate_pem": added.certificate_pem,
                "node_ca_pem": added.node_ca_pem,
                "trust_domain": added.trust_domain,
                "server_addresses": added.server_addresses,
                "root": serde_json::from_slice::<serde_json::Value>(&added.root).unwrap_or_default(),
            })
        },
        || added.certificate_pem.clone(),
    )
}

/// A directory that a device, or an agent on this machine, starts from as it is.
async fn one(context: &Context, args: &DeviceAdd, out: &Path) -> Result<()> {
    let files = [
        "device.key",
        "device.crt",
        "node-ca.crt",
        "root.json",
        "agent.toml",
    ]
    .map(|name| out.join(name));
    if let Some(taken) = files.iter().find(|file| fs::symlink_metadata(file).is_ok()) {
        return Err(
            Failure::usage(format!("{} exists already", taken.display()))
                .next("Choose another --out."),
        );
    }
    let client = context.client().await?;
    let (key, csr) = new_key_and_csr().doing(|| "make the device's key".to_owned())?;
    let added = add(&client, args, &args.id, csr).await?;
    let agent = agent_toml(args, &added)?;
    disk::private_dir(out)?;
    let [key_file, certificate, node_ca, root, config] = &files;
    disk::write_new(key_file, key.as_bytes())?;
    disk::write_new(certificate, added.certificate_pem.as_bytes())?;
    disk::write_new(node_ca, added.node_ca_pem.as_bytes())?;
    disk::write_new(root, &added.root)?;
    disk::write_new(config, agent.as_bytes())?;
    context.out.data(
        || json!({ "device": added.device.as_ref().map(views::device_json), "dir": out, "config": config }),
        || {
            let (id, dir, config) = (&args.id, out.display(), config.display());
            format!(
                "Added device {id}. Directory {dir} has its key and all that the agent needs.\nNext: fwpush-device --config {config}\n"
            )
        },
    )
}

/// Devices PREFIX00001 to PREFIX<count>, several at once. What an earlier run has finished is left as it is.
async fn many(context: &Context, args: &DeviceAdd, out: &Path, count: u32) -> Result<()> {
    let ids = numbered(&args.id, count)?;
    disk::private_dir(out)?;
    let missing: Vec<&DeviceId> = ids.iter().filter(|id| !is_done(out, id)).collect();
    let client = context.client().await?;
    let bar = progress::count_bar("adding", missing.len() as u64);
    let adding = stream::iter(missing.iter().map(|id| {
        let (client, bar) = (&client, &bar);
        async move {
            let added = one_of_many(client, args, id, out).await?;
            bar.inc(1);
            Ok::<_, Failure>(added)
        }
    }));
    let mut adding = adding.buffer_unordered(limits::ADDING_AT_ONCE);
    let mut first = None;
    while let Some(added) = adding.next().await {
        let added =
            added.next_step(|| "Repeat the command: it goes on where it stopped.".to_owned())?;
        first.get_or_insert(added);
    }
    bar.finish_and_clear();
    if let Some(added) = first {
        disk::replace(&out.join("node-ca.crt"), added.node_ca_pem.as_bytes())?;
        disk::replace(&out.join("root.json"), &added.root)?;
        disk::replace(&out.join("trust-domain"), added.trust_domain.as_bytes())?;
    }
    let (first, last) = (ids.first(), ids.last());
    context.out.data(
        || json!({ "added": missing.len(), "devices": ids.len(), "first": first, "last": last, "dir": out }),
        || {
            let range = first.zip(last).map(|(first, last)| format!(", {first} to {last}")).unwrap_or_default();
            let (added, all, dir) = (missing.len(), ids.len(), out.display());
            let (product, hw, rev) = (&args.product, &args.hw.id, args.hw.rev);
            format!(
                "Added {added} of {all} devices{range}, in {dir}.\nNext: device-sim --pki {dir} --devices {count} \
                 --product {product} --hw {hw}:{rev} --server HOST:PORT\n"
            )
        },
    )
}

/// Whether a device's directory is finished: its certificate is written last.
fn is_done(out: &Path, id: &DeviceId) -> bool {
    out.join(id.as_str()).join("device.crt").is_file()
}

async fn one_of_many(
    client: &Client,
    args: &DeviceAdd,
    id: &DeviceId,
    out: &Path,
) -> Result<AddDeviceResponse> {
    let (key, csr) = new_key_and_csr().doing(|| "make the device's key".to_owned())?;
    let added = add(client, args, id, csr).await?;
    let dir: PathBuf = out.join(id.as_str());
    disk::private_dir(&dir)?;
    // A key that an interrupted run left has no certificate: nothing is lost with it.
    disk::replace(&dir.join("device.key"), key.as_bytes())?;
    disk::replace(&dir.join("device.crt"), added.certificate_pem.as_bytes())?;
    Ok(added)
}

/// `PREFIX00001`, `PREFIX00002`, ... wide enough that they sort by number.
fn numbered(prefix: &DeviceId, count: u32) -> Result<Vec<DeviceId>> {
    let width = count.to_string().len().max(5);
    (1..=count)
        .map(|number| {
            format!("{prefix}{number:0width$}")
                .parse()
                .map_err(|error| {
                    Failure::usage(format!("{error}"))
                        .next(format!("Choose a shorter beginning than {prefix}."))
                })
        })
        .collect()
}

/// `agent.toml`. Written through a serialiser, so that no value can end a string early.
#[derive(Serialize)]
struct AgentToml<'a> {
    servers: &'a [String],
    trust_domain: &'a str,
    client_id: &'a str,
    product: &'a str,
    hw_id: &'a str,
    hw_rev: u32,
    channels: [&'a str; 1],
    state_dir: &'a str,
    identity: IdentityToml,
    slots: SlotsToml,
    running: RunningToml,
}

#[derive(Serialize)]
struct IdentityToml {
    certificate: &'static str,
    key: &'static str,
    node_ca: &'static str,
    root: &'static str,
}

#[derive(Serialize)]
struct SlotsToml {
    kind: &'static str,
    a: &'static str,
    b: &'static str,
    capacity_bytes: u64,
    boot_record: &'static str,
    boot: &'static str,
}

#[derive(Serialize)]
struct RunningToml {
    version: String,
    security_counter: u64,
}

fn agent_toml(args: &DeviceAdd, added: &AddDeviceResponse) -> Result<String> {
    let servers = if args.servers.is_empty() {
        &added.server_addresses
    } else {
        &args.servers
    };
    let toml = AgentToml {
        servers,
        trust_domain: &added.trust_domain,
        client_id: args.id.as_str(),
        product: args.product.as_str(),
        hw_id: args.hw.id.as_str(),
        hw_rev: args.hw.rev,
        channels: [args.channel.as_str()],
        state_dir: "state",
        identity: IdentityToml {
            certificate: "device.crt",
            key: "device.key",
            node_ca: "node-ca.crt",
            root: "root.json",
        },
        slots: SlotsToml {
            kind: "files",
            a: "slot-a.img",
            b: "slot-b.img",
            capacity_bytes: args.slot_capacity.0,
            boot_record: "boot.rec",
            boot: "emulated",
        },
        running: RunningToml {
            version: args.running_version.to_string(),
            security_counter: args.running_counter,
        },
    };
    let text = toml::to_string(&toml).doing(|| "write agent.toml".to_owned())?;
    Ok(format!(
        "# Configuration of fwpush-device. Relative paths start from this file's directory; servers are tried in random order.\n\n\
         {text}\n\
         # By default an image is healthy when the agent has registered with the server from it. With a command, that decides:\n\
         #[health]\n\
         #command = [\"sh\", \"-c\", \"exit 0\"]\n\
         #timeout_s = 60\n\
         #confirm_timeout_s = 600\n"
    ))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, DeviceCommand};

    fn args(more: &[&str]) -> DeviceAdd {
        let line = [
            "fwpush",
            "device",
            "add",
            "gw-",
            "--product",
            "gateway",
            "--hw",
            "board-a:3",
            "--out",
            "x",
        ];
        let Command::Device(device) = Cli::try_parse_from(line.iter().chain(more))
            .unwrap()
            .command
        else {
            panic!("device")
        };
        let DeviceCommand::Add(add) = device.command else {
            panic!("add")
        };
        add
    }

    #[test]
    fn numbered_ids_sort_by_number() {
        let ids = numbered(&"sim-".parse().unwrap(), 100_000).unwrap();
        assert_eq!(ids[0].as_str(), "sim-000001");
        assert!(ids.is_sorted());
        assert_eq!(
            numbered(&"sim-".parse().unwrap(), 3).unwrap()[2].as_str(),
            "sim-00003"
        );
        let long = "x".repeat(60).parse().unwrap();
        assert!(numbered(&long, 1).is_err());
    }

    #[test]
    fn the_agents_configuration_says_what_was_asked_for() {
        let added = AddDeviceResponse {
            trust_domain: "example".to_owned(),
            server_addresses: vec!["localhost:7443".to_owned()],
            ..AddDeviceResponse::default()
        };
        let text = agent_toml(
            &args(&["--slot-capacity", "8MiB", "--running-version", "2.0.0"]),
            &added,
        )
        .unwrap();
        let table: toml::Table = text.parse().unwrap();
        assert_eq!(table["servers"][0].as_str(), Some("localhost:7443"));
        assert_eq!(table["hw_rev"].as_integer(), Some(3));
        assert_eq!(table["channels"][0].as_str(), Some("stable"));
        assert_eq!(table["slots"]["capacity_bytes"].as_integer(), Some(8 << 20));
        assert_eq!(table["running"]["version"].as_str(), Some("2.0.0"));
        let named = agent_toml(&args(&["--server", "10.0.0.1:7443"]), &added).unwrap();
        assert!(named.contains("servers = [\"10.0.0.1:7443\"]"), "{named}");
    }
}
