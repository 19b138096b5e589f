//! Places for those that arrive: first some of each address, then some of all.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits;

/// Too many connections of one peer wait for their turn.
#[derive(Debug, thiserror::Error)]
#[error("too many connections of {0} wait for a handshake")]
pub struct Crowded(pub IpAddr);

/// Places for unfinished handshakes: some of each address, some of all.
#[derive(Debug)]
pub struct Handshakes {
    all: Arc<Semaphore>,
    per_address: usize,
    addresses: Mutex<HashMap<IpAddr, Arc<Address>>>,
}

#[derive(Debug)]
struct Address {
    places: Arc<Semaphore>,
    /// Connections of this address that have not finished their handshake.
    waiting: AtomicUsize,
}

/// One unfinished connection of an address; its entry goes with the last.
#[derive(Debug)]
pub struct Waiting {
    ip: IpAddr,
    address: Arc<Address>,
    handshakes: Arc<Handshakes>,
}

impl Handshakes {
    pub fn new(per_address: usize) -> Self {
        let all = Arc::new(Semaphore::new(limits::ARRIVALS));
        Self {
            all,
            per_address,
            addresses: Mutex::default(),
        }
    }

    /// Has a connection wait; an error when too many of its peer do. Addresses of one host count as one.
    pub fn enter(self: &Arc<Self>, ip: IpAddr) -> Result<Waiting, Crowded> {
        let ip = site(ip);
        let mut addresses = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let address = addresses
            .entry(ip)
            .or_insert_with(|| {
                let places = Arc::new(Semaphore::new(self.per_address));
                Arc::new(Address {
                    places,
                    waiting: AtomicUsize::new(0),
                })
            })
            .clone();
        if address.waiting.load(Ordering::Relaxed) >= limits::WAITING_PER_ADDRESS {
            return Err(Crowded(ip));
        }
        address.waiting.fetch_add(1, Ordering::Relaxed);
        Ok(Waiting {
            ip,
            address,
            handshakes: self.clone(),
        })
    }

    /// Takes a place of the peer, then one of all. `None`: never again.
    pub async fn places(
        &self,
        waiting: &Waiting,
    ) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let own = waiting.address.places.clone().acquire_owned().await.ok()?;
        let of_all = self.all.clone().acquire_owned().await.ok()?;
        Some((own, of_all))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut addresses = self
            .handshakes
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.address.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            addresses.remove(&self.ip);
        }
    }
}

/// What one peer's bounds are counted by: its IPv4 address, or its IPv6 network of 64 bits, in which a single host can have
/// any number of addresses.
fn site(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_one_host_count_as_one() {
        let site = |text: &str| site(text.parse().unwrap());
        assert_eq!(site("2001:db8::1"), site("2001:db8::ffff:1"));
        assert_ne!(site("2001:db8::1"), site("2001:db8:0:1::1"));
        assert_eq!(site("::ffff:192.0.2.1"), site("192.0.2.1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
    }
}
