"""Where a batch's answers go: a folder of Parquet files, one for each shard, each there whole or not at all."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dinat.app.api.features import flatten_features
from dinat.app.batch.sources import Item, Shard
from dinat.app.batch.storage import BatchError, open_place
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.model import DinatConfig

ASKED = "_batch.json"
"""What the folder's results are of, and how they were asked for."""

UNFINISHED, RESULT = ".unfinished-", "part-"

ROWS_AT_ONCE, BYTES_AT_ONCE = 4096, 64 * 2**20
"""How many answers wait in memory to be written as one row group."""


class Results:
    """A folder of results, where it may be written; see open_place."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._system, self._folder = open_place(where)

    def begin(self, asked: Mapping[str, Any], shards: Sequence[Shard], replace: bool) -> list[Shard]:
        """Say how the results are asked for; returns the shards that are not there yet.

        Raises BatchError where the folder holds something else, or, unless they are to be replaced, results of files that have
        changed since.
        """
        asked = json.loads(json.dumps(asked))  # as it is read again
        there = self._system.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        unfinished = [info.path for info in there if info.base_name.startswith(UNFINISHED)]
        names = {info.base_name for info in there if info.path not in unfinished}
        if names and ASKED not in names:
            raise BatchError(f"{self.where} is not empty, {min(names)} is in it: name another folder")
        done = {name for name in names if name.startswith(RESULT)}
        if done:
            self._check_the_same(asked)
        else:
            self._system.create_dir(self._folder)
            with self._whole(ASKED) as stream:
                stream.write(json.dumps(asked, indent=2).encode())
        stale = sorted(done - {_name(shard) for shard in shards})
        if stale and not replace:
            raise BatchError(
                f"{len(stale)} of {len(done)} results in {self.where} are of files that are gone, or have changed since, "
                f"{stale[0]} first: --replace computes them anew"
            )
        for path in [*unfinished, *(f"{self._folder}/{name}" for name in stale)]:
            self._system.delete_file(path)
        return [shard for shard in shards if _name(shard) not in done]

    def _check_the_same(self, asked: Mapping[str, Any]) -> None:
        with self._system.open_input_stream(f"{self._folder}/{ASKED}") as stream:
            before = json.loads(stream.read())
        was = {name: before.get(name) for name in asked}
        other = [f"{name} was {was[name]!r}, is {value!r}" for name, value in asked.items() if was[name] != value]
        if other:
            raise BatchError(f"{self.where} has results of another batch ({'; '.join(other)}): name another folder")

    @contextmanager
    def shard(self, shard: Shard, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """Writes a shard's file, which is there once all is written, and not if that fails."""
        with self._whole(_name(shard)) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            yield writer

    @contextmanager
    def _whole(self, name: str) -> Iterator[Any]:
        """A stream to a file that has its name once it is whole."""
        unfinished = f"{self._folder}/{UNFINISHED}{uuid4().hex}"
        with self._system.open_output_stream(unfinished) as stream:
            yield stream
        self._system.move(unfinished, f"{self._folder}/{name}")


class Rows:
    """Answers as rows of a table.

    path, labels, class_ids, scores (best first), error (null where there is none), the columns that are kept of the source, and
    for each map a struct of its shape and its values, channels first.
    """

    def __init__(self, config: DinatConfig, maps: Sequence[str], dtype: str, kept: Sequence[pa.Field]) -> None:
        self._labels = config.id2label
        self._maps, self._dtype = maps, dtype
        number = pa.float16() if dtype == "float16" else pa.float32()
        map_type = pa.struct([("shape", pa.list_(pa.int32())), ("values", pa.list_(number))])
        self.schema = pa.schema(
            [
                *kept,
                ("path", pa.string()),
                ("labels", pa.list_(pa.string())),
                ("class_ids", pa.list_(pa.int32())),
                ("scores", pa.list_(pa.float32())),
                ("error", pa.string()),
                *((name, map_type) for name in maps),
            ]
        )
        twice = [one.name for one in kept if self.schema.names.count(one.name) > 1]
        if twice:
            raise BatchError(f"--keep {', '.join(twice)}: the results have a column of that name already")
        self.failed = self.pictures = 0
        self._clear()

    def add(self, item: Item, answer: InferenceResult | str) -> None:
        """What became of a picture."""
        error = answer if isinstance(answer, str) else None
        self.pictures += 1
        self.failed += error is not None
        values = dict.fromkeys(self.schema.names) | {"path": item.path, "error": error} | dict(item.kept)
        if isinstance(answer, InferenceResult):
            values["labels"] = [self._labels[one] for one in answer.class_ids.tolist()]
            values["class_ids"], values["scores"] = answer.class_ids, answer.scores
            maps = flatten_features(answer, self._dtype)
            values |= maps
            self._bytes += sum(one.nbytes for one in maps.values())
        for name, value in values.items():
            self._columns[name].append(value)

    @property
    def full(self) -> bool:
        """Whether it is time to take what there is."""
        return len(self._columns["path"]) >= ROWS_AT_ONCE or self._bytes >= BYTES_AT_ONCE

    def take(self) -> pa.Table:
        """The rows since the last time."""
        arrays = [
            _maps(self._columns[field.name], field.type)
            if field.name in self._maps
            else pa.array(self._columns[field.name], field.type)
            for field in self.schema
        ]
        self._clear()
        return pa.table(arrays, schema=self.schema)

    def _clear(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        self._bytes = 0


def _name(shard: Shard) -> str:
    return f"{RESULT}{shard.number:06}-{shard.key}.parquet"


def map_names(config: DinatConfig, wanted: Collection[str]) -> list[str]:
    """The columns that these maps take, in the network's order: of hidden_states, several."""
    names = [name for name in config.feature_names if name in wanted and name != "hidden_states"]
    return names + [f"hidden_states.{n}" for n in range(len(config.stage_names)) if "hidden_states" in wanted]


def _maps(maps: Sequence[npt.NDArray[Any] | None], kind: pa.StructType) -> pa.Array:
    """Maps as structs, without a Python object for each number."""
    there = [np.empty(0, np.float32) if one is None else one for one in maps]
    ends = np.cumsum([0, *(one.size for one in there)], dtype=np.int32)
    numbers = np.concatenate([one.ravel() for one in there]) if there else np.empty(0, np.float32)
    values = pa.ListArray.from_arrays(pa.array(ends), pa.array(numbers).cast(kind.field("values").type.value_type))
    shapes = pa.array([None if one is None else one.shape for one in maps], kind.field("shape").type)
    missing = pa.array([one is None for one in maps], pa.bool_())
    return pa.StructArray.from_arrays([shapes, values], fields=list(kind), mask=missing)
