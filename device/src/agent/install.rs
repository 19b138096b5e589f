//! An install from a bundle: the agent's work without a link, from the command to the due reboot, or to the verdict on an
//! image that is on trial already.

use std::{fmt, sync::Arc};

use fwpush_keys::{bundle::BundleError, error_text, id::ReleaseId, time::Timestamp};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::{
    Agent, AgentError, AgentEvent, Consenter, Exit, Observer, Status, memory, sleep_until,
};
use crate::{
    bundle::BundleFile,
    health::Health,
    settings::AgentSettings,
    slots::{BootView, SlotState, Slots},
    store::Store,
    update::{Failure, Input, Outcome, Phase, Stage},
};

/// What an install is made of: an agent's parts without those that reach a server.
pub struct InstallParts<S: Slots> {
    pub settings: AgentSettings,
    /// The root that is built into the device's image: a DSSE envelope.
    pub first_root: Vec<u8>,
    pub slots: S,
    pub store: Arc<dyn Store>,
    pub health: Health,
    pub consent: Consenter,
    /// Spreads load; nothing secret comes from it.
    pub rng_seed: u64,
    pub observer: Observer,
}

impl<S: Slots> fmt::Debug for InstallParts<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstallParts")
            .field("settings", &self.settings)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

/// How an install ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// The image is in the spare slot, which the next boot tries.
    RebootDue,
    /// The image runs and is confirmed.
    Succeeded,
    /// The image, which runs on trial, is bad; the next boot is the old one.
    FallingBack(Failure),
    /// The image was tried, and the old one runs again.
    RolledBack(Failure),
    /// Nothing was written to a slot.
    Refused(Failure),
    /// It was begun and cannot be ended; the spare slot is not bootable.
    Failed(Failure),
    /// The device's owner wants it later.
    PutOff { until: Timestamp, reason: Failure },
    /// The process was told to stop; the command goes on where it was.
    Stopped,
}

/// Why an install cannot begin.
#[derive(Debug, Error)]
pub enum InstallError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("{0}")]
    Refused(Failure),
}

/// One install from a bundle, in the place of the agent.
pub struct Install<S: Slots> {
    agent: Agent<S>,
    bundle: BundleFile,
    release: Option<ReleaseId>,
    /// How an update ended that was under way when the last process did.
    found: Option<Outcome>,
}

impl<S: Slots> fmt::Debug for Install<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Install")
            .field("release", &self.release)
            .finish_non_exhaustive()
    }
}

impl<S: Slots> Install<S> {
    /// Reads the state, the trust documents and the boot record. Blocks on storage.
    ///
    /// Refused while an image is on trial that this install cannot judge: another one than the bundle's, or without a health
    /// check, as there is no server here whose answer would do.
    pub fn new(mut parts: InstallParts<S>, bundle: BundleFile) -> Result<Self, InstallError> {
        let release = bundle.claimed_release();
        let view = parts.slots.view().map_err(AgentError::from)?;
        if let Some(refusal) = trial_in_the_way(&view, release, &parts.health) {
            return Err(InstallError::Refused(refusal));
        }
        // Not for an agent that is on its way out again.
        parts.settings.attributes_dir = None;
        let (mut agent, found) = memory::open_local(parts)?;
        agent.bundle = Some(bundle.clone());
        Ok(Self {
            agent,
            bundle,
            release,
            found,
        })
    }

    /// Runs until a reboot is due, or the install has ended. To be called once. When the future is dropped, or the process
    /// killed, the same command goes on where it was.
    pub async fn run(&mut self, stop: CancellationToken) -> Result<Installed, AgentError> {
        if !self.agent.keep_state(&stop).await? {
            return Ok(Installed::Stopped);
        }
        if let Some(update) = &self.agent.updater.state().update
            && update.stage.is_past_mark()
        {
            if update.image.release_id != self.release {
                let version = &update.image.version;
                let words = format!(
                    "{version} is to be tried with the next boot: reboot, and repeat the command when `fwpush-device status` calls it confirmed"
                );
                return Ok(Installed::Refused(Failure::new("TRIAL_DUE", words)));
            }
            return self.finish(&stop).await;
        }
        if let Some(rolled_back) = self.rolled_back() {
            return Ok(Installed::RolledBack(rolled_back));
        }
        if let Err(refusal) = self.offer().await {
            // On record, with the roots that were accepted before it.
            self.agent.updater.refuse_install(refusal);
        }
        self.finish(&stop).await
    }

    /// Takes the slots back, for the reboot. Waits for a call that is under way.
    pub fn into_slots(self) -> Option<S> {
        self.agent.into_slots()
    }

