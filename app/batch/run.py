"""Run shards of a batch through an engine, in this process or in Ray actors."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pyarrow import ArrowException

from dinat.app.api.parameters import Parameters
from dinat.app.batch.results import Results, Rows, feature_columns
from dinat.app.batch.sources import Item, Shard, Source, open_source
from dinat.app.batch.storage import BatchError
from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import running_engine, stream_results
from dinat.app.errors import NoImage, ServiceError
from dinat.app.settings import Settings
from dinat.model import DinatConfig

CONCURRENT_SHARDS = 2
"""Shards in flight per engine: while one finishes, the next is already running."""

READ_CHUNK = 16
"""Images that a thread reads before it passes them on."""


@dataclass(frozen=True)
class BatchSpec:
    """What to classify, and how. All workers of a batch share it.

    Attributes:
        settings: Settings of the engine.
        source: Path or URL of the images.
        dest: Path or URL of the output folder.
        column: Parquet column with the images; detected if None.
        keep: Parquet columns to copy to the results.
        top_k: Labels per image; 5, or all if there are fewer, if None.
        features: Comma-separated names of feature maps.
        feature_dtype: Data type of feature maps, "float32" or "float16".
    """

    settings: Settings
    source: str
    dest: str
    column: str | None = None
    keep: tuple[str, ...] = ()
    top_k: int | None = None
    features: str = ""
    feature_dtype: str = "float32"

    def inference_options(self, config: DinatConfig) -> InferenceOptions:
        """Return the options for each image. Raises BatchError if the network does not support them."""
        try:
            return Parameters(top_k=self.top_k, features=self.features).options(config)
        except ServiceError as error:
            raise BatchError(error.detail) from None

    def rows(self, config: DinatConfig, source: Source) -> Rows:
        """Return an empty buffer of results. Raises BatchError if an option is invalid or two columns have the same name."""
        columns = feature_columns(config, self.inference_options(config).features)
        return Rows(config, columns, self.feature_dtype, source.copied_fields())


@dataclass(frozen=True)
class ShardResult:
    """The outcome of a shard.

    Attributes:
        shard: Number of the shard.
        num_images: Rows written.
        num_errors: Rows with an error.
        error: Why the shard failed, or None.
    """

    shard: int
    num_images: int
    num_errors: int
    error: str | None = None


class Worker:
    """Runs shards on an engine that has loaded its checkpoint."""

    def __init__(self, spec: BatchSpec, engine: Engine) -> None:
        self._spec, self._engine = spec, engine
        self._source = open_source(spec.source, spec.column, spec.keep)
        self._results = Results(spec.dest)
        self._options = spec.inference_options(engine.loaded.config)

    async def run(self, shards: Iterable[Shard]) -> AsyncIterator[ShardResult]:
        """Run shards and write their results, several concurrently. A failed shard does not stop the others."""
        remaining = iter(shards)
        in_flight = {asyncio.create_task(self._run_shard(shard)) for shard in islice(remaining, CONCURRENT_SHARDS)}
        try:
            while in_flight:
                done, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                in_flight |= {asyncio.create_task(self._run_shard(shard)) for shard in islice(remaining, len(done))}
                for task in done:
                    yield task.result()
        finally:
            for task in in_flight:
                task.cancel()

    async def _run_shard(self, shard: Shard) -> ShardResult:
        rows = self._spec.rows(self._engine.loaded.config, self._source)
        max_in_flight = max(1, self._engine.settings.queue_limit // CONCURRENT_SHARDS)
        try:
            with self._results.shard(shard, rows.schema) as writer:
                results = stream_results(self._engine, self._items(shard), self._options, _read, max_in_flight)
                async with aclosing(results):
                    async for item, result in results:
                        rows.add(item, result)
                        if rows.is_full:
                            await asyncio.to_thread(writer.write_table, rows.take())
                writer.write_table(rows.take())
        except (OSError, BatchError, ArrowException) as error:
            return ShardResult(shard.number, 0, 0, str(error))
        return ShardResult(shard.number, rows.num_images, rows.num_errors)

    async def _items(self, shard: Shard) -> AsyncIterator[Item]:
        """Yield the images of a shard, read in a thread."""
        items = self._source.items(shard)
        while chunk := await asyncio.to_thread(lambda: list(islice(items, READ_CHUNK))):
            for item in chunk:
                yield item


async def _read(item: Item) -> ImageSource:
    if item.data is None:
        raise NoImage("there is no image: the value is null")
    if isinstance(item.data, bytes | Path):
        return item.data
    try:
        return await asyncio.to_thread(item.data)
    except FileNotFoundError:
        raise
    except OSError as error:  # a storage error fails the shard; a bad image would be a row with an error
        raise BatchError(f"{item.path} could not be read: {error}") from error


async def run_shards(spec: BatchSpec, shards: Sequence[Shard], workers: int) -> AsyncIterator[ShardResult]:
    """Run shards, in any order: with one worker in this process, with several on Ray."""
    if workers > 1:
        on_ray = _run_on_ray(spec, shards, workers)
        while (result := await asyncio.to_thread(next, on_ray, None)) is not None:
            yield result
        return
    async with running_engine(spec.settings) as engine:
        async for result in Worker(spec, engine).run(shards):
            yield result


def _run_on_ray(spec: BatchSpec, shards: Sequence[Shard], workers: int) -> Iterator[ShardResult]:
    """Run shards in Ray Data actors, on the cluster at RAY_ADDRESS or on this machine.

    Each actor has a GPU or a share of the CPU cores. If an actor crashes, Ray replaces it and retries its shards.
    """
    import ray.data

    from dinat.app.ray.resources import actor_resources

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised instead
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = -(-len(shards) // CONCURRENT_SHARDS)
    workers = min(workers, blocks)
    try:
        results = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(spec,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=CONCURRENT_SHARDS,
            **actor_resources(spec.settings, workers),
        )
        for row in results.iter_rows():
            yield row["result"]
    except ray.exceptions.RayError as error:  # the last line is the worker's own error
        _, _, last = str(error).rstrip().rpartition("\n")
        raise BatchError(f"a worker on Ray failed: {last}") from None
    finally:
        ray.shutdown()


class _Actor:
    """A worker for Ray Data, with an event loop that persists between calls."""

    def __init__(self, spec: BatchSpec) -> None:
        self._runner = asyncio.Runner()
        self._started = running_engine(spec.settings)
        self._worker = Worker(spec, self._runner.run(self._started.__aenter__()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[ShardResult]]:
        return {"result": self._runner.run(self._run(list(batch["shard"])))}

    async def _run(self, shards: Sequence[Shard]) -> list[ShardResult]:
        return [result async for result in self._worker.run(shards)]
