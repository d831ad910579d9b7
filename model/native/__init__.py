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
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dinat.model.cpu.features import cpu_flags

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c"))
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
COMPILE_TIMEOUT = 120
"""Seconds; compilation takes about two."""
DIGEST_BYTES = hashlib.sha256().digest_size


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


_V3 = ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm")
_AVX512 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
TARGETS = {
    "x86_64": (
        Target(
            "amx",
            frozenset({*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"}),
            ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ),
        Target(
            "avx512bf16",
            frozenset({*_AVX512, "avx512_bf16"}),
            ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"),
        ),
        Target("avx512", frozenset(_AVX512), ("-march=x86-64-v4", "-mprefer-vector-width=512")),
        Target("avx2", frozenset(_V3), ("-march=x86-64-v3",)),
    ),
    "aarch64": (Target("neon", frozenset(), ()),),
}
"""Targets by machine type, the fastest first."""


class Library:
    """The loaded kernels.

    Attributes:
        target: Instruction set that the library is compiled for.
        lanes: float32 values per vector.
        has_matrix_units: Whether bfloat16 products run on AMX.
        has_layers: Whether project, complete and convolve, the kernels of layer.c, are available for float32 (at index 0) and
            bfloat16 (1).
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
        dtypes = loaded.dinat_layer_dtypes()
        self.has_layers = (bool(dtypes & 1), bool(dtypes & 2))
        if dtypes:
            self.project, self.complete, self.convolve = loaded.dinat_project, loaded.dinat_complete, loaded.dinat_convolve
            self.project.argtypes = [integer, *[pointer] * 2, *[number] * 3, *[pointer] * 2, real, *[pointer] * 2, integer]
            self.complete.argtypes = [integer, *[pointer] * 3, *[number] * 3, *[pointer] * 4, real, *[pointer] * 4, integer]
            self.convolve.argtypes = [integer, *[pointer] * 2, *[number] * 5, *[pointer] * 2, integer]


@cache
def library() -> Library | None:
    """Return the library for this CPU, compiling it if needed; None if unavailable (see unavailable_reason)."""
    return _select()[0]


def unavailable_reason() -> str:
    """Return why library() is None; an empty string if it is available."""
    return _select()[1]


@cache
def _select() -> tuple[Library | None, str]:
    """Return the library of the fastest target that can be loaded or compiled, and why there is none."""
    targets, reasons = supported_targets(), []
    for target in targets:
        for find in (_cached, _compiled):
            found, reason = find(target)
            if found is not None:
                return found, ""
            reasons.append(reason)
    if not targets:
        return None, f"no kernels exist for this CPU ({platform.machine()})"
    return None, "; ".join(dict.fromkeys(filter(None, reasons)))


def _cached(target: Target) -> tuple[Library | None, str]:
    """Load a library that was compiled before: part of the installation, or in a cache folder. Else return why not."""
    name, reasons = _file_name(target), []
    for folder in (HERE, *_folders()):
        try:
            return _load(folder / name, target), ""
        except FileNotFoundError:
            continue
        except OSError as error:
            reasons.append(str(error))
    return None, "; ".join(reasons)


def _compiled(target: Target) -> tuple[Library | None, str]:
    """Compile a library, cache it and load it. Else return why not."""
    if not compiler():
        return None, "no C compiler: install gcc or clang"
    reasons = []
    try:
        with tempfile.TemporaryDirectory() as temporary:  # a loaded library remains usable after its file is deleted
            path = compile_for(target, Path(temporary))
            for folder in _folders():
                try:
                    return _load(_copy(path, folder), target), ""
                except OSError as error:  # cannot be written, is full, or must not contain programs (noexec)
                    reasons.append(str(error))
            return _load(path, target), ""
    except subprocess.SubprocessError:
        return None, "the C compiler fails"
    except OSError as error:
        return None, "; ".join([*reasons, str(error)])


def _load(path: Path, target: Target) -> Library:
    """Load a library whose digest is right: a program crashes in a file that was cut short.

    Raises:
        OSError: It does not exist, is damaged or cannot be loaded.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise OSError(f"{path} is damaged")
    return Library(path, target)


def supported_targets() -> list[Target]:
    """Return the targets that this CPU can run, the fastest first."""
    return [target for target in TARGETS.get(platform.machine(), ()) if target.required_flags <= cpu_flags()]


def compile_for(target: Target, folder: Path) -> Path:
    """Compile the kernels into a folder and return the library's path. The file ends with the SHA-256 of what precedes.

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
    content = path.read_bytes()
    with path.open("ab") as file:
        file.write(hashlib.sha256(content).digest())  # loaders ignore what follows the last section
    return path


def compiler() -> list[str]:
    """Return the command of the C compiler: $CC, or the first installed one; an empty list if none is installed."""
    configured = shlex.split(os.environ.get("CC", ""))
    commands = [configured] if configured else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *flags] for name, *flags in commands if (path := shutil.which(name))), [])


def default_cache() -> Path:
    """Return the default cache folder of this project: in XDG_CACHE_HOME, the home folder, or else the temporary folder."""
    configured = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(configured or Path.home() / ".cache") / "dinat-serve"
    except RuntimeError:  # no HOME, and a user without an entry in passwd
        return _private_folder()


def cache_folder() -> Path:
    """Return the folder of compiled libraries."""
    return default_cache() / "kernels"


def _private_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"dinat-serve-{os.getuid()}"


def private_folder() -> Path | None:
    """Return a folder in the temporary folder that only this user can write, or None if it cannot be created."""
    private = _private_folder()
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return private if is_private else None


def _folders() -> Iterator[Path]:
    """Yield the folders for compiled libraries: the cache, and a private folder."""
    yield cache_folder()
    private = private_folder()
    if private is not None:
        yield private / "kernels"


def _file_name(target: Target) -> str:
    sources = b"".join(path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h"))))
    digest = hashlib.sha256(sources + repr((FLAGS, target.compiler_flags)).encode()).hexdigest()[:16]
    return f"kernels-{target.name}-{digest}.so"


def _copy(path: Path, folder: Path) -> Path:
    """Copy a library into a folder atomically. Returns the copy. Raises OSError if that fails, and leaves nothing then."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
        try:
            copy.write(path.read_bytes())
            copy.flush()
            os.fsync(copy.fileno())
            os.replace(copy.name, folder / path.name)
        except OSError:
            os.unlink(copy.name)
            raise
    return folder / path.name
