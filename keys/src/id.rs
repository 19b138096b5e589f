//! The names of things: ids as newtypes, valid by construction.
//!
//! A name is `[A-Za-z0-9._-]{1,64}`, and neither `.` nor `..`: it can stand in a path, a URI, a log line and a terminal
//! without escaping. Ids are compared bytewise.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

use crate::limits::ID_BYTES;
use crate::time::Timestamp;

pub use crate::identity::{Identity, IdentityError, Role};

/// A text that is not a valid id. Says which kind of id was expected and what is wrong, without repeating the text:
/// it may be long or hold terminal escapes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {problem}")]
pub struct InvalidId {
    /// What was expected, such as "device id".
    pub kind: &'static str,
    /// What is wrong with the text.
    pub problem: IdProblem,
}

/// What is wrong with a text that should be an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdProblem {
    /// No characters.
    #[error("is empty")]
    Empty,
    /// More bytes than [`ID_BYTES`].
    #[error("has {0} bytes; at most {ID_BYTES} are allowed")]
    TooLong(usize),
    /// A character that no id may have.
    #[error("contains {0:?}; allowed are letters, digits, '.', '_' and '-'")]
    Character(char),
    /// The names that a file system gives a meaning to.
    #[error("must not be \".\" or \"..\"")]
    Dots,
    /// Not a lower-case hyphenated UUID.
    #[error("must be a lower-case UUID with hyphens")]
    NotUuid,
    /// A UUID of another version.
    #[error("must be a UUID of version 7")]
    NotVersion7,
    /// Not exactly 64 lower-case hexadecimal digits.
    #[error("must be exactly 64 lower-case hexadecimal digits")]
    NotHex,
}

