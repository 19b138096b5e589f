//! The directory of a cache, as it is found at the start.

use std::{
    fs::{self, File},
    io,
    path::Path,
    time::SystemTime,
};

use fwpush_keys::{id::FileId, outline::Outline};

use super::{
    StoreError,
    arrival::FETCHED,
    cache::Cache,
    local::{LocalStore, OUTLINE, make_dir},
};

/// Locked while a server runs, and what a cache is known by.
const LOCK: &str = "fwpush-cache.lock";

/// Takes the cache's directory, making it (mode 0700). One that holds anything and is no cache is refused as it is; so is one that
/// another server uses.
pub(super) fn take_dir(dir: &Path) -> Result<File, StoreError> {
    make_dir(dir).map_err(StoreError::Open)?;
    let path = dir.join(LOCK);
    if !path.is_file() && !is_empty(dir).map_err(StoreError::Open)? {
        return Err(StoreError::NoCache {
            path: dir.to_owned(),
        });
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(StoreError::Open)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::CacheInUse {
            path: dir.to_owned(),
        }),
        Err(fs::TryLockError::Error(error)) => Err(StoreError::Open(error)),
    }
}

/// But for what a new file system has, and for the lock of a server that starts at this moment.
fn is_empty(dir: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name != "lost+found" && name != LOCK {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Enters what is in the directory, the oldest first, and removes what cannot be a whole file. Nothing is read: a file is hashed
/// when it is asked for. What has no name of ours is left alone.
pub(super) fn find_cached(local: &LocalStore, cache: &Cache) -> io::Result<()> {
    let mut whole = Vec::new();
    for entry in fs::read_dir(local.root())? {
        let entry = entry?;
        let shard = entry.file_name();
        match shard.to_str() {
            Some(shard) if is_shard(shard) && entry.file_type()?.is_dir() => {
                find_in_shard(local, &entry.path(), shard, &mut whole)?;
            }
            _ => {}
        }
    }
    whole.sort_unstable();
    for (_, id, bytes) in whole {
        for gone in cache.enter_found(id, bytes) {
            local.remove(&gone).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// When a file was written, and what it takes.
type Kept = (SystemTime, FileId, u64);

fn find_in_shard(
    local: &LocalStore,
    path: &Path,
    shard: &str,
    whole: &mut Vec<Kept>,
) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let about = entry.metadata()?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|_| about.is_file()) else {
            continue;
        };
        let id = |name: &str| name.parse().ok().filter(|_| name.starts_with(shard));
        let outline_of: Option<FileId> = name.strip_suffix(".outline").and_then(id);
        if let Some(id) = id(name) {
            let outline = fs::metadata(local.outline_path(&id)).map_or(0, |found| found.len());
            if Outline::encoded_len(about.len()) == outline {
                whole.push((about.modified()?, id, about.len() + outline));
            } else {
                local.remove(&id).map_err(io::Error::other)?;
            }
        } else if name.starts_with(FETCHED)
            || name.starts_with(OUTLINE)
            || outline_of.is_some_and(|id| !local.has(&id))
        {
            // Of a fetch that was cut off; or an outline whose content is not there.
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_shard(name: &str) -> bool {
    name.len() == 2
        && name
            .bytes()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}
