"""Where a batch's pictures are, cut into shards: what is computed, written and gone on with as one."""

import hashlib
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dinat.app.batch.storage import BatchError, files_in, open_place
from dinat.app.images import SUFFIXES

TARS = (".tar", ".tar.gz", ".tgz")

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content", "image_bytes")
"""Names under which a Parquet file's pictures are looked for."""

BUFFER_BYTES = 4 * 2**20
"""How much of a Parquet column is read at once: a whole row group of pictures may be more than there is memory."""


@dataclass(frozen=True)
class Shard:
    """Some pictures of a source.

    number: its place.  files: where they are.  key: differs where one of these is another, has another size, or was written at
    another time.  rows: of the one Parquet file, from and to.  pictures: how many, if that is known before they are read.
    """

    number: int
    files: tuple[str, ...]
    key: str
    rows: tuple[int, int] | None = None
    pictures: int | None = None


@dataclass(frozen=True)
class Item:
    """A picture. path: its name in the results.  data: its bytes, or its file, or who reads it, or None if it is missing.

    kept: what else of its row the results are to have.
    """

    path: str
    data: bytes | Path | Callable[[], bytes] | None
    kept: Mapping[str, Any] = field(default_factory=dict)


class Source(ABC):
    """Pictures in some place. files: pyarrow's FileInfo, in order."""

    def __init__(self, system: Any, folder: str, files: Sequence[Any]) -> None:
        self.system, self.folder, self.files = system, folder, files

    @abstractmethod
    def shards(self, pictures: int) -> list[Shard]:
        """All of it, in an order that is always the same. pictures: how many each may have, where that can be chosen."""

    @abstractmethod
    def items(self, shard: Shard) -> Iterator[Item]:
        """The pictures of a shard, in order. Reads as it goes; raises OSError and BatchError where that fails."""

    def kept_fields(self) -> list[pa.Field]:
        """Columns that the results take over."""
        return []

    def name(self, path: str) -> str:
        """A file's path from the source's folder on."""
        return path[len(self.folder) :].lstrip("/")

    def shard(
        self, number: int, files: Sequence[Any], pictures: int | None = None, rows: tuple[int, int] | None = None
    ) -> Shard:
        """A shard of these files."""
        parts = [(self.name(info.path), info.size, info.mtime_ns) for info in files]
        key = hashlib.sha256(repr((parts, rows)).encode()).hexdigest()[:12]
        return Shard(number, tuple(info.path for info in files), key, rows, pictures)


