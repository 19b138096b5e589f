//! Server CPU per GiB of fwpush and of the reference, and the rate of one verifying device; all in one run.

use std::time::Instant;

use anyhow::{Context as _, Result};
use blake3::hazmat::HasherExt as _;
use futures::future::try_join_all;
use fwpush_keys::{FileId, GROUP_BYTES, RolloutId, Timestamp};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    args::DownloadArgs,
    child::ServerProcess,
    cores::Cores,
    figures::{Report, Table, gib, median, notes, process_cpu},
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

/// A row of the table: what, from which figure, digits, goal.
type Line<'a> = (&'a str, fn(&Round) -> f64, usize, &'a str);

/// What one server needed in one round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Served {
    pub server_cpu_s_per_gib: f64,
    /// Of all clients together.
    pub gib_per_s: f64,
    /// All clients together: what it costs to receive and decrypt.
    pub client_cpu_s_per_gib: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    pub fwpush: Served,
    pub reference: Served,
    /// Processor time of fwpush's server by that of the reference.
    pub ratio: f64,
    pub device: Pulled,
    /// One client that asks as the device does and throws the bytes away: as fast as a device that does nothing could be.
    pub alone: Served,
    /// Processor time to hash a GiB in groups of 64 KiB: what verifying must cost.
    pub hash_cpu_s_per_gib: f64,
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
            alone: parts.serve_one(&mut fwpush).await?,
            hash_cpu_s_per_gib: hash_cpu_s_per_gib(),
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
        let what = self.what(self.args.chunk);
        serve(server, &mut self.of_fwpush, what)
            .await
            .context("download from fwpush")
    }

    async fn serve_one(&mut self, server: &mut ServerProcess) -> Result<Served> {
        let what = self.what(limits::DEVICE_CHUNK_BYTES);
        serve(server, &mut self.of_fwpush[..1], what)
            .await
            .context("download from fwpush alone")
    }

    async fn serve_reference(&mut self, server: &mut ServerProcess) -> Result<Served> {
        let what = self.what(self.args.chunk);
        serve(server, &mut self.of_reference, what)
            .await
            .context("download from the reference")
    }

    fn what(&self, chunk: u32) -> What {
        What {
            file: self.file,
            size: self.args.size,
            chunk,
        }
    }
}

/// A whole file, in chunks.
#[derive(Clone, Copy)]
struct What {
    file: FileId,
    size: u64,
    chunk: u32,
}

/// All clients download the whole file at the same time.
async fn serve(
    server: &mut ServerProcess,
    clients: &mut [RawClient],
    what: What,
) -> Result<Served> {
    let (used, used_here, started) = (server.cpu().await?, process_cpu(), Instant::now());
    let downloads = clients
        .iter_mut()
        .map(|client| client.download(&what.file, what.size, what.chunk));
    let received: u64 = timeout(limits::PART_TIME, try_join_all(downloads))
        .await??
        .into_iter()
        .sum();
    let (took, used_here) = (started.elapsed(), process_cpu().saturating_sub(used_here));
    let used = server.cpu().await?.saturating_sub(used);
    let gib = gib(received);
    Ok(Served {
        server_cpu_s_per_gib: used.as_secs_f64() / gib,
        gib_per_s: gib / took.as_secs_f64(),
        client_cpu_s_per_gib: used_here.as_secs_f64() / gib,
    })
}

/// Hashes the same group over and over, as a device hashes each once.
fn hash_cpu_s_per_gib() -> f64 {
    const GROUPS: u64 = 4_096;
    let group = vec![0x5a; GROUP_BYTES as usize];
    let used = process_cpu();
    for index in 0..GROUPS {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(index * GROUP_BYTES).update(&group);
        std::hint::black_box(hasher.finalize_non_root());
    }
    process_cpu().saturating_sub(used).as_secs_f64() / gib(GROUPS * GROUP_BYTES)
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
        let ratio = goal(self.ratio <= RATIO_GOAL, &format!("at most {RATIO_GOAL}"));
        let rate = goal(
            self.device_gib_per_s >= RATE_GOAL_GIB_PER_S,
            &format!("at least {RATE_GOAL_GIB_PER_S:.0}"),
        );
        let lines: [Line; 12] = [
            (
                "server CPU-s/GiB, fwpush",
                |r| r.fwpush.server_cpu_s_per_gib,
                3,
                "",
            ),
            (
                "server CPU-s/GiB, reference",
                |r| r.reference.server_cpu_s_per_gib,
                3,
                "",
            ),
            ("ratio", |r| r.ratio, 2, &ratio),
            ("GiB/s, fwpush", |r| r.fwpush.gib_per_s, 2, ""),
            ("GiB/s, reference", |r| r.reference.gib_per_s, 2, ""),
            ("device, verifying: GiB/s", |r| r.device.gib_per_s, 2, &rate),
            (
                "one client, discarding: GiB/s",
                |r| r.alone.gib_per_s,
                2,
                "what there is to reach",
            ),
            ("device: CPU-s/GiB", |r| r.device.cpu_s_per_gib, 3, ""),
            (
                "one client: CPU-s/GiB",
                |r| r.alone.client_cpu_s_per_gib,
                3,
                "receive, decrypt",
            ),
            ("hashing alone: CPU-s/GiB", |r| r.hash_cpu_s_per_gib, 3, ""),
            (
                "device: s before first byte",
                |r| r.device.prepare_s,
                3,
                "outline, search of both slots",
            ),
            (
                "device: s to read back",
                |r| r.device.finish_s,
                3,
                "after the FileAck",
            ),
        ];
        for (name, figure, decimals, remark) in lines {
            table.line(name, self.rounds.iter().map(figure), decimals, remark);
        }
        format!(
            "{} MiB in chunks of {} KiB, {} clients, {}\n\n{}{}",
            self.size_bytes >> 20,
            self.chunk_bytes >> 10,
            self.clients,
            self.cores,
            table.into_text(),
            notes(self.clients, self.clients),
        )
    }
}

fn goal(met: bool, what: &str) -> String {
    format!("goal: {what}, {}", if met { "met" } else { "MISSED" })
}
