//! Which documents are believed, and which releases a device may install: told through the public interface alone.

#![allow(clippy::unwrap_used)]

mod admit;
mod documents;
mod releases;
mod revocations;
mod roots;

use std::time::Duration;

use fwpush_keys::{
    Component, Envelope, FileId, HwRange, PayloadType, Product, ProductRule, PublicKey, Release,
    ReleaseId, Requires, Revocation, RevocationVersion, Revoked, RoleKeys, Root, SigningKey,
    Timestamp, TrustedClock, Verified,
};
use serde_json::Value;

const DAY: Duration = Duration::from_secs(86_400);

/// 2026-01-01, when everything here was made.
const ISSUED: Timestamp = Timestamp::from_ms(1_767_225_600_000);

/// The highest counter that the roots here allow.
const MAX_COUNTER: u64 = 100;

/// The same key for the same number. 1 to 3 sign roots, 11 and 12 releases, 13 those of `special`.
fn key(n: u8) -> SigningKey {
    SigningKey::from_secret(&[n; 32])
}

fn keys<const N: usize>(numbers: [u8; N]) -> [PublicKey; N] {
    numbers.map(|n| key(n).public())
}

fn product(name: &str) -> Product {
    name.parse().expect("a product")
}

/// Version 1: root 2 of 3, release 1 of 2; `gateway` and `sensor` under the general keys, `special` under its own.
fn root() -> Root {
    let mut root = Root::first(
        ISSUED,
        ISSUED.saturating_add(DAY * 365),
        (2, &keys([1, 2, 3])),
        (1, &keys([11, 12])),
    );
    for name in ["gateway", "sensor"] {
        let rule = ProductRule::new(MAX_COUNTER);
        root.products.insert(product(name), rule);
    }
    let own = RoleKeys::new(1, &[key(13).public()]);
    root.add_key(key(13).public());
    let rule = ProductRule {
        keyids: Some(own.keyids),
        threshold: Some(own.threshold),
        ..ProductRule::new(MAX_COUNTER)
    };
    root.products.insert(product("special"), rule);
    root
}

/// That root, held.
fn held() -> Verified<Root> {
    Verified::bootstrap(&sign_root(&root(), &[1, 2])).expect("signed by 2 of 3")
}

fn sign_root(root: &Root, signers: &[u8]) -> Vec<u8> {
    sign(root.to_envelope().expect("a valid root"), signers)
}

fn release() -> Release {
    Release {
        product: product("gateway"),
        channel: "stable".parse().unwrap(),
        release_id: ReleaseId::from_parts(ISSUED, [1; 10]),
        version: "1.1.0".parse().unwrap(),
        seq: 7,
        security_counter: 5,
        revocation_version: RevocationVersion::NONE,
        issued: ISSUED,
        expires: ISSUED.saturating_add(DAY * 200),
        hw: vec![HwRange {
            id: "board-a".parse().unwrap(),
            rev_min: 1,
            rev_max: 3,
        }],
        requires: Requires::default(),
        min_agent: None,
        class: None,
        advisory_url: None,
        components: vec![Component::plain("system", 5, FileId::of(b"image"), [7; 32])],
        crit: Vec::new(),
    }
}

fn sign_release(release: &Release, signers: &[u8]) -> Vec<u8> {
    sign(release.to_envelope().expect("a valid release"), signers)
}

/// A list of `gateway`, made under root version 1.
fn revocation(version: u64, revoked: &[ReleaseId]) -> Revocation {
    Revocation {
        product: product("gateway"),
        root_version: 1,
        version,
        issued: ISSUED,
        expires: ISSUED.saturating_add(DAY * 30),
        revoked: revoked
            .iter()
            .map(|release_id| Revoked {
                release_id: *release_id,
                reason: "bricks boards".to_owned(),
            })
            .collect(),
        min_security_counter: 0,
        crit: Vec::new(),
    }
}

fn sign_revocation(list: &Revocation, signers: &[u8]) -> Vec<u8> {
    sign(list.to_envelope().expect("a valid list"), signers)
}

fn sign(mut envelope: Envelope, signers: &[u8]) -> Vec<u8> {
    for n in signers {
        envelope.sign(&key(*n)).expect("at most 16");
    }
    envelope.to_bytes()
}

/// Any bytes as a payload, honestly signed.
fn sign_raw(kind: PayloadType, payload: impl Into<Vec<u8>>, signers: &[u8]) -> Vec<u8> {
    sign(Envelope::new(kind, payload.into()), signers)
}

/// A valid document as JSON, to be spoilt.
fn json(payload: Vec<u8>) -> Value {
    serde_json::from_slice(&payload).expect("our own JSON")
}

fn clock() -> TrustedClock {
    TrustedClock::new(ISSUED.saturating_sub(DAY * 30), None)
}
