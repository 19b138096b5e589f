# fwpush with U-Boot: chooses the slot by the boot record (docs/boot-record.md) and boots it.
#
#   mkimage -A arm64 -T script -C none -n fwpush -d boot.cmd boot.scr
#
# Needs CONFIG_CMD_SETEXPR, CMD_ITEST, CMD_CRC32, CMD_PART, CMD_MEMORY and a device with blocks of 512 bytes: eMMC, SD, virtio.
# agent.toml beside this file is the agent's side of it.
#
# What a board may set before it runs this script:
#   devtype, devnum   where the slots are; distro boot sets them         (mmc, 0)
#   fw_ram            8 KiB and a little for the record                  (loadaddr)
#   fw_start          first block of the record, in hex                  (the partition named bootrec)
#   fw_boot           boots ${fw_slot}, returns if it cannot             (a FIT image from the partition named rootfs-a or -b)
#   fw_none           what to do when nothing may be booted              (nothing: ends up at the prompt)

test -n "${devtype}" || setenv devtype mmc
test -n "${devnum}" || setenv devnum 0
test -n "${fw_ram}" || setenv fw_ram ${loadaddr}
test -n "${fw_start}" || part start ${devtype} ${devnum} bootrec fw_start
test -n "${fw_boot}" || setenv fw_boot 'part number ${devtype} ${devnum} rootfs-${fw_slot} fw_part; setenv bootargs ${bootargs} root=PARTLABEL=rootfs-${fw_slot} fwpush.slot=${fw_slot}; load ${devtype} ${devnum}:${fw_part} ${kernel_addr_r} /boot/fitImage && bootm ${kernel_addr_r}'

setexpr fw_copy2 ${fw_ram} + 1000
setexpr fw_sum ${fw_ram} + 2000

${devtype} dev ${devnum}
setenv fw_copy
setenv fw_seq 0
if ${devtype} read ${fw_ram} ${fw_start} 9; then
  for fw_at in ${fw_ram} ${fw_copy2}; do
    setexpr fw_magic2 ${fw_at} + 4
    # "FWPB" "OOT1"
    if itest.l *${fw_at} == 42505746 && itest.l *${fw_magic2} == 31544f4f; then
      crc32 ${fw_at} 200 ${fw_sum}
      # The CRC of a whole valid copy is 2144df1c, always. Some builds of U-Boot store it as a number, some big-endian.
      if itest.l *${fw_sum} == 2144df1c || itest.l *${fw_sum} == 1cdf4421; then
        setexpr fw_seq_at ${fw_at} + 8
        setexpr.l fw_this *${fw_seq_at}
        if itest 0x${fw_this} > 0x${fw_seq}; then
          setenv fw_seq ${fw_this}
          setenv fw_copy ${fw_at}
          setenv fw_swap
          itest.l *${fw_sum} == 1cdf4421 && setenv fw_swap 1
        fi
      fi
    fi
  done
fi

setenv fw_slot
setenv fw_tries_at
if test -n "${fw_copy}"; then
  setexpr fw_at ${fw_copy} + 10
  setexpr.b fw_preferred *${fw_at}
  setexpr fw_at ${fw_copy} + 20
  setexpr.b fw_a *${fw_at}
  setexpr fw_a_tries_at ${fw_copy} + 21
  setexpr.b fw_a_tries *${fw_a_tries_at}
  setexpr fw_at ${fw_copy} + 108
  setexpr.b fw_b *${fw_at}
  setexpr fw_b_tries_at ${fw_copy} + 109
  setexpr.b fw_b_tries *${fw_b_tries_at}
  # 0 unbootable, 1 on trial, 2 confirmed. The slot that is not preferred stands last: it comes first.
  if itest ${fw_a} == 1 && itest 0x${fw_a_tries} > 0; then
    setenv fw_slot a
    setenv fw_tries_at ${fw_a_tries_at}
    setenv fw_tries ${fw_a_tries}
  fi
  if itest ${fw_b} == 1 && itest 0x${fw_b_tries} > 0; then
    setenv fw_slot b
    setenv fw_tries_at ${fw_b_tries_at}
    setenv fw_tries ${fw_b_tries}
  fi
  if test -z "${fw_slot}"; then
    if itest ${fw_a} == 2; then
      setenv fw_slot a
    fi
    # 62 is "b".
    if itest ${fw_b} == 2; then
      if itest ${fw_preferred} == 62 || test -z "${fw_slot}"; then
        setenv fw_slot b
      fi
    fi
  fi
else
  # A new device: the agent makes the record, with this slot confirmed.
  echo "fwpush: no valid boot record; booting slot a"
  setenv fw_slot a
fi

setenv fw_taken 1
if test -n "${fw_tries_at}"; then
  # Take a try: in the other copy, durably, before the image gets to run.
  setexpr fw_tries 0x${fw_tries} - 1
  mw.b ${fw_tries_at} ${fw_tries} 1
  setexpr fw_seq 0x${fw_seq} + 1
  setexpr fw_seq_at ${fw_copy} + 8
  mw.l ${fw_seq_at} ${fw_seq} 1
  setexpr fw_crc ${fw_copy} + 1fc
  crc32 ${fw_copy} 1fc ${fw_sum}
  if test -n "${fw_swap}"; then
    # Big-endian, as it has shown above.
    for fw_i in 0 1 2 3; do
      setexpr fw_from ${fw_sum} + ${fw_i}
      setexpr.b fw_byte *${fw_from}
      setexpr fw_to ${fw_crc} + 3
      setexpr fw_to ${fw_to} - ${fw_i}
      mw.b ${fw_to} ${fw_byte} 1
    done
  else
    cp.b ${fw_sum} ${fw_crc} 4
  fi
  setenv fw_block ${fw_start}
  if itest ${fw_copy} == ${fw_ram}; then
    setexpr fw_block ${fw_start} + 8
  fi
  echo "fwpush: slot ${fw_slot} is on trial; boots left after this one: ${fw_tries} (hex)"
  ${devtype} write ${fw_copy} ${fw_block} 1 || setenv fw_taken
fi

if test -z "${fw_taken}"; then
  # An image whose boots are not counted may hang for ever.
  echo "fwpush: the boot record cannot be written"
  reset
elif test -n "${fw_slot}"; then
  echo "fwpush: booting slot ${fw_slot}"
  run fw_boot
  # It could not be loaded: the next try, or the confirmed slot.
  echo "fwpush: slot ${fw_slot} cannot be loaded"
  test -n "${fw_tries_at}" && reset
  setenv fw_other a
  test "${fw_slot}" = a && setenv fw_other b
  setenv fw_other_state ${fw_a}
  test "${fw_other}" = b && setenv fw_other_state ${fw_b}
  if test "${fw_other_state}" = 2; then
    setenv fw_slot ${fw_other}
    echo "fwpush: booting slot ${fw_slot}"
    run fw_boot
  fi
fi
echo "fwpush: no slot can be booted"
test -n "${fw_none}" && run fw_none
