//! Images that nobody needs any more: marked on an operator's word, removed a day later.
//!
//! The order is what makes it safe. A file is marked in SQL; publishing or uploading it takes the mark away. One that is still marked a
//! day later is *doomed* in a transaction that looks once more whether a release names it; from then on it can be neither published
//! nor uploaded. Then it leaves the store, then its row. Whatever is cut off, a later run ends it.

use std::{collections::HashSet, sync::Arc};

use fwpush_keys::{id::FileId, time::Timestamp};
use tokio::{sync::Mutex, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    db::{Db, DbError, Doomed, FileRow, Unused},
    files::{FileStore, StoreError, Stored},
    limits,
};

/// Why a run ended early. What it did stays done; the next one goes on.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// Files that are marked now or are being removed, and how they stand. Removed ones are not among them.
    pub unused: Vec<FileRow>,
    /// Files that were removed, with their bytes; in a dry run those that would be.
    pub removed: Vec<(FileId, u64)>,
    /// Files of the store that no upload ended with, which are marked with the others.
    pub adopted: u64,
}

/// Removes what is not needed; clones share the one run that there is at a time.
#[derive(Clone, Debug)]
pub struct Garbage {
    db: Db,
    store: FileStore,
    one: Arc<Mutex<()>>,
}

impl Garbage {
    pub fn new(db: Db, store: FileStore) -> Self {
        Self {
            db,
            store,
            one: Arc::default(),
        }
    }

    /// What [`Self::collect`] would do now, without doing it.
    pub async fn preview(&self, unused: Unused) -> Result<Collected, GarbageError> {
        let unknown = self.unknown(self.store.list().await?).await?;
        let due = self.db.now().saturating_sub(limits::FILE_GRACE);
        let rows = self.db.unused_files(unused).await?;
        let (removed, unused): (Vec<FileRow>, _) = rows
            .into_iter()
            .partition(|row| row.unused_at.is_some_and(|at| at <= due));
        Ok(Collected {
            unused,
            removed: removed.iter().map(|row| (row.file_id, row.size)).collect(),
            adopted: unknown.len() as u64,
        })
    }

    /// Marks what is `unused`, takes the mark from what is needed again, and removes what was marked a day ago; and looks again at
    /// what was damaged, and for uploads that nobody goes on with.
    pub async fn collect(&self, unused: Unused, actor: &str) -> Result<Collected, GarbageError> {
        let _one = self.one.lock().await;
        self.forget_old_uploads().await;
        self.look_again().await?;
        let unknown = self.unknown(self.store.list().await?).await?;
        for some in unknown.chunks(limits::FILES_DOOMED as usize) {
            self.db.adopt_files(some).await?;
        }
        self.db.mark_files(unused, actor).await?;
        let removed = self.remove_due(actor).await?;
        Ok(Collected {
            unused: self.db.unused_files(unused).await?,
            removed,
            adopted: unknown.len() as u64,
        })
    }

    /// Goes on with what an operator began: removes what was marked a day ago, and marks nothing. Looks again at what was damaged.
    pub async fn go_on(&self, actor: &str) -> Result<(), GarbageError> {
        let _one = self.one.lock().await;
        self.look_again().await?;
        self.remove_due(actor).await.map(drop)
    }

    /// What the store has and nobody entered. `listed` is what it had a moment ago.
    async fn unknown(&self, listed: Vec<Stored>) -> Result<Vec<(FileId, u64)>, GarbageError> {
        let mut unknown = self.without_row(listed).await?;
        if unknown.is_empty() {
            return Ok(unknown);
        }
        // Another node may have ended the removal of one meanwhile, and then its row is gone because it is: it would be entered, and
        // could be published, without being there.
        let still: HashSet<FileId> = self.store.list().await?.iter().map(|it| it.file).collect();
        unknown.retain(|(file, _)| still.contains(file));
        Ok(unknown)
    }

