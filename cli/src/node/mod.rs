//! `fwpush node`: further nodes of an installation, and their certificates.

mod add;
mod config;
mod renew;

use std::path::Path;

use fwpush_keys::{Ca, Role};
use zeroize::Zeroizing;

use crate::{
    Context,
    args::{NodeArgs, NodeCommand},
    config::offline_dir,
    disk,
    failure::{Doing as _, Failure, Result},
};

/// Runs the command.
pub fn run(context: &Context, args: &NodeArgs) -> Result<()> {
    match &args.command {
        NodeCommand::Add(args) => add::run(context, args),
        NodeCommand::Renew(args) => renew::run(context, args),
    }
}

/// The node authority with its key, from `offline` or from where it lies beside `dir`.
fn authority(dir: Option<&Path>, offline: Option<&Path>) -> Result<Ca> {
    let offline = match offline {
        Some(offline) => offline.to_owned(),
        None => offline_dir(dir).ok_or_else(|| {
            Failure::usage("the directory with the offline keys is not here").next(
                "Name it with --offline DIR: the node authority's key, node-ca.key, certifies nodes.",
            )
        })?,
    };
    let read = |name: &str| disk::read_text(&offline.join(name)).map_err(Failure::as_usage);
    let key = Zeroizing::new(read("node-ca.key")?);
    let what = || format!("read the node authority in {}", offline.display());
    let ca = Ca::load(&read("node-ca.crt")?, &key)
        .doing(what)
        .map_err(Failure::as_usage)?;
    if ca.role() != Role::Node {
        let role = ca.role();
        return Err(
            Failure::usage(format!("the authority is for {role} certificates")).doing(what()),
        );
    }
    Ok(ca)
}

#[cfg(test)]
mod tests;
