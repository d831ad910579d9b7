import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Graphs that the tests make are shared between them, and gone afterwards."""
    os.environ["DINAT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
