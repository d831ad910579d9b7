"""Images of a batch, divided into shards. A shard is computed, written and resumed as a unit."""

import gzip
import hashlib
import lzma
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dinat.app.batch.storage import BatchError, File, find_files, open_file, open_filesystem
from dinat.app.errors import NoImage
from dinat.app.image_paths import SUFFIXES, Files, is_ignored, is_image, path_text
from dinat.app.plurals import plural

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content", "image_bytes")
"""Names of Parquet columns that are recognized as images, in order of preference."""

BUFFER_BYTES = 4 * 2**20
"""Bytes of a Parquet column to read at once. A whole row group of images may exceed the memory."""

ROWS_PER_READ = 64


@dataclass(frozen=True)
class Shard:
    """A part of a source.

    Attributes:
        number: Index of the shard in its source.
        files: Paths of its files.
        key: Hash of the names, sizes and modification times of its files, and of its rows.
        rows: Half-open range of rows, for a Parquet file.
        num_images: Number of images, if it is known without reading them.
    """

    number: int
    files: tuple[str, ...]
    key: str
    rows: tuple[int, int] | None = None
    num_images: int | None = None


@dataclass(frozen=True)
class Item:
    """An image.

    Attributes:
        path: Its name in the results.
        data: Its bytes, its file, or a function that reads it; None if the value is null.
        columns: Values of other columns to copy to the results.
    """

    path: str
    data: bytes | Path | Callable[[], bytes] | None
    columns: Mapping[str, Any] = field(default_factory=dict)


DAMAGE = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""Errors that a damaged tar file causes; others are of the storage."""


class _Member(tarfile.TarInfo):
    """A member of a tar file. A header that is cut short is an error; tarfile takes it for the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """See TarInfo."""
        try:
            return super().fromtarfile(tar)
        except tarfile.TruncatedHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("unexpected end of data") from None


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Callable[[], bytes]:
    """Read a member. One that is no file, such as a hard link, which has no data, becomes an error."""
    file = tar.extractfile(member) if member.isfile() else None
    if file is not None:
        return file.read()
    kind = f"a link to {path_text(member.linkname)}" if member.islnk() or member.issym() else "a special file"
    return partial(_raise, NoImage(f"there is no image: the member is {kind}"))


def _raise(error: Exception) -> bytes:
    raise error


class Source(ABC):
    """Images in a folder or file.

    Attributes:
        filesystem: A pyarrow file system.
        folder: Path in it.
        files: Files, sorted by path.
        skipped: Number of files in the folder that are not part of the source, by kind.
    """

    def __init__(self, filesystem: Any, folder: str, files: Sequence[File]) -> None:
        self.filesystem, self.folder, self.files = filesystem, folder, files
        self.skipped: Counter[str] = Counter()

    @abstractmethod
    def shards(self, shard_size: int) -> list[Shard]:
        """Divide the source into shards, in a deterministic order.

        Args:
            shard_size: Images per shard, where the source can be divided freely.
        """

    @abstractmethod
    def items(self, shard: Shard) -> Iterator[Item]:
        """Yield the images of a shard, in order, reading as it goes.

        Raises:
            OSError, BatchError: Reading failed.
        """

    def copied_fields(self) -> list[pa.Field]:
        """Columns to copy to the results."""
        return []

    def name(self, path: str) -> str:
        """Return a file's path relative to the source's folder."""
        return path_text(path[len(self.folder) :].lstrip("/"))

    def shard(
        self, number: int, files: Sequence[File], num_images: int | None = None, rows: tuple[int, int] | None = None
    ) -> Shard:
        """Create a shard of these files."""
        parts = [(self.name(info.path), info.size, info.mtime_ns) for info in files]
        key = hashlib.sha256(repr((parts, rows)).encode()).hexdigest()[:12]
        return Shard(number, tuple(info.path for info in files), key, rows, num_images)


