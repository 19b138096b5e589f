//! Two block devices, or two files, and a boot record.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    BootRecord, BootView, CommandLine, ImageFacts, RecordFile, SlotError, SlotId, SlotState, Slots,
    boot::{Boot, EmulatedBoot},
    in_use::Kernel,
};
use crate::disk::{Access, Disk, DiskFile, Identity, RealDisk};

/// Where the slots are, and who boots them.
#[derive(Debug, Clone)]
pub struct FileSlotsSettings {
    /// Block devices or files for slots a and b.
    pub paths: [PathBuf; 2],
    /// Bytes that an image may have: a file grows to it before it is written. `None`: what the smaller device has, for
    /// block devices only.
    pub capacity: Option<u64>,
    pub boot_record: PathBuf,
    pub bootloader: Bootloader,
    /// What the running slot holds when there is no boot record yet.
    pub first_image: ImageFacts,
}

/// Who reads the boot record and chooses the slot.
#[derive(Debug, Clone)]
pub enum Bootloader {
    /// The agent itself, for a bench and for tests: see [`FileSlots::emulate_boot`]. Not for block devices.
    Emulated,
    /// A bootloader, which names the slot that it booted on the kernel command line.
    Real(CommandLine),
}

/// Slots in two block devices or files.
///
/// The running slot is opened to be read. The spare is opened when it is first needed, exclusively, after it was made sure
/// that nothing is mounted from it or built on it; it is read past the page cache.
#[derive(Debug)]
pub struct FileSlots {
    disk: Arc<dyn Disk>,
    kernel: Kernel,
    paths: [PathBuf; 2],
    capacity: u64,
    record: RecordFile,
    /// `None`: a real bootloader.
    emulated: Option<EmulatedBoot>,
    boot: Boot,
    running: Box<dyn DiskFile>,
    spare: Option<Box<dyn DiskFile>>,
}

impl FileSlots {
    /// Opens the slots. Without a boot record the device has never been updated: the running slot is confirmed in a new
    /// one. With [`Bootloader::Emulated`] that is slot a, and files that are missing are made.
    pub fn open(settings: FileSlotsSettings) -> Result<Self, SlotError> {
        Self::open_on(Arc::new(RealDisk), settings)
    }

    pub(crate) fn open_on(
        disk: Arc<dyn Disk>,
        settings: FileSlotsSettings,
    ) -> Result<Self, SlotError> {
        let record = RecordFile::open(&disk, &settings.boot_record)?;
        let emulated = match &settings.bootloader {
            Bootloader::Emulated => Some(EmulatedBoot::beside(&settings.boot_record)),
            Bootloader::Real(_) => None,
        };
        if emulated.is_some() && record.is_none() {
            for path in &settings.paths {
                create_slot(&*disk, path, settings.capacity)?;
            }
        }
        let slots = [0, 1].map(|slot| open_file(&*disk, &settings.paths[slot], Access::Read));
        let [a, b] = slots;
        let [a, b] = [a?, b?];
        refuse_unusable(&[&*a, &*b], &settings)?;
        let capacity = match settings.capacity {
            Some(capacity) => capacity,
            None => size_of(&*a, &settings.paths[0])?.min(size_of(&*b, &settings.paths[1])?),
        };
        let booted = match (&settings.bootloader, &emulated) {
            (Bootloader::Real(command_line), _) => Some(command_line.read()?),
            (Bootloader::Emulated, emulated) => match emulated {
                Some(emulated) => emulated.read()?,
                None => None,
            },
        };
        let mut record = match record {
            Some(record) => record,
            None => {
                let running = booted.as_ref().map_or(SlotId::A, |boot| boot.running);
                let first = BootRecord::first(running, settings.first_image);
                RecordFile::create(&disk, &settings.boot_record, &first)?
            }
        };
        let boot = match (booted, &emulated) {
            (Some(boot), _) => boot,
            (None, Some(emulated)) => choose(&mut record, emulated, &*disk)?,
            (None, None) => return Err(refused("boot", "nothing says which slot was booted")),
        };
        let running = match boot.running {
            SlotId::A => a,
            SlotId::B => b,
        };
        Ok(Self {
            disk,
            kernel: Kernel::default(),
            paths: settings.paths,
            capacity,
            record,
            emulated,
            boot,
            running,
            spare: None,
        })
    }

