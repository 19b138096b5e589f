//! Compiles the `.proto` files in pure Rust (protox); no protoc is needed on the machine.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 4] = [
    "fwpush/v1/push.proto",
    "fwpush/v1/file_transfer.proto",
    "fwpush/v1/node.proto",
    "fwpush/v1/admin.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("fwpush.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Images and envelopes pass through as slices of the receive buffer, never copied.
        .bytes(".")
        // The generated constructor named `connect` would collide with the RPC `Connect`.
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
