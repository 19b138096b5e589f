//! Many simulated devices at once.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use fwpush_device::{Phase, SlotState};
use fwpush_keys::{DeviceId, tls};
use semver::Version;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{FleetConfig, SimError},
    device::{Device, Shared},
    faults::Faults,
    limits,
    outcome::{self, Ending},
    report::{self, Report},
    track::{ConfirmedReport, Counts, Update},
};

/// A running fleet. Dropping it kills every device; [`Fleet::stop`] ends them in order.
#[derive(Debug)]
pub struct Fleet {
    devices: Vec<Arc<Device>>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    released_at: Mutex<Option<Instant>>,
}

/// A fleet at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub devices: usize,
    /// Registered with a server now.
    pub online: usize,
    /// Of those, by the server.
    pub servers: BTreeMap<String, usize>,
    /// The longest time that any device was without a stream; see [`DeviceStatus::longest_offline`].
    pub longest_offline: Duration,
    /// By the phase of the newest update. Devices that were not told of any are not in it.
    pub phases: BTreeMap<&'static str, usize>,
    /// By the version that runs, confirmed.
    pub versions: BTreeMap<Version, usize>,
    /// Running an image on trial.
    pub on_trial: usize,
    /// Devices with reports that the server has not confirmed.
    pub unconfirmed: usize,
    pub counts: Counts,
}

impl Snapshot {
    /// Devices whose newest update is in this phase.
    pub fn in_phase(&self, phase: Phase) -> usize {
        self.phases.get(phase.as_str()).copied().unwrap_or(0)
    }

    /// Devices that run this version, confirmed.
    pub fn running(&self, version: &Version) -> usize {
        self.versions.get(version).copied().unwrap_or(0)
    }

    /// Devices that are registered with this server now.
    pub fn on_server(&self, server: &str) -> usize {
        self.servers.get(server).copied().unwrap_or(0)
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} devices online", self.online, self.devices)?;
        for (version, count) in &self.versions {
            write!(f, ", {count} on {version}")?;
        }
        if self.on_trial > 0 {
            write!(f, ", {} on trial", self.on_trial)?;
        }
        for (phase, count) in &self.phases {
            write!(f, ", {count} {phase}")?;
        }
        Ok(())
    }
}

/// One device at one moment.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    pub id: DeviceId,
    pub faults: Faults,
    pub online: bool,
    /// The server it is registered with, or was last.
    pub server: Option<String>,
    /// The longest time that it was without a stream since its first: a lost link, a reboot or a lost server, until it was
    /// registered again, or until now.
    pub longest_offline: Duration,
    /// What runs; `None` when the boot record does not say.
    pub version: Option<Version>,
    pub confirmed: bool,
    /// Oldest first, at most [`limits::UPDATES_REMEMBERED`].
    pub updates: Vec<Update>,
    /// The newest report that the server has confirmed to this device.
    pub last_confirmed: Option<ConfirmedReport>,
    /// Whether it has no report that waits for its confirmation.
    pub all_confirmed: bool,
    pub counts: Counts,
    /// The newest error, in words.
    pub trouble: Option<String>,
}

/// How far a release has come on a fleet. Each count includes the later ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub devices: u64,
    /// Were told of it.
    pub told: u64,
    /// Bytes received for it, at most the image's size of each device.
    pub bytes: u64,
    /// Sum of the image's sizes, of devices that know it.
    pub bytes_total: u64,
    /// Have the whole image, verified.
    pub verified: u64,
    /// Have booted it.
    pub booted: u64,
    /// Have ended, one way or another.
    pub ended: u64,
}

/// Who ended as expected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub as_expected: u64,
    /// In the order of their ids, with what is different.
    pub unexpected: Vec<(DeviceId, String)>,
}

impl fmt::Display for Outcomes {
    /// The first of those that did not end as expected, one a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, why) in self.unexpected.iter().take(limits::NAMED_DEVICES) {
            writeln!(f, "  {id}: {why}")?;
        }
        let more = self.unexpected.len().saturating_sub(limits::NAMED_DEVICES);
        if more > 0 {
            writeln!(f, "  and {more} more")?;
        }
        Ok(())
    }
}

/// What was waited for did not come.
#[derive(Debug, thiserror::Error)]
#[error("after {timeout:?}: {snapshot}")]
pub struct TimedOut {
    pub timeout: Duration,
    pub snapshot: Box<Snapshot>,
}

