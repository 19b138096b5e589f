//! What the signed documents (root, release, revocation) have in common.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::id::check_name;
use crate::json::{self, JsonError};
use crate::limits::PAYLOAD_BYTES;
use crate::time::Timestamp;

/// Why a payload is not the document that its type says.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not strict JSON or not of the document's shape.
    #[error("not well-formed")]
    Json(#[from] JsonError),
    /// The document demands that the reader understands a field which this version does not know.
    #[error("needs a reader that understands {0:?}; this version does not")]
    Critical(String),
    /// A field has a value that no valid document has.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Longer than may be signed.
    #[error("is {got} bytes long; at most {limit} are allowed")]
    TooLong {
        /// Bytes of the payload, or of the encoding that is signed.
        got: usize,
        /// The bound.
        limit: usize,
    },
}

impl DocumentError {
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            problem: problem.into(),
        }
    }
}

/// A kind of document: its shape, the fields it knows, and the rules between fields.
pub(crate) trait Document: Serialize + DeserializeOwned {
    /// The names that `crit` may demand.
    const FIELDS: &'static [&'static str];

    /// The rules that hold between fields.
    fn validate(&self) -> Result<(), DocumentError>;

    /// Parses and validates. Unknown fields are ignored unless `crit` names them: deployed agents meet newer documents.
    fn from_payload(payload: &[u8]) -> Result<Self, DocumentError> {
        // Read `crit` first: a document that we cannot understand may have any other shape.
        #[derive(serde::Deserialize)]
        struct Crit {
            #[serde(default)]
            crit: Vec<String>,
        }
        json::check(payload)?;
        let Crit { crit } = json::parse_checked(payload)?;
        if let Some(unknown) = crit
            .iter()
            .find(|name| !Self::FIELDS.contains(&name.as_str()))
        {
            return Err(DocumentError::Critical(unknown.chars().take(64).collect()));
        }
        let document: Self = json::parse_checked(payload)?;
        document.validate()?;
        Ok(document)
    }

    /// Validates and writes: fields in declaration order, maps sorted, no white space. The same document always gives the
    /// same bytes, and they parse back.
    fn to_payload(&self) -> Result<Vec<u8>, DocumentError> {
        let payload = serde_json::to_vec(self).map_err(JsonError::from)?;
        if payload.len() > PAYLOAD_BYTES {
            return Err(DocumentError::TooLong {
                got: payload.len(),
                limit: PAYLOAD_BYTES,
            });
        }
        Self::from_payload(&payload)?;
        Ok(payload)
    }
}

/// A document is valid from `issued` on and ends at `expires`.
pub(crate) fn check_times(issued: Timestamp, expires: Timestamp) -> Result<(), DocumentError> {
    if expires <= issued {
        return Err(DocumentError::invalid(
            "expires",
            format!("{expires} is not after issued {issued}"),
        ));
    }
    Ok(())
}

/// A free label such as a slot's or a codec's name: the same characters as an id.
pub(crate) fn check_label(field: &'static str, text: &str) -> Result<(), DocumentError> {
    check_name("text", text).map_err(|e| DocumentError::invalid(field, e.to_string()))
}

/// Text for people: bounded, without control characters, which a terminal might obey.
pub(crate) fn check_text(
    field: &'static str,
    text: &str,
    limit_bytes: usize,
) -> Result<(), DocumentError> {
    if text.len() > limit_bytes {
        let problem = format!(
            "has {} bytes; at most {limit_bytes} are allowed",
            text.len()
        );
        return Err(DocumentError::invalid(field, problem));
    }
    if text.chars().any(char::is_control) {
        return Err(DocumentError::invalid(field, "contains control characters"));
    }
    Ok(())
}
