//! What a person sees while something takes time, on stderr: bars on a terminal, now and then a line elsewhere.

use std::{
    io::{self, Write as _},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use fwpush_proto::v1::{Phase, Rollout};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output::{bytes, escape};

/// Without a terminal, lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// The bars that are on the terminal now.
static SHOWN: Mutex<Option<MultiProgress>> = Mutex::new(None);

fn shown() -> std::sync::MutexGuard<'static, Option<MultiProgress>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to stderr where the bars, if there are any, do not overwrite it.
pub fn write_line(words: &str) -> io::Result<()> {
    let bars = shown().clone();
    match bars {
        Some(bars) => bars.println(words),
        None => writeln!(io::stderr(), "{words}"),
    }
}

/// The phases that every update goes through: each has its bar from the start.
const USUAL: [Phase; 9] = [
    Phase::Pending,
    Phase::Offered,
    Phase::Accepted,
    Phase::Downloading,
    Phase::Verified,
    Phase::Installing,
    Phase::Rebooting,
    Phase::Confirming,
    Phase::Succeeded,
];

/// The others: each gets its bar when a device is in it.
const UNUSUAL: [Phase; 6] = [
    Phase::Deferred,
    Phase::Failed,
    Phase::RolledBack,
    Phase::Rejected,
    Phase::Cancelled,
    Phase::TimedOut,
];

/// What a person calls a phase: `rolled back`.
pub fn phase_words(phase: Phase) -> String {
    phase_id(phase).to_ascii_lowercase().replace('_', " ")
}

/// The protocol's word for a phase: `ROLLED_BACK`.
pub fn phase_id(phase: Phase) -> &'static str {
    phase.as_str_name().trim_start_matches("PHASE_")
}

/// A bar for `total` bytes. Hidden where stderr is no terminal.
pub fn byte_bar(label: &'static str, total: u64) -> ProgressBar {
    ProgressBar::new(total)
        .with_style(style("{prefix:>12} {wide_bar} {binary_bytes:>11} of {binary_total_bytes} {binary_bytes_per_sec:>13} {eta:>4}"))
        .with_prefix(label)
}

/// A bar for `total` things. Hidden where stderr is no terminal.
pub fn count_bar(label: &'static str, total: u64) -> ProgressBar {
    ProgressBar::new(total)
        .with_style(style("{prefix:>12} {wide_bar} {pos} of {len} {eta:>4}"))
        .with_prefix(label)
}