impl Fleet {
    /// Starts every device, at most [`FleetConfig::starting_at_once`] at a time. Call it inside a tokio runtime; see
    /// [`crate::raise_open_files`] for large fleets.
    pub fn start(config: FleetConfig) -> Result<Self, SimError> {
        check(&config)?;
        let node_ca = tls::certificates_from_pem(&config.pki.node_ca_pem)
            .map_err(|source| SimError::NodeCa { source })?;
        let ids: Vec<_> = config.pki.devices.iter().map(|device| &device.id).collect();
        let faults = config.faults.assign(config.seed, &ids)?;
        let shared = Arc::new(Shared {
            starting: Arc::new(Semaphore::new(config.starting_at_once)),
            changed: watch::Sender::new(()),
            node_ca,
            config,
        });
        let identities = shared.config.pki.devices.iter().zip(faults);
        let mut devices = identities
            .map(|(identity, faults)| Ok(Arc::new(Device::new(&shared, identity, faults)?)))
            .collect::<Result<Vec<_>, SimError>>()?;
        devices.sort_by(|a, b| a.id.cmp(&b.id));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for device in &devices {
            tasks.spawn(device.clone().run(stop.clone()));
        }
        Ok(Self {
            devices,
            shared,
            stop,
            tasks,
            released_at: Mutex::new(None),
        })
    }

    /// Where its devices may connect, `host:port` each.
    pub fn servers(&self) -> &[String] {
        &self.shared.config.servers
    }

    /// The fleet as it is now.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            devices: self.devices.len(),
            ..Snapshot::default()
        };
        let now = Instant::now();
        for device in &self.devices {
            let (_, record) = device.board.running();
            match record.image {
                Some(image) if record.state == SlotState::Confirmed => {
                    *snapshot.versions.entry(image.version).or_default() += 1;
                }
                _ => snapshot.on_trial += 1,
            }
            snapshot.counts += device.counts();
            let track = device.track();
            snapshot.online += usize::from(track.online);
            if let Some(server) = track.server.as_ref().filter(|_| track.online) {
                // Most devices find the name there.
                match snapshot.servers.get_mut(server) {
                    Some(count) => *count += 1,
                    None => drop(snapshot.servers.insert(server.clone(), 1)),
                }
            }
            let offline = track.longest_offline(now);
            snapshot.longest_offline = snapshot.longest_offline.max(offline);
            snapshot.unconfirmed += usize::from(!track.all_confirmed());
            if let Some(phase) = track.updates.back().and_then(|update| update.phase) {
                *snapshot.phases.entry(phase.as_str()).or_default() += 1;
            }
        }
        snapshot
    }

    /// Every device, by id.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        self.devices.iter().map(|device| status(device)).collect()
    }

    /// One device; `None` if it is not of this fleet.
    pub fn device(&self, id: &DeviceId) -> Option<DeviceStatus> {
        self.find(id).map(|device| status(device))
    }

    /// How far a release has come.
    pub fn progress(&self, release: &Version) -> Progress {
        let mut progress = Progress {
            devices: self.devices.len() as u64,
            ..Progress::default()
        };
        for device in &self.devices {
            let track = device.track();
            let Some(update) = track.newest_to(release) else {
                continue;
            };
            let ended = update.phase.is_some_and(Phase::is_terminal);
            let stage = update.phase.map_or(0, stage);
            progress.told += 1;
            progress.bytes_total += update.size;
            // Nothing more will come once it has ended.
            progress.bytes += if ended || stage >= 1 {
                update.size
            } else {
                update.bytes.min(update.size)
            };
            progress.verified += u64::from(ended || stage >= 1);
            progress.booted += u64::from(ended || stage >= 2);
            progress.ended += u64::from(ended);
        }
        progress
    }

    /// Waits until the fleet is as wanted. Looks after every change, but no more often than [`limits::LOOK_INTERVAL`] and
    /// [`limits::LOOK_SHARE`] allow.
    pub async fn wait_until(
        &self,
        mut wanted: impl FnMut(&Snapshot) -> bool,
        timeout: Duration,
    ) -> Result<Snapshot, TimedOut> {
        let deadline = tokio::time::sleep(timeout);
        tokio::pin!(deadline);
        let mut changed = self.shared.changed.subscribe();
        loop {
            let looking_since = Instant::now();
            let snapshot = self.snapshot();
            if wanted(&snapshot) {
                return Ok(snapshot);
            }
            let rest = limits::LOOK_INTERVAL.max(looking_since.elapsed() * limits::LOOK_SHARE);
            let next_look = async {
                tokio::time::sleep(rest).await;
                // Not every byte that arrives is announced as a change.
                let _ = tokio::time::timeout(limits::LOOK_AT_LEAST, changed.changed()).await;
            };
            tokio::select! {
                () = next_look => {}
                () = &mut deadline => {
                    return Err(TimedOut { timeout, snapshot: Box::new(self.snapshot()) });
                }
            }
        }
    }

    /// Waits until every device has ended `release` as its faults make it, or until `timeout`; says who has not.
    pub async fn wait_for(&self, release: &Version, timeout: Duration) -> Outcomes {
        // The cheap look first: hashing every slot again and again would be the simulation's main work.
        let ended = |_: &Snapshot| {
            self.devices
                .iter()
                .all(|device| self.judge(device, release, Slot::Believed).is_ok())
        };
        // Whether it came in time shows in the outcomes.
        let _ = self.wait_until(ended, timeout).await;
        self.outcomes(release).await
    }

    /// Who has ended `release` as expected by now. Hashes every running slot.
    pub async fn outcomes(&self, release: &Version) -> Outcomes {
        let mut outcomes = Outcomes::default();
        for device in &self.devices {
            match self.judge(device, release, Slot::Hashed) {
                Ok(()) => outcomes.as_expected += 1,
                Err(why) => outcomes.unexpected.push((device.id.clone(), why)),
            }
            // A slot takes milliseconds to hash; others want to run too.
            tokio::task::yield_now().await;
        }
        outcomes
    }

    /// How each device must end a release.
    pub fn expected(&self, release: &Version) -> BTreeMap<DeviceId, Ending> {
        let ending = |device: &Arc<Device>| Ending::of(device.faults, device.is_bad(release));
        self.devices
            .iter()
            .map(|device| (device.id.clone(), ending(device)))
            .collect()
    }

    /// Says when the release was made of which [`Fleet::report`] tells the latencies.
    pub fn mark_release_start(&self, at: Instant) {
        *self
            .released_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// The figures of a release.
    pub fn report(&self, release: &Version) -> Report {
        let released_at = *self
            .released_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let tracks: Vec<_> = self.devices.iter().map(|device| device.track()).collect();
        report::report(release, released_at, tracks.iter().map(|track| &**track))
    }

    /// Cuts a device's power, or gives it back: the agent is gone at once, and the device boots when power returns.
    /// Returns false if it is not of this fleet.
    pub fn set_power(&self, id: &DeviceId, on: bool) -> bool {
        let Some(device) = self.find(id) else {
            return false;
        };
        device.power.send_replace(on);
        true
    }

    /// Ends every agent and waits for it, at most [`limits::STOP_TIME`].
    pub async fn stop(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a simulated device ended badly");
            }
        }
    }

    fn find(&self, id: &DeviceId) -> Option<&Arc<Device>> {
        let at = self
            .devices
            .binary_search_by(|device| device.id.cmp(id))
            .ok()?;
        self.devices.get(at)
    }

    fn judge(&self, device: &Device, release: &Version, slot: Slot) -> Result<(), String> {
        let (_, record) = device.board.running();
        let running = outcome::Running {
            intact: match slot {
                Slot::Hashed => device.board.running_is_intact(),
                Slot::Believed => Some(true),
            },
            version: record.image.map(|image| image.version),
            state: record.state,
        };
        let expected = Ending::of(device.faults, device.is_bad(release));
        outcome::judge(expected, release, &device.track(), &running)
    }
}

