//! `fwpush release bundle`: a release, its trust documents and its image in one file.

use std::{
    fs::Permissions,
    io::{BufWriter, Read},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use fwpush_keys::{
    AdmitFacts, Envelope, Outline, Release as Manifest, Revocation, Root, Timestamp, Verified,
    admit,
    bundle::{self, Contents, WriteError},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    Context,
    args::ReleaseBundle,
    client::Client,
    disk, download,
    failure::{Doing as _, Failure, NextStep as _, Result},
    image::Image,
    limits,
    output::bytes,
    progress,
    release::{self, publish, read_manifest, sign},
    trust,
};

/// A manifest and the documents that vouch for it.
struct Documents {
    envelope: Vec<u8>,
    manifest: Manifest,
    /// Oldest first, each vouched for by the one before; never empty.
    chain: Vec<Verified<Root>>,
    revocation: Option<Vec<u8>>,
}

/// Where the image comes from.
enum Source {
    File(Image),
    Server(Box<Client>),
}

/// Runs the command.
pub async fn run(context: &Context, args: &ReleaseBundle) -> Result<()> {
    if std::fs::symlink_metadata(&args.out).is_ok() {
        return Err(
            Failure::usage(format!("{} exists already", args.out.display()))
                .next("Choose another --out; a bundle is never overwritten."),
        );
    }
    let (documents, client) = match (&args.id, &args.manifest) {
        (Some(id), _) => {
            let client = context.client().await?;
            (of_server(context, &client, id).await?, Some(client))
        }
        (None, Some(manifest)) => (of_files(context, args, manifest)?, None),
        (None, None) => return Err(Failure::usage("name a release, or its --manifest")),
    };
    let list = check(&documents)?;
    let (outline, source) = image(&documents.manifest, args.image.as_deref(), client).await?;
    let written = write(&documents, outline, source, &args.out).await?;
    report(context, args, &documents, list.as_ref(), written)
}

async fn of_server(
    context: &Context,
    client: &Client,
    id: &fwpush_keys::ReleaseId,
) -> Result<Documents> {
    let present = trust::present(client, context.out).await?;
    let release = release::find(client, id).await?;
    let envelope = release.envelope.to_vec();
    let parsed = Envelope::parse(&envelope).doing(|| format!("read release {id}"))?;
    let manifest =
        Manifest::from_payload(parsed.payload()).doing(|| format!("read release {id}"))?;
    let lists = present.info.revocations.into_iter();
    let list = lists
        .filter(|list| list.product == release.product)
        .map(|list| list.envelope.to_vec());
    Ok(Documents {
        envelope,
        manifest,
        chain: chain(present.info.roots.iter().map(|root| root.to_vec()))?,
        revocation: list.last(),
    })
}

fn of_files(context: &Context, args: &ReleaseBundle, manifest: &Path) -> Result<Documents> {
    let (_, parsed) = read_manifest(manifest)?;
    let read = |path: &Path| disk::read_limited(path, limits::DOCUMENT_BYTES);
    let mut roots = args
        .roots
        .iter()
        .map(|path| read(path))
        .collect::<Result<Vec<_>>>()?;
    if roots.is_empty() {
        let held = context.local_root()?.ok_or_else(|| {
            Failure::usage("no root document at hand that says who may sign")
                .next("Give the roots since the devices' first one: --root FILE for each.")
        })?;
        roots.push(held.envelope().to_vec());
    }
    Ok(Documents {
        // The exact bytes: what was signed.
        envelope: read(manifest)?,
        manifest: parsed,
        chain: chain(roots)?,
        revocation: args.revocation.as_deref().map(read).transpose()?,
    })
}

/// Root documents in their order, each vouched for by the one before.
fn chain(roots: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<Verified<Root>>> {
    let mut roots = roots
        .into_iter()
        .map(|root| Ok((version_of(&root)?, root)))
        .collect::<Result<Vec<_>>>()?;
    roots.sort_by_key(|(version, _)| *version);
    let mut chain: Vec<Verified<Root>> = Vec::new();
    for (version, root) in roots {
        let next = match chain.last() {
            None => Verified::<Root>::bootstrap(&root),
            Some(last) => last.advance(&root),
        };
        let next = next.doing(|| format!("use root version {version}"));
        chain.push(next.next_step(|| {
            "Each root follows the one before it: give all of them, each once, as they were published.".to_owned()
        })?);
    }
    if chain.is_empty() {
        return Err(Failure::new("there is no root document"));
    }
    Ok(chain)
}

fn version_of(root: &[u8]) -> Result<u64> {
    let what = || "read a root document".to_owned();
    let envelope = Envelope::parse(root).doing(what)?;
    Ok(Root::from_payload(envelope.payload()).doing(what)?.version)
}

/// What every device would refuse, found before the stick is carried to it. Gives the revocation list.
fn check(documents: &Documents) -> Result<Option<Verified<Revocation>>> {
    let (manifest, root) = (&documents.manifest, newest(documents));
    publish::check(root, manifest, &documents.envelope)?;
    let release = root
        .verify_release(&manifest.product, &documents.envelope)
        .doing(|| "check the manifest".to_owned())?;
    let list = documents.revocation.as_deref();
    let list = list
        .map(|list| root.verify_revocation(&manifest.product, list))
        .transpose()
        .doing(|| "check the revocation list".to_owned())
        .next_step(|| {
            "Make it again under the newest root (`fwpush keys revoke`), then publish it."
                .to_owned()
        })?;
    let hw = &manifest.hw[0];
    let no_agent = semver::Version::new(0, 0, 0);
    // A device that the release fits in all that a device can be.
    let requires = &manifest.requires;
    let fitting = AdmitFacts {
        product: &manifest.product,
        hw_id: &hw.id,
        hw_rev: hw.rev_min,
        channels: std::slice::from_ref(&manifest.channel),
        running_version: requires.from_min.as_ref().or(requires.from_max.as_ref()),
        floor: manifest.security_counter,
        agent_version: manifest.min_agent.as_ref().unwrap_or(&no_agent),
        revocation: list.as_ref(),
        root,
        now: Timestamp::now(),
    };
    admit(&release, &fitting)
        .doing(|| "every device would refuse this bundle".to_owned())
        .next_step(|| {
            "Give the newest --root and --revocation, or bundle another release.".to_owned()
        })?;
    Ok(list)
}

fn newest(documents: &Documents) -> &Verified<Root> {
    // `chain` gives at least one.
    &documents.chain[documents.chain.len() - 1]
}

async fn image(
    manifest: &Manifest,
    path: Option<&Path>,
    client: Option<Client>,
) -> Result<(Outline, Source)> {
    match (path, client) {
        (Some(path), _) => {
            let image = Image::read(path).await?;
            sign::check_image(manifest, &image)?;
            Ok((image.outline.clone(), Source::File(image)))
        }
        (None, Some(mut client)) => {
            let (file, size) = (manifest.image().blake3, manifest.image().size);
            let outline = download::outline(&mut client, file, size).await?;
            Ok((outline, Source::Server(Box::new(client))))
        }
        (None, None) => Err(Failure::usage("--image names the image of --manifest")),
    }
}

/// Writes the bundle whole or not at all, never over another file. Gives its bytes.
async fn write(documents: &Documents, outline: Outline, source: Source, out: &Path) -> Result<u64> {
    let (fetched, reader): (Option<JoinHandle<Result<()>>>, Box<dyn Read + Send>) = match source {
        Source::File(image) => (None, Box::new(image.reader())),
        Source::Server(client) => {
            let (reader, fetched) = download::content(*client, outline.root(), outline.size());
            (Some(fetched), Box::new(reader))
        }
    };
    let roots: Vec<Vec<u8>> = to_follow(documents)
        .map(|root| root.envelope().to_vec())
        .collect();
    let (release, list) = (documents.envelope.clone(), documents.revocation.clone());
    let path = out.to_owned();
    let written = tokio::task::spawn_blocking(move || {
        let contents = Contents {
            roots: &roots,
            revocation: list.as_deref(),
            release: &release,
            outline: &outline,
        };
        write_file(&contents, reader, &path)
    });
    let written = written.await.doing(|| "write the bundle".to_owned())?;
    // A download that failed is why the image was short.
    if let (Some(fetched), true) = (fetched, written.is_err()) {
        download::ended(fetched).await?;
    }
    written
}

/// A device is built with a root of its own, the first one at the latest.
fn to_follow(documents: &Documents) -> impl Iterator<Item = &Verified<Root>> {
    documents.chain.iter().filter(|root| root.version > 1)
}

fn write_file(contents: &Contents<'_>, image: impl Read, out: &Path) -> Result<u64> {
    let what = || format!("write {}", out.display());
    let parent = disk::parent_of(out);
    let mut temporary = tempfile::Builder::new()
        .prefix(".bundle-")
        .tempfile_in(parent)
        .doing(what)?;
    let bar = progress::byte_bar("writing", contents.outline.size());
    let buffered = BufWriter::with_capacity(limits::HASH_BUFFER_BYTES, temporary.as_file_mut());
    let written = bundle::write(contents, image, buffered, |written| {
        bar.set_position(written)
    });
    bar.finish_and_clear();
    let written = match written {
        Err(WriteError::Write(error)) => Err(error).doing(what),
        other => other.doing(|| "make the bundle".to_owned()),
    }?;
    // For everybody to read; file systems of sticks may not know of it.
    let _ = temporary
        .as_file()
        .set_permissions(Permissions::from_mode(0o644));
    temporary.as_file().sync_all().doing(what)?;
    temporary
        .persist_noclobber(out)
        .map_err(|error| error.error)
        .doing(what)?;
    disk::sync_dir(parent).doing(what)?;
    Ok(written)
}

fn report(
    context: &Context,
    args: &ReleaseBundle,
    documents: &Documents,
    list: Option<&Verified<Revocation>>,
    written: u64,
) -> Result<()> {
    let manifest = &documents.manifest;
    let roots: Vec<u64> = to_follow(documents).map(|root| root.version).collect();
    let list = list.map(|list| list.list_version());
    context.out.data(
        || {
            json!({
                "file": args.out,
                "bytes": written,
                "release_id": manifest.release_id,
                "product": manifest.product,
                "channel": manifest.channel,
                "version": manifest.version,
                "expires": manifest.expires,
                "image": { "bytes": manifest.image().size, "blake3": manifest.image().blake3 },
                "roots": roots,
                "revocation": list.map(|list| json!({ "root_version": list.root_version, "version": list.version })),
            })
        },
        || {
            let roots = match (roots.first(), roots.last()) {
                (Some(first), Some(last)) if first < last => format!("root versions {first} to {last}"),
                (Some(first), _) => format!("root version {first}"),
                _ => "no root but the devices' first".to_owned(),
            };
            let list = list.map_or("no revocation list".to_owned(), |list| format!("revocation list {list}"));
            format!(
                "Wrote {} ({}): {} {} with {roots} and {list}.\n",
                args.out.display(),
                bytes(written),
                manifest.product,
                manifest.version,
            )
        },
    )?;
    if let Some(first) = roots.first().filter(|first| **first > 2) {
        context.out.say(&format!(
            "warning: devices that hold a root older than version {} refuse this bundle: give all later ones with --root.",
            first - 1
        ));
    }
    context.out.say(&format!(
        "It can be installed until {}. Next, on the device: fwpush-device install {}",
        manifest.expires,
        args.out.file_name().unwrap_or_default().to_string_lossy()
    ));
    Ok(())
}
