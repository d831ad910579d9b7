import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dinat.app.errors import NoImage, ServiceError, TooLarge, Unprocessable, UnsupportedImage
from dinat.app.image_file import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from dinat.app.images import TooManyPixels, decode, formats, inspect, read_file, resize_within
from dinat.model import DinatImageProcessor
from tests.app.sample_images import encoded, noise, png_bomb
from tests.security.hostile_images import exif_directory, jpeg_junk, jpeg_scans, jpeg_segments, png_chunks

SAMPLES = {kind: encoded(noise(24, 31), kind) for kind in formats()}


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(formats()),
    st.integers(0, 4000),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_file_is_decoded_or_raises_a_client_error(kind: str, end: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLES[kind])
    for position, value in flips:
        data[position % len(data)] = value
    try:
        assert decode(bytes(data[: max(1, len(data) - end)]), max_pixels=10_000_000).mode == "RGB"
    except ServiceError as error:
        assert 400 <= error.status < 500


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("size", [24, 60, 200])
def test_file_that_is_cut_short_is_damaged_and_not_of_an_unsupported_format(kind: str, size: int) -> None:
    """A download that was interrupted."""
    if kind not in formats():
        pytest.skip("the decoder is not installed")
    with pytest.raises(Unprocessable, match=f"the image is damaged: the header of the {kind} file is broken or incomplete"):
        decode(SAMPLES[kind][:size], 10**6)


def test_decoder_error_is_one_line() -> None:
    if "HEIF" not in formats():
        pytest.skip("the decoder is not installed")
    data = SAMPLES["HEIF"]
    with pytest.raises(Unprocessable, match=r"^the image is damaged: [^\n]+$"):
        decode(data[: len(data) * 2 // 3], 10**6)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """A table may name them. A pipe has no end while nothing writes to it, /dev/zero has none at all."""
    pipe, device = tmp_path / "pipe.png", tmp_path / "device.png"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(NoImage, match="pipe or device"):
            read_file(path)


def test_only_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animation, 100).getpixel((0, 0)) == (255, 0, 0)


def test_pixel_limit_is_checked_before_decoding() -> None:
    with pytest.raises(TooLarge, match="31x24 = 744 pixels, the maximum is 743"):
        decode(SAMPLES["PNG"][:60], max_pixels=743)


def test_draft_is_close_and_not_smaller_than_requested() -> None:
    smooth = noise(12, 16).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    exact, draft = decode(data, 10**7), decode(data, 10**7, draft=(448, 448))
    assert (exact.size, draft.size) == ((1600, 1200), (800, 600))
    small = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int) for image in (exact, draft)]
    assert 0 < np.abs(small[0] - small[1]).max() <= 4
    png = encoded(noise(600, 800))
    assert decode(png, 10**7, draft=(100, 100)).size == (800, 600)


def test_metadata_is_removed_and_pixels_are_not_changed() -> None:
    image = noise(24, 31)
    plain = encoded(image, "JPEG")
    exif = Image.Exif()
    exif[0x010E] = "description" * 100
    metadata = {"exif": exif, "icc_profile": bytes(70_000), "comment": b"comment", "xmp": b"<x/>"}
    assert inspect(encoded(image, "JPEG", **metadata)).data == inspect(plain).data == plain
    assert decode(encoded(image, "JPEG", **metadata), 10**6).tobytes() == decode(plain, 10**6).tobytes()


def test_color_space_of_adobe_jpegs_is_preserved() -> None:
    for mode, options in (("CMYK", {}), ("RGB", {"keep_rgb": True})):
        data = encoded(noise(24, 31).convert(mode), "JPEG", **options)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert decode(data, 10**6).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [kind for kind in formats() if kind not in ("GIF", "BMP")])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010E] = "description"
    exif[0x0112] = orientation
    data = encoded(noise(24, 31), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode(data, 10**6).tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "template"), [("JPEG", '<x tiff:Orientation="%d"/>'), ("WEBP", "<tiff:Orientation>%d<")])
def test_orientation_in_xmp_or_in_either_byte_order_is_applied(kind: str, template: str, order: str) -> None:
    image = noise(24, 31)
    assert decode(encoded(image, kind, xmp=(template % 6).encode()), 10**6).size == (24, 31)
    header = b"II*\0" if order == "<" else b"MM\0*"
    exif = header + struct.pack(f"{order}IHHHIHH", 8, 1, 0x0112, 3, 1, 8, 0)
    assert decode(encoded(image, kind, exif=b"Exif\0\0" + exif), 10**6).size == (24, 31)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80))
