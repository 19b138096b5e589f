//! The project's own binaries, built once for all tests.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Path of a binary of this workspace: `fwpush`, `fwpush-device` or `device-sim`.
pub fn bin(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let dir = BUILT.get_or_init(|| {
        // target/<profile>/deps/e2e-... -> target/<profile>
        let exe = env::current_exe().expect("the test has a path");
        let dir = exe
            .ancestors()
            .nth(2)
            .expect("the test lies in deps/")
            .to_owned();
        // test.sh has built them: with it, a run of each test in a process of its own does not ask cargo each time.
        if env::var_os("FWPUSH_BINARIES_ARE_BUILT").is_none() {
            build(&dir);
        }
        dir
    });
    let path = dir.join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// Builds with the tests, so that dependencies have the same features and are compiled once.
fn build(dir: &Path) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace");
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let args = [
        "build",
        "--quiet",
        "--locked",
        "--workspace",
        "--all-targets",
    ];
    build.current_dir(workspace).args(args);
    if dir.file_name().is_some_and(|profile| profile == "release") {
        build.arg("--release");
    }
    let built = build.status().expect("cargo runs");
    assert!(built.success(), "the binaries do not build");
}
