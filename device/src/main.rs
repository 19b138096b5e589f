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
    /// Installs a bundle that `fwpush release bundle` wrote, under the same checks as from a server; needs none.
    ///
    /// The agent must not run meanwhile. A command that was interrupted goes on where it was when it is repeated; after the
    /// reboot it judges the new image where there is a health check and no agent has done so.
    #[command(after_help = INSTALL_HELP)]
    Install {
        /// The bundle, such as a file on a USB stick.
        bundle: PathBuf,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
}

const HELP: &str = "\
Examples:
  fwpush-device --config dev-1/agent.toml
  fwpush-device --config dev-1/agent.toml status --json
  fwpush-device --config dev-1/agent.toml install gateway-1.1.0.fwb

Exit codes: 0 done, 1 other failure, 2 configuration, 3 identity refused (--once),
4 state or slots unusable, 5 rolled back (--once, install), 10 reboot due (--once, install).
FWPUSH_LOG sets what is logged, such as \"debug\" or \"warn,fwpush_device=info\".";

const INSTALL_HELP: &str = "\
Example:
  systemctl stop fwpush-device
  fwpush-device install /media/usb/gateway-1.1.0.fwb; [ $? = 10 ] && reboot

Exit codes:
  0   the bundle's release runs and is confirmed
  10  it is in the spare slot: reboot
  5   it was tried and rolled back
  1   refused, failed or put off; the message has a code
  2   the configuration is wrong
  4   the state or the slots cannot be used, or the agent runs";

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
        Some(Command::Install { bundle, json }) => {
            service::install(&arguments.config, &bundle, json)
        }
        None => service::run(&arguments.config, arguments.once),
    }
}
