//! Tables `releases` and `release_files`: what was published, as its exact signed bytes and as columns to search by.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use fwpush_keys::{
    id::{Channel, FileId, Product, ReleaseId},
    release::{HwRange, Release},
    time::Timestamp,
    trust::Verified,
};
use semver::Version;
use serde_json::json;

use super::{
    Db, DbError,
    engine::{
        Column::{Int, Text},
        Row, Rows, params,
    },
    events::{NewEvent, insert as insert_events},
};
use crate::limits;

/// A file that releases name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// Bytes.
    pub size: u64,
    /// The products of the releases, each with whether only revoked ones name it.
    pub products: Vec<(Product, bool)>,
}

/// A published release. Immutable but for `revoked`.
#[derive(Clone, Debug)]
pub struct ReleaseRow {
    pub release_id: ReleaseId,
    pub product: Product,
    pub channel: Channel,
    pub version: Version,
    pub seq: u64,
    pub security_counter: u64,
    /// The signed DSSE envelope, exact bytes.
    pub envelope: Arc<[u8]>,
    /// The file that devices are told to fetch.
    pub file_id: FileId,
    /// Its bytes.
    pub size: u64,
    pub file_name: String,
    /// BLAKE3 of the plain image.
    pub image_id: FileId,
    /// Bytes of the plain image.
    pub image_size: u64,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
    pub published_at: Timestamp,
    pub revoked: bool,
    pub hw: Vec<HwRange>,
    /// The oldest version that it installs over.
    pub from_min: Option<Version>,
    /// The newest version that it installs over.
    pub from_max: Option<Version>,
    pub min_agent: Option<Version>,
}

impl ReleaseRow {
    /// The row for a release whose signatures were checked.
    pub fn of(release: &Verified<Release>, file_name: &str, published_at: Timestamp) -> Self {
        let (image, plain) = (release.image(), release.plain());
        Self {
            release_id: release.release_id,
            product: release.product.clone(),
            channel: release.channel.clone(),
            version: release.version.clone(),
            seq: release.seq,
            security_counter: release.security_counter,
            envelope: release.envelope_arc(),
            file_id: plain.blake3,
            size: plain.size,
            file_name: file_name.to_owned(),
            image_id: image.blake3,
            image_size: image.size,
            issued_at: release.issued,
            expires_at: release.expires,
            published_at,
            revoked: false,
            hw: release.hw.clone(),
            from_min: release.requires.from_min.clone(),
            from_max: release.requires.from_max.clone(),
            min_agent: release.min_agent.clone(),
        }
    }

    /// Whether devices may still be told to install it.
    pub fn may_be_offered(&self, now: Timestamp) -> bool {
        !self.revoked && now < self.expires_at
    }

    fn read(row: &Row) -> Result<Self, DbError> {
        Ok(Self {
            release_id: row.parse("release_id")?,
            product: row.parse("product")?,
            channel: row.parse("channel")?,
            version: row.parse("version")?,
            seq: row.u64("seq")?,
            security_counter: row.u64("security_counter")?,
            envelope: row.bytes("envelope")?.into(),
            file_id: row.parse("file_id")?,
            size: row.u64("size")?,
            file_name: row.text("file_name")?.to_owned(),
            image_id: row.parse("image_id")?,
            image_size: row.u64("image_size")?,
            issued_at: row.time("issued_at_ms")?,
            expires_at: row.time("expires_at_ms")?,
            published_at: row.time("published_at_ms")?,
            revoked: row.bool("revoked")?,
            hw: row.json("hw")?,
            from_min: row.opt_parse("from_min")?,
            from_max: row.opt_parse("from_max")?,
            min_agent: row.opt_parse("min_agent")?,
        })
    }
}

/// What publishing came to. Only `New` changed anything.
#[derive(Clone, Debug)]
pub enum Published {
    New,
    /// The same envelope was published before.
    Same(Arc<ReleaseRow>),
    /// Another envelope has this release id.
    IdTaken,
    /// Another release of the product and channel has this seq.
    SeqTaken(ReleaseId),
    /// The product and channel have a newer seq.
    SeqOlder {
        newest: u64,
    },
    /// Another release of the product and channel has this version.
    VersionTaken(ReleaseId),
    /// A file that the release names was not uploaded, or is being removed as unused.
    FileMissing(FileId),
}

/// Releases that were read lately: every registration and every announcement asks for one. The bytes never change; `revoked`
/// may be [`limits::RELEASE_CACHE_LIFE`] old where another node changed it.
#[derive(Debug, Default)]
pub(super) struct ReleaseCache {
    held: Mutex<HashMap<ReleaseId, (Arc<ReleaseRow>, Instant)>>,
}

