"""Folders and files, wherever they are: on disk, or behind a URL (s3://, gs://, and whatever fsspec knows)."""

import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dinat.model import DinatError

NATIVE = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
"""What pyarrow reads by itself; fsspec is asked for all else, hf:// among it."""


class BatchError(DinatError):
    """A batch that cannot be computed as it was asked for."""


def open_place(where: str) -> tuple[Any, str]:
    """A pyarrow file system, and a path in it. Raises BatchError."""
    scheme, separator, _ = where.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(Path(where).absolute())
    try:
        if scheme in NATIVE:
            system, path = fs.FileSystem.from_uri(where)
        else:
            import fsspec

            other, path = fsspec.core.url_to_fs(where)
            system = fs.PyFileSystem(fs.FSSpecHandler(other))
    except (pa.ArrowException, ValueError, ImportError, OSError) as error:
        raise BatchError(f"{where} cannot be opened: {error}") from None
    return system, path.rstrip("/")


def files_in(system: Any, path: str) -> tuple[str, list[Any]]:
    """A folder and files in it: the file of that path; all in the folder of that path; or those that it matches, as a pattern.

    pyarrow's FileInfo, sorted by path; of a folder at any depth, without what has a name, or is in a folder, that begins with a
    dot.
    """
    folder, _, last = path.rpartition("/")
    if any(mark in last for mark in "*?["):
        there = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        found = [info for info in there if fnmatch.fnmatch(info.base_name, last)]
    else:
        (info,) = system.get_file_info([path])
        if info.type == fs.FileType.File:
            return folder, [info]
        folder = path
        there = system.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
        found = [info for info in there if "/." not in info.path[len(folder) :]]
    return folder, sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.path)
