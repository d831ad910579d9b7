"""Resources and instruction counts of the Triton kernel, compiled for several GPUs on any machine, without a GPU.

    python -m benchmarks.kernel_resources [75 80 86 89 90 100 120] [--dtypes bf16 fp32 fp16]

Prints one line of JSON for each compute capability, dtype, cut and layer: registers per thread, bytes they spill, bytes of
shared memory per program, instructions for tensor cores, warps resident on a multiprocessor out of its maximum, keys read per
query, and instructions (of a thread) per query-key pair of the definition, which has kernel_size**2 pairs per query.
Instructions are counted in the machine code: once outside the loop over blocks of keys, as often as it runs inside.
Capability 7.5 is measured only if it is named: Triton uses no tensor cores there, so the kernel is no candidate.
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
LARGER_HEADS = (64, 128)
"""Values of head_dim besides 32, for the first layer."""
TENSOR_CORE = re.compile(r"^(@!?U?P\d+ )?(HMMA|HGMMA|UTCHMMA)\b")
"""Instructions of tensor cores: of a warp, of a warp group (sm_90), and of a multiprocessor (sm_100)."""
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
    75: Multiprocessor(1024, 16, 64 * 1024),
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


def executed(assembly: str, trips: int) -> tuple[int, int]:
    """Count the instructions that a warp executes, from the disassembly of a kernel whose only loop runs `trips` times.

    Returns:
        All instructions, and how many instructions for tensor cores the machine code has.
    """
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
    products = sum(bool(TENSOR_CORE.match(text)) for text in instructions[:length])
    return length + sum(body * (trips - 1) for body in loops), products


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
    instructions, products = executed(assembly, keys // cut.keys)
    threads = instructions * 32 * cut.warps * tiles
    return {
        "capability": capability,
        "dtype": dtype,
        "cut": str(cut),
        "layer": layer,
        "head_dim": head_dim,
        "registers": int(used[1]),
        "spilled": int(used[2]),
        "shared": shared,
        "tensor core": products,
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
            for head_dim in LARGER_HEADS:
                for cut in tile_configs(DTYPES[dtype], head_dim):
                    yield resources(capability, dtype, cut, layers[0], head_dim)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "capabilities", type=int, nargs="*", help=f"of {', '.join(map(str, MULTIPROCESSORS))}; default: from 80"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="default: bf16 fp32")
    arguments = parser.parse_args()
    if not set(arguments.capabilities) <= set(MULTIPROCESSORS):
        parser.error(f"a capability is one of {', '.join(map(str, MULTIPROCESSORS))}")
    capabilities = arguments.capabilities or [capability for capability in MULTIPROCESSORS if capability >= 80]
    for row in rows(capabilities, arguments.dtypes, list(LAYERS)):
        print(json.dumps(row), flush=True)
