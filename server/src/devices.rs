//! Device records and certificates: add, block, unblock, remove.

use std::{sync::Arc, time::Duration};

use fwpush_keys::{
    Channel, DeviceId, HwId, Identity, Product, TrustDomain,
    pki::{Ca, PkiError},
    tls,
};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::timeout,
};

use crate::{
    access::Access,
    db::{Added, Db, DbError, DeviceRecord, NewDevice},
    limits,
    route::{Change, Route},
    session::{Closing, Sessions},
};

/// A device whose streams are told why they end has this long to read it and leave; then its connections are cut. A block takes
/// effect within 1 s, of which its commit and the look-ups around it have 300 ms.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// Why a device operation is refused; the words go to the operator.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("there is no device {0}")]
    NotFound(DeviceId),
    #[error("device {0} exists with another product, hardware or channel")]
    Conflict(DeviceId),
    #[error("product {0} is not in the trust root")]
    UnknownProduct(Product),
    #[error("a certificate lives for 1 to {} days", limits::CERTIFICATE_DAYS_MAX)]
    Days,
    #[error(
        "a device hears of at most {} others, each a device id or `*`",
        limits::HEARS
    )]
    Hears,
    #[error(transparent)]
    Certificate(#[from] PkiError),
    #[error("read back the certificate just made")]
    Unreadable(#[from] fwpush_keys::TlsError),
    #[error("read back the identity of the certificate just made")]
    Nameless(#[from] fwpush_keys::IdentityError),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What an operator says of a new device.
#[derive(Clone, Debug)]
pub struct Request {
    pub device: DeviceId,
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    pub channel: Channel,
    /// PEM; only its public key is used. `None`: a record without a certificate.
    pub csr: Option<String>,
    /// 0 for the default.
    pub days: u32,
}

/// Clones share everything.
#[derive(Clone, Debug)]
pub struct Devices {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    access: Access,
    sessions: Sessions,
    route: Route,
    ca: Ca,
    trust_domain: TrustDomain,
    /// Held over the commit of who is blocked and what is kept of it in memory, so that both have the same order.
    blocking: Mutex<()>,
}

impl Devices {
    pub fn new(
        db: Db,
        access: Access,
        sessions: Sessions,
        route: Route,
        ca: Ca,
        trust_domain: TrustDomain,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                db,
                access,
                sessions,
                route,
                ca,
                trust_domain,
                blocking: Mutex::new(()),
            }),
        }
    }

    /// Makes the record and, from the CSR's key, a certificate (PEM); a certificate given earlier is refused from then on.
    ///
    /// The same record again only renews the certificate.
    pub async fn add(
        &self,
        request: Request,
        operator: &str,
    ) -> Result<(DeviceRecord, Option<String>), DeviceError> {
        let inner = &self.inner;
        let device = request.device.clone();
        let certificate = match &request.csr {
            Some(csr) => Some(self.issue(&device, csr, request.days)?),
            None => None,
        };
        let new = NewDevice {
            client_id: device.clone(),
            product: request.product,
            hw_id: request.hw_id,
            hw_rev: request.hw_rev,
            channel: request.channel,
        };
        if let Added::Conflict(_) = inner.db.add_device(new, operator).await? {
            return Err(DeviceError::Conflict(device));
        }
        if let Some((_, fingerprint)) = &certificate {
            inner
                .db
                .set_cert_fingerprint(&device, Some(fingerprint))
                .await?;
            // Connections under the certificate before this one end here.
            inner.access.hang_up(&device);
            self.announce(&device);
        }
        let record = self.get(&device).await?;
        Ok((record, certificate.map(|(pem, _)| pem)))
    }

    fn issue(
        &self,
        device: &DeviceId,
        csr: &str,
        days: u32,
    ) -> Result<(String, String), DeviceError> {
        let days = if days == 0 {
            limits::CERTIFICATE_DAYS_DEFAULT
        } else {
            days
        };
        if days > limits::CERTIFICATE_DAYS_MAX {
            return Err(DeviceError::Days);
        }
        let identity = Identity::device(&self.inner.trust_domain, device);
        let pem = self
            .inner
            .ca
            .issue_for_csr(csr, &identity, &[], self.inner.db.now(), days)?;
        let peer = tls::peer_of(&tls::certificates_from_pem(&pem)?)?;
        Ok((pem, hex::encode(peer.fingerprint)))
    }

    /// The record.
    pub async fn get(&self, device: &DeviceId) -> Result<DeviceRecord, DeviceError> {
        let found = self.inner.db.device(device).await?;
        found.ok_or_else(|| DeviceError::NotFound(device.clone()))
    }

    /// Commits the block first, then ends what is live: a device that comes back in between finds itself blocked. When this
    /// returns, this node serves nothing of the device any more, and others have been told.
    pub async fn block(
        &self,
        device: &DeviceId,
        reason: &str,
        operator: &str,
    ) -> Result<DeviceRecord, DeviceError> {
        self.get(device).await?;
        let order = self.inner.blocking.lock().await;
        self.inner
            .db
            .set_blocked(device, true, reason, operator)
            .await?;
        self.inner.access.block(device);
        drop(order);
        self.announce(device);
        self.end_streams(device).await;
        tracing::info!(device.id = %device, operator, "A device was blocked.");
        self.get(device).await
    }

    pub async fn unblock(
        &self,
        device: &DeviceId,
        operator: &str,
    ) -> Result<DeviceRecord, DeviceError> {
        self.get(device).await?;
        let order = self.inner.blocking.lock().await;
        self.inner
            .db
            .set_blocked(device, false, "", operator)
            .await?;
        self.inner.access.unblock(device);
        drop(order);
        self.announce(device);
        self.get(device).await
    }

    /// Forgets the record; the certificate is worth nothing without it.
    pub async fn remove(&self, device: &DeviceId, operator: &str) -> Result<(), DeviceError> {
        self.get(device).await?;
        let order = self.inner.blocking.lock().await;
        self.inner.db.remove_device(device, operator).await?;
        self.inner.access.unblock(device);
        drop(order);
        self.announce(device);
        self.end_streams(device).await;
        tracing::info!(device.id = %device, operator, "A device was removed.");
        Ok(())
    }

    /// Replaces the list of devices whose events this one hears.
    pub async fn set_hears(
        &self,
        device: &DeviceId,
        hears: Vec<String>,
        operator: &str,
    ) -> Result<DeviceRecord, DeviceError> {
        let valid = |name: &String| name == "*" || name.parse::<DeviceId>().is_ok();
        if hears.len() > limits::HEARS || !hears.iter().all(valid) {
            return Err(DeviceError::Hears);
        }
        self.get(device).await?;
        self.inner
            .db
            .set_hears(device, hears.clone(), operator)
            .await?;
        self.inner.sessions.set_hears(device, hears);
        self.announce(device);
        self.get(device).await
    }

    fn announce(&self, device: &DeviceId) {
        self.inner.route.announce(Change::Device(device.clone()));
    }

    /// While this is held, nobody is blocked or unblocked on this node.
    pub(crate) async fn in_order(&self) -> MutexGuard<'_, ()> {
        self.inner.blocking.lock().await
    }

    /// Refuses the devices that the database has as blocked, whichever node blocked them, and no others.
    pub(crate) async fn refuse_blocked(&self) -> Result<(), DbError> {
        let _order = self.inner.blocking.lock().await;
        let blocked = self.inner.db.blocked_ids().await?;
        self.inner.access.set_blocked(blocked.into_iter().collect());
        Ok(())
    }

    /// Tells the device's stream that it is over, and has its connections end with it; those that have not after [`LAST_WORDS`] are
    /// cut, with the downloads on them.
    pub(crate) async fn end_streams(&self, device: &DeviceId) {
        let Inner {
            sessions, access, ..
        } = &*self.inner;
        sessions.close(device, Closing::Refused);
        let _ = timeout(LAST_WORDS, access.see_off(device)).await;
        access.hang_up(device);
    }
}
