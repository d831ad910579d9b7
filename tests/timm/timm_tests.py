"""Run timm's tests of models on this project's network.

    python -m tests.timm.timm_tests CHECKOUT [pytest's arguments]

CHECKOUT: a clone of https://github.com/huggingface/pytorch-image-models. The tests of pretrained weights download them from the
Hub, and those of TorchScript fail: this network cannot be compiled by it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.timm import timm_importable


def main() -> int:
    """Returns pytest's exit status."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.timm.timm_tests CHECKOUT [pytest's arguments]")
    tests = Path(sys.argv[1]).resolve() / "tests" / "test_models.py"
    if not tests.is_file():
        sys.exit(f"{sys.argv[1]} is not a checkout of timm: it has no tests/test_models.py")
    with timm_importable():
        import timm

        import dinat.timm

        list_models = timm.list_models

        def list_own_models(*args: Any, module: Any = None, **kwargs: Any) -> list[str]:
            return [name for name in list_models(*args, **kwargs) if name.partition(".")[0] in dinat.timm.MODELS]

        timm.list_models = list_own_models
        timm.list_pretrained = lambda *_: []
        os.chdir(tests.parent)
        options = ["-c", os.devnull, "--rootdir", str(tests.parent), "--import-mode=importlib", "-k", "dinat_ or nat_", "-rs"]
        return pytest.main([str(tests), *options, *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
