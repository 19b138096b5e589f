//! The images of the demo, and whether the devices have room for them.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use device_sim::faults;
use rand::Rng as _;

use super::limits;
use crate::{
    failure::{Doing as _, Failure, Result},
    output::bytes,
    values::ByteCount,
};

/// Writes `size` bytes that follow from the seed and the name. No group of them is empty or like another.
pub fn generate(dir: &Path, name: &str, size: u64, seed: u64) -> Result<PathBuf> {
    let path = dir.join(name);
    write(&path, name, size, seed).doing(|| format!("make the image {}", path.display()))?;
    Ok(path)
}

fn write(path: &Path, name: &str, size: u64, seed: u64) -> io::Result<()> {
    let mut random = faults::rng(seed, "image", &[name]);
    let mut file = File::create(path)?;
    let mut buffer = vec![0; limits::IMAGE_BUFFER_BYTES];
    let mut left = size;
    while left > 0 {
        random.fill_bytes(&mut buffer);
        let count = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        file.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    file.flush()
}

/// Size of an image that was named.
pub fn size_of(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path)
        .doing(|| format!("read {}", path.display()))
        .map_err(Failure::as_usage)?;
    match (metadata.is_file(), metadata.len()) {
        (true, size @ 1..) => Ok(size),
        (true, 0) => Err(Failure::usage(format!("{} is empty", path.display()))),
        (false, _) => Err(Failure::usage(format!("{} is not a file", path.display()))),
    }
}

/// Refuses a fleet whose images do not fit into memory beside `nodes` processes: each device has its own copy of each.
pub fn check_memory(devices: u32, image_bytes: u64, nodes: u32) -> Result<()> {
    // Where the system does not say, one has to try.
    match fs::read_to_string("/proc/meminfo")
        .ok()
        .as_deref()
        .and_then(available_memory)
    {
        Some(available) => {
            let nodes = u64::from(nodes) * limits::NODE_MEMORY_BYTES;
            check_fits(devices, image_bytes, available.saturating_sub(nodes))
        }
        None => Ok(()),
    }
}

fn check_fits(devices: u32, image_bytes: u64, available: u64) -> Result<()> {
    let of_each = image_bytes.saturating_add(limits::DEVICE_MEMORY_BYTES);
    let needed = of_each
        .saturating_mul(devices.into())
        .saturating_add(limits::SPARE_MEMORY_BYTES);
    if needed <= available {
        return Ok(());
    }
    let fitting = available.saturating_sub(limits::SPARE_MEMORY_BYTES) / u64::from(devices.max(1));
    let fitting = fitting.saturating_sub(limits::DEVICE_MEMORY_BYTES) & !0xffff;
    Err(Failure::usage(format!(
        "{devices} devices with {} of images each need {} of memory; {} are available",
        bytes(image_bytes),
        bytes(needed),
        bytes(available)
    ))
    .next(match fitting {
        0 => "Take fewer --devices.".to_owned(),
        fitting => format!(
            "Take fewer --devices, or at most --size {} for this many.",
            ByteCount(fitting)
        ),
    }))
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_image_and_no_group_is_zero() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, seed| {
            fs::read(generate(dir.path(), name, 3_000_001, seed).unwrap()).unwrap()
        };
        let image = make("a", 1);
        assert_eq!(image.len(), 3_000_001);
        assert_eq!(image, make("a", 1));
        assert_ne!(image, make("a", 2));
        assert_ne!(image, make("b", 1));
        let groups: std::collections::HashSet<_> = image.chunks(65_536).collect();
        assert_eq!(groups.len(), image.len().div_ceil(65_536));
        assert!(
            groups
                .iter()
                .all(|group| group.iter().any(|byte| *byte != 0))
        );
    }

    #[test]
    fn a_fleet_that_does_not_fit_is_refused_with_what_would() {
        assert!(check_fits(100, 8 << 20, 4 << 30).is_ok());
        let failure = check_fits(1_000, 8 << 20, 4 << 30).unwrap_err();
        assert_eq!(failure.exit(), crate::failure::Exit::Usage);
        let mut words = Vec::new();
        failure.report(&mut words).unwrap();
        let words = String::from_utf8(words).unwrap();
        let size = words
            .split("--size ")
            .nth(1)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap();
        let size: ByteCount = size.parse().unwrap();
        assert!(check_fits(1_000, size.0, 4 << 30).is_ok(), "{words}");
        assert!(check_fits(10_000, 1, 1 << 30).is_err());
    }

    #[test]
    fn available_memory_is_read_as_linux_writes_it() {
        let meminfo =
            "MemTotal:       24567890 kB\nMemFree:          123 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_memory(meminfo), Some(2 << 20));
        assert_eq!(available_memory("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn only_a_file_with_something_in_it_is_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fw.img");
        assert!(size_of(&file).is_err());
        assert!(size_of(dir.path()).is_err());
        fs::write(&file, "").unwrap();
        assert!(size_of(&file).is_err());
        fs::write(&file, "x").unwrap();
        assert_eq!(size_of(&file).unwrap(), 1);
    }
}
