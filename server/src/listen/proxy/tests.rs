use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use futures::FutureExt as _;
use ppp::v2::{Builder, Unix, Version};
use proptest::prelude::*;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::StreamReader;

use super::*;

const PROXY_TCP4: (u8, u8) = (0x21, 0x11);
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// 198.51.100.7:4711 to 10.0.0.11:7443.
const ADDRESSES: [u8; 12] = [198, 51, 100, 7, 10, 0, 0, 11, 0x12, 0x67, 0x1d, 0x13];

/// A header by hand: command, family, the length that it claims, and what follows.
fn header((command, family): (u8, u8), claims: u16, rest: &[u8]) -> Vec<u8> {
    [SIGNATURE, &[command, family], &claims.to_be_bytes(), rest].concat()
}

/// Reads what comes in these pieces; gives the outcome and what was left on the connection.
fn read(pieces: &[&[u8]]) -> (Result<Sender, HeaderError>, Vec<u8>) {
    let pieces: Vec<_> = pieces
        .iter()
        .filter(|piece| !piece.is_empty())
        .map(|piece| Ok::<_, io::Error>(Bytes::copy_from_slice(piece)))
        .collect();
    let mut connection = StreamReader::new(futures::stream::iter(pieces));
    let sender = read_header(&mut connection).now_or_never();
    let mut left = Vec::new();
    connection
        .read_to_end(&mut left)
        .now_or_never()
        .unwrap()
        .unwrap();
    (sender.expect("nothing is waited for that has come"), left)
}

fn outcome(bytes: &[u8]) -> Result<Sender, HeaderError> {
    read(&[bytes]).0
}

#[derive(Debug, Deserialize)]
struct Listen {
    proxies: Proxies,
}

