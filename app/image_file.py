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


_CHEAP_FORMATS = ("JPEG", "PNG", "WEBP")


class BrokenHeader(Exception):
    """The file does not contain the size of its image."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, without metadata, within the limits above.

    Attributes:
        data: Bytes of the file.
        format: Pillow's name of the format, if this module reads it: JPEG, PNG, WEBP or TIFF; otherwise None.
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
            self.format in _CHEAP_FORMATS
            and self.size is not None
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
    if data[:1] in _BEFORE_MAGIC:
        data = _without_text_before(data)
    if data.startswith(JPEG):
        return _read_jpeg(data)
    if data.startswith(PNG):
        return _read_png(data)
    if data.startswith(_TIFFS):
        return _read_tiff(data)
    size = _webp_size(data)
    return ImageFile(data) if size is None else ImageFile(data, "WEBP", size)


_BOM = b"\xef\xbb\xbf"
_BEFORE_MAGIC = (b"\xef", b"\r", b"\n", b" ", b"\t")
MAX_TEXT_BEFORE = 64
"""Bytes of line ends, spaces and byte order marks that scripts and proxies write before an image."""


def _without_text_before(data: bytes) -> bytes:
    """Remove line ends, spaces and byte order marks before the signature of an image."""
    head = data[:MAX_TEXT_BEFORE]
    rest = head.lstrip(b"\r\n \t")
    while rest.startswith(_BOM):
        rest = rest[len(_BOM) :].lstrip(b"\r\n \t")
    return data[len(head) - len(rest) :] if rest.startswith(SIGNATURES) else data


_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_WITHOUT_LENGTH = {0x01, *range(0xD0, _SOS)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_ARITHMETIC_FRAMES = range(0xC9, 0xD0)
_EXIF, _XMP = b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0"


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
            return _jpeg(data, segments, start, frame, metadata_orientation(exif, xmp))
        at = found.end() if marker in _WITHOUT_LENGTH else found.end() + max(2, _u16(data, found.end()))
        content = data[found.end() + 2 : at]
        if marker in _FRAMES:
            if frame is not None:
                raise Unprocessable("the image is damaged: it has more than one frame header")
            frame = bytes([marker]) + content
        elif marker == _APP1 and content.startswith(_EXIF):
            exif = exif or content[len(_EXIF) + 1 :]
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
    image_chunks = [_with_scaled_level(chunk, chunks[1]) for chunk in chunks if chunk[4:8] != b"eXIf"]
    if image_chunks != chunks or sum(map(len, chunks)) != len(data):  # something is changed or omitted
        data = b"".join(image_chunks)
    return ImageFile(data, "PNG", (width, height), orientation=metadata_orientation(exif, b""))


_LEVEL_STEPS = {b"\2\0": 85, b"\4\0": 17}
"""255 / (2^bits - 1) by bit depth and color type, for grayscale of 2 and 4 bits."""

_RGB_16 = b"\x10\2"


def _with_scaled_level(chunk: bytes, header: bytes) -> bytes:
    """Return a chunk in which the transparent gray level, if it has one, is of 8 bits, as Pillow compares it.

    Raises Unprocessable for a transparent color of 16 bits per sample, which Pillow compares with 8 bits.
    """
    kind = header[16:18]
    if chunk[4:8] != b"tRNS" or kind not in (*_LEVEL_STEPS, _RGB_16):
        return chunk
    if kind == _RGB_16:
        raise Unprocessable(
            "the image is a PNG with 16 bits per sample and a transparent color, which cannot be read: save it with an alpha "
            "channel, or with 8 bits per sample"
        )
    level = _u16(chunk, 8) % (1 << kind[0]) * _LEVEL_STEPS[kind]
    content = b"tRNS" + level.to_bytes(2, "big")
    return struct.pack(">I", 2) + content + struct.pack(">I", crc32(content))


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


_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
SIGNATURES = (JPEG, PNG, b"RIFF", b"GIF8", b"BM", *_TIFFS)

MAX_ENTRIES = 4096
"""Entries of a TIFF directory."""

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 256, 257, 258, 262, 274, 277
_PLANES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 284, 338, 339
_PIXEL_TAGS = frozenset(
    (
        *(_WIDTH, _HEIGHT, _BITS, 259, _PHOTOMETRIC, 266, 273, _SAMPLES, 278, 279, _PLANES, 292, 293, 317, 320),
        *(322, 323, 324, 325, 332, _EXTRA_SAMPLES, _SAMPLE_FORMAT, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521),
        *(529, 530, 531, 532),
    )
)
"""Tags of TIFF that define pixels (TIFF 6.0): size, samples, compression, strips, tiles, palette, JPEG and YCbCr."""


@dataclass(frozen=True)
class _Photometric:
    """A photometric interpretation: its name, its samples per pixel, and the bits per sample that Pillow reads."""

    name: str
    samples: int
    bits: tuple[int, ...]


_PHOTOMETRICS = {
    0: _Photometric("grayscale in which 0 is white", 1, (1, 2, 4, 8, 16)),
    1: _Photometric("grayscale", 1, (1, 2, 4, 8, 12, 16)),
    2: _Photometric("RGB", 3, (8, 16)),
    3: _Photometric("a palette", 1, (1, 2, 4, 8)),
    5: _Photometric("CMYK", 4, (8, 16)),
    6: _Photometric("YCbCr", 3, (8,)),
    8: _Photometric("CIELab", 3, (8,)),
}
_LITTLE_ENDIAN_ONLY = ((0, 16), (1, 12))
"""Photometric interpretation and bits per sample that Pillow reads in one byte order."""

_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_UNSPECIFIED = 0
_CIELAB, _SEPARATE_PLANES = 8, 2


@dataclass(frozen=True)
class _Directory:
    """The first directory of a TIFF.

    Attributes:
        order: Byte order, as in struct.
        entries: Tag, type, number of values, and the field with the values or their offset; one of each tag.
        data: The file.
    """

    order: str
    entries: dict[int, tuple[int, int, bytes]]
    data: bytes

    @property
    def is_big(self) -> bool:
        """Whether the file is a BigTIFF, with offsets of 64 bits."""
        return self.data[2:4] in (b"+\0", b"\0+")

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Return the values of a tag, at most 64; empty if it is missing, damaged or no integer."""
        kind, count, field = self.entries.get(tag, (0, 0, b""))
        if kind not in _INTEGERS or not 0 < count <= 64:
            return ()
        size = struct.calcsize(f"={count}{_INTEGERS[kind]}")
        if size > len(field):
            offset = int.from_bytes(field, "little" if self.order == "<" else "big")
            field = self.data[offset : offset + size]
        return struct.unpack_from(f"{self.order}{count}{_INTEGERS[kind]}", field) if len(field) >= size else ()

    def number(self, tag: int, default: int = 0) -> int:
        """Return the first value of a tag."""
        return next(iter(self.numbers(tag)), default)


