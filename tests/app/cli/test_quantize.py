"""The recommendation of `dinat quantize`."""

import pytest

from dinat.app.cli.quantize import verdict


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([1.2, 1.3, 1.25], "recommended"),
        ([0.64, 0.7, 0.66], "not recommended on this CPU"),
        ([1.05, 1.09, 1.0], "not recommended on this CPU"),
        ([1.0, 1.2, 1.15], "no recommendation, the rounds differ too much: repeat it while nothing else runs"),
        ([1.2, 17.97, 1.3], "no recommendation, the rounds differ too much: repeat it while nothing else runs"),
        ([0.2, 0.64, 0.6], "no recommendation, the rounds differ too much: repeat it while nothing else runs"),
    ],
)
def test_quantization_is_recommended_only_if_all_rounds_agree(speedups: list[float], expected: str) -> None:
    assert verdict(speedups) == expected
