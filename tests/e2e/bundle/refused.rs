//! Bundles that are damaged, forged or meant for others: refused, with a reason, and a good one installs afterwards.

use std::{fs::File, os::unix::fs::FileExt as _};

use fwpush_keys::{FileId, ProductRule, RoleKeys, Root, SigningKey, bundle::MAGIC};
use fwpush_tests::offline::{HOUR, signed};

use super::*;

/// Documents by which a device may be deceived, and why it is not.
struct Attack {
    made: Made,
    code: &'static str,
}

type Forge = fn(&mut Bench, Release) -> Attack;

fn attack(made: Made, code: &'static str) -> Attack {
    Attack { made, code }
}

/// Plays an attack twice; then a proper bundle installs.
#[track_caller]
fn refuses(forge: Forge) {
    let mut bench = Bench::with_check(0);
    let proper = bench.good("proper.fwb", "1.1.0");
    let release = bench.release("1.2.0");
    let Attack { made, code } = forge(&mut bench, release);
    let path = bench.path("forged.fwb");
    made.write(&path);
    let storage = bench.device.storage();
    for _ in 0..2 {
        expect(&bench.device.install(&path), 1, "REJECTED", Some(code));
        assert!(bench.device.storage() == storage, "something was written");
        assert_eq!(bench.device.status()["phase"], "REJECTED");
    }
    bench.expect_running("1.0.0", "a", true);
    expect(&bench.device.install(&proper), 10, "REBOOTING", None);
    bench.device.expect_image("b", &bench.image);
}

macro_rules! refused {
    ($($name:ident => $forge:expr;)+) => {$(
        #[test]
        fn $name() {
            refuses($forge);
        }
    )+};
}

refused! {
    an_unsigned_release_is_refused => |bench, release| {
        let mut made = bench.made(&release);
        made.release = signed(release.to_envelope().unwrap(), &[]);
        attack(made, "SIGNATURES")
    };
    a_release_signed_by_a_stranger_is_refused => |bench, release| {
        let mut made = bench.made(&release);
        made.release = signed(release.to_envelope().unwrap(), &[SigningKey::generate()]);
        attack(made, "SIGNATURES")
    };
    a_release_of_another_product_is_refused => |bench, mut release| {
        release.product = "meter".parse().unwrap();
        attack(bench.made(&release), "PRODUCT")
    };
    a_release_of_another_channel_is_refused => |bench, mut release| {
        release.channel = "dev".parse().unwrap();
        attack(bench.made(&release), "CHANNEL")
    };
    a_release_for_other_hardware_is_refused => |bench, mut release| {
        release.hw[0].id = "board-b".parse().unwrap();
        attack(bench.made(&release), "HARDWARE")
    };
    a_release_below_the_floor_is_refused => |bench, mut release| {
        release.security_counter = COUNTER - 1;
        attack(bench.made(&release), "FLOOR")
    };
    an_expired_release_is_refused => |bench, mut release| {
        release.expires = release.issued.saturating_add(HOUR);
        attack(bench.made(&release), "RELEASE_EXPIRED")
    };
    a_release_that_needs_a_list_which_is_left_out_is_refused => |bench, mut release| {
        release.revocation_version = fwpush_keys::RevocationVersion { root_version: 1, version: 2 };
        attack(bench.made(&release), "REVOCATION_MISSING")
    };
    a_release_that_the_bundles_own_list_revokes_is_refused => |bench, release| {
        let mut made = bench.made(&release);
        made.list = Some(bench.offline.revoke(1, &[&release]));
        attack(made, "REVOKED")
    };
    a_list_taken_for_a_release_is_refused => |bench, release| {
        let mut made = bench.made(&release);
        made.release = bench.offline.revoke(1, &[]);
        attack(made, "PAYLOAD_TYPE")
    };
    an_image_that_the_release_does_not_name_is_refused => |bench, release| {
        let mut made = bench.made(&release);
        made.image = filler("another image", IMAGE_BYTES);
        attack(made, "FILE_ID")
    };
    an_image_that_does_not_fit_is_refused => |bench, _| {
        let large = filler("large", SLOT_BYTES + 1);
        let release = bench.offline.release(&large, "1.2.0");
        let made = Made { image: large, ..bench.made(&release) };
        attack(made, "SLOT_TOO_SMALL")
    };
    a_root_of_another_site_is_refused => |bench, release| {
        let keys = || (0..2).map(|_| SigningKey::generate()).collect::<Vec<_>>();
        let (root_keys, release_keys) = (keys(), keys());
        let public = |keys: &[SigningKey]| keys.iter().map(SigningKey::public).collect::<Vec<_>>();
        let held = &bench.offline.root;
        let mut root = Root::first(
            held.issued,
            held.expires,
            (2, &public(&root_keys)),
            (1, &public(&release_keys)),
        );
        root.version = 2;
        root.products = held.products.clone();
        let mut made = bench.made(&release);
        made.roots = vec![signed(root.to_envelope().unwrap(), &root_keys)];
        made.release = signed(release.to_envelope().unwrap(), &release_keys);
        attack(made, "SIGNATURES")
    };
    a_root_that_skips_a_version_is_refused => |bench, release| {
        let key = SigningKey::generate();
        bench.offline.rotate(|_| {});
        let third = bench.offline.rotate(|root| {
            root.add_key(key.public());
            root.roles.release = RoleKeys::new(1, &[key.public()]);
        });
        let mut made = bench.made(&release);
        made.roots = vec![third];
        made.release = signed(release.to_envelope().unwrap(), &[key]);
        attack(made, "ROOT_VERSION")
    };
    a_root_signed_by_its_own_side_only_is_refused => |bench, release| {
        let new = SigningKey::generate();
        let next = bench.offline.next_root(|root| {
            root.add_key(new.public());
            root.roles.root = RoleKeys::new(1, &[new.public()]);
        });
        let mut made = bench.made(&release);
        made.roots = vec![signed(next.to_envelope().unwrap(), &[new])];
        attack(made, "SIGNATURES")
    };
}

