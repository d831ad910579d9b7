"""What Prometheus sees. Names and units follow its conventions."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest, values
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from dinat.app.engine.batcher import Job
from dinat.app.engine.runtimes.runtime import InferenceResult, LoadedModel, Runtime

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Shared:
    """Where the processes of one service count together.

    folder: holds a few files for each.  name: of this process, its successors' too.  pids: of all, by name, as of now.
    """

    folder: Path
    name: str
    pids: Callable[[], Mapping[str, int]]


class Metrics:
    """The meters of one service, in a registry of its own. shared: where they count for several processes, by mmapped files."""

    def __init__(self, shared: Shared | None = None) -> None:
        self.registry = CollectorRegistry()
        """What is shown."""
        self._read = -float("inf")
        self._runtimes: Sequence[Runtime] = ()
        self._known: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        if shared is None:
            meters = self.registry
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
            values.ValueClass = values.MutexValue
        else:
            meters = CollectorRegistry()
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.folder)  # its library reads it there alone
            values.ValueClass = values.MultiProcessValue(lambda: shared.name)  # type: ignore[no-untyped-call]
            MultiProcessCollector(self.registry, str(shared.folder))  # type: ignore[no-untyped-call]
            self.registry.register(_Processes(shared.pids))
        self._requests = Counter(
            "dinat_requests_total", "Requests answered, by route and status.", ["route", "status"], registry=meters
        )
        self._request_seconds = Histogram(
            "dinat_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=meters,
        )
        part_seconds = Histogram(
            "dinat_part_duration_seconds",
            "Parts of the way: decode and queue of a picture, compute of a batch, encode of an answer.",
            ["part"],
            buckets=SECONDS,
            registry=meters,
        )
        self._parts = {part: part_seconds.labels(part) for part in ("decode", "queue", "compute", "encode")}
        self._batch_size = Histogram("dinat_batch_size_images", "Pictures per batch.", buckets=BATCHES, registry=meters)
        images = Counter("dinat_images_total", "Pictures answered, by outcome.", ["outcome"], registry=meters)
        self._outcomes = {outcome: images.labels(outcome) for outcome in ("classified", "rejected", "late", "failed")}
        self._memory = Gauge(
            "dinat_device_memory_bytes",
            "Memory in use on a device, as of its last batch.",
            ["device"],
            multiprocess_mode="mostrecent",
            registry=meters,
        )

    def show(self, model: str, waiting: Callable[[], int], loaded: Callable[[], LoadedModel | None]) -> None:
        """Show the depth of the queue, and what serves, whenever the metrics are read."""
        self.registry.register(_Serving(model, waiting, loaded))

    def watch_devices(self, runtimes: Sequence[Runtime]) -> None:
        """Measure the memory of each device that has one of its own."""
        self._runtimes = [runtime for runtime in runtimes if runtime.memory() is not None]

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        meters = self._known.get((route, status))
        if meters is None:
            meters = self._requests.labels(route, str(status)), self._request_seconds.labels(route)
            self._known[route, status] = meters
        meters[0].inc()
        meters[1].observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count the time of one part: decode, queue, compute or encode. Safe from every thread."""
        self._parts[stage].observe(seconds)

    def queued(self, batch: Sequence[Job]) -> None:
        """Count how long the pictures of a batch waited for it. Safe from every thread."""
        for job in batch:
            self._parts["queue"].observe(job.started - job.decoded)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch that ran. Safe from every thread."""
        self._batch_size.observe(size)
        self.observe_stage("compute", seconds)
        now = time.monotonic()
        if now > self._read + 1:
            self._read = now
            for runtime in self._runtimes:
                self._memory.labels(runtime.device).set(runtime.memory() or 0)

    def image(self, answer: InferenceResult | Exception) -> None:
        """Count a picture that has its answer."""
        status = 200 if isinstance(answer, InferenceResult) else int(getattr(answer, "status", 500))
        self._outcomes[{2: "classified", 4: "rejected"}.get(status // 100, "late" if status == 504 else "failed")].inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Serving(Collector):
    """What serves, and how much waits for it."""

    def __init__(self, model: str, waiting: Callable[[], int], loaded: Callable[[], LoadedModel | None]) -> None:
        self._model, self._waiting, self._loaded = model, waiting, loaded

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        yield GaugeMetricFamily("dinat_queue_depth_images", "Pictures taken and not yet running.", self._waiting())
        versions = {"version": version("dinat-serve"), "torch": torch.__version__}
        yield InfoMetricFamily("dinat_build", "Versions.", versions)
        disabled = GaugeMetricFamily("dinat_disabled", "1 for what failed, or computed wrongly, at start.", labels=["what"])
        loaded = self._loaded()
        if loaded is not None:
            for left in loaded.disabled:
                disabled.add_metric([left.name], 1)
            serving = {"model": self._model, "runtime": loaded.runtime, "device": loaded.device, "precision": loaded.precision}
            yield InfoMetricFamily("dinat_model", "What is being served.", serving)
        yield disabled


class _Processes(Collector):
    """What ProcessCollector says of one process, of several: the label process has the name of each."""

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        families: dict[str, Metric] = {}
        for name, pid in self._pids().items():
            for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, "process": name}, sample.value)
        return families.values()
