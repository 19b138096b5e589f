//! Points in time: milliseconds since 1970 UTC, RFC 3339 with `Z` in text.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use time::{Date, Month, OffsetDateTime, Time};

/// Milliseconds since 1970-01-01T00:00:00Z, without leap seconds; negative before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

/// A text that is not a time as our documents write it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a time in UTC such as 2026-01-31T23:59:59Z (RFC 3339, capital T and Z)")]
pub struct InvalidTime;

impl Timestamp {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Self = Self(0);

    /// From milliseconds since 1970.
    pub const fn from_ms(ms: i64) -> Self {
        Self(ms)
    }

    /// Milliseconds since 1970.
    pub const fn as_ms(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970, rounded down.
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// The system's clock. Code that decides takes the time as an argument instead.
    pub fn now() -> Self {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => Self(saturating_ms(since)),
            Err(before) => Self(-saturating_ms(before.duration())),
        }
    }

    /// Parses `YYYY-MM-DDThh:mm:ss[.fraction]Z`. Strict: capital `T` and `Z`, no other offset, no leap second, 1 to 9
    /// digits of fraction of which milliseconds are kept.
    pub fn parse_rfc3339_z(text: &str) -> Result<Self, InvalidTime> {
        parse(text).ok_or(InvalidTime)
    }

    /// This time later by `by`; `None` past the range of milliseconds in 64 bits.
    pub fn checked_add(self, by: Duration) -> Option<Self> {
        let ms = i64::try_from(by.as_millis()).ok()?;
        self.0.checked_add(ms).map(Self)
    }

    /// This time later by `by`, or the last one there is.
    pub fn saturating_add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(saturating_ms(by)))
    }

    /// This time earlier by `by`, or the first one there is.
    pub fn saturating_sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(saturating_ms(by)))
    }

    /// How long this time is after `earlier`; zero when it is not.
    pub fn since(self, earlier: Self) -> Duration {
        let ms = i128::from(self.0) - i128::from(earlier.0);
        Duration::from_millis(u64::try_from(ms).unwrap_or(0))
    }

    /// The calendar's view; `None` outside the years 0 to 9999, which RFC 3339 cannot write.
    pub(crate) fn calendar(self) -> Option<OffsetDateTime> {
        let time =
            OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000).ok()?;
        (0..=9999).contains(&time.year()).then_some(time)
    }
}

fn saturating_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn parse(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes.len() > 30 || !text.is_ascii() {
        return None;
    }
    for (at, separator) in [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')] {
        if bytes[at] != separator {
            return None;
        }
    }
    let number = |from: usize, to: usize| digits(&bytes[from..to]);
    let month = Month::try_from(u8::try_from(number(5, 7)?).ok()?).ok()?;
    let day = u8::try_from(number(8, 10)?).ok()?;
    let date = Date::from_calendar_date(i32::try_from(number(0, 4)?).ok()?, month, day).ok()?;
    let time = Time::from_hms(
        u8::try_from(number(11, 13)?).ok()?,
        u8::try_from(number(14, 16)?).ok()?,
        u8::try_from(number(17, 19)?).ok()?,
    )
    .ok()?;
    let ms = match &bytes[19..] {
        [b'Z'] => 0,
        [b'.', fraction @ .., b'Z'] if !fraction.is_empty() => {
            digits(fraction)?;
            let digit = |i: usize| fraction.get(i).map_or(0, |d| i64::from(d - b'0'));
            digit(0) * 100 + digit(1) * 10 + digit(2)
        }
        _ => return None,
    };
    let seconds = date.with_time(time).assume_utc().unix_timestamp();
    Some(Timestamp(seconds * 1000 + ms))
}

/// At most 9 decimal digits as a number.
fn digits(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 9 {
        return None;
    }
    text.iter().try_fold(0, |number, digit| {
        digit
            .is_ascii_digit()
            .then(|| number * 10 + u32::from(digit - b'0'))
    })
}

impl fmt::Display for Timestamp {
    /// RFC 3339 with `Z`; milliseconds only when there are some. A time outside the years 0 to 9999 is shown in
    /// milliseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(time) = self.calendar() else {
            return f.pad(&format!("{} ms since 1970", self.0));
        };
        let (year, month, day) = time.to_calendar_date();
        let (hour, minute, second, ms) = time.to_hms_milli();
        let month = u8::from(month);
        let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
        if ms != 0 {
            text.push_str(&format!(".{ms:03}"));
        }
        text.push('Z');
        f.pad(&text)
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        Self::parse_rfc3339_z(text)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.calendar().is_none() {
            return Err(ser::Error::custom("time outside the years 0 to 9999"));
        }
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339_says() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (1_767_225_599_000, "2025-12-31T23:59:59Z"),
            (1_709_164_800_001, "2024-02-29T00:00:00.001Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
            (-62_167_219_200_000, "0000-01-01T00:00:00Z"),
        ] {
            assert_eq!(Timestamp::from_ms(ms).to_string(), text);
            assert_eq!(Timestamp::parse_rfc3339_z(text), Ok(Timestamp::from_ms(ms)));
        }
    }

    #[test]
    fn fractions_are_read_to_the_millisecond() {
        for (fraction, ms) in [
            (".1", 100),
            (".12", 120),
            (".123", 123),
            (".1239", 123),
            (".000999999", 0),
        ] {
            let text = format!("1970-01-01T00:00:00{fraction}Z");
            assert_eq!(text.parse(), Ok(Timestamp::from_ms(ms)), "{text}");
        }
    }

    #[test]
    fn anything_but_utc_with_z_is_refused() {
        for text in [
            "",
            "2026-01-01",
            "2026-01-01T00:00:00",
            "2026-01-01t00:00:00Z",
            "2026-01-01T00:00:00z",
            "2026-01-01 00:00:00Z",
            "2026-01-01T00:00:00+00:00",
            "2026-01-01T00:00:00-00:00",
            "2026-01-01T00:00:00+01:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00,5Z",
            "2026-01-01T00:00:00.1234567890Z",
            "2026-01-01T00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-32T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:60:00Z",
            "2016-12-31T23:59:60Z",
            "+026-01-01T00:00:00Z",
            " 2026-01-01T00:00:00Z",
            "2026-01-01T00:00:00Z ",
            "2026-01-01T00:00:0٠Z",
            "20260101T000000Z",
        ] {
            assert_eq!(Timestamp::parse_rfc3339_z(text), Err(InvalidTime), "{text}");
        }
    }

    #[test]
    fn arithmetic_stops_at_the_ends() {
        let second = Duration::from_secs(1);
        let last = Timestamp::from_ms(i64::MAX);
        assert_eq!(last.checked_add(second), None);
        assert_eq!(last.saturating_add(second), last);
        assert_eq!(Timestamp::EPOCH.saturating_add(Duration::MAX), last);
        let first = Timestamp::from_ms(i64::MIN);
        assert_eq!(first.saturating_sub(second), first);
        assert_eq!(Timestamp::EPOCH.since(last), Duration::ZERO);
        assert_eq!(last.since(first), Duration::from_millis(u64::MAX));
        assert_eq!(last.to_string(), "9223372036854775807 ms since 1970");
        serde_json::to_string(&last).expect_err("no document can hold it");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(ms in -62_167_219_200_000i64..=253_402_300_799_999) {
            let time = Timestamp::from_ms(ms);
            prop_assert_eq!(time.to_string().parse(), Ok(time));
        }

        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in "\\PC{0,40}") {
            let _ = Timestamp::parse_rfc3339_z(&text);
        }
    }
}