/// Two of two release keys are needed; the bundle has one, twice. The root that says so is real, and stays.
#[test]
fn a_release_under_the_threshold_is_refused() {
    let mut bench = Bench::with_check(0);
    let second = SigningKey::generate();
    let (first, second_public) = (bench.offline.release_keys[0].public(), second.public());
    let root = bench.offline.rotate(|root| {
        root.add_key(second_public);
        root.roles.release = RoleKeys::new(2, &[first, second_public]);
        root.products
            .insert("meter".parse().unwrap(), ProductRule::new(9));
    });
    let release = bench.release("1.1.0");
    let mut made = bench.made(&release);
    made.roots = vec![root];
    let path = bench.path("gw.fwb");
    made.write(&path);
    expect(
        &bench.device.install(&path),
        1,
        "REJECTED",
        Some("SIGNATURES"),
    );
    bench.offline.release_keys.push(second);
    made.release = bench.offline.sign(&release);
    made.write(&path);
    expect(&bench.device.install(&path), 10, "REBOOTING", None);
}

/// The bundle of these tests, and where its parts lie.
fn whole(bench: &mut Bench) -> (Vec<u8>, Vec<(&'static str, usize)>) {
    let root = bench.offline.rotate(|_| {});
    let release = bench.release("1.1.0");
    let made = Made {
        roots: vec![root],
        list: Some(bench.offline.revoke(1, &[])),
        ..bench.made(&release)
    };
    let bytes = made.bytes();
    let outline = outline_of(made.image.as_slice()).unwrap();
    let mut end = bytes.len();
    let lengths = [
        ("image", made.image.len()),
        ("outline", outline.as_bytes().len()),
        ("release", made.release.len()),
        ("list", made.list.as_ref().unwrap().len()),
        ("root", made.roots[0].len()),
    ];
    let mut parts: Vec<_> = lengths
        .into_iter()
        .map(|(part, length)| {
            end -= length;
            (part, end)
        })
        .collect();
    parts.push(("header", 0));
    (bytes, parts)
}

#[test]
fn a_flipped_byte_anywhere_is_found_and_a_good_copy_installs() {
    let mut bench = Bench::with_check(0);
    let (bytes, parts) = whole(&mut bench);
    let path = bench.path("gw.fwb");
    for (part, start) in parts {
        for at in [start, start + 20, start + 70] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            fs::write(&path, flipped).unwrap();
            let said = bench.device.install(&path);
            let (code, outcome, why) = verdict(&said);
            let expected = match (part, at) {
                // Magic, then the number of sections' neighbourhood and a hash.
                ("header", 0) => "BUNDLE_MALFORMED",
                // Found where it is read: what was written before it is of no harm in a slot that does not boot.
                ("image", _) => "GROUP_MISMATCH",
                _ => "BUNDLE_DAMAGED",
            };
            assert_eq!(
                (code, &why),
                (1, &json!(expected)),
                "{part} at {at}: {}",
                said.stdout
            );
            assert!(outcome == "REJECTED" || outcome == "FAILED", "{outcome}");
            bench.expect_running("1.0.0", "a", true);
            bench.device.expect_image("a", &[]);
        }
    }
    let written = bench.device.expect_nothing_foreign("b", &bench.image);
    assert!(
        !written.contains(&0),
        "the group with the flipped byte was written"
    );
    fs::write(&path, &bytes).unwrap();
    expect(&bench.device.install(&path), 10, "REBOOTING", None);
    bench.device.expect_image("b", &bench.image);
    expect(&bench.device.install(&path), 0, "SUCCEEDED", None);
}

