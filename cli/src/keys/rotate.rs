//! `fwpush keys rotate-root`: the root after the present one.

use std::path::PathBuf;

use fwpush_keys::{
    Envelope, KeyId, Product, ProductRule, PublicKey, RoleKeys, Root, Timestamp, Verified,
};
use serde_json::json;

use super::{root_text, warn_of_expiry};
use crate::{
    Context,
    args::KeysRotateRoot,
    config::{self, OperatorConfig},
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    output::plural,
    signing, trust,
};

/// What a product may count to when neither it nor the arguments say.
const MAX_COUNTER: u64 = 100;

/// Runs the command.
pub async fn run(context: &Context, args: &KeysRotateRoot) -> Result<()> {
    let present = present_root(context, args).await?;
    let next = next_root(args, &present, Timestamp::now())?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.root.json", next.version)));
    if out.exists() {
        return Err(Failure::usage(format!("{} exists already", out.display()))
            .next("Choose another --out."));
    }
    let mut envelope = next
        .to_envelope()
        .doing(|| "build the new root".to_owned())
        .map_err(Failure::as_usage)
        .next_step(|| "`fwpush keys show` has the present root.".to_owned())?;
    sign(context, args, &present, &next, &mut envelope)?;
    let bytes = envelope.to_bytes();
    let accepted = present.advance(&bytes);
    disk::write_new(&out, &bytes)?;
    let file = out.display();
    context.out.data(
        || {
            json!({
                "file": out,
                "root": next,
                "signatures": envelope.signatures().len(),
                "ready": accepted.is_ok(),
                "missing": accepted.as_ref().err().map(ToString::to_string),
            })
        },
        || root_text(&next),
    )?;
    warn_of_expiry(context, &next);
    match accepted {
        Ok(_) => context.out.say(&format!("Wrote {file}. Next: fwpush keys publish {file}")),
        Err(error) => context.out.say(&format!(
            "Wrote {file}. It cannot be published yet: {error}.\nNext: fwpush keys sign {file} --key FILE"
        )),
    }
    Ok(())
}

/// The root to go on from: the named one, else the newest that the server has, else the operator's.
async fn present_root(context: &Context, args: &KeysRotateRoot) -> Result<Verified<Root>> {
    if let Some(path) = &args.root {
        return trust::read_root(path);
    }
    let config = OperatorConfig::find(context.dir())
        .next_step(|| "Name the present root with --root FILE.".to_owned())?;
    match context.client().await {
        Ok(client) => Ok(trust::present(&client, context.out).await?.root),
        Err(failure) => {
            context.out.say(&format!(
                "The server was not asked ({failure}); using {}.",
                config.root.display()
            ));
            trust::read_root(&config.root)
        }
    }
}

/// The present root with the changes that the arguments ask for.
fn next_root(args: &KeysRotateRoot, present: &Root, now: Timestamp) -> Result<Root> {
    let issued = Timestamp::from_ms(now.as_secs() * 1_000);
    let expires = args
        .expires
        .resolve(now)
        .map_err(|error| Failure::usage(format!("--expires: {error}")))?;
    let mut next = present.next(issued, expires);

    let root_keys = add_keys(&mut next, &args.add_root_keys)?;
    change_role(
        "root",
        &mut next.roles.root,
        root_keys,
        &args.remove_root_keys,
        args.root_threshold,
    )?;
    let release_keys = add_keys(&mut next, &args.add_release_keys)?;
    change_role(
        "release",
        &mut next.roles.release,
        release_keys,
        &args.remove_release_keys,
        args.release_threshold,
    )?;

    for product in &args.remove_products {
        if next.products.remove(product).is_none() {
            return Err(no_product(product));
        }
    }
    for add in &args.add_products {
        let rule = next
            .products
            .entry(add.product.clone())
            .or_insert_with(|| ProductRule::new(MAX_COUNTER));
        rule.max_counter = add.max_counter.unwrap_or(rule.max_counter);
    }
    change_product_keys(args, &mut next)?;
    next.drop_unused_keys();
    Ok(next)
}

