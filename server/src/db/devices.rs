//! Table `devices`: the record that an operator made of each device, what the device says of itself, and what it should do.

use std::collections::BTreeMap;

use fwpush_keys::{
    id::{Channel, DeviceId, HwId, Product, ReleaseId, RolloutId},
    time::Timestamp,
};
use serde_json::json;

use super::{
    Db, DbError,
    engine::{
        Column::{Int, Text},
        On, Row, Rows, Tx, params,
    },
    events::{NewEvent, insert as insert_events},
    rollout_devices, states,
};
use crate::{
    desired::{DesiredAction, join, state::Joins},
    ingest::ReportError,
    limits,
    rollout::Phase,
};

/// What a device runs, as it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunningImage {
    /// None when fwpush did not install it.
    pub release_id: Option<ReleaseId>,
    /// A semantic version; empty for a device that never connected.
    pub version: String,
    pub security_counter: u64,
    /// `a` or `b`.
    pub slot: String,
    /// False while the image is on trial.
    pub confirmed: bool,
}

/// A device.
#[derive(Clone, Debug)]
pub struct DeviceRecord {
    pub client_id: DeviceId,
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    pub channel: Channel,
    /// Every connection and call is refused.
    pub blocked: bool,
    /// Its last claim of product, hardware or channel differed from this record: it is told to HOLD.
    pub held: bool,
    pub created_at: Timestamp,
    /// Up to [`limits::LAST_SEEN`] old while it is connected.
    pub last_seen_at: Option<Timestamp>,
    /// SHA-256 of its certificate, where that was noted.
    pub cert_fingerprint: Option<String>,
    /// Ids whose events it hears, or `*`.
    pub hears: Vec<String>,
    /// Random, made with the device's state directory; empty for a device that never connected.
    pub state_id: String,
    pub agent_version: String,
    /// Channels that its own configuration allows.
    pub channels: Vec<String>,
    pub attributes: BTreeMap<String, String>,
    /// The newest generation that it said it has handled.
    pub observed_generation: u64,
    pub current: RunningImage,
    /// Of the session whose registration changed this record last.
    pub(crate) session_epoch: u64,
    pub desired_generation: u64,
    pub(crate) desired_action: DesiredAction,
    pub(crate) desired_rollout: Option<RolloutId>,
    pub(crate) next_rollout: Option<RolloutId>,
}

impl DeviceRecord {
    /// Reads the columns of table `devices` from a row that has them under their own names.
    pub(super) fn read(row: &Row) -> Result<Self, DbError> {
        let action = row.i64("desired_action")?;
        let desired_action = i32::try_from(action).ok().and_then(DesiredAction::from_i32);
        Ok(Self {
            client_id: row.parse("device_id")?,
            product: row.parse("product")?,
            hw_id: row.parse("hw_id")?,
            hw_rev: row.u32("hw_rev")?,
            channel: row.parse("channel")?,
            blocked: row.bool("blocked")?,
            held: row.bool("held")?,
            created_at: row.time("created_at_ms")?,
            last_seen_at: row.opt_time("last_seen_at_ms")?,
            cert_fingerprint: row.opt_text("cert_fingerprint")?.map(str::to_owned),
            hears: row.json("hears")?,
            state_id: row.text("state_id")?.to_owned(),
            agent_version: row.text("agent_version")?.to_owned(),
            channels: row.json("channels")?,
            attributes: row.json("attributes")?,
            observed_generation: row.u64("observed_generation")?,
            current: RunningImage {
                release_id: row.opt_parse("release_id")?,
                version: row.text("version")?.to_owned(),
                security_counter: row.u64("security_counter")?,
                slot: row.text("slot")?.to_owned(),
                confirmed: row.bool("confirmed")?,
            },
            session_epoch: row.u64("session_epoch")?,
            desired_generation: row.u64("desired_generation")?,
            desired_action: desired_action
                .ok_or_else(|| DbError::value("desired_action", action))?,
            desired_rollout: row.opt_parse("desired_rollout_id")?,
            next_rollout: row.opt_parse("next_rollout_id")?,
        })
    }

