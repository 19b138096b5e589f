//! Releases and manifests.

use fwpush_keys::{Envelope, PublicKey, Release as Manifest, Root, Timestamp};
use fwpush_proto::v1::Release;
use serde_json::{Value, json};

use crate::{
    output::{Facts, Table, bytes, json_time, time},
    values::hw_words,
};

pub fn release_json(release: &Release) -> Value {
    let hw: Vec<Value> = release
        .hw
        .iter()
        .map(|hw| json!({ "id": hw.id, "rev_min": hw.rev_min, "rev_max": hw.rev_max }))
        .collect();
    json!({
        "release_id": release.release_id,
        "product": release.product,
        "channel": release.channel,
        "version": release.version,
        "seq": release.seq,
        "security_counter": release.security_counter,
        "file_id": release.file_id,
        "size": release.size,
        "file_name": release.file_name,
        "issued": json_time(release.issued_at_ms),
        "expires": json_time(release.expires_at_ms),
        "published": json_time(release.published_at_ms),
        "revoked": release.revoked,
        "hw": hw,
    })
}

pub fn release_text(release: &Release) -> String {
    let hw: Vec<String> = release
        .hw
        .iter()
        .map(|hw| hw_words(&hw.id, hw.rev_min, hw.rev_max))
        .collect();
    let mut facts = Facts::default();
    facts
        .add("release", &release.release_id)
        .add(
            "product",
            format!("{}, channel {}", release.product, release.channel),
        )
        .add("version", &release.version)
        .add("hardware", hw.join(", "))
        .add(
            "image",
            format!(
                "{} ({}), {}",
                release.file_name,
                bytes(release.size),
                release.file_id
            ),
        )
        .add("seq", release.seq.to_string())
        .add("security counter", release.security_counter.to_string())
        .add("issued", time(release.issued_at_ms))
        .add("expires", time(release.expires_at_ms))
        .add("published", time(release.published_at_ms));
    if release.revoked {
        facts.add("revoked", "yes");
    }
    facts.text()
}

pub fn releases_text(releases: &[Release]) -> String {
    let mut table = Table::new([
        "RELEASE",
        "PRODUCT",
        "CHANNEL",
        "VERSION",
        "COUNTER",
        "SIZE",
        "PUBLISHED",
        "STATE",
    ]);
    for release in releases {
        table.row([
            release.release_id.clone(),
            release.product.clone(),
            release.channel.clone(),
            release.version.clone(),
            release.security_counter.to_string(),
            bytes(release.size),
            time(release.published_at_ms),
            release_state(release),
        ]);
    }
    table.or("No releases. Make one with `fwpush release FILE`.")
}

fn release_state(release: &Release) -> String {
    if release.revoked {
        "revoked".to_owned()
    } else if release.expires_at_ms <= Timestamp::now().as_ms() {
        "expired".to_owned()
    } else {
        String::new()
    }
}

/// What a manifest says and who has signed it. `root` gives the signers' standing.
pub fn manifest_json(manifest: &Manifest, envelope: &Envelope, root: Option<&Root>) -> Value {
    json!({
        "manifest": manifest,
        "signatures": envelope.signatures().iter().map(|signature| json!(signature.keyid)).collect::<Vec<_>>(),
        "needed": root.and_then(|root| root.release_keys(&manifest.product)).map(|role| role.threshold),
        "valid": root.map(|root| valid_signers(manifest, envelope, root).len()),
    })
}

/// The distinct keys of the product that have signed.
pub fn valid_signers(manifest: &Manifest, envelope: &Envelope, root: &Root) -> Vec<PublicKey> {
    let Some(role) = root.release_keys(&manifest.product) else {
        return Vec::new();
    };
    envelope
        .signers(root.public_keys(&role))
        .into_iter()
        .collect()
}

pub fn manifest_text(manifest: &Manifest) -> String {
    let image = manifest.image();
    let hw: Vec<String> = manifest
        .hw
        .iter()
        .map(|hw| hw_words(hw.id.as_str(), hw.rev_min, hw.rev_max))
        .collect();
    let optional = |version: &Option<semver::Version>| {
        version
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    let mut facts = Facts::default();
    facts
        .add("release", manifest.release_id.to_string())
        .add(
            "product",
            format!("{}, channel {}", manifest.product, manifest.channel),
        )
        .add("version", manifest.version.to_string())
        .add("hardware", hw.join(", "))
        .add(
            "image",
            format!("{} bytes ({})", image.size, bytes(image.size)),
        )
        .add("blake3", image.blake3.to_string())
        .add("sha256", &image.sha256)
        .add("seq", manifest.seq.to_string())
        .add("security counter", manifest.security_counter.to_string())
        .add("issued", manifest.issued.to_string())
        .add("expires", manifest.expires.to_string())
        .add_some("updates from", optional(&manifest.requires.from_min))
        .add_some("updates up to", optional(&manifest.requires.from_max))
        .add_some("agent from", optional(&manifest.min_agent))
        .add_some("class", manifest.class.as_deref().unwrap_or_default())
        .add_some(
            "advisory",
            manifest.advisory_url.as_deref().unwrap_or_default(),
        );
    if !manifest.revocation_version.is_none() {
        facts.add("revocation list", manifest.revocation_version.to_string());
    }
    facts.text()
}