    /// What the boot record and the present boot say; makes and writes nothing. `None`: there is no boot record.
    pub fn look(settings: &FileSlotsSettings) -> Result<Option<BootView>, SlotError> {
        let Some(record) = RecordFile::look(&RealDisk, &settings.boot_record)? else {
            return Ok(None);
        };
        let boot = match &settings.bootloader {
            Bootloader::Real(command_line) => command_line.read()?,
            Bootloader::Emulated => {
                let nothing = Boot {
                    id: String::new(),
                    running: record.preferred,
                };
                EmulatedBoot::beside(&settings.boot_record)
                    .read()?
                    .unwrap_or(nothing)
            }
        };
        Ok(Some(record.view(boot.id, boot.running)))
    }

    /// Whether the agent plays the bootloader.
    pub fn is_emulated(&self) -> bool {
        self.emulated.is_some()
    }

    /// Plays the bootloader: takes a trial boot or the confirmed slot, and starts a boot with a new id. Returns the slot
    /// that runs now; fails when both slots are bad, and where a real bootloader boots.
    pub fn emulate_boot(&mut self) -> Result<SlotId, SlotError> {
        let Some(emulated) = &self.emulated else {
            return Err(refused("boot", "a real bootloader boots this device"));
        };
        let boot = choose(&mut self.record, emulated, &*self.disk)?;
        let path = &self.paths[boot.running as usize];
        self.running = open_file(&*self.disk, path, Access::Read)?;
        self.spare = None;
        self.boot = boot;
        Ok(self.boot.running)
    }

    fn spare_id(&self) -> SlotId {
        self.boot.running.other()
    }

    /// The spare, opened and found free for us.
    fn spare(&mut self) -> Result<&dyn DiskFile, SlotError> {
        let spare = self.spare_id();
        let file = match self.spare.take() {
            Some(file) => file,
            None => self.open_spare(spare)?,
        };
        Ok(&**self.spare.insert(file))
    }

    fn open_spare(&self, spare: SlotId) -> Result<Box<dyn DiskFile>, SlotError> {
        let path = &self.paths[spare as usize];
        let file = open_file(&*self.disk, path, Access::Read)?;
        let identity = file.identity().map_err(failed("look at slot", path))?;
        if identity == identity_of(&*self.running, &self.paths[self.boot.running as usize])? {
            return Err(refused("use the spare slot", "it is the running one"));
        }
        let user = self
            .kernel
            .user_of(identity)
            .map_err(failed("ask who uses slot", path))?;
        if let Some(user) = user {
            return Err(SlotError::InUse {
                slot: spare,
                path: path.clone(),
                user,
            });
        }
        let exclusive = match self.disk.open(path, Access::Exclusive) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                return Err(SlotError::InUse {
                    slot: spare,
                    path: path.clone(),
                    user: "the kernel says so; it may be mounted in a container".into(),
                });
            }
            opened => opened.map_err(failed("open slot", path))?,
        };
        if exclusive.identity().map_err(failed("look at slot", path))? != identity {
            return Err(refused(
                "use the spare slot",
                "its path named another file a moment ago",
            ));
        }
        Ok(exclusive)
    }

    fn check_bounds(&self, slot: SlotId, offset: u64, length: usize) -> Result<(), SlotError> {
        let (capacity, end) = (self.capacity, offset.saturating_add(length as u64));
        if end > capacity {
            return Err(SlotError::Bounds {
                slot,
                capacity,
                offset,
                end,
            });
        }
        Ok(())
    }
}