fn style(template: &str) -> ProgressStyle {
    // Templates are constants of this file; a wrong one would show as the plain bar.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Devices in a phase of a rollout.
pub fn count(rollout: &Rollout, phase: Phase) -> u64 {
    rollout
        .phases
        .iter()
        .filter(|of| of.phase() == phase)
        .map(|of| of.devices)
        .sum()
}

/// A rollout's phases as they change.
#[derive(Debug)]
pub struct Board {
    form: Form,
}

#[derive(Debug)]
enum Form {
    Bars {
        all: MultiProgress,
        bars: Vec<(Phase, ProgressBar)>,
    },
    Lines {
        last: String,
        at: Option<Instant>,
    },
}

impl Default for Board {
    fn default() -> Self {
        Self::new()
    }
}

impl Board {
    pub fn new() -> Self {
        let all = MultiProgress::new();
        let form = if all.is_hidden() {
            Form::Lines {
                last: String::new(),
                at: None,
            }
        } else {
            *shown() = Some(all.clone());
            let bars = USUAL
                .iter()
                .map(|&phase| (phase, phase_bar(&all, phase)))
                .collect();
            Form::Bars { all, bars }
        };
        Self { form }
    }

    /// Shows how the rollout stands.
    pub fn show(&mut self, rollout: &Rollout) {
        match &mut self.form {
            Form::Bars { all, bars } => {
                for phase in UNUSUAL {
                    if count(rollout, phase) > 0 && bars.iter().all(|(shown, _)| *shown != phase) {
                        bars.push((phase, phase_bar(all, phase)));
                    }
                }
                for (phase, bar) in bars {
                    bar.set_length(rollout.targeted);
                    bar.set_position(count(rollout, *phase));
                    if *phase == Phase::Downloading {
                        bar.set_message(bytes_words(rollout));
                    }
                }
            }
            Form::Lines { last, at } => {
                let line = line(rollout);
                if line != *last && at.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
                    eprintln!("{line}");
                    (*last, *at) = (line, Some(Instant::now()));
                }
            }
        }
    }

    /// Says something without spoiling the bars.
    pub fn note(&self, words: &str) {
        match &self.form {
            Form::Bars { all, .. } => {
                // A terminal that went away needs no words.
                let _ = all.println(escape(words));
            }
            Form::Lines { .. } => eprintln!("{}", escape(words)),
        }
    }

    /// Shows the last state and leaves of it standing what has devices.
    pub fn finish(mut self, rollout: &Rollout) {
        if let Form::Lines { at, .. } = &mut self.form {
            *at = None;
        }
        self.show(rollout);
        if let Form::Bars { bars, .. } = &self.form {
            for (phase, bar) in bars {
                match count(rollout, *phase) {
                    0 => bar.finish_and_clear(),
                    _ => bar.abandon(),
                }
            }
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        if matches!(self.form, Form::Bars { .. }) {
            *shown() = None;
        }
    }
}

fn phase_bar(all: &MultiProgress, phase: Phase) -> ProgressBar {
    all.add(
        ProgressBar::new(0)
            .with_style(style("{prefix:>12} {bar:28} {pos:>6} of {len} {wide_msg}"))
            .with_prefix(phase_words(phase)),
    )
}

fn bytes_words(rollout: &Rollout) -> String {
    if rollout.bytes_total == 0 {
        return String::new();
    }
    format!(
        "{} of {}",
        bytes(rollout.bytes_done),
        bytes(rollout.bytes_total)
    )
}

/// `3 downloading, 7 succeeded of 10; 24 MiB of 80 MiB`.
pub fn line(rollout: &Rollout) -> String {
    let mut line = devices(rollout);
    if rollout.bytes_total > 0 {
        line.push_str("; ");
        line.push_str(&bytes_words(rollout));
    }
    line
}

/// `3 downloading, 7 succeeded of 10`.
pub fn devices(rollout: &Rollout) -> String {
    let parts: Vec<String> = USUAL
        .iter()
        .chain(&UNUSUAL)
        .map(|&phase| (count(rollout, phase), phase))
        .filter(|(devices, _)| *devices > 0)
        .map(|(devices, phase)| format!("{devices} {}", phase_words(phase)))
        .collect();
    let devices = if parts.is_empty() {
        "no devices".to_owned()
    } else {
        parts.join(", ")
    };
    format!("{devices} of {}", rollout.targeted)
}

#[cfg(test)]
mod tests {
    use fwpush_proto::v1::PhaseCount;

    use super::*;

    #[test]
    fn every_phase_is_shown_once() {
        let mut shown: Vec<Phase> = USUAL.iter().chain(&UNUSUAL).copied().collect();
        shown.sort_by_key(|phase| *phase as i32);
        let all: Vec<Phase> = (1..).map_while(|n| Phase::try_from(n).ok()).collect();
        assert_eq!(shown, all);
    }

    #[test]
    fn a_line_names_only_phases_with_devices() {
        let phases = [
            (Phase::Downloading, 3),
            (Phase::RolledBack, 1),
            (Phase::Offered, 0),
        ]
        .map(|(phase, devices)| PhaseCount {
            phase: phase.into(),
            devices,
        });
        let rollout = Rollout {
            targeted: 10,
            phases: phases.into(),
            bytes_done: 1 << 20,
            bytes_total: 8 << 20,
            ..Rollout::default()
        };
        assert_eq!(devices(&rollout), "3 downloading, 1 rolled back of 10");
        assert_eq!(
            line(&rollout),
            "3 downloading, 1 rolled back of 10; 1.00 MiB of 8.00 MiB"
        );
    }
}
