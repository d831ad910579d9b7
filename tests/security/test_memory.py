"""The formula in SECURITY.md for the memory of a service under attack."""

import math
import shutil

import pytest

from dinat.app.decode_processes import BYTES_PER_PIXEL, MEMORY_BYTES
from dinat.app.server.protocol import MAX_HEAD_BYTES
from dinat.app.settings import Settings
from tests.e2e.processes import Server
from tests.security import measure
from tests.security.observer import observed


def max_growth(settings: Settings) -> int:
    """Bytes above the memory of an idle service, as SECURITY.md has it."""
    bodies = 2 * settings.body_budget + 5 * settings.max_upload_bytes + MAX_HEAD_BYTES * settings.max_connections
    pixels = BYTES_PER_PIXEL * settings.max_pixels * max(1.0, settings.decode_threads / 4)
    decoding = pixels + settings.decode_threads * (MEMORY_BYTES + 2 * settings.max_upload_bytes)
    return math.ceil(bodies + 3 * settings.response_budget + decoding)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["base64 with an emoji", "all kinds"])
def test_memory_of_attacks_is_below_the_documented_maximum(name: str) -> None:
    if name == "all kinds" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    settings = Settings(_env_file=None)
    with Server() as server, observed(server) as observation:
        responses = measure.attack_from_another_process(server.url, measure.ATTACKS[name])
    print(responses, observation)
    assert observation.live_statuses.keys() == {200}
    assert observation.growth < max_growth(settings)
