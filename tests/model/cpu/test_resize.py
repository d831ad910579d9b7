"""The compiled resize kernel for every target that this machine can run, against Pillow."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.model import DinatImageProcessor, native
from dinat.model.cpu import resize
from tests.model.native.emulated import TARGETS, Emulated, library_for

BILINEAR, BICUBIC, LANCZOS = 2, 3, 1


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Library | Emulated]:
    if not native.compiler():
        pytest.skip("no C compiler")
    loaded = library_for(request.param, tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resize, "library", lambda: loaded)
        yield loaded


def noise(width: int, height: int, seed: int = 0, saturated: bool = False) -> Image.Image:
    """saturated: only the values 0 and 255, for which bicubic sums leave the range 0 to 255."""
    values = np.random.default_rng(seed).integers(0, 2 if saturated else 256, (height, width, 3))
    return Image.fromarray((values * (255 if saturated else 1)).astype(np.uint8))


def pillow_resize(image: Image.Image, width: int, height: int, resample: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), resample))


@settings(deadline=None, max_examples=150)
@given(
    sides=st.tuples(*[st.integers(1, 300)] * 4),
    resample=st.sampled_from([BILINEAR, BICUBIC]),
    seed=st.integers(0, 2**16),
    saturated=st.booleans(),
)
def test_resize_is_bit_exact_with_pillow(
    library: native.Library | Emulated, sides: tuple[int, int, int, int], resample: int, seed: int, saturated: bool
) -> None:
    width, height, *new_size = sides
    image = noise(width, height, seed, saturated)
    resized = resize.resize_rgb(image, *new_size, resample)
    np.testing.assert_array_equal(resized, pillow_resize(image, *new_size, resample))


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (224, 500), (500, 224), (1600, 300), (300, 1600), (1300, 1100), (224, 224), (3, 900)]
)
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC, LANCZOS])
def test_common_sizes(library: native.Library | Emulated, size: tuple[int, int], resample: int) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(resize.resize_rgb(image, 224, 224, resample), pillow_resize(image, 224, 224, resample))


def test_kernel_is_used(library: native.Library | Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("Pillow's resize was called")

    expected = pillow_resize(noise(500, 375), 224, 224, BICUBIC)
    resize._may_run_vertical_pass_first()
    monkeypatch.setattr(Image.Image, "resize", fail)
    np.testing.assert_array_equal(DinatImageProcessor(size=224, resample=BICUBIC).resize(noise(500, 375)), expected)


def test_pillow_is_used_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "library", lambda: None)
    image = noise(50, 30)
    np.testing.assert_array_equal(resize.resize_rgb(image, 20, 40, BICUBIC), pillow_resize(image, 20, 40, BICUBIC))


@pytest.mark.parametrize("vertical_first", [False, True])
def test_order_of_passes_follows_the_installed_pillow(
    library: native.Library | Emulated, vertical_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow 13 runs the vertical pass first if it removes more than twice as many rows as columns; earlier ones never do."""
    monkeypatch.setattr(resize, "_may_run_vertical_pass_first", lambda: vertical_first)
    image = noise(100, 300)
    intermediate = image.resize((100, 90) if vertical_first else (80, 300), BICUBIC)
    np.testing.assert_array_equal(resize.resize_rgb(image, 80, 90, BICUBIC), pillow_resize(intermediate, 80, 90, BICUBIC))
