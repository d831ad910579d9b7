"""The installed package: public names, lazy imports, and no conflict with a user's own modules."""

import ast
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

import dinat
import dinat.model

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, cwd: Path = ROOT, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """Run Python in a subprocess with this checkout on its path."""
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("statement", ["import dinat", "from dinat import DinatClient", "import dinat.client"])
def test_import_does_not_load_torch(statement: str) -> None:
    done = run_python("-c", f"{statement}\nimport sys\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", dinat.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(dinat, name) is not None
    assert name in dir(dinat)


@pytest.mark.parametrize("module", [dinat, dinat.model])
def test_type_checkers_know_every_public_name(module: ModuleType) -> None:
    assert module.__file__ is not None
    blocks = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    imported = {name.asname for block in blocks for name in ast.walk(block) if isinstance(name, ast.alias)}
    assert imported == {*module.__all__} - {"__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dinat' has no attribute 'nothing'"):
        dinat.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["dinat", "dinat.cli"])
@pytest.mark.parametrize("command", [[], ["info"]])
def test_commands_work_beside_modules_named_app_and_model(module: str, command: list[str], tmp_path: Path) -> None:
    error = "raise ImportError('a module of the user was imported')\n"
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text(error)
    (tmp_path / "model.py").write_text(error)
    done = run_python("-m", module, *command, "--help", cwd=tmp_path, path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {' '.join(['dinat', *command])} " in done.stdout


def test_uvicorn_in_a_checkout_registers_operators_once() -> None:
    code = """
import sys
from collections import Counter
from pathlib import Path

import torch
from uvicorn.importer import import_from_string

registered = []
custom_op = torch.library.custom_op

def record(name, *args, **kwargs):
    registered.append(name)
    return custom_op(name, *args, **kwargs)

torch.library.custom_op = record

import dinat.model

assert import_from_string("app.main:app").title == "dinat-serve"
assert "dinat::tiled_attention" in registered
assert max(Counter(registered).values()) == 1, registered

root = Path("model").resolve()
files = [Path(module.__file__).resolve() for module in sys.modules.values() if getattr(module, "__file__", None)]
copies = Counter(file for file in files if file.is_relative_to(root))
assert root / "dinat.py" in copies
assert max(copies.values()) == 1, copies
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_package_is_typed() -> None:
    assert files(dinat).joinpath("py.typed").is_file()
