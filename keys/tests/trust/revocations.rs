//! Which revocation list counts.

use fwpush_keys::TrustStore;

use super::*;

#[test]
fn the_newer_list_counts_and_the_older_changes_nothing() {
    let mut store = store_with_roots(1);
    let gateway = product("gateway");
    for (version, newer) in [(2, true), (2, false), (1, false), (3, true)] {
        let list = sign_revocation(&revocation(version, &[]), &[11]);
        assert_eq!(store.apply_revocation(&gateway, &list).ok(), Some(newer));
    }
    assert_eq!(store.revocation(&gateway).unwrap().order(), (1, 3));
    // The same version with other content is not newer either.
    let other = revocation(3, &[release().release_id]);
    let other = sign_revocation(&other, &[11]);
    assert_eq!(store.apply_revocation(&gateway, &other).ok(), Some(false));
    assert!(store.revocation(&gateway).unwrap().revoked.is_empty());
}

#[test]
fn a_list_under_a_newer_root_outranks_every_number_of_an_older_one() {
    let mut store = store_with_roots(2);
    let gateway = product("gateway");
    let thief = sign_revocation(&revocation(1 << 52, &[]), &[11]);
    assert_eq!(store.apply_revocation(&gateway, &thief).ok(), Some(true));
    let mut list = revocation(1, &[]);
    list.root_version = 2;
    let owner = sign_revocation(&list, &[11]);
    assert_eq!(store.apply_revocation(&gateway, &owner).ok(), Some(true));
    assert_eq!(store.revocation_version(&gateway).to_string(), "2.1");
}

#[test]
fn a_list_that_names_a_root_to_come_is_refused() {
    let mut store = store_with_roots(1);
    let mut list = revocation(1, &[]);
    list.root_version = 2;
    let envelope = sign_revocation(&list, &[11]);
    let error = store.apply_revocation(&product("gateway"), &envelope);
    assert_eq!(error.expect_err("root 2").code(), "REVOCATION_ROOT");
    assert!(store.revocation_version(&product("gateway")).is_none());
}

#[test]
fn a_counter_above_the_roots_bound_cannot_lock_devices_out() {
    let mut store = store_with_roots(1);
    let mut list = revocation(1, &[]);
    list.min_security_counter = MAX_COUNTER;
    let envelope = sign_revocation(&list, &[11]);
    let gateway = product("gateway");
    assert_eq!(store.apply_revocation(&gateway, &envelope).ok(), Some(true));
    list.version = 2;
    list.min_security_counter = MAX_COUNTER + 1;
    let error = store.apply_revocation(&gateway, &sign_revocation(&list, &[11]));
    assert_eq!(error.expect_err("over the bound").code(), "COUNTER");
}

#[test]
fn only_the_products_own_release_keys_sign_its_list() {
    let mut store = store_with_roots(1);
    let list = revocation(1, &[]);
    for signers in [&[][..], &[1, 2, 3], &[13], &[9]] {
        let envelope = sign_revocation(&list, signers);
        let error = store.apply_revocation(&product("gateway"), &envelope);
        assert_eq!(error.expect_err("not a release key").code(), "SIGNATURES");
    }
    let envelope = sign_revocation(&list, &[11]);
    let error = store.apply_revocation(&product("sensor"), &envelope);
    assert_eq!(error.expect_err("for gateway").code(), "PRODUCT");
    let error = store.apply_revocation(&product("toaster"), &envelope);
    assert_eq!(error.expect_err("not listed").code(), "PRODUCT");
}

#[test]
fn lists_of_products_are_held_apart() {
    let mut store = store_with_roots(1);
    let mut sensor = revocation(9, &[]);
    sensor.product = product("sensor");
    let envelopes = [
        (
            product("gateway"),
            sign_revocation(&revocation(1, &[]), &[11]),
        ),
        (product("sensor"), sign_revocation(&sensor, &[12])),
    ];
    for (product, envelope) in &envelopes {
        store.apply_revocation(product, envelope).expect("signed");
        let held = store.revocation(product).expect("held");
        assert_eq!(held.envelope(), envelope);
    }
    assert_eq!(store.revocation_version(&product("gateway")).version, 1);
    assert_eq!(store.revocation_version(&product("sensor")).version, 9);
}

/// A store with this many roots, which differ in their version only.
fn store_with_roots(roots: u64) -> TrustStore {
    let mut store = TrustStore::new(held(), clock());
    for version in 2..=roots {
        let mut next = root();
        next.version = version;
        store
            .apply_roots(&[sign_root(&next, &[1, 2])])
            .expect("the next");
    }
    store
}
