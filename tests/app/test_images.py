import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.app.errors import ServiceError, TooLarge
from dinat.app.images import decode, formats
from tests.app.sample_images import encoded, noise

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


def test_only_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
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
