"""Steps of a network on a GPU, each computed by the fastest correct candidate: PyTorch's operations, or this package's kernels.

Candidates are compared and timed as those of attention are (model/attention/autotune.py). Outside autotuning(), a step that has
no selection is computed by PyTorch's operations. All tensors are contiguous. In float32 there are no kernels for products:
PyTorch's are the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import autotune
from dinat.model.attention.autotune import Step, select
from dinat.model.fast_path import is_observed, is_plain_on_gpu

NORM_AND_LINEAR = "layer norm and linear layer"
LINEAR_AND_SUM = "linear layer and sum"
MLP = "MLP"
PIXELS = "normalization of pixels"
DEFINITION, TWO_STEPS = "definition", "two steps"
"""Candidates: PyTorch's operations; and an MLP as NORM_AND_LINEAR with GELU and LINEAR_AND_SUM."""


@dataclass(frozen=True)
class StepKey:
    """Properties of a step that determine the speed of its candidates; see autotune.Key.

    Attributes:
        rows: Positions per image.
        sizes: Numbers of features: inputs and outputs, or channels and hidden features.
        variant: What else is computed, such as GELU.
    """

    requested_backend: ClassVar[str] = "auto"

    kind: str
    device: str
    dtype: torch.dtype
    rows: int
    sizes: tuple[int, int]
    variant: str = ""
    is_single: bool = False

    @classmethod
    def of(cls, kind: str, x: Tensor, sizes: tuple[int, int], dtype: torch.dtype, variant: str = "") -> "StepKey":
        """Return the key of a step with input x (B, H, W, channels)."""
        batch, height, width, _ = x.shape
        return cls(kind, str(x.device), dtype, height * width, sizes, variant, batch == 1)

    def __str__(self) -> str:
        """Describe the step, such as "3136 positions, 64 to 192 features"."""
        return f"{self.rows} positions, {self.sizes[0]} to {self.sizes[1]} features"


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer with what is fused into it: add + scale * gelu(layer(norm(x))), of which all but the layer may be None.

    Attributes:
        layer: Linear layer.
        norm: Layer norm of the inputs, or None.
        is_gelu: Whether to apply the exact GELU.
        scale: Layer scale (outputs,), or None.
    """

    layer: nn.Linear
    norm: nn.LayerNorm | None = None
    is_gelu: bool = False
    scale: Tensor | None = None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Compute it by the selected candidate: x (B, H, W, inputs) and add, or None, to (B, H, W, outputs)."""
        names = self.candidates(x)
        if len(names) == 1:
            return self.by(DEFINITION, x, add)
        sizes = self.layer.in_features, self.layer.out_features
        step = Step(
            StepKey.of(NORM_AND_LINEAR if add is None else LINEAR_AND_SUM, x, sizes, x.dtype, "GELU" if self.is_gelu else ""),
            names,
            [DEFINITION],
            lambda name: self.by(name, x, add),
            lambda name: self.relative_error(name, _example(x), None if add is None else _example(add)),
            self.layer.weight,
        )
        return self.by(select(step), x, add)

    def by(self, name: str, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Compute it by a candidate's name."""
        if name == DEFINITION:
            y: Tensor = self.layer(x if self.norm is None else self.norm(x))
            y = F.gelu(y) if self.is_gelu else y
            y = y if self.scale is None else self.scale * y
            return y if add is None else add + y
        from dinat.model.gpu import linear_kernel

        config = next(config for config in linear_kernel.CONFIGS if str(config) == name)
        return linear_kernel.launch(x, self.norm, self.layer, self.is_gelu, self.scale, add, config)

    def exact(self, x: Tensor) -> Tensor:
        """Return scale * gelu(layer(norm(x))) in float64."""
        y = x.double()
        if self.norm is not None:
            y = F.layer_norm(y, y.shape[-1:], self.norm.weight.double(), self.norm.bias.double(), self.norm.eps)
        y = F.linear(y, self.layer.weight.double(), None if self.layer.bias is None else self.layer.bias.double())
        y = F.gelu(y) if self.is_gelu else y
        return y if self.scale is None else self.scale.double() * y

    def candidates(self, x: Tensor) -> list[str]:
        """Return the names of the candidates for an input like x."""
        if not _has_kernels(x):
            return [DEFINITION]
        from dinat.model.gpu import linear_kernel

        is_supported = linear_kernel.supports(self.layer.in_features)
        return [DEFINITION, *(map(str, linear_kernel.CONFIGS) if is_supported else [])]

    def relative_error(self, name: str, x: Tensor, add: Tensor | None = None) -> float:
        """Return a candidate's error; see relative_error."""
        return relative_error(self.by(name, x, add), self.exact(x), add)


@dataclass(frozen=True, eq=False)
class Mlp:
    """The second half of a layer: x + scale * down(gelu(up(norm(x)))).

    Attributes:
        norm: Layer norm.
        up, down: Linear layers with a bias.
        scale: Layer scale (channels,), or None.
    """

    norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it by the selected candidate: (B, H, W, channels) to the same shape."""
        names = self.candidates(x)
        if len(names) == 1 or autotune.is_autotuning():
            result = self.by(TWO_STEPS, x)  # while autotuning: to select each step before both are timed
            if len(names) == 1:
                return result
        step = Step(
            StepKey.of(MLP, x, (self.up.in_features, self.up.out_features), x.dtype),
            names,
            [TWO_STEPS],
            lambda name: self.by(name, x),
            lambda name: self.relative_error(name, _example(x)),
            self.up.weight,
        )
        return self.by(select(step), x)

    def by(self, name: str, x: Tensor) -> Tensor:
        """Compute it by a candidate's name."""
        if name == TWO_STEPS:
            first, second = self._steps()
            return second(first(x), x)
        from dinat.model.gpu import mlp_kernel

        configs = mlp_kernel.configs(self.up.in_features, self.up.out_features)
        config = next(config for config in configs if str(config) == name)
        return mlp_kernel.launch(x, self.norm, self.up, self.down, self.scale, config)

    def _steps(self) -> tuple[Linear, Linear]:
        return Linear(self.up, self.norm, is_gelu=True), Linear(self.down, scale=self.scale)

    def candidates(self, x: Tensor) -> list[str]:
        """Return the names of the candidates for an input like x."""
        if not _has_kernels(x):
            return [TWO_STEPS]
        from dinat.model.gpu import mlp_kernel

        return [TWO_STEPS, *map(str, mlp_kernel.configs(self.up.in_features, self.up.out_features))]

    def relative_error(self, name: str, x: Tensor) -> float:
        """Return a candidate's error; see relative_error."""
        first, second = self._steps()
        return relative_error(self.by(name, x), second.exact(first.exact(x)), x)


def normalize(pixels: Tensor, table: Tensor, dtype: torch.dtype, definition: Callable[[], Tensor]) -> Tensor:
    """Normalize pixels by the selected candidate.

    Args:
        pixels: (B, H, W, 3) uint8.
        table: Result of each value of each channel, (3, 256) float32.
        dtype: Dtype of the result.
        definition: Computes the result by PyTorch's operations.

    Returns:
        Tensor (B, H, W, 3).
    """
    if is_observed() or not is_plain_on_gpu(pixels) or not pixels.is_contiguous() or not _has_triton(pixels.device):
        return definition()
    from dinat.model.gpu import pixels_kernel

    def run(name: str) -> Tensor:
        return definition() if name == DEFINITION else pixels_kernel.launch(pixels, table, dtype)

    def error(name: str) -> float:
        return relative_error(run(name), definition().double())

    key = StepKey.of(PIXELS, pixels, (3, 3), dtype)
    return run(select(Step(key, [DEFINITION, "look-up"], [DEFINITION], run, error, table)))


def relative_error(output: Tensor, exact: Tensor, add: Tensor | None = None) -> float:
    """Return the norm of an output's error over that of the exact result; 0 if both are zeros.

    Args:
        output: Output of a candidate.
        exact: Exact result, without `add`.
        add: What the output includes besides. The norm of the sum counts half, because of its rounding, which in half precision
            is a sixth of the error that autotune allows.
    """
    if add is None:
        return float((output.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
    total = exact + add.double()
    return float((output.double() - total).norm() / (exact.norm() + 0.5 * total.norm()))


def _example(x: Tensor) -> Tensor:
    """Return random input for the comparison of candidates: two images of the shape of x (B, H, W, channels)."""
    return autotune.random_images(x.shape[1:], x.dtype, x.device)


def _has_kernels(x: Tensor) -> bool:
    """Return whether the products of this package support a device and dtype."""
    return x.dtype in (torch.float16, torch.bfloat16) and _has_triton(x.device)


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and "triton" in autotune.installed_backends() and autotune.has_kernels(device)
