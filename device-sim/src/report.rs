//! The figures of one release on a fleet.

use std::time::{Duration, Instant};

use semver::Version;
use serde::Serialize;

use crate::track::{Track, Update};
use fwpush_device::Phase;

/// What became of a release, in figures. As JSON: the object that `fwpush demo --json` ends with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub devices: u64,
    /// Devices that reported SUCCEEDED.
    pub succeeded: u64,
    /// All others.
    pub failed: u64,
    /// Size of the release's image, bytes; 0 when no device has seen it.
    pub image_bytes: u64,
    /// Image and outline bytes that all devices received for it, also those that were received twice.
    pub bytes_downloaded: u64,
    /// From the release to its notice on the device. For a device that connected after the release: from its
    /// registration. Without a marked release: from the first notice that any device got.
    pub notice_ms: Percentiles,
    /// From the notice to the end of the update on the device, of those that succeeded.
    pub update_ms: Percentiles,
    /// From the release to the end of the last device's update.
    pub seconds: f64,
}

/// Of milliseconds; `None` where there was nothing to measure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

impl Percentiles {
    /// By nearest rank: each is one of the times.
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let rank = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100);
            let time = times.get(rank.checked_sub(1)?)?;
            Some(rounded(time.as_secs_f64() * 1_000.0, 10.0))
        };
        Self {
            p50: rank(50),
            p99: rank(99),
            max: rank(100),
        }
    }
}

fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

/// How the newest update to a release ended, counted from when the device first heard of the release.
fn whole_update(track: &Track, release: &Version) -> Option<Update> {
    let first = track.first_to(release)?;
    let newest = track.newest_to(release)?.clone();
    Some(Update {
        heard_at: first.heard_at,
        registered_at: first.registered_at,
        ..newest
    })
}

/// The figures of `release`. `started`: when it was released, if that is known.
pub(crate) fn report<'a>(
    release: &Version,
    started: Option<Instant>,
    tracks: impl Iterator<Item = &'a Track>,
) -> Report {
    let mut devices = 0;
    let mut bytes_downloaded = 0;
    let mut updates: Vec<Update> = Vec::new();
    for track in tracks {
        devices += 1;
        let of_release = |update: &&Update| update.version.as_ref() == Some(release);
        bytes_downloaded += track
            .updates
            .iter()
            .filter(of_release)
            .map(|update| update.bytes)
            .sum::<u64>();
        updates.extend(whole_update(track, release));
    }
    let first_heard = updates.iter().map(|update| update.heard_at).min();
    let started = started.or(first_heard);
    let notice = |update: &Update| {
        let could_hear = started.max(update.registered_at)?;
        Some(update.heard_at.saturating_duration_since(could_hear))
    };
    let succeeded = |update: &&Update| update.phase == Some(Phase::Succeeded);
    let took = |update: &Update| Some(update.ended_at?.saturating_duration_since(update.heard_at));
    let last_end = updates.iter().filter_map(|update| update.ended_at).max();
    let seconds = last_end
        .zip(started)
        .map_or(Duration::ZERO, |(end, start)| {
            end.saturating_duration_since(start)
        });
    let count = updates.iter().filter(succeeded).count() as u64;
    Report {
        devices,
        succeeded: count,
        failed: devices - count,
        image_bytes: updates.iter().map(|update| update.size).max().unwrap_or(0),
        bytes_downloaded,
        notice_ms: Percentiles::of(updates.iter().filter_map(notice).collect()),
        update_ms: Percentiles::of(updates.iter().filter(succeeded).filter_map(took).collect()),
        seconds: rounded(seconds.as_secs_f64(), 1_000.0),
    }
}

#[cfg(test)]
mod tests {
    use fwpush_device::{AgentEvent, Offer};
    use fwpush_keys::{ReleaseId, Timestamp};

    use super::*;
    use fwpush_device::{SlotId, Step};

    const VERSION: Version = Version::new(1, 1, 0);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let hundred = Percentiles::of((1..=100).rev().map(ms).collect());
        assert_eq!(
            hundred,
            Percentiles {
                p50: Some(50.0),
                p99: Some(99.0),
                max: Some(100.0)
            }
        );
        let one = Percentiles::of(vec![Duration::from_micros(1_234)]);
        assert_eq!(
            one,
            Percentiles {
                p50: Some(1.2),
                p99: Some(1.2),
                max: Some(1.2)
            }
        );
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }

    /// A device that registers, hears and ends at these milliseconds.
    fn device(zero: Instant, registered: u64, heard: u64, ended: u64, phase: Phase) -> Track {
        let mut track = Track::default();
        let registered_event = AgentEvent::Registered {
            server: "s".to_owned(),
            session_id: "1".to_owned(),
            resumed: false,
        };
        track.event(&registered_event, zero + ms(registered));
        let offer = Offer {
            step: Step::Download,
            generation: 1,
            release_id: ReleaseId::from_parts(Timestamp::EPOCH, [0; 10]),
            version: VERSION,
            size: 1_000,
            rollback: false,
            slot: SlotId::B,
            asked: 0,
        };
        track.offered(&offer, zero + ms(heard));
        track.event(&AgentEvent::Bytes(1_100), zero + ms(heard));
        let end = AgentEvent::Phase {
            generation: 1,
            phase,
            failure: None,
        };
        track.event(&end, zero + ms(ended));
        track
    }

    #[test]
    fn latencies_count_from_the_release_or_from_connecting_later() {
        let zero = Instant::now();
        let tracks = [
            device(zero, 0, 1_010, 2_010, Phase::Succeeded),
            device(zero, 5_000, 5_040, 7_040, Phase::Succeeded),
            device(zero, 0, 1_020, 1_025, Phase::Rejected),
            Track::default(),
        ];
        let report = report(&VERSION, Some(zero + ms(1_000)), tracks.iter());
        assert_eq!((report.devices, report.succeeded, report.failed), (4, 2, 2));
        assert_eq!(
            (report.image_bytes, report.bytes_downloaded),
            (1_000, 3_300)
        );
        assert_eq!(
            report.notice_ms,
            Percentiles {
                p50: Some(20.0),
                p99: Some(40.0),
                max: Some(40.0)
            }
        );
        assert_eq!(
            report.update_ms,
            Percentiles {
                p50: Some(1_000.0),
                p99: Some(2_000.0),
                max: Some(2_000.0)
            }
        );
        assert_eq!(report.seconds, 6.04);
    }

    #[test]
    fn without_a_marked_release_the_first_notice_counts() {
        let zero = Instant::now();
        let tracks = [
            device(zero, 0, 100, 200, Phase::Succeeded),
            device(zero, 0, 130, 300, Phase::Succeeded),
        ];
        let report = report(&VERSION, None, tracks.iter());
        assert_eq!(report.notice_ms.max, Some(30.0));
        assert_eq!(report.seconds, 0.2);
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let report = report(&VERSION, None, std::iter::empty());
        let json = serde_json::to_value(report).unwrap();
        let mut keys: Vec<_> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let mut documented = [
            "devices",
            "succeeded",
            "failed",
            "image_bytes",
            "bytes_downloaded",
            "notice_ms",
            "update_ms",
            "seconds",
        ];
        documented.sort_unstable();
        assert_eq!(keys, documented);
        assert_eq!(
            json["notice_ms"],
            serde_json::json!({"p50": null, "p99": null, "max": null})
        );
    }
}
