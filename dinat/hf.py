"""transformers' DiNAT and NAT classes on this network (extra `hf`); see dinat.model.hf.

To run a script with them registered: `python -m dinat.hf SCRIPT ARGS...`; a module: `python -m dinat.hf -m MODULE ...`.
"""

from dinat.model.hf import (
    DinatBackbone,
    DinatConfig,
    DinatForImageClassification,
    DinatModel,
    DinatPreTrainedModel,
    NatBackbone,
    NatConfig,
    NatForImageClassification,
    NatModel,
    main,
    register,
)

__all__ = [
    "DinatBackbone",
    "DinatConfig",
    "DinatForImageClassification",
    "DinatModel",
    "DinatPreTrainedModel",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatModel",
    "main",
    "register",
]

if __name__ == "__main__":
    main()
