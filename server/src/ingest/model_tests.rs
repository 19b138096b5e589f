//! Random stories of devices, operators, time and restarts, checked after every commit.
//!
//! What must hold: phases only go forward within a generation, a terminal one stays, generations only rise, counters are what
//! counting gives, a device has one open update, and an acknowledgement is never ahead of what a new reader of the database sees.

use std::{collections::BTreeMap, time::Duration};

use fwpush_keys::id::RolloutId;
use proptest::prelude::*;

use super::*;
use crate::{
    db::testing::{
        Bench, STATE, accepted, downloading, ended, facts, file_ack, id, on_postgres, reached,
        running, succeeded,
    },
    desired::Facts,
    rollouts::{self, RolloutDeviceRow, Target},
};

const DEVICES: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Debug)]
enum Happens {
    Connects {
        device: usize,
        lost_state: bool,
        lies: bool,
        remembers: u64,
    },
    Hears {
        device: usize,
    },
    /// A report under the present generation, or `old` ones before.
    Says {
        device: usize,
        what: usize,
        old: u64,
    },
    /// The last reports of a device again, oldest first, on a new stream.
    Repeats {
        device: usize,
    },
    Starts {
        all: bool,
    },
    Aborts {
        which: usize,
    },
    Revokes,
    Removes {
        device: usize,
    },
    Blocks {
        device: usize,
        blocked: bool,
    },
    Time {
        seconds: u64,
    },
    Drives,
    Restarts,
}

fn happens() -> impl Strategy<Value = Happens> {
    let device = 0..DEVICES.len();
    let rarely = prop_oneof![9 => Just(false), 1 => Just(true)];
    let remembers = prop_oneof![9 => Just(0_u64), 1 => 1..50_u64];
    prop_oneof![
        6 => (device.clone(), rarely.clone(), rarely, remembers)
            .prop_map(|(device, lost_state, lies, remembers)| Happens::Connects { device, lost_state, lies, remembers }),
        5 => device.clone().prop_map(|device| Happens::Hears { device }),
        20 => (device.clone(), 0..11_usize, prop_oneof![8 => Just(0_u64), 1 => 1..3_u64])
            .prop_map(|(device, what, old)| Happens::Says { device, what, old }),
        3 => device.clone().prop_map(|device| Happens::Repeats { device }),
        2 => any::<bool>().prop_map(|all| Happens::Starts { all }),
        1 => any::<usize>().prop_map(|which| Happens::Aborts { which }),
        1 => Just(Happens::Revokes),
        1 => device.clone().prop_map(|device| Happens::Removes { device }),
        1 => (device, any::<bool>()).prop_map(|(device, blocked)| Happens::Blocks { device, blocked }),
        2 => (0..5_000_u64).prop_map(|seconds| Happens::Time { seconds }),
        6 => Just(Happens::Drives),
        1 => Just(Happens::Restarts),
    ]
}

/// One device's own memory.
#[derive(Clone, Debug, Default)]
struct Device {
    state: u32,
    observed: u64,
    seq: u64,
    sent: Vec<DeviceReport>,
}

struct World {
    bench: Bench,
    devices: [Device; DEVICES.len()],
    releases: u64,
    rollouts: Vec<(RolloutId, Arc<crate::db::ReleaseRow>)>,
    /// The last seen of each update, and of each device's generation.
    rows: BTreeMap<(DeviceId, RolloutId), RolloutDeviceRow>,
    generations: BTreeMap<DeviceId, u64>,
}

impl World {
    async fn new() -> Self {
        let bench = Bench::new().await;
        bench.add_all(&DEVICES).await;
        Self {
            bench,
            devices: Default::default(),
            releases: 0,
            rollouts: Vec::new(),
            rows: BTreeMap::new(),
            generations: BTreeMap::new(),
        }
    }