class ImageFiles(Source):
    """Image files, at any depth of a folder."""

    def shards(self, shard_size: int) -> list[Shard]:
        """See Source."""
        groups = [self.files[start : start + shard_size] for start in range(0, len(self.files), shard_size)]
        return [self.shard(number, group, len(group)) for number, group in enumerate(groups)]

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source."""
        is_local = isinstance(self.filesystem, fs.LocalFileSystem)
        for path in shard.files:
            yield Item(self.name(path), Path(path) if is_local else partial(self._read, path))

    def _read(self, path: str) -> bytes:
        with open_file(self.filesystem, path) as stream:
            data: bytes = stream.read()
        return data


class TarFiles(Source):
    """Image members of WebDataset tar files."""

    def shards(self, shard_size: int) -> list[Shard]:
        """See Source. Each file is a shard."""
        return [self.shard(number, [info]) for number, info in enumerate(self.files)]

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source. What can be read of a damaged file is used, and its end becomes a row with an error."""
        (path,) = shard.files
        is_readable = False
        try:
            with (
                open_file(self.filesystem, path) as stream,
                tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar,
            ):
                for member in tar:
                    if member.isdir() or not is_image(member.name) or is_ignored(member.name):
                        continue
                    yield Item(f"{self.name(path)}/{path_text(member.name.removeprefix('./'))}", _member_bytes(tar, member))
                    is_readable = True
        except (*DAMAGE, OSError) as error:
            message = f"{path_text(path)} is not a complete tar file: {error}"
            if not is_readable or not isinstance(error, DAMAGE):
                raise BatchError(message) from None
            yield Item(self.name(path), partial(_raise, NoImage(message)))