_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}
"""Types of TIFF that are integers, as in struct."""


def _read_directory(data: bytes) -> _Directory | None:
    """Read the first directory of a TIFF or BigTIFF; None if it is damaged. Raises Unprocessable if it has too many entries."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    start_at, offset, number, entry = (8, "Q", "Q", "HHQ8s") if is_big else (4, "I", "H", "HHI4s")
    try:
        (start,) = struct.unpack_from(f"{order}{offset}", data, start_at)
        (count,) = struct.unpack_from(f"{order}{number}", data, start)
    except (struct.error, OverflowError):
        return None
    if count > MAX_ENTRIES:
        raise Unprocessable(f"the image has more than {MAX_ENTRIES:,} tags: save it again without metadata")
    start += struct.calcsize(f"={number}")
    size = struct.calcsize(f"={entry}")
    table = data[start : start + size * count]
    entries: dict[int, tuple[int, int, bytes]] = {}
    for tag, *values in struct.iter_unpack(f"{order}{entry}", table[: len(table) // size * size]):
        entries.setdefault(tag, tuple(values))
    return _Directory(order, entries, data)


def _read_tiff(data: bytes) -> ImageFile:
    """Replace the first directory by one of only the tags that define pixels. Samples that mean nothing are no alpha channel.

    Raises:
        BrokenHeader: There is no directory with a size.
        Unprocessable: The samples have no defined range.
    """
    directory = _read_directory(data)
    if directory is None or not (directory.number(_WIDTH) and directory.number(_HEIGHT)):
        raise BrokenHeader
    samples = directory.number(_SAMPLES, 1)
    photometric = _check_samples(directory)
    entries = {tag: entry for tag, entry in directory.entries.items() if tag in _PIXEL_TAGS}
    extra = samples - photometric.samples
    if _EXTRA_SAMPLES not in entries and 0 < extra <= 4:
        entries[_EXTRA_SAMPLES] = (3, extra, struct.pack(f"{directory.order}4H", *(_UNSPECIFIED,) * 4))
    if samples == 1:
        entries.pop(_PLANES, None)  # Pillow reads the one plane wrongly
    size = directory.number(_WIDTH), directory.number(_HEIGHT)
    orientation = _orientation(directory) or 1
    return ImageFile(_with_directory(directory, entries), "TIFF", size, orientation=orientation)


def _check_samples(directory: _Directory) -> _Photometric:
    """Return the photometric interpretation. Raises Unprocessable unless Pillow reads its samples correctly."""
    bits, sample_format = max(directory.numbers(_BITS), default=1), directory.number(_SAMPLE_FORMAT, _UNSIGNED)
    kind = {_SIGNED: "signed integer", _FLOAT: "floating-point"}.get(sample_format, "integer" if bits > 16 else "")
    if kind:
        raise Unprocessable(
            f"the image has {bits}-bit {kind} samples, which have no defined range: send 8 or 16 bits per sample, unsigned"
        )
    number = directory.number(_PHOTOMETRIC)
    photometric = _PHOTOMETRICS.get(number, _Photometric(f"photometric interpretation {number}", 1, ()))
    is_big_endian = directory.order == ">"
    if (
        bits not in photometric.bits
        or (is_big_endian and ((number, bits) in _LITTLE_ENDIAN_ONLY or directory.is_big))
        or (number == _CIELAB and directory.number(_PLANES) == _SEPARATE_PLANES)
    ):
        order = " in big-endian byte order" if is_big_endian else ""
        raise Unprocessable(
            f"the image is a {'BigTIFF' if directory.is_big else 'TIFF'} of {photometric.name} with {bits} bits per sample"
            f"{order}, which cannot be read: save it as RGB or grayscale with 8 bits per sample"
        )
    return photometric


def _with_directory(directory: _Directory, entries: dict[int, tuple[int, int, bytes]]) -> bytes:
    """Return the file of a directory with these entries instead, after its other data."""
    order, data = directory.order, directory.data
    is_big = directory.is_big
    start = len(data) + len(data) % 2
    width = 8 if is_big else 4
    table = b"".join(
        struct.pack(f"{order}HH{'Q' if is_big else 'I'}", tag, kind, count) + field[:width].ljust(width, b"\0")
        for tag, (kind, count, field) in sorted(entries.items())
    )
    head = data[:8] + struct.pack(f"{order}Q", start) if is_big else data[:4] + struct.pack(f"{order}I", start)
    number = struct.pack(f"{order}{'Q' if is_big else 'H'}", len(entries))
    return b"".join((head, memoryview(data)[len(head) :], bytes(start - len(data)), number, table, bytes(width)))


def metadata_orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation, 1 to 8, that EXIF or else XMP metadata contains; 1 if there is none."""
    if exif.startswith(_EXIF):
        exif = exif[len(_EXIF) + 1 :]
    return _exif_orientation(exif) or _xmp_orientation(xmp) or 1


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF metadata, a TIFF file, of which nothing else is read."""
    if not exif.startswith(_TIFFS):
        return None
    try:
        directory = _read_directory(exif)
    except Unprocessable:  # the pixels do not depend on it
        return None
    return None if directory is None else _orientation(directory)


def _orientation(directory: _Directory) -> int | None:
    """Return the orientation of a directory. Writers also store it as a byte, a long or a digit in ASCII."""
    kind, count, field = directory.entries.get(_ORIENTATION, (0, 0, b""))
    is_text = kind == 2 and 0 < count <= len(field) and field[:1].isdigit()
    orientation = int(field[:1]) if is_text else directory.number(_ORIENTATION)
    return orientation if 1 <= orientation <= 8 else None


def _xmp_orientation(xmp: bytes) -> int | None:
    found = re.search(rb"""tiff:Orientation(?:\s?=\s?["']|>\s?)([1-8])""", xmp)
    return int(found[1]) if found else None
