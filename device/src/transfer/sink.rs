//! Where verified groups go: the only code that writes an image.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use fwpush_keys::outline::GROUP_BYTES;
use thiserror::Error;
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::drain::stopped;
use crate::{
    agent::{AgentEvent, Observer},
    limits,
    mirrors::MirrorHost,
    slots::{SlotError, SlotHandle, Slots},
    store::Store,
    update::{
        Trouble,
        resume::{Found, Missing, find},
    },
};

const GROUP: usize = GROUP_BYTES as usize;

/// Why bytes did not go into the slot.
#[derive(Debug, Error)]
pub(super) enum SinkError {
    #[error("group {index} (bytes {} to {}) does not match the signed outline", bytes.start, bytes.end)]
    Group { index: u64, bytes: Range<u64> },
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("the agent is stopping")]
    Gone,
}

impl SinkError {
    /// A stable code for logs and reports.
    pub(super) fn code(&self) -> &'static str {
        match self {
            SinkError::Group { .. } => "GROUP_MISMATCH",
            SinkError::Slot(_) => "STORAGE",
            SinkError::Gone => "STOPPED",
        }
    }
}

impl From<crate::slots::Gone> for SinkError {
    fn from(_: crate::slots::Gone) -> Self {
        SinkError::Gone
    }
}

/// What a scan read of both slots, to be used by the next: memory that is asked for again each time is given back each time.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    spare: Vec<u8>,
    running: Vec<u8>,
}

/// Takes a stream of bytes, checks each whole group against the outline, and only then writes it.
pub(super) struct Sink<S> {
    slots: SlotHandle<S>,
    store: Arc<dyn Store>,
    observe: Observer,
    /// Bytes of the image that the spare slot holds.
    progress: watch::Sender<u64>,
    missing: Missing,
    /// Index of the group that the next byte belongs to.
    index: u64,
    /// Bytes of that group so far, where it did not come in one piece.
    partial: Vec<u8>,
    /// The mirror that they came from; `None`: a node or a bundle.
    source: Option<MirrorHost>,
    unsynced_bytes: u64,
    synced_at: Instant,
    stop: CancellationToken,
}

impl<S: Slots> Sink<S> {
    pub(super) fn new(
        slots: SlotHandle<S>,
        store: Arc<dyn Store>,
        observe: Observer,
        progress: watch::Sender<u64>,
        missing: Missing,
        stop: CancellationToken,
    ) -> Self {
        Self {
            slots,
            store,
            observe,
            progress,
            missing,
            index: 0,
            partial: Vec::new(),
            source: None,
            unsynced_bytes: 0,
            synced_at: Instant::now(),
            stop,
        }
    }

    pub(super) fn missing(&self) -> &Missing {
        &self.missing
    }

    /// Whether calls that touch the slots may block.
    pub(super) fn blocks(&self) -> bool {
        self.slots.blocks()
    }

