"""Every published network can be captured as a CUDA graph, with every attention backend and in every precision.

Its forward pass neither copies between host and GPU, nor synchronizes, nor reads a value on the host.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dinat.app.engine.runtimes.cuda_graphs import CapturedComputation
from dinat.app.engine.runtimes.runtime import rank
from dinat.model import AttentionError, DinatConfig, DinatForImageClassification, DinatImageProcessor, attention
from dinat.model.attention import autotune, natten_backend
from dinat.model.config import PRESETS
from dinat.model.gpu import steps
from dinat.model.gpu.fusing import fuse
from tests.model.reference import assert_matches_reference
from tests.rehearsal.fake_gpu import devices
from tests.rehearsal.fake_gpu.counts import counted
from tests.rehearsal.fake_gpu.tensors import shapes_only

CUDA = torch.device("cuda", 0)
PROCESSOR = DinatImageProcessor()


def capture(config: DinatConfig, attention: str, dtype: torch.dtype, height: int, width: int, batch: int = 1) -> torch.Size:
    """Capture a network, run it and return the shape of the scores."""
    with shapes_only(), torch.inference_mode():
        with torch.device("meta"):
            network = DinatForImageClassification(config, attention=attention).eval()
        network = network.to_empty(device=CUDA).to(dtype)

        def compute(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rank(network.classify(PROCESSOR.normalize(pixels).to(dtype))[0], config)

        captured = CapturedComputation(compute, torch.zeros(batch, height, width, 3, dtype=torch.uint8, device=CUDA))
        scores, classes = captured.run(torch.zeros(batch, height, width, 3, dtype=torch.uint8))
        assert (scores.dtype, classes.dtype) == (torch.float32, torch.int64)
        return scores.shape


@pytest.mark.parametrize("attention", ["tiled", "triton", "natten"])
@pytest.mark.parametrize(
    ("preset", "dtype"), [*((preset, torch.bfloat16) for preset in PRESETS), ("mini", torch.float16), ("mini", torch.float32)]
)
def test_every_published_network_can_be_captured(preset: str, attention: str, dtype: torch.dtype) -> None:
    config = DinatConfig.preset(preset)
    side = getattr(config, "image_size", 224)
    assert capture(config, attention, dtype, side, side) == (1, config.num_labels)


BUDGETS = {
    "mini": {"kernels": (97, 46), "kernels, but for whole MLPs": (110, 64), "definition": (207, 108)},
    "large": {"kernels": (167, 225), "kernels, but for whole MLPs": (170, 243), "definition": (327, 393)},
}
"""Launches of a batch of 64, and megabytes that they read and write per image, by the selected candidates: bf16, attention by
the Triton kernel, pixels to scores."""


def candidate(step: autotune.Step, selected: str) -> str:
    kernels = [name for name in step.names if name not in (steps.DEFINITION, steps.TWO_STEPS)]
    is_definition = selected == "definition" or (step.key.kind == steps.MLP and selected != "kernels")
    return step.names[0] if is_definition else kernels[0]


@pytest.mark.parametrize(("preset", "selected"), [(preset, selected) for preset in BUDGETS for selected in BUDGETS[preset]])
def test_a_forward_pass_stays_within_its_budget(preset: str, selected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "select", lambda step: candidate(step, selected))
    config = DinatConfig.preset(preset)
    with shapes_only(), torch.inference_mode():
        with torch.device("meta"):
            network = DinatForImageClassification(config, attention="triton").eval()
        network = fuse(network.to_empty(device=CUDA).to(torch.bfloat16))
        pixels = torch.zeros(64, 224, 224, 3, dtype=torch.uint8, device=CUDA)

        def compute() -> object:
            return rank(network.classify(PROCESSOR.normalize(pixels, torch.bfloat16))[0], config)

        compute()  # creates tables
        with counted() as counts:
            compute()
    launches, megabytes = BUDGETS[preset][selected]
    assert 0.5 * launches <= counts.launches <= launches
    assert 0.5 * megabytes <= counts.bytes / 64e6 <= megabytes
    assert counts.bytes_to_host == 0


@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (160, 200), (96, 256)])
@pytest.mark.parametrize("attention", ["tiled", "triton", "natten"])
def test_batches_of_any_image_size_can_be_captured(attention: str, height: int, width: int, layer_scale: float) -> None:
    config = DinatConfig.preset("mini", layer_scale_init_value=layer_scale)
    assert capture(config, attention, torch.bfloat16, height, width, batch=4) == (4, 1000)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_scores_of_every_problem_type_can_be_captured(problem_type: str) -> None:
    config = DinatConfig(depths=[1], num_heads=[2], dilations=[[1]], num_labels=3, problem_type=problem_type)
    assert capture(config, "tiled", torch.float32, 64, 64) == (1, 3)


CUTLASS = ["natten cutlass-fna"]
NATTEN = {
    (7, 5): [],
    (8, 0): CUTLASS,
    (8, 9): CUTLASS,
    (9, 0): ["natten hopper-fna", *CUTLASS],
    (10, 0): ["natten blackwell-fna", *CUTLASS],
    (12, 0): CUTLASS,
}
"""NATTEN's candidates in half precision, by compute capability."""


