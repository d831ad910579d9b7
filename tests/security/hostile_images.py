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


class BitWriter:
    """Writes numbers bit by bit, the least significant first, as Deflate and WebP have them."""

    def __init__(self) -> None:
        self._bits = self._count = 0
        self._bytes = bytearray()

    def write(self, value: int, count: int) -> None:
        self._bits |= value << self._count
        self._count += count
        while self._count >= 8:
            self._bytes.append(self._bits & 255)
            self._bits >>= 8
            self._count -= 8

    def content(self) -> bytes:
        return bytes(self._bytes) + bytes([self._bits] if self._count else [])


def webp_huffman_tables(side: int) -> bytes:
    """Return a lossless WebP (RFC 9649) of a square with a set of Huffman tables for every 16 pixels, up to 65,536."""
    writer = BitWriter()
    for value, count in ((0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (1, 1), (0, 3), (0, 1)):
        writer.write(value, count)
    for alphabet in (280, 256):  # literals of 8 bits each
        writer.write(0, 1)
        writer.write(8, 4)
        for symbol in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8):
            writer.write(symbol in (0, 8), 3)
        writer.write(0, 1)
        for symbol in range(alphabet):
            writer.write(symbol < 256, 1)

    def constant() -> None:  # a table of one symbol
        writer.write(1, 1)
        writer.write(0, 3)

    for _ in range(3):
        constant()
    blocks = ((side + 3) // 4) ** 2
    groups = min(blocks, 65_536)
    for block in range(blocks):
        group = min(block, groups - 1)
        for byte in (group & 255, group >> 8):
            writer.write(int(f"{byte:08b}"[::-1], 2), 8)
    for _ in range(5 * groups):
        constant()
    data = writer.content() + bytes(64)
    data += bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def deflate_without_output(size: int) -> bytes:
    """Return a zlib stream (RFC 1950) of about this many bytes, of blocks that contain their end only."""

    def write_block(writer: BitWriter, is_last: bool) -> None:
        for value, count in ((is_last, 1), (2, 2), (29, 5), (29, 5), (14, 4)):
            writer.write(value, count)
        lengths = {18: 1, 0: 2, 1: 2}
        for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
            writer.write(lengths.get(symbol, 0), 3)
        for zeros in ((138, 117), (29,), (29,)):  # codes of one bit for 0, 256 and the first distance
            writer.write(3, 2)
            for count in zeros:
                writer.write(0, 1)
                writer.write(count - 11, 7)
        writer.write(1, 1)  # the end of the block

    period = BitWriter()
    for _ in range(8):  # as many bits as whole bytes
        write_block(period, False)
    last = BitWriter()
    write_block(last, True)
    blocks = period.content()
    return b"\x78\x9c" + blocks * (size // len(blocks)) + last.content() + (1).to_bytes(4, "big")
