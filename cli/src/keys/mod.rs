//! `fwpush keys`: trust documents, made and signed here, published to the server.

mod revoke;
mod rotate;

use std::path::Path;

use fwpush_keys::{
    Envelope, PayloadType, PublicKey, Release as Manifest, Revocation, RoleKeys, Root, SigningKey,
    Timestamp, Verified,
};
use fwpush_proto::v1::{PublishTrustRequest, TrustInfo};
use serde_json::{Value, json};

use crate::{
    Context,
    args::{KeysArgs, KeysCommand, KeysNewReleaseKey, KeysPublish, KeysShow, KeysSign, KeysVerify},
    client::Client,
    config, disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    limits,
    output::{Facts, Table, plural, time_and_distance},
    signing, trust,
};

/// Runs the command.
pub async fn run(context: &Context, args: &KeysArgs) -> Result<()> {
    match &args.command {
        KeysCommand::Show(args) => show(context, args).await,
        KeysCommand::NewReleaseKey(args) => new_release_key(context, args),
        KeysCommand::RotateRoot(args) => rotate::run(context, args).await,
        KeysCommand::Revoke(args) => revoke::run(context, args).await,
        KeysCommand::Sign(args) => sign(context, args).await,
        KeysCommand::Verify(args) => verify(context, args),
        KeysCommand::Publish(args) => publish_file(context, args).await,
    }
}

// ---- show ----

async fn show(context: &Context, args: &KeysShow) -> Result<()> {
    let (root, info) = match &args.root {
        Some(path) => (trust::read_root(path)?, None),
        None => {
            let present = trust::present(&context.client().await?, context.out).await?;
            (present.root, Some(present.info))
        }
    };
    let info = info.as_ref();
    context.out.data(
        || json!({ "root": &*root, "server_root_version": info.map(|info| info.root_version), "revocations": info.map(revocations_json) }),
        || root_text(&root) + &info.map(revocations_text).unwrap_or_default(),
    )?;
    warn_of_expiry(context, &root);
    Ok(())
}

/// A root that expires soon needs a ceremony with its key holders: says so in time.
fn warn_of_expiry(context: &Context, root: &Root) {
    let now = Timestamp::now();
    if root.expires <= now.saturating_add(limits::ROOT_EXPIRY_WARNING) {
        context.out.say(&format!(
            "warning: root version {} expires {}. Make the next with `fwpush keys rotate-root` before: devices install \
             nothing under an expired root.",
            root.version,
            time_and_distance(root.expires, now)
        ));
    }
}

fn root_text(root: &Root) -> String {
    let now = Timestamp::now();
    let mut facts = Facts::default();
    facts
        .add("root version", root.version.to_string())
        .add("issued", root.issued.to_string())
        .add("expires", time_and_distance(root.expires, now))
        .add("root keys", role_words(&root.roles.root))
        .add("release keys", role_words(&root.roles.release));
    let mut text = facts.text();
    let mut keys = Table::new(["KEY", "SIGNS"]);
    for id in root.keys.keys() {
        let mut signs = Vec::new();
        if root.roles.root.keyids.contains(id) {
            signs.push("roots".to_owned());
        }
        if root.roles.release.keyids.contains(id) {
            signs.push("releases".to_owned());
        }
        if root
            .roles
            .freshness
            .as_ref()
            .is_some_and(|role| role.keyids.contains(id))
        {
            signs.push("freshness".to_owned());
        }
        let own = root
            .products
            .iter()
            .filter(|(_, rule)| rule.keyids.as_ref().is_some_and(|ids| ids.contains(id)));
        signs.extend(own.map(|(product, _)| format!("releases of {product}")));
        keys.row([id.to_string(), signs.join(", ")]);
    }
    text.push('\n');
    text.push_str(&keys.or("No keys."));
    let mut products = Table::new(["PRODUCT", "HIGHEST COUNTER", "SIGNED BY"]);
    for (product, rule) in &root.products {
        let signed_by = match (&rule.keyids, rule.threshold) {
            (Some(ids), Some(threshold)) => {
                format!("{threshold} of its own {}", plural(ids.len() as u64, "key"))
            }
            _ => "the release keys".to_owned(),
        };
        products.row([product.to_string(), rule.max_counter.to_string(), signed_by]);
    }
    text.push('\n');
    text.push_str(&products.or("No products: nothing can be released. Add one with `fwpush keys rotate-root --add-product`."));
    text
}

fn role_words(role: &RoleKeys) -> String {
    format!("{} of {} must sign", role.threshold, role.keyids.len())
}

fn revocations_text(info: &TrustInfo) -> String {
    let mut table = Table::new(["REVOCATIONS OF", "LIST", "RELEASES", "LOWEST COUNTER"]);
    for list in &info.revocations {
        let version = list.version.unwrap_or_default();
        table.row([
            list.product.clone(),
            format!("{}.{}", version.root_version, version.version),
            list.revoked.to_string(),
            list.min_security_counter.to_string(),
        ]);
    }
    format!("\n{}", table.or("Nothing is revoked."))
}

