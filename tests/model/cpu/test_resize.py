"""Resizing compiled for the processor, in every kind that this machine can run, against Pillow."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.model import DinatImageProcessor, native
from dinat.model.cpu import resize
from tests.model.native.emulated import KINDS, Emulated, library_for

BILINEAR, BICUBIC, LANCZOS = 2, 3, 1


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Library | Emulated]:
    if not native.compiler():
        pytest.skip("no C compiler")
    loaded = library_for(request.param, tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resize, "library", lambda: loaded)
        yield loaded


def noise(width: int, height: int, seed: int = 0, hard: bool = False) -> Image.Image:
    """hard: black and white alone, by which bicubic goes below 0 and above 255."""
    values = np.random.default_rng(seed).integers(0, 2 if hard else 256, (height, width, 3))
    return Image.fromarray((values * (255 if hard else 1)).astype(np.uint8))


def by_pillow(picture: Image.Image, width: int, height: int, by: int) -> np.ndarray:
    return np.asarray(picture.resize((width, height), by))


@settings(deadline=None, max_examples=150)
@given(
    sides=st.tuples(*[st.integers(1, 300)] * 4),
    by=st.sampled_from([BILINEAR, BICUBIC]),
    seed=st.integers(0, 2**16),
    hard=st.booleans(),
)
def test_it_equals_pillow_to_the_bit(
    library: native.Library | Emulated, sides: tuple[int, int, int, int], by: int, seed: int, hard: bool
) -> None:
    width, height, to_width, to_height = sides
    picture = noise(width, height, seed, hard)
    np.testing.assert_array_equal(resize.resized(picture, to_width, to_height, by), by_pillow(picture, to_width, to_height, by))


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (224, 500), (500, 224), (1600, 300), (300, 1600), (1300, 1100), (224, 224), (3, 900)]
)
@pytest.mark.parametrize("by", [BILINEAR, BICUBIC, LANCZOS])
def test_the_sizes_of_photographs(library: native.Library | Emulated, size: tuple[int, int], by: int) -> None:
    picture = noise(*size)
    np.testing.assert_array_equal(resize.resized(picture, 224, 224, by), by_pillow(picture, 224, 224, by))


def test_the_kernel_is_what_ran(library: native.Library | Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("Pillow resized")

    expected = by_pillow(noise(500, 375), 224, 224, BICUBIC)
    resize._may_begin_with_columns()
    monkeypatch.setattr(Image.Image, "resize", fail)
    np.testing.assert_array_equal(DinatImageProcessor(size=224, resample=BICUBIC).resize(noise(500, 375)), expected)


def test_without_a_kernel_pillow_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "library", lambda: None)
    picture = noise(50, 30)
    np.testing.assert_array_equal(resize.resized(picture, 20, 40, BICUBIC), by_pillow(picture, 20, 40, BICUBIC))


@pytest.mark.parametrize("columns_first", [False, True])
def test_it_follows_the_order_of_the_pillow_that_is_there(
    library: native.Library | Emulated, columns_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow 13 begins with the columns where these lose more than twice as much; 12 and before never do."""
    monkeypatch.setattr(resize, "_may_begin_with_columns", lambda: columns_first)
    picture = noise(100, 300)
    between = picture.resize((100, 90) if columns_first else (80, 300), BICUBIC)
    np.testing.assert_array_equal(resize.resized(picture, 80, 90, BICUBIC), by_pillow(between, 80, 90, BICUBIC))
