"""Open hostile checkpoints, each in a process of its own, and print what each did as one line of JSON.

python -m tests.model.checkpoints.hostile FOLDER
"""

import io
import json
import os
import pickle
import resource
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from dinat.model import DinatError, DinatForImageClassification, DinatImageProcessor
from tests.model.checkpoints.originals import random_network
from tests.model.checkpoints.test_checkpoint import small

SECONDS = 20
"""CPU time after which a process is ended."""
Files = dict[str, bytes]

VALUES: tuple[Any, ...] = (-1, 2**40, float("nan"), "x" * 10**6, True, [[]], {}, [2**40] * 2)
CONFIG_FIELDS = ("embed_dim", "depths", "num_heads", "dilations", "kernel_size", "mlp_ratio", "num_labels", "patch_size")
MORE_CONFIG: tuple[dict[str, Any], ...] = (
    {"id2label": ["a", "b"]},
    {"id2label": {"0": 1}},
    {"id2label": {str(2**70): "a"}},
    {"id2label": {str(i): "x" for i in range(10**6)}},
    {"hidden_act": "__import__"},
    {"hidden_act": 1},
    {"channels_of": 1},
    {"__class__": "x"},
    {"to_dict": None},
    {"model_type": "bert"},
    {"model_type": ["dinat"]},
    {"model_type": "nat", "depths": 3},
    {"model_type": "nat", "depths": [10**9] * 4},
    {"out_features": "stage1"},
    {"out_indices": ["a"]},
    {"label2id": 3},
    {"drop_path_rate": 7},
    {"qkv_bias": "false"},
    {"layer_norm_eps": "1e-5"},
    {"problem_type": 5},
    {"layer_scale_init_value": "nan"},
    {"num_channels": 10**9},
)
TEXTS = (
    b"",
    b"\xff\xfe\x00",
    b"[" * 200_000,
    b"[1, 2]",
    b"null",
    b'{"depths": ' + b"9" * 10**6 + b"}",
    b'{"a": "' + b"x" * 10**7 + b'"}',
)
PROCESSORS: tuple[dict[str, Any], ...] = tuple(
    {name: value}
    for name, values in {
        "size": (0, -1, 2**40, True, "224", {"height": 1}, {"height": 2**31, "width": 2}, {"shortest_edge": 10**9}, [224, 224]),
        "image_mean": (0.5, [], ["a"] * 3, [float("nan")] * 3),
        "image_std": ([0, 1, 1], [1e400] * 3, {}),
        "crop_pct": ("0.9", 1e-5, -1, float("nan")),
        "resample": (99, "bicubic", [3]),
        "rescale_factor": ("1/255", float("inf")),
        "do_resize": ("yes", 1),
    }.items()
    for value in values
)


def checkpoints() -> Iterator[tuple[str, Files]]:
    """Yield the name and the files of each checkpoint, which differ from those of a valid one."""
    network = random_network(small())
    config = json.loads(json.dumps(network.config.to_dict()))
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    valid = {"config.json": json.dumps(config).encode(), "model.safetensors": save(weights)}
    for field, value in product(CONFIG_FIELDS, VALUES):
        yield f"{field} {str(value)[:20]}", valid | {"config.json": json.dumps(config | {field: value}).encode()}
    for changes in MORE_CONFIG:
        yield str(changes)[:40], valid | {"config.json": json.dumps(config | changes).encode()}
    for text in TEXTS:
        yield f"config.json {text[:10]!r}", valid | {"config.json": text}
        yield f"preprocessor_config.json {text[:10]!r}", valid | {"preprocessor_config.json": text}
        yield f"index {text[:10]!r}", {"config.json": valid["config.json"], "model.safetensors.index.json": text}
    for values in PROCESSORS:
        yield f"processor {values}", valid | {"preprocessor_config.json": json.dumps(values).encode()}
    for name, content in _weights(valid["model.safetensors"]):
        yield f"{name} {content[:10]!r}", {"config.json": valid["config.json"], name: content}


def _weights(safetensors: bytes) -> Iterator[tuple[str, bytes]]:
    tensors = load(safetensors)
    for size in (0, 7, 8, 100, len(safetensors) // 2, len(safetensors) - 1):
        yield "model.safetensors", safetensors[:size]
    for length in (0, 2**31, 2**63, 2**64 - 1):
        yield "model.safetensors", length.to_bytes(8, "little") + safetensors[8:]
    for header in ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, {"a": 1}, {"a": {"dtype": "F32"}}):
        text = json.dumps(header).encode()
        yield "model.safetensors", len(text).to_bytes(8, "little") + text + bytes(4)
    first = next(iter(tensors))
    modified: tuple[Callable[[torch.Tensor], Any], ...] = (
        lambda x: x.long(),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x.sum(),
        lambda x: torch.zeros(1).expand(2**40),
        lambda x: x.to(torch.complex64),
        lambda x: 3,
        lambda x: [[]] * 100_000,
        lambda x: torch.empty(0),
    )
    for modify in modified:
        yield "pytorch_model.bin", _saved(tensors | {first: modify(tensors[first])})
    yield "pytorch_model.bin", _saved([1, 2])
    yield "pytorch_model.bin", _saved(tensors)[:-50]
    yield "pytorch_model.bin", pickle.dumps(print)
    yield "pytorch_model.bin", b"\x80\x02" + b"]" * 10**5 + b"."
    yield "pytorch_model.bin", b"\x80\x02" + b"(" * 10**5 + b"."
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    yield "pytorch_model.bin", bomb.getvalue()


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def outcome(folder: Path) -> str:
    """Return the message of the error, in one line, or "loaded"."""
    try:
        network = DinatForImageClassification.from_pretrained(folder)
        processor = DinatImageProcessor.from_pretrained(folder)
        network(processor(torch.zeros(3, 20, 20).byte()))
    except DinatError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def run(name: str, files: Files, folder: Path) -> dict[str, Any]:
    """Open a checkpoint in a process of its own, and measure it."""
    for old in folder.iterdir():
        old.unlink()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        try:
            message = outcome(folder)
        except BaseException as error:
            message = f"TRACEBACK {type(error).__name__}: {error}"
        os.write(writer, message[:10_000].encode(errors="replace"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        message = pipe.read().decode()
    _, status, usage = os.wait4(pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    return {"name": name, "message": message, "status": status, "seconds": seconds, "megabytes": usage.ru_maxrss / 1024}


def main() -> None:
    """Print a line for each checkpoint."""
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    started = time.monotonic()
    for name, files in checkpoints():
        print(json.dumps(run(name, files, folder)), flush=True)
    print(f"{time.monotonic() - started:.0f} seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