@pytest.fixture(params=NATTEN, ids=lambda capability: "sm_{}{}".format(*capability))
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Make the fake GPU one of this compute capability."""
    major, minor = request.param
    monkeypatch.setattr(devices.PROPERTIES, "major", major)
    monkeypatch.setattr(devices.PROPERTIES, "minor", minor)
    for cached in (natten_backend.compatible_backends, natten_backend.select_config):
        cached.cache_clear()
    yield request.param
    for cached in (natten_backend.compatible_backends, natten_backend.select_config):
        cached.cache_clear()


def test_each_natten_backend_of_a_gpu_is_a_candidate_and_correct(capability: tuple[int, int]) -> None:
    names = autotune.candidates(CUDA, torch.float16, 32)
    assert [name for name in names if name.startswith("natten")] == NATTEN[capability]
    assert names[-1] == "tiled"
    assert any(name.startswith("triton") for name in names) == (capability >= (8, 0))
    assert set(autotune.candidates(CUDA, torch.float32, 32)) & {"natten hopper-fna", "natten blackwell-fna"} == set()
    for side, kernel_size in ((9, 7), (5, 5)):  # the second covers the feature map
        q, k, v = torch.randn(3, 1, side, side, 2, 32, device=CUDA).half()
        rpb = torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1, device=CUDA)
        for name in NATTEN[capability]:
            assert_matches_reference(
                attention.run_candidate(name, q, k, v, rpb, kernel_size, 1, 0.2), q, k, v, rpb, kernel_size, 1, 0.2
            )


def test_natten_backend_that_raises_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    natten = attention.BACKENDS["natten"]

    def broken_hopper(*args: Any, natten_backend: str) -> torch.Tensor:
        if natten_backend == "hopper-fna":
            raise RuntimeError("CUTLASS error: an internal error")
        return natten(*args, natten_backend=natten_backend)

    monkeypatch.setitem(attention.BACKENDS, "natten", broken_hopper)
    q = torch.randn(2, 9, 9, 1, 32, device=CUDA).bfloat16()
    with torch.inference_mode(), autotune.autotuning():
        attention.neighborhood_attention(q, q, q, None, 7, backend="natten")
    (selection,) = autotune.selections.values()
    assert selection.backend == "natten cutlass-fna"
    assert selection.disabled == {"natten hopper-fna": "RuntimeError: CUTLASS error: an internal error"}


def test_natten_without_a_kernel_for_the_gpu_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from natten import backends

    monkeypatch.setattr(backends, "get_compatible_backends", lambda *_, **__: ["flex-fna"])
    with pytest.raises(AttentionError, match=r"natten has no kernel for torch\.bfloat16 heads of 81 channels"):
        natten_backend.select_config.__wrapped__(81, 32, torch.bfloat16, CUDA, False)


def test_backend_is_selected_without_lookup_of_candidates_during_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(attention, "candidates", lambda *_: pytest.fail("looked up candidates"))
    calls: list[str] = []
    for name in ("triton", "tiled"):
        monkeypatch.setitem(attention.BACKENDS, name, lambda q, *_, name=name: calls.append(name) or q)
    for dtype, head_dim in ((torch.bfloat16, 32), (torch.float64, 32), (torch.bfloat16, 4)):
        x = torch.zeros(1, 7, 7, 1, head_dim, device=CUDA, dtype=dtype)
        attention.neighborhood_attention(x, x, x)
    assert calls == ["triton", "tiled", "tiled"]


def test_tiled_attention_excludes_cudnn_and_restores_what_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[tuple[bool, bool]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        enabled.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    q = torch.randn(1, 9, 9, 1, 8, device=CUDA)
    attention.neighborhood_attention(q, q, q, backend="tiled")
    assert set(enabled) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()
