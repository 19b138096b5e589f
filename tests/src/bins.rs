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
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("tests/ lies in the workspace");
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.current_dir(workspace).args([
            "build",
            "--quiet",
            "--locked",
            "--workspace",
            "--bins",
        ]);
        if dir.file_name().is_some_and(|profile| profile == "release") {
            build.arg("--release");
        }
        let built = build.status().expect("cargo runs");
        assert!(built.success(), "the binaries do not build");
        dir
    });
    let path = dir.join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}
