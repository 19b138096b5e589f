//! A firmware image on disk: hashed once, and watched for changes meanwhile.

use std::{
    fs::{File, Metadata},
    io::Read as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use fwpush_keys::{FileId, Outline, OutlineBuilder};
use sha2::{Digest as _, Sha256};

use crate::{
    failure::{Doing as _, Failure, Result},
    limits, progress,
};

/// An image whose hashes are known. The file stays open, so that a name that leads elsewhere meanwhile changes nothing.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<File>,
    path: PathBuf,
    /// The last part of its path, for people.
    pub name: String,
    /// Bytes; at least 1.
    pub size: u64,
    pub blake3: FileId,
    pub outline: Outline,
    pub sha256: [u8; 32],
}

impl Image {
    /// Opens and hashes an image, with a progress bar. Fails when it changes meanwhile: the hash would be that of no
    /// state that the file ever had.
    pub async fn read(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || Self::read_blocking(&path, |_| {}))
            .await
            .doing(|| "hash the image".to_owned())?
    }

    /// `between` runs after each slice that was hashed, with the bytes so far.
    fn read_blocking(path: &Path, mut between: impl FnMut(u64)) -> Result<Self> {
        let what = || format!("read the image {}", path.display());
        let mut file = File::open(path).doing(what)?;
        let before = file.metadata().doing(what)?;
        if !before.is_file() {
            return Err(
                Failure::new(format!("{} is not a regular file", path.display()))
                    .next("Name the file that holds the image."),
            );
        }
        if before.len() == 0 {
            return Err(
                Failure::new(format!("the image {} is empty", path.display()))
                    .next("Build the image, then repeat the command."),
            );
        }
        let bar = progress::byte_bar("hashing", before.len());
        let (mut outline, mut sha256) = (OutlineBuilder::new(), Sha256::new());
        let mut buffer = vec![0; limits::HASH_BUFFER_BYTES];
        loop {
            let filled = fill(&mut file, &mut buffer).doing(what)?;
            outline.update(&buffer[..filled]);
            sha256.update(&buffer[..filled]);
            bar.inc(filled as u64);
            between(outline.size());
            // A file that grows as fast as it is read would never end.
            if filled < buffer.len() || outline.size() > before.len() {
                break;
            }
        }
        bar.finish_and_clear();
        let after = file.metadata().doing(what)?;
        let named = std::fs::metadata(path).doing(what)?;
        if Stamp::of(&before) != Stamp::of(&after)
            || Stamp::of(&before) != Stamp::of(&named)
            || outline.size() != before.len()
        {
            return Err(Failure::new(format!(
                "the image {} changed while it was read",
                path.display()
            ))
            .next("Wait until the build has finished writing it, then repeat the command."));
        }
        let size = outline.size();
        let outline = outline.finish();
        let name = file_name(path);
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            name,
            size,
            blake3: outline.root(),
            outline,
            sha256: sha256.finalize().into(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The SHA-256 as a manifest writes it.
    pub fn sha256_hex(&self) -> String {
        hex::encode(self.sha256)
    }

    /// The bytes from the first on, for one reader after the other.
    pub fn reader(&self) -> impl std::io::Read + Send + use<> {
        Reader {
            image: self.clone(),
            offset: 0,
        }
    }

    /// Fills `buffer` with the bytes at `offset`. Fails where the file has become shorter.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

struct Reader {
    image: Image,
    offset: u64,
}

impl std::io::Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.image.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The name that devices log. It decides nothing, so what the server would refuse is replaced or cut.
fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let harmless = name
        .chars()
        .map(|c| if c.is_control() || c == '\\' { '_' } else { c });
    // 255 bytes: characters take up to 4.
    let name: String = harmless.take(63).collect();
    if name.is_empty() {
        "image".to_owned()
    } else {
        name
    }
}

/// What changes when somebody writes to a file, or puts another in its place.
#[derive(Debug, Eq, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use super::*;

    fn image_of(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fw\n.img");
        fs::write(&path, content).unwrap();
        (dir, path)
    }

    #[test]
    fn hashes_are_those_of_the_whole_file() {
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let (_dir, path) = image_of(&content);
        let image = Image::read_blocking(&path, |_| {}).unwrap();
        assert_eq!(image.size, content.len() as u64);
        assert_eq!(image.blake3, FileId::of(&content));
        assert_eq!(image.sha256_hex(), hex::encode(Sha256::digest(&content)));
        assert_eq!(image.name, "fw_.img");
        let mut tail = [0; 3];
        image.read_at(2_999_997, &mut tail).unwrap();
        assert_eq!(tail, content[2_999_997..]);
    }

    #[test]
    fn an_image_that_changes_while_it_is_hashed_is_refused() {
        let write_at_end: fn(&Path) = |path| {
            fs::OpenOptions::new()
                .append(true)
                .open(path)
                .unwrap()
                .write_all(b"more")
                .unwrap();
        };
        let replace: fn(&Path) = |path| {
            let other = path.with_extension("new");
            fs::write(&other, vec![7; 3_000_000]).unwrap();
            fs::rename(&other, path).unwrap();
        };
        let shorten: fn(&Path) = |path| {
            fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(2_000_000)
                .unwrap();
        };
        for change in [write_at_end, replace, shorten] {
            let (_dir, path) = image_of(&vec![7; 3_000_000]);
            let mut changed = false;
            let failure = Image::read_blocking(&path, |_| {
                if !std::mem::replace(&mut changed, true) {
                    change(&path);
                }
            })
            .unwrap_err();
            assert!(
                failure.to_string().contains("changed while it was read"),
                "{failure}"
            );
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let (dir, path) = image_of(b"");
        assert!(Image::read_blocking(&path, |_| {}).is_err(), "empty");
        assert!(
            Image::read_blocking(dir.path(), |_| {}).is_err(),
            "directory"
        );
        assert!(
            Image::read_blocking(Path::new("/dev/zero"), |_| {}).is_err(),
            "device"
        );
        assert!(
            Image::read_blocking(&dir.path().join("none"), |_| {}).is_err(),
            "missing"
        );
    }
}
