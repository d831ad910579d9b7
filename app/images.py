"""Uploaded bytes to a checked picture."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from zlib import crc32

from PIL import Image, ImageOps, UnidentifiedImageError, features

from dinat.app.errors import NoImage, TooLarge, Unprocessable, UnsupportedImage
from dinat.model.image_processor import to_rgb

ALWAYS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is always read. Pillow reads more, much of it seldom tried by anybody: a hostile file has fewer ways in."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Of files that are taken for pictures where a folder is searched."""

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: AVIF too where Pillow has it, HEIF with the extra heif."""
    more = ["AVIF"] if features.check("avif") else []
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        pass
    else:
        more.append("HEIF")
    return (*ALWAYS, *more)


def decode(data: bytes, max_pixels: int, draft: tuple[int, int] | None = None) -> Image.Image:
    """The first frame of a picture as RGB, turned as its EXIF says.

    draft: (width, height) that are enough: a JPEG of twice that or more is halved while it is decoded, which is faster and not
    the same to the bit.  The number of pixels is checked from the header, before anything is decoded.  What browsers forgive is
    forgiven: text in a PNG, however long or broken, and a JPEG that lacks its end marker and nothing else.
    Raises NoImage (no bytes), UnsupportedImage, TooLarge, Unprocessable (damaged).
    """
    if not data:
        raise NoImage("the picture is empty: send the bytes of a picture")
    if data.startswith(PNG):
        data = b"".join(_png_picture(data))
    try:
        return _decode(data, max_pixels, draft)
    except _DAMAGED as error:
        whole = _with_end(data, max_pixels, draft)
        if whole is None:
            raise Unprocessable(f"the picture is damaged: {error}") from error
        return whole


def _decode(data: bytes, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image:
    """As `decode`, of what has no fault that is forgiven. Raises what Pillow's decoders raise, too."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError:
        raise UnsupportedImage(f"{what_it_is(data)}: read are {', '.join(formats())}") from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise TooLarge(f"the picture has {image.width}x{image.height} = {pixels:,} pixels, at most {max_pixels:,} are taken")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # older Pillows open a PNG of 16 bits as I
        kind = "floating point numbers" if image.mode == "F" else "whole numbers of 32 bits"
        raise Unprocessable(
            f"the picture's samples are {kind}, and nothing says which of them is white: send 8 or 16 bits a sample"
        )
    if draft is not None:
        image.draft("RGB", draft)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def _png_picture(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG that make its picture; the others, text among them, are not looked at (PNG specification, 5.4).

    Raises Unprocessable where the picture's data are not what they were: of its last chunk Pillow does not see that.
    """
    yield PNG
    at = len(PNG)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):  # a capital letter: critical
            if (
                kind == b"IDAT"
                and end <= len(data)
                and crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")
            ):
                raise Unprocessable("the picture is damaged: its data do not agree with their checksum")
            yield data[at:end]
        at = end


def _with_end(data: bytes, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image | None:
    """The picture of a JPEG that lacks nothing but its end marker; None if it lacks more, or is something else.

    A decoder fills in what is missing. So it is given something to fill it in with, twice: where the picture differs then, some
    of it was missing.
    """
    if not data.startswith(JPEG):
        return None
    rest = data.removesuffix(b"\xff")
    try:
        whole, filled = (_decode(rest + more + b"\xff\xd9", max_pixels, draft) for more in (b"", b"\x5a\xa5" * 32))
    except _DAMAGED:
        return None
    return whole if whole.tobytes() == filled.tobytes() else None


_DAMAGED = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on files that are cut off or hostile."""

_MAGIC = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive, or an office document",
    b"\x1f\x8b": "compressed by gzip: say so by Content-Encoding: gzip",
    b"8BPS": "a Photoshop document",
    b"\x00\x00\x00\x0cJXL": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"\x00\x00\x01\x00": "an icon",
    b"II*\x00": "a TIFF of a kind that is not known",
    b"MM\x00*": "a TIFF of a kind that is not known",
    b"RIFF": "a RIFF file that is no WebP: sound or film",
    b"\x1aE\xdf\xa3": "a film (Matroska or WebM)",
    b"OggS": "sound or film (Ogg)",
    b"ID3": "sound (MP3)",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\x93NUMPY": "a NumPy array",
    PNG: "a PNG whose header is broken",
    JPEG: "a JPEG whose header is broken",
    b"GIF8": "a GIF whose header is broken",
    b"BM": "a BMP whose header is broken",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def what_it_is(data: bytes) -> str:
    """What bytes that are no picture seem to be, in words: "the picture is ..."."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIF_BRANDS:
            return "the picture is HEIC, which wants the extra heif: pip install 'dinat-serve[heif]'"
        return "the picture is AVIF, which this Pillow does not read" if data[8:11] == b"avi" else "the picture is a film (MP4)"
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            return f"the picture is {what}"
    if head.startswith((b"<!doctype html", b"<html")):
        return "the picture is a web page (HTML): often an error page that was saved as a picture"
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "the picture is SVG, a drawing in text: send it as PNG"
    if head.startswith((b"{", b"[")):
        return "the picture is JSON"
    if head.startswith(b"<"):
        return "the picture is XML"
    if head and all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "the picture is text"
    return "the picture is in no format that is known here"


def decode_base64(text: str) -> bytes:
    """The bytes behind base64, of either alphabet, in one line or many, or behind a data: URL.

    Raises NoImage where it is empty, Unprocessable for anything else.
    """
    text = text.strip()
    if re.match(r"https?:", text, re.IGNORECASE):
        raise Unprocessable("image is a web address: nothing is fetched here, send the picture itself")
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Unprocessable("image is a data: URL that is not base64: it must read data:image/...;base64,...")
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")  # RFC 4648, sections 4 and 5
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"image is not base64: {error}") from None
    if not data:
        raise NoImage("the picture is empty: send the bytes of a picture")
    return data
