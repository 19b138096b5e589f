//! Memory of the server per device that is connected, registered and silent.

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::{
    args::IdleArgs,
    child::ServerProcess,
    cores::Cores,
    figures::{Report, notes},
    limits,
    operator::Operator,
    progress::Progress,
    raw::Registered,
    site::Site,
};

/// Devices that connect before the first look: what the server needs once is then there.
const FIRST: u32 = 50;

/// The result.
#[derive(Debug, Serialize)]
pub struct Idle {
    benchmark: &'static str,
    streams: u32,
    /// What the limit on open files allowed instead of what was asked for.
    streams_asked: u32,
    optimized: bool,
    /// Of the server process, with few devices and with all.
    resident_before_bytes: u64,
    resident_bytes: u64,
    bytes_per_stream: f64,
}

/// Sets everything up, measures, and cleans up.
pub async fn run(args: &IdleArgs, cores: Cores) -> Result<Idle> {
    let progress = Progress::new();
    let streams = limits::within_open_files(args.streams + FIRST)?.saturating_sub(FIRST);
    ensure!(
        streams > 0,
        "the limit on open files (ulimit -n) leaves no room for a stream"
    );
    let site = Site::make()?;
    progress.step("starting the server");
    let fwpush = ServerProcess::fwpush(&site, &cores).await?;
    let operator = Operator::connect(&site, fwpush.operators()?).await?;
    progress.step("adding devices");
    let first = operator.add_devices(&site, "first", FIRST).await?;
    let devices = operator.add_devices(&site, "idle", streams).await?;
    let first = Registered::connect_all(fwpush.devices, &site, &first).await?;
    let before = settled(&fwpush).await?;
    progress.step("connecting devices");
    let connected = Registered::connect_all(fwpush.devices, &site, &devices).await?;
    progress.step("waiting until memory settles");
    let after = settled(&fwpush).await?;
    drop((first, connected));
    fwpush.stop().await?;
    Ok(Idle {
        benchmark: "idle",
        streams,
        streams_asked: args.streams,
        optimized: cfg!(not(debug_assertions)),
        resident_before_bytes: before,
        resident_bytes: after,
        bytes_per_stream: (after as f64 - before as f64) / f64::from(streams),
    })
}

/// Resident memory once it does not change any more.
async fn settled(server: &ServerProcess) -> Result<u64> {
    let mut last = server.resident_bytes()?;
    for _ in 0..limits::SETTLE_LOOKS {
        tokio::time::sleep(limits::SETTLE_INTERVAL).await;
        let now = server.resident_bytes()?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

impl Report for Idle {
    fn text(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{} registered, silent devices; {FIRST} more were there before\n\n\
             server memory before   {:>8.1} MiB\n\
             server memory          {:>8.1} MiB\n\
             per stream             {:>8.1} KiB\n{}",
            self.streams,
            mib(self.resident_before_bytes),
            mib(self.resident_bytes),
            self.bytes_per_stream / 1024.0,
            notes(self.streams, self.streams_asked),
        )
    }
}
