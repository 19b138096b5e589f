//! Where the images are: what `[files]` says, checked and without a secret in it.

use std::{
    fmt, fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use url::Url;

use crate::limits;

/// `[files]`. The environment decides before the file: `FWPUSH_FILES_URL` and so on, one for each key ([`Files::overlay`]).
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Files {
    /// `file:<directory>`, or `s3://<bucket>/<prefix>`, where the prefix may be left out.
    pub url: String,
    /// The directory is one that all nodes of a cluster share, such as an NFS export. With `file:` only.
    pub shared: bool,
    /// `https://<host>:<port>` of an S3 server; absent: that of AWS in `region`.
    pub endpoint: Option<String>,
    /// Absent: `us-east-1`, which servers other than AWS take.
    pub region: Option<String>,
    pub access_key_id: Option<String>,
    /// A file that holds the secret access key and nothing else.
    pub secret_key_file: Option<PathBuf>,
    /// Authorities (PEM) by which the S3 server is known, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Takes an endpoint that begins with `http://`: images, but not the secret key, are then readable on the way.
    pub allow_http: bool,
    /// Images that came from S3, and uploads on their way there. No other node may use it.
    pub cache_dir: Option<PathBuf>,
    /// Bytes of images that are kept in it; 1 MiB .. 1 PiB.
    pub cache_bytes: Option<u64>,
    /// Devices are told URLs of the S3 server that are good for a while, signed with the secret key.
    pub presign: bool,
    /// `https://<host>/<path>` under which a CDN has the files as they are in the store; told to devices.
    pub mirror_url: Option<String>,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            url: "file:data/files".into(),
            shared: false,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_key_file: None,
            ca_file: None,
            allow_http: false,
            cache_dir: None,
            cache_bytes: None,
            presign: false,
            mirror_url: None,
        }
    }
}

/// The store of images. Its words ([`fmt::Display`]) are its URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilesPlace {
    Directory {
        path: PathBuf,
        /// All nodes of a cluster have it.
        shared: bool,
    },
    S3(S3Place),
}

/// A bucket, and the room on this node for what comes from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Place {
    pub(super) bucket: String,
    /// Without slashes at its ends; empty: none.
    pub(super) prefix: String,
    /// `None`: AWS.
    pub(super) endpoint: Option<String>,
    pub(super) region: String,
    pub(super) access_key_id: String,
    pub(super) secret_key_file: PathBuf,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) allow_http: bool,
    pub(super) cache_dir: PathBuf,
    pub(super) cache_bytes: u64,
}

/// What is wrong with a key of `[files]`. Never holds a secret.
#[derive(Debug, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct FilesError {
    /// With its table: `files.url`.
    pub key: &'static str,
    pub problem: String,
}

fn wrong(key: &'static str, problem: impl Into<String>) -> FilesError {
    FilesError {
        key,
        problem: problem.into(),
    }
}

const WANTED: &str = "must be `file:` followed by a directory, or `s3://BUCKET/PREFIX`";
const CACHE_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 50;

