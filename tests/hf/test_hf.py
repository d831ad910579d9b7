"""transformers with this project's network. In one module, because transformers is slow to import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file

from dinat import model
from dinat.model.config import HUB_IDS
from tests.app.conftest import DIGITS
from tests.parity import segmenters

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

from dinat.model import hf  # noqa: E402

FOLDER = Path(model.__file__).parent / "digits"
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 7])
MINI = HUB_IDS["mini"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    hf.register()
    hf.register()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def auto_model() -> Any:
    return transformers.AutoModelForImageClassification.from_pretrained(FOLDER)


def test_transformers_names_refer_to_this_network() -> None:
    from transformers.models.dinat import modeling_dinat

    assert transformers.DinatForImageClassification is modeling_dinat.DinatForImageClassification
    assert transformers.DinatForImageClassification is hf.DinatForImageClassification
    assert type(transformers.AutoModel.from_config(transformers.DinatConfig())) is hf.DinatModel
    assert type(auto_model()) is hf.DinatForImageClassification


def test_outputs_match_this_projects_network() -> None:
    ours, theirs = model.DinatForImageClassification.from_pretrained("digits"), auto_model()
    arguments: dict[str, Any] = {"labels": LABELS, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, output = ours(PIXELS, **arguments), theirs(PIXELS, **arguments)
        as_tuple = theirs(PIXELS, **arguments, return_dict=False)
    for name in ("loss", "logits", "hidden_states", "attentions", "reshaped_hidden_states"):
        torch.testing.assert_close(output[name], getattr(expected, name), rtol=0, atol=1e-5)
    assert len(as_tuple) == 4
    torch.testing.assert_close(as_tuple[1], output.logits)


def test_checkpoint_saved_by_transformers_can_be_loaded_by_both(tmp_path: Path) -> None:
    network = auto_model()
    torch.nn.init.normal_(network.dinat.encoder.levels[0].layers[0].attention.self.rpb)
    network.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(model.DinatForImageClassification.from_pretrained("digits").state_dict())
    with torch.no_grad():
        expected = network(PIXELS).logits
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)(PIXELS).logits
        ours = model.DinatForImageClassification.from_pretrained(tmp_path)(PIXELS).logits
    assert torch.equal(theirs, expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_pipeline_returns_the_labels_and_scores_of_this_project() -> None:
    classify = transformers.pipeline("image-classification", model=str(FOLDER))
    network, processor = (
        model.DinatForImageClassification.from_pretrained("digits"),
        model.DinatImageProcessor.from_pretrained("digits"),
    )
    for path in sorted(DIGITS.glob("*.png"))[::7]:
        image = Image.open(path)
        with torch.no_grad():
            scores, classes = network.classify(processor(image))[0][0].softmax(-1).topk(5)
        predictions = classify(image, top_k=5)
        assert [prediction["label"] for prediction in predictions] == [network.config.id2label[int(i)] for i in classes]
        assert [prediction["score"] for prediction in predictions] == pytest.approx(scores.tolist(), abs=1e-6)


@pytest.mark.parametrize("size", [(375, 500), (17, 40)])
def test_auto_image_processor_returns_equal_values(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    published = model.DinatImageProcessor(resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    published.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt")
    torch.testing.assert_close(theirs["pixel_values"], published(pixels), rtol=0, atol=1e-6)


def test_image_processors_of_other_networks_do_not_change(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    assert type(transformers.AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("ViTImageProcessor")


def test_backbones(tmp_path: Path) -> None:
    stages = ["stem", "stage1", "stage3"]
    theirs = transformers.DinatBackbone.from_pretrained(FOLDER, out_features=stages)
    ours = model.DinatBackbone.from_pretrained("digits", out_features=stages)
    with torch.no_grad():
        for feature_map, expected in zip(theirs(PIXELS).feature_maps, ours(PIXELS).feature_maps, strict=True):
            torch.testing.assert_close(feature_map, expected, rtol=0, atol=1e-5)
    auto_backbone = transformers.AutoBackbone.from_config(theirs.config)
    assert auto_backbone.channels == theirs.channels == ours.channels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask2former", "oneformer"])
def test_segmenters_match_transformers_4_53(name: str) -> None:
    network = segmenters.build(name)
    with np.load(segmenters.GOLDEN) as golden:
        for height, width in segmenters.SIZES:
            for key, value in segmenters.outputs(name, network, height, width).items():
                np.testing.assert_allclose(value, golden[key], rtol=0, atol=1e-9, err_msg=key)


def test_nat_is_a_dinat_without_dilation(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "kernel_size": 3, "num_labels": 4}
    network = hf.NatForImageClassification(hf.NatConfig(**fields)).eval()
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nat"
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is hf.NatForImageClassification
    assert [layer.attention.self.dilation for layer in loaded.dinat.encoder.levels[1].layers] == [1, 1]
    with torch.no_grad():
        expected = network(PIXELS).logits
        assert torch.equal(loaded(PIXELS).logits, expected)
        ours = model.DinatForImageClassification.from_pretrained(tmp_path)(PIXELS).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(network: Any) -> list[torch.Tensor]:
        network.train()
        torch.manual_seed(0)
        network(PIXELS, labels=LABELS).loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    network, checkpointed = auto_model(), auto_model()
    checkpointed.gradient_checkpointing_enable()
    for expected, gradient in zip(gradients(network), gradients(checkpointed), strict=True):
        torch.testing.assert_close(expected, gradient, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_lora_adapter_is_trained_saved_and_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(
        auto_model(), peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    )
    before = adapted.eval()(PIXELS).logits.detach()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(pixel_values=PIXELS, labels=LABELS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = adapted(PIXELS).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(PIXELS).logits, before, rtol=0, atol=1e-5)
        assert (after - before).abs().max() > 1e-3
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(auto_model(), tmp_path).eval()
        torch.testing.assert_close(loaded(PIXELS).logits, after, rtol=0, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(PIXELS).logits, after, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_main_runs_a_script_or_module_with_the_classes_registered(tmp_path: Path) -> None:
    (tmp_path / "neighbor.py").write_text("FOLDER = " + repr(str(FOLDER)))
    (tmp_path / "script.py").write_text(
        "import sys\nfrom neighbor import FOLDER\nfrom transformers import AutoModelForImageClassification as Auto\n"
        "print(type(Auto.from_pretrained(FOLDER)).__module__, *sys.argv[1:])\n"
    )
    for arguments in ([str(tmp_path / "script.py")], ["-m", "script"]):
        done = subprocess.run(
            [sys.executable, "-m", "dinat.hf", *arguments, "--flag", "x"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
            env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        )
        assert done.stdout.split() == ["dinat.model.hf", "--flag", "x"], done.stderr


def test_main_without_arguments_prints_the_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf"])
    with pytest.raises(SystemExit, match=r"usage: python -m dinat\.hf SCRIPT"):
        hf.main()


@pytest.mark.parametrize("fields", [{"hidden_act": "nonsense"}, {"depths": [3, 4, 18, 5]}, {"patch_size": 8}])
def test_invalid_configuration_raises_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        hf.DinatModel(transformers.DinatConfig(**fields))


def test_published_network_has_the_logits_of_transformers_tests() -> None:
    """Logits of COCO image 000000039769 by dinat-mini, from transformers' tests/models/dinat."""
    image = next(Path.home().glob(".cache/**/000000039769.*"), None)
    if image is None or try_to_load_from_cache(MINI, "config.json") is None:
        pytest.skip("the weights of dinat-mini or COCO image 000000039769 are not in the cache")
    network = transformers.AutoModelForImageClassification.from_pretrained(MINI, local_files_only=True)
    pixels = model.DinatImageProcessor.from_pretrained(MINI, local_files_only=True)(Image.open(image))
    with torch.no_grad():
        logits = network(pixels).logits
    torch.testing.assert_close(logits[0, :3], torch.tensor([-0.1545, -0.7667, 0.4642]), rtol=1e-4, atol=1e-4)
