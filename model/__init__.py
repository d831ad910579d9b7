"""DiNAT, the Dilated Neighborhood Attention Transformer (arXiv 2209.15001), on current PyTorch.

Each public name is imported on first use: image preprocessing does not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinat.model.config import DinatConfig as DinatConfig
    from dinat.model.dinat import DinatBackbone as DinatBackbone
    from dinat.model.dinat import DinatForImageClassification as DinatForImageClassification
    from dinat.model.dinat import DinatModel as DinatModel
    from dinat.model.errors import AttentionError as AttentionError
    from dinat.model.errors import CheckpointError as CheckpointError
    from dinat.model.errors import ConfigError as ConfigError
    from dinat.model.errors import DinatError as DinatError
    from dinat.model.errors import ExportError as ExportError
    from dinat.model.errors import ImageError as ImageError
    from dinat.model.image_processor import DinatImageProcessor as DinatImageProcessor

_MODULES = {
    "dinat.model.config": ("DinatConfig",),
    "dinat.model.dinat": ("DinatBackbone", "DinatForImageClassification", "DinatModel"),
    "dinat.model.errors": ("AttentionError", "CheckpointError", "ConfigError", "DinatError", "ExportError", "ImageError"),
    "dinat.model.image_processor": ("DinatImageProcessor",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
