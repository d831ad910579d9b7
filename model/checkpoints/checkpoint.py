"""A checkpoint: configuration, weights, labels and preprocessing, wherever they are; and writing the Hub's layout."""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dinat.model.checkpoints.files import (
    CONFIG,
    PICKLE,
    PROCESSOR,
    SAFETENSORS,
    Files,
    StateDict,
    as_state_dict,
    find_files,
    read_pickle,
    read_safetensors,
)
from dinat.model.checkpoints.original import read_original
from dinat.model.config import DinatConfig
from dinat.model.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, open: from_pretrained takes it in the place of a source, so that nothing is looked for or read twice.

    source, revision: as it was asked for.  processor: what preprocessor_config.json holds, or None.  weights: finds the file
    that holds them.  state_dict: reads them, on the CPU, under the Hub's names.  Both raise CheckpointError.
    """

    source: str
    revision: str | None
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
    """Find a checkpoint and read its configuration; of an original file, also its weights.

    source: a folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, or "digits".  revision (branch, tag or
    commit), token, cache_dir, local_files_only: for a Hub id, as huggingface_hub takes them.  config: instead of the
    checkpoint's own.  Raises CheckpointError, ConfigError.
    """
    files = find_files(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if files.original is not None:
        return _original(files.original, config)
    return _hub_layout(files, revision, config)


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


def _hub_layout(files: Files, revision: str | None, config: DinatConfig | None) -> Checkpoint:
    if config is None:
        try:
            config = DinatConfig.from_dict(files.read_config())
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{CONFIG} of {files.source} names no DiNAT: {error}") from error

    def weights() -> Path:
        found = files.find(SAFETENSORS) or files.find(PICKLE)
        if found is None:
            raise CheckpointError(
                f"{files.source} has no {SAFETENSORS} and no {PICKLE} (or, offline, they are not in the cache)"
            )
        return found

    def state_dict() -> StateDict:
        path = weights()
        return read_safetensors(path) if path.name == SAFETENSORS else as_state_dict(read_pickle(path), path)

    return Checkpoint(files.source, revision, config, files.read_json(PROCESSOR), weights, state_dict)


def _original(path: Path, config: DinatConfig | None) -> Checkpoint:
    config, read = read_original(path, config)
    waiting = [read]

    def state_dict() -> StateDict:
        """What was read, to the first who asks: nothing is kept in memory, and no two networks share their weights."""
        return waiting.pop() if waiting else read_original(path, config)[1]

    return Checkpoint(str(path), None, config, None, lambda: path, state_dict)
