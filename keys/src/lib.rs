//! Names, signatures and certificates of fwpush.
//!
//! Everything that decides *whether to believe* something lives here, without a socket, a file or a task: the ids
//! ([`id`]), verified files ([`outline`]), signed documents ([`dsse`], [`root`], [`release`], [`revocation`]), the rules
//! by which they are accepted ([`trust`], [`store`], [`clock`]), the one file that carries them where no server is
//! ([`bundle`]), the certificates ([`pki`]) and the TLS settings ([`tls`]).
//!
//! A [`Verified`] document exists only where its signatures reached the threshold: the type has no other constructor.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod admit;
pub mod bundle;
pub mod clock;
pub mod document;
pub mod dsse;
mod explain;
pub mod id;
pub mod identity;
pub mod json;
pub mod limits;
pub mod outline;
pub mod pki;
pub mod release;
pub mod revocation;
pub mod root;
pub mod sign;
pub mod store;
pub mod time;
pub mod tls;
pub mod trust;

pub use admit::{AdmitFacts, Refusal, admit};
pub use bundle::{Bundle, BundleError};
pub use clock::TrustedClock;
pub use document::DocumentError;
pub use dsse::{DsseError, Envelope, PayloadType, Signature};
pub use id::{
    Channel, DeviceId, FileId, HwId, InvalidId, NodeId, OperatorId, Product, ReleaseId, RolloutId,
    TrustDomain,
};
pub use identity::{Identity, IdentityError, Role};
pub use outline::{GROUP_BYTES, GroupMismatch, Outline, OutlineBuilder, OutlineError, outline_of};
pub use pki::{Ca, PkiError, SanName, names_of, new_key_and_csr};
pub use release::{Component, Encoding, HwRange, Release, Requires};
pub use revocation::{Revocation, RevocationVersion, Revoked};
pub use root::{KeyAlgorithm, ProductRule, RoleKeys, Roles, Root, RootKey};
pub use sign::{KeyError, KeyId, PublicKey, SigningKey};
pub use store::TrustStore;
pub use time::{InvalidTime, Timestamp};
pub use tls::{Credentials, Peer, TlsError, error_text, explain};
pub use trust::{TrustError, Verified};
