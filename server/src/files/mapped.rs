//! The one module that maps files.
#![allow(
    unsafe_code,
    reason = "mapping a file is unsafe: another process could change it; the store's files are immutable"
)]

use std::{fs::File, io};

use bytes::Bytes;
use memmap2::{Advice, Mmap};

/// The whole content of a file as `Bytes` that share its mapping; slices of it cost no copy and keep it alive.
///
/// The store writes a file once, under a temporary name in a directory that only the server can enter, and never again;
/// a mapped file that another process truncated would end the server with SIGBUS.
pub fn map(file: &File) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the file is a finished file of the store, which nothing writes to or truncates (see above).
    let map = unsafe { Mmap::map(file)? };
    // Downloads read in order; the kernel may read ahead and drop what lies behind.
    if let Err(error) = map.advise(Advice::Sequential) {
        tracing::debug!(%error, "The kernel took no advice on a mapping.");
    }
    Ok(Bytes::from_owner(map))
}
