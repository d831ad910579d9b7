"""Decode and validate uploaded images."""

import io
import struct
from functools import cache
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from dinat.app.errors import NoImage, ServiceError, TooLarge, Unprocessable, UnsupportedImage
from dinat.app.image_file import BrokenHeader, ImageFile, metadata_orientation, read_structure
from dinat.app.unsupported_formats import container_format, describe_format
from dinat.model.cpu.resize import Pixels
from dinat.model.errors import ImageError
from dinat.model.image_processor import DinatImageProcessor, to_rgb

CORE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are always supported. Pillow's rarely tested decoders are not enabled, to reduce the attack surface."""

EMPTY_IMAGE = "the image is empty: send the bytes of an image file"


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats; AVIF if Pillow supports it, HEIF if the extra heif is installed."""
    optional = ["AVIF"] if features.check("avif") else []
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        pass
    else:
        optional.append("HEIF")
    return (*CORE_FORMATS, *optional)


class TooManyPixels(TooLarge):
    """The image has more than the maximum number of pixels.

    Args:
        size: (width, height) of the image.
        max_pixels: The maximum.
    """

    def __init__(self, size: tuple[int, int], max_pixels: int) -> None:
        self.size = size
        super().__init__(f"the image has {size[0]}x{size[1]} = {self.pixels:,} pixels, the maximum is {max_pixels:,}")

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]


def read_file(path: Path) -> bytes:
    """Read an image file. Raises NoImage if that is not possible, also for a pipe or device, which may have no end."""
    try:
        if not S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise NoImage("the file cannot be read: it is a pipe or device")
        return path.read_bytes()
    except OSError as error:
        raise NoImage(f"the file cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise NoImage(f"the file cannot be read: {error}") from None


def inspect(data: bytes) -> ImageFile:
    """Check the structure of an image file, and remove its metadata. Nothing is decoded.

    Raises:
        NoImage: The data is empty.
        UnsupportedImage: The header of the file is broken.
        Unprocessable: The structure exceeds a limit, or the file is damaged.
    """
    if not data:
        raise NoImage(EMPTY_IMAGE)
    try:
        return read_structure(data)
    except BrokenHeader:
        raise _unreadable(data) from None


def decode(source: bytes | ImageFile, max_pixels: int, draft: tuple[int, int] | None = None) -> Image.Image:
    """Decode the first frame of an image to RGB and apply its EXIF orientation.

    As in browsers, text chunks in a PNG are ignored, however long or broken, and a JPEG may lack its end marker if it is
    otherwise complete.

    Args:
        source: Bytes of the image file, or the result of `inspect`.
        max_pixels: Maximum number of pixels, checked from the header before decoding.
        draft: (width, height) that suffice. A JPEG of at least twice this size is downscaled while it is decoded, which is
            faster but not bit-identical.

    Raises:
        NoImage: The data is empty.
        UnsupportedImage: The format is not supported.
        TooManyPixels: The image has more than `max_pixels` pixels.
        Unprocessable: The image is damaged, its structure exceeds a limit, or its samples have no defined range.
    """
    file = inspect(source) if isinstance(source, bytes) else source
    if file.size is not None:
        check_pixels(file.size, max_pixels)
    try:
        return _decode(file, file.data, max_pixels, draft)
    except _DECODER_ERRORS as error:
        image = _decode_without_end_marker(file, max_pixels, draft)
        if image is None:
            reason = " ".join(str(error).split()) or "its structure is invalid"  # an assertion of Pillow has no text
            raise Unprocessable(f"the image is damaged: {reason}") from error
        return image


def _decode(file: ImageFile, data: bytes, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image:
    """Decode an image as `decode` does, but without its tolerance. Also raises the exceptions of Pillow's decoders."""
    TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader returns wrong pixels for some separate planes
    try:
        image = Image.open(io.BytesIO(data), formats=(file.format,) if file.format else formats())
    except UnidentifiedImageError:
        raise _unreadable(data) from None
    check_pixels(image.size, max_pixels)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # older versions of Pillow open a 16-bit PNG as I
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise Unprocessable(f"the image has {kind} samples, which have no defined range: send 8 or 16 bits per sample")
    if draft is not None:
        image.draft("RGB", draft)
    image.load()
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # many programs write 32 bits per pixel, and 0 in those that mean nothing
    return to_rgb(_turned(_scaled(image) if image.format == "TIFF" else image, file.orientation))


