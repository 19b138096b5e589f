//! `fwpush release`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use fwpush_keys::id::{Channel, Product, ReleaseId};

use crate::values::{Expiry, HwFilter, Target};

/// Sign an image and bring it to devices
///
/// Hashes FILE, builds its manifest and signs it, uploads and publishes it, shows whom it would reach and asks, starts the
/// rollout and shows its progress. The steps are there one by one as well, for signing on another machine.
#[derive(Args, Clone, Debug)]
#[command(
    subcommand_negates_reqs = true,
    override_usage = "fwpush release [OPTIONS] --product <P> --version <V> --hw <ID[:MIN-MAX]> --to <all|ID,...> <FILE>\n       \
                      fwpush release <COMMAND>",
    after_help = "\
Examples:
  fwpush release fw.img --product gateway --version 1.1.0 --hw board-a --to gw-1,gw-2
  fwpush release fw.img --product gateway --version 1.1.0 --hw board-a:2-5 --to all --yes --detach
  fwpush release fw.img --product gateway --version 1.1.0 --hw board-a --to all --dry-run

Signing elsewhere:
  fwpush release build fw.img --product gateway --version 1.1.0 --hw board-a --out gw-1.1.0.json
  fwpush release sign gw-1.1.0.json --key release-1.key --image fw.img
  fwpush release publish gw-1.1.0.json --image fw.img
  fwpush rollout start --release ID --to all

A file that is named like a step is given as ./build.
The exit code is 1 when a device failed, rolled back or refused the release."
)]
pub struct ReleaseArgs {
    #[command(subcommand)]
    pub step: Option<ReleaseStep>,

    #[command(flatten)]
    pub run: Option<ReleaseRun>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ReleaseStep {
    Build(Box<ReleaseBuild>),
    Sign(ReleaseSign),
    Publish(ReleasePublish),
    Bundle(ReleaseBundle),
    List(ReleaseList),
    Show(ReleaseShow),
}

/// All steps at once.
#[derive(Args, Clone, Debug)]
pub struct ReleaseRun {
    /// Image to release
    // The group that clap makes of a struct has no members where others are flattened into it; whether the struct is
    // there at all is told by its group.
    #[arg(value_name = "FILE", group = "ReleaseRun")]
    pub file: PathBuf,

    #[command(flatten)]
    pub manifest: ManifestArgs,

    #[command(flatten)]
    pub signing: SigningArgs,

    /// Devices to offer it to
    #[arg(long, value_name = "all|ID,...")]
    pub to: Target,

    /// Show the manifest and whom it would reach; upload, publish and start nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,

    /// Return as soon as the rollout has started
    #[arg(long)]
    pub detach: bool,
}

/// What the manifest says.
#[derive(Args, Clone, Debug)]
pub struct ManifestArgs {
    /// Product that the image is for
    #[arg(long, value_name = "P")]
    pub product: Product,

    /// Semantic version, such as 1.4.0
    #[arg(long, value_name = "V")]
    pub version: semver::Version,

    /// Hardware that the image runs on, with its revisions: ID, ID:3, ID:2-5 or ID:2-
    #[arg(long, required = true, value_name = "ID[:MIN-MAX]")]
    pub hw: Vec<HwFilter>,

    /// Channel of the release
    #[arg(long, default_value = "stable", value_name = "C")]
    pub channel: Channel,

    /// Raise it only to bar older releases: once a device runs N, it installs nothing below [default: the product's
    /// present one; 0 without a server]
    #[arg(long, value_name = "N")]
    pub security_counter: Option<u64>,

    /// After this, no device begins to install it: 365d, 12h or 2027-01-31T00:00:00Z
    #[arg(long, default_value = "365d", value_name = "D")]
    pub expires: Expiry,

    /// Order of releases within product and channel [default: the seconds of now]
    #[arg(long, value_name = "N")]
    pub seq: Option<u64>,

    /// Lowest version that can update to this one directly
    #[arg(long, value_name = "V")]
    pub from_min: Option<semver::Version>,

    /// Highest version that can update to this one directly
    #[arg(long, value_name = "V")]
    pub from_max: Option<semver::Version>,

    /// Lowest agent version that can install it
    #[arg(long, value_name = "V")]
    pub min_agent: Option<semver::Version>,

    /// Word for the kind of release, such as security or feature
    #[arg(long, value_name = "WORD")]
    pub class: Option<String>,

    /// Where people read what has changed
    #[arg(long, value_name = "URL")]
    pub advisory_url: Option<String>,
}

/// Who signs.
#[derive(Args, Clone, Debug, Default)]
pub struct SigningArgs {
    /// Private key file (Ed25519, PEM); repeat for several signatures [default: those of
    /// DIR/offline/release-*.key that the root lists]
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,

