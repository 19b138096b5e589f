//! The section `[transfer]`: how image bytes are fetched.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use fwpush_keys::{error_text, tls::certificates_from_pem};
use serde::Deserialize;

use super::owner::{Problem, check_command, check_seconds};
use crate::{
    limits,
    metered::{Metered, MeteredPolicy},
    mirrors::{MirrorHost, MirrorRoots},
    settings::TransferSettings,
};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TransferSection {
    stream_window_bytes: Option<u32>,
    connection_window_bytes: Option<u32>,
    max_frame_bytes: Option<u32>,
    chunk_bytes: Option<u32>,
    bandwidth_limit_bytes_per_s: Option<u64>,
    stall_timeout_s: Option<u64>,
    group_timeout_s: Option<u64>,
    metered_command: Option<Vec<String>>,
    metered: Option<MeteredKind>,
    metered_retry_s: Option<u64>,
    metered_limit_bytes_per_s: Option<u64>,
    #[serde(default)]
    mirror_hosts: Vec<String>,
    mirror_ca_file: Option<PathBuf>,
}

/// What is done on a metered link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum MeteredKind {
    #[default]
    Defer,
    Limit,
}

impl TransferSection {
    /// The settings, checked. `dir`: where relative paths begin; `mirror_ca_file` is read.
    pub(super) fn settings(&self, dir: &Path) -> Result<TransferSettings, Problem> {
        let default = TransferSettings::default();
        let (frames, chunks) = (limits::FRAME_BYTES_RANGE, limits::CHUNK_BYTES_RANGE);
        let windows = limits::WINDOW_BYTES_MIN..=limits::WINDOW_BYTES_MAX;
        let checked = |key, value: Option<u32>, default, range: &std::ops::RangeInclusive<u32>| {
            let value = value.unwrap_or(default);
            if range.contains(&value) {
                return Ok(value);
            }
            let (least, most) = (range.start(), range.end());
            Err((key, format!("is {value}; {least} to {most} is allowed")))
        };
        let seconds = |key, value: Option<u64>, default| {
            check_seconds(key, value)?;
            Ok(value.map_or(default, Duration::from_secs))
        };
        if self.bandwidth_limit_bytes_per_s == Some(0) {
            let problem = "must be at least 1; leave it out for no limit";
            return Err(("transfer.bandwidth_limit_bytes_per_s", problem.into()));
        }
        Ok(TransferSettings {
            stream_window_bytes: checked(
                "transfer.stream_window_bytes",
                self.stream_window_bytes,
                default.stream_window_bytes,
                &windows,
            )?,
            connection_window_bytes: checked(
                "transfer.connection_window_bytes",
                self.connection_window_bytes,
                default.connection_window_bytes,
                &windows,
            )?,
            max_frame_bytes: checked(
                "transfer.max_frame_bytes",
                self.max_frame_bytes,
                default.max_frame_bytes,
                &frames,
            )?,
            chunk_bytes: checked(
                "transfer.chunk_bytes",
                self.chunk_bytes,
                default.chunk_bytes,
                &chunks,
            )?,
            retry: default.retry,
            stall: seconds(
                "transfer.stall_timeout_s",
                self.stall_timeout_s,
                default.stall,
            )?,
            group_timeout: seconds(
                "transfer.group_timeout_s",
                self.group_timeout_s,
                default.group_timeout,
            )?,
            bandwidth_limit: self.bandwidth_limit_bytes_per_s,
            metered: self.metered()?,
            mirror_hosts: self.mirror_hosts()?,
            mirror_roots: self.mirror_roots(dir)?,
        })
    }

    fn mirror_hosts(&self) -> Result<Vec<MirrorHost>, Problem> {
        const KEY: &str = "transfer.mirror_hosts";
        if self.mirror_hosts.len() > limits::MIRROR_HOSTS {
            let most = limits::MIRROR_HOSTS;
            return Err((KEY, format!("may list {most} hosts at most")));
        }
        let parse = |text: &String| {
            text.parse()
                .map_err(|error| (KEY, format!("has {text:?}; {error}")))
        };
        self.mirror_hosts.iter().map(parse).collect()
    }

    fn mirror_roots(&self, dir: &Path) -> Result<MirrorRoots, Problem> {
        let Some(path) = &self.mirror_ca_file else {
            return Ok(MirrorRoots::System);
        };
        let wrong = |problem: String| ("transfer.mirror_ca_file", problem);
        let path = dir.join(path);
        let mut pem = String::new();
        fs::File::open(&path)
            .and_then(|file| {
                file.take(limits::MIRROR_CA_FILE_BYTES)
                    .read_to_string(&mut pem)
            })
            .map_err(|error| wrong(format!("cannot be read: {}: {error}", path.display())))?;
        let certificates =
            certificates_from_pem(&pem).map_err(|error| wrong(error_text(&error)))?;
        Ok(MirrorRoots::These(certificates.into()))
    }

    fn metered(&self) -> Result<Option<Metered>, Problem> {
        check_command("transfer.metered_command", self.metered_command.as_deref())?;
        check_seconds("transfer.metered_retry_s", self.metered_retry_s)?;
        let kind = self.metered.unwrap_or_default();
        let policy = match (kind, self.metered_limit_bytes_per_s) {
            (MeteredKind::Defer, None) => MeteredPolicy::Defer(
                self.metered_retry_s
                    .map_or(limits::METERED_RETRY, Duration::from_secs),
            ),
            (MeteredKind::Limit, Some(rate @ 1..)) => MeteredPolicy::Limit(rate),
            (MeteredKind::Limit, _) => {
                let problem = "must be given, and not 0, with metered = \"limit\"";
                return Err(("transfer.metered_limit_bytes_per_s", problem.into()));
            }
            (MeteredKind::Defer, Some(_)) => {
                let problem = "is for metered = \"limit\"";
                return Err(("transfer.metered_limit_bytes_per_s", problem.into()));
            }
        };
        let argv = self.metered_command.clone();
        Ok(argv.map(|argv| Metered::new(argv, policy)))
    }
}
