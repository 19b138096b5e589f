//! Where the database is: what `[database]` says, checked and without a secret in it.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use percent_encoding::percent_decode_str;
use url::Url;

/// A database. Its words ([`fmt::Display`]) are its URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file of this machine.
    Sqlite(PathBuf),
    Postgres(PostgresPlace),
}

/// A database of a PostgreSQL server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresPlace {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) user: String,
    pub(super) database: String,
    pub(super) password_file: Option<PathBuf>,
    pub(super) tls: Tls,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// The directory of its Unix socket.
    Socket(PathBuf),
    /// A name or an address.
    Network(String),
}

/// How the connection is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    Off,
    /// The server's certificate must be valid for its name, and issued by an authority of this file, or by a public one.
    VerifyFull {
        ca_file: Option<PathBuf>,
    },
}

/// `[database] tls`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// The default for hosts other than this machine, and with `ca_file`.
    VerifyFull,
    /// The default on this machine.
    Off,
}

/// What goes with a URL.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A file that holds the password and nothing else.
    pub password_file: Option<PathBuf>,
    /// Authorities (PEM) by which the server is known.
    pub ca_file: Option<PathBuf>,
    pub tls: Option<TlsMode>,
}

/// What is wrong with a URL or its options. Never holds a password.
#[derive(Debug, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct PlaceError {
    /// `url`, `password_file`, `ca_file` or `tls`.
    pub key: &'static str,
    pub problem: String,
}

fn wrong(key: &'static str, problem: impl Into<String>) -> PlaceError {
    PlaceError {
        key,
        problem: problem.into(),
    }
}

const WANTED: &str = "must be `sqlite:PATH` or `postgres://USER@HOST:PORT/DATABASE`";
const NEEDS_POSTGRES: &str = "goes with a `postgres:` url only";

impl Place {
    /// Reads `url`: `sqlite:PATH`, or `postgres://USER@HOST:PORT/DATABASE`, or for a socket
    /// `postgres://USER@/DATABASE?host=/DIRECTORY`. Relative paths start from `base`.
    pub fn parse(url: &str, options: &Options, base: &Path) -> Result<Self, PlaceError> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            let Options {
                password_file,
                ca_file,
                tls,
            } = options;
            for (key, given) in [
                ("password_file", password_file.is_some()),
                ("ca_file", ca_file.is_some()),
                ("tls", tls.is_some()),
            ] {
                if given {
                    return Err(wrong(key, NEEDS_POSTGRES));
                }
            }
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() || path.starts_with(':') || path.contains(['?', '#']) {
                let problem = "must be `sqlite:` and the path of a file, without options";
                return Err(wrong("url", problem));
            }
            return Ok(Self::Sqlite(base.join(path)));
        }
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(wrong("url", WANTED));
        }
        PostgresPlace::parse(url, options, base).map(Self::Postgres)
    }

    /// The file at `path`.
    pub fn sqlite(path: impl Into<PathBuf>) -> Self {
        Self::Sqlite(path.into())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(place) => place.fmt(f),
        }
    }
}

impl fmt::Display for PostgresPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            host,
            port,
            user,
            database,
            ..
        } = self;
        match host {
            Host::Socket(dir) if *port == PORT => {
                write!(f, "postgres://{user}@/{database}?host={}", dir.display())
            }
            Host::Socket(dir) => {
                write!(
                    f,
                    "postgres://{user}@:{port}/{database}?host={}",
                    dir.display()
                )
            }
            Host::Network(host) if host.contains(':') => {
                write!(f, "postgres://{user}@[{host}]:{port}/{database}")
            }
            Host::Network(host) => write!(f, "postgres://{user}@{host}:{port}/{database}"),
        }
    }
}

/// PostgreSQL's own.
const PORT: u16 = 5432;

