//! The revocation list of a product: releases that nobody may install any more.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::document::{Document, DocumentError, check_text, check_times};
use crate::dsse::{Envelope, PayloadType};
use crate::id::{Product, ReleaseId};
use crate::limits::REASON_BYTES;
use crate::time::Timestamp;

/// A revocation list. As a value it is only well-formed: one that counts is a
/// [`Verified<Revocation>`](crate::trust::Verified).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Whose releases.
    pub product: Product,
    /// The root under which the list was made. Comes first in the order, so that after a stolen release key was replaced
    /// the new one's lists are newer than all that the thief could number.
    pub root_version: u64,
    /// From 1, rises with each list of the same root version.
    pub version: u64,
    /// When it was made.
    pub issued: Timestamp,
    /// Until when it should have been replaced. It binds on.
    pub expires: Timestamp,
    /// The revoked releases, each once.
    pub revoked: Vec<Revoked>,
    /// Releases with a lower security counter are revoked as well.
    #[serde(default)]
    pub min_security_counter: u64,
    /// Fields that a reader must understand or else refuse the document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crit: Vec<String>,
}

/// One revoked release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Which.
    pub release_id: ReleaseId,
    /// Why, for people; at most 256 bytes.
    pub reason: String,
}

/// Which list: the pair that orders the lists of a product. (0, 0) stands for none.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct RevocationVersion {
    /// See [`Revocation::root_version`].
    pub root_version: u64,
    /// See [`Revocation::version`].
    pub version: u64,
}

impl RevocationVersion {
    /// No list.
    pub const NONE: Self = Self {
        root_version: 0,
        version: 0,
    };

    /// Whether it stands for no list.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

impl fmt::Display for RevocationVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.root_version, self.version)
    }
}

impl Revocation {
    /// What decides which of two lists is newer: (root_version, version).
    pub fn order(&self) -> (u64, u64) {
        (self.root_version, self.version)
    }

    /// The same as a named pair.
    pub fn list_version(&self) -> RevocationVersion {
        RevocationVersion {
            root_version: self.root_version,
            version: self.version,
        }
    }

    /// The entry that revokes `release`, if there is one.
    pub fn find(&self, release: &ReleaseId) -> Option<&Revoked> {
        self.revoked.iter().find(|r| r.release_id == *release)
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
        Ok(Envelope::new(PayloadType::Revocation, self.to_payload()?))
    }
}

impl Document for Revocation {
    const FIELDS: &'static [&'static str] = &[
        "product",
        "root_version",
        "version",
        "issued",
        "expires",
        "revoked",
        "min_security_counter",
        "crit",
    ];

    fn validate(&self) -> Result<(), DocumentError> {
        if self.root_version == 0 {
            return Err(DocumentError::invalid("root_version", "must be at least 1"));
        }
        if self.version == 0 {
            return Err(DocumentError::invalid("version", "must be at least 1"));
        }
        check_times(self.issued, self.expires)?;
        let mut seen = BTreeSet::new();
        for entry in &self.revoked {
            check_text("revoked.reason", &entry.reason, REASON_BYTES)?;
            if !seen.insert(entry.release_id) {
                let problem = format!("release {} is listed twice", entry.release_id);
                return Err(DocumentError::invalid("revoked", problem));
            }
        }
        Ok(())
    }
}
