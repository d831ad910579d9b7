"""Check before a training that all images can be read. Results are cached."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dinat.app.errors import ServiceError
from dinat.app.evaluation.labelled_images import LabelledImage
from dinat.app.host import cores
from dinat.app.images import decode


def unreadable_images(images: Iterable[LabelledImage], max_pixels: int, cache: Path) -> dict[Path, str]:
    """Decode images.

    Args:
        images: The images.
        max_pixels: Largest image, width times height.
        cache: File with the images that were decoded before. An image is decoded again when its size or time has changed.

    Returns:
        The reason for each image that cannot be read.
    """
    paths = sorted({image.path for image in images})
    try:
        known = set(cache.read_text().split())
    except OSError:
        known = set()
    keys = {path: key for path in paths if (key := _key(path, max_pixels)) is not None}
    unknown = [path for path in paths if keys.get(path) not in known]
    with ThreadPoolExecutor(cores()) as pool:
        reasons = {
            path: reason for path, reason in zip(unknown, pool.map(lambda p: _reason(p, max_pixels), unknown), strict=True)
        }
    failed = {path: reason for path, reason in reasons.items() if reason is not None}
    if len(failed) < len(unknown):
        _write(cache, {key for path, key in keys.items() if path not in failed})
    return failed


def cache_file(folder: Path, data: Path) -> Path:
    """Return the cache file for a data set."""
    return folder / "training-images" / f"{hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]}.txt"


def _reason(path: Path, max_pixels: int) -> str | None:
    try:
        decode(path.read_bytes(), max_pixels)
    except ServiceError as error:
        return error.detail
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a name that no file can have, such as one with a NUL character
        return str(error)
    return None


def _key(path: Path, max_pixels: int) -> str | None:
    """Hash what identifies a file's contents, or return None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    parts = (os.fsencode(path.resolve()), status.st_size, status.st_mtime_ns, max_pixels)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _write(cache: Path, keys: Iterable[str]) -> None:
    """Write the cache file. Without it, images are decoded again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text("\n".join(sorted(keys)) + "\n")
        os.replace(temporary, cache)
    except OSError:
        return
