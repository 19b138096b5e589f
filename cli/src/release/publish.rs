//! `fwpush release publish`: the image goes up, then the manifest is checked by the server and made available.

use std::path::Path;

use fwpush_keys::{Release as Manifest, Root, Timestamp, Verified};
use fwpush_proto::v1::{GetUploadRequest, PublishReleaseRequest, Release};

use crate::{
    Context,
    args::ReleasePublish,
    client::Client,
    disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    image::Image,
    release::{read_manifest, sign},
    trust,
    upload::upload,
    views,
};

/// Runs the command.
pub async fn run(context: &Context, args: &ReleasePublish) -> Result<()> {
    let (_, manifest) = read_manifest(&args.manifest)?;
    // The exact bytes: a device checks what was signed, the server compares what it was given.
    let envelope = disk::read_limited(&args.manifest, 1 << 20)?;
    let mut client = context.client().await?;
    let present = trust::present(&client, context.out).await?;
    check(&present.root, &manifest, &envelope)?;
    let name = match &args.image {
        Some(path) => {
            let image = read_image(&manifest, path).await?;
            upload(&mut client, &image).await?;
            image.name
        }
        None => {
            check_uploaded(&client, &manifest).await?;
            format!("{}-{}.img", manifest.product, manifest.version)
        }
    };
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

/// Without an image at hand, the server must have it from an earlier upload.
async fn check_uploaded(client: &Client, manifest: &Manifest) -> Result<()> {
    let image = manifest.image();
    let request = GetUploadRequest {
        file_id: image.blake3.to_string(),
        size: image.size,
    };
    let standing = client
        .call("ask for the image", async |admin| {
            admin.get_upload(request).await
        })
        .await?;
    if standing.complete {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the server does not have the image {}",
        image.blake3
    ))
    .next("Give it as well: --image FILE."))
}

async fn read_image(manifest: &Manifest, path: &Path) -> Result<Image> {
    let image = Image::read(path).await?;
    sign::check_image(manifest, &image)?;
    Ok(image)
}

/// Publishes an envelope whose image the server has. The same bytes twice answer the same.
pub async fn publish(client: &mut Client, envelope: &[u8], file_name: &str) -> Result<Release> {
    let request = PublishReleaseRequest {
        envelope: envelope.to_vec().into(),
        file_name: file_name.to_owned(),
    };
    client
        .call_again("publish the release", async |admin| {
            admin.publish_release(request.clone()).await
        })
        .await
}
