//! The trust documents that this server hands to devices: the chain of roots and one revocation list per product.
//!
//! The server verifies what it publishes but can sign none of it. The first root comes from the configuration's directory,
//! later documents from the database.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use bytes::Bytes;
use fwpush_keys::{
    dsse::{DsseError, Envelope, PayloadType},
    id::{Product, ReleaseId},
    revocation::Revocation,
    root::Root,
    trust::{TrustError, Verified},
};
use fwpush_proto::v1::{RevocationVersion, TrustUpdate};
use serde::Deserialize;
use tokio::sync::{Mutex, watch};

use crate::{
    db::{Db, DbError, TrustKind},
    limits,
};

/// Why the server cannot start with its trust documents.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("read {}; `fwpush init` writes it", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Refused { path: PathBuf, source: TrustError },
    #[error("a trust document in the database")]
    Stored(#[source] TrustError),
    #[error("read the trust documents of the database")]
    Db(#[from] DbError),
}

/// Why a document is not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Envelope(#[from] DsseError),
    #[error(transparent)]
    Refused(#[from] TrustError),
    #[error("a release is published with `fwpush release publish`")]
    Release,
    #[error("the payload names no product of the root")]
    Product,
    #[error("the list is not newer than the one held, version {held} under root {held_root}")]
    NotNewer { held_root: u64, held: u64 },
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("take in what other nodes have published")]
    Behind(#[source] LoadError),
}

/// What publishing changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Published {
    /// This very document was there already.
    Same,
    Root,
    Revocation(Product),
}

/// The documents; clones share them.
#[derive(Clone, Debug)]
pub struct TrustDocs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    documents: RwLock<Documents>,
    changed: watch::Sender<u64>,
    /// One publication at a time, from the check to the commit. Holds how many documents of the database were looked at.
    publishing: Mutex<u64>,
    /// The value of `changed` up to which all lists are applied.
    applied: Mutex<Option<u64>>,
}

#[derive(Clone, Debug)]
struct Documents {
    /// Envelopes by version, oldest first, without a gap.
    roots: Vec<(u64, Bytes)>,
    head: Verified<Root>,
    revocations: HashMap<Product, Verified<Revocation>>,
}

/// Devices at the present root would refuse such a list; those that hold it are still bound by it.
const UNBELIEVED: &str =
    "A revocation list is not signed by the present root's keys; sign and publish it again.";

/// The one field looked at before a signature is checked: it selects the keys, and `Verified` requires that it agrees.
#[derive(Deserialize)]
struct ProductOnly {
    product: Product,
}

