"""Start a Ray cluster and serve on it. Prints the address, and exits when standard input closes."""

import sys

import ray
from ray import serve

from dinat.ray import dinat
from tests.e2e.processes import free_port


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
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
