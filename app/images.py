"""Uploaded bytes to a checked picture."""

import base64
import binascii
import io
import re

from PIL import Image, ImageOps, UnidentifiedImageError

from app.errors import NoImage, TooLarge, Unprocessable, UnsupportedImage
from model.image_processor import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read. Pillow reads more, much of it seldom tried by anybody: a hostile file has fewer ways in."""


def decode(data: bytes, max_pixels: int, draft: tuple[int, int] | None = None) -> Image.Image:
    """The first frame of a picture as RGB, turned as its EXIF says.

    draft: (width, height) that are enough: a JPEG of twice that or more is halved while it is decoded, which is faster and not
    the same to the bit.  The number of pixels is checked from the header, before anything is decoded.
    Raises NoImage (no bytes), UnsupportedImage, TooLarge, Unprocessable (damaged).
    """
    if not data:
        raise NoImage("the picture is empty: send the bytes of a picture")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedImage(f"the picture is in no format that is read here: {', '.join(FORMATS)}") from None
    except _DAMAGED as error:
        raise Unprocessable(f"the picture is damaged: {error}") from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise TooLarge(f"the picture has {image.width}x{image.height} = {pixels:,} pixels, at most {max_pixels:,} are taken")
    try:
        if draft is not None:
            image.draft("RGB", draft)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except _DAMAGED as error:
        raise Unprocessable(f"the picture is damaged: {error}") from error


_DAMAGED = (
    OSError,
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


def decode_base64(text: str) -> bytes:
    """The bytes behind a base64 string or a data: URL. Raises NoImage for an empty one, Unprocessable for anything else."""
    text = text.strip()
    if re.match(r"https?:", text, re.IGNORECASE):
        raise Unprocessable("image is a web address: nothing is fetched here, send the picture itself")
    if text.lower().startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Unprocessable("image is a data: URL that is not base64: it must read data:image/...;base64,...")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"image is not base64: {error}") from None
    if not data:
        raise NoImage("the picture is empty: send the bytes of a picture")
    return data
