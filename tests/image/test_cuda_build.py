"""`make cuda-build`: what the GPU image installs, on a machine without a GPU; a compiled libcuda answers for the driver.

PyTorch's build for CUDA takes 6 GB. CUDA_BUILD_TORCH selects another release of it than constraints.txt, and CUDA_BUILD_VENV
names a folder in which it stays installed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.e2e.processes import DIGITS

ROOT = Path(__file__).parents[2]
INDEX = "https://download.pytorch.org/whl"
CAPABILITIES = ("75", "80", "86", "89", "90", "100", "120")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.cuda_build,
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    pytest.mark.timeout(3600),
]


def instructions(stage: str) -> list[str]:
    """The RUN instructions of a stage of the Dockerfile, but for those that install Debian's packages."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    (body,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM )", text, re.MULTILINE | re.DOTALL)
    return [run for run in re.findall(r"^RUN (.*)$", body, re.MULTILINE) if "apt-get" not in run]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def python(folder: Path) -> Path:
    """Python of an environment that the Dockerfile's instructions made."""
    venv = Path(os.environ.get("CUDA_BUILD_VENV") or folder / "venv").absolute()
    if not (venv / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        for name in ("constraints.txt", "requirements-image.txt"):
            shutil.copy(ROOT / name, folder)
        if release := os.environ.get("CUDA_BUILD_TORCH"):
            pins = (folder / "constraints.txt").read_text()
            pins = re.sub(
                r"^triton==.*\n", "", re.sub(r"^torch==.*", f"torch=={release}", pins, flags=re.MULTILINE), flags=re.MULTILINE
            )
            (folder / "constraints.txt").write_text(pins)
        arguments = {"CUDA": "13.0", "VARIANT": "gpu", "TORCH_INDEX": os.environ.get("TORCH_INDEX", INDEX)}
        variables = {"PIP_NO_INDEX": "", **os.environ, **arguments, "PATH": f"{venv}/bin:{os.environ['PATH']}"}
        for command in instructions("packages"):
            subprocess.run(["sh", "-ec", command.replace("/opt/venv", str(venv))], check=True, cwd=folder, env=variables)
        (venv / "complete").touch()
    pip: list[str | Path] = [venv / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "dinat", ROOT], check=True)
    return venv / "bin" / "python"


@pytest.fixture(scope="module")
def old_driver(folder: Path) -> Path:
    """A folder with the libcuda and nvidia-smi of a driver for CUDA 12.2."""
    driver = folder / "driver"
    driver.mkdir()
    source = "int cuDriverGetVersion(int *version) { *version = 12020; return 0; }\n"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", driver / "libcuda.so.1"]
    subprocess.run(command, input=source, text=True, check=True)
    (driver / "nvidia-smi").write_text("#!/bin/sh\necho 535.104.05\n")
    (driver / "nvidia-smi").chmod(0o755)
    return driver