class Pictures(Source):
    """Files that are pictures, at any depth of a folder."""

    def shards(self, pictures: int) -> list[Shard]:
        """See Source."""
        groups = [self.files[at : at + pictures] for at in range(0, len(self.files), pictures)]
        return [self.shard(number, group, len(group)) for number, group in enumerate(groups)]

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source."""
        local = isinstance(self.system, fs.LocalFileSystem)
        for path in shard.files:
            yield Item(self.name(path), Path(path) if local else partial(self._read, path))

    def _read(self, path: str) -> bytes:
        with self.system.open_input_stream(path) as stream:
            data: bytes = stream.read()
        return data


class Tars(Source):
    """WebDataset's tar files: the members that are pictures."""

    def shards(self, pictures: int) -> list[Shard]:
        """See Source."""
        return [self.shard(number, [info]) for number, info in enumerate(self.files)]

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source."""
        (path,) = shard.files
        try:
            with self.system.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(SUFFIXES):
                        file = tar.extractfile(member)
                        assert file is not None  # it is a file
                        yield Item(f"{self.name(path)}/{member.name.removeprefix('./')}", file.read())
        except (tarfile.TarError, EOFError, pa.ArrowException) as error:
            raise BatchError(f"{path} is no whole tar file: {error}") from None


class Tables(Source):
    """Parquet files with a column of encoded pictures: binary, or Hugging Face's struct of bytes and path.

    column: its name, found if None.  keep: columns that the results take over.  Raises BatchError.
    """

    def __init__(self, system: Any, folder: str, files: Sequence[Any], column: str | None, keep: Sequence[str]) -> None:
        super().__init__(system, folder, files)
        schema = self._open(files[0].path).schema_arrow
        self.column = column or _image_column(schema)
        unknown = [name for name in (self.column, *keep) if name not in schema.names]
        if unknown:
            raise BatchError(f"{files[0].path} has no column {', '.join(unknown)}: its columns are {', '.join(schema.names)}")
        if not _holds_pictures(schema.field(self.column).type):
            raise BatchError(f"the column {self.column} holds {schema.field(self.column).type}, not the bytes of pictures")
        self.keep = [schema.field(name) for name in keep]

    def kept_fields(self) -> list[pa.Field]:
        """See Source."""
        return self.keep

    def shards(self, pictures: int) -> list[Shard]:
        """See Source. Row groups are not cut."""
        found: list[Shard] = []
        for info in self.files:
            metadata = self._open(info.path).metadata
            first = last = 0
            for group in range(metadata.num_row_groups):
                last += metadata.row_group(group).num_rows
                if last - first >= pictures or group == metadata.num_row_groups - 1:
                    found.append(self.shard(len(found), [info], last - first, (first, last)))
                    first = last
        return found

    def items(self, shard: Shard) -> Iterator[Item]:
        """See Source."""
        (path,) = shard.files
        assert shard.rows is not None
        row, end = shard.rows
        try:
            file = self._open(path)
            starts, groups = 0, []
            for group in range(file.metadata.num_row_groups):
                if row <= starts < end:
                    groups.append(group)
                starts += file.metadata.row_group(group).num_rows
            kept = [one.name for one in self.keep]
            for batch in file.iter_batches(64, row_groups=groups, columns=list(dict.fromkeys([self.column, *kept]))):
                others = batch.select(kept).to_pylist()
                for picture, other in zip(batch.column(self.column), others, strict=True):
                    yield Item(f"{self.name(path)}/{row}", _bytes(picture.as_py()), other)
                    row += 1
        except pa.ArrowException as error:
            raise BatchError(f"{path} cannot be read: {error}") from None

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self.system, buffer_size=BUFFER_BYTES)
        except pa.ArrowException as error:
            raise BatchError(f"{path} is no Parquet file: {error}") from None


def open_source(where: str, column: str | None = None, keep: Sequence[str] = ()) -> Source:
    """What is there: a folder, a file or a pattern, on disk or behind a URL.

    column, keep: see Tables; of other sources they are refused.  Raises BatchError.
    """
    system, path = open_place(where)
    folder, files = files_in(system, path)
    kinds: dict[type[Source], list[Any]] = {Pictures: [], Tars: [], Tables: []}
    for info in files:
        kind = _kind(info.base_name.lower())
        if kind is not None:
            kinds[kind].append(info)
    there = {kind: found for kind, found in kinds.items() if found}
    if not there:
        wanted = ", ".join((*SUFFIXES, *TARS, ".parquet"))
        raise BatchError(f"{where} {'has no picture' if files else 'is not there, or is empty'}: read are {wanted}")
    if len(there) > 1:
        counted = " and ".join(f"{len(found)} of {found[0].base_name}'s kind" for found in there.values())
        raise BatchError(f"{where} has {counted}: say which by a pattern, such as '{where.rstrip('/')}/*.tar'")
    ((kind, found),) = there.items()
    if kind is Tables:
        return Tables(system, folder, found, column, keep)
    if column or keep:
        raise BatchError(f"--column and --keep are for Parquet; {where} has {found[0].base_name}")
    return kind(system, folder, found)


def _kind(name: str) -> type[Source] | None:
    if name.endswith(".parquet"):
        return Tables
    return Tars if name.endswith(TARS) else Pictures if name.endswith(SUFFIXES) else None


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind[n].name == "bytes" and _holds_pictures(kind[n].type) for n in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(schema: pa.Schema) -> str:
    candidates = [name for name in schema.names if _holds_pictures(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in candidates]
    if len(candidates) != 1 and not named:
        raise BatchError(f"which column has the pictures? Say it by --column; there are {', '.join(schema.names)}")
    return named[0] if named else candidates[0]


def _bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if data is None else bytes(data)
