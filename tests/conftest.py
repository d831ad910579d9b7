import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions depend on it too


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept the settings of pytest-timeout where it is not installed, such as on a GPU machine with PyTorch only."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: of pytest-timeout")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Graphs that the tests make are shared between them, and gone afterwards."""
    os.environ["DINAT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
