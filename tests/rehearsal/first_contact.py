"""Run benchmarks.first_contact on the fake GPU, each part under coverage: `python -m tests.rehearsal.first_contact ARGUMENTS`.

REHEARSAL_COVERAGE is coverage's data file.
"""

import os
import sys

import coverage

import tests.rehearsal.plugin  # noqa: F401  # before anything imports Triton


def raises(*_: object) -> None:
    raise RuntimeError("no kernel image is available")


def main() -> int:
    measured = coverage.Coverage(
        os.environ["REHEARSAL_COVERAGE"], data_suffix=True, include=["benchmarks/first_contact.py"], config_file=False
    )
    measured.start()
    try:
        from benchmarks import first_contact, gpu
        from dinat.app import measurements
        from dinat.model import attention
        from dinat.model.gpu import mlp_kernel
        from tests.rehearsal.benchmark import natten_without_float32
        from tests.rehearsal.fake_gpu import clocks
        from tests.rehearsal.fake_gpu.tensors import shapes_only

        gpu.LAYERS = [(8, 1, 7, 1)]
        first_contact.FUSED = [(2, 4, 32, 64)]
        first_contact.NETWORKS, first_contact.PROFILED = [("mini", 1)], ("mini", 1)
        first_contact.TESTS = "fp32_is_fp32"
        first_contact.PYTHON = [sys.executable, "-c", "import tests.rehearsal.plugin; exec(__import__('sys').argv[1])"]
        first_contact.PYTEST = ["-m", "pytest", "-p", "tests.rehearsal.plugin"]
        first_contact.PARTS = {name: (part, 10 * limit) for name, (part, limit) in first_contact.PARTS.items()}
        measurements.BATCH["cuda"] = 2
        if "kernels" in sys.argv:
            attention.BACKENDS["natten"] = natten_without_float32
        if {"fused", "core"} & set(sys.argv):
            mlp_kernel.launch = raises
        without_values = {"networks", "profiler", "attention"} & set(sys.argv) if "--part" in sys.argv else set()
        with clocks.single_host_thread():
            if without_values:
                with shapes_only():
                    return first_contact.main()
            return first_contact.main()
    finally:
        measured.stop()
        measured.save()


if __name__ == "__main__":
    raise SystemExit(main())
