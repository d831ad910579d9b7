"""Exceptions of the network and its files. Each one is also a ValueError."""


class DinatError(ValueError):
    """Base class of this package's exceptions."""


class ConfigError(DinatError):
    """The configuration is invalid."""


class AttentionError(DinatError):
    """The attention backend is not available or does not support these inputs."""


class CheckpointError(DinatError):
    """The checkpoint cannot be found or read, or does not match the network."""


class ImageError(DinatError):
    """The image or the preprocessor configuration is invalid."""


class ExportError(DinatError):
    """The network cannot be exported, or the exported graph's outputs differ."""
