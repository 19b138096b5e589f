//! Under which names a new server is reached.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};

use fwpush_keys::SanName;

use crate::limits;

/// The host's name, `localhost`, and the addresses of this machine.
pub fn default_names() -> Vec<SanName> {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let mut names: Vec<SanName> = [host.as_str(), "localhost", "127.0.0.1", "::1"]
        .into_iter()
        // A host name that DNS could not hold is of no use to others.
        .filter_map(|name| name.parse().ok())
        .chain(local_addresses().into_iter().map(SanName::Ip))
        .collect();
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Names to connect to: those that were given, without patterns, or `localhost`, which works on this machine at least.
pub fn reachable_names(given: &[SanName]) -> Vec<SanName> {
    let mut names: Vec<SanName> = given
        .iter()
        .filter(|name| !matches!(name, SanName::Dns(dns) if dns.starts_with("*.")))
        .cloned()
        .collect();
    if names.is_empty() {
        names.push(SanName::Dns("localhost".to_owned()));
    }
    names
}

pub fn with_port(name: &SanName, port: u16) -> String {
    match name {
        SanName::Ip(IpAddr::V6(address)) => format!("[{address}]:{port}"),
        name => format!("{name}:{port}"),
    }
}

/// Addresses of this machine's interfaces other than loopback and link-local ones, as far as the system tells.
fn local_addresses() -> Vec<IpAddr> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut addresses: Vec<IpAddr> = ipv4_of_fib_trie(&read("/proc/net/fib_trie"))
        .into_iter()
        .map(IpAddr::V4)
        .chain(
            ipv6_of_if_inet6(&read("/proc/net/if_inet6"))
                .into_iter()
                .map(IpAddr::V6),
        )
        .chain(outbound_address())
        .collect();
    addresses.retain(|address| !address.is_loopback());
    addresses.sort();
    addresses.dedup();
    addresses.truncate(limits::LOCAL_ADDRESSES);
    addresses
}

/// The source address towards the rest of the world. Nothing is sent: connecting a UDP socket only looks up the route.
fn outbound_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // 192.0.2.0/24 is reserved for documentation (RFC 5737).
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Linux's routing table as a tree: an address of ours is a leaf followed by `/32 host LOCAL`.
fn ipv4_of_fib_trie(text: &str) -> Vec<Ipv4Addr> {
    let mut leaf: Option<Ipv4Addr> = None;
    let mut addresses = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            addresses.extend(leaf.take());
        }
    }
    addresses
}

/// Linux's list of IPv6 addresses: 32 hexadecimal digits, then index, prefix length, scope (00 is global), flags, name.
fn ipv6_of_if_inet6(text: &str) -> Vec<Ipv6Addr> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let bits = u128::from_str_radix(fields.next()?, 16).ok()?;
            (fields.nth(2)? == "00").then(|| Ipv6Addr::from(bits))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_read_from_the_kernels_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    Local:\n     |-- 10.0.0.5\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(ipv4_of_fib_trie(trie), [Ipv4Addr::new(10, 0, 0, 5)]);
        let inet6 = "00000000000000000000000000000001 01 80 10 80 lo\n\
                     20010db8000000000000000000000007 02 40 00 80 eth0\n\
                     fe800000000000000000000000000001 02 40 20 80 eth0\n";
        assert_eq!(
            ipv6_of_if_inet6(inet6),
            ["2001:db8::7".parse::<Ipv6Addr>().unwrap()]
        );
    }
}