impl ReleaseCache {
    fn held(&self) -> MutexGuard<'_, HashMap<ReleaseId, (Arc<ReleaseRow>, Instant)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &ReleaseId) -> Option<Arc<ReleaseRow>> {
        let held = self.held();
        let (row, read_at) = held.get(id)?;
        (read_at.elapsed() < limits::RELEASE_CACHE_LIFE).then(|| Arc::clone(row))
    }

    fn put(&self, row: &Arc<ReleaseRow>) {
        let mut held = self.held();
        if held.len() >= limits::RELEASE_CACHE {
            held.clear();
        }
        held.insert(row.release_id, (Arc::clone(row), Instant::now()));
    }

    fn clear(&self) {
        self.held().clear();
    }
}

impl Db {
    /// Publishes a release whose envelope names `files`. All or nothing; see [`Published`].
    pub async fn insert_release(
        &self,
        release: &ReleaseRow,
        files: &[FileId],
        actor: &str,
    ) -> Result<Published, DbError> {
        const PUBLISH: &str = "publish a release";
        const SAME_ID: &str = "SELECT * FROM releases WHERE release_id = $1";
        const RIVALS: &str = "SELECT release_id, seq, version FROM releases \
            WHERE product = $1 AND channel = $2 AND (seq >= $3 OR version = $4) ORDER BY seq DESC";
        const FILES: &str = "SELECT f.file_id FROM {rows} AS x JOIN files AS f ON f.file_id = x.file_id \
            WHERE f.gone_at_ms IS NULL AND f.doomed_at_ms IS NULL AND f.damaged_at_ms IS NULL";
        const INSERT: &str = "INSERT INTO releases (release_id, product, channel, version, seq, security_counter, envelope, \
            file_id, size, file_name, image_id, image_size, issued_at_ms, expires_at_ms, published_at_ms, hw, \
            from_min, from_max, min_agent) \
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)";
        // They are needed from now on.
        const UNMARK: &str = "UPDATE files SET unused_at_ms = NULL FROM {rows} AS x \
            WHERE files.file_id = x.file_id AND files.unused_at_ms IS NOT NULL";
        const INSERT_FILES: &str =
            "INSERT INTO release_files (release_id, file_id) SELECT $2, x.file_id FROM {rows} AS x";

        let mut tx = self.begin().await?;
        if let Some(row) = tx
            .row(PUBLISH, SAME_ID, params![release.release_id.to_string()])
            .await?
        {
            let held = ReleaseRow::read(&row)?;
            return Ok(if held.envelope == release.envelope {
                Published::Same(Arc::new(held))
            } else {
                Published::IdTaken
            });
        }
        let version = release.version.to_string();
        let values = params![
            release.product.as_str(),
            release.channel.as_str(),
            release.seq,
            version.as_str()
        ];
        let rivals = tx.rows(PUBLISH, RIVALS, values).await?;
        for rival in &rivals {
            if rival.u64("seq")? == release.seq {
                return Ok(Published::SeqTaken(rival.parse("release_id")?));
            }
            if rival.text("version")? == version {
                return Ok(Published::VersionTaken(rival.parse("release_id")?));
            }
        }
        if let Some(newest) = rivals.first() {
            return Ok(Published::SeqOlder {
                newest: newest.u64("seq")?,
            });
        }
        let mut files = files.to_vec();
        files.sort_unstable();
        files.dedup();
        let present = tx
            .rows_for(
                PUBLISH,
                FILES,
                Rows::texts(&[Text("file_id")], &files),
                vec![],
            )
            .await?;
        let present = present
            .iter()
            .map(|row| row.parse("file_id"))
            .collect::<Result<Vec<FileId>, _>>()?;
        if let Some(missing) = files.iter().find(|file| !present.contains(file)) {
            return Ok(Published::FileMissing(*missing));
        }
        let text = |version: &Option<Version>| version.as_ref().map(Version::to_string);
        let hw = serde_json::to_string(&release.hw).map_err(|error| DbError::value("hw", error))?;
        let values = params![
            release.release_id.to_string(),
            release.product.as_str(),
            release.channel.as_str(),
            version,
            release.seq,
            release.security_counter,
            &*release.envelope,
            release.file_id.to_string(),
            release.size,
            release.file_name.as_str(),
            release.image_id.to_string(),
            release.image_size,
            release.issued_at,
            release.expires_at,
            release.published_at,
            hw,
            text(&release.from_min),
            text(&release.from_max),
            text(&release.min_agent),
        ];
        tx.execute(PUBLISH, INSERT, values).await?;
        let id = release.release_id.to_string();
        tx.execute_for(
            PUBLISH,
            INSERT_FILES,
            Rows::texts(&[Text("file_id")], &files),
            params![id],
        )
        .await?;
        tx.execute_for(
            PUBLISH,
            UNMARK,
            Rows::texts(&[Text("file_id")], &files),
            vec![],
        )
        .await?;
        let details = format!(
            "{} {} in {}, release {}",
            release.product, release.version, release.channel, release.release_id
        );
        insert_events(
            &mut tx,
            &[NewEvent::audit(None, "RELEASE_PUBLISHED", details, actor)],
        )
        .await?;
        tx.commit().await?;
        Ok(Published::New)
    }

