//! The release document, also called the manifest: one image, for which devices, under which conditions.

use std::collections::BTreeSet;

use semver::Version;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::document::{Document, DocumentError, check_label, check_text, check_times};
use crate::dsse::{Envelope, PayloadType, pae};
use crate::id::{Channel, FileId, HwId, Product, ReleaseId, parse_hex32};
use crate::limits::{
    ENCODINGS, HW_RANGES, ID_BYTES, RELEASE_PAE_BYTES, URL_BYTES, VERSION_BYTES, WINDOW_LOG,
};
use crate::revocation::RevocationVersion;
use crate::time::Timestamp;

/// A release. As a value it is only well-formed: one that may be installed is a
/// [`Verified<Release>`](crate::trust::Verified) that [`admit`](crate::admit::admit) lets through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// For which product.
    pub product: Product,
    /// In which channel; a device installs from the channels of its own configuration only.
    pub channel: Channel,
    /// Names this release everywhere.
    pub release_id: ReleaseId,
    /// For people and dependencies; nothing is refused for being an older version.
    pub version: Version,
    /// Rises per product and channel. Checked when publishing, never by a device.
    pub seq: u64,
    /// Per product, over all channels. Raised only to bar older releases: a device that ran this one healthily installs
    /// nothing below it any more.
    pub security_counter: u64,
    /// The revocation list that a device must hold before it installs this.
    #[serde(default, skip_serializing_if = "RevocationVersion::is_none")]
    pub revocation_version: RevocationVersion,
    /// When it was made. Not in the future when it is published.
    pub issued: Timestamp,
    /// From when on it may not be installed any more.
    pub expires: Timestamp,
    /// Hardware it runs on, at least one range.
    pub hw: Vec<HwRange>,
    /// What must run before.
    #[serde(default, skip_serializing_if = "Requires::is_empty")]
    pub requires: Requires,
    /// The oldest agent that can install it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_agent: Option<Version>,
    /// A label for rollout policies, such as `security`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// Where people read about it; http or https.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advisory_url: Option<String>,
    /// What is written. Exactly one for now; a document with more is refused by their names.
    #[serde(deserialize_with = "exactly_one")]
    pub components: Vec<Component>,
    /// Fields that a reader must understand or else refuse the document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crit: Vec<String>,
}

/// Revisions of one hardware model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HwRange {
    /// The model.
    pub id: HwId,
    /// The first revision.
    pub rev_min: u32,
    /// The last revision, included.
    pub rev_max: u32,
}

/// Versions that an update may start from, both included.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requires {
    /// The oldest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_min: Option<Version>,
    /// The newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_max: Option<Version>,
}

impl Requires {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Such as `image`.
    pub name: String,
    /// Where it goes, such as `system`.
    pub slot: String,
    /// What its bytes are, such as `raw`.
    pub format: String,
    /// Bytes of the plain image, at least 1.
    pub size: u64,
    /// Hash of the plain image.
    pub blake3: FileId,
    /// SHA-256 of the plain image for other tools, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// How it can be had; exactly one is `plain`. A device ignores codecs that it does not know.
    pub encodings: Vec<Encoding>,
}

/// A file from which a component can be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoding {
    /// `plain`, `zstd`, or one of a newer release.
    pub codec: String,
    /// Base-2 logarithm of the decoder's window, at most [`WINDOW_LOG`]; with `zstd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_log: Option<u8>,
    /// Bytes of the encoded file, at least 1.
    pub size: u64,
    /// Hash and name of the encoded file.
    pub blake3: FileId,
}

impl Encoding {
    /// The codec that changes nothing.
    pub const PLAIN: &'static str = "plain";
    /// One zstd frame (RFC 8878).
    pub const ZSTD: &'static str = "zstd";
}

impl Component {
    /// An image that can be had as it is.
    pub fn plain(slot: &str, size: u64, blake3: FileId, sha256: [u8; 32]) -> Self {
        Self {
            name: "image".to_owned(),
            slot: slot.to_owned(),
            format: "raw".to_owned(),
            size,
            blake3,
            sha256: hex::encode(sha256),
            encodings: vec![Encoding {
                codec: Encoding::PLAIN.to_owned(),
                window_log: None,
                size,
                blake3,
            }],
        }
    }

    fn validate(&self) -> Result<(), DocumentError> {
        check_label("components.name", &self.name)?;
        check_label("components.slot", &self.slot)?;
        check_label("components.format", &self.format)?;
        let invalid = |field, problem: &str| Err(DocumentError::invalid(field, problem));
        if self.size == 0 {
            return invalid("components.size", "must be at least 1");
        }
        if parse_hex32(&self.sha256).is_none() {
            let problem = "must be exactly 64 lower-case hexadecimal digits";
            return invalid("components.sha256", problem);
        }
        if self.encodings.len() > ENCODINGS {
            return invalid("components.encodings", "has too many entries");
        }
        for encoding in &self.encodings {
            encoding.validate()?;
        }
        let mut plain = self.encodings.iter().filter(|e| e.codec == Encoding::PLAIN);
        let (Some(plain), None) = (plain.next(), plain.next()) else {
            return invalid("components.encodings", "must have exactly one plain");
        };
        if plain.size != self.size || plain.blake3 != self.blake3 {
            let problem = "plain must have the size and hash of the component";
            return invalid("components.encodings", problem);
        }
        Ok(())
    }
}

