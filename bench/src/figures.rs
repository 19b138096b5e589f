//! Processor time, medians, percentiles, and how a result is printed.

use std::{io::Write as _, time::Duration};

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Processor time of this process so far, user and system.
pub fn process_cpu() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    Duration::from_secs(used.tv_sec.unsigned_abs())
        + Duration::from_nanos(used.tv_nsec.unsigned_abs())
}

/// Bytes as GiB.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The middle of the values; of an even number, the mean of the two in the middle. NaN for none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(sorted[half - 1], sorted[half]),
        _ => sorted[half],
    }
}

/// Latencies in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// By nearest rank: each is a latency that was measured. `None` for no latencies.
    pub fn of(latencies: &mut [Duration]) -> Option<Self> {
        latencies.sort_unstable();
        let last = latencies.len().checked_sub(1)?;
        let rank = |percent: usize| (latencies.len() * percent).div_ceil(100) - 1;
        let ms = |at: usize| latencies[at].as_secs_f64() * 1e3;
        Some(Self {
            p50: ms(rank(50)),
            p99: ms(rank(99)),
            max: ms(last),
        })
    }
}

/// Below a table: that there were fewer devices than asked for, and that this is no release build.
pub fn notes(devices: u32, asked: u32) -> String {
    let mut notes = String::new();
    if devices < asked {
        notes +=
            &format!("\nFewer than {asked}: the limit on open files (ulimit -n) allows no more.\n");
    }
    if cfg!(debug_assertions) {
        notes += "\nThis is a debug build: its figures say nothing.\n";
    }
    notes
}

/// A result: JSON by its fields, text by [`Report::text`].
pub trait Report: Serialize {
    /// A table for people.
    fn text(&self) -> String;

    /// Prints it on standard output.
    fn print(&self, json: bool) -> Result<()> {
        let text = if json {
            serde_json::to_string(self)? + "\n"
        } else {
            self.text()
        };
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("write the result")
    }
}

/// A table of rounds: a name, a figure for each round, the median, and a remark.
#[derive(Debug)]
pub struct Table {
    rounds: usize,
    lines: Vec<String>,
}

/// Widths of the columns.
const NAME: usize = 30;
const FIGURE: usize = 10;

impl Table {
    pub fn new(rounds: usize) -> Self {
        let mut head = " ".repeat(NAME);
        for round in 1..=rounds {
            head += &format!("{:>FIGURE$}", format!("round {round}"));
        }
        head += &format!("{:>FIGURE$}", "median");
        Self {
            rounds,
            lines: vec![head],
        }
    }

    /// Adds a line; `figures` are as many as there are rounds.
    pub fn line(
        &mut self,
        name: &str,
        figures: impl IntoIterator<Item = f64>,
        decimals: usize,
        remark: &str,
    ) {
        let figures: Vec<f64> = figures.into_iter().take(self.rounds).collect();
        let mut line = format!("{name:<NAME$}");
        for figure in figures
            .iter()
            .copied()
            .chain([median(figures.iter().copied())])
        {
            line += &format!("{figure:>FIGURE$.decimals$}");
        }
        if !remark.is_empty() {
            line += &format!("   {remark}");
        }
        self.lines.push(line);
    }

    pub fn into_text(self) -> String {
        self.lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_one_outlier() {
        assert_eq!(median([1.0, 90.0, 2.0]), 2.0);
        assert_eq!(median([1.0, 2.0]), 1.5);
        assert!(median([]).is_nan());
    }

    #[test]
    fn percentiles_are_measured_values() {
        let mut latencies: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        let found = Percentiles::of(&mut latencies).unwrap();
        assert_eq!(
            found,
            Percentiles {
                p50: 100.0,
                p99: 198.0,
                max: 200.0
            }
        );
        let one = Percentiles::of(&mut [Duration::from_millis(7)]).unwrap();
        assert_eq!(
            one,
            Percentiles {
                p50: 7.0,
                p99: 7.0,
                max: 7.0
            }
        );
        assert_eq!(Percentiles::of(&mut []), None);
    }

    #[test]
    fn a_table_has_a_column_for_each_round_and_the_median() {
        let mut table = Table::new(3);
        table.line("ratio", [1.0, 3.0, 2.0], 2, "goal");
        let text = table.into_text();
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["ratio", "1.00", "3.00", "2.00", "2.00", "goal"]);
    }
}
