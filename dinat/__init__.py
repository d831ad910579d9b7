"""DiNAT, the Dilated Neighborhood Attention Transformer (arXiv 2209.15001), on current PyTorch and over HTTP.

The public API. Each name is imported on first use: `import dinat` and `DinatClient` do not load PyTorch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dinat.model import __all__ as _NETWORK_NAMES

if TYPE_CHECKING:
    from dinat.app.client import AsyncDinatClient as AsyncDinatClient
    from dinat.app.client import DinatClient as DinatClient
    from dinat.app.client import DinatServiceError as DinatServiceError
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

_MODULES = {"dinat.app.client": ("AsyncDinatClient", "DinatClient", "DinatServiceError"), "dinat.model": _NETWORK_NAMES}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

try:
    __version__ = version("dinat-serve")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


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
