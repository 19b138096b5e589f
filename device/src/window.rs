//! When an update may be installed: ranges of local time on some days of the week.

use std::{str::FromStr, time::Duration};

use fwpush_keys::time::Timestamp;
use jiff::{
    civil::{Time, Weekday},
    tz::TimeZone,
};
use thiserror::Error;

use crate::limits;

/// The times at which a trial may begin. Fetching is not bound to them.
#[derive(Debug, Clone)]
pub struct Window {
    ranges: Vec<Range>,
    zone: TimeZone,
}

/// `sat,sun 22:00-04:30`
#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    /// By [`Weekday::to_monday_zero_offset`].
    days: [bool; 7],
    from: Time,
    /// Not later than `from`: on the next day.
    to: Time,
}

/// What cannot be read, and how it is written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WindowError {
    #[error("has {0:?}; write \"HH:MM-HH:MM\", \"mon-fri HH:MM-HH:MM\" or \"sat,sun HH:MM-HH:MM\"")]
    Range(String),
    #[error("must list 1 to {} ranges", limits::WINDOW_RANGES)]
    Count,
    #[error(
        "is {0:?}; write \"system\", \"UTC\", a name that the device's zoneinfo has, such as \"Europe/Vienna\", or a POSIX rule \
         such as \"CET-1CEST,M3.5.0,M10.5.0/3\""
    )]
    Zone(String),
}

impl Window {
    /// From texts as `agent.toml` has them. `zone`: `system` takes `TZ`, else `/etc/localtime`, else UTC.
    pub fn parse(ranges: &[String], zone: &str) -> Result<Self, WindowError> {
        if ranges.is_empty() || ranges.len() > limits::WINDOW_RANGES {
            return Err(WindowError::Count);
        }
        let ranges = ranges
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?;
        let zone = match zone {
            "system" => TimeZone::try_system().unwrap_or(TimeZone::UTC),
            "UTC" => TimeZone::UTC,
            name => TimeZone::get(name)
                .or_else(|_| TimeZone::posix(name))
                .map_err(|_| WindowError::Zone(name.to_owned()))?,
        };
        Ok(Self { ranges, zone })
    }

    /// How long until the window is open; zero while it is. In the nights in which summer time begins or ends, a range is
    /// never shorter than written: a begin that is skipped or comes twice is the earlier one, an end the later one.
    pub fn wait(&self, now: Timestamp) -> Duration {
        let Ok(instant) = jiff::Timestamp::from_millisecond(now.as_ms()) else {
            // Outside the years -9999 to 9999.
            return Duration::ZERO;
        };
        let today = instant.to_zoned(self.zone.clone()).date();
        let mut shortest = limits::DEFER_MAX;
        // A range of yesterday may still be open; each begins within a week.
        for day in -1..=7_i64 {
            let Ok(date) = today.checked_add(jiff::Span::new().days(day)) else {
                continue;
            };
            for range in &self.ranges {
                if !range.on(date.weekday()) {
                    continue;
                }
                let end = if range.to > range.from {
                    Ok(date)
                } else {
                    date.tomorrow()
                };
                let at = |date: jiff::civil::Date, time| {
                    self.zone.to_ambiguous_timestamp(date.to_datetime(time))
                };
                let from = at(date, range.from).earlier().map(ours);
                let to = end.and_then(|end| at(end, range.to).later()).map(ours);
                let (Ok(from), Ok(to)) = (from, to) else {
                    continue;
                };
                if from <= now && now < to {
                    return Duration::ZERO;
                }
                if from > now {
                    shortest = shortest.min(from.since(now));
                }
            }
        }
        shortest
    }
}

fn ours(at: jiff::Timestamp) -> Timestamp {
    Timestamp::from_ms(at.as_millisecond())
}

impl Range {
    fn on(&self, day: Weekday) -> bool {
        self.days[day.to_monday_zero_offset().unsigned_abs() as usize]
    }
}

impl FromStr for Range {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let parse = || {
            let (days, times) = match text.trim().split_once(' ') {
                Some((days, times)) => (parse_days(days)?, times),
                None => ([true; 7], text.trim()),
            };
            let (from, to) = times.split_once('-')?;
            Some(Self {
                days,
                from: parse_time(from)?,
                to: parse_time(to)?,
            })
        };
        parse().ok_or_else(|| WindowError::Range(text.to_owned()))
    }
}

