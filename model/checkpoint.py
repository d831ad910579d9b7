"""Where a DiNAT's configuration, weights, labels and preprocessing come from, and writing them back.

Read: a folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, the embedded "digits".
Written: the Hub's layout.
"""

import argparse
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import HUB_IDS, PRESETS, DinatConfig
from model.errors import CheckpointError, ConfigError

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
EMBEDDED = {"digits": Path(__file__).parent / "digits"}
"""Checkpoints that come with the package, by name."""

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, its weights not read yet.

    source: as it was asked for.  processor: what preprocessor_config.json holds, or None.  weights: finds the file that holds
    them.  state_dict: reads them, on the CPU, under the Hub's names.  Both raise CheckpointError.
    """

    source: str
    config: DinatConfig
    processor: dict[str, Any] | None
    weights: Callable[[], Path]
    state_dict: Callable[[], StateDict]


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    config: DinatConfig | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its configuration.

    source: a folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, or "digits".  revision (branch, tag or
    commit), token, cache_dir, local_files_only: for a Hub id, as huggingface_hub takes them.  config: instead of the
    checkpoint's own.  Raises CheckpointError, ConfigError.
    """
    path = EMBEDDED.get(str(source), Path(source))
    if path.is_dir():
        return _hub_layout(str(source), lambda name: _existing(path / name), config)
    if path.is_file():
        return _original(path, config)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and path.suffix not in (".pth", ".tar", ".bin", ".safetensors"):

        def download(name: str) -> Path | None:
            return _download(str(source), name, revision, token, cache_dir, local_files_only)

        return _hub_layout(str(source), download, config)
    raise CheckpointError(
        f"{str(source)!r} is not there: give a folder with {CONFIG}, a .pth file, a Hub id such as {HUB_IDS['mini']}, "
        f"or {' or '.join(map(repr, EMBEDDED))}"
    )


def save_checkpoint(folder: str | Path, config: DinatConfig, state_dict: StateDict, architecture: str) -> None:
    """Write config.json and model.safetensors into a folder, which is made where it is missing.

    The weights are written beside the old file and then take its place, so a network that still reads it is not harmed.
    """
    folder = Path(folder)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in state_dict.values()}
    values = config.to_dict() | {"architectures": [architecture], "torch_dtype": dtypes.pop() if len(dtypes) == 1 else None}
    DinatConfig.from_dict(values).save_pretrained(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        save_file(tensors, Path(temporary) / SAFETENSORS, metadata={"format": "pt"})
        (Path(temporary) / SAFETENSORS).chmod((folder / CONFIG).stat().st_mode)  # as the umask has it, not for the owner alone
        os.replace(Path(temporary) / SAFETENSORS, folder / SAFETENSORS)


def fit(state_dict: StateDict, expected: Mapping[str, Tensor], source: str, ignored: tuple[str, ...] = ()) -> StateDict:
    """Check that a state dict has exactly the expected keys and shapes.

    ignored: prefixes of keys that may be there too and are left out. Raises one CheckpointError that lists all that is wrong.
    """
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected and not key.startswith(ignored or ("\0",))]
    reshaped = [
        f"{key} is {tuple(state_dict[key].shape)}, wanted {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    faults = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in found if keys]
    if faults:
        raise CheckpointError(f"the weights of {source} do not fit their configuration; keys {'; '.join(faults)}")
    return {key: state_dict[key] for key in expected}


def convert_original(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The keys of the original repository to the Hub's, for DinatForImageClassification."""
    converted: StateDict = {}
    for key, value in state_dict.items():
        for pattern, replacement in _ORIGINAL_KEYS:
            key = re.sub(pattern, replacement, key)
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace(".qkv.", f".self.{name}.")] = part.contiguous()
        elif key.endswith(".gamma1"):
            gamma2 = state_dict.get(_original_twin(key))
            if gamma2 is None:
                raise CheckpointError(f"{key} has no gamma2 beside it")
            converted[key.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, gamma2])
        elif not key.endswith(".gamma2"):
            converted[key] = value
    return converted


