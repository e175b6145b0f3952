#!/usr/bin/env bash
# Run the CPU kernels for AVX-512 or AMX in an emulator and compare them, bit for bit, with those for AVX2 and with a
# model of the tile instructions: for machines that lack them. Takes some minutes.
#
#   same_bits.sh avx512|amx
#
# Needs g++, bochs with its rfb display, isolinux, syslinux-common and xorriso. For AMX it is Bochs 3.0, configured with
# --enable-amx, and mended: as released it takes the signed bytes of the tile products for unsigned ones. Before it is
# built, in its directory:
#
#   sed -i 's/Bit32s(\([xy]byte\[[0-3]\]\))/Bit32s(Bit8s(\1))/g' cpu/avx/amx.cc
#
# BOCHS is the program, BOCHS_SHARE where its BIOS is, LIMIT_S the seconds it may take.
set -euo pipefail
case "${1:-}" in
  avx512) cpu=corei7_icelake_u ;;
  amx) cpu=sapphire_rapids ;;
  *) echo "usage: $0 avx512|amx" >&2; exit 2 ;;
esac
level=$1
cd "$(dirname "$0")"
sources=../../libs/trireme/kernels/csrc/cpu
model=../tile_model
bochs=${BOCHS:-bochs}
share=${BOCHS_SHARE:-/usr/share/bochs}
limit_s=${LIMIT_S:-900}
out=$(mktemp -d)
trap '[ -z "${emulator:-}" ] || kill "$emulator" 2>/dev/null || true; rm -rf "$out"' EXIT

flags=(-std=c++17 -w -I "$sources" -I "$model" -ffreestanding -ffp-contract=off -fno-pic -fno-pie -mno-red-zone -fno-stack-protector
  -fcf-protection=none -fno-exceptions -fno-rtti -fno-asynchronous-unwind-tables -mcmodel=small)
avx512=(-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma)
compile() { g++ "${flags[@]}" "${@:2}" -c "$1" -o "$out/$(basename "$1" .cpp).o"; }
gcc -c boot.S -o "$out/boot.o"
compile "$sources/avx2.cpp" -O3 -mavx2 -mfma
if [ "$level" = amx ]; then
  compile same_bits.cpp -O1 -fno-tree-loop-distribute-patterns -DTRIREME_AMX
  compile "$sources/amx.cpp" -O3 "${avx512[@]}" -mamx-tile -mamx-int8 -mamx-bf16
  compile amx_instructions.cpp -O1 -mamx-tile -mamx-int8 -mamx-bf16
  compile "$model/model_kernels.cpp" -O2 -mavx2 -mfma
  compile model_instructions.cpp -O2 -mavx2 -mfma
else
  compile same_bits.cpp -O1 -fno-tree-loop-distribute-patterns
  compile "$sources/avx512.cpp" -O3 "${avx512[@]}"
fi
ld --no-warn-rwx-segments -n -T image.ld "$out"/*.o -o "$out/image64"
mkdir -p "$out/disk/isolinux"
objcopy -O elf32-i386 "$out/image64" "$out/disk/image"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/{ldlinux,mboot,libcom32}.c32 "$out/disk/isolinux"
printf 'default t\nlabel t\n kernel mboot.c32\n append /image\n' >"$out/disk/isolinux/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$out/disk.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$out/disk" 2>"$out/xorriso.txt"

cat >"$out/machine" <<END
megs: 256
cpu: model=$cpu, count=1, ips=200000000
romimage: file=$share/BIOS-bochs-latest
vgaromimage: file=$share/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$out/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$out/serial.txt
display_library: rfb, options="timeout=0"
log: $out/log.txt
panic: action=fatal
END
if [[ "$("$bochs" --help features 2>&1)" == *sb16* ]]; then
  echo "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy" >>"$out/machine"
fi
# A Bochs with a debugger waits for a command before it starts.
commands=()
if [[ "$("$bochs" --help 2>&1)" == *" -rc "* ]]; then
  echo c >"$out/commands"
  commands=(-rc "$out/commands")
fi
"$bochs" -q -f "$out/machine" "${commands[@]}" >"$out/bochs.txt" 2>&1 </dev/null &
emulator=$!
until grep -q '^end' "$out/serial.txt" 2>/dev/null; do
  kill -0 "$emulator" 2>/dev/null || { tail -n 20 "$out/bochs.txt" "$out/log.txt" >&2; exit 1; }
  [ "$SECONDS" -lt "$limit_s" ] || { echo "no end after $limit_s s" >&2; exit 1; }
  sleep 1
done
cat "$out/serial.txt"
grep -q 'different: 0$' "$out/serial.txt"
