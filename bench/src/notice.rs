//! How long after StartRollout connected devices have the notice.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fwpush_keys::{RolloutId, Timestamp};
use fwpush_proto::v1::{Action, server_message::Kind};
use serde::Serialize;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant as Deadline, timeout_at},
};

use crate::{
    args::NoticeArgs,
    child::ServerProcess,
    cores::Cores,
    figures::{Percentiles, Report, Table, notes},
    image::Image,
    limits,
    operator::Operator,
    progress::Progress,
    raw::Registered,
    site::Site,
};

/// A small image: nobody downloads it.
const IMAGE_BYTES: u64 = 100_000;

/// One rollout.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    /// From the call of StartRollout until the notice was at a device, milliseconds.
    pub notice_ms: Percentiles,
    /// Until StartRollout was answered, milliseconds.
    pub answered_ms: f64,
    /// Processor time of the server, milliseconds.
    pub server_cpu_ms: f64,
}

/// The result.
#[derive(Debug, Serialize)]
pub struct Notice {
    benchmark: &'static str,
    devices: u32,
    /// What the limit on open files allowed instead of what was asked for.
    devices_asked: u32,
    cores: String,
    optimized: bool,
    rounds: Vec<Round>,
}

/// A device has a notice.
type Heard = (String, Instant);

/// Sets everything up, measures, and cleans up.
pub async fn run(args: &NoticeArgs, cores: Cores) -> Result<Notice> {
    let progress = Progress::new();
    let count = limits::within_open_files(args.devices)?;
    ensure!(
        count > 0,
        "the limit on open files (ulimit -n) leaves no room for a device"
    );
    let site = Site::make()?;
    progress.step("starting the server");
    let mut fwpush = ServerProcess::fwpush(&site, &cores).await?;
    let operator = Operator::connect(&site, fwpush.operators()?).await?;
    let image = Image::random(IMAGE_BYTES)?;
    operator.upload(&image).await?;
    progress.step("adding devices");
    let devices = operator.add_devices(&site, "device", count).await?;
    progress.step("connecting devices");
    let connected = Registered::connect_all(fwpush.devices, &site, &devices).await?;
    let (heard, mut notices) = mpsc::channel(connected.len());
    let mut listeners = JoinSet::new();
    for device in connected {
        listeners.spawn(listen(device, heard.clone()));
    }
    drop(heard);

    let mut rounds = Vec::new();
    for number in 1..=args.rounds {
        progress.step(&format!("rollout {number} of {}", args.rounds));
        let release = operator.publish(&site, &image, u64::from(number)).await?;
        let rollout = RolloutId::new_v7(Timestamp::now());
        let used = fwpush.cpu().await?;
        let started = Instant::now();
        let collecting = collect(&mut notices, rollout.to_string(), started, count);
        let answering = async {
            operator.start_rollout(rollout, release, &[]).await?;
            anyhow::Ok(started.elapsed())
        };
        let (mut latencies, answered) = tokio::try_join!(collecting, answering)?;
        let server_cpu_ms = fwpush.cpu().await?.saturating_sub(used).as_secs_f64() * 1e3;
        let notice_ms = Percentiles::of(&mut latencies).context("no device")?;
        rounds.push(Round {
            notice_ms,
            answered_ms: answered.as_secs_f64() * 1e3,
            server_cpu_ms,
        });
    }
    listeners.shutdown().await;
    fwpush.stop().await?;
    Ok(Notice {
        benchmark: "notice",
        devices: count,
        devices_asked: args.devices,
        cores: cores.words(),
        optimized: cfg!(not(debug_assertions)),
        rounds,
    })
}

/// Says when an INSTALL is here, until the stream ends.
async fn listen(mut device: Registered, heard: mpsc::Sender<Heard>) {
    while let Ok((message, at)) = device.next().await {
        if let Kind::FileNotice(notice) = message
            && notice.action() == Action::Install
            && heard.send((notice.rollout_id, at)).await.is_err()
        {
            return;
        }
    }
}

/// Latencies of all devices.
async fn collect(
    notices: &mut mpsc::Receiver<Heard>,
    rollout: String,
    started: Instant,
    devices: u32,
) -> Result<Vec<Duration>> {
    let deadline = Deadline::now() + limits::NOTICE_TIME;
    let mut latencies = Vec::new();
    while latencies.len() < devices as usize {
        let heard = timeout_at(deadline, notices.recv())
            .await
            .with_context(|| {
                let (heard, limit) = (latencies.len(), limits::NOTICE_TIME.as_secs());
                format!("only {heard} of {devices} devices have the notice after {limit} s")
            })?;
        let (of, at) = heard.context("every device has lost its stream")?;
        if of == rollout {
            latencies.push(at.saturating_duration_since(started));
        }
    }
    Ok(latencies)
}

impl Report for Notice {
    fn text(&self) -> String {
        let mut table = Table::new(self.rounds.len());
        let mut line = |name, figure: fn(&Round) -> f64| {
            table.line(name, self.rounds.iter().map(figure), 1, "")
        };
        line("notice ms, p50", |round| round.notice_ms.p50);
        line("notice ms, p99", |round| round.notice_ms.p99);
        line("notice ms, last device", |round| round.notice_ms.max);
        line("StartRollout answered, ms", |round| round.answered_ms);
        line("server CPU, ms", |round| round.server_cpu_ms);
        format!(
            "{} devices, {}\n\n{}{}",
            self.devices,
            self.cores,
            table.into_text(),
            notes(self.devices, self.devices_asked),
        )
    }
}