fn revocations_json(info: &TrustInfo) -> Value {
    info.revocations
        .iter()
        .map(|list| {
            let document = Envelope::parse(&list.envelope)
                .ok()
                .and_then(|envelope| Revocation::from_payload(envelope.payload()).ok());
            let version = list.version.unwrap_or_default();
            json!({
                "product": list.product,
                "root_version": version.root_version,
                "version": version.version,
                "min_security_counter": list.min_security_counter,
                "revoked": document.map(|document| document.revoked),
            })
        })
        .collect()
}

// ---- new-release-key ----

fn new_release_key(context: &Context, args: &KeysNewReleaseKey) -> Result<()> {
    let path = match &args.out {
        Some(path) => path.clone(),
        None => {
            let offline = config::need_offline_dir(context.dir())
                .next_step(|| "Name the file with --out FILE.".to_owned())?;
            disk::next_free(&offline, "release-", ".key")?
        }
    };
    let mut public_path = path.clone().into_os_string();
    public_path.push(".pub");
    let key = SigningKey::generate();
    // The public half first: a private key without it would look like one that failed to be made.
    disk::write_new(public_path.as_ref(), key.public().to_pem().as_bytes())?;
    disk::write_new(&path, key.to_pkcs8_v1_pem().as_bytes())?;
    let id = key.public().key_id();
    let public_shown = Path::new(&public_path).display();
    context.out.data(
        || json!({ "keyid": id, "public": key.public(), "file": path, "public_file": public_shown.to_string() }),
        || {
            format!(
                "key    {id}\nfile   {}\npublic {public_shown}\n\
                 It counts once a root names it. Next: fwpush keys rotate-root --add-release-key {public_shown}\n",
                path.display()
            )
        },
    )
}

// ---- sign ----

async fn sign(context: &Context, args: &KeysSign) -> Result<()> {
    let mut envelope = trust::read_envelope(&args.file)?;
    let present = match &args.signing.root {
        Some(path) => Some(trust::read_root(path)?),
        None => context.local_root()?,
    };
    let (words, candidates) = match envelope.payload_type() {
        PayloadType::Root => {
            let next = read_root_of(&envelope)?;
            let mut candidates: Vec<PublicKey> =
                next.public_keys(&next.roles.root).copied().collect();
            if let Some(present) = &present {
                candidates.extend(present.public_keys(&present.roles.root));
            }
            (root_text(&next), candidates)
        }
        PayloadType::Revocation => {
            let list = read_revocation_of(&envelope)?;
            let role = present
                .as_ref()
                .and_then(|root| root.release_keys(&list.product));
            let candidates = match (&present, &role) {
                (Some(root), Some(role)) => root.public_keys(role).copied().collect(),
                _ => Vec::new(),
            };
            (revoke::text(&list), candidates)
        }
        PayloadType::Release => {
            return Err(Failure::usage(
                "a release is signed with `fwpush release sign`",
            ));
        }
    };
    // A person looks at this before touching a key: it comes first, and on stderr.
    context.out.say(words.trim_end());
    let no_default =
        || Err(Failure::usage("no key is named").next("Add --key FILE or --signer CMD."));
    let signers = signing::sign(
        &mut envelope,
        &args.signing,
        no_default,
        &candidates,
        context.out,
    )
    .await?;
    if present.is_some() {
        for key in signers.iter().filter(|key| !candidates.contains(key)) {
            context.out.say(&format!(
                "warning: no root lists key {} for this: its signature does not count",
                key.key_id()
            ));
        }
    }
    disk::replace(&args.file, &envelope.to_bytes())?;
    context.out.data(
        || {
            json!({
                "file": args.file,
                "signed_by": signers.iter().map(PublicKey::key_id).collect::<Vec<_>>(),
                "signatures": envelope.signatures().len(),
            })
        },
        || {
            format!(
                "{} has {} now.\n",
                args.file.display(),
                plural(envelope.signatures().len() as u64, "signature")
            )
        },
    )
}

fn read_root_of(envelope: &Envelope) -> Result<Root> {
    Root::from_payload(envelope.payload()).doing(|| "read the root document".to_owned())
}

fn read_revocation_of(envelope: &Envelope) -> Result<Revocation> {
    Revocation::from_payload(envelope.payload()).doing(|| "read the revocation list".to_owned())
}

// ---- verify ----

fn verify(context: &Context, args: &KeysVerify) -> Result<()> {
    let root = match &args.root {
        Some(path) => Some(trust::read_root(path)?),
        None => context.local_root()?,
    };
    let bytes = disk::read_limited(&args.file, 1 << 20)?;
    let envelope = trust::read_envelope(&args.file)?;
    let (value, text) = judge(root.as_ref(), &envelope, &bytes)
        .while_doing(|| format!("{} would be refused", args.file.display()))?;
    context.out.data(|| value, || text)
}

