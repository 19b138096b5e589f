//! What the image store has, and removing what nobody needs.

use fwpush_keys::id::{FileId, OperatorId};
use fwpush_proto::v1;
use tonic::Status;

use super::{Admin, optional_id, page};
use crate::{
    api::status as map,
    db::{FileRow, Unused},
    garbage::GarbageError,
    limits,
};

pub async fn list(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListFilesRequest,
) -> Result<v1::ListFilesResponse, Status> {
    let after: Option<FileId> = optional_id("after", &request.after)?;
    let files = admin
        .db
        .list_files(after.as_ref(), page(request.limit))
        .await
        .map_err(map::db)?;
    Ok(v1::ListFilesResponse {
        files: files.iter().map(view).collect(),
    })
}

pub async fn collect(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::CollectFilesRequest,
) -> Result<v1::CollectFilesResponse, Status> {
    let unused = if request.revoked {
        Unused::UnnamedOrRevoked
    } else {
        Unused::Unnamed
    };
    let collected = if request.dry_run {
        admin.garbage.preview(unused).await
    } else {
        admin.garbage.collect(unused, operator.as_str()).await
    };
    let collected = collected.map_err(|error| match error {
        GarbageError::Db(error) => map::db(error),
        GarbageError::Store(error) => map::store(error),
    })?;
    let removed = collected
        .removed
        .iter()
        .map(|(file, size)| v1::RemovedFile {
            file_id: file.to_string(),
            size: *size,
        });
    Ok(v1::CollectFilesResponse {
        removed: removed.collect(),
        unused: collected.unused.iter().map(view).collect(),
        adopted: collected.adopted,
    })
}

/// The row of a file that somebody wants to bring or publish; one that is being removed is refused for the moment.
pub(super) async fn wanted(admin: &Admin, file: &FileId) -> Result<Option<FileRow>, Status> {
    let row = admin.db.want_file(file).await.map_err(map::db)?;
    if row.is_some_and(|row| row.doomed_at.is_some()) {
        return Err(being_removed());
    }
    Ok(row)
}

pub(super) fn being_removed() -> Status {
    map::ask_again("this file is being removed as unused; upload it again in a while")
}

fn view(row: &FileRow) -> v1::StoredFile {
    let remove_at = row
        .unused_at
        .map(|at| at.saturating_add(limits::FILE_GRACE).as_ms());
    let state = match row {
        row if row.gone_at.is_some() => v1::FileState::Removed,
        row if row.doomed_at.is_some() => v1::FileState::BeingRemoved,
        row if row.damaged_at.is_some() => v1::FileState::Damaged,
        row if row.unused_at.is_some() => v1::FileState::Marked,
        _ => v1::FileState::Stored,
    };
    v1::StoredFile {
        file_id: row.file_id.to_string(),
        size: row.size,
        created_at_ms: row.created_at.as_ms(),
        state: state.into(),
        releases: row.releases,
        live_releases: row.live_releases,
        remove_at_ms: remove_at.unwrap_or_default(),
    }
}
