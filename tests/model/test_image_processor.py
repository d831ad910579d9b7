from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.model import DinatImageProcessor, ImageError, image_processor
from dinat.model.image_processor import to_rgb

GRADIENT = np.tile(np.arange(256, dtype=np.uint8), (16, 1))


def test_batch_of_images_of_any_size() -> None:
    pixels = DinatImageProcessor(size=24)(
        [Image.new("RGB", (50, 30)), np.zeros((7, 9, 3), np.uint8), torch.zeros(3, 8, 8).byte()]
    )
    assert pixels.shape == (3, 3, 24, 24)
    assert pixels.dtype == torch.float32
    assert (pixels == -1).all()


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 5, 0).byte()],
    ids=["RGB", "L", "array", "tensor"],
)
def test_images_without_pixels_are_rejected(image: Any) -> None:
    with pytest.raises(ImageError, match="an image must have at least one pixel, got"):
        DinatImageProcessor()(image)


@pytest.mark.parametrize(
    ("premultiplied", "straight", "color"), [("La", "LA", (100, 128)), ("RGBa", "RGBA", (200, 100, 50, 128))]
)
def test_premultiplied_alpha(premultiplied: str, straight: str, color: tuple[int, ...]) -> None:
    image = Image.new(straight, (4, 3), color)
    expected = np.asarray(to_rgb(image)).astype(int)
    assert np.abs(np.asarray(to_rgb(image.convert(premultiplied))).astype(int) - expected).max() <= 1  # rounded twice


def test_int_size_is_height_and_width() -> None:
    assert DinatImageProcessor(size=20)(Image.new("RGB", (50, 30))).shape == (1, 3, 20, 20)
    assert DinatImageProcessor(size={"height": 10, "width": 30})(Image.new("RGB", (50, 30))).shape == (1, 3, 10, 30)


@pytest.mark.parametrize(("size", "expected"), [((500, 375), (224, 298)), ((375, 500), (298, 224)), ((10, 1000), (22400, 224))])
def test_shortest_edge_preserves_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = DinatImageProcessor(size={"shortest_edge": 224}).resize(Image.new("RGB", size))
    assert pixels.shape[:2] == expected


def test_center_crop_crops_and_pads() -> None:
    processor = DinatImageProcessor(do_resize=False, do_center_crop=True, crop_size=4, do_rescale=False, do_normalize=False)
    ramp = np.repeat(np.arange(49, dtype=np.uint8).reshape(7, 7, 1), 3, axis=2)
    assert processor(ramp)[0, 0].tolist() == [[8, 9, 10, 11], [15, 16, 17, 18], [22, 23, 24, 25], [29, 30, 31, 32]]
    assert processor(np.full((2, 2, 3), 9, np.uint8))[0, 0].tolist() == [[0, 0, 0, 0], [0, 9, 9, 0], [0, 9, 9, 0], [0, 0, 0, 0]]


def test_original_evaluation_resizes_the_short_side_and_crops() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))[16:240, 58:282]
    assert np.array_equal(DinatImageProcessor.original().resize(image), expected)
    assert DinatImageProcessor.original(384, crop_pct=1.0).resize(image).shape == (384, 384, 3)


