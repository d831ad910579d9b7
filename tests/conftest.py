import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions depend on it too


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Graphs that the tests make are shared between them, and gone afterwards."""
    os.environ["DINAT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
