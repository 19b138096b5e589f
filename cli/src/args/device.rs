//! `fwpush device`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use fwpush_keys::id::{Channel, DeviceId, Product};

use crate::values::{ByteCount, HwRevision};

/// Add, look at and block devices
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush device add gw-1 --product gateway --hw board-a:3 --out gw-1
  fwpush device list")]
pub struct DeviceArgs {
    #[command(subcommand)]
    pub command: DeviceCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum DeviceCommand {
    List(DeviceList),
    Show(DeviceShow),
    Add(DeviceAdd),
    Block(DeviceBlock),
    Unblock(DeviceUnblock),
    Remove(DeviceRemove),
    Text(DeviceText),
    Ping(DevicePing),
    Events(DeviceEvents),
}

/// List devices, by id
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush device list
  fwpush device list --product gateway --online --limit 5000")]
pub struct DeviceList {
    /// Only of this product
    #[arg(long, value_name = "P")]
    pub product: Option<Product>,

    /// Only those connected now
    #[arg(long)]
    pub online: bool,

    /// Only those after this id
    #[arg(long, value_name = "ID")]
    pub after: Option<DeviceId>,

    /// How many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub limit: u32,
}

/// Show a device, its updates and its events
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device show gw-1")]
pub struct DeviceShow {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,
}

/// Add a device: its record and its certificate
///
/// With --out, makes a key here too and writes DIR with everything the agent needs: run `fwpush-device --config
/// DIR/agent.toml`. With --csr, the key stays on the device and the certificate is printed. With --count, makes devices
/// ID00001 to ID<N>, each in DIR/<id>, for the simulator.
#[derive(Args, Clone, Debug)]
#[command(
    group = ArgGroup::new("where").required(true),
    after_help = "\
Examples:
  fwpush device add gw-1 --product gateway --hw board-a:3 --out gw-1
  fwpush device add gw-2 --product gateway --hw board-a --csr gw-2.csr > gw-2.crt
  fwpush device add sim- --count 300 --product gateway --hw board-a --out fleet"
)]
pub struct DeviceAdd {
    /// Id of the device; with --count, what the ids begin with
    #[arg(value_name = "ID")]
    pub id: DeviceId,

    /// Product that it is: one that the trust root names
    #[arg(long, value_name = "P")]
    pub product: Product,

    /// Hardware and revision; the revision is 1 unless given
    #[arg(long, value_name = "ID[:REV]")]
    pub hw: HwRevision,

    /// Channel whose releases it gets
    #[arg(long, default_value = "stable", value_name = "C")]
    pub channel: Channel,

    /// Certificate request (PEM) of a key that was made on the device
    #[arg(long, value_name = "FILE", group = "where")]
    pub csr: Option<PathBuf>,

    /// Directory to write key, certificate and configuration to
    #[arg(long, value_name = "DIR", group = "where")]
    pub out: Option<PathBuf>,

    /// Life of the certificate, in days
    #[arg(long, default_value_t = 3_650, value_parser = clap::value_parser!(u32).range(1..=10_950), value_name = "N")]
    pub days: u32,

    /// Make this many devices
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N", conflicts_with = "csr")]
    pub count: Option<u32>,

    /// Version that runs before the first update, for agent.toml
    #[arg(long, default_value = "1.0.0", value_name = "V")]
    pub running_version: semver::Version,

    /// Security counter of what runs before the first update, for agent.toml
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub running_counter: u64,

    /// Size of each slot, for agent.toml
    #[arg(long, default_value = "256MiB", value_name = "BYTES")]
    pub slot_capacity: ByteCount,

    /// Server for agent.toml [default: what the server advertises]
    #[arg(long = "server", value_name = "HOST:PORT")]
    pub servers: Vec<String>,
}

/// Shut a device out: ends its streams and downloads within a second, refuses everything until unblocked
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device block gw-1 --reason 'stolen, ticket 4711'")]
pub struct DeviceBlock {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,

    /// Why, for the record
    #[arg(long, default_value = "", value_name = "WORDS")]
    pub reason: String,
}

/// Let a blocked device in again
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device unblock gw-1")]
pub struct DeviceUnblock {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,
}

/// Forget a device; its certificate is refused from then on
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device remove gw-1 --yes")]
pub struct DeviceRemove {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,

    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// Send words to a device's log
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device text gw-1 'maintenance at 22:00'")]
pub struct DeviceText {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,

    /// What to say, at most 4 KiB
    #[arg(value_name = "WORDS")]
    pub text: String,
}

/// Ask a device for a sign of life over its stream, on whatever node that is
///
/// Waits up to 10 s for the device to answer. The exit code is 1 when it is not connected or does not answer.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush device ping gw-1")]
pub struct DevicePing {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,
}

/// Say of which other devices a device hears that they come online, go offline or update
#[derive(Args, Clone, Debug)]
#[command(
    group = ArgGroup::new("which").required(true),
    after_help = "\
Examples:
  fwpush device events gw-1 --hears gw-2,gw-3
  fwpush device events gw-1 --hears '*'
  fwpush device events gw-1 --none"
)]
pub struct DeviceEvents {
    /// Id of the device
    #[arg(value_name = "ID")]
    pub id: DeviceId,

    /// At most 100 ids, or * for all of its product; replaces what was set
    #[arg(long, value_name = "ID,...|*", value_delimiter = ',', group = "which")]
    pub hears: Vec<String>,

    /// Of none
    #[arg(long, group = "which")]
    pub none: bool,
}
