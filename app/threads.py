"""Number of CPU threads that PyTorch, and every runtime after it, computes with."""

import os

import torch

from dinat.app.host import cores


def limit_threads(threads: int | None = None) -> int:
    """Set the number of threads of this thread and of those that start later, and return it.

    PyTorch starts one for each core of the affinity, whatever the container's CPU quota is.

    Args:
        threads: The number; None for OMP_NUM_THREADS if that is set, else the cores that the process may use.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = min(cores(), torch.get_num_threads())
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
