//! A child process whose output is read line by line and which never outlives its test.

use std::{
    ffi::OsStr,
    io::{self, BufRead as _, BufReader, Read, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::LONG;

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    output: Arc<Output>,
    name: String,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    more: Condvar,
}

impl Output {
    /// A test that panics while it waits for a line still prints all lines.
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Lines {
    all: Vec<String>,
    /// Readers of stdout and stderr that have come to the end.
    ended: usize,
}

/// Keeps a program from being executed; see [`Process::spawn_held`].
#[derive(Debug)]
pub struct Gate(ChildStdin);

impl Gate {
    /// Lets the program run.
    pub fn open(mut self) -> io::Result<()> {
        self.0.write_all(b"go\n")
    }
}

/// What a finished program said.
#[derive(Debug)]
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    /// Starts `program`; its stdout and stderr are collected together.
    pub fn start(program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let mut command = Command::new(program);
        command.args(args);
        Self::spawn(command)
    }

    /// Starts a prepared command.
    pub fn spawn(command: Command) -> Self {
        Self::spawn_with(command, Stdio::null())
    }

    /// Starts a prepared command whose program is not executed before the gate is opened: its process is there, and waits.
    pub fn spawn_held(command: &Command) -> (Self, Gate) {
        let mut held = Command::new("sh");
        held.args(["-c", "read -r go && exec \"$@\"", "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => held.env(name, value),
                None => held.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            held.current_dir(dir);
        }
        let mut process = Self::spawn_with(held, Stdio::piped());
        let gate = Gate(process.child.stdin.take().expect("piped"));
        (process, gate)
    }

    fn spawn_with(mut command: Command, stdin: Stdio) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {name}: {error}"));
        let output = Arc::new(Output::default());
        collect(child.stdout.take().expect("piped"), output.clone());
        collect(child.stderr.take().expect("piped"), output.clone());
        Self {
            child,
            output,
            name,
        }
    }

    /// Waits for a line that contains `words`, among those already there too, and gives it.
    pub fn line_with(&self, words: &str) -> String {
        self.line_after(0, words).1
    }

    /// Waits for a line with `words` at or after line number `from`; gives the number behind it, and the line.
    pub fn line_after(&self, from: usize, words: &str) -> (usize, String) {
        self.line_where(from, words, |line| line.contains(words))
    }

    /// Waits for a line at or after number `from` that is `wanted`, which `what` describes; gives the number behind it, and
    /// the line.
    pub fn line_where(
        &self,
        from: usize,
        what: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> (usize, String) {
        let until = Instant::now() + LONG;
        let mut lines = self.output.lock();
        loop {
            let found = lines
                .all
                .iter()
                .enumerate()
                .skip(from)
                .find(|(_, line)| wanted(line));
            if let Some((at, line)) = found {
                return (at + 1, line.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            let ended = lines.ended == 2;
            assert!(
                !ended && !left.is_zero(),
                "{}: no line with {what:?} in:\n{}",
                self.name,
                lines.all.join("\n")
            );
            lines = self
                .output
                .more
                .wait_timeout(lines, left.min(Duration::from_secs(1)))
                .unwrap()
                .0;
        }
    }

    /// Everything printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.output.lock().all.clone()
    }

    /// Everything that it printed until it ended.
    pub fn all_lines(&self) -> Vec<String> {
        let until = Instant::now() + LONG;
        let mut lines = self.output.lock();
        while lines.ended < 2 {
            assert!(
                Instant::now() < until,
                "{} keeps its output open",
                self.name
            );
            lines = self
                .output
                .more
                .wait_timeout(lines, Duration::from_secs(1))
                .unwrap()
                .0;
        }
        lines.all.clone()
    }

    /// True while it runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Memory that it holds at this moment (VmRSS), bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most memory that it has held so far (VmHWM), bytes.
    pub fn most_resident_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.expect("it runs").trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() * 1024
    }

    /// Files and sockets that it has open.
    pub fn open_files(&self) -> usize {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        files.unwrap().count()
    }

    /// Time that it has kept a processor busy so far.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // proc(5): the name may hold spaces; behind it utime and stime are fields 14 and 15 of all.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        // USER_HZ is 100 wherever Linux runs.
        Duration::from_millis(ticks * 10)
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < LONG,
                "{} does not end:\n{}",
                self.name,
                self.lines().join("\n")
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("---- {}\n{}", self.name, self.lines().join("\n"));
        }
    }
}

fn collect(from: impl Read + Send + 'static, output: Arc<Output>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            output.lock().all.push(line);
            output.more.notify_all();
        }
        output.lock().ended += 1;
        output.more.notify_all();
    });
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Finished {
    let name = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("start {name}: {error}"));
    Finished {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Finished {
    /// Panics unless it ended with exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(
            self.code, 0,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    /// The last line of stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        let text = self.stdout.trim_end();
        serde_json::from_str(text)
            .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
            .unwrap_or_else(|error| {
                panic!("{error} in:\n{}\nstderr:\n{}", self.stdout, self.stderr)
            })
    }
}
