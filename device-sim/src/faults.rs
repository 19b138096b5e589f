//! Which device suffers what, and when: all of it follows from the seed, the device's id and the release's version.

use std::{ops::RangeInclusive, time::Duration};

use fwpush_keys::DeviceId;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use semver::Version;

use crate::limits;

/// A generator for one purpose, independent of every other: the same arguments give the same numbers.
pub fn rng(seed: u64, purpose: &str, parts: &[&str]) -> StdRng {
    StdRng::from_seed(seed_of(seed, purpose, parts))
}

/// 32 bytes for one purpose.
pub fn seed_of(seed: u64, purpose: &str, parts: &[&str]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("fwpush device-sim seed");
    hasher.update(&seed.to_le_bytes());
    for part in std::iter::once(&purpose).chain(parts) {
        // With its length, so that no two lists of parts run together to the same bytes.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Shares of a fleet, each from 0 to 1. One device may be in several. A share above 0 holds at least one device.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultShares {
    /// The link breaks during the download, 1 to [`limits::HITS_PER_FAULT`] times an update.
    pub lost_link: f64,
    /// One byte of a group is flipped on the wire, once an update. Not in images below
    /// [`limits::CORRUPTED_FRAME_MIN_BYTES`], whose frames cannot be told from other messages.
    pub corrupt_group: f64,
    /// The device puts an update off, 1 to [`limits::DEFERRALS`] times.
    pub defer: f64,
    /// The device refuses every update.
    pub reject: f64,
    /// The health check of every new image fails.
    pub bad_health: f64,
    /// The agent is killed during the download, 1 to [`limits::HITS_PER_FAULT`] times an update, and started again.
    pub restart: f64,
}

/// A share that is not one.
#[derive(Debug, thiserror::Error)]
#[error("the share of {fault} is {share}; it must be from 0 to 1")]
pub struct BadShare {
    pub fault: &'static str,
    pub share: f64,
}

/// What one device suffers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    pub lost_link: bool,
    pub corrupt_group: bool,
    pub defer: bool,
    pub reject: bool,
    pub bad_health: bool,
    pub restart: bool,
}

impl FaultShares {
    /// The faults of each device, in the order of `devices`. A device keeps its faults when the others' order changes.
    pub fn assign(&self, seed: u64, devices: &[&DeviceId]) -> Result<Vec<Faults>, BadShare> {
        let mut assigned = vec![Faults::default(); devices.len()];
        type Set = fn(&mut Faults);
        let kinds: [(&'static str, f64, Set); 6] = [
            ("lost-link", self.lost_link, |faults| {
                faults.lost_link = true
            }),
            ("corrupt-group", self.corrupt_group, |faults| {
                faults.corrupt_group = true
            }),
            ("defer", self.defer, |faults| faults.defer = true),
            ("reject", self.reject, |faults| faults.reject = true),
            ("bad-health", self.bad_health, |faults| {
                faults.bad_health = true
            }),
            ("restart", self.restart, |faults| faults.restart = true),
        ];
        for (fault, share, set) in kinds {
            if !(0.0..=1.0).contains(&share) {
                return Err(BadShare { fault, share });
            }
            // Exact shares rather than a chance per device: a small fleet has its faults too.
            let mut count = (share * devices.len() as f64).round() as usize;
            if share > 0.0 {
                count = count.max(1);
            }
            let mut drawn: Vec<_> = (0..devices.len())
                .map(|at| (seed_of(seed, fault, &[devices[at].as_str()]), at))
                .collect();
            drawn.sort_unstable();
            for (_, at) in drawn.into_iter().take(count) {
                set(&mut assigned[at]);
            }
        }
        Ok(assigned)
    }
}

/// When the faults of a device strike in one update.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdatePlan {
    /// The link breaks when this many bytes more were received; rising.
    pub breaks: Vec<u64>,
    /// A byte of the first large frame after this many bytes is flipped.
    pub flips: Vec<u64>,
    /// The agent is killed when this many bytes of image were received; rising.
    pub kills: Vec<u64>,
    /// The update is put off this often ..
    pub deferrals: u32,
    /// .. for so long each time.
    pub defer_for: Duration,
}

impl UpdatePlan {
    /// The plan for an image of `size` bytes. Everything strikes in the first 80 %, so that the download is still on.
    pub fn new(faults: Faults, seed: u64, device: &DeviceId, version: &Version, size: u64) -> Self {
        let version = version.to_string();
        let rng = |purpose| rng(seed, purpose, &[device.as_str(), &version]);
        let mut plan = Self::default();
        if faults.lost_link {
            plan.breaks = marks(&mut rng("breaks"), size, limits::HITS_PER_FAULT);
        }
        if faults.corrupt_group {
            plan.flips = marks(&mut rng("flips"), size, 1);
        }
        if faults.restart {
            plan.kills = marks(&mut rng("kills"), size, limits::HITS_PER_FAULT);
        }
        if faults.defer {
            let mut rng = rng("deferrals");
            plan.deferrals = rng.random_range(1..=limits::DEFERRALS);
            plan.defer_for = rng.random_range(limits::DEFER_MIN..=limits::DEFER_MAX);
        }
        plan
    }
}

