"""Kernels in C for what PyTorch has none for, or a slow one: compiled for this processor when first wanted, and kept.

    python -m dinat.model.native    # for every kind of processor, beside this file: for an image that has no compiler

Nothing but a C compiler is needed, and nothing happens without one: PyTorch's own kernels take their place.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dinat.model.cpu.features import marks

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c"))
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
SECONDS = 120
"""How long a compiler may take: it needs two."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute in, and the number that they know it by."""


@dataclass(frozen=True)
class Kind:
    """A kind of processor. needs: the marks it has in /proc/cpuinfo.  flags: for the compiler."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
KINDS = {
    "x86_64": (
        Kind(
            "amx",
            frozenset({*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"}),
            ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ),
        Kind("avx512", frozenset(_AVX512), ("-march=x86-64-v4", "-mprefer-vector-width=512")),
        Kind("avx2", frozenset({"avx2", "fma"}), ("-march=x86-64-v3",)),
    ),
    "aarch64": (Kind("neon", frozenset(), ()),),
}
"""By machine, the best first."""


class Library:
    """The compiled sources, loaded. kind: what it is compiled for."""

    def __init__(self, path: Path, kind: Kind) -> None:
        """Raises OSError where it cannot be loaded, or the system does not let this process have the processor's units."""
        loaded = ctypes.CDLL(str(path))
        loaded.dinat_units.restype = ctypes.c_char_p
        units = loaded.dinat_units()
        if units is None:
            raise OSError("the system refuses this process the matrix units")
        self.kind = kind
        self.lanes = int(loaded.dinat_lanes())
        self.has_matrix_units = units == b"matrix units"
        """Whether there are project, complete and convolve, the kernels of layer.c, which need them."""
        pointer, number, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        self.attend, self.layer_norm, self.resample = loaded.dinat_attend, loaded.dinat_layer_norm, loaded.dinat_resample
        self.attend.restype = self.layer_norm.restype = self.resample.restype = None
        self.attend.argtypes = [integer, *[pointer] * 4, *[number] * 5, pointer, number, *[pointer] * 3, real, integer]
        self.layer_norm.argtypes = [integer, *[pointer] * 2, *[number] * 2, *[pointer] * 2, real, integer]
        self.resample.argtypes = [integer, ctypes.c_char_p, *[number] * 2, *[pointer] * 2, *[number] * 2, *[pointer] * 2]
        self.resample.argtypes += [number, *[pointer] * 3, number]
        if self.has_matrix_units:
            self.project, self.complete, self.convolve = loaded.dinat_project, loaded.dinat_complete, loaded.dinat_convolve
            self.project.argtypes = [*[pointer] * 2, *[number] * 3, *[pointer] * 2, real, *[pointer] * 2, integer]
            self.complete.argtypes = [*[pointer] * 3, *[number] * 3, *[pointer] * 4, real, *[pointer] * 4, integer]
            self.convolve.argtypes = [*[pointer] * 2, *[number] * 5, *[pointer] * 2, integer]


@cache
def library() -> Library | None:
    """The library for this processor, compiled now if it was not; None where that cannot be. `missing` says why."""
    try:
        return next(_libraries())
    except StopIteration:
        return None


def missing() -> str:
    """Why there is no library, in words."""
    if library() is not None:
        return ""
    if not kinds():
        return f"nothing is written for this processor ({platform.machine()})"
    return "no C compiler: install gcc or clang" if not compiler() else "the C compiler fails"


def _libraries() -> Iterator[Library]:
    for kind in kinds():
        for folder in (HERE, cache_folder()):
            path = folder / _file_name(kind)
            if path.is_file():
                try:
                    yield Library(path, kind)
                except OSError:
                    continue
        with tempfile.TemporaryDirectory() as temporary:  # what is loaded stays, also where its file may not be kept
            try:
                made = compile_for(kind, Path(temporary))
                yield Library(_kept(made), kind)
            except (OSError, subprocess.SubprocessError):
                continue


def kinds() -> list[Kind]:
    """Those that this processor is, the best first."""
    return [kind for kind in KINDS.get(platform.machine(), ()) if kind.needs <= marks()]


def compile_for(kind: Kind, folder: Path) -> Path:
    """Compile into a folder; the file. Raises OSError without a compiler, SubprocessError where it fails."""
    command = compiler()
    if not command:
        raise OSError("no C compiler")
    path = folder / _file_name(kind)
    command += [*FLAGS, *kind.flags, *map(str, SOURCES), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    return path


def compiler() -> list[str]:
    """The command of the C compiler: $CC, or one that is there; nothing where none is."""
    asked = shlex.split(os.environ.get("CC", ""))
    commands = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    return next(([found, *flags] for name, *flags in commands if (found := shutil.which(name))), [])


def default_cache() -> Path:
    """Where this project keeps what it makes, if no setting says so."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinat-serve"


def cache_folder() -> Path:
    """Where what is compiled is kept."""
    return default_cache() / "kernels"


def _file_name(kind: Kind) -> str:
    written = b"".join(path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h"))))
    digest = hashlib.sha256(written + repr((FLAGS, kind.flags)).encode()).hexdigest()[:16]
    return f"kernels-{kind.name}-{digest}.so"


def _kept(made: Path) -> Path:
    """A file's copy in the cache, whole or not at all; the file itself where nothing can be kept."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(made.read_bytes())
        os.replace(part.name, folder / made.name)
    except OSError:
        return made
    return folder / made.name
