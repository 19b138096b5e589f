//! Server CPU per GiB of fwpush and of the reference, and the rate of one verifying device; all in one run.

use std::time::Instant;

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use fwpush_keys::RolloutId;
use fwpush_keys::{FileId, Timestamp};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    args::DownloadArgs,
    child::ServerProcess,
    cores::Cores,
    figures::{Report, Table, gib, median},
    image::Image,
    limits,
    operator::Operator,
    progress::Progress,
    pull::{self, Pulled},
    raw::RawClient,
    site::Site,
    slots::MemorySlots,
};

/// fwpush may need this many times the reference's processor time.
const RATIO_GOAL: f64 = 1.3;

/// One device on loopback.
const RATE_GOAL_GIB_PER_S: f64 = 1.0;

/// What one server needed in one round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Served {
    pub server_cpu_s_per_gib: f64,
    /// Of all clients together.
    pub gib_per_s: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    pub fwpush: Served,
    pub reference: Served,
    /// Processor time of fwpush's server by that of the reference.
    pub ratio: f64,
    pub device: Pulled,
}

/// The result.
#[derive(Debug, Serialize)]
pub struct Download {
    benchmark: &'static str,
    size_bytes: u64,
    chunk_bytes: u32,
    clients: u32,
    cores: String,
    optimized: bool,
    rounds: Vec<Round>,
    fwpush_cpu_s_per_gib: f64,
    reference_cpu_s_per_gib: f64,
    ratio: f64,
    ratio_goal: f64,
    device_gib_per_s: f64,
    device_goal_gib_per_s: f64,
}

/// Sets everything up, measures, and cleans up.
pub async fn run(args: &DownloadArgs, cores: Cores) -> Result<Download> {
    let progress = Progress::new();
    progress.step("making the image");
    let site = Site::make()?;
    let image = tokio::task::spawn_blocking({
        let size = args.size;
        move || Image::random(size)
    })
    .await??;
    progress.step("starting the server");
    let mut fwpush = ServerProcess::fwpush(&site, &cores).await?;
    let operator = Operator::connect(&site, fwpush.operators()?).await?;
    progress.step("uploading the image");
    operator.upload(&image).await?;
    let release = operator.publish(&site, &image, 1).await?;
    let downloaders = operator
        .add_devices(&site, "download", args.clients)
        .await?;
    let devices = operator.add_devices(&site, "device", args.rounds).await?;
    let ids: Vec<_> = devices.iter().map(|(id, _)| id.clone()).collect();
    operator
        .start_rollout(RolloutId::new_v7(Timestamp::now()), release, &ids)
        .await?;
    let mut reference = ServerProcess::reference(&site, &cores, &image.id, args.chunk).await?;

    let mut parts = Parts {
        args,
        file: image.id,
        of_fwpush: RawClient::connect_all(fwpush.devices, &site, &downloaders).await?,
        of_reference: RawClient::connect_all(reference.devices, &site, &downloaders).await?,
    };
    progress.step("warming up");
    parts.warm_up().await?;
    let capacity = usize::try_from(args.size).context("the image does not fit into memory")?;
    let mut slots = MemorySlots::new(capacity);
    let mut rounds = Vec::new();
    for (number, device) in (1..=args.rounds).zip(&devices) {
        progress.step(&format!("round {number} of {}", args.rounds));
        // Who begins changes, so that a machine that grows slower treats both alike.
        let (of_fwpush, of_reference) = if number % 2 == 1 {
            let first = parts.serve_fwpush(&mut fwpush).await?;
            (first, parts.serve_reference(&mut reference).await?)
        } else {
            let first = parts.serve_reference(&mut reference).await?;
            (parts.serve_fwpush(&mut fwpush).await?, first)
        };
        let pulled;
        (pulled, slots) = pull::pull(&site, fwpush.devices, device, args.size, slots).await?;
        slots = slots.reset();
        rounds.push(Round {
            fwpush: of_fwpush,
            reference: of_reference,
            ratio: of_fwpush.server_cpu_s_per_gib / of_reference.server_cpu_s_per_gib,
            device: pulled,
        });
    }
    drop(parts);
    fwpush.stop().await?;
    reference.stop().await?;
    Ok(Download::new(args, &cores, rounds))
}

/// The clients, connected to both servers.
struct Parts<'a> {
    args: &'a DownloadArgs,
    file: FileId,
    of_fwpush: Vec<RawClient>,
    of_reference: Vec<RawClient>,
}

