"""Results of a batch: a folder with a Parquet file for each shard. A file appears only when it is complete."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dinat.app.api.features import flatten_features
from dinat.app.batch.sources import Item, Shard
from dinat.app.batch.storage import BatchError, open_filesystem
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.app.plurals import plural
from dinat.model import DinatConfig
from dinat.model.writing import writing

PARAMETERS = "_batch.json"
"""File with the source and the parameters of the results."""

UNFINISHED, RESULT = ".unfinished-", "part-"

MAX_ROWS, MAX_BYTES = 4096, 64 * 2**20
"""Rows, and bytes of feature maps, that are buffered in memory before they are written as a row group."""


class Results:
    """A folder of results.

    Args:
        url: A local path or a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, self._folder = open_filesystem(url)

    def prepare(self, parameters: Mapping[str, Any], shards: Sequence[Shard], replace: bool) -> list[Shard]:
        """Create the folder, or check that it has results of the same batch.

        Args:
            parameters: Everything that the results depend on besides the files.
            shards: All shards of the source.
            replace: Delete results of files that have changed or are gone.

        Returns:
            The shards that have no result yet.

        Raises:
            BatchError: The folder has other content, results with other parameters, or, without `replace`, results of files
                that have changed or are gone.
        """
        parameters = json.loads(json.dumps(parameters))  # for comparison with values read from JSON
        entries = self._filesystem.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        unfinished = [info.path for info in entries if info.base_name.startswith(UNFINISHED)]
        names = {info.base_name for info in entries if info.path not in unfinished}
        if names and PARAMETERS not in names:
            raise BatchError(f"{self.url} is not empty, it contains {min(names)}: use another folder")
        done = {name for name in names if name.startswith(RESULT)}
        if done:
            self._check_parameters(parameters)
        else:
            self._filesystem.create_dir(self._folder)
            with self._open_atomic(PARAMETERS) as stream:
                stream.write(json.dumps(parameters, indent=2).encode())
        stale = sorted(done - {_file_name(shard) for shard in shards})
        if stale and not replace:
            raise BatchError(
                f"{self.url} has {plural(len(stale), 'result')}, of {len(done):,}, for files that have changed or are gone, "
                f"such as {stale[0]}: --replace recomputes them"
            )
        for path in [*unfinished, *(f"{self._folder}/{name}" for name in stale)]:
            self._filesystem.delete_file(path)
        return [shard for shard in shards if _file_name(shard) not in done]

    def _check_parameters(self, parameters: Mapping[str, Any]) -> None:
        with self._filesystem.open_input_stream(f"{self._folder}/{PARAMETERS}") as stream:
            stored = json.loads(stream.read())
        differences = [
            f"{name} was {stored.get(name)!r}, is {value!r}" for name, value in parameters.items() if stored.get(name) != value
        ]
        if differences:
            raise BatchError(f"{self.url} has results of another batch ({'; '.join(differences)}): use another folder")

    @contextmanager
    def shard(self, shard: Shard, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """Write a shard's file. It appears when the context exits without an error."""
        with self._open_atomic(_file_name(shard)) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            yield writer

    @contextmanager
    def _open_atomic(self, name: str) -> Iterator[Any]:
        """Open a stream to a temporary file that is renamed on success."""
        temporary = f"{self._folder}/{UNFINISHED}{uuid4().hex}"
        try:
            with writing(f"{self.url}/{name}"), self._filesystem.open_output_stream(temporary) as stream:
                yield stream
            self._filesystem.move(temporary, f"{self._folder}/{name}")
        except BaseException:
            with suppress(OSError, pa.ArrowException):  # the storage may be the cause
                self._filesystem.delete_file(temporary)
            raise


class Rows:
    """A buffer of results as table rows.

    The columns are those copied from the source, path, labels, class_ids and scores (best first), error (null on success), and
    for each feature map a struct of its shape and its values, channels first.

    Args:
        config: Configuration of the network.
        feature_names: Columns of feature maps; see feature_columns.
        dtype: Data type of feature maps, "float32" or "float16".
        copied: Columns copied from the source.

    Raises:
        BatchError: Two columns have the same name.
    """

    def __init__(self, config: DinatConfig, feature_names: Sequence[str], dtype: str, copied: Sequence[pa.Field]) -> None:
        self._labels = config.id2label
        self._feature_names, self._dtype = feature_names, dtype
        values_type = pa.float16() if dtype == "float16" else pa.float32()
        feature_type = pa.struct([("shape", pa.list_(pa.int32())), ("values", pa.list_(values_type))])
        self.schema = pa.schema(
            [
                *copied,
                ("path", pa.string()),
                ("labels", pa.list_(pa.string())),
                ("class_ids", pa.list_(pa.int32())),
                ("scores", pa.list_(pa.float32())),
                ("error", pa.string()),
                *((name, feature_type) for name in feature_names),
            ]
        )
        duplicates = [column.name for column in copied if self.schema.names.count(column.name) > 1]
        if duplicates:
            raise BatchError(f"--keep {', '.join(duplicates)}: the results already have a column of that name")
        self.num_errors = self.num_images = 0
        self._clear()

    def add(self, item: Item, result: InferenceResult | str) -> None:
        """Add a row: a result, or an error message."""
        error = result if isinstance(result, str) else None
        self.num_images += 1
        self.num_errors += error is not None
        values = dict.fromkeys(self.schema.names) | {"path": item.path, "error": error} | dict(item.columns)
        if isinstance(result, InferenceResult):
            values["labels"] = [self._labels[class_id] for class_id in result.class_ids.tolist()]
            values["class_ids"], values["scores"] = result.class_ids, result.scores
            feature_maps = flatten_features(result, self._dtype)
            values |= feature_maps
            self._bytes += sum(feature_map.nbytes for feature_map in feature_maps.values())
        for name, value in values.items():
            self._columns[name].append(value)

    @property
    def is_full(self) -> bool:
        """Whether MAX_ROWS or MAX_BYTES is reached."""
        return len(self._columns["path"]) >= MAX_ROWS or self._bytes >= MAX_BYTES

    def take(self) -> pa.Table:
        """Remove and return all rows."""
        arrays = [
            _feature_array(self._columns[field.name], field.type)
            if field.name in self._feature_names
            else pa.array(self._columns[field.name], field.type)
            for field in self.schema
        ]
        self._clear()
        return pa.table(arrays, schema=self.schema)

    def _clear(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        self._bytes = 0


def _file_name(shard: Shard) -> str:
    return f"{RESULT}{shard.number:06}-{shard.key}.parquet"


def feature_columns(config: DinatConfig, features: Collection[str]) -> list[str]:
    """Return the column names of feature maps, in the network's order; hidden_states takes several columns."""
    names = [name for name in config.feature_names if name in features and name != "hidden_states"]
    return names + [f"hidden_states.{n}" for n in range(len(config.stage_names)) if "hidden_states" in features]


def _feature_array(feature_maps: Sequence[npt.NDArray[Any] | None], struct_type: pa.StructType) -> pa.Array:
    """Convert feature maps to structs, without a Python object for each value."""
    arrays = [np.empty(0, np.float32) if feature_map is None else feature_map for feature_map in feature_maps]
    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
    flat_values = np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0, np.float32)
    values_type = struct_type.field("values").type.value_type
    values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat_values).cast(values_type))
    shapes = pa.array(
        [None if feature_map is None else feature_map.shape for feature_map in feature_maps], struct_type.field("shape").type
    )
    is_null = pa.array([feature_map is None for feature_map in feature_maps], pa.bool_())
    return pa.StructArray.from_arrays([shapes, values], fields=list(struct_type), mask=is_null)
