"""Files and folders on disk or behind a URL: s3://, gs:// and every scheme of fsspec."""

import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dinat.model import DinatError

NATIVE_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
"""URL schemes that pyarrow reads by itself; fsspec reads all others, such as hf://."""


class BatchError(DinatError):
    """A batch that cannot run, or a shard that failed."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """Open a file system.

    Args:
        url: A local path or a URL.

    Returns:
        A pyarrow file system, and the path in it.

    Raises:
        BatchError: The URL cannot be opened.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(Path(url).absolute())
    try:
        if scheme in NATIVE_SCHEMES:
            filesystem, path = fs.FileSystem.from_uri(url)
        else:
            import fsspec

            fsspec_filesystem, path = fsspec.core.url_to_fs(url)
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec_filesystem))
    except (pa.ArrowException, ValueError, ImportError, OSError) as error:
        raise BatchError(f"{url} cannot be opened: {error}") from None
    return filesystem, path.rstrip("/")


def list_files(filesystem: Any, path: str) -> tuple[str, list[Any]]:
    """List files: the file at this path, all files in the folder at this path, or the matches of a glob pattern.

    Returns:
        The folder, and pyarrow FileInfo objects sorted by path. A folder is searched at any depth, except for files and folders
        whose names begin with a dot.
    """
    folder, _, last = path.rpartition("/")
    if any(mark in last for mark in "*?["):
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        found = [info for info in entries if fnmatch.fnmatch(info.base_name, last)]
    else:
        (info,) = filesystem.get_file_info([path])
        if info.type == fs.FileType.File:
            return folder, [info]
        folder = path
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
        found = [info for info in entries if "/." not in info.path[len(folder) :]]
    return folder, sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.path)