def _scaled(image: Image.Image) -> Image.Image:
    """Convert the samples of a TIFF of 9 to 16 bits, of which Pillow scales none, to 8 bits with white as 255."""
    if not image.mode.startswith("I;16"):
        return image
    tags = image.tag_v2  # type: ignore[attr-defined]
    maximum = 2 ** tags[TiffImagePlugin.BITSPERSAMPLE][0] - 1
    table = (np.arange(2**16, dtype=np.uint32).clip(0, maximum) * 255 // maximum).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        table = 255 - table
    return Image.fromarray(table[np.asarray(image)])


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raise TooManyPixels if an image of this (width, height) has more than `max_pixels` pixels."""
    if size[0] * size[1] > max_pixels:
        raise TooManyPixels(size, max_pixels)


def resize_within(processor: DinatImageProcessor, image: Image.Image | Pixels, max_pixels: int) -> Pixels:
    """Resize and crop an image, as `processor` does, if the result has at most `max_pixels` pixels.

    Raises:
        TooLarge: The result would be larger: the aspect ratio is extreme, and it is preserved without cropping.
        Unprocessable: The image cannot be processed.
    """
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    new_height, new_width = processor.processed_size(width, height)
    if new_height * new_width > max_pixels:
        raise TooLarge(
            f"the image of {width}x{height} pixels would be resized to {new_width}x{new_height} = {new_height * new_width:,} "
            f"pixels, the maximum is {max_pixels:,}: crop it"
        )
    try:
        return processor.resize(image)
    except ImageError as error:
        raise Unprocessable(str(error)) from None


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    """Apply the orientation; that of the image's metadata if None.

    Pillow's exif_transpose reads and copies all metadata, at a cost that the file determines, and fails if it is damaged.
    """
    if orientation is None or image.format == "WEBP":
        orientation = metadata_orientation(image.info.get("exif") or b"", image.info.get("xmp") or b"")
    return image if orientation == 1 else image.transpose(TRANSPOSE[orientation])


WHITE_IS_ZERO = 0
"""TIFF's photometric interpretation in which 0 is white."""

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF."""


def _decode_without_end_marker(file: ImageFile, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image | None:
    """Decode a JPEG that lacks nothing but its end marker; return None if it lacks more, or is not a JPEG.

    A decoder fills in missing data. The file is therefore decoded twice, with different padding before the end marker: if the
    results differ, data was missing.
    """
    if file.format != "JPEG":
        return None
    body = file.data.removesuffix(b"\xff")
    try:
        padded = blake2b(_decode(file, body + b"\x5a\xa5" * 32 + b"\xff\xd9", max_pixels, draft).tobytes()).digest()
        image = _decode(file, body + b"\xff\xd9", max_pixels, draft)
    except _DECODER_ERRORS:
        return None
    return image if blake2b(image.tobytes()).digest() == padded else None


_DECODER_ERRORS = (
    AssertionError,
    AttributeError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow's decoders raise on truncated or malicious files."""


def _unreadable(data: bytes) -> ServiceError:
    """Return the error for data that no decoder opens: it is damaged, or in another format."""
    name = container_format(data)
    if name is not None and name in formats():
        return Unprocessable(f"the image is damaged: the header of the {name} file is broken or incomplete")
    return UnsupportedImage(f"{describe_format(data)}: supported formats are {', '.join(formats())}")
