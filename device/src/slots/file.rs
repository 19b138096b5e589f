//! Two files, or two block devices, and a boot record.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{BootRecord, BootView, ImageFacts, RecordFile, SlotError, SlotId, SlotState, Slots};

/// Where the slots are.
#[derive(Debug, Clone)]
pub struct FileSlotsSettings {
    /// Files or block devices for slots a and b. Missing files are made when the boot record is made.
    pub paths: [PathBuf; 2],
    /// Bytes that an image may have. A file grows to it before it is written; a block device must have it.
    pub capacity: u64,
    pub boot_record: PathBuf,
    /// What slot a holds when there is no boot record yet.
    pub first_image: ImageFacts,
}

/// Slots in two files or block devices, with the agent playing the bootloader ([`FileSlots::emulate_boot`]): for a bench
/// and the tests. The present boot is kept in a file beside the boot record, as a kernel would keep it in memory, so
/// that a restart of the process is no boot.
#[derive(Debug)]
pub struct FileSlots {
    paths: [PathBuf; 2],
    files: [File; 2],
    capacity: u64,
    record: RecordFile,
    boot: Boot,
    boot_path: PathBuf,
}

/// The present boot.
#[derive(Debug, Clone)]
struct Boot {
    id: String,
    running: SlotId,
}

impl FileSlots {
    /// Opens the slots and makes what is missing: without a boot record the device has never been updated, so slot a
    /// runs and is confirmed. A boot record whose slots are missing is an error.
    pub fn open(settings: FileSlotsSettings) -> Result<Self, SlotError> {
        let record = RecordFile::open(&settings.boot_record)?;
        let new = record.is_none();
        let [a, b] = &settings.paths;
        let files = [
            open_slot(a, new, settings.capacity)?,
            open_slot(b, new, settings.capacity)?,
        ];
        refuse_one_file_twice(&files, &settings.paths)?;
        let boot_path = settings.boot_record.with_added_extension("running");
        let record = match record {
            Some(record) => record,
            None => RecordFile::create(
                &settings.boot_record,
                &BootRecord::first(SlotId::A, settings.first_image),
            )?,
        };
        let boot = read_boot(&boot_path)?;
        let mut slots = Self {
            paths: settings.paths,
            files,
            capacity: settings.capacity,
            record,
            // Replaced at once where no boot is known.
            boot: boot.clone().unwrap_or(Boot {
                id: String::new(),
                running: SlotId::A,
            }),
            boot_path,
        };
        if boot.is_none() {
            slots.emulate_boot()?;
        }
        Ok(slots)
    }

    /// What the boot record and the present boot say; makes and writes nothing. `None`: there is no boot record.
    pub fn look(boot_record: &Path) -> Result<Option<BootView>, SlotError> {
        let Some(record) = RecordFile::look(boot_record)? else {
            return Ok(None);
        };
        let boot = read_boot(&boot_record.with_added_extension("running"))?;
        let boot = boot.unwrap_or(Boot {
            id: String::new(),
            running: record.preferred,
        });
        Ok(Some(record.view(boot.id, boot.running)))
    }

    /// Plays the bootloader: takes a trial boot or the confirmed slot, and starts a boot with a new id. Returns the slot
    /// that runs now; fails when both slots are bad.
    pub fn emulate_boot(&mut self) -> Result<SlotId, SlotError> {
        let mut booted = None;
        self.record.update(|record| {
            let before = record.clone();
            booted = record.boot();
            Ok(*record != before)
        })?;
        let running = booted.ok_or(SlotError::Refused {
            operation: "boot",
            reason: "neither slot is confirmed or on trial",
        })?;
        let boot = Boot {
            id: format!("{:032x}", rand::random::<u128>()),
            running,
        };
        let line = format!("{} {}\n", boot.id, boot.running);
        crate::store::replace_file(&self.boot_path, line.as_bytes()).map_err(|source| {
            SlotError::File {
                operation: "write",
                path: self.boot_path.clone(),
                source,
            }
        })?;
        self.boot = boot;
        Ok(running)
    }

    fn spare(&self) -> SlotId {
        self.boot.running.other()
    }

    fn file(&self, slot: SlotId) -> &File {
        &self.files[slot as usize]
    }

