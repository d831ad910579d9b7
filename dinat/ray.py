"""The service on Ray Serve (extra `ray`): `serve run dinat.ray:dinat model=...`; see dinat.app.ray.deployment."""

from dinat.app.ray.deployment import dinat

__all__ = ["dinat"]
