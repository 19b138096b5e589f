//! Whose signatures make a release one of a product.

use super::*;

#[test]
fn a_signed_release_is_verified_with_its_exact_envelope() {
    for signer in [11, 12] {
        let envelope = sign_release(&release(), &[signer]);
        let verified = held()
            .verify_release(&product("gateway"), &envelope)
            .expect("1 of 2");
        assert_eq!(*verified, release());
        assert_eq!(verified.envelope(), envelope);
    }
}

#[test]
fn keys_that_may_not_sign_releases_do_not_count() {
    // Nobody, the root's keys, a stranger, another product's own key.
    for signers in [&[][..], &[1, 2, 3], &[9], &[13]] {
        let envelope = sign_release(&release(), signers);
        let error = held().verify_release(&product("gateway"), &envelope);
        let error = error.expect_err("no release key");
        let words =
            "0 of 1 needed signatures by release keys for product gateway of root version 1";
        assert_eq!(error.to_string(), words);
    }
}

#[test]
fn a_threshold_counts_keys_and_not_signatures() {
    let mut strict = root();
    strict.roles.release.threshold = 2;
    let strict = Verified::bootstrap(&sign_root(&strict, &[1, 2])).expect("valid");
    let verify = |envelope: &[u8]| strict.verify_release(&product("gateway"), envelope);
    verify(&sign_release(&release(), &[11, 12])).expect("2 of 2");
    let mut twice = json(sign_release(&release(), &[11]));
    let signature = twice["signatures"][0].clone();
    twice["signatures"].as_array_mut().unwrap().push(signature);
    let error = verify(twice.to_string().as_bytes()).expect_err("one key");
    assert!(error.to_string().starts_with("1 of 2 needed"), "{error}");
}

#[test]
fn a_products_own_keys_replace_the_general_ones() {
    let special = product("special");
    let mut release = release();
    release.product = special.clone();
    let own = sign_release(&release, &[13]);
    held().verify_release(&special, &own).expect("its own key");
    let general = sign_release(&release, &[11, 12]);
    let error = held().verify_release(&special, &general);
    assert_eq!(error.expect_err("replaced").code(), "SIGNATURES");
}

#[test]
fn a_release_of_another_product_is_refused_whoever_signed_it() {
    let envelope = sign_release(&release(), &[11]);
    let error = held().verify_release(&product("sensor"), &envelope);
    let error = error.expect_err("for gateway");
    assert_eq!(error.code(), "PRODUCT");
    assert_eq!(error.to_string(), "is for product gateway, not sensor");
    // The keys are those of the verifier's product, not of the one that the payload names.
    let mut special = release();
    special.product = product("special");
    let error = held().verify_release(&product("gateway"), &sign_release(&special, &[13]));
    assert_eq!(error.expect_err("its keys").code(), "SIGNATURES");
}

#[test]
fn a_product_that_the_root_does_not_list_has_no_releases() {
    let mut unlisted = release();
    unlisted.product = product("toaster");
    let error = held().verify_release(&product("toaster"), &sign_release(&unlisted, &[11]));
    let error = error.expect_err("not listed");
    assert_eq!(error.code(), "PRODUCT");
    assert_eq!(
        error.to_string(),
        "product toaster is not in root version 1"
    );
}

#[test]
fn what_was_signed_for_development_is_nothing_in_production() {
    let mut development = root();
    development.roles.release = RoleKeys::new(1, &keys([21]));
    development.add_key(key(21).public());
    development.drop_unused_keys();
    let development = Verified::bootstrap(&sign_root(&development, &[1, 2])).expect("valid");
    let envelope = sign_release(&release(), &[21]);
    let gateway = product("gateway");
    development
        .verify_release(&gateway, &envelope)
        .expect("at home");
    let error = held().verify_release(&gateway, &envelope);
    assert_eq!(error.expect_err("elsewhere").code(), "SIGNATURES");
}

#[test]
fn documents_of_another_kind_are_refused_before_anything_in_them_is_read() {
    let gateway = product("gateway");
    let a_root = sign_root(&root(), &[1, 2, 3]);
    let a_release = sign_release(&release(), &[11]);
    let a_list = sign_revocation(&revocation(1, &[]), &[11]);
    let codes = [
        held().verify_release(&gateway, &a_root).map(drop),
        held().verify_release(&gateway, &a_list).map(drop),
        held().verify_revocation(&gateway, &a_release).map(drop),
        held().verify_revocation(&gateway, &a_root).map(drop),
        held().advance(&a_release).map(drop),
        Verified::bootstrap(&a_list).map(drop),
    ];
    for code in codes {
        assert_eq!(code.expect_err("another kind").code(), "PAYLOAD_TYPE");
    }
    // With the type rewritten, the signature does not hold any more.
    let mut renamed = json(a_list);
    renamed["payloadType"] = PayloadType::Release.as_str().into();
    let error = held().verify_release(&gateway, renamed.to_string().as_bytes());
    assert_eq!(error.expect_err("rewritten").code(), "SIGNATURES");
}

#[test]
fn a_payload_is_not_read_before_its_signatures_are_counted() {
    for payload in ["garbage", "{}", "{\"product\":1,\"product\":2}"] {
        let unsigned = sign_raw(PayloadType::Release, payload, &[]);
        let error = held().verify_release(&product("gateway"), &unsigned);
        assert_eq!(error.expect_err("unsigned").code(), "SIGNATURES");
        let signed = sign_raw(PayloadType::Release, payload, &[11]);
        let error = held().verify_release(&product("gateway"), &signed);
        assert_eq!(error.expect_err("no release").code(), "DOCUMENT");
    }
}

#[test]
fn a_security_counter_above_the_roots_bound_is_refused() {
    for (counter, fits) in [
        (0, true),
        (MAX_COUNTER, true),
        (MAX_COUNTER + 1, false),
        (MAX_COUNTER + 1_000_000_000, false),
    ] {
        let mut release = release();
        release.security_counter = counter;
        let envelope = sign_release(&release, &[11]);
        let verified = held().verify_release(&product("gateway"), &envelope);
        assert_eq!(verified.is_ok(), fits, "{counter}");
        if let Err(error) = verified {
            assert_eq!(error.code(), "COUNTER");
        }
    }
}

#[test]
fn no_flipped_bit_of_an_envelope_makes_another_release() {
    let envelope = sign_release(&release(), &[11]);
    let root = held();
    let mut harmless = 0;
    for bit in 0..envelope.len() * 8 {
        let mut flipped = envelope.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(verified) = root.verify_release(&product("gateway"), &flipped) {
            assert_eq!(*verified, release(), "bit {bit}");
            assert_eq!(verified.envelope(), flipped);
            harmless += 1;
        }
    }
    // Only in the key id, which is a hint: 64 characters and the name of the field.
    assert!(harmless <= 72 * 8, "{harmless}");
}

#[test]
fn signing_later_and_elsewhere_gives_the_same_release() {
    let unsigned = release().to_envelope().expect("valid").to_bytes();
    let mut parsed = Envelope::parse(&unsigned).expect("our own");
    let signature = key(11).sign(&parsed.pae());
    parsed
        .add_signature(key(11).public(), signature)
        .expect("over the same bytes");
    assert_eq!(parsed.to_bytes(), sign_release(&release(), &[11]));
}
