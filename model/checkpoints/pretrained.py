"""Loading, saving and initialising a network."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinat.model.attention import check_backend
from dinat.model.checkpoints.checkpoint import Checkpoint, fit, open_checkpoint, save_checkpoint
from dinat.model.config import DinatConfig


class PreTrainedModel(nn.Module):
    """Loading, saving and initialising, the same for every network here."""

    absent_prefixes: tuple[str, ...] = ()
    """Keys of a checkpoint that this network may leave aside."""
    fresh_prefixes: tuple[str, ...] = ()
    """Keys of this network that a checkpoint may leave out; they keep their initial values."""

    def __init__(self, config: DinatConfig, attention: str = "auto") -> None:
        super().__init__()
        check_backend(attention)
        self.config = config
        self.register_state_dict_post_hook(_part_qkv)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_join_qkv)  # type: ignore[no-untyped-call]

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
        """A network with a checkpoint's weights, in eval mode.

        source: a folder in the Hub's layout, a Hub id, an original .pth or .pth.tar file, "digits", or an open checkpoint.
        attention: backend, as neighborhood_attention takes it.  device: CPU if None.  dtype: float32 if None.
        revision, token, cache_dir, local_files_only: for a Hub id.  config: instead of the checkpoint's own.
        changes: fields of the configuration to replace, such as out_features.
        Raises CheckpointError, with every missing, unexpected or wrongly shaped key, and ConfigError.
        """
        checkpoint = source
        if not isinstance(checkpoint, Checkpoint):
            where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            checkpoint = open_checkpoint(checkpoint, local_files_only=local_files_only, config=config, **where)
        settings = checkpoint.config
        if changes:
            settings = DinatConfig.from_dict(_without_stage_pair(settings.to_dict(), changes) | changes)
        with torch.device("meta"):
            network = cls(settings, attention=attention)
        network._load(checkpoint.state_dict(), checkpoint.source)
        return network.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, as transformers 4.53.3 reads it."""
        save_checkpoint(folder, self.config, self.state_dict(), architecture=type(self).__name__)

    def _load(self, state_dict: dict[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        prefixed = [key for key in expected if key.startswith("dinat.")]
        if not prefixed:
            state_dict = {key.removeprefix("dinat."): value for key, value in state_dict.items()}
        fresh = {
            name: torch.ones(value.shape) if name.endswith("weight") else torch.zeros(value.shape)
            for name, value in expected.items()
            if name.startswith(self.fresh_prefixes) and self.fresh_prefixes
        }
        self.load_state_dict(fit(fresh | state_dict, expected, source, ignored=self.absent_prefixes), strict=True, assign=True)

    def _initialize(self) -> None:
        """Normal weights of standard deviation config.initializer_range, zero biases (transformers' rule)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _without_stage_pair(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A new out_features or out_indices replaces both."""
    if "out_features" in changes or "out_indices" in changes:
        return {name: value for name, value in values.items() if name not in ("out_features", "out_indices")}
    return values


QKV = ("query", "key", "value")
"""The Hub's names of the three products that are one in the network. They have their names in every state dict."""


def _part_qkv(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write a state dict as the Hub has it, in its order."""
    whole = dict(state_dict)
    state_dict.clear()
    for key, value in whole.items():
        place, qkv, kind = key.rpartition(".qkv.")
        if qkv and key.startswith(prefix):
            state_dict.update({f"{place}.{name}.{kind}": part for name, part in zip(QKV, value.chunk(3), strict=True)})
        else:
            state_dict[key] = value


def _join_qkv(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read a state dict as the Hub has it."""
    for key in [key for key in state_dict if key.startswith(prefix) and ".self.query." in key]:
        names = [key.replace(".self.query.", f".self.{name}.") for name in QKV]
        if all(name in state_dict for name in names):
            state_dict[key.replace(".self.query.", ".self.qkv.")] = torch.cat([state_dict.pop(name) for name in names])
