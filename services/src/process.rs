//! Processes: one that runs and ends, and one that is kept running.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::Error;

/// Runs it to its end and gives what it printed. Fails with what it printed when it fails.
pub(crate) fn run(mut command: Command) -> Result<String, Error> {
    let program = command.get_program().to_owned();
    let log = tempfile::tempfile().map_err(Error::io(env::temp_dir()))?;
    let again = || log.try_clone().map_err(Error::io(env::temp_dir()));
    // Files and no pipes: the server that `pg_ctl` starts keeps them open.
    let status = command
        .stdin(Stdio::null())
        .stdout(again()?)
        .stderr(again()?)
        .status()
        .map_err(Error::io(&program))?;
    let words = whole(log).map_err(Error::io(&program))?;
    if status.success() {
        return Ok(words.trim_end().to_owned());
    }
    Err(Error::Failed {
        program: program.to_string_lossy().into_owned(),
        words: words.trim_end().to_owned(),
    })
}

/// What was written into a file that has no name.
fn whole(mut file: File) -> io::Result<String> {
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// A process stops at once, unless it waits for a disk.
const STOP_TIME: Duration = Duration::from_secs(60);

/// A process that ends with its handle, and with this process, however that ends.
///
/// A shell is its parent: it says the process's id, waits for its end, and kills it at the end of its own input, which is the
/// end of this process or of the handle.
#[derive(Debug)]
pub struct Kept {
    keeper: Child,
    pid: Pid,
    program: String,
}

/// `$1`: where the output goes; the rest is the command. A process that has ended by itself must not be killed late, when
/// its id may be another's: its watcher ends first.
const KEEP: &str = r#"
log=$1
shift
exec 3<&0
"$@" 3<&- </dev/null >>"$log" 2>&1 &
pid=$!
echo "$pid"
{ read -r _ <&3; kill -9 "$pid"; } >/dev/null &
watcher=$!
exec 3<&- >/dev/null
wait "$pid"
status=$?
kill "$watcher"
exit "$status"
"#;

impl Kept {
    /// Starts `command`: its program, arguments, environment and directory. What it prints is added to the file `log`. A
    /// program that cannot be executed ends at once, with status 126 or 127.
    pub fn start(command: &Command, log: &Path) -> Result<Self, Error> {
        let mut keeper = Command::new("/bin/sh");
        keeper
            .args(["-c", KEEP, "fwpush-keeper"])
            .arg(log)
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => keeper.env(name, value),
                None => keeper.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            keeper.current_dir(dir);
        }
        let mut keeper = keeper
            // Ctrl-C at a terminal is for this process alone, which ends what it started in its own order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::io("/bin/sh"))?;
        let mut line = String::new();
        if let Some(said) = keeper.stdout.take() {
            BufReader::new(said)
                .read_line(&mut line)
                .map_err(Error::io("/bin/sh"))?;
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let Some(pid) = line.trim().parse().ok().and_then(Pid::from_raw) else {
            return Err(Error::Failed {
                program,
                words: "the shell that keeps it did not start it".to_owned(),
            });
        };
        Ok(Self {
            keeper,
            pid,
            program,
        })
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// How it ended; None while it runs. A signal's number plus 128 is the status of a process that died of one.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.keeper.try_wait().map_err(Error::io(&self.program))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        // Not `Child::wait`, which closes the input and thereby kills.
        let input = self.keeper.stdin.take();
        let ended = self.keeper.wait().map_err(Error::io(&self.program));
        self.keeper.stdin = input;
        ended
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&mut self) -> Result<(), Error> {
        self.signal(Signal::TERM)
    }

    /// Stops it where it is (SIGSTOP): it holds its connections and answers nothing. Returns when it has stopped.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.signal(Signal::STOP)?;
        let start = Instant::now();
        while !self.has_stopped()? {
            if start.elapsed() > STOP_TIME {
                return Err(Error::Failed {
                    program: self.program.clone(),
                    words: format!("it has not stopped after {STOP_TIME:?}"),
                });
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Whether it is paused; fails when it has ended.
    fn has_stopped(&self) -> Result<bool, Error> {
        let path = format!("/proc/{}/stat", self.id());
        let stat = fs::read_to_string(&path).map_err(Error::io(path))?;
        // proc_pid_stat(5): the state follows the name, which stands in parentheses and may hold some.
        Ok(stat
            .rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T')))
    }

    /// Lets it go on after [`Self::pause`].
    pub fn unpause(&mut self) -> Result<(), Error> {
        self.signal(Signal::CONT)
    }

    fn signal(&mut self, signal: Signal) -> Result<(), Error> {
        if self.ended()?.is_some() {
            return Err(Error::Ended {
                program: self.program.clone(),
            });
        }
        kill_process(self.pid, signal).map_err(|error| Error::Io {
            path: (&self.program).into(),
            source: error.into(),
        })
    }

    /// Kills it (SIGKILL), also while it is paused, and waits until it is gone. Nothing happens to one that has ended.
    pub fn kill(&mut self) -> Result<(), Error> {
        drop(self.keeper.stdin.take());
        self.keeper
            .wait()
            .map(drop)
            .map_err(Error::io(&self.program))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It says nothing that could be acted on here.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// Whether there is such a process that has not ended.
    fn alive(id: i32) -> bool {
        fs::read(format!("/proc/{id}/cmdline")).is_ok_and(|command| !command.is_empty())
    }

    fn until(is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(120));
            thread::yield_now();
        }
    }

    #[test]
    fn a_process_that_ends_by_itself_says_how_and_what() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = sh("pwd; echo $GREETING; echo oh >&2; exit 7");
        command.env("GREETING", "good day").current_dir("/");
        let mut kept = Kept::start(&command, &log).unwrap();
        assert_eq!(kept.wait().unwrap().code(), Some(7));
        assert_eq!(kept.ended().unwrap().unwrap().code(), Some(7));
        assert_eq!(fs::read_to_string(&log).unwrap(), "/\ngood day\noh\n");
        assert!(matches!(kept.terminate(), Err(Error::Ended { .. })));
        kept.kill().unwrap();
        let mut missing = Kept::start(&Command::new("/does/not/exist"), &log).unwrap();
        assert_eq!(missing.wait().unwrap().code(), Some(127));
    }

    #[test]
    fn it_is_killed_with_its_handle_also_where_it_refuses_to_end_or_is_paused() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let deaf = sh("trap '' TERM; echo ready; exec sleep 1000");
        let mut kept = Kept::start(&deaf, &log).unwrap();
        until(|| fs::read(&log).is_ok_and(|said| said == b"ready\n"));
        kept.terminate().unwrap();
        kept.pause().unwrap();
        let id = kept.id();
        assert!(kept.ended().unwrap().is_none());
        assert!(alive(id));
        drop(kept);
        assert!(!alive(id));
        let mut asked = Kept::start(&sh("exec sleep 1000"), &log).unwrap();
        asked.terminate().unwrap();
        assert_eq!(asked.wait().unwrap().code(), Some(128 + 15));
    }

    /// The inner test is the process that is killed; see [`a_killed_process_leaves_nothing_running`].
    const INNER: &str = "FWPUSH_TEST_KEEPS_UNTIL_KILLED";

    #[test]
    fn a_killed_process_leaves_nothing_running() {
        if let Some(dir) = env::var_os(INNER) {
            let dir = Path::new(&dir);
            let kept = Kept::start(&sh("exec sleep 1000"), &dir.join("log")).unwrap();
            fs::write(dir.join("half"), kept.id().to_string()).unwrap();
            fs::rename(dir.join("half"), dir.join("pid")).unwrap();
            // Nobody drops the handle: the end of this process is the only sign.
            kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let this = env::current_exe().unwrap();
        let status = Command::new(this)
            .args([
                "--exact",
                "process::tests::a_killed_process_leaves_nothing_running",
            ])
            .env(INNER, dir.path())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9));
        let id = fs::read_to_string(dir.path().join("pid")).unwrap();
        let id = id.parse().unwrap();
        until(|| !alive(id));
    }
}
