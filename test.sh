#!/usr/bin/env bash
# Runs the whole test suite. Installs from the distribution what the tests need and is missing.
#
#   ./test.sh                everything
#   ./test.sh --no-install   install nothing; name what is skipped instead
#   ./test.sh -- PATTERN     only tests whose name contains PATTERN
set -euo pipefail
cd "$(dirname "$0")"

install=yes
while [ $# -gt 0 ]; do
  case $1 in
    --no-install) install=no ;;
    --) shift; break ;;
    -h | --help) sed -n '2,6p' "$0" | cut -c3-; exit 0 ;;
    *) echo "test.sh: unknown option $1 (see ./test.sh --help)" >&2; exit 2 ;;
  esac
  shift
done

# Command or pattern of files, Debian package, what it is for.
needs=(
  "cc gcc builds SQLite and the TLS library"
  "openssl openssl checks our keys and certificates against another implementation"
  "jq jq the tour of the README reads JSON with it"
  "b3sum b3sum checks our file ids against another implementation"
  "losetup mount slots on block devices"
  "mkfs.ext4 e2fsprogs slots that are mounted, and GRUB's disk"
  "mkimage u-boot-tools the U-Boot example"
  "qemu-system-aarch64 qemu-system-arm the U-Boot example runs in it"
  "/usr/lib/u-boot/qemu_arm64/u-boot.bin u-boot-qemu the U-Boot example"
  "grub-editenv grub-common the GRUB example"
  "grub-emu grub-emu the GRUB example runs in it"
  "script bsdutils gives GRUB and the operator's commands a terminal"
  "rauc rauc the RAUC example"
  "dbus-daemon dbus-daemon the RAUC example has a bus of its own"
  "mksquashfs squashfs-tools bundles of the RAUC example"
  "swupdate swupdate the SWUpdate example"
  "fw_setenv libubootenv-tool the SWUpdate example"
  "cpio cpio images of the SWUpdate example"
  "/usr/lib/$(uname -m)-linux-gnu/faketime/libfaketime.so.1 libfaketime agents whose clock is wrong or steps"
  "/usr/lib/postgresql/*/bin/initdb postgresql the server's other database"
  "redis-server redis-server what nodes of a cluster tell one another"
  "haproxy haproxy the front of a cluster"
)
missing=()
for need in "${needs[@]}"; do
  read -r command package reason <<<"$need"
  if command -v "$command" >/dev/null || compgen -G "$command" >/dev/null; then continue; fi
  if [ "$install" = no ]; then
    echo "test.sh: $command is missing ($reason): tests that need it are skipped" >&2
  else
    echo "test.sh: $command is missing ($reason): installing the package $package" >&2
    missing+=("$package")
  fi
done
# What no package brings.
skips() { echo "test.sh: $1: tests that need it are skipped" >&2; }
if [ "$(id -u)" != 0 ]; then
  skips "not root, who makes loop devices and mounts file systems (slots on block devices, full and failing disks)"
elif command -v losetup >/dev/null && ! losetup -f >/dev/null 2>&1; then
  skips "no loop devices here (slots on block devices, full and failing disks)"
fi
if [ "$(cat /proc/sys/kernel/yama/ptrace_scope 2>/dev/null || echo 0)" = 3 ]; then
  skips "no ptrace here (agents killed at each system call)"
fi
if [ ${#missing[@]} -gt 0 ]; then
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi
command -v cargo >/dev/null || { echo "test.sh: cargo is missing; install Rust 1.95 or newer" >&2; exit 2; }

# The end-to-end tests run the real binaries. Built together with the tests, dependencies are compiled once.
cargo build --locked --workspace --all-targets
export FWPUSH_BINARIES_ARE_BUILT=1
if command -v cargo-nextest >/dev/null; then
  cargo nextest run --locked --workspace --no-fail-fast "$@"
  cargo test --locked --workspace --doc --quiet
else
  cargo test --locked --workspace --no-fail-fast -- "$@"
fi
