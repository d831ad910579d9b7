"""Loading, saving and initializing networks."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinat.model.attention import check_backend
from dinat.model.checkpoints.checkpoint import Checkpoint, match_state_dict, open_checkpoint, save_checkpoint
from dinat.model.config import DinatConfig
from dinat.model.fast_path import PLAIN_TYPES


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
        dtype: torch.dtype | None = None,
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
            dtype: float32 if None.
            revision: Branch, tag or commit of a Hub repository.
            token: Access token of the Hub.
            cache_dir: Cache folder of huggingface_hub.
            local_files_only: Whether to use only cached files.
            config: Replaces the checkpoint's configuration.
            changes: Fields of the configuration to replace, such as out_features.

        Raises:
            CheckpointError: The checkpoint cannot be read, or its weights do not match; lists all missing, unexpected and
                wrongly shaped keys.
            ConfigError: The configuration is invalid.
        """
        checkpoint = source
        if not isinstance(checkpoint, Checkpoint):
            options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            checkpoint = open_checkpoint(checkpoint, local_files_only=local_files_only, config=config, **options)
        network_config = checkpoint.config
        if changes:
            network_config = DinatConfig.from_dict(_without_stage_pair(network_config.to_dict(), changes) | changes)
        with torch.device("meta"):
            network = cls(network_config, attention=attention)
        network._load(checkpoint.state_dict(), checkpoint.source)
        return network.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, readable by transformers 4.53.3."""
        save_checkpoint(folder, self.config, self.state_dict(), architecture=type(self).__name__)

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
        """Initialize weights with standard deviation config.initializer_range and biases with 0, as transformers does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _without_stage_pair(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Remove out_features and out_indices if one of them changes: the other is derived from it."""
    if "out_features" in changes or "out_indices" in changes:
        return {name: value for name, value in values.items() if name not in ("out_features", "out_indices")}
    return values


QKV = ("query", "key", "value")
"""Names in state dicts of the three projections, which are one module, qkv, in the network."""


def _split_qkv(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Convert a state dict of the network to the keys of the Hub, in their order.

    What an adapter or a quantizer has put in the place of a projection's weight keeps its own keys: its rows are not those of
    query, key and value.
    """
    original = dict(state_dict)
    state_dict.clear()
    for key, value in original.items():
        parent, qkv, parameter = key.rpartition(".qkv.")
        is_own = parameter in ("weight", "bias") and type(value) in PLAIN_TYPES
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