/// Checks the rule that all names share. `kind` names the id in the error.
pub(crate) fn check_name(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    let invalid = |problem| Err(InvalidId { kind, problem });
    if text.is_empty() {
        return invalid(IdProblem::Empty);
    }
    if text.len() > ID_BYTES {
        return invalid(IdProblem::TooLong(text.len()));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(c) = text.chars().find(|c| !allowed(*c)) {
        return invalid(IdProblem::Character(c));
    }
    if text == "." || text == ".." {
        return invalid(IdProblem::Dots);
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// `[A-Za-z0-9._-]{1,64}`, not `.` or `..`; cloning is cheap.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check_name($kind, text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InvalidId;

            fn try_from(text: &str) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), &self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        // Sound for map look-ups: Eq, Ord and Hash of the newtype are those of the text.
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

name!(
    /// A device, as its certificate and its record name it.
    DeviceId, "device id"
);
name!(
    /// A server node.
    NodeId, "node id"
);
name!(
    /// A person or a program that operates the service.
    OperatorId, "operator id"
);
name!(
    /// The domain that all certificates of one installation belong to.
    TrustDomain, "trust domain"
);
name!(
    /// A product: devices that share firmware, keys and a security counter.
    Product, "product"
);
name!(
    /// A channel of a product, such as `stable`.
    Channel, "channel"
);
name!(
    /// A hardware model.
    HwId, "hardware id"
);

macro_rules! uuid_v7 {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// A UUID of version 7 (RFC 9562): sorts by the time it was made.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id made at `now` with 74 random bits.
            pub fn new_v7(now: Timestamp) -> Self {
                Self::from_parts(now, rand::random())
            }

            /// The id for a time and given randomness, for callers that bring their own. Times before 1970 count as
            /// 1970.
            pub fn from_parts(now: Timestamp, random: [u8; 10]) -> Self {
                let ms = u64::try_from(now.as_ms()).unwrap_or(0);
                Self(uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid())
            }

            /// The UUID itself.
            pub fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            /// Accepts one spelling only, lower case with hyphens: ids are compared bytewise elsewhere.
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = |problem| InvalidId { kind: $kind, problem };
                let uuid = Uuid::try_parse(text).map_err(|_| invalid(IdProblem::NotUuid))?;
                let mut buffer = Uuid::encode_buffer();
                if uuid.hyphenated().encode_lower(&mut buffer) != text {
                    return Err(invalid(IdProblem::NotUuid));
                }
                if uuid.get_version() != Some(uuid::Version::SortRand) {
                    return Err(invalid(IdProblem::NotVersion7));
                }
                Ok(Self(uuid))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.0.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

uuid_v7!(
    /// A release.
    ReleaseId, "release id"
);
uuid_v7!(
    /// A rollout.
    RolloutId, "rollout id"
);

/// The name of a file: the BLAKE3 hash of its content, equal to what `b3sum` prints.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId([u8; 32]);

impl FileId {
    /// The id for a BLAKE3 hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The BLAKE3 hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The id of a content that is in memory as a whole.
    pub fn of(content: &[u8]) -> Self {
        blake3::hash(content).into()
    }
}

impl From<blake3::Hash> for FileId {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl FromStr for FileId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        parse_hex32(text).map(Self).ok_or(InvalidId {
            kind: "file id",
            problem: IdProblem::NotHex,
        })
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileId({self})")
    }
}

impl Serialize for FileId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FileId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Exactly 64 lower-case hexadecimal digits as 32 bytes; one spelling per value.
pub(crate) fn parse_hex32(text: &str) -> Option<[u8; 32]> {
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_allowed_characters_are_taken() {
        let longest = "x".repeat(64);
        for text in ["a", "A.b_c-9", "...", "-", "_", &longest] {
            let id: DeviceId = text.parse().expect(text);
            assert_eq!(id.as_str(), text);
            assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn names_that_could_mean_something_elsewhere_are_refused() {
        let too_long = "x".repeat(65);
        for (text, problem) in [
            ("", IdProblem::Empty),
            (".", IdProblem::Dots),
            ("..", IdProblem::Dots),
            ("a/b", IdProblem::Character('/')),
            ("../x", IdProblem::Character('/')),
            ("a\0", IdProblem::Character('\0')),
            ("a\n", IdProblem::Character('\n')),
            ("\u{1b}[2J", IdProblem::Character('\u{1b}')),
            ("a b", IdProblem::Character(' ')),
            ("a%2f", IdProblem::Character('%')),
            ("ä", IdProblem::Character('ä')),
            ("\u{202e}a", IdProblem::Character('\u{202e}')),
            (&too_long, IdProblem::TooLong(65)),
        ] {
            let error = text.parse::<Product>().expect_err(text);
            assert_eq!(error.problem, problem, "{text:?}");
            let shown = error.to_string();
            assert!(shown.starts_with("product "), "{shown}");
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
        }
        let huge = "x".repeat(10_240);
        let shown = huge.parse::<DeviceId>().expect_err("10 KB").to_string();
        assert!(shown.len() < 100, "the text is not repeated: {shown}");
    }

    #[test]
    fn names_are_checked_when_they_are_deserialised() {
        let id: HwId = serde_json::from_str(r#""board-a""#).expect("valid");
        assert_eq!(
            serde_json::to_string(&id).expect("a string"),
            r#""board-a""#
        );
        serde_json::from_str::<HwId>(r#""board a""#).expect_err("a space");
    }

    #[test]
    fn uuids_have_one_spelling_and_version_7() {
        let now = Timestamp::from_ms(1_767_225_600_123);
        let id = ReleaseId::from_parts(now, [0xff; 10]);
        let text = id.to_string();
        assert_eq!(text, "019b76da-a87b-7fff-bfff-ffffffffffff");
        assert_eq!(text.parse(), Ok(id));
        for other in [
            text.to_uppercase(),
            text.replace('-', ""),
            format!("{{{text}}}"),
            format!("urn:uuid:{text}"),
            format!(" {text}"),
            String::new(),
        ] {
            let error = other.parse::<ReleaseId>().expect_err(&other);
            assert_eq!(error.problem, IdProblem::NotUuid);
        }
        let version_4 = text.replace("-7fff-", "-4fff-");
        let error = version_4.parse::<RolloutId>().expect_err("version 4");
        assert_eq!(error.problem, IdProblem::NotVersion7);
    }

    #[test]
    fn uuids_sort_by_time_and_differ_at_the_same_time() {
        let (early, late) = (Timestamp::from_ms(1), Timestamp::from_ms(2));
        assert!(ReleaseId::from_parts(early, [0xff; 10]) < ReleaseId::from_parts(late, [0; 10]));
        assert_ne!(RolloutId::new_v7(early), RolloutId::new_v7(early));
        // Before 1970 there are no such ids; the first one serves.
        ReleaseId::new_v7(Timestamp::from_ms(-1));
    }

    #[test]
    fn a_file_id_is_what_b3sum_prints() {
        let text = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(FileId::of(b"").to_string(), text);
        assert_eq!(text.parse(), Ok(FileId::of(b"")));
        for other in [
            text.to_uppercase(),
            text[1..].to_owned(),
            format!("{text}00"),
            format!("{text}\n"),
            "g".repeat(64),
            "ä".repeat(32),
        ] {
            let error = other.parse::<FileId>().expect_err(&other);
            assert_eq!(error.problem, IdProblem::NotHex);
        }
    }
}
