"""Open a checkpoint (configuration, weights, preprocessing) from any supported source, and save one in the Hub's layout."""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from dinat.model.checkpoints.files import (
    CONFIG,
    PROCESSOR,
    SAFETENSORS,
    Files,
    StateDict,
    find_files,
    read_weights,
)
from dinat.model.checkpoints.original import read_original
from dinat.model.config import DinatConfig
from dinat.model.errors import CheckpointError, ConfigError
from dinat.model.writing import writing

DEFAULT_SHARD_SIZE = "5GB"
"""Size above which weights are divided into several files, as in transformers."""
SHOWN_KEYS, SHOWN_CHARACTERS = 20, 120
"""Limits of keys in an error message."""
SHARDS = "model-[0-9]*-of-[0-9]*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. from_pretrained accepts it as a source, so that no file is located or read twice.

    Attributes:
        source: Source as passed to open_checkpoint.
        revision: Revision as passed to open_checkpoint.
        config: Configuration of the network.
        processor: Contents of preprocessor_config.json, or None.
        weights: Returns the paths of the weights, several if they are sharded. Raises CheckpointError.
        state_dict: Reads the weights, on the CPU, with the keys of the Hub. Raises CheckpointError.
    """

    source: str
    revision: str | None
    config: DinatConfig
    processor: dict[str, Any] | None
    weights: Callable[[], Sequence[Path]]
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
    """Locate a checkpoint and read its configuration. The weights of an original file are read as well.

    Args:
        source: A folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, or "digits".
        revision: Branch, tag or commit of a Hub repository.
        token: Access token of the Hub.
        cache_dir: Cache folder of huggingface_hub.
        local_files_only: Whether to use only cached files.
        config: Replaces the checkpoint's configuration.

    Raises:
        CheckpointError: The checkpoint cannot be found or read.
        ConfigError: The configuration is invalid.
    """
    files = find_files(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if files.original is not None:
        return _original(files.original, config)
    return _hub_layout(files, revision, config)


def save_checkpoint(
    folder: str | Path,
    config: DinatConfig,
    state_dict: StateDict,
    architecture: str,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Write config.json and model.safetensors into a folder, which is created if missing.

    Weights above max_shard_size (bytes, or text such as "2GB") are divided into several files and an index, as transformers
    does. Existing weights are replaced, each file atomically, so a network that has it memory-mapped is not affected.
    """
    folder = Path(folder)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in state_dict.values()}
    values = config.to_dict() | {"architectures": [architecture], "torch_dtype": dtypes.pop() if len(dtypes) == 1 else None}
    DinatConfig.from_dict(values).save_pretrained(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    index = f"{SAFETENSORS}.index.json"
    with writing(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, keys in shards.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, Path(temporary) / name, metadata={"format": "pt"})
        if shards.is_sharded:
            content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (Path(temporary) / index).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        written = sorted(path.name for path in Path(temporary).iterdir())  # the index after the files that it names
        for name in written:
            (Path(temporary) / name).chmod((folder / CONFIG).stat().st_mode)  # permissions by the umask, not owner-only
            os.replace(Path(temporary) / name, folder / name)
    for old in (SAFETENSORS, index, *(path.name for path in folder.glob(SHARDS))):
        if old not in written:
            (folder / old).unlink(missing_ok=True)


def match_state_dict(
    state_dict: StateDict, expected: Mapping[str, Tensor], source: str, ignored: tuple[str, ...] = ()
) -> StateDict:
    """Return the expected keys of a state dict, after checking its keys and shapes.

    Args:
        state_dict: Weights of a checkpoint.
        expected: State dict of the network.
        source: Name of the checkpoint, for the error message.
        ignored: Prefixes of additional keys, which are removed.

    Raises:
        CheckpointError: Keys are missing, unexpected, or have another shape; the message lists them.
    """
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected and not key.startswith(ignored or ("\0",))]
    mismatched = [
        f"{key} is {tuple(state_dict[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("with another shape", mismatched))
    messages = [f"{len(keys)} {problem}: {_listed(keys)}" for problem, keys in problems if keys]
    if messages:
        raise CheckpointError(f"the weights of {source} do not match their configuration; keys {'; '.join(messages)}")
    matched = {key: state_dict[key] for key in expected}
    _check_numbers(matched, source)
    return matched


def _listed(keys: Sequence[str]) -> str:
    """Return the keys as text, so many that a stage's worth of them is named but the message remains readable."""
    names = [key[:SHOWN_CHARACTERS] for key in keys[:SHOWN_KEYS]]
    return ", ".join(names) + (f" and {len(keys) - len(names)} more" if len(keys) > len(names) else "")


def _check_numbers(state_dict: StateDict, source: str) -> None:
    """Check that weights are floating-point numbers in memory. Warns if some are infinite or NaN. Raises CheckpointError."""
    for key, value in state_dict.items():
        if not value.is_floating_point() or value.layout is not torch.strided or value.is_meta:
            kind = "no values" if value.is_meta else f"{str(value.layout).removeprefix('torch.')} values of {value.dtype}"
            raise CheckpointError(f"{key} of {source} has {kind}: floating-point weights are required")
    finite = {key: torch.isfinite(value.float() if value.itemsize == 1 else value).all() for key, value in state_dict.items()}
    not_finite = [key for key, is_finite in finite.items() if not bool(is_finite)]
    if not_finite:
        warnings.warn(f"{len(not_finite)} weights of {source} are not finite: {', '.join(not_finite[:5])}", stacklevel=2)


def _hub_layout(files: Files, revision: str | None, config: DinatConfig | None) -> Checkpoint:
    if config is None:
        try:
            config = DinatConfig.from_dict(files.read_config())
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{CONFIG} of {files.source} is not a valid DiNAT configuration: {error}") from error

    def state_dict() -> StateDict:
        merged: StateDict = {}
        for path in files.find_weights():
            merged |= read_weights(path)
        return merged

    return Checkpoint(files.source, revision, config, files.read_json(PROCESSOR), files.find_weights, state_dict)


def _original(path: Path, config: DinatConfig | None) -> Checkpoint:
    config, weights = read_original(path, config)
    unused = [weights]

    def state_dict() -> StateDict:
        """Hand the weights to the first caller; read the file again for later ones, so that no two networks share weights."""
        return unused.pop() if unused else read_original(path, config)[1]

    return Checkpoint(str(path), None, config, None, lambda: [path], state_dict)
