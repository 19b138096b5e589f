//! `device-sim`: a fleet of simulated devices on the command line.

#![forbid(unsafe_code)]

use std::{
    ops::RangeInclusive,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser;
use device_sim::{FaultShares, Fleet, FleetConfig, Outcomes, Pki, raise_open_files};
use fwpush_keys::{Channel, HwId, Product};
use indicatif::{ProgressBar, ProgressStyle};
use semver::Version;
use tokio::signal::unix::{SignalKind, signal};

/// Runs thousands of simulated devices against a real server
///
/// The devices run the real agent over TLS and gRPC; their slots are in memory. Faults strike by seed: the same seed
/// gives the same faults to the same devices. A share is from 0 to 1 of the devices.
#[derive(Debug, Parser)]
#[command(
    name = "device-sim",
    // `--version` is that of the devices.
    disable_version_flag = true,
    max_term_width = 110,
    after_help = "\
Example:
  fwpush device add sim- --count 300 --product gateway --hw board-a --out fleet
  device-sim --server localhost:7443 --pki fleet --product gateway --hw board-a --until 1.1.0 --lost-link 0.1

Each device is held to what its faults make of the release: one that refuses updates must have refused it, one whose
health check fails must have gone back to its old version, every other must run it, confirmed and byte-identical.

Memory: every device holds its own copy of the image, and of two from the second update on.

Exit codes: 0 all devices ended as expected; 1 they did not within --timeout; 2 wrong usage.
FWPUSH_LOG sets what is logged: FWPUSH_LOG=fwpush_device=info."
)]
struct Args {
    /// Server for devices; repeat for several: each device takes them in an order of its own
    #[arg(long = "server", required = true, value_name = "HOST:PORT")]
    servers: Vec<String>,

    /// Directory with the devices' certificates, as `fwpush device add --count` makes it
    #[arg(long, value_name = "DIR")]
    pki: PathBuf,

    /// Simulate the first N devices of the directory [default: all]
    #[arg(long, value_name = "N")]
    devices: Option<usize>,

    #[arg(long, value_name = "P")]
    product: Product,

    /// Hardware and revision; the revision is 1 unless given
    #[arg(long, value_name = "ID[:REV]", value_parser = hardware)]
    hw: (HwId, u32),

    /// Channel from which the devices take releases
    #[arg(long, default_value = "stable", value_name = "C")]
    channel: Channel,

    /// Version that the devices run at first
    #[arg(long, default_value = "1.0.0", value_name = "V")]
    version: Version,

    /// Seed of everything random
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,

    /// End when every device has ended this release as expected [default: run until interrupted]
    #[arg(long, value_name = "VERSION")]
    until: Option<Version>,

    /// Seconds after which --until has failed
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,

    /// Print the figures of the release as one JSON object on standard output
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    faults: FaultArgs,

    /// Bytes a second that each device receives, or a range to draw from, such as 100KiB-2MiB
    #[arg(long, value_name = "BYTES[-BYTES]", value_parser = byte_range)]
    bandwidth: Option<RangeInclusive<u64>>,

    /// Milliseconds added to all that each device receives, or a range to draw from, such as 20-200
    #[arg(long, default_value = "0", value_name = "MS[-MS]", value_parser = delay_range)]
    delay_ms: RangeInclusive<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Faults")]
struct FaultArgs {
    /// Share that loses the link during the download
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    lost_link: f64,

    /// Share that gets a corrupted group
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    corrupt_group: f64,

    /// Share that puts the update off for a moment
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    defer: f64,

    /// Share that refuses every update
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    reject: f64,

    /// Share whose health check fails on every new image
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    bad_health: f64,

