//! Work that the updater commands: on the slots, on the network, or a health check.

use std::sync::Arc;

use fwpush_keys::{error_text, outline::OutlineBuilder};
use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::task::JoinError;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Agent, Wires};
use crate::{
    health::{HealthCheck, HealthSubject, Verdict},
    limits,
    slots::{BootView, Gone, ImageFacts, SlotError, SlotHandle, Slots},
    transfer::{Mirrors, Transfer},
    update::{Command, Consent, Input, JobId, Trouble},
};

/// How a job ended.
#[derive(Debug)]
pub(super) enum JobEnd {
    Worked {
        job: JobId,
        result: Result<(), Trouble>,
        /// The boot record after it.
        boot: Option<Box<BootView>>,
    },
    Decided {
        job: JobId,
        consent: Consent,
    },
}

/// The transfer under way.
#[derive(Debug)]
pub(super) struct Fetching {
    job: JobId,
    /// Cancelled before anything else is done about it: not one more group is written.
    stop: CancellationToken,
}

impl<S: Slots> Agent<S> {
    /// Ends the job under way. What of it cannot be dropped, a call on the slots, is waited for in `wires.ending`.
    pub(super) fn cancel_jobs(&mut self, wires: &mut Wires) {
        if let Some(fetching) = wires.fetching.take() {
            fetching.stop.cancel();
        }
        wires.jobs.abort_all();
        let slots = self.slots.clone();
        if slots.blocks() {
            wires.ending.spawn(async move {
                let _ = slots.run(|_| ()).await;
            });
        } else {
            let _ = slots.call(|_| ());
        }
    }

    pub(super) fn start_job(&mut self, command: Command, wires: &mut Wires) {
        let slots = self.slots.clone();
        match command {
            Command::InvalidateSpare { job } => {
                spawn(
                    wires,
                    job,
                    slots.clone(),
                    on_slots(slots, Slots::invalidate_spare),
                );
            }
            Command::Fetch { job, release } => {
                wires.progress_tx.send_replace(0);
                wires.progress.mark_unchanged();
                let stop = CancellationToken::new();
                wires.fetching = Some(Fetching {
                    job,
                    stop: stop.clone(),
                });
                let transfer = Transfer {
                    slots: slots.clone(),
                    store: self.memory.store(),
                    connection: wires.connection.clone(),
                    mirrors: self.mirrors_for_transfer(wires),
                    source: None,
                    settings: self.settings.transfer.clone(),
                    observe: Arc::clone(&self.observe),
                    progress: wires.progress_tx.clone(),
                    random: SmallRng::seed_from_u64(self.rng_seed ^ job.0),
                    stop,
                };
                match self.bundle.clone() {
                    None => spawn(wires, job, slots, transfer.run(release)),
                    Some(bundle) => spawn(wires, job, slots, transfer.copy(bundle, release)),
                }
            }
            Command::ReadBack { job, image } => {
                spawn(wires, job, slots.clone(), read_back(slots, image))
            }
            Command::MarkTrial { job, image, tries } => {
                spawn(
                    wires,
                    job,
                    slots.clone(),
                    on_slots(slots, move |slots| slots.mark_trial(&image, tries)),
                );
            }
            Command::Confirm { job, floor } => {
                spawn(
                    wires,
                    job,
                    slots.clone(),
                    on_slots(slots, move |slots| slots.confirm_running(floor)),
                );
            }
            Command::Reject { job } => spawn(
                wires,
                job,
                slots.clone(),
                on_slots(slots, Slots::reject_running),
            ),
            Command::CheckHealth { job } => {
                let check = self.health.check.clone();
                let version = self.updater.running().map(|running| running.version);
                spawn(
                    wires,
                    job,
                    slots.clone(),
                    judge_health(slots, check, version),
                );
            }
            Command::TellConfirmed { job, offer } => {
                let told = self.tell_confirmed(offer);
                spawn(wires, job, slots, async move {
                    told.await;
                    Ok(())
                });
            }
            // Not jobs; see `Agent::execute`.
            Command::AskConsent { .. } | Command::Cancel | Command::Reboot => {}
        }
    }

    /// `None` where no mirror may be used.
    fn mirrors_for_transfer(&self, wires: &Wires) -> Option<Mirrors> {
        let uplink = self.uplink.as_ref().filter(|_| self.mirrors.is_used())?;
        let update = self.updater.state().update.as_ref()?;
        Some(Mirrors {
            shelf: Arc::clone(&self.mirrors),
            generation: update.generation,
            messages: wires.messages.clone(),
            dial: Arc::clone(&uplink.dial),
            time: Arc::clone(&uplink.time),
            roots: self.settings.transfer.mirror_roots.clone(),
            connect_timeout: self.settings.reconnect.connect_timeout,
            tls: None,
            open: None,
        })
    }

