"""A card proves itself before it serves: what fails or lies is left out, and the service classifies rightly all the same.

What is left out, and why, stands in the log, in GET /model and in the metrics.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from dinat.app.engine.runtimes.torch_runtime import TorchRuntime
from dinat.model import DinatForImageClassification, attention
from dinat.model.attention import autotune
from tests.app.conftest import DIGITS, Service, running
from tests.rehearsal import card, clocks


@pytest.fixture(autouse=True)
def a_service_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whose threads are ordered by locks that are not recorded, and which remembers nothing of another's choices."""
    monkeypatch.setenv("DINAT_CACHE_DIR", str(tmp_path / "cache"))
    with clocks.one_host():
        yield


def spoil_backends(monkeypatch: pytest.MonkeyPatch, names: Collection[str], spoil: Callable[[Tensor], Tensor]) -> None:
    """On the card alone: the processor stays right."""

    def spoiled(name: str) -> Callable[..., Tensor]:
        true = attention.BACKENDS[name]
        return lambda q, *args, **kwargs: (spoil if q.device.type == "cuda" else lambda y: y)(true(q, *args, **kwargs))

    for name in names:
        monkeypatch.setitem(attention.BACKENDS, name, spoiled(name))


def served(**settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """GET /model, the log and the metrics of a service on the card that reads every digit rightly."""
    with (
        capture_logs() as log,
        running(**({"device": "cuda:0", "runtime": "torch", "max_batch": 2} | settings)) as service,
    ):
        assert service.client.get("/health/ready").status_code == 200, service.client.get("/health").json()
        check_digits(service)
        answers = service.client.get("/model").json(), list(log), service.client.get("/metrics").text
    return answers


def check_digits(service: Service) -> None:
    for digit in (0, 3, 7):
        answer = service.client.post("/classify", content=(DIGITS / f"{digit}-1.png").read_bytes())
        assert answer.json()["predictions"][0]["label"] == str(digit)


def disabled(answers: tuple[dict[str, Any], list[dict[str, Any]], str]) -> dict[str, str]:
    """What is left out, and why: the same in all three places."""
    model, log, metrics = answers
    said = {left["what"]: left["why"] for left in model["disabled"]}
    (warning,) = [entry for entry in log if entry["event"] == "left out"] or [{}]
    assert {what: why for what, why in warning.items() if what not in ("event", "log_level")} == said
    assert {what for what in said if f'dinat_disabled{{what="{what}"}} 1.0' in metrics} == set(said)
    return said


def test_where_all_is_well_nothing_is_left_out() -> None:
    answers = served()
    assert disabled(answers) == {}
    assert answers[0]["device"] == "cuda:0"


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "raises": (lambda y: (_ for _ in ()).throw(RuntimeError("no kernel image is available")), "no kernel image is available"),
    "is 5 % off": (lambda y: y * 1.05, "exceeds the limit of "),
    "gives NaN": (lambda y: y * float("nan"), "relative error nan exceeds the limit"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_backend_that_fails_or_lies_is_left_out(fault: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, why = FAULTS[fault]
    spoil_backends(monkeypatch, ("triton", "natten"), spoil)
    answers = served(precision=precision)
    said = disabled(answers)
    head_dim = 32
    lying = [name for name in autotune.candidates(torch.device("cuda", 0), torch.bfloat16, head_dim) if name != "tiled"]
    assert len(said) == len(lying)
    assert all(what.startswith(("attention triton", "attention natten")) and why in said[what] for what in said)
    assert set(answers[0]["attention"].values()) == {"tiled"}


@pytest.mark.parametrize("asked", ["triton", "natten"])
def test_an_asked_for_backend_that_lies_does_not_serve_either(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_backends(monkeypatch, [asked], lambda y: y * 1.05)
    answers = served(attention=asked)
    assert all(what.startswith(f"attention {asked}") for what in disabled(answers))
    assert set(answers[0]["attention"].values()) == {"tiled"}


def test_where_every_fast_backend_lies_the_definition_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_backends(monkeypatch, ("triton", "natten", "tiled"), lambda y: y * 1.05)
    answers = served(precision="fp32")
    assert "attention tiled" in disabled(answers)
    assert set(answers[0]["attention"].values()) == {"reference"}


def test_a_capture_that_raises_leaves_the_service_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: card.CUDAGraph, *_: object) -> None:
        raise card.CudaError("CUDA error: operation not supported")

    monkeypatch.setattr(card.CUDAGraph, "capture_begin", begin)
    answers = served()
    said = disabled(answers)
    assert "operation not supported" in said["CUDA graphs"]
    assert list(said) == ["CUDA graphs"]


def test_graphs_that_give_other_numbers_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = card.CUDAGraph.replay

    def forgetful(self: card.CUDAGraph) -> None:
        if all(step.what != "aten.sort.stable" for step in self._steps or []):
            replay(self)  # of a single layer, that is timed

    monkeypatch.setattr(card.CUDAGraph, "replay", forgetful)
    said = disabled(served())
    assert "batches of 2: its numbers are" in said["CUDA graphs"]
    assert "off the same without a graph" in said["CUDA graphs"]


def spoil_network(monkeypatch: pytest.MonkeyPatch, when: Callable[[DinatForImageClassification], bool]) -> None:
    classify = DinatForImageClassification.classify

    def spoiled(self: DinatForImageClassification, pixels: Tensor, features: Any = ()) -> Any:
        logits, maps = classify(self, pixels, features)
        return (logits.flip(1) if when(self) else logits), maps

    monkeypatch.setattr(DinatForImageClassification, "classify", spoiled)


def test_half_precision_that_is_off_gives_way_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_network(monkeypatch, lambda network: network.classifier.weight.dtype == torch.bfloat16)
    answers = served(precision="bf16")
    assert answers[0]["precision"] == "fp32"
    assert "off float32 on the processor" in disabled(answers)["precision bf16"]


def test_a_card_that_is_off_in_float32_gives_way_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_network(monkeypatch, lambda network: network.classifier.weight.device.type == "cuda")
    answers = served(precision="fp32")
    assert answers[0]["device"] == "cpu"
    assert "off float32 on the processor" in disabled(answers)["device cuda:0"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = TorchRuntime._compute

    def small(self: TorchRuntime, pixels: Tensor) -> Any:
        if pixels.shape[0] > 2 and pixels.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, pixels)

    monkeypatch.setattr(TorchRuntime, "_compute", small)
    assert disabled(served(max_batch=8)) == {"batches over 2": "they do not fit into the memory of cuda:0"}


def test_without_the_check_nothing_is_compared(tmp_path: Path) -> None:
    assert disabled(served(self_check=False, cache_dir=tmp_path)) == {}
    assert autotune.selections
    assert all(kept.errors == {} for kept in autotune.selections.values())


def test_a_second_start_tries_only_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(cache_dir=tmp_path)
    kept = dict(autotune.selections)
    autotune.selections.clear()
    monkeypatch.setattr(autotune, "seconds_on_gpu", lambda *_: pytest.fail("timed again"))
    served(cache_dir=tmp_path)
    assert autotune.selections == kept


def test_a_card_that_answers_nothing_any_more_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise card.CudaError("CUDA error: an illegal memory access was encountered")

    with running(device="cuda:0", runtime="torch", max_batch=1) as service:
        check_digits(service)
        monkeypatch.setattr(card.CUDAGraph, "replay", lost)
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        picture = (DIGITS / "7-1.png").read_bytes()
        answers = [service.client.post("/classify", content=picture) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {503}
        assert "cuda:0 answers nothing any more" in answers[0].json()["detail"]
        live = service.client.get("/health/live")
        assert live.status_code == 503
        assert "cuda:0 answers nothing any more" in live.json()["detail"]
