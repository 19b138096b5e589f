//! The planner.

use std::{fmt, time::Duration};

use fwpush_keys::time::Timestamp;

use super::{Phase, PhaseCounts, RolloutState};

/// What the planner knows of a rollout itself.
#[derive(Clone, Debug)]
pub struct Rollout {
    pub state: RolloutState,
    /// Devices are still being chosen.
    pub enrolling: bool,
    /// When a device was last given something to hear.
    pub offered_at: Timestamp,
    pub standing: Standing,
    /// After [`Self::offered_at`], connected devices have heard by then; who has not is not connected.
    pub settle: Duration,
}

/// Whether the release may still be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Good,
    Revoked,
    Expired,
}

/// What the planner sees: counts and times, never devices.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    pub waves: Vec<WaveSeen>,
    /// Devices that finish an earlier update first.
    pub queued: u64,
    /// The earliest deadline in each phase that has one.
    pub due: Vec<(Phase, Timestamp)>,
    /// Of an ended rollout: some device was not told to give up yet.
    pub to_take_back: bool,
}

impl Observed {
    /// Devices by phase over all waves.
    pub fn total(&self) -> PhaseCounts {
        let mut total = PhaseCounts::default();
        for wave in &self.waves {
            total.merge(&wave.phases);
        }
        total
    }
}

/// One wave's devices.
#[derive(Clone, Copy, Debug)]
pub struct WaveSeen {
    pub wave: u32,
    pub phases: PhaseCounts,
}

/// A step that the driver takes as one or more bounded transactions, each on the rows it finds then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Look at the next page of devices and choose.
    Enrol,
    /// Open the wave for its chosen devices: they get a generation and are told when they are connected.
    Offer { wave: u32 },
    /// Devices in `phase` past their deadline go to `to`.
    Expire { phase: Phase, to: Phase },
    /// End the rollout; what it takes is [`Op::Cancel`]'s.
    Abort { reason: AbortReason },
    /// Devices that cannot have begun their trial give up, the others are asked to; queued ones leave the queue.
    Cancel,
    /// ACTIVE becomes COMPLETE.
    Complete,
    /// COMPLETE becomes ACTIVE: a device has been told since.
    Reopen,
    /// Nothing to do until a row changes: the driver need not look again.
    Settle,
}

/// Why the engine ends a rollout by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortReason {
    Revoked,
    Expired,
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Revoked => "aborted: its release was revoked",
            Self::Expired => "aborted: its release expired",
        })
    }
}

/// Why devices of a wave wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// Devices are still being chosen.
    Choosing,
    /// Told when they connect.
    NotConnected { devices: u64 },
    /// An earlier update has gone too far to be stopped.
    FinishingEarlier { devices: u64 },
    /// The rollout has ended, but these may be on trial with its image.
    OnTrial { devices: u64 },
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |n: u64| {
            if n == 1 {
                "1 device".to_owned()
            } else {
                format!("{n} devices")
            }
        };
        match self {
            Self::Choosing => f.write_str("devices to be chosen"),
            Self::NotConnected { devices } => write!(f, "{} to connect", count(*devices)),
            Self::FinishingEarlier { devices } => {
                write!(f, "{} to finish an earlier update", count(*devices))
            }
            Self::OnTrial { devices } => write!(
                f,
                "{} to finish the trial begun before the end",
                count(*devices)
            ),
        }
    }
}

/// What to do now, why nothing else is done, and when to look again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order. After each the rollout is observed and planned anew.
    pub ops: Vec<Op>,
    /// By wave.
    pub blocked: Vec<(u32, Blocked)>,
    /// The next moment at which the plan may differ without a row changing.
    pub wake_at: Option<Timestamp>,
}

impl Plan {
    /// What the rollout waits for, in words for a person; empty when devices are at work.
    pub fn waiting_for(&self) -> String {
        let words: Vec<String> = self
            .blocked
            .iter()
            .map(|(_, blocked)| blocked.to_string())
            .collect();
        words.join(", ")
    }
}

