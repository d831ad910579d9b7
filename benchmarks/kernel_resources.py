"""Resources and instruction counts of the Triton kernel, compiled for several GPUs on any machine, without a GPU.

    python -m benchmarks.kernel_resources [80 86 89 90 100 120] [--all-dtypes]

Prints one line of JSON for each compute capability, dtype, cut and layer, at head_dim 32: registers per thread, bytes they
spill, bytes of shared memory per program, warps resident on a multiprocessor out of its maximum, keys read per query, and
instructions (of a thread) per query-key pair of the definition, which has kernel_size**2 pairs per query. Instructions are
counted in the machine code: once outside the loop over blocks of keys, as often as it runs inside.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dinat.model.attention.triton_kernel import Tables, TileConfig, attend, constants, tables, tile_configs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LAYERS = {"56x56 k7 d1": (56, 7, 1), "56x56 k7 d8": (56, 7, 8), "96x96 k11 d1": (96, 11, 1)}
"""Side of the feature map, kernel size and dilation: the first stage of Mini, without and with dilation, and of Large with
kernel 11 at 384."""
HEADS = 2
MIN_LOOP = 24
"""Instructions; a shorter loop waits for a barrier."""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor: resident threads and programs, bytes of shared memory (CUDA C++ Programming Guide).

    All have 65,536 registers.
    """

    threads: int
    programs: int
    shared: int


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 * 1024),
    86: Multiprocessor(1536, 16, 100 * 1024),
    89: Multiprocessor(1536, 24, 100 * 1024),
    90: Multiprocessor(2048, 32, 228 * 1024),
    100: Multiprocessor(2048, 32, 228 * 1024),
    120: Multiprocessor(1536, 24, 100 * 1024),
}


def compiled(capability: int, dtype: str, cut: TileConfig, table: Tables, head_dim: int) -> triton.compiler.CompiledKernel:
    fixed = constants(DTYPES[dtype], head_dim, table.queries.shape[1], table.keys.shape[1], cut)
    types = dict.fromkeys(["q", "k", "v", "out", "bias"], f"*{dtype}") | dict.fromkeys(["queries", "keys", "kinds"], "*i32")
    types |= dict.fromkeys(fixed, "constexpr") | {"scale": "fp32", "heads": "i32"}
    strides = [name for name in attend.arg_names if name not in types]
    types |= dict.fromkeys(strides, "i32")
    # Strides are multiples of 16, as in the published networks; the launcher specializes the kernel for that too.
    multiples = {name for name, kind in types.items() if kind.startswith("*")} | set(strides)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(attend.arg_names) if name in multiples}
    return triton.compile(
        ASTSource(attend, {name: types[name] for name in attend.arg_names}, fixed, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": cut.warps, "num_stages": cut.stages},
    )


def tool(name: str, *arguments: str | Path) -> str:
    """Run one of NVIDIA's tools, which come with Triton, and return its output."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def executed(assembly: str, trips: int) -> int:
    """Count the instructions that a warp executes, from the disassembly of a kernel whose only loop runs `trips` times."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    length = 1 + max(i for i, text in enumerate(instructions) if "EXIT" in text)
    back = [
        (labels[target[1]], i + 1)
        for i, text in enumerate(instructions[:length])
        if (target := re.search(r"BRA.*`\((\.L_\w+)\)", text)) and labels.get(target[1], length) < i
    ]
    loops = [end - start for start, end in back if end - start >= MIN_LOOP]
    assert len(loops) <= 1, f"expected at most one loop, found {len(loops)}"
    return length + sum(body * (trips - 1) for body in loops)


def resources(capability: int, dtype: str, cut: TileConfig, layer: str, head_dim: int = 32) -> dict[str, object]:
    side, kernel_size, dilation = LAYERS[layer]
    table = tables(side, side, kernel_size, dilation, cut, torch.device("cpu"))
    kernel = compiled(capability, dtype, cut, table, head_dim)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name))
        assembly = tool("nvdisasm", "-c", file.name)
    assert used is not None
    multiprocessor, shared = MULTIPROCESSORS[capability], kernel.metadata.shared
    per_warp = -(-int(used[1]) * 32 // 256) * 256
    by_registers, by_threads = 65536 // (per_warp * cut.warps), multiprocessor.threads // (32 * cut.warps)
    programs = min(multiprocessor.programs, by_registers, by_threads, multiprocessor.shared // (shared + 1024))
    tiles, keys = table.keys.shape
    threads = executed(assembly, keys // cut.keys) * 32 * cut.warps * tiles
    return {
        "capability": capability,
        "dtype": dtype,
        "cut": str(cut),
        "layer": layer,
        "registers": int(used[1]),
        "spilled": int(used[2]),
        "shared": shared,
        "warps": f"{programs * cut.warps}/{multiprocessor.threads // 32}",
        "keys/query": round(tiles * keys / side**2, 2),
        "instructions/pair": round(threads / (side**2 * kernel_size**2), 1),
    }


def rows(capabilities: list[int], dtypes: list[str], layers: list[str]) -> Iterator[dict[str, object]]:
    for capability in capabilities:
        for dtype in dtypes:
            for cut in tile_configs(DTYPES[dtype], 32):
                for layer in layers:
                    yield resources(capability, dtype, cut, layer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="*", help=f"of {', '.join(map(str, MULTIPROCESSORS))}; default: all")
    parser.add_argument("--all-dtypes", action="store_true", help="also fp16, which differs from bf16 only in conversions")
    arguments = parser.parse_args()
    if not set(arguments.capabilities) <= set(MULTIPROCESSORS):
        parser.error(f"a capability is one of {', '.join(map(str, MULTIPROCESSORS))}")
    dtypes = list(DTYPES)[: 3 if arguments.all_dtypes else 2]
    for row in rows(arguments.capabilities or list(MULTIPROCESSORS), dtypes, list(LAYERS)):
        print(json.dumps(row), flush=True)
