//! What the engine's tests stand on: a real database in a directory of its own, and short words for common steps.

use std::{cell::RefCell, collections::BTreeMap, path::Path, sync::Arc};

use fwpush_keys::{
    id::{DeviceId, FileId, ReleaseId, RolloutId},
    release::HwRange,
    time::Timestamp,
};
use fwpush_services::Postgres;
use tokio::sync::watch;

use super::{
    Added, Db, NewDevice, Options, Place, Published, ReleaseRow, RunningImage, engine::params,
};
use crate::{
    desired::{self, Desired, Facts},
    driver,
    ingest::{self, AckSink, Decision, DeviceReport, ReportKind},
    rollout::{Phase, RolloutAction, RolloutState},
    rollouts::{self, RolloutDeviceRow, RolloutView, StartRollout, Target},
};

pub(crate) const STATE: &str = "00112233445566778899aabbccddeeff";

pub(crate) fn id(name: &str) -> DeviceId {
    name.parse().unwrap()
}

pub(crate) fn ids(names: &[&str]) -> Vec<DeviceId> {
    names.iter().map(|name| id(name)).collect()
}

/// A server's engine without its tasks: tests take each step themselves.
pub(crate) struct Bench {
    pub db: Db,
    pub place: Place,
    /// Gone with the bench, unless the database is somebody else's.
    pub dir: tempfile::TempDir,
    /// The server of a database that is PostgreSQL's.
    postgres: Option<Arc<Postgres>>,
    files: u64,
    said: u64,
}

thread_local! {
    /// Where set, benches of this thread are made there.
    static POSTGRES: RefCell<Option<(Arc<Postgres>, u32)>> = const { RefCell::new(None) };
}

/// Runs a test that makes its benches with [`Bench::new`] on PostgreSQL. Where that is not installed, says so.
pub(crate) fn on_postgres(test: impl FnOnce()) {
    if let Some(postgres) = postgres(&fwpush_services::Options::default()) {
        POSTGRES.set(Some((postgres, 0)));
        test();
        POSTGRES.set(None);
    }
}

