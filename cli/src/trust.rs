//! The root that this operator trusts: what `init` left, moved on by every root that its own keys vouch for.

use std::path::Path;

use fwpush_keys::{Envelope, Root, Timestamp, Verified};
use fwpush_proto::v1::{GetTrustRequest, TrustInfo};

use crate::{
    client::Client,
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    limits::DOCUMENT_BYTES,
    output::Output,
};

/// Reads a signed document, or one that is still to be signed.
pub fn read_envelope(path: &Path) -> Result<Envelope> {
    let bytes = disk::read_limited(path, DOCUMENT_BYTES)?;
    Envelope::parse(&bytes).doing(|| format!("read the document {}", path.display()))
}

/// Reads a root document that is trusted because of where it lies.
pub fn read_root(path: &Path) -> Result<Verified<Root>> {
    let bytes = disk::read_limited(path, DOCUMENT_BYTES)?;
    Verified::<Root>::bootstrap(&bytes)
        .doing(|| format!("use the root document {}", path.display()))
}

/// The newest root, and everything the server says of trust documents.
#[derive(Debug)]
pub struct Present {
    pub root: Verified<Root>,
    pub info: TrustInfo,
}

/// Asks the server for its trust documents and moves the operator's root on along the server's chain.
///
/// A root that the held one does not vouch for is refused, and so is another document under the held one's version: then
/// this is another installation's server, or one that was taken over.
pub async fn present(client: &Client, out: Output) -> Result<Present> {
    let info = client
        .call("ask for the trust documents", async |admin| {
            admin.get_trust(GetTrustRequest {}).await
        })
        .await?;
    let path = &client.config.root;
    let held = read_root(path)
        .next_step(|| format!("{} names the root document.", client.config.path.display()))?;
    let foreign = || {
        Failure::new(format!(
            "the server's root documents do not continue the one that this operator trusts, {}",
            path.display()
        ))
        .next("Is this the server of this installation? If so, its trust documents were tampered with.")
    };
    let mut root = held.clone();
    for envelope in &info.roots {
        let version = claimed_version(envelope).ok_or_else(foreign)?;
        if version == root.version && !same_document(envelope, root.envelope()) {
            return Err(foreign());
        }
        if version > root.version {
            root = root
                .advance(envelope)
                .map_err(|error| foreign().doing(error))?;
        }
    }
    if root.version > held.version {
        disk::replace(path, root.envelope())?;
        out.say(&format!(
            "Root version {} is accepted; it replaces version {} in {}.",
            root.version,
            held.version,
            path.display()
        ));
    }
    if info.root_version < root.version {
        out.say(&format!(
            "warning: the server holds root version {}, this operator {}. Was the server restored from an old backup? \
             Publish the missing roots again.",
            info.root_version, root.version
        ));
    }
    if let Err(error) = root.check_expiry(Timestamp::now()) {
        out.say(&format!("warning: {error}; devices install nothing until a new one is published (`fwpush keys rotate-root`)."));
    }
    Ok(Present { root, info })
}

/// The version that an envelope claims; nothing is verified.
fn claimed_version(envelope: &[u8]) -> Option<u64> {
    let parsed = Envelope::parse(envelope).ok()?;
    Root::from_payload(parsed.payload())
        .ok()
        .map(|root| root.version)
}

/// Whether two envelopes carry the same bytes, whoever signed them.
fn same_document(one: &[u8], other: &[u8]) -> bool {
    match (Envelope::parse(one), Envelope::parse(other)) {
        (Ok(one), Ok(other)) => one.payload() == other.payload(),
        _ => false,
    }
}
