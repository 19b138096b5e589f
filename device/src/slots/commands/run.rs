//! Runs one command of the slots, from where nothing may be awaited.

use std::{fs::File, io, time::Duration};

use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::{
    limits,
    program::{Inherits, Program, ProgramError},
};

/// A program with its arguments, and how long it may take.
#[derive(Debug, Clone)]
pub struct SlotCommand {
    /// The program, absolute or found in `PATH`, and its arguments. No shell reads them.
    pub argv: Vec<String>,
    pub timeout: Duration,
}

/// One run of a command.
pub(super) struct Run<'a> {
    pub command: &'a SlotCommand,
    /// All that the command finds in its environment, beside `PATH`.
    pub environment: &'a [(&'static str, String)],
    /// Its standard input, open for reading only; without one it is `/dev/null`.
    pub input: Option<File>,
    /// Ends the run early.
    pub stop: &'a CancellationToken,
}

/// Why a command did not do what it was asked for.
#[derive(Debug, Error)]
pub enum CommandError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("it could not be watched")]
    Watch(#[source] io::Error),
    #[error("it ended with {0}")]
    Failed(String),
    #[error("it printed more than {} bytes", limits::COMMAND_STDOUT_BYTES)]
    Talkative,
    #[error("{0}")]
    Status(String),
}

impl Run<'_> {
    /// Runs the command to its end and returns what it printed; blocks. Whatever the end, its process group is gone when
    /// this returns: SIGTERM first where it was not done, and SIGKILL for what is left.
    pub(super) fn run(self) -> Result<Vec<u8>, CommandError> {
        // A thread and a reactor of its own: the caller may be inside a runtime, where another must not be entered.
        let run = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(CommandError::Watch)?
                .block_on(self.run_here())
        };
        std::thread::scope(|scope| match scope.spawn(run).join() {
            Ok(result) => result,
            Err(_) => Err(CommandError::Watch(io::Error::other(
                "its watcher panicked",
            ))),
        })
    }

    async fn run_here(self) -> Result<Vec<u8>, CommandError> {
        let environment = self.environment.iter();
        let program = Program {
            argv: &self.command.argv,
            environment: environment
                .map(|(key, value)| (*key, value.into()))
                .collect(),
            inherits: Inherits::Path,
            input: self.input,
            timeout: self.command.timeout,
            grace: limits::COMMAND_TERM_GRACE,
        };
        let ended = program.run_until(self.stop).await?;
        if !ended.status.success() {
            return Err(CommandError::Failed(ended.explain()));
        }
        if ended.stdout.len() > limits::COMMAND_STDOUT_BYTES {
            return Err(CommandError::Talkative);
        }
        Ok(ended.stdout)
    }
}
