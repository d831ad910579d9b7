"""Small Mask2Former and OneFormer of transformers with a DiNAT backbone and the weights of cases.py.

Running this module in the environment of make_golden.py, with scipy, creates segmenters.npz:

    /tmp/golden/bin/python -m tests.parity.segmenters
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.cases import fingerprint, pixel_values, weight

GOLDEN = Path(__file__).with_name("segmenters.npz")
SIZES = [(64, 96), (160, 224)]
"""(height, width) of the images. kernel_size * dilation is up to 84, as in published segmenters, and exceeds the feature maps,
16 x 24 and 40 x 56."""


def build(name: str) -> torch.nn.Module:
    """Create mask2former or oneformer in float64."""
    import transformers

    backbone = transformers.DinatConfig(
        embed_dim=16,
        depths=[2, 2, 2, 1],
        num_heads=[1, 2, 2, 4],
        kernel_size=3,
        dilations=[[1, 28], [1, 16], [1, 8], [4]],
        mlp_ratio=2.0,
        layer_scale_init_value=0.5,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes: dict[str, Any] = {
        "backbone_config": backbone,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "dim_feedforward": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "num_queries": 5,
        "num_labels": 3,
    }
    if name == "mask2former":
        config = transformers.Mask2FormerConfig(feature_size=32, mask_feature_size=32, **sizes)
        network = transformers.Mask2FormerForUniversalSegmentation(config)
    else:
        text = {"width": 32, "context_length": 8, "num_layers": 1, "vocab_size": 50}
        texts = {f"text_encoder_{key}": value for key, value in text.items()}
        config = transformers.OneFormerConfig(mask_dim=32, conv_dim=32, task_seq_len=8, **texts, **sizes)
        network = transformers.OneFormerForUniversalSegmentation(config)
    network = network.double().eval()
    state = network.state_dict()
    floats = {key: np.asarray(weight(key, tuple(value.shape))) for key, value in state.items() if value.is_floating_point()}
    network.load_state_dict(state | {key: torch.from_numpy(value) for key, value in floats.items()})
    return network


def outputs(name: str, network: torch.nn.Module, height: int, width: int) -> dict[str, np.ndarray]:
    """Fingerprints of the outputs for two images."""
    inputs = {"pixel_values": torch.from_numpy(pixel_values(height, width))}
    if name == "oneformer":
        inputs["task_inputs"] = torch.arange(16).view(2, 8).double()
    with torch.no_grad():
        output = network(**inputs)
    logits = {"classes": output.class_queries_logits, "masks": output.masks_queries_logits}
    return {f"{name}/{height}x{width}/{key}": fingerprint(value.numpy()) for key, value in logits.items()}


def main() -> None:
    """Create the golden values."""
    import transformers
    from transformers.models.dinat import modeling_dinat

    from tests.parity.natten_rules import natten2dav, natten2dqkrpb

    assert transformers.__version__ == "4.53.3"
    modeling_dinat.requires_backends = lambda *_: None
    modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = natten2dqkrpb, natten2dav
    golden: dict[str, np.ndarray] = {}
    for name in ("mask2former", "oneformer"):
        network = build(name)
        for height, width in SIZES:
            golden |= outputs(name, network, height, width)
    np.savez_compressed(GOLDEN, **golden)
    print(len(golden), "values stored")


if __name__ == "__main__":
    main()
