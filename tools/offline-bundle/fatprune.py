#!/usr/bin/env python3
"""Shrink a CUDA shared object to the device code one architecture can use, in place and at the same size.

Every fat binary keeps its offset; images of other architectures (and PTX) are replaced by zeros, which compress away.

usage: fatprune.py IN.so OUT.so [ARCH]      ARCH: 90 by default (Hopper)
"""

import struct
import sys
from pathlib import Path

MAGIC = 0xBA55ED50
CUBIN = 2


def sections(blob):
    """Yield (name, offset, size) of each ELF64 section."""
    (table,) = struct.unpack_from("<Q", blob, 0x28)
    (count,) = struct.unpack_from("<H", blob, 0x3C)
    (names,) = struct.unpack_from("<H", blob, 0x3E)
    rows = [struct.unpack_from("<IIQQQQIIQQ", blob, table + 64 * i) for i in range(count)]
    for row in rows:
        start = rows[names][4] + row[0]
        yield bytes(blob[start : blob.index(b"\0", start)]).decode(), row[4], row[5]


def fatbins(blob, start, end):
    """Yield (header offset, header size, payload size) of each fat binary in [start, end)."""
    at = start
    while at + 16 <= end:
        magic, _, header, payload = struct.unpack_from("<IHHQ", blob, at)
        if magic != MAGIC:
            at += 8
            continue
        yield at, header, payload
        at += header + payload


def images(blob, at, header, payload):
    """Yield (kind, architecture, raw bytes) of each image in one fat binary."""
    entry, end = at + header, at + header + payload
    while entry + 32 <= end:
        kind, _, head, size = struct.unpack_from("<HHIQ", blob, entry)
        (arch,) = struct.unpack_from("<I", blob, entry + 28)
        if head < 32 or entry + head + size > end:
            raise SystemExit(f"unreadable image at {entry:#x}: head {head}, size {size}")
        yield kind, arch, bytes(blob[entry : entry + head + size])
        entry += head + size


def main():
    source, target = sys.argv[1:3]
    keep = int(sys.argv[3]) if len(sys.argv) > 3 else 90
    blob = bytearray(Path(source).read_bytes())
    total = kept = 0
    for name, start, size in list(sections(blob)):
        if name not in (".nv_fatbin", "__nv_relfatbin"):
            continue
        bins = list(fatbins(blob, start, start + size))
        # A fat binary with nothing usable must still hold one image: the smallest unusable one.
        filler = min(
            (raw for b in bins for kind, arch, raw in images(blob, *b) if kind == CUBIN and arch // 10 != keep // 10),
            key=len,
            default=b"",
        )
        for at, header, payload in bins:
            found = list(images(blob, at, header, payload))
            exact = [raw for kind, arch, raw in found if kind == CUBIN and arch == keep]
            family = [raw for kind, arch, raw in found if kind == CUBIN and arch // 10 == keep // 10]
            out = b"".join(exact or family) or filler
            if len(out) > payload:
                continue
            total, kept = total + payload, kept + len(out)
            blob[at + header : at + header + payload] = out + bytes(payload - len(out))
            struct.pack_into("<Q", blob, at + 8, len(out))
    Path(target).write_bytes(blob)
    print(f"{source}: device code {total / 1e6:.1f} MB, kept {kept / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
