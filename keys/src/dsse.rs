//! Envelopes that carry signed documents: DSSE 1.0 (Dead Simple Signing Envelope).
//!
//! The exact payload bytes are signed through the pre-authentication encoding (PAE), together with their type, so nothing
//! has to be brought into a canonical form and no document can be taken for one of another type.

use std::collections::BTreeSet;
use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use serde::{Deserialize, Serialize};

use crate::json::{self, JsonError};
use crate::limits::{ENVELOPE_BYTES, SIGNATURES};
use crate::sign::{PublicKey, SigningKey};

/// The DSSE specification asks verifiers to accept both alphabets.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(false);
const ANY_STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const ANY_URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// What an envelope carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PayloadType {
    /// Keys, roles and products: [`crate::root::Root`].
    Root,
    /// One release: [`crate::release::Release`].
    Release,
    /// Revoked releases of one product: [`crate::revocation::Revocation`].
    Revocation,
}

impl PayloadType {
    /// All types.
    pub const ALL: [Self; 3] = [Self::Root, Self::Release, Self::Revocation];

    /// The media type that is signed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Root => "application/vnd.fwpush.root.v1+json",
            Self::Release => "application/vnd.fwpush.release.v1+json",
            Self::Revocation => "application/vnd.fwpush.revocation.v1+json",
        }
    }

    /// What a person calls it.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Root => "root document",
            Self::Release => "release",
            Self::Revocation => "revocation list",
        }
    }
}

impl fmt::Display for PayloadType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.noun())
    }
}

/// Why bytes are not an envelope, or a signature cannot be added to one.
#[derive(Debug, thiserror::Error)]
pub enum DsseError {
    /// More than [`ENVELOPE_BYTES`].
    #[error("envelope has {0} bytes; at most {ENVELOPE_BYTES} are allowed")]
    TooLong(usize),
    /// Not strict JSON or not of an envelope's shape.
    #[error("envelope is not well-formed")]
    Json(#[from] JsonError),
    /// Not one of ours.
    #[error("envelope carries an unknown type {0:?}")]
    UnknownType(String),
    /// The payload or a signature.
    #[error("{0} of the envelope is not base64")]
    Base64(&'static str),
    /// More than [`SIGNATURES`].
    #[error("envelope has {0} signatures; at most {SIGNATURES} are allowed")]
    TooManySignatures(usize),
    /// A signature that was made elsewhere does not fit this payload and key.
    #[error("the signature is not one by key {key} over this document")]
    BadSignature {
        /// The public key it was offered for.
        key: PublicKey,
    },
}

impl DsseError {
    /// A stable word for reports.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLong(_) | Self::TooManySignatures(_) => "ENVELOPE_TOO_LARGE",
            Self::Json(_) | Self::Base64(_) => "ENVELOPE_MALFORMED",
            Self::UnknownType(_) => "PAYLOAD_TYPE",
            Self::BadSignature { .. } => "SIGNATURES",
        }
    }
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Which key, as the envelope claims. A hint only: it decides nothing.
    pub keyid: Option<String>,
    /// The signature; 64 bytes when it is one of Ed25519. Others never count.
    pub sig: Vec<u8>,
}

/// A document with its signatures. Nothing in here is verified: see [`crate::trust`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    payload_type: PayloadType,
    payload: Vec<u8>,
    signatures: Vec<Signature>,
}

/// The JSON form.
#[derive(Serialize, Deserialize)]
struct Wire {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    signatures: Vec<WireSignature>,
}

#[derive(Serialize, Deserialize)]
struct WireSignature {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keyid: Option<String>,
    sig: String,
}

impl Envelope {
    /// An envelope without signatures. What it carries must be a whole document of the type; see the `to_envelope` of
    /// each document.
    pub fn new(payload_type: PayloadType, payload: Vec<u8>) -> Self {
        Self {
            payload_type,
            payload,
            signatures: Vec::new(),
        }
    }

