use super::*;

#[test]
fn what_is_read_from_the_medium_is_what_was_written_at_any_offset() {
    let folder = tempfile::tempdir().unwrap();
    let file = RealDisk.create(&folder.path().join("file")).unwrap();
    let content: Vec<u8> = (0..300_001_u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9) >> 16) as u8)
        .collect();
    file.write_at(&content, 0).unwrap();
    file.sync().unwrap();
    file.forget_cached().unwrap();
    for (offset, length) in [
        (0, 300_001),
        (0, 1),
        (1, 4096),
        (4095, 2),
        (65_536, 65_536),
        (299_999, 2),
        (300_001, 0),
    ] {
        let mut buffer = vec![0; length];
        file.read_medium_at(&mut buffer, offset as u64).unwrap();
        assert_eq!(
            buffer,
            content[offset..offset + length],
            "{offset}, {length}"
        );
    }
    let past = file.read_medium_at(&mut [0; 2], 300_000).unwrap_err();
    assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn an_identity_follows_the_file_and_not_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let first = RealDisk.create(&one).unwrap();
    RealDisk.create(&two).unwrap();
    RealDisk.rename(&two, &one).unwrap();
    let named = RealDisk.open(&one, Access::Read).unwrap();
    assert_ne!(first.identity().unwrap(), named.identity().unwrap());
}
