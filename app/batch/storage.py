"""Files and folders on disk or behind a URL: s3://, gs:// and every scheme of fsspec."""

import fnmatch
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dinat.app.image_paths import is_ignored, list_files, pattern_folder
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


@dataclass(frozen=True)
class File:
    """A file.

    Attributes:
        path: Its path in the file system.
        size: Bytes.
        mtime_ns: Time of the last modification, if it is known.
    """

    path: str
    size: int
    mtime_ns: int | None

    @property
    def name(self) -> str:
        """The path without folders."""
        return self.path.rpartition("/")[2]


def find_files(filesystem: Any, path: str) -> tuple[str, list[File], Counter[str]]:
    """List files: the file at this path, all files in the folder at this path, or the matches of a pattern.

    Those on disk are listed as by all commands, see dinat.app.image_paths. Elsewhere only the last part may be a pattern.

    Returns:
        The folder, the files sorted by path, and the number of skipped ones by kind.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        try:
            local = list_files(path)
        except FileNotFoundError:
            return path, [], Counter()
        files = [_local_file(file_path) for file_path in local.paths]
        return path if os.path.isdir(path) else pattern_folder(path), files, local.skipped
    folder, _, last = path.rpartition("/")
    (info,) = filesystem.get_file_info([path])
    if info.type == fs.FileType.File:
        return folder, [_remote_file(info)], Counter()
    if info.type == fs.FileType.NotFound and any(mark in last for mark in "*?["):
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        found = [info for info in entries if fnmatch.fnmatch(info.base_name, last) and not is_ignored(info.base_name)]
    else:
        folder = path
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
        found = [info for info in entries if not is_ignored(info.path[len(folder) :].lstrip("/"))]
    files = [_remote_file(info) for info in found if info.type == fs.FileType.File]
    return folder, sorted(files, key=lambda file: file.path), Counter()


def _local_file(path: str) -> File:
    status = os.stat(path)
    return File(path, status.st_size, status.st_mtime_ns)


def _remote_file(info: Any) -> File:
    return File(info.path, info.size, info.mtime_ns)


def open_file(filesystem: Any, path: str) -> Any:
    """Open a file for reading, without decompression. The name of one on disk may have any encoding."""
    if isinstance(filesystem, fs.LocalFileSystem):
        return pa.OSFile(os.fsencode(path))
    return filesystem.open_input_file(path)
