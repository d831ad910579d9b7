"""Which of NATTEN's published wheels is for the PyTorch that is installed. Imports nothing of the project: the image asks too.

    python natten_wheel.py FOLDER    downloads it there, and says which; where there is none says so, and all is well

NATTEN_WHEELS is the page, or a folder, that lists wheels (NATTEN's own if not set); NATTEN_CUDA what CUDA they are to be for,
such as cu130, if not PyTorch's own. Source: the release notes of NATTEN 0.21.6 and 0.21.7.
"""

import os
import subprocess
import sys

PAGE = "https://whl.natten.org"
RELEASES = {"2.13": "0.21.7", "2.12": "0.21.7", "2.11": "0.21.6", "2.10": "0.21.6"}
"""The release of NATTEN that has wheels for a release of PyTorch."""


def requirement(torch_version: str, cuda: str | None) -> str | None:
    """natten==0.21.7+torch2130cu130 for PyTorch "2.13.0+cu130" and CUDA "13.0" or "cu130"; None where there is none."""
    public = torch_version.partition("+")[0]
    release = RELEASES.get(".".join(public.split(".")[:2]))
    if release is None or not cuda:
        return None
    return f"natten=={release}+torch{public.replace('.', '')}cu{cuda.removeprefix('cu').replace('.', '')}"


def main(folder: str) -> None:
    """Download the wheel for this PyTorch, if there is one."""
    import torch

    page = os.environ.get("NATTEN_WHEELS") or PAGE
    cuda = os.environ.get("NATTEN_CUDA") or torch.version.cuda
    wanted = requirement(torch.__version__, cuda)
    if wanted is None:
        print(f"NATTEN: there is no wheel for PyTorch {torch.__version__} and CUDA {cuda}: triton and tiled attention serve")
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", "natten"]
    done = subprocess.run([*pip, "--find-links", page, "--dest", folder, wanted], check=False)
    found = f"{wanted} from {page}" if done.returncode == 0 else f"{wanted} is not at {page}: triton and tiled attention serve"
    print(f"NATTEN: {found}")


if __name__ == "__main__":
    main(sys.argv[1])
