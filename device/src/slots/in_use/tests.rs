use super::*;

/// A `/proc` and `/sys` with the disk 8:0, its partitions 8:1 and 8:2, and nothing in use.
struct Machine {
    folder: tempfile::TempDir,
    kernel: Kernel,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = Kernel {
            proc: folder.path().join("proc"),
            sys: folder.path().join("sys"),
        };
        let machine = Self { folder, kernel };
        machine.file("proc/self/mountinfo", "22 1 259:1 / / rw - ext4 none rw\n");
        machine.file("proc/swaps", "Filename Type Size Used Priority\n");
        let disk = "sys/devices/disk/block/sda";
        machine.file(&format!("{disk}/dev"), "8:0\n");
        for number in [1, 2] {
            let part = format!("{disk}/sda{number}");
            machine.file(&format!("{part}/dev"), &format!("8:{number}\n"));
            machine.file(&format!("{part}/partition"), "1\n");
            fs::create_dir_all(machine.path(&format!("{part}/holders"))).unwrap();
            machine.link(&part, &format!("sys/dev/block/8:{number}"));
        }
        machine.link(disk, "sys/dev/block/8:0");
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn link(&self, to: &str, name: &str) {
        let name = self.path(name);
        fs::create_dir_all(name.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(self.path(to), name).unwrap();
    }

    fn user_of_device(&self, minor: u32) -> Option<String> {
        let number = rustix::fs::makedev(8, minor);
        self.kernel
            .user_of(Identity::BlockDevice { number })
            .unwrap()
    }

    fn user_of_file(&self, name: &str) -> Option<String> {
        let metadata = fs::metadata(self.path(name)).unwrap();
        self.kernel.user_of(Identity::of(&metadata)).unwrap()
    }
}

#[test]
fn a_device_that_nobody_uses_is_free() {
    let machine = Machine::new();
    for minor in 0..3 {
        assert_eq!(machine.user_of_device(minor), None);
    }
}

#[test]
fn a_mounted_partition_is_in_use_and_so_is_its_disk_but_not_its_neighbour() {
    let machine = Machine::new();
    let mounts = "22 1 259:1 / / rw - ext4 none rw\n40 22 8:1 / /mnt/my\\040data rw shared:3 - ext4 none rw\n";
    machine.file("proc/self/mountinfo", mounts);
    let user = Some("it is mounted at /mnt/my data".to_owned());
    assert_eq!(machine.user_of_device(1), user);
    assert_eq!(machine.user_of_device(0), user);
    assert_eq!(machine.user_of_device(2), None);
}

#[test]
fn a_partition_of_a_mounted_disk_is_in_use() {
    let machine = Machine::new();
    machine.file(
        "proc/self/mountinfo",
        "40 22 8:0 / /mnt rw - vfat none rw\n",
    );
    assert!(machine.user_of_device(2).is_some());
}

#[test]
fn a_device_below_another_is_in_use() {
    let machine = Machine::new();
    fs::create_dir_all(machine.path("sys/dev/block/8:2/holders/dm-3")).unwrap();
    assert_eq!(
        machine.user_of_device(2).unwrap(),
        "the device dm-3 is built on it"
    );
    assert_eq!(machine.user_of_device(1), None);
}

#[test]
fn a_file_below_a_loop_device_is_in_use_by_whatever_name() {
    let machine = Machine::new();
    machine.file("slot b.img", "image");
    machine.file("other.img", "image");
    fs::hard_link(machine.path("slot b.img"), machine.path("linked.img")).unwrap();
    let backing = format!("{}\n", machine.path("linked.img").display());
    machine.file("sys/block/loop3/loop/backing_file", &backing);
    machine.file("sys/block/sda/size", "1");
    assert_eq!(
        machine.user_of_file("slot b.img").unwrap(),
        "the loop device loop3 is built on it"
    );
    assert_eq!(machine.user_of_file("other.img"), None);
}

#[test]
fn swap_space_is_in_use() {
    let machine = Machine::new();
    machine.file("my swap", "");
    let path = machine.path("my swap").display().to_string();
    let swaps = format!(
        "Filename Type Size Used Priority\n{} file 9 0 -2\n",
        path.replace(' ', "\\040")
    );
    machine.file("proc/swaps", &swaps);
    assert_eq!(machine.user_of_file("my swap").unwrap(), "it is swap space");
}

#[test]
fn what_the_kernel_does_not_tell_is_an_error_and_not_free() {
    let machine = Machine::new();
    fs::remove_file(machine.path("proc/self/mountinfo")).unwrap();
    let number = rustix::fs::makedev(8, 1);
    assert!(
        machine
            .kernel
            .user_of(Identity::BlockDevice { number })
            .is_err()
    );
}

/// The file system that the test's own files are on, as a number.
fn device_of(machine: &Machine) -> (u64, String) {
    let number = fs::metadata(machine.path("")).unwrap().dev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    (number, format!("sys/dev/block/{major}:{minor}"))
}

#[test]
fn a_folder_lies_on_the_device_of_its_file_system() {
    let machine = Machine::new();
    let (number, _) = device_of(&machine);
    let on = |number| {
        machine
            .kernel
            .lies_on(&machine.path("sys"), Identity::BlockDevice { number })
            .unwrap()
    };
    assert!(on(number));
    assert!(!on(rustix::fs::makedev(8, 1)));
}

#[test]
fn a_folder_on_a_device_that_is_built_on_a_slot_lies_on_the_slot() {
    let machine = Machine::new();
    let (_, folder) = device_of(&machine);
    // The file system lies on a crypt device, that on md, that on 8:2.
    machine.link("sys/devices/md", &format!("{folder}/slaves/md0"));
    machine.file("sys/devices/md/dev", "9:0\n");
    machine.link("sys/devices/md", "sys/dev/block/9:0");
    machine.link(
        "sys/devices/disk/block/sda/sda2",
        "sys/devices/md/slaves/sda2",
    );
    let on = |minor| {
        let number = rustix::fs::makedev(8, minor);
        machine
            .kernel
            .lies_on(&machine.path("sys"), Identity::BlockDevice { number })
            .unwrap()
    };
    assert!(
        on(2) && on(0),
        "the slot, and the disk that it is a part of"
    );
    assert!(!on(1));
}

#[test]
fn a_folder_on_a_loop_device_lies_on_the_file_below_it() {
    let machine = Machine::new();
    let (_, folder) = device_of(&machine);
    machine.file("slot.img", "");
    machine.file("other.img", "");
    let backing = format!("{}\n", machine.path("slot.img").display());
    machine.file(&format!("{folder}/loop/backing_file"), &backing);
    let on = |name: &str| {
        let slot = Identity::of(&fs::metadata(machine.path(name)).unwrap());
        machine.kernel.lies_on(&machine.path("sys"), slot).unwrap()
    };
    assert!(on("slot.img"));
    assert!(!on("other.img"));
}