_ORIGINAL_KEYS = [
    (r"^patch_embed\.proj\.", "dinat.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "dinat.embeddings.norm."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"dinat.encoder.levels.\1.layers.\2."),
    (r"^levels\.(\d+)\.downsample\.", r"dinat.encoder.levels.\1.downsample."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "dinat.layernorm."),
    (r"^head\.", "classifier."),
]


def _original_twin(key: str) -> str:
    """The original name of the gamma2 that goes with a converted gamma1."""
    return re.sub(r"^dinat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.gamma1$", r"levels.\1.blocks.\2.gamma2", key)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _download(
    repo: str, name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path | None:
    """A file of a Hub repository, from the cache if it is there; None if the repository has no such file."""
    offline = local_files_only or constants.is_offline_mode()
    try:
        return Path(
            hf_hub_download(repo, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        )
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        raise CheckpointError(f"{repo} on the Hub cannot be reached and {name} is not in the cache: {_line(error)}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise CheckpointError(f"{repo} on the Hub cannot be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _hub_layout(source: str, file: Callable[[str], Path | None], config: DinatConfig | None) -> Checkpoint:
    """A checkpoint of the Hub's layout; `file` gives the path of one of its files, or None."""
    if config is None:
        path = file(CONFIG)
        if path is None:
            raise CheckpointError(f"{source} has no {CONFIG} (or, offline, it is not in the cache)")
        try:
            config = DinatConfig.from_dict(_json(path))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{CONFIG} of {source} names no DiNAT: {error}") from error
    processor = file(PROCESSOR)

    def weights() -> Path:
        found = file(SAFETENSORS) or file(PICKLE)
        if found is None:
            raise CheckpointError(f"{source} has no {SAFETENSORS} and no {PICKLE} (or, offline, they are not in the cache)")
        return found

    def state_dict() -> StateDict:
        path = weights()
        return _read_safetensors(path) if path.name == SAFETENSORS else _tensors(_read_pickle(path), path)

    return Checkpoint(source, config, None if processor is None else _json(processor), weights, state_dict)


def _original(path: Path, config: DinatConfig | None) -> Checkpoint:
    """A file of the original repository or of its training; its configuration is read off the weights and the file's name."""
    state_dict = convert_original(_unwrap(_read_pickle(path), path))
    settings = config or _config_of(state_dict, path)
    size = getattr(settings, "image_size", 224)
    processor = {"size": size, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return Checkpoint(str(path), settings, processor, lambda: path, lambda: state_dict)


def _unwrap(loaded: Any, path: Path) -> StateDict:
    """The weights within a training checkpoint, the averaged ones first, without the prefix of data parallel training."""
    for name in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    weights = {key.removeprefix("module."): value for key, value in _tensors(loaded, path).items()}
    if "patch_embed.proj.0.weight" not in weights:
        raise CheckpointError(f"{path} is not an original DiNAT file: it has no patch_embed.proj.0.weight")
    return weights


def _tensors(loaded: Any, path: Path) -> StateDict:
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return dict(loaded)


def _config_of(state_dict: StateDict, path: Path) -> DinatConfig:
    """Read sizes off the weights; dilations, which leave no trace in them, off the file's name or the only preset that fits."""
    layer = "dinat.encoder.levels.{}.layers.{}.{}"
    depths: list[int] = []
    while layer.format(len(depths), 0, "attention.self.rpb") in state_dict:
        stage, depth = len(depths), 0
        while layer.format(stage, depth, "attention.self.rpb") in state_dict:
            depth += 1
        depths.append(depth)
    try:
        rpbs = [state_dict[layer.format(stage, 0, "attention.self.rpb")] for stage in range(len(depths))]
        found = {
            "embed_dim": state_dict["dinat.embeddings.norm.weight"].shape[0],
            "depths": depths,
            "num_heads": [rpb.shape[0] for rpb in rpbs],
            "kernel_size": (rpbs[0].shape[1] + 1) // 2,
            "mlp_ratio": state_dict[layer.format(0, 0, "intermediate.dense.weight")].shape[0]
            / state_dict["dinat.embeddings.norm.weight"].shape[0],
            "qkv_bias": layer.format(0, 0, "attention.self.query.bias") in state_dict,
            "layer_scale_init_value": 1e-5 if layer.format(0, 0, "layer_scale_parameters") in state_dict else 0.0,
            "num_labels": state_dict["classifier.weight"].shape[0] if "classifier.weight" in state_dict else 0,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is not an original DiNAT file: {error} is missing") from error
    fitting = [
        name
        for name in PRESETS
        if all(getattr(DinatConfig.preset(name), k) == v for k, v in found.items() if k != "num_labels")
    ]
    if len(fitting) > 1:
        fitting = ["large-384" if "384" in path.name else "large"]
    if not fitting:
        raise CheckpointError(
            f"{path} fits none of the published models ({', '.join(PRESETS)}), and dilations leave no trace in weights: "
            "give its configuration"
        )
    return DinatConfig.preset(fitting[0], num_labels=found["num_labels"])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def _read_safetensors(path: Path) -> StateDict:
    try:
        state_dict: StateDict = load_file(path)
        return state_dict
    except (SafetensorError, OSError) as error:
        _unreadable(path, error)


def _read_pickle(path: Path) -> Any:
    """Read weights only: a pickle that would run code is refused. Namespace holds the arguments of a training run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    raise CheckpointError(f"{path} cannot be read as weights: {_line(error)[:300]}") from error
