//! Who else uses what a slot lies on: asked of the kernel before the spare is written (invariant 8).

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::disk::Identity;

/// Where the kernel tells what it does: `/proc` and `/sys`.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl Kernel {
    /// Who uses a slot, for people: `it is mounted at /mnt`. `None`: nobody that can be seen from here. A file system that
    /// is mounted in another mount namespace only is not; a block device is opened exclusively for that.
    pub(crate) fn user_of(&self, slot: Identity) -> io::Result<Option<String>> {
        let numbers = match slot {
            // A file system lies on a file through a loop device only.
            Identity::File { .. } => BTreeSet::new(),
            Identity::BlockDevice { number } => self.overlapping(number)?,
        };
        let is_slot = |path: &Path| {
            fs::metadata(path).is_ok_and(|metadata| match Identity::of(&metadata) {
                Identity::BlockDevice { number } => numbers.contains(&number),
                file => file == slot,
            })
        };
        if let Some(mount_point) = self.mount_point(&numbers, is_slot)? {
            return Ok(Some(format!("it is mounted at {}", mount_point.display())));
        }
        for number in &numbers {
            // Device mapper (verity, crypt, LVM) and md.
            let holders = self.of_block_device(*number).join("holders");
            if let Some(holder) = names(&holders)?.pop() {
                return Ok(Some(format!("the device {holder} is built on it")));
            }
        }
        for name in names(&self.sys.join("block"))? {
            let backing = self.sys.join("block").join(&name).join("loop/backing_file");
            let Some(path) = read_if_there(&backing)? else {
                continue;
            };
            if is_slot(&path_from(path.trim_ascii_end().to_vec())) {
                return Ok(Some(format!("the loop device {name} is built on it")));
            }
        }
        let swaps = read_if_there(&self.proc.join("swaps"))?.unwrap_or_default();
        for line in swaps.split(|byte| *byte == b'\n').skip(1) {
            let path = line.split(u8::is_ascii_whitespace).next().unwrap_or(line);
            if !path.is_empty() && is_slot(&path_from(unescape(path))) {
                return Ok(Some("it is swap space".into()));
            }
        }
        Ok(None)
    }

    /// Whether a file or folder lies on a slot: on the file system in it, or on anything that is built on it.
    pub(crate) fn lies_on(&self, path: &Path, slot: Identity) -> io::Result<bool> {
        let below = match slot {
            Identity::File { .. } => BTreeSet::new(),
            Identity::BlockDevice { number } => self.overlapping(number)?,
        };
        let mut seen = BTreeSet::new();
        let mut found = self.devices_of(path)?;
        while let Some(number) = found.pop() {
            if below.contains(&number) {
                return Ok(true);
            }
            if !seen.insert(number) {
                continue;
            }
            let folder = self.of_block_device(number);
            for slave in names(&folder.join("slaves"))? {
                found.extend(read_number(&folder.join("slaves").join(slave).join("dev"))?);
            }
            if let Some(backing) = read_if_there(&folder.join("loop/backing_file"))? {
                let backing = path_from(backing.trim_ascii_end().to_vec());
                match fs::metadata(&backing) {
                    Ok(metadata) if Identity::of(&metadata) == slot => return Ok(true),
                    Ok(metadata) => {
                        found.push(metadata.rdev());
                        found.extend(self.devices_of(&backing)?);
                    }
                    // Deleted, or out of sight.
                    Err(_) => {}
                }
            }
        }
        Ok(false)
    }

    /// The device of a path's file system, and the one that it was mounted from: btrfs has numbers of its own.
    fn devices_of(&self, path: &Path) -> io::Result<Vec<u64>> {
        let device = fs::metadata(path)?.dev();
        let mut devices = vec![device];
        let mounts = fs::read(self.proc.join("self/mountinfo"))?;
        for line in mounts.split(|byte| *byte == b'\n') {
            let fields: Vec<_> = line.split(|byte| *byte == b' ').collect();
            let number = fields.get(2).and_then(|number| parse_number(number));
            let source = fields
                .iter()
                .position(|field| *field == b"-")
                .and_then(|dash| fields.get(dash + 2))
                .filter(|source| number == Some(device) && source.starts_with(b"/"));
            let Some(source) = source else { continue };
            let metadata = fs::metadata(path_from(unescape(source)));
            devices.extend(metadata.ok().map(|metadata| metadata.rdev()));
        }
        Ok(devices)
    }

    /// A device, its partitions, and the disk that it is a partition of: they share bytes.
    fn overlapping(&self, number: u64) -> io::Result<BTreeSet<u64>> {
        let mut numbers = BTreeSet::from([number]);
        let folder = self.of_block_device(number);
        for name in names(&folder)? {
            let child = folder.join(name);
            if child.join("partition").exists() {
                numbers.extend(read_number(&child.join("dev"))?);
            }
        }
        if folder.join("partition").exists() {
            // The entry is a symbolic link into the device tree: its parent is the disk.
            numbers.extend(read_number(&fs::canonicalize(&folder)?.join("../dev"))?);
        }
        Ok(numbers)
    }

    fn of_block_device(&self, number: u64) -> PathBuf {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        self.sys.join(format!("dev/block/{major}:{minor}"))
    }

    /// Where one of these devices is mounted, from proc(5), `/proc/self/mountinfo`. Some file systems (btrfs) have a device
    /// number of their own there: then the mount's source counts.
    fn mount_point(
        &self,
        numbers: &BTreeSet<u64>,
        is_slot: impl Fn(&Path) -> bool,
    ) -> io::Result<Option<PathBuf>> {
        let mounts = fs::read(self.proc.join("self/mountinfo"))?;
        for line in mounts.split(|byte| *byte == b'\n') {
            let fields: Vec<_> = line.split(|byte| *byte == b' ').collect();
            let [_, _, number, _, mount_point, ..] = fields[..] else {
                continue;
            };
            let by_number = parse_number(number).is_some_and(|number| numbers.contains(&number));
            let source = fields
                .iter()
                .position(|field| *field == b"-")
                .and_then(|dash| fields.get(dash + 2));
            let by_source = source.is_some_and(|source| {
                source.starts_with(b"/") && is_slot(&path_from(unescape(source)))
            });
            if by_number || by_source {
                return Ok(Some(path_from(unescape(mount_point))));
            }
        }
        Ok(None)
    }
}

/// The names in a folder; none if there is no such folder.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// What the kernel says in a file; devices come and go while one looks.
fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) || error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn read_number(path: &Path) -> io::Result<Option<u64>> {
    Ok(read_if_there(path)?.and_then(|text| parse_number(text.trim_ascii())))
}

/// `8:1`.
fn parse_number(text: &[u8]) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some(rustix::fs::makedev(
        major.parse().ok()?,
        minor.parse().ok()?,
    ))
}

/// Undoes `\040` and the like.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

fn path_from(bytes: Vec<u8>) -> PathBuf {
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests;
