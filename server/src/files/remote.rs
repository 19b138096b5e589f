//! A bucket with a cache on this node's disk in front of it.
//!
//! A file is fetched once for all who ask for it. What arrives is checked group by group under a temporary name; it gets its own
//! once it is whole and synced. What was in the cache at the start is hashed before it is used for the first time.

use std::{
    collections::HashMap,
    fs::File,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fwpush_keys::{id::FileId, outline::Outline};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    files::{
        StoreError,
        arrival::{Arrival, check_whole},
        cache::{Cache, NoRoom, Room, Trust},
        cache_dir::{find_cached, take_dir},
        local::{LocalStore, Whole},
        on_disk,
        place::S3Place,
        s3::Bucket,
    },
    limits, metrics as m,
};

/// The bucket and its cache; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bucket: Bucket,
    local: LocalStore,
    cache: Cache,
    /// Files on their way, and those that were not to be had a moment ago.
    under_way: Mutex<HashMap<FileId, watch::Receiver<State>>>,
    /// What fetches found out and nobody took.
    found: Mutex<HashMap<FileId, Found>>,
    fetches: Semaphore,
    /// Apart from the fetches: those wait for the bucket, and what is here does not.
    checks: Semaphore,
    /// Keeps a second server away from the directory.
    _lock: File,
}

#[derive(Clone, Copy, Debug)]
enum State {
    UnderWay,
    Done {
        outcome: Brought,
        at: Instant,
        /// For how long the next who ask get the same answer without a look.
        pause: Duration,
    },
}

/// What a fetch found in the bucket.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Whether it is what its name says.
    pub whole: bool,
    /// When the fetch began.
    pub since: Instant,
}

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brought {
    Here,
    /// The bucket does not have it.
    Nowhere,
    /// What the bucket has is not what it is named after.
    Damaged,
    /// It does not fit into the cache.
    AboveCache {
        size: u64,
    },
    /// It takes longer, the bucket is away, or the cache is full of what is being downloaded.
    NotNow,
    /// This node's disk failed, or is full.
    NoDisk,
}

impl Brought {
    /// For how long it stands, after one before it that stood for `before`.
    fn pause(self, before: Duration) -> Duration {
        match self {
            Self::Here => Duration::ZERO,
            Self::NotNow | Self::Nowhere => limits::FETCH_PAUSE,
            Self::NoDisk => (before * 2).clamp(limits::FETCH_PAUSE, limits::DISK_PAUSE),
            Self::Damaged | Self::AboveCache { .. } => limits::DAMAGED_PAUSE,
        }
    }

    /// Of an error of the bucket or of the disk.
    fn of(error: &StoreError) -> Self {
        match error {
            StoreError::Damaged(_) => Self::Damaged,
            StoreError::Io { .. } | StoreError::Open(_) => Self::NoDisk,
            _ => Self::NotNow,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Here => "fetched",
            Self::Nowhere => "missing",
            Self::Damaged => "damaged",
            Self::AboveCache { .. } => "too_large",
            Self::NotNow | Self::NoDisk => "failed",
        }
    }
}

