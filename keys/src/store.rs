//! The trust that a device or a server holds: the newest root, revocation lists and the lower bound of time.

use std::collections::BTreeMap;

use crate::clock::TrustedClock;
use crate::dsse::{Envelope, PayloadType};
use crate::id::Product;
use crate::limits::ROOTS_PER_UPDATE;
use crate::release::Release;
use crate::revocation::{Revocation, RevocationVersion};
use crate::root::Root;
use crate::time::Timestamp;
use crate::trust::{TrustError, Verified};

/// The chain of accepted roots, the newest revocation list of each product, and the trusted clock. Does no I/O: what it
/// accepts, the caller persists before acting on it.
#[derive(Debug, Clone)]
pub struct TrustStore {
    /// Never empty, versions consecutive; the last one counts.
    chain: Vec<Verified<Root>>,
    /// How many of `chain` the caller has taken for persisting.
    taken: usize,
    revocations: BTreeMap<Product, Verified<Revocation>>,
    clock: TrustedClock,
}

impl TrustStore {
    /// Starts from the first root, which is built in or pinned: see [`Verified::bootstrap`].
    pub fn new(first: Verified<Root>, clock: TrustedClock) -> Self {
        let mut store = Self {
            chain: vec![first],
            taken: 1,
            revocations: BTreeMap::new(),
            clock,
        };
        store.clock.raise(store.root().issued);
        store
    }

    /// Starts from the first root and what was persisted: root envelopes in any number, oldest first, of which those not
    /// above `first` are skipped, and revocation lists. Everything is verified again.
    ///
    /// A list was accepted under a root that may since have been replaced: it is taken if any root of the chain verifies it.
    /// An error names the first document that does not fit; the caller may start from `first` alone, and the server will
    /// send what is missing.
    pub fn restore(
        first: Verified<Root>,
        clock: TrustedClock,
        roots: &[impl AsRef<[u8]>],
        revocations: &[(Product, Vec<u8>)],
    ) -> Result<Self, TrustError> {
        let mut store = Self::new(first, clock);
        for root in roots {
            store.apply_root(root.as_ref())?;
        }
        store.taken = store.chain.len();
        for (product, envelope) in revocations {
            store.restore_revocation(product, envelope)?;
        }
        Ok(store)
    }

    fn restore_revocation(&mut self, product: &Product, envelope: &[u8]) -> Result<(), TrustError> {
        let mut newest_error = None;
        for root in self.chain.iter().rev() {
            match root.verify_revocation(product, envelope) {
                Ok(list) => {
                    self.hold(list);
                    return Ok(());
                }
                Err(error) => newest_error = newest_error.or(Some(error)),
            }
        }
        newest_error.map_or(Ok(()), Err)
    }

    /// The newest root.
    pub fn root(&self) -> &Verified<Root> {
        // The chain starts with one and only grows.
        &self.chain[self.chain.len() - 1]
    }

    /// All roots held, oldest first, without a gap.
    pub fn roots(&self) -> &[Verified<Root>] {
        &self.chain
    }

    /// The envelopes after `version`, oldest first, as many as one update carries.
    pub fn roots_after(&self, version: u64) -> &[Verified<Root>] {
        let start = self.chain.partition_point(|root| root.version <= version);
        let end = self.chain.len().min(start + ROOTS_PER_UPDATE);
        &self.chain[start..end]
    }

    /// The newest revocation list of `product`.
    pub fn revocation(&self, product: &Product) -> Option<&Verified<Revocation>> {
        self.revocations.get(product)
    }

    /// Which list of `product` is held; (0, 0) for none.
    pub fn revocation_version(&self, product: &Product) -> RevocationVersion {
        self.revocation(product)
            .map_or(RevocationVersion::NONE, |list| list.list_version())
    }

    /// The clock; its bound is to be persisted when it has changed.
    pub fn clock(&self) -> &TrustedClock {
        &self.clock
    }

    /// Takes consecutive roots, oldest first, at most 16 of them. Those not newer than the one held are skipped.
    ///
    /// Returns how many were accepted. On error those before the refused document stay accepted; it and all after it change
    /// nothing. Either way [`TrustStore::take_accepted`] has what is to be persisted.
    pub fn apply_roots(&mut self, envelopes: &[impl AsRef<[u8]>]) -> Result<usize, TrustError> {
        if envelopes.len() > ROOTS_PER_UPDATE {
            return Err(TrustError::TooManyRoots(envelopes.len()));
        }
        let mut accepted = 0;
        for envelope in envelopes {
            accepted += usize::from(self.apply_root(envelope.as_ref())?);
        }
        Ok(accepted)
    }

    fn apply_root(&mut self, envelope: &[u8]) -> Result<bool, TrustError> {
        if self.is_held_already(envelope) {
            return Ok(false);
        }
        let next = self.root().advance(envelope)?;
        self.clock.raise(next.issued);
        self.chain.push(next);
        Ok(true)
    }

    /// Whether an envelope *claims* a root version that is not newer. Only ever a reason to skip it.
    fn is_held_already(&self, envelope: &[u8]) -> bool {
        Envelope::parse(envelope)
            .ok()
            .filter(|envelope| envelope.payload_type() == PayloadType::Root)
            .and_then(|envelope| Root::from_payload(envelope.payload()).ok())
            .is_some_and(|root| root.version <= self.root().version)
    }

    /// The roots accepted since the last call, oldest first, each to be persisted.
    pub fn take_accepted(&mut self) -> Vec<Verified<Root>> {
        let new = self.chain[self.taken..].to_vec();
        self.taken = self.chain.len();
        new
    }

    /// Takes a revocation list of `product`, signed by the product's release keys under the present root.
    ///
    /// Returns false for a list that is not newer by (root_version, version) than the one held, and keeps that one.
    pub fn apply_revocation(
        &mut self,
        product: &Product,
        envelope: &[u8],
    ) -> Result<bool, TrustError> {
        let list = self.root().verify_revocation(product, envelope)?;
        Ok(self.hold(list))
    }

    fn hold(&mut self, list: Verified<Revocation>) -> bool {
        if list.list_version() <= self.revocation_version(&list.product) {
            return false;
        }
        self.raise_clock(list.issued);
        self.revocations.insert(list.product.clone(), list);
        true
    }

    /// Verifies a release under the present root: see [`Verified::verify_release`]. Raises the clock's bound.
    pub fn accept_release(
        &mut self,
        product: &Product,
        envelope: &[u8],
    ) -> Result<Verified<Release>, TrustError> {
        let release = self.root().verify_release(product, envelope)?;
        self.raise_clock(release.issued);
        Ok(release)
    }

    /// Nothing under a root is from after the root's end: a document that says so came from a wrong clock, and believing
    /// it would leave the device with nothing but expired documents and certificates.
    fn raise_clock(&mut self, issued: Timestamp) {
        if issued < self.root().expires {
            self.clock.raise(issued);
        }
    }

    /// The time to judge by: see [`TrustedClock::judge`].
    pub fn judge(&self, rtc: Timestamp) -> Timestamp {
        self.clock.judge(rtc)
    }
}
