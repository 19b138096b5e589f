//! Runs one command of the slots: no shell, a known environment, a time limit, bounded words, nothing left behind.

use std::{
    fs::File,
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::limits;

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
    #[error("{program:?} could not be started")]
    Start { program: String, source: io::Error },
    #[error("it could not be waited for")]
    Wait(#[source] io::Error),
    #[error("it ended with {status}: {stderr}")]
    Failed { status: ExitStatus, stderr: String },
    #[error("it did not end within {limit:?} and was killed: {stderr}")]
    TimedOut { limit: Duration, stderr: String },
    #[error("it was killed because the agent is stopping")]
    Stopped,
    #[error("it printed more than {} bytes", limits::COMMAND_STDOUT_BYTES)]
    Talkative,
    #[error("{0}")]
    Status(String),
}

enum End {
    Exited(io::Result<ExitStatus>),
    TimedOut,
    Stopped,
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
                .map_err(CommandError::Wait)?
                .block_on(self.run_here())
        };
        std::thread::scope(|scope| match scope.spawn(run).join() {
            Ok(result) => result,
            Err(_) => Err(CommandError::Wait(io::Error::other("its watcher panicked"))),
        })
    }

    async fn run_here(self) -> Result<Vec<u8>, CommandError> {
        let mut child = self.start()?;
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(rustix::process::Pid::from_raw);
        let signal = |signal| {
            if let Some(group) = group {
                // No such process: the group has ended by itself.
                let _ = rustix::process::kill_process_group(group, signal);
            }
        };
        let stdout = tokio::spawn(first_bytes(child.stdout.take()));
        let stderr = tokio::spawn(last_words(child.stderr.take()));
        let limit = self.command.timeout;
        let end = tokio::select! {
            status = child.wait() => End::Exited(status),
            () = tokio::time::sleep(limit) => End::TimedOut,
            () = self.stop.cancelled() => End::Stopped,
        };
        if !matches!(end, End::Exited(_)) {
            signal(rustix::process::Signal::TERM);
            let _ = timeout(limits::COMMAND_TERM_GRACE, child.wait()).await;
        }
        // What the command left running must not outlive it; it also holds the pipes open.
        signal(rustix::process::Signal::KILL);
        let reaped = child.wait().await;
        let words = async |reader: tokio::task::JoinHandle<_>| {
            // A process that moved to another group may hold a pipe: then its words are not waited for.
            let read = timeout(limits::COMMAND_TERM_GRACE, reader).await;
            read.ok().and_then(Result::ok).unwrap_or_default()
        };
        let stderr = clean(&words(stderr).await);
        match end {
            End::Exited(Ok(status)) if status.success() => {
                let stdout = words(stdout).await;
                if stdout.len() > limits::COMMAND_STDOUT_BYTES {
                    return Err(CommandError::Talkative);
                }
                Ok(stdout)
            }
            End::Exited(Ok(status)) => Err(CommandError::Failed { status, stderr }),
            End::Exited(Err(error)) => Err(CommandError::Wait(error)),
            End::TimedOut => {
                reaped.map_err(CommandError::Wait)?;
                Err(CommandError::TimedOut { limit, stderr })
            }
            End::Stopped => Err(CommandError::Stopped),
        }
    }

    fn start(&self) -> Result<Child, CommandError> {
        let (program, arguments) = match self.command.argv.split_first() {
            Some((program, arguments)) => (program.as_str(), arguments),
            None => ("", &[][..]),
        };
        let path = std::env::var_os("PATH").unwrap_or_else(|| limits::COMMAND_PATH.into());
        let input = match &self.input {
            Some(file) => Stdio::from(file.try_clone().map_err(CommandError::Wait)?),
            None => Stdio::null(),
        };
        Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", path)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir("/")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| CommandError::Start {
                program: program.to_owned(),
                source,
            })
    }
}

/// What a command prints, up to one byte too many. The rest is read as well, so that it does not wait for a reader.
async fn first_bytes(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    read_all(stream, |bytes| {
        let room = (limits::COMMAND_STDOUT_BYTES + 1).saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    })
    .await;
    kept
}

/// The end of what a command complains about: the last words say why.
async fn last_words(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    read_all(stream, |bytes| {
        kept.extend_from_slice(bytes);
        kept.drain(..kept.len().saturating_sub(limits::COMMAND_STDERR_BYTES));
    })
    .await;
    kept
}

async fn read_all(stream: Option<impl AsyncRead + Unpin>, mut take: impl FnMut(&[u8])) {
    let Some(mut stream) = stream else { return };
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        take(&buffer[..length]);
    }
}

/// One line without control characters, for the log and the server.
fn clean(words: &[u8]) -> String {
    String::from_utf8_lossy(words)
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
