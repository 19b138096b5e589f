//! What the owner of the device decides: by a function of the program around the agent, by the state of the link, by the
//! hour, and by hooks. And what the owner lets be known of the device.

use std::sync::Arc;

use fwpush_keys::time::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Agent, Consenter, Wires, jobs::spawn_consent};
use crate::{
    attributes,
    hooks::Surroundings,
    metered::Metered,
    settings::AgentSettings,
    slots::{SlotHandle, Slots},
    update::{Consent, Failure, Input, JobId, Offer, Step},
};

impl<S: Slots> Agent<S> {
    /// Asks all who have a say; at once where nothing needs to be run.
    pub(super) fn ask_owner(&mut self, job: JobId, offer: Offer, wires: &mut Wires) {
        if !asks_programs(&self.settings, &offer) {
            let consent = decide_at_once(&self.settings, &self.consent, &offer, self.now().wall);
            return self.feed(Input::Consent { job, consent });
        }
        let (settings, consent) = (Arc::clone(&self.settings), Arc::clone(&self.consent));
        let (slots, around, now) = (self.slots.clone(), self.surroundings(), self.now().wall);
        spawn_consent(wires, job, async move {
            match decide_at_once(&settings, &consent, &offer, now) {
                Consent::Go => {}
                other => return other,
            }
            if asks_metered(&settings, &offer)
                && let Some(wait) = Metered::deferral(settings.transfer.metered.as_ref()).await
            {
                let reason = Failure::new("METERED", "the link is metered");
                return Consent::Wait { wait, reason };
            }
            let around = with_path(around, slots, &offer).await;
            settings.hooks.ask(&offer, &around).await
        });
    }

    /// The work of telling the owner of a confirmation.
    pub(super) fn tell_confirmed(
        &self,
        offer: Offer,
    ) -> impl Future<Output = ()> + Send + 'static + use<S> {
        let (settings, slots) = (Arc::clone(&self.settings), self.slots.clone());
        let around = self.surroundings();
        async move {
            let around = with_path(around, slots, &offer).await;
            settings.hooks.confirmed(&offer, &around).await;
        }
    }

    fn surroundings(&self) -> Surroundings {
        Surroundings {
            client_id: self.settings.client_id.to_string(),
            product: self.settings.product.to_string(),
            running_version: self.updater.running().map(|running| running.version),
            slot_path: None,
        }
    }

    /// Looks for attributes before the first registration. False: stopped meanwhile.
    pub(super) async fn first_attributes(&mut self, stop: &CancellationToken) -> bool {
        let Some(folder) = &self.settings.attributes_dir else {
            return true;
        };
        let found = attributes::collect(&self.settings.attributes, folder);
        match stop.run_until_cancelled(found).await {
            Some(found) => self.attributes = found,
            None => return false,
        }
        self.attributes_due = Instant::now() + self.settings.attributes_interval;
        true
    }

    /// Begins to look for attributes, where programs tell them and it is time.
    pub(super) fn refresh_attributes(&mut self, wires: &mut Wires) {
        let Some(folder) = self.settings.attributes_dir.clone() else {
            return;
        };
        if !wires.attributes.is_empty() || Instant::now() < self.attributes_due {
            return;
        }
        self.attributes_due = Instant::now() + self.settings.attributes_interval;
        let fixed = self.settings.attributes.clone();
        wires
            .attributes
            .spawn(async move { attributes::collect(&fixed, &folder).await });
    }
}

/// Whether a step waits for a program.
fn asks_programs(settings: &AgentSettings, offer: &Offer) -> bool {
    settings.hooks.has(offer.step) || asks_metered(settings, offer)
}

/// Whether it matters what the link costs: a bundle comes over none.
fn asks_metered(settings: &AgentSettings, offer: &Offer) -> bool {
    offer.step == Step::Download && settings.transfer.metered.is_some() && !offer.is_local()
}

/// What needs no program: the function that the agent was given, and the hour.
fn decide_at_once(
    settings: &AgentSettings,
    consent: &Consenter,
    offer: &Offer,
    now: Timestamp,
) -> Consent {
    if offer.step == Step::Download {
        return consent(offer);
    }
    // Whoever installs from a bundle has chosen the hour.
    let window = settings
        .install_window
        .as_ref()
        .filter(|_| !offer.is_local());
    let wait = window.map(|window| window.wait(now));
    match wait {
        Some(wait) if !wait.is_zero() => {
            let reason = Failure::new("INSTALL_WINDOW", "it is not the hour for installs");
            Consent::Wait { wait, reason }
        }
        _ => Consent::Go,
    }
}

async fn with_path<S: Slots>(
    around: Surroundings,
    slots: SlotHandle<S>,
    offer: &Offer,
) -> Surroundings {
    let slot = offer.slot;
    let slot_path = slots
        .run(move |slots| slots.path(slot))
        .await
        .ok()
        .flatten();
    Surroundings {
        slot_path,
        ..around
    }
}
