"""timm's registry with this network (extra `timm`): `import dinat.timm`, then `timm.create_model("dinat_mini")`.

See dinat.model.timm.
"""

from dinat.model.timm import MODELS, TimmDinat

__all__ = ["MODELS", "TimmDinat"]
