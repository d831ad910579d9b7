"""`dinat doctor` on the stand-in, with a small network in the place of a published one."""

import json
import sys

import pytest

from dinat.app import doctor
from dinat.app.cli import main
from dinat.model import attention
from tests.app.test_doctor import small  # noqa: F401
from tests.rehearsal import clocks

SERVER = "import tests.rehearsal.plugin; from dinat.app.cli import main; raise SystemExit(main({!r}))"


@pytest.fixture(autouse=True)
def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ceilings, and a service that sees the stand-in too."""
    for numbers in (doctor.COPIED, doctor.SIDE, doctor.BATCH):
        monkeypatch.setitem(numbers, "cuda", 2)
    popen = doctor.subprocess.Popen
    monkeypatch.setattr(
        doctor.subprocess,
        "Popen",
        lambda words, **more: popen([sys.executable, "-c", SERVER.format([*words[3:], "--max-batch", "2"])], **more),
    )
    default = doctor.TorchRuntime.__init__

    def small_batches(self: doctor.TorchRuntime, *args: object, **kwargs: object) -> None:
        default(self, *args, **kwargs)  # type: ignore[arg-type]
        self.default_batch = 2

    monkeypatch.setattr(doctor.TorchRuntime, "__init__", small_batches)


def test_a_card_is_examined_and_found_sound(capsys: pytest.CaptureFixture[str]) -> None:
    with clocks.one_host():
        assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["devices"]] == ["stand-in card"]
    assert {row["backend"].partition(" ")[0] for row in report["attention"]} == {"triton", "natten", "tiled"}
    assert {row["precision"] for row in report["attention"]} == {"bfloat16", "float32"}
    assert all(row["error"] <= 1e-2 and row["us"] > 0 for row in report["attention"])
    assert [row["images/s"] > 0 for row in report["rates"]] == [True] * 3


def test_where_the_service_is_not_installed_the_rest_is_examined(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "structlog", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with clocks.one_host():
        assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["rates"]) == 2
    assert report["missing"][-1] == {"what": "the service (uvicorn is not installed)", "command": "pip install dinat-serve"}


def test_a_card_that_lies_ends_in_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.BACKENDS["triton"]
    monkeypatch.setitem(attention.BACKENDS, "triton", lambda *args, **kwargs: true(*args, **kwargs) * 1.05)
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    with clocks.one_host():
        assert main(["doctor"]) == 1
    assert "problem: attention triton" in capsys.readouterr().out