    /// Command that signs (HSM, KMS, security key): gets the bytes to sign on standard input and prints the
    /// signature, 64 bytes raw or as base64 or hex
    #[arg(long, value_name = "CMD", conflicts_with = "keys")]
    pub signer: Option<String>,

    /// Public key of the signer (PEM or hex) [default: found among the keys of the root]
    #[arg(long, value_name = "FILE", requires = "signer")]
    pub signer_key: Option<PathBuf>,

    /// Root document that names the keys [default: the operator's root.json]
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
}

/// Hash an image and write its manifest, unsigned; needs no server
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush release build fw.img --product gateway --version 1.1.0 --hw board-a:2-5 --out gw-1.1.0.json

Without a server nothing is known of earlier releases: the security counter is 0 unless
--security-counter says otherwise; `fwpush release list` shows the present one.")]
pub struct ReleaseBuild {
    /// Image to release
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    #[command(flatten)]
    pub manifest: ManifestArgs,

    /// Revocation list that devices must hold first, as ROOT.LIST (`fwpush keys show`) [default: none]
    #[arg(long, value_name = "R.V")]
    pub revocation: Option<String>,

    /// Manifest to write; refused when it exists
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
}

/// Show what a manifest says and sign it
///
/// The signature is added to the file. Where the root asks for several, run it once per key, on as many machines as you like.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush release sign gw-1.1.0.json --key release-1.key --image fw.img
  fwpush release sign gw-1.1.0.json --signer 'ssh hsm sign-ed25519' --signer-key release.pub")]
pub struct ReleaseSign {
    /// Manifest to sign
    #[arg(value_name = "MANIFEST")]
    pub manifest: PathBuf,

    #[command(flatten)]
    pub signing: SigningArgs,

    /// Image to hash again before signing
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,

    /// Where to write the signed manifest [default: MANIFEST itself]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Upload an image and publish its signed manifest
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush release publish gw-1.1.0.json --image fw.img")]
pub struct ReleasePublish {
    /// Signed manifest
    #[arg(value_name = "MANIFEST")]
    pub manifest: PathBuf,

    /// Image; not needed when the server has it already
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// Write a release, its trust documents and its image into one file, for devices that no server reaches
///
/// On the device: `fwpush-device install FILE`. It checks everything that it checks of what a server sends; a bundle is
/// nothing secret and vouches for nothing by itself.
#[derive(Args, Clone, Debug)]
#[command(
    group = ArgGroup::new("which").required(true),
    after_help = "\
Examples:
  fwpush release bundle 0190d7a2-7e4a-7c52-a05a-1f4f0d7f3b11 --out gw-1.1.0.fwb
  fwpush release bundle --manifest gw-1.1.0.json --image gw-1.1.0.img --out gw-1.1.0.fwb
  fwpush release bundle --manifest gw.json --image gw.img \\
    --root 2.root.json --revocation revoked.json --out gw.fwb

A device follows roots one by one: give all since the one that is built into the oldest device.
With a release ID they come from the server, as do the revocation list and the image."
)]
pub struct ReleaseBundle {
    /// Id of a published release
    #[arg(value_name = "ID", group = "which")]
    pub id: Option<ReleaseId>,

    /// Signed manifest file; needs no server
    #[arg(long, value_name = "FILE", group = "which", requires = "image")]
    pub manifest: Option<PathBuf>,

    /// Image [default: downloaded from the server]
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,

    /// Root document after the first one; repeat for each [default: the operator's root.json, if it is not the first]
    #[arg(long = "root", value_name = "FILE", requires = "manifest")]
    pub roots: Vec<PathBuf>,

    /// The product's newest revocation list
    #[arg(long, value_name = "FILE", requires = "manifest")]
    pub revocation: Option<PathBuf>,

    /// Bundle to write; refused when it exists
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
}

/// List published releases
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush release list --product gateway")]
pub struct ReleaseList {
    /// Only of this product
    #[arg(long, value_name = "P")]
    pub product: Option<Product>,
}

/// Show a published release, or a manifest file
#[derive(Args, Clone, Debug)]
#[command(
    group = ArgGroup::new("what").required(true),
    after_help = "\
Examples:
  fwpush release show 0190d7a2-7e4a-7c52-a05a-1f4f0d7f3b11
  fwpush release show --file gw-1.1.0.json"
)]
pub struct ReleaseShow {
    /// Id of a published release
    #[arg(value_name = "ID", group = "what")]
    pub id: Option<ReleaseId>,

    /// Manifest file; needs no server
    #[arg(long, value_name = "FILE", group = "what")]
    pub file: Option<PathBuf>,
}
