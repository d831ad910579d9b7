from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.settings import Settings
from dinat.model import DinatForImageClassification, DinatImageProcessor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("device", "cuda", "warnings"), [("auto", "13.0", 1), ("cpu", "13.0", 0), ("auto", None, 0)])
def test_build_for_cuda_without_a_gpu_is_one_warning(
    device: str, cuda: str | None, warnings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with capture_logs() as events:
        load_runtimes(Settings(_env_file=None, device=device, runtime="torch"))
    assert [event["log_level"] for event in events if "no GPU was found" in event["event"]] == ["warning"] * warnings


def test_folder_without_preprocessor_config_is_reported(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    settings = Settings(_env_file=None, model=str(tmp_path), device="cpu", runtime="torch")
    with capture_logs() as events:
        load_runtimes(settings)
    assert ["no preprocessor_config.json" in event["event"] for event in events] == [True]
    DinatImageProcessor.from_pretrained("digits").save_pretrained(tmp_path)
    with capture_logs() as events:
        load_runtimes(settings)
    assert not events