    /// Where the device stands.
    pub fn status(&self) -> Status {
        self.agent.status()
    }

    /// Why the bundle's own release was rolled back, if that is what this process has found. The next one tries it again.
    fn rolled_back(&self) -> Option<Failure> {
        let found = self.found.as_ref()?;
        let ours = found.image.as_ref()?.release_id == self.release;
        (ours && found.phase == Phase::RolledBack)
            .then(|| found.failure.clone())
            .flatten()
    }

    /// Gives the bundle's documents to the updater: the roots in their order, the list, then the release.
    async fn offer(&mut self) -> Result<(), Failure> {
        let unreadable = |error: BundleError| Failure::new(error.code(), error_text(&error));
        let mut index = 0;
        loop {
            let root = self.bundle.read(move |bundle| bundle.root(index)).await;
            let Some(root) = root.map_err(unreadable)? else {
                break;
            };
            // The release is signed under the newest of them: without one it is not worth a look.
            if let (_, Some(refused)) = self.agent.take_trust(&[root], &[]) {
                self.agent.tell(AgentEvent::TrustRefused(refused.clone()));
                return Err(refused);
            }
            index += 1;
        }
        let list = self.bundle.read(|bundle| bundle.revocation()).await;
        let list = list.map_err(unreadable)?.unwrap_or_default();
        // As from a server: what a list that is not believed would have revoked is not, and a release that needs it is refused.
        if let (_, Some(refused)) = self.agent.take_trust::<Vec<u8>>(&[], &list) {
            self.agent.tell(AgentEvent::TrustRefused(refused));
        }
        let read = self
            .bundle
            .read(|bundle| Ok((bundle.release()?, bundle.image())));
        let (manifest, file_id) = read.await.map_err(unreadable)?;
        let manifest = manifest.into();
        self.agent.feed(Input::Install { manifest, file_id });
        Ok(())
    }

    /// Carries out what the updater wants, to its end.
    async fn finish(&mut self, stop: &CancellationToken) -> Result<Installed, AgentError> {
        let exit = self.agent.serve_alone(stop).await?;
        let state = self.agent.updater.state();
        let stage = state.update.as_ref().map(|update| &update.stage);
        let unknown = || Failure::new("INTERNAL", "the install ended without an outcome");
        Ok(match (exit, stage) {
            (Exit::Stopped, _) => Installed::Stopped,
            (Exit::RebootDue, Some(Stage::FallingBack { failure, .. })) => {
                Installed::FallingBack(failure.clone())
            }
            (Exit::RebootDue, _) => Installed::RebootDue,
            (_, Some(Stage::Deferred { until, reason })) if self.agent.updater.is_local() => {
                Installed::PutOff {
                    until: *until,
                    reason: reason.clone(),
                }
            }
            _ => {
                // A trial that a server ordered and this process has judged has its outcome there.
                let outcome = state.local.as_ref().or(state.outcome.as_ref());
                let failure = || outcome.and_then(|outcome| outcome.failure.clone());
                let failure = failure().unwrap_or_else(unknown);
                match outcome.map(|outcome| outcome.phase) {
                    Some(Phase::Succeeded) => Installed::Succeeded,
                    Some(Phase::RolledBack) => Installed::RolledBack(failure),
                    Some(Phase::Rejected) => Installed::Refused(failure),
                    _ => Installed::Failed(failure),
                }
            }
        })
    }
}

fn trial_in_the_way(
    view: &BootView,
    release: Option<ReleaseId>,
    health: &Health,
) -> Option<Failure> {
    let running = view.running_slot();
    if !matches!(running.state, SlotState::Trial { .. }) {
        return None;
    }
    let image = running.image.as_ref();
    let ours = release.is_some() && image.and_then(|image| image.release_id) == release;
    let what = match (ours, &health.check) {
        (true, Some(_)) => return None,
        (true, None) => {
            "there is no health check: start the agent, which confirms it when it reaches a server"
        }
        (false, _) => {
            "start the agent, and repeat the command when `fwpush-device status` calls it confirmed"
        }
    };
    let version = image.map_or("an image".to_owned(), |image| image.version.to_string());
    Some(Failure::new(
        "UNCONFIRMED",
        format!("{version} runs on trial; {what}"),
    ))
}

impl<S: Slots> Agent<S> {
    /// Makes the state durable, however often it takes. False: stopped meanwhile.
    async fn keep_state(&mut self, stop: &CancellationToken) -> Result<bool, AgentError> {
        if self.updater.take_dirty() {
            self.memory.set_unsaved();
        }
        while !self.memory.save(&self.updater, &self.trust)? {
            let retry = sleep_until(self.memory.retry_at());
            if stop.run_until_cancelled(retry).await.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