    /// True when `new` describes the device that this is.
    fn is(&self, new: &NewDevice) -> bool {
        self.product == new.product
            && self.hw_id == new.hw_id
            && self.hw_rev == new.hw_rev
            && self.channel == new.channel
    }
}

/// What an operator says of a new device.
#[derive(Clone, Debug)]
pub struct NewDevice {
    pub client_id: DeviceId,
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    pub channel: Channel,
}

/// What adding a device came to, with its record as it is now.
#[derive(Clone, Debug)]
pub enum Added {
    Created(DeviceRecord),
    /// It was added before, just so. Nothing was changed.
    Same(DeviceRecord),
    /// The id has a record with another product, hardware or channel. Nothing was changed.
    Conflict(DeviceRecord),
}

/// Which devices to list, by id.
#[derive(Clone, Debug, Default)]
pub struct DeviceFilter {
    /// None for all.
    pub product: Option<Product>,
    /// The last id of the page before.
    pub after: Option<DeviceId>,
    /// At most [`limits::PAGE_MAX`].
    pub limit: u32,
}

const BY_ID: &str = "SELECT * FROM devices WHERE device_id = $1";

async fn record(tx: &mut Tx, id: &DeviceId) -> Result<Option<DeviceRecord>, DbError> {
    let row = tx
        .row("look up a device", BY_ID, params![id.as_str()])
        .await?;
    row.as_ref().map(DeviceRecord::read).transpose()
}

/// Records made from now on begin with this generation, or with a higher one that holds already.
async fn begin_above(tx: &mut Tx, generation: u64) -> Result<(), DbError> {
    const RAISE: &str = "INSERT INTO meta (name, value) VALUES ('first_generation', $1) \
        ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE meta.value < excluded.value";
    tx.execute("raise the first generation", RAISE, params![generation])
        .await?;
    Ok(())
}

impl Db {
    /// Makes a record, and lets the device into an open rollout that targets all, where one is for it.
    pub async fn add_device(&self, new: NewDevice, actor: &str) -> Result<Added, DbError> {
        const ADD: &str = "add a device";
        const INSERT: &str = "INSERT INTO devices (device_id, product, hw_id, hw_rev, channel, created_at_ms, \
            desired_generation) VALUES ($1, $2, $3, $4, $5, $6, \
            COALESCE((SELECT value FROM meta WHERE name = 'first_generation'), 0))";
        let mut tx = self.begin().await?;
        if let Some(record) = record(&mut tx, &new.client_id).await? {
            return Ok(if record.is(&new) {
                Added::Same(record)
            } else {
                Added::Conflict(record)
            });
        }
        let now = tx.now();
        let id = &new.client_id;
        let values = params![
            id.as_str(),
            new.product.as_str(),
            new.hw_id.as_str(),
            new.hw_rev,
            new.channel.as_str(),
            now
        ];
        tx.execute(ADD, INSERT, values).await?;
        let mut added = states::load(self, &mut On::Tx(&mut tx), std::slice::from_ref(id)).await?;
        for state in &mut added {
            state.joins = Joins::Any;
            let details = format!(
                "{}, {} revision {}, {}",
                new.product, new.hw_id, new.hw_rev, new.channel
            );
            state
                .events
                .push(NewEvent::audit(Some(id), "ADDED", details, actor));
        }
        join::join(self, &mut tx, &mut added).await?;
        let saved = states::save(&mut tx, added).await?;
        let record = record(&mut tx, id).await?;
        tx.commit().await?;
        saved.nudge(self);
        record
            .map(Added::Created)
            .ok_or_else(|| DbError::value("device_id", "vanished while it was added"))
    }

    /// The device's record; None for an unknown id.
    pub async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRecord>, DbError> {
        let row = self
            .reader()
            .row("look up a device", BY_ID, params![id.as_str()])
            .await?;
        row.as_ref().map(DeviceRecord::read).transpose()
    }