impl PostgresPlace {
    fn parse(url: &str, options: &Options, base: &Path) -> Result<Self, PlaceError> {
        // `user@/database` has no host, which the standard for URLs does not know.
        let (url, no_host) = match url.split_once("@/") {
            Some((start, end)) => (format!("{start}@socket.invalid/{end}"), true),
            None => match url.split_once("@:") {
                Some((start, end)) => (format!("{start}@socket.invalid:{end}"), true),
                None => (url.to_owned(), false),
            },
        };
        // The parser's own words may repeat the text.
        let url = Url::parse(&url).map_err(|_| wrong("url", WANTED))?;
        if url.password().is_some() {
            let problem = "must not hold a password, which would be seen by whoever sees the url: \
                put it into a file and name that as `password_file`";
            return Err(wrong("url", problem));
        }
        let text = |part: &str| {
            let decoded = percent_decode_str(part).decode_utf8();
            decoded
                .map(|text| text.into_owned())
                .map_err(|_| wrong("url", "is not UTF-8"))
        };
        let user = text(url.username())?;
        let database = text(url.path().trim_start_matches('/'))?;
        if user.is_empty() || database.is_empty() || database.contains('/') {
            return Err(wrong("url", WANTED));
        }
        let host = Self::host(&url, no_host)?;
        let tls = Self::tls(&host, options, base)?;
        Ok(Self {
            host,
            port: url.port().unwrap_or(PORT),
            user,
            database,
            password_file: options.password_file.as_ref().map(|file| base.join(file)),
            tls,
        })
    }

    fn host(url: &Url, no_host: bool) -> Result<Host, PlaceError> {
        let mut socket = None;
        for (key, value) in url.query_pairs() {
            match &*key {
                "host" if value.starts_with('/') => socket = Some(PathBuf::from(value.as_ref())),
                "host" => {
                    return Err(wrong(
                        "url",
                        "must name the directory of a socket as `?host=`",
                    ));
                }
                other => {
                    let problem = format!(
                        "has the option {other:?}: only `?host=/DIRECTORY` is known; TLS is set by `tls` and `ca_file`"
                    );
                    return Err(wrong("url", problem));
                }
            }
        }
        match (socket, url.host_str()) {
            (Some(dir), _) if no_host => Ok(Host::Socket(dir)),
            (Some(_), _) => Err(wrong(
                "url",
                "names both a host and the directory of a socket",
            )),
            (None, Some(host)) if !no_host && !host.is_empty() => {
                let host = host.trim_start_matches('[').trim_end_matches(']');
                Ok(Host::Network(host.to_owned()))
            }
            (None, _) => Err(wrong("url", WANTED)),
        }
    }

