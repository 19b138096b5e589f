//! Uploads that nodes left behind in a directory that they share.
//!
//! Each node has a directory of its own in `uploads/`, and says there every hour that it lives. Who is silent for a day is gone; what
//! it left is then removed a day later than it would have done so itself. Every time is the file server's, by which nodes agree whose
//! own clocks do not.

use std::{
    fs::{self, DirEntry, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use fwpush_keys::id::{FileId, NodeId};

use super::local::make_dir;
use crate::limits;

/// In a node's directory: changed every [`limits::HOUSEKEEPING`].
const ALIVE: &str = ".alive";

/// Says that the node of this directory lives, and gives the file server's time. It takes no room on a full disk.
pub(super) fn beat(uploads: &Path) -> io::Result<SystemTime> {
    make_dir(uploads)?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(uploads.join(ALIVE))?;
    // Changes it for sure, and is not a time that this machine sets.
    file.set_len(1)?;
    file.metadata()?.modified()
}

/// When the file changed; `None`: it is not there.
pub(super) fn changed(path: &Path) -> io::Result<Option<SystemTime>> {
    match fs::symlink_metadata(path) {
        Ok(found) => found.modified().map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn age(changed: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(changed).unwrap_or_default()
}

/// Forgets what is in `all` of nodes that are gone, and what was left there before the directory was shared. `own`: that of the
/// node that asks, left alone. What cannot be looked at does not keep the rest; the last such error is given.
pub(super) fn forget(all: &Path, own: &Path, now: SystemTime) -> io::Result<()> {
    let mut failed = Ok(());
    for entry in fs::read_dir(all)? {
        let entry = entry?;
        if entry.path() == own {
            continue;
        }
        match forget_within(&entry, now) {
            // Another node was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed = Err(error),
            Ok(()) => {}
        }
    }
    failed
}

fn forget_within(entry: &DirEntry, now: SystemTime) -> io::Result<()> {
    let (kind, name) = (entry.file_type()?, entry.file_name());
    if kind.is_file() {
        forget_one(entry, now, || Ok(true))?;
    } else if kind.is_dir()
        && let Some(node) = name.to_str().and_then(|name| name.parse::<NodeId>().ok())
        && is_gone(&entry.path(), now)?
    {
        forget_of(&entry.path(), &node, now)?;
    }
    Ok(())
}

/// Whether the node of this directory was silent for [`limits::UPLOADER_GONE`]. One that says nothing, being older than this rule,
/// changes its directory with each upload that begins or ends.
fn is_gone(uploads: &Path, now: SystemTime) -> io::Result<bool> {
    let Some(last) = changed(uploads)? else {
        return Ok(false);
    };
    let says = changed(&uploads.join(ALIVE))?;
    Ok(age(says.unwrap_or(last), now) > limits::UPLOADER_GONE)
}

/// Whether a node that was gone has not come back: it would say so first.
fn stays_gone(uploads: &Path, now: SystemTime) -> io::Result<bool> {
    let says = changed(&uploads.join(ALIVE))?;
    Ok(says.is_none_or(|last| age(last, now) > limits::UPLOADER_GONE))
}

/// Forgets what a node left that was found to be gone.
pub(super) fn forget_of(uploads: &Path, node: &NodeId, now: SystemTime) -> io::Result<()> {
    let mut left = 0;
    for entry in fs::read_dir(uploads)? {
        let entry = entry?;
        // It may come back at any moment.
        let gone = forget_one(&entry, now, || stays_gone(uploads, now))?;
        if entry.file_name() != ALIVE && !gone {
            left += 1;
        }
    }
    if left > 0 || !stays_gone(uploads, now)? {
        return Ok(());
    }
    // A node that comes back at this very moment makes its directory anew.
    for removed in [
        fs::remove_file(uploads.join(ALIVE)),
        fs::remove_dir(uploads),
    ] {
        match removed {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                return Err(error);
            }
            _ => {}
        }
    }
    tracing::info!(node.id = %node, "The node is gone, and so is its directory of uploads.");
    Ok(())
}

/// Removes an upload that got nothing for long, if `may` says so; gives whether it is gone.
fn forget_one(
    entry: &DirEntry,
    now: SystemTime,
    may: impl Fn() -> io::Result<bool>,
) -> io::Result<bool> {
    let name = entry.file_name();
    let is_upload = name
        .to_str()
        .is_some_and(|name| name.parse::<FileId>().is_ok());
    let Some(changed) = changed(&entry.path())? else {
        return Ok(true);
    };
    let kept = limits::UPLOAD_KEPT + limits::UPLOADER_GONE;
    if !is_upload || age(changed, now) <= kept || !may()? {
        return Ok(false);
    }
    match fs::remove_file(entry.path()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    tracing::info!(file = ?name, "An upload that a node left behind was forgotten.");
    Ok(true)
}
