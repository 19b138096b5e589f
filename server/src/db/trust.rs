//! Table `trust_documents`: roots after the first, and revocation lists, as they were published.

use super::{Db, DbError, params};

/// Which documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustKind {
    Root,
    Revocation,
}

impl TrustKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Revocation => "revocation",
        }
    }
}

impl Db {
    /// Keeps a verified document. `product` is empty for a root. The same versions again: an error, nothing is replaced.
    pub async fn add_trust_document(
        &self,
        kind: TrustKind,
        product: &str,
        root_version: u64,
        version: u64,
        envelope: &[u8],
    ) -> Result<(), DbError> {
        const INSERT: &str = "INSERT INTO trust_documents (kind, product, root_version, version, envelope, created_at_ms) \
                              VALUES ($1, $2, $3, $4, $5, $6)";
        let mut tx = self.begin().await?;
        let now = tx.now();
        let params = params![kind.as_str(), product, root_version, version, envelope, now];
        tx.execute("add a trust document", INSERT, params).await?;
        tx.commit().await
    }

    /// How many documents of all kinds there are; none is ever taken away.
    pub(crate) async fn count_trust_documents(&self) -> Result<u64, DbError> {
        const COUNT: &str = "SELECT COUNT(*) AS n FROM trust_documents";
        let rows = self
            .reader()
            .rows("count the trust documents", COUNT, vec![])
            .await?;
        rows.first().map_or(Ok(0), |row| row.u64("n"))
    }

    /// Envelopes of all documents of a kind, oldest first.
    pub async fn trust_documents(&self, kind: TrustKind) -> Result<Vec<Vec<u8>>, DbError> {
        const SELECT: &str = "SELECT envelope FROM trust_documents WHERE kind = $1 ORDER BY product, root_version, version";
        let rows = self
            .reader()
            .rows("read the trust documents", SELECT, params![kind.as_str()])
            .await?;
        rows.iter()
            .map(|row| Ok(row.bytes("envelope")?.to_vec()))
            .collect()
    }
}
