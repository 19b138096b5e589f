//! `fwpush release FILE`: from an image on disk to devices that run it.

use fwpush_keys::{Release as Manifest, ReleaseId, RevocationVersion, Timestamp};
use fwpush_proto::v1::{Action, Release, Rollout, StartRolloutRequest};
use serde_json::json;

use crate::{
    Context,
    args::{ManifestArgs, ReleaseRun},
    client::Client,
    failure::{Doing as _, Failure, Result},
    image::Image,
    release::{self, build, publish, sign},
    rollout::{self, Consent, Start},
    signing,
    trust::{self, Present},
    upload::upload,
    views, watch,
};

/// What came of it.
#[derive(Debug)]
pub struct Released {
    pub release: Release,
    pub rollout: Rollout,
}

/// Runs the command.
pub async fn run(context: &Context, args: &ReleaseRun) -> Result<()> {
    let consent = Consent::before(args.yes, args.dry_run)?;
    let mut client = context.client().await?;
    let prepared = prepare(context, &client, args).await?;
    if args.dry_run {
        return dry_run(context, &client, args, &prepared).await;
    }
    context.out.say(&views::manifest_text(&prepared.manifest));
    let release = make_available(&mut client, &prepared).await?;
    context
        .out
        .say(&format!("Published release {}.", release.release_id));
    let start = start_of(args, &prepared.manifest.release_id, consent);
    let rollout = rollout::begin(context, &mut client, &start, || ()).await?;
    let rollout = if args.detach {
        rollout
    } else {
        rollout::follow(&mut client, &rollout).await?
    };
    context.out.data(
        || {
            json!({
                "release_id": release.release_id,
                "rollout_id": rollout.rollout_id,
                "release": views::release_json(&release),
                "rollout": views::rollout_json(&rollout),
            })
        },
        || rollout::outcome_text(&rollout, args.detach),
    )?;
    if args.detach {
        Ok(())
    } else {
        watch::verdict(&rollout)
    }
}

/// The same for a caller in this process: never asks, and returns what came of it without judging.
/// `starting` runs right before the rollout is started.
pub async fn release(
    context: &Context,
    client: &mut Client,
    args: &ReleaseRun,
    starting: impl FnOnce(),
) -> Result<Released> {
    let prepared = prepare(context, client, args).await?;
    let release = make_available(client, &prepared).await?;
    let start = start_of(args, &prepared.manifest.release_id, Consent::Given);
    let rollout = rollout::begin(context, client, &start, starting).await?;
    let rollout = if args.detach {
        rollout
    } else {
        rollout::follow(client, &rollout).await?
    };
    Ok(Released { release, rollout })
}

fn start_of(args: &ReleaseRun, release_id: &ReleaseId, consent: Consent) -> Start {
    Start {
        release_id: *release_id,
        target: args.to.clone(),
        action: Action::Install,
        consent,
    }
}

/// A signed manifest that the present root accepts, and its image.
struct Prepared {
    image: Image,
    manifest: Manifest,
    envelope: Vec<u8>,
}

async fn prepare(context: &Context, client: &Client, args: &ReleaseRun) -> Result<Prepared> {
    let present = trust::present(client, context.out).await?;
    let product = &args.manifest.product;
    if !present.root.products.contains_key(product) {
        return Err(Failure::new(format!(
            "root version {} has no product {product}",
            present.root.version
        ))
        .next(format!(
            "Add it: fwpush keys rotate-root --add-product {product}"
        )));
    }
    let known = known(client, args, &present).await?;
    let image = Image::read(&args.file).await?;
    let manifest = build::manifest(&args.manifest, &image, known, Timestamp::now())?;
    let mut envelope = manifest
        .to_envelope()
        .doing(|| "build the manifest".to_owned())
        .map_err(Failure::as_usage)?;
    let candidates = sign::release_keys(&present.root, &manifest);
    let default_keys = || signing::default_release_keys(context.dir(), &candidates);
    signing::sign(
        &mut envelope,
        &args.signing,
        default_keys,
        &candidates,
        context.out,
    )
    .await?;
    let envelope = envelope.to_bytes();
    publish::check(&present.root, &manifest, &envelope)?;
    Ok(Prepared {
        image,
        manifest,
        envelope,
    })
}

/// What the product's earlier releases and its revocation list ask of this one.
///
/// A version that is taken is refused here, before a long upload; the server looks again.
async fn known(client: &Client, args: &ReleaseRun, present: &Present) -> Result<build::Known> {
    let ManifestArgs {
        product,
        channel,
        version,
        ..
    } = &args.manifest;
    let earlier = release::releases(client, product.to_string()).await?;
    let in_channel = || {
        earlier
            .iter()
            .filter(|release| release.channel == channel.as_str())
    };
    if let Some(taken) = in_channel().find(|release| release.version == version.to_string()) {
        let id = &taken.release_id;
        return Err(Failure::new(format!(
            "version {version} is taken: product {product} has it in channel {channel} as release {id}"
        ))
        .next(format!(
            "Give this one a new version, or roll that one out: fwpush rollout start --release {id} --to ..."
        )));
    }
    let newest_seq = in_channel().map(|release| release.seq).max();
    let newest_counter = earlier.iter().map(|release| release.security_counter).max();
    let revocation = present
        .info
        .revocations
        .iter()
        .find(|list| list.product == product.as_str());
    Ok(build::Known {
        security_counter: newest_counter
            .max(revocation.map(|list| list.min_security_counter))
            .unwrap_or(0),
        least_seq: newest_seq.map_or(0, |seq| seq.saturating_add(1)),
        revocation: revocation.and_then(|list| list.version).map_or(
            RevocationVersion::NONE,
            |list| RevocationVersion {
                root_version: list.root_version,
                version: list.version,
            },
        ),
    })
}

async fn make_available(client: &mut Client, prepared: &Prepared) -> Result<Release> {
    upload(client, &prepared.image).await?;
    publish::publish(client, &prepared.envelope, &prepared.image.name).await
}

async fn dry_run(
    context: &Context,
    client: &Client,
    args: &ReleaseRun,
    prepared: &Prepared,
) -> Result<()> {
    let request = StartRolloutRequest {
        envelope: prepared.envelope.clone().into(),
        target: Some(args.to.to_proto()),
        action: Action::Install.into(),
        ..StartRolloutRequest::default()
    };
    let preview = client
        .call("ask whom the release would reach", async |admin| {
            admin.preview_rollout(request).await
        })
        .await?;
    context.out.data(
        || json!({ "manifest": prepared.manifest, "preview": views::preview_json(&preview) }),
        || {
            format!(
                "{}\n{}",
                views::manifest_text(&prepared.manifest),
                views::preview_text(&preview)
            )
        },
    )?;
    context
        .out
        .say("A dry run: nothing was uploaded, published or started.");
    Ok(())
}
