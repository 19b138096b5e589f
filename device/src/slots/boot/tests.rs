use super::*;

fn boot(line: &str) -> Result<SlotId, String> {
    let folder = tempfile::tempdir().unwrap();
    let [file, boot_id] = ["cmdline", "boot_id"].map(|name| folder.path().join(name));
    fs::write(&file, line).unwrap();
    fs::write(&boot_id, "6c1a7a3e-6a2f-4d0e-9e1e-0e3f0f1d2c3b\n").unwrap();
    let command_line = CommandLine {
        key: "root".into(),
        values: ["PARTLABEL=rootfs-a".into(), "PARTLABEL=rootfs-b".into()],
        file,
        boot_id,
    };
    let boot = command_line.read().map_err(|error| error.to_string())?;
    assert_eq!(boot.id, "6c1a7a3e-6a2f-4d0e-9e1e-0e3f0f1d2c3b");
    Ok(boot.running)
}

#[test]
fn the_command_line_names_the_slot() {
    assert_eq!(
        boot("console=ttyS0 root=PARTLABEL=rootfs-b ro\n"),
        Ok(SlotId::B)
    );
    assert_eq!(
        boot("x=\"a root=PARTLABEL=rootfs-b\" root=\"PARTLABEL=rootfs-a\""),
        Ok(SlotId::A)
    );
    assert_eq!(
        boot("root=PARTLABEL=rootfs-a root=PARTLABEL=rootfs-a"),
        Ok(SlotId::A)
    );
}

#[test]
fn a_command_line_that_names_no_slot_another_or_both_is_an_error_that_says_what_to_do() {
    assert!(
        boot("console=ttyS0 nfsroot=PARTLABEL=rootfs-a")
            .unwrap_err()
            .contains("bootloader")
    );
    assert!(
        boot("root=/dev/nfs")
            .unwrap_err()
            .contains("PARTLABEL=rootfs-a")
    );
    assert!(
        boot("root=PARTLABEL=rootfs-a root=PARTLABEL=rootfs-b")
            .unwrap_err()
            .contains("both slots")
    );
    assert!(boot("").is_err());
}

#[test]
fn the_kernel_of_this_machine_has_a_boot_id() {
    let default = CommandLine::default();
    assert_eq!(boot_id(&default.boot_id).unwrap().len(), 36);
}
