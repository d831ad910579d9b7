"""Image files on disk: which names are images, which are ignored, and what folders and patterns contain."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dinat.app.plurals import plural

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"),
)
"""Suffixes, in lower case, of the files that are treated as images when a folder is searched."""

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
"""Folders of macOS's archives, of network storage and of Windows, which hold metadata, thumbnails and deleted files."""

_PATTERN = "*?["

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MAX_DESCRIBED_KINDS = 5


@dataclass(frozen=True)
class Files:
    """Files that were found.

    Attributes:
        paths: Their paths, sorted.
        skipped: Number of skipped files by kind: the suffix, or why they cannot be used.
    """

    paths: Sequence[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def images(self) -> "Files":
        """Return the files that are images by their names. The others are skipped."""
        others = Counter(_kind(path) for path in self.paths if not is_image(path))
        return Files([path for path in self.paths if is_image(path)], self.skipped + others)


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES)


def is_ignored(path: str) -> bool:
    """Whether a relative path is hidden (.DS_Store, ._1.jpg, .cache/1.jpg) or in a folder of the system (__MACOSX)."""
    return any(_is_ignored_name(part) for part in path.replace(os.sep, "/").split("/"))


def _is_ignored_name(name: str) -> bool:
    return name in _SYSTEM_FOLDERS or (name.startswith(".") and name not in (".", ".."))


def path_text(path: str | Path) -> str:
    r"""Return a path as text of any encoding: bytes of a name that are not UTF-8 become escapes such as \udce9."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def list_files(location: str) -> Files:
    r"""List the file at this path, all files in the folder at this path, or the files that match a pattern.

    Folders are searched at any depth, without ignored names. Symbolic links are followed, except to a folder that contains
    them. Each part of a pattern is first taken literally, then as a pattern (\*, ?, [...]; \*\* for folders at any depth).

    Args:
        location: A path or a pattern.

    Raises:
        FileNotFoundError: There is no such file or folder, and the pattern matches nothing.
    """
    if os.path.isfile(location):
        return Files([location])
    skipped: Counter[str] = Counter()
    if os.path.isdir(location):
        return Files(sorted(_files_in(location, skipped)), skipped)
    matches = list(_expand(location, skipped)) if any(mark in location for mark in _PATTERN) else []
    if not matches:
        raise FileNotFoundError(_describe_missing(location))
    return Files(sorted({path for path in matches if _is_file(path, skipped)}), skipped)


def _describe_missing(location: str) -> str:
    """Say why there is no file: a path that does not exist, or one of another kind."""
    skipped: Counter[str] = Counter()
    if os.path.lexists(location) and not _is_file(location, skipped):
        return f"{path_text(location)} is a {next(iter(skipped))}, not a file or folder"
    if URL.match(location):
        return f"{path_text(location)} is a URL: use paths of files; dinat batch reads s3://, gs:// and other file systems"
    return f"{path_text(location) or 'an empty path'} does not exist"


def pattern_folder(location: str) -> str:
    """Return the folder of a path, without the parts that are a pattern."""
    folder, name = os.path.split(location)
    while name and any(mark in folder for mark in _PATTERN) and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    return folder


def subfolders(folder: str) -> list[str]:
    """Return the names of a folder's subfolders, sorted, without ignored ones."""
    return _entries(folder, Counter())[0]


def describe_skipped(skipped: Counter[str]) -> str:
    """Return a sentence about skipped files, the most frequent kinds first; empty if there are none."""
    if not skipped:
        return ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common(MAX_DESCRIBED_KINDS))
    others = len(skipped) - MAX_DESCRIBED_KINDS
    more = f" and {plural(others, 'more kind')}" if others > 0 else ""
    return f"{plural(skipped.total(), 'file is', 'files are')} skipped: {kinds}{more}"


def _files_in(folder: str, skipped: Counter[str]) -> Iterator[str]:
    for path, names in _walk(folder, skipped):
        yield from (os.path.join(path, name) for name in names)


def _walk(folder: str, skipped: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and its subfolders at any depth, each with the names of its files."""
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while stack:
        path, ancestors = stack.pop()
        try:
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if identity in ancestors:  # a link to a folder that contains it
                continue
            folders, files = _entries(path, skipped)
        except OSError as error:
            if path == folder:
                raise
            skipped[f"folder that cannot be read ({error.strerror})"] += 1
            continue
        yield path, files
        stack += [(os.path.join(path, name), ancestors | {identity}) for name in reversed(folders)]


def _entries(folder: str, skipped: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the names of subfolders and of files, sorted."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_ignored_name(entry.name):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif _is_file(entry.path, skipped, entry.is_file()):
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _is_file(path: str, skipped: Counter[str], is_file: bool | None = None) -> bool:
    """Whether a path is a file. A broken link, or a device, is counted as skipped."""
    if os.path.isfile(path) if is_file is None else is_file:
        return True
    if not os.path.isdir(path):
        skipped["broken link" if os.path.islink(path) else "special file"] += 1
    return False


def _expand(pattern: str, skipped: Counter[str]) -> Iterable[str]:
    """Return the paths that match a pattern."""
    path = Path(pattern)
    paths, parts = [path.anchor], path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if part == "**":
            if number == len(parts) - 1:
                return [file for folder in paths for file in _files_in(folder or ".", skipped)]
            paths = [subfolder for folder in paths for subfolder, _ in _walk(folder or ".", skipped)]
        else:
            paths = [match for folder in paths for match in _matches(folder, part)]
    return paths


def _matches(folder: str, part: str) -> list[str]:
    exact = os.path.join(folder, part)
    if os.path.lexists(exact):
        return [exact]
    if not os.path.isdir(folder or ".") or not any(mark in part for mark in _PATTERN):
        return []
    names = fnmatch.filter(os.listdir(folder or "."), part)
    return [os.path.join(folder, name) for name in names if part.startswith(".") or not _is_ignored_name(name)]


def _kind(path: str) -> str:
    return path_text(os.path.splitext(path)[1].lower()) or "without a suffix"
