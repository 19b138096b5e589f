//! Programs whose every system call is seen, counted, and may be the last: they run under ptrace, with all their threads.
//!
//! A kill before a call and a kill behind it are two things only where the call does something; for a thread that is
//! alone, behind one call is before the next.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, fs, io,
    process::{Command, ExitStatus},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace,
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};

use crate::{
    process::{Gate, Process},
    wait::LONG,
};

/// Which calls count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Every system call of every thread.
    All,
    /// Those after which something outside the process is, or may be, another: files, names, what is durable, and what a peer
    /// was told.
    Effects,
}

/// The side of a call at which the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The call is never made.
    Before,
    /// It was made, and nobody hears of its result.
    Behind,
}

/// When a process is to be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KillAt {
    /// Counted from 1.
    pub call: u64,
    pub side: Side,
}

/// A system call, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub number: u64,
    /// What its first argument is, where that is a file descriptor.
    pub on: Option<String>,
}

/// What was seen of a process in its life.
#[derive(Debug, Default)]
pub struct Seen {
    /// Calls that counted.
    pub calls: u64,
    /// The call at which it was killed; `None`: it ended before.
    pub killed_at: Option<Call>,
    /// Bytes that were written to each file or block device, by its path at the time.
    pub written: BTreeMap<String, u64>,
    /// Threads that were followed, the first one included.
    pub threads: usize,
}

/// A process that is traced. Killed when it is dropped.
#[derive(Debug)]
pub struct Traced {
    process: Process,
    tracer: mpsc::Receiver<nix::Result<Seen>>,
    /// What the tracer has said.
    seen: Option<nix::Result<Seen>>,
}

impl Traced {
    /// Starts a command under ptrace; the first call that counts is the first after its `execve`.
    ///
    /// `None`, with the reason printed: this machine does not let its programs be traced.
    pub fn start(command: &Command, counted: Counted, kill: Option<KillAt>) -> Option<Self> {
        let (process, gate) = Process::spawn_held(command);
        let leader = Pid::from_raw(process.pid().as_raw_nonzero().get());
        let (attached_tx, attached) = mpsc::channel();
        let (seen_tx, tracer) = mpsc::channel();
        // All requests must come from the thread that attached.
        thread::spawn(move || {
            let attached = attach(leader);
            let goes_on = attached.is_ok();
            let _ = attached_tx.send(attached);
            if goes_on {
                let _ = seen_tx.send(Tracer::new(leader, counted, kill).follow(gate));
            }
        });
        match attached.recv().expect("the tracer says how it went") {
            Ok(()) => Some(Self {
                process,
                tracer,
                seen: None,
            }),
            Err(error @ (Errno::EPERM | Errno::ENOSYS)) => {
                println!("SKIPPED: programs cannot be traced here: {error}");
                None
            }
            Err(error) => panic!("trace {leader}: {error}"),
        }
    }

    /// The process itself. It must not be waited for but by [`Self::wait`]: whichever thread of this process waits for it
    /// hears what the tracer has to hear. The types see to that.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether it ends within this time.
    pub fn ends_within(&mut self, limit: Duration) -> bool {
        if self.seen.is_none() {
            self.seen = self.tracer.recv_timeout(limit).ok();
        }
        self.seen.is_some()
    }

    /// Waits until it ends; gives how, what it said, and what was seen.
    pub fn wait(mut self) -> (ExitStatus, Vec<String>, Seen) {
        assert!(self.ends_within(LONG), "the process does not end");
        let seen = self.seen.take().expect("it has ended");
        let seen = seen.expect("the process can be traced");
        (self.process.wait(), self.process.all_lines(), seen)
    }
}

fn attach(leader: Pid) -> nix::Result<()> {
    use ptrace::Options;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(leader, options)
}

/// The side of the tracer.
struct Tracer {
    leader: Pid,
    counted: Counted,
    kill: Option<KillAt>,
    seen: Seen,
    threads: BTreeSet<Pid>,
    /// Before the program is executed nothing counts.
    executed: bool,
    /// Numbers of the counted calls that threads are in.
    inside: HashMap<Pid, u64>,
}

impl Tracer {
    fn new(leader: Pid, counted: Counted, kill: Option<KillAt>) -> Self {
        Self {
            leader,
            counted,
            kill,
            seen: Seen::default(),
            threads: BTreeSet::from([leader]),
            executed: false,
            inside: HashMap::new(),
        }
    }

    /// To the end of the process.
    fn follow(mut self, gate: Gate) -> nix::Result<Seen> {
        gate.open().map_err(|_| Errno::EPIPE)?;
        while let Some(status) = self.next()? {
            match status {
                WaitStatus::PtraceSyscall(thread) => {
                    // It may have been killed since, and then nothing can be asked.
                    let seen = self.on_syscall_stop(thread);
                    alive(seen.and_then(|()| ptrace::syscall(thread, None)))?;
                }
                WaitStatus::PtraceEvent(thread, _, event) => {
                    self.executed |= event == libc::PTRACE_EVENT_EXEC;
                    self.threads.insert(thread);
                    self.go_on(thread, None)?;
                }
                WaitStatus::Stopped(thread, signal) => self.go_on(thread, Some(signal))?,
                // A thread is gone.
                _ => {}
            }
        }
        self.seen.threads = self.threads.len();
        Ok(self.seen)
    }

