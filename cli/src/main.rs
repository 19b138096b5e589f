//! `fwpush`: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    fwpush_cli::main(std::env::args_os())
}
