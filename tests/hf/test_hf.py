"""transformers on this project's network. Slow to import, so all of it is in one module."""

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


def auto() -> Any:
    return transformers.AutoModelForImageClassification.from_pretrained(FOLDER)


def test_transformers_own_names_are_this_network() -> None:
    from transformers.models.dinat import modeling_dinat

    assert transformers.DinatForImageClassification is modeling_dinat.DinatForImageClassification
    assert transformers.DinatForImageClassification is hf.DinatForImageClassification
    assert type(transformers.AutoModel.from_config(transformers.DinatConfig())) is hf.DinatModel
    assert type(auto()) is hf.DinatForImageClassification


def test_it_says_what_this_project_says() -> None:
    ours, theirs = model.DinatForImageClassification.from_pretrained("digits"), auto()
    asked: dict[str, Any] = {"labels": LABELS, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, got = ours(PIXELS, **asked), theirs(PIXELS, **asked)
        as_tuple = theirs(PIXELS, **asked, return_dict=False)
    for name in ("loss", "logits", "hidden_states", "attentions", "reshaped_hidden_states"):
        torch.testing.assert_close(got[name], getattr(expected, name), rtol=0, atol=1e-5)
    assert len(as_tuple) == 4
    torch.testing.assert_close(as_tuple[1], got.logits)


def test_what_transformers_saves_either_reads(tmp_path: Path) -> None:
    network = auto()
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


def test_the_pipeline_gives_the_services_labels_and_scores() -> None:
    classify = transformers.pipeline("image-classification", model=str(FOLDER))
    network, processor = (
        model.DinatForImageClassification.from_pretrained("digits"),
        model.DinatImageProcessor.from_pretrained("digits"),
    )
    for path in sorted(DIGITS.glob("*.png"))[::7]:
        picture = Image.open(path)
        with torch.no_grad():
            scores, classes = network.classify(processor(picture))[0][0].softmax(-1).topk(5)
        said = classify(picture, top_k=5)
        assert [one["label"] for one in said] == [network.config.id2label[int(i)] for i in classes]
        assert [one["score"] for one in said] == pytest.approx(scores.tolist(), abs=1e-6)


@pytest.mark.parametrize("size", [(375, 500), (17, 40)])
def test_auto_image_processor_gives_equal_values(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    published = model.DinatImageProcessor(resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    published.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt")
    torch.testing.assert_close(theirs["pixel_values"], published(pixels), rtol=0, atol=1e-6)


def test_a_processor_of_another_network_is_left_alone(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    assert type(transformers.AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("ViTImageProcessor")


def test_backbones(tmp_path: Path) -> None:
    stages = ["stem", "stage1", "stage3"]
    theirs = transformers.DinatBackbone.from_pretrained(FOLDER, out_features=stages)
    ours = model.DinatBackbone.from_pretrained("digits", out_features=stages)
    with torch.no_grad():
        for got, expected in zip(theirs(PIXELS).feature_maps, ours(PIXELS).feature_maps, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    again = transformers.AutoBackbone.from_config(theirs.config)
    assert again.channels == theirs.channels == ours.channels


@pytest.mark.parametrize("name", ["mask2former", "oneformer"])
def test_segmenters_are_those_of_transformers_4_53(name: str) -> None:
    network = segmenters.build(name)
    with np.load(segmenters.GOLDEN) as golden:
        for height, width in segmenters.SIZES:
            for what, value in segmenters.outputs(name, network, height, width).items():
                np.testing.assert_allclose(value, golden[what], rtol=0, atol=1e-9, err_msg=what)


def test_nat_is_a_dinat_without_dilation(tmp_path: Path) -> None:
    structure: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "kernel_size": 3, "num_labels": 4}
    network = hf.NatForImageClassification(hf.NatConfig(**structure)).eval()
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nat"
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is hf.NatForImageClassification
    assert [layer.attention.self.dilation for layer in again.dinat.encoder.levels[1].layers] == [1, 1]
    with torch.no_grad():
        expected = network(PIXELS).logits
        assert torch.equal(again(PIXELS).logits, expected)
        ours = model.DinatForImageClassification.from_pretrained(tmp_path)(PIXELS).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(network: Any) -> list[torch.Tensor]:
        network.train()
        torch.manual_seed(0)
        network(PIXELS, labels=LABELS).loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    plain, checkpointed = auto(), auto()
    checkpointed.gradient_checkpointing_enable()
    for one, other in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_lora_trains_is_heard_and_is_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(
        auto(), peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
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
        again = peft.PeftModel.from_pretrained(auto(), tmp_path).eval()
        torch.testing.assert_close(again(PIXELS).logits, after, rtol=0, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(PIXELS).logits, after, rtol=0, atol=1e-4)


def test_a_script_runs_with_it_registered(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FOLDER = " + repr(str(FOLDER)))
    (tmp_path / "script.py").write_text(
        "import sys\nfrom beside import FOLDER\nfrom transformers import AutoModelForImageClassification as Auto\n"
        "print(type(Auto.from_pretrained(FOLDER)).__module__, *sys.argv[1:])\n"
    )
    for words in ([str(tmp_path / "script.py")], ["-m", "script"]):
        done = subprocess.run(
            [sys.executable, "-m", "dinat.hf", *words, "--flag", "x"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(model.__file__).parents[1],
            env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        )
        assert done.stdout.split() == ["dinat.model.hf", "--flag", "x"], done.stderr


def test_no_script_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf"])
    with pytest.raises(SystemExit, match=r"usage: python -m model\.hf SCRIPT"):
        hf.main()


@pytest.mark.parametrize("wrong", [{"hidden_act": "nonsense"}, {"depths": [3, 4, 18, 5]}, {"patch_size": 8}])
def test_a_wrong_configuration_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        hf.DinatModel(transformers.DinatConfig(**wrong))


def test_the_published_network_says_what_transformers_tests_want() -> None:
    """transformers' tests/models/dinat: logits of COCO 000000039769 by dinat-mini."""
    picture = next(Path.home().glob(".cache/**/000000039769.*"), None)
    if picture is None or try_to_load_from_cache(MINI, "config.json") is None:
        pytest.skip("the weights of dinat-mini, or COCO's picture 000000039769, are not in the cache")
    network = transformers.AutoModelForImageClassification.from_pretrained(MINI, local_files_only=True)
    pixels = model.DinatImageProcessor.from_pretrained(MINI, local_files_only=True)(Image.open(picture))
    with torch.no_grad():
        logits = network(pixels).logits
    torch.testing.assert_close(logits[0, :3], torch.tensor([-0.1545, -0.7667, 0.4642]), rtol=1e-4, atol=1e-4)