def test_any_exif_metadata_is_accepted(exif: bytes) -> None:
    for header in (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        data = jpeg_segments(1, 0xE1, b"Exif\0\0" + header + exif)
        assert decode(data, 10**6).size == (8, 8)


def test_directory_of_exif_is_not_copied() -> None:
    """Pillow would copy 11 kB for each of 4,500 entries."""
    file = inspect(jpeg_segments(1, 0xE1, b"Exif\0\0" + exif_directory(4500, 11_000)))
    assert (file.orientation, b"Exif" in file.data) == (1, False)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (jpeg_junk(2**20), "more than 65,536 bytes between its segments"),
        (jpeg_junk(2**20, b"\xff"), "more than 65,536 bytes between its segments"),
        (jpeg_junk(2**20, b"\xff\0"), "more than 65,536 bytes between its segments"),
        (jpeg_segments(MAX_SEGMENTS), "more than 1,000 segments"),
        (jpeg_scans(MAX_SCANS, 16), "more than 100 scans"),
        (jpeg_segments(1, 0xC0, bytes(15)), "more than one frame header"),
        (encoded(Image.new("L", (8, 8)), "JPEG")[:150], "ends before its pixels"),
        (png_chunks(MAX_CHUNKS), "more than 10,000 chunks"),
        (encoded(noise(8, 8))[:33] + encoded(noise(8, 8))[8:], "more than one header"),
    ],
)
def test_structure_beyond_a_limit_is_rejected_without_decoding(data: bytes, detail: str) -> None:
    with pytest.raises(Unprocessable, match=detail):
        inspect(data)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff\xe0", jpeg_junk(1000), b"\x89PNG\r\n\x1a\n", SAMPLES["PNG"][:20]])
def test_header_without_a_size_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match=r"with a broken header: supported formats are JPEG, PNG"):
        decode(data, 10**6)


def test_png_optimized_for_ios_is_named() -> None:
    """Xcode writes them: a chunk before the header, and pixels in another order without zlib's header."""
    data = SAMPLES["PNG"][:8] + b"\0\0\0\4CgBI\x50\0\x20\2\x2b\xd5\xb3\x7f" + SAMPLES["PNG"][8:]
    with pytest.raises(UnsupportedImage, match=r"a PNG optimized for iOS \(CgBI\).*: convert it to a standard PNG"):
        decode(data, 10**6)


def test_files_at_the_limits_are_decoded() -> None:
    assert decode(jpeg_segments(900, content=bytes(100)), 10**6).size == (8, 8)
    assert decode(jpeg_scans(80, 16), 10**6).size == (16, 16)
    assert decode(png_chunks(9000), 10**6).size == (8, 8)


def test_bytes_after_a_jpeg_are_not_counted_as_scans() -> None:
    """Phones append videos and further images."""
    data = encoded(noise(24, 31), "JPEG")
    assert decode(data + b"\xff\xda" * 1000, 10**6).tobytes() == decode(data, 10**6).tobytes()


@pytest.mark.parametrize(
    ("data", "is_cheap"),
    [
        (encoded(noise(375, 500), "JPEG"), True),
        (encoded(noise(375, 500)), True),
        (encoded(noise(375, 500), "WEBP"), True),
        (encoded(noise(375, 500), "WEBP", lossless=True), False),
        (encoded(noise(24, 31), "WEBP", lossless=True), True),
        (encoded(noise(24, 31).convert("RGBA"), "WEBP"), True),
        (encoded(Image.new("L", (1200, 1600)), "JPEG"), True),
        (encoded(Image.new("L", (1200, 1700)), "JPEG"), False),
        (jpeg_scans(50, 1200), False),
        (encoded(noise(900, 1000)), False),
        (png_bomb(2**16 + 1, 1), False),
        *((SAMPLES[kind], False) for kind in formats() if kind not in ("JPEG", "PNG", "WEBP")),
    ],
)
def test_cheap_images_are_identified_by_their_header(data: bytes, is_cheap: bool) -> None:
    file = inspect(data)
    assert file.is_cheap is is_cheap
    assert file.size is None or file.size == Image.open(io.BytesIO(data)).size


def test_size_after_resizing_is_limited() -> None:
    processor = DinatImageProcessor(size={"shortest_edge": 224})
    with pytest.raises(
        TooLarge, match="1x1000 pixels would be resized to 224x224000 = 50,176,000 pixels, the maximum is 50,000,000"
    ):
        resize_within(processor, Image.new("RGB", (1, 1000)), 50_000_000)
    with pytest.raises(Unprocessable, match="crop it"):
        resize_within(DinatImageProcessor(resample=1, crop_pct=1.0), np.zeros((10_000, 1, 3), np.uint8), 50_000_000)


def test_pixels_above_the_limit_are_reported() -> None:
    with pytest.raises(TooManyPixels) as raised:
        decode(SAMPLES["TIFF"], max_pixels=743)
    assert raised.value.pixels == 744
