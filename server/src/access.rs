//! Which devices may be connected at all, and the connections of each, so that blocking one takes effect at once.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use fwpush_keys::{
    DeviceId, Role,
    tls::{Bar, Peer},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    budget::{Ask, Budgets},
    db::{Db, DbError, DeviceRecord},
    limits,
};

/// Why a device with a valid certificate is not served; it and the log get these words.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("device {0} is not known here; add it with `fwpush device add`")]
    Unknown(DeviceId),
    #[error("device {0} is blocked")]
    Blocked(DeviceId),
    #[error("this is not the newest certificate of device {0}")]
    OldCertificate(DeviceId),
    #[error("device {0} asks for too much at once; it may come back in a few seconds")]
    Hasty(DeviceId),
    #[error("the device database does not answer")]
    Database(#[source] DbError),
}

/// Clones share everything.
#[derive(Clone, Debug)]
pub struct Access {
    db: Db,
    state: Arc<Mutex<State>>,
    budgets: Budgets,
}

#[derive(Debug, Default)]
struct State {
    /// Devices refused at their handshake already; the database is the truth, this only spares the questions.
    blocked: HashSet<DeviceId>,
    /// By the order in which they came.
    live: HashMap<DeviceId, BTreeMap<u64, Connection>>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    ends: Ends,
    /// Of its certificate.
    fingerprint: String,
}

/// How a connection is told to end, and how it tells that it has.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// Nothing new is begun on it: it ends with the calls that are under way.
    pub leave: CancellationToken,
    /// It is cut, with everything on it.
    pub hang_up: CancellationToken,
    /// It is not there any more.
    over: CancellationToken,
}

impl Access {
    pub fn new(db: Db, blocked: impl IntoIterator<Item = DeviceId>) -> Self {
        let state = State {
            blocked: blocked.into_iter().collect(),
            ..State::default()
        };
        Self {
            db,
            state: Arc::new(Mutex::new(state)),
            budgets: Budgets::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the handshake: blocked devices do not get past it.
    pub fn bar(&self) -> Bar {
        let access = self.clone();
        Bar::new(move |identity| {
            let device = identity
                .id
                .parse::<DeviceId>()
                .ok()
                .filter(|_| identity.role == Role::Device);
            let blocked = device.filter(|device| access.is_blocked(device));
            if let Some(device) = &blocked {
                tracing::info!(device.id = %device, "A blocked device is refused in its handshake.");
            }
            blocked.is_some()
        })
    }

    /// Registers a connection of `device` until the guard goes. Of more than [`limits::CONNECTIONS_PER_DEVICE`] the oldest ends.
    pub fn enter(&self, device: &DeviceId, peer: &Peer, ends: Ends) -> Entered {
        let mut state = self.state();
        state.next += 1;
        let number = state.next;
        let own = state.live.entry(device.clone()).or_default();
        let fingerprint = hex::encode(peer.fingerprint);
        let over = ends.over.clone().drop_guard();
        own.insert(number, Connection { ends, fingerprint });
        if own.len() > limits::CONNECTIONS_PER_DEVICE
            && let Some((_, oldest)) = own.pop_first()
        {
            oldest.ends.hang_up.cancel();
        }
        Entered {
            access: self.clone(),
            device: device.clone(),
            number,
            _over: over,
        }
    }

    /// True for a device that is known to be blocked, without asking the database.
    pub fn is_blocked(&self, device: &DeviceId) -> bool {
        self.state().blocked.contains(device)
    }

    /// Takes what `ask` costs from the device's budget, which all of its connections share.
    pub(crate) fn spend(&self, device: &DeviceId, ask: Ask) -> Result<(), Refused> {
        if self.budgets.take(device, ask, Instant::now()) {
            Ok(())
        } else {
            Err(Refused::Hasty(device.clone()))
        }
    }

    /// A device must have a record, not be blocked, and hold the newest certificate given to it. Gives the record.
    pub async fn check_device(
        &self,
        device: &DeviceId,
        peer: &Peer,
    ) -> Result<DeviceRecord, Refused> {
        if self.is_blocked(device) {
            return Err(Refused::Blocked(device.clone()));
        }
        let record = self.db.device(device).await.map_err(Refused::Database)?;
        let record = record.ok_or_else(|| Refused::Unknown(device.clone()))?;
        if record.blocked {
            return Err(Refused::Blocked(device.clone()));
        }
        let fingerprint = hex::encode(peer.fingerprint);
        // A record without a certificate admits none: one given out under this id before was for another record.
        if record
            .cert_fingerprint
            .as_ref()
            .is_none_or(|newest| *newest != fingerprint)
        {
            return Err(Refused::OldCertificate(device.clone()));
        }
        Ok(record)
    }

    /// Refuses the device from now on. The database was told before; what is live is ended by [`Self::hang_up`].
    pub fn block(&self, device: &DeviceId) {
        self.state().blocked.insert(device.clone());
    }

    pub fn unblock(&self, device: &DeviceId) {
        self.state().blocked.remove(device);
    }

    /// Asks the device's connections to end with what is under way on them; returns when those have ended, which may be never.
    pub async fn see_off(&self, device: &DeviceId) {
        let leaving: Vec<Ends> = match self.state().live.get(device) {
            Some(connections) => connections
                .values()
                .map(|connection| connection.ends.clone())
                .collect(),
            None => Vec::new(),
        };
        for ends in &leaving {
            ends.leave.cancel();
        }
        for ends in leaving {
            ends.over.cancelled().await;
        }
    }

    /// Ends every connection of the device, streams and downloads with it.
    pub fn hang_up(&self, device: &DeviceId) {
        self.hang_up_if(device, |_| true);
    }

    /// Ends every connection of the device that was made with another certificate than `newest`.
    pub fn hang_up_others(&self, device: &DeviceId, newest: Option<&str>) {
        self.hang_up_if(device, |fingerprint| newest != Some(fingerprint));
    }

    fn hang_up_if(&self, device: &DeviceId, ends: impl Fn(&str) -> bool) {
        if let Some(connections) = self.state().live.get(device) {
            connections
                .values()
                .filter(|connection| ends(&connection.fingerprint))
                .for_each(|connection| connection.ends.hang_up.cancel());
        }
    }

    /// True while the device has a connection to this node.
    pub fn is_connected(&self, device: &DeviceId) -> bool {
        self.state().live.contains_key(device)
    }

    /// Devices that have a connection to this node.
    pub fn connected(&self) -> Vec<DeviceId> {
        self.state().live.keys().cloned().collect()
    }

    /// Refuses these devices from now on and no others, as the database has it.
    pub fn set_blocked(&self, blocked: HashSet<DeviceId>) {
        self.state().blocked = blocked;
    }
}

/// A registered connection.
#[derive(Debug)]
pub struct Entered {
    access: Access,
    device: DeviceId,
    number: u64,
    /// Tells those who wait for its end.
    _over: DropGuard,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.access.state();
        if let Some(connections) = state.live.get_mut(&self.device) {
            connections.remove(&self.number);
            if connections.is_empty() {
                state.live.remove(&self.device);
            }
        }
    }
}
