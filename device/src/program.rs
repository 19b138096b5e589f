//! Programs of the device's owner: the health check, hooks, the slots' commands, and what is asked about the link and the
//! device.
//!
//! No shell. A program gets its own process group, and nothing of what systemd meant for the agent alone. At its time limit,
//! when the agent stops, or when nobody waits any more, the whole group is killed; what a program leaves running is killed
//! when it ends.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{limits, words::printable};

/// Variables that systemd set for the agent; a child that used them would speak in its name.
const NOT_FOR_CHILDREN: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// What is to be run.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// The program, absolute or found in `PATH`, and its arguments, as they are.
    pub argv: &'a [String],
    /// Beside what it inherits.
    pub environment: Vec<(&'static str, OsString)>,
    pub inherits: Inherits,
    /// Its standard input; without one it is `/dev/null`.
    pub input: Option<File>,
    pub timeout: Duration,
    /// From SIGTERM to SIGKILL, when it is not done in time; zero for SIGKILL at once.
    pub grace: Duration,
}

/// What a program has from the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inherits {
    /// Its directory, and its environment without what systemd meant for the agent alone.
    Environment,
    /// `PATH`; it begins in `/`.
    Path,
}

/// How a program ended within its time.
#[derive(Debug)]
pub(crate) struct Ended {
    pub status: ExitStatus,
    /// The first [`limits::PROGRAM_STDOUT_BYTES`].
    pub stdout: Vec<u8>,
    /// The last [`limits::PROGRAM_STDERR_BYTES`].
    pub stderr: String,
}

/// Why there is no exit status.
#[derive(Debug, Error)]
pub enum ProgramError {
    #[error("no program is named")]
    Empty,
    #[error("{program:?} could not be started")]
    Start { program: String, source: io::Error },
    #[error("{program:?} could not be waited for")]
    Wait { program: String, source: io::Error },
    /// `stderr`: what it had said, with a colon and a space before it.
    #[error("{program:?} did not end within {timeout:?} and was killed{stderr}")]
    Timeout {
        program: String,
        timeout: Duration,
        stderr: String,
    },
    #[error("{program:?} was killed because the agent is stopping")]
    Stopped { program: String },
}

impl Ended {
    /// How it ended and what it said about it.
    pub(crate) fn explain(&self) -> String {
        format!("{}{}", self.status, said(&self.stderr))
    }

    /// What it printed, fit for a terminal.
    pub(crate) fn answer(&self) -> String {
        printable(&String::from_utf8_lossy(&self.stdout), usize::MAX)
    }
}

fn said(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        words => format!(": {words}"),
    }
}

/// Kills what is left of a process group.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // Gone already: nothing to do.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Why a program is not waited for any longer.
enum End {
    Exited(io::Result<ExitStatus>),
    Late,
    Stopped,
}

impl<'a> Program<'a> {
    /// One that has the agent's environment and more, and is killed at its time limit.
    pub(crate) fn new(
        argv: &'a [String],
        environment: Vec<(&'static str, OsString)>,
        timeout: Duration,
    ) -> Self {
        Self {
            argv,
            environment,
            inherits: Inherits::Environment,
            input: None,
            timeout,
            grace: Duration::ZERO,
        }
    }

    /// Runs it to its end or its time limit; never much longer. Killed with its group when the future is dropped.
    pub(crate) async fn run(self) -> Result<Ended, ProgramError> {
        self.run_until(&CancellationToken::new()).await
    }

    /// As [`Program::run`], and no longer than until `stop`.
    pub(crate) async fn run_until(
        mut self,
        stop: &CancellationToken,
    ) -> Result<Ended, ProgramError> {
        let program = self.argv.first().ok_or(ProgramError::Empty)?.clone();
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(source) => return Err(ProgramError::Start { program, source }),
        };
        let group = Group::of(&child);
        let stdout = Heard::listen(
            child.stdout.take(),
            Keep::First(limits::PROGRAM_STDOUT_BYTES),
        );
        let stderr = Heard::listen(
            child.stderr.take(),
            Keep::Last(limits::PROGRAM_STDERR_BYTES),
        );
        let end = tokio::select! {
            status = child.wait() => End::Exited(status),
            () = sleep(self.timeout) => End::Late,
            () = stop.cancelled() => End::Stopped,
        };
        if !matches!(end, End::Exited(_)) && !self.grace.is_zero() {
            group.signal(Signal::TERM);
            let _ = timeout(self.grace, child.wait()).await;
        }
        // Whatever it left running must not outlive it; it also holds the pipes open.
        drop(group);
        // No zombie stays; but one that hangs in the kernel is not waited for.
        let _ = timeout(limits::PROGRAM_PIPE_WAIT, child.wait()).await;
        let (stdout, stderr) = (stdout.end().await, stderr.end().await);
        let stderr = printable(&String::from_utf8_lossy(&stderr), usize::MAX);
        match end {
            End::Exited(Ok(status)) => Ok(Ended {
                status,
                stdout,
                stderr,
            }),
            End::Exited(Err(source)) => Err(ProgramError::Wait { program, source }),
            End::Late => Err(ProgramError::Timeout {
                program,
                timeout: self.timeout,
                stderr: said(&stderr),
            }),
            End::Stopped => Err(ProgramError::Stopped { program }),
        }
    }

