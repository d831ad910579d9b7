import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import torch

import dinat.model
from dinat.app.cli import COMMANDS, main
from dinat.model import DinatConfig, DinatForImageClassification
from tests.app.conftest import DIGITS
from tests.model.checkpoints.originals import random_network, to_original


def test_serve_runs_until_sigterm() -> None:
    server = subprocess.Popen([sys.executable, "-m", "dinat", "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        log, address = "", None
        while address is None or '"ready"' not in log:
            line = server.stderr.readline()
            assert line, log
            log += line
            address = address or re.search(r"http://127\.0\.0\.1:\d+", log)
        image = (DIGITS / "5-2.png").read_bytes()
        response = httpx.post(f"{address[0]}/classify", files={"image": image}, timeout=60)
        assert response.json()["predictions"][0]["label"] == "5"
    finally:
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=60)
    assert server.returncode == 0, log + rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "abc"], "DINAT_PORT='abc': Input should be a valid integer"),
        (["serve", "--port", "tcp://10.0.0.1:80"], "Kubernetes sets this for a Service named dinat: set enableServiceLinks"),
        (["serve", "--api-keys-file", "nowhere"], "no API key can be read from it: [Errno 2] No such file or directory"),
        (["serve", "--precision", "int3", "--max-batch", "0"], "DINAT_PRECISION='int3'"),
        (["serve", "--max-batch", "0"], "DINAT_MAX_BATCH='0': Input should be greater than or equal to 1"),
        (["serve", "--port", "0", "--model", "no/such/model.pth"], "'no/such/model.pth' does not exist"),
        (["info", "nothing"], "'nothing' does not exist"),
    ],
)
def test_user_error_is_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dinat", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_missing_gpu_is_one_line(device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinat", "serve", "--port", "0", "--device", device],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    assert f"device '{device}' is not available, PyTorch finds 0 CUDA devices: set cpu, install the driver" in line


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dinat-serve {version('dinat-serve')}\n"


def test_help_and_completion_do_not_import_torch() -> None:
    code = "import sys; from dinat.app.cli import main; assert main({!r}) == 0; assert 'torch' not in sys.modules"
    help_output = subprocess.run([sys.executable, "-c", code.format(["--help"])], capture_output=True, text=True, timeout=60)
    assert help_output.returncode == 0, help_output.stderr
    assert all(f"  {name} " in help_output.stdout for name in COMMANDS)
    completing = {"_DINAT_COMPLETE": "complete_bash", "COMP_WORDS": "dinat in", "COMP_CWORD": "1"}
    completion = subprocess.run(
        [sys.executable, "-c", code.format([])], capture_output=True, text=True, timeout=60, env=os.environ | completing
    )
    assert completion.stdout.split() == ["info"], completion.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: dinat {command}" in capsys.readouterr().out
    assert main([command, "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "digits"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] == 448_584
    assert summary["labels"] == 10
    assert summary["image processor"]["size"] == 64


def test_convert_with_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(f"digit {n}" for n in range(10)))
    assert main(["convert", "digits", str(tmp_path / "copy"), "--labels", str(tmp_path / "labels.txt")]) == 0
    copy, first = (DinatForImageClassification.from_pretrained(source) for source in (tmp_path / "copy", "digits"))
    assert copy.config.id2label[3] == "digit 3"
    assert torch.equal(copy.classifier.weight, first.classifier.weight)
    assert (tmp_path / "copy" / "preprocessor_config.json").exists()


def test_convert_with_wrong_number_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    assert main(["convert", "digits", str(tmp_path / "copy"), "--labels", str(tmp_path / "labels.txt")]) == 1
    assert "has 2 labels (one per line), the checkpoint has 10" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_convert_original_file_of_unpublished_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = random_network(DinatConfig(embed_dim=8, depths=[2, 1], num_heads=[1, 2], dilations=[[1, 2], [1]], kernel_size=3))
    torch.save({"state_dict": to_original(network)}, tmp_path / "model_best.pth.tar")
    source, copy = str(tmp_path / "model_best.pth.tar"), tmp_path / "copy"
    assert main(["convert", source, str(copy)]) == 1
    assert "pass the configuration: dinat convert model_best.pth.tar FOLDER --config FILE" in capsys.readouterr().err
    network.config.save_pretrained(tmp_path / "own")
    assert main(["convert", source, str(copy), "--config", str(tmp_path / "own" / "config.json")]) == 0
    pixels = torch.randn(1, 3, 32, 32)
    loaded = DinatForImageClassification.from_pretrained(copy)
    torch.testing.assert_close(loaded(pixels).logits, network(pixels).logits)
    assert loaded.config.dilations == [[1, 2], [1]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "mini", "--config", "x.json"], "--preset and --config exclude each other"),
        (["--preset", "nano"], "preset 'nano' is not known: use one of mini,"),
        (["--config", "/no/such.json"], "/no/such.json"),
        (["--config", str(DIGITS / "0-1.png")], "is not a DiNAT config.json"),
    ],
)
def test_convert_with_invalid_config_is_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "digits", str(tmp_path / "copy"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_during_the_imports_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinat.app.cli.import_module", interrupt)
    assert main(["info", "digits"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.train
@pytest.mark.parametrize(
    ("arguments", "interrupted", "advice"),
    [
        (
            ["classify", str(DIGITS)],
            "dinat.app.cli.classify._classify",
            "the results are not complete; with --output jsonl --to FILE, the same command resumes",
        ),
        (
            ["classify", str(DIGITS), "--output", "jsonl", "--to", "{out}"],
            "dinat.app.cli.classify._classify",
            "the results so far are in {out}; run the same command again to resume",
        ),
        (
            ["train", "data", "{out}", "--from", "digits"],
            "dinat.app.training.train.train",
            "no epoch is complete yet; run the same command again to resume",
        ),
        (
            ["train", "data", "{digits}", "--from", "digits"],
            "dinat.app.training.train.train",
            "the network so far is in {digits}; run the same command again to resume",
        ),
    ],
)
def test_ctrl_c_says_what_is_saved_and_how_to_resume(
    arguments: list[str],
    interrupted: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    names = {"out": tmp_path / "out", "digits": Path(dinat.model.__file__).parent / "digits"}
    monkeypatch.setattr(interrupted, interrupt)
    assert main([argument.format(**names) for argument in arguments]) == 130
    assert capsys.readouterr().err == f"dinat: interrupted: {advice.format(**names)}\n"