class ParquetFiles(Source):
    """Parquet files with a column of encoded images: binary, or Hugging Face's struct of bytes and path.

    Args:
        column: Name of the image column; detected if None.
        keep: Names of columns to copy to the results.

    Raises:
        BatchError: No file is Parquet, or the first has no such column.
    """

    def __init__(self, filesystem: Any, folder: str, files: Sequence[File], column: str | None, keep: Sequence[str]) -> None:
        super().__init__(filesystem, folder, files)
        file, schema = self._first_schema()
        self.column = column or _image_column(schema)
        unknown = [name for name in (self.column, *keep) if name not in schema.names]
        if unknown:
            raise BatchError(f"{file} has no column {', '.join(unknown)}: its columns are {', '.join(schema.names)}")
        if not _holds_bytes(schema.field(self.column).type):
            raise BatchError(f"the column {self.column} holds {schema.field(self.column).type}, not encoded images")
        self.keep = [schema.field(name) for name in keep]

    def copied_fields(self) -> list[pa.Field]:
        """See Source."""
        return self.keep

    def shards(self, shard_size: int) -> list[Shard]:
        """See Source. A shard has whole row groups. A damaged file is a shard, which fails."""
        shards: list[Shard] = []
        for info in self.files:
            try:
                metadata = self._open(info.path).metadata
            except BatchError:
                shards.append(self.shard(len(shards), [info]))
                continue
            first = last = 0
            for group in range(metadata.num_row_groups):
                last += metadata.row_group(group).num_rows
                if last - first >= shard_size or group == metadata.num_row_groups - 1:
                    shards.append(self.shard(len(shards), [info], last - first, (first, last)))
                    first = last
        return shards

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source."""
        (path,) = shard.files
        file = self._open(path)
        assert shard.rows is not None  # a file that cannot be opened has no rows
        row, end = shard.rows
        keep = [column.name for column in self.keep]
        columns = list(dict.fromkeys([self.column, *keep]))
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise BatchError(f"{path} has no column {', '.join(missing)}")
        try:
            first_row, groups = 0, []
            for group in range(file.metadata.num_row_groups):
                if row <= first_row < end:
                    groups.append(group)
                first_row += file.metadata.row_group(group).num_rows
            for batch in file.iter_batches(ROWS_PER_READ, row_groups=groups, columns=columns):
                copied = batch.select(keep).to_pylist()
                for image, values in zip(batch.column(self.column), copied, strict=True):
                    yield Item(f"{self.name(path)}/{row}", _image_data(image.as_py()), values)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise BatchError(f"{path} cannot be read: {error}") from None

    def _first_schema(self) -> tuple[str, pa.Schema]:
        """Return the first file that can be opened, and its schema."""
        for info in self.files[:-1]:
            with suppress(BatchError):
                return info.path, self._open(info.path).schema_arrow
        return self.files[-1].path, self._open(self.files[-1].path).schema_arrow

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(open_file(self.filesystem, path), buffer_size=BUFFER_BYTES)
        except pa.ArrowException as error:
            raise BatchError(f"{path_text(path)} is not a Parquet file: {error}") from None


def open_source(url: str, column: str | None = None, keep: Sequence[str] = ()) -> Source:
    """Open a folder, a file or a glob pattern, on disk or behind a URL.

    Args:
        url: A local path or a URL.
        column: See ParquetFiles; not allowed for other sources.
        keep: See ParquetFiles; not allowed for other sources.

    Raises:
        BatchError: There are no images, images of more than one kind, or an argument is invalid.
    """
    filesystem, path = open_filesystem(url)
    folder, files, skipped = find_files(filesystem, path)
    by_type: dict[type[Source], list[File]] = {ImageFiles: [], TarFiles: [], ParquetFiles: []}
    others: list[str] = []
    for file in files:
        source_type = _source_type(file.name.lower())
        if source_type is None:
            others.append(file.path)
        else:
            by_type[source_type].append(file)
    skipped = skipped + Files(others).images().skipped
    present = {source_type: infos for source_type, infos in by_type.items() if infos}
    if not present:
        supported = ", ".join((*SUFFIXES, *TAR_SUFFIXES, ".parquet"))
        raise BatchError(f"{url} {'has no image' if files else 'does not exist or is empty'}: supported are {supported}")
    if len(present) > 1:
        counts = " and ".join(f"{plural(len(infos), 'file')} such as {infos[0].name}" for infos in present.values())
        raise BatchError(f"{url} has {counts}: select one kind by a pattern, such as '{url.rstrip('/')}/*.tar'")
    ((source_type, infos),) = present.items()
    source: Source
    if source_type is ParquetFiles:
        source = ParquetFiles(filesystem, folder, infos, column, keep)
    elif column or keep:
        raise BatchError(f"--column and --keep require Parquet files; {url} has {infos[0].name}")
    else:
        source = source_type(filesystem, folder, infos)
    source.skipped = skipped
    return source


def _source_type(name: str) -> type[Source] | None:
    if name.endswith(".parquet"):
        return ParquetFiles
    return TarFiles if name.endswith(TAR_SUFFIXES) else ImageFiles if is_image(name) else None


def _holds_bytes(data_type: pa.DataType) -> bool:
    """Whether values of an Arrow type are bytes, in any of its layouts, or a struct with such a field named bytes."""
    if pa.types.is_struct(data_type):
        return any(data_type[n].name == "bytes" and _holds_bytes(data_type[n].type) for n in range(data_type.num_fields))
    if pa.types.is_dictionary(data_type):
        return _holds_bytes(data_type.value_type)
    if isinstance(data_type, pa.BaseExtensionType):
        return _holds_bytes(data_type.storage_type)
    layouts = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pa.types, layout, lambda _: False)(data_type) for layout in layouts)  # views are new in pyarrow 16


def _image_column(schema: pa.Schema) -> str:
    candidates = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    if not candidates:
        types = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise BatchError(f"no column holds encoded images, as binary or a struct with bytes: its columns are {types}")
    recognized = [name for name in IMAGE_COLUMNS if name in candidates]
    if len(candidates) != 1 and not recognized:
        raise BatchError(f"the image column cannot be detected: set --column to one of {', '.join(candidates)}")
    return recognized[0] if recognized else candidates[0]


def _image_data(value: Any) -> bytes | Callable[[], bytes] | None:
    """Return the bytes of a value; for one that has a path alone a function that raises an error."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return partial(_raise, NoImage(f"there is no image: the value has only the path {path_text(value['path'])}, no bytes"))
    return data if data is None else bytes(data)
