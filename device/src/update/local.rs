//! Installs that somebody at the device asks for, from a bundle: no server ordered them, and none is told of their steps.
//!
//! They are updates of generation 0, and pass every check of one that a server orders. What a server ordered before is its to
//! order again: its generation counts as not observed once an install has taken the update's place.

use std::sync::Arc;

use fwpush_keys::{id::FileId, release::Release, trust::Verified};

use super::{
    facts::ImageFacts,
    judge::{self, Admitted},
    messages::{Action, Context, Step},
    report::{Failure, Phase},
    state::{Outcome, Stage, Update},
    updater::Updater,
};
use crate::limits;

impl Updater {
    /// Whether the present update is one that no server ordered.
    pub(crate) fn is_local(&self) -> bool {
        self.state
            .update
            .as_ref()
            .is_some_and(|update| update.generation == 0)
    }

    /// Whether an install goes on, or the trial that it has led to: not once it was put off, nor while only what a server
    /// ordered rests.
    pub(crate) fn installs(&self) -> bool {
        match self.stage() {
            None | Some(Stage::Deferred { .. }) => false,
            Some(stage) => self.is_local() || stage.is_past_mark(),
        }
    }

    /// Takes the place of what is under way once it is admitted; a refusal changes nothing. Past the mark of a trial
    /// nothing is begun: the caller looks before it asks.
    pub(super) fn on_install(
        &mut self,
        manifest: &Arc<[u8]>,
        file_id: FileId,
        context: &mut Context<'_>,
    ) {
        if self.is_past_mark() {
            return;
        }
        let file_id = file_id.to_string();
        let release = match judge::verify(context.trust, &self.device, manifest, Some(&file_id)) {
            Ok(release) => release,
            Err(failure) => return self.end_at_once(Phase::Rejected, Some(failure), None),
        };
        let image = judge::image_of(&release);
        if self.runs_already(&image) {
            return self.end_at_once(Phase::Succeeded, None, Some(image));
        }
        let envelope = release.envelope_arc();
        match self.admit_local(release, &image, context) {
            Ok(admitted) => self.begin_local(envelope, admitted, image, context),
            Err(failure) => self.end_at_once(Phase::Rejected, Some(failure), Some(image)),
        }
    }

    /// As for a notice, but for what clamps a server: the number of installs a day. And nothing is waited for, neither a
    /// revocation list nor the end of a trial.
    fn admit_local(
        &self,
        release: Verified<Release>,
        image: &ImageFacts,
        context: &Context<'_>,
    ) -> Result<Admitted, Failure> {
        let admitted = self
            .judge()
            .admit(release, context.trust, context.now.wall)?;
        if let Some(failure) = self.failed_too_often(image) {
            return Err(failure);
        }
        if !self.boot.confirmed() {
            let words = "the running image is not confirmed yet";
            return Err(Failure::new("UNCONFIRMED", words));
        }
        Ok(admitted)
    }

    fn begin_local(
        &mut self,
        envelope: Arc<[u8]>,
        admitted: Admitted,
        image: ImageFacts,
        context: &Context<'_>,
    ) {
        self.forget();
        // Only so that old ones are forgotten: it counts, and bounds what a server may order next.
        self.install_limit(&image, context.now.wall);
        self.manifest = Some(envelope);
        self.admitted = Some(admitted);
        self.state.update = Some(Update {
            generation: 0,
            attempt: 0,
            nonce: String::new(),
            action: Action::Install,
            image,
            asked: 0,
            troubles: limits::TROUBLES_PER_UPDATE,
            list_awaited: true,
            start_awaited: true,
            step: Step::Download,
            stage: Stage::Asking,
        });
        self.enter(Stage::Asking);
        self.ask(Step::Download);
    }

    /// Notes that an install was refused before its release was looked at.
    pub(crate) fn refuse_install(&mut self, failure: Failure) {
        self.end_at_once(Phase::Rejected, Some(failure), None);
    }

    /// Ends an install before it has begun.
    fn end_at_once(&mut self, phase: Phase, failure: Option<Failure>, image: Option<ImageFacts>) {
        self.show_local(phase, failure.clone());
        self.state.local = Some(Outcome {
            generation: 0,
            attempt: 0,
            phase,
            failure,
            image,
        });
        self.set_dirty();
    }
}
