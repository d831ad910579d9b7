"""HTTP clients of the service, synchronous and asynchronous; see dinat.app.client."""

from dinat.app.client import (
    AsyncDinatClient,
    Classification,
    DinatClient,
    DinatServiceError,
    Health,
    ModelCard,
    Prediction,
)

__all__ = [
    "AsyncDinatClient",
    "Classification",
    "DinatClient",
    "DinatServiceError",
    "Health",
    "ModelCard",
    "Prediction",
]