impl Files {
    /// The keys of `[files]` whose values differ from those of `other`.
    pub(crate) fn changed_since(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            url,
            shared,
            endpoint,
            region,
            access_key_id,
            secret_key_file,
            ca_file,
            allow_http,
            cache_dir,
            cache_bytes,
            presign,
            mirror_url,
        } = self;
        let same = [
            ("files.url", *url == other.url),
            ("files.shared", *shared == other.shared),
            ("files.endpoint", *endpoint == other.endpoint),
            ("files.region", *region == other.region),
            ("files.access_key_id", *access_key_id == other.access_key_id),
            (
                "files.secret_key_file",
                *secret_key_file == other.secret_key_file,
            ),
            ("files.ca_file", *ca_file == other.ca_file),
            ("files.allow_http", *allow_http == other.allow_http),
            ("files.cache_dir", *cache_dir == other.cache_dir),
            ("files.cache_bytes", *cache_bytes == other.cache_bytes),
            ("files.presign", *presign == other.presign),
            ("files.mirror_url", *mirror_url == other.mirror_url),
        ];
        let changed = same.into_iter().filter(|(_, same)| !same);
        changed.map(|(key, _)| key).collect()
    }

    /// Puts what `env` has above what the file says.
    pub(crate) fn overlay(
        &mut self,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<(), FilesError> {
        let path = |name: &str| env(name).map(PathBuf::from);
        let flag = |name: &str, key: &'static str| match env(name).as_deref() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => Err(wrong(
                key,
                format!("is neither `true` nor `false` in {name}"),
            )),
        };
        if let Some(url) = env("FWPUSH_FILES_URL") {
            self.url = url;
        }
        if let Some(shared) = flag("FWPUSH_FILES_SHARED", "files.shared")? {
            self.shared = shared;
        }
        if let Some(allow) = flag("FWPUSH_FILES_ALLOW_HTTP", "files.allow_http")? {
            self.allow_http = allow;
        }
        if let Some(presign) = flag("FWPUSH_FILES_PRESIGN", "files.presign")? {
            self.presign = presign;
        }
        if let Some(bytes) = env("FWPUSH_FILES_CACHE_BYTES") {
            let bytes = bytes.parse();
            self.cache_bytes = Some(bytes.map_err(|_| {
                wrong(
                    "files.cache_bytes",
                    "is no number of bytes in FWPUSH_FILES_CACHE_BYTES",
                )
            })?);
        }
        for (name, text) in [
            ("FWPUSH_FILES_ENDPOINT", &mut self.endpoint),
            ("FWPUSH_FILES_REGION", &mut self.region),
            ("FWPUSH_FILES_ACCESS_KEY_ID", &mut self.access_key_id),
            ("FWPUSH_FILES_MIRROR_URL", &mut self.mirror_url),
        ] {
            *text = env(name).or_else(|| text.take());
        }
        for (name, file) in [
            ("FWPUSH_FILES_SECRET_KEY_FILE", &mut self.secret_key_file),
            ("FWPUSH_FILES_CA_FILE", &mut self.ca_file),
            ("FWPUSH_FILES_CACHE_DIR", &mut self.cache_dir),
        ] {
            *file = path(name).or_else(|| file.take());
        }
        Ok(())
    }

    /// Checks what goes with what. Relative paths start from `base`.
    pub fn place(&self, base: &Path) -> Result<FilesPlace, FilesError> {
        if let Some(path) = self.url.strip_prefix("file:") {
            for (key, given) in [
                ("files.endpoint", self.endpoint.is_some()),
                ("files.region", self.region.is_some()),
                ("files.access_key_id", self.access_key_id.is_some()),
                ("files.secret_key_file", self.secret_key_file.is_some()),
                ("files.ca_file", self.ca_file.is_some()),
                ("files.allow_http", self.allow_http),
                ("files.cache_dir", self.cache_dir.is_some()),
                ("files.cache_bytes", self.cache_bytes.is_some()),
                ("files.presign", self.presign),
            ] {
                if given {
                    return Err(wrong(key, "goes with an `s3:` url only"));
                }
            }
            if path.is_empty() {
                return Err(wrong("files.url", WANTED));
            }
            return Ok(FilesPlace::Directory {
                path: base.join(path),
                shared: self.shared,
            });
        }
        if self.shared {
            let problem = "goes with a `file:` url only: a bucket is shared anyway";
            return Err(wrong("files.shared", problem));
        }
        let Some(place) = self.url.strip_prefix("s3://") else {
            return Err(wrong("files.url", WANTED));
        };
        self.s3(place, base).map(FilesPlace::S3)
    }

    fn s3(&self, place: &str, base: &Path) -> Result<S3Place, FilesError> {
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let plain =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        // "General purpose bucket naming rules" of the S3 user guide; it leaves no room for `user:password@`.
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(plain) {
            let problem = "must name a bucket of 3 to 63 lower-case letters, digits, dots and hyphens: `s3://BUCKET/PREFIX`";
            return Err(wrong("files.url", problem));
        }
        let prefix = prefix.trim_matches('/');
        let safe = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && part != "." && part != ".." && part.chars().all(known)
        };
        if prefix.len() > limits::S3_PREFIX_BYTES
            || !(prefix.is_empty() || prefix.split('/').all(safe))
        {
            let problem = "must have a prefix of letters, digits, `-`, `_`, `.` and single slashes";
            return Err(wrong("files.url", problem));
        }
        let endpoint = self.endpoint.as_deref().map(|url| self.check_endpoint(url));
        let region = match (&self.region, &endpoint) {
            (Some(region), _) => region.clone(),
            (None, Some(_)) => "us-east-1".to_owned(),
            (None, None) => {
                let problem = "is needed with an `s3:` url, unless `files.endpoint` names another server than that of AWS";
                return Err(wrong("files.region", problem));
            }
        };
        let (access_key_id, secret_key_file) = match (&self.access_key_id, &self.secret_key_file) {
            (Some(id), Some(file)) => (id.clone(), base.join(file)),
            (None, _) => {
                let problem = "is needed with an `s3:` url (or FWPUSH_FILES_ACCESS_KEY_ID)";
                return Err(wrong("files.access_key_id", problem));
            }
            (_, None) => {
                let problem = "is needed with an `s3:` url (or FWPUSH_FILES_SECRET_KEY_FILE): \
                    a file that holds the secret access key and nothing else";
                return Err(wrong("files.secret_key_file", problem));
            }
        };
        let cache_bytes = self.cache_bytes.unwrap_or(limits::CACHE_BYTES);
        if !CACHE_BYTES.contains(&cache_bytes) {
            let (least, most) = CACHE_BYTES.into_inner();
            let problem = format!("is {cache_bytes}; it must be from {least} to {most}");
            return Err(wrong("files.cache_bytes", problem));
        }
        let cache_dir = self.cache_dir.as_deref();
        Ok(S3Place {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: endpoint.transpose()?,
            region,
            access_key_id,
            secret_key_file,
            ca_file: self.ca_file.as_ref().map(|file| base.join(file)),
            allow_http: self.allow_http,
            cache_dir: base.join(cache_dir.unwrap_or(Path::new("data/cache"))),
            cache_bytes,
        })
    }

    fn check_endpoint(&self, text: &str) -> Result<String, FilesError> {
        let key = "files.endpoint";
        // The parser's own words may repeat the text.
        let url = Url::parse(text).ok().filter(|url| url.has_host());
        let Some(url) = url else {
            return Err(wrong(key, "must be `https://HOST:PORT`"));
        };
        if !url.username().is_empty() || url.password().is_some() {
            let problem = "must not hold a name or password: see `files.access_key_id` and `files.secret_key_file`";
            return Err(wrong(key, problem));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            let problem =
                "must be `https://HOST:PORT` and no more; bucket and prefix stand in `files.url`";
            return Err(wrong(key, problem));
        }
        match url.scheme() {
            "https" => {}
            "http" if !self.allow_http => {
                let problem = "is not encrypted: use https://, or set `files.allow_http = true` where the network may be trusted";
                return Err(wrong(key, problem));
            }
            "http" if self.ca_file.is_some() => {
                return Err(wrong(
                    "files.ca_file",
                    "goes with an https:// endpoint only",
                ));
            }
            "http" => {}
            _ => return Err(wrong(key, "must be `https://HOST:PORT`")),
        }
        // As it was parsed: its scheme is looked at again, and is in small letters here.
        Ok(url.as_str().trim_end_matches('/').to_owned())
    }
}

