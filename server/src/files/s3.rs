//! A bucket of an S3 server: the same layout as in a directory, each call signed, each error in words.
//!
//! ```text
//! <prefix>/ab/abcd...          the file, named by its BLAKE3 hash
//! <prefix>/ab/abcd....outline  the chaining values of its 64 KiB groups
//! ```
//! The content is put last, and an object appears whole or not at all: what is found under its hash has everything.

use std::{fmt, fs, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use fwpush_keys::{
    id::FileId,
    outline::{Outline, OutlineError},
    time::Timestamp,
};
use object_store::{
    BackoffConfig, Certificate, ClientOptions, Error, GetOptions, GetResult, MultipartUpload,
    ObjectStore as _, ObjectStoreExt as _, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    list::{PaginatedListOptions, PaginatedListStore as _},
    path::Path,
    signer::Signer as _,
};
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    files::{
        StoreError,
        answers::{Connector, Why},
        local::Whole,
        place::S3Place,
    },
    limits,
};

/// Bytes of a file as they come.
pub(super) type Content = BoxStream<'static, Result<Bytes, StoreError>>;

const FETCH: &str = "fetch an image";
const STORE: &str = "store an image";

/// The bucket; clones share its connections.
#[derive(Clone)]
pub(super) struct Bucket {
    s3: Arc<AmazonS3>,
    place: Arc<S3Place>,
}

/// Where a device may fetch a file for a while, without us. Whoever has the URL has the file: it is not to be logged.
#[derive(Clone)]
pub struct Presigned {
    pub url: String,
    /// By this machine's clock, after which the URL is refused.
    pub expires: Timestamp,
}

/// What a bucket holds under one id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub file: FileId,
    /// Bytes of the content; 0 where only an outline is left of it.
    pub size: u64,
    /// When it was written, by the clock of the store.
    pub written: Timestamp,
}

// Neither the client, which has the secret key, nor a URL that is one.
impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket")
            .field(&self.place.to_string())
            .finish()
    }
}

