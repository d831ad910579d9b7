"""Number of CPU threads that PyTorch, and every runtime after it, computes with."""

import os
import re

import torch

from dinat.app.host import cores

_OMP_NUMBER = re.compile(r"\s*0*[1-9]")
"""Valid values of OMP_NUM_THREADS, numbers or lists of them. OpenMP ignores others, such as an empty one."""


def limit_threads(threads: int | None = None) -> int:
    """Set the number of threads of this thread and of those that start later, and return it.

    PyTorch starts one for each core of the affinity, whatever the container's CPU quota is.

    Args:
        threads: The number; None for OMP_NUM_THREADS if that is set, else the cores that the process may use.
    """
    if threads is None and not _OMP_NUMBER.match(os.environ.get("OMP_NUM_THREADS", "")):
        threads = min(cores(), torch.get_num_threads())
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
