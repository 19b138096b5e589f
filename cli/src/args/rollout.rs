//! `fwpush rollout`.

use clap::{Args, Subcommand, ValueEnum};
use fwpush_keys::id::{ReleaseId, RolloutId};
use fwpush_proto::v1::Phase;

use crate::values::Target;

/// Start, watch and stop rollouts
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush rollout list
  fwpush rollout start --release ID --to gw-1,gw-2
  fwpush rollout show ID --follow")]
pub struct RolloutArgs {
    #[command(subcommand)]
    pub command: RolloutCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum RolloutCommand {
    List(RolloutList),
    Show(RolloutShow),
    Start(RolloutStart),
    Abort(RolloutAbort),
}

/// List rollouts, newest first
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush rollout list --limit 10")]
pub struct RolloutList {
    /// How many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500), value_name = "N")]
    pub limit: u32,
}

/// Show a rollout
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush rollout show ID
  fwpush rollout show ID --follow
  fwpush rollout show ID --phase failed")]
pub struct RolloutShow {
    /// Id of the rollout
    #[arg(value_name = "ID")]
    pub id: RolloutId,

    /// Show progress until it is done
    #[arg(long, conflicts_with_all = ["devices", "phase"])]
    pub follow: bool,

    /// List its devices
    #[arg(long)]
    pub devices: bool,

    /// List its devices in this phase
    #[arg(long, value_enum, value_name = "PHASE")]
    pub phase: Option<PhaseName>,

    /// How many devices to list
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub limit: u32,
}

/// Offer a published release to devices
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush rollout start --release ID --to gw-1,gw-2
  fwpush rollout start --release ID --to all --rollback --yes

The exit code is 1 when a device failed, rolled back or refused the release.")]
pub struct RolloutStart {
    /// Published release
    #[arg(long, value_name = "ID")]
    pub release: ReleaseId,

    /// Devices to offer it to
    #[arg(long, value_name = "all|ID,...")]
    pub to: Target,

    /// Also to devices that run a newer version; every other check stays
    #[arg(long)]
    pub rollback: bool,

    /// Show whom it would reach; start nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,

    /// Return as soon as the rollout has started
    #[arg(long)]
    pub detach: bool,
}

/// Stop a rollout
///
/// Devices that have not begun their trial give the update up; the others finish it.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush rollout abort ID --yes")]
pub struct RolloutAbort {
    /// Id of the rollout
    #[arg(value_name = "ID")]
    pub id: RolloutId,

    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// The phases of an update, in the order in which they come.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum PhaseName {
    Pending,
    Offered,
    Accepted,
    Deferred,
    Downloading,
    Verified,
    Installing,
    Rebooting,
    Confirming,
    Succeeded,
    Failed,
    RolledBack,
    Rejected,
    Cancelled,
    TimedOut,
}

impl From<PhaseName> for Phase {
    fn from(name: PhaseName) -> Self {
        match name {
            PhaseName::Pending => Self::Pending,
            PhaseName::Offered => Self::Offered,
            PhaseName::Accepted => Self::Accepted,
            PhaseName::Deferred => Self::Deferred,
            PhaseName::Downloading => Self::Downloading,
            PhaseName::Verified => Self::Verified,
            PhaseName::Installing => Self::Installing,
            PhaseName::Rebooting => Self::Rebooting,
            PhaseName::Confirming => Self::Confirming,
            PhaseName::Succeeded => Self::Succeeded,
            PhaseName::Failed => Self::Failed,
            PhaseName::RolledBack => Self::RolledBack,
            PhaseName::Rejected => Self::Rejected,
            PhaseName::Cancelled => Self::Cancelled,
            PhaseName::TimedOut => Self::TimedOut,
        }
    }
}
