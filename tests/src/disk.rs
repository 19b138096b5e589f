//! A file system of a test's own, on a loop device: one that can be full, and one that can fail.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

/// An ext4 file system, mounted until it is dropped. As many boards have it, it turns read-only at the first error.
#[derive(Debug)]
pub struct LoopDisk {
    device: String,
    mount_point: PathBuf,
    mounted: bool,
}

impl LoopDisk {
    /// Makes a file system of `bytes` in the file `backing` and mounts it.
    ///
    /// `None`, with the reason printed: this machine does not let the test do that. It takes root, losetup and mkfs.ext4.
    pub fn mount(backing: &Path, bytes: u64, mount_point: &Path) -> Option<Self> {
        File::create(backing).unwrap().set_len(bytes).unwrap();
        fs::create_dir_all(mount_point).unwrap();
        let backing = backing.to_str().unwrap();
        let made = tool("mkfs.ext4", &["-q", backing])
            .and_then(|_| tool("losetup", &["-f", "--show", backing]));
        let device = match made {
            Ok(device) => device,
            Err(reason) => {
                println!("SKIPPED: no file system can be made here: {reason}");
                return None;
            }
        };
        let mut disk = Self {
            device,
            mount_point: mount_point.to_owned(),
            mounted: false,
        };
        match disk.mount_again() {
            Ok(()) => Some(disk),
            Err(reason) => {
                println!("SKIPPED: no file system can be mounted here: {reason}");
                None
            }
        }
    }

    /// Fails: the kernel finds an error in the file system, and nothing more is written to it. What was not made durable by
    /// then is lost; what the test itself has written is kept.
    pub fn fail(&self) {
        let root = File::open(&self.mount_point).unwrap();
        rustix::fs::syncfs(&root).unwrap();
        let name = Path::new(&self.device).file_name().unwrap();
        let trigger = Path::new("/sys/fs/ext4")
            .join(name)
            .join("trigger_fs_error");
        fs::write(&trigger, "a test")
            .unwrap_or_else(|error| panic!("{}: {error}", trigger.display()));
        let refused = File::create(self.mount_point.join("probe")).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }

    /// What a board does when it comes up again: checks it, repairs it, mounts it. Nothing may be open on it.
    pub fn repair(&mut self) {
        self.unmount().unwrap();
        // Exit code 1: there was something to repair.
        let check = Command::new("e2fsck")
            .args(["-fy", &self.device])
            .output()
            .unwrap();
        assert!(check.status.code() <= Some(1), "{check:?}");
        self.mount_again().unwrap();
    }

    /// Takes all the room that is left, to the last block.
    pub fn fill(&self) {
        let mut options = File::options();
        let mut filler = options
            .create(true)
            .append(true)
            .open(self.filler())
            .unwrap();
        loop {
            let before = filler.metadata().unwrap().len();
            for chunk in [64 << 10, 512] {
                let full = loop {
                    if let Err(error) = filler.write_all(&vec![1; chunk]) {
                        break error;
                    }
                };
                assert_eq!(full.kind(), io::ErrorKind::StorageFull);
            }
            // What was set aside for it and turned out not to be needed is there for others.
            filler.sync_all().unwrap();
            if filler.metadata().unwrap().len() == before {
                return;
            }
        }
    }

    /// Gives some of the room back that [`Self::fill`] took.
    pub fn make_room(&self, bytes: u64) {
        let filler = File::options().write(true).open(self.filler()).unwrap();
        let taken = filler.metadata().unwrap().len();
        filler.set_len(taken.checked_sub(bytes).unwrap()).unwrap();
        filler.sync_all().unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.mount_point.join("filler")
    }

    fn mount_again(&mut self) -> Result<(), String> {
        let options = ["-o", "errors=remount-ro"];
        let place = self.mount_point.to_str().unwrap();
        tool("mount", &[options[0], options[1], &self.device, place])?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        tool("umount", &[self.mount_point.to_str().unwrap()])?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.mounted {
            // A test that failed may have left a process on it; it is gone from sight, and with that process altogether.
            let _ = self.unmount().or_else(|_| {
                let place = self.mount_point.to_str().unwrap();
                tool("umount", &["--lazy", place]).map(drop)
            });
        }
        let _ = tool("losetup", &["-d", &self.device]);
    }
}

/// Runs a program; gives what it printed, or why it failed.
fn tool(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program}: {complaint}"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
