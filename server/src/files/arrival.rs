//! A file on its way into the cache: each group is checked before it is written, and the name is given last.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::PathBuf,
};

use bytes::Bytes;
use fwpush_keys::{
    id::FileId,
    outline::{GROUP_BYTES, Outline},
};
use tempfile::NamedTempFile;

use crate::{
    files::{
        StoreError,
        local::{LocalStore, make_dir, open_found, put_outline},
        on_disk,
    },
    limits,
};

/// How the temporary name of a file on its way begins.
pub(super) const FETCHED: &str = ".fetch-";

const GROUP: usize = GROUP_BYTES as usize;

/// A file that comes piece by piece.
#[derive(Debug)]
pub(super) struct Arrival {
    /// Taken while it is worked on off the async threads.
    desk: Option<Desk>,
    /// What came and is not written yet.
    gathered: Vec<u8>,
}

#[derive(Debug)]
struct Desk {
    local: LocalStore,
    outline: Outline,
    shard: PathBuf,
    file: Option<NamedTempFile>,
    /// Groups written.
    groups: u64,
}

impl Arrival {
    /// Of the file that `outline` is of.
    pub(super) fn begin(local: LocalStore, outline: Outline) -> Result<Self, StoreError> {
        let id = outline.root();
        let path = local.path(&id);
        let shard = path.parent().map(PathBuf::from);
        let shard =
            shard.ok_or_else(|| failed(&id, io::Error::other("a path without a parent")))?;
        let desk = Desk {
            local,
            outline,
            shard,
            file: None,
            groups: 0,
        };
        Ok(Self {
            desk: Some(desk),
            gathered: Vec::with_capacity(limits::FETCH_PIECE_BYTES),
        })
    }

    /// Takes the next bytes, of any number. Other bytes than those of the outline, or more: [`StoreError::Damaged`].
    pub(super) async fn take(&mut self, mut bytes: Bytes) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let room = limits::FETCH_PIECE_BYTES - self.gathered.len();
            let some = bytes.split_to(room.min(bytes.len()));
            self.gathered.extend_from_slice(&some);
            if self.gathered.len() == limits::FETCH_PIECE_BYTES {
                self.write_gathered().await?;
            }
        }
        Ok(())
    }

    /// Gives the file its name. Bytes that did not come: [`StoreError::Damaged`].
    pub(super) async fn end(mut self) -> Result<(), StoreError> {
        if !self.gathered.is_empty() {
            self.write_gathered().await?;
        }
        let desk = self.desk.take().ok_or(StoreError::NotHereNow)?;
        on_disk(move || desk.end()).await
    }

    async fn write_gathered(&mut self) -> Result<(), StoreError> {
        let mut desk = self.desk.take().ok_or(StoreError::NotHereNow)?;
        let piece = std::mem::take(&mut self.gathered);
        let (desk, piece) = on_disk(move || {
            desk.write(&piece)?;
            Ok((desk, piece))
        })
        .await?;
        self.desk = Some(desk);
        self.gathered = piece;
        self.gathered.clear();
        Ok(())
    }
}

impl Desk {
    fn write(&mut self, piece: &[u8]) -> Result<(), StoreError> {
        let id = self.outline.root();
        for group in piece.chunks(GROUP) {
            self.outline
                .check(self.groups, group)
                .map_err(|_| StoreError::Damaged(id))?;
            self.groups += 1;
        }
        self.write_checked(piece)
            .map_err(|error| failed(&id, error))
    }

    fn write_checked(&mut self, piece: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                make_dir(&self.shard)?;
                let mut named = tempfile::Builder::new();
                none.insert(named.prefix(FETCHED).tempfile_in(&self.shard)?)
            }
        };
        file.write_all(piece)
    }

    fn end(self) -> Result<(), StoreError> {
        let id = self.outline.root();
        if self.groups != self.outline.groups() {
            return Err(StoreError::Damaged(id));
        }
        self.publish().map_err(|error| failed(&id, error))
    }

    fn publish(self) -> io::Result<()> {
        let id = self.outline.root();
        let file = self.file.ok_or(io::ErrorKind::UnexpectedEof)?;
        file.as_file().sync_all()?;
        put_outline(&self.shard, &self.local.outline_path(&id), &self.outline)?;
        file.persist(self.local.path(&id))
            .map_err(|error| error.error)?;
        self.local.close(&id);
        File::open(&self.shard)?.sync_all()?;
        File::open(self.local.root())?.sync_all()
    }
}

fn failed(id: &FileId, source: io::Error) -> StoreError {
    StoreError::Io {
        operation: "write fetched",
        file: *id,
        source,
    }
}

/// Whether a cached file is what its name says: reads all of it. Blocks on the disk.
pub(super) fn check_whole(local: &LocalStore, id: &FileId) -> Result<bool, StoreError> {
    local.close(id);
    let unread = |source| StoreError::Io {
        operation: "read cached",
        file: *id,
        source,
    };
    let open = |path: PathBuf| open_found(&path).map_err(unread);
    let (Some(mut content), Some(outline)) = (open(local.path(id))?, open(local.outline_path(id))?)
    else {
        return Ok(false);
    };
    let size = content.metadata().map_err(unread)?.len();
    if !(1..=limits::FILE_BYTES).contains(&size) {
        return Ok(false);
    }
    let mut bytes = Vec::new();
    outline
        .take(Outline::encoded_len(size) + 1)
        .read_to_end(&mut bytes)
        .map_err(unread)?;
    let Ok(outline) = Outline::from_bytes(*id, size, &bytes) else {
        return Ok(false);
    };
    let mut group = vec![0; GROUP];
    for index in 0..outline.groups() {
        let range = outline.group_range(index).unwrap_or_default();
        let group = &mut group[..(range.end - range.start) as usize];
        content.read_exact(group).map_err(unread)?;
        if outline.check(index, group).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use fwpush_keys::outline::outline_of;

    use super::*;

    /// What becomes of `came` as the file that `content` is; nothing is to stay unless it is the same.
    async fn arrive(content: &[u8], came: &[u8]) -> Result<(), StoreError> {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalStore::open(dir.path()).unwrap();
        let outline = outline_of(content).unwrap();
        let id = outline.root();
        let mut arrival = Arrival::begin(local.clone(), outline).unwrap();
        let taken = arrival.take(Bytes::copy_from_slice(came)).await;
        assert!(!local.has(&id), "it has its name before its end");
        let ended = match taken {
            Ok(()) => arrival.end().await,
            failed => failed,
        };
        assert_eq!(local.has(&id), ended.is_ok());
        let shard = local.path(&id);
        let left = std::fs::read_dir(shard.parent().unwrap());
        let left = left.map_or(0, Iterator::count);
        assert_eq!(left, if ended.is_ok() { 2 } else { 0 });
        ended
    }

    #[tokio::test]
    async fn only_the_whole_file_gets_its_name() {
        let group = GROUP_BYTES as usize;
        let content: Vec<u8> = (0..40 * group + 100).map(|at| (at / 99) as u8).collect();
        arrive(&content, &content).await.unwrap();
        let mut longer = content.clone();
        longer.push(0);
        for came in [
            // Each of what came is right.
            &content[..40 * group],
            &content[..16 * group],
            &content[..content.len() - 1],
            &[],
            &longer,
        ] {
            let answer = arrive(&content, came).await;
            assert!(
                matches!(answer, Err(StoreError::Damaged(_))),
                "{}: {answer:?}",
                came.len()
            );
        }
    }
}
