//! `fwpush cluster`.

use clap::{Args, Subcommand};

/// The nodes that serve one fleet together
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush cluster status")]
pub struct ClusterArgs {
    #[command(subcommand)]
    pub command: ClusterCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ClusterCommand {
    Status(ClusterStatus),
}

/// Show nodes, what they drive, and the database, file store and Redis that they share
///
/// As the node that is asked sees it now. The exit code is 1 when something that nodes share does not answer.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush cluster status
  fwpush cluster status --json")]
pub struct ClusterStatus {}
