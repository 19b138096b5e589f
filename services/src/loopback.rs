//! Addresses that nobody else takes.

use std::net::Ipv4Addr;

/// A loopback host that nothing else uses: one of 16 million, by chance. Ports of 127.0.0.1 are given to whatever connects
/// or listens meanwhile; here one stays free while its server is away.
pub fn own_host() -> Ipv4Addr {
    let [a, b, c]: [u8; 3] = rand::random();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254))
}
