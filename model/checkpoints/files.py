"""Where a checkpoint's files are, and reading them: a folder in the Hub's layout, a Hub id, an original file, "digits"."""

import argparse
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinat.model.errors import CheckpointError

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
EMBEDDED = {"digits": Path(__file__).parents[1] / "digits"}
"""Checkpoints that come with the package, by name."""

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint.

    source: as it was asked for.  original: the one file of a checkpoint of the original repository, or None.  find: the path of
    a file of the Hub's layout, by its name, downloaded where need be; None if there is none. Raises CheckpointError.
    """

    source: str
    original: Path | None
    find: Callable[[str], Path | None]

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file of the Hub's layout holds; None if there is none. Raises CheckpointError if it holds no object."""
        path = self.find(name)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds no JSON object")
        return values

    def read_config(self) -> dict[str, Any]:
        """What config.json holds. Raises CheckpointError, also if there is none."""
        values = self.read_json(CONFIG)
        if values is None:
            raise CheckpointError(f"{self.source} has no {CONFIG} (or, offline, it is not in the cache)")
        return values


def find_files(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Files:
    """Find a checkpoint.

    source: a folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, or "digits".  revision (branch, tag or
    commit), token, cache_dir, local_files_only: for a Hub id, as huggingface_hub takes them.  Raises CheckpointError.
    """
    path = EMBEDDED.get(str(source), Path(source))
    if path.is_dir():
        return Files(str(source), None, lambda name: _existing(path / name))
    if path.is_file():
        return Files(str(source), path, lambda _: None)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and path.suffix not in (".pth", ".tar", ".bin", ".safetensors"):

        def download(name: str) -> Path | None:
            return _download(str(source), name, revision, token, cache_dir, local_files_only)

        return Files(str(source), None, download)
    raise CheckpointError(
        f"{str(source)!r} is not there: give a folder with {CONFIG}, a .pth file, a Hub id such as "
        f"shi-labs/dinat-mini-in1k-224, or {' or '.join(map(repr, EMBEDDED))}"
    )


def read_safetensors(path: Path) -> StateDict:
    """The tensors of a .safetensors file. Raises CheckpointError."""
    try:
        state_dict: StateDict = load_file(path)
        return state_dict
    except (SafetensorError, OSError) as error:
        _unreadable(path, error)


def read_pickle(path: Path) -> Any:
    """What torch.save wrote. Raises CheckpointError, also for a pickle that would run code.

    Weights only are read, and argparse.Namespace, which holds the arguments of a training run.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        _unreadable(path, error)


def as_state_dict(loaded: Any, path: Path) -> StateDict:
    """The same, if it is a dict of tensors. Raises CheckpointError."""
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return dict(loaded)


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


def _unreadable(path: Path, error: Exception) -> NoReturn:
    raise CheckpointError(f"{path} cannot be read as weights: {_line(error)[:300]}") from error
