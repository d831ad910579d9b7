"""Locate and read the files of a checkpoint: a folder in the Hub's layout, a Hub id, an original file, or "digits"."""

import argparse
import json
import re
import ssl
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
"""Checkpoints embedded in the package, by name."""

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint.

    Attributes:
        source: Source as passed to find_files.
        original: Path of a file of the original repository, or None.
        find: Returns the path of a file of the Hub's layout by its name, downloading it if needed; None if it does not exist.
            Raises CheckpointError.
    """

    source: str
    original: Path | None
    find: Callable[[str], Path | None]

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the Hub's layout; None if it does not exist. Raises CheckpointError if it is not an object."""
        path = self.find(name)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} does not contain a JSON object")
        return values

    def find_weights(self) -> list[Path]:
        """Return the paths of the weights of the Hub's layout, several if transformers or huggingface_hub sharded them.

        Raises:
            CheckpointError: There are none, a shard is missing, or the index is invalid.
        """
        for name in (SAFETENSORS, PICKLE):
            path = self.find(name)
            if path is not None:
                return [path]
            index = self.read_json(f"{name}.index.json")
            if index is not None:
                return [self._find_shard(shard, name) for shard in _shards(index, f"{name}.index.json of {self.source}")]
        raise CheckpointError(f"{self.source} has no {SAFETENSORS} and no {PICKLE} (or, offline, they are not in the cache)")

    def _find_shard(self, shard: str, name: str) -> Path:
        path = self.find(shard)
        if path is None:
            raise CheckpointError(f"{self.source} has no {shard}, a part of its weights by {name}.index.json")
        return path

    def read_config(self) -> dict[str, Any]:
        """Read config.json. Raises CheckpointError if it does not exist or is invalid."""
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
    """Locate the files of a checkpoint.

    Args:
        source: A folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, or "digits".
        revision: Branch, tag or commit of a Hub repository.
        token: Access token of the Hub.
        cache_dir: Cache folder of huggingface_hub.
        local_files_only: Whether to use only cached files.

    Raises:
        CheckpointError: The source does not exist.
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
        f"{str(source)!r} does not exist: use a folder with {CONFIG}, a .pth file, a Hub id such as "
        f"shi-labs/dinat-mini-in1k-224, or {' or '.join(map(repr, EMBEDDED))}"
    )


def read_weights(path: Path) -> StateDict:
    """Read the weights of a .safetensors file, or of a file written by torch.save.

    EMA weights of a training checkpoint are preferred. Prefixes of DataParallel and torch.compile are removed from the keys.

    Raises:
        CheckpointError: The file cannot be read, or contains anything else.
    """
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for name in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in as_state_dict(loaded, path).items()}


def read_safetensors(path: Path) -> StateDict:
    """Read the tensors of a .safetensors file. Raises CheckpointError."""
    try:
        state_dict: StateDict = load_file(path)
        return state_dict
    except (SafetensorError, OSError) as error:
        _raise_unreadable(path, error)


def read_pickle(path: Path) -> Any:
    """Read a file written by torch.save.

    Only weights are allowed, and argparse.Namespace, which holds the arguments of a training run.

    Raises:
        CheckpointError: The file cannot be read, or it is a pickle that would execute code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle can raise any
        _raise_unreadable(path, error)


def as_state_dict(loaded: Any, path: Path) -> StateDict:
    """Check that a loaded object is a dict of tensors, and return it as a new dict. Raises CheckpointError."""
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{path} does not contain a state dict")
    return dict(loaded)


def _shards(index: dict[str, Any], source: str) -> list[str]:
    """Return the file names in an index of sharded weights. Raises CheckpointError unless they are in the same folder."""
    weight_map = index.get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and all(map(_is_file_name, weight_map.values())) else set()
    if not names:
        raise CheckpointError(f"{source} has no valid weight_map: names of files in the same folder by key")
    return sorted(names)


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name) is not None


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _download(
    repo: str, name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path | None:
    """Return the path of a file of a Hub repository in the cache, downloading it if needed; None if it does not exist."""
    offline = local_files_only or constants.is_offline_mode()
    try:
        return Path(
            hf_hub_download(repo, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        )
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        cause = _first_cause(error)
        advice = (
            ": set SSL_CERT_FILE to a file with your certificate authorities"
            if isinstance(cause, ssl.SSLCertVerificationError)
            else ""
        )
        raise CheckpointError(
            f"{repo} on the Hub cannot be reached and {name} is not cached: {one_line(cause)}{advice}"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise CheckpointError(f"{repo} on the Hub cannot be read: {one_line(error)}") from error


def _first_cause(error: BaseException) -> BaseException:
    """The error that the others were raised from: huggingface_hub's own says only that there was one."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _raise_unreadable(path: Path, error: Exception) -> NoReturn:
    raise CheckpointError(f"{path} cannot be read as weights: {one_line(error)[:300]}") from error
