"""Find NATTEN's published wheel for the installed PyTorch.

This file imports nothing of this project, because the container image build runs it as a script:

    python natten_wheel.py FOLDER    # download the wheel to FOLDER, if there is one

Prints which wheel it is. If there is none, it says so and exits with status 0.

Environment variables:
    NATTEN_WHEELS: Page or folder that lists wheels. Default: NATTEN's own page.
    NATTEN_CUDA: CUDA version of the wheel, such as cu130. Default: PyTorch's.

Source of the versions: the release notes of NATTEN 0.21.6 and 0.21.7.
"""

import os
import subprocess
import sys

PAGE = "https://whl.natten.org"
RELEASES = {"2.13": "0.21.7", "2.12": "0.21.7", "2.11": "0.21.6", "2.10": "0.21.6"}
"""PyTorch release -> NATTEN release with wheels for it."""


def requirement(torch_version: str, cuda: str | None) -> str | None:
    """Return the pip requirement of a wheel.

    Args:
        torch_version: Version of PyTorch, such as "2.13.0+cu130".
        cuda: Version of CUDA, such as "13.0" or "cu130".

    Returns:
        A requirement such as "natten==0.21.7+torch2130cu130", or None if there is no wheel.
    """
    public = torch_version.partition("+")[0]
    release = RELEASES.get(".".join(public.split(".")[:2]))
    if release is None or not cuda:
        return None
    return f"natten=={release}+torch{public.replace('.', '')}cu{cuda.removeprefix('cu').replace('.', '')}"


def main(folder: str) -> None:
    """Download the wheel for the installed PyTorch, if there is one."""
    import torch

    page = os.environ.get("NATTEN_WHEELS") or PAGE
    cuda = os.environ.get("NATTEN_CUDA") or torch.version.cuda
    wheel = requirement(torch.__version__, cuda)
    if wheel is None:
        print(f"NATTEN: no wheel for PyTorch {torch.__version__} and CUDA {cuda}; attention uses triton and tiled")
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", "natten"]
    done = subprocess.run([*pip, "--find-links", page, "--dest", folder, wheel], check=False)
    found = f"{wheel} from {page}" if done.returncode == 0 else f"{wheel} is not at {page}; attention uses triton and tiled"
    print(f"NATTEN: {found}")


if __name__ == "__main__":
    main(sys.argv[1])
