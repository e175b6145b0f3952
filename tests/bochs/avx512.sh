#!/usr/bin/env bash
# Run the AVX-512 CPU kernels in an emulator and compare them with those for AVX2, bit for bit: for machines that have
# no AVX-512. Takes some minutes. Needs g++, bochs 2.7 with its rfb display, isolinux, syslinux-common and xorriso.
set -euo pipefail
cd "$(dirname "$0")"
sources=../../libs/trireme/kernels/csrc/cpu
limit_s=${LIMIT_S:-900}
out=$(mktemp -d)
trap '[ -z "${emulator:-}" ] || kill "$emulator" 2>/dev/null || true; rm -rf "$out"' EXIT

flags=(-std=c++17 -w -I "$sources" -ffreestanding -ffp-contract=off -fno-pic -fno-pie -mno-red-zone -fno-stack-protector
  -fcf-protection=none -fno-exceptions -fno-rtti -fno-asynchronous-unwind-tables -mcmodel=small)
gcc -c boot.S -o "$out/boot.o"
g++ "${flags[@]}" -O1 -fno-tree-loop-distribute-patterns -c same_bits.cpp -o "$out/same_bits.o"
g++ "${flags[@]}" -O3 -mavx2 -mfma -c "$sources/avx2.cpp" -o "$out/avx2.o"
g++ "${flags[@]}" -O3 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma \
  -c "$sources/avx512.cpp" -o "$out/avx512.o"
ld --no-warn-rwx-segments -n -T image.ld "$out"/{boot,same_bits,avx2,avx512}.o -o "$out/image64"
mkdir -p "$out/disk/isolinux"
objcopy -O elf32-i386 "$out/image64" "$out/disk/image"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/{ldlinux,mboot,libcom32}.c32 "$out/disk/isolinux"
printf 'default t\nlabel t\n kernel mboot.c32\n append /image\n' >"$out/disk/isolinux/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$out/disk.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$out/disk" 2>"$out/xorriso.txt"

cat >"$out/machine" <<END
megs: 256
cpu: model=corei7_icelake_u, count=1, ips=200000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$out/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$out/serial.txt
display_library: rfb, options="timeout=0"
log: $out/log.txt
panic: action=fatal
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
END
echo c >"$out/commands"
bochs -q -f "$out/machine" -rc "$out/commands" >"$out/bochs.txt" 2>&1 </dev/null &
emulator=$!
until grep -q '^end' "$out/serial.txt" 2>/dev/null; do
  kill -0 "$emulator" 2>/dev/null || { tail -n 20 "$out/bochs.txt" "$out/log.txt" >&2; exit 1; }
  [ "$SECONDS" -lt "$limit_s" ] || { echo "no end after $limit_s s" >&2; exit 1; }
  sleep 1
done
cat "$out/serial.txt"
grep -q 'different: 0$' "$out/serial.txt"
