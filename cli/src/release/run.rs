//! `fwpush release FILE`: from an image on disk to devices that run it.

use fwpush_keys::{Envelope, Release as Manifest, RevocationVersion, RolloutId, Timestamp};
use fwpush_proto::v1::{Action, Release, Rollout, RolloutState, StartRolloutRequest};
use serde_json::json;
use sha2::{Digest as _, Sha256};

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
    values::Target,
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
    let release = make_available(context, &mut client, &prepared).await?;
    let start = start_of(args, &prepared.manifest, consent);
    let rollout = start_once(context, &mut client, &prepared, &start, || ()).await?;
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
    let release = make_available(context, client, &prepared).await?;
    let start = start_of(args, &prepared.manifest, Consent::Given);
    let rollout = start_once(context, client, &prepared, &start, starting).await?;
    let rollout = if args.detach {
        rollout
    } else {
        rollout::follow(client, &rollout).await?
    };
    Ok(Released { release, rollout })
}

fn start_of(args: &ReleaseRun, manifest: &Manifest, consent: Consent) -> Start {
    Start {
        rollout_id: rollout_id(manifest, &args.to),
        release_id: manifest.release_id,
        target: args.to.clone(),
        action: Action::Install,
        consent,
    }
}

/// The one rollout that this command makes of a release: repeated after it was cut off, it starts no second one.
fn rollout_id(manifest: &Manifest, target: &Target) -> RolloutId {
    let mut hash = Sha256::new();
    hash.update(manifest.release_id.to_string());
    match target {
        Target::All => hash.update(b" all"),
        Target::Devices(devices) => devices.iter().for_each(|device| {
            hash.update(b" device ");
            hash.update(device.as_str());
        }),
    }
    let mut random = [0; 10];
    random.copy_from_slice(&hash.finalize()[..10]);
    RolloutId::from_parts(manifest.issued, random)
}

/// Starts the rollout, unless this very command did so before it was cut off.
async fn start_once(
    context: &Context,
    client: &mut Client,
    prepared: &Prepared,
    start: &Start,
    starting: impl FnOnce(),
) -> Result<Rollout> {
    let started = match &prepared.published {
        Some(_) => rollout::find(client, &start.rollout_id).await?,
        None => None,
    };
    let Some(rollout) = started else {
        return rollout::begin(context, client, start, starting).await;
    };
    let id = &rollout.rollout_id;
    match rollout.state() {
        RolloutState::Aborted | RolloutState::Superseded => {
            let state = views::state_words(rollout.state());
            Err(Failure::new(format!(
                "this command started rollout {id} before, which is {state}"
            ))
            .next(format!(
                "To start another: fwpush rollout start --release {} --to ...",
                start.release_id
            )))
        }
        _ => {
            context
                .out
                .say(&format!("Rollout {id} of it was started before."));
            starting();
            Ok(rollout)
        }
    }
}

/// A signed manifest that the present root accepts, and its image.
struct Prepared {
    image: Image,
    manifest: Manifest,
    envelope: Vec<u8>,
    /// The server has it: an earlier call of this command got that far.
    published: Option<Release>,
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
    let image = Image::read(&args.file).await?;
    let known = match standing(client, args, &present).await? {
        Standing::Free(known) => known,
        Standing::Taken(release) => return published(args, image, *release, &present),
    };
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
        published: None,
    })
}

/// Goes on from a release of this version that the server has, where it is the one that this command makes. Other content is
/// refused here, before a long upload; the server looks again.
fn published(
    args: &ReleaseRun,
    image: Image,
    release: Release,
    present: &Present,
) -> Result<Prepared> {
    let ManifestArgs {
        product,
        channel,
        version,
        ..
    } = &args.manifest;
    let id = &release.release_id;
    if release.revoked {
        return Err(Failure::new(format!(
            "version {version} is taken: release {id} of product {product} in channel {channel}, which is revoked"
        ))
        .next("Give this one a new version."));
    }
    let Some(manifest) = same_content(args, &image, &release.envelope) else {
        return Err(Failure::new(format!(
            "version {version} is taken: product {product} has it in channel {channel} as release {id}, with other content"
        ))
        .next(format!(
            "Give this one a new version, or roll that one out: fwpush rollout start --release {id} --to ..."
        )));
    };
    publish::check(&present.root, &manifest, &release.envelope)?;
    Ok(Prepared {
        image,
        manifest,
        envelope: release.envelope.to_vec(),
        published: Some(release),
    })
}

/// The manifest in `envelope`, if this command would make the same for `image` but for what is chosen anew each time.
fn same_content(args: &ReleaseRun, image: &Image, envelope: &[u8]) -> Option<Manifest> {
    // A server that does not give it leaves nothing to compare.
    let envelope = Envelope::parse(envelope).ok()?;
    let published = Manifest::from_payload(envelope.payload()).ok()?;
    let known = build::Known {
        security_counter: published.security_counter,
        least_seq: 0,
        revocation: published.revocation_version,
    };
    let again = build::manifest(&args.manifest, image, known, published.issued).ok()?;
    let again = Manifest {
        release_id: published.release_id,
        seq: args.manifest.seq.unwrap_or(published.seq),
        ..again
    };
    (again == published).then_some(published)
}

/// How the server stands to this version.
enum Standing {
    /// It is free; this is what the product's earlier releases and its revocation list ask of the new one.
    Free(build::Known),
    Taken(Box<Release>),
}

async fn standing(client: &Client, args: &ReleaseRun, present: &Present) -> Result<Standing> {
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
        return Ok(Standing::Taken(Box::new(taken.clone())));
    }
    let newest_seq = in_channel().map(|release| release.seq).max();
    let newest_counter = earlier.iter().map(|release| release.security_counter).max();
    let revocation = present
        .info
        .revocations
        .iter()
        .find(|list| list.product == product.as_str());
    Ok(Standing::Free(build::Known {
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
    }))
}

async fn make_available(
    context: &Context,
    client: &mut Client,
    prepared: &Prepared,
) -> Result<Release> {
    // What is published was uploaded; a file that was damaged since is made good.
    upload(client, &prepared.image).await?;
    if let Some(release) = &prepared.published {
        let id = &release.release_id;
        context.out.say(&format!(
            "Release {id} with this very content is published already."
        ));
        return Ok(release.clone());
    }
    let release = publish::publish(client, &prepared.envelope, &prepared.image.name).await?;
    context
        .out
        .say(&format!("Published release {}.", release.release_id));
    Ok(release)
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
