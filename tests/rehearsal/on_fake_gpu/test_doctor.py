"""`dinat doctor` on the fake GPU, with a small network in place of a published one."""

import json
import sys

import pytest

from dinat.app import doctor, measurements
from dinat.app.cli import main
from dinat.model import attention
from tests.app.test_doctor import small  # noqa: F401
from tests.rehearsal.fake_gpu import clocks

SERVER = "import tests.rehearsal.plugin; from dinat.app.cli import main; raise SystemExit(main({!r}))"


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with small tensors and batches, and install the fake GPU in the service's process too."""
    for numbers in (measurements.COPIED, measurements.SIDE, measurements.BATCH):
        monkeypatch.setitem(numbers, "cuda", 2)
    popen = measurements.subprocess.Popen
    monkeypatch.setattr(
        measurements.subprocess,
        "Popen",
        lambda words, **kwargs: popen([sys.executable, "-c", SERVER.format([*words[3:], "--max-batch", "2"])], **kwargs),
    )
    default = measurements.TorchRuntime.__init__

    def small_batches(self: measurements.TorchRuntime, *args: object, **kwargs: object) -> None:
        default(self, *args, **kwargs)  # type: ignore[arg-type]
        self.default_batch = 2

    monkeypatch.setattr(measurements.TorchRuntime, "__init__", small_batches)


def test_doctor_reports_a_correct_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with clocks.single_host_thread():
        assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["devices"]] == ["Fake GPU"]
    assert {row["backend"].partition(" ")[0] for row in report["attention"]} == {"triton", "natten", "tiled"}
    assert {row["precision"] for row in report["attention"]} == {"bfloat16", "float32"}
    assert all(row["error"] <= 1e-2 and row["us"] > 0 for row in report["attention"])
    assert [row["images/s"] > 0 for row in report["rates"]] == [True] * 3


def test_doctor_runs_without_the_dependencies_of_the_service(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "structlog", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with clocks.single_host_thread():
        assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["rates"]) == 2
    assert report["missing"][-1] == {"what": "the service (uvicorn is not installed)", "command": "pip install dinat-serve"}


def test_doctor_exits_with_1_if_a_backend_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    correct = attention.BACKENDS["triton"]
    monkeypatch.setitem(attention.BACKENDS, "triton", lambda *args, **kwargs: correct(*args, **kwargs) * 1.05)
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    with clocks.single_host_thread():
        assert main(["doctor"]) == 1
    assert "problem: attention triton" in capsys.readouterr().out
