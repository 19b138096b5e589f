//! The values that arguments are made of, and how they are written.

use std::{fmt, str::FromStr, time::Duration};

use fwpush_keys::{
    id::{DeviceId, HwId, Product, ReleaseId},
    time::Timestamp,
};

/// Why an argument cannot be read; clap puts the argument's name in front.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(String);

fn bad(words: impl Into<String>) -> BadValue {
    BadValue(words.into())
}

/// Devices named in one rollout: the server's bound.
const TARGET_DEVICES: usize = 10_000;

/// Hardware that a release fits: `ID` (every revision), `ID:N`, `ID:MIN-MAX` or `ID:MIN-`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HwFilter {
    pub id: HwId,
    pub rev_min: u32,
    pub rev_max: u32,
}

impl FromStr for HwFilter {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (id, revisions) = split_hw(text)?;
        let number = |part: &str| -> Result<u32, BadValue> {
            part.parse().map_err(|_| {
                bad(format!(
                    "`{part}` is not a revision number; write ID:MIN-MAX"
                ))
            })
        };
        let (rev_min, rev_max) = match revisions.map(|r| (r, r.split_once('-'))) {
            None => (0, u32::MAX),
            Some((one, None)) => (number(one)?, number(one)?),
            Some((_, Some((min, "")))) => (number(min)?, u32::MAX),
            Some((_, Some((min, max)))) => (number(min)?, number(max)?),
        };
        if rev_min > rev_max {
            return Err(bad(format!(
                "revisions {rev_min}-{rev_max} are the wrong way round"
            )));
        }
        Ok(Self {
            id,
            rev_min,
            rev_max,
        })
    }
}

impl fmt::Display for HwFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hw_words(self.id.as_str(), self.rev_min, self.rev_max))
    }
}

/// Hardware and revisions in the words of `--hw`.
pub fn hw_words(id: &str, rev_min: u32, rev_max: u32) -> String {
    match (rev_min, rev_max) {
        (0, u32::MAX) => id.to_owned(),
        (min, u32::MAX) => format!("{id}:{min}-"),
        (min, max) if min == max => format!("{id}:{min}"),
        (min, max) => format!("{id}:{min}-{max}"),
    }
}

/// The hardware of one device: `ID` (revision 1) or `ID:REV`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HwRevision {
    pub id: HwId,
    pub rev: u32,
}

impl FromStr for HwRevision {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (id, rev) = split_hw(text)?;
        let rev = match rev {
            None => 1,
            Some(rev) => rev
                .parse()
                .map_err(|_| bad(format!("`{rev}` is not a revision number")))?,
        };
        Ok(Self { id, rev })
    }
}

fn split_hw(text: &str) -> Result<(HwId, Option<&str>), BadValue> {
    let (id, rest) = match text.split_once(':') {
        None => (text, None),
        Some((id, rest)) => (id, Some(rest)),
    };
    Ok((id.parse().map_err(|error| bad(format!("{error}")))?, rest))
}

/// Whom a rollout is for: `all` or a list of device ids with commas between.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// Every compatible device, also ones added while the rollout is open.
    All,
    /// These, sorted, each once.
    Devices(Vec<DeviceId>),
}

