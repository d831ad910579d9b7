"""This service on Ray Serve, one replica, with default options."""

import sys

from benchmarks.peers.on_ray import run
from dinat.ray import dinat

if __name__ == "__main__":
    run(lambda: dinat({"model": sys.argv[1], "queue_limit": 64}), int(sys.argv[2]))
