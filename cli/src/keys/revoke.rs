//! `fwpush keys revoke`: the next revocation list of a product.

use std::{collections::BTreeMap, path::PathBuf};

use fwpush_keys::{Envelope, PublicKey, ReleaseId, Revocation, Revoked, Timestamp};
use fwpush_proto::v1::TrustInfo;
use serde_json::json;

use super::{publish, read_revocation_of};
use crate::{
    Context,
    args::KeysRevoke,
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    output::{Facts, Table},
    signing, trust,
};

/// Runs the command.
pub async fn run(context: &Context, args: &KeysRevoke) -> Result<()> {
    let client = context.client().await?;
    let present = trust::present(&client, context.out).await?;
    let product = &args.product;
    let role = present.root.release_keys(product).ok_or_else(|| {
        Failure::new(format!(
            "root version {} has no product {product}",
            present.root.version
        ))
        .next("`fwpush keys show` lists the products.")
    })?;
    let held = held_list(&present.info, args)?;
    let list = next_list(args, held.as_ref(), present.root.version, Timestamp::now())?;
    let out = args.out.clone().unwrap_or_else(|| {
        PathBuf::from(format!(
            "{product}.{}.{}.revocation.json",
            list.root_version, list.version
        ))
    });
    if out.exists() {
        return Err(Failure::usage(format!("{} exists already", out.display()))
            .next("Choose another --out."));
    }
    let mut envelope = list
        .to_envelope()
        .doing(|| "build the list".to_owned())
        .map_err(Failure::as_usage)?;
    let candidates: Vec<PublicKey> = present.root.public_keys(&role).copied().collect();
    let default_keys = || signing::default_release_keys(context.dir(), &candidates);
    signing::sign(
        &mut envelope,
        &args.signing,
        default_keys,
        &candidates,
        context.out,
    )
    .await?;
    let bytes = envelope.to_bytes();
    let accepted = present.root.verify_revocation(product, &bytes);
    disk::write_new(&out, &bytes)?;
    context.out.data(
        || json!({ "file": out, "list": list, "ready": accepted.is_ok(), "published": args.publish && accepted.is_ok() }),
        || text(&list),
    )?;
    let file = out.display();
    match accepted {
        Ok(_) if args.publish => {
            publish(&client, &bytes).await?;
            context.out.say(&format!("Wrote {file} and published it."));
            Ok(())
        }
        Ok(_) => {
            context
                .out
                .say(&format!("Wrote {file}. Next: fwpush keys publish {file}"));
            Ok(())
        }
        Err(error) => {
            let unready = Err::<(), _>(error)
                .doing(|| format!("wrote {file}, but it cannot be published yet"))
                .next_step(|| format!("fwpush keys sign {file} --key FILE"));
            if args.publish {
                unready
            } else {
                unready.or_else(|failure| {
                    context.out.say(&format!(
                        "{failure}\nNext: fwpush keys sign {file} --key FILE"
                    ));
                    Ok(())
                })
            }
        }
    }
}

/// The list that the server holds for the product.
fn held_list(info: &TrustInfo, args: &KeysRevoke) -> Result<Option<Revocation>> {
    let product = args.product.as_str();
    let Some(held) = info.revocations.iter().find(|list| list.product == product) else {
        return Ok(None);
    };
    let envelope =
        Envelope::parse(&held.envelope).doing(|| "read the present revocation list".to_owned())?;
    read_revocation_of(&envelope).map(Some)
}

/// The held list with the arguments' additions. What was revoked stays so; a counter never goes down.
fn next_list(
    args: &KeysRevoke,
    held: Option<&Revocation>,
    root_version: u64,
    now: Timestamp,
) -> Result<Revocation> {
    let issued = Timestamp::from_ms(now.as_secs() * 1_000);
    let expires = args
        .expires
        .resolve(now)
        .map_err(|error| Failure::usage(format!("--expires: {error}")))?;
    let held_counter = held.map_or(0, |list| list.min_security_counter);
    let counter = args.min_security_counter.unwrap_or(held_counter);
    if counter < held_counter {
        return Err(Failure::usage(format!(
            "--min-security-counter {counter} is below the present one, {held_counter}: it only rises"
        )));
    }
    let mut revoked: BTreeMap<ReleaseId, String> = held
        .map(|list| {
            list.revoked
                .iter()
                .map(|entry| (entry.release_id, entry.reason.clone()))
                .collect()
        })
        .unwrap_or_default();
    for add in &args.releases {
        revoked
            .entry(add.release)
            .or_insert_with(|| add.reason.clone());
    }
    // A new root version begins its own count, which is newer than all of the one before.
    let version = match held {
        Some(list) if list.root_version == root_version => list.version.saturating_add(1),
        _ => 1,
    };
    let revoked = revoked
        .into_iter()
        .map(|(release_id, reason)| Revoked { release_id, reason })
        .collect();
    Ok(Revocation {
        product: args.product.clone(),
        root_version,
        version,
        issued,
        expires,
        revoked,
        min_security_counter: counter,
        crit: Vec::new(),
    })
}

/// A list for people.
pub fn text(list: &Revocation) -> String {
    let mut facts = Facts::default();
    facts
        .add("revocations of", &list.product)
        .add("list", list.list_version().to_string())
        .add("issued", list.issued.to_string())
        .add("expires", list.expires.to_string())
        .add("lowest counter", list.min_security_counter.to_string());
    let mut table = Table::new(["RELEASE", "WHY"]);
    for entry in &list.revoked {
        table.row([entry.release_id.to_string(), entry.reason.clone()]);
    }
    format!("{}{}", facts.text(), table.or("No release by name."))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, KeysCommand};

    fn args(more: &[&str]) -> KeysRevoke {
        let line = ["fwpush", "keys", "revoke", "--product", "gateway"];
        let Command::Keys(keys) = Cli::try_parse_from(line.iter().chain(more))
            .unwrap()
            .command
        else {
            panic!("keys")
        };
        let KeysCommand::Revoke(revoke) = keys.command else {
            panic!("revoke")
        };
        revoke
    }

    fn id(n: i64) -> ReleaseId {
        ReleaseId::new_v7(Timestamp::from_ms(n))
    }

    fn now() -> Timestamp {
        Timestamp::from_ms(5_000)
    }

    #[test]
    fn a_list_grows_and_its_version_rises() {
        let (one, two) = (id(1), id(2));
        let first = next_list(
            &args(&["--release", &format!("{one}=bad boot")]),
            None,
            1,
            now(),
        )
        .unwrap();
        assert_eq!((first.order(), first.revoked.len()), ((1, 1), 1));
        let line = [format!("{one}=again"), two.to_string()];
        let second = next_list(
            &args(&["--release", &line[0], "--release", &line[1]]),
            Some(&first),
            1,
            now(),
        )
        .unwrap();
        assert_eq!(second.order(), (1, 2));
        assert_eq!(
            second.find(&one).unwrap().reason,
            "bad boot",
            "the first reason stays"
        );
        assert!(second.find(&two).is_some());
        second.to_envelope().unwrap();
        let third = next_list(
            &args(&["--min-security-counter", "3"]),
            Some(&second),
            2,
            now(),
        )
        .unwrap();
        assert_eq!(
            (
                third.order(),
                third.min_security_counter,
                third.revoked.len()
            ),
            ((2, 1), 3, 2)
        );
        assert!(
            next_list(
                &args(&["--min-security-counter", "2"]),
                Some(&third),
                2,
                now()
            )
            .is_err()
        );
    }
}