/// Whether a slot's bytes are looked at.
#[derive(Clone, Copy)]
enum Slot {
    Hashed,
    Believed,
}

/// 1 from the verified image on, 2 from its first boot on.
fn stage(phase: Phase) -> u8 {
    match phase {
        Phase::Accepted | Phase::Deferred | Phase::Downloading => 0,
        Phase::Verified | Phase::Installing | Phase::Rebooting => 1,
        Phase::Confirming | Phase::Succeeded | Phase::RolledBack => 2,
        Phase::Failed | Phase::Rejected | Phase::Cancelled => 0,
    }
}

fn status(device: &Device) -> DeviceStatus {
    let (_, record) = device.board.running();
    let counts = device.counts();
    let track = device.track();
    DeviceStatus {
        id: device.id.clone(),
        faults: device.faults,
        online: track.online,
        server: track.server.clone(),
        longest_offline: track.longest_offline(Instant::now()),
        version: record.image.map(|image| image.version),
        confirmed: record.state == SlotState::Confirmed,
        updates: track.updates.iter().cloned().collect(),
        last_confirmed: track.confirmed.clone(),
        all_confirmed: track.all_confirmed(),
        counts,
        trouble: track.trouble.clone(),
    }
}

fn check(config: &FleetConfig) -> Result<(), SimError> {
    if config.servers.is_empty() {
        return Err(SimError::NoServer);
    }
    let devices = &config.pki.devices;
    if !(1..=limits::DEVICES).contains(&devices.len()) {
        return Err(SimError::FleetSize {
            devices: devices.len(),
        });
    }
    let mut seen = HashSet::new();
    if let Some(twice) = devices.iter().find(|device| !seen.insert(&device.id)) {
        return Err(SimError::Twice(twice.id.clone()));
    }
    if config
        .bandwidth
        .as_ref()
        .is_some_and(|range| range.is_empty() || *range.start() == 0)
    {
        return Err(SimError::EmptyRange {
            what: "the bandwidth",
        });
    }
    if config.delay.is_empty() {
        return Err(SimError::EmptyRange { what: "the delay" });
    }
    if config.starting_at_once == 0 {
        return Err(SimError::EmptyRange {
            what: "agents that start at once",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