    /// The release; None for an unknown id.
    pub async fn release(&self, id: &ReleaseId) -> Result<Option<Arc<ReleaseRow>>, DbError> {
        if let Some(held) = self.inner.releases.get(id) {
            return Ok(Some(held));
        }
        let row = self
            .reader()
            .row(
                "look up a release",
                "SELECT * FROM releases WHERE release_id = $1",
                params![id.to_string()],
            )
            .await?;
        let Some(row) = row else { return Ok(None) };
        let row = Arc::new(ReleaseRow::read(&row)?);
        self.inner.releases.put(&row);
        Ok(Some(row))
    }

    /// The newest [`limits::RELEASES_LISTED`] releases, newest first; of one product or of all.
    pub async fn list_releases(
        &self,
        product: Option<&Product>,
    ) -> Result<Vec<Arc<ReleaseRow>>, DbError> {
        const LIST: &str = "SELECT * FROM releases WHERE ($1 IS NULL OR product = $1) ORDER BY published_at_ms DESC, seq DESC LIMIT $2";
        let values = params![
            product.map(|product| product.as_str().to_owned()),
            limits::RELEASES_LISTED
        ];
        let rows = self.reader().rows("list releases", LIST, values).await?;
        rows.iter()
            .map(|row| ReleaseRow::read(row).map(Arc::new))
            .collect()
    }

    /// Makes exactly `revoked` the revoked releases of `product`, as its newest list says, and has their rollouts ended. Ids of
    /// releases that were never published here are ignored. So already: changes nothing.
    pub async fn set_revoked(
        &self,
        product: &Product,
        revoked: &[ReleaseId],
        actor: &str,
    ) -> Result<(), DbError> {
        const REVOKE: &str = "revoke releases";
        const HELD: &str = "SELECT release_id, revoked FROM releases WHERE product = $1";
        const SET: &str = "UPDATE releases SET revoked = x.revoked FROM {rows} AS x WHERE releases.release_id = x.release_id";
        // The driver looks at them again and ends them.
        const DRIVE: &str = "UPDATE rollouts SET driven = 1 WHERE product = $1 AND state IN (1, 2) \
            AND release_id IN (SELECT release_id FROM releases WHERE product = $1 AND revoked = 1)";
        let mut tx = self.begin().await?;
        let mut changed = Rows::of(&[Text("release_id"), Int("revoked")]);
        for row in tx.rows(REVOKE, HELD, params![product.as_str()]).await? {
            let id: ReleaseId = row.parse("release_id")?;
            let now_revoked = revoked.contains(&id);
            if row.bool("revoked")? != now_revoked {
                changed.push(json!([id.to_string(), i64::from(now_revoked)]));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let details = format!(
            "{product}: {} releases changed, {} are revoked",
            changed.len(),
            revoked.len()
        );
        tx.execute_for(REVOKE, SET, changed, vec![]).await?;
        tx.execute(REVOKE, DRIVE, params![product.as_str()]).await?;
        insert_events(
            &mut tx,
            &[NewEvent::audit(None, "RELEASES_REVOKED", details, actor)],
        )
        .await?;
        tx.commit().await?;
        self.inner.releases.clear();
        self.nudges().committed(true, true);
        Ok(())
    }

    /// Whose file it is. None: no release names it.
    pub async fn named_file(&self, file: &FileId) -> Result<Option<NamedFile>, DbError> {
        const SELECT: &str = "SELECT r.product, MIN(r.revoked) AS revoked, MIN(x.size) AS size FROM release_files AS f \
            JOIN releases AS r ON r.release_id = f.release_id JOIN files AS x ON x.file_id = f.file_id \
            WHERE f.file_id = $1 GROUP BY r.product";
        let rows = self
            .reader()
            .rows(
                "look up whose file it is",
                SELECT,
                params![file.to_string()],
            )
            .await?;
        let Some(first) = rows.first() else {
            return Ok(None);
        };
        let products = rows
            .iter()
            .map(|row| Ok((row.parse("product")?, row.bool("revoked")?)))
            .collect::<Result<_, DbError>>()?;
        let size = first.u64("size")?;
        Ok(Some(NamedFile { size, products }))
    }
}
