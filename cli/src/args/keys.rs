//! `fwpush keys`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use fwpush_keys::{id::Product, sign::KeyId};

use crate::values::{Expiry, OfProduct, ProductMax, RevokeRelease};

/// Trust documents: who may sign what, and what was revoked
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush keys show
  fwpush keys rotate-root --add-product meter --out 2.root.json")]
pub struct KeysArgs {
    #[command(subcommand)]
    pub command: KeysCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    Show(KeysShow),
    NewReleaseKey(KeysNewReleaseKey),
    RotateRoot(Box<KeysRotateRoot>),
    Revoke(KeysRevoke),
    Sign(KeysSign),
    Verify(KeysVerify),
    Publish(KeysPublish),
}

/// Show the present root, its keys and products, and the revocation lists
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush keys show
  fwpush keys show --root root.json")]
pub struct KeysShow {
    /// Root document to show, instead of asking the server
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
}

/// Make a key to sign releases with (or a new root key)
///
/// Writes the private key and, beside it with .pub, the public one. It counts once a root names it: see `fwpush keys
/// rotate-root`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush keys new-release-key --out release-2.key")]
pub struct KeysNewReleaseKey {
    /// File to write; refused when it exists [default: DIR/offline/release-N.key]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Build and sign the next root: other keys, products or expiry
///
/// What is not named stays as it is. Devices accept it when enough root keys of the present root and of the new one have
/// signed; sign on another machine with `fwpush keys sign`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush keys rotate-root --add-product meter --out 2.root.json
  fwpush keys rotate-root --add-release-key release-2.key.pub \\
    --remove-release-key KEYID --out 2.root.json
  fwpush keys publish 2.root.json")]
pub struct KeysRotateRoot {
    /// Present root [default: the newest of the server, else the operator's root.json]
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,

    /// Root key that signs; repeat [default: DIR/offline/root-*.key]
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,

    /// When the new root expires
    #[arg(long, default_value = "3650d", value_name = "D")]
    pub expires: Expiry,

    /// Public key that may sign releases
    #[arg(long = "add-release-key", value_name = "FILE")]
    pub add_release_keys: Vec<PathBuf>,

    /// Release key that no longer counts
    #[arg(long = "remove-release-key", value_name = "KEYID")]
    pub remove_release_keys: Vec<KeyId>,

    /// How many release keys must sign a release
    #[arg(long, value_name = "N")]
    pub release_threshold: Option<u32>,

    /// Public key that may sign roots
    #[arg(long = "add-root-key", value_name = "FILE")]
    pub add_root_keys: Vec<PathBuf>,

    /// Root key that no longer counts
    #[arg(long = "remove-root-key", value_name = "KEYID")]
    pub remove_root_keys: Vec<KeyId>,

    /// How many root keys must sign a root
    #[arg(long, value_name = "N")]
    pub root_threshold: Option<u32>,

    /// Product to add, or to change the highest security counter of
    #[arg(long = "add-product", value_name = "P[=MAX]")]
    pub add_products: Vec<ProductMax>,

    /// Product that gets no more releases
    #[arg(long = "remove-product", value_name = "P")]
    pub remove_products: Vec<Product>,

    /// Public key of this product's own: with one, the general release keys no longer count for it
    #[arg(long = "add-product-key", value_name = "P=FILE")]
    pub add_product_keys: Vec<OfProduct<String>>,

    /// Product key that no longer counts; without the last, the general release keys count again
    #[arg(long = "remove-product-key", value_name = "P=KEYID")]
    pub remove_product_keys: Vec<OfProduct<KeyId>>,

    /// How many of the product's own keys must sign
    #[arg(long = "product-threshold", value_name = "P=N")]
    pub product_thresholds: Vec<OfProduct<u32>>,

    /// File to write; refused when it exists [default: N.root.json]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Build and sign the next revocation list of a product
///
/// It has everything that the present list has, and what is named here. Devices that hold it refuse what it names.
#[derive(Args, Clone, Debug)]
#[command(
    group = ArgGroup::new("what").required(true).multiple(true),
    after_help = "\
Examples:
  fwpush keys revoke --product gateway --release ID='wrong bootloader' --out revoked.json
  fwpush keys publish revoked.json
  fwpush keys revoke --product gateway --min-security-counter 3 --publish"
)]
pub struct KeysRevoke {
    /// Product of the list
    #[arg(long, value_name = "P")]
    pub product: Product,

    /// Release to revoke, with the reason
    #[arg(long = "release", value_name = "ID[=REASON]", group = "what")]
    pub releases: Vec<RevokeRelease>,

    /// Revoke every release with a lower security counter
    #[arg(long, value_name = "N", group = "what")]
    pub min_security_counter: Option<u64>,

    /// When the list expires; it binds all the same
    #[arg(long, default_value = "3650d", value_name = "D")]
    pub expires: Expiry,

    #[command(flatten)]
    pub signing: super::SigningArgs,

    /// File to write; refused when it exists [default: PRODUCT.R.V.revocation.json]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,

    /// Publish it as well
    #[arg(long)]
    pub publish: bool,
}

/// Add signatures to a root or revocation document
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush keys sign 2.root.json --key root-2.key")]
pub struct KeysSign {
    /// Document to sign
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    #[command(flatten)]
    pub signing: super::SigningArgs,
}

/// Check a root, revocation or release document against the root, as a device would
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush keys verify 2.root.json --root 1.root.json
  fwpush keys verify gw-1.1.0.json")]
pub struct KeysVerify {
    /// Document to check
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Root to start from [default: the operator's root.json]
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
}

/// Give a root or revocation document to the server, which passes it on to devices
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush keys publish 2.root.json")]
pub struct KeysPublish {
    /// Signed document
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}
