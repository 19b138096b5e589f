//! `fwpush node renew`: a node's certificate anew.

use std::path::{Path, PathBuf};

use fwpush_keys::{
    SanName, Timestamp, names_of,
    tls::{certificates_from_pem, peer_of},
};
use fwpush_server::Config;
use serde_json::json;

use super::authority;
use crate::{
    Context,
    args::NodeRenew,
    config::find_server_config,
    disk,
    failure::{Doing as _, Failure, Result},
    limits,
    output::{escape, time_and_distance},
};

/// What was made.
#[derive(Debug)]
pub struct Renewed {
    file: PathBuf,
    node: String,
    pub names: Vec<SanName>,
    pub not_after: Timestamp,
}

/// Runs the command.
pub fn run(context: &Context, args: &NodeRenew) -> Result<()> {
    let now = Timestamp::now();
    let renewed = renew(context.dir(), args, now)?;
    let names: Vec<String> = renewed.names.iter().map(ToString::to_string).collect();
    context.out.data(
        || {
            json!({
                "node_id": renewed.node,
                "certificate": renewed.file,
                "server_names": names,
                "certificate_expires": renewed.not_after,
            })
        },
        || {
            format!(
                "Certified node {} for {} until {}.\n\
                 Next: bring {} to the node if it is not there, then SIGHUP to its `fwpush serve`.\n",
                renewed.node,
                names.join(", "),
                time_and_distance(renewed.not_after, now),
                escape(&renewed.file.to_string_lossy()),
            )
        },
    )
}

/// Replaces the certificate's file.
pub fn renew(dir: Option<&Path>, args: &NodeRenew, now: Timestamp) -> Result<Renewed> {
    let file = match &args.certificate {
        Some(file) => file.clone(),
        None => {
            let path = find_server_config(dir, None)?;
            let config = Config::load(&path)
                .doing(|| "read the node's configuration".to_owned())
                .map_err(Failure::as_usage)?;
            config.pki.certificate
        }
    };
    let what = || format!("read {}", file.display());
    let old = certificates_from_pem(&disk::read_text(&file)?).doing(what)?;
    let node = peer_of(&old).doing(what)?.identity.id;
    let ca = authority(dir, args.offline.as_deref())?;
    let names = match args.server_names.is_empty() {
        true => names_of(&old[0]).doing(what)?,
        false => args.server_names.clone(),
    };
    let renewed = ca
        .renew_node(&old[0], &names, now, limits::NODE_CERTIFICATE_DAYS)
        .doing(|| format!("renew the certificate of node {node}"))?;
    let read = certificates_from_pem(&renewed).doing(what)?;
    let not_after = peer_of(&read).doing(what)?.not_after;
    disk::replace(&file, renewed.as_bytes())?;
    Ok(Renewed {
        file,
        node,
        names,
        not_after,
    })
}
