//! `fwpush-bench`: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    fwpush_bench::main(std::env::args_os())
}
