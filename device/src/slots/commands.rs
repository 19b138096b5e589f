//! Slots of somebody else: RAUC, SWUpdate or a script of the board does with them what it does, by commands.
//!
//! The image is staged whole in a private directory and verified there as in a slot. To put it on trial it is handed to the
//! command `write` as an open read-only descriptor, so that nothing can be put in its place, and hashed once more when the
//! command is done. What is recorded of the slots lies in a boot record of our own, which no bootloader reads: images
//! by their facts, and which of them was confirmed, as most tools know only which can boot. What `status` says goes before it.

use std::{path::PathBuf, sync::Arc};

use fwpush_keys::error_text;
use tokio_util::sync::CancellationToken;

use super::{
    BootRecord, BootView, ImageFacts, RecordFile, SlotError, SlotId, SlotRecord, SlotState, Slots,
    boot::{CommandLine, boot_id},
};
use crate::disk::{Disk, RealDisk};

mod run;
mod staging;
mod status;

use run::Run;
pub use run::{CommandError, SlotCommand};
use staging::Staging;
use status::{Bootable, Status};

/// The commands, and where what belongs to them is kept.
#[derive(Debug, Clone)]
pub struct CommandSlotsSettings {
    pub commands: SlotCommands,
    /// Made with mode 0700; holds one image.
    pub staging: PathBuf,
    /// The largest image; less where less is free. `None`: what is free.
    pub capacity: Option<u64>,
    /// Where the facts of both images are kept; made when it is missing.
    pub record: PathBuf,
    /// What the running slot holds when there is no record yet.
    pub first_image: ImageFacts,
    /// Kills a command that is under way.
    pub stop: CancellationToken,
}

/// What each does is said in `docs/slot-commands.md`.
#[derive(Debug, Clone)]
pub struct SlotCommands {
    pub status: SlotCommand,
    pub write: SlotCommand,
    /// `None`: `write` has the slot booted next.
    pub activate: Option<SlotCommand>,
    pub confirm: SlotCommand,
    pub invalidate: SlotCommand,
}

/// Slots that commands write and switch.
#[derive(Debug)]
pub struct CommandSlots {
    commands: SlotCommands,
    stop: CancellationToken,
    capacity: Option<u64>,
    staging: Staging,
    record: RecordFile,
    boot_id: String,
    running: SlotId,
    /// `None` after a change: asked again when it is needed.
    status: Option<Status>,
}

impl CommandSlots {
    /// Runs `status`, and `confirm` if the running slot is confirmed already: bootloaders that count every boot want to
    /// be told after each.
    pub fn open(settings: CommandSlotsSettings) -> Result<Self, SlotError> {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let status = read_status(&settings)?;
        let record = match RecordFile::open(&disk, &settings.record)? {
            Some(record) => record,
            None => {
                let first = first_record(&status, settings.first_image.clone());
                RecordFile::create(&disk, &settings.record, &first)?
            }
        };
        let mut slots = Self {
            staging: Staging::open(&settings.staging)?,
            commands: settings.commands,
            stop: settings.stop,
            capacity: settings.capacity,
            record,
            boot_id: present_boot(&status)?,
            running: status.booted,
            status: Some(status),
        };
        slots.confirm_again()?;
        Ok(slots)
    }

    /// What `status` and the record say; changes nothing. `None`: there is no record.
    pub fn look(settings: &CommandSlotsSettings) -> Result<Option<BootView>, SlotError> {
        let Some(mut record) = RecordFile::look(&RealDisk, &settings.record)? else {
            return Ok(None);
        };
        let status = read_status(settings)?;
        record.slots = merge(&record, &status);
        Ok(Some(record.view(present_boot(&status)?, status.booted)))
    }

    fn spare(&self) -> SlotId {
        self.running.other()
    }