#[test]
fn a_bundle_that_was_cut_off_or_grew_is_refused_before_anything_is_written() {
    let mut bench = Bench::with_check(0);
    let (bytes, parts) = whole(&mut bench);
    let (path, storage) = (bench.path("gw.fwb"), bench.device.storage());
    let starts = parts.iter().map(|(_, start)| *start);
    let cuts = starts.chain([5, 12, 40, bytes.len() - 65_536, bytes.len() - 1]);
    for cut in cuts {
        fs::write(&path, &bytes[..cut]).unwrap();
        let (code, outcome, why) = verdict(&bench.device.install(&path));
        let expected = if cut < 16 {
            "BUNDLE_MALFORMED"
        } else {
            "BUNDLE_DAMAGED"
        };
        assert_eq!(
            (code, outcome, why),
            (1, json!("REJECTED"), json!(expected)),
            "cut at {cut}"
        );
    }
    for more in [&[0][..], &bytes] {
        fs::write(&path, [&bytes, more].concat()).unwrap();
        expect(
            &bench.device.install(&path),
            1,
            "REJECTED",
            Some("BUNDLE_DAMAGED"),
        );
    }
    let missing = bench.device.install(&bench.path("none.fwb"));
    expect(&missing, 1, "REJECTED", Some("BUNDLE_READ"));
    expect(
        &bench.device.install(bench.site.temp()),
        1,
        "REJECTED",
        Some("BUNDLE_READ"),
    );
    assert!(bench.device.storage() == storage);
}

/// The stick is pulled: from the first group that is missing on, the file gives nothing.
#[test]
fn a_stick_that_is_pulled_leaves_the_running_image_alone_and_the_command_goes_on() {
    let bench = Bench::with_check(0);
    let bundle = bench.good("gw.fwb", "1.1.0");
    let bytes = fs::read(&bundle).unwrap();
    let groups = |count: usize| (bytes.len() - IMAGE_BYTES + count * 65_536).to_string();
    // Once the header was read, and before the image is.
    let cut = |count: usize| {
        let length = groups(count);
        let argv = ["truncate", "-s", &length, bundle.to_str().unwrap()];
        bench.device.configure(|config| {
            let argv = argv.map(toml::Value::from).to_vec();
            table(config, "hooks").insert("pre_download".into(), argv.into());
        });
    };
    cut(3);
    expect(
        &bench.device.install(&bundle),
        1,
        "FAILED",
        Some("BUNDLE_DAMAGED"),
    );
    bench.expect_running("1.0.0", "a", true);
    bench.device.configure(|config| {
        config.remove("hooks");
    });
    fs::write(&bundle, &bytes).unwrap();
    expect(&bench.device.install(&bundle), 10, "REBOOTING", None);
    bench.device.expect_image("b", &bench.image);
    // Each of the five groups was written once: those before the cut are found again.
    let status = bench.device.status();
    assert!(status["groups_written"].as_u64().unwrap() <= 5, "{status}");
}

