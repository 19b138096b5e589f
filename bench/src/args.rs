//! What can be typed, and its help. No logic.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use fwpush_keys::FileId;

use crate::{cores::Cores, limits};

/// Measures the fwpush server and agent against a reference in the same run.
#[derive(Debug, Parser)]
#[command(
    name = "fwpush-bench",
    version,
    max_term_width = 110,
    after_help = "\
Build it with `cargo build --release -p fwpush-bench`: figures of a debug build say nothing.
Where there are two cores or more, the server has one half of them and the clients the other.

Examples:
  fwpush-bench download                      CPU per GiB beside a reference; one verifying device
  fwpush-bench download --clients 64 --json  with 64 clients, as one JSON object
  fwpush-bench idle --streams 5000           memory of the server per connected, silent device
  fwpush-bench notice --devices 1000         how soon every device knows of a release
  fwpush-bench agent --size 256MiB           memory and flash that an update takes on a device"
)]
pub struct Cli {
    #[command(flatten)]
    pub shared: Shared,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Shared {
    /// Print one JSON object on standard output instead of a table
    #[arg(long, global = true)]
    pub json: bool,

    /// Let server and clients share all cores
    #[arg(long, global = true)]
    pub no_pin: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Download(DownloadArgs),
    Idle(IdleArgs),
    Notice(NoticeArgs),
    Agent(AgentArgs),
    #[command(flatten)]
    Hidden(Hidden),
}

/// Server CPU per GiB served, beside a minimal server with the same TLS and a prepared body; and one verifying device
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  fwpush-bench download --size 512MiB --clients 8 --rounds 3")]
pub struct DownloadArgs {
    /// Size of the image, such as 512MiB or 1GiB
    #[arg(long, default_value = "512MiB", value_parser = size)]
    pub size: u64,

    /// Clients that download at the same time and throw the bytes away
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=limits::CLIENTS))]
    pub clients: u32,

    /// Rounds; the median of them counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=limits::ROUNDS))]
    pub rounds: u32,

    /// Chunk size of both servers
    #[arg(long, default_value = "256KiB", value_parser = chunk)]
    pub chunk: u32,
}

/// Memory of the server per connected device that is silent
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  fwpush-bench idle --streams 2000")]
pub struct IdleArgs {
    /// Devices that register and then say nothing; fewer where the limit on open files is lower
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=limits::STREAMS))]
    pub streams: u32,
}

/// Time from StartRollout until connected devices have the notice
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  fwpush-bench notice --devices 1000")]
pub struct NoticeArgs {
    /// Connected devices; fewer where the limit on open files is lower
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=limits::STREAMS))]
    pub devices: u32,

    /// Rollouts, one after the other
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=limits::ROUNDS))]
    pub rounds: u32,
}

/// Memory that the agent takes during an update with default settings, and what it writes
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  fwpush-bench agent --size 256MiB --agent target/release/fwpush-device")]
pub struct AgentArgs {
    /// Size of the image
    #[arg(long, default_value = "256MiB", value_parser = size)]
    pub size: u64,

    /// The program to measure [default: fwpush-device beside this program]
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
}

/// The servers: started by this program, not by a person.
#[derive(Debug, Subcommand)]
pub enum Hidden {
    #[command(hide = true)]
    ServeFwpush {
        #[arg(long)]
        config: PathBuf,
        #[arg(long, value_delimiter = ',')]
        cores: Vec<usize>,
    },
    #[command(hide = true)]
    ServeReference {
        #[arg(long)]
        config: PathBuf,
        #[arg(long)]
        file: FileId,
        #[arg(long)]
        chunk_bytes: usize,
        #[arg(long, value_delimiter = ',')]
        cores: Vec<usize>,
    },
}

impl Hidden {
    /// Where the parent wants the server to run.
    pub fn cores(&self) -> Cores {
        let (Self::ServeFwpush { cores, .. } | Self::ServeReference { cores, .. }) = self;
        Cores {
            server: cores.clone(),
            clients: Vec::new(),
        }
    }
}

/// `512MiB`, `64KiB`, `1GiB` or a number of bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        unit => return Err(format!("unknown unit {unit:?}; use KiB, MiB or GiB")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 512MiB"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("{text} is too large"))
}

fn size(text: &str) -> Result<u64, String> {
    let size = bytes(text)?;
    if (1..=limits::IMAGE_BYTES).contains(&size) {
        return Ok(size);
    }
    Err(format!(
        "an image here has 1 byte to {} GiB",
        limits::IMAGE_BYTES >> 30
    ))
}

fn chunk(text: &str) -> Result<u32, String> {
    let bytes = bytes(text)?;
    let allowed = 16 << 10..=1 << 20;
    u32::try_from(bytes)
        .ok()
        .filter(|size| allowed.contains(size))
        .ok_or("a chunk has 16KiB to 1MiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_with_their_unit_and_bounded() {
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("7"), Ok(7));
        assert_eq!(chunk("1MiB"), Ok(1 << 20));
        for wrong in ["", "MiB", "1MB", "0", "-1", "99999999999GiB", "1.5GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert!(chunk("2MiB").is_err());
    }
}
