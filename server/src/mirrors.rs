//! Where else a file is, for the notices of devices whose configuration allows it.
//!
//! A mirror needs no trust: a device verifies what comes from it as it does what comes from us.

use std::sync::Arc;

use fwpush_keys::{id::FileId, time::Timestamp};
use fwpush_proto::v1;
use url::Url;

use crate::{files::FileStore, limits};

/// The mirrors of this installation; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Mirrors {
    /// Begins the URL of each file, without a slash at its end.
    prefix: Option<Arc<str>>,
    /// The store, where it is one that signs URLs for devices.
    presigns: Option<FileStore>,
}

/// What is wrong with a `mirror_url`, in words that follow on its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPrefix {
    #[error(
        "must be `https://HOST/PATH`, under which each file is found as in the store: `ab/abcd...`"
    )]
    Url,
    #[error("may have no user, password, query or fragment: it is told to every device")]
    Parts,
    #[error("has more than {} bytes", limits::MIRROR_PREFIX_BYTES)]
    Long,
}

impl Mirrors {
    /// `prefix`: the URL under which a CDN has the files of the store, or none. `presigns`: the store, where devices may be
    /// told URLs that it signs.
    pub fn new(prefix: Option<&str>, presigns: Option<FileStore>) -> Result<Self, BadPrefix> {
        let prefix = prefix.map(checked).transpose()?;
        Ok(Self { prefix, presigns })
    }

    /// Where else the file is, the best place first: the CDN, which is nearer, then the bucket.
    pub async fn of(&self, file: &FileId, now: Timestamp) -> Vec<v1::Mirror> {
        let mut mirrors = self.under_prefix(file, now);
        mirrors.extend(self.presigned(file).await);
        mirrors
    }

    /// Signing needs no answer of the bucket. The URL is a secret: it goes to the device and nowhere else.
    async fn presigned(&self, file: &FileId) -> Option<v1::Mirror> {
        match self.presigns.as_ref()?.presign(file).await {
            Ok(signed) => signed.map(|signed| v1::Mirror {
                url: signed.url,
                expires_at_ms: signed.expires.as_ms(),
            }),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "A URL of the bucket could not be signed; devices are told of none."
                );
                None
            }
        }
    }

    fn under_prefix(&self, file: &FileId, now: Timestamp) -> Vec<v1::Mirror> {
        let expires = now.saturating_add(limits::MIRROR_LIFE);
        let id = file.to_string();
        let told = |prefix: &Arc<str>| v1::Mirror {
            url: format!("{prefix}/{}/{id}", &id[..2]),
            expires_at_ms: expires.as_ms(),
        };
        self.prefix.iter().map(told).collect()
    }
}

fn checked(prefix: &str) -> Result<Arc<str>, BadPrefix> {
    if prefix.len() > limits::MIRROR_PREFIX_BYTES {
        return Err(BadPrefix::Long);
    }
    let url = Url::parse(prefix).map_err(|_| BadPrefix::Url)?;
    if url.scheme() != "https" || url.host_str().is_none_or(str::is_empty) {
        return Err(BadPrefix::Url);
    }
    let bare = url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    if !bare {
        return Err(BadPrefix::Parts);
    }
    // As the parser writes it: devices compare the host byte by byte.
    Ok(url.as_str().trim_end_matches('/').into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_found_under_the_prefix_as_in_the_store() {
        let file = FileId::of(b"an image");
        let id = file.to_string();
        let now = Timestamp::from_ms(1_000);
        for (prefix, expected) in [
            ("https://CDN.example", "https://cdn.example"),
            ("https://cdn.example/", "https://cdn.example"),
            ("https://cdn.example:443/fw/", "https://cdn.example/fw"),
            (
                "https://[2001:db8::7]:8443/a/b",
                "https://[2001:db8::7]:8443/a/b",
            ),
        ] {
            let mirrors = Mirrors::new(Some(prefix), None)
                .unwrap()
                .of(&file, now)
                .await;
            assert_eq!(mirrors.len(), 1);
            assert_eq!(mirrors[0].url, format!("{expected}/{}/{id}", &id[..2]));
            assert!(mirrors[0].expires_at_ms > now.as_ms());
        }
        assert!(
            Mirrors::new(None, None)
                .unwrap()
                .of(&file, now)
                .await
                .is_empty()
        );
    }

    #[test]
    fn a_prefix_that_devices_would_not_use_or_that_has_a_secret_is_refused() {
        for (prefix, expected) in [
            ("http://cdn.example/fw", BadPrefix::Url),
            ("cdn.example/fw", BadPrefix::Url),
            ("", BadPrefix::Url),
            ("https://", BadPrefix::Url),
            ("https://user@cdn.example/fw", BadPrefix::Parts),
            ("https://user:word@cdn.example/fw", BadPrefix::Parts),
            ("https://cdn.example/fw?token=x", BadPrefix::Parts),
            ("https://cdn.example/fw#x", BadPrefix::Parts),
        ] {
            assert_eq!(
                Mirrors::new(Some(prefix), None).unwrap_err(),
                expected,
                "{prefix:?}"
            );
        }
        let long = format!(
            "https://cdn.example/{}",
            "x".repeat(limits::MIRROR_PREFIX_BYTES)
        );
        assert_eq!(
            Mirrors::new(Some(&long), None).unwrap_err(),
            BadPrefix::Long
        );
    }
}
