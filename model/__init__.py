"""DiNAT, the Dilated Neighborhood Attention Transformer (arXiv 2209.15001), on today's PyTorch."""

from model.config import DinatConfig
from model.dinat import DinatBackbone, DinatForImageClassification, DinatModel
from model.errors import AttentionError, CheckpointError, ConfigError, DinatError, ExportError, ImageError
from model.image_processor import DinatImageProcessor

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
