"""What can go wrong in the network and its files. Every error is also a ValueError."""


class DinatError(ValueError):
    """Root of this package's errors."""


class ConfigError(DinatError):
    """A configuration that names no network."""


class AttentionError(DinatError):
    """Neighborhood attention asked of shapes, or of a backend, that cannot do it."""


class CheckpointError(DinatError):
    """A checkpoint that cannot be found, read or fitted to its network."""


class ImageError(DinatError):
    """A picture, or a preprocessor configuration, that cannot be made into pixel values."""


class ExportError(DinatError):
    """A network that cannot be written as a graph, or a graph that does not compute the same."""
