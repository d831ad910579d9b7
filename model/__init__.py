"""DiNAT, the Dilated Neighborhood Attention Transformer (arXiv 2209.15001), on today's PyTorch."""

from dinat.model.config import DinatConfig
from dinat.model.dinat import DinatBackbone, DinatForImageClassification, DinatModel
from dinat.model.errors import AttentionError, CheckpointError, ConfigError, DinatError, ExportError, ImageError
from dinat.model.image_processor import DinatImageProcessor

__all__ = [
    "AttentionError",
    "CheckpointError",
    "ConfigError",
    "DinatBackbone",
    "DinatConfig",
    "DinatError",
    "DinatForImageClassification",
    "DinatImageProcessor",
    "DinatModel",
    "ExportError",
    "ImageError",
]