/// Decides the next steps of a rollout.
///
/// Open (ACTIVE or COMPLETE) with a release that may not be installed any more: aborts. Otherwise chooses, opens waves, expires
/// what is overdue, and is COMPLETE when no told device is left at work. ABORTED or SUPERSEDED: takes back what can still be
/// taken back and waits for the rest. Nothing at all to do and nothing to wait for but rows to change: settles.
pub fn plan(rollout: &Rollout, seen: &Observed, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let total = seen.total();
    let told = total.sum(Phase::is_told);
    for (phase, at) in seen.due.iter().filter(|(phase, _)| phase.is_told()) {
        if *at <= now {
            // Not answering a notice is no failure: the device may have lost it with the link.
            let to = if *phase == Phase::Offered && rollout.state.is_open() {
                Phase::Pending
            } else {
                Phase::TimedOut
            };
            plan.ops.push(Op::Expire { phase: *phase, to });
        } else {
            plan.wake_before(*at);
        }
    }
    if rollout.state.is_open() {
        plan_open(&mut plan, rollout, seen, &total, told, now);
    } else {
        plan_ended(&mut plan, seen, told);
    }
    plan
}

fn plan_open(
    plan: &mut Plan,
    rollout: &Rollout,
    seen: &Observed,
    total: &PhaseCounts,
    told: u64,
    now: Timestamp,
) {
    let reason = match rollout.standing {
        Standing::Good => None,
        Standing::Revoked => Some(AbortReason::Revoked),
        Standing::Expired => Some(AbortReason::Expired),
    };
    if let Some(reason) = reason {
        plan.ops = vec![Op::Abort { reason }];
        return;
    }
    // What was chosen is told before more is chosen: the first devices of a large fleet need not wait for the last.
    let chosen = seen
        .waves
        .iter()
        .filter(|wave| wave.phases.of(Phase::Chosen) > 0);
    plan.ops
        .extend(chosen.map(|wave| Op::Offer { wave: wave.wave }));
    if rollout.enrolling {
        plan.ops.push(Op::Enrol);
        plan.blocked.push((0, Blocked::Choosing));
    }
    let moving = !plan.ops.is_empty();
    let pending = total.of(Phase::Pending);
    if told == 0 && seen.queued == 0 && !moving {
        let settled_at = rollout.offered_at.saturating_add(rollout.settle);
        if pending > 0 && now < settled_at && rollout.state == RolloutState::Active {
            plan.wake_before(settled_at);
        } else if rollout.state == RolloutState::Active {
            plan.ops.push(Op::Complete);
        } else {
            plan.ops.push(Op::Settle);
        }
    } else if rollout.state == RolloutState::Complete && (told > 0 || seen.queued > 0 || moving) {
        plan.ops.insert(0, Op::Reopen);
    }
    if told == 0 && total.of(Phase::Chosen) == 0 {
        for wave in &seen.waves {
            let devices = wave.phases.of(Phase::Pending);
            if devices > 0 {
                plan.blocked
                    .push((wave.wave, Blocked::NotConnected { devices }));
            }
        }
        if seen.queued > 0 {
            plan.blocked.push((
                0,
                Blocked::FinishingEarlier {
                    devices: seen.queued,
                },
            ));
        }
    }
}

fn plan_ended(plan: &mut Plan, seen: &Observed, told: u64) {
    if seen.to_take_back || seen.queued > 0 {
        // Expiring these first would call TIMED_OUT what was taken back.
        plan.ops = vec![Op::Cancel];
    } else if told == 0 {
        plan.ops.push(Op::Settle);
    }
    for wave in &seen.waves {
        let devices = wave.phases.sum(Phase::may_be_on_trial);
        if devices > 0 {
            plan.blocked.push((wave.wave, Blocked::OnTrial { devices }));
        }
    }
}

impl Plan {
    fn wake_before(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
