"""dinat.timm: timm's interface on this network."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinat.app.cli import main
from dinat.model import DinatBackbone, DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS
from tests.timm import timm_importable

SMALL = {
    "embed_dim": 32,
    "depths": [2, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "dilations": [[1, 2], [1], [1], [1]],
    "kernel_size": 3,
}


@pytest.fixture(scope="module")
def timm() -> Iterator[ModuleType]:
    with timm_importable():
        module = pytest.importorskip("timm")
        import dinat.timm  # noqa: F401

        yield module


def create(timm: ModuleType, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("dinat_mini", **{**SMALL, **kwargs}).eval()


def test_import_does_not_require_timm() -> None:
    code = "import sys, dinat, dinat.model; assert 'dinat.model.timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_preset_is_registered_with_the_transform_of_its_published_accuracy(timm: ModuleType) -> None:
    names = timm.list_models(["dinat_*", "nat_*"], pretrained=True)
    assert names == [
        "dinat_base.in1k",
        "dinat_large.in22k_ft_in1k",
        "dinat_large_11x11_384.in22k_ft_in1k",
        "dinat_large_384.in22k_ft_in1k",
        "dinat_mini.in1k",
        "dinat_small.in1k",
        "dinat_tiny.in1k",
        "nat_base.in1k",
        "nat_mini.in1k",
        "nat_small.in1k",
        "nat_tiny.in1k",
    ]
    mini, large = (timm.get_pretrained_cfg(name) for name in ("dinat_mini", "dinat_large_384"))
    assert (mini.hf_hub_id, large.hf_hub_id) == ("shi-labs/dinat-mini-in1k-224", "shi-labs/dinat-large-in22k-in1k-384")
    assert (mini.input_size, mini.crop_pct) == ((3, 224, 224), 0.875)
    assert (large.input_size, large.crop_pct) == ((3, 384, 384), 1.0)
    assert {cfg.interpolation for cfg in (mini, large)} == {"bicubic"}
    assert mini.mean == (0.485, 0.456, 0.406)
    assert mini.std == (0.229, 0.224, 0.225)


def test_transform_equals_the_image_processor_of_the_published_accuracy(timm: ModuleType) -> None:
    from PIL import Image

    image = Image.effect_noise((300, 260), 80).convert("RGB")
    config = timm.get_pretrained_cfg("dinat_mini")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
    assert torch.allclose(transform(image), DinatImageProcessor.original()(image)[0], atol=1e-5)


def test_logits_and_features_equal_the_networks(timm: ModuleType, tmp_path: Path) -> None:
    model, pixels = create(timm, num_classes=5), torch.randn(2, 3, 70, 64)
    model.save_pretrained(tmp_path)
    network = DinatForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(pixels), network(pixels).logits, atol=1e-6)
        assert torch.allclose(
            model.forward_head(model.forward_features(pixels), pre_logits=True),
            network.dinat(pixels).pooler_output,
            atol=1e-6,
        )
        normalized = DinatBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"])(pixels).feature_maps
        maps = model.forward_intermediates(pixels, indices=[0, 2], intermediates_only=True)
    for feature_map, other in zip(maps, normalized, strict=True):
        own = torch.nn.functional.layer_norm(feature_map.permute(0, 2, 3, 1), feature_map.shape[1:2]).permute(0, 3, 1, 2)
        assert torch.allclose(own, other, atol=1e-5)


def test_features_only_has_no_unused_weights(timm: ModuleType) -> None:
    backbone = create(timm, features_only=True, out_indices=(0, 2))
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(value.shape) for value in maps] == [(1, 32, 16, 16), (1, 128, 4, 4)]
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([32, 128], [4, 16])
    sum(value.mean() for value in maps).backward()
    assert all(value.grad is not None for value in backbone.parameters())


def test_arguments_of_features_only(timm: ModuleType) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    plain = create(timm, features_only=True, out_indices=(1, 3))(pixels)
    last = create(timm, features_only=True, out_indices=(1, 3), output_fmt="NHWC", output_stride=32, feature_cls="getter")
    for feature_map, other in zip(plain, last(pixels), strict=True):
        assert torch.equal(feature_map.permute(0, 2, 3, 1), other)
    _, normalized = create(timm, features_only=True, out_indices=(1, 3), norm=True)(pixels)
    expected = torch.nn.functional.layer_norm(plain[1].permute(0, 2, 3, 1), (256,)).permute(0, 3, 1, 2)
    assert torch.allclose(normalized, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"output_stride": 8}, "output_stride 8 is not supported: the strides of this network's stages are 4, 8, 16 and 32"),
        ({"feature_cls": "hook"}, "feature_cls 'hook' is not supported"),
        ({"feature_cls": "list"}, "feature_cls 'list' is not supported"),
        ({"out_indices": ()}, "out_indices is empty"),
        ({"output_fmt": "NLC"}, "output_fmt 'NLC' is not supported by this network: use NCHW or NHWC"),
    ],
)
def test_arguments_of_features_only_that_cannot_be_honoured(timm: ModuleType, argument: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(timm, features_only=True, **argument)


def test_unknown_format_of_feature_maps_is_rejected(timm: ModuleType) -> None:
    with pytest.raises(ValueError, match="output_fmt 'NLC' is not supported"):
        create(timm).forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")


def test_classifier_channels_and_pooling(timm: ModuleType) -> None:
    model, pixels = create(timm, num_classes=7, in_chans=1, global_pool="max"), torch.randn(1, 1, 64, 64)
    assert model(pixels).shape == (1, 7)
    assert torch.equal(model.forward_head(model.forward_features(pixels), True), model.forward_features(pixels).amax((1, 2)))
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0, "")
    assert model(pixels).shape == (1, 2, 2, 256)
    assert model.config.num_labels == 0


def test_gradient_checkpointing_changes_no_gradient(timm: ModuleType) -> None:
    model, pixels = create(timm, num_classes=4), torch.randn(1, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(pixels).sum().backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
    assert all(torch.allclose(gradient, other, atol=1e-6) for gradient, other in zip(*gradients, strict=True))


def test_parameter_groups_by_depth(timm: ModuleType) -> None:
    from timm.optim import param_groups_layer_decay

    model = create(timm, num_classes=4)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    name_of = {id(value): name for name, value in model.named_parameters()}
    scales = {name_of[id(value)]: group["lr_scale"] for group in groups for value in group["params"]}
    order = (
        "dinat.embeddings.norm.weight",
        "dinat.encoder.levels.0.layers.0.layernorm_before.weight",
        "dinat.encoder.levels.0.layers.1.layernorm_before.weight",
        "dinat.encoder.levels.1.layers.0.layernorm_before.weight",
        "dinat.encoder.levels.3.layers.0.layernorm_before.weight",
    )
    assert [scales[name] for name in order] == sorted({scales[name] for name in order})
    assert scales["classifier.weight"] == 1 == max(scales.values())
    undecayed = {name_of[id(value)] for group in groups if not group["weight_decay"] for value in group["params"]}
    assert {name for name in name_of.values() if name.endswith("rpb")} <= undecayed


def test_pretrained_weights_from_the_hubs_cache(timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published files have 1,000 classes and three channels."""
    network = DinatForImageClassification(DinatConfig.preset("mini", **SMALL))
    cached = tmp_path / "models--shi-labs--dinat-mini-in1k-224"
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    network.save_pretrained(cached / "snapshots" / "0")
    weights = load_file(cached / "snapshots" / "0" / "model.safetensors")
    save_file(weights, cached / "snapshots" / "0" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = create(timm, pretrained=True, cache_dir=tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(whole(pixels), network.eval()(pixels).logits, atol=1e-6)
    own = create(timm, pretrained=True, cache_dir=tmp_path, num_classes=5, in_chans=1)
    assert own.get_classifier().out_features == 5
    kernel = network.state_dict()["dinat.embeddings.patch_embeddings.projection.0.weight"]
    assert torch.allclose(own.dinat.embeddings.patch_embeddings.projection[0].weight, kernel.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.slow
def test_evaluate_of_a_trained_model_equals_its_own_accuracy(
    timm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for path in sorted(DIGITS.glob("*.png")):
        (data / path.name[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, data / path.name[0])
    images = sorted(data.rglob("*.png"))
    labels = torch.tensor([int(path.parent.name) for path in images])
    model = create(timm, num_classes=10, img_size=64)
    processor = DinatImageProcessor(size=64, resample=3)
    from PIL import Image

    pixels = torch.cat([processor(Image.open(path)) for path in images])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(8):
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        predicted = model(pixels).argmax(1)
    checkpoint = tmp_path / "checkpoint"
    model.config.id2label = {i: str(i) for i in range(10)}
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), str(data), "--json", "--precision", "fp32", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    expected = [[int(((labels == i) & (predicted == j)).sum()) for j in range(10)] for i in range(10)]
    assert result["confusion"]["rows"] == expected
    assert len(set(predicted.tolist())) > 1


def test_device_and_dtype_of_the_weights(timm: ModuleType) -> None:
    model = timm.create_model("dinat_mini", device="meta", dtype=torch.bfloat16)
    assert {(value.device.type, value.dtype) for value in model.state_dict().values()} == {("meta", torch.bfloat16)}
    assert {value.dtype for value in timm.create_model("dinat_mini").state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("training", [False, True])
def test_new_classifier_has_the_mode_of_the_model(timm: ModuleType, training: bool) -> None:
    model = timm.create_model("dinat_mini", device="meta").train(training)
    model.reset_classifier(3, "max")
    assert {module.training for module in model.modules()} == {training}


def test_unknown_arguments_are_rejected(timm: ModuleType) -> None:
    with pytest.raises(TypeError, match="unknown argument 'nonsense'"):
        create(timm, nonsense=1)
