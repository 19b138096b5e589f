//! The servers as processes of their own, and the pipe on which the parent asks them what they have used.
//!
//! The child says `ready <devices> [<operators>]` once it listens, then answers each line `cpu` with the nanoseconds of
//! processor time it has used in all, user and system. It ends when its standard input does: also when the parent was
//! killed, it does not stay behind.

use std::{
    io::{BufRead as _, Write as _},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use fwpush_keys::{FileId, error_text};
use fwpush_server::{Config, Server};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::{cores::Cores, figures::process_cpu, limits, reference::Reference, site::Site};

/// A server process as its parent sees it. Dropped, it is killed.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    control: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// Where devices connect.
    pub devices: SocketAddr,
    operators: Option<SocketAddr>,
}

impl ServerProcess {
    /// Starts the fwpush server of a site.
    pub async fn fwpush(site: &Site, cores: &Cores) -> Result<Self> {
        Self::start("serve-fwpush", site, cores, &[])
            .await
            .context("start the fwpush server")
    }

    /// Starts the reference server, which serves one file of the site's store and nothing else.
    pub async fn reference(
        site: &Site,
        cores: &Cores,
        file: &FileId,
        chunk_bytes: u32,
    ) -> Result<Self> {
        let more = [
            "--file",
            &file.to_string(),
            "--chunk-bytes",
            &chunk_bytes.to_string(),
        ];
        Self::start("serve-reference", site, cores, &more)
            .await
            .context("start the reference server")
    }

    async fn start(command: &str, site: &Site, cores: &Cores, more: &[&str]) -> Result<Self> {
        let mut program = Command::new(std::env::current_exe().context("find this program")?);
        program
            .arg(command)
            .arg("--config")
            .arg(site.config())
            .args(more);
        if !cores.server.is_empty() {
            let list: Vec<String> = cores.server.iter().map(usize::to_string).collect();
            program.arg("--cores").arg(list.join(","));
        }
        program
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = program.spawn().context("start a process")?;
        let control = child.stdin.take().context("a process without its pipe")?;
        let output = child.stdout.take().context("a process without its pipe")?;
        let mut answers = BufReader::new(output).lines();
        let ready = answer(&mut answers, limits::START_TIME).await?;
        let mut words = ready.split(' ');
        if words.next() != Some("ready") {
            bail!("the process said {ready:?} where it should have said that it is ready");
        }
        let devices = words.next().context("no address")?.parse()?;
        let operators = words.next().map(str::parse).transpose()?;
        Ok(Self {
            child,
            control,
            answers,
            devices,
            operators,
        })
    }

    /// Where operators connect; the reference has no such place.
    pub fn operators(&self) -> Result<SocketAddr> {
        self.operators
            .context("this server has no listener for operators")
    }

    /// Processor time that the process has used since it started, of all its threads, user and system.
    pub async fn cpu(&mut self) -> Result<Duration> {
        self.control
            .write_all(b"cpu\n")
            .await
            .context("ask the server process")?;
        let nanoseconds = answer(&mut self.answers, limits::CONTROL_TIME).await?;
        Ok(Duration::from_nanos(nanoseconds.parse()?))
    }

    /// Memory of the process that is resident now, bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let pid = self.child.id().context("the server process has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .context("look at the server process")?;
        bytes_of("VmRSS:", &status).context("no VmRSS in the status of the server process")
    }

    /// Lets the process end, and waits until it has.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.control);
        let status = timeout(limits::CONTROL_TIME, self.child.wait())
            .await
            .context("the server does not end")??;
        if !status.success() {
            bail!("the server process ended with {status}");
        }
        Ok(())
    }
}

async fn answer(answers: &mut Lines<BufReader<ChildStdout>>, limit: Duration) -> Result<String> {
    let line = timeout(limit, answers.next_line())
        .await
        .context("the server process does not answer")??;
    line.context("the server process has ended; its last words are above")
}

/// A field of `/proc/<pid>/status` that is in KiB (proc_pid_status(5)), such as `VmRSS:`, in bytes.
pub fn bytes_of(field: &str, status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

// ---- In the child ----

/// Runs the fwpush server until the parent lets go.
pub async fn serve_fwpush(config: &Path) -> Result<()> {
    let running = Server::start(Config::load(config)?)
        .await
        .map_err(|error| anyhow::anyhow!(error_text(&error)))?;
    let addresses = running.addresses();
    control(&format!(
        "ready {} {}",
        addresses.devices, addresses.operators
    ))
    .await
}

/// Runs the reference server until the parent lets go.
pub async fn serve_reference(config: &Path, file: FileId, chunk_bytes: usize) -> Result<()> {
    let reference = Reference::open(&Config::load(config)?, &file, chunk_bytes)?;
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .context("listen")?;
    let address = socket.local_addr()?;
    let serving = tokio::spawn(reference.serve(socket));
    let result = control(&format!("ready {address}")).await;
    serving.abort();
    result
}

/// Says that the server is ready, then answers until standard input ends.
async fn control(ready: &str) -> Result<()> {
    println!("{ready}");
    // A thread of its own: it waits for the parent nearly all of the time.
    tokio::task::spawn_blocking(|| {
        for line in std::io::stdin().lock().lines() {
            match line?.as_str() {
                "cpu" => {
                    println!("{}", process_cpu().as_nanos());
                    std::io::stdout().flush()?;
                }
                unknown => bail!("unknown request {unknown:?}"),
            }
        }
        Ok(())
    })
    .await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t   9000 kB\nVmRSS:\t    8192 kB\nThreads:\t3\n";
        assert_eq!(bytes_of("VmRSS:", status), Some(8 << 20));
        assert_eq!(bytes_of("VmRSS:", "Name:\tx\n"), None);
    }
}
