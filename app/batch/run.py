"""The work of a batch: shards through an engine, in this process or in Ray's actors."""

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
from dinat.app.batch.results import Results, Rows, map_names
from dinat.app.batch.sources import Item, Shard, Source, open_source
from dinat.app.batch.storage import BatchError
from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import running_engine, stream_results
from dinat.app.errors import NoImage, ServiceError
from dinat.app.settings import Settings
from dinat.model import DinatConfig

SHARDS_AT_ONCE = 2
"""How many an engine has under way: while one ends, the next has begun."""

READ_AT_ONCE = 16
"""Pictures that a thread reads before it hands them over."""


@dataclass(frozen=True)
class Job:
    """What a batch is: the same for all who take part in it."""

    settings: Settings
    source: str
    dest: str
    column: str | None = None
    keep: tuple[str, ...] = ()
    top_k: int | None = None
    features: str = ""
    feature_dtype: str = "float32"

    def wanted(self, config: DinatConfig) -> InferenceOptions:
        """What is asked of each picture, checked against what the network has. Raises BatchError."""
        try:
            return Parameters(top_k=self.top_k, features=self.features).options(config)
        except ServiceError as error:
            raise BatchError(error.detail) from None

    def rows(self, config: DinatConfig, source: Source) -> Rows:
        """An empty table of answers. Raises BatchError, also where it would have two columns of one name."""
        return Rows(config, map_names(config, self.wanted(config).features), self.feature_dtype, source.kept_fields())


@dataclass(frozen=True)
class Done:
    """What became of a shard. why: it is not done, if it is not."""

    shard: int
    pictures: int
    failed: int
    why: str | None = None


class Worker:
    """Computes shards of a batch, by an engine that has loaded its checkpoint."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._source = open_source(job.source, job.column, job.keep)
        self._results = Results(job.dest)
        self._wanted = job.wanted(engine.loaded.config)

    async def compute(self, shards: Iterable[Shard]) -> AsyncIterator[Done]:
        """Compute shards and write their results, some at a time. One that fails does not keep the others from being done."""
        left = iter(shards)
        in_flight = {asyncio.create_task(self._shard(shard)) for shard in islice(left, SHARDS_AT_ONCE)}
        try:
            while in_flight:
                over, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                in_flight |= {asyncio.create_task(self._shard(shard)) for shard in islice(left, len(over))}
                for task in over:
                    yield task.result()
        finally:
            for task in in_flight:
                task.cancel()

    async def _shard(self, shard: Shard) -> Done:
        rows = self._job.rows(self._engine.loaded.config, self._source)
        at_once = max(1, self._engine.settings.queue_limit // SHARDS_AT_ONCE)
        try:
            with self._results.shard(shard, rows.schema) as writer:
                answered = stream_results(self._engine, self._items(shard), self._wanted, _read, at_once)
                async with aclosing(answered):
                    async for item, answer in answered:
                        rows.add(item, answer)
                        if rows.full:
                            await asyncio.to_thread(writer.write_table, rows.take())
                writer.write_table(rows.take())
        except (OSError, BatchError, ArrowException) as error:
            return Done(shard.number, 0, 0, str(error))
        return Done(shard.number, rows.pictures, rows.failed)

    async def _items(self, shard: Shard) -> AsyncIterator[Item]:
        """The pictures of a shard, read in a thread."""
        items = self._source.items(shard)
        while several := await asyncio.to_thread(lambda: list(islice(items, READ_AT_ONCE))):
            for item in several:
                yield item


async def _read(item: Item) -> ImageSource:
    if item.data is None:
        raise NoImage("there is no picture: its place in the row is empty")
    if isinstance(item.data, bytes | Path):
        return item.data
    try:
        return await asyncio.to_thread(item.data)
    except FileNotFoundError:
        raise
    except OSError as error:  # of the network, not of the picture
        raise BatchError(f"{item.path} could not be read: {error}") from error


async def compute(job: Job, shards: Sequence[Shard], workers: int) -> AsyncIterator[Done]:
    """Compute shards, in whatever order: in this process, or with several workers on Ray."""
    if workers > 1:
        by_ray = _by_ray(job, shards, workers)
        while (done := await asyncio.to_thread(next, by_ray, None)) is not None:
            yield done
        return
    async with running_engine(job.settings) as engine:
        async for done in Worker(job, engine).compute(shards):
            yield done


def _by_ray(job: Job, shards: Sequence[Shard], workers: int) -> Iterator[Done]:
    """Compute shards in as many actors of Ray Data: of the cluster that RAY_ADDRESS names, or of this machine.

    Each has a card, or its share of the processors. An actor that dies is replaced, and what it had not written computed again.
    """
    import ray.data

    from dinat.app.ray.resources import actor_resources

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is an error is raised
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = -(-len(shards) // SHARDS_AT_ONCE)
    workers = min(workers, blocks)
    try:
        waiting = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=SHARDS_AT_ONCE,
            **actor_resources(job.settings, workers),
        )
        for row in waiting.iter_rows():
            yield row["done"]
    except ray.exceptions.RayError as error:  # its last line is that of the worker
        _, _, last = str(error).rstrip().rpartition("\n")
        raise BatchError(f"a worker on Ray: {last}") from None
    finally:
        ray.shutdown()


class _Actor:
    """A worker as Ray Data calls it, with a loop of its own that lasts from call to call."""

    def __init__(self, job: Job) -> None:
        self._runner = asyncio.Runner()
        self._started = running_engine(job.settings)
        self._worker = Worker(job, self._runner.run(self._started.__aenter__()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Done]]:
        return {"done": self._runner.run(self._compute(list(batch["shard"])))}

    async def _compute(self, shards: Sequence[Shard]) -> list[Done]:
        return [done async for done in self._worker.compute(shards)]
