//! Strict JSON, for anything that is signed.
//!
//! Two readers of one document must never see different things. So what JSON leaves open is refused: a key that is there
//! twice (at any level, also in fields we do not know), numbers that are not whole or above 2^53 - 1, a byte order mark,
//! anything after the document, and nesting deeper than [`JSON_DEPTH`].

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};

use crate::limits::{JSON_DEPTH, JSON_INTEGER};

/// Why bytes are not a document. Says where, never repeats more than a key's name.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// RFC 8259 section 8.1: no byte order mark.
    #[error("starts with a byte order mark")]
    ByteOrderMark,
    /// Not JSON, not strict, or not of the expected shape.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Parses one document: first strictly as any JSON, then into `T`.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    check(bytes)?;
    parse_checked(bytes)
}

/// Parses what has passed [`check`].
pub(crate) fn parse_checked<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Checks the rules above without building anything. Memory is bounded by the input's length.
pub fn check(bytes: &[u8]) -> Result<(), JsonError> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(JsonError::ByteOrderMark);
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    Strict {
        depth_left: JSON_DEPTH,
    }
    .deserialize(&mut json)?;
    Ok(json.end()?)
}

/// Walks one value. Goes no deeper than `depth_left`, so that hostile nesting costs a few frames only.
#[derive(Clone, Copy)]
struct Strict {
    depth_left: usize,
}

impl Strict {
    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        let depth_left = self
            .depth_left
            .checked_sub(1)
            .ok_or_else(|| E::custom(format_args!("nested deeper than {JSON_DEPTH} levels")))?;
        Ok(Self { depth_left })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strict JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        check_magnitude(number)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<(), E> {
        check_magnitude(number.unsigned_abs())
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        Err(E::custom(
            "a number that is not whole, has an exponent or is too large",
        ))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let inside = self.inside()?;
        while list.next_element_seed(inside)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inside = self.inside()?;
        let mut seen = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                let shown: String = key.chars().take(64).collect();
                return Err(A::Error::custom(format_args!(
                    "field {shown:?} is there twice"
                )));
            }
            seen.insert(key);
            map.next_value_seed(inside)?;
        }
        Ok(())
    }
}

fn check_magnitude<E: serde::de::Error>(number: u64) -> Result<(), E> {
    if number > JSON_INTEGER {
        return Err(E::custom(format_args!("a number above {JSON_INTEGER}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_json_passes() {
        for text in [
            "{}",
            " {\"a\": [1, -1, true, null, \"x\"], \"b\": {\"a\": 2}}\n",
            "9007199254740991",
            "-9007199254740991",
            "[[[[[[[[]]]]]]]]",
            r#"{"a":{"a":{"a":1}}}"#,
        ] {
            check(text.as_bytes()).expect(text);
        }
    }

    #[test]
    fn what_two_readers_could_see_differently_is_refused() {
        for text in [
            "9007199254740992",
            "-9007199254740992",
            "18446744073709551616",
            "1.0",
            "-0.0",
            "1e2",
            "1e400",
            "NaN",
            "01",
            "+1",
            "[[[[[[[[[]]]]]]]]]",
            r#"{"a":1,"a":1}"#,
            r#"{"x":[{"a":1,"b":2,"a":3}]}"#,
            r#"{"\u0061":1,"a":2}"#,
            "{} {}",
            "{}\0",
            "{'a':1}",
            "{\"a\":1,}",
            "// no\n{}",
            "\"\\ud800\"",
            "\"\t\"",
            "\u{feff}{}",
            "",
        ] {
            check(text.as_bytes()).expect_err(text);
        }
    }

    #[test]
    fn nesting_of_any_depth_is_refused_without_exhausting_the_stack() {
        for open in ["[", "{\"a\":", "[{\"a\":["] {
            check(open.repeat(100_000).as_bytes()).expect_err("deep");
        }
    }
}