def crop_after_resizing(image: Image.Image, processor: DinatImageProcessor) -> np.ndarray:
    """Resize the whole image with Pillow, pad it, and crop it."""
    size = processor.size
    if processor.crop_pct is not None:
        side, height, width = int(size / processor.crop_pct), size, size
    else:
        side, height, width = size["shortest_edge"], processor.crop_size["height"], processor.crop_size["width"]
    short, long = sorted(image.size)
    new_long = max(1, int(side * long / short))
    pixels = np.asarray(image.resize((side, new_long) if image.width <= image.height else (new_long, side), processor.resample))
    rows, columns = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    pixels = np.pad(pixels, ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)))
    margins = pixels.shape[0] - height, pixels.shape[1] - width
    top, left = (round(margin / 2) if processor.crop_pct is not None else margin // 2 for margin in margins)
    return pixels[top : top + height, left : left + width]


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.integers(1, 80),
    crop=st.one_of(st.floats(0.3, 1), st.tuples(st.integers(1, 120), st.integers(1, 120))),
    resample=st.sampled_from([0, 1, 2, 3, 4, 5]),
    whole=st.booleans(),
)
def test_crop_is_that_of_the_whole_resized_image(
    width: int, height: int, side: int, crop: float | tuple[int, int], resample: int, whole: bool
) -> None:
    """whole: False computes the window alone, as for extreme aspect ratios, wherever that is possible."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    if isinstance(crop, float):
        processor = DinatImageProcessor(size=side, crop_pct=crop, resample=resample)
    else:
        crop_size = {"height": crop[0], "width": crop[1]}
        processor = DinatImageProcessor(
            size={"shortest_edge": side}, do_center_crop=True, crop_size=crop_size, resample=resample
        )
    with pytest.MonkeyPatch.context() as patched:
        if not whole:
            patched.setattr("dinat.model.cpu.resize.MAX_PIXELS", 0)
        np.testing.assert_array_equal(processor.resize(image), crop_after_resizing(image, processor))


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (3, 400_001)])
def test_crop_of_an_extreme_aspect_ratio_takes_no_memory_for_the_rest(size: tuple[int, int]) -> None:
    """The whole resized image would have up to 65 billion pixels."""
    image = Image.new("RGB", size, (1, 2, 3))
    assert (DinatImageProcessor.original().resize(image) == (1, 2, 3)).all()
    processor = DinatImageProcessor(size={"shortest_edge": 224}, do_center_crop=True, crop_size=200)
    assert (processor.resize(image) == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (DinatImageProcessor(size=20), (20, 20)),
        (DinatImageProcessor(size={"shortest_edge": 20}), (20, 33)),
        (DinatImageProcessor(do_resize=False), (30, 50)),
        (DinatImageProcessor(do_resize=False, do_center_crop=True, crop_size=40), (40, 40)),
        (DinatImageProcessor.original(20), (20, 20)),
    ],
)
def test_processed_size_is_known_before_resizing(processor: DinatImageProcessor, expected: tuple[int, int]) -> None:
    assert processor.processed_size(50, 30) == expected == processor.resize(Image.new("RGB", (50, 30))).shape[:2]


def test_steps_are_optional() -> None:
    image = np.full((4, 4, 3), 51, np.uint8)
    no_steps = DinatImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    assert (no_steps(image) == 51).all()
    assert DinatImageProcessor(do_resize=False, do_normalize=False)(image)[0, 0, 0, 0] == pytest.approx(0.2)
    assert DinatImageProcessor(do_resize=False)(image)[0, 0, 0, 0] == pytest.approx(-0.6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "LA", "RGBA", "RGBX", "I", "I;16", "F"])
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    elif mode in ("LAB", "HSV", "I", "F"):
        image = Image.fromarray(GRADIENT).convert("RGB" if mode in ("LAB", "HSV") else mode)
        image = image.convert(mode) if mode == "HSV" else image
    else:
        image = Image.fromarray(GRADIENT).convert("RGB").convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    if mode in ("L", "I", "I;16", "F", "RGBA", "LA", "RGBX", "CMYK"):
        assert np.array_equal(np.asarray(rgb)[..., 0], GRADIENT)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_files_are_scaled_not_clipped(kind: str) -> None:
    buffer = BytesIO()
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(buffer, kind)
    assert np.array_equal(np.asarray(to_rgb(Image.open(buffer)))[..., 1], GRADIENT)


def test_transparent_level_of_16_bits_becomes_white() -> None:
    buffer = BytesIO()
    Image.fromarray(np.array([[1000, 1001, 65535]], np.uint16)).save(buffer, "PNG", transparency=1000)
    assert np.asarray(to_rgb(Image.open(buffer)))[0, :, 0].tolist() == [255, 3, 255]


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert np.asarray(to_rgb(palette)).tolist()[0][1] == [255, 255, 255]


def test_transparent_image_is_drawn_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    monkeypatch.setattr(image_processor, "_BAND_PIXELS", 100)
    assert to_rgb(image).tobytes() == expected.tobytes()


def test_published_file_round_trip(tmp_path: Path) -> None:
    published: dict[str, Any] = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 384,
    }
    processor = DinatImageProcessor.from_dict(published)
    assert (processor.size, processor.resample, processor.do_rescale) == (384, 3, True)
    processor.save_pretrained(tmp_path)
    assert DinatImageProcessor.from_pretrained(tmp_path) == processor


def test_missing_file_means_the_published_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_size": 384}')
    processor = DinatImageProcessor.from_pretrained(tmp_path)
    assert (processor.size, processor.resample, processor.image_mean) == (384, 3, (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size must be an integer from 1 to 16,384 or"),
        ({"size": {"height": 3}}, "size must be"),
        ({"do_center_crop": True}, "crop_size must be"),
        ({"resample": 9}, "resample must be one of Pillow's filter numbers"),
        ({"crop_pct": 1.5}, "crop_pct must be a number from 0.05 to 1"),
        ({"image_std": [1, 0, 1]}, "image_std must not contain 0"),
        ({"size": True}, "size must be"),
        ({"size": 2**40}, "size must be"),
        ({"size": "224"}, "size must be"),
        ({"crop_pct": "0.9"}, "crop_pct must be a number"),
        ({"crop_pct": 1e-5}, "crop_pct must be a number"),
        ({"image_mean": 0.5}, "image_mean must be a list of 3 values"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean must be a list with a number"),
        ({"image_std": ["1", 1, 1]}, "image_std must be a list with a number"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number"),
        ({"do_resize": "yes"}, "do_resize must be true or false"),
        ({"resample": [2]}, "resample must be one of"),
    ],
)
def test_invalid_fields_raise_image_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        DinatImageProcessor(**fields)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image is required"),
        ("cat.jpg", "must be a Pillow image"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 7), np.uint8), "must be uint8"),
    ],
)
def test_invalid_images_raise_image_error(images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        DinatImageProcessor()(images)


def test_images_of_different_sizes_raise_image_error() -> None:
    with pytest.raises(ImageError, match=r"must have one size after processing.*set do_resize"):
        DinatImageProcessor(do_resize=False)([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