#[test]
fn fronts_are_addresses_or_networks_and_never_everybody() {
    let parse = |list: &str| toml::from_str::<Listen>(&format!("proxies = {list}"));
    let some = parse(r#"["10.0.0.5", "10.0.1.0/24", "2001:db8::/64"]"#).unwrap();
    let has = |ip: &str| some.proxies.has(ip.parse().unwrap());
    assert!(has("10.0.0.5") && has("::ffff:10.0.0.5") && has("10.0.1.255") && has("2001:db8::9"));
    assert!(!has("10.0.0.6") && !has("10.0.2.1") && !has("2001:db8:0:1::9") && !has("::1"));
    let none = parse("[]").unwrap().proxies;
    assert!(!none.has([127, 0, 0, 1].into()));
    for (list, words) in [
        (r#"["front.example"]"#, "neither an address"),
        (r#"["10.0.1.7/24"]"#, "write `10.0.1.0/24`"),
        (r#"["0.0.0.0/0"]"#, "is everybody"),
        (r#"["10.0.0.0/33"]"#, "neither an address"),
        (&format!("[{}]", r#""10.0.0.5","#.repeat(257)), "lists 257"),
    ] {
        let said = parse(list).unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn the_peers_address_is_that_of_the_header() {
    let v4 = header(PROXY_TCP4, 12, &ADDRESSES);
    let peer: SocketAddr = "198.51.100.7:4711".parse().unwrap();
    assert_eq!(outcome(&v4).unwrap(), Sender::Peer(peer));
    let from: Ipv6Addr = "2001:db8::7".parse().unwrap();
    let addresses = [&from.octets()[..], &[0; 16], &[0x12, 0x67, 0, 0]].concat();
    let v6 = header((0x21, 0x21), 36, &addresses);
    assert_eq!(outcome(&v6).unwrap(), Sender::Peer((from, 4711).into()));
}

#[test]
fn a_front_that_looks_whether_the_node_is_there_is_nobodys_connection() {
    assert_eq!(outcome(&header((0x20, 0), 0, &[])).unwrap(), Sender::Front);
    // Whatever stands in it is passed over, also a family whose addresses are not there.
    for family in [0x00, 0x11, 0x21, 0x31, 0xff] {
        let bytes = header((0x20, family), 7, b"7 bytes");
        let (sender, left) = read(&[&bytes, b"hello"]);
        assert_eq!((sender.unwrap(), &left[..]), (Sender::Front, &b"hello"[..]));
    }
    assert_eq!(outcome(&[]).unwrap(), Sender::Nobody);
}

#[test]
fn what_is_no_header_is_refused_by_its_first_bytes() {
    // The beginning of a TLS ClientHello, of version 1, and what only begins right.
    for (bytes, words) in [
        (&[22, 3, 1][..], "sends no header of version 2"),
        (
            b"PROXY TCP4 198.51.100.7 10.0.0.11 4711 7443\r\n",
            "version 1",
        ),
        (b"P", "version 1"),
        (b"\r\n\r\nX", "sends no header of version 2"),
    ] {
        let said = outcome(bytes).unwrap_err().to_string();
        assert!(said.contains(words), "{bytes:?}: {said}");
    }
}

#[test]
fn a_wrong_header_is_refused_in_words() {
    let tcp4 = |claims, rest: &[u8]| header(PROXY_TCP4, claims, rest);
    let of = |begin, rest: &[u8]| header(begin, rest.len() as u16, rest);
    let unix = Builder::with_addresses(
        Version::Two | Command::Proxy,
        Protocol::Stream,
        Unix::new([1; 108], [2; 108]),
    );
    for (what, bytes, words) in [
        (
            "cut in its fixed part",
            tcp4(12, &[])[..15].to_vec(),
            "after 15 bytes",
        ),
        (
            "cut in its addresses",
            tcp4(12, &ADDRESSES[..11]),
            "after 27 bytes",
        ),
        ("shorter than its addresses", tcp4(11, &ADDRESSES), "broken"),
        ("without addresses", tcp4(0, &[]), "broken"),
        ("version 3", of((0x31, 0x11), &ADDRESSES), "equal to 2"),
        (
            "another command",
            of((0x22, 0x11), &ADDRESSES),
            "Invalid command",
        ),
        ("another family", of((0x21, 0x41), &ADDRESSES), "broken"),
        (
            "another protocol",
            of((0x21, 0x13), &ADDRESSES),
            "Invalid protocol",
        ),
        ("datagrams", of((0x21, 0x12), &ADDRESSES), "no TCP address"),
        ("TCP or not", of((0x21, 0x10), &ADDRESSES), "no TCP address"),
        ("no family", of((0x21, 0x00), &ADDRESSES), "no TCP address"),
        ("a socket's path", unix.build().unwrap(), "no TCP address"),
        (
            "extensions that end early",
            tcp4(14, &[&ADDRESSES[..], &[4, 0]].concat()),
            "broken",
        ),
        (
            "an extension that is longer than the header",
            tcp4(16, &[&ADDRESSES[..], &[4, 0, 2, 0]].concat()),
            "broken",
        ),
        (
            "too long by a byte",
            tcp4(521, &[0; 600]),
            "announces 537 bytes; 536 are read at most",
        ),
        (
            "as long as it can claim",
            tcp4(u16::MAX, &[0; 600]),
            "announces 65551 bytes",
        ),
    ] {
        let said = outcome(&bytes).unwrap_err().to_string();
        assert!(said.contains(words), "{what}: {said}");
    }
}

#[test]
fn the_longest_header_is_read() {
    let extension = [&[4, 0x01, 0xf9][..], &[7; 505]].concat();
    let bytes = header(PROXY_TCP4, 520, &[&ADDRESSES[..], &extension].concat());
    assert_eq!(bytes.len(), limits::PROXY_HEADER_BYTES);
    assert!(matches!(outcome(&bytes).unwrap(), Sender::Peer(_)));
}

#[test]
fn a_checksum_is_believed_only_if_it_matches() {
    let with = |sum: [u8; 4]| {
        let extensions = [&[3, 0, 4][..], &sum, &[4, 0, 1, 9]].concat();
        header(PROXY_TCP4, 23, &[&ADDRESSES[..], &extensions].concat())
    };
    // CRC-32C's check value (RFC 3720 appendix B.4 has others): of the nine digits it is this.
    assert_eq!(CRC32C.checksum(b"123456789"), 0xe306_9283);
    let sum = CRC32C.checksum(&with([0; 4]));
    assert!(matches!(
        outcome(&with(sum.to_be_bytes())).unwrap(),
        Sender::Peer(_)
    ));
    let wrong = outcome(&with((sum ^ 1).to_be_bytes())).unwrap_err();
    assert!(matches!(wrong, HeaderError::Checksum), "{wrong}");
    let short = [&ADDRESSES[..], &[3, 0, 1, 0]].concat();
    assert!(matches!(
        outcome(&header(PROXY_TCP4, 16, &short)),
        Err(HeaderError::Checksum)
    ));
}

fn socket_addresses() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let v4 = any::<([u8; 4], u16, [u8; 4], u16)>().prop_map(|(from, port, to, at)| {
        let address = |ip, port| (Ipv4Addr::from_octets(ip), port).into();
        (address(from, port), address(to, at))
    });
    let v6 = any::<([u8; 16], u16, [u8; 16], u16)>().prop_map(|(from, port, to, at)| {
        let address = |ip, port| (Ipv6Addr::from_octets(ip), port).into();
        (address(from, port), address(to, at))
    });
    prop_oneof![v4, v6]
}

/// Headers as fronts make them, with extensions.
fn headers() -> impl Strategy<Value = (SocketAddr, Vec<u8>)> {
    let extensions = proptest::collection::vec(
        (4_u8..=0xff, proptest::collection::vec(any::<u8>(), 0..60)),
        0..6,
    );
    (socket_addresses(), extensions).prop_map(|(addresses, extensions)| {
        let mut builder =
            Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses);
        for (kind, value) in &extensions {
            builder = builder.write_tlv(*kind, value).unwrap();
        }
        (addresses.0, builder.build().unwrap())
    })
}

proptest! {
    #[test]
    fn a_header_is_read_in_any_pieces_and_nothing_of_what_follows(
        (from, bytes) in headers(),
        hello in proptest::collection::vec(any::<u8>(), 0..600),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..20),
    ) {
        let stream = [&bytes[..], &hello].concat();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
        let (sender, left) = read(&pieces);
        prop_assert_eq!(sender.unwrap(), Sender::Peer(from));
        prop_assert_eq!(left, hello);
    }

    #[test]
    fn a_header_cut_anywhere_is_refused((_, bytes) in headers(), cut in any::<proptest::sample::Index>()) {
        let cut = cut.index(bytes.len() - 1) + 1;
        prop_assume!(cut < bytes.len());
        prop_assert!(matches!(outcome(&bytes[..cut]), Err(HeaderError::Cut(at)) if at == cut));
    }

    #[test]
    fn no_bytes_have_more_read_than_the_bound(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..1_200),
        begins_right in 0..3_usize,
    ) {
        // Left to chance nothing would come past the signature.
        let begin = [&[][..], SIGNATURE, &[SIGNATURE, &[0x21, 0x11]].concat()][begins_right].to_vec();
        bytes.splice(..begin.len().min(bytes.len()), begin);
        let (_, left) = read(&[&bytes]);
        prop_assert!(bytes.len() - left.len() <= limits::PROXY_HEADER_BYTES);
        prop_assert!(bytes.ends_with(&left));
    }
}
