//! The two places an image can run from, and the record by which a bootloader chooses between them.
//!
//! The agent changes only the spare slot, and only in the order that invariant 8 asks for: marked unbootable, written,
//! read back, marked for trial, confirmed. [`FileSlots`] does so on two block devices or files, [`CommandSlots`] has it done
//! by RAUC, SWUpdate or a script; a simulator keeps them in memory.

use std::{fmt::Debug, io, path::PathBuf};

use thiserror::Error;

pub use crate::update::facts::{BootView, ImageFacts, SlotId, SlotRecord, SlotState};

mod board;
mod boot;
mod commands;
mod file;
mod handle;
mod in_use;
mod record;

pub use board::{BoardSlots, SlotsSettings, check_state_place};
pub use boot::CommandLine;
pub use commands::{CommandError, CommandSlots, CommandSlotsSettings, SlotCommand, SlotCommands};
pub use file::{Bootloader, FileSlots, FileSlotsSettings};
pub(crate) use handle::{Gone, SlotHandle};
pub(crate) use in_use::Kernel;
pub(crate) use record::RecordFile;
pub use record::{BootRecord, RecordError};

/// An A/B pair of image slots. Every method is called from one task at a time and may block.
pub trait Slots: Debug + Send + 'static {
    /// Whether calls may wait for storage. The agent then keeps them off its async workers; in-memory slots answer `false`.
    fn blocks(&self) -> bool {
        true
    }

    /// What was booted and what the boot record says of both slots. Which slot runs comes from the boot itself, never
    /// from the record.
    fn view(&mut self) -> Result<BootView, SlotError>;

    /// Bytes that fit into the spare slot.
    fn spare_capacity(&mut self) -> Result<u64, SlotError>;

    /// Where the image of a slot can be read, for a health check; `None` where it has no path.
    fn path(&self, slot: SlotId) -> Option<PathBuf>;

    /// Marks the spare slot unbootable, durably, before this returns. Done already: writes nothing.
    fn invalidate_spare(&mut self) -> Result<(), SlotError>;

    /// Reads `buffer.len()` bytes at `offset`; fails past the end of the slot.
    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError>;

    /// Writes into the spare slot; need not be durable before [`Slots::sync_spare`]. Refused unless the spare is marked
    /// unbootable, so that a half-written image never boots.
    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError>;

    /// Makes everything written to the spare slot durable.
    fn sync_spare(&mut self) -> Result<(), SlotError>;

    /// Makes later reads of the spare slot come from the medium and not from the page cache, where that is possible.
    fn forget_cached_spare(&mut self) -> Result<(), SlotError>;

    /// Tells the bootloader to boot the spare slot at most `tries` times unless it is confirmed. Durable.
    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError>;

    /// Makes the running slot, on trial until now, the one that boots from here on. A spare whose image has a security
    /// counter below `floor` is marked unbootable in the same write. Durable; done already: writes nothing.
    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError>;

    /// Marks the running slot, which is on trial, unbootable: the next boot takes the other one. Refused when the
    /// running slot is confirmed. Durable.
    fn reject_running(&mut self) -> Result<(), SlotError>;
}

/// Why a slot could not be read or changed.
#[derive(Debug, Error)]
pub enum SlotError {
    #[error("{operation} slot {slot} at byte {offset}")]
    Io {
        operation: &'static str,
        slot: SlotId,
        offset: u64,
        source: io::Error,
    },
    #[error("{operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("boot record {}", path.display())]
    Record { path: PathBuf, source: RecordError },
    #[error("slot {slot} holds {capacity} bytes; bytes {offset} to {end} do not fit")]
    Bounds {
        slot: SlotId,
        capacity: u64,
        offset: u64,
        end: u64,
    },
    #[error("{} {problem}", file.display())]
    Boot { file: PathBuf, problem: String },
    #[error("slot {slot} ({}) cannot be written: {user}", path.display())]
    InUse {
        slot: SlotId,
        path: PathBuf,
        user: String,
    },
    #[error("the slot command {name}")]
    Command {
        name: &'static str,
        source: CommandError,
    },
    #[error("change the slots")]
    Change(#[source] RecordError),
    #[error("refused to {operation}: {reason}")]
    Refused {
        operation: &'static str,
        reason: &'static str,
    },
}
