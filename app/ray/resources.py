"""What an engine takes of a Ray cluster."""

from typing import Any

import ray

from dinat.app.settings import Settings


def actor_resources(settings: Settings, engines: int) -> dict[str, Any]:
    """Ray's options for one of several engines: a card, where the cluster has any and DEVICE allows it, or its share of cores.

    Ray gives a process as many threads (OMP_NUM_THREADS) as it has processors.
    """
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if settings.device.startswith("cuda") or (settings.device == "auto" and there.get("GPU", 0) > 0):
        return {"num_gpus": 1}
    return {"num_cpus": max(1, int(there.get("CPU", 1)) // engines)}
