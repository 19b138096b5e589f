//! The devices connected to this node.

use std::sync::Arc;

use fwpush_keys::id::DeviceId;

use crate::desired::Desired;

/// All sessions of this node; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Sessions {}

impl Sessions {
    /// Hands the newest desired state to the device's stream; an older one not yet sent is dropped. Not connected: nothing.
    pub fn offer(&self, _device: &DeviceId, _desired: Arc<Desired>) {}

    /// True while the device has a live stream on this node.
    pub fn is_online(&self, _device: &DeviceId) -> bool {
        false
    }

    /// Live streams on this node.
    pub fn online_count(&self) -> u64 {
        0
    }
}