    /// Does something with the sink, off the async workers where the slots may block.
    pub(super) async fn run<T: Send + 'static>(
        mut self,
        work: impl FnOnce(&mut Self) -> T + Send + 'static,
    ) -> Result<(Self, T), Trouble> {
        if !self.blocks() {
            let result = work(&mut self);
            return Ok((self, result));
        }
        self.spawn(work).await.map_err(stopped)
    }

    /// Does something with the sink on a thread that may block.
    pub(super) fn spawn<T: Send + 'static>(
        mut self,
        work: impl FnOnce(&mut Self) -> T + Send + 'static,
    ) -> JoinHandle<(Self, T)> {
        tokio::task::spawn_blocking(move || {
            let result = work(&mut self);
            (self, result)
        })
    }

    /// The next group is the one that begins at `offset`, from this source. Gives how many bytes of it are here already: a link
    /// that breaks more often than a group takes still comes to its end. What another source began is not gone on with: a
    /// group that does not match is the fault of one.
    pub(super) fn begin(&mut self, offset: u64, source: Option<&MirrorHost>) -> u64 {
        let index = offset / GROUP_BYTES;
        if index != self.index || self.source.as_ref() != source {
            self.index = index;
            self.source = source.cloned();
            self.partial.clear();
        }
        self.partial.len() as u64
    }

    /// Takes the next bytes. After an error nothing more is taken until [`Sink::begin`].
    pub(super) fn take(&mut self, mut bytes: Bytes) -> Result<(), SinkError> {
        while !bytes.is_empty() {
            let Some(range) = self.missing.outline().group_range(self.index) else {
                // More than the image has; the caller asked for no more.
                return Ok(());
            };
            let length = (range.end - range.start) as usize;
            if self.partial.is_empty() && bytes.len() >= length {
                // The common case: a whole group in one piece is checked and written where it lies.
                let group = bytes.split_to(length);
                self.place(self.index, &group)?;
                self.index += 1;
                continue;
            }
            let wanted = length - self.partial.len();
            self.partial
                .extend_from_slice(&bytes.split_to(wanted.min(bytes.len())));
            if self.partial.len() == length {
                let group = std::mem::take(&mut self.partial);
                let placed = self.place(self.index, &group);
                self.partial = group;
                self.partial.clear();
                placed?;
                self.index += 1;
            }
        }
        Ok(())
    }

    /// Invariant 5: the check stands between every byte and the slot.
    fn place(&mut self, index: u64, group: &[u8]) -> Result<(), SinkError> {
        let outline = self.missing.outline();
        let bytes = outline.group_range(index).unwrap_or(0..0);
        if outline.check(index, group).is_err() {
            return Err(SinkError::Group { index, bytes });
        }
        self.slots.call(|slots| {
            // Asked with the slots in hand: whoever cancels and then gets hold of them knows that no write follows.
            if self.stop.is_cancelled() {
                return Err(SinkError::Gone);
            }
            // Counted before it is written: a kill between the two counts one too many, never one too few.
            self.store.count_groups_written(1);
            Ok(slots.write_spare(bytes.start, group)?)
        })??;
        self.missing.have(index);
        (self.observe)(AgentEvent::GroupWritten { index });
        if self.missing.bytes_done() - *self.progress.borrow() >= limits::PROGRESS_BYTES {
            self.tell_progress();
        }
        self.unsynced_bytes += group.len() as u64;
        if self.unsynced_bytes >= limits::SYNC_BYTES
            || self.synced_at.elapsed() >= limits::SYNC_INTERVAL
        {
            self.sync()?;
        }
        Ok(())
    }

    pub(super) fn tell_progress(&self) {
        self.progress.send_replace(self.missing.bytes_done());
    }

    /// Makes all that was written durable.
    pub(super) fn sync(&mut self) -> Result<(), SinkError> {
        self.slots.call(Slots::sync_spare)??;
        self.unsynced_bytes = 0;
        self.synced_at = Instant::now();
        Ok(())
    }

    /// What the spare slot holds is asked of the medium: after a failed sync the page cache may know better than it.
    pub(super) fn forget_cached(&mut self) -> Result<(), SinkError> {
        Ok(self.slots.call(Slots::forget_cached_spare)??)
    }

    /// Looks for some groups on the device, and copies into the spare slot what is elsewhere.
    pub(super) fn scan(&mut self, groups: Range<u64>, read: &mut Scanned) -> Result<(), SinkError> {
        let bytes = self.missing.bytes_of(&groups);
        let length = (bytes.end - bytes.start) as usize;
        let Scanned { spare, running } = read;
        spare.resize(length, 0);
        running.resize(length, 0);
        let running_known = self.slots.call(|slots| {
            let slot = slots.view()?.running;
            slots.read(slot.other(), bytes.start, spare)?;
            // The running slot may be smaller than the image, or unreadable there: then it is no help.
            Ok::<_, SlotError>(slots.read(slot, bytes.start, running).is_ok())
        })??;
        for (index, at) in groups.zip((0..).step_by(GROUP)) {
            let end = spare.len().min(at + GROUP);
            let found = find(
                self.missing.outline(),
                index,
                &spare[at..end],
                running_known.then(|| &running[at..end]),
            );
            match found {
                Found::Spare => self.missing.have(index),
                Found::Zero => self.place(index, &vec![0; end - at])?,
                Found::Running => self.place(index, &running[at..end])?,
                Found::Missing => {}
            }
        }
        Ok(())
    }
}
