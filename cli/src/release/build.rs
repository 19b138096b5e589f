//! `fwpush release build`: what the manifest of an image says.

use fwpush_keys::{
    Component, HwRange, Release as Manifest, ReleaseId, Requires, RevocationVersion, Timestamp,
};

use crate::{
    Context,
    args::{ManifestArgs, ReleaseBuild},
    disk,
    failure::{Doing as _, Failure, Result},
    image::Image,
    views,
};

/// Where the image goes: the one slot pair that devices have.
const SLOT: &str = "system";

/// What earlier releases and revocations ask of the next release. All zero where nothing is known of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// The lowest counter that does not fall behind.
    pub security_counter: u64,
    /// The lowest seq that is not taken.
    pub least_seq: u64,
    /// The list that devices should hold first.
    pub revocation: RevocationVersion,
}

/// The manifest for `image`.
pub fn manifest(
    args: &ManifestArgs,
    image: &Image,
    known: Known,
    now: Timestamp,
) -> Result<Manifest> {
    let issued = Timestamp::from_ms(now.as_secs() * 1_000);
    let expires = args
        .expires
        .resolve(now)
        .map_err(|error| Failure::usage(format!("--expires: {error}")))?;
    let hw = args
        .hw
        .iter()
        .map(|hw| HwRange {
            id: hw.id.clone(),
            rev_min: hw.rev_min,
            rev_max: hw.rev_max,
        })
        .collect();
    Ok(Manifest {
        product: args.product.clone(),
        channel: args.channel.clone(),
        release_id: ReleaseId::new_v7(now),
        version: args.version.clone(),
        seq: args.seq.unwrap_or(
            u64::try_from(issued.as_secs())
                .unwrap_or(0)
                .max(known.least_seq),
        ),
        security_counter: args.security_counter.unwrap_or(known.security_counter),
        revocation_version: known.revocation,
        issued,
        expires,
        hw,
        requires: Requires {
            from_min: args.from_min.clone(),
            from_max: args.from_max.clone(),
        },
        min_agent: args.min_agent.clone(),
        class: args.class.clone(),
        advisory_url: args.advisory_url.clone(),
        components: vec![Component::plain(
            SLOT,
            image.size,
            image.blake3,
            image.sha256,
        )],
        crit: Vec::new(),
    })
}

/// Runs the command. Nothing but the image is needed.
pub async fn run(context: &Context, args: &ReleaseBuild) -> Result<()> {
    let revocation = match &args.revocation {
        Some(text) => parse_revocation(text)?,
        None => RevocationVersion::NONE,
    };
    if args.out.exists() {
        return Err(
            Failure::usage(format!("{} exists already", args.out.display()))
                .next("Choose another --out."),
        );
    }
    let image = Image::read(&args.file).await?;
    let known = Known {
        revocation,
        ..Known::default()
    };
    let manifest = manifest(&args.manifest, &image, known, Timestamp::now())?;
    let envelope = manifest
        .to_envelope()
        .doing(|| "build the manifest".to_owned())
        .map_err(Failure::as_usage)?;
    disk::write_new(&args.out, &envelope.to_bytes())?;
    context.out.data(
        || views::manifest_json(&manifest, &envelope, None),
        || views::manifest_text(&manifest),
    )?;
    let file = args.out.display();
    context.out.say(&format!(
        "\nWrote {file}. Next: fwpush release sign {file} --key FILE"
    ));
    if args.manifest.security_counter.is_none() {
        context.out.say("The security counter is 0; give --security-counter where releases of this product have a higher one.");
    }
    Ok(())
}

fn parse_revocation(text: &str) -> Result<RevocationVersion> {
    let parsed = text
        .split_once('.')
        .and_then(|(root, list)| Some((root.parse().ok()?, list.parse().ok()?)));
    let Some((root_version, version)) = parsed else {
        return Err(Failure::usage(
            "--revocation is written ROOT.LIST, such as 1.3",
        ));
    };
    Ok(RevocationVersion {
        root_version,
        version,
    })
}