    async fn without_row(&self, listed: Vec<Stored>) -> Result<Vec<(FileId, u64)>, GarbageError> {
        let mut unknown = Vec::new();
        for some in listed.chunks(limits::COMMIT_ROWS) {
            let ids: Vec<FileId> = some.iter().map(|stored| stored.file).collect();
            let without_row = self.db.unknown_files(&ids).await?;
            let of = some
                .iter()
                .filter(|stored| without_row.contains(&stored.file));
            unknown.extend(of.map(|stored| (stored.file, stored.size)));
        }
        Ok(unknown)
    }

    /// Looks at files of a directory that were found damaged: somebody may have put them right, as from a backup. Those of a bucket
    /// are looked at when a device asks for them.
    async fn look_again(&self) -> Result<(), GarbageError> {
        if self.store.directory().is_none() {
            return Ok(());
        }
        for file in self.db.damaged_files().await? {
            let since = self.db.now();
            match self.store.is_whole(&file).await {
                Ok(Some(true)) => {
                    self.db.note_whole(&file, since).await?;
                    tracing::info!(%file, "An image that was damaged is whole again.");
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(
                    %file, error = &error as &dyn std::error::Error,
                    "An image that was damaged cannot be read."
                ),
            }
        }
        Ok(())
    }

    async fn forget_old_uploads(&self) {
        let uploads = self.store.uploads().clone();
        let forgot = tokio::task::spawn_blocking(move || uploads.forget_old_uploads()).await;
        if let Ok(Err(error)) = forgot {
            tracing::warn!(%error, "Old uploads stay a while longer.");
        }
    }

    async fn remove_due(&self, actor: &str) -> Result<Vec<(FileId, u64)>, GarbageError> {
        self.db.unmark_files().await?;
        let mut removed = Vec::new();
        loop {
            let (doomed_at, doomed) = self.db.doom_files().await?;
            if doomed.is_empty() {
                return Ok(removed);
            }
            let mut left = doomed.as_slice();
            let ended = self.remove(&mut left, doomed_at, actor, &mut removed).await;
            // After an error too: whoever wants one of them would have to wait until it is taken over.
            let spared = self.db.spare_files(left, doomed_at).await;
            ended?;
            spared?;
        }
    }

    /// Removes the files at the front of `left` and takes them off it, until none is left, one fails, or time is up. One that failed
    /// stays doomed: whether it was removed is not known.
    async fn remove(
        &self,
        left: &mut &[Doomed],
        doomed_at: Timestamp,
        actor: &str,
        removed: &mut Vec<(FileId, u64)>,
    ) -> Result<(), GarbageError> {
        let began = Instant::now();
        while let [Doomed { file_id, size, .. }, rest @ ..] = *left {
            // Long before another node may take it over: a removal that comes late would hit a file that was uploaded since.
            if began.elapsed() > limits::DOOM_WORK {
                break;
            }
            *left = rest;
            self.store.delete(file_id).await?;
            if self.db.file_removed(file_id, doomed_at, actor).await? {
                tracing::info!(file = %file_id, bytes = size, "An unused image was removed.");
                removed.push((*file_id, *size));
            }
        }
        Ok(())
    }

    /// Removes from this node's cache what the store does not have any more.
    pub async fn tidy_cache(&self) -> Result<(), GarbageError> {
        let cached = self.store.cached();
        for some in cached.chunks(limits::COMMIT_ROWS) {
            let kept = self.db.kept_files(some).await?;
            for file in some.iter().filter(|file| !kept.contains(file)) {
                self.store.drop_cached(file).await?;
            }
        }
        Ok(())
    }
}

/// Ends what is to end, now and then: uploads that nobody goes on with, images that were marked a day ago, cached ones that are gone.
pub async fn keep_house(garbage: Garbage, actor: String, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(limits::HOUSEKEEPING) => {}
        }
        garbage.forget_old_uploads().await;
        let done = match garbage.go_on(&actor).await {
            Ok(()) => garbage.tidy_cache().await,
            failed => failed,
        };
        if let Err(error) = done {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Unused images stay a while longer."
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        db::{
            Entered, Published,
            testing::{Bench, on_postgres_too, release},
        },
        files::{Files, FilesPlace},
    };
    use fwpush_services::s3::{ACCESS_KEY_ID, BUCKET, S3, S3Options, SECRET_KEY};

