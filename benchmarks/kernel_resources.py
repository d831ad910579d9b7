"""Resources and instruction counts of the Triton kernels, compiled for several GPUs on any machine, without a GPU.

    python -m benchmarks.kernel_resources [75 80 86 89 90 100 120] [--dtypes bf16 fp32 fp16] [--kernels attention fused]

Prints one line of JSON for each compute capability, dtype, cut and layer: registers per thread, bytes they spill, bytes of
shared memory per program, instructions for tensor cores, warps resident on a multiprocessor out of its maximum, keys read per
query, and instructions (of a thread) per query-key pair of the definition, which has kernel_size**2 pairs per query.
Instructions are counted in the machine code: once outside the loop over blocks of keys, as often as it runs inside.
For the kernels of model/gpu (fused, half precision only): their configuration and the same resources.
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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dinat.model.attention.triton_kernel import Tables, TileConfig, attend, constants, tables, tile_configs
from dinat.model.gpu import linear_kernel, mlp_kernel
from dinat.model.gpu.linear_kernel import LinearConfig
from dinat.model.gpu.mlp_kernel import MlpConfig

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


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, as text, and the resources that it uses: bytes, and registers per thread."""

    registers: int
    spilled: int
    shared: int
    assembly: str


def examined(kernel: triton.compiler.CompiledKernel) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name))
        assembly = tool("nvdisasm", "-c", file.name)
    assert used is not None
    return Compiled(int(used[1]), int(used[2]), kernel.metadata.shared, assembly)


def compiled(capability: int, dtype: str, cut: TileConfig, table: Tables, head_dim: int) -> triton.compiler.CompiledKernel:
    fixed = constants(DTYPES[dtype], head_dim, table.queries.shape[1], table.keys.shape[1], cut)
    types = dict.fromkeys(["q", "k", "v", "out", "bias"], f"*{dtype}") | dict.fromkeys(["queries", "keys", "kinds"], "*i32")
    types |= dict.fromkeys(fixed, "constexpr") | {"scale": "fp32", "tiles": "i32", "heads": "i32"}
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


def parsed(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions of a kernel's disassembly, and the index of the one that follows each label."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    length = 1 + max(i for i, text in enumerate(instructions) if "EXIT" in text)
    return instructions[:length], labels


def products(assembly: str) -> int:
    """Return how many instructions for tensor cores the machine code has."""
    return sum(bool(TENSOR_CORE.match(text)) for text in parsed(assembly)[0])


def executed(assembly: str, trips: int) -> int:
    """Count the instructions that a warp executes, from the disassembly of a kernel whose only loop runs `trips` times."""
    instructions, labels = parsed(assembly)
    length = len(instructions)
    back = [
        (labels[target[1]], i + 1)
        for i, text in enumerate(instructions)
        if (target := re.search(r"BRA.*`\((\.L_\w+)\)", text)) and labels.get(target[1], length) < i
    ]
    loops = [end - start for start, end in back if end - start >= MIN_LOOP]
    assert len(loops) <= 1, f"expected at most one loop, found {len(loops)}"
    return length + sum(body * (trips - 1) for body in loops)


def resources(capability: int, dtype: str, cut: TileConfig, layer: str, head_dim: int = 32) -> dict[str, object]:
    side, kernel_size, dilation = LAYERS[layer]
    table = tables(side, side, kernel_size, dilation, cut, torch.device("cpu"))
    kernel = examined(compiled(capability, dtype, cut, table, head_dim))
    tiles, keys = table.keys.shape
    threads = executed(kernel.assembly, keys // cut.keys) * 32 * cut.warps * tiles
    return {
        "capability": capability,
        "dtype": dtype,
        "cut": str(cut),
        "layer": layer,
        "head_dim": head_dim,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "shared": kernel.shared,
        "tensor core": products(kernel.assembly),
        "warps": resident_warps(capability, kernel, cut.warps),
        "keys/query": round(tiles * keys / side**2, 2),
        "instructions/pair": round(threads / (side**2 * kernel_size**2), 1),
    }


def resident_warps(capability: int, kernel: Compiled, warps: int) -> str:
    """Return how many warps are resident on a multiprocessor, out of its maximum."""
    multiprocessor = MULTIPROCESSORS[capability]
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers, by_threads = 65536 // (per_warp * warps), multiprocessor.threads // (32 * warps)
    programs = min(multiprocessor.programs, by_registers, by_threads, multiprocessor.shared // (kernel.shared + 1024))
    return f"{programs * warps}/{multiprocessor.threads // 32}"


VARIANTS: dict[str, tuple[bool, set[str]]] = {
    "norm": (False, {"scale", "add"}),
    "norm, GELU": (True, {"scale", "add"}),
    "sum": (False, {"norm_weight", "norm_bias", "scale"}),
    "scale, sum": (False, {"norm_weight", "norm_bias"}),
}
"""What is fused into a linear layer: whether GELU is, and the arguments that are None."""
MLPS = {64: False, 96: False, 128: True, 192: False, 256: True}
"""Channels of MLPs in published networks, and whether they have a layer scale."""


def fused_rows(capability: int, dtype: str) -> Iterator[dict[str, object]]:
    """Compile the candidates of model/gpu, for layers of the published networks."""
    for variant, (is_gelu, without) in VARIANTS.items():
        for config in linear_kernel.CONFIGS:
            fixed = linear_kernel.constants(DTYPES[dtype], 32, is_gelu, config) | dict.fromkeys(without)
            yield fused_row(capability, dtype, linear_kernel.linear, fixed, config, f"linear ({variant})")
    for channels, has_scale in MLPS.items():
        for cut in mlp_kernel.configs(channels, 64):
            fixed = mlp_kernel.constants(DTYPES[dtype], channels, 64, cut) | ({} if has_scale else {"scale": None})
            yield fused_row(capability, dtype, mlp_kernel.mlp, fixed, cut, f"MLP of {channels} channels")


def fused_row(
    capability: int, dtype: str, kernel: Any, fixed: dict[str, Any], config: LinearConfig | MlpConfig, name: str
) -> dict[str, object]:
    types = dict.fromkeys(("rows", "inputs", "outputs", "hidden"), "i32") | {"eps": "fp32"} | dict.fromkeys(fixed, "constexpr")
    signature = {argument: types.get(argument, f"*{dtype}") for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and argument != "rows")
    }
    machine_code = examined(
        triton.compile(
            ASTSource(kernel, signature, fixed, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": config.stages},
        )
    )
    return {
        "capability": capability,
        "dtype": dtype,
        "kernel": name,
        "cut": str(config),
        "registers": machine_code.registers,
        "spilled": machine_code.spilled,
        "shared": machine_code.shared,
        "tensor core": products(machine_code.assembly),
        "warps": resident_warps(capability, machine_code, config.warps),
        "instructions": len(parsed(machine_code.assembly)[0]),
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
    parser.add_argument(
        "--kernels", nargs="+", choices=["attention", "fused"], default=["attention", "fused"], help="default: all"
    )
    arguments = parser.parse_args()
    if not set(arguments.capabilities) <= set(MULTIPROCESSORS):
        parser.error(f"a capability is one of {', '.join(map(str, MULTIPROCESSORS))}")
    capabilities = arguments.capabilities or [capability for capability in MULTIPROCESSORS if capability >= 80]
    for kind in arguments.kernels:
        for capability in capabilities:
            if kind == "attention":
                printed = rows([capability], arguments.dtypes, list(LAYERS))
            else:
                printed = (row for dtype in arguments.dtypes if dtype != "fp32" for row in fused_rows(capability, dtype))
            for row in printed:
                print(json.dumps(row), flush=True)
