//! The slots of a real device, of the kind that its configuration names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokio_util::sync::CancellationToken;

use super::{
    BootView, Bootloader, CommandSlots, CommandSlotsSettings, FileSlots, FileSlotsSettings,
    ImageFacts, Kernel, SlotError, SlotId, Slots,
};
use crate::{
    disk::Identity,
    store::{BadPlace, StoreError, look_at_place},
};

/// Which slots a device has.
#[derive(Debug, Clone)]
pub enum SlotsSettings {
    Files(FileSlotsSettings),
    Commands(CommandSlotsSettings),
}

impl SlotsSettings {
    /// What is recorded of the slots and the present boot; changes nothing. `None`: there is no record.
    pub fn look(&self) -> Result<Option<BootView>, SlotError> {
        match self {
            SlotsSettings::Files(settings) => FileSlots::look(settings),
            SlotsSettings::Commands(settings) => CommandSlots::look(settings),
        }
    }
}

/// Makes sure that the state is kept where an update and a power cut leave it: neither in memory nor on a slot. On a bench,
/// whose bootloader the agent plays itself, storage that forgets is only warned of.
pub fn check_state_place(folder: &Path, slots: &SlotsSettings) -> Result<(), StoreError> {
    let (identities, bench) = match slots {
        SlotsSettings::Files(settings) => {
            let found = [SlotId::A, SlotId::B].into_iter().zip(&settings.paths);
            let identities = found.filter_map(|(slot, path)| {
                // A slot that is missing is told of when it is opened.
                let metadata = fs::metadata(path).ok()?;
                Some((slot, Identity::of(&metadata)))
            });
            let bench = matches!(settings.bootloader, Bootloader::Emulated);
            (identities.collect(), bench)
        }
        // Which devices these slots lie on, only the commands know.
        SlotsSettings::Commands(_) => (Vec::new(), false),
    };
    match look_at_place(folder, &identities, &Kernel::default())? {
        None => Ok(()),
        Some(place @ BadPlace::Forgetful(_)) if bench => {
            tracing::warn!(folder = %folder.display(), "The state directory {place}: good enough for a bench.");
            Ok(())
        }
        Some(place) => Err(StoreError::Place {
            path: folder.into(),
            place,
        }),
    }
}

/// One type for all of them: the agent is compiled once.
#[derive(Debug)]
pub enum BoardSlots {
    Files(FileSlots),
    Commands(CommandSlots),
}

impl BoardSlots {
    /// Opens the slots; `stop` ends a command that is under way.
    pub fn open(settings: SlotsSettings, stop: &CancellationToken) -> Result<Self, SlotError> {
        Ok(match settings {
            SlotsSettings::Files(settings) => Self::Files(FileSlots::open(settings)?),
            SlotsSettings::Commands(settings) => {
                let stop = stop.clone();
                Self::Commands(CommandSlots::open(CommandSlotsSettings {
                    stop,
                    ..settings
                })?)
            }
        })
    }

    /// Where the agent plays the bootloader itself: does so, and returns the slot that runs now. `None`: the device has to
    /// be rebooted.
    pub fn emulate_boot(&mut self) -> Result<Option<SlotId>, SlotError> {
        match self {
            Self::Files(slots) if slots.is_emulated() => slots.emulate_boot().map(Some),
            Self::Files(_) | Self::Commands(_) => Ok(None),
        }
    }

    fn slots(&self) -> &dyn Slots {
        match self {
            Self::Files(slots) => slots,
            Self::Commands(slots) => slots,
        }
    }

    fn slots_mut(&mut self) -> &mut dyn Slots {
        match self {
            Self::Files(slots) => slots,
            Self::Commands(slots) => slots,
        }
    }
}

impl Slots for BoardSlots {
    fn view(&mut self) -> Result<BootView, SlotError> {
        self.slots_mut().view()
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        self.slots_mut().spare_capacity()
    }

    fn path(&self, slot: SlotId) -> Option<PathBuf> {
        self.slots().path(slot)
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        self.slots_mut().invalidate_spare()
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        self.slots_mut().read(slot, offset, buffer)
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        self.slots_mut().write_spare(offset, bytes)
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        self.slots_mut().sync_spare()
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        self.slots_mut().forget_cached_spare()
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        self.slots_mut().mark_trial(image, tries)
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        self.slots_mut().confirm_running(floor)
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        self.slots_mut().reject_running()
    }
}