    /// A page of records in the order of their ids.
    pub async fn list_devices(&self, filter: &DeviceFilter) -> Result<Vec<DeviceRecord>, DbError> {
        const LIST: &str = "list devices";
        const ALL: &str = "SELECT * FROM devices WHERE device_id > $1 ORDER BY device_id LIMIT $2";
        const OF_PRODUCT: &str = "SELECT * FROM devices WHERE product = $3 AND device_id > $1 ORDER BY device_id LIMIT $2";
        let after = filter.after.as_ref().map_or("", DeviceId::as_str);
        let limit = filter.limit.min(limits::PAGE_MAX);
        let rows = match &filter.product {
            None => self.reader().rows(LIST, ALL, params![after, limit]).await?,
            Some(product) => {
                self.reader()
                    .rows(LIST, OF_PRODUCT, params![after, limit, product.as_str()])
                    .await?
            }
        };
        rows.iter().map(DeviceRecord::read).collect()
    }

    /// How many devices have a record; of one product or in all.
    pub async fn count_devices(&self, product: Option<&Product>) -> Result<u64, DbError> {
        const COUNT: &str = "count devices";
        let row = match product {
            None => {
                self.reader()
                    .row(COUNT, "SELECT COUNT(*) AS devices FROM devices", vec![])
                    .await?
            }
            Some(product) => {
                let sql = "SELECT COUNT(*) AS devices FROM devices WHERE product = $1";
                self.reader()
                    .row(COUNT, sql, params![product.as_str()])
                    .await?
            }
        };
        row.map_or(Ok(0), |row| row.u64("devices"))
    }

    /// Blocks or unblocks. Its open update stays as it is: a pending one waits, any other runs into its deadline. None: unknown.
    pub async fn set_blocked(
        &self,
        id: &DeviceId,
        blocked: bool,
        reason: &str,
        actor: &str,
    ) -> Result<Option<DeviceRecord>, DbError> {
        const SET: &str = "UPDATE devices SET blocked = $2 WHERE device_id = $1 AND blocked <> $2";
        let mut tx = self.begin().await?;
        if tx
            .execute("block a device", SET, params![id.as_str(), blocked])
            .await?
            > 0
        {
            let kind = if blocked { "BLOCKED" } else { "UNBLOCKED" };
            insert_events(&mut tx, &[NewEvent::audit(Some(id), kind, reason, actor)]).await?;
        }
        let record = record(&mut tx, id).await?;
        tx.commit().await?;
        Ok(record)
    }

    /// Forgets the device. Its open update is CANCELLED; a later record of the same id starts anew. False: unknown.
    pub async fn remove_device(&self, id: &DeviceId, actor: &str) -> Result<bool, DbError> {
        let mut tx = self.begin().await?;
        let now = tx.now();
        let mut removed =
            states::load(self, &mut On::Tx(&mut tx), std::slice::from_ref(id)).await?;
        let Some(state) = removed.first_mut() else {
            return Ok(false);
        };
        let why = ReportError::new("REMOVED", "an operator removed the device");
        state.end_by_server(Phase::Cancelled, DesiredAction::Abort, why, now);
        state.record.next_rollout = None;
        state
            .events
            .push(NewEvent::audit(Some(id), "REMOVED", "", actor));
        // A later record of the same id, maybe of the same device, counts on from here.
        begin_above(&mut tx, state.record.desired_generation).await?;
        let saved = states::save(&mut tx, removed).await?;
        rollout_devices::forget(&mut tx, id).await?;
        tx.execute(
            "remove a device",
            "DELETE FROM devices WHERE device_id = $1",
            params![id.as_str()],
        )
        .await?;
        tx.commit().await?;
        saved.nudge(self);
        Ok(true)
    }

