//! What a node keeps in memory of devices that are connected to it, as the table `devices` has it now.

use fwpush_keys::id::DeviceId;

use super::{
    Db, DbError,
    engine::{Column::Text, Rows},
};

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

impl Db {
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