impl Parts<'_> {
    /// One download from each: page cache, mappings and allocators are then as they stay.
    async fn warm_up(&mut self) -> Result<()> {
        for clients in [&mut self.of_fwpush, &mut self.of_reference] {
            let (file, size, chunk) = (self.file, self.args.size, self.args.chunk);
            clients[0].download(&file, size, chunk).await?;
        }
        Ok(())
    }

    async fn serve_fwpush(&mut self, server: &mut ServerProcess) -> Result<Served> {
        serve(server, &mut self.of_fwpush, self.args, &self.file)
            .await
            .context("download from fwpush")
    }

    async fn serve_reference(&mut self, server: &mut ServerProcess) -> Result<Served> {
        serve(server, &mut self.of_reference, self.args, &self.file)
            .await
            .context("download from the reference")
    }
}

/// All clients download the whole file at the same time.
async fn serve(
    server: &mut ServerProcess,
    clients: &mut [RawClient],
    args: &DownloadArgs,
    file: &FileId,
) -> Result<Served> {
    let (used, started) = (server.cpu().await?, Instant::now());
    let downloads = clients
        .iter_mut()
        .map(|client| client.download(file, args.size, args.chunk));
    let received: u64 = timeout(limits::PART_TIME, try_join_all(downloads))
        .await??
        .into_iter()
        .sum();
    let took = started.elapsed();
    let used = server.cpu().await?.saturating_sub(used);
    let gib = gib(received);
    Ok(Served {
        server_cpu_s_per_gib: used.as_secs_f64() / gib,
        gib_per_s: gib / took.as_secs_f64(),
    })
}

impl Download {
    fn new(args: &DownloadArgs, cores: &Cores, rounds: Vec<Round>) -> Self {
        let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure));
        Self {
            benchmark: "download",
            size_bytes: args.size,
            chunk_bytes: args.chunk,
            clients: args.clients,
            cores: cores.words(),
            optimized: cfg!(not(debug_assertions)),
            fwpush_cpu_s_per_gib: of(|round| round.fwpush.server_cpu_s_per_gib),
            reference_cpu_s_per_gib: of(|round| round.reference.server_cpu_s_per_gib),
            ratio: of(|round| round.ratio),
            ratio_goal: RATIO_GOAL,
            device_gib_per_s: of(|round| round.device.gib_per_s),
            device_goal_gib_per_s: RATE_GOAL_GIB_PER_S,
            rounds,
        }
    }
}

impl Report for Download {
    fn text(&self) -> String {
        let mut table = Table::new(self.rounds.len());
        let mut line = |name, figure: fn(&Round) -> f64, decimals, remark: &str| {
            table.line(name, self.rounds.iter().map(figure), decimals, remark);
        };
        line(
            "server CPU-s/GiB, fwpush",
            |round| round.fwpush.server_cpu_s_per_gib,
            3,
            "",
        );
        line(
            "server CPU-s/GiB, reference",
            |round| round.reference.server_cpu_s_per_gib,
            3,
            "",
        );
        let goal = format!(
            "goal: at most {RATIO_GOAL}, {}",
            met(self.ratio <= RATIO_GOAL)
        );
        line("ratio", |round| round.ratio, 2, &goal);
        line("GiB/s, fwpush", |round| round.fwpush.gib_per_s, 2, "");
        line("GiB/s, reference", |round| round.reference.gib_per_s, 2, "");
        let goal = format!(
            "goal: at least {RATE_GOAL_GIB_PER_S}, {}",
            met(self.device_gib_per_s >= RATE_GOAL_GIB_PER_S)
        );
        line(
            "device, verifying: GiB/s",
            |round| round.device.gib_per_s,
            2,
            &goal,
        );
        line(
            "device: CPU-s/GiB",
            |round| round.device.cpu_s_per_gib,
            3,
            "",
        );
        line(
            "device: s before first byte",
            |round| round.device.prepare_s,
            3,
            "",
        );
        line(
            "device: s to read back",
            |round| round.device.finish_s,
            3,
            "",
        );
        let debug = if self.optimized {
            ""
        } else {
            "\nThis is a debug build: its figures say nothing.\n"
        };
        format!(
            "{} MiB in chunks of {} KiB, {} clients, {}\n\n{}{debug}",
            self.size_bytes >> 20,
            self.chunk_bytes >> 10,
            self.clients,
            self.cores,
            table.into_text()
        )
    }
}

fn met(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}