impl fmt::Debug for Presigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Presigned")
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl Bucket {
    /// Prepares the client; nothing is asked yet. Blocks on the disk.
    pub(super) fn open(place: &S3Place) -> Result<Self, StoreError> {
        // reqwest takes the process's provider and has none of its own; ours is the only one that is built in.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let unusable = |source| StoreError::Client {
            bucket: place.to_string(),
            source,
        };
        let mut options = ClientOptions::new()
            // A whole image takes as long as it takes, as long as something comes.
            .with_timeout_disabled()
            .with_read_timeout(limits::S3_STALL)
            .with_connect_timeout(limits::S3_CONNECT)
            .with_allow_http(place.allow_http);
        if let Some(path) = &place.ca_file {
            let pem = fs::read(path).map_err(|source| StoreError::Config {
                path: path.clone(),
                source,
            })?;
            options = options.with_no_system_certificates(true);
            for authority in Certificate::from_pem_bundle(&pem).map_err(unusable)? {
                options = options.with_root_certificate(authority);
            }
        }
        let secret = place.secret_key().map_err(|source| StoreError::Config {
            path: place.secret_key_file.clone(),
            source,
        })?;
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&place.bucket)
            .with_region(&place.region)
            .with_access_key_id(&place.access_key_id)
            .with_secret_access_key(secret)
            // Its answer has one error for all keys, without a kind; and not every server has it.
            .with_disable_bulk_delete(true)
            .with_client_options(options)
            .with_http_connector(Connector)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(100),
                    max_backoff: Duration::from_secs(2),
                    base: 2.0,
                },
                max_retries: limits::S3_RETRIES,
                retry_timeout: limits::S3_RETRY_TIME,
            });
        if let Some(endpoint) = &place.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        Ok(Self {
            s3: Arc::new(builder.build().map_err(unusable)?),
            place: Arc::new(place.clone()),
        })
    }

    /// Two small questions: whether the bucket is there and lets us in.
    pub(super) async fn check(&self) -> Result<(), StoreError> {
        // A list tells whether there is a bucket; an object whether we may read what is in it.
        let nothing = Path::from(format!("{}fwpush-probe", self.prefix()));
        match self.s3.head(&nothing).await {
            Ok(_) | Err(Error::NotFound { .. }) => self.is_there().await,
            Err(error) => Err(self.failed("look for images", error)),
        }
    }

    /// Whether there is a bucket. To be asked where an object is missing: the answer is the same when the bucket is.
    async fn is_there(&self) -> Result<(), StoreError> {
        let one = PaginatedListOptions {
            max_keys: Some(1),
            ..PaginatedListOptions::default()
        };
        let listed = self.s3.list_paginated(Some(&self.prefix()), one).await;
        listed
            .map(drop)
            .map_err(|error| self.failed("list images", error))
    }

    /// Bytes of the file, with its outline beside it. `None`: it is not there, or not whole.
    pub(super) async fn size(&self, id: &FileId) -> Result<Option<u64>, StoreError> {
        let Some(size) = self.length(&self.content(id)).await? else {
            return Ok(None);
        };
        let outline = self.length(&self.outline(id)).await?;
        let whole = size > 0 && outline == Some(Outline::encoded_len(size));
        Ok(whole.then_some(size))
    }

    async fn length(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        match self.s3.head(path).await {
            Ok(found) => Ok(Some(found.size)),
            Err(Error::NotFound { .. }) => self.is_there().await.map(|()| None),
            Err(error) => Err(self.failed("look for an image", error)),
        }
    }

    /// The verified outline of a file of `size` bytes, and its content as it comes. `None`: it is not there.
    pub(super) async fn get(
        &self,
        id: &FileId,
        size: u64,
    ) -> Result<Option<(Outline, Content)>, StoreError> {
        let content = match self.s3.get(&self.content(id)).await {
            Ok(content) => content,
            Err(Error::NotFound { .. }) => return self.is_there().await.map(|()| None),
            Err(error) => return Err(self.failed(FETCH, error)),
        };
        if content.meta.size != size || !(1..=limits::FILE_BYTES).contains(&size) {
            return Err(StoreError::Damaged(*id));
        }
        let outline = self.get_outline(id, size).await?;
        let outline = outline.map_err(|_| StoreError::Damaged(*id))?;
        Ok(Some((outline, self.content_of(content))))
    }

    /// The content from `offset` on, of a file of `size` bytes of which that much has come. `None`: it is not there any more.
    pub(super) async fn get_rest(
        &self,
        id: &FileId,
        offset: u64,
        size: u64,
    ) -> Result<Option<Content>, StoreError> {
        let rest = GetOptions::new().with_range(Some(offset..size));
        let content = match self.s3.get_opts(&self.content(id), rest).await {
            Ok(content) => content,
            Err(Error::NotFound { .. }) => return self.is_there().await.map(|()| None),
            Err(error) => return Err(self.failed(FETCH, error)),
        };
        if content.meta.size != size {
            return Err(StoreError::Damaged(*id));
        }
        Ok(Some(self.content_of(content)))
    }

    fn content_of(&self, found: GetResult) -> Content {
        let bucket = self.clone();
        found
            .into_stream()
            .map_err(move |error| bucket.failed(FETCH, error))
            .boxed()
    }

    async fn get_outline(
        &self,
        id: &FileId,
        size: u64,
    ) -> Result<Result<Outline, OutlineError>, StoreError> {
        let expected = Outline::encoded_len(size);
        let failed = |error| self.failed("fetch an outline", error);
        let bytes = match self.s3.get(&self.outline(id)).await {
            // What it must have is known before it is taken into memory.
            Ok(found) if found.meta.size == expected => found.bytes().await.map_err(failed)?,
            Ok(_) | Err(Error::NotFound { .. }) => return Err(StoreError::Damaged(*id)),
            Err(error) => return Err(failed(error)),
        };
        Ok(Outline::from_bytes(*id, size, &bytes))
    }

    /// Brings an upload to the bucket: its outline, then its content. Cancelled by `stop`, or dropped, nothing is left but the outline.
    pub(super) async fn put(
        &self,
        whole: &Arc<Whole>,
        stop: &CancellationToken,
    ) -> Result<(), StoreError> {
        let (id, outline) = (whole.id(), whole.outline().clone());
        let failed = |error| self.failed(STORE, error);
        let payload = PutPayload::from(outline.to_bytes());
        self.s3
            .put(&self.outline(&id), payload)
            .await
            .map_err(failed)?;
        let path = self.content(&id);
        if outline.size() <= limits::S3_PART_BYTES as u64 {
            let bytes = part(whole, 0, outline.size()).await?;
            let put = self.s3.put(&path, bytes.into()).await;
            return put.map(drop).map_err(failed);
        }
        let upload = self.s3.put_multipart(&path).await.map_err(failed)?;
        let mut parts = Parts {
            file: id,
            upload: Some(upload),
        };
        let sent = match &mut parts.upload {
            Some(upload) => match self.put_parts(&mut **upload, whole, stop).await {
                Ok(()) => upload.complete().await.map(drop).map_err(failed),
                Err(error) => Err(error),
            },
            None => Ok(()),
        };
        let upload = parts.upload.take();
        if let (Err(_), Some(upload)) = (&sent, upload) {
            forget_parts(id, upload).await;
        }
        match sent {
            // Its parts are gone, and the bucket may be there.
            Err(StoreError::NoBucket { bucket, source }) => {
                self.is_there().await?;
                Err(StoreError::Faulty {
                    operation: STORE,
                    bucket,
                    source,
                })
            }
            sent => sent,
        }
    }

    async fn put_parts(
        &self,
        upload: &mut dyn MultipartUpload,
        whole: &Arc<Whole>,
        stop: &CancellationToken,
    ) -> Result<(), StoreError> {
        let size = whole.outline().size();
        let places = Arc::new(Semaphore::new(limits::S3_PARTS_AT_ONCE));
        let mut parts = JoinSet::new();
        let mut offset = 0;
        while offset < size {
            let place = tokio::select! {
                () = stop.cancelled() => return Err(StoreError::Stopping),
                place = places.clone().acquire_owned() => place,
            };
            while let Some(done) = parts.try_join_next() {
                self.part_done(done)?;
            }
            let bytes = part(whole, offset, size).await?;
            offset += bytes.len() as u64;
            let sending = upload.put_part(bytes.into());
            parts.spawn(async move {
                let _place = place;
                sending.await
            });
        }
        loop {
            let done = tokio::select! {
                () = stop.cancelled() => return Err(StoreError::Stopping),
                done = parts.join_next() => done,
            };
            match done {
                Some(done) => self.part_done(done)?,
                None => return Ok(()),
            }
        }
    }

    fn part_done(
        &self,
        done: Result<object_store::Result<()>, tokio::task::JoinError>,
    ) -> Result<(), StoreError> {
        done.unwrap_or_else(|error| Err(Error::JoinError { source: error }))
            .map_err(|error| self.failed(STORE, error))
    }

    /// Removes the file: its content, then its outline. Not there: nothing.
    pub(super) async fn delete(&self, id: &FileId) -> Result<(), StoreError> {
        for path in [self.content(id), self.outline(id)] {
            match self.s3.delete(&path).await {
                Ok(()) => {}
                // Most servers say that they removed what is not there.
                Err(Error::NotFound { .. }) => self.is_there().await?,
                Err(error) => return Err(self.failed("remove an image", error)),
            }
        }
        Ok(())
    }

    /// What is there. Objects that are not just where we put them are passed over: they are somebody else's.
    pub(super) async fn list(&self) -> Result<Vec<Stored>, StoreError> {
        let prefix = (!self.place.prefix.is_empty()).then(|| Path::from(&*self.place.prefix));
        let mut objects = self.s3.list(prefix.as_ref());
        let mut found = std::collections::BTreeMap::new();
        while let Some(object) = objects.next().await {
            let object = object.map_err(|error| self.failed("list images", error))?;
            let name = object.location.filename().unwrap_or_default();
            let is_outline = name.ends_with(OUTLINE);
            let Ok(file) = name.trim_end_matches(OUTLINE).parse::<FileId>() else {
                continue;
            };
            let ours = if is_outline {
                self.outline(&file)
            } else {
                self.content(&file)
            };
            if object.location != ours {
                continue;
            }
            let written = Timestamp::from_ms(object.last_modified.timestamp_millis());
            let stored = found.entry(file).or_insert(Stored {
                file,
                size: 0,
                written,
            });
            stored.written = stored.written.max(written);
            if !is_outline {
                stored.size = object.size;
            }
        }
        Ok(found.into_values().collect())
    }

    /// A URL by which anybody can fetch the file's content for [`limits::PRESIGNED_LIFE`]. `None`: devices take no other than https.
    pub(super) async fn presign(&self, id: &FileId) -> Result<Option<Presigned>, StoreError> {
        if self.place.allow_http
            && self
                .place
                .endpoint
                .as_ref()
                .is_some_and(|url| url.starts_with("http:"))
        {
            return Ok(None);
        }
        let now = Timestamp::now();
        let life = limits::PRESIGNED_LIFE;
        let signed = self
            .s3
            .signed_url(http::Method::GET, &self.content(id), life)
            .await;
        let url = signed.map_err(|error| self.failed("sign a URL", error))?;
        Ok(Some(Presigned {
            url: url.into(),
            expires: now.saturating_add(life),
        }))
    }

    fn prefix(&self) -> String {
        match &*self.place.prefix {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        }
    }

    fn content(&self, id: &FileId) -> Path {
        let name = id.to_string();
        Path::from(format!("{}{}/{name}", self.prefix(), &name[..2]))
    }

    fn outline(&self, id: &FileId) -> Path {
        Path::from(format!("{}{OUTLINE}", self.content(id)))
    }

    fn failed(&self, operation: &'static str, source: Error) -> StoreError {
        let bucket = self.place.to_string();
        match Why::of(&source) {
            Why::Silence => StoreError::Away {
                operation,
                bucket,
                source,
            },
            Why::Fault => StoreError::Faulty {
                operation,
                bucket,
                source,
            },
            Why::Refusal => StoreError::Refused {
                operation,
                bucket,
                source,
            },
            // Where an object may be missing, that was looked at before: it is the bucket.
            Why::Missing => StoreError::NoBucket { bucket, source },
        }
    }
}