impl Slots for FileSlots {
    fn view(&mut self) -> Result<BootView, SlotError> {
        let boot = self.boot.clone();
        Ok(self.record.get()?.view(boot.id, boot.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        let path = &self.paths[self.spare_id() as usize];
        let file = open_file(&*self.disk, path, Access::Read)?;
        match identity_of(&*file, path)? {
            Identity::BlockDevice { .. } => Ok(size_of(&*file, path)?.min(self.capacity)),
            Identity::File { .. } => Ok(self.capacity),
        }
    }

    fn path(&self, slot: SlotId) -> Option<PathBuf> {
        Some(self.paths[slot as usize].clone())
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let (spare, capacity) = (self.spare_id(), self.capacity);
        // Refused when it is in use, before the record gives it up.
        self.spare()?;
        self.record.update(|record| record.invalidate(spare))?;
        let file = self.spare()?;
        let grow = |file: &dyn DiskFile| {
            let is_file = matches!(file.identity()?, Identity::File { .. });
            if is_file && file.size()? < capacity {
                file.set_size(capacity)?;
            }
            Ok(())
        };
        grow(file).map_err(io_error("grow", spare, capacity))
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        if slot == self.boot.running {
            return self
                .running
                .read_at(buffer, offset)
                .map_err(io_error("read", slot, offset));
        }
        // Whatever the page cache holds of the spare does not count.
        self.spare()?
            .read_medium_at(buffer, offset)
            .map_err(io_error("read", slot, offset))
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let spare = self.spare_id();
        if self.record.get()?.slot(spare).state != SlotState::Unbootable {
            return Err(refused(
                "write the spare slot",
                "it is not marked unbootable",
            ));
        }
        self.check_bounds(spare, offset, bytes.len())?;
        self.spare()?
            .write_at(bytes, offset)
            .map_err(io_error("write", spare, offset))
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare_id();
        self.spare()?.sync().map_err(io_error("sync", spare, 0))
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare_id();
        // Only clean pages can be dropped, hence the sync before.
        self.sync_spare()?;
        self.spare()?
            .forget_cached()
            .map_err(io_error("drop the page cache of", spare, 0))
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let spare = self.spare_id();
        let path = self.paths[spare as usize].clone();
        let verified = identity_of(self.spare()?, &path)?;
        // The bootloader goes by the path, not by our open file.
        let named = open_file(&*self.disk, &path, Access::Read)?;
        if identity_of(&*named, &path)? != verified {
            return Err(refused(
                "mark the spare slot for trial",
                "its path names another file than the one that was verified",
            ));
        }
        self.record.update(|record| {
            record
                .mark_trial(spare, image.clone(), tries)
                .map(|()| true)
        })
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let running = self.boot.running;
        self.record.update(|record| record.confirm(running, floor))
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let running = self.boot.running;
        self.record.update(|record| record.reject(running))
    }
}

/// What the emulated bootloader does.
fn choose(
    record: &mut RecordFile,
    emulated: &EmulatedBoot,
    disk: &dyn Disk,
) -> Result<Boot, SlotError> {
    let mut booted = None;
    record.update(|record| {
        let before = record.clone();
        booted = record.boot();
        Ok(*record != before)
    })?;
    let running = booted.ok_or_else(|| refused("boot", "neither slot is confirmed or on trial"))?;
    emulated.begin(disk, running)
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> SlotError + use<'a> {
    move |source| SlotError::File {
        operation,
        path: path.into(),
        source,
    }
}

fn io_error(
    operation: &'static str,
    slot: SlotId,
    offset: u64,
) -> impl FnOnce(std::io::Error) -> SlotError {
    move |source| SlotError::Io {
        operation,
        slot,
        offset,
        source,
    }
}

fn refused(operation: &'static str, reason: &'static str) -> SlotError {
    SlotError::Refused { operation, reason }
}

fn open_file(disk: &dyn Disk, path: &Path, access: Access) -> Result<Box<dyn DiskFile>, SlotError> {
    disk.open(path, access).map_err(failed("open slot", path))
}

fn identity_of(file: &dyn DiskFile, path: &Path) -> Result<Identity, SlotError> {
    file.identity().map_err(failed("look at slot", path))
}

fn size_of(file: &dyn DiskFile, path: &Path) -> Result<u64, SlotError> {
    file.size().map_err(failed("measure slot", path))
}

/// Makes the file of a slot if there is none.
fn create_slot(disk: &dyn Disk, path: &Path, capacity: Option<u64>) -> Result<(), SlotError> {
    let file = match disk.create(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(source) => return Err(failed("create slot", path)(source)),
    };
    file.set_size(capacity.unwrap_or(0))
        .and_then(|()| file.sync())
        .and_then(|()| disk.sync_names(path))
        .map_err(failed("size slot", path))
}

fn refuse_unusable(
    files: &[&dyn DiskFile; 2],
    settings: &FileSlotsSettings,
) -> Result<(), SlotError> {
    let paths = &settings.paths;
    let [a, b] = [
        identity_of(files[0], &paths[0])?,
        identity_of(files[1], &paths[1])?,
    ];
    // One file as both slots would have the running image overwritten.
    if a == b {
        return Err(refused("open the slots", "both paths name the same file"));
    }
    for identity in [a, b] {
        match identity {
            Identity::File { .. } if settings.capacity.is_none() => {
                return Err(refused(
                    "open the slots",
                    "a slot in a file needs its size: set slots.capacity_bytes",
                ));
            }
            // A board whose configuration forgot to say who boots would never reboot into its new image.
            Identity::BlockDevice { .. } if matches!(settings.bootloader, Bootloader::Emulated) => {
                return Err(refused(
                    "open the slots",
                    "slots on block devices are booted by a bootloader: set slots.boot = \"kernel-cmdline\"",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
