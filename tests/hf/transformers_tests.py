"""Run transformers' own tests of DiNAT, with their common mixins, on this project's network.

    python -m tests.hf.transformers_tests CHECKOUT [pytest's arguments]

CHECKOUT: a clone of https://github.com/huggingface/transformers at the release that is installed. Wants pytest-xdist's and
transformers' test requirements (parameterized, evaluate, datasets) where their tests do.
"""

import os
import sys
from pathlib import Path

import pytest


class OnThisNetwork:
    """Registers it, and lets run what transformers skips for want of NATTEN."""

    def pytest_configure(self) -> None:
        """Before any test is imported."""
        from transformers import testing_utils

        from dinat.model import hf

        testing_utils.is_natten_available = lambda: True
        hf.register()


def main() -> int:
    """Returns pytest's exit status."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.hf.transformers_tests CHECKOUT [pytest's arguments]")
    checkout = Path(sys.argv[1]).resolve()
    tests = checkout / "tests" / "models" / "dinat"
    if not tests.is_dir():
        sys.exit(f"{checkout} is no checkout of transformers: it has no tests/models/dinat")
    os.chdir(checkout)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # theirs have this name too
    sys.path[:0] = [str(checkout), str(checkout / "utils")]
    return pytest.main([str(tests), "-c", os.devnull, "--rootdir", str(checkout), "-rs", *sys.argv[2:]], [OnThisNetwork()])


if __name__ == "__main__":
    sys.exit(main())
