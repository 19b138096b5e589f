use fwpush_keys::{TrustError, TrustStore, error_text};

use super::*;

#[test]
fn the_first_root_is_taken_when_its_own_keys_reach_the_threshold() {
    for signers in [&[1, 2][..], &[3, 1], &[1, 2, 3]] {
        let envelope = sign_root(&root(), signers);
        let taken = Verified::bootstrap(&envelope).expect("2 of 3");
        assert_eq!(*taken, root());
        assert_eq!(taken.envelope(), envelope);
    }
}

#[test]
fn a_first_root_with_too_few_signatures_says_how_many_are_missing() {
    for (signers, have) in [(&[][..], 0), (&[1], 1), (&[11, 12, 13, 1], 1), (&[4, 5], 0)] {
        let error = Verified::bootstrap(&sign_root(&root(), signers)).expect_err("too few");
        assert_eq!(error.code(), "SIGNATURES");
        let words = format!("{have} of 2 needed signatures by root keys of root version 1");
        assert_eq!(error.to_string(), words);
    }
}

#[test]
fn the_next_root_is_taken_and_nothing_else() {
    let held = held();
    let next = next_of(&held);
    let taken = held.advance(&sign_root(&next, &[1, 2])).expect("2 of 3");
    assert_eq!(taken.version, 2);
    for version in [1, 3, 4, 1 << 40] {
        let mut other = next.clone();
        other.version = version;
        let error = held.advance(&sign_root(&other, &[1, 2, 3]));
        let error = error.expect_err("not the next");
        assert_eq!(error.code(), "ROOT_VERSION", "{version}");
    }
}

#[test]
fn new_root_keys_need_the_old_and_the_new_threshold() {
    let held = held();
    let mut next = next_of(&held);
    next.roles.root = RoleKeys::new(2, &keys([3, 4, 5]));
    next.add_key(key(4).public());
    next.add_key(key(5).public());
    next.drop_unused_keys();
    // One side's signatures only: the old side, the new side, and key 3 that is on both.
    for (signers, missing) in [
        (
            &[1, 2][..],
            "0 of 2 needed signatures by root keys of root version 2",
        ),
        (
            &[4, 5],
            "0 of 2 needed signatures by root keys of root version 1",
        ),
        (
            &[1, 3],
            "1 of 2 needed signatures by root keys of root version 2",
        ),
        (
            &[3, 4],
            "1 of 2 needed signatures by root keys of root version 1",
        ),
        (
            &[3],
            "1 of 2 needed signatures by root keys of root version 1",
        ),
    ] {
        let error = held.advance(&sign_root(&next, signers));
        assert_eq!(error.expect_err("one side only").to_string(), missing);
    }
    for signers in [&[1, 2, 4, 5][..], &[1, 3, 5]] {
        held.advance(&sign_root(&next, signers)).expect("both");
    }
}

#[test]
fn a_raised_threshold_holds_from_the_root_that_raises_it() {
    let held = held();
    let mut next = next_of(&held);
    next.roles.root.threshold = 3;
    let error = held
        .advance(&sign_root(&next, &[1, 2]))
        .expect_err("2 of 3");
    assert!(error.to_string().starts_with("2 of 3 needed"), "{error}");
    held.advance(&sign_root(&next, &[1, 2, 3])).expect("3 of 3");
}

#[test]
fn one_signature_many_times_is_one_signature() {
    let mut envelope = json(sign_root(&root(), &[1]));
    let signature = envelope["signatures"][0].clone();
    let mut renamed = signature.clone();
    renamed["keyid"] = key(2).public().key_id().to_string().into();
    envelope["signatures"] = vec![signature.clone(), signature, renamed].into();
    let error = Verified::bootstrap(envelope.to_string().as_bytes()).expect_err("one key");
    assert!(error.to_string().starts_with("1 of 2 needed"), "{error}");
}

