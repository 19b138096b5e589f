//! `fwpush release publish`: the image goes up, then the manifest is checked by the server and made available.

use std::path::Path;

use fwpush_keys::{Release as Manifest, Root, Timestamp, Verified};
use fwpush_proto::v1::{PublishReleaseRequest, Release};
use tonic::Code;

use crate::{
    Context,
    args::ReleasePublish,
    client::{Backoff, Client, is_lost},
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    image::Image,
    release::{read_manifest, sign},
    trust,
    upload::upload,
    views,
};

/// How often publishing is tried over new connections: it may be repeated, the same bytes answer the same.
const ATTEMPTS: u32 = 4;

/// Runs the command.
pub async fn run(context: &Context, args: &ReleasePublish) -> Result<()> {
    let (_, manifest) = read_manifest(&args.manifest)?;
    // The exact bytes: a device checks what was signed, the server compares what it was given.
    let envelope = disk::read_limited(&args.manifest, 1 << 20)?;
    let mut client = context.client().await?;
    let present = trust::present(&client, context.out).await?;
    check(&present.root, &manifest, &envelope)?;
    let image = match &args.image {
        Some(path) => Some(read_image(&manifest, path).await?),
        None => None,
    };
    let name = match &image {
        Some(image) => image.name.clone(),
        None => format!("{}-{}.img", manifest.product, manifest.version),
    };
    if let Some(image) = &image {
        upload(&mut client, image).await?;
    }
    let release = publish(&mut client, &envelope, &name).await?;
    context.out.data(
        || views::release_json(&release),
        || views::release_text(&release),
    )?;
    context.out.say(&format!(
        "Published. Next: fwpush rollout start --release {} --to all",
        release.release_id
    ));
    Ok(())
}

/// What the server would refuse, found before a long upload.
pub fn check(root: &Verified<Root>, manifest: &Manifest, envelope: &[u8]) -> Result<()> {
    root.verify_release(&manifest.product, envelope)
        .doing(|| format!("check the manifest of {} {}", manifest.product, manifest.version))
        .next_step(|| {
            "`fwpush keys show` lists products, keys and thresholds; `fwpush release sign` adds a signature.".to_owned()
        })?;
    let now = Timestamp::now();
    if manifest.expires <= now {
        return Err(
            Failure::new(format!("the release expired {}", manifest.expires))
                .next("Build and sign it again."),
        );
    }
    Ok(())
}

async fn read_image(manifest: &Manifest, path: &Path) -> Result<Image> {
    let image = Image::read(path).await?;
    sign::check_image(manifest, &image)?;
    Ok(image)
}

/// Publishes an envelope whose image the server has.
pub async fn publish(client: &mut Client, envelope: &[u8], file_name: &str) -> Result<Release> {
    let request = PublishReleaseRequest {
        envelope: envelope.to_vec().into(),
        file_name: file_name.to_owned(),
    };
    let mut backoff = Backoff::default();
    for _ in 1..ATTEMPTS {
        match client
            .try_call(async |admin| admin.publish_release(request.clone()).await)
            .await
        {
            Ok(release) => return Ok(release),
            Err(status) if is_lost(&status) => {
                backoff.wait().await;
                // When this fails, so does the next attempt.
                let _ = client.reconnect().await;
            }
            Err(status) if status.code() == Code::NotFound => {
                return Err(client
                    .refused("publish the release", &status)
                    .next("Give the image as well: --image FILE."));
            }
            Err(status) => return Err(client.refused("publish the release", &status)),
        }
    }
    client
        .call("publish the release", async |admin| {
            admin.publish_release(request.clone()).await
        })
        .await
}
