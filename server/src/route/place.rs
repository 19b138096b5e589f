//! Where Redis is: what `[cluster]` says, checked and without a secret in it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use redis::{Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _, RedisConnectionInfo};
use url::Url;

/// A Redis or Valkey server. Its words ([`fmt::Display`]) are its URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisPlace {
    host: String,
    port: u16,
    user: Option<String>,
    database: i64,
    password_file: Option<PathBuf>,
    tls: Tls,
}

/// How the connection is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Tls {
    Off,
    /// The server's certificate must be valid for its name, and issued by an authority of this file, or by one of the system's.
    On {
        ca_file: Option<PathBuf>,
    },
}

/// What is wrong with a URL or what goes with it. Never holds a password.
#[derive(Debug, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct PlaceError {
    /// `redis_url`, `redis_password_file` or `redis_ca_file`.
    pub key: &'static str,
    pub problem: String,
}

/// Why no client can be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("prepare the connection to Redis")]
    Redis(#[from] redis::RedisError),
}

const WANTED: &str = "must be `redis://HOST:PORT` or `rediss://HOST:PORT` (TLS), with `USER@` before HOST and `/DATABASE` behind PORT where needed";

/// Redis' own.
const PORT: u16 = 6379;

impl RedisPlace {
    /// Reads `url`. Relative paths start from `base`.
    pub fn parse(
        url: &str,
        password_file: Option<&Path>,
        ca_file: Option<&Path>,
        base: &Path,
    ) -> Result<Self, PlaceError> {
        let wrong = |key, problem: &str| PlaceError {
            key,
            problem: problem.to_owned(),
        };
        // The parser's own words may repeat the text.
        let url = Url::parse(url).map_err(|_| wrong("redis_url", WANTED))?;
        let tls = match url.scheme() {
            "redis" => Tls::Off,
            "rediss" => Tls::On {
                ca_file: ca_file.map(|file| base.join(file)),
            },
            _ => return Err(wrong("redis_url", WANTED)),
        };
        if url.password().is_some() {
            let problem = "must not hold a password, which would be seen by whoever sees the url: \
                put it into a file and name that as `redis_password_file`";
            return Err(wrong("redis_url", problem));
        }
        if tls == Tls::Off && ca_file.is_some() {
            return Err(wrong("redis_ca_file", "goes with a `rediss:` url only"));
        }
        let host = url
            .host_str()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| wrong("redis_url", WANTED))?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let database = match url.path().trim_start_matches('/') {
            "" => 0,
            number => number
                .parse()
                .ok()
                .filter(|number| (0..=1_024).contains(number))
                .ok_or_else(|| wrong("redis_url", WANTED))?,
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("redis_url", WANTED));
        }
        let user = url.username();
        Ok(Self {
            host: host.to_owned(),
            port: url.port().unwrap_or(PORT),
            user: (!user.is_empty()).then(|| user.to_owned()),
            database,
            password_file: password_file.map(|file| base.join(file)),
            tls,
        })
    }

    /// A client of it. The password is read now, so that a new one counts from the next connection on.
    pub fn client(&self) -> Result<Client, ClientError> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|source| ClientError::Read {
                path: path.to_owned(),
                source,
            })
        };
        let mut settings = RedisConnectionInfo::default().set_db(self.database);
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        if let Some(file) = &self.password_file {
            settings = settings.set_password(read(file)?.trim_end_matches(['\r', '\n']));
        }
        let (host, port) = (self.host.clone(), self.port);
        let address = match &self.tls {
            Tls::Off => ConnectionAddr::Tcp(host, port),
            Tls::On { .. } => ConnectionAddr::TcpTls {
                host,
                port,
                insecure: false,
                tls_params: None,
            },
        };
        let info: ConnectionInfo = address.into_connection_info()?.set_redis_settings(settings);
        Ok(match &self.tls {
            Tls::Off => Client::open(info)?,
            Tls::On { ca_file } => {
                let root_cert = ca_file.as_deref().map(read).transpose()?;
                let certificates = redis::TlsCertificates {
                    client_tls: None,
                    root_cert: root_cert.map(String::into_bytes),
                };
                Client::build_with_tls(info, certificates)?
            }
        })
    }
}

impl fmt::Display for RedisPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.tls {
            Tls::Off => "redis",
            Tls::On { .. } => "rediss",
        };
        write!(f, "{scheme}://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)?;
        } else {
            write!(f, "{}:{}", self.host, self.port)?;
        }
        match self.database {
            0 => Ok(()),
            number => write!(f, "/{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<RedisPlace, PlaceError> {
        RedisPlace::parse(url, None, None, Path::new("/etc/fwpush"))
    }

    #[test]
    fn a_url_is_shown_as_it_was_meant() {
        for (url, shown) in [
            ("redis://cache", "redis://cache:6379"),
            ("rediss://fw@cache:7000/3", "rediss://fw@cache:7000/3"),
            ("redis://[::1]:7000/0", "redis://[::1]:7000"),
        ] {
            assert_eq!(parse(url).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_wrong_is_named_without_the_password() {
        for url in [
            "cache:6379",
            "http://cache",
            "redis://",
            "redis://cache/x",
            "redis://cache?db=1",
        ] {
            assert_eq!(parse(url).unwrap_err().key, "redis_url", "{url}");
        }
        let words = parse("redis://fw:s3cret@cache").unwrap_err().to_string();
        assert!(
            words.contains("redis_password_file") && !words.contains("s3cret"),
            "{words}"
        );
        let base = Path::new("/etc/fwpush");
        let ca = Some(Path::new("ca.crt"));
        let error = RedisPlace::parse("redis://cache", None, ca, base).unwrap_err();
        assert_eq!(error.key, "redis_ca_file");
        RedisPlace::parse("rediss://cache", None, ca, base).unwrap();
    }
}