/// 1 to `most` rising positions between 10 and 80 % of `size`; after the outline, which is 0.05 %.
fn marks(rng: &mut StdRng, size: u64, most: u32) -> Vec<u64> {
    let range = size / 10..=size / 10 * 8;
    let mut marks: Vec<_> = (0..rng.random_range(1..=most))
        .map(|_| rng.random_range(range.clone()))
        .collect();
    marks.sort_unstable();
    marks.dedup();
    marks
}

/// What a device's line is like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Line {
    /// Bytes a second that it receives; `None` for as fast as it goes.
    pub bandwidth: Option<u64>,
    /// Added to everything it receives, so the round trip grows by it.
    pub delay: Duration,
}

impl Line {
    /// A line from the given ranges, by seed and device.
    pub fn draw(
        seed: u64,
        device: &DeviceId,
        bandwidth: Option<&RangeInclusive<u64>>,
        delay: &RangeInclusive<Duration>,
    ) -> Self {
        let draw = |purpose| rng(seed, purpose, &[device.as_str()]);
        Self {
            bandwidth: bandwidth.map(|range| draw("bandwidth").random_range(range.clone()).max(1)),
            delay: draw("delay").random_range(delay.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize) -> Vec<DeviceId> {
        (1..=count)
            .map(|n| format!("dev{n:05}").parse().unwrap())
            .collect()
    }

    fn shares() -> FaultShares {
        FaultShares {
            lost_link: 0.1,
            corrupt_group: 0.25,
            defer: 0.001,
            reject: 0.0,
            bad_health: 1.0,
            restart: 0.5,
        }
    }

    fn assign(seed: u64, ids: &[DeviceId]) -> Vec<Faults> {
        shares()
            .assign(seed, &ids.iter().collect::<Vec<_>>())
            .unwrap()
    }

    #[test]
    fn shares_are_exact_and_none_is_lost_to_rounding() {
        let faults = assign(1, &ids(40));
        let count = |is: fn(&Faults) -> bool| faults.iter().filter(|faults| is(faults)).count();
        assert_eq!(count(|faults| faults.lost_link), 4);
        assert_eq!(count(|faults| faults.corrupt_group), 10);
        assert_eq!(
            count(|faults| faults.defer),
            1,
            "a share above 0 holds at least one"
        );
        assert_eq!(count(|faults| faults.reject), 0);
        assert_eq!(count(|faults| faults.bad_health), 40);
    }

    #[test]
    fn the_same_seed_gives_the_same_faults_at_the_same_moments() {
        let ids = ids(40);
        assert_eq!(assign(7, &ids), assign(7, &ids));
        assert_ne!(assign(7, &ids), assign(8, &ids));
        let mut turned = ids.clone();
        turned.reverse();
        let mut faults = assign(7, &turned);
        faults.reverse();
        assert_eq!(faults, assign(7, &ids), "whatever order they come in");

        let all = Faults {
            lost_link: true,
            corrupt_group: true,
            defer: true,
            restart: true,
            ..Faults::default()
        };
        let version = Version::new(1, 1, 0);
        let plan = |seed, id| UpdatePlan::new(all, seed, id, &version, 8 << 20);
        assert_eq!(plan(7, &ids[0]), plan(7, &ids[0]));
        assert_ne!(plan(7, &ids[0]), plan(7, &ids[1]));
        assert_ne!(plan(7, &ids[0]), plan(8, &ids[0]));
    }

    #[test]
    fn everything_strikes_while_the_download_is_on() {
        let faults = Faults {
            lost_link: true,
            corrupt_group: true,
            restart: true,
            ..Faults::default()
        };
        for id in &ids(200) {
            let plan = UpdatePlan::new(faults, 1, id, &Version::new(1, 1, 0), 1 << 20);
            for marks in [&plan.breaks, &plan.flips, &plan.kills] {
                assert!((1..=limits::HITS_PER_FAULT as usize).contains(&marks.len()));
                assert!(marks.is_sorted());
                assert!(
                    marks.iter().all(|mark| (1 << 16..1 << 20).contains(mark)),
                    "{marks:?}"
                );
            }
            assert_eq!(plan.deferrals, 0);
        }
    }

    #[test]
    fn a_share_is_from_0_to_1() {
        for share in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            let shares = FaultShares {
                reject: share,
                ..FaultShares::default()
            };
            let error = shares.assign(1, &[]).unwrap_err();
            assert!(error.to_string().contains("reject"), "{error}");
        }
    }

    #[test]
    fn lines_are_drawn_from_their_ranges() {
        let (bandwidth, delay) = (
            1_000..=2_000,
            Duration::from_millis(10)..=Duration::from_millis(20),
        );
        let lines: Vec<_> = ids(50)
            .iter()
            .map(|id| Line::draw(1, id, Some(&bandwidth), &delay))
            .collect();
        assert!(
            lines
                .iter()
                .all(|line| bandwidth.contains(&line.bandwidth.unwrap()))
        );
        assert!(lines.iter().all(|line| delay.contains(&line.delay)));
        assert!(
            lines.iter().any(|line| *line != lines[0]),
            "each device has its own"
        );
        assert_eq!(
            Line::draw(1, &ids(1)[0], None, &(Duration::ZERO..=Duration::ZERO)),
            Line::default()
        );
    }
}