def environment(folder: Path, driver: Path | None = None) -> dict[str, str]:
    """Environment of a command, with empty caches."""
    dropped = {"TRITON_INTERPRET", "PYTHONPATH"}
    base = {name: value for name, value in os.environ.items() if name not in dropped}
    base |= {
        "PYTHONPATH": f"{folder / 'dinat'}:{ROOT}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    base |= {"DINAT_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    if driver is not None:
        base |= {"LD_LIBRARY_PATH": str(driver), "PATH": f"{driver}:{base['PATH']}"}
    return base


def run(python: Path, folder: Path, *arguments: str, driver: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=900, cwd=folder, env=environment(folder, driver)
    )


def test_imports_and_build(python: Path, folder: Path) -> None:
    code = (
        "import torch, triton, dinat.app.main, dinat.model.attention.triton_kernel; "
        "print(torch.__version__, torch.version.cuda, triton.__version__, torch.cuda.device_count())"
    )
    done = run(python, folder, "-c", code)
    assert done.returncode == 0, done.stderr
    print(f"\nPyTorch, CUDA, Triton: {done.stdout}", end="")
    release, cuda, _, gpus = done.stdout.split()
    assert cuda.startswith("13.")
    assert gpus == "0"
    assert release.partition("+")[0] == os.environ.get("CUDA_BUILD_TORCH", release.partition("+")[0])


@pytest.mark.parametrize("has_driver", [False, True])
def test_serve_on_cuda_is_one_line_and_status_1(has_driver: bool, python: Path, folder: Path, old_driver: Path) -> None:
    driver = old_driver if has_driver else None
    done = run(python, folder, "-m", "dinat", "serve", "--device", "cuda", "--port", "0", driver=driver)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    if has_driver:
        assert "NVIDIA driver 535.104.05 supports CUDA up to 12.2, but PyTorch 2." in line
        assert line.endswith("install driver 580 or later, or build the image with --build-arg CUDA=12.6")
    else:
        assert "device 'cuda' is not available, PyTorch finds 0 CUDA devices" in line


@pytest.mark.parametrize("has_driver", [False, True])
def test_auto_serves_on_the_cpu_with_one_warning(has_driver: bool, python: Path, folder: Path, old_driver: Path) -> None:
    process = subprocess.Popen(
        [python, "-m", "dinat", "serve", "--port", "0", "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(folder, old_driver if has_driver else None),
    )
    assert process.stderr is not None
    log: list[str] = []
    try:
        while '"ready"' not in (line := process.stderr.readline()):
            assert line, log
            log.append(line)
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+", "".join(log))
        answer = httpx.post(f"{url}/classify", content=(DIGITS / "7-1.png").read_bytes(), timeout=60).json()
        assert answer["predictions"][0]["label"] == "7"
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    events = [json.loads(line) for line in [*log, *rest.splitlines()] if line.startswith("{")]
    (warning,) = [event for event in events if event["level"] == "warning" and "GPU" in event["event"]]
    assert "no GPU was found" in warning["event"]
    assert ("535.104.05" in warning["reason"]) is has_driver


@pytest.mark.parametrize("has_driver", [False, True])
def test_doctor_names_only_an_old_driver(has_driver: bool, python: Path, folder: Path, old_driver: Path) -> None:
    done = run(python, folder, "-m", "dinat", "doctor", "--json", driver=old_driver if has_driver else None)
    report = json.loads(done.stdout)
    assert done.returncode == has_driver, report["problems"]
    assert report["devices"] == []
    assert [problem.partition(" supports")[0] for problem in report["problems"]] == ["NVIDIA driver 535.104.05"] * has_driver


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_its_ptxas_compiles_the_kernel(capability: str, python: Path, folder: Path) -> None:
    """In float32 and the GPU's half precision: fp16 before sm_80."""
    half = "fp16" if capability == "75" else "bf16"
    code = (
        "import sys, torch; from benchmarks.kernel_resources import DTYPES, compiled; "
        "from dinat.model.attention.triton_kernel import tables, tile_configs\n"
        f"for dtype in ('fp32', {half!r}):\n"
        "    for cut in tile_configs(DTYPES[dtype], 32):\n"
        "        kernel = compiled(int(sys.argv[1]), dtype, cut, tables(56, 56, 7, 1, cut, torch.device('cpu')), 32)\n"
        "        assert kernel.asm['cubin'][:4] == b'\\x7fELF'\n"
        "        print(dtype, len(kernel.asm['cubin']))"
    )
    done = run(python, folder, "-c", code, capability)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"fp32", half}


def test_torch_compile_finds_the_headers_that_the_image_has(python: Path, folder: Path) -> None:
    code = (
        "import torch; f = torch.compile(lambda x: (x.sin() + x.cos()).sum(-1), fullgraph=True); x = torch.randn(64, 64); "
        "torch.testing.assert_close(f(x), (x.sin() + x.cos()).sum(-1)); print('compiled')"
    )
    done = run(python, folder, "-W", "ignore", "-c", code)
    assert done.stdout == "compiled\n", done.stderr[-2000:]
    assert list((folder / "inductor").rglob("*.cpp"))


def test_triton_finds_gcc_and_the_headers_of_python(python: Path, folder: Path) -> None:
    source = (
        "#include <Python.h>\n"
        'static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", 0, -1, 0};\n'
        "PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }\n"
    )
    code = f"from triton.runtime.build import compile_module_from_src as c; print(c({source!r}, 'probe').__name__)"
    environment_without_cc = {name: value for name, value in environment(folder).items() if name != "CC"}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder, env=environment_without_cc
    )
    assert done.stdout == "probe\n", done.stderr
