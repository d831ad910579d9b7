"""C kernels for operations that are missing or slow in PyTorch, compiled for this CPU on first use and cached.

    python -m dinat.model.native    # compile for all targets into this folder, for a container image without a compiler

The only requirement is a C compiler. Without one, PyTorch's kernels are used.
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

from dinat.model.cpu.features import cpu_flags

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c"))
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
COMPILE_TIMEOUT = 120
"""Seconds; compilation takes about two."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of the kernels, and the value of their `is_half` argument."""


@dataclass(frozen=True)
class Target:
    """An instruction set to compile for.

    Attributes:
        name: Part of the library's file name.
        required_flags: CPU flags in /proc/cpuinfo that the compiled code requires.
        compiler_flags: Options of the C compiler.
    """

    name: str
    required_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
TARGETS = {
    "x86_64": (
        Target(
            "amx",
            frozenset({*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"}),
            ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ),
        Target("avx512", frozenset(_AVX512), ("-march=x86-64-v4", "-mprefer-vector-width=512")),
        Target("avx2", frozenset({"avx2", "fma"}), ("-march=x86-64-v3",)),
    ),
    "aarch64": (Target("neon", frozenset(), ()),),
}
"""Targets by machine type, the fastest first."""


class Library:
    """The loaded kernels.

    Attributes:
        target: Instruction set that the library is compiled for.
        lanes: float32 values per vector.
        has_matrix_units: Whether project, complete and convolve are available, the kernels of layer.c, which require AMX.
        attend, layer_norm, resample, project, complete, convolve: See the functions dinat_* in the C sources.
    """

    def __init__(self, path: Path, target: Target) -> None:
        """Load a library. Raises OSError if it cannot be loaded, or if the operating system denies access to AMX."""
        loaded = ctypes.CDLL(str(path))
        loaded.dinat_units.restype = ctypes.c_char_p
        units = loaded.dinat_units()
        if units is None:
            raise OSError("the operating system denies access to AMX")
        self.target = target
        self.lanes = int(loaded.dinat_lanes())
        self.has_matrix_units = units == b"matrix units"
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
    """Return the library for this CPU, compiling it if needed; None if unavailable (see unavailable_reason)."""
    try:
        return next(_libraries())
    except StopIteration:
        return None


def unavailable_reason() -> str:
    """Return why library() is None; an empty string if it is available."""
    if library() is not None:
        return ""
    if not supported_targets():
        return f"no kernels exist for this CPU ({platform.machine()})"
    return "no C compiler: install gcc or clang" if not compiler() else "the C compiler fails"


def _libraries() -> Iterator[Library]:
    for target in supported_targets():
        for folder in (HERE, cache_folder()):
            path = folder / _file_name(target)
            if path.is_file():
                try:
                    yield Library(path, target)
                except OSError:
                    continue
        with tempfile.TemporaryDirectory() as temporary:  # a loaded library remains usable after its file is deleted
            try:
                compiled = compile_for(target, Path(temporary))
                yield Library(_copy_to_cache(compiled), target)
            except (OSError, subprocess.SubprocessError):
                continue


def supported_targets() -> list[Target]:
    """Return the targets that this CPU can run, the fastest first."""
    return [target for target in TARGETS.get(platform.machine(), ()) if target.required_flags <= cpu_flags()]


def compile_for(target: Target, folder: Path) -> Path:
    """Compile the kernels into a folder and return the library's path.

    Raises:
        OSError: No C compiler is installed.
        subprocess.SubprocessError: The compiler failed or timed out.
    """
    command = compiler()
    if not command:
        raise OSError("no C compiler")
    path = folder / _file_name(target)
    command += [*FLAGS, *target.compiler_flags, *map(str, SOURCES), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT)
    return path


def compiler() -> list[str]:
    """Return the command of the C compiler: $CC, or the first installed one; an empty list if none is installed."""
    configured = shlex.split(os.environ.get("CC", ""))
    commands = [configured] if configured else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *flags] for name, *flags in commands if (path := shutil.which(name))), [])


def default_cache() -> Path:
    """Return the default cache folder of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinat-serve"


def cache_folder() -> Path:
    """Return the folder of compiled libraries."""
    return default_cache() / "kernels"


def _file_name(target: Target) -> str:
    sources = b"".join(path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h"))))
    digest = hashlib.sha256(sources + repr((FLAGS, target.compiler_flags)).encode()).hexdigest()[:16]
    return f"kernels-{target.name}-{digest}.so"


def _copy_to_cache(path: Path) -> Path:
    """Copy a library into the cache folder atomically. Returns the copy, or the original if the cache is not writable."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
            copy.write(path.read_bytes())
        os.replace(copy.name, folder / path.name)
    except OSError:
        return path
    return folder / path.name
