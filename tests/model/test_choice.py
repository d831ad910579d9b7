"""The choice of a backend by the clock, on whatever this machine has."""

from collections.abc import Iterator

import pytest
import torch

from model.attention import BACKENDS, choice
from model.attention.choice import Choice, Layer, candidates, choose, timing

Q, K, V = torch.randn(3, 1, 21, 21, 1, 8)
LAYER = Layer.of(Q, 7, 1)


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    kept = dict(choice.chosen)
    choice.chosen.clear()
    yield
    choice.chosen.clear()
    choice.chosen.update(kept)


def run(name: str) -> torch.Tensor:
    return BACKENDS[name](Q, K, V, None, 7, 1, 1.0, 0.0)


def test_a_cpu_has_one_choice() -> None:
    assert candidates(torch.device("cpu")) == ["tiled"]


def test_untimed_the_first_name_wins() -> None:
    assert choose(LAYER, ["reference", "tiled"], run) == "reference"
    assert choice.chosen == {}


def test_timed_once_the_fastest_is_kept() -> None:
    calls: list[str] = []

    def counted(name: str) -> object:
        calls.append(name)
        return [run("reference") for _ in range(20)] if name == "slow" else run(name)

    with timing():
        assert choose(LAYER, ["slow", "tiled"], counted) == "tiled"
        timed = len(calls)
        assert choose(LAYER, ["slow", "tiled"], counted) == "tiled"
    assert choose(LAYER, ["slow", "tiled"], counted) == "tiled"
    assert len(calls) == timed
    kept = choice.chosen[LAYER]
    assert kept.seconds["tiled"] < kept.seconds["slow"]


def test_a_backend_that_cannot_run_is_left_out() -> None:
    with timing():
        assert choose(LAYER, ["absent", "tiled"], run) == "tiled"
    assert choice.chosen[LAYER] == Choice("tiled", choice.chosen[LAYER].seconds)
    assert choice.chosen[LAYER].seconds["absent"] == float("inf")


def test_another_shape_is_another_choice() -> None:
    assert Layer.of(Q, 7, 1) == LAYER
    assert Layer.of(Q, 7, 3) != LAYER
    assert Layer.of(Q.half(), 7, 1) != LAYER