/// Lists public keys from files; they have no role yet.
fn add_keys(root: &mut Root, files: &[PathBuf]) -> Result<Vec<KeyId>> {
    files
        .iter()
        .map(|file| Ok(root.add_key(signing::read_public_key(file)?)))
        .collect()
}

fn change_role(
    name: &str,
    role: &mut RoleKeys,
    add: Vec<KeyId>,
    remove: &[KeyId],
    threshold: Option<u32>,
) -> Result<()> {
    for id in remove {
        let before = role.keyids.len();
        role.keyids.retain(|held| held != id);
        if role.keyids.len() == before {
            return Err(
                Failure::usage(format!("the present root has no {name} key {id}"))
                    .next("`fwpush keys show` lists the keys."),
            );
        }
    }
    for id in add {
        if !role.keyids.contains(&id) {
            role.keyids.push(id);
        }
    }
    role.threshold = threshold.unwrap_or(role.threshold);
    Ok(())
}

/// Products' own keys: the first one begins a role of 1 key, the removal of the last one ends it.
fn change_product_keys(args: &KeysRotateRoot, next: &mut Root) -> Result<()> {
    for add in &args.add_product_keys {
        let id = next.add_key(signing::read_public_key(add.value.as_ref())?);
        let mut role = own_role(next, &add.product)?;
        change_role("product", &mut role, vec![id], &[], None)?;
        set_own_role(next, &add.product, role);
    }
    for remove in &args.remove_product_keys {
        let mut role = own_role(next, &remove.product)?;
        change_role("product", &mut role, Vec::new(), &[remove.value], None)?;
        set_own_role(next, &remove.product, role);
    }
    for set in &args.product_thresholds {
        let mut role = own_role(next, &set.product)?;
        role.threshold = set.value;
        set_own_role(next, &set.product, role);
    }
    Ok(())
}

fn own_role(root: &Root, product: &Product) -> Result<RoleKeys> {
    let rule = root
        .products
        .get(product)
        .ok_or_else(|| no_product(product))?;
    Ok(RoleKeys {
        keyids: rule.keyids.clone().unwrap_or_default(),
        threshold: rule.threshold.unwrap_or(1),
    })
}

fn set_own_role(root: &mut Root, product: &Product, role: RoleKeys) {
    if let Some(rule) = root.products.get_mut(product) {
        let kept = (!role.keyids.is_empty()).then_some(role);
        rule.threshold = kept.as_ref().map(|role| role.threshold);
        rule.keyids = kept.map(|role| role.keyids);
    }
}

fn no_product(product: &Product) -> Failure {
    Failure::usage(format!("the root has no product {product}"))
        .next("`fwpush keys show` lists the products.")
}

/// Signs with the named keys, else with those of `offline/` that have a say in the present or the new root.
fn sign(
    context: &Context,
    args: &KeysRotateRoot,
    present: &Root,
    next: &Root,
    envelope: &mut Envelope,
) -> Result<()> {
    let signers: Vec<PublicKey> = present
        .public_keys(&present.roles.root)
        .chain(next.public_keys(&next.roles.root))
        .copied()
        .collect();
    let named = !args.keys.is_empty();
    let files = if named {
        args.keys.clone()
    } else {
        offline_root_keys(context)?
    };
    let mut signed = 0;
    for file in &files {
        let key = signing::read_key(file, context.out)?;
        if !signers.contains(&key.public()) {
            if named {
                return Err(Failure::usage(format!(
                    "{} is a root key of neither the present nor the new root",
                    file.display()
                )));
            }
            continue;
        }
        envelope
            .sign(&key)
            .doing(|| format!("sign with {}", file.display()))?;
        signed += 1;
    }
    context
        .out
        .say(&format!("Signed with {}.", plural(signed, "root key")));
    Ok(())
}

