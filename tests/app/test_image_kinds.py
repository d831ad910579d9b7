"""Images as phones, scanners, microscopes, satellites and office programs write them, by their pixels."""

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from dinat.app.errors import ServiceError, Unprocessable
from dinat.app.image_file import PNG
from dinat.app.images import decode, inspect
from tests.app.sample_images import encoded, noise
from tests.app.tiffs import tiff

Pixels = npt.NDArray[np.int64]

KEYS = ("order", "planar", "tile", "compressed", "big")
LAYOUTS = [dict(zip(KEYS, values, strict=True)) for values in itertools.product("<>", *[(False, True)] * 4)]
"""Byte orders, planes, tiles, compression and BigTIFF."""

GRAY, RGB, PALETTE, CMYK, YCBCR, LAB = 1, 2, 3, 5, 6, 8
WHITE_IS_ZERO = 0


def random(bits: int, channels: int) -> Pixels:
    return np.random.default_rng(bits).integers(0, 2**bits, (24, 40, channels))


def scaled(samples: Pixels, bits: int) -> Pixels:
    return samples * 255 // (2**bits - 1)


def gray(bits: int, photometric: int) -> tuple[dict[str, Any], Pixels]:
    samples = random(bits, 1)
    levels = scaled(samples, bits)
    levels = 255 - levels if photometric == WHITE_IS_ZERO else levels
    return {"samples": samples, "bits": bits, "photometric": photometric}, np.repeat(levels, 3, 2)


def color(bits: int, extra: list[int] | None) -> tuple[dict[str, Any], Pixels]:
    """RGB, with these meanings of a fourth band; an empty list if it has none."""
    samples = random(bits, 3 if extra is None else 4)
    if extra == [2]:
        samples[..., 3] = 2**bits - 1
    tags = [(338, 3, extra)] if extra else []
    return {"samples": samples, "bits": bits, "photometric": RGB, "tags": tags}, scaled(samples[..., :3], bits)


def palette(bits: int) -> tuple[dict[str, Any], Pixels]:
    samples, colors = random(bits, 1), np.random.default_rng(0).integers(0, 256, (3, 2**bits))
    tags = [(320, 3, (colors * 257).ravel().tolist())]
    return {"samples": samples, "bits": bits, "photometric": PALETTE, "tags": tags}, colors.T[samples[..., 0]]


def cmyk(bits: int) -> tuple[dict[str, Any], Pixels]:
    samples = random(bits, 4)
    ink = samples / (2**bits - 1)
    expected = np.rint(255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])).astype(int)
    return {"samples": samples, "bits": bits, "photometric": CMYK}, expected


def ycbcr() -> tuple[dict[str, Any], Pixels]:
    samples = random(8, 3)
    expected = Image.merge("YCbCr", [Image.fromarray(samples[..., i].astype(np.uint8)) for i in range(3)]).convert("RGB")
    return {"samples": samples, "photometric": YCBCR, "tags": [(530, 3, [1, 1])]}, np.asarray(expected).astype(int)


def lab() -> tuple[dict[str, Any], Pixels]:
    """Neutral colors: L* alone, whose sRGB value follows from CIE's and sRGB's definitions."""
    samples = random(8, 3)
    samples[..., 1:] = 0
    lightness = samples[..., :1] / 255 * 100
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / (24389 / 27))
    srgb = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
    return {"samples": samples, "photometric": LAB}, np.repeat(np.rint(255 * srgb).astype(int), 3, 2)


