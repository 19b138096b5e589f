//! Where a mirror is, as a configuration lists it and as a server names it.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use fwpush_keys::time::Timestamp;
use fwpush_proto::v1;
use http::{
    Uri,
    uri::{Authority, PathAndQuery},
};
use rustls::pki_types::ServerName;

use crate::limits;

const HTTPS_PORT: u16 = 443;

/// A host and a port on it. Two that name the same are equal, however they are written; an address and a name never are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MirrorHost {
    /// In lower case; an IPv6 address in brackets, in its canonical form.
    name: String,
    port: u16,
}

/// A text that is no [`MirrorHost`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write \"HOST\" for port 443, or \"HOST:PORT\"")]
pub struct BadMirrorHost;

impl FromStr for MirrorHost {
    type Err = BadMirrorHost;

    /// `cdn.example`, `cdn.example:8443`, `192.0.2.7`, `[2001:db8::7]:8443`. No wildcards.
    fn from_str(text: &str) -> Result<Self, BadMirrorHost> {
        let authority = text.parse().map_err(|_| BadMirrorHost)?;
        Self::of(&authority).ok_or(BadMirrorHost)
    }
}

impl MirrorHost {
    /// None where anything stands beside host and port, such as a user.
    fn of(authority: &Authority) -> Option<Self> {
        let (host, port) = (authority.host(), authority.port());
        let length = host.len() + port.as_ref().map_or(0, |port| 1 + port.as_str().len());
        if authority.as_str().len() != length {
            return None;
        }
        let port = port.map_or(HTTPS_PORT, |port| port.as_u16());
        let name = match host.strip_prefix('[') {
            Some(rest) => {
                let address: Ipv6Addr = rest.strip_suffix(']')?.parse().ok()?;
                format!("[{address}]")
            }
            None => match ServerName::try_from(host).ok()? {
                // A name with a dot at its end is one that certificates do not have.
                ServerName::DnsName(name) if !host.ends_with('.') => {
                    name.as_ref().to_ascii_lowercase()
                }
                ServerName::IpAddress(address) => match IpAddr::from(address) {
                    IpAddr::V4(address) => address.to_string(),
                    // It stands in brackets, or it is none.
                    IpAddr::V6(_) => return None,
                },
                _ => return None,
            },
        };
        (port > 0).then_some(Self { name, port })
    }

    /// `HOST:PORT`, to connect to.
    pub(crate) fn address(&self) -> String {
        format!("{}:{}", self.name, self.port)
    }
}

/// As in a `Host` header: without the port where it is that of https.
impl fmt::Display for MirrorHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match self.port {
            HTTPS_PORT => Ok(()),
            port => write!(f, ":{port}"),
        }
    }
}

/// A mirror that may be used.
#[derive(Clone)]
pub(crate) struct Mirror {
    pub host: MirrorHost,
    /// Where the file is on it. May be signed: it is never logged, reported or stored.
    pub path: PathAndQuery,
    pub expires: Timestamp,
}

impl Mirror {
    /// None for one that may not be used: not https, at a host that is not listed, or not a plain URL of a bearable length.
    pub(crate) fn allowed(mirror: &v1::Mirror, hosts: &[MirrorHost]) -> Option<Self> {
        if mirror.url.len() > limits::MIRROR_URL_BYTES {
            return None;
        }
        let url: Uri = mirror.url.parse().ok()?;
        let is_https = url
            .scheme_str()
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
        let host = MirrorHost::of(url.authority()?)?;
        let allowed = is_https && hosts.contains(&host);
        allowed.then_some(Self {
            host,
            path: url.path_and_query()?.clone(),
            expires: Timestamp::from_ms(mirror.expires_at_ms),
        })
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("host", &self.host)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> MirrorHost {
        text.parse().unwrap()
    }

    fn allowed(url: &str, hosts: &[&str]) -> Option<Mirror> {
        let hosts: Vec<_> = hosts.iter().map(|text| host(text)).collect();
        let mirror = v1::Mirror {
            url: url.to_owned(),
            expires_at_ms: 7,
        };
        Mirror::allowed(&mirror, &hosts)
    }

    #[test]
    fn a_host_is_the_same_however_it_is_written() {
        assert_eq!(host("CDN.Example:443"), host("cdn.example"));
        assert_eq!(host("[2001:DB8:0::7]:443"), host("[2001:db8::7]"));
        assert_ne!(host("cdn.example:8443"), host("cdn.example"));
        assert_eq!(host("cdn.example:443").to_string(), "cdn.example");
        assert_eq!(host("[::1]:8443").address(), "[::1]:8443");
        assert_eq!(host("192.0.2.7").address(), "192.0.2.7:443");
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "",
            "*.example",
            "https://cdn.example",
            "cdn.example/",
            "cdn.example:",
            "cdn.example:0",
            "cdn.example:65536",
            "cdn.example:https",
            "cdn.example.",
            "user@cdn.example",
            "user:word@cdn.example",
            "2001:db8::7",
            "[cdn.example]",
            "[192.0.2.7]",
            "a b",
            "cdn..example",
        ] {
            assert_eq!(text.parse::<MirrorHost>(), Err(BadMirrorHost), "{text:?}");
        }
    }

    #[test]
    fn a_listed_host_over_https_is_allowed_with_its_path_and_query_as_they_are() {
        let url = "HTTPS://CDN.example/fw/ab/ab%2Fcd?X-Sig=a%2Bb&e=1#part";
        let mirror = allowed(url, &["other.example", "cdn.example"]).unwrap();
        assert_eq!(mirror.path.as_str(), "/fw/ab/ab%2Fcd?X-Sig=a%2Bb&e=1");
        assert_eq!(mirror.host, host("cdn.example"));
        assert_eq!(mirror.expires, Timestamp::from_ms(7));
        assert!(allowed("https://127.0.0.1:8443", &["127.0.0.1:8443"]).is_some());
    }

    #[test]
    fn nothing_else_is() {
        let hosts = ["cdn.example", "127.0.0.1:8443"];
        let long = format!(
            "https://cdn.example/{}",
            "x".repeat(limits::MIRROR_URL_BYTES)
        );
        for url in [
            "http://cdn.example/x",
            "ftp://cdn.example/x",
            "file:///etc/passwd",
            "//cdn.example/x",
            "/x",
            "",
            "cdn.example",
            "cdn.example:443",
            "https://cdn.example:8443/x",
            "https://127.0.0.1/x",
            "https://sub.cdn.example/x",
            "https://cdn.example.evil/x",
            "https://cdn.example./x",
            "https://cdn.example@evil.example/x",
            "https://evil@cdn.example/x",
            "https://a:b@cdn.example/x",
            "https://evil.example/https://cdn.example/x",
            "https://evil.example\\@cdn.example/x",
            "https://evil.example#@cdn.example/x",
            "https://cdn.example /x",
            "https://cdn.example/x y",
            "https://cdn.example/x\r\nHost: evil",
            "https://2130706433:8443/x",
            "https://127.1:8443/x",
            "https://[::ffff:127.0.0.1]:8443/x",
            long.as_str(),
        ] {
            assert!(allowed(url, &hosts).is_none(), "{url:?}");
        }
    }

    #[test]
    fn the_secret_part_of_a_url_is_not_shown() {
        let mirror = allowed("https://cdn.example/x?sig=s3cret", &["cdn.example"]).unwrap();
        let shown = format!("{mirror:?}");
        assert!(
            shown.contains("cdn.example") && !shown.contains("s3cret"),
            "{shown}"
        );
    }
}
