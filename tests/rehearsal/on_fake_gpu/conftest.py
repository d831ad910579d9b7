from collections.abc import Iterator

import pytest

from dinat.model.attention import autotune, bias_cache
from tests.rehearsal.fake_gpu.install import is_installed

if not is_installed():  # tests/rehearsal/test_rehearsal.py runs these tests in processes with the fake GPU
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    autotune.selections.clear()
    autotune._failed.clear()
    bias_cache.clear()
    yield