    /// Share whose agent is killed during the download and started again
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    restart: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("FWPUSH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let ended = runtime
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(run(args)));
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// An error means that nothing was simulated.
async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let until = args.until.clone();
    let timeout = Duration::from_secs(args.timeout);
    let json = args.json;
    let fleet = Fleet::start(config(args)?)?;
    let interrupted = interrupt()?;
    tokio::pin!(interrupted);
    let show = show_progress(&fleet, until.as_ref());
    let waited = async {
        match &until {
            Some(release) => fleet.wait_for(release, timeout).await,
            None => std::future::pending().await,
        }
    };
    let outcomes = tokio::select! {
        outcomes = waited => Some(outcomes),
        () = &mut interrupted => None,
        () = show => None,
    };
    let (outcomes, stopped_early) = match (outcomes, &until) {
        (Some(outcomes), _) => (Some(outcomes), false),
        (None, Some(release)) => (Some(fleet.outcomes(release).await), true),
        (None, None) => (None, true),
    };
    let code = match (&until, outcomes) {
        (Some(release), Some(outcomes)) => end(&fleet, release, &outcomes, stopped_early, json)?,
        _ => {
            eprintln!("{}", fleet.snapshot());
            ExitCode::SUCCESS
        }
    };
    fleet.stop().await;
    Ok(code)
}

fn config(args: Args) -> anyhow::Result<FleetConfig> {
    let pki = Pki::load(&args.pki, args.devices)?;
    raise_open_files(pki.devices.len() as u64)?;
    let (hw_id, hw_rev) = args.hw;
    let mut config = FleetConfig::new(args.servers, pki, args.product, hw_id, args.channel);
    config.hw_rev = hw_rev;
    config.version = args.version;
    config.seed = args.seed;
    config.bandwidth = args.bandwidth;
    config.delay = args.delay_ms;
    let faults = args.faults;
    config.faults = FaultShares {
        lost_link: faults.lost_link,
        corrupt_group: faults.corrupt_group,
        defer: faults.defer,
        reject: faults.reject,
        bad_health: faults.bad_health,
        restart: faults.restart,
    };
    Ok(config)
}

/// Prints the end of a run with `--until`.
fn end(
    fleet: &Fleet,
    release: &Version,
    outcomes: &Outcomes,
    stopped_early: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let report = fleet.report(release);
    let snapshot = fleet.snapshot();
    let counts = snapshot.counts;
    let longest_offline_ms = u64::try_from(snapshot.longest_offline.as_millis())?;
    let unexpected = outcomes.unexpected.len();
    if unexpected > 0 {
        let when = if stopped_early {
            "when interrupted"
        } else {
            "in time"
        };
        eprintln!(
            "{unexpected} of {} devices have not ended {release} as expected {when}:",
            report.devices
        );
        eprint!("{outcomes}");
    }
    if json {
        let mut report = serde_json::to_value(&report).context("write the report")?;
        report["as_expected"] = outcomes.as_expected.into();
        report["longest_offline_ms"] = longest_offline_ms.into();
        report["servers"] = serde_json::json!(snapshot.servers);
        report["faults"] = serde_json::json!({
            "links_lost": counts.links_lost,
            "bytes_flipped": counts.bytes_flipped,
            "groups_refused": counts.groups_refused,
            "deferrals": counts.deferrals,
            "kills": counts.kills,
        });
        println!("{report}");
    } else {
        println!(
            "{} of {} devices ended {release} as expected; {} run it. {} bytes in {} s; notice p50 {} ms, max {} ms; update p50 {} ms, max {} ms.",
            outcomes.as_expected,
            report.devices,
            report.succeeded,
            report.bytes_downloaded,
            report.seconds,
            shown(report.notice_ms.p50),
            shown(report.notice_ms.max),
            shown(report.update_ms.p50),
            shown(report.update_ms.max),
        );
        println!("No device was without a stream for longer than {longest_offline_ms} ms.");
        println!(
            "Faults: {} links lost, {} bytes flipped and {} groups refused, {} deferrals, {} kills.",
            counts.links_lost,
            counts.bytes_flipped,
            counts.groups_refused,
            counts.deferrals,
            counts.kills,
        );
    }
    Ok(if unexpected == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

fn shown(ms: Option<f64>) -> String {
    ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string())
}

/// A line on standard error while it is a terminal. Never ends.
async fn show_progress(fleet: &Fleet, until: Option<&Version>) {
    let line = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {wide_msg}") {
        line.set_style(style);
    }
    let begun = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    loop {
        ticks.tick().await;
        if line.is_hidden() {
            std::future::pending::<()>().await;
        }
        let snapshot = fleet.snapshot();
        let rate = snapshot.counts.bytes as f64 / begun.elapsed().as_secs_f64().max(1.0);
        let done = until.map_or_else(String::new, |release| {
            let progress = fleet.progress(release);
            format!(
                ", {} of {} have ended {release}",
                progress.ended, progress.devices
            )
        });
        line.set_message(format!(
            "{snapshot}{done}, {:.1} MiB/s",
            rate / f64::from(1 << 20)
        ));
    }
}

/// SIGINT or SIGTERM.
fn interrupt() -> anyhow::Result<impl Future<Output = ()>> {
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
    })
}

fn hardware(text: &str) -> Result<(HwId, u32), String> {
    let (id, rev) = text.split_once(':').unwrap_or((text, "1"));
    let rev = rev
        .parse()
        .map_err(|_| format!("{rev:?} is no revision; write ID or ID:REV"))?;
    Ok((id.parse().map_err(|error| format!("{error}"))?, rev))
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("write a share from 0 to 1, such as 0.1".to_owned()),
    }
}

fn byte_range(text: &str) -> Result<RangeInclusive<u64>, String> {
    range(text, |text| {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match &text[digits.len()..] {
            "" => 1,
            "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            _ => return None,
        };
        digits
            .parse::<u64>()
            .ok()?
            .checked_mul(unit)
            .filter(|bytes| *bytes > 0)
    })
}

fn delay_range(text: &str) -> Result<RangeInclusive<Duration>, String> {
    range(text, |text| text.parse().ok().map(Duration::from_millis))
}

/// One value, or two with a `-` between.
fn range<T: PartialOrd + Clone>(
    text: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<RangeInclusive<T>, String> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    match (read(from), read(to)) {
        (Some(from), Some(to)) if from <= to => Ok(from..=to),
        (Some(_), Some(_)) => Err("the second value is below the first".to_owned()),
        _ => Err("write one number, or two with a `-` between".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound_and_shows_an_example() {
        Args::command().debug_assert();
        let help = Args::command().render_long_help().to_string();
        assert!(
            help.contains("Example:") && help.contains("--lost-link"),
            "{help}"
        );
    }

    #[test]
    fn ranges_are_one_value_or_two() {
        assert_eq!(byte_range("100KiB-2M"), Ok(100 << 10..=2 << 20));
        assert_eq!(byte_range("5000"), Ok(5_000..=5_000));
        assert_eq!(
            delay_range("20-200"),
            Ok(Duration::from_millis(20)..=Duration::from_millis(200))
        );
        for text in ["", "-", "2M-1M", "0", "1x", "1-2-3", "99999999999G"] {
            assert!(byte_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hardware_has_revision_1_unless_given() {
        assert_eq!(hardware("board-a").map(|hw| hw.1), Ok(1));
        assert_eq!(hardware("board-a:7").map(|hw| hw.1), Ok(7));
        for text in ["", "a:", "a:b", "a b", "a:-1"] {
            assert!(hardware(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shares_outside_0_to_1_are_wrong_usage() {
        assert_eq!(share("0.25"), Ok(0.25));
        for text in ["", "1.1", "-0.1", "NaN", "10%"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