impl FromStr for Target {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text == "all" {
            return Ok(Self::All);
        }
        let mut devices = text
            .split(',')
            .map(|id| {
                id.trim()
                    .parse::<DeviceId>()
                    .map_err(|error| bad(format!("{error}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        devices.sort();
        devices.dedup();
        if devices.len() > TARGET_DEVICES {
            return Err(bad(format!(
                "names {} devices; at most {TARGET_DEVICES} in one rollout",
                devices.len()
            )));
        }
        Ok(Self::Devices(devices))
    }
}

impl Target {
    pub fn to_proto(&self) -> fwpush_proto::v1::Target {
        match self {
            Self::All => fwpush_proto::v1::Target {
                all: true,
                device_ids: Vec::new(),
            },
            Self::Devices(ids) => fwpush_proto::v1::Target {
                all: false,
                device_ids: ids.iter().map(ToString::to_string).collect(),
            },
        }
    }
}

/// When something expires: `365d`, `12h`, or an RFC 3339 time in UTC such as `2027-01-31T00:00:00Z`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expiry {
    After(Duration),
    At(Timestamp),
}

impl Expiry {
    pub const YEAR: Self = Self::After(Duration::from_secs(365 * 86_400));

    /// The moment meant. Fails when it is not after `now`, or beyond what a date can say.
    pub fn resolve(self, now: Timestamp) -> Result<Timestamp, BadValue> {
        match self {
            Self::After(life) => {
                i64::try_from(life.as_millis())
                    .ok()
                    .and_then(|life_ms| now.as_ms().checked_add(life_ms))
                    // Whole seconds: documents are read by people.
                    .map(|ms| Timestamp::from_ms(ms - ms % 1_000))
                    .ok_or_else(|| bad("lies too far ahead"))
            }
            Self::At(at) if at > now => Ok(at),
            Self::At(at) => Err(bad(format!("{at} is not in the future"))),
        }
    }
}

impl FromStr for Expiry {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let unit = |suffix: char, seconds: u64| {
            let amount: u64 = text.strip_suffix(suffix)?.parse().ok()?;
            Some(amount.saturating_mul(seconds))
        };
        if let Some(seconds) = unit('d', 86_400).or_else(|| unit('h', 3_600)) {
            // 100 years: beyond it a typing error is likelier than a plan.
            return match seconds {
                1..=3_153_600_000 => Ok(Self::After(Duration::from_secs(seconds))),
                _ => Err(bad("must be from 1h to 36500d")),
            };
        }
        Timestamp::parse_rfc3339_z(text).map(Self::At).map_err(|_| {
            bad("write days (`365d`), hours (`12h`) or a time in UTC (`2027-01-31T00:00:00Z`)")
        })
    }
}

/// A number of bytes: `1048576`, `8MiB`, `1GiB`, `64KiB`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct ByteCount(pub u64);

impl FromStr for ByteCount {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match text[digits.len()..].trim() {
            "" | "B" => 1,
            "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            other => return Err(bad(format!("`{other}` is not a unit; use KiB, MiB or GiB"))),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| bad("write a number of bytes, such as 8MiB"))?;
        number
            .checked_mul(unit)
            .map(Self)
            .ok_or_else(|| bad("is too large"))
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Something said of one product: `PRODUCT=VALUE`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OfProduct<T> {
    pub product: Product,
    pub value: T,
}

impl<T: FromStr> FromStr for OfProduct<T>
where
    T::Err: fmt::Display,
{
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (product, value) = text
            .split_once('=')
            .ok_or_else(|| bad("write PRODUCT=VALUE"))?;
        Ok(Self {
            product: product.parse().map_err(|error| bad(format!("{error}")))?,
            value: value.parse().map_err(|error| bad(format!("{error}")))?,
        })
    }
}

/// A product, perhaps with the highest security counter it may use: `PRODUCT` or `PRODUCT=MAX`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProductMax {
    pub product: Product,
    pub max_counter: Option<u64>,
}

impl FromStr for ProductMax {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text.contains('=') {
            let OfProduct { product, value } = text.parse()?;
            return Ok(Self {
                product,
                max_counter: Some(value),
            });
        }
        let product = text.parse().map_err(|error| bad(format!("{error}")))?;
        Ok(Self {
            product,
            max_counter: None,
        })
    }
}

/// A release to revoke, perhaps with the reason: `ID` or `ID=REASON`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RevokeRelease {
    pub release: ReleaseId,
    pub reason: String,
}

