use std::io::Write;
use std::process::{Command, Stdio};

use curve25519_dalek::constants::ED25519_BASEPOINT_POINT;
use curve25519_dalek::edwards::EdwardsPoint;
use curve25519_dalek::scalar::Scalar;
use sha2::Sha512;

use super::*;

/// The order of the base point, little-endian: 2^252 + 27742317777372353535851937790883648493.
const L: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

/// The points of order 1, 2, 4 and 8, in their canonical encodings.
const SMALL_ORDER: [&str; 8] = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
];

#[test]
fn keys_of_small_order_are_refused() {
    for key in SMALL_ORDER {
        assert_eq!(PublicKey::from_hex(key), Err(KeyError::Weak), "{key}");
    }
}

#[test]
fn a_second_spelling_of_a_key_is_refused() {
    // y + p for the y below 19 for which that still fits in 255 bits, each with both signs.
    for y in 0..19 {
        for sign in [0, 0x80] {
            let mut bytes = [0xff; 32];
            bytes[0] = 0xed + y;
            bytes[31] = 0x7f | sign;
            PublicKey::from_bytes(bytes).expect_err("not canonical");
        }
    }
    // The identity with the sign of an x that is 0.
    let mut bytes = [0; 32];
    bytes[0] = 1;
    bytes[31] = 0x80;
    PublicKey::from_bytes(bytes).expect_err("not canonical");
}

#[test]
fn bytes_that_are_no_point_are_refused() {
    // Half of all y have no x.
    let refused = (0..=255).filter(|b| PublicKey::from_bytes([*b; 32]).is_err());
    assert!(refused.count() > 80);
}

#[test]
fn a_signature_with_l_added_to_s_is_refused() {
    let key = SigningKey::generate();
    let mut signature = key.sign(b"message");
    assert!(key.public().verify(b"message", &signature));
    let mut carry = 0;
    for (byte, l) in signature[32..].iter_mut().zip(L) {
        let sum = u16::from(*byte) + u16::from(l) + carry;
        *byte = sum.to_le_bytes()[0];
        carry = sum >> 8;
    }
    assert_eq!(carry, 0);
    assert!(!key.public().verify(b"message", &signature));
}

#[test]
fn a_signature_with_an_r_of_small_order_is_refused() {
    let secret = Scalar::from_bytes_mod_order([7; 32]);
    let public = ED25519_BASEPOINT_POINT * secret;
    let key = PublicKey::from_bytes(public.compress().to_bytes()).expect("an ordinary key");
    for r in SMALL_ORDER {
        let r = parse_hex32(r).expect("hex");
        let s = challenge(&r, &key, b"message") * secret;
        let signature = [r, s.to_bytes()].concat().try_into().expect("64 bytes");
        assert!(!key.verify(b"message", &signature));
    }
}

#[test]
fn a_signature_that_holds_only_after_clearing_the_cofactor_is_refused() {
    // R of mixed order: verifiers that multiply by 8 accept it, others do not. Ours must not be of two minds.
    let secret = Scalar::from_bytes_mod_order([7; 32]);
    let public = ED25519_BASEPOINT_POINT * secret;
    let key = PublicKey::from_bytes(public.compress().to_bytes()).expect("an ordinary key");
    let torsion = parse_hex32(SMALL_ORDER[4]).expect("hex");
    let torsion = curve25519_dalek::edwards::CompressedEdwardsY(torsion)
        .decompress()
        .expect("a point");
    let nonce = Scalar::from_bytes_mod_order([9; 32]);
    let signature_with = |point: EdwardsPoint| -> [u8; 64] {
        let r = point.compress().to_bytes();
        let s = nonce + challenge(&r, &key, b"message") * secret;
        [r, s.to_bytes()].concat().try_into().expect("64 bytes")
    };
    let honest = signature_with(ED25519_BASEPOINT_POINT * nonce);
    assert!(key.verify(b"message", &honest));
    let mixed = signature_with(ED25519_BASEPOINT_POINT * nonce + torsion);
    assert!(!key.verify(b"message", &mixed));
}

#[test]
fn every_flipped_bit_of_a_signature_is_found() {
    let key = SigningKey::generate();
    let signature = key.sign(b"message");
    for bit in 0..512 {
        let mut flipped = signature;
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(!key.public().verify(b"message", &flipped), "bit {bit}");
    }
    assert!(!key.public().verify(b"massage", &signature));
}

