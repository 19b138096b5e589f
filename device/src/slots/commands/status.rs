//! What the command `status` prints.

use super::super::SlotId;

/// What the installer or the bootloader says of both slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    pub booted: SlotId,
    /// `None`: the kernel's.
    pub boot_id: Option<String>,
    pub slots: [Bootable; 2],
}

/// What the bootloader would do with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bootable {
    /// It boots, for ever.
    Confirmed,
    /// It boots, and its boots are counted.
    Trial { tries_left: Option<u8> },
    /// It boots; whether it was confirmed is not known there.
    Good,
    /// It does not boot.
    Bad,
}

impl Status {
    pub(super) fn slot(&self, slot: SlotId) -> Bootable {
        self.slots[slot as usize]
    }

    /// Lines `key=value`, each key once; empty lines and lines that begin with `#` are skipped. `Err` says what is wrong.
    ///
    /// `booted` (`a`, `b`), `a` and `b` (`confirmed`, `trial`, `good`, `bad`) are needed; `a_tries` and `b_tries` may stand
    /// with `trial`; `boot_id` may replace the kernel's.
    pub(super) fn parse(output: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(output).map_err(|_| "it printed no UTF-8".to_owned())?;
        let mut values: [Option<&str>; 6] = [None; 6];
        for line in text.lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let known = line
                .split_once('=')
                .and_then(|(key, value)| Some((KEYS.iter().position(|k| *k == key)?, value)));
            let Some((index, value)) = known else {
                return Err(format!(
                    "it printed {line:?}, which is not one of {KEYS:?} with =value"
                ));
            };
            if values[index].replace(value).is_some() {
                return Err(format!("it printed {} twice", KEYS[index]));
            }
        }
        let [booted, a, b, a_tries, b_tries, boot_id] = values;
        let booted = match booted {
            Some("a") => SlotId::A,
            Some("b") => SlotId::B,
            Some(other) => return Err(format!("it printed booted={other}; a or b is expected")),
            None => return Err("it did not print booted=".into()),
        };
        if boot_id.is_some_and(|id| id.is_empty() || id.len() > 64) {
            return Err("it printed a boot_id that is empty or longer than 64 bytes".into());
        }
        Ok(Self {
            booted,
            boot_id: boot_id.map(str::to_owned),
            slots: [bootable("a", a, a_tries)?, bootable("b", b, b_tries)?],
        })
    }
}

const KEYS: [&str; 6] = ["booted", "a", "b", "a_tries", "b_tries", "boot_id"];

fn bootable(slot: &str, state: Option<&str>, tries: Option<&str>) -> Result<Bootable, String> {
    let state = match state {
        Some("confirmed") => Bootable::Confirmed,
        Some("trial") => Bootable::Trial {
            tries_left: match tries {
                None => None,
                Some(tries) => Some(tries.parse().map_err(|_| {
                    format!("it printed {slot}_tries={tries}; 0 to 255 is expected")
                })?),
            },
        },
        Some("good") => Bootable::Good,
        Some("bad") => Bootable::Bad,
        Some(other) => {
            return Err(format!(
                "it printed {slot}={other}; confirmed, trial, good or bad is expected"
            ));
        }
        None => return Err(format!("it did not print {slot}=")),
    };
    if tries.is_some() && !matches!(state, Bootable::Trial { .. }) {
        return Err(format!(
            "it printed {slot}_tries for a slot that is not on trial"
        ));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_may_be_said_is_understood() {
        let text = b"# of rauc\n\nbooted=b\na=good\nb=trial\nb_tries=2\nboot_id=7\n";
        let status = Status::parse(text).unwrap();
        assert_eq!(status.booted, SlotId::B);
        assert_eq!(status.boot_id.as_deref(), Some("7"));
        let trial = Bootable::Trial {
            tries_left: Some(2),
        };
        assert_eq!(status.slots, [Bootable::Good, trial]);
        let status = Status::parse(b"booted=a\na=confirmed\nb=bad").unwrap();
        assert_eq!(status.slots, [Bootable::Confirmed, Bootable::Bad]);
    }

    #[test]
    fn nothing_else_is() {
        for (text, why) in [
            ("", "booted="),
            ("booted=a\na=good\n", "b="),
            ("booted=c\na=good\nb=bad\n", "booted=c"),
            ("booted=a\na=ok\nb=bad\n", "a=ok"),
            ("booted=a\na=good\nb=bad\na=good\n", "twice"),
            ("booted=a\na=good\nb=bad\nprimary=a\n", "primary"),
            ("booted=a\na=good\nb=bad\nwarning: x\n", "warning"),
            ("booted=a\r\na=good\r\nb=bad\r\n\r", "\\r"),
            ("booted=a\na=good\na_tries=1\nb=bad\n", "not on trial"),
            ("booted=a\na=trial\na_tries=256\nb=bad\n", "a_tries=256"),
            ("booted=a\na=good\nb=bad\nboot_id=\n", "boot_id"),
            (" booted=a\na=good\nb=bad\n", " booted"),
        ] {
            let error = Status::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        assert!(Status::parse(b"booted=a\na=good\nb=bad\n# \xff").is_err());
    }
}
