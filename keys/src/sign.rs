//! Ed25519 keys that sign trust documents.
//!
//! Signatures are checked with the strict rules (RFC 8032, canonical `S`, no small-order points), under which
//! every verifier comes to the same answer. A public key that is weak, not a point or not written canonically is refused
//! when it is read, so that one key has one spelling and one id.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey};
use ed25519_dalek::{Signer, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::id::parse_hex32;
use crate::limits::PEM_BYTES;

/// PKCS#8 version 1 of an Ed25519 key up to the 32 secret bytes (RFC 8410 section 7). Version 2 appends the public key,
/// which OpenSSL 3.0 does not read.
const PKCS8_V1_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// SubjectPublicKeyInfo of an Ed25519 key up to the 32 bytes (RFC 8410 section 4).
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Why something is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not 64 lower-case hexadecimal digits.
    #[error("a public key must be exactly 64 lower-case hexadecimal digits")]
    NotHex,
    /// The bytes are no point of the curve, or not its only spelling.
    #[error("not an Ed25519 public key")]
    NotAPoint,
    /// A small-order point: signatures under it can be made by anyone.
    #[error("weak Ed25519 public key (small order)")]
    Weak,
    /// Not a PEM file with an Ed25519 public key.
    #[error("not a PEM file with an Ed25519 public key")]
    PublicPem,
    /// Not a PEM file with an unencrypted Ed25519 private key.
    #[error("not a PEM file with an unencrypted Ed25519 private key (PKCS#8)")]
    PrivatePem,
    /// Too large to be a key.
    #[error("PEM file has {0} bytes; at most {PEM_BYTES} are read")]
    TooLong(usize),
}

/// An Ed25519 public key: a canonically written point that is not weak.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Checks and takes the raw 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::NotAPoint)?;
        // Decompression accepts y >= p; a second spelling would be a second id for one key.
        if key.to_edwards().compress().to_bytes() != bytes {
            return Err(KeyError::NotAPoint);
        }
        if key.is_weak() {
            return Err(KeyError::Weak);
        }
        Ok(Self(bytes))
    }

    /// The raw 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Parses 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(parse_hex32(text).ok_or(KeyError::NotHex)?)
    }

    /// 64 lower-case hexadecimal digits.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Parses a `PUBLIC KEY` PEM file.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        check_pem_len(pem)?;
        let key = VerifyingKey::from_public_key_pem(pem).map_err(|_| KeyError::PublicPem)?;
        Self::from_bytes(key.to_bytes())
    }

    /// A `PUBLIC KEY` PEM file.
    pub fn to_pem(&self) -> String {
        let der = [SPKI_PREFIX.as_slice(), &self.0].concat();
        let body = STANDARD.encode(der);
        format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n")
    }

    /// SHA-256 of the raw bytes.
    pub fn key_id(&self) -> KeyId {
        KeyId(Sha256::digest(self.0).into())
    }

    /// Whether `signature` is this key's over `message`, by the strict rules.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let Ok(key) = VerifyingKey::from_bytes(&self.0) else {
            return false;
        };
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        key.verify_strict(message, &signature).is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.to_hex())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.to_hex())
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_hex(text)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_hex(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// A key's id: the SHA-256 of its raw 32 bytes, 64 lower-case hexadecimal digits in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 32]);

impl KeyId {
    /// The hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

/// A text that is not a key id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a key id must be exactly 64 lower-case hexadecimal digits")]
pub struct InvalidKeyId;

impl FromStr for KeyId {
    type Err = InvalidKeyId;

    fn from_str(text: &str) -> Result<Self, InvalidKeyId> {
        parse_hex32(text).map(Self).ok_or(InvalidKeyId)
    }
}

impl Serialize for KeyId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// An Ed25519 private key; wiped from memory when dropped, never shown by `Debug`.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// A new key from the thread's generator, which the operating system seeds.
    pub fn generate() -> Self {
        Self(ed25519_dalek::SigningKey::generate(&mut rand::rng()))
    }

    /// The key for 32 secret bytes, for tests that want the same key again.
    pub fn from_secret(secret: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(secret))
    }

    /// An unencrypted PKCS#8 PEM file that OpenSSL reads too.
    pub fn to_pkcs8_v1_pem(&self) -> Zeroizing<String> {
        let mut der = Zeroizing::new([0; PKCS8_V1_PREFIX.len() + 32]);
        der[..PKCS8_V1_PREFIX.len()].copy_from_slice(&PKCS8_V1_PREFIX);
        der[PKCS8_V1_PREFIX.len()..].copy_from_slice(self.0.as_bytes());
        let body = Zeroizing::new(STANDARD.encode(der.as_slice()));
        Zeroizing::new(format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            body.as_str()
        ))
    }

    /// Reads an unencrypted PKCS#8 PEM file of version 1 or 2. The error never repeats any of the input.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        check_pem_len(pem)?;
        ed25519_dalek::SigningKey::from_pkcs8_pem(pem)
            .map(Self)
            .map_err(|_| KeyError::PrivatePem)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Signs `message` (RFC 8032; the same message gives the same signature).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(of {})", self.public())
    }
}

fn check_pem_len(pem: &str) -> Result<(), KeyError> {
    if pem.len() > PEM_BYTES {
        return Err(KeyError::TooLong(pem.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
