"""Tests of dinat.timm.

timm requires torchvision, and torchvision's wheels on PyPI require PyTorch's CUDA build. With the CPU build their C++ operators
are missing, and the import fails at two that timm does not use. `make test` installs both packages apart from the others, so
that transformers does not select torchvision.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / ".venv" / "timm"
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


@contextmanager
def timm_importable() -> Iterator[None]:
    """Make timm importable if it is installed, in the environment or in FOLDER."""
    before = set(sys.modules)
    sys.path.append(str(FOLDER))
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]
