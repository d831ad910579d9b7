"""`dinat classify` and `dinat batch` against the engine that they stand on: pictures a second of JPEGs on disk, and memory.

    python -m benchmarks.classify [--pictures 1000] [--rounds 3] [--json FILE]

DiNAT-Mini with random weights, pictures of 500x375. The engine is called directly with as many pictures at once as it takes;
the commands read, write their results and keep their order besides. All run in one process with one engine, in turns.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.timing import report
from dinat.app.api.results import predictions
from dinat.app.batch.run import BatchSpec, Worker
from dinat.app.batch.sources import open_source
from dinat.app.cli.classify import open_writer
from dinat.app.doctor import photograph, save_random_network
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import NO_DEADLINE_MS, answers, started
from dinat.app.server.heap import keep_freed_memory
from dinat.app.settings import Settings


async def directly(engine: Engine, paths: list[Path]) -> None:
    room = asyncio.Semaphore(engine.settings.queue_limit)

    async def one(path: Path) -> None:
        async with room:
            await engine.submit([path], InferenceOptions(top_k=5))

    await asyncio.gather(*map(one, paths))


async def by_the_command(engine: Engine, paths: list[Path], to: Path) -> None:
    async def read(path: str) -> Path:
        return Path(path)

    with open_writer("jsonl", to) as out:
        async for path, answer in answers(engine, list(map(str, paths)), InferenceOptions(top_k=5), read):
            assert not isinstance(answer, str), answer
            out.write(path, {"predictions": predictions(answer, engine.loaded.config)})
        out.close()


async def by_batch(worker: Worker, folder: Path) -> None:
    async for result in worker.run(open_source(str(folder)).shards(1000)):
        assert result.error is None, result


async def measure(folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    data = photograph()
    pictures = folder / "pictures"
    pictures.mkdir()
    paths = [pictures / f"{n:05}.jpg" for n in range(count)]
    for path in paths:
        path.write_bytes(data)
    save_random_network("mini", folder / "model")
    (folder / "results").mkdir()
    settings = Settings(_env_file=None, model=str(folder / "model"), deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
    seconds: dict[str, list[float]] = {"engine": [], "dinat classify": [], "dinat batch": []}
    memory: list[float] = []
    async with started(settings) as engine:
        worker = Worker(BatchSpec(settings, str(pictures), str(folder / "results")), engine)
        await directly(engine, paths[: count // 10])
        for n in range(rounds):
            for name in seconds:
                began = time.perf_counter()
                if name == "engine":
                    await directly(engine, paths)
                elif name == "dinat classify":
                    await by_the_command(engine, paths, folder / f"{n}.jsonl")
                else:
                    await by_batch(worker, pictures)
                seconds[name].append(time.perf_counter() - began)
            memory.append(psutil.Process().memory_info().rss / 2**20)
    return [
        {
            "way": name,
            "pictures": count,
            "pictures/s": count / median(times),
            "of the engine": median(a / b for a, b in zip(seconds["engine"], times, strict=True)),
            "MiB after the first round": memory[0],
            "MiB after the last": memory[-1],
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(measure(Path(name), arguments.pictures, arguments.rounds))
    report("Pictures on disk", rows, arguments.json)


if __name__ == "__main__":
    main()
