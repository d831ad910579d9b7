"""Serve on a Ray cluster of its own: print the address, and exit when standard input closes."""

import sys

import ray
from ray import serve

from dinat.app.ray.deployment import dinat
from tests.e2e.processes import free_port


def main() -> None:
    arguments = dict(word.split("=", 1) for word in sys.argv[1:])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    serve.run(dinat(arguments), name="dinat")
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
