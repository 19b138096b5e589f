//! `fwpush backup`: the server's archive, whole or not at all.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    time::Duration,
};

use fwpush_proto::v1::BackupRequest;
use serde_json::json;
use tempfile::NamedTempFile;
use tonic::Status;

use crate::{
    Context,
    args::BackupArgs,
    client::Client,
    disk,
    failure::{Doing as _, Failure, Result},
    output::bytes,
    progress,
};

/// The server copies its database before it sends the first byte: 100 GB at 500 MB/s are 200 s, times 3.
const FIRST_PIECE: Duration = Duration::from_secs(600);

/// Later pieces come from files.
const NEXT_PIECE: Duration = Duration::from_secs(60);

/// A tar archive ends in two blocks of zeros (POSIX.1-2017, pax "ustar Interchange Format").
const TAR_END: usize = 1_024;

/// Runs the command.
pub async fn run(context: &Context, args: &BackupArgs) -> Result<()> {
    let file = &args.file;
    if std::fs::symlink_metadata(file).is_ok() {
        return Err(Failure::usage(format!("{} exists already", file.display()))
            .next("Choose another name; a backup is never overwritten."));
    }
    let client = context.client().await?;
    let what = || format!("write {}", file.display());
    let mut archive = tempfile::Builder::new()
        .prefix(".backup-")
        .tempfile_in(disk::parent_of(file))
        .doing(what)?;
    let (size, without) = receive(&client, &mut archive).await?;
    if !is_whole(archive.as_file_mut()).doing(what)? {
        return Err(Failure::new("the backup ended early")
            .next("Look at the server's log, then repeat the command."));
    }
    archive.as_file().sync_all().doing(what)?;
    archive
        .persist_noclobber(file)
        .map_err(|error| error.error)
        .doing(what)?;
    disk::sync_dir(disk::parent_of(file)).doing(what)?;
    context.out.data(
        || json!({ "file": file, "bytes": size, "without": without }),
        || {
            let mut text = format!(
                "Wrote {} ({}). It has no private keys: keep server/pki apart.\n",
                file.display(),
                bytes(size)
            );
            if !without.is_empty() {
                text.push_str(&without);
                text.push('\n');
            }
            text
        },
    )
}

/// Gives the size, and what the server says is not in it.
async fn receive(client: &Client, archive: &mut NamedTempFile) -> Result<(u64, String)> {
    let refused = |status: Status| client.refused("back the server up", &status);
    let silent = || Status::unavailable("the server sends nothing any more");
    let mut admin = client.admin();
    let call = tokio::time::timeout(FIRST_PIECE, admin.backup(BackupRequest {}));
    let mut pieces = call
        .await
        .map_err(|_| refused(silent()))?
        .map_err(refused)?
        .into_inner();
    let bar = progress::byte_bar("receiving", 0);
    let mut patience = FIRST_PIECE;
    let mut without = String::new();
    loop {
        let piece = tokio::time::timeout(patience, pieces.message()).await;
        let Some(piece) = piece.map_err(|_| refused(silent()))?.map_err(refused)? else {
            bar.finish_and_clear();
            return Ok((bar.position(), without));
        };
        archive
            .write_all(&piece.content)
            .doing(|| "write the backup".to_owned())?;
        bar.inc_length(piece.content.len() as u64);
        bar.inc(piece.content.len() as u64);
        if !piece.content.is_empty() {
            patience = NEXT_PIECE;
        }
        without.push_str(&piece.without);
    }
}

/// Whether a tar archive has its end. One that was cut between two entries would look whole to readers.
pub fn is_whole(archive: &mut File) -> io::Result<bool> {
    let size = archive.metadata()?.len();
    if size < TAR_END as u64 || !size.is_multiple_of(512) {
        return Ok(false);
    }
    archive.seek(SeekFrom::End(-(TAR_END as i64)))?;
    let mut end = [1; TAR_END];
    archive.read_exact(&mut end)?;
    archive.rewind()?;
    Ok(end == [0; TAR_END])
}

/// Opens an archive for reading, refusing one without its end.
pub fn open(path: &Path) -> Result<File> {
    let what = || format!("read {}", path.display());
    let mut file = File::open(path).doing(what)?;
    if !is_whole(&mut file).doing(what)? {
        return Err(cut_off(path));
    }
    Ok(file)
}

/// Of an archive that ends too early.
pub fn cut_off(path: &Path) -> Failure {
    Failure::new(format!("{} is no whole tar archive", path.display()))
        .next("Take another copy: this one was cut off, or is something else.")
}
