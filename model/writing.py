"""Errors of writing files to a disk that is full, which most libraries raise without the name of the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise an OSError with this path if the disk becomes full, unless the error names a file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error) or getattr(error, "filename", None) is not None:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def is_disk_full(error: BaseException) -> bool:
    """Return whether writing failed for lack of space. PyTorch's errors have no errno, but may follow one that has."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
