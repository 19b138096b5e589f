//! The image on its way to a command: one file in a private directory, open from its first byte until it is handed over.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use fwpush_keys::id::FileId;
use rustix::fs::OFlags;

use super::super::SlotError;
use crate::{
    disk::{Access, Disk as _, DiskFile as _, RealDisk, RealFile},
    limits,
};

const IMAGE: &str = "image";

/// The staging directory and the image in it.
#[derive(Debug)]
pub(super) struct Staging {
    folder: PathBuf,
    /// Open once, and never looked up by its name again: another file under this name changes nothing.
    image: Option<RealFile>,
    /// False from when it is handed over: RAUC, for one, insists that nobody can write a bundle while it reads it.
    writable: bool,
}

impl Staging {
    /// Makes the directory, mode 0700, if it is missing. One that others may enter, or that is not ours, is refused.
    pub(super) fn open(folder: &Path) -> Result<Self, SlotError> {
        let failed = |source| SlotError::File {
            operation: "make the staging directory",
            path: folder.into(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed)?;
        let metadata = fs::symlink_metadata(folder).map_err(failed)?;
        let ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if !metadata.is_dir() || !ours || metadata.mode() & 0o077 != 0 {
            let problem = "it must be a directory of the agent's user with mode 0700";
            return Err(failed(io::Error::new(
                io::ErrorKind::PermissionDenied,
                problem,
            )));
        }
        Ok(Self {
            folder: folder.into(),
            image: None,
            writable: false,
        })
    }

    fn path(&self) -> PathBuf {
        self.folder.join(IMAGE)
    }

    /// The staged image; what an earlier process left is taken up.
    fn image(&mut self) -> io::Result<&RealFile> {
        let file = match self.image.take() {
            Some(file) => file,
            None => {
                self.writable = true;
                self.open_or_create()?
            }
        };
        Ok(self.image.insert(file))
    }

    /// The same to be written.
    fn writable(&mut self) -> io::Result<&RealFile> {
        self.image()?;
        if !self.writable {
            let same = self.image()?.same(Access::Write)?;
            self.image = Some(same);
            self.writable = true;
        }
        self.image()
    }

    fn open_or_create(&self) -> io::Result<RealFile> {
        match RealFile::open(&self.path(), Access::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = RealFile::create(&self.path())?;
                RealDisk.sync_names(&self.path())?;
                Ok(file)
            }
            opened => opened,
        }
    }

    /// Reads past the page cache; bytes past the end of the file are zeros, as [`Staging::finish`] makes them.
    pub(super) fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let file = self.image()?;
        let there = file.size()?.saturating_sub(offset);
        let length = usize::try_from(there)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (held, beyond) = buffer.split_at_mut(length);
        beyond.fill(0);
        match held {
            [] => Ok(()),
            held => file.read_medium_at(held, offset),
        }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writable()?.write_at(bytes, offset)
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.image()?.sync()
    }

    pub(super) fn forget_cached(&mut self) -> io::Result<()> {
        let file = self.image()?;
        file.sync()?;
        file.forget_cached()
    }

    /// Bytes that fit: free ones, and those of the present image, less what the state directory may need.
    pub(super) fn capacity(&mut self) -> io::Result<u64> {
        let free = rustix::fs::statvfs(&self.folder)?;
        let held = match fs::metadata(self.path()) {
            Ok(metadata) => metadata.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        Ok((free + held).saturating_sub(limits::STAGING_RESERVE_BYTES))
    }

    /// Gives the file the image's exact size, durably, and a descriptor of it that cannot write. None that can is left open.
    pub(super) fn finish(&mut self, size: u64) -> io::Result<File> {
        let file = self.writable()?;
        if file.size()? != size {
            file.set_size(size)?;
        }
        file.sync()?;
        self.image = Some(file.same(Access::Read)?);
        self.writable = false;
        self.image()?.reader(OFlags::empty())
    }

    /// The BLAKE3 of what the file holds now.
    pub(super) fn hash(&mut self) -> io::Result<FileId> {
        let file = self.image()?;
        let size = file.size()?;
        let mut builder = fwpush_keys::outline::OutlineBuilder::new();
        let mut buffer = vec![0; limits::SCAN_BYTES];
        let mut offset = 0;
        while offset < size {
            let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
            let piece = left.min(limits::SCAN_BYTES);
            file.read_at(&mut buffer[..piece], offset)?;
            builder.update(&buffer[..piece]);
            offset += piece as u64;
        }
        Ok(builder.finish().root())
    }

    /// Frees the space.
    pub(super) fn discard(&mut self) -> io::Result<()> {
        self.image = None;
        match RealDisk.remove(&self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}
