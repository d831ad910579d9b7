"""Resources of an engine in a Ray cluster."""

from typing import Any

import click
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
    cluster = _cluster_resources()
    if settings.device.startswith("cuda") or (settings.device == "auto" and cluster.get("GPU", 0) > 0):
        return {"num_gpus": 1}
    return {"num_cpus": max(1, int(cluster.get("CPU", 1)) // engines)}


def _cluster_resources() -> dict[str, float]:
    """Return the resources of the cluster that this process is connected to, or will be.

    `serve run` builds the application before it connects to the cluster at --address or RAY_ADDRESS, or starts one. It is left
    to connect itself, since it does so with its flags for the runtime environment.
    """
    if ray.is_initialized():
        return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
    command = click.get_current_context(silent=True)
    ray.init(address=command.params.get("address") if command is not None else None, log_to_driver=False)
    try:
        return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
