"""Loading, saving and initializing networks."""

import tempfile
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from dinat.model.attention import check_backend
from dinat.model.checkpoints.checkpoint import (
    DEFAULT_SHARD_SIZE,
    Checkpoint,
    match_state_dict,
    open_checkpoint,
    save_checkpoint,
)
from dinat.model.checkpoints.files import one_line
from dinat.model.config import DinatConfig, warn_if_unknown
from dinat.model.errors import CheckpointError, ConfigError


class PreTrainedModel(nn.Module):
    """Base class of all networks: loading, saving and initialization."""

    ignored_prefixes: tuple[str, ...] = ()
    """Prefixes of checkpoint keys that this network ignores."""
    optional_prefixes: tuple[str, ...] = ()
    """Prefixes of keys that a checkpoint may lack; these parameters keep their initial values."""

    def __init__(self, config: DinatConfig, attention: str = "auto") -> None:
        super().__init__()
        check_backend(attention)
        self.config = config
        self.register_state_dict_post_hook(_split_qkv)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_merge_qkv)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint,
        attention: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        config: DinatConfig | None = None,
        **changes: Any,
    ) -> Self:
        """Load a network in eval mode from a checkpoint.

        Args:
            source: A folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, "digits", or an open Checkpoint.
            attention: Backend, see neighborhood_attention.
            device: CPU if None.
            dtype: A dtype or its name, such as "bfloat16"; float32 if None.
            revision: Branch, tag or commit of a Hub repository.
            token: Access token of the Hub.
            cache_dir: Cache folder of huggingface_hub.
            local_files_only: Whether to use only cached files.
            config: Replaces the checkpoint's configuration.
            changes: Fields of the configuration to replace, such as out_features. Another number of labels gives the network a
                new, untrained classifier, with a warning.

        Raises:
            CheckpointError: The checkpoint cannot be read, or its weights do not match; lists all missing, unexpected and
                wrongly shaped keys.
            ConfigError: The configuration is invalid.
        """
        if isinstance(dtype, str):
            dtype = _dtype(dtype)
        checkpoint = source
        if not isinstance(checkpoint, Checkpoint):
            options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            checkpoint = open_checkpoint(checkpoint, local_files_only=local_files_only, config=config, **options)
        network_config = checkpoint.config
        if changes:
            warn_if_unknown(changes)
            network_config = DinatConfig.from_dict(_without_replaced(network_config, changes) | changes)
        with torch.device("meta"):
            network = cls(network_config, attention=attention)
        state_dict = checkpoint.state_dict()
        if network_config.num_labels != checkpoint.config.num_labels and "classifier." not in cls.ignored_prefixes:
            _replace_head(state_dict, network_config, checkpoint.source)
        network._load(state_dict, checkpoint.source)
        return network.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = DEFAULT_SHARD_SIZE) -> None:
        """Write config.json and model.safetensors in the Hub's layout, readable by transformers 4.53.3.

        Args:
            folder: Created if missing.
            max_shard_size: Weights above this size, in bytes or as text ("2GB"), are divided into several files.
        """
        save_checkpoint(folder, self.config, self.state_dict(), type(self).__name__, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload DiNAT",
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    ) -> str:
        """Upload the files of save_pretrained to a repository of the Hub, which is created if missing.

        Args:
            repo_id: "owner/name".
            token: Access token of the Hub; that of `hf auth login` or HF_TOKEN if None.
            private: Whether a new repository is private; the owner's default if None.
            revision: Branch; main if None.
            commit_message: Subject of the commit.
            max_shard_size: See save_pretrained.

        Returns:
            The URL of the commit.

        Raises:
            CheckpointError: The Hub cannot be reached, or rejects the upload.
        """
        api = HfApi(token=token)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, max_shard_size)
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
                )
        except Exception as error:  # which HTTP client raises them depends on huggingface_hub's version
            raise CheckpointError(f"{repo_id} cannot be uploaded to the Hub: {one_line(error)}") from error
        return str(commit.commit_url)

    def _load(self, state_dict: dict[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        prefixed = [key for key in expected if key.startswith("dinat.")]
        if not prefixed:
            state_dict = {key.removeprefix("dinat."): value for key, value in state_dict.items()}
        initial = {
            name: torch.ones(value.shape) if name.endswith("weight") else torch.zeros(value.shape)
            for name, value in expected.items()
            if name.startswith(self.optional_prefixes) and self.optional_prefixes
        }
        matched = match_state_dict(initial | state_dict, expected, source, ignored=self.ignored_prefixes)
        self.load_state_dict(matched, strict=True, assign=True)

    def _initialize(self) -> None:
        """Initialize weights with standard deviation config.initializer_range and biases with 0, as transformers does.

        On "meta" there is nothing to initialize, and PyTorch would import 900 modules for it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _without_replaced(config: DinatConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's fields without those that the changed ones determine."""
    values, replaced = config.to_dict(), set()
    if "out_features" in changes or "out_indices" in changes:
        replaced |= {"out_features", "out_indices"}
    if "id2label" in changes or changes.get("num_labels", config.num_labels) != config.num_labels:
        replaced |= {"id2label", "label2id"}
    return {name: value for name, value in values.items() if name not in replaced}


def _replace_head(state_dict: dict[str, Tensor], config: DinatConfig, source: str) -> None:
    """Replace the classifier's weights by new ones for config.num_labels."""
    for name in ("classifier.weight", "classifier.bias"):
        state_dict.pop(name, None)
    if config.num_labels:
        state_dict["classifier.weight"] = torch.empty(config.num_labels, config.hidden_size).normal_(
            std=config.initializer_range
        )
        state_dict["classifier.bias"] = torch.zeros(config.num_labels)
        warnings.warn(f"the classifier for {config.num_labels} labels is new, not that of {source}: train it", stacklevel=3)


QKV = ("query", "key", "value")
"""Names in state dicts of the three projections, which are one module, qkv, in the network."""


def _split_qkv(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Convert a state dict of the network to the keys of the Hub, in their order.

    What an adapter or a quantizer has put in the place of a projection's weight keeps its own keys: its rows are not those of
    query, key and value. So do the parameters themselves, of state_dict(keep_vars=True): tracers identify them.
    """
    original = dict(state_dict)
    state_dict.clear()
    for key, value in original.items():
        parent, qkv, parameter = key.rpartition(".qkv.")
        is_own = parameter in ("weight", "bias") and type(value) is Tensor
        if qkv and key.startswith(prefix) and is_own:
            parts = zip(QKV, value.chunk(3), strict=True)
            state_dict.update({f"{parent}.{name}.{parameter}": part for name, part in parts})
        else:
            state_dict[key] = value


def _merge_qkv(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict with the keys of the Hub to those of the network."""
    for key in [key for key in state_dict if key.startswith(prefix) and ".self.query." in key]:
        names = [key.replace(".self.query.", f".self.{name}.") for name in QKV]
        if all(name in state_dict for name in names):
            state_dict[key.replace(".self.query.", ".self.qkv.")] = torch.cat([state_dict.pop(name) for name in names])


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"unknown dtype {name!r}: use a torch.dtype or its name, such as 'bfloat16'")
    return dtype