/// `mon-fri`, `sat,sun`, `fri-mon,wed`
fn parse_days(text: &str) -> Option<[bool; 7]> {
    const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let number = |name: &str| NAMES.iter().position(|known| *known == name);
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        let count = (last + 7 - first) % 7;
        (first..=first + count).for_each(|day| days[day % 7] = true);
    }
    Some(days)
}

/// `HH:MM`; `24:00` is the midnight that ends a day.
fn parse_time(text: &str) -> Option<Time> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str| -> Option<i8> {
        (text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| text.parse().ok())?
    };
    match (number(hour)?, number(minute)?) {
        (24, 0) => Some(Time::midnight()),
        (hour, minute) => Time::new(hour, minute, 0, 0).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn window(ranges: &[&str], zone: &str) -> Window {
        let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
        Window::parse(&ranges, zone).unwrap()
    }

    fn wait(window: &Window, now: &str) -> Duration {
        window.wait(Timestamp::parse_rfc3339_z(now).unwrap())
    }

    #[test]
    fn a_range_of_every_day_is_open_from_its_first_minute_to_before_its_last() {
        let window = window(&["02:00-04:30"], "UTC");
        assert_eq!(
            wait(&window, "2026-11-23T01:59:59Z"),
            Duration::from_secs(1)
        );
        assert_eq!(wait(&window, "2026-11-23T02:00:00Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-11-23T04:29:59Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-11-23T04:30:00Z"), HOUR * 43 / 2);
    }

    #[test]
    fn a_range_over_midnight_belongs_to_the_day_on_which_it_begins() {
        // 2026-11-23 is a Monday.
        let window = window(&["fri 22:00-06:00"], "UTC");
        assert_eq!(wait(&window, "2026-11-27T23:00:00Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-11-28T05:59:59Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-11-28T06:00:00Z"), HOUR * (7 * 24 - 8));
        assert_eq!(wait(&window, "2026-11-27T05:00:00Z"), HOUR * 17);
    }

    #[test]
    fn days_are_lists_and_ranges_also_over_the_weekend() {
        let window = window(&["fri-mon,wed 12:00-13:00"], "UTC");
        let open = |day: u32| wait(&window, &format!("2026-11-{day}T12:30:00Z")).is_zero();
        let days: Vec<_> = (23..30).filter(|day| open(*day)).collect();
        assert_eq!(days, [23, 25, 27, 28, 29]);
    }

    #[test]
    fn the_whole_day_is_a_range_too() {
        for range in ["00:00-24:00", "05:00-05:00"] {
            let window = window(&[range], "UTC");
            for now in [
                "2026-11-23T00:00:00Z",
                "2026-11-23T04:59:59Z",
                "2026-11-23T23:59:59Z",
            ] {
                assert_eq!(wait(&window, now), Duration::ZERO, "{range} at {now}");
            }
        }
    }

    #[test]
    fn hours_are_those_of_the_devices_zone_summer_and_winter() {
        let window = window(&["02:30-03:30"], "CET-1CEST,M3.5.0,M10.5.0/3");
        assert_eq!(wait(&window, "2026-01-15T01:30:00Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-07-15T00:30:00Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-07-15T01:30:00Z"), HOUR * 23);
        // The night in which 02:30 does not exist, and the one in which it comes twice.
        assert_eq!(wait(&window, "2026-03-29T01:29:59Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-10-25T00:30:00Z"), Duration::ZERO);
        assert_eq!(wait(&window, "2026-10-25T02:29:59Z"), Duration::ZERO);
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_how_to_write_it() {
        for text in [
            "",
            "2:00-3:00",
            "02:00",
            "02:00-25:00",
            "02:60-03:00",
            "mon",
            "xyz 02:00-03:00",
            "mon- 02:00-03:00",
            "02:00-03:00 mon",
            "+2:00-03:00",
            "24:01-25:00",
        ] {
            let refused = Window::parse(&[text.to_owned()], "UTC").unwrap_err();
            assert_eq!(refused, WindowError::Range(text.into()));
        }
        assert_eq!(Window::parse(&[], "UTC").unwrap_err(), WindowError::Count);
        let range = ["02:00-03:00".to_owned()];
        assert!(matches!(
            Window::parse(&range, "Mars/Base"),
            Err(WindowError::Zone(_))
        ));
        assert!(Window::parse(&range, "system").is_ok());
    }
}