    fn spawn(&mut self) -> io::Result<Child> {
        let mut command = Command::new(&self.argv[0]);
        match self.inherits {
            Inherits::Environment => {
                for name in NOT_FOR_CHILDREN {
                    command.env_remove(name);
                }
            }
            Inherits::Path => {
                let path = std::env::var_os("PATH").unwrap_or_else(|| limits::PROGRAM_PATH.into());
                command.env_clear().env("PATH", path).current_dir("/");
            }
        }
        command
            .args(&self.argv[1..])
            .envs(self.environment.drain(..))
            .stdin(self.input.take().map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }
}

/// Which part of what a program says is kept. All of it is read: a program is not to fail for talking much.
#[derive(Debug, Clone, Copy)]
enum Keep {
    First(usize),
    Last(usize),
}

impl Keep {
    fn add(self, kept: &mut Vec<u8>, new: &[u8]) {
        match self {
            Keep::First(limit) => {
                let room = limit.saturating_sub(kept.len());
                kept.extend_from_slice(&new[..new.len().min(room)]);
            }
            Keep::Last(limit) => {
                kept.extend_from_slice(new);
                let over = kept.len().saturating_sub(limit);
                kept.drain(..over);
            }
        }
    }
}

/// A pipe that is being read.
struct Heard {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl fmt::Debug for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Heard")
    }
}

impl Heard {
    fn listen(pipe: Option<impl AsyncRead + Unpin + Send + 'static>, keep: Keep) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&kept);
        let reader = tokio::spawn(async move {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
                let mut kept = shared.lock().unwrap_or_else(PoisonError::into_inner);
                keep.add(&mut kept, &buffer[..length]);
            }
        });
        Self { kept, reader }
    }

    /// What was said until the pipe was closed; or, where a process that left the group keeps it open, until now.
    async fn end(mut self) -> Vec<u8> {
        if timeout(limits::PROGRAM_PIPE_WAIT, &mut self.reader)
            .await
            .is_err()
        {
            self.reader.abort();
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut kept)
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, timeout: Duration) -> Result<Ended, ProgramError> {
        let argv = ["sh", "-c", script].map(String::from);
        let environment = vec![("FWPUSH_WORD", "a b".into())];
        Program::new(&argv, environment, timeout).run().await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_is_said_is_kept_within_bounds_the_end_of_errors_and_the_beginning_of_answers() {
        let script = r#"printf '%s' "$FWPUSH_WORD"; yes | head -c 1000000; yes no | head -c 1000000 >&2; printf 'the end\033' >&2; exit 3"#;
        let ended = shell(script, LONG).await.unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert!(ended.answer().starts_with("a by"), "{}", ended.answer());
        assert_eq!(ended.stdout.len(), limits::PROGRAM_STDOUT_BYTES);
        assert!(
            ended.stderr.ends_with("the end\u{fffd}"),
            "no terminal is steered"
        );
        assert!(ended.stderr.len() <= limits::PROGRAM_STDERR_BYTES + 2);
        assert!(ended.explain().starts_with("exit status: 3: "));
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!(
            "echo waiting >&2; sleep 1000 & echo $! > {}; wait",
            file.display()
        );
        let error = shell(&script, Duration::from_millis(300))
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("did not end within 300ms and was killed: waiting"),
            "{error}"
        );
        let child = std::fs::read_to_string(&file).unwrap();
        expect_gone(child.trim()).await;
    }

    #[tokio::test]
    async fn a_program_that_nobody_waits_for_any_more_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!(
            "sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait",
            file.display()
        );
        let running = tokio::spawn(async move { shell(&script, LONG).await });
        while !file.exists() {
            tokio::task::yield_now().await;
        }
        running.abort();
        let child = std::fs::read_to_string(&file).unwrap();
        expect_gone(child.trim()).await;
    }

    /// Waits for the end of a process. The test's time limit is the limit.
    async fn expect_gone(pid: &str) {
        let status = format!("/proc/{pid}/status");
        let runs =
            || std::fs::read_to_string(&status).is_ok_and(|status| !status.contains("State:\tZ"));
        while runs() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_daemon_that_keeps_the_pipe_does_not_keep_the_agent() {
        let script = "setsid sleep 5 & exit 0";
        let ended = shell(script, LONG).await.unwrap();
        assert!(ended.status.success());
    }

    #[tokio::test]
    async fn a_program_that_cannot_start_is_named() {
        let argv = ["/does/not/exist".to_owned()];
        let program = Program::new(&argv, Vec::new(), LONG);
        let error = program.run().await.unwrap_err();
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
    }
}