/// A server of this test's own. None: PostgreSQL is not installed.
pub(crate) fn postgres(options: &fwpush_services::Options) -> Option<Arc<Postgres>> {
    let exe = std::env::current_exe().unwrap();
    // target/<profile>/deps/fwpush_server-... -> target/postgres
    let template = exe.ancestors().nth(3).unwrap().join("postgres");
    let options = fwpush_services::Options {
        template: Some(template),
        ..options.clone()
    };
    match Postgres::start(&options) {
        Ok(postgres) => Some(Arc::new(postgres)),
        Err(missing @ fwpush_services::Error::Missing { .. }) => {
            println!("SKIPPED: {missing}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs each of the named tests, which use [`Bench::new`], on PostgreSQL too.
macro_rules! on_postgres_too {
    ($($name:ident),* $(,)?) => {
        mod postgres {
            $(#[test] fn $name() { $crate::db::testing::on_postgres(super::$name); })*
        }
    };
}
pub(crate) use on_postgres_too;

impl Bench {
    /// On SQLite, but inside of [`on_postgres`].
    pub(crate) async fn new() -> Self {
        let next = POSTGRES.with_borrow_mut(|postgres| {
            let (postgres, number) = postgres.as_mut()?;
            *number += 1;
            Some((postgres.clone(), format!("bench{number}")))
        });
        let dir = tempfile::tempdir().unwrap();
        let (place, postgres) = match next {
            None => (Place::sqlite(dir.path().join("test.db")), None),
            Some((postgres, database)) => {
                postgres.create_database(&database).unwrap();
                (place_of(&postgres.url(&database)), Some(postgres))
            }
        };
        let db = Db::open(&place).await.unwrap();
        Self {
            db,
            place,
            dir,
            postgres,
            files: 0,
            said: 0,
        }
    }

    /// On a database that is there already.
    pub(crate) async fn at(place: Place) -> Self {
        Self {
            db: Db::open(&place).await.unwrap(),
            place,
            dir: tempfile::tempdir().unwrap(),
            postgres: None,
            files: 100,
            said: 100,
        }
    }

    pub(crate) fn is_postgres(&self) -> bool {
        self.postgres.is_some()
    }

    /// Closes the database and opens it again, as a restart does.
    pub(crate) async fn restart(&mut self) {
        self.db.close().await;
        self.db = Db::open(&self.place).await.unwrap();
    }

    pub(crate) async fn add(&self, name: &str) {
        let added = self.db.add_device(device(name), "tester").await.unwrap();
        assert!(matches!(added, Added::Created(_)), "{added:?}");
    }

    pub(crate) async fn add_all(&self, names: &[&str]) {
        for name in names {
            self.add(name).await;
        }
    }

    /// Publishes version `version` with `seq` its place in time; `change` may make it special.
    pub(crate) async fn publish_with(
        &mut self,
        version: &str,
        change: impl FnOnce(&mut ReleaseRow),
    ) -> Arc<ReleaseRow> {
        self.files += 1;
        let file = FileId::of(&self.files.to_le_bytes());
        self.db.add_file(&file, 100_000).await.unwrap();
        let mut release = release(version, self.files, file, self.db.now());
        change(&mut release);
        let published = self
            .db
            .insert_release(&release, &[file], "tester")
            .await
            .unwrap();
        assert!(matches!(published, Published::New), "{published:?}");
        self.db.release(&release.release_id).await.unwrap().unwrap()
    }

    pub(crate) async fn publish(&mut self, version: &str) -> Arc<ReleaseRow> {
        self.publish_with(version, |_| {}).await
    }

    pub(crate) async fn start(&self, release: &ReleaseRow, target: Target) -> RolloutId {
        self.start_as(release, target, RolloutAction::Install)
            .await
            .unwrap()
            .rollout_id
    }

    pub(crate) async fn start_as(
        &self,
        release: &ReleaseRow,
        target: Target,
        action: RolloutAction,
    ) -> Result<RolloutView, rollouts::RolloutError> {
        let rollout_id = RolloutId::new_v7(self.db.now());
        let release_id = release.release_id;
        rollouts::start(
            &self.db,
            StartRollout {
                rollout_id,
                release_id,
                target,
                action,
                actor: "tester".to_owned(),
            },
        )
        .await
    }

    /// A rollout to all devices, driven until each has its generation.
    pub(crate) async fn roll_out(&mut self, version: &str) -> (Arc<ReleaseRow>, RolloutId) {
        let release = self.publish(version).await;
        let rollout = self.start(&release, Target::All).await;
        self.drive().await;
        (release, rollout)
    }

    /// Takes every step that the driver would take now.
    pub(crate) async fn drive(&self) {
        driver::drive_now(&self.db).await.unwrap();
    }

    pub(crate) async fn view(&self, rollout: &RolloutId) -> RolloutView {
        rollouts::get(&self.db, rollout).await.unwrap()
    }

    pub(crate) async fn state(&self, rollout: &RolloutId) -> RolloutState {
        self.view(rollout).await.state
    }

    pub(crate) async fn phases(&self, rollout: &RolloutId) -> Vec<(Phase, u64)> {
        self.view(rollout).await.phases
    }

    /// The device's phase in the rollout; None when it has no part in it.
    pub(crate) async fn phase(&self, rollout: &RolloutId, name: &str) -> Option<Phase> {
        let rows = self.db.updates_of(&id(name), 100).await.unwrap();
        rows.iter()
            .find(|row| row.rollout_id == *rollout)
            .map(|row| row.phase)
    }

    /// The device's part in the rollout, as it is shown.
    pub(crate) async fn row(&self, rollout: &RolloutId, name: &str) -> RolloutDeviceRow {
        let rows = self.db.updates_of(&id(name), 100).await.unwrap();
        let row = rows.into_iter().find(|row| row.rollout_id == *rollout);
        row.unwrap()
    }

    pub(crate) async fn error_code(&self, rollout: &RolloutId, name: &str) -> String {
        let error = self.row(rollout, name).await.error;
        error.map(|error| error.code).unwrap_or_default()
    }

    pub(crate) async fn desired(&self, name: &str) -> Arc<Desired> {
        desired::of(&self.db, &id(name)).await.unwrap().unwrap()
    }

    pub(crate) async fn generation(&self, name: &str) -> u64 {
        self.db
            .device(&id(name))
            .await
            .unwrap()
            .unwrap()
            .desired_generation
    }

    pub(crate) async fn event_kinds(&self, name: &str) -> Vec<String> {
        let events = self.db.events_of(&id(name), 1_000).await.unwrap();
        events.into_iter().map(|event| event.kind).collect()
    }

    /// The device connects and says what it runs.
    pub(crate) async fn register(&self, name: &str, facts: Facts) -> Arc<Desired> {
        ingest::testing::register(&self.db, &id(name), facts, 0)
            .await
            .unwrap();
        self.desired(name).await
    }

    /// The device reports under the generation that holds for it, with the next seq.
    pub(crate) async fn say(&mut self, name: &str, kind: ReportKind) {
        let generation = self.generation(name).await;
        self.say_under(name, generation, kind).await;
    }

    pub(crate) async fn say_under(&mut self, name: &str, generation: u64, kind: ReportKind) {
        self.said += 1;
        ingest::testing::report(&self.db, report(name, generation, self.said, kind), &sink())
            .await
            .unwrap();
    }

    /// The notice that holds for the device was written to its stream.
    pub(crate) async fn hear(&self, name: &str) {
        let desired = self.desired(name).await;
        let rollout = desired.rollout_id.expect("there is something to hear");
        ingest::testing::heard(&self.db, &id(name), &rollout, desired.generation)
            .await
            .unwrap();
    }

    /// Connects, and goes through the whole update to `release`.
    pub(crate) async fn update(&mut self, name: &str, release: &ReleaseRow) {
        self.register(name, facts("1.0.0")).await;
        self.hear(name).await;
        self.say(name, accepted()).await;
        self.say(name, file_ack(release)).await;
        self.say(name, succeeded(release)).await;
    }

    /// Counters, sums and queues are what counting the rows gives.
    pub(crate) async fn check_counts(&self) {
        const COUNTED: &str = "SELECT rollout_id, wave, phase, COUNT(*) AS devices FROM rollout_devices GROUP BY 1, 2, 3";
        const STORED: &str = "SELECT rollout_id, wave, phase, CAST(SUM(devices) AS BIGINT) AS devices FROM counters \
            GROUP BY 1, 2, 3 HAVING SUM(devices) <> 0";
        let mut counts = [BTreeMap::new(), BTreeMap::new()];
        for (counts, sql) in counts.iter_mut().zip([COUNTED, STORED]) {
            for row in self.db.reader().rows("recount", sql, vec![]).await.unwrap() {
                let key = (
                    row.text("rollout_id").unwrap().to_owned(),
                    row.i64("wave").unwrap(),
                    row.i64("phase").unwrap(),
                );
                counts.insert(key, row.i64("devices").unwrap());
            }
        }
        assert_eq!(counts[0], counts[1], "rows and counters");
        const SUMS: &str = "SELECT r.rollout_id, r.bytes_done, r.bytes_total, r.queued, \
            (SELECT CAST(COALESCE(SUM(x.bytes_done), 0) AS BIGINT) FROM rollout_devices AS x WHERE x.rollout_id = r.rollout_id) AS done, \
            (SELECT CAST(COALESCE(SUM(x.bytes_total), 0) AS BIGINT) FROM rollout_devices AS x WHERE x.rollout_id = r.rollout_id) AS total, \
            (SELECT COUNT(*) FROM devices AS d WHERE d.next_rollout_id = r.rollout_id) AS waiting FROM rollouts AS r";
        for row in self
            .db
            .reader()
            .rows("recount", SUMS, vec![])
            .await
            .unwrap()
        {
            for (stored, counted) in [
                ("bytes_done", "done"),
                ("bytes_total", "total"),
                ("queued", "waiting"),
            ] {
                assert_eq!(
                    row.i64(stored).unwrap(),
                    row.i64(counted).unwrap(),
                    "{stored}"
                );
            }
        }
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        let rows = self
            .db
            .reader()
            .rows("count", sql, params![])
            .await
            .unwrap();
        rows[0].i64("n").unwrap()
    }
}

/// The place that a URL names.
pub(crate) fn place_of(url: &str) -> Place {
    Place::parse(url, &Options::default(), Path::new("")).unwrap()
}

pub(crate) fn device(name: &str) -> NewDevice {
    NewDevice {
        client_id: id(name),
        product: "gateway".parse().unwrap(),
        hw_id: "board-a".parse().unwrap(),
        hw_rev: 2,
        channel: "stable".parse().unwrap(),
    }
}

pub(crate) fn release(version: &str, seq: u64, file: FileId, now: Timestamp) -> ReleaseRow {
    ReleaseRow {
        release_id: ReleaseId::new_v7(now),
        product: "gateway".parse().unwrap(),
        channel: "stable".parse().unwrap(),
        version: version.parse().unwrap(),
        seq,
        security_counter: 1,
        envelope: Arc::from(format!("envelope of {version} {seq}").into_bytes()),
        file_id: file,
        size: 100_000,
        file_name: "image.bin".to_owned(),
        image_id: file,
        image_size: 100_000,
        issued_at: now,
        expires_at: now.saturating_add(std::time::Duration::from_secs(365 * 24 * 3_600)),
        published_at: now,
        revoked: false,
        hw: vec![HwRange {
            id: "board-a".parse().unwrap(),
            rev_min: 1,
            rev_max: 3,
        }],
        from_min: None,
        from_max: None,
        min_agent: None,
    }
}

/// What a device says that runs `version`, installed at the factory.
pub(crate) fn facts(version: &str) -> Facts {
    Facts {
        state_id: STATE.to_owned(),
        product: "gateway".to_owned(),
        hw_id: "board-a".to_owned(),
        hw_rev: 2,
        channels: vec!["stable".to_owned()],
        attributes: BTreeMap::new(),
        agent_version: "0.1.0".to_owned(),
        current: RunningImage {
            version: version.to_owned(),
            slot: "a".to_owned(),
            confirmed: true,
            ..RunningImage::default()
        },
        observed_generation: 0,
        boot_id: "boot".to_owned(),
        boot_count: 1,
        last_report_seq: 0,
    }
}

/// What runs after `release` was confirmed.
pub(crate) fn running(release: &ReleaseRow) -> RunningImage {
    RunningImage {
        release_id: Some(release.release_id),
        version: release.version.to_string(),
        security_counter: release.security_counter,
        slot: "b".to_owned(),
        confirmed: true,
    }
}

pub(crate) fn sink() -> AckSink {
    Arc::new(watch::channel(None).0)
}

/// A report under `generation` with `seq`.
pub(crate) fn report(name: &str, generation: u64, seq: u64, kind: ReportKind) -> DeviceReport {
    DeviceReport {
        device: id(name),
        state_id: STATE.to_owned(),
        boot_count: 1,
        seq,
        generation,
        kind,
    }
}

pub(crate) fn accepted() -> ReportKind {
    ReportKind::Reply {
        decision: Decision::Accepted,
        error: None,
    }
}

pub(crate) fn reached(phase: Phase) -> ReportKind {
    ReportKind::Phase {
        attempt: 1,
        phase,
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        current: None,
        log: String::new(),
    }
}

pub(crate) fn downloading(bytes_done: u64) -> ReportKind {
    ReportKind::Phase {
        attempt: 1,
        phase: Phase::Downloading,
        bytes_done,
        bytes_total: 100_000,
        error: None,
        current: None,
        log: String::new(),
    }
}

pub(crate) fn file_ack(release: &ReleaseRow) -> ReportKind {
    ReportKind::Ack {
        file_id: release.file_id,
        bytes: release.image_size,
        blake3: release.image_id,
    }
}

pub(crate) fn succeeded(release: &ReleaseRow) -> ReportKind {
    ended(Phase::Succeeded, Some(running(release)))
}

pub(crate) fn ended(phase: Phase, current: Option<RunningImage>) -> ReportKind {
    ReportKind::Phase {
        attempt: 1,
        phase,
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        current,
        log: String::new(),
    }
}
