//! `fwpush files`.

use clap::{Args, Subcommand};

/// The images that the server keeps
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush files list
  fwpush files gc --dry-run")]
pub struct FilesArgs {
    #[command(subcommand)]
    pub command: FilesCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum FilesCommand {
    List(FilesList),
    Gc(FilesGc),
}

/// List images, and how many releases need each
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush files list --json")]
pub struct FilesList {}

/// Remove images that no release names
///
/// Marks them first and removes them a day later: this command when it is repeated, or the server by itself. Until then publishing
/// or uploading one again takes the mark away. What devices are downloading goes on.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush files gc --dry-run
  fwpush files gc
  fwpush files gc --revoked")]
pub struct FilesGc {
    /// Also images that only revoked releases name
    #[arg(long)]
    pub revoked: bool,

    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}