impl Encoding {
    fn validate(&self) -> Result<(), DocumentError> {
        check_label("components.encodings.codec", &self.codec)?;
        let invalid = |field, problem: String| Err(DocumentError::invalid(field, problem));
        if self.size == 0 {
            let problem = "must be at least 1".to_owned();
            return invalid("components.encodings.size", problem);
        }
        let field = "components.encodings.window_log";
        match (self.codec.as_str(), self.window_log) {
            (Self::PLAIN, Some(_)) => invalid(field, "has no meaning for plain".to_owned()),
            (Self::ZSTD, None) => invalid(field, "is missing for zstd".to_owned()),
            (_, Some(log)) if log > WINDOW_LOG => {
                invalid(field, format!("is {log}; at most {WINDOW_LOG} is allowed"))
            }
            _ => Ok(()),
        }
    }
}

impl Release {
    /// The one component.
    ///
    /// # Panics
    ///
    /// On a value made by hand that has none; every parsed or verified release has exactly one.
    pub fn image(&self) -> &Component {
        let image = self.components.first();
        image.expect("a validated release has one component")
    }

    /// The encoding of the image that changes nothing.
    ///
    /// # Panics
    ///
    /// On a value made by hand that has none; every parsed or verified release has exactly one.
    pub fn plain(&self) -> &Encoding {
        let mut encodings = self.image().encodings.iter();
        encodings
            .find(|e| e.codec == Encoding::PLAIN)
            .expect("a validated release has a plain encoding")
    }

    /// Every file that the release names, each once.
    pub fn file_ids(&self) -> impl Iterator<Item = FileId> + use<> {
        let encodings = self.components.iter().flat_map(|c| &c.encodings);
        let files: BTreeSet<FileId> = encodings.map(|e| e.blake3).collect();
        files.into_iter()
    }

    /// Whether it runs on revision `rev` of the model `id`.
    pub fn supports_hw(&self, id: &HwId, rev: u32) -> bool {
        self.hw
            .iter()
            .any(|range| range.id == *id && (range.rev_min..=range.rev_max).contains(&rev))
    }

    /// Parses and validates a payload; says nothing of signatures.
    pub fn from_payload(payload: &[u8]) -> Result<Self, DocumentError> {
        Document::from_payload(payload)
    }

    /// The bytes to sign; fails when the document breaks a rule or its encoding is above 4,096 bytes.
    pub fn to_payload(&self) -> Result<Vec<u8>, DocumentError> {
        let payload = Document::to_payload(self)?;
        check_pae_len(pae(PayloadType::Release.as_str(), &payload).len())?;
        Ok(payload)
    }

    /// The document in an envelope, still without signatures.
    pub fn to_envelope(&self) -> Result<Envelope, DocumentError> {
        Ok(Envelope::new(PayloadType::Release, self.to_payload()?))
    }
}

/// Refuses more than one component by name, so that whoever reads the error knows what a newer agent would have installed.
fn exactly_one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Component>, D::Error> {
    let components = Vec::<Component>::deserialize(deserializer)?;
    let shown = |c: &Component| format!("{:?}", c.name.chars().take(ID_BYTES).collect::<String>());
    match components.len() {
        1 => Ok(components),
        0 => Err(de::Error::custom(
            "components: is empty; there must be exactly one",
        )),
        n => {
            let names: Vec<String> = components.iter().take(4).map(shown).collect();
            let names = names.join(", ");
            Err(de::Error::custom(format_args!(
                "components: there are {n} ({names}); exactly one is supported"
            )))
        }
    }
}

/// What is signed of a release fits one call of a key management service.
pub(crate) fn check_pae_len(got: usize) -> Result<(), DocumentError> {
    if got > RELEASE_PAE_BYTES {
        let limit = RELEASE_PAE_BYTES;
        return Err(DocumentError::TooLong { got, limit });
    }
    Ok(())
}

impl Document for Release {
    const FIELDS: &'static [&'static str] = &[
        "product",
        "channel",
        "release_id",
        "version",
        "seq",
        "security_counter",
        "revocation_version",
        "issued",
        "expires",
        "hw",
        "requires",
        "min_agent",
        "class",
        "advisory_url",
        "components",
        "crit",
    ];

    fn validate(&self) -> Result<(), DocumentError> {
        check_times(self.issued, self.expires)?;
        let versions = [
            ("version", Some(&self.version)),
            ("requires.from_min", self.requires.from_min.as_ref()),
            ("requires.from_max", self.requires.from_max.as_ref()),
            ("min_agent", self.min_agent.as_ref()),
        ];
        for (field, version) in versions {
            let length = version.map_or(0, |v| v.to_string().len());
            if length > VERSION_BYTES {
                return Err(DocumentError::invalid(field, "is too long"));
            }
        }
        if let (Some(min), Some(max)) = (&self.requires.from_min, &self.requires.from_max)
            && min.cmp_precedence(max).is_gt()
        {
            return Err(DocumentError::invalid(
                "requires",
                "from_min is above from_max",
            ));
        }
        self.validate_hw()?;
        if let Some(class) = &self.class {
            check_label("class", class)?;
        }
        if let Some(url) = &self.advisory_url {
            check_text("advisory_url", url, URL_BYTES)?;
            let web = url.starts_with("https://") || url.starts_with("http://");
            if !web || !url.bytes().all(|b| b.is_ascii_graphic()) {
                let problem = "must be an http or https URL without spaces";
                return Err(DocumentError::invalid("advisory_url", problem));
            }
        }
        self.image().validate()
    }
}

impl Release {
    fn validate_hw(&self) -> Result<(), DocumentError> {
        if self.hw.is_empty() {
            return Err(DocumentError::invalid("hw", "is empty"));
        }
        if self.hw.len() > HW_RANGES {
            return Err(DocumentError::invalid("hw", "has too many ranges"));
        }
        if let Some(range) = self.hw.iter().find(|r| r.rev_min > r.rev_max) {
            let problem = format!(
                "revisions of {} run from {} down to {}",
                range.id, range.rev_min, range.rev_max
            );
            return Err(DocumentError::invalid("hw", problem));
        }
        Ok(())
    }
}
