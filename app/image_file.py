"""The structure of image files: what is checked, and removed, before a decoder reads a file.

The decoders of Pillow parse headers in Python and accept any number of segments, chunks and scans. Here these numbers are
limited, and metadata that does not define pixels is removed, which takes microseconds for an ordinary file.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from dinat.app.errors import Unprocessable

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

MAX_SEGMENTS = 1000
"""Segments of a JPEG before its first scan: enough for 64 MB of metadata."""

MAX_JUNK_BYTES = 64 * 2**10
"""Bytes between the segments of a JPEG."""

MAX_SCANS = 100
"""Scans of a JPEG. Encoders write about ten; each one is a pass over all pixels."""

MAX_CHUNKS = 10_000
"""Chunks of a PNG."""

CHEAP_PIXELS = 2_000_000
CHEAP_SIDE = 2**16
CHEAP_LOSSLESS_PIXELS = 2**16
CHEAP_BYTES = 2 * 2**20
CHEAP_SCANNED_PIXELS = 20_000_000
"""Limits of an image that is certain to be cheap to decode and resize. Tables for resizing are proportional to the longer side;
scanned pixels are the number of pixels times the number of scans.
"""


class BrokenHeader(Exception):
    """The file does not contain the size of its image."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, without metadata, within the limits above.

    Attributes:
        data: Bytes of the file.
        format: Pillow's name of the format, if this module reads it: JPEG, PNG or WEBP; otherwise None.
        size: (width, height) in pixels by the header; None for other formats.
        scans: Largest possible number of passes over the pixels.
        orientation: Orientation as in EXIF, 1 to 8, which the image does not have applied; None if the decoder reads it.
        is_arithmetic: Whether the pixels are arithmetic-coded, which is slow to decode.
    """

    data: bytes
    format: str | None = None
    size: tuple[int, int] | None = None
    scans: int = 1
    orientation: int | None = None
    is_arithmetic: bool = False

    @property
    def pixels(self) -> int | None:
        """Width times height, if known."""
        return None if self.size is None else self.size[0] * self.size[1]

    @property
    def is_cheap(self) -> bool:
        """Whether decoding is certain to be cheap: some 0.1 s of CPU time, and 50 MB of memory, at most."""
        return (
            self.size is not None
            and self.pixels is not None
            and self.pixels <= CHEAP_PIXELS
            and max(self.size) <= CHEAP_SIDE
            and self.pixels * self.scans <= CHEAP_SCANNED_PIXELS
            and len(self.data) <= CHEAP_BYTES
            and not self.is_arithmetic
            and not self._has_many_huffman_tables
        )

    @property
    def _has_many_huffman_tables(self) -> bool:
        """Whether this may be a lossless WebP with a set of Huffman tables for every 16 pixels: 65,536 sets take 3 s."""
        assert self.pixels is not None
        return self.format == "WEBP" and self.data[12:16] != b"VP8 " and self.pixels > CHEAP_LOSSLESS_PIXELS


def read_structure(data: bytes) -> ImageFile:
    """Check the structure of a file, and remove its metadata.

    Raises:
        BrokenHeader: The file does not contain the size of its image.
        Unprocessable: A limit is exceeded, or the file is damaged.
    """
    if data.startswith(JPEG):
        return _read_jpeg(data)
    if data.startswith(PNG):
        return _read_png(data)
    size = _webp_size(data)
    return ImageFile(data) if size is None else ImageFile(data, "WEBP", size)


_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_WITHOUT_LENGTH = {0x01, *range(0xD0, _SOS)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_ARITHMETIC_FRAMES = range(0xC9, 0xD0)
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def _read_jpeg(data: bytes) -> ImageFile:
    """See ITU-T T.81, annex B. Of the metadata, the decoder needs JFIF's (APP0) and Adobe's (APP14), for the color space."""
    segments = [data[:2]]
    exif = xmp = b""
    frame: bytes | None = None
    at, junk = 2, 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at, at + MAX_JUNK_BYTES - junk + 2)
        if found is None:
            break
        junk += found.start() - at
        start, marker = found.start(), data[found.start() + 1]
        if marker == _SOS:
            if frame is None:
                raise BrokenHeader
            return _jpeg(data, segments, start, frame, _exif_orientation(exif) or _xmp_orientation(xmp) or 1)
        at = found.end() if marker in _WITHOUT_LENGTH else found.end() + max(2, _u16(data, found.end()))
        content = data[found.end() + 2 : at]
        if marker in _FRAMES:
            if frame is not None:
                raise Unprocessable("the image is damaged: it has more than one frame header")
            frame = bytes([marker]) + content
        elif marker == _APP1 and content.startswith(_EXIF):
            exif = exif or content[len(_EXIF) :]
        elif marker == _APP1 and content.startswith(_XMP):
            xmp = content[len(_XMP) :]
        if not (_APP0 < marker <= _APP15 or marker == _COMMENT) or marker == _APP14:
            segments.append(data[start:at])
    else:
        raise Unprocessable(f"the image has more than {MAX_SEGMENTS:,} segments: save it again without metadata")
    if len(data) - at > MAX_JUNK_BYTES - junk:
        raise Unprocessable(f"the image is damaged: more than {MAX_JUNK_BYTES:,} bytes between its segments")
    if frame is None:
        raise BrokenHeader
    raise Unprocessable("the image is damaged: the file ends before its pixels")


def _jpeg(data: bytes, segments: list[bytes], first_scan: int, frame: bytes, orientation: int) -> ImageFile:
    """Return a JPEG of these segments. `frame` is the marker and the content of the frame header."""
    components = data[first_scan + 4 : first_scan + 5]
    if sum(map(len, segments)) != first_scan:  # something is omitted
        data = b"".join([*segments, memoryview(data)[first_scan:]])
    scans = 1
    if frame[0] not in _SEQUENTIAL_FRAMES or components != frame[6:7]:  # otherwise the decoder stops after the first scan
        scans = data.count(b"\xff\xda")  # an upper bound: the bytes may also be part of a table, or follow the image
        if scans > MAX_SCANS and _exceeds_max_scans(data, sum(map(len, segments))):
            raise Unprocessable(f"the image has more than {MAX_SCANS} scans: save it again as a baseline JPEG")
    return ImageFile(data, "JPEG", (_u16(frame, 4), _u16(frame, 2)), scans, orientation, frame[0] in _ARITHMETIC_FRAMES)


def _exceeds_max_scans(data: bytes, at: int) -> bool:
    """Return whether a JPEG has too many scans, or too many other segments between them. `at` is its first scan."""
    scans = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER_IN_SCAN.search(data, at)
        if found is None or data[found.start() + 1] == _EOI:
            return False
        scans += data[found.start() + 1] == _SOS
        if scans > MAX_SCANS:
            return True
        at = found.end() if data[found.start() + 1] in _WITHOUT_LENGTH else found.end() + _u16(data, found.end())
    return True


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def _read_png(data: bytes) -> ImageFile:
    chunks = list(_png_image_chunks(data))
    if len(chunks) < 2 or len(chunks[1]) < 16 or chunks[1][4:8] != b"IHDR":
        raise BrokenHeader
    if sum(chunk[4:8] == b"IHDR" for chunk in chunks) > 1:
        raise Unprocessable("the image is damaged: it has more than one header")
    width, height = struct.unpack(">II", chunks[1][8:16])
    exif = next((chunk[8:-4] for chunk in chunks if chunk[4:8] == b"eXIf"), b"")
    if exif or sum(map(len, chunks)) != len(data):  # something is omitted
        data = b"".join(chunk for chunk in chunks if chunk[4:8] != b"eXIf")
    return ImageFile(data, "PNG", (width, height), orientation=_exif_orientation(exif) or 1)


def _png_image_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the signature and the chunks of a PNG that define its pixels, without text and other ancillary chunks.

    See the PNG specification, section 5.4. Raises Unprocessable if the checksum of an IDAT chunk is wrong; Pillow does not
    check that of the last one.
    """
    yield PNG
    start = len(PNG)
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data):
            return
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):  # an uppercase first letter marks a critical chunk
            if (
                kind == b"IDAT"
                and end <= len(data)
                and crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")
            ):
                raise Unprocessable("the image is damaged: the checksum of its data is wrong")
            yield data[start:end]
            if kind == b"IEND":
                return  # what follows is no part of the image
        start = end
    if start + 8 <= len(data):
        raise Unprocessable(f"the image has more than {MAX_CHUNKS:,} chunks: save it again with larger ones")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a WebP (RFC 9649, sections 2.5 to 2.7), or None if its header is not complete."""
    if len(data) < 30 or not data.startswith(b"RIFF") or data[8:12] != b"WEBP":
        return None
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None


def metadata_orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation, 1 to 8, that EXIF or else XMP metadata contains; 1 if there is none."""
    return _exif_orientation(exif.removeprefix(_EXIF)) or _xmp_orientation(xmp) or 1


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF metadata, a TIFF file, of which nothing else is read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    entries = exif[start + 2 : start + 2 + 12 * count]
    for tag, kind, number, value in struct.iter_unpack(f"{order}HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == 0x0112 and kind == 3 and number == 1:
            (orientation,) = struct.unpack_from(f"{order}H", value)
            return orientation if 1 <= orientation <= 8 else None
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else None
