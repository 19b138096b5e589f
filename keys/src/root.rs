//! The root document: which keys may sign what, and which products exist.
//!
//! Follows TUF's root role, cut down to what fwpush needs. Version N+1 is signed by the root keys of N and of N+1, see
//! [`crate::trust`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::document::{Document, DocumentError, check_times};
use crate::dsse::{Envelope, PayloadType};
use crate::id::Product;
use crate::limits::{JSON_INTEGER, ROLE_KEYS};
use crate::sign::{KeyId, PublicKey};
use crate::time::Timestamp;

/// Keys, roles and products. As a value it is only well-formed: a root that may be used is a
/// [`Verified<Root>`](crate::trust::Verified).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// From 1; each accepted version is followed by exactly the next.
    pub version: u64,
    /// When it was made.
    pub issued: Timestamp,
    /// From when on no release may be installed under it. The next version is still accepted.
    pub expires: Timestamp,
    /// Every key that a role or product names, under its own id.
    pub keys: BTreeMap<KeyId, RootKey>,
    /// Who may sign roots and releases.
    pub roles: Roles,
    /// What may be released; anything else is refused.
    pub products: BTreeMap<Product, ProductRule>,
    /// Fields that a reader must understand or else refuse the document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crit: Vec<String>,
}

/// A public key in a root document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootKey {
    /// Ed25519 is all there is.
    pub algorithm: KeyAlgorithm,
    /// The key.
    pub public: PublicKey,
}

/// How a key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyAlgorithm {
    /// RFC 8032.
    Ed25519,
}

/// The keys of each role. No key has two roles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    /// Sign root documents.
    pub root: RoleKeys,
    /// Sign releases and revocations of all products that have no keys of their own.
    pub release: RoleKeys,
    /// Reserved for short-lived statements that can authorise nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freshness: Option<RoleKeys>,
}

/// Some keys, and how many of them must sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleKeys {
    /// Ids of keys in [`Root::keys`], each once, at most [`ROLE_KEYS`].
    pub keyids: Vec<KeyId>,
    /// From 1 to the number of keys.
    pub threshold: u32,
}

/// What the root says of one product.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductRule {
    /// The highest security counter a release or revocation list may carry: a stolen release key cannot lock devices out
    /// for ever by counting to the end. At most 2^53 - 1.
    pub max_counter: u64,
    /// Keys that sign this product's releases instead of the general ones; always together with `threshold`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyids: Option<Vec<KeyId>>,
    /// How many of `keyids` must sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<u32>,
}

impl ProductRule {
    /// A product that the general release keys sign for.
    pub fn new(max_counter: u64) -> Self {
        Self {
            max_counter,
            ..Self::default()
        }
    }

    /// The product's own keys, when it has some. Half of a rule counts as a rule with nothing in it.
    fn own_keys(&self) -> Option<RoleKeys> {
        if self.keyids.is_none() && self.threshold.is_none() {
            return None;
        }
        Some(RoleKeys {
            keyids: self.keyids.clone().unwrap_or_default(),
            threshold: self.threshold.unwrap_or_default(),
        })
    }
}

impl RoleKeys {
    /// `threshold` of `keys`.
    pub fn new(threshold: u32, keys: &[PublicKey]) -> Self {
        Self {
            keyids: keys.iter().map(PublicKey::key_id).collect(),
            threshold,
        }
    }

    fn validate(
        &self,
        field: &'static str,
        keys: &BTreeMap<KeyId, RootKey>,
    ) -> Result<(), DocumentError> {
        let invalid = |problem: String| Err(DocumentError::invalid(field, problem));
        let n = self.keyids.len();
        if n > ROLE_KEYS {
            return invalid(format!("{n} keys; at most {ROLE_KEYS} are allowed"));
        }
        // Also refuses an empty list.
        if self.threshold == 0 || self.threshold as usize > n {
            return invalid(format!("threshold {} of {n} keys", self.threshold));
        }
        let mut seen = BTreeSet::new();
        for id in &self.keyids {
            if !seen.insert(id) {
                return invalid(format!("key {id} is listed twice"));
            }
            if !keys.contains_key(id) {
                return invalid(format!("key {id} is not among the document's keys"));
            }
        }
        Ok(())
    }
}

