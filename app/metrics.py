"""What Prometheus sees. Names and units follow its conventions."""

from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from app.engine.batcher import Job
from app.engine.runtime import Answer, LeftOut, Runtime, devices

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The meters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "dinat_requests_total", "Requests answered, by route and status.", ["route", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "dinat_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._part_seconds = Histogram(
            "dinat_part_duration_seconds",
            "Parts of the way: decode and queue of a picture, compute of a batch, encode of an answer.",
            ["part"],
            buckets=SECONDS,
            registry=self.registry,
        )
        for part in ("decode", "queue", "compute", "encode"):
            self._part_seconds.labels(part)
        self._batch_size = Histogram("dinat_batch_size_images", "Pictures per batch.", buckets=BATCHES, registry=self.registry)
        self._queue = Gauge("dinat_queue_depth_images", "Pictures taken and not yet running.", registry=self.registry)
        self._images = Counter("dinat_images_total", "Pictures answered, by outcome.", ["outcome"], registry=self.registry)
        for outcome in ("classified", "refused", "late", "failed"):
            self._images.labels(outcome)
        self._left_out = Gauge(
            "dinat_left_out", "1 for what was seen at start to fail or to compute wrongly.", ["what"], registry=self.registry
        )
        Info("dinat_build", "Versions.", registry=self.registry).info(
            {"version": version("dinat-serve"), "torch": torch.__version__}
        )

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Ask this for the depth of the queue whenever the metrics are read."""
        self._queue.set_function(depth)

    def loaded(self, model: str, runtimes: Sequence[Runtime], left_out: Sequence[LeftOut] = ()) -> None:
        """Say what was loaded and what was left out, and watch the memory of each device that has one of its own."""
        for left in left_out:
            self._left_out.labels(left.what).set(1)
        first = runtimes[0]
        Info("dinat_model", "What is being served.", registry=self.registry).info(
            {"model": model, "runtime": first.name, "device": devices(runtimes), "precision": first.precision}
        )
        cards = [runtime for runtime in runtimes if runtime.memory() is not None]
        if cards:
            memory = Gauge("dinat_device_memory_bytes", "Memory in use on a device.", ["device"], registry=self.registry)

            def watch(card: Runtime) -> None:
                memory.labels(card.device).set_function(lambda: card.memory() or 0)

            for card in cards:
                watch(card)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def part(self, part: str, seconds: float) -> None:
        """Count the time of one part: decode, queue, compute or encode. Safe from every thread."""
        self._part_seconds.labels(part).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch that ran. Safe from every thread."""
        self._batch_size.observe(size)
        self.part("compute", seconds)

    def picture(self, job: Job, answer: Answer | Exception) -> None:
        """Count a picture that has its answer."""
        if job.started:
            self.part("queue", job.started - job.decoded)
        status = 200 if isinstance(answer, Answer) else int(getattr(answer, "status", 500))
        outcome = {2: "classified", 4: "refused"}.get(status // 100, "late" if status == 504 else "failed")
        self._images.labels(outcome).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
