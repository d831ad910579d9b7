import argparse
import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dinat.model import (
    CheckpointError,
    DinatBackbone,
    DinatConfig,
    DinatForImageClassification,
    DinatImageProcessor,
    DinatModel,
)
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.checkpoints.files import read_pickle
from dinat.model.checkpoints.original import convert_original
from tests.model.checkpoints.originals import random_network, to_original

PIXELS = torch.randn(2, 3, 32, 40)


def small(**changes: Any) -> DinatConfig:
    fields: dict[str, Any] = {
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "dilations": [[1, 2], [1]],
        "kernel_size": 3,
    }
    return DinatConfig(**(fields | {"num_labels": 4} | changes))


@pytest.fixture
def network() -> DinatForImageClassification:
    return random_network(small(layer_scale_init_value=0.1))


@pytest.fixture
def folder(tmp_path: Path, network: DinatForImageClassification) -> Path:
    network.save_pretrained(tmp_path / "folder")
    DinatImageProcessor(size=32, resample=3).save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_saved_network_round_trip(network: DinatForImageClassification, folder: Path) -> None:
    loaded = DinatForImageClassification.from_pretrained(folder)
    assert not loaded.training
    assert torch.equal(loaded(PIXELS).logits, network(PIXELS).logits)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DinatForImageClassification"]
    assert DinatImageProcessor.from_pretrained(folder) == DinatImageProcessor(size=32, resample=3)