    async fn happen(&mut self, event: Happens) {
        match event {
            Happens::Connects {
                device,
                lost_state,
                lies,
                remembers,
            } => self.connect(device, lost_state, lies, remembers).await,
            Happens::Hears { device } => {
                let Some(desired) = self.desired(device).await else {
                    return;
                };
                self.devices[device].observed =
                    self.devices[device].observed.max(desired.generation);
                if let Some(rollout) = desired.rollout_id {
                    testing::heard(
                        &self.bench.db,
                        &id(DEVICES[device]),
                        &rollout,
                        desired.generation,
                    )
                    .await
                    .unwrap();
                }
            }
            Happens::Says { device, what, old } => self.say(device, what, old).await,
            Happens::Repeats { device } => {
                let ack = crate::db::testing::sink();
                for report in self.devices[device].sent.clone() {
                    self.send(report, &ack).await;
                }
            }
            Happens::Starts { all } => {
                self.releases += 1;
                let release = self.bench.publish(&format!("1.{}.0", self.releases)).await;
                let target = if all {
                    Target::All
                } else {
                    Target::Devices(vec![id("a"), id("b")])
                };
                let rollout = self.bench.start(&release, target).await;
                self.rollouts.push((rollout, release));
            }
            Happens::Aborts { which } if !self.rollouts.is_empty() => {
                let (rollout, _) = &self.rollouts[which % self.rollouts.len()];
                // A superseded one is refused.
                let _ = rollouts::abort(&self.bench.db, rollout, "tester").await;
            }
            Happens::Revokes => {
                let Some((_, release)) = self.rollouts.last() else {
                    return;
                };
                self.bench
                    .db
                    .set_revoked(&release.product, &[release.release_id], "tester")
                    .await
                    .unwrap();
            }
            Happens::Removes { device } => {
                self.bench
                    .db
                    .remove_device(&id(DEVICES[device]), "tester")
                    .await
                    .unwrap();
                self.rows
                    .retain(|(id, _), _| id.as_str() != DEVICES[device]);
                self.generations.remove(&id(DEVICES[device]));
                self.bench.add(DEVICES[device]).await;
            }
            Happens::Blocks { device, blocked } => {
                self.bench
                    .db
                    .set_blocked(&id(DEVICES[device]), blocked, "", "tester")
                    .await
                    .unwrap();
            }
            Happens::Time { seconds } => self.bench.db.advance_clock(Duration::from_secs(seconds)),
            Happens::Drives => self.bench.drive().await,
            Happens::Restarts => self.bench.restart().await,
            Happens::Aborts { .. } => {}
        }
    }

    async fn desired(&self, device: usize) -> Option<Arc<crate::desired::Desired>> {
        crate::desired::of(&self.bench.db, &id(DEVICES[device]))
            .await
            .unwrap()
    }

    fn state_id(&self, device: usize) -> String {
        match self.devices[device].state {
            0 => STATE.to_owned(),
            n => format!("{n:032}"),
        }
    }

    async fn connect(&mut self, device: usize, lost_state: bool, lies: bool, remembers: u64) {
        if lost_state {
            self.devices[device] = Device {
                state: self.devices[device].state + 1,
                ..Device::default()
            };
        }
        let own = &mut self.devices[device];
        own.observed += remembers;
        let known = Facts {
            observed_generation: own.observed,
            last_report_seq: own.seq,
            ..facts("1.0.0")
        };
        let mut said = Facts {
            state_id: self.state_id(device),
            ..known
        };
        if lies {
            said.hw_rev = 99;
        }
        testing::register(&self.bench.db, &id(DEVICES[device]), said, 0)
            .await
            .unwrap();
    }

    async fn say(&mut self, device: usize, what: usize, old: u64) {
        let Some((_, release)) = self.rollouts.last().cloned() else {
            return;
        };
        let kind = match what {
            0 => accepted(),
            1 => ReportKind::Reply {
                decision: Decision::Deferred {
                    until: self.bench.db.now(),
                },
                error: None,
            },
            2 => downloading(30_000),
            3 => downloading(60_000),
            4 => file_ack(&release),
            5 => reached(Phase::Installing),
            6 => reached(Phase::Rebooting),
            7 => reached(Phase::Confirming),
            8 => succeeded(&release),
            9 => ended(Phase::RolledBack, Some(facts("1.0.0").current)),
            _ => ReportKind::Reply {
                decision: Decision::Rejected,
                error: Some(ReportError::new("BUSY", "")),
            },
        };
        let generation = self
            .bench
            .generation(DEVICES[device])
            .await
            .saturating_sub(old);
        let state_id = self.state_id(device);
        let own = &mut self.devices[device];
        own.seq += 1;
        let report = DeviceReport {
            device: id(DEVICES[device]),
            state_id,
            boot_count: 1,
            seq: own.seq,
            generation,
            kind,
        };
        own.sent.push(report.clone());
        if own.sent.len() > 4 {
            own.sent.remove(0);
        }
        self.send(report, &crate::db::testing::sink()).await;
    }

    /// Commits a report and checks that its acknowledgement tells the truth.
    async fn send(&mut self, report: DeviceReport, ack: &AckSink) {
        let (device, seq) = (report.device.clone(), report.seq);
        testing::report(&self.bench.db, report, ack).await.unwrap();
        let acked = ack
            .borrow()
            .expect("every report of a known device is acknowledged");
        assert!(acked.upto_seq >= seq);
        assert_eq!(
            acked.generation,
            self.bench.generation(device.as_str()).await
        );
    }

