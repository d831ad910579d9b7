"""The kernels of another kind of processor (ARM's NEON) on an emulator of it, where a cross compiler and QEMU are there."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from dinat.model import native

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
IS_THERE = bool(shutil.which(COMPILER) and shutil.which(EMULATOR))
[NEON] = native.KINDS["aarch64"]
KINDS = [*native.kinds(), *([NEON] if IS_THERE and NEON not in native.kinds() else [])]
"""What can be run here."""


def library_for(kind: native.Kind, folder: Path) -> "native.Library | Emulated":
    """The sources compiled for a kind that this processor is, or for the one that is emulated."""
    return Emulated(folder) if kind not in native.kinds() else native.Library(native.compile_for(kind, folder), kind)


class Emulated:
    """A library as native.Library is, each call of which is a process on the emulator."""

    has_matrix_units = False
    kind = NEON

    def __init__(self, folder: Path) -> None:
        self._program = folder / "emulated"
        flags = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC")]
        sources = map(str, (*native.SOURCES, Path(__file__).with_name("emulated.c")))
        subprocess.run(
            [COMPILER, *flags, *NEON.flags, "-static", *sources, "-lm", "-o", self._program], check=True, capture_output=True
        )
        self.lanes = int(self._run(3, []))

    def attend(self, is_half: int, q: int, k: int, v: int, out: int, *rest: float) -> None:
        """dinat_attend."""
        images, positions, heads, stride, image_stride, tiles, tile_count, queries, keys, bias, scale, threads = rest
        size = 2 if is_half else 4
        read = ((images - 1) * image_stride + (positions - 1) * stride + heads * 32) * size
        rows = torch.tensor(_longs(int(tiles), int(tile_count) * 5)).view(-1, 5)
        padded = -(-rows[:, 4] // 8) * 8
        sizes = [(rows[:, 0] + rows[:, 3]), (rows[:, 1] + rows[:, 4]), (rows[:, 2] + int(heads) * padded) * self.lanes]
        pointers = [(int(p), int(numbers.max()) * 4) for p, numbers in zip((queries, keys, bias), sizes, strict=True)]
        written = (out, int(images * positions * heads) * 32 * size)
        arrays = [(pointer, int(read)) for pointer in (q, k, v)]
        numbers = [int(n) for n in (images, positions, heads, stride, image_stride)]
        table = (int(tiles), len(rows) * 40)
        self._call(0, is_half, *arrays, written, *numbers, table, len(rows), *pointers, float(scale), int(threads))

    def layer_norm(
        self, is_half: int, x: int, out: int, rows: int, channels: int, weight: int, bias: int, *rest: float
    ) -> None:
        """dinat_layer_norm."""
        size = 2 if is_half else 4
        maps, each = rows * channels * size, channels * size
        eps, threads = rest
        self._call(1, is_half, (x, maps), (out, maps), rows, channels, (weight, each), (bias, each), float(eps), int(threads))

    def resample(self, columns_first: int, picture: bytes, height: int, width: int, between: int, out: int, *rest: int) -> None:
        """dinat_resample."""
        out_height, out_width, x_starts, x_weights, steps, y_starts, y_counts, y_weights, most = rest
        kept = 4 * (out_height * width if columns_first else height * out_width)
        sizes = (between, kept), (out, out_height * out_width * 3)
        across = (x_starts, out_width * 4), (x_weights, out_width * steps * self.lanes * 4)
        down = (y_starts, out_height * 4), (y_counts, out_height * 4), (y_weights, out_height * most * 4)
        self._call(2, columns_first, picture, height, width, *sizes, out_height, out_width, *across, steps, *down, most)

    def _call(self, kernel: int, *arguments: float | bytes | tuple[int, int]) -> None:
        """arguments: numbers, bytes, and addresses with the number of bytes there, which are what the kernel left in them."""
        parts = []
        for argument in arguments:
            if isinstance(argument, float):
                parts.append(b"f" + struct.pack("<f", argument))
            elif isinstance(argument, int):
                parts.append(b"i" + struct.pack("<q", argument))
            else:
                there = argument if isinstance(argument, bytes) else ctypes.string_at(*argument)
                parts.append(b"p" + struct.pack("<q", len(there)) + there)
        left = memoryview(self._run(kernel, parts))
        for argument in arguments:
            if isinstance(argument, bytes):
                left = left[len(argument) :]
            elif isinstance(argument, tuple):
                address, size = argument
                ctypes.memmove(address, bytes(left[:size]), size)
                left = left[size:]

    def _run(self, kernel: int, parts: list[bytes]) -> bytes:
        asked = struct.pack("<q", kernel) + b"".join(parts)
        return subprocess.run([EMULATOR, self._program], input=asked, capture_output=True, check=True).stdout


def _longs(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))
