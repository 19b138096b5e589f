//! Slots shared between the agent's tasks: one call at a time, off the async workers where calls may block.

use std::sync::{Arc, Mutex, PoisonError};

use super::Slots;

/// A handle to the slots; clones share them.
#[derive(Debug)]
pub(crate) struct SlotHandle<S> {
    slots: Arc<Mutex<Option<S>>>,
    blocks: bool,
}

impl<S> Clone for SlotHandle<S> {
    fn clone(&self) -> Self {
        Self {
            slots: Arc::clone(&self.slots),
            blocks: self.blocks,
        }
    }
}

/// The slots were taken back by their owner.
#[derive(Debug)]
pub(crate) struct Gone;

impl<S: Slots> SlotHandle<S> {
    pub(crate) fn new(slots: S) -> Self {
        let blocks = slots.blocks();
        Self {
            slots: Arc::new(Mutex::new(Some(slots))),
            blocks,
        }
    }

    /// Whether calls are made on another thread.
    pub(crate) fn blocks(&self) -> bool {
        self.blocks
    }

    /// Makes one call on this thread.
    pub(crate) fn call<T>(&self, call: impl FnOnce(&mut S) -> T) -> Result<T, Gone> {
        // A panic in a call leaves the slots as a power cut would; the record and the outline decide what they hold.
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.as_mut().map(call).ok_or(Gone)
    }

    /// Makes one call, on another thread where it may block. When the future is dropped, a call that has begun ends by
    /// itself before the next one.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        if !self.blocks {
            return self.call(call);
        }
        let handle = self.clone();
        let called = tokio::task::spawn_blocking(move || handle.call(call)).await;
        called.unwrap_or_else(|error| match error.try_into_panic() {
            // Goes on in the task that asked for the call.
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Gone),
        })
    }

    /// Takes the slots back; calls that are made later find them gone.
    pub(crate) fn take(&self) -> Option<S> {
        self.slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}
