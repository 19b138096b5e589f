//! The `fwpush` command: what can be typed ([`args`]), and one module for each command that does it.
//!
//! Commands that change a running system go through the server's `AdminService` and nothing else. Signing keys are read by
//! the commands that sign, on the machine they run on.

#![forbid(unsafe_code)]

pub mod args;
pub mod backup;
pub mod client;
mod cluster;
pub mod config;
mod connect;
pub mod db;
pub mod demo;
pub mod device;
pub mod disk;
pub mod download;
pub mod enroll;
pub mod failure;
pub mod files;
pub mod image;
pub mod init;
pub mod keys;
pub mod limits;
mod node;
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
    io::{self, Write as _},
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
    output::{Output, escape_lines},
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
        OperatorConfig::find_optional(self.dir())?
            .map(|config| trust::read_root(&config.root))
            .transpose()
    }
}

/// Parses the command line, runs the command, and gives the exit code: 0 done, 1 failed, 2 wrong usage or configuration.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match parse(args) {
        Ok(cli) => cli,
        // Wrong usage, whose words repeat what was typed: it cannot steer the terminal.
        Err(error) if error.use_stderr() => {
            // Nowhere to tell that telling failed.
            let _ = write!(
                io::stderr(),
                "{}",
                escape_lines(&error.render().to_string())
            );
            return ExitCode::from(2);
        }
        // Help and the version are data.
        Err(error) => {
            // As above.
            let _ = error.print();
            return ExitCode::SUCCESS;
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
        Command::Files(args) => files::run(&context, args).await,
        Command::Keys(args) => Box::pin(keys::run(&context, args)).await,
        Command::Backup(args) => backup::run(&context, args).await,
        Command::Restore(args) => restore::run(&context, args).await,
        Command::Cluster(args) => cluster::run(&context, args).await,
        Command::Node(args) => node::run(&context, args),
        Command::Db(args) => Box::pin(db::run(&context, args)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(command: &clap::Command, path: &str, see: &mut impl FnMut(&str, &clap::Command)) {
        see(path, command);
        for sub in command
            .get_subcommands()
            .filter(|sub| sub.get_name() != "help")
        {
            each(sub, &format!("{path} {}", sub.get_name()), see);
        }
    }

    #[test]
    fn every_command_explains_itself_with_an_example() {
        Cli::command().debug_assert();
        each(&Cli::command(), "fwpush", &mut |path, command| {
            assert!(
                command.get_about().is_some(),
                "{path} says nothing of itself"
            );
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains("Example") && help.contains(path),
                "{path} shows no example: {help}"
            );
        });
    }

    /// What follows `fwpush` in the examples of the help, up to a pipe or redirection.
    fn examples() -> Vec<String> {
        let mut found = Vec::new();
        each(&Cli::command(), "fwpush", &mut |_, command| {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            // A long example goes on in the next line.
            let help = help.replace("\\\n    ", "");
            let lines = help
                .lines()
                .map(str::trim)
                .filter(|line| line.starts_with("fwpush "));
            found.extend(lines.map(|line| {
                let line = line.split("   ").next().unwrap_or(line);
                line.split(" > ").next().unwrap_or(line).to_owned()
            }));
        });
        found
    }

    #[test]
    fn the_examples_can_be_typed() {
        let id = "0190d7a2-7e4a-7c52-a05a-1f4f0d7f3b11";
        assert!(
            examples().len() > 40,
            "the examples are found: {}",
            examples().len()
        );
        for example in examples() {
            let line = example
                .replace("KEYID", &"0".repeat(64))
                .replace(" ID", &format!(" {id}"));
            // Quotes hold words together, as in a shell.
            let words = line
                .split('\'')
                .enumerate()
                .flat_map(|(at, part)| match at % 2 {
                    0 => part
                        .split_whitespace()
                        .map(str::to_owned)
                        .collect::<Vec<_>>(),
                    _ => vec![part.to_owned()],
                });
            // `--release ID='words'` is one argument in a shell.
            let words = words.fold(Vec::<String>::new(), |mut words, word| {
                match words.last_mut().filter(|last| last.ends_with('=')) {
                    Some(last) => last.push_str(&word),
                    None => words.push(word),
                }
                words
            });
            if let Err(error) = parse(words.into_iter().map(OsString::from)) {
                panic!("{example}: {error}");
            }
        }
    }

    #[test]
    fn wrong_usage_and_help_have_their_exit_codes() {
        let code = |line: &[&str]| format!("{:?}", main(line.iter().map(OsString::from)));
        assert_eq!(
            code(&["fwpush", "--help"]),
            format!("{:?}", ExitCode::SUCCESS)
        );
        assert_eq!(
            code(&["fwpush", "nonsense"]),
            format!("{:?}", ExitCode::from(2))
        );
        assert_eq!(
            code(&["fwpush", "--dir", "/nonexistent", "device", "list"]),
            format!("{:?}", ExitCode::from(2))
        );
    }
}
