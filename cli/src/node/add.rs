//! `fwpush node add`: all that a further node needs, made whole or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use fwpush_keys::{
    Ca, Identity, SanName, Timestamp,
    tls::{certificates_from_pem, peer_of},
};
use fwpush_server::{Config, db::Place};
use serde_json::json;

use super::{authority, config};
use crate::{
    Context,
    args::NodeAdd,
    config::{FILE_NAME, find_server_config},
    disk,
    failure::{Doing as _, Failure, Result},
    init, limits,
    output::escape,
};

/// What was made.
#[derive(Debug)]
pub struct Added {
    dir: PathBuf,
    names: Vec<SanName>,
    /// When its certificate ends.
    not_after: Timestamp,
    pub made: config::Made,
    /// Where images are, if that is a directory.
    files: Option<String>,
}

/// Runs the command.
pub fn run(context: &Context, args: &NodeAdd) -> Result<()> {
    let added = add(context.dir(), args, Timestamp::now())?;
    context.out.data(
        || {
            json!({
                "node_id": args.id,
                "dir": added.dir,
                "server_names": added.names.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "certificate_expires": added.not_after,
                "device_addresses": added.made.advertised,
                "advertise_addr": added.made.advertise_addr,
                "files_copied": added.made.copied,
                "files_needed": added.made.elsewhere,
            })
        },
        || words(args, &added),
    )
}

fn words(args: &NodeAdd, added: &Added) -> String {
    let dir = escape(&args.out.to_string_lossy()).into_owned();
    let names: Vec<String> = added.names.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "Made node {id}, with a certificate for {names}.\n\
         Devices that are added through it are told to connect to {advertised}.\n",
        id = args.id,
        names = names.join(", "),
        advertised = added.made.advertised.join(", "),
    );
    if let Some(address) = &added.made.advertise_addr {
        text.push_str(&format!("Other nodes reach it at {address}.\n"));
    }
    text.push_str(&format!(
        "\n{dir}/server has private keys: move it to the new node's machine, and keep no copy here.\n"
    ));
    for file in &added.made.elsewhere {
        let file = file.to_string_lossy();
        text.push_str(&format!("That machine needs {} too.\n", escape(&file)));
    }
    if let Some(files) = &added.files {
        text.push_str(&format!(
            "Images are in a directory, `{}`: it must be one that all nodes share.\n",
            escape(files)
        ));
    }
    text.push_str(&format!(
        "Put the offline keys away again.\n\nNext: look at [listen] in {dir}/server/{FILE_NAME}, then there: fwpush serve --dir {dir}\n"
    ));
    text
}

/// Makes the directory. It is written beside its place and moved there at the end, so that a failure leaves nothing behind.
pub fn add(dir: Option<&Path>, args: &NodeAdd, now: Timestamp) -> Result<Added> {
    let path = find_server_config(dir, None)?;
    let first = Config::load(&path)
        .doing(|| "read the first node's configuration".to_owned())
        .map_err(Failure::as_usage)?;
    check(&first, args)?;
    let ca = authority(dir, args.offline.as_deref())?;
    is_of(&ca, &first)?;
    let made = config::make(&first, args)?;

    let out = &args.out;
    init::refuse_existing(out, &["server"])?;
    disk::private_dir(out)?;
    let build = tempfile::Builder::new()
        .prefix(".node-")
        .tempdir_in(out)
        .doing(|| format!("make a directory in {}", out.display()))?;
    let server = build.path().join("server");
    for part in ["pki", "trust", "data"] {
        disk::private_dir(&server.join(part))?;
    }
    let write = |name: &str, content: &[u8]| disk::write_new(&server.join(name), content);
    for (key, file) in config::PKI_FILES {
        let from = match key {
            "device_ca" => &first.pki.device_ca,
            "device_ca_key" => &first.pki.device_ca_key,
            "node_ca" => &first.pki.node_ca,
            "operator_ca" => &first.pki.operator_ca,
            _ => continue,
        };
        copy(from, &server.join(file))?;
    }
    let identity = Identity::node(&first.trust_domain, &args.id);
    let (key, certificate) = init::issue(&ca, &identity, &args.server_names, now)?;
    let not_after = certificates_from_pem(&certificate)
        .doing(|| "read the new certificate".to_owned())
        .and_then(|made| peer_of(&made).doing(|| "read the new certificate".to_owned()))?
        .not_after;
    write("pki/node.crt", certificate.as_bytes())?;
    write("pki/node.key", key.as_bytes())?;
    let root = "1.root.json";
    copy(
        &first.trust.dir.join(root),
        &server.join("trust").join(root),
    )?;
    for file in &made.copied {
        let to = server.join(file);
        disk::private_dir(disk::parent_of(&to))?;
        copy(&first.base().join(file), &to)?;
    }
    write(FILE_NAME, made.text.as_bytes())?;
    Config::load(&server.join(FILE_NAME))
        .doing(|| "check the configuration of the new node".to_owned())?;

    let place = out.join("server");
    fs::rename(&server, &place).doing(|| format!("make {}", place.display()))?;
    disk::sync_dir(out).doing(|| format!("write {}", out.display()))?;
    Ok(Added {
        dir: out.clone(),
        names: args.server_names.clone(),
        not_after,
        made,
        files: Some(first.files.url).filter(|url| url.starts_with("file:")),
    })
}

/// What two nodes must not, or must, have in common.
fn check(first: &Config, args: &NodeAdd) -> Result<()> {
    if first.node_id == args.id {
        return Err(
            Failure::usage(format!("{} is the first node's own id", args.id))
                .next("Choose one that no other node has."),
        );
    }
    let place = first
        .place()
        .map_err(|error| Failure::from_error(error).as_usage())?;
    if let Place::Sqlite(_) = place {
        return Err(Failure::usage(
            "the first node's database is built into it; nodes share one PostgreSQL database",
        )
        .next(format!(
            "Carry it over: fwpush db migrate --from {place} --to postgres://USER@HOST/DATABASE\n\
             then set `url` in [database] of {}, and repeat the command.",
            first.path.display()
        )));
    }
    Ok(())
}

/// An authority of another installation would make nodes that nobody in this one knows.
fn is_of(ca: &Ca, first: &Config) -> Result<()> {
    let known = &first.pki.node_ca;
    let certificates = certificates_from_pem(&disk::read_text(known)?)
        .doing(|| format!("read {}", known.display()))?;
    if certificates.contains(ca.cert_der()) {
        return Ok(());
    }
    let words = format!(
        "the offline node authority is not the one of {}",
        known.display()
    );
    Err(Failure::usage(words)
        .next("Take the offline directory that `fwpush init` made with this installation."))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    // Private keys are among them.
    let content = zeroize::Zeroizing::new(disk::read_limited(from, limits::DOCUMENT_BYTES)?);
    disk::write_new(to, &content)
}
