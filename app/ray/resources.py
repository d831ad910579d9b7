"""Resources of an engine in a Ray cluster."""

from typing import Any

import ray

from dinat.app.settings import Settings


def actor_resources(settings: Settings, engines: int) -> dict[str, Any]:
    """Return Ray's resource options for one engine.

    Ray sets the number of threads of a process (OMP_NUM_THREADS) to its number of CPUs.

    Args:
        settings: Settings of the engine.
        engines: Number of engines that share the cluster.

    Returns:
        One GPU, if the cluster has any and the setting `device` allows it; else an equal share of the CPU cores.
    """
    cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if settings.device.startswith("cuda") or (settings.device == "auto" and cluster.get("GPU", 0) > 0):
        return {"num_gpus": 1}
    return {"num_cpus": max(1, int(cluster.get("CPU", 1)) // engines)}
