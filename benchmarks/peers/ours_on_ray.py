"""This service on Ray Serve, one replica, as it comes."""

import signal
import sys
import threading

import ray
from ray import serve

from app.ray_serve import dinat

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(dinat({"model": sys.argv[1], "queue_limit": 64}), name="dinat")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
