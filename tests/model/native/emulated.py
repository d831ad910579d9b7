"""Kernels on CPUs that this machine does not have: ARM NEON in QEMU, and x86-64 matrix units (AMX) in plain C."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from dinat.model import native

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
IS_INSTALLED = bool(shutil.which(COMPILER) and shutil.which(EMULATOR))
[NEON] = native.TARGETS["aarch64"]
EMULATED = [NEON] if IS_INSTALLED and NEON not in native.supported_targets() else []
TARGETS = [
    *native.supported_targets()[:1],
    *(pytest.param(target, marks=pytest.mark.slow) for target in native.supported_targets()[1:]),
    *(pytest.param(target, marks=[pytest.mark.emulator, pytest.mark.slow]) for target in EMULATED),
]
"""Targets that can run on this machine, as parameters of the tests of all kernels."""


[_AVX512] = [target for target in native.TARGETS["x86_64"] if target.name == "avx512"]
MATRIX_UNITS = native.Target(
    "amx-in-c",
    _AVX512.required_flags,
    (
        *_AVX512.compiler_flags,
        *("-D__AMX_BF16__=1", "-include", str(Path(__file__).with_name("matrix_units.h"))),
    ),
)
"""The kernels for AMX, with matrix_units.h in the place of its instructions. Requires AVX-512."""


def library_for(target: native.Target, folder: Path) -> "native.Library | Emulated":
    """Compile the kernels for a target, and load them or run them in the emulator."""
    if target not in native.supported_targets():
        return Emulated(folder)
    return native.Library(native.compile_for(target, folder), target)


class Emulated:
    """The interface of native.Library; each call is a process in the emulator."""

    has_matrix_units = False
    target = NEON

    def __init__(self, folder: Path) -> None:
        self._program = folder / "emulated"
        flags = [flag for flag in (*native.FLAGS, *NEON.compiler_flags) if flag not in ("-shared", "-fPIC")]
        sources = map(str, (*native.SOURCES, Path(__file__).with_name("emulated.c")))
        subprocess.run([COMPILER, *flags, "-static", *sources, "-lm", "-o", self._program], check=True, capture_output=True)
        self.lanes = int(self._run(3, []))

    def attend(self, is_half: int, q: int, k: int, v: int, out: int, *rest: float) -> None:
        """Run dinat_attend."""
        images, positions, heads, stride, image_stride, tiles, tile_count, queries, keys, bias, scale, threads = rest
        size = 2 if is_half else 4
        input_bytes = ((images - 1) * image_stride + (positions - 1) * stride + heads * 32) * size
        rows = torch.tensor(_longs(int(tiles), int(tile_count) * 5)).view(-1, 5)
        padded = -(-rows[:, 4] // 8) * 8
        ends = [(rows[:, 0] + rows[:, 3]), (rows[:, 1] + rows[:, 4]), (rows[:, 2] + int(heads) * padded) * self.lanes]
        tables = [(int(pointer), int(end.max()) * 4) for pointer, end in zip((queries, keys, bias), ends, strict=True)]
        output = (out, int(images * positions * heads) * 32 * size)
        inputs = [(pointer, int(input_bytes)) for pointer in (q, k, v)]
        sizes = [int(n) for n in (images, positions, heads, stride, image_stride)]
        tile_table = (int(tiles), len(rows) * 40)
        self._call(0, is_half, *inputs, output, *sizes, tile_table, len(rows), *tables, float(scale), int(threads))

    def layer_norm(
        self, is_half: int, x: int, out: int, rows: int, channels: int, weight: int, bias: int, *rest: float
    ) -> None:
        """Run dinat_layer_norm."""
        size = 2 if is_half else 4
        total, row = rows * channels * size, channels * size
        eps, threads = rest
        self._call(1, is_half, (x, total), (out, total), rows, channels, (weight, row), (bias, row), float(eps), int(threads))

    def resample(self, columns_first: int, image: bytes, height: int, width: int, between: int, out: int, *rest: int) -> None:
        """Run dinat_resample."""
        out_height, out_width, x_starts, x_weights, steps, y_starts, y_counts, y_weights, most = rest
        intermediate = 4 * (out_height * width if columns_first else height * out_width)
        outputs = (between, intermediate), (out, out_height * out_width * 3)
        horizontal = (x_starts, out_width * 4), (x_weights, out_width * steps * self.lanes * 4)
        vertical = (y_starts, out_height * 4), (y_counts, out_height * 4), (y_weights, out_height * most * 4)
        self._call(2, columns_first, image, height, width, *outputs, out_height, out_width, *horizontal, steps, *vertical, most)

    def _call(self, kernel: int, *arguments: float | bytes | tuple[int, int]) -> None:
        """Run a kernel with numbers, bytes, and (address, size) pairs, whose memory is updated with the results."""
        parts = []
        for argument in arguments:
            if isinstance(argument, float):
                parts.append(b"f" + struct.pack("<f", argument))
            elif isinstance(argument, int):
                parts.append(b"i" + struct.pack("<q", argument))
            else:
                data = argument if isinstance(argument, bytes) else ctypes.string_at(*argument)
                parts.append(b"p" + struct.pack("<q", len(data)) + data)
        output = memoryview(self._run(kernel, parts))
        for argument in arguments:
            if isinstance(argument, bytes):
                output = output[len(argument) :]
            elif isinstance(argument, tuple):
                address, size = argument
                ctypes.memmove(address, bytes(output[:size]), size)
                output = output[size:]

    def _run(self, kernel: int, parts: list[bytes]) -> bytes:
        data = struct.pack("<q", kernel) + b"".join(parts)
        return subprocess.run([EMULATOR, self._program], input=data, capture_output=True, check=True).stdout


def _longs(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))
