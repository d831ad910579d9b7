"""Small files that are expensive to decode, or that require much memory."""

import io
import re
import struct
import zlib
from itertools import repeat

from PIL import Image

from tests.app.sample_images import encoded


def jpeg_scans(scans: int, side: int) -> bytes:
    """Return a progressive JPEG of a gray square that has this many further AC scans, each of a few bytes."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    start = starts[1]
    end = min(found.start() for found in re.finditer(rb"\xff[\xc4\xda\xd9]", data) if found.start() > start)
    return data[:-2] + data[start:end] * scans + data[-2:]


def jpeg_junk(size: int, junk: bytes = b"\0") -> bytes:
    return b"\xff\xd8\xff" + junk * size


def jpeg_segments(count: int, kind: int = 0xFE, content: bytes = b"") -> bytes:
    """Return a JPEG with this many additional segments, comments by default."""
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    segment = bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content
    return data[:2] + segment * count + data[2:]


def exif_directory(entries: int, size: int) -> bytes:
    """Return EXIF metadata whose entries all have a value of `size` bytes: the same bytes of the file."""
    values = 8 + 2 + 12 * entries + 4
    table = b"".join(struct.pack("<HHII", 0x8000 + n, 1, size, values) for n in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + table + bytes(4) + bytes(size)


def png_chunks(count: int) -> bytes:
    """Return a PNG whose pixels are in this many chunks, each empty."""
    data = encoded(Image.new("L", (8, 8)))
    at = data.index(b"IDAT") - 4
    return data[:at] + (struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))) * count + data[at:]


def gif_comments(blocks: int) -> bytes:
    """Return a GIF with a comment of this many blocks, which Pillow joins one by one."""
    data = encoded(Image.new("L", (8, 8)).convert("P"), "GIF")
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:at] + b"\x21\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0" + data[at:]


def bmp_rle(side: int) -> bytes:
    """Return a BMP whose rows end after their first pixel, which Pillow fills one pixel at a time, in Python."""
    pixels = b"\x01\x00\x00\x00" * side + b"\x00\x01"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + len(head) + 4 * 256
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + bytes(4 * 256) + pixels


def tiff_directory(entries: int, size: int) -> bytes:
    """Return a TIFF with this many unknown tags, whose values are all the same `size` bytes."""
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "TIFF")
    tiff = data.getvalue()
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    known = tiff[start + 2 : start + 2 + 12 * count]
    new = len(tiff)
    values = new + 2 + 12 * (count + entries) + 4
    unknown = b"".join(struct.pack("<HHII", 40000 + n, 7, size, values) for n in range(entries))
    return (
        tiff[:4]
        + struct.pack("<I", new)
        + tiff[8:]
        + struct.pack("<H", count + entries)
        + known
        + unknown
        + bytes(4)
        + bytes(size)
    )


def narrow_png(width: int) -> bytes:
    """Return a PNG of one row of black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = b"".join(compressor.compress(part) for part in repeat(bytes(4096), width // 4096))
    row += compressor.compress(bytes(width % 4096 + 1)) + compressor.flush()
    head = struct.pack(">IIBBBBB", width, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
