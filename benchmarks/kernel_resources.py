"""What the fused kernel takes of a card, compiled for it on any machine, with no GPU.

    python -m benchmarks.kernel_resources 80 90 100

One line of JSON for each compute capability, dtype and kernel size, at head_dim 32: registers per thread, bytes they spill to
local memory, and bytes of shared memory per program.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.attention.triton_kernel import attend, constants, shape_for

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STRIDES = [f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "row", "column", "head")]


def ptxas(ptx: str, capability: int) -> str:
    """What NVIDIA's assembler, which comes with Triton, says of a kernel."""
    tool = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={architecture[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def resources(capability: int, dtype: str, kernel_size: int, head_dim: int = 32) -> dict[str, object]:
    shape = shape_for(DTYPES[dtype], head_dim)
    fixed = constants(DTYPES[dtype], kernel_size, head_dim, True, shape)
    signature = {name: f"*{dtype}" for name in ("q", "k", "v", "out")} | {"rpb": "*fp32"}
    signature |= dict.fromkeys([*STRIDES, "height", "width", "heads", "dilation", "tiles_x"], "i32")
    signature |= {"scale_log2e": "fp32"} | dict.fromkeys(fixed, "constexpr")
    ordered = {name: signature[name] for name in attend.arg_names}
    compiled = triton.compile(
        ASTSource(attend, ordered, fixed),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )
    said = ptxas(compiled.asm["ptx"], capability)
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert used is not None and spilled is not None, said
    return {
        "capability": capability,
        "dtype": dtype,
        "kernel_size": kernel_size,
        "registers": int(used[1]),
        "spilled": int(spilled[1]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:] or ["80", "90", "100"]):
        for dtype in DTYPES:
            for kernel_size in (7, 11):
                print(json.dumps(resources(capability, dtype, kernel_size)), flush=True)
