//! How a device must end an update, given its faults, and whether it did.

use fwpush_device::{Phase, SlotState};
use semver::Version;

use crate::{
    faults::Faults,
    track::{Track, Update},
};

/// How an update ends on a device whose faults allow nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Runs the release, confirmed.
    Updated,
    /// Tried the release and went back to what it ran before.
    RolledBack,
    /// Refused it; runs what it ran before.
    Rejected,
}

impl Ending {
    /// What the faults make of a release that comes up healthy (`bad` false) or does not.
    pub fn of(faults: Faults, bad: bool) -> Self {
        if faults.reject {
            Self::Rejected
        } else if bad || faults.bad_health {
            Self::RolledBack
        } else {
            Self::Updated
        }
    }
}

/// What a device runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    pub version: Option<Version>,
    pub state: SlotState,
    /// Whether the slot holds the image byte for byte; `None` when its hash is not known.
    pub intact: Option<bool>,
}

/// Checks a device against what it must end with. `Err` says in a few words what is different.
pub(crate) fn judge(
    expected: Ending,
    release: &Version,
    track: &Track,
    running: &Running,
) -> Result<(), String> {
    let update = track.newest_to(release);
    let on_release = running.version.as_ref() == Some(release);
    let (phase, must_run_release) = match expected {
        Ending::Updated => (Phase::Succeeded, true),
        Ending::RolledBack => (Phase::RolledBack, false),
        Ending::Rejected => (Phase::Rejected, false),
    };
    // A device that ran the release from the start has nothing to report.
    let nothing_to_do = expected == Ending::Updated && update.is_none() && on_release;
    if !nothing_to_do && update.and_then(|update| update.phase) != Some(phase) {
        return Err(standing(update.or(track.newest_refused()), track, phase));
    }
    if running.state != SlotState::Confirmed {
        return Err(format!("{}, but what runs is not confirmed", phase));
    }
    if on_release != must_run_release {
        let version = running
            .version
            .as_ref()
            .map_or_else(|| "nothing known".to_owned(), Version::to_string);
        return Err(format!("{phase}, but runs {version}"));
    }
    // An installed image always has its hash in the boot record.
    if running.intact == Some(false)
        || must_run_release && running.intact.is_none() && !nothing_to_do
    {
        return Err(format!(
            "{phase}, but its slot does not hold the signed image"
        ));
    }
    if !track.all_confirmed() {
        return Err(format!(
            "{phase}, but the server has not confirmed its reports"
        ));
    }
    Ok(())
}

/// Where a device stands, for people.
fn standing(update: Option<&Update>, track: &Track, wanted: Phase) -> String {
    let mut words = match update {
        None if track.counts.sessions == 0 => "never registered".to_owned(),
        None => "not told".to_owned(),
        Some(update) => match update.phase {
            None => "told".to_owned(),
            Some(Phase::Downloading) => {
                let percent = update.bytes.min(update.size) * 100 / update.size.max(1);
                format!("DOWNLOADING, {percent} %")
            }
            Some(phase) => phase.to_string(),
        },
    };
    if let Some(failure) = update.and_then(|update| update.failure.as_ref()) {
        words.push_str(&format!(" ({failure})"));
    }
    if !track.online {
        words.push_str(", offline");
        if let Some(trouble) = &track.trouble {
            words.push_str(&format!(": {trouble}"));
        }
    }
    format!("{words}; should be {wanted}")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use fwpush_device::{AgentEvent, Offer};
    use fwpush_keys::{ReleaseId, Timestamp};

    use super::*;
    use fwpush_device::{SlotId, Step};

    const V1: Version = Version::new(1, 0, 0);
    const V2: Version = Version::new(1, 1, 0);

    fn track(phase: Option<Phase>) -> Track {
        let mut track = Track::default();
        let now = Instant::now();
        let offer = Offer {
            step: Step::Download,
            generation: 4,
            release_id: ReleaseId::from_parts(Timestamp::EPOCH, [0; 10]),
            version: V2,
            size: 100,
            rollback: false,
            slot: SlotId::B,
            asked: 0,
        };
        track.offered(&offer, now);
        if let Some(phase) = phase {
            let event = AgentEvent::Phase {
                generation: 4,
                phase,
                failure: None,
            };
            track.event(&event, now);
        }
        track
    }

    fn running(version: Version, state: SlotState, intact: Option<bool>) -> Running {
        Running {
            version: Some(version),
            state,
            intact,
        }
    }

    #[test]
    fn faults_decide_the_ending() {
        let none = Faults::default();
        let reject = Faults {
            reject: true,
            ..none
        };
        assert_eq!(Ending::of(none, false), Ending::Updated);
        assert_eq!(Ending::of(none, true), Ending::RolledBack);
        assert_eq!(
            Ending::of(
                Faults {
                    bad_health: true,
                    ..none
                },
                false
            ),
            Ending::RolledBack
        );
        assert_eq!(
            Ending::of(reject, true),
            Ending::Rejected,
            "what is refused never comes up"
        );
        let slow = Faults {
            lost_link: true,
            corrupt_group: true,
            defer: true,
            restart: true,
            ..none
        };
        assert_eq!(Ending::of(slow, false), Ending::Updated);
    }

    #[test]
    fn each_ending_is_recognised() {
        let confirmed = SlotState::Confirmed;
        for (ending, phase, version, intact) in [
            (Ending::Updated, Phase::Succeeded, V2, Some(true)),
            (Ending::RolledBack, Phase::RolledBack, V1, None),
            (Ending::RolledBack, Phase::RolledBack, V1, Some(true)),
            (Ending::Rejected, Phase::Rejected, V1, None),
        ] {
            let running = running(version, confirmed, intact);
            assert_eq!(judge(ending, &V2, &track(Some(phase)), &running), Ok(()));
            for other in [Ending::Updated, Ending::RolledBack, Ending::Rejected] {
                if other != ending {
                    assert!(judge(other, &V2, &track(Some(phase)), &running).is_err());
                }
            }
        }
    }

    #[test]
    fn words_without_deeds_are_not_believed() {
        let updated = |running| {
            judge(
                Ending::Updated,
                &V2,
                &track(Some(Phase::Succeeded)),
                &running,
            )
        };
        let confirmed = SlotState::Confirmed;
        assert!(
            updated(running(V1, confirmed, None))
                .unwrap_err()
                .contains("runs 1.0.0")
        );
        assert!(updated(running(V2, SlotState::Trial { tries_left: 1 }, Some(true))).is_err());
        for intact in [Some(false), None] {
            let words = updated(running(V2, confirmed, intact)).unwrap_err();
            assert!(words.contains("signed image"), "{words}");
        }
    }

    #[test]
    fn a_device_on_the_release_from_the_start_is_done() {
        let running = running(V2, SlotState::Confirmed, None);
        assert_eq!(
            judge(Ending::Updated, &V2, &Track::default(), &running),
            Ok(())
        );
    }

    #[test]
    fn where_a_device_stands_is_said_in_words() {
        let running = running(V1, SlotState::Confirmed, None);
        let words = |track: &Track| judge(Ending::Updated, &V2, track, &running).unwrap_err();
        assert!(words(&Track::default()).starts_with("never registered, offline"));
        let mut downloading = track(Some(Phase::Downloading));
        downloading.event(&AgentEvent::Bytes(42), Instant::now());
        downloading.troubled("no route");
        assert_eq!(
            words(&downloading),
            "DOWNLOADING, 42 %, offline: no route; should be SUCCEEDED"
        );
    }
}