impl FromStr for RevokeRelease {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (id, reason) = text.split_once('=').unwrap_or((text, ""));
        // 256 bytes: a list of 100 releases still fits an envelope of 64 KiB.
        if reason.len() > 256 || reason.contains(char::is_control) {
            return Err(bad("a reason is one line of at most 256 bytes"));
        }
        let release = id.parse().map_err(|error| bad(format!("{error}")))?;
        Ok(Self {
            release,
            reason: reason.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_read_in_every_form_and_shown_the_same() {
        for (text, min, max) in [
            ("board-a", 0, u32::MAX),
            ("board-a:3", 3, 3),
            ("board-a:2-5", 2, 5),
            ("board-a:7-", 7, u32::MAX),
        ] {
            let hw: HwFilter = text.parse().unwrap();
            assert_eq!(
                (hw.id.as_str(), hw.rev_min, hw.rev_max),
                ("board-a", min, max)
            );
            assert_eq!(hw.to_string(), text);
        }
    }

    #[test]
    fn inverted_revisions_and_other_nonsense_are_refused() {
        for text in [
            "board:5-2",
            "board:",
            "board:-3",
            "board:a-b",
            ":1",
            "bo ard",
            "board:4294967296",
            "b:1-2-3",
        ] {
            assert!(text.parse::<HwFilter>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_target_is_all_or_distinct_ids() {
        assert_eq!("all".parse(), Ok(Target::All));
        let Ok(Target::Devices(ids)) = "b,a, b".parse() else {
            panic!("a list")
        };
        assert_eq!(
            ids.iter().map(|id| id.as_str()).collect::<Vec<_>>(),
            ["a", "b"]
        );
        for text in ["", "a,,b", "a\nb", "../x,y/z"] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
        let many = (0..=TARGET_DEVICES)
            .map(|n| format!("d{n}"))
            .collect::<Vec<_>>()
            .join(",");
        assert!(many.parse::<Target>().is_err());
    }

    #[test]
    fn an_expiry_is_days_hours_or_a_time() {
        let now = Timestamp::from_ms(1_000_500);
        assert_eq!(
            "1d".parse::<Expiry>().unwrap().resolve(now).unwrap(),
            Timestamp::from_ms(87_400_000)
        );
        assert_eq!(
            "2h".parse::<Expiry>().unwrap().resolve(now).unwrap(),
            Timestamp::from_ms(8_200_000)
        );
        let at: Expiry = "2027-01-31T00:00:00Z".parse().unwrap();
        assert!(at.resolve(now).is_ok());
        assert!(
            at.resolve(Timestamp::parse_rfc3339_z("2027-01-31T00:00:00Z").unwrap())
                .is_err(),
            "must lie ahead"
        );
        for text in [
            "",
            "0d",
            "d",
            "-1d",
            "365",
            "36501d",
            "99999999999999999999d",
            "tomorrow",
        ] {
            assert!(text.parse::<Expiry>().is_err(), "{text}");
        }
    }

    #[test]
    fn byte_counts_read_and_show() {
        for (text, count) in [
            ("0", 0),
            ("8MiB", 8 << 20),
            ("1 GiB", 1 << 30),
            ("3K", 3 << 10),
            ("1000", 1000),
        ] {
            assert_eq!(text.parse(), Ok(ByteCount(count)), "{text}");
        }
        assert_eq!(ByteCount(8 << 20).to_string(), "8MiB");
        assert_eq!(ByteCount(1_000).to_string(), "1000");
        for text in ["", "MiB", "8 mib", "-1", "99999999999GiB"] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
        }
    }

    #[test]
    fn products_with_values() {
        let max: ProductMax = "gateway=7".parse().unwrap();
        assert_eq!(
            (max.product.as_str(), max.max_counter),
            ("gateway", Some(7))
        );
        assert_eq!("gateway".parse::<ProductMax>().unwrap().max_counter, None);
        assert!("gateway=-1".parse::<ProductMax>().is_err());
        assert!("=1".parse::<ProductMax>().is_err());
    }
}