    pub(super) fn on_job_end(&mut self, ended: Result<JobEnd, JoinError>, wires: &mut Wires) {
        match ended {
            Ok(JobEnd::Decided { job, consent }) => self.feed(Input::Consent { job, consent }),
            Ok(JobEnd::Worked { job, result, boot }) => {
                wires.fetching.take_if(|fetching| fetching.job == job);
                self.feed(Input::Done { job, result, boot });
            }
            Err(error) if error.is_cancelled() => {}
            // A job catches what its work does; see `spawn`.
            Err(error) => {
                tracing::error!(error = error_text(&error), "A task of the agent panicked.")
            }
        }
    }

    pub(super) fn on_progress(&mut self, wires: &mut Wires) {
        let bytes_done = *wires.progress.borrow_and_update();
        if let Some(Fetching { job, .. }) = wires.fetching {
            self.feed(Input::Progress { job, bytes_done });
        }
    }
}

fn spawn<S: Slots>(
    wires: &mut Wires,
    job: JobId,
    slots: SlotHandle<S>,
    work: impl Future<Output = Result<(), Trouble>> + Send + 'static,
) {
    wires.jobs.spawn(async move {
        let result = guarded(work).await.unwrap_or_else(Err);
        let boot = guarded(async move { slots.run(Slots::view).await }).await;
        JobEnd::Worked {
            job,
            result,
            boot: boot
                .ok()
                .and_then(Result::ok)
                .and_then(Result::ok)
                .map(Box::new),
        }
    });
}

/// As [`spawn`], for a decision of the owner.
pub(super) fn spawn_consent(
    wires: &mut Wires,
    job: JobId,
    work: impl Future<Output = Consent> + Send + 'static,
) {
    wires.jobs.spawn(async move {
        let consent = guarded(work)
            .await
            .unwrap_or_else(|trouble| Consent::Refuse(trouble.failure));
        JobEnd::Decided { job, consent }
    });
}

/// Runs something so that a panic in it, which is a bug of ours or of a library, ends the job and not the wait for it.
/// Dropped with the future that it returns. A build that aborts on panics, as the release profile does, never gets here.
async fn guarded<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Trouble> {
    AbortOnDropHandle::new(tokio::spawn(work))
        .await
        .map_err(|error| {
            let message = format!("a bug in the agent: {}", error_text(&error));
            tracing::error!(error = message, "A job of the agent panicked.");
            Trouble::lasting("INTERNAL", message)
        })
}

async fn on_slots<S: Slots>(
    slots: SlotHandle<S>,
    call: impl FnOnce(&mut S) -> Result<(), SlotError> + Send + 'static,
) -> Result<(), Trouble> {
    slots
        .run(call)
        .await
        .map_err(gone)?
        .map_err(|error| storage(&error))
}

/// Hashes the spare slot as the medium has it, and compares with the signed root.
async fn read_back<S: Slots>(slots: SlotHandle<S>, image: ImageFacts) -> Result<(), Trouble> {
    on_slots(slots.clone(), Slots::forget_cached_spare).await?;
    let mut builder = OutlineBuilder::new();
    let mut buffer = Vec::new();
    let mut offset = 0;
    while offset < image.size {
        let length = usize::try_from(image.size - offset)
            .unwrap_or(usize::MAX)
            .min(limits::SCAN_BYTES);
        let read = slots.run(move |slots| {
            buffer.resize(length, 0);
            let spare = slots.view()?.running.other();
            slots.read(spare, offset, &mut buffer)?;
            builder.update(&buffer);
            Ok::<_, SlotError>((builder, buffer))
        });
        (builder, buffer) = read.await.map_err(gone)?.map_err(|error| storage(&error))?;
        offset += length as u64;
        // In-memory slots are read on this very thread.
        tokio::task::yield_now().await;
    }
    if Some(builder.finish().root()) != image.blake3 {
        let message = "the spare slot does not hold the signed image when it is read back";
        return Err(Trouble::transient("READ_BACK_MISMATCH", message));
    }
    Ok(())
}

async fn judge_health<S: Slots>(
    slots: SlotHandle<S>,
    check: Option<HealthCheck>,
    version: Option<semver::Version>,
) -> Result<(), Trouble> {
    let (Some(check), Some(version)) = (check, version) else {
        return Ok(());
    };
    let subject = slots.run(move |slots| {
        let slot = slots.view()?.running;
        Ok::<_, SlotError>(HealthSubject {
            slot,
            version,
            image: slots.path(slot),
        })
    });
    let subject = subject
        .await
        .map_err(gone)?
        .map_err(|error| storage(&error))?;
    match check.run(&subject).await {
        Verdict::Healthy => Ok(()),
        Verdict::Unhealthy(why) => Err(Trouble::lasting("HEALTH_CHECK", why)),
    }
}

fn storage(error: &SlotError) -> Trouble {
    Trouble::transient("STORAGE", error_text(error))
}

fn gone(_: Gone) -> Trouble {
    Trouble::transient("STOPPED", "the agent is stopping")
}