KINDS = {
    **{f"gray, {bits} bits": gray(bits, GRAY) for bits in (1, 2, 4, 8, 12, 16)},
    **{f"gray, {bits} bits, 0 is white": gray(bits, WHITE_IS_ZERO) for bits in (1, 2, 4, 8, 16)},
    **{f"RGB, {bits} bits": color(bits, None) for bits in (8, 16)},
    **{f"RGB and alpha, {bits} bits": color(bits, [2]) for bits in (8, 16)},
    **{f"RGB and infrared, {bits} bits": color(bits, []) for bits in (8, 16)},
    **{f"RGB and an unspecified band, {bits} bits": color(bits, [0]) for bits in (8, 16)},
    **{f"palette, {bits} bits": palette(bits) for bits in (1, 2, 4, 8)},
    **{f"CMYK, {bits} bits": cmyk(bits) for bits in (8, 16)},
    "YCbCr": ycbcr(),
    "CIELab": lab(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_tiff_is_decoded_to_its_pixels_or_rejected_by_name(kind: str) -> None:
    arguments, expected = KINDS[kind]
    for layout in LAYOUTS:
        data = tiff(**arguments, **{**layout, "tile": 16 * layout["tile"]})
        is_unsupported = layout["order"] == ">" and (layout["big"] or kind in ("gray, 12 bits", "gray, 16 bits, 0 is white"))
        if is_unsupported or (kind == "CIELab" and layout["planar"]):
            with pytest.raises(Unprocessable, match=r"TIFF of .* bits per sample.*, which cannot be read"):
                decode(data, 10**6)
        else:
            difference = np.abs(np.asarray(decode(data, 10**6)).astype(int) - expected)
            assert difference.max() <= (2 if kind in ("CIELab", "CMYK, 16 bits") else 1), layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 8, "sample_format": 2}, "8-bit signed integer samples"),
        ({"bits": 16, "sample_format": 2}, "16-bit signed integer samples"),
        ({"bits": 32}, "32-bit integer samples"),
        ({"bits": 12, "photometric": WHITE_IS_ZERO}, "TIFF of grayscale in which 0 is white with 12 bits per sample, which"),
        ({"bits": 8, "photometric": 32803}, "TIFF of photometric interpretation 32803 with 8 bits"),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_tiff_without_a_defined_range_is_named(order: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Unprocessable, match=message.removesuffix(", which")):
        decode(tiff(random(8, 1), order=order, **arguments), 10**6)


