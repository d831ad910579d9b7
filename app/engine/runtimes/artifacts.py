"""What is made once from a checkpoint and kept on disk, by what it is made of."""

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


def artifact(cache: Path, key: str, make: Callable[[Path], object]) -> Path:
    """The folder cache/key. Where it is missing, `make` fills a folder beside it, which then takes its place.

    So it is there whole or not at all, also when two processes make it at once: the first to finish wins.
    """
    folder = cache / key
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
        try:
            make(made)
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def in_own_process(call: Callable[..., object], *arguments: object) -> None:
    """Call a module's function in a process that ends with it and gives back the memory it took. Raises what it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(call, *arguments).result()


def digest(*parts: object) -> str:
    """A name for what is made of these parts; they are told apart by repr, or by content where they are bytes."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(f"{len(data)}:".encode() + data)
    return hashed.hexdigest()[:32]


def digest_of(checkpoint: Checkpoint, *packages: str) -> str:
    """A name for what a checkpoint's graph is made of: its weights and configuration, this project's network, the packages."""
    with checkpoint.weights().open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").digest()
    code = [path.read_bytes() for path in sorted(Path(model.__file__).parent.rglob("*.py"))]
    return digest(weights, checkpoint.config.to_dict(), *code, *(f"{name} {version(name)}" for name in packages))
