//! Memory, and pages of flash, that the agent of a board takes for an update with default settings: a process of its own, from the
//! program that a board would have.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};
use fwpush_keys::{RolloutId, Timestamp};
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    args::AgentArgs,
    child::{ServerProcess, bytes_of},
    cores::Cores,
    figures::Report,
    image::Image,
    limits,
    operator::Operator,
    progress::Progress,
    site::Site,
};

/// The result.
#[derive(Debug, Serialize)]
pub struct Agent {
    benchmark: &'static str,
    /// What ran.
    agent: PathBuf,
    agent_bytes: u64,
    image_bytes: u64,
    /// Resident memory after the start, and at its highest from the start to the confirmation of the new image.
    idle_bytes: u64,
    peak_bytes: u64,
    /// Pages of files that are to be written out; 0 where temporary files lie in memory.
    written_bytes: u64,
}

/// Sets everything up, measures, and cleans up.
pub async fn run(args: &AgentArgs, cores: Cores) -> Result<Agent> {
    let agent = match &args.agent {
        Some(path) => path.clone(),
        None => beside_this_program()?,
    };
    let agent_bytes = std::fs::metadata(&agent)
        .with_context(|| {
            let path = agent.display();
            format!("look at {path}: build it with `cargo build --release -p fwpush-device`, or name another with --agent")
        })?
        .len();
    let progress = Progress::new();
    let site = Site::make()?;
    progress.step("starting the server");
    let fwpush = ServerProcess::fwpush(&site, &cores).await?;
    let operator = Operator::connect(&site, fwpush.operators()?).await?;
    progress.step("making and uploading the image");
    let image = Image::random(args.size)?;
    operator.upload(&image).await?;
    let release = operator.publish(&site, &image, 1).await?;
    let (id, certificate) = operator.add_device(&site, "agent", 0).await?;
    let config = site.device_files(&id, &certificate, fwpush.devices, args.size)?;

    progress.step("updating the device");
    let mut device = Device::start(&agent, &config)?;
    device.line_with("link.registered").await?;
    let idle_bytes = device.memory("VmRSS:")?;
    let rollout = RolloutId::new_v7(Timestamp::now());
    operator.start_rollout(rollout, release, &[id]).await?;
    device.line_with("update.succeeded").await?;
    let (peak_bytes, written_bytes) = (device.memory("VmHWM:")?, device.written()?);
    device.stop().await?;
    fwpush.stop().await?;
    Ok(Agent {
        benchmark: "agent",
        agent,
        agent_bytes,
        image_bytes: args.size,
        idle_bytes,
        peak_bytes,
        written_bytes,
    })
}

fn beside_this_program() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.with_file_name("fwpush-device"))
}

/// An agent as a process. Dropped, it is killed.
struct Device {
    child: Child,
    log: tokio::io::Lines<BufReader<tokio::process::ChildStderr>>,
}

impl Device {
    fn start(agent: &Path, config: &Path) -> Result<Self> {
        let mut command = Command::new(agent);
        command
            .arg("--config")
            .arg(config)
            .env("FWPUSH_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .with_context(|| format!("start {}", agent.display()))?;
        let log = child.stderr.take().context("a process without its pipe")?;
        Ok(Self {
            child,
            log: BufReader::new(log).lines(),
        })
    }

    /// Reads the log up to the line of an event; an update that goes wrong is an error.
    async fn line_with(&mut self, event: &str) -> Result<()> {
        let reading = async {
            while let Some(line) = self.log.next_line().await? {
                if line.contains(event) {
                    return Ok(());
                }
                let bad = ["update.failed", "update.rejected", "update.rolled-back"];
                ensure!(!bad.iter().any(|bad| line.contains(bad)), "{line}");
            }
            bail!("the agent has ended")
        };
        timeout(limits::PART_TIME, reading)
            .await
            .with_context(|| format!("the agent's log has no {event}"))?
    }

    /// A line of `/proc/<pid>/status` with an amount of memory, bytes.
    fn memory(&self, field: &str) -> Result<u64> {
        let status = self.proc("status")?;
        bytes_of(field, &status).with_context(|| format!("no {field} in its status"))
    }

    /// Pages that it has made dirty, bytes (proc_pid_io(5)).
    fn written(&self) -> Result<u64> {
        let io = self.proc("io")?;
        let field = io
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes:"));
        Ok(field.context("no write_bytes")?.trim().parse()?)
    }

    fn proc(&self, file: &str) -> Result<String> {
        let pid = self.child.id().context("the agent has ended")?;
        std::fs::read_to_string(format!("/proc/{pid}/{file}")).context("look at the agent")
    }

    async fn stop(mut self) -> Result<()> {
        self.child.kill().await.context("end the agent")
    }
}

impl Report for Agent {
    fn text(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let of_image = self.written_bytes as f64 / self.image_bytes as f64;
        format!(
            "an update to an image of {:.0} MiB, default settings, by {}\n\n\
             program                {:>8.1} MiB\n\
             memory, registered     {:>8.1} MiB\n\
             memory, peak           {:>8.1} MiB   goal: at most 16\n\
             written                {:>8.1} MiB   {of_image:.3} of the image; goal: at most 1.05\n",
            mib(self.image_bytes),
            self.agent.display(),
            mib(self.agent_bytes),
            mib(self.idle_bytes),
            mib(self.peak_bytes),
            mib(self.written_bytes),
        )
    }
}