#[test]
fn the_test_vector_of_rfc_8032_holds() {
    // Section 7.1, test 2.
    let secret =
        parse_hex32("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap();
    let key = SigningKey::from_secret(&secret);
    assert_eq!(
        key.public().to_hex(),
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    );
    assert_eq!(
        hex::encode(key.sign(&[0x72])),
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
         085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    );
}

#[test]
fn keys_survive_pem_and_hex() {
    let key = SigningKey::generate();
    let public = key.public();
    let read = SigningKey::from_pem(&key.to_pkcs8_v1_pem()).expect("our own file");
    assert_eq!(read.public(), public);
    assert_eq!(PublicKey::from_pem(&public.to_pem()), Ok(public));
    assert_eq!(PublicKey::from_hex(&public.to_hex()), Ok(public));
    assert_eq!(public.key_id().to_string().parse(), Ok(public.key_id()));
    assert_eq!(
        public.key_id().as_bytes(),
        &<[u8; 32]>::from(Sha256::digest(public.as_bytes()))
    );
}

#[test]
fn a_private_key_of_pkcs8_version_2_is_read() {
    use ed25519_dalek::pkcs8::EncodePrivateKey;
    let key = SigningKey::generate();
    let pem = key.0.to_pkcs8_pem(Default::default()).expect("encodes");
    let read = SigningKey::from_pem(&pem).expect("version 2");
    assert_eq!(read.public(), key.public());
}

#[test]
fn nothing_but_a_key_is_read_as_one() {
    let key = SigningKey::generate();
    let private = key.to_pkcs8_v1_pem();
    let public = key.public();
    for text in [
        "",
        "not PEM",
        &public.to_pem(),
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    ] {
        assert_eq!(SigningKey::from_pem(text).err(), Some(KeyError::PrivatePem));
    }
    assert_eq!(PublicKey::from_pem(&private), Err(KeyError::PublicPem));
    let upper = public.to_hex().to_uppercase();
    assert_eq!(PublicKey::from_hex(&upper), Err(KeyError::NotHex));
    assert_eq!(
        PublicKey::from_hex(&format!("{public} ")),
        Err(KeyError::NotHex)
    );
    let huge = "a".repeat(PEM_BYTES + 1);
    assert_eq!(
        SigningKey::from_pem(&huge).err(),
        Some(KeyError::TooLong(huge.len()))
    );
}

#[test]
fn a_private_key_is_not_shown() {
    let key = SigningKey::from_secret(&[0x5a; 32]);
    let shown = format!("{key:?}");
    assert!(!shown.contains("5a5a"), "{shown}");
    assert!(shown.contains(&key.public().to_hex()));
}

#[test]
fn openssl_reads_both_halves_of_a_key() {
    let key = SigningKey::generate();
    let Some(public) = openssl(&["pkey", "-pubout"], &key.to_pkcs8_v1_pem()) else {
        eprintln!("skipped: openssl is not installed");
        return;
    };
    assert_eq!(PublicKey::from_pem(&public), Ok(key.public()));
    let again = openssl(&["pkey", "-pubin", "-pubout"], &key.public().to_pem());
    assert_eq!(again, Some(public));
}

#[test]
fn a_key_that_openssl_made_is_read() {
    let Some(private) = openssl(&["genpkey", "-algorithm", "ed25519"], "") else {
        eprintln!("skipped: openssl is not installed");
        return;
    };
    let key = SigningKey::from_pem(&private).expect("a key of openssl");
    let public = openssl(&["pkey", "-pubout"], &private).expect("it ran before");
    assert_eq!(PublicKey::from_pem(&public), Ok(key.public()));
}

/// RFC 8032 section 5.1.7: the hash that binds a signature to key and message.
fn challenge(r: &[u8; 32], key: &PublicKey, message: &[u8]) -> Scalar {
    let hash = Sha512::new()
        .chain_update(r)
        .chain_update(key.as_bytes())
        .chain_update(message)
        .finalize();
    Scalar::from_bytes_mod_order_wide(&hash.into())
}

/// Runs openssl; `None` when it is not installed. Panics when it fails.
fn openssl(arguments: &[&str], input: &str) -> Option<String> {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut stdin = child.stdin.take().expect("piped");
    // It may have ended without reading anything.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "openssl {arguments:?} failed");
    Some(String::from_utf8(output.stdout).expect("PEM"))
}
