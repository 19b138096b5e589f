//! What the agent asks of storage that has to survive a power cut: slots, boot record and state go through here.
//!
//! [`RealDisk`] is the operating system. The tests put a disk in its place that loses power at any write.

use std::{
    fmt::Debug,
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, SeekFrom},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Advice, OFlags};

#[cfg(test)]
pub(crate) mod sim;

/// Files and block devices by their paths.
pub(crate) trait Disk: Debug + Send + Sync {
    /// Opens what is there.
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Makes a file, mode 0600; an error if the path is taken. Its name is durable after [`Disk::sync_names`].
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Gives a file the name of another, which is gone then; at no moment is there neither.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Takes a name away; `NotFound` if there is none.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in the folder of `path` durable.
    fn sync_names(&self, path: &Path) -> io::Result<()>;
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    /// To write, and alone: a block device that a file system, swap or another device is on fails with EBUSY, and
    /// nothing can be put on it for as long as it is open. The kernel knows this over all mount namespaces.
    Exclusive,
}

/// An open file or block device.
pub(crate) trait DiskFile: Debug + Send + Sync {
    /// Reads exactly `buffer.len()` bytes; `UnexpectedEof` past the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The same from the medium, not from the page cache, as far as the file system can do that.
    fn read_medium_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Durable after [`DiskFile::sync`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Bytes of a file or block device.
    fn size(&self) -> io::Result<u64>;

    /// Makes a file longer with zeros, or shorter. Not for block devices.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Makes what was written durable. After an error nobody knows what is on the medium: read it again.
    fn sync(&self) -> io::Result<()>;

    /// Drops what the page cache holds; needs a [`DiskFile::sync`] before, as only clean pages can be dropped.
    fn forget_cached(&self) -> io::Result<()>;

    /// Which file or device this is, whatever its path says by now.
    fn identity(&self) -> io::Result<Identity>;
}

/// A file or block device, told apart from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A file: device number of its file system, and its inode.
    File { device: u64, inode: u64 },
    /// A block device by its number, whatever node it was opened through.
    BlockDevice { number: u64 },
}

impl Identity {
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::BlockDevice {
                number: metadata.rdev(),
            }
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }
}

/// Replaces a file as a whole, mode 0600: temporary file, fsync, rename, fsync of the directory. Whatever fails or is cut,
/// the old or the new content is there.
pub(crate) fn replace_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_added_extension("tmp");
    // A temporary file left by a cut may be of any content and mode.
    match disk.remove(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.create(&temporary)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    drop(file);
    disk.rename(&temporary, path)?;
    disk.sync_names(path)
}

/// The storage of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile::open(path, access)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile::create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_names(&self, path: &Path) -> io::Result<()> {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    }
}

/// A file or block device of this machine.
#[derive(Debug)]
pub(crate) struct RealFile(File);

/// O_DIRECT wants offsets, lengths and memory in multiples of the logical block size: 512 or 4,096 bytes.
const DIRECT_ALIGNMENT: usize = 4096;

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn read_medium_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self.read_direct(buffer, offset) {
            // Not every file system has it. What is read then was dropped from the page cache by `forget_cached`.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
            {
                self.read_at(buffer, offset)
            }
            result => result,
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        // The metadata of a block device say 0.
        (&self.0).seek(SeekFrom::End(0))
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_len(size)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn forget_cached(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.0, 0, None, Advice::DontNeed)?)
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&self.0.metadata()?))
    }
}

impl RealFile {
    pub(crate) fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access != Access::Read);
        // Without O_CREAT, O_EXCL has a meaning for block devices only.
        if access == Access::Exclusive && fs::metadata(path)?.file_type().is_block_device() {
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        Ok(Self(options.open(path)?))
    }

    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Ok(Self(options.open(path)?))
    }

    /// The same file, whatever its name is by now.
    pub(crate) fn same(&self, access: Access) -> io::Result<Self> {
        Self::open(&self.here(), access)
    }

    /// The same file, open from its beginning and for reading only.
    pub(crate) fn reader(&self, flags: OFlags) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits() as i32)
            .open(self.here())
    }

    /// Leads to this very file, also when it has no name any more.
    fn here(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// Reads with O_DIRECT. The kernel writes dirty pages of the range out first, then asks the medium.
    fn read_direct(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let file = self.reader(OFlags::DIRECT)?;
        let alignment = DIRECT_ALIGNMENT as u64;
        let start = offset - offset % alignment;
        let skip = (offset - start) as usize;
        let wanted = skip + buffer.len();
        let length = wanted.next_multiple_of(DIRECT_ALIGNMENT);
        let mut memory = vec![0; length + DIRECT_ALIGNMENT];
        let at = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        let aligned = &mut memory[at..at + length];
        let mut filled = 0;
        while filled < wanted {
            match file.read_at(&mut aligned[filled..], start + filled as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        buffer.copy_from_slice(&aligned[skip..wanted]);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
