"""Fused layers on the fake GPU: each candidate computes what Layer does, and none runs where a kernel may not compute."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dinat.model import DinatConfig, DinatForImageClassification
from dinat.model.dinat import Layer
from dinat.model.gpu import fusing, steps
from dinat.model.gpu.fusing import FusedLayer, fuse
from dinat.model.neighborhoods import neighborhoods
from tests.rehearsal.fake_gpu import devices
from tests.rehearsal.fake_gpu.counts import counted

CUDA = torch.device("cuda", 0)
KERNELS = 4
"""Launches of a fused layer: norm and QKV, attention, output and sum, MLP."""


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layer(dtype: torch.dtype = torch.bfloat16, channels: int = 64, dilation: int = 1, **fields: object) -> Layer:
    """Return a layer on the CPU with random parameters, which are the same in each call."""
    torch.manual_seed(0)
    config = DinatConfig(**({"mlp_ratio": 2.0, "kernel_size": 3} | fields))
    created = Layer(config, channels, channels // 32, dilation, 0.1, "triton")
    for name, weight in created.named_parameters():
        is_norm = "layernorm" in name and name.endswith("weight")
        nn.init.normal_(weight, float(is_norm), 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    return created.eval().to(dtype)


def fused(original: Layer) -> FusedLayer:
    created = fuse(fuse(original))  # the second time has no effect
    assert isinstance(created, FusedLayer)
    return created


def fused_on_gpu(dtype: torch.dtype = torch.bfloat16, **fields: object) -> FusedLayer:
    return fused(layer(dtype, **fields).to(CUDA))  # type: ignore[arg-type]


def select(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Select the candidate of this index among the kernels of each step."""
    monkeypatch.setattr(steps, "select", lambda step: step.names[1:][min(index, len(step.names) - 2)])


def images(channels: int = 64, side: int = 7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, side, side + 1, channels, device=CUDA).to(dtype)


def error(output: Tensor, x: Tensor, **fields: object) -> float:
    """Return the error relative to the layer in float64."""
    exact = layer(**fields).double()  # type: ignore[arg-type]
    exact.attention.self.backend = "reference"
    expected = exact(x.cpu().double())[0]
    return float((output.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "fields", [{}, {"layer_scale_init_value": 0.5}, {"dilation": 3}, {"channels": 96}, {"channels": 320}], ids=str
)
def test_every_candidate_matches_the_layer(fields: dict[str, object], index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dilation 3 the feature map is padded."""
    x = images(int(str(fields.get("channels", 64))))
    output, weights = fused_on_gpu(**fields)(x)
    assert weights is None
    assert error(output, x, **fields) < 2e-2
    select(monkeypatch, index)
    assert error(fused_on_gpu(**fields)(x)[0], x, **fields) < 2e-2


def launches(module: nn.Module, x: Tensor) -> int:
    module(x)
    with counted() as counts:
        module(x)
    return counts.launches


def test_fused_layer_is_four_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches(layer().to(CUDA), images()) == 10
    assert launches(fused_on_gpu(), images()) == 10  # without a selection
    select(monkeypatch, 0)
    assert launches(fused_on_gpu(), images()) == KERNELS
    assert launches(fused_on_gpu(channels=320), images(320)) == KERNELS + 1
    assert launches(fused_on_gpu(dilation=3), images()) > KERNELS + 1


def replace_module(module: FusedLayer) -> None:
    class Adapter(nn.Linear):
        pass

    dense = module.output.dense
    module.output.dense = Adapter(dense.in_features, dense.out_features).to(CUDA, torch.bfloat16)


class Adapted(nn.Module):
    """Another module in place of an attention."""

    def forward(self, x: Tensor, with_weights: bool, add: Tensor) -> tuple[Tensor, None]:
        return x + add, None


OBSERVED: dict[str, Callable[[FusedLayer], object]] = {
    "a hook": lambda module: module.output.dense.register_forward_hook(lambda *_: None),
    "a replaced module": replace_module,
    "a replaced attention": lambda module: setattr(module, "attention", Adapted()),
    "a removed norm": lambda module: setattr(module, "layernorm_before", nn.Identity()),
    "an additional module": lambda module: module.add_module("adapter", nn.Identity()),
    "a replaced forward": lambda module: setattr(module.layernorm_before, "forward", lambda x: x),
    "another activation": lambda module: setattr(module.intermediate, "activation", torch.relu),
    "active dropout": lambda module: module.output.dropout.train(),
    "active stochastic depth": lambda module: module.drop_path.train(),
    "separate projections": lambda module: (module.attention.self.split_qkv(), module.to(CUDA, torch.bfloat16)),
    "weights of another dtype": lambda module: module.output.float() and module.output.bfloat16().dense.float(),
    "weights that are not contiguous": lambda module: setattr(
        module.output.dense,
        "weight",
        nn.Parameter(module.output.dense.weight.t().contiguous().t(), requires_grad=False),
    ),
}


@pytest.mark.parametrize("change", OBSERVED)
def test_no_kernel_computes_a_changed_layer(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fused_on_gpu()
    assert fusing.can_fuse(module, images())
    OBSERVED[change](module)
    calls: list[Tensor] = []
    monkeypatch.setattr(Layer, "forward", lambda self, x, with_weights=False: calls.append(x) or (x, None))
    monkeypatch.setattr(fusing, "Mlp", lambda *_: pytest.fail("a kernel computed"))
    module(images())
    assert len(calls) == 1


MODES: dict[str, Callable[[], object]] = {
    "autograd": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "a dispatch mode": lambda: torch.utils._python_dispatch.TorchDispatchMode(),
}


@pytest.mark.parametrize("mode", MODES)
def test_no_kernel_computes_while_operations_are_observed(mode: str) -> None:
    module, x = fused_on_gpu(), images()
    assert fusing.can_fuse(module, x)
    with torch.inference_mode(False), torch.no_grad():
        assert fusing.can_fuse(module, x)
        with MODES[mode]():  # type: ignore[attr-defined]
            assert not fusing.can_fuse(module, x)


def test_functional_transforms_and_hooks_of_all_modules_are_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fused_on_gpu(), images()
    seen: list[bool] = []
    torch.func.vmap(lambda _: seen.append(fusing.can_fuse(module, x)) or torch.zeros(1))(torch.zeros(1))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    seen.append(fusing.can_fuse(module, x))
    handle.remove()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen.append(fusing.can_fuse(module, x))
    assert seen == [False] * 3


def test_other_devices_dtypes_and_attention_weights_take_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, 0)
    assert fused_on_gpu()(images(), with_weights=True)[1] is not None
    x = torch.randn(1, 4, 4, 64).bfloat16()
    torch.testing.assert_close(fused(layer())(x)[0], layer()(x)[0])
    unfused = launches(layer().to(CUDA), images())
    assert launches(fused_on_gpu(torch.float32), images(dtype=torch.float32)) == unfused
    monkeypatch.setattr(devices.PROPERTIES, "major", 7)
    assert launches(fused_on_gpu(), images()) == unfused


def test_names_of_parameters_remain(tmp_path: Path) -> None:
    original = DinatForImageClassification.from_pretrained("digits")
    network = fuse(copy.deepcopy(original))
    assert network.load_state_dict(original.state_dict())
    network.save_pretrained(tmp_path)
    saved = DinatForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(saved(images).logits, original(images).logits)
    assert len(neighborhoods(network, images, 0.5, 0.5)) == len(neighborhoods(original, images, 0.5, 0.5))


def test_convolution_weights_are_laid_out_once() -> None:
    network = fuse(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3))))
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in network.parameters() if weight.dim() == 4)
