//! Which documents are believed.
//!
//! [`Verified<T>`] is the only way to hold a document that counts, and the functions here are the only way to one. Each
//! looks at the type first, then at the signatures, and reads the payload last.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::document::DocumentError;
use crate::dsse::{DsseError, Envelope, PayloadType};
use crate::id::Product;
use crate::limits::ROOTS_PER_UPDATE;
use crate::release::{Release, check_pae_len};
use crate::revocation::Revocation;
use crate::root::{RoleKeys, Root};
use crate::time::Timestamp;

pub use crate::admit::{AdmitFacts, Refusal, admit};
pub use crate::store::TrustStore;

/// A document whose signatures reached the threshold, with the exact envelope they came in. Cloning is cheap.
pub struct Verified<T> {
    document: Arc<T>,
    envelope: Arc<[u8]>,
}

impl<T> Verified<T> {
    fn new(document: T, envelope: &[u8]) -> Self {
        Self {
            document: Arc::new(document),
            envelope: envelope.into(),
        }
    }

    /// The envelope, byte for byte as it was verified: to be stored and passed on.
    pub fn envelope(&self) -> &[u8] {
        &self.envelope
    }

    /// The same without copying.
    pub fn envelope_arc(&self) -> Arc<[u8]> {
        Arc::clone(&self.envelope)
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.document
    }
}

impl<T> Clone for Verified<T> {
    fn clone(&self) -> Self {
        Self {
            document: Arc::clone(&self.document),
            envelope: Arc::clone(&self.envelope),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Verified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Verified").field(&self.document).finish()
    }
}

impl<T: PartialEq> PartialEq for Verified<T> {
    /// Equal documents in equal envelopes.
    fn eq(&self, other: &Self) -> bool {
        self.document == other.document && self.envelope == other.envelope
    }
}

/// Why a document is not believed. Nothing of it may be kept or acted on.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Not an envelope.
    #[error(transparent)]
    Envelope(#[from] DsseError),
    /// A document of another kind, whoever signed it.
    #[error("expected a {expected}, got a {got}")]
    PayloadType {
        /// What was needed.
        expected: PayloadType,
        /// What it says it is.
        got: PayloadType,
    },
    /// Too few of the right keys have signed.
    #[error("{have} of {need} needed signatures by {keys} of root version {root_version}")]
    Signatures {
        /// Distinct keys that have signed.
        have: usize,
        /// The threshold.
        need: u32,
        /// Which keys, in words.
        keys: String,
        /// The root that lists the keys.
        root_version: u64,
    },
    /// Signed, and yet not a valid document.
    #[error("{kind} is not valid")]
    Document {
        /// What it says it is.
        kind: PayloadType,
        /// What is wrong.
        source: DocumentError,
    },
    /// Roots follow one another without a gap and never go back.
    #[error("root version {got} cannot follow version {held}; version {} is next", held + 1)]
    RootVersion {
        /// Version held.
        held: u64,
        /// Version offered.
        got: u64,
    },
    /// More root documents than one call takes.
    #[error("{0} root documents at once; at most {ROOTS_PER_UPDATE} are taken")]
    TooManyRoots(usize),
    /// The root does not list this product.
    #[error("product {product} is not in root version {root_version}")]
    UnknownProduct {
        /// The product.
        product: Product,
        /// The root.
        root_version: u64,
    },
    /// Signed for another product.
    #[error("is for product {got}, not {expected}")]
    WrongProduct {
        /// The verifier's own.
        expected: Product,
        /// The document's.
        got: Product,
    },
    /// Above what the root allows.
    #[error("security counter {got} is above the {max} that the root allows for {product}")]
    Counter {
        /// The document's.
        got: u64,
        /// The root's.
        max: u64,
        /// For which product.
        product: Product,
    },
    /// A revocation list made under a root that is not held yet.
    #[error(
        "revocation list was made under root version {got}, version {held} is held; the roots come first"
    )]
    RevocationRoot {
        /// Version held.
        held: u64,
        /// Version the list names.
        got: u64,
    },
    /// The root has expired: nothing new is accepted under it until it is replaced.
    #[error("root version {version} expired at {expires}")]
    RootExpired {
        /// Which root.
        version: u64,
        /// When.
        expires: Timestamp,
    },
}

impl TrustError {
    /// A stable word for reports.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(e) => e.code(),
            Self::PayloadType { .. } => "PAYLOAD_TYPE",
            Self::Signatures { .. } => "SIGNATURES",
            Self::Document { .. } => "DOCUMENT",
            Self::RootVersion { .. } => "ROOT_VERSION",
            Self::TooManyRoots(_) => "TOO_MANY_ROOTS",
            Self::UnknownProduct { .. } | Self::WrongProduct { .. } => "PRODUCT",
            Self::Counter { .. } => "COUNTER",
            Self::RevocationRoot { .. } => "REVOCATION_ROOT",
            Self::RootExpired { .. } => "ROOT_EXPIRED",
        }
    }
}

impl Verified<Root> {
    /// Takes the first root: the one built into the image or pinned by hand. It must be signed by its own root keys to
    /// its own threshold, which shows that it is whole; that it is the *right* one is the caller's knowledge.
    pub fn bootstrap(envelope: &[u8]) -> Result<Self, TrustError> {
        let parsed = expect_type(envelope, PayloadType::Root)?;
        let root = read_root(&parsed)?;
        check_root_keys(&parsed, &root)?;
        Ok(Self::new(root, envelope))
    }

