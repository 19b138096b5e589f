//! What a node keeps in memory of devices that are connected to it, as the table `devices` has it now.

use fwpush_keys::id::{DeviceId, Product};

use super::{
    Db, DbError,
    engine::{Column::Text, Rows, params},
};
use crate::limits;

/// What may have been changed by another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub device: DeviceId,
    pub blocked: bool,
    /// Ids whose events it hears, or `*`.
    pub hears: Vec<String>,
    /// Of the newest certificate.
    pub cert_fingerprint: Option<String>,
}

/// A device that hears of others.
#[derive(Clone, Debug)]
pub(crate) struct Listener {
    pub device: DeviceId,
    pub product: Product,
    /// Ids whose events it hears, or `*`.
    pub hears: Vec<String>,
}

impl Db {
    /// The devices that hear of others, up to [`limits::LISTENERS`].
    pub(crate) async fn listeners(&self) -> Result<Vec<Listener>, DbError> {
        const SELECT: &str = "SELECT device_id, product, hears FROM devices WHERE hears <> '[]' ORDER BY device_id LIMIT $1";
        let rows = self
            .reader()
            .rows(
                "list who hears of others",
                SELECT,
                params![limits::LISTENERS],
            )
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Listener {
                    device: row.parse("device_id")?,
                    product: row.parse("product")?,
                    hears: row.json("hears")?,
                })
            })
            .collect()
    }

    /// Of each of `devices` that has a record.
    pub(crate) async fn standings(&self, devices: &[DeviceId]) -> Result<Vec<Standing>, DbError> {
        const SELECT: &str = "SELECT d.device_id, d.blocked, d.hears, d.cert_fingerprint \
            FROM {rows} AS x JOIN devices AS d ON d.device_id = x.device_id";
        let rows = Rows::texts(&[Text("device_id")], devices);
        let mut reader = self.reader();
        let found = reader.rows_for("compare devices", SELECT, rows, vec![]);
        let standing = |row: &super::engine::Row| {
            Ok(Standing {
                device: row.parse("device_id")?,
                blocked: row.bool("blocked")?,
                hears: row.json("hears")?,
                cert_fingerprint: row.opt_text("cert_fingerprint")?.map(str::to_owned),
            })
        };
        found.await?.iter().map(standing).collect()
    }
}