    on_postgres_too!(
        what_no_release_names_goes_a_day_after_it_was_marked_and_nothing_else_does,
        publishing_or_uploading_takes_the_mark_away,
        what_only_revoked_releases_name_goes_when_it_is_asked_for_and_can_be_brought_back,
        while_a_file_is_being_removed_it_can_be_neither_published_nor_uploaded,
        a_removal_that_was_not_begun_is_given_up,
        a_removal_that_another_node_had_begun_is_given_back_and_not_given_up,
        after_a_removal_that_fails_the_files_behind_it_are_free_again,
        a_damaged_file_is_noted_until_it_is_uploaded_again,
        what_was_damaged_and_is_whole_again_is_noted_as_such,
        a_file_whose_removal_has_just_ended_is_not_entered_anew,
        whatever_races_a_published_image_is_in_the_store,
    );

    const DAY: Duration = Duration::from_secs(24 * 3_600 + 1);

    struct World {
        bench: Bench,
        _dir: tempfile::TempDir,
        store: FileStore,
        garbage: Garbage,
        seq: u64,
    }

    impl World {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let place = FilesPlace::directory(dir.path().join("files"));
            Self::of(dir, &place).await
        }

        async fn in_bucket(s3: &S3) -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("secret"), SECRET_KEY).unwrap();
            let files = Files {
                url: format!("s3://{BUCKET}"),
                endpoint: Some(s3.endpoint()),
                access_key_id: Some(ACCESS_KEY_ID.into()),
                secret_key_file: Some("secret".into()),
                allow_http: true,
                ..Files::default()
            };
            let place = files.place(dir.path()).unwrap();
            Self::of(dir, &place).await
        }

        async fn of(dir: tempfile::TempDir, place: &FilesPlace) -> Self {
            let bench = Bench::new().await;
            let node = "n1".parse().unwrap();
            let store = FileStore::open(place, &node).await.unwrap();
            let garbage = Garbage::new(bench.db.clone(), store.clone());
            Self {
                bench,
                _dir: dir,
                store,
                garbage,
                seq: 0,
            }
        }

        /// Into the store alone: as when the server is killed before it enters the file.
        async fn store(&self, content: &[u8]) -> FileId {
            let id = FileId::of(content);
            let uploads = self.store.uploads();
            let mut upload = uploads.upload(id, content.len() as u64, 0, "op").unwrap();
            upload.append(content).unwrap();
            let stop = CancellationToken::new();
            self.store.finish(upload, &stop).await.unwrap();
            id
        }

        async fn upload(&self, content: &[u8]) -> FileId {
            let id = self.store(content).await;
            let entered = self.bench.db.add_file(&id, content.len() as u64).await;
            assert_eq!(entered.unwrap(), Entered::Yes);
            id
        }

        async fn publish(&mut self, file: FileId) -> Published {
            self.seq += 1;
            let version = format!("1.{}.0", self.seq);
            let row = release(&version, self.seq, file, self.bench.db.now());
            let published = self.bench.db.insert_release(&row, &[file], "op").await;
            published.unwrap()
        }

        async fn revoke(&self, row: &crate::db::ReleaseRow, revoked: bool) {
            let list = if revoked {
                vec![row.release_id]
            } else {
                vec![]
            };
            self.bench
                .db
                .set_revoked(&row.product, &list, "op")
                .await
                .unwrap();
        }

        async fn collect(&self, unused: Unused) -> Vec<FileId> {
            let done = self.garbage.collect(unused, "op").await.unwrap();
            done.removed.into_iter().map(|(id, _)| id).collect()
        }

        async fn is_stored(&self, id: &FileId) -> bool {
            self.store.size(id).await.unwrap().is_some()
        }
    }

    #[tokio::test]
    async fn what_no_release_names_goes_a_day_after_it_was_marked_and_nothing_else_does() {
        let mut world = World::new().await;
        let (unnamed, named) = (world.upload(b"unnamed").await, world.upload(b"named").await);
        let orphan = world.store(b"orphan").await;
        assert!(matches!(world.publish(named).await, Published::New));
        let seen = world.garbage.preview(Unused::Unnamed).await.unwrap();
        assert_eq!((seen.unused.len(), seen.adopted), (1, 1));
        assert!(
            world.bench.db.file(&orphan).await.unwrap().is_none(),
            "nothing was done"
        );
        world.bench.db.advance_clock(DAY);
        assert!(
            world.collect(Unused::Unnamed).await.is_empty(),
            "they were marked just now"
        );
        world.bench.db.advance_clock(DAY);
        let mut removed = world.collect(Unused::Unnamed).await;
        removed.sort_unstable();
        let mut expected = [unnamed, orphan];
        expected.sort_unstable();
        assert_eq!(removed, expected);
        for id in [unnamed, orphan] {
            assert!(!world.is_stored(&id).await);
            assert!(world.bench.db.file(&id).await.unwrap().is_none());
            assert!(matches!(world.publish(id).await, Published::FileMissing(_)));
        }
        assert!(world.is_stored(&named).await);
    }

    #[tokio::test]
    async fn publishing_or_uploading_takes_the_mark_away() {
        let mut world = World::new().await;
        let files = [
            world.upload(b"a").await,
            world.upload(b"b").await,
            world.upload(b"c").await,
        ];
        world.collect(Unused::Unnamed).await;
        world.bench.db.advance_clock(DAY);
        assert!(matches!(world.publish(files[0]).await, Published::New));
        let published = world.bench.db.file(&files[0]).await.unwrap().unwrap();
        assert_eq!(published.unused_at, None, "at once");
        world.bench.db.want_file(&files[1]).await.unwrap();
        world.upload(b"c").await;
        assert!(world.collect(Unused::Unnamed).await.is_empty());
        world.garbage.go_on("n1").await.unwrap();
        for id in &files {
            assert!(world.is_stored(id).await);
        }
    }

    #[tokio::test]
    async fn what_only_revoked_releases_name_goes_when_it_is_asked_for_and_can_be_brought_back() {
        let mut world = World::new().await;
        let file = world.upload(b"bricks").await;
        world.seq = 100;
        let row = release("2.0.0", 90, file, world.bench.db.now());
        world
            .bench
            .db
            .insert_release(&row, &[file], "op")
            .await
            .unwrap();
        world.collect(Unused::UnnamedOrRevoked).await;
        assert!(
            world
                .bench
                .db
                .file(&file)
                .await
                .unwrap()
                .unwrap()
                .unused_at
                .is_none()
        );
        world.revoke(&row, true).await;
        world.collect(Unused::UnnamedOrRevoked).await;
        // The list is taken back; nobody has looked since, and nobody need to.
        world.revoke(&row, false).await;
        world.bench.db.advance_clock(DAY);
        assert!(world.bench.db.doom_files().await.unwrap().1.is_empty());
        world.collect(Unused::UnnamedOrRevoked).await;
        world.revoke(&row, true).await;
        world.collect(Unused::Unnamed).await;
        assert!(
            world
                .bench
                .db
                .file(&file)
                .await
                .unwrap()
                .unwrap()
                .unused_at
                .is_none()
        );
        world.collect(Unused::UnnamedOrRevoked).await;
        world.bench.db.advance_clock(DAY);
        // Whoever runs next carries it out.
        world.garbage.go_on("n1").await.unwrap();
        let left = world.bench.db.file(&file).await.unwrap().unwrap();
        assert!(left.gone_at.is_some() && left.doomed_at.is_none() && !left.is_kept());
        assert!(!world.is_stored(&file).await);
        assert!(world.bench.db.kept_files(&[file]).await.unwrap().is_empty());
        assert!(matches!(
            world.publish(file).await,
            Published::FileMissing(_)
        ));
        world.upload(b"bricks").await;
        assert!(world.bench.db.file(&file).await.unwrap().unwrap().is_kept());
        assert!(matches!(world.publish(file).await, Published::New));
    }

    #[tokio::test]
    async fn while_a_file_is_being_removed_it_can_be_neither_published_nor_uploaded() {
        let mut world = World::new().await;
        let db = world.bench.db.clone();
        let file = world.upload(b"a").await;
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        let (doomed_at, doomed) = db.doom_files().await.unwrap();
        assert_eq!(
            doomed,
            [Doomed {
                file_id: file,
                size: 1,
                before: None
            }]
        );
        assert!(matches!(
            world.publish(file).await,
            Published::FileMissing(_)
        ));
        assert_eq!(db.add_file(&file, 1).await.unwrap(), Entered::BeingRemoved);
        assert!(
            db.want_file(&file)
                .await
                .unwrap()
                .unwrap()
                .doomed_at
                .is_some()
        );
        assert!(
            db.doom_files().await.unwrap().1.is_empty(),
            "another node leaves it alone"
        );
        // The node died. Another takes over, and the first one's late word counts no more.
        db.advance_clock(limits::DOOM_LIFE + Duration::from_secs(1));
        let (taken_at, taken) = db.doom_files().await.unwrap();
        assert_eq!(taken[0].before, Some(doomed_at));
        assert!(!db.file_removed(&file, doomed_at, "n1").await.unwrap());
        assert!(db.file_removed(&file, taken_at, "n2").await.unwrap());
        assert_eq!(db.add_file(&file, 1).await.unwrap(), Entered::Yes);
        assert!(matches!(world.publish(file).await, Published::New));
    }

    #[tokio::test]
    async fn a_removal_that_was_not_begun_is_given_up() {
        let world = World::new().await;
        let db = &world.bench.db;
        let file = world.upload(b"a").await;
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        let (doomed_at, doomed) = db.doom_files().await.unwrap();
        db.spare_files(&doomed, doomed_at).await.unwrap();
        assert_eq!(db.add_file(&file, 1).await.unwrap(), Entered::Yes);
    }

    #[tokio::test]
    async fn a_removal_that_another_node_had_begun_is_given_back_and_not_given_up() {
        let world = World::new().await;
        let db = &world.bench.db;
        let file = world.upload(b"a").await;
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        db.doom_files().await.unwrap();
        // That node died when the content was gone.
        world.store.delete(&file).await.unwrap();
        db.advance_clock(limits::DOOM_LIFE + Duration::from_secs(1));
        let (taken_at, taken) = db.doom_files().await.unwrap();
        db.spare_files(&taken, taken_at).await.unwrap();
        assert_eq!(db.add_file(&file, 1).await.unwrap(), Entered::BeingRemoved);
        world.garbage.go_on("n2").await.unwrap();
        assert!(db.file(&file).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn after_a_removal_that_fails_the_files_behind_it_are_free_again() {
        let world = World::new().await;
        let db = &world.bench.db;
        let mut files = [world.upload(b"a").await, world.upload(b"b").await];
        files.sort_unstable();
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        // Not even the superuser unlinks a directory.
        let path = world.store.uploads().path(&files[0]);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        world.garbage.go_on("n1").await.unwrap_err();
        let row = async |file| db.file(&file).await.unwrap().unwrap();
        assert!(row(files[0]).await.doomed_at.is_some());
        assert!(row(files[1]).await.doomed_at.is_none());
        assert_eq!(db.add_file(&files[1], 1).await.unwrap(), Entered::Yes);
    }

    #[tokio::test]
    async fn a_damaged_file_is_noted_until_it_is_uploaded_again() {
        let world = World::new().await;
        let db = &world.bench.db;
        let file = world.upload(b"a").await;
        db.note_damaged(&file, db.now()).await.unwrap();
        db.note_damaged(&file, db.now()).await.unwrap();
        assert!(!db.want_file(&file).await.unwrap().unwrap().is_kept());
        let before = db.now();
        db.advance_clock(Duration::from_secs(1));
        world.upload(b"a").await;
        assert!(db.want_file(&file).await.unwrap().unwrap().is_kept());
        // By a fetch that was on its way all the time.
        db.note_damaged(&file, before).await.unwrap();
        assert!(db.want_file(&file).await.unwrap().unwrap().is_kept());
        db.note_damaged(&file, db.now()).await.unwrap();
        assert!(!db.want_file(&file).await.unwrap().unwrap().is_kept());
    }

    #[tokio::test]
    async fn what_was_damaged_and_is_whole_again_is_noted_as_such() {
        let world = World::new().await;
        let db = &world.bench.db;
        let file = world.upload(b"a").await;
        let path = world.store.uploads().path(&file);
        let kept = async || db.file(&file).await.unwrap().unwrap().is_kept();
        std::fs::write(&path, b"b").unwrap();
        let since = db.now();
        db.advance_clock(Duration::from_secs(1));
        db.note_damaged(&file, db.now()).await.unwrap();
        world.garbage.go_on("n1").await.unwrap();
        assert!(!kept().await, "it still is");
        db.note_whole(&file, since).await.unwrap();
        assert!(!kept().await, "a look that began before says nothing");
        std::fs::write(&path, b"a").unwrap();
        world.garbage.go_on("n1").await.unwrap();
        assert!(kept().await);
    }

    #[tokio::test]
    async fn a_file_whose_removal_has_just_ended_is_not_entered_anew() {
        let world = World::new().await;
        let db = &world.bench.db;
        let (gone, orphan) = (world.upload(b"a").await, world.store(b"b").await);
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        let listed = world.store.list().await.unwrap();
        // Another node ends what it began.
        let removed = world.collect(Unused::Unnamed).await;
        assert!(removed.contains(&gone) && removed.contains(&orphan));
        let orphan = world.store(b"b").await;
        let unknown = world.garbage.unknown(listed).await.unwrap();
        assert_eq!(unknown, [(orphan, 1)]);
    }

    #[tokio::test]
    async fn a_cache_drops_what_another_node_removed_and_nothing_else() {
        let s3 = S3::start(&S3Options::default()).unwrap();
        let mut world = World::in_bucket(&s3).await;
        let db = world.bench.db.clone();
        let (named, gone) = (world.upload(b"a").await, world.upload(b"b").await);
        assert!(matches!(world.publish(named).await, Published::New));
        world.collect(Unused::Unnamed).await;
        db.advance_clock(DAY);
        assert_eq!(world.store.cached().len(), 2);
        let (doomed_at, _) = db.doom_files().await.unwrap();
        assert!(db.file_removed(&gone, doomed_at, "n2").await.unwrap());
        world.garbage.tidy_cache().await.unwrap();
        assert_eq!(world.store.cached(), [named]);
    }

    #[tokio::test]
    async fn whatever_races_a_published_image_is_in_the_store() {
        let mut world = World::new().await;
        let (db, store, garbage) = (
            world.bench.db.clone(),
            world.store.clone(),
            world.garbage.clone(),
        );
        let (mut published, mut refused, mut removed) = (Vec::new(), 0, 0);
        for round in 0..40_u32 {
            let content = round.to_le_bytes();
            let file = world.upload(&content).await;
            world.collect(Unused::Unnamed).await;
            db.advance_clock(DAY);
            // As the calls of an operator do it, and more or less late.
            let bring = async {
                for _ in 0..round % 10 {
                    tokio::task::yield_now().await;
                }
                let row = db.want_file(&file).await.unwrap();
                if row.is_some_and(|row| row.doomed_at.is_some()) {
                    return false;
                }
                if row.is_none() || store.size(&file).await.unwrap().is_none() {
                    world.store(&content).await;
                }
                db.add_file(&file, 4).await.unwrap() == Entered::Yes
            };
            // Two nodes, each with its own hand.
            let other = Garbage::new(db.clone(), store.clone());
            let (brought, first, second) = tokio::join!(
                bring,
                garbage.collect(Unused::Unnamed, "n1"),
                other.go_on("n2"),
            );
            removed += first.unwrap().removed.len();
            second.unwrap();
            match brought {
                true if matches!(world.publish(file).await, Published::New) => published.push(file),
                _ => refused += 1,
            }
            for file in &published {
                assert!(world.is_stored(file).await, "round {round}: {file} is lost");
            }
        }
        assert!(
            !published.is_empty(),
            "{refused} refused, {removed} removed"
        );
    }
}