    /// Takes the root that follows this one: exactly the next version, signed to the thresholds of both. Expiry is not
    /// judged here: an expired root still says who may sign the next (TUF 5.3.10 judges the last only).
    ///
    /// On error nothing has changed, and the refused bytes must not be kept.
    pub fn advance(&self, envelope: &[u8]) -> Result<Self, TrustError> {
        let parsed = expect_type(envelope, PayloadType::Root)?;
        // TUF 5.3.4: a threshold of the keys of version N, before anything in it is read.
        check_root_keys(&parsed, self)?;
        let next = read_root(&parsed)?;
        // TUF 5.3.5: exactly version N + 1.
        if next.version != self.version + 1 {
            return Err(TrustError::RootVersion {
                held: self.version,
                got: next.version,
            });
        }
        // TUF 5.3.4: and a threshold of the keys of version N + 1.
        check_root_keys(&parsed, &next)?;
        Ok(Self::new(next, envelope))
    }

    /// Verifies a release for `product`, which is the verifier's own: the keys are chosen by it, never by what the
    /// unverified payload names. Conditions that depend on the device or the time are [`admit`]'s.
    pub fn verify_release(
        &self,
        product: &Product,
        envelope: &[u8],
    ) -> Result<Verified<Release>, TrustError> {
        let kind = PayloadType::Release;
        let parsed = expect_type(envelope, kind)?;
        check_pae_len(parsed.pae().len())
            .map_err(|source| TrustError::Document { kind, source })?;
        let max = self.check_release_keys(product, &parsed)?;
        let release = Release::from_payload(parsed.payload())
            .map_err(|source| TrustError::Document { kind, source })?;
        check_product(product, &release.product)?;
        check_counter(product, release.security_counter, max)?;
        Ok(Verified::new(release, envelope))
    }

    /// Verifies the revocation list of `product`. Whether it is newer than the one held is [`TrustStore`]'s to say.
    pub fn verify_revocation(
        &self,
        product: &Product,
        envelope: &[u8],
    ) -> Result<Verified<Revocation>, TrustError> {
        let kind = PayloadType::Revocation;
        let parsed = expect_type(envelope, kind)?;
        let max = self.check_release_keys(product, &parsed)?;
        let list = Revocation::from_payload(parsed.payload())
            .map_err(|source| TrustError::Document { kind, source })?;
        check_product(product, &list.product)?;
        check_counter(product, list.min_security_counter, max)?;
        // A list from the future would outrank all that follow until that root is made.
        if list.root_version > self.version {
            return Err(TrustError::RevocationRoot {
                held: self.version,
                got: list.root_version,
            });
        }
        Ok(Verified::new(list, envelope))
    }

    /// Whether the root may still be used at `now`. To be asked of the last root only.
    pub fn check_expiry(&self, now: Timestamp) -> Result<(), TrustError> {
        if now >= self.expires {
            return Err(TrustError::RootExpired {
                version: self.version,
                expires: self.expires,
            });
        }
        Ok(())
    }

    /// Checks that the keys of `product` have signed. Returns the highest security counter that the root allows it.
    fn check_release_keys(
        &self,
        product: &Product,
        envelope: &Envelope,
    ) -> Result<u64, TrustError> {
        let (Some(role), Some(rule)) = (self.release_keys(product), self.products.get(product))
        else {
            return Err(TrustError::UnknownProduct {
                product: product.clone(),
                root_version: self.version,
            });
        };
        let words = format!("release keys for product {product}");
        check_threshold(envelope, self, &role, words)?;
        Ok(rule.max_counter)
    }
}

fn expect_type(envelope: &[u8], expected: PayloadType) -> Result<Envelope, TrustError> {
    let envelope = Envelope::parse(envelope)?;
    let got = envelope.payload_type();
    if got != expected {
        return Err(TrustError::PayloadType { expected, got });
    }
    Ok(envelope)
}

fn read_root(envelope: &Envelope) -> Result<Root, TrustError> {
    Root::from_payload(envelope.payload()).map_err(|source| TrustError::Document {
        kind: PayloadType::Root,
        source,
    })
}

fn check_root_keys(envelope: &Envelope, root: &Root) -> Result<(), TrustError> {
    check_threshold(envelope, root, &root.roles.root, "root keys".to_owned())
}

fn check_threshold(
    envelope: &Envelope,
    root: &Root,
    role: &RoleKeys,
    keys: String,
) -> Result<(), TrustError> {
    let have = envelope.signers(root.public_keys(role)).len();
    if have < role.threshold as usize || role.threshold == 0 {
        return Err(TrustError::Signatures {
            have,
            need: role.threshold,
            keys,
            root_version: root.version,
        });
    }
    Ok(())
}

fn check_product(expected: &Product, got: &Product) -> Result<(), TrustError> {
    if got != expected {
        return Err(TrustError::WrongProduct {
            expected: expected.clone(),
            got: got.clone(),
        });
    }
    Ok(())
}

fn check_counter(product: &Product, got: u64, max: u64) -> Result<(), TrustError> {
    if got > max {
        return Err(TrustError::Counter {
            got,
            max,
            product: product.clone(),
        });
    }
    Ok(())
}
