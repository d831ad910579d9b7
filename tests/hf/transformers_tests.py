"""Run transformers' tests of DiNAT, including the common mixins, on this project's network.

    python -m tests.hf.transformers_tests CHECKOUT [pytest's arguments]

CHECKOUT: a clone of https://github.com/huggingface/transformers at the installed release. Requires the test requirements of
transformers (parameterized, evaluate, datasets), as far as the tests use them. In one process: the network is registered in
this one, so pytest-xdist's -n is rejected.
"""

import os
import sys
from pathlib import Path

import pytest


class RegisterNetwork:
    """pytest plugin that registers this project's network and enables the tests that transformers skips without NATTEN."""

    def pytest_configure(self) -> None:
        """Runs before any test is imported."""
        from transformers import testing_utils

        from dinat.model import hf

        testing_utils.is_natten_available = lambda: True
        hf.register()


def main() -> int:
    """Returns pytest's exit status."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.hf.transformers_tests CHECKOUT [pytest's arguments]")
    if any(argument.startswith(("-n", "--numprocesses")) for argument in sys.argv[2:]):
        sys.exit("-n is not supported: the network is registered in this process only")
    checkout = Path(sys.argv[1]).resolve()
    tests = checkout / "tests" / "models" / "dinat"
    if not tests.is_dir():
        sys.exit(f"{checkout} is not a checkout of transformers: it has no tests/models/dinat")
    os.chdir(checkout)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the package of transformers' tests has the same name
    sys.path[:0] = [str(checkout), str(checkout / "utils")]
    return pytest.main([str(tests), "-c", os.devnull, "--rootdir", str(checkout), "-rs", *sys.argv[2:]], [RegisterNetwork()])


if __name__ == "__main__":
    sys.exit(main())
