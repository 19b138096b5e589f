use proptest::prelude::*;

use super::*;
use crate::sign::KeyId;

#[test]
fn the_pae_is_that_of_the_specification() {
    // The example of the DSSE protocol document.
    assert_eq!(
        pae("http://example.com/HelloWorld", b"hello world"),
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    );
    // Lengths count bytes, not characters, and the payload is opaque.
    assert_eq!(pae("\u{e9}", b"\xff"), b"DSSEv1 2 \xc3\xa9 1 \xff");
    assert_eq!(pae("", b""), b"DSSEv1 0  0 ");
}

#[test]
fn types_and_payloads_cannot_be_shifted_into_each_other() {
    assert_ne!(pae("a", b"b c"), pae("a b", b"c"));
    assert_ne!(pae("a", b""), pae("", b"a"));
}

#[test]
fn an_envelope_survives_its_json() {
    let envelope = signed(&[key(1), key(2)]);
    let bytes = envelope.to_bytes();
    assert_eq!(Envelope::parse(&bytes).expect("our own"), envelope);
    assert_eq!(envelope.to_bytes(), bytes);
    let unsigned = Envelope::new(PayloadType::Root, b"{}".to_vec());
    let parsed = Envelope::parse(&unsigned.to_bytes()).expect("still to be signed");
    assert_eq!(parsed.signatures(), &[]);
}

#[test]
fn every_flipped_bit_is_found_or_changes_nothing() {
    let envelope = signed(&[key(1)]);
    let bytes = envelope.to_bytes();
    let mut verified_all_the_same = 0;
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let Ok(parsed) = Envelope::parse(&flipped) else {
            continue;
        };
        if parsed.signers(&[key(1).public()]).is_empty() {
            continue;
        }
        verified_all_the_same += 1;
        assert_eq!(parsed.payload(), envelope.payload(), "bit {bit}");
        assert_eq!(parsed.payload_type(), envelope.payload_type(), "bit {bit}");
    }
    // Flips in the key id, which is a hint, do not matter; and those that turn the name of the field into an unknown one.
    assert!(verified_all_the_same > 0);
}

#[test]
fn both_alphabets_and_missing_padding_are_read() {
    let payload = [0xfb, 0xff, 0xfe, 0x00];
    for text in ["+//+AA==", "-__-AA==", "+//+AA", "-__-AA"] {
        let parsed = Envelope::parse(envelope_json(text, "").as_bytes()).expect(text);
        assert_eq!(parsed.payload(), payload);
    }
    // Both alphabets in one text, bits that mean nothing, white space, other characters.
    for text in ["+/_-", "+//+AB==", "+//+ AA==", "=", "A", "%%%%"] {
        let error = Envelope::parse(envelope_json(text, "").as_bytes()).expect_err(text);
        assert_eq!(error.code(), "ENVELOPE_MALFORMED", "{text}");
    }
}

#[test]
fn a_key_counts_once_however_often_it_signed_or_is_listed() {
    let mut envelope = signed(&[key(1)]);
    let signature = envelope.signatures[0].clone();
    for keyid in [
        None,
        Some(key(2).public().key_id().to_string()),
        Some("x".to_owned()),
    ] {
        envelope.signatures.push(Signature {
            keyid,
            ..signature.clone()
        });
    }
    let twice = [key(1).public(), key(1).public(), key(2).public()];
    assert_eq!(envelope.signers(&twice), BTreeSet::from([key(1).public()]));
}

#[test]
fn a_key_id_is_a_hint_and_decides_nothing() {
    let keys = [key(1), key(2), key(3)];
    let mut envelope = signed(&keys);
    let wrong: Vec<Option<String>> = vec![
        Some(KeyId::to_string(&key(2).public().key_id())),
        None,
        Some(String::new()),
    ];
    for (signature, keyid) in envelope.signatures.iter_mut().zip(wrong) {
        signature.keyid = keyid;
    }
    let public = keys.map(|key| key.public());
    assert_eq!(envelope.signers(&public), BTreeSet::from(public));
}

#[test]
fn signatures_that_are_not_ours_never_count_and_do_no_harm() {
    let mut envelope = signed(&[key(1)]);
    for sig in [vec![], vec![0; 63], vec![0; 64], vec![0; 65], vec![0; 3309]] {
        envelope
            .signatures
            .insert(0, Signature { keyid: None, sig });
    }
    let parsed = Envelope::parse(&envelope.to_bytes()).expect("other kinds of signature");
    let public = [key(1).public(), key(2).public()];
    assert_eq!(parsed.signers(&public), BTreeSet::from([key(1).public()]));
}

#[test]
fn signing_again_replaces_and_foreign_signatures_are_verified_first() {
    let mut envelope = signed(&[key(1)]);
    // The older signature is recognised by what it is, not by its hint.
    envelope.signatures[0].keyid = None;
    envelope.sign(&key(1)).expect("replaces");
    assert_eq!(envelope.signatures().len(), 1);
    let before = envelope.clone();
    let elsewhere = key(2).sign(b"another message");
    let error = envelope
        .add_signature(key(2).public(), elsewhere)
        .expect_err("over something else");
    assert_eq!(error.code(), "SIGNATURES");
    assert_eq!(envelope, before);
    let right = key(2).sign(&envelope.pae());
    envelope
        .add_signature(key(2).public(), right)
        .expect("over this");
    assert_eq!(envelope.signatures().len(), 2);
}

#[test]
fn a_signature_holds_for_its_type_only() {
    let envelope = signed(&[key(1)]);
    let mut other = Envelope::new(PayloadType::Root, envelope.payload().to_vec());
    other.signatures = envelope.signatures.clone();
    assert!(other.signers(&[key(1).public()]).is_empty());
}

