//! `fwpush release sign`: one more signature under a manifest.

use fwpush_keys::{Envelope, PublicKey, Release as Manifest, Root};
use serde_json::json;

use crate::{
    Context,
    args::ReleaseSign,
    disk,
    failure::{Failure, Result},
    image::Image,
    output::plural,
    release::read_manifest,
    signing, trust, views,
};

/// Runs the command.
pub async fn run(context: &Context, args: &ReleaseSign) -> Result<()> {
    let (mut envelope, manifest) = read_manifest(&args.manifest)?;
    // A person looks at this before touching a key: it comes first, and on stderr.
    context.out.say(&views::manifest_text(&manifest));
    if let Some(path) = &args.image {
        let image = Image::read(path).await?;
        check_image(&manifest, &image)?;
        context.out.say(&format!(
            "{} is the image that the manifest names.",
            path.display()
        ));
    }
    let root = match &args.signing.root {
        Some(path) => Some(trust::read_root(path)?),
        None => context.local_root()?,
    };
    let root = root.as_deref();
    let candidates = root
        .map(|root| release_keys(root, &manifest))
        .unwrap_or_default();
    let default_keys = || signing::default_release_keys(context.dir(), &candidates);
    let signers = signing::sign(
        &mut envelope,
        &args.signing,
        default_keys,
        &candidates,
        context.out,
    )
    .await?;
    if root.is_some() {
        for key in signers.iter().filter(|key| !candidates.contains(key)) {
            context.out.say(&format!(
                "warning: the root lists no key {} for product {}: its signature does not count yet",
                key.key_id(),
                manifest.product
            ));
        }
    }
    let file = args.out.as_ref().unwrap_or(&args.manifest);
    if args.out.is_some() {
        disk::write_new(file, &envelope.to_bytes())?;
    } else {
        disk::replace(file, &envelope.to_bytes())?;
    }
    context.out.data(
        || {
            let mut value = views::manifest_json(&manifest, &envelope, root);
            value["signed_by"] = json!(signers.iter().map(PublicKey::key_id).collect::<Vec<_>>());
            value
        },
        || standing(&manifest, &envelope, root),
    )?;
    let file = file.display();
    context.out.say(&format!(
        "Wrote {file}. Next: fwpush release publish {file} --image FILE"
    ));
    Ok(())
}

/// Refuses an image that is not the manifest's.
pub fn check_image(manifest: &Manifest, image: &Image) -> Result<()> {
    let named = manifest.image();
    if (named.size, named.blake3) == (image.size, image.blake3)
        && named.sha256 == image.sha256_hex()
    {
        return Ok(());
    }
    Err(Failure::new(format!("{} is not the image that the manifest names", image.path().display())).next(format!(
        "The manifest names {} bytes with BLAKE3 {}, the file has {} with {}. Build the manifest again.",
        named.size, named.blake3, image.size, image.blake3
    )))
}

/// The keys that may sign for the manifest's product.
pub fn release_keys(root: &Root, manifest: &Manifest) -> Vec<PublicKey> {
    root.release_keys(&manifest.product)
        .map(|role| root.public_keys(&role).copied().collect())
        .unwrap_or_default()
}

/// How many of the needed signatures are there, in words.
pub fn standing(manifest: &Manifest, envelope: &Envelope, root: Option<&Root>) -> String {
    let Some(root) = root else {
        return format!(
            "{}; no root document at hand to say how many are needed\n",
            signatures(envelope.signatures().len())
        );
    };
    let Some(role) = root.release_keys(&manifest.product) else {
        return format!(
            "root version {} has no product {}: nobody can sign for it yet\n",
            root.version, manifest.product
        );
    };
    let valid = views::valid_signers(manifest, envelope, root).len();
    let more = (role.threshold as usize).saturating_sub(valid);
    let rest = if more == 0 {
        "it can be published".to_owned()
    } else {
        format!("{more} more needed")
    };
    format!(
        "signatures: {valid} of {} by keys of root version {}; {rest}\n",
        role.threshold, root.version
    )
}

fn signatures(count: usize) -> String {
    plural(count as u64, "signature")
}