#[test]
fn a_refused_root_changes_nothing() {
    // CVE-2025-2885 and its kin: a root was persisted before it was found to be wrong.
    let mut store = TrustStore::new(held(), clock());
    let before = format!("{store:?}");
    let mut later = next_of(&held());
    later.issued = ISSUED.saturating_add(DAY * 100);
    let mut skips = later.clone();
    skips.version = 3;
    for refused in [
        sign_root(&later, &[1]),
        sign_root(&skips, &[1, 2]),
        sign_raw(PayloadType::Root, "{}", &[1, 2, 3]),
        sign_release(&release(), &[11]),
        b"garbage".to_vec(),
    ] {
        store.apply_roots(&[refused]).expect_err("refused");
        assert_eq!(format!("{store:?}"), before);
        assert!(store.take_accepted().is_empty());
    }
    assert_eq!(
        store.apply_roots(&[sign_root(&later, &[1, 2])]).ok(),
        Some(1)
    );
    assert_eq!(store.clock().bound(), later.issued);
}

#[test]
fn roots_before_a_refused_one_stay_and_those_after_it_do_not() {
    let chain = chain(4);
    let mut store = TrustStore::new(held(), clock());
    let mut broken = chain.clone();
    broken[1] = sign_raw(PayloadType::Root, "{}", &[1, 2]);
    store.apply_roots(&broken).expect_err("the second is wrong");
    assert_eq!(store.root().version, 2);
    let accepted: Vec<u64> = store.take_accepted().iter().map(|r| r.version).collect();
    assert_eq!(accepted, [2]);
    // Sent again as a whole: what is held is skipped.
    assert_eq!(store.apply_roots(&chain).ok(), Some(3));
    let accepted = store.take_accepted();
    let envelopes: Vec<&[u8]> = accepted.iter().map(|root| root.envelope()).collect();
    assert_eq!(
        envelopes,
        chain[1..].iter().map(Vec::as_slice).collect::<Vec<_>>()
    );
    assert!(store.take_accepted().is_empty());
}

#[test]
fn an_old_root_sent_again_is_skipped_and_never_goes_back() {
    let mut store = TrustStore::new(held(), clock());
    store.apply_roots(&chain(2)).expect("two hops");
    let before = store.root().clone();
    // Another version 2, signed as well as the first: too late.
    let mut other = root();
    other.version = 2;
    other.products.clear();
    let again = sign_root(&other, &[1, 2, 3]);
    assert_eq!(store.apply_roots(&[again]).ok(), Some(0));
    assert_eq!(*store.root(), before);
}

#[test]
fn a_thousand_hops_are_taken_sixteen_at_a_time() {
    let chain = chain(1025);
    let mut store = TrustStore::new(held(), clock());
    let error = store.apply_roots(&chain[..17]).expect_err("17 at once");
    assert!(matches!(error, TrustError::TooManyRoots(17)));
    assert_eq!(store.root().version, 1);
    for sixteen in chain.chunks(16) {
        store.apply_roots(sixteen).expect("consecutive");
        assert_eq!(store.take_accepted().len(), sixteen.len());
    }
    assert_eq!(store.root().version, 1026);
    // What the server sends to a device that holds version 5.
    let next: Vec<u64> = store.roots_after(5).iter().map(|r| r.version).collect();
    assert_eq!(next, (6..=21).collect::<Vec<u64>>());
    assert_eq!(store.roots_after(1025).len(), 1);
    assert_eq!(store.roots_after(u64::MAX).len(), 0);
}

#[test]
fn expiry_is_judged_on_the_last_root_only() {
    let held = held();
    let long_after = ISSUED.saturating_add(DAY * 3650);
    assert_eq!(
        held.check_expiry(held.expires).expect_err("over").code(),
        "ROOT_EXPIRED"
    );
    // An expired root still says who signs the next.
    let next = held.next(long_after, long_after.saturating_add(DAY));
    let next = held.advance(&sign_root(&next, &[1, 2])).expect("the next");
    next.check_expiry(long_after).expect("not over yet");
}