#[test]
fn sixteen_signatures_are_the_most() {
    let keys: Vec<SigningKey> = (1..=17).map(key).collect();
    let mut envelope = signed(&keys[..16]);
    let parsed = Envelope::parse(&envelope.to_bytes()).expect("16");
    let public: Vec<PublicKey> = keys.iter().map(SigningKey::public).collect();
    assert_eq!(parsed.signers(&public).len(), 16);
    let error = envelope.sign(&keys[16]).expect_err("17");
    assert_eq!(error.code(), "ENVELOPE_TOO_LARGE");
    assert_eq!(envelope.signatures().len(), 16);
    envelope.sign(&keys[3]).expect("replaces one of them");
    envelope.signatures.push(envelope.signatures[0].clone());
    Envelope::parse(&envelope.to_bytes()).expect_err("17 are not read either");
}

#[test]
fn an_envelope_of_64_kib_is_read_and_one_more_byte_is_not() {
    let json = envelope_json("e30=", "");
    let fits = format!("{json}{}", " ".repeat(ENVELOPE_BYTES - json.len()));
    Envelope::parse(fits.as_bytes()).expect("64 KiB");
    let error = Envelope::parse(format!("{fits} ").as_bytes()).expect_err("64 KiB + 1");
    assert_eq!(error.code(), "ENVELOPE_TOO_LARGE");
}

#[test]
fn the_largest_document_with_all_its_signatures_fits_an_envelope() {
    let payload = vec![b'x'; crate::limits::PAYLOAD_BYTES];
    let mut envelope = Envelope::new(PayloadType::Revocation, payload);
    for n in 1..=16 {
        envelope.sign(&key(n)).expect("at most 16");
    }
    Envelope::parse(&envelope.to_bytes()).expect("within the bound");
}

#[test]
fn what_is_not_strict_json_is_refused() {
    let good = envelope_json("e30=", "");
    Envelope::parse(good.as_bytes()).expect("the model");
    for (what, bad) in [
        ("empty", String::new()),
        ("byte order mark", format!("\u{feff}{good}")),
        ("trailing bytes", format!("{good}x")),
        ("a second document", format!("{good}{good}")),
        (
            "duplicate field",
            envelope_json("e30=", r#","payload":"e30=""#),
        ),
        (
            "duplicate, escaped",
            envelope_json("e30=", r#","pa\u0079load":"e30=""#),
        ),
        (
            "duplicate unknown field",
            envelope_json("e30=", r#","x":1,"x":1"#),
        ),
        (
            "a number above 2^53 - 1",
            envelope_json("e30=", r#","x":9007199254740992"#),
        ),
        ("1e400", envelope_json("e30=", r#","x":1e400"#)),
        ("1e2", envelope_json("e30=", r#","x":1e2"#)),
        ("depth 9", envelope_json("e30=", r#","x":[[[[[[[[]]]]]]]]"#)),
        ("cut short", good[..good.len() - 1].to_owned()),
        ("a list", format!("[{good}]")),
        (
            "a missing field",
            good.replace("payloadType", "payloadtype"),
        ),
        ("a payload that is no text", good.replace("\"e30=\"", "1")),
    ] {
        let error = Envelope::parse(bad.as_bytes()).expect_err(what);
        assert_eq!(error.code(), "ENVELOPE_MALFORMED", "{what}");
    }
    let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    Envelope::parse(deep.as_bytes()).expect_err("depth 30,000");
    // Unknown fields are somebody's newer version.
    Envelope::parse(envelope_json("e30=", r#","x":[[[[[[[]]]]]]],"y":null"#).as_bytes())
        .expect("depth 8 and unknown fields");
}

#[test]
fn bytes_that_are_not_utf_8_are_refused() {
    let good = envelope_json("e30=", r#","x":"?""#);
    let bad: Vec<u8> = good
        .bytes()
        .map(|b| if b == b'?' { 0xff } else { b })
        .collect();
    Envelope::parse(&bad).expect_err("0xff in a text");
}

#[test]
fn an_unknown_type_is_refused_and_shown_harmlessly() {
    let json = envelope_json("e30=", "").replace("fwpush.release", r"\u001b[2Jevil");
    let error = Envelope::parse(json.as_bytes()).expect_err("unknown type");
    assert_eq!(error.code(), "PAYLOAD_TYPE");
    assert!(!error.to_string().contains('\u{1b}'), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Envelope::parse(&bytes);
    }

    #[test]
    fn any_change_of_the_text_verifies_to_the_same_content_or_not_at_all(
        at in any::<prop::sample::Index>(), to in "[ -~]{0,3}", cut in 0usize..3,
    ) {
        let envelope = signed(&[key(1)]);
        let mut text = String::from_utf8(envelope.to_bytes()).expect("JSON");
        let at = at.index(text.len());
        let end = (at + cut).min(text.len());
        text.replace_range(at..end, &to);
        if let Ok(parsed) = Envelope::parse(text.as_bytes())
            && !parsed.signers(&[key(1).public()]).is_empty()
        {
            prop_assert_eq!(parsed.payload(), envelope.payload());
            prop_assert_eq!(parsed.payload_type(), envelope.payload_type());
        }
    }
}

/// The same key for the same number.
fn key(n: u8) -> SigningKey {
    SigningKey::from_secret(&[n; 32])
}

fn signed(keys: &[SigningKey]) -> Envelope {
    let mut envelope = Envelope::new(PayloadType::Release, br#"{"any":"payload"}"#.to_vec());
    for key in keys {
        envelope.sign(key).expect("at most 16");
    }
    envelope
}

fn envelope_json(payload: &str, more: &str) -> String {
    format!(
        r#"{{"payload":"{payload}","payloadType":"application/vnd.fwpush.release.v1+json","signatures":[]{more}}}"#
    )
}
