"""What PyTorch's users do to a module: every fast path gives way to what observes or transforms operations."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from dinat.model import DinatConfig, DinatForImageClassification
from dinat.model.attention import neighborhood_attention
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.cpu.packing import pack
from dinat.model.errors import AttentionError, DinatError

pytestmark = pytest.mark.filterwarnings(  # torch.func uses torch.jit; PyTorch 2.14 has another warning
    "ignore::DeprecationWarning", "ignore:.torch.jit.*deprecated:FutureWarning"
)

CONFIG = DinatConfig(
    embed_dim=64,
    depths=[2, 1],
    num_heads=[2, 4],
    kernel_size=3,
    dilations=[[1, 2], [1]],
    mlp_ratio=2.0,
    id2label={0: "a", 1: "b", 2: "c"},
)
PIXELS = torch.linspace(-2, 2, 2 * 3 * 40 * 36).view(2, 3, 40, 36).sin()


@pytest.fixture
def network() -> DinatForImageClassification:
    torch.manual_seed(0)
    return DinatForImageClassification(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def expected(network: DinatForImageClassification) -> Tensor:
    """The logits by PyTorch's operations and the definition of attention."""
    reference = DinatForImageClassification(CONFIG, attention="reference").eval()
    reference.load_state_dict(network.state_dict())
    logits = reference(PIXELS).logits  # with gradients, no kernel is used
    return logits.detach()


