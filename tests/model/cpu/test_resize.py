"""The compiled resize kernel for every target that this machine can run, against Pillow."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.model import DinatImageProcessor, ImageError, native
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


@settings(deadline=None, max_examples=150)
@given(
    sides=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 200), st.integers(1, 200)),
    position=st.tuples(*[st.floats(0, 1)] * 4),
    resample=st.sampled_from([BILINEAR, BICUBIC]),
    saturated=st.booleans(),
)
def test_window_is_bit_exact_with_pillow(
    sides: tuple[int, int, int, int], position: tuple[float, float, float, float], resample: int, saturated: bool
) -> None:
    width, height, new_width, new_height = sides
    image = noise(width, height, saturated=saturated)
    left, right = sorted(int(part * (new_width - 1)) for part in position[:2])
    top, bottom = sorted(int(part * (new_height - 1)) for part in position[2:])
    computed = resize._resize_window(image, new_width, new_height, resample, resize.Window(top, bottom + 1, left, right + 1))
    expected = pillow_resize(image, new_width, new_height, resample)[top : bottom + 1, left : right + 1]
    np.testing.assert_array_equal(computed, expected)


@pytest.mark.parametrize("vertical_first", [False, True])
def test_window_follows_the_order_of_passes(vertical_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "_may_run_vertical_pass_first", lambda: vertical_first)
    image = noise(100, 300)
    intermediate = image.resize((100, 90) if vertical_first else (80, 300), BICUBIC)
    computed = resize._resize_window(image, 80, 90, BICUBIC, resize.Window(20, 50, 10, 60))
    np.testing.assert_array_equal(computed, pillow_resize(intermediate, 80, 90, BICUBIC)[20:50, 10:60])


def test_window_of_a_long_image_is_computed_alone() -> None:
    """The whole resized image would have 25 billion pixels."""
    image = noise(1, 10_000)
    window = resize.resize_rgb_window(image, 500, 50_000_000, BICUBIC, resize.Window(20_000, 20_100, 100, 300))
    part = pillow_resize(image.crop((0, 0, 1, 10)), 500, 50_000, BICUBIC)
    np.testing.assert_array_equal(window, part[20_000:20_100, 100:300])


def test_long_image_is_rejected_for_other_filters() -> None:
    with pytest.raises(ImageError, match="would be resized to 500x5000000 before it is cropped, the maximum is 50,000,000"):
        resize.resize_rgb_window(noise(1, 10_000), 500, 5_000_000, LANCZOS, resize.Window(0, 10, 0, 10))


def test_tables_of_images_of_any_size_are_bounded(library: native.Library | Emulated) -> None:
    for width in range(3000, 3000 + 150):
        resize.resize_rgb(Image.new("RGB", (width, 40)), 224, 224, BICUBIC)
    assert 0 < resize._tables.size <= resize.MAX_CACHED_BYTES
    assert resize._tables.size == sum(resize._nbytes(tables) for tables in resize._tables._tables.values())
    before = resize._tables.size
    resize.resize_rgb(Image.new("RGB", (999_900, 1)), 224, 224, BICUBIC)
    assert resize._tables.size == before


def test_tables_are_shared_between_threads() -> None:
    tables = resize._TableCache()
    barrier = threading.Barrier(4)

    def resize_many(_: int) -> None:
        barrier.wait()
        for n in range(200):
            (table,) = tables.get((n % 30,), lambda: (np.zeros(200_000, np.int32),))
            assert len(table) == 200_000

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(resize_many, range(4)))
    assert tables.size == sum(resize._nbytes(table) for table in tables._tables.values()) <= resize.MAX_CACHED_BYTES


@pytest.mark.parametrize("vertical_first", [False, True])
def test_order_of_passes_follows_the_installed_pillow(
    library: native.Library | Emulated, vertical_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow 13 runs the vertical pass first if it removes more than twice as many rows as columns; earlier ones never do."""
    monkeypatch.setattr(resize, "_may_run_vertical_pass_first", lambda: vertical_first)
    image = noise(100, 300)
    intermediate = image.resize((100, 90) if vertical_first else (80, 300), BICUBIC)
    np.testing.assert_array_equal(resize.resize_rgb(image, 80, 90, BICUBIC), pillow_resize(intermediate, 80, 90, BICUBIC))
