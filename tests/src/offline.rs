//! What lies in `offline/`: the keys that no server ever has, and the documents that they sign.

use std::{fs, time::Duration};

use bytes::Bytes;
use fwpush_keys::{
    Component, Envelope, FileId, HwRange, Product, Release, ReleaseId, Requires, Revocation,
    RevocationVersion, Revoked, Root, SigningKey, Timestamp, Verified,
};
use fwpush_proto::v1::TrustUpdate;
use sha2::{Digest as _, Sha256};

use crate::site::{HW, PRODUCT, Site};

/// An hour.
pub const HOUR: Duration = Duration::from_secs(3600);
/// Security counter of every release that is made here.
pub const COUNTER: u64 = 5;

/// The keys, and the newest root that they have signed.
#[derive(Debug)]
pub struct Offline {
    pub root_keys: Vec<SigningKey>,
    pub release_keys: Vec<SigningKey>,
    pub root: Verified<Root>,
}

impl Offline {
    /// The keys that `fwpush init` made.
    pub fn of(site: &Site) -> Self {
        let key = |name: &str| {
            let pem = fs::read_to_string(site.dir().join("offline").join(name)).unwrap();
            SigningKey::from_pem(&pem).unwrap()
        };
        let root = fs::read(site.dir().join("server/trust/1.root.json")).unwrap();
        Self {
            root_keys: ["root-1.key", "root-2.key", "root-3.key"].map(key).into(),
            release_keys: vec![key("release-1.key")],
            root: Verified::bootstrap(&root).unwrap(),
        }
    }

    /// A release that every device of the tests accepts, not signed yet.
    pub fn release(&self, image: &[u8], version: &str) -> Release {
        let now = Timestamp::now();
        let size = image.len() as u64;
        let sha256 = Sha256::digest(image).into();
        Release {
            product: product(),
            channel: "stable".parse().unwrap(),
            release_id: ReleaseId::new_v7(now),
            version: version.parse().unwrap(),
            seq: now.as_ms().unsigned_abs(),
            security_counter: COUNTER,
            revocation_version: RevocationVersion::NONE,
            issued: now.saturating_sub(HOUR * 2),
            expires: now.saturating_add(HOUR),
            hw: vec![HwRange {
                id: HW.parse().unwrap(),
                rev_min: 1,
                rev_max: 1,
            }],
            requires: Requires::default(),
            min_agent: None,
            class: None,
            advisory_url: None,
            components: vec![Component::plain("system", size, FileId::of(image), sha256)],
            crit: Vec::new(),
        }
    }

    /// Signs a release with all release keys.
    pub fn sign(&self, release: &Release) -> Bytes {
        signed(release.to_envelope().unwrap(), &self.release_keys)
    }

    /// A revocation list under the newest root, signed with all release keys.
    pub fn revoke(&self, version: u64, releases: &[&Release]) -> Bytes {
        let now = Timestamp::now();
        let revoked = releases.iter().map(|release| Revoked {
            release_id: release.release_id,
            reason: "it bricks devices".into(),
        });
        let list = Revocation {
            product: product(),
            root_version: self.root.version,
            version,
            issued: now.saturating_sub(HOUR),
            expires: now.saturating_add(HOUR),
            revoked: revoked.collect(),
            min_security_counter: 0,
            crit: Vec::new(),
        };
        signed(list.to_envelope().unwrap(), &self.release_keys)
    }

    /// The root after the newest, changed and not signed yet.
    pub fn next_root(&self, change: impl FnOnce(&mut Root)) -> Root {
        let now = Timestamp::now();
        let mut next = self
            .root
            .next(now.saturating_sub(HOUR), now.saturating_add(HOUR));
        change(&mut next);
        next.drop_unused_keys();
        next
    }

    /// Makes the next root properly: the root keys sign, and it is the newest from here on.
    pub fn rotate(&mut self, change: impl FnOnce(&mut Root)) -> Bytes {
        let envelope = signed(
            self.next_root(change).to_envelope().unwrap(),
            &self.root_keys,
        );
        self.root = self.root.advance(&envelope).unwrap();
        envelope
    }
}

/// The product of every test.
pub fn product() -> Product {
    PRODUCT.parse().unwrap()
}

/// The envelope with signatures by `keys`.
pub fn signed(mut envelope: Envelope, keys: &[SigningKey]) -> Bytes {
    for key in keys {
        envelope.sign(key).unwrap();
    }
    envelope.to_bytes().into()
}

/// A message with these roots.
pub fn roots(roots: impl IntoIterator<Item = Bytes>) -> TrustUpdate {
    TrustUpdate {
        roots: roots.into_iter().collect(),
        revocation: Bytes::new(),
    }
}

/// A message with this revocation list.
pub fn list(revocation: Bytes) -> TrustUpdate {
    TrustUpdate {
        roots: Vec::new(),
        revocation,
    }
}
