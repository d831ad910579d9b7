"""The self-check of a GPU at startup: what raises or computes wrongly is disabled, and the service still classifies correctly.

What is disabled, and why, is in the log, in GET /model and in the metrics.
"""

import math
import re
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from dinat.app.engine.runtimes import torch_runtime
from dinat.app.engine.runtimes.torch_runtime import PRECISIONS, TorchRuntime
from dinat.app.host import GRACE_SECONDS
from dinat.model import DinatForImageClassification, attention
from dinat.model.attention import autotune
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.gpu import linear_kernel, mlp_kernel, pixels_kernel, steps
from tests.app.conftest import DIGITS, Service, running
from tests.rehearsal.fake_gpu import clocks
from tests.rehearsal.fake_gpu.devices import CudaError
from tests.rehearsal.fake_gpu.graphs import CUDAGraph

Report = tuple[dict[str, Any], list[dict[str, Any]], str]
"""GET /model, the log events and the metrics of a service."""


@pytest.fixture(autouse=True)
def isolated_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use an empty cache, and one timeline for all host threads, since the service's locks are not tracked."""
    monkeypatch.setenv("DINAT_CACHE_DIR", str(tmp_path / "cache"))
    with clocks.single_host_thread():
        yield


def corrupt_backends(monkeypatch: pytest.MonkeyPatch, names: Collection[str], corrupt: Callable[[Tensor], Tensor]) -> None:
    """Apply `corrupt` to the backends' output on the GPU, not on the CPU."""

    def corrupted(name: str) -> Callable[..., Tensor]:
        backend = attention.BACKENDS[name]
        return lambda q, *args, **kwargs: (corrupt if q.device.type == "cuda" else lambda y: y)(backend(q, *args, **kwargs))

    for name in names:
        monkeypatch.setitem(attention.BACKENDS, name, corrupted(name))


def serve(**settings: Any) -> Report:
    """Start a service on the GPU, check that it classifies digits correctly, and return its report."""
    with (
        capture_logs() as log,
        running(**({"device": "cuda:0", "runtime": "torch", "max_batch": 2} | settings)) as service,
    ):
        assert service.client.get("/health/ready").status_code == 200, service.client.get("/health").json()
        check_digits(service)
        report = service.client.get("/model").json(), list(log), service.client.get("/metrics").text
    return report


def check_digits(service: Service) -> None:
    for digit in (0, 3, 7):
        response = service.client.post("/classify", content=(DIGITS / f"{digit}-1.png").read_bytes())
        assert response.json()["predictions"][0]["label"] == str(digit)


def disabled(report: Report) -> dict[str, str]:
    """Return what is disabled, and why, after checking that all three places agree."""
    model, log, metrics = report
    reasons = {entry["name"]: entry["reason"] for entry in model["disabled"]}
    (warning,) = [entry for entry in log if entry["event"] == "disabled"] or [{}]
    assert {name: value for name, value in warning.items() if name not in ("event", "log_level")} == reasons
    assert {name for name in reasons if f'dinat_disabled{{name="{name}"}} 1.0' in metrics} == set(reasons)
    return reasons


