"""Prometheus metrics. Names and units follow its conventions."""

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

from dinat.app.engine.job import Job
from dinat.app.engine.runtimes.runtime import InferenceResult, LoadedModel, Runtime

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Buckets of durations, and of images per batch."""

VERSION = version("dinat-serve")
"""Read once: each scrape would read the package's metadata from disk."""


@dataclass(frozen=True)
class SharedMetrics:
    """Metrics that several processes share.

    Attributes:
        folder: Holds memory-mapped files of each process.
        name: Name of this process, the same after a restart.
        pids: Returns the current ids of all processes, by name.
    """

    folder: Path
    name: str
    pids: Callable[[], Mapping[str, int]]


class Metrics:
    """The metrics of one service, in a registry of its own.

    Args:
        shared: Set if several processes serve; the metrics are then the sums over all of them.
    """

    def __init__(self, shared: SharedMetrics | None = None) -> None:
        self.registry = CollectorRegistry()
        """Registry of what is exported; in it, shared metrics are read from their files."""
        self._memory_read = -float("inf")
        self._runtimes: Sequence[Runtime] = ()
        self._request_metrics: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        if shared is None:
            registry = self.registry
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
            values.ValueClass = values.MutexValue
        else:
            registry = CollectorRegistry()
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.folder)  # the only place where prometheus_client reads it
            values.ValueClass = values.MultiProcessValue(lambda: shared.name)  # type: ignore[no-untyped-call]
            MultiProcessCollector(self.registry, str(shared.folder))  # type: ignore[no-untyped-call]
            self.registry.register(_Processes(shared.pids))
        self._requests = Counter(
            "dinat_requests_total", "Requests, by route and status.", ["route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "dinat_request_duration_seconds",
            "Time from the head of a request to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        part_seconds = Histogram(
            "dinat_part_duration_seconds",
            "Time by part: decode and queue of an image, compute of a batch, encode of a response.",
            ["part"],
            buckets=SECONDS,
            registry=registry,
        )
        self._parts = {part: part_seconds.labels(part) for part in ("decode", "queue", "compute", "encode")}
        self._batch_size = Histogram("dinat_batch_size_images", "Images per batch.", buckets=BATCHES, registry=registry)
        images = Counter("dinat_images_total", "Queued images, by outcome.", ["outcome"], registry=registry)
        self._outcomes = {outcome: images.labels(outcome) for outcome in ("classified", "rejected", "late", "failed")}
        self._memory = Gauge(
            "dinat_device_memory_bytes",
            "Memory in use on a device, at its last batch.",
            ["device"],
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._in_flight = Gauge(
            "dinat_in_flight_bytes",
            "Bytes that requests in progress hold above 64 KiB each: request_bodies and responses, each of which has a limit.",
            ["kind"],
            multiprocess_mode="sum",
            registry=registry,
        )

    def in_flight_bytes(self, kind: str) -> Callable[[float], None]:
        """Return what sets the number of bytes that requests hold in this process: request_bodies or responses."""
        gauge = self._in_flight.labels(kind)
        gauge.set(0)  # in place of what a killed process left
        return gauge.set

    def add_engine(self, model: str, waiting: Callable[[], int], loaded: Callable[[], LoadedModel | None]) -> None:
        """Export the queue depth and the loaded model of an engine, read at each scrape.

        Args:
            model: Name of the model.
            waiting: Returns the number of queued images.
            loaded: Returns the loaded model.
        """
        self.registry.register(_EngineCollector(model, waiting, loaded))

    def watch_devices(self, runtimes: Sequence[Runtime]) -> None:
        """Measure the memory of the devices that have their own."""
        self._runtimes = [runtime for runtime in runtimes if runtime.memory() is not None]

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request and its duration."""
        metrics = self._request_metrics.get((route, status))
        if metrics is None:
            metrics = self._requests.labels(route, str(status)), self._request_seconds.labels(route)
            self._request_metrics[route, status] = metrics
        metrics[0].inc()
        metrics[1].observe(seconds)

    def observe_part(self, part: str, seconds: float) -> None:
        """Observe the time of a part: decode, queue, compute or encode. Safe from any thread."""
        self._parts[part].observe(seconds)

    def observe_queue(self, batch: Sequence[Job]) -> None:
        """Observe how long the images of a batch were queued. Safe from any thread."""
        for job in batch:
            self._parts["queue"].observe(job.started - job.decoded)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Observe a batch, and the memory of the devices at most once a second. Safe from any thread."""
        self._batch_size.observe(size)
        self.observe_part("compute", seconds)
        now = time.monotonic()
        if now > self._memory_read + 1:
            self._memory_read = now
            for runtime in self._runtimes:
                self._memory.labels(runtime.device).set(runtime.memory() or 0)

    def count_image(self, result: InferenceResult | Exception) -> None:
        """Count an image by its outcome."""
        status = 200 if isinstance(result, InferenceResult) else int(getattr(result, "status", 500))
        self._outcomes[{2: "classified", 4: "rejected"}.get(status // 100, "late" if status == 504 else "failed")].inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Queue depth, versions, and the loaded model."""

    def __init__(self, model: str, waiting: Callable[[], int], loaded: Callable[[], LoadedModel | None]) -> None:
        self._model, self._waiting, self._loaded = model, waiting, loaded

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        yield GaugeMetricFamily("dinat_queue_depth_images", "Queued images: accepted and not running yet.", self._waiting())
        versions = {"version": VERSION, "torch": torch.__version__}
        yield InfoMetricFamily("dinat_build", "Versions.", versions)
        disabled = GaugeMetricFamily(
            "dinat_disabled", "1 for everything that failed, or returned wrong numbers, at startup.", labels=["name"]
        )
        loaded = self._loaded()
        if loaded is not None:
            for entry in loaded.disabled:
                disabled.add_metric([entry.name], 1)
            model = {"model": self._model, "runtime": loaded.runtime, "device": loaded.device, "precision": loaded.precision}
            yield InfoMetricFamily("dinat_model", "The loaded model.", model)
        yield disabled


class _Processes(Collector):
    """The metrics of ProcessCollector for several processes; the label `process` is the name of each."""

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
