//! Publishing a release: everything the server can check before any device sees it.

use std::sync::Arc;

use fwpush_keys::{
    dsse::{DsseError, Envelope},
    id::FileId,
    release::Release,
    time::Timestamp,
    trust::{TrustError, Verified},
};

use crate::{
    db::{Db, DbError, Published, ReleaseRow},
    files::{FileStore, StoreError},
    limits,
    trust::{LoadError, TrustDocs, product_of},
};

/// Why a release is not published; the words go to the operator.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Envelope(#[from] DsseError),
    #[error(transparent)]
    Refused(#[from] TrustError),
    #[error("the payload names no product")]
    Product,
    #[error(
        "the release was issued {0}, which is in the future; check the clock where it was built"
    )]
    IssuedInFuture(Timestamp),
    #[error("the release expired {0}; build it again")]
    Expired(Timestamp),
    #[error("the release is revoked: {0}")]
    Revoked(String),
    #[error(
        "security counter {counter} is below {floor}, the lowest that the revocation list allows"
    )]
    BelowFloor { counter: u64, floor: u64 },
    #[error("file {0} was not uploaded")]
    Missing(String),
    #[error("file {file} has {found} bytes; the release says {signed}")]
    Size {
        file: String,
        found: u64,
        signed: u64,
    },
    #[error(
        "seq {seq} is not above {newest}, the newest of this product and channel; build the release again"
    )]
    OlderSeq { seq: u64, newest: u64 },
    #[error("seq {0} is taken by a release with other content")]
    SeqTaken(u64),
    #[error("version {0} is taken by a release with other content; give this one a new version")]
    VersionTaken(String),
    #[error("release id {0} is taken by a release with other content")]
    IdTaken(String),
    #[error(transparent)]
    Db(#[from] DbError),
    /// Whether it has the files cannot be said now.
    #[error(transparent)]
    Store(StoreError),
    #[error("take in what other nodes have published")]
    Behind(#[source] LoadError),
    #[error("the file name is empty, longer than 255 bytes, or has a slash or control characters")]
    FileName,
}

/// What publishing works with.
#[derive(Clone, Debug)]
pub struct Releases {
    db: Db,
    store: FileStore,
    trust: TrustDocs,
}

impl Releases {
    pub fn new(db: Db, store: FileStore, trust: TrustDocs) -> Self {
        Self { db, store, trust }
    }

    /// Verifies the signatures of a release envelope against the present root; nothing else is judged.
    pub fn verify(&self, envelope: &[u8]) -> Result<Verified<Release>, PublishError> {
        let product =
            product_of(Envelope::parse(envelope)?.payload()).ok_or(PublishError::Product)?;
        Ok(self.trust.root().verify_release(&product, envelope)?)
    }

    /// Publishes; the same bytes twice answer the same.
    pub async fn publish(
        &self,
        envelope: &[u8],
        file_name: &str,
        operator: &str,
    ) -> Result<Arc<ReleaseRow>, PublishError> {
        // Under the root and the lists of now, whichever node they were published at.
        self.trust.reload().await.map_err(PublishError::Behind)?;
        let release = self.verify(envelope)?;
        if let Some(row) = self
            .db
            .release(&release.release_id)
            .await?
            .filter(|row| *row.envelope == *envelope)
        {
            return Ok(row);
        }
        let now = self.db.now();
        self.trust.root().check_expiry(now)?;
        self.check_times(&release, now)?;
        self.check_revocation(&release)?;
        self.check_files(&release).await?;
        check_name(file_name)?;
        let row = ReleaseRow::of(&release, file_name, now);
        let files: Vec<FileId> = release.file_ids().collect();
        match self.db.insert_release(&row, &files, operator).await? {
            Published::New => {}
            Published::Same(row) => return Ok(row),
            Published::SeqOlder { newest } => {
                return Err(PublishError::OlderSeq {
                    seq: release.seq,
                    newest,
                });
            }
            Published::SeqTaken(_) => return Err(PublishError::SeqTaken(release.seq)),
            Published::VersionTaken(_) => {
                return Err(PublishError::VersionTaken(release.version.to_string()));
            }
            Published::FileMissing(file) => return Err(PublishError::Missing(file.to_string())),
            Published::IdTaken => {
                return Err(PublishError::IdTaken(release.release_id.to_string()));
            }
        }
        tracing::info!(
            release.id = %release.release_id, product = %release.product, version = %release.version,
            "A release was published."
        );
        Ok(Arc::new(row))
    }

    fn check_times(&self, release: &Release, now: Timestamp) -> Result<(), PublishError> {
        if release.issued > now.saturating_add(limits::ISSUED_AHEAD) {
            return Err(PublishError::IssuedInFuture(release.issued));
        }
        if release.expires <= now {
            return Err(PublishError::Expired(release.expires));
        }
        Ok(())
    }

    fn check_revocation(&self, release: &Release) -> Result<(), PublishError> {
        let Some(list) = self.trust.revocation(&release.product) else {
            return Ok(());
        };
        if let Some(revoked) = list
            .revoked
            .iter()
            .find(|revoked| revoked.release_id == release.release_id)
        {
            return Err(PublishError::Revoked(revoked.reason.clone()));
        }
        let (counter, floor) = (release.security_counter, list.min_security_counter);
        if counter < floor {
            Err(PublishError::BelowFloor { counter, floor })
        } else {
            Ok(())
        }
    }

    async fn check_files(&self, release: &Release) -> Result<(), PublishError> {
        for encoding in &release.image().encodings {
            let file = encoding.blake3.to_string();
            self.store
                .takes(&encoding.blake3, encoding.size)
                .map_err(PublishError::Store)?;
            let found = match self.store.size(&encoding.blake3).await {
                Ok(Some(found)) => found,
                Err(error) if error.passes() => return Err(PublishError::Store(error)),
                Ok(None) | Err(_) => return Err(PublishError::Missing(file)),
            };
            if found != encoding.size {
                return Err(PublishError::Size {
                    file,
                    found,
                    signed: encoding.size,
                });
            }
        }
        Ok(())
    }
}

/// A hint for people on devices; harmless in any file system.
fn check_name(name: &str) -> Result<(), PublishError> {
    let harmless = !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name
            .chars()
            .any(|c| c == '/' || c == '\\' || c.is_control());
    if harmless {
        Ok(())
    } else {
        Err(PublishError::FileName)
    }
}
