"""Run a benchmarked application on its own Ray instance until SIGTERM."""

import signal
import threading
from collections.abc import Callable

import ray
from ray import serve


def run(build: Callable[[], serve.Application], port: int) -> None:
    """Start Ray, build the application and serve it on this port until SIGTERM."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(), route_prefix="/")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
