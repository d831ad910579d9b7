"""Check before a training that all images can be read. Results are cached."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dinat.app.errors import ServiceError
from dinat.app.evaluation.duplicates import digest
from dinat.app.evaluation.labelled_images import LabelledImage
from dinat.app.host import cores
from dinat.app.images import decode, read_file


@dataclass(frozen=True)
class CheckedImages:
    """Images that were decoded, now or before.

    Attributes:
        failed: The reason for each image that cannot be read.
        digests: Hash of each other file, see digest.
    """

    failed: dict[Path, str]
    digests: dict[Path, str]


def check_images(images: Iterable[LabelledImage], max_pixels: int, cache: Path) -> CheckedImages:
    """Decode images.

    Args:
        images: The images.
        max_pixels: Largest image, width times height.
        cache: File with the images that were decoded before. An image is decoded again when its size or time has changed.
    """
    paths = sorted({image.path for image in images})
    known = _read(cache)
    keys = {path: key for path in paths if (key := _key(path, max_pixels)) is not None}
    digests = {path: known[key] for path, key in keys.items() if key in known}
    failed = {}
    unknown = [path for path in paths if path not in digests]
    with ThreadPoolExecutor(cores()) as pool:
        for path, result in zip(unknown, pool.map(lambda path: _check(path, max_pixels), unknown), strict=True):
            if isinstance(result, ServiceError):
                failed[path] = result.detail
            else:
                digests[path] = result
    if len(failed) < len(unknown):
        _write(cache, {keys[path]: value for path, value in digests.items() if path in keys})
    return CheckedImages(failed, digests)


def cache_file(folder: Path, data: Path) -> Path:
    """Return the cache file for a data set."""
    return folder / "training-images" / f"{hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]}.txt"


def _check(path: Path, max_pixels: int) -> str | ServiceError:
    """Decode an image. Returns the hash of its file, or the error."""
    try:
        data = read_file(path)
        decode(data, max_pixels)
    except ServiceError as error:
        return error
    return digest(data)


def _key(path: Path, max_pixels: int) -> str | None:
    """Hash what identifies a file's contents, or return None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    parts = (os.fsencode(path.resolve()), status.st_size, status.st_mtime_ns, max_pixels)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _read(cache: Path) -> dict[str, str]:
    """Read the cache file: the hash of each file by its key."""
    try:
        lines = [line.split() for line in cache.read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    return {words[0]: words[1] for words in lines if len(words) == 2}


def _write(cache: Path, known: Mapping[str, str]) -> None:
    """Write the cache file. Without it, images are decoded again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(f"{key} {value}\n" for key, value in sorted(known.items())))
        os.replace(temporary, cache)
    except OSError:
        return