/// Parts of an image that are not one object yet. Whoever brings the image may hang up, which ends the work on them without a word:
/// dropped, they are forgotten.
struct Parts {
    file: FileId,
    upload: Option<Box<dyn MultipartUpload>>,
}

impl Drop for Parts {
    fn drop(&mut self) {
        // There is no runtime when the process ends.
        let runtime = tokio::runtime::Handle::try_current();
        if let (Some(upload), Ok(runtime)) = (self.upload.take(), runtime) {
            runtime.spawn(forget_parts(self.file, upload));
        }
    }
}

/// Tells the bucket to forget them. What stays costs room until the bucket's own rule for unfinished uploads takes it away.
async fn forget_parts(file: FileId, mut upload: Box<dyn MultipartUpload>) {
    if let Err(error) = upload.abort().await {
        tracing::warn!(
            %file, error = &error as &dyn std::error::Error,
            "The parts of an image that was not stored stay in the bucket for a while."
        );
    }
}

/// How the name of an outline ends.
const OUTLINE: &str = ".outline";

/// The next part at `offset`, read off the async threads.
async fn part(whole: &Arc<Whole>, offset: u64, size: u64) -> Result<Vec<u8>, StoreError> {
    let bytes = (size - offset).min(limits::S3_PART_BYTES as u64) as usize;
    let whole = Arc::clone(whole);
    super::on_disk(move || whole.read(offset, bytes)).await
}