#[test]
fn replaced_release_keys_sign_nothing_any_more() {
    let held = held();
    let old = sign_release(&release(), &[11]);
    held.verify_release(&product("gateway"), &old).expect("now");
    let mut next = next_of(&held);
    next.roles.release = RoleKeys::new(1, &keys([14]));
    next.add_key(key(14).public());
    next.drop_unused_keys();
    let next = held.advance(&sign_root(&next, &[1, 2])).expect("the next");
    let error = next.verify_release(&product("gateway"), &old);
    assert_eq!(error.expect_err("replaced").code(), "SIGNATURES");
    let new = sign_release(&release(), &[14]);
    next.verify_release(&product("gateway"), &new).expect("new");
}

#[test]
fn what_was_persisted_is_restored_and_verified_again() {
    let chain = chain(3);
    let list = sign_revocation(&revocation(1, &[]), &[11]);
    let lists = [(product("gateway"), list)];
    let mut store = TrustStore::restore(held(), clock(), &chain, &lists).expect("our own");
    assert_eq!(store.root().version, 4);
    assert!(store.take_accepted().is_empty(), "all of it is on disk");
    assert_eq!(store.revocation(&product("gateway")).unwrap().version, 1);
    // A newer image brings a newer first root: what it makes superfluous is skipped.
    let newer = store.roots()[2].clone();
    let store = TrustStore::restore(newer, clock(), &chain, &[]).expect("from version 3");
    assert_eq!(store.root().version, 4);
    assert_eq!(store.roots().len(), 2);
    // A gap is named.
    let error = TrustStore::restore(held(), clock(), &chain[1..], &[]).expect_err("no 2");
    assert_eq!(error.code(), "ROOT_VERSION");
    let error = TrustStore::restore(held(), clock(), &[b"torn".to_vec()], &[]);
    assert_eq!(error.expect_err("torn").code(), "ENVELOPE_MALFORMED");
}

#[test]
fn a_list_accepted_under_replaced_keys_is_restored() {
    let list = sign_revocation(&revocation(1, &[]), &[11]);
    let mut next = next_of(&held());
    next.roles.release = RoleKeys::new(1, &keys([14]));
    next.add_key(key(14).public());
    next.drop_unused_keys();
    let next = sign_root(&next, &[1, 2]);
    let lists = [(product("gateway"), list.clone())];
    let mut store =
        TrustStore::restore(held(), clock(), std::slice::from_ref(&next), &lists).expect("held");
    assert_eq!(store.revocation(&product("gateway")).unwrap().version, 1);
    // From the wire it would not be taken any more.
    let error = store.apply_revocation(&product("gateway"), &list);
    assert_eq!(error.expect_err("replaced").code(), "SIGNATURES");
    let forged = sign_revocation(&revocation(2, &[]), &[15]);
    let lists = [(product("gateway"), forged)];
    let error = TrustStore::restore(held(), clock(), &[next], &lists).expect_err("nobody's key");
    let words = "0 of 1 needed signatures by release keys for product gateway of root version 2";
    assert_eq!(error_text(&error), words);
}

#[test]
fn the_clock_rises_with_what_is_accepted() {
    let mut store = TrustStore::new(held(), clock());
    assert_eq!(store.clock().bound(), ISSUED);
    let mut late = release();
    late.issued = ISSUED.saturating_add(DAY * 2);
    store
        .accept_release(&product("gateway"), &sign_release(&late, &[4]))
        .expect_err("nobody's key");
    assert_eq!(store.clock().bound(), ISSUED);
    store
        .accept_release(&product("gateway"), &sign_release(&late, &[11]))
        .expect("signed");
    assert_eq!(store.clock().bound(), late.issued);
    assert_eq!(store.judge(Timestamp::EPOCH), late.issued);
}

fn next_of(root: &Root) -> Root {
    root.next(root.issued, root.expires)
}

/// The envelopes of `hops` roots after the first.
fn chain(hops: u64) -> Vec<Vec<u8>> {
    (2..hops + 2)
        .map(|version| {
            let mut next = root();
            next.version = version;
            sign_root(&next, &[1, 2])
        })
        .collect()
}