    /// Makes every device's generation, and that under which later records begin, higher by `by` and tells open updates anew. For
    /// a database that was restored and that nothing else uses yet. Gives the number of devices.
    pub async fn lift_generations(&self, by: u64) -> Result<u64, DbError> {
        const FIRST: &str =
            "SELECT COALESCE(MAX(value), 0) AS first FROM meta WHERE name = 'first_generation'";
        let mut tx = self.begin().await?;
        let first = tx.row("read the first generation", FIRST, vec![]).await?;
        let first = first.map_or(Ok(0), |row| row.u64("first"))?;
        begin_above(&mut tx, first.saturating_add(by).min(limits::NUMBER)).await?;
        tx.commit().await?;
        let mut filter = DeviceFilter {
            limit: u32::try_from(limits::STATE_ROWS).unwrap_or(u32::MAX),
            ..DeviceFilter::default()
        };
        let mut devices = 0;
        loop {
            let page = self.list_devices(&filter).await?;
            let ids: Vec<DeviceId> = page.into_iter().map(|record| record.client_id).collect();
            let Some(last) = ids.last() else {
                return Ok(devices);
            };
            filter.after = Some(last.clone());
            devices += ids.len() as u64;
            let mut tx = self.begin().await?;
            let now = tx.now();
            let mut states = states::load(self, &mut On::Tx(&mut tx), &ids).await?;
            for state in &mut states {
                state.lift(by, now);
            }
            let saved = states::save(&mut tx, states).await?;
            tx.commit().await?;
            saved.nudge(self);
        }
    }

    /// Replaces the list of ids whose events the device hears. None: unknown device.
    pub async fn set_hears(
        &self,
        id: &DeviceId,
        hears: Vec<String>,
        actor: &str,
    ) -> Result<Option<DeviceRecord>, DbError> {
        let mut tx = self.begin().await?;
        let list = json!(hears).to_string();
        let values = params![id.as_str(), list];
        if tx
            .execute(
                "set what a device hears",
                "UPDATE devices SET hears = $2 WHERE device_id = $1",
                values,
            )
            .await?
            > 0
        {
            insert_events(
                &mut tx,
                &[NewEvent::audit(Some(id), "HEARS", hears.join(" "), actor)],
            )
            .await?;
        }
        let record = record(&mut tx, id).await?;
        tx.commit().await?;
        Ok(record)
    }

    /// Notes which certificate the device has. False: unknown device.
    pub async fn set_cert_fingerprint(
        &self,
        id: &DeviceId,
        fingerprint: Option<&str>,
    ) -> Result<bool, DbError> {
        const SET: &str = "UPDATE devices SET cert_fingerprint = $2 WHERE device_id = $1";
        let mut tx = self.begin().await?;
        let values = params![id.as_str(), fingerprint.map(str::to_owned)];
        let known = tx.execute("note a certificate", SET, values).await? > 0;
        tx.commit().await?;
        Ok(known)
    }

    /// Notes when devices were last seen, in commits of bounded size. A time older than the one noted changes nothing.
    pub async fn flush_last_seen(&self, seen: &[(DeviceId, Timestamp)]) -> Result<(), DbError> {
        const FLUSH: &str = "UPDATE devices SET last_seen_at_ms = x.at_ms FROM {rows} AS x \
            WHERE devices.device_id = x.device_id AND COALESCE(devices.last_seen_at_ms, 0) < x.at_ms";
        for page in seen.chunks(limits::COMMIT_ROWS) {
            let mut rows = Rows::of(&[Text("device_id"), Int("at_ms")]);
            for (device, at) in page {
                rows.push(json!([device.as_str(), at.as_ms()]));
            }
            let mut tx = self.begin().await?;
            tx.execute_for("note when devices were seen", FLUSH, rows, vec![])
                .await?;
            tx.commit().await?;
        }
        Ok(())
    }

    /// All blocked devices.
    pub async fn blocked_ids(&self) -> Result<Vec<DeviceId>, DbError> {
        const LIST: &str = "SELECT device_id FROM devices WHERE blocked = 1 ORDER BY device_id";
        let rows = self
            .reader()
            .rows("list blocked devices", LIST, vec![])
            .await?;
        rows.iter().map(|row| row.parse("device_id")).collect()
    }
}
