//! What makes a signed payload a document, or not.

use fwpush_keys::limits::{JSON_INTEGER, RELEASE_PAE_BYTES, WINDOW_LOG};
use fwpush_keys::{DocumentError, Encoding, TrustError, error_text};
use serde_json::json as value;

use super::*;

#[test]
fn documents_are_written_the_same_way_each_time_and_read_back() {
    let payload = root().to_payload().expect("valid");
    assert_eq!(Root::from_payload(&payload).expect("our own"), root());
    assert_eq!(root().to_payload().expect("valid"), payload);
    let payload = release().to_payload().expect("valid");
    assert_eq!(Release::from_payload(&payload).expect("our own"), release());
    let list = revocation(3, &[release().release_id]);
    let payload = list.to_payload().expect("valid");
    assert_eq!(Revocation::from_payload(&payload).expect("our own"), list);
}

#[test]
fn roots_that_contradict_themselves_are_refused() {
    let id = |n: u8| value!(key(n).public().key_id());
    let spoilers: Vec<Spoiler> = vec![
        ("version 0", |r| r["version"] = value!(0)),
        ("expires before issued", |r| {
            r["expires"] = r["issued"].clone()
        }),
        ("threshold 0", |r| {
            r["roles"]["root"]["threshold"] = value!(0)
        }),
        ("negative threshold", |r| {
            r["roles"]["root"]["threshold"] = value!(-1)
        }),
        ("threshold above n", |r| {
            r["roles"]["root"]["threshold"] = value!(4)
        }),
        ("threshold of a product above n", |r| {
            r["products"]["special"]["threshold"] = value!(2)
        }),
        ("threshold 0 of a product", |r| {
            r["products"]["special"]["threshold"] = value!(0)
        }),
        ("threshold without keys", |r| {
            r["products"]["gateway"]["threshold"] = value!(1)
        }),
        ("keys without threshold", |r| {
            r["products"]["special"]
                .as_object_mut()
                .unwrap()
                .remove("threshold");
        }),
        ("no keys", |r| r["roles"]["release"]["keyids"] = value!([])),
        ("a product's empty keys", |r| {
            r["products"]["special"]["keyids"] = value!([])
        }),
        ("no release role", |r| {
            r["roles"].as_object_mut().unwrap().remove("release");
        }),
        ("max_counter above 2^53 - 1", |r| {
            r["products"]["gateway"]["max_counter"] = value!(JSON_INTEGER + 1)
        }),
        ("a product's name", |r| {
            r["products"]["../x"] = value!({"max_counter": 1})
        }),
        ("another algorithm", |r| {
            each_key(r, |k| k["algorithm"] = value!("rsa"))
        }),
        ("a weak key", |r| {
            each_key(r, |k| k["public"] = value!("00".repeat(32)))
        }),
        ("an upper-case key", |r| {
            each_key(r, |k| {
                k["public"] = value!(k["public"].as_str().unwrap().to_uppercase())
            })
        }),
        ("a time with an offset", |r| {
            r["issued"] = value!("2026-01-01T00:00:00+00:00")
        }),
    ];
    for (what, spoil) in spoilers {
        refuse_root(what, spoil);
    }
    refuse_root("a key listed twice", |r| {
        r["roles"]["root"]["keyids"] = value!([id(1), id(1), id(2)]);
    });
    refuse_root("a key that is not there", |r| {
        r["roles"]["root"]["keyids"] = value!([id(1), id(2), id(9)]);
    });
    refuse_root("a key with two roles", |r| {
        r["roles"]["release"]["keyids"] = value!([id(1), id(11)]);
    });
    refuse_root("a root key for a product", |r| {
        r["products"]["special"]["keyids"] = value!([id(3)]);
    });
    refuse_root("a release key for freshness", |r| {
        r["roles"]["freshness"] = value!({"keyids": [id(11)], "threshold": 1});
    });
    refuse_root("a product's key for freshness", |r| {
        r["roles"]["freshness"] = value!({"keyids": [id(13)], "threshold": 1});
    });
    refuse_root("two ids for one key", |r| {
        let again = r["keys"][key(1).public().key_id().to_string()].clone();
        r["keys"][key(9).public().key_id().to_string()] = again;
    });
    refuse_root("17 keys in a role", |r| {
        let many: Vec<Value> = (20..37).map(id).collect();
        for n in 20..37 {
            let public = value!({"algorithm": "ed25519", "public": key(n).public()});
            r["keys"][key(n).public().key_id().to_string()] = public;
        }
        r["roles"]["release"] = value!({"keyids": many, "threshold": 1});
    });
}

