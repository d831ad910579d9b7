"""The choice of a backend by its numbers and by the clock, on whatever this machine has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinat.model import AttentionError
from dinat.model.attention import BACKENDS, autotune, compiled
from dinat.model.attention.autotune import Choice, LayerKey, candidates, choose, definition, trying

QKV = torch.randn(1, 21, 21, 3, 1, 8)
Q, K, V = QKV.unbind(3)
LAYER = LayerKey.of(Q, 7, 1, 1.0, has_rpb=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    kept = dict(autotune.chosen)
    autotune.chosen.clear()
    autotune._distrusted.clear()
    yield
    autotune.chosen.clear()
    autotune._distrusted.clear()
    autotune.chosen.update(kept)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
    """A backend by name; some that there are not."""
    if name == "slow":
        for _ in range(20):
            attend("reference", q, k, v, rpb)
        return attend("reference", q, k, v, rpb)
    if name == "lying":
        return attend("tiled", q, k, v, rpb) * 1.05
    if name == "unable":
        raise AttentionError("there is no kernel for this")
    return BACKENDS[name](q, k, v, rpb, 7, 1, 1.0, 0.0)


def chosen_of(*names: str, file: Path | None = None, check: bool = True) -> Choice:
    with trying(check, file):
        assert choose(LAYER, names, attend, Q, K, V, None) == autotune.chosen[LAYER].backend
    return autotune.chosen[LAYER]


def test_a_cpu_has_what_is_compiled_for_it_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: object())
    assert candidates(CPU, torch.float32, 32) == ["compiled", "tiled"]
    assert candidates(CPU, torch.float32, 16) == ["tiled"]
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert candidates(CPU, torch.float32, 32) == ["tiled"]
    assert candidates(CPU, torch.float64, 32, "tiled") == ["tiled"]


def test_a_card_has_every_cut_of_the_kernel_and_for_float64_what_is_exact_for_it() -> None:
    pytest.importorskip("triton")
    names = candidates(torch.device("cuda"), torch.bfloat16, 32)
    assert names[0] == "triton 8x4/32/1/2"
    assert names[-1] == "tiled"
    assert len(names) == len(set(names)) >= 5
    assert candidates(torch.device("cuda"), torch.float64, 32) == ["tiled"]
    assert candidates(torch.device("cuda"), torch.float32, 32, "tiled") == ["tiled"]
    assert len(candidates(torch.device("cuda"), torch.bfloat16, 128, "triton")) == 1
    assert not any(name.startswith("triton") for name in candidates(torch.device("cuda"), torch.bfloat16, 4))


def test_untried_the_first_name_wins() -> None:
    assert choose(LAYER, ["reference", "tiled"], attend, Q, K, V, None) == "reference"
    assert autotune.chosen == {}


def test_of_those_that_are_right_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = chosen_of("slow", "tiled")
    assert kept.backend == "tiled"
    assert kept.seconds["tiled"] < kept.seconds["slow"]
    assert all(error < 1e-6 for error in kept.errors.values())
    monkeypatch.setattr(autotune, "_timed", lambda *_: pytest.fail("timed again"))
    assert chosen_of("slow", "tiled") == kept
    assert choose(LAYER, ["slow", "tiled"], attend, Q, K, V, None) == "tiled"


def test_what_raises_or_lies_is_left_out_and_not_trusted_elsewhere() -> None:
    kept = chosen_of("absent", "lying", "tiled")
    assert kept.backend == "tiled"
    assert kept.disabled.keys() == {"absent", "lying"}
    assert kept.disabled["absent"] == "KeyError: 'absent'"
    assert "its numbers are 0.05 off the definition, 1e-05 is allowed" in kept.disabled["lying"]
    other = LayerKey.of(Q, 7, 3, 1.0)
    assert choose(other, ["lying", "absent", "tiled"], attend, Q, K, V, None) == "tiled"


def test_what_says_itself_that_it_cannot_is_no_fault_unless_it_was_asked_for() -> None:
    assert chosen_of("unable", "tiled").disabled == {}
    asked = LayerKey.of(Q, 7, 1, 1.0, asked="unable")
    with trying():
        assert choose(asked, ["unable"], attend, Q, K, V, None) == "tiled"
    assert autotune.chosen[asked].disabled == {"unable": "AttentionError: there is no kernel for this"}


def test_where_all_is_left_out_the_tiles_serve() -> None:
    assert chosen_of("absent", "lying").backend == "tiled"


def test_unchecked_a_liar_may_win() -> None:
    assert chosen_of("lying", check=False) == Choice("lying", autotune.chosen[LAYER].seconds)


def test_choices_are_remembered_and_only_the_kept_one_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = chosen_of("slow", "tiled", file=tmp_path / "a" / "choices.json")
    autotune.chosen.clear()
    monkeypatch.setattr(autotune, "_timed", lambda *_: pytest.fail("timed again"))
    assert chosen_of("slow", "tiled", file=tmp_path / "a" / "choices.json") == kept
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["choices.json"]


def test_a_remembered_choice_that_has_become_wrong_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    assert chosen_of("lying", file=file, check=False).backend == "lying"
    autotune.chosen.clear()
    assert chosen_of("lying", "tiled", file=file).backend == "tiled"


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"x": {"unknown": 1}}'])
def test_a_file_that_cannot_be_read_is_as_none(content: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(content)
    assert chosen_of("tiled", file=file).backend == "tiled"
    assert autotune._read(file).keys() == {LAYER.key}


def test_a_file_that_cannot_be_written_costs_nothing_but_memory(tmp_path: Path) -> None:
    (tmp_path / "no folder").write_text("")
    assert chosen_of("tiled", file=tmp_path / "no folder" / "choices.json").backend == "tiled"


def test_another_shape_is_another_choice() -> None:
    assert LayerKey.of(Q, 7, 1, 1.0, has_rpb=False) == LAYER
    assert LayerKey.of(Q, 7, 3, 1.0, has_rpb=False) != LAYER
    assert LayerKey.of(Q.half(), 7, 1, 1.0, has_rpb=False) != LAYER


def test_the_definition_head_by_head_is_the_definition() -> None:
    qkv, rpb = torch.randn(2, 9, 8, 3, 3, 4), torch.randn(3, 5, 5)
    expected = BACKENDS["reference"](*(x.double() for x in qkv.unbind(3)), rpb.double(), 3, 2, 0.5, 0.0)
    torch.testing.assert_close(definition(qkv, rpb, 3, 2, 0.5), expected)