impl TrustDocs {
    /// Reads `dir/1.root.json` and what was published since.
    pub async fn open(dir: &Path, db: Db) -> Result<Self, LoadError> {
        let path = dir.join("1.root.json");
        let first = fs::read(&path).map_err(|source| LoadError::Read {
            path: path.clone(),
            source,
        })?;
        let head = Verified::<Root>::bootstrap(&first)
            .map_err(|source| LoadError::Refused { path, source })?;
        let roots = vec![(head.version, Bytes::from(first))];
        let mut documents = Documents {
            roots,
            head,
            revocations: HashMap::new(),
        };
        for stored in db.trust_documents(TrustKind::Root).await? {
            documents.advance(&stored).map_err(LoadError::Stored)?;
        }
        for stored in db.trust_documents(TrustKind::Revocation).await? {
            documents
                .take_stored_revocation(&stored)
                .map_err(LoadError::Stored)?;
        }
        let (changed, _) = watch::channel(0);
        let inner = Inner {
            publishing: Mutex::new(0),
            applied: Mutex::new(None),
            db,
            documents: RwLock::new(documents),
            changed,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    fn documents(&self) -> RwLockReadGuard<'_, Documents> {
        self.inner
            .documents
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest root.
    pub fn root(&self) -> Verified<Root> {
        self.documents().head.clone()
    }

    /// Envelopes of all roots, oldest first.
    pub fn roots(&self) -> Vec<Bytes> {
        self.documents()
            .roots
            .iter()
            .map(|(_, envelope)| envelope.clone())
            .collect()
    }

    /// The newest list of a product.
    pub fn revocation(&self, product: &Product) -> Option<Verified<Revocation>> {
        self.documents().revocations.get(product).cloned()
    }

    /// The newest list of every product that has one.
    pub fn revocations(&self) -> Vec<Verified<Revocation>> {
        self.documents().revocations.values().cloned().collect()
    }

    /// Wakes when a document was published.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// What a device lacks that holds root `root_version` and list `revocation`; `None` when nothing.
    pub fn update_for(
        &self,
        product: &Product,
        root_version: u64,
        held: &RevocationVersion,
    ) -> Option<TrustUpdate> {
        let documents = self.documents();
        let lacking = documents
            .roots
            .iter()
            .filter(|(version, _)| *version > root_version);
        let roots: Vec<Bytes> = lacking
            .take(limits::ROOTS_PER_UPDATE)
            .map(|(_, envelope)| envelope.clone())
            .collect();
        // A list may be signed by keys of the newest root: it goes with the hop that reaches it.
        let reaches_head = root_version + roots.len() as u64 >= documents.head.version;
        let revocation = documents
            .revocations
            .get(product)
            .filter(|list| reaches_head && list.order() > (held.root_version, held.version))
            .map(|list| Bytes::from_owner(list.envelope_arc()));
        if roots.is_empty() && revocation.is_none() {
            return None;
        }
        Some(TrustUpdate {
            roots,
            revocation: revocation.unwrap_or_default(),
        })
    }

    /// Marks in the database what the newest list of `product` revokes, which stops its rollouts.
    async fn apply_revocation(&self, product: &Product, actor: &str) -> Result<(), DbError> {
        let Some(list) = self.revocation(product) else {
            return Ok(());
        };
        let mut revoked: Vec<ReleaseId> = list
            .revoked
            .iter()
            .map(|revoked| revoked.release_id)
            .collect();
        // A release below the list's counter is refused by every device that holds the list: as good as named in it.
        let releases = self.inner.db.list_releases(Some(product)).await?;
        let below = releases
            .iter()
            .filter(|release| release.security_counter < list.min_security_counter);
        revoked.extend(below.map(|release| release.release_id));
        self.inner.db.set_revoked(product, &revoked, actor).await
    }

    /// Applies each product's newest list, unless that was done since the last document came. What fails is done at the next call: a
    /// node, the one that published it too, may die or lose its database between a list's commit and this.
    pub async fn apply_revocations(&self, actor: &str) -> Result<(), DbError> {
        let mut applied = self.inner.applied.lock().await;
        let present = *self.inner.changed.borrow();
        if *applied == Some(present) {
            return Ok(());
        }
        for list in self.revocations() {
            self.apply_revocation(&list.product, actor).await?;
        }
        *applied = Some(present);
        Ok(())
    }

    /// Takes in what other nodes have published. What a device may have of it is handed on.
    pub async fn reload(&self) -> Result<(), LoadError> {
        let mut seen = self.inner.publishing.lock().await;
        self.catch_up(&mut seen).await
    }

    /// `seen` is how many documents there were at the last look.
    async fn catch_up(&self, seen: &mut u64) -> Result<(), LoadError> {
        let db = &self.inner.db;
        let count = db.count_trust_documents().await?;
        if count == *seen {
            return Ok(());
        }
        let mut documents = self.documents().clone();
        let newest = documents.head.version;
        for stored in db.trust_documents(TrustKind::Root).await? {
            documents
                .take_stored_root(&stored)
                .map_err(LoadError::Stored)?;
        }
        if documents.head.version > newest {
            documents.forget_unbelieved();
        }
        for stored in db.trust_documents(TrustKind::Revocation).await? {
            documents
                .take_stored_revocation(&stored)
                .map_err(LoadError::Stored)?;
        }
        *seen = count;
        self.hand_out(documents);
        Ok(())
    }

    fn hand_out(&self, documents: Documents) {
        *self
            .inner
            .documents
            .write()
            .unwrap_or_else(PoisonError::into_inner) = documents;
        self.inner.changed.send_modify(|count| *count += 1);
    }

    /// Verifies a root or a revocation list, commits it, and hands it to the devices.
    pub async fn publish(
        &self,
        envelope: &[u8],
        operator: &str,
    ) -> Result<Published, PublishError> {
        let mut seen = self.inner.publishing.lock().await;
        // What another node published counts before this does.
        self.catch_up(&mut seen)
            .await
            .map_err(PublishError::Behind)?;
        let parsed = Envelope::parse(envelope)?;
        let mut documents = self.documents().clone();
        let published = match parsed.payload_type() {
            PayloadType::Release => return Err(PublishError::Release),
            PayloadType::Root => documents.take_root(envelope)?,
            PayloadType::Revocation => documents.take_revocation(envelope, parsed.payload())?,
        };
        let (kind, product, (root_version, version), event) = match &published {
            Published::Same => return Ok(published),
            Published::Root => {
                let version = documents.head.version;
                (TrustKind::Root, "", (version, version), "ROOT_PUBLISHED")
            }
            Published::Revocation(product) => {
                let order = documents.revocations[product].order();
                (
                    TrustKind::Revocation,
                    product.as_str(),
                    order,
                    "REVOCATION_PUBLISHED",
                )
            }
        };
        self.inner
            .db
            .add_trust_document(kind, product, root_version, version, envelope)
            .await?;
        // Before anything else that can fail: what is committed is what is handed out.
        self.hand_out(documents);
        let words = format!("{product} version {version} under root {root_version}");
        self.inner
            .db
            .audit(event, words.trim_start(), operator)
            .await?;
        Ok(published)
    }
}

impl Documents {
    fn advance(&mut self, envelope: &[u8]) -> Result<(), TrustError> {
        self.head = self.head.advance(envelope)?;
        self.roots
            .push((self.head.version, Bytes::copy_from_slice(envelope)));
        Ok(())
    }

    fn take_root(&mut self, envelope: &[u8]) -> Result<Published, PublishError> {
        if self.roots.iter().any(|(_, held)| held == envelope) {
            return Ok(Published::Same);
        }
        self.advance(envelope)?;
        self.forget_unbelieved();
        Ok(Published::Root)
    }

    /// A stored root that follows on the newest one held; an older one: nothing.
    fn take_stored_root(&mut self, envelope: &[u8]) -> Result<(), TrustError> {
        if self.roots.iter().any(|(_, held)| held == envelope) {
            return Ok(());
        }
        self.advance(envelope)
    }

    /// Lets go of lists that the newest root's keys have not signed.
    fn forget_unbelieved(&mut self) {
        let head = &self.head;
        self.revocations.retain(|product, list| {
            let believed = head.verify_revocation(product, list.envelope()).is_ok();
            if !believed {
                tracing::warn!(%product, "{UNBELIEVED}");
            }
            believed
        });
    }

    fn take_revocation(
        &mut self,
        envelope: &[u8],
        payload: &[u8],
    ) -> Result<Published, PublishError> {
        let product = product_of(payload).ok_or(PublishError::Product)?;
        if let Some(held) = self.revocations.get(&product) {
            if held.envelope() == envelope {
                return Ok(Published::Same);
            }
            let list = self.head.verify_revocation(&product, envelope)?;
            let (held_root, version) = held.order();
            if list.order() <= held.order() {
                return Err(PublishError::NotNewer {
                    held_root,
                    held: version,
                });
            }
            self.revocations.insert(product.clone(), list);
        } else {
            let list = self.head.verify_revocation(&product, envelope)?;
            self.revocations.insert(product.clone(), list);
        }
        Ok(Published::Revocation(product))
    }

    /// A stored list was verified when it was published. One whose keys a later root took away still binds devices that
    /// hold it, but can be handed to no other: it is left out.
    fn take_stored_revocation(&mut self, envelope: &[u8]) -> Result<(), TrustError> {
        let parsed = Envelope::parse(envelope)?;
        let Some(product) = product_of(parsed.payload()) else {
            return Ok(());
        };
        match self.head.verify_revocation(&product, envelope) {
            Ok(list) => {
                if self
                    .revocations
                    .get(&product)
                    .is_none_or(|held| held.order() < list.order())
                {
                    self.revocations.insert(product, list);
                }
            }
            Err(error) => tracing::warn!(%product, %error, "{UNBELIEVED}"),
        }
        Ok(())
    }
}

/// The product that an unverified payload names: good for choosing keys, for nothing else.
pub fn product_of(payload: &[u8]) -> Option<Product> {
    serde_json::from_slice::<ProductOnly>(payload)
        .ok()
        .map(|named| named.product)
}
