//! Fronts: load balancers that pass TCP on to this node, TLS untouched, and say in a header ahead of it whose connection it is.
//!
//! The header is that of the PROXY protocol, version 2, as its specification has it
//! (<https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt>). It is believed of listed addresses only, and there it
//! must come: who could choose would choose whose bounds it is counted by.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crc::{CRC_32_ISCSI, Crc};
use ipnet::IpNet;
use ppp::v2::{Addresses, Command, Header, PROTOCOL_PREFIX, ParseError, Protocol, Type};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::limits;

/// Signature, version and command, family and protocol, length of what follows (section 2.2).
const FIXED_BYTES: usize = 16;

/// What the text form of version 1 begins with (section 2.1).
const VERSION_1: &[u8] = b"PROXY";

/// The checksum that a front may send along (section 2.2.3).
const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

// ---- Who is a front ----

/// The addresses and networks of `[listen] proxies`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Proxies(Vec<IpNet>);

/// What is wrong with `[listen] proxies`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxiesError {
    #[error(
        "`{0}` in `proxies` is neither an address, such as 10.0.0.5, nor a network, such as 10.0.1.0/24"
    )]
    Neither(String),
    #[error(
        "`{given}` in `proxies` is an address within a network: write `{network}`, or the address alone"
    )]
    Within { given: String, network: IpNet },
    #[error("`{0}` in `proxies` is everybody, who could then claim any address: list the fronts")]
    Everybody(String),
    #[error("`proxies` lists {0}; it may have {max}: write them as networks", max = limits::PROXIES)]
    TooMany(usize),
}

impl Proxies {
    /// Whether connections from `ip` come through a front.
    pub fn has(&self, ip: IpAddr) -> bool {
        // A socket for both families shows IPv4 peers as ::ffff:10.0.0.5.
        let ip = ip.to_canonical();
        self.0.iter().any(|network| network.contains(&ip))
    }
}

impl TryFrom<Vec<String>> for Proxies {
    type Error = ProxiesError;

    fn try_from(texts: Vec<String>) -> Result<Self, ProxiesError> {
        if texts.len() > limits::PROXIES {
            return Err(ProxiesError::TooMany(texts.len()));
        }
        texts
            .iter()
            .map(|text| network(text))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn network(text: &str) -> Result<IpNet, ProxiesError> {
    if let Ok(ip) = IpAddr::from_str(text) {
        return Ok(ip.to_canonical().into());
    }
    let given = || text.to_owned();
    let network = IpNet::from_str(text).map_err(|_| ProxiesError::Neither(given()))?;
    if network.prefix_len() == 0 {
        return Err(ProxiesError::Everybody(given()));
    }
    if network != network.trunc() {
        let (given, network) = (given(), network.trunc());
        return Err(ProxiesError::Within { given, network });
    }
    Ok(network)
}

// ---- What it says ----

/// Whose connection it is that came from a front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The peer with this address.
    Peer(SocketAddr),
    /// The front itself, which looks whether this node is there (command LOCAL).
    Front,
    /// Nobody's: it was closed before its first byte, as the plainest probe does.
    Nobody,
}

/// Why the first bytes of a front are no header to go by.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("the front sends no header of version 2 (HAProxy: `send-proxy-v2`)")]
    Missing,
    #[error("the front's header is of version 1; version 2 is needed (HAProxy: `send-proxy-v2`)")]
    Version1,
    #[error("the front closed the connection after {0} bytes of its header")]
    Cut(usize),
    #[error("the front's header did not come in time")]
    Slow,
    #[error("the front's header announces {0} bytes; {max} are read at most: have it send fewer extensions", max = limits::PROXY_HEADER_BYTES)]
    TooLong(usize),
    #[error("the front's header is broken: {0}")]
    Broken(#[from] ParseError),
    #[error("the front's header does not match its own checksum")]
    Checksum,
    #[error("the front's header has no TCP address of the peer")]
    NoAddress,
    #[error("read the front's header: {0}")]
    Read(#[from] io::Error),
}

/// Reads the header, and no byte of what follows it: at most [`limits::PROXY_HEADER_BYTES`].
///
/// Wrong first bytes are refused as soon as they are there. The time that this may take is the caller's to bound; dropped, it has
/// taken what had come.
pub async fn read_header(front: &mut (impl AsyncRead + Unpin)) -> Result<Sender, HeaderError> {
    let mut buffer = [0; limits::PROXY_HEADER_BYTES];
    let (mut have, mut need) = (0, FIXED_BYTES);
    while have < need {
        match front.read(&mut buffer[have..need]).await {
            Ok(0) if have == 0 => return Ok(Sender::Nobody),
            Err(error) if have == 0 && is_hang_up(&error) => return Ok(Sender::Nobody),
            Ok(0) => return Err(HeaderError::Cut(have)),
            Ok(read) => have += read,
            Err(error) => return Err(error.into()),
        }
        check_signature(&buffer[..have.min(PROTOCOL_PREFIX.len())])?;
        if have == FIXED_BYTES && need == FIXED_BYTES {
            let length = u16::from_be_bytes([buffer[14], buffer[15]]);
            need += usize::from(length);
            if need > buffer.len() {
                return Err(HeaderError::TooLong(need));
            }
        }
    }
    sender(&mut buffer[..have])
}

/// A probe may end with a reset.
fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

fn check_signature(begin: &[u8]) -> Result<(), HeaderError> {
    if PROTOCOL_PREFIX.starts_with(begin) {
        return Ok(());
    }
    let is_v1 = begin.starts_with(VERSION_1) || VERSION_1.starts_with(begin);
    Err(if is_v1 {
        HeaderError::Version1
    } else {
        HeaderError::Missing
    })
}

/// What a whole header says.
fn sender(bytes: &mut [u8]) -> Result<Sender, HeaderError> {
    // Section 2.2: of LOCAL the receiver "must discard the protocol block including the family which is ignored". The parser
    // would ask for the addresses that the family announces.
    if bytes[12] & 0x0f == 0 {
        bytes[13] = 0;
    }
    let header = Header::try_from(&*bytes)?;
    if header.command == Command::Local {
        return Ok(Sender::Front);
    }
    let source = match (header.protocol, header.addresses) {
        (Protocol::Stream, Addresses::IPv4(of)) => (of.source_address, of.source_port).into(),
        (Protocol::Stream, Addresses::IPv6(of)) => (of.source_address, of.source_port).into(),
        // Section 2.2: of UNSPEC "the receiver is free to accept the connection anyway [...] or to reject it". What has no
        // address would be counted by the front's.
        _ => return Err(HeaderError::NoAddress),
    };
    check_extensions(&header)?;
    Ok(Sender::Peer(source))
}

/// Extensions must fill the rest of the header exactly, and a checksum among them must match. What else they say counts for
/// nothing: identity comes from the peer's certificate.
fn check_extensions(header: &Header<'_>) -> Result<(), HeaderError> {
    let bytes = header.as_bytes();
    let mut at = FIXED_BYTES + header.address_bytes().len();
    for extension in header.tlvs() {
        let extension = extension?;
        // Type and length are three bytes.
        let value = at + 3..at + 3 + extension.len();
        at = value.end;
        if extension.kind != u8::from(Type::CRC32C) {
            continue;
        }
        // Section 2.2.3: computed over the header with four zeros in the checksum's place.
        let mut sum = CRC32C.digest();
        sum.update(&bytes[..value.start]);
        sum.update(&[0; 4]);
        sum.update(&bytes[value.end..]);
        if bytes[value] != sum.finalize().to_be_bytes() {
            return Err(HeaderError::Checksum);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