def test_twelve_bits_are_scaled_to_the_full_range() -> None:
    ramp = np.arange(4096).reshape(64, 64, 1)
    decoded = np.asarray(decode(tiff(ramp, bits=12), 10**6))
    assert (decoded[0, 0, 0], decoded[-1, -1, 0]) == (0, 255)
    np.testing.assert_array_equal(decoded[..., 0], ramp[..., 0] * 255 // 4095)


def exif(order: str, *entries: tuple[int, int, bytes]) -> bytes:
    """Return EXIF metadata with these entries: tag, type and values, at most four bytes of each."""
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8}
    table = b"".join(
        struct.pack(f"{order}HHI", tag, kind, max(1, len(value) // sizes[kind])) + value.ljust(4, b"\0")[:4]
        for tag, kind, value in entries
    )
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4)


BESIDE = {
    "width as text": (256, 2, b"abc\0"),
    "compression as text": (259, 2, b"6\0"),
    "resolution unit as text": (296, 2, b"2\0"),
    "resolution as a number": (282, 3, b"\1\0"),
    "a value beyond the end": (271, 5, b"\xff\xff\xff\x7f"),
    "an unknown type": (40000, 2, b"\0\0\0\0"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.filterwarnings("ignore")
def test_orientation_is_applied_whatever_is_beside_it(order: str, beside: str, kind: str) -> None:
    image = noise(24, 31)
    metadata = exif(order, BESIDE[beside], (274, 3, struct.pack(f"{order}H", 6)))
    data = encoded(image, kind, exif=metadata)
    plain = np.asarray(decode(encoded(image, kind), 10**6))
    np.testing.assert_array_equal(np.asarray(decode(data, 10**6)), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "tag", [(256, 2, b"40\0"), (259, 2, b"1\0"), (296, 2, b"2\0\0\0"), (282, 2, b"x"), (34665, 4, [2**31])]
)
def test_tiff_is_turned_whatever_its_metadata(tag: tuple[int, int, Any]) -> None:
    arguments, expected = KINDS["RGB, 8 bits"]
    data = tiff(**arguments | {"tags": [(274, 3, [6]), tag]})
    if tag[0] in (256, 259):  # these define pixels
        with pytest.raises(ServiceError) as raised:
            decode(data, 10**6)
        assert raised.value.status in (415, 422)
    else:
        np.testing.assert_array_equal(np.asarray(decode(data, 10**6)), np.rot90(expected, -1))


@pytest.mark.parametrize("stored", [(1, b"\6"), (2, b"6\0"), (4, b"\0\0\0\6"), (3, b"\0\6")])
def test_orientation_of_other_types_is_applied(stored: tuple[int, bytes]) -> None:
    kind, value = stored
    data = encoded(noise(24, 31), "JPEG", exif=exif(">", (274, kind, value)))
    assert decode(data, 10**6).size == (24, 31)
    arguments, _ = KINDS["RGB, 8 bits"]
    numbers = value if kind == 2 else [6]
    assert decode(tiff(**arguments | {"tags": [(274, kind, numbers)]}), 10**6).size == (24, 40)


@pytest.mark.parametrize(
    "xmp", ['<x tiff:Orientation="6"/>', "<x tiff:Orientation='6'/>", '<x tiff:Orientation = "6"/>', "<tiff:Orientation> 6<"]
)
def test_orientation_in_xmp_of_any_form_is_applied(xmp: str) -> None:
    assert decode(encoded(noise(24, 31), "JPEG", xmp=xmp.encode()), 10**6).size == (24, 31)


@pytest.mark.parametrize("before", [b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n ", b" "])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_line_ends_and_byte_order_marks_before_an_image_are_ignored(kind: str, before: bytes) -> None:
    data = encoded(noise(24, 31), kind)
    assert inspect(before + data) == inspect(data)
    assert decode(before + data, 10**6).tobytes() == decode(data, 10**6).tobytes()


def bmp(pixels: npt.NDArray[np.uint8], header: int) -> bytes:
    """Return a BMP of 32 bits per pixel (H, W, 4) in BGRA, with a V4 (108 bytes) or V5 header (124 bytes)."""
    height, width, _ = pixels.shape
    head = struct.pack("<IiiHHIIiiII", header, width, -height, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    head = head.ljust(header, b"\0")
    start = 14 + header
    return b"BM" + struct.pack("<IHHI", start + pixels.nbytes, 0, 0, start) + head + pixels.tobytes()


@pytest.mark.parametrize("header", [108, 124])
def test_bmp_whose_alpha_is_zero_throughout_is_opaque(header: int) -> None:
    image = noise(24, 31)
    pixels = np.dstack([np.asarray(image)[..., ::-1], np.zeros((24, 31), np.uint8)])
    assert decode(bmp(pixels, header), 10**6).tobytes() == image.tobytes()
    pixels[0, 0, 3] = 255  # now it means something
    decoded = np.asarray(decode(bmp(pixels, header), 10**6))
    assert decoded[0, 0].tolist() == np.asarray(image)[0, 0].tolist()
    assert (decoded[1:] == 255).all()


def test_transparent_png_remains_on_white() -> None:
    image = noise(8, 8)
    image.putalpha(0)
    assert decode(encoded(image), 10**6).getextrema() == ((255, 255),) * 3


def png(bits: int, color_type: int, samples: list[int], transparent: list[int]) -> bytes:
    """Return a PNG of one row with a transparent level or color."""
    channels = 3 if color_type == 2 else 1
    packed = int("".join(f"{sample:0{bits}b}" for sample in samples), 2) << -len(samples) * bits % 8
    row = b"\0" + packed.to_bytes(-(-len(samples) * bits // 8), "big")
    header = struct.pack(">IIBBBBB", len(samples) // channels, 1, bits, color_type, 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"tRNS": struct.pack(f">{channels}H", *transparent),
        b"IDAT": zlib.compress(row),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks.items()
    ]
    return b"".join([PNG, *parts])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [0, 1])
def test_transparent_level_of_a_png_is_white(bits: int, transparent: int) -> None:
    highest = 2**bits - 1
    samples = [0, 1, highest - highest // 3, highest]
    levels = [255 if sample == transparent else sample * 255 // highest for sample in samples]
    assert np.asarray(decode(png(bits, 0, samples, [transparent]), 10**6))[0, :, 0].tolist() == levels


def test_transparent_color_of_a_png() -> None:
    samples = [10, 20, 30, 10, 20, 31]
    assert np.asarray(decode(png(8, 2, samples, samples[:3]), 10**6)).tolist() == [[[255] * 3, samples[3:]]]
    with pytest.raises(Unprocessable, match="a PNG with 16 bits per sample and a transparent color"):
        inspect(png(16, 2, samples, samples[:3]))


def test_more_tags_than_any_writer_has_are_rejected() -> None:
    tags = [(40_000 + n, 3, [1]) for n in range(4096)]
    with pytest.raises(Unprocessable, match="more than 4,096 tags"):
        inspect(tiff(random(8, 1), tags=tags))


def test_only_tags_that_define_pixels_are_read() -> None:
    data = tiff(random(8, 1), tags=[(34675, 1, bytes(70_000)), (270, 2, b"description\0" * 1000), (274, 3, [6])])
    file = inspect(data)
    assert (file.format, file.size, file.orientation, file.is_cheap) == ("TIFF", (40, 24), 6, False)
    opened: Any = Image.open(io.BytesIO(file.data))
    assert not {34675, 270, 274} & set(opened.tag_v2)
    assert ImageOps.exif_transpose(opened).size == (40, 24)
