//! The configuration of a further node: that of the first, with what is each node's own put in its place.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Component, Path, PathBuf},
};

use fwpush_keys::SanName;
use fwpush_server::Config;
use toml_edit::{Array, DocumentMut, Item, Table, value};

use crate::{
    args::NodeAdd,
    disk,
    failure::{Doing as _, Failure, Result},
    init::names::{reachable_names, with_port},
};

/// Where the files of `[pki]` and `[trust]` lie in a directory made here, however they lie in the first node's.
pub const PKI_FILES: [(&str, &str); 6] = [
    ("device_ca", "pki/device-ca.crt"),
    ("device_ca_key", "pki/device-ca.key"),
    ("node_ca", "pki/node-ca.crt"),
    ("operator_ca", "pki/operator-ca.crt"),
    ("certificate", "pki/node.crt"),
    ("key", "pki/node.key"),
];

/// A configuration, and what goes with it.
#[derive(Debug)]
pub struct Made {
    pub text: String,
    /// Where devices that are added through this node are told to connect.
    pub advertised: Vec<String>,
    /// Where other nodes reach it, if the first is in a cluster.
    pub advertise_addr: Option<String>,
    /// Files that it names by a relative path, to be copied from the first node's directory.
    pub copied: Vec<PathBuf>,
    /// Files that it names by an absolute path, and that its machine must have too.
    pub elsewhere: Vec<PathBuf>,
}

/// Makes it from the first node's text, whose comments and settings stay.
pub fn make(first: &Config, args: &NodeAdd) -> Result<Made> {
    let text = disk::read_text(&first.path)?;
    let mut document = text
        .parse::<DocumentMut>()
        .doing(|| format!("read {}", first.path.display()))?;
    refuse_own_images(&document, first)?;
    document["node_id"] = value(args.id.as_str());
    let listen = section(&mut document, "listen")?;
    let own = |first: SocketAddr, port: Option<u16>, otherwise: Ipv4Addr| {
        let ip = own_ip(first.ip(), args.listen, otherwise);
        SocketAddr::new(ip, port.unwrap_or(first.port()))
    };
    let any = Ipv4Addr::UNSPECIFIED;
    let devices = own(first.listen.devices, args.device_port, any);
    let operators = own(first.listen.operators, args.operator_port, any);
    listen["devices"] = value(devices.to_string());
    listen["operators"] = value(operators.to_string());
    if let Some(metrics) = first.listen.metrics {
        let metrics = own(metrics, args.metrics_port, Ipv4Addr::LOCALHOST);
        listen["metrics"] = value(metrics.to_string());
    }
    let (shared, advertised) = advertised(first, args, devices.port());
    listen["advertise"] = value(Array::from_iter(&advertised));

    let advertise_addr = match (&first.cluster.redis_url, &args.advertise_addr) {
        (None, None) => None,
        (_, Some(given)) => Some(given.clone()),
        (Some(_), None) => {
            let names = reachable_names(&args.server_names);
            // A name that is the front's leads to any node.
            let own = names.iter().find(|name| !shared.contains(name));
            let name = own.unwrap_or(&names[0]);
            Some(with_port(name, operators.port()))
        }
    };
    if let Some(address) = &advertise_addr {
        section(&mut document, "cluster")?["advertise_addr"] = value(address);
    }
    if let Some(cluster) = document
        .get_mut("cluster")
        .and_then(Item::as_table_like_mut)
    {
        // It would stand above the one at the top.
        cluster.remove("node_id");
    }
    for (key, file) in PKI_FILES {
        put_if_there(&mut document, "pki", key, file);
    }
    put_if_there(&mut document, "trust", "dir", "trust");
    let (copied, elsewhere) = files_named(&mut document, first.base());
    Ok(Made {
        text: document.to_string(),
        advertised,
        advertise_addr,
        copied,
        elsewhere,
    })
}

/// Images of all nodes cannot lie in a directory that is named by where each node's own configuration is.
fn refuse_own_images(document: &DocumentMut, first: &Config) -> Result<()> {
    let files = document.get("files").and_then(Item::as_table_like);
    let of = |key| files.and_then(|files| files.get(key));
    let shared = of("shared").and_then(Item::as_bool) == Some(true);
    // Left out, it is such a path too.
    let own = of("url").and_then(Item::as_str).is_none_or(|url| {
        url.strip_prefix("file:")
            .is_some_and(|path| Path::new(path).is_relative())
    });
    if !(shared && own) {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "[files] url of {} is a path within that node's directory, which no other node has",
        first.path.display()
    ))
    .next("Write it there as file:/PATH, where every node has the directory that they share."))
}

fn section<'a>(document: &'a mut DocumentMut, name: &str) -> Result<&'a mut Table> {
    let item = document.entry(name).or_insert(Item::Table(Table::new()));
    item.as_table_mut().ok_or_else(|| {
        Failure::usage(format!(
            "[{name}] of the first node's configuration is not written as a section"
        ))
        .next(format!("Write it as a section that begins with [{name}]."))
    })
}

fn put_if_there(document: &mut DocumentMut, section: &str, key: &str, file: &str) {
    let table = document.get_mut(section).and_then(Item::as_table_like_mut);
    if let Some(item) = table.and_then(|table| table.get_mut(key)) {
        *item = value(file);
    }
}

/// What holds for every machine stays; what is the first one's own does not.
fn own_ip(first: IpAddr, given: Option<IpAddr>, otherwise: Ipv4Addr) -> IpAddr {
    if first.is_unspecified() || first.is_loopback() {
        return first;
    }
    given.unwrap_or(otherwise.into())
}

/// Names of the new node that the first one's devices are told already, such as a front's, and where those of the new one are told
/// to connect: the same where there is a front, else to both.
fn advertised(first: &Config, args: &NodeAdd, port: u16) -> (Vec<SanName>, Vec<String>) {
    let names = reachable_names(&args.server_names);
    let mut told = first.listen.advertise.clone();
    let shared: Vec<SanName> = names
        .iter()
        .filter(|name| {
            let own = with_port(name, port);
            told.iter().any(|told| host(told) == host(&own))
        })
        .cloned()
        .collect();
    if shared.is_empty() {
        told.extend(names.iter().map(|name| with_port(name, port)));
    }
    (shared, told)
}

fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// The files that settings other than `[pki]` name (`password_file` and its like), by whether they are copied. Relative paths that
/// lead out of the directory are made absolute.
fn files_named(document: &mut DocumentMut, base: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let (mut copied, mut elsewhere) = (Vec::new(), Vec::new());
    for (section, item) in document.iter_mut() {
        let Some(table) = item.as_table_like_mut() else {
            continue;
        };
        if section.get() == "pki" {
            continue;
        }
        for (key, item) in table.iter_mut() {
            let Some(path) = item
                .as_str()
                .filter(|_| key.get().ends_with("_file"))
                .map(PathBuf::from)
            else {
                continue;
            };
            let stays =
                |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
            if path.is_absolute() {
                elsewhere.push(path);
            } else if path.components().all(stays) {
                copied.push(path);
            } else {
                let absolute = base.join(&path);
                let absolute = absolute.canonicalize().unwrap_or(absolute);
                *item = value(absolute.to_string_lossy().into_owned());
                elsewhere.push(absolute);
            }
        }
    }
    (copied, elsewhere)
}
