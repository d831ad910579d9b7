"""TIFF files of every kind of sample, written from the specification (TIFF 6.0) rather than by the decoder's library."""

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def packed(rows: npt.NDArray[Any], bits: int, order: str) -> bytes:
    """Return rows (H, N) of samples as bytes. Each row starts at a byte."""
    if bits in (8, 16, 32):
        return rows.astype(f"{order}{rows.dtype.kind}{bits // 8}").tobytes()
    digits = (rows[..., None].astype(np.uint32) >> np.arange(bits - 1, -1, -1, dtype=np.uint32)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def tiff(
    samples: npt.NDArray[Any],
    bits: int = 8,
    photometric: int = 1,
    order: str = "<",
    planar: bool = False,
    tile: int = 0,
    compressed: bool = False,
    big: bool = False,
    sample_format: int = 1,
    tags: Sequence[tuple[int, int, Sequence[int] | bytes]] = (),
) -> bytes:
    """Return a TIFF.

    Args:
        samples: (H, W, C).
        bits: Bits per sample.
        photometric: Photometric interpretation.
        order: Byte order, as in struct.
        planar: Whether each channel is stored by itself.
        tile: Side of square tiles; 0 for one strip.
        compressed: Whether to compress with deflate.
        big: Whether to write a BigTIFF.
        sample_format: 1 unsigned, 2 signed, 3 floating-point.
        tags: Further entries: tag, type, and values.
    """
    height, width, channels = samples.shape
    planes = [samples[..., i : i + 1] for i in range(channels)] if planar else [samples]
    blocks = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            for top in range(0, height, tile):
                blocks += [padded[top : top + tile, left : left + tile] for left in range(0, width, tile)]
        else:
            blocks.append(plane)
    data = [packed(block.reshape(len(block), -1), bits, order) for block in blocks]
    data = [zlib.compress(block) for block in data] if compressed else data
    head = 16 if big else 8
    offsets = [head + sum(map(len, data[:i])) for i in range(len(data))]
    sizes = [len(block) for block in data]
    entries: dict[int, tuple[int, Sequence[int] | bytes]] = {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, [bits] * channels),
        259: (3, [8 if compressed else 1]),
        262: (3, [photometric]),
        277: (3, [channels]),
        284: (3, [2 if planar else 1]),
        339: (3, [sample_format] * channels),
    }
    entries |= (
        {322: (3, [tile]), 323: (3, [tile]), 324: (4, offsets), 325: (4, sizes)}
        if tile
        else {273: (4, offsets), 278: (3, [height]), 279: (4, sizes)}
    )
    entries |= {tag: (kind, values) for tag, kind, values in tags}
    return with_entries(b"".join(data), entries, order, big)


def with_entries(data: bytes, entries: dict[int, tuple[int, Sequence[int] | bytes]], order: str, big: bool) -> bytes:
    """Return a TIFF of pixel data and a directory, after which values follow that do not fit into it."""
    head, width, count, number = (16, 8, "Q", "Q") if big else (8, 4, "I", "H")
    start = head + len(data) + len(data) % 2
    table, after = b"", b""
    values_at = start + struct.calcsize(f"={number}") + len(entries) * (4 + 2 * width) + width
    for tag, (kind, values) in sorted(entries.items()):
        text = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{'BBHI'[kind - 1]}", *values)
        field = text.ljust(width, b"\0")
        if len(text) > width:
            field = struct.pack(f"{order}{count}", values_at + len(after))
            after += text
        table += struct.pack(f"{order}HH{count}", tag, kind, len(values)) + field
    signature = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    first = struct.pack(f"{order}HHQ", 8, 0, start) if big else struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}{number}", len(entries)) + table + bytes(width)
    return signature + first + data + bytes(len(data) % 2) + directory + after
