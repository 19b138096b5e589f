//! `fwpush files`: what the image store has, and removing what nobody needs.

use fwpush_proto::v1::{CollectFilesRequest, FileState, ListFilesRequest, StoredFile};
use serde_json::{Value, json};

use crate::{
    Context,
    args::{FilesArgs, FilesCommand, FilesGc},
    failure::Result,
    limits,
    output::{Table, bytes, json_time, plural, time},
};

/// Rows of one page.
const PAGE: u32 = 1_000;

/// Runs the command.
pub async fn run(context: &Context, args: &FilesArgs) -> Result<()> {
    match &args.command {
        FilesCommand::List(_) => list(context).await,
        FilesCommand::Gc(args) => gc(context, args).await,
    }
}

async fn list(context: &Context) -> Result<()> {
    let client = context.client().await?;
    let mut files: Vec<StoredFile> = Vec::new();
    loop {
        let after = files.last().map(|file| file.file_id.clone());
        let request = ListFilesRequest {
            after: after.unwrap_or_default(),
            limit: PAGE,
        };
        let page = client
            .call("list the images", async |admin| {
                admin.list_files(request).await
            })
            .await?
            .files;
        let last = page.len() < PAGE as usize;
        files.extend(page);
        if last {
            break;
        }
    }
    context.out.data(
        || json!({ "files": files.iter().map(file_json).collect::<Vec<_>>() }),
        || table(&files).or("The server has no images."),
    )
}

async fn gc(context: &Context, args: &FilesGc) -> Result<()> {
    let client = context.client().await?;
    let request = CollectFilesRequest {
        revoked: args.revoked,
        dry_run: args.dry_run,
    };
    let done = client
        .call_within(
            limits::COLLECT_TIME,
            "remove unused images",
            async |admin| admin.collect_files(request).await,
        )
        .await?;
    let removed_bytes: u64 = done.removed.iter().map(|file| file.size).sum();
    context.out.data(
        || {
            let removed = done.removed.iter();
            let removed = removed.map(|file| json!({ "file_id": file.file_id, "size": file.size }));
            json!({
                "dry_run": args.dry_run,
                "removed": removed.collect::<Vec<_>>(),
                "removed_bytes": removed_bytes,
                "unused": done.unused.iter().map(file_json).collect::<Vec<_>>(),
                "adopted": done.adopted,
            })
        },
        || {
            let (count, size) = (plural(done.removed.len() as u64, "image"), bytes(removed_bytes));
            let mut text = if args.dry_run {
                format!("Would remove {count} ({size}).\n")
            } else {
                format!("Removed {count} ({size}).\n")
            };
            if args.dry_run && done.adopted > 0 {
                let count = plural(done.adopted, "image");
                text.push_str(&format!("Would mark {count} whose upload did not end.\n"));
            }
            if !done.unused.is_empty() {
                text.push_str(if args.dry_run {
                    "Unused, and removed a day after they are marked:\n"
                } else {
                    "Unused, and removed a day after they were marked unless a release names them:\n"
                });
                text.push_str(&table(&done.unused).or(""));
            }
            text
        },
    )
}

fn table(files: &[StoredFile]) -> Table {
    let mut table = Table::new(["FILE", "SIZE", "RELEASES", "STATE", "SINCE"]);
    for file in files {
        let revoked = file.releases - file.live_releases.min(file.releases);
        let releases = match revoked {
            0 => file.releases.to_string(),
            revoked => format!("{} ({revoked} revoked)", file.releases),
        };
        let state = match file.remove_at_ms {
            0 => word(file.state()).to_owned(),
            at => format!("{}, to be removed {}", word(file.state()), time(at)),
        };
        table.row([
            file.file_id.clone(),
            bytes(file.size),
            releases,
            state,
            time(file.created_at_ms),
        ]);
    }
    table
}

fn file_json(file: &StoredFile) -> Value {
    json!({
        "file_id": file.file_id,
        "size": file.size,
        "created": json_time(file.created_at_ms),
        "state": word(file.state()),
        "releases": file.releases,
        "live_releases": file.live_releases,
        "remove_at": json_time(file.remove_at_ms),
    })
}

fn word(state: FileState) -> &'static str {
    match state {
        FileState::Unspecified => "unknown",
        FileState::Stored => "stored",
        FileState::Marked => "marked",
        FileState::BeingRemoved => "being removed",
        FileState::Removed => "removed",
        FileState::Damaged => "damaged",
    }
}