/// Claims that would take gigabytes if they were believed, under a limit that the device's memory is.
#[test]
fn lengths_that_are_claimed_take_no_memory() {
    let bench = Bench::with_check(0);
    let path = bench.path("gw.fwb");
    let install = || {
        let plain = bench.device.install_command(&path);
        let mut limited = std::process::Command::new("sh");
        limited
            .args(["-c", "ulimit -v 1000000; exec \"$@\"", "sh"])
            .arg(plain.get_program())
            .args(plain.get_args())
            .arg("--json")
            .env("MALLOC_ARENA_MAX", "1");
        fwpush_tests::process::run(limited)
    };
    // With nothing behind the header: more than there is.
    for (kind, length) in [(1, u64::MAX), (3, 1 << 40), (4, 1 << 40), (5, 1 << 50)] {
        let sections = [(3, 100), (5, 100), (kind, length)];
        fs::write(&path, header(sections.to_vec())).unwrap();
        let (code, _, why) = verdict(&install());
        assert_eq!(code, 1);
        assert!(
            why == "BUNDLE_MALFORMED" || why == "BUNDLE_DAMAGED",
            "{why}"
        );
    }
    // Two tebibytes that are there, in a sparse file, and their outline of a gibibyte, under a real release.
    let release = bench.offline.sign(&bench.release("1.1.0"));
    let image: u64 = 2 << 40;
    let table = header(vec![
        (3, release.len() as u64),
        (4, image / 2048),
        (5, image),
    ]);
    let file = File::create(&path).unwrap();
    let start = table.len() as u64;
    file.write_all_at(&table, 0).unwrap();
    file.write_all_at(&release, start).unwrap();
    file.set_len(start + release.len() as u64 + image / 2048 + image)
        .unwrap();
    let said = install();
    // The release's hash is not the one in the table: never mind which check comes first, none allocates.
    expect(&said, 1, "REJECTED", Some("BUNDLE_DAMAGED"));
    // And with a table that is right about it.
    let table = header_of(&[
        (3, release.len() as u64, FileId::of(&release)),
        (4, image / 2048, FileId::of(b"")),
        (5, image, FileId::of(&bench.image)),
    ]);
    file.write_all_at(&table, 0).unwrap();
    expect(&install(), 1, "FAILED", Some("BUNDLE_IMAGE"));
    bench.expect_running("1.0.0", "a", true);
}

fn header(mut sections: Vec<(u32, u64)>) -> Vec<u8> {
    sections.sort_by_key(|(kind, _)| *kind);
    let some = FileId::of(b"");
    let sections: Vec<_> = sections
        .into_iter()
        .map(|(kind, length)| (kind, length, some))
        .collect();
    header_of(&sections)
}

/// The header of docs/bundle.md, made from the document alone.
fn header_of(sections: &[(u32, u64, FileId)]) -> Vec<u8> {
    let count = u32::try_from(sections.len()).unwrap();
    let mut header = [&MAGIC[..], &1u32.to_le_bytes(), &count.to_le_bytes()].concat();
    for (kind, length, blake3) in sections {
        header.extend(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(length.to_le_bytes());
        header.extend(blake3.as_bytes());
    }
    let sum = blake3::hash(&header);
    header.extend(sum.as_bytes());
    header
}
