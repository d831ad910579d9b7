"""NVIDIA's driver: which CUDA versions it supports, and whether that is enough for the installed PyTorch."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch

LIBRARY = "libcuda.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")

REQUIRED = {13: 580, 12: 525}
"""Major version of CUDA -> first driver that runs all its releases, by NVIDIA's table of minor version compatibility."""


def version() -> str | None:
    """Return the version of the driver, such as "580.95.05", or None if there is none."""
    if KERNEL_MODULE.exists() and (found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", KERNEL_MODULE.read_text())):
        return found[1]
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def supported_cuda() -> tuple[int, int] | None:
    """Return the latest CUDA version that the driver supports, or None if there is no driver."""
    found = ctypes.c_int()
    try:
        if ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000, found.value % 1000 // 10


def too_old() -> str | None:
    """Return why the driver cannot run the installed PyTorch, and what to do; None if it can, or there is no driver.

    A driver runs all releases of the major versions of CUDA that it supports.
    """
    supported = supported_cuda()
    if torch.version.cuda is None or supported is None:
        return None
    major = int(torch.version.cuda.split(".")[0])
    if supported[0] >= major:
        return None
    build = image_build(supported)
    return (
        f"NVIDIA driver {version() or '(unknown version)'} supports CUDA up to {supported[0]}.{supported[1]}, but PyTorch "
        f"{torch.__version__} requires CUDA {torch.version.cuda}: install driver {REQUIRED[major]} or later"
        + (f", or build the image with --build-arg CUDA={build}" if build else "")
    )


def image_build(supported: tuple[int, int]) -> str | None:
    """Return the value of the Dockerfile's argument CUDA for a driver before CUDA 13, or None if it is older than CUDA 12."""
    if supported[0] < 12:
        return None
    return "12.8" if supported >= (12, 8) else "12.6"
