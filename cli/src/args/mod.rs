//! What can be typed: every command, its arguments and its help. No logic.

mod cluster;
mod db;
mod device;
mod files;
mod keys;
mod node;
mod release;
mod rollout;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fwpush_keys::{
    SanName,
    id::{NodeId, OperatorId, Product, TrustDomain},
};

pub use self::{cluster::*, db::*, device::*, files::*, keys::*, node::*, release::*, rollout::*};
use crate::values::ByteCount;

/// Distributes firmware: signed releases, pushed to devices, verified by them byte by byte.
#[derive(Debug, Parser)]
#[command(
    name = "fwpush",
    version,
    propagate_version = false,
    max_term_width = 110,
    after_help = "\
Commands that talk to a server find it by --dir, else by the environment variable FWPUSH_DIR,
else by the nearest fwpush.toml upwards from here.

Exit codes: 0 done; 1 failed, or a rollout did not end well; 2 wrong usage or configuration.

Examples:
  fwpush demo                                  see a fleet of 100 devices update itself
  fwpush init fw --product gateway             make certificates and keys
  fwpush serve --dir fw                        start the server
  fwpush release fw.img --dir fw --product gateway --version 1.1.0 --hw board-a --to all"
)]
pub struct Cli {
    /// Directory made by `fwpush init` (or its server/ or operator/ part)
    #[arg(long, global = true, value_name = "DIR", display_order = 900)]
    pub dir: Option<PathBuf>,

    /// Print data as one JSON document on standard output
    #[arg(long, global = true, display_order = 901)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Demo(DemoArgs),
    Init(InitArgs),
    Serve(ServeArgs),
    Release(Box<ReleaseArgs>),
    Rollout(RolloutArgs),
    Device(DeviceArgs),
    Files(FilesArgs),
    Keys(KeysArgs),
    Backup(BackupArgs),
    Restore(RestoreArgs),
    Db(DbArgs),
    Cluster(ClusterArgs),
    Node(NodeArgs),
}

/// Show a whole fleet update itself on this machine
///
/// Makes fresh certificates and keys, starts a server and simulated devices on firmware 1.0.0, releases 1.1.0, and shows
/// how it reaches them. With --nodes, a cluster of servers on a private Redis and a private PostgreSQL (Debian's packages
/// redis-server and postgresql) loses one of them to SIGKILL on the way. The exit code is 1 unless every device ended as
/// expected. With --dir certificates, configuration, images and the nodes' logs stay there; the engines end with the demo.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush demo
  fwpush demo --devices 300 --size 32MiB --faults
  fwpush demo --nodes 3
  fwpush demo --dir /tmp/demo --keep")]
pub struct DemoArgs {
    /// Simulated devices
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub devices: u32,

    /// Servers; of several, one is killed in the middle of the rollout
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8), value_name = "N")]
    pub nodes: u32,

    /// Image to release
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    pub image: Option<PathBuf>,

    /// Size of the image that is made for the run
    #[arg(long, default_value = "8MiB", value_name = "BYTES")]
    pub size: ByteCount,

    /// Lose links, corrupt groups, and add a release whose health check fails and rolls back
    #[arg(long)]
    pub faults: bool,

    /// Stay up afterwards and print commands to try
    #[arg(long)]
    pub keep: bool,

    /// Seed of everything random in the simulation
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
}

/// Make the directories of a new installation: certificates, keys, configuration
///
/// DIR/server has all that `fwpush serve` needs, DIR/operator what a release engineer needs. DIR/offline has the keys that
/// can authorise firmware and servers: the server never needs it, keep it elsewhere.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush init fw
  fwpush init fw --trust-domain acme --server-name fw.acme.example \\
    --product gateway --product meter")]
pub struct InitArgs {
    /// Directory to make; refused when it holds an installation
    #[arg(value_name = "DIR")]
    pub target: PathBuf,

    /// Name of the installation, in every certificate
    #[arg(long, default_value = "fwpush", value_name = "NAME")]
    pub trust_domain: TrustDomain,

    /// Name or address under which devices and operators reach the server [default: host name, localhost, local addresses]
    #[arg(long = "server-name", value_name = "HOST|IP")]
    pub server_names: Vec<SanName>,

    /// Product that releases may be signed for; more can be added with `fwpush keys rotate-root` [default: default]
    #[arg(long = "product", value_name = "P")]
    pub products: Vec<Product>,

    /// Highest security counter a release may carry until a new root raises it: bounds what a stolen release key can bar
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=9_007_199_254_740_991), value_name = "N")]
    pub max_counter: u64,

    /// Id of this server
    #[arg(long, default_value = "node-1", value_name = "ID")]
    pub node_id: NodeId,

    /// Id of the first operator
    #[arg(long, default_value = "operator-1", value_name = "ID")]
    pub operator_id: OperatorId,

    /// Port for devices
    #[arg(long, default_value_t = 7443, value_name = "N")]
    pub device_port: u16,

    /// Port for operators
    #[arg(long, default_value_t = 7444, value_name = "N")]
    pub operator_port: u16,

    /// Port for metrics and health, on the loopback address only
    #[arg(long, default_value_t = 7445, value_name = "N")]
    pub metrics_port: u16,
}

/// Run the server
///
/// SIGTERM and SIGINT drain it: devices are told to reconnect elsewhere, running downloads get time to end. SIGHUP reads
/// certificates and configuration again.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush serve --dir fw
  fwpush serve --config /etc/fwpush/fwpush.toml --log-format json

FWPUSH_LOG (or RUST_LOG) sets what is logged: debug, or warn,fwpush_server=debug.")]
pub struct ServeArgs {
    /// Configuration file, instead of --dir
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Copy database, trust documents and images of a running server into one file
///
/// The copy is consistent and has no private keys: keep DIR/server/pki apart.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush backup fwpush-2026-01-31.tar --dir fw")]
pub struct BackupArgs {
    /// Archive to write; refused when it exists
    pub file: PathBuf,
}

/// Unpack a backup into DIR/server while the server is stopped
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush restore fwpush-2026-01-31.tar --dir fw
  fwpush restore fwpush-2026-01-31.tar --dir fw --force")]
pub struct RestoreArgs {
    /// Archive made by `fwpush backup`
    pub file: PathBuf,

    /// Configuration file of the server, instead of --dir
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Move what is there aside first
    #[arg(long)]
    pub force: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// Wider lines of a help are folded, and a folded example cannot be pasted.
    const COLUMNS: usize = 100;

    fn check(command: &clap::Command, path: &str) {
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{path}: {} has no words",
                argument.get_id()
            );
        }
        let examples = command.get_after_help().map(ToString::to_string);
        let examples = examples.unwrap_or_default();
        assert!(examples.contains("  fwpush "), "{path} has no example");
        for line in examples.lines() {
            assert!(line.len() <= COLUMNS, "{path}: {line}");
        }
        for below in command.get_subcommands() {
            check(below, &format!("{path} {}", below.get_name()));
        }
    }

    #[test]
    fn every_command_has_an_example_and_every_argument_has_words() {
        check(&Cli::command(), "fwpush");
    }
}