impl Root {
    /// Version 1 without products: `root_threshold` of `root_keys` sign roots, `release_threshold` of `release_keys` sign
    /// releases. What does not fit together is refused by [`Root::to_envelope`].
    pub fn first(
        issued: Timestamp,
        expires: Timestamp,
        (root_threshold, root_keys): (u32, &[PublicKey]),
        (release_threshold, release_keys): (u32, &[PublicKey]),
    ) -> Self {
        let mut root = Self {
            version: 1,
            issued,
            expires,
            keys: BTreeMap::new(),
            roles: Roles {
                root: RoleKeys::new(root_threshold, root_keys),
                release: RoleKeys::new(release_threshold, release_keys),
                freshness: None,
            },
            products: BTreeMap::new(),
            crit: Vec::new(),
        };
        for key in root_keys.iter().chain(release_keys) {
            root.add_key(*key);
        }
        root
    }

    /// The version after this one, equal but for version and dates; to be changed and then signed by the keys of both.
    pub fn next(&self, issued: Timestamp, expires: Timestamp) -> Self {
        Self {
            version: self.version.saturating_add(1),
            issued,
            expires,
            ..self.clone()
        }
    }

    /// Lists a key, which gives it no role yet. Returns its id.
    pub fn add_key(&mut self, key: PublicKey) -> KeyId {
        let id = key.key_id();
        let algorithm = KeyAlgorithm::Ed25519;
        self.keys.insert(
            id,
            RootKey {
                algorithm,
                public: key,
            },
        );
        id
    }

    /// Drops the keys that no role and no product names any more.
    pub fn drop_unused_keys(&mut self) {
        let used: BTreeSet<KeyId> = self
            .all_roles()
            .into_iter()
            .flat_map(|(_, role)| role.keyids)
            .collect();
        self.keys.retain(|id, _| used.contains(id));
    }

    /// Who signs for `product`: its own keys, else the general release keys. `None` for a product that is not listed.
    pub fn release_keys(&self, product: &Product) -> Option<RoleKeys> {
        let rule = self.products.get(product)?;
        Some(
            rule.own_keys()
                .unwrap_or_else(|| self.roles.release.clone()),
        )
    }

    /// The public keys of a role of this root.
    pub fn public_keys<'a>(&'a self, role: &'a RoleKeys) -> impl Iterator<Item = &'a PublicKey> {
        role.keyids
            .iter()
            .filter_map(|id| self.keys.get(id).map(|key| &key.public))
    }

    /// Parses and validates a payload; says nothing of signatures.
    pub fn from_payload(payload: &[u8]) -> Result<Self, DocumentError> {
        Document::from_payload(payload)
    }

    /// The bytes to sign; fails when the document breaks a rule.
    pub fn to_payload(&self) -> Result<Vec<u8>, DocumentError> {
        Document::to_payload(self)
    }

    /// The document in an envelope, still without signatures.
    pub fn to_envelope(&self) -> Result<Envelope, DocumentError> {
        Ok(Envelope::new(PayloadType::Root, self.to_payload()?))
    }

    /// Every role with the field it stands in, products' own release keys included.
    fn all_roles(&self) -> Vec<(&'static str, RoleKeys)> {
        let mut roles = vec![
            ("roles.root", self.roles.root.clone()),
            ("roles.release", self.roles.release.clone()),
        ];
        roles.extend(self.roles.freshness.clone().map(|r| ("roles.freshness", r)));
        let own = self.products.values().filter_map(ProductRule::own_keys);
        // Products' own keys have the release role: a key may sign for several products.
        roles.extend(own.map(|role| ("products", role)));
        roles
    }
}

impl Document for Root {
    const FIELDS: &'static [&'static str] = &[
        "version", "issued", "expires", "keys", "roles", "products", "crit",
    ];

    fn validate(&self) -> Result<(), DocumentError> {
        if self.version == 0 {
            return Err(DocumentError::invalid("version", "must be at least 1"));
        }
        check_times(self.issued, self.expires)?;
        for (id, key) in &self.keys {
            // Recomputed, never believed: two ids for one key would let it count twice.
            if *id != key.public.key_id() {
                let problem = format!("{id} is not the id of the key listed under it");
                return Err(DocumentError::invalid("keys", problem));
            }
        }
        let mut role_of: BTreeMap<KeyId, &'static str> = BTreeMap::new();
        for (field, role) in self.all_roles() {
            role.validate(field, &self.keys)?;
            let role_name = if field == "products" {
                "roles.release"
            } else {
                field
            };
            for id in role.keyids {
                let other = *role_of.entry(id).or_insert(role_name);
                if other != role_name {
                    let problem = format!("key {id} also has the role {other}");
                    return Err(DocumentError::invalid(field, problem));
                }
            }
        }
        if let Some((product, _)) = self
            .products
            .iter()
            .find(|(_, rule)| rule.max_counter > JSON_INTEGER)
        {
            let problem = format!("max_counter of {product} is above {JSON_INTEGER}");
            return Err(DocumentError::invalid("products", problem));
        }
        Ok(())
    }
}