impl Remote {
    /// Takes the cache's directory, and looks whether the bucket takes us. One that does not answer is only logged.
    pub(super) async fn open(place: S3Place) -> Result<Self, StoreError> {
        let bucket = place.clone();
        let (bucket, local, lock) = on_disk(move || {
            let bucket = Bucket::open(&bucket)?;
            // Before anything in it is touched: it may be another server's, or no cache at all.
            let lock = take_dir(&place.cache_dir)?;
            let local = LocalStore::open(&place.cache_dir)?;
            Ok((bucket, local, (lock, place)))
        })
        .await?;
        let (lock, place) = lock;
        let cache = Cache::new(place.cache_bytes);
        let found = local.clone();
        let cache = on_disk(move || {
            find_cached(&found, &cache).map_err(StoreError::Open)?;
            Ok(cache)
        })
        .await?;
        match timeout(limits::S3_OPEN, bucket.check()).await {
            Ok(Ok(())) => {}
            Ok(Err(error @ (StoreError::Away { .. } | StoreError::Faulty { .. }))) => {
                tracing::error!(error = &error as &dyn std::error::Error, "{AWAY}");
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => tracing::error!(%place, "{AWAY}"),
        }
        let inner = Inner {
            bucket,
            local,
            cache,
            under_way: Mutex::default(),
            found: Mutex::default(),
            fetches: Semaphore::new(limits::FETCHES),
            checks: Semaphore::new(limits::CACHE_CHECKS),
            _lock: lock,
        };
        let remote = Self {
            inner: Arc::new(inner),
        };
        remote.count();
        Ok(remote)
    }

    pub(super) fn bucket(&self) -> &Bucket {
        &self.inner.bucket
    }

    pub(super) fn local(&self) -> &LocalStore {
        &self.inner.local
    }

    pub(super) fn cache_bytes(&self) -> u64 {
        self.inner.cache.most()
    }

    pub(super) fn takes(&self, id: &FileId, size: u64) -> Result<(), StoreError> {
        let (file, most) = (*id, self.cache_bytes());
        if on_disk_bytes(size) > most {
            return Err(StoreError::AboveCache { file, size, most });
        }
        Ok(())
    }

    pub(super) fn cached(&self) -> Vec<FileId> {
        self.inner.cache.list()
    }

    /// Whether the file is here and may be used; makes it the last to go.
    pub(super) fn is_verified(&self, id: &FileId) -> bool {
        self.inner.cache.touch(id) == Some(Trust::Verified)
    }

    /// What the last fetch of the file found, if nobody took it yet.
    pub(super) fn take_found(&self, id: &FileId) -> Option<Found> {
        self.found().remove(id)
    }

    /// Keeps in mind what a fetch found, unless a later one did.
    pub(super) fn keep_found(&self, id: FileId, found: Found) {
        let mut all = self.found();
        if all.len() >= limits::FETCH_MEMORY {
            // Nobody asks for it. Rather one that the next fetch finds out again: what is whole is not fetched again.
            let damaged = all.iter().find(|(_, found)| !found.whole);
            let goes = damaged.or_else(|| all.iter().next()).map(|(id, _)| *id);
            goes.and_then(|id| all.remove(&id));
        }
        all.entry(id).or_insert(found);
    }

    /// Has the file looked at before it is used again.
    pub(super) fn doubt(&self, id: &FileId) {
        self.inner.cache.set_trust(id, Trust::Doubted);
    }

    /// Removes the file from the cache. One that could not be removed is counted on, and looked at before it is used.
    pub(super) async fn drop_cached(&self, id: &FileId) -> Result<(), StoreError> {
        let bytes = self.inner.cache.forget(id);
        let (local, file) = (self.inner.local.clone(), *id);
        let removed = on_disk(move || local.remove(&file)).await;
        if let (Err(_), Some(bytes)) = (&removed, bytes) {
            self.inner.cache.put_back(*id, bytes);
        }
        self.count();
        removed
    }

    /// Brings the file of `size` bytes into the cache, or waits for whoever does already, for at most [`limits::FETCH_WAIT`]: the
    /// fetch goes on.
    pub(super) async fn bring(&self, id: FileId, size: u64) -> Brought {
        let mut state = self.join(id, size);
        let done = state.wait_for(|state| matches!(state, State::Done { .. }));
        match timeout(limits::FETCH_WAIT, done).await {
            Ok(Ok(state)) => match *state {
                State::Done { outcome, .. } => outcome,
                State::UnderWay => Brought::NotNow,
            },
            // It takes longer, or its task ended without a word.
            Ok(Err(_)) | Err(_) => Brought::NotNow,
        }
    }

    /// The fetch of the file that is under way, or has just failed, or is begun now.
    fn join(&self, id: FileId, size: u64) -> watch::Receiver<State> {
        let mut under_way = self.under_way();
        if under_way.len() >= limits::FETCH_MEMORY {
            under_way.retain(|_, state| still_counts(state));
        }
        if let Some(state) = under_way.get(&id).filter(|state| still_counts(state)) {
            return state.clone();
        }
        let before = match under_way.get(&id).map(|state| *state.borrow()) {
            Some(State::Done { pause, .. }) => pause,
            _ => Duration::ZERO,
        };
        let (tell, state) = watch::channel(State::UnderWay);
        under_way.insert(id, state.clone());
        let remote = self.clone();
        tokio::spawn(async move {
            let outcome = remote.provide(id, size).await;
            remote.count();
            if outcome == Brought::Here {
                remote.under_way().remove(&id);
            }
            let done = State::Done {
                outcome,
                at: Instant::now(),
                pause: outcome.pause(before),
            };
            // Nobody may be waiting any more.
            let _ = tell.send(done);
        });
        state
    }

    /// Looks at what is here already, then fetches. What goes wrong is logged here, once.
    async fn provide(&self, id: FileId, size: u64) -> Brought {
        if self.inner.cache.touch(&id).is_some() {
            let Ok(_place) = self.inner.checks.acquire().await else {
                return Brought::NotNow;
            };
            let local = self.inner.local.clone();
            match on_disk(move || check_whole(&local, &id)).await {
                Ok(true) => {
                    self.inner.cache.set_trust(&id, Trust::Verified);
                    return Brought::Here;
                }
                Ok(false) => {
                    tracing::warn!(file = %id, "A cached image is damaged, and is fetched again.");
                }
                Err(error) => {
                    tracing::warn!(
                        file = %id, error = &error as &dyn std::error::Error,
                        "A cached image cannot be read, and is fetched again."
                    );
                }
            }
            if let Err(error) = self.drop_cached(&id).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "The cache of images failed."
                );
                return Brought::NoDisk;
            }
        }
        let Ok(_place) = self.inner.fetches.acquire().await else {
            return Brought::NotNow;
        };
        // What an older one found counts no more.
        self.found().remove(&id);
        let mut began = Instant::now();
        let mut fetched = self.fetch(id, size).await;
        if let Err(StoreError::Damaged(_)) = fetched {
            // Once may be the way; what is wrong twice lies in the bucket like that, and is noted for good.
            began = Instant::now();
            fetched = self.fetch(id, size).await;
        }
        let outcome = fetched.unwrap_or_else(|error| {
            let outcome = Brought::of(&error);
            if outcome != Brought::Damaged {
                tracing::error!(
                    file = %id, error = &error as &dyn std::error::Error,
                    "An image could not be fetched from the image store."
                );
            }
            outcome
        });
        if let Brought::Here | Brought::Damaged = outcome {
            let found = Found {
                whole: outcome == Brought::Here,
                since: began,
            };
            self.found().insert(id, found);
        }
        metrics::counter!(m::FILES_FETCHED, "outcome" => outcome.word()).increment(1);
        match outcome {
            Brought::Here => tracing::info!(
                file = %id, seconds = began.elapsed().as_secs_f64(), "An image was fetched from the image store."
            ),
            Brought::Damaged => tracing::error!(
                file = %id, next = "publish its release again with --image",
                "What the image store has under this name is something else, and is not served."
            ),
            Brought::AboveCache { size } => tracing::error!(
                file = %id, size, cache_bytes = self.cache_bytes(), next = "raise files.cache_bytes",
                "An image does not fit into the cache."
            ),
            Brought::Nowhere | Brought::NotNow | Brought::NoDisk => {}
        }
        outcome
    }

    async fn fetch(&self, id: FileId, size: u64) -> Result<Brought, StoreError> {
        let bytes = on_disk_bytes(size);
        // Nothing is given up for it before it is known to come: while the bucket is away the cache is all there is.
        if let Err(no_room) = self.inner.cache.has_room(bytes, self.in_use()) {
            return Ok(self.no_room(id, size, no_room));
        }
        let Some((outline, mut content)) = self.inner.bucket.get(&id, size).await? else {
            return Ok(Brought::Nowhere);
        };
        let room = match self.room(bytes).await? {
            Ok(room) => room,
            Err(no_room) => return Ok(self.no_room(id, size, no_room)),
        };
        let mut arrival = Arrival::begin(self.inner.local.clone(), outline)?;
        let (mut received, mut cut_off_at) = (0, 0);
        while let Some(next) = futures::StreamExt::next(&mut content).await {
            match next {
                Ok(bytes) => {
                    received += bytes.len() as u64;
                    arrival.take(bytes).await?;
                }
                // The client goes on by itself in the first seconds only, and a large image takes longer than lines last.
                Err(error @ (StoreError::Away { .. } | StoreError::Faulty { .. })) => {
                    if received >= size {
                        break;
                    }
                    if received - cut_off_at < limits::FETCH_PIECE_BYTES as u64 {
                        return Err(error);
                    }
                    cut_off_at = received;
                    let rest = self.inner.bucket.get_rest(&id, received, size).await?;
                    let Some(rest) = rest else {
                        return Ok(Brought::Nowhere);
                    };
                    content = rest;
                }
                Err(error) => return Err(error),
            }
        }
        let ended = arrival.end().await;
        if let Err(StoreError::Io { .. }) = ended {
            // It may have its name already, and nobody counts it.
            let local = self.inner.local.clone();
            on_disk(move || local.remove(&id)).await?;
        }
        ended?;
        room.fill(id);
        Ok(Brought::Here)
    }

    fn no_room(&self, file: FileId, size: u64, no_room: NoRoom) -> Brought {
        match no_room {
            NoRoom::Never => Brought::AboveCache { size },
            NoRoom::Now => {
                tracing::warn!(
                    %file, cache_bytes = self.cache_bytes(),
                    "There is no room in the cache: all that is in it is being downloaded. Raise files.cache_bytes."
                );
                Brought::NotNow
            }
        }
    }

    fn in_use(&self) -> impl Fn(&FileId) -> bool {
        |file| self.inner.local.is_in_use(file)
    }

    /// Makes room, and removes from the disk what has to go for it. What could not be removed is counted on.
    async fn room(&self, bytes: u64) -> Result<Result<Room<'_>, NoRoom>, StoreError> {
        let reserved = self.inner.cache.reserve(bytes, self.in_use());
        let (room, victims) = match reserved {
            Ok(reserved) => reserved,
            Err(no_room) => return Ok(Err(no_room)),
        };
        let local = self.inner.local.clone();
        let (kept, removed) = on_disk(move || Ok(remove_all(&local, victims))).await?;
        for (file, bytes) in kept {
            self.inner.cache.put_back(file, bytes);
        }
        removed.map(|()| Ok(room))
    }

    /// Brings an upload to the bucket, and then into the cache, where there is room for it.
    pub(super) async fn put(
        &self,
        whole: Whole,
        stop: &CancellationToken,
    ) -> Result<Outline, StoreError> {
        let (id, outline) = (whole.id(), whole.outline().clone());
        let whole = Arc::new(whole);
        self.inner.bucket.put(&whole, stop).await?;
        // What was found out about it before holds no longer.
        self.found().remove(&id);
        self.under_way()
            .retain(|file, state| *file != id || matches!(*state.borrow(), State::UnderWay));
        let room = self.room(on_disk_bytes(outline.size())).await?;
        match (room, Arc::into_inner(whole)) {
            (Ok(room), Some(whole)) => {
                on_disk(move || whole.keep()).await?;
                room.fill(id);
            }
            (_, whole) => {
                let local = self.inner.local.clone();
                on_disk(move || {
                    let discarded = local.discard(&id);
                    // Not before: the next upload of the file begins as soon as this one is over.
                    drop(whole);
                    discarded
                })
                .await?;
            }
        }
        self.count();
        Ok(outline)
    }

    fn count(&self) {
        metrics::gauge!(m::FILES_CACHED).set(self.inner.cache.bytes() as f64);
    }

    fn found(&self) -> MutexGuard<'_, HashMap<FileId, Found>> {
        self.inner
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<FileId, watch::Receiver<State>>> {
        self.inner
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

const AWAY: &str =
    "The image store is away: images that are cached here are served, others wait for it.";

/// Whether who asks now gets this answer.
fn still_counts(state: &watch::Receiver<State>) -> bool {
    match *state.borrow() {
        // One whose task ended without a word is begun anew.
        State::UnderWay => state.has_changed().is_ok(),
        State::Done { at, pause, .. } => at.elapsed() < pause,
    }
}

/// What a file of `size` bytes takes on the disk.
fn on_disk_bytes(size: u64) -> u64 {
    size + Outline::encoded_len(size)
}

/// Removes the files up to the first that it cannot; gives those that are left.
fn remove_all(
    local: &LocalStore,
    mut victims: Vec<(FileId, u64)>,
) -> (Vec<(FileId, u64)>, Result<(), StoreError>) {
    while let Some((file, _)) = victims.last() {
        if let Err(error) = local.remove(file) {
            return (victims, Err(error));
        }
        metrics::counter!(m::FILES_EVICTED).increment(1);
        victims.pop();
    }
    (victims, Ok(()))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_disk_that_fails_is_left_alone_for_longer_each_time_and_for_minutes_at_most() {
        let full = Brought::of(&StoreError::Io {
            operation: "write fetched",
            file: FileId::of(b"a"),
            source: io::ErrorKind::StorageFull.into(),
        });
        let mut pauses = vec![full.pause(Duration::ZERO)];
        for _ in 0..10 {
            pauses.push(full.pause(pauses[pauses.len() - 1]));
        }
        assert_eq!(pauses[..3], [2, 4, 8].map(Duration::from_secs));
        assert_eq!(pauses[10], limits::DISK_PAUSE);
        let other = Brought::NotNow.pause(limits::DISK_PAUSE);
        assert_eq!(other, limits::FETCH_PAUSE);
    }
}
