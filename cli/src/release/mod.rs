//! `fwpush release`: all steps at once ([`run`]), or one by one.

pub mod build;
pub mod bundle;
pub mod publish;
pub mod run;
pub mod sign;

use std::path::Path;

use fwpush_keys::{Envelope, Release as Manifest, ReleaseId};
use fwpush_proto::v1::{ListReleasesRequest, Release};
use serde_json::json;

use crate::{
    Context,
    args::{ReleaseArgs, ReleaseList, ReleaseShow, ReleaseStep},
    client::Client,
    failure::{Doing as _, Failure, Result},
    output::escape,
    trust, views,
};

/// Runs the command or one of its steps.
pub async fn run(context: &Context, args: &ReleaseArgs) -> Result<()> {
    match (&args.step, &args.run) {
        (Some(ReleaseStep::Build(args)), _) => build::run(context, args).await,
        (Some(ReleaseStep::Sign(args)), _) => sign::run(context, args).await,
        (Some(ReleaseStep::Publish(args)), _) => publish::run(context, args).await,
        (Some(ReleaseStep::Bundle(args)), _) => bundle::run(context, args).await,
        (Some(ReleaseStep::List(args)), _) => list(context, args).await,
        (Some(ReleaseStep::Show(args)), _) => show(context, args).await,
        (None, Some(args)) => run::run(context, args).await,
        (None, None) => {
            Err(Failure::usage("nothing to release").next("See `fwpush release --help`."))
        }
    }
}

async fn list(context: &Context, args: &ReleaseList) -> Result<()> {
    let client = context.client().await?;
    let product = args
        .product
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default();
    let releases = releases(&client, product).await?;
    context.out.data(
        || json!({ "releases": releases.iter().map(views::release_json).collect::<Vec<_>>() }),
        || views::releases_text(&releases),
    )
}

/// Published releases of a product, or of all where the name is empty; newest first.
pub async fn releases(client: &Client, product: String) -> Result<Vec<Release>> {
    let request = ListReleasesRequest { product };
    let answer = client
        .call("list the releases", async move |admin| {
            admin.list_releases(request).await
        })
        .await?;
    Ok(answer.releases)
}

/// One published release.
pub async fn find(client: &Client, id: &ReleaseId) -> Result<Release> {
    let id = id.to_string();
    releases(client, String::new())
        .await?
        .into_iter()
        .find(|release| release.release_id == id)
        .ok_or_else(|| {
            Failure::new(format!("there is no release {id}"))
                .next("`fwpush release list` shows those there are.")
        })
}

async fn show(context: &Context, args: &ReleaseShow) -> Result<()> {
    if let Some(path) = &args.file {
        let (envelope, manifest) = read_manifest(path)?;
        let root = context.local_root()?;
        let root = root.as_deref();
        return context.out.data(
            || views::manifest_json(&manifest, &envelope, root),
            || views::manifest_text(&manifest) + &sign::standing(&manifest, &envelope, root),
        );
    }
    let Some(id) = &args.id else {
        return Err(Failure::usage("name a release or --file")
            .next("`fwpush release list` shows the releases."));
    };
    let release = find(&context.client().await?, id).await?;
    context.out.data(
        || views::release_json(&release),
        || views::release_text(&release),
    )
}

/// Reads a manifest, whose signatures are not looked at.
pub fn read_manifest(path: &Path) -> Result<(Envelope, Manifest)> {
    let envelope = trust::read_envelope(path)?;
    if envelope.payload_type() != fwpush_keys::PayloadType::Release {
        return Err(Failure::new(format!(
            "{} is a {}, not a release",
            escape(&path.to_string_lossy()),
            envelope.payload_type()
        ))
        .next("Name a file that `fwpush release build` wrote."));
    }
    let manifest = Manifest::from_payload(envelope.payload())
        .doing(|| format!("read the manifest {}", path.display()))?;
    Ok((envelope, manifest))
}

#[cfg(test)]
mod tests;