    /// The bytes a slot has now, and an error unless `offset..offset + length` lies within.
    fn check_bounds(
        &self,
        slot: SlotId,
        offset: u64,
        length: usize,
        capacity: u64,
    ) -> Result<(), SlotError> {
        let end = offset.saturating_add(length as u64);
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

    fn io(operation: &'static str, slot: SlotId, offset: u64) -> impl Fn(io::Error) -> SlotError {
        move |source| SlotError::Io {
            operation,
            slot,
            offset,
            source,
        }
    }
}

impl Slots for FileSlots {
    fn view(&mut self) -> Result<BootView, SlotError> {
        let boot = self.boot.clone();
        Ok(self.record.get()?.view(boot.id, boot.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        let spare = self.spare();
        let io = Self::io("measure", spare, 0);
        let metadata = self.file(spare).metadata().map_err(&io)?;
        if metadata.file_type().is_block_device() {
            let mut device = self.file(spare);
            return Ok(device
                .seek(SeekFrom::End(0))
                .map_err(&io)?
                .min(self.capacity));
        }
        Ok(self.capacity)
    }

    fn path(&self, slot: SlotId) -> Option<PathBuf> {
        Some(self.paths[slot as usize].clone())
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.record.update(|record| record.invalidate(spare))?;
        let io = Self::io("grow", spare, self.capacity);
        let metadata = self.file(spare).metadata().map_err(&io)?;
        if metadata.is_file() && metadata.len() < self.capacity {
            self.file(spare).set_len(self.capacity).map_err(&io)?;
        }
        Ok(())
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        self.file(slot)
            .read_exact_at(buffer, offset)
            .map_err(Self::io("read", slot, offset))
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let spare = self.spare();
        if self.record.get()?.slot(spare).state != SlotState::Unbootable {
            return Err(SlotError::Refused {
                operation: "write the spare slot",
                reason: "it is not marked unbootable",
            });
        }
        self.check_bounds(spare, offset, bytes.len(), self.capacity)?;
        self.file(spare)
            .write_all_at(bytes, offset)
            .map_err(Self::io("write", spare, offset))
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.file(spare)
            .sync_data()
            .map_err(Self::io("sync", spare, 0))
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.sync_spare()?;
        // Only clean pages can be dropped, hence the sync before.
        rustix::fs::fadvise(self.file(spare), 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|errno| Self::io("drop the page cache of", spare, 0)(errno.into()))
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let spare = self.spare();
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

fn open_slot(path: &Path, create: bool, capacity: u64) -> Result<File, SlotError> {
    let failed = |operation| {
        move |source| SlotError::File {
            operation,
            path: path.into(),
            source,
        }
    };
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound && create => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path);
            let file = file.map_err(failed("create slot"))?;
            file.set_len(capacity)
                .and_then(|()| file.sync_all())
                .map_err(failed("size slot"))?;
            Ok(file)
        }
        Err(source) => Err(failed("open slot")(source)),
    }
}

/// One file as both slots would have the running image overwritten.
fn refuse_one_file_twice(files: &[File; 2], paths: &[PathBuf; 2]) -> Result<(), SlotError> {
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| SlotError::File {
            operation: "look at slot",
            path,
            source,
        }
    };
    let a = files[0].metadata().map_err(failed(&paths[0]))?;
    let b = files[1].metadata().map_err(failed(&paths[1]))?;
    let same_device =
        a.file_type().is_block_device() && b.file_type().is_block_device() && a.rdev() == b.rdev();
    if same_device || (a.dev(), a.ino()) == (b.dev(), b.ino()) {
        return Err(SlotError::Refused {
            operation: "open the slots",
            reason: "both paths name the same file",
        });
    }
    Ok(())
}

/// The present boot of the emulated bootloader; `None` when nothing was booted yet.
fn read_boot(path: &Path) -> Result<Option<Boot>, SlotError> {
    let failed = |source| SlotError::File {
        operation: "read",
        path: path.into(),
        source,
    };
    let line = match std::fs::read_to_string(path) {
        Ok(line) => line,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let boot = match line.trim().split_once(' ') {
        Some((id, "a")) => Boot {
            id: id.to_owned(),
            running: SlotId::A,
        },
        Some((id, "b")) => Boot {
            id: id.to_owned(),
            running: SlotId::B,
        },
        _ => {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidData,
                "it does not name a boot and a slot",
            )));
        }
    };
    Ok(Some(boot))
}

#[cfg(test)]
mod tests;