    /// What holds at any time.
    async fn check(&mut self) {
        self.bench.check_counts().await;
        for name in DEVICES {
            let record = self.bench.db.device(&id(name)).await.unwrap().unwrap();
            let before = self
                .generations
                .insert(id(name), record.desired_generation)
                .unwrap_or(0);
            assert!(
                record.desired_generation >= before,
                "{name}: generation {before} became {}",
                record.desired_generation
            );
            let rows = self.bench.db.updates_of(&id(name), 1_000).await.unwrap();
            let open = rows.iter().filter(|row| !row.phase.is_terminal()).count();
            assert!(open <= 1, "{name} has {open} open updates");
            for row in rows {
                assert!(row.generation <= record.desired_generation);
                let before = self.rows.insert((id(name), row.rollout_id), row.clone());
                if let Some(before) = before {
                    check_step(&before, &row);
                }
            }
        }
    }
}

/// From one sight of an update to the next.
fn check_step(before: &RolloutDeviceRow, after: &RolloutDeviceRow) {
    let words = format!("{before:?}\n{after:?}");
    assert!(after.generation >= before.generation, "{words}");
    let may_wait = after.phase == Phase::Deferred || after.phase.may_be_put_off();
    assert!(after.deferred_until.is_none() || may_wait, "{words}");
    if after.generation > before.generation {
        let rejoined = before.phase == Phase::Cancelled && after.attempt == 1;
        assert!(!before.phase.is_terminal() || rejoined, "{words}");
        return;
    }
    let unheard = before.phase == Phase::Offered && after.phase == Phase::Pending;
    let same = before.phase == after.phase;
    assert!(
        same || unheard || before.phase.may_become(after.phase),
        "{words}"
    );
    if before.phase.is_terminal() {
        assert_eq!(format!("{before:?}"), format!("{after:?}"));
    }
}

fn stories() -> impl Strategy<Value = Vec<Happens>> {
    prop::collection::vec(happens(), 1..60)
}

fn tell(story: Vec<Happens>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut world = World::new().await;
        world.happen(Happens::Starts { all: true }).await;
        for event in story {
            world.happen(event).await;
            world.check().await;
        }
        // Time heals: without any device, every rollout comes to rest.
        for _ in 0..6 {
            world
                .bench
                .db
                .advance_clock(Duration::from_secs(8 * 24 * 3_600));
            world.bench.drive().await;
            world.check().await;
        }
        let bench = &world.bench;
        let driven = "SELECT COUNT(*) AS n FROM rollouts WHERE driven = 1";
        let told = "SELECT COUNT(*) AS n FROM rollout_devices WHERE phase BETWEEN 2 AND 9";
        let queued = "SELECT COUNT(*) AS n FROM devices WHERE next_rollout_id IS NOT NULL";
        let left = (
            bench.count(driven).await,
            bench.count(told).await,
            bench.count(queued).await,
        );
        assert_eq!(left, (0, 0, 0));
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_invariants_hold(story in stories()) {
        tell(story);
    }
}

/// The same on PostgreSQL, fewer of them: each makes a database of its own.
#[test]
fn whatever_happens_the_invariants_hold_on_postgres() {
    on_postgres(|| {
        let config = ProptestConfig {
            cases: 4,
            max_shrink_iters: 40,
            ..ProptestConfig::default()
        };
        let told = proptest::test_runner::TestRunner::new(config).run(&stories(), |story| {
            tell(story);
            Ok(())
        });
        told.unwrap();
    });
}

/// Ending the story in order does not depend on how reports are grouped.
#[tokio::test]
async fn a_group_of_reports_comes_to_the_same_as_one_after_the_other() {
    let mut ends = Vec::new();
    for grouped in [false, true] {
        let mut bench = Bench::new().await;
        bench.add_all(&DEVICES).await;
        let (release, rollout) = bench.roll_out("1.1.0").await;
        for name in DEVICES {
            bench.register(name, facts("1.0.0")).await;
        }
        let kinds = [
            accepted(),
            downloading(10),
            file_ack(&release),
            reached(Phase::Rebooting),
            succeeded(&release),
        ];
        let stop = CancellationToken::new();
        let ingest = Ingest::start(
            bench.db.clone(),
            Sessions::new(bench.db.now()),
            stop.clone(),
        );
        let ack = crate::db::testing::sink();
        for (seq, kind) in (1..).zip(kinds) {
            for name in DEVICES {
                let report = crate::db::testing::report(name, 1, seq, kind.clone());
                match grouped {
                    true => ingest.submit(report, &ack).unwrap(),
                    false => testing::report(&bench.db, report, &ack).await.unwrap(),
                }
            }
        }
        stop.cancel();
        ingest.stopped().await;
        assert_eq!(ack.borrow().unwrap().upto_seq, 5);
        bench.check_counts().await;
        let current = bench.db.device(&id("b")).await.unwrap().unwrap().current;
        assert_eq!(current, running(&release));
        ends.push((
            bench.phases(&rollout).await,
            bench.view(&rollout).await.bytes_done,
        ));
    }
    assert_eq!(ends[0], ends[1]);
}