def test_saving_into_the_source_folder_is_safe(folder: Path) -> None:
    loaded = DinatForImageClassification.from_pretrained(folder)
    before = loaded(PIXELS).logits
    loaded.save_pretrained(folder)
    assert torch.equal(loaded(PIXELS).logits, before)
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, before)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_pytorch_model_bin(network: DinatForImageClassification, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


def test_pickle_that_executes_code_is_rejected(folder: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        DinatForImageClassification.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def test_model_and_backbone_load_a_classifier_checkpoint(network: DinatForImageClassification, folder: Path) -> None:
    output = network(PIXELS, output_hidden_states=True)
    assert torch.equal(
        DinatModel.from_pretrained(folder)(PIXELS, output_hidden_states=True).hidden_states[2], output.hidden_states[2]
    )
    backbone = DinatBackbone.from_pretrained(folder, out_features=["stem", "stage2"])
    stem, last = backbone(PIXELS).feature_maps
    expected = torch.nn.functional.layer_norm(output.hidden_states[0], (8,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(stem, expected)
    assert last.shape == (2, 16, 4, 5)


def test_backbone_norms_are_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    backbone = DinatBackbone.from_pretrained(folder, out_features=["stage1"])
    torch.nn.init.normal_(backbone.hidden_states_norms["stage1"].weight)
    backbone.save_pretrained(tmp_path / "backbone")
    loaded = DinatBackbone.from_pretrained(tmp_path / "backbone")
    assert torch.equal(loaded(PIXELS).feature_maps[0], backbone(PIXELS).feature_maps[0])


def test_dtype_and_attention_arguments(folder: Path) -> None:
    loaded = DinatForImageClassification.from_pretrained(folder, attention="reference", dtype=torch.float64)
    assert loaded.classifier.weight.dtype == torch.float64
    loaded.to(torch.bfloat16).save_pretrained(folder)
    assert DinatForImageClassification.from_pretrained(folder).classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["flat", "state_dict", "state_dict_ema", "module", "compiled", "training"])
def test_original_files(network: DinatForImageClassification, tmp_path: Path, kind: str) -> None:
    original = to_original(network)
    without_ema = {name: value + 1 for name, value in original.items()}
    contents = {
        "flat": original,
        "state_dict": {"state_dict": original, "epoch": 3},
        "state_dict_ema": {"state_dict": without_ema, "state_dict_ema": original},
        "module": {"state_dict": {f"module.{name}": value for name, value in original.items()}},
        "compiled": {"state_dict": {f"_orig_mod.{name}": value for name, value in original.items()}},
        "training": {"epoch": 3, "args": argparse.Namespace(lr=1e-3), "state_dict": original, "metric": 81.8},
    }[kind]
    torch.save(contents, tmp_path / "checkpoint.pth.tar")
    loaded = DinatForImageClassification.from_pretrained(tmp_path / "checkpoint.pth.tar", config=network.config)
    torch.testing.assert_close(loaded(PIXELS).logits, network(PIXELS).logits)
    assert torch.equal(loaded.classifier.weight, network.classifier.weight)


PUBLISHED = {
    "mini": "dinat_mini_in1k_224.pth",
    "base": "dinat_base_in1k_224.pth",
    "large": "dinat_large_in22k_in1k_224.pth",
    "large-384": "dinat_large_in22k_in1k_384.pth",
    "large-11x11-384": "dinat_large_in22k_in1k_384_11x11.pth",
    "nat-mini": "nat_mini.pth.tar",
    "nat-base": "nat_base.pth.tar",
}


def save_shapes(preset: str, path: Path) -> DinatForImageClassification:
    """Write an original file of a published network with expanded scalars as weights, because only their shapes matter."""
    with torch.device("meta"):
        network = DinatForImageClassification(DinatConfig.preset(preset))
    torch.save({name: torch.zeros(1).expand(value.shape) for name, value in to_original(network).items()}, path)
    assert path.stat().st_size < 2**20
    return network


@pytest.mark.parametrize("preset", PUBLISHED)
def test_configuration_of_an_original_file_is_inferred(preset: str, tmp_path: Path) -> None:
    path = tmp_path / PUBLISHED[preset]
    network = save_shapes(preset, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == DinatConfig.preset(preset)
    assert DinatImageProcessor.from_pretrained(checkpoint).size == (384 if "384" in preset else 224)
    assert {k: v.shape for k, v in checkpoint.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("preset", "name", "candidates"),
    [
        ("mini", "model_best.pth.tar", "mini or nat-mini"),
        ("nat-base", "denatured.pth", "base or nat-base"),
        ("large", "dinat_large_in22k.pth", "large or large-384"),
    ],
)
def test_ambiguous_original_file_raises_checkpoint_error(preset: str, name: str, candidates: str, tmp_path: Path) -> None:
    save_shapes(preset, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"may be {candidates}, which differ only in dilations.*--preset"):
        open_checkpoint(tmp_path / name)
    assert open_checkpoint(tmp_path / name, config=DinatConfig.preset(preset)).config.dilations == (
        DinatConfig.preset(preset).dilations
    )


def test_original_file_is_read_once_and_its_weights_are_not_shared(
    network: DinatForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "unpublished.pth"
    torch.save(to_original(network), path)
    reads: list[Path] = []
    monkeypatch.setattr("dinat.model.checkpoints.files.read_pickle", lambda path: (reads.append(path), read_pickle(path))[1])
    checkpoint = open_checkpoint(path, config=network.config)
    DinatImageProcessor.from_pretrained(checkpoint)
    first = DinatForImageClassification.from_pretrained(checkpoint)
    assert reads == [path]
    second = DinatForImageClassification.from_pretrained(checkpoint)
    torch.nn.init.zeros_(first.classifier.weight)
    assert torch.equal(second.classifier.weight, network.classifier.weight)


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_backbone_of_a_detector(network: DinatForImageClassification, tmp_path: Path, wrap: str) -> None:
    original = {name: value for name, value in to_original(network).items() if not name.startswith(("norm.", "head."))}
    norms = {f"norm{i}.{kind}": torch.randn(8 * 2**i) for i in range(2) for kind in ("weight", "bias")}
    detector = {f"backbone.{name}": value for name, value in (original | norms).items()} | {"neck.conv.weight": torch.ones(1)}
    torch.save({wrap: detector, "meta": {"epoch": 36}}, tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match=r"is a detector or segmenter.*pass its configuration"):
        open_checkpoint(tmp_path / "detector.pth")
    backbone = DinatBackbone.from_pretrained(
        tmp_path / "detector.pth", config=network.config, out_features=["stage1", "stage2"]
    )
    expected = DinatBackbone.from_pretrained(_saved(network, tmp_path / "classifier"), out_features=["stage1", "stage2"])
    for i, norm in enumerate(expected.hidden_states_norms.values()):
        norm.load_state_dict({kind: norms[f"norm{i}.{kind}"] for kind in ("weight", "bias")})
    for feature_map, reference in zip(backbone(PIXELS).feature_maps, expected(PIXELS).feature_maps, strict=True):
        torch.testing.assert_close(feature_map, reference)


def _saved(network: DinatForImageClassification, folder: Path) -> Path:
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("keys", [["patch_embed.proj.weight"], ["anything"]], ids=["DiNAT_s", "other"])
def test_unsupported_original_networks_raise_checkpoint_error(keys: list[str], tmp_path: Path) -> None:
    torch.save(dict.fromkeys(keys, torch.zeros(1)), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not an original DiNAT or NAT.*DiNAT_s"):
        open_checkpoint(tmp_path / "x.pth")


def test_unpublished_sizes_require_a_configuration(network: DinatForImageClassification, tmp_path: Path) -> None:
    torch.save(to_original(network), tmp_path / "unpublished.pth")
    with pytest.raises(CheckpointError, match="dilations cannot be inferred from weights: pass the configuration"):
        DinatForImageClassification.from_pretrained(tmp_path / "unpublished.pth")


def test_missing_gamma2_raises_checkpoint_error(network: DinatForImageClassification) -> None:
    original = to_original(network)
    del original["levels.0.blocks.1.gamma2"]
    with pytest.raises(CheckpointError, match="has no corresponding gamma2"):
        convert_original(original)


def test_error_lists_all_mismatched_keys(network: DinatForImageClassification, folder: Path) -> None:
    state = network.state_dict()
    del state["dinat.layernorm.weight"], state["classifier.bias"]
    state["dinat.embeddings.norm.bias"] = torch.zeros(3)
    state["head.weight"] = torch.zeros(1)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as raised:
        DinatForImageClassification.from_pretrained(folder)
    message = str(raised.value)
    assert "2 missing: dinat.layernorm.weight, classifier.bias" in message
    assert "1 unexpected: head.weight" in message
    assert "1 with another shape: dinat.embeddings.norm.bias is (3,), expected (8,)" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "[]"}, "does not contain a JSON object"),
        ({"config.json": '{"model_type": "vit"}'}, "model_type 'vit'"),
        ({"config.json": '{"depths": 3}'}, "is not a valid DiNAT configuration"),
        ({"config.json": "{}"}, "has no model.safetensors and no pytorch_model.bin"),
        ({"config.json": "{}", "model.safetensors": "nonsense"}, "cannot be read as weights"),
        ({"config.json": "{}", "pytorch_model.bin": "nonsense"}, "cannot be read as weights"),
    ],
)
def test_invalid_folders_raise_checkpoint_error(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        DinatForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "missing.pth", "mini"])
def test_missing_sources_raise_checkpoint_error(source: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"does not exist: use a folder with config\.json, a \.pth file, a Hub id such as"
    ):
        open_checkpoint(source)


def test_embedded_digits() -> None:
    network = DinatForImageClassification.from_pretrained("digits")
    assert network.config.id2label == {digit: str(digit) for digit in range(10)}


class HubHandler(BaseHTTPRequestHandler):
    """The endpoint of the Hub for downloading a file: /REPO/resolve/REVISION/FILE."""

    server: "Hub"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        """Create a repository, and take its files in a commit."""
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        answer: dict[str, Any] = {}
        if self.headers.get("Authorization") != "Bearer secret":
            return self._send_error(401, "Unauthorized")
        if self.path == "/api/repos/create":
            self.server.created.append(lines[0])
            answer = {"url": f"http://127.0.0.1:{self.server.server_port}/someone/new"}
        elif self.path == "/api/models/someone/new/preupload/main":
            answer["files"] = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
        elif self.path == "/api/models/someone/new/commit/main":
            for line in lines:
                if line["key"] == "file":
                    self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://127.0.0.1:{self.server.server_port}/someone/new/commit/c0ffee"
            answer = {"commitUrl": url, "commitOid": "c0ffee"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            return self._send_error(404, "EntryNotFound")
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def _answer(self, with_body: bool) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        match = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path)
        if match is None or match[1] != "someone/network":
            return self._send_error(401, "RepoNotFound")
        if match[2] == "private" and self.headers.get("Authorization") != "Bearer secret":
            return self._send_error(401, "GatedRepo")
        if match[2] not in ("main", "private", "c0ffee"):
            return self._send_error(404, "RevisionNotFound")
        path = self.server.folder / match[3]
        if not path.is_file():
            return self._send_error(404, "EntryNotFound")
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "beef")
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        return None

    def _send_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.created: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def dinat_info(hub: Hub, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return in_hub_environment(hub, cache, "-m", "dinat", "info", *arguments, **environment)


def in_hub_environment(hub: Hub, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process, because huggingface_hub reads its environment on import."""
    hub_environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **hub_environment, **environment, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_hub_files_are_downloaded_once_and_cached(hub: Hub, tmp_path: Path) -> None:
    first = dinat_info(hub, tmp_path / "cache", "someone/network")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["labels"] == 4
    downloads = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert sorted(downloads) == ["config.json", "model.safetensors", "preprocessor_config.json"]

    hub.requests.clear()
    offline = dinat_info(hub, tmp_path / "cache", "someone/network", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout
    assert hub.requests == []


def test_revision_and_token_are_sent_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    without_token = dinat_info(hub, tmp_path / "cache", "someone/network", "--revision", "private")
    assert without_token.returncode == 1
    with_token = dinat_info(hub, tmp_path / "cache", "someone/network", "--revision", "private", HF_TOKEN="secret")
    assert with_token.returncode == 0, with_token.stderr
    assert ("HEAD", "/someone/network/resolve/private/config.json", "Bearer secret") in hub.requests


PUSH = """
import sys
from dinat.model import CheckpointError, DinatForImageClassification
network = DinatForImageClassification.from_pretrained(sys.argv[1])
try:
    print(network.push_to_hub("someone/new", token=sys.argv[2], private=True, max_shard_size=2000))
except CheckpointError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("token", ["secret", "wrong"])
def test_network_is_uploaded_to_the_hub(
    token: str, hub: Hub, network: DinatForImageClassification, folder: Path, tmp_path: Path
) -> None:
    done = in_hub_environment(hub, tmp_path / "cache", "-c", PUSH, str(folder), token)
    if token == "wrong":
        assert done.returncode == 0 and not hub.uploaded
        [line] = done.stderr.splitlines()
        assert line.startswith("someone/new cannot be uploaded to the Hub: ")
        return
    assert done.stdout.endswith("/someone/new/commit/c0ffee\n"), done.stderr
    [created] = hub.created
    assert (created["organization"], created["name"]) == ("someone", "new")
    assert created.get("visibility") == "private" or created.get("private") is True
    for name, content in hub.uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(DinatForImageClassification.from_pretrained(tmp_path)(PIXELS).logits, network(PIXELS).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["someone/nothing"], {}),
        (["someone/network", "--revision", "nowhere"], {}),
        (["someone/network"], {"HF_HUB_OFFLINE": "1"}),
        (["someone/network"], {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ],
    ids=["repository", "revision", "offline", "unreachable"],
)
def test_hub_errors_end_in_a_one_line_error(
    hub: Hub, tmp_path: Path, arguments: list[str], environment: dict[str, str]
) -> None:
    done = dinat_info(hub, tmp_path / "cache", *arguments, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    assert len(lines) == 1
    assert "someone/" in lines[0]
    assert "Traceback" not in done.stderr