    /// What happens next to one of the threads. `None`: the process has ended, which whoever started it is to hear.
    fn next(&self) -> nix::Result<Option<WaitStatus>> {
        // Threads of any kind, and of this tracer: other tests of this process have children too.
        let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let look = ours | WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        let next = loop {
            match waitid(Id::All, look) {
                Err(Errno::EINTR) => {}
                next => break next?,
            }
        };
        match next {
            WaitStatus::Exited(process, _) | WaitStatus::Signaled(process, ..)
                if process == self.leader =>
            {
                Ok(None)
            }
            other => waitpid(other.pid(), Some(ours)).map(Some),
        }
    }

    fn go_on(&self, thread: Pid, signal: Option<Signal>) -> nix::Result<()> {
        alive(match self.executed {
            true => ptrace::syscall(thread, signal),
            false => ptrace::cont(thread, signal),
        })
    }

    fn on_syscall_stop(&mut self, thread: Pid) -> nix::Result<()> {
        let registers = Registers::of(thread)?;
        match ptrace::syscall_info(thread)?.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => self.on_entry(thread, &registers),
            libc::PTRACE_SYSCALL_INFO_EXIT => self.on_exit(thread, &registers),
            _ => Ok(()),
        }
    }

    fn on_entry(&mut self, thread: Pid, registers: &Registers) -> nix::Result<()> {
        let counts = match self.counted {
            Counted::All => true,
            Counted::Effects => registers.has_effect(self.leader),
        };
        if !counts {
            return Ok(());
        }
        self.seen.calls += 1;
        self.inside.insert(thread, self.seen.calls);
        self.kill_if_due(self.seen.calls, Side::Before, registers)
    }

    fn on_exit(&mut self, thread: Pid, registers: &Registers) -> nix::Result<()> {
        if let Some(bytes) = registers.bytes_written() {
            let to = descriptor(self.leader, registers.arguments[0]);
            if let Some(path) = to.filter(|path| is_stored(path)) {
                *self.seen.written.entry(path).or_default() += bytes;
            }
        }
        match self.inside.remove(&thread) {
            Some(call) => self.kill_if_due(call, Side::Behind, registers),
            None => Ok(()),
        }
    }

    fn kill_if_due(&mut self, call: u64, side: Side, registers: &Registers) -> nix::Result<()> {
        if self.kill != Some(KillAt { call, side }) {
            return Ok(());
        }
        self.seen.killed_at = Some(Call {
            number: registers.number,
            on: descriptor(self.leader, registers.arguments[0]),
        });
        // A thread that stands before a call does not make it any more.
        kill(self.leader, Signal::SIGKILL)
    }
}

/// A thread that was killed in the meantime is no failure; its end is heard of next.
fn alive(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ESRCH) => Ok(()),
        result => result,
    }
}

/// Where a descriptor leads: a path, or the like of `socket:[123]`.
fn descriptor(process: Pid, number: u64) -> Option<String> {
    let number = i32::try_from(number).ok()?;
    let link: io::Result<_> = fs::read_link(format!("/proc/{process}/fd/{number}"));
    Some(link.ok()?.to_str()?.to_owned())
}

/// Whether what is written there is kept: on a file system or a block device, but not a terminal or the like.
fn is_stored(path: &str) -> bool {
    match path.strip_prefix("/dev/") {
        Some(device) => device.starts_with("loop"),
        None => path.starts_with('/'),
    }
}

/// A thread's call.
struct Registers {
    number: u64,
    arguments: [u64; 4],
    /// At its end.
    result: i64,
}

impl Registers {
    #[cfg(target_arch = "x86_64")]
    fn of(thread: Pid) -> nix::Result<Self> {
        let all = ptrace::getregs(thread)?;
        Ok(Self {
            number: all.orig_rax,
            arguments: [all.rdi, all.rsi, all.rdx, all.r10],
            result: all.rax.cast_signed(),
        })
    }

    #[cfg(target_arch = "aarch64")]
    fn of(thread: Pid) -> nix::Result<Self> {
        let all = ptrace::getregs(thread)?;
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| all.regs[index]);
        Ok(Self {
            number: all.regs[8],
            arguments: [a, b, c, d],
            result: a.cast_signed(),
        })
    }

    /// Whether anything outside of the process may be another after it.
    fn has_effect(&self, process: Pid) -> bool {
        let number = self.number.cast_signed();
        if WRITES.contains(&number) {
            // The runtime wakes its threads and logs by writing, too.
            let to = descriptor(process, self.arguments[0]);
            return to.is_some_and(|to| is_stored(&to) || to.starts_with("socket:"));
        }
        if number == libc::SYS_openat {
            let flags = self.arguments[2].cast_signed() as i32;
            return flags & (libc::O_CREAT | libc::O_TRUNC) != 0;
        }
        EFFECTS.contains(&number)
    }

    /// Bytes that a call that has ended has written somewhere.
    fn bytes_written(&self) -> Option<u64> {
        let writes = WRITES.contains(&self.number.cast_signed());
        writes
            .then_some(self.result)
            .and_then(|result| u64::try_from(result).ok())
    }
}

/// Calls that write to their first argument and give the number of bytes.
const WRITES: &[i64] = &[
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendfile,
];

/// Other calls that change something or make it durable.
const EFFECTS: &[i64] = &[
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_copy_file_range,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_connect,
    libc::SYS_shutdown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
];

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "call {}", self.number)?;
        match &self.on {
            Some(on) => write!(f, " on {on}"),
            None => Ok(()),
        }
    }
}