/// What a device that holds `root` would say of the document.
fn judge(
    root: Option<&Verified<Root>>,
    envelope: &Envelope,
    bytes: &[u8],
) -> Result<(Value, String)> {
    let kind = envelope.payload_type();
    let need_root = || {
        root.ok_or_else(|| {
            Failure::usage("there is no root to verify it against")
                .next("Name one with --root FILE.")
        })
    };
    match kind {
        PayloadType::Root => judge_root(root, envelope, bytes),
        PayloadType::Release => {
            let (root, manifest) = (
                need_root()?,
                Manifest::from_payload(envelope.payload()).doing(|| "read it".to_owned())?,
            );
            let release = root
                .verify_release(&manifest.product, bytes)
                .doing(|| "check the release".to_owned())?;
            root.check_expiry(Timestamp::now())
                .doing(|| "check the root".to_owned())?;
            let words = format!(
                "Release {} {} is signed as root version {} asks.\n",
                release.product, release.version, root.version
            );
            let expired = release.expires <= Timestamp::now();
            let more = if expired {
                format!(
                    "It expired {}: devices will not begin to install it.\n",
                    release.expires
                )
            } else {
                String::new()
            };
            Ok((
                json!({ "kind": kind.noun(), "root_version": root.version, "expired": expired, "document": &*release }),
                words + &more,
            ))
        }
        PayloadType::Revocation => {
            let (root, list) = (need_root()?, read_revocation_of(envelope)?);
            let list = root
                .verify_revocation(&list.product, bytes)
                .doing(|| "check the list".to_owned())?;
            let words = format!(
                "The list is signed as root version {} asks.\n{}",
                root.version,
                revoke::text(&list)
            );
            Ok((
                json!({ "kind": kind.noun(), "root_version": root.version, "document": &*list }),
                words,
            ))
        }
    }
}

fn judge_root(
    root: Option<&Verified<Root>>,
    envelope: &Envelope,
    bytes: &[u8],
) -> Result<(Value, String)> {
    let claimed = read_root_of(envelope)?.version;
    let what = || "check the root".to_owned();
    let (verified, words) = match root {
        Some(held) if claimed > held.version => {
            let next = held.advance(bytes).doing(what).next_step(|| {
                "Both the present root's and its own root keys must sign it: `fwpush keys sign FILE --key FILE`.".to_owned()
            })?;
            (
                next,
                format!(
                    "Root version {claimed} follows version {}: devices accept it.\n",
                    held.version
                ),
            )
        }
        held => {
            let alone = Verified::<Root>::bootstrap(bytes).doing(what)?;
            let words = match held {
                Some(held) if held.version == claimed && **held == *alone => {
                    format!("This is the root that is held, version {claimed}.\n")
                }
                Some(held) => {
                    return Err(Failure::new(format!(
                        "it is version {claimed}, and version {} is held: devices ignore it",
                        held.version
                    ))
                    .next("`fwpush keys rotate-root` makes the one that follows."));
                }
                None => format!(
                    "Root version {claimed} is signed by its own keys; there is no root to compare it with.\n"
                ),
            };
            (alone, words)
        }
    };
    verified.check_expiry(Timestamp::now()).doing(what)?;
    Ok((
        json!({ "kind": "root document", "document": &*verified }),
        format!("{words}\n{}", root_text(&verified)),
    ))
}

// ---- publish ----

async fn publish_file(context: &Context, args: &KeysPublish) -> Result<()> {
    let bytes = disk::read_limited(&args.file, 1 << 20)?;
    let envelope = trust::read_envelope(&args.file)?;
    if envelope.payload_type() == PayloadType::Release {
        return Err(Failure::usage(
            "a release is published with `fwpush release publish`",
        ));
    }
    let client = context.client().await?;
    let info = publish(&client, &bytes).await?;
    // Takes a new root over into the operator's root.json, verified.
    let present = trust::present(&client, context.out).await?;
    context.out.data(
        || json!({ "root_version": info.root_version, "revocations": revocations_json(&info) }),
        || {
            let words = match envelope.payload_type() {
                PayloadType::Root => format!("Root version {} is published", present.root.version),
                _ => "The revocation list is published".to_owned(),
            };
            format!("{words}; devices get it as they are connected.\n")
        },
    )
}

/// Gives a trust document to the server.
async fn publish(client: &Client, bytes: &[u8]) -> Result<TrustInfo> {
    let request = PublishTrustRequest {
        envelope: bytes.to_vec().into(),
    };
    client
        .call("publish the document", async |admin| {
            admin.publish_trust(request).await
        })
        .await
}

#[cfg(test)]
mod tests;
