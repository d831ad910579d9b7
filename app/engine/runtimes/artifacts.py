"""Cache on disk of what is built from a checkpoint, such as exported graphs, keyed by a digest of its inputs."""

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from dinat import model
from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.writing import writing


def cached_artifact(cache: Path, key: str, build: Callable[[Path], object]) -> Path:
    """The folder cache/key, built if it is missing.

    The folder appears complete or not at all: it is built under a temporary name and then renamed. If two processes build it
    at once, the first to finish wins.

    Args:
        cache: Parent folder, created if it is missing.
        key: Name of the folder: a digest of what its contents depend on.
        build: Writes the contents into the empty folder that it gets.
    """
    folder = cache / key
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
        try:
            with writing(folder):
                build(temporary)
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def run_in_subprocess(call: Callable[..., object], *arguments: object) -> None:
    """Call a module-level function in a process of its own, which returns its memory on exit. Raises what the call raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(call, *arguments).result()


def digest(*parts: object) -> str:
    """A digest of these parts: of the bytes themselves, of the repr of anything else."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(f"{len(data)}:".encode() + data)
    return hashed.hexdigest()[:32]


def checkpoint_digest(checkpoint: Checkpoint, *packages: str) -> str:
    """A digest of what determines an exported graph: weights, configuration, the network's code, and package versions."""
    weights = []
    for path in checkpoint.weights():
        with path.open("rb") as file:
            weights.append(hashlib.file_digest(file, "sha256").digest())
    code = [path.read_bytes() for path in sorted(Path(model.__file__).parent.rglob("*.py"))]
    return digest(*weights, checkpoint.config.to_dict(), *code, *(f"{name} {version(name)}" for name in packages))
