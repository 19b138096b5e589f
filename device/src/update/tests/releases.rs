//! Signed documents for the simulated device: right ones, and ones that are wrong in one thing.

use fwpush_keys::{
    id::{FileId, ReleaseId},
    release::{Component, HwRange, Release, Requires},
    revocation::RevocationVersion,
    root::{ProductRule, Root},
    sign::SigningKey,
    time::Timestamp,
};

use super::world::{DAY, START};

/// What a release is to be; every field can be made wrong.
#[derive(Debug, Clone)]
pub struct Spec {
    pub id: u64,
    pub version: &'static str,
    pub product: &'static str,
    pub channel: &'static str,
    pub hw: &'static str,
    pub counter: u64,
    pub size: u64,
    pub expires: Timestamp,
    pub needs_list: RevocationVersion,
    /// By whose key it is signed.
    pub signer: u8,
}

impl Spec {
    pub fn good(id: u64) -> Self {
        Self {
            id,
            version: "1.1.0",
            product: "gateway",
            channel: "stable",
            hw: "board-a",
            counter: 1,
            size: 100_000,
            expires: START.saturating_add(DAY * 365),
            needs_list: RevocationVersion::NONE,
            signer: RELEASE_KEY,
        }
    }

    pub fn release_id(&self) -> ReleaseId {
        let mut random = [0; 10];
        random[2..].copy_from_slice(&self.id.to_be_bytes());
        ReleaseId::from_parts(START, random)
    }

    pub fn file_id(&self) -> FileId {
        FileId::of(format!("image of release {}", self.id).as_bytes())
    }

    pub fn envelope(&self) -> Vec<u8> {
        let release = Release {
            product: self.product.parse().unwrap(),
            channel: self.channel.parse().unwrap(),
            release_id: self.release_id(),
            version: self.version.parse().unwrap(),
            seq: self.id,
            security_counter: self.counter,
            revocation_version: self.needs_list,
            issued: START,
            expires: self.expires,
            hw: vec![HwRange {
                id: self.hw.parse().unwrap(),
                rev_min: 1,
                rev_max: 2,
            }],
            requires: Requires::default(),
            min_agent: None,
            class: None,
            advisory_url: None,
            components: vec![Component::plain(
                "system",
                self.size,
                self.file_id(),
                [1; 32],
            )],
            crit: Vec::new(),
        };
        let mut envelope = release.to_envelope().unwrap();
        envelope.sign(&key(self.signer)).unwrap();
        envelope.to_bytes()
    }
}

pub const ROOT_KEY: u8 = 1;
pub const RELEASE_KEY: u8 = 2;
pub const NEXT_RELEASE_KEY: u8 = 3;
pub const FOREIGN_KEY: u8 = 9;

pub fn key(number: u8) -> SigningKey {
    SigningKey::from_secret(&[number; 32])
}

pub fn signed_root(root: &Root) -> Vec<u8> {
    let mut envelope = root.to_envelope().unwrap();
    envelope.sign(&key(ROOT_KEY)).unwrap();
    envelope.to_bytes()
}

pub fn first_root() -> Root {
    let expires = START.saturating_add(DAY * 3650);
    let root_keys = [key(ROOT_KEY).public()];
    let release_keys = [key(RELEASE_KEY).public()];
    let mut root = Root::first(START, expires, (1, &root_keys), (1, &release_keys));
    for product in ["gateway", "other"] {
        root.products
            .insert(product.parse().unwrap(), ProductRule::new(1_000));
    }
    root
}
