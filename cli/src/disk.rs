//! Files that this program leaves behind: private where they hold a secret, never half written, never over another.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::failure::{Doing as _, Failure, Result};

/// Makes a directory, and its parents, that only its owner may enter. One that exists stays as it is.
pub fn private_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .doing(|| format!("make the directory {}", path.display()))
}

/// Writes a new file with mode 0600 and brings it to the disk, whole or not at all. Fails where one exists.
pub fn write_new(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let parent = parent_of(path);
        let mut temporary = NamedTempFile::new_in(parent)?;
        temporary.write_all(content)?;
        temporary.as_file().sync_all()?;
        temporary
            .persist_noclobber(path)
            .map_err(|error| error.error)?;
        sync_dir(parent)
    };
    match write() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Failure::new(format!("{} exists already", path.display()))
                .next("Choose another place, or move that file away."))
        }
        other => other.doing(|| format!("write {}", path.display())),
    }
}

/// Replaces a file, or makes it, in one step: a reader sees the old content or the new. Mode 0600.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let parent = parent_of(path);
        let mut temporary = NamedTempFile::new_in(parent)?;
        temporary.write_all(content)?;
        temporary.as_file().sync_all()?;
        temporary.persist(path).map_err(|error| error.error)?;
        sync_dir(parent)
    };
    write().doing(|| format!("write {}", path.display()))
}

/// Brings the names in a directory to the disk.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The directory that a file is in.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Reads a file of at most `limit` bytes.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let what = || format!("read {}", path.display());
    let mut content = Vec::new();
    let file = File::open(path).doing(what)?;
    file.take(limit + 1).read_to_end(&mut content).doing(what)?;
    if content.len() as u64 > limit {
        return Err(
            Failure::new(format!("{} is larger than {limit} bytes", path.display()))
                .next("This does not look like the right kind of file."),
        );
    }
    Ok(content)
}

/// Reads a text of at most 1 MiB: keys, certificates and configurations are far smaller.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = read_limited(path, 1 << 20)?;
    String::from_utf8(bytes).map_err(|_| {
        Failure::new(format!("{} is not UTF-8 text", path.display()))
            .next("This does not look like the right kind of file.")
    })
}

/// The files in a directory whose names begin and end so, sorted by name.
pub fn files_named(dir: &Path, prefix: &str, suffix: &str) -> Result<Vec<PathBuf>> {
    let what = || format!("look for {prefix}*{suffix} in {}", dir.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).doing(what)? {
        let entry = entry.doing(what)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Removes the directories and files in `dir` whose names begin so, which a killed process left behind.
pub fn remove_left(dir: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The first name of the form `prefix<N>suffix`, counting from 1, that the directory does not hold.
pub fn next_free(dir: &Path, prefix: &str, suffix: &str) -> Result<PathBuf> {
    for number in 1..=9_999 {
        let path = dir.join(format!("{prefix}{number}{suffix}"));
        if fs::symlink_metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(path);
        }
    }
    Err(Failure::new(format!(
        "no free name {prefix}N{suffix} in {}",
        dir.display()
    ))
    .next("Move the old ones away."))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_secret_is_private_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        write_new(&path, b"secret").unwrap();
        assert_eq!(mode(&path), 0o600);
        let failure = write_new(&path, b"other").unwrap_err();
        assert!(failure.to_string().contains("exists already"), "{failure}");
        assert_eq!(fs::read(&path).unwrap(), b"secret");
    }

    #[test]
    fn a_replaced_file_is_private_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.json");
        replace(&path, b"1").unwrap();
        replace(&path, b"2").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_file_over_its_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        fs::write(&path, [0; 11]).unwrap();
        assert!(read_limited(&path, 11).is_ok());
        assert!(read_limited(&path, 10).is_err());
    }
}
