"""Selection of a backend by error and time, on any machine."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinat.model import AttentionError
from dinat.model.attention import BACKENDS, autotune, compiled
from dinat.model.attention.autotune import (
    Attend,
    LayerKey,
    Selection,
    autotuning,
    candidates,
    float64_reference,
    select_backend,
)
from dinat.model.attention.selection_files import hung_file, read_hung, read_selections

QKV = torch.randn(1, 21, 21, 3, 1, 8)
Q, K, V = QKV.unbind(3)
LAYER = LayerKey.of(Q, 7, 1, 1.0, has_rpb=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_selections() -> Iterator[None]:
    before = dict(autotune.selections)
    autotune.selections.clear()
    autotune._failed.clear()
    yield
    autotune.selections.clear()
    autotune._failed.clear()
    autotune.selections.update(before)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
    """Run a backend, or one of three backends that exist only here."""
    if name == "slow":
        for _ in range(20):
            attend("reference", q, k, v, rpb)
        return attend("reference", q, k, v, rpb)
    if name == "incorrect":
        return attend("tiled", q, k, v, rpb) * 1.05
    if name == "unsupported":
        raise AttentionError("there is no kernel for this")
    return BACKENDS[name](q, k, v, rpb, 7, 1, 1.0, 0.0)


def tune(*names: str, file: Path | None = None, check: bool = True) -> Selection:
    with autotuning(check, file):
        assert select_backend(LAYER, names, attend, Q, K, V, None) == autotune.selections[LAYER].backend
    return autotune.selections[LAYER]


def test_candidates_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: object())
    assert candidates(CPU, torch.float32, 32) == ["compiled", "tiled"]
    assert candidates(CPU, torch.float32, 16) == ["tiled"]
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert candidates(CPU, torch.float32, 32) == ["tiled"]
    assert candidates(CPU, torch.float64, 32, "tiled") == ["tiled"]


def set_capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor))


def test_candidates_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    set_capability(monkeypatch, 8, 0)
    monkeypatch.setattr(autotune, "installed_backends", lambda: ["triton"])  # NATTEN's checks allocate on the GPU
    names = candidates(torch.device("cuda"), torch.bfloat16, 32)
    assert names[0] == "triton 8x4/32/1/2"
    assert names[-1] == "tiled"
    assert len(names) == len(set(names)) >= 5
    assert candidates(torch.device("cuda"), torch.float64, 32) == ["tiled"]
    assert candidates(torch.device("cuda"), torch.float32, 32, "tiled") == ["tiled"]
    assert len(candidates(torch.device("cuda"), torch.bfloat16, 128, "triton")) == 1
    assert not any(name.startswith("triton") for name in candidates(torch.device("cuda"), torch.bfloat16, 4))


def test_a_gpu_whose_tensor_cores_no_kernel_uses_has_one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, 7, 5)
    assert candidates(torch.device("cuda"), torch.float16, 32) == ["tiled"]
    assert candidates(torch.device("cuda"), torch.float32, 32) == ["tiled"]


def test_first_candidate_is_used_without_autotuning() -> None:
    assert select_backend(LAYER, ["reference", "tiled"], attend, Q, K, V, None) == "reference"
    assert autotune.selections == {}


def test_fastest_correct_candidate_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = tune("slow", "tiled")
    assert selection.backend == "tiled"
    assert selection.seconds["tiled"] < selection.seconds["slow"]
    assert all(error < 1e-6 for error in selection.errors.values())
    monkeypatch.setattr(autotune, "_time_candidates", lambda *_: pytest.fail("timed twice"))
    assert tune("slow", "tiled") == selection
    assert select_backend(LAYER, ["slow", "tiled"], attend, Q, K, V, None) == "tiled"


def test_failing_candidates_are_disabled_for_all_layers() -> None:
    selection = tune("absent", "incorrect", "tiled")
    assert selection.backend == "tiled"
    assert selection.disabled.keys() == {"absent", "incorrect"}
    assert selection.disabled["absent"] == "KeyError: 'absent'"
    assert "relative error 0.05 exceeds the limit of 1e-05" in selection.disabled["incorrect"]
    other = LayerKey.of(Q, 7, 3, 1.0)
    assert select_backend(other, ["incorrect", "absent", "tiled"], attend, Q, K, V, None) == "tiled"


def test_unsupported_candidate_is_reported_only_if_requested() -> None:
    assert tune("unsupported", "tiled").disabled == {}
    layer = LayerKey.of(Q, 7, 1, 1.0, requested_backend="unsupported")
    with autotuning():
        assert select_backend(layer, ["unsupported"], attend, Q, K, V, None) == "tiled"
    assert autotune.selections[layer].disabled == {"unsupported": "AttentionError: there is no kernel for this"}


def test_tiled_is_used_if_all_candidates_are_disabled() -> None:
    assert tune("absent", "incorrect").backend == "tiled"


def test_incorrect_candidate_can_be_selected_without_check() -> None:
    assert tune("incorrect", check=False) == Selection("incorrect", autotune.selections[LAYER].seconds)


def test_stored_selection_is_checked_but_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = tune("slow", "tiled", file=tmp_path / "a" / "selections.json")
    autotune.selections.clear()
    monkeypatch.setattr(autotune, "_time_candidates", lambda *_: pytest.fail("timed twice"))
    assert tune("slow", "tiled", file=tmp_path / "a" / "selections.json") == selection
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["selections.json"]


def test_stored_selection_that_fails_its_check_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "selections.json"
    assert tune("incorrect", file=file, check=False).backend == "incorrect"
    autotune.selections.clear()
    assert tune("incorrect", "tiled", file=file).backend == "tiled"


NULL_TIMES = json.dumps({autotune.file_key(LAYER): {"backend": "tiled", "seconds": None, "errors": {}, "disabled": None}})


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"x": {"unknown": 1}}', NULL_TIMES])
def test_unreadable_file_is_ignored_and_replaced(content: str, tmp_path: Path) -> None:
    file = tmp_path / "selections.json"
    file.write_text(content)
    assert tune("tiled", file=file).backend == "tiled"
    assert read_selections(file).keys() == {autotune.file_key(LAYER)}


def test_only_selections_of_this_session_are_written(tmp_path: Path) -> None:
    """Others may be of another GPU model, which has its own file."""
    autotune.selections[LayerKey.of(Q, 7, 3, 1.0)] = Selection("tiled")
    tune("tiled", file=tmp_path / "selections.json")
    assert read_selections(tmp_path / "selections.json").keys() == {autotune.file_key(LAYER)}


def test_file_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "no folder").write_text("")
    assert tune("tiled", file=tmp_path / "no folder" / "selections.json").backend == "tiled"


def test_layers_of_other_shapes_have_other_keys() -> None:
    assert LayerKey.of(Q, 7, 1, 1.0, has_rpb=False) == LAYER
    assert LayerKey.of(Q, 7, 3, 1.0, has_rpb=False) != LAYER
    assert LayerKey.of(Q.half(), 7, 1, 1.0, has_rpb=False) != LAYER


def test_float64_reference_matches_reference() -> None:
    qkv, rpb = torch.randn(2, 9, 8, 3, 3, 4), torch.randn(3, 5, 5)
    expected = BACKENDS["reference"](*(x.double() for x in qkv.unbind(3)), rpb.double(), 3, 2, 0.5, 0.0)
    torch.testing.assert_close(float64_reference(qkv, rpb, 3, 2, 0.5), expected)


def attend_with_error(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
    """Run tiled, or "imprecise", whose error grows with the bias."""
    assert rpb is not None
    output = BACKENDS["tiled"](q, k, v, rpb, 7, 1, 1.0, 0.0)
    return output * (1 + 1e-6 * rpb.abs().max()) if name == "imprecise" else output


def test_every_layer_of_a_shape_checks_the_selection_with_its_own_bias_table() -> None:
    layer, small, large = LayerKey.of(Q, 7, 1, 1.0), torch.ones(1, 13, 13), 100 * torch.ones(1, 13, 13)
    with autotuning():
        assert select_backend(layer, ["imprecise"], attend_with_error, Q, K, V, small) == "imprecise"
        assert select_backend(layer, ["imprecise"], attend_with_error, Q, K, V, large) == "tiled"
        assert select_backend(layer, ["imprecise"], attend_with_error, Q, K, V, small) == "tiled"
    assert "relative error 0.0001 exceeds" in autotune.selections[layer].disabled["imprecise"]


def test_weights_created_later_are_checked_too() -> None:
    """Weights that were freed would leave their address to those created next."""
    layer = LayerKey.of(Q, 7, 1, 1.0)
    with autotuning():
        for factor in (1.0, 100.0):
            selected = select_backend(layer, ["imprecise"], attend_with_error, Q, K, V, torch.full((1, 13, 13), factor))
    assert selected == "tiled"


def test_selection_does_not_change_the_global_random_generator() -> None:
    before = torch.get_rng_state()
    tune("reference", "tiled")
    assert torch.equal(torch.get_rng_state(), before)


def test_disabled_candidates_are_tried_again_after_they_are_forgotten() -> None:
    assert tune("absent", "tiled").disabled.keys() == {"absent"}
    autotune.selections[LayerKey.of(Q, 7, 3, 1.0)] = Selection("tiled")
    autotune.forget_disabled("cuda:0")
    assert len(autotune.selections) == 2
    autotune.forget_disabled("cpu")
    assert list(autotune.selections) == [LayerKey.of(Q, 7, 3, 1.0)]
    assert select_backend(LAYER, ["absent"], attend, Q, K, V, None) == "absent"


def test_batches_of_one_have_their_own_selection() -> None:
    single, several = (LayerKey.of(Q.expand(count, *Q.shape[1:]), 7, 1, 1.0, has_rpb=False) for count in (1, 2))
    autotune.selections[several] = Selection("tiled")
    assert select_backend(single, ["reference"], attend, Q, K, V, None) == "tiled"  # better than none
    with autotuning():
        assert select_backend(single, ["reference"], attend, Q, K, V, None) == "reference"
    assert select_backend(several, ["reference"], attend, Q, K, V, None) == "tiled"


def test_candidate_that_hangs_is_reported_and_disabled_in_later_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "TRIAL_SECONDS", 0.05)
    file, reported, reports = tmp_path / "selections.json", threading.Event(), []

    def report(what: str, is_stored: bool) -> None:
        reports.append((what, is_stored))
        reported.set()

    def hang(name: str, *tensors: Any) -> Tensor:
        assert name != "hanging" or reported.wait(30)
        return attend("tiled", *tensors)

    def tune_or_hang(attend: Attend, file: Path | None) -> Selection:
        autotune.selections.clear()
        with autotuning(file=file, on_hang=report):
            select_backend(LAYER, ["hanging", "tiled"], attend, Q, K, V, None)
        return autotune.selections[LAYER]

    tune_or_hang(hang, file)
    assert reports[0] == (f"attention hanging: it did not return within 0.05 s for {LAYER}", True)  # under load also others
    file.unlink()  # a process in which a candidate hangs does not write it
    selection = tune_or_hang(attend, file)  # which has no such backend
    assert selection.disabled["hanging"] == f"it did not return within 0.05 s for {LAYER}, at an earlier start"
    for unusable in (None, Path("/dev/null/selections.json")):
        reported.clear()
        reports.clear()
        tune_or_hang(hang, unusable)
        assert reports[0][1] is False
    hung_file(file).write_text("broken")
    assert read_hung(file) == {}