    /// Parses an envelope of at most 64 KiB and 16 signatures (none is possible: it is still to be signed), strictly: see
    /// [`crate::json`]. Base64 of both alphabets, with or without padding.
    pub fn parse(bytes: &[u8]) -> Result<Self, DsseError> {
        if bytes.len() > ENVELOPE_BYTES {
            return Err(DsseError::TooLong(bytes.len()));
        }
        let wire: Wire = json::from_slice(bytes)?;
        let payload_type = PayloadType::ALL
            .into_iter()
            .find(|known| known.as_str() == wire.payload_type)
            .ok_or_else(|| DsseError::UnknownType(wire.payload_type.chars().take(80).collect()))?;
        if wire.signatures.len() > SIGNATURES {
            return Err(DsseError::TooManySignatures(wire.signatures.len()));
        }
        let signatures = wire
            .signatures
            .into_iter()
            .map(|signature| {
                Ok(Signature {
                    keyid: signature.keyid,
                    sig: decode("a signature", &signature.sig)?,
                })
            })
            .collect::<Result<_, DsseError>>()?;
        Ok(Self {
            payload_type,
            payload: decode("the payload", &wire.payload)?,
            signatures,
        })
    }

    /// The envelope as JSON; the same envelope always gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let wire = Wire {
            payload: STANDARD.encode(&self.payload),
            payload_type: self.payload_type.as_str().to_owned(),
            signatures: self
                .signatures
                .iter()
                .map(|signature| WireSignature {
                    keyid: signature.keyid.clone(),
                    sig: STANDARD.encode(&signature.sig),
                })
                .collect(),
        };
        serde_json::to_vec(&wire).expect("strings and lists of strings always serialise")
    }

    /// What it says it carries.
    pub fn payload_type(&self) -> PayloadType {
        self.payload_type
    }

    /// The exact bytes that are signed (through [`Envelope::pae`]). Not verified.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The signatures, none of them verified.
    pub fn signatures(&self) -> &[Signature] {
        &self.signatures
    }

    /// The message that keys sign.
    pub fn pae(&self) -> Vec<u8> {
        pae(self.payload_type.as_str(), &self.payload)
    }

    /// Signs with `key`; replaces an older signature of the same key. Fails only over 16 signatures.
    pub fn sign(&mut self, key: &SigningKey) -> Result<(), DsseError> {
        self.add_signature(key.public(), key.sign(&self.pae()))
    }

    /// Adds a signature that was made elsewhere (HSM, KMS, another person), after verifying it; replaces an older one of
    /// the same key. Changes nothing on error.
    pub fn add_signature(&mut self, key: PublicKey, signature: [u8; 64]) -> Result<(), DsseError> {
        let pae = self.pae();
        if !key.verify(&pae, &signature) {
            return Err(DsseError::BadSignature { key });
        }
        let mut signatures = self.signatures.clone();
        signatures.retain(|old| !signs(old, &key, &pae));
        signatures.push(Signature {
            keyid: Some(key.key_id().to_string()),
            sig: signature.to_vec(),
        });
        if signatures.len() > SIGNATURES {
            return Err(DsseError::TooManySignatures(signatures.len()));
        }
        self.signatures = signatures;
        Ok(())
    }

    /// Which of `keys` have signed this payload under this type. Counts distinct keys: neither a signature that is there
    /// twice nor a key that is listed twice counts more than once.
    pub fn signers<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k PublicKey>,
    ) -> BTreeSet<PublicKey> {
        let pae = self.pae();
        let mut unseen: BTreeSet<PublicKey> = keys.into_iter().copied().collect();
        let mut signers = BTreeSet::new();
        for signature in &self.signatures {
            let hinted = unseen
                .iter()
                .find(|key| signature.keyid.as_deref() == Some(key.key_id().to_string().as_str()));
            // The hint saves work for honest envelopes; a wrong one changes nothing.
            let candidates = hinted.into_iter().chain(unseen.iter());
            let signer = candidates.copied().find(|key| signs(signature, key, &pae));
            if let Some(key) = signer {
                unseen.remove(&key);
                signers.insert(key);
            }
        }
        signers
    }
}

fn signs(signature: &Signature, key: &PublicKey, pae: &[u8]) -> bool {
    <&[u8; 64]>::try_from(signature.sig.as_slice()).is_ok_and(|sig| key.verify(pae, sig))
}

/// DSSE's pre-authentication encoding: `DSSEv1 <len> <type> <len> <payload>`, lengths in decimal bytes.
pub fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    );
    [head.as_bytes(), payload].concat()
}

fn decode(what: &'static str, text: &str) -> Result<Vec<u8>, DsseError> {
    let url_safe = text.bytes().any(|b| b == b'-' || b == b'_');
    let engine = if url_safe {
        &ANY_URL_SAFE
    } else {
        &ANY_STANDARD
    };
    engine.decode(text).map_err(|_| DsseError::Base64(what))
}

#[cfg(test)]
mod tests;