def test_nothing_is_disabled_on_a_correct_gpu() -> None:
    report = serve()
    assert disabled(report) == {}
    assert report[0]["device"] == "cuda:0"


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "raises": (lambda y: (_ for _ in ()).throw(RuntimeError("no kernel image is available")), "no kernel image is available"),
    "is 5 % off": (lambda y: y * 1.05, "exceeds the limit of "),
    "returns NaN": (lambda y: y * float("nan"), "relative error nan exceeds the limit"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_backend_that_raises_or_is_wrong_is_disabled(fault: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt, message = FAULTS[fault]
    corrupt_backends(monkeypatch, ("triton", "natten"), corrupt)
    report = serve(precision=precision)
    reasons = disabled(report)
    head_dim = 32
    names = autotune.candidates(torch.device("cuda", 0), PRECISIONS[precision], head_dim)
    wrong = [name for name in names if name != "tiled"]
    assert len(reasons) == len(wrong)
    assert all(name.startswith(("attention triton", "attention natten")) and message in reasons[name] for name in reasons)
    assert set(report[0]["attention"].values()) == {"tiled"}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_that_raises_or_is_wrong_is_disabled(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt, message = FAULTS[fault]
    for kernel in (linear_kernel, mlp_kernel, pixels_kernel):
        launch = kernel.launch
        monkeypatch.setattr(kernel, "launch", lambda *args, launch=launch: corrupt(launch(*args)))
    reasons = disabled(serve(precision="bf16", attention="tiled"))
    assert {name.rpartition(" ")[0] for name in reasons} == {
        steps.NORM_AND_LINEAR,
        steps.LINEAR_AND_SUM,
        steps.MLP,
        steps.PIXELS,
    }
    assert [why for why in reasons.values() if message not in why] == []
    selected = {choice.backend for key, choice in autotune.selections.items() if isinstance(key, steps.StepKey)}
    assert selected == {steps.DEFINITION, steps.TWO_STEPS}


@pytest.mark.parametrize("backend", ["triton", "natten"])
def test_wrong_backend_is_disabled_also_if_requested_by_name(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_backends(monkeypatch, [backend], lambda y: y * 1.05)
    report = serve(attention=backend)
    assert all(name.startswith(f"attention {backend}") for name in disabled(report))
    assert set(report[0]["attention"].values()) == {"tiled"}


def test_reference_is_selected_if_every_other_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_backends(monkeypatch, ("triton", "natten", "tiled"), lambda y: y * 1.05)
    report = serve(precision="fp32")
    assert "attention tiled" in disabled(report)
    assert set(report[0]["attention"].values()) == {"reference"}


def test_cuda_graphs_are_disabled_if_capture_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture_begin(self: CUDAGraph, *_: object) -> None:
        raise CudaError("CUDA error: operation not supported")

    monkeypatch.setattr(CUDAGraph, "capture_begin", capture_begin)
    reasons = disabled(serve())
    assert "operation not supported" in reasons["CUDA graphs"]
    assert list(reasons) == ["CUDA graphs"]


def test_cuda_graphs_are_disabled_if_replays_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = CUDAGraph.replay

    def replay_single_layers(self: CUDAGraph) -> None:
        if all(step.operation != "aten.sort.stable" for step in self._steps or []):
            replay(self)  # the graph of one layer, captured for timing

    monkeypatch.setattr(CUDAGraph, "replay", replay_single_layers)
    reasons = disabled(serve())
    assert "batches of 2: relative error" in reasons["CUDA graphs"]
    assert "against the network without a graph" in reasons["CUDA graphs"]


def corrupt_network(monkeypatch: pytest.MonkeyPatch, condition: Callable[[DinatForImageClassification], bool]) -> None:
    """Reverse the order of the logits of networks that meet the condition."""
    classify = DinatForImageClassification.classify

    def corrupted(self: DinatForImageClassification, pixels: Tensor, features: Any = ()) -> Any:
        logits, feature_maps = classify(self, pixels, features)
        return (logits.flip(1) if condition(self) else logits), feature_maps

    monkeypatch.setattr(DinatForImageClassification, "classify", corrupted)


def test_half_precision_that_is_wrong_falls_back_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_network(monkeypatch, lambda network: network.classifier.weight.dtype == torch.bfloat16)
    report = serve(precision="bf16")
    assert report[0]["precision"] == "fp32"
    assert "against float32 on the CPU" in disabled(report)["precision bf16"]


def test_gpu_that_is_wrong_in_float32_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_network(monkeypatch, lambda network: network.classifier.weight.device.type == "cuda")
    report = serve(precision="fp32")
    assert report[0]["device"] == "cpu"
    assert "against float32 on the CPU" in disabled(report)["device cuda:0"]


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_broken_checkpoint_is_not_taken_for_a_broken_gpu(self_check: bool, tmp_path: Path) -> None:
    network = DinatForImageClassification.from_pretrained("digits")
    network.classifier.bias.data[3] = math.nan
    network.save_pretrained(tmp_path)
    with running(model=str(tmp_path), device="cuda:0", runtime="torch", max_batch=1, self_check=self_check) as service:
        assert f"scores that are not finite (NaN or infinite): the checkpoint {tmp_path} is broken" in str(
            service.engine.failure
        )


def test_batch_that_does_not_fit_into_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = TorchRuntime._compute

    def limited(self: TorchRuntime, pixels: Tensor) -> Any:
        if pixels.shape[0] > 2 and pixels.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, pixels)

    monkeypatch.setattr(TorchRuntime, "_compute", limited)
    assert disabled(serve(max_batch=8)) == {"batches over 2": "out of memory on cuda:0"}


def corrupt_large_batches(monkeypatch: pytest.MonkeyPatch, kernel: Any, corrupt: Callable[[Tensor], Tensor]) -> None:
    """Apply `corrupt` to a kernel's output for batches over 2, the size with which candidates are compared."""
    launch = kernel.launch

    def corrupted(x: Tensor, *args: Any) -> Tensor:
        return corrupt(launch(x, *args)) if x.shape[0] > 2 else launch(x, *args)

    monkeypatch.setattr(kernel, "launch", corrupted)


def warmed(max_batch: int) -> TorchRuntime:
    runtime = TorchRuntime(open_checkpoint("digits"), torch.device("cuda", 0), "bf16", "tiled")
    runtime.warm(max_batch)
    return runtime


def test_kernels_that_require_a_smaller_batch_are_used_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(x: Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    compute = TorchRuntime._compute
    monkeypatch.setattr(TorchRuntime, "_compute", lambda self, x: out_of_memory(x) if x.shape[0] > 2 else compute(self, x))
    for kernel in (linear_kernel, mlp_kernel):
        corrupt_large_batches(monkeypatch, kernel, out_of_memory)
    assert [entry.name for entry in warmed(4).disabled] == ["batches over 2"]


def test_kernels_that_are_wrong_only_for_large_batches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "select", lambda step: step.names[-1])
    corrupt_large_batches(monkeypatch, linear_kernel, lambda y: y.flip(1))
    runtime = warmed(4)
    assert runtime.precision == "fp32"
    assert [entry.name for entry in runtime.disabled] == ["precision bf16"]


def test_backend_that_is_wrong_only_for_single_images_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_backends(monkeypatch, ["tiled"], lambda y: y.flip(1) if y.shape[0] == 1 else y)
    report = serve(precision="fp32", attention="tiled")
    assert report[0]["device"] == "cpu"
    assert "against float32 on the CPU" in disabled(report)["device cuda:0"]


def test_nothing_is_compared_without_the_self_check(tmp_path: Path) -> None:
    assert disabled(serve(self_check=False, cache_dir=tmp_path)) == {}
    assert autotune.selections
    assert all(choice.errors == {} for choice in autotune.selections.values())


def test_cached_choices_are_used_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(cache_dir=tmp_path)
    choices = dict(autotune.selections)
    autotune.selections.clear()
    monkeypatch.setattr(autotune, "seconds_on_gpu", lambda *_: pytest.fail("timed again"))
    serve(cache_dir=tmp_path)
    assert autotune.selections == choices


def test_start_fails_if_a_kernel_hangs_and_the_next_start_does_not_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging: list[threading.Thread] = []
    ended = threading.Event()
    exits: list[tuple[float, int]] = []

    def hang(*_: object) -> None:
        hanging.append(threading.current_thread())
        assert ended.wait(60)
        raise SystemExit

    class Timer(threading.Timer):
        """Does not wait for the kernel that hangs."""

        def __init__(self, interval: float, function: Callable[..., None], args: Any = ()) -> None:
            super().__init__(0 if "look-up" in args else interval, function, args)

    monkeypatch.setattr(pixels_kernel, "launch", hang)
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(torch_runtime, "exit_after", lambda seconds, status, on_exit: exits.append((seconds, status)))
    with running(device="cuda:0", runtime="torch", max_batch=1, cache_dir=tmp_path) as service:
        assert re.fullmatch(
            "cuda:0 hangs in normalization of pixels look-up: it did not return within 300 s for .* features; "
            "the next start does not use it",
            str(service.engine.failure),
        )
        assert service.client.get("/health/live").status_code == 503
    assert exits == [(GRACE_SECONDS, 1)]
    ended.set()
    hanging[0].join()
    reasons = disabled(serve(cache_dir=tmp_path))
    assert len(hanging) == 1
    assert list(reasons) == ["normalization of pixels look-up"]
    assert "at an earlier start" in reasons["normalization of pixels look-up"]


def test_service_is_not_live_after_the_gpu_stops_responding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CudaError("CUDA error: an illegal memory access was encountered")

    with running(device="cuda:0", runtime="torch", max_batch=1) as service:
        check_digits(service)
        monkeypatch.setattr(CUDAGraph, "replay", fail)
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        image = (DIGITS / "7-1.png").read_bytes()
        responses = [service.client.post("/classify", content=image) for _ in range(3)]
        assert {response.status_code for response in responses} == {503}
        assert "cuda:0 no longer responds" in responses[0].json()["detail"]
        live = service.client.get("/health/live")
        assert live.status_code == 503
        assert "cuda:0 no longer responds" in live.json()["detail"]
