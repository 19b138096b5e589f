//! The `fwpush` command: what can be typed ([`args`]), and one module for each command that does it.
//!
//! Commands that change a running system go through the server's `AdminService` and nothing else. Signing keys are read by
//! the commands that sign, on the machine they run on.

#![forbid(unsafe_code)]

pub mod args;
pub mod backup;
pub mod client;
pub mod config;
pub mod demo;
pub mod device;
pub mod disk;
pub mod enroll;
pub mod failure;
pub mod image;
pub mod init;
pub mod keys;
pub mod limits;
pub mod output;
pub mod progress;
pub mod release;
pub mod restore;
pub mod rollout;
pub mod serve;
pub mod signing;
pub mod trust;
pub mod upload;
pub mod values;
pub mod views;
pub mod watch;

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{CommandFactory as _, FromArgMatches as _, error::ErrorKind, parser::ValueSource};
use fwpush_keys::{Root, Verified};

use crate::{
    args::{Cli, Command},
    client::Client,
    config::OperatorConfig,
    failure::{Doing as _, Failure, Result},
    output::Output,
};

/// What every command starts from.
#[derive(Clone, Debug)]
pub struct Context {
    dir: Option<PathBuf>,
    pub out: Output,
}

impl Context {
    /// `dir` is that of `--dir`.
    pub fn new(dir: Option<PathBuf>, out: Output) -> Self {
        Self { dir, out }
    }

    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Connects to the server that the operator's configuration names.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(OperatorConfig::find(self.dir())?).await
    }

    /// The operator's root document, where there is an operator's configuration. For commands that also work without.
    pub fn local_root(&self) -> Result<Option<Verified<Root>>> {
        match OperatorConfig::find(self.dir()) {
            Ok(config) => trust::read_root(&config.root).map(Some),
            Err(failure) if config::chosen_dir(self.dir()).is_none() => {
                tracing::debug!(%failure, "No operator's configuration.");
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }
}

/// Parses the command line, runs the command, and gives the exit code: 0 done, 1 failed, 2 wrong usage or configuration.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match parse(args) {
        Ok(cli) => cli,
        // Help and the version are data; anything else is wrong usage.
        Err(error) => {
            // Nowhere to tell that telling failed.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // As above.
            let _ = failure.report(&mut io::stderr().lock());
            failure.exit().into()
        }
    }
}

/// Reads the command line.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(args)?;
    if let Some(("release", release)) = matches.subcommand()
        && let Some(step) = release.subcommand_name()
    {
        let stray = |id: &&clap::Id| {
            !matches!(id.as_str(), "dir" | "json")
                && release.try_contains_id(id.as_str()).is_ok()
                && release.value_source(id.as_str()) == Some(ValueSource::CommandLine)
        };
        if let Some(id) = release.ids().find(stray) {
            let words = format!(
                "`release {step}` takes its arguments after `{step}`; found `{id}` before it"
            );
            return Err(command.error(ErrorKind::ArgumentConflict, words));
        }
    }
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// Runs a command to its end.
pub fn run(cli: Cli) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .doing(|| "start the runtime".to_owned())?;
    let done = runtime.block_on(dispatch(cli));
    // A thread that still reads a file for a call that was given up is not waited for.
    runtime.shutdown_background();
    done
}

async fn dispatch(cli: Cli) -> Result<()> {
    let context = Context::new(cli.dir, Output { json: cli.json });
    match &cli.command {
        Command::Demo(args) => Box::pin(demo::run(&context, args)).await,
        Command::Init(args) if context.dir.is_none() => init::run(args, context.out),
        Command::Init(args) => Err(Failure::usage(
            "`fwpush init` takes its directory without --dir",
        )
        .next(format!("fwpush init {}", args.target.display()))),
        Command::Serve(args) => Box::pin(serve::run(&context, args)).await,
        Command::Release(args) => Box::pin(release::run(&context, args)).await,
        Command::Rollout(args) => Box::pin(rollout::run(&context, args)).await,
        Command::Device(args) => Box::pin(device::run(&context, args)).await,
        Command::Keys(args) => Box::pin(keys::run(&context, args)).await,
        Command::Backup(args) => backup::run(&context, args).await,
        Command::Restore(args) => restore::run(&context, args),
    }
}
