//! What a node's sessions share: who is here, and who hears of whom.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use fwpush_keys::id::{DeviceId, Product};
use fwpush_proto::v1::{
    EventType, NotifyEvent, PushOutcome, ServerMessage, server_message::Kind as ToDevice,
};
use tokio::sync::mpsc;

use super::{Closing, Entry, Presence, State};
use crate::limits;

impl State {
    pub(super) fn insert(&mut self, device: &DeviceId, entry: Entry) -> Option<Entry> {
        let old = self.remove(device);
        for heard in &entry.hears {
            if heard == "*" {
                self.hears_product
                    .entry(entry.product.clone())
                    .or_default()
                    .insert(device.clone());
            } else if let Ok(heard) = heard.parse::<DeviceId>() {
                self.hears_device
                    .entry(heard)
                    .or_default()
                    .insert(device.clone());
            }
        }
        self.live.insert(device.clone(), entry);
        old
    }

    pub(super) fn remove(&mut self, device: &DeviceId) -> Option<Entry> {
        let entry = self.live.remove(device)?;
        for heard in &entry.hears {
            if heard == "*" {
                remove_listener(&mut self.hears_product, &entry.product, device);
            } else if let Ok(heard) = heard.parse::<DeviceId>() {
                remove_listener(&mut self.hears_device, &heard, device);
            }
        }
        Some(entry)
    }

    pub(super) fn push(
        &self,
        device: &DeviceId,
        message: ServerMessage,
        epoch: u64,
    ) -> PushOutcome {
        let Some(entry) = self.live.get(device) else {
            return PushOutcome::NotHere;
        };
        if epoch != 0 && epoch != entry.epoch {
            return PushOutcome::StaleEpoch;
        }
        // What it has to say still goes out, and the device is elsewhere.
        if matches!(*entry.closing.borrow(), Some(Closing::Replaced)) {
            return PushOutcome::NotHere;
        }
        match entry.control.try_send(message) {
            Ok(()) => PushOutcome::Delivered,
            Err(mpsc::error::TrySendError::Full(_)) => PushOutcome::Busy,
            Err(mpsc::error::TrySendError::Closed(_)) => PushOutcome::NotHere,
        }
    }

    /// Gives how many takeovers of this device there were of late, if this is one; else 0.
    pub(super) fn count_takeover(&mut self, device: &DeviceId, this_is_one: bool) -> usize {
        if !this_is_one {
            return 0;
        }
        let now = Instant::now();
        let recent = |at: &Instant| now.duration_since(*at) < limits::TAKEOVER_WINDOW;
        if self.takeovers.len() >= limits::CONNECTIONS {
            self.takeovers.retain(|_, times| times.iter().any(recent));
        }
        let times = self.takeovers.entry(device.clone()).or_default();
        times.retain(recent);
        times.push(now);
        if times.len() > limits::TAKEOVERS_KEPT {
            times.remove(0);
        }
        times.len()
    }

    /// Events are best effort: a listener whose queue is full misses one.
    pub(super) fn announce(
        &self,
        device: &DeviceId,
        product: &Product,
        event: EventType,
        details: &str,
    ) {
        if let Some(presence) = &self.presence {
            let told = presence.try_send(Presence {
                device: device.clone(),
                product: product.clone(),
                event,
                details: details.to_owned(),
            });
            if told.is_err() {
                tracing::debug!(device.id = %device, "A presence event was not told to other nodes.");
            }
        }
        let of_device = self.hears_device.get(device);
        let of_product = self.hears_product.get(product);
        for listener in of_device
            .into_iter()
            .chain(of_product)
            .flatten()
            .filter(|id| *id != device)
        {
            let Some(entry) = self.live.get(listener) else {
                continue;
            };
            let message = ServerMessage {
                kind: Some(ToDevice::Event(NotifyEvent {
                    r#type: event.into(),
                    details: details.to_owned(),
                    client_id: device.to_string(),
                })),
            };
            if entry.control.try_send(message).is_err() {
                tracing::debug!(device.id = %listener, "A presence event found a full queue.");
            }
        }
    }
}

fn remove_listener<K: std::hash::Hash + Eq>(
    index: &mut HashMap<K, HashSet<DeviceId>>,
    heard: &K,
    listener: &DeviceId,
) {
    if let Some(listeners) = index.get_mut(heard) {
        listeners.remove(listener);
        if listeners.is_empty() {
            index.remove(heard);
        }
    }
}