def qkv(count: int = 3, head_dim: int = 32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 9, 8, 2, head_dim) for _ in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("stride", [0, 2])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_not_contiguous(name: str, stride: int) -> None:
    norm, x = LayerNorm(64), torch.randn(5, 64)
    values = torch.randn(1).expand(64) if stride == 0 else torch.randn(128)[::2]
    assert values.stride() == (stride,)
    setattr(norm, name, nn.Parameter(values))
    plain = nn.functional.layer_norm(x, (64,), norm.weight.contiguous(), norm.bias.contiguous())
    torch.testing.assert_close(norm(x), plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_norm_without_parameters() -> None:
    x = torch.randn(5, 64)
    torch.testing.assert_close(LayerNorm(64, elementwise_affine=False)(x), nn.functional.layer_norm(x, (64,)))


@pytest.mark.parametrize("backend", ["auto", "compiled", "tiled", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_ad_of_attention(backend: str, grad: bool) -> None:
    q, k, v, *tangents = qkv(6)
    with torch.set_grad_enabled(grad):
        primal, tangent = torch.func.jvp(
            lambda *inputs: neighborhood_attention(*inputs, kernel_size=3, backend=backend), (q, k, v), tuple(tangents)
        )
    q, k, v, *tangents = (x.double() for x in qkv(6))
    difference = 1e-6
    moved = [
        neighborhood_attention(
            *(x + sign * difference * dx for x, dx in zip((q, k, v), tangents, strict=True)), kernel_size=3, backend="reference"
        )
        for sign in (1, -1)
    ]
    torch.testing.assert_close(tangent.double(), (moved[0] - moved[1]) / (2 * difference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        primal.double(), neighborhood_attention(q, k, v, kernel_size=3, backend="reference"), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_forward_mode_ad_of_the_network(network: DinatForImageClassification) -> None:
    def logits(x: Tensor) -> Tensor:
        return network(x).logits

    direction = torch.randn_like(PIXELS)
    _, tangent = torch.func.jvp(logits, (PIXELS,), (direction,))
    network.double()
    step = 1e-6 * direction.double()
    moved = [logits(PIXELS.double() + sign * step) for sign in (1, -1)]
    torch.testing.assert_close(tangent.double(), (moved[0] - moved[1]) / 2e-6, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_torch_func_caches_is_plain(network: DinatForImageClassification) -> None:
    pixels = torch.randn(1, 3, 44, 52)  # of a size that no other test has
    torch.func.grad(lambda x: network(x).logits.sum())(pixels)
    traced = torch.jit.trace(lambda x: network(x).logits, pixels, check_trace=False)
    torch.testing.assert_close(traced(pixels), network(pixels).logits)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants
def test_trace(network: DinatForImageClassification, expected: Tensor) -> None:
    traced = torch.jit.trace(lambda x: network(x).logits, PIXELS, check_trace=False)
    torch.testing.assert_close(traced(PIXELS), expected, rtol=0, atol=1e-5)
    other = PIXELS.flip(0) * 0.5
    torch.testing.assert_close(traced(other), network(other).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "compiled", "tiled"])
def test_fake_tensors(backend: str, network: DinatForImageClassification) -> None:
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in qkv()]
        assert neighborhood_attention(*inputs, kernel_size=3, backend=backend).shape == inputs[0].shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert network(mode.from_tensor(PIXELS)).logits.shape == (2, 3)
    assert network(PIXELS).logits.isfinite().all()  # no fake tensor was cached


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "compiled", "tiled", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_tensor_on_another_device_is_rejected(backend: str, which: int) -> None:
    inputs = [*qkv(), torch.zeros(2, 5, 5)]
    inputs[which] = inputs[which].to("meta")
    with pytest.raises(AttentionError, match="must be on one device, got cpu, meta"):
        neighborhood_attention(*inputs, kernel_size=3, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "compiled", "tiled", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch(backend: str, grad: bool, network: DinatForImageClassification) -> None:
    with torch.set_grad_enabled(grad):
        inputs = [x[:0].requires_grad_(grad) for x in qkv()]
        output = neighborhood_attention(*inputs, kernel_size=3, backend=backend)
        assert output.shape == (0, 9, 8, 2, 32)
        assert output.requires_grad == grad
        assert network(PIXELS[:0]).logits.shape == (0, 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch_of_a_packed_network(dtype: torch.dtype, network: DinatForImageClassification) -> None:
    packed = pack(network.to(dtype))
    assert packed(PIXELS[:0].to(dtype)).logits.shape == (0, 3)
    assert packed(PIXELS.to(dtype)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_network_rejects_what_it_cannot_compute(dtype: torch.dtype, network: DinatForImageClassification) -> None:
    packed = pack(network.to(dtype))
    pixels = PIXELS.to(dtype)
    with pytest.raises(DinatError, match="a packed network only infers"), torch.no_grad():
        torch.func.jvp(lambda x: packed(x).logits, (pixels,), (pixels,))
    with pytest.raises(DinatError, match="a packed network only infers"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        packed(mode.from_tensor(pixels))


def test_dropout_alone_in_training_mode(network: DinatForImageClassification) -> None:
    """Monte Carlo dropout: the residual path is not dropped."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0  # only the residual paths remain
            module.train()
    layer = network.dinat.encoder.levels[0].layers[0]
    x = torch.randn(1, 9, 8, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], x)


@torch.no_grad()
def test_hooks_of_all_modules_see_every_layer(network: DinatForImageClassification, expected: Tensor) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        logits = network(PIXELS).logits
    finally:
        handle.remove()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert {id(module) for module in network.modules() if isinstance(module, nn.Linear)} <= {id(module) for module in seen}


@torch.no_grad()
def test_flop_counter_sees_every_product(network: DinatForImageClassification) -> None:
    with FlopCounterMode(display=False) as inference:
        network(PIXELS)
    with torch.enable_grad(), FlopCounterMode(display=False) as training:
        network(PIXELS)
    assert inference.get_total_flops() == training.get_total_flops() > 1e6


@torch.no_grad()
def test_vmap(network: DinatForImageClassification, expected: Tensor) -> None:
    logits = torch.vmap(lambda x: network(x[None]).logits[0])(PIXELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_copies_and_functional_calls(network: DinatForImageClassification, expected: Tensor) -> None:
    torch.testing.assert_close(copy.deepcopy(network)(PIXELS).logits, expected, rtol=0, atol=1e-5)
    halves = {name: parameter * 0.5 for name, parameter in network.named_parameters()}
    called = torch.func.functional_call(network, halves, (PIXELS,)).logits
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    torch.testing.assert_close(called, other(PIXELS).logits, rtol=0, atol=1e-5)


def test_gradients_of_a_frozen_network_by_torch_func(network: DinatForImageClassification) -> None:
    gradient = torch.func.grad(lambda x: network(x).logits.sum())(PIXELS)
    pixels = PIXELS.clone().requires_grad_()
    network(pixels).logits.sum().backward()
    torch.testing.assert_close(gradient, pixels.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_parameters_are_swapped_after_a_forward_pass(network: DinatForImageClassification, expected: Tensor) -> None:
    network(PIXELS)
    for parameter in network.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter * 0.5))
    for parameter in network.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(network(PIXELS).logits, expected, rtol=0, atol=1e-5)


class LowRank(nn.Module):
    """A low-rank adapter in the place of a linear layer (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(x))
        return adapted


@torch.no_grad()
def test_adapter_in_the_place_of_a_projection(network: DinatForImageClassification) -> None:
    attention = network.dinat.encoder.levels[0].layers[0].attention.self
    attention.qkv = LowRank(attention.qkv)  # type: ignore[assignment,arg-type]
    logits = network(PIXELS).logits
    state = {name: value.clone() for name, value in network.state_dict().items()}
    key = "dinat.encoder.levels.0.layers.0.attention.self.qkv"
    assert [name for name in state if name.startswith(key)] == [
        f"{key}.{name}" for name in ("base.weight", "base.bias", "down.weight", "up.weight")
    ]
    for parameter in network.parameters():
        parameter.add_(1)
    network.load_state_dict(state)
    torch.testing.assert_close(network(PIXELS).logits, logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch will move it to torchao
def test_dynamic_quantization(network: DinatForImageClassification, expected: Tensor) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantized(PIXELS).logits, expected, rtol=0, atol=0.1)
    assert quantized.state_dict()


def each_product(modify: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    """Modify each linear layer and convolution of a network."""

    def apply(network: nn.Module) -> nn.Module:
        for module in list(network.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                modify(module)
        return network

    return apply


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def with_torchao(network: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    return network


def with_lora(network: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "dense"], init_lora_weights=False, r=4)
    adapted: nn.Module = peft.get_peft_model(network, config)
    return adapted


def with_merged_lora(network: nn.Module) -> nn.Module:
    merged: nn.Module = with_lora(network).merge_and_unload()  # type: ignore[operator]
    return merged


def with_shared_weights(network: nn.Module) -> nn.Module:
    first, second = network.get_submodule("dinat.encoder.levels.0.layers").children()
    second.intermediate, second.attention.self.qkv = first.intermediate, first.attention.self.qkv  # type: ignore[union-attr]
    return network


@each_product
def with_attributes_as_weights(module: nn.Module) -> None:
    """Plain tensors in the place of parameters."""
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            value = getattr(module, name) * 0.5
            delattr(module, name)
            setattr(module, name, value)


class HalvingWeight(Tensor):
    """A weight with its own products, as quantizers have."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) / 2 if func in (nn.functional.linear, nn.functional.conv2d) else result


@each_product
def with_weights_of_a_subclass(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.get_parameter("weight").detach().as_subclass(HalvingWeight), requires_grad=False)


def with_scaled_weights(network: nn.Module) -> nn.Module:
    network(PIXELS)  # whatever is cached by now must not be used again
    for parameter in network.parameters():
        parameter.mul_(0.7)
    return network


USES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": with_torchao,
    "LoRA": with_lora,
    "merged LoRA": with_merged_lora,
    "pruning": each_product(lambda module: prune.l1_unstructured(module, "weight", 0.3)),
    "parametrization": each_product(lambda module: parametrize.register_parametrization(module, "weight", Halved())),
    "spectral norm": each_product(nn.utils.parametrizations.spectral_norm),
    "spectral norm by hooks": each_product(nn.utils.spectral_norm),
    "weight norm": each_product(nn.utils.parametrizations.weight_norm),
    "shared weights": with_shared_weights,
    "weights that are attributes": with_attributes_as_weights,
    "weights of a subclass": with_weights_of_a_subclass,
    "weights changed in place": with_scaled_weights,
}


def with_other_head(network: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    network.classifier = nn.Sequential(nn.Dropout(), nn.Linear(128, 5, bias=False))
    return network


def with_hooks_after_the_last_stage(network: nn.Module) -> nn.Module:
    for name in ("dinat.layernorm", "classifier"):
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def with_norm_without_parameters(network: nn.Module) -> nn.Module:
    network.get_submodule("dinat").layernorm = nn.LayerNorm(128, elementwise_affine=False)
    return network


def without_norm(network: nn.Module) -> nn.Module:
    network.get_submodule("dinat").layernorm = nn.Identity()
    return network


def with_lora_of_the_classifier(network: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["classifier"], init_lora_weights=False, r=4)
    injected: nn.Module = peft.inject_adapter_in_model(config, network)
    return injected


USES_AFTER_THE_LAST_STAGE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "another head": with_other_head,
    "hooks": with_hooks_after_the_last_stage,
    "norm without parameters": with_norm_without_parameters,
    "no norm": without_norm,
    "LoRA of the classifier": with_lora_of_the_classifier,
    "packed head": pack,
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", USES | USES_AFTER_THE_LAST_STAGE)
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_classify_of_a_modified_network(use: str, dtype: torch.dtype, network: DinatForImageClassification) -> None:
    modified = (USES | USES_AFTER_THE_LAST_STAGE)[use](network).eval()
    if use not in ("packed head", "weights that are attributes"):
        modified.to(dtype)
    dtype = network.dinat.embeddings.norm.weight.dtype
    logits = network.classify(PIXELS.to(dtype))[0]
    expected = network(PIXELS.to(dtype)).logits.float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, expected, **({"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02})
    )


@torch.no_grad()
@pytest.mark.parametrize("use", USES | USES_AFTER_THE_LAST_STAGE)
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_packing_a_modified_network(use: str, network: DinatForImageClassification) -> None:
    modified = (USES | USES_AFTER_THE_LAST_STAGE)[use](network).eval()
    expected = modified(PIXELS).logits
    torch.testing.assert_close(pack(modified)(PIXELS).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_modified_network(use: str, network: DinatForImageClassification, expected: Tensor) -> None:
    """The logits, which the modification changes, are those of the definition of attention, and can be saved and loaded."""
    reference = DinatForImageClassification(CONFIG, attention="reference").eval().requires_grad_(False)
    reference.load_state_dict(network.state_dict())
    modified = []
    for module in (network, reference):
        torch.manual_seed(2)
        modified.append(USES[use](module).eval())
    with torch.enable_grad():  # no kernel is used
        changed = modified[1](PIXELS).logits
    torch.testing.assert_close(modified[0](PIXELS).logits, changed, rtol=0, atol=2e-5)
    assert use in ("shared weights", "weight norm") or not torch.allclose(changed, expected, rtol=0, atol=1e-4)
    state = {name: value.clone() for name, value in modified[0].state_dict().items()}
    modified[0].load_state_dict(state)
    torch.testing.assert_close(modified[0](PIXELS).logits, changed, rtol=0, atol=2e-5)


def test_state_dict_of_the_parameters_themselves(network: DinatForImageClassification) -> None:
    """Tracers identify a module's parameters by state_dict(keep_vars=True)."""
    parameters = {id(parameter) for parameter in network.parameters()}
    assert {id(value) for value in network.state_dict(keep_vars=True).values()} == parameters


def test_state_dicts_of_distributed_checkpoints(network: DinatForImageClassification, expected: Tensor) -> None:
    network.requires_grad_()
    optimizer = torch.optim.Adam(network.parameters())
    network(PIXELS).logits.sum().backward()
    optimizer.step()
    trained = network(PIXELS).logits.detach()
    state, optimizer_state = copy.deepcopy(get_state_dict(network, optimizer))
    assert state.keys() == network.state_dict().keys()
    other = DinatForImageClassification(CONFIG).eval()
    other_optimizer = torch.optim.Adam(other.parameters())
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    torch.testing.assert_close(other(PIXELS).logits, trained)
    for one, parameters in ((network, optimizer), (other, other_optimizer)):
        parameters.zero_grad()
        one(PIXELS).logits.sum().backward()
        parameters.step()
    torch.testing.assert_close(other(PIXELS).logits, network(PIXELS).logits)
    assert not torch.allclose(trained, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_pickle(activation: str) -> None:
    network = DinatForImageClassification(DinatConfig.from_dict(CONFIG.to_dict() | {"hidden_act": activation})).eval()
    copied = pickle.loads(pickle.dumps(network))
    torch.testing.assert_close(copied(PIXELS).logits, network(PIXELS).logits, rtol=0, atol=0)


COLD_EXPORT = """
import torch
from dinat.model import DinatConfig, DinatForImageClassification
config = DinatConfig(embed_dim=64, depths=[2, 1], num_heads=[2, 4], kernel_size=3, dilations=[[1, 2], [1]], mlp_ratio=2.0)
network = DinatForImageClassification(config).eval()
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network
    def forward(self, x):
        return self.network(x).logits
pixels = torch.randn(2, 3, 40, 36)
exported = torch.export.export(Logits(), (pixels,))
torch.testing.assert_close(exported.module()(pixels), network(pixels).logits, rtol=0, atol=1e-5)
output = torch.export.export(network, (pixels,)).module()(pixels)
assert type(output).__name__ == "DinatImageClassifierOutput" and output.hidden_states is None
torch.testing.assert_close(output.logits, network(pixels).logits, rtol=0, atol=1e-5)
"""


def test_export_in_a_new_process() -> None:
    """Nothing is cached yet."""
    done = subprocess.run([sys.executable, "-c", COLD_EXPORT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
