//! Benchmarks of the real server and the real agent: `fwpush-bench download | idle | notice | agent`.
//!
//! Absolute figures belong to one machine and one minute. So everything that is compared is measured in the same run, its
//! parts interleaved round by round, and the ratio is what to look at. Servers are processes of their own: this program
//! started again with a hidden command ([`child`]), so that their processor time and memory can be told from the clients'.
//!
//! Everything listens on loopback, is bounded in time ([`limits`]), and leaves nothing behind.

#![forbid(unsafe_code)]

pub mod agent;
pub mod args;
pub mod child;
pub mod cores;
pub mod download;
pub mod figures;
pub mod idle;
pub mod image;
pub mod limits;
pub mod notice;
pub mod operator;
pub mod progress;
pub mod pull;
pub mod raw;
pub mod reference;
pub mod site;
pub mod slots;

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{Cli, Command, Hidden},
    cores::Cores,
    figures::Report as _,
};

/// Runs the program; errors go to stderr. Exit code 1: a benchmark could not be run; 2: wrong usage.
///
/// A goal that is missed is a figure in the output and no failure.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to say it with when this fails.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fwpush-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let log = tracing_subscriber::EnvFilter::try_from_env("FWPUSH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(log)
        .with_writer(std::io::stderr)
        .init();
    match cli.command {
        Command::Hidden(hidden) => serve(hidden),
        Command::Download(args) => measure(cli.shared.no_pin, async |cores| {
            download::run(&args, cores).await?.print(cli.shared.json)
        }),
        Command::Idle(args) => measure(cli.shared.no_pin, async |cores| {
            idle::run(&args, cores).await?.print(cli.shared.json)
        }),
        Command::Agent(args) => measure(cli.shared.no_pin, async |cores| {
            agent::run(&args, cores).await?.print(cli.shared.json)
        }),
        Command::Notice(args) => measure(cli.shared.no_pin, async |cores| {
            notice::run(&args, cores).await?.print(cli.shared.json)
        }),
    }
}

/// Runs a benchmark on the clients' cores until it ends, is interrupted, or has had its time.
fn measure(no_pin: bool, benchmark: impl AsyncFnOnce(Cores) -> Result<()>) -> Result<()> {
    let cores = if no_pin {
        Cores::default()
    } else {
        Cores::split().context("split the cores")?
    };
    // Before the runtime makes its threads: they inherit it, and it makes one for each core it may use.
    cores.enter_clients().context("go to the clients' cores")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        tokio::select! {
            result = benchmark(cores) => result,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
            _ = terminated.recv() => Err(anyhow::anyhow!("terminated")),
            () = tokio::time::sleep(limits::RUN_TIME) => {
                Err(anyhow::anyhow!("not done after {} s; try a smaller run", limits::RUN_TIME.as_secs()))
            }
        }
    });
    // Directories and processes are gone with the benchmark; an image that is still being made is not waited for.
    runtime.shutdown_background();
    result
}

/// Runs one of the servers, in a process of its own, until the parent lets go of its standard input.
fn serve(hidden: Hidden) -> Result<()> {
    hidden
        .cores()
        .enter_server()
        .context("go to the server's cores")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(async {
        match hidden {
            Hidden::ServeFwpush { config, .. } => child::serve_fwpush(&config).await,
            Hidden::ServeReference {
                config,
                file,
                chunk_bytes,
                ..
            } => child::serve_reference(&config, file, chunk_bytes).await,
        }
    });
    // Nothing here is worth a drain: the directory is thrown away.
    runtime.shutdown_background();
    result
}
