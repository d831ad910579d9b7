"""`dinat classify` and `dinat batch` against direct calls of their engine: images per second from JPEG files, and memory.

    python -m benchmarks.classify [--images 1000] [--rounds 3] [--json FILE]

DiNAT-Mini with random weights, 500x375 images. The engine is called with as many images in flight as its queue holds; the
commands also read the files, write results and keep their order. All run in one process with one engine, interleaved.
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
from dinat.app.cli.result_writers import open_writer
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import NO_DEADLINE_MS, running_engine, stream_results
from dinat.app.measurements import photograph, save_random_network
from dinat.app.server.heap import keep_freed_memory
from dinat.app.settings import Settings


async def run_engine(engine: Engine, paths: list[Path]) -> None:
    in_flight = asyncio.Semaphore(engine.settings.queue_limit)

    async def classify(path: Path) -> None:
        async with in_flight:
            await engine.submit([path], InferenceOptions(top_k=5))

    await asyncio.gather(*map(classify, paths))


async def run_classify(engine: Engine, paths: list[Path], output: Path) -> None:
    async def read(path: str) -> Path:
        return Path(path)

    with open_writer("jsonl", output) as out:
        async for path, result in stream_results(engine, list(map(str, paths)), InferenceOptions(top_k=5), read):
            assert not isinstance(result, str), result
            out.write(path, {"predictions": predictions(result, engine.loaded.config)})
        out.close()


async def run_batch(worker: Worker, folder: Path) -> None:
    async for result in worker.run(open_source(str(folder)).shards(1000)):
        assert result.error is None, result


async def measure(folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    data = photograph()
    images = folder / "images"
    images.mkdir()
    paths = [images / f"{n:05}.jpg" for n in range(count)]
    for path in paths:
        path.write_bytes(data)
    save_random_network("mini", folder / "model")
    (folder / "results").mkdir()
    settings = Settings(_env_file=None, model=str(folder / "model"), deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
    seconds: dict[str, list[float]] = {"engine": [], "dinat classify": [], "dinat batch": []}
    memory: list[float] = []
    async with running_engine(settings) as engine:
        worker = Worker(BatchSpec(settings, str(images), str(folder / "results")), engine)
        await run_engine(engine, paths[: count // 10])
        for n in range(rounds):
            for name in seconds:
                start = time.perf_counter()
                if name == "engine":
                    await run_engine(engine, paths)
                elif name == "dinat classify":
                    await run_classify(engine, paths, folder / f"{n}.jsonl")
                else:
                    await run_batch(worker, images)
                seconds[name].append(time.perf_counter() - start)
            memory.append(psutil.Process().memory_info().rss / 2**20)
    return [
        {
            "method": name,
            "images": count,
            "images/s": count / median(times),
            "relative to engine": median(a / b for a, b in zip(seconds["engine"], times, strict=True)),
            "MiB after the first round": memory[0],
            "MiB after the last round": memory[-1],
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(measure(Path(name), arguments.images, arguments.rounds))
    report("Images on disk", rows, arguments.json)


if __name__ == "__main__":
    main()
