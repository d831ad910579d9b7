import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.export import export
from dinat.model.writing import writing

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 58048 vs 57972"),
    ],
)
def test_full_disk_names_the_file(error: Exception) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/data/x'") as raised, writing("/data/x"):
        raise error
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/data/x")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/other"),  # names a file itself
        OSError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while serializing: invalid"),
        RuntimeError("another reason"),
    ],
)
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writing("/data/x"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("config.json", lambda folder: DinatConfig.preset("mini").save_pretrained(folder)),
        ("preprocessor_config.json", lambda folder: DinatImageProcessor().save_pretrained(folder)),
    ],
)
def test_files_of_a_checkpoint_on_a_full_disk(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(FULL)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / name}'"):
        write(tmp_path)


@pytest.mark.slow
@pytest.mark.export
def test_torch_export_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own writer aborts the process."""
    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: original(FULL if path.suffix == ".pt2" else path, data))
    network = DinatForImageClassification.from_pretrained("digits")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x.pt2'}'"):
        export(network, DinatImageProcessor.from_pretrained("digits"), tmp_path / "x.pt2", "torch-export", batch=1)
    assert not list(tmp_path.iterdir())
