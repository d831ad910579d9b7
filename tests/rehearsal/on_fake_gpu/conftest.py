from collections.abc import Iterator

import pytest

from dinat.model.attention import autotune, bias_cache
from tests.rehearsal import card

if not card.installed():  # tests/rehearsal/test_rehearsal.py runs these in a process that has the stand-in
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def a_new_start() -> Iterator[None]:
    autotune.selections.clear()
    autotune._failed.clear()
    bias_cache.clear()
    yield
