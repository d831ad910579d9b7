"""Create golden.npz with transformers 4.53.3, in a separate environment:

    python -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0
    /tmp/golden/bin/pip install transformers==4.53.3 pillow numpy
    /tmp/golden/bin/python -m tests.parity.make_golden

transformers' DiNAT calls two operators of NATTEN 0.14, which does not run with current PyTorch: natten_rules.py has them.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from tests.parity.cases import (
    IMAGE_SIZES,
    INPUTS,
    NETWORKS,
    PROCESSORS,
    STAGES,
    config_fields,
    fingerprint,
    loss_cases,
    pixel_values,
    synthetic_image,
    weight,
)
from tests.parity.natten_rules import natten2dav, natten2dqkrpb


def with_weights(network: torch.nn.Module) -> torch.nn.Module:
    network = network.double().eval()
    state = network.state_dict()
    network.load_state_dict({name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in state.items()})
    return network


def main() -> None:
    import transformers
    from transformers import DinatBackbone, DinatConfig, DinatForImageClassification, ViTImageProcessor
    from transformers.models.dinat import modeling_dinat

    assert transformers.__version__ == "4.53.3"
    modeling_dinat.requires_backends = lambda *_: None
    modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = natten2dqkrpb, natten2dav
    golden: dict[str, np.ndarray] = {}

    def store(name: str, values: torch.Tensor) -> None:
        golden[f"{name}/shape"] = np.array(values.shape)
        golden[name] = fingerprint(values.detach().numpy())

    with torch.no_grad():
        for network in NETWORKS:
            classifier = with_weights(DinatForImageClassification(DinatConfig(**config_fields(network))))
            backbone = with_weights(DinatBackbone(DinatConfig(**config_fields(network), out_features=STAGES)))
            for height, width in INPUTS:
                case = f"{network}/{height}x{width}"
                pixels = torch.from_numpy(pixel_values(height, width))
                output = classifier(pixels, output_hidden_states=True, output_attentions=True)
                store(f"{case}/logits", output.logits)
                for i, state in enumerate(output.hidden_states):
                    store(f"{case}/hidden_states/{i}", state)
                    store(f"{case}/reshaped_hidden_states/{i}", output.reshaped_hidden_states[i])
                for i, attention in enumerate(output.attentions):
                    store(f"{case}/attentions/{i}", attention)
                maps = backbone(pixels, output_hidden_states=True)
                for stage, feature_map, state in zip(STAGES, maps.feature_maps, maps.hidden_states, strict=True):
                    store(f"{case}/feature_maps/{stage}", feature_map)
                    store(f"{case}/backbone_hidden_states/{stage}", state)
        for name, (changes, labels) in loss_cases().items():
            classifier = with_weights(DinatForImageClassification(DinatConfig(**(config_fields("k7-8421") | changes))))
            output = classifier(torch.from_numpy(pixel_values(64, 96)), labels=torch.from_numpy(labels))
            golden[f"loss/{name}"] = np.array(output.loss.item())
            golden[f"problem_type/{name}"] = np.array(classifier.config.problem_type)

    for name, changes in PROCESSORS.items():
        for height, width in IMAGE_SIZES:
            pixels = synthetic_image(height, width)
            exact = ViTImageProcessor(**(changes | {"do_normalize": False}))(
                pixels, return_tensors="np", input_data_format="channels_last"
            )["pixel_values"][0]
            case = f"processor/{name}/{height}x{width}"
            golden[f"{case}/sha256"] = np.array(hashlib.sha256(exact.astype(np.float32).tobytes()).hexdigest())
            normalized = ViTImageProcessor(**changes)(pixels, return_tensors="pt", input_data_format="channels_last")
            store(f"{case}/pixel_values", normalized["pixel_values"])

    np.savez_compressed(Path(__file__).with_name("golden.npz"), **golden)
    print(len(golden), "values stored")


if __name__ == "__main__":
    main()