#[test]
fn keys_and_products_that_are_there_twice_are_refused() {
    let payload = String::from_utf8(root().to_payload().expect("valid")).unwrap();
    let id = key(1).public().key_id();
    let public = key(1).public();
    let entry = format!(r#""{id}":{{"algorithm":"ed25519","public":"{public}"}},"#);
    assert!(payload.contains(&format!(r#""{id}":{{"#)), "{payload}");
    for (what, twice) in [
        (
            "key",
            payload.replace(r#""keys":{"#, &format!(r#""keys":{{{entry}{entry}"#)),
        ),
        (
            "product",
            payload.replace(
                r#""products":{"#,
                r#""products":{"gateway":{"max_counter":9},"#,
            ),
        ),
        (
            "escaped product",
            payload.replace(
                r#""products":{"#,
                r#""products":{"g\u0061teway":{"max_counter":9},"#,
            ),
        ),
        (
            "threshold",
            payload.replace(r#""threshold":2"#, r#""threshold":2,"threshold":1"#),
        ),
    ] {
        assert_ne!(twice, payload, "{what}");
        let error = Root::from_payload(twice.as_bytes()).expect_err(what);
        assert!(error_text(&error).contains("is there twice"), "{error:?}");
    }
}

#[test]
fn one_key_may_sign_for_several_products_and_as_a_general_release_key() {
    let mut root = root();
    let own = RoleKeys::new(1, &keys([11]));
    let rule = root.products.get_mut(&product("sensor")).unwrap();
    rule.keyids = Some(own.keyids);
    rule.threshold = Some(1);
    root.to_payload().expect("the same role each time");
}

#[test]
fn releases_that_no_device_could_install_safely_are_refused() {
    let spoilers: Vec<Spoiler> = vec![
        ("v1", |r| r["version"] = value!("v1")),
        ("01.0.0", |r| r["version"] = value!("01.0.0")),
        ("a version of 129 bytes", |r| {
            r["version"] = value!(format!("1.0.0-{}", "a".repeat(123)))
        }),
        ("no hardware", |r| r["hw"] = value!([])),
        ("inverted revisions", |r| r["hw"][0]["rev_min"] = value!(4)),
        ("a negative revision", |r| {
            r["hw"][0]["rev_min"] = value!(-1)
        }),
        ("65 ranges", |r| {
            r["hw"] = value!(vec![r["hw"][0].clone(); 65])
        }),
        ("a hardware id", |r| r["hw"][0]["id"] = value!("board a")),
        ("a product", |r| r["product"] = value!("..")),
        ("a channel", |r| r["channel"] = value!("a/b")),
        ("a release id of version 4", |r| {
            r["release_id"] = value!("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
        }),
        ("expires with issued", |r| {
            r["expires"] = r["issued"].clone()
        }),
        ("a time without Z", |r| {
            r["issued"] = value!("2026-01-01T00:00:00")
        }),
        ("a counter above 2^53 - 1", |r| {
            r["security_counter"] = value!(JSON_INTEGER + 1)
        }),
        ("a negative counter", |r| r["security_counter"] = value!(-1)),
        ("a counter that is not whole", |r| {
            r["security_counter"] = value!(1.5)
        }),
        ("a counter in a text", |r| {
            r["security_counter"] = value!("1")
        }),
        ("no counter", |r| {
            r.as_object_mut().unwrap().remove("security_counter");
        }),
        ("from_min above from_max", |r| {
            r["requires"] = value!({"from_min": "2.0.0", "from_max": "1.0.0"})
        }),
        ("no such from_min", |r| {
            r["requires"] = value!({"from_min": "1"})
        }),
        ("a class with a line break", |r| {
            r["class"] = value!("security\n")
        }),
        ("an address that runs something", |r| {
            r["advisory_url"] = value!("javascript:alert(1)")
        }),
        ("an address with an escape", |r| {
            r["advisory_url"] = value!("https://a/\u{1b}[2J")
        }),
        ("an address with a space", |r| {
            r["advisory_url"] = value!("https://a/b c")
        }),
        ("a long address", |r| {
            r["advisory_url"] = value!(format!("https://{}", "a".repeat(1017)))
        }),
        ("no components", |r| r["components"] = value!([])),
        ("a size of 0", |r| r["components"][0]["size"] = value!(0)),
        ("an upper-case hash", |r| {
            r["components"][0]["blake3"] = value!("A".repeat(64))
        }),
        ("a short sha256", |r| {
            r["components"][0]["sha256"] = value!("a".repeat(63))
        }),
        ("a slot's name", |r| {
            r["components"][0]["slot"] = value!("../boot")
        }),
        ("no encodings", |r| {
            r["components"][0]["encodings"] = value!([])
        }),
        ("no plain", |r| {
            r["components"][0]["encodings"][0]["codec"] = value!("other")
        }),
        ("two plain", |r| encode(r, "plain", None)),
        ("9 encodings", |r| {
            (0..8).for_each(|_| encode(r, "other", None))
        }),
        ("plain of another size", |r| {
            r["components"][0]["encodings"][0]["size"] = value!(6)
        }),
        ("plain of another hash", |r| {
            r["components"][0]["encodings"][0]["blake3"] = value!("a".repeat(64))
        }),
        ("plain with a window", |r| {
            r["components"][0]["encodings"][0]["window_log"] = value!(20)
        }),
        ("zstd without a window", |r| encode(r, "zstd", None)),
        ("zstd with a window of 16 MiB", |r| {
            encode(r, "zstd", Some(WINDOW_LOG + 1))
        }),
        ("an unknown codec with a window of 16 MiB", |r| {
            encode(r, "other", Some(WINDOW_LOG + 1))
        }),
        ("an encoding of size 0", |r| {
            encode(r, "zstd", Some(20));
            r["components"][0]["encodings"][1]["size"] = value!(0);
        }),
        ("a codec's name", |r| encode(r, "a b", None)),
    ];
    for (what, spoil) in spoilers {
        let mut spoilt = json(release().to_payload().unwrap());
        spoil(&mut spoilt);
        let envelope = sign_raw(PayloadType::Release, spoilt.to_string(), &[11]);
        let error = held().verify_release(&product("gateway"), &envelope);
        assert_eq!(error.expect_err(what).code(), "DOCUMENT", "{what}");
    }
}

#[test]
fn more_than_one_component_is_refused_by_name() {
    let mut two = json(release().to_payload().unwrap());
    let mut second = two["components"][0].clone();
    second["name"] = value!("modem\u{1b}");
    two["components"].as_array_mut().unwrap().push(second);
    let error = Release::from_payload(two.to_string().as_bytes()).expect_err("two");
    let words = error_text(&error);
    assert!(
        words.contains(r#"there are 2 ("image", "modem\u{1b}")"#),
        "{words}"
    );
}

#[test]
fn newer_documents_are_read_as_far_as_they_allow_it() {
    let mut newer = json(release().to_payload().unwrap());
    newer["colour"] = value!({"of": ["the", "bike", "shed"]});
    newer["components"][0]["deltas"] = value!([{"from": "x"}]);
    encode(&mut newer, "brotli", None);
    let read = Release::from_payload(newer.to_string().as_bytes()).expect("unknown fields");
    assert_eq!(read.plain().codec, Encoding::PLAIN);
    newer["crit"] = value!(["hw", "components"]);
    Release::from_payload(newer.to_string().as_bytes()).expect("fields that are known");
    newer["crit"] = value!(["hw", "colour"]);
    let error = Release::from_payload(newer.to_string().as_bytes()).expect_err("a demand");
    assert!(
        matches!(&error, DocumentError::Critical(name) if name == "colour"),
        "{error:?}"
    );
    // What cannot be understood at all is refused for that reason, not for its shape.
    let strange = br#"{"crit":["everything"],"product":[1]}"#;
    for error in [
        Release::from_payload(strange).map(drop),
        Root::from_payload(strange).map(drop),
        Revocation::from_payload(strange).map(drop),
    ] {
        assert!(
            matches!(error, Err(DocumentError::Critical(_))),
            "{error:?}"
        );
    }
    Release::from_payload(br#"{"crit":"hw"}"#).expect_err("not a list");
}

#[test]
fn sizes_above_two_and_four_gibibytes_are_kept_exactly() {
    // CVE-2026-34155: a size was cut to 32 bits between check and use.
    for size in [(1 << 31) - 1, 1 << 31, (1 << 32) + 5, JSON_INTEGER] {
        let mut large = release();
        large.components[0].size = size;
        large.components[0].encodings[0].size = size;
        let payload = large.to_payload().expect("valid");
        let read = Release::from_payload(&payload).expect("our own");
        assert_eq!((read.image().size, read.plain().size), (size, size));
    }
    let mut beyond = release();
    beyond.components[0].size = JSON_INTEGER + 1;
    beyond.components[0].encodings[0].size = JSON_INTEGER + 1;
    beyond.to_payload().expect_err("not exact in JSON");
}

#[test]
fn what_is_signed_of_a_release_has_at_most_4096_bytes() {
    let of_length = |more: usize| {
        let mut release = release();
        release.hw = vec![release.hw[0].clone(); 60];
        release.advisory_url = Some(format!("https://{}", "a".repeat(more)));
        release
    };
    let base = of_length(0).to_envelope().expect("short").pae().len();
    let room = RELEASE_PAE_BYTES - base;
    assert!(
        room > 0 && base > 1200,
        "the length of the payload keeps its 4 digits"
    );
    let fits = of_length(room);
    assert_eq!(fits.to_envelope().expect("fits").pae().len(), 4096);
    held()
        .verify_release(&product("gateway"), &sign_release(&fits, &[11]))
        .expect("4,096 bytes");
    let error = of_length(room + 1).to_envelope().expect_err("one more");
    assert!(matches!(
        error,
        DocumentError::TooLong {
            got: 4097,
            limit: 4096
        }
    ));
    // From somebody who signs it all the same.
    let longer = serde_json::to_vec(&of_length(room + 1)).unwrap();
    let envelope = sign_raw(PayloadType::Release, longer, &[11]);
    let error = held().verify_release(&product("gateway"), &envelope);
    assert_eq!(error.expect_err("4,097 bytes").code(), "DOCUMENT");
}

#[test]
fn lists_that_contradict_themselves_are_refused() {
    let spoilers: Vec<Spoiler> = vec![
        ("version 0", |l| l["version"] = value!(0)),
        ("root version 0", |l| l["root_version"] = value!(0)),
        ("expires with issued", |l| {
            l["expires"] = l["issued"].clone()
        }),
        ("a release twice", |l| {
            l["revoked"] = value!([l["revoked"][0], l["revoked"][0]])
        }),
        ("a reason of 257 bytes", |l| {
            l["revoked"][0]["reason"] = value!("x".repeat(257))
        }),
        ("a reason with an escape", |l| {
            l["revoked"][0]["reason"] = value!("\u{1b}[2J")
        }),
        ("a counter above 2^53 - 1", |l| {
            l["min_security_counter"] = value!(JSON_INTEGER + 1)
        }),
        ("no list", |l| {
            l.as_object_mut().unwrap().remove("revoked");
        }),
    ];
    let model = revocation(1, &[release().release_id]);
    for (what, spoil) in spoilers {
        let mut spoilt = json(model.to_payload().unwrap());
        spoil(&mut spoilt);
        Revocation::from_payload(spoilt.to_string().as_bytes()).expect_err(what);
    }
}

#[test]
fn a_document_too_large_for_an_envelope_is_refused_before_it_is_signed() {
    let ids: Vec<ReleaseId> = (0..1000_u64)
        .map(|n| ReleaseId::from_parts(Timestamp::from_ms(n as i64), [0; 10]))
        .collect();
    let error = revocation(1, &ids)
        .to_envelope()
        .expect_err("1,000 entries");
    assert!(matches!(error, DocumentError::TooLong { .. }), "{error:?}");
    let list = revocation(1, &ids[..500]);
    let signed = sign_revocation(&list, &[11]);
    held()
        .verify_revocation(&product("gateway"), &signed)
        .expect("500 entries");
}

#[test]
fn a_release_names_each_of_its_files_once() {
    let mut release = release();
    let other = FileId::of(b"compressed");
    for blake3 in [other, other, FileId::of(b"image")] {
        release.components[0].encodings.push(Encoding {
            codec: Encoding::ZSTD.to_owned(),
            window_log: Some(20),
            size: 4,
            blake3,
        });
    }
    release.to_payload().expect("valid");
    let mut files = vec![FileId::of(b"image"), other];
    files.sort();
    assert_eq!(release.file_ids().collect::<Vec<_>>(), files);
}

#[test]
fn errors_say_what_is_wrong_down_to_the_field() {
    let mut spoilt = json(release().to_payload().unwrap());
    spoilt["hw"] = value!([]);
    let envelope = sign_raw(PayloadType::Release, spoilt.to_string(), &[11]);
    let error = held().verify_release(&product("gateway"), &envelope);
    let error = error.expect_err("no hardware");
    assert!(matches!(error, TrustError::Document { .. }));
    assert_eq!(error_text(&error), "release is not valid: hw: is empty");
}

type Spoiler = (&'static str, fn(&mut Value));

fn refuse_root(what: &str, spoil: impl FnOnce(&mut Value)) {
    let mut spoilt = json(root().to_payload().unwrap());
    spoil(&mut spoilt);
    let payload = spoilt.to_string();
    Root::from_payload(payload.as_bytes()).expect_err(what);
    let envelope = sign_raw(PayloadType::Root, payload, &[1, 2, 3]);
    let error = Verified::bootstrap(&envelope).expect_err(what);
    assert_eq!(error.code(), "DOCUMENT", "{what}");
}

fn each_key(root: &mut Value, change: fn(&mut Value)) {
    let keys = root["keys"].as_object_mut().unwrap();
    keys.values_mut().for_each(change);
}

fn encode(release: &mut Value, codec: &str, window_log: Option<u8>) {
    let mut encoding = release["components"][0]["encodings"][0].clone();
    encoding["codec"] = value!(codec);
    if let Some(log) = window_log {
        encoding["window_log"] = value!(log);
    }
    let encodings = release["components"][0]["encodings"].as_array_mut();
    encodings.unwrap().push(encoding);
}
