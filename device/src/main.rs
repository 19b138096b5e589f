//! `fwpush-device`: reads its arguments and calls the library.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use fwpush_device::service::{self, StatusForm};

/// The fwpush device agent: waits for updates, verifies and installs them, and goes back by itself when one is bad.
#[derive(Debug, Parser)]
#[command(version, after_help = HELP)]
struct Arguments {
    /// The agent's configuration.
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        default_value = "/etc/fwpush/agent.toml",
        env = "FWPUSH_DEVICE_CONFIG"
    )]
    config: PathBuf,
    /// End when there is nothing more to do, instead of waiting for the next update.
    #[arg(long)]
    once: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows where the device stands; needs no server and no running agent.
    Status {
        /// One JSON object.
        #[arg(long)]
        json: bool,
        /// Print nothing; exit code 0 while the running image is on trial, 1 when it is confirmed.
        #[arg(long, conflicts_with = "json")]
        on_trial: bool,
    },
}

const HELP: &str = "\
Example:
  fwpush-device --config dev-1/agent.toml
  fwpush-device --config dev-1/agent.toml status --json

Exit codes: 0 done, 1 other failure, 2 configuration, 3 identity refused (--once), 4 state or slots unusable,
5 rolled back (--once), 10 reboot due (--once).
FWPUSH_LOG sets what is logged, such as \"debug\" or \"warn,fwpush_device=info\".";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Status { json, on_trial }) => {
            let form = match (json, on_trial) {
                (_, true) => StatusForm::OnTrial,
                (true, _) => StatusForm::Json,
                _ => StatusForm::Text,
            };
            service::status(&arguments.config, form)
        }
        None => service::run(&arguments.config, arguments.once),
    }
}
