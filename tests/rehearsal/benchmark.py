"""Run all of benchmarks.gpu on the fake GPU: `python -m tests.rehearsal.benchmark FILE`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import tests.rehearsal.plugin  # noqa: F401  # before anything imports Triton
from benchmarks import gpu, serving
from dinat.model import AttentionError, DinatForImageClassification, DinatImageProcessor, attention
from tests.rehearsal.fake_gpu.tensors import shapes_only

SERVER = "import tests.rehearsal.plugin; from dinat.app.cli import main; raise SystemExit(main(__import__('sys').argv[1:]))"


def swin() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


class FailingNetwork(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")


def save_digits(folder: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(folder)
    DinatImageProcessor.from_pretrained("digits").save_pretrained(folder)


def natten_without_float32(*args: Any, natten: Any = attention.BACKENDS["natten"], **options: Any) -> torch.Tensor:
    if args[0].dtype == torch.float32:
        raise AttentionError("natten has no kernel")
    output: torch.Tensor = natten(*args, **options)
    return output


def main(file: str) -> None:
    torchvision = ModuleType("torchvision")
    torchvision.models = ModuleType("models")  # type: ignore[attr-defined]
    torchvision.models.swin_t, torchvision.models.swin_b = swin, FailingNetwork  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision
    attention.BACKENDS["natten"] = natten_without_float32
    serving.save_network = save_digits
    gpu.SERVED_CONNECTIONS, gpu.SERVED_SECONDS = [1, 2], 1  # type: ignore[assignment]
    gpu.SERVED_FLAGS = ["--device", "cuda:0", "--max-batch", "2", "--attention", "tiled"]
    command = serving.command
    serving.command = lambda *args: [sys.executable, "-c", SERVER, *command(*args)[3:]]
    sys.argv = ["gpu", "--quick", "--json", file]
    with shapes_only():
        gpu.main()
        rows = gpu.served_rows()
        gpu.SERVED_FLAGS = ["--device", "cuda:7"]
        rows += gpu.served_rows()
        sys.argv = ["gpu", "--json", f"{file}.late", "--seconds", "-1"]
        gpu.main()
    assert [sorted(row) for row in rows] == [["connections", "errors", "images/s", "p50 ms"]] * 2 + [["failed"]], rows


if __name__ == "__main__":
    main(sys.argv[1])