/// `DIR/offline/root-*.key`, sorted by name; none where the keys are kept elsewhere.
fn offline_root_keys(context: &Context) -> Result<Vec<PathBuf>> {
    match config::offline_dir(context.dir()) {
        Some(dir) => disk::files_named(&dir, "root-", ".key"),
        None => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use clap::Parser as _;
    use fwpush_keys::SigningKey;

    use super::*;
    use crate::args::{Cli, Command, KeysCommand};

    fn args(more: &[&str]) -> KeysRotateRoot {
        let line = ["fwpush", "keys", "rotate-root"];
        let Command::Keys(keys) = Cli::try_parse_from(line.iter().chain(more))
            .unwrap()
            .command
        else {
            panic!("keys")
        };
        let KeysCommand::RotateRoot(rotate) = keys.command else {
            panic!("rotate-root")
        };
        *rotate
    }

    fn first() -> (Root, [SigningKey; 3], SigningKey) {
        let keys = [(); 3].map(|()| SigningKey::generate());
        let release = SigningKey::generate();
        let publics = [keys[0].public(), keys[1].public(), keys[2].public()];
        let (issued, expires) = (Timestamp::from_ms(1_000), Timestamp::from_ms(1_000_000));
        let mut root = Root::first(issued, expires, (2, &publics), (1, &[release.public()]));
        root.products
            .insert("gateway".parse().unwrap(), ProductRule::new(7));
        (root, keys, release)
    }

    fn write_public(dir: &Path, name: &str) -> (String, SigningKey) {
        let key = SigningKey::generate();
        let path = dir.join(name);
        fs::write(&path, key.public().to_pem()).unwrap();
        (path.to_str().unwrap().to_owned(), key)
    }

    fn now() -> Timestamp {
        Timestamp::from_ms(2_000)
    }

    #[test]
    fn what_is_not_named_stays() {
        let (root, ..) = first();
        let next = next_root(&args(&[]), &root, now()).unwrap();
        assert_eq!(next.version, 2);
        assert_eq!(
            (&next.keys, &next.roles, &next.products),
            (&root.keys, &root.roles, &root.products)
        );
    }

    #[test]
    fn a_release_key_is_replaced() {
        let (root, _, old) = first();
        let dir = tempfile::tempdir().unwrap();
        let (file, new) = write_public(dir.path(), "new.pub");
        let old_id = old.public().key_id();
        let old_text = old_id.to_string();
        let line = [
            "--add-release-key",
            &file,
            "--remove-release-key",
            &old_text,
        ];
        let next = next_root(&args(&line), &root, now()).unwrap();
        assert_eq!(next.roles.release.keyids, [new.public().key_id()]);
        assert!(
            !next.keys.contains_key(&old_id),
            "a key without a role is not listed"
        );
        next.to_envelope().unwrap();
    }

    #[test]
    fn products_come_change_and_go() {
        let (root, ..) = first();
        let next = next_root(
            &args(&["--add-product", "meter", "--add-product", "gateway=9"]),
            &root,
            now(),
        )
        .unwrap();
        let max = |name: &str| next.products[&name.parse::<Product>().unwrap()].max_counter;
        assert_eq!((max("meter"), max("gateway")), (MAX_COUNTER, 9));
        let next = next_root(&args(&["--remove-product", "gateway"]), &root, now()).unwrap();
        assert!(next.products.is_empty());
        assert!(next_root(&args(&["--remove-product", "none"]), &root, now()).is_err());
    }

    #[test]
    fn a_products_own_keys_begin_and_end() {
        let (root, ..) = first();
        let dir = tempfile::tempdir().unwrap();
        let (file, own) = write_public(dir.path(), "own.pub");
        let gateway: Product = "gateway".parse().unwrap();
        let with = next_root(
            &args(&["--add-product-key", &format!("gateway={file}")]),
            &root,
            now(),
        )
        .unwrap();
        assert_eq!(
            with.release_keys(&gateway),
            Some(RoleKeys::new(1, &[own.public()]))
        );
        with.to_envelope().unwrap();
        let line = format!("gateway={}", own.public().key_id());
        let without = next_root(&args(&["--remove-product-key", &line]), &with, now()).unwrap();
        assert_eq!(
            without.release_keys(&gateway).as_ref(),
            Some(&without.roles.release)
        );
    }

    #[test]
    fn a_threshold_that_nobody_can_reach_is_refused() {
        let (root, ..) = first();
        let next = next_root(&args(&["--root-threshold", "4"]), &root, now()).unwrap();
        assert!(next.to_envelope().is_err());
    }
}