    fn tls(host: &Host, options: &Options, base: &Path) -> Result<Tls, PlaceError> {
        let ca_file = options.ca_file.as_ref().map(|file| base.join(file));
        let here = match host {
            Host::Socket(_) => true,
            Host::Network(name) => {
                name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        };
        match (host, options.tls, ca_file) {
            (Host::Socket(_), Some(TlsMode::VerifyFull), _) => Err(wrong(
                "tls",
                "does not go with a socket: it stays on this machine",
            )),
            (Host::Socket(_), _, Some(_)) => Err(wrong(
                "ca_file",
                "does not go with a socket: it stays on this machine",
            )),
            (_, Some(TlsMode::Off), Some(_)) => {
                Err(wrong("ca_file", "does not go with `tls = \"off\"`"))
            }
            (_, Some(TlsMode::Off), None) => Ok(Tls::Off),
            (_, None, None) if here => Ok(Tls::Off),
            (_, _, ca_file) => Ok(Tls::VerifyFull { ca_file }),
        }
    }

    /// The password, where there is one.
    pub(super) fn password(&self) -> io::Result<Option<String>> {
        let Some(file) = &self.password_file else {
            return Ok(None);
        };
        let text = fs::read_to_string(file)?;
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Place, PlaceError> {
        Place::parse(url, &Options::default(), Path::new("/etc/fw"))
    }

    fn postgres(url: &str, options: &Options) -> Result<PostgresPlace, PlaceError> {
        match Place::parse(url, options, Path::new("/etc/fw"))? {
            Place::Postgres(place) => Ok(place),
            Place::Sqlite(path) => panic!("{path:?}"),
        }
    }

    #[test]
    fn urls_come_back_as_they_were_given() {
        for url in [
            "sqlite:/var/lib/fwpush.db",
            "postgres://fw@db.example:5432/fwpush",
            "postgres://fw@[2001:db8::7]:6000/fwpush",
            "postgres://fw@/fwpush?host=/run/postgresql",
            "postgres://fw@:6000/fwpush?host=/run/postgresql",
        ] {
            assert_eq!(parse(url).unwrap().to_string(), url);
        }
        let relative = parse("sqlite:data/fwpush.db").unwrap();
        assert_eq!(relative, Place::sqlite("/etc/fw/data/fwpush.db"));
        let other = parse("postgresql://fw%40x@db.example/fw%20push").unwrap();
        let Place::Postgres(other) = other else {
            panic!("{other}")
        };
        assert_eq!(
            (other.user.as_str(), other.database.as_str()),
            ("fw@x", "fw push")
        );
    }

    #[test]
    fn other_machines_are_verified_in_full_unless_told_otherwise() {
        let tls = |url: &str| postgres(url, &Options::default()).unwrap().tls;
        let full = Tls::VerifyFull { ca_file: None };
        for url in ["postgres://fw@db.example/x", "postgres://fw@10.0.0.7/x"] {
            assert_eq!(tls(url), full, "{url}");
        }
        for url in [
            "postgres://fw@localhost/x",
            "postgres://fw@127.0.0.9/x",
            "postgres://fw@[::1]/x",
            "postgres://fw@/x?host=/run",
        ] {
            assert_eq!(tls(url), Tls::Off, "{url}");
        }
        let ca = Options {
            ca_file: Some("ca.crt".into()),
            ..Options::default()
        };
        let verified = Tls::VerifyFull {
            ca_file: Some("/etc/fw/ca.crt".into()),
        };
        assert_eq!(
            postgres("postgres://fw@localhost/x", &ca).unwrap().tls,
            verified
        );
        let off = Options {
            tls: Some(TlsMode::Off),
            ..Options::default()
        };
        assert_eq!(
            postgres("postgres://fw@db.example/x", &off).unwrap().tls,
            Tls::Off
        );
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        for url in [
            "postgres://fw:s3cret@db/x",
            "postgres://fw:s3cret@/x?host=/run",
            "postgres://fw@db/x?password=s3cret",
            "postgres://fw:s3cret@db:port/x",
            "mysql://fw:s3cret@db/x",
        ] {
            let refused = parse(url).unwrap_err();
            assert!(
                !format!("{refused} {refused:?}").contains("s3cret"),
                "{refused}"
            );
        }
        let words = parse("postgres://fw:s3cret@db/x").unwrap_err().to_string();
        assert!(words.contains("password_file"), "{words}");
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        let file = || Some(PathBuf::from("f"));
        let (off, full) = (Some(TlsMode::Off), Some(TlsMode::VerifyFull));
        let options = |password_file, ca_file, tls| Options {
            password_file,
            ca_file,
            tls,
        };
        let socket = "postgres://fw@/x?host=/run";
        for (url, options, key) in [
            ("sqlite:a.db", options(file(), None, None), "password_file"),
            ("sqlite:a.db", options(None, file(), None), "ca_file"),
            ("sqlite:a.db", options(None, None, off), "tls"),
            (socket, options(None, file(), None), "ca_file"),
            (socket, options(None, None, full), "tls"),
            ("postgres://fw@db/x", options(None, file(), off), "ca_file"),
            (
                "postgres://fw@db/x?sslmode=disable",
                options(None, None, None),
                "url",
            ),
            (
                "postgres://fw@db/x?host=/run",
                options(None, None, None),
                "url",
            ),
            ("postgres://fw@/x", options(None, None, None), "url"),
            ("postgres://db/x", options(None, None, None), "url"),
            ("postgres://fw@db", options(None, None, None), "url"),
            ("sqlite:", options(None, None, None), "url"),
            ("sqlite::memory:", options(None, None, None), "url"),
            ("sqlite:a.db?mode=ro", options(None, None, None), "url"),
        ] {
            let refused = Place::parse(url, &options, Path::new("")).unwrap_err();
            assert_eq!(refused.key, key, "{url}: {refused}");
        }
    }
}