    /// Brings the record up to what `status` says, and returns it.
    fn record(&mut self) -> Result<&BootRecord, SlotError> {
        if self.status.is_none() {
            let output = self.run(Name::Status, &[], None)?;
            let status = parse_status(&output)?;
            if status.booted != self.running {
                let problem =
                    "status says that another slot was booted than before, without a boot";
                return Err(failed(Name::Status, CommandError::Status(problem.into())));
            }
            self.status = Some(status);
        }
        if let Some(status) = &self.status {
            self.record.update(|record| {
                let merged = merge(record, status);
                let changed = record.slots != merged;
                record.slots = merged;
                Ok(changed)
            })?;
        }
        self.record.get()
    }

    /// What `status` said last of a slot.
    fn bootable(&mut self, slot: SlotId) -> Result<Bootable, SlotError> {
        self.record()?;
        Ok(self
            .status
            .as_ref()
            .map_or(Bootable::Bad, |status| status.slot(slot)))
    }

    /// Runs a command that changes something; what `status` said before it counts for nothing.
    fn change(
        &mut self,
        name: Name,
        facts: &[(&'static str, String)],
        image: Option<std::fs::File>,
    ) -> Result<(), SlotError> {
        self.status = None;
        self.run(name, facts, image).map(drop)
    }

    fn run(
        &self,
        name: Name,
        facts: &[(&'static str, String)],
        input: Option<std::fs::File>,
    ) -> Result<Vec<u8>, SlotError> {
        let Some(command) = name.of(&self.commands) else {
            return Ok(Vec::new());
        };
        let mut environment = vec![("FWPUSH_COMMAND", name.as_str().to_owned())];
        environment.extend_from_slice(facts);
        let run = Run {
            command,
            environment: &environment,
            input,
            stop: &self.stop,
        };
        run.run().map_err(|error| failed(name, error))
    }

    /// A slot that the bootloader would still boot is taken from it, and it must say so afterwards.
    fn make_unbootable(&mut self, slot: SlotId) -> Result<(), SlotError> {
        if self.bootable(slot)? == Bootable::Bad {
            return Ok(());
        }
        self.change(Name::Invalidate, &[("FWPUSH_SLOT", slot.to_string())], None)?;
        if self.bootable(slot)? != Bootable::Bad {
            let problem = format!("it ended well, but status does not say {slot}=bad");
            return Err(failed(Name::Invalidate, CommandError::Status(problem)));
        }
        Ok(())
    }

    fn confirm_again(&mut self) -> Result<(), SlotError> {
        let (running, spare) = (self.running, self.spare());
        let record = self.record()?;
        let confirmed = record.slot(running).state == SlotState::Confirmed;
        // Given up by a confirmation that was cut before it reached the bootloader.
        let given_up = record.slot(spare).state == SlotState::Unbootable;
        let mut result = Ok(());
        if confirmed && self.bootable(running)? != Bootable::Confirmed {
            result = self.change(Name::Confirm, &[("FWPUSH_SLOT", running.to_string())], None);
        }
        if confirmed && given_up {
            result = result.and_then(|()| self.make_unbootable(spare));
        }
        if let Err(error) = result {
            // The device runs all the same; the next start tries again.
            tracing::warn!(
                error = error_text(&error),
                "The bootloader could not be told that the running slot is good."
            );
        }
        Ok(())
    }

    /// Hands the image over, and makes sure that it was this image that was handed over.
    fn write(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let facts = facts(self.spare(), image, tries);
        let descriptor =
            self.staging
                .finish(image.size)
                .map_err(staging_error("finish", 0, self.spare()))?;
        self.change(Name::Write, &facts, Some(descriptor))?;
        let held = self
            .staging
            .hash()
            .map_err(staging_error("hash", 0, self.spare()))?;
        if Some(held) != image.blake3 {
            return Err(SlotError::Refused {
                operation: "put the slot on trial",
                reason: "the staged image was changed while it was written; the slot may hold anything",
            });
        }
        Ok(())
    }

    fn write_and_activate(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let spare = self.spare();
        let mark = |record: &mut BootRecord| {
            record
                .mark_trial(spare, image.clone(), tries)
                .map(|()| true)
        };
        if self.commands.activate.is_none() {
            // From the end of `write` on it may boot: what it is on trial for is recorded before.
            self.record.update(mark)?;
            return self.write(image, tries);
        }
        self.write(image, tries)?;
        self.record.update(mark)?;
        self.change(Name::Activate, &facts(spare, image, tries), None)
    }

    /// What the commands did must be what `status` says.
    fn expect_trial(&mut self, slot: SlotId) -> Result<(), SlotError> {
        match self.record()?.slot(slot).state {
            SlotState::Trial { .. } => Ok(()),
            SlotState::Unbootable | SlotState::Confirmed => {
                let name = match self.commands.activate {
                    Some(_) => Name::Activate,
                    None => Name::Write,
                };
                let problem =
                    format!("it ended well, but status says neither {slot}=trial nor {slot}=good");
                Err(failed(name, CommandError::Status(problem)))
            }
        }
    }
}

impl Slots for CommandSlots {
    fn view(&mut self) -> Result<BootView, SlotError> {
        let (boot_id, running) = (self.boot_id.clone(), self.running);
        Ok(self.record()?.view(boot_id, running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        let free =
            self.staging
                .capacity()
                .map_err(staging_error("measure", 0, self.running.other()))?;
        Ok(self.capacity.map_or(free, |capacity| capacity.min(free)))
    }

    fn path(&self, _: SlotId) -> Option<PathBuf> {
        None
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        // Refused before the bootloader is told, where nothing confirmed would be left.
        self.record()?.clone().invalidate(spare).map_err(refused)?;
        self.make_unbootable(spare)?;
        self.record.update(|record| record.invalidate(spare))
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        if slot == self.running {
            return Err(SlotError::Refused {
                operation: "read the running slot",
                reason: "it belongs to the commands",
            });
        }
        self.staging
            .read(offset, buffer)
            .map_err(staging_error("read", offset, slot))
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let spare = self.spare();
        if self.record.get()?.slot(spare).state != SlotState::Unbootable {
            return Err(SlotError::Refused {
                operation: "stage an image",
                reason: "the spare slot is not marked unbootable",
            });
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if let Some(capacity) = self.capacity.filter(|capacity| end > *capacity) {
            return Err(SlotError::Bounds {
                slot: spare,
                capacity,
                offset,
                end,
            });
        }
        self.staging
            .write(offset, bytes)
            .map_err(staging_error("write", offset, spare))
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.staging.sync().map_err(staging_error("sync", 0, spare))
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.staging
            .forget_cached()
            .map_err(staging_error("drop the page cache of", 0, spare))
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let spare = self.spare();
        // Also where the last try was cut between two of the steps below.
        self.invalidate_spare()?;
        self.record()?
            .clone()
            .mark_trial(spare, image.clone(), tries)
            .map_err(refused)?;
        let done = self
            .write_and_activate(image, tries)
            .and_then(|()| self.expect_trial(spare));
        if let Err(error) = done {
            // Whatever the slot holds by now, it must not boot.
            if let Err(error) = self.invalidate_spare() {
                tracing::error!(
                    error = error_text(&error),
                    "The spare slot could not be marked unbootable after a failed installation."
                );
            }
            return Err(error);
        }
        if let Err(error) = self.staging.discard() {
            tracing::warn!(
                error = error_text(&error),
                "The staged image could not be removed."
            );
        }
        Ok(())
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let (running, spare) = (self.running, self.spare());
        self.record()?
            .clone()
            .confirm(running, floor)
            .map_err(refused)?;
        self.change(Name::Confirm, &[("FWPUSH_SLOT", running.to_string())], None)?;
        self.record
            .update(|record| record.confirm(running, floor))?;
        if self.record.get()?.slot(spare).state == SlotState::Unbootable {
            self.make_unbootable(spare)?;
        }
        Ok(())
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let running = self.running;
        if !self.record()?.clone().reject(running).map_err(refused)? {
            return Ok(());
        }
        self.make_unbootable(running)?;
        self.record.update(|record| record.reject(running))?;
        Ok(())
    }
}

/// The commands by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Status,
    Write,
    Activate,
    Confirm,
    Invalidate,
}

impl Name {
    fn as_str(self) -> &'static str {
        match self {
            Name::Status => "status",
            Name::Write => "write",
            Name::Activate => "activate",
            Name::Confirm => "confirm",
            Name::Invalidate => "invalidate",
        }
    }

    fn of(self, commands: &SlotCommands) -> Option<&SlotCommand> {
        match self {
            Name::Status => Some(&commands.status),
            Name::Write => Some(&commands.write),
            Name::Activate => commands.activate.as_ref(),
            Name::Confirm => Some(&commands.confirm),
            Name::Invalidate => Some(&commands.invalidate),
        }
    }
}

/// What `write` and `activate` are told.
fn facts(slot: SlotId, image: &ImageFacts, tries: u8) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("FWPUSH_SLOT", slot.to_string()),
        ("FWPUSH_TRIES", tries.to_string()),
        ("FWPUSH_VERSION", image.version.to_string()),
        (
            "FWPUSH_SECURITY_COUNTER",
            image.security_counter.to_string(),
        ),
        ("FWPUSH_IMAGE_SIZE", image.size.to_string()),
        // Standard input; to be opened again by its path where a tool wants one.
        ("FWPUSH_IMAGE_FD", "0".to_owned()),
    ];
    facts.extend(
        image
            .blake3
            .map(|id| ("FWPUSH_IMAGE_BLAKE3", id.to_string())),
    );
    facts.extend(
        image
            .release_id
            .map(|id| ("FWPUSH_RELEASE_ID", id.to_string())),
    );
    facts
}

/// A device that was never updated by us: what can boot was confirmed by whoever made it.
fn first_record(status: &Status, image: ImageFacts) -> BootRecord {
    let mut record = BootRecord::first(status.booted, image);
    let spare = status.booted.other();
    if matches!(status.slot(spare), Bootable::Good) {
        record.slots[spare as usize].state = SlotState::Confirmed;
    }
    record.slots = merge(&record, status);
    record
}

/// The record as `status` corrects it.
fn merge(record: &BootRecord, status: &Status) -> [SlotRecord; 2] {
    [SlotId::A, SlotId::B].map(|slot| {
        let held = record.slot(slot);
        let state = match (status.slot(slot), held.state) {
            (Bootable::Bad, _) => SlotState::Unbootable,
            (Bootable::Confirmed, _) => SlotState::Confirmed,
            (Bootable::Trial { tries_left }, held) => SlotState::Trial {
                tries_left: tries_left.unwrap_or(match held {
                    SlotState::Trial { tries_left } => tries_left,
                    SlotState::Unbootable | SlotState::Confirmed => 0,
                }),
            },
            // It was booted, but not by us: somebody else installed it and answers for it.
            (Bootable::Good, SlotState::Unbootable) if slot == status.booted => {
                SlotState::Confirmed
            }
            (Bootable::Good, held) => held,
        };
        SlotRecord {
            state,
            image: held.image.clone(),
        }
    })
}

fn read_status(settings: &CommandSlotsSettings) -> Result<Status, SlotError> {
    let environment = [("FWPUSH_COMMAND", Name::Status.as_str().to_owned())];
    let run = Run {
        command: &settings.commands.status,
        environment: &environment,
        input: None,
        stop: &settings.stop,
    };
    parse_status(&run.run().map_err(|error| failed(Name::Status, error))?)
}

fn parse_status(output: &[u8]) -> Result<Status, SlotError> {
    Status::parse(output).map_err(|problem| failed(Name::Status, CommandError::Status(problem)))
}

fn present_boot(status: &Status) -> Result<String, SlotError> {
    match &status.boot_id {
        Some(id) => Ok(id.clone()),
        None => boot_id(&CommandLine::default().boot_id),
    }
}

fn failed(name: Name, source: CommandError) -> SlotError {
    SlotError::Command {
        name: name.as_str(),
        source,
    }
}

fn refused(error: super::RecordError) -> SlotError {
    SlotError::Change(error)
}

fn staging_error(
    operation: &'static str,
    offset: u64,
    slot: SlotId,
) -> impl FnOnce(std::io::Error) -> SlotError {
    move |source| SlotError::Io {
        operation,
        slot,
        offset,
        source,
    }
}

#[cfg(test)]
mod tests;