impl FilesPlace {
    /// A directory of this machine.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Self::Directory {
            path: path.into(),
            shared: false,
        }
    }

    /// Whether every node of a cluster finds the same images there.
    pub fn is_shared(&self) -> bool {
        match self {
            Self::Directory { shared, .. } => *shared,
            Self::S3(_) => true,
        }
    }
}

impl fmt::Display for FilesPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path, .. } => write!(f, "file:{}", path.display()),
            Self::S3(place) => place.fmt(f),
        }
    }
}

impl fmt::Display for S3Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.prefix)
        }
    }
}

impl S3Place {
    /// The secret access key, without the newline that an editor may have put behind it.
    pub(super) fn secret_key(&self) -> io::Result<String> {
        let text = fs::read_to_string(&self.secret_key_file)?;
        let secret = text.trim_end_matches(['\r', '\n']);
        if secret.is_empty() {
            return Err(io::Error::other("it is empty"));
        }
        Ok(secret.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3() -> Files {
        Files {
            url: "s3://images/fleet-a".into(),
            endpoint: Some("https://s3.example:9000".into()),
            access_key_id: Some("id".into()),
            secret_key_file: Some("secret".into()),
            ..Files::default()
        }
    }

    fn refused(files: &Files) -> String {
        files.place(Path::new("/etc")).unwrap_err().to_string()
    }

    #[test]
    fn a_bucket_needs_its_keys_and_where_it_is() {
        let FilesPlace::S3(place) = s3().place(Path::new("/etc")).unwrap() else {
            panic!("no bucket")
        };
        assert_eq!(place.to_string(), "s3://images/fleet-a");
        assert_eq!(place.region, "us-east-1");
        assert_eq!(place.secret_key_file, Path::new("/etc/secret"));
        assert_eq!(place.cache_dir, Path::new("/etc/data/cache"));
        for (without, key) in [
            (
                Files {
                    access_key_id: None,
                    ..s3()
                },
                "`files.access_key_id` is needed",
            ),
            (
                Files {
                    secret_key_file: None,
                    ..s3()
                },
                "`files.secret_key_file` is needed",
            ),
            (
                Files {
                    endpoint: None,
                    ..s3()
                },
                "`files.region` is needed",
            ),
        ] {
            assert!(refused(&without).starts_with(key), "{}", refused(&without));
        }
        let aws = Files {
            endpoint: None,
            region: Some("eu-north-1".into()),
            ..s3()
        };
        aws.place(Path::new("/etc")).unwrap();
    }

    #[test]
    fn plain_http_is_taken_only_where_it_is_allowed() {
        let plain = |allow_http| Files {
            endpoint: Some("http://10.0.0.1:9000".into()),
            allow_http,
            ..s3()
        };
        assert!(refused(&plain(false)).contains("files.allow_http = true"));
        let FilesPlace::S3(place) = (Files {
            endpoint: Some("HTTP://10.0.0.1:9000/".into()),
            ..plain(true)
        })
        .place(Path::new("/etc"))
        .unwrap() else {
            panic!("no bucket")
        };
        assert_eq!(place.endpoint.as_deref(), Some("http://10.0.0.1:9000"));
        let authority = Files {
            ca_file: Some("ca.crt".into()),
            ..plain(true)
        };
        assert!(refused(&authority).contains("https:// endpoint only"));
    }

    #[test]
    fn what_does_not_fit_is_named_and_secrets_are_not_repeated() {
        for url in [
            "s3:images",
            "s3://",
            "s3://a",
            "s3://id:s3cret@images",
            "s3://images/../x",
            "s3://images/a//b",
            "file:",
            "ftp://x",
        ] {
            let words = refused(&Files {
                url: url.into(),
                ..s3()
            });
            assert!(words.contains("`files."), "{url}: {words}");
            assert!(!words.contains("s3cret"), "{words}");
        }
        for endpoint in [
            "s3.example",
            "https://id:s3cret@s3.example",
            "https://s3.example/images",
            "ftp://s3.example",
        ] {
            let words = refused(&Files {
                endpoint: Some(endpoint.into()),
                ..s3()
            });
            assert!(words.contains("`files.endpoint`"), "{endpoint}: {words}");
            assert!(!words.contains("s3cret"), "{words}");
        }
        let local = Files {
            url: "file:data/files".into(),
            ..s3()
        };
        assert!(refused(&local).contains("goes with an `s3:` url only"));
        assert!(
            refused(&Files {
                shared: true,
                ..s3()
            })
            .contains("`files.shared`")
        );
        assert!(
            refused(&Files {
                cache_bytes: Some(1),
                ..s3()
            })
            .contains("from 1048576 to")
        );
    }

    #[test]
    fn a_directory_is_one_nodes_own_unless_it_is_said_to_be_shared() {
        let mut files = Files::default();
        assert!(!files.place(Path::new("/etc")).unwrap().is_shared());
        files.shared = true;
        assert!(files.place(Path::new("/etc")).unwrap().is_shared());
        assert!(s3().place(Path::new("/etc")).unwrap().is_shared());
    }

    #[test]
    fn the_environment_stands_above_the_file() {
        let env = |name: &str| {
            let value = match name {
                "FWPUSH_FILES_URL" => "s3://other",
                "FWPUSH_FILES_CACHE_BYTES" => "2097152",
                "FWPUSH_FILES_SECRET_KEY_FILE" => "/run/secrets/s3",
                "FWPUSH_FILES_ALLOW_HTTP" => "false",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let mut files = Files {
            allow_http: true,
            ..s3()
        };
        files.overlay(env).unwrap();
        let FilesPlace::S3(place) = files.place(Path::new("/etc")).unwrap() else {
            panic!("no bucket")
        };
        assert_eq!(
            (place.to_string().as_str(), place.cache_bytes),
            ("s3://other", 2 << 20)
        );
        assert_eq!(place.secret_key_file, Path::new("/run/secrets/s3"));
        assert_eq!(place.access_key_id, "id");
        assert!(!place.allow_http);
        let wrong = files.overlay(|name| (name == "FWPUSH_FILES_SHARED").then(|| "yes".to_owned()));
        assert!(
            wrong
                .unwrap_err()
                .to_string()
                .contains("FWPUSH_FILES_SHARED")
        );
    }
}
