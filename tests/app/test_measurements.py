"""Rates are measured in turns."""

from typing import Any

import pytest

from dinat.app import measurements


class RecordingRuntime:
    """Records the order in which runtimes compute."""

    def __init__(self, batches: list[str], name: str) -> None:
        self._batches, self.name = batches, name

    def run(self, pixels: Any, options: Any) -> Any:
        self._batches.append(self.name)


def test_rates_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[str] = []
    monkeypatch.setattr(measurements, "SECONDS", 0)
    runtimes: list[Any] = [RecordingRuntime(batches, name) for name in "ab"]
    warm = [measurements.WarmRuntime(runtime, range(4)) for runtime in runtimes]
    first, second = measurements.forward_rates(warm)
    assert batches == ["a", "b"] * measurements.ROUNDS
    assert len(first) == len(second) == measurements.ROUNDS
    assert measurements.spread([3.0, 1.0, 2.0]) == {"images/s": 2.0, "lowest": 1.0, "highest": 3.0}
