//! The wire of fwpush: everything here is generated from `proto/fwpush/v1/*.proto`, which hold the documentation.
#![forbid(unsafe_code)]

/// Package `fwpush.v1`.
#[allow(
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("fwpush.v1");

    /// The compiled descriptors, for gRPC server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/fwpush.v1.bin"));
}

#[cfg(test)]
mod tests;
